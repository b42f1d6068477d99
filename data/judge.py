"""What stands behind right answers: the steps of a model's own thoughts, checked by the families' exact checkers.

    python eval.py --model runs/sft/checkpoints/best --data arithmetic,words:1-2 --records runs/sft/after.jsonl
    python data/judge.py runs/sft/after.jsonl                                   # a row for each family
    python data/judge.py runs/sft/after.jsonl runs/other/after.jsonl            # the second against the first, paired

Reads what eval.py keeps under --records. By family: right answers; answers in the form (one thinking block, one box,
nothing behind it); thoughts of which every step is right and which end in the answer; right answers behind a wrong
step. Brackets are 95 % intervals over problems. Then the commonest reasons why the first wrong step of a thought is
wrong, numbers written as N. Other problems than the families' have no complete checker: of their thoughts every
equation that can be read is checked, and one has to be there.
"""

import argparse
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT) if __name__ == "__main__" else sys.path[0]

from data import FAMILIES, load_problems  # noqa: E402
from data.files import read_rows  # noqa: E402
from data.steps import check_text  # noqa: E402
from data.teachers import in_form  # noqa: E402
from data.traces import split_response  # noqa: E402
from eval import markdown, paired_bootstrap, percent, wilson  # noqa: E402

COLUMNS = ("right", "in the form", "every step right", "right answer, wrong step")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("records", nargs="+", help="files of records of eval.py")
    return p.parse_args(argv)


def first_fault(problem, thought):
    """Why the first wrong step of a thought is wrong, or None."""
    if problem["subject"] in FAMILIES:
        wrong = import_module(f"data.{problem['subject']}").check_steps(problem, thought)
        return wrong and wrong[2]
    steps = check_text(thought)
    wrong = next((step.reason for step in steps if step.verdict == "wrong"), None)
    return wrong or (None if any(step.verdict == "right" for step in steps) else "no equation that can be read")


def judge(problem, sample, think_tag):
    """The COLUMNS of one answer, as booleans, and the reason why its first wrong step is wrong, or None."""
    right, text = sample["strict"] is True, sample["text"]
    fault = first_fault(problem, split_response(text))
    reason = fault and re.sub(r"\d+( [-+*/] \d+)?", "N", fault)
    return (right, in_form(text, think_tag), not fault, right and bool(fault)), reason


def read_verdicts(path):
    """{problem id: (family, COLUMNS, reason)} of a file of records, its problems made anew from their settings."""
    records = {row["id"]: row for _, row in read_rows(path) if "samples" in row and "settings" in row}
    if not records:
        raise ValueError(f"{path} holds no records of eval.py; run it with --records {path}")
    settings = next(iter(records.values()))["settings"]
    limit = len(records) * len(settings["data"].split(","))  # each set's share of it is at least what was asked of it
    problems = {p["id"]: p for p in load_problems(settings["data"], settings["split"], limit, settings["data_seed"])}
    missing = [i for i in records if i not in problems]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(records)} problems are not in {settings['data']}, such as "
                         f"{missing[0]!r}; the code that makes them has changed since")
    return {i: (problems[i]["subject"], *judge(problems[i], row["samples"][0], settings["think_tag"]))
            for i, row in records.items()}


def rates(verdicts):
    """A table's cells for a list of COLUMNS."""
    sums = [sum(column) for column in zip(*verdicts)]
    return [percent(k / len(verdicts), *wilson(k, len(verdicts))) for k in sums]


def main(args):
    first = None
    for path in args.records:
        found = read_verdicts(path)
        families, reasons = {}, {}
        for family, verdict, reason in found.values():
            families.setdefault(family, []).append(verdict)
            reasons.setdefault(family, Counter()).update([reason] if reason else [])
        rows = [[name, len(verdicts), *rates(verdicts)] for name, verdicts in families.items()]
        if len(rows) > 1:
            rows.append(["all", len(found), *rates([verdict for _, verdict, _ in found.values()])])
        print(f"{path}\n\n" + markdown(["family", "problems", *(f"{name}, %" for name in COLUMNS)], rows))
        for name, counts in reasons.items():
            print(f"{name}: " + "; ".join(f"{reason} {n}" for reason, n in counts.most_common(3)))
        first = first or found
        shared = [i for i in found if i in first]
        for k, name in enumerate(COLUMNS if found is not first and shared else ()):
            a, b = ([verdicts[i][1][k] for i in shared] for verdicts in (first, found))
            change, low, high = paired_bootstrap(a, b)
            print(f"{name}: {100 * change:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] against "
                  f"{args.records[0]}, {len(shared)} problems")
        print()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"judge.py: {error}", file=sys.stderr)
        sys.exit(2)
