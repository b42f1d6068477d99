"""Problem sets by name: generated families, published sets, files of your own.

    load_problems("gsm8k", "train", limit=100)      load_problems("words")      load_problems("my/problems.jsonl")
    load_problems("arithmetic,words:1-2,science:1")                       several sets in one; some levels of a set only
"""

import importlib
import re
from pathlib import Path

from data import gsm8k, math500
from data.families import check_request, split_of  # noqa: F401 (split_of: for users of the package)
from data.files import choose, hold_out, read_rows

FAMILIES = ("arithmetic", "words", "knights", "algebra", "debugging", "science")
PUBLISHED = {"gsm8k": gsm8k.problems, "math500": math500.problems_math500, "math": math500.problems_math}


def read_problems(path):
    """The problems of a .jsonl file: "problem" and "answer" on each line, or GSM8K's "question" and "answer"."""
    found, lines = [], {}
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        if "question" in row and "problem" not in row and "####" in str(row.get("answer")):
            row = gsm8k.from_row(row, f"{Path(path).stem}/{number}") | {k: row[k] for k in ("id", "level") if k in row}
        for field in ("problem", "answer"):
            if field not in row:
                raise ValueError(f"{where}: no field {field!r}; there are {', '.join(row) or 'none'}; expected "
                                 "problem and answer, optional id, solution, level, subject")
            if type(row[field]) not in (str, int, float) or not str(row[field]).strip():
                raise ValueError(f"{where}: field {field!r} is {row[field]!r:.60}, expected text")
        problem = row | {"id": str(row.get("id", f"{Path(path).stem}/{number}")), "problem": str(row["problem"]),
                         "answer": str(row["answer"])}
        level = problem.pop("level", None)
        if level is not None:
            problem["level"] = math500.level_of(level)
            if not problem["level"]:
                raise ValueError(f"{where}: level {level!r:.60} is not one of 1 to 5")
        if lines.setdefault(problem["id"], number) != number:
            raise ValueError(f"{where}: the id {problem['id']!r} is already on line {lines[problem['id']]}")
        found.append(problem)
    if not found:
        raise ValueError(f"{path} holds no problems: it is empty")
    return found


def load_problems(name_or_path, split="test", limit=None, seed=0):
    """Problems as dicts: "id", "problem", "answer", and where known "solution", "level" (1 to 5), "subject".

    name_or_path: one of FAMILIES, one of PUBLISHED, or a .jsonl file; ":2" or ":1-3" behind it picks levels. Several,
    with commas between them, have an equal share of `limit` each.
    split: "train", "dev" or "test". Generated families: disjoint by their keys, for any limit. Published sets: dev is a
    tenth of the published train, and no longer in "train". A file: "test" is all of it, "train" and "dev" divide it.
    limit: a random subset drawn with `seed`; a generated family makes as many as are asked for, until it has no more.
    Raises ValueError or FileNotFoundError that name the file, the line and the field.
    """
    check_request(split, limit)
    asked = str(name_or_path)
    name, first, last = re.fullmatch(r"(.*?)(?::([1-5])(?:-([1-5]))?)?", asked, re.DOTALL).groups()
    if "," in name and not Path(name).is_file():
        names = asked.split(",")
        share = limit and max(1, limit // len(names))
        return [problem for each in names for problem in load_problems(each, split, share, seed)]
    levels = range(int(first or 1), int(last or first or 5) + 1)
    if name in FAMILIES:
        found = importlib.import_module(f"data.{name}").problems(split, limit, seed, levels)
    elif name in PUBLISHED:
        found = PUBLISHED[name](split)
    elif name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no file {name}")
        found = hold_out(read_problems(name), split)
    else:
        raise ValueError(f"no problem set {name!r}; there are {', '.join((*FAMILIES, *PUBLISHED))}, or a .jsonl file")
    if first:
        found = [problem for problem in found if problem.get("level") in levels]
    if not found:
        reason = f"none has a level of {first} to {last or first}" if first else "the file is too small to be divided"
        raise ValueError(f"{name} has no problems in the split {split!r}: {reason}")
    return choose(found, limit, seed)
