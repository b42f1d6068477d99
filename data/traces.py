"""Reasoning traces: written by a teacher, verified twice, curated; what sft.py trains on.

    python -m data.traces --data words knights --self-correction 0.1 --out runs/traces/solver.jsonl
    python -m data.traces --data gsm8k --teacher gsm8k-solutions --out runs/traces/gsm8k.jsonl
    python -m data.traces --data gsm8k --teacher-url https://api.example.com/v1 --teacher-model NAME
    python -m data.traces --data words --teacher runs/sft/checkpoints/step_000500 --samples 4
    python -m data.traces --self-test 2000    # tries the step checkers on planted errors and slips

1. The teacher writes raw traces to OUT.raw.jsonl; an interrupted run goes on where it stopped.
2. Outcome: the answer in the box is right; a repaired program passes its tests.
3. Process: every step that can be checked is right. Right answers behind wrong steps are dropped.
4. Curation: duplicates, overlap with evaluation sets, length, repetition, language, difficulty,
   balance.
OUT holds {"id", "problem", "thought", "answer", "response", "level", "subject", "source"} a line.
The data card beside it, OUT's .md, says what was dropped and why, and what remains.
"""

import json
import math
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

import model
from data import FAMILIES, family_of, load_problems, split_of, teachers
from data.families import SIZES
from data.prompts import THINK_TAGS, respond, thought_of
from data.steps import check_text
from eval import fit_context, markdown
from generate import completion_text, generate
from launch import Parser, above, at_least, between, compute_dtype, find_device, printable
from run import write_whole
from verify import extract_answer, verify_many

share = between(0.0, 1.0)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--data", nargs="+", default=["words"], help="problem sets or .jsonl files")
    add("--split", default="train", choices=SIZES, help="of each set")
    add("--limit", type=at_least(1),
        help="problems of each set (default: all, and 2000 of a generated family)")
    add("--out", default="runs/traces/traces.jsonl", help="what sft.py reads")
    add("--seed", type=int, default=0, help="every random choice follows from it")
    add("--self-test", type=at_least(1), metavar="N",
        help="only try the step checkers, on N problems a family")
    add = p.add_argument_group("teacher").add_argument
    add("--teacher", default="solver",
        help="solver, gsm8k-solutions, or a model: tiny, hub id, directory")
    add("--teacher-url",
        help="an OpenAI-compatible endpoint, .../v1; the key is read from OPENAI_API_KEY")
    add("--teacher-model", help="the model's name at the endpoint")
    add("--samples", type=at_least(1), default=1, help="traces for each problem")
    add("--temperature", type=at_least(0.0), default=0.7, help="of a model or an endpoint")
    add("--max-new-tokens", type=at_least(1), default=2048, help="of a trace")
    add("--instruction", default=teachers.INSTRUCTION,
        help="what is added to a problem for a model or an endpoint (default: %(default)r)")
    add("--error-rate", type=share, default=0.0,
        help="share of the solver's traces with a wrong step")
    add("--concurrency", type=at_least(1), default=8, help="requests at a time")
    add("--requests-per-minute", type=at_least(0.0), default=0.0,
        help="0: as fast as the endpoint answers")
    add("--retries", type=at_least(0), default=6, help="of a request that fails")
    add("--timeout-s", type=above(0.0), default=300.0, help="of a request")
    add("--backoff-s", type=at_least(0.0), default=1.0,
        help="wait before the first retry; it doubles each time")
    add("--max-batch", type=at_least(1), default=64, help="rows that a local model decodes at once")
    add("--device", default="cpu", help="of a local model")
    add = p.add_argument_group("checks and curation").add_argument
    add("--steps", default="auto", choices=("auto", "family", "text", "off"),
        help="process check: a family's own, complete; whatever can be parsed; none. auto: family "
        "for the solver and local models, else text")
    add("--decontaminate", nargs="*", default=["gsm8k", "math500"], metavar="SET",
        help="problem sets whose test split is kept out")
    add("--ngram", type=at_least(1), default=10,
        help="words in a row that count as overlap with an evaluation set")
    add("--near-duplicate", type=share, default=0.9,
        help="Jaccard similarity of word 3-grams from which one of two goes; 1: off")
    add("--min-chars", type=at_least(0), default=1, help="of a thought")
    add("--max-chars", type=at_least(0), default=12000, help="of a thought")
    add("--min-pass-rate", type=share, default=0.0,
        help="how often the student is right, by the field pass_rate of problems that have one")
    add("--max-pass-rate", type=share, default=1.0, help="likewise")
    add("--balance", type=at_least(0.0), default=0.0,
        help="no (family, level) has more than this many times the median one; 0: off")
    add("--self-correction", type=share, default=0.0,
        help="share of the family traces that get a slip and its repair")
    add("--think-tag", default="think", choices=THINK_TAGS, help="of the thinking block")
    args = p.parse_args(argv)
    if bool(args.teacher_url) != bool(args.teacher_model):
        p.error("--teacher-url and --teacher-model belong together")
    if args.teacher_url and not re.match("https?://.", args.teacher_url):
        p.error(f"--teacher-url {args.teacher_url}: expected http://... or https://...")
    return args


