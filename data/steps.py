"""Process verification of free text: recompute every readable step exactly.

A step is an equality sign with an expression on each side: `48/2 = 24`, each link of a chain
`a = b = c`, GSM8K's `<<48/2=24>>`, LaTeX such as `\\frac{1}{2} \\times 6 = 3`, identities such as
`2x + 3x = 5x`; or an equation stated as a consequence of another: `2x + 3 = 11, so 2x = 8`. A step
is "right", "wrong", "repaired" (wrong, but corrected later in the text), or "unchecked" if exact
arithmetic cannot decide: `x = 5`, `1 hour = 60 minutes`. Currency, units, thousands separators,
percent signs and rounded decimals are read the way people use them. Text is parsed, never
evaluated, with limits on its length, its nesting and the size of its numbers.
"""

import re
from fractions import Fraction
from functools import reduce
from itertools import groupby
from typing import NamedTuple

MAX_LINE = 2000  # characters
MAX_TOKENS = 60  # on each side of an equality sign
MAX_BITS = 400
MAX_POWER = 12
MAX_TERMS = 60
MAX_DEPTH = 20


class Step(NamedTuple):
    text: str
    verdict: str  # "right", "wrong", "repaired" or "unchecked"
    reason: str


class Side(NamedTuple):
    """The expression on one side of an equality sign."""

    tokens: list
    value: dict  # a polynomial
    complete: bool  # whether it covers all text on that side


# ---- polynomials
# {"": 3, "x": 2, "xxy": 5} is 3 + 2x + 5x^2 y; a number is {"": n}, zero is {}.


def drop_zeros(poly):
    """Drop zero coefficients; ValueError if the polynomial is too large."""
    parts = [n for c in poly.values() for n in c.as_integer_ratio()]
    if len(poly) > MAX_TERMS or any(n.bit_length() > MAX_BITS for n in parts):
        raise ValueError("too large")
    return {letters: c for letters, c in poly.items() if c}


def add(a, b):
    return drop_zeros({letters: a.get(letters, Fraction(0)) + b.get(letters, 0)
                 for letters in {**a, **b}})


def subtract(a, b):
    return add(a, {letters: -c for letters, c in b.items()})


def multiply(a, b):
    product = {}
    for p, m in a.items():
        for q, n in b.items():
            letters = "".join(sorted(p + q))
            if len(letters) > MAX_POWER:
                raise ValueError("power too high")
            product[letters] = product.get(letters, 0) + m * n
    return drop_zeros(product)


def number(poly):
    """The value of a constant polynomial, or None."""
    return None if poly.keys() - {""} else poly.get("", Fraction(0))


def divide(a, b):
    value = number(b)
    if not value:
        raise ValueError("division by zero or by a polynomial")
    return multiply(a, {"": 1 / value})


def power(base, exponent):
    n = number(exponent)
    if n is None or n.denominator != 1 or not 0 <= n <= MAX_POWER:
        raise ValueError("the exponent is not a small natural number")
    return reduce(multiply, [base] * int(n), {"": Fraction(1)})


# ---- parsing
# The read_* functions consume tokens from the front of `tokens`, which ends in "".

NUMBER = re.compile(r"[0-9.]{1,40}")
TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[-+*/^()%]|[a-zA-Z]+|\S")


def read_sum(tokens, percent, depth=0):
    value = {}
    sign = tokens.pop(0) if tokens[0] in ("+", "-") else "+"
    while sign:
        combine = subtract if sign == "-" else add
        value = combine(value, read_product(tokens, percent, depth))
        sign = tokens.pop(0) if tokens[0] in ("+", "-") else None
    return value


def read_product(tokens, percent, depth):
    value = read_factor(tokens, percent, depth)
    while tokens[0] in ("*", "/", "(") or tokens[0].isalpha():
        op = tokens.pop(0) if tokens[0] in ("*", "/") else "*"
        factor = read_factor(tokens, percent, depth)
        value = divide(value, factor) if op == "/" else multiply(value, factor)
    return value


