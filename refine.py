"""Self-refinement: answer, score, critique, revise, for K rounds; and whether it pays.

    python refine.py                                                    # the embedded tiny model, three rounds
    python refine.py --model qwen2.5-1.5b-instruct --data gsm8k --limit 200 --score mean
    python refine.py --accept always --rounds 4

The model answers, checks its answer, solves the problem again in sight of the check, and keeps the revision if its own score says so. The
loop is given questions only: what the reference answers say enters in `main`, when the rounds are over. Two bounds stand beside the
result: a gate that knows the answers, and one that accepts as often as the model's own, but at random.

Self-Refine: Madaan et al. 2023, arXiv:2303.17651. That it seldom helps without an outside signal, and should be compared with
self-consistency of equal cost: Huang et al. 2023, arXiv:2310.01798.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
import zlib
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import torch

from eval import (PRESETS, add_eval_flags, append_row, end_tokens, is_tiny, maj_at_k, markdown, measure, open_run, paired_bootstrap, percent,
                  print_settings, render_prompt, score_row, settings_of, votes_of)
from generate import generate
from model import token_logprobs
from verify import equivalent, extract_answer, format_reward, verify, verify_many

SCORES = ("answer-mean", "answer-total", "mean", "total", "format", "none")
CHECK, AGAIN = "Check each step.", "Solve it again."  # what the tiny model's corpus says
CHECK_LONG = ('Check your solution step by step. If every step is right, write "Every step is right." Otherwise name the first step that '
              "is wrong and say why.")
AGAIN_LONG = r"Solve the problem again, with this in mind. Put your final answer within \boxed{}."
APPROVAL = "Every step is right."


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_eval_flags(p, temperature=0.7)
    p.add_argument("--rounds", type=int, default=3, help="K: how often an answer is criticised and revised")
    p.add_argument("--score", choices=SCORES, default="answer-mean",
                   help="confidence in an answer: log-probability of the boxed answer or of the whole response, mean or total; format: boxed "
                        "behind a closed thought; none: every revision is accepted")
    p.add_argument("--accept", choices=("better", "always"), default="better", help="keep a revision when its score is higher, or always")
    p.add_argument("--critique-prompt", help=f"default: {CHECK!r} for a tiny model, else a wordier one")
    p.add_argument("--revise-prompt", help=f"default: {AGAIN!r} for a tiny model, else a wordier one")
    p.add_argument("--traces", help="a .jsonl file for every draft, critique and revision")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------ scores


def box_span(text):
    """Where the content of the last \\boxed{} stands in a text, (begin, end), or None without a closed one."""
    begin, depth = text.rfind("\\boxed{") + 7, 1
    for end in range(begin, len(text)) if begin >= 7 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return begin, end
    return None


def token_span(tokenizer, tokens, begin, end):
    """The tokens that write the characters from begin to end of their text, as (first, one past the last)."""
    written = lambda i: len(tokenizer.decode(tokens[:i], skip_special_tokens=False))
    return bisect_right(range(len(tokens) + 1), begin, key=written) - 1, bisect_left(range(len(tokens) + 1), end, key=written)


@torch.inference_mode()
def response_logprobs(params, config, prompts, responses, max_batch=64):
    """Log-probability of every token of each response behind its prompt, at temperature 1: a list of floats for each."""
    device, found = params["model.embed_tokens.weight"].device, []
    for begin in range(0, len(prompts), max_batch):
        rows = [p + r for p, r in zip(prompts[begin:begin + max_batch], responses[begin:begin + max_batch])]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, T]
        logprobs = token_logprobs(params, config, tokens).tolist()
        found += [line[len(p) - 1:len(row) - 1] for line, p, row in zip(logprobs, prompts[begin:begin + max_batch], rows)]
    return found


def score_response(tokenizer, tokens, logprobs, text, think_tag):
    """Every score of a response by name; -inf where there is no boxed answer to score."""
    scores = {"mean": statistics.fmean(logprobs), "total": sum(logprobs), "answer-mean": -math.inf, "answer-total": -math.inf, "none": 0.0}
    scores["format"] = format_reward(text, think_tag)
    if span := box_span(text):
        first, last = token_span(tokenizer, tokens, *span)
        if first < last:  # an empty box has no answer
            scores |= {"answer-mean": statistics.fmean(logprobs[first:last]), "answer-total": sum(logprobs[first:last])}
    return scores


# ------------------------------------------------------------------------------------ the loop


class Attempt(NamedTuple):
    tokens: list  # the response, its end token included
    text: str
    answer: str | None
    scores: dict


class State(NamedTuple):
    """A problem after a round."""
    attempt: Attempt  # the answer that stands
    spent: int  # tokens written for it so far, critiques and refused revisions included
    critique: str | None = None  # None: the problem was settled before this round
    revision: Attempt | None = None  # None: the critique approved
    accepted: bool = False
    settled: bool = False  # no further round will be tried


def refine(params, config, tokenizer, prompts, *, rounds, accept_fn, critique_prompt, revise_prompt, max_new_tokens, temperature=0.7, top_p=1.0,
           top_k=0, max_batch=64, seed=0, seeds=None, think_tag="think"):
    """Answer, then `rounds` times: critique, revise, keep the better. Returns [N][rounds + 1] States; the first is the draft.

    prompts: token ids of N chat prompts, each ending where the model is to answer. accept_fn(problem, round, old, new) -> bool decides
    between two Attempts. A problem is settled, and costs nothing more, when its critique approves or its revision comes to the same
    answer. Every round sees the question, the answer that stands, and the critique of it, so the context does not grow.
    """
    ends, seeds = end_tokens(tokenizer, config), seeds or range(len(prompts))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    turn_end = encode("<|im_end|>")

    def ask(which, contexts, turn):
        """One reply for each of the problems `which`."""
        replies = generate(params, config, contexts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                           max_batch=max_batch, stop_tokens=ends, seed=seed, seeds=[seeds[i] + (turn << 32) for i in which])
        return [reply.tokens for [reply] in replies]

    def next_turn(tokens, prompt):
        """What stands behind a reply when the user speaks again."""
        said = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return said + turn_end + encode(f"\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")

    def read(tokens):
        return tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=False)

    def attempts(which, replies):
        """The replies scored behind the bare question, whatever context they were written in, so that old and new compare."""
        logprobs = response_logprobs(params, config, [prompts[i] for i in which], replies, max_batch)
        return [Attempt(tokens, text := read(tokens), extract_answer(text, strict=True),
                        score_response(tokenizer, tokens, lps, text, think_tag)) for tokens, lps in zip(replies, logprobs)]

    everyone = list(range(len(prompts)))
    drafts = attempts(everyone, ask(everyone, prompts, 0))
    history = [[State(draft, len(draft.tokens))] for draft in drafts]
    for number in range(1, rounds + 1):
        open_ones = [i for i in everyone if not history[i][-1].settled]
        contexts = {i: prompts[i] + next_turn(history[i][-1].attempt.tokens, critique_prompt) for i in open_ones}
        critiques = dict(zip(open_ones, ask(open_ones, [contexts[i] for i in open_ones], 2 * number - 1)))
        doubted = [i for i in open_ones if APPROVAL not in read(critiques[i])]
        contexts = [contexts[i] + next_turn(critiques[i], revise_prompt) for i in doubted]
        revisions = dict(zip(doubted, attempts(doubted, ask(doubted, contexts, 2 * number))))
        for i in everyone:
            old = history[i][-1]
            if i not in critiques:
                history[i].append(State(old.attempt, old.spent, settled=True))
                continue
            new, spent = revisions.get(i), old.spent + len(critiques[i])
            if new is None:
                history[i].append(State(old.attempt, spent, read(critiques[i]), settled=True))
                continue
            accepted = accept_fn(i, number, old.attempt, new)
            same = new.answer is not None and old.attempt.answer is not None and equivalent(new.answer, old.attempt.answer)
            history[i].append(State(new if accepted else old.attempt, spent + len(new.tokens), read(critiques[i]), new, accepted, same))
    return history


# ------------------------------------------------------------------------------------ calibration


def auroc(confidences, right):
    """Chance that a right answer has more confidence than a wrong one (ties: half); None when all are right, or all wrong."""
    order = sorted(range(len(right)), key=lambda i: confidences[i])
    ranks, begin = [0.0] * len(right), 0
    while begin < len(order):
        end = begin
        while end < len(order) and confidences[order[end]] == confidences[order[begin]]:
            end += 1
        for i in order[begin:end]:
            ranks[i] = (begin + end - 1) / 2  # the mean rank of those that are level
        begin = end
    positive = sum(right)
    if positive in (0, len(right)):
        return None
    return (sum(rank for rank, r in zip(ranks, right) if r) - positive * (positive - 1) / 2) / (positive * (len(right) - positive))


def reliability(confidences, right, bins=5):
    """Equal parts of the answers from least to most confident: (mean confidence, share that is right, how many) of each."""
    order = sorted(range(len(right)), key=lambda i: confidences[i])
    parts = [order[len(order) * b // bins:len(order) * (b + 1) // bins] for b in range(bins)]
    return [(statistics.fmean(confidences[i] for i in part), statistics.fmean(right[i] for i in part), len(part)) for part in parts if part]


# ------------------------------------------------------------------------------------ what it came to


def equal_cost_rows(run, spent):
    """Rows of self-consistency that cost what refinement spent: tokens per problem after 0, 1, ... rounds.

    A budget between k and k + 1 samples takes the one more on a part of the problems; its row is that mean.
    """
    records, settings = measure(run, num_samples=math.ceil(max(spent) / spent[0]) + 1)
    pool = len(records[0]["samples"])
    tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
    votes, rows = [votes_of(r) for r in records], []
    for k, budget in enumerate(spent[1:], 1):
        samples = min(max(1.0, budget / statistics.fmean(tokens)), pool - 1)
        whole, part = int(samples), samples % 1
        scores = [(1 - part) * maj_at_k(*v, whole) + part * maj_at_k(*v, whole + 1) for v in votes]
        rows.append(score_row(run.problems, scores, [samples * t for t in tokens], method=f"self-consistency at the tokens of K = {k}",
                              grade="strict", samples=samples, seconds=samples * sum(r["seconds"] for r in records) / pool, **settings))
    return rows


def verdicts(history, references):
    """Whether the answer that stands after each round is right: [N][rounds + 1] bools. What cannot be decided is wrong."""
    pairs = [(state.attempt.text, ref) for states, ref in zip(history, references) for state in states]
    flat = [v is True for v in verify_many(pairs, strict=True)]
    width = len(history[0])
    return [flat[i:i + width] for i in range(0, len(flat), width)]


def write_traces(path, problems, history, right):
    """A line per problem: every draft, critique and revision, to be read."""
    with open(path, "w", encoding="utf-8") as file:
        for problem, states, marks in zip(problems, history, right):
            rounds = [{"stands": s.attempt.text, "right": mark, "critique": s.critique, "revision": s.revision and s.revision.text,
                       "accepted": s.accepted, "spent": s.spent} for s, mark in zip(states, marks)]
            file.write(json.dumps({"id": problem["id"], "reference": problem["answer"], "rounds": rounds}) + "\n")


def print_rounds(history, right):
    """What each round did: the four-way table, what it cost and gained, and what the critic was worth."""
    lines = []
    for k in range(1, len(history[0])):
        moves = [[sum(r[k - 1] == before and r[k] == after for r in right) for after in (True, False)] for before in (True, False)]
        gain = [r[k] - r[k - 1] for r in right]
        cost = statistics.fmean(states[k].spent - states[k - 1].spent for states in history)
        doubted = [[states[k].revision is not None for states, r in zip(history, right) if states[k].critique is not None and r[k - 1] == was]
                   for was in (True, False)]
        change, low, high = paired_bootstrap([0] * len(gain), gain)
        lines.append([str(k), *(str(n) for row in moves for n in row), f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{cost:.1f}",
                      f"{1e5 * change / cost:+.1f}" if cost else "-", *(f"{sum(d)} of {len(d)}" for d in doubted)])
    print(markdown(["round", "right to right", "right to wrong", "wrong to right", "wrong to wrong", "points gained [95 %]", "tokens per problem",
                    "points per 1000 tokens", "right answers doubted", "wrong answers doubted"], lines))


def print_calibration(history, right):
    """Whether the draft's confidence tells right from wrong."""
    drafts, correct = [states[0].attempt for states in history], [r[0] for r in right]
    print("AUROC of the draft's score: " + ", ".join(
        f"{name} {'-' if (area := auroc([d.scores[name] for d in drafts], correct)) is None else f'{area:.3f}'}" for name in SCORES[:-1]))
    print(markdown(["confidence: exp(answer-mean), five equal parts", "right, %", "answers"],
                   [[f"{c:.3f}", percent(r), str(n)] for c, r, n in reliability([math.exp(d.scores["answer-mean"]) for d in drafts], correct)]))


