"""Trains a dict of tensors on one process or many: the memory that takes, and AdamW.

Parameters are views into one flat buffer. Gradients are summed in a second and reduce-scattered;
each process holds the float32 master and the Adam moments of its shard; the updated buffer is
all-gathered in place (ZeRO, arXiv:1910.02054). One process runs the same code as a world of one.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from launch import flag_name, rank_and_world
from model import head_slice, lora_shapes, param_shapes

ALIGN = 64  # elements: parameters start on cache lines, so that matrix products round the same way
SLICE = 1 << 20  # elements updated at a time, so that temporaries fit in a CPU's cache

# ------------------------------------------------------------ memory

ALLOWANCE_GIB = {"cpu": 0.5, "cuda": 1.0}  # Python and libraries; CUDA's context, fragmentation


class MemoryPlan(NamedTuple):
    """What each process of a run needs, in GiB."""
    update: float
    rollouts: float
    shared: float  # of both: frozen weights, which forks share

    @property
    def peak(self):
        return max(self.update, self.rollouts)


def plan_memory(config, dtype, device="cpu", world=1, *, longest, row_tokens, rows, cache_slots,
                lora_rank=0, checkpointing=True, reference=None, offload=False, keep_sampler=True):
    """The MemoryPlan of a run before it starts: up to a fifth too high, rather than too low.

    longest: tokens of a prompt and its completion. row_tokens: of a packed row of training. rows:
    that decode at once. cache_slots: that they take. reference: the Config of a frozen model that
    is held, too. keep_sampler: on a GPU, its cache and weights stay during the update.
    """
    D, V, width = config.hidden_size, config.vocab_size, config.intermediate_size
    L, size = config.num_hidden_layers, dtype.itemsize
    on_gpu = torch.device(device).type == "cuda"
    weights = size * sum(map(math.prod, param_shapes(config).values()))
    learned = lora_shapes(config, lora_rank) if lora_rank else param_shapes(config)
    trained = sum(map(math.prod, learned.values()))

    held = weights + 4 * trained  # and gradients
    if reference:
        held += size * sum(map(math.prod, param_shapes(reference).values()))
    if not (offload and on_gpu):  # moments, and masters of what is not float32
        held += (12 if size < 4 and not lora_rank else 8) * trained / world
    sampler = 2 * size * L * config.num_key_value_heads * config.head_dim * cache_slots
    if lora_rank or not on_gpu:
        sampler += weights  # merged, or packed

    layer = size * (12 * D + 5 * width)  # bytes that autograd keeps of a token
    if not on_gpu:  # a fused kernel keeps no scores
        layer += size * config.num_attention_heads * longest
    head = (8 + size) * V * min(row_tokens, head_slice(V, device))
    if lora_rank:  # the adapter itself, and its inputs
        held += 4 * trained
        layer += size * (5 * D + width)
    else:  # the gradient of the embedding, and what it is made of
        head += (4 + 3 * size) * V * D
    again = 2 * size * width  # what the backward pass of one layer holds
    if checkpointing:
        again += layer
        layer = size * D
    update = held + row_tokens * L * layer + max(head, row_tokens * again)
    if on_gpu and keep_sampler:  # where its graphs read them
        update += sampler
    rollouts = held + sampler + rows * V * (12 + size)  # logits
    allowance = ALLOWANCE_GIB["cuda" if on_gpu else "cpu"]
    shared = weights if lora_rank else 0
    return MemoryPlan(update / 2**30 + allowance, rollouts / 2**30 + allowance, shared / 2**30)


def plan_line(plan, there):
    """What a plan comes to, with a warning when it exceeds the GiB that are there."""
    line = (f"about {plan.update:.1f} GiB in the update, {plan.rollouts:.1f} in the rollouts, "
            f"of {there:.1f} GiB")
    if plan.peak <= there:
        return line
    return (f"{line}\nwarning: that is more than there is; what helps: --checkpointing, a smaller "
            "--micro-tokens (update) or --max-batch (rollouts), --offload, --lora-rank, more GPUs")


def halve_on_oom(args, name, attempt, engine=None):
    """attempt(), and where a GPU's memory runs out, once more with half of args.NAME, for good.

    For sizes on which no result depends. engine: the sampler's, which gives back what it keeps.
    Raises ValueError when half is too much as well.
    """
    for _ in range(2):
        size = getattr(args, name)
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            reason = f"{str(error).partition('. ')[0]} at {flag_name(name)} {size}"
        if engine:  # out of the handler, whose traceback holds what was allotted
            engine.release()
        torch.cuda.empty_cache()
        setattr(args, name, max(1, size // 2))
        print(f"{reason}: going on with {getattr(args, name)}", flush=True)
    raise ValueError(f"{reason}, which is half of what was tried before; start with less, or see "
                     "what fits: python bench.py plan --help")


# ------------------------------------------------------------ AdamW


class Optimizer(NamedTuple):
    """Flat buffers of n elements, all parameters with padding; updated in place."""
    spans: dict[str, tuple[int, int]]  # name -> (begin, end) in the flat buffers
    num_decayed: int  # weight decay applies to this prefix: matrices come first
    params: torch.Tensor  # [n] in the compute dtype
    grads: torch.Tensor  # [n] float32
    master: torch.Tensor  # [n / world] float32; a view of `params` if those are float32 already
    m: torch.Tensor  # [n / world] float32: running mean of the gradients
    v: torch.Tensor  # [n / world] float32: running mean of the squared gradients
    updates: torch.Tensor  # [] int64: number of updates, for the bias correction


def init_optimizer(trainable, device="cpu", dtype=torch.float32, offload=False):
    """Copy `trainable` (tensors of any device and dtype) into one buffer: (params, Optimizer).

    params: the same names and values, in `dtype` on `device`, with requires_grad set. Gradients
    accumulate in float32 whatever `dtype` is; never set `.grad` to None. Masters keep `trainable`
    in full precision.
    offload: masters and moments stay in pinned host memory; updates stream them through the GPU.
    """
    rank, world = rank_and_world()
    offload = offload and torch.device(device).type == "cuda"
    placement = {"device": "cpu", "pin_memory": True} if offload else {"device": device}
    spans = {}
    size = num_decayed = 0
    for name, tensor in sorted(trainable.items(), key=lambda item: item[1].dim() < 2):
        spans[name] = (size, size + tensor.numel())
        size += math.ceil(tensor.numel() / ALIGN) * ALIGN
        if tensor.dim() >= 2:
            num_decayed = size
    shard = math.ceil(size / (ALIGN * world)) * ALIGN
    first = rank * shard
    flat = torch.zeros(shard * world, device=device, dtype=dtype)
    grads = torch.zeros(shard * world, device=device)
    m, v = torch.zeros(shard, **placement), torch.zeros(shard, **placement)
    separate = offload or dtype != torch.float32
    master = torch.zeros(shard, **placement) if separate else flat[first:first + shard]
    params = {}
    for name, tensor in trainable.items():
        begin, end = spans[name]
        values = tensor.detach().flatten()
        flat[begin:end] = values
        own_part = master[max(0, begin - first):max(0, end - first)]
        own_part.copy_(values[max(0, first - begin):][:len(own_part)])
        params[name] = param = flat[begin:end].view(tensor.shape).requires_grad_()
        grad = grads[begin:end].view(tensor.shape)
        if dtype == torch.float32:
            param.grad = grad  # backward accumulates into it
        else:
            param.register_post_accumulate_grad_hook(functools.partial(move_grad, total=grad))
    updates = torch.zeros((), dtype=torch.int64)
    return params, Optimizer(spans, num_decayed, flat, grads, master, m, v, updates)


def move_grad(param, total):
    total += param.grad
    param.grad = None


def clear_gradients(params, optimizer):
    """Discard the gradients of an interrupted backward pass."""
    optimizer.grads.zero_()
    for param in params.values():
        if param.dtype != torch.float32:  # then .grad is not a view of `grads`
            param.grad = None


def learning_rate(step, steps, peak, warmup, floor=0.1):
    """Rate of step 1, ..., `steps`: linear warm-up, then cosine decay to floor * peak."""
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def optimizer_step(optimizer, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0):
    """One AdamW update from the gradients summed over all processes; zeroes the gradients.

    clip: maximum norm of the whole gradient; 0: no limit. weight_decay applies to matrices only.
    Returns {"grad_norm": before clipping, "skipped": 0 or 1}; a non-finite norm skips the update
    on every process. arXiv:1711.05101, algorithm 2, with the decay multiplied by the learning rate
    as in torch.optim.AdamW.
    """
    rank, world = rank_and_world()
    shard = len(optimizer.master)
    first = rank * shard
    params = optimizer.params[first:first + shard]
    grads = optimizer.grads[first:first + shard]
    if world > 1:
        dist.reduce_scatter_single(grads, optimizer.grads)
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads.split(SLICE)])
    squares = norms.double().square().sum()
    if world > 1:
        dist.all_reduce(squares)
    norm = squares.sqrt().item()
    if math.isfinite(norm):
        optimizer.updates.add_(1)
        fix1, fix2 = (1 - beta ** optimizer.updates.item() for beta in betas)
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for begin in range(0, shard, SLICE):
            piece = slice(begin, begin + SLICE)
            stored = [t[piece] for t in (optimizer.master, optimizer.m, optimizer.v)]
            p, m, v = (t.to(grads.device, non_blocking=True) for t in stored)  # copies if offloaded
            g = grads[piece].mul_(scale)
            p[:max(0, optimizer.num_decayed - first - begin)].mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(fix2)).add_(eps), value=-lr / fix1)
            if optimizer.m.is_pinned():
                for t, updated in zip(stored, (p, m, v)):
                    t.copy_(updated, non_blocking=True)
            if p.data_ptr() != params[piece].data_ptr():
                params[piece] = p
        if world > 1:
            dist.all_gather_single(optimizer.params, params)
        if optimizer.m.is_pinned():
            torch.cuda.synchronize()  # before the host reads them
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not math.isfinite(norm))}


def count_failures(failures, skipped, lr):
    """Consecutive skipped updates, including this step's. Raises ValueError at the third."""
    failures = failures + skipped if skipped else 0
    if failures >= 3:
        raise ValueError(f"the gradient was not finite in {failures} consecutive updates, which "
                         "were skipped; start another --run-dir from the last checkpoint with --lr "
                         f"below {lr:g} or --dtype float32")
    return failures
