r"""Grades text: is the answer in a model's output the same as the reference answer?

    python verify.py --answer '\frac{2}{4}' --reference 0.5     # both readings and the verdict
    python verify.py --file results.jsonl --explain             # a file; with `expected`, a table

Text from a model is hostile, and nothing here evaluates it. An answer is cut out of the output,
split into tokens and parsed into a small tree of tuples, its normal form; two trees are then
compared by kind: words as words, sets of reals by where they hold, everything else by value.
Values are exact where they can be: a Fraction, or for rational functions an element of a large
prime field at a random point. The rest is sampled at complex and real points, first in doubles,
then with as many digits as the sizes on the way call for. Length, depth, digits, precision and
steps are bounded by counters, not clocks, so a verdict does not depend on the machine.

Conventions where graders differ: the last box wins, and boxes joined by "and" or a comma are one
answer. Bare lists and sets are unordered, tuples and bracketed lists of three are ordered. `x = 5`
is 5 and `y = f(x)` is f(x); other equations are equal up to a factor. Labels count. 28 % is 28
and 0.28. A unit or a counted noun is ignored beside a bare number; where both sides have words,
the words must agree. A decimal equals an exact value from 8 significant digits on.
"""

import argparse
import cmath
import json
import math
import random
import re
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from fractions import Fraction
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

MAX_TEXT = 200_000  # characters of an output that are searched for a box, from its end
MAX_PROSE = 20_000  # characters of an output without a box that are searched for an answer
MAX_ANSWER = 700  # characters of an answer that are parsed; longer ones are compared as strings
MAX_DEPTH = 40  # nested groups
MAX_TERMS = 2_000  # of a sum or product that is written out
MAX_BITS = 30_000  # of a numerator or denominator that is written out
MAX_PRECISION = 12_000  # bits of a number that is sampled
DECIMAL_DIGITS = 8  # significant digits from which on a decimal stands for an exact value
STEPS_PER_SECOND = 100_000  # operations at double precision that a slow core manages
TIMEOUT_S = 2.0  # for one comparison, as so many steps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Is an answer the same as the reference answer?")
    add = parser.add_argument
    add("--answer", help="an answer, or a whole model output")
    add("--reference", help="the reference answer")
    add("--file", help=".jsonl: pred|completion|answer, gold|reference, perhaps expected, category")
    add("--strict", action="store_true", help="accept only a box after the thinking block")
    add("--explain", action="store_true", help="with --file: print every row")
    add("--timeout-s", type=float, default=TIMEOUT_S, help="work for one comparison, in seconds")
    return parser.parse_args(argv)


# ---- extraction

CONTROL = re.compile(r"<\|(?:im_end|endoftext|im_start|eot_id)\|>|</s>")
THINK_OPEN = re.compile(r"<(?:think|thought)>")
THINK_CLOSE = re.compile(r"</(?:think|thought)>")
BOX = re.compile(r"[\\\x08](?:beginboxed|boxed|oxed|fbox|framebox)(?![a-zA-Z])\s*")
BETWEEN_BOXES = re.compile(  # of boxes that are one answer: "and", ", or", "for part (a) and"
    r"(?:\s|[$,;:&~()\[\]]|\\[\[\]()\\,;: ]|\\q?quad|\\text\s*\{|\}"
    r"|\b(?:and|or|for|in|part|case|question|problem|the|first|second|third|[a-e]|i{1,3}|\d)\b)*"
)
BETWEEN_FORMULAS = re.compile(r"(?:[\s,;&~]|\\[,;: ]|\\q?quad|\b(?:and|or)\b)*")
MATH = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\$([^$]{1,1000}?)(?<!\\)\$"
    r"|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)", re.S,
)  # fmt: skip
PERCENT = re.compile(r"(?:[$\s]|\\\))*(?:\\?%|per ?cent\b|pct\b)")
ANSWER_PHRASE = re.compile(
    r"####|^A:|^#+ *(?:Final )?Answer *\n|\b(?:answers?|correct (?:option|choice))\b[*_]*\s*"
    r"(?:is(?!n)|are|was|would be|=|:|(?=\$|\\\(|\\\[))[*_]*\s*:?", re.I | re.M,
)  # fmt: skip
REMARK = re.compile(  # "this answer is correct" is none
    r"(?:also |indeed |now )?(?:in)?(?:correct|right|wrong|valid|verified|consistent|reasonable)"
    r"(?:\s*$|,| (?:because|since|as|and|with|for)\b)", re.I,
)  # fmt: skip
CHANGE = r"(?:in|de)crease|more\b|less\b|gain|loss|profit|off\b"
VERDICT = re.compile(r"(?:(?i:yes|no|true|false)\b|\(?[B-J]\b\)?)(?!\s*,?\s*(?:or|and)\b|\s*/)")
LETTER_IN_PROSE = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|(?:think|believe|guess) (?:that )?it(?: is|'s))\s+\(?([A-J])\b"
)
LAST_LETTER = re.compile(r"(?:^|\n)[\s*$(]*([A-J])[\s*$).]*$")
PLACEHOLDER = re.compile(
    r"(?:\s|[?.…_$]|\\[lc]?dots|\\square|\\text\s*\{[\s?._]*\}|(?:\\text\s*\{)?(?:your |final |the )?"
    r"answer(?: here)?\}?)*", re.I,
)  # fmt: skip
STYLES = "text|textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathbf|mathsf|operatorname"
WRAPPER = re.compile(rf"\\(?:{STYLES})\s*\{{([^{{}}]*)\}}")
ENGLISH = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,}")
NOT_ENGLISH = set("or and in sqrt cbrt pi oo inf infinity sin cos tan cot sec csc log ln exp".split())
NUMBER_WITH_UNIT = re.compile(r"(\\?[$€£]?[-−]?[\d.,]*\d)(?:/?[a-zA-Z]{2,}|%)?")
OPTION = re.compile(  # (C) 12 or B, since ... or C - 12; but not (C) or (D), and not A: 5, B: 7
    r"\(?([A-J])(?:\)|[.:](?!\d)|,(?=\s[a-z]{2,})|\s[-–—](?=\s)(?=.*[a-z]{2}))"
    r"(?!\W*(?:or|and)\b|.*(?:\([A-J]\)|\b[A-J]:)|\s*[;+*/^=&]|\s*,\s*[^a-z\s]|-)"
    r"((?:\s|\\\W|\$)*\S.*)", re.S,
)  # fmt: skip


