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


def interval(scores):
    """(mean, low, high): the 95 % interval over problems of scores in [0, 1].

    Wilson's (1927), every p within Z of its own standard errors of the mean, for as many yes-or-no
    problems as would give a mean of the same variance: N samples of a problem are one observation.
    """
    n = len(scores)
    rate = fmean(scores)
    variance = fmean((s - rate) ** 2 for s in scores)
    if variance > 1e-12:
        n = n * rate * (1 - rate) / variance
    spread = Z * Z / n
    middle = rate + spread / 2
    half = Z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return rate, max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def rate_metrics(name, scores):
    """The mean of scores and its interval as metrics, for the curves of view.py."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(scores)))


def paired_bootstrap(a, b):
    """(mean, low, high) of b - a with its 95 % interval, from 10,000 resamples of the problems."""
    change = np.subtract(b, a, dtype=float)
    n = len(change)
    rng = np.random.default_rng(0)
    means = [change[rng.integers(0, n, (100, n))].mean(1) for _ in range(100)]
    low, high = np.quantile(means, (0.025, 0.975))
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
    leaders = {}  # class -> its first answer
    classes = {None: None}  # canonical form -> class
    forms = [answer and canonical(answer) for answer in answers]
    for form, answer in zip(forms, answers):
        if form not in classes:
            same = (c for c, leader in leaders.items() if equivalent(answer, leader, timeout_s=0.5))
            classes[form] = next(same, len(leaders))
            leaders.setdefault(classes[form], answer)
    return [classes[form] for form in forms]


def maj_at_k(votes, right, k):
    """Mean success of a majority vote over all subsets of k samples, exact; ties count as a lot.

    votes: the class of each sample, or None; right: the classes that are right.
    """
    counts = Counter(votes)
    silent = counts.pop(None, 0)
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


def percent(*rates):
    """A rate in percent, and its interval if there is one: "12.3", "12.3 [10.0, 15.0]"."""
    rate, *bounds = [f"{100 * rate:.1f}" for rate in rates]
    return f"{rate} [{', '.join(bounds)}]" if bounds else rate


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
