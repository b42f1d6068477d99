"""Problem sets by name: generated families, published sets, your own files.

    load_problems("gsm8k", "train", limit=100)    load_problems("my/problems.jsonl")
    load_problems("arithmetic,words:1-2,science:1")    several sets, some restricted by level
"""

import math
import re
from importlib import import_module
from pathlib import Path

from data import gsm8k, math500
from data.families import SIZES, draw_problems
from data.files import random_subset, read_rows, select_split
from model import did_you_mean

FAMILIES = ("arithmetic", "words", "knights", "algebra", "debugging", "science")
PUBLISHED = {"gsm8k": gsm8k.problems, "math500": math500.problems_math500,
             "math": math500.problems_math}
REQUIRED = ("problem", "answer")
TEXTS = (*REQUIRED, "id", "solution", "subject", "key")


def family_of(problem):
    """The module of a generated problem's family, or None.

    Your own problems may reuse a family's name as their subject; they have no "key".
    """
    name = problem.get("subject")
    return import_module(f"data.{name}") if name in FAMILIES and "key" in problem else None


def is_text(value):
    """Whether a value is a string, or a finite number to be stored as one."""
    return type(value) in (str, int) or type(value) is float and math.isfinite(value)


def check_problem(row, name, where):
    """A problem from one row of a file. name: its default id; where: file and line, for errors."""
    answer = row.get("answer")
    if "question" in row and "problem" not in row and isinstance(answer, str) and "####" in answer:
        row = gsm8k.from_row(row, row.get("id")) | {"level": row.get("level")}
    # Drop nulls, and the NaN that pandas writes for an empty cell.
    given = {field: value for field, value in row.items() if value is not None and value == value}
    problem = {"id": name} | given
    for field in TEXTS:
        value = problem.get(field, "")
        if not is_text(value) or field in REQUIRED and not str(value).strip():
            raise ValueError(f"{where}: field {field!r} is {row.get(field)!r:.60}, expected text; "
                             "required: problem, answer; optional: id, solution, level, subject")
        if field in problem:
            problem[field] = str(value)
    level = problem.pop("level", None)
    if level is not None:
        problem["level"] = math500.parse_level(level)
        if not problem["level"]:
            raise ValueError(f"{where}: level {level!r:.60} is not one of 1 to 5")
    return problem


def read_problems(path):
    """The problems in a .jsonl file, with "problem" and "answer", or GSM8K's fields, per line."""
    problems = []
    lines = {}  # {id: line number}
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        problem = check_problem(row, f"{Path(path).stem}/{number}", where)
        first = lines.setdefault(problem["id"], number)
        if first != number:
            raise ValueError(f"{where}: the id {problem['id']!r} is already on line {first}")
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} is empty: it holds no problems")
    return problems


def split_levels(name):
    """"mine.jsonl:1-3" -> ("mine.jsonl", "1", "3"); a missing level is None."""
    return re.fullmatch(r"(.*?)(?::([1-5])(?:-([1-5]))?)?", name, re.DOTALL).groups()


def split_names(names):
    """"gsm8k,mine.jsonl:1-3" -> ["gsm8k", "mine.jsonl:1-3"]; file names may contain commas."""
    return [names] if Path(split_levels(names)[0]).is_file() else names.split(",")


def with_unique_ids(problems):
    """The problems, with "#2", "#3", ... appended to ids that an earlier problem already has."""
    counts = {}
    unique = []
    for problem in problems:
        name = problem["id"]
        while name in counts:
            counts[problem["id"]] += 1
            name = f"{problem['id']}#{counts[problem['id']]}"
        counts[name] = 1
        unique.append(problem | {"id": name})
    return unique


def load_problems(name_or_path, split="test", limit=None, seed=0):
    """A list of dicts: "id", "problem", "answer"; optional "solution", "level" (1-5), "subject".

    name_or_path: one of FAMILIES or PUBLISHED, or a .jsonl file; a suffix ":2" or ":1-3" selects
    levels. A comma-separated list loads several sets, each with an equal share of `limit`.
    split: "train", "dev" or "test". Families: disjoint by key, whatever the limit. Published
    sets: "dev" is a tenth of the published training set, and "train" is the rest. Files: "test" is
    the whole file; "train" and "dev" partition it.
    limit: draw a random subset with `seed`. A family generates this many problems if it can.
    Raises ValueError or FileNotFoundError naming the file, the line and the field.
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r} is not one of {', '.join(SIZES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1, or None for all problems")
    names = split_names(str(name_or_path))
    name, first, last = split_levels(names[0])
    if len(names) > 1:
        share = limit and max(1, limit // len(names))
        return with_unique_ids(p for each in names for p in load_problems(each, split, share, seed))
    levels = range(int(first or 1), int(last or first or 5) + 1)
    if name in FAMILIES:
        found = draw_problems(import_module(f"data.{name}"), split, limit, seed, levels)
    elif name in PUBLISHED:
        found = select_split(PUBLISHED[name](split), split)
    elif name.endswith(".jsonl"):
        found = select_split(read_problems(name), split)
    else:
        known = (*FAMILIES, *PUBLISHED)
        raise ValueError(f"no problem set {name!r}; expected {', '.join(known)}, or a .jsonl "
                         f"file{did_you_mean(name, known)}")
    reason = "too few to split; hold out another set (grpo.py: --eval-data)"
    if first:
        found = [problem for problem in found if problem.get("level") in levels]
        reason = f"none has a level from {first} to {last or first}"
    if not found:
        raise ValueError(f"{name} has no problems in the split {split!r}: {reason}")
    return random_subset(found, limit, seed)
