"""Every test, in the order of the files from the ground up.

    python test_all.py                  # all
    python test_all.py verify resume    # those whose name contains one of the words
    pytest test_all.py                  # the same functions

Everything runs on a CPU in minutes, on the embedded tiny model or on tiny random weights. What cannot run here
raises `unittest.SkipTest` with its reason.
"""

import sys
import time
import traceback
import unittest
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------ model.py

# ------------------------------------------------------------------------------------------------ verify.py

# ------------------------------------------------------------------------------------------------ optim.py

# ------------------------------------------------------------------------------------------------ data/

# ------------------------------------------------------------------------------------------------ generate.py

# ------------------------------------------------------------------------------------------------ eval.py

# ------------------------------------------------------------------------------------------------ infer_scale.py

# ------------------------------------------------------------------------------------------------ refine.py

# ------------------------------------------------------------------------------------------------ sft.py

# ------------------------------------------------------------------------------------------------ grpo.py

# ------------------------------------------------------------------------------------------------ the runner


def main(words):
    tests = [(name, fn) for name, fn in globals().items() if name.startswith("test_") and callable(fn)]
    chosen = [(name, fn) for name, fn in tests if not words or any(word in name for word in words)]
    if not chosen:
        print(f"no test has {' or '.join(map(repr, words))} in its name; there are:", *(n for n, _ in tests), sep="\n  ")
        return 2
    passed = failed = skipped = 0
    for name, fn in chosen:
        begin = time.perf_counter()
        try:
            fn()
            passed, verdict = passed + 1, "ok"
        except unittest.SkipTest as reason:
            skipped, verdict = skipped + 1, f"skipped: {reason}"
        except Exception:
            failed, verdict = failed + 1, "FAILED\n" + traceback.format_exc()
        print(f"{name} ({time.perf_counter() - begin:.1f} s) {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
