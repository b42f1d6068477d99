"""What more tokens at inference buy: chain of thought, self-consistency, temperature, a budget for thinking.

    python infer_scale.py                                               # everything, on the embedded tiny model
    python infer_scale.py --experiments consistency --model qwen2.5-1.5b-instruct --data gsm8k --limit 200
    python infer_scale.py --experiments temperature --split dev --plot heat.png

Chain of thought: Wei et al. 2022, arXiv:2201.11903; zero-shot: Kojima et al. 2022, arXiv:2205.11916. Self-consistency: Wang et al.
2022, arXiv:2203.11171; adaptive: Aggarwal et al. 2023, arXiv:2305.11860; weighted by confidence: Taubenfeld et al. 2025,
arXiv:2502.06233. Forcing the end of a thought: Muennighoff et al. 2025 (s1), arXiv:2501.19393.

One pool of N samples a problem serves every vote of k <= N: maj@k and best-of-k are means over all subsets of k, so that no row owes
anything to the order of the samples. Every row says what it cost in tokens per problem; compare rows of equal cost.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from eval import (PRESETS, add_eval_flags, append_row, end_tokens, interval, load_shots, maj_at_k, majority_vote,  # noqa: F401
                  markdown, measure, open_run, paired_bootstrap, pass_at_k, percent, print_settings, render_prompt, score_row,
                  scores_of, settings_of, summarize, votes_of)
from generate import generate
from verify import verify_many

EXPERIMENTS = ("prompts", "consistency", "temperature", "budget")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_eval_flags(p, temperature=0.7)
    p.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    p.add_argument("--num-samples", type=int, default=20, help="size of the pool of samples per problem")
    p.add_argument("--votes", type=int, nargs="+", default=(5, 10, 20), help="numbers of votes, at most --num-samples")
    p.add_argument("--exemplars", type=int, nargs="+", default=(1, 2, 4, 8), help="numbers of solved problems, for the prompts")
    p.add_argument("--temperatures", type=float, nargs="+", default=(0.4, 0.7, 1.0, 1.3), help="of the sweep")
    p.add_argument("--budgets", type=int, nargs="+", default=(0, 8, 16, 24, 32, 48), help="tokens of thought allowed, of the sweep")
    p.add_argument("--confidence", type=float, default=0.95, help="at which an adaptive vote stops sampling")
    p.add_argument("--records", help="directory that keeps the pools; an interrupted run goes on from them")
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

    Of a Beta(first + 1, second + 1) variable to exceed 1/2, which is a binomial tail: P(Binomial(first + second + 1, 1/2) <= first).
    """
    n = first + second + 1
    return sum(math.comb(n, i) for i in range(first + 1)) / 2**n


