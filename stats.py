"""Rates with their intervals, paired comparisons, votes; and how results are written.

Problems are a sample of all that could have been asked: an interval is over problems, and two runs
on the same problems are compared problem by problem (Miller 2024, arXiv:2411.00640).
"""

import math
from collections import Counter
from operator import gt
from statistics import fmean

import numpy as np

from verify import canonical, equivalent

# ------------------------------------------------------------ rates

Z = 1.959963984540054  # 95 % of a normal variable are within so many standard deviations


def wilson(correct, n):
    """(low, high), Wilson 1927: every p within Z of its own standard errors of correct / n."""
    if n <= 0:
        return 0.0, 1.0
    rate = correct / n
    spread = Z * Z / n
    middle = rate + spread / 2
    half = Z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def interval(scores):
    """(mean, low, high): the 95 % interval over problems of scores in [0, 1].

    Wilson's, for as many yes-or-no problems as would give a mean of the same variance. A problem's
    mean over N samples is one observation.
    """
    n = len(scores)
    rate = fmean(scores)
    variance = fmean((s - rate) ** 2 for s in scores)
    effective = n * rate * (1 - rate) / variance if variance > 1e-12 else n
    return rate, *wilson(rate * effective, effective)


def rate_metrics(name, scores):
    """The mean of scores and its interval as metrics, for the curves of view.py."""
    rate, low, high = interval(scores)
    return {name: rate, f"{name}_low": low, f"{name}_high": high}


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """(mean, low, high) of b - a with its 95 % interval, resampling problems."""
    change = np.asarray(b, float) - np.asarray(a, float)
    rng = np.random.default_rng(seed)
    means = [change[rng.integers(0, len(change), (100, len(change)))].mean(1)
             for _ in range(draws // 100)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(change.mean()), float(low), float(high)


def mcnemar(only_a, only_b):
    """Exact two-sided p (1947) that what one run alone got right is as likely to be either's."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(num_samples, num_correct, k):
    """Chance that one of k samples, drawn without replacement, is right: 1 - C(n-c, k) / C(n, k).

    Raises ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k has to be from 1 to their number")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


# ------------------------------------------------------------ votes


def pool_answers(answers):
    """The class of each answer; equivalent answers share one, None (no answer) has none.

    >>> pool_answers(["1/2", None, "0.5", "3"])
    [0, None, 0, 1]
    """
    leaders = []  # the first answer of each class
    classes = {None: None}  # canonical form -> class
    votes = []
    for answer in answers:
        key = None if answer is None else canonical(answer)
        if key not in classes:
            same = (i for i, leader in enumerate(leaders)
                    if equivalent(answer, leader, timeout_s=0.5))
            classes[key] = next(same, len(leaders))
            if classes[key] == len(leaders):
                leaders.append(answer)
        votes.append(classes[key])
    return votes


def maj_at_k(votes, right, k):
    """Mean success of a majority vote over all subsets of k samples, exact; ties count as a lot.

    votes: the class of each sample, or None; right: the classes that are right.
    """
    counts = Counter(v for v in votes if v is not None)
    silent = len(votes) - counts.total()
    success = 0.0
    for most in range(1, k + 1):  # votes of the winner: count the subsets class by class
        subsets = {(k, 0, 0): 1}  # (samples still to draw, leaders, right ones of them): ways
        for vote, count in counts.items():
            longer = Counter()
            for (left, leaders, good), ways in subsets.items():
                for drawn in range(min(left, count, most) + 1):
                    leads = drawn == most
                    after = (left - drawn, leaders + leads, good + (leads and vote in right))
                    longer[after] += ways * math.comb(count, drawn)
            subsets = longer
        success += sum(ways * math.comb(silent, left) * good / leaders
                       for (left, leaders, good), ways in subsets.items() if leaders)
    return success / math.comb(len(votes), k)


# ------------------------------------------------------------ in words


def percent(rate, low=None, high=None):
    if low is None:
        return f"{100 * rate:.1f}"
    return f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(header, rows):
    """A table as Markdown. rows: lists of strings, or of what has one."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def gains(a, b):
    """How many of the same problems were gained and lost from a to b (0 or 1 each), in words."""
    gained = sum(map(gt, b, a))
    lost = sum(map(gt, a, b))
    return (f"{gained} of {len(a)} problems gained, {lost} lost; "
            f"McNemar's exact p = {mcnemar(gained, lost):.2g}")
