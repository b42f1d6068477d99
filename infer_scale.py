"""What more tokens at inference buy: chain of thought, votes, temperature, a budget for thinking.

    python infer_scale.py                                  # everything, on the embedded tiny model
    python infer_scale.py --experiments consistency --model qwen2.5-1.5b-instruct --limit 200
    python infer_scale.py --experiments temperature --split dev --plot heat.png

One pool of N samples per problem serves every vote of k <= N: maj@k and best-of-k are means over
all subsets of k samples. Every row says how many tokens it wrote; compare rows of equal cost.

Chain of thought: Wei et al. 2022, arXiv:2201.11903; zero-shot: Kojima et al. 2022, 2205.11916.
Self-consistency: Wang et al. 2022, arXiv:2203.11171; adaptive: Aggarwal et al. 2023, 2305.11860;
weighted by confidence: Taubenfeld et al. 2025, arXiv:2502.06233. Closing a thought: Muennighoff
et al. 2025 (s1), arXiv:2501.19393.
"""

import argparse
import functools
import math
import random
from collections import Counter
from statistics import fmean

import eval
from data.prompts import load_shots
from eval import interval, maj_at_k, paired_bootstrap, pass_at_k, percent, scores_of, votes_of
from model import is_tiny
from optim import HelpFormatter, above, at_least, between, rank_and_world, run_main, say

EXPERIMENTS = ("prompts", "consistency", "temperature", "budget")
TINY_BUDGETS = (1, 8, 16, 24, 32, 48)
OTHER_BUDGETS = (64, 256, 512)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    eval.add_eval_flags(p, eval.SAMPLING_TEMPERATURE, "cot")
    add = p.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    add("--num-samples", type=at_least(1), default=20, help="size of the pool of each problem")
    add("--votes", type=at_least(1), nargs="+",
        help="numbers of votes (default: those of 5, 10, 20 that the pool allows)")
    add("--exemplars", type=at_least(1), nargs="+", default=(1, 2, 4, 8),
        help="numbers of solved problems shown")
    add("--temperatures", type=above(0.0), nargs="+", default=(0.4, 0.7, 1.0, 1.3))
    add("--budgets", type=at_least(1), nargs="+", help="tokens of thought allowed (default: "
        f"{TINY_BUDGETS} for a tiny model, else {OTHER_BUDGETS})")
    add("--confidence", type=between(0.5, 1.0), default=0.95,
        help="at which an adaptive vote stops sampling")
    add("--plot", help="a PNG file for the heat map of temperature and votes")
    return p.parse_args(argv)


def choose_votes(votes, num_samples):
    """The numbers of votes to measure, in order, each once."""
    ks = sorted(set(votes or [k for k in (5, 10, 20) if k <= num_samples]))
    if ks and ks[-1] > num_samples:
        raise ValueError(f"--votes {ks[-1]} of a pool of {num_samples}; raise --num-samples")
    return ks


# ---------------------------------------------------------------------- votes


def count_votes(votes, weights=None):
    """{class: its votes, or the sum of their weights}"""
    totals = Counter()
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote is not None:
            totals[vote] += weight
    return totals


def majority_vote(answers, weights=None):
    """The answer with most votes, as first spelled; of equals the first; None when nobody votes."""
    votes = eval.pool_answers(answers)
    totals = count_votes(votes, weights)
    return answers[votes.index(max(totals, key=totals.get))] if totals else None


def vote_once(votes, right, weights=None):
    """Success of one vote: 1, 0, or the share of right classes among those that tie."""
    totals = count_votes(votes, weights)
    leaders = [vote in right for vote in totals if totals[vote] == max(totals.values())]
    return fmean(leaders) if leaders else 0.0


