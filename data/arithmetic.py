"""Compositional arithmetic: `(3+8)*2-7`, one to five operations (that is the level), every value from 0 to 99.

A worked solution rewrites the expression one operation a line. So each step is small, all of them must be right, and
the answer can hardly be guessed or seen at once: what a model gains by thinking shows in minutes, on a laptop.
"""

import re

from data.families import ALL_LEVELS, sample_family

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LARGEST = 99


def random_tree(operations, rng):
    """An expression as nested (op, left, right) over ints: values in 0..99, one of each operation's two a digit."""
    if operations == 0:
        return rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, 60)
    while True:
        op = rng.choices("+-*", (4, 4, 3))[0]
        on_left = rng.randint(0, operations - 1)
        left, right = random_tree(on_left, rng), random_tree(operations - 1 - on_left, rng)
        a, b = evaluate(left), evaluate(right)
        if min(a, b) <= 9 and OPERATIONS[op](a, b) in range(LARGEST + 1) and (op != "*" or min(a, b) > 1):
            return op, left, right


def evaluate(tree):
    return tree if isinstance(tree, int) else OPERATIONS[tree[0]](evaluate(tree[1]), evaluate(tree[2]))


def in_range(tree):
    """Whether every value on the way is one that a problem may have."""
    return evaluate(tree) in range(LARGEST + 1) and (isinstance(tree, int) or in_range(tree[1]) and in_range(tree[2]))


def render(tree):
    """The expression with no more brackets than precedence asks for."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    loose_left = op == "*" and not isinstance(left, int) and left[0] != "*"
    loose_right = not isinstance(right, int) and (
        (op in "-*" or right[0] in "+-") and not (op == "-" and right[0] == "*"))
    left, right = render(left), render(right)
    return (f"({left})" if loose_left else left) + op + (f"({right})" if loose_right else right)


def reduce_once(tree, value=None):
    """The tree after its leftmost operation on two numbers: (tree, op, a, b). `value`: put in place of the result."""
    op, left, right = tree
    if isinstance(left, int) and isinstance(right, int):
        return (OPERATIONS[op](left, right) if value is None else value), op, left, right
    if not isinstance(left, int):
        left, *step = reduce_once(left, value)
    else:
        right, *step = reduce_once(right, value)
    return (op, left, right), *step


def canonical(tree):
    """One spelling for all that differ by the order of sums and products: the split into train and test goes by it."""
    if isinstance(tree, int):
        return str(tree)
    parts = [canonical(tree[1]), canonical(tree[2])]
    return "(" + tree[0].join(sorted(parts) if tree[0] in "+*" else parts) + ")"


def parse(text):
    """The tree of an expression as `render` writes it. Raises ValueError for any other text."""
    tokens = re.findall(r"\d+|[-+*()]", text)
    if "".join(tokens) != text or len(tokens) > 64:
        raise ValueError(f"not an expression: {text!r:.60}")

    def operand():
        token = tokens.pop(0) if tokens else ""
        if token == "(":
            tree = chain("+-", lambda: chain("*", operand))
            if not tokens or tokens.pop(0) != ")":
                raise ValueError("a bracket is not closed")
            return tree
        if not token.isdigit() or len(token) > 4:
            raise ValueError(f"{token!r:.20} is no number")
        return int(token)

    def chain(operators, part):
        tree = part()
        while tokens and tokens[0] in operators:
            tree = (tokens.pop(0), tree, part())
        return tree

    tree = chain("+-", lambda: chain("*", operand))
    if tokens:
        raise ValueError(f"{tokens[0]!r:.20} is left over")
    return tree


def work_out(tree):
    """The trees that a careful author writes, one operation a line, from the expression down to its value."""
    trees = [tree]
    while not isinstance(trees[-1], int):
        trees.append(reduce_once(trees[-1])[0])
    return trees


def write_thought(trees):
    return "\n=".join(map(render, trees))


def generate(level, rng):
    tree = random_tree(level, rng)
    text = render(tree)
    return {"id": f"arithmetic/{text}", "problem": text, "answer": str(evaluate(tree)), "level": level,
            "subject": "arithmetic", "solution": write_thought(work_out(tree)), "key": f"arithmetic {canonical(tree)}"}


def problems(split, limit=None, seed=0, levels=ALL_LEVELS):
    return sample_family(generate, split, limit, seed, levels)


def check_steps(problem, thought):
    """The first line that is not a right step, (index, line, reason), or None when the thought is right to its end.

    The first line is the problem; each other one carries out the next operation, or several at once. A wrong line is
    forgiven when the very next one takes it back ("wait =...") and is right.
    """
    goal, slip = parse(problem["problem"]), None
    left, lines = work_out(goal), thought.split("\n")
    if lines[0] != problem["problem"]:
        return 0, lines[0], "the thought does not begin with the problem"
    for index, line in enumerate(lines[1:], 1):
        claim = line.removeprefix("wait ")
        try:
            tree = parse(claim.removeprefix("="))
            reason = None if claim.startswith("=") and tree in left[1:] else "does not follow from the line before"
        except ValueError as error:
            reason = str(error)
        if slip and (reason or claim == line):
            return slip
        if claim != line and not slip:
            reason = "takes back a line that was right"
        slip = (index, line, reason) if reason else None
        if not reason:
            left = left[left.index(tree, 1):]
        elif claim != line:
            return slip
    return slip or (None if len(left) == 1 else (len(lines), "", "the thought does not end in the answer"))


def slip(tree, rng):
    """The tree after its next operation, with a wrong result; None when no wrong result keeps every value in range."""
    _, op, a, b = reduce_once(tree)
    true = OPERATIONS[op](a, b)
    slips = [reduce_once(tree, true + off)[0] for off in (-10, -2, -1, 1, 2, 10)]
    return rng.choice([wrong for wrong in slips if in_range(wrong)] or [None])


def plant_error(problem, rng):
    """The solution with one line wrong, the others and so the answer right."""
    trees = work_out(parse(problem["problem"]))
    slips = [(index, wrong) for index in range(1, len(trees) - 1) if (wrong := slip(trees[index - 1], rng)) is not None]
    if not slips:  # the only line is the answer: it is taken back without reason and said again
        return write_thought(trees) + "\nwait =" + render(trees[-1])
    index, wrong = rng.choice(slips)
    return write_thought(trees[:index] + [wrong] + trees[index + 1:])


def plant_slip(problem, rng):
    """The solution with a wrong line that the next one takes back; where no slip fits, the solution as it is."""
    trees = work_out(parse(problem["problem"]))
    slips = [(index, wrong) for index in range(1, len(trees)) if (wrong := slip(trees[index - 1], rng)) is not None]
    if not slips:
        return write_thought(trees)
    index, wrong = rng.choice(slips)
    return write_thought(trees[:index] + [wrong]) + "\nwait =" + write_thought(trees[index:])
