"""What a completion is worth: rewards, and their sum.

A reward takes a grpo.Group and returns a float for each of its completions, or None where it cannot
say. Yours is one more function and one more name in REWARDS, or a function in a file of yours:
`--reward accuracy=1 mine.py:short=0.2`.
"""

import functools
import math
import runpy
from pathlib import Path
from typing import NamedTuple

from data.mixture import split_number
from model import did_you_mean
from verify import format_reward


class Group(NamedTuple):
    """A problem, its G completions and their grades."""
    problem: dict
    prompt: list[int]  # tokens
    texts: list[str]  # without end tokens, and without an opening tag that is in the prompt
    completions: list  # of generate.Completion: tokens, logprobs, finish
    right: list[bool | None]  # None: undecided
    max_new_tokens: int
    think_tag: str
    place: int = 0  # of the problem within the step
    parts: dict[str, list] = {}  # name of a reward -> [G]
    rewards: list[float | None] = ()  # [G] weighted sums of the parts; None: undecided
    advantages: list[float | None] = ()  # [G] None: undecided, not trained on


def accuracy(group):
    return [None if right is None else float(right) for right in group.right]


def well_formed(group):
    """A well-formed thinking block at most, one boxed answer, nothing after it."""
    return [format_reward(text, group.think_tag) for text in group.texts]


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
    code = ord(letter)
    if code < 0x250:
        return "latin"
    return code >> 8 if code < 0x2E80 else "east asian"


def language(group):
    """Down to -1 with the share of letters of scripts that the problem does not use.

    Latin is free: formulas need it.
    """
    home = {"latin"} | {script_of(c) for c in group.problem["problem"] if c.isalpha()}
    scripts = [[script_of(c) for c in text if c.isalpha()] for text in group.texts]
    return [-sum(script not in home for script in row) / max(1, len(row)) for row in scripts]


def overlong(group, share=0.2):
    """0 up to the last `share` of the token budget, then in a line to -1 (DAPO, eq. 13)."""
    start = (1 - share) * group.max_new_tokens
    return [-max(0.0, (len(c.tokens) - start) / (group.max_new_tokens - start))
            for c in group.completions]


# All but the first two are penalties, in [-1, 0].
REWARDS = {"accuracy": accuracy, "format": well_formed, "brevity": brevity,
           "repetition": repetition, "language": language, "overlong": overlong}

# ------------------------------------------------------------ their sum


@functools.cache
def load_function(path, name):
    """A function of a Python file. Raises FileNotFoundError, or ValueError when there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward {path}:{name}: no file {path}")
    found = runpy.run_path(path)
    if not callable(found.get(name)):
        raise ValueError(f"--reward {path}:{name}: the file has no function {name!r}"
                         f"{did_you_mean(name, found)}")
    return found[name]


def reward_fn(name):
    """The function behind a name of REWARDS, or behind FILE.py:FUNCTION."""
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return load_function(path, function)
    if name not in REWARDS:
        raise ValueError(f"--reward {name!r}: expected NAME=COEFFICIENT, a number of at least 0 "
                         f"and a name of {', '.join(REWARDS)}, or FILE.py:FUNCTION"
                         f"{did_you_mean(name, REWARDS)}")
    return REWARDS[name]


def parse_rewards(words):
    """["accuracy=1", "mine.py:short=0.1"] -> {name: coefficient}.

    Raises ValueError for unknown names, and when a wrong answer could score above a right one.
    """
    coefficients = dict(map(split_number, words))
    for name in coefficients:
        reward_fn(name)
    accuracy = coefficients.get("accuracy", math.inf)
    others = sum(c for name, c in coefficients.items() if name != "accuracy")
    if others >= accuracy:
        raise ValueError(f"--reward: the other coefficients sum to {others:g}, that of accuracy is "
                         f"{accuracy:g}; it needs more, or a wrong answer may beat a right one")
    return coefficients


def reward_by(name, group):
    """What a reward says of each completion. Raises ValueError, with its name, unless it may."""
    values = reward_fn(name)(group)
    if not isinstance(values, (list, tuple)) or len(values) != len(group.texts):
        raise ValueError(f"--reward {name} returned {values!r:.60}, expected a list of "
                         f"{len(group.texts)} numbers, one for each completion")
    for value in values:
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and not number:
            raise ValueError(f"--reward {name} returned {value!r:.60} for a completion, expected a "
                             "finite number, or None where it cannot say")
    return list(values)


def reward_group(group, coefficients):
    """The group with `parts` and `rewards`; a completion with an undecided part has no reward."""
    parts = {name: reward_by(name, group) for name in coefficients}
    rewards = []
    for i in range(len(group.texts)):
        values = [part[i] for part in parts.values()]
        weighted = (c * value for c, value in zip(coefficients.values(), values))
        rewards.append(None if None in values else sum(weighted, 0.0))
    return group._replace(parts=parts, rewards=rewards)


def has_spread(group):
    """Whether a group has a gradient: two of its rewards are decided and differ."""
    decided = [reward for reward in group.rewards if reward is not None]
    return len(decided) > 1 and max(decided) - min(decided) > 1e-6
