"""Compare learning from a teacher with learning from one's own samples, at the same budget.

    python -m docs.distillation 32    # 32 steps of the tiny model

The teacher is the tiny model after GRPO; each student starts from the tiny model. Every method gets
the same number of updates of 256 completions: sampled by the student at that step (GRPO,
distillation), or sampled beforehand on the problems that GRPO would use (SFT). Finished parts of an
interrupted run are skipped.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from data import load_problems
from data.files import read_rows
from eval import find_row
from run import write_atomic
from stats import markdown, percent

HOME = Path("runs/distillation")
LABELS = {
    "grpo": "GRPO (the teacher)",
    "distilled": "distilled on its own samples, no rewards",
    "sft_teacher": "SFT on the teacher's verified samples",
    "sft_own": "SFT on its own verified samples",
    "sft_control": "SFT on as many of its own samples at random"}


def run(out, script, *flags):
    """Run `python SCRIPT FLAGS`, unless its output `out` exists."""
    if not out.exists():
        print("$ python", script, *flags, flush=True)
        subprocess.run([sys.executable, script, *map(str, flags)], check=True)


def sample(name, source, count):
    """8 samples per training problem, as dicts with "problem", "response", "right", "tokens"."""
    records = HOME / f"{name}.jsonl"
    results = HOME / f"{name}_results.jsonl"
    run(results, "eval.py", "--model", source, "--split", "train", "--limit", count,
        "--num-samples", 8, "--temperature", 1, "--records", records, "--results", results)
    problems = {p["id"]: p["problem"] for p in load_problems("arithmetic", "train", count)}
    return [{"problem": problems[row["id"]], "response": s["text"], "right": s["strict"],
             "tokens": s["tokens"]} for _, row in read_rows(records) for s in row["samples"]]


def fine_tune(name, samples, steps, shared):
    data = HOME / f"{name}.train.jsonl"
    write_atomic(data, "".join(json.dumps(s) + "\n" for s in samples))
    print(f"{name}: {len(samples)} samples of {fmean(s['tokens'] for s in samples):.0f} tokens")
    run(last_checkpoint(name, steps), "sft.py", "--data", data, "--batch", 256, "--epochs",
        (steps - 0.5) * 256 / len(samples), "--validation", 0, "--eval-data", "arithmetic", *shared,
        "--run-dir", HOME / name)


def last_checkpoint(name, steps):
    return HOME / name / "checkpoints" / f"step_{steps:06d}"


def main(steps):
    HOME.mkdir(parents=True, exist_ok=True)
    shared = ["--eval-every", max(1, steps // 8), "--save-every", steps, "--warmup", 2]
    teacher = last_checkpoint("grpo", steps)
    for name, flags in (("grpo", []), ("distilled", ["--teacher", teacher])):
        run(last_checkpoint(name, steps), "grpo.py", "--steps", steps, *shared, *flags,
            "--refill", 0, "--test-limit", 0, "--run-dir", HOME / name)
    own = sample("of_student", "tiny", 32 * steps)
    own_right = [s for s in own if s["right"]]
    teacher_right = [s for s in sample("of_teacher", teacher, 32 * steps) if s["right"]]
    fine_tune("sft_teacher", teacher_right, steps, shared)
    fine_tune("sft_own", own_right, steps, shared)
    fine_tune("sft_control", random.Random(0).sample(own, len(own_right)), steps, shared)

    rows = []
    shown = [max(1, steps * part // 8) for part in (1, 2, 4, 8)]
    for name, label in LABELS.items():
        curve = {row["step"]: row.get("dev_accuracy", row.get("val_accuracy"))
                 for _, row in read_rows(HOME / name / "metrics.jsonl")}
        results = HOME / f"{name}_results.jsonl"
        run(results, "eval.py", "--results", results, "--model", last_checkpoint(name, steps))
        row = find_row(results, method="greedy")
        rows.append([label, *(percent(curve[step]) for step in shown),
                     percent(row["accuracy"], row["low"], row["high"])])
    print(markdown(["dev accuracy, %, at step", *shown, "500 test problems, % [95 %]"], rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
