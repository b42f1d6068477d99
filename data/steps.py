"""Process verification of free text: every step that can be parsed is computed again, exactly.

A step is one equality sign with an expression on either side: `48/2 = 24`, the links of a chain `a = b = c`, GSM8K's
`<<48/2=24>>`, LaTeX such as `\\frac{1}{2} \\times 6 = 3`, identities such as `2x + 3x = 5x`; and an equation that is
said to follow from another: `2x + 3 = 11, so 2x = 8`. Its verdict is "right", "wrong", "repaired" when a wrong one is
taken back later, or "unchecked" where exact arithmetic cannot tell: `x = 5`, `1 hour = 60 minutes`. Currency, units in
words, thousands separators, percent and rounded decimals are read as people mean them. Text is never evaluated, only
parsed, with limits on its length, depth and numbers.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_LINE, MAX_TOKENS, MAX_DIGITS, MAX_BITS, MAX_POWER, MAX_TERMS, MAX_DEPTH = 2000, 60, 40, 400, 12, 60, 20

Step = NamedTuple("Step", [("text", str), ("verdict", str), ("reason", str)])
Side = NamedTuple("Side", [("tokens", list), ("value", dict), ("whole", bool)])     # a part of the text around a sign


# ---------------------------------------------------------------------------------------------- polynomials
# {"": 3, "x": 2, "xxy": 5} is 3 + 2x + 5x^2 y; a number is {"": n}, zero is {}. Coefficients are Fractions.


def tidy(poly):
    if len(poly) > MAX_TERMS or any(n.bit_length() > MAX_BITS for c in poly.values() for n in c.as_integer_ratio()):
        raise ValueError("too large")
    return {letters: c for letters, c in poly.items() if c}


def add(a, b, sign=1):
    return tidy({letters: a.get(letters, Fraction(0)) + sign * b.get(letters, 0) for letters in {**a, **b}})


def multiply(a, b):
    out = {}
    for p, m in a.items():
        for q, n in b.items():
            letters = "".join(sorted(p + q))
            if len(letters) > MAX_POWER:
                raise ValueError("power too high")
            out[letters] = out.get(letters, 0) + m * n
    return tidy(out)


def number(poly):
    """The value of a polynomial without letters, or None."""
    return poly.get("", Fraction(0)) if not poly.keys() - {""} else None


def divide(a, b):
    value = number(b)
    if not value:
        raise ValueError("division by zero or by an expression with letters")
    return multiply(a, {"": 1 / value})


def power(base, exponent):
    n = number(exponent)
    if n is None or n.denominator != 1 or not 0 <= n <= MAX_POWER:
        raise ValueError("not a small whole power")
    out = {"": Fraction(1)}
    for _ in range(int(n)):
        out = multiply(out, base)
    return out


# ---------------------------------------------------------------------------------------------- parsing

TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[-+*/^()%]|[a-zA-Z]+|\S")


def parse(tokens, percent=Fraction(1, 100)):
    """The polynomial that `tokens` (a list, or a text to be split) writes down. Raises ValueError when they write none.

    percent: what a percent sign multiplies by; 1 reads it as a mere unit.
    """
    tokens = TOKEN.findall(tokens) if isinstance(tokens, str) else tokens
    if len(tokens) > 4 * MAX_TOKENS:
        raise ValueError("too long")
    at = 0

    def peek():
        return tokens[at] if at < len(tokens) else ""

    def take():
        nonlocal at
        at += 1
        return tokens[at - 1]

    def total(depth):
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        sign = -1 if peek() in ("+", "-") and take() == "-" else 1
        value = multiply({"": Fraction(sign)}, product(depth))
        while peek() in ("+", "-"):
            sign = 1 if take() == "+" else -1
            value = add(value, product(depth), sign)
        return value

    def product(depth):
        value = factor(depth)
        while peek() and (peek() in "*/(" or peek().isalpha()):
            if peek() == "/":
                take()
                value = divide(value, factor(depth))
            else:
                if peek() == "*":
                    take()
                value = multiply(value, factor(depth))
        return value

    def factor(depth):
        token = take() if peek() else ""
        if token == "(":
            value = total(depth + 1)
            if not peek() or take() != ")":
                raise ValueError("unbalanced parentheses")
        elif token == "-":
            value = multiply({"": Fraction(-1)}, factor(depth + 1) if depth < MAX_DEPTH else {})
            return value
        elif len(token) == 1 and token.isascii() and token.isalpha():
            value = {token: Fraction(1)}
        elif token[:1] == "." or token[:1].isdecimal() and token.isascii():
            if len(token) > MAX_DIGITS:
                raise ValueError("too many digits")
            value = {"": Fraction(token)}
            if re.fullmatch(r"\d+ \d+ / \d+", " ".join([token, *tokens[at:at + 3]])) and tokens[at + 2] != "0":
                value = add(value, {"": Fraction(int(take()), int(take() and take()))})         # 2 1/2
        else:
            raise ValueError(f"{token!r} is not part of an expression")
        if peek() == "^":
            take()
            value = power(value, factor(depth + 1))
        if peek() == "%":
            take()
            value = multiply(value, {"": percent})
        return value

    value = total(0)
    if at != len(tokens):
        raise ValueError(f"{tokens[at]!r} is left over")
    return value


SPELLINGS = [(re.compile(pattern), new) for pattern, new in [
    (r"\\(?:left|right|,|;|!|quad)|\\[()\[\]]|\\?\$|[€£&~]", " "), (r"\\text\w*\{([^{}]{0,40})\}", r" \1 "),
    (r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}", r"((\1)/(\2))"), (r"\\[dt]?frac(\d)(\d)", r"(\1/\2)"),
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"), (r"\*\*", " "), (r"\^\{(\d{1,3})\}", r"^\1"), (r"\\?%", "%"),
    (r"\\times|\\cdot|[×·⋅]", "*"), (r"\\div|÷", "/"), (r"[−–—]", "-"), (r"\\approx|[≈≅]|~=", "≈"),
    (r"\\(?:implies|Rightarrow|rightarrow|to)\b|=>|->|⇒|→|⟹", " so "), (r"\ba\b(?=\s+[A-Za-z]{2})", "an"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""), (r"(?<![\d./])(\d{1,3}) (?=\d{3}\b)", r"\1"),
    (r"(?<=[\d)%a-z])\s*\b[xX]\b\s*(?=[\d(.])|(?<=\d)[xX](?=\s*[\d.])", " * "), (r"(?<=/\s)(\d+/\d+)", r"(\1)"),
    (r"(?<=[\d)%])\s+(?:times|multiplied by|of)\s+(?=[\d(.])", " * "),
    (r"(?<=[\d)])\s+divided by\s+(?=[\d(.])", " / "), (r"(?<=[\d)])\s+plus\s+(?=[\d(.])", " + "),
    (r"(?<=[\d)])\s+minus\s+(?=[\d(.])", " - "), (r"/\s*(?=[A-Za-z]{2})(\w+)", r" \1"),
    (r"(?<==) ?(\d+) and \(?(\d+/\d+)\)?", r" \1 \2"),
]]
LIST_MARK = re.compile(r"^\s*(?:[-*•]+\s+|(?:step\s*)?\d{1,2}\s*[.):]\s+)+", re.I)
SENTENCE = re.compile(r"\.(?=\s|$)|:(?!\d)|[;!?|]|,(?=\s)")
ROUNDED = re.compile(r"\b(?:about|around|approximately|roughly|nearly|almost|round\w*|at (?:least|most)|full|whole|"
                     r"complete|remainder)\b|≈", re.I)
FOLLOWS = re.compile(r"\b(?:so|thus|hence|therefore|which (?:gives|means)|giving)\b", re.I)
RETRACTED = re.compile(r"\b(?:wait|hold on|actually|mistake|slip|oops|wrong|incorrect|let me re\w+|correct\w*)\b|\bno,",
                       re.I)
UNITS = re.compile(r"\b(?:(?:milli|centi|kilo)?(?:second|minute|hour|day|week|month|year|decade|inch|foot|feet|yard|"
                   r"mile|meter|metre|gram|liter|litre|gallon|quart|pint|cup|ounce|pound|ton|cent|dollar|dime|nickel|"
                   r"quarter|dozen|score|pair)(?:s|es)?|cm|mm|km|kg|g|m|lbs?|oz|ft|mins?|hrs?|half|halves|twice|double|"
                   r"thousand|million)\b", re.I)
BREAKS = {"because", "since", "so", "and", "or", "is", "are", "was", "which", "then", "but", "if", "as", "of", "I"}


def is_word(token):
    return len(token) > 1 and token.isalpha() or token == "I"


def without_units(tokens):
    """Drops the words that follow a number and precede an operation or the end: units. None stands for other words."""
    out, i = [], 0
    while i < len(tokens):
        if not is_word(tokens[i]):
            out.append(tokens[i])
            i += 1
            continue
        end = i
        while end < len(tokens) and is_word(tokens[end]):
            end += 1
        after_value = out and out[-1] and (out[-1][-1].isdecimal() or out[-1] in (")", "%"))
        before_sign = end == len(tokens) or tokens[end] in tuple("+-*/)")
        if not (after_value and before_sign and BREAKS.isdisjoint(tokens[i:end])):
            out.append(None)
        i = end
    return out


def read_side(part, at_end):
    """The longest expression that ends (at_end) or begins a part of a sentence, or None.

    None too when an operation, a letter or a comma joins it to something that cannot be read: `cost of a pen * 3 = 6`.
    """
    tokens = TOKEN.findall(part)
    tokens = without_units(tokens[-MAX_TOKENS:] if at_end else tokens[:MAX_TOKENS])
    for cut in range(len(tokens)):
        split = cut if at_end else len(tokens) - cut
        rest, chosen = (tokens[:split], tokens[split:]) if at_end else (tokens[split:], tokens[:split])
        if None in chosen:
            continue
        try:
            value = parse(chosen)
        except ValueError:
            continue
        joint = next((t for t in (reversed(rest) if at_end else rest) if t not in ("(", ")")), None)
        joined = joint and (joint in "+-*/^:,." or len(joint) == 1 and joint.isalpha())
        return None if joined or cut and at_end and chosen[0] in "+-" else Side(chosen, value, cut == 0)
    return None


# ---------------------------------------------------------------------------------------------- verdicts


def is_bare(side):
    """A number alone, with at most a sign and a percent."""
    return [t for t in side.tokens if t not in "-%()"][1:] == []


def values(side):
    """A side's readings: a percent sign means a hundredth; alone, in a sum, in `* 100%` it may also be a mere unit."""
    yield side.value
    if "%" in side.tokens and (not {"*", "/", "^"} & set(side.tokens) or side.tokens[-3:] == ["*", "100", "%"]):
        yield parse(side.tokens, Fraction(1))


