"""Tests of verify.py."""

import contextlib
import doctest
import json
import math
import operator
import os
import random
import re
import resource
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import verify as verifier
from tests.common import ROOT, read_lines, run, skip_unless, temporary_dir

# Table cells have the form `answer :: reference :: reference ...`; each pair is tested in both
# directions, and ⏎ is a newline.

_RIGHT = r"""
# numbers, formulas, statements
\binom52 :: 10 || \binom{n}2 :: \frac{n(n-1)}2
14{,}916 :: 14916 :: 14,916 || (3,-1) :: P(3,-1) :: \{x=3, y=-1\} :: x = 3 \quad y = -1
2 :: \log 100 :: k=1+1=2 :: \operatorname{rank}(A)=2 || 5 :: \square = 5 :: \checkmark 5 :: 0b101
-x >= -1 :: x <= 1 || 15 :: 15\mbox{ cm}^2 :: US\$15 :: \text{USD }15 :: 15\text{ pct} :: 0b1111
y=2x+3 :: 2x-y+3=0 || 1234567 :: 1,234,567 :: 1{, }234{, }567 || 7 p.m. :: 7\text{ PM} :: 7:00 p.m.
1'000 :: 1{,}\!000 || \binom{30}{11} :: \binom{30}{19} || \frac73 :: 2 1/3 :: 2.\overline{3}
5,\!636 :: 5636 || \frac12 :: \cos 60^\circ :: .5 :: \sin \pi/6 || \binom{n}{2} :: \frac{n(n-1)}{2}
1\frac45 :: 9/5 :: 1.8 || (3)/(4) :: \left(\frac{3}{4}\right) || 11,\! 111,\! 100 :: 11111100
1e-6 :: 10^{-6} || \mathbb{R}\setminus\{0\} :: x \neq 0 || 0.1\overline{6} :: \nicefrac{1}{6} :: 1/6
5\,636 :: 5{,}636 || 52_8 :: 52_{8} :: 52_{\text{eight}} || 8\text{ }\frac47 :: \frac{60}{7}
\$-8,192 :: -8192 || \sin(90^\circ-x) :: \cos x || \text{Monday.} :: monday || \R - \{2\} :: x \ne 2
5 :: 5\text{ m/s} :: €5 :: 5\mathrm{~cm}^2 :: \text{five} :: x=5 :: |3-4i| :: 5=x :: \num{5}
54° :: 54^{\circ} || 12 :: 12 cm² :: (A) 12 :: \Delta S = 12 \text{ J} || \frac{1}{2024!} :: 1/2024!
0; 1; 2 :: 2,1,0 || 36x\sqrt{35x} :: 36\sqrt{35}x^{\frac32} || \frac 59 :: \frac{10}{18}
\sin^{-1} x :: \arcsin x || -\frac{9}{15} :: \frac{-3}5 || 6 \cdot 6^{999} :: 6^{1000} || 2½ :: 2.5
-1\frac{1}{2} :: -1.5 || (1,2) :: (x,y) = (1,2) :: \langle 1,2\rangle :: x=1, y=2 :: x=1 y=2
n! :: n (n-1)! || 6.02e23 :: 6.02 \cdot 10^{23} || 10.50 \times 10^{6} :: 1.05e7 || \sqrt{-9} :: 3i
e^{i\pi} :: -1 || 320000 :: 3.2x10^5 :: 3.2 X 10^{5} || 28\% :: 0.28 :: 28 :: 28 percent
|x-3| :: |3-x| || 1011_{\text{base }2} :: 1011_2 || 8 \cdot 2^{1/2} :: 8\sqrt 2
\emptyset :: \text{There is no solution} :: \text{No solution} :: \text{no solution}
\tfrac{3}4 :: 0.75 || 3 \text{ to } 4 :: 3{:}4 || \text{does not exist} :: \text{DNE}
3 \text{ and } 4 :: 4,3 || 1/3 :: 0.333... :: 0.(3) :: x=1/3\approx0.33 || [1,2]\cup[2,3] :: [1,3]
1.5\times10^3 :: 1500 || [[1,2],[3,4]] :: A = \bp1&2\\3&4\ep || -4 ± 2i :: -4+2i,-4-2i
\sqrt[3]{-8} :: -2 || 3.33333333333 :: \frac{10}{3} || sqrt(3)/2 :: \frac{\sqrt3}{2}
18+2pi :: 2(9+\pi) || \frac{\pi}{4} :: 0.7853981634 || \text{Answer: B} :: B) || 1,2;3,4 :: 1,2,3,4
0.\overline{6} :: 2/3 || 17 \text{ any text} :: 17 || -80\ \mathrm{square\ units} :: -80
8\sqrt2 :: \sqrt{128} || \binom{n}{k} :: \frac{n!}{k!(n-k)!} || 5 \text{ million} :: 5000000
10^{\text{th}} :: 10th || \frac{1}{y}+y :: \frac{y^2+1}{y} || 1\pm\sqrt5 :: 1-\sqrt5, 1+\sqrt5
\$18.90 :: 18.9 || a \geqslant 1.5 :: a \ge \frac32 || 60 \frac{\text{km}}{\text{h}} :: 60 km/h
\text{(C)} :: c :: C || \frac{\partial f}{\partial x} = 2xy :: 2xy || 3\frac12\text{ hours} :: 3.5
8 - 2*I :: 8-2i || 72 :: \measuredangle ABC = 72^\circ :: 72º || \frac13\bp1\\2\ep :: \bp1/3\\2/3\ep
|x|<3 :: (-3,3) || (1,2),(3,4) :: (3,4) \text{ and } (1,2) :: \{(1,2),(3,4)\} || 90^\circ :: 90
5√7 :: \sqrt[2]{175} || \text{the set of all integers} :: \mathbf{Z} || \textbf{(B) }12 :: (B) 12
3, 5, 7 :: \{7,3,5\} || \angle ABC = 69^\circ :: 69\text{ degrees} || 50\text{ percent} :: 50
x=24, x=-3 :: -3, 24 || [[1,2,3],[4,5,6]] :: \bp1&2&3\\4&5&6\ep || (1,2) \quad (3,4) :: (3,4),(1,2)
198 \% :: 198 || \{1\pm\sqrt5,-2\} :: -2, 1\pm\sqrt{5} || x \ne 0 :: (-\infty,0)\cup(0,\infty)
0.005 :: \frac{1}{2}\% :: 0.5\% || \text{BEEF}_{16} :: BEEF_{16} || \{1,2\} \cap \{2,3\} :: \{2\}
\textbf{(C)} :: C || (1,2,3) :: \bp1\\2\\3\ep :: x=1 y=2 z=3 :: [1,2,3] || \tan^2 y + 1 :: \sec^2 y
(C) :: \mathrm{C} || \log_2 3 :: \frac{\ln 3}{\ln 2} || 6 :: \sum_{k=1}^3 k = 6 :: 2\cdot\num{3}
256*pi :: 256 \pi || 2^{100} :: 1267650600228229401496703205376 || (x+1)/(x-1) :: \frac{x+1}{x-1}
z = 8 - 1i :: 8-i || n \equiv 1 (\bmod 3) :: n \equiv 1 \pmod 3 || 1 :: |AB| = 1 :: 2^{\sin\pi}
x+y>2 :: 2 < x+y || \text{an ellipse} :: ellipse || \sqrt{3+2\sqrt2} :: 1+\sqrt2 || ℝ :: (-∞, ∞)
\text{(A)}\ 12 :: A || 27i - 11 :: -11 + 27 \cdot i || 100,101,102 :: 100, 101, 102 || 12𝜋 :: 12\pi
x^{2/3} :: \sqrt[3]{x^2} || 3:4 :: 6:8 :: \frac{3}{4} || |x| :: │x│ :: \sqrt{x^2} || 3π :: 3\pi
\{\} :: \varnothing || 2x :: \frac{dy}{dx} = 2x :: f^{\prime}(x)=2x || \log(xy) :: \log x + \log y
S_{MBCN}:S=7:32 :: 7:32 || {3 \over 7} :: \sfrac{3}{7} || .\overline{3} :: \frac13 || x**2 :: x²
13 \cdot 12! :: 13! || \frac{1}{\sqrt{n}} :: 1/sqrt(n) || x \in [46, +\infty) :: x \ge 46
\sin 3x :: sin(3*x) || 12.5 :: 12 1/2 \% :: \num{12.5} || \bigl(-3 ,\, 2\bigr) :: (-3,2)
-2\le x<3 :: [-2,3) || x = \pm 3 :: 3 \text{ or } -3 || 60\,\mathrm{km\,h^{-1}} :: 60 || {-}7 :: -7
\triangle ABC :: ABC || k \ge -36 \text{ and } k \le 104 :: -36 \le k \le 104 || -\sqrt{-4} :: -2i
\ln 8 :: 3 \ln 2 || x \le -2 \text{ or } x \ge 5 :: (-\infty,-2]\cup[5,\infty) || \Large 42 :: 42\
144 (\text{ways}) :: 144 || (2,12)\cup(12,102) :: (12,102) \cup (2, 12) || 4+6\mathrm{i} :: 6i+4
i :: 0+1i || x^2/16+y^2/12=1/4 :: \frac{x^2}{4}+\frac{y^2}3=1 || 72{}^\circ :: 72^{\mathrm{o}}
f(x)=2x+3 :: y = 2x+3 || (-\infty,1)\text{ or }(4,\infty) :: x<1 \text{ or } x>4
{\$}15 :: \text{\$}15 || [1,2]\cup\{3\} :: 1 \le x \le 2 \text{ or } x=3 || 2{\frac{3}{4}} :: 2.75
\{x|-2\leq x < 1\} :: [-2,1) || f^{-1}(x) = \frac{x-1}{2} :: \frac{x-1}2 || (1011)_2 :: 1011_{(2)}
1, 2, \ldots, n :: 1,2,...,n || x = k\pi \; (k \in \mathbb{Z}) :: k\pi || v^2_0 - 2gh :: v_0^2-2gh
\begin{bmatrix}1 & 2\\ 3 & 4\\ \end{bmatrix} :: \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
80\;\mathrm m :: 80 || \frac{v^2_0}{2g} :: \frac{v_0^2}{2g} || y'' :: y^{\prime\prime} :: y^{''}
2, 5, \& 7 :: 5,7,2 || \sqrt{v^2_0} :: \sqrt{v_0^2} || \Delta x = 5 :: 5 :: \Delta x=5
42 :: 42 \checkmark :: 0x2A || y^{\prime\prime}+y=0 :: y''+y=0 || y^{\prime\prime}+4y=0 :: y''+4y=0
\text{A and C} :: C, A || 3 :: \Delta t = 3 :: \lVert v \rVert = 3 :: \dot{x} = 3 :: f(1) = 3
v^2_0 :: v_0^2 || f^{\prime\prime}(x) = 2 :: f''(x) = 2 || x^2_1+x^2_2 :: x_1^2+x_2^2
a^n_k :: a_k^n || \Delta E = h\nu :: \Delta E = \nu h || \tilde{x}+1 :: 1+\tilde{x}
T^4_s :: T_s^4 || \sigma^2_x :: \sigma_x^2 || y^{\prime} = 2x :: y'=2x || \qty{5}{m} :: \qty{5}{m}
x^{2}_{1} :: x_1^2 || \mathfrak{g} :: \mathfrak{g} || \displaystyle\frac12 :: 0.5
a^{2}_{n} :: a_{n}^{2} || 1234 :: \num{1234} :: 1\,234 || \mathring{x}+1 :: 1+\mathring{x}
f^{\prime}(x) :: f'(x) || 4 :: \therefore x = 4 :: f(2)=4 || \heartsuit + 1 :: 1+\heartsuit
\Delta H = -50 :: -50 || \mathscr{L} :: \mathscr{L} || x \oplus y :: x\oplus y || 5 \odot 3 = 8 :: 8
y^{\prime} :: y' || 0 :: \sin\pi :: \sqrt{3+2\sqrt2}-1-\sqrt2 || a \odot b :: a \odot b
A^{\prime} :: A' || 4 \boldsymbol{x} :: 4x || 3 \odot x :: 3\odot x || a \star b :: a\star b
x^{\prime}=3 :: x'=3 || \bigstar :: \bigstar || 2{, }500.50 :: 2500.5 || True :: TRUE :: \text{True}
2\,\mathbf{i} :: 2i || \ddot{x} :: \ddot{x} || 3 > f(2) :: f(2) < 3 || 28 pct :: 28 :: 0.28
\num{1e3} :: 1000 || [1,2,3] :: [1, 2, 3] :: 1,2,3 || A: 5, B: 7 :: 5, 7 :: B: 7, A: 5
\mathsf{T} :: T || f(2) = 4 :: 4 = f(2) || 12:00 p.m. :: 12:00 :: 12:00 PM || 5\text{ cm} :: 5 cm.
12 pct :: 12\% || n \text{ is even} :: \text{n is even} || 5\% increase :: 5\% \text{ increase}
3{, }000 :: 3000 || 7:30 :: 7:30 p.m. :: 14:60 :: 7:30 || E=mc^2 :: E = m c^2 || EAST :: \text{East}
14{, }916 :: 14916 || \ln(x^2+1) :: \log(1+x^2) || x=1,\ y=2 :: x=1\quad y=2 || x(x+1)=5 :: x^2+x=5
5.5 pct :: 0.055 || x=5\text{ or }x=6 :: 5, 6 || x=1 y=2 :: x=1, y=2 || y=mx+b :: y = b+mx
12{,}345 :: 12345 || 0x1A :: 26 :: 0x1a || f(x)=x+1 :: y=x+1 || x>1, x<3 :: (1,3) || x(x+1) :: x^2+x
East :: east || 10^{100}+1 :: 1+10^{100} || x \in \{1,2\} :: \{1,2\} || f(x+1) :: f(1+x)
xy+z :: z+yx || x<1 \text{ or } x>3 :: (-\infty,1)\cup(3,\infty) || a(b+c) :: ab+ac || P(3) :: P(3)
0xff :: 255 || |x-100| :: |100-x| :: \sqrt{x^2-200x+10000} || I(0)e^{-t/RC} :: I(0)e^{-\frac{t}{RC}}
2:0 :: 4:0 || LISTEN :: listen :: \text{Listen} || x=1 \quad y=2 :: y=2, x=1 || \sqrt[3]{x^3} :: x
2RC :: 2CR || 3 apples and 5 pears :: 5 pears and 3 apples || \frac{V}{RC} :: \frac{V}{CR}
2:3 :: 4:6 || \text{The series converges} :: the series converges. || \sqrt{10^{100}} :: 10^{50}
0:1 :: 0:2 || (x-1)^2+(y-2)^2=9 :: x^2-2x+y^2-4y=4 || [0,\infty),[1,\infty) :: [1,\infty),[0,\infty)
mgh :: mgh || (-\infty,1),(2,\infty) :: (-\infty,1)\cup(2,\infty) || PV=nRT :: nRT = PV || AB :: BA
1:2:3 :: 2:4:6 || V=120\sin(377t) :: V=60\sin(377t)\cdot 2 :: 120\sin(377t) || x \ge 5 :: [5,\infty)
P(x)=x^2 :: x^2 || \tan(x+y) :: \frac{\tan x+\tan y}{1-\tan x\tan y} || e^{1000x} :: (e^{x})^{1000}
MONDAY :: Monday || x=\frac{-b\pm\sqrt{b^2-4ac}}{2a} :: \frac{-b\pm\sqrt{b^2-4ac}}{2a}
(1,2] :: 1<x\le2 || \text{increase of } 5\% :: \text{increase of }5\% || e^{x+200} :: e^{200}e^x
3:5 :: 3 : 5 || \int_0^1 e^{2x}dx :: \int_{0}^{1} e^{2x} \, dx || 1-e^{-150} :: 1-\frac{1}{e^{150}}
15:20 :: 15:20 || \frac{\sin 2x}{2} :: \sin x\cos x || [3,4,5] :: \left[3, 4, 5\right] || n=5 :: N=5
A: 5 :: A = 5 || \sin^2(377t) :: 1-\cos^2(377t) || \frac{a}{b}:c :: \frac{a}{b}:c
2\sinh x :: e^x-e^{-x} || \sin(377t+\pi) :: -\sin(377t)
# units, counted nouns, options
12 \mathrm{~min} :: 12 :: 12 \text{ minutes} || 32 :: 32^\circ\mathrm{F} :: 32°F :: 32^\circ F
25 :: 25 \mathrm{~J} :: 25^{\circ} \mathrm{C} || 100 :: 100 percent :: 100 °C :: 100 \mathrm{~W}
7 :: 7 \mathrm{~cm}^{2} :: 7 hours per day :: 7 \text{ (years)} :: 7 red balls || 14 years old :: 14
36 \text{ inches} :: 36 || 9.8 :: 9.8 \mathrm{~m} / \mathrm{s}^2 :: 9.8\ \mathrm{m/s^2}
3 :: 3\mathrm{~in} :: 3 dozen eggs :: 3 slices of pizza :: 3 hours :: 3 m/s :: 3 \text{km}
5 :: 5 \mathrm{~m} / \mathrm{s} :: 5\ \text{dollars} :: 5 people :: 5 \text{ units}^2 :: 5 cans
5 :: 5 square feet :: 5 days a week :: 5 \mathrm{~g} / \mathrm{cm}^3 :: 5\mathrm{N\cdot m}
45 :: 45 mph :: 45 \mathrm{~km} / \mathrm{h} || 10 :: 10 \text{ cubic meters} :: 10\ \mathrm{m}
9.8 m/s^2 :: 9.8 :: 9.8 \text{ m/s}^2 || 24 :: 24 gallons of oil :: 24 loaves of bread
\$5 :: 5 dollars || 15 :: 15 \text{ boxes of chocolate} :: 15\,\text{N}\cdot\text{m} :: 15 ml
20 :: 20 students :: 20 (years old) || 6.02\times 10^{23} \mathrm{~mol}^{-1} :: 6.02 \times 10^{23}
12 :: 12 \text{ sq. ft} :: 12\mathrm{~m} :: 12 (apples) :: 12 pieces of candy :: (B) 12 :: A: 12
300{,}000 \text{ km/s} :: 300000 || 18 :: 18 eggs :: 18 \text{ marbles in total} || 9 a.m. :: 9 am
3 \mathrm{~kg} :: 3 kg || 3 \times 10^8 \text{ m/s} :: 3 \times 10^8 || 2 \mathrm{~h} :: 2 hours
90 degrees :: 90^\circ || 2.5 \mathrm{~kg} \cdot \mathrm{m}^2 :: 2.5 || 10 centimeters :: 10 cm
8 :: 8\text{ people} :: 8 men || 4 :: 4 \text{ kJ/mol} :: 4 \text{ tickets} || 50 \text{ km/h} :: 50
\$12.50 :: 12.5 :: 12.50 \text{ dollars} || 60 :: 60 \text{ miles per hour} :: 60 mph
6 :: 6 \mathrm{~cm}^3 :: 6 feet tall || 40 :: 40 \mathrm{N} :: 40 (square units) || 5 ft :: 5 feet
\frac{3}{4} \text{ cup} :: \frac34 || 1.6 \times 10^{-19} \mathrm{C} :: 1.6\times 10^{-19}
\frac{5}{2} \text{ pounds} :: \frac52 || 3 more-than-expected :: 3 more-than-expected
250 \text{ mL} :: 250 || 50 \text{ sq ft} :: 50 \text{ square feet} || 30 \text{ minutes} :: 30 min
2\pi \text{ cm} :: 2\pi || C :: (C) - 5 :: C: 12 :: \text{C. } 14 :: C—the third || E - 7 units :: E
8 \text{ inches} :: 8 \text{ in} || A :: \text{(A) } \frac{1}{2} :: A) yes :: A. 5
98.6^\circ\mathrm{F} :: 98.6 || 2 \text{ m}^3 :: 2 \text{ cubic meters} || 16 cups of flour :: 16
11 \text{ ways to choose} :: 11 || 3.5 \text{ liters of water} :: 3.5 || D :: D: none of these :: D.
120 cm^3 :: 120
B :: B - 12 apples :: B – the second one :: \textbf{(B)}\ 12 :: B, since it is larger
B :: B, because it is bigger :: Option B :: b) :: \text{B) } 12 :: \textbf{B} :: (B). :: (b)
# matrices, lists of two levels, sums, integrals
\bp1\\2\ep+\bp3\\4\ep :: \bp4\\6\ep || s\bp1\\0\ep+t\bp0\\1\ep :: t\bp0\\1\ep+s\bp1\\0\ep
\bp4\\6\ep-\bp3\\4\ep :: \bp1\\2\ep || (5,2),(7,2) :: p=5,q=2;p=7,q=2 :: p=7,q=2;p=5,q=2
2\bp1&0\\0&1\ep :: \bp2&0\\0&2\ep || \bp1\\0\ep+t\bp0\\1\ep :: \bp1\\t\ep :: t\bp0\\1\ep+\bp1\\0\ep
\bp1\\2\ep-\bp1\\1\ep :: \bp0\\1\ep || x = \bp1\\2\ep+t\bp1\\1\ep :: \bp1+t\\2+t\ep
\begin{bmatrix}1&2\\3&4\end{bmatrix}+\bp1&0\\0&1\ep :: \bp2&2\\3&5\ep || -\bp1\\2\ep :: \bp-1\\-2\ep
\frac{1}{2}\bp2&4\ep :: \bp1&2\ep || \sum_{k=1}^{n} k :: \sum_{i=1}^{n} i :: \sum\limits_{k=1}^{n} k
\bp1&2\\3&4\ep\bp1\\1\ep :: \bp3\\7\ep || \bp2&4\ep :: \bp1&1\ep\bp2&0\\0&4\ep
\bp2\\4\ep \cdot 3 :: \bp6\\12\ep || 9 :: \sum_{i=1}^{2}\sum_{j=1}^{2} ij :: \sum_{n=1}^{3} n!
c_1 e^{t}\bp1\\1\ep+c_2e^{-t}\bp1\\-1\ep :: c_2e^{-t}\bp1\\-1\ep+c_1 e^{t}\bp1\\1\ep
(1,2)+t(3,4) :: (1+3t,2+4t) || x=1, y=2 \text{ or } x=2, y=1 :: (2,1),(1,2)
(1,2),(3,4) :: \{x=1,y=2\},\{x=3,y=4\} || \sum_{i=1}^{n} i = \frac{n(n+1)}{2} :: \frac{n(n+1)}{2}
(1,2),(3,4) :: x=1,y=2;x=3,y=4 :: x=1,y=2 \text{ or } x=3,y=4 :: (x,y)=(1,2),(3,4) :: (1,2);(3,4)
x=1,y=2;x=3,y=4 :: x=3,y=4;x=1,y=2 || 15 :: \sum_{k=0}^{3} 2^k :: \sum^{5}_{i=1} i
a=1,b=2,c=3;a=4,b=5,c=6 :: (1,2,3),(4,5,6) || \sum_{k=1}^n (k+1) :: \sum_{j=1}^n (1+j)
\sum^n_{k=1} k :: \sum_{k=1}^n k || \prod_{k=1}^n \frac{k}{k+1} :: \prod_{j=1}^n \frac{j}{j+1}
\prod_{k=1}^{5} k :: 120 || \sum_{n=1}^{\infty} \frac{1}{n^2} = \frac{\pi^2}{6} :: \frac{\pi^2}{6}
\sum_{k=0}^{4} \binom{4}{k} :: 16 || \sum_{k=1}^{n} \frac{1}{k} :: \sum_{m=1}^n \frac1m
\sum_{k=1}^{10} k :: 55 || \sum_{k=1}^{20} \frac{1}{k(k+1)} :: \frac{20}{21}
\sum_{k=1}^{4} k^2 = 30 :: 30 || \sum_{k=1}^{n} k^2 :: \sum_{k=1}^{n} k \cdot k
\sum_{k=1}^3 k = 6 :: 6 || \int x dx = \frac{x^2}{2}+C :: \frac{x^2}{2}+C || 3\sum_{k=1}^{3} k :: 18
\int_0^1 x\,dx :: \int_{0}^{1} t\,dt || \lim_{x\to 0} \frac{\sin x}{x} = 1 :: 1
\int_0^{\pi} \sin x \, dx = 2 :: 2 || \int_0^1 x \, dx = \frac12 :: \frac12
\sum_{k=1}^{3} k + 1 :: 7
"""
_WRONG = r"""
# small differences
(1,2) :: (2,1) :: 1,2 :: \{1,2\} :: [1,2] :: (1,2,0) :: () || \mathbb{R} :: \mathbb{Z} :: (0,\infty)
[0,1) :: [0,1] || 5 :: \text{at least 5} :: x+y=5 :: 2+2=5 :: \ldots :: - || 28\% :: 2800\% :: 2.8
5 :: 5i :: \text{5 or more} :: \pm1\pm1\pm1\pm1\pm1 :: x \ne 5 :: ANSWER :: \text{five or six} :: ?
0 :: \text{DNE} :: 10^{-20} :: \sin\pi/6 || \mathbb{R} - \{2\} :: \mathbb{R} - \{3\} || 0.28 :: 28
10,000 :: 10,00 :: 10,0000 || \emptyset :: 0 :: \{\emptyset\} :: \text{none of the above}
B :: (B) or (C) :: (A) 12 || n \equiv 1 \pmod 4 :: n \equiv 1 \pmod 3 || x^2+y^2<4 :: x^2+y^2\le4
1,1,2 :: 1,2,2 || \bp1\\2\ep :: \bp2\\1\ep :: \bp1&2\ep || 3 :: 3 \text{ or } 4 :: 2.9999999999
1e-20 :: 2e-20 || x \in (1,2) :: y \in (1,2) || \bp5&-2\ep^T :: \bp5&-2\ep || 7.78 :: \frac{70}{9}
2.33333333334 :: \frac73 || x>3 :: x\ge 3 :: 3 :: x<3 || \int_0^1 x dx :: \frac12 || (2,125) :: 2125
1.41421357 :: \sqrt2 || 52_8 :: 52_7 :: 52 :: 42 || \{3,600\} :: 3600 || \text{(C)}+1 :: C
3,4,17 :: 3,4 || A^{\text{T}} :: A || \overline{z} :: z || 0.333 :: \frac13 || 5,40 :: 5,040
f(x) :: f(y) || 60 :: 60 \text{ to } 70 :: 5! || -36 \le k \le 104 :: k \le 104 :: -36 < k \le 104
0.33 :: 1/3 || 1234567890123456789 :: 1234567890123456788 || 99999999999.5 :: 100000000000
3.14 :: \pi || 3 hours 20 minutes :: 20 hours 3 minutes || \bp5\\-2\ep :: \binom{5}{2} || k>5 :: x>5
1+2i :: 1-2i || x :: y :: \sqrt{x^2} :: 2x :: x = x || 2^{300000} :: 2^{300000}+1 || 7:32 :: 32:7
3:4:5 :: 3:4 || (-\infty,3) :: (-\infty,3] || \binom{12}{5} :: (12,5) || 10\text{ units} :: 100
(E), 97 :: E || 1\frac45 :: \frac{14}5 || 8\frac47 :: \frac{84}7 || 1\pm\sqrt5 :: 1+\sqrt5
30.01 :: 30 || 7 p.m. :: 7 a.m. || \pm1\pm2 :: 3,-3 || (2, 598) :: 2598 || 2^{100} :: 2^{100}+1
odd :: oddd || 6^{1000} :: 6^{1001} || e^{-200} :: e^{-201} || \frac{1}{2024!} :: \frac{1}{2025!}
\$5 :: 50 || \frac{712}{425} \approx 0.169 :: \frac{72}{425} \approx 0.169 || \log_2 3 :: \log_3 2
-3^2 :: 9 || \{1,2\} \cap \{2,3\} :: \{1,2,3\} || 2x - 3y + 7 = 0 :: 2x - 3y + 8 = 0 || , :: 3, 4
5m :: 5x || \text{not Monday} :: \text{Monday} || \binom{30}{11} :: \binom{30}{12}
1,2345 :: 12345 || \sqrt{10^{40}+1} :: 10^{20} || \infty :: -\infty :: \text{infinitely many}
41230x :: 41230 || 123456789x :: 123456788x || \frac{72}{425} :: 72425 || 3 \pmod 7 :: 4 \pmod 7
\sin x :: \cos x || (1,2)\cup(3,4) :: (1,4) :: (1,2)\cap(3,4) || \{x|-2\leq x < 1\} :: (-2,1)
(2,-1] :: (2,-1) || \text{forty-two} :: 24 || 10\sqrt2 :: 10+\sqrt2 || [5, \infty] :: [5,\infty)
4x-5y=-50 :: -50 || \frac{1}{2004!} :: \frac{i}{2004!} || 3 \le x \text{ or } 97 :: x \ge 3
y=2x+3 :: y=3x+2 || \sin x^2 :: \sin^2 x || \cos x=\frac12 :: \sin x=\frac12 || (1011)_2 :: (1011)_3
\bp1&2\\3&4\ep\bp1\\1\ep :: \bp4\\6\ep || \bp0&1\\0&0\ep\bp1&0\\0&0\ep :: \bp0&1\\0&0\ep
8\sqrt2 :: 2\sqrt8 || \bp1&2\\3&4\ep :: \bp1&3\\2&4\ep || \text{June 20} :: \text{July 20}
2A5_{16} :: 2A6_{16} || 7:30\text{ PM} :: \text{7:30 AM} || 1,2,\ldots,8 :: 1,2,\ldots,9
(4^2)^3 :: 4^{2^3} || (x+y)/x y :: \frac{x+y}{xy} || [x,y) :: [1,2) || (1,1] :: (1,1) || x=5 :: y=5
y^2=12x :: 12x || [2,5[ :: [2,5] || 0 = 0 :: 1 || 2=3 :: 4=6
# calls with a number, unknown functions, sums, products, integrals
f(2)=4 :: f(2)=5 :: f(3)=4 :: g(2)=4 || a(1)+a(2)=3 :: a(1)+a(2)=4 || f(3) = f(5) :: f(3) = f(6)
f(3) \ne 4 :: f(3) \ne 5 || 100 < f(20) :: 100<f(22) || f(2)=2f(1) :: f(2)=3f(1) || a(5)=7 :: a(5)=8
f(20)>1000 :: f(22)>1000 || f(1)=2, f(2)=4 :: f(1)=2, f(2)=5 || f(2)=4, f(3)=9 :: f(2)=4, f(3)=8
y(0)=1 :: y(0)=2 || f(5) \geq 10 :: f(5) \geq 11 || f(2)+f(3)=5 :: f(2)+f(3)=6 || f'(2)=4 :: f'(2)=5
f(-1)=3 :: f(1)=3 || N(5) \le 1000 :: N(5) \le 2000 || g(3) = f(3) :: g(3) = f(4)
g(0)\le 7 :: g(0)\le 8 || f(f(2))=3 :: f(f(2))=4 || 0 :: V(0) :: A(0) :: x(0) || P(3)=10 :: P(3)=11
3f(2)=12 :: 3f(2)=15 || f(0) = 1 :: f(0) = -1 || p(4) = 0 :: p(5) = 0 || f(1) = 0 :: f(1) = 2
F(9)=34 :: F(8)=34 || f(2) :: 2f(1) :: f(3)-f(1) || f(x) :: g(x) :: -f(-x) || f(1) :: f(0)+f(1) :: 1
u(2)=1 :: u(3) = 1 || 2f(x) :: f(x)+g(x) :: f(2x) || f(2) < 3 :: f(2) < 4 || T(10)=55 :: T(10)=56
P(0)=0 :: P(1)=0 || 1 :: q(0)+1 :: \sin\pi || f(1,2)=3 :: f(1,2)=4 || f(x+y) :: f(x)+f(y)
0 :: f(0) :: I(0)e^{-t/RC} :: y(0)e^{kt} :: N(0)e^{kt} :: V(0)e^{-t} :: f(0)g(0) :: f(0)e^{x}
3P :: P(3) || f(1)+f(2) :: f(3) || 2\sum_{k=1}^n k :: 3\sum_{k=1}^n k || \sum_{k=1}^{10} k :: 54
2x :: x(2) || \prod_{k=1}^n k :: \prod_{k=1}^n 2k || \sum_{k=1}^n k :: \sum_{k<1}^n k || Q(5) :: 5Q
h(1) :: h(2) || 5\sum_{i=1}^n i :: 7\sum_{i=1}^n i || \sum_{i=1}^n a_i :: \sum_{i=1}^n b_i
f(0) :: g(0) || \sum_{k=1}^\infty \frac{1}{k^2} :: \sum_{k=1}^\infty \frac{1}{k^3} || -f(1) :: f(-1)
\phi(5) :: 5\phi || S = \sum_{k=1}^n k :: S = \sum_{k=1}^n 2k || \sum^n_{k=1} k :: \sum^n_{k=2} k
f(-x) :: -f(x) || \sum_{k=1}^n k = 6 :: \sum_{k=1}^n k = 7 || \int_0^1 e^{2x}dx :: \int_0^1 e^2x dx
M(2) :: 2M || \sum_{i=1}^{n} x_i :: \sum_{i=1}^{m} x_i || \lim_{x\to 0} f(x) :: \lim_{x\to 1} f(x)
f(x)^2 :: f(x^2) || \sum_{k=1}^{n} k^2 :: \sum_{k=1}^{n} k^3 || \sum_{k=1}^{n} k :: \sum_{k=2}^{n} k
f(a)f(b) :: f(ab) || \sum_{k=1}^{n} a_k = 1 :: \sum_{k=1}^{n} b_k = 1 || \sum_{k=1}^{100} k :: 5000
y(0) = C :: 0 = C || \sum_{k=0}^{\infty} x^k :: \sum_{k=1}^{\infty} x^k || \prod_{k=1}^{5} k :: 60
\sum_{k=1}^n k :: \sum_{k=1}^n k^2 :: \sum_{k=0}^n k+1 :: \prod_{k=1}^n k :: \sum_{k=1}^{n+1} k
\prod_{i=1}^{4} i :: 23 || \prod_{k=1}^{n} (1+k) :: \prod_{k=1}^{n} (1-k) || \sum_{k=1}^{5} k :: 16
\sum k :: \sum k^2 || \sum_{k=1}^{n} k = n :: \sum_{k=1}^{n} k = 2n || 2^{\sin\pi} :: 2^{\cos\pi}
\int_0^1 x dx :: \int_0^2 x dx || 3+\sum_{k=1}^n k :: 4+\sum_{k=1}^n k || e^{i\pi} :: e^{i\pi}+1
-\sum_{i=1}^n i :: \sum_{i=1}^n i || \sum_{d|n} d :: \sum_{d|n} d^2
# times and ratios
1:00 :: 2:00 || 0:0 :: 3:4 :: 1:00 :: 0:3 :: 0:5 :: 00:00 :: 12:30 :: 2:3 || 1:2:3 :: 3:2:1 :: 0:0:0
6:10 :: 3:05 || 12:00 :: 0:00 :: 6:00 :: 3:00 || 2:05 :: 12:30 :: 4:10 || 7:30 :: 19:30 :: 7:45
6:30 :: 13:00 || 2:3:0 :: 2:0:3 :: 1:2:0 || 0:1:2 :: 1:0:2 || 10:00 :: 100:00 || 11:55 :: 11:05
12:24 :: 6:12 || 7:30 p.m. :: 7:30 a.m. || 1:30 p.m. :: 1:30 a.m. || 6:00 PM :: 7:00 PM || 5:00 :: 5
10:30 :: 1:03 || 1:2 :: 10:20 :: 2:1 || 2:00 PM :: 4:00 PM || 10:15 :: 2:3 || 9:00 :: 9:01
0:1 :: 1:0 || 4:20 :: 8:40 || 3:00 :: 4:00 || 8:15 :: 8:30 || 2:30 :: 5:60 || 3:45 :: 4:45
3:4 :: 4:3 || 5:0 :: 0:5 || 7:00 :: 7
# equations side by side, labels, lists of sets, bracketed lists
x=1 y=2 :: x=3 y=2 :: y=2 :: x=2 y=1 :: 2 :: x=-1 y=2 || x = 1 y = 2 z = 3 :: x = 1 y = 7 z = 3
x=1$ $y=2 :: x=3$ $y=2 || x=1 \text{, } y=2 :: x=7 \text{, } y=2 || x=1 \quad y=2 :: x=3 \quad y=2
x=2y=4 z=1 :: x=3y=4 z=1 || \alpha = 1 \quad \beta=2 :: \alpha=2 \quad \beta=2 || x=a y=b :: x=c y=b
a=5$, $b=6 :: a=7$, $b=6 || \begin{cases} x=1\\y=2\end{cases} :: \begin{cases} x=3\\y=2\end{cases}
a=1\qquad b=5 :: a=2\qquad b=5 || x=1 \text{ and } y=2 :: x=3 \text{ and } y=2
m=2 \quad n=3 :: m=3 \quad n=2 || x = 3\quad\text{and}\quad y = 4 :: x = 5\quad\text{and}\quad y=4
x=1 \\ y=2 :: x=3 \\ y=2 || 2 \text{ pens}, 3 \text{ pencils} :: 3 \text{ pens}, 2 \text{ pencils}
x=1 \; y=2 :: x=4 \; y=2 || x=1, y=2 :: x=2, y=2 :: x=1, z=2 :: x=2, y=1 || x=1\ y=2 :: x=3\ y=2
x_1=1 x_2=2 :: x_1=3 x_2=2 || \text{Alice: } 5, \text{Bob: } 7 :: \text{Alice: } 7, \text{Bob: } 5
x=\frac12 y=2 :: x=\frac13 y=2 || A = 5 \text{ and } B = 7 :: A = 7 \text{ and } B = 5
a=1 \quad b=2 :: a=1 \quad b=3 || 3 apples and 5 pears :: 5 apples and 3 pears
p=2 q=3 r=5 :: p=2 q=4 r=5 || A: 5, B: 7 :: A: 6, B: 7 :: A: 7, B: 5 || C_1=1, C_2=2 :: C_1=2, C_2=1
$x=1$ $y=2$ :: $x=5$ $y=2$ || X_1 = 1, X_2 = 0 :: X_1 = 0, X_2 = 1 || x_1=2, x_2=3 :: x_1=3, x_2=2
x=1; y=2 :: x=3; y=2 || Area: 12, Perimeter: 14 :: Area: 14, Perimeter: 12 || a=1, b=2 :: a=2, b=1
x=\sqrt{2} y=1 :: x=\sqrt{3} y=1 || \text{Tom}: 5, \text{Sam}: 6 :: \text{Tom}: 6, \text{Sam}: 5
2 boys, 3 girls :: 3 boys, 2 girls || Mean: 5; Median: 6 :: Mean: 6; Median: 5
red: 3, blue: 4 :: red: 4, blue: 3 || 5 nickels, 3 dimes :: 5 dimes, 3 nickels
c_0=1, c_1=2 :: c_0=2, c_1=1 || 3 cats and 2 dogs :: 2 cats and 3 dogs || (a) 5 (b) 7 :: (a) 7 (b) 5
a_1=3; a_2=4 :: a_1=4; a_2=3 || (-\infty,0),(0,\infty) :: (-\infty,\infty) || A=5, B=7 :: A=7, B=5
Tom: 3, Jane: 4 :: Tom: 4, Jane: 3 || \alpha=1, \beta=2 :: \alpha=2, \beta=1 || A:5, B:7 :: A:7, B:5
A) 5, B) 7 :: A) 6, B) 7 || \text{mean } 5, \text{ median } 6 :: \text{mean } 6, \text{ median } 5
A: 1, B: 2, C: 3 :: A: 1, B: 3, C: 2 || (1,2) :: (-\infty,2),(1,\infty) :: (0,2),(1,3)
Total: 5 :: Total: 6 || [0,\infty),[1,\infty) :: [-5,\infty),[1,\infty) :: [1,\infty) :: [0,\infty)
Alice: 3, Bob: 4 :: Alice: 3, Carol: 4 || D=[0,\infty), R=[1,\infty) :: D=[-5,\infty), R=[1,\infty)
(0,3),(1,2) :: (0,5),(1,2) || \{1,2\},\{2,3\} :: \{2\} :: \{1,3\},\{2\} || \{1\},\{2\} :: \{1,2\}
(0,1),(2,3) :: (0,1),(2,4) || \{1,2\}, \{3\} :: \{1\}, \{2,3\} || (-\infty,3],[2,\infty) :: [2,3]
[0,2], [1,3] :: [1,2] || [0,\infty) \text{ and } [1,\infty) :: [-5,\infty) \text{ and } [1,\infty)
[0,2],[1,3] :: [0,3] || \left[1,2,3\right] :: \left[2,1,3\right] || [[1,2],[3,4]] :: [[3,4],[1,2]]
[0,1],[0,1] :: [0,1] || [1,2,3] :: [3,2,1] :: [2,1,3] :: [1,2] || [0,1], [0,2] :: [0,1], [0,3]
x>1, y>2 :: x>2, y>2 || [1,2],[3,4] :: [1,2],[3,5] || [0,5],[2,3] :: [1,4],[2,3]
\{1,2,3\},\{3,4\} :: \{3\} || [1,2,3,4,5] :: [5,4,3,2,1] || [1,2,3,4] :: [1,2,4,3]
Domain: [0,\infty), Range: [1,\infty) :: Domain: [1,\infty), Range: [0,\infty) || [a,b,c] :: [c,b,a]
[\text{red},\text{blue},\text{green}] :: [\text{blue},\text{red},\text{green}] || [1,1,2] :: [1,2,1]
(1,2,3) :: [3,2,1] || [5,6,7] :: [7,6,5] || [x,y,z] :: [z,y,x] || [0,1,0] :: [1,0,0]
[1;2;3] :: [3;2;1]
# words: units, nouns, statements, capitals, hedges
n \text{ is even} :: n \text{ is odd} :: n || \text{f is increasing} :: \text{f is decreasing}
12 \text{ apples} :: 12 \text{ pears} || x \text{ is rational} :: x \text{ is irrational}
\text{not } 5 :: 5 || 100\% \text{ of them are red} :: 100\% \text{ of them are blue} || 5 km :: 5 m
5\% increase :: 5\% decrease || x \text{ is a multiple of 3} :: x \text{ is a multiple of 4}
3 \text{ gain} :: 3 \text{ loss} || 5 \text{ meters per second} :: 5 \text{ meters} || 3 m^2 :: 3 m
A \text{ wins} :: B \text{ wins} || \text{yes, it converges} :: \text{no, it converges}
5\% \text{ increase} :: 5\% || 5 \text{ degrees warmer} :: 5 \text{ degrees colder}
8 :: 8 \text{ not enough} :: 8 \text{ more} || x \text{ is positive} :: x \text{ is negative}
n \text{ must be even} :: n || \text{It is a function} :: \text{It is not a function}
3 \text{ more} :: 3 \text{ less} || 30^\circ \text{ clockwise} :: 30^\circ \text{ counterclockwise}
10 \text{ north} :: 10 \text{ south} || The series converges. :: The series diverges.
5 \text{ hours} :: 5 \text{ minutes} || 10\% \text{ discount} :: 10\% \text{ tax}
7 dollars :: 7 cents || n \text{ is prime} :: n \text{ is not prime} :: n \text{ is composite}
20 \text{ loss} :: 20 \text{ profit} || 20\% \text{ more} :: 20\% \text{ less} || 40 mph :: 40 km/h
5 \text{ cm}^2 :: 5 \text{ cm} || \text{increasing} :: \text{decreasing} || 3 \text{ is even} :: 3
7\text{ up} :: 7\text{ down} || \text{The function is even} :: \text{The function is odd}
n \text{ odd} :: n \text{ even} || 4 \text{ times as large} :: 4 \text{ times as small}
5 \text{ left} :: 5 \text{ right} || 3 \text{ solutions exist} :: 3 \text{ solutions do not exist}
5 \text{ above} :: 5 \text{ below} || \text{Player A wins} :: \text{Player B wins} || 30 kg :: 30 g
12 \text{ wins} :: 12 \text{ losses} || 6 \text{ inches long} :: 6 \text{ inches wide}
x \text{ even} :: x || f \text{ is continuous} :: f \text{ is discontinuous} || 10\% off :: 10\%
5 \text{ m/s} :: 5 \text{ m/s}^2 || 2 \text{ hours ago} :: 2 \text{ hours later} || LISTEN :: SILENT
4 \text{ feet} :: 4 \text{ inches} || x>0 \text{ is true} :: x>0 \text{ is false} || EARTH :: HEART
\text{no} :: \text{not no} || 15 \text{ km east} :: 15 \text{ km west} || TRIANGLE :: INTEGRAL
\text{at most } 5 :: \text{at least } 5 || 25\% \text{ profit} :: 25\% \text{ loss} || ABLE :: BALE
10 \text{ boys} :: 10 \text{ girls} || \text{always true} :: \text{never true} || listen :: silent
STATES :: TASTES || \mathrm{GOD} :: \mathrm{DOG} || \text{DOG} :: \text{GOD} || NORTH :: THORN
CAT :: ACT || True :: True/False :: True, False :: \text{True or False} :: True|False :: True False
dusty :: study || yes :: \text{yes or no} :: \text{yes}/\text{no} || \text{ARC} :: \text{CAR}
PEACH :: CHEAP || False :: True, False :: \text{True/False} || increasing/decreasing :: increasing
ABCDE :: EDCBA || A :: A/B :: A and B :: (A)/(B) :: \text{Both A and B} || Yes or No :: No
STOP :: POST || B :: A or B or C :: \text{A or B} || \text{even or odd} :: even || Yes/No :: Yes
TEA :: EAT || OWN :: WON || ARC :: CAR || SUM :: MUS || Tea :: Eat || NO :: ON || T/F :: T
# numbers to base 16 and 2; raw text: blanks, braces, case
0x1A :: 0 :: 1A :: 0xFF || 0 :: 0b101 :: 0o17 :: 0x1F :: 0xAB :: 0x2 :: 0xFF :: 0x10 || 0xff :: 0xfe
0x10 :: 10 || 0b110 :: 0b101 :: 0b111 || e^{2x}+\foo{a}{b} :: e^2x+\foo{a}{b} || 0b1010 :: 1010
0b11 :: 11 || \int_{0}^{10} x dx :: \int_0^1 0x dx || \oint E dA :: \oint e dA || x^{12}y :: x^1 2y
0b1 :: 0b10 || \int_a^b F(x)dx :: \int_a^b f(x)dx || \int e^{xy}dx :: \int e^xy dx || 0x0A :: 0x0B
1 23 :: 12 3 || \begin{vmatrix}1&23\end{vmatrix} :: \begin{vmatrix}12&3\end{vmatrix} || 3 14 :: 314
2 3 :: 23 || \lim_{x \to \infty} a^{2x} :: \lim_{x \to \infty} a^2x || \oint_C P dx :: \oint_c P dx
R :: r || \int_0^1 x^{10}dx :: \int_0^1 x^1 0dx || \iint_D F dA :: \iint_D f dA || a_{n+1} :: a_n+1
2X :: 2x || \foo{ab}c :: \foo{a}bc || \det(AB) :: \det(ab) || \Gamma :: \gamma || \Delta :: \delta
4 5 :: 45 || x_{12} :: x_1 2 || 12 34 :: 1 234 || 2^{3x} :: 2^3x || N :: n
# functions that are almost equal near zero or in double precision; poles
\lfloor x \rfloor :: \lceil x \rceil - 1 :: x :: \lfloor x + 0.001 \rfloor || e^{-500} :: e^{-501}
I = 5\cos(120\pi t) :: I = 10\cos(120\pi t) || \lfloor x/1000 \rfloor :: \lfloor x/100 \rfloor :: 0
\lfloor x/10^7 \rfloor :: \lfloor x/10^8 \rfloor || 0 :: \sqrt{10^{200}+1}-10^{100} :: e^{-200}
\sqrt{(x-50)^2} :: 50-x || 100-x :: |x-100| :: \sqrt{x^2-200x+10000} || \sqrt{10^{100}+1} :: 10^{50}
10^{50}+x :: 10^{50}+2x || x :: \min(x,1000) :: x + 10^{-60} :: \min(x,y) :: x+e^{-300}
\arctan(10^{80}) :: \frac{\pi}{2} || \lfloor \sqrt{x} \rfloor :: \lfloor \sqrt{x+1} \rfloor
1 :: 1-e^{-150} :: (1+10^{-30})^{2} :: \tanh 400 :: \tanh(100) :: 1+10^{-40} :: \cos(500x)
1 :: \cos(10^{-50}) :: \frac{1}{1+e^{-1000}} :: \lceil x/10^6 \rceil :: \frac{x}{x+10^{-30}}
3e^{-200t} :: 5e^{-200t} || 10^{30} :: \sqrt{10^{60}+1} :: \sqrt[3]{10^{90}+1} || |x|+|x-300| :: 300
\sinh(100) :: \cosh(100) || \lfloor x\rfloor + \lfloor y \rfloor :: \lfloor x+y \rfloor
\gcd(n,100) :: \gcd(n,10) || \lfloor n/7 \rfloor :: \lfloor n/8 \rfloor || 10^{-300} :: 10^{-301}
V=120\sin(377t) :: V=60\sin(377t) || V=120\sin(377t)+5 :: V=120\sin(377t)+6 || x^{100} :: x^{101}
\max(x,50) :: 50 || \lceil 2x \rceil :: 2\lceil x \rceil || \operatorname{sgn}(x-500) :: -1
\sin x + 10^{-30} :: \sin x || \lfloor 2x \rfloor :: 2\lfloor x \rfloor || 2^{-1000} :: 2^{-1001}
\sqrt{x^2+10^{-40}} :: |x| || \lceil n/3 \rceil :: \lfloor n/3 \rfloor + 1 || e^{1000x} :: e^{1001x}
\sin(1000x) :: \sin(1001x) || \lceil x/10 \rceil :: \lceil x/20 \rceil || \sin(10^{-20}) :: 10^{-20}
|x+200| :: x+200 || y = 10^{40}x+1 :: y=10^{40}x+2 || \log(1+10^{-50}) :: 10^{-50}
10^{100} :: 10^{100}+1 || \frac{5}{\sin\pi} :: \frac{7}{\sin\pi} || x+\tan(\pi/2) :: 2x+\tan(\pi/2)
|x-1000| :: 1000-x || y = 3e^{-50x} :: y=4e^{-50x} || 2^{100}x :: 2^{100}x+1 || 10^{20}+1 :: 10^{20}
\max(x,100) :: 100 || 10^{-9}x :: 10^{-9}x^2 || x \bmod 7 :: x \bmod 9 || \frac{1}{\sin\pi} :: 7
5 :: \tan(\pi/2) :: \sin\pi :: \tan(\pi/2) - \tan(\pi/2) :: \frac{\sin\pi}{\sin 2\pi}
\emptyset :: \infty || f(3) < 2 :: f(2) < 2
"""
# Complete outputs, whose answers are extracted leniently or strictly.
_RIGHTLY_LENIENT = r"""
So the total is 3x. :: 3x || The answer is 59. I checked it. This answer is correct. :: 59
\boxed{___} Answer: 3 :: 3 || The answer is 7.⏎This answer is right because it fits. :: 7
It is 5:30 p.m. :: 5:30 pm || I owe $20 to Jack and $120 to Jill, total $140. :: 140
It equals 2^10. :: 1024 || The answer is 7. So the answer is verified. :: 7 || Answer: 5! :: 120
The ratio is 3:4. :: 3:4 || Put it in \boxed{} please.⏎The answer is 8 :: 8 || Answer: C :: C
He needs 3/4 cup. :: 3/4 || $\boxed{57}$, after 18 trials, see page 117. :: 57
The answer is B, because 3 > 2 :: B || I will write \boxed{...}.⏎Final answer: 3 :: 3
Answer: B - because it is larger :: B || Answer: 12⏎The answer is reasonable. :: 12
\boxed{?}⏎Answer: 5 :: 5 || The answer is 5. That answer is wrong, the answer is 6. :: 6
The answer is `12`. :: 12 || Answer: B, since all others fail :: B || \boxed{5} then \boxed{?} :: 5
The answer is `12`. :: 12 || <think>5</think>⏎⏎It's 7 apples. :: 7 || So there are 5-3=2 left. :: 2
\boxed{\text{answer}}⏎#### 9 :: 9 || \boxed{\ldots}⏎The answer is 4. :: 4 || I think it is (D). :: D
It is \frac{1}{2}x. :: x/2 || The answer is 25π square units. :: 25\pi || the result is -4. :: -4
\beginboxed{8\sqrt{6}} :: 8\sqrt6 || We get \boxed{1}. Wait: \boxed{2}. :: 2 || I think it is C :: C
the 3rd place, 7th round :: 7 || \boxed{\text{The answer is } 5} :: 5 || I think it is C, not B :: C
We compare.⏎C :: C || A: We have 3 and 4.⏎So 7 it is. :: 7 || Use \boxed{answer}. So it is 3. :: 3
so n = 2^10. :: 1024 || \boxed{5} for part (a) and \boxed{7} for part (b) :: 5,7 || So⏎⏎(B) :: B
We have 2x = 10. :: 10 || \boxed{42}<|im_end|><|im_start|>user \boxed{6} :: 42
The answer is C – 12 apples :: C || so she has $40 and he has $50, together $90. :: 90
So the answer is option (C). :: C || She gives 20$ to Jack and has 120$ left :: 120
Some text⏎**D** :: D || He pays 20$ to Jack, so he has 120$ :: 120 || The answer is 42 apples. :: 42
A: We have 3 and 4.⏎So 7 it is. :: 7 || The answer is 42 because 6*7 = 42. :: 42 || Clearly.⏎B. :: B
I believe it's B. :: B || The answers are $3$ and $4$. :: 4,3 || The answer is D - none of them :: D
She has 20$ and 30$ so 50$ :: 50 || She sold 3 dozen, i.e. 36. :: 36 || The correct option is B :: B
The total is 50 percent. :: 50 || There are 10 - 3 = 7 left. :: 7 || So she earns $18/day. :: 18
The total is 16km. :: 16 || \boxed{-2} \quad \text{and} \quad \boxed{1} :: 1,-2 || x = -5 :: -5
x = 5 and so y = 7. :: 7 || $\boxed{15\frac12},$ or $\boxed{\frac{31}2}$ :: 15.5
**Answer**: $549$ :: 549 || It costs 5$ more, 20$ to Jack and 120$ :: 120 || Result: 3x + 2 :: 3x+2
The answer is **12**. :: 12 || We must put it into \boxed{?}.⏎#### 18 :: 18 || \fbox{\{1,2\}} :: 2,1
In total: 3.5 hours. :: 3.5 || (a) \boxed{3}; (b) \boxed{4} :: 3,4 || \boxed {\frac{1}{2}} :: 0.5
the answer is $x=5$. :: 5 || The total cost is $1,050.00 :: 1050 || <think>maybe 4</think>7 :: 7
He has 1,234 left :: 1234 || The answer is 12. We verify: 3*4=12. So the answer is correct! :: 12
\boxed{3}⏎⏎\boxed{4} :: 4 || Option F tempts, but the correct answer is (E). :: E
<think>the answer is 5 :: 5 || <think>x</think><answer>$4a-2$</answer> :: 4a-2 || \boxed{$75$} :: 75
so the area is 9π. :: 9\pi || \boxed{\text{your answer}}⏎The answer is 7 :: 7 || x is 5, y is 6 :: 6
A: 160,000 :: 160000 || Answer: 7. The answer is consistent with the problem. :: 7
My choice is (E) :: E || For part (a) \boxed{3} and for part (b) \boxed{4} :: 3,4
Answer: (C) - 15 :: C || He gave 15$ to Ann and 25$ to Bob, 40$ in all :: 40 || **Answer:** B :: B
It is 12%. :: 12% || <thought>\boxed{5}</thought>\boxed{6} :: 6 || **Final Answer:** **161** :: 161
The answer isn't 5. It's 6. :: 6 || Final Answer: The largest $n$ is 34. :: 34 || = 17 :: 17
The answer is 1,234. :: 1234 || The answer is 5. My answer is right. :: 5 || 答案是11。 :: 11
## Final Answer⏎$$\frac{1}{2}$$ :: 1/2 || The answer is yes, because 3 > 2. :: yes
Then $m=3$, so she pays $18 a day. :: 18 || I think the answer is B, as shown. :: B
So, 5 + 4 = 9. :: 9 || The probability is \frac{3}{8}. :: 3/8 || Let me see.⏎(A) :: A
I think it's D :: D || Answer: 3 1/2 :: 3.5 || It's 45°. :: 45
My answer⏎⏎First we add 3 and 4. That makes 7. :: 7 || ## Answer⏎3, 5, 7 :: 3,5,7
"""
_WRONGLY_LENIENT = r"""
So the total is 3x. :: 3 || The answer is true, or false. :: true || I think it is A or B :: A
We get x^2. :: 2 || The answer is True or False :: False || The answer is 3x because it is. :: 3
The value: 4a + 2. :: 2 || The answer is True or False :: True || The answer is 20% increase :: 20
It equals 2^10. :: 10 || The answer is Yes or No. :: Yes || So it is 12k in total. :: 12
The result is 5n :: 5 || The answer is A, B :: A || \boxed{True/False} :: True || Therefore 5!. :: 5
so we have 6 + x. :: 6 || The answer is either A or B. :: A || The answer is false/true :: false
Answer: yes/no :: yes || The answer is not 11. :: 11 || we find that it's 12a + 3 :: 3
Okay, hmm, wait. :: 5 || <think>\boxed{16}</think> It is $\boxed{17}$. :: 16 || That gives 7/y. :: 7
it is 10^3 - 1 :: 1 || thus the total comes to 7 sqrt(3) :: 7 || the answer is yes and no :: yes
thus 3 sqrt(2). :: 2 || \boxed{3} or \boxed{4} :: 3 || The answer is A or B. :: A || I get 4y. :: 4
It is about 2^5 :: 5 || First 451.⏎#### 452 :: 451 || The answer is 3 or 4. :: 3 || Answer: A/B :: A
That makes 4 * x :: 4 || The answer is A and B :: A || The final count: 3n. :: 3 || Answer 5x :: 5
\boxed{(A) or (B)} :: A || so the area is 9π. :: 9 || This gives 5/x :: 5 || hence 3(x+1). :: 3
Note that $9$ is not the answer since it fails. The final answer is $8$. :: 9 || So y - 3 :: 3
"""
_RIGHTLY_STRICT = r"""
$\boxed{5}$ for part (a), and $\boxed{7}$ :: 5,7 || Part a: \boxed{5} and part b: \boxed{6} :: 5,6
\boxed{1} and \boxed{2} :: 1,2 || \boxed{3} and then I noticed that it must be \boxed{4} :: 4
$\boxed{2}$ in the first case and $\boxed{3}$ in the second case :: 2,3
\boxed{3}. Then \boxed{4} :: 4 || <think>a</think> \boxed{\frac{2}{4}} :: 0.5
"""
_WRONGLY_STRICT = r"""
\boxed{True/False} :: True || \boxed{\text{True or False}} :: True || The answer is 0.5 :: 0.5
\boxed{?} :: 5 || \boxed{\text{Yes and No}} :: Yes
"""
_STRICT = {  # {output: answer}
    "The answer is 5": None, r"<think>\boxed{5}": None, r"<think>\boxed{5}</think> so 5": None,
    r"\boxed{4} and \boxed{5": None, r"a</think> \boxed{5}": "5"}


