r"""Grade text: does a model's output give the same answer as the reference?

    python verify.py --answer '\frac{2}{4}' --reference 0.5     # both parse trees and the verdict
    python verify.py --file results.jsonl --explain             # a file; with `expected`, a table

Model output is untrusted and never evaluated. The answer is extracted from the output, split into
tokens, parsed into a small tree of tuples and brought to a normal form. Two trees are compared
according to their kind: words as words, sets of reals by the points they contain, rational numbers
exactly, rational functions exactly at a random point, and all else numerically at sample points,
with as many digits as the magnitudes require. Work is bounded by counters, not clocks, so verdicts
do not depend on the machine.

Conventions where graders differ: the last box wins, and boxes joined by "and" or a comma form one
answer. Bare lists and sets are unordered; tuples and bracketed lists of three or more are ordered.
`x = 5` is 5 and `y = f(x)` is f(x); other equations may differ by a factor. Labels must match.
28 % is both 28 and 0.28. A unit or counted noun is ignored if the other side is a bare number; if
both sides have one, they must agree. A rounded decimal is accepted from 8 significant digits.
"""

import argparse
import json
import math
import operator
import random
import re
import string
import sys
import threading
import unicodedata
from collections import Counter, deque
from fractions import Fraction
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

MAX_TEXT = 200_000  # characters searched for a box, from the end of the output
MAX_PROSE = 20_000  # characters searched for an answer when there is no box
MAX_ANSWER = 700  # characters in an answer; longer ones are compared as strings, not parsed
MAX_DEPTH = 40  # nested groups
MAX_TERMS = 2_000  # terms in an expanded sum or product
MAX_BITS = 30_000  # bits in the numerator or denominator of an exact value
MAX_PRECISION = 12_000  # bits of precision in numerical comparison
DECIMAL_DIGITS = 8  # significant digits a decimal needs to match an exact value
STEPS_PER_SECOND = 100_000  # double-precision operations on a slow core
TIMEOUT_S = 2.0  # for one comparison, counted in these steps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Compare an answer with the reference answer.")
    add = parser.add_argument
    add("--answer", help="an answer or a complete model output")
    add("--reference", help="the reference answer")
    add("--file", help=".jsonl: pred|completion, gold|reference|answer, [expected], [category]")
    add("--strict", action="store_true", help="accept only a box after the thinking block")
    add("--explain", action="store_true", help="with --file: print every row")
    return parser.parse_args(argv)


# ---- extraction

CONTROL = re.compile(r"<\|(?:im_end|endoftext|im_start|eot_id)\|>|</s>")
THINK = re.compile(r"<(/?)(?:think|thought)>")
BOX = re.compile(r"\\(?:begin)?(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)")
PLACEHOLDER = re.compile(r"(?i:[\s?.…_${}\\]|text|l?dots|your|final|the|answer|here)*")
JOINER = re.compile(  # text between two boxes of one answer: ", ", "and", "; for part (b)"
    r"(?=.*(?:[,;&]|\band\b|\bor\b))(?:[^\w.]|\b(?:and|or|for|in|part|case|the|first|second|text"
    r"|q?quad|[a-e]|\d)\b)*", re.S)
FORMULA = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)"
    r"|(?<!\\)\$(\s?)(?!\s)((?:[^$\\]|\\.){1,1000}?)(?<!\s)\4\$", re.S)  # not 5$ to Jack and 7$
ENGLISH = re.compile(  # a word that is not mathematics
    r"(?<![\\\w{/])(?!(?:sqrt|pi|sin|cos|tan|log|ln|percent|and|or)\b)"
    r"(?:\d+-)?[a-zA-Z]{2}[\w'’&-]*")
BREAK = re.compile(  # separates two runs of mathematics
    rf"{FORMULA.pattern}|\bnot\s+\S+|\(?{ENGLISH.pattern}|(?<!\S)(?:[aAI]|and|or)(?!\S)"
    r"|[\u3000-\uffff]|\n|(?<![<>!:])=|(?:[.,;:?]{1,3}|!)[*_\"'`]*(?=\s)", re.S)
ANSWER_PHRASE = re.compile(
    r"####|<answer>|^[#*_ ]*(?:final )?answer[*_ ]*\n"
    r"|\banswers?\b[*_]*\s*(?:is(?!n)|are|=|:|(?=\$|\\[(\[]))", re.I | re.M)
REMARK = re.compile(  # "this answer is correct" and "the answer is not 7" contain no answer
    r"not |(?:in)?(?:correct|right|wrong|valid|verified|consistent|reasonable)"
    r"(?:\s*$|,| (?:because|since|as|and|with|for)\b)", re.I)
VERDICT = re.compile(r"(?:(?i:yes|no|true|false)\b|\(?[B-J]\b\)?)(?!\s*,?\s*(?:or|and)\b|\s*/)")
HEDGE = re.compile(r"\W*(?:(?:or|and)\W+[\d$\\]|(?:in|de)crease|more\b|less\b|gain|loss|off\b)")
SENTENCE_END = re.compile(r"\n|[.?](?=\s|$)|(?<![\\\dn)])!(?=\s|$)|\*\*|`|</")  # not 5!
LETTER = re.compile(  # an option letter in prose
    r"\b(?:(?i:option|choice)(?: is)?|(?:think|believe|guess) (?:that )?it(?: is|'s))\s+"
    r"\(?([A-J])\b(?!\)?,?\s*(?:or|and)\b)")
WRAPPER = re.compile(r"\\(?:text[a-z]*|mbox|math(?:rm|bf|sf)|operatorname)\s*\{([^{}]*)\}")
OPTION = re.compile(  # B, (B), (B) 12, B: 12, B, since ..., B - 12 apples; but not A: 5, B: 7
    r"\(?([A-Ja-j])\)?[\s.)]*|"
    r"\(?([A-J])(?:[).:]|,(?=\s[a-z]{2})|(?:\s[-–—]\s|—)(?=.*[a-z]{2}))"
    r"(?!.*(?:\([A-J]\)|\b[A-J][:)])|\s*[;+*/^=&]|\s*,\s*[^a-z\s])(.*\S.*)", re.S)


def closing_brace(text, begin):
    """The position of the brace that closes a group whose content starts at `begin`, or None."""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def boxes(text):
    r"""Yield each box, last first: (start of `\boxed`, start of content, closing brace or None)."""
    for box in reversed(deque(BOX.finditer(text), maxlen=20)):
        end = closing_brace(text, box.end()) if box[1] else None
        yield box.start(), box.end(), end


def box_span(text):
    r"""(begin, end) of the content of the last `\boxed{}`; None if it is missing or never closed.

    >>> box_span(r"\boxed{1} or \boxed{23}")
    (20, 22)
    """
    _, begin, end = next(boxes(text), (None, None, None))
    return None if end is None else (begin, end)


def boxed_answer(text, strict):
    """The contents of the last box and of boxes joined to it; None if there is no box."""
    found = []
    edge = None
    for start, begin, end in boxes(text):
        if end is None or edge is not None and not JOINER.fullmatch(text, end + 1, edge):
            break
        content = text[begin:end]
        if not strict and PLACEHOLDER.fullmatch(content):
            continue
        if not any(judge(content, other) for other in found):  # 15.5 or 31/2: keep one
            found.insert(0, content)
        edge = start
    return ", ".join(found) if found else None


def is_formula(text):
    """Whether a text contains nothing but mathematics, with or without `$`."""
    return not ENGLISH.search(WRAPPER.sub("", text)) and read(text)[0] not in ("raw", "words")


def math_runs(text):
    """All formulas in a text, and all other runs with a digit: 3x, 2^{10}, 5 + 4, 16km."""
    found = []
    at = 0
    for match in BREAK.finditer(text + "\n"):
        run = text[at : match.start()].strip(" *_`\"'–—")
        if re.search(r"\d", run):
            found.append(run)
        if match.lastindex:
            found.append(match[match.lastindex])
        at = match.end()
    return found


def after_phrase(rest):
    """The answer after "the answer is": the first sentence, or the mathematics in it."""
    rest = rest.lstrip(" \t\n*_:=`")
    sentence = SENTENCE_END.split(rest, maxsplit=1)[0].strip()
    if is_formula(sentence) or OPTION.fullmatch(sentence):
        return sentence
    if REMARK.match(sentence):
        return None
    if verdict := VERDICT.match(sentence):
        return verdict[0]
    if formula := FORMULA.match(rest):
        return sentence if HEDGE.match(rest, formula.end()) else formula[formula.lastindex]
    values = math_runs(sentence)
    if values and sentence.startswith(values[0]):
        return sentence if HEDGE.match(sentence, len(values[0])) else values[0]
    return values[-1] if values else sentence


