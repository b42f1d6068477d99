"""What more tokens at inference buy: chain of thought, self-consistency, temperature, a budget for thinking.

    python infer_scale.py                                               # everything, on the embedded tiny model
    python infer_scale.py --experiments consistency --model qwen2.5-1.5b-instruct --data gsm8k --limit 200
    python infer_scale.py --experiments temperature --split dev --plot heat.png

One pool of N samples a problem serves every vote of k <= N: maj@k and best-of-k are means over all subsets of k, so
that no row owes anything to the order of the samples. Every row says how many tokens it wrote; compare rows of equal cost.

Chain of thought: Wei et al. 2022, arXiv:2201.11903; zero-shot: Kojima et al. 2022, arXiv:2205.11916. Self-consistency:
Wang et al. 2022, arXiv:2203.11171; adaptive: Aggarwal et al. 2023, arXiv:2305.11860; weighted by confidence: Taubenfeld
et al. 2025, arXiv:2502.06233. Closing a thought: Muennighoff et al. 2025 (s1), arXiv:2501.19393.
"""

import argparse
import functools
import math
import random
import statistics
import sys
from collections import Counter

from eval import (SAMPLING_TEMPERATURE, add_eval_flags, against, append_row, interval, is_tiny, load_shots,
                  maj_at_k, majority_vote, markdown, measure, open_run, paired_bootstrap, pass_at_k, percent,  # noqa: F401
                  print_settings, prompt_tokens, rated, score_row, scores_of, settings_of, summarize, votes_of)

EXPERIMENTS = ("prompts", "consistency", "temperature", "budget")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_eval_flags(p, temperature=SAMPLING_TEMPERATURE)
    p.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    p.add_argument("--num-samples", type=int, default=20, help="size of the pool of samples per problem")
    p.add_argument("--votes", type=int, nargs="+", help="numbers of votes (default: 5, 10, 20, as the pool allows)")
    p.add_argument("--exemplars", type=int, nargs="+", default=(1, 2, 4, 8), help="numbers of solved problems shown")
    p.add_argument("--temperatures", type=float, nargs="+", default=(0.4, 0.7, 1.0, 1.3))
    p.add_argument("--budgets", type=int, nargs="+",
                   help="tokens of thought allowed; default: 1 8 16 24 32 48 for a tiny model, else 64 256 512")
    p.add_argument("--confidence", type=float, default=0.95, help="at which an adaptive vote stops sampling")
    p.add_argument("--plot", help="a PNG file for the heat map of temperature and votes")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------ votes


def best_of_k(confidences, right, k):
    """Mean success of taking the most confident of k samples, over all subsets of k."""
    n, order = len(right), sorted(range(len(right)), key=lambda i: -confidences[i])
    return sum(right[i] * math.comb(n - 1 - rank, k - 1) for rank, i in enumerate(order)) / math.comb(n, k)


def vote_once(votes, right, weights=None):
    """Success of one vote: 1, 0, or a share when right and wrong classes are level."""
    totals = Counter()
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote is not None:
            totals[vote] += weight
    leaders = [vote for vote in totals if totals[vote] == max(totals.values())]
    return sum(vote in right for vote in leaders) / len(leaders) if leaders else 0.0


def weighted_maj_at_k(votes, right, weights, k, draws=100, seed=0):
    """Mean success of a weighted vote over random subsets of k samples (over the only one, when there are k)."""
    if k == len(votes):
        return vote_once(votes, right, weights)
    rng, total = random.Random(seed), 0.0
    for _ in range(draws):
        chosen = rng.sample(range(len(votes)), k)
        total += vote_once([votes[i] for i in chosen], right, [weights[i] for i in chosen])
    return total / draws


def leads(first, second):
    """Chance that the class with `first` votes is the more frequent one than that with `second`, under a flat prior.

    That a Beta(first + 1, second + 1) variable exceeds 1/2, which is a tail of Binomial(first + second + 1, 1/2).
    """
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