def group_end(text, begin):
    """Where the group whose opening brace stands at `begin` ends, or None if it is not closed."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def box_span(text):
    r"""(begin, end) of the content of the last `\boxed{}`; None if there is none or it is open.

    >>> box_span(r"\boxed{1} or \boxed{23}")
    (20, 22)
    """
    last = deque(BOX.finditer(text), maxlen=1)
    if not last or text[last[0].end() : last[0].end() + 1] != "{":
        return None
    end = group_end(text, last[0].end())
    return end and (last[0].end() + 1, end - 1)


def after_thinking(text):
    """(what follows the thinking block, or all if there is none; whether every block is closed)."""
    closes = deque(THINK_CLOSE.finditer(text), maxlen=1)
    tail = text[closes[0].end() :] if closes else text
    return tail, THINK_OPEN.search(tail) is None


def boxed_answer(text, strict):
    """The content of the last box, with that of boxes joined to it; None if there is no box."""
    found = []
    edge = None
    for match in reversed(deque(BOX.finditer(text), maxlen=20)):
        opened = text[match.end() : match.end() + 1] == "{"
        end = group_end(text, match.end()) if opened else None
        if edge is not None:
            joint = end and BETWEEN_BOXES.fullmatch(text, end, edge)
            if not joint or not re.search("[,;&]|and|or", joint[0]):
                break
        if end is not None:
            content = text[match.end() + 1 : end - 1]
            if edge is None and PERCENT.match(text, end):
                content += r"\%"
        elif strict:
            return None
        else:  # the closing brace is missing, or there never was one: `\boxed 5`
            content = re.split(r"\$|\n|\\\]|\\\)", text[match.end() + opened :], maxsplit=1)[0]
        if not strict and PLACEHOLDER.fullmatch(content):
            continue
        if not any(judge(content, other) for other in found):  # 15.5 or 31/2 is one answer
            found.insert(0, content)
        edge = match.start()
    return ", ".join(found) if found else None


def is_prose(text):
    return not set(ENGLISH.findall(WRAPPER.sub("", text))) <= NOT_ENGLISH


def formula_at(text, at, search=True):
    """(the next formula, where it ends), or None. `5$ to Jack and 7$` has no formula."""
    while match := (MATH.search if search else MATH.match)(text, at):
        content = match[match.lastindex]
        if match[0][0] != "$" or not is_prose(content) or not re.search(r"\s", content.strip()):
            return content, match.end()
        if not search:
            return None
        at = match.start() + 1
    return None


def is_formula(text):
    """Whether a text is nothing but mathematics, without the borders of a formula."""
    if len(text) > MAX_ANSWER or MATH.search(text) or is_prose(text):
        return False
    return read(text)[0] not in ("raw", "words")


def is_math_word(word):
    letters = re.findall("[a-zA-Z]+", re.sub(r"\\[a-zA-Z]+", "", word))
    if word in ("a", "A", "I", "-", "–", "—", "&", "*") or not re.search(r"[\w+*/^=√π<>]", word):
        return False
    return all(len(run) == 1 or run in NOT_ENGLISH - {"or", "and", "in"} for run in letters)


def number_in_prose(text, first):
    """The first or last run of mathematical words that has a digit, whole: 3x, 2^{10}, 5 + 4."""
    words = text.split()
    found = None
    at = 0
    while at < len(words) and not (first and found):
        bare = words[at].strip("*_\"'()[],.;:!?")
        if re.search(r"\d", bare) and (NUMBER_WITH_UNIT.fullmatch(bare) or is_math_word(bare)):
            begin = at
            while begin and is_math_word(words[begin - 1]) and words[begin - 1][-1] not in ",.;:!?":
                begin -= 1
            while at + 1 < len(words) and words[at][-1] not in ",.;:!?" and is_math_word(words[at + 1]):
                at += 1
            run = " ".join(words[begin : at + 1])
            if at + 1 < len(words) and re.match("per ?cent|pct", words[at + 1]):
                run += r"\%"
            bare = run.strip("*_\"',.;:?")
            bare = bare[:-1] if bare == run and bare[-1] == "!" else bare
            found = re.split(r"=|≈", bare)[-1].strip() or found
        at += 1
    if found and found.count("(") != found.count(")"):
        found = found.strip("()")
    return found


def last_value(text):
    """The last formula or the last number outside one, whichever comes later, or None."""
    formula = None
    at = 0
    while found := formula_at(text, at):
        formula, at = found
    return number_in_prose(text[at:], first=False) or formula


def after_phrase(rest):
    """The answer in what follows "the answer is": formulas, plain mathematics or its beginning."""
    rest = rest.lstrip(" \t\n*_:=")
    found = []
    at = 0
    while formula := formula_at(rest, at, search=False):
        found.append(formula[0])
        end = formula[1]
        at = BETWEEN_FORMULAS.match(rest, end).end()
    if found:
        return ", ".join(found) + (r"\%" if PERCENT.match(rest, end) else "")
    ends = r"\n|[.?](?=\s|$)|(?<![\\\dn)])!(?=\s|$)|\*\*"  # 5! is no end
    sentence = re.split(ends, rest, maxsplit=1)[0].strip()
    if is_formula(sentence) or OPTION.fullmatch(sentence):
        return sentence
    if REMARK.match(sentence):
        return None
    if re.match(r"not\b", sentence):
        return last_value(rest[len(sentence) :]) or sentence
    if verdict := VERDICT.match(sentence):
        return verdict[0]
    if number := re.match(r"[-−+\\$€£(]*[\d.]", sentence) and number_in_prose(sentence, first=True):
        hedge = re.search(rf"{re.escape(number)}\W*(?:(?:or|and)\W+[\d$\\]|{CHANGE})", sentence)
        return sentence if hedge else number
    return last_value(sentence) or sentence or None


def extract_answer(text, strict=False):
    r"""The answer in a model's output, or None.

    strict: the content of the last `\boxed{}` or `\fbox{}` after the thinking block. A block that
    was opened and never closed, or a box whose brace is never closed, means that there is no
    answer. Otherwise, in this order: the box, `<answer>` tags, "#### 42" and "the answer is ...",
    the whole text if it is nothing but mathematics, "option C", a letter on the last line, bold
    text, the last formula or number; what stands in the thinking block counts only if nothing
    follows it.

    >>> extract_answer(r"<think>\boxed{1}</think> so $\boxed{2}$ and $\boxed{3}$")
    '2, 3'
    """
    tail, closed = after_thinking(text)
    if strict and not closed:
        return None
    if not strict and not tail.strip():
        tail = text
    tail = tail[-MAX_TEXT:].replace("<|im_start|>assistant", "").lstrip()
    tail = CONTROL.split(tail, maxsplit=1)[0]
    boxed = boxed_answer(tail, strict)
    if strict or boxed is not None:
        return boxed
    tail = tail[-MAX_PROSE:]
    if tags := re.findall(r"<answer>(.*?)(?:</answer>|$)", tail, re.S):
        return tags[-1].strip()
    for phrase in reversed(deque(ANSWER_PHRASE.finditer(tail), maxlen=5)):
        if found := after_phrase(BOX.sub("", tail[phrase.end() :])):
            return found
    if is_formula(tail):
        return tail.strip()
    letters = LETTER_IN_PROSE.findall(tail) or LAST_LETTER.findall(tail)
    if letters:
        return letters[-1]
    bold = re.findall(r"\*\*([^*\n]+)\*\*", tail)
    return bold[-1] if bold and is_formula(bold[-1]) else last_value(tail)


# ---- tokens


class Unreadable(ValueError):
    """The text is not mathematics that this file knows, or exceeds a bound."""


class Token(NamedTuple):
    kind: str
    value: object = None
    text: str = ""
    space: bool = False  # white space stands before it


END = Token("end of text")
VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
SYMBOL_NAMES = dict(zip(
    "≤≥⩽⩾≦≧≠≈≅∞∪∩∈∉∅±∓∖°º˚√∛⌊⌋⌈⌉⟨⟩∠△…∧∨⇒≡∣αβγδεζηθλμνξπρστφχψωΔΓΘΛΣΦΨΩϕϵ∑∏∫→",
    "le ge le ge le ge ne approx approx infty cup cap in notin emptyset pm mp setminus degree "
    "degree degree sqrt cbrt lfloor rfloor lceil rceil langle rangle angle triangle ldots land "
    "lor Rightarrow equiv mid alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi "
    "rho sigma tau phi chi psi omega Delta Gamma Theta Lambda Sigma Phi Psi Omega phi epsilon "
    "sum prod int to".split(),
))  # fmt: skip
UNICODE = str.maketrans({
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("×·∙⋅∗", "*"), **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("|│", "|"), "‖": r"\|", **dict.fromkeys("′’‘“”", "'"),
    **dict.fromkeys("€£¥¢₹₩\u200b\ufeff\u2061", ""), **dict.fromkeys("\u00a0\u202f\u2009", " "),
    **{char: rf"\{name} " for char, name in SYMBOL_NAMES.items()},
    **{char: rf"\mathbb{{{letter}}}" for char, letter in zip("ℝℤℕℚℂ", "RZNQC")},
    **{char: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", char).split("⁄"))
       for char in VULGAR},
})  # fmt: skip
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ"
LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ"
PLAIN = str.maketrans(RAISED + LOWERED, "0123456789+-()nx" * 2)

CIRCLE = r"(?:\\circ(?![a-zA-Z])|\\(?:text|mathrm)\s*\{\s*o\s*\})"
REWRITES = [(re.compile(pattern, re.S), by) for pattern, by in [
    (r"\s*\.\.\.+", r"\\ldots "),
    (r"\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\\prime", lambda match: "'" * match[0].count("prime")),
    (r"\x08(?=oxed)", r"\\b"), (r"\x0c(?=rac)", r"\\f"),  # escapes that JSON has eaten
    (r"\\\\(?=(?:[dt]?frac|sqrt|pi|text|left|right|cdot|times|infty|cup|begin|end|in|pm)\b)", r"\\"),
    (rf"(?:\{{\s*\}})?\^\s*(?:\{{\s*{CIRCLE}\s*\}}|{CIRCLE})|\{{\s*\^\s*{CIRCLE}\s*\}}", r"\\degree "),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 1.5x10^3
    (r"\{?\s*\\(?:rm|bf|it|sf|tt)(?![a-zA-Z])\s*\{?([^{}]*)\}|\\(?:rm|bf|it)\s+", r"\\mathrm{\1}"),
    (r"(?<!\\)\$\s+\$(?=.)|\\\)\s+\\\(", r"\\quad "),  # formulas side by side
    (r"\{\s*\\?\$\s*\}|\\(?:text|mbox)\s*\{\s*\\?\$\s*\}|\\(?:math|text)dollar(?![a-z])", r"\\$"),
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " "), (r"\{\s*([-+:.])\s*\}", r"\1"), (r"\bper cent\b", "percent"),  # the borders of formulas
    (r"\\not\s*=", r"\\ne "), (r"\\not\s*\\in(?![a-z])", r"\\notin "),
    (r"([\])])\s*(?:U|u|union|\\text\s*\{\s*(?:U|union)\s*\})\s*(?=[\[(])", r"\1\\cup "),
    (r"(\\mathbb\s*\{?R\}?|\\R)\s*[\^_]\s*(?:\{\s*(?:>\s*0|\+)\s*\}|\+)", r"(0,\\infty)"),
    (r"[,;]?\s*\(?\s*[a-z]\s*\\in\s*\\(?:mathbb\s*\{?\s*)?[NZ]\}?\s*\)?$", ""),  # (k \in Z)
    (r"\(\s*\\?[bp]?mod\s*(\d+)\s*\)|\\b?mod(?![a-z])\s*\{?(\d+)\}?", r"\\pmod{\1\2}"),
    (rf"\\(?:{STYLES})\s*\{{([0-9A-Fa-f]+)\}}(?=\w*\s*_)|\(([0-9A-F]+)\)(?=\s*_)", r"\1\2"),
    (r"(?<=\d)\s*([AaPp])\.?\s?[Mm]\b\.?", r"\\text{ \1m}"),  # 7 p.m.
    (r"^(?:[\s=:*]|\\approx|\\therefore)+", ""),
]]  # fmt: skip
TRAILING = re.compile(r"(?:[\s.,;:~]|\\\\|\\[,;:! ]|\\$|\\q?quad|\*\*)+$")

GAP = r"(?:,\s?\\!\s?|(?:\\,)?\{,\s?\}\s?(?:\\!)?|\\[,!;: ]\s?|~|')"
NUMBER = r"(?:{}(?:\.\d+)?|\d+\{{,\}}\d+|\d+\.?\d*|\.\d*)".format
OUTSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,| (?!\d+\s*/))\d{{3}}(?!\d))+"))
INSIDE = re.compile(NUMBER(rf"[1-9]\d{{0,2}}(?:(?:{GAP}|,(?=0\d\d))\d{{3}}(?!\d))+"))  # (12,102)
EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.])")
PERIOD = re.compile(r"\\(?:overline|bar|dot)\s*\{?(\d+)\}?|(?<=\.)\((\d+)\)")
DOTS = re.compile(r"\s*\\[lc]?dots(?![a-z])")
LAYOUT = (
    "displaystyle|textstyle|scriptstyle|limits|nolimits|left|right|[bB]igg?[lr]?|middle|hline|bm"
    r"|boldsymbol|mathcal|mathit|mathbf(?!\s*\{?[RZ]\b)|math(?:ord|bin|rel|op|punct)|vec|hat|widehat"
    "|underline|boxed|fbox|phantom|hfill|[lL]arge|LARGE|[hH]uge|small|normalsize|checkmark|num"
    "|blacksquare|square|Box|qed|therefore|ensuremath"
)
LEXEME = re.compile(
    rf"(?P<space>(?:\s|~|\\[,;:!> ]|\\(?:left|right)\.(?!\d)|\\(?:{LAYOUT})(?![a-zA-Z])"
    r"|\\(?:color|textcolor|tag|label|hspace|vspace)\*?\s*\{[^{}]*\})+)"
    r"|(?P<literal>0[xX][0-9A-Fa-f]+|0[bB][01]+|0[oO][0-7]+)(?![0-9A-Za-z])"
    r"|(?P<digits>(?=[A-F]*\d)[0-9A-Fa-f]+(?=\s*_\s*\{?\s*(?:1[1-9]|[23]\d)))"  # base above ten
    r"|\\begin\s*\{(?P<begin>[a-zA-Z]+)\*?\}(?:\s*\{[clr|@ ]*\})?|(?P<end>\\end\s*\{[a-zA-Z]+\*?\})"
    r"|\\(?:mathbb|Bbb|mathds|mathbf)\s*\{?\s*(?P<set>[A-Z])\b\s*\}?|\\(?P<domain>[RZNQ])(?![a-zA-Z])"
    r"|(?P<number>\d|\.(?=\d|\\overline))|\\(?P<command>[a-zA-Z]+)|(?P<letters>[a-zA-Z]+)"
    r"|(?P<symbol>\\\\(?:\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?|\\.|<=|>=|(?<![\d)])!=|==|\*\*|=>|\+/?-|.)",
    re.S,
)  # fmt: skip
WORD_IN_TEXT = re.compile(r"[a-zA-Z]+(?:['.\-][a-zA-Z]+)*")  # sq.ft, don't

SYMBOLS = {
    **{char: char for char in "+-*/^_!%()[]{}|,;:&"}, "'": "prime", "**": "^", "\\%": "%",
    "\\{": "set{", "\\}": "set}", "\\|": "|", "\\&": "and", "\\\\": "newline", "+-": "pm",
    "+/-": "pm", "\\$": "currency",
}  # fmt: skip
RELATIONS = {
    **{name: name for name in ("=", "<", ">", "<=", ">=", "!=", "in", "notin", "to")},
    **dict.fromkeys(["==", "equiv"], "="), **dict.fromkeys(["le", "leq", "leqslant", "leqq"], "<="),
    **dict.fromkeys(["ge", "geq", "geqslant", "geqq", "=>"], ">="), "lt": "<", "gt": ">",
    **dict.fromkeys(["ne", "neq"], "!="), **dict.fromkeys("approx simeq cong doteq".split(), "~"),
    "rightarrow": "to",
}  # fmt: skip
BIG = ("sum", "prod", "int", "iint", "oint", "lim")
COMMANDS = {
    **{name: name for name in (
        "pm mp cup cap mid langle rangle lfloor rfloor lceil rceil frac sqrt cbrt binom choose "
        "prime pmod over quad"
    ).split()},
    **dict.fromkeys(["cdot", "times", "ast"], "*"), "div": "/", "bigcup": "cup",
    **dict.fromkeys(["setminus", "backslash"], "minus"), "colon": ":", "qquad": "quad",
    **dict.fromkeys("lvert rvert vert lVert rVert Vert".split(), "|"), "lbrace": "set{",
    "rbrace": "set}", "lbrack": "[", "rbrack": "]", "cr": "newline", "percent": "%",
    **dict.fromkeys("dfrac tfrac cfrac sfrac nicefrac".split(), "frac"),
    **dict.fromkeys(["dbinom", "tbinom"], "binom"), "infty": "inf",
    **dict.fromkeys(["emptyset", "varnothing"], "empty"), "surd": "sqrt",
    **dict.fromkeys(["degree", "textdegree"], "deg"), **dict.fromkeys(["land", "wedge"], "and"),
    **dict.fromkeys("angle measuredangle sphericalangle triangle overrightarrow".split(), "name"),
    **dict.fromkeys(["overline", "bar"], "bar"), **dict.fromkeys(["lor", "vee"], "or"),
    **dict.fromkeys(["Rightarrow", "implies"], "so"),
    **dict.fromkeys("text textbf textit textrm textnormal mbox hbox emph textsf texttt".split(), "text"),
    **dict.fromkeys(["mathrm", "operatorname", "mathsf"], "roman"),
    **dict.fromkeys(BIG, "big"),
    **dict.fromkeys("odot otimes oplus ominus circ bullet star bmod".split(), "op"),
}  # fmt: skip
FUNCTIONS = {
    **{name: name for name in (
        "sin cos tan cot sec csc asin acos atan acot sinh cosh tanh coth asinh acosh atanh exp Abs "
        "floor factorial gcd lcm cis"
    ).split()},
    **{"arc" + name: "a" + name for name in "sin cos tan cot sec csc".split()}, "arsinh": "asinh",
    "arcosh": "acosh", "artanh": "atanh", "ln": "log", "log": "Log", "lg": "log10", "abs": "Abs",
    "ceil": "ceiling", "min": "Min", "max": "Max", "conj": "conjugate", "Re": "re", "Im": "im",
    "tg": "tan", "ctg": "cot", "arctg": "atan",
}  # fmt: skip
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Delta Gamma Theta Lambda Sigma Phi Psi Omega "
    "ell hbar".split()
)
KNOWN = {  # commands, by the kind and value of their token
    **{name: ("fn", function) for name, function in FUNCTIONS.items()},
    **{name: ("rel", relation) for name, relation in RELATIONS.items()},
    **{name: (kind, name) for name, kind in COMMANDS.items()}, "pi": ("const", "pi"),
    "imath": ("const", "i"), **dict.fromkeys("ldots dots cdots".split(), ("sym", "...")),
    "partial": ("sym", "d"),
}  # fmt: skip
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMERALS = {word: value for value, word in enumerate(  # up to ninety-nine
    ONES + [f"{ten}-{ONES[one]}" if one else ten for ten in TENS for one in range(10)]
)}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = {name: line.split()[0] for line in (  # every spelling by the first of its line
    "cm centimeter centimetre centimeters centimetres|mm millimeter millimetre millimeters|km "
    "kilometer kilometre kilometers kilometres|m meter metre meters metres|nm|ft foot feet|in inch "
    "inches|mi mile miles|yd yard yards|kg kilogram kilograms|g gram grams gm|mg milligram|lb lbs "
    "pound pounds|oz ounce ounces|L l liter litre liters litres|ml mL milliliter milliliters|h hr "
    "hrs hour hours|min mins minute minutes|s sec secs second seconds|ms|day days|week weeks|month "
    "months|yr year years|mph|kph|hz Hz|degree degrees deg °|F|C|K kelvin|J joule joules|kJ kj|N "
    "newton newtons|W watt watts|kW kw|V volt volts|A amp amps|Pa pa|mol|gal gallon gallons|rad "
    "radian radians|pt pts point points|dollar dollars usd|cent cents|eur euro euros|gbp|inr|rpm|^2 "
    "square sq squared|^3 cubic cu cubed|/ per"
).split("|") for name in line.split()}  # fmt: skip
IGNORED = set("units unit of the a an in total each approximately about th st nd rd".split())
STATEMENT = set(  # words that say something of what stands before them, and are never dropped
    "is are was were be has have had does do not no non never none isn't aren't doesn't cannot even "
    "odd prime composite increase increases increased increasing decrease decreases decreased "
    "decreasing gain gained loss lost more less fewer greater least most than over under above below "
    "before after ago later earlier up down left right north south east west northeast northwest "
    "southeast southwest clockwise counterclockwise anticlockwise higher lower longer shorter faster "
    "slower older younger larger smaller bigger positive negative true false rise fall growth decline "
    "drop profit deficit surplus discount off ahead behind forward forwards backward backwards debit "
    "credit rational irrational converges diverges real imaginary if when where only except without "
    "reduced reduction raised won without equal equals exceeds at between or from".split()
)
SMALL_WORDS = set("yes no not odd even true false none all the red dne if for any is are of to we us usd old per".split())


def read_number(text, at, inside):
    """The number at `at`: (value, unit in the last place or 0 for an exact one, where it ends)."""
    match = (INSIDE if inside else OUTSIDE).match(text, at)
    end = match.end()
    literal = re.sub(r"\{,\}(?!\\!|\d{3}(?!\d))", ".", match[0])  # 3{,}14 but 3{,}140
    whole, point, decimals = re.sub(r"[^\d.]", "", literal).partition(".")
    unit = Fraction(1, 10 ** len(decimals))
    value = int(whole + decimals or "0") * unit
    period = PERIOD.match(text, end) if point else None
    dots = DOTS.match(text, end) if decimals else None
    if dots:
        period = re.search(r"(\d+?)\1\1+$", decimals)  # 0.333... is 1/3
    if period:
        end = (dots or period).end()
    if period:
        digits = period[period.lastindex]
        return value + unit * Fraction(int(digits), 10 ** len(digits) - 1), Fraction(0), end
    unit = unit if decimals else Fraction(0)
    if exponent := EXPONENT.match(text, end):
        scale = Fraction(10) ** int(exponent[1])
        return value * scale, unit * scale, exponent.end()
    return value, unit, end


def read_letters(run, mode, space, before, alone):
    """Tokens of a run of letters: functions, products of variables, words. before: a token."""
    low = run.lower()
    after_number = before.kind in ("number", "word", "deg")

    def token(kind, value=None):
        return [Token(kind, value, run, space)]

    if low in ("and", "or"):
        return token(low)
    if low in ("percent", "pct"):
        return token("%")
    if low == "to" and before.kind == "number":
        return token(":")
    if len(run) == 1:
        unit = before.kind == "deg" and run in "CF" or mode == "roman" and after_number and run not in "ei"
        if unit or mode == "text" and run != "i":
            return token("word", run if run in UNITS else low)
        return token("const" if run in "ie" else "sym", run)
    if after_number and (low in UNITS or low in ("th", "st", "nd", "rd")):
        return token("word", low)
    if mode == "text" and run in FUNCTIONS and alone and low not in ("min", "max", "log"):
        return token("fn", FUNCTIONS[run])
    if mode != "text":
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
        names = "sqrt|sin|cos|tan|cot|log|ln|pi|theta"
        mixed = re.fullmatch(rf"([a-zA-Z]?)({names})([a-zA-Z]?)", run)
        if mixed and mode is None:  # xsin, lnx
            parts = [name for name in mixed.groups() if name]
            return [t for name in parts for t in read_letters(name, mode, False, END, False)]
    listed = low in SMALL_WORDS or low in NUMERALS or low in UNITS and len(run) > 2
    if mode or listed or run in ("II", "III", "IV", "VI") or len(run) > 2 and run.istitle():
        return token("word", low)
    product = low in "abcdefghijklmnopqrstuvwxyz" and not run.isupper()  # abcd, xyz
    vowel = (alone or space and after_number) and len(run) > 2 and re.search("[aeiou]", low)
    if not product and (len(run) > 3 or vowel):
        return token("word", low)
    return [t for letter in run for t in read_letters(letter, None, False, END, False)]



def tokenize(text, mode=None, outer=END):
    """The tokens of a normalised text. mode: None, "text" in \\text{}, "roman" in \\mathrm{}."""
    found = []
    at = 0
    space = False
    brackets = 0
    while at < len(text):
        match = LEXEME.match(text, at)
        kind = match.lastgroup
        lexeme = match[kind]
        start = at
        at = match.end()
        count = len(found)
        before = found[-1] if found else outer
        if kind == "literal":
            found.append(Token("number", (Fraction(int(lexeme, 0)), Fraction(0)), lexeme, space))
        elif kind == "digits":
            found.append(Token("number", None, lexeme, space))
        elif kind == "number":
            value, unit, at = read_number(text, start, brackets > 0)
            found.append(Token("number", (value, unit), text[start:at], space))
        elif kind == "letters":
            if mode:
                lexeme = WORD_IN_TEXT.match(text, start)[0]
                at = start + len(lexeme)
            found += read_letters(lexeme, mode, space, before, lexeme == text.strip())
        elif kind == "command" and COMMANDS.get(lexeme) in ("text", "roman"):
            match = re.compile(r"\s*(?:(\{)|([a-zA-Z]))").match(text, at)
            end = group_end(text, match.end() - 1) if match and match[1] else match and match.end()
            if not end:
                raise Unreadable("text without its group")
            content = match[2] or text[match.end() : end - 1]
            inner = tokenize(content, COMMANDS[lexeme], before)
            if len(inner) == 1 and inner[0].kind == "word" and re.match(r"\s*(?:\\left\s*)?\(", text[end:]):
                inner = [Token("sym", content.strip(), content)] if not mode and before.kind != "number" else inner
            if inner:
                found += [inner[0]._replace(space=True), *inner[1:]]
            at = end
        elif kind == "command":
            lexeme = lexeme if lexeme != "Delta" else match[0]
            found.append(Token(*KNOWN.get(lexeme, ("sym", lexeme.lstrip("\\"))), lexeme, space))
        elif kind == "symbol":
            if lexeme in RELATIONS:
                found.append(Token("rel", RELATIONS[lexeme], lexeme, space))
            elif (kind := SYMBOLS.get(lexeme[:2] if lexeme[0] == "\\" else lexeme)) is not None:
                brackets += (kind in ("(", "[", "set{")) - (kind in (")", "]", "set}"))
                found.append(Token("and" if kind == "&" and mode else kind, None, lexeme, space))
            elif not (mode and lexeme in ".\"`?"):
                raise Unreadable(f"unknown character {lexeme!r}")
        elif kind != "space":  # begin, end, set
            found.append(Token("set" if kind == "domain" else kind, lexeme, lexeme, space))
        space = kind == "space" or (space and len(found) == count)
    return found


def separate(tokens):
    """The tokens with each \\quad a comma where it parts two things, and dropped elsewhere."""
    found = []
    for token, after in zip(tokens, [*tokens[1:], END]):
        if token.kind == "quad":
            before = found[-1].kind if found else "end of text"
            closing = (*SEPARATORS, "quad", "end of text", "word", "pmod", "rel", ")", "}", "set}", "&")
            if before in (*SEPARATORS, "end of text", "(", "{", "rel", "&") or after.kind in closing:
                continue
            token = Token(",", None, ",")
        found.append(token)
    return found
# ---- parser
#
# A tree is a nested tuple (tag, ...):
#   values      ("num", Fraction, unit in the last place) ("sym", name) ("const", "pi"|"e"|"i")
#               ("inf",) ("add", a, ...) ("mul", a, ...) ("pow", a, b) ("root", n, a)
#               ("fn", name, a, ...) ("call", name, a, ...) ("pm"|"mp", a, b) ("pct", a)
#               ("based", value, base) ("mod", a, m) ("ratio", a, b, ...)
#               ("time", hour, minute, second or "", "a" or "p" or "") ("quantity", a, units, nouns)
#   collections ("list", "," or "or", a, ...) ("set", a, ...) ("tuple", a, ...) ("array", a, ...)
#               ("matrix", row, ...), a row being a tuple
#   sets        ("interval", low, high, "[" or "(", "]" or ")") ("cup"|"cap"|"minus", a, b)
#               ("reals",) ("empty",) ("number set", letter) ("builder", what, condition)
#   statements  ("rel", operators, sides)
#   words       ("words", words) ("named", kind, what) ("option", letter, value or None)
#               ("raw", string) for what cannot be parsed
# An unknown function, and a sum, product, integral or limit that is not written out, is a "call".

LOWEST, CLAUSE, SIDE, TERM, FACTOR = 1, 4, 5, 8, 9
POWER = {  # what stands between two operands binds them so tightly
    "newline": 1, ";": 1, "or": 2, ",": 3, "and": 3, "so": 3, "rel": 4, ":": 5, "cup": 6, "cap": 6,
    "minus": 6, "+": 7, "-": 7, "pm": 7, "mp": 7, "*": 8, "/": 8, "op": 8, "word": 8, "currency": 8,
}  # fmt: skip
SEPARATORS = ("newline", ";", "or", ",", "and")
CLOSING = ("end of text", "end", "}", "set}", ")", "]", "rangle")
BRACKETS = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
OPERANDS = {*BRACKETS, *"number sym const fn { set{ frac sqrt cbrt binom begin inf set empty bar name big".split()}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc", "cis"}
INVERTIBLE = TRIGONOMETRIC | {"sinh", "cosh", "tanh"}
LEAD_IN = set(
    "the a an answer final is are was so thus hence therefore equals equal to value result solution "
    "solutions we get have choice option approximately about roughly exactly that it be of all point "
    "points pair pairs ordered vector interval values numbers roots domain range us usd rs".split()
)
TEXT_VALUES = {
    **dict.fromkeys("no solution|no solutions|no real solution|no real solutions|no real roots|"
                    "empty set|none".split("|"), ("empty",)),
    **dict.fromkeys("all real numbers|all reals|real numbers|reals|all real x".split("|"), ("reals",)),
    **dict.fromkeys(("does not exist", "undefined", "not defined"), ("words", "dne")),
    **dict.fromkeys(("all integers", "integers"), ("number set", "Z")), "infinity": ("inf",),
}  # fmt: skip


def number(value):
    return ("num", Fraction(value), Fraction(0))


ONE, MINUS_ONE = number(1), number(-1)


def children(node):
    return (child for child in node if isinstance(child, tuple) and child)


def rebuild(node, fn):
    """The tree with `fn` applied to every node, leaves first."""
    if not node or not isinstance(node[0], str):  # a row, or a tuple of words
        return tuple(rebuild(child, fn) if isinstance(child, tuple) else child for child in node)
    return fn(tuple(rebuild(child, fn) if isinstance(child, tuple) else child for child in node))


def has(node, *tags):
    return node[node[0] == "fn"] in tags or any(has(child, *tags) for child in children(node))


def chain(tag, a, b):
    """a + b or a * b, without nesting."""
    return (tag, *(a[1:] if a[0] == tag else (a,)), *(b[1:] if b[0] == tag else (b,)))


def negate(a):
    return ("num", -a[1], a[2]) if a[0] == "num" else chain("mul", MINUS_ONE, a)


def divide(a, b):
    return chain("mul", a, ("pow", b, MINUS_ONE))


def is_integer(node):
    return node[0] == "num" and node[2] == 0 and node[1].denominator == 1


@lru_cache(maxsize=1024)
def symbols(node):
    """The names of a tree's variables."""
    names = frozenset(node[1:2] if node[0] in ("sym", "call") else ())
    return names.union(*(symbols(child) for child in children(node)))


