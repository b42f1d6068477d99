"""The corpus and the tokenizer of the embedded tiny model.

    python data/tiny/corpus.py --out runs/tiny/corpus.jsonl

The tiny model stands in for a pretrained base model: one that can reason better than it does. So its corpus is mixed as
human text is. Every document is a conversation of one to four problems with one author, and authors differ: most state
their answer at once; some work in writing, an operation a line; some work in writing but do several operations at once,
and slip, and only now and then notice it. Asked to think step by step, all of them write. Some are asked to check what
they wrote and to solve the problem again. Only problems of the train split are used.
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import arithmetic  # noqa: E402
from data.families import split_of  # noqa: E402

STEP_BY_STEP = "\nLet's think step by step."  # eval.py's "cot" preset; a test holds the two together
CHECK, AGAIN = "Check each step.", "Solve it again."  # refine.py's prompts, likewise
ALL_RIGHT = "Every step is right."
AUTHORS = {"blunt": 0.60, "careful": 0.18, "careless": 0.22}
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=int, default=160000)
    p.add_argument("--levels", type=float, nargs=5, default=[3, 2, 2, 2, 2],
                   help="how often problems of each level come")
    p.add_argument("--think-share", type=float, default=0.3, help="share of the documents whose problems ask for steps")
    p.add_argument("--slip-rate", type=float, default=0.12, help="chance that a careless author errs in an operation")
    p.add_argument("--notice-rate", type=float, default=0.2,
                   help="chance that the slip is noticed and repaired on the next line")
    p.add_argument("--skip-rate", type=float, default=0.6,
                   help="chance that a careless author does one more operation on the same line")
    p.add_argument("--check-share", type=float, default=0.1,
                   help="share of the documents in which the author is asked to check")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs/tiny/corpus.jsonl")
    p.add_argument("--tokenizer", action="store_true", help="only make tokenizer.json beside this file, and stop")
    return p.parse_args()


def careless_thought(tree, rng, args):
    """Several operations a line, slips, and now and then their repair: (thought, the value it ends in)."""
    lines = []
    while not isinstance(tree, int):
        ahead = arithmetic.work_out(tree)
        done = 1
        while done + 1 < len(ahead) and rng.random() < args.skip_rate:
            done += 1
        right, wrong = ahead[done], None
        if rng.random() < args.slip_rate * done:
            wrong = arithmetic.slip(ahead[done - 1], rng)
        if wrong is not None:
            lines.append("=" + arithmetic.render(wrong))
        if wrong is not None and rng.random() >= args.notice_rate:
            tree = wrong
        else:
            lines.append(("=" if wrong is None else "wait =") + arithmetic.render(right))
            tree = right
    return "\n".join(lines), tree


def respond(thought, answer):
    return f"<think>\n{thought}\n</think>\n\\boxed{{{answer}}}"


def write_answer(problem, author, thinks, rng, args):
    """What an author answers: (text, the thought or None)."""
    if author == "blunt" and not thinks:
        return f"\\boxed{{{problem['answer']}}}", None
    if author == "careless":
        thought, answer = careless_thought(arithmetic.parse(problem["problem"]), rng, args)
    else:
        thought, answer = problem["solution"], problem["answer"]
    return respond(thought, answer), thought


def judge(problem, thought):
    """What a careful reader says about a thought: each step checked against the line before it."""
    before = problem["problem"]
    for number, line in enumerate((line for line in thought.split("\n") if line != problem["problem"]), 1):
        claim = line.removeprefix("wait ").removeprefix("=")
        steps = list(map(arithmetic.render, arithmetic.work_out(arithmetic.parse(before))))
        if claim not in steps[1:]:
            return f"Step {number} is wrong: ={steps[1]}"
        before = claim
    return ALL_RIGHT


def write_document(rng, args):
    author = rng.choices(list(AUTHORS), AUTHORS.values())[0]
    thinks = rng.random() < args.think_share
    turns = []  # of the user and of the author, in turn
    for _ in range(rng.choices((1, 2, 3, 4), (76, 12, 7, 5))[0]):
        problem = None
        while problem is None or split_of(problem["key"]) != "train":
            problem = arithmetic.generate(rng.choices((1, 2, 3, 4, 5), args.levels)[0], rng)
        style = rng.choice(("careful", "careless")) if thinks and author == "blunt" else author
        text, thought = write_answer(problem, style, thinks, rng, args)
        turns += [problem["problem"] + (STEP_BY_STEP if thinks else ""), text]
    if thought and rng.random() < args.check_share / (1 - AUTHORS["blunt"] * 0.7):
        turns += [CHECK, judge(problem, thought), AGAIN, respond(problem["solution"], problem["answer"])]
    messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns)]
    return {"messages": messages, "author": author}


def make_tokenizer():
    """Byte-level BPE with Qwen's split into words and digits; merges for the few words here, none for expressions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    words = [STEP_BY_STEP, CHECK, AGAIN, ALL_RIGHT, "Step 1 is wrong:", "<think>\n", "</think>\n", "\\boxed{", "wait =",
             "user\n", "assistant\n", "system\n"]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(words, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def main(args):
    if args.tokenizer:
        make_tokenizer().save(str(ROOT / "data" / "tiny" / "tokenizer.json"))
        return
    rng, out = random.Random(args.seed), Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for _ in range(args.documents):
            file.write(json.dumps(write_document(rng, args)) + "\n")
    print(f"{args.documents} documents in {out}")


if __name__ == "__main__":
    main(parse_args())
