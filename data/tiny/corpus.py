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
from itertools import cycle
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import arithmetic
from data.prompts import AGAIN, ALL_RIGHT, CHECK, STEP_BY_STEP, respond
from launch import Parser, at_least

AUTHORS = {"blunt": 0.60, "careful": 0.18, "careless": 0.22}
LEVELS = {1: 3, 2: 2, 3: 2, 4: 2, 5: 2}  # how often problems of each come
THINK_SHARE = 0.3  # of the documents, whose problems ask for steps
CHECK_SHARE = 0.1  # of the documents, in which the author is asked to check
# Of a careless author's operations, or lines:
SLIP_RATE = 0.12  # they err in an operation
NOTICE_RATE = 0.2  # they notice a slip, and repair it on the next line
SKIP_RATE = 0.6  # they do one more operation on the same line
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--documents", type=at_least(1), default=160000, help="conversations in the corpus")
    add("--seed", type=int, default=0, help="every random choice follows from it")
    add("--out", default="runs/tiny/corpus.jsonl", help="where the corpus goes")
    add("--tokenizer", action="store_true",
        help="only make tokenizer.json beside this file, and stop")
    return p.parse_args(argv)


def careless_thought(tree, rng):
    """(thought, its value): several operations a line, slips, and now and then their repair."""
    lines = []
    while not isinstance(tree, int):
        ahead = arithmetic.work_out(tree)
        done = 1
        while done + 1 < len(ahead) and rng.random() < SKIP_RATE:
            done += 1
        right = ahead[done]
        wrong = None
        if rng.random() < SLIP_RATE * done:
            wrong = arithmetic.slip(ahead[done - 1], rng)
        tree = right if wrong is None else wrong
        lines.append("=" + arithmetic.render(tree))
        if wrong is not None and rng.random() < NOTICE_RATE:
            tree = right
            lines.append("wait =" + arithmetic.render(right))
    return "\n".join(lines), tree


def write_answer(problem, author, thinks, rng):
    """What an author answers: (text, the thought or None)."""
    if author == "blunt" and not thinks:
        return f"\\boxed{{{problem['answer']}}}", None
    thought, answer = problem["solution"], problem["answer"]
    if author == "careless":
        thought, answer = careless_thought(arithmetic.parse(problem["problem"]), rng)
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


def draw_problem(rng):
    problem = None
    while not problem:
        [level] = rng.choices(list(LEVELS), LEVELS.values())
        problem = arithmetic.generate(level, rng, "train")
    return problem


def write_document(rng):
    [author] = rng.choices(list(AUTHORS), AUTHORS.values())
    thinks = rng.random() < THINK_SHARE
    turns = []  # of the user and of the author by turns
    for _ in range(rng.choices((1, 2, 3, 4), (76, 12, 7, 5))[0]):
        problem = draw_problem(rng)
        style = author
        if thinks and author == "blunt":
            style = rng.choice(("careful", "careless"))
        text, thought = write_answer(problem, style, thinks, rng)
        turns += [problem["problem"] + (STEP_BY_STEP if thinks else ""), text]
    if thought and rng.random() < CHECK_SHARE / (1 - AUTHORS["blunt"] * 0.7):
        solved = respond(problem["solution"], problem["answer"])
        turns += [CHECK, review(problem, thought), AGAIN, solved]
    messages = [{"role": role, "content": text}
                for role, text in zip(cycle(("user", "assistant")), turns)]
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
            file.write(json.dumps(write_document(rng)) + "\n")
    print(f"{args.documents} documents in {out}")


if __name__ == "__main__":
    main(parse_args())