def extract_answer(text, strict=False):
    r"""The answer in a model's output, or None.

    strict: the content of the last `\boxed{}` or `\fbox{}` after the thinking block; None if the
    block or the brace is never closed. Otherwise the first that exists: the box; `<answer>` tags,
    "#### 42" or "the answer is ..."; "option C"; the entire text, its last line or bold text, if
    purely mathematical; the last formula or number. Thoughts count only if nothing follows them.

    >>> extract_answer(r"<think>\boxed{1}</think> so $\boxed{2}$ and $\boxed{3}$")
    '2, 3'
    """
    *_, tag = [None, *THINK.finditer(text)]
    if strict and tag and not tag[1]:
        return None
    tail = text[tag.end() :] if tag else text
    if not strict and not tail.strip():
        tail = text
    tail = CONTROL.split(tail[-MAX_TEXT:], maxsplit=1)[0]
    boxed = boxed_answer(tail, strict)
    if strict or boxed is not None:
        return boxed
    tail = tail[-MAX_PROSE:].strip()
    for phrase in reversed(deque(ANSWER_PHRASE.finditer(tail), maxlen=5)):
        if found := after_phrase(tail[phrase.end() :]):
            return found
    if letters := LETTER.findall(tail):
        return letters[-1]
    bold = re.findall(r"\*\*([^*\n]+)\*\*", tail)
    for part in (tail, tail.rpartition("\n")[2], *bold[-1:]):
        if is_formula(part):
            return part
    return (math_runs(tail) or [None])[-1]


# ---- tokens

class ParseError(ValueError):
    """The text is not mathematics known to this file, or exceeds a limit."""


class Token(NamedTuple):
    kind: str
    value: object = None
    space: bool = False  # preceded by white space


END = Token("end of text")


def spellings(table):
    """{spelling: the first spelling in its group}; two or more blanks separate groups."""
    groups = [group.split() for group in re.split(r"\s{2,}", table.strip())]
    return {name: group[0] for group in groups for name in group}


OPERATORS = spellings(r"""
    +  -  * cdot times ast × · ⋅  / div ÷ ⁄  ^ **  _  !  % \% percent  pm +- ±  mp ∓  ,  ;  &
    (  )  [ lbrack  ] rbrack  {  }  set{ \{ lbrace  set} \} rbrace  langle ⟨  rangle ⟩
    lfloor ⌊  rfloor ⌋  lceil ⌈  rceil ⌉  | \| vert lvert rvert Vert lVert rVert │  mid ∣
    : colon  newline \\ cr  ' prime  cup bigcup ∪  cap ∩  minus setminus backslash
    and land wedge \& ∧  or lor vee ∨  frac dfrac tfrac cfrac sfrac nicefrac  binom dbinom tbinom
    over  sqrt √  cbrt ∛  pmod
""")
RELATIONS = spellings("""
    = == equiv ≡  != ne neq ≠  < lt  > gt  <= le leq leqslant ≤ ⩽  >= => ge geq geqslant ≥ ⩾
    ~ approx simeq cong ≈  in ∈  to rightarrow →
""")
FUNCTIONS = spellings("""
    sin  cos  tan tg  cot ctg  sec  csc  asin arcsin  acos arccos  atan arctan arctg  acot arccot
    asec arcsec  acsc arccsc  sinh  cosh  asinh arsinh  acosh arcosh  atanh artanh
    exp  log ln  log10 lg  abs Abs  floor  ceiling ceil  factorial
""")
LETTERS = spellings("""
    alpha α  beta β  gamma γ  delta δ  epsilon ε  zeta ζ  eta η  theta θ  iota  kappa  lambda λ
    mu μ  nu ν  xi ξ  rho ρ  sigma σ  tau τ  upsilon  phi φ  chi χ  psi ψ  omega ω  Delta Δ
    Gamma Γ  Theta Θ  Lambda Λ  Sigma Σ  Phi Φ  Psi Ψ  Omega Ω  varepsilon  varphi  ell  hbar
    d partial  ... ldots dots cdots
""")
BIG = spellings("sum ∑  prod ∏  int ∫  iint  oint  lim")
NAMES = {  # commands and characters
    **{name: (kind, None) for name, kind in OPERATORS.items()},
    **{name: ("rel", relation) for name, relation in RELATIONS.items()},
    **{name: ("fn", function) for name, function in FUNCTIONS.items()},
    **{name: ("sym", letter) for name, letter in LETTERS.items()},
    **dict.fromkeys("deg degree ° ˚".split(), ("word", "degree")),
    **{name: ("big", kind) for name, kind in BIG.items()},
    **{name: ("op", name) for name in "odot otimes oplus ominus circ bullet star bmod".split()},
    **dict.fromkeys("infty ∞ inf infinity oo".split(), ("value", ("inf",))),
    **dict.fromkeys("emptyset varnothing ∅".split(), ("value", ("empty",))),
    **dict.fromkeys("pi π".split(), ("value", ("const", "pi"))), "R": ("value", ("reals",))}
BARE = {  # names that need no backslash
    *FUNCTIONS, *LETTERS, *"sqrt cbrt binom frac inf infinity oo pi in".split()}
