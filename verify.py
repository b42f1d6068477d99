r"""Grades text: is the answer in a model's output the same as the reference answer?

    python verify.py --answer '\frac{2}{4}' --reference 0.5        both readings, the verdict, the tier that decided
    python verify.py --file results.jsonl --explain                grades a file; with `expected`, a table per category

Text from a model is hostile. Nothing here evaluates it: a tokenizer and a recursive-descent parser turn LaTeX, plain
text and Unicode into a small tree of tuples, within bounds on length, depth, digits and magnitude. Two trees are then
compared in tiers, cheapest first: same words or same tree; same exact rational (residues modulo two primes when a
number is too long to write out); same value at random complex and real points, in doubles and then to 60 digits; and
at last, seldom, SymPy on objects built from the trees, in a process that is killed when its time is up.

Conventions where graders differ: the last box wins, and boxes joined by "and" or a comma are one answer. Bare lists and
sets are unordered, tuples ordered. Intervals, inequalities and set-builders are compared as sets of reals. `x = 5` is
5 and `y = f(x)` is f(x); other equations are equal up to a factor. 28 % is 28 and 0.28. Units and currency are ignored,
base subscripts are not. A decimal equals an exact value from 8 significant digits on; an integer only exactly.
"""

import argparse
import atexit
import cmath
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

MAX_TEXT = 200_000  # characters of a model's output that are searched, from the end
MAX_ANSWER = 2_000  # characters of an answer that are parsed; longer ones are compared as strings
MAX_DEPTH = 40  # nested groups
MAX_BITS = 30_000  # of a numerator or denominator that is written out
MAX_MAGNITUDE = 100_000  # bits before the point of a number that is evaluated to many digits
TIMEOUT_S = 2.0  # for one comparison in a worker process
DECIMAL_DIGITS = 8  # significant digits from which on a decimal stands for an exact value


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Is an answer the same as the reference answer?")
    parser.add_argument("--answer", help="an answer, or a whole model output")
    parser.add_argument("--reference", help="the reference answer")
    parser.add_argument("--file", help=".jsonl with answer|pred|completion, reference|gold and optionally expected, category")
    parser.add_argument("--strict", action="store_true", help="accept only a box after the thinking block")
    parser.add_argument("--explain", action="store_true", help="with --file: print each row with the tier that decided")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="seconds for one comparison in a worker")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ extraction

END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|im_start|end|eot_id)\|>|</s>")
THINK_OPEN, THINK_CLOSE = re.compile(r"<(?:think|thought)>"), re.compile(r"</(?:think|thought)>")
BOX = re.compile(r"(?:\\+|\x08)(?:begin|fb|f|b)?(?:oxed|box|boxed)(?![a-zA-Z])\s*")
JOINT = r"(?:\s|[%s,;&~]|\\[%s\\,;: ]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)*"
BETWEEN_BOXES, BETWEEN_FORMULAS = re.compile(JOINT % ("$", r"\[\]()")), re.compile(JOINT % ("", ""))
MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.S)
NUMBER_IN_PROSE = re.compile(r"(?<![\w.])[-+−]?\s?\\?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?(?:\s?\\?%)?")
ANSWER_PHRASE = re.compile(
    r"####|^A:|\b(?:answers?|correct (?:option|choice))\b[*_]*\s*(?:is(?!n)|are|was|would be|=|:|(?=\$|\\\(|\\\[))[*_]*\s*:?"
    r"|^#+ *(?:Final )?Answer *\n", re.I | re.M,
)  # fmt: skip
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
ENGLISH = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}")
CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?!\d))((?:\s|\\\W|\$)*\S.*)", re.S)  # (C) 12
NOT_ENGLISH = {"or", "and", "sqrt", "pi", "in", "oo", "inf", "infinity", "e"}


