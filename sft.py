"""Supervised training on worked answers: the cold start before reinforcement learning, and how the tiny model was made.

    python data/traces.py --data arithmetic words:1 --out traces.jsonl        # checked traces of generated problems
    python sft.py --data traces.jsonl                                         # the embedded tiny model, minutes
    python sft.py --model qwen2.5-1.5b --data traces.jsonl --lora-rank 32     # a real one
    python grpo.py --model runs/sft/checkpoints/best                          # goes on from there
    python sft.py --model data/tiny --from-scratch --data runs/tiny/corpus.jsonl

A line of the data is {"problem", "response"}, as data/traces.py writes it, or a conversation {"messages": [{"role",
"content"}, ...]}. Only what the assistant says is learned, its end token included; the tokens of the final answer count
`--answer-weight` times. Examples are packed into rows without seeing each other; the loss is a mean over the whole
optimizer step, so that neither the packing nor the number of processes changes the gradient.
"""

import argparse
import hashlib
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data import load_problems
from data.files import read_rows
from data.teachers import in_form
from eval import PRESETS, evaluate, is_tiny, render_prompt
from model import (head_logprobs, init_lora, init_params, load_config, load_params, load_system_prompt, load_tokenizer,
                   packed_hidden_states, render_chat, resolve_model)
from optim import (add_train_flags, all_sum, check_train_flags, compute_dtype, draw_curves, init_distributed,
                   init_optimizer, learning_rate, load_checkpoint, log_samples, log_step, optimizer_step,
                   parse_train_args, peak_memory_gib, rank_and_world, resume_command, save_checkpoint, start_run,
                   stop_signals)

PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots]  # an example stands alone
PARTS = ("thought", "answer", "end")  # what a supervised token belongs to; the loss is logged apart for each
CONTEXT = -1  # the part of a token that is only read


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                conflict_handler="resolve")  # of the shared flags, --lr is defined anew
    p.add_argument("--model", default="tiny", help="tiny, qwen2.5-1.5b, a hub id, or a directory")
    p.add_argument("--from-scratch", action="store_true",
                   help="random weights; of --model only config.json and the tokenizer are read")
    p.add_argument("--data", required=True, help=".jsonl file of examples")
    p.add_argument("--prompt", default="plain", choices=PROMPTS,
                   help="how a problem is put (default %(default)s); a conversation stands for itself")
    p.add_argument("--think-tag", default="think", choices=("think", "thought"))
    p.add_argument("--answer-weight", type=float, default=1.2,
                   help="weight of the final \\boxed{}'s tokens in the loss; others count 1 (default %(default)s)")
    p.add_argument("--epochs", type=float, default=3.0, help="times that every example is seen (default %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="examples in an optimizer step (default %(default)s)")
    p.add_argument("--micro-tokens", type=int, default=8192, help="tokens in one packed row (default %(default)s)")
    p.add_argument("--max-tokens", type=int, default=2048,
                   help="longer examples are left out, and counted (default %(default)s)")
    p.add_argument("--lora-rank", type=int, default=0,
                   help="train an adapter of this rank on every linear layer; 0: all weights")
    p.add_argument("--checkpointing", action="store_true",
                   help="recompute activations in the backward pass: less memory, a third more time")
    p.add_argument("--validation", type=int, default=200,
                   help="examples held out of the training data (default %(default)s; 0: none)")
    p.add_argument("--patience", type=int, default=0,
                   help="stop after this many evaluations without a better validation loss; 0: never")
    p.add_argument("--eval-data", help="problem set or .jsonl on whose dev split answers are written and graded, too")
    p.add_argument("--eval-limit", type=int, default=200, help="problems of it (default %(default)s)")
    p.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default %(default)s)")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of an answer in evaluation (default %(default)s)")
    add_train_flags(p, lr=None, run_dir="runs/sft")
    p.add_argument("--lr", type=float, help="peak learning rate (default: all weights 1e-5, an adapter 2e-4; of a tiny "
                   "model 2e-3, an adapter 5e-3)")
    return parse_train_args(p, argv)


def default_lr(config, lora_rank):
    """An adapter learns at about ten times the rate of all weights, and a tiny model faster still."""
    return (5e-3 if lora_rank else 2e-3) if is_tiny(config) else (2e-4 if lora_rank else 1e-5)