def samples_until_decided(votes, confidence=None):
    """How many of the votes, read in order, it takes until the leader is decided.

    confidence: it is the more frequent class with this probability; None: the votes left cannot change the outcome.
    """
    counts = Counter()
    for used, vote in enumerate(votes, 1):
        counts[vote] += vote is not None
        (_, first), (_, second) = [*counts.most_common(2), (None, 0), (None, 0)][:2]
        if leads(first, second) >= confidence if confidence else first > second + len(votes) - used:
            break
    return used


def adaptive(votes, right, confidence, orders=20, seed=0):
    """(success, samples used) of the adaptive vote, means over random orders of the pool."""
    rng, success, used = random.Random(seed), [], []
    for _ in range(orders):
        order = rng.sample(votes, len(votes))
        used.append(samples_until_decided(order, confidence))
        success.append(vote_once(order[:used[-1]], right))
    return statistics.fmean(success), statistics.fmean(used)


# ------------------------------------------------------------------------------------ chain of thought


def compare_prompts(run, args):
    """Chain-of-thought ablation, greedy: the answer at once, zero-shot, and after 1 to 8 solved problems."""
    rows, lines, baseline = [], [], None
    at_once = "plain" if is_tiny(run.config) else "direct"  # the tiny model does not know what "only" means
    for prompt, k in [(at_once, 0), ("cot", 0), *(("cot", k) for k in args.exemplars)]:
        shots = load_shots(args, run.settings["data"], run.problems, k)
        changes = {"prompt": prompt, "shots": shots, "temperature": 0.0}
        name = prompt + (f" after {k} solved problem{'s' * (k > 1)}" if k else "")
        longest = max(map(len, prompt_tokens(run._replace(ask=run.ask | changes))))
        if longest + run.ask["max_new_tokens"] > run.config.max_context:
            print(f"{name} is left out: {longest} tokens leave too little of the context of {run.config.max_context}")
            continue
        records, settings = measure(run, f"{prompt}-{k}", **changes)
        row, scores = summarize(records, method="greedy", **settings), scores_of(records, settings["grade"])
        baseline = baseline or scores
        rows.append(row)
        lines.append([name, percent(*row["strict"]), percent(*row["lenient"]), against(scores, baseline),
                      f"{row['tokens_mean']:.0f}", f"{row['seconds']:.1f}"])
    print(markdown(["prompt", "strict, % [95 %]", "lenient", f"points over {at_once}", "tokens", "seconds"], lines))
    return rows


# ------------------------------------------------------------------------------------ self-consistency


def votes_asked(args):
    return sorted(args.votes or [k for k in (5, 10, 20) if k <= args.num_samples])


def self_consistency(records, settings, args):
    """One sample, votes (plain, weighted, adaptive, abstaining), best of N by log-probability, pass@k; from one pool."""
    grade, N = settings["grade"], len(records[0]["samples"])
    rows, lines, ks = [], [], votes_asked(args)
    votes, right = zip(*[votes_of(r, grade) for r in records])
    correct = [[s[grade] is True for s in r["samples"]] for r in records]
    tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
    seconds = sum(r["seconds"] for r in records) / N
    # the total favours short samples, the mean does not; one without an answer is never taken
    total = [[s["logprob"] if v is not None else -math.inf for s, v in zip(r["samples"], mine)]
             for r, mine in zip(records, votes)]
    mean = [[x / s["tokens"] for s, x in zip(r["samples"], xs)] for r, xs in zip(records, total)]
    single = [statistics.fmean(c) for c in correct]

    def add(method, scores, samples, **extra):
        """A row; samples: how many it draws for every problem, or a list with the number for each."""
        drawn = samples if isinstance(samples, list) else [samples] * len(records)
        row = score_row(records, scores, [t * n for t, n in zip(tokens, drawn)], method=method, **settings)
        row |= {"samples": statistics.fmean(drawn), "seconds": seconds * statistics.fmean(drawn)} | extra
        rows.append(row)
        lines.append([method, rated(row), against(scores, single), f"{row['samples']:.1f}", f"{row['tokens_mean']:.0f}"])

    add("one sample", single, 1)
    for k in ks:
        add(f"majority of {k}", [maj_at_k(v, r, k) for v, r in zip(votes, right)], k)
    for k in ks:
        weighted = [weighted_maj_at_k(v, r, [math.exp(x) for x in m], k) for v, r, m in zip(votes, right, mean)]
        add(f"majority of {k}, weighted", weighted, k)
    for name, scores in (("mean", mean), ("total", total)):
        for k in ks:
            add(f"best of {k} by {name} log-probability", [best_of_k(s, c, k) for s, c in zip(scores, correct)], k)
    for name, confidence in ((f"{args.confidence:g} sure", args.confidence), ("outcome fixed", None)):
        success, used = zip(*[adaptive(v, r, confidence, seed=i) for i, (v, r) in enumerate(zip(votes, right))])
        levels = sorted({r["level"] for r in records if r["level"] is not None})
        drawn = {str(k): statistics.fmean(u for u, r in zip(used, records) if r["level"] == k) for k in levels}
        add(f"adaptive majority, {name}", list(success), list(used), samples_by_level=drawn)
    for k in [1, *ks]:
        add(f"pass@{k} (a bound)", [pass_at_k(N, sum(c), k) for c in correct], k)
    print(markdown(["method", "accuracy, % [95 %]", "points over one sample", "samples", "tokens"], lines))
    for row in rows:
        if "samples_by_level" in row:
            by_level = ", ".join(f"{level}: {n:.1f}" for level, n in row["samples_by_level"].items())
            print(f"{row['method']}: saves {N - row['samples']:.1f} of {N} samples; drawn by level: {by_level or '-'}")
    print("\n" + abstentions(votes, right))
    return rows