def _braced(text, start):
    """The end of the group whose opening brace stands at `start`, or None when it is never closed."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.S):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.end()
    return None


def after_thinking(text):
    """(what follows the thinking block, whether every block that was opened is closed); the whole text without one."""
    closes = list(THINK_CLOSE.finditer(text))
    tail = text[closes[-1].end() :] if closes else text
    return tail, THINK_OPEN.search(tail) is None


def _boxes(text, strict):
    """The content of the last box, joined with those before it that only "and" or a comma separates; None: no box."""
    starts = [match for match in BOX.finditer(text) if text[match.end() : match.end() + 1] == "{" or not strict]
    found, edge = [], None
    for match in reversed(starts[-20:]):
        opened = text[match.end() : match.end() + 1] == "{"
        end = _braced(text, match.end()) if opened else None
        if edge is not None and (end is None or not BETWEEN_BOXES.fullmatch(text, end, edge)):
            break
        if end is not None:
            content = text[match.end() + 1 : end - 1]
            if edge is None and re.match(r"[$\\)\s]*(?:\\?%|per ?cent\b)", text[end : end + 20]):
                content += r"\%"
        elif strict:
            return None
        else:  # the closing brace is missing, or there never was one: `\boxed 5`
            content = re.split(r"\$|\n|\\\]|\\\)", text[match.end() + opened :], maxsplit=1)[0]
        if content not in found:
            found.insert(0, content)
        edge = match.start()
    return ", ".join(found) if found else None


def _last_value(text):
    """The last formula or the last number outside one, whichever comes later; None when there is neither."""
    formulas = list(MATH.finditer(text))
    numbers = list(NUMBER_IN_PROSE.finditer(text, formulas[-1].end() if formulas else 0))
    if numbers:
        return numbers[-1][0].strip()
    return next(group for group in formulas[-1].groups() if group is not None) if formulas else None


def _is_formula(text):
    """Whether a text is nothing but mathematics in plain text or LaTeX."""
    if len(text) > MAX_ANSWER or MATH.search(text) or not set(ENGLISH.findall(WRAPPER.sub("", text))) <= NOT_ENGLISH | FUNCTIONS | GREEK:
        return False
    return read(text)[0] not in ("raw", "text")


def _from_phrase(rest):
    """The answer in what follows "the answer is": a formula, bold text, the start of the sentence or its last value."""
    rest = rest.lstrip(" \t\n*_:=")
    formula = MATH.match(rest)
    if formula:
        found = [next(group for group in formula.groups() if group is not None)]
        while following := MATH.match(rest, BETWEEN_FORMULAS.match(rest, formula.end()).end()):
            formula = following
            found.append(next(group for group in formula.groups() if group is not None))
        percent = re.match(r"\s*(?:\\?%|per ?cent\b)", rest[formula.end() :])
        return ", ".join(found) + (r"\%" if percent else "")
    sentence = re.split(r"\n|[.!?](?=\s|$)|\*\*", rest, maxsplit=1)[0].strip()
    if _is_formula(sentence) or CHOICE.fullmatch(sentence):
        return sentence
    start = NUMBER_IN_PROSE.match(sentence) or re.match(r"(?i:yes|no|true|false)\b|\(?[B-J]\b\)?", sentence)
    return start[0] if start else _last_value(sentence) or sentence or None


def extract_answer(text, strict=False):
    r"""The answer in a model's output, or None.

    strict: the content of the last `\boxed{}` (or `\fbox{}`) after the thinking block; a block that was opened and
    never closed, or a box whose brace is never closed, means that there is no answer. Otherwise, in this order: the
    box, `<answer>` tags, "#### 42", "the answer is ...", the whole text if it reads as mathematics, bold text, the
    last formula or number; what stands in the thinking block counts only if nothing follows it.

    >>> extract_answer(r"<think>\boxed{1}</think> so $\boxed{2}$ and $\boxed{3}$")
    '2, 3'
    """
    tail, closed = after_thinking(text)
    if strict and not closed:
        return None
    tail = (tail if strict or tail.strip() else text)[-MAX_TEXT:].replace("<|im_start|>assistant", "").lstrip()
    tail = END_OF_TURN.split(tail, maxsplit=1)[0]
    boxed = _boxes(tail, strict)
    if strict or boxed is not None:
        return boxed
    tags = re.findall(r"<answer>(.*?)(?:</answer>|$)", tail, re.S)
    if tags:
        return tags[-1].strip()
    phrases = list(ANSWER_PHRASE.finditer(tail))
    if phrases and (found := _from_phrase(tail[phrases[-1].end() :])):
        return found
    if _is_formula(tail):
        return tail.strip()
    options = re.findall(r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-J])\b", tail)
    if options:
        return options[-1]
    bold = re.findall(r"\*\*([^*\n]+)\*\*", tail)
    if bold and read(bold[-1])[0] not in ("raw", "text"):
        return bold[-1]
    return _last_value(tail)


# ------------------------------------------------------------------------------------------------ tokens


class Unreadable(ValueError):
    """The text is not mathematics that this file knows, or exceeds a bound."""


class Token(NamedTuple):
    kind: str
    value: object = None
    text: str = ""
    space: bool = False  # white space stands before it


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "0123456789+-()nx")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ", "0123456789+-nx")
UNICODE = {
    **dict(zip("−–—‐‑×·∙⋅∗÷∕⁄≤≥⩽⩾≦≧≠≈≅∞∪∩∈∉∅±∓∖", [
        *"-----", *"*****", *"///", *[r"\le ", r"\ge "] * 3, r"\ne ", r"\approx ", r"\approx ", r"\infty ", r"\cup ",
        r"\cap ", r"\in ", r"\notin ", r"\emptyset ", r"\pm ", r"\mp ", r"\setminus ",
    ])),
    **dict(zip("αβγδεζηθλμνξπρστφχψωΔΓΘΛΣΦΨΩϕϵ", (
        r"\%s " % name for name in "alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi "
        "chi psi omega Delta Gamma Theta Lambda Sigma Phi Psi Omega phi epsilon".split()
    ))),
    **{letter: r"\mathbb{%s}" % plain for letter, plain in zip("ℝℤℕℚℂ", "RZNQC")},
    **dict(zip("°√∛⌊⌋⌈⌉⟨⟩∠△|‖′’‘“”…€£¥¢∧∨⇒→≡∣", [
        r"\degree ", r"\sqrt ", r"\cbrt ", r"\lfloor ", r"\rfloor ", r"\lceil ", r"\rceil ", r"\langle ", r"\rangle ",
        r"\angle ", r"\triangle ", "|", r"\| ", "'", "'", "'", "'", "'", r"\ldots ", *[""] * 4, r"\land ", r"\lor ",
        r"\Rightarrow ", r"\to ", r"\equiv ", r"\mid ",
    ])),
    "\u200b": "", "\ufeff": "", "\u2061": "", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u2212": "-",
}  # fmt: skip
FRACTIONS = {c: unicodedata.normalize("NFKC", c).split("⁄") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
UNICODE.update({c: r"\frac{%s}{%s}" % (n, d) for c, (n, d) in FRACTIONS.items()})
UNICODE = str.maketrans(UNICODE)

REWRITES = [(re.compile(pattern), by) for pattern, by in [
    (r"(?<=\d)\s*\.\.\.+", r"\\ldots "), (r"\x08oxed", r"\\boxed"), (r"\x0crac", r"\\frac"),  # "\b" and "\f" eaten by an escape
    (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|pi|text|left|right|cdot|times|infty|cup|begin|end|boxed|in|pm)(?![a-z]))", r"\\"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?![a-zA-Z])", r"\\degree "),
    (r"\\\$|\$|\\[()\[\]](?!\d+(?:pt|em|ex))", " "),  # currency and the borders of formulas
    (r"(?i)\b(?:US)?\s?(?:USD|Rs\.?)(?=\s*\d)", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|left\.|right\.|noindent|boldsymbol|mathbf|bm|bf|mathit|vec|rm"
     r"|(?:left|right|big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])|middle|hline|mathcal|hat|widehat|underline|boxed|fbox|phantom"
     r"|mathsf|mathopen|mathclose|mathstrut|thinspace|nolinebreak|hfill)(?![a-zA-Z])", " "),
    (r"\\(?:color|textcolor)\s*\{[^{}]*\}|\\(?:tag|label|hspace|vspace)\*?\s*\{[^{}]*\}", " "),
    (r"([\])])\s*(?:U|u|union|OR)\s*(?=[\[(])", r"\1\\cup "),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"(?<=[\d)])!=", "! ="),  # 5!=120 is a factorial, x != 5 is not
]]  # fmt: skip
TRAILING = re.compile(r"(?:[\s.,;:~]|\\\\|\\[,;:! ]|\\q?quad|\*\*)+$")

GAP = r"(?:,\s?\\!\s?|\{,\}\s?|\\[,!;: ]\s?|\\thinspace\s?|~)"
NUMBER = r"(?:{}(?:\.\d+)?(?![\d])|\d+\{{,\}}\d+|\d+\.?\d*|\.\d+)".format
OUTSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,| (?!\d+\s*/))\d{{3}}(?!\d))+"))
INSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,(?=0\d\d))\d{{3}}(?!\d))+"))  # (12,102) are two numbers
EXPONENT = re.compile(r"[eE]([+-]?\d{1,5})(?![\d.])")
REPEATING = re.compile(r"\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
LEXEME = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:!> ]|\\q?quad(?![a-zA-Z]))+)"
    r"|(?P<begin>\\begin\s*\{(?P<name>[a-zA-Z]+)\*?\}(?:\s*\{[clr|@ ]*\})?)|(?P<end>\\end\s*\{[a-zA-Z]+\*?\})"
    r"|(?P<set>\\mathbb\s*\{\s*(?P<letter>[A-Z])\s*\})|(?P<number>\d|\.(?=\d))|(?P<command>\\[a-zA-Z]+)"
    r"|(?P<letters>[a-zA-Z]+)|(?P<symbol>\\.|<=|>=|!=|==|\*\*|=>|\+/?-|\.\.\.|.)", re.S,
)  # fmt: skip

FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth arsinh arcosh artanh log ln "
    "exp abs floor ceil min max gcd lcm conj Re Im det".split()
)
ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "acot": "arccot", "tg": "tan", "ctg": "cot", "cosec": "csc",
    "arctg": "arctan", "lg": "log10", "asinh": "arsinh", "acosh": "arcosh", "atanh": "artanh", "ceiling": "ceil",
}  # fmt: skip
SYMBOLS = {
    "+": "+", "-": "-", "*": "*", "/": "/", "^": "^", "**": "^", "_": "_", "!": "!", "%": "%", "\\%": "%", "'": "prime",
    "(": "(", ")": ")", "[": "[", "]": "]", "{": "{", "}": "}", "\\{": "set{", "\\}": "set}", "|": "|", "\\|": "|",
    ",": ",", ";": ";", ":": ":", "&": "&", "\\\\": "newline", "+-": "pm", "+/-": "pm",
}  # fmt: skip
RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "=>": ">=", "!=": "!=", "\\le": "<=", "\\leq": "<=",
    "\\leqslant": "<=", "\\leqq": "<=", "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\geqq": ">=", "\\lt": "<",
    "\\gt": ">", "\\ne": "!=", "\\neq": "!=", "\\approx": "~", "\\simeq": "~", "\\cong": "~", "\\equiv": "=",
    "\\in": "in", "\\notin": "notin", "\\doteq": "~",
}  # fmt: skip
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Delta Gamma Theta Lambda Sigma Phi Psi Omega ell hbar".split()
)
COMMANDS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "pm", "mp": "mp", "cup": "cup", "bigcup": "cup",
    "cap": "cap", "setminus": "minus", "backslash": "minus", "lvert": "|", "rvert": "|", "vert": "|", "Vert": "|",
    "lVert": "|", "rVert": "|", "mid": "mid", "colon": ":", "lbrace": "set{", "rbrace": "set}", "lbrack": "[",
    "rbrack": "]", "lparen": "(", "rparen": ")", "langle": "langle", "rangle": "rangle", "lfloor": "lfloor",
    "rfloor": "rfloor", "lceil": "lceil", "rceil": "rceil", "frac": "frac", "dfrac": "frac", "tfrac": "frac",
    "cfrac": "frac", "sqrt": "sqrt", "cbrt": "cbrt", "binom": "binom", "dbinom": "binom", "tbinom": "binom",
    "choose": "choose", "infty": "inf", "emptyset": "empty", "varnothing": "empty", "degree": "deg", "prime": "prime",
    "angle": "name", "triangle": "name", "overline": "over", "bar": "over", "overrightarrow": "name", "land": "and",
    "wedge": "and", "lor": "or", "vee": "or", "pmod": "pmod", "percent": "%", "newline": "newline", "cr": "newline",
    "Rightarrow": "so", "implies": "so", "longrightarrow": "so", "lor ": "or", "operatornamewithlimits": "text",
    **dict.fromkeys("text textbf textit textrm textnormal mbox mathrm operatorname hbox textsf texttt emph".split(), "text"),
}  # fmt: skip
NUMERALS = dict(zip(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split(),
    range(17),
))  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = set(
    "cm mm km dm nm ft in mi yd kg mg lb lbs oz ml hr hrs min mins sec secs mph kph usd day days cup cups sq cu pm am "
    "kw hz rad rads deg pts ways ms kj pa mol gal ft. per eur gbp inr rpm".split()
)
WORDS = set("yes no not odd even true false none all the one two six ten red east west dne if for any is are of to we".split())


def _number(text, at, inside):
    """The number literal at `at` as (value, unit in the last place or 0 for an integer, end)."""
    match = (INSIDE if inside else OUTSIDE).match(text, at)
    digits = re.sub(r"\{,\}(?=\d+$)" if re.search(r"\{,\}(?!\d{3}(?!\d))", match[0]) else r"(?!)", ".", match[0])
    digits = re.sub(r"[^\d.]", "", digits)
    end = match.end()
    whole, _, decimals = digits.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    ulp = Fraction(1, 10 ** len(decimals)) if decimals else Fraction(0)
    if "." in match[0] and (repeating := REPEATING.match(text, end)):
        period = repeating[1]
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return value, Fraction(0), repeating.end()
    if re.match(r"\s*\\[lc]?dots", text[end : end + 9]) and (tail := re.search(r"(\d+?)\1\1+$", decimals)):
        period = tail[1]  # 0.333... is 1/3
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return value, Fraction(0), end + re.match(r"\s*\\[lc]?dots", text[end:]).end()
    exponent = EXPONENT.match(text, end)
    if exponent and ("." in digits or digits == "1" or exponent[1][0] not in "+-" or len(exponent[1]) > 2):
        if abs(int(exponent[1])) > 4000:
            raise Unreadable("exponent too large")
        scale = Fraction(10) ** int(exponent[1])
        return value * scale, ulp * scale, exponent.end()
    return value, ulp, end


def _letters(run, mode, space, after):
    """Tokens of a run of letters: names of functions, products of variables, words. `after`: the token before it."""
    low = run.lower()
    if low in ("and", "or"):
        return [Token(low, low, run, space)]
    if low == "percent":
        return [Token("%", None, run, space)]
    if low in ("degree", "degrees"):
        return [Token("deg", None, run, space)]
    if len(run) == 1:
        if mode == "text" and run != "i":
            return [Token("word", low, run, space)]
        if mode == "roman" and after == "number" and run not in "ie":
            return [Token("word", low, run, space)]
        return [Token("const" if run in "ie" else "sym", run, run, space)]
    if mode != "text":
        if low in ("inf", "infinity", "oo"):
            return [Token("inf", None, run, space)]
        if low in UNITS and after in ("number", "word"):
            return [Token("word", low, run, space)]
        if run in FUNCTIONS or low in ALIASES:
            return [Token("fn", ALIASES.get(low, run), run, space)]
        if low in ("sqrt", "cbrt", "binom", "frac"):
            return [Token(low, None, run, space)]
        if low == "pi":
            return [Token("const", "pi", run, space)]
        if low == "in" or low == "union":
            return [Token("rel" if low == "in" else "cup", "in", run, space)]
        if run in GREEK:
            return [Token("sym", run, run, space)]
        mixed = re.fullmatch(r"([a-zA-Z]?)(sqrt|sin|cos|tan|cot|log|ln|pi|theta)([a-zA-Z]?)", run)
        if mixed and mode is None:
            return [token for part in mixed.groups() if part for token in _letters(part, mode, False, None)]
    sequence = "".join(sorted(run)) == run or run.isupper()  # abcd, ABCD: products, not words
    if mode or low in WORDS | UNITS or low in NUMERALS or (len(run) > 3 and not sequence) or (len(run) > 2 and run.istitle()):
        return [Token("word", low, run, space)]
    return [token for letter in run for token in _letters(letter, None, False, None)]


def _tokens(text, mode=None):
    """The tokens of a normalised text. mode: None, "text" (inside \\text{}) or "roman" (inside \\mathrm{})."""
    tokens, at, space, brackets = [], 0, False, 0
    while at < len(text):
        match = LEXEME.match(text, at)
        kind, lexeme, at = match.lastgroup, match[0], match.end()
        if kind == "name":
            kind = "begin"
        elif kind == "letter":
            kind = "set"
        if kind == "space":
            space = True
            continue
        if kind == "number":
            value, ulp, at = _number(text, match.start(), brackets > 0)
            tokens.append(Token("number", (value, ulp), text[match.start() : at], space))
        elif kind == "begin":
            tokens.append(Token("begin", match["name"], lexeme, space))
        elif kind == "end":
            tokens.append(Token("end env", None, lexeme, space))
        elif kind == "set":
            tokens.append(Token("number set", match["letter"], lexeme, space))
        elif kind == "letters":
            if mode:  # sq.ft, km/h and don't are one word
                rest = re.match(r"(?:['.\-/][a-zA-Z]+)*\.?", text[at:])[0]
                lexeme, at = lexeme + rest, at + len(rest)
            after = tokens[-1].kind if tokens else None
            tokens += _letters(lexeme, mode, space, after)
        elif kind == "command":
            name = lexeme[1:]
            what = COMMANDS.get(name)
            if what == "text":
                while at < len(text) and text[at] == " ":
                    at += 1
                end = _braced(text, at) if text[at : at + 1] == "{" else None
                if end is None:
                    raise Unreadable("text without its group")
                inner = "roman" if name in ("mathrm", "operatorname") else "text"
                after = tokens[-1].kind if tokens else None
                content = _tokens(text[at + 1 : end - 1].replace("\\ ", " "), inner)
                if content and content[0].kind == "sym" and after == "number" and inner == "roman" and len(content) == 1:
                    content = [Token("word", content[0].text, content[0].text, space)]
                tokens += [token._replace(space=True) if i == 0 else token for i, token in enumerate(content)]
                at = end
            elif what:
                tokens.append(Token(what, name, lexeme, space))
            elif lexeme in RELATIONS:
                tokens.append(Token("rel", RELATIONS[lexeme], lexeme, space))
            elif name == "pi":
                tokens.append(Token("const", "pi", lexeme, space))
            elif name in FUNCTIONS or name in ALIASES:
                tokens.append(Token("fn", ALIASES.get(name, name), lexeme, space))
            elif name in GREEK:
                tokens.append(Token("sym", name, lexeme, space))
            else:
                raise Unreadable(f"unknown command {lexeme}")
        elif lexeme in RELATIONS:
            tokens.append(Token("rel", RELATIONS[lexeme], lexeme, space))
        elif lexeme in SYMBOLS:
            kind = SYMBOLS[lexeme]
            brackets += (kind in ("(", "[", "set{")) - (kind in (")", "]", "set}"))
            tokens.append(Token(kind, None, lexeme, space))
        elif not (mode and lexeme in ".\"`?"):
            raise Unreadable(f"unknown character {lexeme!r}")
        space = False
    return tokens


# ------------------------------------------------------------------------------------------------ the parser
#
# A tree is a nested tuple (tag, ...):
#   values      ("num", Fraction, ulp) ("sym", name) ("const", "pi"|"e"|"i") ("inf",) ("add", a, ...) ("mul", a, ...) ("neg", a)
#               ("div", a, b) ("pow", a, b) ("root", n, a) ("fn", name, a, ...) ("call", f, a, ...) ("pm"|"mp", a, b)
#               ("pct", a) ("deg", a) ("based", value, base) ("ratio", a, b, ...) ("mod", a, m)
#   collections ("list", separator, a, ...) ("set", a, ...) ("tuple", a, ...) ("matrix", row, ...), a row being a tuple
#   sets        ("interval", low, high, "[" or "(", "]" or ")") ("cup"|"cap"|"minus", a, b) ("reals",) ("empty",)
#               ("number set", letter) ("builder", what, condition, ...)
#   statements  ("rel", operators, sides)
#   words       ("text", words); ("raw", string) for what cannot be parsed

ZERO, ONE, MINUS_ONE = (("num", Fraction(n), Fraction(0)) for n in (0, 1, -1))
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
INVERSES = {f: "arc" + f for f in TRIGONOMETRIC} | {"sinh": "arsinh", "cosh": "arcosh", "tanh": "artanh"}
OPERANDS = {
    "number", "sym", "const", "fn", "(", "[", "{", "set{", "frac", "sqrt", "cbrt", "binom", "begin", "inf", "lfloor",
    "lceil", "langle", "number set", "empty", "over", "name",
}  # fmt: skip
LEAD_IN = set(
    "the a an answer final is are was so thus hence therefore equals equal to value result solution solutions we get "
    "have choice option approximately about roughly exactly that it be of".split()
)


def _rebuild(node, fn):
    """The tree with `fn` applied to every node, leaves first."""
    return fn(tuple(_rebuild(child, fn) if isinstance(child, tuple) else child for child in node))


def _product(a, b):
    return ("mul", *(a[1:] if a[0] == "mul" else (a,)), b)


def _is_integer(node):
    return node[0] == "num" and node[2] == 0 and node[1].denominator == 1


def _is_domain(node):
    """n \\in \\mathbb Z, which beside 2\\pi n says nothing new."""
    return node[0] == "rel" and node[1] == ("in",) and node[2][0][0] in ("sym", "list") and node[2][1][0] == "number set"


class _Parser:
    """Recursive descent over a list of tokens; each method consumes what it is named after and returns its tree."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, Token("end"), Token("end")], 0, 0
        self.bars = ["open"]  # what "|" means: "open" starts an absolute value, "abs" ends one, "set" is "such that"

    @property
    def kind(self):
        return self.tokens[self.at].kind

    def take(self, kind=None):
        token = self.tokens[self.at]
        if kind is not None and token.kind != kind:
            raise Unreadable(f"found {token.text or token.kind!r} where {kind!r} was expected")
        self.at += 1
        return token

    def accept(self, *kinds):
        return self.take() if self.kind in kinds else None

    def inside(self, opening, method, *args):
        """`method`, one level deeper, with "|" meaning what it means after `opening`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        self.bars.append(opening)
        result = method(*args)
        self.bars.pop()
        self.depth -= 1
        return result

    # collections and statements

    def answer(self):
        result = self.items("end")
        self.take("end")
        return result

    def items(self, *closers):
        """Clauses up to a closing token; more than one make a list."""
        found, separators = [], set()
        while self.kind not in closers:
            found.append(self.clause())
            if self.kind in closers:
                break
            separator = self.accept(",", ";", "and", "or", "newline")
            if separator is None:
                raise Unreadable(f"{self.tokens[self.at].text!r} after a complete expression")
            separators.add(separator.kind)
            while separator := self.accept(",", ";", "and", "or", "newline"):
                separators.add(separator.kind)
        if not found:
            raise Unreadable("nothing there")
        found = [clause for clause in found if not _is_domain(clause)] or found
        kind = "or" if "or" in separators else "and" if "and" in separators else ","
        return found[0] if len(found) == 1 else ("list", kind, *found)

    def clause(self):
        left = self.ratio()
        if left[0] == "text" and self.accept(":"):  # Total: 5
            left = self.ratio()
        operators, sides = [], [left]
        while self.kind in ("rel", "so", "&"):
            if self.kind == "&" and self.bars[-1] != "aligned":
                break
            if self.accept("&"):
                continue
            if self.accept("so"):  # of a chain of implications the last counts
                operators, sides = [], [self.ratio()]
                continue
            operators.append(self.take().value)
            if self.bars[-1] == "aligned":
                self.accept("&")
            sides.append(self.ratio())
        if self.accept("pmod"):
            modulus = self.argument()
            sides[-1] = ("mod", sides[-1], modulus)
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def ratio(self):
        parts = [self.set_expression()]
        while self.kind == ":" and self.bars[-1] != "set" and parts[0][0] != "text":
            self.take()
            parts.append(self.set_expression())
        return ("ratio", *parts) if len(parts) > 1 else parts[0]

    def set_expression(self):
        left = self.sum()
        while token := self.accept("cup", "cap", "minus"):
            left = (token.kind, left, self.sum())
        return left

    # values

    def sum(self):
        self.lead_in()
        if token := self.accept("pm", "mp"):
            total = (token.kind, ZERO, self.term())
        else:
            total = self.signed(self.term)
        while token := self.accept("+", "-", "pm", "mp"):
            if token.kind in ("pm", "mp"):
                total = (token.kind, total, self.term())
                continue
            term = self.signed(self.term)
            term = ("neg", term) if token.kind == "-" else term
            total = ("add", *(total[1:] if total[0] == "add" else (total,)), term)
        return total

    def signed(self, method):
        signs = 0
        while token := self.accept("+", "-"):
            signs += token.kind == "-"
        value = method()
        return ("neg", value) if signs % 2 else value

    def lead_in(self):
        """Skips the words of "the answer is 5"; any others are left to `atom`."""
        end = self.at
        while self.tokens[end].kind == "word":
            end += 1
        words = [token.value for token in self.tokens[self.at : end]]
        if words and self.tokens[end].kind in OPERANDS | {"-", "+", "pm", "|"} and not {"not", "no"} & set(words):
            if words[-1] in ("is", "are", "equals", "be") or set(words) <= LEAD_IN:
                self.at = end

    def starts_operand(self):
        return self.kind in OPERANDS or (self.kind == "|" and self.bars[-1] in ("open", "aligned"))

    def term(self):
        value = self.factor()
        while True:
            if self.accept("*"):
                value = _product(value, self.signed(self.factor))
            elif self.kind == "/" and self.tokens[self.at + 1].kind != "word":
                self.take()
                value = ("div", value, self.signed(self.factor))
            elif self.kind in ("word", "/"):
                value = self.units(value)
                if self.starts_operand():
                    raise Unreadable("an expression goes on after its unit")
            elif self.starts_operand():
                if value[0] == "num" and self.kind == "number":
                    raise Unreadable("two numbers side by side")
                value = _product(value, self.factor())
            else:
                return value

    def units(self, value):
        """Skips `cm^2` or `miles per hour`; `million` multiplies."""
        while self.kind == "word" or (self.kind in "/*" and self.tokens[self.at + 1].kind == "word"):
            if value[0] == "text":
                raise Unreadable("words and units")
            token = self.take()
            if token.value in SCALES:
                value = _product(value, ("num", Fraction(SCALES[token.value]), Fraction(0)))
            if self.accept("^"):
                self.script()
        return value

    def factor(self):
        """A power, or a mixed number such as 1\\frac45 or 2 1/3."""
        value = self.power()
        if not _is_integer(value) or self.tokens[self.at - 1].kind != "number":
            return value
        if self.kind == "frac":
            mark = self.at
            part = self.power()
            if part[0] == "div" and _is_integer(part[1]) and _is_integer(part[2]) and 0 < part[1][1] < part[2][1]:
                return ("num", value[1] + part[1][1] / part[2][1], Fraction(0))
            if part[0] in ("pct", "deg") and part[1][0] == "div" and part[1][1][0] == part[1][2][0] == "num":
                return (part[0], ("add", value, part[1]))
            return _product(value, part) if self.at > mark else value
        top, slash, bottom = self.tokens[self.at], self.tokens[self.at + 1], self.tokens[min(self.at + 2, len(self.tokens) - 1)]
        if top.kind == bottom.kind == "number" and slash.kind == "/" and top.space and 0 < top.value[0] < bottom.value[0]:
            self.at += 3
            return ("num", value[1] + top.value[0] / bottom.value[0], Fraction(0))
        return value

    def power(self):
        value = self.atom()
        for _ in range(10):
            if self.accept("!"):
                value = ("fn", "fact", value)
            elif self.accept("%"):
                value = ("pct", value)
            elif self.accept("deg"):
                value = ("deg", value)
            elif self.accept("^"):
                if self.accept("prime"):
                    continue
                value = ("pow", value, self.script())
            elif self.kind == "prime" and value[0] == "sym":
                self.take()
                value = ("sym", value[1] + "'")
            else:
                return value
        raise Unreadable("too many postfix operators")

    def script(self):
        """An exponent: a group, or one signed token; 2^3^2 is 2^(3^2)."""
        if self.kind == "{":
            value = self.group()
        else:
            value = self.signed(self.inside_atom)
        return ("pow", value, self.inside("open", self.script)) if self.accept("^") else value

    def inside_atom(self):
        return self.inside(self.bars[-1], self.atom)

    def argument(self):
        """What \\frac takes: a group, or one token, of a number its first digit."""
        token = self.tokens[self.at]
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            digit, rest = token.text[0], token.text[1:]
            self.tokens[self.at] = Token("number", (Fraction(int(rest)), Fraction(0)), rest)
            return ("num", Fraction(int(digit)), Fraction(0))
        return self.group() if token.kind == "{" else self.inside_atom()

    def group(self):
        self.take("{")
        value = self.inside("open", self.items, "}", "choose")
        if self.accept("choose"):
            value = ("fn", "binom", value, self.inside("open", self.items, "}"))
        self.take("}")
        return value

    def subscript(self):
        """The text of a subscript, as part of a name or as a base."""
        self.take("_")
        if not self.accept("{"):
            return self.take().text
        text = ""
        while self.kind != "}":
            if self.kind == "end":
                raise Unreadable("an open subscript")
            text += self.take().text
        self.take("}")
        return text

    def atom(self):
        token = self.tokens[self.at]
        method = getattr(self, "atom_" + token.kind.replace(" ", "_"), None)
        if method is not None:
            return method()
        if token.kind in BRACKETS:
            return self.inside("open", self.bracket)
        if token.kind == "{":
            return self.group()
        if token.kind == "set{":
            return self.inside("set", self.braces)
        if token.kind == "|":
            self.take()
            value = self.inside("abs", self.sum)
            self.take("|")
            return ("fn", "abs", value)
        raise Unreadable(f"found {token.text or token.kind!r} where a value was expected")

    def atom_number(self):
        token = self.take()
        if self.kind == "_":
            base = self.subscript().lower()
            base = NUMERALS.get(base, int(base) if base.isdecimal() and len(base) < 3 else 0)
            if not token.text.isdigit() or not 2 <= base <= 36 or int(max(token.text)) >= base:
                raise Unreadable("a number with a subscript that is no base")
            return ("based", int(token.text, base), base)
        return ("num", *token.value)

    def atom_sym(self):
        name = self.take().value
        if self.kind == "_":
            name += "_" + self.subscript()
        if self.kind == "(" and self.is_call(name):
            self.take()
            arguments = self.inside("open", self.items, ")")
            self.take(")")
            return ("call", name, *(arguments[2:] if arguments[0] == "list" else (arguments,)))
        return ("sym", name)

    def is_call(self, name):
        """f(x) rather than a product: by its name, or because it stands before an equals sign, as in P(n) = ..."""
        depth, end = 0, self.at
        while self.tokens[end].kind != "end":
            depth += (self.tokens[end].kind == "(") - (self.tokens[end].kind == ")")
            if depth == 0:
                break
            end += 1
        return name in ("f", "g", "h") or (self.tokens[end + 1 if depth == 0 and end + 1 < len(self.tokens) else -1].kind == "rel")

    def atom_const(self):
        return ("const", self.take().value)

    def atom_inf(self):
        self.take()
        return ("inf",)

    def atom_empty(self):
        self.take()
        return ("empty",)

    def atom_number_set(self):
        letter = self.take().value
        return ("reals",) if letter == "R" else ("number set", letter)

    def atom_word(self):
        words = []
        while self.kind == "word":
            words.append(self.take().value.strip("."))
        words = [word for word in words if word not in ("the", "a", "an")] or words
        if self.kind not in ("end", ",", ";", "and", "or", "rel", ":", "newline", "}", ")"):
            raise Unreadable("words and mathematics")
        return TEXT_VALUES.get(" ".join(words), ("text", " ".join(words)))

    def atom_name(self):
        """\\angle ABC, \\triangle ABC, \\overrightarrow{AB}"""
        name = self.take().value
        return ("text", name + repr(self.argument() if self.kind == "{" else self.term()))

    def atom_over(self):
        self.take()
        return ("fn", "conj", self.argument())

    def atom_frac(self):
        self.take()
        return ("div", self.argument(), self.argument())

    def atom_binom(self):
        self.take()
        if self.kind == "(":
            pair = self.atom()
            if pair[0] != "tuple" or len(pair) != 3:
                raise Unreadable("binom takes two arguments")
            return ("fn", "binom", *pair[1:])
        return ("fn", "binom", self.argument(), self.argument())

    def atom_sqrt(self):
        self.take()
        degree = ("num", Fraction(2), Fraction(0))
        if self.accept("["):
            degree = self.inside("open", self.sum)
            self.take("]")
        return ("root", degree, self.group() if self.kind == "{" else self.inside_atom())

    def atom_cbrt(self):
        self.take()
        return ("root", ("num", Fraction(3), Fraction(0)), self.group() if self.kind == "{" else self.inside_atom())

    def atom_fn(self):
        name, power, base = self.take().value, None, None
        while self.kind in ("^", "_"):
            if self.accept("^"):
                power = self.script()
            else:
                self.take("_")
                base = self.group() if self.kind == "{" else self.inside_atom()
        if self.kind in ("(", "{", "["):
            value = self.inside("open", self.arguments)
        else:
            value = (self.inside(self.bars[-1], self.signed, self.juxtaposed),)
        if name == "log10":
            name, base = "log", ("num", Fraction(10), Fraction(0))
        if name in TRIGONOMETRIC:  # a degree sign means something inside a sine and nothing elsewhere
            radians = ("div", ("const", "pi"), ("num", Fraction(180), Fraction(0)))
            value = tuple(_rebuild(v, lambda node: _product(node[1], radians) if node[0] == "deg" else node) for v in value)
        if power == MINUS_ONE or power == ("neg", ONE):
            name, power = INVERSES.get(name, name), None if name in INVERSES else power
        result = ("fn", name, *value, *((base,) if base else ()))
        return ("pow", result, power) if power else result

    def arguments(self):
        close = {"(": ")", "{": "}", "[": "]"}[self.take().kind]
        value = self.items(close)
        self.take(close)
        return value[2:] if value[0] == "list" else (value,)

    def juxtaposed(self):
        """The argument of a function without brackets: \\sin 2\\pi x, up to an operator or the next function."""
        value = self.factor()
        while self.starts_operand() and self.kind not in ("fn", "(", "["):
            value = _product(value, self.factor())
        return value

    # brackets

    def bracket(self):
        opening = self.take().kind
        closers = BRACKETS[opening]
        if opening == "[" and self.kind == "]" or opening == "(" and self.kind == ")":
            raise Unreadable("empty brackets")
        content = self.items(*closers)
        closing = self.take().kind
        items = content[2:] if content[0] == "list" and content[1] == "," else (content,)
        if opening in ("lfloor", "lceil"):
            return ("fn", opening[1:], content)
        if len(items) == 1:
            if opening + closing not in ("()", "[]"):
                raise Unreadable("one item in unlike brackets")
            return content
        if opening == "(" and closing == ")" or opening == "langle":
            return ("tuple", *items)
        rows = [item[1:3] if item[0] == "interval" and item[3:] == ("[", "]") else item[2:] for item in items]
        nested = all(item[0] == "list" or item[0] == "interval" and item[3:] == ("[", "]") for item in items)
        if nested and len({len(row) for row in rows}) == 1:
            return ("matrix", *rows)
        if len(items) == 2:
            return ("interval", *items, opening, closing)
        return ("list", ",", *items)

    def braces(self):
        self.take("set{")
        if self.accept("set}"):
            return ("empty",)
        first = self.items("set}", "|", "mid", ":")
        if self.accept("|", "mid", ":"):
            condition = self.items("set}")
            self.take("set}")
            return ("builder", first, condition)
        self.take("set}")
        return ("set", *(first[2:] if first[0] == "list" else (first,)))

    def atom_begin(self):
        environment = self.take().value
        if environment in ("vmatrix", "Vmatrix"):
            raise Unreadable("a determinant")
        if not environment.endswith("matrix") and environment != "array":
            value = self.inside("aligned", self.items, "end env")
            self.take("end env")
            return value
        rows, row = [], []
        while True:
            row.append(self.inside("open", self.clause))
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            while self.accept("newline"):
                pass
            if self.accept("end env"):
                break
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different length")
        return ("matrix", *rows)


BRACKETS = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
TEXT_VALUES = {
    **{words: ("empty",) for words in (
        "no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none", "no such",
    )},
    **{words: ("reals",) for words in ("all real numbers", "all reals", "real numbers", "reals", "all real")},
    **{words: ("text", "dne") for words in ("does not exist", "undefined", "not defined")},
    "infinity": ("inf",),
    **{word: ("num", Fraction(value), Fraction(0)) for word, value in NUMERALS.items()},
}  # fmt: skip


def _normalise(text):
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ]+", lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}", text)
    text = text.translate(UNICODE)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    return TRAILING.sub("", text).strip()


@lru_cache(maxsize=8192)
def read(text):
    """The tree of an answer; ("raw", its characters) if it is too long or no mathematics that this file knows."""
    if len(text) > MAX_ANSWER:
        return ("raw", "".join(text.split()))
    normal = _normalise(text)
    try:
        tokens = _tokens(normal)
        return _Parser(tokens).answer()
    except Unreadable:
        return ("raw", re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*|[\s{}]|\\[,;:! ]", "", normal).lower())


# ------------------------------------------------------------------------------------------------ values


@lru_cache(maxsize=8192)
def symbols(node):
    """The names of a tree's variables."""
    if node[0] == "sym":
        return frozenset((node[1],))
    found = frozenset((node[1] + "()",)) if node[0] == "call" else frozenset()
    return found.union(*(symbols(child) for child in node if isinstance(child, tuple) and child))


