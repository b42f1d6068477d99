"""Estimate the memory that a run needs, and shrink its batches if that is too much.

    plan = plan_grpo(config, args, world, device)                   # a run of grpo.py
    plan = fit_memory(config, args, world, device, available_gib)   # the same, reduced to fit
    print(plan_line(plan, available_gib))
    choose_trainable(config, args)                                  # all weights if they fit

If the estimate was too low, halve_on_oom retries once with half the batch.
"""

import math
from typing import NamedTuple

import torch

import launch
import model
from data.prompts import PRESETS
from engine import cache_slots

LORA_RANK = 32  # if all weights do not fit
ALLOWANCE_GIB = {"cpu": 0.5, "cuda": 1.0}  # Python and libraries; CUDA context, fragmentation


class MemoryPlan(NamedTuple):
    """GiB that each process needs."""
    update: float
    rollouts: float
    shared: float  # included in both: frozen weights, which forked processes share

    @property
    def peak(self):
        return max(self.update, self.rollouts)


def plan_memory(config, dtype, device, world, *, longest, row_tokens, rows, slots, lora_rank,
                checkpointing, offload, keep_sampler, reference=None):
    """Estimate the MemoryPlan of a training run, erring high, by up to a fifth.

    longest: tokens of the longest sequence, prompt and completion. row_tokens: tokens of a packed
    row. rows: completions decoded at once. slots: KV cache slots. reference: the Config of a
    frozen second model. keep_sampler: on a GPU, its cache and weights stay during the update.
    """
    D, V, width = config.hidden_size, config.vocab_size, config.intermediate_size
    L, size = config.num_hidden_layers, dtype.itemsize
    on_gpu = torch.device(device).type == "cuda"
    weights = size * sum(map(math.prod, model.param_shapes(config).values()))
    trainable = model.lora_shapes(config, lora_rank) if lora_rank else model.param_shapes(config)
    trained = sum(map(math.prod, trainable.values()))

    held = weights + 4 * trained  # plus gradients
    if reference:
        held += size * sum(map(math.prod, model.param_shapes(reference).values()))
    if not (offload and on_gpu):  # moments, and float32 masters of other dtypes
        held += (12 if size < 4 and not lora_rank else 8) * trained / world
    sampler = 2 * size * L * config.num_key_value_heads * config.head_dim * slots
    if lora_rank or not on_gpu:
        sampler += weights  # merged, or packed

    layer = size * (12 * D + 5 * width)  # activation bytes that autograd keeps per token
    if not on_gpu:  # a fused kernel keeps no scores
        layer += size * config.num_attention_heads * longest
    head = (8 + size) * V * min(row_tokens, model.head_slice(V, device))
    if lora_rank:  # the adapter itself, and its inputs
        held += 4 * trained
        layer += size * (5 * D + width)
    else:  # the gradient of the embedding, and its temporaries
        head += (4 + 3 * size) * V * D
    backward = 2 * size * width  # per token, in the backward pass of one layer
    if checkpointing:
        backward += layer
        layer = size * D
    update = held + row_tokens * L * layer + max(head, row_tokens * backward)
    if on_gpu and keep_sampler:  # CUDA graphs read both at fixed addresses
        update += sampler
    rollouts = held + sampler + rows * V * (12 + size)  # logits
    allowance = ALLOWANCE_GIB["cuda" if on_gpu else "cpu"]
    shared = weights if lora_rank else 0
    return MemoryPlan(update / 2**30 + allowance, rollouts / 2**30 + allowance, shared / 2**30)


def plan_line(plan, available_gib):
    """A plan as text, with a warning if it exceeds the available memory."""
    line = (f"about {plan.update:.1f} GiB in the update, {plan.rollouts:.1f} in the rollouts, "
            f"of {available_gib:.1f} GiB")
    if plan.peak <= available_gib:
        return line
    return (f"{line}\nwarning: this exceeds the available memory; try --checkpointing, a smaller "
            "--micro-tokens (update) or --max-batch (rollouts), --offload, --lora-rank, more GPUs")


# ------------------------------------------------------------ runs of grpo.py


