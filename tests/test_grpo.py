"""Tests of grpo.py."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import grpo
import model
import optim
from tests.common import (
    GRPO_RUN,
    ROOT,
    assert_same_gradients,
    double_model,
    error_of,
    gradients,
    in_process,
    raises,
    run,
    weights_of,
)


def _reference_loss(logprobs, old, ref, advantages, mask, loss, level, low, high, hard, beta, kl,
                    longest, total):
    """The formulas of the papers, a token at a time."""
    (B, T), number = mask.shape, lambda x: torch.tensor(x, dtype=torch.float64)
    rows = []
    for i in range(B):
        length = int(mask[i].sum())
        terms = []
        log_ratios = [logprobs[i, t] - old[i, t] for t in range(T) if mask[i, t]]
        mean_ratio = torch.exp(sum(log_ratios, number(0.0)) / max(1, length))
        for t in range(T):
            if not mask[i, t]:
                continue
            A, own = advantages[i], torch.exp(logprobs[i, t] - old[i, t])
            r = mean_ratio if level == "sequence" else own
            if loss == "cispo":
                term = -min(r.item(), 1 + high) * A * logprobs[i, t]
            else:
                unclipped = (r if hard is None or r <= hard else number(hard)) * A
                clipped = min(max(r, number(1 - low)), number(1 + high)) * A
                term = -(unclipped if unclipped <= clipped else clipped)
            if beta:
                d = ref[i, t] - logprobs[i, t]
                k3 = torch.exp(d) - 1 - d
                estimates = {"k1": -d, "k2": d * d / 2, "k3": k3, "k3_corrected": own * k3}
                term = term + beta * estimates[kl]
            terms.append(term)
        rows.append(terms)
    tokens = sum(map(len, rows))
    if loss == "grpo":
        return sum(sum(terms) / len(terms) for terms in rows if terms) / (total or B)
    if loss == "dr_grpo":
        return sum(sum(terms) for terms in rows) / (total or B * longest)
    return sum(sum(terms) for terms in rows) / (total or tokens)


def _loss_case(seed=0, B=5, T=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -draw(B, T).abs() - 0.1
    old, ref = logprobs + 0.4 * draw(B, T), logprobs + 0.5 * draw(B, T)
    # a whole row, a single token, an empty row
    mask = torch.arange(T) < torch.tensor([6, 4, 1, 5, 0])[:, None]
    return logprobs, old, ref, draw(B), mask


def test_grpo_every_loss_equals_its_formula():
    """Value and gradient, float64, against a loop over tokens: every loss, level, bound, divergence
    and normaliser."""
    logprobs, old, ref, advantages, mask = _loss_case()
    checked = 0
    for loss, level, hard, (beta, kl), total in itertools.product(
            ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), ("token", "sequence"), (None, 1.5),
            ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3"), (0.3, "k3_corrected")),
            (None, 37)):
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        value, _ = grpo.policy_loss(ours, old, ref if beta else None, advantages, mask, loss=loss,
                                    level=level, clip_hard=hard, beta=beta, kl=kl,
                                    max_completion_tokens=6, total=total)
        wanted = _reference_loss(theirs, old, ref, advantages, mask, loss, level, 0.2, 0.28, hard,
                                 beta, kl, 6, total)
        value.backward(), wanted.backward()
        assert abs(value.item() - wanted.item()) < 1e-12, (loss, level, hard, beta, kl, total)
        worst = (ours.grad - theirs.grad).abs().max()
        assert worst < 1e-12, (loss, level, hard, beta, kl, total)
        checked += 1
    assert checked == 200


def test_grpo_negative_advantage_keeps_its_gradient_above_the_clip():
    """A max() where PPO takes min() left bad completions that had become likelier without a
    gradient, in other code."""
    # ratio e^0.9, far above 1.28
    logprobs = torch.tensor([[0.9]], dtype=torch.float64, requires_grad=True)
    case = logprobs, torch.zeros(1, 1), None, torch.tensor([-1.0]), torch.ones(1, 1)
    loss, stats = grpo.policy_loss(*case)
    loss.backward()
    assert logprobs.grad.item() > 1 and stats["clipped_high"] == 0
    bounded = grpo.policy_loss(*case, clip_hard=1.5)[0]
    assert abs(bounded.item() - 1.5) < 1e-9


def test_grpo_loss_survives_degenerate_rows():
    """Padding may hold anything; rows of no tokens count for nothing; absurd log-probabilities stay
    finite."""
    logprobs, old, ref, advantages, mask = _loss_case()
    spoilt = [torch.where(mask, x, torch.tensor(v, dtype=torch.float64))
              for x, v in ((logprobs, -1e30), (old, 1e30), (ref, 5e29))]
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        kw = {"loss": loss, "beta": 0.1, "max_completion_tokens": 6}
        spoilt[0].requires_grad_()
        a, b = (grpo.policy_loss(*case, advantages, mask, **kw)[0]
                for case in (spoilt, (logprobs, old, ref)))
        gradient, = torch.autograd.grad(a, spoilt[0])
        assert torch.isfinite(a) and torch.isclose(a, b) and not gradient[~mask].any(), loss
        none = torch.zeros_like(mask)
        assert grpo.policy_loss(logprobs, old, ref, advantages, none, **kw)[0] == 0
    far = (torch.full((1, 1), x) for x in (-1.0, -500.0, -900.0))
    assert torch.isfinite(grpo.policy_loss(*far, torch.ones(1), torch.ones(1, 1), beta=1.0)[0])


def test_grpo_k1_in_the_loss_has_no_mean_gradient():
    """Why k1 is no penalty: over the policy's samples, log p - log ref has that of log p, which is
    0 in the mean."""
    logits = torch.randn(8, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(8, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(1)).log_softmax(-1)

    def mean_gradient(kl):
        logprobs = logits.log_softmax(-1)
        triples = [[x[i].view(1, 1) for x in (logprobs, logprobs.detach(), ref)] for i in range(8)]
        each = [grpo.policy_loss(*three, torch.zeros(1), torch.ones(1, 1), beta=1.0, kl=kl)[0]
                for three in triples]
        return torch.autograd.grad(sum(p.item() * loss for p, loss in zip(logprobs.exp(), each)),
                                   logits)[0]

    logprobs = logits.log_softmax(-1)
    exact, = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    assert mean_gradient("k1").abs().max() < 1e-12
    # the corrected k3 has that of the divergence itself
    assert torch.allclose(mean_gradient("k3_corrected"), exact)
    assert not torch.allclose(mean_gradient("k3"), exact, atol=1e-2)


def test_grpo_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.1, 1.1, 0, 1]])
    for scale in ("group", "batch", "none"):
        a = grpo.group_advantages(rewards, scale)
        assert a.sum(1).abs().max() < 1e-5 and not a[1].any()
    a = grpo.group_advantages(rewards)
    # deviation over n - 1: 0.5
    assert torch.allclose(a[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    assert torch.allclose(grpo.group_advantages(rewards, "batch")[0, 0],
                          0.75 / (rewards.std() + 1e-4))
    for bad in ((torch.ones(3, 1),), (rewards, "std")):
        with raises(ValueError, "expected"):
            grpo.group_advantages(*bad)


def _group(texts, answers=None, lengths=None, limit=100):
    import generate
    import verify

    problem = {"problem": "How many?", "answer": "4"}
    lengths = lengths or [len(t) for t in texts]
    completions = [generate.Completion(list(range(n)), [0.0] * n, "stop") for n in lengths]
    right = [verify.verify(text, "4", strict=True) for text in texts]
    return grpo.Group(problem, [], texts, completions, right, limit, "think")


def test_grpo_worst_right_answer_beats_best_wrong_one():
    """Over all the weights that are accepted: the penalties at their worst against the bonuses at
    their best."""
    rng = random.Random(0)
    for _ in range(200):
        raw = {name: rng.random() for name in grpo.REWARDS if name != "accuracy"}
        scale = rng.uniform(0.1, 0.999) / sum(raw.values())
        words = [f"{name}={value * scale:.6f}" for name, value in raw.items()]
        coefficients = grpo.parse_rewards(["accuracy=1", *words])
        bonus = coefficients["format"]
        penalties = sum(coefficients.values()) - coefficients["accuracy"] - bonus
        assert coefficients["accuracy"] - penalties > bonus, coefficients
    with raises(ValueError, "wrong answer"):
        grpo.parse_rewards(["accuracy=1", "format=0.5", "brevity=0.5"])
    right = "<think>\nla la la la la la 的的的的\n</think>\n\\boxed{4} 的"
    group = _group([right, "<think>\nthought\n</think>\n\\boxed{5}"], lengths=[100, 40])
    group = group._replace(completions=[group.completions[0]._replace(tokens=[7] * 100),
                                        group.completions[1]])
    words = ["accuracy=1", "format=0.1", "brevity=0.2", "repetition=0.2", "language=0.1",
             "overlong=0.2"]
    group = grpo.reward_group(group, grpo.parse_rewards(words))
    assert group.rewards[0] > group.rewards[1], group.parts
    assert all(-1 <= v <= 1 for values in group.parts.values() for v in values)


def test_grpo_each_reward():
    box = "\\boxed{4}"
    texts = [f"<think>\n{t}\n</think>\n{box}" for t in ("a", "b", "c")] + ["\\boxed{5}"]
    group = _group(texts, lengths=[10, 20, 40, 5], limit=40)
    assert grpo.accuracy(group) == [1, 1, 1, 0]
    # relative to the shortest right one, of 10; the wrong one is not it
    assert grpo.brevity(group) == [0, -0.5, -1, 0]
    assert grpo.overlong(group) == [0, 0, -1, 0]
    assert grpo.well_formed(group)[0] == 1
    assert grpo.well_formed(_group(["<think>\nno end \\boxed{4}",
                                    f"{box} and more text {box}"])) == [0, 0]
    looped = _group(["x"])
    looped = looped._replace(completions=[looped.completions[0]._replace(tokens=[1, 2] * 50)])
    assert grpo.repetition(looped)[0] < -0.9 and grpo.repetition(_group(["x"], lengths=[60])) == [0]
    assert grpo.language(_group(["plain text", "половина half"])) == [0, -8 / 12]
    assert grpo.language(_group(["x"])._replace(problem={"problem": "Сколько?"},
                                                texts=["ответ x"])) == [0]


def _rollout_groups(config, sampler, seed=0):
    """Groups with completions of very different lengths, sampled by the engine."""
    import generate
    prompts = [[5, 9, 3, 7, 2, 8, 4], [11, 2], [6] * 12]
    answers = generate.generate(sampler, config, prompts, num_samples=4, max_new_tokens=12,
                                temperature=0.8, stop_tokens=(1, 3, 7, 9), seed=seed)
    return [(prompt, [grpo.Sequence(c.tokens, c.logprobs, a, True)
                      for c, a in zip(row, (1.0, -0.5, 0.3, -0.8))])
            for prompt, row in zip(prompts, answers)]


def test_grpo_packed_group_equals_one_row_each():
    """The prompt computed once for its G completions: the loss and the gradient of G rows by
    themselves."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    lengths = {len(s.tokens) for _, sequences in groups for s in sequences}
    assert len(lengths) > 2, "the lengths should differ"

    def packed(p):
        logprobs, _, mask = grpo.row_logprobs(p, config, groups, 0.8)
        A = torch.tensor([s.advantage for _, sequences in groups for s in sequences])
        grpo.policy_loss(logprobs, logprobs.detach(), None, A, mask)[0].backward()

    def alone(p):
        total = sum(len(s.tokens) for _, sequences in groups for s in sequences)
        for prompt, sequences in groups:
            for s in sequences:
                logprobs = model.token_logprobs(p, config, torch.tensor([prompt + s.tokens]),
                                                temperature=0.8)
                said = logprobs[:, len(prompt) - 1:]
                (-s.advantage * (said - said.detach()).exp().sum() / total).backward()

    assert_same_gradients(gradients(params, packed), gradients(params, alone), 1e-6)


