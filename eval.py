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
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

import launch
import model
from data import load_problems
from data.files import read_rows
from data.mixture import keys_of
from data.prompts import PRESETS, encode_prompt, load_shots, prompt_flag, prompt_hash, render_prompt
from engine import Engine, sampling_params
from generate import add_sampling_flags, completion_text, generate
from launch import at_least, gather_objects, rank_and_world, run_main, say
from run import append_lines, code_commit, read_trained_on
from stats import (
    gains,
    interval,
    maj_at_k,
    markdown,
    paired_bootstrap,
    pass_at_k,
    percent,
    pool_answers,
)
from verify import extract_answer, verify_many

ROOT = Path(__file__).resolve().parent
SAMPLING_TEMPERATURE = 0.7  # one for all methods that sample, so that they compare; chosen on dev
# What a flag left out means, for a tiny model and for any other.
TINY = {"data": "arithmetic", "prompt": "plain", "max_new_tokens": 128, "max_batch": 256}
OTHERS = {"data": "gsm8k", "prompt": "boxed", "max_new_tokens": 1024, "max_batch": 64}
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


SAMPLE_FIELDS = {"text", "answer", "lenient_answer", "strict", "lenient", "tokens", "finish",
                 "logprob"}


def make_samples(completions, texts, reference):
    """What a record keeps of the completions of a problem; strict, lenient None: undecided."""
    pairs = [(text, reference) for text in texts]
    verdicts = zip(verify_many(pairs, strict=True), verify_many(pairs, strict=False))
    return [{"text": text, "answer": extract_answer(text, strict=True),
             "lenient_answer": extract_answer(text), "strict": strict, "lenient": lenient,
             "tokens": len(c.tokens), "finish": c.finish, "logprob": round(sum(c.logprobs), 4)}
            for c, text, (strict, lenient) in zip(completions, texts, verdicts)]