# ---- raw traces


def ask_model(jobs, settings, keep, *, samples, device, max_batch):
    """Asks a model directory; each answer is kept as it ends."""
    path = model.resolve_model(settings["model"])
    config = model.load_config(path)
    tokenizer = model.load_tokenizer(path)
    system = model.load_system_prompt(path)
    ends = model.end_tokens(tokenizer, config)
    device = find_device(device)
    params = model.load_params(path, device, compute_dtype("auto", device))
    problems = list({problem["id"]: problem for problem, _ in jobs}.values())
    prompts = []
    for problem in problems:
        question = {"role": "user", "content": problem["problem"] + settings["instruction"]}
        prompts.append(model.encode_chat(tokenizer, [question], system=system))
    problems, prompts = fit_context(problems, prompts, config, reply_tokens=1)
    wanted = {(problem["id"], sample) for problem, sample in jobs}

    def keep_ended(ended, num_tokens):
        for i, sample, completion in ended:
            if (problems[i]["id"], sample) in wanted:
                keep(problems[i], sample, {
                    "text": completion_text(tokenizer, completion, ends),
                    "finish": completion.finish, "prompt_tokens": len(prompts[i]),
                    "completion_tokens": len(completion.tokens),
                })

    generate(
        params, config, prompts, num_samples=samples, stop_tokens=ends, max_batch=max_batch,
        max_new_tokens=settings["max_new_tokens"], temperature=settings["temperature"],
        seed=settings["seed"], seeds=[zlib.crc32(problem["id"].encode()) for problem in problems],
        on_step=keep_ended,
    )


def teacher_settings(args):
    """What the traces depend on; a file of raw traces belongs to one teacher with its settings."""
    kind, fields = "model", ("seed", "temperature", "max_new_tokens", "instruction")
    if args.teacher_url:
        kind = "endpoint"
    elif args.teacher == "solver":
        kind, fields = "solver", ("seed", "think_tag", "error_rate")
    elif args.teacher == "gsm8k-solutions":
        kind, fields = "gsm8k-solutions", ("think_tag",)
    named = {"teacher": kind, "model": args.teacher_model or args.teacher}
    return named | {name: getattr(args, name) for name in fields}


def collect(problems, settings, args):
    """(raw traces, those of earlier runs included; what this run cost; {why none came: times})."""
    kind = settings["teacher"]
    samples = args.samples if kind in ("endpoint", "model") else 1
    path = Path(args.out).with_suffix(".raw.jsonl")
    traces, file = teachers.open_raw(path, settings)
    jobs = [(p, s) for p in problems for s in range(samples) if (p["id"], s) not in traces]
    cost = Counter()
    complaints = Counter()
    name = f"traces by {settings['model']}"
    with file, tqdm(total=len(jobs), desc=name, disable=not jobs) as bar:
        def keep(problem, sample, reply):
            if reply:
                teachers.append(file, {"problem_id": problem["id"], "sample": sample} | reply)
            else:
                cost["unanswered"] += 1
            for field in ("prompt_tokens", "completion_tokens"):
                cost[field] += (reply or {}).get(field, 0)
            tokens = f"{cost['prompt_tokens']:,} + {cost['completion_tokens']:,} tok"
            bar.set_postfix_str(tokens, refresh=False)
            bar.update()

        def complain(reason):
            if reason not in complaints and len(complaints) < 5:
                tqdm.write(f"asking again: {reason}", file=sys.stderr)
            complaints[reason] += 1

        if kind == "solver":
            teachers.ask_solver(jobs, settings, keep)
        elif kind == "gsm8k-solutions":
            teachers.ask_gsm8k(jobs, settings, keep)
        elif kind == "endpoint":
            teachers.ask_endpoint(
                jobs, settings, keep, complain, url=args.teacher_url,
                concurrency=args.concurrency, requests_per_minute=args.requests_per_minute,
                retries=args.retries, timeout_s=args.timeout_s, backoff_s=args.backoff_s,
            )
        else:
            ask_model(jobs, settings, keep, samples=samples, device=args.device,
                      max_batch=args.max_batch)
    return list(teachers.read_raw(path, settings)[0].values()), cost, complaints


