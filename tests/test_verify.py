"""Tests of verify.py."""

import doctest
import json
import math
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import verify as verifier
from tests.common import ROOT

_EQUAL = r"""
14{,}916 = 14916 || 5,\!636 = 5636 || 5\,636 = 5{,}636 || 1,234,567 = 1234567 || 11,\! 111,\! 100 = 11111100
1\frac45 = 9/5 || 1\frac45 = 1.8 || 2 1/3 = \frac73 || -1\frac{1}{2} = -1.5 || 8\text{ }\frac47 = \frac{60}{7}
2½ = 2.5
\frac12 = .5 || \frac 59 = \frac{10}{18} || \tfrac{3}4 = 0.75 || (3)/(4) = \left(\frac{3}{4}\right)
-\frac{9}{15} = \frac{-3}5
1.5\times10^3 = 1500 || 6.02e23 = 6.02 \cdot 10^{23} || 1e-6 = 10^{-6} || 3.2x10^5 = 320000
10.50 \times 10^{6} = 1.05e7
0.\overline{6} = 2/3 || 0.1\overline{6} = 1/6 || 0.333... = 1/3 || 2.\overline{3} = \frac73
3.33333333333 = \frac{10}{3}
\$18.90 = 18.9 || \$-8,192 = -8192 || €5 = 5 || 15\mbox{ cm}^2 = 15 || 5\mathrm{~cm}^2 = 5 || 12 cm² = 12
5\text{ m/s} = 5
17 \text{ any text} = 17 || -80\ \mathrm{square\ units} = -80 || 5 \text{ million} = 5000000
3\frac12\text{ hours} = 3.5
28\% = 28 || 28\% = 0.28 || \frac{1}{2}\% = 0.005 || 198 \% = 198 || 50\text{ percent} = 50
90^\circ = 90 || 54° = 54^{\circ} || \angle ABC = 69^\circ := 69\text{ degrees} || \cos 60^\circ = \frac12
\sin(90^\circ-x) = \cos x
\text{(C)} = c || \textbf{(C)} = C || (C) = \mathrm{C} || \text{(A)}\ 12 = A || (A) 12 = 12 || \text{Monday.} = monday
\text{does not exist} = \text{DNE} || \text{an ellipse} = ellipse || \text{five} = 5 || \text{No solution} = \emptyset
\{\} = \varnothing
52_8 = 52_{8} || 52_{\text{eight}} = 52_8 || 2^{100} = 1267650600228229401496703205376 || 6 \cdot 6^{999} = 6^{1000}
\binom{30}{11} = \binom{30}{19} || {10 \choose 3} = 120 || 13 \cdot 12! = 13! || n! = n (n-1)!
\frac{1}{2024!} = 1/2024!
2^{300000} = 4^{150000} || \frac{9^{9^9}}{9^{9^9}} = 1 || \binom{n}{2} = \frac{n(n-1)}{2} || \gcd(12,18) = 6
8\sqrt2 = \sqrt{128} || 5√7 = \sqrt[2]{175} || \sqrt[3]{-8} = -2 || \sqrt{3+2\sqrt2} = 1+\sqrt2
8 \cdot 2^{1/2} = 8\sqrt 2 || sqrt(3)/2 = \frac{\sqrt3}{2}
\frac{\pi}{4} = 0.7853981634 || 3π = 3\pi || 256*pi = 256 \pi || 18+2pi = 2(9+\pi) || e^{i\pi} = -1
\log_2 3 = \frac{\ln 3}{\ln 2} || \log 100 = 2 || \ln 8 = 3 \ln 2 || \log(xy) = \log x + \log y
\sin^{-1} x = \arcsin x || \tan^2 y + 1 = \sec^2 y
i = 0+1i || 27i - 11 = -11 + 27 \cdot i || 4+6\mathrm{i} = 6i+4 || 8 - 2*I = 8-2i || |3-4i| = 5 || z = 8 - 1i := 8-i
x**2 = x² || \frac{1}{y}+y = \frac{y^2+1}{y} || 36x\sqrt{35x} = 36\sqrt{35}x^{\frac32} || |x-3| = |3-x|
\frac{1}{\sqrt{n}} = 1/sqrt(n)
(x+1)/(x-1) = \frac{x+1}{x-1} || \sqrt{x^2} = |x| || x^{2/3} = \sqrt[3]{x^2} || \sin 3x = sin(3*x)
\lfloor x+1\rfloor = 1+\lfloor x\rfloor
(x,y) = (1,2) := (1,2) || x=1, y=2 := (1,2) || \bigl(-3 ,\, 2\bigr) = (-3,2) || \langle 1,2\rangle = (1,2)
(1,2,3) = \begin{pmatrix}1\\2\\3\end{pmatrix}
3, 5, 7 = \{7,3,5\} || 3 \text{ and } 4 = 4,3 || x=24, x=-3 := -3, 24 || 0; 1; 2 = 2,1,0
(1,2),(3,4) = (3,4) \text{ and } (1,2) || 100,101,102 = 100, 101, 102
1\pm\sqrt5 = 1-\sqrt5, 1+\sqrt5 || x = \pm 3 := 3 \text{ or } -3 || \{1\pm\sqrt5,-2\} = -2, 1\pm\sqrt{5}
-4 ± 2i = -4+2i,-4-2i
(2,12)\cup(12,102) = (12,102) \cup (2, 12) || [1,2]\cup[2,3] = [1,3] || -2\le x<3 = [-2,3)
\{x|-2\leq x < 1\} = [-2,1) || x \in [46, +\infty) = x \ge 46
x \ne 0 = (-\infty,0)\cup(0,\infty) || \mathbb{R}\setminus\{0\} = x \neq 0 || ℝ = (-∞, ∞) || |x|<3 = (-3,3)
-x >= -1 = x <= 1
x \le -2 \text{ or } x \ge 5 = (-\infty,-2]\cup[5,\infty) || k \ge -36 \text{ and } k \le 104 = -36 \le k \le 104
a \geqslant 1.5 = a \ge \frac32 || x+y>2 = 2 < x+y
\begin{bmatrix}1 & 2\\ 3 & 4\\ \end{bmatrix} = \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
[[1,2],[3,4]] = A = \begin{pmatrix}1&2\\3&4\end{pmatrix}
\frac13\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}1/3\\2/3\end{pmatrix}
x=5 := 5 || 5=x := 5 || k=1+1=2 := 2 || x=1/3\approx0.33 := 1/3 || f(x)=2x+3 := y = 2x+3 || y=2x+3 := 2x-y+3=0
x^2/16+y^2/12=1/4 := \frac{x^2}{4}+\frac{y^2}3=1
f^{-1}(x) = \frac{x-1}{2} := \frac{x-1}2 || \frac{dy}{dx} = 2x := 2x || |AB| = 1 := 1 || S_{MBCN}:S=7:32 := 7:32
\sum_{k=1}^3 k = 6 := 6 || 3:4 = 6:8
{3 \over 7} = \sfrac{3}{7} || .\overline{3} = \frac13 || 0.1\overline{6} = \nicefrac{1}{6} || 0.(3) = 1/3
\frac{3}{7} = 0.428\ldots := 3/7
1'000 = 1{,}\!000 || \text{forty-two} = 42 || \text{negative seven} = {-}7 || \text{two hundred five thousand} = 205000
12 1/2 \% = 12.5 || 2{\frac{3}{4}} = 2.75 || 45 per cent = 0.45 || 3.2 X 10^{5} = 320000
\frac12 \text{ or } 50\% = 0.5
US\$15 = 15 || {\$}15 = \text{\$}15 || \text{USD }15 = 15 || 60 \frac{\text{km}}{\text{h}} = 60 km/h
12\ {\rm cm}^2 = 12
60\,\mathrm{km\,h^{-1}} = 60 || 144 (\text{ways}) = 144 || 80\;\mathrm m = 80
72{}^\circ = 72^{\mathrm{o}} || 72º = 72 || \measuredangle ABC = 72^\circ := 72 || \sin \pi/6 = \frac12
(1011)_2 = 1011_{(2)} || 2A5_{16} = \text{2A5}_{16} || 1011_{\text{base }2} = 1011_2 || \text{BEEF}_{16} = BEEF_{16}
12𝜋 = 12\pi || \sqrt{-9} = 3i || \operatorname{cis} 60^\circ = e^{i\pi/3} || -\sqrt{-4} = -2i
P(3,-1) = (3,-1) || \{x=3, y=-1\} := (3,-1) || x = 3 \quad y = -1 := (3,-1) || (1,2) \quad (3,4) = (3,4),(1,2)
\left\{\begin{array}{l}x=3\\y=-1\end{array}\right. := (3,-1) || 2, 5, \& 7 = 5,7,2 || \text{A and C} = C, A
2 \le f(x) < 5 = [2,5)
(-\infty,1)\text{ or }(4,\infty) = x<1 \text{ or } x>4
\R - \{2\} = x \not= 2 || \text{All real numbers except } 2 = x \ne 2 || \mathbb{R}^+ = x > 0
[1,2]\cup\{3\} = 1 \le x \le 2 \text{ or } x=3
\{1,2\} \cap \{2,3\} = \{2\} || \text{There is no solution} = \emptyset || \text{the set of all integers} = \mathbf{Z}
\binom{n}{k} = \frac{n!}{k!(n-k)!}
\begin{pmatrix}5&-2\end{pmatrix}^T = (5,-2)
3 \text{ to } 4 = 3{:}4 || 7 p.m. = 7\text{ PM} || \triangle ABC = ABC || │x│ = |x| || \textbf{(B) }12 = (B) 12
\text{Answer: B} = B)
\Large 42 = 42\ || 42 \checkmark = 42
n \equiv 1 (\bmod 3) := n \equiv 1 \pmod 3 || x = k\pi \; (k \in \mathbb{Z}) := k\pi || 1, 2, \ldots, n = 1,2,...,n
10^{\text{th}} = 10th
\text{II and III} = III, II || \frac{\partial f}{\partial x} = 2xy := 2xy || |z|^2 = z\bar{z} || \overline{AB} = AB
"""
_DIFFERENT = r"""
(2,1) = (1,2) || [0,1) = [0,1] || (1,2) = 1,2 || \{1,2\} = (1,2) || (1,2) = [1,2] || (1,2,0) = (1,2)
3 \text{ or } 4 = 3 || 3,4,17 = 3,4 || 1,1,2 = 1,2,2
0.33 = 1/3 || 0.333 = \frac13 || 3.14 = \pi || 7.78 = \frac{70}{9} || 30.01 = 30 || 2.9999999999 = 3
99999999999.5 = 100000000000 || 1.41421357 = \sqrt2
52_8 = 52_7 || 52_8 = 52 || 52_8 = 42 || 28\% = 2.8 || 28\% = 2800\% || 0.28 = 28 || \$5 = 50 || 10\text{ units} = 100
1,2345 = 12345 || (2, 598) = 2598
2^{100} = 2^{100}+1 || 6^{1000} = 6^{1001} || 2^{300000} = 2^{300000}+1 || \frac{1}{2024!} = \frac{1}{2025!}
1e-20 = 2e-20 || e^{-200} = e^{-201} || 10^{-20} = 0
\sqrt{10^{40}+1} = 10^{20} || 1234567890123456789 = 1234567890123456788 || 123456789x = 123456788x || 5! = 60
\binom{30}{11} = \binom{30}{12}
8\sqrt2 = 2\sqrt8 || 10\sqrt2 = 10+\sqrt2 || \sqrt{x^2} = x || \sin x = \cos x || \log_2 3 = \log_3 2
\sin x^2 = \sin^2 x || f(x) = f(y) || x = y || 2x = x
1+2i = 1-2i || 5i = 5 || 1\frac45 = \frac{14}5 || 8\frac47 = \frac{84}7 || \frac{72}{425} = 72425 || 41230x = 41230
-3^2 = 9 || (4^2)^3 = 4^{2^3}
\infty = -\infty || \emptyset = 0 || \mathbb{R} = \mathbb{Z} || \mathbb{R} = (0,\infty) || \text{DNE} = 0
\text{none of the above} = \emptyset || \text{infinitely many} = \infty
x>3 = x\ge 3 || x>3 = x<3 || x>3 = 3 || x \ne 5 = 5 || (-\infty,3) = (-\infty,3]
-36 < k \le 104 = -36 \le k \le 104 || k \le 104 = -36 \le k \le 104 || [x,y) = [1,2) || k>5 = x>5
(1,2)\cap(3,4) = (1,2)\cup(3,4) || (1,2)\cup(3,4) = (1,4) || x^2+y^2<4 = x^2+y^2\le4 || \{x|-2\leq x < 1\} = (-2,1)
(2,-1] = (2,-1) || (1,1] = (1,1) || [5, \infty] = [5,\infty) || 2.33333333334 = \frac73 || 1\pm\sqrt5 = 1+\sqrt5
y^2=12x := 12x || 4x-5y=-50 := -50 || x+y=5 := 5 || x=5 := y=5 || y=2x+3 := y=3x+2
2x - 3y + 7 = 0 := 2x - 3y + 8 = 0 || \cos x=\frac12 := \sin x=\frac12 || x = x := x || 0 = 0 := 1
\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} = \begin{pmatrix}1&3\\2&4\end{pmatrix}
\text{not Monday} = \text{Monday} || \text{June 20} = \text{July 20} || 3 hours 20 minutes = 20 hours 3 minutes
\text{5 or more} = 5 || \text{at least 5} = 5 || odd = oddd || (A) 12 = B
\int_0^1 x dx = \frac12 || 2+2=5 := 5 || ANSWER = 5 || ? = 5 || , = 3, 4 || () = (1,2)
\ldots = 5 || - = 5 || 3 \pmod 7 = 4 \pmod 7 || 7:32 = 32:7
7 p.m. = 7 a.m. || 7:30\text{ PM} = \text{7:30 AM} || 10,00 = 10,000 || 10,0000 = 10,000 || 5,40 = 5,040
\{\emptyset\} = \emptyset
3:4:5 = 3:4 || (B) or (C) = B || (E), 97 = E || \text{(C)}+1 = C || \sin\pi/6 = 0 || (x+y)/x y = \frac{x+y}{xy}
3 \le x \text{ or } 97 = x \ge 3 || x \in (1,2) = y \in (1,2) || \frac{1}{2004!} = \frac{i}{2004!} || 2=3 := 4=6
[2,5[ = [2,5]
\frac{712}{425} \approx 0.169 := \frac{72}{425} \approx 0.169 || \begin{pmatrix}5\\-2\end{pmatrix} = \binom{5}{2}
\binom{12}{5} = (12,5)
\text{forty-two} = 24 || \text{five or six} = 5 || (1011)_2 = (1011)_3 || 2A5_{16} = 2A6_{16} || 5m := 5x
60 \text{ to } 70 = 60
\mathbb{R} - \{2\} = \mathbb{R} - \{3\} || \{1,2\} \cap \{2,3\} = \{1,2,3\}
\begin{pmatrix}5&-2\end{pmatrix}^T = \begin{pmatrix}5&-2\end{pmatrix}
\pm1\pm1\pm1\pm1\pm1 = 5 || n \equiv 1 \pmod 4 := n \equiv 1 \pmod 3 || \overline{z} = z || 1,2,\ldots,8 = 1,2,\ldots,9
"""


