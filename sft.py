"""Supervised training on worked answers: the cold start before reinforcement learning.

    python -m data.traces --data arithmetic words:1 --out traces.jsonl     # checked traces to learn
    python sft.py --data traces.jsonl                                      # the tiny model, minutes
    python sft.py --model qwen2.5-1.5b --data traces.jsonl --lora-rank 32  # a real one
    python grpo.py --model runs/sft/checkpoints/best                       # goes on from there
    python sft.py --model data/tiny --from-scratch --data runs/tiny/corpus.jsonl

A line of the data is {"problem", "response"}, as data/traces.py writes it, or a conversation
{"messages": [{"role", "content"}, ...]}. Only what the assistant says is learned, its end token
included; the tokens of the final answer count --answer-weight times. The loss is a mean over the
optimizer step: neither the packing nor the number of processes changes the gradient.
"""

import argparse
import hashlib
import itertools
import math
import random
import time
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

import launch
import model
import optim
import view
from data import load_problems
from data.files import read_rows
from data.mixture import keys_of, problem_key
from data.prompts import PRESETS, THINK_TAGS, encode_prompt, follows_format, prompt_flag
from engine import cache_slots
from eval import drop_long_prompts, evaluate, leave_out
from launch import above, at_least, printable, rank_and_world, say
from optim import optimizer_step
from plan import plan_line, plan_memory
from run import (
    claim_run_dir,
    load_base,
    load_checkpoint,
    log_samples,
    log_step,
    make_trainable,
    read_trained_on,
    save_checkpoint,
    start_run,
    stop_signals,
)
from stats import rate_metrics
from verify import box_span

PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots]  # an example stands alone
PARTS = ("thought", "answer", "end")  # of what is learned; the loss of each is logged
CONTEXT = -1  # the part of a token that is only read
STEP_LINE = ("step {step}/{steps} | loss {loss:.4f} nat (thought {loss_thought:.4f}, "
             "answer {loss_answer:.4f}, end {loss_end:.4f}) | grad norm {grad_norm:.2f} | "
             "lr {lr:.1e} | {tokens_per_s:.0f} tok/s | {peak_memory_gib:.2f} GiB")


def parse_args(argv=None):
    p = launch.Parser(__doc__)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b, a hub id, or a directory")
    add("--from-scratch", action="store_true", help="random weights in the shape of --model")
    add("--data", required=True, help=".jsonl file of examples")
    add("--prompt", type=prompt_flag(PROMPTS), default="plain", metavar="NAME",
        help=f"how a problem is put: {', '.join(PROMPTS)}, or your text with {{problem}} in it")
    add("--think-tag", default="think", choices=THINK_TAGS)
    add("--answer-weight", type=above(0.0), default=1.2, help="of the final box's tokens")
    add("--epochs", type=above(0.0), default=3.0, help="times that every example is seen")
    add("--batch", type=at_least(1), default=64, help="examples in an optimizer step")
    add("--micro-tokens", type=at_least(1), default=8192, help="tokens in one packed row")
    add("--max-tokens", type=at_least(2), default=2048, help="longer examples are left out")
    add("--lora-rank", type=at_least(0), default=0, help="of an adapter; 0: all weights")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations in "
        "the backward pass: less memory, a third more time (default: but for a tiny model)")
    add("--validation", type=at_least(0), help="examples that are held out; 0: none (default: a "
        "fifth, at most 200)")
    add("--eval-data", help="problem set or .jsonl whose dev split is answered and graded, too")
    add("--eval-limit", type=at_least(1), default=200, help="problems of it")
    add("--eval-every", type=at_least(1), default=100, help="steps between evaluations")
    add("--max-new-tokens", type=at_least(1), default=512, help="of an answer in evaluation")
    launch.add_train_flags(p, lr=None, run_dir="runs/sft", lr_help="peak learning rate (default: "
                          "all weights 1e-5, an adapter 2e-4; of a tiny model 2e-3 and 5e-3)")
    return launch.parse_train_args(p, argv)


def default_lr(config, lora_rank):
    """An adapter learns at about ten times the rate of all weights, a tiny model faster still."""
    if model.is_tiny(config):
        return 5e-3 if lora_rank else 2e-3
    return 2e-4 if lora_rank else 1e-5


# ---------------------------------------------------------------------- examples


class Example(NamedTuple):
    tokens: list[int]
    parts: list[int]  # for each token the index of its part in PARTS, or CONTEXT
    key: str = ""  # of its problem


def turns_of(row):
    """A row as a conversation, [{"role", "content"}, ...]."""
    return row.get("messages", [{"role": "user", "content": row.get("problem")},
                                {"role": "assistant", "content": row.get("response")}])


