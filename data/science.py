"""Scientific deduction: from measured quantities to an asked one; the level is the number of laws.

Every law is a product a = b * c and may be used in its three forms. A step names the law, puts the
numbers and their units in, and computes. The checker knows the laws and the exponents of the base
units: a wrong unit is a wrong step.
"""

import re
from fractions import Fraction
from functools import partial

from data import families
from data.families import draw_offset, first_wrong, record, sample_family

UNITS = {  # exponents of (m, kg, s, A)
    "m": (1, 0, 0, 0), "m^2": (2, 0, 0, 0), "m^3": (3, 0, 0, 0), "kg": (0, 1, 0, 0),
    "s": (0, 0, 1, 0), "A": (0, 0, 0, 1), "Hz": (0, 0, -1, 0), "m/s": (1, 0, -1, 0),
    "m/s^2": (1, 0, -2, 0), "kg/m^3": (-3, 1, 0, 0), "kg m/s": (1, 1, -1, 0), "N": (1, 1, -2, 0),
    "J": (2, 1, -2, 0), "W": (2, 1, -3, 0), "Pa": (-1, 1, -2, 0), "C": (0, 0, 1, 1),
    "V": (2, 1, -3, -1), "ohm": (2, 1, -3, -2),
}
QUANTITIES = {
    "mass": "kg", "acceleration": "m/s^2", "force": "N", "distance": "m", "work": "J", "time": "s",
    "power": "W", "pressure": "Pa", "area": "m^2", "height": "m", "volume": "m^3",
    "density": "kg/m^3", "speed": "m/s", "momentum": "kg m/s", "charge": "C", "current": "A",
    "voltage": "V", "resistance": "ohm", "wavelength": "m", "frequency": "Hz",
}
LAWS = [
    ("force", "mass", "acceleration"), ("momentum", "mass", "speed"), ("momentum", "force", "time"),
    ("work", "force", "distance"), ("work", "power", "time"), ("power", "force", "speed"),
    ("distance", "speed", "time"), ("force", "pressure", "area"), ("volume", "area", "height"),
    ("mass", "density", "volume"), ("speed", "wavelength", "frequency"),
    ("charge", "current", "time"), ("voltage", "current", "resistance"),
    ("power", "voltage", "current"), ("work", "charge", "voltage"),
]
# The three ways to use a = b * c: (result, operation, first, second).
FORMS = [form for a, b, c in LAWS for form in ((a, "*", b, c), (b, "/", a, c), (c, "/", a, b))]
OPENINGS = [
    "In an experiment these values are measured: {}.", "A worksheet gives {}.",
    "A student notes {}.", "From the data sheet of a machine: {}.",
    "Known about a moving system: {}.",
]
LARGEST = 100_000

# ---- problems


def compute(op, x, y):
    return Fraction(x) * y if op == "*" else Fraction(x) / y


def amount(value, name):
    return f"{value} {QUANTITIES[name]}"


def draw(op, known_first, known, rng):
    """The other number of `first op second` that makes the result a whole number, or None."""
    if op == "*":
        return rng.randint(2, 20)
    if known_first:
        return rng.choice([n for n in range(2, 51) if known % n == 0] or [None])
    return known * rng.randint(2, 20)


def draw_chain(level, rng):
    """(given names, steps, values) of laws each of which needs the last one's result, or None."""
    current = rng.choice(list(QUANTITIES))
    values = {current: rng.randint(2, 60)}
    givens = [current]
    steps = []
    for _ in range(level):
        fitting = [form for form in FORMS
                   if current in form[2:] and len(values.keys() & {form[0], *form[2:]}) == 1]
        if not fitting:
            return None
        result, op, a, b = rng.choice(fitting)
        other = b if a == current else a
        values[other] = draw(op, a == current, values[current], rng)
        if values[other] is None:
            return None
        values[result] = int(compute(op, values[a], values[b]))
        if max(values[other], values[result]) > LARGEST:
            return None
        givens.append(other)
        steps.append((result, op, a, b))
        current = result
    return givens, steps, values


