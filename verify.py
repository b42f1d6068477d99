r"""Grades text: is the answer in a model's output the same as the reference answer?

    python verify.py --answer '\frac{2}{4}' --reference 0.5     # both readings, the verdict, the tier that decided
    python verify.py --file results.jsonl --explain             # grades a file; with `expected`, a table per category

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
import os
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

MAX_TEXT = 200_000  # characters of an output that are searched for a box, from its end
MAX_PROSE = 20_000  # characters of an output without a box that are searched for an answer, from its end
MAX_ANSWER = 700  # characters of an answer that are parsed; longer ones are compared as strings
MAX_DEPTH = 40  # nested groups
MAX_BITS = 30_000  # of a numerator or denominator that is written out
MAX_MAGNITUDE = 100_000  # bits before the point of a number that is evaluated to many digits
DECIMAL_DIGITS = 8  # significant digits from which on a decimal stands for an exact value
TIMEOUT_S = 2.0  # for one comparison in a worker process
WORKER_BYTES = 2 << 30  # address space of a worker process


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Is an answer the same as the reference answer?")
    parser.add_argument("--answer", help="an answer, or a whole model output")
    parser.add_argument("--reference", help="the reference answer")
    parser.add_argument("--file", help=".jsonl: pred|completion|answer, gold|reference, perhaps expected, category")
    parser.add_argument("--strict", action="store_true", help="accept only a box after the thinking block")
    parser.add_argument("--explain", action="store_true", help="with --file: print each row with the tier that decided")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="seconds for one comparison in a worker")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ extraction

END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|im_start|eot_id)\|>|</s>")
THINK_OPEN, THINK_CLOSE = re.compile(r"<(?:think|thought)>"), re.compile(r"</(?:think|thought)>")
BOX = re.compile(r"[\\\x08](?:beginboxed|boxed|oxed|fbox|framebox)(?![a-zA-Z])\s*")  # "\b" may have been eaten
JOINT = r"(?:\s|[%s,;&~]|\\[%s\\,;: ]|\\q?quad|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)*"
BETWEEN_BOXES, BETWEEN_FORMULAS = re.compile(JOINT % ("$", r"\[\]()")), re.compile(JOINT % ("", ""))
MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\$([^$]{1,1000}?)(?<!\\)\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)", re.S
)
PERCENT = re.compile(r"(?:[$\s]|\\\))*(?:\\?%|per ?cent\b)")
NUMBER_IN_PROSE = re.compile(
    r"(?<![A-Za-z\d_.])[-+−]?\s?\\?[$€£]?\s?(?:\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?[/:]\s?\d+)?(?:\s?\\?%|\s?π|√\d+)?)"
)
ANSWER_PHRASE = re.compile(
    r"####|^A:|^#+ *(?:Final )?Answer *\n|\b(?:answers?|correct (?:option|choice))\b[*_]*\s*"
    r"(?:is(?!n)|are|was|would be|=|:|(?=\$|\\\(|\\\[))[*_]*\s*:?", re.I | re.M,
)  # fmt: skip
VERDICT_IN_PROSE = re.compile(r"(?i:yes|no|true|false)\b|\(?[B-J]\b\)?")
STYLES = "text|textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathbf|mathsf|operatorname"
WRAPPER = re.compile(rf"\\(?:{STYLES})\s*\{{([^{{}}]*)\}}")
CHOICE = re.compile(  # (C) 12, but not (C) or (D)
    r"\(?([A-J])(?:\)|[.:](?!\d))(?!\W*(?:or|and)\b|.*\([A-J]\)|\s*[,;+*/^=&]|-)((?:\s|\\\W|\$)*\S.*)", re.S
)
ENGLISH = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}")
NOT_ENGLISH = set("or and in sqrt cbrt pi oo inf infinity sin cos tan cot sec csc log ln exp".split())


def _braced(text, start):
    """The end of the group whose opening brace stands at `start`, or None when it is never closed."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def after_thinking(text):
    """(what follows the thinking block, or the whole text if there is none; whether what was opened is closed)."""
    closes = deque(THINK_CLOSE.finditer(text), maxlen=1)
    tail = text[closes[0].end() :] if closes else text
    return tail, THINK_OPEN.search(tail) is None


def _boxes(text, strict):
    """The content of the last box, joined with those before it that only "and" or a comma separates; None: no box."""
    found, edge = [], None
    for match in reversed(deque(BOX.finditer(text), maxlen=20)):
        opened = text[match.end() : match.end() + 1] == "{"
        end = _braced(text, match.end()) if opened else None
        if edge is not None:
            joint = BETWEEN_BOXES.fullmatch(text, end, edge) if end is not None else None
            if joint is None or not re.search("[,;&]|and|or", joint[0]):
                break
        if end is not None:
            content = text[match.end() + 1 : end - 1]
            if edge is None and PERCENT.match(text, end):
                content += r"\%"
        elif strict:
            return None
        else:  # the closing brace is missing, or there never was one: `\boxed 5`
            content = re.split(r"\$|\n|\\\]|\\\)", text[match.end() + opened :], maxsplit=1)[0]
        if not any(judge(content, other)[0] for other in found):  # 15.5 or 31/2 is one answer
            found.insert(0, content)
        edge = match.start()
    return ", ".join(found) if found else None


def _formula(match):
    return next(group for group in match.groups() if group is not None)


def _last_value(text):
    """The last formula or the last number outside one, whichever comes later; None when there is neither."""
    formulas = list(MATH.finditer(text))
    numbers = list(NUMBER_IN_PROSE.finditer(text, formulas[-1].end() if formulas else 0))
    return numbers[-1][0].strip() if numbers else _formula(formulas[-1]) if formulas else None


def _is_plain_formula(text):
    """Whether a text is nothing but mathematics, without the borders of a formula."""
    if len(text) > MAX_ANSWER or MATH.search(text) or not set(ENGLISH.findall(WRAPPER.sub("", text))) <= NOT_ENGLISH:
        return False
    return read(text)[0] not in ("raw", "text")


def _after_phrase(rest):
    """The answer in what follows "the answer is": formulas, a sentence of mathematics, its start or its last value."""
    rest = rest.lstrip(" \t\n*_:=")
    match, found = MATH.match(rest), []
    while match:
        found.append(_formula(match))
        end = match.end()
        match = MATH.match(rest, BETWEEN_FORMULAS.match(rest, end).end())
    if found:
        return ", ".join(found) + (r"\%" if PERCENT.match(rest, end) else "")
    sentence = re.split(r"\n|[.?](?=\s|$)|(?<![\\\dn)])!(?=\s|$)|\*\*", rest, maxsplit=1)[0].strip()  # 5! is no end
    if _is_plain_formula(sentence) or CHOICE.fullmatch(sentence):
        return sentence
    if re.match(r"not\b", sentence):
        return _last_value(rest[len(sentence) :]) or sentence
    start = NUMBER_IN_PROSE.match(sentence) or VERDICT_IN_PROSE.match(sentence)
    return start[0] if start else _last_value(sentence) or sentence or None


