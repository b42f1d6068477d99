"""Self-refinement: answer, score, critique and revise for K rounds; and whether it pays off.

    python refine.py                                    # the embedded tiny model, three rounds
    python refine.py --model qwen2.5-1.5b-instruct --limit 200 --score answer-mean
    python refine.py --score none --rounds 4            # accept every revision

The model answers, critiques its answer, solves the problem again with the critique in context, and
keeps the revision if its own score is higher. The loop sees only the problems; reference answers
are used once the rounds are over. The result is reported with two bounds: a gate that knows the
reference answers, and one that accepts at the model's own rate, but at random.

Self-Refine: Madaan et al. 2023, arXiv:2303.17651. Huang et al. 2023, arXiv:2310.01798: it seldom
helps without external feedback, and should be compared with self-consistency of equal cost.
"""

import json
import math
import random
import time
from bisect import bisect_left, bisect_right
from collections import ChainMap, Counter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import eval
from data.prompts import AGAIN, AGAIN_LONG, ALL_RIGHT, CHECK, CHECK_LONG, PRESETS
from eval import votes_of
from generate import completion_text, generate
from launch import Parser, at_least, gather_objects, progress_bar, rank_and_world, run_main, say
from model import encode_chat, end_tokens, is_tiny, token_logprobs
from run import append_lines, write_atomic
from stats import maj_at_k, percent
from verify import box_span, equivalent, extract_answer, format_reward, verify, verify_many

CHATS = [name for name, preset in PRESETS.items() if preset.text is None]
SCORES = ("answer-mean", "mean", "format")


def parse_args(argv=None):
    p = Parser(__doc__)
    eval.add_eval_flags(p, eval.SAMPLING_TEMPERATURE, "cot", CHATS)
    add = p.add_argument
    add("--rounds", type=at_least(1), default=3, help="K: rounds of critique and revision")
    add("--score", choices=(*SCORES, "none"), default="mean",  # the best gate on the dev split
        help="a revision must raise it: mean log-probability of the boxed answer or of the whole "
        "response; format: a closed thought and one box; none: accept every revision")
    add("--critique-prompt", help=f"default: {CHECK!r} for a tiny model, else a longer one")
    add("--revise-prompt", help=f"default: {AGAIN!r} for a tiny model, else a longer one")
    add("--approval", help=f"no further rounds if a critique contains this, such as {ALL_RIGHT!r}")
    add("--traces", help="a .jsonl file for all drafts, critiques and revisions")
    return p.parse_args(argv)


# ---------------------------------------------------------------------- scores


def token_span(tokenizer, tokens, begin, end):
    """(first, last + 1) of the tokens that cover characters begin to end of the decoded text."""
    def length(n):
        return len(tokenizer.decode(tokens[:n], skip_special_tokens=False))

    counts = range(len(tokens) + 1)
    return bisect_right(counts, begin, key=length) - 1, bisect_left(counts, end, key=length)


@torch.inference_mode()
def response_logprobs(params, config, prompts, responses, max_batch=64):
    """Log-probabilities at temperature 1 of each response's tokens, given its prompt: lists."""
    device = params["model.embed_tokens.weight"].device
    rows = [torch.tensor(prompt + response, device=device)
            for prompt, response in zip(prompts, responses)]
    logprobs = []
    for begin in range(0, len(rows), max_batch):
        batch = pad_sequence(rows[begin:begin + max_batch], batch_first=True)
        logprobs += token_logprobs(params, config, batch).tolist()
    return [row[len(prompt) - 1:][:len(response)]
            for row, prompt, response in zip(logprobs, prompts, responses)]


def score_response(tokenizer, tokens, logprobs, text, think_tag):
    """{name: score} of a response; "answer-mean" is -inf without a boxed answer."""
    answer = [-math.inf]
    if span := box_span(text):
        first, last = token_span(tokenizer, tokens, *span)
        answer = logprobs[first:last] or answer
    return {"answer-mean": fmean(answer), "mean": fmean(logprobs),
            "format": format_reward(text, think_tag)}


# ---------------------------------------------------------------------- the loop


class Attempt(NamedTuple):
    tokens: list  # the response, with its end token
    text: str
    answer: str | None
    scores: dict


class Round(NamedTuple):
    """The state of a problem after a round."""
    attempt: Attempt  # the current one
    spent: int  # tokens generated so far, including critiques and rejected revisions
    critique: str | None = None  # None: the problem was settled before this round
    revision: Attempt | None = None  # None: the critique approved
    accepted: bool = False
    settled: bool = False  # no further rounds