def plan_grpo(config, args, world, device, prompt_tokens=200):
    """The MemoryPlan of a run of grpo.py. prompt_tokens: the default is a GSM8K prompt's."""
    groups = math.ceil(args.prompts / world)
    prompt_tokens += len(PRESETS[args.prompt].text or "") // 3  # worked examples
    longest = prompt_tokens + args.max_new_tokens
    step_tokens = groups * (prompt_tokens + args.group * args.max_new_tokens)
    rows = min(args.max_batch, groups * args.group)
    slots = cache_slots(rows, math.ceil(rows / args.group), prompt_tokens, args.max_new_tokens,
                        device == "cuda")
    reference = config if args.beta and not args.lora_rank else None
    if args.teacher:
        reference = model.load_config(model.resolve_model(args.teacher, config_only=True))
    return plan_memory(
        config, launch.compute_dtype(args.dtype, device), device, world, longest=longest,
        row_tokens=min(max(args.micro_tokens, longest), step_tokens), rows=rows, slots=slots,
        lora_rank=args.lora_rank, checkpointing=args.checkpointing, reference=reference,
        offload=args.offload, keep_sampler=not args.free_sampler)


def fit_memory(config, args, world, device, available_gib):
    """plan_grpo with settings reduced until the run fits, or the smallest plan if it never does.

    Sets --free-sampler, then halves --micro-tokens and --max-batch, in `args`. None of these
    affects results.
    """
    while True:
        plan = plan_grpo(config, args, world, device)
        if plan.peak <= available_gib:
            return plan
        if device == "cuda" and not args.free_sampler:
            args.free_sampler = True
        elif plan.update > available_gib and args.micro_tokens > 2048:
            args.micro_tokens //= 2
        elif args.max_batch >= 16:
            args.max_batch //= 2
        else:
            return plan


def choose_trainable(config, args):
    """Decide by the available memory what grpo.py trains, all weights or an adapter, and print it.

    Fills in --lora-rank and --processes. If only an adapter fits, also reduces what fit_memory
    reduces. Raises ValueError if not even an adapter fits.
    """
    device = launch.find_device(args.device).type
    world = max(launch.rank_and_world()[1], args.processes or 1)
    available_gib = launch.total_memory_gib(device, world)
    unset = args.lora_rank is None
    args.lora_rank = args.lora_rank or 0
    plan = plan_grpo(config, args, world, device)
    if unset and plan.peak > available_gib:
        args.lora_rank = LORA_RANK
        plan = fit_memory(config, args, world, device, available_gib)
    sizes = f"--micro-tokens {args.micro_tokens} and --max-batch {args.max_batch}"
    if args.free_sampler:
        sizes += " --free-sampler"
    if unset and plan.peak > available_gib:
        raise ValueError(
            f"not even an adapter of rank {LORA_RANK} fits: it needs {plan.peak:.1f} GiB at "
            f"{sizes}, and {available_gib:.1f} are available; try a smaller --max-new-tokens, or "
            f"more GPUs; `python bench.py plan --model {args.model}` shows what fits")
    trained = "all weights"
    if args.lora_rank:
        trained = f"an adapter of rank {args.lora_rank} (--lora-rank 0: all weights) with {sizes}"
    launch.say(f"training {trained}: {plan_line(plan, available_gib)}")
    if args.processes is None:
        args.processes = launch.default_processes(args.device, plan.peak - plan.shared, plan.shared)


# ------------------------------------------------------------ out of memory


def halve_on_oom(args, name, attempt, engine=None):
    """Return attempt(); if a GPU runs out of memory, halve args.NAME for good and retry once.

    args.NAME must not affect results. engine: the sampler's, released before the second attempt.
    Raises ValueError if that attempt fails for the same reason.
    """
    for _ in range(2):
        size = getattr(args, name)
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            reason = f"{str(error).partition('. ')[0]} at {launch.flag_name(name)} {size}"
        if engine:  # outside the handler, whose traceback keeps tensors alive
            engine.release()
        torch.cuda.empty_cache()
        setattr(args, name, max(1, size // 2))
        print(f"{reason}: retrying with {getattr(args, name)}", flush=True)
    raise ValueError(f"{reason}, after halving it once; start with a smaller value, or see what "
                     "fits: python bench.py plan --help")
