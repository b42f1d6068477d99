"""Tests of grpo.py."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import generate
import grpo
import launch
import losses
import metrics
import model
import optim
from data import load_problems, mixture, rewards
from engine import Engine, cache_slots
from run import list_checkpoints, make_trainable, read_trained_on, step_of
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


def test_grpo_distillation_is_the_reverse_kl_of_each_token():
    """The gradient of a token is (log p - log q) d log p, for the teacher's q, whose mean over the
    student's tokens is that of KL(p || q). Float64, a teacher of another depth and width."""
    params, config = double_model()
    teacher_config = model.Config(64, 16, 24, 3, 2, 1, initializer_range=0.3)
    teacher = model.init_params(teacher_config, seed=1, dtype=torch.float64)
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    groups = [(prompt, [s._replace(advantage=0.0) for s in sequences])
              for prompt, sequences in groups]
    sequences = [(prompt, s) for prompt, piece in groups for s in piece]
    tokens = sum(len(s.tokens) for _, s in sequences)
    total = losses.Total(tokens, tokens)
    args = _args("--teacher", "tiny", "--temperature", 0.8, "--sampler-cap", 1)
    assert (args.beta, args.reward) == (1.0, [])

    def packed(p):
        with torch.no_grad():
            ref, _, _ = grpo.row_logprobs(teacher, teacher_config, groups, 0.8)
        grpo.row_loss(p, config, groups, None, ref, total, args)[0].backward()

    def alone(p):
        for prompt, s in sequences:
            text = torch.tensor([prompt + s.tokens])
            logp, logq = (model.forward(*m, text)[0, len(prompt) - 1:-1].div(0.8).log_softmax(-1)
                          .gather(1, text[0, len(prompt):, None])
                          for m in ((p, config), (teacher, teacher_config)))
            ((logp - logq).detach() * logp / tokens).sum().backward()

    assert_same_gradients(gradients(params, packed), gradients(params, alone), 1e-5)


def test_grpo_distils_from_a_teacher_of_the_same_tokenizer():
    """Without rewards, groups of equal ones teach, and none is replaced."""
    tiny = ROOT / "data" / "tiny"
    with tempfile.TemporaryDirectory() as scratch:
        params, config = model.load_params(tiny), model.load_config(tiny)
        noise = torch.Generator().manual_seed(0)
        params = {k: v + 0.02 * torch.randn(v.shape, generator=noise) for k, v in params.items()}
        model.save_model(f"{scratch}/teacher", params, config, tiny)
        words = [*GRPO_RUN[1:], "--test-limit", 0, "--max-new-tokens", 20]
        words += ["--teacher", f"{scratch}/teacher", "--steps", 1]
        for flags in ([], ["--reward", "accuracy=1", "--lora-rank", 2]):
            out = in_process("grpo", *words, *flags, "--run-dir", f"{scratch}/{len(flags)}")
            *_, learned = map(json.loads, open(f"{scratch}/{len(flags)}/metrics.jsonl"))
            assert learned["kl"] > 0.01 and learned["grad_norm"] > 0.1, out
            assert f"kl {learned['kl']:.4f} nat" in out, out
            assert learned["epoch"] == 4 / 40 and ("reward_accuracy" in learned) == bool(flags)

        path = Path(scratch) / "teacher" / "tokenizer.json"
        raw = json.loads(path.read_text())
        swapped = dict(zip(raw["model"]["vocab"], reversed(raw["model"]["vocab"].values())))
        path.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": swapped}}))
        error = error_of("grpo", *words, "--run-dir", f"{scratch}/other")
        assert "tokens of its tokenizer" in error and "family" in error, error
        assert "--beta is 0" in error_of("grpo", *words, "--beta", 0)


def test_grpo_maxrl_takes_accuracy_alone():
    with raises(ValueError, "accuracy alone"):
        _args("--scale", "mean", "--reward", "accuracy=1", "format=0.1")
    assert _args("--scale", "mean").reward == ["accuracy=1"]
    assert _args().reward == ["accuracy=1", "format=0.1"]


def test_grpo_gdpo_leaves_out_what_is_undecided():
    coefficients = {"accuracy": 1.0, "brevity": 0.5}
    args = _args("--combine", "normalise", "--reward", "accuracy=1", "brevity=0.5")
    groups = [_group(["\\boxed{4}", "\\boxed{5}", "\\boxed{4}"], lengths=[10, 12, 40]),
              _group(["no", "no", "no"], lengths=[3, 4, 5])]
    groups = [rewards.reward_group(g, rewards.parse_rewards(args.reward)) for g in groups]
    first, second = grpo.with_advantages(groups, args)
    parts = {name: torch.tensor([values]) for name, values in groups[0].parts.items()}
    wanted = losses.combined_advantages(parts, coefficients, "group")[0].tolist()
    assert first.advantages == wanted and second.advantages == [0.0] * 3
    odd = groups[0]._replace(texts=[*groups[0].texts, "?"], right=[*groups[0].right, None],
                             completions=[groups[0].completions[i] for i in (0, 1, 2, 0)])
    odd = rewards.reward_group(odd, rewards.parse_rewards(args.reward))
    assert grpo.with_advantages([odd], args)[0].advantages == [*wanted, None]  # undecided


