"""Debugging: a small program with one wrong line and a test that it fails; find the line, explain, repair it.

Thirty programs in five levels (straight lines, branches, counting loops, loops over lists, while and nested loops),
each with parameters, and every way to get one operator, number or name in it wrong. A thought steps through the failing
test as the program runs, then names the line and its repair; the checker steps through it as well. Any repair that
passes all tests counts.
"""

import ast
import functools
import re

from data.families import (ALL_LEVELS, first_wrong, plant_error as plant, plant_slip as slip, record, sample_family,
                           split_of)
from data.programs import check_source, run_tests, trace

# Level, kinds of the arguments, what the function returns; then the function. k and m are parameters of the problem.
# Kinds: n is a number, s a small one, b a larger one, l a list of numbers, t a list of three.
PROGRAMS = """
1 nn the price of n things at p each, with {k} for delivery
def cost(n, p):
    total = n * p
    total = total + {k}
    return total

1 nn the minutes in h hours and m minutes, less a break of {k}
def minutes(h, m):
    total = h * 60 + m
    total = total - {k}
    return total

1 nn the length of fence around a field a by b with {k} metres to spare
def fence(a, b):
    side = a + b
    return 2 * side + {k}

1 nn {k} more than the mean of a and b, rounded down
def middle(a, b):
    total = a + b
    return total // 2 + {k}

1 nn a groups of {k} and b groups of {m}, counted together
def people(a, b):
    first = a * {k}
    second = b * {m}
    return first + second

1 nn what is left when n things are shared out in boxes of {k} and {m} of the rest are eaten
def left(n, b):
    rest = n % {k}
    rest = rest + b
    return rest - {m}

2 nn the larger of a and b, plus {k}
def larger(a, b):
    best = a
    if b > best:
        best = b
    return best + {k}

2 nn how far a and b are apart, times {k}
def distance(a, b):
    gap = a - b
    if gap < 0:
        gap = b - a
    return gap * {k}

2 nn n, but at least {k} and at most {k} + {m}
def clamp(n, b):
    if n < {k}:
        return {k}
    if n > {k} + {m}:
        return {k} + {m}
    return n

2 nn the price p with {m} for delivery when it is below {k}
def pay(p, b):
    total = p + b
    if total < {k}:
        total = total + {m}
    return total

2 nn 1 when a * b is at least {k}, else a plus {m}
def passed(a, b):
    points = a * b
    if points >= {k}:
        return 1
    return a + {m}

2 nn the cost of n rides: {k} each, {m} less each from the tenth on
def rides(n, b):
    price = {k}
    if n >= 10:
        price = price - {m}
    return n * price + b

3 s {k} plus the sum of the numbers from 1 to n
def add_up(n):
    total = {k}
    for i in range(1, n + 1):
        total = total + i
    return total

3 s {k} times 2 to the power n, plus {m}
def grow(n):
    value = {k}
    for i in range(n):
        value = value * 2
    return value + {m}

3 s what {k} becomes when it loses {m} in each of n rounds
def sink(n):
    value = {k}
    for i in range(n):
        value = value - {m}
    return value

3 s the sum of the squares from {m} to n + {m}
def squares(n):
    total = 0
    for i in range({m}, n + {m} + 1):
        total = total + i * i
    return total

3 s {k} plus {m} times the sum of 0 to n - 1
def climb(n):
    total = {k}
    for i in range(n):
        total = total + {m} * i
    return total

3 s how many numbers below n times {m} leave no rest by {k}
def multiples(n):
    count = 0
    for i in range(1, n * {m}):
        if i % {k} == 0:
            count = count + 1
    return count

4 l the largest number in xs, plus {k}
def largest(xs):
    best = xs[0]
    for x in xs:
        if x > best:
            best = x
    return best + {k}

4 l how many numbers in xs are greater than {k}, times {m}
def count(xs):
    found = 0
    for x in xs:
        if x > {k}:
            found = found + 1
    return found * {m}

4 l the sum of the numbers in xs that are at most {k}, plus {m}
def low(xs):
    total = {m}
    for x in xs:
        if x <= {k}:
            total = total + x
    return total

4 l the smallest number in xs, but at most {k}
def least(xs):
    best = {k}
    for x in xs:
        if x < best:
            best = x
    return best

4 l {k} plus how often a number in xs is greater than the one before it
def rises(xs):
    count = {k}
    for i in range(1, len(xs)):
        if xs[i] > xs[i - 1]:
            count = count + 1
    return count

4 l the sum of the even numbers in xs, less {k}
def evens(xs):
    total = 0
    for x in xs:
        if x % 2 == 0:
            total = total + x
    return total - {k}

5 b the sum of the digits of n, plus {k}
def digits(n):
    total = {k}
    while n > 0:
        total = total + n % 10
        n = n // 10
    return total

5 nn the greatest common divisor of a and b, times {k}
def divisor(a, b):
    while b > 0:
        rest = a % b
        a = b
        b = rest
    return a * {k}

5 b how often n can be halved before it is less than {m}, plus {k}
def halvings(n):
    count = {k}
    while n >= {m}:
        n = n // 2
        count = count + 1
    return count

5 b the digits of n in reverse, plus {k}
def reverse(n):
    out = 0
    while n > 0:
        out = out * 10 + n % 10
        n = n // 10
    return out + {k}

5 t how many pairs in xs have a sum above {k}
def pairs(xs):
    count = 0
    for i in range(len(xs)):
        for j in range(i + 1, len(xs)):
            if xs[i] + xs[j] > {k}:
                count = count + 1
    return count

5 b the years until a debt of n is paid at {k} + {m} a year
def years(n):
    count = 0
    while n > 0:
        n = n - {k}
        n = n - {m}
        count = count + 1
    return count
"""
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
MAX_EVENTS, NUM_TESTS = 24, 10