def _pairs(table):
    """The (a, b) of a table whose cells read `a = b`, or `a := b` where an equals sign belongs to an answer."""
    cells = [cell.strip() for line in table.strip().splitlines() for cell in line.split("||")]
    return [cell.split(" := " if " := " in cell else " = ", 1) for cell in cells]


def test_verify_tables():
    """Both directions of every pair; a shared canonical key means equivalence."""
    for table, expected in ((_EQUAL, True), (_DIFFERENT, False)):
        for a, b in _pairs(table):
            for answer, reference in ((a, b), (b, a)):
                verdict = verifier.judge(answer, reference)
                assert verdict[0] is expected, (answer, reference, verdict)
            assert expected or verifier.canonical(a) != verifier.canonical(b), (a, b)
            assert verifier.read(a) == ("raw", "") or verifier.equivalent(a, f" {a} "), a


def test_verify_examples_in_docstrings():
    assert doctest.testmod(verifier).failed == 0


def test_verify_extraction():
    """The last box wins, joined boxes are one answer, what follows the thinking block outranks what is in it."""
    for text, reference, expected in [
        (r"We get \boxed{1}. Wait: \boxed{2}.", "2", True),
        (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "1,-2", True),
        (r"\boxed{3} or \boxed{4}", "3", False), (r"$\boxed{15\frac12},$ or $\boxed{\frac{31}2}$", "15.5", True),
        ("\\boxed{3}\n\n\\boxed{4}", "4", True), (r"\boxed {\frac{1}{2}}", "0.5", True),
        (r"\fbox{\{1,2\}}", "2,1", True),
        (r"\boxed{$75$}", "75", True), (r"\boxed{\text{The answer is } 5}", "5", True), (r"$\boxed{5", "5", True),
        (r"\boxed{50} percent", "0.5", True), (r"$\boxed{57}$, after 18 trials, see page 117.", "57", True),
        (r"\boxed{}", "", False), (r"\beginboxed{8\sqrt{6}}", r"8\sqrt6", True), ("\x08oxed{12}", "12", True),
        (r"<think>\boxed{16}</think> It is $\boxed{17}$.", "16", False), (r"<think>maybe 4</think>7", "7", True),
        (r"<thought>\boxed{5}</thought>\boxed{6}", "6", True), ("<think>the answer is 5", "5", True),
        (r"\boxed{42}<|im_end|><|im_start|>user \boxed{6}", "42", True), ("First 451.\n#### 452", "451", False),
        ("<think>x</think><answer>$4a-2$</answer>", "4a-2", True), ("**Answer**: $549$", "549", True),
        ("**Final Answer:** **161**", "161", True), ("## Final Answer\n$$\\frac{1}{2}$$", "1/2", True),
        ("The answers are $3$ and $4$.", "4,3", True), ("The answer is 3 or 4.", "3", False), ("Answer: C", "C", True),
        ("Option F tempts, but the correct answer is (E).", "E", True),
        ("The answer is 42 because 6*7 = 42.", "42", True),
        ("Answer: 5!", "120", True), ("The answer is yes, because 3 > 2.", "yes", True), ("A: 160,000", "160000", True),
        ("The answer isn't 5. It's 6.", "6", True), ("Final Answer: The largest $n$ is 34.", "34", True),
        ("Then $m=3$, so she pays $18 a day.", "18", True), ("So, 5 + 4 = 9.", "9", True), ("x = -5", "-5", True),
        ("Note that $9$ is not the answer since it fails. The final answer is $8$.", "9", False),
        ("Okay, hmm, wait.", "5", False), ("", "5", False), ("The answer is not 11.", "11", False),
        ("答案是11。", "11", True),
        ("The answer is 25π square units.", r"25\pi", True), (r"The probability is \frac{3}{8}.", "3/8", True),
        ("The ratio is 3:4.", "3:4", True), (r"\boxed{(A) or (B)}", "A", False),
    ]:  # fmt: skip
        assert verifier.verify(text, reference) is expected, (text, verifier.extract_answer(text))


