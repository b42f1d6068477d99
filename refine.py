"""Self-refinement: answer, score, critique, revise, for K rounds; and whether it pays.

    python refine.py                                    # the embedded tiny model, three rounds
    python refine.py --model qwen2.5-1.5b-instruct --limit 200 --score answer-mean
    python refine.py --accept always --rounds 4

The model answers, checks its answer, solves the problem again in sight of the check, and keeps the
revision if its own score says so. The loop sees only questions; reference answers enter in `main`,
when the rounds are over. Two bounds stand beside the result: a gate that knows the answers, and one
that accepts as often as the model's own, but at random.

Self-Refine: Madaan et al. 2023, arXiv:2303.17651. That it seldom helps without an outside signal,
and should be compared with self-consistency of equal cost: Huang et al. 2023, arXiv:2310.01798.
"""

import argparse
import json
import math
import random
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import eval
from data.prompts import AGAIN, AGAIN_LONG, ALL_RIGHT, CHECK, CHECK_LONG, PRESETS
from eval import maj_at_k, percent, votes_of
from generate import completion_text, generate
from model import encode_chat, end_tokens, is_tiny, token_logprobs
from optim import HelpFormatter, at_least, gather_objects, rank_and_world, run_main, say
from verify import box_span, equivalent, extract_answer, format_reward, verify, verify_many

CHATS = [name for name, preset in PRESETS.items() if preset.text is None]
SCORES = ("answer-mean", "answer-total", "mean", "total", "format", "none")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    eval.add_eval_flags(p, eval.SAMPLING_TEMPERATURE, "cot", CHATS)
    add = p.add_argument
    add("--rounds", type=at_least(1), default=3, help="K: times an answer is checked and revised")
    add("--score", choices=SCORES, default="mean",  # the best gate on the development split
        help="log-probability of the boxed answer or of the whole response, mean or total; format: "
        "a thought, closed, and one box; none: every revision is accepted")
    add("--accept", choices=("better", "always"), default="better",
        help="which revisions are kept; better: those with a higher score")
    add("--critique-prompt", help=f"default: {CHECK!r} for a tiny model, else a wordier one")
    add("--revise-prompt", help=f"default: {AGAIN!r} for a tiny model, else a wordier one")
    add("--approval", default="", help=f"a critique that says this, such as {ALL_RIGHT!r}, settles "
        "a problem (default: only a revision with the same answer does)")
    add("--traces", help="a .jsonl file for every draft, critique and revision")
    return p.parse_args(argv)


# ---------------------------------------------------------------------- scores


def token_span(tokenizer, tokens, begin, end):
    """The tokens that write the characters from begin to end of their text: (first, last + 1)."""
    def written(n):
        return len(tokenizer.decode(tokens[:n], skip_special_tokens=False))

    places = range(len(tokens) + 1)
    return bisect_right(places, begin, key=written) - 1, bisect_left(places, end, key=written)


@torch.inference_mode()
def response_logprobs(params, config, prompts, responses, max_batch=64):
    """Log-probabilities, at temperature 1, of the tokens of each response behind its prompt."""
    device = params["model.embed_tokens.weight"].device
    pairs = list(zip(prompts, responses))
    found = []
    for begin in range(0, len(pairs), max_batch):
        part = pairs[begin:begin + max_batch]
        rows = [torch.tensor(prompt + response, device=device) for prompt, response in part]
        logprobs = token_logprobs(params, config, pad_sequence(rows, batch_first=True))
        for (prompt, response), line in zip(part, logprobs.tolist()):
            first = len(prompt) - 1
            found.append(line[first:first + len(response)])
    return found


def score_response(tokenizer, tokens, logprobs, text, think_tag):
    """Every score of a response by name; -inf where there is no boxed answer to score."""
    answer = []
    if span := box_span(text):
        first, last = token_span(tokenizer, tokens, *span)
        answer = logprobs[first:last]
    return {"answer-mean": fmean(answer) if answer else -math.inf,
            "answer-total": sum(answer) if answer else -math.inf,
            "mean": fmean(logprobs), "total": sum(logprobs),
            "format": format_reward(text, think_tag)}


