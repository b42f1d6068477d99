"""Are right answers reached by right steps? An exact check of the steps in a model's thoughts.

    python eval.py --model MODEL --data arithmetic,words:1-2 --records after.jsonl
    python -m data.judge after.jsonl                # a row for each family
    python -m data.judge before.jsonl after.jsonl   # paired comparison of the second with the first

Reads the records of eval.py --records and prints for each family the rates of: right answers;
responses in the required form (one thinking block, one box, nothing else); thoughts that reach the
answer with every step right; right answers in spite of a wrong step. Brackets are 95 % intervals
over problems. The most common faults of first wrong steps follow, with numbers as N. Problems
outside the families need at least one readable equation, and all of these are checked.
"""

import re
import sys
from collections import Counter
from typing import NamedTuple

from data import family_of, load_problems
from data.files import read_rows
from data.prompts import extract_thought, follows_format
from data.steps import check_text
from launch import Parser
from stats import interval, markdown, paired_bootstrap, percent

COLUMNS = ("right", "in the form", "every step right", "right answer, wrong step")


class Verdict(NamedTuple):
    family: str
    columns: tuple  # a bool for each of COLUMNS
    fault: str | None  # of the first wrong step


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("records", nargs="+", help="record files of eval.py")
    return p.parse_args(argv)


def first_fault(problem, thought):
    """Why the first wrong step of a thought is wrong; None if no step is."""
    family = family_of(problem)
    if family:
        wrong = family.check_steps(problem, thought)
        return wrong[2] if wrong else None
    reasons = {}
    for step in check_text(thought):
        reasons.setdefault(step.verdict, step.reason)
    if "wrong" in reasons:
        return reasons["wrong"]
    return None if "right" in reasons else "no readable equation"


def read_verdicts(path):
    """{problem id: Verdict} for the records in a file; their problems are generated again."""
    rows = [row for _, row in read_rows(path)]
    records = {row["id"]: row for row in rows if "samples" in row and "settings" in row}
    if not records:
        raise ValueError(f"{path} contains no records; write some with eval.py --records {path}")
    settings = next(iter(records.values()))["settings"]
    name = settings["data"]
    requested = settings.get("asked", len(records))  # before long prompts were dropped
    limit = requested * len(name.split(","))  # no less than was requested of each set
    problems = load_problems(name, settings["split"], limit, settings["data_seed"])
    problems = {problem["id"]: problem for problem in problems}
    missing = [i for i in records if i not in problems]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(records)} problems are not in {name}, for example "
            f"{missing[0]!r}; the code that generates them has changed"
        )
    verdicts = {}
    for i, row in records.items():
        sample = row["samples"][0]
        right = sample["strict"] is True
        fault = first_fault(problems[i], extract_thought(sample["text"]))
        formed = follows_format(sample["text"], settings["think_tag"])
        columns = right, formed, not fault, right and bool(fault)
        fault = fault and re.sub(r"\d+( [-+*/] \d+)?", "N", fault)
        verdicts[i] = Verdict(problems[i].get("subject", name), columns, fault)
    return verdicts


def print_families(verdicts):
    families = {}
    for verdict in verdicts.values():
        families.setdefault(verdict.family, []).append(verdict)
    groups = families if len(families) == 1 else families | {"all": list(verdicts.values())}
    rows = []
    for name, judged in groups.items():
        columns = zip(*(verdict.columns for verdict in judged))
        rows.append([name, len(judged), *(percent(*interval(column)) for column in columns)])
    print(markdown(["family", "problems", *(f"{name}, %" for name in COLUMNS)], rows))
    for name, judged in families.items():
        counts = Counter(verdict.fault for verdict in judged if verdict.fault)
        print(f"{name}: " + "; ".join(f"{fault} {k}" for fault, k in counts.most_common(3)))


def print_changes(first, found, name):
    shared = [i for i in found if i in first]
    for k, column in enumerate(COLUMNS if shared else ()):
        before = [first[i].columns[k] for i in shared]
        after = [found[i].columns[k] for i in shared]
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