NUMERALS = {word: value for value, word in enumerate((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen").split())}
SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
UNITS = spellings("""
    cm centimeter centimetre  mm millimeter millimetre  km kilometer kilometre  m meter metre  nm
    ft foot feet  in inch inches  mi mile  yd yard  kg kilogram  g gram gm  mg milligram  lb pound
    oz ounce  L l liter litre  ml mL milliliter  h hr hour  min minute  s sec second  ms  day  week
    month  yr year  hz Hz  degree deg  F fahrenheit  C celsius  K kelvin  J joule  kJ kj  N newton
    W watt  kW kw  V volt  A amp  Pa pa  mol  gal gallon  rad radian  pt point  dollar usd  cent
    euro eur  rpm  2 square sq squared  3 cubic cu cubed  mph  kph kmh
""")
UNITS |= {name + "s": unit for name, unit in UNITS.items() if len(name) > 1}
IGNORED = set("units unit of the a an in total each about any th st nd rd".split())
ORDINALS = [("words", ending) for ending in ("th", "st", "nd", "rd")]
QUALIFIER = re.compile(  # words that change the meaning of a value, and are never ignored
    r"is|are|was|were|be|ha[sd]|have|do(?:es)?|no[nt]?|never|none|\w+n't|cannot|even|odd|prime"
    r"|composite|(?:in|de)creas\w+|gain(?:ed)?|los[st]|more|less|fewer|greater|least|most|than|over"
    r"|under|above|below|before|after|ago|later|earlier|up|down|left|right|north|south"
    r"|(?:north|south)?(?:east|west)|\w*clockwise|(?:high|low|long|short|fast|slow|old|young|larg"
    r"|small|bigg)er|positive|negative|true|false|rise|fall|growth|decline|drop|profit|deficit"
    r"|surplus|discount|off|ahead|behind|(?:for|back)wards?|debit|credit|(?:ir)?rational|real"
    r"|(?:con|di)verges|imaginary|if|when|where|only|except|without|reduc\w+|raised|won|equals?"
    r"|exceeds|at|between|or|from")
WORDS = set("no if is of to we us".split())  # all other words have at least three letters

UNICODE = str.maketrans({
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("′’‘“”", "'"), "º": "°",
    **dict.fromkeys("€£¥¢₹₩\u200b\ufeff\u2061", ""),
    **{char: f" {char}" for char in "½⅓⅔¼¾⅕⅛"},
    **{char: rf"\mathbb{{{letter}}}" for char, letter in zip("ℝℤℕℚℂ", "RZNQC")}})
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ"
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ"
PLAIN = str.maketrans(SUPERSCRIPTS + SUBSCRIPTS, "0123456789+-()nx" * 2)
STYLED = re.compile(  # \text{} and \mathrm{}
    r"\\(?:(text\w*|[mh]box|emph)|mathrm|operatorname|mathsf)\*?\s*"
    r"(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([a-zA-Z])\b)")
STYLED_WORD = re.compile(r"(?<![\\a-zA-Z])(?!i\b)[a-zA-ZÀ-ž]+(?:['.\-][a-zA-ZÀ-ž]+)*")
SCRIPT = r"(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+|\w)"
CIRCLE = r'(?:\\circ(?![a-zA-Z])|"?o"?)'
REWRITES = [(re.compile(pattern), by) for pattern, by in [
    (r"\.(\d{0,9}?)(\d{1,9}?)\2\2+\s*(?:\\[lc]?dots(?![a-z])|\.{3})",  # 0.333...
     r".\1\\overline{\2}"),
    (rf"(\^\s*{SCRIPT})\s*(_\s*{SCRIPT})", r"\2\1"),  # v^2_0
    (r"(?:\\?\$|(?<!\\)\\[()\[\]]|\s)+", " "),  # currency and formula delimiters
    (r"(?<![a-zA-Z}\\])\{\s*([-+:.]?)\s*\}", r"\1"),
    (r"([fgh])\s*\^\s*\{?\s*-1\s*\}?\s*(?=\()", r"\\inverse\1"),
    (rf"\^\s*(?:\{{\s*{CIRCLE}\s*\}}|{CIRCLE})", r"\\degree "),
    (r"\^\s*(?:\{\s*)?((?:\\prime\s*|')+)\}?", lambda m: "'" * len(re.findall("p|'", m[1]))),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 1.5x10^3
    (r"(?:[,;]\s*)?(?:\(\s*)?[a-z]\s*(?:\\in|∈)\s*\\mathbb\s*\{?\s*[NZ]\}?\s*\)?$", ""),  # k \in Z
    (r"\(\s*\\?[bp]?mod\s*(\d+)\s*\)|\\b?mod(?![a-z])\s*\{?(\d+)\}?", r"\\pmod{\1\2}"),
    (r'\s*(?:\\q?quad(?![a-z])\s*)+([,;"]|$)?', lambda m: " , " if m[1] is None else f" {m[1]}"),
    (r"(?:[(\[]|\\\{)[^()\[\]]*", lambda m: re.sub(",(?=[1-9])", ", ", m[0])),  # (2,125) is a pair
]]

GAP = r"(?:,\s?\\!\s?|(?:\\,)?\{,\s?\}\s?(?:\\!)?|\\[,!;: ]\s?|~|')"
NUMBER = (
    rf"(?:[1-9]\d{{0,2}}(?:(?:{GAP}|,| (?!\d+\s*/))\d{{3}}(?!\d))+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?![\d.]))?")
PERIODIC = r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))"
MIXED = (  # 2 1/3 or 1\frac45
    r"(\d+)(?:\s|\\[,;: ])*(?:\{?\s*\\?[dt]?frac\s*(?:\{(\d+)\}\s*|(\d)\s*)(?:\{(\d+)\}|(\d))\}?"
    r"|(?<=\s)(\d+)\s?[/⁄]\s?(\d+))")
SINGLE = "|".join(  # the next digit is a number by itself: \frac12, \binom52
    f"(?<={name}{gap})" for name in ("frac", "binom") for gap in ("", " ", r"\d", r" \d")
)
LAYOUT = (  # commands without mathematical meaning
    "displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?|hline|bm|boldsymbol|mathcal|mathit"
    r"|mathbf(?!\s*\{?[RZ]\b)|mathop|vec|hat|boxed|fbox|[lL]arge|checkmark|num"
    "|therefore|angle|measuredangle|triangle|overrightarrow")
LEXEME = re.compile(
    rf"(?P<space>(?:\s|~|\\[,;:!> ]|\\(?:left|right)\.(?!\d)|\\(?:{LAYOUT})(?![a-zA-Z])"
    r"|\\(?:begin|end)\s*\{(?:align|aligned|gathered|cases)\*?\}|&(?=\s*=)"
    r"|\\(?:color|textcolor|tag|label|hspace|vspace)\*?\s*\{[^{}]*\})+)"
    r"|(?P<based>(?<![\^_])(?P<paren>\()?(?P<digits>\d+)(?(paren)\))\s*_\s*"
    r"(?:\{(?P<base>[^{}]*)\}|(?P<short>\d)))"
    r'|"(?P<word>[^"]*)"'
    r"|(?P<clock>(?:[01]?\d|2[0-4])(?:(?::[0-5]\d){1,2}(?![\d.:])|(?=\s*\"?[apAP]\.?[mM]\b))"
    r'(?:\s*"?(?P<half>[apAP])\.?[mM]\b"?)?)'
    r"|(?P<literal>0[xX][0-9A-Fa-f]+|0[bB][01]+|0[oO][0-7]+)(?![0-9A-Za-z])"
    r"|\\begin\s*\{(?P<begin>[pbB]?matrix|array)\}(?:\s*\{[clr|@ ]*\})?"
    r"|\\end\s*\{(?P<end>[pbB]?matrix|array)\}"
    r"|\\(?:mathbb|Bbb|mathds|mathbf)\s*\{?\s*(?P<set>[A-Z])\b\s*\}?"
    rf"|(?P<digit>(?:{SINGLE})\d)"
    rf"|(?P<mixed>(?<![\^_t]){MIXED})|(?P<periodic>{PERIODIC})|(?P<number>{NUMBER})"
    r"|\\(?P<command>[a-zA-Z]+)"
    r"|(?P<letters>[a-zA-ZÀ-ž]+)"
    r"|(?P<symbol>\\\\(?:\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?"  # \\[2pt]
    r"|\\.|<=|>=|(?<![\d)])!=|==|\*\*|=>|\+/?-|\.{3}|.)", re.S)
CONNECTIVES = {"and": "and", "or": "or", "percent": "%", "pct": "%", "to": ":", "per": "/"}
JOINED = re.compile(r"([a-zA-Z]?)(sqrt|sin|cos|tan|cot|log|ln|pi|theta)([a-zA-Z]?)")  # xsin, lnx
CLOSERS = {  # closing tokens of each bracket
    "(": (")", "]"), "[": ("]", ")"), "{": ("}",), "set{": ("set}", "mid", "|", ":"), "|": ("|",),
    "langle": ("rangle",), "lfloor": ("rfloor",), "lceil": ("rceil",), "begin": ("end",)}
OPERANDS = {*CLOSERS, *"number sym value word fn frac sqrt cbrt binom big".split()}


def quote_words(match):
    r"""Replace \text{} or \mathrm{} by its content, with quotation marks around words."""
    text = match.string
    content = match[2] or match[3] or ""
    if not match[1]:
        name = content.strip("~ ")
        after_value = re.search(r'[\d}"/°]\s*(?:\\[,;: ]\s*)*$|\\cdot\s*$', text[: match.start()])
        letter = len(name) == 1 and (name in "dei" or not after_value)
        call = name.isalpha() and text[match.end() :].startswith("(") and not after_value
        if name in FUNCTIONS or letter or call:
            return f" {name} " if letter else f"\\{name} "
    content = re.sub(r"[.`?](?!\d)|(?<![a-zA-Z])'", "", content).replace("&", " and ")
    return " " + STYLED_WORD.sub(r'"\g<0>"', content) + " "


def preprocess(text):
    """Rewrite spellings that the tokenizer and the parser do not know."""
    if text.isdecimal() and text.isascii():  # like most answers
        return text
    if not text.isascii():  # mathematical italics become letters
        for chars, mark in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
            text = re.sub(f"[{chars}]+", rf"{mark}{{\g<0>}}", text)
        text = text.translate(PLAIN)
        text = unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)
    text = STYLED.sub(quote_words, text.replace('"', ""))
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    return text.lstrip(" ,=≈\n\t").rstrip(" .,;:~*\\\n\t")


def number(value, unit=0):
    """The tree of a number. unit: the place value of a decimal's last digit; 0 if it is exact."""
    return ("num", Fraction(value), Fraction(unit))


def read_number(match):
    text = re.sub(r"[^\d.eE+-]", "", match[0]).lower()
    mantissa, _, exponent = text.partition("e")
    decimals = mantissa.partition(".")[2]
    unit = Fraction(10) ** (int(exponent or 0) - len(decimals))
    return number(Fraction(text), unit if decimals else 0)


def read_periodic(match):
    whole, decimals, *period = re.fullmatch(PERIODIC, match[0]).groups()
    period = period[0] or period[1]
    rest = Fraction(int(period), 10 ** len(decimals) * (10 ** len(period) - 1))
    return number(Fraction(f"{whole}.{decimals}0") + rest)


def read_mixed(match):
    whole, above, below = map(int, filter(None, re.fullmatch(MIXED, match[0]).groups()))
    if 0 < above < below:
        return number(whole + Fraction(above, below))
    if below and "frac" in match[0]:
        return number(whole * Fraction(above, below))
    raise ParseError("two numbers in a row")


def read_based(match):
    """The tree of a number in a given base, 52_8."""
    base = re.sub(r'\\[a-z]+|base|\W', "", match["short"] or match["base"].lower())
    return ("based", match["digits"], str(NUMERALS.get(base, base)))


def read_clock(match):
    """The tree of 7:30, 7:30:00 or 7 p.m."""
    parts = re.findall(r"\d+", match[0]) + [0, 0]
    return ("time", (match["half"] or "").lower(), *map(number, parts[:3]))


READERS = {
    "based": read_based, "clock": read_clock, "literal": lambda match: number(int(match[0], 0)),
    "number": read_number, "digit": read_number, "periodic": read_periodic, "mixed": read_mixed,
    "set": lambda match: ("reals",) if match["set"] == "R" else ("words", match["set"])}


def read_word(word, before):
    """The (kind, value) of the token for a quoted word."""
    low = word.lower()
    if low in CONNECTIVES and (low != "to" or before.kind == "number"):
        return CONNECTIVES[low], None
    return "word", word if word in UNITS else low


def read_letters(run, found, space):
    """The (kind, value) pairs of a run of letters: words, functions, variables."""
    low = run.lower()
    before = found[-1]
    per = before.kind in ("*", "/") and found[-2].kind == "word"  # km/h
    counted = per or before.kind in ("number", "word")
    if len(run) == 1:
        if per or before.value == "degree" and run in "CF" or before.kind == "word" and run == "a":
            return [("word", run)]
        return [("value", ("const", run)) if run in "ie" else ("sym", run)]
    known = low in UNITS or ("words", low) in ORDINALS
    if low in CONNECTIVES or low in WORDS or counted and known:
        return [read_word(low, before)]
    if run in BARE:
        return [NAMES[run]]
    parts = run
    if joined := JOINED.fullmatch(run):
        parts = filter(None, joined.groups())
    elif low not in string.ascii_lowercase:  # abcd and xyz are products
        syllable = len(run) == 3 and re.search("[aeiou]", low)  # a cat, but 2aex is a product
        if len(run) > 3 or syllable and (space or before.kind != "number"):
            return [read_word(run, before)]
    return [pair for part in parts for pair in read_letters(part, [END], False)]


def tokenize(text):
    """The tokens of a preprocessed text."""
    found = [END]
    space = False
    at = 0
    while at < len(text):
        match = LEXEME.match(text, at)
        at = match.end()
        kind = match.lastgroup
        if kind == "space":
            space = True
            continue
        lexeme = match[kind]
        name = lexeme[:2] if lexeme[:1] == "\\" else lexeme
        pairs = [NAMES.get(name, ("sym", name))]
        if kind == "letters":
            pairs = read_letters(lexeme, found, space)
        elif kind == "word":
            pairs = [read_word(lexeme, found[-1])]
        elif kind in READERS:
            pairs = [("number", READERS[kind](match))]
        elif kind in ("begin", "end"):
            pairs = [(kind, None)]
        elif name == "begin" or kind == "symbol" and name not in NAMES:
            raise ParseError(f"no support for {lexeme!r}")
        for pair in pairs:
            found.append(Token(*pair, space))
            space = False
    return found[1:]


