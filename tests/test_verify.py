"""Tests of verify.py."""

import contextlib
import doctest
import json
import math
import os
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
from tests.common import ROOT, skip_unless

# The cells of a table read `answer :: reference`, and are tested both ways.

_EQUAL = r"""
14{,}916 :: 14916 || 5,\!636 :: 5636 || 5\,636 :: 5{,}636 || 1,234,567 :: 1234567
11,\! 111,\! 100 :: 11111100 || 1\frac45 :: 9/5 || 1\frac45 :: 1.8 || 2 1/3 :: \frac73
-1\frac{1}{2} :: -1.5 || 8\text{ }\frac47 :: \frac{60}{7} || 2½ :: 2.5 || \frac12 :: .5
\frac 59 :: \frac{10}{18} || \tfrac{3}4 :: 0.75 || (3)/(4) :: \left(\frac{3}{4}\right)
-\frac{9}{15} :: \frac{-3}5 || 1.5\times10^3 :: 1500 || 6.02e23 :: 6.02 \cdot 10^{23}
1e-6 :: 10^{-6} || 3.2x10^5 :: 320000 || 10.50 \times 10^{6} :: 1.05e7 || 0.\overline{6} :: 2/3
0.1\overline{6} :: 1/6 || 0.333... :: 1/3 || 2.\overline{3} :: \frac73
3.33333333333 :: \frac{10}{3} || \$18.90 :: 18.9 || \$-8,192 :: -8192 || €5 :: 5
15\mbox{ cm}^2 :: 15 || 5\mathrm{~cm}^2 :: 5 || 12 cm² :: 12 || 5\text{ m/s} :: 5
17 \text{ any text} :: 17 || -80\ \mathrm{square\ units} :: -80 || 5 \text{ million} :: 5000000
3\frac12\text{ hours} :: 3.5 || 28\% :: 28 || 28\% :: 0.28 || \frac{1}{2}\% :: 0.005
198 \% :: 198 || 50\text{ percent} :: 50 || 90^\circ :: 90 || 54° :: 54^{\circ}
\angle ABC = 69^\circ :: 69\text{ degrees} || \cos 60^\circ :: \frac12
\sin(90^\circ-x) :: \cos x || \text{(C)} :: c || \textbf{(C)} :: C || (C) :: \mathrm{C}
\text{(A)}\ 12 :: A || (A) 12 :: 12 || \text{Monday.} :: monday
\text{does not exist} :: \text{DNE} || \text{an ellipse} :: ellipse || \text{five} :: 5
\text{No solution} :: \emptyset || \{\} :: \varnothing || 52_8 :: 52_{8}
52_{\text{eight}} :: 52_8 || 2^{100} :: 1267650600228229401496703205376
6 \cdot 6^{999} :: 6^{1000} || \binom{30}{11} :: \binom{30}{19}
13 \cdot 12! :: 13! || n! :: n (n-1)! || \frac{1}{2024!} :: 1/2024!
\binom{n}{2} :: \frac{n(n-1)}{2}
8\sqrt2 :: \sqrt{128} || 5√7 :: \sqrt[2]{175} || \sqrt[3]{-8} :: -2
\sqrt{3+2\sqrt2} :: 1+\sqrt2 || 8 \cdot 2^{1/2} :: 8\sqrt 2 || sqrt(3)/2 :: \frac{\sqrt3}{2}
\frac{\pi}{4} :: 0.7853981634 || 3π :: 3\pi || 256*pi :: 256 \pi || 18+2pi :: 2(9+\pi)
e^{i\pi} :: -1 || \log_2 3 :: \frac{\ln 3}{\ln 2} || \log 100 :: 2 || \ln 8 :: 3 \ln 2
\log(xy) :: \log x + \log y || \sin^{-1} x :: \arcsin x || \tan^2 y + 1 :: \sec^2 y || i :: 0+1i
27i - 11 :: -11 + 27 \cdot i || 4+6\mathrm{i} :: 6i+4 || 8 - 2*I :: 8-2i || |3-4i| :: 5
z = 8 - 1i :: 8-i || x**2 :: x² || \frac{1}{y}+y :: \frac{y^2+1}{y}
36x\sqrt{35x} :: 36\sqrt{35}x^{\frac32} || |x-3| :: |3-x| || \frac{1}{\sqrt{n}} :: 1/sqrt(n)
(x+1)/(x-1) :: \frac{x+1}{x-1} || \sqrt{x^2} :: |x| || x^{2/3} :: \sqrt[3]{x^2}
\sin 3x :: sin(3*x) || (x,y) = (1,2) :: (1,2)
x=1, y=2 :: (1,2) || \bigl(-3 ,\, 2\bigr) :: (-3,2) || \langle 1,2\rangle :: (1,2)
(1,2,3) :: \bp1\\2\\3\ep || 3, 5, 7 :: \{7,3,5\} || 3 \text{ and } 4 :: 4,3
x=24, x=-3 :: -3, 24 || 0; 1; 2 :: 2,1,0 || 1,2;3,4 :: 1,2,3,4
(1,2),(3,4) :: (3,4) \text{ and } (1,2)
100,101,102 :: 100, 101, 102 || 1\pm\sqrt5 :: 1-\sqrt5, 1+\sqrt5 || x = \pm 3 :: 3 \text{ or } -3
\{1\pm\sqrt5,-2\} :: -2, 1\pm\sqrt{5} || -4 ± 2i :: -4+2i,-4-2i
(2,12)\cup(12,102) :: (12,102) \cup (2, 12) || [1,2]\cup[2,3] :: [1,3] || -2\le x<3 :: [-2,3)
\{x|-2\leq x < 1\} :: [-2,1) || x \in [46, +\infty) :: x \ge 46
x \ne 0 :: (-\infty,0)\cup(0,\infty) || \mathbb{R}\setminus\{0\} :: x \neq 0 || ℝ :: (-∞, ∞)
|x|<3 :: (-3,3) || -x >= -1 :: x <= 1
x \le -2 \text{ or } x \ge 5 :: (-\infty,-2]\cup[5,\infty)
k \ge -36 \text{ and } k \le 104 :: -36 \le k \le 104 || a \geqslant 1.5 :: a \ge \frac32
x+y>2 :: 2 < x+y
\begin{bmatrix}1 & 2\\ 3 & 4\\ \end{bmatrix} :: \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
[[1,2],[3,4]] :: A = \bp1&2\\3&4\ep || [[1,2,3],[4,5,6]] :: \bp1&2&3\\4&5&6\ep
\frac13\bp1\\2\ep :: \bp1/3\\2/3\ep || x=5 :: 5 || 5=x :: 5
k=1+1=2 :: 2 || x=1/3\approx0.33 :: 1/3 || f(x)=2x+3 :: y = 2x+3 || y=2x+3 :: 2x-y+3=0
x^2/16+y^2/12=1/4 :: \frac{x^2}{4}+\frac{y^2}3=1 || f^{-1}(x) = \frac{x-1}{2} :: \frac{x-1}2
\frac{dy}{dx} = 2x :: 2x || |AB| = 1 :: 1 || S_{MBCN}:S=7:32 :: 7:32 || \sum_{k=1}^3 k = 6 :: 6
3:4 :: 6:8 || {3 \over 7} :: \sfrac{3}{7} || .\overline{3} :: \frac13
0.1\overline{6} :: \nicefrac{1}{6} || 0.(3) :: 1/3 || 1'000 :: 1{,}\!000
12 1/2 \% :: 12.5 || {-}7 :: -7
2{\frac{3}{4}} :: 2.75 || 3.2 X 10^{5} :: 320000
US\$15 :: 15 || {\$}15 :: \text{\$}15 || \text{USD }15 :: 15
60 \frac{\text{km}}{\text{h}} :: 60 km/h || 60\,\mathrm{km\,h^{-1}} :: 60
144 (\text{ways}) :: 144 || 80\;\mathrm m :: 80 || 72{}^\circ :: 72^{\mathrm{o}} || 72º :: 72
\measuredangle ABC = 72^\circ :: 72 || \sin \pi/6 :: \frac12 || (1011)_2 :: 1011_{(2)}
1011_{\text{base }2} :: 1011_2 || \text{BEEF}_{16} :: BEEF_{16}
12𝜋 :: 12\pi || \sqrt{-9} :: 3i || -\sqrt{-4} :: -2i
P(3,-1) :: (3,-1) || \{x=3, y=-1\} :: (3,-1) || x = 3 \quad y = -1 :: (3,-1)
(1,2) \quad (3,4) :: (3,4),(1,2)
2, 5, \& 7 :: 5,7,2 || \text{A and C} :: C, A
(-\infty,1)\text{ or }(4,\infty) :: x<1 \text{ or } x>4 || \R - \{2\} :: x \ne 2
[1,2]\cup\{3\} :: 1 \le x \le 2 \text{ or } x=3 || \{1,2\} \cap \{2,3\} :: \{2\}
\text{There is no solution} :: \emptyset || \text{the set of all integers} :: \mathbf{Z}
\binom{n}{k} :: \frac{n!}{k!(n-k)!} || 3 \text{ to } 4 :: 3{:}4
7 p.m. :: 7\text{ PM} || \triangle ABC :: ABC || │x│ :: |x| || \textbf{(B) }12 :: (B) 12
\text{Answer: B} :: B) || \Large 42 :: 42\ || 42 \checkmark :: 42
n \equiv 1 (\bmod 3) :: n \equiv 1 \pmod 3 || x = k\pi \; (k \in \mathbb{Z}) :: k\pi
1, 2, \ldots, n :: 1,2,...,n || 10^{\text{th}} :: 10th
\frac{\partial f}{\partial x} = 2xy :: 2xy
"""
_DIFFERENT = r"""
(2,1) :: (1,2) || [0,1) :: [0,1] || (1,2) :: 1,2 || \{1,2\} :: (1,2) || (1,2) :: [1,2]
(1,2,0) :: (1,2) || 3 \text{ or } 4 :: 3 || 3,4,17 :: 3,4 || 1,1,2 :: 1,2,2 || 0.33 :: 1/3
0.333 :: \frac13 || 3.14 :: \pi || 7.78 :: \frac{70}{9} || 30.01 :: 30 || 2.9999999999 :: 3
99999999999.5 :: 100000000000 || 1.41421357 :: \sqrt2 || 52_8 :: 52_7 || 52_8 :: 52 || 52_8 :: 42
28\% :: 2.8 || 28\% :: 2800\% || 0.28 :: 28 || \$5 :: 50 || 10\text{ units} :: 100
1,2345 :: 12345 || (2, 598) :: 2598 || 2^{100} :: 2^{100}+1 || 6^{1000} :: 6^{1001}
2^{300000} :: 2^{300000}+1 || \frac{1}{2024!} :: \frac{1}{2025!} || 1e-20 :: 2e-20
e^{-200} :: e^{-201} || 10^{-20} :: 0 || \sqrt{10^{40}+1} :: 10^{20}
1234567890123456789 :: 1234567890123456788 || 123456789x :: 123456788x || 5! :: 60
\binom{30}{11} :: \binom{30}{12} || 8\sqrt2 :: 2\sqrt8 || 10\sqrt2 :: 10+\sqrt2 || \sqrt{x^2} :: x
\sin x :: \cos x || \log_2 3 :: \log_3 2 || \sin x^2 :: \sin^2 x || f(x) :: f(y) || x :: y
2x :: x || 1+2i :: 1-2i || 5i :: 5 || 1\frac45 :: \frac{14}5 || 8\frac47 :: \frac{84}7
\frac{72}{425} :: 72425 || 41230x :: 41230 || -3^2 :: 9 || (4^2)^3 :: 4^{2^3} || \infty :: -\infty
\emptyset :: 0 || \mathbb{R} :: \mathbb{Z} || \mathbb{R} :: (0,\infty) || \text{DNE} :: 0
\text{none of the above} :: \emptyset || \text{infinitely many} :: \infty || x>3 :: x\ge 3
x>3 :: x<3 || x>3 :: 3 || x \ne 5 :: 5 || (-\infty,3) :: (-\infty,3]
-36 < k \le 104 :: -36 \le k \le 104 || k \le 104 :: -36 \le k \le 104 || [x,y) :: [1,2)
k>5 :: x>5 || (1,2)\cap(3,4) :: (1,2)\cup(3,4) || (1,2)\cup(3,4) :: (1,4)
x^2+y^2<4 :: x^2+y^2\le4 || \{x|-2\leq x < 1\} :: (-2,1) || (2,-1] :: (2,-1) || (1,1] :: (1,1)
[5, \infty] :: [5,\infty) || 2.33333333334 :: \frac73 || 1\pm\sqrt5 :: 1+\sqrt5 || y^2=12x :: 12x
4x-5y=-50 :: -50 || x+y=5 :: 5 || x=5 :: y=5 || y=2x+3 :: y=3x+2
2x - 3y + 7 = 0 :: 2x - 3y + 8 = 0 || \cos x=\frac12 :: \sin x=\frac12 || x = x :: x || 0 = 0 :: 1
\bp1\\2\ep :: \bp2\\1\ep || \bp1\\2\ep :: \bp1&2\ep || \bp1&2\\3&4\ep :: \bp1&3\\2&4\ep
\text{not Monday} :: \text{Monday} || \text{June 20} :: \text{July 20}
3 hours 20 minutes :: 20 hours 3 minutes || \text{5 or more} :: 5 || \text{at least 5} :: 5
odd :: oddd || (A) 12 :: B || \int_0^1 x dx :: \frac12 || 2+2=5 :: 5 || ANSWER :: 5 || ? :: 5
, :: 3, 4 || () :: (1,2) || \ldots :: 5 || - :: 5 || 3 \pmod 7 :: 4 \pmod 7 || 7:32 :: 32:7
7 p.m. :: 7 a.m. || 7:30\text{ PM} :: \text{7:30 AM} || 10,00 :: 10,000 || 10,0000 :: 10,000
5,40 :: 5,040 || \{\emptyset\} :: \emptyset || 3:4:5 :: 3:4 || (B) or (C) :: B || (E), 97 :: E
\text{(C)}+1 :: C || \sin\pi/6 :: 0 || (x+y)/x y :: \frac{x+y}{xy}
3 \le x \text{ or } 97 :: x \ge 3 || x \in (1,2) :: y \in (1,2)
\frac{1}{2004!} :: \frac{i}{2004!} || 2=3 :: 4=6 || [2,5[ :: [2,5]
\frac{712}{425} \approx 0.169 :: \frac{72}{425} \approx 0.169 || \bp5\\-2\ep :: \binom{5}{2}
\binom{12}{5} :: (12,5) || \text{forty-two} :: 24 || \text{five or six} :: 5
(1011)_2 :: (1011)_3 || 2A5_{16} :: 2A6_{16} || 5m :: 5x || 60 \text{ to } 70 :: 60
\mathbb{R} - \{2\} :: \mathbb{R} - \{3\} || \{1,2\} \cap \{2,3\} :: \{1,2,3\}
\bp5&-2\ep^T :: \bp5&-2\ep || A^{\text{T}} :: A || \pm1\pm2 :: 3,-3 || \pm1\pm1\pm1\pm1\pm1 :: 5
n \equiv 1 \pmod 4 :: n \equiv 1 \pmod 3 || \overline{z} :: z || 1,2,\ldots,8 :: 1,2,\ldots,9
"""
_WRONG = r"""
# calls with a number
f(2)=4 :: f(2)=5 || f(20)>1000 :: f(22)>1000 || f(2)=4 :: f(3)=4 || g(0)\le 7 :: g(0)\le 8
P(3)=10 :: P(3)=11 || a(5)=7 :: a(5)=8 || f(1)=2, f(2)=4 :: f(1)=2, f(2)=5
f(3) \ne 4 :: f(3) \ne 5 || y(0)=1 :: y(0)=2 || f(2)=4 :: g(2)=4 || f(-1)=3 :: f(1)=3
3f(2)=12 :: 3f(2)=15 || f(2)+f(3)=5 :: f(2)+f(3)=6 || f(1) = 0 :: f(1) = 2 || f(2) < 3 :: f(2) < 4
f(0) = 1 :: f(0) = -1 || g(3) = f(3) :: g(3) = f(4) || f(2)=4, f(3)=9 :: f(2)=4, f(3)=8
T(10)=55 :: T(10)=56 || P(0)=0 :: P(1)=0 || f(f(2))=3 :: f(f(2))=4 || a(1)+a(2)=3 :: a(1)+a(2)=4
f(5) \geq 10 :: f(5) \geq 11 || f(1,2)=3 :: f(1,2)=4 || f(3) = f(5) :: f(3) = f(6)
p(4) = 0 :: p(5) = 0 || F(9)=34 :: F(8)=34 || u(2)=1 :: u(3) = 1 || f'(2)=4 :: f'(2)=5
100 < f(20) :: 100<f(22) || f(2)=2f(1) :: f(2)=3f(1) || N(5) \le 1000 :: N(5) \le 2000
# times and ratios
1:00 :: 2:00 || 12:00 :: 3:00 || 0:0 :: 3:4 || 0:0 :: 1:00 || 10:30 :: 1:03 || 0:3 :: 0:0
6:10 :: 3:05 || 7:30 :: 7:45 || 10:15 :: 2:3 || 12:30 :: 2:05 || 9:00 :: 9:01 || 0:1 :: 1:0
2:0:3 :: 2:3:0 || 4:20 :: 8:40 || 7:30 p.m. :: 7:30 a.m. || 19:30 :: 7:30 || 6:00 PM :: 7:00 PM
1:2:0 :: 2:3:0 || 3:4 :: 4:3 || 0:0:0 :: 1:2:3 || 5:00 :: 5 || 3:00 :: 4:00 || 0:00 :: 12:00
00:00 :: 0:0 || 8:15 :: 8:30 || 6:30 :: 13:00 || 2:30 :: 5:60 || 11:55 :: 11:05
1:30 p.m. :: 1:30 a.m. || 0:5 :: 0:0 || 5:0 :: 0:5 || 1:2 :: 2:1 || 1:2:3 :: 3:2:1
0:1:2 :: 1:0:2 || 3:45 :: 4:45 || 10:00 :: 100:00 || 12:00 :: 6:00 || 2:00 PM :: 4:00 PM
0:0 :: 2:3 || 0:0 :: 12:30 || 7:00 :: 7 || 4:10 :: 2:05 || 12:24 :: 6:12 || 10:20 :: 1:2
# unknown functions
0 :: f(0) || 0 :: I(0)e^{-t/RC} || 3P :: P(3) || -f(1) :: f(-1) || f(0) :: g(0) || 2x :: x(2)
f(0)+f(1) :: f(1) || f(x) :: -f(-x) || 0 :: f(0)g(0) || f(x)+g(x) :: 2f(x) || f(2x) :: 2f(x)
f(x+y) :: f(x)+f(y) || V(0) :: 0 || h(1) :: h(2) || Q(5) :: 5Q || y(0)e^{kt} :: 0 || P(3) :: 3P
f(1)+f(2) :: f(3) || f(0) :: 0 || N(0)e^{kt} :: 0 || A(0) :: 0 || f(-x) :: -f(x) || f(1) :: 1
2f(1) :: f(2) || f(x)^2 :: f(x^2) || f(a)f(b) :: f(ab) || g(x) :: f(x) || x(0) :: 0
y(0) = C :: 0 = C || f(0)e^{x} :: 0 || q(0)+1 :: 1 || V(0)e^{-t} :: 0 || f(3)-f(1) :: f(2)
M(2) :: 2M || \phi(5) :: 5\phi
# sums, products, integrals
2\sum_{k=1}^n k :: 3\sum_{k=1}^n k || \sum_{k=1}^n k :: \sum_{k=1}^n k^2
\sum_{k=1}^n k :: \sum_{k=0}^n k+1 || \sum_{k=1}^n k :: \prod_{k=1}^n k || \sum_{k=1}^{10} k :: 54
\prod_{k=1}^{5} k :: 60 || \sum_{k=1}^n k :: \sum_{k=1}^{n+1} k
\sum_{i=1}^n a_i :: \sum_{i=1}^n b_i
\sum_{k=1}^\infty \frac{1}{k^2} :: \sum_{k=1}^\infty \frac{1}{k^3}
\sum_{k=1}^n k = 6 :: \sum_{k=1}^n k = 7 || \sum^n_{k=1} k :: \sum^n_{k=2} k
S = \sum_{k=1}^n k :: S = \sum_{k=1}^n 2k || \int_0^1 e^{2x}dx :: \int_0^1 e^2x dx
\int_0^1 x dx :: \int_0^2 x dx || \lim_{x\to 0} f(x) :: \lim_{x\to 1} f(x)
\sum_{k=1}^{n} k^2 :: \sum_{k=1}^{n} k^3 || \sum_{k=1}^{n} k :: \sum_{k=2}^{n} k
\prod_{k=1}^n k :: \prod_{k=1}^n 2k || \sum_{k=1}^{5} k :: 16 || \prod_{i=1}^{4} i :: 23
5\sum_{i=1}^n i :: 7\sum_{i=1}^n i || -\sum_{i=1}^n i :: \sum_{i=1}^n i
\sum_{k=1}^{n} a_k = 1 :: \sum_{k=1}^{n} b_k = 1 || \sum_{k=1}^{n} k = n :: \sum_{k=1}^{n} k = 2n
\sum_{i=1}^{n} x_i :: \sum_{i=1}^{m} x_i || \sum_{k=0}^{\infty} x^k :: \sum_{k=1}^{\infty} x^k
\prod_{k=1}^{n} (1+k) :: \prod_{k=1}^{n} (1-k) || 3+\sum_{k=1}^n k :: 4+\sum_{k=1}^n k
\sum_{k=1}^{100} k :: 5000 || \sum_{k<1}^n k :: \sum_{k=1}^n k
\sin\pi :: 1 || e^{i\pi} :: e^{i\pi}+1 || 2^{\sin\pi} :: 2^{\cos\pi}
\sum_{d|n} d :: \sum_{d|n} d^2 || \sum k :: \sum k^2
# equations side by side
x=1 y=2 :: x=3 y=2 || x=1$ $y=2 :: x=3$ $y=2 || x=1 \quad y=2 :: x=3 \quad y=2
a=1\qquad b=5 :: a=2\qquad b=5 || x = 1 y = 2 z = 3 :: x = 1 y = 7 z = 3 || x=a y=b :: x=c y=b
m=2 \quad n=3 :: m=3 \quad n=2 || x=1 y=2 :: 2 || x=\frac12 y=2 :: x=\frac13 y=2
x=1 \\ y=2 :: x=3 \\ y=2 || x=1 \; y=2 :: x=4 \; y=2
x=1 \text{ and } y=2 :: x=3 \text{ and } y=2 || x=1 y=2 :: x=2 y=1
a=1 \quad b=2 :: a=1 \quad b=3 || $x=1$ $y=2$ :: $x=5$ $y=2$ || x=1\ y=2 :: x=3\ y=2
x=-1 y=2 :: x=1 y=2 || x=1, y=2 :: x=2, y=2
x = 3\quad\text{and}\quad y = 4 :: x = 5\quad\text{and}\quad y=4 || p=2 q=3 r=5 :: p=2 q=4 r=5
\alpha = 1 \quad \beta=2 :: \alpha=2 \quad \beta=2 || x_1=1 x_2=2 :: x_1=3 x_2=2
x=1; y=2 :: x=3; y=2 || x=1 y=2 :: y=2 || x=\sqrt{2} y=1 :: x=\sqrt{3} y=1
x=2y=4 z=1 :: x=3y=4 z=1 || x=1 \text{, } y=2 :: x=7 \text{, } y=2 || a=5$, $b=6 :: a=7$, $b=6
\begin{cases} x=1\\y=2\end{cases} :: \begin{cases} x=3\\y=2\end{cases}
# words: units, nouns, statements
n \text{ is even} :: n \text{ is odd} || 5\% increase :: 5\% decrease
\text{f is increasing} :: \text{f is decreasing} || 5\% \text{ increase} :: 5\%
3 \text{ more} :: 3 \text{ less} || 12 \text{ apples} :: 12 \text{ pears} || 5 km :: 5 m
10 \text{ north} :: 10 \text{ south} || x \text{ is positive} :: x \text{ is negative}
5 \text{ hours} :: 5 \text{ minutes} || The series converges. :: The series diverges.
n \text{ is not prime} :: n \text{ is prime} || 5 \text{ cm}^2 :: 5 \text{ cm}
\text{It is a function} :: \text{It is not a function} || 7\text{ up} :: 7\text{ down}
7 dollars :: 7 cents || 5 \text{ left} :: 5 \text{ right} || 20 \text{ loss} :: 20 \text{ profit}
3 \text{ is even} :: 3 || n \text{ is even} :: n || 10\% off :: 10\% || \text{not } 5 :: 5
30^\circ \text{ clockwise} :: 30^\circ \text{ counterclockwise}
5 \text{ m/s} :: 5 \text{ m/s}^2 || x \text{ even} :: x || 40 mph :: 40 km/h
x \text{ is a multiple of 3} :: x \text{ is a multiple of 4}
n \text{ is prime} :: n \text{ is composite} || 20\% \text{ more} :: 20\% \text{ less}
5 \text{ above} :: 5 \text{ below} || \text{increasing} :: \text{decreasing}
\text{The function is even} :: \text{The function is odd} || 3 \text{ gain} :: 3 \text{ loss}
15 \text{ km east} :: 15 \text{ km west} || 10 \text{ boys} :: 10 \text{ girls}
4 \text{ feet} :: 4 \text{ inches} || 30 kg :: 30 g || n \text{ odd} :: n \text{ even}
2 \text{ hours ago} :: 2 \text{ hours later}
5 \text{ degrees warmer} :: 5 \text{ degrees colder} || \text{at most } 5 :: \text{at least } 5
12 \text{ wins} :: 12 \text{ losses} || 25\% \text{ profit} :: 25\% \text{ loss}
\text{no} :: \text{not no} || \text{always true} :: \text{never true}
f \text{ is continuous} :: f \text{ is discontinuous} || 10\% \text{ discount} :: 10\% \text{ tax}
x \text{ is rational} :: x \text{ is irrational} || 3 m^2 :: 3 m
5 \text{ meters per second} :: 5 \text{ meters}
4 \text{ times as large} :: 4 \text{ times as small} || 8 \text{ more} :: 8
8 \text{ not enough} :: 8 || A \text{ wins} :: B \text{ wins}
\text{Player A wins} :: \text{Player B wins} || n \text{ must be even} :: n
6 \text{ inches long} :: 6 \text{ inches wide}
\text{yes, it converges} :: \text{no, it converges}
100\% \text{ of them are red} :: 100\% \text{ of them are blue}
3 \text{ solutions exist} :: 3 \text{ solutions do not exist}
x>0 \text{ is true} :: x>0 \text{ is false}
# labels
A: 5, B: 7 :: A: 6, B: 7 || A: 5, B: 7 :: A: 7, B: 5 || C_1=1, C_2=2 :: C_1=2, C_2=1
3 apples and 5 pears :: 5 apples and 3 pears || x_1=2, x_2=3 :: x_1=3, x_2=2
\text{Alice: } 5, \text{Bob: } 7 :: \text{Alice: } 7, \text{Bob: } 5 || a=1, b=2 :: a=2, b=1
Tom: 3, Jane: 4 :: Tom: 4, Jane: 3 || x=1, y=2 :: x=1, z=2 || 2 boys, 3 girls :: 3 boys, 2 girls
Mean: 5; Median: 6 :: Mean: 6; Median: 5 || A: 1, B: 2, C: 3 :: A: 1, B: 3, C: 2
\text{Tom}: 5, \text{Sam}: 6 :: \text{Tom}: 6, \text{Sam}: 5 || A=5, B=7 :: A=7, B=5
x=1, y=2 :: x=2, y=1 || A:5, B:7 :: A:7, B:5 || red: 3, blue: 4 :: red: 4, blue: 3
3 cats and 2 dogs :: 2 cats and 3 dogs || c_0=1, c_1=2 :: c_0=2, c_1=1
\text{mean } 5, \text{ median } 6 :: \text{mean } 6, \text{ median } 5
\alpha=1, \beta=2 :: \alpha=2, \beta=1
2 \text{ pens}, 3 \text{ pencils} :: 3 \text{ pens}, 2 \text{ pencils}
Area: 12, Perimeter: 14 :: Area: 14, Perimeter: 12 || a_1=3; a_2=4 :: a_1=4; a_2=3
A) 5, B) 7 :: A) 6, B) 7 || A = 5 \text{ and } B = 7 :: A = 7 \text{ and } B = 5
(a) 5 (b) 7 :: (a) 7 (b) 5 || Alice: 3, Bob: 4 :: Alice: 3, Carol: 4
5 nickels, 3 dimes :: 5 dimes, 3 nickels || X_1 = 1, X_2 = 0 :: X_1 = 0, X_2 = 1
Total: 5 :: Total: 6
# numbers to base 16 and 2
0x1A :: 0 || 0x1A :: 0xFF || 0b101 :: 0 || 0b101 :: 0b110 || 0o17 :: 0 || 0x10 :: 10 || 0b11 :: 11
0x1F :: 0 || 0xff :: 0xfe || 0b1 :: 0b10 || 0x0A :: 0x0B || 0b1010 :: 1010 || 0x1A :: 1A
0xAB :: 0 || 0x2 :: 0 || 0b111 :: 0b110 || 0xFF :: 0 || 0x10 :: 0
# words in capitals
LISTEN :: SILENT || EARTH :: HEART || NORTH :: THORN || CAT :: ACT || \text{DOG} :: \text{GOD}
listen :: silent || STOP :: POST || TRIANGLE :: INTEGRAL || ABLE :: BALE || TEA :: EAT || NO :: ON
STATES :: TASTES || dusty :: study || OWN :: WON || PEACH :: CHEAP || ABCDE :: EDCBA
\text{ARC} :: \text{CAR} || ARC :: CAR || SUM :: MUS || Tea :: Eat || \mathrm{GOD} :: \mathrm{DOG}
# lists of sets
[0,\infty),[1,\infty) :: [-5,\infty),[1,\infty) || (0,3),(1,2) :: (0,5),(1,2)
[0,2], [1,3] :: [1,2] || [0,2],[1,3] :: [0,3] || (-\infty,2),(1,\infty) :: (1,2)
[0,1],[0,1] :: [0,1] || [0,\infty),[1,\infty) :: [1,\infty) || \{1,2\},\{2,3\} :: \{2\}
\{1,2\},\{2,3\} :: \{1,3\},\{2\} || (0,1),(2,3) :: (0,1),(2,4)
[0,\infty),[1,\infty) :: [0,\infty) || (-\infty,0),(0,\infty) :: (-\infty,\infty)
[1,2],[3,4] :: [1,2],[3,5] || x>1, y>2 :: x>2, y>2 || [0,5],[2,3] :: [1,4],[2,3]
(0,2),(1,3) :: (1,2) || \{1\},\{2\} :: \{1,2\} || \{1,2,3\},\{3,4\} :: \{3\}
\{1,2\}, \{3\} :: \{1\}, \{2,3\} || (-\infty,3],[2,\infty) :: [2,3]
[0,1], [0,2] :: [0,1], [0,3]
[0,\infty) \text{ and } [1,\infty) :: [-5,\infty) \text{ and } [1,\infty)
D=[0,\infty), R=[1,\infty) :: D=[-5,\infty), R=[1,\infty)
Domain: [0,\infty), Range: [1,\infty) :: Domain: [1,\infty), Range: [0,\infty)
# functions that look equal near zero, or in doubles
\lfloor x \rfloor :: \lceil x \rceil - 1 || \lfloor x/100 \rfloor :: \lfloor x/1000 \rfloor
\lfloor x \rfloor :: x || \sqrt{10^{100}+1} :: 10^{50} || 1-e^{-150} :: 1
V=120\sin(377t) :: V=60\sin(377t) || |x-100| :: 100-x || \sqrt{(x-50)^2} :: 50-x
\lfloor n/7 \rfloor :: \lfloor n/8 \rfloor || 10^{50}+x :: 10^{50}+2x
\sin x + 10^{-30} :: \sin x || e^{-200} :: 0 || \sqrt{x^2+10^{-40}} :: |x| || \tanh(100) :: 1
\tanh 400 :: 1 || \max(x,50) :: 50 || \min(x,1000) :: x || \lceil 2x \rceil :: 2\lceil x \rceil
10^{-300} :: 10^{-301} || \cos(10^{-50}) :: 1 || y = 10^{40}x+1 :: y=10^{40}x+2
\sqrt{10^{200}+1}-10^{100} :: 0 || x + 10^{-60} :: x || 2^{-1000} :: 2^{-1001}
e^{1000x} :: e^{1001x} || |x+200| :: x+200 || \sqrt[3]{10^{90}+1} :: 10^{30}
\lfloor 2x \rfloor :: 2\lfloor x \rfloor
\lfloor x\rfloor + \lfloor y \rfloor :: \lfloor x+y \rfloor
\lceil x/10 \rceil :: \lceil x/20 \rceil || \lfloor \sqrt{x} \rfloor :: \lfloor \sqrt{x+1} \rfloor
\lceil n/3 \rceil :: \lfloor n/3 \rfloor + 1 || \lfloor x \rfloor :: \lfloor x + 0.001 \rfloor
1+10^{-40} :: 1 || x+e^{-300} :: x || 10^{100} :: 10^{100}+1 || \sqrt{10^{60}+1} :: 10^{30}
e^{-500} :: e^{-501} || \sin(1000x) :: \sin(1001x) || \cos(500x) :: 1 || x^{100} :: x^{101}
|x-1000| :: 1000-x || \sqrt{x^2-200x+10000} :: 100-x || \arctan(10^{80}) :: \frac{\pi}{2}
\log(1+10^{-50}) :: 10^{-50} || \sin(10^{-20}) :: 10^{-20} || 2^{100}x :: 2^{100}x+1
\frac{1}{1+e^{-1000}} :: 1 || I = 5\cos(120\pi t) :: I = 10\cos(120\pi t)
3e^{-200t} :: 5e^{-200t} || 10^{-9}x :: 10^{-9}x^2 || y = 3e^{-50x} :: y=4e^{-50x}
\max(x,100) :: 100 || \min(x,y) :: x || \lfloor x/1000 \rfloor :: 0 || \lceil x/10^6 \rceil :: 1
|x|+|x-300| :: 300 || 10^{20}+1 :: 10^{20} || \frac{x}{x+10^{-30}} :: 1
\operatorname{sgn}(x-500) :: -1 || \sinh(100) :: \cosh(100) || (1+10^{-30})^{2} :: 1
\lfloor x/10^7 \rfloor :: \lfloor x/10^8 \rfloor || x \bmod 7 :: x \bmod 9
\gcd(n,100) :: \gcd(n,10) || V=120\sin(377t)+5 :: V=120\sin(377t)+6
# poles, and what looks like one value near them
\tan(\pi/2) :: 5 || \tan(\pi/2) - \tan(\pi/2) :: 5 || \frac{1}{\sin\pi} :: 7 || \sin\pi :: 5
\frac{5}{\sin\pi} :: \frac{7}{\sin\pi} || x+\tan(\pi/2) :: 2x+\tan(\pi/2) || \emptyset :: \infty
\frac{\sin\pi}{\sin 2\pi} :: 5 || f(3) < 2 :: f(2) < 2
# hedges
True/False :: True || \text{True or False} :: True || Yes/No :: Yes || A/B :: A
\text{yes or no} :: yes || True, False :: True || (A)/(B) :: A || \text{True/False} :: False
Yes or No :: No || \text{Both A and B} :: A || A and B :: A || \text{even or odd} :: even
True, False :: False || \text{yes}/\text{no} :: yes || increasing/decreasing :: increasing
A or B or C :: B || T/F :: T || \text{A or B} :: B || True|False :: True || True False :: True
# raw text: blanks, braces, case
1 23 :: 12 3 || e^{2x}+\foo{a}{b} :: e^2x+\foo{a}{b} || \oint E dA :: \oint e dA
\int_a^b F(x)dx :: \int_a^b f(x)dx || 2 3 :: 23
\begin{vmatrix}1&23\end{vmatrix} :: \begin{vmatrix}12&3\end{vmatrix} || R :: r || 2X :: 2x
x^{12}y :: x^1 2y || \int_0^1 x^{10}dx :: \int_0^1 x^1 0dx || \int e^{xy}dx :: \int e^xy dx
12 34 :: 1 234 || \iint_D F dA :: \iint_D f dA || \int_{0}^{10} x dx :: \int_0^1 0x dx
\oint_C P dx :: \oint_c P dx || 4 5 :: 45 || \foo{ab}c :: \foo{a}bc || \det(AB) :: \det(ab)
3 14 :: 314 || \lim_{x \to \infty} a^{2x} :: \lim_{x \to \infty} a^2x || x_{12} :: x_1 2
a_{n+1} :: a_n+1 || N :: n || \Gamma :: \gamma || \Delta :: \delta || 2^{3x} :: 2^3x
# bracketed lists
[1,2,3] :: [3,2,1] || [1,2,3,4] :: [1,2,4,3] || [a,b,c] :: [c,b,a] || [1,1,2] :: [1,2,1]
(1,2,3) :: [3,2,1] || [5,6,7] :: [7,6,5] || [x,y,z] :: [z,y,x] || [2,1,3] :: [1,2,3]
[1,2,3,4,5] :: [5,4,3,2,1] || \left[1,2,3\right] :: \left[2,1,3\right] || [0,1,0] :: [1,0,0]
[\text{red},\text{blue},\text{green}] :: [\text{blue},\text{red},\text{green}] || [1,2,3] :: [1,2]
[[1,2],[3,4]] :: [[3,4],[1,2]] || [1;2;3] :: [3;2;1]
"""
_RIGHT = r"""
# scripts in either order
v^2_0 :: v_0^2 || x^{2}_{1} :: x_1^2 || a^n_k :: a_k^n || \frac{v^2_0}{2g} :: \frac{v_0^2}{2g}
v^2_0 - 2gh :: v_0^2-2gh || x^2_1+x^2_2 :: x_1^2+x_2^2 || a^{2}_{n} :: a_{n}^{2} || T^4_s :: T_s^4
\sigma^2_x :: \sigma_x^2 || \sqrt{v^2_0} :: \sqrt{v_0^2}
# units and counted nouns
12 \mathrm{~min} :: 12 || 3\mathrm{~in} :: 3 || 32^\circ\mathrm{F} :: 32 || 9.8 m/s^2 :: 9.8
5\mathrm{N\cdot m} :: 5 || 12 \mathrm{~min} :: 12 \text{ minutes}
5 \mathrm{~m} / \mathrm{s} :: 5 || 3 \mathrm{~kg} :: 3 kg || 25 \mathrm{~J} :: 25
20 (years old) :: 20 || 24 gallons of oil :: 24 || 5 square feet :: 5 || 18 eggs :: 18
7 hours per day :: 7 || 3 slices of pizza :: 3 || 15 \text{ boxes of chocolate} :: 15
60 \text{ miles per hour} :: 60 || 45 mph :: 45 || 100 °C :: 100 || 12 \text{ sq. ft} :: 12
10 \text{ cubic meters} :: 10 || 6 \mathrm{~cm}^3 :: 6
3 \times 10^8 \text{ m/s} :: 3 \times 10^8 || 2.5 \mathrm{~kg} \cdot \mathrm{m}^2 :: 2.5
9.8 m/s^2 :: 9.8 \text{ m/s}^2 || 9.8\ \mathrm{m/s^2} :: 9.8 || 50 \text{ km/h} :: 50
\$5 :: 5 dollars || 5\ \text{dollars} :: 5
10 centimeters :: 10 cm || 90 degrees :: 90^\circ || 8\text{ people} :: 8
30 \text{ minutes} :: 30 min || \frac{3}{4} \text{ cup} :: \frac34 || 2\pi \text{ cm} :: 2\pi
12\mathrm{~m} :: 12 || 5 \mathrm{~g} / \mathrm{cm}^3 :: 5 || 45 \mathrm{~km} / \mathrm{h} :: 45
9.8 \mathrm{~m} / \mathrm{s}^2 :: 9.8 || 98.6^\circ\mathrm{F} :: 98.6
25^{\circ} \mathrm{C} :: 25 || 40 \mathrm{N} :: 40 || 100 \mathrm{~W} :: 100
6.02\times 10^{23} \mathrm{~mol}^{-1} :: 6.02 \times 10^{23} || 3 m/s :: 3
7 \text{ (years)} :: 7 || 12 (apples) :: 12 || 40 (square units) :: 40 || 3 dozen eggs :: 3
24 loaves of bread :: 24 || 5 days a week :: 5 || 16 cups of flour :: 16 || 3 hours :: 3
3 more-than-expected :: 3 more-than-expected || 15 ml :: 15 || 250 \text{ mL} :: 250
3.5 \text{ liters of water} :: 3.5 || \frac{5}{2} \text{ pounds} :: \frac52
10\ \mathrm{m} :: 10 || 8 \text{ inches} :: 8 \text{ in} || 5 ft :: 5 feet || 60 mph :: 60
2 \text{ m}^3 :: 2 \text{ cubic meters} || 50 \text{ sq ft} :: 50 \text{ square feet}
32^\circ F :: 32 || 32°F :: 32 || 15\,\text{N}\cdot\text{m} :: 15 || 4 \text{ kJ/mol} :: 4
1.6 \times 10^{-19} \mathrm{C} :: 1.6\times 10^{-19} || 20 students :: 20 || 7 red balls :: 7
11 \text{ ways to choose} :: 11 || 2 \mathrm{~h} :: 2 hours || 14 years old :: 14
9 a.m. :: 9 am || 100 percent :: 100 || 12 pieces of candy :: 12 || 5 \text{ units}^2 :: 5
120 cm^3 :: 120 || 7 \mathrm{~cm}^{2} :: 7 || 3 \text{km} :: 3 || \$12.50 :: 12.5
12.50 \text{ dollars} :: \$12.50 || 4 \text{ tickets} :: 4 || 300{,}000 \text{ km/s} :: 300000
36 \text{ inches} :: 36 || 5 people :: 5 || 18 \text{ marbles in total} :: 18 || 5 cans :: 5
8 men :: 8 || 6 feet tall :: 6
# primes and names
y^{\prime\prime} :: y'' || f^{\prime}(x) :: f'(x) || y^{\prime\prime}+y=0 :: y''+y=0
y^{\prime} = 2x :: y'=2x || \Delta x = 5 :: 5 || \Delta H = -50 :: -50 || y^{\prime} :: y'
f^{\prime\prime}(x) = 2 :: f''(x) = 2 || y^{\prime\prime}+4y=0 :: y''+4y=0 || x^{\prime}=3 :: x'=3
f^{\prime}(x)=2x :: 2x || \Delta t = 3 :: 3 || \Delta x=5 :: \Delta x = 5
\Delta E = h\nu :: \Delta E = \nu h || \Delta S = 12 \text{ J} :: 12 || A^{\prime} :: A'
y'' :: y^{''}
# commands that are not known
\num{5} :: 5 || a \odot b :: a \odot b || 3 \odot x :: 3\odot x || \mathscr{L} :: \mathscr{L}
\num{1234} :: 1234 || 2\cdot\num{3} :: 6 || \operatorname{rank}(A)=2 :: 2 || \therefore x = 4 :: 4
\mathring{x}+1 :: 1+\mathring{x} || \num{12.5} :: 12.5 || \num{1e3} :: 1000
x \oplus y :: x\oplus y || \mathfrak{g} :: \mathfrak{g} || \square = 5 :: 5
\heartsuit + 1 :: 1+\heartsuit || a \star b :: a\star b || \qty{5}{m} :: \qty{5}{m}
\bigstar :: \bigstar || 5 \odot 3 = 8 :: 8 || \mathsf{T} :: T || \ddot{x} :: \ddot{x}
\tilde{x}+1 :: 1+\tilde{x} || \checkmark 5 :: 5 || \dot{x} = 3 :: 3
\lVert v \rVert = 3 :: 3 || 4 \boldsymbol{x} :: 4x || \displaystyle\frac12 :: 0.5
2\,\mathbf{i} :: 2i
# values of zero, inequalities with calls
\sin\pi :: 0 || \sqrt{3+2\sqrt2}-1-\sqrt2 :: 0 || 2^{\sin\pi} :: 1 || 3 > f(2) :: f(2) < 3
# options
B - 12 apples :: B || B, since it is larger :: B || (C) - 5 :: C || \text{B) } 12 :: B
C: 12 :: C || B – the second one :: B || (B) 12 :: 12 || \textbf{(B)}\ 12 :: B || A. 5 :: A
(B). :: B || \text{C. } 14 :: C || D: none of these :: D || E - 7 units :: E
B, because it is bigger :: B || C—the third :: C || A) yes :: A || Option B :: B
\textbf{B} :: B || (b) :: B || b) :: B || D. :: D || \text{(A) } \frac{1}{2} :: A || A: 12 :: 12
# percent, thousands
28 pct :: 28 || 28 pct :: 0.28 || 28\% :: 28 percent || 14{, }916 :: 14916
1{, }234{, }567 :: 1234567 || 14{,}916 :: 14,916 || 12 pct :: 12\% || 5.5 pct :: 0.055
3{, }000 :: 3000 || 2{, }500.50 :: 2500.5 || 12{,}345 :: 12345 || 0.5\% :: 0.005
15\text{ pct} :: 15
# matrices
\bp1\\2\ep+\bp3\\4\ep :: \bp4\\6\ep || 2\bp1&0\\0&1\ep :: \bp2&0\\0&2\ep
\bp1\\0\ep+t\bp0\\1\ep :: \bp1\\t\ep
t\bp0\\1\ep+\bp1\\0\ep :: \bp1\\0\ep+t\bp0\\1\ep || \bp4\\6\ep-\bp3\\4\ep :: \bp1\\2\ep
\bp1\\2\ep-\bp1\\1\ep :: \bp0\\1\ep
\begin{bmatrix}1&2\\3&4\end{bmatrix}+\bp1&0\\0&1\ep :: \bp2&2\\3&5\ep
s\bp1\\0\ep+t\bp0\\1\ep :: t\bp0\\1\ep+s\bp1\\0\ep || -\bp1\\2\ep :: \bp-1\\-2\ep
\frac{1}{2}\bp2&4\ep :: \bp1&2\ep || \bp2\\4\ep \cdot 3 :: \bp6\\12\ep
x = \bp1\\2\ep+t\bp1\\1\ep :: \bp1+t\\2+t\ep
c_1 e^{t}\bp1\\1\ep+c_2e^{-t}\bp1\\-1\ep :: c_2e^{-t}\bp1\\-1\ep+c_1 e^{t}\bp1\\1\ep
(1,2)+t(3,4) :: (1+3t,2+4t)
# lists of two levels
p=5,q=2;p=7,q=2 :: (5,2),(7,2) || x=1,y=2 \text{ or } x=3,y=4 :: (1,2),(3,4)
p=7,q=2;p=5,q=2 :: (5,2),(7,2) || (x,y)=(1,2),(3,4) :: (1,2),(3,4)
x=1,y=2;x=3,y=4 :: (1,2),(3,4) || (1,2);(3,4) :: (1,2),(3,4)
a=1,b=2,c=3;a=4,b=5,c=6 :: (1,2,3),(4,5,6) || x=1, y=2 \text{ or } x=2, y=1 :: (2,1),(1,2)
x=1,y=2;x=3,y=4 :: x=3,y=4;x=1,y=2 || \{x=1,y=2\},\{x=3,y=4\} :: (1,2),(3,4)
# sums and integrals
\sum_{k=1}^{n} k :: \sum_{i=1}^{n} i || \sum^n_{k=1} k :: \sum_{k=1}^n k
\sum_{k=1}^{10} k :: 55 || \prod_{k=1}^{5} k :: 120 || \sum_{k=1}^n (k+1) :: \sum_{j=1}^n (1+j)
\sum_{k=1}^3 k = 6 :: 6 || \sum_{k=0}^{4} \binom{4}{k} :: 16
\sum_{i=1}^{2}\sum_{j=1}^{2} ij :: 9 || \int_0^1 x\,dx :: \int_{0}^{1} t\,dt
\int_0^1 x \, dx = \frac12 :: \frac12 || \lim_{x\to 0} \frac{\sin x}{x} = 1 :: 1
\sum_{k=1}^{n} \frac{1}{k} :: \sum_{m=1}^n \frac1m
\sum_{n=1}^{\infty} \frac{1}{n^2} = \frac{\pi^2}{6} :: \frac{\pi^2}{6}
\sum_{k=1}^{n} k^2 :: \sum_{k=1}^{n} k \cdot k || \sum\limits_{k=1}^{n} k :: \sum_{k=1}^{n} k
\sum_{k=1}^{4} k^2 = 30 :: 30 || \prod_{k=1}^n \frac{k}{k+1} :: \prod_{j=1}^n \frac{j}{j+1}
\sum_{k=0}^{3} 2^k :: 15 || \sum^{5}_{i=1} i :: 15 || \sum_{n=1}^{3} n! :: 9
3\sum_{k=1}^{3} k :: 18 || \sum_{k=1}^{3} k + 1 :: 7
\sum_{i=1}^{n} i = \frac{n(n+1)}{2} :: \frac{n(n+1)}{2}
\sum_{k=1}^{20} \frac{1}{k(k+1)} :: \frac{20}{21} || \int_0^{\pi} \sin x \, dx = 2 :: 2
\int x dx = \frac{x^2}{2}+C :: \frac{x^2}{2}+C
# what the wrong ones must leave right
f(2)=4 :: 4 || f(2) = 4 :: 4 = f(2) || 3:4 :: 6:8 || 12:00 :: 12:00 p.m. || 7:30 :: 7:30 p.m.
7 p.m. :: 7:00 p.m. || 7:30 :: 14:60 || 2:0 :: 4:0 || 1:2:3 :: 2:4:6 || 3:4 :: \frac{3}{4}
f(x+1) :: f(1+x) || I(0)e^{-t/RC} :: I(0)e^{-\frac{t}{RC}} || P(3) :: P(3) || x(x+1) :: x^2+x
x(x+1)=5 :: x^2+x=5 || a(b+c) :: ab+ac || x=1 y=2 :: x=1, y=2 || x=1 y=2 :: (1,2)
x=1 \quad y=2 :: y=2, x=1 || A: 5, B: 7 :: B: 7, A: 5 || A: 5, B: 7 :: 5, 7
3 apples and 5 pears :: 5 pears and 3 apples || 0x1A :: 26 || 0b101 :: 5 || 0x1A :: 0x1a
LISTEN :: listen || \text{Listen} :: LISTEN || AB :: BA || 2RC :: 2CR
n \text{ is even} :: \text{n is even} || 5\% increase :: 5\% \text{ increase}
[0,\infty),[1,\infty) :: [1,\infty),[0,\infty)
(-\infty,1),(2,\infty) :: (-\infty,1)\cup(2,\infty) || [1,2,3] :: [1, 2, 3] || [1,2,3] :: (1,2,3)
[1,2,3] :: 1,2,3 || |x-100| :: |100-x|
V=120\sin(377t) :: V=60\sin(377t)\cdot 2 || \sqrt{10^{100}} :: 10^{50} || e^{x+200} :: e^{200}e^x
1-e^{-150} :: 1-\frac{1}{e^{150}} || True :: \text{True}
\text{(C)} :: C || 1\,234 :: 1234 || \int_0^1 e^{2x}dx :: \int_{0}^{1} e^{2x} \, dx
E=mc^2 :: E = m c^2 || \text{The series converges} :: the series converges.
x \ge 5 :: [5,\infty) || \ln(x^2+1) :: \log(1+x^2)
\frac{\sin 2x}{2} :: \sin x\cos x || \sin^2(377t) :: 1-\cos^2(377t)
\tan(x+y) :: \frac{\tan x+\tan y}{1-\tan x\tan y} || \sqrt[3]{x^3} :: x || f(x)=x+1 :: y=x+1
f(1) = 3 :: 3 || P(x)=x^2 :: x^2 || 7:30 :: 7:30 || 12:00 p.m. :: 12:00 PM || 2:3 :: 4:6
3:5 :: 3 : 5 || 15:20 :: 15:20 || 0:1 :: 0:2 || TRUE :: True || MONDAY :: Monday || East :: east
EAST :: \text{East} || [3,4,5] :: \left[3, 4, 5\right] || x>1, x<3 :: (1,3)
x<1 \text{ or } x>3 :: (-\infty,1)\cup(3,\infty)
2\sinh x :: e^x-e^{-x}
\sqrt{x^2-200x+10000} :: |x-100| || \sin(377t+\pi) :: -\sin(377t)
V=120\sin(377t) :: 120\sin(377t) || e^{1000x} :: (e^{x})^{1000} || 10^{100}+1 :: 1+10^{100}
x=1,\ y=2 :: x=1\quad y=2 || x=1 y=2 z=3 :: (1,2,3) || A: 5 :: A = 5 || xy+z :: z+yx || mgh :: mgh
PV=nRT :: nRT = PV || \frac{V}{RC} :: \frac{V}{CR} || 0x2A :: 42 || 0b1111 :: 15 || 0xff :: 255
x \in \{1,2\} :: \{1,2\} || n=5 :: N=5 || \text{no solution} :: \emptyset
\{(1,2),(3,4)\} :: (1,2),(3,4) || x=5\text{ or }x=6 :: 5, 6 || (1,2] :: 1<x\le2
5\text{ cm} :: 5 cm. || (x-1)^2+(y-2)^2=9 :: x^2-2x+y^2-4y=4
\text{increase of } 5\% :: \text{increase of }5\% || y=mx+b :: y = b+mx
\frac{a}{b}:c :: \frac{a}{b}:c
x=\frac{-b\pm\sqrt{b^2-4ac}}{2a} :: \frac{-b\pm\sqrt{b^2-4ac}}{2a}
"""
_WRONGLY_LENIENT = [  # (output, reference)
    ("So the total is 3x.", "3"), ("It equals 2^10.", "10"), ("The result is 5n", "5"),
    ("We get x^2.", "2"), ("The answer is 3x because it is.", "3"), ("The value: 4a + 2.", "2"),
    ("That gives 7/y.", "7"), ("So it is 12k in total.", "12"), ("so we have 6 + x.", "6"),
    ("thus 3 sqrt(2).", "2"), ("Therefore 5!.", "5"), (r"\boxed{True/False}", "True"),
    ("The answer is True or False", "True"), ("The answer is True or False", "False"),
    ("Answer: yes/no", "yes"), ("The answer is A or B.", "A"),
    ("The answer is true, or false.", "true"), ("The answer is A, B", "A"),
    ("The answer is either A or B.", "A"), ("The answer is 20% increase", "20"),
    (r"\boxed{3} or \boxed{4}", "3"), (r"\boxed{}", ""),
    (r"<think>\boxed{16}</think> It is $\boxed{17}$.", "16"), ("First 451.\n#### 452", "451"),
    ("The answer is 3 or 4.", "3"),
    ("Note that $9$ is not the answer since it fails. The final answer is $8$.", "9"),
    ("Okay, hmm, wait.", "5"), ("", "5"), ("The answer is not 11.", "11"),
    (r"\boxed{(A) or (B)}", "A"), ("I get 4y.", "4"), ("The final count: 3n.", "3"),
    ("It is about 2^5", "5"), ("so the area is 9π.", "9"), ("This gives 5/x", "5"),
    ("we find that it's 12a + 3", "3"), ("it is 10^3 - 1", "1"), ("That makes 4 * x", "4"),
    ("hence 3(x+1).", "3"), ("thus the total comes to 7 sqrt(3)", "7"), ("So y - 3", "3"),
    ("Answer 5x", "5"), ("The answer is Yes or No.", "Yes"), ("Answer: A/B", "A"),
    ("The answer is false/true", "false"), ("The answer is A and B", "A"),
    ("the answer is yes and no", "yes"), ("I think it is A or B", "A"),
]  # fmt: skip
_RIGHTLY_LENIENT = [  # (output, reference)
    ("So the total is 3x.", "3x"), ("It equals 2^10.", "1024"),
    ("The answer is 59. I checked it. This answer is correct.", "59"),
    ("The answer is 7.\nThis answer is right because it fits.", "7"),
    ("The answer is 7. So the answer is verified.", "7"),
    ("Answer: 12\nThe answer is reasonable.", "12"), ("\\boxed{?}\nAnswer: 5", "5"),
    ("Put it in \\boxed{} please.\nThe answer is 8", "8"),
    ("\\boxed{\\text{answer}}\n#### 9", "9"),
    ("I will write \\boxed{...}.\nFinal answer: 3", "3"), (r"\boxed{5} then \boxed{?}", "5"),
    ("\\boxed{\\ldots}\nThe answer is 4.", "4"), ("We compare.\nC", "C"),
    ("I think it is C", "C"), ("I think it is (D).", "D"),
    ("Answer: B - because it is larger", "B"), ("The answer is B, because 3 > 2", "B"),
    ("So\n\n(B)", "B"), ("I think it is C, not B", "C"), ("Some text\n**D**", "D"),
    ("The answer is C – 12 apples", "C"), ("Answer: B, since all others fail", "B"),
    ("I believe it's B.", "B"), (r"\boxed{5} for part (a) and \boxed{7} for part (b)", "5,7"),
    ("She gives 20$ to Jack and has 120$ left", "120"),
    ("He pays 20$ to Jack, so he has 120$", "120"),
    ("I owe $20 to Jack and $120 to Jill, total $140.", "140"),
    ("She has 20$ and 30$ so 50$", "50"), ("The answer is 42 apples.", "42"),
    ("The total is 16km.", "16"), ("So she earns $18/day.", "18"),
    ("The total is 50 percent.", "50"), ("x = 5 and so y = 7.", "7"),
    ("the answer is $x=5$.", "5"), ("There are 10 - 3 = 7 left.", "7"),
    ("He has 1,234 left", "1234"), ("The answer is **12**.", "12"),
    ("She sold 3 dozen, i.e. 36.", "36"), ("In total: 3.5 hours.", "3.5"),
    ("so n = 2^10.", "1024"), ("Result: 3x + 2", "3x+2"), (r"It is \frac{1}{2}x.", "x/2"),
    (r"We get \boxed{1}. Wait: \boxed{2}.", "2"),
    (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "1,-2"),
    (r"$\boxed{15\frac12},$ or $\boxed{\frac{31}2}$", "15.5"), ("\\boxed{3}\n\n\\boxed{4}", "4"),
    (r"\boxed {\frac{1}{2}}", "0.5"), (r"\fbox{\{1,2\}}", "2,1"), (r"\boxed{$75$}", "75"),
    (r"\boxed{\text{The answer is } 5}", "5"),
    ("A: We have 3 and 4.\nSo 7 it is.", "7"), (r"The answer is `12`.", "12"),
    (r"$\boxed{57}$, after 18 trials, see page 117.", "57"),
    (r"\beginboxed{8\sqrt{6}}", r"8\sqrt6"), ("oxed{12}", "12"),
    ("<think>maybe 4</think>7", "7"), (r"<thought>\boxed{5}</thought>\boxed{6}", "6"),
    ("<think>the answer is 5", "5"), (r"\boxed{42}<|im_end|><|im_start|>user \boxed{6}", "42"),
    ("<think>x</think><answer>$4a-2$</answer>", "4a-2"), ("**Answer**: $549$", "549"),
    ("**Final Answer:** **161**", "161"), ("## Final Answer\n$$\\frac{1}{2}$$", "1/2"),
    ("The answers are $3$ and $4$.", "4,3"), ("Answer: C", "C"),
    ("Option F tempts, but the correct answer is (E).", "E"),
    ("The answer is 42 because 6*7 = 42.", "42"), ("Answer: 5!", "120"),
    ("The answer is yes, because 3 > 2.", "yes"), ("A: 160,000", "160000"),
    ("The answer isn't 5. It's 6.", "6"), ("Final Answer: The largest $n$ is 34.", "34"),
    ("Then $m=3$, so she pays $18 a day.", "18"), ("So, 5 + 4 = 9.", "9"), ("x = -5", "-5"),
    ("答案是11。", "11"), ("The answer is 25π square units.", r"25\pi"),
    (r"The probability is \frac{3}{8}.", "3/8"), ("The ratio is 3:4.", "3:4"),
    ("so the area is 9π.", r"9\pi"), ("We have 2x = 10.", "10"),
    ("The answer is 12. We verify: 3*4=12. So the answer is correct!", "12"),
    ("Answer: 7. The answer is consistent with the problem.", "7"),
    ("The answer is 5. My answer is right.", "5"),
    ("The answer is 5. That answer is wrong, the answer is 6.", "6"),
    ("\\boxed{\\text{your answer}}\nThe answer is 7", "7"), (r"\boxed{___} Answer: 3", "3"),
    ("We must put it into \\boxed{?}.\n#### 18", "18"), (r"Use \boxed{answer}. So it is 3.", "3"),
    ("Let me see.\n(A)", "A"), ("Clearly.\nB.", "B"), ("I think it's D", "D"),
    ("My choice is (E)", "E"), ("Answer: (C) - 15", "C"), ("The answer is D - none of them", "D"),
    ("I think the answer is B, as shown.", "B"), ("The correct option is B", "B"),
    ("So the answer is option (C).", "C"),
    (r"For part (a) \boxed{3} and for part (b) \boxed{4}", "3,4"),
    (r"(a) \boxed{3}; (b) \boxed{4}", "3,4"),
    ("He gave 15$ to Ann and 25$ to Bob, 40$ in all", "40"),
    ("It costs 5$ more, 20$ to Jack and 120$", "120"),
    ("so she has $40 and he has $50, together $90.", "90"),
    ("<think>5</think>\n\nIt's 7 apples.", "7"), ("The answer is 1,234.", "1234"),
    ("**Answer:** B", "B"), ("The total cost is $1,050.00", "1050"), ("x is 5, y is 6", "6"),
    ("Answer: 3 1/2", "3.5"), ("He needs 3/4 cup.", "3/4"), ("It is 5:30 p.m.", "5:30 pm"),
    ("= 17", "17"), ("the result is -4.", "-4"), ("It's 45°.", "45"), ("It is 12%.", "12%"),
    ("So there are 5-3=2 left.", "2"), ("the 3rd place, 7th round", "7"),
]  # fmt: skip
_WRONGLY_STRICT = [  # (output, reference)
    (r"\boxed{True/False}", "True"), (r"\boxed{\text{Yes and No}}", "Yes"), (r"\boxed{?}", "5"),
    (r"\boxed{\text{True or False}}", "True"),
]  # fmt: skip
_RIGHTLY_STRICT = [  # (output, reference)
    (r"$\boxed{5}$ for part (a), and $\boxed{7}$", "5,7"), (r"\boxed{1} and \boxed{2}", "1,2"),
    (r"\boxed{3} and then I noticed that it must be \boxed{4}", "4"),
    (r"Part a: \boxed{5} and part b: \boxed{6}", "5,6"),
    (r"$\boxed{2}$ in the first case and $\boxed{3}$ in the second case", "2,3"),
    (r"\boxed{3}. Then \boxed{4}", "4"),
]  # fmt: skip


