"""Knights and knaves: knights say what is true, knaves what is false; who are the knights?

Each of two to five people speaks once. There is one solution, and suppositions are needed from
level 3 on. A thought is a proof: one person's words and what is known already decide what somebody
is, or contradict what was supposed. A world is a tuple with 1 for each knight and 0 for each knave;
a step is checked by looking at all worlds.
"""

import itertools
import re
from functools import cache, partial

from data import families
from data.families import first_wrong, record, sample_family, split_of
from data.words import NAMES

FORMS = ("is", "and", "or", "if", "same", "differ")
# level: (how many people, what they say, whether the proof needs a supposition)
LEVELS = {
    1: ((2, 3), ("is", "same", "differ", "and"), False),
    2: ((3,), FORMS, False),
    3: ((3,), FORMS, True),
    4: ((4,), FORMS, True),
    5: ((5,), FORMS, True),
}
KINDS = ("knave", "knight")
RULE = "Knights always tell the truth and knaves always lie. "

# ---- worlds


def all_worlds(people):
    return set(itertools.product((0, 1), repeat=people))


def holds(statement, world):
    """Whether a statement, (form, person, kind, other person, kind), is true in a world."""
    form, a, kind_a, b, kind_b = statement
    first = world[a] == kind_a
    second = world[b] == kind_b
    return {
        "is": first, "and": first and second, "or": first or second,
        "if": second or not first, "same": first == second, "differ": first != second,
    }[form]


@cache
def allowed(speaker, statement, people):
    """The worlds in which the speaker can say the statement."""
    worlds = all_worlds(people)
    return frozenset(world for world in worlds if world[speaker] == holds(statement, world))


def words_of(statements):
    """For each speaker, the worlds in which they can say what they say."""
    people = len(statements)
    return [allowed(speaker, tuple(said), people) for speaker, said in enumerate(statements)]


def forced(worlds, person):
    """1 when a person is a knight in all of the worlds, 0 when in none of them, else None."""
    kinds = {world[person] for world in worlds}
    return kinds.pop() if len(kinds) == 1 else None


def where(worlds, person, kind):
    return {world for world in worlds if world[person] == kind}


def answer_of(worlds, names):
    """The knights' names in the only world."""
    [world] = worlds
    return ", ".join(name for name, kind in zip(names, world) if kind) or "none"


# ---- proofs


def settled(worlds, people):
    return {person for person in range(people) if forced(worlds, person) is not None}


def propagate(worlds, known, words, names):
    """(lines, whether they end in a contradiction, worlds left) of all that single words decide."""
    lines = []
    known = set(known)
    progress = True
    while progress:
        progress = False
        for speaker, constraint in enumerate(words):
            if not worlds & constraint:
                return [*lines, f"By {names[speaker]}, a contradiction."], True, worlds
            for person in range(len(words)):
                kind = forced(worlds & constraint, person)
                if person not in known and kind is not None:
                    lines.append(f"By {names[speaker]}, {names[person]} is a {KINDS[kind]}.")
                    worlds = where(worlds, person, kind)
                    known.add(person)
                    progress = True
    return lines, False, worlds


def prove(statements, names):
    """The lines of a proof with suppositions one deep, or None when it takes more than that.

    The statements must have a solution: without a supposition there is no contradiction.
    """
    words = words_of(statements)
    people = len(statements)
    worlds = all_worlds(people)
    lines = []
    while True:
        more, _, worlds = propagate(worlds, settled(worlds, people), words, names)
        lines += more
        known = settled(worlds, people)
        if len(known) == people:
            return lines
        refuted = []
        for person, kind in itertools.product(sorted(set(range(people)) - known), (1, 0)):
            supposed = where(worlds, person, kind)
            more, contradiction, _ = propagate(supposed, known | {person}, words, names)
            if contradiction:
                refuted.append((len(more), person, kind, more))
        if not refuted:
            return None
        _, person, kind, more = min(refuted)  # the shortest
        lines.append(f"Suppose {names[person]} is a {KINDS[kind]}.")
        lines += more
        lines.append(f"So {names[person]} is a {KINDS[1 - kind]}.")
        worlds = where(worlds, person, 1 - kind)


# ---- puzzles


def random_statement(speaker, people, forms, rng):
    form = rng.choice(forms)
    a, b = rng.sample(range(people), 2)
    if form in ("same", "differ"):
        return form, a, 1, b, 1
    if form == "is":  # nobody can say "I am a knave", and "I am a knight" says nothing
        a = rng.choice([p for p in range(people) if p != speaker])
        return form, a, rng.randint(0, 1), a, 1
    return form, a, rng.randint(0, 1), b, rng.randint(0, 1)