# ---- parser
#
# A tree is a nested tuple (tag, ...):
#   values      ("num", Fraction, unit in the last place) ("sym", name) ("const", "pi"|"e"|"i")
#               ("inf",) (operator or function of OPS, a, ...) ("call", name, a, ...)
#               ("quantity", a, words) ("based", digits, base)
#               ("ratio", a, b, ...) ("time", "a" or "p" or "", hour, minute, second)
#   collections ("list", "," or "or", a, ...) ("set", a, ...) ("tuple", a, ...) ("array", a, ...)
#               (a matrix is an array of arrays, a column vector a tuple)
#   sets        ("interval", low, high, "<" or "<=", "<" or "<=") ("cup"|"cap"|"minus", a, b)
#               ("reals",) ("empty",)
#   statements  ("rel", operators, sides)
#   words       ("words", words) ("option", letter, value); ("raw", ...) if it cannot be parsed
# Unknown functions, integrals, limits, and sums and products that are not expanded are calls.

LEVELS = "newline ;|or|, and|rel|: over pmod|cup cap minus|+ -|* / op".split("|")
BINDING_POWER = {kind: power for power, kinds in enumerate(LEVELS, 1) for kind in kinds.split()}
CLAUSE, TERM, FACTOR = 4, 8, 9  # levels: a list of clauses, a sum of terms, a product of factors
SEPARATORS = ("newline", ";", "or", ",", "and")
SIGNS = ("+", "-")
LEAD_IN = set(  # words that may precede an answer
    "the a an answer final is are so thus hence therefore equals equal to value result solution "
    "solutions we get have option approximately about roughly exactly that point points ordered "
    "pair pairs vector interval values roots us usd rs".split())
TEXT_VALUES = {
    **dict.fromkeys("no solution|no solutions|no real solution|no real solutions|no real roots|"
                    "empty set|none".split("|"), ("empty",)),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers"), ("reals",)),
    **dict.fromkeys(("does not exist", "undefined"), ("words", "dne")),
    "all integers": ("words", "Z"), "infinity": ("inf",),
    **{word: number(value) for word, value in NUMERALS.items()}}
TRIGONOMETRIC = set("sin cos tan cot sec csc".split())
ZERO, ONE, MINUS_ONE = map(number, (0, 1, -1))
INFINITY, MINUS_INFINITY = ("inf",), ("mul", MINUS_ONE, ("inf",))
DEGREE = ("mul", ("const", "pi"), number(Fraction(1, 180)))


def children(node):
    return [child for child in node if isinstance(child, tuple)]


def rebuild(node, fn):
    """Apply `fn` to every node of a tree, leaves first."""
    node = tuple(rebuild(child, fn) if isinstance(child, tuple) else child for child in node)
    return fn(node) if node and isinstance(node[0], str) else node


def substitute(node, old, new):
    return rebuild(node, lambda part: new if part == old else part)


def nodes(tree):
    """Yield a tree and all its subtrees."""
    yield tree
    for child in children(tree):
        yield from nodes(child)


def symbols(*trees):
    """The names of all variables and unknown functions in the trees."""
    parts = (part for tree in trees for part in nodes(tree))
    return {part[1] for part in parts if part and part[0] in ("sym", "call")}


def has(tree, *tags):
    return any(part and part[0] in tags for part in nodes(tree))


def size(tree):
    return sum(1 for _ in nodes(tree))


def chain(tag, *parts):
    """A sum or product; operands with the same tag are flattened into it."""
    operands = []
    for part in parts:
        operands += part[1:] if part[0] == tag else [part]
    return (tag, *operands)


def negate(a):
    return ("num", -a[1], a[2]) if a[0] == "num" else chain("mul", MINUS_ONE, a)


def minus(a, b):
    return chain("add", a, negate(b))


def divide(a, b):
    return chain("mul", a, ("pow", b, MINUS_ONE))


def matrix(rows):
    """The tree of a matrix: a tuple for a column vector, else an array of arrays."""
    if len(set(map(len, rows))) != 1:
        raise ParseError("rows of different lengths")
    if len(rows[0]) == 1 and len(rows) > 1:
        return ("tuple", *(row[0] for row in rows))
    return ("array", *(("array", *row) for row in rows))


def list_items(node):
    return children(node) if node[0] == "list" else [node]


INFIX = {
    "+": partial(chain, "add"), "*": partial(chain, "mul"), "-": minus, "/": divide, "over": divide}


