"""Advantages and losses, from the rewards of completions to a loss over their tokens.

GRPO is group_advantages, ppo and policy_loss; the rest are options of grpo.py.
"""

import math
from typing import NamedTuple

import torch

from launch import above, at_least, below_one


def add_loss_flags(parser):
    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="dapo", choices=LOSSES)
    add("--level", default="token", choices=("token", "sequence"), help="sequence: GSPO's ratio")
    add("--scale", default="group", choices=("group", "batch", "none", "mean"), help="divide "
        "advantages by the standard deviation of group or batch, or by the group's mean (MaxRL)")
    add("--clip-low", type=below_one, default=0.2, help="clip the ratio below 1 - this")
    add("--clip-high", type=at_least(0.0), help="and above 1 + this (default: 0.28; dppo: 0.2)")
    add("--clip-hard", type=above(1.0), help="and above this if the advantage is negative")
    add("--beta", type=at_least(0.0), help="coefficient of the KL divergence (default: 0)")
    add("--kl", default="k3_corrected", choices=("k1", "k2", "k3", "k3_corrected"))
    add("--entropy-bonus", type=float, default=0.0, help="coefficient of the entropy")
    add("--sampler-level", default="token", choices=("token", "sequence"), help="if sampler and "
        "trainer disagree, truncate the weight of a token, or drop the whole completion")
    add("--sampler-cap", type=at_least(1.0), help="beyond this ratio (default: 2; sequence: 3)")


# ------------------------------------------------------------ advantages


def as_tensor(rows):
    """Lists of rewards as [N, G] float32, with nan for None, which is undecided."""
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows])


def group_advantages(rewards, scale="group"):
    """How much better each completion did than its group.

    rewards: [N, G] float. An undecided one is nan, stays nan, and does not affect the others.
    Returns [N, G] float: rows sum to zero; equal rewards give zeros.
    scale: divide by the standard deviation (n - 1), plus 1e-4, of the "group" (GRPO,
    arXiv:2402.03300) or the "batch" (REINFORCE++-baseline, arXiv:2501.03262); by nothing, "none"
    (Dr. GRPO, arXiv:2503.20783); or by the group's "mean" (MaxRL, arXiv:2602.02710, for rewards of
    0 and 1). Raises ValueError if G < 2: a group of one has no baseline.
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
        return advantages / mean.clamp(min=1e-6)  # 0 if all are wrong
    raise ValueError(f"scale is {scale!r}, expected group, batch, none or mean")


def combined_advantages(parts, coefficients, scale):
    """GDPO, arXiv:2601.05242: normalise each reward in its group, then their sum over the batch.

    The influence of a reward is its coefficient, however small its spread. parts: {name: [N, G]};
    a completion that is nan in one part is left out of all.
    """
    undecided = sum(parts.values()).isnan()
    advantages = sum(
        coefficient * group_advantages(parts[name].masked_fill(undecided, math.nan), scale)
        for name, coefficient in coefficients.items())  # [N, G]
    return advantages / (advantages[~undecided].std() + 1e-4)  # their mean is 0 already


# ------------------------------------------------------------ objectives
# Arguments: the ratio and log-probabilities [B, T], the advantages A [B, 1], and the bounds.
# Returns three [B, T]: the objective of each token, which is maximised, and whether its gradient is
# zero because its ratio is too low or too high.


def ppo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """PPO, arXiv:1707.06347, eq. 7; clip_hard: INTELLECT-2, arXiv:2505.07291."""
    objective = torch.minimum(ratio.clamp(max=hard) * A, ratio.clamp(1 - low, 1 + high) * A)
    return objective, (ratio < 1 - low) & (A < 0), (ratio > 1 + high) & (A > 0)


def cispo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2506.13585, eq. 4: REINFORCE, weighted by the ratio clipped from above."""
    above = ratio > 1 + high  # whatever the advantage
    return ratio.detach().clamp(max=1 + high) * A * logprobs, torch.zeros_like(above), above


