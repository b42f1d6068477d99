"""Tests of losses.py."""

import itertools
import math
import statistics

import torch

import losses
from tests.common import raises


def _reference_loss(logprobs, old, ref, advantages, mask, loss, level, low, high, hard, beta, kl,
                    longest, total, weights):
    """The formulas of the papers, a token at a time."""
    (B, T), number = mask.shape, lambda x: torch.tensor(x, dtype=torch.float64)
    rows = []
    for i in range(B):
        length = int(mask[i].sum())
        terms = []
        log_ratios = [logprobs[i, t] - old[i, t] for t in range(T) if mask[i, t]]
        mean_ratio = torch.exp(sum(log_ratios, number(0.0)) / max(1, length))
        for t in range(T):
            if not mask[i, t]:
                continue
            A, own = advantages[i], torch.exp(logprobs[i, t] - old[i, t])
            r = mean_ratio if level == "sequence" else own
            if loss == "cispo":
                term = -min(r.item(), 1 + high) * A * logprobs[i, t]
            elif loss == "dppo":
                moved = (torch.exp(logprobs[i, t]) - torch.exp(old[i, t])).item()
                dropped = moved > high if A > 0 else moved < -low
                term = number(0.0) if dropped else -A * min(r.item(), 20.0) * logprobs[i, t]
            elif loss == "sapo":
                tau = 1.0 if A > 0 else 1.05
                term = -A * (4 / tau) / (1 + torch.exp(-tau * (r - 1)))
            else:
                unclipped = (r if hard is None or r <= hard else number(hard)) * A
                clipped = min(max(r, number(1 - low)), number(1 + high)) * A
                term = -(unclipped if unclipped <= clipped else clipped)
            term = term * weights[i, t]
            if beta:
                d = ref[i, t] - logprobs[i, t]
                k3 = torch.exp(d) - 1 - d
                estimates = {"k1": -d, "k2": d * d / 2, "k3": k3, "k3_corrected": own * k3}
                term = term + beta * estimates[kl]
            terms.append(term)
        rows.append(terms)
    tokens = sum(map(len, rows))
    if loss in ("grpo", "sapo"):
        return sum(sum(terms) / len(terms) for terms in rows if terms) / (total or B)
    if loss == "dr_grpo":
        return sum(sum(terms) for terms in rows) / (total or B * longest)
    return sum(sum(terms) for terms in rows) / (total or tokens)