def make_record(trace, problem, settings, args):
    """A raw trace in the form that sft.py reads."""
    thought = thought_of(trace["text"])
    answer = problem["answer"]
    if hasattr(family_of(problem), "check_outcome"):  # any right repair counts, so keep this one
        answer = extract_answer(trace["text"], strict=True) or ""
    source = {
        "problem_id": problem["id"], "sample": trace["sample"], "split": args.split,
        "finish": trace["finish"], "teacher": settings["teacher"], "model": settings["model"],
    }
    source |= {key: trace[key] for key in ("planted_error", "completion_tokens") if key in trace}
    known = {key: problem[key] for key in ("level", "subject") if key in problem}
    return {
        "id": f"{problem['id']}#{trace['sample']}", "problem": problem["problem"],
        "thought": thought, "answer": answer, "response": respond(thought, answer, args.think_tag),
        **known, "source": source,
    }


# ---- verification


def outcome_faults(traces, problems):
    """Why the answer of each trace is not right, or None. Families may judge for themselves."""
    verdicts = {}
    others = []
    for i, trace in enumerate(traces):
        problem = problems[trace["problem_id"]]
        family = family_of(problem)
        if hasattr(family, "check_outcome"):
            answer = extract_answer(trace["text"], strict=True) or ""
            verdicts[i] = family.check_outcome(problem, answer)
        else:
            others.append(i)
    pairs = [(traces[i]["text"], problems[traces[i]["problem_id"]]["answer"]) for i in others]
    verdicts |= zip(others, verify_many(pairs, strict=True))
    names = {True: None, False: "the answer is wrong",
             None: "the answer could not be decided in time"}
    return [names[verdicts[i]] for i in range(len(traces))]


def process_fault(record, problem, mode, counts):
    """The first wrong step, as text, or None. `counts` collects the verdicts on free text."""
    family = family_of(problem)
    if mode == "off":
        return None
    if mode == "family" and family:
        wrong = family.check_steps(problem, record["thought"])
        if not wrong:
            return None
        index, line, reason = wrong
        return f"a wrong step in {problem['subject']}: line {index + 1}, {line!r}: {reason}"
    thought = record["thought"]
    if record["source"]["teacher"] == "gsm8k-solutions":
        thought = problem["solution"]  # its <<...>> annotations are steps too
    steps = check_text(thought)
    counts.update(step.verdict for step in steps)
    wrong = next((step for step in steps if step.verdict == "wrong"), None)
    return f"a wrong equation: {wrong.text!r}, {wrong.reason}" if wrong else None


# ---- curation


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(words, n):
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)} or {" ".join(words)}


def form_fault(record, min_chars, max_chars):
    """Why a trace's form is not wanted: length, repetition, markup or language; or None."""
    thought = record["thought"]
    words = words_of(thought)
    if record["source"]["finish"] not in ("stop", "None"):
        return f"cut off: the output ended by {record['source']['finish']}"
    if not min_chars <= len(thought) <= max_chars:
        return f"length: {len(thought)} characters, outside {min_chars} to {max_chars}"
    if re.search(r"</?(?:think|thought)>|<\|\w+\|>", thought):
        return "markup inside the thought"
    lines = Counter(line for line in thought.split("\n") if len(line) > 3)
    monotonous = len(words) > 200 and len(ngrams(words, 4)) < 0.5 * len(words)
    if monotonous or max(lines.values(), default=0) > 4:
        return "repetition: the same words over and over"
    foreign = sum(c.isalpha() and ord(c) > 0x24F and not 0x370 <= ord(c) <= 0x3FF for c in thought)
    asked = any(c.isalpha() and ord(c) > 0x3FF for c in record["problem"])
    if foreign > 0.01 * len(thought) and not asked:
        return "language: another script than the problem's"
    return None


def near_duplicates(records, threshold, hashes=64, bands=8):
    """{index: index of the earlier record that it nearly repeats}, by their word 3-grams.

    MinHash in bands (Broder 1997) finds the pairs worth comparing, now and then missing one; for
    each the Jaccard similarity is computed exactly.
    """
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 2**31, (2, hashes, 1), dtype=np.int64)
    buckets, kept, repeats = {}, {}, {}
    for index, record in enumerate(records):
        grams = ngrams(words_of(record["problem"] + " " + record["thought"]), 3)
        ids = np.array([zlib.crc32(gram.encode()) >> 1 for gram in grams], dtype=np.int64)
        signature = ((a * ids + b) % (2**31 - 1)).min(1).reshape(bands, -1)  # [bands, hashes/bands]
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
    """({n-gram: the problem it is from}, {set: number of its problems, or why there are none})."""
    grams, found = {}, {}
    for name in names:
        try:
            problems = load_problems(name, "test")
        except FileNotFoundError as error:
            found[name] = f"not checked: {error}"
            continue
        found[name] = len(problems)
        for problem in problems:
            grams |= dict.fromkeys(ngrams(words_of(problem["problem"]), n), problem["id"])
    return grams, found