def weighted_maj_at_k(votes, right, weights, k, draws=100, seed=0):
    """Mean success of a weighted vote over random subsets of k samples; the only one, if all k."""
    if k == len(votes):
        return vote_once(votes, right, weights)
    rng = random.Random(seed)
    success = []
    for _ in range(draws):
        chosen = rng.sample(range(len(votes)), k)
        success.append(
            vote_once([votes[i] for i in chosen], right, [weights[i] for i in chosen]))
    return fmean(success)


def best_of_k(confidences, right, k):
    """Mean success of taking the most confident of k samples, over all subsets of k."""
    n = len(right)
    order = sorted(range(n), key=lambda i: -confidences[i])
    ways = sum(right[i] * math.comb(n - 1 - rank, k - 1) for rank, i in enumerate(order))
    return ways / math.comb(n, k)


def leads(first, second):
    """Chance that a class with `first` votes is more frequent than one with `second`, under a flat
    prior: that a Beta(first + 1, second + 1) variable exceeds 1/2, a tail of a binomial."""
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


def samples_until_decided(votes, confidence=None):
    """How many of the votes, read in order, it takes until the leader is decided.

    confidence: the chance that it is the more frequent class; None: no vote left can change it.
    """
    counts = Counter()
    for used, vote in enumerate(votes, 1):
        counts[vote] += vote is not None
        *_, second, first = sorted([0, 0, *counts.values()])
        decided = first > second + len(votes) - used
        if confidence is not None:
            decided = leads(first, second) >= confidence
        if decided:
            break
    return used


def adaptive(votes, right, confidence, orders=20, seed=0):
    """(success, samples used) of the adaptive vote, means over random orders of the pool."""
    rng = random.Random(seed)
    found = []
    for _ in range(orders):
        order = rng.sample(votes, len(votes))
        used = samples_until_decided(order, confidence)
        found.append((vote_once(order[:used], right), used))
    return tuple(map(fmean, zip(*found)))


# ---------------------------------------------------------------------- experiments


def compare_prompts(setup, exemplars, shots_from=None, seed=0):
    """Rows of greedy answers: at once, after zero-shot chain of thought, after solved problems."""
    results = []
    at_once = "plain" if is_tiny(setup.config) else "direct"  # "only" is no word of the tiny model
    for prompt, k in [(at_once, 0), ("cot", 0), *(("cot", k) for k in exemplars)]:
        shots = load_shots(shots_from or setup.settings["data"], k, seed, setup.problems)
        changes = {"prompt": prompt, "shots": shots, "temperature": 0.0}
        label = f"{prompt} after {k} solved" if k else prompt
        longest = max(map(len, eval.prompt_tokens(setup, **changes)))
        if longest + setup.options["max_new_tokens"] > setup.config.max_context:
            say(f"{label} is left out: {longest} tokens leave no room for an answer in the context "
                f"of {setup.config.max_context}")
            continue
        records, settings = eval.collect_records(setup, f"{prompt}-{k}", **changes)
        row = eval.summarize(records, method="greedy", **settings)
        results.append((label, row, scores_of(records, row["grade"])))
    eval.print_table(results)
    return [row for _, row, _ in results]


def confidence_of(sample, vote):
    """Log-probabilities of a sample, total and mean; of none without an answer, never the best."""
    total = -math.inf if vote is None else sample["logprob"]
    return {"total": total, "mean": total / sample["tokens"]}


