"""Accuracy with error bars: any model, any problem set, a named prompt. The table that compares methods, and its plots.

    python eval.py                                                      # the embedded tiny model, 500 unseen problems
    python eval.py --model qwen2.5-1.5b-instruct --data gsm8k           # the boxed protocol behind the published figure
    python eval.py --model qwen2.5-1.5b --data gsm8k --prompt qwen-base-gsm8k
    python eval.py --records a.jsonl; python eval.py --prompt cot --records b.jsonl
    python eval.py --compare a.jsonl b.jsonl                            # the two, problem by problem
    python eval.py --report                                             # one row per method, missing rows are run first

A run under --records is resumable: a line per problem, appended when it is whole. Problems are a sample of all that
could have been asked, so every rate has a 95 % interval over problems, and two runs are compared problem by problem
(Miller 2024, arXiv:2411.00640). pass@k: Chen et al. 2021, arXiv:2107.03374.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import load_problems
from data.prompts import COT, PRESETS, Preset, prompt_hash, render_prompt  # noqa: F401
from generate import add_sampling_flags, generate
from model import load_config, load_params, load_system_prompt, load_tokenizer, resolve_model
from verify import canonical, equivalent, extract_answer, verify_many

ROOT = Path(__file__).resolve().parent
SAMPLING_TEMPERATURE = 0.7  # of every method that samples, so that they compare; chosen on the development split


def add_eval_flags(parser, temperature=0.0):
    """The flags that eval.py, infer_scale.py and refine.py share."""
    parser.add_argument("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    parser.add_argument("--data", help="problem set or .jsonl file; default: arithmetic for a tiny model, else gsm8k")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"), help="choose on dev")
    parser.add_argument("--limit", type=int, default=500, help="problems, a random subset; 0: all there are")
    parser.add_argument("--data-seed", type=int, default=0, help="chooses the subset and the solved examples")
    parser.add_argument("--prompt", choices=PRESETS, help="default: plain for a tiny model, else boxed")
    parser.add_argument("--shots", type=int, help="solved examples in front of a chat prompt; default: the preset's own")
    parser.add_argument("--shots-from", help="problem set whose train split gives them; default: --data")
    parser.add_argument("--grade", choices=("strict", "lenient"), help="which counts, the box only (strict), or also an "
                        "answer in words and the last number; both are measured; default: the preset's own")
    add_sampling_flags(parser, temperature=temperature, max_new_tokens=None)
    parser.set_defaults(max_batch=None)  # a tiny model fills a core only with many rows
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--results", default="results.jsonl", help="the file to which every measured row is appended")
    parser.add_argument("--records", help="directory or .jsonl file of a line per problem; a broken run goes on")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_eval_flags(p)
    p.add_argument("--num-samples", type=int, default=1, help="completions per problem; several need a temperature")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="only compare two files of records")
    p.add_argument("--report", action="store_true", help="the table of all methods for --model, and its plots")
    p.add_argument("--trained", help="checkpoint of the report's GRPO row; default: what grpo.py leaves, run at need")
    p.add_argument("--out", default="runs/report", help="where the report goes")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------ statistics

Z = statistics.NormalDist().inv_cdf(0.975)


def wilson(correct, n):
    """The 95 % interval of a rate (Wilson 1927): every p within 1.96 of its own standard errors of correct / n."""
    if n <= 0:
        return 0.0, 1.0
    rate, spread = correct / n, Z * Z / n
    middle, half = rate + spread / 2, Z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def interval(scores):
    """Mean and 95 % interval over problems of scores in [0, 1].

    Wilson's, for as many problems of yes or no as would give a mean of the same variance. Exactly wilson() when every
    score is 0 or 1. A problem's mean over N samples counts as one observation, not as N.
    """
    n, rate = len(scores), statistics.fmean(scores)
    variance = statistics.fmean((s - rate) ** 2 for s in scores)
    effective = n * rate * (1 - rate) / variance if variance > 1e-12 else n
    return rate, *wilson(rate * effective, effective)


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Mean of b - a over problems and its 95 % interval, resampling problems."""
    change, rng = np.asarray(b, float) - np.asarray(a, float), np.random.default_rng(seed)
    means = [change[rng.integers(0, len(change), (100, len(change)))].mean(1) for _ in range(draws // 100)]
    return float(change.mean()), *(float(q) for q in np.quantile(np.concatenate(means), (0.025, 0.975)))


def mcnemar(only_a, only_b):
    """Exact two-sided p that those which one run alone got right split so, were either as likely (McNemar 1947)."""
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)


def pass_at_k(num_samples, num_correct, k):
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples and a k of at least 1; there are {num_samples}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pool_answers(answers):
    """The class of each answer, one class for equivalent ones; None, no answer, has none.

    >>> pool_answers(["1/2", None, "0.5", "3"])
    [0, None, 0, 1]
    """
    classes, leaders, votes = {}, [], []
    for answer in answers:
        key = None if answer is None else canonical(answer)
        if answer is not None and key not in classes:
            same = (i for i, leader in enumerate(leaders) if equivalent(answer, leader, timeout_s=0.5))
            classes[key] = next(same, len(leaders))
            if classes[key] == len(leaders):
                leaders.append(answer)
        votes.append(classes.get(key))
    return votes


def majority_vote(answers, weights=None):
    """The answer with most votes, as first spelled; of equals, the one that came first; None when nobody votes."""
    votes, totals = pool_answers(answers), {}
    for vote, weight in zip(votes, weights or [1] * len(votes)):
        if vote is not None:
            totals[vote] = totals.get(vote, 0) + weight
    return answers[votes.index(max(totals, key=totals.get))] if totals else None


def maj_at_k(votes, right, k):
    """Mean success of a majority vote over all subsets of k samples; of equals, each has the same chance.

    votes: class of each sample or None; right: the classes that are right. Exact: for each right class and each number
    of votes m that it may win with, counts the ways in which no other class has more and so many have as many.
    """
    counts, silent = Counter(v for v in votes if v is not None), sum(v is None for v in votes)
    success = 0
    for winner in set(right) & set(counts):
        for m in range(1, min(k, counts[winner]) + 1):
            ways = {(k - m, 0): math.comb(counts[winner], m)}  # (samples still to draw, ties) -> number of ways
            for other in (count for c, count in counts.items() if c != winner):
                before, ways = ways, Counter()
                for (left, ties), number in before.items():
                    for drawn in range(min(left, m, other) + 1):
                        ways[left - drawn, ties + (drawn == m)] += number * math.comb(other, drawn)
            success += sum(number * math.comb(silent, left) / (ties + 1) for (left, ties), number in ways.items())
    return success / math.comb(len(votes), k)


# ------------------------------------------------------------------------------------ a run: problems in, records out


def end_tokens(tokenizer, config):
    """The ids that end a completion: those of the model's config, and ChatML's own, which base models do not list."""
    return {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")} - {None} | set(config.eos_token_id)


def completion_text(tokenizer, completion, ends, stop=()):
    """What a completion says, without its end token and from no stop string on."""
    text = tokenizer.decode([t for t in completion.tokens if t not in ends], skip_special_tokens=False)
    return text[:min((i for i in map(text.find, stop) if i >= 0), default=len(text))]


def make_record(problem, prompt, completions, texts, grades):
    """What is kept of a problem: the question, every sample, and how each was judged."""
    strict, lenient = grades
    samples = [{"text": text, "answer": extract_answer(text, strict=True), "lenient_answer": extract_answer(text),
                "strict": s, "lenient": l, "tokens": len(c.tokens), "finish": c.finish,
                "logprob": round(sum(c.logprobs), 4)}
               for text, c, s, l in zip(texts, completions, strict, lenient)]
    return {"id": problem["id"], "level": problem.get("level"), "subject": problem.get("subject"), "prompt": prompt,
            "reference": problem["answer"], "samples": samples}


def read_records(path, settings=None):
    """{id: record} of a file of records. What follows the last line break was cut off, and is no record.

    settings: what the run that goes on asks for. Raises ValueError when the records were made with other settings.
    """
    records = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
        if not isinstance(record, dict) or not record.get("samples") or "settings" not in record:
            raise ValueError(f"{path}, line {number}: not a record of eval.py")
        if settings and record["settings"] != settings:
            other = [f"{k} {record['settings'].get(k)!r} (now {v!r})" for k, v in settings.items()
                     if record["settings"].get(k) != v]
            raise ValueError(f"{path} holds a run with other settings: {', '.join(other)}; give another --records")
        records[record["id"]] = record
    return records


def evaluate(params, config, tokenizer, problems, *, max_new_tokens, prompt="plain", system=None, shots=(),
             think_tag="think", num_samples=1, temperature=0.0, max_batch=64, path=None, settings=None, progress=True,
             **sampling):
    """Ask every problem and grade what comes: a list of records, in the order of the problems.

    prompt, system, shots, think_tag: as for render_prompt; sampling: top_p, top_k and seed of generate. Each problem
    samples with noise of its own, so its record depends neither on the other problems nor on max_batch.
    path: a file to which records are appended, and from which those that are there are taken.
    """
    if num_samples > 1 and temperature == 0:
        raise ValueError(f"{num_samples} samples at temperature 0 would be the same; give --temperature, or one sample")
    done, ends, stop = {}, end_tokens(tokenizer, config), PRESETS[prompt].stop
    if path and Path(path).is_file():
        done = read_records(path, settings)
        os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)  # a line half written goes
    todo = [p for p in problems if p["id"] not in done]
    begin, chunk = 0, max(1, 2 * max_batch // max(1, num_samples))
    with tqdm(total=len(problems), initial=len(problems) - len(todo), unit="problem", disable=not progress) as bar:
        while begin < len(todo):
            now, started = todo[begin:begin + chunk], time.perf_counter()
            prompts = [render_prompt(prompt, p, system=system, shots=shots, think_tag=think_tag) for p in now]
            ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
            answers = generate(params, config, ids, num_samples=num_samples, max_new_tokens=max_new_tokens,
                               temperature=temperature, stop_tokens=ends, stop_strings=stop, tokenizer=tokenizer,
                               max_batch=max_batch, seeds=[zlib.crc32(p["id"].encode()) for p in now], **sampling)
            seconds = (time.perf_counter() - started) / len(now)
            texts = [[completion_text(tokenizer, c, ends, stop) for c in row] for row in answers]
            pairs = [(text, p["answer"]) for p, row in zip(now, texts) for text in row]
            grades = [verify_many(pairs, strict=strict) for strict in (True, False)]
            for i, problem in enumerate(now):
                mine = [g[i * num_samples:(i + 1) * num_samples] for g in grades]
                done[problem["id"]] = make_record(problem, prompts[i], answers[i], texts[i], mine) | {
                    "seconds": round(seconds, 4), "settings": settings or {}}
            if path:
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(done[p["id"]]) + "\n" for p in now)
            bar.update(len(now))
            begin += len(now)
            if time.perf_counter() - started < 60:  # long chunks keep the batch full, short ones lose less when killed
                chunk *= 2
    return [done[p["id"]] for p in problems]


# ------------------------------------------------------------------------------------ rows: what a run comes to

ANSWER = {"strict": "answer", "lenient": "lenient_answer"}  # the field that each grade reads


def scores_of(records, grade):
    """Each problem's share of right samples; what could not be decided counts as wrong."""
    return [statistics.fmean(s[grade] is True for s in r["samples"]) for r in records]


def votes_of(record, grade="strict"):
    """The class that each sample votes for (None: no answer), and the classes that are right."""
    votes = pool_answers([s[ANSWER[grade]] for s in record["samples"]])
    return votes, {v for v, s in zip(votes, record["samples"]) if v is not None and s[grade]}


def score_row(records, scores, tokens, **settings):
    """A row of results: accuracy with its interval, by level and subject too, and the tokens written per problem."""
    def rates(field):
        """{group: [accuracy, low, high, problems, tokens]}"""
        groups = sorted({r[field] for r in records if r.get(field) is not None})
        parts = {str(g): [(x, n) for r, x, n in zip(records, scores, tokens) if r.get(field) == g] for g in groups}
        return {g: [*interval([x for x, _ in part]), len(part), statistics.fmean(n for _, n in part)]
                for g, part in parts.items()}

    accuracy, low, high = interval(scores)
    return settings | {
        "n": len(records), "accuracy": accuracy, "low": low, "high": high, "levels": rates("level"),
        "subjects": rates("subject"), "tokens_mean": statistics.fmean(tokens),
        "tokens_median": statistics.median(tokens), "tokens_p95": float(np.quantile(tokens, 0.95)),
        "tokens_per_correct": sum(tokens) / sum(scores) if any(scores) else None}


def summarize(records, **settings):
    """The row of a run: score_row for one sample a problem (the mean over its samples), and everything else counted."""
    counted = settings.get("grade") or PRESETS[settings["prompt"]].grade
    samples = [s for r in records for s in r["samples"]]
    N, seconds = len(records[0]["samples"]), sum(r["seconds"] for r in records)
    tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
    row = score_row(records, scores_of(records, counted), tokens, **settings) | {
        "grade": counted, **{grade: interval(scores_of(records, grade)) for grade in ("strict", "lenient")},
        "truncated": statistics.fmean(s["finish"] != "stop" for s in samples),
        "no_answer": statistics.fmean(s[ANSWER[counted]] is None for s in samples),
        "undecided": sum(s[counted] is None for s in samples),
        "seconds": seconds, "tokens_per_s": sum(tokens) * N / max(seconds, 1e-9)}
    if N > 1:
        right = [sum(s[counted] is True for s in r["samples"]) for r in records]
        votes = [votes_of(r, counted) for r in records]
        ks = [k for k in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64) if k <= N]
        row["pass_at"] = {str(k): interval([pass_at_k(N, c, k) for c in right]) for k in ks}
        row["maj_at"] = {str(k): interval([maj_at_k(*v, k) for v in votes]) for k in ks}
    return row