def follow_up(tokenizer, reply, ends, prompt):
    """Token ids to append to a conversation: a reply without its end token, then a user turn."""
    content = reply[:-1] if reply and reply[-1] in ends else reply
    turn_end = tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
    turn = [{"role": "user", "content": prompt}]
    return content + turn_end + encode_chat(tokenizer, turn, system=None)


def refine(params, config, tokenizer, prompts, *, rounds, accept_fn, critique_prompt, revise_prompt,
           seeds, approval=None, strict=True, think_tag="think", max_batch=64, **sampling):
    """Answer, then `rounds` times: critique, revise, keep the better answer.

    Returns [N][rounds + 1] Rounds, the draft first. Every process calls this with the same prompts,
    works on its share and gets all results.
    prompts: token ids of N chat prompts, each ending where the model's turn begins. seeds: N ints.
    accept_fn(problem, round, old, new) -> bool chooses between two Attempts.
    A problem is settled, and costs nothing more, once its revision repeats the current answer or
    its critique contains `approval`. Each round sees only the question, the current attempt and its
    critique, so the context does not grow. strict: read answers only from a box.
    """
    ends = end_tokens(tokenizer, config)
    rank, world = rank_and_world()

    def sample_replies(contexts, turn, label):
        """{problem: (tokens, text)}, one reply to each of {problem: context}."""
        with progress_bar(len(contexts) * world, label) as on_step:
            replies = generate(params, config, list(contexts.values()), stop_tokens=ends,
                               seeds=[seeds[i] + (turn << 32) for i in contexts],
                               max_batch=max_batch, think_tag=think_tag, tokenizer=tokenizer,
                               on_step=on_step, **sampling)
        return {i: (reply.tokens, completion_text(tokenizer, reply, ends))
                for i, [reply] in zip(contexts, replies)}

    def score_replies(replies):
        """{problem: Attempt}, scored given the bare question, so that all attempts compare."""
        logprobs = response_logprobs(params, config, [prompts[i] for i in replies],
                                     [tokens for tokens, _ in replies.values()], max_batch)
        return {i: Attempt(tokens, text, extract_answer(text, strict),
                           score_response(tokenizer, tokens, row, text, think_tag))
                for (i, (tokens, text)), row in zip(replies.items(), logprobs)}

    questions = {i: prompts[i] for i in range(rank, len(prompts), world)}
    drafts = score_replies(sample_replies(questions, 0, "answering"))
    history = {i: [Round(draft, len(draft.tokens))] for i, draft in drafts.items()}
    for number in range(1, rounds + 1):
        last = {i: states[-1] for i, states in history.items()}
        contexts = {i: prompts[i] + follow_up(tokenizer, r.attempt.tokens, ends, critique_prompt)
                    for i, r in last.items() if not r.settled}
        critiques = sample_replies(contexts, 2 * number - 1, "checking")
        to_revise = {i: contexts[i] + follow_up(tokenizer, tokens, ends, revise_prompt)
                     for i, (tokens, text) in critiques.items()
                     if not approval or approval not in text}
        revisions = score_replies(sample_replies(to_revise, 2 * number, "revising"))
        for i, before in last.items():
            old, new = before.attempt, revisions.get(i)
            tokens, critique = critiques.get(i, ([], None))
            spent = before.spent + len(tokens)
            after = Round(old, spent, critique, settled=True)
            if new:
                accepted = accept_fn(i, number, old, new)
                same = None not in (old.answer, new.answer) and equivalent(new.answer, old.answer)
                after = Round(new if accepted else old, spent + len(new.tokens), critique, new,
                              accepted, settled=same)
            history[i].append(after)
    gathered = ChainMap(*gather_objects(history))
    return [gathered[i] for i in range(len(prompts))]


# ---------------------------------------------------------------------- results


def auroc(confidences, right):
    """P(a right answer has more confidence than a wrong one), ties count half; nan without both."""
    wins = [(a > b) + (a == b) / 2 for a, a_right in zip(confidences, right) if a_right
            for b, b_right in zip(confidences, right) if not b_right]
    return fmean(wins) if wins else math.nan


def equal_cost_rows(setup, spent):
    """One row per round: self-consistency at the token cost of refinement.

    spent: mean tokens per problem after 0, 1, ... rounds. A budget of between k and k + 1 samples
    is an interpolation, as if k + 1 were drawn for a fraction of the problems.
    """
    pool = math.ceil(max(spent) / spent[0]) + 1
    records, settings = eval.collect_records(setup, "samples", num_samples=pool)
    per_sample = fmean(s["tokens"] for r in records for s in r["samples"])
    votes = [votes_of(r, settings["grade"]) for r in records]
    rows = []
    for k, budget in enumerate(spent[1:], 1):
        samples = min(max(1.0, budget / per_sample), pool - 1)
        fraction = samples % 1
        outcomes = []
        for pair in votes:
            fewer = maj_at_k(*pair, int(samples))
            more = maj_at_k(*pair, int(samples) + 1)
            outcomes.append(((1 - fraction) * fewer + fraction * more, samples))
        rows.append(eval.cost_row(records, outcomes,
                                  method=f"self-consistency at the tokens of K = {k}", **settings))
    return rows


