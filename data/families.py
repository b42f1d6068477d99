"""What the generated families share: the split, the sampling of problems, and the walk over the lines of a thought.

A family is a module (arithmetic, words, knights, algebra, debugging, science) with

    generate(level, rng) -> problem         id, problem, answer, level, subject, solution, key
    problems(split, limit=None, seed=0)     many of them, from one split
    check_steps(problem, thought)           the first line that is not a right step: (index, line, reason), or None
    plant_error(problem, rng) -> thought    one step is wrong, the answer is right: what a step check must catch
    plant_slip(problem, rng) -> thought     a slip which is noticed and repaired: what a step check must let pass
"""

import hashlib
import random

SPLITS = ("train", "dev", "test")
SIZES = {"train": 2000, "dev": 500, "test": 1000}
REPAIRS = ("Wait, that is wrong. ", "Wait, let me redo this. ", "Hold on, I made a slip. ")


def split_of(key):
    """The split a key belongs to, always the same one: a tenth of all keys are test, a tenth dev, the rest train."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {9: "test", 8: "dev"}.get(share, "train")


def check_request(split, limit):
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} problems leaves nothing; give at least 1, or none for all")


def sample_family(generate, split, limit=None, seed=0, levels=(1, 2, 3, 4, 5)):
    """`limit` problems of one split, no key twice, the levels in turn; fewer only when every level has run dry.

    A problem's split is decided by its key, so no two splits share one, whatever the seeds.
    """
    check_request(split, limit)
    rng = random.Random(f"{generate.__module__} {split} {seed}")
    wanted, seen, found, dry, turn = limit or SIZES[split], set(), [], set(), 0
    while len(found) < wanted and len(dry) < len(levels):
        level = levels[turn % len(levels)]
        turn += 1
        for _ in range(0 if level in dry else 1000):
            problem = generate(level, rng)
            if split_of(problem["key"]) == split and problem["key"] not in seen:
                seen.add(problem["key"])
                found.append(problem)
                break
        else:
            dry.add(level)
    return found


def first_wrong(thought, step, finished):
    """The first line of a thought that is not a right step: (index, line, reason), or None when all are.

    step(line) -> (subject, reason): what the line is about (None when it cannot be read), and why it is wrong (None when
    it is right); it remembers what right lines establish. A wrong line is forgiven when the very next one takes it back,
    with one of REPAIRS, and is a right step about the same subject. finished() -> None, or what is still missing after
    the last line: a thought that stops short proves nothing.
    """
    lines = [(index, line.strip()) for index, line in enumerate(thought.split("\n")) if line.strip()]
    slip = None
    for index, line in lines:
        repair = next((words for words in REPAIRS if line.startswith(words)), "")
        subject, reason = step(line[len(repair):])
        if slip and not (repair and reason is None and subject == slip[1]):
            return slip[0]
        if repair and not slip and reason is None:
            reason = "takes back a line that was right"
        slip = ((index, line, reason), subject) if reason else None
        if slip and (repair or subject is None):
            return slip[0]
    if slip:
        return slip[0]
    missing = finished()
    return (lines[-1][0] + 1 if lines else 0, "", missing) if missing else None
