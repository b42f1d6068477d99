"""Reasoning traces: written by a teacher, verified twice, curated; what sft.py trains on.

    python data/traces.py --data words knights --teacher solver --self-correction 0.1 --out runs/traces/solver.jsonl
    python data/traces.py --data gsm8k --teacher gsm8k-solutions --out runs/traces/gsm8k.jsonl
    python data/traces.py --data gsm8k --teacher-url https://api.example.com/v1 --teacher-model NAME --samples 4
    python data/traces.py --data words --teacher runs/sft/checkpoints/step_000500 --samples 4
    python data/traces.py --self-test 2000         # planted errors caught, right thoughts and repaired slips let pass

1. The teacher writes raw traces to OUT.raw.jsonl; a run that was interrupted goes on where it stopped.
2. Outcome: the answer in the box is right; a repaired program passes its unit tests.
3. Process: every step that can be checked is right. A right answer behind a wrong step is dropped, and counted.
4. Curation: duplicates, overlap with evaluation sets, length, repetition, language, difficulty, balance.
OUT holds {"id", "problem", "thought", "answer", "response", "level", "subject", "source"} a line; the data card beside
it, OUT's .md, says what was dropped, why, with an example of each, and what remains.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from data import FAMILIES, load_problems, split_of  # noqa: E402
from data.steps import check_text  # noqa: E402
from data.teachers import (INSTRUCTION, ask_endpoint, ask_gsm8k, ask_model, ask_solver, open_raw, read_raw,  # noqa: E402
                           respond)
from verify import extract_answer, verify_many  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", default=["words"], help="problem sets or .jsonl files")
    p.add_argument("--split", default="train", choices=("train", "dev", "test"))
    p.add_argument("--limit", type=int, help="problems of each set; default: all, and 2000 of a generated family")
    p.add_argument("--out", default="runs/traces/traces.jsonl")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--self-test", type=int, metavar="N", help="only try the step checkers, on N problems a family")
    g = p.add_argument_group("teacher")
    g.add_argument("--teacher", default="solver", help="solver, gsm8k-solutions, or a model: tiny, hub id, directory")
    g.add_argument("--teacher-url", help="an OpenAI-compatible endpoint, .../v1; the key is read from OPENAI_API_KEY")
    g.add_argument("--teacher-model", help="the model's name at the endpoint")
    g.add_argument("--samples", type=int, default=1, help="traces for each problem")
    g.add_argument("--temperature", type=float, default=0.7)
    g.add_argument("--max-new-tokens", type=int, default=2048)
    g.add_argument("--instruction", default=INSTRUCTION, help="what is added to a problem for a model or an endpoint")
    g.add_argument("--error-rate", type=float, default=0.0, help="share of the solver's traces with a wrong step")
    g.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    g.add_argument("--requests-per-minute", type=float, default=0, help="0: as fast as the endpoint answers")
    g.add_argument("--retries", type=int, default=6)
    g.add_argument("--timeout-s", type=float, default=300)
    g.add_argument("--backoff-s", type=float, default=1.0, help="wait before the first retry; it doubles each time")
    g.add_argument("--max-batch", type=int, default=64, help="rows that a local model decodes at once")
    g.add_argument("--device", default="cpu", help="of a local model")
    g = p.add_argument_group("checks and curation")
    g.add_argument("--steps", default="auto", choices=("auto", "family", "text", "off"),
                   help="process check: a family's own, complete; whatever can be parsed; none. auto: family for the "
                   "solver and local models, else text")
    g.add_argument("--decontaminate", nargs="*", default=["gsm8k", "math500"], metavar="SET",
                   help="problem sets whose test split is kept out")
    g.add_argument("--ngram", type=int, default=10, help="words in a row that count as overlap with an evaluation set")
    g.add_argument("--near-duplicate", type=float, default=0.9,
                   help="Jaccard similarity of word 3-grams from which one of two goes; 1: off")
    g.add_argument("--min-chars", type=int, default=1, help="of a thought")
    g.add_argument("--max-chars", type=int, default=12000)
    g.add_argument("--min-pass-rate", type=float, default=0.0,
                   help="how often the student is right, by the problems' field pass_rate where there is one")
    g.add_argument("--max-pass-rate", type=float, default=1.0)
    g.add_argument("--balance", type=float, default=0,
                   help="no (family, level) has more than this many times the median one; 0: off")
    g.add_argument("--self-correction", type=float, default=0.0,
                   help="share of the family traces that get a slip and its repair")
    g.add_argument("--think-tag", default="think", choices=("think", "thought"))
    args = p.parse_args(argv)
    for flag in ("error_rate", "near_duplicate", "min_pass_rate", "max_pass_rate", "self_correction"):
        if not 0 <= getattr(args, flag) <= 1:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not between 0 and 1")
    for flag in ("samples", "concurrency", "max_new_tokens", "max_batch", "ngram"):
        if getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is less than 1")
    if bool(args.teacher_url) != bool(args.teacher_model):
        p.error("--teacher-url and --teacher-model belong together")
    return args


def load_families():
    return {name: import_module(f"data.{name}") for name in FAMILIES}


# ---------------------------------------------------------------------------------------------- raw traces


def collect(problems, args, families):
    """(raw traces, those of earlier runs included: {(problem id, sample): trace}, what this run cost, its settings)."""
    built_in = args.teacher in ("solver", "gsm8k-solutions") and not args.teacher_url
    kind = "endpoint" if args.teacher_url else args.teacher if built_in else "model"
    fields = {"solver": ("seed", "think_tag", "error_rate"), "gsm8k-solutions": ("think_tag",)}.get(
        kind, ("seed", "temperature", "max_new_tokens", "instruction"))
    settings = {"teacher": kind, "model": args.teacher_model or args.teacher}
    settings |= {name: getattr(args, name) for name in fields}
    samples = 1 if built_in else args.samples
    path = Path(args.out).with_suffix(".raw.jsonl")
    traces, file = open_raw(path, settings)
    jobs = [(p, s) for p in problems for s in range(samples) if (p["id"], s) not in traces]
    cost = Counter()
    with file, tqdm(total=len(jobs), desc=f"traces by {settings['model']}", disable=not jobs) as bar:
        def progress(reply):
            for key in ("prompt_tokens", "completion_tokens"):
                cost[key] += (reply or {}).get(key, 0)
            bar.set_postfix_str(f"{cost['prompt_tokens']:,} + {cost['completion_tokens']:,} tok", refresh=False)
            bar.update()
        if kind == "endpoint":
            cost["unanswered"] = ask_endpoint(
                jobs, settings, file, url=args.teacher_url, concurrency=args.concurrency, retries=args.retries,
                requests_per_minute=args.requests_per_minute, timeout_s=args.timeout_s, backoff_s=args.backoff_s,
                progress=progress)
        elif kind == "model":
            ask_model(jobs, settings, file, samples=samples, device=args.device, max_batch=args.max_batch,
                      progress=progress)
        elif kind == "solver":
            ask_solver(jobs, settings, file, families=families, progress=progress)
        else:
            ask_gsm8k(jobs, settings, file, progress=progress)
    return read_raw(path, settings)[0], cost, settings


def split_response(text):
    """The thought of a model output: what its thinking block holds; without a block, all of it, with its box opened."""
    block = re.search(r"<(think|thought)>(.*?)</\1>", text, re.DOTALL)
    if not block:
        return re.sub(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).strip()
    return "\n".join(line.rstrip() for line in block[2].strip().split("\n"))


def make_record(trace, problem, settings, args, families):
    """A raw trace in the form that sft.py reads."""
    thought, answer = split_response(trace["text"]), problem["answer"]
    if hasattr(families.get(problem.get("subject")), "check_outcome"):      # any right repair counts, so keep this one
        answer = extract_answer(trace["text"], strict=True) or ""
    source = {"problem_id": problem["id"], "sample": trace["sample"], "split": args.split, "finish": trace["finish"],
              "teacher": settings["teacher"], "model": settings["model"]}
    source |= {key: trace[key] for key in ("planted_error", "completion_tokens") if key in trace}
    known = {key: problem[key] for key in ("level", "subject") if key in problem}
    return {"id": f"{problem['id']}#{trace['sample']}", "problem": problem["problem"], "thought": thought,
            "answer": answer, "response": respond(thought, answer, args.think_tag), **known, "source": source}


# ---------------------------------------------------------------------------------------------- verification


def outcomes(rows, problems, families):
    """None or a reason for each (trace, problem): is its answer right? Families may judge for themselves."""
    asked = [(trace["text"], problems[trace["problem_id"]]) for trace in rows]
    checks = [getattr(families.get(problem.get("subject")), "check_outcome", None) for _, problem in asked]
    plain = [(text, problem["answer"]) for (text, problem), check in zip(asked, checks) if not check]
    judged = iter(verify_many(plain, strict=True))
    verdicts = [check(problem, extract_answer(text, strict=True) or "") if check else next(judged)
                for (text, problem), check in zip(asked, checks)]
    return [None if verdict else "the answer could not be decided in time" if verdict is None else "the answer is wrong"
            for verdict in verdicts]


def process_check(record, problem, mode, families, counts):
    """The first wrong step, as text, or None. `counts` collects the verdicts on the steps of free text."""
    family = families.get(problem.get("subject"))
    if mode == "off":
        return None
    if mode == "family" and family:
        wrong = family.check_steps(problem, record["thought"])
        return wrong and f"a wrong step in {problem['subject']}: line {wrong[0] + 1}, {wrong[1]!r}: {wrong[2]}"
    thought = record["thought"]
    if record["source"]["teacher"] == "gsm8k-solutions":
        thought = problem["solution"]                                       # its <<...>> annotations are steps too
    steps = check_text(thought)
    counts.update(step.verdict for step in steps)
    return next((f"a wrong equation: {step.text!r}, {step.reason}" for step in steps if step.verdict == "wrong"), None)


# ---------------------------------------------------------------------------------------------- curation


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(words, n):
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)} or {" ".join(words)}


def form_fault(record, args):
    """A reason to drop a trace for its form: length, repetition, markup, language; None when there is none."""
    thought, words = record["thought"], words_of(record["thought"])
    if record["source"]["finish"] not in ("stop", "None"):
        return f"cut off: the output ended by {record['source']['finish']}"
    if not args.min_chars <= len(thought) <= args.max_chars:
        return f"length: {len(thought)} characters, outside {args.min_chars} to {args.max_chars}"
    if re.search(r"</?(?:think|thought)>|<\|\w+\|>", thought):
        return "markup inside the thought"
    lines = Counter(line for line in thought.split("\n") if len(line) > 3)
    if lines and max(lines.values()) > 4 or len(words) > 200 and len(ngrams(words, 4)) < 0.5 * len(words):
        return "repetition: the same words over and over"
    foreign = sum(c.isalpha() and ord(c) > 0x24F and not 0x370 <= ord(c) <= 0x3FF for c in thought)
    asked = any(c.isalpha() and ord(c) > 0x3FF for c in record["problem"])
    return "language: another script than the problem's" if foreign > 0.01 * len(thought) and not asked else None


def near_duplicates(records, threshold, hashes=64, bands=8):
    """{index: index of the earlier record it nearly repeats}, by the Jaccard similarity of their word 3-grams.

    MinHash in bands (Broder 1997) finds the pairs worth comparing, now and then missing one; each is compared exactly.
    """
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 2**31, (2, hashes, 1), dtype=np.int64)
    buckets, kept, repeats = {}, {}, {}
    for index, record in enumerate(records):
        grams = ngrams(words_of(record["problem"] + " " + record["thought"]), 3)
        ids = np.array([zlib.crc32(gram.encode()) >> 1 for gram in grams], dtype=np.int64)
        signature = ((a * ids + b) % (2**31 - 1)).min(1).reshape(bands, -1)          # [bands, hashes / bands]
        keys = [(band, row.tobytes()) for band, row in enumerate(signature)]
        for other in sorted({i for key in keys for i in buckets.get(key, ())}):
            if len(grams & kept[other]) >= threshold * len(grams | kept[other]):
                repeats[index] = other
                break
        else:
            kept[index] = grams
            for key in keys:
                buckets.setdefault(key, []).append(index)
    return repeats


def evaluation_grams(names, n):
    """({n-gram: the problem it is from}, {set: number of its problems, or why it could not be had})."""
    grams, found = {}, {}
    for name in names:
        try:
            problems = load_problems(name, "test")
        except FileNotFoundError as error:
            found[name] = f"not checked: {error}"
            continue
        found[name] = len(problems)
        for problem in problems:
            grams.update(dict.fromkeys(ngrams(words_of(problem["problem"]), n), problem["id"]))
    return grams, found


def balance(records, factor, rng):
    """The indices that go so that no (family, level) has more than `factor` times as many as the median one."""
    cells = {}
    for index, record in enumerate(records):
        cells.setdefault((record.get("subject"), record.get("level")), []).append(index)
    cap = math.ceil(factor * statistics.median(map(len, cells.values()))) if cells else 0
    return {index for cell in cells.values() for index in rng.sample(cell, max(0, len(cell) - cap))}


def curate(records, problems, args, drop):
    """What is left of verified records. drop(stage, records, {index: reason}) -> the records that stay."""
    records = drop("form", records, {i: reason for i, r in enumerate(records) if (reason := form_fault(r, args))})

    first = {}
    for record in records:
        first.setdefault((record["problem"], record["thought"]), record["id"])
    same = {i: first[r["problem"], r["thought"]] for i, r in enumerate(records)}
    records = drop("exact duplicate", records, {
        i: f"the same as: {same[i]}" for i, r in enumerate(records) if same[i] != r["id"]})
    if args.near_duplicate < 1:
        near = near_duplicates(records, args.near_duplicate)
        records = drop("near duplicate", records, {
            i: f"nearly the same as: {records[j]['id']}" for i, j in near.items()})

    grams, evaluations = evaluation_grams(args.decontaminate, args.ngram)
    overlap = {}
    for i, record in enumerate(records):
        problem = problems[record["source"]["problem_id"]]
        hit = next((g for g in ngrams(words_of(record["problem"]), args.ngram) if g in grams), None)
        if hit:
            overlap[i] = f"{args.ngram} words of {grams[hit].split('/')[0]}: {hit!r} is in {grams[hit]}"
        elif "key" in problem and split_of(problem["key"]) != "train":
            overlap[i] = "not of the train split: " + problem["key"]
    records = drop("contamination", records, overlap)

    rates = [problems[r["source"]["problem_id"]].get("pass_rate") for r in records]
    records = drop("difficulty", records, {
        i: f"the student's pass rate: {rate}" for i, rate in enumerate(rates)
        if rate is not None and not args.min_pass_rate <= rate <= args.max_pass_rate})
    if args.balance:
        extra = balance(records, args.balance, random.Random(args.seed))
        records = drop("balance", records, {i: "more than its share" for i in sorted(extra)})
    return records, evaluations


def add_slips(records, problems, args, families):
    """The records, a share of the family traces replaced by ones with a slip that is noticed and repaired."""
    out = []
    for record in records:
        problem = problems[record["source"]["problem_id"]]
        family, rng = families.get(problem.get("subject")), random.Random(f"slip {args.seed} {record['id']}")
        if family and rng.random() < args.self_correction:
            thought = family.plant_slip(problem, rng)
            assert family.check_steps(problem, thought) is None, (problem, thought)
            if thought != problem["solution"]:
                record = record | {"thought": thought, "answer": problem["answer"],
                                   "response": respond(thought, problem["answer"], args.think_tag),
                                   "source": record["source"] | {"self_correction": True}}
        out.append(record)
    return out


# ---------------------------------------------------------------------------------------------- the report


def data_card(records, dropped, facts, args):
    """Markdown: how the file was made, what was dropped and why, what remains."""
    cells = Counter((r.get("subject") or "-", r.get("level") or "-") for r in records)
    levels = sorted({level for _, level in cells}, key=str)
    lengths = sorted(len(r["thought"]) for r in records) or [0]
    lines = [f"# {Path(args.out).name}", "", "Made by", "", f"    python data/traces.py {' '.join(sys.argv[1:])}", "",
             "## Dropped", "", "| stage | traces | reasons | an example |", "| --- | --- | --- | --- |"]
    for stage, drops in dropped.items():
        reasons = Counter(reason.split(":")[0] for _, reason in drops).most_common()
        example = f"`{drops[0][0]}`: {drops[0][1]}"[:240].replace("|", "\\|").replace("\n", " ") if drops else ""
        lines.append(f"| {stage} | {len(drops)} | {'; '.join(f'{reason} {n}' for reason, n in reasons)} | {example} |")
    lines += ["", f"{len(records)} of {facts.pop('raw traces')} raw traces remain.", "", "## Facts", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- characters in a thought: least {lengths[0]}, median {lengths[len(lengths) // 2]}, most {lengths[-1]}",
              "", "## What remains, by level", "", f"| subject | {' | '.join(map(str, levels))} |",
              "| --- |" + " --- |" * len(levels)]
    for subject in sorted({subject for subject, _ in cells}):
        lines.append(f"| {subject} | {' | '.join(str(cells[subject, level]) for level in levels)} |")
    if records:
        lines += ["", "## One of them", "", "```", records[0]["problem"], "", records[0]["response"], "```"]
    return "\n".join(lines) + "\n"


def self_test(count, families):
    """Prints, by family, the right thoughts rejected, planted errors missed, repaired slips rejected. True: none."""
    perfect = True
    for name, family in families.items():
        problems, rng, missed = family.problems("train", count), random.Random(name), [0, 0, 0]
        for problem in problems:
            missed[0] += family.check_steps(problem, problem["solution"]) is not None
            missed[1] += family.check_steps(problem, family.plant_error(problem, rng)) is None
            missed[2] += family.check_steps(problem, family.plant_slip(problem, rng)) is not None
        perfect &= not any(missed)
        print(f"{name:10} | {len(problems)} problems | right thoughts rejected {missed[0]} | planted errors missed "
              f"{missed[1]} | repaired slips rejected {missed[2]}", flush=True)
    return perfect


def main(args):
    families = load_families()
    if args.self_test:
        return 0 if self_test(args.self_test, families) else 1
    problems = {p["id"]: p for name in args.data for p in load_problems(name, args.split, args.limit, args.seed)}
    traces, cost, settings = collect(list(problems.values()), args, families)
    rows = [trace for trace in traces.values() if trace["problem_id"] in problems]
    mode = args.steps if args.steps != "auto" else "text" if settings["teacher"] == "endpoint" else "family"
    dropped, steps = {}, Counter()

    def drop(stage, records, reasons):
        dropped[stage] = [(records[i]["id"], reason) for i, reason in reasons.items()]
        return [record for i, record in enumerate(records) if i not in reasons]

    records = [make_record(trace, problems[trace["problem_id"]], settings, args, families) for trace in rows]
    verdicts = outcomes(rows, problems, families)
    records = drop("outcome", records, {i: reason for i, reason in enumerate(verdicts) if reason})
    wrong = [process_check(r, problems[r["source"]["problem_id"]], mode, families, steps) for r in records]
    records = drop("process", records, {i: reason for i, reason in enumerate(wrong) if reason})
    records, evaluations = curate(records, problems, args, drop)
    records = add_slips(records, problems, args, families)
    if not records:
        reasons = ", ".join(f"{stage} {len(drops)}" for stage, drops in dropped.items())
        raise ValueError(f"no trace is left; dropped by {reasons}")
    random.Random(args.seed).shuffle(records)

    checked = {"off": "none", "family": "each family's own, free text elsewhere", "text": "free text"}[mode]
    facts = {"raw traces": len(rows), "teacher": settings, "problems": len(problems), "process check": checked,
             "steps of free text": dict(steps), "unanswered": cost["unanswered"], "kept out": evaluations,
             "cost": f"{cost['prompt_tokens']:,} prompt + {cost['completion_tokens']:,} completion tokens in this run",
             "self-correction": sum("self_correction" in r["source"] for r in records)}
    planted = sum(bool(trace.get("planted_error")) for trace in rows)
    if planted:
        left = sum(bool(r["source"].get("planted_error")) for r in records)
        facts["planted errors"] = f"{planted}, of which {left} are still there"
    card = data_card(records, dropped, facts, args)
    out = Path(args.out)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for path, text in ((out.with_suffix(".md"), card), (out, lines)):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    for stage, drops in dropped.items():
        print(f"dropped by {stage:16}| {len(drops):6}" + (f" | {drops[0][1]:.100}" if drops else ""))
    print(f"{len(records)} of {len(rows)} traces -> {out}, card {out.with_suffix('.md')} | {facts['cost']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, FileNotFoundError) as error:
        print(f"traces.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("traces.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