def write_traces(path, problems, history, rows):
    """Write one line per problem with its drafts, critiques and revisions, for reading."""
    text = ""
    for problem, rounds in zip(problems, history):
        lines = [{"stands": r.attempt.text, "right": row["scores"][problem["id"]] == 1,
                  "spent": r.spent, "critique": r.critique,
                  "revision": r.revision and r.revision.text, "accepted": r.accepted}
                 for r, row in zip(rounds, rows)]
        trace = {"id": problem["id"], "reference": problem["answer"], "rounds": lines}
        text += json.dumps(trace) + "\n"
    write_atomic(Path(path), text)


def print_rounds(rows):
    """Print how each round changed the answers, given the rows after 0, 1, ... rounds."""
    moves = {"right to right": (1, 1), "right to wrong": (1, 0),
             "wrong to right": (0, 1), "wrong to wrong": (0, 0)}
    lines = []
    for k, (before, after) in enumerate(zip(rows, rows[1:]), 1):
        counts = Counter(zip(*eval.paired_scores(before, after)))
        lines.append([k, *(counts[m] for m in moves.values()), eval.format_gain(after, before)])
    eval.say_table(["round", *moves, "points gained [95 %]"], lines)


def measure(setup, gate, loop, settings, suffix=""):
    """(history, rows) of refine() with a gate: one graded row per round, the draft first."""
    started = time.perf_counter()
    history = refine(setup.params, setup.config, setup.tokenizer, setup.prompts,
                     accept_fn=gate, **loop)
    seconds = time.perf_counter() - started
    total = sum(rounds[-1].spent for rounds in history)
    rows = []
    for k, states in enumerate(zip(*history)):
        pairs = [(r.attempt.text, p["answer"]) for r, p in zip(states, setup.problems)]
        scores = [float(verdict is True) for verdict in verify_many(pairs, strict=loop["strict"])]
        spent = [r.spent for r in states]
        rows.append(eval.score_row(setup.problems, scores, spent, seconds * sum(spent) / total,
                                   method=f"refine, K = {k}{suffix}", **settings))
    return history, rows


def main(args):
    if args.traces:
        append_lines(args.traces, [])  # create it, or fail before sampling
    setup = eval.load_setup(args, replies=3)
    check, again = (CHECK, AGAIN) if is_tiny(setup.config) else (CHECK_LONG, AGAIN_LONG)
    loop = {"rounds": args.rounds, "approval": args.approval, "strict": setup.grade == "strict",
            "critique_prompt": args.critique_prompt or check,
            "revise_prompt": args.revise_prompt or again}
    settings = eval.settings_of(setup) | loop | {"score": args.score, "grade": setup.grade}
    loop |= {k: v for k, v in setup.options.items() if k not in ("prompt", "system", "shots")}
    loop["seeds"] = eval.prompt_seeds(setup.problems)

    def score_gate(i, k, old, new):
        return args.score == "none" or new.scores[args.score] > old.scores[args.score]

    history, rows = measure(setup, score_gate, loop, settings)
    accepted = [r.accepted for rounds in history for r in rounds if r.revision]
    rate = fmean(accepted) if accepted else 0.0

    def oracle_gate(i, k, old, new):
        return not verify(old.text, setup.problems[i]["answer"], loop["strict"])

    def random_gate(i, k, old, new):
        return random.Random(f"{args.seed} {i} {k}").random() < rate

    bounds = []
    for name, gate in (("oracle", oracle_gate), ("random", random_gate)):
        _, bound = measure(setup, gate, loop, settings, f", {name} gate (a bound)")
        bounds += bound[1:]  # all gates share the draft
    if args.temperature:
        bounds += equal_cost_rows(setup, [row["tokens_mean"] for row in rows])
    eval.publish(setup, rows + bounds)
    print_rounds(rows)
    say(f"accepted: {percent(rate)} % of {len(accepted)} revisions (the random gate's rate)")
    right = rows[0]["scores"].values()
    for name in SCORES:
        area = auroc([rounds[0].attempt.scores[name] for rounds in history], right)
        say(f"AUROC of the draft's score, {name}: {area:.3f}")
    if args.traces and rank_and_world()[0] == 0:
        write_traces(args.traces, setup.problems, history, rows)


if __name__ == "__main__":
    run_main(main, parse_args)
