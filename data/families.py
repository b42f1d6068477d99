"""What the generated families share: splits, drawing problems, checking and spoiling thoughts.

A family is a module (arithmetic, words, knights, algebra, debugging, science) with

    generate(level, rng, split)      a problem, or None when it falls into another split:
                                     id, problem, answer, level, subject, solution, key
    check_steps(problem, thought)    the first wrong line, (index, line, reason), or None
    spoil(line, before, rng)         a line that is wrong in place of this one of a solution, whose
                                     line before is given too; None where it knows none

and REPAIRS, if it takes a slip back in words of its own. A problem's `solution` is a thought as the
checker wants it: one step a line, the last line "The answer is ..." (in arithmetic, the answer).
"""

import hashlib
import random
from collections import deque

ALL_LEVELS = (1, 2, 3, 4, 5)
SIZES = {"train": 2000, "dev": 500, "test": 1000}
REPAIRS = ("Wait, that is wrong. ", "Wait, let me redo this. ", "Hold on, I made a slip. ")
OFFSETS = (-10, -2, -1, 1, 2, 10)  # how far off a wrong result is

# ---- problems


def split_of(key):
    """The split of a key, always the same: a tenth of all keys is test, a tenth dev."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {9: "test", 8: "dev"}.get(share, "train")


def record(family, level, problem, answer, lines, key, split, **extra):
    """A problem as a dict, or None when its key belongs to another split.

    The id comes from the text, so that the same problem has the same id in every run.
    """
    key = f"{family} {key}"
    if split_of(key) != split:
        return None
    digest = hashlib.sha256(problem.encode()).hexdigest()[:12]
    return {
        "id": f"{family}/{digest}", "problem": problem, "answer": answer, "level": level,
        "subject": family, "solution": "\n".join([*lines, conclude(answer)]), "key": key, **extra,
    }


def draw_problems(family, split, limit=None, seed=0, levels=ALL_LEVELS):
    """`limit` problems of one split, no key twice, from each level in turn.

    The key alone decides the split, so no two splits share one, whatever the seeds. There are
    fewer only when every level has run dry.
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


def conclude(answer):
    return f"The answer is {answer}."


def first_wrong(thought, step, conclusion, repairs=REPAIRS):
    """The first line of a thought that is not a right step, (index, line, reason), or None.

    step(line) -> (subject, reason): what the line is about (None when it cannot be read), and why
    it is wrong (None when it is right). It remembers what the right lines establish.
    conclusion() -> the answer that they establish, or None. The last line has to state it: a
    thought that stops short proves nothing.

    A wrong line is forgiven when the next one takes it back, with one of `repairs`, and is a right
    step about the same subject.
    """
    lines = [(i, line.strip()) for i, line in enumerate(thought.split("\n")) if line.strip()]
    slip = subject = None  # the line before, when it is wrong and may still be repaired
    for index, line in lines:
        repair = next((words for words in repairs if line.startswith(words)), "")
        claim = line.removeprefix(repair)
        slip_subject = subject
        if claim.startswith("The answer is "):
            answer = conclusion()
            subject = "answer"
            right = answer is not None and claim == conclude(answer)
            reason = None if right else f"the steps establish {answer}"
        else:
            subject, reason = step(claim)
        if slip and (reason or not repair or subject != slip_subject):
            return slip
        if repair and not slip:
            return index, line, reason or "takes back a line that was right"
        slip = (index, line, reason) if reason else None
        if slip and subject is None:
            return slip
    if not slip and subject != "answer":
        return lines[-1][0] + 1 if lines else 0, "", "the thought does not end in the answer"
    return slip


def draw_offset(rng, *values):
    """One of OFFSETS that leaves each of the values positive."""
    return rng.choice([offset for offset in OFFSETS if min(values) + offset > 0])


def replace_match(text, found, new):
    """The text with a regular expression's match replaced."""
    return text[:found.start()] + str(new) + text[found.end():]


def repairs_of(family):
    return getattr(family, "REPAIRS", REPAIRS)


def draw_slip(family, lines, rng):
    """(index, wrong line) of one of the lines before the conclusion; (None, None) without any."""
    steps = [line for line in lines if not line.startswith("The answer is ")]
    slips = [(index, family.spoil(line, before, rng))
             for index, (before, line) in enumerate(zip([None, *steps], steps))]
    return rng.choice([slip for slip in slips if slip[1]] or [(None, None)])


def plant_error(family, problem, rng):
    """A thought with one wrong step and the right answer: what a step check must catch."""
    lines = problem["solution"].split("\n")
    index, wrong = draw_slip(family, lines[:-1], rng)
    if wrong:
        lines[index] = wrong
    else:  # the answer is the only step: it is taken back without reason and said again
        lines.append(repairs_of(family)[0] + lines[-1])
    return "\n".join(lines)


def plant_slip(family, problem, rng):
    """A thought with a slip, where one fits, that the next line takes back and puts right: what a
    step check must let pass."""
    lines = problem["solution"].split("\n")
    index, wrong = draw_slip(family, lines, rng)
    if wrong:
        lines[index:index + 1] = [wrong, rng.choice(repairs_of(family)) + lines[index]]
    return "\n".join(lines)
