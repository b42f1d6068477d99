"""What the generated families share: the split, the sampling of problems, the walk over the lines of a thought.

A family is a module (arithmetic, words, knights, algebra, debugging, science) with

    generate(level, rng) -> problem         id, problem, answer, level, subject, solution, key
    problems(split, limit=None, seed=0, levels=ALL_LEVELS)      many of them, from one split
    check_steps(problem, thought)           the first line that is not a right step: (index, line, reason), or None
    plant_error(problem, rng) -> thought    one step is wrong, the answer is right: what a step check must catch
    plant_slip(problem, rng) -> thought     a slip which is noticed and repaired: what a step check must let pass

A problem's `solution` is a thought as the checker wants it: one step a line, the last one "The answer is ...".
"""

import hashlib
import random

SPLITS = ("train", "dev", "test")
ALL_LEVELS = (1, 2, 3, 4, 5)
SIZES = {"train": 2000, "dev": 500, "test": 1000}
REPAIRS = ("Wait, that is wrong. ", "Wait, let me redo this. ", "Hold on, I made a slip. ")


# ---------------------------------------------------------------------------------------------- problems


def split_of(key):
    """The split a key belongs to, always the same one: a tenth of all keys are test, a tenth dev, the rest train."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {9: "test", 8: "dev"}.get(share, "train")


def check_request(split, limit):
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} problems leaves nothing; give at least 1, or none for all")


def record(family, level, problem, answer, lines, key, **extra):
    """A problem; its id comes from its text, so that the same problem has the same id in every run."""
    digest = hashlib.sha256(problem.encode()).hexdigest()[:12]
    solution = "\n".join([*lines, conclude(answer)])
    return {"id": f"{family}/{digest}", "problem": problem, "answer": answer, "level": level, "subject": family,
            "solution": solution, "key": f"{family} {key}", **extra}


def sample_family(generate, split, limit=None, seed=0, levels=ALL_LEVELS):
    """`limit` problems of one split, no key twice, the levels in turn; fewer only when every level has run dry.

    A problem's split is decided by its key, so no two splits share one, whatever the seeds. generate(level, rng) may
    return None instead of a problem of another split, where the rest of its work is expensive.
    """
    check_request(split, limit)
    rng = random.Random(f"{generate.__module__} {split} {seed}")
    wanted, seen, found, dry, turn = limit or SIZES[split], set(), [], set(), 0
    while len(found) < wanted and len(dry) < len(levels):
        level = levels[turn % len(levels)]
        turn += 1
        for _ in range(0 if level in dry else 2000):
            problem = generate(level, rng)
            if problem and split_of(problem["key"]) == split and problem["key"] not in seen:
                seen.add(problem["key"])
                found.append(problem)
                break
        else:
            dry.add(level)
    return found


# ---------------------------------------------------------------------------------------------- thoughts


def conclude(answer):
    return f"The answer is {answer}."


def first_wrong(thought, step, conclusion):
    """The first line of a thought that is not a right step: (index, line, reason), or None when all are.

    step(line) -> (subject, reason): what the line is about (None when it cannot be read), and why it is wrong (None
    when it is right); it remembers what right lines establish. conclusion() -> the answer they establish, or None: the
    last line has to state it, for a thought that stops short proves nothing. A wrong line is forgiven when the next one
    takes it back, with one of REPAIRS, and is a right step about the same subject.
    """
    lines = [(index, line.strip()) for index, line in enumerate(thought.split("\n")) if line.strip()]
    slip = slip_subject = None
    for index, line in lines:
        repair = next((words for words in REPAIRS if line.startswith(words)), "")
        claim = line[len(repair):]
        if claim.startswith(conclude("")[:-1]):
            answer = conclusion()
            subject, reason = "answer", (None if claim == conclude(answer) else f"the steps establish {answer}")
        else:
            subject, reason = step(claim)
        if slip and not (repair and reason is None and subject == slip_subject):
            return slip
        if repair and not slip and reason is None:
            reason = "takes back a line that was right"
        slip, slip_subject = ((index, line, reason) if reason else None), subject
        if slip and (repair or subject is None):
            return slip
    if not slip and (not lines or claim != conclude(conclusion())):
        return (lines[-1][0] + 1 if lines else 0), "", "the thought does not end in the answer"
    return slip


def plant_error(problem, rng, spoil):
    """The solution with one wrong line. spoil(line) -> a line that is wrong in its place, or None where it has none."""
    lines = problem["solution"].split("\n")
    index, wrong = rng.choice([(i, w) for i, line in enumerate(lines[:-1]) if (w := spoil(line))])
    return "\n".join([*lines[:index], wrong, *lines[index + 1:]])


def plant_slip(problem, rng, spoil):
    """The solution with a wrong line that the next line takes back and puts right."""
    lines = problem["solution"].split("\n")
    index, wrong = rng.choice([(i, w) for i, line in enumerate(lines[:-1]) if (w := spoil(line))])
    return "\n".join([*lines[:index], wrong, rng.choice(REPAIRS) + lines[index], *lines[index + 1:]])