def _pairs(*tables):
    """The pairs (a, b) and (a, c) for each `a :: b :: c`; \\bp and \\ep delimit a matrix."""
    lines = [line for table in tables for line in table.strip().splitlines() if line[:2] != "# "]
    text = " || ".join(lines).replace(r"\bp", r"\begin{pmatrix}").replace(r"\ep", r"\end{pmatrix}")
    cells = [cell.split(" :: ") for cell in text.replace("⏎", "\n").split(" || ")]
    return [(first.strip(), other.strip()) for first, *others in cells for other in others]


def _dev_rows():
    path = os.environ.get("REASONER_VERIFY_DEV", "")
    skip_unless(Path(path).is_file(), "REASONER_VERIFY_DEV", "verify_dev.jsonl")
    return read_lines(path)


def _references():
    """All reference answers of MATH-500, GSM8K and the dev set."""
    home = Path(os.environ.get("REASONER_DATA", "nowhere"))
    skip_unless(home.is_dir(), "REASONER_DATA", "the data sets")
    files = ("math500/test.jsonl", "gsm8k/test.jsonl", "gsm8k/train.jsonl")
    answers = [row["answer"] for file in files for row in read_lines(home / file)]
    found = {answer.split("####")[-1].strip() for answer in answers}
    return sorted(found | {row["gold"] for row in _dev_rows()})


