"""Accuracy with error bars for any model, problem set and prompt style; the table of all methods.

    python eval.py                                    # the embedded tiny model, 500 unseen problems
    python eval.py --model qwen2.5-1.5b-instruct --data gsm8k       # the protocol behind its 73.2 %
    python eval.py --records a.jsonl; python eval.py --prompt cot --records b.jsonl
    python eval.py --compare a.jsonl b.jsonl          # the two runs, problem by problem
    python eval.py --report                           # one row per method; measures missing rows

An interrupted run with --records resumes when restarted. Every rate has a 95 % interval over
problems; two runs are compared problem by problem (stats.py).
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from collections import ChainMap
from itertools import compress
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

import launch
import model
import stats
from data import load_problems
from data.files import read_rows
from data.mixture import keys_of
from data.prompts import PRESETS, encode_prompt, load_shots, prompt_flag, prompt_hash, render_prompt
from engine import Engine, sampling_params
from generate import add_sampling_flags, completion_text, generate
from launch import at_least, gather_objects, rank_and_world, run_main, say
from run import append_lines, code_commit, read_trained_on
from stats import interval, markdown, percent
from verify import extract_answer, verify_many

ROOT = Path(__file__).resolve().parent
SAMPLING_TEMPERATURE = 0.7  # chosen on dev; shared by all sampling methods, so that they compare
# Defaults of flags that depend on the model: for a tiny one, and for any other.
TINY = {"data": "arithmetic", "prompt": "plain", "max_new_tokens": 128, "max_batch": 256}
OTHERS = {"data": "gsm8k", "prompt": "boxed", "max_new_tokens": 1024, "max_batch": 64}
NOT_SETTINGS = ("system", "max_batch", "engine", "compiled")  # in prompt_hash, or without effect
ANSWER_FIELDS = {"strict": "answer", "lenient": "lenient_answer"}  # grade -> the answer it judges


def add_eval_flags(parser, temperature=0.0, tiny_prompt=TINY["prompt"], prompts=PRESETS):
    """The flags that eval.py, infer_scale.py and refine.py share."""
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--adapter", help="directory of a LoRA adapter (PEFT's format) for the model")
    add("--data", help="problem set or .jsonl file")
    add("--split", default="test", choices=("train", "dev", "test"), help="use dev for tuning")
    add("--limit", type=at_least(0), default=500, help="size of the random subset; 0: all problems")
    add("--data-seed", type=int, default=0, help="seed of the subset and the few-shot examples")
    add("--prompt", type=prompt_flag(prompts), metavar="NAME",
        help=f"prompt style: {', '.join(prompts)}, or your own text containing {{problem}}")
    add("--shots", type=at_least(0), help="number of few-shot examples (default: the prompt's own)")
    add("--shots-from", help="problem set whose train split has the examples (default: --data)")
    add("--grade", choices=ANSWER_FIELDS, help="lenient: no box needed (default: the prompt's own)")
    add_sampling_flags(parser, temperature=temperature, max_new_tokens=None)
    add("--seed", type=int, default=0, help="sampling seed")
    add("--results", default="results.jsonl", help="file to append every result row to")
    add("--records", help="directory or .jsonl file for the record of each problem")
    launch.add_device_flags(parser)
    parser.set_defaults(max_batch=None, tiny_prompt=tiny_prompt)
    parser.epilog = f"defaults if tiny: {TINY | {'prompt': tiny_prompt}}\notherwise: {OTHERS}"


def parse_args(argv=None):
    p = launch.Parser(__doc__)
    add_eval_flags(p)
    add = p.add_argument
    add("--num-samples", type=at_least(1), default=1, help="per problem; > 1 needs --temperature")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two files of records")
    add("--report", action="store_true", help="make the table and plot of all methods")
    add("--sampled-limit", type=at_least(0), default=0, help="for sampled report rows; 0: --limit")
    add("--trained", default="runs/grpo/checkpoints/best", help="GRPO checkpoint for the report")
    add("--out", default="runs/report", help="directory of the report")
    return p.parse_args(argv)


# ---------------------------------------------------------------------- problems in, records out


def make_record(problem, prompt, completions, texts):
    """The record of a problem and its graded samples; a grade of None means undecided."""
    pairs = [(text, problem["answer"]) for text in texts]
    grades = verify_many(pairs, strict=True), verify_many(pairs, strict=False)
    samples = []
    for completion, text, strict, lenient in zip(completions, texts, *grades):
        samples.append({
            "text": text, "answer": extract_answer(text, strict=True),
            "lenient_answer": extract_answer(text), "strict": strict, "lenient": lenient,
            "tokens": len(completion.tokens), "finish": completion.finish,
            "logprob": round(sum(completion.logprobs), 4)})
    return {"id": problem["id"], "level": problem.get("level"), "subject": problem.get("subject"),
            "prompt": prompt, "reference": problem["answer"], "samples": samples}


def prompt_seeds(problems):
    """A seed per problem, from its id alone: its answers do not depend on the other problems."""
    return [zlib.crc32(problem["id"].encode()) for problem in problems]


def evaluate(params, config, tokenizer, problems, *, prompt="plain", system=None, shots=(),
             think_tag="think", num_samples=1, temperature=0.0, keep=None, quiet=False, **sampling):
    """Sample and grade answers to every problem: a list of records (dicts), in the same order.

    Every process calls this with the same problems, samples its share and gets all records. A
    record does not depend on the other problems, the batch size or the number of processes.
    prompt, system, shots, think_tag: as for render_prompt. sampling: more keywords of generate().
    keep(record): called, on the process that sampled it, as soon as a record is complete.
    quiet: show progress on a terminal only.
    """
    rank, world = rank_and_world()
    share = problems[rank::world]
    prompt_options = {"system": system, "shots": shots, "think_tag": think_tag}
    stop_tokens = model.end_tokens(tokenizer, config)
    stop_strings = PRESETS[prompt].stop
    records = {}
    last = time.perf_counter()

    def on_done(i, completions):
        nonlocal last
        problem = share[i]
        texts = [completion_text(tokenizer, c, stop_tokens, stop_strings) for c in completions]
        prompt_text = render_prompt(prompt, problem, **prompt_options)
        record = make_record(problem, prompt_text, completions, texts)
        now = time.perf_counter()
        record["seconds"] = round((now - last) / world, 4)  # they add up to the run's wall time
        last = now
        records[problem["id"]] = record
        if keep:
            keep(record)

    prompts = [encode_prompt(tokenizer, prompt, p, **prompt_options) for p in share]
    with launch.progress_bar(len(problems) * num_samples, quiet=quiet) as on_step:
        generate(params, config, prompts, num_samples=num_samples, temperature=temperature,
                 stop_tokens=stop_tokens, stop_strings=stop_strings, tokenizer=tokenizer,
                 think_tag=think_tag, seeds=prompt_seeds(share), on_step=on_step, on_done=on_done,
                 **sampling)
    gathered = ChainMap(*gather_objects(records))
    return [gathered[problem["id"]] for problem in problems]


def read_records(path, settings=None):
    """{id: record} of a file of records; an incomplete last line, left by a crash, is ignored.

    settings: of the run to resume. Raises ValueError for a record with others, or for a bad line.
    """
    records = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
            changes = list_changes(record["settings"], settings or {})
            valid = all("logprob" in sample for sample in record["samples"])
        except (ValueError, LookupError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(f"{path}, line {number}: not a record of eval.py")
        if changes:
            raise ValueError(f"{path} belongs to a run with other settings ({changes}); choose "
                             "another --records")
    return records


def list_changes(old, new):
    """The settings that differ, as text: "seed 0 -> 1, top_k 0 -> 20"."""
    return ", ".join(f"{name} {old.get(name)!r} -> {value!r}" for name, value in new.items()
                     if old.get(name) != value)


# ---------------------------------------------------------------------- which problems


def keep_only(problems, fits, why, remedy):
    """The problems that fit (one bool each). Print how many do not; ValueError if none is left."""
    kept = list(compress(problems, fits))
    dropped = len(problems) - len(kept)
    message = f"{dropped} of {len(problems)} {why}"
    if problems and not kept:
        raise ValueError(f"{message}; {remedy}")
    if dropped:
        say(message)
    return kept


def fit_context(problems, prompts, config, reply_tokens):
    """The (problems, prompts) that leave room for `reply_tokens` new tokens in the context."""
    fits = [len(prompt) + reply_tokens <= config.max_context for prompt in prompts]
    kept = keep_only(problems, fits, "problems dropped: their prompts leave no room for "
                     f"{reply_tokens} new tokens in the context of {config.max_context}",
                     "try a smaller --max-new-tokens or fewer few-shot examples")
    return kept, list(compress(prompts, fits))


def drop_long_prompts(problems, tokenizer, config, prompt, reply_tokens, **options):
    """The problems whose prompt leaves room for `reply_tokens`. options: as for render_prompt."""
    prompts = [encode_prompt(tokenizer, prompt, problem, **options) for problem in problems]
    return fit_context(problems, prompts, config, reply_tokens)[0]


def drop_held_out(problems, keys, held_out, name):
    """The training problems of the set `name` whose keys are not among `held_out`."""
    held_out = set(held_out)
    return keep_only(problems, [key not in held_out for key in keys],
                     f"training problems of {name} are also held out for evaluation: dropped",
                     "change --data or --eval-data")


# ---------------------------------------------------------------------- setup from flags


class Setup(NamedTuple):
    """A model, the problems to evaluate it on, and how to sample."""
    params: dict  # in the sampler's form
    config: tuple
    tokenizer: object
    problems: list
    prompts: list  # token ids, one list per problem
    options: dict  # keyword arguments of evaluate()
    settings: dict  # identify a row, together with its method and the options
    grade: str = "strict"  # the one reported as accuracy
    trained_on: frozenset = frozenset()  # ids of problems in the model's training data
    records: Path | None = None  # a directory for files of records, or one .jsonl file
    results: str | None = None  # the file of result rows


def weights_hash(*directories):
    """Eight hex characters that identify the weights in these directories: their paths do not.
    Hashes three samples of 1 MiB per file. None entries are skipped."""
    digest = hashlib.sha256()
    for directory in filter(None, directories):
        for path in sorted(Path(directory).glob("*.safetensors")):
            if path.is_file() and path.stat().st_size:
                content = np.memmap(path, mode="r")
                for begin in (0, len(content) // 2, max(0, len(content) - 2**20)):
                    digest.update(content[begin:begin + 2**20])
    return digest.hexdigest()[:8]


def fill_defaults(args, config):
    """Set the flags whose defaults depend on the model. Writes into `args`."""
    defaults = TINY | {"prompt": args.tiny_prompt} if model.is_tiny(config) else OTHERS
    launch.fill_unset(args, defaults)


def settings_of(setup, **changes):
    """Everything that a record depends on, as saved in records and rows."""
    options = setup.options | changes
    prompt_options = {name: options[name] for name in ("system", "shots", "think_tag")}
    named = {name: value for name, value in options.items() if name not in NOT_SETTINGS}
    prompt_id = prompt_hash(options["prompt"], **prompt_options)
    return setup.settings | named | {"shots": len(options["shots"]), "prompt_hash": prompt_id}


def plan_processes(args, params, config, context):
    """Default of --processes for rows of up to `context` tokens."""
    # 8 bytes a number: weights are read as float32 and then packed; growing a cache copies it.
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    own = args.max_batch * (context * slot + config.vocab_size)
    shared = sum(tensor.shape.numel() for tensor in params.values())
    return launch.default_processes(args.device, 0.25 + own / 2**27, shared / 2**27)


def load_setup(args, replies=1):
    """The Setup that the flags describe, in each of --processes.

    replies: number of completions, of --max-new-tokens each, that must fit in the context.
    """
    if args.temperature == 0 and getattr(args, "num_samples", 1) > 1:
        raise ValueError(f"{args.num_samples} samples at temperature 0 would be identical; set "
                         "--temperature or use a single sample")
    append_lines(args.results, [])  # create it, or fail before sampling
    device = launch.find_device(args.device)
    dtype = launch.compute_dtype(args.dtype, device)
    path = model.resolve_model(args.model)
    config = model.load_config(path)
    tokenizer = model.load_tokenizer(path)
    fill_defaults(args, config)
    preset = PRESETS[args.prompt]
    loaded = load_problems(args.data, args.split, args.limit or None, args.data_seed)
    num_shots = preset.shots if args.shots is None else args.shots
    shots = load_shots(args.shots_from or args.data, num_shots, args.data_seed, loaded)
    prompt_options = {"system": model.load_system_prompt(path), "shots": shots,
                      "think_tag": args.think_tag}
    prompts = [encode_prompt(tokenizer, args.prompt, p, **prompt_options) for p in loaded]
    problems, prompts = fit_context(loaded, prompts, config, replies * args.max_new_tokens)
    names = ("prompt", "temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_batch")
    options = {name: getattr(args, name) for name in names} | prompt_options | {
        "num_samples": 1, "engine": Engine(), "compiled": args.compile}
    settings = {"model": args.model, "weights": weights_hash(path, args.adapter),
                "data": args.data, "split": args.split, "data_seed": args.data_seed,
                "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if len(problems) < len(loaded):
        settings["asked"] = len(loaded)
    known = read_trained_on(path, args.adapter)
    trained_on = {p["id"] for p, key in zip(problems, keys_of(problems)) if key in known}
    params = model.load_params(path, "cpu", dtype, args.adapter)
    params = sampling_params(params, config, device=device)
    context = max(map(len, prompts)) + replies * args.max_new_tokens
    default = plan_processes(args, params, config, context)
    launch.init_distributed(args.device, args.processes or default)
    setup = Setup(params, config, tokenizer, problems, prompts, options, settings,
                  args.grade or preset.grade, trained_on, args.records and Path(args.records),
                  args.results)
    say(", ".join(f"{name.replace('_', ' ')} {v}" for name, v in settings_of(setup).items()))
    return setup


def collect_records(setup, name="records", **changes):
    """(records, settings for their rows) of evaluate() on a setup, with `changes` to its options.

    Records already in setup.records, or in NAME.jsonl if that is a directory, are reused.
    """
    options = setup.options | changes
    settings = settings_of(setup, **changes)
    path = setup.records
    if path and path.suffix != ".jsonl":
        path = path / f"{name}.jsonl"
    done = {}
    if path:
        append_lines(path, [])  # create it, or fail before sampling
        if rank_and_world()[0] == 0:
            done = read_records(path, settings)
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # drop an incomplete last line
    done = gather_objects(done)[0]
    todo = [p for p in setup.problems if p["id"] not in done]

    def keep(record):
        append_lines(path, [record | {"settings": settings}])

    records = evaluate(setup.params, setup.config, setup.tokenizer, todo,
                       keep=keep if path else None, **options)
    done |= {record["id"]: record for record in records}
    row_settings = settings | {"grade": setup.grade, "max_batch": options["max_batch"]}
    return [done[p["id"]] for p in setup.problems], row_settings


# ---------------------------------------------------------------------- result rows


def votes_of(record, grade="strict"):
    """(votes, right): the answer class of each sample, None if it has no answer; right classes."""
    votes = stats.pool_answers([s[ANSWER_FIELDS[grade]] for s in record["samples"]])
    right = {v for v, s in zip(votes, record["samples"]) if s[grade] and v is not None}
    return votes, right


def rates_by_level(records, scores, tokens):
    """{level: [accuracy, low, high, number of problems, mean tokens]}"""
    levels = [record.get("level") for record in records]
    rates = {}
    for level in sorted(set(levels) - {None}):
        at_level = [other == level for other in levels]
        members = list(compress(scores, at_level))
        rates[str(level)] = [*interval(members), len(members), fmean(compress(tokens, at_level))]
    return rates


def score_row(records, scores, tokens, seconds, **settings):
    """A result row: accuracy with its interval, accuracy by level, and cost.

    records: dicts with "id" and "level". scores, tokens: one per record. seconds: total.
    """
    accuracy, low, high = interval(scores)
    return settings | {
        "n": len(records), "accuracy": accuracy, "low": low, "high": high,
        "tokens_mean": fmean(tokens), "seconds": seconds,
        "levels": rates_by_level(records, scores, tokens),
        "scores": {record["id"]: score for record, score in zip(records, scores)}}


def cost_row(records, outcomes, **settings):
    """score_row() of a method that uses part of each pool: outcomes are (success, samples used)."""
    scores, drawn = zip(*outcomes)
    tokens = [n * fmean(s["tokens"] for s in r["samples"]) for n, r in zip(drawn, records)]
    seconds = sum(n * r["seconds"] / len(r["samples"]) for n, r in zip(drawn, records))
    return score_row(records, scores, tokens, seconds, samples=fmean(drawn), **settings)


def problem_rates(record, grade):
    """{name: rate} over one problem's samples, with pass@k and maj@k if there are several."""
    samples = record["samples"]
    n = len(samples)
    rates = {name: fmean(s[name] is True for s in samples) for name in ANSWER_FIELDS}
    rates["cut off"] = fmean(s["finish"] != "stop" for s in samples)
    rates["no answer"] = fmean(s[ANSWER_FIELDS[grade]] is None for s in samples)
    rates["undecided"] = fmean(s[grade] is None for s in samples)
    votes, right = votes_of(record, grade)
    correct = sum(s[grade] is True for s in samples)
    for k in (1, 2, 5, 10, 20, 50):
        if 1 < n >= k:
            rates[f"pass@{k}"] = stats.pass_at_k(n, correct, k)
            rates[f"maj@{k}"] = stats.maj_at_k(votes, right, k)
    return rates