def check_args(args):
    for flag, fine, expected in (
            ("epochs", args.epochs > 0, "more than 0"), ("batch", args.batch >= 1, "at least 1"),
            ("micro_tokens", args.micro_tokens >= 1, "at least 1"), ("max_tokens", args.max_tokens >= 2, "at least 2"),
            ("answer_weight", args.answer_weight > 0, "more than 0"), ("lora_rank", args.lora_rank >= 0, "0 or more"),
            ("validation", args.validation >= 0, "0 or more"), ("eval_every", args.eval_every >= 1, "at least 1"),
            ("eval_limit", args.eval_limit >= 1, "at least 1"), ("patience", args.patience >= 0, "0 or more"),
            ("patience", not args.patience or args.validation, "0 where --validation is 0"),
            ("max_new_tokens", args.max_new_tokens >= 1, "at least 1")):
        if not fine:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, expected {expected}")
    check_train_flags(args)


# ------------------------------------------------------------------------------------ examples


class Example(NamedTuple):
    tokens: list[int]
    parts: list[int]  # for each token the index of its part in PARTS, or CONTEXT


def split_conversation(row, prompt, system, think_tag):
    """The text of an example as [(text, whether the assistant says it), ...]."""
    if "messages" not in row:
        return [(render_prompt(prompt, row, system=system, think_tag=think_tag), False), (row["response"], True)]
    pieces, done = [], 0
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            before = render_chat(row["messages"][:i], system=system)
            # a reply's end token is learned, the line break after it belongs to the template
            pieces += [(before[done:], False), (message["content"], True)]
            done = len(before) + len(message["content"] + "<|im_end|>")
    return pieces


def answer_span(text, think_tag="think"):
    """(begin, end) of a reply's answer: the last box behind the thinking block, braces included; (0, 0) without one."""
    begin, depth = text.rfind("\\boxed{", max(0, text.rfind(f"</{think_tag}>"))), 0
    for end in range(begin + len("\\boxed"), len(text)) if begin >= 0 else ():
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return begin, end + 1
    return 0, 0


def encode_example(row, tokenizer, end_token, *, prompt="plain", system=None, think_tag="think"):
    """An Example: each piece is tokenised by itself, as when the model is asked.

    What a reply says beside its answer, words behind the box included, counts as thought.
    """
    tokens, parts = [], []
    for text, said in split_conversation(row, prompt, system, think_tag):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        tokens += encoded.ids
        if said:
            first, last = answer_span(text, think_tag)
            parts += [PARTS.index("answer" if begin < last and end > first else "thought")
                      for begin, end in encoded.offsets]
            tokens.append(end_token)
            parts.append(PARTS.index("end"))
        else:
            parts += [CONTEXT] * len(encoded.ids)
    return Example(tokens, parts)