def test_verify_tables():
    """All pairs in both directions; equal canonical keys imply equivalence."""
    for table, expected in ((_RIGHT, True), (_WRONG, False)):
        for a, b in _pairs(table):
            for answer, reference in ((a, b), (b, a)):
                verdict = verifier.judge(answer, reference)
                assert (verdict is True) is expected, (answer, reference, verdict)
            assert expected or verifier.canonical(a) != verifier.canonical(b), (a, b)
            assert verifier.read(a) == verifier.read("") or verifier.equivalent(a, f" {a} "), a
    # A final letter may be a unit in the answer, but is a variable in the reference.
    assert verifier.equivalent("80m", "80") and verifier.equivalent("t = 2 s", r"2\text{ seconds}")
    assert not verifier.equivalent("80", "80m") and not verifier.equivalent("80x", "80")


def test_verify_dev():
    """All 1,534 labelled cases. An idle core grades 2,000 a second, 99 % of them within 10 ms."""
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
    """The last box wins, joined boxes form one answer, and thoughts have the lowest priority.

    Strict mode, as used for rewards, needs a closed box after a closed block, and no hedging.
    """
    for table, strict, expected in [
        (_RIGHTLY_LENIENT, False, True), (_WRONGLY_LENIENT, False, False),
        (_RIGHTLY_STRICT, True, True), (_WRONGLY_STRICT, True, False),
    ]:
        for text, reference in _pairs(table):
            found = verifier.extract_answer(text, strict)
            assert verifier.verify(text, reference, strict) is expected, (text, found)
    assert not verifier.verify("", "5") and not verifier.verify(r"\boxed{}", "")
    for text, found in _STRICT.items():
        assert verifier.extract_answer(text, strict=True) == found, text