def test_verify_strict_extraction():
    """For rewards only a closed box after a closed block counts."""
    assert verifier.extract_answer("The answer is 5", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}</think> so 5", strict=True) is None
    assert verifier.extract_answer(r"\boxed{4} and \boxed{5", strict=True) is None
    assert verifier.extract_answer(r"a</think> \boxed{5}", strict=True) == "5"
    assert verifier.accuracy_reward(r"<think>a</think> \boxed{\frac{2}{4}}", "0.5") == 1.0
    assert verifier.accuracy_reward(r"The answer is 0.5", "0.5") == 0.0


def test_verify_format_reward():
    good = [r"<think>a</think> So \boxed{5}.", r"\boxed{5}", "<think>\na\n</think>\n\\[\\boxed{5}\\]", r"$\boxed{8}$."]
    bad = [
        r"<think></think>\boxed{5}", r"<think> </think>\boxed{5}", r"<think>a\boxed{5}", r"a</think>\boxed{5}", "5",
        r"x<think>a</think>\boxed{5}", r"<think>a</think><think>b</think>\boxed{5}", r"<think>a</think>\boxed{}", "",
        r"<think>\boxed{5}</think>", r"\boxed{5}\boxed{5}", r"\boxed{5} as I said", r"\boxed{5",
        r"<think>a</think></think>\boxed{5}",
    ]  # fmt: skip
    assert [verifier.format_reward(text) for text in good + bad] == [1.0] * len(good) + [0.0] * len(bad)
    assert verifier.format_reward(r"<thought>a</thought> \boxed{5}<|im_end|>", think_tag="thought") == 1.0