def _pairs(*tables):
    """The (a, b) of tables whose cells read `a :: b`; \\bp and \\ep are a matrix's borders."""
    lines = [line for table in tables for line in table.strip().splitlines() if line[0] != "#"]
    text = " || ".join(lines).replace(r"\bp", r"\begin{pmatrix}").replace(r"\ep", r"\end{pmatrix}")
    return [tuple(side.strip() for side in cell.split(" :: ")) for cell in text.split(" || ")]


def _references():
    """Every reference of MATH-500, GSM8K and the dev set."""
    home = Path(os.environ.get("REASONER_DATA", "nowhere"))
    skip_unless(home.is_dir(), "REASONER_DATA", "the data sets")
    found = {row["gold"] for row in _dev_rows()}
    for path in ("math500/test.jsonl", "gsm8k/test.jsonl", "gsm8k/train.jsonl"):
        rows = map(json.loads, (home / path).read_text(encoding="utf-8").splitlines())
        found |= {row["answer"].split("####")[-1].strip() for row in rows}
    return sorted(found)


def _dev_rows():
    path = os.environ.get("REASONER_VERIFY_DEV", "")
    skip_unless(Path(path).is_file(), "REASONER_VERIFY_DEV", "verify_dev.jsonl")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_verify_tables():
    """Both directions of every pair; a shared canonical key means equivalence."""
    for tables, expected in (((_EQUAL, _RIGHT), True), ((_DIFFERENT, _WRONG), False)):
        for a, b in _pairs(*tables):
            for answer, reference in ((a, b), (b, a)):
                verdict = verifier.judge(answer, reference)
                assert (verdict is True) is expected, (answer, reference, verdict)
            assert expected or verifier.canonical(a) != verifier.canonical(b), (a, b)
            assert verifier.read(a) == verifier.read("") or verifier.equivalent(a, f" {a} "), a