def commit():
    """The commit of this code, marked when it was changed since; None outside a repository."""
    found = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or None


def append_row(path, row):
    """Add a row to the results, with the command, the code and the library that made it."""
    row = row | {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(),
                 "torch": torch.__version__, "threads": torch.get_num_threads(), "time": time.strftime("%F %T")}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def percent(rate, low=None, high=None):
    return f"{100 * rate:.1f}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def markdown(header, rows):
    """A table of strings as Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *rows]) + "\n"


def rated(row):
    return percent(row["accuracy"], row["low"], row["high"])


def against(scores, baseline):
    """How many points over the baseline, problem by problem, as text."""
    change, low, high = paired_bootstrap(baseline, scores)
    return f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def print_row(row):
    print(f"{row['method']} | {row['model']} on {row['data']}/{row['split']}, {row['n']} problems | accuracy "
          f"{rated(row)} % ({row['grade']}) | strict {percent(*row['strict'])} | lenient {percent(*row['lenient'])}\n"
          f"  {row['tokens_mean']:.0f} tokens per problem (median {row['tokens_median']:.0f}, 95 % "
          f"{row['tokens_p95']:.0f}) | truncated {percent(row['truncated'])} % | "
          f"no answer {percent(row['no_answer'])} % | undecided {row['undecided']} | {row['seconds']:.1f} s | "
          f"{row['tokens_per_s']:.0f} tokens/s")
    for name in ("levels", "subjects"):
        if len(row[name]) > 1:
            print(f"  {name}: " + ", ".join(f"{k}: {percent(*rates)} of {n} in {length:.0f} tokens"
                                            for k, (*rates, n, length) in row[name].items()))
    for name in ("pass_at", "maj_at"):
        if name in row:
            found = ", ".join(f"{k}: {percent(*rates)}" for k, rates in row[name].items())
            print(f"  {name.removesuffix('_at')}@k: {found}")


# ------------------------------------------------------------------------------------ setting up a run from flags


class Run(NamedTuple):
    params: dict
    config: tuple
    tokenizer: object
    problems: list
    ask: dict  # keyword arguments of evaluate()
    settings: dict  # what identifies a row, beside the method
    records: Path | None = None  # a directory for files of records, or one such file
    grade: str | None = None  # which one counts; None: the preset's


def is_tiny(config):
    """Whether this is the embedded model or its offspring, which know short generated problems only."""
    return config.hidden_size * config.num_hidden_layers < 4096


def fingerprint(model_dir):
    """Eight characters that change with the weights: a path alone does not say which checkpoint stood there."""
    digest = hashlib.sha256()
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with open(path, "rb") as file:
            for begin in (0, path.stat().st_size // 2, max(0, path.stat().st_size - 2**20)):
                file.seek(begin)
                digest.update(file.read(2**20))
    return digest.hexdigest()[:8]


def load_shots(args, data, problems, count):
    """Solved problems to show first, none of them among those asked. The fewer are the first of the more."""
    if not count:
        return []
    source = args.shots_from or data
    shots = load_problems(source, "train", count, args.data_seed)
    asked = {p["problem"] for p in problems}
    for shot in shots:
        if not shot.get("solution"):
            raise ValueError(f"{source}: {shot['id']} has no solution to show; name a set that has with --shots-from")
        if shot["problem"] in asked:
            raise ValueError(f"{source}: example {shot['id']} is one of the problems asked; name another --shots-from")
    return shots


def open_run(args, tiny_prompt="plain"):
    """The Run that the flags name. tiny_prompt: what stands for a missing --prompt when the model is tiny."""
    records = Path(args.records) if args.records else None
    for folder in (Path(args.results).parent, records and (records.parent if records.suffix == ".jsonl" else records)):
        if folder:  # made now, so that nothing is measured that cannot be kept
            folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    path = resolve_model(args.model)
    config, tokenizer = load_config(path), load_tokenizer(path)
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    params = load_params(path, args.device, getattr(torch, dtype))
    tiny = is_tiny(config)
    data = args.data or ("arithmetic" if tiny else "gsm8k")
    prompt = args.prompt or (tiny_prompt if tiny else "boxed")
    problems = load_problems(data, args.split, args.limit or None, args.data_seed)
    shots = load_shots(args, data, problems, PRESETS[prompt].shots if args.shots is None else args.shots)
    ask = {"prompt": prompt, "system": load_system_prompt(path), "shots": shots, "think_tag": args.think_tag,
           "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "seed": args.seed,
           "max_new_tokens": (128 if tiny else 1024) if args.max_new_tokens is None else args.max_new_tokens,
           "max_batch": (256 if tiny else 64) if args.max_batch is None else args.max_batch}
    settings = {"model": args.model, "weights": fingerprint(path), "data": data, "split": args.split,
                "data_seed": args.data_seed, "device": args.device, "dtype": dtype}
    return Run(params, config, tokenizer, problems, ask, settings, records, args.grade)


def prompt_tokens(run):
    """The ids of each problem's prompt, made from its question alone."""
    asked = {k: run.ask[k] for k in ("system", "shots", "think_tag")}
    texts = [render_prompt(run.ask["prompt"], {"problem": p["problem"]}, **asked) for p in run.problems]
    return [run.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def settings_of(run, **changes):
    """Everything that decides what a run's records say, as rows and records carry it."""
    ask = run.ask | changes
    hashed = prompt_hash(ask["prompt"], **{k: ask[k] for k in ("system", "shots", "think_tag")})
    named = {k: v for k, v in ask.items() if k not in ("system", "max_batch")}
    return run.settings | {"num_samples": 1} | named | {"shots": len(ask["shots"]), "prompt_hash": hashed}


def print_settings(settings):
    print(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items()), flush=True)


