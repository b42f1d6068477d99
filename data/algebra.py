"""Algebra as derivations: solve an equation, expand a product, find the constant of an identity.

A step names an operation and gives the resulting equation: `subtract 5: 3x = 15`. The checker
carries out the named operation with exact polynomials (data/steps.py) and compares the results, so
an equation with the same solution is not enough.
"""

import re
from fractions import Fraction

from data.families import first_error, record, replace_match
from data.steps import add, divide, number, parse, subtract

# ---- polynomials as text


def show(poly):
    """A polynomial in one letter as text, highest power first: `2x^2 - 7x - 13`."""
    text = ""
    for letters, c in sorted(poly.items(), key=lambda term: -len(term[0])):
        size = "" if abs(c) == 1 and letters else str(abs(c))
        power = f"^{len(letters)}" if len(letters) > 1 else ""
        text += (" - " if c < 0 else " + ") + size + letters[:1] + power
    sign = "-" if text.startswith(" - ") else ""
    return sign + text[3:] or "0"


def simplify(text):
    return show(parse(text))


def signed(n):
    """The last term of a sum: ` + 5`, ` - 5`, or nothing for 0."""
    return f" {'-' if n < 0 else '+'} {abs(n)}" if n else ""


def brackets(a, b):
    return f"({simplify(f'{a}X + {b}')})"


# ---- problems: each kind returns (question, answer, lines, starting expression), or None
# X is a placeholder for the letter.


def draw(rng, low, high):
    """A non-zero integer from low to high."""
    return rng.choice([n for n in range(low, high + 1) if n])


def move(sides, part, lines):
    """Subtract the polynomial `part` from both sides; returns the sides, appends to `lines`."""
    if not part:
        return sides
    sides = [subtract(side, part) for side in sides]
    name = f"subtract {show(part)}"
    if show(part).startswith("-"):
        name = f"add {show(subtract({}, part))}"
    lines.append(f"{name}: {show(sides[0])} = {show(sides[1])}")
    return sides


def equation_linear(level, rng):
    """ax + b = c; ax + b = cx + d; a(bx + c) + d = ex + f."""
    x, a, b = draw(rng, -12, 12), draw(rng, 2, 9), draw(rng, -20, 20)
    c = 0 if level == 1 else draw(rng, -9, 9)
    k = 1 if level < 3 else draw(rng, 2, 6)
    extra = 0 if level < 3 else draw(rng, -9, 9)
    if k * a == c:
        return None
    left = simplify(f"{a}X + {b}")
    right = simplify(f"{c}X + {k * (a * x + b) + extra - c * x}")
    lines = []
    if level == 3:
        left = f"{k}({left}){signed(extra)}"
        lines.append(f"expand: {simplify(left)} = {right}")
    sides = [parse(left), parse(right)]
    sides = move(sides, parse(f"{c}X"), lines)
    sides = move(sides, subtract(sides[0], {"X": sides[0]["X"]}), lines)
    factor = sides[0]["X"]
    answer = show(divide(sides[1], {"": factor}))
    if factor != 1:
        lines.append(f"divide by {factor}: X = {answer}")
    return f"Solve for X: {left} = {right}", answer, lines, f"{left} = {right}"


def equation_quadratic(level, rng):
    """x^2 + bx + c = d, or at level 5 (x + p)(x + q) = d. The answer is the larger solution."""
    low, high = sorted(rng.sample([n for n in range(-10, 11) if n], 2))
    p, q = draw(rng, -9, 9), draw(rng, -9, 9)
    value = p
    left = simplify(f"X^2 + {-(low + high)}X + {low * high + p}")
    lines = []
    if level == 5:
        q = -(low + high) - p  # gives the solutions the right sum
        value = p * q - low * high
        left = f"{brackets(1, p)}{brackets(1, q)}"
        lines.append(f"expand: {simplify(left)} = {value}")
    if not q:
        return None
    start = f"{left} = {value}"
    move([parse(left), parse(str(value))], parse(str(value)), lines)
    lines.append(f"factor: {brackets(1, -low)}{brackets(1, -high)} = 0")
    lines.append(f"so X = {low} or X = {high}")
    return f"What is the larger solution of {start}?", str(high), lines, start


