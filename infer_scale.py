"""What extra tokens at inference buy: chain of thought, voting, temperature, thinking budgets.

    python infer_scale.py                                  # everything, on the embedded tiny model
    python infer_scale.py --experiments consistency --model qwen2.5-1.5b-instruct --limit 200
    python infer_scale.py --experiments temperature --split dev     # choose a temperature

One pool of N samples per problem serves every vote of k <= N: maj@k and best-of-k are means over
all subsets of k samples. Every row reports its mean token count; compare rows of equal cost.

Chain of thought: Wei et al. 2022, arXiv:2201.11903; zero-shot: Kojima et al. 2022, 2205.11916.
Self-consistency: Wang et al. 2022, arXiv:2203.11171; adaptive: Aggarwal et al. 2023, 2305.11860;
weighted by confidence: Taubenfeld et al. 2025, arXiv:2502.06233. Budget forcing: Muennighoff et
al. 2025 (s1), arXiv:2501.19393.
"""

import functools
import math
import random
from collections import Counter
from operator import itemgetter
from statistics import fmean

import eval
from data.prompts import load_shots
from eval import cost_row, measure, votes_of
from launch import Parser, above, at_least, between, run_main, say
from model import is_tiny
from stats import maj_at_k, pass_at_k, percent, pool_answers

EXPERIMENTS = ("prompts", "consistency", "temperature", "budget")
TINY_BUDGETS = (1, 8, 16, 24, 32, 48)
OTHER_BUDGETS = (64, 256, 512)


def parse_args(argv=None):
    p = Parser(__doc__)
    eval.add_eval_flags(p, eval.SAMPLING_TEMPERATURE, "cot")
    add = p.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    add("--num-samples", type=at_least(1), default=20, help="pool size: samples per problem")
    add("--votes", type=at_least(1), nargs="+", help="(default: those of 5, 10, 20 up to the pool)")
    add("--exemplars", type=at_least(1), nargs="+", default=(1, 2, 4, 8), help="few-shot examples")
    add("--temperatures", type=above(0.0), nargs="+", default=(0.4, 0.7, 1.0, 1.3))
    add("--budgets", type=at_least(1), nargs="+",
        help=f"thinking tokens (default: {TINY_BUDGETS} if tiny, else {OTHER_BUDGETS})")
    add("--confidence", type=between(0.5, 1.0), default=0.95, help="at which adaptive voting stops")
    return p.parse_args(argv)


def choose_votes(votes, num_samples):
    """The numbers of votes to measure, sorted, without duplicates."""
    ks = sorted(set(votes or [k for k in (5, 10, 20) if k <= num_samples]))
    if ks and ks[-1] > num_samples:
        raise ValueError(f"--votes {ks[-1]} exceeds the pool: raise --num-samples {num_samples}")
    return ks


# ---------------------------------------------------------------------- votes


def top_classes(votes, weights=None):
    """The classes with the most votes, or the largest total weight, in order of first vote."""
    totals = Counter()
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote is not None:
            totals[vote] += weight
    most = max(totals.values(), default=0)
    return [vote for vote in totals if totals[vote] == most]


def majority_vote(answers, weights=None):
    """The answer with the most votes, as first spelled; the first in a tie; None without votes."""
    votes = pool_answers(answers)
    winners = top_classes(votes, weights)
    return answers[votes.index(winners[0])] if winners else None


def vote_success(votes, right, weights=None):
    """Chance that the vote's winner is right: 1 or 0, or in a tie the share of right classes."""
    winners = top_classes(votes, weights)
    return len(right.intersection(winners)) / max(1, len(winners))


def best_of_k(confidences, right, k):
    """Mean success of taking the most confident of k samples, over all subsets of k."""
    order = sorted(range(len(right)), key=lambda i: -confidences[i])
    ways = sum(right[i] * math.comb(worse, k - 1) for worse, i in enumerate(reversed(order)))
    return ways / math.comb(len(right), k)


def lead_probability(first, second):
    """Probability that a class with `first` votes is more frequent than one with `second`, under a
    flat prior: P(Beta(first + 1, second + 1) > 1/2), computed as a binomial tail."""
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


def samples_until_sure(votes, confidence):
    """Number of votes until the leader is the most frequent class with this confidence, or all."""
    counts = Counter()
    for used, vote in enumerate(votes, 1):
        counts[vote] += vote is not None
        *_, second, first = sorted([0, 0, *counts.values()])
        if lead_probability(first, second) >= confidence:
            break
    return used


def adaptive_vote(votes, right, confidence, seed=0, orders=20):
    """(success, samples used) of adaptive voting, averaged over random orders of the pool."""
    rng = random.Random(seed)
    outcomes = []
    for _ in range(orders):
        order = rng.sample(votes, len(votes))
        used = samples_until_sure(order, confidence)
        outcomes.append((vote_success(order[:used], right), used))
    return tuple(map(fmean, zip(*outcomes)))


# ---------------------------------------------------------------------- experiments
# Each returns result rows and the lines to print below their table.


def compare_prompts(setup, exemplars, shots_from, seed):
    """Greedy answers: direct, zero-shot chain of thought, few-shot chain of thought."""
    direct = "plain" if is_tiny(setup.config) else "direct"  # tiny never saw its "only"
    shots = load_shots(shots_from or setup.settings["data"], max(exemplars), seed, setup.problems)
    options = {"system": setup.options["system"], "think_tag": setup.options["think_tag"]}
    problems = eval.drop_long_prompts(setup.problems, setup.tokenizer, setup.config, "cot",
                                      setup.options["max_new_tokens"], shots=shots, **options)
    setup = setup._replace(problems=problems)  # the same problems in every row
    rows = []
    for prompt, k in [(direct, 0), *(("cot", k) for k in (0, *exemplars))]:
        method = f"{prompt} after {k} solved" if k else prompt
        rows.append(measure(setup, method, f"{prompt}-{k}", prompt=prompt, shots=shots[:k],
                            temperature=0.0))
    return rows, []