def test_verify_dev():
    """All 1,534 labelled cases; on a quiet core 2,000 a second, 99 % of them within 10 ms."""
    times = []
    for row in _dev_rows():
        begin = time.process_time()
        verdict = verifier.verify(row["pred"], row["gold"])
        times.append(time.process_time() - begin)
        assert verdict is row["expected"], row
    assert len(times) == 1534
    rate, slow = len(times) / sum(times), sorted(times)[int(0.99 * len(times))]
    print(f"{rate:.0f} verdicts a second, 99 % within {1000 * slow:.1f} ms", end=" ")
    assert rate > 500 and slow < 0.04, (rate, slow)  # other work may share the core


def test_verify_examples_in_docstrings():
    assert doctest.testmod(verifier).failed == 0


def test_verify_extraction():
    """The last box wins, joined boxes are one answer; what follows the thinking outranks it."""
    for rows, expected in ((_RIGHTLY_LENIENT, True), (_WRONGLY_LENIENT, False)):
        for text, reference in rows:
            found = verifier.extract_answer(text)
            assert verifier.verify(text, reference) is expected, (text, found)


def test_verify_strict_extraction():
    """For rewards only a closed box after a closed block counts, and no hedge."""
    assert verifier.extract_answer("The answer is 5", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}</think> so 5", strict=True) is None
    assert verifier.extract_answer(r"\boxed{4} and \boxed{5", strict=True) is None
    assert verifier.extract_answer(r"a</think> \boxed{5}", strict=True) == "5"
    assert verifier.verify(r"<think>a</think> \boxed{\frac{2}{4}}", "0.5", strict=True)
    assert not verifier.verify("The answer is 0.5", "0.5", strict=True)
    for rows, expected in ((_RIGHTLY_STRICT, True), (_WRONGLY_STRICT, False)):
        for text, reference in rows:
            assert verifier.verify(text, reference, strict=True) is expected, text


