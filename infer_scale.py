"""What more tokens at inference buy: chain of thought, votes, temperature, a budget for thinking.

    python infer_scale.py                                  # everything, on the embedded tiny model
    python infer_scale.py --experiments consistency --model qwen2.5-1.5b-instruct --limit 200
    python infer_scale.py --experiments temperature --split dev     # choose a temperature

One pool of N samples per problem serves every vote of k <= N: maj@k and best-of-k are means over
all subsets of k samples. Every row says how many tokens it wrote; compare rows of equal cost.

Chain of thought: Wei et al. 2022, arXiv:2201.11903; zero-shot: Kojima et al. 2022, 2205.11916.
Self-consistency: Wang et al. 2022, arXiv:2203.11171; adaptive: Aggarwal et al. 2023, 2305.11860;
weighted by confidence: Taubenfeld et al. 2025, arXiv:2502.06233. Closing a thought: Muennighoff
et al. 2025 (s1), arXiv:2501.19393.
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
    add("--num-samples", type=at_least(1), default=20, help="size of the pool of each problem")
    add("--votes", type=at_least(1), nargs="+", help="(default: of 5, 10, 20 what the pool allows)")
    add("--exemplars", type=at_least(1), nargs="+", default=(1, 2, 4, 8), help="solved problems")
    add("--temperatures", type=above(0.0), nargs="+", default=(0.4, 0.7, 1.0, 1.3))
    add("--budgets", type=at_least(1), nargs="+",
        help=f"tokens of thought (default: {TINY_BUDGETS} if tiny, else {OTHER_BUDGETS})")
    add("--confidence", type=between(0.5, 1.0), default=0.95, help="that ends an adaptive vote")
    return p.parse_args(argv)


def choose_votes(votes, num_samples):
    """The numbers of votes to measure, in order, each once."""
    ks = sorted(set(votes or [k for k in (5, 10, 20) if k <= num_samples]))
    if ks and ks[-1] > num_samples:
        raise ValueError(f"--votes {ks[-1]} of a pool of {num_samples}; raise --num-samples")
    return ks


# ---------------------------------------------------------------------- votes


def leaders_of(votes, weights=None):
    """The classes with most votes, or with the largest sum of weights, in the order of votes."""
    totals = Counter()
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote is not None:
            totals[vote] += weight
    most = max(totals.values(), default=0)
    return [vote for vote in totals if totals[vote] == most]


def majority_vote(answers, weights=None):
    """The answer with most votes, as first spelled; of equals the first; None when nobody votes."""
    votes = pool_answers(answers)
    leaders = leaders_of(votes, weights)
    return answers[votes.index(leaders[0])] if leaders else None


def vote_once(votes, right, weights=None):
    """Success of one vote: 1, 0, or the share of right classes among those that tie."""
    leaders = leaders_of(votes, weights)
    return len(right.intersection(leaders)) / max(1, len(leaders))


def best_of_k(confidences, right, k):
    """Mean success of taking the most confident of k samples, over all subsets of k."""
    order = sorted(range(len(right)), key=lambda i: -confidences[i])
    ways = sum(right[i] * math.comb(worse, k - 1) for worse, i in enumerate(reversed(order)))
    return ways / math.comb(len(right), k)


def leads(first, second):
    """Chance that a class with `first` votes is more frequent than one with `second`, under a flat
    prior: that a Beta(first + 1, second + 1) variable exceeds 1/2, a tail of a binomial."""
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


def samples_until_sure(votes, confidence):
    """How many votes, read in order, it takes until the leader is the most frequent class with this
    confidence; all of them, if it takes more."""
    counts = Counter()
    for used, vote in enumerate(votes, 1):
        counts[vote] += vote is not None
        *_, second, first = sorted([0, 0, *counts.values()])
        if leads(first, second) >= confidence:
            break
    return used


def adaptive(votes, right, confidence, orders=20, seed=0):
    """(success, samples used) of the adaptive vote, means over random orders of the pool."""
    rng = random.Random(seed)
    success = []
    drawn = []
    for _ in range(orders):
        order = rng.sample(votes, len(votes))
        drawn.append(samples_until_sure(order, confidence))
        success.append(vote_once(order[:drawn[-1]], right))
    return fmean(success), fmean(drawn)


# ---------------------------------------------------------------------- experiments
# Each returns its rows of results, and lines to print below their table.


def compare_prompts(setup, exemplars, shots_from, seed):
    """Greedy answers: at once, after zero-shot chain of thought, after solved problems."""
    at_once = "plain" if is_tiny(setup.config) else "direct"  # "only" is no word of the tiny model
    most = load_shots(shots_from or setup.settings["data"], max(exemplars), seed, setup.problems)
    form = {"system": setup.options["system"], "think_tag": setup.options["think_tag"]}
    problems = eval.drop_long_prompts(setup.problems, setup.tokenizer, setup.config, "cot",
                                      setup.options["max_new_tokens"], shots=most, **form)
    setup = setup._replace(problems=problems)  # the same for every row
    rows = []
    for prompt, k in [(at_once, 0), ("cot", 0), *(("cot", k) for k in exemplars)]:
        method = f"{prompt} after {k} solved" if k else prompt
        rows.append(measure(setup, method, f"{prompt}-{k}", prompt=prompt, shots=most[:k],
                            temperature=0.0))
    return rows, []


def confidence_of(sample, vote):
    """Mean probability (geometric) of a sample's tokens; 0 without an answer, never the best."""
    return 0.0 if vote is None else math.exp(sample["logprob"] / sample["tokens"])