def samples_until_decided(votes, confidence=None):
    """How many of the votes, read in order, it takes until the leader is decided.

    confidence: stop when it is the more frequent class with this probability; None: when the votes left cannot change the outcome.
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


# ------------------------------------------------------------------------------------ experiments


def against(scores, baseline):
    """How many points over the baseline, problem by problem, as text."""
    change, low, high = paired_bootstrap(baseline, scores)
    return f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def compare_prompts(run, args):
    """Chain-of-thought ablation, greedy: the answer at once, zero-shot, and after 1 to 8 solved problems."""
    rows, lines, baseline = [], [], None
    cases = [("direct", 0), ("plain", 0), ("cot", 0)] + [("cot", k) for k in args.exemplars]
    for prompt, k in cases:
        shots = load_shots(args, run.settings["data"], run.problems, k)
        longest = max(len(run.tokenizer.encode(render_prompt(prompt, p, system=run.ask["system"], shots=shots)).ids) for p in run.problems)
        if longest + run.ask["max_new_tokens"] > run.config.max_context:
            print(f"{prompt} after {k} solved problems is left out: {longest} tokens of prompt leave too little of the context of {run.config.max_context}")
            continue
        records, settings = measure(run, prompt=prompt, shots=shots, temperature=0.0)
        row = summarize(records, method="greedy", **settings)
        scores = scores_of(records, "strict")
        baseline = baseline or scores
        rows.append(row)
        lines.append([f"{prompt}, {k} solved problems", percent(*row["strict"]), percent(*row["lenient"]), against(scores, baseline),
                      f"{row['tokens_mean']:.0f}", f"{row['seconds']:.1f}"])
    print(markdown(["prompt", "strict, % [95 %]", "lenient", "points over direct", "tokens", "seconds"], lines))
    return rows


def self_consistency(records, settings, args):
    """One sample, majority votes, weighted and adaptive votes, best of N by log-probability, abstention, pass@k; from one pool."""
    grade = PRESETS[settings["prompt"]].grade
    N, rows, lines = args.num_samples, [], []
    ks = [k for k in args.votes if k <= N]
    votes, right = zip(*[votes_of(r, grade) for r in records])
    tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
    seconds = sum(r["seconds"] for r in records) / N
    correct = [[s[grade] is True for s in r["samples"]] for r in records]
    # the sum favours short answers, the mean does not; a sample without an answer is never taken
    total = [[s["logprob"] if v is not None else -math.inf for s, v in zip(r["samples"], vs)] for r, vs in zip(records, votes)]
    mean = [[x / s["tokens"] for s, x in zip(r["samples"], xs)] for r, xs in zip(records, total)]
    single = [statistics.fmean(c) for c in correct]

    def add(method, scores, samples, **extra):
        """A row; samples: how many it takes per problem, a number or one for each problem."""
        each = samples if isinstance(samples, list) else [samples] * len(records)
        row = score_row(records, scores, [t * s for t, s in zip(tokens, each)], method=method, grade=grade, **settings)
        row |= {"samples": statistics.fmean(each), "seconds": seconds * statistics.fmean(each)} | extra
        rows.append(row)
        lines.append([method, percent(row["accuracy"], row["low"], row["high"]), against(scores, single), f"{row['samples']:.1f}",
                      f"{row['tokens_mean']:.0f}"])

    add("one sample", single, 1)
    for k in ks:
        add(f"majority of {k}", [maj_at_k(v, r, k) for v, r in zip(votes, right)], k)
    for k in ks:
        add(f"majority of {k}, weighted", [weighted_maj_at_k(v, r, [math.exp(x) for x in m], k) for v, r, m in zip(votes, right, mean)], k)
    for k in ks:
        add(f"best of {k} by mean log-probability", [best_of_k(m, c, k) for m, c in zip(mean, correct)], k)
    for k in ks:
        add(f"best of {k} by total log-probability", [best_of_k(t, c, k) for t, c in zip(total, correct)], k)
    for name, confidence in ((f"adaptive majority, {args.confidence:g} sure", args.confidence), ("adaptive majority, outcome fixed", None)):
        scores, used = zip(*[adaptive(v, r, confidence, seed=i) for i, (v, r) in enumerate(zip(votes, right))])
        by_level = {}
        for r, u in zip(records, used):
            by_level.setdefault(str(r["level"]), []).append(u)
        add(name, list(scores), list(used), samples_saved=N - statistics.fmean(used),
            samples_by_level={k: statistics.fmean(by_level[k]) for k in sorted(by_level)})
    for k in [1, *ks]:
        add(f"pass@{k} (a bound: needs to know which is right)", [pass_at_k(N, sum(c), k) for c in correct], k)
    print(markdown(["method", "accuracy, % [95 %]", "points over one sample", "samples", "tokens"], lines))
    for row in rows:
        if "samples_saved" in row:
            print(f"{row['method']}: saves {row['samples_saved']:.1f} of {N} samples; by level it draws "
                  + ", ".join(f"{k}: {v:.1f}" for k, v in row["samples_by_level"].items()))
    abstain(records, votes, right, N)
    return rows


def abstain(records, votes, right, N):
    """Prints what a vote of all samples is worth when it answers only if the leader holds a share of them."""
    lines = []
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        scores = [vote_once(v, r) for v, r in zip(votes, right)
                  if max(Counter(x for x in v if x is not None).values(), default=0) >= max(share * N, 1)]
        lines.append([f"{share:g}", percent(len(scores) / len(records)), percent(*interval(scores)) if scores else "-"])
    print(markdown([f"leader's share of {N} votes, at least", "coverage, %", "accuracy where it answers, % [95 %]"], lines))


def sweep_temperature(pools, args):
    """Accuracy of votes at each temperature, how diverse the answers are, and the sweet spot."""
    ks, rows, lines, scores = [k for k in args.votes if k <= args.num_samples], [], [], {}
    for temperature, (records, settings) in sorted(pools.items()):
        grade = PRESETS[settings["prompt"]].grade
        votes, right = zip(*[votes_of(r, grade) for r in records])
        scores[temperature] = {1: scores_of(records, grade)} | {k: [maj_at_k(v, r, k) for v, r in zip(votes, right)] for k in ks}
        distinct = statistics.fmean(len({v for v in vs if v is not None}) for vs in votes)
        silent = statistics.fmean(v is None for vs in votes for v in vs)
        tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
        seconds = sum(r["seconds"] for r in records) / args.num_samples
        for k, mine in scores[temperature].items():
            rows.append(score_row(records, mine, [k * t for t in tokens], method=f"majority of {k}" if k > 1 else "one sample", grade=grade,
                                  distinct=distinct, no_answer=silent, seconds=k * seconds, samples=k, **settings))
        lines.append([f"{temperature:g}", *(percent(*interval(mine)) for mine in scores[temperature].values()), f"{distinct:.1f}",
                      percent(silent), f"{statistics.fmean(tokens):.0f}"])
    print(markdown(["temperature", "one sample, % [95 %]", *(f"majority of {k}" for k in ks), f"distinct answers of {args.num_samples}",
                    "no answer, %", "tokens"], lines))
    for k in [1, *ks]:
        by_t = {t: scores[t][k] for t in scores}
        best = max(by_t, key=lambda t: statistics.fmean(by_t[t]))
        level = [t for t in by_t if paired_bootstrap(by_t[t], by_t[best])[1] <= 0]  # as good, as far as these problems can tell
        # chosen on one half of the problems and measured on the other, or the choice would flatter itself
        fair = []
        for half in (0, 1):
            chosen = max(by_t, key=lambda t: statistics.fmean(by_t[t][half::2]))
            fair += by_t[chosen][1 - half::2]
        print(f"votes {k}: best at temperature {best:g}, {percent(*interval(by_t[best]))} %; not told apart from it: "
              f"{', '.join(f'{t:g}' for t in level)}; chosen on half of the problems and measured on the other half: {percent(*interval(fair))} %")
    if args.plot:
        plot_heat({t: [statistics.fmean(s) for s in scores[t].values()] for t in scores}, [1, *ks], args.plot)
    return rows


def plot_heat(accuracy, ks, path):
    """Accuracy by temperature (rows) and votes (columns) as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure((1.5 + len(ks), 1.5 + 0.5 * len(accuracy)), dpi=150)
    axes = figure.subplots()
    axes.imshow(list(accuracy.values()), aspect="auto", cmap="viridis")
    axes.set(xlabel="votes", ylabel="temperature", xticks=range(len(ks)), xticklabels=ks, yticks=range(len(accuracy)),
             yticklabels=[f"{t:g}" for t in accuracy])
    for i, row in enumerate(accuracy.values()):
        for j, value in enumerate(row):
            axes.text(j, i, percent(value), ha="center", va="center", color="white")
    figure.savefig(path, bbox_inches="tight")


