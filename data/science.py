"""Scientific deduction: from measured quantities to an asked one; the level is the number of laws.

Every law is a product a = b * c and may be used in its three forms. A step names the law, puts the
numbers and their units in, and computes. The checker knows the laws and the unit of each quantity.
"""

import re
from fractions import Fraction

from data.families import draw_offset, first_wrong, record

QUANTITIES = {
    "mass": "kg", "acceleration": "m/s^2", "force": "N", "distance": "m", "work": "J", "time": "s",
    "power": "W", "pressure": "Pa", "area": "m^2", "height": "m", "volume": "m^3",
    "density": "kg/m^3", "speed": "m/s", "momentum": "kg m/s", "charge": "C", "current": "A",
    "voltage": "V", "resistance": "ohm", "wavelength": "m", "frequency": "Hz",
}
LAWS = [tuple(law.split()) for law in (
    "force mass acceleration, momentum mass speed, momentum force time, work force distance, "
    "work power time, power force speed, distance speed time, force pressure area, "
    "volume area height, mass density volume, speed wavelength frequency, charge current time, "
    "voltage current resistance, power voltage current, work charge voltage").split(", ")]
UNITS = "m, m^2, m^3, kg, s, A, Hz, m/s, m/s^2, kg/m^3, kg m/s, N, J, W, Pa, C, V, ohm".split(", ")
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
    """(what is told, as {name: value}, steps, all values), or None. Each step, a form of a law,
    needs the result of the one before."""
    current = rng.choice(list(QUANTITIES))
    values = {current: rng.randint(2, 60)}
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
        steps.append((result, op, a, b))
        current = result
    results = [step[0] for step in steps]
    told = {name: value for name, value in values.items() if name not in results}
    if level > 2:  # one that is not needed
        extra = rng.choice(list(QUANTITIES))
        if extra not in values:
            told[extra] = rng.randint(2, 60)
    return (told, steps, values) if consistent(told) else None


def generate(level, rng, split):
    found = None
    while not found:
        found = draw_problem(level, rng)
    told, steps, values = found
    target = steps[-1][0]
    order = list(told)
    rng.shuffle(order)
    listed = ", ".join(f"{name} {amount(told[name], name)}" for name in order)
    opening = rng.choice(OPENINGS).format(listed)
    text = f"{opening} What is the {target}, in {QUANTITIES[target]}?"
    amounts = {name: amount(value, name) for name, value in values.items()}
    lines = [f"{result} = {a} {op} {b} = {amounts[a]} {op} {amounts[b]} = {amounts[result]}"
             for result, op, a, b in steps]
    needed = sorted(told.keys() & values.keys())
    key = f"{target} from " + ", ".join(f"{name} {values[name]}" for name in needed)
    return record("science", level, text, str(values[target]), lines, key, split,
                  givens=told, target=target)


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
        result, a, op, b, *operation, value, unit = found.groups()
        if (result, op, a, b) not in FORMS and not (op == "*" and (result, op, b, a) in FORMS):
            return result, "there is no such law"
        unknown = {a, b} - known.keys()
        if unknown:
            return result, f"the {min(unknown)} is not known yet"
        right = f"{amount(known[a], a)} {op} {amount(known[b], b)}"
        if " ".join(operation) != right:
            return result, f"it is {right}"
        if unit != QUANTITIES[result]:
            return result, f"the units do not come to {unit}"
        exact = compute(op, known[a], known[b])
        if int(value) != exact:
            return result, f"{known[a]} {op} {known[b]} is {exact}"
        known[result] = exact
        return result, None

    def conclusion():
        return known.get(target) if target not in problem["givens"] else None

    return first_wrong(thought, step, conclusion)


def spoil(line, before, rng):
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