def rounds_to(exact, side, loosely):
    """Whether a bare decimal is `exact` rounded or cut off at its last place; a whole number only where it says so."""
    text = next((t for t in side.tokens if t[0].isdecimal() or t[0] == "."), "0")
    places = len(text.partition(".")[2])
    if not places and not loosely:
        return False
    unit = Fraction(1, 10 ** places)
    return (exact / unit).denominator != 1 and any(abs(exact - number(value)) < unit for value in values(side))


def judge(left, right, context):
    """(verdict, reason) for `left = right`; `context` is the text around it."""
    if any(add(a, b, -1) == {} for a in values(left) for b in values(right)):
        return ("unchecked", "a bare number on both sides") if is_bare(left) and is_bare(right) else ("right", "")
    exact, claimed = number(left.value), number(right.value)
    if exact is None or claimed is None:
        return "unchecked", "an equation, not an identity"
    loosely = bool(ROUNDED.search(context))
    for one, other in ((left, right), (right, left)):
        if is_bare(other) and any(rounds_to(number(value), other, loosely) for value in values(one)):
            return "right", "rounded"
    units = {unit.lower().rstrip("s") for unit in UNITS.findall(context)}
    if len(units) > 1 or is_bare(left) and is_bare(right) and re.search("[A-Za-z]", context):
        return "unchecked", "numbers that differ, in units that may too"
    if "cent" in context and exact in (100 * claimed, claimed / 100):
        return "unchecked", "dollars and cents"
    return "wrong", f"it is {float(exact):.10g}"