def _loss_case(seed=0, B=5, T=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -draw(B, T).abs() - 0.1
    old, ref = logprobs + 0.4 * draw(B, T), logprobs + 0.5 * draw(B, T)
    # a whole row, a single token, an empty row
    mask = torch.arange(T) < torch.tensor([6, 4, 1, 5, 0])[:, None]
    return logprobs, old, ref, draw(B), mask


def test_losses_every_loss_equals_its_formula():
    """Value and gradient, float64, against a loop over tokens: every loss, level, bound, divergence
    and normaliser. The weights are the objective's alone."""
    logprobs, old, ref, advantages, mask = _loss_case()
    weights = logprobs.detach().exp() + 0.5
    checked = 0
    for loss, level, hard, (beta, kl), total in itertools.product(
            losses.LOSSES, ("token", "sequence"), (None, 1.5),
            ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3"), (0.3, "k3_corrected")),
            (None, 37)):
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        value, _ = losses.policy_loss(ours, old, ref if beta else None, advantages, mask, loss=loss,
                                    level=level, clip_hard=hard, beta=beta, kl=kl,
                                    max_completion_tokens=6, total=total, weights=weights)
        wanted = _reference_loss(theirs, old, ref, advantages, mask, loss, level, 0.2, 0.28, hard,
                                 beta, kl, 6, total, weights)
        value.backward(), wanted.backward()
        assert abs(value.item() - wanted.item()) < 1e-12, (loss, level, hard, beta, kl, total)
        worst = (ours.grad - theirs.grad).abs().max()
        assert worst < 1e-12, (loss, level, hard, beta, kl, total)
        checked += 1
    assert checked == 280


def test_losses_negative_advantage_keeps_its_gradient_above_the_clip():
    """A max() where PPO takes min() left bad completions that had become likelier without a
    gradient, in other code."""
    # ratio e^0.9, far above 1.28
    logprobs = torch.tensor([[0.9]], dtype=torch.float64, requires_grad=True)
    case = logprobs, torch.zeros(1, 1), None, torch.tensor([-1.0]), torch.ones(1, 1)
    loss, stats = losses.policy_loss(*case)
    loss.backward()
    assert logprobs.grad.item() > 1 and stats["clipped_high"] == 0
    bounded = losses.policy_loss(*case, clip_hard=1.5)[0]
    assert abs(bounded.item() - 1.5) < 1e-9


def test_losses_survives_degenerate_rows():
    """Padding may hold anything; rows of no tokens count for nothing; absurd log-probabilities stay
    finite."""
    logprobs, old, ref, advantages, mask = _loss_case()
    spoilt = [torch.where(mask, x, torch.tensor(v, dtype=torch.float64))
              for x, v in ((logprobs, -1e30), (old, 1e30), (ref, 5e29))]
    for loss in losses.LOSSES:
        kw = {"loss": loss, "beta": 0.1, "max_completion_tokens": 6}
        spoilt[0].requires_grad_()
        a, b = (losses.policy_loss(*case, advantages, mask, **kw)[0]
                for case in (spoilt, (logprobs, old, ref)))
        gradient, = torch.autograd.grad(a, spoilt[0])
        assert torch.isfinite(a) and torch.isclose(a, b) and not gradient[~mask].any(), loss
        none = torch.zeros_like(mask)
        assert losses.policy_loss(logprobs, old, ref, advantages, none, **kw)[0] == 0
    far = (torch.full((1, 1), x) for x in (-1.0, -500.0, -900.0))
    assert torch.isfinite(losses.policy_loss(*far, torch.ones(1), torch.ones(1, 1), beta=1.0)[0])


def test_losses_k1_in_the_loss_has_no_mean_gradient():
    """Why k1 is no penalty: over the policy's samples, log p - log ref has that of log p, which is
    0 in the mean."""
    logits = torch.randn(8, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(8, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(1)).log_softmax(-1)

    def mean_gradient(kl):
        logprobs = logits.log_softmax(-1)
        triples = [[x[i].view(1, 1) for x in (logprobs, logprobs.detach(), ref)] for i in range(8)]
        each = [losses.policy_loss(*three, torch.zeros(1), torch.ones(1, 1), beta=1.0, kl=kl)[0]
                for three in triples]
        return torch.autograd.grad(sum(p.item() * loss for p, loss in zip(logprobs.exp(), each)),
                                   logits)[0]

    logprobs = logits.log_softmax(-1)
    exact, = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    assert mean_gradient("k1").abs().max() < 1e-12
    # the corrected k3 has that of the divergence itself
    assert torch.allclose(mean_gradient("k3_corrected"), exact)
    assert not torch.allclose(mean_gradient("k3"), exact, atol=1e-2)


def test_losses_cispo_counts_what_it_clips():
    """It clips from above only, whatever the sign of the advantage; PPO's regions were counted."""
    logprobs, A = torch.tensor([[0.9, 0.0], [0.9, -0.9]]), torch.tensor([1.0, -1.0])
    case = logprobs, torch.zeros(2, 2), None, A, torch.ones(2, 2)
    stats = losses.policy_loss(*case, loss="cispo")[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (0, 2)
    stats = losses.policy_loss(*case)[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (1, 1)


def test_losses_mismatch_weights():
    """The formula of either level, a row at a time; a ratio beyond all bounds leaves no NaN."""
    log_ratio = torch.tensor([[0.5, 0.4, 0.0], [0.5, 0.7, 0.0], [-0.6, -0.6, 0.0],
                              [900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], dtype=torch.float64)
    token = losses.mismatch_weights(log_ratio, 1.5)
    for weight, x in zip(token.flatten().tolist(), log_ratio.flatten().tolist()):
        assert abs(weight - (1.5 if x > 0.405 else math.exp(x))) < 1e-12
    for row, weight in zip(log_ratio.tolist(), losses.mismatch_weights(log_ratio, 3.0, "sequence")):
        inside = 1 / 3 <= math.exp(min(700, sum(row))) <= 3
        assert abs(weight.item() - (math.exp(sum(row)) if inside else 0.0)) < 1e-12


def test_losses_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.1, 1.1, 0, 1]])
    for scale in ("group", "batch", "none", "mean"):
        a = losses.group_advantages(rewards, scale)
        assert a.sum(1).abs().max() < 1e-5 and not a[1].any()
    a = losses.group_advantages(rewards)
    # deviation over n - 1: 0.5
    assert torch.allclose(a[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    assert torch.allclose(losses.group_advantages(rewards, "batch")[0, 0],
                          0.75 / (rewards.std() + 1e-4))
    for bad in ((torch.ones(3, 1),), (rewards, "std")):
        with raises(ValueError, "expected"):
            losses.group_advantages(*bad)


def test_losses_maxrl_advantages():
    """A right completion weighs the more, the rarer it is; float64, a completion at a time."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0] * 4, [1] * 4], dtype=torch.float64)
    for row, found in zip(rewards.tolist(), losses.group_advantages(rewards, "mean").tolist()):
        mean = sum(row) / 4
        assert found == [(r - mean) / mean if mean else 0.0 for r in row]


def test_losses_gdpo_advantages():
    """Against the formula, a completion at a time: a reward that hardly differs counts as much."""
    generator = torch.Generator().manual_seed(0)
    parts = {"accuracy": torch.randint(2, (5, 4), generator=generator).double(),
             "brevity": 0.01 * torch.rand(5, 4, generator=generator, dtype=torch.float64)}
    coefficients = {"accuracy": 1.0, "brevity": 0.5}
    summed = []
    for n, i in itertools.product(range(5), range(4)):
        terms = []
        for name, coefficient in coefficients.items():
            row = parts[name][n].tolist()
            terms.append(coefficient * (row[i] - statistics.mean(row))
                         / (statistics.stdev(row) + 1e-4))
        summed.append(sum(terms))
    scale = statistics.stdev(summed) + 1e-4
    wanted = [(x - statistics.mean(summed)) / scale for x in summed]
    found = losses.combined_advantages(parts, coefficients, "group").flatten().tolist()
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-12
