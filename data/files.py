"""Problem sets stored as files: find, download, verify and read them.

A set is looked up in the directory named by the environment variable REASONER_DATA, then in
data/cache/; if it is in neither, it is downloaded into data/cache/. Both have one subdirectory per
set: gsm8k/train.jsonl, math500/test.jsonl, ...
"""

import hashlib
import json
import os
import random
import urllib.request
from http.client import HTTPException
from pathlib import Path

from data.families import split_of

CACHE = Path(__file__).resolve().parent / "cache"


def search_dirs(name):
    """The directories to search for a set, in order."""
    return [Path(root) / name for root in (os.environ.get("REASONER_DATA"), CACHE) if root]


def download(url, path, timeout_s=30):
    """Download `url` to `path`, renaming it into place once complete.

    Raises FileNotFoundError if the download fails.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            content = reply.read()  # raises if shorter than its Content-Length
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        raise FileNotFoundError(
            f"{url} could not be downloaded ({error}); place the file by hand at {path}, or set "
            f"REASONER_DATA to a directory that contains {path.parent.name}/{path.name}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def fetch(name, file, url, sha256):
    """The path of a file of a set, downloaded if missing. Raises ValueError if its hash differs."""
    path = next((root / file for root in search_dirs(name) if (root / file).is_file()), None)
    if not path:
        path = CACHE / name / file
        download(url, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the published {name}/{file}: its sha256 is {found[:12]}, "
                         f"expected {sha256[:12]}; delete it to download it again")
    return path


def read_rows(path):
    """Yield (line number, object) for each non-blank line of a .jsonl file.

    Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    try:
        file = open(path, "rb")
    except OSError as error:  # such as a directory
        raise FileNotFoundError(f"{path}: {error.strerror}; expected a .jsonl file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))  # Windows editors write a BOM
                if b"\\ud" in line.lower():  # a lone surrogate cannot be encoded
                    json.dumps(row, ensure_ascii=False).encode()
                if not isinstance(row, dict):
                    raise ValueError(f"found a {type(row).__name__}")
            except UnicodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the "
                                 "file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
            yield number, row


def select_split(problems, split):
    """One split of a training set: "dev" is a tenth, selected by hash, and "train" is the rest."""
    if split == "test":
        return problems
    return [p for p in problems if (split_of(p["problem"]) == "dev") == (split == "dev")]


def random_subset(problems, limit, seed):
    """`limit` random problems (files are often sorted); a subset of any larger draw."""
    if limit is None or limit >= len(problems):
        return problems
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[i] for i in order[:limit]]
