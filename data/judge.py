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
from data.prompts import extract_thought, follows_format
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
    wrong = next((step for step in steps if step.verdict == "wrong"), None)
    if wrong or any(step.verdict == "right" for step in steps):
        return wrong and wrong.reason
    return "no equation that can be read"


def read_verdicts(path):
    """{problem id: (family, COLUMNS, fault)} of records, whose problems are made anew.

    The fault is that of the answer's first wrong step, or None.
    """
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
        sample = row["samples"][0]
        right = sample["strict"] is True
        fault = first_fault(problems[i], extract_thought(sample["text"]))
        formed = follows_format(sample["text"], settings["think_tag"])
        columns = right, formed, not fault, right and bool(fault)
        fault = fault and re.sub(r"\d+( [-+*/] \d+)?", "N", fault)
        verdicts[i] = problems[i].get("subject", name), columns, fault
    return verdicts


def print_families(verdicts):
    families = {}
    for verdict in verdicts.values():
        families.setdefault(verdict[0], []).append(verdict)
    groups = families if len(families) == 1 else families | {"all": list(verdicts.values())}
    rows = []
    for name, judged in groups.items():
        columns = zip(*(columns for _, columns, _ in judged))
        rows.append([name, len(judged), *(percent(*interval(column)) for column in columns)])
    print(markdown(["family", "problems", *(f"{name}, %" for name in COLUMNS)], rows))
    for name, judged in families.items():
        counts = Counter(fault for _, _, fault in judged if fault)
        print(f"{name}: " + "; ".join(f"{fault} {k}" for fault, k in counts.most_common(3)))


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