def infinite(node):
    """1 for infinity, -1 for minus infinity, 0 for anything else."""
    return -infinite(node[2]) if node[:2] == ("mul", MINUS_ONE) else int(node == ("inf",))


def listed(kind, items):
    """A list; a list in it is spliced in unless it has statements: p=5, q=2; p=7, q=2."""
    flat = []
    for item in items:
        splice = item[0] == "list" and not any(part[0] == "rel" for part in item[2:])
        flat += item[2:] if splice else [item]
        kind = "or" if splice and item[1] == "or" else kind
    return ("list", kind, *flat)


def numeral(words):
    """The tree of "minus twenty-five thousand", or None."""
    total = 0
    tail = 0
    names = words.split()
    negative = names[0] in ("minus", "negative")
    for name in names[negative:]:
        if name == "hundred" and tail:
            tail *= 100
        elif name in SCALES and tail:
            total += tail * SCALES[name]
            tail = 0
        elif name in NUMERALS and tail % 100 == 0:
            tail += NUMERALS[name]
        else:
            return None
    return number(-total - tail if negative else total + tail)


def quantity(value, words):
    """A value with its unit or counted noun; Unreadable if the words are no such thing."""
    names = words.split()
    if names and names[0].replace(".", "") in ("am", "pm"):
        return (*(value[:-1] if value[0] == "time" else ("time", value)), names[0][0])
    for name in [name for name in names if name in SCALES]:
        value = chain("mul", value, number(SCALES[name]))
        names.remove(name)
    units = [UNITS[name] for name in names if name in UNITS]
    nouns = [re.sub("e?s?$", "", name) for name in names if name not in UNITS.keys() | IGNORED]
    if STATEMENT & set(names) or nouns and symbols(value):
        raise Unreadable("words that are no unit")
    if value[0] == "quantity":
        units += value[2]
        nouns += value[3]
        value = value[1]
    if not units and not nouns:
        return value
    return ("quantity", value, tuple(sorted(units)), tuple(sorted(set(nouns))))


def unit_text(node):
    """The words of a unit written as a term, such as \\frac{\\text{km}}{\\text{h}}, or None."""
    if node[0] == "words":
        return node[1]
    if node[0] == "pow" and (inner := unit_text(node[1])):
        return f"/ {inner}" if node[2] == MINUS_ONE else f"{inner} ^{show(node[2])}"
    if node[0] == "mul":
        parts = [unit_text(child) for child in node[1:]]
        return None if None in parts else " ".join(parts)
    return None