def vote_methods(records, pairs, grade, ks, confidence):
    """Yields (method, score of each problem, samples drawn of each problem), from one pool.

    pairs: (votes, right) of each problem. The total log-probability favours short samples.
    """
    n = len(records)
    correct = [[s[grade] is True for s in r["samples"]] for r in records]
    sure = [list(map(confidence_of, r["samples"], votes)) for r, (votes, _) in zip(records, pairs)]
    yield "one sample", scores_of(records, grade), [1] * n
    for k in ks:
        yield f"majority of {k}", [maj_at_k(*pair, k) for pair in pairs], [k] * n
    for k in ks:
        scores = [weighted_maj_at_k(*pair, [math.exp(c["mean"]) for c in mine], k)
                  for pair, mine in zip(pairs, sure)]
        yield f"majority of {k}, weighted", scores, [k] * n
    for name in ("mean", "total"):
        for k in ks:
            scores = [best_of_k([c[name] for c in mine], r, k) for mine, r in zip(sure, correct)]
            yield f"best of {k} by {name} log-probability", scores, [k] * n
    for name, level in ((f"{confidence:g} sure", confidence), ("outcome fixed", None)):
        found = [adaptive(*pair, level, seed=i) for i, pair in enumerate(pairs)]
        yield f"adaptive majority, {name}", [s for s, _ in found], [used for _, used in found]
    for k in sorted({1, *ks}):
        scores = [pass_at_k(len(mine), sum(mine), k) for mine in correct]
        yield f"pass@{k} (a bound)", scores, [k] * n


def self_consistency(records, settings, ks, confidence):
    """Rows of one sample, of votes (plain, weighted, adaptive), of the best of k, and of pass@k."""
    pairs = [votes_of(r, settings["grade"]) for r in records]
    results = []
    notes = []
    for method, scores, drawn in vote_methods(records, pairs, settings["grade"], ks,
                                               confidence):
        row = eval.cost_row(records, scores, drawn, method=method, **settings)
        results.append((method, row, scores))
        if method.startswith("adaptive"):
            by_level = eval.rates_by("level", records, scores, drawn)
            row["samples_by_level"] = {level: mean for level, (*_, mean) in by_level.items()}
            levels = [f"{level}: {mean:.1f}" for level, mean in row["samples_by_level"].items()]
            notes.append(f"{method}: {row['samples']:.1f} samples of {settings['num_samples']}; "
                         f"by level {', '.join(levels) or '-'}\n")
    eval.print_table(results)
    say("".join(notes))
    say(abstentions(pairs))
    return [row for _, row, _ in results]


def abstentions(pairs):
    """A table of the vote of all samples, when it answers only if its leader has a large share.

    pairs: (votes, right) of each problem.
    """
    lines = []
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        scores = [vote_once(votes, right) for votes, right in pairs
                  if max(count_votes(votes).values(), default=0) >= max(1, share * len(votes))]
        lines.append([f"{share:g}", percent(len(scores) / len(pairs)),
                      percent(*interval(scores)) if scores else "-"])
    return eval.markdown(["leader's share of the votes", "coverage, %",
                          "accuracy where it answers, % [95 %]"], lines)


def sweep_temperature(pools, ks, plot=None):
    """Rows of votes at each temperature, and which temperature is best.

    pools: {temperature: (records, settings)}. ks: numbers of votes. plot: a PNG file or None.
    """
    results = []
    scores = {k: {} for k in sorted({1, *ks})}  # {votes: {temperature: score of each problem}}
    for temperature, (records, settings) in sorted(pools.items()):
        pairs = [votes_of(r, settings["grade"]) for r in records]
        distinct = fmean(len(set(votes) - {None}) for votes, _ in pairs)
        silent = fmean(vote is None for votes, _ in pairs for vote in votes)
        say(f"temperature {temperature:g}: {distinct:.1f} distinct answers of "
            f"{settings['num_samples']}, no answer {percent(silent)} %")
        for k in scores:
            scores[k][temperature] = [maj_at_k(*pair, k) for pair in pairs]
            row = eval.cost_row(records, scores[k][temperature], [k] * len(records),
                                method=f"majority of {k}" if k > 1 else "one sample",
                                distinct=distinct, no_answer=silent, **settings)
            results.append((f"{row['method']} at {temperature:g}", row, scores[k][temperature]))
    eval.print_table(results)
    for k, mine in scores.items():
        say(f"votes {k}: {sweet_spot(mine)}")
    if plot:
        plot_heat(scores, plot)
    return [row for _, row, _ in results]


