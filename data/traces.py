"""Reasoning traces for sft.py: written by a teacher, verified twice, and curated.

    python -m data.traces --data words knights --self-correction 0.1 --out runs/traces/solver.jsonl
    python -m data.traces --data gsm8k --teacher gsm8k-solutions --out runs/traces/gsm8k.jsonl
    python -m data.traces --data gsm8k --teacher-url https://api.example.com/v1 --teacher-model NAME
    python -m data.traces --data words --teacher runs/sft/checkpoints/step_000500 --samples 4
    python -m data.traces --self-test 2000    # test the step checkers on planted errors and slips

1. The teacher writes raw traces to OUT.raw.jsonl; an interrupted run resumes where it stopped.
2. Outcome: the boxed answer is right; a repaired program passes its tests.
3. Process: every step that can be checked is right, even if the answer is right.
4. Curation: length, repetition, language, duplicates, overlap with evaluation sets.
Lines of OUT: {"id", "problem", "thought", "answer", "response", "level", "subject", "source"}.
The data card, OUT with the suffix .md, reports what was dropped and why, and what remains.
"""

import json
import random
import re
import sys
import zlib
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import model
from data import FAMILIES, family_of, load_problems, teachers
from data.families import SIZES, draw_problems, plant_error, plant_slip, split_of
from data.prompts import THINK_TAGS, extract_thought, format_response
from data.steps import check_text
from eval import fit_context
from generate import completion_text, generate
from launch import Parser, above, at_least, between, compute_dtype, find_device, printable, run_main
from run import write_atomic
from stats import markdown
from verify import extract_answer, verify_many

share = between(0.0, 1.0)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--data", nargs="+", default=["words"], help="problem sets or .jsonl files")
    add("--split", default="train", choices=SIZES, help="split of each set")
    add("--limit", type=at_least(1),
        help="problems per set (default: all, or 2000 of a generated family)")
    add("--out", default="runs/traces/traces.jsonl", help="output file, for sft.py")
    add("--seed", type=int, default=0, help="seed of every random choice")
    add("--self-test", type=at_least(1), metavar="N",
        help="only test the step checkers, on N problems per family")
    add = p.add_argument_group("teacher").add_argument
    add("--teacher", default="solver",
        help="solver, gsm8k-solutions, or a model: tiny, a hub id or a directory")
    add("--teacher-url",
        help="OpenAI-compatible endpoint, .../v1; its key is read from OPENAI_API_KEY")
    add("--teacher-model", help="the model's name at the endpoint")
    add("--samples", type=at_least(1), default=1, help="traces per problem")
    add("--temperature", type=at_least(0.0), default=0.7,
        help="sampling temperature of a model or an endpoint")
    add("--max-new-tokens", type=at_least(1), default=2048, help="token budget per trace")
    add("--instruction", default=teachers.INSTRUCTION,
        help="text appended to each problem for a model or an endpoint (default: %(default)r)")
    add("--error-rate", type=share, default=0.0,
        help="share of the solver's traces that get a wrong step")
    add("--concurrency", type=at_least(1), default=8, help="concurrent requests")
    add("--retries", type=at_least(0), default=6, help="retries of a failed request")
    add("--timeout-s", type=above(0.0), default=300.0, help="timeout of a request")
    add("--backoff-s", type=at_least(0.0), default=1.0,
        help="delay before the first retry; doubles each time")
    add("--max-batch", type=at_least(1), default=64, help="batch size of a local model")
    add("--device", default="cpu", help="device of a local model")
    add = p.add_argument_group("checks and curation").add_argument
    add("--steps", default="auto", choices=("auto", "family", "text", "off"),
        help="process check: family (complete), text (whatever can be parsed) or off; auto: text "
        "for an endpoint, otherwise family")
    add("--decontaminate", nargs="*", default=["gsm8k", "math500"], metavar="SET",
        help="sets whose test problems must not overlap with the traces")
    add("--ngram", type=at_least(1), default=10,
        help="consecutive shared words that count as overlap")
    add("--max-chars", type=at_least(1), default=12000, help="maximum length of a thought")
    add("--self-correction", type=share, default=0.0,
        help="share of the family traces that get a slip and its repair")
    add("--think-tag", default="think", choices=THINK_TAGS, help="tag of the thinking block")
    args = p.parse_args(argv)
    args.records = Path(args.out).with_suffix(".raw.jsonl")  # an interrupted run continues from it
    if bool(args.teacher_url) != bool(args.teacher_model):
        p.error("--teacher-url and --teacher-model must be given together")
    if args.teacher_url and not re.match("https?://.", args.teacher_url):
        p.error(f"--teacher-url {args.teacher_url}: expected http://... or https://...")
    return args


# ---- raw traces


