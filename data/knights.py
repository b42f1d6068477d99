"""Knights and knaves: knights say what is true, knaves what is false; who are the knights?

Each of two to five people speaks once. There is one solution, and suppositions are needed from
level 3 on. A thought is a proof: one person's words and what is known already decide what somebody
is, or contradict what was supposed. A world is a tuple with 1 for each knight and 0 for each knave;
a step is checked by looking at all worlds.
"""

import itertools
import operator
import re
from functools import cache

from data.families import first_wrong, record, split_of
from data.words import NAMES

# What can be said of two claims about a person's kind: (whether it is true, its words).
FORMS = {
    "is": (lambda first, second: first, "{first}"),
    "and": (operator.and_, "{first} and {second}"),
    "or": (operator.or_, "{first} or {second}, or both"),
    "if": (operator.le, "if {first}, then {second}"),  # False <= True
    "same": (operator.eq, "{pair} are of the same kind"),
    "differ": (operator.ne, "{pair} are of different kinds"),
}
ALL_FORMS = tuple(FORMS)
# level: (how many people, what they say, whether the proof needs a supposition)
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
    """The worlds in which a speaker can say a statement, (form, person, kind, person, kind)."""
    form, a, kind_a, b, kind_b = statement
    holds, _ = FORMS[form]
    return {world for world in all_worlds(people)
            if world[speaker] == holds(world[a] == kind_a, world[b] == kind_b)}


def words_of(statements):
    """For each speaker, the worlds in which they can say what they say."""
    return [allowed(speaker, tuple(said), len(statements))
            for speaker, said in enumerate(statements)]


def forced(worlds, person):
    """1 when a person is a knight in all of the worlds, 0 when in none of them, else None."""
    kinds = {world[person] for world in worlds}
    return kinds.pop() if len(kinds) == 1 else None


def where(worlds, person, kind):
    return {world for world in worlds if world[person] == kind}


# ---- proofs


def settled(worlds, people):
    return {person for person in range(people) if forced(worlds, person) is not None}


def propagate(worlds, known, words, names):
    """(lines, worlds left) of all that single words decide: no world after a contradiction."""
    lines = []
    known = set(known)
    before = None
    while before != len(known):
        before = len(known)
        for speaker, constraint in enumerate(words):
            if not worlds & constraint:
                return [*lines, f"By {names[speaker]}, a contradiction."], set()
            for person in range(len(words)):
                kind = forced(worlds & constraint, person)
                if person not in known and kind is not None:
                    lines.append(f"By {names[speaker]}, {names[person]} is a {KINDS[kind]}.")
                    worlds = where(worlds, person, kind)
                    known.add(person)
    return lines, worlds


def prove(statements, names):
    """The lines of a proof with suppositions one deep, or None when it takes more than that.

    The statements must have a solution: without a supposition there is no contradiction.
    """
    words = words_of(statements)
    people = len(statements)
    worlds = all_worlds(people)
    lines = []
    while True:
        more, worlds = propagate(worlds, settled(worlds, people), words, names)
        lines += more
        known = settled(worlds, people)
        if len(known) == people:
            return lines
        refuted = []
        for person, kind in itertools.product(sorted(set(range(people)) - known), (1, 0)):
            more, left = propagate(where(worlds, person, kind), known | {person}, words, names)
            if not left:
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
    first, second = (f"{'I am' if person == speaker else names[person] + ' is'} a {KINDS[kind]}"
                     for person, kind in ((a, kind_a), (b, kind_b)))
    pair = [names[person] for person in (a, b) if person != speaker]
    pair = " and ".join(pair + ["I"] * (speaker in (a, b)))
    return FORMS[form][1].format(first=first, second=second, pair=pair)


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


def generate(level, rng, split):
    sizes, forms, suppose = LEVELS[level]
    while True:
        people = rng.choice(sizes)
        statements = [random_statement(speaker, people, forms, rng) for speaker in range(people)]
        solution = set.intersection(*words_of(statements))
        if len(solution) != 1:
            continue
        key = canonical(statements)
        if split_of(f"knights {key}") != split:  # before the proof, which is slow
            return None
        names = rng.sample(NAMES, people)
        lines = prove(statements, names)
        if lines and suppose == any(line.startswith("Suppose") for line in lines):
            break
    told = [f'{name} says: "{say(said, speaker, names)}."'
            for speaker, (name, said) in enumerate(zip(names, statements))]
    text = f"{RULE}{' '.join(told)} Who are the knights? Give their names, or none."
    [world] = solution
    answer = ", ".join(itertools.compress(names, world)) or "none"
    return record("knights", level, text, answer, lines, key, split,
                  names=names, statements=statements)


# ---- thoughts


def check_steps(problem, thought):
    """Each line follows from one person's words and from what is known or supposed."""
    names = problem["names"]
    words = words_of(problem["statements"])
    name = f"({'|'.join(names)})"
    by = re.compile(rf"By {name}, (?:{name} is a (knave|knight)|a contradiction)\.")
    suppose = re.compile(rf"(Suppose|So) {name} is a (knave|knight)\.")
    stack = [(all_worlds(len(names)), None)]  # (worlds left, (who is supposed, to be what))
    refuted = False  # the last supposition

    def step(line):
        nonlocal refuted
        found = by.fullmatch(line) or suppose.fullmatch(line)
        if not found:
            return None, "not a step of this puzzle"
        worlds, supposed = stack[-1]
        first, name, kind = found.groups()
        if not name:
            if refuted or not supposed or worlds & words[names.index(first)]:
                return "contradiction", "no contradiction"
            refuted = True
            return "contradiction", None
        person, kind = names.index(name), KINDS.index(kind)
        if first == "Suppose":
            if refuted or len(stack) > len(names) or forced(worlds, person) is not None:
                return name, "nothing to suppose here"
            stack.append((where(worlds, person, kind), (person, kind)))
            return name, None
        if first == "So":
            if not refuted or supposed != (person, 1 - kind):
                return name, "not what the contradiction shows"
            stack.pop()
            refuted = False
            worlds, supposed = stack[-1]
        elif refuted:
            return name, "the supposition is refuted already"
        elif forced(worlds & words[names.index(first)], person) != kind:
            return name, f"this does not follow from what {first} says"
        stack[-1] = where(worlds, person, kind), supposed
        return name, None

    def conclusion():
        return problem["answer"] if len(stack) == 1 and len(stack[0][0]) == 1 else None

    return first_wrong(thought, step, conclusion)


def spoil(line, before, rng):
    """The opposite conclusion; suppositions and contradictions have none."""
    if line.startswith("Suppose") or line.endswith("contradiction."):
        return None
    old, new = KINDS if line.endswith("knave.") else KINDS[::-1]
    return line.removesuffix(f"{old}.") + f"{new}."