def evaluate(params, config, tokenizer, problems, *, max_new_tokens, prompt="plain", system=None,
             shots=(), think_tag="think", num_samples=1, temperature=0.0, max_batch=64, keep=None,
             quiet=False, **sampling):
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
    records = [None] * len(mine)
    last = time.perf_counter()

    def finish(i):
        nonlocal last
        problem = mine[i]
        texts = [completion_text(tokenizer, c, ends, stop) for c in answers[i]]
        samples = make_samples(answers[i], texts, problem["answer"])
        now = time.perf_counter()
        records[i] = {"id": problem["id"], "level": problem.get("level"),
                      "subject": problem.get("subject"),
                      "prompt": render_prompt(prompt, problem, **form),
                      "reference": problem["answer"], "samples": samples,
                      "seconds": round((now - last) / world, 4)}  # of a run: their sum
        last = now
        if keep:
            keep(records[i])

    with launch.progress_bar(len(problems) * num_samples, quiet=quiet) as show:
        def on_step(ended, num_tokens):
            for i, sample, completion in ended:
                answers[i][sample] = completion
                if None not in answers[i]:
                    finish(i)
            show(ended, num_tokens)

        generate(
            params, config, [encode_prompt(tokenizer, prompt, p, **form) for p in mine],
            num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature,
            stop_tokens=ends, stop_strings=stop, tokenizer=tokenizer, max_batch=max_batch,
            think_tag=think_tag, seeds=[zlib.crc32(p["id"].encode()) for p in mine],
            on_step=on_step, **sampling)
    shares = gather_objects(records)
    return [shares[i % world][i // world] for i in range(len(problems))]


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
            if any(not SAMPLE_FIELDS <= sample.keys() for sample in record["samples"]):
                raise KeyError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: not a record of eval.py") from None
        if changes:
            raise ValueError(f"{path} holds a run with other settings ({changes} now); give "
                             "another --records")
    return records


def list_changes(old, new):
    """The settings that differ, as text."""
    return ", ".join(f"{name} {old.get(name)!r}, {value!r}" for name, value in new.items()
                     if old.get(name) != value)


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
    records: Path | None = None  # a directory for files of records, or one such file
    grade: str = "strict"  # which one counts
    engine: Engine | None = None  # the sampler's, which a GPU keeps
    compiled: bool = False  # its step


def weights_hash(model_dir, adapter=None):
    """Eight characters that change with the weights; a path does not say which weights it held."""
    digest = hashlib.sha256()
    files = [p for p in Path(model_dir).glob("*.safetensors") if p.is_file() and p.stat().st_size]
    adapters = Path(adapter).glob("*.safetensors") if adapter else []
    for path in [*sorted(files), *adapters]:
        content = np.memmap(path, mode="r")
        for begin in (0, len(content) // 2, max(0, len(content) - 2**20)):
            digest.update(content[begin:begin + 2**20])
    return digest.hexdigest()[:8]


def chosen_flags(args, config):
    """The flags by name, with this model's defaults for those that were left out."""
    defaults = TINY | {"prompt": args.tiny_prompt} if model.is_tiny(config) else OTHERS
    return defaults | {name: value for name, value in vars(args).items() if value is not None}


def settings_of(setup, **changes):
    """Everything that a record depends on, as rows and records carry it."""
    options = setup.options | changes
    hashed = prompt_hash(options["prompt"], system=options["system"], shots=options["shots"],
                         think_tag=options["think_tag"])
    named = {k: v for k, v in options.items() if k not in ("system", "max_batch")}
    return setup.settings | named | {"shots": len(options["shots"]), "prompt_hash": hashed}


def fork(args, setup, replies):
    """Become --processes, by default as many as memory holds.

    Weights count as float32, as they are read; caches count twice, for growing one copies it.
    """
    config = setup.config
    context = max(map(len, setup.prompts)) + replies * setup.options["max_new_tokens"]
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    row = context * slot + config.vocab_size
    gib_each = 0.25 + setup.options["max_batch"] * row / 2**27
    gib_shared = sum(tensor.shape.numel() for tensor in setup.params.values()) / 2**27
    default = launch.default_processes(args.device, gib_each, gib_shared)
    launch.init_distributed(args.device, args.processes or default)


def fit_context(problems, prompts, config, reply_tokens):
    """(problems, prompts) of those whose prompt leaves room for so many tokens in the context.

    Says how many are left out. Raises ValueError when all are.
    """
    room = config.max_context - reply_tokens
    kept = [(p, prompt) for p, prompt in zip(problems, prompts) if len(prompt) <= room]
    if problems and not kept:
        raise ValueError(f"no prompt leaves room for {reply_tokens} new tokens in the context of "
                         f"{config.max_context}; try a smaller --max-new-tokens, or fewer solved "
                         "examples")
    if left_out := len(problems) - len(kept):
        say(f"{left_out} of {len(problems)} problems are left out: their prompts leave no room for "
            f"{reply_tokens} new tokens in the context of {config.max_context}")
    return [p for p, _ in kept], [prompt for _, prompt in kept]


def leave_out(problems, keys, held_out, name):
    """The training problems of the set `name` whose keys are not among `held_out`.

    Says how many are left out. Raises ValueError when all are.
    """
    held_out = set(held_out)
    kept = [problem for problem, key in zip(problems, keys) if key not in held_out]
    if left_out := len(problems) - len(kept):
        say(f"{left_out} of {len(problems)} training problems of {name} are also held out for "
            "evaluation: they are left out of training")
    if problems and not kept:
        raise ValueError(f"every training problem of {name} is also held out for evaluation; "
                         "expected others: change --data or --eval-data")
    return kept


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
    flags = chosen_flags(args, config)
    preset = PRESETS[flags["prompt"]]
    problems = load_problems(flags["data"], args.split, args.limit or None, args.data_seed)
    shots = load_shots(args.shots_from or flags["data"], flags.get("shots", preset.shots),
                       args.data_seed, problems)
    form = {"system": model.load_system_prompt(path), "shots": shots,
            "think_tag": args.think_tag}
    prompts = [encode_prompt(tokenizer, flags["prompt"], p, **form) for p in problems]
    asked = len(problems)
    problems, prompts = fit_context(problems, prompts, config, replies * flags["max_new_tokens"])
    names = ("prompt", "temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_batch")
    options = {name: flags[name] for name in names} | form | {"num_samples": 1}
    settings = {"model": args.model, "weights": weights_hash(path, args.adapter),
                "data": flags["data"], "split": args.split, "data_seed": args.data_seed,
                "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if len(problems) < asked:
        settings["asked"] = asked
    params = model.load_params(path, "cpu", dtype, args.adapter)
    params = sampling_params(params, config, device=device)
    setup = Setup(params, config, tokenizer, problems, prompts, options, settings,
                  args.records and Path(args.records), args.grade or preset.grade, Engine(),
                  args.compile)
    fork(args, setup, replies)
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
    if path:
        append_lines(path, [])
    done = gather_objects(done)[0]
    todo = [p for p in setup.problems if p["id"] not in done]

    def keep(record):
        if path:
            append_lines(path, [record | {"settings": settings}])

    records = evaluate(setup.params, setup.config, setup.tokenizer, todo, engine=setup.engine,
                       compiled=setup.compiled, keep=keep, **options)
    done |= {record["id"]: record | {"settings": settings} for record in records}
    row_settings = settings | {"grade": setup.grade, "max_batch": options["max_batch"]}
    return [done[p["id"]] for p in setup.problems], row_settings


# ---------------------------------------------------------------------- rows: what a run comes to


def scores_of(records, grade):
    """Each problem's share of right samples; what could not be decided counts as wrong."""
    return [fmean(s[grade] is True for s in r["samples"]) for r in records]


def votes_of(record, grade="strict"):
    """(the class that each sample votes for, None without an answer; the classes that are right)"""
    votes = pool_answers([s[ANSWER[grade]] for s in record["samples"]])
    right = {v for v, s in zip(votes, record["samples"]) if s[grade] and v is not None}
    return votes, right


def rates_by_level(records, scores, tokens):
    """{level: [accuracy, low, high, problems, tokens]}"""
    rates = {}
    for level in sorted({r["level"] for r in records if r.get("level") is not None}):
        mine = [i for i, r in enumerate(records) if r.get("level") == level]
        rates[str(level)] = [*interval([scores[i] for i in mine]), len(mine),
                             fmean(tokens[i] for i in mine)]
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


def cost_row(records, scores, drawn, **settings):
    """score_row of a method that uses some samples of each pool. drawn: how many, for each."""
    tokens = [n * fmean(s["tokens"] for s in r["samples"]) for n, r in zip(drawn, records)]
    seconds = sum(n * r["seconds"] / len(r["samples"]) for n, r in zip(drawn, records))
    return score_row(records, scores, tokens, seconds, samples=fmean(drawn), **settings)


def summarize(records, *, grade, **settings):
    """The row of a run, at the cost of one sample a problem; "rates" holds all other rates."""
    row = cost_row(records, scores_of(records, grade), [1] * len(records), grade=grade, **settings)
    pools = [r["samples"] for r in records]
    n = len(pools[0])
    scores = {name: scores_of(records, name) for name in ANSWER}
    scores["cut off"] = [fmean(s["finish"] != "stop" for s in pool) for pool in pools]
    scores["no answer"] = [fmean(s[ANSWER[grade]] is None for s in pool) for pool in pools]
    scores["undecided"] = [fmean(s[grade] is None for s in pool) for pool in pools]
    if n > 1:
        correct = [sum(s[grade] is True for s in pool) for pool in pools]
        votes = [votes_of(r, grade) for r in records]
        for k in (1, 2, 5, 10, 20, 50):
            if k <= n:
                scores[f"pass@{k}"] = [pass_at_k(n, c, k) for c in correct]
                scores[f"maj@{k}"] = [maj_at_k(*v, k) for v in votes]
    return row | {"rates": {name: interval(found) for name, found in scores.items()}}


def say_trained_on(args, setup, rows):
    """Warns of problems that the model was trained on, with each row's accuracy without them."""
    known = read_trained_on(model.resolve_model(args.model), args.adapter)
    keys = keys_of(setup.problems)
    others = [p["id"] for p, key in zip(setup.problems, keys) if key not in known]
    if len(others) == len(setup.problems):
        return
    say(f"warning: the model was trained on {len(setup.problems) - len(others)} of these "
        f"{len(setup.problems)} problems")
    for row in rows if others else []:
        scores = [row["scores"][i] for i in others]
        say(f"{row['method']}: {percent(*interval(scores))} % without them")


def append_row(path, row):
    """Add a row to the results, with the command, the code and the library that made it.

    On process 0 only.
    """
    if rank_and_world()[0] > 0:
        return
    append_lines(path, [row | {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": code_commit(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
        "time": time.strftime("%F %T")}])


def say_table(text):
    """Print a table of `markdown`; on a terminal too narrow, its rows one below the other."""
    lines = text.splitlines()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    if max(map(len, lines)) <= width:
        return say(text)
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    longest = max(map(len, head))
    for row in rows:
        say("".join(f"{name:{longest}}  {cell}\n" for name, cell in zip(head, row)))


def paired(a, b):
    """The scores of two rows on the problems that both have: (those of a, those of b)."""
    shared = [i for i in a["scores"] if i in b["scores"]]
    return [a["scores"][i] for i in shared], [b["scores"][i] for i in shared]


def gain(row, baseline):
    """The points that a row has gained over a baseline, with their interval, as text."""
    change, low, high = paired_bootstrap(*paired(baseline, row))
    return f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(rows, extra=None):
    """Rows of results as Markdown. extra: {header: a cell for each row}, columns to add."""
    columns = {"method": [row["method"] for row in rows],
               "accuracy, % [95 %]": [percent(row["accuracy"], row["low"], row["high"])
                                      for row in rows],
               "points over the first": [gain(row, rows[0]) for row in rows]}
    for level in rows[0]["levels"]:
        columns[f"level {level}"] = [percent(*row["levels"].get(level, [math.nan])[:1])
                                     for row in rows]
    columns["tokens per problem"] = [round(row["tokens_mean"]) for row in rows]
    columns["seconds per problem"] = [f"{row['seconds'] / row['n']:.3f}" for row in rows]
    columns |= extra or {}
    return markdown(list(columns), zip(*columns.values()))


def compare(path_a, path_b, grade=None):
    """Prints what changed from one file of records to the other, over the problems in both."""
    runs = [read_records(path) for path in (path_a, path_b)]
    shared = [i for i in runs[0] if i in runs[1]]
    if not shared:
        raise ValueError(f"{path_a} and {path_b} have no problem in common")
    settings = [records[shared[0]]["settings"] for records in runs]
    rows = []
    for path, records, of_run in zip((path_a, path_b), runs, settings):
        rows.append(summarize([records[i] for i in shared],
                              grade=grade or PRESETS[of_run["prompt"]].grade,
                              method=f"{path} ({len(shared)} of {len(records)})"))
    say_table(table(rows))
    say(f"settings that differ: {list_changes(*settings) or 'none'}")
    a, b = paired(*rows)
    if {*a, *b} <= {0, 1}:
        say(gains(a, b))


def find_row(path, **wanted):
    """The latest row of a results file with these fields and its problems' scores, or None."""
    if Path(path).is_file():
        for _, row in reversed(list(read_rows(path))):
            row = {"asked": row.get("n")} | row
            if "scores" in row and all(row.get(name) == value for name, value in wanted.items()):
                return row
    return None


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
    figure = Figure((7, 4.5), dpi=150)
    axes = figure.subplots()
    axes.set(xlabel="tokens per problem", ylabel="accuracy", ylim=(0, 1), xscale="log")
    for row in rows:
        bar = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        axes.errorbar(row["tokens_mean"], row["accuracy"], bar, fmt="o", label=row["method"])
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def report(args):
    """One row per method, as Markdown and a plot; rows that the results lack are measured."""
    if args.adapter:
        raise ValueError(f"--adapter {args.adapter}: --report compares --model with --trained; "
                         "pass the checkpoint with the adapter merged as --trained")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    models = {"base": args.model, "trained": args.trained}
    weights = {name: weights_hash(model.resolve_model(path)) for name, path in models.items()}
    config = model.load_config(model.resolve_model(args.model))
    data = chosen_flags(args, config)["data"]
    usual = vars(parse_args([]))
    shared = [f"--{name.replace('_', '-')}={value}".removesuffix("=True")
              for name, value in vars(args).items()
              if name not in OF_REPORT and value != usual[name]]
    rows = []
    for label, name, prompt, script, method in REPORT:
        if not model.is_tiny(config):  # grpo.py asks it for steps, as the sampled rows do
            prompt = "direct" if label == "base" else "boxed"
        greedy = method == "greedy"
        temperature = 0.0 if greedy else SAMPLING_TEMPERATURE
        limit = args.limit if greedy else args.sampled_limit or args.limit
        wanted = {"data": data, "split": args.split, "data_seed": args.data_seed, "shots": 0,
                  "asked": len(load_problems(data, args.split, limit or None, args.data_seed)),
                  "weights": weights[name], "prompt": prompt, "method": method, "seed": args.seed,
                  "grade": args.grade or PRESETS[prompt].grade, "temperature": temperature}
        if not find_row(args.results, **wanted):
            flags = ["--num-samples=10"] if method == "sampled" else []
            run_script(script, f"--model={models[name]}", f"--prompt={prompt}",
                       f"--limit={limit}", f"--temperature={temperature}", *flags, *shared)
        rows.append(find_row(args.results, **wanted) | {"method": label})
    pass_10 = [row.get("rates", {}).get("pass@10") for row in rows]
    text = table(rows, {"problems": [row["n"] for row in rows],
                        "pass@10": [percent(*rate) if rate else "" for rate in pass_10],
                        "command": [f"`{row['command']}`" for row in rows]})
    (out / "results.md").write_text(f"{args.model} on {data}/{args.split}\n\n{text}", "utf-8")
    say_table(text)
    print(f"written to {out}/results.md")
    draw_cost(rows, out / "report.png")


def main(args):
    if args.compare:
        return compare(*args.compare, args.grade)
    if args.report:
        return report(args)
    setup = load_setup(args)
    records, settings = collect_records(setup, num_samples=args.num_samples)
    row = summarize(records, method="sampled" if args.temperature else "greedy", **settings)
    say_table(table([row]))
    say_trained_on(args, setup, [row])
    for name, rates in row["rates"].items():
        say(f"{name}: {percent(*rates)} %")
    for level, (*rates, n, tokens) in row["levels"].items():
        say(f"level {level}: {percent(*rates)} % of {n} in {tokens:.0f} tokens")
    append_row(args.results, row)


if __name__ == "__main__":
    run_main(main, parse_args)