def _random_value(rng, depth):
    """(a LaTeX, a plain and a wordy spelling, the value by Python's own arithmetic) of a random expression."""
    if depth == 0 or rng.random() < 0.2:
        n = rng.randrange(1, 50)
        kind = rng.randrange(4)
        if kind == 0:
            return rf"\sqrt{{{n}}}", f"sqrt({n})", f"{n}^{{1/2}}", n**0.5
        if kind == 1:
            return r"\pi", "pi", "π", math.pi
        if kind == 2:
            return rf"\frac{{{n}}}{{8}}", f"{n}/8", rf"\tfrac{{{2 * n}}}{{16}}", n / 8
        return str(n), f"{n}.0", rf"\frac{{{n * 3}}}3", float(n)
    (la, pa, wa, a), (lb, pb, wb, b) = _random_value(rng, depth - 1), _random_value(rng, depth - 1)
    kind = rng.randrange(5)
    if kind == 0:
        return f"{la}+{lb}", f"({pb}) + ({pa})", rf"\left({wb}\right)+{wa}", a + b
    if kind == 1:
        return f"{la}-\\left({lb}\\right)", f"-(({pb}) - ({pa}))", rf"(-1 \cdot ({wb}) + ({wa}))", a - b
    if kind == 2:
        return rf"\left({la}\right)\left({lb}\right)", f"({pb})*({pa})", rf"({wa}) \times ({wb})", a * b
    if kind == 3:
        return rf"\frac{{{la}}}{{{lb}}}", f"({pa})/({pb})", rf"({wa})\left({wb}\right)^{{-1}}", a / b if b else math.nan
    return rf"\left({la}\right)^2", f"({pa})**2", rf"({wa})({wa})", a * a


