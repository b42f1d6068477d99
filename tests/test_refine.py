"""Tests of refine.py."""

import math
from pathlib import Path
from unittest import mock

from tokenizers import AddedToken

import eval as evaluation
import refine
from data.prompts import encode_prompt
from engine import sampling_params
from generate import generate
from tests.common import (
    answering,
    bytes_tokenizer,
    in_process,
    parse_sum,
    read_lines,
    run,
    scripted_setup,
    small_model,
    sum_problems,
    temporary_dir,
)


def test_refine_finds_the_answer_span():
    """The characters in the last box, and the tokens covering them, however they are split."""
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([AddedToken("4}", normalized=False)])
    text = "<think>\n\\boxed{1}\n</think>\n\\boxed{\\frac{1}{24}} done"
    begin, end = refine.box_span(text)
    assert text[begin:end] == "\\frac{1}{24}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    first, last = refine.token_span(tokenizer, tokens, begin, end)
    whole = tokenizer.decode(tokens[first:last])
    assert whole == "\\frac{1}{24}", "a token with 4 and } is included"
    assert refine.box_span("no box") is None and refine.box_span("\\boxed{never closed") is None
    assert refine.box_span("\\boxed{}") == (7, 7)


def test_refine_scores_are_the_models_own_logprobs():
    """They equal what the sampler recorded at temperature 1, for any batch size and for weights in
    the checkpoint's or the sampler's form."""
    params, config, tokenizer = small_model()
    prompts = [list(range(3, 3 + n)) for n in (4, 9, 6)]
    drawn = [row[0] for row in generate(params, config, prompts, max_new_tokens=11,
                                        temperature=1.0, stop_tokens=(258,))]
    for form in (params, sampling_params(params, config)):
        for max_batch in (1, 64):
            found = refine.response_logprobs(form, config, prompts, [c.tokens for c in drawn],
                                             max_batch)
            for mine, completion in zip(found, drawn):
                assert len(mine) == len(completion.tokens)
                assert all(abs(a - b) < 1e-4 for a, b in zip(mine, completion.logprobs))
    text = "a\\boxed{42}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids + [258]
    scores = refine.score_response(tokenizer, tokens, [-float(i) for i in range(len(tokens))], text,
                                   "think")
    assert scores == {"answer-mean": -8.5, "mean": -5.5, "format": 1.0}
    scores = refine.score_response(tokenizer, tokens[:3], [-1.0] * 3, "a\\b", "think")
    assert scores["answer-mean"] == -math.inf


def _reply(log):
    """Drafts are off by one; critiques approve multiples of 3; a revision is right for even numbers
    and otherwise unchanged."""
    def reply(text, seed, sample):
        log.append(text)
        n = parse_sum(text)
        turns = text.count("<|im_start|>assistant\n")
        if turns == 2:
            return "Every step is right." if n % 3 == 0 else "Step 1 is wrong."
        return f"\\boxed{{{n + 1 if turns == 3 and n % 2 == 0 else n + 2}}}"

    return reply


def _refine(rounds, accept, log):
    """refine() on six problems with the model of _reply."""
    params, config, tokenizer = small_model()
    prompts = [encode_prompt(tokenizer, "cot", p) for p in sum_problems(6)]
    with answering(_reply(log), "refine"):
        return refine.refine(
            params, config, tokenizer, prompts, rounds=rounds, accept_fn=lambda *_: accept,
            seeds=range(6), max_new_tokens=60, critique_prompt="Check each step.",
            revise_prompt="Solve it again.", approval="Every step is right.")