def abstentions(votes, right):
    """A table of what the vote of all samples is worth when it answers only if the leader holds a share of them."""
    lines = []
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        needed = [max(1, share * len(v)) for v in votes]
        leads_with = [max(Counter(x for x in v if x is not None).values(), default=0) for v in votes]
        scores = [vote_once(v, r) for v, r, n, most in zip(votes, right, needed, leads_with) if most >= n]
        lines.append([f"{share:g}", percent(len(scores) / len(votes)), percent(*interval(scores)) if scores else "-"])
    return markdown(["leader's share of the votes", "coverage, %", "accuracy where it answers, % [95 %]"], lines)


# ------------------------------------------------------------------------------------ temperature


def sweep_temperature(pools, args):
    """Accuracy of votes at each temperature, how diverse the answers are, and the sweet spot."""
    ks, rows, lines, scores = [1, *votes_asked(args)], [], [], {}
    for temperature, (records, settings) in sorted(pools.items()):
        votes, right = zip(*[votes_of(r, settings["grade"]) for r in records])
        scores[temperature] = {k: [maj_at_k(v, r, k) for v, r in zip(votes, right)] for k in ks}
        spread = {"distinct": statistics.fmean(len(set(v) - {None}) for v in votes),
                  "no_answer": statistics.fmean(x is None for v in votes for x in v)}
        tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
        seconds = sum(r["seconds"] for r in records) / args.num_samples
        for k, mine in scores[temperature].items():
            method = f"majority of {k}" if k > 1 else "one sample"
            rows.append(score_row(records, mine, [k * t for t in tokens], method=method, samples=k,
                                  seconds=k * seconds, **spread, **settings))
        lines.append([f"{temperature:g}", *map(rated, rows[-len(ks):]), f"{spread['distinct']:.1f}",
                      percent(spread["no_answer"]), f"{statistics.fmean(tokens):.0f}"])
    print(markdown(["temperature", "one sample, % [95 %]", *(f"majority of {k}" for k in ks[1:]),
                    f"distinct answers of {args.num_samples}", "no answer, %", "tokens"], lines))
    for k in ks:
        print(f"votes {k}: " + sweet_spot({t: scores[t][k] for t in scores}))
    if args.plot:
        plot_heat({t: [statistics.fmean(s) for s in scores[t].values()] for t in scores}, ks, args.plot)
    return rows


