"""Supervised fine-tuning on worked solutions: the cold start before reinforcement learning.

    python -m data.traces --data arithmetic words:1 --out traces.jsonl     # verified traces
    python sft.py --data traces.jsonl                                      # the tiny model, minutes
    python sft.py --model qwen2.5-1.5b --data traces.jsonl --lora-rank 32  # a real model
    python grpo.py --model runs/sft/checkpoints/best                       # the next stage
    python sft.py --model data/tiny --from-scratch --data runs/tiny/corpus.jsonl

Each line of the data is {"problem", "response"}, as data/traces.py writes it, or a conversation
{"messages": [{"role", "content"}, ...]}. Only assistant tokens are trained on, end tokens
included; those of the final answer are weighted by --answer-weight. The loss is a mean over the
whole optimizer step, so the gradient depends on neither packing nor the number of processes.
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
import run
import view
from data import load_problems
from data.files import read_rows
from data.mixture import keys_of, problem_key
from data.prompts import PRESETS, THINK_TAGS, encode_prompt, follows_format, prompt_flag
from engine import cache_slots
from eval import drop_held_out, drop_long_prompts, evaluate
from launch import above, at_least, printable, rank_and_world, say
from plan import plan_line, plan_memory
from stats import rate_metrics
from verify import box_span

PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots]  # one problem per example
PARTS = ("thought", "answer", "end")  # of a reply; the loss of each is logged
CONTEXT = -1  # the part of a token that is not trained on
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
        help=f"prompt style: {', '.join(PROMPTS)}, or your own text containing {{problem}}")
    add("--think-tag", default="think", choices=THINK_TAGS, help="name of the thinking block")
    add("--answer-weight", type=above(0.0), default=1.2, help="token weight of the final box")
    add("--epochs", type=above(0.0), default=3.0, help="passes over the examples")
    add("--batch", type=at_least(1), default=64, help="examples per optimizer step")
    add("--micro-tokens", type=at_least(1), default=8192, help="tokens per packed row")
    add("--max-tokens", type=at_least(2), default=2048, help="drop longer examples")
    add("--lora-rank", type=at_least(0), default=0, help="rank of an adapter; 0: all weights")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations in "
        "the backward pass: less memory, a third more time (default: on, except for a tiny model)")
    add("--validation", type=at_least(0), help="held-out examples; 0: none (default: a fifth, at "
        "most 200)")
    add("--eval-data", help="problem set or .jsonl file whose dev split is answered and graded")
    add("--eval-limit", type=at_least(1), default=200, help="dev problems to answer")
    add("--eval-every", type=at_least(1), default=100, help="steps between evaluations")
    add("--max-new-tokens", type=at_least(1), default=512, help="tokens per answer in evaluation")
    launch.add_train_flags(p, lr=None, run_dir="runs/sft", lr_help="peak learning rate (default: "
                          "all weights 1e-5, an adapter 2e-4; on a tiny model 2e-3 and 5e-3)")
    return launch.parse_train_args(p, argv)


def default_lr(config, lora_rank):
    """The default learning rate: higher for an adapter, and for a tiny model."""
    if model.is_tiny(config):
        return 5e-3 if lora_rank else 2e-3
    return 2e-4 if lora_rank else 1e-5


# ---------------------------------------------------------------------- examples


class Example(NamedTuple):
    tokens: list[int]
    parts: list[int]  # for each token, an index into PARTS, or CONTEXT
    key: str = ""  # problem_key of its problem


def turns_of(row):
    """A row as a conversation, [{"role", "content"}, ...]."""
    return row.get("messages", [{"role": "user", "content": row.get("problem")},
                                {"role": "assistant", "content": row.get("response")}])


def is_example(row):
    """Whether a row is a well-formed conversation with an assistant turn."""
    turns = turns_of(row)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    roles = [turn.get("role") for turn in turns]
    contents = [turn.get("content") for turn in turns]
    return "assistant" in roles and all(isinstance(text, str) for text in roles + contents)


def answer_span(text, think_tag="think"):
    """(begin, end) of the last box after the thinking block; (0, 0) if there is none."""
    after = max(0, text.rfind(f"</{think_tag}>"))
    span = box_span(text[after:])
    if span is None:
        return 0, 0
    return text.rindex("\\", 0, after + span[0]), after + span[1] + 1  # from \boxed to its }


def encode_reply(text, tokenizer, think_tag):
    """(ids, parts) of a reply: everything outside the final box counts as thought, and a control
    token's name is encoded as plain text."""
    first, last = answer_span(text, think_tag)
    tokens = []
    parts = []
    start = 0
    for piece in model.split_control_tokens(text):
        encoded = tokenizer.encode(piece, add_special_tokens=False)
        tokens += encoded.ids
        for begin, end in encoded.offsets:
            inside = start + begin < last and start + end > first
            parts.append(PARTS.index("answer" if inside else "thought"))
        start += len(piece)
    return tokens, parts


