"""Tests of infer_scale.py."""

import itertools
import random
from unittest import mock

import eval as evaluation
import infer_scale
from stats import maj_at_k, percent
from tests.common import answering, parse_sum, scripted, scripted_setup, sum_problems


def test_scale_votes_by_hand():
    """Three spellings of a half outvote two threes; a confident minority can win."""
    votes = ["3", "1/2", None, "0.5", "3", "\\frac{2}{4}"]
    for answers, weights, expected in (
            (votes, None, "1/2"), (["7", "8"], None, "7"), (["7", "8"], [0.1, 0.2], "8"),
            ([None, None], None, None), ([], None, None)):
        assert infer_scale.majority_vote(answers, weights) == expected, answers
    votes = [0, 0, 1, None, 1, 1]
    for votes, weights, expected in (
            (votes, None, 0.0), (votes, [1] * 6, maj_at_k(votes, {0}, 6)),
            (votes, [0.9, 0.8, 0.1, 0.9, 0.2, 0.3], 1.0), ([None], None, 0.0), ([0, 1], None, 0.5)):
        assert infer_scale.vote_success(votes, {0}, weights) == expected, (votes, weights)


def test_scale_best_of_k_is_the_mean_over_subsets():
    rng = random.Random(2)
    for n in 10 * [1, 2, 3, 5, 8]:
        pool = [(rng.random(), rng.random() < 0.5) for _ in range(n)]
        for k in range(1, n + 1):
            picks = [max(subset)[1] for subset in itertools.combinations(pool, k)]
            found = infer_scale.best_of_k(*zip(*pool), k)
            assert abs(found - sum(picks) / len(picks)) < 1e-12


def test_scale_adaptive_votes_by_hand():
    """lead_probability equals a numerical integral of x^a (1-x)^b above one half, normalised. A
    vote that never reaches the confidence uses the whole pool and equals the full vote."""
    for a, b in ((0, 0), (3, 0), (4, 0), (5, 2), (2, 5), (12, 8)):
        mass = [(i + 0.5) ** a * (20000 - i - 0.5) ** b for i in range(20000)]
        assert abs(infer_scale.lead_probability(a, b) - sum(mass[10000:]) / sum(mass)) < 1e-6
    sure = infer_scale.samples_until_sure
    assert sure([0] * 20, 0.95) == 4 and sure([0] * 20, 0.9) == 3
    assert sure([0, 1] * 10, 0.95) == sure([None] * 20, 0.95) == 20
    votes = [None, 0, 0, 1, 2, 0, 1]
    assert infer_scale.adaptive_vote(votes, {0}, 1.0) == (infer_scale.vote_success(votes, {0}), 7)
    assert infer_scale.adaptive_vote([0] * 9, {0}, 0.95) == (1.0, 4)


def test_scale_budget_by_level():
    """A model that is right if its budget is at least 10 tokens per level."""
    def generate(*request, think_budget=0, temperature, **more):
        def reply(text, seed, sample):
            needed = 10 * (parse_sum(text) % 2 + 1)
            enough = needed <= (think_budget or needed)
            return f"\\boxed{{{parse_sum(text) + 1 if enough else 99}}}"

        assert temperature == 0
        return scripted(reply)(*request, **more)

    problems = [p | {"level": i % 2 + 1} for i, p in enumerate(sum_problems(40))]
    with mock.patch.object(evaluation, "generate", generate):
        rows, notes = infer_scale.sweep_budget(scripted_setup(problems), [15, 5, 10])
    assert [row["method"] for row in rows[:2]] == [
        "thought of any length", "thought of at most 5 tokens"]
    assert [row["accuracy"] for row in rows] == [1, 0, 0.5, 0.5]
    assert rows[2]["levels"]["1"][0] == 1 and rows[2]["levels"]["2"][0] == 0
    assert notes == ["level 1: a budget of 10 is not significantly worse than unlimited thinking",
                     "level 2: every budget tried loses accuracy"]


def _pool(num_samples, temperature=0.7):
    """Records in which two of three samples are right and the wrong answers differ."""
    def reply(text, seed, sample):
        return f"\\boxed{{{parse_sum(text) + 1 + (20 * sample if sample % 3 == 0 else 0)}}}"

    problems = [p | {"problem": f"{10 + i}+1", "answer": str(11 + i)}
                for i, p in enumerate(sum_problems(10))]
    with answering(reply):
        return evaluation.collect_records(scripted_setup(problems, temperature=temperature),
                                          num_samples=num_samples)


def test_scale_rows_cost_the_samples_they_use():
    """From one pool: a vote of k costs k samples, and the majority is right more often than one
    sample."""
    rows, [note] = infer_scale.self_consistency(*_pool(9), [3, 9], 0.95)
    rows = {row["method"]: row for row in rows}
    one, three, nine = (rows[name]["accuracy"]
                        for name in ("one sample", "majority of 3", "majority of 9"))
    assert abs(one - 7 / 9) < 1e-9, "samples 3 and 6 are wrong; 0 is off by zero"
    assert one < three < nine == 1.0
    tokens = rows["one sample"]["tokens_mean"]
    for method in ("majority of 9", "best of 9 by mean log-probability", "pass@9 (a bound)"):
        assert rows[method]["tokens_mean"] == 9 * tokens and rows[method]["samples"] == 9
    adaptive = rows["adaptive majority, 0.95 sure"]
    assert adaptive["accuracy"] > 0.9 and 4 < adaptive["samples"] < 9
    assert f"{adaptive['samples']:.1f} of 9; by level 1: " in note, note


def test_scale_votes_may_include_one():
    """--votes 1 4 8 used to show the wrong column's majority in the table of temperatures."""
    assert infer_scale.choose_votes([8, 1, 4, 4], 9) == [1, 4, 8]
    pools = {t: _pool(9, t) for t in (0.4, 1.0)}
    rows, notes = infer_scale.sweep_temperature(pools, [1, 4, 8])
    assert [(row["method"], row["temperature"], row["samples"]) for row in rows] == [
        (f"majority of {k} at {t:g}", t, k) for t in (0.4, 1.0) for k in (1, 4, 8)]
    assert [note.split(":")[0] for note in notes] == ["votes 1", "votes 4", "votes 8"]
    _, cells = evaluation.table(rows)
    assert cells[4][1].startswith(f"{percent(rows[4]['accuracy'])} [")
