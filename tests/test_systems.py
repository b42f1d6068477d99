"""Portability: everything imports and runs without Linux-only modules and functions."""

import json
import tempfile
from pathlib import Path

import torch

import model
from tests.common import GRPO_RUN, run

# Runs the scripts in one process, after removing what Windows lacks.
WITHOUT_LINUX = """
import importlib, os, pathlib, sys, types
import huggingface_hub, jinja2, numpy, sympy, tokenizers, torch, torch._dynamo, tqdm

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "getppid", "geteuid", "killpg", "sched_getaffinity", "sysconf"):
    delattr(os, name)

def symlink_to(*_, **__):
    raise OSError("a required privilege is not held by the client")

pathlib.Path.symlink_to = symlink_to
sys.platform = "win32"
sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *_: None, LK_NBLCK=2)
sys.path.insert(0, os.getcwd())
from launch import run_main

for name in ("bench", "data.judge", "data.tiny.corpus", "data.traces", "infer_scale", "refine",
             "sft", "verify"):
    importlib.import_module(name)
run_dir, *words = sys.argv[1:]
for steps in ("2", "3"):
    sys.argv = ["grpo.py", *words, "--run-dir", run_dir, "--steps", steps, "--resume"]
    run_main(*(getattr(importlib.import_module("grpo"), name) for name in ("main", "parse_args")))
print("\N{GREEK SMALL LETTER PI}")  # on an ASCII terminal
sys.argv = ["eval.py", "--limit", "4", "--results", run_dir + ".jsonl"]
run_main(*(getattr(importlib.import_module("eval"), name) for name in ("main", "parse_args")))
"""


def test_systems_everything_imports_and_runs_without_linux():
    """Two files imported `resource` at the top, so nothing could be imported on Windows."""
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "without_linux.py")
        script.write_text(WITHOUT_LINUX, encoding="utf-8")
        out = run(script, f"{scratch}/run", *GRPO_RUN[1:-2], env={"PYTHONIOENCODING": "ascii"})
        assert "step 2/2" in out and "step 3/3" in out and r"\u03c0" in out, out
        best = Path(scratch, "run", "checkpoints", "best")
        assert best.is_dir() and not best.is_symlink()
        rows = map(json.loads, Path(scratch, "run", "metrics.jsonl").open())
        best_step = max(rows, key=lambda row: row.get("dev_accuracy", -1))["step"]
        chosen = model.load_params(best.with_name(f"step_{best_step:06d}"))
        for name, tensor in model.load_params(best).items():
            assert torch.equal(tensor, chosen[name]), name
