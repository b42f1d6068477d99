"""Knights and knaves: knights tell the truth, knaves lie; who are the knights?

Each of two to five people makes one statement. The solution is unique; from level 3 on, the proof
needs suppositions. A thought is a proof: each step combines one person's statement with what is
known to determine somebody's kind or refute a supposition. A world is a tuple with 1 for each
knight and 0 for each knave; steps are checked by enumerating all worlds.
"""

import itertools
import operator
import re
from functools import cache

from data.families import first_error, record, split_of
from data.words import NAMES

# Statements about two claims "PERSON is a KIND": (truth function, wording).
FORMS = {
    "is": (lambda first, second: first, "{first}"),
    "and": (operator.and_, "{first} and {second}"),
    "or": (operator.or_, "{first} or {second}, or both"),
    "if": (operator.le, "if {first}, then {second}"),  # False <= True
    "same": (operator.eq, "{pair} are of the same kind"),
    "differ": (operator.ne, "{pair} are of different kinds"),
}
ALL_FORMS = tuple(FORMS)
# level: (numbers of people, forms of statement, whether the proof needs a supposition)
LEVELS = {
    1: ((2, 3), ("is", "same", "differ", "and"), False),
    2: ((3,), ALL_FORMS, False),
    3: ((3,), ALL_FORMS, True),
    4: ((4,), ALL_FORMS, True),
    5: ((5,), ALL_FORMS, True),
}
KINDS = ("knave", "knight")
RULE = "Knights always tell the truth and knaves always lie. "

# ---- worlds


def all_worlds(people):
    return set(itertools.product((0, 1), repeat=people))


@cache
def allowed(speaker, statement, people):
    """The worlds consistent with a speaker's statement, (form, person, kind, person, kind)."""
    form, a, kind_a, b, kind_b = statement
    holds, _ = FORMS[form]
    return {world for world in all_worlds(people)
            if world[speaker] == holds(world[a] == kind_a, world[b] == kind_b)}


def constraints_of(statements):
    """For each speaker, the worlds consistent with their statement."""
    return [allowed(speaker, tuple(statement), len(statements))
            for speaker, statement in enumerate(statements)]


def forced(worlds, person):
    """1 if a person is a knight in all of the worlds, 0 if in none of them, else None."""
    kinds = {world[person] for world in worlds}
    return kinds.pop() if len(kinds) == 1 else None


def where(worlds, person, kind):
    return {world for world in worlds if world[person] == kind}


# ---- proofs


def known_people(worlds, people):
    return {person for person in range(people) if forced(worlds, person) is not None}


def propagate(worlds, known, constraints, names):
    """Apply single statements until nothing changes; returns (proof lines, worlds left, if any)."""
    lines = []
    known = set(known)
    before = None
    while before != len(known):
        before = len(known)
        for speaker, constraint in enumerate(constraints):
            if not worlds & constraint:
                return [*lines, f"By {names[speaker]}, a contradiction."], set()
            for person in range(len(constraints)):
                kind = forced(worlds & constraint, person)
                if person not in known and kind is not None:
                    lines.append(f"By {names[speaker]}, {names[person]} is a {KINDS[kind]}.")
                    worlds = where(worlds, person, kind)
                    known.add(person)
    return lines, worlds


def prove(statements, names):
    """The lines of a proof without nested suppositions, or None if there is no such proof.

    The statements must be satisfiable, so that only suppositions lead to contradictions.
    """
    constraints = constraints_of(statements)
    people = len(statements)
    worlds = all_worlds(people)
    lines = []
    while True:
        more, worlds = propagate(worlds, known_people(worlds, people), constraints, names)
        lines += more
        known = known_people(worlds, people)
        if len(known) == people:
            return lines
        refuted = []
        for person, kind in itertools.product(sorted(set(range(people)) - known), (1, 0)):
            supposed = where(worlds, person, kind)
            more, left = propagate(supposed, known | {person}, constraints, names)
            if not left:
                refuted.append((len(more), person, kind, more))
        if not refuted:
            return None
        _, person, kind, more = min(refuted)  # the shortest refutation
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
    if form == "is":  # not about the speaker: "I am a knight" says nothing, "a knave" is impossible
        a = rng.choice([p for p in range(people) if p != speaker])
        return form, a, rng.randint(0, 1), a, 1
    return form, a, rng.randint(0, 1), b, rng.randint(0, 1)