def _has(node, *tags):
    return node[0] in tags or any(_has(child, *tags) for child in node if isinstance(child, tuple) and child)


def _bounded(value):
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise OverflowError("too many digits")
    return value


def _integer_root(value, degree):
    """The exact root of a fraction, or None."""
    roots = []
    for part in (value.numerator, value.denominator):
        low, high = 0, 1 << (part.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= part else (low, middle - 1)
        if low**degree != part:
            return None
        roots.append(low)
    return Fraction(*roots)


def _integer(node, modulus=None):
    value = _rational(node, None)
    if value is None or value.denominator != 1:
        raise ArithmeticError("no integer")
    return value.numerator


def _power(base, exponent, modulus):
    """base ** exponent in rational arithmetic, or None if that is irrational."""
    if modulus:
        if exponent.denominator != 1:
            return None
        return pow(base, exponent.numerator, modulus)
    if exponent.denominator != 1:
        if not 1 < exponent.denominator <= 64 or base < 0:
            return None
        base = _integer_root(base, exponent.denominator)
        if base is None:
            return None
    power = exponent.numerator
    if max(base.numerator.bit_length() - 1, base.denominator.bit_length() - 1) * abs(power) > MAX_BITS:
        raise OverflowError("too many digits")
    return base**power


def _rational(node, modulus):
    """The exact value of a rational constant, modulo a prime if one is given; None if it is irrational or no constant.

    Raises OverflowError beyond MAX_BITS, other ArithmeticErrors where the value is undefined.
    """
    tag = node[0]
    if tag == "num":
        return node[1].numerator * pow(node[1].denominator, -1, modulus) % modulus if modulus else _bounded(node[1])
    if tag == "pow":
        base, exponent = _rational(node[1], modulus), _rational(node[2], None)
        return None if base is None or exponent is None else _power(base, exponent, modulus)
    if tag == "root":
        degree, base = _rational(node[1], None), None if modulus else _rational(node[2], None)
        if base is None or degree is None or degree.denominator != 1 or not 1 <= degree <= 64:
            return None
        if base < 0:
            root = _integer_root(-base, degree.numerator) if degree % 2 else None
            return root if root is None else -root
        return _integer_root(base, degree.numerator)
    if tag == "fn" and node[1] == "fact":
        n = _integer(node[2])
        if not 0 <= n <= (20_000 if modulus else 3_000):
            raise OverflowError("factorial")
        result = 1
        if not modulus:
            return Fraction(math.factorial(n))
        for factor in range(2, n + 1):
            result = result * factor % modulus
        return result
    if tag == "fn" and node[1] == "binom":
        n, k = _integer(node[2]), _integer(node[3])
        if not 0 <= n <= 20_000:
            raise OverflowError("binomial")
        value = math.comb(n, k) if k >= 0 else 0
        return value % modulus if modulus else Fraction(value)
    if tag == "fn" and node[1] in EXACT and not modulus:
        values = [_rational(child, None) for child in node[2:]]
        return None if None in values else Fraction(EXACT[node[1]](*values))
    if tag not in ("add", "mul", "neg", "div", "deg", "pct", "mod"):
        return None
    result = None
    for child in node[1:2] if tag == "mod" else node[1:]:
        value = _rational(child, modulus)
        if value is None:
            return None
        if result is None:
            result = value
        elif tag == "add":
            result += value
        elif tag == "mul":
            result *= value
        else:
            result = result * pow(value, -1, modulus) if modulus else result / value
        result = result % modulus if modulus else _bounded(result)
    if tag == "pct":
        result = result * pow(100, -1, modulus) if modulus else result / 100
    return -result if tag == "neg" else result


EXACT = {
    "abs": abs, "floor": math.floor, "ceil": math.ceil, "min": lambda *a: min(a), "max": lambda *a: max(a),
    "gcd": lambda *a: math.gcd(*(int(v) for v in a)), "lcm": lambda *a: math.lcm(*(int(v) for v in a)),
}  # fmt: skip
PRIMES = (2**61 - 1, 2**89 - 1)


@lru_cache(maxsize=8192)
def exact(node):
    """A rational constant as a Fraction, or as its residues when it is too long to write out; None: no such constant."""
    try:
        return _rational(node, None)
    except OverflowError:
        pass
    except (ArithmeticError, ValueError, TypeError):
        return None
    try:
        residues = tuple(_rational(node, prime) for prime in PRIMES)
        return None if None in residues else residues
    except (ArithmeticError, ValueError, TypeError):
        return None


DERIVED = {
    "cot": lambda m, x: m.cos(x) / m.sin(x), "sec": lambda m, x: 1 / m.cos(x), "csc": lambda m, x: 1 / m.sin(x),
    "arcsin": lambda m, x: m.asin(x), "arccos": lambda m, x: m.acos(x), "arctan": lambda m, x: m.atan(x),
    "arccot": lambda m, x: m.atan(1 / x), "arcsec": lambda m, x: m.acos(1 / x), "arccsc": lambda m, x: m.asin(1 / x),
    "arsinh": lambda m, x: m.asinh(x), "arcosh": lambda m, x: m.acosh(x), "artanh": lambda m, x: m.atanh(x),
    "coth": lambda m, x: m.cosh(x) / m.sinh(x), "ln": lambda m, x: m.log(x), "abs": lambda m, x: abs(x) + 0j,
    "conj": lambda m, x: x.conjugate(), "Re": lambda m, x: x.real + 0j, "Im": lambda m, x: x.imag + 0j,
    **{name: (lambda name: lambda m, x: getattr(m, name)(x))(name) for name in "sin cos tan sinh cosh tanh exp".split()},
}  # fmt: skip


@lru_cache(maxsize=64)
def _arithmetic(digits, thread):
    """mpmath with a fixed precision; its own for each thread, since some functions change the precision for a while."""
    import mpmath

    context = mpmath.MPContext()
    context.dps = digits
    return context


@lru_cache(maxsize=4096)
def _point(name, index, real):
    """Where a variable stands at the sample point of this index: by its name, so that the same everywhere."""
    rng = random.Random(f"{name} {index}")
    if real:
        return complex(rng.choice((-1, 1)) * rng.uniform(0.2, 3.0), 0.0)
    return cmath.rect(rng.uniform(0.5, 1.9), rng.uniform(-math.pi, math.pi))


def _real(x):
    if abs(x.imag) > 1e-9 * (1 + abs(x.real)):
        raise ValueError("not real")
    return x.real


def _tame(m, x, bits):
    """x, unless it is so large that a function of it would fill the memory."""
    if m is not cmath and (not m.isfinite(x) or m.mag(x) > bits):
        raise OverflowError("too large")
    return x


def evaluate(node, index, real, m):
    """The value of a tree at a sample point. m: cmath, or an mpmath context. Raises ArithmeticError, ValueError."""
    tag = node[0]
    if tag == "num":
        value = node[1]
        return complex(value) if m is cmath else m.mpc(value.numerator) / value.denominator
    if tag == "sym":
        return _point(node[1], index, real) if m is cmath else m.mpc(_point(node[1], index, real))
    if tag == "const":
        number = {"pi": m.pi, "e": m.e, "i": 1j}[node[1]]
        return complex(number) if m is cmath else m.mpc(number)
    if tag == "fn" and node[1] in ("fact", "binom", "log", "floor", "ceil", "min", "max") or tag == "call":
        return _evaluate_function(node, [evaluate(child, index, real, m) for child in node[2:]], m)
    if tag == "fn":
        if node[1] not in DERIVED or len(node) != 3:
            raise ValueError("unknown function")
        argument = evaluate(node[2], index, real, m)
        return DERIVED[node[1]](m, _tame(m, argument, 17) if node[1] in ("exp", "sinh", "cosh") else _tame(m, argument, 500))
    if tag not in ("add", "mul", "neg", "div", "pow", "root", "deg", "pct", "ratio", "mod"):
        raise ValueError(f"{tag} has no value")
    values = [evaluate(child, index, real, m) for child in node[1:]]
    first = values[0]
    if tag == "add":
        result = sum(values[1:], first)
    elif tag == "mul":
        result = first
        for value in values[1:]:
            result *= value
    elif tag == "neg":
        result = -first
    elif tag in ("div", "ratio"):
        if len(values) != 2:
            raise ValueError("a ratio of three")
        result = first / values[1]
    elif tag == "pct":
        result = first / 100
    elif tag in ("deg", "mod"):
        result = first
    else:
        base, exponent = (first, values[1]) if tag == "pow" else (values[1], 1 / first)
        if m is not cmath and base != 0:
            _tame(m, exponent * m.log(base), 17)
        odd = tag == "root" and abs(first.imag) < 1e-9 and round(float(first.real)) % 2 == 1
        if odd and abs(base.imag) < 1e-12 * abs(base.real) + 1e-300 and base.real < 0:
            result = -((-base) ** exponent)  # the real root of a negative number
        else:
            result = base**exponent
    return _tame(m, result, MAX_MAGNITUDE)


def _evaluate_function(node, values, m):
    name, x = node[1], values[0]
    if node[0] == "call":  # an unknown function: some fixed analytic one, by its name
        seeds = [_point(name, i, True).real for i in range(len(values) + 1)]
        return cmath_or(m).sin(sum((s * v for s, v in zip(seeds[1:], values)), _to(m, seeds[0])))
    if name == "log":
        return m.log(x) / (m.log(values[1]) if len(values) > 1 else 1)
    if name == "fact":
        return complex(math.gamma(_real(x) + 1)) if m is cmath else m.gamma(_tame(m, x, 17) + 1)
    if name == "binom":
        k = _real(values[1])
        if k != int(k) or not 0 <= k <= 500:
            raise ValueError("binomial")
        result = x * 0 + 1
        for i in range(int(k)):
            result = result * (x - i) / (i + 1)
        return result
    reals = [_real(value) for value in values]
    if name in ("floor", "ceil"):
        return _to(m, getattr(math, name)(reals[0]) if m is cmath else getattr(m, name)(_tame(m, reals[0], 300)))
    return _to(m, (min if name == "min" else max)(reals))


def cmath_or(m):
    return m


def _to(m, x):
    return complex(x) if m is cmath else m.mpc(x)


@lru_cache(maxsize=16384)
def _sample(node, index, real):
    """The value at a sample point as a complex, or None where it is undefined or out of range."""
    try:
        value = evaluate(node, index, real, cmath)
        return value if cmath.isfinite(value) else None
    except (ArithmeticError, ValueError, TypeError):
        return None


def _precise(node, index, real, digits):
    m = _arithmetic(digits, threading.get_ident())
    try:
        value = evaluate(node, index, real, m)
        return value if m.isfinite(value) else None
    except (ArithmeticError, ValueError, TypeError):
        return None


def _agree(a, b, index, real):
    """Whether two trees have one value at a sample point, to 45 digits; None if either has none."""
    x, y = _sample(a, index, real), _sample(b, index, real)
    if x is not None and y is not None and abs(x - y) > 1e-6 * max(abs(x), abs(y)) and abs(x - y) > 1e-9:
        return False
    for digits in (60, 400):  # 400 when the value is so small that it may be what rounding left of a zero
        x, y = _precise(a, index, real, digits), _precise(b, index, real, digits)
        if x is None or y is None:
            return None
        size = max(abs(x), abs(y))
        if size == 0 or abs(x - y) <= size * 1e-45:
            return True
        if size > 1e-40:
            return False
    return size < 1e-300


def same_function(a, b):
    """Whether two trees agree at random complex points, or else at real ones of both signs; None: undefined there."""
    if not symbols(a) | symbols(b):
        return _agree(a, b, 0, False)
    verdict = None
    for real in (False, True):
        hits = 0
        for index in range(8):
            agree = _agree(a, b, index, real)
            if agree is False:
                verdict = False
                break
            hits += agree is True
            if hits == 3:
                return True
    return verdict


def to_sympy(node):
    """The SymPy object of a value tree, built directly. Raises ValueError for what has none."""
    import sympy

    tag, children = node[0], node[2:] if node[0] in ("fn", "call") else node[1:]
    if tag == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if tag == "sym":
        return sympy.Symbol(node[1])
    if tag == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[node[1]]
    if tag == "inf":
        return sympy.oo
    values = [to_sympy(child) for child in children]
    if tag == "call":
        return sympy.Function(node[1])(*values)
    if tag == "fn":
        names = {
            "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc",
            "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "fact": "factorial", "binom": "binomial", "ln": "log",
            "abs": "Abs", "ceil": "ceiling", "min": "Min", "max": "Max", "conj": "conjugate", "Re": "re", "Im": "im",
        }  # fmt: skip
        return getattr(sympy, names.get(node[1], node[1]))(*values)
    build = {
        "add": lambda *v: sympy.Add(*v), "mul": lambda *v: sympy.Mul(*v), "neg": lambda v: -v, "pow": sympy.Pow,
        "div": lambda v, w: v / w, "root": lambda n, v: sympy.root(v, n), "deg": lambda v: v, "pct": lambda v: v / 100,
    }  # fmt: skip
    if tag not in build:
        raise ValueError(f"{tag} is no value")
    return build[tag](*values)


# ------------------------------------------------------------------------------------------------ equivalence
#
# The functions below return True, False, or None for "could not be decided". `deep` allows SymPy; `tiers` is a list to
# which each appends the name of what decided.


def _all(verdicts):
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _any(verdicts):
    undecided = False
    for verdict in verdicts:
        if verdict:
            return True
        undecided |= verdict is None
    return None if undecided else False


def _decimal(node):
    """(value, unit in the last place) of a decimal literal with enough digits to stand for an exact value, or None."""
    if node[0] == "neg":
        found = _decimal(node[1])
        return found and (-found[0], found[1])
    if node[0] == "mul" and len(node) == 3 and node[1][0] == "num" and (scale := exact(node[2])):
        if isinstance(scale, Fraction) and {*str(max(scale.numerator, scale.denominator).bit_length())} and _is_power_of_ten(scale):
            node = ("num", node[1][1] * scale, node[1][2] * scale)
    if node[0] == "num" and node[2] and abs(node[1]) >= node[2] * 10 ** (DECIMAL_DIGITS - 1):
        return node[1], node[2]
    return None


def _is_power_of_ten(value):
    number = value.numerator if value > 1 else value.denominator
    return value > 0 and min(value.numerator, value.denominator) == 1 and number == 10 ** round(math.log10(number))


def _near(decimal, node):
    """Whether a decimal is `node` to all the digits that it shows."""
    value, ulp = decimal
    other = exact(node)
    if isinstance(other, Fraction):
        return other.denominator != 1 and abs(other - value) < ulp
    if symbols(node) or other is not None:
        return False
    rough = _sample(node, 0, False)
    if rough is None or abs(rough - complex(value)) > 2 * ulp + abs(rough) * 1e-9:
        return False
    precise = _precise(node, 0, False, 60)
    return precise is not None and abs(precise - precise.context.mpf(value.numerator) / value.denominator) < float(ulp)


def same_value(a, b, deep, tiers):
    """Two values: numbers, expressions."""
    if "pct" in (a[0], b[0]) and a[0] != b[0]:
        percent, other = (a, b) if a[0] == "pct" else (b, a)
        return _any(same_value(v, other, deep, tiers) for v in (percent[1], ("div", percent[1], ("num", Fraction(100), 0))))
    if "based" in (a[0], b[0]):
        tiers.append("base")
        return a == b
    if a[0] == b[0] == "mod":
        a, b = ("div", ("add", a[1], ("neg", b[1])), a[2]), ("mod", b[2], a[2])
        quotient = exact(a)
        tiers.append("congruence")
        return isinstance(quotient, Fraction) and quotient.denominator == 1 and exact(b[1]) == exact(b[2])
    x, y = exact(a), exact(b)
    tiers.append("exact number" if x is not None and y is not None else "numeric")
    if x is not None and x == y:
        return True
    for decimal, other in ((_decimal(a), b), (_decimal(b), a)):
        if decimal and _near(decimal, other):
            return True
    if isinstance(x, Fraction) and isinstance(y, Fraction) or isinstance(x, tuple) and isinstance(y, tuple):
        return False
    infinities = _infinite(a), _infinite(b)
    if any(infinities):
        return infinities[0] == infinities[1]
    verdict = same_function(a, b)
    if not verdict and (_has_plain_log(a) or _has_plain_log(b)):  # \log is to base e for some and 10 for others
        verdict = same_function(_to_base_ten(a), _to_base_ten(b)) or verdict
    if verdict is None and deep:
        import sympy

        tiers.append("sympy")
        try:
            return bool(sympy.simplify(to_sympy(a) - to_sympy(b)) == 0)
        except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
            return False
    return verdict


def _has_plain_log(node):
    return node[:2] == ("fn", "log") and len(node) == 3 or any(
        _has_plain_log(child) for child in node if isinstance(child, tuple) and child
    )


def _to_base_ten(node):
    ten = ("num", Fraction(10), Fraction(0))
    return _rebuild(node, lambda n: (*n, ten) if n[:2] == ("fn", "log") and len(n) == 3 else n)


def _infinite(node):
    """1 for infinity, -1 for minus infinity, 0 for anything else."""
    if node[0] == "neg":
        return -_infinite(node[1])
    return int(node == ("inf",))


# Sets of reals. A set becomes a formula over comparisons with endpoints: ("<", e) ("<=", e) ("=", e), ("and", ...),
# ("or", ...), ("not", f). Two formulas are equal if they hold at the same endpoints and in the same gaps between them.

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
SETS = ("interval", "cup", "cap", "minus", "reals", "empty", "builder")
EVERYTHING, NOTHING = ("and",), ("or",)


def is_set(node):
    if node[0] == "rel":
        return any(operator not in ("=", "~") for operator in node[1])
    if node[0] == "list":
        return all(is_set(item) for item in node[2:])
    return node[0] in SETS


def _comparison(operator, endpoint):
    infinite = _infinite(endpoint)
    if infinite and operator in ("=", "!="):
        raise ValueError("equal to infinity")
    if infinite:
        return EVERYTHING if (infinite > 0) == (operator[0] == "<") else NOTHING
    if operator in (">", ">="):
        return ("not", ("<=" if operator == ">" else "<", endpoint))
    return ("not", ("=", endpoint)) if operator == "!=" else (operator, endpoint)


def _link(operator, left, right, variable):
    """The formula of one inequality: x < a, |linear| < a, linear < linear."""
    if symbols(left) != {variable}:
        left, right, operator = right, left, FLIPPED[operator]
    if left == ("sym", variable) and not symbols(right):
        return _comparison(operator, right)
    if left[:2] == ("fn", "abs") and not symbols(right):
        below, above = _link(operator, left[2], right, variable), _link(FLIPPED[operator], left[2], ("neg", right), variable)
        return ("or" if operator[0] == ">" else "and", below, above)
    difference = ("add", left, ("neg", right))
    at = [_rebuild(difference, lambda n: ("num", Fraction(k), Fraction(0)) if n == ("sym", variable) else n) for k in range(3)]
    values = [_sample(value, 0, False) for value in at]
    slope = ("add", at[1], ("neg", at[0]))
    if None in values or abs(values[2] - 2 * values[1] + values[0]) > 1e-9 or abs(values[1] - values[0]) < 1e-9:
        raise ValueError("not linear")
    return _comparison(operator if (values[1] - values[0]).real > 0 else FLIPPED[operator], ("neg", ("div", at[0], slope)))


def _formula(node, variables):
    """The formula of a set. Adds the names of its variable to `variables`. Raises ValueError for what is no such set."""
    tag = node[0]
    if tag == "reals":
        return EVERYTHING
    if tag == "empty":
        return NOTHING
    if tag == "interval" or (tag == "tuple" and len(node) == 3):
        low, high, opening, closing = node[1:] if tag == "interval" else (*node[1:], "(", ")")
        return ("and", _comparison(">=" if opening == "[" else ">", low), _comparison("<=" if closing == "]" else "<", high))
    if tag in ("cup", "cap"):
        return ("or" if tag == "cup" else "and", _formula(node[1], variables), _formula(node[2], variables))
    if tag == "minus":
        return ("and", _formula(node[1], variables), ("not", _formula(node[2], variables)))
    if tag == "set" or tag == "list" and not is_set(node):
        points = [_expand(item) for item in node[1 if tag == "set" else 2 :]]
        return ("or", *(_comparison("=", point) for group in points for point in group))
    if tag == "list":
        formulas = [_formula(item, variables) for item in node[2:]]
        both = ("and", *formulas)
        if node[1] == "or" or node[1] == "," and not any(_profile(both, _endpoints(both))):
            return ("or", *formulas)
        return both
    if tag == "builder":
        inner, condition = set(), node[2]
        domain = EVERYTHING
        if node[1][0] == "rel" and node[1][1] == ("in",):
            domain = _formula(node[1][2][1], inner)
        return ("and", domain, _formula(condition, inner))
    if tag == "rel":
        operators, sides = node[1:]
        if operators in (("in",), ("notin",)) and sides[0][0] == "sym":
            variables.add(sides[0][1])
            formula = _formula(sides[1], set())
            return ("not", formula) if operators == ("notin",) else formula
        names = frozenset().union(*(symbols(side) for side in sides))
        if len(names) == 1 and all(operator in FLIPPED for operator in operators):
            variables |= names
            (name,) = names
            return ("and", *(_link(o, left, right, name) for o, left, right in zip(operators, sides, sides[1:])))
    raise ValueError(f"{tag} is no set of reals")


def _endpoints(formula):
    """The endpoints in a formula, as a dict from tree to rank. Raises ValueError if one is no real number."""
    found = {}
    stack = [formula]
    while stack:
        item = stack.pop()
        if item[0] in ("and", "or", "not"):
            stack += item[1:]
        else:
            value = _sample(item[1], 0, False)
            if symbols(item[1]) or value is None or abs(value.imag) > 1e-12:
                raise ValueError("an endpoint that is no real number")
            found[item[1]] = value.real
    ranks, last = {}, None
    for node, value in sorted(found.items(), key=lambda pair: pair[1]):
        new = last is None or not (abs(value - last[1]) < 1e-6 * (1 + abs(value)) and same_value(node, last[0], False, []))
        ranks[node] = (ranks[last[0]] if last else -1) + 2 if new else ranks[last[0]]
        last = (node, value)
    return ranks


def _holds(formula, position, ranks):
    operator = formula[0]
    if operator == "and":
        return all(_holds(part, position, ranks) for part in formula[1:])
    if operator == "or":
        return any(_holds(part, position, ranks) for part in formula[1:])
    if operator == "not":
        return not _holds(formula[1], position, ranks)
    rank = ranks[formula[1]]
    return position == rank if operator == "=" else position < rank if operator == "<" else position <= rank


def _profile(formula, ranks):
    """Where the formula holds: endpoints have odd positions, the gaps around them even ones."""
    return [_holds(formula, position, ranks) for position in range(max(ranks.values(), default=-1) + 3)]


def same_set(a, b, deep, tiers):
    """Two sets of reals, at least one of them not a mere list of points."""
    tiers.append("sets of reals")
    try:
        names_a, names_b = set(), set()
        f, g = _formula(a, names_a), _formula(b, names_b)
        if names_a and names_b and names_a != names_b:
            return False
        ranks = _endpoints(("and", f, g))
        return _profile(f, ranks) == _profile(g, ranks)
    except (ValueError, KeyError):
        pass
    if a[0] == b[0] == "interval":
        return _all([a[3:] == b[3:], *(same(x, y, deep, tiers) for x, y in zip(a[1:3], b[1:3]))])
    if a[0] == b[0] and a[0] in ("cup", "cap"):
        return same_items(_pieces(a, a[0]), _pieces(b, b[0]), deep, tiers)
    if a[0] == b[0] == "rel":
        return same_items(_links(a), _links(b), deep, tiers, same_inequality)
    if a[0] == b[0] == "list":
        return same_items(a[2:], b[2:], deep, tiers)
    return False


def _pieces(node, tag):
    return _pieces(node[1], tag) + _pieces(node[2], tag) if node[0] == tag else (node,)


def _links(node):
    return tuple(("link", o, left, right) for o, left, right in zip(node[1], node[2], node[2][1:]))


def same_inequality(a, b, deep, tiers):
    """Two inequalities in any variables: the same up to a positive factor."""
    differences, operators = [], []
    for _, operator, left, right in (a, b):
        if operator in (">", ">="):
            operator, left, right = FLIPPED[operator], right, left
        operators.append(operator)
        differences.append(("add", left, ("neg", right)))
    if operators[0] in ("in", "notin"):
        return operators[0] == operators[1] and _all(same(x, y, deep, tiers) for x, y in zip(a[2:], b[2:]))
    factor = proportion(*differences)
    return operators[0] == operators[1] and factor is not None and (factor.real > 0 or operators[0] == "!=")


def proportion(a, b):
    """The constant a / b, or None if it is none: not the same at all points, or zero."""
    ratios = []
    for index in range(12):
        x, y = _sample(a, index, False), _sample(b, index, False)
        if x is not None and y is not None:
            if abs(x) < 1e-9 or abs(y) < 1e-9:
                return None
            ratios.append(x / y)
        if len(ratios) == 5:
            break
    if len(ratios) < 3 or any(abs(ratio - ratios[0]) > 1e-9 * abs(ratio) for ratio in ratios):
        return None
    return ratios[0]


# Statements, collections, words


def _is_name(node):
    """What may stand before an equals sign as the name of the answer: x, f(x), |AB|, (x, y), P(A), \\angle ABC."""
    tag = node[0]
    if tag in ("sym", "call", "text"):
        return True
    if tag == "mul":
        names = [child for child in node[1:] if child[0] == "sym"]
        return len(names) == len(node) - 1 and all(n[1][0].isupper() for n in names) or any(c[0] == "text" for c in node[1:])
    if tag == "fn":
        return not _has(node, "num", "add") and len(node) == 3
    if tag in ("tuple", "ratio", "set"):
        return all(_is_name(child) for child in node[1:])
    return tag == "pow" and _is_name(node[1]) and node[1][0] == "text"


def _read_statement(node):
    """(name or None, exact values, approximate values) of x = 1/3 = 2/6 ~ 0.33; an equation is its own value."""
    if node[0] != "rel":
        return None, [node], []
    operators, sides = node[1:]
    if operators == ("in",) and _is_name(sides[0]) and sides[1][0] not in ("number set",):
        return sides[0], [sides[1]], []
    if any(operator not in ("=", "~") for operator in operators):
        return None, [node], []
    if len(sides) == 2 and not _is_name(sides[0]) and _is_name(sides[1]) and "~" not in operators:
        sides = sides[::-1]  # 5 = x
    name = sides[0] if _is_name(sides[0]) else None
    rest = sides[1:] if name else sides
    cut = operators.index("~") + (0 if name else 1) if "~" in operators else len(rest)
    precise, rough = rest[:cut], rest[cut:]
    if name in rest:
        return None, [node], []  # x = x
    if not precise:
        return name, [rough[-1]], []
    if name is None and len(precise) > 1:
        values = [exact(side) for side in precise]
        if symbols(precise[-1]) or len(precise) == 2 and symbols(precise[0]):
            return None, [node], []
        if not symbols(precise[0]) and None not in values and len(set(values)) > 1:
            return None, [node], []  # 2 + 2 = 5
    return name, [precise[-1]], [r for r in rough if _roughly(precise[-1], r)]


def _roughly(a, b):
    x, y = _sample(a, 0, False), _sample(b, 0, False)
    return x is not None and y is not None and abs(x - y) <= 0.01 * max(abs(x), abs(y)) + 0.005


def _expand(node):
    """The trees that a tree with plus-minus signs stands for; at most 16."""
    if not _has(node, "pm", "mp"):
        return [node]
    signs = 0

    def number(n):
        nonlocal signs
        if n[0] == "pm":
            signs += 1
            return ("pm", n[1], n[2], signs - 1)
        return ("mp", n[1], n[2], max(signs - 1, 0)) if n[0] == "mp" else n

    numbered = _rebuild(node, number)
    signs = max(signs, 1)
    if signs > 4:
        return [node]

    def choose(choice):
        def pick(n):
            if n[0] not in ("pm", "mp"):
                return n
            plus = choice[n[3]] == (n[0] == "pm")
            return ("add", n[1], n[2] if plus else ("neg", n[2]))

        return _rebuild(numbered, pick)

    return [choose(choice) for choice in product((True, False), repeat=signs)]


def _items(node):
    """The members of a list or set, plus-minus signs written out; or None for anything else."""
    if node[0] in ("list", "set"):
        members = node[2:] if node[0] == "list" else node[1:]
    elif _has(node, "pm", "mp"):
        members = (node,)
    else:
        return None
    found = []
    for member in members:
        name, values, rough = _read_statement(member)
        if len(values) == 1 and _has(values[0], "pm", "mp"):
            found += _expand(values[0])
        else:
            found.append(member)
    if node[0] == "set":
        found = list(dict.fromkeys(found))
    return found


def same_items(a, b, deep, tiers, compare=None):
    """Two unordered collections, item by item."""
    compare = compare or same
    if len(a) != len(b):
        tiers.append("number of items")
        return False
    common = Counter(a) & Counter(b)
    a, b = list((Counter(a) - common).elements()), list((Counter(b) - common).elements())
    if len(a) > 40:
        return None
    undecided = False
    for item in a:
        for index, other in enumerate(b):
            verdict = compare(item, other, deep, tiers)
            if verdict:
                del b[index]
                break
            undecided |= verdict is None
        else:
            return None if undecided else False
    return True


def _matrix(node):
    """A matrix's rows; a scalar times a matrix is multiplied out; (1,2,3) is a column. None for anything else."""
    if node[0] == "matrix":
        return node[1:]
    if node[0] == "neg" and (rows := _matrix(node[1])) and node[1][0] != "tuple":
        return tuple(tuple(("neg", cell) for cell in row) for row in rows)
    if node[0] == "mul" and len(node) == 3 and node[2][0] == "matrix":
        return tuple(tuple(("mul", node[1], cell) for cell in row) for row in node[2][1:])
    if node[0] == "div" and (rows := _matrix(node[1])) and node[1][0] != "tuple":
        return tuple(tuple(("div", cell, node[2]) for cell in row) for row in rows)
    if node[0] == "tuple":
        return tuple((cell,) for cell in node[1:])
    return None


def same(a, b, deep=False, tiers=None):
    """Whether two trees are the same answer: True, False, or None if that could not be decided."""
    tiers = [] if tiers is None else tiers
    if a == b:
        tiers.append("same tree")
        return a[0] != "raw" or bool(a[1])
    (name_a, values_a, rough_a), (name_b, values_b, rough_b) = _read_statement(a), _read_statement(b)
    if a[0] == b[0] == "rel" and {*a[1], *b[1]} <= {"=", "~"}:
        if name_a and name_b and _compatible(name_a, name_b):
            verdict = same_plain(values_a[0], values_b[0], deep, tiers)
            if verdict is not False:
                return verdict
        tiers.append("equation")
        if len(a[2]) != 2 or len(b[2]) != 2 or is_collection(a) or is_collection(b):
            return False
        return proportion(*(("add", node[2][0], ("neg", node[2][1])) for node in (a, b))) is not None
    verdict = same_plain(values_a[0], values_b[0], deep, tiers)
    if verdict is False and (rough_a or rough_b):
        pairs = [(r, v) for r in rough_a for v in values_b] + [(v, r) for v in values_a for r in rough_b]
        return _any(same_plain(x, y, deep, tiers) for x, y in pairs)
    return verdict


def is_collection(node):
    return any(side[0] in ("tuple", "set", "list", "matrix", "interval", "cup") for side in node[2])


def _compatible(a, b):
    """Whether two names may stand for one thing: x_1 and x, y and f(x), but not x and y."""
    if a[0] == b[0] and a[0] in ("sym", "call"):
        return a[1].partition("_")[0].lower() == b[1].partition("_")[0].lower()
    return a[0] != b[0] or a[0] != "fn" or a == b


def same_plain(a, b, deep, tiers):
    """Two trees that are no assignments."""
    if a == b:
        tiers.append("same tree")
        return True
    if a[0] == "set" and len(a) == 2 and b[0] != "set":
        return same(a[1], b, deep, tiers)
    if b[0] == "set" and len(b) == 2 and a[0] != "set":
        return same(a, b[1], deep, tiers)
    if "raw" in (a[0], b[0]) or "text" in (a[0], b[0]) or "number set" in (a[0], b[0]):
        tiers.append("words")
        return False
    if a[0] == b[0] == "ratio" and len(a) == len(b):
        return _all(same_value(("mul", x, b[1]), ("mul", y, a[1]), deep, tiers) for x, y in zip(a[2:], b[2:]))
    for x, y in ((a, b), (b, a)):
        if x[0] == "tuple" and y[0] == "list" and all(item[0] == "rel" for item in y[2:]):  # x = 1, y = 2 for (1, 2)
            named = {str(_read_statement(item)[0]): _read_statement(item)[1][0] for item in y[2:]}
            if len(named) == len(x) - 1 and "None" not in named:
                return _all(same(p, named[k], deep, tiers) for p, k in zip(x[1:], sorted(named)))
    if is_set(a) or is_set(b):
        return same_set(a, b, deep, tiers)
    items_a, items_b = _items(a), _items(b)
    if items_a is not None or items_b is not None:
        if items_a is None or items_b is None:
            tiers.append("number of items")
            return False
        return same_items(items_a, items_b, deep, tiers)
    if a[0] == b[0] == "tuple":
        return len(a) == len(b) and _all(same(x, y, deep, tiers) for x, y in zip(a[1:], b[1:]))
    rows_a, rows_b = _matrix(a), _matrix(b)
    if rows_a is not None or rows_b is not None:
        tiers.append("shape")
        if rows_a is None or rows_b is None or [len(row) for row in rows_a] != [len(row) for row in rows_b]:
            return False
        return _all(same(x, y, deep, tiers) for p, q in zip(rows_a, rows_b) for x, y in zip(p, q))
    if "rel" in (a[0], b[0]):
        tiers.append("an equation and a value")
        return False
    return same_value(a, b, deep, tiers)


# ------------------------------------------------------------------------------------------------ verdicts



@lru_cache(maxsize=8192)
def words_of(text):
    """Lower-case words if the answer is nothing but words or one letter, with or without brackets; else ""."""
    plain = WRAPPER.sub(r"\1", text[:MAX_ANSWER]).replace("$", "").replace("\\ ", " ").strip(" .*\"'`\n\t")
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1].strip()
    plain = " ".join(plain.split())
    if not re.fullmatch(r"[^\W\d_]+(?:(?:, | |-(?=\w\w)|')[^\W\d_]+)*", plain):
        return ""
    return re.sub(r"^(?:the|an?) (?=\w)", "", plain.lower())


