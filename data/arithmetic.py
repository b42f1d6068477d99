"""Compositional arithmetic: `(3+8)*2-7`, one to five operations (the level), values from 0 to 99.

A worked solution rewrites the expression one operation per line. Each step is easy, but all must be
right and the answer is hard to guess, so a few minutes on a laptop show the benefit of thinking.

An expression is a tree: an int, or (operation, left, right).
"""

import ast
import operator
import re

from data.families import OFFSETS, answer_line, first_error, split_of

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
VALUES = range(100)
REPAIRS = ("wait ",)

# ---- expressions


def evaluate(tree):
    if isinstance(tree, int):
        return tree
    op, left, right = tree
    return OPERATIONS[op](evaluate(left), evaluate(right))


def random_tree(operations, rng):
    """An expression with every value in VALUES and one operand of each operation at most 9."""
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
    """Whether the value of every subexpression is in VALUES."""
    if evaluate(tree) not in VALUES:
        return False
    return isinstance(tree, int) or in_range(tree[1]) and in_range(tree[2])


def render(tree):
    """The expression as text, with the fewest brackets that precedence allows."""
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
    """A canonical form that ignores the order of operands in sums and products."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    parts = [canonical(left), canonical(right)]
    return "(" + op.join(sorted(parts) if op in "+*" else parts) + ")"


def parse(text):
    """The tree of a rendered expression. Raises ValueError for any other text."""
    def tree_of(node):
        match node:
            case ast.Constant(value):
                return value
            case ast.BinOp() if type(node.op) in SIGNS:
                return SIGNS[type(node.op)], tree_of(node.left), tree_of(node.right)
        raise ValueError(f"not an expression: {text!r:.60}")

    try:
        expression = ast.parse(re.fullmatch(r"[-+*()\d]{1,100}", text, re.ASCII)[0], mode="eval")
    except (TypeError, SyntaxError):
        raise ValueError(f"not an expression: {text!r:.60}") from None
    return tree_of(expression.body)


# ---- solutions


def reduce_once(tree, offset=0):
    """The tree after its leftmost operation on two numbers; `offset` is added to the result."""
    op, left, right = tree
    if not isinstance(left, int):
        return op, reduce_once(left, offset), right
    if not isinstance(right, int):
        return op, left, reduce_once(right, offset)
    return OPERATIONS[op](left, right) + offset


def work_out(tree):
    """The trees from the expression to its value, one operation at a time."""
    trees = [tree]
    while not isinstance(trees[-1], int):
        trees.append(reduce_once(trees[-1]))
    return trees


def generate(level, rng, split):
    tree = random_tree(level, rng)
    key = f"arithmetic {canonical(tree)}"
    if split_of(key) != split:
        return None
    text = render(tree)
    return {
        "id": f"arithmetic/{text}", "problem": text, "answer": str(evaluate(tree)), "level": level,
        "subject": "arithmetic", "solution": "\n=".join(map(render, work_out(tree))), "key": key,
    }


# ---- thoughts


def check_steps(problem, thought):
    """The first line restates the problem; each later line does the next one or more operations."""
    trees = None  # the current tree and those after it

    def check_line(line):
        nonlocal trees
        if trees is None:
            trees = work_out(parse(problem["problem"]))
            if line != problem["problem"]:
                return None, "the thought does not start with the problem"
            return "problem", None
        try:
            tree = parse(line.removeprefix("="))
        except ValueError as error:
            return "step", str(error)
        if not line.startswith("=") or tree not in trees[1:]:
            return "step", "does not follow from the previous line"
        trees = trees[trees.index(tree, 1):]
        return "step", None

    def conclusion():
        return trees[0] if trees and len(trees) == 1 else None

    return first_error(f"{thought}\n{answer_line(problem['answer'])}", check_line, conclusion,
                       REPAIRS)


def slip(tree, rng):
    """The tree after its next operation, with a wrong result in range, or None."""
    slips = [reduce_once(tree, offset) for offset in OFFSETS]
    return rng.choice([wrong for wrong in slips if in_range(wrong)] or [None])


def corrupt(line, previous, rng):
    """The operation with a wrong result."""
    wrong = None if previous is None else slip(parse(previous.removeprefix("=")), rng)
    return None if wrong is None else "=" + render(wrong)