def test_verify_random_expressions():
    """A random number in three spellings is one number, for Python's arithmetic as for ours; a perturbed one is not."""
    rng, checked = random.Random(0), 0
    while checked < 250:
        *spellings, value = _random_value(rng, rng.randrange(1, 4))
        if not 1e-6 < abs(value) < 1e9 or max(map(len, spellings)) > 400:
            continue
        checked += 1
        a, b = rng.sample(spellings, 2)
        assert verifier.equivalent(a, b), (a, b)
        assert abs(complex(verifier.to_sympy(verifier.read(a))) - value) < 1e-9 * abs(value), (a, value)
        for wrong in (f"{a}+1", f"-({a})", f"2({a})", f"{a}+10^{{-12}}", f"({a}, {b})", f"({a})x", rf"{a} \pm 1"):
            assert verifier.judge(wrong, b)[0] is False, (wrong, b)


def test_verify_unit_letters():
    """A last letter may be a unit of the answer; where the reference has it, it is a variable."""
    assert verifier.equivalent("80m", "80") and verifier.equivalent("t = 2 s", r"2\text{ seconds}")
    assert not verifier.equivalent("80", "80m") and not verifier.equivalent("80x", "80")


def test_verify_symmetry():
    """Neither side has a special role, but for a unit, and what equals one thing is equal to one another."""
    rng = random.Random(3)
    cells = [cell for pair in [*_pairs(_EQUAL), *_pairs(_DIFFERENT)] for cell in pair if "%" not in cell]
    for a, b in _pairs(_EQUAL):
        for c in (*rng.sample(cells, 4), rng.choice(cells) + "m"):
            verdicts = [verifier.judge(*pair)[0] for pair in ((a, c), (c, a), (b, c))]
            assert c[-1] == "m" or verdicts[0] == verdicts[1], (a, c)
            one_of_two = re.search(r"%|cent|\(A\)", a + b)  # 28 % is 28 and 0.28, (A) 12 is A and 12
            assert one_of_two or verdicts[0] == verdicts[2], (a, b, c)