@lru_cache(maxsize=65536)
def judge(answer, reference, deep=False):
    """(True, False or None for undecided; the tier that decided). deep: SymPy may be asked, which can take long."""
    answer, reference = answer.strip(), reference.strip()
    if len(answer) > MAX_TEXT or len(reference) > MAX_TEXT:
        return False, "too long"
    if not answer or not reference:
        return False, "empty"
    if words_of(answer) and words_of(answer) == words_of(reference):
        return True, "words"
    a, b = read(answer), read(reference)
    for option, other in ((CHOICE.fullmatch(WRAPPER.sub(r"\1", answer)), reference), (CHOICE.fullmatch(WRAPPER.sub(r"\1", reference)), answer)):
        if option and len(words_of(other)) == 1:
            return option[1].lower() == words_of(other), "option letter"
        if option and same(read(option[2]), read(other), deep):
            return True, "option's value"
    tiers = []
    try:
        verdict = same(a, b, deep, tiers)
        if not verdict:  # 100,101,102 may be a list where 1,234 is a number
            for this, other, text in ((a, b, answer), (b, a, reference)):
                if other[0] == "list" and this[0] == "num" and "," in text:
                    split = read(re.sub(r",(?=\d)", ", ", text))
                    verdict = same(split, other, deep, tiers) or verdict
    except RecursionError:
        return False, "too deep"
    return verdict, tiers[-1] if tiers else "form"