def sweet_spot(scores):
    """The best of several settings {setting: scores of the same problems}, in words.

    It is chosen on one half of the problems and measured on the other, both ways: measured where
    it was chosen, it would flatter itself.
    """
    def best_on(part):
        return max(scores, key=lambda setting: fmean(scores[setting][part]))

    best = best_on(slice(None))
    even, odd = slice(0, None, 2), slice(1, None, 2)
    fair = scores[best_on(even)][odd] + scores[best_on(odd)][even]
    equals = [f"{t:g}" for t in scores if paired_bootstrap(scores[t], scores[best])[1] <= 0]
    return (f"best {best:g} with {percent(*interval(scores[best]))} %, {percent(*interval(fair))} "
            f"when chosen on other problems; not told apart from it: {', '.join(equals)}")


def plot_heat(scores, path):
    """Draws mean scores as a PNG: {number of votes: {temperature: score of each problem}}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"{path} is not drawn: pip install matplotlib")
    temperatures = list(scores[1])
    heat = [[fmean(column[t]) for column in scores.values()] for t in temperatures]
    figure = Figure((2 + len(scores), 1.5 + 0.5 * len(heat)), dpi=150)
    axes = figure.subplots()
    axes.imshow(heat, aspect="auto", cmap="YlGn")
    axes.set(xlabel="votes", xticks=range(len(scores)), xticklabels=list(scores),
             ylabel="temperature", yticks=range(len(heat)), yticklabels=temperatures)
    for i, row in enumerate(heat):
        for j, value in enumerate(row):
            axes.text(j, i, percent(value), ha="center", va="center")
    figure.savefig(path, bbox_inches="tight")


def sweep_budget(setup, budgets=None):
    """Rows of greedy answers of any length of thought, and closed after so many tokens."""
    usual = TINY_BUDGETS if is_tiny(setup.config) else OTHER_BUDGETS
    budgets = sorted(set(budgets or usual))
    results = []
    texts = {}
    for budget in [0, *budgets]:
        records, settings = eval.collect_records(setup, f"budget-{budget}", temperature=0.0,
                                                 think_budget=budget)
        method = f"thought of {f'at most {budget} tokens' if budget else 'any length'}"
        texts[budget] = [r["samples"][0]["text"] for r in records]
        cut = fmean(a != b for a, b in zip(texts[budget], texts[0]))
        row = eval.summarize(records, method=method, cut=cut, **settings)
        results.append((f"{method} ({percent(cut)} % cut)", row,
                        scores_of(records, settings["grade"])))
    eval.print_table(results)
    for level in results[0][1]["levels"]:
        members = [i for i, p in enumerate(setup.problems) if str(p.get("level")) == level]
        free, *closed = ([scores[i] for i in members] for _, _, scores in results)
        enough = [b for b, mine in zip(budgets, closed) if paired_bootstrap(mine, free)[1] <= 0]
        verdict = "every budget tried costs accuracy"
        if enough:
            verdict = f"{enough[0]} tokens of thought are not told apart from any length"
        say(f"level {level}: {verdict}")
    return [row for _, row, _ in results]


def main(args):
    ks = choose_votes(args.votes, args.num_samples)
    setup = eval.load_setup(args)

    @functools.cache
    def pool(temperature):
        return eval.collect_records(setup, f"temperature-{temperature:g}", temperature=temperature,
                                    num_samples=args.num_samples)

    for name in args.experiments:
        if name == "prompts":
            rows = compare_prompts(setup, args.exemplars, args.shots_from, args.data_seed)
        elif name == "consistency":
            rows = self_consistency(*pool(args.temperature), ks, args.confidence)
        elif name == "temperature":
            plot = args.plot if rank_and_world()[0] == 0 else None
            rows = sweep_temperature({t: pool(t) for t in args.temperatures}, ks, plot)
        else:
            rows = sweep_budget(setup, args.budgets)
        for row in rows:
            eval.append_row(args.results, row)


if __name__ == "__main__":
    run_main(main, parse_args)
