"""Compare grpo.py's loss and advantages with TRL's: values and gradients, in float64.

    pip install trl==1.16.0       # in a separate environment: it installs transformers
    python -m docs.trl_parity

Runs TRL's own methods on a stand-in trainer that has only settings.
"""

import inspect
import itertools
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.trainer import grpo_trainer

import losses

B, T = 8, 6
SOURCE = inspect.getsource(grpo_trainer.GRPOTrainer)
# Excerpts, (first line, line after the last), of methods that need a complete trainer.
SAMPLER_RATIO = ("per_token_logps_diff = (old_per_token_logps",
                 "# Compute the per-token log probabilities for the reference")
SAMPLERS = {  # correction: (TRL's mode, lower and upper bound of the ratio)
    None: (None, None, None), "token": ("token_truncate", None, 2.0),
    "sequence": ("sequence_mask", 1 / 3, 3.0)}
ADVANTAGES = ('if self.multi_objective_aggregation == "sum_then_normalize":',
              "advantages = torch.nan_to_num")


def run_part(part, **names):
    """Run TRL's source from the line containing part[0] up to the line containing part[1]."""
    first, end = (SOURCE.rindex("\n", 0, SOURCE.index(words)) + 1 for words in part)
    names = vars(grpo_trainer) | names
    exec(textwrap.dedent(SOURCE[first:end]), names)
    return names


def make_trainer(loss, level, beta, kl, clip_hard, sampler, bonus):
    """A stand-in for GRPOTrainer."""
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, sync_gradients=True,
                                  reduce=lambda x, reduction: x)
    sharpness = torch.tensor([1.0, 1.05], dtype=torch.float64)  # TRL rounds 1.05 to float32
    args = SimpleNamespace(
        delta=clip_hard, use_bias_correction_kl=kl == "k3_corrected", steps_per_generation=1,
        sapo_temperature_pos=sharpness[0], sapo_temperature_neg=sharpness[1])
    mode, low, high = SAMPLERS[sampler]
    return SimpleNamespace(
        accelerator=accelerator, args=args, model=SimpleNamespace(training=True), loss_type=loss,
        importance_sampling_level=level, beta=beta, epsilon_low=0.2,
        epsilon_high=1.28 if loss == "cispo" else 0.28, max_completion_length=T,
        use_vllm=sampler is not None, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high, entropy_coef=bonus,
        _entropy_bonus_enabled=bonus != 0, use_adaptive_entropy=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=defaultdict(lambda: defaultdict(list)))


def loss_gap(loss, level, beta, kl, clip_hard, sampler, bonus):
    """The largest difference in the loss and in its gradients by log-probability and entropy."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, B, T, generator=generator, dtype=torch.float64)
    logprobs, entropy = -normal[0].abs() - 0.1, normal[5].abs()
    old, ref = logprobs + 0.4 * normal[1], logprobs + 0.5 * normal[2]
    sampled = old - 0.6 * normal[3]
    advantages = normal[4, :, 0]
    mask = torch.arange(T) < torch.tensor([6, 4, 1, 5, 2, 3, 6, 6])[:, None]  # [B, T]
    ours, theirs = ([x.clone().requires_grad_() for x in (logprobs, entropy)] for _ in range(2))

    trainer = make_trainer(loss, level, beta, kl, clip_hard, sampler, bonus)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*theirs, None)
    nothing = torch.zeros(B, 1, dtype=torch.long)
    inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask.long(),
              "completion_mask": mask.double(), "advantages": advantages,
              "old_per_token_logps": old, "ref_per_token_logps": ref,
              "num_items_in_batch": mask.sum()}
    weights = None
    if sampler:
        weights = losses.mismatch_weights((old - sampled) * mask, SAMPLERS[sampler][2], sampler)
        inputs["importance_sampling_ratio"] = run_part(
            SAMPLER_RATIO, self=trainer, old_per_token_logps=old,
            sampling_per_token_logps=sampled, mask=mask)["vllm_importance_sampling_ratio"]
    expected = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    found, _ = losses.policy_loss(ours[0], old, ref if beta else None, advantages, mask, loss=loss,
                                level=level, clip_hard=clip_hard, beta=beta, kl=kl,
                                max_completion_tokens=T, weights=weights)
    found = found - bonus * (ours[1] * mask).sum() / mask.sum()
    expected.backward()
    found.backward()
    pairs = [(found, expected), (ours[0].grad, theirs[0].grad)]
    pairs += [(ours[1].grad, theirs[1].grad)] if bonus else []
    return max((a - b).abs().max().item() for a, b in pairs)


def advantage_gap(scale, combine):
    """The largest difference in the advantages of 6 groups of 5."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(2, 6, 5, generator=generator, dtype=torch.float64)
    coefficients = torch.tensor([1.0, 0.3], dtype=torch.float64)
    trainer = SimpleNamespace(multi_objective_aggregation=combine, reward_weights=coefficients,
                              scale_rewards=scale, reward_funcs=[None, None])
    expected = run_part(
        ADVANTAGES, self=trainer, rewards_per_func=rewards.flatten(1).T, device="cpu",
        num_generations=5, unscorable_mask=torch.zeros(30, dtype=torch.bool))
    found = losses.group_advantages(rewards[0] + 0.3 * rewards[1], scale)
    if combine == "normalize_then_sum":
        found = losses.combined_advantages({"a": rewards[0], "b": rewards[1]}, {"a": 1.0, "b": 0.3},
                                           scale)
    return (found.flatten() - expected["advantages"]).abs().max().item()


def main():
    gaps = []
    for loss, level, (beta, kl), *rest in itertools.product(
            ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"), ("token", "sequence"),
            ((0.0, "k3"), (0.3, "k3"), (0.3, "k3_corrected")), (None, 1.5),
            (None, "token", "sequence"), (0.0, 0.07)):
        if (level, kl) != ("sequence", "k3_corrected"):  # TRL uses the sequence ratio here
            gaps.append(loss_gap(loss, level, beta, kl, *rest))
    print(f"{len(gaps)} configurations of the loss differ by at most {max(gaps):.1e}")
    gaps = [advantage_gap(scale, "sum_then_normalize") for scale in ("group", "batch", "none")]
    gaps.append(advantage_gap("group", "normalize_then_sum"))
    print(f"{len(gaps)} of the advantages differ by {max(gaps):.1e} (TRL rounds n / (n - 1))")


if __name__ == "__main__":
    main()
