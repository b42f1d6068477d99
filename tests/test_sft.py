"""Tests of sft.py."""

import json
import math
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

import model
from tests.common import (
    GRPO_RUN,
    ROOT,
    assert_same_gradients,
    double_model,
    error_of,
    gradients,
    in_process,
    run,
    weights_of,
)


def _examples(count=7):
    import sft
    rng = random.Random(0)
    return [sft.Example([rng.randrange(64) for _ in range(n)], [-1] * (n - 4) + [0, 0, 1, 2])
            for n in rng.sample(range(6, 30), count)]


def test_sft_packed_equals_unpacked():
    """Loss and gradient are those of each example alone: the weighted mean of -log p over the supervised tokens."""
    import sft

    params, config = double_model()
    examples = _examples()

    def alone(p):
        terms, weight = 0, 0
        for e in examples:
            logprobs = model.forward(p, config, torch.tensor([e.tokens])).double().log_softmax(-1)[0]
            for i, part in enumerate(e.parts):
                if part >= 0:
                    w = 1.5 if part == 1 else 1.0
                    terms, weight = terms - w * logprobs[i - 1, e.tokens[i]], weight + w
        (terms / weight).backward()
        losses.append((terms / weight).item())

    losses = []
    plain = gradients(params, alone)
    together = lambda p: losses.append(sft.batch_loss(p, config, examples, 1.5, 10_000, backward=True)[0])
    packed = gradients(params, together)
    assert abs(losses[0] - losses[1]) < 1e-6, losses
    assert_same_gradients(plain, packed, 1e-6)  # logits are float32


def test_sft_gradient_does_not_depend_on_micro_batches():
    import sft

    params, config = double_model()
    whole, split, recomputed = (
        gradients(params, lambda p: sft.batch_loss(p, config, _examples(), 1.2, micro, checkpointing, backward=True))
        for micro, checkpointing in ((10_000, False), (25, False), (40, True)))
    assert_same_gradients(whole, split, 1e-6)
    assert_same_gradients(whole, recomputed, 1e-6)


def test_sft_learns_the_reply_its_end_token_and_nothing_else():
    """The prompt is masked, the end token learned in every turn: a mask that lost either has cost others whole runs."""
    import sft

    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    end = tokenizer.token_to_id("<|im_end|>")
    row = {"problem": "7+8", "response": "<think>\n7+8\n=15\n</think>\n\\boxed{15}"}
    example = sft.encode_example(row, tokenizer, end)
    learned = [t for t, part in zip(example.tokens, example.parts) if part >= 0]
    assert tokenizer.decode(learned, skip_special_tokens=False) == row["response"] + "<|im_end|>"
    assert tokenizer.decode([t for t, p in zip(example.tokens, example.parts) if p == 1]) == "\\boxed{15}"
    assert example.parts[-1] == 2 and example.tokens[-1] == end
    turns = ("user", "7+8"), ("assistant", "\\boxed{15}"), ("user", "Check it."), ("assistant", "Every step is right.")
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = sft.encode_example(talk, tokenizer, end)
    learned = [t for t, part in zip(example.tokens, example.parts) if part >= 0]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "\\boxed{15}<|im_end|>Every step is right.<|im_end|>"
    whole = model.render_chat(talk["messages"], False, system=None)
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) + "\n" == whole
    assert sft.show_example(example, tokenizer).count("[end: <|im_end|>]") == 2


def test_sft_answer_is_the_box_and_nothing_else():
    """All that stood behind the last box had the answer's weight, and a box in the thinking block was an answer."""
    import sft

    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    for response, answer in (
            (r"<think>\n3+4\n=7\n</think>\n\boxed{7} is what comes out.", r"\boxed{7}"),
            (r"<think>\boxed{3}</think>$\boxed{\frac{1}{2}}$.", r"\boxed{\frac{1}{2}}"),
            (r"\boxed{1} or \boxed{2}!", r"\boxed{2}"), (r"<think>\boxed{3}</think>It is three.", ""),
            (r"It is \boxed{4", ""), ("4", "")):
        response = response.replace(r"\n", "\n")
        example = sft.encode_example({"problem": "3+4", "response": response}, tokenizer, 332)
        assert tokenizer.decode([t for t, p in zip(example.tokens, example.parts) if p == 1]) == answer, response
        said = [t for t, p in zip(example.tokens, example.parts) if p in (0, 1)]
        assert tokenizer.decode(said) == response


def test_sft_default_learning_rate():
    """An adapter on the tiny model got the rate meant for all weights of a large one, and learned nothing."""
    import sft

    tiny = model.load_config(ROOT / "data" / "tiny")
    large = tiny._replace(hidden_size=1536, num_hidden_layers=28)
    rates = {(config.hidden_size, rank): sft.default_lr(config, rank) for config in (tiny, large) for rank in (0, 8)}
    assert rates[128, 8] > rates[128, 0] > rates[1536, 8] > rates[1536, 0] == 1e-5, rates


def test_sft_epochs_are_permutations():
    import sft

    examples = list(range(10))
    steps = [sft.batch_of_step(examples, step, 4, seed=3) for step in range(1, 6)]
    assert sorted(x for batch in steps for x in batch) == sorted(examples * 2)
    assert steps[2] == sft.batch_of_step(examples, 3, 4, seed=3) != sft.batch_of_step(examples, 3, 4, seed=4)


