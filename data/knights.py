"""Knights and knaves: everybody speaks once, knights say what is true, knaves what is false; who are the knights?

Two to five people by level, suppositions needed from level 3 on, exactly one solution. A thought is a proof: from one
person's words and what is known already follows what somebody is, or a contradiction with what was supposed. A set of
worlds is an int with one bit for each of the 2^n ways to be knights and knaves: a step is checked by looking at all.
"""

import functools
import itertools
import re

from data.families import (ALL_LEVELS, first_wrong, plant_error as plant, plant_slip as slip, record, sample_family,
                           split_of)
from data.words import NAMES

FORMS = ("is", "and", "or", "if", "same", "differ")
# level: (how many people, what they say, whether the proof needs a supposition)
LEVELS = {1: ((2, 3), ("is", "same", "differ", "and"), False), 2: ((3,), FORMS, False), 3: ((3,), FORMS, True),
          4: ((4,), FORMS, True), 5: ((5,), FORMS, True)}
KINDS = ("knave", "knight")
RULE = "Knights always tell the truth and knaves always lie. "


@functools.cache
def knight_worlds(person, people):
    """The worlds in which a person is a knight."""
    return sum(1 << world for world in range(1 << people) if world >> person & 1)


def truth(statement, people):
    """The worlds in which a statement (form, person, kind, person, kind) is true."""
    form, *parts = statement
    every = (1 << (1 << people)) - 1
    a, b = (knight_worlds(p, people) ^ (0 if kind else every) for p, kind in zip(parts[::2], parts[1::2]))
    return {"is": a, "and": a & b, "or": a | b, "if": a ^ every | b, "same": a ^ b ^ every, "differ": a ^ b}[form]


def allowed(statements):
    """For each speaker, the worlds in which they can say what they say."""
    people = len(statements)
    every = (1 << (1 << people)) - 1
    return [knight_worlds(speaker, people) ^ truth(s, people) ^ every for speaker, s in enumerate(statements)]


def forced(worlds, person, people):
    """1 when a person is a knight in all of the worlds, 0 when in none, else None (None too without a world)."""
    knight = worlds & knight_worlds(person, people)
    return None if not worlds or knight not in (0, worlds) else int(knight == worlds)


def propagate(worlds, known, words, names):
    """(lines, whether they end in a contradiction, worlds) of what one person's words after another make plain."""
    lines, known = [], set(known)
    progress = True
    while progress:
        progress = False
        for speaker, constraint in enumerate(words):
            if not worlds & constraint:
                return [*lines, f"By {names[speaker]}, a contradiction."], True, worlds
            for person in set(range(len(words))) - known:
                kind = forced(worlds & constraint, person, len(words))
                if kind is not None:
                    lines.append(f"By {names[speaker]}, {names[person]} is a {KINDS[kind]}.")
                    worlds &= fix(person, kind, len(words))
                    known.add(person)
                    progress = True
    return lines, False, worlds


def fix(person, kind, people):
    return knight_worlds(person, people) ^ (0 if kind else (1 << (1 << people)) - 1)


def prove(statements, names):
    """The lines of a proof with suppositions one deep, or None when such a proof does not settle it."""
    words, people = allowed(statements), len(statements)
    worlds = (1 << (1 << people)) - 1
    lines = []
    while True:
        known = {p for p in range(people) if forced(worlds, p, people) is not None}
        more, contradiction, worlds = propagate(worlds, known, words, names)
        if contradiction:
            return None
        lines += more
        known = {p for p in range(people) if forced(worlds, p, people) is not None}
        if len(known) == people:
            return lines
        tries = []
        for person, kind in itertools.product(sorted(set(range(people)) - known), (1, 0)):
            more, contradiction, _ = propagate(worlds & fix(person, kind, people), known | {person}, words, names)
            if contradiction:
                tries.append((len(more), person, kind, more))
        if not tries:
            return None
        _, person, kind, more = min(tries)
        lines += [f"Suppose {names[person]} is a {KINDS[kind]}.", *more, f"So {names[person]} is a {KINDS[1 - kind]}."]
        worlds &= fix(person, 1 - kind, people)


def random_statement(speaker, people, forms, rng):
    form = rng.choice(forms)
    a, b = rng.sample(range(people), 2)
    if form in ("same", "differ"):
        return form, a, 1, b, 1
    if form == "is":                                # nobody can say "I am a knave"; "I am a knight" says nothing
        a = rng.choice([p for p in range(people) if p != speaker])
        b = a
    return form, a, rng.randint(0, 1), b, rng.randint(0, 1) if form != "is" else 1


