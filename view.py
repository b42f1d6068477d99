"""Report of a run: one HTML page with curves, results, samples and settings, and no network access.

    python view.py runs/grpo                     # writes runs/grpo/report.html
    python view.py runs/a runs/b --out ab.html   # several runs with overlaid curves

grpo.py and sft.py write the page at the start and at every evaluation. The page is view.html with
the contents of the run's directory inserted as JSON: flags.json, starts.jsonl, metrics.jsonl,
samples.jsonl and results.md. Model output is always shown as text, never interpreted as markup.
"""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

from launch import Parser, run_main
from run import write_atomic

TEMPLATE = Path(__file__).with_name("view.html")
MAX_TEXT = 20_000  # characters per text; longer ones lose their middle
MAX_TOKENS = 4_000  # in a completion that is shown token by token
MAX_STEPS = 2_000  # per curve
MAX_SAMPLES = 8_000_000  # characters of JSON, for held-out answers and for groups each

# ------------------------------------------------------------ reading


def finite(text):
    """Parse a JSON number; None for NaN and infinities, which JavaScript's parser rejects."""
    return float(text) if math.isfinite(float(text)) else None


def truncated(value):
    """A JSON value with every string in it cut to MAX_TEXT characters."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        note = f"\n[... {len(value) - MAX_TEXT} characters omitted ...]\n"
        return value[:MAX_TEXT // 2] + note + value[-MAX_TEXT // 2:]
    if isinstance(value, list):
        return list(map(truncated, value))
    if isinstance(value, dict):
        return {name: truncated(item) for name, item in value.items()}
    return value


def parse(text):
    """Parse JSON and truncate its strings. Raises ValueError for malformed text."""
    return truncated(json.loads(text, parse_float=finite, parse_constant=finite))


def read_text(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_objects(path):
    """The JSON objects in a .jsonl file. Lines truncated by a kill or a full disk are skipped."""
    objects = []
    for line in read_text(path).split("\n"):
        try:
            objects.append(parse(line))
        except ValueError:
            pass
    return [value for value in objects if isinstance(value, dict)]


def read_results(path):
    """results.md as {"table": rows of cells, header first, "notes": the other lines}."""
    lines = [truncated(line.strip()) for line in read_text(path).splitlines()]
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines
             if line.startswith("|") and not line.startswith("| ---")]
    return {"table": table, "notes": [line for line in lines if line and line[0] != "|"]}


def seconds_running(starts, metrics):
    """Training time: the seconds from each start to its last step, summed."""
    events = [(start["time"], False) for start in starts if start.get("time")]
    events += [(record["time"], True) for record in metrics if record.get("time")]
    gaps = pairwise(sorted(events))
    return sum(end - begin for (begin, _), (end, is_step) in gaps if is_step)


def trim_completion(completion):
    """A completion for the page: without token ids, and without pieces if there are too many."""
    shown = {"num_tokens": len(completion.get("tokens", []))} | completion | {"tokens": []}
    pieces = completion.get("pieces", [])
    if not pieces or len(pieces) > MAX_TOKENS or sum(map(len, pieces)) > MAX_TEXT:
        shown |= {"pieces": [], "logprobs": []}
    return shown


def trim_samples(samples, kind):
    """(groups of one kind, steps omitted): every other step is dropped until MAX_SAMPLES is met."""
    by_step = {}  # step -> its groups
    for sample in samples:
        if sample.get("kind") == kind:
            shown = sample | {"completions": list(map(trim_completion, sample["completions"]))}
            by_step.setdefault(sample["step"], []).append(shown)
    steps = sorted(by_step)
    while len(steps) > 2 and len(json.dumps([by_step[step] for step in steps])) > MAX_SAMPLES:
        steps = [*steps[:-1:2], steps[-1]]
    return [sample for step in steps for sample in by_step[step]], len(by_step) - len(steps)


def five_digits(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def columns(records):
    """{name: values, to five digits}, thinned to every n-th record and all evaluations.

    Evaluations are recognised by fields that most records lack.
    """
    counts = Counter(name for record in records for name in record)
    rare = {name for name, count in counts.items() if count <= len(records) / 2}
    stride = math.ceil(len(records) / MAX_STEPS)
    kept = [record for i, record in enumerate(records, 1)
            if i % stride == 0 or i == len(records) or rare & record.keys()]
    return {name: [five_digits(record.get(name)) for record in kept] for name in counts}


def read_run(run_dir):
    """The page's data on a run. Raises FileNotFoundError if the directory holds no run."""
    run_dir = Path(run_dir)
    if not (run_dir / "flags.json").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run (no flags.json); expected a --run-dir of "
                                "grpo.py or sft.py")
    starts, metrics, samples = (read_objects(run_dir / f"{name}.jsonl")
                                for name in ("starts", "metrics", "samples"))
    held_out, held_out_missing = trim_samples(samples, "held_out")
    groups, groups_missing = trim_samples(samples, "rollout")
    return {"name": str(run_dir), "flags": parse(read_text(run_dir / "flags.json")),
            "starts": starts, "seconds": seconds_running(starts, metrics),
            "results": read_results(run_dir / "results.md"), "metrics": columns(metrics),
            "held_out": held_out, "groups": groups, "left_out": held_out_missing + groups_missing}


# ------------------------------------------------------------ the page


def write_page(run_dirs, path):
    """Write the page of these runs atomically."""
    runs = json.dumps(list(map(read_run, run_dirs)), allow_nan=False)  # ASCII, even lone surrogates
    runs = runs.replace("<", "\\u003c")  # so that no text can close the script element
    page = TEMPLATE.read_text(encoding="utf-8")
    write_atomic(Path(path), page.replace("DATA_OF_THE_RUNS", runs))


def write_report(run):
    """Write report.html of a current run.Run, on process 0.

    If the page cannot be written, say so and keep training.
    """
    if run.rank == 0:
        try:
            write_page([run.dir], run.dir / "report.html")
        except (OSError, ValueError) as error:
            print(f"{run.dir / 'report.html'} was not written: {error}", flush=True)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    p.add_argument("--out", help="output file (default: report.html, in RUN if there is just one)")
    return p.parse_args(argv)


def main(args):
    parent = args.runs[0] if len(args.runs) == 1 else ""
    path = args.out or Path(parent, "report.html")
    write_page(args.runs, path)
    print(f"written to {path}")


if __name__ == "__main__":
    run_main(main, parse_args)