def extract_answer(text, strict=False):
    r"""The answer in a model's output, or None.

    strict: the content of the last `\boxed{}` or `\fbox{}` after the thinking block. A block that was opened and never
    closed, or a box whose brace is never closed, means that there is no answer. Otherwise, in this order: the box,
    `<answer>` tags, "#### 42" and "the answer is ...", the whole text if it is nothing but mathematics, "option C",
    bold text, the last formula or number; what stands in the thinking block counts only if nothing follows it.

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
    tail = tail[-MAX_PROSE:]
    if tags := re.findall(r"<answer>(.*?)(?:</answer>|$)", tail, re.S):
        return tags[-1].strip()
    phrases = list(ANSWER_PHRASE.finditer(tail))
    if phrases and (found := _after_phrase(tail[phrases[-1].end() :])):
        return found
    if _is_plain_formula(tail):
        return tail.strip()
    if options := re.findall(r"\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-J])\b", tail):
        return options[-1]
    bold = re.findall(r"\*\*([^*\n]+)\*\*", tail)
    return bold[-1] if bold and _is_plain_formula(bold[-1]) else _last_value(tail)


# ------------------------------------------------------------------------------------------------ tokens


class Unreadable(ValueError):
    """The text is not mathematics that this file knows, or exceeds a bound."""


class Token(NamedTuple):
    kind: str
    value: object = None
    text: str = ""
    space: bool = False  # white space stands before it


UNICODE = str.maketrans({
    **dict(zip("−–—‐‑×·∙⋅∗÷∕⁄|│‖′’‘“”", ["-"] * 5 + ["*"] * 5 + ["/"] * 3 + ["|", "|", r"\|"] + ["'"] * 5)),
    **dict.fromkeys("€£¥¢₹₩\u200b\ufeff\u2061", ""), **dict.fromkeys("\u00a0\u202f\u2009", " "),
    **{char: rf"\{name} " for char, name in zip(
        "≤≥⩽⩾≦≧≠≈≅∞∪∩∈∉∅±∓∖°º˚√∛⌊⌋⌈⌉⟨⟩∠△…∧∨⇒≡∣αβγδεζηθλμνξπρστφχψωΔΓΘΛΣΦΨΩϕϵ",
        "le ge le ge le ge ne approx approx infty cup cap in notin emptyset pm mp setminus degree degree degree sqrt "
        "cbrt lfloor rfloor lceil rceil langle rangle angle triangle ldots land lor Rightarrow equiv mid alpha beta "
        "gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega Delta Gamma Theta "
        "Lambda Sigma Phi Psi Omega phi epsilon".split(),
    )},
    **{char: rf"\mathbb{{{letter}}}" for char, letter in zip("ℝℤℕℚℂ", "RZNQC")},
    **{char: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", char).split("⁄")) for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"},
})  # fmt: skip
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ"
PLAIN = str.maketrans(RAISED + LOWERED, "0123456789+-()nx" * 2)

def _half_open(match):
    """[2,5[ is [2,5) where the square brackets of an interval point outward."""
    before, low, inside, high = match.groups()
    return f"{before}{'(' if low == ']' else low}{inside}{')' if high == '[' else high}"


CIRCLE = r"(?:\\circ(?![a-zA-Z])|\\(?:text|mathrm)\s*\{\s*o\s*\})"
REWRITES = [(re.compile(pattern, re.S), by) for pattern, by in [
    (r"\s*\.\.\.+", r"\\ldots "), (r"=(?=[\s\d]*\.\d+\s*\\[lc]?dots(?![a-z]))", r"\\approx "),
    (r"\x08oxed", r"\\boxed"), (r"\x0crac", r"\\frac"),
    (r"(\\\\)\s*\[\s*-?[\d.]+\s*[a-z]+\s*\]", r"\1"),  # \\[2pt]
    (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|pi|text|left|right|cdot|times|infty|cup|begin|end|in|pm)(?![a-z]))", r"\\"),
    (r"\\(?:math|text)dollar(?![a-z])|\{\s*\\?\$\s*\}|\\text\s*\{\s*\\?\$\s*\}", " "),
    (r"\{\s*(\^\s*(?:\{\s*\\circ\s*\}|\\circ))\s*\}", r"\1"),
    (rf"(?:\{{\s*\}})?\^\s*(?:\{{\s*{CIRCLE}\s*\}}|{CIRCLE})", r"\\degree "),
    (r"\b(?:US)?\s?(?:USD|US(?=\s*\\?\$)|Rs\.?)(?=[\s\\$}]*\d)", ""),
    (r"\\\$|\$|\\(?:pounds|euro|yen)(?![a-z])|\\[()\[\]]", " "),  # currency and the borders of formulas
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 1.5x10^3
    (r"\\left\s*\\\{\s*\\begin\s*\{array\}\s*(?:\{[^{}]*\})?(.*?)\\end\s*\{array\}", r"\\begin{cases}\1\\end{cases}"),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|left\.|right\.|left|right|[bB]igg?[lr]?|middle|hline|boldsymbol"
     r"|mathbf(?!\s*\{?[RZ]\b)|mathcal|mathit|mathsf|math(?:ord|bin|rel|op|punct)|vec|hat|widehat|underline|boxed|fbox"
     r"|phantom|hfill|[lL]arge|LARGE|[hH]uge|small|normalsize|checkmark|blacksquare|square|Box|qed)(?![a-zA-Z])", " "),
    (r"\\(?:color|textcolor)\s*\{[^{}]*\}|\\(?:tag|label|hspace|vspace)\*?\s*\{[^{}]*\}", " "),
    (r"\{\s*\\(?:rm|bf|it|sf|tt)\s([^{}]*)\}|\\(?:rm|bf|it|sf|tt)\s*\{([^{}]*)\}", r"\\mathrm{\1\2}"),
    (r"\\(?:rm|bf|it|sf|tt|bm)(?![a-zA-Z])", " "), (rf"\\({STYLES})\s+([a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}"),
    (r"\\text\s*\{\s*((?:arc|co)?(?:sin|cos|tan|sec|csc|cot)|cis|ln|log)\s*\}", r"\\\1 "),
    (r"\\text\s*\{\s*([,;:])\s*\}", r"\1"), (r"\{\s*([-+:.]|\\(?:cup|cap|times|cdot)\s*)\}", r"\1"),
    (r"([\])])\s*(?:U|u|union|\\text\s*\{\s*(?:U|union)\s*\})\s*(?=[\[(])", r"\1\\cup "),
    (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),  # 3 to 4
    (r"\\not\s*(=|\\in(?![a-z]))", lambda m: r"\ne " if m[1] == "=" else r"\notin "),
    (r"\\(?:mathbb|Bbb|mathds|mathbf(?=\s*\{?[RZ]\b\}?(?!\s*=)))\s*\{?\s*([A-Z])\b\s*\}?|\\([RZNQ])(?![a-zA-Z])",
     r"\\mathbb{\1\2}"),
    (r"(\\mathbb\{R\})\s*(?:\^\s*(?:\{\s*\+\s*\}|\+)|_\s*(?:\{\s*(?:>\s*0|\+)\s*\}|\+))", r"(0,\\infty)"),
    (r"(?<=\d)\s*\{\s*(\\[dtc]?frac\s*\{\d+\}\s*\{\d+\})\s*\}", r"\1"),  # 2{\frac34}
    (r"\\root\s*\{?\s*(\d+)\s*\}?\s*\\of", r"\\sqrt[\1]"), (r"\bper cent\b", "percent"),
    (r"(?:\{\s*\}|(?<![\w)}]))\s*[_^]\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}?", r"\\binom{\1}{\2}"),  # _n C_k
    (r"(?:\\mathrm\{C\}|\bC)\s*(?:_\s*\{?(\w+)\}?\s*\^\s*\{?(\w+)\}?|\((\w+)\s*,\s*(\w+)\))", r"\\binom{\1\3}{\2\4}"),
    (rf"\\(?:{STYLES})\s*\{{([0-9A-Fa-f]+)\}}(?=\w*\s*_)|[({{]\s*([0-9A-F]+)\s*[)}}](?=\s*_)", r"\1\2"),  # (101)_2
    (r"\b([fghpPqQ])\s*\{\s*(\([^(){}]*\))\s*\}", r"\1\2"),  # SymPy prints f{\left(x \right)}
    (r"^\s*[a-zA-Z]\s*(?:\\colon|:)?\s*[a-z]\s*\\mapsto(?![a-z])", ""), (r"\b(?:Matrix|array)\s*(?=\(\s*\[)", ""),
    (r"\\([pb]matrix)\s*\{(.*)\}", r"\\begin{\1}\2\\end{\1}"),
    (r"(^|\\cup|\\in(?![a-z]))(?:\s|\\ )*([\[\]])([^\[\]]*)([\[\]])(?=\s*(?:$|\.|\\cup))", _half_open),
    (r"\(\s*\\?[bp]?mod\s*(\d+)\s*\)|\\b?mod(?![a-z])\s*\{?(\d+)\}?", r"\\pmod{\1\2}"),
    (r"\(\s*[a-z]\s*\\in\s*\\mathbb\{[NZ]\}\s*\)$", ""),  # (k \in Z)
    (r"(?<=\d)(?:st|nd|rd|th)\b|(?<=\d)\s*\^\s*\{\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}{1,2}", ""),
    (r"(?<=[\w)}])\s*\\q?quad\s*(?=[a-zA-Z](?:_\w)?\s*=|\([^()]*,)", ", "),
    (r"(?<=\d)\s*([AaPp])\.\s?[Mm]\b\.?", r" \1m"),  # p.m.
    (r"^(?:[\s=:*]|\\approx|\\therefore)+", ""),
    (r"(?<=[\d)])!=", "! ="),  # 5!=120 is a factorial, x != 5 is not
]]  # fmt: skip
UNEVALUATED = re.compile(r"\\(?:sum|prod|int|lim|det|deg|dim|Pr)(?![a-z])")
TRAILING = re.compile(r"(?:[\s.,;:~]|\\\\|\\[,;:! ]|\\$|\\q?quad|\*\*)+$")

GAP = r"(?:,\s?\\!\s?|(?:\\,)?\{,\}\s?(?:\\!)?|\\[,!;: ]\s?|~|')"
NUMBER = r"(?:{}(?:\.\d+)?|\d+\{{,\}}\d+|\d+\.?\d*|\.\d*)".format
NUMBER_OUTSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,| (?!\d+\s*/))\d{{3}}(?!\d))+"))
NUMBER_INSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,(?=0\d\d))\d{{3}}(?!\d))+"))  # (12,102) is two numbers
EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.])")
PERIOD = re.compile(r"\\(?:overline|bar|dot)\s*\{?(\d+)\}?|(?<=\.)\((\d+)\)")
DOTS = re.compile(r"\s*\\[lc]?dots(?![a-z])")
LEXEME = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:!> ]|\\q?quad(?![a-zA-Z]))+)"
    r"|(?P<digits>(?=[A-F]*\d)[0-9A-Fa-f]+(?=\s*_\s*\{?\s*(?:1[1-9]|[23]\d)))"  # of a base above ten
    r"|\\begin\s*\{(?P<begin>[a-zA-Z]+)\*?\}(?:\s*\{[clr|@ ]*\})?|(?P<end>\\end\s*\{[a-zA-Z]+\*?\})"
    r"|\\mathbb\s*\{\s*(?P<set>[A-Z])\s*\}|(?P<number>\d|\.(?=\d|\\overline))|\\(?P<command>[a-zA-Z]+)"
    r"|(?P<letters>[a-zA-Z]+)|(?P<symbol>\\.|<=|>=|!=|==|\*\*|=>|\+/?-|.)", re.S,
)  # fmt: skip

WORD_IN_TEXT = re.compile(r"[a-zA-Z]+(?:['.\-/][a-zA-Z]+)*")  # sq.ft, km/h, don't

SYMBOLS = {
    **{char: char for char in "+-*/^_!%()[]{}|,;:&'"}, "**": "^", "\\%": "%", "\\{": "set{", "\\}": "set}", "\\|": "|",
    "\\&": "and", "\\\\": "newline", "+-": "pm", "+/-": "pm",
}  # fmt: skip
RELATIONS = {
    **{name: name for name in ("=", "<", ">", "<=", ">=", "!=", "in", "notin")}, "==": "=", "=>": ">=", "equiv": "=",
    "le": "<=", "leq": "<=", "leqslant": "<=", "leqq": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=",
    "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~", "cong": "~", "doteq": "~",
}  # fmt: skip
COMMANDS = {
    **{name: name for name in (
        "pm mp cup cap mid langle rangle lfloor rfloor lceil rceil frac sqrt cbrt binom choose prime pmod newline"
    ).split()},
    **dict.fromkeys(["cdot", "times", "ast"], "*"), "div": "/", "bigcup": "cup", "setminus": "minus", "colon": ":",
    "backslash": "minus", **dict.fromkeys("lvert rvert vert lVert rVert Vert".split(), "|"), "lbrace": "set{",
    "rbrace": "set}", "lbrack": "[", "rbrack": "]", **dict.fromkeys("dfrac tfrac cfrac sfrac nicefrac".split(), "frac"),
    "dbinom": "binom", "tbinom": "binom", "infty": "inf", "emptyset": "empty",
    "varnothing": "empty", **dict.fromkeys(["degree", "textdegree"], "deg"), "surd": "sqrt", "over": "over",
    **dict.fromkeys("angle measuredangle sphericalangle triangle overrightarrow".split(), "name"),
    **dict.fromkeys(["overline", "bar"], "bar"), "land": "and", "wedge": "and",
    "lor": "or", "vee": "or", "percent": "%", "cr": "newline", "Rightarrow": "so", "implies": "so",
    **dict.fromkeys("text textbf textit textrm textnormal mbox hbox emph textsf texttt".split(), "text"),
    **dict.fromkeys(["mathrm", "operatorname"], "roman"),
}  # fmt: skip
FUNCTIONS = {  # as they are written: as SymPy calls them; "Log" is the \log of unknown base
    **{name: name for name in (
        "sin cos tan cot sec csc asin acos atan acot sinh cosh tanh coth asinh acosh atanh exp Abs floor factorial gcd "
        "lcm"
    ).split()},
    **{"arc" + name: "a" + name for name in "sin cos tan cot sec csc".split()}, "arsinh": "asinh", "arcosh": "acosh",
    "artanh": "atanh", "ln": "log", "log": "Log", "lg": "log10", "abs": "Abs", "ceil": "ceiling", "min": "Min",
    "max": "Max", "cis": "cis", "conj": "conjugate", "Re": "re", "Im": "im", "tg": "tan", "ctg": "cot", "arctg": "atan",
}  # fmt: skip
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Delta Gamma Theta Lambda Sigma Phi Psi Omega ell hbar".split()
)
KNOWN = {  # commands, by the kind and value of their token
    **{name: ("sym", name) for name in GREEK}, **{name: ("fn", function) for name, function in FUNCTIONS.items()},
    **{name: ("rel", relation) for name, relation in RELATIONS.items()}, "pi": ("const", "pi"), "imath": ("const", "i"),
    **dict.fromkeys("ldots dots cdots".split(), ("sym", "...")), "partial": ("sym", "d"),
    **{name: (kind, name) for name, kind in COMMANDS.items()},
}  # fmt: skip
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMERALS = {word: value for value, word in enumerate(  # up to ninety-nine
    ONES + [f"{ten}-{ONES[one]}" if one else ten for ten in TENS for one in range(10)]
)}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = set(  # words of two or three letters after a number; longer ones are words anywhere
    "cm mm km dm nm ft in mi yd kg mg lb lbs oz ml hr hrs min sec mph kph usd day cup sq cu pm am kw hz rad deg pts ms "
    "kj pa mol gal per eur gbp inr rpm".split()
)
WORDS = set("yes no not odd even true false none all the red east west dne if for any is are of to we".split())


def _number(text, at, inside):
    """The number literal at `at` as (value, unit in the last place or 0 for an integer, end). inside: brackets."""
    match = (NUMBER_INSIDE if inside else NUMBER_OUTSIDE).match(text, at)
    literal, end = re.sub(r"\{,\}(?!\\!|\d{3}(?!\d))", ".", match[0]), match.end()  # 3{,}14 but 3{,}140
    whole, point, decimals = re.sub(r"[^\d.]", "", literal).partition(".")
    value, unit = Fraction(int(whole + decimals or "0"), 10 ** len(decimals)), Fraction(1, 10 ** len(decimals))
    period, dots = PERIOD.match(text, end) if point else None, DOTS.match(text, end) if decimals else None
    if dots:
        period, end = re.search(r"(\d+?)\1\1+$", decimals), dots.end()  # 0.333... is 1/3
    elif period:
        end = period.end()
    if period:
        digits = period[period.lastindex]
        return value + unit * Fraction(int(digits), 10 ** len(digits) - 1), Fraction(0), end
    unit = unit if decimals else Fraction(0)
    if exponent := EXPONENT.match(text, end):
        scale = Fraction(10) ** int(exponent[1])
        return value * scale, unit * scale, exponent.end()
    return value, unit, end


def _letters(run, mode, space, after):
    """Tokens of a run of letters: functions, products of variables, words. after: the kind of the token before it."""
    low = run.lower()

    def token(kind, value=None):
        return [Token(kind, value, run, space)]

    if low in ("and", "or"):
        return token(low)
    if low in ("percent", "degree", "degrees"):
        return token("%" if low == "percent" else "deg")
    if len(run) == 1:
        if run != "i" and (mode == "text" or mode == "roman" and after in ("number", "word") and run != "e"):
            return token("word", low)
        return token("const" if run in "ie" else "sym", run)
    if mode != "text":
        if low in UNITS and after in ("number", "word"):
            return token("word", low)
        if low in ("inf", "infinity", "oo"):
            return token("inf")
        if low == "pi":
            return token("const", "pi")
        if low in ("in", "union"):
            return token("rel" if low == "in" else "cup", low)
        if low in ("sqrt", "cbrt", "binom", "binomial", "frac"):
            return token(low.removesuffix("ial"))
        if run in FUNCTIONS or run in GREEK:
            return token("fn", FUNCTIONS[run]) if run in FUNCTIONS else token("sym", run)
        mixed = re.fullmatch(r"([a-zA-Z]?)(sqrt|sin|cos|tan|cot|log|ln|pi|theta)([a-zA-Z]?)", run)
        if mixed and mode is None:  # xsin, lnx
            return [part for name in mixed.groups() if name for part in _letters(name, mode, False, None)]
    alphabetic = "".join(sorted(run)) == run or run.isupper()  # abcd and ABCD are products
    listed = low in WORDS or low in UNITS or low in NUMERALS or run in ("II", "III", "IV", "VI")
    if mode or listed or len(run) > 2 and run.istitle():
        return token("word", low)
    if len(run) > 3 and not alphabetic:
        return token("word", low)
    return [part for letter in run for part in _letters(letter, None, False, None)]


def _tokens(text, mode=None):
    """The tokens of a normalised text. mode: None, "text" inside \\text{}, "roman" inside \\mathrm{}."""
    tokens, at, space, brackets = [], 0, False, 0
    while at < len(text):
        match = LEXEME.match(text, at)
        kind, lexeme, start, at = match.lastgroup, match[match.lastgroup], at, match.end()
        before, after = len(tokens), tokens[-1].kind if tokens else None
        if kind == "digits":
            tokens.append(Token("number", None, lexeme, space))
        elif kind == "number":
            value, unit, at = _number(text, start, brackets > 0)
            tokens.append(Token("number", (value, unit), text[start:at], space))
        elif kind == "letters":
            if mode:
                lexeme = WORD_IN_TEXT.match(text, start)[0]
                at = start + len(lexeme)
            tokens += _letters(lexeme, mode, space, after)
        elif kind == "command" and COMMANDS.get(lexeme) in ("text", "roman"):
            at = text.find("{", at) if text[at:].lstrip().startswith("{") else at
            end = _braced(text, at) if text[at : at + 1] == "{" else None
            if end is None:
                raise Unreadable("text without its group")
            content = _tokens(text[at + 1 : end - 1], COMMANDS[lexeme])
            if after == "number" and len(content) == 1 and content[0].kind == "sym":  # 5\mathrm{m}
                content = [Token("word", content[0].text, content[0].text)]
            tokens += [content[0]._replace(space=True), *content[1:]] if content else []
            at = end
        elif kind == "command":
            if lexeme not in KNOWN:
                raise Unreadable(f"unknown command {lexeme}")
            tokens.append(Token(*KNOWN[lexeme], lexeme, space))
        elif kind == "symbol":
            if lexeme in RELATIONS:
                tokens.append(Token("rel", RELATIONS[lexeme], lexeme, space))
            elif lexeme in SYMBOLS:
                kind = SYMBOLS[lexeme]
                brackets += (kind in ("(", "[", "set{")) - (kind in (")", "]", "set}"))
                kind = {"'": "prime", "&": "and" if mode else "&"}.get(kind, kind)
                tokens.append(Token(kind, None, lexeme, space))
            elif not (mode and lexeme in ".\"`?"):
                raise Unreadable(f"unknown character {lexeme!r}")
        elif kind != "space":  # begin, end, set
            tokens.append(Token(kind, lexeme, lexeme, space))
        space = kind == "space" or (space and len(tokens) == before)
    return tokens


# ------------------------------------------------------------------------------------------------ the parser
#
# A tree is a nested tuple (tag, ...):
#   values      ("num", Fraction, unit in the last place) ("sym", name) ("const", "pi"|"e"|"i") ("inf",) ("add", a, ...)
#               ("mul", a, ...) ("neg", a) ("div", a, b) ("pow", a, b) ("root", n, a) ("fn", name, a, ...)
#               ("call", name, a, ...) ("pm"|"mp", a, b) ("pct", a) ("deg", a) ("based", value, base) ("mod", a, m)
#               ("ratio", a, b, ...) ("clock", a, "a" or "p")
#   collections ("list", separator, a, ...) ("set", a, ...) ("tuple", a, ...) ("matrix", row, ...), a row being a tuple
#   sets        ("interval", low, high, "[" or "(", "]" or ")") ("cup"|"cap"|"minus", a, b) ("reals",) ("empty",)
#               ("number set", letter) ("builder", what, condition)
#   statements  ("rel", operators, sides)
#   words       ("text", words); ("raw", string) for what cannot be parsed


def number(value):
    return ("num", Fraction(value), Fraction(0))


MINUS_ONE = ("neg", number(1))
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc", "cis"}
INVERTIBLE = TRIGONOMETRIC | {"sinh", "cosh", "tanh"}
BRACKETS = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
OPERANDS = {*BRACKETS, *"number sym const fn { set{ frac sqrt cbrt binom begin inf set empty bar name".split()}
SEPARATORS = (",", ";", "and", "or", "newline")
LEAD_IN = set(
    "the a an answer final is are was so thus hence therefore equals equal to value result solution solutions we get "
    "have choice option approximately about roughly exactly that it be of all point points pair pairs ordered vector "
    "interval values numbers roots domain range".split()
)
TEXT_VALUES = {
    **dict.fromkeys(
        ("no solution", "no solutions", "no real solution", "no real solutions", "no real roots", "empty set", "none"),
        ("empty",),
    ),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "reals", "all real x"), ("reals",)),
    **dict.fromkeys(("does not exist", "undefined", "not defined"), ("text", "dne")),
    **dict.fromkeys(("all integers", "integers"), ("number set", "Z")), "infinity": ("inf",),
}  # fmt: skip


def _children(node):
    return (child for child in node if isinstance(child, tuple) and child)


def _rebuild(node, fn):
    """The tree with `fn` applied to every node, leaves first."""
    return fn(tuple(_rebuild(child, fn) if isinstance(child, tuple) else child for child in node))


def _has(node, *tags):
    return node[node[0] == "fn"] in tags or any(_has(child, *tags) for child in _children(node))


def _numeral(words):
    """The tree of "minus twenty-five thousand", or None."""
    total, tail, names = 0, 0, words.split()
    negative = names[0] in ("minus", "negative")
    for name in names[negative:]:
        if name in SCALES and tail:
            total, tail = (total, tail * 100) if name == "hundred" else (total + tail * SCALES[name], 0)
        elif name in NUMERALS and tail % 100 == 0:
            tail += NUMERALS[name]
        else:
            return None
    return ("neg", number(total + tail)) if negative else number(total + tail)


def _product(a, b):
    return ("mul", *(a[1:] if a[0] == "mul" else (a,)), b)


def _is_unit(node):
    """Words, as in 5 (ways), or a quotient of them, as in 60 \\frac{\\text{km}}{\\text{h}}."""
    return node[0] == "text" and len(node) == 2 or node[0] == "div" and _is_unit(node[1])


def _is_integer(node):
    return node[0] == "num" and node[2] == 0 and node[1].denominator == 1


class _Parser:
    """Recursive descent over a list of tokens: each method consumes what it is named after and returns its tree."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = [*tokens, Token("eof"), Token("eof"), Token("eof")], 0, 0
        self.context = "open"  # "|" starts an absolute value; in "abs" it ends one, in "set" it is "such that"

    @property
    def kind(self):
        return self.tokens[self.at].kind

    def accept(self, *kinds):
        if self.kind in kinds:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def take(self, *kinds):
        token = self.tokens[self.at]
        if kinds and token.kind not in kinds:
            raise Unreadable(f"found {token.text or token.kind!r} where {' or '.join(kinds)} was expected")
        self.at += 1
        return token

    def inside(self, context, method, *arguments):
        """The result of `method`, one level deeper, in another context."""
        if self.depth == MAX_DEPTH:
            raise Unreadable("nested too deeply")
        outer, self.context, self.depth = self.context, context, self.depth + 1
        result = method(*arguments)
        self.context, self.depth = outer, self.depth - 1
        return result

    # collections and statements

    def items(self, *closers):
        """Clauses up to a closing token, which is left; more than one make a list."""
        found, separators = [], set()
        while self.kind not in closers:
            found.append(self.clause())
            if self.kind not in closers:
                separators.add(self.take(*SEPARATORS).kind)
            while separator := self.accept(*SEPARATORS):
                separators.add(separator.kind)
        if not found:
            raise Unreadable("nothing there")
        # n \in Z beside 2\pi n says nothing new
        found = [c for c in found if not (c[:2] == ("rel", ("in",)) and c[2][1][0] == "number set")] or found
        kind = "or" if "or" in separators else "and" if "and" in separators else ","
        return found[0] if len(found) == 1 else ("list", kind, *found)

    def clause(self):
        operators, sides = [], [self.expression()]
        if sides[0][0] == "text" and self.accept(":"):  # Total: 5
            sides = [self.expression()]
        while self.kind in ("rel", "so") or self.kind == "&" and self.context == "aligned":
            if self.accept("&"):
                continue
            if self.accept("so"):  # of a chain of implications the last counts
                operators, sides = [], []
            else:
                operators.append(self.take().value)
                if self.context == "aligned":
                    self.accept("&")
            sides.append(self.expression())
        if self.accept("pmod"):
            sides[-1] = ("mod", sides[-1], self.argument())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def expression(self):
        left = self.sum()
        while token := self.accept("cup", "cap", "minus"):
            left = (token.kind, left, self.sum())
        while self.kind == ":" and self.context != "set" and left[0] != "text":
            self.take()
            right = self.sum()
            half = right[0] == "clock" and right[2]
            left = ("ratio", *(left[1:] if left[0] == "ratio" else (left,)), right[1] if half else right)
            left = ("clock", left, half) if half else left  # 7:30 p.m.
        return left

    # values

    def sum(self):
        self.lead_in()
        sign = self.accept("pm", "mp")
        total = (sign.kind, number(0), self.term()) if sign else self.signed(self.term)
        while token := self.accept("+", "-", "pm", "mp"):
            if token.kind in ("pm", "mp"):
                total = (token.kind, total, self.term())
            else:
                term = self.signed(self.term)
                if token.kind == "-" and total[0] in ("reals", "number set"):
                    return ("minus", total, term)
                term = ("neg", term) if token.kind == "-" else term
                total = ("add", *(total[1:] if total[0] == "add" else (total,)), term)
        return total

    def signed(self, method):
        negative = False
        while token := self.accept("+", "-"):
            negative ^= token.kind == "-"
        value = method()
        return ("neg", value) if negative else value

    def lead_in(self):
        """Skips the words of "the answer is 5"; any others are left to `word`."""
        end = self.at
        while self.tokens[end].kind == "word":
            end += 1
        words = [token.value for token in self.tokens[self.at : end]]
        if words and self.tokens[end].kind in OPERANDS | {"-", "+", "pm", "|"} and not {"not", "no"} & set(words):
            if words[-1] in ("is", "are", "equals", "be") or set(words) <= LEAD_IN:
                self.at = end

    def starts_operand(self):
        return self.kind in OPERANDS or self.kind == "|" and self.context in ("open", "aligned")

    def term(self):
        value = self.factor()
        while True:
            if self.accept("*"):
                value = _product(value, self.signed(self.factor))
            elif self.kind == "word" or self.kind == "/" and self.tokens[self.at + 1].kind == "word":
                value = self.units(value)
            elif self.accept("/"):
                value = ("div", value, self.signed(self.factor))
            elif self.starts_operand():
                if value[0] == "num" and self.kind == "number":
                    raise Unreadable("two numbers side by side")
                factor = self.factor()
                value = value if _is_unit(factor) else _product(value, factor)
            else:
                return value

    def units(self, value):
        """Skips `cm^2` or `miles per hour`; `million` multiplies."""
        while self.kind == "word" or self.kind == "/" and self.tokens[self.at + 1].kind in ("word", "sym"):
            token = self.take()
            if token.value in SCALES:
                value = _product(value, number(SCALES[token.value]))
            if token.value in ("am", "a.m", "pm", "p.m"):
                value = ("clock", value, token.value[0])
            if token.kind == "/":
                self.take()
            if self.accept("^"):
                self.script()
        if self.starts_operand():
            raise Unreadable("an expression goes on after its unit")
        return value

    def factor(self):
        """A power, or a mixed number such as 1\\frac45 or 2 1/3."""
        value = self.power()
        if not _is_integer(value) or self.tokens[self.at - 1].kind != "number":
            return value
        if self.kind == "frac":
            part = self.power()
            inner = part[1] if part[0] in ("pct", "deg") else part
            if inner[0] == "div" and _is_integer(inner[1]) and _is_integer(inner[2]) and 0 < inner[1][1] < inner[2][1]:
                mixed = number(value[1] + inner[1][1] / inner[2][1])
                return mixed if inner is part else (part[0], mixed)
            return value if _is_unit(part) else _product(value, part)
        top, slash, bottom = self.tokens[self.at : self.at + 3] if self.kind == "number" else (Token("eof"),) * 3
        if top.space and slash.kind == "/" and bottom.kind == "number" and 0 < top.value[0] < bottom.value[0]:
            self.at += 3
            return self.postfix(number(value[1] + top.value[0] / bottom.value[0]))
        return value

    def power(self):
        return self.postfix(self.atom())

    def postfix(self, value):
        for _ in range(10):
            if self.accept("!"):
                value = ("fn", "factorial", value)
            elif token := self.accept("%", "deg"):
                value = ("pct" if token.kind == "%" else "deg", value)
            elif self.accept("prime"):
                value = (*value[:-1], value[-1] + "'") if value[0] == "sym" else value
            elif self.accept("^"):
                if not self.accept("prime"):
                    value = ("pow", value, self.script())
            else:
                return value
        raise Unreadable("too many postfix operators")

    def script(self):
        """An exponent: a group, or one signed token; 2^3^2 is 2^(3^2)."""
        value = self.group() if self.kind == "{" else self.signed(self.deeper_atom)
        return ("pow", value, self.inside(self.context, self.script)) if self.accept("^") else value

    def argument(self):
        """What \\frac takes: a group, or one token; of a number its first digit."""
        token = self.tokens[self.at]
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            rest = token.text[1:]
            self.tokens[self.at] = Token("number", (Fraction(int(rest)), Fraction(0)), rest)
            return number(int(token.text[0]))
        return self.group() if token.kind == "{" else self.deeper_atom()

    def group(self):
        self.take("{")
        value = self.inside("open", self.items, "}", "choose", "over")
        if infix := self.accept("choose", "over"):
            head = ("fn", "binomial") if infix.kind == "choose" else ("div",)
            value = (*head, value, self.inside("open", self.items, "}"))
        self.take("}")
        return value

    def subscript(self):
        """The text of a subscript, as part of a name or as a base."""
        if not self.accept("{"):
            return self.take().text
        text = ""
        while self.kind not in ("}", "eof"):
            text += self.take().text
        self.take("}")
        return text

    def deeper_atom(self):
        return self.inside(self.context, self.atom)

    def atom(self):
        kind = self.kind
        if kind in BRACKETS:
            return self.inside("open", self.bracket)
        if kind in ("{", "number", "sym", "word", "fn"):
            return getattr(self, {"{": "group", "fn": "function"}.get(kind, kind))()
        token = self.take()
        if kind == "const":
            return ("const", token.value)
        if kind in ("inf", "empty"):
            return (kind,)
        if kind == "set":
            return ("reals",) if token.value == "R" else ("number set", token.value)
        if kind == "frac":
            return ("div", self.argument(), self.argument())
        if kind == "binom":
            pair = self.deeper_atom()[1:] if self.kind == "(" else (self.argument(), self.argument())
            return ("fn", "binomial", *pair)
        if kind in ("sqrt", "cbrt"):
            degree = number(2 if kind == "sqrt" else 3)
            if self.accept("["):
                degree = self.inside("open", self.sum)
                self.take("]")
            return ("root", degree, self.group() if self.kind == "{" else self.deeper_atom())
        if kind == "bar":
            value = self.argument()
            line = value[0] == "mul" and all(child[0] == "sym" and child[1].isupper() for child in value[1:])
            return ("text", "line", value) if line else ("fn", "conjugate", value)
        if kind == "name":  # \angle ABC
            return ("text", token.value, self.group() if self.kind == "{" else self.inside("open", self.term))
        if kind == "set{":
            return self.inside("set", self.braces)
        if kind == "|":
            value = self.inside("abs", self.sum)
            self.take("|")
            return ("fn", "Abs", value)
        if kind == "begin":
            return self.inside("open", self.environment, token.value)
        raise Unreadable(f"found {token.text or kind!r} where a value was expected")

    def number(self):
        token = self.take()
        if self.tokens[self.at][:2] == ("word", "base"):  # 1011 base 2
            self.take()
        elif not self.accept("_"):
            return ("num", *token.value)
        base = self.subscript().lower().removeprefix("base").strip("()")
        base = NUMERALS.get(base, int(base) if base.isdecimal() and len(base) < 3 else 0)
        try:
            return ("based", int(token.text, base if base > 1 else 37), base)
        except ValueError:
            raise Unreadable("a number with a subscript that is no base") from None

    def sym(self):
        name = self.take().value
        if self.accept("_"):
            name += "_" + self.subscript()
        if self.kind != "(" or not self.is_call(name):
            if self.kind == "(" and name.isupper() and self.at == 1:  # the point P(1,2)
                point = self.inside("open", self.bracket)
                return point if point[0] == "tuple" else _product(("sym", name), point)
            return ("sym", name)
        return ("call", name, *self.inside("open", self.arguments))

    def is_call(self, name):
        """f(x) rather than a product: by its name, or because it stands before an equals sign, as in P(n) = ..."""
        depth, end = 0, self.at
        while self.tokens[end].kind != "eof":
            depth += (self.tokens[end].kind == "(") - (self.tokens[end].kind == ")")
            end += 1
            if depth == 0:
                break
        return name in ("f", "g", "h") or self.tokens[end].kind == "rel"

    def word(self):
        words = []
        while self.kind == "word":
            words.append(self.take().value)
        if words[:2] in (["all", "real"], ["all", "reals"]) and words[-1] in ("except", "excluding", "but"):
            excepted = self.items("eof")
            return ("minus", ("reals",), ("set", *(excepted[2:] if excepted[0] == "list" else (excepted,))))
        if self.starts_operand():
            raise Unreadable("words and mathematics")
        text = " ".join([word for word in words if word not in ("the", "a", "an")] or words)
        text = re.sub("^(?:there (?:is|are)|set of) |(?<!not) exists?$", "", text)
        return TEXT_VALUES.get(text) or _numeral(text) or ("text", text)

    def function(self):
        name, power, base = self.take().value, None, None
        while token := self.accept("^", "_"):
            if token.kind == "^":
                power = self.script()
            else:
                base = self.group() if self.kind == "{" else self.deeper_atom()
        if self.kind in ("(", "{", "["):
            values = self.inside("open", self.arguments)
        else:
            values = (self.inside(self.context, self.signed, self.juxtaposed),)
        if name in TRIGONOMETRIC:  # a degree sign means something inside a sine and nothing elsewhere
            radians = ("div", ("const", "pi"), number(180))
            values = tuple(_rebuild(v, lambda n: _product(n[1], radians) if n[0] == "deg" else n) for v in values)
        if name in ("Log", "log10") and (base or name == "log10"):
            name, values = "log", (*values, base or number(10))
        if name in INVERTIBLE and power == MINUS_ONE:
            name, power = "a" + name, None
        return ("pow", ("fn", name, *values), power) if power else ("fn", name, *values)

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
        if _has(value, "const") and not symbols(value) and self.accept("/"):  # \sin \pi/6
            value = ("div", value, self.factor())
        return value

    # brackets

    def bracket(self):
        opening = self.take().kind
        content = self.items(*BRACKETS[opening])
        closing = self.take().kind
        items = content[2:] if content[:2] == ("list", ",") else (content,)
        if opening in ("lfloor", "lceil"):
            return ("fn", "floor" if opening == "lfloor" else "ceiling", content)
        if len(items) == 1:
            if opening + closing not in ("()", "[]"):
                raise Unreadable("one item in unlike brackets")
            return content
        ends = len(items) == 2 and (_infinite(items[0]) < 0 or _infinite(items[1]) > 0)
        if opening == "langle" or opening + closing == "()" and not ends:
            return ("tuple", *items)
        rows = [item[1:3] if item[3:] == ("[", "]") else item[2:] for item in items]
        if all(item[0] == "list" or item[3:] == ("[", "]") for item in items) and len({len(row) for row in rows}) == 1:
            return ("matrix", *rows)
        return ("interval", *items, opening, closing) if len(items) == 2 else ("list", ",", *items)

    def braces(self):
        if self.accept("set}"):
            return ("empty",)
        first = self.items("set}", "|", "mid", ":")
        if self.accept("|", "mid", ":"):
            first = ("builder", first, self.items("set}"))
        self.take("set}")
        return first if first[0] == "builder" else ("set", *(first[2:] if first[0] == "list" else (first,)))

    def environment(self, name):
        if not name.endswith("matrix") and name != "array":  # aligned, cases
            value = self.inside("aligned", self.items, "end")
            self.take("end")
            return value
        if name.startswith(("v", "V")):
            raise Unreadable("a determinant")
        rows = [[]]
        while not self.accept("end"):
            rows[-1].append(self.clause())
            if self.kind == "newline":
                rows.append([])
            while self.accept("newline", "&"):
                pass
        rows = [tuple(row) for row in rows if row]
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different length")
        return ("matrix", *rows)


def read(text):
    """The tree of an answer; ("raw", its characters) if it is too long or no mathematics that this file knows."""
    return _read(text) if len(text) <= MAX_ANSWER else ("raw", "".join(text.split()))


@lru_cache(maxsize=1024)
def _read(text):
    for chars, mark in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(f"[{chars}]+", lambda run: mark + "{" + run[0].translate(PLAIN) + "}", text)
    text = text.translate(UNICODE)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(UNICODE)  # mathematical italics become letters
    if not text.isdecimal():  # most answers are plain integers
        for pattern, by in REWRITES:
            text = pattern.sub(by, text)
    text = TRAILING.sub("", text).strip()
    try:
        parser = _Parser(_tokens(text))
        tree = parser.items("eof")
        return tree
    except Unreadable:
        left, equals, right = text.rpartition("=")
        if equals and UNEVALUATED.search(left) and "=" not in right:  # \\sum_{k=1}^3 k = 6
            return ("rel", ("=",), (("text", left), _read(right)))
        text = WRAPPER.sub(r"\1", text)
        if re.fullmatch(r"[\w\s,.:'-]*", text):  # 5 hours and 20 minutes
            text = re.sub(r"\band\b|[,.](?!\d)", "", text)
        return ("raw", re.sub(r"[\s{}]|\\[,;:! ]", "", text).lower())


# ------------------------------------------------------------------------------------------------ values


@lru_cache(maxsize=1024)
def symbols(node):
    """The names of a tree's variables."""
    names = frozenset(node[1:2] if node[0] in ("sym", "call") else ())
    return names.union(*(symbols(child) for child in _children(node)))


PRIMES = (2**61 - 1, 2**89 - 1)
EXACT = {
    "Abs": abs, "floor": math.floor, "ceiling": math.ceil, "Min": lambda *v: min(v), "Max": lambda *v: max(v),
    "gcd": lambda *v: math.gcd(*map(int, v)), "lcm": lambda *v: math.lcm(*map(int, v)),
}  # fmt: skip


@lru_cache(maxsize=256)
def exact(node):
    """A rational constant as a Fraction, or as residues if it is too long to write out; None for anything else."""
    try:
        return _rational(node)
    except OverflowError:
        pass
    except (ArithmeticError, ValueError, TypeError):
        return None
    return _residues(node)


def _residues(node):
    try:
        residues = tuple(_rational(node, prime) for prime in PRIMES)
        return None if None in residues else residues
    except (ArithmeticError, ValueError, TypeError):
        return None


def _rational(node, prime=None):
    """The value of a rational constant, modulo a prime if one is given; None if it is irrational or no constant.

    Raises OverflowError beyond MAX_BITS, another ArithmeticError or a ValueError where the value is undefined.
    """
    tag, name = node[0], node[1] if node[0] == "fn" else None
    if tag == "num":
        result = node[1].numerator * pow(node[1].denominator, -1, prime) if prime else node[1]
    elif tag in ("pow", "root"):
        base, exponent = (node[1], node[2]) if tag == "pow" else (node[2], ("div", number(1), node[1]))
        result = _rational_power(_rational(base, prime), _rational(exponent), tag == "root", prime)
    elif name in ("factorial", "binomial"):
        values = [_rational(child) for child in node[2:]]
        if None in values or not all(v.denominator == 1 and v >= 0 for v in values):
            return None
        if max(values) > (20_000 if prime or name == "binomial" else 3_000):
            raise OverflowError("too many factors")
        result = (math.factorial if name == "factorial" else math.comb)(*map(int, values))
        result = result if prime else Fraction(result)
    elif name in EXACT and not prime:
        values = [_rational(child) for child in node[2:]]
        result = None if None in values else Fraction(EXACT[name](*values))
    elif tag in ("add", "mul", "neg", "div", "deg", "pct"):
        result = None
        for index, child in enumerate(node[1:]):
            value = _rational(child, prime)
            if value is None:
                return None
            if index == 0:
                result = value
            elif tag == "div":
                result = result * pow(value, -1, prime) if prime else result / value
            else:
                result = result + value if tag == "add" else result * value
            result = result % prime if prime else result
        result = -result if tag == "neg" else result
        if tag == "pct":
            result = result * pow(100, -1, prime) if prime else result / 100
    else:
        return None
    if result is None or prime:
        return result and result % prime
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise OverflowError("too many digits")
    return result


def _rational_power(base, exponent, real_root, prime):
    """base ** exponent if that is rational, else None. real_root: of a negative number the real odd root is meant."""
    if base is None or exponent is None or prime and exponent.denominator != 1:
        return None
    if prime:
        return pow(base, exponent.numerator, prime)
    degree, sign = exponent.denominator, 1
    if degree > 1:
        if base < 0 and real_root and degree % 2:
            base, sign = -base, -1
        parts = [_integer_root(part, degree) for part in (base.numerator, base.denominator)]
        if base < 0 or None in parts:
            return None
        base = Fraction(*parts)
    if max(base.numerator.bit_length() - 1, base.denominator.bit_length() - 1) * abs(exponent.numerator) > MAX_BITS:
        raise OverflowError("too many digits")
    return sign * base**exponent.numerator


def _integer_root(value, degree):
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low if low**degree == value else None


def _real(x):
    if abs(x.imag) > 1e-9 * (1 + abs(x.real)):
        raise ValueError("not real")
    return x.real


def _odd_root(exponent):
    return exponent[0] == "div" and all(map(_is_integer, exponent[1:])) and exponent[2][1] % 2 == 1


def _binomial(m, n, k):
    if k.imag or k.real != int(k.real) or not 0 <= k.real <= 500:
        n, k, rest = (m.tame(x, 17) + 1 for x in (n, k, n - k))
        return m.gamma(n) / (m.gamma(k) * m.gamma(rest))
    return math.prod(((n - i) / (i + 1) for i in range(int(k.real))), start=n * 0 + 1)


# Functions of (arithmetic, argument, ...); those not named here are the arithmetic's own.
NUMERIC = {
    "cot": lambda m, x: 1 / m.tan(x), "sec": lambda m, x: 1 / m.cos(x), "csc": lambda m, x: 1 / m.sin(x),
    "coth": lambda m, x: 1 / m.tanh(x), "acot": lambda m, x: m.atan(1 / x), "asec": lambda m, x: m.acos(1 / x),
    "acsc": lambda m, x: m.asin(1 / x), "cis": lambda m, x: m.exp(1j * x), "Log": lambda m, x: m.log(x),
    "log": lambda m, x, *base: m.log(x) / m.log(*base) if base else m.log(x),
    "Abs": lambda m, x: m.complex(abs(x)), "conjugate": lambda m, x: x.conjugate(),
    "re": lambda m, x: m.complex(x.real), "im": lambda m, x: m.complex(x.imag),
    "floor": lambda m, x: m.complex(m.floor(_real(x))),
    "ceiling": lambda m, x: m.complex(m.ceil(_real(x))), "Min": lambda m, *v: m.complex(min(map(_real, v))),
    "Max": lambda m, *v: m.complex(max(map(_real, v))), "factorial": lambda m, x: m.gamma(m.tame(x, 17) + 1),
    "binomial": _binomial,
}  # fmt: skip
OWN = set("sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp".split())
DOUBLES = SimpleNamespace(
    **{name: getattr(cmath, name) for name in (*OWN, "log", "pi", "e", "isfinite")}, floor=math.floor, ceil=math.ceil,
    complex=complex, rational=complex, gamma=lambda x: complex(math.gamma(_real(x))), tame=lambda x, bits: x,
)  # fmt: skip


@lru_cache(maxsize=64)
def _many_digits(digits, thread):
    """mpmath with a fixed precision; one for each thread, since some functions change the precision for a while."""
    import mpmath

    def tame(x, bits):
        if not m.isfinite(x):
            raise ValueError("infinite")
        if m.mag(x) > bits:
            raise OverflowError("a function of so large a number could fill the memory")
        return x

    m = mpmath.MPContext()
    m.dps, m.complex, m.tame = digits, m.mpc, tame
    m.rational = lambda value: m.mpc(value.numerator) / value.denominator
    return m


@lru_cache(maxsize=4096)
def _point(name, index, real):
    """Where a variable stands at a sample point: given by its name, so that it is the same everywhere.

    Any four points in a row lie in four quadrants, any two real ones on both sides of zero: sqrt(x^2) is not x.
    """
    rng = random.Random(name)
    start, step = rng.randrange(4), rng.choice((1, 3))
    rng = random.Random(f"{name} {index}")
    if real:
        return complex((-1) ** (start + index) * rng.uniform(0.2, 3.0) if index < 4 else rng.uniform(-3.0, 3.0))
    return cmath.rect(rng.uniform(0.5, 1.9), (start + step * index + rng.uniform(0.05, 0.95)) * math.pi / 2)


def evaluate(node, index, real, m):
    """The value of a tree at a sample point in the arithmetic m; ArithmeticError or ValueError if it has none."""
    tag = node[0]
    if tag == "num":
        return m.rational(node[1])
    if tag in ("sym", "const"):
        return m.complex(_point(node[1], index, real) if tag == "sym" else {"pi": m.pi, "e": m.e, "i": 1j}[node[1]])
    if tag not in ("fn", "call", "add", "mul", "neg", "div", "ratio", "pow", "root", "deg", "pct", "mod"):
        raise ValueError(f"{tag} has no value")
    values = [evaluate(child, index, real, m) for child in (node[2:] if tag in ("fn", "call") else node[1:])]
    first = values[0]
    if tag == "fn":
        first = m.tame(first, 17 if node[1] in ("exp", "sinh", "cosh", "tanh", "coth") else 500)
        function = getattr(m, node[1]) if node[1] in OWN else lambda *v: NUMERIC[node[1]](m, *v)
        result = function(*values)
    elif tag == "call":  # an unknown function: some fixed analytic one
        result = m.sin(m.tame(sum((_point(node[1], i, True).real * v for i, v in enumerate(values, 1)), first), 500))
    elif tag == "add":
        result = sum(values[1:], first)
    elif tag == "mul":
        result = math.prod(values[1:], start=first)
    elif tag in ("div", "ratio"):
        if len(values) > 2:
            raise ValueError("a ratio of three")
        result = first / values[1]
    elif tag in ("pow", "root"):
        base, exponent = values if tag == "pow" else (values[1], 1 / first)
        base = base + 0  # -4-0j, which is on the wrong side of the branch cut, becomes -4+0j
        if base != 0:
            m.tame(exponent * m.log(base), 17)
        if tag == "root" and base.real < 0 == base.imag and _real(first) % 2 == 1:
            result = -((-base) ** exponent)  # the real root of a negative number
        elif real and base.real < 0 == base.imag and tag == "pow" and _odd_root(node[2]):
            result = (-base) ** exponent * (-1) ** int(node[2][1][1])  # x^(2/3) among reals
        else:
            result = base**exponent
    else:
        result = {"neg": -first, "pct": first / 100}.get(tag, first)
    if real:
        _real(result)  # ln x and sqrt(x) are undefined at -1 among reals, so that 2 ln x is ln x^2
    return m.tame(result, MAX_MAGNITUDE)


def _value(node, index, real, m):
    """`evaluate`, or None where the value is undefined, or infinity when it, or a step towards it, is too large."""
    try:
        value = evaluate(node, index, real, m)
        return value if m.isfinite(value) else None
    except OverflowError:
        return math.inf
    except (ArithmeticError, ValueError, TypeError, KeyError):
        return None


@lru_cache(maxsize=512)
def sample(node, index=0, real=False):
    """The value at a sample point as a complex, or None where it is undefined or out of range."""
    value = _value(node, index, real, DOUBLES)
    return None if value == math.inf else value


def _is_long(num):
    """Whether a decimal has enough digits to stand for an exact value."""
    return bool(num[2]) and abs(num[1]) >= num[2] * 10 ** (DECIMAL_DIGITS - 1)


def _rounding(node):
    """The largest relative error of the long decimals in a tree; 0 if there is none."""
    if node[0] == "num":
        return float(node[2] / abs(node[1])) if _is_long(node) else 0.0
    return max(map(_rounding, _children(node)), default=0.0)


def _agree(a, b, index, real, tolerance):
    """Whether two trees have one value at a sample point, to 45 digits; None if one is undefined there.

    tolerance: a relative error that is allowed instead, or 0.
    """
    x, y = sample(a, index, real), sample(b, index, real)
    if tolerance and x is not None and y is not None:
        return abs(x - y) < tolerance * max(abs(x), abs(y))
    if x is not None and y is not None:
        gap, size = abs(x - y), max(abs(x), abs(y))
        if gap > 1e-6 * size and gap > 1e-9:
            return False
        if index >= 2 and gap <= 1e-9 * size:  # two points to many digits are enough
            return True
    rougher = None
    for digits in (60, 400):  # 400 when the value is so small that it may be what rounding left of a zero
        m = _many_digits(digits, threading.get_ident())
        x, y = _value(a, index, real, m), _value(b, index, real, m)
        if x is None or y is None:
            return None
        if x == y == math.inf:
            raise OverflowError("both too large to tell")
        if math.inf in (x, y):
            return False
        size = max(abs(x), abs(y))
        if abs(x - y) <= size * 1e-45:
            return True
        if size > 1e-40 or rougher and all(abs(new - old) < 1e-30 * size for new, old in zip((x, y), rougher)):
            return False
        rougher = x, y
    return size < 1e-300


def same_function(a, b):
    """Whether two trees agree at random complex points, or else, among reals, wherever both are defined.

    None when both are out of range.
    """
    constant = not symbols(a) | symbols(b)
    rounding = _rounding(a), _rounding(b)
    tolerance = 0.0 if all(rounding) else 0.6 * max(rounding)  # half a unit in the last place
    complex_only = constant or any(_has(node, "conjugate", "re", "im") for node in (a, b))
    for real in (False,) if complex_only else (False, True):
        hits = 0
        for index in range(1 if constant else 40 if real else 12):
            try:
                agree = _agree(a, b, index, real, tolerance)
            except OverflowError:
                return None
            if agree is False:
                break
            hits += agree is True
            if hits == (1 if constant else 6):
                return True
    return False


def to_sympy(node):
    """The SymPy object of a value, built directly. Raises ValueError for a tree that is no value."""
    import sympy

    tag = node[0]
    if tag == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if tag in ("sym", "const"):
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[node[1]] if tag == "const" else sympy.Symbol(node[1])
    values = [to_sympy(child) for child in (node[2:] if tag in ("fn", "call") else node[1:])]
    if tag in ("fn", "call"):
        function = getattr(sympy, "log" if node[1] == "Log" else node[1]) if tag == "fn" else sympy.Function(node[1])
        return function(*values)
    build = {
        "add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "neg": lambda v: -v, "div": lambda v, w: v / w,
        "root": lambda n, v: sympy.root(v, n), "deg": lambda v: v, "pct": lambda v: v / 100, "inf": lambda: sympy.oo,
    }  # fmt: skip
    if tag not in build:
        raise ValueError(f"{tag} is no value")
    return build[tag](*values)


# ------------------------------------------------------------------------------------------------ equivalence
#
# The functions below return True, False, or None for "could not be decided". A `Trail` says whether SymPy may be asked
# and notes what decided.


class Trail(NamedTuple):
    deep: bool
    tiers: list


def _all(verdicts):
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _decimal(node):
    """(value, unit in the last place) of a decimal with enough digits to stand for an exact value, or None."""
    if node[0] == "neg":
        found = _decimal(node[1])
        return found and (-found[0], found[1])
    if node[0] == "mul" and len(node) == 3 and node[1][0] == "num":
        scale = exact(node[2])
        large = max(scale, 1 / scale) if isinstance(scale, Fraction) and scale > 0 else Fraction(0)
        if large and large == 10 ** round(math.log10(large.numerator)):
            node = ("num", node[1][1] * scale, node[1][2] * scale)
    return node[1:] if node[0] == "num" and _is_long(node) else None


def _near(decimal, node):
    """Whether a decimal is a constant, rounded or cut off after its last digit."""
    value, unit = decimal
    other = exact(node)
    if other is None and not symbols(node):
        m = _many_digits(60, threading.get_ident())
        precise = _value(node, 0, False, m)
        if precise is None or precise == math.inf or abs(precise.imag) > 1e-40:
            return False
        other = Fraction(int(m.floor(m.ldexp(precise.real, 300))), 2**300)
    if not isinstance(other, Fraction) or other.denominator == 1:
        return False
    return abs(other - value) <= unit / 2 or other * value > 0 and 0 < abs(other) - abs(value) < unit


def _infinite(node):
    """1 for infinity, -1 for minus infinity, 0 for anything else."""
    return -_infinite(node[1]) if node[0] == "neg" else int(node == ("inf",))


def _to_base_ten(node):
    return ("fn", "log", node[2], number(10)) if node[:2] == ("fn", "Log") else node


def same_value(a, b, trail):
    """Two values: numbers, expressions."""
    if (a[0] == "pct") != (b[0] == "pct"):
        percent, other = (a, b) if a[0] == "pct" else (b, a)
        return same_value(percent[1], other, trail) or same_value(("div", percent[1], number(100)), other, trail)
    for one, other in ((a, b), (b, a)):
        if "I" in symbols(one) and "I" not in symbols(other):  # SymPy writes 2*I
            return same_value(_rebuild(one, lambda n: ("const", "i") if n == ("sym", "I") else n), other, trail)
    if "based" in (a[0], b[0]):
        trail.tiers.append("base")
        return a == b
    if a[0] == b[0] == "mod":
        trail.tiers.append("congruence")
        quotient = exact(("div", ("add", a[1], ("neg", b[1])), a[2]))
        return exact(a[2]) == exact(b[2]) and isinstance(quotient, Fraction) and quotient.denominator == 1
    a, b = (node[1] if node[0] == "mod" else node for node in (a, b))
    x, y = exact(a), exact(b)
    trail.tiers.append("numeric" if x is None or y is None else "exact number")
    if type(x) is not type(y) and x is not None and y is not None:  # one of them is too long to write out
        x, y = (_residues(number(v)) if isinstance(v, Fraction) else v for v in (x, y))
    if x is not None and x == y:
        return True
    decimals = [(decimal, other) for decimal, other in ((_decimal(a), b), (_decimal(b), a)) if decimal]
    if decimals:
        return any(_near(decimal, other) for decimal, other in decimals)
    if x is not None and type(x) is type(y):
        return False
    if _infinite(a) or _infinite(b):
        return _infinite(a) == _infinite(b)
    verdict = same_function(a, b)
    if not verdict and (_has(a, "Log") or _has(b, "Log")):  # \log is to base e for some, to base 10 for others
        verdict = same_function(_rebuild(a, _to_base_ten), _rebuild(b, _to_base_ten)) or verdict
    if verdict is None and trail.deep:
        import sympy

        trail.tiers.append("sympy")
        try:
            return bool(sympy.simplify(to_sympy(a) - to_sympy(b)) == 0)
        except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
            return False
    return verdict


# Sets of reals. A set becomes a formula over comparisons with endpoints: ("<"|"<="|"=", endpoint), ("and", ...),
# ("or", ...), ("not", formula). Two sets are equal if their formulas hold at the same endpoints and in the same gaps.

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
EVERYTHING, NOTHING = ("and",), ("or",)


def is_set(node):
    if node[0] == "rel":
        return any(operator not in ("=", "~") for operator in node[1])
    if node[0] == "list":
        return any(map(is_set, node[2:])) and all(is_set(item) or item[0] == "rel" for item in node[2:])
    return node[0] in ("interval", "cup", "cap", "minus", "reals", "empty", "builder")


def _comparison(operator, endpoint):
    infinite = _infinite(endpoint)
    if infinite:
        return EVERYTHING if (infinite > 0) == (operator[0] == "<") else NOTHING
    if operator in (">", ">="):
        return ("not", ("<=" if operator == ">" else "<", endpoint))
    return ("not", ("=", endpoint)) if operator == "!=" else (operator, endpoint)


def _inequality(operator, left, right, variable):
    """The formula of x < a, of |linear| < a or of linear < linear."""
    if symbols(left) != {variable}:
        left, right, operator = right, left, FLIPPED[operator]
    if left == ("sym", variable) and not symbols(right):
        return _comparison(operator, right)
    if left[:2] == ("fn", "Abs") and not symbols(right):
        sides = ((operator, right), (FLIPPED[operator], ("neg", right)))
        return ("or" if operator[0] == ">" else "and", *(_inequality(o, left[2], r, variable) for o, r in sides))
    difference = ("add", left, ("neg", right))
    at = [_rebuild(difference, lambda n: number(k) if n == ("sym", variable) else n) for k in range(3)]
    values = [sample(value) for value in at]
    if None in values or abs(values[2] - 2 * values[1] + values[0]) > 1e-9 or abs(values[1] - values[0]) < 1e-9:
        raise ValueError("not linear")
    root = ("neg", ("div", at[0], ("add", at[1], ("neg", at[0]))))
    return _comparison(operator if (values[1] - values[0]).real > 0 else FLIPPED[operator], root)


def _formula_of(node, variables):
    """The formula of a set. Adds the name of its variable to `variables`. Raises ValueError for what is no such set."""
    tag = node[0]
    if tag in ("reals", "empty"):
        return EVERYTHING if tag == "reals" else NOTHING
    if tag == "interval" or tag == "tuple" and len(node) == 3:
        low, high, opening, closing = node[1:] if tag == "interval" else (*node[1:], "(", ")")
        ends, closed = (sample(low), sample(high)), (opening == "[", closing == "]")
        if _infinite(low) and closed[0] or _infinite(high) and closed[1]:
            raise ValueError("closed at infinity")
        if None not in ends and (ends[0].real > ends[1].real or ends[0] == ends[1] and not all(closed)):
            raise ValueError("an empty interval")
        operators = ">=" if closed[0] else ">", "<=" if closed[1] else "<"
        return ("and", _comparison(operators[0], low), _comparison(operators[1], high))
    if tag in ("cup", "cap", "minus"):
        left, right = _formula_of(node[1], variables), _formula_of(node[2], variables)
        return ("or", left, right) if tag == "cup" else ("and", left, right if tag == "cap" else ("not", right))
    if tag == "set" or tag == "list" and not is_set(node):
        return ("or", *(("=", point) for point in _members(node)))
    if tag == "list":
        formulas = [_formula_of(item, variables) for item in node[2:]]
        both = ("and", *formulas)  # a comma means "and", unless nothing satisfies both
        either = node[1] == "or" or node[1] == "," and not any(_profile(both, _ranks(both)))
        return ("or", *formulas) if either else both
    if tag == "builder":
        domain = node[1][2][1] if node[1][:2] == ("rel", ("in",)) else ("reals",)
        return ("and", _formula_of(domain, set()), _formula_of(node[2], set()))
    if tag == "rel":
        operators, sides = node[1], tuple(("sym", n[1]) if n[0] == "call" else n for n in node[2])
        if operators in (("in",), ("notin",)) and sides[0][0] == "sym":
            variables.add(sides[0][1])
            formula = _formula_of(sides[1], set())
            return formula if operators == ("in",) else ("not", formula)
        names = frozenset().union(*map(symbols, sides))
        if len(names) == 1 and set(operators) <= set(FLIPPED):
            variables |= names
            return ("and", *(_inequality(*link, *names) for link in zip(operators, sides, sides[1:])))
    if sample(node) is not None and not symbols(node):
        return ("=", node)
    raise ValueError(f"{tag} is no set of reals")


def _ranks(formula):
    """The place of each endpoint in a formula: 1, 3, 5, ... Raises ValueError if one is no real number."""
    found, stack, ranks, last = {}, [formula], {}, None
    while stack:
        operator, *parts = stack.pop()
        if operator in ("and", "or", "not"):
            stack += parts
        else:
            value = sample(parts[0])
            if value is None or symbols(parts[0]) or abs(value.imag) > 1e-12:
                raise ValueError("an endpoint that is no real number")
            found[parts[0]] = value.real
    for node, value in sorted(found.items(), key=lambda pair: pair[1]):
        close = last is not None and abs(value - found[last]) < 1e-6 * (1 + abs(value))
        same_place = close and same_value(node, last, Trail(False, []))
        ranks[node] = ranks[last] if same_place else ranks[last] + 2 if last is not None else 1
        last = node
    return ranks


def _holds(formula, place, ranks):
    operator, *parts = formula
    if operator in ("and", "or"):
        return (all if operator == "and" else any)(_holds(part, place, ranks) for part in parts)
    if operator == "not":
        return not _holds(parts[0], place, ranks)
    rank = ranks[parts[0]]
    return place == rank if operator == "=" else place < rank if operator == "<" else place <= rank


def _profile(formula, ranks):
    """Where the formula holds: at the endpoints, which have odd places, and in the gaps around them."""
    return [_holds(formula, place, ranks) for place in range(max(ranks.values(), default=-1) + 2)]


def same_set(a, b, trail):
    """Two sets of reals, at least one of them not a mere list of points; or sets and inequalities with parameters."""
    trail.tiers.append("sets of reals")
    try:
        names_a, names_b = set(), set()
        formulas = _formula_of(a, names_a), _formula_of(b, names_b)
        ranks = _ranks(("and", *formulas))
        if names_a and names_b and names_a != names_b:
            return False
        return _profile(formulas[0], ranks) == _profile(formulas[1], ranks)
    except (ValueError, KeyError):
        pass
    if a[0] != b[0]:
        return False
    if a[0] == "interval":
        return _all([a[3:] == b[3:], *(same(x, y, trail) for x, y in zip(a[1:3], b[1:3]))])
    if a[0] in ("cup", "cap"):
        return same_items(_pieces(a, a[0]), _pieces(b, b[0]), trail)
    if a[0] == "rel":
        return same_items(*(list(zip(n[1], n[2], n[2][1:])) for n in (a, b)), trail, same_relation)
    return same_items(a[2:], b[2:], trail) if a[0] == "list" else False


def _pieces(node, tag):
    return _pieces(node[1], tag) + _pieces(node[2], tag) if node[0] == tag else [node]


def same_relation(a, b, trail):
    """Two (operator, left, right): equations the same up to a factor, inequalities up to a positive one."""
    trail.tiers.append("equation or inequality")
    (operator_a, *sides_a), (operator_b, *sides_b) = a, b
    if operator_a in ("in", "notin"):
        return operator_a == operator_b and _all(same(x, y, trail) for x, y in zip(sides_a, sides_b))
    if operator_b == FLIPPED.get(operator_a) != operator_a:
        operator_b, sides_b = operator_a, sides_b[::-1]
    if "mod" in (sides_a[1][0], sides_b[1][0]):
        return operator_a == operator_b and _all(same_value(x, y, trail) for x, y in zip(sides_a, sides_b))
    differences = [("add", left, ("neg", right)) for left, right in (sides_a, sides_b)]
    pairs = [(sample(differences[0], i), sample(differences[1], i)) for i in range(8)]
    if operator_a != operator_b or any(0 in pair for pair in pairs) or not symbols(differences[0]):
        return False
    ratios = [x / y for x, y in pairs if x is not None and y is not None]
    if len(ratios) < 3 or any(abs(ratio - ratios[0]) > 1e-9 * abs(ratio) for ratio in ratios):
        return False
    return operator_a in ("=", "!=") or ratios[0].real > 0


# Statements and collections


def _is_name(node):
    """What may stand before an equals sign as the name of the answer: x, f(x), |AB|, (x, y), \\angle ABC."""
    tag = node[0]
    if tag == "mul":
        first, rest = node[1], node[2:]
        marked = first == ("sym", "d") or first[0] == "sym" and "'" in first[1]
        if marked or first[0] == "pow" and first[2] == MINUS_ONE:
            return all(child[0] == "sym" for child in rest)  # dy, f'(x), f^{-1}(x)
        upper = all(child[0] == "sym" and child[1][0].isupper() for child in node[1:])
        return upper or any(child[0] == "text" for child in node[1:])
    if tag in ("tuple", "ratio", "set", "div"):
        return all(_is_name(child) for child in node[1:])
    return tag in ("sym", "call", "text") or tag == "fn" and len(node) == 3 and not _has(node, "num", "add")


def _statement(node):
    """(name or None, value, rough values) of x = 2/6 = 1/3 ~ 0.33; what is no such statement is its own value."""
    whole = None, node, []
    if node[0] != "rel":
        return whole
    operators, sides = node[1:]
    if operators == ("in",) and _is_name(sides[0]):
        return sides[0], sides[1], []
    if not set(operators) <= {"=", "~"}:
        return whole
    if operators == ("=",) and _is_name(sides[1]) and not _is_name(sides[0]):
        sides = sides[::-1]  # 5 = x
    name = sides[0] if _is_name(sides[0]) else None
    cut = operators.index("~") + 1 if "~" in operators else len(sides)
    precise, rough = sides[name is not None : cut], sides[cut:]
    if name in sides[1:]:
        return whole  # x = x
    if not precise:
        return name, rough[-1], []
    if name is None and len(precise) > 1:
        values = {exact(side) for side in precise if not symbols(side)}
        if symbols(precise[-1]) or len(precise) == 2 and symbols(precise[0]) or len(values) > 1 and None not in values:
            return whole  # an equation; 2 + 2 = 5
    x = sample(precise[-1])
    rough = [(side, sample(side)) for side in rough if x is not None]
    return name, precise[-1], [side for side, y in rough if y is not None and abs(x - y) <= 0.01 * abs(x) + 0.005]


def _expand(node):
    """The trees that a tree with plus-minus signs stands for, at most 16. \\mp is the opposite of the last \\pm."""
    count = 0

    def mark(n):
        nonlocal count
        count += n[0] == "pm" or n[0] == "mp" and count == 0
        return (*n, count - 1) if n[0] in ("pm", "mp") else n

    marked = _rebuild(node, mark)
    if not 0 < count <= 4:
        return [node]

    def choose(choice):
        def pick(n):
            if n[0] not in ("pm", "mp"):
                return n
            return ("add", n[1], n[2] if choice[n[3]] == (n[0] == "pm") else ("neg", n[2]))

        return _rebuild(marked, pick)

    return [choose(choice) for choice in product((True, False), repeat=count)]


def _members(node):
    """The members of a list or set, plus-minus signs written out; None for anything else."""
    if node[0] not in ("list", "set") and _expand(node) == [node]:
        return None
    found = []
    for member in {"list": node[2:], "set": node[1:]}.get(node[0], (node,)):
        value = _statement(member)[1]
        found += _expand(value) if _has(value, "pm", "mp") else [member]
    return list(dict.fromkeys(found)) if node[0] == "set" else found


def same_items(a, b, trail, compare=None):
    """Two unordered collections, item by item."""
    if len(a) != len(b):
        trail.tiers.append("number of items")
        return False
    common = Counter(a) & Counter(b)
    a, b = (list((Counter(items) - common).elements()) for items in (a, b))
    if len(a) > 40:
        return None
    undecided = False
    for item in a:
        for index, other in enumerate(b):
            verdict = (compare or same)(item, other, trail)
            undecided |= verdict is None
            if verdict:
                del b[index]
                break
        else:
            return None if undecided else False
    return True


def _matrix(node):
    """A matrix's rows; a number times a matrix is multiplied out, (1,2,3) is a column. None for anything else."""
    if node[0] in ("matrix", "tuple"):
        return node[1:] if node[0] == "matrix" else tuple((cell,) for cell in node[1:])
    if node[0] == "pow" and node[2] == ("sym", "T"):
        rows = _matrix(node[1])
        return rows and tuple(zip(*rows))
    if node[0] in ("neg", "div", "mul") and len(node) <= 3:
        index = 2 if node[0] == "mul" else 1
        rows = _matrix(node[index])
        return rows and tuple(tuple((*node[:index], cell, *node[index + 1 :]) for cell in row) for row in rows)
    return None


def _compatible(a, b):
    """Whether two names may stand for one thing: x_1 and x, y and f(x), but not x and y."""
    if a[0] == b[0] and a[0] in ("sym", "call"):
        return a[1].partition("_")[0].lower() == b[1].partition("_")[0].lower()
    if a[0] == b[0] == "tuple":
        return all(map(_compatible, a[1:], b[1:]))
    return a[0] != b[0] or a[0] != "fn" or a == b


def same(a, b, trail):
    """Whether two trees are the same answer."""
    if a == b:
        trail.tiers.append("same tree")
        return a != ("raw", "")
    (name_a, value_a, rough_a), (name_b, value_b, rough_b) = _statement(a), _statement(b)
    if a[0] == b[0] == "rel" and {*a[1], *b[1]} <= {"=", "~"}:
        if name_a and name_b and _compatible(name_a, name_b):
            if (verdict := same_plain(value_a, value_b, trail)) is not False:
                return verdict
        return len(a[2]) == len(b[2]) == 2 and same_relation(*((n[1][0], *n[2]) for n in (a, b)), trail)
    if a[:2] == b[:2] == ("rel", ("in",)) and not _compatible(a[2][0], b[2][0]):
        return False  # x in A is not y in A
    verdict = same_plain(value_a, value_b, trail)
    for rough, other in [*((r, value_b) for r in rough_a), *((r, value_a) for r in rough_b)]:
        verdict = verdict or same_plain(rough, other, trail)
    return verdict


def same_plain(a, b, trail):
    """Two trees that are no assignments."""
    if a == b:
        trail.tiers.append("same tree")
        return True
    if "clock" in (a[0], b[0]):
        halves = {node[2] for node in (a, b) if node[0] == "clock"}
        return len(halves) == 1 and same_plain(*(node[1] if node[0] == "clock" else node for node in (a, b)), trail)
    for one, other in ((a, b), (b, a)):
        if one[:2] == ("list", "or") and other[0] != "list" and not is_set(one):  # 1/2 or 50 %
            if all(same(item, other, trail) for item in one[2:]):
                return True
        if one[0] == "text" and len(one) == 3 and other[0] != "text":  # \triangle ABC
            return same(one[2], other, trail)
        if one[0] == "text" and other[0] == "sym" and one[1] == other[1].lower():
            return True
        if one[0] == "set" and len(one) == 2 and other[0] not in ("set", "empty"):
            return same(one[1], other, trail)
        items = other[2:] if other[0] == "list" else other[1:] if other[0] == "set" else ()
        if one[0] == "tuple" and items and all(item[0] == "rel" for item in items):
            named = {show(_statement(item)[0]): _statement(item)[1] for item in items}  # x = 1, y = 2 is (1, 2)
            if len(named) == len(one) - 1 and "None" not in named:
                return _all(same(part, named[name], trail) for part, name in zip(one[1:], sorted(named)))
    if {a[0], b[0]} & {"raw", "text", "number set"}:
        trail.tiers.append("words")
        return False
    if {a[0], b[0]} == {"tuple", "interval"}:
        trail.tiers.append("brackets")
        return False
    if is_set(a) or is_set(b):
        return same_set(a, b, trail)
    items_a, items_b = _members(a), _members(b)
    if items_a is not None or items_b is not None:
        return same_items(items_a or [a], items_b or [b], trail)
    if a[0] == b[0] == "tuple":
        return len(a) == len(b) and _all(same(x, y, trail) for x, y in zip(a[1:], b[1:]))
    if a[0] == b[0] == "ratio" and len(a) == len(b):
        return _all(same_value(("mul", x, b[1]), ("mul", y, a[1]), trail) for x, y in zip(a[2:], b[2:]))
    rows_a, rows_b = _matrix(a), _matrix(b)
    if (rows_a or rows_b) and ("fn", "binomial") in (a[:2], b[:2]) and "tuple" not in (a[0], b[0]):  # looks a column
        rows_a, rows_b = rows_a or tuple(zip(a[2:])), rows_b or tuple(zip(b[2:]))
    if rows_a or rows_b:
        trail.tiers.append("shape")
        if not rows_a or not rows_b or [len(row) for row in rows_a] != [len(row) for row in rows_b]:
            return False
        return _all(same(x, y, trail) for row, other in zip(rows_a, rows_b) for x, y in zip(row, other))
    return "rel" not in (a[0], b[0]) and same_value(a, b, trail)


# ------------------------------------------------------------------------------------------------ verdicts


def words_of(text):
    """An answer's words in lower case if it is nothing but words or one letter, with or without brackets; else ""."""
    plain = WRAPPER.sub(r"\1", text[:MAX_ANSWER]).replace("$", "").replace("\\ ", " ").strip(" .*\"'`\n\t")
    plain = re.sub(r"\\(?:left|right)(?![a-z])|(?:the )?(?:correct )?answer(?: is|:) ", "", plain, flags=re.I)
    plain = " ".join(re.sub(r"^\((.*)\)$|^(\w)\)$|^(?:option|choice) \((\w)\)$", r"\1\2\3", plain).split())
    if not re.fullmatch(r"[^\W\d_]+(?:(?:, | |-(?=\w\w)|')[^\W\d_]+)*", plain):
        return ""
    return re.sub(r"^(?:the|an?|option|choice) (?=\w)", "", plain.lower())


SECOND_READINGS = [(re.compile(pattern), by) for pattern, by in [
    (r",(?=[1-9])(?!.*,0\d)", ", "),  # is 100,200 a number or a list?
    (r"(?<=\d)e(?=[+-]\d)", "e "),  # is 2e-3 a number or 2 times e, minus 3?
    (r"\+-", "+ -"),  # is 2+-3 two numbers or -1?
    (r"(?<=\d)(?:\s|\\[ ,;])*[mhsgL](?:\^\{?[23]\}?)?$", ""),  # is 80m a product or a length?
]]  # fmt: skip


@lru_cache(maxsize=4096)
def _judge(answer, reference, deep):
    words, others = words_of(answer), words_of(reference)
    if words and words == others:
        return True, "words"
    a, b, trail = read(answer), read(reference), Trail(deep, [])
    options = [CHOICE.match(WRAPPER.sub(r"\1", text)) for text in (answer, reference)]
    letters = [option[1].lower() if option else word for option, word in zip(options, (words, others))]
    if any(options) and all(len(letter) == 1 for letter in letters):
        return letters[0] == letters[1], "option letter"
    if options[0] and same(read(options[0][2]), b, trail) or options[1] and same(a, read(options[1][2]), trail):
        return True, "option's value"
    verdict = same(a, b, trail)
    for this, other, text in ((a, b, answer), (b, a, reference)):
        for pattern, by in SECOND_READINGS:
            if verdict or not pattern.search(text):
                continue
            if by == ", " and (this[0], other[0]) != ("num", "list"):
                continue
            if not by and (text is reference or symbols(_statement(other)[1])):
                continue
            verdict = same(read(pattern.sub(by, text)), other, trail) or verdict
    return verdict, trail.tiers[-1] if trail.tiers else "form"


def judge(answer, reference, deep=False):
    """(True, False or None for undecided; the tier that decided). deep: SymPy may be asked, which can take long."""
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False, "no text"
    answer, reference = answer.strip(), reference.strip()
    if not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return bool(answer) and read(answer) == read(reference), "length"
    try:
        return _judge(answer, reference, deep)
    except (ArithmeticError, RecursionError, ValueError):  # no known text leads here; none shall end a training run
        return False, "error"


def equivalent(answer, reference, timeout_s=TIMEOUT_S):
    r"""Whether an extracted answer equals the reference answer. False also when that cannot be decided in time.

    >>> equivalent(r"\frac{2}{4}", "0.5"), equivalent("(2,1)", "(1,2)")
    (True, False)
    """
    verdict = judge(answer, reference)[0]
    return bool(_ask([(answer, reference)], timeout_s)[0] if verdict is None else verdict)


def verify(text, reference, strict=False):
    """Whether a model's output ends in the reference answer. Never raises; strict as in `extract_answer`."""
    return bool(verify_many([(text, reference)], strict=strict)[0])


def verify_many(pairs, timeout_s=TIMEOUT_S, strict=False):
    """Verdicts for (text, reference) pairs, in their order; None for one that could not be decided in `timeout_s`.

    Nearly all are decided here, in a fraction of a millisecond each. What remains goes to worker processes, which are
    killed when a comparison exceeds its time.
    """
    answers = [extract_answer(text, strict) if isinstance(text, str) else None for text, _ in pairs]
    verdicts = [judge(answer, reference)[0] for answer, (_, reference) in zip(answers, pairs)]
    hard = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for i, verdict in zip(hard, _ask([(answers[i], pairs[i][1]) for i in hard], timeout_s)):
        verdicts[i] = verdict
    return verdicts


def canonical(answer):
    """A hashable key. Answers with the same key are equivalent; not all that are equivalent have the same key."""
    if words := words_of(answer.strip()):
        return "words", words
    node = read(answer.strip())
    name, value, rough = _statement(node)
    value = exact(value) if name is None and not rough and value[0] not in ("pct", "mod") else None
    return ("number", value) if isinstance(value, Fraction) else ("tree", node)


def accuracy_reward(text, reference):
    """1.0 if the last box after the thinking block holds the reference answer, else 0.0."""
    return float(verify(text, reference, strict=True))


def format_reward(text, think_tag="think"):
    r"""1.0 for a completion of the form [<think>thought</think>] words \boxed{answer} end, else 0.0.

    The thinking block may be missing. If there is one it comes first, is closed, holds a thought and is the only one.
    After it stands exactly one box, closed and not empty; after the box nothing but punctuation, white space, `*` and
    the end of a formula. A prompt that ends in "<think>" is part of `text`. An end-of-turn token is ignored.
    """
    tail = END_OF_TURN.split(text.strip(), maxsplit=1)[0].strip()
    opening, closing = f"<{think_tag}>", f"</{think_tag}>"
    if opening in tail or closing in tail:
        thought, _, rest = tail.removeprefix(opening).partition(closing)
        if not tail.startswith(opening) or tail.count(opening) != 1 or tail.count(closing) != 1 or not thought.strip():
            return 0.0
        tail = rest
    boxes = list(islice(re.finditer(r"\\(?:boxed|fbox)\s*\{", tail), 2))
    end = _braced(tail, boxes[0].end() - 1) if len(boxes) == 1 else None
    filled = end is not None and tail[boxes[0].end() : end - 1].strip()
    return float(bool(filled) and re.fullmatch(r"(?:[\s.,;:!$*]|\\[\])])*", tail[end:]) is not None)


# ------------------------------------------------------------------------------------------------ worker processes


@lru_cache(maxsize=1)
def _idle_workers(pid):
    """Workers of this process (not of one that it was forked from) that wait for their next comparison."""
    workers = []
    atexit.register(lambda: [worker.kill() for worker in workers])
    return workers


def _start_worker():
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    # in a session of its own: Ctrl-C asks the training run to stop, and must not end a grader in the middle of a step
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, start_new_session=True)
    worker.stdout.readline()  # it has loaded SymPy; only now the clock starts
    return worker


def _ask(pairs, timeout_s):
    """Verdicts of worker processes on (answer, reference) pairs; None where the time ran out."""

    def decide(pair):
        idle = _idle_workers(os.getpid())
        try:
            worker = idle.pop()
        except IndexError:
            worker = _start_worker()
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
    """The loop of a worker: reads lines of [answer, reference], writes lines of true, false or null."""
    import sympy  # noqa: F401  before the clock starts

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    except ImportError:  # not a POSIX system: time is the only limit
        pass
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(*json.loads(line), deep=True)[0]), flush=True)