def say(statement, speaker, names):
    form, a, kind_a, b, kind_b = statement

    def clause(person, kind):
        return f"I am a {KINDS[kind]}" if person == speaker else f"{names[person]} is a {KINDS[kind]}"

    one, two = (p if p != speaker else None for p in (a, b))
    pair = " and ".join([names[p] for p in (one, two) if p is not None] + ["I"] * (None in (one, two)))
    return {"is": clause(a, kind_a), "and": f"{clause(a, kind_a)} and {clause(b, kind_b)}",
            "or": f"{clause(a, kind_a)} or {clause(b, kind_b)}, or both", "same": f"{pair} are of the same kind",
            "if": f"if {clause(a, kind_a)}, then {clause(b, kind_b)}", "differ": f"{pair} are of different kinds"}[form]


def canonical(statements):
    """One spelling for all puzzles that differ by names and order only."""
    def renamed(order):
        out = []
        for speaker, (form, a, kind_a, b, kind_b) in enumerate(statements):
            atoms = [(order[a], kind_a), (order[b], kind_b)]
            out.append((order[speaker], form, *(atoms if form == "if" else sorted(atoms))))
        return sorted(out)
    return str(min(map(renamed, itertools.permutations(range(len(statements))))))


def answer_of(worlds, names):
    """The knights' names; `worlds` holds a single one."""
    world = worlds.bit_length() - 1
    return ", ".join(name for person, name in enumerate(names) if world >> person & 1) or "none"


def generate(level, rng, split=None):
    """A problem; of one split, when it is given, or None."""
    sizes, forms, suppose = LEVELS[level]
    while True:
        people = rng.choice(sizes)
        statements = [random_statement(speaker, people, forms, rng) for speaker in range(people)]
        worlds = (1 << (1 << people)) - 1
        for constraint in allowed(statements):
            worlds &= constraint
        if worlds.bit_count() != 1:
            continue
        key = canonical(statements)
        if split and split_of(f"knights {key}") != split:
            return None
        names = rng.sample(NAMES, people)
        lines = prove(statements, names)
        if lines and suppose == any(line.startswith("Suppose") for line in lines):
            break
    told = " ".join(f'{name} says: "{say(s, i, names)}."' for i, (name, s) in enumerate(zip(names, statements)))
    question = " Who are the knights? Give their names, or none."
    return record("knights", level, RULE + told + question, answer_of(worlds, names), lines, key,
                  names=names, statements=statements)


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    def generate_in_split(level, rng):
        return generate(level, rng, split)

    return sample_family(generate_in_split, split, limit, seed, levels)


def check_steps(problem, thought):
    """Each line follows from one person's words and what is known or supposed, by looking at every world."""
    names, words = problem["names"], allowed(problem["statements"])
    people = len(names)
    stack, refuted = [((1 << (1 << people)) - 1, None, None)], False   # [(worlds left, who was supposed, what)]
    name = "(" + "|".join(names) + ")"

    def step(line):
        nonlocal refuted
        worlds, supposed, kind = stack[-1]
        if found := re.fullmatch(rf"By {name}, (?:{name} is a (knave|knight)|a contradiction)\.", line):
            left = worlds & words[names.index(found[1])]
            if refuted:
                return found[2], "the supposition is refuted already"
            if not found[2]:
                refuted = supposed is not None and not left
                return "contradiction", None if refuted else "no contradiction"
            person = names.index(found[2])
            if forced(left, person, people) != KINDS.index(found[3]):
                return found[2], f"this does not follow from what {found[1]} says"
            stack[-1] = worlds & fix(person, KINDS.index(found[3]), people), supposed, kind
            return found[2], None
        if found := re.fullmatch(rf"(Suppose|So) {name} is a (knave|knight)\.", line):
            person, claimed = names.index(found[2]), KINDS.index(found[3])
            if found[1] == "Suppose":
                if refuted or len(stack) > people or forced(worlds, person, people) is not None:
                    return found[2], "nothing to suppose here"
                stack.append((worlds & fix(person, claimed, people), person, claimed))
            elif not refuted or (person, claimed) != (supposed, 1 - kind):
                return found[2], "not what the contradiction shows"
            else:
                stack.pop()
                refuted = False
                stack[-1] = stack[-1][0] & fix(person, claimed, people), *stack[-1][1:]
            return found[2], None
        return None, "not a step of this puzzle"

    def conclusion():
        return answer_of(stack[0][0], names) if len(stack) == 1 and stack[0][0].bit_count() == 1 else None

    return first_wrong(thought, step, conclusion)


def spoil(line):
    """What is concluded turned into its opposite; suppositions and contradictions have none."""
    if line.startswith("Suppose") or line.endswith("contradiction."):
        return None
    return line.replace("knight.", "KNAVE.").replace("knave.", "knight.").replace("KNAVE.", "knave.")


def plant_error(problem, rng):
    return plant(problem, rng, spoil)


def plant_slip(problem, rng):
    return slip(problem, rng, spoil)