@functools.cache
def programs_of(level):
    """[(kinds, purpose, source)] of one level."""
    blocks = [block.partition("\n") for block in PROGRAMS.strip().split("\n\n")]
    return [(*head.split(" ", 2)[1:], source) for head, _, source in blocks if head.startswith(f"{level} ")]


def draw_argument(kind, rng):
    if kind in "lt":
        return [rng.randint(1, 30) for _ in range(rng.randint(2, 4) if kind == "l" else 3)]
    return rng.randint(*{"n": (2, 30), "s": (1, 5), "b": (12, 99)}[kind])


def fill(text, k, m):
    """A program with its parameters put in: 1000000 stands for k, 2000000 for m, 1000001 for k + 1, and so on."""
    def value(found):
        base = round(int(found[0]), -6)
        return str(int(found[0]) - base + {1000000: k, 2000000: m}[base])

    return re.sub(r"\b\d{6,7}\b", value, text)


@functools.cache
def mutants(source):
    """(a program, all that come of it when one operator, number or name is replaced as one likes to get them wrong)."""
    tree = ast.parse(source.format(k=1000000, m=2000000))
    right, out = ast.unparse(tree), []
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"range", "len"})
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=old):
                field, others = "op", [SWAPS[type(old)]()]
            case ast.Compare(ops=[op] as old):
                field, others = "ops", [[SWAPS[type(op)]()]]
            case ast.Constant(value=old):
                field, others = "value", [old - 1, old + 1]
            case ast.Name(id=old, ctx=ast.Load()) if old in names:
                field, others = "id", [name for name in names if name != old]
            case _:
                continue
        for other in others:
            setattr(node, field, other)
            out.append(ast.unparse(tree))
        setattr(node, field, old)
    return right, out


def returned(source, arguments):
    """What a program returns, None when it goes wrong."""
    try:
        return trace(source, arguments)[1]
    except ValueError:
        return None


def draw_problem(level, rng, split):
    """(what it should do, right lines, wrong lines, tests, the failing one), or None when the bug does not show."""
    kinds, purpose, source = rng.choice(programs_of(level))
    k, m = rng.randint(2, 12), rng.randint(2, 9)
    right, wrongs = mutants(source)
    right, wrong = fill(right, k, m), fill(rng.choice(wrongs), k, m)
    if split and split_of(f"debugging {wrong}") != split:
        return None
    tests, failing = [], []
    for _ in range(NUM_TESTS):
        arguments = [draw_argument(kind, rng) for kind in kinds]
        got = returned(wrong, arguments)
        if got is None:
            return None
        tests.append([arguments, returned(right, arguments)])
        failing += tests[-1:] if got != tests[-1][1] else []
    if not failing or len(trace(wrong, failing[0][0])[0]) > MAX_EVENTS:
        return None
    return purpose.format(k=k, m=m), right.split("\n"), wrong.split("\n"), tests, failing[0]


