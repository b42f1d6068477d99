"""Scientific deduction: from measured quantities to an asked one, law by law; the level is the number of laws.

Every law is a product a = b * c and may be used in its three forms. A step names the law, puts the numbers and their
units in, and computes; its checker knows the laws and the exponents of the base units: a wrong unit is a wrong step.
"""

import re
from fractions import Fraction

from data.families import ALL_LEVELS, first_wrong, plant_error as plant, plant_slip as slip, record, sample_family

UNITS = {  # exponents of (m, kg, s, A)
    "m": (1, 0, 0, 0), "m^2": (2, 0, 0, 0), "m^3": (3, 0, 0, 0), "kg": (0, 1, 0, 0), "s": (0, 0, 1, 0),
    "A": (0, 0, 0, 1), "Hz": (0, 0, -1, 0), "m/s": (1, 0, -1, 0), "m/s^2": (1, 0, -2, 0), "kg/m^3": (-3, 1, 0, 0),
    "kg m/s": (1, 1, -1, 0), "N": (1, 1, -2, 0), "J": (2, 1, -2, 0), "W": (2, 1, -3, 0), "Pa": (-1, 1, -2, 0),
    "C": (0, 0, 1, 1), "V": (2, 1, -3, -1), "ohm": (2, 1, -3, -2)}
QUANTITIES = {
    "mass": "kg", "acceleration": "m/s^2", "force": "N", "distance": "m", "work": "J", "time": "s", "power": "W",
    "pressure": "Pa", "area": "m^2", "height": "m", "volume": "m^3", "density": "kg/m^3", "speed": "m/s",
    "momentum": "kg m/s", "charge": "C", "current": "A", "voltage": "V", "resistance": "ohm", "wavelength": "m",
    "frequency": "Hz"}
LAWS = [
    ("force", "mass", "acceleration"), ("momentum", "mass", "speed"), ("momentum", "force", "time"),
    ("work", "force", "distance"), ("work", "power", "time"), ("power", "force", "speed"), ("distance", "speed", "time"),
    ("force", "pressure", "area"), ("volume", "area", "height"), ("mass", "density", "volume"),
    ("speed", "wavelength", "frequency"), ("charge", "current", "time"), ("voltage", "current", "resistance"),
    ("power", "voltage", "current"), ("work", "charge", "voltage")]
OPENINGS = ["In an experiment these values are measured: {}.", "A worksheet gives {}.", "A student notes {}.",
            "From the data sheet of a machine: {}.", "Known about a moving system: {}."]
LARGEST = 100_000


# The three ways to use a = b * c: (result, operation, first, second).
FORMS = [form for a, b, c in LAWS for form in ((a, "*", b, c), (b, "/", a, c), (c, "/", a, b))]


def compute(op, x, y):
    return Fraction(x) * y if op == "*" else Fraction(x) / y


def draw(op, known_first, known, rng):
    """The other number of `first op second`, such that the result is a whole number; None when there is none."""
    if op == "*":
        return rng.randint(2, 20)
    if known_first:
        return rng.choice([n for n in range(2, 51) if known % n == 0] or [None])
    return known * rng.randint(2, 20)


def draw_chain(level, rng):
    """(given quantities, steps) of a chain of laws in which each result is needed for the next, or None."""
    current = rng.choice(list(QUANTITIES))
    values, givens, steps = {current: rng.randint(2, 60)}, [current], []
    for _ in range(level):
        fitting = [form for form in FORMS if current in form[2:] and len(values.keys() & {form[0], *form[2:]}) == 1]
        if not fitting:
            return None
        result, op, a, b = rng.choice(fitting)
        other = b if a == current else a
        values[other] = draw(op, a == current, values[current], rng)
        if values[other] is None:
            return None
        values[result] = values[a] * values[b] if op == "*" else values[a] // values[b]
        if max(values[other], values[result]) > LARGEST:
            return None
        givens.append(other)
        steps.append((result, op, a, b))
        current = result
    return {name: values[name] for name in givens}, steps, values