def follows(first, then):
    """(verdict, reason) for two equations, each as left minus right, of which the second is said to follow."""
    letters = {letter for term in (*first, *then) for letter in term}
    ratios = {then.get(term, 0) / first[term] if first.get(term) else None for term in {*first, *then}}
    if len(ratios) == 1 and None not in ratios:
        return "right", ""
    if len(letters) == 1 and max(map(len, (*first, *then))) == 1 and letters <= first.keys() & then.keys():
        return "wrong", f"the first gives {min(letters)} = {-first.get('', 0) / first[min(letters)]}"
    return "unchecked", "not a linear equation in one letter"


def check_sentence(sentence, equation):
    """(the steps of one sentence, the last equation with letters); `equation`: that of the sentences before."""
    parts, signs = re.split(r"[=≈]", sentence), re.findall(r"[=≈]", sentence)
    out = []
    for i, sign in enumerate(signs):
        left, right = read_side(parts[i], True), read_side(parts[i + 1], False)
        if not left or not right:
            continue
        context = parts[i] + sign + parts[i + 1]
        labelled = is_bare(left) and (not left.whole or i == 0 and re.search("[A-Za-z]", parts[i]))  # `8 boxes = 8 * 6`
        verdict, reason = ("unchecked", "a label") if labelled else judge(left, right, context)
        difference = add(left.value, right.value, -1)
        if verdict == "unchecked" and number(difference) is None:
            if equation and FOLLOWS.search(parts[i]) and not UNITS.search(context):
                verdict, reason = follows(equation, difference)
            equation = difference
        elif verdict == "unchecked" and difference and out and is_bare(left) \
                and not (labelled or UNITS.search(context)):
            verdict, reason = "wrong", "the chain changes its value"
        out.append(Step(" ".join(left.tokens) + f" {sign} " + " ".join(right.tokens), verdict, reason))
    return out, equation