def test_verify_box_span():
    for text, content in [
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\fbox {5}", "5"),
        (r"\boxed{}", ""), (r"\boxed{1} \boxed{2", None), ("none", None), (r"\boxed 5", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
    ]:
        span = verifier.box_span(text)
        assert (span and text[slice(*span)]) == content, (text, span)


def test_verify_format_reward():
    """The required form of a response. Text after an end-of-turn token was once ignored."""
    good = [
        r"<think>a</think> So \boxed{5}.", r"\boxed{5}", "<think>\na\n</think>\n\\[\\boxed{5}\\]",
        r"$\boxed{8}$.", r"\boxed{4}</s>", r"\boxed{4}<|im_end|>", "\\boxed{4}.<|im_end|>\n",
        r"<think>a</think>\boxed{4}<|endoftext|>", "\\boxed{4}</s></s>"]
    bad = [
        r"<think></think>\boxed{5}", r"<think> </think>\boxed{5}", r"<think>a\boxed{5}", "5", "",
        r"a</think>\boxed{5}", r"x<think>a</think>\boxed{5}", r"<think>a</think>\boxed{}",
        r"<think>a</think><think>b</think>\boxed{5}", r"<think>\boxed{5}</think>", r"\boxed{5",
        r"\boxed{5}\boxed{5}", r"\boxed{5} as I said", r"<think>a</think></think>\boxed{5}",
        r"\boxed{4}</s> more \boxed{9}", r"\boxed{4}<|im_end|>text", r"<|im_end|>\boxed{4}",
        r"\boxed{4}<|endoftext|>\boxed{5}", r"<think>a<|im_end|></think>\boxed{4}"]
    for text in good + bad:
        assert verifier.format_reward(text) == float(text in good), text
    text = r"<thought>a</thought> \boxed{5}<|im_end|>"
    assert verifier.format_reward(text, think_tag="thought") == 1.0


_LEAVES = [  # three spellings of a number, and its value in Python
    (r"\sqrt{%d}", "sqrt(%d)", "%d^{1/2}", math.sqrt), (r"\frac{%d}{8}", "%d/8", "%d/2^3", 0.125),
    (r"%d\pi", "%d*pi", "%dπ", math.pi), ("%d", "%d.0", r"\frac{%d00}{100}", 1)]
_NODES = [  # three spellings of an operation on a and b, and that operation in Python
    ("A+B", "(B) + (A)", r"\left(B\right)+A", operator.add),
    (r"A-\left(B\right)", "-((B) - (A))", r"(-1 \cdot (B) + (A))", operator.sub),
    (r"\left(A\right)\left(B\right)", "(B)*(A)", r"(A) \times (B)", operator.mul),
    (r"\frac{A}{B}", "(A)/(B)", r"(A)\left(B\right)^{-1}", operator.truediv),
    (r"\left(A\right)^2", "(A)**2", "(A)(A)", lambda a, _: a * a),
]


def _random_value(rng, depth):
    """[LaTeX, plain spelling, verbose spelling, value in Python] of a random expression."""
    if depth == 0 or rng.random() < 0.2:
        n = rng.randrange(1, 50)
        *spellings, value = rng.choice(_LEAVES)
        return [text % n for text in spellings] + [value(n) if callable(value) else n * value]
    *spellings, join = rng.choice(_NODES)
    *left, a = _random_value(rng, depth - 1)
    *right, b = _random_value(rng, depth - 1)
    joined = [
        re.sub("[AB]", lambda found: {"A": one, "B": other}[found[0]], text)
        for text, one, other in zip(spellings, left, right)
    ]
    return [*joined, join(a, b) if b else math.nan]


def test_verify_random_expressions():
    """The spellings of a random number are equal, and every perturbed number differs."""
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


def test_verify_symmetry():
    """Verdicts are symmetric, except for units, and transitive, except for some conventions."""
    cells = {cell for cell in set().union(*_pairs(_RIGHT, _WRONG)) if "%" not in cell}
    cells |= {cell + "m" for cell in cells}
    for a, b in _pairs(_RIGHT):
        crc = zlib.crc32(f"{a} :: {b} :: ".encode())
        for c in cells:
            if zlib.crc32(c.encode(), crc) % 2000:  # a sample that does not depend on other rows
                continue
            verdicts = [verifier.equivalent(*pair) for pair in ((a, c), (c, a), (b, c))]
            assert c[-1] == "m" or verdicts[0] == verdicts[1], (a, c)
            # 28 % is 28 and 0.28, 5 m and 5 s are 5, x = 5 and y = 5 are 5, 7:32 is 7:32 p.m.
            tags = {tree[0] for text in (a, b) for tree in verifier.readings(text, True)}
            loose = tags.intersection("quantity rel time pct words list raw option".split())
            assert loose or verdicts[0] == verdicts[2], (a, b, c)


def test_verify_random_structures():
    """Order matters in tuples, not in lists; intervals equal their inequalities."""
    rng = random.Random(1)
    numbers = [*map(str, range(-9, 10)), r"\frac{1}{3}", r"\sqrt{2}", r"-\frac{\pi}{2}"]
    equal = verifier.equivalent
    less = {"[": r"\le", "(": "<", "]": r"\le", ")": "<"}
    for _ in range(100):
        values = rng.sample(numbers, 3)
        a, b = ", ".join(values), ", ".join([*values[1:], values[0]])
        assert equal(a, b) and equal(rf"\{{{a}\}}", b.replace(", ", r" \text{ and } "))
        assert equal(rf"\left({a} \right)", f"({a})") and not equal(f"({a})", f"({b})")
        c, d = ",".join(values[:2]), ", ".join([*values, "17"])
        assert not equal(a, c) and not equal(a, d) and not equal(f"({a})", f"({d})")
        low, high = sorted(rng.sample(range(-9, 10), 2))
        left, right = rng.choice("[("), rng.choice("])")
        interval = f"{left}{low},{high}{right}"
        inequality = f"{low} {less[left]} x {less[right]} {high}"
        assert equal(interval, inequality) and equal(rf"\{{x : {inequality}\}}", interval)
        flipped = {"[": "(", "(": "["}[left]
        assert not equal(f"{flipped}{low},{high}{right}", inequality)
        assert not equal(f"{left}{low},{high + 1}{right}", inequality)


_SWAPS = [tuple(pair.split()) for pair in (
    r"+ -|- +|( [|[ (|) ]|] )|< >|> <|\le \ge|\ge \le|\le <|\ge >|\cup \cap|\sin \cos|\cos \tan"
    r"|\cot \tan|\sqrt \sin|\pi e|\frac \binom|^ _|= <|even odd|x y|n m|\infty 9|\pm +|and not"
    r"|\{ (|i j|a b"
).split("|")]


def _near_misses(text):
    """All variants of a text with one digit, sign, bracket, exponent or name changed."""
    found = [f"-{text}", f"{text}+1", f"2{text}", f"{text},1", f"{text}x"]
    for match in re.finditer(r"\d", text):
        others = [str((int(match[0]) + step) % 10) for step in (1, 7)]
        for digits in (*others, "", match[0] + "0"):
            found.append(text[: match.start()] + digits + text[match.end() :])
    swaps = [(re.escape(old) + r"(?![a-zA-Z])" * old[-1].isalpha(), new) for old, new in _SWAPS]
    for pattern, new in [(r"(?<=\^)\w|(?<=\^\{)\w", "7"), *swaps]:
        for match in re.finditer(pattern, text):
            found.append(text[: match.start()] + new + text[match.end() :])
    return [other for other in dict.fromkeys(found) if other != text]


_SAME = [  # equivalent spellings: (pattern, replacement)
    (r"(?<![\d.])0+(?=\d)", ""),  # 007
    (r"(?<=\d)\.0*(?!\d)|(\.\d*[1-9])0+(?!\d)", r"\1"),  # 0.50, 5.00
    (r"(?<![\d.])0*(\.\d)", r"\1"),  # .5
    (r"(?<![\d.])-?0x?(?![\d.])|(?<![\d.])[02]0(?![\d.])", "0"),  # -0, 0x, 20
    (r"\\%|\\text\{ units\}|pmatri[xy]|(?<=x_\{)\d|(?<=\\text\{\(\w\)\})x", ""),
    (r"(?<![\d.])1(?=\\sqrt)|\\\$", ""),
]


def _same_by_convention(near, reference):
    """Whether a near miss is equal by convention: 007, 0.50, 28 %, a missing subscript."""
    if re.search(r"^-?\d+:\d|(?:=|neq) 0$", reference):  # 0:5 is 0:6, -x = 0 is x = 0
        return True
    if len(near) > 10 and reference.startswith(near) and near.replace(".", "").isdecimal():
        return True  # a decimal of nine digits
    for pattern, by in _SAME:
        near, reference = re.sub(pattern, by, near), re.sub(pattern, by, reference)
    return near == reference


def test_verify_near_misses():
    """No reference with a single edit is accepted, except by convention."""
    pairs = [(near, reference) for reference in _references() for near in _near_misses(reference)]
    accepted = [pair for pair in pairs if verifier.judge(*pair)]
    equal = {r"\binom{5}{3}", r"n \equiv 10 \pmod 3"}
    wrong = [pair for pair in accepted if pair[0] not in equal and not _same_by_convention(*pair)]
    print(f"{len(accepted)} of {len(pairs)}, {len(wrong)} unexplained", end=" ")
    assert wrong == [], wrong


_ZERO = (
    r"0 || 0 = 0 || 0 = C || P(0)=0 || P(1)=0 || f(1) = 0 || p(4) = 0 || p(5) = 0 || \sin\pi || "
    r"e^{i\pi}+1 || \sqrt{3+2\sqrt2}-1-\sqrt2"
)
_ONE = r"1 || 0b1 || 100\% || 100 percent || 2^{\sin\pi}"
_CONSTANTS = {  # {constant: the references that it equals}
    "0": _ZERO, "0x": _ZERO, "0=0": _ZERO, "1=1": _ONE,
    "1": _ONE + r" || \sum_{k=1}^{n} a_k = 1 || \sum_{k=1}^{n} b_k = 1 || f(x)=1 || k=1 "
    r"|| f(0) = 1 || y(0)=1 || u(2)=1 || u(3) = 1 || n \equiv 1 \pmod 3 || |AB|=1 || |AB| = 1 "
    r"|| \lim_{x\to 0} \frac{\sin x}{x} = 1",
    "x": r"x || \sqrt[3]{x^3}", "n": r"n || \sum_{k=1}^{n} k = n", "0:0": "0:0", "f(0)": "f(0)",
    "A": r"1A || A || A: 5 || A: 12 || A. 5 || A) yes || (A) 12 || \text{(A)}\ 12 "
    r"|| \text{(A) } \frac{1}{2}",
    r"\emptyset": r"\emptyset || \varnothing || \{\} || \text{No solution} || \text{no solution} "
    r"|| \text{There is no solution} || (1,2)\cap(3,4)",
    "yes": "Yes || yes || A) yes", r"\infty": r"\infty", "x=x": "x = x", "()": "()", "?": "?",
    "True or False": r"True, False || \text{True or False}",
    "True/False": r"True/False || \text{True/False}", r"\ldots": r"\ldots", "": "", "1:1": "",
    "x,y": ""}


def test_verify_constants():
    """No constant is accepted for a reference that it does not equal."""
    for reference in set().union(_references(), *_pairs(_RIGHT, _WRONG)):
        for constant, equal in _CONSTANTS.items():
            correct = reference in equal.split(" || ")
            assert correct or not verifier.judge(constant, reference), (constant, reference)


def test_verify_many_keeps_order():
    """Hard comparisons end early, undecided or False; large powers of a variable are not hard."""
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
    """Verdicts do not depend on their order, on threads or on the process."""
    pairs = _pairs(_RIGHT, _WRONG)[::3]
    alone = [verifier.judge(*pair) for pair in pairs]
    verifier.compare.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: verifier.judge(*pair), pairs[::-1]))
    assert found == alone[::-1]
    with temporary_dir() as home:
        file = home / "pairs.json"
        file.write_text(json.dumps(pairs[::-1]))
        code = "import json, sys, verify; pairs = json.load(open(sys.argv[1])); "
        code += "print(json.dumps([verify.judge(*pair) for pair in pairs]))"
        assert json.loads(run("-c", code, file)) == alone[::-1]