def encode_example(row, tokenizer, *, prompt="plain", system=None, think_tag="think"):
    """The Example of a row. Prompts and replies are tokenised separately, as in sampling.

    Text never becomes a control token such as <|im_end|>.
    """
    chat = "messages" in row or PRESETS[prompt].text is None
    end = "<|im_end|>" if chat else "<|endoftext|>"
    if tokenizer.token_to_id(end) is None:
        raise ValueError(f"the tokenizer of --model has no {end} token to end a reply; expected a "
                         "Qwen-2.5 tokenizer")
    tokens = []
    parts = []
    pending = []  # turns since the last reply
    for turn in model.with_system(turns_of(row), system):
        if turn["role"] != "assistant":
            pending.append(turn)
            continue
        if "messages" in row:
            context = model.encode_chat(tokenizer, pending, system=None)
        else:
            context = encode_prompt(tokenizer, prompt, row, system=system, think_tag=think_tag)
        if tokens:  # the template puts a line break after a reply's end token
            context = model.encode_text(tokenizer, "\n") + context
        reply, reply_parts = encode_reply(turn["content"], tokenizer, think_tag)
        tokens += [*context, *reply, tokenizer.token_to_id(end)]
        parts += [*[CONTEXT] * len(context), *reply_parts, PARTS.index("end")]
        pending = []
    questions = (turn["content"] for turn in turns_of(row) if turn["role"] == "user")
    return Example(tokens, parts, problem_key(next(questions, "")))


def read_examples(path, tokenizer, max_tokens, **prompt_options):
    """The examples of at most max_tokens in a file. Raises ValueError for a malformed line."""
    examples = []
    for number, row in read_rows(path):
        if not is_example(row):
            raise ValueError(f"{path}, line {number}: {row!r:.80}, expected problem and response, "
                             "or messages with role and content, an assistant's among them")
        examples.append(encode_example(row, tokenizer, **prompt_options))
    fitting = [example for example in examples if len(example.tokens) <= max_tokens]
    say(f"{len(fitting)} examples of at most {max_tokens} tokens; dropped "
        f"{len(examples) - len(fitting)} longer ones")
    return fitting


def show_example(example, tokenizer):
    """The text of an example with its trained parts in brackets, for a person to check."""
    shown = ""
    for part, pairs in itertools.groupby(zip(example.parts, example.tokens), key=itemgetter(0)):
        text = tokenizer.decode([token for _, token in pairs], skip_special_tokens=False)
        shown += text if part == CONTEXT else f"[{PARTS[part]}: {text}]"
    return printable(shown)


# ---------------------------------------------------------------------- loss