def is_example(row):
    """Whether a row is a conversation of texts in which the assistant replies."""
    turns = turns_of(row)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    texts = [turn.get(name) for turn in turns for name in ("role", "content")]
    return all(isinstance(text, str) for text in texts) and "assistant" in texts[::2]


def answer_span(text, think_tag="think"):
    """(begin, end) of a reply's last box behind the thinking block; (0, 0) without one."""
    after = max(0, text.rfind(f"</{think_tag}>"))
    span = box_span(text[after:])
    if span is None:
        return 0, 0
    return text.rindex("\\", 0, after + span[0]), after + span[1] + 1  # from \\boxed to its brace


def encode_reply(text, tokenizer, think_tag):
    """(ids, parts) of a reply. What it says beside its answer, words behind the box included,
    counts as thought. The names of control tokens are plain text in it."""
    first, last = answer_span(text, think_tag)
    tokens = []
    parts = []
    start = 0
    for piece in model.plain_pieces(text):
        encoded = tokenizer.encode(piece, add_special_tokens=False)
        tokens += encoded.ids
        for begin, end in encoded.offsets:
            inside = start + begin < last and start + end > first
            parts.append(PARTS.index("answer" if inside else "thought"))
        start += len(piece)
    return tokens, parts


def encode_example(row, tokenizer, *, prompt="plain", system=None, think_tag="think"):
    """An Example, each piece tokenised by itself, as when the model is asked.

    No text can make a control token, such as <|im_end|>.
    """
    chat = "messages" in row or PRESETS[prompt].text is None
    end = "<|im_end|>" if chat else "<|endoftext|>"
    if tokenizer.token_to_id(end) is None:
        raise ValueError(f"the tokenizer of --model has no token that ends a reply, {end}; "
                         "expected that of Qwen-2.5")
    tokens = []
    parts = []
    read = []  # turns since the last reply
    for turn in model.with_system(turns_of(row), system):
        if turn["role"] != "assistant":
            read.append(turn)
            continue
        if "messages" in row:
            context = model.encode_chat(tokenizer, read, system=None)
        else:
            context = encode_prompt(tokenizer, prompt, row, system=system, think_tag=think_tag)
        if tokens:  # the template's line break, after the end token of a reply
            context = model.encode_text(tokenizer, "\n") + context
        reply, parts_of_reply = encode_reply(turn["content"], tokenizer, think_tag)
        tokens += [*context, *reply, tokenizer.token_to_id(end)]
        parts += [*[CONTEXT] * len(context), *parts_of_reply, PARTS.index("end")]
        read = []
    asked = [turn["content"] for turn in turns_of(row) if turn["role"] == "user"]
    return Example(tokens, parts, problem_key(asked[0] if asked else ""))


def read_examples(path, tokenizer, max_tokens, **how):
    """The examples of a file that have at most max_tokens; ValueError names a line that is none."""
    examples = []
    for number, row in read_rows(path):
        if not is_example(row):
            raise ValueError(f"{path}, line {number}: {row!r:.80}, expected problem and response, "
                             "or messages with a role and content each, one the assistant's")
        examples.append(encode_example(row, tokenizer, **how))
    fitting = [example for example in examples if len(example.tokens) <= max_tokens]
    say(f"{len(fitting)} examples of at most {max_tokens} tokens; "
        f"{len(examples) - len(fitting)} are longer and left out")
    return fitting


def show_example(example, tokenizer):
    """The text with what is learned in brackets, for a person to check."""
    shown = ""
    for part, run in itertools.groupby(zip(example.parts, example.tokens), key=itemgetter(0)):
        text = tokenizer.decode([token for _, token in run], skip_special_tokens=False)
        shown += text if part == CONTEXT else f"[{PARTS[part]}: {text}]"
    return printable(shown)


# ---------------------------------------------------------------------- loss


def pack(examples, micro_tokens):
    """Rows of at most `micro_tokens` tokens (a longer example has its own), of similar lengths."""
    rows = []
    size = math.inf
    for example in sorted(examples, key=lambda e: len(e.tokens)):
        size += len(example.tokens)
        if size > micro_tokens:
            rows.append([])
            size = len(example.tokens)
        rows[-1].append(example)
    return rows