def sweet_spot(scores):
    """The best of several settings {setting: scores of the same problems}, and how sure that is, in words.

    Chosen on one half of the problems and measured on the other, both ways: on the same problems the choice would
    flatter itself.
    """
    best_on = lambda part: max(scores, key=lambda t: statistics.fmean(scores[t][part]))
    best, halves = best_on(slice(None)), (slice(0, None, 2), slice(1, None, 2))
    equals = [t for t in scores if paired_bootstrap(scores[t], scores[best])[1] <= 0]
    fair = scores[best_on(halves[0])][halves[1]] + scores[best_on(halves[1])][halves[0]]
    return (f"best {best:g} with {percent(*interval(scores[best]))} %; {percent(*interval(fair))} % when chosen on "
            f"other problems; not told apart from it: {', '.join(f'{t:g}' for t in equals)}")


def plot_heat(accuracy, ks, path):
    """A PNG: accuracy {temperature: [one for each of ks]} as a heat map."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure((2 + len(ks), 1.5 + 0.5 * len(accuracy)), dpi=150)
    axes = figure.subplots()
    axes.imshow(list(accuracy.values()), aspect="auto", cmap="YlGn")
    axes.set(xlabel="votes", ylabel="temperature", xticks=range(len(ks)), xticklabels=ks, yticks=range(len(accuracy)),
             yticklabels=[f"{t:g}" for t in accuracy])
    for i, row in enumerate(accuracy.values()):
        for j, value in enumerate(row):
            axes.text(j, i, percent(value), ha="center", va="center")
    figure.savefig(path, bbox_inches="tight")


# ------------------------------------------------------------------------------------ thinking budget


def sweep_budget(run, args):
    """Greedy accuracy, per level, when the thinking block is closed after so many tokens; the last row lets it run."""
    rows, scores, texts = [], {}, {}
    usual = (1, 8, 16, 24, 32, 48) if is_tiny(run.config) else (64, 256, 512)
    for budget in [*sorted(set(args.budgets or usual) - {0}), 0]:
        records, settings = measure(run, f"budget-{budget}", temperature=0.0, think_budget=budget)
        method = f"thought of at most {budget} tokens" if budget else "thought of any length"
        row = summarize(records, method=method, **settings)
        scores[budget], texts[budget] = scores_of(records, row["grade"]), [r["samples"][0]["text"] for r in records]
        rows.append(row)
    cut = {b: statistics.fmean(text != whole for text, whole in zip(texts[b], texts[0])) for b in texts}
    levels = list(rows[-1]["levels"])
    print(markdown(["method", "cut, %", "accuracy, % [95 %]", *(f"level {level}" for level in levels), "tokens"],
                   [[row["method"], percent(share), rated(row), *(percent(row["levels"][k][0]) for k in levels),
                     f"{row['tokens_mean']:.0f}"] for row, share in zip(rows, cut.values())]))
    for level in levels:
        mine = {b: [x for x, p in zip(s, run.problems) if str(p.get("level")) == level] for b, s in scores.items()}
        enough = next(b for b, s in mine.items() if paired_bootstrap(s, mine[0])[1] <= 0)
        print(f"level {level}: " + (f"{enough} tokens of thought are not told apart from any length" if enough else
                                    "every budget tried costs accuracy"))
    print()
    return rows


# ------------------------------------------------------------------------------------ main


def main(args):
    if not all(1 <= k <= args.num_samples for k in votes_asked(args)):
        raise ValueError(f"--votes {max(args.votes)} of a pool of {args.num_samples} samples; raise --num-samples")
    if not 0.5 < args.confidence < 1:
        raise ValueError(f"--confidence is {args.confidence:g}, expected more than 0.5 and less than 1")
    run = open_run(args, tiny_prompt="cot")
    print_settings(settings_of(run, num_samples=args.num_samples))

    @functools.cache
    def pool(temperature):
        return measure(run, f"temperature-{temperature:g}", temperature=temperature, num_samples=args.num_samples)

    experiments = {"prompts": lambda: compare_prompts(run, args),
                   "consistency": lambda: self_consistency(*pool(args.temperature), args),
                   "temperature": lambda: sweep_temperature({t: pool(t) for t in args.temperatures}, args),
                   "budget": lambda: sweep_budget(run, args)}
    for name, experiment in experiments.items():
        for row in experiment() if name in args.experiments else ():
            append_row(args.results, row)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"infer_scale.py: {error}", file=sys.stderr)
        sys.exit(2)
