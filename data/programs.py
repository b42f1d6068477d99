"""Small Python programs of unknown origin: stepped through, and tried against unit tests.

Nothing is ever executed, so there is nothing to be locked in: no process, no file, no name of
Python's beyond CALLS can be reached. `trace` interprets a small part of the language itself (one
function of whole numbers and lists of them, if, while, for), and whatever it does not know, an
attribute or an import say, is an error. What holds on every system: at most MAX_CHARS of source,
MAX_STEPS steps and MAX_ITEMS in a range, and no operation is given a number beyond MAX_NUMBER or
can do worse with it than square it.
"""

import ast
import operator
import warnings
from functools import lru_cache

MAX_CHARS = 4000
MAX_STEPS = 400
MAX_NUMBER = 10**12
MAX_ITEMS = 1000
CALLS = {"len": len, "abs": abs, "min": min, "max": max, "sum": sum, "range": range}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.USub: operator.neg, ast.Not: operator.not_,
}


class Return(Exception):
    """The return statement of an interpreted function: (its node, the value)."""


@lru_cache(256)
def parse_function(source):
    """The syntax tree of a program that is a single function. Raises ValueError for any other."""
    if len(source) > MAX_CHARS:
        raise ValueError(f"longer than {MAX_CHARS} characters")
    try:
        with warnings.catch_warnings():  # Python's remarks on a strange escape
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a program: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].decorator_list:
        raise ValueError("not a single function")
    return body[0]


def small(value):
    too_long = isinstance(value, range) and len(value) > MAX_ITEMS
    if too_long or isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError("a value grows too large")
    return value


def evaluate(node, state):
    """The value of an expression; state: {name: value}."""
    match node:
        case ast.Constant(value=int()):
            return small(node.value)
        case ast.Name():
            return state[node.id]
        case ast.BinOp():
            pair = [evaluate(node.left, state), evaluate(node.right, state)]
            if not all(isinstance(value, int) for value in pair):  # lists would grow
                raise ValueError("only numbers are calculated with")
            return small(OPERATORS[type(node.op)](*pair))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](evaluate(node.operand, state))
        case ast.BoolOp():
            for item in node.values:
                result = evaluate(item, state)
                if bool(result) == isinstance(node.op, ast.Or):
                    break
            return result
        case ast.Compare():
            left = evaluate(node.left, state)
            for op, item in zip(node.ops, node.comparators):
                right = evaluate(item, state)
                if not OPERATORS[type(op)](left, right):
                    return False
                left = right
            return True
        case ast.Subscript():
            return evaluate(node.value, state)[evaluate(node.slice, state)]
        case ast.Call(func=ast.Name(name), keywords=[]) if name in CALLS:
            return small(CALLS[name](*[evaluate(item, state) for item in node.args]))
    raise ValueError(f"{type(node).__name__} is not interpreted")


def trace(source, arguments):
    """(events, the value returned or None): events are (line number, what happens), (3, "x = 5").

    Raises ValueError for a program that cannot be interpreted, fails, grows too large or takes
    more than MAX_STEPS steps.
    """
    function = parse_function(source)
    names = [arg.arg for arg in function.args.args]
    if len(names) != len(arguments):
        raise ValueError(f"takes {len(names)} arguments, got {len(arguments)}")
    state = dict(zip(names, arguments))
    events = []

    def note(node, text):
        events.append((node.lineno, text))
        if len(events) > MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} steps")

    def store(node, name, value):
        state[name] = value
        note(node, f"{name} = {value!r}")

    def holds(node):
        result = bool(evaluate(node.test, state))
        note(node, f"{ast.unparse(node.test)} is {result}")
        return result

    def run(body):
        for node in body:
            match node:
                case ast.Assign(targets=[ast.Name(name)]):
                    store(node, name, evaluate(node.value, state))
                case ast.AugAssign(target=ast.Name(name)):
                    changed = ast.BinOp(node.target, node.op, node.value)
                    store(node, name, evaluate(changed, state))
                case ast.If():
                    run(node.body if holds(node) else node.orelse)
                case ast.While(orelse=[]):
                    while holds(node):
                        run(node.body)
                case ast.For(target=ast.Name(name), orelse=[]):
                    for item in evaluate(node.iter, state):
                        store(node, name, item)
                        run(node.body)
                case ast.Return(value=ast.expr()):
                    raise Return(node, evaluate(node.value, state))
                case _:
                    raise ValueError(f"{type(node).__name__} is not interpreted")

    try:
        run(function.body)
        return events, None
    except Return as done:
        node, value = done.args
        note(node, f"returns {value!r}")
        return events, value
    except (ArithmeticError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def run_tests(source, tests):
    """Whether a program passes every test [arguments, wanted value]. Never raises."""
    try:
        return all(repr(trace(source, given)[1]) == repr(wanted) for given, wanted in tests)
    except ValueError:
        return False