def test_grpo_sampler_and_scorer_agree():
    """On policy the ratio is 1: the engine recorded what training computes, end token and
    temperature included."""
    params, config = double_model()
    params = {k: v.float() for k, v in params.items()}
    for prompt, sequences in _rollout_groups(config, params):
        logprobs, entropy, mask = grpo.row_logprobs(params, config, [(prompt, sequences)], 0.8)
        for row, seen, s in zip(logprobs, mask, sequences):
            assert seen.sum() == len(s.tokens)  # the end token is in the loss
            assert (row[seen] - torch.tensor(s.logprobs)).abs().max() < 1e-4


def _args(*words, config=None):
    """grpo.py's flags, with what is left out filled in for a model, the tiny one by default."""
    args = grpo.parse_args([str(word) for word in words])
    grpo.fill_defaults(args, config or model.load_config(ROOT / "data" / "tiny"))
    return args


def _update(params, config, groups, micro_tokens, **changes):
    """grpo.update from `params`: (the new params, the sums that it returns)."""
    flags = {"micro_tokens": micro_tokens, "lr": 1e-3, "temperature": 0.8, "max_new_tokens": 12}
    flags = (flags | changes).items()
    args = _args(*(word for k, v in flags for word in (f"--{k.replace('_', '-')}", v)))
    trained, optimizer = optim.init_optimizer({k: v.float() for k, v in params.items()})
    lengths = [len(s.tokens) for _, sequences in groups for s in sequences]
    total = grpo.loss_total(args.loss, lengths, 12)
    reference = {k: v.float() for k, v in params.items()}
    rows = grpo.pack_groups(groups, micro_tokens)
    policy = grpo.Policy(trained, config, None, None)
    sums = grpo.update(policy, reference, optimizer, rows, total, 1e-3, args)
    return {k: v.detach().clone() for k, v in trained.items()}, sums