def row_losses(params, config, row, checkpointing=False):
    """[3]: the sum of -log p over the tokens of each of PARTS in a packed row.

    Neighbours in a row are of like length, so that attention, which runs on groups of 16 padded
    texts, wastes little.
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(0, [len(e.tokens) for e in row[i:i + 16]]) for i in range(0, len(row), 16)]
    tokens = torch.tensor([t for e in row for t in e.tokens], device=device)  # [T]
    parts = torch.tensor([p for e in row for p in e.parts], device=device)  # [T]
    hidden = model.packed_hidden_states(params, config, tokens, groups, checkpointing)  # [T, D]
    learned = (parts != CONTEXT).nonzero()[:, 0]  # [n]; the token before is of the same example
    logprobs, _ = model.head_logprobs(params, config, hidden[learned - 1], tokens[learned])  # [n]
    return logprobs.new_zeros(len(PARTS)).index_add(0, parts[learned], -logprobs)


def batch_loss(params, config, examples, answer_weight, micro_tokens, checkpointing=False,
               backward=False):
    """(mean loss over `examples`, {part: loss}), the same on every process; each computes a share.

    backward: also add the gradient of this process's share to `.grad`.
    """
    rank, world = rank_and_world()
    weights = torch.tensor([1.0, answer_weight, 1.0])  # of PARTS
    learned = torch.tensor([part for e in examples for part in e.parts if part != CONTEXT])
    counts = learned.bincount(minlength=len(PARTS))  # [3]
    total = (weights * counts).sum()
    sums = torch.zeros(len(PARTS))
    for row in pack(examples[rank::world], micro_tokens):
        with torch.set_grad_enabled(backward):
            losses = row_losses(params, config, row, checkpointing).cpu()
        if backward:
            ((weights * losses).sum() / total).backward()
        sums += losses.detach()
    sums = torch.stack(launch.gather_objects(sums)).double().sum(0).float()
    means = sums / counts  # nan where a part has no token
    return ((weights * sums).sum() / total).item(), dict(zip(PARTS, means.tolist()))


# ---------------------------------------------------------------------- the run


def example_order(examples, seed):
    """The examples without end, in one permutation by (seed, epoch) after another."""
    for epoch in itertools.count():
        yield from random.Random(f"{seed} {epoch}").sample(examples, len(examples))


def hold_out(examples, count, seed):
    """(examples to learn, at least `count` others), chosen by the seed; no problem is in both."""
    examples = list(examples)
    random.Random(seed).shuffle(examples)
    of_problem = {}
    for example in examples:
        of_problem.setdefault(example.key, []).append(example)
    learned = []
    held_out = []
    for group in of_problem.values():
        chosen = held_out if len(held_out) < count else learned
        chosen += group
    return learned, held_out


def load_data(args, config, tokenizer, form):
    """(examples to learn, others for validation, problems to be asked): no problem is in two."""
    problems = load_problems(args.eval_data, "dev", args.eval_limit) if args.eval_data else []
    problems = drop_long_prompts(problems, tokenizer, config, args.prompt, args.max_new_tokens,
                                 **form)
    max_tokens = min(args.max_tokens, config.max_context)
    examples = read_examples(args.data, tokenizer, max_tokens, prompt=args.prompt, **form)
    # a flag, so that --resume on other examples is refused
    args.data_sha256 = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:12]
    keys = [example.key for example in examples]
    examples = leave_out(examples, keys, keys_of(problems), args.data)
    count = min(200, len(examples) // 5) if args.validation is None else args.validation
    learned, held_out = hold_out(examples, count, args.seed)
    if not learned:
        raise ValueError(f"--data {args.data} has {len(examples)} examples of at most {max_tokens} "
                         f"tokens, of {len(set(keys))} problems, expected more than --validation "
                         f"{count}")
    say(f"{len(learned)} to learn, {len(held_out)} held out; what is learned is in brackets:")
    for example in learned[:2]:
        say(show_example(example, tokenizer))
    return learned, held_out, problems


def settle_flags(args, config):
    """Fill in what was left out, by the model and the memory there is. Writes into `args`."""
    if args.adapter:
        args.lora_rank = model.adapter_config(args.adapter, args.lora_rank or None).r
    if args.checkpointing is None:
        args.checkpointing = not model.is_tiny(config)
    args.lr = args.lr or default_lr(config, args.lora_rank)
    device = launch.find_device(args.device)
    world = max(rank_and_world()[1], args.processes or 1)
    slots = cache_slots(64, 64, args.max_tokens, args.max_new_tokens, device.type == "cuda")
    plan = plan_memory(
        config, launch.compute_dtype(args.dtype, device), device, world, longest=args.max_tokens,
        row_tokens=args.micro_tokens, rows=64, slots=slots, lora_rank=args.lora_rank,
        checkpointing=args.checkpointing, offload=args.offload, keep_sampler=False)
    say(plan_line(plan, launch.total_memory_gib(device, world)))
    if args.processes is None:
        args.processes = launch.default_processes(args.device, plan.peak - plan.shared, plan.shared)


def load_trainable(args, model_dir, config):
    """(params, optimizer). Forks into --processes, which share an adapter's base."""
    base = model.init_params(config, args.seed) if args.from_scratch else load_base(model_dir, args)
    _, _, device = launch.init_distributed(args.device, args.processes, args.timeout_min)
    return make_trainable(base, config, args, device)


