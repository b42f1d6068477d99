"""Tests of refine.py."""

import contextlib
import io
import json
import math
import random
import re
import tempfile
from pathlib import Path
from unittest import mock

from generate import generate
from tests.common import bytes_tokenizer, scripted, scripted_run, small_model, sum_problems


def test_refine_finds_the_answer_span():
    """The characters of the last box, and the tokens that write them, whatever the tokens' borders."""
    from tokenizers import AddedToken

    from refine import box_span, token_span

    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([AddedToken("4}", normalized=False)])
    text = "<think>\n\\boxed{1}\n</think>\n\\boxed{\\frac{1}{24}} done"
    begin, end = box_span(text)
    assert text[begin:end] == "\\frac{1}{24}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    first, last = token_span(tokenizer, tokens, begin, end)
    assert tokenizer.decode(tokens[first:last]) == "\\frac{1}{24}", "the token that holds 4 and } counts whole"
    assert box_span("no box") is None and box_span("\\boxed{never closed") is None and box_span("\\boxed{}") == (7, 7)


def test_refine_scores_are_the_models_own_logprobs():
    """What response_logprobs finds behind a prompt is what the sampler recorded at temperature 1, in any batch."""
    from refine import response_logprobs, score_response

    params, config, tokenizer = small_model()
    prompts = [list(range(3, 3 + n)) for n in (4, 9, 6)]
    drawn = [
        row[0] for row in generate(params, config, prompts, max_new_tokens=11, temperature=1.0, stop_tokens=(258,))
    ]
    for max_batch in (1, 64):
        found = response_logprobs(params, config, prompts, [c.tokens for c in drawn], max_batch)
        assert all(abs(a - b) < 1e-4 for mine, c in zip(found, drawn) for a, b in zip(mine, c.logprobs)) and list(
            map(len, found)
        ) == [len(c.tokens) for c in drawn]
    text = "a\\boxed{42}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids + [258]
    scores = score_response(tokenizer, tokens, [-float(i) for i in range(len(tokens))], text, "think")
    assert (
        scores["answer-total"] == -17.0
        and scores["answer-mean"] == -8.5
        and scores["total"] == -66.0
        and scores["mean"] == -5.5
    )
    assert (
        scores["format"] == 1.0
        and score_response(tokenizer, tokens[:3], [-1.0] * 3, "a\\b", "think")["answer-mean"] == -math.inf
    )


def _refine_reply(log):
    """Drafts are off by one; the critic doubts all but multiples of 3; a revision is right for even numbers, else unchanged."""

    def reply(text, seed, sample):
        n, turns = int(re.search(r"user\n(\d+)\+1", text)[1]), text.count("<|im_start|>assistant\n")
        log.append(text)
        if turns == 1:
            return f"\\boxed{{{n + 2}}}"
        if turns == 2:
            return "Every step is right." if n % 3 == 0 else "Step 1 is wrong."
        return f"\\boxed{{{n + (1 if n % 2 == 0 else 2)}}}"

    return reply


def _refine(problems, rounds, accept_fn, log):
    import refine as refine_module
    from eval import render_prompt

    params, config, tokenizer = small_model()
    prompts = [tokenizer.encode(render_prompt("cot", p), add_special_tokens=False).ids for p in problems]
    with mock.patch.object(refine_module, "generate", scripted(_refine_reply(log))):
        return refine_module.refine(
            params,
            config,
            tokenizer,
            prompts,
            rounds=rounds,
            accept_fn=accept_fn,
            max_new_tokens=60,
            critique_prompt="Check each step.",
            revise_prompt="Solve it again.",
            approval="Every step is right.",
        )


def test_refine_rounds_by_hand():
    """Six problems through two rounds: approved, settled and open ones, what each costs, and what the model is shown."""
    log = []
    history = _refine(sum_problems(6), 2, lambda i, k, old, new: True, log)
    answers = [[s.attempt.answer for s in states] for states in history]
    assert answers == [
        ["2", "2", "2"],
        ["3", "3", "3"],
        ["4", "3", "3"],
        ["5", "5", "5"],
        ["6", "5", "5"],
        ["7", "7", "7"],
    ], answers
    box, approve, doubt = len("\\boxed{2}") + 1, len("Every step is right.") + 1, len("Step 1 is wrong.") + 1
    spent = [[s.spent for s in states] for states in history]
    assert spent[0] == [box, box + approve, box + approve], "approved: settled after one critique"
    assert spent[1] == [box, 2 * box + doubt, 2 * box + doubt], "the same answer again: settled after one revision"
    assert spent[2] == [box, 2 * box + doubt, 3 * box + 2 * doubt], "a new answer was accepted: one more round"
    assert [s.settled for s in history[2]] == [False, False, True] and history[2][2].revision.answer == "3"
    assert len(log) == 6 + 6 + 4 + 2 + 2, "drafts, critiques, revisions; then the two that are open"
    assert log[12] == (
        "<|im_start|>user\n1+1\nLet's think step by step.<|im_end|>\n<|im_start|>assistant\n\\boxed{3}<|im_end|>\n"
        "<|im_start|>user\nCheck each step.<|im_end|>\n<|im_start|>assistant\nStep 1 is wrong.<|im_end|>\n"
        "<|im_start|>user\nSolve it again.<|im_end|>\n<|im_start|>assistant\n"
    ), log[12]