def check_messages(messages, where):
    """Raises ValueError unless it is a conversation in which the assistant says something."""
    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages)
    if not fine or not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: messages are {messages!r:.60}, expected a list of {{\"role\", \"content\"}}, "
                         "one of the assistant's among them")


def read_examples(path, tokenizer, end_token, max_tokens, **how):
    """The examples of a file, too long ones left out and counted. Raises ValueError naming file, line and field."""
    examples, too_long = [], 0
    for number, row in read_rows(path):
        if "messages" in row:
            check_messages(row["messages"], f"{path}, line {number}")
        elif not all(isinstance(row.get(k), str) for k in ("problem", "response")):
            raise ValueError(f"{path}, line {number}: expected text in problem and response, or messages; "
                             f"found {', '.join(row) or 'nothing'}")
        example = encode_example(row, tokenizer, end_token, **how)
        if len(example.tokens) > max_tokens:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise ValueError(f"{path}: no example of at most --max-tokens {max_tokens}; {too_long} are longer")
    return examples, too_long


def show_example(example, tokenizer):
    """The text with what is learned between marks, for a person to check."""
    shown, last = "", CONTEXT
    for token, part in zip(example.tokens, example.parts):
        if part != last:
            shown += ("" if last == CONTEXT else "]") + ("" if part == CONTEXT else f"[{PARTS[part]}: ")
        shown, last = shown + tokenizer.decode([token], skip_special_tokens=False), part
    return shown + ("" if last == CONTEXT else "]")


# ------------------------------------------------------------------------------------ loss


def pack(examples, micro_tokens):
    """Rows of at most `micro_tokens` tokens (a longer example has its own): lists of examples, of similar lengths."""
    rows = []
    for example in sorted(examples, key=lambda e: len(e.tokens)):
        if not rows or sum(len(e.tokens) for e in rows[-1]) + len(example.tokens) > micro_tokens:
            rows.append([])
        rows[-1].append(example)
    return rows


def row_loss(params, config, row, answer_weight, checkpointing=False):
    """(weighted sum of -log p over the supervised tokens of a packed row, {part: [sum, count]}).

    Neighbours in a row are of like length, so that attention, which runs on groups of 16 padded texts, wastes little.
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(0, [len(e.tokens) for e in row[i:i + 16]]) for i in range(0, len(row), 16)]
    tokens = torch.tensor([t for e in row for t in e.tokens], device=device)  # [T]
    parts = torch.tensor([p for e in row for p in e.parts], device=device)
    hidden = packed_hidden_states(params, config, tokens, groups, checkpointing)  # [T, D]
    learned = (parts != CONTEXT).nonzero()[:, 0]  # no example begins with one: the token before is of the same example
    logprobs, _ = head_logprobs(params, config, hidden[learned - 1], tokens[learned])  # [n]
    weights = torch.where(parts[learned] == PARTS.index("answer"), answer_weight, 1.0)
    sums = torch.zeros(len(PARTS), device=device).index_add(0, parts[learned], -logprobs.detach())
    counts = parts[learned].bincount(minlength=len(PARTS))
    return -(weights * logprobs).sum(), {part: [s, n] for part, s, n in zip(PARTS, sums.tolist(), counts.tolist())}


def total_weight(examples, answer_weight):
    """What the weighted sum over these examples is divided by."""
    return sum(answer_weight if p == PARTS.index("answer") else 1.0 for e in examples for p in e.parts if p != CONTEXT)


def batch_loss(params, config, examples, answer_weight, micro_tokens, checkpointing=False, backward=False):
    """The mean loss over `examples`: (loss, {part: loss}), the same on every process, each of which computes its share.

    backward: also add the gradient of this process's share to `.grad`.
    """
    rank, world = rank_and_world()
    total, loss, sums = total_weight(examples, answer_weight), 0.0, {part: [0.0, 0] for part in PARTS}
    for row in pack(examples[rank::world], micro_tokens):
        with torch.set_grad_enabled(backward):
            row_sum, parts = row_loss(params, config, row, answer_weight, checkpointing)
        if backward:
            (row_sum / total).backward()
        loss += row_sum.item() / total
        for part, (s, n) in parts.items():
            sums[part] = [sums[part][0] + s, sums[part][1] + n]
    loss, *flat = all_sum([loss, *(x for part in PARTS for x in sums[part])])
    return loss, {part: s / n if n else math.nan for part, s, n in zip(PARTS, flat[::2], flat[1::2])}


# ------------------------------------------------------------------------------------ the run


def batch_of_step(examples, step, batch, seed):
    """The examples of step 1, 2, ...: permutations by (seed, epoch), one after another, cut into batches."""
    chosen, n = [], len(examples)
    for place in range((step - 1) * batch, step * batch):
        if not chosen or place % n == 0:
            order = random.Random(f"{seed} {place // n}").sample(range(n), n)
        chosen.append(examples[order[place % n]])
    return chosen


def run_evaluation(params, config, tokenizer, validation, problems, system, args):
    """Validation loss by part, and accuracy and form of written answers: a dict of metrics, and a few samples."""
    metrics, samples = {}, []
    if validation:
        loss, parts = batch_loss(params, config, validation, args.answer_weight, args.micro_tokens)
        metrics = {"val_loss": loss} | {f"val_{part}": value for part, value in parts.items()}
    rank, world = rank_and_world()
    if problems:
        weights = {name: tensor.detach() for name, tensor in params.items()}
        records = evaluate(weights, config, tokenizer, problems[rank::world], prompt=args.prompt, system=system,
                           think_tag=args.think_tag, max_new_tokens=args.max_new_tokens, progress=False)
        formed = sum(in_form(r["samples"][0]["text"], args.think_tag) for r in records)
        right = sum(r["samples"][0]["strict"] is True for r in records)
        right, formed, n = all_sum([right, formed, len(records)])
        metrics |= {"val_accuracy": right / n, "val_format": formed / n}
        samples = [{"id": r["id"], "prompt": r["prompt"]} | r["samples"][0] for r in records[:3]]
    return metrics, samples


def main(args):
    model_dir = resolve_model(args.model)
    config, tokenizer, system = load_config(model_dir), load_tokenizer(model_dir), load_system_prompt(model_dir)
    args.lr = default_lr(config, args.lora_rank) if args.lr is None else args.lr
    check_args(args)
    end_token = tokenizer.token_to_id("<|endoftext|>" if PRESETS[args.prompt].text is not None else "<|im_end|>")
    if end_token is None:
        raise ValueError(f"{model_dir}: the tokenizer has no token that ends a reply (<|im_end|>); "
                         "expected that of Qwen-2.5")
    max_tokens = min(args.max_tokens, config.max_context)
    examples, too_long = read_examples(args.data, tokenizer, end_token, max_tokens, prompt=args.prompt, system=system,
                                       think_tag=args.think_tag)
    random.Random(args.seed).shuffle(examples)
    if args.validation >= len(examples):
        raise ValueError(f"--validation {args.validation} leaves nothing of the {len(examples)} examples to train on")
    validation, examples = examples[:args.validation], examples[args.validation:]
    problems = load_problems(args.eval_data, "dev", args.eval_limit) if args.eval_data else []

    rank, world, device = init_distributed(args.device, args.processes)
    dtype = compute_dtype(args.dtype, device)
    run, checkpoint = start_run(args)
    if args.from_scratch:
        base = init_params(config, args.seed)
    else:
        base = load_params(model_dir, dtype=dtype if args.lora_rank else torch.float32)
    if args.lora_rank:
        base = {name: tensor.to(device) for name, tensor in base.items()}
        trained, optimizer = init_optimizer(init_lora(config, args.lora_rank, args.seed), device, offload=args.offload)
        params = base | trained
    else:
        params, optimizer = init_optimizer(base, device, dtype, args.offload)
        del base
    digest = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:12]
    state = {"step": 0, "best_step": None, "extra": {"best": math.inf, "waited": 0, "failures": 0, "data": digest}}
    if checkpoint:
        state = load_checkpoint(checkpoint, optimizer)
        if (found := state["extra"]["data"]) != digest:
            raise ValueError(f"--data {args.data} has changed: its sha256 begins with {digest}, with {found} when the "
                             "run was started; put that file back, or start a new run with another --run-dir")
    best_step, extra = state["best_step"], state["extra"]
    steps = math.ceil(args.epochs * len(examples) / args.batch)
    if rank == 0:
        num_trained = sum(p.numel() for p in params.values() if p.requires_grad)
        print(f"{len(examples)} examples to learn, {len(validation)} held out, {too_long} left out as longer than "
              f"{max_tokens} tokens; {num_trained:,} weights to train, {steps} steps")
        for example in examples[:2]:
            print("learned is what stands in brackets:\n" + show_example(example, tokenizer))

    started, seen = time.perf_counter(), 0
    with stop_signals() as stop_requested:
        for step in range(state["step"] + 1, steps + 1):
            if args.patience and extra["waited"] >= args.patience:
                if rank == 0:
                    print(f"no better validation loss in {extra['waited']} evaluations: stopped")
                break
            batch = batch_of_step(examples, step, args.batch, args.seed)
            lr = learning_rate(step, steps, args.lr, args.warmup)
            loss, parts = batch_loss(params, config, batch, args.answer_weight, args.micro_tokens, args.checkpointing,
                                     backward=True)
            stats = optimizer_step(optimizer, lr, betas=args.betas, weight_decay=args.weight_decay, clip=args.clip)
            seen += sum(len(e.tokens) for e in batch)
            speed = seen / (time.perf_counter() - started)
            metrics = {"step": step, "steps": steps, "loss": loss} | {f"loss_{p}": value for p, value in parts.items()}
            metrics |= stats | {"lr": lr, "tokens_per_s": speed, "peak_memory_gib": peak_memory_gib(device)}
            stopping = stop_requested()
            if measured := step % args.eval_every == 0 or step == steps:
                scores, samples = run_evaluation(params, config, tokenizer, validation, problems, system, args)
                metrics |= scores
                log_samples(run, step, samples)
                extra["waited"] += 1
                if (held_out := scores.get("val_loss", loss)) < extra["best"]:
                    extra["best"], extra["waited"], best_step = held_out, 0, step
            log_step(run, "step {step}/{steps} | loss {loss:.4f} nat (thought {loss_thought:.4f}, "
                     "answer {loss_answer:.4f}, end {loss_end:.4f}) | grad norm {grad_norm:.2f} | lr {lr:.1e} | "
                     "{tokens_per_s:.0f} tok/s | {peak_memory_gib:.2f} GiB"
                     + "".join(f" | {name} {{{name}:.4f}}" for name in metrics if name.startswith("val_")), metrics)
            extra["failures"] = extra["failures"] + 1 if stats["skipped"] else 0
            if extra["failures"] == 3:
                raise ValueError("the gradient was not finite in 3 steps running, which were skipped; start another "
                                 f"--run-dir from the last checkpoint, with --lr below {args.lr:g} or --dtype float32")
            if measured or step % args.save_every == 0 or stopping:
                save_checkpoint(args.run_dir, step, params, config, model_dir, optimizer, extra, args.keep, best_step)
            if measured:
                draw_curves(run.dir)
            if stopping and step < steps:
                if rank == 0:
                    print(f"stopped; go on with: {resume_command()}")
                return
    if rank == 0:
        path = Path(args.run_dir, "checkpoints", "best")
        print(f"best checkpoint, by {'validation' if validation else 'training'} loss {extra['best']:.4f}: {path} "
              f"(step {best_step}); next: python grpo.py --model {path}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"sft.py: {error}", file=sys.stderr)
        sys.exit(2)