def test_verify_random_structures():
    """Lists ignore order, tuples do not; an interval is its inequality; brackets and endpoints count."""
    rng = random.Random(1)
    for _ in range(100):
        values = rng.sample([f"{n}" for n in range(-9, 10)] + [r"\frac{1}{3}", r"\sqrt{2}", r"-\frac{\pi}{2}"], 3)
        other = values[:]
        while other == values:
            rng.shuffle(other)
        a, b, c, d = ", ".join(values), ", ".join(other), ",".join(values[:2]), ", ".join([*values, "17"])
        assert verifier.equivalent(a, b) and verifier.equivalent(rf"\{{{a}\}}", b.replace(", ", r" \text{ and } "))
        assert not verifier.equivalent(f"({a})", f"({b})") and verifier.equivalent(rf"\left({a} \right)", f"({a})")
        assert not verifier.equivalent(a, c) and not verifier.equivalent(a, d)
        assert not verifier.equivalent(f"({a})", f"({d})")
        low, high = sorted(rng.sample(range(-9, 10), 2))
        left, right = rng.choice("[("), rng.choice("])")
        less = {"[": r"\le", "(": "<", "]": r"\le", ")": "<"}
        interval, inequality = f"{left}{low},{high}{right}", f"{low} {less[left]} x {less[right]} {high}"
        assert verifier.equivalent(interval, inequality) and verifier.equivalent(rf"\{{x : {inequality}\}}", interval)
        flipped = {"[": "(", "(": "["}[left]
        assert not verifier.equivalent(f"{flipped}{low},{high}{right}", inequality)
        assert not verifier.equivalent(f"{left}{low},{high + 1}{right}", inequality)