# ---------------------------------------------------------------------- the loop


class Attempt(NamedTuple):
    tokens: list  # the response, its end token included
    text: str
    answer: str | None
    scores: dict


class Round(NamedTuple):
    """A problem after a round."""
    attempt: Attempt  # the answer that stands
    spent: int  # tokens written for it so far, critiques and refused revisions included
    critique: str | None = None  # None: the problem was settled before this round
    revision: Attempt | None = None  # None: the critique approved
    accepted: bool = False
    settled: bool = False  # no further round will be tried


def next_turn(tokenizer, reply, ends, prompt):
    """The tokens of a reply without its end, then those with which the user asks on."""
    said = reply[:-1] if reply and reply[-1] in ends else reply
    turn_end = tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
    return said + turn_end + encode_chat(tokenizer, [{"role": "user", "content": prompt}],
                                         system=None)


def refine(params, config, tokenizer, prompts, *, rounds, accept_fn, critique_prompt, revise_prompt,
           approval="", strict=True, seeds=None, think_tag="think", max_batch=64, **sampling):
    """Answer, then `rounds` times: critique, revise, keep the better.

    Returns [N][rounds + 1] Rounds, the draft first. Every process calls this with the same prompts,
    works on its share of them and gets all.
    prompts: token ids of N chat prompts, each ending where the model is to answer.
    accept_fn(problem, round, old, new) -> bool decides between two Attempts.
    A problem is settled, and costs nothing more, when its revision has the same answer or its
    critique says `approval`. Each round sees the question, the answer that stands and the critique
    of it, so the context does not grow. strict: an answer is what the box holds, else also words.
    """
    ends = end_tokens(tokenizer, config)
    seeds = seeds or range(len(prompts))

    def ask(contexts, turn):
        """{problem: (tokens, text)} of a reply to each of {problem: context}."""
        replies = generate(params, config, list(contexts.values()), stop_tokens=ends,
                           seeds=[seeds[i] + (turn << 32) for i in contexts], max_batch=max_batch,
                           think_tag=think_tag, tokenizer=tokenizer, **sampling)
        return {i: (reply.tokens, completion_text(tokenizer, reply, ends))
                for i, [reply] in zip(contexts, replies)}

    def attempts(replies):
        """The replies, scored behind the bare question, so that old and new ones compare."""
        scored = response_logprobs(params, config, [prompts[i] for i in replies],
                                   [tokens for tokens, _ in replies.values()], max_batch)
        return {i: Attempt(tokens, text, extract_answer(text, strict),
                           score_response(tokenizer, tokens, logprobs, text, think_tag))
                for (i, (tokens, text)), logprobs in zip(replies.items(), scored)}

    rank, world = rank_and_world()
    drafts = attempts(ask({i: prompts[i] for i in range(rank, len(prompts), world)}, 0))
    history = {i: [Round(draft, len(draft.tokens))] for i, draft in drafts.items()}
    for number in range(1, rounds + 1):
        contexts = {i: prompts[i] + next_turn(tokenizer, r.attempt.tokens, ends, critique_prompt)
                    for i, (*_, r) in history.items() if not r.settled}
        critiques = ask(contexts, 2 * number - 1)
        doubted = {i: contexts[i] + next_turn(tokenizer, tokens, ends, revise_prompt)
                   for i, (tokens, text) in critiques.items()
                   if not approval or approval not in text}
        revisions = attempts(ask(doubted, 2 * number))
        for i, (*_, last) in history.items():
            old = last.attempt
            said, critique = critiques.get(i, ([], None))
            after = Round(old, last.spent + len(said), critique, settled=True)
            if i in revisions:
                new = revisions[i]
                accepted = accept_fn(i, number, old, new)
                same = None not in (old.answer, new.answer) and equivalent(new.answer, old.answer)
                after = Round(new if accepted else old, after.spent + len(new.tokens), critique,
                              new, accepted, same)
            history[i].append(after)
    merged = {i: found for share in gather_objects(history) for i, found in share.items()}
    return [merged[i] for i in range(len(prompts))]


