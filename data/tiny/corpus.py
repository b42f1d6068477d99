"""The corpus and the tokenizer of the embedded tiny model.

    python -m data.tiny.corpus --out runs/tiny/corpus.jsonl

The tiny model stands in for a pretrained base model: one that can reason better than it does. So
its corpus is mixed as human text is. Every document is a conversation of one to four problems with
one author, and authors differ: most state their answer at once; some work in writing, an operation
a line; some work in writing but do several operations at once, and slip, and only now and then
notice it. Asked to think step by step, all of them write. Some are asked to check what they wrote
and to solve the problem again. Only problems of the train split are used.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import arithmetic
from data.prompts import AGAIN, ALL_RIGHT, CHECK, STEP_BY_STEP, respond
from launch import Parser, at_least, between

AUTHORS = {"blunt": 0.60, "careful": 0.18, "careless": 0.22}
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    share = between(0.0, 1.0)
    add("--documents", type=at_least(1), default=160000, help="conversations in the corpus")
    add("--levels", type=at_least(0.0), nargs=5, default=[3, 2, 2, 2, 2],
        help="how often problems of each level come")
    add("--think-share", type=share, default=0.3,
        help="share of the documents whose problems ask for steps")
    add("--slip-rate", type=share, default=0.12,
        help="chance that a careless author errs in an operation")
    add("--notice-rate", type=share, default=0.2,
        help="chance that the slip is noticed and repaired on the next line")
    add("--skip-rate", type=share, default=0.6,
        help="chance that a careless author does one more operation on the same line")
    add("--check-share", type=share, default=0.1,
        help="share of the documents in which the author is asked to check")
    add("--seed", type=int, default=0, help="every random choice follows from it")
    add("--out", default="runs/tiny/corpus.jsonl", help="where the corpus goes")
    add("--tokenizer", action="store_true",
        help="only make tokenizer.json beside this file, and stop")
    return p.parse_args(argv)


def careless_thought(tree, rng, args):
    """(thought, its value): several operations a line, slips, and now and then their repair."""
    lines = []
    while not isinstance(tree, int):
        ahead = arithmetic.work_out(tree)
        done = 1
        while done + 1 < len(ahead) and rng.random() < args.skip_rate:
            done += 1
        right = ahead[done]
        wrong = None
        if rng.random() < args.slip_rate * done:
            wrong = arithmetic.slip(ahead[done - 1], rng)
        if wrong is None:
            lines.append("=" + arithmetic.render(right))
            tree = right
            continue
        lines.append("=" + arithmetic.render(wrong))
        tree = wrong
        if rng.random() < args.notice_rate:
            lines.append("wait =" + arithmetic.render(right))
            tree = right
    return "\n".join(lines), tree


def write_answer(problem, author, thinks, rng, args):
    """What an author answers: (text, the thought or None)."""
    if author == "blunt" and not thinks:
        return f"\\boxed{{{problem['answer']}}}", None
    thought, answer = problem["solution"], problem["answer"]
    if author == "careless":
        thought, answer = careless_thought(arithmetic.parse(problem["problem"]), rng, args)
    return respond(thought, answer), thought


def review(problem, thought):
    """What a careful reader says about a thought: each step is checked against the line before."""
    before = problem["problem"]
    lines = [line for line in thought.split("\n") if line != before]
    for number, line in enumerate(lines, 1):
        claim = line.removeprefix("wait ").removeprefix("=")
        steps = [arithmetic.render(tree) for tree in arithmetic.work_out(arithmetic.parse(before))]
        if claim not in steps[1:]:
            return f"Step {number} is wrong: ={steps[1]}"
        before = claim
    return ALL_RIGHT


def draw_problem(levels, rng):
    problem = None
    while not problem:
        [level] = rng.choices((1, 2, 3, 4, 5), levels)
        problem = arithmetic.generate(level, rng, "train")
    return problem


def write_document(rng, args):
    [author] = rng.choices(list(AUTHORS), AUTHORS.values())
    thinks = rng.random() < args.think_share
    turns = []  # of the user and of the author by turns
    for _ in range(rng.choices((1, 2, 3, 4), (76, 12, 7, 5))[0]):
        problem = draw_problem(args.levels, rng)
        style = author
        if thinks and author == "blunt":
            style = rng.choice(("careful", "careless"))
        text, thought = write_answer(problem, style, thinks, rng, args)
        turns += [problem["problem"] + (STEP_BY_STEP if thinks else ""), text]
    if thought and rng.random() < args.check_share / (1 - AUTHORS["blunt"] * 0.7):
        solved = respond(problem["solution"], problem["answer"])
        turns += [CHECK, review(problem, thought), AGAIN, solved]
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return {"messages": messages, "author": author}


def make_tokenizer():
    """Byte-level BPE with Qwen's split into words and digits, and merges for the few words here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    words = [
        STEP_BY_STEP, CHECK, AGAIN, ALL_RIGHT, "Step 1 is wrong:", "<think>\n", "</think>\n",
        "\\boxed{", "wait =", "user\n", "assistant\n", "system\n",
    ]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(words, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def main(args):
    if args.tokenizer:
        make_tokenizer().save(str(Path(__file__).with_name("tokenizer.json")))
        return
    rng = random.Random(args.seed)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for _ in range(args.documents):
            file.write(json.dumps(write_document(rng, args)) + "\n")
    print(f"{args.documents} documents in {out}")


if __name__ == "__main__":
    main(parse_args())
