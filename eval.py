"""Accuracy with error bars: any model, any problem set, a named prompt; and the table of methods.

    python eval.py                                    # the embedded tiny model, 500 unseen problems
    python eval.py --model qwen2.5-1.5b-instruct --data gsm8k       # the protocol behind its 73.2 %
    python eval.py --records a.jsonl; python eval.py --prompt cot --records b.jsonl
    python eval.py --compare a.jsonl b.jsonl          # the two runs, problem by problem
    python eval.py --report                           # a row per method; measures what is missing

A run with --records can be interrupted and goes on where it was. Every rate has a 95 % interval
over problems, and two runs are compared problem by problem (stats.py).
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
SAMPLING_TEMPERATURE = 0.7  # one for all methods that sample, so that they compare; chosen on dev
# What a flag left out means, for a tiny model and for any other.
TINY = {"data": "arithmetic", "prompt": "plain", "max_new_tokens": 128, "max_batch": 256}
OTHERS = {"data": "gsm8k", "prompt": "boxed", "max_new_tokens": 1024, "max_batch": 64}
NO_SETTINGS = ("system", "max_batch", "engine", "compiled")  # options that no answer depends on
ANSWER = {"strict": "answer", "lenient": "lenient_answer"}  # the field that each grade is about


def add_eval_flags(parser, temperature=0.0, tiny_prompt=TINY["prompt"], prompts=PRESETS):
    """The flags that eval.py, infer_scale.py and refine.py share."""
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--adapter", help="directory of a LoRA adapter (PEFT's format) for the model")
    add("--data", help="problem set or .jsonl file")
    add("--split", default="test", choices=("train", "dev", "test"), help="make choices on dev")
    add("--limit", type=at_least(0), default=500, help="problems, a random subset; 0: all")
    add("--data-seed", type=int, default=0, help="chooses the subset and the solved examples")
    add("--prompt", type=prompt_flag(prompts), metavar="NAME",
        help=f"how a problem is put: {', '.join(prompts)}, or your text with {{problem}} in it")
    add("--shots", type=at_least(0), help="solved examples first (default: the prompt's own)")
    add("--shots-from", help="problem set whose train split has the examples (default: --data)")
    add("--grade", choices=ANSWER, help="lenient: no box is needed (default: the prompt's own)")
    add_sampling_flags(parser, temperature=temperature, max_new_tokens=None)
    add("--seed", type=int, default=0, help="of the sampling")
    add("--results", default="results.jsonl", help="every measured row is appended to this file")
    add("--records", help="directory or .jsonl file that keeps the record of each problem")
    launch.add_device_flags(parser)
    parser.set_defaults(max_batch=None, tiny_prompt=tiny_prompt)
    parser.epilog = f"defaults if tiny: {TINY | {'prompt': tiny_prompt}}\notherwise: {OTHERS}"


def parse_args(argv=None):
    p = launch.Parser(__doc__)
    add_eval_flags(p)
    add = p.add_argument
    add("--num-samples", type=at_least(1), default=1, help="per problem; more need --temperature")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two files of records")
    add("--report", action="store_true", help="the table and plot of all methods")
    add("--sampled-limit", type=at_least(0), default=0,
        help="problems of the report's rows that sample; 0: as --limit")
    add("--trained", default="runs/grpo/checkpoints/best", help="the report's GRPO checkpoint")
    add("--out", default="runs/report", help="where the report goes")
    return p.parse_args(argv)


# ---------------------------------------------------------------------- problems in, records out


def make_record(problem, prompt, completions, texts):
    """What is kept of a problem and its answers; strict, lenient None: undecided."""
    pairs = [(text, problem["answer"]) for text in texts]
    verdicts = zip(verify_many(pairs, strict=True), verify_many(pairs, strict=False))
    samples = [{"text": text, "answer": extract_answer(text, strict=True),
                "lenient_answer": extract_answer(text), "strict": strict, "lenient": lenient,
                "tokens": len(c.tokens), "finish": c.finish, "logprob": round(sum(c.logprobs), 4)}
               for c, text, (strict, lenient) in zip(completions, texts, verdicts)]
    return {"id": problem["id"], "level": problem.get("level"), "subject": problem.get("subject"),
            "prompt": prompt, "reference": problem["answer"], "samples": samples}


def prompt_seeds(problems):
    """For `generate`: what a problem is answered does not depend on the others."""
    return [zlib.crc32(problem["id"].encode()) for problem in problems]


def evaluate(params, config, tokenizer, problems, *, prompt="plain", system=None, shots=(),
             think_tag="think", num_samples=1, temperature=0.0, keep=None, quiet=False, **sampling):
    """Ask every problem and grade what comes: a record (dict) for each, in their order.

    Every process calls this with the same problems, asks its share of them and gets all records; a
    record depends neither on the other problems nor on the batch nor on the number of processes.
    prompt, system, shots, think_tag: as for render_prompt. sampling: more keywords of generate().
    keep(record): called, by the process that asked, as soon as a problem has all its answers.
    quiet: the progress is shown on a terminal only.
    """
    rank, world = rank_and_world()
    mine = problems[rank::world]
    form = {"system": system, "shots": shots, "think_tag": think_tag}
    ends = model.end_tokens(tokenizer, config)
    stop = PRESETS[prompt].stop
    answers = [[None] * num_samples for _ in mine]
    records = {}
    last = time.perf_counter()

    def finish(problem, completions):
        nonlocal last
        texts = [completion_text(tokenizer, c, ends, stop) for c in completions]
        text = render_prompt(prompt, problem, **form)
        record = make_record(problem, text, completions, texts)
        now = time.perf_counter()
        record["seconds"] = round((now - last) / world, 4)  # of a run: their sum
        last = now
        records[problem["id"]] = record
        if keep:
            keep(record)

    with launch.progress_bar(len(problems) * num_samples, quiet=quiet) as show:
        def on_step(ended, num_tokens):
            for i, sample, completion in ended:
                answers[i][sample] = completion
                if None not in answers[i]:
                    finish(mine[i], answers[i])
            show(ended, num_tokens)

        generate(params, config, [encode_prompt(tokenizer, prompt, p, **form) for p in mine],
                 num_samples=num_samples, temperature=temperature, stop_tokens=ends,
                 stop_strings=stop, tokenizer=tokenizer, think_tag=think_tag,
                 seeds=prompt_seeds(mine), on_step=on_step, **sampling)
    found = ChainMap(*gather_objects(records))
    return [found[problem["id"]] for problem in problems]


def read_records(path, settings=None):
    """{id: record} of a file of records, without a last line that a crash cut off.

    settings: those of the run that would go on; ValueError if the records have others.
    """
    records = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
            changes = list_changes(record["settings"], settings or {})
            whole = all("logprob" in sample for sample in record["samples"])
        except (ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}, line {number}: not a record of eval.py")
        if changes:
            raise ValueError(f"{path} holds a run with other settings ({changes} now); give "
                             "another --records")
    return records


def list_changes(old, new):
    """The settings that differ, as text."""
    return ", ".join(f"{name} {old.get(name)!r}, {value!r}" for name, value in new.items()
                     if old.get(name) != value)


# ---------------------------------------------------------------------- which problems


def drop(problems, fits, why, remedy):
    """The problems that fit (a bool each). Says how many do not; ValueError when none does."""
    kept = list(compress(problems, fits))
    left_out = len(problems) - len(kept)
    said = f"{left_out} of {len(problems)} {why}"
    if problems and not kept:
        raise ValueError(f"{said}; {remedy}")
    if left_out:
        say(said)
    return kept


def fit_context(problems, prompts, config, reply_tokens):
    """(problems, prompts) of those whose prompt leaves room for so many tokens in the context."""
    fits = [len(prompt) + reply_tokens <= config.max_context for prompt in prompts]
    kept = drop(problems, fits, "problems are left out: their prompts leave no room for "
                f"{reply_tokens} new tokens in the context of {config.max_context}",
                "try a smaller --max-new-tokens, or fewer solved examples")
    return kept, list(compress(prompts, fits))


def drop_long_prompts(problems, tokenizer, config, prompt, reply_tokens, **form):
    """The problems whose prompt leaves room for `reply_tokens`. form: as for render_prompt."""
    prompts = [encode_prompt(tokenizer, prompt, problem, **form) for problem in problems]
    return fit_context(problems, prompts, config, reply_tokens)[0]


def leave_out(problems, keys, held_out, name):
    """The training problems of the set `name` whose keys are not among `held_out`."""
    held_out = set(held_out)
    return drop(problems, [key not in held_out for key in keys],
                f"training problems of {name} are also held out for evaluation: they are left out "
                "of training", "change --data or --eval-data")


# ---------------------------------------------------------------------- the setup that flags name


class Setup(NamedTuple):
    """A model, the problems that it is asked, and how."""
    params: dict  # as the sampler takes them
    config: tuple
    tokenizer: object
    problems: list
    prompts: list  # token ids, one for each problem
    options: dict  # keyword arguments of evaluate()
    settings: dict  # what identifies a row, beside its method and the options
    grade: str = "strict"  # which one counts
    trained_on: frozenset = frozenset()  # ids of problems
    records: Path | None = None  # a directory for files of records, or one such file
    results: str | None = None  # the file of rows


def weights_hash(*directories):
    """Eight characters that change with the weights in the directories (None stands for no
    directory); a path does not say which weights it held."""
    digest = hashlib.sha256()
    for directory in filter(None, directories):
        for path in sorted(Path(directory).glob("*.safetensors")):
            if path.is_file() and path.stat().st_size:
                content = np.memmap(path, mode="r")
                for begin in (0, len(content) // 2, max(0, len(content) - 2**20)):
                    digest.update(content[begin:begin + 2**20])
    return digest.hexdigest()[:8]


def fill_defaults(args, config):
    """Fill in the flags that were left out and depend on the model. Writes into `args`."""
    defaults = TINY | {"prompt": args.tiny_prompt} if model.is_tiny(config) else OTHERS
    launch.fill_unset(args, defaults)


def settings_of(setup, **changes):
    """Everything that a record depends on, as rows and records carry it."""
    options = setup.options | changes
    form = {name: options[name] for name in ("system", "shots", "think_tag")}
    named = {k: v for k, v in options.items() if k not in NO_SETTINGS}
    return setup.settings | named | {"shots": len(options["shots"]),
                                     "prompt_hash": prompt_hash(options["prompt"], **form)}


def load_setup(args, replies=1):
    """The Setup that the flags name, in each of --processes.

    replies: how many completions of --max-new-tokens a context has to hold.
    """
    if args.temperature == 0 and getattr(args, "num_samples", 1) > 1:
        raise ValueError(f"{args.num_samples} samples at temperature 0 would all be the same; give "
                         "a --temperature, or ask for one sample")
    append_lines(args.results, [])  # what could not be kept need not be measured
    device = launch.find_device(args.device)
    dtype = launch.compute_dtype(args.dtype, device)
    path = model.resolve_model(args.model)
    config = model.load_config(path)
    tokenizer = model.load_tokenizer(path)
    fill_defaults(args, config)
    preset = PRESETS[args.prompt]
    asked = load_problems(args.data, args.split, args.limit or None, args.data_seed)
    shots = load_shots(args.shots_from or args.data,
                       preset.shots if args.shots is None else args.shots, args.data_seed, asked)
    form = {"system": model.load_system_prompt(path), "shots": shots, "think_tag": args.think_tag}
    prompts = [encode_prompt(tokenizer, args.prompt, p, **form) for p in asked]
    problems, prompts = fit_context(asked, prompts, config, replies * args.max_new_tokens)
    names = ("prompt", "temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_batch")
    options = {name: getattr(args, name) for name in names} | form | {
        "num_samples": 1, "engine": Engine(), "compiled": args.compile}
    settings = {"model": args.model, "weights": weights_hash(path, args.adapter),
                "data": args.data, "split": args.split, "data_seed": args.data_seed,
                "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if len(problems) < len(asked):
        settings["asked"] = len(asked)
    known = read_trained_on(path, args.adapter)
    trained_on = {p["id"] for p, key in zip(problems, keys_of(problems)) if key in known}
    params = model.load_params(path, "cpu", dtype, args.adapter)
    params = sampling_params(params, config, device=device)
    # Weights count as float32, as they are read; caches count twice, for growing one copies it.
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    context = max(map(len, prompts)) + replies * args.max_new_tokens
    own = args.max_batch * (context * slot + config.vocab_size)
    shared = sum(tensor.shape.numel() for tensor in params.values())
    default = launch.default_processes(args.device, 0.25 + own / 2**27, shared / 2**27)
    launch.init_distributed(args.device, args.processes or default)
    setup = Setup(params, config, tokenizer, problems, prompts, options, settings,
                  args.grade or preset.grade, trained_on, args.records and Path(args.records),
                  args.results)
    say(", ".join(f"{name.replace('_', ' ')} {v}" for name, v in settings_of(setup).items()))
    return setup


def collect_records(setup, name="records", **changes):
    """evaluate() for a setup, some of its options changed: (records, settings of their rows).

    What setup.records, or the file of this name there, holds already is not asked again.
    """
    options = setup.options | changes
    settings = settings_of(setup, **changes)
    path = setup.records
    if path and path.suffix != ".jsonl":
        path = path / f"{name}.jsonl"
    done = {}
    if path and path.is_file() and rank_and_world()[0] == 0:
        done = read_records(path, settings)
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a line cut off goes
    done = gather_objects(done)[0]
    todo = [p for p in setup.problems if p["id"] not in done]

    def keep(*records):
        if path:
            append_lines(path, [record | {"settings": settings} for record in records])

    keep()  # what could not be kept need not be asked
    records = evaluate(setup.params, setup.config, setup.tokenizer, todo, keep=keep, **options)
    done |= {record["id"]: record for record in records}
    row_settings = settings | {"grade": setup.grade, "max_batch": options["max_batch"]}
    return [done[p["id"]] for p in setup.problems], row_settings


# ---------------------------------------------------------------------- rows: what a run comes to


def votes_of(record, grade="strict"):
    """(the class that each sample votes for, None without an answer; the classes that are right)"""
    votes = stats.pool_answers([s[ANSWER[grade]] for s in record["samples"]])
    right = {v for v, s in zip(votes, record["samples"]) if s[grade] and v is not None}
    return votes, right


def rates_by_level(records, scores, tokens):
    """{level: [accuracy, low, high, problems, tokens]}"""
    levels = [record.get("level") for record in records]
    rates = {}
    for level in sorted(set(levels) - {None}):
        mine = [other == level for other in levels]
        members = list(compress(scores, mine))
        rates[str(level)] = [*interval(members), len(members), fmean(compress(tokens, mine))]
    return rates


def score_row(records, scores, tokens, seconds, **settings):
    """A row of results: accuracy with its interval, by level, and what it cost.

    records: anything with "id" and "level", such as the problems. scores, tokens: one for each.
    seconds: for all together.
    """
    accuracy, low, high = interval(scores)
    return settings | {
        "n": len(records), "accuracy": accuracy, "low": low, "high": high,
        "tokens_mean": fmean(tokens), "seconds": seconds,
        "levels": rates_by_level(records, scores, tokens),
        "scores": {record["id"]: score for record, score in zip(records, scores)}}


def cost_row(records, outcomes, **settings):
    """score_row of a method that uses part of each pool: (its success, samples used) of each."""
    scores, drawn = zip(*outcomes)
    tokens = [n * fmean(s["tokens"] for s in r["samples"]) for n, r in zip(drawn, records)]
    seconds = sum(n * r["seconds"] / len(r["samples"]) for n, r in zip(drawn, records))
    return score_row(records, scores, tokens, seconds, samples=fmean(drawn), **settings)


def rates_of(record, grade):
    """{name: share of the samples of a problem, or success of k of them}"""
    samples = record["samples"]
    n = len(samples)
    rates = {name: fmean(s[name] is True for s in samples) for name in ANSWER}
    rates["cut off"] = fmean(s["finish"] != "stop" for s in samples)
    rates["no answer"] = fmean(s[ANSWER[grade]] is None for s in samples)
    rates["undecided"] = fmean(s[grade] is None for s in samples)
    votes, right = votes_of(record, grade)
    correct = sum(s[grade] is True for s in samples)
    for k in (1, 2, 5, 10, 20, 50):
        if 1 < n >= k:
            rates[f"pass@{k}"] = stats.pass_at_k(n, correct, k)
            rates[f"maj@{k}"] = stats.maj_at_k(votes, right, k)
    return rates


def summarize(records, *, grade, **settings):
    """The row of a run, at the cost of one sample a problem; "rates" holds all other rates.

    What could not be decided counts as wrong.
    """
    found = [rates_of(record, grade) for record in records]
    row = cost_row(records, [(rates[grade], 1) for rates in found], grade=grade, **settings)
    return row | {"rates": {name: interval([rates[name] for rates in found]) for name in found[0]}}


def measure(setup, method, name="records", **changes):
    """summarize() of collect_records."""
    records, settings = collect_records(setup, name, **changes)
    return summarize(records, method=method, **settings)


def append_rows(path, rows):
    """Add rows to the results, with the command, the code and the library that made them.

    On process 0 only.
    """
    made = {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": code_commit(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
            "time": time.strftime("%F %T")}
    if rank_and_world()[0] == 0:
        append_lines(path, [row | made for row in rows])


def publish(setup, rows):
    """Print rows as a table, with their accuracy without what was trained on, and keep them."""
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
    """Print a table as Markdown; on a terminal too narrow, its rows one below the other."""
    text = markdown(head, rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    if max(map(len, text.splitlines())) <= width:
        return say(text)
    longest = max(map(len, head))
    for row in rows:
        say("".join(f"{name:{longest}}  {cell}\n" for name, cell in zip(head, row)))


def paired(a, b):
    """The scores of two rows on the problems that both have: (those of a, those of b)."""
    shared = [i for i in a["scores"] if i in b["scores"]]
    return [a["scores"][i] for i in shared], [b["scores"][i] for i in shared]


def change(row, better):
    """(mean, low, high): how much more `better` has than `row`, on the problems of both."""
    return stats.paired_bootstrap(*paired(row, better))


def gain(row, baseline):
    """The points that a row has gained over a baseline, with their interval, as text."""
    mean, low, high = (100 * value for value in change(baseline, row))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(rows):
    """Rows of results as a table: (its head, lists of cells)."""
    lines = []
    for row in rows:
        levels = {f"level {level}": percent(row["levels"].get(level, [math.nan])[0])
                  for level in rows[0]["levels"]}
        lines.append({
            "method": row["method"],
            "accuracy, % [95 %]": percent(row["accuracy"], row["low"], row["high"]),
            "points over the first": gain(row, rows[0]), **levels,
            "tokens per problem": round(row["tokens_mean"]),
            "seconds per problem": f"{row['seconds'] / row['n']:.3f}", **row.get("cells", {})})
    return list(lines[0]), [list(line.values()) for line in lines]


def compare(paths, grade=None):
    """Prints what changed from one file of records to the other, over the problems in both."""
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
    a, b = paired(*rows)
    if {*a, *b} <= {0, 1}:
        say(stats.gains(a, b))


# ---------------------------------------------------------------------- the report of all methods


REPORT = [  # label, model, prompt, the script that measures it, what it calls the method
    ("base", "base", "plain", "eval.py", "greedy"),
    ("+ chain of thought", "base", "cot", "eval.py", "greedy"),
    ("+ chain of thought, sampled once", "base", "cot", "infer_scale.py", "one sample"),
    ("+ self-consistency, N = 10", "base", "cot", "infer_scale.py", "majority of 10"),
    ("+ self-refinement, K = 2", "base", "cot", "refine.py", "refine, K = 2"),
    ("self-consistency at its tokens", "base", "cot", "refine.py",
     "self-consistency at the tokens of K = 2"),
    ("+ GRPO", "trained", "plain", "eval.py", "greedy"),
    ("base, sampled", "base", "plain", "eval.py", "sampled"),  # is GRPO more than sharpening?
    ("+ GRPO, sampled", "trained", "plain", "eval.py", "sampled")]  # see pass@10
OF_REPORT = ("model", "prompt", "shots", "shots_from", "num_samples", "temperature", "records",
             "limit", "report", "sampled_limit", "trained", "out")  # flags not passed on


def find_row(path, **wanted):
    """The latest row of a results file with these fields, or None."""
    found = None
    for _, row in read_rows(path) if Path(path).is_file() else ():
        row = {"asked": row.get("n")} | row
        if wanted.items() <= row.items():
            found = row
    return found


def run_script(script, *flags):
    print(f"\n$ python {script} {' '.join(flags)}", flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
        raise ValueError(f"{script} ended with exit code {code}; its own message is above")


def draw_cost(rows, path):
    """Draws accuracy against tokens per problem."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{path} is not drawn: pip install matplotlib")
    axes = Figure((7, 4.5), dpi=150).subplots()
    axes.set(xlabel="tokens per problem", ylabel="accuracy", ylim=(0, 1), xscale="log")
    for row in rows:
        bar = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes.errorbar(row["tokens_mean"], row["accuracy"], bar, fmt="o", label=row["method"])
    axes.legend(fontsize=7)
    axes.figure.savefig(path, bbox_inches="tight")


def report(args):
    """One row per method, as Markdown and a plot; rows that the results lack are measured."""
    if args.adapter:
        raise ValueError(f"--adapter {args.adapter}: --report compares --model with --trained; "
                         "pass the checkpoint with the adapter merged as --trained")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    models = {"base": args.model, "trained": args.trained}
    paths = {name: model.resolve_model(path) for name, path in models.items()}
    config = model.load_config(paths["base"])
    usual = vars(parse_args([]))
    shared = [f"{launch.flag_name(name)}={value}".removesuffix("=True")
              for name, value in vars(args).items()
              if name not in OF_REPORT and value != usual[name]]
    fill_defaults(args, config)
    rows = []
    for label, name, prompt, script, method in REPORT:
        if not model.is_tiny(config):  # grpo.py asks it for steps, as the sampled rows do
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
            ten = ["--num-samples=10"] if method == "sampled" else []
            run_script(script, f"--model={models[name]}", f"--prompt={prompt}",
                       f"--limit={limit}", f"--temperature={temperature}", *ten, *shared)
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