def overlap_fault(problem, grams, n):
    """Why a problem would contaminate an evaluation, or None."""
    shared = ngrams(words_of(problem["problem"]), n) & grams.keys()
    if shared:
        hit = min(shared)
        return f"{n} words of {grams[hit].split('/')[0]}: {hit!r} is in {grams[hit]}"
    if "key" in problem and split_of(problem["key"]) != "train":
        return "not of the train split: " + problem["key"]
    return None


def balance(records, factor, rng):
    """The indices that go so that no (family, level) has over `factor` times the median one's."""
    cells = {}
    for index, record in enumerate(records):
        cells.setdefault((record.get("subject"), record.get("level")), []).append(index)
    cap = math.ceil(factor * statistics.median(map(len, cells.values()))) if cells else 0
    return {index for cell in cells.values() for index in rng.sample(cell, max(0, len(cell) - cap))}


def drop(dropped, stage, records, faults):
    """The records without a fault; the others go into `dropped`: {stage: [(id, fault)]}."""
    pairs = list(zip(records, faults, strict=True))
    dropped[stage] = [(record["id"], fault) for record, fault in pairs if fault]
    return [record for record, fault in pairs if not fault]


def curate(records, problems, dropped, evaluations, args):
    """What is left of verified records. evaluations: the n-grams that are kept out."""
    faults = [form_fault(record, args.min_chars, args.max_chars) for record in records]
    records = drop(dropped, "form", records, faults)

    first = {}
    same = [first.setdefault((r["problem"], r["thought"]), r["id"]) for r in records]
    faults = [f"the same as: {other}" if other != record["id"] else None
              for record, other in zip(records, same)]
    records = drop(dropped, "exact duplicate", records, faults)

    if args.near_duplicate < 1:
        near = near_duplicates(records, args.near_duplicate)
        faults = [f"nearly the same as: {records[near[i]]['id']}" if i in near else None
                  for i in range(len(records))]
        records = drop(dropped, "near duplicate", records, faults)

    asked = [problems[record["source"]["problem_id"]] for record in records]
    faults = [overlap_fault(problem, evaluations, args.ngram) for problem in asked]
    records = drop(dropped, "contamination", records, faults)

    rates = [problems[record["source"]["problem_id"]].get("pass_rate") for record in records]
    faults = [f"the student's pass rate: {rate}"
              if rate is not None and not args.min_pass_rate <= rate <= args.max_pass_rate else None
              for rate in rates]
    records = drop(dropped, "difficulty", records, faults)

    if args.balance:
        extra = balance(records, args.balance, random.Random(args.seed))
        faults = ["more than its share" if i in extra else None for i in range(len(records))]
        records = drop(dropped, "balance", records, faults)
    return records


def add_slip(record, problem, rate, seed, think_tag):
    """The record or, at this rate, one with a slip that is noticed and repaired."""
    family = family_of(problem)
    rng = random.Random(f"slip {seed} {record['id']}")
    if not family or rng.random() >= rate:
        return record
    thought = family.plant_slip(problem, rng)
    assert family.check_steps(problem, thought) is None, (problem, thought)
    if thought == problem["solution"]:
        return record
    return record | {
        "thought": thought, "answer": problem["answer"],
        "response": respond(thought, problem["answer"], think_tag),
        "source": record["source"] | {"self_correction": True},
    }


# ---- the report


