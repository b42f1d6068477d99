"""Self-refinement: answer, score, critique, revise, for K rounds; and whether it pays.

    python refine.py                                                    # the embedded tiny model, three rounds
    python refine.py --model qwen2.5-1.5b-instruct --data gsm8k --limit 200 --score mean
    python refine.py --accept always --rounds 4

The model answers, checks its answer, solves the problem again in sight of the check, and keeps the revision if its own
score says so. The loop is given questions only; reference answers enter in `main`, when the rounds are over. Two bounds
stand beside the result: a gate that knows the answers, and one that accepts as often as the model's own, but at random.

Self-Refine: Madaan et al. 2023, arXiv:2303.17651. That it seldom helps without an outside signal, and should be compared
with self-consistency of equal cost: Huang et al. 2023, arXiv:2310.01798.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from typing import NamedTuple

import torch

from eval import (PRESETS, SAMPLING_TEMPERATURE, add_eval_flags, against, append_row, end_tokens, is_tiny, maj_at_k,
                  markdown, measure, open_run, percent, print_settings, prompt_tokens, rated, score_row, settings_of,
                  votes_of)
from generate import generate
from model import token_logprobs
from verify import equivalent, extract_answer, format_reward, verify, verify_many

SCORES = ("answer-mean", "answer-total", "mean", "total", "format", "none")
CHECK, AGAIN = "Check each step.", "Solve it again."  # what the tiny model's corpus says
CHECK_LONG = ('Check your solution step by step. If every step is right, write "Every step is right." Otherwise name '
              "the first step that is wrong and say why.")
AGAIN_LONG = r"Solve the problem again, with this in mind. Put your final answer within \boxed{}."
APPROVAL = "Every step is right."


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_eval_flags(p, temperature=SAMPLING_TEMPERATURE)
    p.add_argument("--rounds", type=int, default=3, help="K: how often an answer is criticised and revised")
    p.add_argument("--score", choices=SCORES, default="mean",  # of these the best gate on the development split
                   help="confidence: log-probability of the boxed answer or of the whole response, mean or total; "
                        "format: a thought, closed, and one box; none: every revision is accepted")
    p.add_argument("--accept", choices=("better", "always"), default="better", help="better: if its score is higher")
    p.add_argument("--critique-prompt", help=f"default: {CHECK!r} for a tiny model, else a wordier one")
    p.add_argument("--revise-prompt", help=f"default: {AGAIN!r} for a tiny model, else a wordier one")
    p.add_argument("--approval", default="", help=f"a critique that says this, such as {APPROVAL!r}, settles a problem; "
                   "default: only a revision that comes to the same answer does")
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
    written, places = lambda i: len(tokenizer.decode(tokens[:i], skip_special_tokens=False)), range(len(tokens) + 1)
    return bisect_right(places, begin, key=written) - 1, bisect_left(places, end, key=written)


@torch.inference_mode()
def response_logprobs(params, config, prompts, responses, max_batch=64):
    """Log-probability of every token of each response behind its prompt, at temperature 1: a list of floats for each."""
    device, found = params["model.embed_tokens.weight"].device, []
    for begin in range(0, len(prompts), max_batch):
        heads = prompts[begin:begin + max_batch]
        rows = [head + response for head, response in zip(heads, responses[begin:begin + max_batch])]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, T]
        logprobs = token_logprobs(params, config, tokens).tolist()
        found += [line[len(head) - 1:len(row) - 1] for line, head, row in zip(logprobs, heads, rows)]
    return found


def score_response(tokenizer, tokens, logprobs, text, think_tag):
    """Every score of a response by name; -inf where there is no boxed answer to score."""
    scores = {"answer-mean": -math.inf, "answer-total": -math.inf, "mean": statistics.fmean(logprobs),
              "total": sum(logprobs), "format": format_reward(text, think_tag)}
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


def refine(params, config, tokenizer, prompts, *, rounds, accept_fn, critique_prompt, revise_prompt, approval="",
           strict=True, seeds=None, think_tag="think", max_batch=64, **sampling):
    """Answer, then `rounds` times: critique, revise, keep the better. Returns [N][rounds + 1] States, the draft first.

    prompts: token ids of N chat prompts, each ending where the model is to answer; sampling: as for generate.
    accept_fn(problem, round, old, new) -> bool decides between two Attempts. A problem is settled, and costs nothing
    more, when its revision comes to the same answer or its critique says `approval`. Every round sees the question, the
    answer that stands and the critique of it, so the context does not grow from round to round. strict: answers are what
    the box holds, else also what stands in words.
    """
    ends, seeds = end_tokens(tokenizer, config), seeds or range(len(prompts))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    turn_end = encode("<|im_end|>")

    def ask(which, contexts, turn):
        """One reply for each of the problems `which`."""
        replies = generate(params, config, contexts, stop_tokens=ends, seeds=[seeds[i] + (turn << 32) for i in which],
                           max_batch=max_batch, **sampling)
        return [reply.tokens for [reply] in replies]

    def next_turn(tokens, prompt):
        """What stands behind a reply when the user speaks again."""
        said = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return said + turn_end + encode(f"\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")

    def read(tokens):
        return tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=False)

    def attempts(which, replies):
        """The replies, scored behind the bare question, whatever stood before them, so that old and new compare."""
        scored = response_logprobs(params, config, [prompts[i] for i in which], replies, max_batch)
        return [Attempt(tokens, text := read(tokens), extract_answer(text, strict),
                        score_response(tokenizer, tokens, logprobs, text, think_tag))
                for tokens, logprobs in zip(replies, scored)]

    everyone = list(range(len(prompts)))
    drafts = attempts(everyone, ask(everyone, prompts, 0))
    history = [[State(draft, len(draft.tokens))] for draft in drafts]
    for number in range(1, rounds + 1):
        open_ones = [i for i in everyone if not history[i][-1].settled]
        contexts = {i: prompts[i] + next_turn(history[i][-1].attempt.tokens, critique_prompt) for i in open_ones}
        critiques = dict(zip(open_ones, ask(open_ones, [contexts[i] for i in open_ones], 2 * number - 1)))
        doubted = [i for i in open_ones if not approval or approval not in read(critiques[i])]
        contexts = [contexts[i] + next_turn(critiques[i], revise_prompt) for i in doubted]
        revisions = dict(zip(doubted, attempts(doubted, ask(doubted, contexts, 2 * number))))
        for i in everyone:
            old, spent, *_ = history[i][-1]
            if i not in critiques:
                history[i].append(State(old, spent, settled=True))
            elif i not in revisions:
                history[i].append(State(old, spent + len(critiques[i]), read(critiques[i]), settled=True))
            else:
                new, accepted = revisions[i], accept_fn(i, number, old, revisions[i])
                same = None not in (old.answer, new.answer) and equivalent(new.answer, old.answer)
                history[i].append(State(new if accepted else old, spent + len(critiques[i]) + len(new.tokens),
                                        read(critiques[i]), new, accepted, same))
    return history


# ------------------------------------------------------------------------------------ calibration


def auroc(confidences, right):
    """Chance that a right answer has more confidence than a wrong one, ties half; None when there is no such pair."""
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
    above = sum(rank for rank, r in zip(ranks, right) if r) - positive * (positive - 1) / 2  # pairs in right order
    return above / (positive * (len(right) - positive))


def reliability(confidences, right, bins=5):
    """Equal parts of the answers from least to most confident: (mean confidence, share that is right, how many)."""
    pairs = sorted(zip(confidences, right))
    parts = [pairs[len(pairs) * b // bins:len(pairs) * (b + 1) // bins] for b in range(bins)]
    return [(*map(statistics.fmean, zip(*part)), len(part)) for part in parts if part]


# ------------------------------------------------------------------------------------ what it came to


def equal_cost_rows(run, spent):
    """Rows of self-consistency that cost what refinement spent: tokens per problem after 0, 1, ... rounds.

    A budget between k and k + 1 samples takes the one more on a part of the problems; its row is that mean.
    """
    records, settings = measure(run, "samples", num_samples=math.ceil(max(spent) / spent[0]) + 1)
    pool = len(records[0]["samples"])
    tokens = [statistics.fmean(s["tokens"] for s in r["samples"]) for r in records]
    votes, rows = [votes_of(r, settings["grade"]) for r in records], []
    for k, budget in enumerate(spent[1:], 1):
        samples = min(max(1.0, budget / statistics.fmean(tokens)), pool - 1)
        whole, part = int(samples), samples % 1
        scores = [(1 - part) * maj_at_k(*v, whole) + part * maj_at_k(*v, whole + 1) for v in votes]
        seconds = samples * sum(r["seconds"] for r in records) / pool
        rows.append(score_row(run.problems, scores, [samples * t for t in tokens], samples=samples, seconds=seconds,
                              method=f"self-consistency at the tokens of K = {k}", **settings))
    return rows


def verdicts(history, references, strict=True):
    """Whether the answer that stands after each round is right: [N][rounds + 1] bools. The undecided are wrong."""
    pairs = [(state.attempt.text, ref) for states, ref in zip(history, references) for state in states]
    flat = [v is True for v in verify_many(pairs, strict=strict)]
    width = len(history[0])
    return [flat[i:i + width] for i in range(0, len(flat), width)]


def write_traces(path, problems, history, right):
    """A line per problem: every draft, critique and revision, to be read."""
    with open(path, "w", encoding="utf-8") as file:
        for problem, states, marks in zip(problems, history, right):
            rounds = [{"stands": s.attempt.text, "right": mark, "spent": s.spent, "critique": s.critique,
                       "revision": s.revision and s.revision.text, "accepted": s.accepted}
                      for s, mark in zip(states, marks)]
            file.write(json.dumps({"id": problem["id"], "reference": problem["answer"], "rounds": rounds}) + "\n")


def print_rounds(history, right):
    """What each round did: the four-way table, what it cost and gained, and what the critic was worth."""
    lines = []
    for k in range(1, len(history[0])):
        before, after = [r[k - 1] for r in right], [r[k] for r in right]
        moves = Counter(zip(before, after))
        spent = statistics.fmean(states[k].spent - states[k - 1].spent for states in history)
        gain = statistics.fmean(after) - statistics.fmean(before)
        doubted = {was: [APPROVAL not in states[k].critique for states, b in zip(history, before)
                         if states[k].critique is not None and b == was] for was in (True, False)}
        lines.append([k, *(moves[move] for move in itertools.product((True, False), repeat=2)), against(after, before),
                      f"{spent:.1f}", f"{1e5 * gain / spent:+.1f}" if spent else "-",
                      *(f"{sum(doubted[was])} of {len(doubted[was])}" for was in (True, False))])
    print(markdown(["round", "right to right", "right to wrong", "wrong to right", "wrong to wrong",
                    "points gained [95 %]", "tokens per problem", "points per 1000 tokens", "right answers doubted",
                    "wrong answers doubted"], lines))


def print_calibration(history, right):
    """Whether the draft's confidence tells right from wrong."""
    drafts, correct = [states[0].attempt for states in history], [r[0] for r in right]
    areas = {name: auroc([draft.scores[name] for draft in drafts], correct) for name in SCORES[:-1]}
    print("AUROC of the draft's score: " + ", ".join(f"{name} {'-' if area is None else f'{area:.3f}'}"
                                                     for name, area in areas.items()))
    chances = [[math.exp(draft.scores[name]) for draft in drafts] for name in ("answer-total", "total")]
    bins = [reliability(chance, correct) for chance in chances]
    print(markdown(["probability of the boxed answer", "right, %", "of the whole response", "right, %", "answers"],
                   [[f"{p:.3f}", percent(right_p), f"{q:.3f}", percent(right_q), n]
                    for (p, right_p, n), (q, right_q, _) in zip(*bins)]))