def measure(run, name="records", **changes):
    """evaluate() under a run's settings, some of them changed: (records, settings of their rows).

    name: of the file of records, which hold both grades, so that only their rows name the one that counts.
    """
    settings, ask = settings_of(run, **changes), run.ask | changes
    grade = run.grade or PRESETS[ask["prompt"]].grade
    path = run.records if run.records is None or run.records.suffix == ".jsonl" else run.records / f"{name}.jsonl"
    records = evaluate(run.params, run.config, run.tokenizer, run.problems, **ask, path=path, settings=settings)
    return records, settings | {"grade": grade, "max_batch": ask["max_batch"]}


# ------------------------------------------------------------------------------------ two runs, problem by problem


def compare(path_a, path_b, grade=None):
    """Prints what changed from one file of records to the other, over the problems that both hold."""
    a, b = read_records(path_a), read_records(path_b)
    shared = [i for i in a if i in b]
    if not shared:
        raise ValueError(f"{path_a} and {path_b} have no problem in common")
    scores, settings = [], []
    for path, records in ((path_a, a), (path_b, b)):
        settings.append(records[shared[0]]["settings"])
        scores.append(scores_of([records[i] for i in shared], grade or PRESETS[settings[-1]["prompt"]].grade))
        print(f"{path}: {percent(*interval(scores[-1]))} % of {len(shared)} shared problems (it holds {len(records)})")
    print("settings that differ: " + (", ".join(f"{k} {settings[0].get(k)!r} / {v!r}" for k, v in settings[1].items()
                                                if settings[0].get(k) != v) or "none"))
    print(f"difference in points: {against(scores[1], scores[0])} (95 %, paired bootstrap)")
    if all(s in (0, 1) for s in scores[0] + scores[1]):
        gained, lost = (sum(x > y for x, y in zip(*pair)) for pair in ((scores[1], scores[0]), scores))
        print(f"{gained} problems gained, {lost} lost; McNemar's exact p = {mcnemar(gained, lost):.2g}")