def sample_model(jobs, settings, on_reply, *, samples, device, max_batch):
    """Sample from a local model; on_reply is called as each completion ends."""
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

    def on_step(ended, num_tokens):
        for i, sample, completion in ended:
            if (problems[i]["id"], sample) in wanted:
                on_reply(problems[i], sample, {
                    "text": completion_text(tokenizer, completion, ends),
                    "finish": completion.finish, "prompt_tokens": len(prompts[i]),
                    "completion_tokens": len(completion.tokens),
                })

    generate(
        params, config, prompts, num_samples=samples, stop_tokens=ends, max_batch=max_batch,
        max_new_tokens=settings["max_new_tokens"], temperature=settings["temperature"],
        seed=settings["seed"], seeds=[zlib.crc32(problem["id"].encode()) for problem in problems],
        on_step=on_step,
    )


def teacher_settings(args):
    """The settings that raw traces depend on; a file of them has one teacher and its settings."""
    kind = args.teacher if args.teacher in teachers.SOLUTIONS else "model"
    if args.teacher_url:
        kind = "endpoint"
    fields = {"solver": ("seed", "think_tag", "error_rate"), "gsm8k-solutions": ("think_tag",)}
    fields = fields.get(kind, ("seed", "temperature", "max_new_tokens", "instruction"))
    named = {"teacher": kind, "model": args.teacher_model or args.teacher}
    return named | {name: getattr(args, name) for name in fields}


def collect_traces(problems, settings, args):
    """(raw traces of this and earlier runs, in problem order; facts about this run)."""
    kind = settings["teacher"]
    samples = 1 if kind in teachers.SOLUTIONS else args.samples
    traces, file = teachers.open_raw(args.records, settings)
    jobs = [(p, s) for p in problems for s in range(samples) if (p["id"], s) not in traces]
    failures = Counter()
    name = f"traces by {settings['model']}"
    with file, tqdm(total=len(jobs), desc=name, disable=not jobs) as bar:
        def on_reply(problem, sample, reply):
            if reply:
                teachers.append_row(file, {"problem_id": problem["id"], "sample": sample} | reply)
            bar.update()

        def on_failure(reason):
            if reason not in failures and len(failures) < 5:
                tqdm.write(f"request failed: {reason}", file=sys.stderr)
            failures[reason] += 1

        if kind == "endpoint":
            teachers.ask_endpoint(
                jobs, settings, on_reply, on_failure, url=args.teacher_url,
                concurrency=args.concurrency, retries=args.retries, timeout_s=args.timeout_s,
                backoff_s=args.backoff_s)
        elif kind == "model":
            sample_model(jobs, settings, on_reply, samples=samples, device=args.device,
                         max_batch=args.max_batch)
        else:
            for problem, sample in jobs:
                on_reply(problem, sample, teachers.SOLUTIONS[kind](problem, sample, settings))
    found, _ = teachers.read_raw(args.records, settings)
    new = [row for job, row in found.items() if job not in traces]
    unanswered = str(len(jobs) - len(new))
    if failures:
        unanswered += f", most common failure: {failures.most_common(1)[0][0]}"
    prompt_tokens = sum(row.get("prompt_tokens", 0) for row in new)
    completion_tokens = sum(row.get("completion_tokens", 0) for row in new)
    cost = f"{prompt_tokens:,} prompt + {completion_tokens:,} completion tokens in this run"
    order = {problem["id"]: i for i, problem in enumerate(problems)}
    rows = [row for row in found.values() if row["problem_id"] in order]
    rows.sort(key=lambda row: (order[row["problem_id"]], row["sample"]))
    return rows, {"unanswered": unanswered, "cost": cost}


class Trace(NamedTuple):
    problem: dict
    raw: dict
    record: dict  # a line of OUT


def make_trace(raw, problem, settings, args):
    answer = problem["answer"]
    if hasattr(family_of(problem), "check_outcome"):  # other answers may be right: keep this one
        answer = extract_answer(raw["text"], strict=True) or ""
    source = {
        "problem_id": problem["id"], "sample": raw["sample"], "split": args.split,
        "finish": raw["finish"], "teacher": settings["teacher"], "model": settings["model"],
    }
    source |= {key: raw[key] for key in ("planted_error", "completion_tokens") if key in raw}
    known = {key: problem[key] for key in ("level", "subject") if key in problem}
    thought = extract_thought(raw["text"])
    return Trace(problem, raw, {
        "id": f"{problem['id']}#{raw['sample']}", "problem": problem["problem"],
        "thought": thought, "answer": answer,
        "response": format_response(thought, answer, args.think_tag), **known, "source": source,
    })


# ---- verification and curation, in stages
# A stage returns for each trace the reason to drop it, or None, and adds its entries for the data
# card to `facts`.