def test_refine_gate_keeps_the_old_answer():
    log = []
    history = _refine(sum_problems(6), 1, lambda i, k, old, new: False, log)
    assert [s[1].attempt.answer for s in history] == [str(i + 2) for i in range(6)]
    assert history[2][1].spent > history[2][0].spent and not history[2][1].accepted, "a refused revision is paid for"


def test_refine_loop_never_sees_the_reference():
    """Run twice by the command's own main, with right and with absurd reference answers: the model is asked and says the very same."""
    import eval as eval_module
    import refine as refine_module

    traces, asked = [], []
    with tempfile.TemporaryDirectory() as folder:
        for answers in ("right", "absurd"):
            problems = [p if answers == "right" else p | {"answer": "-77"} for p in sum_problems(6)]
            run, log, path = scripted_run(problems, {}), [], Path(folder) / answers
            args = refine_module.parse_args(
                [
                    "--traces",
                    str(path),
                    "--rounds",
                    "2",
                    "--results",
                    str(Path(folder) / "rows"),
                    "--approval",
                    "Every step is right.",
                ]
            )
            with (
                mock.patch.object(refine_module, "open_run", lambda *a, **k: run),
                contextlib.redirect_stdout(io.StringIO()),
                mock.patch.object(refine_module, "generate", scripted(_refine_reply(log))),
                contextlib.redirect_stderr(io.StringIO()),
                mock.patch.object(eval_module, "generate", scripted(_refine_reply([]))),
            ):
                refine_module.main(args)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            traces.append([[{k: v for k, v in r.items() if k != "right"} for r in row["rounds"]] for row in rows])
            asked.append(log[: len(_calls_of(traces[-1]))])
        assert traces[0] == traces[1] and asked[0] == asked[1]
        rows = [json.loads(line) for line in (Path(folder) / "rows").read_text(encoding="utf-8").splitlines()]
    rows = {r["method"]: r["accuracy"] for r in rows if r["accuracy"] > 0}
    assert rows["refine, K = 2, oracle gate (a bound)"] == 2 / 6, rows


def _calls_of(traces):
    """One draft each, and the critiques and revisions that were asked for."""
    return [
        x
        for rounds in traces
        for r in rounds
        for x in ("draft" if r is rounds[0] else None, r["critique"], r["revision"])
        if x
    ]


def test_refine_equal_cost_is_equal():
    """Self-consistency beside K rounds costs exactly what they cost, by one sample more on a part of the problems."""
    import eval as eval_module
    import refine as refine_module

    run = scripted_run(sum_problems(9), {})
    reply = lambda text, seed, sample: f"\\boxed{{{int(re.search('user.([0-9]+)', text, re.S)[1]) + 1 + (sample % 2)}}}"
    with mock.patch.object(eval_module, "generate", scripted(reply)), contextlib.redirect_stderr(io.StringIO()):
        rows = refine_module.equal_cost_rows(run, [10.0, 24.0, 31.0])
    for row, tokens in zip(rows, (24.0, 31.0)):
        assert abs(row["tokens_mean"] - tokens) < 1e-9, row


def test_refine_auroc_counts_pairs():
    from refine import auroc, reliability

    rng = random.Random(4)
    for _ in range(50):
        right = [rng.random() < 0.4 for _ in range(12)]
        confidences = [rng.choice((-math.inf, -2.0, -1.0, 0.0)) + (0.3 if r else 0) for r in right]
        pairs = [
            (a > b) + (a == b) / 2 for a, r in zip(confidences, right) if r for b, q in zip(confidences, right) if not q
        ]
        expected = sum(pairs) / len(pairs) if pairs else None
        found = auroc(confidences, right)
        assert found == expected or abs(found - expected) < 1e-12, (found, expected)
    bins = reliability([0.1, 0.9, 0.2, 0.8], [False, True, True, True], bins=2)
    assert [(round(c, 9), r, n) for c, r, n in bins] == [(0.15, 0.5, 2), (0.85, 1.0, 2)]