def consistent(values):
    """Whether every way to compute a quantity from these values gives the same."""
    known = dict(values)
    more = True
    while more:
        more = {result: compute(op, known[a], known[b]) for result, op, a, b in FORMS
                if {a, b} <= known.keys() and result not in known}
        known |= more
    return all(known[a] == known[b] * known[c] for a, b, c in LAWS if {a, b, c} <= known.keys())


def draw_problem(level, rng):
    """(what is told, as {name: value}, givens, steps, values), or None."""
    found = draw_chain(level, rng)
    if not found:
        return None
    givens, steps, values = found
    told = {name: values[name] for name in givens}
    if level > 2:  # one that is not needed
        extra = rng.choice(list(QUANTITIES))
        if extra not in values:
            told[extra] = rng.randint(2, 60)
    return (told, *found) if consistent(told) else None


def generate(level, rng, split=None):
    found = None
    while not found:
        found = draw_problem(level, rng)
    told, givens, steps, values = found
    target = steps[-1][0]
    order = list(told)
    rng.shuffle(order)
    listed = ", ".join(f"{name} {amount(told[name], name)}" for name in order)
    opening = rng.choice(OPENINGS).format(listed)
    text = f"{opening} What is the {target}, in {QUANTITIES[target]}?"
    amounts = {name: amount(value, name) for name, value in values.items()}
    lines = [f"{result} = {a} {op} {b} = {amounts[a]} {op} {amounts[b]} = {amounts[result]}"
             for result, op, a, b in steps]
    key = f"{target} from " + ", ".join(f"{name} {values[name]}" for name in sorted(givens))
    told = {name: told[name] for name in order}
    answer = str(values[target])
    return record("science", level, text, answer, lines, key, split, givens=told, target=target)


# ---- thoughts

AMOUNT = r"(\d{1,9}) ([^=*]{1,8}?)"
LINE = re.compile(
    rf"([a-z]+) = ([a-z]+) ([*/]) ([a-z]+) = {AMOUNT} ([*/]) {AMOUNT} = {AMOUNT}"
)


def check_steps(problem, thought):
    """Each line uses a law that exists and known amounts, and gets number and unit right."""
    known = dict(problem["givens"])
    target = problem["target"]

    def step(line):
        found = LINE.fullmatch(line)
        if not found or not {found[1], found[2], found[4]} <= QUANTITIES.keys():
            return None, "not a step of this kind"
        result, a, op, b, x, unit_x, op_again, y, unit_y, z, unit_z = found.groups()
        lawful = (result, op, a, b) in FORMS or op == "*" and (result, op, b, a) in FORMS
        if not lawful or op_again != op:
            return result, "there is no such law"
        for name, value, unit in ((a, x, unit_x), (b, y, unit_y)):
            if known.get(name) != int(value) or unit != QUANTITIES[name]:
                right = amount(known[name], name) if name in known else "not known yet"
                return result, f"the {name} is {right}"
        sign = 1 if op == "*" else -1
        exponents = tuple(p + sign * q for p, q in zip(UNITS[unit_x], UNITS[unit_y]))
        if UNITS.get(unit_z) != exponents:
            return result, f"the units do not come to {unit_z}"
        if compute(op, int(x), int(y)) != int(z):
            return result, f"{x} {op} {y} is {compute(op, int(x), int(y))}"
        known[result] = int(z)
        return result, None

    def conclusion():
        return known.get(target) if target not in problem["givens"] else None

    return first_wrong(thought, step, conclusion)


def spoil(line, rng):
    """A wrong number or unit, a law upside down, or a value that is not the given one."""
    result, a, op, b, x, unit_x, _, y, unit_y, z, unit_z = LINE.fullmatch(line).groups()
    offset = draw_offset(rng, int(z), int(y))
    kind = rng.choice(("result", "unit", "law", "value"))
    if kind == "result":
        z = int(z) + offset
    elif kind == "unit":
        unit_z = rng.choice([unit for unit in UNITS if unit != unit_z])
    elif kind == "law":
        op = "/" if op == "*" else "*"
    else:
        y = int(y) + offset
    return f"{result} = {a} {op} {b} = {x} {unit_x} {op} {y} {unit_y} = {z} {unit_z}"


problems = partial(sample_family, generate)
plant_error = partial(families.plant_error, spoil)
plant_slip = partial(families.plant_slip, spoil)