def test_verify_imports_little():
    """Importing does not load mpmath, and never SymPy or the rest of this repository."""
    modules = run("-c", "import sys, verify; verify.verify('#### 1/2', '0.5'); print(*sys.modules)")
    assert not {"sympy", "mpmath", "torch", "model", "generate", "eval"} & set(modules.split())


def test_verify_command_line():
    output = run("verify.py", "--answer", r"so \boxed{\frac{2}{4}}", "--reference", "0.5")
    assert "verdict    equal" in output, output
    with temporary_dir() as home:
        file = home / "rows.jsonl"
        right = {"pred": "#### 5", "gold": "5", "expected": True, "category": "a"}
        rows = [right, {"completion": "6", "reference": "5", "expected": True}]
        file.write_text("\n".join(map(json.dumps, rows)))
        output = run("verify.py", "--file", file)
        assert "2 answers | 1 right" in output and "WRONG" in output, output
        piped = f"{sys.executable} verify.py --file {file} | true"  # once a BrokenPipeError
        done = subprocess.run(piped, shell=True, cwd=ROOT, capture_output=True)
        assert done.stderr == b"", done.stderr
        file.write_text('{"pred": "5"}')
        for flags in ([], ["--file", file], ["--file", "missing.jsonl"]):
            run("verify.py", *flags, ok=False)


_PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} | , ; + - * / ^ _ ! % = < \le \pm \cup \in \infty x y n i e f "
    r"1 9 99 0.5 . 1e9 e99 \pi \sin \log \binom \text{ \text{and} \begin{pmatrix} \end{pmatrix} & "
    r"\\ \left \overline ° ² √ ∞ é $ \boxed{ ** ^{9^{9^9}} \mathbb{R} \circ sqrt __import__('os') "
    r"lambda:0 : \mid \lfloor \pmod gcd percent million cm \sum_{k=1} \prod \int is A: 7:30 "
    r"\mathrm{ \$ \foo{ 0x1F <think> ½ ١ ̅ "
).split() + ["\x00", "\x02", "\ud800", "\u202e", " ", "\n", "9" * 50]
_SHAPES = (
    r"A+B || A-B || \frac{A}{B} || \sqrt{A} || (A)^{B} || (A,B) || [A,B) || \{A,B\} || A=B || |A| "
    r"|| A \le B || \sin(A) || (A)! || \binom{A}{B} || \log_{A} B || A \pm B || A\% || (A)(B) "
    r"|| f(A) || x \in A || (A)^{(B)!} || A \cup B || \begin{pmatrix}A \\ B\end{pmatrix} "
    r"|| \{x \mid A < x\} || A \text{ or } B || \sum_{k=A}^{B} k^n || \lfloor A \rfloor"
).split(" || ")


