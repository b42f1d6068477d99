"""Runs the tests, in the order of the files from the ground up.

    python test_all.py                  # all
    python test_all.py verify resume    # those whose name, or whose file's name, holds one of these
    pytest                              # the same tests

Everything runs on a CPU in minutes, on the embedded tiny model or on tiny random weights. A test
that cannot run here raises `unittest.SkipTest` with its reason.
"""

import importlib
import sys
import time
import traceback
import unittest
from pathlib import Path

ORDER = ("model", "attention", "verify", "launch", "optim", "run", "data", "plan", "generate",
         "eval", "infer_scale", "refine", "view", "sft", "losses", "grpo")


def load_tests():
    """(name with its file, function) of every test. Files that ORDER does not name come last."""
    found = sorted(path.stem for path in (Path(__file__).parent / "tests").glob("test_*.py"))
    ordered = [f"test_{name}" for name in ORDER]
    tests = []
    for name in ordered + [stem for stem in found if stem not in ordered]:
        module = importlib.import_module(f"tests.{name}")
        tests += [(f"{name}.{test}", getattr(module, test)) for test in vars(module)
                  if test.startswith("test_")]
    return tests


def run_test(name, test):
    """Runs one test and prints its outcome: "passed", "failed" or "skipped"."""
    begin = time.perf_counter()
    try:
        test()
        outcome, details = "passed", ""
    except unittest.SkipTest as reason:
        outcome, details = "skipped", f": {reason}"
    except Exception:
        outcome, details = "failed", "\n" + traceback.format_exc()
    print(f"{name} ({time.perf_counter() - begin:.1f} s) {outcome}{details}", flush=True)
    return outcome


def main(words):
    tests = load_tests()
    chosen = [(name, test) for name, test in tests
              if not words or any(word in name for word in words)]
    if not chosen:
        print(f"no test has {' or '.join(map(repr, words))} in its name; there are:",
              *(name for name, _ in tests), sep="\n  ")
        return 2
    outcomes = [run_test(name, test) for name, test in chosen]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped")))
    return 1 if "failed" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