def call(source, arguments):
    return f"{check_source(source).body[0].name}({', '.join(map(repr, arguments))})"


def generate(level, rng, split=None):
    """A problem; of one split, when it is given, or None."""
    while not (found := draw_problem(level, rng, split)):
        if split:
            return None
    purpose, right, wrong, tests, (arguments, wanted) = found
    number = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b)
    program = "\n".join(wrong)
    asked = call(program, arguments)
    numbered = "\n".join(f"{i} {line}" for i, line in enumerate(wrong, 1))
    text = (f"This function should return {purpose}. One line of it is wrong.\n{numbered}\n"
            f"{asked} should return {wanted!r}. Which line is wrong, and how should it read? "
            "Answer in the form: line NUMBER: CODE")
    repair = right[number].strip()
    lines = [f"line {at}: {what}" for at, what in trace(program, arguments)[0]]
    lines += [f"That is not {wanted!r}.", f"Line {number + 1} is wrong: {wrong[number].strip()} should be {repair}",
              f"Then {asked} returns {wanted!r}."]
    return record("debugging", level, text, f"line {number + 1}: {repair}", lines, program,
                  program=program, tests=tests, arguments=arguments, wanted=wanted)


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    def generate_in_split(level, rng):
        return generate(level, rng, split)

    return sample_family(generate_in_split, split, limit, seed, levels)


def patch(program, number, code):
    """The program with one line replaced, at the old line's depth. Raises ValueError for a line that is not there."""
    lines = program.split("\n")
    if not 1 <= number <= len(lines):
        raise ValueError(f"there is no line {number}")
    old = lines[number - 1]
    lines[number - 1] = old[:len(old) - len(old.lstrip())] + code.strip()
    return "\n".join(lines)


def check_outcome(problem, answer):
    """Whether the program with the line that the answer names replaced passes its tests, in a process of its own."""
    found = re.fullmatch(r"line (\d{1,3}): ?(.{1,200})", answer.strip())
    try:
        return bool(found) and run_tests(patch(problem["program"], int(found[1]), found[2]), problem["tests"])
    except ValueError:
        return False


def check_steps(problem, thought):
    """The run of the failing test event by event, then the repair, which has to pass every test."""
    program, wanted = problem["program"], problem["wanted"]
    asked = call(program, problem["arguments"])
    expected = [f"line {at}: {what}" for at, what in trace(program, problem["arguments"])[0]]
    expected.append(f"That is not {wanted!r}.")
    state = {"at": 0, "repair": None, "shown": False}

    def step(line):
        at = state["at"]
        if at < len(expected):
            if line != expected[at]:
                return f"event {at}", f"the next event is {expected[at]!r}"
            state["at"] += 1
            return f"event {at}", None
        if line == f"Then {asked} returns {wanted!r}.":
            state["shown"] = state["repair"] is not None
            return "result", None if state["shown"] else "nothing is repaired yet"
        found = re.fullmatch(r"Line (\d{1,3}) is wrong: (.{1,100}) should be (.{1,100})", line)
        if found and state["repair"] is None:
            try:
                repaired = patch(program, int(found[1]), found[3])
                if program.split("\n")[int(found[1]) - 1].strip() != found[2]:
                    return "repair", f"line {found[1]} reads otherwise"
                if any(returned(repaired, arguments) != value for arguments, value in problem["tests"]):
                    return "repair", "the repaired program fails a test"
            except ValueError as error:
                return "repair", str(error)
            state["repair"] = f"line {found[1]}: {found[3]}"
            return "repair", None
        subject = "result" if line.startswith("Then ") else "repair" if found else None
        return subject, "not a right step of this problem"

    return first_wrong(thought, step, lambda: state["repair"] if state["shown"] else None)


def spoil(line, rng):
    """A wrong value, condition or line number."""
    if line.endswith((" is True", " is False")):
        return line.replace("True", "F").replace("False", "True").replace(" is F", " is False")
    places = list(re.finditer(r"\d+", line))
    place = places[0] if line.startswith("Line") else places[-1]
    value = int(place[0]) + rng.choice([1, 2] + [-1] * (int(place[0]) > 1))
    return line[:place.start()] + str(value) + line[place.end():]


def plant_error(problem, rng):
    return plant(problem, rng, lambda line: spoil(line, rng))


def plant_slip(problem, rng):
    return slip(problem, rng, lambda line: spoil(line, rng))
