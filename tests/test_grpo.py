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
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

import generate
import grpo
import launch
import losses
import metrics
import model
import optim
import verify
from data import load_problems, mixture, rewards
from engine import Engine
from eval import drop_long_prompts
from plan import plan_grpo
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
    temporary_dir,
    weights_of,
)

TINY = ROOT / "data" / "tiny"
SMALL_RUN = ["--prompts", 2, "--group", 2, "--max-new-tokens", 4, "--refill", 0,
             "--eval-limit", 2, "--test-limit", 0]

# ---- what the tests share


def _grpo(run_dir, *words):
    """What a run of a few seconds in this process prints."""
    return in_process("grpo", *GRPO_RUN[1:], "--run-dir", run_dir, *words)


def _resumed(run_dir, *words):
    return in_process("grpo", "--run-dir", run_dir, "--resume", *words)


def _lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in Path(run_dir, name).read_text().splitlines()]


def _args(*words, config=None):
    """Flags of grpo.py, with defaults filled in for a model (the tiny one if not given)."""
    args = grpo.parse_args([str(word) for word in words])
    grpo.fill_defaults(args, config or model.load_config(TINY))
    return args


def _policy():
    return grpo.Policy(model.load_params(TINY), model.load_config(TINY), model.load_tokenizer(TINY),
                       None)


def _printed():
    return contextlib.redirect_stdout(io.StringIO())


