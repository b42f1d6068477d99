"""Tests of optim.py."""

from unittest import mock

import torch

import model
import optim
from tests.common import TRAIN_CONFIG, trained_state


def test_optim_learning_rate():
    rates = [optim.learning_rate(step, 100, 2.0, 10) for step in range(1, 101)]
    assert abs(rates[0] - 0.2) < 1e-12 and rates[9] == 2.0 and abs(rates[99] - 0.2) < 1e-12
    assert abs(rates[54] - 1.1) < 1e-12  # halfway down the cosine: mean of peak and floor
    assert rates[9:] == sorted(rates[9:], reverse=True) and optim.learning_rate(1, 1, 2.0, 0) == 0.2


def test_optim_adamw_equals_torch():
    """Fifty steps with clipping, weight decay on matrices only, and slices that split parameters.

    Both get the same synthetic gradients. A model's key biases have a true gradient of zero, and
    Adam would amplify the rounding noise.
    """
    start = model.init_params(TRAIN_CONFIG, 1)
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    groups = [{"params": [t for t in theirs.values() if t.dim() == 2], "weight_decay": 0.1},
              {"params": [t for t in theirs.values() if t.dim() == 1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False)
    ours, optimizer = optim.init_optimizer(start)
    assert list(ours) == list(start) and optimizer.master.data_ptr() == optimizer.params.data_ptr()
    generator = torch.Generator().manual_seed(0)
    clipped = 0
    with mock.patch.object(optim, "SLICE", 1000):
        for step in range(1, 51):
            for _ in range(2):  # micro-batches
                noise = {name: torch.randn(t.shape, generator=generator) / step
                         for name, t in start.items()}
                for params in (ours, theirs):
                    sum((params[name] * noise[name]).sum() for name in params).backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 10.0).item()
            clipped += norm > 10
            lr = optim.learning_rate(step, 50, 1e-2, 5)
            for group in reference.param_groups:
                group["lr"] = lr
            reference.step()
            reference.zero_grad()
            stats = optim.optimizer_step(optimizer, lr, betas=(0.9, 0.98), weight_decay=0.1,
                                         clip=10.0)
            assert abs(stats["grad_norm"] / norm - 1) < 1e-5 and not optimizer.grads.any(), step
    assert 5 < clipped < 45, clipped
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert worst < 1e-6, worst


def test_optim_masters_keep_small_steps():
    """A 1e-4 step is below bfloat16's spacing at 1, and is lost without a float32 master.

    A small micro-batch gradient added to a large sum is lost too if that sum is bfloat16.
    """
    params, optimizer = optim.init_optimizer({"w": torch.ones(4, 3), "b": torch.full((2,), 1.001)},
                                             dtype=torch.bfloat16)
    assert optimizer.master[optimizer.spans["b"][0]] == torch.tensor(1.001)  # never rounded
    for _ in range(41):
        params["w"].sum().backward()
        optim.optimizer_step(optimizer, 1e-4, clip=0)
    assert (params["w"] - (1 - 41e-4)).abs().max() < 2e-3 and params["w"].max() < 1
    assert (optimizer.master[:12] - (1 - 41e-4)).abs().max() < 1e-5
    params["w"].sum().backward()
    for _ in range(100):
        (params["w"].sum() * 1e-3).backward()
    assert (optimizer.grads[:12] - 1.1).abs().max() < 1e-3 and params["w"].grad is None


def test_optim_skips_non_finite_gradients():
    for bad in (float("nan"), float("inf")):
        params, optimizer = trained_state(3)
        watched = (optimizer.params, optimizer.m, optimizer.v, optimizer.updates)
        before = [t.clone() for t in watched]
        optimizer.grads[optimizer.spans["model.norm.weight"][0]] = bad
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 1 and not optimizer.grads.any()
        assert all(map(torch.equal, before, watched))
        optimizer.grads.fill_(1e-3)
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 0
        assert not torch.equal(before[0], optimizer.params)