def read_factor(tokens, percent, depth):
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    token = tokens.pop(0)
    if token == "-":
        return multiply({"": Fraction(-1)}, read_factor(tokens, percent, depth + 1))
    if token == "(":
        value = read_sum(tokens, percent, depth + 1)
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced parentheses")
    elif len(token) == 1 and token.isascii() and token.isalpha():
        value = {token: Fraction(1)}
    elif NUMBER.fullmatch(token):
        value = {"": Fraction(token)}
        mixed = re.fullmatch(r"\d+ (\d+) / (\d+)", " ".join([token, *tokens[:3]]))  # 2 1/2
        if mixed and int(mixed[2]):
            value = add(value, {"": Fraction(int(mixed[1]), int(mixed[2]))})
            del tokens[:3]
    else:
        raise ValueError(f"{token!r} is not part of an expression")
    if tokens[0] == "^":
        tokens.pop(0)
        value = power(value, read_factor(tokens, percent, depth + 1))
    if tokens[0] == "%":
        tokens.pop(0)
        value = multiply(value, {"": percent})
    return value


def parse(tokens, percent=Fraction(1, 100)):
    """The polynomial written in `tokens`. Raises ValueError if they do not form one.

    tokens: a list, or a text to split. percent: the value of a percent sign; 1 if it is a unit.
    """
    tokens = TOKEN.findall(tokens) if isinstance(tokens, str) else tokens
    if len(tokens) > 4 * MAX_TOKENS:
        raise ValueError("too long")
    tokens = [*tokens, ""]
    value = read_sum(tokens, percent)
    if tokens[0]:
        raise ValueError(f"{tokens[0]!r} after the expression")
    return value


# ---- from prose to expressions

SPELLINGS = [(re.compile(pattern), new) for pattern, new in [
    (r"\\(?:left|right|,|;|!|quad)|\\[()\[\]]|\\?\$|[€£&~]", " "),
    (r"\\text\w*\{([^{}]{0,40})\}", r" \1 "),
    (r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}", r"((\1)/(\2))"),
    (r"\\[dt]?frac(\d)(\d)", r"(\1/\2)"),
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"), (r"\*\*", " "), (r"\^\{(\d{1,3})\}", r"^\1"), (r"\\?%", "%"),
    (r"\\times|\\cdot|[×·⋅]", "*"), (r"\\div|÷", "/"), (r"[−–—]", "-"), (r"\\approx|[≈≅]|~=", "≈"),
    (r"\\(?:implies|Rightarrow|rightarrow|to)\b|=>|->|⇒|→|⟹", " so "),
    (r"\ba\b(?=\s+[A-Za-z]{2})", "an"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"(?<![\d./])(\d{1,3}) (?=\d{3}\b)", r"\1"),
    (r"(?<=[\d)%a-z])\s*\b[xX]\b\s*(?=[\d(.])|(?<=\d)[xX](?=\s*[\d.])", " * "),
    (r"(?<=/\s)(\d+/\d+)", r"(\1)"),
    (r"(?<=[\d)%])\s+(?:times|multiplied by|of)\s+(?=[\d(.])", " * "),
    (r"(?<=[\d)])\s+divided by\s+(?=[\d(.])", " / "),
    (r"(?<=[\d)])\s+plus\s+(?=[\d(.])", " + "),
    (r"(?<=[\d)])\s+minus\s+(?=[\d(.])", " - "),
    (r"/\s*(?=[A-Za-z]{2})(\w+)", r" \1"),
    (r"(?<==) ?(\d+) and \(?(\d+/\d+)\)?", r" \1 \2"),
]]
LIST_MARK = re.compile(r"^\s*(?:[-*•]+\s+|(?:step\s*)?\d{1,2}\s*[.):]\s+)+", re.I)
SENTENCE = re.compile(r"\.(?=\s|$)|:(?!\d)|[;!?|]|,(?=\s)")
ROUNDED = re.compile(
    r"\b(?:about|around|approximately|roughly|nearly|almost|round\w*|at (?:least|most)|full|whole|"
    r"complete|remainder)\b|≈", re.I)
