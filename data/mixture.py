"""Which problems a run asks, and when: mixtures of problem sets, and what is held out of them."""

import hashlib
import itertools
import json
import random
import re
import unicodedata
from pathlib import Path

from data import load_problems, split_levels, split_names, with_own_ids


def split_number(word):
    """"gsm8k=2" -> ("gsm8k", 2.0); without a number behind it, 1.0."""
    found = re.fullmatch(r"(.+)=(\d*\.?\d+)", word)
    return (found[1], float(found[2])) if found else (word, 1.0)


def load_mixture(words, limit):
    """["gsm8k=2", "mine.jsonl"] -> ([problems of each set's train split], [proportions])."""
    names, proportions = zip(*map(split_number, words))
    if 0 in proportions:
        raise ValueError(f"--data {' '.join(words)}: a proportion is not a positive number")
    sets = [load_problems(name, "train", limit) for name in names]
    own = iter(with_own_ids(itertools.chain(*sets)))
    return [list(itertools.islice(own, len(problems))) for problems in sets], proportions


def files_of(words):
    """The .jsonl files, by absolute path, among words such as "gsm8k,mine.jsonl:1-3=2"."""
    names = [name for word in words for name in split_names(split_number(word)[0])]
    return {Path(split_levels(name)[0]).resolve() for name in names if ".jsonl" in name}


def load_held_out(name, trained_on, dev_limit, test_limit):
    """(dev, test) of what `name` lists. test_limit 0: no test.

    trained_on: the words of load_mixture. Of a file among them, both are what training leaves.
    """
    dev = load_problems(name, "dev", dev_limit)
    test = []
    names = split_names(name)
    for each in names if test_limit else []:
        split = "dev" if files_of([each]) & files_of(trained_on) else "test"
        test += load_problems(each, split, max(1, test_limit // len(names)))
    return dev, test


def problem_key(text):
    """Sixteen characters by which a problem is recognised, however it is spaced or capitalised."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def keys_of(problems):
    return [problem_key(problem["problem"]) for problem in problems]


def data_hash(*problem_lists):
    """Twelve characters that change with any problem or answer, and with their order."""
    texts = [[[p["problem"], p["answer"]] for p in problems] for problems in problem_lists]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def problem_order(sets, proportions, seed):
    """Endless problems: sets drawn by proportion, each in permutations by (seed, epoch)."""
    taken = [0] * len(sets)
    orders = [None] * len(sets)
    for place in itertools.count():
        i = random.Random(f"{seed} {place}").choices(range(len(sets)), proportions)[0]
        epoch, index = divmod(taken[i], len(sets[i]))
        if index == 0:
            orders[i] = random.Random(f"{seed} {i} {epoch}").sample(sets[i], len(sets[i]))
        taken[i] += 1
        yield orders[i][index]
