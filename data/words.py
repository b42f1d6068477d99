"""Arithmetic word problems of one to five operations; the level is the number of operations.

There are two kinds. A story takes an amount through a series of events: muffins are baked, packed
and sold, and the money is shared. A riddle compares how many things people own, in random order and
including some people who are irrelevant to the question.
"""

import operator
import re

from data.families import draw_offset, first_error, record

NAMES = (
    "Ada Amir Bela Carlos Chen Dara Elif Farid Grace Hugo Ines Jonas Kofi Lena Marta Nia Omar "
    "Priya Quinn Rosa Sven Tomas Uma Vera Wanda Yuki Zoe"
).split()
THINGS = "marbles stickers stamps shells coins beads cards buttons pencils acorns badges corks"
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# A story's first line: unit | opening sentence. The other lines are its possible events, in order:
# unit before, operation, unit after | sentence | label of the result.
STORIES = """
muffins | {name} bakes {a} muffins a day.
muffins * muffins | It is done on {k} days in all. | muffins baked in all
muffins - muffins | Then {k} of the muffins burn and are thrown away. | muffins not burnt
muffins + muffins | A neighbour brings {k} more muffins. | muffins with the neighbour's
muffins / boxes | The muffins are packed in boxes of {k}. | full boxes
boxes - boxes | {name} keeps {k} boxes for the school. | boxes for sale
boxes * dollars | Every box is sold for {k} dollars. | dollars earned
dollars - dollars | {name} pays {k} dollars for flour. | dollars after the flour
dollars / shares | The money is shared equally by {k} friends. | dollars for each friend

km | {name} cycles {a} kilometres a day.
km + km | With a new bicycle it becomes {k} kilometres a day more. | km a day now
km * trip | This goes on for {k} days. | km cycled
trip - trip | {k} kilometres of it were a detour, which {name} does not count. | km that count
trip + trip | A ferry adds {k} kilometres, which do count. | km with the ferry
trip / stages | A guide book divides the way into stages of {k} kilometres. | stages
stages * photos | {name} takes {k} photos on every stage. | photos taken
photos - photos | {k} photos are blurred and deleted. | photos kept
photos / pages | The photos go into an album with {k} on a page. | pages of the album

books | A library owns {a} books.
books - books | {k} books are lost. | books left
books + books | {name} gives the library {k} books. | books with the gift
books / shelves | They are put on shelves of {k} books. | full shelves
shelves + shelves | Then {k} shelves of maps are added. | shelves with the maps
shelves * screws | Every shelf needs {k} screws. | screws needed
screws - screws | {k} screws are in the cellar already. | screws to buy
screws / packs | Screws are sold in packs of {k}. | packs to buy
packs * dollars | A pack costs {k} dollars. | dollars to pay

hens | A farm has {a} hens.
hens + hens | {name} buys {k} hens for it. | hens after buying
hens - hens | A fox takes {k} hens. | hens after the fox
hens * eggs | Every hen lays {k} eggs a week. | eggs a week
eggs - eggs | The family eats {k} eggs a week. | eggs to sell
eggs / cartons | The other eggs are put in cartons of {k}. | cartons
cartons * dollars | A carton brings {k} dollars. | dollars a week
dollars - dollars | Feed costs {k} dollars a week. | dollars after the feed
dollars * total | {name} saves what is left for {k} weeks. | dollars saved

rate | {name} saves {a} dollars a month.
rate + rate | A job in the evenings makes it {k} dollars a month more. | dollars a month
rate * dollars | This goes on for {k} months. | dollars saved
dollars + dollars | An aunt adds {k} dollars. | dollars with the gift
dollars - dollars | A dentist's bill takes {k} dollars. | dollars after the bill
dollars / tickets | All the money is spent on tickets at {k} dollars each. | tickets
tickets - tickets | {name} gives {k} tickets away. | tickets left
tickets * hours | A ticket is good for {k} hours of swimming. | hours of swimming
"""
RIDDLES = {
    "+": "{name} has {k} more {things} than {other}.",
    "-": "{name} has {k} fewer {things} than {other}.",
    "*": "{name} has {k} times as many {things} as {other}.",
    "/": "If {name} had {k} times as many {things}, it would be as many as {other} has.",
}