class Parser:
    """Precedence climbing over a list of tokens: each method returns the tree of what it takes."""

    def __init__(self, tokens):
        self.tokens = [*tokens, END, END, END]
        self.at = 0
        self.depth = 0
        self.context = "open"  # "|" opens an absolute value; in "abs" and "set" it closes or parts

    @property
    def kind(self):
        return self.tokens[self.at].kind

    def accept(self, *kinds):
        if self.kind not in kinds:
            return None
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, *kinds):
        token = self.tokens[self.at]
        if kinds and token.kind not in kinds:
            expected = " or ".join(kinds)
            raise Unreadable(f"found {token.text or token.kind!r} where {expected} was expected")
        self.at += 1
        return token

    def inside(self, context, method, *arguments):
        """The result of `method`, in another context."""
        outer = self.context
        self.context = context
        result = method(*arguments)
        self.context = outer
        return result

    def expression(self, level=LOWEST):
        """An operand, and all operators and operands that bind at least as tightly as `level`."""
        if self.depth == MAX_DEPTH:
            raise Unreadable("nested too deeply")
        self.depth += 1
        left = self.operand()
        while (power := self.power()) >= level:
            left = self.join(left, power)
        self.depth -= 1
        return left

    def power(self):
        """How tightly the next token binds what stands around it; 0 if it ends the expression."""
        while self.context == "aligned" and self.accept("&"):
            pass
        token = self.tokens[self.at]
        if token.kind == ":" and self.context == "set":
            return 0
        if self.starts_operand():
            new = token.space and token.kind == "sym" and self.is_named(self.at)
            return POWER[","] if new else TERM
        return POWER.get(token.kind, 0)

    def is_named(self, at):
        """Whether another equation begins here, as in x = 1 y = 2."""
        after = self.tokens[at + 1 :]
        after = after[2 if after[0].kind == "_" and len(after) > 2 else 0 :]
        before = any(token.kind == "rel" for token in self.tokens[:at])
        return before and after[0][:2] == ("rel", "=") and self.tokens[at - 1].kind not in ("*", "/")

    def starts_operand(self):
        return self.kind in OPERANDS or self.kind == "|" and self.context in ("open", "aligned")

    def join(self, left, power):
        """`left`, what stands next, and the operand behind it."""
        kind = self.kind
        if power < CLAUSE:
            return self.join_clauses(left, power)
        if kind == "word" or kind == "currency":
            return quantity(left, self.unit())
        if self.starts_operand():
            return self.juxtapose(left)
        token = self.take()
        if kind == "rel":
            while self.context == "aligned" and self.accept("&"):
                pass
            right = self.expression(SIDE)
            if self.accept("pmod"):
                right = ("mod", right, self.argument())
            operators, sides = left[1:] if left[0] == "rel" else ((), (left,))
            relation = token.value
            if relation == "=" and right[0] == "mul" and right[2:] == (("sym", "..."),):
                relation, right = "~", right[1]  # 3/7 = 0.428...
            return ("rel", (*operators, relation), (*sides, right))
        if kind == ":":
            return self.colon(left)
        if kind == "/" and self.kind == "word":
            return quantity(left, "/ " + self.unit())
        right = self.expression(power + 1)
        while kind == "/" and right[0] in ("sym", "mul") and self.kind == "sym" and not self.tokens[self.at].space:
            right = chain("mul", right, self.expression(FACTOR))  # t/RC
        if kind == "+":
            return chain("add", left, right)
        if kind == "-" and left[0] not in ("reals", "number set"):
            return chain("add", left, negate(right))
        if kind == "*":
            return chain("mul", left, right)
        if kind == "/":
            return divide(left, right)
        if kind == "op":
            return ("call", token.value, left, right)
        return ("minus" if kind == "-" else kind, left, right)

    def join_clauses(self, left, power):
        if self.accept("so"):  # of a chain of implications the last counts
            right = self.expression(CLAUSE)
            return right if left[0] == right[0] == "rel" else ("call", "implies", left, right)
        items = [left]
        kinds = set()
        while self.power() == power and self.kind != "so":
            while separator := self.accept(*SEPARATORS):
                kinds.add(separator.kind)
            if self.kind in CLOSING:
                break
            items.append(self.expression(power + 1))
        return listed("or" if "or" in kinds else ",", items) if len(items) > 1 else left

    def colon(self, left):
        """A ratio, a time or a label."""
        name = left[0] == "words" or left[0] == "sym" and left[1][0].isupper()
        if name and self.kind not in ("sym", "set{"):
            return ("rel", ("=",), (left, self.expression(CLAUSE)))
        parts = [left]
        texts = []
        self.at -= 1
        while self.accept(":"):
            parts.append(self.expression(POWER[":"] + 1))
            texts.append(self.tokens[self.at - 1].text)
        half = ""
        if parts[-1][0] == "time":  # 7:30 p.m.
            half = parts[-1][-1]
            parts[-1] = parts[-1][1]
        if all(map(is_integer, parts)) and (half or all(re.fullmatch("[0-5][0-9]", text) for text in texts)):
            clock = [int(part[1]) for part in parts]
            if half or clock[0] < 25 and (math.gcd(*clock) > 1 or any(text[0] == "0" for text in texts)):
                return ("time", *parts, half)
        return ("ratio", *parts)

    def juxtapose(self, left):
        if left[0] == "num" and self.kind == "number":
            raise Unreadable("two numbers side by side")
        if left[0] == "quantity":
            if self.kind != "number":
                raise Unreadable("an expression goes on after its unit")
            return listed(",", [left, self.expression(TERM)])  # 3 hours 20 minutes
        right = self.expression(FACTOR)
        words = unit_text(right)
        return quantity(left, words) if words else chain("mul", left, right)

    def unit(self):
        """Words, or a unit such as `cm^2`, `m / s` or `miles per hour`."""
        words = []
        while True:
            after = self.tokens[self.at + 1].kind
            if self.kind in ("word", "currency"):
                words.append("dollar" if self.kind == "currency" else self.tokens[self.at].value)
                self.at += 1
            elif self.kind in ("/", "*") and after in ("word", "sym"):
                words += ["/"] if self.take().kind == "/" else []
                if self.kind == "sym":
                    words.append(self.take().value)
            elif words and self.accept("^"):
                words.append("^" + show(self.script()))
                if words[-1].startswith("^-"):
                    words[-1:] = ["/"] + (["^" + words[-1][2:]] if words[-1] != "^-1" else [])
            else:
                return " ".join(words)

    # operands

    def operand(self):
        sign = self.accept("+", "-", "pm", "mp")
        if sign and sign.kind in ("pm", "mp"):
            return (sign.kind, number(0), self.expression(TERM))
        if sign:
            value = self.expression(TERM)
            return negate(value) if sign.kind == "-" else value
        if self.kind == "word":
            return self.words()
        if self.accept("currency"):
            value = self.expression(FACTOR)
            return quantity(value, "dollar " + self.unit())
        value = self.postfix(self.atom())
        fraction = self.at + (self.kind == "{")
        if is_integer(value) and self.tokens[self.at - 1].kind == "number":
            return self.mixed(value, fraction)
        return value

    def mixed(self, value, fraction):
        """A mixed number such as 1\\frac45 or 2 1/3, or the value itself."""
        begin = self.at
        if self.tokens[fraction].kind == "frac":
            part = self.postfix(self.atom())
            inner = part[1] if part[0] == "pct" else part
            plain = inner[0] == "mul" and len(inner) == 3 and inner[2][0] == "pow"
            plain = plain and is_integer(inner[1]) and is_integer(inner[2][1])
            share = exact(inner) if plain else None
            if share is not None and 0 < share < 1:
                return number(value[1] + share) if inner is part else ("pct", number(value[1] + share))
        elif self.kind == "number" and self.tokens[self.at].space:
            top, slash, bottom = self.tokens[self.at : self.at + 3]
            if slash.kind == "/" and bottom.kind == "number" and 0 < top.value[0] < bottom.value[0]:
                self.at += 3
                return self.postfix(number(value[1] + top.value[0] / bottom.value[0]))
        self.at = begin
        return value

    def words(self):
        """Words before an operand, which must be a phrase like "the answer is", or a text."""
        words = []
        while self.kind == "word":
            words.append(self.take().value)
        if words[:2] in (["all", "real"], ["all", "reals"]) and words[-1] in ("except", "but"):
            return ("minus", ("reals",), ("set", *items_of(self.expression())))
        if self.starts_operand() or self.kind in ("-", "+", "pm", "currency"):
            ending = words[-1] in ("is", "are", "equals", "be") or set(words) <= LEAD_IN
            if not ending or {"not", "no"} & set(words):
                raise Unreadable("words and mathematics")
            return self.expression(FACTOR if self.kind not in ("-", "+") else TERM)
        text = " ".join([word for word in words if word not in ("the", "a", "an")] or words)
        text = re.sub("^(?:there (?:is|are)|set of) |(?<!not) exists?$", "", text)
        return TEXT_VALUES.get(text) or numeral(text) or ("words", text)

    def postfix(self, value):
        for _ in range(10):
            if self.accept("!"):
                value = ("fn", "factorial", value)
            elif self.accept("%"):
                value = ("pct", value)
            elif self.accept("deg"):
                value = ("quantity", value, ("degree",), ())
            elif self.accept("prime"):
                value = (*value[:-1], value[-1] + "'") if value[0] == "sym" else value
            elif self.accept("^"):
                value = self.raised(value)
            elif self.kind == "_" and value[0] == "pow" and value[1][0] == "sym":
                self.take()  # v^2_0
                value = ("pow", ("sym", f"{value[1][1]}_{self.subscript()}"), value[2])
            else:
                return value
        raise Unreadable("too many postfix operators")

    def raised(self, value):
        power = self.script(single=value[0] == "sym")
        return value if power[0] == "words" else ("pow", value, power)  # 10^{\text{th}}

    def script(self, single=False):
        """An exponent: a group, or one signed token; 2^3^2 is 2^(3^2). single: v^2_0 is v_0^2."""
        if single and self.tokens[self.at + 1].kind == "_" and self.kind in ("number", "sym"):
            token = self.take()
            return ("num", *token.value) if token.kind == "number" else ("sym", token.value)
        negative = self.accept("-")
        self.accept("+")
        value = self.group() if self.kind == "{" else self.deeper(self.atom)
        if self.accept("^"):
            value = ("pow", value, self.deeper(self.script))
        return negate(value) if negative else value

    def deeper(self, method):
        if self.depth == MAX_DEPTH:
            raise Unreadable("nested too deeply")
        self.depth += 1
        value = method()
        self.depth -= 1
        return value

    def argument(self):
        """What \\frac takes: a group, or one token; of a number its first digit."""
        token = self.tokens[self.at]
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            rest = token.text[1:]
            self.tokens[self.at] = Token("number", (Fraction(int(rest)), Fraction(0)), rest)
            return number(int(token.text[0]))
        return self.group() if token.kind == "{" else self.deeper(self.atom)

    def group(self):
        self.take("{")
        value = self.inside("open", self.expression)
        if infix := self.accept("choose", "over"):
            below = self.inside("open", self.expression)
            value = divide(value, below) if infix.kind == "over" else ("fn", "binomial", value, below)
        self.take("}")
        return value

    def subscript(self):
        """The text of a subscript, as part of a name or as a base."""
        if not self.accept("{"):
            return self.take().text
        begin = self.at
        while self.kind not in ("}", "end of text"):
            self.at += 1
        self.take("}")
        return "".join(token.text for token in self.tokens[begin : self.at - 1])

    def atom(self):
        token = self.take()
        kind = token.kind
        if kind in BRACKETS:
            return self.inside("open", self.bracket, kind)
        if kind == "{":
            self.at -= 1
            return self.group()
        if kind in ("number", "sym", "fn", "big", "word"):
            method = {"number": self.number, "sym": self.name, "fn": self.function, "big": self.big}
            return method[kind](token) if kind in method else ("words", token.value)
        if kind == "const":
            return ("const", token.value)
        if kind in ("inf", "empty"):
            return (kind,)
        if kind == "set":
            return ("reals",) if token.value == "R" else ("number set", token.value)
        if kind == "frac":
            return divide(self.argument(), self.argument())
        if kind == "binom":
            pair = self.deeper(self.atom)[1:] if self.kind == "(" else (self.argument(), self.argument())
            return ("fn", "binomial", *pair)
        if kind in ("sqrt", "cbrt"):
            degree = number(2 if kind == "sqrt" else 3)
            if self.accept("["):
                degree = self.inside("open", self.expression)
                self.take("]")
            return ("root", degree, self.group() if self.kind == "{" else self.deeper(self.atom))
        if kind == "bar":
            value = self.argument()
            line = value[0] == "mul" and all(symbols(part) and part[1].isupper() for part in value[1:])
            return ("named", "line", value) if line else ("fn", "conjugate", value)
        if kind == "name":  # \angle ABC
            return ("named", token.value, self.expression(TERM))
        if kind == "set{":
            return self.inside("set", self.braces)
        if kind == "|":
            value = self.inside("abs", self.expression, CLAUSE)
            self.take("|")
            return ("fn", "Abs", value)
        if kind == "begin":
            return self.environment(token.value)
        raise Unreadable(f"found {token.text or kind!r} where a value was expected")

    def number(self, token):
        if self.tokens[self.at][:2] == ("word", "base"):  # 1011 base 2
            self.take()
        elif not self.accept("_"):
            return ("num", *token.value)
        base = self.subscript().lower().removeprefix("base").strip("() ")
        base = NUMERALS.get(base, int(base) if base.isdecimal() and len(base) < 3 else 0)
        try:
            return ("based", int(token.text, base if base > 1 else 37), base)
        except ValueError:
            raise Unreadable("a number with a subscript that is no base") from None

    def name(self, token):
        """A variable, or the call of a function: f(x), P(3), P(n) = ..."""
        name = token.value
        first = self.at == 1 or self.tokens[self.at - 2].kind in SEPARATORS
        if name in ("Delta", "nabla", "\\Delta") and self.kind == "sym":
            name += " " + self.take().value  # \Delta x is one name
        while self.accept("prime"):
            name += "'"
        if self.accept("_"):
            name += "_" + self.subscript()
        if self.kind != "(":
            return ("sym", name)
        begin = self.at
        arguments = self.arguments()
        named = first and self.kind == "rel" and all(a[0] == "sym" and a[1] != name for a in arguments)
        literal = all(exact(a) is not None and a[0] != "add" for a in arguments)
        if name == "C" and len(arguments) == 2:
            return ("fn", "binomial", *arguments)
        if name.rstrip("'") in ("f", "g", "h") or named or literal or len(name) > 2 and name.isalpha() and name not in GREEK:
            return ("call", name, *arguments)
        self.at = begin
        return ("sym", name)

    def function(self, token):
        name = token.value
        power = None
        base = None
        while script := self.accept("^", "_"):
            if script.kind == "^":
                power = self.script()
            else:
                base = self.argument()
        values = self.arguments() if self.kind in ("(", "{", "[") else (self.deeper(self.juxtaposed),)
        if name in TRIGONOMETRIC:  # a degree sign means something in a sine, and nothing elsewhere
            values = tuple(rebuild(value, radians) for value in values)
        if name == "Log" and base:
            name = "log"
        if name == "log10":
            name, base = "log", number(10)
        values = (*values, base) if base else values
        if name in INVERTIBLE and power == MINUS_ONE:
            name = "a" + name
            power = None
        value = ("fn", name, *values)
        if name in ("tanh", "coth"):  # 1 - tanh 100 shows in the sizes of its exponentials
            square = ("fn", "exp", chain("mul", number(2), values[0]))
            tanh = chain("add", square, MINUS_ONE), chain("add", square, ONE)
            value = divide(*(tanh if name == "tanh" else tanh[::-1]))
        return ("pow", value, power) if power else value

    def arguments(self):
        close = {"(": ")", "{": "}", "[": "]"}[self.take().kind]
        value = self.inside("open", self.expression)
        self.take(close)
        return tuple(items_of(value))

    def juxtaposed(self):
        """The argument of a function without brackets: \\sin 2\\pi x, up to the next operator."""
        sign = self.accept("-", "+")
        value = self.operand()
        while self.starts_operand() and self.kind not in ("fn", "(", "["):
            value = chain("mul", value, self.operand())
        if has(value, "const") and not symbols(value) and self.accept("/"):  # \sin \pi/6
            value = divide(value, self.operand())
        return negate(value) if sign and sign.kind == "-" else value

    def big(self, token):
        """A sum, product, integral or limit: written out if it is finite, else a call."""
        name = token.value
        below = None
        above = None
        while script := self.accept("^", "_"):
            if script.kind == "^":
                above = self.script(single=True)
            else:
                below = self.argument_or_clause()
        body = self.expression(TERM)
        variable = None
        if name in ("sum", "prod") and below and below[0] == "rel" and below[1] == ("=",):
            variable, below = below[2]
        elif name == "lim" and below and below[0] == "rel":
            variable, below = below[2][0], ("list", below[1][0], below[2][1])
        elif name.endswith("int") and body[0] == "mul":
            at = [i for i, part in enumerate(body[1:-1], 1) if part == ("sym", "d")]
            variable = body[at[-1] + 1] if at else None
        if variable and variable[0] in ("sym", "const"):
            total = written_out(name, variable, below, above, body)
            if total:
                return total
            bound = ("sym", f"#{len([n for n in symbols(body) if n[0] == '#'])}")
            body = rebuild(body, lambda n: bound if n == variable else n)
        factors = list(body[1:]) if body[0] == "mul" and name != "prod" else [body]
        inner = [factor for factor in factors if has(factor, "sym") and any(n[0] == "#" or n == "d" for n in symbols(factor))]
        outer = [factor for factor in factors if factor not in (*inner, ONE)]
        total = ("call", name, below or ("empty",), above or ("empty",), ("mul", ONE, *inner) if outer else body)
        return ("mul", *outer, total) if outer else total

    def argument_or_clause(self):
        return self.argument()

    # brackets

    def bracket(self, opening):
        content = self.expression()
        closing = self.take(*BRACKETS[opening]).kind
        items = items_of(content)
        if opening in ("lfloor", "lceil"):
            return ("fn", "floor" if opening == "lfloor" else "ceiling", content)
        if len(items) == 1:
            if opening + closing not in ("()", "[]"):
                raise Unreadable("one item in unlike brackets")
            return content
        if content[1] == "or":
            return content
        ends = len(items) == 2 and (infinite(items[0]) < 0 or infinite(items[1]) > 0)
        if opening == "langle" or opening + closing == "()" and not ends:
            return ("tuple", *items)
        rows = [item[1:3] if item[3:] == ("[", "]") else item[1:] for item in items]
        nested = all(item[0] == "array" or item[3:] == ("[", "]") for item in items)
        if nested and len({len(row) for row in rows}) == 1:
            return ("matrix", *rows)
        if len(items) == 2:
            return ("interval", *items, opening, closing)
        if opening + closing != "[]":
            raise Unreadable("three items in unlike brackets")
        return ("array", *items)

    def braces(self):
        if self.accept("set}"):
            return ("empty",)
        if self.tokens[self.at][:2] == ("begin", "array"):  # \left\{\begin{array} ... \right.
            return self.environment("cases", self.take())
        first = self.expression()
        if self.accept("|", "mid", ":"):
            condition = self.expression()
            self.take("set}")
            return ("builder", first, condition)
        self.take("set}")
        return ("set", *items_of(first))

    def environment(self, name, _=None):
        if not name.endswith("matrix") and name != "array":  # aligned, cases
            value = self.inside("aligned", self.expression)
            self.take("end")
            return value
        if name.startswith(("v", "V")):
            raise Unreadable("a determinant")
        rows = [[]]
        while not self.accept("end"):
            rows[-1].append(self.inside("open", self.expression, CLAUSE))
            if self.kind == "newline":
                rows.append([])
            while self.accept("newline", "&"):
                pass
        rows = [tuple(row) for row in rows if row]
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different length")
        return ("matrix", *rows)