def test_verify_many_keeps_order_and_kills():
    """A comparison that goes to a worker is decided there or is None in time; the others do not wait for it in vain."""
    tower = (r"\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}")  # both too large for everything but SymPy, which never ends
    begin = time.perf_counter()
    verdicts = verifier.verify_many([("#### 5", "5"), tower, ("#### 5", "6"), (None, "5")], timeout_s=0.3)
    assert verdicts == [True, None, False, False] and time.perf_counter() - begin < 60, verdicts
    assert verifier.verify(*tower) is False
    hard = (r"\boxed{x^{10^{9}} (x^{10^{9}} + 1)}", r"x^{10^{9}} + x^{2 \cdot 10^{9}}")
    assert verifier.judge(verifier.extract_answer(hard[0]), hard[1])[0] is None
    assert verifier.verify_many([hard, hard], timeout_s=30) == [True, True]
    assert verifier.verify_many([]) == []


def test_verify_same_everywhere():
    """Verdicts in threads equal those alone. A grader whose time limit is a signal fails off the main thread."""
    pairs = [*_pairs(_EQUAL), *_pairs(_DIFFERENT)][::3]
    alone = [verifier.judge(*pair)[0] for pair in pairs]
    verifier._judge.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: verifier.judge(*pair)[0], pairs)) == alone


def test_verify_imports_little():
    """Neither SymPy nor mpmath is loaded before it is needed, and nothing of this repository."""
    code = "import sys, verify; verify.verify('#### 1/2', '0.5'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"sympy", "mpmath", "torch", "model", "generate", "eval"} & set(done.stdout.split())


def test_verify_command_line():
    def run(*flags):
        return subprocess.run([sys.executable, ROOT / "verify.py", *flags], capture_output=True, text=True)

    done = run("--answer", r"so \boxed{\frac{2}{4}}", "--reference", "0.5")
    assert done.returncode == 0 and "equal, by: exact number" in done.stdout, done
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        right = {"pred": "#### 5", "gold": "5", "expected": True, "category": "a"}
        rows = [right, {"answer": "6", "reference": "5", "expected": True}]
        file.write_text("\n".join(map(json.dumps, rows)))
        done = run("--file", str(file))
        assert done.returncode == 0 and "2 answers | 1 right" in done.stdout and "WRONG" in done.stdout, done
        file.write_text('{"pred": "5"}')
        for flags in ([], ["--file", str(file)], ["--file", "missing.jsonl"]):
            done = run(*flags)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done


_PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} | , ; + - * / ^ _ ! % = < \le \pm \cup \in \infty x y n i e f 1 9 99 0.5 . 1e9 e99 "
    r"\pi \sin \log \binom \text{ \text{and} \begin{pmatrix} \end{pmatrix} & \\ \left \overline ° ² √ ∞ é $ \boxed{ ** "
    r"^{9^{9^9}} \mathbb{R} \circ sqrt __import__('os') lambda:0 : \mid \lfloor \pmod gcd percent million cm "
    "<think> ½ ١ ̅ "
).split() + ["\x00", "\ud800", "\u202e", " ", "\n", "9" * 50]