def draw(op, value, rng):
    """A second operand that makes the result a whole number from 1 to 9999, or None."""
    largest = {
        "+": 60, "-": min(60, value - 1), "*": min(12, 9999 // value), "/": min(12, value - 1),
    }[op]
    fitting = [k for k in range(2, largest + 1) if op != "/" or value % k == 0]
    return rng.choice(fitting or [None])


def tell_story(level, rng):
    """(sentences, question, first amount, [(label, operation, second operand) per step]).

    None if the events drawn are incompatible.
    """
    opening, *events = rng.choice(STORIES.strip().split("\n\n")).split("\n")
    unit, sentence = opening.split(" | ")
    name = rng.choice(NAMES)
    start = value = rng.randint(6, 90)
    sentences = [sentence.format(name=name, a=value)]
    steps = []
    for index in sorted(rng.sample(range(len(events)), level)):
        change, sentence, label = events[index].split(" | ")
        before, op, after = change.split()
        k = draw(op, value, rng) if before == unit else None
        if k is None:
            return None
        sentences.append(sentence.format(name=name, k=k))
        steps.append((label, op, k))
        value = OPS[op](value, k)
        unit = after
    return sentences, f"What is the number of {label}?", start, steps


def tell_riddle(level, rng):
    """Like tell_story, with names as labels; each amount is relative to the previous person's."""
    names = rng.sample(NAMES, level + 3)
    things = rng.choice(THINGS.split())
    start = value = rng.randint(3, 60)
    sentences = [f"{names[0]} has {value} {things}."]
    steps = []
    for name, other in zip(names[1:level + 1], names):
        op = rng.choice("+-*/+-*")
        k = draw(op, value, rng)
        if k is None:
            return None
        sentences.append(RIDDLES[op].format(name=name, other=other, k=k, things=things))
        steps.append((name, op, k))
        value = OPS[op](value, k)
    irrelevant = [name for name in names[level + 1:] if level > 1 and rng.random() < 0.4]
    sentences += [f"{name} has {rng.randint(3, 99)} {things}." for name in irrelevant]
    rng.shuffle(sentences)
    return sentences, f"How many {things} does {names[level]} have?", start, steps


def generate(level, rng, split):
    found = None
    while not found:
        found = rng.choice((tell_story, tell_riddle))(level, rng)
    sentences, question, value, steps = found
    key = str(value)  # the calculation alone, regardless of the story
    lines = []
    for label, op, k in steps:
        lines.append(f"{label}: {value} {op} {k} = {OPS[op](value, k)}")
        key += f" {op} {k}"
        value = OPS[op](value, k)
    text = " ".join([*sentences, question])
    return record("words", level, text, str(value), lines, key, split)


# ---- thoughts

LINE = re.compile(r"(.{1,60}): (\d{1,9}) ([-+*/]) (\d{1,9}) = (-?\d{1,9})")


def check_steps(problem, thought):
    """Each line is `label: a op b = c`, the label's operation on known amounts, with its result."""
    *lines, _ = problem["solution"].split("\n")
    steps = {line.partition(": ")[0]: LINE.fullmatch(line).groups() for line in lines}
    labels = list(steps)
    known = 0  # the number of known labels; each depends on the one before

    def check_line(line):
        nonlocal known
        found = LINE.fullmatch(line)
        if not found or found[1] not in labels:
            return None, "not a valid step"
        label, a, op, b, result = steps[found[1]]
        index = labels.index(label)
        if index > known:
            return label, f"{labels[index - 1]} is not known yet"
        orders = [(a, op, b), (b, op, a)] if op in "+*" else [(a, op, b)]
        if found.group(2, 3, 4) not in orders:
            return label, f"should be {a} {op} {b}"
        if found[5] != result:
            return label, f"{found[2]} {op} {found[4]} is {result}"
        known = max(known, index + 1)
        return label, None

    return first_error(
        thought, check_line, lambda: problem["answer"] if known == len(labels) else None)


def corrupt(line, previous, rng):
    """A wrong result, a wrong operation, or a wrong operand with the old or a consistent result."""
    label, a, op, b, c = LINE.fullmatch(line).groups()
    offset = draw_offset(rng, int(c), int(b))
    kind = rng.choice(("result", "operand", "both", "operation"))
    if kind == "result":
        c = int(c) + offset
    elif kind == "operation":
        op = rng.choice([other for other in OPS if other != op])
    else:
        b = int(b) + offset
        if kind == "both":
            c = OPS[op](int(a), b)
    return f"{label}: {a} {op} {b} = {c}"
