"""Advantages and losses: what a completion's reward says of its tokens.

GRPO is group_advantages, ppo and policy_loss; the rest are options of grpo.py.
"""

import math
from typing import NamedTuple

import torch

# ------------------------------------------------------------ advantages


def group_advantages(rewards, scale="group"):
    """How much better each completion did than its group.

    rewards: [N, G] float, nan where undecided, which stays nan and has no part in the others.
    Returns [N, G] float: rows sum to zero; equal rewards give zeros.
    scale: divide by the standard deviation (n - 1) of the "group" (GRPO, arXiv:2402.03300) or of
    the "batch" (REINFORCE++-baseline, arXiv:2501.03262), plus 1e-4, by "none" (Dr. GRPO,
    arXiv:2503.20783), or by the group's "mean" (MaxRL, arXiv:2602.02710: for rewards of 0 and 1).
    Raises ValueError when G < 2: one alone has no baseline.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {list(rewards.shape)}, expected [N, G] with G of at least 2")
    mean = rewards.nanmean(1, keepdim=True)  # [N, 1]
    advantages = rewards - mean  # [N, G]
    if scale == "none":
        return advantages
    if scale == "group":
        deviations = torch.stack([row[~row.isnan()].std() for row in rewards])
        return advantages / (deviations[:, None] + 1e-4)
    if scale == "batch":
        return advantages / (rewards[~rewards.isnan()].std() + 1e-4)
    if scale == "mean":
        return advantages / mean.clamp(min=1e-6)  # all wrong: 0 / 1e-6
    raise ValueError(f"scale is {scale!r}, expected group, batch, none or mean")


def combined_advantages(parts, coefficients, scale):
    """GDPO, arXiv:2601.05242: each reward by itself in its group, then their sum over the batch.

    So a reward counts by its coefficient, however little it differs. parts: {name: [N, G]}, nan
    where undecided, which keeps a completion out of every part.
    """
    undecided = sum(parts.values()).isnan()
    advantages = sum(
        coefficient * group_advantages(parts[name].masked_fill(undecided, math.nan), scale)
        for name, coefficient in coefficients.items())  # [N, G]
    return advantages / (advantages[~undecided].std() + 1e-4)  # their mean is 0 already


# ------------------------------------------------------------ objectives
# Each takes the ratio and log-probabilities [B, T], the advantages A [B, 1] and the bounds, and
# returns three [B, T]: what a token adds to the sum that is maximised, and whether it has no
# gradient, its ratio being too low or too high.


def ppo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """PPO, arXiv:1707.06347, eq. 7; clip_hard: INTELLECT-2, arXiv:2505.07291."""
    objective = torch.minimum(ratio.clamp(max=hard) * A, ratio.clamp(1 - low, 1 + high) * A)
    return objective, (ratio < 1 - low) & (A < 0), (ratio > 1 + high) & (A > 0)


def cispo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2506.13585, eq. 4: a factor that is clipped from above; every token has a gradient."""
    above = ratio > 1 + high  # whatever the advantage
    return ratio.detach().clamp(max=1 + high) * A * logprobs, torch.zeros_like(above), above


def dppo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2602.04879: bounds the move of the probability (total variation), not its ratio."""
    moved = logprobs.detach().exp() - old_logprobs.exp()
    below, above = (moved < -low) & (A <= 0), (moved > high) & (A > 0)
    return ratio.detach().clamp(max=20) * ~(below | above) * A * logprobs, below, above


def sapo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2511.20347: a soft gate in place of the clip, sharper for negative advantages."""
    sharpness = torch.full_like(A, 1.05).masked_fill(A > 0, 1.0)
    gate = torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness
    open_everywhere = torch.zeros_like(ratio)
    return gate * A, open_everywhere, open_everywhere


LOSSES = {"dapo": ppo, "grpo": ppo, "bnpo": ppo, "dr_grpo": ppo, "cispo": cispo, "dppo": dppo,
          "sapo": sapo}


def kl_divergence(gap, ratio, kl):
    """Estimates of KL(policy || reference) for each token, [B, T].

    gap: [B, T], log of reference over policy. Schulman 2020, http://joschu.net/blog/kl-approx.html;
    k3: GRPO, eq. 4; k3_corrected, whose gradient is unbiased: DeepSeek-V3.2, arXiv:2512.02556.
    """
    k3 = gap.exp() - gap - 1
    estimates = {"k1": -gap, "k2": gap.square() / 2, "k3": k3, "k3_corrected": ratio * k3}
    if kl not in estimates:
        raise ValueError(f"kl is {kl!r}, expected one of {', '.join(estimates)}")
    return estimates[kl]


