"""Rewards beside accuracy and format: what grpo.py takes off for length, loops and languages.

A reward takes a grpo.Group and returns a float for each of its completions, or None where it cannot
say. These lie in [-1, 0].
"""

import functools
import importlib.util
from pathlib import Path

from model import did_you_mean


def brevity(group):
    """0 for the shortest right completion, down to -1 for one of three times its length; wrong: 0.

    Relative to the group, so that easy problems get short thoughts and hard ones may stay long.
    """
    lengths = [len(c.tokens) for c in group.completions]
    shortest = min((n for n, right in zip(lengths, group.right) if right), default=1)
    penalties = [-min(1.0, (n - shortest) / (2 * shortest)) for n in lengths]
    return [None if right is None else right * penalty
            for right, penalty in zip(group.right, penalties)]


def repetition(group, n=4, free=0.2):
    """Down to -1 with the share of repeated token n-grams above `free`, in any language."""
    rewards = []
    for c in group.completions:
        grams = [tuple(c.tokens[i:i + n]) for i in range(len(c.tokens) - n + 1)]
        share = 1 - len(set(grams)) / max(1, len(grams))
        rewards.append(-max(0.0, share - free) / (1 - free) if grams else 0.0)
    return rewards


def script_of(letter):
    if ord(letter) < 0x250:
        return "latin"
    return ord(letter) >> 8 if ord(letter) < 0x2E80 else "east asian"


def language(group):
    """Down to -1 with the share of letters of scripts that the problem does not use.

    Latin is free: formulas need it.
    """
    home = {"latin"} | {script_of(c) for c in group.problem["problem"] if c.isalpha()}
    letters = [[c for c in text if c.isalpha()] for text in group.texts]
    return [-sum(script_of(c) not in home for c in row) / max(1, len(row)) for row in letters]


def overlong(group, share=0.2):
    """0 up to the last `share` of the token budget, then in a line to -1 (DAPO, eq. 13)."""
    start = (1 - share) * group.max_new_tokens
    return [-max(0.0, (len(c.tokens) - start) / (group.max_new_tokens - start))
            for c in group.completions]


@functools.cache
def load_function(path, name):
    """A function of a Python file. Raises FileNotFoundError, or ValueError when there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward {path}:{name}: no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {path}:{name}: the file has no function {name!r}"
                         f"{did_you_mean(name, vars(module))}")
    return getattr(module, name)