def say(statement, speaker, names):
    form, a, kind_a, b, kind_b = statement

    def clause(person, kind):
        who = "I am" if person == speaker else f"{names[person]} is"
        return f"{who} a {KINDS[kind]}"

    first = clause(a, kind_a)
    second = clause(b, kind_b)
    pair = [names[person] for person in (a, b) if person != speaker]
    pair = " and ".join(pair + ["I"] * (speaker in (a, b)))
    return {
        "is": first,
        "and": f"{first} and {second}",
        "or": f"{first} or {second}, or both",
        "if": f"if {first}, then {second}",
        "same": f"{pair} are of the same kind",
        "differ": f"{pair} are of different kinds",
    }[form]


def canonical(statements):
    """One spelling for all puzzles that differ only in names and order."""
    spellings = []
    for order in itertools.permutations(range(len(statements))):
        renamed = []
        for speaker, (form, a, kind_a, b, kind_b) in enumerate(statements):
            atoms = [(order[a], kind_a), (order[b], kind_b)]
            renamed.append((order[speaker], form, *(atoms if form == "if" else sorted(atoms))))
        spellings.append(sorted(renamed))
    return str(min(spellings))


def generate(level, rng, split=None):
    sizes, forms, suppose = LEVELS[level]
    while True:
        people = rng.choice(sizes)
        statements = [random_statement(speaker, people, forms, rng) for speaker in range(people)]
        solution = frozenset.intersection(*words_of(statements))
        if len(solution) != 1:
            continue
        key = canonical(statements)
        if split and split_of(f"knights {key}") != split:  # before the proof, which is slow
            return None
        names = rng.sample(NAMES, people)
        lines = prove(statements, names)
        if lines and suppose == any(line.startswith("Suppose") for line in lines):
            break
    told = [f'{name} says: "{say(said, speaker, names)}."'
            for speaker, (name, said) in enumerate(zip(names, statements))]
    text = f"{RULE}{' '.join(told)} Who are the knights? Give their names, or none."
    answer = answer_of(solution, names)
    return record("knights", level, text, answer, lines, key, names=names, statements=statements)


# ---- thoughts


def check_steps(problem, thought):
    """Each line follows from one person's words and from what is known or supposed."""
    names = problem["names"]
    words = words_of(problem["statements"])
    people = len(names)
    name = "(" + "|".join(names) + ")"
    by = re.compile(rf"By {name}, (?:{name} is a (knave|knight)|a contradiction)\.")
    suppose = re.compile(rf"(Suppose|So) {name} is a (knave|knight)\.")
    stack = [(all_worlds(people), None, None)]  # (worlds left, who was supposed, to be what)
    refuted = False  # the last supposition

    def step(line):
        nonlocal refuted
        worlds, supposed, kind = stack[-1]
        if found := by.fullmatch(line):
            left = worlds & words[names.index(found[1])]
            if refuted:
                return found[2], "the supposition is refuted already"
            if not found[2]:
                refuted = supposed is not None and not left
                return "contradiction", None if refuted else "no contradiction"
            person, claimed = names.index(found[2]), KINDS.index(found[3])
            if forced(left, person) != claimed:
                return found[2], f"this does not follow from what {found[1]} says"
            stack[-1] = where(worlds, person, claimed), supposed, kind
            return found[2], None
        if found := suppose.fullmatch(line):
            person, claimed = names.index(found[2]), KINDS.index(found[3])
            if found[1] == "Suppose":
                if refuted or len(stack) > people or forced(worlds, person) is not None:
                    return found[2], "nothing to suppose here"
                stack.append((where(worlds, person, claimed), person, claimed))
            elif not refuted or (person, claimed) != (supposed, 1 - kind):
                return found[2], "not what the contradiction shows"
            else:
                stack.pop()
                refuted = False
                worlds, *supposition = stack[-1]
                stack[-1] = where(worlds, person, claimed), *supposition
            return found[2], None
        return None, "not a step of this puzzle"

    def conclusion():
        worlds = stack[0][0]
        return answer_of(worlds, names) if len(stack) == 1 and len(worlds) == 1 else None

    return first_wrong(thought, step, conclusion)


def spoil(line, rng):
    """The opposite conclusion; suppositions and contradictions have none."""
    if line.startswith("Suppose") or line.endswith("contradiction."):
        return None
    if line.endswith("knight."):
        return line.replace("knight.", "knave.")
    return line.replace("knave.", "knight.")


problems = partial(sample_family, generate)
plant_error = partial(families.plant_error, spoil)
plant_slip = partial(families.plant_slip, spoil)