def equivalent(answer, reference, timeout_s=TIMEOUT_S):
    """Whether an extracted answer equals the reference answer. False also when that cannot be decided in time.

    >>> equivalent(r"\\frac{2}{4}", "0.5"), equivalent("(2,1)", "(1,2)")
    (True, False)
    """
    verdict = _judged(answer, reference)
    return bool(_ask([(answer, reference)], timeout_s)[0] if verdict is None else verdict)


def _judged(answer, reference):
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    return judge(answer, reference)[0]


def verify(text, reference, strict=False):
    """Whether a model's output ends in the reference answer. Never raises; strict as in `extract_answer`."""
    return bool(verify_many([(text, reference)], strict=strict)[0])


def verify_many(pairs, timeout_s=TIMEOUT_S, strict=False):
    """Verdicts for (text, reference) pairs, in their order; None for one that could not be decided in `timeout_s`.

    Nearly all are decided here, in a fraction of a millisecond each. What remains goes to worker processes, which are
    killed when a comparison exceeds its time.
    """
    answers = [extract_answer(t, strict) if isinstance(t, str) else None for t, _ in pairs]
    verdicts = [False if a is None else _judged(a, reference) for a, (_, reference) in zip(answers, pairs)]
    hard = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for i, verdict in zip(hard, _ask([(answers[i], pairs[i][1]) for i in hard], timeout_s)):
        verdicts[i] = verdict
    return verdicts