def items_of(node):
    return list(node[2:]) if node[0] == "list" else [node]


def radians(node):
    if node[0] == "quantity" and node[2:] == (("degree",), ()):
        return chain("mul", node[1], divide(("const", "pi"), number(180)))
    return node


def size(node):
    return 1 + sum(size(child) for child in children(node))


def written_out(name, variable, below, above, body):
    """The tree of a sum or product with numeric bounds, or None if it is none or too long."""
    if name not in ("sum", "prod") or not below or not above:
        return None
    low, high = exact(below), exact(above)
    if low is None or high is None or low.denominator != 1 or high.denominator != 1:
        return None
    count = int(high - low) + 1
    if not 0 <= count <= MAX_TERMS or count * size(body) > 10 * MAX_TERMS:
        return None
    terms = [
        rebuild(body, lambda n, k=k: number(k) if n == variable else n)
        for k in range(int(low), int(high) + 1)
    ]
    return ("add", number(0), *terms) if name == "sum" else ("mul", ONE, *terms)


def normalised(text):
    """An answer in plain ASCII LaTeX, with as few spellings of one thing as rewriting can leave."""
    for chars, mark in ((RAISED, "^"), (LOWERED, "_")):
        text = re.sub(f"[{chars}]+", lambda run: mark + "{" + run[0].translate(PLAIN) + "}", text)
    text = text.translate(UNICODE)
    if not text.isascii():  # mathematical italics become letters
        text = unicodedata.normalize("NFKC", text).translate(UNICODE)
    if not text.isdecimal():  # most answers are plain integers
        for pattern, by in REWRITES:
            text = pattern.sub(by, text)
    return TRAILING.sub("", text).strip()


def raw(text):
    """What two unreadable texts are compared by: blanks count only between letters or digits."""
    plain = WRAPPER.sub(r" \1 ", text)
    plain = re.sub(r"(?:\s|~|\\[,;:! ])+", " ", plain)
    plain = re.sub(r"\{(\w)\}", r"\1", plain)
    plain = re.sub(r"(?<![\w\\])\s|\s(?![\w\\])|[.,]+$", "", plain).strip()
    return ("raw", plain.lower() if is_prose(plain) else plain)


def read(text):
    """The tree of an answer; ("raw", ...) if it is too long or no mathematics that is known."""
    return parse(text) if len(text) <= MAX_ANSWER else ("raw", " ".join(text.split()))


@lru_cache(maxsize=1024)
def parse(text):
    text = normalised(text)
    try:
        parser = Parser(separate(tokenize(text)))
        tree = parser.expression()
        parser.take("end of text")
        return tree
    except Unreadable:
        return raw(text)
# ---- values


class TooHard(ArithmeticError):
    """Deciding would take more digits or steps than are allowed."""


P = 2**255 - 19  # a prime field with a root of -1
I = pow(2, (P - 1) // 4, P)
LOCAL = threading.local()  # mpmath's settings and the steps that are left are a thread's own


def spend(steps):
    LOCAL.steps = getattr(LOCAL, "steps", 0) - steps
    if LOCAL.steps < 0:
        raise TooHard("out of steps")


def exact_power(base, exponent, real_root=False):
    """base ** exponent if that is rational, else None. real_root: an odd root of a negative."""
    degree = exponent.denominator
    sign = 1
    if degree > 1:
        if base < 0 and real_root and degree % 2:
            base = -base
            sign = -1
        parts = [integer_root(part, degree) for part in (base.numerator, base.denominator)]
        if base < 0 or None in parts:
            return None
        base = Fraction(*parts)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent.numerator) > MAX_BITS:
        raise OverflowError("too many digits")
    return sign * base**exponent.numerator


def integer_root(value, degree):
    if value < 0:
        return None
    low = 0
    high = 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low if low**degree == value else None


def exact_root(degree, value):
    return exact_power(value, 1 / degree, real_root=True)


def counted(function, most):
    """A function of natural numbers, for `exact`."""

    def call(*values):
        if not all(value.denominator == 1 and value >= 0 for value in values):
            return None
        if max(values) > most:
            raise OverflowError("too many factors")
        return Fraction(function(*map(int, values)))

    return call


def real_part(m, x):
    if abs(x.imag) > 1e-9 * (1 + abs(x.real)):
        raise ValueError("not real")
    return x.real


def whole(round_):
    """Floor or ceiling, for `numeric`: a value next to an integer is that integer."""

    def call(m, x):
        value = real_part(m, x)
        nearest = m.floor(value + 0.5)
        return m.complex(nearest if abs(value - nearest) < m.tiny else round_(m, value))

    return call


def power(m, base, exponent):
    base = base + 0  # -4-0j, which is on the wrong side of the branch cut, becomes -4+0j
    if base != 0:
        m.tame(exponent * m.log(base))
    return base**exponent


def root(m, degree, value):
    if value.real < 0 == value.imag and real_part(m, degree) % 2 == 1:
        return -power(m, -value, 1 / degree)  # the real root of a negative number
    return power(m, value, 1 / degree)


def binomial(m, n, k):
    if k.imag or k.real != int(k.real) or not 0 <= k.real <= 500:
        n, k, rest = (m.tame(x) + 1 for x in (n, k, n - k))
        return m.gamma(n) / (m.gamma(k) * m.gamma(rest))
    return math.prod(((n - i) / (i + 1) for i in range(int(k.real))), start=n * 0 + 1)


def own(name):
    """A function that cmath and mpmath share."""
    return None, lambda m, x: getattr(m, name)(m.tame(x))


def extreme(choose):
    return choose, lambda m, *values: m.complex(choose(real_part(m, value) for value in values))


# Each operator and function: (exact, numeric). exact: Fractions to a Fraction, or None if that is
# irrational; numeric: an arithmetic and its complex numbers to such a number.
OPS = {
    "add": (lambda *v: sum(v), lambda m, *v: sum(v[1:], v[0])),
    "mul": (lambda *v: math.prod(v), lambda m, *v: math.prod(v[1:], start=v[0])),
    "pow": (exact_power, power), "root": (exact_root, root),
    "pct": (lambda a: a / 100, lambda m, a: a / 100),
    "quantity": (lambda a: a, lambda m, a: a),
    **{name: own(name) for name in (
        "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp"
    ).split()},
    "cot": (None, lambda m, x: 1 / m.tan(m.tame(x))), "sec": (None, lambda m, x: 1 / m.cos(m.tame(x))),
    "csc": (None, lambda m, x: 1 / m.sin(m.tame(x))), "coth": (None, lambda m, x: 1 / m.tanh(m.tame(x))),
    "acot": (None, lambda m, x: m.atan(1 / x)), "asec": (None, lambda m, x: m.acos(1 / x)),
    "acsc": (None, lambda m, x: m.asin(1 / x)), "cis": (None, lambda m, x: m.exp(1j * m.tame(x))),
    "log": (None, lambda m, x, *base: m.log(x) / m.log(*base) if base else m.log(x)),
    "Abs": (abs, lambda m, x: m.complex(abs(x))), "conjugate": (None, lambda m, x: x.conjugate()),
    "re": (None, lambda m, x: m.complex(x.real)), "im": (None, lambda m, x: m.complex(x.imag)),
    "floor": (lambda a: Fraction(math.floor(a)), whole(lambda m, x: m.floor(x))),
    "ceiling": (lambda a: Fraction(math.ceil(a)), whole(lambda m, x: m.ceil(x))),
    "Min": extreme(lambda *v: min(*v)), "Max": extreme(lambda *v: max(*v)),
    "factorial": (counted(math.factorial, 3_000), lambda m, x: m.gamma(m.tame(x) + 1)),
    "binomial": (counted(math.comb, 20_000), binomial),
    "gcd": (counted(math.gcd, 10**999), None), "lcm": (counted(math.lcm, 10**999), None),
}  # fmt: skip


def parts(node):
    """(operator or function, arguments) of a value."""
    if node[0] == "fn":
        return node[1], node[2:]
    return node[0], node[1:2] if node[0] == "quantity" else node[1:]


@lru_cache(maxsize=512)
def exact(node):
    """A rational constant as a Fraction; None for anything else, or beyond MAX_BITS."""
    if node[0] == "num":
        return node[1]
    name, arguments = parts(node)
    function = OPS.get(name, (None,))[0]
    if not function:
        return None
    values = []
    for argument in arguments:
        values.append(exact(argument))
        if values[-1] is None:
            return None
    try:
        value = function(*values)
    except (ArithmeticError, ValueError, TypeError):
        return None
    if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        return None
    return value