def expansion(level, rng):
    """(ax + b)(cx + d), or at level 5 (ax + b)^2 - (cx + d)(ex + f)."""
    a, b, c, d, e, f = (draw(rng, -9, 9) for _ in range(6))
    first, second, third = brackets(abs(a), b), brackets(abs(c), d), brackets(abs(e), f)
    if level < 5:
        text = first + second
        lines = [f"= ({simplify(f'{abs(a)}X{second}')}) + ({simplify(f'{b}{second}')})"]
    else:
        text = f"{first}^2 - {second}{third}"
        square = simplify(f"{first}^2")
        lines = [f"= ({square}) - {second}{third}",
                 f"= ({square}) - ({simplify(second + third)})"]
    answer = simplify(text)
    return f"Expand and simplify: {text}", answer, [*lines, f"= {answer}"], text


def identity(level, rng):
    """For which k is (x + a)^2 - (x + b)(x + c) + d = kx for all x?"""
    a, b, c = draw(rng, -9, 9), draw(rng, -9, 9), draw(rng, -9, 9)
    if 2 * a == b + c:
        return None
    square = f"{brackets(1, a)}^2"
    product = f"{brackets(1, b)}{brackets(1, c)}"
    end = signed(b * c - a * a)
    text = f"{square} - {product}{end}"
    lines = [f"= ({simplify(square)}) - ({simplify(product)}){end}", f"= {simplify(text)}"]
    question = f"For which constant k is {text} = kX for all X?"
    return question, str(2 * a - b - c), lines, f"k: {text}"


KINDS = {
    1: [equation_linear], 2: [equation_linear], 3: [equation_linear, expansion],
    4: [equation_quadratic, identity], 5: [equation_quadratic, expansion],
}


def generate(level, rng, split):
    found = None
    while not found:
        kind = rng.choice(KINDS[level])
        letter = rng.choice("xyzntw")
        found = kind(level, rng)
    question, answer, lines, start = found
    key = start.replace("X", "x")
    question, answer, start, *lines = (
        text.replace("X", letter) for text in (question, answer, start, *lines))
    return record("algebra", level, question, answer, lines, key, split,
                  start=start, letter=letter)


# ---- thoughts

OPERATIONS = {"add": add, "subtract": subtract, "divide by": divide}
LINE = re.compile(
    r"(?:(expand|factor)|(add|subtract|divide by) (.{1,60})): (.{1,120}) = (.{1,120})"
)
SOLUTIONS = re.compile(r"so ([a-z]) = (-?\d{1,6}) or \1 = (-?\d{1,6})")


def check_steps(problem, thought):
    """Each line names an operation and the resulting equation, or is an equal expression."""
    letter = problem["letter"]
    start = problem["start"].removeprefix("k: ")
    solving = " = " in start
    sides = [parse(side) for side in start.split(" = ")]
    last = ""  # the left side, or the expression, as last written
    factored = False

    def apply_line(line):
        nonlocal sides, last, factored
        if found := LINE.fullmatch(line):
            rewriting, name, operand, *claim = found.groups()
            right = [OPERATIONS[name](side, parse(operand)) for side in sides] if name else sides
            if list(map(parse, claim)) != right:
                return rewriting or name, f"it gives {' = '.join(map(show, right))}"
            sides, last = right, claim[0]
            return rewriting or name, None
        if found := SOLUTIONS.fullmatch(line):
            product = re.fullmatch(r"(\([^()]+\))(\([^()]+\))", last)
            if not product or sides[1]:
                return "so", "the equation is not a product of two factors equal to zero"
            factors = [parse(factor) for factor in product.groups()]
            zeros = [-factor.get("", Fraction(0)) / factor[letter] for factor in factors]
            if found[1] != letter or sorted(zeros) != sorted(map(Fraction, found.group(2, 3))):
                return "so", f"the factors are zero at {zeros[0]} and {zeros[1]}"
            factored = True
            return "so", None
        if solving or not line.startswith("= "):
            return None, "not a valid step"
        if parse(line[2:250]) != sides[0]:
            return "rewrite", f"not equal to {start}"
        last = line[2:]
        return "rewrite", None

    def check_line(line):
        try:
            return apply_line(line)
        except (ValueError, LookupError) as error:
            return None, f"cannot be parsed ({error})"

    def conclusion():
        if solving:
            done = factored or sides[0] == {letter: 1} and number(sides[1]) is not None
        else:
            done = last == show(sides[0])
        return problem["answer"] if done else None

    return first_error(thought, check_line, conclusion)


def corrupt(line, previous, rng):
    """The line with one number changed, by at most 10."""
    places = list(re.finditer(r"(?<!\^)\d+", line))
    if not places:
        return None
    place = rng.choice(places)
    value = int(place[0])
    return replace_match(line, place, value + rng.choice([1, 2, 10] + [-1] * (value > 2)))
