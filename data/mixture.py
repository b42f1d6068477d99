"""The problems of a training run: mixtures of sets, held-out sets, and the sampling order."""

import hashlib
import itertools
import json
import random
import re
import unicodedata
from pathlib import Path

from data import load_problems, split_levels, split_names, with_unique_ids


def split_number(word):
    """"gsm8k=2" -> ("gsm8k", 2.0); the number defaults to 1.0."""
    found = re.fullmatch(r"(.+)=(\d*\.?\d+)", word)
    return (found[1], float(found[2])) if found else (word, 1.0)


def load_mixture(words, limit):
    """["gsm8k=2", "mine.jsonl"] -> (one list of training problems per set, proportions)."""
    names, proportions = zip(*map(split_number, words))
    if 0 in proportions:
        raise ValueError(f"--data {' '.join(words)}: proportions must be positive")
    sets = [load_problems(name, "train", limit) for name in names]
    unique = iter(with_unique_ids(itertools.chain(*sets)))
    return [list(itertools.islice(unique, len(problems))) for problems in sets], proportions


def files_of(words):
    """The absolute paths of the .jsonl files in words such as "gsm8k,mine.jsonl:1-3=2"."""
    names = [name for word in words for name in split_names(split_number(word)[0])]
    return {Path(split_levels(name)[0]).resolve() for name in names if ".jsonl" in name}


def load_held_out(name, trained_on, dev_limit, test_limit):
    """(dev problems, test problems) of the sets in `name`; no test problems if test_limit is 0.

    trained_on: load_mixture's words. A file that is trained on provides its dev split for both.
    """
    dev = load_problems(name, "dev", dev_limit)
    test = []
    names = split_names(name)
    for each in names if test_limit else []:
        split = "dev" if files_of([each]) & files_of(trained_on) else "test"
        test += load_problems(each, split, max(1, test_limit // len(names)))
    return dev, test


def problem_key(text):
    """A 16-character hash of a problem's text that ignores spacing and case."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def keys_of(problems):
    return [problem_key(problem["problem"]) for problem in problems]


def data_hash(*problem_lists):
    """A 12-character hash of the problems and answers, in order."""
    texts = [[[p["problem"], p["answer"]] for p in problems] for problems in problem_lists]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def problem_order(sets, proportions, seed):
    """Yield problems forever: a set drawn by proportion, its problems reshuffled every epoch."""
    taken = [0] * len(sets)
    orders = [None] * len(sets)
    for position in itertools.count():
        i = random.Random(f"{seed} {position}").choices(range(len(sets)), proportions)[0]
        epoch, index = divmod(taken[i], len(sets[i]))
        if index == 0:
            orders[i] = random.Random(f"{seed} {i} {epoch}").sample(sets[i], len(sets[i]))
        taken[i] += 1
        yield orders[i][index]
