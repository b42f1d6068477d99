"""Tests of stats.py."""

import itertools
import math
import random
from collections import Counter

import stats
from tests.common import raises


def _close(found, expected, tolerance=1e-12):
    return all(abs(a - b) < tolerance for a, b in zip(found, expected, strict=True))


def _wilson(correct, n):
    """(low, high): the p that are 1.96 standard errors from correct/n, found by bisection."""
    bounds = []
    for outside in (0.0, 1.0):
        inside = correct / n
        for _ in range(100):
            middle = (inside + outside) / 2
            error = 1.959963984540054 * math.sqrt(middle * (1 - middle) / n)
            if abs(correct / n - middle) < error:
                inside = middle
            else:
                outside = middle
        bounds.append(inside)
    return bounds


def test_stats_interval_solves_its_definition():
    """Less variance narrows the interval; no variance at all does not collapse it."""
    for correct, n in ((0, 7), (3, 7), (7, 7), (120, 500), (499, 500), (1, 1319)):
        found = stats.interval([1] * correct + [0] * (n - correct))
        assert _close(found, (correct / n, *_wilson(correct, n)), 1e-9), (correct, n, found)
    _, low, high = stats.interval([0.2, 0.3] * 20)
    wide_low, wide_high = _wilson(10, 40)
    assert 0 < low and high - low < 0.5 * (wide_high - wide_low)
    assert _close(stats.interval([0.5] * 8), (0.5, *_wilson(4, 8)), 1e-9)


def test_stats_interval_coverage():
    """About 95 % of 400 evaluations, on 60 problems with 4 samples each, cover the true rate."""
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        rates = [rng.betavariate(0.6, 1.4) for _ in range(60)]  # mean 0.3, most easy or hard
        scores = [sum(rng.random() < p for _ in range(4)) / 4 for p in rates]
        _, low, high = stats.interval(scores)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 400 <= 0.98, covered


def _mean_over_subsets(samples, k, success):
    found = [success(subset) for subset in itertools.combinations(samples, k)]
    return sum(found) / len(found)


def test_stats_pass_and_maj_at_k_are_means_over_subsets():
    """Against brute force, with abstentions, ties, and zero, one or two right classes."""
    rng = random.Random(1)
    for _ in range(150):
        votes = [rng.choice((None, 0, 0, 1, 2)) for _ in range(rng.randint(1, 8))]
        right = {c for c in (0, 2) if rng.random() < 0.6}

        def majority(subset, right=right):
            counts = Counter(v for v in subset if v is not None)
            leaders = [v in right for v in counts if counts[v] == max(counts.values())]
            return sum(leaders) / len(leaders) if leaders else 0

        correct = [vote in right for vote in votes]
        for k in range(1, len(votes) + 1):
            expected = _mean_over_subsets(votes, k, majority), _mean_over_subsets(correct, k, any)
            found = (stats.maj_at_k(votes, right, k),
                     stats.pass_at_k(len(votes), sum(correct), k))
            assert _close(found, expected), (votes, right, k)
    for k in (0, 5):
        with raises(ValueError, f"pass@{k} of 4"):
            stats.pass_at_k(4, 2, k)


def test_stats_bootstrap_agrees_with_the_exact_binomial():
    """If b solves 30 more of 200 problems, a resample's mean is Binomial(200, 0.15) / 200."""
    b = [1] * 30 + [0] * 170
    change, low, high = stats.paired_bootstrap([0] * 200, b)
    below = list(itertools.accumulate(
        math.comb(200, x) * 0.15**x * 0.85 ** (200 - x) for x in range(201)))
    exact = [next(x for x in range(201) if below[x] >= q) / 200 for q in (0.025, 0.975)]
    assert change == 0.15 and _close((low, high), exact, 1.001 / 200), (low, high, exact)
    assert stats.paired_bootstrap(b, b) == (0.0, 0.0, 0.0), "pairing cancels what both runs share"


def test_stats_mcnemar_is_the_exact_sign_test():
    """Against an enumeration of all 2^n outcomes of the problems that differ."""
    for gained, lost in ((0, 0), (1, 0), (3, 3), (9, 2), (0, 10)):
        ways = [abs(2 * sum(bits) - gained - lost) >= abs(gained - lost)
                for bits in itertools.product((0, 1), repeat=gained + lost)]
        assert _close([stats.mcnemar(gained, lost)], [sum(ways) / len(ways)]), (gained, lost)