def consistent(values):
    """Whether all that the laws lead to from these values agrees, whichever way it is reached."""
    known = dict(values)
    while more := {result: compute(op, known[a], known[b]) for result, op, a, b in FORMS
                   if a in known and b in known and result not in known}:
        known |= more
    return all(known[a] == known[b] * known[c] for a, b, c in LAWS if a in known and b in known and c in known)


def amount(value, name):
    return f"{value} {QUANTITIES[name]}"


def generate(level, rng):
    while True:
        if not (found := draw_chain(level, rng)):
            continue
        givens, steps, values = found
        told = [*givens.items()]
        if level > 2 and (extra := rng.choice(list(QUANTITIES))) not in values:
            told.append((extra, rng.randint(2, 60)))
        if consistent(dict(told)):                                 # no second way that gives another value
            break
    target = steps[-1][0]
    rng.shuffle(told)
    listed = ", ".join(f"{name} {amount(value, name)}" for name, value in told)
    text = f"{rng.choice(OPENINGS).format(listed)} What is the {target}, in {QUANTITIES[target]}?"
    amounts = {name: amount(value, name) for name, value in values.items()}
    lines = [f"{result} = {a} {op} {b} = {amounts[a]} {op} {amounts[b]} = {amounts[result]}"
             for result, op, a, b in steps]
    key = f"{target} from " + ", ".join(f"{name} {value}" for name, value in sorted(givens.items()))
    return record("science", level, text, str(values[target]), lines, key, givens=dict(told), target=target)


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    return sample_family(generate, split, limit, seed, levels)


AMOUNT = r"(\d{1,9}) ([^=*]{1,8}?)"
LINE = re.compile(rf"([a-z]+) = ([a-z]+) ([*/]) ([a-z]+) = {AMOUNT} ([*/]) {AMOUNT} = {AMOUNT}")


def check_steps(problem, thought):
    """Each line uses a law that exists, known numbers in their units, and computes number and unit rightly."""
    known = dict(problem["givens"])

    def step(line):
        found = LINE.fullmatch(line)
        if not found or not {found[1], found[2], found[4]} <= QUANTITIES.keys():
            return None, "not a step of this kind"
        result, a, op, b, x, unit_x, op_again, y, unit_y, z, unit_z = found.groups()
        if not {(result, op, a, b), (result, op, b, a) if op == "*" else ()} & set(FORMS) or op_again != op:
            return result, "there is no such law"
        for name, number, unit in ((a, x, unit_x), (b, y, unit_y)):
            if known.get(name) != int(number) or unit != QUANTITIES[name]:
                return result, f"the {name} is {amount(known[name], name) if name in known else 'not known yet'}"
        sign = 1 if op == "*" else -1
        if UNITS.get(unit_z) != tuple(p + sign * q for p, q in zip(UNITS[unit_x], UNITS[unit_y])):
            return result, f"the units do not come to {unit_z}"
        if compute(op, int(x), int(y)) != int(z):
            return result, f"{x} {op} {y} is {compute(op, int(x), int(y))}"
        known[result] = int(z)
        return result, None

    target = problem["target"]
    return first_wrong(thought, step, lambda: known.get(target) if target not in problem["givens"] else None)


def spoil(line, rng):
    """A wrong number, a wrong unit, a law upside down, or a value that is not the given one."""
    result, a, op, b, x, unit_x, _, y, unit_y, z, unit_z = LINE.fullmatch(line).groups()
    off = rng.choice([n for n in (-10, -2, -1, 1, 2, 10) if int(z) + n > 0 and int(y) + n > 0])
    kind = rng.choice(("result", "unit", "law", "value"))
    if kind == "result":
        z = int(z) + off
    elif kind == "unit":
        unit_z = rng.choice([unit for unit in UNITS if unit != unit_z])
    elif kind == "law":
        op = {"*": "/", "/": "*"}[op]
    else:
        y = int(y) + off
    return f"{result} = {a} {op} {b} = {x} {unit_x} {op} {y} {unit_y} = {z} {unit_z}"


def plant_error(problem, rng):
    return plant(problem, rng, lambda line: spoil(line, rng))


def plant_slip(problem, rng):
    return slip(problem, rng, lambda line: spoil(line, rng))