# ------------------------------------------------------------------------------------ main


def main(args):
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected at least 1")
    run = open_run(args, tiny_prompt="cot")
    tiny, ask, settings = is_tiny(run.config), run.ask, settings_of(run)
    if PRESETS[ask["prompt"]].text is not None:
        raise ValueError(f"--prompt {ask['prompt']} is no chat, so there is no next turn to criticise in; take one of "
                         + ", ".join(name for name, preset in PRESETS.items() if preset.text is None))
    loop = {"critique_prompt": args.critique_prompt or (CHECK if tiny else CHECK_LONG),
            "revise_prompt": args.revise_prompt or (AGAIN if tiny else AGAIN_LONG), "rounds": args.rounds}
    print_settings(settings | loop | {"score": args.score, "accept": args.accept})
    prompts = [run.tokenizer.encode(render_prompt(ask["prompt"], p, **{k: ask[k] for k in ("system", "shots", "think_tag")}),
                                    add_special_tokens=False).ids for p in run.problems]
    asked = {k: v for k, v in ask.items() if k not in ("prompt", "system", "shots")} | loop
    asked["seeds"] = [zlib.crc32(p["id"].encode()) for p in run.problems]
    started = time.perf_counter()
    always = args.accept == "always" or args.score == "none"
    history = refine(run.params, run.config, run.tokenizer, prompts, **asked,
                     accept_fn=lambda i, k, old, new: always or new.scores[args.score] > old.scores[args.score])
    seconds = time.perf_counter() - started

    # from here on with the reference answers: what it came to, and what other gates would have made of it
    references = [p["answer"] for p in run.problems]
    revised = [state for states in history for state in states if state.revision is not None]
    rate = statistics.fmean(state.accepted for state in revised) if revised else 0.0
    gates = {"oracle gate (a bound)": lambda i, k, old, new: not verify(old.text, references[i], strict=True),
             f"random gate, {percent(rate)} % (a bound)": lambda i, k, old, new: random.Random(f"{args.seed} {i} {k}").random() < rate}
    histories = {"": history} | {f", {name}": refine(run.params, run.config, run.tokenizer, prompts, **asked, accept_fn=gate)
                                 for name, gate in gates.items()}
    rows, right = [], {name: verdicts(h, references) for name, h in histories.items()}
    spent = {name: [[states[k].spent for states in h] for k in range(args.rounds + 1)] for name, h in histories.items()}
    for k in range(args.rounds + 1):
        for name in histories if k else [""]:
            rows.append(score_row(run.problems, [float(r[k]) for r in right[name]], spent[name][k], method=f"refine, K = {k}{name}", grade="strict",
                                  seconds=seconds * sum(spent[name][k]) / sum(spent[""][-1]), **settings, **loop, score=args.score, accept=args.accept))
    if args.temperature > 0:
        rows += equal_cost_rows(run, [statistics.fmean(tokens) for tokens in spent[""]])
    print(markdown(["method", "accuracy, % [95 %]", "tokens per problem", "samples of self-consistency"],
                   [[row["method"], percent(row["accuracy"], row["low"], row["high"]), f"{row['tokens_mean']:.0f}", f"{row['samples']:.2f}" if "samples" in row else "-"]
                    for row in rows]))
    print_rounds(history, right[""])
    print_calibration(history, right[""])
    for row in rows:
        append_row(args.results, row)
    if args.traces:
        write_traces(args.traces, run.problems, history, right[""])


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"refine.py: {error}", file=sys.stderr)
        sys.exit(2)