def data_card(title, records, dropped, num_raw, facts):
    """Markdown: how the file was made, what was dropped and why, what remains."""
    stages = []
    for stage, drops in dropped.items():
        counts = Counter(fault.split(":")[0] for _, fault in drops).most_common()
        reasons = "; ".join(f"{reason} {n}" for reason, n in counts)
        example = f"`{drops[0][0]}`: {drops[0][1]}"[:240] if drops else ""
        example = example.replace("|", "\\|").replace("\n", " ")
        stages.append([stage, len(drops), reasons, example])
    lengths = sorted(len(record["thought"]) for record in records)
    facts = facts | {"characters in a thought": f"least {lengths[0]}, median "
                     f"{lengths[len(lengths) // 2]}, most {lengths[-1]}"}
    cells = Counter((r.get("subject") or "-", r.get("level") or "-") for r in records)
    levels = sorted({level for _, level in cells}, key=str)
    rows = [[subject, *(cells[subject, level] for level in levels)]
            for subject in sorted({subject for subject, _ in cells})]
    return "\n".join([
        f"# {title}\n\nMade by\n\n    python -m data.traces {' '.join(sys.argv[1:])}\n",
        "## Dropped\n", markdown(["stage", "traces", "reasons", "an example"], stages),
        f"{len(records)} of {num_raw} raw traces remain.\n",
        "## Facts\n", *(f"- {name}: {value}" for name, value in facts.items()),
        "\n## What remains, by level\n", markdown(["subject", *levels], rows),
        f"## One of them\n\n```\n{records[0]['problem']}\n\n{records[0]['response']}\n```\n",
    ])


def self_test(count):
    """Prints, by family, how often its checker is wrong. Returns whether it never is."""
    perfect = True
    for name in FAMILIES:
        family = import_module(f"data.{name}")
        problems = family.problems("train", count)
        rng = random.Random(name)
        rejected = missed = slips = 0
        for problem in problems:
            rejected += family.check_steps(problem, problem["solution"]) is not None
            missed += family.check_steps(problem, family.plant_error(problem, rng)) is None
            slips += family.check_steps(problem, family.plant_slip(problem, rng)) is not None
        perfect &= rejected + missed + slips == 0
        print(f"{name:10} | {len(problems)} problems | right thoughts rejected {rejected} | "
              f"planted errors missed {missed} | repaired slips rejected {slips}", flush=True)
    return perfect


def main(args):
    if args.self_test:
        return 0 if self_test(args.self_test) else 1
    problems = {}
    for name in args.data:
        found = load_problems(name, args.split, args.limit, args.seed)
        problems |= {problem["id"]: problem for problem in found}
    settings = teacher_settings(args)
    traces, cost, complaints = collect(list(problems.values()), settings, args)
    unanswered = str(cost["unanswered"])
    if complaints:
        unanswered += f", most often: {complaints.most_common(1)[0][0]}"
    traces = [trace for trace in traces if trace["problem_id"] in problems]
    places = {name: place for place, name in enumerate(problems)}  # not as they happened to come
    traces.sort(key=lambda trace: (places[trace["problem_id"]], trace["sample"]))
    records = [make_record(trace, problems[trace["problem_id"]], settings, args)
               for trace in traces]

    dropped = {}
    records = drop(dropped, "outcome", records, outcome_faults(traces, problems))
    mode = args.steps
    if mode == "auto":
        mode = "text" if settings["teacher"] == "endpoint" else "family"
    steps = Counter()
    faults = [process_fault(record, problems[record["source"]["problem_id"]], mode, steps)
              for record in records]
    records = drop(dropped, "process", records, faults)
    grams, evaluations = evaluation_grams(args.decontaminate, args.ngram)
    records = curate(records, problems, dropped, grams, args)
    if not records:
        reasons = ", ".join(f"{stage} {len(drops)}" for stage, drops in dropped.items())
        raise ValueError(f"no trace is left; dropped by {reasons}; unanswered {unanswered}")
    records = [add_slip(record, problems[record["source"]["problem_id"]], args.self_correction,
                        args.seed, args.think_tag) for record in records]
    random.Random(args.seed).shuffle(records)

    checked = {"off": "none", "family": "each family's own, free text elsewhere",
               "text": "free text"}
    facts = {
        "teacher": settings, "problems": len(problems), "process check": checked[mode],
        "steps of free text": dict(steps), "unanswered": unanswered,
        "kept out": evaluations,
        "cost": f"{cost['prompt_tokens']:,} prompt + {cost['completion_tokens']:,} completion "
                "tokens in this run",
        "self-correction": sum("self_correction" in record["source"] for record in records),
    }
    planted = sum(bool(trace.get("planted_error")) for trace in traces)
    if planted:
        left = sum(bool(record["source"].get("planted_error")) for record in records)
        facts["planted errors"] = f"{planted}, of which {left} are still there"
    out = Path(args.out)
    card = out.with_suffix(".md")
    write_whole(card, data_card(out.name, records, dropped, len(traces), facts))
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_whole(out, "".join(lines))
    for stage, drops in dropped.items():
        example = f" | {printable(drops[0][1]):.100}" if drops else ""
        print(f"dropped by {stage:16}| {len(drops):6}{example}")
    print(f"{len(records)} of {len(traces)} traces -> {out}, card {card} | {facts['cost']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        print(f"traces.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("traces.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
