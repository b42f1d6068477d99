"""MATH, and the 500 test problems of it that everybody reports.

Hendrycks et al. 2021, arXiv:2103.03874; MIT licence. `math500` is downloaded. `math` is the whole
set, which you place by hand in data/cache/math/ or $REASONER_DATA/math/: as published,
train/SUBJECT/NUMBER.json and test/SUBJECT/NUMBER.json, or as train.jsonl and test.jsonl.
"""

from data.files import fetch, places, read_rows
from model import read_json
from verify import extract_answer

URL = "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"
ROWS, SHA256 = 500, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"


def level_of(value):
    """5 from 5, 5.0 or "Level 5"; None from the "Level ?" that two problems of MATH carry."""
    digits = str(value).removeprefix("Level ").removesuffix(".0")
    return int(digits) if digits in ("1", "2", "3", "4", "5") else None


def from_row(row, name):
    """One problem of MATH; where no field holds the answer, the solution's last box does."""
    missing = [field for field in ("problem", "solution") if not isinstance(row.get(field), str)]
    if missing:
        raise ValueError(f"{name}: no text in the field {missing[0]!r}; there are {', '.join(row)}")
    answer = row.get("answer") or extract_answer(row["solution"], strict=True)
    if not answer:
        raise ValueError(f"{name}: neither an answer field nor a \\boxed answer in the solution")
    problem = {
        "id": name, "problem": row["problem"], "answer": str(answer), "solution": row["solution"],
        "level": level_of(row.get("level")), "subject": row.get("subject") or row.get("type"),
    }
    return {field: value for field, value in problem.items() if value is not None}


def read_math(place, part):
    """The problems of a directory in one of the two layouts, or [] when it holds neither."""
    path = place / f"{part}.jsonl"
    if path.is_file():
        return [from_row(row, f"math/{part}/{number}") for number, row in read_rows(path)]
    return [from_row(read_json(file), f"math/{part}/{file.parent.name}/{file.stem}")
            for file in sorted((place / part).glob("*/*.json"))]


def problems_math500(split):
    if split != "test":
        raise ValueError(f"math500 has a test split only, found {split!r}; "
                         "MATH's training problems are the set 'math'")
    path = fetch("math500", "test.jsonl", URL, ROWS, SHA256)
    return [from_row(row, f"math500/{row['unique_id']}") for _, row in read_rows(path)]


def problems_math(split):
    part = "test" if split == "test" else "train"
    for place in places("math"):
        rows = read_math(place, part)
        if rows:
            return rows
    looked = " or ".join(map(str, places("math")))
    raise FileNotFoundError(f"no MATH {part} problems in {looked}; put "
                            f"{part}/SUBJECT/NUMBER.json or {part}.jsonl there by hand")