class Parser:
    """Precedence climbing over tokens; each method consumes some and returns their tree."""

    def __init__(self, tokens):
        self.tokens = [*tokens, END, END]
        self.at = 0
        self.closers = [()]  # closing tokens of each open bracket

    @property
    def kind(self):
        return self.tokens[self.at].kind

    def accept(self, *kinds):
        if self.kind not in kinds:
            return None
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, *kinds):
        if self.kind not in kinds:
            raise ParseError(f"found {self.kind}, expected {kinds}")
        return self.accept(*kinds)

    def parse_until(self, *closers):
        """Parse an expression and the closing token after it."""
        if len(self.closers) > MAX_DEPTH:
            raise ParseError("nested too deeply")
        self.closers.append(closers)
        value = self.expression()
        self.expect(*self.closers.pop())
        return value

    # operators

    def expression(self, level=1):
        """Parse an operand and all operators after it that bind at least as tightly as `level`."""
        left = self.operand()
        while (power := self.binding_power()) >= level:
            left = self.clauses(left, power) if power < CLAUSE else self.infix(left, power)
        return left

    def binding_power(self):
        """How tightly the next token binds its operands; 0 if it ends the expression."""
        if self.kind in self.closers[-1]:
            return 0
        if self.kind not in OPERANDS:
            return BINDING_POWER.get(self.kind, 0)
        token, after = self.tokens[self.at : self.at + 2]
        equation = token.kind == "sym" and token.space and after[:2] == ("rel", "=")
        if equation and any(before.kind == "rel" for before in self.tokens[: self.at]):
            return BINDING_POWER[","]  # x = 1 y = 2
        return TERM

    def clauses(self, left, power):
        """Parse a list. Flatten inner lists unless they contain equations: p=5, q=2; p=7, q=2."""
        kind = ","
        items = [left]
        while self.binding_power() == power:
            while separator := self.accept(*SEPARATORS):
                kind = "or" if separator.kind == "or" else kind
            if self.kind not in OPERANDS and self.kind not in SIGNS:
                break
            items.append(self.expression(power + 1))
        flat = []
        for item in items:
            splice = item[0] == "list" and all(part[0] != "rel" for part in item[2:])
            flat += item[2:] if splice else [item]
        return ("list", kind, *flat) if len(flat) > 1 else left

    def infix(self, left, power):
        """Parse an operator, explicit or not, and its right operand; `left` is its left operand."""
        kind = self.kind
        if kind == "number":
            words = left[0] == "mul" and unit_words(left[-1])
            if words and set(words) - IGNORED:  # 3 hours 20 minutes
                return ("list", ",", left, self.expression(TERM))
            if words or left[0] in ("num", "sym"):
                raise ParseError("two values in a row")
        if kind in OPERANDS:
            return chain("mul", left, self.postfix(self.atom()))
        token = self.expect(kind)
        labelled = left[0] == "words" or left[0] == "sym" and left[1][0].isupper()
        if kind == ":" and labelled and self.kind not in ("sym", "set{"):  # A: 5
            return ("rel", ("=",), (left, self.expression(CLAUSE)))
        right = self.expression(power + 1)
        if kind == "rel":
            operators, sides = left[1:] if left[0] == "rel" else ((), (left,))
            return ("rel", (*operators, token.value), (*sides, right))
        if kind == ":":
            return ("ratio", *(left[1:] if left[0] == "ratio" else (left,)), right)
        while kind == "/" and self.kind == "sym" and not self.tokens[self.at].space:  # t/RC
            right = chain("mul", right, self.expression(FACTOR))
        if kind == "-" and left[0] == "reals":
            return ("minus", left, right)
        if kind in INFIX:
            return INFIX[kind](left, right)
        head = ("call", token.value or kind) if kind in ("op", "pmod") else (kind,)
        return (*head, left, right)

    # operands

    def operand(self):
        if sign := self.accept(*SIGNS):
            value = self.expression(TERM)
            return negate(value) if sign.kind == "-" else value
        if self.kind == "word" and self.tokens[self.at - 1].kind not in ("/", "*"):
            return self.words()
        return self.postfix(self.atom())

    def words(self):
        """Parse a text, or an operand after a phrase such as "the answer is"."""
        words = []
        while token := self.accept("word"):
            words.append(token.value)
        if self.kind in OPERANDS or self.kind in SIGNS:
            leads_in = words[-1] in ("is", "are", "equals") or set(words) <= LEAD_IN
            if not leads_in or {"not", "no"} & set(words):
                raise ParseError("words before mathematics")
            return self.expression(TERM)
        fillers = r"\b(?:the|an?|there (?:is|are)|set of) |(?<!not) exists?$"
        text = re.sub(fillers, "", " ".join(words))
        return TEXT_VALUES.get(text, ("words", text))

    def postfix(self, value):
        while token := self.accept("!", "%", "^"):
            if token.kind != "^":
                value = ("factorial" if token.kind == "!" else "pct", value)
            elif (power := self.exponent()) not in ORDINALS:  # 10^{\text{th}}
                value = ("pow", value, power)
        return value

    def exponent(self):
        """Parse an exponent: a group, or a single token with a sign; 2^3^2 is 2^(3^2)."""
        sign = self.accept(*SIGNS)
        value = self.atom()
        value = ("pow", value, self.exponent()) if self.accept("^") else value
        return negate(value) if sign and sign.kind == "-" else value

    def atom(self):
        """Parse one value, without exponents and other postfix operators."""
        token = self.expect(*OPERANDS)
        kind = token.kind
        if kind in ("number", "value", "word"):
            return ("words", token.value) if kind == "word" else token.value
        if kind in ("{", "|", "lfloor", "lceil"):
            value = self.parse_until(*CLOSERS[kind])
            tag = {"|": "abs", "lfloor": "floor", "lceil": "ceiling"}.get(kind)
            return (tag, value) if tag else value
        if kind == "frac":
            return divide(self.atom(), self.atom())
        if kind == "binom":
            return ("binomial", self.atom(), self.atom())
        if kind in ("sqrt", "cbrt"):
            degree = number(2 if kind == "sqrt" else 3)
            if self.accept("["):
                degree = self.parse_until("]")
            return ("root", degree, self.atom())
        parse = {
            "sym": self.name, "fn": self.function, "big": self.big_operator, "begin": self.matrix,
            "set{": self.braces}
        return parse.get(kind, self.bracket)(token)

    def name(self, token):
        """Parse a variable or a function call: f(x), P(3), P(n) = ..."""
        name = token.value
        if name == "Delta" and self.kind == "sym":
            name += " " + self.expect("sym").value  # \Delta x is one name
        while self.accept("'"):
            name += "'"
        if self.accept("_"):
            name += "_" + show(self.atom())
        long = len(name) > 2 and name.isalpha() and name not in LETTERS
        begin = self.at
        arguments = []
        while long and self.accept("{"):  # an unknown command
            arguments.append(self.parse_until("}"))
        if arguments or not self.accept("("):
            return ("call", name, *arguments) if arguments else ("sym", name)
        arguments = list_items(self.parse_until(")"))
        function = long or name.rstrip("'") in ("f", "g", "h")
        variables = all(part[0] == "sym" for part in arguments) and self.kind == "rel"
        literal = all(exact(part) is not None for part in arguments)
        if function or variables or literal and (len(arguments) == 1 or name.isupper()):
            return ("call", name, *arguments)
        self.at = begin
        return ("sym", name)

    def function(self, token):
        name = token.value
        base = [number(10)] if name == "log10" else []
        if self.accept("_"):
            base = [self.atom()]
        power = self.exponent() if self.accept("^") else None
        opening = self.accept("(", "{", "[")
        value = self.parse_until(CLOSERS[opening.kind][0]) if opening else self.bare_argument()
        if name in TRIGONOMETRIC:  # only here do degree signs matter
            value = substitute(value, ("words", "degree"), DEGREE)
            if power == MINUS_ONE:
                return ("a" + name, value)
        value = ("log" if base else name, value, *base)
        return ("pow", value, power) if power else value

    def bare_argument(self):
        """Parse an argument without brackets, up to the next operator: \\sin 2\\pi x."""
        value = self.operand()
        stops = ("fn", "(", "[", "word", *self.closers[-1])
        while self.kind in OPERANDS - {*stops} or self.tokens[self.at].value == "degree":
            value = chain("mul", value, self.postfix(self.atom()))
        if has(value, "const") and not symbols(value) and self.accept("/"):  # \sin \pi/6
            value = divide(value, self.operand())
        return value

    def big_operator(self, token):
        """Parse a sum, product, integral or limit. Expand finite sums and products."""
        below = self.atom() if self.accept("_") else ("empty",)
        above = self.exponent() if self.accept("^") else ("empty",)
        body = self.expression(TERM)
        variable = None
        if below[0] == "rel" and below[1][0] in ("=", "to", "in"):
            variable, below = below[2][:2]
        elif body[0] == "mul" and ("sym", "d") in body[1:-1]:
            variable = body[body.index(("sym", "d")) + 1]
        low, high = exact(below), exact(above)
        finite = token.value in ("sum", "prod") and None not in (variable, low, high)
        if finite and low == int(low) and 0 < (high - low + 1) * size(body) <= MAX_TERMS:
            values = range(int(low), int(high) + 1)
            terms = [substitute(body, variable, number(value)) for value in values]
            return ("add" if token.value == "sum" else "mul", *terms)
        bound = ("sym", f"#{sum(name[0] == '#' for name in symbols(body))}")
        return ("call", token.value, below, above, substitute(body, variable, bound))

    # brackets

    def bracket(self, token):
        content = self.parse_until(*CLOSERS[token.kind])
        kinds = token.kind + self.tokens[self.at - 1].kind
        items = list_items(content)
        if len(items) != 2 and kinds not in ("()", "[]", "langlerangle"):
            raise ParseError("brackets do not form an interval")
        if len(items) == 1 or content[1] == "or":
            return content
        rows = [("array", *item[1:3]) if item[3:] == ("<=", "<=") else item for item in items]
        if kinds == "[]" and all(row[0] == "array" for row in rows):  # [[1,2],[3,4]]
            return matrix([row[1:] for row in rows])
        infinite = (items[0] == MINUS_INFINITY, items[-1] == INFINITY)
        if kinds in ("()", "langlerangle") and not any(infinite):
            return ("tuple", *items)
        if len(items) > 2:
            return ("array", *items)
        relations = ["<=" if kind in "[]" else "<" for kind in kinds]
        if (True, "<=") in zip(infinite, relations):
            raise ParseError("infinity in a closed interval")
        return ("interval", *items, *relations)

    def braces(self, _):
        if self.accept("set}"):
            return ("empty",)
        content = self.parse_until(*CLOSERS["set{"])
        if self.tokens[self.at - 1].kind == "set}":
            return ("set", *dict.fromkeys(list_items(content)))
        condition = self.parse_until("set}")  # {x | x < 3} or {x in R | x < 3}
        if not symbols(content) <= symbols(condition):
            raise ParseError("the condition lacks a variable of the set")
        domain = content[0] == "rel" and content[2][1] != ("reals",)
        return ("list", ",", content, condition) if domain else condition

    def matrix(self, _):
        rows = [[]]
        while not self.accept("end"):
            if self.accept("newline"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.expression(CLAUSE))
        return matrix([row for row in rows if row])


# ---- the normal form

def unit_words(node):
    """The words and exponents of a unit such as m^2 or 1/s; None if it is not a unit."""
    parts = [part for part in nodes(node) if part[0] not in ("mul", "pow")]
    if parts[0][0] != "words" or any(part[0] not in ("words", "num") for part in parts):
        return None
    return [word for part in parts for word in str(part[1]).split()]


def quantity(values, names):
    """The tree of a product and its words, which must be a unit or a counted noun."""
    values = [*values, *(number(SCALES[name]) for name in names if name in SCALES)]
    value = ("mul", *values) if len(values) > 1 else values[0]
    words = [name for name in names if name in UNITS or name not in IGNORED | SCALES.keys()]
    nouns = set(words) - UNITS.keys()
    if any(map(QUALIFIER.fullmatch, names)) or nouns and symbols(value):
        raise ParseError("words that are not a unit")
    words = sorted(UNITS.get(word) or re.sub("e?s?$", "", word) for word in words)
    return ("quantity", value, " ".join(words)) if words else value


def rows_of(node):
    return [row[1:] if row[0] == "array" else (row,) for row in node[1:]]


def combine_matrices(node):
    """Evaluate a sum or product with matrices to one matrix."""
    matrices = [child for child in node[1:] if child[0] in ("tuple", "array")]
    scalars = [child for child in node[1:] if child not in matrices]
    if node[0] == "mul" and len(matrices) > 1:
        a, b = map(rows_of, matrices[:2])
        if len(a[0]) != len(b) or len(a) * len(b) * len(b[0]) > 100:
            raise ParseError("a product of matrices of unsuitable sizes")
        cells = [[("add", *map(INFIX["*"], row, column)) for column in zip(*b)] for row in a]
        if sum(size(cell) for row in cells for cell in row) > MAX_TERMS:
            raise ParseError("a matrix product with too many terms")
        rest = (*scalars, matrix(cells), *matrices[2:])
        return normal_form(("mul", *rest)) if len(rest) > 1 else rest[0]
    if node[0] == "add" and scalars or len({(one[0], len(one)) for one in matrices}) > 1:
        raise ParseError("a sum of different shapes")
    entries = zip(*(one[1:] for one in matrices))
    return (matrices[0][0], *(normal_form(chain(node[0], *scalars, *entry)) for entry in entries))


def normal_form(node):
    """Rewrite values with units, sums and products of matrices, and ratios in one standard form."""
    if node[0] == "mul":
        words = [unit_words(factor) for factor in node[1:]]
        values = [factor for factor, names in zip(node[1:], words) if names is None]
        if values and len(values) < len(words):
            return quantity(values, sum(filter(None, words), []))
    if node[0] in ("add", "mul") and any(child[0] in ("tuple", "array") for child in node[1:]):
        return combine_matrices(node)
    if node[0] == "ratio" and not symbols(node):
        first = next((part for part in node[1:] if exact(part) != 0), ONE)
        return ("ratio", *(divide(part, first) for part in node[1:]))
    return node


