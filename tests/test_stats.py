"""Tests of stats.py."""

import itertools
import math
import random
from collections import Counter

import stats
from tests.common import raises

Z = 1.959963984540054


def _wilson(correct, n):
    """The p for which correct/n is 1.96 standard errors away, found by bisection: (low, high)."""
    rate = correct / n
    bounds = []
    for outside in (0.0, 1.0):
        inside = rate
        for _ in range(100):
            middle = (inside + outside) / 2
            if abs(rate - middle) < Z * math.sqrt(middle * (1 - middle) / n):
                inside = middle
            else:
                outside = middle
        bounds.append(inside)
    return bounds


def _assert_close(found, expected, tolerance=1e-12):
    assert all(abs(a - b) < tolerance for a, b in zip(found, expected, strict=True)), (
        found, expected)


def test_stats_interval_is_the_root_of_its_definition():
    for correct, n in ((0, 7), (3, 7), (7, 7), (120, 500), (499, 500), (1, 1319)):
        found = stats.interval([1] * correct + [0] * (n - correct))
        _assert_close(found, (correct / n, *_wilson(correct, n)), 1e-9)


def test_stats_interval_counts_problems_not_samples():
    """40 problems with ten equal samples each know no more than 40 problems; samples that differ
    narrow the interval, to that of 400 at best."""
    rate, low, high = stats.interval([1.0] * 10 + [0.0] * 30)
    _, narrow_low, narrow_high = stats.interval([0.2, 0.3] * 20)
    assert rate == 0.25
    assert 0 < narrow_low and narrow_high - narrow_low < 0.5 * (high - low)
    # no variance at all is no certainty
    _assert_close(stats.interval([0.5] * 8), (0.5, *_wilson(4, 8)), 1e-9)


def test_stats_interval_covers():
    """Of 400 evaluations of 60 problems, 4 samples each, about 95 % of intervals hold the rate."""
    rng = random.Random(0)
    held = 0
    for _ in range(400):
        rates = [rng.betavariate(0.6, 1.4) for _ in range(60)]  # mean 0.3, most easy or hard
        scores = [sum(rng.random() < p for _ in range(4)) / 4 for p in rates]
        _, low, high = stats.interval(scores)
        held += low <= 0.3 <= high
    assert 0.92 <= held / 400 <= 0.98, held


def test_stats_pass_at_k_is_the_mean_over_subsets():
    for n, c in ((1, 0), (1, 1), (6, 0), (6, 2), (7, 6), (8, 8)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(outcomes, k)]
            assert abs(stats.pass_at_k(n, c, k) - sum(subsets) / len(subsets)) < 1e-12, (n, c, k)
    for k in (0, 5):
        with raises(ValueError, f"pass@{k} of 4"):
            stats.pass_at_k(4, 2, k)


def test_stats_maj_at_k_is_the_mean_over_subsets():
    """Brute force over all subsets: silent samples, ties, and no right class, one, or two."""
    rng = random.Random(1)
    for _ in range(150):
        votes = [rng.choice((None, 0, 0, 1, 2)) for _ in range(rng.randint(1, 8))]
        right = {c for c in (0, 2) if rng.random() < 0.6}
        for k in range(1, len(votes) + 1):
            success = []
            for subset in itertools.combinations(votes, k):
                counts = Counter(v for v in subset if v is not None)
                leaders = [v in right for v in counts if counts[v] == max(counts.values())]
                success.append(sum(leaders) / len(leaders) if leaders else 0)
            expected = sum(success) / len(success)
            assert abs(stats.maj_at_k(votes, right, k) - expected) < 1e-12, (votes, right, k)


def test_stats_bootstrap_agrees_with_the_exact_binomial():
    """If B solves 30 of 200 problems more, a resample's mean is Binomial(200, 0.15) / 200."""
    a = [0] * 200
    b = [1] * 30 + [0] * 170
    change, low, high = stats.paired_bootstrap(a, b)
    chances = [math.comb(200, x) * 0.15**x * 0.85 ** (200 - x) for x in range(201)]
    below = list(itertools.accumulate(chances))
    assert change == 0.15
    for bound, q in ((low, 0.025), (high, 0.975)):
        exact = next(x for x in range(201) if below[x] >= q) / 200
        assert abs(bound - exact) <= 1 / 200, (bound, exact)
    same = stats.paired_bootstrap(b, b)
    assert same == (0.0, 0.0, 0.0), "pairing removes what both runs share"


def test_stats_mcnemar_is_the_exact_sign_test():
    """Against all 2^n ways in which the problems that differ could have fallen."""
    for gained, lost in ((0, 0), (1, 0), (3, 3), (9, 2), (0, 10)):
        n = gained + lost
        ways = [abs(2 * sum(bits) - n) >= abs(gained - lost)
                for bits in itertools.product((0, 1), repeat=n)]
        exact = sum(ways) / len(ways)
        assert abs(stats.mcnemar(gained, lost) - exact) < 1e-12, (gained, lost)
