"""The exercises of docs/walkthrough.md: grpo.py with one thing broken, for twelve small steps.

    python -m docs.exercises none          # unmodified, for comparison
    python -m docs.exercises baseline      # broken; prints the metrics of a few steps
    python -m docs.exercises baseline --seed 1      # accepts any flags of grpo.py

Each breakage is a function that replaces a part of grpo.py before calling its `main`.
"""

import json
from pathlib import Path

import grpo
import launch

FLAGS = ["--steps", "12", "--prompts", "16", "--warmup", "3", "--eval-every", "12",
         "--eval-limit", "100", "--test-limit", "0"]
SHOWN = ("reward", "accuracy", "length", "truncated", "entropy", "ratio", "clipped_high",
         "mismatch", "grad_norm", "dev_accuracy")


def drop_baseline():
    """Use the reward as the advantage: anything with a positive reward becomes more likely."""
    grpo.group_advantages = lambda rewards, scale: rewards


def forget_mask():
    """Count padding as tokens, and divide each row by its own number of tokens."""
    policy_loss = grpo.policy_loss

    def unmasked(logprobs, old_logprobs, ref_logprobs, advantages, mask, **options):
        options["total"] = None
        ones = mask.new_ones(mask.shape)
        return policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, ones, **options)

    grpo.policy_loss = unmasked


def score_at_one():
    """Compute the loss at temperature 1, whatever the sampling temperature."""
    row_logprobs = grpo.row_logprobs

    def at_one(params, config, row, temperature, *rest):
        return row_logprobs(params, config, row, 1.0, *rest)

    grpo.row_logprobs = at_one


def lines(group):
    """A reward meant to encourage careful work: the number of lines over twenty, at most 1."""
    return [min(1.0, text.count("\n") / 20) for text in group.texts]


EXERCISES = {  # name: (function that breaks grpo.py or None, flags)
    "none": (None, []),
    "reuse": (None, ["--updates", "4"]),
    "clip": (None, ["--updates", "4", "--clip-low", "0.999", "--clip-high", "1e9"]),
    "baseline": (drop_baseline, []),
    "mask": (forget_mask, []),
    "cool": (None, ["--temperature", "0.5"]),
    "temperature": (score_at_one, ["--temperature", "0.5"]),
    "hacked": (None, ["--reward", "docs/exercises.py:lines=1"]),
}


def parse_args(argv=None):
    """(exercise name, parsed arguments of grpo.py)."""
    parser = launch.Parser(__doc__)
    parser.add_argument("name", choices=EXERCISES)
    chosen, others = parser.parse_known_args(argv)
    flags = [*FLAGS, "--run-dir", f"runs/exercises/{chosen.name}", "--overwrite",
             *EXERCISES[chosen.name][1], *others]
    return chosen.name, grpo.parse_args(flags)


def main(parsed):
    name, args = parsed
    breakage, _ = EXERCISES[name]
    if breakage:
        breakage()
    grpo.main(args)
    log = Path(args.run_dir, "metrics.jsonl").read_text(encoding="utf-8")
    shown = [step for step in map(json.loads, log.splitlines())
             if step["step"] in (1, 4, 8, args.steps)]
    launch.say(f"\n{name:14}", *(f"step {step['step']:<6}" for step in shown))
    for metric in SHOWN:
        values = [step.get(metric) for step in shown]
        launch.say(f"{metric:14}", *(f"{'' if v is None else format(v, '.4g'):11}" for v in values))


if __name__ == "__main__":
    launch.run_main(main, parse_args)
