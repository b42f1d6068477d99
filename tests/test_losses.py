"""Tests of losses.py."""

import itertools
import math
import statistics

import torch

import losses
from tests.common import raises


def _reference_loss(logprobs, old, ref, advantages, mask, loss, level, low, high, hard, beta, kl,
                    longest, total, weights):
    """The formulas of the papers, one token at a time."""
    def number(x):
        return torch.tensor(x, dtype=torch.float64)

    B, T = mask.shape
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
                change = (torch.exp(logprobs[i, t]) - torch.exp(old[i, t])).item()
                dropped = change > high if A > 0 else change < -low
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
    # a full row, a single token, an empty row, ...
    mask = torch.arange(T) < torch.tensor([6, 4, 1, 5, 0])[:, None]
    return logprobs, old, ref, draw(B), mask


def test_losses_every_loss_equals_its_formula():
    """Value and gradient in float64 against a loop over tokens, for every loss, level, bound,
    divergence and normaliser. Weights apply to the objective only."""
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
        expected = _reference_loss(theirs, old, ref, advantages, mask, loss, level, 0.2, 0.28, hard,
                                 beta, kl, 6, total, weights)
        value.backward(), expected.backward()
        assert abs(value.item() - expected.item()) < 1e-12, (loss, level, hard, beta, kl, total)
        worst = (ours.grad - theirs.grad).abs().max()
        assert worst < 1e-12, (loss, level, hard, beta, kl, total)
        checked += 1
    assert checked == 280


def test_losses_clip_and_count_the_right_tokens():
    """Other code had max() in place of PPO's min(): bad completions that had become likelier got no
    gradient. CISPO clips only from above, for any advantage; PPO's regions were counted."""
    logprobs = torch.tensor([[0.9, 0.0], [0.9, -0.9]], dtype=torch.float64, requires_grad=True)
    case = logprobs, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), torch.ones(2, 2)
    for loss, clipped in (("dapo", (1, 1)), ("cispo", (0, 2))):
        _, stats = losses.policy_loss(*case, loss=loss)
        assert (stats["clipped_low"], stats["clipped_high"]) == clipped
    # ratio e^0.9, far above 1.28
    case = [x[1:, :1] for x in case[:2]] + [None, torch.tensor([-1.0]), torch.ones(1, 1)]
    loss, stats = losses.policy_loss(*case)
    gradient, = torch.autograd.grad(loss, logprobs)
    assert gradient[1, 0] > 1 and stats["clipped_high"] == 0
    assert abs(losses.policy_loss(*case, clip_hard=1.5)[0].item() - 1.5) < 1e-9


def test_losses_degenerate_rows():
    """Values at padding and rows without tokens have no effect; extreme log-probabilities give a
    finite loss."""
    logprobs, old, ref, advantages, mask = _loss_case()
    noisy = [torch.where(mask, x, torch.tensor(v, dtype=torch.float64))
              for x, v in ((logprobs, -1e30), (old, 1e30), (ref, 5e29))]
    for loss in losses.LOSSES:
        kw = {"loss": loss, "beta": 0.1, "max_completion_tokens": 6}
        noisy[0].requires_grad_()
        a, b = (losses.policy_loss(*case, advantages, mask, **kw)[0]
                for case in (noisy, (logprobs, old, ref)))
        gradient, = torch.autograd.grad(a, noisy[0])
        assert torch.isfinite(a) and torch.isclose(a, b) and not gradient[~mask].any(), loss
        none = torch.zeros_like(mask)
        assert losses.policy_loss(logprobs, old, ref, advantages, none, **kw)[0] == 0
    far = (torch.full((1, 1), x) for x in (-1.0, -500.0, -900.0))
    assert torch.isfinite(losses.policy_loss(*far, torch.ones(1), torch.ones(1, 1), beta=1.0)[0])