def expand_signs(tokens):
    r"""Yield the tokens for each choice of the \pm signs; \mp is the opposite of the last \pm."""
    count = sum(token.kind == "pm" for token in tokens)
    if count > 4:
        raise ParseError("too many \\pm signs")
    for choice in product("+-", repeat=count):
        rest = iter(choice)
        kinds = {}
        found = []
        for token in tokens:
            if token.kind == "pm":
                sign = next(rest)
                kinds = {"pm": sign, "mp": "-" if sign == "+" else "+"}
            found.append(token._replace(kind=kinds.get(token.kind, token.kind)))
        yield found


@lru_cache(maxsize=1024)
def parse(text):
    text = preprocess(text)
    tokens = []
    try:
        tokens = tokenize(text)
        parsed = [Parser(choice).parse_until("end of text") for choice in expand_signs(tokens)]
        trees = [rebuild(tree, normal_form) for tree in parsed]
    except (ParseError, RecursionError):
        values = [token.value or token.kind for token in tokens or [Token(text)]]
        words = all(isinstance(value, str) for value in values)
        return ("words", " ".join(values)) if words else ("raw", *values)
    if len(trees) == 1:
        return trees[0]
    items = []
    for tree in trees:
        items += children(tree) if tree[0] in ("list", "set") else [tree]
    return ("list", ",", *dict.fromkeys(items))


def read(text):
    """The tree of an answer; ("raw", ...) if it is too long or cannot be parsed."""
    return parse(text) if len(text) <= MAX_ANSWER else ("raw", " ".join(text.split()))


# ---- values

class TooHard(ArithmeticError):
    """A decision would need more digits or steps than the limits allow."""


LOCAL = threading.local()  # each thread has its own mpmath context and step budget
CONSTANT = (0, False)  # the sample point for a value without variables


def bit_length(value):
    return max(map(int.bit_length, value.as_integer_ratio()))


def exact_power(base, exponent):
    if exponent.denominator > 1:
        return None
    if (bit_length(base) - 1) * abs(exponent.numerator) > MAX_BITS:
        raise OverflowError("too many digits")
    return base**exponent.numerator


def integer_function(function, most, *values):
    natural = all(value.denominator == 1 and 0 <= value < most for value in values)
    return Fraction(function(*map(int, values))) if natural else None


def call_mpmath(name, m, *values):
    return getattr(m, name)(*values)


def power(m, base, exponent):
    if base != 0 and m.mag(exponent * m.log(base)) > 15:
        raise OverflowError("a power too large for memory")
    return base**exponent


def root(m, degree, value):
    if value.real < 0 == value.imag and degree.real % 2 == 1:
        return -power(m, -value, 1 / degree)  # the real root of a negative number
    return power(m, value, 1 / degree)


# (exact, numeric) for each operator and function. exact maps Fractions to a Fraction, or to None if
# the result is irrational. numeric takes an mpmath context and its complex numbers and returns one.
MPMATH_FUNCTIONS = dict.fromkeys(  # {name: exact}
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh asinh acosh atanh exp".split()
) | {
    "factorial": partial(integer_function, math.factorial, 3_000),
    "binomial": partial(integer_function, math.comb, 20_000)}
OPS = {name: (fn, partial(call_mpmath, name)) for name, fn in MPMATH_FUNCTIONS.items()} | {
    "add": (lambda *v: sum(v), lambda m, *v: sum(v)),
    "mul": (lambda *v: math.prod(v), lambda m, *v: math.prod(v)),
    "pow": (exact_power, power), "root": (None, root),
    "log": (None, lambda m, x, base=None: m.log(x) / (m.log(base) if base is not None else 1)),
    "pct": (lambda a: a / 100, lambda m, a: a / 100),
    "quantity": (lambda a: a, lambda m, a: a),
    "abs": (abs, lambda m, x: abs(x)),
    "floor": (lambda a: Fraction(math.floor(a)), None),
    "ceiling": (lambda a: Fraction(math.ceil(a)), None)}


@lru_cache(maxsize=4096)
def random_fraction(name):
    return Fraction(random.Random(name).getrandbits(64), 2**61 - 1)


def exact(node, at_random=False):
    """A rational constant as a Fraction; None for anything else, or beyond MAX_BITS.

    at_random: evaluate rational functions as well, at a random point. If two of them agree there,
    they are equal, except with probability 2^-50.
    """
    if node[0] == "num":
        return node[1]
    rational = node[0] in ("add", "mul", "pow", "pct", "quantity", "sym")
    if node[0] not in OPS and not at_random or not rational and symbols(node):
        return None
    values = [exact(child, at_random) for child in children(node)]
    if None in values or sum(map(bit_length, values)) > 2 * MAX_BITS:
        return None
    if node[0] == "sym":
        return random_fraction(node[1])
    try:
        value = OPS[node[0]][0](*values)
    except (ArithmeticError, ValueError, TypeError, KeyError):  # the last two: no exact form
        return None
    return None if value is None or bit_length(value) > MAX_BITS else value


# A sample point is (index, real). Variables take real values around each of RADII: first positive,
# then negative, then of random sign. If `real`, all intermediate values must be real.

RADII = (1, 4, 0.05, 30, 600, 10**6, 10**12)