def _hostile_text(rng):
    """A random expression, a soup of pieces, a mutated expression, random characters or something repeated for long."""

    def expression(depth):
        if depth == 0 or rng.random() < 0.25:
            return rng.choice([*"xyein0123", "3.5", "10", r"\pi", str(rng.randrange(10**9)), r"\infty", "-4"])
        a, b = expression(depth - 1), expression(depth - 1)
        return rng.choice([
            f"{a}+{b}", f"{a}-{b}", rf"\frac{{{a}}}{{{b}}}", rf"\sqrt{{{a}}}", f"({a})^{{{b}}}", f"({a},{b})",
            f"[{a},{b})", rf"\{{{a},{b}\}}", f"{a}={b}", rf"{a} \le {b}", f"|{a}|", rf"\sin({a})", f"({a})!",
            rf"\binom{{{a}}}{{{b}}}", rf"\log_{{{a}}} {b}", rf"{a} \pm {b}", rf"{a}\%", f"({a})({b})", f"f({a})",
            rf"x \in {a}", f"({a})^{{({b})!}}", rf"\begin{{pmatrix}}{a} \\ {b}\end{{pmatrix}}", rf"{a} \cup {b}",
            rf"\{{x \mid {a} < x\}}", rf"{a} \text{{ or }} {b}",
        ])  # fmt: skip

    kind = rng.random()
    if kind < 0.4:
        return expression(rng.randrange(1, 5))
    if kind < 0.7:
        return "".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 40)))
    if kind < 0.85:
        text = list(expression(3))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(2)] = [rng.choice(_PIECES)]
        return "".join(text)
    if kind < 0.95:
        return "".join(chr(rng.randrange(rng.choice((127, 0x110000)))) for _ in range(rng.randrange(100)))
    count = rng.randrange(10, 3000)
    return rng.choice(_PIECES) * count + rng.choice(["", "1", "x"]) + rng.choice(["", ")", "}"]) * rng.randrange(count)


def test_verify_fuzz(count=1500, seed=0):
    """No exception, no hang, no growth. Longer: python -c "from tests.test_verify import *; print(test_verify_fuzz(100_000))" """
    rng, previous, slowest = random.Random(seed), "x", (0.0, "")
    verifier.equivalent(r"\sqrt2", "1.41421356")  # mpmath is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        text = _hostile_text(rng)
        reference, previous = rng.choice([previous, text, _hostile_text(rng)]), text
        begin = time.thread_time()
        for output in (text, rf"so \boxed{{{text}}}"):
            for strict in (False, True):
                answer = verifier.extract_answer(output, strict)
                assert answer is None or verifier.judge(answer, reference)[1] != "error", (answer, reference)
        verifier.canonical(text)
        verifier.format_reward(text)
        slowest = max(slowest, (time.thread_time() - begin, text[:200]))
    growth_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert slowest[0] < 1.0 and growth_mb < 100, (slowest, growth_mb)
    return slowest, growth_mb


def test_verify_hostile():
    """Resource bombs, code and malformed text end in False, each within a fraction of a second of CPU time."""
    bombs = [
        "9**9**9", "9^{9^{9^9}}", "10^{10^{10}}", "((9!)!)!", "99999999!", "!" * 5000, "-" * 100_000 + "1",
        "(" * 100_000,
        r"\frac{" * 50_000, r"\sqrt{" * 999 + "2" + "}" * 999, "1" * 1_000_000, "0." + "1" * 900, r"\binom{10^9}{10^8}",
        "e^{e^{e^{e^{e}}}}", r"\sin(10^{100000})", "1/0", "0^0", r"\tan(\pi/2)", r"\ln 0", "1e999999", r"2^{-2^{100}}",
        "__import__('os').system('touch /tmp/verify_was_here')", "().__class__", r"\input{/etc/passwd}", "[0]*10**10",
        "\x00", "\ud800", "a" + "̅" * 10_000, "½" * 1000, "²" * 1000, r"\pm 1" * 30, "|" * 10_000, r"\text{" * 10_000,
        "$" * 300_000, r"\[" * 100_000, "answer is " * 50_000, "answer" + " " * 500_000, "\\" * 500_000,
        "<think>" * 50_000, r"\boxed{" * 100_000, r"\boxed{5}, " * 50_000, r"\boxed{" + "1, " * 300 + "2}",
        "x<" * 400 + "1",
        "[1,2]\\cup" * 80 + "[3,4]",
        r"\begin{pmatrix}" * 1000, "x^{10^{100}}", "(x+y+z)^{500}", "((x!)!)!", r"3 \pmod{0}", "10_{1}",
        "gcd(" + "9" * 900 + ",6)",
    ]  # fmt: skip
    for bomb in bombs:
        for text in (bomb, rf"so $\boxed{{{bomb}}}$", "The answer is " + bomb):
            begin = time.thread_time()
            for reference in ("5", "x^2+1"):
                right = reference == "5" and r"\boxed{5}, " in text
                assert verifier.verify(text, reference) is right, (bomb[:60], reference)
            verifier.format_reward(text), verifier.canonical(text)
            assert time.thread_time() - begin < 1.0, (bomb[:60], time.thread_time() - begin)
    assert not Path("/tmp/verify_was_here").exists()