def render(statement, speaker, names):
    form, a, kind_a, b, kind_b = statement
    first, second = (f"{'I am' if person == speaker else names[person] + ' is'} a {KINDS[kind]}"
                     for person, kind in ((a, kind_a), (b, kind_b)))
    pair = [names[person] for person in (a, b) if person != speaker]
    pair = " and ".join(pair + ["I"] * (speaker in (a, b)))
    return FORMS[form][1].format(first=first, second=second, pair=pair)


def canonical(statements):
    """A canonical form that ignores names and the order of speakers."""
    spellings = []
    for order in itertools.permutations(range(len(statements))):
        renamed = []
        for speaker, (form, a, kind_a, b, kind_b) in enumerate(statements):
            atoms = [(order[a], kind_a), (order[b], kind_b)]
            renamed.append((order[speaker], form, *(atoms if form == "if" else sorted(atoms))))
        spellings.append(sorted(renamed))
    return str(min(spellings))


def generate(level, rng, split):
    sizes, forms, suppose = LEVELS[level]
    while True:
        people = rng.choice(sizes)
        statements = [random_statement(speaker, people, forms, rng) for speaker in range(people)]
        solution = set.intersection(*constraints_of(statements))
        if len(solution) != 1:
            continue
        key = canonical(statements)
        if split_of(f"knights {key}") != split:  # checked before the slow proof
            return None
        names = rng.sample(NAMES, people)
        lines = prove(statements, names)
        if lines and suppose == any(line.startswith("Suppose") for line in lines):
            break
    quotes = [f'{name} says: "{render(statement, speaker, names)}."'
              for speaker, (name, statement) in enumerate(zip(names, statements))]
    text = f"{RULE}{' '.join(quotes)} Who are the knights? Give their names, or none."
    [world] = solution
    answer = ", ".join(itertools.compress(names, world)) or "none"
    return record("knights", level, text, answer, lines, key, split,
                  names=names, statements=statements)


# ---- thoughts


def check_steps(problem, thought):
    """Each line follows from one person's statement and what is known or supposed."""
    names = problem["names"]
    constraints = constraints_of(problem["statements"])
    any_name = f"({'|'.join(names)})"
    by = re.compile(rf"By {any_name}, (?:{any_name} is a (knave|knight)|a contradiction)\.")
    suppose = re.compile(rf"(Suppose|So) {any_name} is a (knave|knight)\.")
    stack = [(all_worlds(len(names)), None)]  # (worlds left, (person, supposed kind))
    refuted = False  # whether the last supposition is refuted

    def check_line(line):
        nonlocal refuted
        found = by.fullmatch(line) or suppose.fullmatch(line)
        if not found:
            return None, "not a valid step"
        worlds, supposed = stack[-1]
        first, name, kind = found.groups()  # first: the speaker, "Suppose" or "So"
        if not name:
            if refuted or not supposed or worlds & constraints[names.index(first)]:
                return "contradiction", "no contradiction"
            refuted = True
            return "contradiction", None
        person, kind = names.index(name), KINDS.index(kind)
        if first == "Suppose":
            if refuted or len(stack) > len(names) or forced(worlds, person) is not None:
                return name, "cannot be supposed here"
            stack.append((where(worlds, person, kind), (person, kind)))
            return name, None
        if first == "So":
            if not refuted or supposed != (person, 1 - kind):
                return name, "does not follow from the contradiction"
            stack.pop()
            refuted = False
            worlds, supposed = stack[-1]
        elif refuted:
            return name, "the supposition is already refuted"
        elif forced(worlds & constraints[names.index(first)], person) != kind:
            return name, f"does not follow from what {first} says"
        stack[-1] = where(worlds, person, kind), supposed
        return name, None

    def conclusion():
        return problem["answer"] if len(stack) == 1 and len(stack[0][0]) == 1 else None

    return first_error(thought, check_line, conclusion)


def corrupt(line, previous, rng):
    """The opposite conclusion; None for suppositions and contradictions."""
    if line.startswith("Suppose") or line.endswith("contradiction."):
        return None
    old, new = KINDS if line.endswith("knave.") else KINDS[::-1]
    return line.removesuffix(f"{old}.") + f"{new}."
