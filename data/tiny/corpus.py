"""The corpus and the tokenizer of the embedded tiny model.

    python -m data.tiny.corpus --out runs/tiny/corpus.jsonl

The tiny model stands in for a pretrained base model, which can reason better than it usually does.
So its corpus is as mixed as human text. Each document is a conversation with one author about one
to four problems. Most authors answer immediately; some show their work, one operation per line;
some do several operations per line, make mistakes and only occasionally notice them. When told to
think step by step, every author shows work. Some are told to check their work and solve the problem
again. All problems are from the train split.
"""

import json
import random
from itertools import cycle
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import arithmetic
from data.prompts import AGAIN, ALL_RIGHT, CHECK, STEP_BY_STEP, format_response
from launch import Parser, at_least

AUTHORS = {"blunt": 0.60, "careful": 0.18, "careless": 0.22}
LEVELS = {1: 3, 2: 2, 3: 2, 4: 2, 5: 2}  # {level: relative frequency}
THINK_SHARE = 0.3  # share of documents that ask for step-by-step thinking
CHECK_SHARE = 0.1  # share of documents that ask the author to check their work
# A careless author's probabilities:
SLIP_RATE = 0.12  # of a mistake, per operation
NOTICE_RATE = 0.2  # of repairing a mistake on the next line
SKIP_RATE = 0.6  # of doing another operation on the same line
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--documents", type=at_least(1), default=160000, help="number of conversations")
    add("--seed", type=int, default=0, help="seed of every random choice")
    add("--out", default="runs/tiny/corpus.jsonl", help="output file")
    add("--tokenizer", action="store_true",
        help="write only tokenizer.json, next to this file")
    return p.parse_args(argv)


def careless_thought(tree, rng):
    """(thought, final value), with several operations per line, slips, and occasional repairs."""
    lines = []
    while not isinstance(tree, int):
        trees = arithmetic.work_out(tree)
        done = 1  # operations on this line
        while done + 1 < len(trees) and rng.random() < SKIP_RATE:
            done += 1
        right = trees[done]
        wrong = None
        if rng.random() < SLIP_RATE * done:
            wrong = arithmetic.slip(trees[done - 1], rng)
        tree = right if wrong is None else wrong
        lines.append("=" + arithmetic.render(tree))
        if wrong is not None and rng.random() < NOTICE_RATE:
            tree = right
            lines.append("wait =" + arithmetic.render(right))
    return "\n".join(lines), tree


def write_answer(problem, author, thinks, rng):
    """An author's reply: (text, its thought or None)."""
    if author == "blunt" and not thinks:
        return f"\\boxed{{{problem['answer']}}}", None
    thought, answer = problem["solution"], problem["answer"]
    if author == "careless":
        thought, answer = careless_thought(arithmetic.parse(problem["problem"]), rng)
    return format_response(thought, answer), thought


def review(problem, thought):
    """A careful reader's verdict on a thought: each step is checked against the previous line."""
    previous = problem["problem"]
    lines = [line for line in thought.split("\n") if line != previous]
    for number, line in enumerate(lines, 1):
        claim = line.removeprefix("wait ").removeprefix("=")
        steps = list(map(arithmetic.render, arithmetic.work_out(arithmetic.parse(previous))))
        if claim not in steps[1:]:
            return f"Step {number} is wrong: ={steps[1]}"
        previous = claim
    return ALL_RIGHT


def draw_problem(rng):
    problem = None
    while not problem:
        [level] = rng.choices(list(LEVELS), LEVELS.values())
        problem = arithmetic.generate(level, rng, "train")
    return problem


def write_document(rng):
    [author] = rng.choices(list(AUTHORS), AUTHORS.values())
    thinks = rng.random() < THINK_SHARE
    turns = []  # alternately of the user and the author
    for _ in range(rng.choices((1, 2, 3, 4), (76, 12, 7, 5))[0]):
        problem = draw_problem(rng)
        style = author
        if thinks and author == "blunt":
            style = rng.choice(("careful", "careless"))
        text, thought = write_answer(problem, style, thinks, rng)
        turns += [problem["problem"] + (STEP_BY_STEP if thinks else ""), text]
    if thought and rng.random() < CHECK_SHARE / (1 - AUTHORS["blunt"] * 0.7):
        solved = format_response(problem["solution"], problem["answer"])
        turns += [CHECK, review(problem, thought), AGAIN, solved]
    messages = [{"role": role, "content": text}
                for role, text in zip(cycle(("user", "assistant")), turns)]
    return {"messages": messages, "author": author}


def make_tokenizer():
    """Byte-level BPE with Qwen's split into words and digits, and merges for a few phrases."""
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
            file.write(json.dumps(write_document(rng)) + "\n")
    print(f"{args.documents} documents in {out}")


if __name__ == "__main__":
    main(parse_args())
