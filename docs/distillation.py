"""What a student learns from a teacher, and what from its own samples, at the same budget.

    python -m docs.distillation 32    # steps, of the tiny model

The teacher is what GRPO makes of the tiny model; the students are the tiny model again. Each way of
learning takes as many updates, of 256 completions each: of those that the student samples at that
step (GRPO, distillation), or of samples drawn before, on the problems that GRPO would ask
(supervised). What is there already, of a run that was interrupted, is not done again.
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
    "distilled": "distilled from it on its own samples, without rewards",
    "sft_teacher": "supervised on the teacher's verified samples",
    "sft_own": "supervised on its own verified samples",
    "sft_control": "supervised on as many of its own at random"}


def run(out, script, *flags):
    """`python SCRIPT FLAGS`, unless it has written `out`."""
    if not out.exists():
        print("$ python", script, *flags, flush=True)
        subprocess.run([sys.executable, script, *map(str, flags)], check=True)


def draw(name, source, count):
    """[{"problem", "response", "right"}, ...]: 8 samples of each of so many training problems."""
    records = HOME / f"{name}.jsonl"
    results = HOME / f"{name}_results.jsonl"
    run(results, "eval.py", "--model", source, "--split", "train", "--limit", count,
        "--num-samples", 8, "--temperature", 1, "--records", records, "--results", results)
    problems = {p["id"]: p["problem"] for p in load_problems("arithmetic", "train", count)}
    return [{"problem": problems[row["id"]], "response": s["text"], "right": s["strict"],
             "tokens": s["tokens"]} for _, row in read_rows(records) for s in row["samples"]]


def supervise(name, samples, steps, usual):
    data = HOME / f"{name}.train.jsonl"
    write_atomic(data, "".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{name}: {len(samples)} samples of {fmean(s['tokens'] for s in samples):.0f} tokens")
    run(last_of(name, steps), "sft.py", "--data", data, "--batch", 256, "--epochs",
        (steps - 0.5) * 256 / len(samples), "--validation", 0, "--eval-data", "arithmetic", *usual,
        "--run-dir", HOME / name)


def last_of(name, steps):
    return HOME / name / "checkpoints" / f"step_{steps:06d}"


def main(steps):
    HOME.mkdir(parents=True, exist_ok=True)
    usual = ["--eval-every", max(1, steps // 8), "--save-every", steps, "--warmup", 2]
    teacher = last_of("grpo", steps)
    for name, flags in (("grpo", []), ("distilled", ["--teacher", teacher])):
        run(last_of(name, steps), "grpo.py", "--steps", steps, *usual, *flags, "--refill", 0,
            "--test-limit", 0, "--run-dir", HOME / name)
    own = draw("of_student", "tiny", 32 * steps)
    right = [sample for sample in own if sample["right"]]
    of_teacher = [sample for sample in draw("of_teacher", teacher, 32 * steps) if sample["right"]]
    supervise("sft_teacher", of_teacher, steps, usual)
    supervise("sft_own", right, steps, usual)
    supervise("sft_control", random.Random(0).sample(own, len(right)), steps, usual)

    rows = []
    shown = [max(1, steps * part // 8) for part in (1, 2, 4, 8)]
    for name, label in LABELS.items():
        curve = {row["step"]: row.get("dev_accuracy", row.get("val_accuracy"))
                 for _, row in read_rows(HOME / name / "metrics.jsonl")}
        results = HOME / f"{name}_results.jsonl"
        run(results, "eval.py", "--results", results, "--model", last_of(name, steps))
        row = find_row(results, method="greedy")
        rows.append([label, *(percent(curve[step]) for step in shown),
                     percent(row["accuracy"], row["low"], row["high"])])
    print(markdown(["dev accuracy, %, at step", *shown, "500 test problems, % [95 %]"], rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