def test_refine_rounds_by_hand():
    """The cost of approved, settled and open problems, and the context of a revision."""
    log = []
    history = _refine(2, True, log)
    answers = [" ".join(r.attempt.answer for r in rounds) for rounds in history]
    assert answers == ["2 2 2", "3 3 3", "4 3 3", "5 5 5", "6 5 5", "7 7 7"], answers
    box, approve, doubt = (len(text) + 1 for text in (
        "\\boxed{2}", "Every step is right.", "Step 1 is wrong."))
    approved, revised = box + approve, 2 * box + doubt
    assert [[r.spent for r in rounds] for rounds in history[:3]] == [
        [box, approved, approved],  # settled by a critique
        [box, revised, revised],  # settled by a revision with the same answer
        [box, revised, revised + box + doubt]]  # a new answer: one more round
    assert [r.settled for r in history[2]] == [False, False, True]
    assert history[2][2].revision.answer == "3"
    assert len(log) == 6 + 6 + 4 + 2 + 2, "drafts, critiques, revisions; then the two open problems"
    assert log[12] == (
        "<|im_start|>user\n1+1\nLet's think step by step.<|im_end|>\n"
        "<|im_start|>assistant\n\\boxed{3}<|im_end|>\n"
        "<|im_start|>user\nCheck each step.<|im_end|>\n"
        "<|im_start|>assistant\nStep 1 is wrong.<|im_end|>\n"
        "<|im_start|>user\nSolve it again.<|im_end|>\n<|im_start|>assistant\n"), log[12]
    refused = _refine(1, False, [])
    assert [last.attempt.answer for _, last in refused] == list("234567"), "the old answers"
    draft, last = refused[2]
    assert last.spent > draft.spent and not last.accepted, "a rejected revision counts as cost"


def test_refine_loop_never_sees_the_reference():
    """Prompts and replies are identical for correct and for absurd reference answers."""
    runs = []
    with temporary_dir() as folder:
        for name, wrong in (("right", {}), ("absurd", {"answer": "-77"})):
            log = []
            setup = scripted_setup([p | wrong for p in sum_problems(6)])._replace(
                results=folder / f"{name}.rows")
            with (mock.patch.object(evaluation, "load_setup", lambda *_, **__: setup),
                  answering(_reply([])), answering(_reply(log), "refine")):
                in_process("refine", "--rounds", 2, "--approval", "Every step is right.",
                           "--traces", folder / name)
            rounds = [r | {"right": None} for problem in read_lines(folder / name)
                      for r in problem["rounds"]]
            calls = 6 + sum(bool(r["critique"]) + bool(r["revision"]) for r in rounds)
            runs.append((rounds, log[:calls]))
            if name == "right":
                accuracy = {row["method"]: row["accuracy"] for row in read_lines(setup.results)}
    assert runs[0] == runs[1]
    assert accuracy["refine, K = 2, oracle gate (a bound)"] == 2 / 6, accuracy


def test_refine_traces_do_not_depend_on_the_number_of_processes():
    with temporary_dir() as folder:
        words = ["refine.py", "--limit", 5, "--rounds", 1, "--max-new-tokens", 60, "--results",
                 folder / "rows.jsonl"]
        for processes in (1, 2):
            run(*words, "--processes", processes, "--traces", folder / str(processes))
        one, two = (Path(folder, name).read_text(encoding="utf-8") for name in ("1", "2"))
    assert one.count("\n") == 5 and one == two


def test_refine_equal_cost_is_equal():
    """The self-consistency row for K rounds costs exactly as many tokens, by interpolation between
    two numbers of samples."""
    with answering(lambda text, seed, sample: f"\\boxed{{{parse_sum(text) + 1 + sample % 2}}}"):
        found = refine.equal_cost_rows(scripted_setup(sum_problems(9)), [10.0, 24.0, 31.0])
    assert len(found) == 2
    for row, tokens in zip(found, (24.0, 31.0)):
        assert abs(row["tokens_mean"] - tokens) < 1e-9, row


def test_refine_auroc_counts_pairs():
    for confidences, right, expected in (
            ([3, 2, 1], [1, 0, 0], 1.0), ([3, 2, 1], [0, 1, 0], 0.5), ([1, 2, 2], [0, 1, 0], 0.75),
            ([-math.inf, -math.inf, 0], [1, 0, 0], 0.25)):
        assert refine.auroc(confidences, right) == expected, (confidences, right)
    assert math.isnan(refine.auroc([1, 2], [1, 1]))
