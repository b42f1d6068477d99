"""Train a dict of tensors with AdamW, on one process or many.

Parameters are views into one flat buffer. A second holds gradients, which are reduce-scattered;
each process holds the float32 master and the Adam moments of its shard; the updated buffer is
all-gathered in place (ZeRO, arXiv:1910.02054). One process runs the same code as a world of one.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from launch import rank_and_world

ALIGN = 64  # elements: parameters start on cache lines, so that matrix products round the same way
SLICE = 1 << 20  # elements updated at a time, so that temporaries fit in a CPU's cache

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
            param.register_post_accumulate_grad_hook(functools.partial(accumulate_grad, total=grad))
    updates = torch.zeros((), dtype=torch.int64)
    return params, Optimizer(spans, num_decayed, flat, grads, master, m, v, updates)


def accumulate_grad(param, total):
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
        fix1, fix2 = (1 - beta ** optimizer.updates.item() for beta in betas)  # bias correction
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
            if p.data_ptr() != params[piece].data_ptr():  # the master is a separate tensor
                params[piece] = p
        if world > 1:
            dist.all_gather_single(optimizer.params, params)
        if optimizer.m.is_pinned():
            torch.cuda.synchronize()  # before the host reads them
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not math.isfinite(norm))}


def count_failures(failures, skipped, lr):
    """Consecutive skipped updates, including this step's. Raises ValueError at the third."""
    failures = failures + 1 if skipped else 0
    if failures >= 3:
        raise ValueError(f"the gradient was not finite in {failures} consecutive updates, which "
                         "were skipped; start another --run-dir from the last checkpoint with --lr "
                         f"below {lr:g} or --dtype float32")
    return failures