# ------------------------------------------------------------------------------------ the report


def read_rows(path):
    """The rows of a results file, none when there is no file."""
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def find_row(rows, **wanted):
    """The latest row with these fields, or None."""
    return next((row for row in reversed(rows) if all(row.get(k) == v for k, v in wanted.items())), None)


def run_neighbour(script, *flags):
    print(f"\n$ python {script} {' '.join(flags)}", flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
        raise ValueError(f"{script} ended with exit code {code}; its own message is above")


def plot_report(rows, out):
    """Two plots of (label, row) pairs: accuracy against tokens, and, where problems have levels, accuracy by level."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, and no display needed
    figures = {"cost.png": Figure((7, 4.5), dpi=150), "levels.png": Figure((7, 4.5), dpi=150)}
    cost, levels = (figure.subplots() for figure in figures.values())
    bars = lambda rates: [[r - low for r, low, *_ in rates], [high - r for r, _, high, *_ in rates]]
    for i, (label, row) in enumerate(rows):
        rate = row["accuracy"], row["low"], row["high"]
        cost.errorbar([row["tokens_mean"]], [rate[0]], bars([rate]), fmt="o", capsize=2, label=label)
        if rates := list(row["levels"].values()):
            x = [int(level) + 0.06 * (i - len(rows) / 2) for level in row["levels"]]
            levels.errorbar(x, [r[0] for r in rates], bars(rates), fmt="o-", capsize=2, label=label)
    cost.set(xlabel="tokens per problem", ylabel="accuracy", ylim=(0, 1), xscale="log")
    levels.set(xlabel="level", ylabel="accuracy", ylim=(0, 1))
    for (name, figure), axes in zip(figures.items(), (cost, levels)):
        if axes.get_legend_handles_labels()[1]:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            figure.savefig(out / name, bbox_inches="tight")


def trained_checkpoint(args):
    """The best checkpoint that grpo.py left for this model; it is trained now when there is none."""
    run = Path("runs") / ("grpo" if args.model == "tiny" else f"grpo-{Path(args.model).name}")
    if not (run / "checkpoints" / "best").is_dir():
        run_neighbour("grpo.py", f"--model={args.model}", f"--run-dir={run}")
    return str(run / "checkpoints" / "best")


def report(args):
    """One row per method, as Markdown and two plots; what the results lack is measured by the scripts that can."""
    path = resolve_model(args.model)
    tiny = is_tiny(load_config(path))
    data = args.data or ("arithmetic" if tiny else "gsm8k")
    plain, cot = ("plain", "cot") if tiny else ("direct", "boxed")
    passed_on = ("data", "split", "limit", "data_seed", "seed", "grade", "max_batch", "max_new_tokens", "device",
                 "results")
    usual = vars(parse_args([]))
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k in passed_on and v != usual[k]]
    same = {"data": data, "split": args.split, "data_seed": args.data_seed, "seed": args.seed, "shots": 0,
            "n": len(load_problems(data, args.split, args.limit or None, args.data_seed))}
    trained = args.trained or trained_checkpoint(args)
    plan = [  # label, model, method, prompt, the script that makes the row
        ("base", args.model, "greedy", plain, "eval.py"),
        ("+ chain of thought", args.model, "greedy", cot, "eval.py"),
        ("+ chain of thought, sampled once", args.model, "one sample", cot, "infer_scale.py"),
        ("+ self-consistency, N = 10", args.model, "majority of 10", cot, "infer_scale.py"),
        ("+ self-refinement, K = 2", args.model, "refine, K = 2", cot, "refine.py"),
        ("self-consistency at its tokens", args.model, "self-consistency at the tokens of K = 2", cot, "refine.py"),
        ("+ GRPO", trained, "greedy", plain, "eval.py"),
        ("base, sampled", args.model, "sampled", plain, "eval.py"),  # is GRPO more than sharpening? see pass@10
        ("+ GRPO, sampled", trained, "sampled", plain, "eval.py"),
    ]
    rows = []
    for label, model, method, prompt, script in plan:
        wanted = same | {"weights": fingerprint(resolve_model(model)), "method": method, "prompt": prompt,
                         "grade": args.grade or PRESETS[prompt].grade,
                         "temperature": 0.0 if method == "greedy" else SAMPLING_TEMPERATURE}
        sampled = ["--num-samples=10", f"--temperature={SAMPLING_TEMPERATURE}"] if method == "sampled" else []
        if not find_row(read_rows(args.results), **wanted):
            run_neighbour(script, f"--model={model}", f"--prompt={prompt}", *sampled, *flags)
        rows.append((label, find_row(read_rows(args.results), **wanted)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [[label, rated(row), percent(*row["pass_at"]["10"]) if "pass_at" in row else "", f"{row['tokens_mean']:.0f}",
              f"{row['seconds']:.1f}", f"`{row['command']}`"] for label, row in rows]
    text = (f"{args.model} on {same['n']} problems of {data}/{args.split}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads\n\n"
            + markdown(["method", "accuracy, % [95 %]", "pass@10", "tokens per problem", "seconds", "command"], lines))
    (out / "results.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    try:
        plot_report(rows, out)
        print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    except ImportError:
        print(f"written to {out}/results.md; the plots need matplotlib: pip install matplotlib")


# ------------------------------------------------------------------------------------ main


def main(args):
    if args.compare:
        return compare(*args.compare, args.grade)
    if args.report:
        return report(args)
    run = open_run(args)
    print_settings(settings_of(run, num_samples=args.num_samples))
    records, settings = measure(run, num_samples=args.num_samples)
    row = summarize(records, method="greedy" if args.temperature == 0 else "sampled", **settings)
    append_row(args.results, row)
    print_row(row)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