def confidence_of(sample, vote):
    """Geometric mean of a sample's token probabilities; 0, the lowest, if it has no answer."""
    return 0.0 if vote is None else math.exp(sample["logprob"] / sample["tokens"])


def vote_outcomes(record, grade, ks, confidence, seed):
    """{method: (success, samples used)} of every way to use one problem's samples."""
    votes, right = votes_of(record, grade)
    pool = len(votes)
    correct = [s[grade] is True for s in record["samples"]]
    weights = list(map(confidence_of, record["samples"], votes))
    outcomes = {"one sample": (fmean(correct), 1)}
    for k in ks:
        outcomes[f"majority of {k}"] = maj_at_k(votes, right, k), k
        outcomes[f"best of {k} by mean log-probability"] = best_of_k(weights, correct, k), k
        outcomes[f"pass@{k} (a bound)"] = pass_at_k(pool, sum(correct), k), k
    outcomes[f"majority of {pool}, weighted"] = vote_success(votes, right, weights), pool
    adaptive = f"adaptive majority, {confidence:g} sure"
    outcomes[adaptive] = adaptive_vote(votes, right, confidence, seed)
    return outcomes


def self_consistency(records, settings, ks, confidence):
    """One sample; plain, weighted and adaptive votes; best of k; pass@k."""
    per_problem = [vote_outcomes(record, settings["grade"], ks, confidence, seed=i)
                   for i, record in enumerate(records)]
    rows = []
    for method in per_problem[0]:
        outcomes = [by_method[method] for by_method in per_problem]
        rows.append(cost_row(records, outcomes, method=method, **settings))
    levels = eval.rates_by_level(records, *zip(*outcomes))  # the last method: adaptive
    by_level = ", ".join(f"{level}: {used:.1f}" for level, (*_, used) in levels.items())
    return rows, [f"samples used by adaptive voting: {rows[-1]['samples']:.1f} of "
                  f"{settings['num_samples']}; by level {by_level or '-'}\n"]


def significantly_better(row, baseline):
    """Whether the 95 % interval of the paired difference, row minus baseline, lies above zero."""
    return eval.difference(row, baseline)[1] > 0


def sweep_temperature(pools, ks):
    """Accuracy of votes at each temperature, and the best temperature for each number of votes.

    pools: {temperature: (records, settings)}. ks: numbers of votes; 1 is added.
    """
    rows = []
    ks = sorted({1, *ks})
    for temperature, (records, settings) in sorted(pools.items()):
        pairs = [votes_of(r, settings["grade"]) for r in records]
        for k in ks:
            outcomes = [(maj_at_k(*pair, k), k) for pair in pairs]
            rows.append(cost_row(records, outcomes, method=f"majority of {k} at {temperature:g}",
                                 **settings))
    notes = []
    for i, k in enumerate(ks):
        of_k = rows[i::len(ks)]
        best = max(of_k, key=itemgetter("accuracy"))
        tied = [f"{row['temperature']:g}" for row in of_k if not significantly_better(best, row)]
        notes.append(f"votes {k}: best {best['temperature']:g} with {percent(best['accuracy'])} %; "
                     f"not significantly worse: {', '.join(tied)}")
    return rows, notes


def sweep_budget(setup, budgets):
    """Greedy answers with unlimited thinking, and with the thought closed after each budget."""
    default = TINY_BUDGETS if is_tiny(setup.config) else OTHER_BUDGETS
    budgets = sorted(set(budgets or default))
    unlimited, *rows = [
        measure(setup, f"thought of {f'at most {budget} tokens' if budget else 'any length'}",
                f"budget-{budget}", temperature=0.0, think_budget=budget)
        for budget in [0, *budgets]]
    notes = []
    for level in unlimited["levels"]:
        members = [p["id"] for p in setup.problems if str(p.get("level")) == level]
        at_level = {"scores": {i: unlimited["scores"][i] for i in members}}
        enough = [b for b, row in zip(budgets, rows) if not significantly_better(at_level, row)]
        verdict = "every budget tried loses accuracy"
        if enough:
            verdict = f"a budget of {enough[0]} is not significantly worse than unlimited thinking"
        notes.append(f"level {level}: {verdict}")
    return [unlimited, *rows], notes


def main(args):
    ks = choose_votes(args.votes, args.num_samples)
    setup = eval.load_setup(args)

    @functools.cache
    def pool(temperature):
        return eval.collect_records(setup, f"temperature-{temperature:g}", temperature=temperature,
                                    num_samples=args.num_samples)

    for name in args.experiments:
        if name == "prompts":
            rows, notes = compare_prompts(setup, args.exemplars, args.shots_from, args.data_seed)
        elif name == "consistency":
            rows, notes = self_consistency(*pool(args.temperature), ks, args.confidence)
        elif name == "temperature":
            rows, notes = sweep_temperature({t: pool(t) for t in args.temperatures}, ks)
        else:
            rows, notes = sweep_budget(setup, args.budgets)
        eval.publish(setup, rows)
        for note in notes:
            say(note)


if __name__ == "__main__":
    run_main(main, parse_args)