def spend_pool(record, grade, ks, confidence, seed):
    """{method: (success, samples drawn)} of the ways to spend the samples of a problem."""
    votes, right = votes_of(record, grade)
    pool = len(votes)
    correct = [s[grade] is True for s in record["samples"]]
    sure = list(map(confidence_of, record["samples"], votes))
    found = {"one sample": (fmean(correct), 1)}
    for k in ks:
        found[f"majority of {k}"] = maj_at_k(votes, right, k), k
        found[f"best of {k} by mean log-probability"] = best_of_k(sure, correct, k), k
        found[f"pass@{k} (a bound)"] = pass_at_k(pool, sum(correct), k), k
    found[f"majority of {pool}, weighted"] = vote_once(votes, right, sure), pool
    found[f"adaptive majority, {confidence:g} sure"] = adaptive(votes, right, confidence, seed=seed)
    return found


def self_consistency(records, settings, ks, confidence):
    """One sample, votes (plain, weighted, adaptive), the best of k, and pass@k."""
    found = [spend_pool(record, settings["grade"], ks, confidence, seed=i)
             for i, record in enumerate(records)]
    rows = []
    for method in found[0]:
        outcomes = [of_problem[method] for of_problem in found]
        rows.append(cost_row(records, outcomes, method=method, **settings))
    levels = eval.rates_by_level(records, *zip(*outcomes))  # of the adaptive vote
    by_level = ", ".join(f"{level}: {drawn:.1f}" for level, (*_, drawn) in levels.items())
    return rows, [f"samples of the adaptive vote: {rows[-1]['samples']:.1f} of "
                  f"{settings['num_samples']}; by level {by_level or '-'}\n"]


def told_apart(row, best):
    """Whether `best` is better than `row` on the problems that both have, beyond chance."""
    return eval.change(row, best)[1] > 0


def sweep_temperature(pools, ks):
    """Votes at each temperature, and which temperature is best.

    pools: {temperature: (records, settings)}. ks: numbers of votes.
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
        mine = rows[i::len(ks)]
        best = max(mine, key=itemgetter("accuracy"))
        equals = [f"{row['temperature']:g}" for row in mine if not told_apart(row, best)]
        notes.append(f"votes {k}: best {best['temperature']:g} with {percent(best['accuracy'])} %; "
                     f"not told apart from it: {', '.join(equals)}")
    return rows, notes


def sweep_budget(setup, budgets):
    """Greedy answers after any length of thought, and after one closed at so many tokens."""
    usual = TINY_BUDGETS if is_tiny(setup.config) else OTHER_BUDGETS
    budgets = sorted(set(budgets or usual))
    free, *rows = [
        measure(setup, f"thought of {f'at most {budget} tokens' if budget else 'any length'}",
                f"budget-{budget}", temperature=0.0, think_budget=budget)
        for budget in [0, *budgets]]
    notes = []
    for level in free["levels"]:
        members = [p["id"] for p in setup.problems if str(p.get("level")) == level]
        of_level = {"scores": {i: free["scores"][i] for i in members}}
        enough = [b for b, row in zip(budgets, rows) if not told_apart(row, of_level)]
        verdict = "every budget tried costs accuracy"
        if enough:
            verdict = f"{enough[0]} tokens of thought are not told apart from any length"
        notes.append(f"level {level}: {verdict}")
    return [free, *rows], notes


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