def summarize(records, *, grade, **settings):
    """The row of a run, at the cost of one sample per problem; undecided answers count as wrong.
    "rates" holds its other rates."""
    rates = [problem_rates(record, grade) for record in records]
    row = cost_row(records, [(r[grade], 1) for r in rates], grade=grade, **settings)
    return row | {"rates": {name: interval([r[name] for r in rates]) for name in rates[0]}}


def measure(setup, method, name="records", **changes):
    """summarize() of collect_records()."""
    records, settings = collect_records(setup, name, **changes)
    return summarize(records, method=method, **settings)


def append_rows(path, rows):
    """Append rows to the results file, with their command and versions; on process 0 only."""
    source = {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
              "commit": code_commit(), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
              "time": time.strftime("%F %T")}
    if rank_and_world()[0] == 0:
        append_lines(path, [row | source for row in rows])


def publish(setup, rows):
    """Print rows as a table and save them; also print accuracy without the training problems."""
    say_table(*table(rows))
    if setup.trained_on:
        say(f"warning: the model was trained on {len(setup.trained_on)} of these "
            f"{len(setup.problems)} problems")
    for row in rows:
        others = [score for i, score in row["scores"].items() if i not in setup.trained_on]
        if 0 < len(others) < len(row["scores"]):
            say(f"{row['method']}: {percent(*interval(others))} % without them")
    append_rows(setup.results, rows)


