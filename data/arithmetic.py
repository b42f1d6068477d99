"""Compositional arithmetic: `(3+8)*2-7`, one to five operations (the level), values from 0 to 99.

A worked solution rewrites the expression one operation a line. Each step is small, all of them must
be right, and the answer can hardly be guessed or seen at once: what a model gains by thinking shows
within minutes, on a laptop.

An expression is a tree: an int, or (operation, left, right).
"""

import operator
import re
from functools import partial

from data.families import OFFSETS, sample_family, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
VALUES = range(100)

# ---- expressions


def evaluate(tree):
    if isinstance(tree, int):
        return tree
    op, left, right = tree
    return OPERATIONS[op](evaluate(left), evaluate(right))


def random_tree(operations, rng):
    """An expression with all values in VALUES and a digit on one side of each operation."""
    if operations == 0:
        return rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, 60)
    while True:
        op = rng.choices("+-*", (4, 4, 3))[0]
        on_left = rng.randint(0, operations - 1)
        left = random_tree(on_left, rng)
        right = random_tree(operations - 1 - on_left, rng)
        smaller = min(evaluate(left), evaluate(right))
        fits = smaller <= 9 and evaluate((op, left, right)) in VALUES
        if fits and (op != "*" or smaller > 1):
            return op, left, right


def in_range(tree):
    """Whether every value on the way is one that a problem may have."""
    if evaluate(tree) not in VALUES:
        return False
    return isinstance(tree, int) or in_range(tree[1]) and in_range(tree[2])


def render(tree):
    """The expression with no more brackets than precedence asks for."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    inner_left = "" if isinstance(left, int) else left[0]
    inner_right = "" if isinstance(right, int) else right[0]
    left, right = render(left), render(right)
    if op == "*" and inner_left in ("+", "-"):
        left = f"({left})"
    if inner_right in ("+", "-") or op == "*" and inner_right:
        right = f"({right})"
    return left + op + right


def canonical(tree):
    """One spelling for all expressions that differ in the order of sums and products."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    parts = [canonical(left), canonical(right)]
    return "(" + op.join(sorted(parts) if op in "+*" else parts) + ")"


def read(tokens, level=0):
    """Takes a sum (level 0), a product (1) or an operand (2) from the front of a list of tokens."""
    if level < 2:
        tree = read(tokens, level + 1)
        while tokens and tokens[0] in ("+-", "*")[level]:
            tree = (tokens.pop(0), tree, read(tokens, level + 1))
        return tree
    token = tokens.pop(0) if tokens else ""
    if token == "(":
        tree = read(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return tree
    if not token.isdigit() or len(token) > 4:
        raise ValueError(f"{token!r:.20} is no number")
    return int(token)


def parse(text):
    """The tree of an expression as `render` writes it. Raises ValueError for any other text."""
    tokens = re.findall(r"\d+|[-+*()]", text)
    if "".join(tokens) != text or len(tokens) > 64:
        raise ValueError(f"not an expression: {text!r:.60}")
    tree = read(tokens)
    if tokens:
        raise ValueError(f"{tokens[0]!r:.20} is left over")
    return tree


# ---- solutions


def reduce_once(tree, value=None):
    """(tree, op, a, b) after the leftmost operation on two numbers; `value`: a result to put in."""
    op, left, right = tree
    if isinstance(left, int) and isinstance(right, int):
        return OPERATIONS[op](left, right) if value is None else value, op, left, right
    if not isinstance(left, int):
        left, *step = reduce_once(left, value)
    else:
        right, *step = reduce_once(right, value)
    return (op, left, right), *step


def work_out(tree):
    """The trees from the expression down to its value, one operation apart."""
    trees = [tree]
    while not isinstance(trees[-1], int):
        trees.append(reduce_once(trees[-1])[0])
    return trees


def write_thought(trees):
    return "\n=".join(map(render, trees))


def generate(level, rng, split=None):
    tree = random_tree(level, rng)
    key = f"arithmetic {canonical(tree)}"
    if split and split_of(key) != split:
        return None
    text = render(tree)
    return {
        "id": f"arithmetic/{text}", "problem": text, "answer": str(evaluate(tree)), "level": level,
        "subject": "arithmetic", "solution": write_thought(work_out(tree)), "key": key,
    }


problems = partial(sample_family, generate)


# ---- thoughts


def check_steps(problem, thought):
    """The first line that is not a right step, (index, line, reason), or None.

    The first line is the problem; each other one carries out the next operation, or several at
    once. A wrong line is forgiven when the next one takes it back, "wait =...", and is right.
    """
    left = work_out(parse(problem["problem"]))
    first, *lines = thought.split("\n")
    if first != problem["problem"]:
        return 0, first, "the thought does not begin with the problem"
    slip = None  # the line before, when it is wrong
    for index, line in enumerate(lines, 1):
        claim = line.removeprefix("wait ")
        takes_back = claim != line
        try:
            tree = parse(claim.removeprefix("="))
            follows = claim.startswith("=") and tree in left[1:]
            reason = None if follows else "does not follow from the line before"
        except ValueError as error:
            reason = str(error)
        if slip and (reason or not takes_back):
            return slip
        if takes_back and not slip:
            return index, line, "takes back a line that was right"
        slip = (index, line, reason) if reason else None
        if not reason:
            left = left[left.index(tree, 1):]
    if not slip and len(left) > 1:
        return len(lines) + 1, "", "the thought does not end in the answer"
    return slip


def slip(tree, rng):
    """The tree after its next operation, with a wrong result; None when none is in range."""
    right = reduce_once(tree)
    value = OPERATIONS[right[1]](*right[2:])
    slips = [reduce_once(tree, value + offset)[0] for offset in OFFSETS]
    return rng.choice([wrong for wrong in slips if in_range(wrong)] or [None])


def draw_slip(trees, rng):
    """(index, wrong tree in its place) of one of the trees behind the first, or None."""
    slips = [(index, slip(before, rng)) for index, before in enumerate(trees[:-1], 1)]
    slips = [(index, wrong) for index, wrong in slips if wrong is not None]
    return rng.choice(slips) if slips else None


def plant_error(problem, rng):
    """The solution with one line wrong, the others and so the answer right."""
    trees = work_out(parse(problem["problem"]))
    found = draw_slip(trees[:-1], rng)
    if not found:  # the answer is the only step: it is taken back without reason and said again
        return write_thought(trees) + "\nwait =" + render(trees[-1])
    index, wrong = found
    return write_thought(trees[:index] + [wrong] + trees[index + 1:])


def plant_slip(problem, rng):
    """The solution with a wrong line that the next one takes back, where some slip fits."""
    trees = work_out(parse(problem["problem"]))
    found = draw_slip(trees, rng)
    if not found:
        return write_thought(trees)
    index, wrong = found
    return write_thought(trees[:index] + [wrong]) + "\nwait =" + write_thought(trees[index:])