def measure(run, step, params, config, tokenizer, validation, problems, form, args):
    """Metrics: validation loss by part, accuracy and form of the answers. A few are logged."""
    metrics = {}
    if validation:
        loss, parts = batch_loss(params, config, validation, args.answer_weight, args.micro_tokens)
        metrics = {"val_loss": loss} | {f"val_{part}": value for part, value in parts.items()}
    samples = []
    weights = {name: tensor.detach() for name, tensor in params.items()}
    records = evaluate(weights, config, tokenizer, problems, prompt=args.prompt,
                       max_new_tokens=args.max_new_tokens, quiet=True, **form)
    for problem, record in zip(problems, records):
        [answer] = record["samples"]
        rewards = {"accuracy": float(answer["strict"] is True),
                   "format": float(follows_format(answer["text"], args.think_tag))}
        completion = {"text": answer["text"], "right": answer["strict"], "rewards": rewards,
                      "finish": answer["finish"], "num_tokens": answer["tokens"]}
        samples.append({"kind": "held_out", "problem": problem["problem"],
                        "answer": problem["answer"], "prompt": record["prompt"],
                        "completions": [completion]})
    for name in ("accuracy", "format") if samples else ():
        scores = [sample["completions"][0]["rewards"][name] for sample in samples]
        metrics |= rate_metrics(f"val_{name}", scores)
    log_samples(run, step, samples[:8])
    return metrics


def learn_step(params, config, optimizer, batch, lr, args):
    """One update on a batch of examples: its metrics."""
    started = time.perf_counter()
    loss, parts = batch_loss(params, config, batch, args.answer_weight, args.micro_tokens,
                             args.checkpointing, backward=True)
    stats = optimizer_step(optimizer, lr, betas=args.betas, clip=args.clip,
                           weight_decay=args.weight_decay)
    seconds = time.perf_counter() - started
    return {"time": time.time(), "loss": loss, "lr": lr,
            "tokens_per_s": sum(len(e.tokens) for e in batch) / seconds,
            "peak_memory_gib": launch.peak_memory_gib(optimizer.params.device),
            **{f"loss_{part}": value for part, value in parts.items()}, **stats}


def main(args):
    claim_run_dir(args)
    model_dir = model.resolve_model(args.model)
    config = model.load_config(model_dir)
    tokenizer = model.load_tokenizer(model_dir)
    form = {"system": model.load_system_prompt(model_dir), "think_tag": args.think_tag}
    settle_flags(args, config)
    examples, validation, problems = load_data(args, config, tokenizer, form)
    steps = math.ceil(args.epochs * len(examples) / args.batch)
    params, optimizer = load_trainable(args, model_dir, config)
    run, checkpoint = start_run(args)
    state = load_checkpoint(checkpoint, optimizer)
    done = state["step"]
    progress = {"best": math.inf, "best_step": state["best_step"], "failures": 0} | state["extra"]
    trained_on = read_trained_on(args.adapter) | {example.key for example in examples}
    if not checkpoint:
        measure(run, 0, params, config, tokenizer, [], problems[:8], form, args)
    view.write_report(run)
    order = itertools.islice(example_order(examples, args.seed), done * args.batch, None)

    with stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            batch = list(itertools.islice(order, args.batch))
            lr = optim.learning_rate(step, steps, args.lr, args.warmup)
            metrics = {"step": step, "steps": steps}
            metrics |= learn_step(params, config, optimizer, batch, lr, args)
            line = STEP_LINE
            stopping = stop_requested()
            evaluating = step % args.eval_every == 0 or step == steps
            if evaluating:
                found = measure(run, step, params, config, tokenizer, validation, problems, form,
                                args)
                metrics |= found
                line += "".join(f" | {name} {{{name}:.4f}}" for name in found
                                if not name.endswith(("_low", "_high")))
                loss = metrics.get("val_loss", metrics["loss"])
                if loss < progress["best"]:
                    progress |= {"best": loss, "best_step": step}
            log_step(run, line, metrics)
            progress["failures"] = optim.count_failures(progress["failures"], metrics["skipped"],
                                                        args.lr)
            if evaluating or stopping or step % args.save_every == 0:
                save_checkpoint(run.dir, step, params, config, model_dir, optimizer, progress,
                                args.keep, progress["best_step"], trained_on)
            if evaluating:
                view.write_report(run)
            if stopping and step < steps:
                raise KeyboardInterrupt  # saved; run_main says how to go on
    best = run.dir / "checkpoints" / "best"
    kind = "validation" if validation else "training"
    say(f"best checkpoint, by {kind} loss {progress['best']:.4f}: {best} (step "
        f"{progress['best_step']}); next: python grpo.py --model {best}")


if __name__ == "__main__":
    launch.run_main(main, parse_args)