def test_verify_box_span():
    for text, content in [
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\fbox {5}", "5"),
        (r"\boxed{}", ""), (r"\boxed{1} \boxed{2", None), ("none", None), (r"\boxed 5", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
    ]:  # fmt: skip
        span = verifier.box_span(text)
        assert (span and text[slice(*span)]) == content, (text, span)


def test_verify_format_reward():
    """The form of a response. What follows a token that ends the turn was once overlooked."""
    good = [
        r"<think>a</think> So \boxed{5}.", r"\boxed{5}", "<think>\na\n</think>\n\\[\\boxed{5}\\]",
        r"$\boxed{8}$.", r"\boxed{4}</s>", r"\boxed{4}<|im_end|>", "\\boxed{4}.<|im_end|>\n",
        r"<think>a</think>\boxed{4}<|endoftext|>", "\\boxed{4}</s></s>",
    ]  # fmt: skip
    bad = [
        r"<think></think>\boxed{5}", r"<think> </think>\boxed{5}", r"<think>a\boxed{5}", "5", "",
        r"a</think>\boxed{5}", r"x<think>a</think>\boxed{5}", r"<think>a</think>\boxed{}",
        r"<think>a</think><think>b</think>\boxed{5}", r"<think>\boxed{5}</think>", r"\boxed{5",
        r"\boxed{5}\boxed{5}", r"\boxed{5} as I said", r"<think>a</think></think>\boxed{5}",
        r"\boxed{4}</s> more \boxed{9}", r"\boxed{4}<|im_end|>text", r"<|im_end|>\boxed{4}",
        r"\boxed{4}<|endoftext|>\boxed{5}", r"<think>a<|im_end|></think>\boxed{4}",
    ]  # fmt: skip
    for text in good + bad:
        assert verifier.format_reward(text) == float(text in good), text
    text = r"<thought>a</thought> \boxed{5}<|im_end|>"
    assert verifier.format_reward(text, think_tag="thought") == 1.0


def _random_value(rng, depth):
    """(a LaTeX, a plain and a wordy spelling, Python's value) of a random expression."""
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
    la, pa, wa, a = _random_value(rng, depth - 1)
    lb, pb, wb, b = _random_value(rng, depth - 1)
    kind = rng.randrange(5)
    if kind == 0:
        return f"{la}+{lb}", f"({pb}) + ({pa})", rf"\left({wb}\right)+{wa}", a + b
    if kind == 1:
        wordy = rf"(-1 \cdot ({wb}) + ({wa}))"
        return f"{la}-\\left({lb}\\right)", f"-(({pb}) - ({pa}))", wordy, a - b
    if kind == 2:
        wordy = rf"({wa}) \times ({wb})"
        return rf"\left({la}\right)\left({lb}\right)", f"({pb})*({pa})", wordy, a * b
    if kind == 3:
        wordy = rf"({wa})\left({wb}\right)^{{-1}}"
        return rf"\frac{{{la}}}{{{lb}}}", f"({pa})/({pb})", wordy, a / b if b else math.nan
    return rf"\left({la}\right)^2", f"({pa})**2", rf"({wa})({wa})", a * a


def test_verify_random_expressions():
    """A random number in three spellings is one number, and a perturbed one another."""
    rng = random.Random(0)
    checked = 0
    while checked < 250:
        *spellings, value = _random_value(rng, rng.randrange(1, 4))
        if not 1e-6 < abs(value) < 1e9 or max(map(len, spellings)) > 400:
            continue
        checked += 1
        a, b = rng.sample(spellings, 2)
        assert verifier.equivalent(a, b), (a, b)
        ours = verifier.constant(verifier.read(a))
        assert abs(ours - value) < 1e-9 * abs(value), (a, value)
        wrong = [f"{a}+1", f"-({a})", f"2({a})", f"{a}+10^{{-12}}", f"({a}, {b})", f"({a})x"]
        for other in (*wrong, rf"{a} \pm 1"):
            assert verifier.judge(other, b) is False, (other, b)


def test_verify_unit_letters():
    """A last letter may be a unit of the answer; where the reference has it, it is a variable."""
    assert verifier.equivalent("80m", "80") and verifier.equivalent("t = 2 s", r"2\text{ seconds}")
    assert not verifier.equivalent("80", "80m") and not verifier.equivalent("80x", "80")


def test_verify_symmetry():
    """No side has a special role but for a unit; what equals one thing equals another that does."""
    rng = random.Random(3)
    cells = [cell for pair in _pairs(_EQUAL, _DIFFERENT) for cell in pair if "%" not in cell]
    for a, b in _pairs(_EQUAL):
        for c in (*rng.sample(cells, 4), rng.choice(cells) + "m"):
            verdicts = [verifier.equivalent(*pair) for pair in ((a, c), (c, a), (b, c))]
            assert c[-1] == "m" or verdicts[0] == verdicts[1], (a, c)
            one_of_two = re.search(r"%|cent|\(A\)|=", a + b)  # 28 % is 28, 0.28; x = 5, y = 5 are 5
            assert one_of_two or verdicts[0] == verdicts[2], (a, b, c)


def test_verify_random_structures():
    """Lists ignore order, tuples do not; an interval is its inequality; brackets count."""
    rng = random.Random(1)
    numbers = [*map(str, range(-9, 10)), r"\frac{1}{3}", r"\sqrt{2}", r"-\frac{\pi}{2}"]
    equal = verifier.equivalent
    for _ in range(100):
        values = rng.sample(numbers, 3)
        other = values[:]
        while other == values:
            rng.shuffle(other)
        a, b = ", ".join(values), ", ".join(other)
        c, d = ",".join(values[:2]), ", ".join([*values, "17"])
        assert equal(a, b) and equal(rf"\{{{a}\}}", b.replace(", ", r" \text{ and } "))
        assert not equal(f"({a})", f"({b})") and equal(rf"\left({a} \right)", f"({a})")
        assert not equal(a, c) and not equal(a, d) and not equal(f"({a})", f"({d})")
        low, high = sorted(rng.sample(range(-9, 10), 2))
        left, right = rng.choice("[("), rng.choice("])")
        less = {"[": r"\le", "(": "<", "]": r"\le", ")": "<"}
        interval = f"{left}{low},{high}{right}"
        inequality = f"{low} {less[left]} x {less[right]} {high}"
        assert equal(interval, inequality) and equal(rf"\{{x : {inequality}\}}", interval)
        flipped = {"[": "(", "(": "["}[left]
        assert not equal(f"{flipped}{low},{high}{right}", inequality)
        assert not equal(f"{left}{low},{high + 1}{right}", inequality)


def _near_misses(text):
    """The text with one digit, sign, bracket, exponent, relation or function changed."""
    found = [f"-{text}", f"{text}+1", f"2{text}", f"{text},1", f"{text}x"]
    for match in re.finditer(r"\d", text):
        begin, end = match.span()
        others = [str((int(match[0]) + step) % 10) for step in (1, 7)]
        for digits in (*others, "", match[0] + "0"):
            found.append(text[:begin] + digits + text[end:])
    for match in re.finditer(r"\^\{?(\w)", text):
        found.append(text[: match.start(1)] + "7" + text[match.end(1) :])
    for old, new in _SWAPS:
        for match in re.finditer(re.escape(old) + r"(?![a-zA-Z])" * old[-1].isalpha(), text):
            found.append(text[: match.start()] + new + text[match.end() :])
    return [other for other in dict.fromkeys(found) if other != text]


_SWAPS = [tuple(pair.split()) for pair in (
    r"+ -|- +|( [|[ (|) ]|] )|< >|> <|\le \ge|\ge \le|\le <|\ge >|\cup \cap|\sin \cos|\cos \tan"
    r"|\cot \tan|\sqrt \sin|\pi e|\frac \binom|^ _|= <|even odd|x y|n m|\infty 9|\pm +|and not"
    r"|\{ (|i j|a b"
).split("|")]  # fmt: skip


def _same_by_convention(near, reference):
    """Whether a near miss is the reference after all: 007, 0.50, 28 %, no subscript and such."""

    if re.search(r"^-?\d+:\d|(?:=|neq) 0$", reference):  # 0:5 is 0:6, -x = 0 is x = 0
        return True
    if len(near) > 10 and reference.startswith(near) and near.replace(".", "").isdecimal():
        return True  # a decimal of nine digits

    def plain(text):
        text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 007
        text = re.sub(r"(?<=\d)\.0*(?!\d)|(\.\d*[1-9])0+(?!\d)", r"\1", text)  # 0.50, 5.00
        text = re.sub(r"(?<![\d.])0*(\.\d)", r"\1", text)  # .5
        text = re.sub(r"(?<![\d.])-?0x?(?![\d.])|(?<![\d.])[02]0(?![\d.])", "0", text)  # -0, 0x, 20
        text = re.sub(r"\\%|\\text\{ units\}|pmatri[xy]|(?<=x_\{)\d", "", text)
        text = re.sub(r"(?<=\\text\{\(\w\)\})x", "", text)
        return re.sub(r"(?<![\d.])1(?=\\sqrt)", "", text).replace("\\$", "")

    return plain(near) == plain(reference)


def test_verify_near_misses():
    """Every reference with one thing changed: none is accepted but by a convention."""
    references = _references()
    total = 0
    accepted = []
    for reference in references:
        for near in _near_misses(reference):
            total += 1
            if verifier.judge(near, reference):
                accepted.append((near, reference))
    true = {r"\binom{5}{3}", r"n \equiv 10 \pmod 3"}
    left = [pair for pair in accepted if pair[0] not in true and not _same_by_convention(*pair)]
    share = 100 * len(accepted) / total
    print(f"{len(accepted)} of {total} ({share:.2f} %), {len(left)} unexplained", end=" ")
    assert left == [], left


def test_verify_constants():
    """No constant passes for more than the references that it truly equals."""
    references = {*_references(), *(b for _, b in _pairs(_EQUAL, _DIFFERENT, _RIGHT, _WRONG))}
    for constant, equal in _CONSTANTS.items():
        accepted = {reference for reference in references if verifier.judge(constant, reference)}
        assert accepted <= set(equal.split(" || ")), (constant, accepted)


_CONSTANTS = {  # what each of them truly equals among the references
    "0": r"0 || 0 = C || P(1)=0 || p(5) = 0 || e^{i\pi}+1",
    "1": (
        r"1 || 100\% || \sum_{k=1}^{n} b_k = 1 || f(x)=1 || k=1 || n \equiv 1 \pmod 3 || "
        "u(3) = 1 || |AB|=1"
    ),
    "x": "x",
    "0:0": "0:0",
    "1:1": "",
    "A": "1A || A",
    r"\emptyset": r"\emptyset || \varnothing",
    "": "",
    "True or False": "",
    "True/False": "",
    "yes": "Yes || yes",
    "()": "",
    "x=x": "",
    "0=0": r"0 || e^{i\pi}+1",
    "1=1": r"1 || 100\%",
    "?": "",
    "n": "n",
    "0x": r"0 || 0 = C || P(1)=0 || p(5) = 0 || e^{i\pi}+1",
    "f(0)": "f(0)",
    r"\infty": r"\infty",
    "x,y": "",
    r"\ldots": "",
}  # fmt: skip


def test_verify_many_keeps_order():
    """What is too hard is None, at once; large powers of a variable are not too hard."""
    tower = (r"\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}")
    begin = time.process_time()
    pairs = [("#### 5", "5"), tower, ("#### 5", "6"), (None, "5")]
    assert verifier.verify_many(pairs, timeout_s=0.3) == [True, False, False, False]
    assert verifier.verify(*tower) is False
    group = [(rf"\boxed{{{n}+x}}", tower[1]) for n in range(50)]
    assert verifier.verify_many(group) == [False] * 50
    assert time.process_time() - begin < 1.0
    hard = (r"\boxed{x^{100} (x^{100} + 1)}", r"x^{100} + x^{2 \cdot 100}")
    assert verifier.verify_many([hard, hard]) == [True, True]
    assert verifier.verify_many([]) == []
    slow = (r"\boxed{\sin(x+1)^{2}+\cos(x+1)^2}", "1")
    assert verifier.verify_many([slow], timeout_s=1e-4) == [None]


def test_verify_same_everywhere():
    """Verdicts alone, in threads and in processes are the same, in any order."""
    pairs = _pairs(_EQUAL, _DIFFERENT, _RIGHT, _WRONG)[::3]
    alone = [verifier.judge(*pair) for pair in pairs]
    code = "import json, sys, verify\npairs = json.load(sys.stdin)\n"
    code += "print(json.dumps([verify.judge(*pair) for pair in pairs]))"
    for order in (1, -1):
        verifier.compare.cache_clear()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda pair: verifier.judge(*pair), pairs[::order]))
        assert found == alone[::order]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, input=json.dumps(pairs[::order]), text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout) == alone[::order]