# ---------------------------------------------------------------------- calibration


def auroc(confidences, right):
    """Chance that a right answer has more confidence than a wrong one, ties half, from their ranks;
    None unless there are both."""
    order = sorted(confidences)
    ranks = [(bisect_left(order, c) + bisect_right(order, c) - 1) / 2 for c in confidences]
    positive = sum(right)
    pairs = positive * (len(right) - positive)
    above = sum(rank for rank, r in zip(ranks, right) if r) - positive * (positive - 1) / 2
    return above / pairs if pairs else None


def reliability(confidences, right, bins=5):
    """(mean confidence, share right, number) of equal parts of the answers, least sure first."""
    pairs = sorted(zip(confidences, right))
    edges = [len(pairs) * b // bins for b in range(bins + 1)]
    parts = [pairs[begin:end] for begin, end in zip(edges, edges[1:]) if begin < end]
    return [(*map(fmean, zip(*part)), len(part)) for part in parts]


# ---------------------------------------------------------------------- what it came to


def equal_cost_results(setup, spent):
    """(label, row, scores) of self-consistency that costs what refinement spent, for each round.

    spent: mean tokens per problem after 0, 1, ... rounds. A budget between k and k + 1 samples
    takes the one more on a part of the problems; its row is that mean.
    """
    pool = math.ceil(max(spent) / spent[0]) + 1
    records, settings = eval.collect_records(setup, "samples", num_samples=pool)
    per_sample = fmean(s["tokens"] for r in records for s in r["samples"])
    votes = [votes_of(r, settings["grade"]) for r in records]
    results = []
    for k, budget in enumerate(spent[1:], 1):
        samples = min(max(1.0, budget / per_sample), pool - 1)
        part = samples % 1
        fewer, more = ([maj_at_k(*v, int(samples) + extra) for v in votes] for extra in (0, 1))
        scores = [(1 - part) * a + part * b for a, b in zip(fewer, more)]
        method = f"self-consistency at the tokens of K = {k}"
        row = eval.cost_row(records, scores, [samples] * len(records), method=method, **settings)
        results.append((method, row, scores))
    return results


def verdicts(history, references, strict=True):
    """Whether the answer that stands after each round is right: [N][rounds + 1]; undecided: no."""
    pairs = [(r.attempt.text, answer) for rounds, answer in zip(history, references)
             for r in rounds]
    flat = [verdict is True for verdict in verify_many(pairs, strict=strict)]
    width = len(history[0])
    return [flat[i:i + width] for i in range(0, len(flat), width)]


def write_traces(path, problems, history, right):
    """A line per problem: every draft, critique and revision, to be read."""
    with open(path, "w", encoding="utf-8") as file:
        for problem, rounds, marks in zip(problems, history, right):
            lines = [{"stands": r.attempt.text, "right": mark, "spent": r.spent,
                      "critique": r.critique, "revision": r.revision and r.revision.text,
                      "accepted": r.accepted} for r, mark in zip(rounds, marks)]
            trace = {"id": problem["id"], "reference": problem["answer"], "rounds": lines}
            file.write(json.dumps(trace) + "\n")


def print_rounds(history, right):
    """What each round did: the four-way table, cost and gain, and what the critic was worth."""
    lines = []
    for k in range(1, len(history[0])):
        before = [marks[k - 1] for marks in right]
        after = [marks[k] for marks in right]
        moves = Counter(zip(before, after))
        spent = fmean(rounds[k].spent - rounds[k - 1].spent for rounds in history)
        gain = fmean(after) - fmean(before)
        doubts = {True: [], False: []}  # of right and of wrong answers
        for rounds, was in zip(history, before):
            if rounds[k].critique is not None:
                doubts[was].append(ALL_RIGHT not in rounds[k].critique)
        lines.append([k, moves[True, True], moves[True, False], moves[False, True],
                      moves[False, False], eval.against(after, before), f"{spent:.1f}",
                      f"{1e5 * gain / spent:+.1f}" if spent else "-",
                      *(f"{sum(found)} of {len(found)}" for found in doubts.values())])
    say(eval.markdown(["round", "right to right", "right to wrong", "wrong to right",
                       "wrong to wrong", "points gained [95 %]", "tokens per problem",
                       "points per 1000 tokens", "right answers doubted", "wrong answers doubted"],
                      lines))


def print_calibration(history, right):
    """Whether the draft's confidence tells right from wrong."""
    drafts = [rounds[0].attempt for rounds in history]
    correct = [marks[0] for marks in right]
    areas = {name: auroc([d.scores[name] for d in drafts], correct) for name in SCORES[:-1]}
    shown = [f"{name} {'-' if area is None else f'{area:.3f}'}" for name, area in areas.items()]
    say(f"AUROC of the draft's score: {', '.join(shown)}")
    lines = []
    for name in ("answer-total", "total"):
        for chance, share, n in reliability([math.exp(d.scores[name]) for d in drafts], correct):
            lines.append([name, f"{chance:.3f}", percent(share), n])
    say(eval.markdown(["score", "as a probability", "right, %", "answers"], lines))


def main(args):
    setup = eval.load_setup(args, replies=3)
    check, again = (CHECK, AGAIN) if is_tiny(setup.config) else (CHECK_LONG, AGAIN_LONG)
    grade = setup.grade or PRESETS[setup.options["prompt"]].grade
    strict = grade == "strict"
    loop = {"rounds": args.rounds, "critique_prompt": args.critique_prompt or check,
            "revise_prompt": args.revise_prompt or again, "approval": args.approval}
    settings = eval.settings_of(setup) | loop | {"score": args.score, "accept": args.accept,
                                                 "grade": grade}
    loop |= {k: v for k, v in setup.options.items() if k not in ("prompt", "system", "shots")}
    seeds = [zlib.crc32(p["id"].encode()) for p in setup.problems]

    def run_with(gate):
        return refine(setup.params, setup.config, setup.tokenizer, eval.prompt_tokens(setup),
                      accept_fn=gate, seeds=seeds, strict=strict, **loop)

    def own_gate(i, k, old, new):
        always = args.accept == "always" or args.score == "none"
        return always or new.scores[args.score] > old.scores[args.score]

    started = time.perf_counter()
    history = run_with(own_gate)
    seconds = time.perf_counter() - started

    # from here on with the reference answers: what it came to, and what other gates make of it
    references = [p["answer"] for p in setup.problems]
    accepted = [r.accepted for rounds in history for r in rounds if r.revision is not None]
    rate = fmean(accepted) if accepted else 0.0

    def oracle_gate(i, k, old, new):
        return not verify(old.text, references[i], strict)

    def random_gate(i, k, old, new):
        return random.Random(f"{args.seed} {i} {k}").random() < rate

    results = []
    for gate, found in (("", history), (", oracle gate (a bound)", run_with(oracle_gate)),
                        (", random gate (a bound)", run_with(random_gate))):
        right = verdicts(found, references, strict)
        for k in range(1 if gate else 0, args.rounds + 1):  # all gates share the draft
            spent = [rounds[k].spent for rounds in found]
            share = sum(spent) / sum(rounds[-1].spent for rounds in history)
            scores = [float(marks[k]) for marks in right]
            method = f"refine, K = {k}{gate}"
            row = eval.score_row(setup.problems, scores, spent, method=method,
                                 seconds=seconds * share, **settings)
            results.append((method, row, scores))
    if args.temperature > 0:
        own = [row["tokens_mean"] for _, row, _ in results[:args.rounds + 1]]
        results += equal_cost_results(setup, own)
    eval.print_table(results)
    say(f"accepted: {percent(rate)} % of {len(accepted)} revisions; the random gate: as many\n")
    right = verdicts(history, references, strict)
    print_rounds(history, right)
    print_calibration(history, right)
    for _, row, _ in results:
        eval.append_row(args.results, row)
    if args.traces and rank_and_world()[0] == 0:
        write_traces(args.traces, setup.problems, history, right)


if __name__ == "__main__":
    run_main(main, parse_args)
