"""Trains a dict of tensors on one process or many: AdamW.

Parameters are views into one flat buffer. Gradients are summed in a second and reduce-scattered;
each process holds the float32 master and the Adam moments of its shard; the updated buffer is
all-gathered in place (ZeRO, arXiv:1910.02054). One process runs the same code as a world of one.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from launch import rank_and_world

ALIGN = 64  # elements: every parameter starts on a cache line, so that products round alike
SLICE = 1 << 20  # elements of a shard updated at a time: temporaries fit a CPU's cache

# ------------------------------------------------------------ AdamW


class Optimizer(NamedTuple):
    """All parameters as n elements with their padding, n / world of them here. Written in place."""
    spans: dict[str, tuple[int, int]]  # name -> begin and end in the flat buffers
    num_decayed: int  # matrices come first, so that weight decay is for a prefix
    params: torch.Tensor  # [n] in the dtype of the computation
    grads: torch.Tensor  # [n] float32
    master: torch.Tensor  # [n / world] float32; the shard of `params` itself where it can be
    m: torch.Tensor  # [n / world] float32: running mean of the gradients
    v: torch.Tensor  # [n / world] float32: running mean of their squares
    updates: torch.Tensor  # [] int64: updates made, for the bias correction


def init_optimizer(trainable, device="cpu", dtype=torch.float32, offload=False):
    """Lays the tensors of `trainable` (any device and dtype) into one buffer: (params, Optimizer).

    params: the same names and values, in `dtype` on `device`, requiring a gradient. Gradients are
    summed in float32 over backward passes, whatever `dtype` is; never set `.grad` to None. Masters
    keep `trainable` in full precision.
    offload: masters and moments live in pinned host memory and pass through the GPU slice by slice.
    """
    rank, world = rank_and_world()
    offload = offload and torch.device(device).type == "cuda"
    home = {"device": "cpu", "pin_memory": True} if offload else {"device": device}
    spans = {}
    size = num_decayed = 0
    for name in sorted(trainable, key=lambda name: trainable[name].dim() < 2):  # matrices first
        spans[name] = (size, size + trainable[name].numel())
        size += -(-trainable[name].numel() // ALIGN) * ALIGN
        if trainable[name].dim() >= 2:
            num_decayed = size
    shard = -(-size // (ALIGN * world)) * ALIGN
    first = rank * shard
    flat = torch.zeros(shard * world, device=device, dtype=dtype)
    grads = torch.zeros(shard * world, device=device)
    m, v = torch.zeros(shard, **home), torch.zeros(shard, **home)
    own_master = offload or dtype != torch.float32
    master = torch.zeros(shard, **home) if own_master else flat[first:first + shard]
    params = {}
    for name, tensor in trainable.items():
        begin, end = spans[name]
        values = tensor.detach().flatten()
        flat[begin:end] = values
        mine = master[max(0, begin - first):max(0, end - first)]
        mine.copy_(values[max(0, first - begin):][:len(mine)])
        params[name] = param = flat[begin:end].view(tensor.shape).requires_grad_()
        grad = grads[begin:end].view(tensor.shape)
        if dtype == torch.float32:
            param.grad = grad  # backward adds to what it finds
        else:
            param.register_post_accumulate_grad_hook(functools.partial(move_grad, total=grad))
    updates = torch.zeros((), dtype=torch.int64)
    return params, Optimizer(spans, num_decayed, flat, grads, master, m, v, updates)


def move_grad(param, total):
    total += param.grad
    param.grad = None


def clear_gradients(params, optimizer):
    """Forget what an interrupted backward pass has summed so far."""
    optimizer.grads.zero_()
    for param in params.values():
        if param.dtype != torch.float32:  # whose .grad is no part of `grads`
            param.grad = None


def learning_rate(step, steps, peak, warmup, floor=0.1):
    """Of step 1, ..., `steps`: up in a line over `warmup` steps, down a cosine to floor * peak."""
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def optimizer_step(optimizer, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0):
    """One AdamW update from the gradients summed over backward passes and processes; zeroes them.

    clip: the largest norm of the whole gradient; 0: any. weight_decay is for matrices only.
    Returns {"grad_norm": before clipping, "skipped": 0 or 1}; a norm that is not finite skips the
    update everywhere. arXiv:1711.05101, algorithm 2, with the decay multiplied by the learning rate
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
            at_home = [t[piece] for t in (optimizer.master, optimizer.m, optimizer.v)]
            p, m, v = (t.to(grads.device, non_blocking=True) for t in at_home)  # themselves, mostly
            g = grads[piece].mul_(scale)
            p[:max(0, optimizer.num_decayed - first - begin)].mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(fix2)).add_(eps), value=-lr / fix1)
            if optimizer.m.is_pinned():
                for t, updated in zip(at_home, (p, m, v)):
                    t.copy_(updated, non_blocking=True)
            if p.data_ptr() != params[piece].data_ptr():
                params[piece] = p
        if world > 1:
            dist.all_gather_single(optimizer.params, params)
        if optimizer.m.is_pinned():
            torch.cuda.synchronize()  # the host may read its copies from here on
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not math.isfinite(norm))}


def count_failures(failures, skipped, lr):
    """Updates skipped running, this step's included; ValueError for the third."""
    failures = failures + skipped if skipped else 0
    if failures >= 3:
        raise ValueError(f"the gradient was not finite in {failures} updates running, which were "
                         "skipped; start another --run-dir from the last checkpoint, with --lr "
                         f"below {lr:g} or --dtype float32")
    return failures
