"""Algebra as derivations: solve an equation, expand a product, find the constant of an identity.

A step names what is done and gives the new equation: `subtract 5: 3x = 15`. The checker does it
itself, with exact polynomials (data/steps.py), and compares: an equation that merely has the same
solution does not pass under a wrong name.
"""

import re
from fractions import Fraction
from functools import partial

from data import families
from data.families import first_wrong, record, replace_match, sample_family
from data.steps import add, divide, multiply, number, parse

# ---- polynomials as text


def show(poly):
    """A polynomial in one letter, the highest power first: `2x^2 - 7x - 13`."""
    text = ""
    for letters, c in sorted(poly.items(), key=lambda term: -len(term[0])):
        size = "" if abs(c) == 1 and letters else str(abs(c))
        power = f"^{len(letters)}" if len(letters) > 1 else ""
        text += (" - " if c < 0 else " + ") + size + letters[:1] + power
    sign = "-" if text.startswith(" - ") else ""
    return sign + text[3:] or "0"


def signed(n):
    """A number at the end of a sum: ` + 5`, ` - 5`, nothing for 0."""
    return f" {'-' if n < 0 else '+'} {abs(n)}" if n else ""


def linear(a, b, letter):
    """a * letter + b."""
    return {letters: Fraction(c) for letters, c in ((letter, a), ("", b)) if c}


def brackets(a, b, letter):
    return f"({show(linear(a, b, letter))})"


# ---- problems: each kind makes (question, answer, lines, what the thought starts from), or None


def draw(rng, low, high):
    """A whole number other than 0."""
    return rng.choice([n for n in range(low, high + 1) if n])


def move(sides, part, lines):
    """The sides after a polynomial was taken away from both; what was done is added to `lines`."""
    if not part:
        return sides
    sides = [add(side, part, -1) for side in sides]
    name = f"subtract {show(part)}"
    if show(part).startswith("-"):
        name = f"add {show(multiply(part, parse('-1')))}"
    lines.append(f"{name}: {show(sides[0])} = {show(sides[1])}")
    return sides


def equation_linear(level, rng, letter):
    """ax + b = c; ax + b = cx + d; a(bx + c) + d = ex + f."""
    x, a, b = draw(rng, -12, 12), draw(rng, 2, 9), draw(rng, -20, 20)
    c = 0 if level == 1 else draw(rng, -9, 9)
    k = 1 if level < 3 else draw(rng, 2, 6)
    extra = 0 if level < 3 else draw(rng, -9, 9)
    if k * a == c:
        return None
    left = show(linear(a, b, letter))
    if level == 3:
        left = f"{k}({left}){signed(extra)}"
    right = show(linear(c, k * (a * x + b) + extra - c * x, letter))
    sides = [parse(left), parse(right)]
    lines = [f"expand: {show(sides[0])} = {right}"] if level == 3 else []
    sides = move(sides, {letters: c for letters, c in sides[1].items() if letters}, lines)
    sides = move(sides, {letters: c for letters, c in sides[0].items() if not letters}, lines)
    factor = sides[0][letter]
    answer = show(divide(sides[1], {"": factor}))
    if factor != 1:
        lines.append(f"divide by {factor}: {letter} = {answer}")
    return f"Solve for {letter}: {left} = {right}", answer, lines, f"{left} = {right}"


def equation_quadratic(level, rng, letter):
    """x^2 + bx + c = d, and (x + p)(x + q) = d; the larger solution is asked for."""
    low, high = sorted(rng.sample([n for n in range(-10, 11) if n], 2))
    p, q = draw(rng, -9, 9), draw(rng, -9, 9)
    value = p
    left = show(add(parse(f"{letter}^2"), linear(-(low + high), low * high + p, letter)))
    lines = []
    if level == 5:
        q = -(low + high) - p  # so that the solutions have the right sum
        value = p * q - low * high
        left = f"{brackets(1, p, letter)}{brackets(1, q, letter)}"
        lines.append(f"expand: {show(parse(left))} = {value}")
    if not q:
        return None
    move([parse(left), parse(str(value))], parse(str(value)), lines)
    lines.append(f"factor: {brackets(1, -low, letter)}{brackets(1, -high, letter)} = 0")
    lines.append(f"so {letter} = {low} or {letter} = {high}")
    start = f"{left} = {value}"
    return f"What is the larger solution of {start}?", str(high), lines, start


def expansion(level, rng, letter):
    """(ax + b)(cx + d), and (ax + b)^2 - (cx + d)(ex + f) at level 5."""
    a, b, c, d, e, f = (draw(rng, -9, 9) for _ in range(6))
    first = brackets(abs(a), b, letter)
    second = brackets(abs(c), d, letter)
    third = brackets(abs(e), f, letter)
    if level < 5:
        text = first + second
        parts = [multiply(part, parse(second)) for part in (linear(abs(a), 0, letter), {"": b})]
        lines = [f"= ({show(parts[0])}) + ({show(parts[1])})"]
    else:
        text = f"{first}^2 - {second}{third}"
        square = show(parse(first + "^2"))
        lines = [f"= ({square}) - {second}{third}",
                 f"= ({square}) - ({show(parse(second + third))})"]
    answer = show(parse(text))
    return f"Expand and simplify: {text}", answer, [*lines, f"= {answer}"], text