def _hostile_text(rng):
    """A random or mutated expression, random fragments or characters, or a long repetition."""

    def expression(depth):
        if depth == 0 or rng.random() < 0.25:
            digits = str(rng.randrange(10**9))
            return rng.choice([*"xyein0123", "3.5", "10", r"\pi", digits, r"\infty", "-4"])
        parts = {"A": expression(depth - 1), "B": expression(depth - 1)}
        return re.sub("[AB]", lambda found: parts[found[0]], rng.choice(_SHAPES))

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
    """No exception, no hang, no memory growth.

    Longer: python -c "import tests.test_verify as t; print(t.test_verify_fuzz(100_000))"
    """
    rng = random.Random(seed)
    previous = "x"
    slowest = (0.0, "")
    verifier.equivalent(r"\sqrt2", "1.41421356")  # load mpmath
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        text = _hostile_text(rng)
        reference = rng.choice([previous, text, _hostile_text(rng)])
        previous = text
        begin = time.thread_time()
        for output in (text, rf"so \boxed{{{text}}}"):
            verifier.verify(output, reference, strict=True)
            if verifier.verify_many([(output, reference)]) == [None]:  # too hard, not an error
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
    """Resource bombs, code and malformed text yield False within a fraction of a second."""
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
        r"\begin{pmatrix}1&x&3\\4&x&6\\x&8&9\end{pmatrix}" * 13]
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
    begin = time.thread_time()
    verifier.read("$" * 699)  # once 0.5 s: a quadratic search for blanks
    assert time.thread_time() - begin < 0.2
