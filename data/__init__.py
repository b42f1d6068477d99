"""Problem sets by name: generated families, published sets, files of your own.

    load_problems("gsm8k", "train", limit=100)    load_problems("my/problems.jsonl")
    load_problems("arithmetic,words:1-2,science:1")    several sets, some of them with levels
"""

import math
import re
from importlib import import_module
from pathlib import Path

from data import gsm8k, math500
from data.families import SIZES, draw_problems, split_of  # noqa: F401 (split_of: for users)
from data.files import choose, hold_out, read_rows
from model import did_you_mean

FAMILIES = ("arithmetic", "words", "knights", "algebra", "debugging", "science")
PUBLISHED = {"gsm8k": gsm8k.problems, "math500": math500.problems_math500,
             "math": math500.problems_math}
REQUIRED = ("problem", "answer")
TEXTS = (*REQUIRED, "id", "solution", "subject", "key")


def family_of(problem):
    """The module of the generated family that a problem is of, or None.

    A problem of your own may have the same subject, but not the fields that a family gives it.
    """
    name = problem.get("subject")
    return import_module(f"data.{name}") if name in FAMILIES and "key" in problem else None


def is_text(value):
    """Whether a field is text, or a number that is written as one."""
    return type(value) in (str, int) or type(value) is float and math.isfinite(value)


def check_problem(row, name, where):
    """One line of a file as a problem; `name` is its id when it has none."""
    answer = row.get("answer")
    if "question" in row and "problem" not in row and isinstance(answer, str) and "####" in answer:
        named = {field: row[field] for field in ("id", "level") if field in row}
        row = gsm8k.from_row(row, name) | named
    # not null, nor the NaN with which pandas fills an empty cell
    given = {field: value for field, value in row.items() if value is not None and value == value}
    problem = {"id": name} | given
    for field in TEXTS:
        value = problem.get(field, "")
        if not is_text(value) or field in REQUIRED and not str(value).strip():
            raise ValueError(f"{where}: field {field!r} is {row.get(field)!r:.60}, expected text; "
                             "needed are problem, answer; optional id, solution, level, subject")
        if field in problem:
            problem[field] = str(value)
    level = problem.pop("level", None)
    if level is not None:
        problem["level"] = math500.level_of(level)
        if not problem["level"]:
            raise ValueError(f"{where}: level {level!r:.60} is not one of 1 to 5")
    return problem


def read_problems(path):
    """The problems of a .jsonl file: "problem" and "answer" on each line, or GSM8K's fields."""
    problems = []
    lines = {}  # the line of each id
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        problem = check_problem(row, f"{Path(path).stem}/{number}", where)
        first = lines.setdefault(problem["id"], number)
        if first != number:
            raise ValueError(f"{where}: the id {problem['id']!r} is already on line {first}")
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems: it is empty")
    return problems


def split_levels(name):
    """"mine.jsonl:1-3" -> ("mine.jsonl", "1", "3"); a level that is not there is None."""
    return re.fullmatch(r"(.*?)(?::([1-5])(?:-([1-5]))?)?", name, re.DOTALL).groups()


def split_names(names):
    """"gsm8k,mine.jsonl:1-3" -> ["gsm8k", "mine.jsonl:1-3"]; the name of a file may have commas."""
    return [names] if Path(split_levels(names)[0]).is_file() else names.split(",")


def with_own_ids(problems):
    """The problems of several sets, "#2", "#3", ... behind an id that an earlier one has."""
    counts = {}
    own = []
    for problem in problems:
        name = problem["id"]
        while name in counts:
            counts[problem["id"]] += 1
            name = f"{problem['id']}#{counts[problem['id']]}"
        counts[name] = 1
        own.append(problem if name == problem["id"] else problem | {"id": name})
    return own


def load_problems(name_or_path, split="test", limit=None, seed=0):
    """Problems: "id", "problem", "answer", where known "solution", "level" (1 to 5), "subject".

    name_or_path: one of FAMILIES, one of PUBLISHED, or a .jsonl file; ":2" or ":1-3" behind it
    picks levels. Several, with commas between them, have an equal share of `limit` each.
    split: "train", "dev" or "test". Families: disjoint by their keys, for any limit. Published
    sets: dev is a tenth of the published train, and no longer in "train". A file: "test" is all of
    it, "train" and "dev" divide it.
    limit: a random subset drawn with `seed`; a family makes as many as it is asked for, if it can.
    Raises ValueError or FileNotFoundError that name the file, the line and the field.
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r} is not one of {', '.join(SIZES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1, or none for all problems")
    names = split_names(str(name_or_path))
    name, first, last = split_levels(names[0])
    if len(names) > 1:
        share = limit and max(1, limit // len(names))
        return with_own_ids(p for each in names for p in load_problems(each, split, share, seed))
    levels = range(int(first or 1), int(last or first or 5) + 1)
    if name in FAMILIES:
        found = draw_problems(import_module(f"data.{name}"), split, limit, seed, levels)
    elif name in PUBLISHED:
        found = hold_out(PUBLISHED[name](split), split)
    elif name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        found = hold_out(read_problems(name), split)
    else:
        known = (*FAMILIES, *PUBLISHED)
        raise ValueError(f"no problem set {name!r}; there are {', '.join(known)}, or a .jsonl file"
                         f"{did_you_mean(name, known)}")
    reason = "there are too few to divide; hold out others (grpo.py: --eval-data)"
    if first:
        found = [problem for problem in found if problem.get("level") in levels]
        reason = f"none has a level of {first} to {last or first}"
    if not found:
        raise ValueError(f"{name} has no problems in the split {split!r}: {reason}")
    return choose(found, limit, seed)