def outcome_faults(traces, args, facts):
    """The answer must be right. A family may have its own outcome check."""
    verdicts = verify_many([(t.raw["text"], t.problem["answer"]) for t in traces], strict=True)
    for i, (problem, _, record) in enumerate(traces):
        family = family_of(problem)
        if hasattr(family, "check_outcome"):
            verdicts[i] = family.check_outcome(problem, record["answer"])
    names = {True: None, False: "the answer is wrong",
             None: "the answer could not be decided in time"}
    return [names[verdict] for verdict in verdicts]


def family_fault(family, problem, thought):
    wrong = family.check_steps(problem, thought)
    if not wrong:
        return None
    index, line, reason = wrong
    return f"a wrong step in {problem['subject']}: line {index + 1}, {line!r}: {reason}"


def process_faults(traces, args, facts):
    """Every step that can be checked must be right."""
    mode = args.steps
    if mode == "auto":
        mode = "text" if args.teacher_url else "family"
    facts["process check"] = {"off": "none", "family": "each family's own, otherwise free text",
                              "text": "free text"}[mode]
    counts = Counter()
    faults = []
    for problem, _, record in traces:
        thought = record["thought"]
        fault = None
        family = family_of(problem) if mode == "family" else None
        if family:
            fault = family_fault(family, problem, thought)
        elif mode != "off":
            if record["source"]["teacher"] == "gsm8k-solutions":
                thought = problem["solution"]  # check its <<...>> annotations as well
            steps = check_text(thought)
            counts.update(step.verdict for step in steps)
            wrong = next((step for step in steps if step.verdict == "wrong"), None)
            if wrong:
                fault = f"a wrong equation: {wrong.text!r}, {wrong.reason}"
        faults.append(fault)
    facts["free-text steps"] = dict(counts)
    return faults


def split_words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text, n):
    words = split_words(text)
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)} or {" ".join(words)}


def form_fault(record, max_chars):
    """Why a trace's form is unacceptable (length, repetition, markup, language), or None."""
    thought = record["thought"]
    if record["source"]["finish"] not in ("stop", "None"):
        return f"cut off: the finish reason is {record['source']['finish']}"
    if not 1 <= len(thought) <= max_chars:
        return f"length: {len(thought)} characters, outside 1 to {max_chars}"
    if re.search(r"</?(?:think|thought)>|<\|\w+\|>", thought):
        return "markup inside the thought"
    lines = Counter(line for line in thought.split("\n") if len(line) > 3)
    num_words = len(split_words(thought))
    monotonous = num_words > 200 and len(ngrams(thought, 4)) < 0.5 * num_words
    if monotonous or max(lines.values(), default=0) > 4:
        return "repetition: the same lines or words over and over"
    foreign = sum(c.isalpha() and ord(c) > 0x24F and not 0x370 <= ord(c) <= 0x3FF for c in thought)
    expected = any(c.isalpha() and ord(c) > 0x3FF for c in record["problem"])
    if foreign > 0.01 * len(thought) and not expected:
        return "language: not the problem's script"
    return None


def form_faults(traces, args, facts):
    return [form_fault(trace.record, args.max_chars) for trace in traces]


def duplicate_faults(traces, args, facts):
    first = {}  # the id of the first trace with this problem and thought
    faults = []
    for _, _, record in traces:
        other = first.setdefault((record["problem"], record["thought"]), record["id"])
        faults.append(f"the same as: {other}" if other != record["id"] else None)
    return faults


def contamination_faults(traces, args, facts):
    """The problem must share no n-gram with a test set; a generated one must be of "train"."""
    n = args.ngram
    grams = {}  # {n-gram: id of its test problem}
    checked = facts["decontaminated against"] = {}  # {set: number of problems, or why unavailable}
    for name in args.decontaminate:
        try:
            problems = load_problems(name, "test")
        except FileNotFoundError as error:
            checked[name] = f"not checked: {error}"
            continue
        checked[name] = len(problems)
        for problem in problems:
            grams |= dict.fromkeys(ngrams(problem["problem"], n), problem["id"])
    faults = []
    for problem, _, _ in traces:
        hit = min(ngrams(problem["problem"], n) & grams.keys(), default=None)
        fault = None
        if hit:
            fault = f"{n} words from {grams[hit].split('/')[0]}: {hit!r} is in {grams[hit]}"
        elif "key" in problem and split_of(problem["key"]) != "train":
            fault = "not in the train split: " + problem["key"]
        faults.append(fault)
    return faults


STAGES = {"outcome": outcome_faults, "process": process_faults, "form": form_faults,
          "duplicate": duplicate_faults, "contamination": contamination_faults}