@lru_cache(maxsize=4096)
def chance(*seed):
    return random.Random(repr(seed)).randrange(P)


def residue(node):
    """The value of a rational function over Q(i) in the field, its variables, pi and e at random.

    Two such functions are equal if and only if their residues are (but for one chance in 2^250).
    Raises ValueError for anything else.
    """
    tag = node[0]
    if tag == "num":
        return node[1].numerator * pow(node[1].denominator, -1, P) % P
    if tag in ("sym", "const"):
        return I if node == ("const", "i") else chance(*node)
    if tag == "pow":
        exponent = exact(node[2])
        if exponent is None or exponent.denominator > 1:
            raise ValueError("no rational function")
        base = residue(node[1])
        return pow(base, exponent.numerator % (P - 1) if base else exponent.numerator, P)
    if tag in ("add", "mul", "call"):
        spend(1)
        values = [residue(child) for child in node[1 + (tag == "call") :]]
        if tag == "call":
            return chance(node[1], *values)
        total = values[0]
        for value in values[1:]:
            total = (total + value if tag == "add" else total * value) % P
        return total
    if tag == "pct":
        return residue(divide(node[1], number(100)))
    value = exact(node)
    if value is None:
        raise ValueError("no rational function")
    return residue(number(value))


@lru_cache(maxsize=512)
def residue_or_none(node):
    try:
        return residue(node)
    except (ValueError, RecursionError):
        return None


# Sampling. A point is (index, real, scale): variables are complex or real, with absolute values
# near 1, a little larger, or as large as the largest number in the trees.


@lru_cache(maxsize=4096)
def coordinate(name, point):
    """Where a variable stands: given by its name, so that it is the same in both trees.

    Four points of a kind in a row lie in four quadrants, two real ones on both sides of zero.
    """
    index, real, scale = point
    rng = random.Random(name)
    start = rng.randrange(4)
    step = rng.choice((1, 3))
    rng = random.Random(f"{name} {index}")
    turn = index // 3
    radius = (1, 4, 2.5 * scale)[index % 3] * rng.uniform(0.3, 1.2)
    if real:
        radius = round(radius) + 1 if index % 4 == 3 else radius  # floors care for integers
        return complex(radius if index % 2 == 0 else rng.choice((radius, -radius)))
    return cmath.rect(radius, (start + step * turn + rng.uniform(0.05, 0.95)) * math.pi / 2)


def tame_double(x):
    if abs(x) > 1e5:
        raise OverflowError("a function of so large a number")
    return x


DOUBLES = SimpleNamespace(
    **{name: getattr(cmath, name) for name in (
        "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp log pi e".split()
    )}, floor=math.floor, ceil=math.ceil, complex=complex, rational=lambda value: complex(value),
    tame=tame_double, tiny=1e-9, mag=lambda x: math.frexp(max(abs(x.real), abs(x.imag)))[1],
    gamma=lambda x: complex(math.gamma(real_part(None, x))), isfinite=cmath.isfinite,
)  # fmt: skip