def dppo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2602.04879: bounds the change of the probability (total variation), not its ratio."""
    change = logprobs.detach().exp() - old_logprobs.exp()
    below, above = (change < -low) & (A <= 0), (change > high) & (A > 0)
    return ratio.detach().clamp(max=20) * ~(below | above) * A * logprobs, below, above


def sapo(ratio, logprobs, old_logprobs, A, low, high, hard):
    """arXiv:2511.20347: a soft gate instead of clipping, sharper for negative advantages."""
    sharpness = torch.full_like(A, 1.05).masked_fill(A > 0, 1.0)
    gate = torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness
    unclipped = torch.zeros_like(ratio)
    return gate * A, unclipped, unclipped


LOSSES = {"dapo": ppo, "grpo": ppo, "bnpo": ppo, "dr_grpo": ppo, "cispo": cispo, "dppo": dppo,
          "sapo": sapo}


def kl_divergence(gap, ratio, kl):
    """An estimate of KL(policy || reference) for each token, [B, T].

    gap: [B, T], log(reference / policy). Schulman 2020, http://joschu.net/blog/kl-approx.html; k3:
    GRPO, eq. 4; k3_corrected, with an unbiased gradient: DeepSeek-V3.2, arXiv:2512.02556.
    """
    k3 = gap.exp() - gap - 1
    estimates = {"k1": -gap, "k2": gap.square() / 2, "k3": k3, "k3_corrected": ratio * k3}
    if kl not in estimates:
        raise ValueError(f"kl is {kl!r}, expected one of {', '.join(estimates)}")
    return estimates[kl]


# ------------------------------------------------------------ the loss


class Total(NamedTuple):
    """Normalisers of an optimizer step, over all its completions."""
    loss: int  # divides the summed loss
    tokens: int


def loss_total(loss, lengths, max_completion_tokens):
    """The Total of completions with these lengths."""
    tokens = sum(lengths)
    total = tokens  # the mean over all tokens (DAPO, eq. 8)
    if loss in ("grpo", "sapo"):  # the mean over completions of the mean over their tokens
        total = len(lengths)
    if loss == "dr_grpo":  # arXiv:2503.20783: a constant in place of the length
        if max_completion_tokens is None:
            raise ValueError("dr_grpo divides by max_completion_tokens, which is None")
        total = len(lengths) * max_completion_tokens
    return Total(total, tokens)


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, loss="dapo",
                level="token", clip_low=0.2, clip_high=0.28, clip_hard=None, beta=0.0, kl="k3",
                max_completion_tokens=None, total=None, weights=None):
    """(loss, stats): a scalar to minimise, and sums over the tokens of this call for the log.

    logprobs, old_logprobs, ref_logprobs: [B, T] float, under the policy, the policy that sampled,
    and the reference (None if beta is 0). advantages: [B]. mask: [B, T], 1 for completion tokens.
    loss: one of LOSSES. level: "token", or "sequence" for GSPO's ratio. total: Total.loss of the
    whole optimizer step; None: of this call, which makes "bnpo" the same as "dapo".
    max_completion_tokens: for "dr_grpo" without a total. weights: [B, T] or [B, 1], for the
    objective but not the divergence; or None.
    """
    if loss not in LOSSES or level not in ("token", "sequence"):
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}; level is "
                         f"{level!r}, expected token or sequence")
    mask = mask.to(logprobs.dtype)  # [B, T]
    lengths = mask.sum(1)  # [B]
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20) * mask  # [B, T]; clamped: no inf * 0
    ratio = token_ratio = log_ratio.exp()  # [B, T]
    if level == "sequence":  # GSPO, arXiv:2507.18071, eq. 7: geometric mean over the sequence
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
    if loss in ("grpo", "sapo"):  # arXiv:2402.03300, eq. 3: the mean over each completion first
        per_token = per_token / lengths.clamp(min=1)[:, None]
    if total is None:
        total = max(1, loss_total(loss, lengths, max_completion_tokens).loss)
    sums = {"ratio": ratio, "clipped_low": below, "clipped_high": above, "kl": divergence}
    stats = {name: (each.detach() * mask).sum() for name, each in sums.items()}
    return per_token.sum() / total, stats | {"tokens": mask.sum()}


def mismatch_weights(log_ratio, cap, level="token"):
    """Importance weights for a sampler whose probabilities differ from the trainer's.

    log_ratio: [B, T], log(trainer / sampler), 0 at padding. level "token": the ratio of each token,
    at most `cap` (truncated importance sampling), [B, T]. level "sequence": the ratio of the whole
    completion, or 0 if it is outside 1 / cap to cap, [B, 1].
    They correct the objective, an expectation under the trainer estimated from the sampler's draws.
    The KL penalty is not weighted: it applies to every completion, including those with weight 0.
    """
    if level == "token":
        return log_ratio.exp().clamp(max=cap)
    whole = log_ratio.sum(1, keepdim=True)  # [B, 1]
    return torch.where(whole.abs() <= math.log(cap), whole.exp(), 0.0)