def add_slip(trace, args):
    """The record; with probability --self-correction, its thought has a slip and its repair."""
    problem, _, record = trace
    family = family_of(problem)
    rng = random.Random(f"slip {args.seed} {record['id']}")
    if not family or rng.random() >= args.self_correction:
        return record
    thought = plant_slip(family, problem, rng)
    assert family.check_steps(problem, thought) is None, (problem, thought)
    if thought == problem["solution"]:
        return record
    return record | {
        "thought": thought, "answer": problem["answer"],
        "response": format_response(thought, problem["answer"], args.think_tag),
        "source": record["source"] | {"self_correction": True},
    }


# ---- the report


def data_card(title, records, dropped, num_raw, facts):
    """Markdown: how the file was made, what was dropped and why, and what remains."""
    stages = []
    for stage, drops in dropped.items():
        counts = Counter(fault.split(":")[0] for _, fault in drops).most_common()
        reasons = "; ".join(f"{reason} {n}" for reason, n in counts)
        example = f"`{drops[0][0]}`: {drops[0][1]}"[:240] if drops else ""
        example = example.replace("|", "\\|").replace("\n", " ")
        stages.append([stage, len(drops), reasons, example])
    lengths = sorted(len(record["thought"]) for record in records)
    cells = Counter(f"{r.get('subject', '-')}:{r.get('level', '-')}" for r in records)
    facts = facts | {
        "characters per thought": f"minimum {lengths[0]}, median {lengths[len(lengths) // 2]}, "
                                  f"maximum {lengths[-1]}",
        "by subject and level": ", ".join(f"{cell} {cells[cell]}" for cell in sorted(cells)),
    }
    return "\n".join([
        f"# {title}\n\nMade by\n\n    python -m data.traces {' '.join(sys.argv[1:])}\n",
        "## Dropped\n", markdown(["stage", "traces", "reasons", "example"], stages),
        f"{len(records)} of {num_raw} raw traces remain.\n",
        "## Facts\n", *(f"- {name}: {value}" for name, value in facts.items()),
        f"\n## Example\n\n```\n{records[0]['problem']}\n\n{records[0]['response']}\n```\n",
    ])


def self_test(count):
    """Print how often each family's checker is wrong; returns whether none ever is."""
    perfect = True
    for name in FAMILIES:
        family = import_module(f"data.{name}")
        rng = random.Random(name)
        rejected = missed = slips = 0
        problems = draw_problems(family, "train", count)
        for problem in problems:
            rejected += family.check_steps(problem, problem["solution"]) is not None
            missed += family.check_steps(problem, plant_error(family, problem, rng)) is None
            slips += family.check_steps(problem, plant_slip(family, problem, rng)) is not None
        perfect &= rejected + missed + slips == 0
        print(f"{name:10} | {len(problems)} problems | right thoughts rejected {rejected} | "
              f"planted errors missed {missed} | repaired slips rejected {slips}", flush=True)
    return perfect


def main(args):
    if args.self_test:
        sys.exit(not self_test(args.self_test))
    problems = {problem["id"]: problem for name in args.data
                for problem in load_problems(name, args.split, args.limit, args.seed)}
    settings = teacher_settings(args)
    raw, run_facts = collect_traces(list(problems.values()), settings, args)
    facts = {"teacher": settings, "problems": len(problems)} | run_facts
    traces = [make_trace(row, problems[row["problem_id"]], settings, args) for row in raw]
    dropped = {}  # {stage: [(id, fault)]}
    for stage, faults_fn in STAGES.items():
        pairs = list(zip(traces, faults_fn(traces, args, facts), strict=True))
        dropped[stage] = [(trace.record["id"], fault) for trace, fault in pairs if fault]
        traces = [trace for trace, fault in pairs if not fault]
    if not traces:
        counts = ", ".join(f"{stage} {len(drops)}" for stage, drops in dropped.items())
        raise ValueError(f"no trace is left; dropped by {counts}; unanswered {facts['unanswered']}")
    records = [add_slip(trace, args) for trace in traces]
    random.Random(args.seed).shuffle(records)
    facts["self-correction"] = sum("self_correction" in record["source"] for record in records)
    planted = [row.get("planted_error", False) for row in raw]
    if any(planted):
        left = [record["source"]["planted_error"] for record in records]
        facts["planted errors"] = f"{sum(planted)}, of which {sum(left)} remain"

    out = Path(args.out)
    card = out.with_suffix(".md")
    write_atomic(card, data_card(out.name, records, dropped, len(raw), facts))
    write_atomic(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    for stage, drops in dropped.items():
        example = f" | {printable(drops[0][1]):.100}" if drops else ""
        print(f"dropped by {stage:16}| {len(drops):6}{example}")
    print(f"{len(records)} of {len(raw)} traces -> {out}, card {card} | {facts['cost']}")


if __name__ == "__main__":
    run_main(main, parse_args)