def canonical(answer):
    """A hashable key; answers with the same key are equivalent, though not all that are equivalent have the same."""
    words = words_of(answer.strip())
    if words:
        return "words", words
    node = read(answer.strip())
    _, values, rough = _read_statement(node)
    value = exact(values[0]) if not rough and values[0][0] not in ("pct", "mod") else None
    return ("number", value) if isinstance(value, Fraction) else ("tree", node)


def accuracy_reward(text, reference):
    """1.0 if the last box after the thinking block holds the reference answer, else 0.0."""
    return float(verify(text, reference, strict=True))


def format_reward(text, think_tag="think"):
    """1.0 for a completion of the form [<think>thought</think>] words \\boxed{answer} end, else 0.0.

    The thinking block may be missing. If there is one it comes first, is closed, holds a thought and is the only one.
    After it stands exactly one box, closed and not empty; after the box nothing but punctuation, white space, `*` and
    the end of a formula. A prompt that ends in "<think>" is part of `text`. An end-of-turn token is ignored.
    """
    text = END_OF_TURN.split(text.strip(), maxsplit=1)[0].strip()
    opening, closing = f"<{think_tag}>", f"</{think_tag}>"
    if opening in text or closing in text:
        thought, _, tail = text.removeprefix(opening).partition(closing)
        if not text.startswith(opening) or not thought.strip() or opening in thought + tail or closing in tail:
            return 0.0
        if closing not in text:
            return 0.0
    else:
        tail = text
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", tail))
    end = _braced(tail, boxes[0].end() - 1) if len(boxes) == 1 else None
    if end is None or not tail[boxes[0].end() : end - 1].strip():
        return 0.0
    return float(re.fullmatch(r"(?:[\s.,;:!$*]|\\[\])])*", tail[end:]) is not None)