def arithmetic(bits):
    """DOUBLES, or mpmath at a precision; one for each thread, as functions change it for a while."""
    if bits == 53:
        return DOUBLES
    if not hasattr(LOCAL, "m"):
        import mpmath

        LOCAL.m = mpmath.MPContext()
        LOCAL.m.complex = LOCAL.m.mpc
        LOCAL.m.rational = lambda value: LOCAL.m.mpc(value.numerator) / value.denominator
        LOCAL.m.tame = tame_long
    LOCAL.m.prec = bits
    LOCAL.m.tiny = LOCAL.m.ldexp(1, -bits // 2)
    return LOCAL.m


def tame_long(x):
    if not LOCAL.m.isfinite(x):
        raise ValueError("infinite")
    if LOCAL.m.mag(x) > 15:
        raise OverflowError("a function of so large a number could fill the memory")
    return x


def evaluate(node, point, m, sizes):
    """The value of a tree at a point; adds the binary exponents on the way to `sizes`.

    Raises ArithmeticError or ValueError where there is none.
    """
    tag = node[0]
    if tag == "num":
        result = m.rational(node[1])
    elif tag == "sym":
        return m.complex(coordinate(node[1], point))
    elif tag == "const":
        return m.complex({"pi": m.pi, "e": m.e, "i": 1j}[node[1]])
    elif tag == "call":  # an unknown function: another analytic one at every point
        result = m.complex(coordinate(f"{node[1]}()", (point[0], True, 1)))
        for place, child in enumerate(node[2:], 1):
            factor = coordinate(f"{node[1]}({place})", (point[0], True, 1)).real / 4
            if child != ("empty",):
                value = evaluate(child, point, m, sizes) if child[0] != "list" else evaluate(child[2], point, m, sizes)
                result = m.cos(m.tame(factor * value)) + result * (1 + factor)
    else:
        name, arguments = parts(node)
        function = OPS.get(name, (None, None))[1]
        if not function:
            raise ValueError(f"{name} has no value")
        values = [evaluate(argument, point, m, sizes) for argument in arguments]
        result = function(m, *values)
        if tag == "pow" and point[1] and values[0].real < 0 == values[0].imag:
            share = exact(node[2])
            if share is not None and share.denominator % 2 and share.denominator > 1:
                result = power(m, -values[0], values[1]) * (-1) ** share.numerator  # x^(2/3)
    spend(1 if m is DOUBLES else 10 + LOCAL.m.prec // 50)
    if point[1]:
        real_part(m, result)  # among reals ln x is undefined at -1, so that 2 ln x is ln x^2
    if not m.isfinite(result):
        raise ValueError("infinite")
    if result != 0:
        sizes.append(abs(m.mag(result)))
    return result


@lru_cache(maxsize=2048)
def sample(node, point, bits=53):
    """(value, the largest binary exponent on the way); (None, 0) if undefined, (None, 1) if huge."""
    sizes = [0]
    try:
        return evaluate(node, point, arithmetic(bits), sizes), max(sizes)
    except TooHard:
        raise
    except OverflowError:
        return None, 1
    except (ArithmeticError, ValueError, TypeError, KeyError, IndexError):
        return None, 0


def constant(node):
    """The value of a constant as a complex, or None."""
    return None if symbols(node) else sample(node, (0, False, 1))[0]


def is_long(num):
    """Whether a decimal has enough digits to stand for an exact value."""
    return bool(num[2]) and abs(num[1]) >= num[2] * 10 ** (DECIMAL_DIGITS - 1)


def rounding(node):
    """The largest relative error of the long decimals in a tree; 0 if there is none."""
    if node[0] == "num":
        return float(node[2] / abs(node[1])) if is_long(node) else 0.0
    return max(map(rounding, children(node)), default=0.0)


def agree(a, b, point, tolerance):
    """Whether two trees have one value at a point; None if either is undefined there.

    tolerance: a relative error that is allowed, or 0. Raises TooHard if both are too large.
    """
    (x, size_x), (y, size_y) = sample(a, point), sample(b, point)
    if x is not None and y is not None:
        gap = abs(x - y)
        size = max(size_x, size_y)
        if tolerance:
            return gap < tolerance * max(abs(x), abs(y))
        if gap > 1e-10 * 2.0 ** min(size, 900) and gap > 1e-7 * max(abs(x), abs(y)):
            return False
        if point[0] >= 2 and size < 30:  # two points to many digits are enough
            return True
    bits = 200
    for _ in range(2):
        (x, size_x), (y, size_y) = sample(a, point, bits), sample(b, point, bits)
        if x is None and y is None and size_x and size_y:
            raise TooHard("both are too large")
        if x is None or y is None:
            return False if size_x and size_y and not symbols(a) | symbols(b) else None
        size = max(size_x, size_y)
        if size < 20 or bits > 200:
            break
        bits = 200 + 4 * size
        if bits > MAX_PRECISION:
            raise TooHard("too many digits")
    m = arithmetic(bits)
    return x == y or m.mag(x - y) < 2 * size + 60 - bits


def largest_number(node):
    if node[0] == "num":
        return abs(node[1])
    return max(map(largest_number, children(node)), default=Fraction(0))


def same_function(a, b):
    """Whether two trees agree at complex points, or else, among reals, wherever both are defined."""
    is_constant = not symbols(a) | symbols(b)
    errors = rounding(a), rounding(b)
    tolerance = 0.0 if all(errors) else 0.6 * max(errors)  # half a unit in the last place
    if is_constant:
        return agree(a, b, (0, False, 1), tolerance) is True
    largest = max(largest_number(a), largest_number(b), 1)
    scale = 10 ** min(len(str(int(largest))), 5)
    hard = None
    of_reals = not any(has(node, "conjugate", "re", "im") for node in (a, b))
    for real in (False, True)[: 1 + of_reals]:
        hits = 0
        for index in range(24 if real else 15):
            try:
                verdict = agree(a, b, (index, real, scale), tolerance)
            except TooHard as error:
                hard = error
                continue
            if verdict is False:
                break
            hits += verdict is True
        else:
            if hits >= 4:
                return True
    if hard and not hits:
        raise hard
    return False


def decimal(node):
    """(value, unit in the last place) of a decimal long enough for an exact value, or None."""
    if node[0] == "mul":
        longs = [part for part in node[1:] if part[0] == "num" and is_long(part)]
        scale = exact(("mul", ONE, *(part for part in node[1:] if part not in longs)))
        large = max(abs(scale), 1 / abs(scale)) if scale else Fraction(0)
        if len(longs) == 1 and large and large == 10 ** (len(str(large.numerator)) - 1):
            return longs[0][1] * scale, longs[0][2] * abs(scale)
        return None
    return node[1:] if node[0] == "num" and is_long(node) else None


def near(rounded, node):
    """Whether a decimal is a constant, rounded or cut off after its last digit."""
    value, unit = rounded
    other = exact(node)
    if other is None and not symbols(node):
        precise = sample(node, (0, False, 1), 400)[0]
        m = arithmetic(400)
        if precise is None or abs(precise.imag) > 1e-40:
            return False
        other = Fraction(int(m.floor(m.ldexp(precise.real, 300))), 2**300)
    if other is None or other.denominator == 1:
        return False
    return abs(other - value) <= unit / 2 or other * value > 0 and 0 < abs(other) - abs(value) < unit


def same_value(a, b):
    """Whether two values are equal: numbers, expressions."""
    if (a[0] == "pct") != (b[0] == "pct"):  # 28 % is 28 and 0.28
        share, other = (a, b) if a[0] == "pct" else (b, a)
        return same_value(share[1], other) or same_value(divide(share[1], number(100)), other)
    if "based" in (a[0], b[0]):
        return a == b
    if a[0] == b[0] == "mod":
        quotient = exact(divide(chain("add", a[1], negate(b[1])), a[2]))
        return exact(a[2]) == exact(b[2]) and quotient is not None and quotient.denominator == 1
    a, b = (node[1] if node[0] == "mod" else node for node in (a, b))
    x, y = exact(a), exact(b)
    if x is not None and x == y:
        return True
    decimals = [(decimal(one), other) for one, other in ((a, b), (b, a)) if decimal(one)]
    if decimals:
        return any(near(*pair) for pair in decimals)
    if x is not None and y is not None:
        return False
    if infinite(a) or infinite(b):
        return infinite(a) == infinite(b)
    if not rounding(a) and not rounding(b):
        left, right = residue_or_none(a), residue_or_none(b)
        if left is not None and right is not None:
            return left == right
    return same_function(a, b)
# ---- sets
#
# A set of reals is brought to unions, intersections and differences of intervals and points. Two
# sets are equal if they hold the same endpoints and the same gaps between them.

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
INFINITY = ("inf",)
MINUS_INFINITY = ("mul", MINUS_ONE, INFINITY)
EVERYTHING = ("interval", MINUS_INFINITY, INFINITY, "(", ")")
NOTHING = ("points",)


def is_set(node):
    if node[0] == "rel":
        return any(operator not in ("=", "~") for operator in node[1])
    if node[0] == "list":
        return any(map(is_set, node[2:])) and all(is_set(item) or item[0] == "rel" for item in node[2:])
    return node[0] in ("interval", "cup", "cap", "minus", "reals", "empty", "builder")


def ray(operator, endpoint):
    """The numbers x with `x operator endpoint`."""
    if infinite(endpoint):
        return EVERYTHING if (infinite(endpoint) > 0) == (operator[0] == "<") else NOTHING
    if operator == "=":
        return ("points", endpoint)
    if operator == "!=":
        return ("minus", EVERYTHING, ("points", endpoint))
    if operator[0] == "<":
        return ("interval", MINUS_INFINITY, endpoint, "(", "]" if operator == "<=" else ")")
    return ("interval", endpoint, INFINITY, "[" if operator == ">=" else "(", ")")


def solved(operator, left, right, variable):
    """The solutions of x < a, |linear| < a or linear < linear."""
    if variable not in symbols(left):
        left, right, operator = right, left, FLIPPED[operator]
    if left == ("sym", variable) and not symbols(right):
        return ray(operator, right)
    if left[:2] == ("fn", "Abs") and not symbols(right):
        above = solved(operator, left[2], right, variable)
        below = solved(FLIPPED[operator], left[2], negate(right), variable)
        return ("cup" if operator[0] == ">" else "cap", above, below)
    difference = chain("add", left, negate(right))
    at = [rebuild(difference, lambda n, k=k: number(k) if n == ("sym", variable) else n) for k in range(3)]
    bend = chain("add", chain("add", at[0], at[2]), ("mul", number(-2), at[1]))
    slope = chain("add", at[1], negate(at[0]))
    steep = constant(slope)
    if steep is None or abs(steep) < 1e-9 or not same_value(bend, number(0)):
        raise ValueError("not linear")
    zero = negate(divide(at[0], slope))
    value = exact(zero)
    zero = zero if value is None else number(value)
    return ray(operator if steep.real > 0 else FLIPPED[operator], zero)


def region(node, names):
    """The set of a tree; adds the name of its variable to `names`. ValueError if it is none."""
    tag = node[0]
    if tag in ("reals", "empty"):
        return EVERYTHING if tag == "reals" else NOTHING
    if tag == "interval" or tag == "tuple" and len(node) == 3:
        low, high, opening, closing = node[1:] if tag == "interval" else (*node[1:], "(", ")")
        ends = constant(low), constant(high)
        if infinite(low) and opening == "[" or infinite(high) and closing == "]":
            raise ValueError("closed at infinity")
        if None not in ends and ends[0].real >= ends[1].real and (low != high or opening + closing != "[]"):
            raise ValueError("an empty interval")
        return ("interval", low, high, opening, closing)
    if tag in ("cup", "cap", "minus"):
        return (tag, *(region(part, names) for part in node[1:]))
    if tag == "set" or tag == "list" and not is_set(node):
        return ("points", *members(node))
    if tag == "list":
        either = node[1] == "or"
        if not either and all(item[0] != "rel" for item in node[2:]):  # intervals side by side
            pieces = [region(item, names) for item in node[2:]]
            if any(places(("cap", a, b)) for i, a in enumerate(pieces) for b in pieces[:i]):
                raise ValueError("a list of sets")
            return ("cup", *pieces)
        return ("cup" if either else "cap", *(region(item, names) for item in node[2:]))
    if tag == "builder":
        domain = node[1][2][1] if node[1][:2] == ("rel", ("in",)) else ("reals",)
        return ("cap", region(domain, set()), region(node[2], set()))
    if tag == "rel":
        operators = node[1]
        sides = tuple(("sym", side[1]) if side[0] == "call" and symbols(side) != {side[1]} else side for side in node[2])
        if operators in (("in",), ("notin",)) and sides[0][0] == "sym":
            names.add(sides[0][1])
            inner = region(sides[1], set())
            return inner if operators == ("in",) else ("minus", EVERYTHING, inner)
        found = frozenset().union(*map(symbols, sides))
        if len(found) == 1 and set(operators) <= set(FLIPPED):
            names |= found
            links = zip(operators, sides, sides[1:])
            return ("cap", *(solved(*link, *found) for link in links))
    if constant(node) is not None:
        return ("points", node)
    raise ValueError(f"{tag} is no set of reals")


def endpoints(node):
    if node[0] in ("cup", "cap", "minus"):
        return [end for part in node[1:] for end in endpoints(part)]
    return [end for end in (node[1:3] if node[0] == "interval" else node[1:]) if not infinite(end)]


def ranked(*regions):
    """The place of each endpoint: 1, 3, 5, ... ValueError if one is no real number."""
    values = {}
    for end in [end for node in regions for end in endpoints(node)]:
        value = constant(end)
        if value is None or abs(value.imag) > 1e-12:
            raise ValueError("an endpoint that is no real number")
        values[end] = value.real
    ranks = {}
    last = None
    for end, value in sorted(values.items(), key=lambda pair: pair[1]):
        close = last is not None and abs(value - values[last]) < 1e-6 * (1 + abs(value))
        rank = ranks[last] if last else -1
        ranks[end] = rank if close and same_value(end, last) else rank + 2
        last = end
    return ranks


def places(node, ranks=None):
    """Where a set holds: at the endpoints, which have odd places, and in the gaps around them."""
    ranks = ranked(node) if ranks is None else ranks
    top = max(ranks.values(), default=-1) + 2
    if node[0] == "points":
        return {ranks[point] for point in node[1:]}
    if node[0] == "interval":
        _, low, high, opening, closing = node
        begin = 0 if infinite(low) else ranks[low] + (opening == "(")
        end = top if infinite(high) else ranks[high] + (closing == "]")
        return set(range(begin, end))
    combine = {"cup": set.union, "cap": set.intersection, "minus": set.difference}[node[0]]
    return combine(*(places(part, ranks) for part in node[1:]))


def same_set(a, b):
    """Two sets of reals, or sets and inequalities with parameters."""
    try:
        names_a = set()
        names_b = set()
        regions = region(a, names_a), region(b, names_b)
        ranks = ranked(*regions)
        if names_a and names_b and names_a != names_b:
            return False
        return places(regions[0], ranks) == places(regions[1], ranks)
    except (ValueError, KeyError):
        pass
    if a[0] != b[0]:
        return False
    if a[0] == "interval":
        return a[3:] == b[3:] and same(a[1], b[1]) and same(a[2], b[2])
    if a[0] in ("cup", "cap"):
        return same_items(flat(a, a[0]), flat(b, b[0]))
    if a[0] == "rel":
        return same_items(*(list(zip(n[1], n[2], n[2][1:])) for n in (a, b)), same_relation)
    return a[0] == "list" and same_items(a[2:], b[2:])


def flat(node, tag):
    return [leaf for part in node[1:] for leaf in flat(part, tag)] if node[0] == tag else [node]


def same_relation(a, b):
    """Two (operator, left, right): equations up to a factor, inequalities up to a positive one."""
    (operator_a, *sides_a), (operator_b, *sides_b) = a, b
    if operator_a in ("in", "notin"):
        return operator_a == operator_b and all(map(same, sides_a, sides_b))
    if operator_b == FLIPPED.get(operator_a) != operator_a:
        operator_b, sides_b = operator_a, sides_b[::-1]
    if operator_a != operator_b:
        return False
    if "mod" in (sides_a[1][0], sides_b[1][0]):
        return all(map(same_value, sides_a, sides_b))
    one, other = [chain("add", left, negate(right)) for left, right in (sides_a, sides_b)]
    zero = number(0)
    if symbols(one) != symbols(other) or not symbols(one) or same_value(one, zero) or same_value(other, zero):
        return False
    elsewhere_one, elsewhere_other = rebuild(one, primed), rebuild(other, primed)
    if not same_value(("mul", one, elsewhere_other), ("mul", elsewhere_one, other)):
        return False
    signs = [sample(divide(one, other), (index, False, 1))[0] for index in range(6)]
    return operator_a in ("=", "!=") or next((x.real > 0 for x in signs if x is not None), False)


def primed(node):
    """The same function of other variables."""
    return (node[0], node[1] + "'", *node[2:]) if node[0] in ("sym", "call") else node


# ---- comparison


def is_name(node):
    """What may stand before an equals sign as the name of the answer: x, f(x), |AB|, (x, y)."""
    tag = node[0]
    if tag == "mul":
        first, rest = node[1], node[2:]
        if any(child[0] == "call" and child[1] in BIG for child in node[1:]):
            return True
        marked = first == ("sym", "d") or first[0] == "sym" and "'" in first[1]
        if marked or first[0] == "pow" and first[2] == MINUS_ONE:  # dy, f'(x), f^{-1}(x)
            return all(child[0] == "sym" or child[0] == "pow" and is_name(child[1]) for child in rest)
        return all(child[0] == "sym" and child[1][0].isupper() for child in node[1:])
    if tag in ("tuple", "ratio", "set"):
        return all(map(is_name, node[1:]))
    return tag in ("sym", "call", "words", "named") or tag == "fn" and len(node) == 3 and not has(node, "num", "add")


class Statement(NamedTuple):
    """x = 2/6 = 1/3 ~ 0.33 taken apart. What is no such statement is its own value."""

    name: tuple | None
    value: tuple
    between: tuple = ()  # sides with variables between the name and the value
    rough: tuple = ()  # after "approximately", where they are near the value


def statement(node):
    whole_node = Statement(None, node)
    if node[0] == "call" and len(node) > 3 and node[1].isupper():  # the point P(1,2)
        return Statement(("sym", node[1]), ("tuple", *node[2:]))
    if node[0] != "rel":
        return whole_node
    operators, sides = node[1:]
    if operators == ("in",) and is_name(sides[0]):
        return Statement(sides[0], sides[1])
    if not set(operators) <= {"=", "~"}:
        return whole_node
    if operators == ("=",) and is_name(sides[1]) and not is_name(sides[0]):
        sides = sides[::-1]  # 5 = x
    name = sides[0] if is_name(sides[0]) else None
    cut = operators.index("~") + 1 if "~" in operators else len(sides)
    precise, rough = sides[name is not None : cut], sides[cut:]
    if name in sides[1:]:
        return whole_node  # x = x
    if not precise:
        return Statement(name, rough[-1])
    if name is None and len(precise) > 1:
        values = {exact(side) for side in precise if not symbols(side)}
        open_ = symbols(precise[-1]) or len(precise) == 2 and symbols(precise[0])
        if open_ or len(values) > 1 and None not in values:
            return whole_node  # an equation; 2 + 2 = 5
    x = constant(precise[-1])
    close = [side for side in rough if x is not None and constant(side) is not None]
    close = [side for side in close if abs(x - constant(side)) <= 0.01 * abs(x) + 0.005]
    between = tuple(side for side in precise[:-1] if symbols(side))
    return Statement(name, precise[-1], between, tuple(close))


def compatible(a, b):
    """Whether two names may stand for one thing: x_1 and x, y and f(x), but not x and y."""
    if a[0] == b[0] == "sym":
        (one, _, sub), (other, _, below) = a[1].partition("_"), b[1].partition("_")
        return one.lower() == other.lower() and (sub == below or not sub or not below)
    if a[0] == b[0] == "tuple":
        return len(a) == len(b) and all(map(compatible, a[1:], b[1:]))
    if a[0] == b[0]:
        return same_value(a, b) if a[0] in ("call", "fn", "mul", "ratio") else a == b
    if {a[0], b[0]} == {"sym", "call"}:
        call = a if a[0] == "call" else b
        return all(argument[0] == "sym" for argument in call[2:])
    return True


def signs_chosen(node):
    """The trees that plus-minus signs stand for, at most 16. \\mp is the opposite of the last \\pm."""
    text = repr(node)
    count = text.count("('pm'") or text.count("('mp'")
    if not 0 < count <= 4:
        return [node]
    return [choose(node, iter(signs), [1]) for signs in product((1, -1), repeat=count)]


def choose(node, signs, last):
    if node[0] not in ("pm", "mp"):
        return tuple(choose(part, signs, last) if isinstance(part, tuple) and part else part for part in node)
    left = choose(node[1], signs, last)
    last[0] = next(signs, last[0]) if node[0] == "pm" else -last[0]
    right = choose(node[2], signs, last)
    return chain("add", left, right if last[0] > 0 else negate(right))


def members(node):
    """The members of a list or set, plus-minus signs written out; None for anything else."""
    if node[0] not in ("list", "set") and signs_chosen(node) == [node]:
        return None
    found = []
    for member in {"list": node[2:], "set": node[1:]}.get(node[0], (node,)):
        value = statement(member).value
        found += signs_chosen(value) if has(value, "pm", "mp") else [member]
    return list(dict.fromkeys(found)) if node[0] == "set" else found


def same_items(a, b, compare=None):
    """Two unordered collections, item by item."""
    if len(a) != len(b):
        return False
    common = Counter(a) & Counter(b)
    a, b = (list((Counter(items) - common).elements()) for items in (a, b))
    if len(a) > 40:
        raise TooHard("too many items")
    for item in a:
        match = next((other for other in b if (compare or same)(item, other)), None)
        if match is None:
            return False
        b.remove(match)
    return True


def matrix_of(node):
    """The rows of a matrix, or of a sum or product with matrices; None for anything else."""
    if node[0] == "matrix":
        return node[1:]
    if node[0] in ("tuple", "array"):
        return tuple((cell,) for cell in node[1:])
    if node[0] == "pow" and node[2] == ("sym", "T"):
        rows = matrix_of(node[1])
        return rows and tuple(zip(*rows))
    if node[0] not in ("add", "mul"):
        return None
    total = None
    for part in node[1:]:
        rows = matrix_of(part)
        if node[0] == "add" and not rows:
            return None
        total = combined(node[0], total, rows, part) if total or rows else None
        if rows and not total:
            return None
    scalars = [part for part in node[1:] if node[0] == "mul" and not matrix_of(part)]
    if total and scalars:
        total = tuple(tuple(("mul", *scalars, cell) for cell in row) for row in total)
    return total


def combined(tag, total, rows, part):
    """The sum or product of two matrices; None if their shapes do not fit."""
    if total is None or rows is None:
        return total or rows
    if tag == "add":
        if [len(row) for row in total] != [len(row) for row in rows]:
            return None
        return tuple(tuple(map(partial_sum, *pair)) for pair in zip(total, rows))
    if len(total[0]) != len(rows):
        return None
    columns = list(zip(*rows))
    return tuple(
        tuple(("add", number(0), *(chain("mul", x, y) for x, y in zip(row, column))) for column in columns)
        for row in total
    )


def partial_sum(a, b):
    return chain("add", a, b)


def same_time(a, b):
    """Two times of the day, as far as both are given; one of them may look like a ratio."""
    halves = [node[-1] if node[0] == "time" else "" for node in (a, b)]
    (hour, *rest), (other, *others) = [
        [exact(part) for part in node[1 : len(node) - (node[0] == "time")]] for node in (a, b)
    ]
    if None in (hour, other) or any(x != y for x, y in zip(rest, others)) or not rest and any(others):
        return False
    if not others and any(rest):
        return False
    if all(halves) or not any(halves):
        return hour == other and halves[0] == halves[1]
    if halves[1]:
        hour, other, halves = other, hour, halves[::-1]
    return other in (hour, hour % 12 + 12 * (halves[0] == "p"))


def same_ratio(a, b):
    """Ratios by proportion, with their zeros in the same places; 3:4 is 3/4."""
    if a[0] != b[0]:
        ratio, other = (a, b) if a[0] == "ratio" else (b, a)
        return len(ratio) == 3 and same_value(divide(*ratio[1:]), other)
    zeros = [[exact(part) == 0 for part in node[1:]] for node in (a, b)]
    if zeros[0] != zeros[1] or all(zeros[0]):
        return a == b
    at = zeros[0].index(False) + 1
    return all(same_value(chain("mul", x, b[at]), chain("mul", y, a[at])) for x, y in zip(a[1:], b[1:]))


def same_quantity(a, b):
    """Values with words behind them: beside a bare number these are ignored, else they must agree."""
    units, nouns = [[node[at] if node[0] == "quantity" else () for node in (a, b)] for at in (2, 3)]
    both = a[0] == b[0]
    if both and (units[0] != units[1] or not (set(nouns[0]) <= set(nouns[1]) or set(nouns[1]) <= set(nouns[0]))):
        return False
    return same_plain(*(node[1] if node[0] == "quantity" else node for node in (a, b)))


def same(a, b):
    """Whether two trees are the same answer."""
    if a == b:
        return a != ("raw", "")
    one, other = statement(a), statement(b)
    equations = a[0] == b[0] == "rel" and {*a[1], *b[1]} <= {"=", "~"}
    if one.name and other.name:
        if compatible(one.name, other.name):
            if len(one.between) == len(other.between) and not all(map(same, one.between, other.between)):
                return False
            rough = [same_plain(x, y) for x in (one.value, *one.rough) for y in (other.value, *other.rough)]
            solved_for = not any(symbols(n) & symbols(v.value) for v in (one, other) for n in (one.name,))
            if any(rough) or solved_for:
                return any(rough)
        if not equations:
            return False
    if equations:
        return len(a[2]) == len(b[2]) == 2 and same_relation(*((n[1][0], *n[2]) for n in (a, b)))
    values = [(x, other.value) for x in (one.value, *one.rough)]
    values += [(one.value, y) for y in other.rough]
    return any(same_plain(x, y) for x, y in values)


def same_plain(a, b):
    """Two trees that are no assignments."""
    if a == b:
        return True
    for one, other in ((a, b), (b, a)):
        if one[0] == "option":
            letter = other[1].lower() if other[0] in ("option", "sym", "const", "words") else ""
            if letter == one[1] or other[0] == "option":
                return letter == one[1]
            return bool(one[2]) and same(one[2], other)
        if one[:2] == ("list", "or") and other[0] != "list" and not is_set(one):  # 1/2 or 50 %
            if all(same(item, other) for item in one[2:]):
                return True
        if one[0] == "named" and other[0] != "named":  # \triangle ABC
            return same(one[2], other)
        if one[0] == "words" and other[0] in ("sym", "const") and len(other[1]) == 1:
            return one[1].lower() == other[1].lower()
        if one[0] == "set" and len(one) == 2 and other[0] not in ("set", "empty"):
            return same(one[1], other)
        if one[0] == "tuple" and other[0] in ("list", "set"):  # x = 1, y = 2 is (1, 2)
            items = [statement(item) for item in other[1 + (other[0] == "list") :]]
            named = {show(item.name): item.value for item in items if item.name}
            if len(named) == len(items) == len(one) - 1:
                return all(same(part, named[name]) for part, name in zip(one[1:], sorted(named)))
        if one[0] == "array" and other[0] == "list":
            return same_items(one[1:], other[2:])
    tags = {a[0], b[0]}
    if tags & {"raw", "words", "number set"}:
        return False
    if tags == {"named"}:
        return a[1] == b[1] and same(a[2], b[2])
    if "quantity" in tags:
        return same_quantity(a, b)
    if "time" in tags:
        return tags <= {"time", "ratio"} and same_time(a, b)
    if "ratio" in tags:
        return same_ratio(a, b)
    if tags == {"tuple", "interval"}:
        return False
    if is_set(a) or is_set(b):
        return same_set(a, b)
    items_a, items_b = members(a), members(b)
    if items_a is not None or items_b is not None:
        return same_items(items_a or [a], items_b or [b])
    if tags <= {"tuple", "array"}:
        return len(a) == len(b) and all(map(same, a[1:], b[1:]))
    if has(a, "matrix") or has(b, "matrix"):
        rows_a, rows_b = matrix_of(a), matrix_of(b)
        if not rows_a or not rows_b or [len(row) for row in rows_a] != [len(row) for row in rows_b]:
            return False
        return all(same(x, y) for row, other in zip(rows_a, rows_b) for x, y in zip(row, other))
    return "rel" not in tags and same_value(a, b)


# ---- verdicts


def words_of(text):
    """An answer's words in lower case if it is nothing but words or one letter; else ""."""
    plain = WRAPPER.sub(r"\1", text[:MAX_ANSWER]).replace("$", "").replace("\\ ", " ")
    plain = plain.strip(" .*\"'`\n\t")
    plain = re.sub(r"\\(?:left|right)(?![a-z])|(?:the )?(?:correct )?answer(?: is|:) ", "", plain, flags=re.I)
    plain = re.sub(r"^\((.*)\)$|^(\w)\)$|^(?:option|choice) \((\w)\)$", r"\1\2\3", plain.strip())
    plain = " ".join(plain.split())
    if not re.fullmatch(r"[^\W\d_]+(?:(?:, | |-(?=\w\w)|')[^\W\d_]+)*", plain):
        return ""
    plain = re.sub(r"(?i)^(?:the|an?|option|choice) (?=\w)", "", plain)
    return plain if len(plain) == 1 and plain.lower() not in "abcdefghij" else plain.lower()


SECOND_READINGS = [(re.compile(pattern), by) for pattern, by in [
    (r",(?=[1-9])(?!.*,0\d)", ", "),  # is 100,200 a number or a list?
    (r"(?<=\d)e(?=[+-]\d)", "e "),  # is 2e-3 a number or 2 times e, minus 3?
    (r"\+-", "+ -"),  # is 2+-3 two numbers or -1?
]]  # fmt: skip
TRAILING_UNIT = re.compile(  # is 80m a product or a length? and 9.8 m/s^2?
    r"(?<=\d)(?:\s|\\[ ,;])*((?:[mshgLNJWVAK]|\\Omega|[kcm]m|kg)(?:\^\{?-?\d\}?)?(?:(?:\s*[/*]\s*|\s*\\cdot\s*)"
    r"(?:[mshgLNJWVAK]|[kcm]m|kg|mol)(?:\^\{?-?\d\}?)?)*)$"
)


def base_ten(node):
    return ("fn", "log", node[2], number(10)) if node[:2] == ("fn", "Log") else node


def base_e(node):
    return ("fn", "log", node[2]) if node[:2] == ("fn", "Log") else node


def imaginary(node):
    return ("const", "i") if node == ("sym", "I") else node


def readings(text, is_answer):
    """The trees that a text may stand for, the likeliest first."""
    option = OPTION.match(WRAPPER.sub(r"\1", text))
    if option:
        letter = option[1].lower()
        return [("option", letter, tree) for tree in readings(option[2].strip(), is_answer)]
    texts = [text, *(pattern.sub(by, text) for pattern, by in SECOND_READINGS if pattern.search(text))]
    if (unit := TRAILING_UNIT.search(text)) and (is_answer or len(unit[1]) > 1):
        texts.append(rf"{text[: unit.start()]} \mathrm{{{unit[1]}}}")
    trees = []
    for tree in map(read, texts):
        if "I" in symbols(tree):
            trees.append(rebuild(tree, imaginary))
        if has(tree, "Log"):
            trees.append(rebuild(tree, base_e))
            tree = rebuild(tree, base_ten)
        trees.append(tree)
    return trees


@lru_cache(maxsize=4096)
def compare(answer, reference):
    words, others = words_of(answer), words_of(reference)
    if words and words == others:
        return True
    return any(same(a, b) for a in readings(answer, True) for b in readings(reference, False))


def judge(answer, reference, timeout_s=TIMEOUT_S):
    """True or False; None if neither can be told in so much work."""
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer = answer.strip()
    reference = reference.strip()
    if not answer or max(len(answer), len(reference)) > MAX_ANSWER:
        return bool(answer) and read(answer) == read(reference)
    LOCAL.steps = int(timeout_s * STEPS_PER_SECOND)
    try:
        return compare(answer, reference)
    except TooHard:
        return None


def equivalent(answer, reference, timeout_s=TIMEOUT_S):
    r"""Whether an extracted answer equals the reference answer. False also if that is too hard.

    >>> equivalent(r"\frac{2}{4}", "0.5"), equivalent("(2,1)", "(1,2)")
    (True, False)
    """
    return judge(answer, reference, timeout_s) is True


def verify(text, reference, strict=False):
    """Whether a model's output ends in the reference answer. strict as in `extract_answer`."""
    return verify_many([(text, reference)], strict=strict)[0] is True


def verify_many(pairs, timeout_s=TIMEOUT_S, strict=False):
    """Verdicts for (text, reference) pairs, in their order; None for one that is too hard.

    timeout_s: how long one comparison may take on a slow core. It is counted in steps of work, so
    that no verdict depends on the machine or on what else runs there.
    """
    verdicts = []
    for text, reference in pairs:
        answer = extract_answer(text, strict) if isinstance(text, str) else None
        verdicts.append(judge(answer, reference, timeout_s))
    return verdicts


def canonical(answer):
    """A hashable key. Answers with one key are equivalent; not all equivalent ones share a key."""
    if words := words_of(answer.strip()):
        return "words", words
    node = read(answer.strip())
    value = exact(node) if node[0] in ("num", "mul") else None
    return ("tree", node) if value is None else ("number", value)


def accuracy_reward(text, reference):
    """1.0 if the last box after the thinking block holds the reference answer, else 0.0."""
    return float(verify(text, reference, strict=True))


def format_reward(text, think_tag="think"):
    r"""1.0 for a completion of the form [<think>thought</think>] words \boxed{answer} end, else 0.0.

    The thinking block may be missing. If there is one it comes first, is closed, holds a thought
    and is the only one. After it stands exactly one box, closed and not empty; after the box
    nothing but punctuation, white space, `*`, the end of a formula and tokens that end the turn.
    A prompt that ends in "<think>" is part of `text`.
    """
    tail = re.sub(rf"(?:\s|{CONTROL.pattern})+$", "", text.strip())
    if CONTROL.search(tail):
        return 0.0
    opening = f"<{think_tag}>"
    closing = f"</{think_tag}>"
    if opening in tail or closing in tail:
        thought, _, rest = tail.removeprefix(opening).partition(closing)
        once = tail.count(opening) == 1 and tail.count(closing) == 1
        if not tail.startswith(opening) or not once or not thought.strip():
            return 0.0
        tail = rest
    boxes = list(islice(re.finditer(r"\\(?:boxed|fbox)\s*\{", tail), 2))
    end = group_end(tail, boxes[0].end() - 1) if len(boxes) == 1 else None
    filled = end is not None and tail[boxes[0].end() : end - 1].strip()
    return float(bool(filled) and re.fullmatch(r"(?:[\s.,;:!$*]|\\[\])])*", tail[end:]) is not None)


# ---- the command line


def show(node):
    """A tree on one line; a long number is rounded."""
    if isinstance(node, Fraction):
        long = max(node.numerator.bit_length(), node.denominator.bit_length()) >= 400
        return "(a long number)" if long else str(node)
    if isinstance(node, tuple):
        return show(node[1]) if node and node[0] == "num" else f"({' '.join(map(show, node))})"
    return str(node)


def read_rows(path):
    """(rows, [(text, reference)]) of a .jsonl file; an answer beside a reference is a text."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    pairs = []
    for line, row in enumerate(rows, 1):
        reference = next((key for key in ("reference", "gold", "answer") if key in row), None)
        texts = (key for key in ("pred", "completion", "answer") if key in row and key != reference)
        text = next(texts, None)
        if text is None or reference is None:
            raise ValueError(
                f"{path}:{line}: found {sorted(row)}; expected pred|completion|answer, gold|reference"
            )
        pairs.append((row[text], str(row[reference])))
    return rows, pairs


def grade_file(path, strict, explain, timeout_s):
    """Prints the verdicts on a file: the total, and where `expected` is given the errors."""
    rows, pairs = read_rows(path)
    begin = time.process_time()
    verdicts = verify_many(pairs, timeout_s, strict)
    rate = len(rows) / (time.process_time() - begin + 1e-9)
    table = {}
    for row, (text, reference), verdict in zip(rows, pairs, verdicts):
        wrong = "expected" in row and bool(verdict) != row["expected"]
        if explain or wrong:
            answer = extract_answer(text, strict)
            print(f"{'WRONG ' * wrong}{row.get('id', '')} {verdict}: {answer!r} for {reference!r}")
        if "expected" in row:
            counts = table.setdefault(row.get("category", "-"), Counter())
            counts[bool(row["expected"]), bool(verdict)] += 1
    right = sum(verdict is True for verdict in verdicts)
    undecided = sum(verdict is None for verdict in verdicts)
    print(f"{len(rows)} answers | {right} right | {undecided} undecided | {rate:.0f} per second")
    if not table:
        return
    print(f"\n{'category':24} {'cases':>6} {'agree %':>8} {'false +':>8} {'false -':>8}")
    shares = []
    for name, counts in [*sorted(table.items()), ("all", sum(table.values(), Counter()))]:
        shares.append(100 * (counts[True, True] + counts[False, False]) / counts.total())
        print(
            f"{name:24} {counts.total():6} {shares[-1]:8.2f} {counts[False, True]:8} {counts[True, False]:8}"
        )
    print(f"{'mean over categories':24} {'':6} {sum(shares[:-1]) / len(table):8.2f}")


def main(args):
    if args.file:
        return grade_file(args.file, args.strict, args.explain, args.timeout_s)
    if args.answer is None or args.reference is None:
        raise ValueError("found neither --file nor both --answer and --reference; give one of the two")
    answer = extract_answer(args.answer, args.strict)
    verdict = judge(answer, args.reference, args.timeout_s)
    for name, text in (("answer", answer), ("reference", args.reference)):
        print(f"{name:10} {text!r}\n{'':10} {show(read(text.strip())) if text else '-'}")
    print(f"verdict    {'undecided' if verdict is None else 'equal' if verdict else 'not equal'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
