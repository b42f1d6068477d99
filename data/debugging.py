"""Debugging: a small program with one wrong line and a failing test; find and repair the line.

Thirty programs (debugging.txt) in five levels: straight-line code, branches, counting loops, loops
over lists, and while or nested loops. Each has parameters and gets one wrong operator, number or
name. A thought traces the failing test, then names the line and its repair; the checker compares
the trace. Any repair that passes all tests is right.
"""

import ast
import re
from functools import cache
from pathlib import Path

from data.families import first_error, record, replace_match, split_of
from data.programs import parse_function, run_tests, trace

# The operator that replaces each operator in a wrong version.
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
    """[(argument kinds, purpose, source), ...] of one level."""
    text = Path(__file__).with_name("debugging.txt").read_text(encoding="utf-8")
    found = re.findall(rf"^{level} (\w+) (.*)\n(def (?:.+\n)+)", text, re.MULTILINE)
    return [(kinds, purpose, source.strip()) for kinds, purpose, source in found]


def draw_argument(kind, rng):
    if kind in "lt":
        length = rng.randint(2, 4) if kind == "l" else 3
        return [rng.randint(1, 30) for _ in range(length)]
    return rng.randint(*{"n": (2, 30), "s": (1, 5), "b": (12, 99)}[kind])


# Placeholders for the parameters k and m, far from any other number: 1000001 is k + 1.
K, M = 1000000, 2000000


def substitute(text, k, m):
    def value(found):
        n = int(found[0])
        return str(n - K + k if n < (K + M) / 2 else n - M + m)

    return re.sub(r"\b\d{6,7}\b", value, text)


@cache
def mutants(source):
    """(the program, its versions with one operator, number or name replaced)."""
    tree = ast.parse(source.format(k=K, m=M))
    right = ast.unparse(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = sorted(names - {"range", "len"})
    broken = []
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
            broken.append(ast.unparse(tree))
        setattr(node, field, old)
    return right, broken


def generate(level, rng, split):
    """A problem, or None if it is of another split or the tests do not expose the bug."""
    kinds, purpose, source = rng.choice(programs_of(level))
    k, m = rng.randint(2, 12), rng.randint(2, 9)
    right, broken = mutants(source)
    right = substitute(right, k, m)
    wrong = substitute(rng.choice(broken), k, m)
    if split_of(f"debugging {wrong}") != split:
        return None
    tests = []
    failing = None
    for _ in range(NUM_TESTS):
        arguments = [draw_argument(kind, rng) for kind in kinds]
        try:
            _, got = trace(wrong, arguments)
        except ValueError:
            return None
        if got is None:
            return None
        _, expected = trace(right, arguments)
        tests.append([arguments, expected])
        if not failing and got != expected:
            failing = tests[-1]
    if not failing:
        return None
    arguments, expected = failing
    events, _ = trace(wrong, arguments)
    if len(events) > MAX_EVENTS:
        return None

    call = f"{parse_function(wrong).name}({', '.join(map(repr, arguments))})"
    program = wrong.split("\n")
    repaired = right.split("\n")
    bug = next(i for i, line in enumerate(program) if line != repaired[i])
    new = repaired[bug].strip()
    text = "\n".join([
        f"This function should return {purpose.format(k=k, m=m)}. One line of it is wrong.",
        *(f"{i} {line}" for i, line in enumerate(program, 1)),
        f"{call} should return {expected!r}. Which line is wrong, and how should it read? "
        "Answer in the form: line NUMBER: CODE",
    ])
    lines = [
        *(f"line {number}: {event}" for number, event in events),
        f"That is not {expected!r}.",
        f"Line {bug + 1} is wrong: {program[bug].strip()} should be {new}",
        f"Then {call} returns {expected!r}.",
    ]
    return record("debugging", level, text, f"line {bug + 1}: {new}", lines, wrong, split,
                  program=wrong, tests=tests)


# ---- answers and thoughts


def patch(program, number, code):
    """The program with one line's code replaced, keeping its indentation."""
    lines = [re.match(" *", line)[0] + code.strip() if i == int(number) else line
             for i, line in enumerate(program.split("\n"), 1)]
    return "\n".join(lines)


def check_outcome(problem, answer):
    """Whether the program passes its tests after the repair that the answer names."""
    found = re.fullmatch(r"line (\d{1,3}): ?(.{1,200})", answer.strip())
    return bool(found) and run_tests(patch(problem["program"], *found.groups()), problem["tests"])


def check_steps(problem, thought):
    """The trace of the failing test, event by event, then a repair that passes every test."""
    program = problem["program"]
    *expected, _, result, _ = problem["solution"].split("\n")
    expected.reverse()  # the next event is last
    repair = None
    concluded = False

    def check_line(line):
        nonlocal repair, concluded
        if expected:
            subject = f"event {len(expected)}"
            if line != expected[-1]:
                return subject, f"the next event is {expected[-1]!r}"
            expected.pop()
            return subject, None
        if line == result:
            concluded = repair is not None
            return "result", None if concluded else "nothing has been repaired yet"
        found = re.fullmatch(r"Line (\d{1,3}) is wrong: (.{1,100}) should be (.{1,100})", line)
        if not found or repair:
            return "result" if line.startswith("Then ") else None, "not a valid step"
        number, old, new = found.groups()
        current = program.split("\n")[int(number) - 1:int(number)]  # [] if there is no such line
        if [line.strip() for line in current] != [old]:
            return "repair", f"line {number} is not {old!r}"
        if not run_tests(patch(program, number, new), problem["tests"]):
            return "repair", "the repaired program fails a test"
        repair = f"line {number}: {new}"
        return "repair", None

    return first_error(thought, check_line, lambda: repair if concluded else None)


def corrupt(line, previous, rng):
    """A wrong value, condition or line number."""
    if line.endswith(" is True"):
        return line.replace("True", "False")
    if line.endswith(" is False"):
        return line.replace("False", "True")
    places = list(re.finditer(r"\d+", line))
    place = places[0] if line.startswith("Line") else places[-1]
    value = int(place[0])
    return replace_match(line, place, value + rng.choice([1, 2] + [-1] * (value > 1)))
