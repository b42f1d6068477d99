"""What the generated families share: splits, drawing problems, checking and spoiling thoughts.

A family is a module (arithmetic, words, knights, algebra, debugging, science) with

    generate(level, rng, split=None)    a problem, or None when it falls into another split:
                                        id, problem, answer, level, subject, solution, key
    problems(split, limit=None, seed=0, levels=ALL_LEVELS)    many of them
    check_steps(problem, thought)       the first wrong line, (index, line, reason), or None
    plant_error(problem, rng)           a thought with one wrong step and the right answer:
                                        what a step check must catch
    plant_slip(problem, rng)            a thought with a slip that is noticed and repaired:
                                        what a step check must let pass

A problem's `solution` is a thought as the checker wants it: one step a line, the last line
"The answer is ...". Every family but arithmetic is built from the functions below.
"""

import hashlib
import random

ALL_LEVELS = (1, 2, 3, 4, 5)
SIZES = {"train": 2000, "dev": 500, "test": 1000}
REPAIRS = ("Wait, that is wrong. ", "Wait, let me redo this. ", "Hold on, I made a slip. ")
OFFSETS = (-10, -2, -1, 1, 2, 10)  # how far off a wrong result is

# ---- problems


def split_of(key):
    """The split of a key, always the same: a tenth of all keys is test, a tenth dev."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {9: "test", 8: "dev"}.get(share, "train")


def record(family, level, problem, answer, lines, key, split=None, **extra):
    """A problem as a dict; None when `split` is given and the key belongs to another.

    The id comes from the text, so that the same problem has the same id in every run.
    """
    key = f"{family} {key}"
    if split and split_of(key) != split:
        return None
    digest = hashlib.sha256(problem.encode()).hexdigest()[:12]
    return {
        "id": f"{family}/{digest}", "problem": problem, "answer": answer, "level": level,
        "subject": family, "solution": "\n".join([*lines, conclude(answer)]), "key": key, **extra,
    }


def sample_family(generate, split, limit=None, seed=0, levels=ALL_LEVELS):
    """`limit` problems of one split, no key twice, from each level in turn.

    The key alone decides the split, so no two splits share one, whatever the seeds. There are
    fewer only when every level has run dry.
    """
    rng = random.Random(f"{generate.__module__} {split} {seed}")
    wanted = limit or SIZES[split]
    found, seen, dry, turn = [], set(), set(), 0
    while len(found) < wanted and len(dry) < len(levels):
        level = levels[turn % len(levels)]
        turn += 1
        for _ in range(0 if level in dry else 2000):
            problem = generate(level, rng, split)
            if problem and problem["key"] not in seen:
                seen.add(problem["key"])
                found.append(problem)
                break
        else:
            dry.add(level)
    return found


# ---- thoughts


def conclude(answer):
    return f"The answer is {answer}."


def first_wrong(thought, step, conclusion):
    """The first line of a thought that is not a right step, (index, line, reason), or None.

    step(line) -> (subject, reason): what the line is about (None when it cannot be read), and why
    it is wrong (None when it is right). It remembers what the right lines establish.
    conclusion() -> the answer that they establish, or None. The last line has to state it: a
    thought that stops short proves nothing.

    A wrong line is forgiven when the next one takes it back, with one of REPAIRS, and is a right
    step about the same subject.
    """
    lines = [(i, line.strip()) for i, line in enumerate(thought.split("\n")) if line.strip()]
    slip = slip_subject = None  # the line before, when it is wrong and may still be repaired
    for index, line in lines:
        repair = next((words for words in REPAIRS if line.startswith(words)), "")
        claim = line.removeprefix(repair)
        if claim.startswith("The answer is "):
            answer = conclusion()
            subject = "answer"
            reason = None if claim == conclude(answer) else f"the steps establish {answer}"
        else:
            subject, reason = step(claim)
        repaired = repair and reason is None and subject == slip_subject
        if slip and not repaired:
            return slip
        if repair and not slip and reason is None:
            reason = "takes back a line that was right"
        slip = (index, line, reason) if reason else None
        slip_subject = subject
        if slip and (repair or subject is None):
            return slip
    if slip:
        return slip
    if not lines or claim != conclude(conclusion()):
        end = lines[-1][0] + 1 if lines else 0
        return end, "", "the thought does not end in the answer"
    return None


def draw_offset(rng, *values):
    """One of OFFSETS that leaves each of the values positive."""
    return rng.choice([offset for offset in OFFSETS if min(values) + offset > 0])


def replace_match(text, found, new):
    """The text with a regular expression's match replaced."""
    return text[:found.start()] + str(new) + text[found.end():]


def spoil_line(spoil, problem, rng):
    """(the lines of the solution, the index of one, what `spoil` makes of that one).

    spoil(line, rng) -> a line that is wrong in its place, or None where it knows none.
    """
    lines = problem["solution"].split("\n")
    spoiled = [(index, spoil(line, rng)) for index, line in enumerate(lines[:-1])]
    return lines, *rng.choice([(index, wrong) for index, wrong in spoiled if wrong])


def plant_error(spoil, problem, rng):
    """The solution with one wrong line. A family binds its own `spoil`."""
    lines, index, wrong = spoil_line(spoil, problem, rng)
    return "\n".join([*lines[:index], wrong, *lines[index + 1:]])


def plant_slip(spoil, problem, rng):
    """The solution with a wrong line that the next one takes back and puts right."""
    lines, index, wrong = spoil_line(spoil, problem, rng)
    repaired = rng.choice(REPAIRS) + lines[index]
    return "\n".join([*lines[:index], wrong, repaired, *lines[index + 1:]])