def identity(level, rng, letter):
    """For which k is (x + a)^2 - (x - b)(x + c) - d = kx?"""
    a, b, c = draw(rng, -9, 9), draw(rng, -9, 9), draw(rng, -9, 9)
    if 2 * a == b + c:
        return None
    square = f"{brackets(1, a, letter)}^2"
    product = f"{brackets(1, b, letter)}{brackets(1, c, letter)}"
    end = signed(b * c - a * a)
    text = f"{square} - {product}{end}"
    lines = [f"= ({show(parse(square))}) - ({show(parse(product))}){end}", f"= {show(parse(text))}"]
    question = f"For which constant k is {text} = k{letter} for all {letter}?"
    return question, str(parse(text)[letter]), lines, f"k: {text}"


KINDS = {
    1: [equation_linear], 2: [equation_linear], 3: [equation_linear, expansion],
    4: [equation_quadratic, identity], 5: [equation_quadratic, expansion],
}


def generate(level, rng, split=None):
    found = None
    while not found:
        kind = rng.choice(KINDS[level])
        letter = rng.choice("xyzntw")
        found = kind(level, rng, letter)
    question, answer, lines, start = found
    key = start.replace(letter, "x")
    return record(
        "algebra", level, question, answer, lines, key, split, start=start, letter=letter
    )


# ---- thoughts

OPERATION = re.compile(
    r"(?:(expand|factor)|(add|subtract|divide by) (.{1,60})): (.{1,120}) = (.{1,120})"
)


def apply(name, amount, sides):
    """The two sides after a named operation; expanding and factoring leave them equal."""
    if name in ("expand", "factor"):
        return sides
    part = parse(amount)
    if name == "divide by":
        return [divide(side, part) for side in sides]
    return [add(side, part, 1 if name == "add" else -1) for side in sides]


def check_steps(problem, thought):
    """Each line names an operation and the equation it leads to, or is an equal expression."""
    letter = problem["letter"]
    start = problem["start"].removeprefix("k: ")
    solving = " = " in start
    sides = [parse(side) for side in start.split(" = ")]
    last = ""  # the left side, or the expression, as it was last written
    roots = None
    solutions = re.compile(rf"so {letter} = (-?\d{{1,6}}) or {letter} = (-?\d{{1,6}})")

    def operate(name, amount, *given):
        nonlocal sides, last
        if not solving:
            return "there is no equation to work on"
        wanted = apply(name, amount, sides)
        if [parse(side) for side in given] != wanted:
            return f"it gives {show(wanted[0])} = {show(wanted[1])}"
        sides = wanted
        last = given[0]
        return None

    def split_product(*claimed):
        nonlocal roots
        factors = re.fullmatch(r"(\([^()]+\))(\([^()]+\))", last)
        if not factors or sides[1]:
            return "the product of two factors has to be zero first"
        factors = [parse(factor) for factor in factors.groups()]
        zeros = [-factor.get("", Fraction(0)) / factor[letter] for factor in factors]
        if sorted(zeros) != sorted(map(Fraction, claimed)):
            return f"the factors are zero at {zeros[0]} and {zeros[1]}"
        roots = zeros
        return None

    def rewrite(text):
        nonlocal last
        if parse(text[:248]) != sides[0]:
            return f"this is not equal to {start}"
        last = text
        return None

    def step(line):
        try:
            if found := OPERATION.fullmatch(line):
                name = found[1] or found[2]
                return name, operate(name, *found.groups()[2:])
            if found := solutions.fullmatch(line):
                return "so", split_product(*found.groups())
            if line.startswith("= ") and not solving:
                return "rewrite", rewrite(line[2:])
        except (ValueError, KeyError) as error:
            return None, f"cannot be read ({error})"
        return None, "not a step of this kind"

    def conclusion():
        if roots:
            return str(max(roots))
        if solving:
            solved = sides[0] == {letter: 1} and number(sides[1]) is not None
            return show(sides[1]) if solved else None
        if last != show(sides[0]):
            return None
        return str(sides[0][letter]) if problem["start"].startswith("k: ") else last

    return first_wrong(thought, step, conclusion)


def spoil(line, rng):
    """One number of the line changed, sometimes to its negative."""
    places = list(re.finditer(r"(?<!\^)\d+", line))
    if not places:
        return None
    place = rng.choice(places)
    value = int(place[0])
    return replace_match(line, place, value + rng.choice([1, 2, 10] + [-1] * (value > 2)))


problems = partial(sample_family, generate)
plant_error = partial(families.plant_error, spoil)
plant_slip = partial(families.plant_slip, spoil)
