"""Run the tests, bottom-up in the order of the files.

    python test_all.py                  # all tests
    python test_all.py verify resume    # those with one of these words in the test or file name
    pytest                              # the same tests

Everything runs on a CPU in minutes, on the embedded tiny model or on tiny random weights. A test
that cannot run on this machine raises `unittest.SkipTest` with the reason.
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
    """All tests as ("file.test", function), with files missing from ORDER at the end."""
    found = sorted(path.stem for path in (Path(__file__).parent / "tests").glob("test_*.py"))
    ordered = [f"test_{name}" for name in ORDER]
    tests = []
    for name in ordered + [stem for stem in found if stem not in ordered]:
        module = importlib.import_module(f"tests.{name}")
        tests += [(f"{name}.{test}", getattr(module, test)) for test in vars(module)
                  if test.startswith("test_")]
    return tests


def run_test(name, test):
    """Run one test, print its outcome and return it: "passed", "failed" or "skipped"."""
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
        print(f"no test name contains {' or '.join(map(repr, words))}; the tests are:",
              *(name for name, _ in tests), sep="\n  ")
        return 2
    outcomes = [run_test(name, test) for name, test in chosen]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped")))
    return 1 if "failed" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