def test_verify_imports_little():
    """mpmath is not loaded before it is needed; SymPy and the rest of this repository never."""
    code = "import sys, verify; verify.verify('#### 1/2', '0.5'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"sympy", "mpmath", "torch", "model", "generate", "eval"} & set(done.stdout.split())


def test_verify_command_line():
    def run(*flags):
        command = [sys.executable, ROOT / "verify.py", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--answer", r"so \boxed{\frac{2}{4}}", "--reference", "0.5")
    assert done.returncode == 0 and "verdict    equal" in done.stdout, done
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        right = {"pred": "#### 5", "gold": "5", "expected": True, "category": "a"}
        rows = [right, {"completion": "6", "reference": "5", "expected": True}]
        file.write_text("\n".join(map(json.dumps, rows)))
        done = run("--file", str(file))
        assert done.returncode == 0 and "2 answers | 1 right" in done.stdout, done
        assert "WRONG" in done.stdout, done
        file.write_text('{"pred": "5"}')
        for flags in ([], ["--file", str(file)], ["--file", "missing.jsonl"]):
            done = run(*flags)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done


_PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} | , ; + - * / ^ _ ! % = < \le \pm \cup \in \infty x y n i e f "
    r"1 9 99 0.5 . 1e9 e99 \pi \sin \log \binom \text{ \text{and} \begin{pmatrix} \end{pmatrix} & "
    r"\\ \left \overline ° ² √ ∞ é $ \boxed{ ** ^{9^{9^9}} \mathbb{R} \circ sqrt __import__('os') "
    r"lambda:0 : \mid \lfloor \pmod gcd percent million cm \sum_{k=1} \prod \int is A: 7:30 "
    r"\mathrm{ \$ \foo{ 0x1F "
    "<think> ½ ١ ̅ "
).split() + ["\x00", "\x02", "\ud800", "\u202e", " ", "\n", "9" * 50]


