"""Tests of infer_scale.py."""

import contextlib
import io
import itertools
import random
import re
from collections import Counter
from unittest import mock

from tests.common import bytes_tokenizer, scripted, scripted_run, sum_problems


def test_scale_majority_vote_by_hand():
    from infer_scale import majority_vote

    assert majority_vote(["3", "1/2", None, "0.5", "3", "\\frac{2}{4}"]) == "1/2", (
        "three spellings of a half outvote two threes"
    )
    assert majority_vote(["7", "8"]) == "7", "of equals, the first"
    assert majority_vote(["7", "8"], weights=[0.1, 0.2]) == "8"
    assert majority_vote([None, None]) is None and majority_vote([]) is None


def test_scale_best_of_k_is_the_mean_over_subsets():
    from infer_scale import best_of_k

    rng = random.Random(2)
    for _ in range(60):
        n = rng.randint(1, 8)
        confidences, right = [rng.random() for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]
        for k in range(1, n + 1):
            picks = [right[max(subset, key=lambda i: confidences[i])] for subset in itertools.combinations(range(n), k)]
            assert abs(best_of_k(confidences, right, k) - sum(picks) / len(picks)) < 1e-12


def test_scale_weighted_vote():
    """Equal weights are the plain vote; a confident minority can win; subsets of k average to the brute-force mean."""
    from eval import maj_at_k
    from infer_scale import vote_once, weighted_maj_at_k

    votes, right, weights = [0, 0, 1, None, 1, 1], {0}, [0.9, 0.8, 0.1, 0.9, 0.2, 0.3]
    assert vote_once(votes, right) == 0.0 and vote_once(votes, right, weights) == 1.0
    assert vote_once([None], right) == 0.0 and vote_once([0, 1], right) == 0.5
    assert weighted_maj_at_k(votes, right, [1] * 6, 6) == maj_at_k(votes, right, 6)
    exact = [
        vote_once([votes[i] for i in s], right, [weights[i] for i in s]) for s in itertools.combinations(range(6), 3)
    ]
    drawn = weighted_maj_at_k(votes, right, weights, 3, draws=4000)
    assert abs(drawn - sum(exact) / len(exact)) < 0.03, (drawn, sum(exact) / len(exact))


def test_scale_lead_is_the_beta_tail():
    """Against the integral of x^a (1-x)^b above one half, by small steps."""
    from infer_scale import leads

    for a, b in ((0, 0), (3, 0), (4, 0), (5, 2), (2, 5), (12, 8)):
        grid = [(i + 0.5) / 20000 for i in range(20000)]
        mass = [x**a * (1 - x) ** b for x in grid]
        assert abs(leads(a, b) - sum(mass[10000:]) / sum(mass)) < 1e-6, (a, b)


def test_scale_a_decided_vote_cannot_turn():
    """Stopped once the rest cannot change it, the vote ends as the full one would, whatever the order; surer stops later."""
    from infer_scale import adaptive, samples_until_decided, vote_once

    rng = random.Random(3)
    for _ in range(200):
        votes = [rng.choice((None, 0, 0, 0, 1, 2)) for _ in range(rng.randint(1, 12))]
        used = samples_until_decided(votes)
        totals = Counter(v for v in votes if v is not None)
        if used < len(votes):
            assert vote_once(votes[:used], {0}) == vote_once(votes, {0}) in (0.0, 1.0), votes
        success, mean_used = adaptive(votes, {0}, None)
        assert abs(success - vote_once(votes, {0})) < 1e-12 and mean_used <= len(votes), (votes, totals)
    assert samples_until_decided([0] * 20, 0.95) == 4 and samples_until_decided([0] * 20, 0.9) == 3
    assert samples_until_decided([0] * 20) == 11 and samples_until_decided([0, 1] * 10, 0.95) == 20


def test_scale_budget_by_level():
    """A model that is right once it may think 10 tokens per level: the table and the verdict on each level follow."""
    import eval as eval_module
    import infer_scale
    from generate import Completion

    tokenizer = bytes_tokenizer()

    def generate(params, config, prompts, *, think_budget=0, temperature, **_):
        assert temperature == 0
        rows = []
        for prompt in prompts:
            n = int(re.search(r"user\n(\d+)\+1", tokenizer.decode(prompt, skip_special_tokens=False))[1])
            needed = 10 * (n % 2 + 1)
            thought = "." * min(needed, think_budget or needed)
            tokens = tokenizer.encode(f"{thought}\\boxed{{{n + 1 if len(thought) == needed else 99}}}").ids
            rows.append([Completion(tokens, [-0.1] * len(tokens), "stop")])
        return rows

    problems = [p | {"level": i % 2 + 1} for i, p in enumerate(sum_problems(40))]
    out, args = io.StringIO(), infer_scale.parse_args(["--budgets", "5", "10", "15"])
    with (
        mock.patch.object(eval_module, "generate", generate),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        rows = infer_scale.sweep_budget(scripted_run(problems, {}), args)
    assert (
        [r["accuracy"] for r in rows] == [0, 0.5, 0.5, 1]
        and rows[1]["levels"]["1"][0] == 1
        and rows[1]["levels"]["2"][0] == 0
    )
    assert (
        "level 1: 10 tokens of thought are not" in out.getvalue()
        and "level 2: every budget tried costs" in out.getvalue()
    ), out.getvalue()
    assert "| thought of at most 10 tokens | 50.0 |" in out.getvalue(), "half of the thoughts were cut"


def test_scale_every_method_costs_what_it_draws():
    """From one scripted pool: rows of k votes cost k samples, the majority is right where one sample often is not."""
    import eval as eval_module
    import infer_scale

    def reply(text, seed, sample):  # two of three samples are right, the wrong ones differ
        n = int(re.search(r"user\n(\d+)\+1", text)[1])
        return f"\\boxed{{{n + 1 + (20 * sample if sample % 3 == 0 else 0)}}}"

    problems = [p | {"problem": f"{10 + i}+1", "answer": str(11 + i)} for i, p in enumerate(sum_problems(10))]
    problems, run = [p for p in problems], scripted_run(problems, {})
    args = infer_scale.parse_args(["--num-samples", "9", "--votes", "3", "9"])
    out = io.StringIO()
    with (
        mock.patch.object(eval_module, "generate", scripted(reply)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        records, settings = eval_module.measure(run, num_samples=9)
        rows = {r["method"]: r for r in infer_scale.self_consistency(records, settings, args)}
    assert abs(rows["one sample"]["accuracy"] - 7 / 9) < 1e-9, "sample 0 is off by nothing, 3 and 6 are wrong"
    assert (
        rows["majority of 9"]["accuracy"] == 1.0
        and rows["one sample"]["accuracy"] < rows["majority of 3"]["accuracy"] < 1
    )
    assert (
        rows["majority of 9"]["tokens_mean"]
        == 9 * rows["one sample"]["tokens_mean"]
        == 9 * rows["best of 9 by mean log-probability"]["tokens_mean"] / 9
    )
    assert (
        rows["adaptive majority, outcome fixed"]["accuracy"] == 1.0
        and rows["adaptive majority, outcome fixed"]["samples"] < 9
    )
    assert "| 0.9 | 0.0 | - |" in out.getvalue(), "nobody holds nine tenths of the votes, so nothing is answered"
