"""Algebra as derivations: solve an equation, expand a product, find the constant of an identity.

A step names what is done and gives the new equation: `subtract 5: 3x = 15`. The checker does it itself, with exact
polynomials (data/steps.py), and compares: an equation that only has the same solution does not pass under a wrong name.
"""

import re
from fractions import Fraction

from data.families import ALL_LEVELS, first_wrong, plant_error as plant, plant_slip as slip, record, sample_family
from data.steps import add, divide, multiply, number, parse


def show(poly):
    """A polynomial in one letter in its usual spelling, the highest power first: `2x^2 - 7x - 13`."""
    out = ""
    for letters, c in sorted(poly.items(), key=lambda term: -len(term[0])):
        power = letters[:1] + (f"^{len(letters)}" if len(letters) > 1 else "")
        size = "" if abs(c) == 1 and letters else str(abs(c))
        out += (" - " if c < 0 else " + ") + size + power
    return ("-" if out.startswith(" - ") else "") + out[3:] or "0"


def linear(a, b, letter):
    """a * letter + b."""
    return {k: Fraction(v) for k, v in ((letter, a), ("", b)) if v}


def brackets(a, b, letter):
    return f"({show(linear(a, b, letter))})"


def draw(rng, low, high):
    return rng.choice([n for n in range(low, high + 1) if n])


class Derivation:
    """An equation and the lines written so far; each method does one thing to both sides and writes it down."""

    def __init__(self, left, right):
        self.left, self.right, self.lines = parse(left), parse(right), []

    def write(self, name, left=None):
        self.lines.append(f"{name}: {left or show(self.left)} = {show(self.right)}")

    def expand(self):
        self.write("expand")

    def shift(self, part):
        """Takes a polynomial away from both sides; one that begins with a minus is added instead."""
        if not part:
            return
        negative = show(part).startswith("-")
        self.left, self.right = add(self.left, part, -1), add(self.right, part, -1)
        self.write(f"add {show(multiply(part, parse('-1')))}" if negative else f"subtract {show(part)}")

    def solve_linear(self, letter):
        self.shift({k: c for k, c in self.right.items() if k})
        self.shift({k: c for k, c in self.left.items() if not k})
        factor = self.left[letter]
        if factor != 1:
            self.left, self.right = {letter: Fraction(1)}, divide(self.right, {"": factor})
            self.write(f"divide by {factor}")


def equation_linear(level, rng, letter):
    """ax + b = c; ax + b = cx + d; a(bx + c) + d = ex + f."""
    x, a, b = draw(rng, -12, 12), draw(rng, 2, 9), draw(rng, -20, 20)
    c = 0 if level == 1 else draw(rng, -9, 9)
    k = 1 if level < 3 else draw(rng, 2, 6)
    extra = 0 if level < 3 else draw(rng, -9, 9)
    if k * a == c:
        return None
    right = linear(c, k * (a * x + b) + extra - c * x, letter)
    left = show(linear(a, b, letter)) if level < 3 else f"{k}{brackets(a, b, letter)} {'+-'[extra < 0]} {abs(extra)}"
    made = Derivation(left, show(right))
    if level == 3:
        made.expand()
    made.solve_linear(letter)
    return f"Solve for {letter}: {left} = {show(right)}", show(made.right), made.lines, f"{left} = {show(right)}"


def equation_quadratic(level, rng, letter):
    """x^2 + bx + c = d, and (x + p)(x + q) = d; the larger solution is asked for."""
    r, s = sorted(rng.sample([n for n in range(-10, 11) if n], 2))
    p, q = draw(rng, -9, 9), draw(rng, -9, 9)
    if level == 5:
        q = -(r + s) - p                                           # so that the sum of the solutions comes out right
        left, value = f"{brackets(1, p, letter)}{brackets(1, q, letter)}", p * q - r * s
    else:
        left = show({k: Fraction(v) for k, v in ((letter * 2, 1), (letter, -(r + s)), ("", r * s + p)) if v})
        value = p
    if not q:
        return None
    made = Derivation(left, str(value))
    if level == 5:
        made.expand()
    made.shift(made.right)
    made.write("factor", f"{brackets(1, -r, letter)}{brackets(1, -s, letter)}")
    made.lines.append(f"so {letter} = {r} or {letter} = {s}")
    return f"What is the larger solution of {left} = {value}?", str(s), made.lines, f"{left} = {value}"


def expansion(level, rng, letter):
    """(ax + b)(cx + d), and (ax + b)^2 - (cx + d)(ex + f) at level 5."""
    a, b, c, d, e, f = (draw(rng, -9, 9) for _ in range(6))
    a, c, e = abs(a), abs(c), abs(e)
    first, second, third = brackets(a, b, letter), brackets(c, d, letter), brackets(e, f, letter)
    if level < 5:
        text = first + second
        parts = [multiply(linear(a, 0, letter), parse(second)), multiply(linear(0, b, letter), parse(second))]
        lines = ["= " + " + ".join(f"({show(part)})" for part in parts)]
    else:
        text = f"{first}^2 - {second}{third}"
        lines = [f"= ({show(parse(first + '^2'))}) - {second}{third}",
                 f"= ({show(parse(first + '^2'))}) - ({show(parse(second + third))})"]
    answer = show(parse(text))
    return f"Expand and simplify: {text}", answer, [*lines, f"= {answer}"], text