def _write_problems(path, numbers, text="What is {}+{}?"):
    rows = [{"problem": text.format(i, i), "answer": str(2 * i), "level": i % 5 + 1}
            for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _group(texts, lengths=None, limit=100):
    lengths = lengths or [len(t) for t in texts]
    completions = [generate.Completion(list(range(n)), [0.0] * n, "stop") for n in lengths]
    right = [verify.verify(text, "4", strict=True) for text in texts]
    return grpo.Group({"problem": "How many?", "answer": "4"}, [], texts, completions, right, limit,
                      "think")


def _rewarded(group, *words):
    return rewards.reward_group(group, rewards.parse_rewards(words or ["accuracy=1"]))


def _rolled_out():
    """A float64 model, and groups of very different lengths sampled from it in float32:
    (params, config, [(prompt, [Sequence, ...]), ...])."""
    params, config = double_model()
    prompts = [[5, 9, 3, 7, 2, 8, 4], [11, 2], [6] * 12]
    answers = generate.generate({k: v.float() for k, v in params.items()}, config, prompts,
                                num_samples=4, max_new_tokens=12, temperature=0.8,
                                stop_tokens=(1, 3, 7, 9))
    groups = [(prompt, [grpo.Sequence(c.tokens, c.logprobs, a)
                        for c, a in zip(row, (1.0, -0.5, 0.3, -0.8))])
              for prompt, row in zip(prompts, answers)]
    return params, config, groups


def _changed(groups, offset=0.0, **fields):
    """The groups with these fields in every Sequence, and shifted sampler log-probabilities."""
    return [(prompt, [s._replace(logprobs=[x + offset for x in s.logprobs], **fields)
                      for s in sequences]) for prompt, sequences in groups]


def _flattened(groups):
    """[(prompt, Sequence), ...], one for each completion."""
    return [(prompt, s) for prompt, sequences in groups for s in sequences]


def _num_tokens(groups):
    return sum(len(s.tokens) for _, s in _flattened(groups))


def _update(params, config, groups, micro_tokens=10_000, **changes):
    """Run grpo.update on a copy of `params`: (the new params, what update returned)."""
    flags = {"micro_tokens": micro_tokens, "lr": 1e-3, "temperature": 0.8, "max_new_tokens": 12}
    flags = (flags | changes).items()
    args = _args(*(word for k, v in flags for word in (f"--{k.replace('_', '-')}", v)))
    start = {k: v.float() for k, v in params.items()}
    trained, optimizer = optim.init_optimizer(start)
    total = losses.loss_total(args.loss, [len(s.tokens) for _, s in _flattened(groups)], 12)
    rows = grpo.pack_groups(groups, micro_tokens)
    policy = grpo.Policy(trained, config, None, None)
    sums = grpo.update(policy, policy._replace(params=start), optimizer, rows, total, 1e-3, args)
    return {k: v.detach().clone() for k, v in trained.items()}, sums


# ---- rewards and advantages


def test_grpo_each_reward():
    box = "\\boxed{4}"
    texts = [f"<think>\n{t}\n</think>\n{box}" for t in ("a", "b", "c")] + ["\\boxed{5}"]
    group = _group(texts, lengths=[10, 20, 40, 5], limit=40)
    assert rewards.accuracy(group) == [1, 1, 1, 0]
    # relative to the shortest right completion, of 10 tokens; the wrong one is shorter
    assert rewards.brevity(group) == [0, -0.5, -1, 0]
    assert rewards.overlong(group) == [0, 0, -1, 0]
    assert rewards.well_formed(group)[0] == 1
    assert rewards.well_formed(_group(["<think>\nno end \\boxed{4}",
                                       f"{box} and more text {box}"])) == [0, 0]
    plain = _group(["x"], lengths=[60])
    looped = plain._replace(completions=[plain.completions[0]._replace(tokens=[1, 2] * 50)])
    assert rewards.repetition(looped)[0] < -0.9 and rewards.repetition(plain) == [0]
    with temporary_dir() as home:  # a user's own, with its coefficient
        code = home / "mine.py"
        code.write_text("def short(group):\n"
                        "    return [1 / len(c.tokens) for c in group.completions]\n")
        found = _rewarded(group, "accuracy=1", f"{code}:short=0.2").rewards
    assert [round(reward, 9) for reward in found] == [1.02, 1.01, 1.005, 0.04]
    assert rewards.language(_group(["plain text", "половина half"])) == [0, -8 / 12]
    assert rewards.language(plain._replace(problem={"problem": "Сколько?"},
                                           texts=["ответ x"])) == [0]


def test_grpo_worst_right_answer_beats_best_wrong_one():
    """For any coefficients that are accepted: all penalties at their worst against the bonus."""
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
    group = _rewarded(group, "accuracy=1", "format=0.1", "brevity=0.2", "repetition=0.2",
                      "language=0.1", "overlong=0.2")
    assert group.rewards[0] > group.rewards[1], group.parts
    assert all(-1 <= v <= 1 for values in group.parts.values() for v in values)


def test_grpo_bad_rewards_stop_the_run():
    """A reward of nan did not stop the run, exit code 0. A list that was too short gave rewards to
    the wrong completions."""
    group = _group(["a", "b"])
    for values, message in (([0.0, math.nan], "returned nan"), ([-math.inf, 0.0], "returned -inf"),
                         ([0.0], "[0.0], expected a list of 2"), ([0.0] * 3, "list of 2"),
                         (None, "returned None"), (["1", 0.0], "returned '1'")):
        with mock.patch.dict(rewards.REWARDS, format=lambda group: values):
            with raises(ValueError, "--reward format", message, "expected"):
                _rewarded(group, "accuracy=1", "format=0.1")

    def unstable(group):  # returns nan in the second step, after an update
        seen.append(len(group.texts))
        return [0.0, math.nan if seen.count(2) > 3 else 1.0][:len(group.texts)]

    seen = []
    with temporary_dir() as home, mock.patch.dict(rewards.REWARDS, format=unstable):
        with raises(ValueError, "--reward format returned nan"):
            _grpo(home, *SMALL_RUN, "--reward", "format=1")
        assert step_of(list_checkpoints(home)[-1]) == 1
        assert [line["step"] for line in _lines(home)] == [0, 1]


def test_grpo_gdpo_leaves_out_undecided_completions():
    words = ("accuracy=1", "brevity=0.5")
    args = _args("--combine", "normalise", "--reward", *words)
    box = "\\boxed{4}"
    groups = [_rewarded(_group([box, "\\boxed{5}", box], lengths=[10, 12, 40]), *words),
              _rewarded(_group(["no", "no", "no"], lengths=[3, 4, 5]), *words)]
    first, second = grpo.with_advantages(groups, args)
    parts = {name: torch.tensor([values]) for name, values in groups[0].parts.items()}
    coefficients = rewards.parse_rewards(words)
    expected = losses.combined_advantages(parts, coefficients, "group")[0].tolist()
    assert first.advantages == expected and second.advantages == [0.0] * 3
    odd = groups[0]._replace(texts=[*groups[0].texts, "?"], right=[*groups[0].right, None],
                             completions=[groups[0].completions[i] for i in (0, 1, 2, 0)])
    found = grpo.with_advantages([_rewarded(odd, *words)], args)[0].advantages
    assert found == [*expected, None]  # undecided


def _trained(groups):
    """(sequences of these groups that are trained on, by group; number of their tokens)."""
    rows, total = grpo.training_rows(grpo.with_advantages(groups, _args()), _args())
    return [[s for s in sequences] for row in rows for _, sequences in row], total.tokens


def test_grpo_undecided_completions_are_not_trained_on():
    """They counted as wrong: they were trained on, and shifted the baseline of their group."""
    box = "\\boxed{4}"
    group = _group([box, "\\boxed{5}", box, "too hard"], lengths=[3, 4, 5, 6])
    group = group._replace(right=[True, False, True, None])
    words = ["accuracy=1", "brevity=0.1"]
    undecided = _rewarded(group, *words)
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
    one = _rewarded(group._replace(right=[None, None, True, None]), *words)
    none = _rewarded(group._replace(right=[None] * 4), *words)
    assert not rewards.has_spread(one) and not rewards.has_spread(none)
    assert _trained([one, none]) == ([], 0)
    found = metrics.step_metrics([undecided, none], Counter(), _args())
    assert found["undecided"] == 5 / 8 and found["no_spread"] == 0.5
    assert abs(found["reward"] - sum(undecided.rewards[:3]) / 3) < 1e-9
    assert metrics.step_metrics([none], Counter(), _args())["reward"] == 0


# ---- rows and the update


def test_grpo_pack_groups_keeps_every_completion():
    groups = [([1] * p, [grpo.Sequence([g] * n, [0.0] * n, 0.0) for g, n in enumerate(sizes)])
              for p, sizes in ((5, (3, 9, 2)), (2, (30, 1)), (7, (4,)))]
    for budget in (1, 12, 20, 1000):
        rows = grpo.pack_groups(groups, budget)
        packed = [s for row in rows for _, s in _flattened(row)]
        assert packed == [s for _, s in _flattened(groups)]
        for row in rows:
            assert grpo.num_tokens(row) <= budget or len(_flattened(row)) == 1


def _assert_same_as_unpacked(case, packed_loss, sequence_loss):
    """packed_loss(params) has the summed gradient of sequence_loss(logprobs, prompt, sequence)."""
    params, config, groups = case

    def packed(p):
        packed_loss(p).backward()

    def unpacked(p):
        for prompt, s in _flattened(groups):
            text = torch.tensor([prompt + s.tokens])
            logprobs = model.token_logprobs(p, config, text, temperature=0.8)[0, len(prompt) - 1:]
            sequence_loss(logprobs, prompt, s).backward()

    assert_same_gradients(gradients(params, packed), gradients(params, unpacked), 1e-5)


def test_grpo_packed_group_equals_one_row_each():
    """The prompt is computed once for its G completions, with the gradient of G separate rows."""
    _, config, groups = case = _rolled_out()
    assert len({len(s.tokens) for _, s in _flattened(groups)}) > 2, "the lengths should differ"
    A = torch.tensor([s.advantage for _, s in _flattened(groups)])

    def packed(p):
        logprobs, _, mask = grpo.row_logprobs(p, config, groups, 0.8)
        return losses.policy_loss(logprobs, logprobs.detach(), None, A, mask)[0]

    def unpacked(logprobs, prompt, s):
        return -s.advantage * (logprobs - logprobs.detach()).exp().sum() / _num_tokens(groups)

    _assert_same_as_unpacked(case, packed, unpacked)


def test_grpo_first_update_is_on_policy_and_later_ones_are_not():
    """On policy the ratio is 1: the sampler recorded the log-probabilities that training computes,
    including the end token and the temperature."""
    params, config, groups = _rolled_out()
    floats = {k: v.float() for k, v in params.items()}
    logprobs, _, mask = grpo.row_logprobs(floats, config, groups, 0.8)
    for row, seen, (_, s) in zip(logprobs, mask, _flattened(groups), strict=True):
        assert seen.sum() == len(s.tokens)  # the end token is in the loss
        assert (row[seen] - torch.tensor(s.logprobs)).abs().max() < 1e-4
    _, sums = _update(params, config, groups)
    assert sums["ratio"] == sums["tokens"] and sums["clipped_low"] == sums["clipped_high"] == 0
    assert sums["mismatch"] / sums["tokens"] < 1e-5
    _, sums = _update(params, config, groups, updates=3)
    assert abs(sums["ratio"] / sums["tokens"] - 1) > 1e-6


def test_grpo_update_does_not_depend_on_micro_batches():
    """For every loss: a single row, or rows so short that groups are split (trl#3021, #5619)."""
    params, config, groups = _rolled_out()
    for loss in losses.LOSSES:
        _, sums = _update(params, config, groups, loss=loss, beta=0.05)
        norm = sums["grad_norm"]
        for micro_tokens in (60, 18):
            _, other = _update(params, config, groups, micro_tokens, loss=loss, beta=0.05)
            assert abs(norm - other["grad_norm"]) < 1e-4 * norm, (loss, micro_tokens)
            assert abs(sums["loss"] - other["loss"]) < 1e-5 and sums["tokens"] == other["tokens"]


def test_grpo_entropy_bonus_is_a_token_mean_in_every_loss():
    """It shared the loss's normaliser: the number of rows for "grpo", so that it grew with length,
    and their capacity for "dr_grpo", so that it shrank with --max-new-tokens."""
    params, config, groups = _rolled_out()
    groups = _changed(groups, advantage=0.0)
    _, first = _update(params, config, groups, entropy_bonus=0.5)
    for loss, micro_tokens in itertools.product(losses.LOSSES, (10_000, 18)):
        _, sums = _update(params, config, groups, micro_tokens, loss=loss, entropy_bonus=0.5)
        assert abs(sums["loss"] + 0.5 * sums["entropy"] / sums["tokens"]) < 1e-5, loss
        assert abs(sums["grad_norm"] / first["grad_norm"] - 1) < 1e-4, loss
    for bonus in (0.5, -0.5):  # entropy goes up, or down
        after, sums = _update(params, config, groups, entropy_bonus=bonus)
        _, then = _update(after, config, groups, entropy_bonus=bonus)
        assert (then["entropy"] - sums["entropy"]) * bonus > 0


def test_grpo_sequence_level_drops_mismatched_completions():
    """From the policy's objective only: the divergence and the entropy bonus still apply."""
    params, config, groups = _rolled_out()

    def learn(groups, **flags):
        return _update(params, config, groups, sampler_level="sequence", **flags)[1]

    shifted = _changed(groups, offset=-3)
    close = learn(groups)
    assert abs(close["sampler_weight"] / close["tokens"] - 1) < 1e-4 and close["grad_norm"] > 0
    far = learn(shifted)
    assert far["sampler_weight"] == far["grad_norm"] == 0
    bonus = learn(shifted, entropy_bonus=0.1)["grad_norm"]
    bonus_alone = learn(_changed(groups, advantage=0.0), entropy_bonus=0.1)["grad_norm"]
    assert abs(bonus - bonus_alone) < 1e-4 * bonus_alone


def test_grpo_dppo_is_bounded_around_the_sampler():
    """Even in the only update of a batch, and by the change of the probability, not by its ratio:
    a rare token may become three times as likely."""
    params, config, groups = _rolled_out()
    probs = [math.exp(x) for _, s in _flattened(groups) for x in s.logprobs]
    _, sums = _update(params, config, _changed(groups, offset=-1.1, advantage=1.0), loss="dppo")
    assert sums["clipped_high"] == sum(p - p * math.exp(-1.1) > 0.2 for p in probs)
    assert 0 < sums["clipped_high"] < sums["tokens"]
    assert abs(sums["ratio"] / sums["tokens"] - math.exp(1.1)) < 1e-3


def test_grpo_truncated_completions_alone_make_no_update():
    """With --mask-truncated and no finished completion, the weights still moved by momentum."""
    group = _group(["\\boxed{4}", "\\boxed{5}"])
    cut = group._replace(completions=[c._replace(finish="length") for c in group.completions])
    params, config = double_model()
    params, optimizer = optim.init_optimizer(params)
    policy = grpo.Policy(params, config, None, None)
    for flags, counted in (([], 18), (["--mask-truncated"], 0)):
        args = _args(*flags)
        rows, total = grpo.training_rows(grpo.with_advantages([_rewarded(cut)], args), args)
        assert total.tokens == counted and bool(rows) == bool(counted)
    learned = grpo.update_within_memory(policy, None, optimizer, rows, total, 1e-3, args)
    assert optimizer.updates == 0 and not learned
    assert metrics.step_metrics([_rewarded(cut)], learned, args)["truncated"] == 1


def test_grpo_distillation_is_the_reverse_kl_of_each_token():
    """The gradient of a token is (log p - log q) d log p, with the teacher's q; its mean over the
    student's samples is the gradient of KL(p || q). The teacher has another depth and width."""
    params, config, groups = _rolled_out()
    groups = _changed(groups, advantage=0.0)
    like = model.Config(64, 16, 24, 3, 2, 1, initializer_range=0.3)
    teacher = model.init_params(like, seed=1, dtype=torch.float64)
    tokens = _num_tokens(groups)
    args = _args("--teacher", "tiny", "--temperature", 0.8, "--sampler-cap", 1)

    def packed(p):
        with torch.no_grad():
            ref, _, _ = grpo.row_logprobs(teacher, like, groups, 0.8)
        return grpo.row_loss(p, config, groups, None, ref, losses.Total(tokens, tokens), args)[0]

    def unpacked(logp, prompt, s):
        logits = model.forward(teacher, like, torch.tensor([prompt + s.tokens]))
        logq = logits[0, len(prompt) - 1:-1].div(0.8).log_softmax(-1)
        logq = logq.gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
        return ((logp - logq).detach() * logp / tokens).sum()

    _assert_same_as_unpacked((params, config, groups), packed, unpacked)


# ---- memory


def _with_oom(function, too_much):
    """The function, out of GPU memory whenever too_much(*args, **kwargs)."""
    def limited(*args, **kwargs):
        if too_much(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return function(*args, **kwargs)

    return limited


def test_grpo_update_out_of_memory_is_retried_with_half():
    """The gradient is the same. If half does not fit, the error says what to do."""
    params, config, groups = _rolled_out()
    tokens = _num_tokens(groups)

    def learn(dtype, limit, free=False):
        """Update where a row of more than `limit` tokens does not fit."""
        args = _args("--micro-tokens", 60, "--temperature", 0.8, "--max-new-tokens", 12,
                     *["--free-sampler"] * free)
        trained, optimizer = optim.init_optimizer(params, dtype=dtype)
        trained["model.norm.weight"].grad = (  # as left behind by the out-of-memory error
            None if limit > 60 else torch.ones_like(trained["model.norm.weight"]))
        engine = Engine(cache="kept")
        policy = grpo.Policy(trained, config, None, None, engine)
        limited = _with_oom(grpo.row_loss, lambda *of: grpo.num_tokens(of[2]) > limit)
        rows = grpo.pack_groups(groups, 60)[::-1]  # of 41, 46 and 48 tokens
        with mock.patch.object(grpo, "row_loss", limited), _printed() as out:
            sums = grpo.update_within_memory(policy, None, optimizer, rows,
                                             losses.Total(tokens, tokens), 1e-3, args)
        assert engine.cache == (None if limit < 60 or free else "kept")
        return sums, args.micro_tokens, out.getvalue()

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        full, size, printed = learn(dtype, 1000, free=dtype == torch.bfloat16)
        assert (size, printed) == (60, "")
        halved, size, printed = learn(dtype, 47)
        assert abs(full["grad_norm"] - halved["grad_norm"]) < tolerance * full["grad_norm"], dtype
        assert size == 30 and "at --micro-tokens 60: retrying with 30" in printed, printed
        assert halved["tokens"] == full["tokens"] == tokens
    with raises(ValueError, "--micro-tokens 30", "bench.py plan"):
        learn(torch.float32, 25)


def test_grpo_rollouts_out_of_memory_are_retried_with_half():
    """The samples are the same. A problem drawn twice in a step gets different noise each time."""
    problems = list(enumerate([{"id": "one", "problem": "What is 3+8?", "answer": "?"}] * 6))
    sampled = []
    for most in (8, 4):
        args = _args("--group", 4, "--max-batch", 8, "--max-new-tokens", 12,
                     "--reward", "accuracy=1")

        def limited(*words, max_batch, on_done, **settings):  # fails after a group is done
            on_done = _with_oom(on_done, lambda i, _: max_batch > most and i == 2)
            return generate.generate(*words, max_batch=max_batch, on_done=on_done, **settings)

        with mock.patch.object(grpo, "generate", limited), _printed() as out:
            groups = grpo.roll_out(_policy(), problems[:3], args, refills=[problems[3:]])
        sampled.append([[c.tokens for c in g.completions] for g in groups])
    assert sampled[0] == sampled[1] and len(groups) == 6 and args.max_batch == 4
    assert sampled[0][0] != sampled[0][1]
    assert "out of memory at --max-batch 8: retrying with 4" in out.getvalue(), out.getvalue()


CONFIG_1_5B = model.Config(151936, 1536, 8960, 28, 12, 2)


def test_grpo_trains_all_weights_if_they_fit():
    """Without a flag, memory decides what is trained, and so the learning rate."""
    def resolved(config, gib, *words):
        """(args of a run on one GPU of this size, the line that says what is trained)."""
        args = grpo.parse_args([str(word) for word in words])
        with (mock.patch.object(launch, "find_device", lambda name: torch.device("cuda", 0)),
              mock.patch.object(launch, "total_memory_gib", lambda *_: gib), _printed() as out):
            grpo.resolve_flags(args, config)
        return args, out.getvalue()

    tiny = model.load_config(TINY)
    for config, gib, words, rank, lr, expected in (
            (CONFIG_1_5B, 24.0, [], 32, 3e-5, "adapter of rank 32 (--lora-rank 0: all weights)"),
            (CONFIG_1_5B, 80.0, [], 0, 1e-6, "training all weights"),
            (CONFIG_1_5B, 24.0, ["--lora-rank", 0], 0, 1e-6, "warning"),
            (CONFIG_1_5B, 80.0, ["--lora-rank", 8, "--lr", 0.5], 8, 0.5, "adapter of rank 8"),
            (tiny, 24.0, ["--model", "elsewhere"], 0, 5e-4, "training all weights"),
            (tiny, 24.0, ["--lora-rank", 8], 8, 3e-5, "adapter of rank 8")):
        args, line = resolved(config, gib, *words)
        assert (args.lora_rank, args.lr) == (rank, lr) and expected in line, line
        assert f"of {gib} GiB" in line and line.count("\n") == 1 + ("warning" in line), line
        assert args.data == (["arithmetic"] if config is tiny else ["gsm8k"])
        assert (args.micro_tokens == 16384 and args.checkpointing) == (config is not tiny)
    with raises(ValueError, "bench.py plan", "6.0", "--max-batch 8"):
        resolved(CONFIG_1_5B, 6.0)
    args, line = resolved(CONFIG_1_5B, 8.0)  # smaller batches, with the same results
    assert args.lora_rank == 32 and args.micro_tokens < 16384 and args.max_batch < 128
    assert f"--micro-tokens {args.micro_tokens} and --max-batch {args.max_batch}" in line, line
    assert args.free_sampler and "--free-sampler" in line
    plan = plan_grpo(CONFIG_1_5B, args, 1, "cuda")
    assert 6.0 < plan.peak <= 8.0 and "warning" not in line


# ---- problems and prompts


def test_grpo_order_of_problems_is_a_function_of_the_seed():
    sets = [[{"id": f"a{i}"} for i in range(10)], [{"id": f"b{i}"} for i in range(4)]]

    def take(n, skip=0):
        order = mixture.problem_order(sets, [3, 1], 0)
        return [p["id"] for p in itertools.islice(order, skip, skip + n)]

    assert take(60)[20:] == take(40, skip=20)
    first = [x for x in take(200) if x[0] == "a"]
    epochs = [first[i:i + 10] for i in range(0, 100, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs), "each epoch has each problem once"
    assert 0.6 < len(first) / 200 < 0.9


def test_grpo_replacements_do_not_depend_on_the_number_of_processes():
    """It is the problem at the same place of the next order, sampled in the same call. It used to
    be the next problem overall, whichever process got there first, in rounds that waited."""
    problems = load_problems("arithmetic", "train", 15)
    args = _args("--prompts", 5, "--group", 4, "--max-batch", 16)

    def sample(rank, world):
        with (mock.patch.multiple(grpo, rank_and_world=lambda: (rank, world),
                                  gather_objects=lambda own: [own]),
              mock.patch.object(grpo, "generate", wraps=generate.generate) as sampling):
            orders = [problems[begin:] for begin in (0, 5, 10)]
            groups = grpo.roll_out_step(_policy(), orders, 1, args)
        assert sampling.call_count == 1
        return {g.place: (g.problem["id"], [c.tokens for c in g.completions], rewards.has_spread(g))
                for g in groups}

    single = sample(0, 1)
    assert single == sample(0, 2) | sample(1, 2) and 5 < len(single) < 15
    for place in range(15):
        sampled = place < 5 or place - 5 in single and not single[place - 5][2]
        assert (place in single) == sampled
        assert not sampled or single[place][0] == problems[place]["id"]


def test_grpo_no_problem_is_both_trained_on_and_held_out():
    """With a level after the name of a file, another spelling of its path, or a second name, 20 of
    24 test problems were trained on. Problems are compared, not file names."""
    policy = _policy()
    with temporary_dir() as home:
        path = _write_problems(home / "mine.jsonl", range(60))
        some = _write_problems(home / "some.jsonl", range(30, 90), "what  is {}+{}?\n")
        copy = shutil.copy(path, home / "copy.jsonl")

        def load(data, held_out):
            args = _args("--data", *data, "--eval-data", held_out)
            with _printed() as out:
                sets, dev, test = grpo.load_data(policy, args)
            trained = set(mixture.keys_of(sum(sets, [])))
            assert dev and test and trained and not trained & set(mixture.keys_of(dev + test))
            return out.getvalue(), len(test)

        for data, held_out in (([path], f"{path}:1-3"), ([path], f"arithmetic,{path}"),
                               ([f"arithmetic,{path}:1-4=2"], path),
                               ([f"{os.path.relpath(path)}=2"], path),
                               ([f"{home}/../{home.name}/mine.jsonl=2"], path)):
            printed, _ = load(data, held_out)
            assert "is used for training and for evaluation" in printed, printed
            assert "also dev problems" in printed and "dropped" not in printed, printed
        printed, _ = load([path, "arithmetic"], some)
        assert f"training problems of {path} are also held out for evaluation" in printed, printed
        assert load(["arithmetic"], path)[1] == 60
        with raises(ValueError, "are also held out", str(path), "--eval-data"):
            load([path], copy)


def test_grpo_prompts_that_fill_the_context_are_left_out():
    long = {"id": "long", "problem": "What is " + "1 + " * 600 + "1?", "answer": "601"}
    short = {"id": "short", "problem": "What is 1 + 1?", "answer": "2"}
    policy = _policy()
    kept = drop_long_prompts([long, short], policy.tokenizer, policy.config, "plain", 128)
    assert kept == [short]


def test_grpo_follows_the_protocols_of_base_models():
    """Without a chat template; with a stop string, trained on but not graded; with their grade."""
    policy = _policy()
    reply = "6 * 7 = 42. The answer is 42.\n\nQuestion: What is 1 + 1?\nAnswer: 2. The answer is 2."
    seen = []

    def base_model(params, config, prompts, *, stop_strings, tokenizer, num_samples, on_done, **_):
        seen.append(policy.tokenizer.decode(prompts[0], skip_special_tokens=False))
        cut = min((reply.index(stop) + len(stop) for stop in stop_strings if stop in reply),
                  default=len(reply))
        tokens = tokenizer.encode(reply[:cut], add_special_tokens=False).ids
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
    assert seen[0].startswith("Question: There are 15") and seen[0].endswith("* 7?\nAnswer:")
    assert seen[1] == "What is 6 * 7?"
    own = grpo.encode_problem(policy, problem, _args("--prompt", "How much is {problem}"))
    own = policy.tokenizer.decode(own, skip_special_tokens=False)
    assert "user\nHow much is What is 6 * 7?<|im_end|>" in own
    assert "few-shot-cot" not in grpo.PROMPTS  # it needs examples of a problem set


# ---- flags


def test_grpo_defaults_follow_from_other_flags():
    for words, expected in (
            ([], {"reward": ["accuracy=1", "format=0.1"], "clip_high": 0.28, "sampler_cap": 2.0}),
            (["--scale", "mean"], {"reward": ["accuracy=1"]}),
            (["--teacher", "tiny"], {"reward": [], "beta": 1.0}),
            (["--sampler-level", "sequence"], {"sampler_cap": 3.0}),
            (["--loss", "dppo"], {"clip_high": 0.2}), (["--epochs", 2], {"steps": None})):
        args = vars(_args(*words))
        assert expected.items() <= args.items(), (words, args)


def test_grpo_offload_is_passed_on():
    """--offload was parsed, printed and saved, but had no effect."""
    for rank in (0, 2):
        args = _args("--offload", "--lora-rank", rank)
        with mock.patch("run.init_optimizer", return_value=({}, None)) as init:
            make_trainable({}, model.load_config(TINY), args, "cpu")
        assert True in (*init.call_args.args, *init.call_args.kwargs.values())


def test_grpo_and_sft_help():
    """--help failed on a default that depends on the model."""
    for script, shown in (("grpo", "'lr': 0.0005"), ("sft", "all weights 1e-5")):
        with _printed() as out, raises(SystemExit, "0"):
            __import__(script).parse_args(["--help"])
        assert shown in out.getvalue() and out.getvalue().count("  --lr LR") == 1


def test_grpo_bad_input():
    with temporary_dir() as home:
        (home / "empty.jsonl").write_text("")
        (home / "full").mkdir()
        (home / "full" / "file").write_text("mine")
        (home / "mine.py").write_text("def short(group):\n    return []\n")
        for words, message in (
                (["--model", "no-such-model"], "no-such-model"),
                (["--data", home / "none.jsonl"], "none.jsonl"),
                (["--data", home / "empty.jsonl"], "empty"),
                (["--data", "arithmetic=0"], "not a positive"),
                (["--reward", "kindness=1"], "kindness"),
                (["--reward", "acuracy=1"], "did you mean accuracy?"),
                (["--reward", f"{home}/mine.py:shrt"], "did you mean short?"),
                (["--reward", f"{home}/no.py:short"], "no file"),
                (["--scale", "mean", "--reward", "accuracy=1", "format=0.1"], "accuracy alone"),
                (["--teacher", "tiny", "--beta", 0], "--beta is 0"),
                (["--run-dir", home / "full"], "not empty"),
                (["--max-new-tokens", 4000], "4000"), (["--clip-hard", 1.2], "--clip-high 0.28"),
                (["--epochs", 2, "--steps", 8], "--epochs")):
            error = error_of("grpo", "--run-dir", home / "run", *words)
            assert message in error, (words, error)
    for words, message in (
            (["--group", 1], "--group"), (["--temperature", 0], "--temperature"),
            (["--lr", -1], "--lr"), (["--clip-low", 1], "--clip-low"),
            (["--prompt", "few-shot-cot"], "is none of"),
            (["--prompt", "plan"], "did you mean plain?")):
        with (contextlib.redirect_stderr(io.StringIO()) as error, raises(SystemExit, "2")):
            grpo.parse_args([str(word) for word in words])
        assert message in error.getvalue(), words
    assert "--group: 1 is out of range" in run("grpo.py", "--group", 1, ok=False)


# ---- runs


@contextlib.contextmanager
def _right_answers(*found):
    """Successive evaluations return these."""
    with mock.patch.object(metrics, "right_answers", side_effect=found):
        yield


def test_grpo_best_checkpoint_can_be_the_first():
    with temporary_dir() as home:
        with _right_answers([1, 1], [0, 1], [0, 0]):
            out = _grpo(home, *SMALL_RUN)
        assert "step 0 | dev accuracy 1.000" in out, out
        best = home / "checkpoints" / "best"
        assert best.resolve().name == "step_000000"
        [*_, last] = out.splitlines()
        assert last.startswith("training did not help") and last.endswith(str(best)), last


def test_grpo_stops_at_an_accuracy():
    """The schedule still follows --steps. A resumed run ends at once unless --until is raised."""
    with temporary_dir() as home:
        with (_right_answers([0, 0], [0], [0], [1, 0], [0]),  # on dev, the test before and after
              mock.patch.object(grpo, "sampling_params", wraps=grpo.sampling_params) as pack):
            out = _grpo(home, "--eval-every", 1, "--until", 0.5)
        assert pack.call_count == 3  # at the start, for the step, for all evaluations after it
        assert "step 1/4" in out and "step 2/4" not in out and "| after |" in out, out
        sampled, never, always = map(int, re.search(
            r"of (\d+) problems, (\d+) were never solved and (\d+) always", out).groups())
        solved = json.loads((home / "problems.json").read_text())
        assert [len(solved["never"]), len(solved["always"])] == [never, always], solved
        assert 4 <= sampled <= 12
        assert "step 2/4" not in _resumed(home)
        with _right_answers(*[[0, 0]] * 4):
            out = _resumed(home, "--until", 1.0)
        assert "step 2/4" in out and "step 4/4" in out, out


def test_grpo_measures_after_each_epoch():
    """Three problems, two per step: the first epoch ends in the second of three steps."""
    steps = GRPO_RUN.index("--steps")
    words = [*GRPO_RUN[1:steps], *GRPO_RUN[steps + 2:], *SMALL_RUN]
    with temporary_dir() as home:
        out = in_process("grpo", *words, "--epochs", 2, "--train-limit", 3, "--test-limit", 2,
                         "--run-dir", home)
        assert [line["epoch"] for line in _lines(home)[1:]] == [2 / 3, 4 / 3, 2]
    assert re.search(r"step 2/3(.|\n)*after epoch 1 (.|\n)*step 3/3(.|\n)*\| after \|", out), out
    assert "after epoch 2" not in out


def test_grpo_filter_by_pass_rate():
    """Only problems solved sometimes are trained on. A resumed run does not sample them again."""
    with temporary_dir() as home:
        flags = ["--steps", 2, "--test-limit", 0]
        out = _grpo(home, *flags, "--filter-by-pass-rate", 0.2, 0.8)
        kept = int(re.search(r"0.2 0.8 keeps (\d+) of 40 problems", out)[1])
        assert 0 < kept < 40 and f"{kept} training problems" in out, out
        saved = (home / "checkpoints" / "step_000002" / "trainer.json").read_text()
        extra = json.loads(saved)["extra"]
        assert all(sampled == 4 for _, sampled in extra["pass_rates"].values())
        for name in extra["right"]:
            assert 0.2 <= extra["pass_rates"][name][0] / 4 <= 0.8
        with (mock.patch.object(grpo, "roll_out", side_effect=AssertionError),
              mock.patch.object(grpo, "roll_out_step", side_effect=InterruptedError),
              raises(InterruptedError)):
            _resumed(home, "--steps", 3)
        error = error_of("grpo", *GRPO_RUN[1:], *flags, "--run-dir", home, "--overwrite",
                         "--filter-by-pass-rate", 0.99, 0.99)
        assert "keeps 0 of 40" in error and "widen" in error, error


def test_grpo_rejects_weights_that_are_not_finite():
    """Sampling raised a traceback, and eval.py printed a table of wrong answers."""
    with temporary_dir() as home:
        policy = _policy()
        policy.params["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
        model.save_model(home / "bad", policy.params, policy.config, TINY)
        for top_p in (1.0, 0.9):
            with raises(ValueError, "not finite", "another checkpoint"):
                generate.generate(policy.params, policy.config, [[1, 2]], max_new_tokens=2,
                                  top_p=top_p)
        for script, words in (("grpo", [*GRPO_RUN[1:], "--run-dir", home / "run"]),
                              ("eval", ["--results", home / "results.jsonl", "--limit", 4])):
            assert "not finite" in error_of(script, *words, "--model", home / "bad", "--processes",
                                            1)
        assert not list_checkpoints(home / "run")


def test_grpo_distils_from_a_teacher_with_the_same_tokenizer():
    """All groups are trained on, and none is replaced, with or without rewards."""
    with temporary_dir() as home:
        teacher = home / "teacher"
        noise = torch.Generator().manual_seed(0)
        policy = _policy()
        params = {k: v + 0.02 * torch.randn(v.shape, generator=noise)
                  for k, v in policy.params.items()}
        model.save_model(teacher, params, policy.config, TINY)
        words = ["--test-limit", 0, "--max-new-tokens", 20, "--teacher", teacher, "--steps", 1]
        for flags in ([], ["--reward", "accuracy=1", "--lora-rank", 2]):
            out = _grpo(home / "run", *words, *flags, "--overwrite")
            *_, learned = _lines(home / "run")
            assert learned["kl"] > 0.01 and learned["grad_norm"] > 0.1, out
            assert f"kl {learned['kl']:.4f} nat" in out, out
            assert learned["epoch"] == 4 / 40 and ("reward_accuracy" in learned) == bool(flags)

        path = teacher / "tokenizer.json"
        raw = json.loads(path.read_text())
        swapped = dict(zip(raw["model"]["vocab"], reversed(raw["model"]["vocab"].values())))
        path.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": swapped}}))
        error = error_of("grpo", *words, "--run-dir", home / "other")
        assert "tokens of its tokenizer" in error and "family" in error, error


def test_grpo_starts_from_an_adapter():
    """The reference includes it. eval.py gives the same answers with it and with merged weights."""
    with temporary_dir() as home:
        words = ["--steps", 1, "--test-limit", 0, "--max-new-tokens", 20, "--prompts", 2]
        _grpo(home / "a", *words, "--lora-rank", 4, "--lr", 0.02, "--warmup", 0)
        merged = home / "a" / "checkpoints" / "step_000001"
        adapter = merged / "adapter"
        _grpo(home / "b", *words, "--adapter", adapter, "--beta", 0.1)
        assert json.loads((home / "b" / "flags.json").read_text())["lora_rank"] == 4
        assert _lines(home / "b")[-1]["kl"] == 0
        error = error_of("grpo", *words, "--adapter", adapter, "--lora-rank", 0)
        assert "--lora-rank is 0" in error and "rank 4" in error, error
        known = read_trained_on(adapter)
        assert known and known <= read_trained_on(home / "b" / "checkpoints" / "step_000001")
        texts = []
        for i, flags in enumerate((["--adapter", adapter], ["--model", merged], [])):
            in_process("eval", *flags, "--limit", 8, "--max-new-tokens", 20, "--processes", 1,
                       "--records", home / f"{i}.jsonl", "--results", home / "results.jsonl")
            texts.append([line["samples"][0]["text"] for line in _lines(home, f"{i}.jsonl")])
        assert texts[0] == texts[1] != texts[2]


TIMED = ("time", "rollout_s", "update_s", "tokens_per_s", "left_min", "peak_memory_gib")


def test_grpo_killed_and_resumed_ends_with_the_same_weights(kills=1, seed=0):
    """kill -9 at random moments: the resumed run ends with the same weights, bit for bit."""
    rng, steps = random.Random(seed), 3 + 2 * kills
    flags = [*GRPO_RUN, "--steps", steps]  # argparse heeds the last
    with temporary_dir() as home:
        unbroken, broken = home / "unbroken", home / "broken"
        run(*flags, "--run-dir", unbroken)
        for _ in range(kills):
            resume = list(broken.glob("checkpoints/step_*"))
            if not resume:  # killed before the first checkpoint
                shutil.rmtree(broken, ignore_errors=True)
            words = ["grpo.py", "--resume"] if resume else flags
            words = [*words, "--run-dir", broken]
            process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT,
                                       stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
            next((line for line in process.stdout if re.match("step [1-9]", line)), None)
            time.sleep(rng.uniform(0, 1))  # in a rollout, an update, an evaluation or a save
            process.kill()
            process.wait()
        out = run("grpo.py", "--run-dir", broken, "--resume")
        assert "resuming from" in out and f"step {steps}/{steps}" in out, out
        assert weights_of(unbroken, steps) == weights_of(broken, steps)
        logs = [[{k: v for k, v in line.items() if k not in TIMED} for line in _lines(home)]
                for home in (unbroken, broken)]
        assert logs[0] == logs[1], logs
        assert [row["step"] for row in logs[0]] == list(range(steps + 1))
        assert logs[0][-1]["epoch"] == 4 * steps / 40, "refills do not count"
        results = (unbroken / "results.md").read_text()
        assert results == (broken / "results.md").read_text()
        assert "Before to after: " in results and "of 4 problems gained" in results, results
        page = (broken / "report.html").read_text()
        assert '"from": "step_' in page and "held_out" in page


def test_grpo_resumes_with_its_own_flags_and_data():
    """Unknown names in flags.json are ignored, missing ones get their default. A smaller
    --micro-tokens, which our own error suggests, was refused, and changed data was accepted."""
    with temporary_dir() as home:
        path = _write_problems(home / "mine.jsonl", range(40))
        _grpo(home / "run", *SMALL_RUN, "--data", path, "--steps", 1)
        saved = home / "run" / "flags.json"
        flags = json.loads(saved.read_text()) | {"gone": True}
        flags.pop("sampler_cap")
        saved.write_text(json.dumps(flags))
        out = _resumed(home / "run", "--steps", 2, "--micro-tokens", 64, "--max-batch", 2,
                       "--free-sampler", "--checkpointing")
        for text in ("--steps is 2, but the run was started with 1", "--micro-tokens is 64, but",
                     "step 2/2"):
            assert text in out, out
        _write_problems(path, range(1, 41))
        error = error_of("grpo", "--run-dir", home / "run", "--resume", "--steps", 3)
        assert "--data-sha256" in error and "restore that value" in error, error
        _write_problems(path, range(40))
        assert "step 3/3" in _resumed(home / "run", "--steps", 3)
        assert [line["step"] for line in _lines(home / "run")] == [0, 1, 2, 3]


def test_grpo_result_and_samples_do_not_depend_on_the_number_of_processes():
    """samples.jsonl holds complete groups, at every evaluation and before training, and held-out
    ones of the same problems each time."""
    flags = [*GRPO_RUN, "--prompts", 6, "--eval-limit", 10, "--test-limit", 0, "--steps", 2,
             "--eval-every", 1, "--run-dir"]
    with temporary_dir() as home:
        run(*flags, home / "one")
        run("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29653, *flags,
            home / "two", "--device", "cpu")
        if sys.platform == "linux":
            run(*flags, home / "forked", "--processes", 2)
            assert weights_of(home / "two", 2) == weights_of(home / "forked", 2)
        for a, b in zip(_lines(home / "one"), _lines(home / "two"), strict=True):
            for key in ("reward", "accuracy", "length", "no_spread", "dev_accuracy"):
                assert abs(a.get(key, 0) - b.get(key, 0)) < 1e-9, (key, a.get(key), b.get(key))
            a, b = a.get("grad_norm", 0), b.get("grad_norm", 0)
            assert abs(a - b) <= 1e-3 * max(1e-3, a), (a, b)
        samples = _lines(home / "one", "samples.jsonl")
        others = _lines(home / "two", "samples.jsonl")
    kinds = [(sample["step"], sample["kind"]) for sample in samples]
    assert kinds == [(sample["step"], sample["kind"]) for sample in others]
    held_out = [(step, "held_out") for step in (0, 1, 2) for _ in range(8)]
    rollouts = [(step, "rollout") for step in (1, 2) for _ in range(4)]
    assert sorted(kinds) == sorted(held_out + rollouts), kinds
    problems = [sample["problem"] for sample in samples if sample["kind"] == "held_out"]
    assert problems[:8] == problems[8:16] == problems[16:]
    tokenizer = model.load_tokenizer(TINY)
    for sample in samples:
        completions = sample["completions"]
        assert len(completions) == (4 if sample["kind"] == "rollout" else 1)
        for c in completions:
            assert len(c["tokens"]) == len(c["logprobs"]) and max(c["logprobs"]) <= 0
            assert tokenizer.decode(c["tokens"]) == c["text"]
            text = tokenizer.decode(c["tokens"], skip_special_tokens=False)
            assert "".join(c["pieces"]) == text and len(c["pieces"]) == len(c["tokens"])
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
