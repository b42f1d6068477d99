"""A run as one page to look at: curves, results, samples, settings. One file, no network.

    python view.py runs/grpo                     # writes runs/grpo/report.html
    python view.py runs/a runs/b --out ab.html   # several runs, their curves over one another

grpo.py and sft.py write the page at the start and at every evaluation. What it shows is read from
the run's directory: flags.json, starts.jsonl, metrics.jsonl, samples.jsonl and results.md. It is
view.html with these put in as JSON. Whatever a model wrote is text in it, never markup.
"""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

from launch import Parser, run_main
from run import write_atomic

TEMPLATE = Path(__file__).with_name("view.html")
MAX_TEXT = 20_000  # characters of a text; of a longer one the page has both ends
MAX_TOKENS = 4_000  # of a completion whose tokens can be tinted
MAX_STEPS = 2_000  # in the curves
MAX_SAMPLES = 8_000_000  # characters as JSON: of held-out answers, and of groups

# ------------------------------------------------------------ reading


def finite(text):
    """A number of a JSON file, or None for one that JavaScript would not read."""
    return float(text) if math.isfinite(float(text)) else None


def bounded(value):
    """A JSON value with at most MAX_TEXT characters in a text."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        note = f"\n[... {len(value) - MAX_TEXT} characters are not on this page ...]\n"
        return value[:MAX_TEXT // 2] + note + value[-MAX_TEXT // 2:]
    if isinstance(value, list):
        return list(map(bounded, value))
    if isinstance(value, dict):
        return {name: bounded(item) for name, item in value.items()}
    return value


def parse(text):
    """The value of a JSON text, bounded; NaN and infinities are None. Raises ValueError."""
    return bounded(json.loads(text, parse_float=finite, parse_constant=finite))


def read_text(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_objects(path):
    """The JSON objects of a .jsonl file, without lines that a kill or a full disk cut short."""
    objects = []
    for line in read_text(path).split("\n"):
        try:
            objects.append(parse(line))
        except ValueError:
            pass
    return [value for value in objects if isinstance(value, dict)]


def read_results(path):
    """results.md: {"table": rows of cells, its head first, "notes": the lines around it}."""
    lines = [bounded(line.strip()) for line in read_text(path).splitlines()]
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines
             if line.startswith("|") and not line.startswith("| ---")]
    return {"table": table, "notes": [line for line in lines if line and line[0] != "|"]}


def seconds_running(starts, metrics):
    """From each start to its last step, summed."""
    events = [(start["time"], False) for start in starts if start.get("time")]
    events += [(record["time"], True) for record in metrics if record.get("time")]
    gaps = pairwise(sorted(events))
    return sum(end - begin for (begin, _), (end, is_step) in gaps if is_step)


def fit_completion(completion):
    """A completion as the page shows it: without ids, and without pieces if they are too many."""
    shown = {"num_tokens": len(completion.get("tokens", []))} | completion | {"tokens": []}
    pieces = completion.get("pieces", [])
    if not pieces or len(pieces) > MAX_TOKENS or sum(map(len, pieces)) > MAX_TEXT:
        shown |= {"pieces": [], "logprobs": []}
    return shown


def fit_samples(samples, kind):
    """(groups of this kind, evaluations left out), every other one until MAX_SAMPLES holds them."""
    fitted = {}  # step of an evaluation -> its groups
    for sample in samples:
        if sample.get("kind") == kind:
            shown = sample | {"completions": list(map(fit_completion, sample["completions"]))}
            fitted.setdefault(sample["step"], []).append(shown)
    steps = sorted(fitted)
    while len(steps) > 2 and len(json.dumps([fitted[step] for step in steps])) > MAX_SAMPLES:
        steps = [*steps[:-1:2], steps[-1]]
    return [sample for step in steps for sample in fitted[step]], len(fitted) - len(steps)


def columns(records):
    """{name: its values, five digits each}: of every n-th record and of each with a rare field.

    Only evaluations have rare fields.
    """
    counts = Counter(name for record in records for name in record)
    rare = {name for name, count in counts.items() if count <= len(records) / 2}
    stride = math.ceil(len(records) / MAX_STEPS)
    kept = [record for i, record in enumerate(records, 1)
            if i % stride == 0 or i == len(records) or rare & record.keys()]
    return {name: [five_digits(record.get(name)) for record in kept] for name in counts}


def five_digits(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_run(run_dir):
    """What the page shows of a run. Raises FileNotFoundError when the directory holds none."""
    run_dir = Path(run_dir)
    if not (run_dir / "flags.json").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run (no flags.json); expected a --run-dir of "
                                "grpo.py or sft.py")
    starts, metrics, samples = (read_objects(run_dir / f"{name}.jsonl")
                                for name in ("starts", "metrics", "samples"))
    held_out, held_out_missing = fit_samples(samples, "held_out")
    groups, groups_missing = fit_samples(samples, "rollout")
    return {"name": str(run_dir), "flags": parse(read_text(run_dir / "flags.json")),
            "starts": starts, "seconds": seconds_running(starts, metrics),
            "results": read_results(run_dir / "results.md"), "metrics": columns(metrics),
            "held_out": held_out, "groups": groups, "left_out": held_out_missing + groups_missing}


# ------------------------------------------------------------ the page


def write_page(run_dirs, path):
    """Write the page of these runs, or replace it, at a stroke."""
    runs = json.dumps(list(map(read_run, run_dirs)), allow_nan=False)  # ASCII: surrogates, too
    runs = runs.replace("<", "\\u003c")  # so that no text can end the data
    page = TEMPLATE.read_text(encoding="utf-8")
    write_atomic(Path(path), page.replace("DATA_OF_THE_RUNS", runs))


def write_report(run):
    """report.html of a run that is going on (a run.Run), on process 0.

    A page that cannot be written is said and ends no training.
    """
    if run.rank == 0:
        try:
            write_page([run.dir], run.dir / "report.html")
        except (OSError, ValueError) as error:
            print(f"{run.dir / 'report.html'} is not written: {error}", flush=True)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    p.add_argument("--out", help="the page (default: report.html, of one run in its directory)")
    return p.parse_args(argv)


def main(args):
    home = args.runs[0] if len(args.runs) == 1 else ""
    path = args.out or Path(home, "report.html")
    write_page(args.runs, path)
    print(f"written to {path}")


if __name__ == "__main__":
    run_main(main, parse_args)