def _group(texts, answers=None, lengths=None, limit=100):
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
        raw = {name: rng.random() for name in rewards.REWARDS if name != "accuracy"}
        scale = rng.uniform(0.1, 0.999) / sum(raw.values())
        words = [f"{name}={value * scale:.6f}" for name, value in raw.items()]
        coefficients = rewards.parse_rewards(["accuracy=1", *words])
        bonus = coefficients["format"]
        penalties = sum(coefficients.values()) - coefficients["accuracy"] - bonus
        assert coefficients["accuracy"] - penalties > bonus, coefficients
    with raises(ValueError, "wrong answer"):
        rewards.parse_rewards(["accuracy=1", "format=0.5", "brevity=0.5"])
    right = "<think>\nla la la la la la 的的的的\n</think>\n\\boxed{4} 的"
    group = _group([right, "<think>\nthought\n</think>\n\\boxed{5}"], lengths=[100, 40])
    group = group._replace(completions=[group.completions[0]._replace(tokens=[7] * 100),
                                        group.completions[1]])
    words = ["accuracy=1", "format=0.1", "brevity=0.2", "repetition=0.2", "language=0.1",
             "overlong=0.2"]
    group = rewards.reward_group(group, rewards.parse_rewards(words))
    assert group.rewards[0] > group.rewards[1], group.parts
    assert all(-1 <= v <= 1 for values in group.parts.values() for v in values)


def _trained(groups):
    """What of these groups is learned: (sequences by group, tokens that count)."""
    rows, total = grpo.training_rows(grpo.with_advantages(groups, _args()), _args())
    return [[s for s in sequences] for row in rows for _, sequences in row], total.tokens


def test_grpo_undecided_verdicts_teach_nothing():
    """They counted as wrong: they were learned from, and moved the baseline of their group."""
    box = "\\boxed{4}"
    group = _group([box, "\\boxed{5}", box, "too hard"], lengths=[3, 4, 5, 6])
    group = group._replace(right=[True, False, True, None])
    accuracy = rewards.parse_rewards(["accuracy=1", "brevity=0.1"])
    undecided = rewards.reward_group(group, accuracy)
    assert undecided.rewards[1] == 0 and undecided.rewards[3] is None
    without = undecided._replace(completions=group.completions[:3], texts=group.texts[:3],
                                 rewards=undecided.rewards[:3], right=group.right[:3])
    for scale in ("group", "batch", "none"):
        a, b = (grpo.with_advantages([group], _args("--scale", scale))[0]
                for group in (undecided, without))
        assert a.advantages[3] is None
        assert all(abs(x - y) < 1e-6 for x, y in zip(a.advantages, b.advantages, strict=False))
    learned, total = _trained([undecided])
    assert [len(s.tokens) for s in learned[0]] == [3, 4, 5] and total == 12
    one = rewards.reward_group(group._replace(right=[None, None, True, None]), accuracy)
    none = rewards.reward_group(group._replace(right=[None] * 4), accuracy)
    assert not rewards.has_spread(one) and not rewards.has_spread(none)
    assert _trained([one, none]) == ([], 0)
    found = metrics.step_metrics([undecided, none], Counter(), _args())
    assert found["undecided"] == 5 / 8 and found["no_spread"] == 0.5
    assert abs(found["reward"] - sum(undecided.rewards[:3]) / 3) < 1e-9
    assert metrics.step_metrics([none], Counter(), _args())["reward"] == 0


SMALL_RUN = [*GRPO_RUN[1:], "--prompts", 2, "--group", 2, "--max-new-tokens", 4, "--refill", 0,
             "--eval-limit", 2, "--test-limit", 0]


def test_grpo_bad_rewards_stop_the_run():
    """"reward nan" went on to the end, exit code 0. A list that was too short gave what it said of
    one completion to another."""
    group = _group(["a", "b"])
    for values, said in (([0.0, math.nan], "returned nan"), ([-math.inf, 0.0], "returned -inf"),
                         ([0.0], "[0.0], expected a list of 2"), ([0.0] * 3, "list of 2"),
                         (None, "returned None"), (["1", 0.0], "returned '1'")):
        with mock.patch.dict(grpo.REWARDS, format=lambda group: values):
            with raises(ValueError, "--reward format", said, "expected"):
                rewards.reward_group(group, {"accuracy": 1.0, "format": 0.1})

    def spoilt(group):  # in the second step, when the first has been learned
        seen.append(len(group.texts))
        return [0.0, math.nan if seen.count(2) > 3 else 1.0][:len(group.texts)]

    seen = []
    with tempfile.TemporaryDirectory() as run, mock.patch.dict(grpo.REWARDS, format=spoilt):
        error = error_of("grpo", *SMALL_RUN, "--reward", "format=1", "--run-dir", run)
        assert "--reward format returned nan" in error, error
        assert step_of(list_checkpoints(run)[-1]) == 1
        steps = [json.loads(line)["step"] for line in open(f"{run}/metrics.jsonl")]
        assert steps == [0, 1]


