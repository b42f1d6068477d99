"""An interpreter for small untrusted Python programs: traces them and runs unit tests.

Nothing is passed to Python for execution, so no sandbox is needed: a program can reach no process,
no file and no builtin except CALLS. `trace` interprets a small subset of the language (one function
of integers and lists of integers; if, while, for); anything else, such as an attribute or an
import, is an error. The source is limited to MAX_CHARS, a run to MAX_STEPS, a range to MAX_ITEMS,
and operands to MAX_NUMBER; no operation can do more than square them.
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
    """Raised by an interpreted return statement; args: (node, value)."""


@lru_cache(256)
def parse_function(source):
    """The syntax tree of a program that is a single function. Raises ValueError otherwise."""
    if len(source) > MAX_CHARS:
        raise ValueError(f"longer than {MAX_CHARS} characters")
    try:
        with warnings.catch_warnings():  # invalid escape sequences
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a program: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].decorator_list:
        raise ValueError("not a single function")
    return body[0]


def check_size(value):
    """The value itself. Raises ValueError if it is too large."""
    too_long = isinstance(value, range) and len(value) > MAX_ITEMS
    if too_long or isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError("a value is too large")
    return value


def evaluate(node, state):
    """The value of an expression; state: {name: value}."""
    match node:
        case ast.Constant(value=int()):
            return check_size(node.value)
        case ast.Name():
            return state[node.id]
        case ast.BinOp():
            pair = [evaluate(node.left, state), evaluate(node.right, state)]
            if not all(isinstance(value, int) for value in pair):  # lists could grow without limit
                raise ValueError("operands must be numbers")
            return check_size(OPERATORS[type(node.op)](*pair))
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
            return check_size(CALLS[name](*[evaluate(item, state) for item in node.args]))
    raise ValueError(f"{type(node).__name__} is not supported")


def trace(source, arguments):
    """(events, return value or None); events are (line number, description), as in (3, "x = 5").

    Raises ValueError if the program is unsupported, fails, or exceeds a limit.
    """
    function = parse_function(source)
    names = [arg.arg for arg in function.args.args]
    if len(names) != len(arguments):
        raise ValueError(f"takes {len(names)} arguments, got {len(arguments)}")
    state = dict(zip(names, arguments))
    events = []

    def add_event(node, text):
        events.append((node.lineno, text))
        if len(events) > MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} steps")

    def store(node, name, value):
        state[name] = value
        add_event(node, f"{name} = {value!r}")

    def holds(node):
        result = bool(evaluate(node.test, state))
        add_event(node, f"{ast.unparse(node.test)} is {result}")
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
                    raise ValueError(f"{type(node).__name__} is not supported")

    try:
        run(function.body)
        return events, None
    except Return as done:
        node, value = done.args
        add_event(node, f"returns {value!r}")
        return events, value
    except (ArithmeticError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def run_tests(source, tests):
    """Whether a program passes every test, [arguments, expected value]. Never raises."""
    try:
        return all(repr(trace(source, given)[1]) == repr(expected) for given, expected in tests)
    except ValueError:
        return False
