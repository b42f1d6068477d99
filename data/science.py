"""Scientific deduction: compute a quantity from measured ones; the level is the number of laws.

Every law is a product a = b * c, usable in its three forms. A step states the law, substitutes
numbers with units, and computes. The checker knows the laws and the unit of each quantity.
"""

import re
from fractions import Fraction

from data.families import draw_offset, first_error, record

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
# The three forms of a = b * c: (result, operation, first operand, second operand).
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
    """The other operand, chosen so that `first op second` is a whole number, or None."""
    if op == "*":
        return rng.randint(2, 20)
    if known_first:
        return rng.choice([n for n in range(2, 51) if known % n == 0] or [None])
    return known * rng.randint(2, 20)


def consistent(values):
    """Whether every way to derive a quantity from these values gives the same result."""
    known = dict(values)
    more = True
    while more:
        more = {result: compute(op, known[a], known[b]) for result, op, a, b in FORMS
                if {a, b} <= known.keys() and result not in known}
        known |= more
    return all(known[a] == known[b] * known[c] for a, b, c in LAWS if {a, b, c} <= known.keys())


def draw_problem(level, rng):
    """(givens {name: value}, steps, all values), or None if the draw is unusable. Each step is a
    form of a law, applied to the result of the step before."""
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
    givens = {name: value for name, value in values.items() if name not in results}
    if level > 2:  # a distractor
        extra = rng.choice(list(QUANTITIES))
        if extra not in values:
            givens[extra] = rng.randint(2, 60)
    return (givens, steps, values) if consistent(givens) else None


def generate(level, rng, split):
    found = None
    while not found:
        found = draw_problem(level, rng)
    givens, steps, values = found
    target = steps[-1][0]
    order = list(givens)
    rng.shuffle(order)
    listed = ", ".join(f"{name} {amount(givens[name], name)}" for name in order)
    opening = rng.choice(OPENINGS).format(listed)
    text = f"{opening} What is the {target}, in {QUANTITIES[target]}?"
    amounts = {name: amount(value, name) for name, value in values.items()}
    lines = [f"{result} = {a} {op} {b} = {amounts[a]} {op} {amounts[b]} = {amounts[result]}"
             for result, op, a, b in steps]
    needed = sorted(givens.keys() & values.keys())
    key = f"{target} from " + ", ".join(f"{name} {values[name]}" for name in needed)
    return record("science", level, text, str(values[target]), lines, key, split,
                  givens=givens, target=target)


# ---- thoughts

AMOUNT = r"(\d{1,9}) ([^=*]{1,8}?)"
LINE = re.compile(
    rf"([a-z]+) = ([a-z]+) ([*/]) ([a-z]+) = {AMOUNT} ([*/]) {AMOUNT} = {AMOUNT}"
)


def check_steps(problem, thought):
    """Each line applies a valid law to known amounts, with the right result and unit."""
    known = dict(problem["givens"])
    target = problem["target"]

    def check_line(line):
        found = LINE.fullmatch(line)
        if not found or not {found[1], found[2], found[4]} <= QUANTITIES.keys():
            return None, "not a valid step"
        result, a, op, b, *operation, value, unit = found.groups()
        if (result, op, a, b) not in FORMS and not (op == "*" and (result, op, b, a) in FORMS):
            return result, "not a known law"
        unknown = {a, b} - known.keys()
        if unknown:
            return result, f"{min(unknown)} is not known yet"
        right = f"{amount(known[a], a)} {op} {amount(known[b], b)}"
        if " ".join(operation) != right:
            return result, f"should be {right}"
        if unit != QUANTITIES[result]:
            return result, f"the unit of {result} is not {unit}"
        exact = compute(op, known[a], known[b])
        if int(value) != exact:
            return result, f"{known[a]} {op} {known[b]} is {exact}"
        known[result] = exact
        return result, None

    def conclusion():
        return known.get(target) if target not in problem["givens"] else None

    return first_error(thought, check_line, conclusion)


def corrupt(line, previous, rng):
    """A wrong result, a wrong unit, an inverted operation, or a wrong operand."""
    result, a, op, b, x, unit_x, _, y, unit_y, z, unit_z = LINE.fullmatch(line).groups()
    offset = draw_offset(rng, int(z), int(y))
    kind = rng.choice(("result", "unit", "operation", "operand"))
    if kind == "result":
        z = int(z) + offset
    elif kind == "unit":
        unit_z = rng.choice([unit for unit in UNITS if unit != unit_z])
    elif kind == "operation":
        op = "/" if op == "*" else "*"
    else:
        y = int(y) + offset
    return f"{result} = {a} {op} {b} = {x} {unit_x} {op} {y} {unit_y} = {z} {unit_z}"