def say_table(head, rows):
    """Print a table as Markdown or, if the terminal is too narrow, one cell per line."""
    text = markdown(head, rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    if max(map(len, text.splitlines())) <= width:
        return say(text)
    longest = max(map(len, head))
    for row in rows:
        say("".join(f"{name:{longest}}  {cell}\n" for name, cell in zip(head, row)))


def paired_scores(a, b):
    """(scores of row a, scores of row b) on the problems they share."""
    shared = [i for i in a["scores"] if i in b["scores"]]
    return [a["scores"][i] for i in shared], [b["scores"][i] for i in shared]


def difference(row, baseline):
    """(mean, low, high) of the row's accuracy minus the baseline's, on the problems they share."""
    return stats.paired_bootstrap(*paired_scores(baseline, row))


def format_gain(row, baseline):
    """The difference in percentage points, with its interval: "+1.0 [-0.5, +2.5]"."""
    mean, low, high = (100 * value for value in difference(row, baseline))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(rows):
    """(header, lines of cells) of result rows, each compared with the first."""
    lines = []
    for row in rows:
        levels = {f"level {level}": percent(row["levels"].get(level, [math.nan])[0])
                  for level in rows[0]["levels"]}
        lines.append({
            "method": row["method"],
            "accuracy, % [95 %]": percent(row["accuracy"], row["low"], row["high"]),
            "points over the first": format_gain(row, rows[0]), **levels,
            "tokens per problem": round(row["tokens_mean"]),
            "seconds per problem": f"{row['seconds'] / row['n']:.3f}", **row.get("cells", {})})
    return list(lines[0]), [list(line.values()) for line in lines]


def compare(paths, grade=None):
    """Print how two files of records differ, over the problems they share."""
    runs = [read_records(path) for path in paths]
    shared = [i for i in runs[0] if i in runs[1]]
    if not shared:
        raise ValueError(f"{' and '.join(paths)} have no problem in common")
    rows = []
    for path, records in zip(paths, runs):
        settings = records[shared[0]]["settings"]
        rows.append(summarize([records[i] for i in shared], settings=settings,
                              grade=grade or PRESETS[settings["prompt"]].grade,
                              method=f"{path} ({len(shared)} of {len(records)})"))
    say_table(*table(rows))
    say(f"settings that differ: {list_changes(*[row['settings'] for row in rows]) or 'none'}")
    a, b = paired_scores(*rows)
    if {*a, *b} <= {0, 1}:
        say(stats.gains(a, b))


# ---------------------------------------------------------------------- the report of all methods


REPORT = [  # label, model, prompt, script that measures the row, its method there
    ("base", "base", "plain", "eval.py", "greedy"),
    ("+ chain of thought", "base", "cot", "eval.py", "greedy"),
    ("+ chain of thought, sampled once", "base", "cot", "infer_scale.py", "one sample"),
    ("+ self-consistency, N = 10", "base", "cot", "infer_scale.py", "majority of 10"),
    ("+ self-refinement, K = 2", "base", "cot", "refine.py", "refine, K = 2"),
    ("self-consistency at its tokens", "base", "cot", "refine.py",
     "self-consistency at the tokens of K = 2"),
    ("+ GRPO", "trained", "plain", "eval.py", "greedy"),
    ("base, sampled", "base", "plain", "eval.py", "sampled"),  # is GRPO more than sharpening?
    ("+ GRPO, sampled", "trained", "plain", "eval.py", "sampled")]  # compare their pass@10
REPORT_FLAGS = ("model", "prompt", "shots", "shots_from", "num_samples", "temperature", "records",
                "limit", "report", "sampled_limit", "trained", "out")  # not passed on as they are


def find_row(path, **wanted):
    """The latest row of a results file with these fields, or None."""
    if not Path(path).is_file():
        return None
    latest = None
    for _, row in read_rows(path):
        row = {"asked": row.get("n")} | row
        if wanted.items() <= row.items():
            latest = row
    return latest


def run_script(script, *flags):
    print(f"\n$ python {script} {' '.join(flags)}", flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
        raise ValueError(f"{script} failed with exit code {code}; its error message is above")


def draw_cost(rows, path):
    """Plot accuracy against tokens per problem."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{path} was not drawn; pip install matplotlib")
    axes = Figure((7, 4.5), dpi=150).subplots()
    axes.set(xlabel="tokens per problem", ylabel="accuracy", ylim=(0, 1), xscale="log")
    for row in rows:
        bar = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes.errorbar(row["tokens_mean"], row["accuracy"], bar, fmt="o", label=row["method"])
    axes.legend(fontsize=7)
    axes.figure.savefig(path, bbox_inches="tight")


def report(args):
    """Write one row per method as Markdown and a plot, measuring rows that the results lack."""
    if args.adapter:
        raise ValueError(f"--adapter {args.adapter}: --report compares --model with --trained; "
                         "pass the merged checkpoint as --trained")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    models = {"base": args.model, "trained": args.trained}
    paths = {name: model.resolve_model(path) for name, path in models.items()}
    config = model.load_config(paths["base"])
    defaults = vars(parse_args([]))
    shared = [f"{launch.flag_name(name)}={value}".removesuffix("=True")
              for name, value in vars(args).items()
              if name not in REPORT_FLAGS and value != defaults[name]]
    fill_defaults(args, config)
    rows = []
    for label, name, prompt, script, method in REPORT:
        if not model.is_tiny(config):  # grpo.py's default prompt already asks for steps
            prompt = "direct" if label == "base" else "boxed"
        greedy = method == "greedy"
        temperature = 0.0 if greedy else SAMPLING_TEMPERATURE
        limit = args.limit if greedy else args.sampled_limit or args.limit
        wanted = {"data": args.data, "split": args.split, "data_seed": args.data_seed, "shots": 0,
                  "asked": len(load_problems(args.data, args.split, limit or None, args.data_seed)),
                  "weights": weights_hash(paths[name]), "prompt": prompt, "method": method,
                  "grade": args.grade or PRESETS[prompt].grade, "temperature": temperature,
                  "seed": args.seed}
        if not find_row(args.results, **wanted):
            extra = ["--num-samples=10"] if method == "sampled" else []
            run_script(script, f"--model={models[name]}", f"--prompt={prompt}",
                       f"--limit={limit}", f"--temperature={temperature}", *extra, *shared)
        row = find_row(args.results, **wanted)
        pass_10 = row.get("rates", {}).get("pass@10")
        rows.append(row | {"method": label, "cells": {
            "problems": row["n"], "pass@10": percent(*pass_10) if pass_10 else "",
            "command": f"`{row['command']}`"}})
    head, lines = table(rows)
    title = f"{args.model} on {args.data}/{args.split}\n\n"
    (out / "results.md").write_text(title + markdown(head, lines), "utf-8")
    say_table(head, lines)
    print(f"written to {out}/results.md")
    draw_cost(rows, out / "report.png")


def main(args):
    if args.compare:
        return compare(args.compare, args.grade)
    if args.report:
        return report(args)
    setup = load_setup(args)
    row = measure(setup, "sampled" if args.temperature else "greedy", num_samples=args.num_samples)
    publish(setup, [row])
    for name, rates in row["rates"].items():
        say(f"{name}: {percent(*rates)} %")
    for level, (*rates, n, tokens) in row["levels"].items():
        say(f"level {level}: {percent(*rates)} % of {n} in {tokens:.0f} tokens")


if __name__ == "__main__":
    run_main(main, parse_args)