CONSEQUENCE = re.compile(r"\b(?:so|thus|hence|therefore|which (?:gives|means)|giving)\b", re.I)
RETRACTION = re.compile(
    r"\b(?:wait|hold on|actually|mistake|slip|oops|wrong|incorrect|let me re\w+|correct\w*)\b|"
    r"\bno,", re.I)
UNITS = re.compile(
    r"\b(?:(?:milli|centi|kilo)?(?:second|minute|hour|day|week|month|year|decade|inch|foot|feet|"
    r"yard|mile|meter|metre|gram|liter|litre|gallon|quart|pint|cup|ounce|pound|ton|cent|dollar|"
    r"dime|nickel|quarter|dozen|score|pair)(?:s|es)?|cm|mm|km|kg|g|m|lbs?|oz|ft|mins?|hrs?|half|"
    r"halves|twice|double|thousand|million)\b", re.I)
NOT_UNITS = set("because since so and or is are was which then but if as of I".split())


def is_word(token):
    return len(token) > 1 and token.isalpha() or token == "I"


def without_units(tokens):
    """Drop units (words between a number and an operator or the end); other words become None."""
    kept = []
    begin = 0
    for worded, group in groupby(tokens, is_word):
        group = list(group)
        begin += len(group)
        if not worded:
            kept += group
            continue
        last = kept[-1] if kept else None
        after_number = last and (last[-1].isdecimal() or last in (")", "%"))
        before_sign = begin == len(tokens) or tokens[begin] in ("+", "-", "*", "/", ")")
        if not (after_number and before_sign and NOT_UNITS.isdisjoint(group)):
            kept.append(None)
    return kept


def read_side(text, at_end):
    """The longest expression at the end (at_end) or the start of a text, or None.

    None also if a sign or letter joins it to unreadable text: `cost of a pen * 3 = 6`.
    """
    tokens = TOKEN.findall(text)
    tokens = without_units(tokens[-MAX_TOKENS:] if at_end else tokens[:MAX_TOKENS])
    for cut in range(len(tokens)):
        split = cut if at_end else len(tokens) - cut
        chosen, rest = tokens[:split], tokens[split:]
        if at_end:
            chosen, rest = rest, chosen[::-1]
        if None in chosen:
            continue
        try:
            value = parse(chosen)
        except ValueError:
            continue
        next_to = next((token for token in rest if token not in ("(", ")")), None)
        joined = next_to and (next_to in "+-*/^:,." or len(next_to) == 1 and next_to.isalpha())
        if joined or cut and at_end and chosen[0] in "+-":
            return None
        return Side(chosen, value, cut == 0)
    return None


# ---- verdicts


def is_bare(side):
    """Whether a side is a single number, perhaps with a sign, parentheses or a percent sign."""
    return len([token for token in side.tokens if token not in "-%()"]) <= 1


def readings(side):
    """Yield possible values: `%` is 1/100, or only a unit if alone, in a sum or in `* 100%`."""
    yield side.value
    tokens = side.tokens
    if "%" in tokens and (not {"*", "/", "^"} & set(tokens) or tokens[-3:] == ["*", "100", "%"]):
        yield parse(tokens, Fraction(1))


def rounds_to(exact, side, loosely):
    """Whether a bare number is `exact`, rounded or truncated to its last decimal place.

    Integers are accepted only if the text announces rounding (loosely).
    """
    text = next((token for token in side.tokens if token[0].isdecimal() or token[0] == "."), "0")
    places = len(text.partition(".")[2])
    if not places and not loosely:
        return False
    unit = Fraction(1, 10 ** places)
    near = any(abs(exact - number(value)) < unit for value in readings(side))
    return near and (exact / unit).denominator != 1