def _hostile_text(rng):
    """A random or mutated expression, a soup of pieces, random characters, or a long repetition."""

    def expression(depth):
        if depth == 0 or rng.random() < 0.25:
            digits = str(rng.randrange(10**9))
            return rng.choice([*"xyein0123", "3.5", "10", r"\pi", digits, r"\infty", "-4"])
        a, b = expression(depth - 1), expression(depth - 1)
        return rng.choice([
            f"{a}+{b}", f"{a}-{b}", rf"\frac{{{a}}}{{{b}}}", rf"\sqrt{{{a}}}", f"({a})^{{{b}}}",
            f"({a},{b})", f"[{a},{b})", rf"\{{{a},{b}\}}", f"{a}={b}", rf"{a} \le {b}", f"|{a}|",
            rf"\sin({a})", f"({a})!", rf"\binom{{{a}}}{{{b}}}", rf"\log_{{{a}}} {b}",
            rf"{a} \pm {b}", rf"{a}\%", f"({a})({b})", f"f({a})", rf"x \in {a}",
            f"({a})^{{({b})!}}", rf"{a} \cup {b}",
            rf"\begin{{pmatrix}}{a} \\ {b}\end{{pmatrix}}", rf"\{{x \mid {a} < x\}}",
            rf"{a} \text{{ or }} {b}", rf"\sum_{{k={a}}}^{{{b}}} k^n", rf"\lfloor {a} \rfloor",
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
        top = rng.choice((127, 0x110000))
        return "".join(chr(rng.randrange(top)) for _ in range(rng.randrange(100)))
    count = rng.randrange(10, 3000)
    end = rng.choice(["", "1", "x"]) + rng.choice(["", ")", "}"]) * rng.randrange(count)
    return rng.choice(_PIECES) * count + end


def test_verify_fuzz(count=1500, seed=0):
    """No exception, no hang, no growth.

    Longer: python -c "import tests.test_verify as t; print(t.test_verify_fuzz(100_000))"
    """
    rng = random.Random(seed)
    previous = "x"
    slowest = (0.0, "")
    verifier.equivalent(r"\sqrt2", "1.41421356")  # mpmath is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        text = _hostile_text(rng)
        reference = rng.choice([previous, text, _hostile_text(rng)])
        previous = text
        begin = time.thread_time()
        for output in (text, rf"so \boxed{{{text}}}"):
            verifier.verify(output, reference, strict=True)
            if verifier.verify_many([(output, reference)]) == [None]:  # too hard, and no error
                answer = verifier.extract_answer(output).strip()
                with contextlib.suppress(verifier.TooHard, RecursionError):
                    verifier.compare(answer, reference.strip())
        verifier.canonical(text)
        verifier.format_reward(text)
        slowest = max(slowest, (time.thread_time() - begin, text[:200]))
    growth_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert slowest[0] < 0.5 and growth_mb < 100, (slowest, growth_mb)
    return slowest, growth_mb


def test_verify_hostile():
    """Resource bombs, code and malformed text end in False, each within a fraction of a second."""
    bombs = [
        "9**9**9", "9^{9^{9^9}}", "10^{10^{10}}", "((9!)!)!", "99999999!", "!" * 5000,
        "(" * 100_000, "-" * 100_000 + "1", r"\frac{" * 50_000, r"\sqrt{" * 999 + "2" + "}" * 999,
        "1" * 1_000_000, "0." + "1" * 900, r"\binom{10^9}{10^8}", "e^{e^{e^{e^{e}}}}",
        r"\sin(10^{100000})", "1/0", "0^0", r"\tan(\pi/2)", r"\ln 0", "1e999999", r"2^{-2^{100}}",
        "().__class__", "[0]*10**10", "__import__('os').system('touch /tmp/verify_was_here')",
        r"\input{/etc/passwd}", "\x00", "\ud800", "a" + "̅" * 10_000, "½" * 1000, "²" * 1000,
        r"\pm 1" * 30, "|" * 10_000, r"\text{" * 10_000, "$" * 300_000, r"\[" * 100_000,
        "answer is " * 50_000, "\\" * 500_000, "answer" + " " * 500_000, "<think>" * 50_000,
        r"\boxed{" * 100_000, r"\boxed{5}, " * 50_000, r"\boxed{" + "1, " * 300 + "2}",
        "x<" * 400 + "1", "[1,2]\\cup" * 80 + "[3,4]", r"\begin{pmatrix}" * 1000, "x^{10^{100}}",
        "(x+y+z)^{500}", "((x!)!)!", r"3 \pmod{0}", "10_{1}", "gcd(" + "9" * 900 + ",6)",
        "^2" * 340, r"\sin" * 170, r"\sqrt" * 130, r"\$" * 340, "--+-" * 170,
        r"\sum_{k=1}^{2000}" * 9 + "k", r"\sum_{k=1}^{10^9} k", r"\prod_{k=1}^{2000} (x+k)",
        r"\lfloor" * 70 + "x" + r"\rfloor" * 70, "1" + "," * 690, "a_" * 300, "x'" * 300,
        "1:" * 340 + "1", "2^" * 300 + "2", r"\text{is }" * 70,
        *(piece * 20_000 + "x" for piece in ("\n", ".", ",", "!", "*", " .", "9", "a ", "$a", "=")),
        r"e^{-10^{4}x}+\sin(10^{9}x)", "0x" + "F" * 690, r"\prod_{k=1}^{2000} k^{2000}",
        "1e999" * 130, "0." + "1" * 600 + "...", "x^{100}" * 90,
        r"\begin{pmatrix}1&x&3\\4&x&6\\x&8&9\end{pmatrix}" * 13,
    ]  # fmt: skip
    for bomb in bombs:
        for text in (bomb, rf"so $\boxed{{{bomb}}}$", "The answer is " + bomb):
            begin = time.thread_time()
            for reference in ("5", "x^2+1", bomb[:600]):
                right = reference == "5" and r"\boxed{5}, " in text
                verdict = verifier.verify(text, reference)
                assert verdict is right or reference == bomb[:600], (bomb[:60], reference)
            verifier.format_reward(text)
            verifier.canonical(text)
            assert time.thread_time() - begin < 1.0, (bomb[:60], time.thread_time() - begin)
    assert not Path("/tmp/verify_was_here").exists()
