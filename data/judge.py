"""What stands behind right answers: the steps of a model's thoughts, checked exactly.

    python eval.py --model MODEL --data arithmetic,words:1-2 --records after.jsonl
    python -m data.judge after.jsonl                # a row for each family
    python -m data.judge before.jsonl after.jsonl   # the second against the first, paired

Reads what eval.py keeps under --records. By family: right answers; answers in the form (one
thinking block, one box, nothing else); thoughts of which every step is right and which end in the
answer; right answers behind a wrong step. Brackets are 95 % intervals over problems. Below are the
commonest faults of first wrong steps, numbers written as N. Problems that are not of a family have
no complete checker: every equation that can be read is checked, and there has to be one.
"""

import re
import sys
from collections import Counter

from data import family_of, load_problems
from data.files import read_rows
from data.prompts import in_form, thought_of
from data.steps import check_text
from launch import Parser
from stats import interval, markdown, paired_bootstrap, percent

COLUMNS = ("right", "in the form", "every step right", "right answer, wrong step")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("records", nargs="+", help="files of records of eval.py")
    return p.parse_args(argv)


def first_fault(problem, thought):
    """Why the first wrong step of a thought is wrong, or None."""
    family = family_of(problem)
    if family:
        wrong = family.check_steps(problem, thought)
        return wrong and wrong[2]
    steps = check_text(thought)
    wrong = [step.reason for step in steps if step.verdict == "wrong"]
    if not wrong and not any(step.verdict == "right" for step in steps):
        return "no equation that can be read"
    return wrong[0] if wrong else None


def judge(problem, sample, think_tag):
    """(the COLUMNS of one answer, as booleans; the fault of its first wrong step, or None)."""
    right = sample["strict"] is True
    fault = first_fault(problem, thought_of(sample["text"]))
    columns = right, in_form(sample["text"], think_tag), not fault, right and bool(fault)
    return columns, fault and re.sub(r"\d+( [-+*/] \d+)?", "N", fault)


def read_verdicts(path):
    """{problem id: (family, COLUMNS, fault)} of records, whose problems are made anew."""
    rows = [row for _, row in read_rows(path)]
    records = {row["id"]: row for row in rows if "samples" in row and "settings" in row}
    if not records:
        raise ValueError(f"{path} holds no records of eval.py; run it with --records {path}")
    settings = next(iter(records.values()))["settings"]
    name = settings["data"]
    asked = settings.get("asked", len(records))  # more than were not too long
    limit = asked * len(name.split(","))  # at least what was asked of each set
    problems = load_problems(name, settings["split"], limit, settings["data_seed"])
    problems = {problem["id"]: problem for problem in problems}
    missing = [i for i in records if i not in problems]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(records)} problems are not in {name}, such as "
            f"{missing[0]!r}; the code that makes them has changed since"
        )
    verdicts = {}
    for i, row in records.items():
        columns, fault = judge(problems[i], row["samples"][0], settings["think_tag"])
        verdicts[i] = problems[i]["subject"], columns, fault
    return verdicts


def rates(columns):
    """A table's cells for a list of COLUMNS."""
    return [percent(*interval(column)) for column in zip(*columns)]


def print_families(found):
    columns, faults = {}, {}
    for family, judged, fault in found.values():
        columns.setdefault(family, []).append(judged)
        faults.setdefault(family, Counter()).update([fault] if fault else [])
    rows = [[family, len(judged), *rates(judged)] for family, judged in columns.items()]
    if len(rows) > 1:
        rows.append(["all", len(found), *rates([judged for _, judged, _ in found.values()])])
    print(markdown(["family", "problems", *(f"{name}, %" for name in COLUMNS)], rows))
    for family, counts in faults.items():
        common = "; ".join(f"{fault} {n}" for fault, n in counts.most_common(3))
        print(f"{family}: {common}")


def print_changes(first, found, name):
    shared = [i for i in found if i in first]
    for k, column in enumerate(COLUMNS if shared else ()):
        before = [first[i][1][k] for i in shared]
        after = [found[i][1][k] for i in shared]
        change, low, high = (100 * value for value in paired_bootstrap(before, after))
        print(f"{column}: {change:+.1f} points [{low:+.1f}, {high:+.1f}] against {name}, "
              f"{len(shared)} problems")


def main(args):
    first = None
    for path in args.records:
        found = read_verdicts(path)
        print(f"{path}\n")
        print_families(found)
        if first:
            print_changes(first, found, args.records[0])
        first = first or found
        print()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        print(f"judge.py: {error}", file=sys.stderr)
        sys.exit(2)