def thought_length(tokenizer, tokens, tag):
    """Tokens up to the end of the thinking block; all of them when there is no block, or it never ends."""
    if f"<{tag}>" not in tokenizer.decode(tokens, skip_special_tokens=False):
        return len(tokens)
    low, high = 0, len(tokens)
    while low < high:  # the fewest tokens whose text holds the closing tag, by bisection
        middle = (low + high) // 2
        low, high = (low, middle) if f"</{tag}>" in tokenizer.decode(tokens[:middle], skip_special_tokens=False) else (middle + 1, high)
    return low


def force_end(text, tag):
    """What is written behind a thought that was cut, so that the answer comes next."""
    newline = "\n" if text and not text.endswith("\n") else ""
    return newline + (f"</{tag}>\n" if f"<{tag}>" in text else "") + "\\boxed{"


def sweep_budget(run, args):
    """Greedy accuracy, per level, when a thought is cut after so many tokens and the answer is then forced (s1's budget forcing).

    One full run serves every budget, since what is greedy up to the cut is the same. Where a model writes no thinking block, its whole
    text is what is cut.
    """
    ask, tag, ends = run.ask, run.ask["think_tag"], end_tokens(run.tokenizer, run.config)
    encode = lambda text: run.tokenizer.encode(text, add_special_tokens=False).ids
    decode = lambda tokens: run.tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=False)
    texts = [render_prompt(ask["prompt"], p, system=ask["system"], shots=ask["shots"], think_tag=tag) for p in run.problems]
    prompts = [encode(text) for text in texts]
    options = {"temperature": 0.0, "stop_tokens": ends, "max_batch": ask["max_batch"]}
    full = [row[0].tokens for row in generate(run.params, run.config, prompts, max_new_tokens=ask["max_new_tokens"], **options)]
    thoughts = [thought_length(run.tokenizer, tokens, tag) for tokens in full]
    settings = settings_of(run, temperature=0.0)
    references, rows, scores = [p["answer"] for p in run.problems], [], {}
    for budget in [*sorted(args.budgets), None]:
        started = time.perf_counter()
        cut = [i for i, length in enumerate(thoughts) if budget is not None and length > budget]
        replies, tokens = [decode(t) for t in full], [len(t) for t in full]
        if cut:
            forced = {i: force_end(decode(full[i][:budget]), tag) for i in cut}
            ids = {i: full[i][:budget] + encode(forced[i]) for i in cut}
            ended = generate(run.params, run.config, [prompts[i] + ids[i] for i in cut], max_new_tokens=32, **options)
            for i, [end] in zip(cut, ended):
                replies[i], tokens[i] = decode(full[i][:budget]) + forced[i] + decode(end.tokens), len(ids[i]) + len(end.tokens)
        verdicts = verify_many(list(zip(replies, references)), strict=True)
        scores[budget] = [float(v is True) for v in verdicts]
        name = "unlimited" if budget is None else f"at most {budget}"
        rows.append(score_row(run.problems, scores[budget], tokens, method=f"greedy, thought {name}", cut=len(cut) / len(full), grade="strict",
                              seconds=time.perf_counter() - started, **settings))
    levels = list(rows[-1]["levels"])
    print(markdown(["tokens of thought", "cut, %", "accuracy, % [95 %]", *(f"level {level}" for level in levels), "tokens"],
                   [[row["method"].split("thought ")[1], percent(row["cut"]), percent(row["accuracy"], row["low"], row["high"]),
                     *(percent(row["levels"][level][0]) for level in levels), f"{row['tokens_mean']:.0f}"] for row in rows]))
    for level in levels:
        mine = {b: [x for x, p in zip(s, run.problems) if str(p["level"]) == level] for b, s in scores.items()}
        enough = next(b for b, s in mine.items() if paired_bootstrap(s, mine[None])[1] <= 0)
        print(f"level {level}: {'no budget tried' if enough is None else f'{enough} tokens'} cannot be told from unlimited thought")
    return rows


# ------------------------------------------------------------------------------------ main


def main(args):
    if args.num_samples < max(args.votes):
        raise ValueError(f"--votes {max(args.votes)} needs --num-samples of at least that, found {args.num_samples}")
    run, rows, pools = open_run(args, tiny_prompt="cot"), [], {}
    print_settings(settings_of(run, num_samples=args.num_samples))
    wanted = {args.temperature} if "consistency" in args.experiments else set()
    wanted |= set(args.temperatures) if "temperature" in args.experiments else set()
    for temperature in sorted(wanted):
        path = Path(args.records) / f"temperature_{temperature:g}.jsonl" if args.records else None
        pools[temperature] = measure(run, path, temperature=temperature, num_samples=args.num_samples)
    if "prompts" in args.experiments:
        rows += compare_prompts(run, args)
    if "consistency" in args.experiments:
        rows += self_consistency(*pools[args.temperature], args)
    if "temperature" in args.experiments:
        rows += sweep_temperature({t: pools[t] for t in args.temperatures}, args)
    if "budget" in args.experiments:
        rows += sweep_budget(run, args)
    for row in rows:
        append_row(args.results, row)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"infer_scale.py: {error}", file=sys.stderr)
        sys.exit(2)
