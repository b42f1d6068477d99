"""Debugging: a small program with one wrong line and a test that it fails; find and repair it.

Thirty programs (debugging.txt) in five levels: straight lines, branches, counting loops, loops over
lists, while and nested loops. Each has parameters, and can go wrong in one operator, number or
name. A thought steps through the failing test as the program runs, then names the line and its
repair; the checker steps through it as well. Any repair that passes all tests counts.
"""

import ast
import re
from functools import cache, partial
from pathlib import Path

from data import families
from data.families import first_wrong, record, replace_match, sample_family, split_of
from data.programs import parse_function, run_tests, trace

# The likely mistakes.
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}
MAX_EVENTS = 24
NUM_TESTS = 10

# ---- problems


@cache
def programs_of(level):
    """[(kinds, purpose, source)] of one level."""
    text = Path(__file__).with_name("debugging.txt").read_text(encoding="utf-8")
    found = re.findall(rf"^{level} (\w+) (.*)\n(def (?:.+\n)+)", text, re.MULTILINE)
    return [(kinds, purpose, source.strip()) for kinds, purpose, source in found]


def draw_argument(kind, rng):
    if kind in "lt":
        return [rng.randint(1, 30) for _ in range(rng.randint(2, 4) if kind == "l" else 3)]
    return rng.randint(*{"n": (2, 30), "s": (1, 5), "b": (12, 99)}[kind])


# Parameters stand in a program as numbers that nothing else is near: 1000001 is k + 1.
K, M = 1000000, 2000000


def fill(text, k, m):
    def value(found):
        n = int(found[0])
        return str(n - K + k if n < (K + M) / 2 else n - M + m)

    return re.sub(r"\b\d{6,7}\b", value, text)


@cache
def mutants(source):
    """(a program, every version of it with one operator, number or name replaced)."""
    tree = ast.parse(source.format(k=K, m=M))
    right = ast.unparse(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = sorted(names - {"range", "len"})
    wrongs = []
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
            wrongs.append(ast.unparse(tree))
        setattr(node, field, old)
    return right, wrongs


def draw_problem(level, rng, split):
    """(what it should do, right lines, wrong lines, tests, a failing one, events of that one).

    None when the bug does not show in the tests, or the problem falls into another split.
    """
    kinds, purpose, source = rng.choice(programs_of(level))
    k, m = rng.randint(2, 12), rng.randint(2, 9)
    right, wrongs = mutants(source)
    right = fill(right, k, m)
    wrong = fill(rng.choice(wrongs), k, m)
    if split and split_of(f"debugging {wrong}") != split:
        return None
    tests = []
    failing = None
    for _ in range(NUM_TESTS):
        arguments = [draw_argument(kind, rng) for kind in kinds]
        try:
            events, got = trace(wrong, arguments)
        except ValueError:
            return None
        if got is None:
            return None
        tests.append([arguments, trace(right, arguments)[1]])
        if not failing and got != tests[-1][1]:
            failing = tests[-1], events
    if not failing or len(failing[1]) > MAX_EVENTS:
        return None
    return purpose.format(k=k, m=m), right.split("\n"), wrong.split("\n"), tests, *failing


def call(source, arguments):
    return f"{parse_function(source).name}({', '.join(map(repr, arguments))})"


def generate(level, rng, split=None):
    found = None
    while not found:
        found = draw_problem(level, rng, split)
        if split and not found:
            return None
    purpose, right, wrong, tests, (arguments, wanted), events = found
    number = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b)
    repair = right[number].strip()
    program = "\n".join(wrong)
    asked = call(program, arguments)
    numbered = "\n".join(f"{i} {line}" for i, line in enumerate(wrong, 1))
    text = (
        f"This function should return {purpose}. One line of it is wrong.\n{numbered}\n"
        f"{asked} should return {wanted!r}. Which line is wrong, and how should it read? "
        "Answer in the form: line NUMBER: CODE"
    )
    lines = [
        *(f"line {at}: {what}" for at, what in events),
        f"That is not {wanted!r}.",
        f"Line {number + 1} is wrong: {wrong[number].strip()} should be {repair}",
        f"Then {asked} returns {wanted!r}.",
    ]
    return record("debugging", level, text, f"line {number + 1}: {repair}", lines, program, split,
                  program=program, tests=tests, arguments=arguments, wanted=wanted)


# ---- answers and thoughts


def patch(program, number, code):
    """The program with one line replaced at its depth. Raises ValueError without such a line."""
    lines = program.split("\n")
    if not 1 <= number <= len(lines):
        raise ValueError(f"there is no line {number}")
    old = lines[number - 1]
    lines[number - 1] = old[:len(old) - len(old.lstrip())] + code.strip()
    return "\n".join(lines)


def check_outcome(problem, answer):
    """Whether the program passes its tests with the line that the answer names replaced."""
    found = re.fullmatch(r"line (\d{1,3}): ?(.{1,200})", answer.strip())
    try:
        repaired = patch(problem["program"], int(found[1]), found[2]) if found else ""
    except ValueError:
        return False
    return run_tests(repaired, problem["tests"])


def check_steps(problem, thought):
    """The failing test event by event, then the repair, which has to pass every test."""
    program = problem["program"]
    wanted = problem["wanted"]
    result = f"Then {call(program, problem['arguments'])} returns {wanted!r}."
    events = trace(program, problem["arguments"])[0]
    expected = [f"line {at}: {what}" for at, what in events] + [f"That is not {wanted!r}."]
    at = 0  # in `expected`
    repair = None
    shown = False

    def check_repair(number, old, new):
        nonlocal repair
        try:
            repaired = patch(program, int(number), new)
        except ValueError as error:
            return str(error)
        if program.split("\n")[int(number) - 1].strip() != old:
            return f"line {number} reads otherwise"
        if not run_tests(repaired, problem["tests"]):
            return "the repaired program fails a test"
        repair = f"line {number}: {new}"
        return None

    def step(line):
        nonlocal at, shown
        if at < len(expected):
            if line != expected[at]:
                return f"event {at}", f"the next event is {expected[at]!r}"
            at += 1
            return f"event {at - 1}", None
        if line == result:
            shown = repair is not None
            return "result", None if shown else "nothing is repaired yet"
        found = re.fullmatch(r"Line (\d{1,3}) is wrong: (.{1,100}) should be (.{1,100})", line)
        if found and repair is None:
            return "repair", check_repair(*found.groups())
        subject = "result" if line.startswith("Then ") else "repair" if found else None
        return subject, "not a right step of this problem"

    def conclusion():
        return repair if shown else None

    return first_wrong(thought, step, conclusion)


def spoil(line, rng):
    """A wrong value, condition or line number."""
    if line.endswith(" is True"):
        return line.replace("True", "False")
    if line.endswith(" is False"):
        return line.replace("False", "True")
    places = list(re.finditer(r"\d+", line))
    place = places[0] if line.startswith("Line") else places[-1]
    value = int(place[0])
    return replace_match(line, place, value + rng.choice([1, 2] + [-1] * (value > 1)))


problems = partial(sample_family, generate)
plant_error = partial(families.plant_error, spoil)
plant_slip = partial(families.plant_slip, spoil)