def test_grpo_update_does_not_depend_on_micro_batches():
    """For every loss: one row of everything, or rows so short that groups are divided (trl#3021,
    #5619)."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        _, sums = _update(params, config, groups, 10_000, loss=loss, beta=0.05)
        norm = sums["grad_norm"]
        for micro_tokens in (60, 18):
            _, other = _update(params, config, groups, micro_tokens, loss=loss, beta=0.05)
            assert abs(norm - other["grad_norm"]) < 1e-4 * norm, (loss, micro_tokens)
            assert abs(sums["loss"] - other["loss"]) < 1e-5 and sums["tokens"] == other["tokens"]


def test_grpo_first_update_is_on_policy_and_later_ones_are_not():
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    _, sums = _update(params, config, groups, 10_000)
    assert sums["ratio"] == sums["tokens"] and sums["clipped_low"] == sums["clipped_high"] == 0
    assert sums["mismatch"] / sums["tokens"] < 1e-5
    _, sums = _update(params, config, groups, 10_000, updates=3)
    assert abs(sums["ratio"] / sums["tokens"] - 1) > 1e-6


def test_grpo_pack_groups_keeps_every_completion():
    groups = [([1] * p, [grpo.Sequence([g] * n, [0.0] * n, 0.0, True) for g, n in enumerate(sizes)])
              for p, sizes in ((5, (3, 9, 2)), (2, (30, 1)), (7, (4,)))]
    for budget in (1, 12, 20, 1000):
        rows = grpo.pack_groups(groups, budget)
        packed = [s for row in rows for _, piece in row for s in piece]
        assert packed == [s for _, sequences in groups for s in sequences]
        for row in rows:
            size = sum(len(prompt) + sum(len(s.tokens) for s in piece) for prompt, piece in row)
            assert size <= budget or (len(row) == 1 and len(row[0][1]) == 1)


def test_grpo_order_of_problems_is_a_function_of_the_seed():
    sets = [[{"id": f"a{i}", "level": i % 5 + 1} for i in range(10)],
            [{"id": f"b{i}"} for i in range(4)]]

    def take(n, skip=0):
        order = grpo.problem_order(sets, [3, 1], 0)
        return [p["id"] for _, p in itertools.islice(order, skip, skip + n)]

    assert take(60)[20:] == take(40, skip=20)
    first = [x for x in take(200) if x[0] == "a"]
    epochs = [first[i:i + 10] for i in range(0, 100, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs), "each epoch asks each problem once"
    assert 0.6 < len(first) / 200 < 0.9
    order = grpo.problem_order(sets[:1], [1], 0, curriculum=True)
    levels = [p["level"] for _, p in itertools.islice(order, 10)]
    assert sum(levels[:5]) < sum(levels[5:])


def test_grpo_killed_and_resumed_ends_with_the_same_weights(kills=1, seed=0):
    """kill -9 at random moments; the run that goes on ends with the weights of the unbroken one,
    bit for bit."""
    rng, steps = random.Random(seed), 3 + 2 * kills
    flags = [*GRPO_RUN, "--steps", steps]  # argparse heeds the last
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = (Path(scratch) / name for name in ("whole", "broken"))
        run(*flags, "--run-dir", whole)
        for _ in range(kills):
            resume = list(broken.glob("checkpoints/step_*"))
            if not resume:  # it died before it could save
                shutil.rmtree(broken, ignore_errors=True)
            words = ["grpo.py", "--resume"] if resume else flags
            words = [*words, "--run-dir", broken]
            process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT,
                                       stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
            next((line for line in process.stdout if line.startswith("step ")), None)
            time.sleep(rng.uniform(0, 1))  # in a rollout, an update, an evaluation or a save
            process.kill()
            process.wait()
        out = run("grpo.py", "--run-dir", broken, "--resume")
        assert "resuming from" in out and f"step {steps}/{steps}" in out, out
        assert weights_of(whole, steps) == weights_of(broken, steps)
        timed = ("rollout_s", "update_s", "tokens_per_s", "left_min", "peak_memory_gib")
        logs = [[{k: v for k, v in json.loads(line).items() if k not in timed}
                 for line in open(run / "metrics.jsonl")]
                for run in (whole, broken)]
        assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == list(range(1, steps + 1))
        assert (whole / "results.md").read_text() == (broken / "results.md").read_text()


def test_grpo_entropy_bonus_is_of_a_token_in_every_loss():
    """It was divided by the loss's normaliser, rows for "grpo": a bonus as many times larger as a
    row has tokens."""
    logprobs, old, ref, advantages, mask = (x[:4] for x in _loss_case())
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        value, _ = grpo.policy_loss(logprobs, old, ref, 0 * advantages, mask, loss=loss,
                                    max_completion_tokens=6,
                                    bonus=torch.ones_like(logprobs))
        expected = mask.sum().item() / 24 if loss == "dr_grpo" else 1
        assert abs(value.item() + expected) < 1e-12, (loss, value)
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    groups = [(prompt, [s._replace(advantage=0.0) for s in sequences])
              for prompt, sequences in groups]
    for bonus in (0.5, -0.5):  # entropy goes up, or down
        after, sums = _update(params, config, groups, 10_000, entropy_bonus=bonus)
        assert sums["grad_norm"] > 0
        assert abs(sums["loss"] + bonus * sums["entropy"] / sums["tokens"]) < 1e-4
        _, then = _update(after, config, groups, 10_000, entropy_bonus=bonus)
        assert (then["entropy"] - sums["entropy"]) * bonus > 0


def test_grpo_cispo_counts_what_it_clips():
    """It clips from above only, whatever the sign of the advantage; PPO's regions were counted."""
    logprobs, A = torch.tensor([[0.9, 0.0], [0.9, -0.9]]), torch.tensor([1.0, -1.0])
    case = logprobs, torch.zeros(2, 2), None, A, torch.ones(2, 2)
    stats = grpo.policy_loss(*case, loss="cispo")[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (0, 2)
    stats = grpo.policy_loss(*case)[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (1, 1)


def test_grpo_truncated_rows_alone_make_no_update():
    """With --mask-truncated and nothing finished, a zero gradient still moved the weights by their
    momentum."""
    def spread(group):
        return [float(i % 2) for i in range(len(group.texts))]

    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(grpo.REWARDS, format=spread):
        words = [*GRPO_RUN[1:], "--steps", 1, "--test-limit", 0, "--max-new-tokens", 2, "--reward",
                 "format=1"]
        for flags, updates in (([], 1), (["--mask-truncated"], 0)):
            run = f"{scratch}/{updates}"
            out = in_process("grpo", *words, *flags, "--run-dir", run)
            assert "truncated 1.00" in out and "no spread 0.00" in out, out
            trainer = Path(run, "checkpoints", "step_000001", "trainer.json").read_text()
            assert json.loads(trainer)["updates"] == updates


def test_grpo_held_out_problems_are_not_trained_on():
    """--data ./mine.jsonl --eval-data mine.jsonl: taken for two files, and measured on what was
    trained on."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mine.jsonl"
        path.write_text("".join(f'{{"problem": "What is {i}+{i}?", "answer": "{2 * i}"}}\n'
                                for i in range(60)))
        for spelled in (path, os.path.relpath(path),
                        f"{scratch}/../{Path(scratch).name}/mine.jsonl"):
            args = _args("--data", f"{spelled}=2", "--eval-data", path)
            trained = {p["id"] for p in grpo.load_mixture(args.data, None)[0][0]}
            dev, test = grpo.load_held_out(args.eval_data, args.data, 200, 500)
            assert dev and test and not trained & {p["id"] for p in dev + test}, spelled
        args = _args("--data", "arithmetic", "--eval-data", path)
        assert len(grpo.load_held_out(args.eval_data, args.data, 200, 500)[1]) == 60


def test_grpo_and_sft_pass_offload_on():
    """--offload was read, printed and saved, and changed nothing."""
    import sft

    config, told = model.load_config(ROOT / "data" / "tiny"), []

    def stop(trainable, device="cpu", dtype=None, offload=False):
        told.append(offload)
        raise InterruptedError

    for rank in (0, 2):
        args = _args("--offload", "--lora-rank", rank)
        for script in (grpo, sft):
            with mock.patch.object(script, "init_optimizer", stop), raises(InterruptedError):
                if script is grpo:
                    grpo.make_trainable({}, config, args, "cpu")
                else:
                    words = ["--offload", "--lora-rank", str(rank), "--processes", "1"]
                    args = sft.parse_args(["--data", "none", *words])
                    sft.load_trainable(args, ROOT / "data" / "tiny", config)
    assert told == [True] * 4


def test_grpo_and_sft_help():
    """--help died of a default that is only known with the model."""
    for script, shown in (("grpo", "'lr': 0.0005"), ("sft", "all weights 1e-5")):
        with contextlib.redirect_stdout(io.StringIO()) as out, raises(SystemExit, "0"):
            __import__(script).parse_args(["--help"])
        assert shown in out.getvalue() and out.getvalue().count("  --lr LR") == 1


def test_grpo_prompts_can_earn_the_reward():
    """Presets with worked examples, which training does not show, and those that ask for no box are
    refused."""
    import eval
    assert "boxed" in grpo.PROMPTS and "few-shot-cot" not in grpo.PROMPTS
    assert "minerva-math" not in grpo.PROMPTS
    # roll_out would have to cut the text there
    assert all(not eval.PRESETS[name].stop for name in grpo.PROMPTS)
    assert _args("--epochs", "2").steps is None


def test_grpo_result_does_not_depend_on_the_number_of_processes():
    with tempfile.TemporaryDirectory() as scratch:
        run(*GRPO_RUN, "--run-dir", f"{scratch}/one", "--steps", 2)
        run("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29653, *GRPO_RUN,
             "--run-dir", f"{scratch}/two", "--steps", 2, "--device", "cpu")
        if sys.platform == "linux":
            run(*GRPO_RUN, "--run-dir", f"{scratch}/forked", "--steps", 2, "--processes", 2)
            assert weights_of(f"{scratch}/two", 2) == weights_of(f"{scratch}/forked", 2)
        one, two = ([json.loads(line) for line in open(f"{scratch}/{name}/metrics.jsonl")]
                    for name in ("one", "two"))
        for key in ("reward", "accuracy", "length", "no_spread", "dev_accuracy"):
            for a, b in zip(one, two):  # sums in another order: equal but for rounding
                assert abs(a.get(key, 0) - b.get(key, 0)) < 1e-9, (key, a.get(key), b.get(key))
        for a, b in zip(one, two):
            a, b = a["grad_norm"], b["grad_norm"]
            assert abs(a - b) < 1e-3 * max(1e-3, a), (a, b)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live: on the meta device,
    of a GPU's run."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def drop(self, key):
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out


def _traced_peak_gib(config, args):
    """GiB at the peak of grpo.update on tensors without storage, for one full row.

    Attention is by a GPU's fused kernel.
    """
    def fused(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = None
        if attn_mask is not None:
            *rest, S = attn_mask.shape
            padded = q.new_zeros(*rest, -(-S // 16) * 16)
            bias = padded[..., :S].expand(*q.shape[:2], -1, -1)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(q, k, v, bias, True, 0.0, is_causal)[0]

    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused)
    lora = {}
    if args.lora_rank:
        lora = model.init_lora(config, args.lora_rank, 0)
    with attention, _LiveBytes() as counter:
        dtype = torch.bfloat16 if args.lora_rank else torch.float32
        params = {name: torch.empty(shape, device="meta", dtype=dtype)
                  for name, shape in model.param_shapes(config).items()}
        if args.lora_rank:
            lora = {name: tensor.to("meta") for name, tensor in lora.items()}
            lora, optimizer = optim.init_optimizer(lora, "meta")
            params |= lora
        else:
            params, optimizer = optim.init_optimizer(params, "meta", torch.bfloat16)
        completion = grpo.Sequence([1] * 500, [-1.0] * 500, 0.5, True)
        row = [([1] * 96, [completion] * 8)] * 4  # 16,384 tokens
        counter.peak = counter.now
        policy = grpo.Policy(params, config, None, None)
        grpo.update(policy, None, optimizer, [row], 16000, 1e-6, args)
        return counter.peak / 2**30


CONFIG_1_5B = model.Config(151936, 1536, 8960, 28, 12, 2)
CONFIG_7B = model.Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)


def test_grpo_plan_errs_upward_by_a_fifth_at_most():
    """1.5b with an adapter for 24 GB; four layers of 7b with all weights: as traced, or more."""
    four_layers = CONFIG_7B._replace(num_hidden_layers=4)
    for config, words in ((CONFIG_1_5B, ["--lora-rank", 32]),
                          (four_layers, ["--no-checkpointing", "--lora-rank", 0]),
                          (four_layers, ["--lora-rank", 0])):
        args = _args(*words, "--max-new-tokens", 500, "--group", 8, "--prompts", 4, config=config)
        traced = _traced_peak_gib(config, args)
        plan = grpo.memory_plan(config, args, 1, "cuda", prompt=96)
        planned = plan.update - optim.ALLOWANCE_GIB["cuda"]
        assert 1.0 <= planned / traced < 1.2, (words, planned, traced)


def _settled(config, gib, *words):
    """(args of a run on one GPU of so much memory, the line that says what is trained)."""
    args = grpo.parse_args([str(word) for word in words])
    with contextlib.ExitStack() as stack:
        gpu = mock.patch.object(optim, "find_device", lambda name: torch.device("cuda", 0))
        stack.enter_context(gpu)
        stack.enter_context(mock.patch.object(optim, "memory_there", lambda *_: gib))
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        grpo.settle_flags(args, config)
    return args, said.getvalue()


def test_grpo_trains_all_weights_where_they_fit():
    """What is trained, and so the learning rate, follows from the memory, unless a flag says it."""
    args, said = _settled(CONFIG_1_5B, 24.0)
    assert (args.lora_rank, args.lr) == (32, 3e-5) and "--lora-rank 0" in said, said
    assert "adapter of rank 32" in said and "of 24.0 GiB" in said and said.count("\n") == 1, said
    args, said = _settled(CONFIG_1_5B, 80.0)
    assert (args.lora_rank, args.lr) == (0, 1e-6) and "all weights" in said, said
    assert args.micro_tokens == 16384 and args.checkpointing and args.data == ["gsm8k"]
    args, said = _settled(CONFIG_1_5B, 24.0, "--lora-rank", 0)
    assert (args.lora_rank, args.lr) == (0, 1e-6) and "warning" in said, said
    args, _ = _settled(CONFIG_1_5B, 80.0, "--lora-rank", 8, "--lr", 0.5)
    assert (args.lora_rank, args.lr) == (8, 0.5)
    with raises(ValueError, "bench.py plan", "8.0"):
        _settled(CONFIG_1_5B, 8.0)
    args, _ = _settled(model.load_config(ROOT / "data" / "tiny"), 24.0, "--model", "elsewhere")
    assert (args.lora_rank, args.lr, args.data) == (0, 5e-4, ["arithmetic"])
    args, _ = _settled(model.load_config(ROOT / "data" / "tiny"), 24.0, "--lora-rank", 8)
    assert args.lr == 3e-5


def test_grpo_prompts_that_fill_the_context_are_left_out():
    long = {"id": "long", "problem": "What is " + "1 + " * 600 + "1?", "answer": "601"}
    short = {"id": "short", "problem": "What is 1 + 1?", "answer": "2"}
    config = model.load_config(ROOT / "data/tiny")
    policy = grpo.Policy(None, config, model.load_tokenizer(ROOT / "data/tiny"), None)
    assert grpo.drop_long_prompts([long, short], policy, _args()) == [short]


def test_grpo_a_problem_twice_in_a_step_draws_its_own_noise_each_time():
    tiny = ROOT / "data/tiny"
    policy = grpo.Policy(model.load_params(tiny), model.load_config(tiny),
                         model.load_tokenizer(tiny), None)
    problem = {"id": "one", "problem": "What is 17 * 6 - 48?", "answer": "54"}
    args = _args("--group", 4, "--prompt", "cot")
    first, second = grpo.roll_out(policy, [(0, problem), (1, problem)], args)
    assert [c.tokens for c in first.completions] != [c.tokens for c in second.completions]


def test_grpo_samples_are_whole_groups_and_the_same_problems_each_time():
    """Every evaluation, and the moment before training: what readers of samples.jsonl rely on."""
    with tempfile.TemporaryDirectory() as scratch:
        for processes in (1, 2) if sys.platform == "linux" else (1,):
            run(*GRPO_RUN, "--prompts", 6, "--eval-limit", 10, "--test-limit", 0,
                "--processes", processes, "--run-dir", f"{scratch}/{processes}")
        lines = open(f"{scratch}/1/samples.jsonl").readlines()
        if sys.platform == "linux":  # whose groups are those of the first problems, whoever asked
            assert len(lines) == len(open(f"{scratch}/2/samples.jsonl").readlines())
        samples = [json.loads(line) for line in lines]
        kinds = [(sample["step"], sample["kind"]) for sample in samples]
        held_out = [(step, "held_out") for step in (0, 2, 4) for _ in range(8)]
        rollouts = [(step, "rollout") for step in (2, 4) for _ in range(4)]
        assert sorted(kinds) == sorted(held_out + rollouts), kinds
        asked = [sample["problem"] for sample in samples if sample["kind"] == "held_out"]
        assert asked[:8] == asked[8:16] == asked[16:]
        tokenizer = model.load_tokenizer(ROOT / "data/tiny")
        for sample in samples:
            completions = sample["completions"]
            assert len(completions) == (4 if sample["kind"] == "rollout" else 1)
            for c in completions:
                assert len(c["tokens"]) == len(c["logprobs"]) and max(c["logprobs"]) <= 0
                assert tokenizer.decode(c["tokens"]) == c["text"]
                assert c["finish"] in ("stop", "length")
                rewards = c["rewards"]
                assert abs(c["reward"] - rewards["accuracy"] - 0.1 * rewards["format"]) < 1e-9
                assert c["right"] == (rewards["accuracy"] == 1.0)
            advantages = [c["advantage"] for c in completions]
            if sample["kind"] == "held_out":
                assert advantages == [None]
            else:
                rewards = torch.tensor([[c["reward"] for c in completions]])
                expected = grpo.group_advantages(rewards)[0]
                assert torch.allclose(torch.tensor(advantages), expected, atol=1e-5), sample


def test_grpo_old_runs_resume_with_their_flags():
    """A flags.json of an earlier version: what is gone is ignored, what is new has its default."""
    with tempfile.TemporaryDirectory() as scratch:
        run(*GRPO_RUN, "--run-dir", scratch, "--steps", 2)
        path = Path(scratch) / "flags.json"
        flags = json.loads(path.read_text()) | {"lora_rank": 0, "gone": True}
        flags.pop("sampler_cap")
        path.write_text(json.dumps(flags))
        out = run("grpo.py", "--run-dir", scratch, "--resume", "--steps", 3)
        assert "step 3/3" in out and "--steps is now 3; it was 2" in out, out


def _refused(*words):
    """What grpo.py says of a flag that it refuses."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with contextlib.suppress(SystemExit):
            grpo.parse_args([str(word) for word in words])
    return said.getvalue()


def test_grpo_bad_input():
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty.jsonl"
        empty.write_text("")
        (Path(scratch) / "full").mkdir()
        (Path(scratch) / "full" / "file").write_text("mine")
        for words, said in (
                (["--model", "no-such-model"], "no-such-model"),
                (["--data", f"{scratch}/none.jsonl"], "none.jsonl"), (["--data", empty], "empty"),
                (["--data", "arithmetic=0"], "not a positive"),
                (["--reward", "kindness=1"], "kindness"),
                (["--run-dir", f"{scratch}/full"], "not empty"),
                (["--max-new-tokens", 4000], "4000"), (["--clip-hard", 1.2], "--clip-high 0.28"),
                (["--epochs", 2, "--steps", 8], "--epochs")):
            error = error_of("grpo", "--run-dir", f"{scratch}/run", *words)
            assert said in error, (words, error)
    for words in (["--group", 1], ["--temperature", 0], ["--lr", -1], ["--clip-low", 1],
                  ["--prompt", "minerva-math"]):
        assert words[0] in _refused(*words), words
    assert "--group: 1 is out of range" in run("grpo.py", "--group", 1, ok=False)
