"""Problem sets that are files: found, downloaded, checked, read.

A set is looked for in the directory that the environment variable REASONER_DATA names, then in
data/cache/; what is in neither is downloaded into the second. Either holds one directory per set:
gsm8k/train.jsonl, math500/test.jsonl, ...
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


def places(name):
    """The directories where a set may lie, in the order in which they are tried."""
    return [Path(root) / name for root in (os.environ.get("REASONER_DATA"), CACHE) if root]


def download(url, path, timeout_s=30):
    """Writes `url` to `path`, under another name until it is whole.

    Raises FileNotFoundError when it cannot be had.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            content = reply.read()  # which raises when less comes than was announced
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        raise FileNotFoundError(
            f"{url} could not be downloaded ({error}); place that file by hand at {path}, or set "
            f"REASONER_DATA to a directory that holds {path.parent.name}/{path.name}"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def fetch(name, file, url, rows, sha256):
    """The path of one file of a set, downloaded at need. Raises ValueError for another content."""
    path = next((place / file for place in places(name) if (place / file).is_file()), None)
    if not path:
        path = CACHE / name / file
        download(url, path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the published {name}/{file}: {len(content.splitlines())} "
                         f"rows with sha256 {found[:12]}..., expected {rows} with "
                         f"{sha256[:12]}...; delete it to get it anew")
    return path


def read_rows(path):
    """Yields (line number, object) for each line of a .jsonl file that is not blank.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    try:
        file = open(path, "rb")
    except OSError as error:  # a directory, say
        raise FileNotFoundError(f"{path}: {error.strerror}; expected a .jsonl file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))  # Windows puts a mark in front
                if b"\\ud" in line.lower():  # half of a pair cannot be encoded again
                    json.dumps(row, ensure_ascii=False).encode()
                if not isinstance(row, dict):
                    raise ValueError(f"found a {type(row).__name__}")
            except UnicodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the "
                                 "file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
            yield number, row


def hold_out(problems, split):
    """A training set divided: `dev` is the tenth that a problem's hash picks, `train` the rest."""
    if split == "test":
        return problems
    return [p for p in problems if (split_of(p["problem"]) == "dev") == (split == "dev")]


def choose(problems, limit, seed):
    """A random subset, part of any larger one; no prefix, for files are often sorted."""
    if limit is None or limit >= len(problems):
        return problems
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    return [problems[i] for i in order[:limit]]