def test_sft_run_resumes_exactly_and_continues_in_grpo():
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        rows = [{"problem": f"{a}+{a}", "response": f"\\boxed{{{2 * a}}}"} for a in range(1, 40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["sft.py", "--model", "tiny", "--data", data, "--batch", 8, "--validation", 5, "--lr", 1e-4,
                 "--save-every", 3, "--eval-every", 3]
        out = run(*flags, "--epochs", 1.4, "--run-dir", f"{scratch}/whole")
        assert "[answer: \\boxed{" in out and "step 6/6" in out, out
        run(*flags, "--epochs", 1.4, "--run-dir", f"{scratch}/broken")
        shutil.rmtree(f"{scratch}/broken/checkpoints/step_000006")
        assert "step 4/6" in run("sft.py", "--run-dir", f"{scratch}/broken", "--data", data, "--resume")
        assert weights_of(f"{scratch}/whole", 6) == weights_of(f"{scratch}/broken", 6)
        assert [json.loads(line)["step"] for line in open(f"{scratch}/broken/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        shutil.copy(data, other := Path(scratch) / "other.jsonl")
        error = run("sft.py", "--run-dir", f"{scratch}/broken", "--data", other, "--resume", ok=False)
        assert str(other) in error and str(data) in error, error
        data.write_text(data.read_text().replace("5+5", "6+4"))  # the same name, other examples
        error = run("sft.py", "--run-dir", f"{scratch}/broken", "--data", data, "--resume", ok=False)
        assert "has changed" in error and "sha256" in error, error
        out = run("grpo.py", "--model", f"{scratch}/whole/checkpoints/best", "--data", "arithmetic", "--prompts", 2,
                   "--prompt", "plain", "--group", 2, "--max-new-tokens", 8, "--steps", 1, "--eval-limit", 2,
                   "--test-limit", 0, "--train-limit", 8, "--run-dir", f"{scratch}/grpo")
        assert "step 1/1" in out, out


def test_sft_stops_early_once():
    """A run that --patience ended was trained further by each --resume, until the next evaluation."""
    import sft
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        data.write_text("".join(json.dumps({"problem": f"{a}+1", "response": str(a + 1)}) + "\n" for a in range(20)))
        words = ["--model", "tiny", "--data", data, "--batch", 4, "--validation", 4, "--patience", 1, "--eval-every", 1,
                 "--run-dir", f"{scratch}/run"]
        losses = iter([({"val_loss": 3.0}, []), ({"val_loss": 4.0}, [])])
        with mock.patch.object(sft, "run_evaluation", lambda *_: next(losses)):
            assert "no better" in in_process("sft", *words)
            out = in_process("sft", *words, "--resume")
        assert "no better" in out and "loss 3.0000" in out and "step 1)" in out and "| loss" not in out, out


def test_sft_and_grpo_stop_after_skipped_steps():
    """Weights that overflow skip every step: sft went on for hours, grpo advised a --resume that was then refused."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        data.write_text("".join(json.dumps({"problem": f"{a}+1", "response": str(a + 1)}) + "\n" for a in range(20)))
        spread = lambda group: [float(i % 2) for i in range(len(group.texts))]
        for script, words in (
                ("sft", ["--model", "tiny", "--data", data, "--batch", 2, "--validation", 0]),
                ("grpo", [*GRPO_RUN[1:], "--steps", 9, "--test-limit", 0, "--max-new-tokens", 4, "--reward", "format=1"])):
            words += ["--run-dir", f"{scratch}/{script}", "--save-every", 99, "--eval-every", 99]
            module = __import__(script)
            with mock.patch.object(module, "optimizer_step", lambda *_, **__: {"grad_norm": math.nan, "skipped": 1}), \
                    mock.patch.dict(__import__("grpo").REWARDS, format=spread):
                error = error_of(script, *words)
            assert "not finite in 3" in error and "another --run-dir" in error
            assert len(open(f"{scratch}/{script}/metrics.jsonl").readlines()) == 3


def test_sft_bad_conversations():
    """A conversation in which nobody replies divided by zero, one without a role was a KeyError."""
    import sft
    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "talks.jsonl"
        for messages in ("hello", [], [{"role": "user", "content": "hello"}], [{"content": "hello"}], ["hello"],
                         [{"role": "assistant", "content": None}]):
            path.write_text(json.dumps({"messages": messages}) + "\n")
            try:
                sft.read_examples(path, tokenizer, 1, 100)
            except ValueError as error:
                assert "line 1" in str(error) and "expected" in str(error)
            else:
                raise AssertionError(messages)


def test_sft_bad_input():
    with tempfile.TemporaryDirectory() as scratch:
        empty, wrong = Path(scratch) / "empty.jsonl", Path(scratch) / "wrong.jsonl"
        empty.write_text("")
        wrong.write_text('{"problem": "1+1"}\n')
        for words, said in (
                ([empty], "no example"), ([wrong], "line 1"), ([f"{scratch}/nowhere.jsonl"], "nowhere.jsonl"),
                ([empty, "--batch", 0], "--batch is 0"),
                ([empty, "--validation", 0, "--patience", 2], "--patience is 2")):
            error = error_of("sft", "--run-dir", f"{scratch}/run", "--data", *words)
            assert said in error, (words, error)
        assert "--batch is 0" in run("sft.py", "--data", empty, "--batch", 0, ok=False)
