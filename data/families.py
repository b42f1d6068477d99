"""Shared by the generated families: splits, drawing problems, checking and corrupting thoughts.

A family is a module (arithmetic, words, knights, algebra, debugging, science) that defines

    generate(level, rng, split)      a problem, or None if the draw is unusable or of another split:
                                     id, problem, answer, level, subject, solution, key
    check_steps(problem, thought)    the first wrong line, (index, line, reason), or None
    corrupt(line, previous, rng)     a wrong replacement for one line of a solution, given the line
                                     before it; None if there is none

and optionally REPAIRS, its own phrases for retracting a slip. A problem's `solution` is a thought
that passes the checker: one step per line, ending in "The answer is ..." (arithmetic: the answer).
"""

import hashlib
import random
from collections import deque

ALL_LEVELS = (1, 2, 3, 4, 5)
SIZES = {"train": 2000, "dev": 500, "test": 1000}
REPAIRS = ("Wait, that is wrong. ", "Wait, let me redo this. ", "Hold on, I made a slip. ")
OFFSETS = (-10, -2, -1, 1, 2, 10)  # of a wrong result from the right one

# ---- problems


def split_of(key):
    """The split of a key, by its hash: a tenth of all keys are test, a tenth dev."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {9: "test", 8: "dev"}.get(share, "train")


def record(family, level, problem, answer, lines, key, split, **extra):
    """A problem as a dict, or None if its key belongs to another split.

    The id is a hash of the text, so a problem has the same id in every run.
    """
    key = f"{family} {key}"
    if split_of(key) != split:
        return None
    digest = hashlib.sha256(problem.encode()).hexdigest()[:12]
    solution = "\n".join([*lines, answer_line(answer)])
    return {
        "id": f"{family}/{digest}", "problem": problem, "answer": answer, "level": level,
        "subject": family, "solution": solution, "key": key, **extra,
    }


def draw_problems(family, split, limit=None, seed=0, levels=ALL_LEVELS):
    """`limit` problems of one split with distinct keys, cycling through the levels.

    The split depends on the key alone, so splits are disjoint whatever the seeds. Returns fewer
    only if every level is exhausted.
    """
    rng = random.Random(f"{family.__name__} {split} {seed}")
    found = {}  # by key
    waiting = deque(levels)
    while waiting and len(found) < (limit or SIZES[split]):
        level = waiting.popleft()
        for _ in range(2000):
            problem = family.generate(level, rng, split)
            if problem and problem["key"] not in found:
                found[problem["key"]] = problem
                waiting.append(level)
                break
    return list(found.values())


# ---- thoughts


def answer_line(answer):
    return f"The answer is {answer}."


def first_error(thought, check_line, conclusion, repairs=REPAIRS):
    """The first wrong line of a thought, (index, line, reason), or None if all are right.

    check_line(line) -> (subject, reason): what the line is about (None if it cannot be parsed) and
    why it is wrong (None if it is right). It keeps track of what the right lines establish.
    conclusion() -> the answer established so far, or None. The last line must state it; an
    incomplete thought is wrong.

    A wrong line is forgiven if the next line begins with one of `repairs` and is a right step
    about the same subject.
    """
    lines = [(i, line.strip()) for i, line in enumerate(thought.split("\n")) if line.strip()]
    slip = subject = None  # slip: the previous line, if it is wrong but may yet be repaired
    for index, line in lines:
        repair = next((phrase for phrase in repairs if line.startswith(phrase)), "")
        claim = line.removeprefix(repair)
        slip_subject = subject
        if claim.startswith("The answer is "):
            answer = conclusion()
            subject = "answer"
            right = answer is not None and claim == answer_line(answer)
            reason = None if right else f"the steps establish {answer}"
        else:
            subject, reason = check_line(claim)
        if slip and (reason or not repair or subject != slip_subject):
            return slip
        if repair and not slip:
            return index, line, reason or "retracts a line that was right"
        slip = (index, line, reason) if reason else None
        if slip and subject is None:
            return slip
    if not slip and subject != "answer":
        return lines[-1][0] + 1 if lines else 0, "", "the thought does not end with the answer"
    return slip


def draw_offset(rng, *values):
    """A random offset from OFFSETS that keeps every value positive."""
    return rng.choice([offset for offset in OFFSETS if min(values) + offset > 0])


def replace_match(text, found, new):
    """The text with the match object `found` replaced by `new`."""
    return text[:found.start()] + str(new) + text[found.end():]


def repairs_of(family):
    return getattr(family, "REPAIRS", REPAIRS)


def draw_slip(family, lines, rng):
    """(index, wrong line) for a random line before the answer; (None, None) if there is none."""
    steps = [line for line in lines if not line.startswith("The answer is ")]
    slips = [(index, family.corrupt(line, previous, rng))
             for index, (previous, line) in enumerate(zip([None, *steps], steps))]
    return rng.choice([slip for slip in slips if slip[1]] or [(None, None)])


def plant_error(family, problem, rng):
    """A thought with one wrong step but the right answer; a step checker must reject it."""
    lines = problem["solution"].split("\n")
    index, wrong = draw_slip(family, lines[:-1], rng)
    if wrong:
        lines[index] = wrong
    else:  # the answer is the only step: retract it for no reason, then repeat it
        lines.append(repairs_of(family)[0] + lines[-1])
    return "\n".join(lines)


def plant_slip(family, problem, rng):
    """A thought with a slip, if possible, that the next line repairs; a checker must accept it."""
    lines = problem["solution"].split("\n")
    index, wrong = draw_slip(family, lines, rng)
    if wrong:
        lines[index:index + 1] = [wrong, rng.choice(repairs_of(family)) + lines[index]]
    return "\n".join(lines)