def identity(level, rng, letter):
    """For which k is (x + a)^2 - (x - b)(x + c) - d = kx?"""
    a, b, c = draw(rng, -9, 9), draw(rng, -9, 9), draw(rng, -9, 9)
    if 2 * a == b + c:
        return None
    square, product = f"{brackets(1, a, letter)}^2", f"{brackets(1, b, letter)}{brackets(1, c, letter)}"
    rest = a * a - b * c
    text = f"{square} - {product}" + (f" {'-+'[rest < 0]} {abs(rest)}" if rest else "")
    end = text[len(f"{square} - {product}"):]
    lines = [f"= ({show(parse(square))}) - ({show(parse(product))}){end}", f"= {show(parse(text))}"]
    question = f"For which constant k is {text} = k{letter} for all {letter}?"
    return question, str(parse(text)[letter]), lines, f"k: {text}"


KINDS = {1: [equation_linear], 2: [equation_linear], 3: [equation_linear, expansion], 4: [equation_quadratic, identity],
         5: [equation_quadratic, expansion]}


def generate(level, rng):
    while not (found := rng.choice(KINDS[level])(level, rng, letter := rng.choice("xyzntw"))):
        pass
    question, answer, lines, start = found
    return record("algebra", level, question, answer, lines, start.replace(letter, "x"), start=start, letter=letter)


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    return sample_family(generate, split, limit, seed, levels)


OPERATION = re.compile(r"(?:(expand|factor)|(add|subtract|divide by) (.{1,60})): (.{1,120}) = (.{1,120})")


def check_steps(problem, thought):
    """Each line names an operation and gives the equation it leads to, or rewrites the expression as an equal one."""
    letter, start = problem["letter"], problem["start"].removeprefix("k: ")
    solving = " = " in start
    sides = [parse(side) for side in start.split(" = ")]
    state = {"sides": sides, "last": "", "roots": None}

    def new_sides(name, amount, left, right):
        """The two sides after the named operation."""
        if name in ("expand", "factor"):
            return left, right
        part = parse(amount)
        if name == "divide by":
            return divide(left, part), divide(right, part)
        sign = 1 if name == "add" else -1
        return add(left, part, sign), add(right, part, sign)

    def step(line):
        try:
            if found := re.fullmatch(OPERATION, line):
                if not solving:
                    return found[1] or found[2], "there is no equation to work on"
                wanted = new_sides(found[1] or found[2], found[3], *state["sides"])
                given = [parse(found[4]), parse(found[5])]
                if given != list(wanted):
                    return found[1] or found[2], f"it gives {show(wanted[0])} = {show(wanted[1])}"
                state.update(sides=given, last=found[4])
                return found[1] or found[2], None
            if found := re.fullmatch(rf"so {letter} = (-?\d{{1,6}}) or {letter} = (-?\d{{1,6}})", line):
                factors = re.fullmatch(r"(\([^()]+\))(\([^()]+\))", state["last"])
                if not factors or state["sides"][1]:
                    return "so", "the product of two factors has to be zero first"
                roots = [-parse(f).get("", Fraction(0)) / parse(f)[letter] for f in factors.groups()]
                if sorted(roots) != sorted((Fraction(found[1]), Fraction(found[2]))):
                    return "so", f"the factors are zero at {roots[0]} and {roots[1]}"
                state["roots"] = roots
                return "so", None
            if line.startswith("= ") and not solving:
                if parse(line[2:250]) != sides[0]:
                    return "rewrite", f"this is not equal to {start}"
                state["last"] = line[2:]
                return "rewrite", None
        except (ValueError, KeyError) as error:
            return None, f"cannot be read ({error})"
        return None, "not a step of this kind"

    def conclusion():
        if state["roots"]:
            return str(max(state["roots"]))
        if not solving:
            done = state["last"] == show(sides[0])
            return None if not done else str(sides[0][letter]) if problem["start"].startswith("k: ") else state["last"]
        left, right = state["sides"]
        return show(right) if left == {letter: 1} and number(right) is not None else None

    return first_wrong(thought, step, conclusion)


def spoil(line, rng):
    """One number of the line changed, sometimes to its negative."""
    places = [found for found in re.finditer(r"(?<!\^)\d+", line)]
    if not places:
        return None
    place = rng.choice(places)
    value = int(place[0]) + rng.choice([1, 2, 10] + [-1] * (int(place[0]) > 2))
    return line[:place.start()] + str(value) + line[place.end():]


def plant_error(problem, rng):
    return plant(problem, rng, lambda line: spoil(line, rng))


def plant_slip(problem, rng):
    return slip(problem, rng, lambda line: spoil(line, rng))