def compare(left, right, context):
    """(verdict, reason) for `left = right`, given the text around it."""
    both_bare = is_bare(left) and is_bare(right)
    if any(a == b for a in readings(left) for b in readings(right)):
        return ("unchecked", "a bare number on both sides") if both_bare else ("right", "")
    exact = number(left.value)
    claimed = number(right.value)
    if exact is None or claimed is None:
        return "unchecked", "an equation, not an identity"
    loosely = bool(ROUNDED.search(context))
    for side, decimal in ((left, right), (right, left)):
        rounded = (rounds_to(number(value), decimal, loosely) for value in readings(side))
        if is_bare(decimal) and any(rounded):
            return "right", "rounded"
    units = {unit.lower().rstrip("s") for unit in UNITS.findall(context)}
    if len(units) > 1 or both_bare and re.search("[A-Za-z]", context):
        return "unchecked", "different numbers, perhaps in different units"
    if "cent" in context and exact in (100 * claimed, claimed / 100):
        return "unchecked", "dollars and cents"
    return "wrong", f"it is {float(exact):.10g}"


def check_consequence(first, then):
    """(verdict, reason) for deducing `then` from `first`, both given as left minus right."""
    terms = {*first, *then}
    ratios = {then.get(term, 0) / first[term] if first.get(term) else None for term in terms}
    if len(ratios) == 1 and None not in ratios:  # a multiple of the first equation
        return "right", ""
    letters = set("".join(terms))
    linear = max(map(len, terms)) == 1
    if linear and len(letters) == 1 and letters <= first.keys() & then.keys():
        [letter] = letters
        return "wrong", f"the first gives {letter} = {-first.get('', 0) / first[letter]}"
    return "unchecked", "not a linear equation in one letter"


def check_sentence(sentence, equation):
    """(steps, last equation with letters) after a sentence, given the last equation before it."""
    parts = re.split(r"([=≈])", sentence)
    steps = []
    for i in range(1, len(parts), 2):
        before, sign, after = parts[i - 1:i + 2]
        left = read_side(before, True)
        right = read_side(after, False)
        if not left or not right:
            continue
        context = before + sign + after
        worded = i == 1 and re.search("[A-Za-z]", before)
        labelled = is_bare(left) and (not left.complete or worded)  # `8 boxes = 8 * 6`
        verdict, reason = compare(left, right, context)
        if labelled:
            verdict, reason = "unchecked", "a label"
        difference = subtract(left.value, right.value)
        units = UNITS.search(context)
        chained = steps and is_bare(left) and not labelled  # `5 + 3 = 8 = 9`
        if verdict == "unchecked" and number(difference) is None:
            if equation and CONSEQUENCE.search(before) and not units:
                verdict, reason = check_consequence(equation, difference)
            equation = difference
        elif verdict == "unchecked" and difference and chained and not units:
            verdict, reason = "wrong", "the chain changes its value"
        steps.append(Step(" ".join([*left.tokens, sign, *right.tokens]), verdict, reason))
    return steps, equation


def check_text(text):
    """All steps in a text, in order.

    A wrong step is "repaired" if a retraction and a right step with its left side follow it.
    """
    found = []  # (step, its left side, number of retractions up to it)
    equation = None
    retractions = 0
    for line in text.split("\n"):
        line = line[:MAX_LINE]
        pieces = re.findall(r"<<([^<>]*)>>", line)
        pieces.append(LIST_MARK.sub("", re.sub(r"<<[^<>]*>>", "", line)))
        for pattern, new in SPELLINGS:
            pieces = [pattern.sub(new, piece) for piece in pieces]
        *annotations, prose = pieces
        for sentence in annotations + SENTENCE.split(prose):
            retractions += bool(RETRACTION.search(sentence))
            steps, equation = check_sentence(sentence, equation)
            found += [(step, re.split("[=≈]", step.text)[0], retractions) for step in steps]
    right = {left: count for step, left, count in found if step.verdict == "right"}
    checked = []
    for step, left, count in found:
        repaired = step.verdict == "wrong" and right.get(left, 0) > count
        checked.append(step._replace(verdict="repaired") if repaired else step)
    return checked
