"""MATH, and MATH-500, the standard subset of its test problems.

Hendrycks et al. 2021, arXiv:2103.03874; MIT licence. `math500` is downloaded. `math` is the full
set, which you place by hand in data/cache/math/ or $REASONER_DATA/math/: as published,
train/SUBJECT/NUMBER.json and test/SUBJECT/NUMBER.json, or as train.jsonl and test.jsonl.
"""

from data.files import fetch, read_rows, search_dirs
from model import read_json
from verify import extract_answer

URL = "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"
SHA256 = "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"


def parse_level(value):
    """5 for 5, 5.0 or "Level 5"; None for anything else, such as MATH's two "Level ?"."""
    digits = str(value).removeprefix("Level ").removesuffix(".0")
    return int(digits) if digits in ("1", "2", "3", "4", "5") else None


def from_row(row, name):
    """One problem of MATH. Without an answer field, the answer is the solution's last box."""
    missing = [field for field in ("problem", "solution") if not isinstance(row.get(field), str)]
    if missing:
        raise ValueError(f"{name}: no text in field {missing[0]!r}; found fields {', '.join(row)}")
    answer = row.get("answer") or extract_answer(row["solution"], strict=True)
    if not answer:
        raise ValueError(f"{name}: neither an answer field nor a \\boxed answer in the solution")
    problem = {
        "id": name, "problem": row["problem"], "answer": str(answer), "solution": row["solution"],
        "level": parse_level(row.get("level")), "subject": row.get("subject") or row.get("type"),
    }
    return {field: value for field, value in problem.items() if value is not None}


def read_math(root, part):
    """The problems in a directory with either layout, or [] if it has neither."""
    path = root / f"{part}.jsonl"
    if path.is_file():
        return [from_row(row, f"math/{part}/{number}") for number, row in read_rows(path)]
    return [from_row(read_json(file), f"math/{part}/{file.parent.name}/{file.stem}")
            for file in sorted((root / part).glob("*/*.json"))]


def problems_math500(split):
    if split != "test":
        raise ValueError(f"math500 has only a test split, not {split!r}; "
                         "for MATH's training problems use the set 'math'")
    path = fetch("math500", "test.jsonl", URL, SHA256)
    return [from_row(row, f"math500/{row['unique_id']}") for _, row in read_rows(path)]


def problems_math(split):
    part = "test" if split == "test" else "train"
    for root in search_dirs("math"):
        rows = read_math(root, part)
        if rows:
            return rows
    searched = " or ".join(map(str, search_dirs("math")))
    raise FileNotFoundError(f"no MATH {part} problems in {searched}; place "
                            f"{part}/SUBJECT/NUMBER.json or {part}.jsonl there by hand")