def pack(examples, micro_tokens):
    """Rows of similar-length examples: at most micro_tokens tokens, or a single longer example."""
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
    """[3]: the sum of -log p over each of PARTS in a packed row.

    Attention pads groups of 16 sequences; neighbours have similar lengths, so little is wasted.
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(0, [len(e.tokens) for e in row[i:i + 16]]) for i in range(0, len(row), 16)]
    tokens = torch.tensor([t for e in row for t in e.tokens], device=device)  # [T]
    parts = torch.tensor([p for e in row for p in e.parts], device=device)  # [T]
    hidden = model.packed_hidden_states(params, config, tokens, groups, checkpointing)  # [T, D]
    trained = (parts != CONTEXT).nonzero()[:, 0]  # [n]; never the first token of an example
    logprobs, _ = model.head_logprobs(params, config, hidden[trained - 1], tokens[trained])  # [n]
    return logprobs.new_zeros(len(PARTS)).index_add(0, parts[trained], -logprobs)


def batch_loss(params, config, examples, answer_weight, micro_tokens, checkpointing=False,
               backward=False):
    """(mean loss over `examples`, {part: loss}), the same on every process; each computes a share.

    backward: also accumulate the gradient of this process's share in `.grad`.
    """
    rank, world = rank_and_world()
    weights = torch.tensor([1.0, answer_weight, 1.0])  # of PARTS
    trained = torch.tensor([part for e in examples for part in e.parts if part != CONTEXT])
    counts = trained.bincount(minlength=len(PARTS))  # [3]
    total = (weights * counts).sum()
    sums = torch.zeros(len(PARTS))
    for row in pack(examples[rank::world], micro_tokens):
        with torch.set_grad_enabled(backward):
            losses = row_losses(params, config, row, checkpointing).cpu()
        if backward:
            ((weights * losses).sum() / total).backward()
        sums += losses.detach()
    sums = torch.stack(launch.gather_objects(sums)).double().sum(0).float()
    means = sums / counts  # nan for a part without tokens
    return ((weights * sums).sum() / total).item(), dict(zip(PARTS, means.tolist()))


# ---------------------------------------------------------------------- the run


def example_order(examples, seed):
    """Endless examples, in a new permutation for each epoch, seeded by (seed, epoch)."""
    for epoch in itertools.count():
        yield from random.Random(f"{seed} {epoch}").sample(examples, len(examples))


def hold_out(examples, count, seed):
    """(training examples, at least `count` held-out ones): a seeded split by problem."""
    examples = list(examples)
    random.Random(seed).shuffle(examples)
    by_problem = {}
    for example in examples:
        by_problem.setdefault(example.key, []).append(example)
    training = []
    held_out = []
    for group in by_problem.values():
        chosen = held_out if len(held_out) < count else training
        chosen += group
    return training, held_out


def load_data(args, config, tokenizer, prompt_options):
    """(training examples, validation examples, problems to evaluate on): no problem is in two."""
    problems = load_problems(args.eval_data, "dev", args.eval_limit) if args.eval_data else []
    problems = drop_long_prompts(problems, tokenizer, config, args.prompt, args.max_new_tokens,
                                 **prompt_options)
    max_tokens = min(args.max_tokens, config.max_context)
    examples = read_examples(args.data, tokenizer, max_tokens, prompt=args.prompt, **prompt_options)
    # saved as a flag, so that --resume refuses other data
    args.data_sha256 = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:12]
    keys = [example.key for example in examples]
    examples = drop_held_out(examples, keys, keys_of(problems), args.data)
    count = min(200, len(examples) // 5) if args.validation is None else args.validation
    training, held_out = hold_out(examples, count, args.seed)
    if not training:
        raise ValueError(f"--data {args.data} has {len(examples)} examples of at most {max_tokens} "
                         f"tokens, from {len(set(keys))} problems; expected more than --validation "
                         f"{count}")
    say(f"{len(training)} training examples, {len(held_out)} held out; trained parts in brackets:")
    for example in training[:2]:
        say(show_example(example, tokenizer))
    return training, held_out, problems


def resolve_flags(args, config):
    """Fill in unset flags from the model and the available memory. Writes into `args`."""
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
    """(params, optimizer). Forks into --processes, which share the frozen base of an adapter."""
    base = (model.init_params(config, args.seed) if args.from_scratch
            else run.load_base(model_dir, args))
    _, _, device = launch.init_distributed(args.device, args.processes, args.timeout_min)
    return run.make_trainable(base, config, args, device)


def validate(params, config, examples, args):
    """Metrics: loss on the validation examples, in total and by part; {} if there are none."""
    if not examples:
        return {}
    loss, parts = batch_loss(params, config, examples, args.answer_weight, args.micro_tokens)
    return {"val_loss": loss} | {f"val_{part}": value for part, value in parts.items()}


def answer(this_run, step, params, config, tokenizer, problems, prompt_options, args):
    """Metrics: accuracy and format of greedy answers; {} without problems. Logs 8 answers."""
    if not problems:
        return {}
    records = evaluate(params, config, tokenizer, problems, prompt=args.prompt,
                       max_new_tokens=args.max_new_tokens, quiet=True, **prompt_options)
    accuracy = []
    in_format = []
    samples = []
    for problem, record in zip(problems, records):
        [reply] = record["samples"]
        accuracy.append(float(reply["strict"] is True))
        in_format.append(float(follows_format(reply["text"], args.think_tag)))
        completion = {"text": reply["text"], "right": reply["strict"],
                      "rewards": {"accuracy": accuracy[-1], "format": in_format[-1]},
                      "finish": reply["finish"], "num_tokens": reply["tokens"]}
        samples.append({"kind": "held_out", "problem": problem["problem"],
                        "answer": problem["answer"], "prompt": record["prompt"],
                        "completions": [completion]})
    run.log_samples(this_run, step, samples[:8])
    return rate_metrics("val_accuracy", accuracy) | rate_metrics("val_format", in_format)


def train_step(params, config, optimizer, batch, lr, args):
    """One update on a batch of examples; returns its metrics."""
    started = time.perf_counter()
    loss, parts = batch_loss(params, config, batch, args.answer_weight, args.micro_tokens,
                             args.checkpointing, backward=True)
    stats = optim.optimizer_step(optimizer, lr, betas=args.betas, clip=args.clip,
                                 weight_decay=args.weight_decay)
    seconds = time.perf_counter() - started
    return {"time": time.time(), "loss": loss, "lr": lr,
            "tokens_per_s": sum(len(e.tokens) for e in batch) / seconds,
            "peak_memory_gib": launch.peak_memory_gib(optimizer.params.device),
            **{f"loss_{part}": value for part, value in parts.items()}, **stats}


def step_line(metrics):
    """STEP_LINE, followed by the held-out metrics if there are any."""
    return STEP_LINE + "".join(
        f" | {name} {{{name}:.4f}}" for name in metrics
        if name.startswith("val_") and not name.endswith(("_low", "_high")))


def main(args):
    run.claim_run_dir(args)
    model_dir = model.resolve_model(args.model)
    config = model.load_config(model_dir)
    tokenizer = model.load_tokenizer(model_dir)
    prompt_options = {"system": model.load_system_prompt(model_dir), "think_tag": args.think_tag}
    resolve_flags(args, config)
    examples, validation, problems = load_data(args, config, tokenizer, prompt_options)
    params, optimizer = load_trainable(args, model_dir, config)
    this_run, checkpoint = run.start_run(args)
    state = run.load_checkpoint(checkpoint, optimizer)
    done = state["step"]
    progress = {"best": math.inf, "best_step": state["best_step"], "failures": 0} | state["extra"]
    trained_on = run.read_trained_on(args.adapter) | {example.key for example in examples}
    if not checkpoint:  # log answers from before training
        answer(this_run, 0, params, config, tokenizer, problems[:8], prompt_options, args)
    view.write_report(this_run)
    order = itertools.islice(example_order(examples, args.seed), done * args.batch, None)
    steps = math.ceil(args.epochs * len(examples) / args.batch)

    with run.stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            batch = list(itertools.islice(order, args.batch))
            lr = optim.learning_rate(step, steps, args.lr, args.warmup)
            metrics = {"step": step, "steps": steps} | train_step(params, config, optimizer, batch,
                                                                  lr, args)
            stopping = stop_requested()
            evaluating = step % args.eval_every == 0 or step == steps
            if evaluating:
                metrics |= validate(params, config, validation, args)
                metrics |= answer(this_run, step, params, config, tokenizer, problems,
                                  prompt_options, args)
                loss = metrics.get("val_loss", metrics["loss"])
                if loss < progress["best"]:
                    progress |= {"best": loss, "best_step": step}
            run.log_step(this_run, step_line(metrics), metrics)
            progress["failures"] = optim.count_failures(progress["failures"], metrics["skipped"],
                                                        args.lr)
            if evaluating or stopping or step % args.save_every == 0:
                run.save_checkpoint(this_run.dir, step, params, config, model_dir, optimizer,
                                    progress, args.keep, progress["best_step"], trained_on)
            if evaluating:
                view.write_report(this_run)
            if stopping and step < steps:
                raise KeyboardInterrupt  # a checkpoint is saved; run_main prints how to resume
    best = this_run.dir / "checkpoints" / "best"
    kind = "validation" if validation else "training"
    say(f"best checkpoint, by {kind} loss {progress['best']:.4f}: {best} (step "
        f"{progress['best_step']}); next: python grpo.py --model {best}")


if __name__ == "__main__":
    launch.run_main(main, parse_args)