# ------------------------------------------------------------------------------------ main


def main(args):
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}, expected at least 1")
    run = open_run(args, tiny_prompt="cot")
    if PRESETS[run.ask["prompt"]].text is not None:
        raise ValueError(f"--prompt {run.ask['prompt']} is no chat and has no next turn to criticise in; take one of "
                         + ", ".join(name for name, preset in PRESETS.items() if preset.text is None))
    check, again = (CHECK, AGAIN) if is_tiny(run.config) else (CHECK_LONG, AGAIN_LONG)
    loop = {"rounds": args.rounds, "critique_prompt": args.critique_prompt or check,
            "revise_prompt": args.revise_prompt or again, "approval": args.approval}
    grade = run.grade or PRESETS[run.ask["prompt"]].grade
    strict = grade == "strict"
    settings = settings_of(run) | loop | {"score": args.score, "accept": args.accept, "grade": grade}
    print_settings(settings)
    sampling = {k: v for k, v in run.ask.items() if k not in ("prompt", "system", "shots")}
    seeds = [zlib.crc32(p["id"].encode()) for p in run.problems]
    rounds_with = lambda gate: refine(run.params, run.config, run.tokenizer, prompt_tokens(run), accept_fn=gate,
                                      seeds=seeds, strict=strict, **loop, **sampling)
    started = time.perf_counter()
    always = args.accept == "always" or args.score == "none"
    history = rounds_with(lambda i, k, old, new: always or new.scores[args.score] > old.scores[args.score])
    seconds = time.perf_counter() - started

    # from here on with the reference answers: what it came to, and what other gates would have made of it
    references = [p["answer"] for p in run.problems]
    revised = [state.accepted for states in history for state in states if state.revision is not None]
    rate = statistics.fmean(revised) if revised else 0.0
    oracle = rounds_with(lambda i, k, old, new: not verify(old.text, references[i], strict))
    chance = rounds_with(lambda i, k, old, new: random.Random(f"{args.seed} {i} {k}").random() < rate)
    histories = {"": history, ", oracle gate (a bound)": oracle, ", random gate (a bound)": chance}
    right = {name: verdicts(h, references, strict) for name, h in histories.items()}
    rows = []
    for k, (name, h) in itertools.product(range(args.rounds + 1), histories.items()):
        if k or not name:  # the draft is the same behind every gate
            spent = [states[k].spent for states in h]
            share = sum(spent) / sum(states[-1].spent for states in history)
            scores = [float(r[k]) for r in right[name]]
            rows.append(score_row(run.problems, scores, spent, method=f"refine, K = {k}{name}", seconds=seconds * share,
                                  **settings))
    if args.temperature > 0:
        rows += equal_cost_rows(run, [row["tokens_mean"] for row in rows if "gate" not in row["method"]])
    print(markdown(["method", "accuracy, % [95 %]", "tokens per problem", "samples of self-consistency"],
                   [[row["method"], rated(row), f"{row['tokens_mean']:.0f}",
                     f"{row['samples']:.2f}" if "samples" in row else "-"] for row in rows]))
    print(f"accepted: {percent(rate)} % of {len(revised)} revisions, and as many by the random gate\n")
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
