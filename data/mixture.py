"""Which problems a run asks, and when: mixtures of problem sets, and what is held out of them."""

import itertools
import random
import re
from pathlib import Path

from data import load_problems


def split_number(word):
    """"gsm8k=2" -> ("gsm8k", 2.0); without a number behind it, 1.0."""
    found = re.fullmatch(r"(.+)=(\d*\.?\d+)", word)
    return (found[1], float(found[2])) if found else (word, 1.0)


def load_mixture(words, limit):
    """["gsm8k=2", "mine.jsonl"] -> ([problems of each set's train split], [proportions])."""
    names, proportions = zip(*map(split_number, words))
    if 0 in proportions:
        raise ValueError(f"--data {' '.join(words)}: a proportion is not a positive number")
    return [load_problems(name, "train", limit) for name in names], proportions


def load_held_out(name, trained_on, dev_limit, test_limit):
    """(dev, test) of a problem set or file: never trained on. test_limit 0: no test.

    trained_on: the words of load_mixture. Of a file among them, both are what training leaves.
    """
    dev = load_problems(name, "dev", dev_limit)
    if not test_limit:
        return dev, []
    files = [Path(split_number(word)[0]).resolve() for word in trained_on if ".jsonl" in word]
    split = "dev" if Path(name).resolve() in files else "test"
    return dev, load_problems(name, split, test_limit)


def problem_order(sets, proportions, seed, curriculum=False):
    """Endless (place, problem): sets drawn by proportion, each in permutations by (seed, epoch)."""
    taken = [0] * len(sets)
    orders = [None] * len(sets)
    for place in itertools.count():
        i = random.Random(f"{seed} {place}").choices(range(len(sets)), proportions)[0]
        epoch, index = divmod(taken[i], len(sets[i]))
        if index == 0:
            rng = random.Random(f"{seed} {i} {epoch}")
            orders[i] = rng.sample(sets[i], len(sets[i]))
            if curriculum:  # by level, blurred by one
                orders[i].sort(key=lambda problem: problem.get("level", 3) + rng.random())
        taken[i] += 1
        yield place, orders[i][index]
