"""GSM8K: 8,792 grade-school word problems with worked solutions.

Cobbe et al. 2021, arXiv:2110.14168; MIT licence.
"""

from data.files import fetch, read_rows

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
FILES = {  # {name: sha256}
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


def from_row(row, name):
    """A problem from a published row, {"question", "answer": "worked solution #### 72"}."""
    solution, _, answer = row["answer"].rpartition("####")
    return {
        "id": name, "problem": row["question"], "answer": answer.strip().replace(",", ""),
        "subject": "gsm8k", "solution": solution.strip(),
    }


def problems(split):
    """The published test set if `split` is "test", otherwise the published training set."""
    file = "test.jsonl" if split == "test" else "train.jsonl"
    path = fetch("gsm8k", file, URL + file, FILES[file])
    return [from_row(row, f"gsm8k/{path.stem}/{number}") for number, row in read_rows(path)]
