"""What a run of grpo.py logs: metrics of each step, sampled groups, and the final result.

Everything is computed from groups (data.rewards.Group) and earlier logs; nothing runs a model.
"""

import json
import re
from statistics import fmean

from data.prompts import PRESETS
from data.rewards import has_spread
from launch import say
from run import write_atomic
from stats import gains, interval, markdown, paired_bootstrap, pass_at_k, percent
from verify import extract_answer

# ------------------------------------------------------------ a step

STEP_LINE = (
    "step {step}/{steps} | reward {reward:.3f} | accuracy {accuracy:.3f} | no box {no_box:.2f}"
    " | truncated {truncated:.2f} | undecided {undecided:.2f} | length {length:.0f} tok"
    " | no spread {no_spread:.2f} | entropy {entropy:.3f} nat | grad norm {grad_norm:.2f}"
    " | lr {lr:.1e} | rollout {rollout_s:.1f} s | update {update_s:.1f} s"
    " | {left_min:.0f} min left")
DEV_ACCURACY = " | dev accuracy {dev_accuracy:.3f}"
KL = " | kl {kl:.4f} nat"
SECOND_THOUGHTS = re.compile(
    r"\b(wait|hold on|let me (?:re)?check|let me verify|actually|mistake)\b", re.IGNORECASE)


def mean(values):
    return fmean(values) if values else 0.0


def step_metrics(groups, learned, args):
    """Metrics of a step's groups and of its update. learned: what grpo.update returned."""
    strict = PRESETS[args.prompt].grade == "strict"
    rows = []  # one for each completion
    for g in groups:
        for i, completion in enumerate(g.completions):
            boxed = extract_answer(g.texts[i], strict) is not None
            row = {f"reward_{name}": values[i] for name, values in g.parts.items()}
            rows.append(row | {
                "reward": g.rewards[i], "accuracy": g.right[i] is True,
                "undecided": g.rewards[i] is None, "no_box": not boxed,
                "wrong": boxed and g.right[i] is False, "length": len(completion.tokens),
                "truncated": completion.finish != "stop",
                "second_thoughts": bool(SECOND_THOUGHTS.search(g.texts[i]))})
    metrics = {name: mean([row[name] for row in rows if row[name] is not None]) for name in rows[0]}
    for name in ("entropy", "ratio", "clipped_low", "clipped_high", "kl", "mismatch",
                 "sampler_weight"):
        metrics[name] = learned[name] / max(1, learned["tokens"])
    right = [g.right.count(True) for g in groups]
    for k in (2, 4, 8, 16, 32):
        if k <= args.group:
            metrics[f"pass@{k}"] = fmean(pass_at_k(args.group, count, k) for count in right)
    return metrics | {
        "length_right": mean([row["length"] for row in rows if row["accuracy"]]),
        "length_wrong": mean([row["length"] for row in rows if not row["accuracy"]]),
        "solved_never": right.count(0) / len(right),
        "solved_always": right.count(args.group) / len(right),
        "no_spread": fmean(not has_spread(g) for g in groups),
        "loss": learned["loss"] / args.updates,
        "grad_norm": learned["grad_norm"], "skipped": learned["skipped"]}


def token_texts(tokenizer, tokens):
    """The text of each token. A character of several tokens belongs to its last one."""
    texts = []
    pending = []  # tokens of an incomplete character
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        if "\ufffd" in text and len(pending) < 4:  # UTF-8 has at most four bytes
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def sample_records(groups, kind, tokenizer):
    """Complete groups as records for samples.jsonl. kind: "rollout" or "held_out"."""
    records = []
    for g in groups:
        completions = []
        for i, c in enumerate(g.completions):
            completions.append({
                "text": g.texts[i], "tokens": c.tokens,
                "pieces": token_texts(tokenizer, c.tokens),
                "logprobs": [round(x, 4) for x in c.logprobs],
                "rewards": {name: values[i] for name, values in g.parts.items()},
                "reward": g.rewards[i], "advantage": g.advantages[i] if g.advantages else None,
                "right": g.right[i], "finish": c.finish})
        records.append({
            "kind": kind, "problem": g.problem["problem"], "answer": g.problem["answer"],
            "prompt": tokenizer.decode(g.prompt, skip_special_tokens=False),
            "completions": completions})
    return records


# ------------------------------------------------------------ a run


def count_right(groups, counts):
    """Add to `counts`, {id of a problem: [right completions, all completions]}."""
    for g in groups:
        right, sampled = counts.get(g.problem["id"], (0, 0))
        counts[g.problem["id"]] = [right + g.right.count(True), sampled + len(g.right)]


def save_solved(run, counts):
    """Write the problems never or always solved to problems.json, and print how many there are."""
    never = [name for name, (right, _) in counts.items() if right == 0]
    always = [name for name, (right, sampled) in counts.items() if right == sampled]
    path = run.dir / "problems.json"
    if run.rank == 0:
        write_atomic(path, json.dumps({"never": never, "always": always}, indent=1))
    say(f"of {len(counts)} problems, {len(never)} were never solved and {len(always)} always; "
        f"they are listed in {path}")


def right_answers(groups):
    """1 for each problem whose single answer is right, else 0; undecided counts as wrong."""
    return [g.right.count(True) for g in groups]


def keep_first_and_best(evaluations):
    """The first and the best of [[step, right_answers on dev], ...]; on a tie, the earliest."""
    return [evaluations[0], max(evaluations, key=lambda evaluation: sum(evaluation[1]))]


def reached(evaluations, accuracy):
    """Whether the best of keep_first_and_best has this accuracy. None is never reached."""
    return accuracy is not None and fmean(evaluations[-1][1]) >= accuracy


def training_verdict(evaluations):
    """Whether training helped, as a sentence, given keep_first_and_best."""
    (first, before), (step, after) = evaluations
    accuracy = f"dev accuracy {fmean(before):.3f} at step {first}"
    if step == first:
        return f"training did not help: no later step exceeds the {accuracy}"
    change, low, high = (100 * value for value in paired_bootstrap(before, after))
    verdict = "training helped" if low > 0 else "it is unclear whether training helped"
    return (f"{verdict}: {accuracy}, {fmean(after):.3f} at step {step}, {change:+.1f} points "
            f"[{low:+.1f}, {high:+.1f}] on the {len(after)} problems that chose the checkpoint")


def add_result(run, rows, method, groups):
    """Add a row to `rows` for groups of one answer each; print all rows and write results.md."""
    completions = [g.completions[0] for g in groups]
    row = {"method": method, "right": "".join(map(str, right_answers(groups))),
           "tokens_mean": fmean(len(c.tokens) for c in completions),
           "truncated": fmean(c.finish != "stop" for c in completions)}
    rows[:] = [other for other in rows if other["method"] != method] + [row]
    head = ["", "problems", "accuracy %, 95 % interval", "tokens per answer", "truncated %"]
    scores = [list(map(int, row["right"])) for row in rows]
    cells = [[row["method"], len(right), percent(*interval(right)), f"{row['tokens_mean']:.0f}",
              percent(row["truncated"])] for row, right in zip(rows, scores)]
    text = markdown(head, cells)
    if method.startswith("after"):
        change = percent(*paired_bootstrap(scores[0], scores[-1]))
        text += f"\nBefore to {method}: {change} points; {gains(scores[0], scores[-1])}.\n"
    if run.rank == 0:
        write_atomic(run.dir / "results.md", text)
        print(text, flush=True)