# ------------------------------------------------------------------------------------------------ worker processes


def _start_worker():
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@lru_cache(maxsize=1)
def _idle_workers():
    """Workers that wait for their next comparison; they end with this process, at the latest when their input closes."""
    workers = []
    atexit.register(lambda: [worker.kill() for worker in workers])
    return workers


def _ask(pairs, timeout_s):
    """Verdicts of worker processes on (answer, reference) pairs; None where the time ran out."""

    def decide(pair):
        idle = _idle_workers()
        try:
            worker = idle.pop()
        except IndexError:
            worker = _start_worker()
            worker.stdout.readline()  # SymPy is loaded: the clock starts
        timer = threading.Timer(timeout_s, worker.kill)
        timer.start()
        try:
            worker.stdin.write(json.dumps(pair) + "\n")
            worker.stdin.flush()
            verdict = {"true\n": True, "false\n": False}.get(worker.stdout.readline())
        except OSError:
            verdict = None
        timer.cancel()
        if verdict is None:
            worker.kill()
            worker.communicate()
        else:
            idle.append(worker)
        return verdict

    if not pairs:
        return []
    with ThreadPoolExecutor(min(len(pairs), 4)) as pool:
        return list(pool.map(decide, pairs))


def work():
    """The loop of a worker: reads [answer, reference] lines, writes true, false or null."""
    import sympy  # noqa: F401  loaded before the clock starts

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(*json.loads(line), deep=True)[0]), flush=True)