def test_grpo_weights_that_are_not_finite_are_named():
    """A traceback from sampling, and from eval.py a table of wrong answers."""
    with tempfile.TemporaryDirectory() as scratch:
        policy = _tiny_policy()
        policy.params["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
        bad = Path(scratch) / "bad"
        model.save_model(bad, policy.params, policy.config, ROOT / "data/tiny")
        for top_p in (1.0, 0.9):
            with raises(ValueError, "not finite", "another checkpoint"):
                generate.generate(policy.params, policy.config, [[1, 2]], max_new_tokens=2,
                                  top_p=top_p)
        for script, words in (("grpo", [*GRPO_RUN[1:], "--run-dir", f"{scratch}/run"]),
                              ("eval", ["--results", f"{scratch}/results.jsonl", "--limit", 4])):
            assert "not finite" in error_of(script, *words, "--model", bad, "--processes", 1)
        assert not list_checkpoints(f"{scratch}/run")


def test_grpo_changed_data_is_refused_on_resume():
    with tempfile.TemporaryDirectory() as scratch:
        path = _write_problems(Path(scratch) / "mine.jsonl", range(40))
        in_process("grpo", *SMALL_RUN, "--data", path, "--run-dir", f"{scratch}/run", "--steps", 1)
        resume = ["--resume", "--run-dir", f"{scratch}/run", "--steps", 2]
        _write_problems(path, range(1, 41))
        error = error_of("grpo", *resume)
        assert "--data-sha256" in error and "put it back" in error, error
        _write_problems(path, range(40))
        assert "step 2/2" in in_process("grpo", *resume)


@contextlib.contextmanager
def _right_answers(*found):
    """Evaluations find these, one after the other."""
    with mock.patch.object(metrics, "right_answers", side_effect=found):
        yield


def test_grpo_best_checkpoint_may_be_the_first():
    with tempfile.TemporaryDirectory() as scratch:
        with _right_answers([1, 1], [0, 1], [0, 0]):
            out = in_process("grpo", *SMALL_RUN, "--run-dir", scratch)
        assert "step 0 | dev accuracy 1.000" in out, out
        best = f"{scratch}/checkpoints/best"
        assert Path(best).resolve().name == "step_000000"
        [*_, last] = out.splitlines()
        assert last.startswith("training did not help") and last.endswith(best), last


def test_grpo_each_reward():
    box = "\\boxed{4}"
    texts = [f"<think>\n{t}\n</think>\n{box}" for t in ("a", "b", "c")] + ["\\boxed{5}"]
    group = _group(texts, lengths=[10, 20, 40, 5], limit=40)
    assert rewards.accuracy(group) == [1, 1, 1, 0]
    # relative to the shortest right one, of 10; the wrong one is not it
    assert rewards.brevity(group) == [0, -0.5, -1, 0]
    assert rewards.overlong(group) == [0, 0, -1, 0]
    assert rewards.well_formed(group)[0] == 1
    assert rewards.well_formed(_group(["<think>\nno end \\boxed{4}",
                                    f"{box} and more text {box}"])) == [0, 0]
    looped = _group(["x"])
    looped = looped._replace(completions=[looped.completions[0]._replace(tokens=[1, 2] * 50)])
    assert rewards.repetition(looped)[0] < -0.9
    assert rewards.repetition(_group(["x"], lengths=[60])) == [0]
    assert rewards.language(_group(["plain text", "половина half"])) == [0, -8 / 12]
    assert rewards.language(_group(["x"])._replace(problem={"problem": "Сколько?"},
                                                texts=["ответ x"])) == [0]


def _rollout_groups(config, sampler, seed=0):
    """Groups with completions of very different lengths, sampled by the engine."""
    prompts = [[5, 9, 3, 7, 2, 8, 4], [11, 2], [6] * 12]
    answers = generate.generate(sampler, config, prompts, num_samples=4, max_new_tokens=12,
                                temperature=0.8, stop_tokens=(1, 3, 7, 9), seed=seed)
    return [(prompt, [grpo.Sequence(c.tokens, c.logprobs, a)
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
        losses.policy_loss(logprobs, logprobs.detach(), None, A, mask)[0].backward()

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
    total = losses.loss_total(args.loss, lengths, 12)
    reference = {k: v.float() for k, v in params.items()}
    rows = grpo.pack_groups(groups, micro_tokens)
    policy = grpo.Policy(trained, config, None, None)
    reference = policy._replace(params=reference)
    sums = grpo.update(policy, reference, optimizer, rows, total, 1e-3, args)
    return {k: v.detach().clone() for k, v in trained.items()}, sums


def test_grpo_update_does_not_depend_on_micro_batches():
    """For every loss: one row of everything, or rows so short that groups are divided (trl#3021,
    #5619)."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    for loss in losses.LOSSES:
        _, sums = _update(params, config, groups, 10_000, loss=loss, beta=0.05)
        norm = sums["grad_norm"]
        for micro_tokens in (60, 18):
            _, other = _update(params, config, groups, micro_tokens, loss=loss, beta=0.05)
            assert abs(norm - other["grad_norm"]) < 1e-4 * norm, (loss, micro_tokens)
            assert abs(sums["loss"] - other["loss"]) < 1e-5 and sums["tokens"] == other["tokens"]


def _short_of_memory(function, too_much):
    """The function on a GPU that cannot hold what too_much(*args, **kwargs) says."""
    def limited(*args, **kwargs):
        if too_much(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return function(*args, **kwargs)

    return limited


def test_grpo_halves_what_does_not_fit():
    """The update begins again, with the same gradient; the rollouts, with the same samples; and it
    ends with what to do when half is too much as well."""

    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    tokens = sum(len(s.tokens) for _, sequences in groups for s in sequences)
    total = losses.Total(tokens, tokens)

    def learn(dtype, limit, free=False):
        """A row of more than `limit` tokens does not fit; an exception may leave gradients."""
        args = _args("--micro-tokens", 60, "--temperature", 0.8, "--max-new-tokens", 12,
                     *["--free-sampler"] * free)
        trained, optimizer = optim.init_optimizer(params, dtype=dtype)
        trained["model.norm.weight"].grad = (  # as one that was not yet summed would
            None if limit > 60 else torch.ones_like(trained["model.norm.weight"]))
        engine = Engine(cache="kept")
        policy = grpo.Policy(trained, config, None, None, engine)

        def too_much(params, config, row, *_):
            return sum(len(p) + sum(len(s.tokens) for s in piece) for p, piece in row) > limit

        rows = grpo.pack_groups(groups, 60)[::-1]  # of 41, 46 and 48 tokens
        with mock.patch.object(grpo, "row_loss", _short_of_memory(grpo.row_loss, too_much)), \
                contextlib.redirect_stdout(io.StringIO()) as said:
            sums = grpo.update_within_memory(policy, None, optimizer, rows, total, 1e-3, args)
        assert engine.cache == (None if limit < 60 or free else "kept")
        return sums, args.micro_tokens, said.getvalue()

    for dtype in (torch.float32, torch.bfloat16):
        whole, size, said = learn(dtype, 1000, free=dtype == torch.bfloat16)
        assert (size, said) == (60, "")
        halved, size, said = learn(dtype, 47)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert abs(whole["grad_norm"] - halved["grad_norm"]) < tolerance * whole["grad_norm"], dtype
        assert size == 30 and "at --micro-tokens 60: going on with 30" in said, said
        assert halved["tokens"] == whole["tokens"] == tokens
    with raises(ValueError, "--micro-tokens 30", "bench.py plan"):
        learn(torch.float32, 25)

    problems = [(i, {"id": str(i), "problem": f"What is {i}+8?", "answer": "?"}) for i in range(6)]
    sampled = []
    for most in (8, 4):
        args = _args("--group", 4, "--max-batch", 8, "--max-new-tokens", 12,
                     "--reward", "accuracy=1")

        def limited(*words, max_batch, on_done, **settings):  # when a group has ended
            on_done = _short_of_memory(on_done, lambda i, _: max_batch > most and i == 2)
            return generate.generate(*words, max_batch=max_batch, on_done=on_done, **settings)

        with mock.patch.object(grpo, "generate", limited), \
                contextlib.redirect_stdout(io.StringIO()) as said:
            groups = grpo.roll_out(_tiny_policy(), problems[:3], args, refills=[problems[3:]])
        sampled.append([[c.tokens for c in g.completions] for g in groups])
    assert sampled[0] == sampled[1] and len(groups) == 6 and args.max_batch == 4
    assert "out of memory at --max-batch 8: going on with 4" in said.getvalue(), said.getvalue()


def test_grpo_first_update_is_on_policy_and_later_ones_are_not():
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    _, sums = _update(params, config, groups, 10_000)
    assert sums["ratio"] == sums["tokens"] and sums["clipped_low"] == sums["clipped_high"] == 0
    assert sums["mismatch"] / sums["tokens"] < 1e-5
    _, sums = _update(params, config, groups, 10_000, updates=3)
    assert abs(sums["ratio"] / sums["tokens"] - 1) > 1e-6


def test_grpo_pack_groups_keeps_every_completion():
    groups = [([1] * p, [grpo.Sequence([g] * n, [0.0] * n, 0.0) for g, n in enumerate(sizes)])
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
        order = mixture.problem_order(sets, [3, 1], 0)
        return [p["id"] for p in itertools.islice(order, skip, skip + n)]

    assert take(60)[20:] == take(40, skip=20)
    first = [x for x in take(200) if x[0] == "a"]
    epochs = [first[i:i + 10] for i in range(0, 100, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs), "each epoch asks each problem once"
    assert 0.6 < len(first) / 200 < 0.9
    order = mixture.problem_order(sets[:1], [1], 0, curriculum=True)
    levels = [p["level"] for p in itertools.islice(order, 10)]
    assert sum(levels[:5]) < sum(levels[5:])


def test_grpo_what_replaces_a_group_does_not_depend_on_who_samples():
    """The problem in the same place of the next order, in one batch with all others. Before, it was
    the next problem of all, by who had none to spare; and each round waited for the last."""
    problems = load_problems("arithmetic", "train", 15)
    args = _args("--prompts", 5, "--group", 4, "--max-batch", 16)

    def ask(rank, world):
        with mock.patch.multiple(grpo, rank_and_world=lambda: (rank, world),
                                 gather_objects=lambda own: [own]), \
                mock.patch.object(grpo, "generate", wraps=generate.generate) as asked:
            orders = [problems[begin:] for begin in (0, 5, 10)]
            groups = grpo.roll_out_step(_tiny_policy(), orders, 1, args)
        assert asked.call_count == 1
        return {g.place: (g.problem["id"], [c.tokens for c in g.completions], rewards.has_spread(g))
                for g in groups}

    alone = ask(0, 1)
    assert alone == ask(0, 2) | ask(1, 2) and 5 < len(alone) < 15
    for place in range(15):
        dull = place < 5 or place - 5 in alone and not alone[place - 5][2]
        assert (place in alone) == dull
        assert not dull or alone[place][0] == problems[place]["id"]


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
        timed = ("time", "rollout_s", "update_s", "tokens_per_s", "left_min", "peak_memory_gib")
        logs = [[{k: v for k, v in json.loads(line).items() if k not in timed}
                 for line in open(run / "metrics.jsonl")]
                for run in (whole, broken)]
        assert logs[0] == logs[1], logs
        assert [row["step"] for row in logs[0]] == list(range(steps + 1))
        results = (whole / "results.md").read_text()
        assert results == (broken / "results.md").read_text()
        assert "Before to after: " in results and "of 4 problems gained" in results, results
        page = (broken / "report.html").read_text()
        assert '"from": "step_' in page and "held_out" in page


def test_grpo_entropy_bonus_is_the_tokens_mean_in_every_loss():
    """It had the loss's normaliser: rows for "grpo", so that it grew with the length, and what the
    rows could hold for "dr_grpo", so that it shrank with --max-new-tokens."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    groups = [(prompt, [s._replace(advantage=0.0) for s in sequences])
              for prompt, sequences in groups]
    _, first = _update(params, config, groups, 10_000, entropy_bonus=0.5)
    for loss, micro_tokens in itertools.product(losses.LOSSES, (10_000, 18)):
        _, sums = _update(params, config, groups, micro_tokens, loss=loss, entropy_bonus=0.5)
        assert abs(sums["loss"] + 0.5 * sums["entropy"] / sums["tokens"]) < 1e-5, loss
        assert abs(sums["grad_norm"] / first["grad_norm"] - 1) < 1e-4, loss
    for bonus in (0.5, -0.5):  # entropy goes up, or down
        after, sums = _update(params, config, groups, 10_000, entropy_bonus=bonus)
        _, then = _update(after, config, groups, 10_000, entropy_bonus=bonus)
        assert (then["entropy"] - sums["entropy"]) * bonus > 0


def test_grpo_sequence_that_the_sampler_doubts_is_left_out():
    """Of the policy's objective alone: the divergence and the entropy bonus still hold it."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    odd = [(prompt, [s._replace(logprobs=[x - 3 for x in s.logprobs]) for s in sequences])
           for prompt, sequences in groups]
    flags = {"sampler_level": "sequence", "max_new_tokens": 12}
    _, right = _update(params, config, groups, 10_000, **flags)
    _, wrong = _update(params, config, odd, 10_000, **flags)
    assert abs(right["sampler_weight"] / right["tokens"] - 1) < 1e-4 and right["grad_norm"] > 0
    assert wrong["sampler_weight"] == wrong["grad_norm"] == 0
    bonus = _update(params, config, odd, 10_000, entropy_bonus=0.1, **flags)[1]["grad_norm"]
    zeros = [(prompt, [s._replace(advantage=0.0) for s in sequences])
             for prompt, sequences in groups]
    alone = _update(params, config, zeros, 10_000, entropy_bonus=0.1, **flags)[1]["grad_norm"]
    assert abs(bonus - alone) < 1e-4 * alone


def test_grpo_dppo_is_bounded_around_the_sampler():
    """Also in the only update of a batch, and by the change of the probability, not of its ratio:
    a rare token may become three times as likely."""
    params, config = double_model()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    said = [math.exp(x) for _, sequences in groups for s in sequences for x in s.logprobs]
    lower = [(prompt, [s._replace(logprobs=[x - 1.1 for x in s.logprobs], advantage=1.0)
                       for s in sequences]) for prompt, sequences in groups]
    _, sums = _update(params, config, lower, 10_000, loss="dppo")
    assert sums["clipped_high"] == sum(p - p * math.exp(-1.1) > 0.2 for p in said)
    assert 0 < sums["clipped_high"] < sums["tokens"]
    assert abs(sums["ratio"] / sums["tokens"] - math.exp(1.1)) < 1e-3
    assert (_args("--loss", "dppo").clip_high, _args().clip_high) == (0.2, 0.28)


def test_grpo_truncated_rows_alone_make_no_update():
    """With --mask-truncated and nothing finished, a zero gradient still moved the weights by their
    momentum."""
    def spread(group):
        return [float(i % 2) for i in range(len(group.texts))]

    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(rewards.REWARDS, format=spread):
        words = [*GRPO_RUN[1:], "--steps", 1, "--test-limit", 0, "--max-new-tokens", 2, "--reward",
                 "format=1"]
        for flags, updates in (([], 1), (["--mask-truncated"], 0)):
            run = f"{scratch}/{updates}"
            out = in_process("grpo", *words, *flags, "--run-dir", run)
            assert "truncated 1.00" in out and "no spread 0.00" in out, out
            trainer = Path(run, "checkpoints", "step_000001", "trainer.json").read_text()
            assert json.loads(trainer)["updates"] == updates


def test_grpo_problems_a_prompt_and_a_reward_of_your_own():
    """Two files of a few lines, a flag, and nothing of ours edited."""
    with tempfile.TemporaryDirectory() as scratch:
        data, code = Path(scratch) / "mine.jsonl", Path(scratch) / "mine.py"
        data.write_text("".join(f'{{"problem": "{i}+{i}", "answer": {2 * i}}}\n'
                                for i in range(40)))
        code.write_text("def short(group):\n"
                        "    return [1 / len(c.tokens) for c in group.completions]\n")
        words = [*GRPO_RUN[1:], "--data", data, "--steps", 1, "--test-limit", 0, "--run-dir",
                 f"{scratch}/run", "--reward", "accuracy=1", f"{code}:short=0.2",
                 "--prompt", "What is {problem}?"]
        in_process("grpo", *words)
        for line in Path(scratch, "run", "samples.jsonl").read_text().splitlines():
            problem = json.loads(line)["problem"]
            assert f"user\nWhat is {problem}?<|im_end|>" in json.loads(line)["prompt"]
            for completion in json.loads(line)["completions"]:
                short = completion["rewards"][f"{code}:short"]
                assert short == 1 / len(completion["tokens"])
                accuracy = completion["rewards"]["accuracy"]
                assert abs(completion["reward"] - accuracy - 0.2 * short) < 1e-9
        for reward, expected in ((f"{code}:shrt", "did you mean short?"),
                                 (f"{scratch}/no.py:short", "no file"),
                                 ("acuracy=1", "did you mean accuracy?")):
            assert expected in error_of("grpo", "--reward", reward)
        with (contextlib.redirect_stderr(io.StringIO()) as said, raises(SystemExit, "2")):
            in_process("grpo", "--prompt", "plan")
        assert "did you mean plain?" in said.getvalue()


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
            trained = {p["id"] for p in mixture.load_mixture(args.data, None)[0][0]}
            dev, test = mixture.load_held_out(args.eval_data, args.data, 200, 500)
            assert dev and test and not trained & {p["id"] for p in dev + test}, spelled
        args = _args("--data", "arithmetic", "--eval-data", path)
        assert len(mixture.load_held_out(args.eval_data, args.data, 200, 500)[1]) == 60


def _write_problems(path, numbers, text="What is {}+{}?"):
    rows = [{"problem": text.format(i, i), "answer": str(2 * i), "level": i % 5 + 1}
            for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tiny_policy():
    tiny = ROOT / "data/tiny"
    return grpo.Policy(model.load_params(tiny), model.load_config(tiny), model.load_tokenizer(tiny),
                       None)


def test_grpo_no_problem_is_both_trained_on_and_held_out():
    """A level behind the name of a file, or a second name, and 20 of 24 test problems were trained
    on. What is compared is what is asked, not how the file is called."""
    policy = _tiny_policy()
    with tempfile.TemporaryDirectory() as scratch:
        path = _write_problems(Path(scratch) / "mine.jsonl", range(60))
        some = _write_problems(Path(scratch) / "some.jsonl", range(30, 90), "what  is {}+{}?\n")
        copy = shutil.copy(path, Path(scratch) / "copy.jsonl")

        def load(data, held_out):
            args = _args("--data", *data, "--eval-data", held_out)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                sets, dev, test = grpo.load_data(policy, args)
            trained = set(mixture.keys_of(sum(sets, [])))
            assert dev and test and trained and not trained & set(mixture.keys_of(dev + test))
            return said.getvalue()

        for data, held_out in (([path], f"{path}:1-3"), ([path], f"arithmetic,{path}"),
                               ([f"arithmetic,{path}:1-4=2"], path)):
            said = load(data, held_out)
            assert "is given for training and for evaluation" in said, said
            assert "dev problems, too" in said and "left out" not in said, said
        said = load([path, "arithmetic"], some)
        assert f"training problems of {path} are also held out for evaluation" in said, said
        with raises(ValueError, "are also held out", str(path), "--eval-data"):
            load([path], copy)


def test_grpo_and_sft_pass_offload_on():
    """--offload was read, printed and saved, and changed nothing."""
    for rank in (0, 2):
        args = _args("--offload", "--lora-rank", rank)
        with mock.patch("run.init_optimizer", return_value=({}, None)) as init:
            make_trainable({}, model.load_config(ROOT / "data" / "tiny"), args, "cpu")
        assert True in (*init.call_args.args, *init.call_args.kwargs.values())


def test_grpo_and_sft_help():
    """--help died of a default that is only known with the model."""
    for script, shown in (("grpo", "'lr': 0.0005"), ("sft", "all weights 1e-5")):
        with contextlib.redirect_stdout(io.StringIO()) as out, raises(SystemExit, "0"):
            __import__(script).parse_args(["--help"])
        assert shown in out.getvalue() and out.getvalue().count("  --lr LR") == 1


def test_grpo_asks_base_models_as_their_protocols_do():
    """Without a chat, up to a stop string, which is learned but not read; graded as they grade."""
    import generate

    tiny = ROOT / "data/tiny"
    policy = grpo.Policy(None, model.load_config(tiny), model.load_tokenizer(tiny), None)
    said = "6 * 7 = 42. The answer is 42.\n\nQuestion: What is 1 + 1?\nAnswer: 2. The answer is 2."
    asked = []

    def base_model(params, config, prompts, *, stop_strings, tokenizer, num_samples, on_done, **_):
        asked.append(policy.tokenizer.decode(prompts[0], skip_special_tokens=False))
        cut = min((said.index(stop) + len(stop) for stop in stop_strings if stop in said),
                  default=len(said))
        tokens = tokenizer.encode(said[:cut], add_special_tokens=False).ids
        on_done(0, [generate.Completion(tokens, [0.0] * len(tokens), "stop")] * num_samples)

    problem = {"problem": "What is 6 * 7?", "answer": "42"}
    with mock.patch.object(grpo, "generate", base_model):
        for prompt, right, last in (("qwen-base-gsm8k", True, "42."), ("question", False, "2."),
                                    ("minerva-math", False, "2.")):
            args = _args("--prompt", prompt, "--group", 2)
            [group] = grpo.roll_out(policy, [(0, problem)], args)
            assert group.right == [right] * 2 and group.texts[0].strip().endswith(last), group
            assert args.reward == (["accuracy=1", "format=0.1"] if prompt == "question"
                                   else ["accuracy=1"])
            text = policy.tokenizer.decode(group.completions[0].tokens)
            assert text.endswith("Question:" if right else "2.")
    assert asked[0].startswith("Question: There are 15") and asked[0].endswith("* 7?\nAnswer:")
    assert asked[1] == "What is 6 * 7?"
    assert "few-shot-cot" not in grpo.PROMPTS  # its examples would have to be chosen
    assert _args("--epochs", "2").steps is None
    config = model.load_config(tiny)
    bare, examples = (grpo.memory_plan(config, _args("--prompt", name, "--lora-rank", 0)).update
                      for name in ("question", "qwen-base-gsm8k"))
    assert examples > bare


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
        for a, b in zip(one[1:], two[1:], strict=True):
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
        completion = grpo.Sequence([1] * 500, [-1.0] * 500, 0.5)
        row = [([1] * 96, [completion] * 8)] * 4  # 16,384 tokens
        counter.peak = counter.now
        policy = grpo.Policy(params, config, None, None)
        grpo.update(policy, None, optimizer, [row], losses.Total(16000, 16000), 1e-6, args)
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
        # the sampler's cache and weights, which stay on a GPU and are not traced
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        planned -= 2 * width * cache_slots(32, 4, 96, 500, True) / 2**30
        if args.lora_rank:
            planned -= 2 * sum(map(math.prod, model.param_shapes(config).values())) / 2**30
        assert 1.0 <= planned / traced < 1.2, (words, planned, traced)


def _settled(config, gib, *words):
    """(args of a run on one GPU of so much memory, the line that says what is trained)."""
    args = grpo.parse_args([str(word) for word in words])
    with contextlib.ExitStack() as stack:
        gpu = mock.patch.object(launch, "find_device", lambda name: torch.device("cuda", 0))
        stack.enter_context(gpu)
        stack.enter_context(mock.patch.object(launch, "memory_there", lambda *_: gib))
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
    with raises(ValueError, "bench.py plan", "6.0", "--max-batch 8"):  # even so
        _settled(CONFIG_1_5B, 6.0)
    args, said = _settled(CONFIG_1_5B, 8.0)  # halved until it fits: no result depends on these
    assert args.lora_rank == 32 and args.micro_tokens < 16384 and args.max_batch < 128
    assert f"--micro-tokens {args.micro_tokens} and --max-batch {args.max_batch}" in said, said
    assert args.free_sampler and "--free-sampler" in said
    plan = grpo.memory_plan(CONFIG_1_5B, args, 1, "cuda")
    assert 6.0 < plan.peak <= 8.0 and "warning" not in said
    args, _ = _settled(model.load_config(ROOT / "data" / "tiny"), 24.0, "--model", "elsewhere")
    assert (args.lora_rank, args.lr, args.data) == (0, 5e-4, ["arithmetic"])
    args, _ = _settled(model.load_config(ROOT / "data" / "tiny"), 24.0, "--lora-rank", 8)
    assert args.lr == 3e-5


def test_grpo_goes_on_from_an_adapter():
    """The reference is where the run starts; eval.py takes the adapter as the merged checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [*GRPO_RUN[1:], "--steps", 1, "--test-limit", 0, "--max-new-tokens", 20,
                 "--prompts", 2]
        in_process("grpo", *words, "--lora-rank", 4, "--lr", 0.02, "--warmup", 0,
                   "--run-dir", f"{scratch}/a")
        merged = f"{scratch}/a/checkpoints/step_000001"
        adapter = f"{merged}/adapter"
        in_process("grpo", *words, "--adapter", adapter, "--beta", 0.1, "--run-dir", f"{scratch}/b")
        assert json.loads(Path(scratch, "b", "flags.json").read_text())["lora_rank"] == 4
        *_, learned = map(json.loads, open(f"{scratch}/b/metrics.jsonl"))
        assert learned["kl"] == 0
        error = error_of("grpo", *words, "--adapter", adapter, "--lora-rank", 0)
        assert "--lora-rank is 0" in error and "rank 4" in error, error
        known = read_trained_on(adapter)
        assert known and known <= read_trained_on(f"{scratch}/b/checkpoints/step_000001")
        texts = []
        for i, flags in enumerate((["--adapter", adapter], ["--model", merged], [])):
            records = Path(scratch, f"{i}.jsonl")
            in_process("eval", *flags, "--limit", 8, "--max-new-tokens", 20, "--processes", 1,
                       "--records", records, "--results", f"{scratch}/results.jsonl")
            lines = [json.loads(line) for line in records.read_text().splitlines()]
            texts.append([line["samples"][0]["text"] for line in lines])
        assert texts[0] == texts[1] != texts[2]


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
                said = tokenizer.decode(c["tokens"], skip_special_tokens=False)
                assert "".join(c["pieces"]) == said and len(c["pieces"]) == len(c["tokens"])
                assert c["finish"] in ("stop", "length")
                rewards = c["rewards"]
                assert abs(c["reward"] - rewards["accuracy"] - 0.1 * rewards["format"]) < 1e-9
                assert c["right"] == (rewards["accuracy"] == 1.0)
            advantages = [c["advantage"] for c in completions]
            if sample["kind"] == "held_out":
                assert advantages == [None]
            else:
                rewards = torch.tensor([[c["reward"] for c in completions]])
                expected = losses.group_advantages(rewards)[0]
                assert torch.allclose(torch.tensor(advantages), expected, atol=1e-5), sample


def test_grpo_stops_at_an_accuracy():
    """The schedule is that of --steps. A resumed run has ended, unless more is asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [*GRPO_RUN[1:], "--run-dir", scratch, "--eval-every", 1, "--until", 0.5]
        with _right_answers([0, 0], [0], [0], [1, 0], [0]):  # on dev, the test before and after
            out = in_process("grpo", *words)
        assert "step 1/4" in out and "step 2/4" not in out and "| after |" in out, out
        asked, never, always = map(int, re.search(
            r"of (\d+) problems asked, (\d+) were never solved and (\d+) always", out).groups())
        solved = json.loads(Path(scratch, "problems.json").read_text())
        assert [len(solved["never"]), len(solved["always"])] == [never, always], solved
        assert 4 <= asked <= 12
        assert "step 2/4" not in in_process("grpo", "--run-dir", scratch, "--resume")
        with _right_answers(*[[0, 0]] * 4):
            out = in_process("grpo", "--run-dir", scratch, "--resume", "--until", 1.0)
        assert "step 2/4" in out and "step 4/4" in out, out


def test_grpo_filter_by_pass_rate():
    """Only what the policy solves now and then is trained on; a resumed run knows it by heart."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = [*GRPO_RUN[1:], "--steps", 2, "--test-limit", 0, "--run-dir", scratch]
        out = in_process("grpo", *flags, "--filter-by-pass-rate", 0.2, 0.8)
        kept = int(re.search(r"0.2 0.8 keeps (\d+) of 40 problems", out)[1])
        assert 0 < kept < 40 and f"{kept} training problems" in out, out
        saved = Path(scratch, "checkpoints", "step_000002", "trainer.json").read_text()
        extra = json.loads(saved)["extra"]
        assert all(asked == 4 for _, asked in extra["pass_rates"].values())
        for name in extra["right"]:
            assert 0.2 <= extra["pass_rates"][name][0] / 4 <= 0.8
        with mock.patch.object(grpo, "roll_out", side_effect=InterruptedError):
            with raises(InterruptedError):  # at the first step
                in_process("grpo", "--run-dir", scratch, "--resume", "--steps", 3)
        said = error_of("grpo", *flags, "--overwrite", "--filter-by-pass-rate", 0.99, 0.99)
        assert "keeps 0 of 40" in said and "widen" in said, said


def test_grpo_old_runs_resume_with_their_flags():
    """A flags.json of an earlier version: what is gone is ignored, what is new has its default."""
    with tempfile.TemporaryDirectory() as scratch:
        run(*GRPO_RUN, "--run-dir", scratch, "--steps", 2)
        path = Path(scratch) / "flags.json"
        flags = json.loads(path.read_text()) | {"lora_rank": 0, "gone": True}
        flags.pop("sampler_cap")
        path.write_text(json.dumps(flags))
        out = run("grpo.py", "--run-dir", scratch, "--resume", "--steps", 3)
        assert "step 3/3" in out and "--steps is 3, and the run was started with 2" in out, out


def test_grpo_resumes_with_less_memory():
    """The remedy of its own error, --resume with a smaller --micro-tokens, was refused."""
    with tempfile.TemporaryDirectory() as scratch:
        in_process("grpo", *SMALL_RUN, "--steps", 1, "--run-dir", scratch)
        out = in_process("grpo", "--resume", "--run-dir", scratch, "--steps", 2, "--micro-tokens",
                         64, "--max-batch", 2, "--free-sampler", "--checkpointing")
        assert "--micro-tokens is 64, and" in out and "step 2/2" in out, out
        *_, learned = map(json.loads, open(f"{scratch}/metrics.jsonl"))
        assert learned["step"] == 2


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
                  ["--prompt", "few-shot-cot"]):
        assert words[0] in _refused(*words), words
    assert "--group: 1 is out of range" in run("grpo.py", "--group", 1, ok=False)
