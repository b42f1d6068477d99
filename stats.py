"""Accuracies with confidence intervals, paired comparisons, majority votes, and result tables.

The problems are a sample from a larger population: intervals are over problems, and two runs on the
same problems are compared problem by problem (Miller 2024, arXiv:2411.00640).
"""

import math
from collections import Counter
from operator import gt
from statistics import fmean

import numpy as np

from verify import canonical, equivalent

# ------------------------------------------------------------ rates

Z = 1.959963984540054  # half-width, in standard deviations, of a normal 95 % interval


def interval(scores):
    """(mean, low, high): the mean of one score in [0, 1] per problem, and its 95 % interval.

    Wilson's score interval (1927), with n replaced by the number of yes-or-no problems whose mean
    would have the same variance. N samples of a problem are one observation, their mean.
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
    """The mean of scores and its interval as metrics, which view.py plots."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(scores)))


def paired_bootstrap(a, b):
    """(mean, low, high) of b - a: its 95 % interval from 10,000 resamples of the problems."""
    change = np.subtract(b, a, dtype=float)
    n = len(change)
    rng = np.random.default_rng(0)
    means = [change[rng.integers(0, n, (100, n))].mean(1) for _ in range(100)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(change.mean()), float(low), float(high)


def mcnemar(only_a, only_b):
    """Exact two-sided p of McNemar's test (1947). only_a, only_b: problems only that run solved."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(num_samples, num_correct, k):
    """Probability that k samples, drawn without replacement, include a right one.

    1 - C(n-c, k) / C(n, k), arXiv:2107.03374. Raises ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: expected k from 1 to that number")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


# ------------------------------------------------------------ votes


def pool_answers(answers):
    """The class of each answer: equivalent answers share one, and None (no answer) stays None.

    >>> pool_answers(["1/2", None, "0.5", "3"])
    [0, None, 0, 1]
    """
    firsts = {}  # class -> its first answer
    classes = {None: None}  # canonical form -> class
    forms = [answer and canonical(answer) for answer in answers]
    for form, answer in zip(forms, answers):
        if form not in classes:
            same = (c for c, first in firsts.items() if equivalent(answer, first, timeout_s=0.5))
            classes[form] = next(same, len(firsts))
            firsts.setdefault(classes[form], answer)
    return [classes[form] for form in forms]


def maj_at_k(votes, right, k):
    """Success rate of a majority vote, averaged exactly over all subsets of k samples.

    votes: the class of each sample, or None. right: the right classes. Ties are broken at random.
    """
    counts = Counter(votes)
    abstaining = counts.pop(None, 0)
    success = 0.0
    for top in range(1, k + 1):  # votes of each leader; subsets are counted class by class
        subsets = {(k, 0, 0): 1}  # (samples left to draw, leaders, right leaders) -> subsets
        for vote, count in counts.items():
            extended = Counter()
            for (left, leaders, correct), ways in subsets.items():
                for drawn in range(min(left, count, top) + 1):
                    leads = drawn == top
                    state = (left - drawn, leaders + leads, correct + (leads and vote in right))
                    extended[state] += ways * math.comb(count, drawn)
            subsets = extended
        success += sum(ways * math.comb(abstaining, left) * correct / leaders
                       for (left, leaders, correct), ways in subsets.items() if leaders)
    return success / math.comb(len(votes), k)


# ------------------------------------------------------------ text


def percent(*rates):
    """Format (rate,) or (rate, low, high) in percent: "12.3" or "12.3 [10.0, 15.0]"."""
    rate, *bounds = [f"{100 * rate:.1f}" for rate in rates]
    return f"{rate} [{', '.join(bounds)}]" if bounds else rate


def markdown(header, rows):
    """A Markdown table. rows: lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def gains(a, b):
    """A sentence on the problems gained and lost from a to b, each a list of 0 or 1 per problem."""
    gained = sum(map(gt, b, a))
    lost = sum(map(gt, a, b))
    return (f"{gained} of {len(a)} problems gained, {lost} lost; "
            f"McNemar's exact p = {mcnemar(gained, lost):.2g}")
