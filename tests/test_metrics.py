"""Tests of metrics.py."""

import json
from collections import Counter

import metrics
from run import Run
from tests.common import bytes_tokenizer, temporary_dir
from tests.test_grpo import _args, _group, _rewarded


def test_metrics_says_whether_training_helped():
    """The best accuracy began at -1, so a run that fell from 20 % to 0 reported a best of 0 %."""
    start = [0, [1, 0, 0, 0] * 50]
    worse, equal = [25, [0] * 200], [25, start[1][::-1]]
    better, barely = [50, [1, 1, 0, 0] * 50], [50, start[1][:-1] + [1]]
    for evaluations, best, text in (
            ([start, worse], 0, "did not help: no later step exceeds the dev accuracy 0.250"),
            ([start, equal], 0, "did not help"),
            ([start, better], 50, "training helped: dev"),
            ([start, better], 50, "0.500 at step 50, +25.0 points [+19.0, +31.0]"),
            ([start, barely, worse], 50, "it is unclear")):
        kept = metrics.keep_first_and_best(evaluations)
        assert kept[0] == start and kept[1][0] == best
        assert text in metrics.training_verdict(kept), metrics.training_verdict(kept)


def test_metrics_token_texts():
    """A character of several tokens belongs to the last. An invalid byte affects nothing after it.
    """
    tokenizer = bytes_tokenizer()
    tokens = tokenizer.encode("é = √2 😀ab", add_special_tokens=False).ids
    pieces = metrics.token_texts(tokenizer, tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == "é = √2 😀ab", pieces
    pieces = metrics.token_texts(tokenizer, tokens[-6:-3] + tokens[-2:])  # without its last byte
    assert len(pieces) == 5 and "".join(pieces).endswith("ab"), pieces


def test_metrics_separate_wrong_from_unboxed_and_count_solved_problems():
    box = "\\boxed{4}"
    groups = [_group([box, "\\boxed{5}", "the answer is 4", "\\boxed{4"]), _group([box] * 4),
              _group(["no"] * 4)]
    groups[1] = groups[1]._replace(right=[None, True, True, True])  # one is undecided
    groups = [_rewarded(group._replace(problem=group.problem | {"id": f"p{i}"}))
              for i, group in enumerate(groups)]
    found = metrics.step_metrics(groups, Counter(tokens=1), _args("--group", 4))
    expected = {"accuracy": 4 / 12, "wrong": 1 / 12, "no_box": 6 / 12, "undecided": 1 / 12,
              "solved_never": 1 / 3, "solved_always": 0, "pass@4": 2 / 3, "pass@2": (1 / 2 + 1) / 3}
    for name, value in expected.items():
        assert abs(found[name] - value) < 1e-12, (name, found[name])
    counts = {"p3": [8, 8]}
    for _ in range(2):
        metrics.count_right(groups, counts)
    assert counts == {"p0": [2, 8], "p1": [6, 8], "p2": [0, 8], "p3": [8, 8]}
    with temporary_dir() as home:
        metrics.save_solved(Run(home, 0), counts)
        solved = json.loads((home / "problems.json").read_text())
    assert solved == {"never": ["p2"], "always": ["p3"]}
