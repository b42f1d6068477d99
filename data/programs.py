"""Small Python programs of unknown origin: read, stepped through, run against unit tests.

`check_source` admits a small part of the language: one function, arithmetic, lists, if, while, for; no imports, no
attributes, no names with two underscores, calls to a handful of builtins only. `trace` interprets that part itself,
with a limit on steps and sizes, and runs nothing. `run_tests` runs it in a separate process (python -I -S) in its own
session, with limits on CPU time, memory, file size, processes and open files, so that it can open neither a file nor a
socket, and kills it when the wall-clock time is over.

What this does not promise: it is no virtual machine. A hole in the first wall would meet the limits of a process only:
they do not hide the memory of the interpreter, and the one on processes does not bind root. For programs of people who
mean harm, use a container as well.
"""

import ast
import functools
import json
import operator
import os
import signal
import subprocess
import sys

MAX_CHARS, MAX_STEPS, MAX_SIZE = 4000, 400, 10**12
CALLS = {"len": len, "abs": abs, "min": min, "max": max, "sum": sum, "range": range, "int": int}
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
          ast.Mod: operator.mod}
COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
           ast.GtE: operator.ge}
ALLOWED = (ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AugAssign, ast.If, ast.While, ast.For,
           ast.Return, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.List,
           ast.Subscript, ast.Load, ast.Store, ast.USub, ast.Not, ast.And, ast.Or, *BINARY, *COMPARE)


@functools.lru_cache(256)
def check_source(source):
    """The syntax tree of a program in the small part of Python that is admitted. Raises ValueError for any other."""
    if len(source) > MAX_CHARS:
        raise ValueError(f"longer than {MAX_CHARS} characters")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a program: {error}") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise ValueError("not a single function")
    for node in ast.walk(tree):
        if not isinstance(node, ALLOWED):
            raise ValueError(f"{type(node).__name__} is not admitted")
        if isinstance(node, ast.Name) and node.id.startswith("__") or isinstance(node, ast.FunctionDef) and (
                node.decorator_list or node is not tree.body[0]):
            raise ValueError("names with two underscores, decorators and inner functions are not admitted")
        if isinstance(node, ast.Call) and (
                not isinstance(node.func, ast.Name) or node.func.id not in CALLS or node.keywords):
            raise ValueError(f"only {', '.join(CALLS)} may be called")
        if isinstance(node, ast.Constant) and not (isinstance(node.value, (int, str)) and len(repr(node.value)) < 40):
            raise ValueError("only whole numbers and short texts are admitted")
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.For)) and not isinstance(
                node.targets[0] if isinstance(node, ast.Assign) else node.target, ast.Name):
            raise ValueError("only a name may be assigned to")
    return tree


# ---------------------------------------------------------------------------------------------- stepping through


class Return(Exception):
    pass


def trace(source, arguments, max_steps=MAX_STEPS):
    """(events, the value returned or None): events are (line number, what happens there), such as (3, "x = 5").

    Raises ValueError for a program that is not admitted, goes wrong, grows too large, or takes too many steps.
    """
    function = check_source(source).body[0]
    names = [arg.arg for arg in function.args.args]
    if len(names) != len(arguments):
        raise ValueError(f"takes {len(names)} arguments, got {len(arguments)}")
    state, events, texts = dict(zip(names, arguments)), [], {}

    def small(value):
        size = len(value) * 10**9 if isinstance(value, (list, str, range)) else abs(value)
        if size > MAX_SIZE:
            raise ValueError("a value grows too large")
        return value

    def note(line, text):
        events.append((line, text))
        if len(events) > max_steps:
            raise ValueError(f"more than {max_steps} steps")

    def value(node):
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return state[node.id]
            case ast.List():
                return [value(item) for item in node.elts]
            case ast.BinOp():
                left, right = value(node.left), value(node.right)
                if isinstance(node.op, ast.Mult) and not (isinstance(left, int) and isinstance(right, int)):
                    raise ValueError("only numbers are multiplied")
                return small(BINARY[type(node.op)](left, right))
            case ast.UnaryOp():
                return not value(node.operand) if isinstance(node.op, ast.Not) else -value(node.operand)
            case ast.BoolOp(op=ast.And()):
                return all(value(item) for item in node.values)
            case ast.BoolOp():
                return any(value(item) for item in node.values)
            case ast.Compare(ops=[op]):
                return COMPARE[type(op)](value(node.left), value(node.comparators[0]))
            case ast.Subscript():
                return value(node.value)[value(node.slice)]
            case ast.Call():
                return small(CALLS[node.func.id](*[value(arg) for arg in node.args]))
        raise ValueError(f"{type(node).__name__} is not interpreted")

    def store(node, name, result):
        state[name] = result
        note(node.lineno, f"{name} = {result!r}")

    def holds(node):
        result = bool(value(node.test))
        texts[node] = texts.get(node) or ast.unparse(node.test)
        note(node.lineno, f"{texts[node]} is {result}")
        return result

    def run(body):
        for node in body:
            match node:
                case ast.Assign(targets=[ast.Name(name)]):
                    store(node, name, value(node.value))
                case ast.AugAssign():
                    store(node, node.target.id, value(ast.BinOp(node.target, node.op, node.value)))
                case ast.If():
                    run(node.body if holds(node) else node.orelse)
                case ast.While(orelse=[]):
                    while holds(node):
                        run(node.body)
                case ast.For(orelse=[]):
                    for item in value(node.iter):
                        store(node, node.target.id, item)
                        run(node.body)
                case ast.Return(value=ast.expr()):
                    raise Return(node.lineno, value(node.value))
                case _:
                    raise ValueError(f"{type(node).__name__} is not interpreted")

    try:
        run(function.body)
        return events, None
    except Return as done:
        note(done.args[0], f"returns {done.args[1]!r}")
        return events, done.args[1]
    except (ArithmeticError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


# ---------------------------------------------------------------------------------------------- running

RUNNER = """
import json, resource, sys
job = json.load(sys.stdin)
limits = {"CPU": job["cpu_s"], "AS": job["memory"], "FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": 3}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
space = {"__builtins__": {name: getattr(__builtins__, name) for name in job["calls"]}}
exec(compile(job["source"], "program", "exec"), space)
sys.exit(any(repr(space[job["name"]](*arguments)) != repr(wanted) for arguments, wanted in job["tests"]))
"""


def run_limited(source, name, tests, cpu_s=1, wall_s=5, memory_mib=256):
    """Whether a function returns what it should, in a process of its own with limits (Unix only).

    The source is run as it is: check it first.
    """
    job = {"source": source, "name": name, "tests": tests, "calls": list(CALLS), "cpu_s": cpu_s,
           "memory": memory_mib << 20}
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", RUNNER], stdin=subprocess.PIPE, env={}, cwd="/",
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.communicate(json.dumps(job).encode(), timeout=wall_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode == 0


def run_tests(source, tests):
    """Whether a program of unknown origin passes every test [arguments, wanted value]. Never raises."""
    try:
        name = check_source(source).body[0].name
    except ValueError:
        return False
    return run_limited(source, name, tests)
