"""Arithmetic word problems of one to five operations; the level is the number of operations.

Two kinds: a story, in which an amount passes through events (muffins are baked, packed, sold, the money is shared), and
a riddle, in which people own as many things as others do, told in any order and with people nobody asks about.
"""

import operator
import re

from data.families import ALL_LEVELS, first_wrong, plant_error as plant, plant_slip as slip, record, sample_family

NAMES = ("Ada Amir Bela Carlos Chen Dara Elif Farid Grace Hugo Ines Jonas Kofi Lena Marta Nia Omar Priya Quinn Rosa "
         "Sven Tomas Uma Vera Wanda Yuki Zoe").split()
THINGS = "marbles stickers stamps shells coins beads cards buttons pencils acorns badges corks".split()
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# Each story: how it opens, then its events in the order in which they may happen:
# (the unit the amount has before, the unit after, operation, what is told, what the result is called).
STORIES = [
    ("{name} bakes {a} muffins a day.", "muffins", [
        ("muffins", "muffins", "*", "It is done on {k} days in all.", "muffins baked in all"),
        ("muffins", "muffins", "-", "Then {k} of the muffins burn and are thrown away.", "muffins not burnt"),
        ("muffins", "muffins", "+", "A neighbour brings {k} more muffins.", "muffins with the neighbour's"),
        ("muffins", "boxes", "/", "The muffins are packed in boxes of {k}.", "full boxes"),
        ("boxes", "boxes", "-", "{name} keeps {k} boxes for the school.", "boxes for sale"),
        ("boxes", "dollars", "*", "Every box is sold for {k} dollars.", "dollars earned"),
        ("dollars", "dollars", "-", "{name} pays {k} dollars for flour.", "dollars after the flour"),
        ("dollars", "dollars each", "/", "The money is shared equally by {k} friends.", "dollars for each friend")]),
    ("{name} cycles {a} kilometres a day.", "km", [
        ("km", "km", "+", "With a new bicycle it becomes {k} kilometres a day more.", "km a day now"),
        ("km", "trip", "*", "This goes on for {k} days.", "km cycled"),
        ("trip", "trip", "-", "{k} kilometres of it were a detour, which {name} does not count.", "km that count"),
        ("trip", "trip", "+", "A ferry adds {k} kilometres, which do count.", "km with the ferry"),
        ("trip", "stages", "/", "A guide book divides the way into stages of {k} kilometres.", "stages"),
        ("stages", "photos", "*", "{name} takes {k} photos on every stage.", "photos taken"),
        ("photos", "photos", "-", "{k} photos are blurred and deleted.", "photos kept"),
        ("photos", "pages", "/", "The photos go into an album with {k} on a page.", "pages of the album")]),
    ("A library owns {a} books.", "books", [
        ("books", "books", "-", "{k} books are lost.", "books left"),
        ("books", "books", "+", "{name} gives the library {k} books.", "books with the gift"),
        ("books", "shelves", "/", "They are put on shelves of {k} books.", "full shelves"),
        ("shelves", "shelves", "+", "Then {k} shelves of maps are added.", "shelves with the maps"),
        ("shelves", "screws", "*", "Every shelf needs {k} screws.", "screws needed"),
        ("screws", "screws", "-", "{k} screws are in the cellar already.", "screws to buy"),
        ("screws", "packs", "/", "Screws are sold in packs of {k}.", "packs to buy"),
        ("packs", "dollars", "*", "A pack costs {k} dollars.", "dollars to pay")]),
    ("A farm has {a} hens.", "hens", [
        ("hens", "hens", "+", "{name} buys {k} hens for it.", "hens after buying"),
        ("hens", "hens", "-", "A fox takes {k} hens.", "hens after the fox"),
        ("hens", "eggs", "*", "Every hen lays {k} eggs a week.", "eggs a week"),
        ("eggs", "eggs", "-", "The family eats {k} eggs a week.", "eggs to sell"),
        ("eggs", "cartons", "/", "The other eggs are put in cartons of {k}.", "cartons"),
        ("cartons", "dollars", "*", "A carton brings {k} dollars.", "dollars a week"),
        ("dollars", "dollars", "-", "Feed costs {k} dollars a week.", "dollars after the feed"),
        ("dollars", "total", "*", "{name} saves what is left for {k} weeks.", "dollars saved")]),
    ("{name} saves {a} dollars a month.", "rate", [
        ("rate", "rate", "+", "A job in the evenings makes it {k} dollars a month more.", "dollars a month"),
        ("rate", "dollars", "*", "This goes on for {k} months.", "dollars saved"),
        ("dollars", "dollars", "+", "An aunt adds {k} dollars.", "dollars with the gift"),
        ("dollars", "dollars", "-", "A dentist's bill takes {k} dollars.", "dollars after the bill"),
        ("dollars", "tickets", "/", "All the money is spent on tickets at {k} dollars each.", "tickets"),
        ("tickets", "tickets", "-", "{name} gives {k} tickets away.", "tickets left"),
        ("tickets", "hours", "*", "A ticket is good for {k} hours of swimming.", "hours of swimming")]),
]
RIDDLES = {"+": "{name} has {k} more {things} than {other}.", "-": "{name} has {k} fewer {things} than {other}.",
           "*": "{name} has {k} times as many {things} as {other}.",
           "/": "If {name} had {k} times as many {things}, it would be as many as {other} has."}