# ------------------------------------------------------------------------------------------------ the command line


def show(node):
    """A tree on one line; a long number is rounded."""
    if isinstance(node, Fraction):
        return str(node) if max(node.numerator.bit_length(), node.denominator.bit_length()) < 400 else "(a long number)"
    if isinstance(node, tuple):
        return show(node[1]) if node and node[0] == "num" else f"({' '.join(map(show, node))})"
    return str(node)


def read_rows(path):
    """(rows, [(text, reference)]) of a .jsonl file; an answer beside a reference is a text, otherwise a reference."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = []
    for line, row in enumerate(rows, 1):
        reference = next((key for key in ("reference", "gold", "answer") if key in row), None)
        text = next((key for key in ("pred", "completion", "answer") if key in row and key != reference), None)
        if text is None or reference is None:
            raise ValueError(f"{path}:{line}: found {sorted(row)}; expected pred|completion|answer, gold|reference")
        pairs.append((row[text], str(row[reference])))
    return rows, pairs


def grade_file(path, strict, explain, timeout_s):
    """Prints the verdicts on a file: the total, and where `expected` is given the errors by category."""
    rows, pairs = read_rows(path)
    begin = time.perf_counter()
    verdicts = verify_many(pairs, timeout_s, strict)
    rate = len(rows) / (time.perf_counter() - begin + 1e-9)
    table = {}
    for row, (text, reference), verdict in zip(rows, pairs, verdicts):
        wrong = "expected" in row and bool(verdict) != row["expected"]
        if explain or wrong:
            answer = extract_answer(text, strict)
            tier = "worker process" if verdict is None else judge(answer, reference)[1]
            print(f"{'WRONG ' * wrong}{row.get('id', '')} {verdict} by {tier}: {answer!r} against {reference!r}")
        if "expected" in row:
            table.setdefault(row.get("category", "-"), Counter())[bool(row["expected"]), bool(verdict)] += 1
    right, undecided = sum(v is True for v in verdicts), sum(v is None for v in verdicts)
    print(f"{len(rows)} answers | {right} right | {undecided} undecided | {rate:.0f} per second")
    if not table:
        return
    print(f"\n{'category':24} {'cases':>6} {'agree %':>8} {'false +':>8} {'false -':>8}")
    shares = []
    for name, counts in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        shares.append(100 * (counts[True, True] + counts[False, False]) / counts.total())
        print(f"{name:24} {counts.total():6} {shares[-1]:8.2f} {counts[False, True]:8} {counts[True, False]:8}")
    print(f"{'mean over categories':24} {'':6} {sum(shares[:-1]) / len(table):8.2f}")


def main(args):
    if args.worker:
        return work()
    if args.file:
        return grade_file(args.file, args.strict, args.explain, args.timeout_s)
    if args.answer is None or args.reference is None:
        raise ValueError("found neither --file nor both --answer and --reference; give one of the two")
    answer = extract_answer(args.answer, args.strict)
    verdict, tier = judge(answer, args.reference)
    if verdict is None:
        verdict, tier = _ask([(answer, args.reference)], args.timeout_s)[0], "worker process"
    for name, text in (("answer", answer), ("reference", args.reference)):
        print(f"{name:10} {text!r}\n{'':10} {show(read(text.strip())) if text else '-'}")
    print(f"verdict    {'undecided' if verdict is None else 'equal' if verdict else 'not equal'}, by: {tier}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