def test_losses_k1_has_no_mean_gradient():
    """Over the policy's samples, log p - log ref has the gradient of log p, whose mean is 0: k1 is
    no penalty. The corrected k3 has the gradient of the divergence itself."""
    logits, ref = torch.randn(2, 8, dtype=torch.float64,
                              generator=torch.Generator().manual_seed(0))
    ref = ref.log_softmax(-1)
    logprobs = logits.requires_grad_().log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def mean_gradient(kl):
        each = [losses.policy_loss(*(x[i].view(1, 1) for x in (logprobs, logprobs.detach(), ref)),
                                   torch.zeros(1), torch.ones(1, 1), beta=1.0, kl=kl)[0]
                for i in range(8)]
        return gradient((logprobs.exp().detach() * torch.stack(each)).sum())

    exact = gradient((logprobs.exp() * (logprobs - ref)).sum())
    assert mean_gradient("k1").abs().max() < 1e-12
    assert torch.allclose(mean_gradient("k3_corrected"), exact)
    assert not torch.allclose(mean_gradient("k3"), exact, atol=1e-2)


def test_losses_mismatch_weights():
    """Both levels against their formula, one row at a time; extreme ratios give no NaN."""
    log_ratio = torch.tensor([[0.5, 0.4, 0.0], [0.5, 0.7, 0.0], [-0.6, -0.6, 0.0],
                              [900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], dtype=torch.float64)
    token = losses.mismatch_weights(log_ratio, 1.5)
    for weight, x in zip(token.flatten().tolist(), log_ratio.flatten().tolist()):
        assert abs(weight - (1.5 if x > 0.405 else math.exp(x))) < 1e-12
    for row, weight in zip(log_ratio.tolist(), losses.mismatch_weights(log_ratio, 3.0, "sequence")):
        inside = 1 / 3 <= math.exp(min(700, sum(row))) <= 3
        assert abs(weight.item() - (math.exp(sum(row)) if inside else 0.0)) < 1e-12


def _decided(row):
    return [x for x in row if not math.isnan(x)]


def test_losses_advantages():
    """Every scale against its formula in float64, one completion at a time; undecided ones do not
    affect the others."""
    rewards = [[1.0, 0, 0, 0], [1, 1, 1, 0], [0] * 4, [1] * 4, [0.1, 1.1, math.nan, 1]]
    for scale in ("group", "batch", "none", "mean"):
        found = losses.group_advantages(torch.tensor(rewards, dtype=torch.float64), scale).tolist()
        for row, advantages in zip(rewards, found):
            decided = _decided(row)
            mean = statistics.mean(decided)
            divisor = {"group": statistics.stdev(decided) + 1e-4, "none": 1, "mean": mean or 1,
                       "batch": statistics.stdev(_decided(sum(rewards, []))) + 1e-4}[scale]
            for reward, advantage in zip(decided, _decided(advantages), strict=True):
                assert abs(advantage - (reward - mean) / divisor) < 1e-12, (scale, row)
    for bad in ((torch.ones(3, 1),), (torch.ones(3, 4), "std")):
        with raises(ValueError, "expected"):
            losses.group_advantages(*bad)


def test_losses_gdpo_advantages():
    """Against the formula, one completion at a time: a reward of small spread counts as much. A
    completion undecided in one reward is left out of all."""
    generator = torch.Generator().manual_seed(0)
    parts = {"accuracy": torch.randint(2, (5, 4), generator=generator).double(),
             "brevity": 0.01 * torch.rand(5, 4, generator=generator, dtype=torch.float64)}
    parts["accuracy"][4, 3] = math.nan
    summed = []
    for accuracy, brevity in zip(*(part.tolist() for part in parts.values())):
        rows = zip(*[pair for pair in zip(accuracy, brevity) if not math.isnan(pair[0])])
        normal = [[(x - statistics.mean(row)) / (statistics.stdev(row) + 1e-4) for x in row]
                  for row in map(list, rows)]
        summed += [a + 0.5 * b for a, b in zip(*normal)]
    scale = statistics.stdev(summed) + 1e-4
    expected = [(x - statistics.mean(summed)) / scale for x in summed]
    coefficients = {"accuracy": 1.0, "brevity": 0.5}
    found = losses.combined_advantages(parts, coefficients, "group").flatten().tolist()
    assert max(abs(a - b) for a, b in zip(_decided(found), expected, strict=True)) < 1e-12


def test_losses_reject_bad_settings():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for bad, message in (({"loss": "ppo"}, "dapo"), ({"level": "word"}, "sequence"),
                         ({"kl": "k4", "beta": 1.0}, "k3"),
                         ({"loss": "dr_grpo"}, "max_completion")):
        with raises(ValueError, message):
            losses.policy_loss(x, x, x, torch.ones(2), mask, **bad)