def draw(op, value, rng):
    """A second operand that keeps the result a positive whole number of at most four digits, or None."""
    high = {"+": 60, "-": min(60, value - 1), "*": min(12, 9999 // value), "/": min(12, value - 1)}[op]
    return rng.choice([k for k in range(2, high + 1) if op != "/" or value % k == 0] or [None])


def tell_story(level, rng):
    """(sentences, question, plan), or None when the events drawn do not fit each other."""
    opening, unit, events = rng.choice(STORIES)
    name, value, last = rng.choice(NAMES), rng.randint(6, 90), "start"
    told, plan = [opening.format(name=name, a=value)], [("start", value)]
    for needed, chosen in enumerate(sorted(rng.sample(range(len(events)), level))):
        before, after, op, sentence, label = events[chosen]
        k = draw(op, value, rng) if before == unit else None
        if k is None:
            return None
        told.append(sentence.format(name=name, k=k))
        plan.append((label, op, last, k))
        unit, value, last = after, OPS[op](value, k), label
    return told, f"What is the number of {last}?", plan


def tell_riddle(level, rng):
    names, things = rng.sample(NAMES, level + 3), rng.choice(THINGS)
    value, last = rng.randint(3, 60), names[0]
    told, plan = [f"{last} has {value} {things}."], [(last, value)]
    for name in names[1:level + 1]:
        op = rng.choice("+-*/+-*")
        k = draw(op, value, rng)
        if k is None:
            return None
        told.append(RIDDLES[op].format(name=name, other=last, k=k, things=things))
        plan.append((name, op, last, k))
        value, last = OPS[op](value, k), name
    others = [name for name in names[level + 1:] if level > 1 and rng.random() < 0.4]         # nobody asks about them
    told += [f"{name} has {rng.randint(3, 99)} {things}." for name in others]
    rng.shuffle(told)
    return told, f"How many {things} does {last} have?", plan


def generate(level, rng):
    while not (found := rng.choice((tell_story, tell_riddle))(level, rng)):
        pass
    told, question, plan = found
    values, lines = {plan[0][0]: plan[0][1]}, []
    for label, op, source, k in plan[1:]:
        values[label] = OPS[op](values[source], k)
        lines.append(f"{label}: {values[source]} {op} {k} = {values[label]}")
    key = f"{plan[0][1]}" + "".join(f" {op} {k}" for _, op, _, k in plan[1:])      # the sum itself, whatever the story
    return record("words", level, " ".join([*told, question]), str(values[label]), lines, key, plan=plan)


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    return sample_family(generate, split, limit, seed, levels)


def check_steps(problem, thought):
    """Each line is `label: a op b = c`: the label's own operation on amounts known so far, computed rightly."""
    (start, value), *steps = problem["plan"]
    known, plan = {start: value}, {label: rest for label, *rest in steps}

    def step(line):
        found = re.fullmatch(r"(.{1,60}): (\d{1,9}) ([-+*/]) (\d{1,9}) = (-?\d{1,9})", line)
        if not found or found[1] not in plan:
            return None, "not a step of this problem"
        label, a, op, b, c = found[1], int(found[2]), found[3], int(found[4]), int(found[5])
        wanted_op, source, k = plan[label]
        if source not in known:
            return label, f"{source} is not known yet"
        operands = {(known[source], k), (k, known[source])} if wanted_op in "+*" else {(known[source], k)}
        if op != wanted_op or (a, b) not in operands:
            return label, f"it is {known[source]} {wanted_op} {k}"
        result = OPS[op](known[source], k)
        if c != result:
            return label, f"{a} {op} {b} is {result}"
        known[label] = result
        return label, None

    return first_wrong(thought, step, lambda: known.get(steps[-1][0]))


def spoil(line, rng):
    """A wrong result, a wrong operand with or without the result that follows from it, or a wrong operation."""
    label, a, op, b, c = re.fullmatch(r"(.*): (\d+) (.) (\d+) = (\d+)", line).groups()
    off = rng.choice([n for n in (-10, -2, -1, 1, 2, 10) if int(c) + n > 0 and int(b) + n > 0])
    kind = rng.choice(("result", "operand", "both", "operation"))
    if kind == "result":
        c = int(c) + off
    elif kind == "operation":
        op = rng.choice([other for other in OPS if other != op])
    else:
        b = int(b) + off
        c = OPS[op](int(a), b) if kind == "both" else c
    return f"{label}: {a} {op} {b} = {c}"


def plant_error(problem, rng):
    return plant(problem, rng, lambda line: spoil(line, rng))


def plant_slip(problem, rng):
    return slip(problem, rng, lambda line: spoil(line, rng))