@lru_cache(maxsize=4096)
def coordinate(name, index):
    """The value of a variable at a sample point, seeded by its name: the same in both trees."""
    rng = random.Random(f"{name} {index}")
    sign = (1, -1, rng.choice((1, -1)))[index // len(RADII)]
    return sign * RADII[index % len(RADII)] * rng.uniform(0.3, 1.2)


def mp_context(bits):
    """This thread's mpmath context, which some functions modify, at a precision in bits."""
    if not hasattr(LOCAL, "m"):
        import mpmath

        LOCAL.m = mpmath.MPContext()
    LOCAL.m.prec = bits
    return LOCAL.m


def evaluate(node, point, m, magnitudes):
    """The value of a tree at a point; appends all binary exponents to `magnitudes`.

    Raises ArithmeticError or ValueError where the value is undefined.
    """
    tag = node[0]
    if tag == "sym":
        return m.mpc(coordinate(node[1], point[0]))
    if tag == "const":
        return m.mpc({"pi": m.pi, "e": m.e, "i": 1j}[node[1]])
    if tag == "num":
        result = m.mpc(node[1].numerator) / node[1].denominator
    else:
        values = [evaluate(child, point, m, magnitudes) for child in children(node)]
        if tag not in OPS or OPS[tag][1] is None:
            raise ValueError(f"{tag} has no value")
        if tag in MPMATH_FUNCTIONS and max(map(m.mag, values)) > 15:
            raise OverflowError("an argument too large for memory")
        result = m.mpc(OPS[tag][1](m, *values))
    if point[1] and abs(result.imag) > 1e-9 * (1 + abs(result.real)):
        raise ValueError("not real")  # ln x is undefined at -1, so that 2 ln x is ln x^2
    if not m.isfinite(result):
        raise ValueError("infinite")
    if result != 0:
        magnitudes.append(m.mag(result))
    return result


@lru_cache(maxsize=2048)
def sample(node, point, bits=200):
    """(value, binary exponents of all intermediate values); value is None where undefined."""
    magnitudes = [0]
    try:
        return evaluate(node, point, mp_context(bits), magnitudes), magnitudes
    except (ArithmeticError, ValueError, TypeError):
        return None, [0]


def constant(node):
    """The value of a constant as a complex number, or None."""
    value = exact(node)
    if value is None and not symbols(node):
        value = sample(node, CONSTANT)[0]
    return complex(value) if value is not None and abs(value) < 1e300 else None


def agree(a, b, point):
    """Whether two trees have the same value at a point; None if either is undefined there.

    Raises TooHard if that takes too many digits, or if this thread's step budget is exhausted.
    Cached samples are charged like new ones, so that verdicts do not depend on the cache.
    """
    bits = 200
    while True:
        LOCAL.steps = getattr(LOCAL, "steps", 0) - (size(a) + size(b)) * (bits // 20)
        if LOCAL.steps < 0:
            raise TooHard("out of steps")
        x, magnitudes = sample(a, point, bits)
        y, others = sample(b, point, bits)
        if x is None or y is None:
            return None
        high = max(magnitudes + others)
        if x != y and mp_context(bits).mag(x - y) >= 2 * high + 60 - bits:
            return False
        digits = max(high, -min(magnitudes + others))
        if digits < 20 or bits > 200:
            if 2 * high + 100 > bits:
                raise TooHard("the value grows with the precision")  # near a pole
            return True
        bits += 4 * digits + 20
        slow = has(("add", a, b), "factorial", "binomial")
        if bits > (MAX_PRECISION // 10 if slow else MAX_PRECISION):
            raise TooHard("too many digits")


def same_function(a, b):
    """Whether two trees agree at sample points: where both are real, unless they contain i."""
    if not symbols(a, b):
        return agree(a, b, CONSTANT) is True
    real = ("const", "i") not in {*nodes(a), *nodes(b)}
    verdicts = []
    for index in range(3 * len(RADII)):
        try:
            verdicts.append(agree(a, b, (index, real)))
        except TooHard:
            if LOCAL.steps < 0:
                raise
        if False in verdicts:
            return False
    return verdicts.count(True) >= 3


def rounds_to(decimal, node):
    """Whether a decimal with enough digits is a constant, rounded or truncated."""
    value, unit = decimal[1:] if decimal[0] == "num" else (0, 0)
    if not unit or abs(value) < unit * 10 ** (DECIMAL_DIGITS - 1) or symbols(node):
        return False
    rational = exact(node)
    precise = sample(node, CONSTANT, 400)[0]
    integer = rational is not None and rational.denominator == 1
    if integer or precise is None or abs(precise.imag) > 1e-40 or precise.real * value <= 0:
        return False
    error = (abs(precise.real) - abs(value)) / unit
    return 0 < error < 0.999 or abs(error) <= 0.5


def as_symbol(node):
    """Replace a call, floor or ceiling, which cannot be sampled, by a variable."""
    if node[0] not in ("call", "floor", "ceiling") or not symbols(node):
        return node
    parts = [part if isinstance(part, str) else exact(part, True) or part for part in node]
    return ("sym", repr(parts))


def same_value(a, b):
    """Whether two numbers or expressions are equal."""
    if (a[0] == "pct") != (b[0] == "pct"):  # 28 % is 28 and 0.28
        share, other = (a, b) if a[0] == "pct" else (b, a)
        return same_value(share[1], other) or same_value(divide(share[1], number(100)), other)
    x, y = exact(a), exact(b)
    if x is not None and x == y:
        return True
    if rounds_to(a, b) or rounds_to(b, a):
        return True
    if x is None or y is None:
        a, b = rebuild(a, as_symbol), rebuild(b, as_symbol)
        x, y = exact(a, True), exact(b, True)
    return same_function(a, b) if x is None or y is None else x == y


# ---- sets
#
# Two sets of reals are equal if they contain the same endpoints and the same gaps between them.
# Places are integers: 0 for zero, even ones for endpoints in their order, odd ones for the gaps.

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
           "=": operator.eq, "!=": operator.ne}


def is_set(node):
    if node[0] == "rel":
        return any(relation not in ("=", "~") for relation in node[1])
    if node[0] == "list":
        items = node[2:]
        return any(map(is_set, items)) and all(is_set(item) or item[0] == "rel" for item in items)
    return node[0] in ("interval", "cup", "cap", "minus", "reals", "empty")


def place_constants(*trees):
    """{constant: place} for all real constants in the trees."""
    values = {part: constant(part) for tree in trees for part in nodes(tree)}
    ends = [end for end, value in values.items() if value is not None and abs(value.imag) < 1e-12]
    place = {}
    last = ZERO
    at = 0
    for end in sorted(ends, key=lambda end: abs(values[end])):
        negative = values[end].real < 0
        distance = negate(end) if negative else end
        if not same_value(distance, last):
            at += 2
        place[end] = -at if negative else at
        last = distance
    return place | {INFINITY: at + 2}


def place_of(node, place, x=None):
    """The place of a constant, of x, -x or |x|; ValueError for anything else."""
    if node in place:
        return place[node]
    if node[0] == "sym" and x is not None:
        return x
    if node[0] == "abs":
        return abs(place_of(node[1], place, x))
    if node[:2] == ("mul", MINUS_ONE) and len(node) == 3:
        return -place_of(node[2], place, x)
    raise ValueError("not solved")


def contains(node, place, x):
    """Whether a set contains x, or a statement holds for x; ValueError if neither is defined."""
    tag = node[0]
    if tag in ("reals", "empty"):
        return tag == "reals"
    if tag == "interval" or tag == "tuple" and len(node) == 3:
        low, high = place_of(node[1], place), place_of(node[2], place)
        lower, upper = node[3:] or ("<", "<")
        if low > high or low == high and (lower, upper) != ("<=", "<="):
            raise ValueError("an empty interval")
        return COMPARE[lower](low, x) and COMPARE[upper](x, high)
    if tag == "rel" and node[1] == ("in",) and node[2][0][0] == "sym":
        return contains(node[2][1], place, x)
    if tag == "rel":
        variable = [bool(symbols(side)) for side in node[2]]
        if not set(node[1]) <= COMPARE.keys() or any(map(operator.eq, variable, variable[1:])):
            raise ValueError("not solved")
        sides = [place_of(side, place, x) for side in node[2]]
        return all(COMPARE[relation](*pair) for relation, *pair in zip(node[1], sides, sides[1:]))
    if tag == "minus":
        return contains(node[1], place, x) and not contains(node[2], place, x)
    if tag in ("cup", "cap") or is_set(node):
        found = [contains(part, place, x) for part in children(node)]
        listed = node[:2] == ("list", ",") and all(item[0] != "rel" for item in node[2:])
        if listed and sum(found) > 1:
            raise ValueError("a list of sets, not a union")
        either = listed or tag == "cup" or node[:2] == ("list", "or")
        return any(found) if either else all(found)
    members = children(node) if tag in ("set", "list") else [node]
    members = [place_of(member, place) for member in members]
    if max(map(abs, members)) == place[INFINITY]:
        raise ValueError("infinity cannot be a member")
    return x in members


def same_set(a, b):
    """Whether two sets of reals, or sets or inequalities with parameters, are equal."""
    if len(symbols(a, b)) < 2:
        try:
            place = place_constants(a, b)
            line = range(1 - place[INFINITY], place[INFINITY])
            return all(contains(a, place, x) == contains(b, place, x) for x in line)
        except ValueError:
            pass
    if a[0] != b[0] or a[0] == "interval" and a[3:] != b[3:]:
        return False
    if a[0] == "rel":
        return same_links(a, b)
    if a[0] == "list":
        return same_items(children(a), children(b))
    return len(a) == len(b) and all(map(same, children(a), children(b)))


def same_links(a, b):
    """Whether two chains of relations have the same links, in any order."""
    links = [list(zip(node[1], node[2], node[2][1:])) for node in (a, b)]
    return same_items(*links, same_relation)


def same_relation(a, b):
    """Whether two (relation, left, right) are equal up to a factor, positive in inequalities."""
    relation, *sides = a
    other, *others = b
    if other == FLIPPED.get(relation) != relation:
        other, others = relation, others[::-1]
    if relation != other:
        return False
    f, g = (rebuild(minus(*pair), as_symbol) for pair in (sides, others))
    if not symbols(f) or same_value(f, ZERO) or same_value(g, ZERO):
        return False
    primed_f, primed_g = rebuild(f, prime_names), rebuild(g, prime_names)
    if not same_value(chain("mul", f, primed_g), chain("mul", primed_f, g)):
        return False  # f(x) g(y) = f(y) g(x) if and only if f / g is constant
    if relation in ("=", "!="):
        return True
    factors = (sample(divide(f, g), (index, False))[0] for index in range(6))
    return next((factor.real > 0 for factor in factors if factor), False)


def prime_names(node):
    """Rename a variable or an unknown function."""
    return (node[0], node[1] + "'", *node[2:]) if node[0] in ("sym", "call") else node


# ---- comparison

def is_name(node):
    """Whether a left side merely names the answer: x, f(x), |AB|, dy/dx."""
    if node[0] == "mul":
        upper = all(part[0] == "sym" and part[1][0].isupper() for part in node[1:])
        return upper or node[1] == ("sym", "d")
    if node[0] in ("sym", "call", "words"):
        return True
    return bool(symbols(node)) and not has(node, "num", "add", "rel", "list")


def split_assignment(node):
    """(name, value) of an assignment such as x = 2/6 = 1/3 ~ 0.33; else (None, node)."""
    if node[0] == "call" and len(node) > 3 and node[1].isupper():  # the point P(1,2)
        return ("sym", node[1]), ("tuple", *node[2:])
    if node[0] != "rel" or not set(node[1]) <= {"=", "~", "in"}:
        return None, node
    relations, sides = node[1:]
    if relations == ("=",) and is_name(sides[1]) and not is_name(sides[0]):
        sides = sides[::-1]  # 5 = x
    name = sides[0] if is_name(sides[0]) and sides[0] not in sides[1:] else None
    end = relations.index("~") + 1 if "~" in relations else len(sides)
    precise = sides[bool(name) : end] or sides[-1:]  # without roundings
    if not name and (symbols(node) or len({*map(exact, precise)} - {None}) > 1):
        return None, node  # an equation; 2 + 2 = 5
    return name, precise[-1]


def compatible_names(a, b):
    """Whether two names may mean the same: x_1 and x, y and f(x), but not x and y."""
    if a[0] == b[0] == "sym":
        one, _, sub = a[1].partition("_")
        other, _, other_sub = b[1].partition("_")
        return one.lower() == other.lower() and (sub == other_sub or not sub or not other_sub)
    if a[0] == b[0] or a[0] in OPS and b[0] in OPS:
        return a == b
    call = a if a[0] == "call" else b
    return call[0] != "call" or all(part[0] == "sym" for part in call[2:])


def same_items(a, b, compare=None):
    """Whether two unordered collections have the same items."""
    if len(a) != len(b) or len(a) > 40:
        return Counter(a) == Counter(b)
    compare = compare or same
    rest = list(b)
    for item in a:
        match = next((other for other in rest if compare(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def same(a, b):
    """Whether two trees are the same answer."""
    if a == b:
        return a != ("words", "")
    (name, x), (other, y) = split_assignment(a), split_assignment(b)
    equations = a[0] == b[0] == "rel" and not is_set(a) and not is_set(b)
    chains = equations and len(a[2]) == len(b[2]) > 2  # x = 2y = 4 is more than x = 4
    if name and other and not chains and compatible_names(name, other) and same_unnamed(x, y):
        return True
    if equations:
        return same_links(a, b)
    return same_unnamed(a, b) if name and other else same_unnamed(x, y)


def same_unnamed(a, b):
    """Whether two trees are the same answer, if neither is an assignment."""
    if a == b:
        return True
    for one, other in ((a, b), (b, a)):
        if (verdict := compare_kinds(one, other)) is not None:
            return verdict
    tags = {a[0], b[0]}
    if tags & {"raw", "words"} or tags == {"tuple", "interval"}:
        return False
    if tags == {"time"}:
        return a[2:] == b[2:] and "" in (a[1], b[1])
    if is_set(a) or is_set(b):
        return same_set(a, b)
    if tags & {"list", "set"}:
        return tags <= {"list", "set"} and same_items(children(a), children(b))
    if tags <= {"tuple", "array"} or tags == {"ratio"}:
        return len(a) == len(b) and all(map(same, a[1:], b[1:]))
    return same_value(a, b)


def compare_kinds(one, other):
    """The verdict if one kind has a rule for matching the other, such as 3:4 and 3/4; else None."""
    tag, kind = one[0], other[0]
    if tag == "option":
        letter = other[1].lower() if kind in ("option", "sym", "const", "words") else ""
        return letter == one[1] or kind != "option" and same(one[2], other)
    if tag == "quantity":  # a bare number matches any unit
        value, words = other[1:] if kind == "quantity" else (other, one[2])
        return words == one[2] and same_unnamed(one[1], value)
    if tag == "words" and kind in ("sym", "const"):
        return one[1].lower() == other[1].lower()
    if tag == "time" and kind in ("ratio", "num", "mul"):  # 3:20 may be a ratio, if in lowest terms
        lowest = not one[1] and one[3][1] > 9 and math.gcd(*(int(part[1]) for part in one[2:])) == 1
        return lowest and same_unnamed(normal_form(("ratio", *one[2:4])), other)
    if tag == "ratio" and len(one) == 3 and kind in ("num", "mul"):  # 3:4 is 3/4
        value = exact(other)
        return value is not None and value.denominator > 1 and value == exact(divide(*one[1:]))
    if tag == "tuple" and kind in ("list", "set"):  # x = 1, y = 2 is (1, 2)
        items = list(map(split_assignment, children(other)))
        named = {show(name): value for name, value in items if name}
        if len(named) == len(items) == len(one) - 1:
            return all(same(part, named[name]) for part, name in zip(one[1:], sorted(named)))
    if tag == "array" and kind == "list":
        return same_items(one[1:], other[2:])
    return None


# ---- verdicts

UNIT = re.compile(  # a unit without \text{}: 80m, 9.8 m/s^2
    r"(?<=\d)(?:\s|\\[ ,;])*((?:(?:[mshgLNJWVK]|[kcm]m|kg|mol)(?:\^\{?-?\d\}?)?"
    r"(?:\s*(?:[/*]|\\cdot)\s*|$))+)$")


def readings(text, is_answer):
    """All plausible trees of a text, the likeliest first."""
    if option := OPTION.fullmatch(WRAPPER.sub(r"\1", text)):
        letter, labelled, rest = option.groups()
        trees = readings(rest.strip(), is_answer) if labelled else [read(letter)]
        return [("option", (letter or labelled).lower(), tree) for tree in trees]
    texts = [
        text,
        re.sub(r",(?=[1-9])", ", ", text),  # is 100,200 a number or a list?
        re.sub(r"log(?!\s*_|[a-z])", "lg", text),  # to base e or ten?
        re.sub(r"(?<![a-zA-Z\\])I(?![a-zA-Z(])", "i", text),
    ]
    if (unit := UNIT.search(text)) and (is_answer or len(unit[1]) > 1):
        texts.append(rf"{text[: unit.start()]} \mathrm{{{unit[1]}}}")
    trees = list(map(read, dict.fromkeys(texts)))
    singles = [tree[1] for tree in trees if tree[0] == "set" and len(tree) == 2]
    return trees + [single for single in singles if single != ("empty",)]


@lru_cache(maxsize=4096)
def compare(answer, reference):
    return any(same(a, b) for a in readings(answer, True) for b in readings(reference, False))


def judge(answer, reference, timeout_s=TIMEOUT_S):
    """Whether an answer equals the reference; None if undecided within the budget."""
    if not isinstance(answer, str) or not isinstance(reference, str) or not answer.strip():
        return False
    if max(len(answer), len(reference)) > MAX_ANSWER:
        return answer.split() == reference.split()
    LOCAL.steps = int(timeout_s * STEPS_PER_SECOND)
    try:
        return compare(answer.strip(), reference.strip())
    except (ArithmeticError, RecursionError, ValueError):
        return None  # TooHard; the others should not occur, and must not end a training run


def equivalent(answer, reference, timeout_s=TIMEOUT_S):
    r"""Whether an extracted answer equals the reference; False if undecided.

    >>> equivalent(r"\frac{2}{4}", "0.5"), equivalent("(2,1)", "(1,2)")
    (True, False)
    """
    return judge(answer, reference, timeout_s) is True


def verify_many(pairs, timeout_s=TIMEOUT_S, strict=False):
    """Verdicts for (text, reference) pairs, in order; None where undecided.

    timeout_s: limit per comparison, on a slow core; counted in steps rather than measured.
    """
    verdicts = []
    for text, reference in pairs:
        answer = extract_answer(text, strict) if isinstance(text, str) else None
        verdicts.append(judge(answer, reference, timeout_s))
    return verdicts


def verify(text, reference, strict=False):
    """Whether a model's output ends in the reference answer. strict as in `extract_answer`."""
    return verify_many([(text, reference)], strict=strict) == [True]


def canonical(answer):
    """A hashable key. Equal keys mean equivalent answers; the converse does not hold."""
    node = readings(answer.strip(), True)[0]
    value = exact(node) if node[0] in ("num", "mul") else None
    return ("tree", node) if value is None else ("number", value)


def format_reward(text, think_tag="think"):
    r"""1.0 for a completion of the form [<think>thought</think>] words \boxed{answer} end.

    0.0 for any other. The thinking block is optional, but must come first, be closed and not be
    empty. Exactly one box must follow it, closed and not empty. Only punctuation, white space, `*`,
    closing formula delimiters and end-of-turn tokens may follow the box. If the prompt ends in
    "<think>", `text` includes that tag.
    """
    tail, *rest = CONTROL.split(text.strip())
    tags = re.findall(rf"</?{think_tag}>", tail)
    block = re.match(rf"<{think_tag}>\s*\S.*?</{think_tag}>", tail, re.S)
    tail = tail[block.end() :] if block else tail
    begin, end = box_span(tail) or (0, 0)
    one_box = len(list(boxes(tail))) == 1 and tail[begin:end].strip()
    if "".join(rest).strip() or len(tags) != 2 * bool(block) or not one_box:
        return 0.0
    return float(re.fullmatch(r"(?:[\s.,;:!$*]|\\[\])])*", tail[end + 1 :]) is not None)


# ---- the command line

def show(node):
    """A tree on one line; long numbers are abbreviated."""
    if isinstance(node, tuple):
        return show(node[1]) if node[:1] == ("num",) else f"({' '.join(map(show, node))})"
    long = isinstance(node, Fraction) and bit_length(node) >= 400
    return "(a long number)" if long else str(node)


def grade_file(path, strict, explain):
    """Print the verdicts on a .jsonl file and, given `expected`, the errors by category."""
    table = {}
    for line, text in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        row = json.loads(text)
        output = row.get("pred", row.get("completion"))
        reference = row.get("gold", row.get("reference", row.get("answer")))
        if output is None or reference is None:
            expected = "pred|completion and gold|reference|answer"
            raise ValueError(f"{path}:{line}: found {sorted(row)}; expected {expected}")
        answer = extract_answer(output, strict)
        verdict = judge(answer, str(reference))
        counts = table.setdefault(row.get("category", "-"), Counter())
        counts.update([verdict, "total"])
        wrong = bool(verdict) != row.get("expected", bool(verdict))
        if wrong:
            counts["accepted" if verdict else "refused"] += 1
        if explain or wrong:
            print(f"{'WRONG ' * wrong}{row.get('id', '')} {verdict}: {answer!r} for {reference!r}")
    total = sum(table.values(), Counter())
    print(f"{total['total']} answers | {total[True]} right | {total[None]} undecided")
    for name, counts in sorted(table.items()):
        accepted, refused = counts["accepted"], counts["refused"]
        print(f"{name:24} {counts['total']:6} | {accepted} false + | {refused} false -")


def main(args):
    if args.file:
        return grade_file(args.file, args.strict, args.explain)
    if args.answer is None or args.reference is None:
        raise ValueError("expected either --file, or both --answer and --reference")
    answer = extract_answer(args.answer, args.strict)
    words = {True: "equal", False: "not equal", None: "undecided"}
    for name, text in (("answer", answer), ("reference", args.reference)):
        print(f"{name:10} {text!r}\n{'':10} {show(read(text.strip())) if text else '-'}")
    print(f"verdict    {words[judge(answer, args.reference)]}")


if __name__ == "__main__":
    try:
        main(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the reader, such as `head`, has closed the pipe
    except (ValueError, FileNotFoundError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