# ------------------------------------------------------------ the loss


class Total(NamedTuple):
    """The normalisers of an optimizer step, over all its completions."""
    loss: int  # what the sum of the loss is divided by
    tokens: int


def loss_total(loss, lengths, max_completion_tokens):
    """The Total of completions of these lengths."""
    tokens = sum(lengths)
    total = tokens  # the mean over all tokens (DAPO, eq. 8)
    if loss in ("grpo", "sapo"):  # over completions, each the mean over its tokens
        total = len(lengths)
    if loss == "dr_grpo":  # arXiv:2503.20783: a constant instead of the length
        if max_completion_tokens is None:
            raise ValueError("dr_grpo divides by max_completion_tokens, which is None")
        total = len(lengths) * max_completion_tokens
    return Total(total, tokens)


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, loss="dapo",
                level="token", clip_low=0.2, clip_high=0.28, clip_hard=None, beta=0.0, kl="k3",
                max_completion_tokens=None, total=None, weights=None):
    """The loss whose gradient improves the policy, and what to log of it.

    logprobs, old_logprobs, ref_logprobs: [B, T] float, under the policy, the policy that sampled,
    the reference (None when beta is 0). advantages: [B]. mask: [B, T], 1 for tokens that count.
    loss: one of LOSSES. level: "token", or "sequence" for the ratio of GSPO. weights: [B, T] or
    [B, 1], factors of the objective, not of the divergence; or None. total: what the sum is divided
    by, over the whole optimizer step; None: by loss_total of this call (so "bnpo" is "dapo"), where
    "dr_grpo" takes max_completion_tokens for the length.
    Returns (loss, stats): a scalar, and sums over the tokens of this call, "tokens" among them.
    """
    if loss not in LOSSES or level not in ("token", "sequence"):
        raise ValueError(f"loss is {loss!r}, level {level!r}, expected one of {', '.join(LOSSES)}, "
                         "and token or sequence")
    mask = mask.to(logprobs.dtype)  # [B, T]
    lengths = mask.sum(1)  # [B]
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20) * mask  # [B, T]; never inf * 0
    ratio = token_ratio = log_ratio.exp()  # [B, T]
    if level == "sequence":  # GSPO, arXiv:2507.18071, eq. 7: the geometric mean over the sequence
        mean = log_ratio.sum(1) / lengths.clamp(min=1)  # [B]
        ratio = mean.exp()[:, None].expand_as(token_ratio)  # [B, T]
    objective, below, above = LOSSES[loss](
        ratio, logprobs, old_logprobs, advantages[:, None], clip_low, clip_high,
        math.inf if clip_hard is None else clip_hard)  # [B, T] each
    if weights is not None:
        objective = objective * weights
    divergence = torch.zeros_like(logprobs)  # [B, T]
    if beta:
        gap = (ref_logprobs - logprobs).clamp(-20, 20) * mask
        divergence = kl_divergence(gap, token_ratio, kl)
    per_token = (beta * divergence - objective) * mask  # [B, T]
    if loss in ("grpo", "sapo"):  # arXiv:2402.03300, eq. 3: first the mean over each completion
        per_token = per_token / lengths.clamp(min=1)[:, None]
    if total is None:
        total = max(1, loss_total(loss, lengths, max_completion_tokens).loss)
    sums = {"ratio": ratio, "clipped_low": below, "clipped_high": above, "kl": divergence}
    stats = {name: (each.detach() * mask).sum() for name, each in sums.items()}
    return per_token.sum() / total, stats | {"tokens": mask.sum()}


def mismatch_weights(log_ratio, cap, level="token"):
    """Importance weights, for a sampler whose probabilities differ from the trainer's.

    log_ratio: [B, T], log of the trainer's over the sampler's, 0 where there is no token.
    level "token": the ratio of each token, at most `cap` (truncated importance sampling), [B, T].
    "sequence": the ratio of the whole completion, or 0 outside 1 / cap to cap, [B, 1].
    They are for the policy's objective, an expectation under the trainer that the sampler's draws
    only estimate. A KL penalty goes without: it should hold in every sample, masked ones included.
    """
    if level == "token":
        return log_ratio.exp().clamp(max=cap)
    whole = log_ratio.sum(1, keepdim=True)  # [B, 1]
    return torch.where(whole.abs() <= math.log(cap), whole.exp(), 0.0)