# ------------------------------------------------------------------------------------------------ the command line


def show(node):
    """A tree on one line, numbers in full up to 60 characters."""
    if isinstance(node, Fraction):
        return str(node) if node.numerator.bit_length() + node.denominator.bit_length() < 200 else f"~{float(node):.6g}"
    if isinstance(node, tuple) and node and node[0] == "num":
        return show(node[1])
    return "(" + " ".join(show(part) for part in node) + ")" if isinstance(node, tuple) else str(node)


def grade_file(path, strict, explain, timeout_s):
    """Prints the verdicts on a .jsonl file: a total, and where `expected` is given the errors by category."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = []
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in ("answer", "pred", "completion") if key in row and (key != "answer" or "reference" in row or "gold" in row)), None)
        reference = next((row[key] for key in ("reference", "gold", "answer") if key in row), None)
        if text is None or reference is None:
            raise ValueError(f"{path} line {number}: found {sorted(row)}, expected answer|pred|completion and reference|gold")
        pairs.append((text, str(reference)))
    begin = time.perf_counter()
    verdicts = verify_many(pairs, timeout_s, strict)
    seconds = time.perf_counter() - begin
    for row, (text, reference), verdict in zip(rows, pairs, verdicts):
        wrong = "expected" in row and bool(verdict) != row["expected"]
        if explain or wrong:
            answer = extract_answer(text, strict)
            tier = "no answer" if answer is None else judge(answer, reference)[1]
            mark = "WRONG " if wrong else ""
            print(f"{mark}{row.get('id', '')} {verdict} by {tier}: {answer!r} against {reference!r}")
    right, undecided = sum(v is True for v in verdicts), sum(v is None for v in verdicts)
    print(f"{len(rows)} answers | {right} right | {undecided} undecided | {len(rows) / max(seconds, 1e-9):.0f} per second")
    if not all("expected" in row for row in rows):
        return
    table = {}
    for row, verdict in zip(rows, verdicts):
        counts = table.setdefault(row.get("category", "all"), Counter())
        counts[(bool(row["expected"]), bool(verdict))] += 1
    print(f"\n{'category':24} {'cases':>6} {'right %':>8} {'false +':>8} {'false -':>8}")
    shares = []
    for name, counts in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        share = 100 * (counts[True, True] + counts[False, False]) / counts.total()
        shares.append(share)
        print(f"{name:24} {counts.total():6} {share:8.2f} {counts[False, True]:8} {counts[True, False]:8}")
    print(f"{'mean over categories':24} {'':6} {sum(shares[:-1]) / len(shares[:-1]):8.2f}")


def main(args):
    if args.worker:
        return work()
    if args.file:
        return grade_file(args.file, args.strict, args.explain, args.timeout_s)
    if args.answer is None or args.reference is None:
        raise ValueError("found neither --file nor both --answer and --reference; give one of the two")
    answer = extract_answer(args.answer, args.strict)
    verdict, tier = (False, "no answer") if answer is None else judge(answer, args.reference)
    if verdict is None:
        verdict, tier = _ask([(answer, args.reference)], args.timeout_s)[0], "worker process"
    print(f"answer     {answer!r}\n           {show(read(answer.strip())) if answer else '-'}")
    print(f"reference  {args.reference!r}\n           {show(read(args.reference.strip()))}")
    print(f"verdict    {'undecided' if verdict is None else 'equal' if verdict else 'not equal'}, by: {tier}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