def check_text(text):
    """Every step found in a text, in order of the lines: [Step(text, verdict, reason)].

    A wrong step is "repaired" when the text takes something back after it and then has the same left side right.
    """
    out, equation, retractions = [], None, 0
    for line in text.split("\n"):
        line = line[:MAX_LINE]
        sentences = re.findall(r"<<([^<>]*)>>", line)
        line = LIST_MARK.sub("", re.sub(r"<<[^<>]*>>", "", line))
        for pattern, new in SPELLINGS:
            line = pattern.sub(new, line)
            sentences = [pattern.sub(new, s) for s in sentences]
        for sentence in sentences + SENTENCE.split(line):
            retractions += bool(RETRACTED.search(sentence))
            steps, equation = check_sentence(sentence, equation)
            out += [(step, retractions) for step in steps]
    right = {}
    for step, count in out:
        if step.verdict == "right":
            right[left_of(step)] = count
    repaired = {i for i, (step, count) in enumerate(out)
                if step.verdict == "wrong" and right.get(left_of(step), 0) > count}
    return [step._replace(verdict="repaired") if i in repaired else step for i, (step, _) in enumerate(out)]


def left_of(step):
    return re.split("[=≈]", step.text)[0]


def first_wrong_step(text):
    """The first step that is wrong, or None."""
    return next((step for step in check_text(text) if step.verdict == "wrong"), None)
