"""Reinforcement learning with verifiable rewards: Group Relative Policy Optimization, in one file.

    python grpo.py                                            # the embedded tiny model on arithmetic, a laptop, minutes
    python grpo.py --model qwen2.5-1.5b --lora-rank 32        # GSM8K, one 24 GB GPU
    torchrun --nproc-per-node 8 grpo.py --model qwen2.5-7b    # one node, or several
    python grpo.py --model DIR --data mine.jsonl=2 gsm8k=1    # a mixture of problem sets, with weights
    python grpo.py --run-dir runs/grpo --resume               # goes on after Ctrl-C or a crash, as if nothing had been

A step: (1) ask N problems, sample G completions of each; (2) grade them; (3) a completion's advantage is how much
better it did than its group; (4) one or more AdamW updates of the clipped policy-gradient loss. There is no critic, and
no reference model unless --beta asks for it.

GRPO arXiv:2402.03300; DeepSeek-R1 arXiv:2501.12948; DAPO arXiv:2503.14476; Dr. GRPO arXiv:2503.20783; GSPO
arXiv:2507.18071; CISPO arXiv:2506.13585.
"""

import argparse
import functools
import itertools
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.utils.rnn import pad_sequence

from data import load_problems
from eval import PRESETS, completion_text, end_tokens, evaluate, markdown, percent, render_prompt, scores_of, summarize
from generate import Batch, generate, sampling_params
from model import (LINEARS, Config, head_logprobs, head_slice, init_lora, init_params, load_config, load_params,
                   load_system_prompt, load_tokenizer, packed_hidden_states, padded_length, param_shapes, resolve_model)
from optim import (add_train_flags, all_sum, check_train_flags, compute_dtype, draw_curves, gather_objects,
                   init_distributed, init_optimizer, learning_rate, load_checkpoint, log_samples, log_step,
                   optimizer_step, parse_train_args, peak_memory_gib, rank_and_world, resume_command, save_checkpoint,
                   start_run, stop_signals)
from verify import format_reward, verify_many

# What a flag left out means: for the tiny model, and for any other.
TINY = {"data": ["arithmetic"], "eval_data": "arithmetic", "prompt": "plain", "max_new_tokens": 128, "steps": 80,
        "lr": 5e-4, "prompts": 32, "micro_tokens": 2048, "checkpointing": False}
OTHERS = {"data": ["gsm8k"], "eval_data": "gsm8k", "prompt": "boxed", "max_new_tokens": 1024, "steps": 150, "lr": 1e-6,
          "prompts": 32, "micro_tokens": 16384, "checkpointing": True}
LORA_LR = 3e-5  # adapters stand larger steps than full weights
# A problem is asked by itself, and only the box earns the reward.
PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots and preset.grade == "strict"]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                conflict_handler="resolve")  # of the shared flags, --lr is defined anew
    p.add_argument("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    p.add_argument("--data", nargs="+", help="problem sets or .jsonl files to train on, each NAME or NAME=WEIGHT; "
                   "default: arithmetic for a tiny model, else gsm8k")
    p.add_argument("--eval-data", help="held-out problems; default: like --data")
    p.add_argument("--eval-limit", type=int, default=200,
                   help="of their dev split, asked every --eval-every steps (default %(default)s)")
    p.add_argument("--test-limit", type=int, default=500,
                   help="of their test split, asked before and after training (default %(default)s; 0: never)")
    p.add_argument("--eval-every", type=int, default=25,
                   help="steps between evaluations; the best one's checkpoint is kept (default %(default)s)")
    p.add_argument("--prompt", choices=PROMPTS, help="how a problem is put (default: tiny plain, else boxed)")
    p.add_argument("--think-tag", default="think", choices=("think", "thought"))
    rollout = p.add_argument_group("rollouts")
    rollout.add_argument("--prompts", type=int, help="N: problems in a step (default 32)")
    rollout.add_argument("--group", type=int, default=8, help="G: completions of each (default %(default)s)")
    rollout.add_argument("--max-new-tokens", type=int, help="longest completion (default: tiny 128, else 1024)")
    rollout.add_argument("--temperature", type=float, default=1.0,
                         help="of sampling, and of every log-probability (default %(default)s)")
    rollout.add_argument("--max-batch", type=int, default=128, help="rows that decode at once (default %(default)s)")
    rollout.add_argument("--sampler-dtype", choices=("float32", "bfloat16"),
                         help="precision that samples; default: that of the weights")
    rollout.add_argument("--refill", type=int, default=2,
                         help="times that groups without spread are replaced by new problems (default %(default)s)")
    rollout.add_argument("--curriculum", action="store_true", help="in each epoch, easier problems first (by level)")
    rewards = p.add_argument_group("rewards")
    rewards.add_argument("--reward", nargs="+", default=["accuracy=1", "format=0.1"], metavar="NAME=WEIGHT",
                         help=f"of {', '.join(REWARDS)} (default accuracy=1 format=0.1)")
    loss = p.add_argument_group("loss")
    loss.add_argument("--loss", default="dapo", choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo"))
    loss.add_argument("--level", default="token", choices=("token", "sequence"),
                      help="of the ratio; sequence: GSPO (with --loss grpo --clip-low 3e-4 --clip-high 4e-4)")
    loss.add_argument("--scale", default="group", choices=("group", "batch", "none"),
                      help="whose standard deviation divides the advantages")
    loss.add_argument("--clip-low", type=float, default=0.2)
    loss.add_argument("--clip-high", type=float, default=0.28, help="clip-higher of DAPO (default %(default)s)")
    loss.add_argument("--clip-hard", type=float,
                      help="bound of the ratio where the advantage is negative, too (INTELLECT-2: 4); default: none")
    loss.add_argument("--beta", type=float, default=0.0,
                      help="weight of the KL divergence from the start (default %(default)s: no reference is held)")
    loss.add_argument("--kl", default="k3_corrected", choices=("k1", "k2", "k3", "k3_corrected"))
    loss.add_argument("--entropy-bonus", type=float, default=0.0)
    loss.add_argument("--updates", type=int, default=1,
                      help="mu: optimizer steps on each batch of rollouts (default %(default)s)")
    loss.add_argument("--sampler-cap", type=float, default=2.0,
                      help="truncation of the importance weight that corrects for a sampler of other precision")
    loss.add_argument("--mask-truncated", action="store_true",
                      help="leave completions that reached --max-new-tokens out of the loss")
    train = p.add_argument_group("size and length")
    train.add_argument("--steps", type=int, help="batches of rollouts (default: tiny 80, else 150)")
    train.add_argument("--epochs", type=float,
                       help="instead of --steps: passes over the training problems, those that --refill asks aside")
    train.add_argument("--train-limit", type=int, help="training problems, a random subset of each set; default: all")
    train.add_argument("--lora-rank", type=int, default=0,
                       help="train an adapter of this rank on every linear layer; 0: all weights")
    train.add_argument("--micro-tokens", type=int,
                       help="tokens in one packed row of training (default: tiny 2048, else 16384)")
    train.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                       help="recompute activations in the backward pass: a third more time, and far less memory "
                       "(default: not for tiny, else yes)")
    ask = p.add_argument_group("instead of training")
    ask.add_argument("--plan", nargs="?", const="here", metavar="GPUS:GIB",
                     help="print the memory that the run would need, on this machine or on so many GPUs of so many "
                     "GiB, such as 1:24 or 8:80")
    ask.add_argument("--benchmark", choices=("fixed", "mixed"), help="time steps on random weights and words")
    ask.add_argument("--size", choices=BENCHMARK_SIZES, default="tiny", help="of the random weights (default tiny)")
    add_train_flags(p, lr=None, run_dir="runs/grpo")
    p.add_argument("--lr", type=float, help="peak learning rate (default: tiny 5e-4, else 1e-6, with LoRA 3e-5)")
    args = parse_train_args(p, argv)
    for name, value in (TINY if args.model == "tiny" else OTHERS).items():
        if getattr(args, name) is None and not (name == "steps" and args.epochs):
            value = LORA_LR if name == "lr" and args.lora_rank else value
            setattr(args, name, split_weight(args.data[0])[0] if name == "eval_data" else value)
    return args


def check_args(args):
    """Raises ValueError for the first flag that is out of range."""
    for flag, fine, expected in (
            ("prompts", args.prompts >= 1, "at least 1"),
            ("group", args.group >= 2, "at least 2: a group of one has no baseline"),
            ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
            ("temperature", args.temperature > 0, "more than 0: greedy samples are all the same"),
            ("max_batch", args.max_batch >= 1, "at least 1"), ("refill", args.refill >= 0, "0 or more"),
            ("clip_low", 0 <= args.clip_low < 1, "from 0 to below 1"), ("clip_high", args.clip_high >= 0, "0 or more"),
            ("clip_hard", args.clip_hard is None or args.clip_hard > 1 + args.clip_high,
             f"more than 1 + --clip-high {args.clip_high}"),
            ("beta", args.beta >= 0, "0 or more"), ("updates", args.updates >= 1, "at least 1"),
            ("sampler_cap", args.sampler_cap >= 1, "at least 1"),
            ("epochs", args.epochs is None or args.epochs > 0, "more than 0"),
            ("steps", args.epochs is None or args.steps is None, "nothing beside --epochs, which gives their number"),
            ("steps", args.steps is None or args.steps >= 1, "at least 1"),
            ("lora_rank", args.lora_rank >= 0, "0 or more"),
            ("micro_tokens", args.micro_tokens >= 1, "at least 1"), ("eval_every", args.eval_every >= 1, "at least 1"),
            ("eval_limit", args.eval_limit >= 1, "at least 1"), ("test_limit", args.test_limit >= 0, "0 or more")):
        if not fine:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}, expected {expected}")
    check_train_flags(args)


# ------------------------------------------------------------------------------------ rewards


class Group(NamedTuple):
    """The completions of one problem, as the reward functions see them."""
    problem: dict
    prompt: str
    texts: list[str]  # without end tokens; what the prompt already opened of the thinking block is not in them
    completions: list  # of generate.Completion: tokens, logprobs, finish
    right: list[bool | None]  # None: undecided
    max_new_tokens: int
    think_tag: str


def accuracy(group):
    return [float(right is True) for right in group.right]


def format(group):
    """A well-formed thinking block at most, one boxed answer, nothing after it."""
    return [format_reward(text, group.think_tag) for text in group.texts]


def brevity(group):
    """0 for the shortest right completion, down to -1 for one of three times its length; wrong ones are left alone.

    Relative to the group, so that easy problems get short thoughts and hard ones may stay long.
    """
    lengths = [len(c.tokens) for c in group.completions]
    shortest = min((n for n, right in zip(lengths, group.right) if right), default=0)
    return [-min(1.0, (n - shortest) / (2 * shortest)) if right else 0.0 for n, right in zip(lengths, group.right)]


def repetition(group, n=4, free=0.2):
    """Down to -1 with the share of token n-grams that were there before, above `free`. Tokens serve in any language."""
    def share(tokens):
        grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return [-max(0.0, share(c.tokens) - free) / (1 - free) for c in group.completions]


def language(group):
    """Down to -1 with the share of letters from outside the problem's scripts, and Latin, which formulas need."""
    def script(letter):
        return "latin" if ord(letter) < 0x250 else ord(letter) >> 8 if ord(letter) < 0x2E80 else "east asian"

    home = {"latin"} | {script(c) for c in group.problem["problem"] if c.isalpha()}
    letters = [[c for c in text if c.isalpha()] for text in group.texts]
    return [-sum(script(c) not in home for c in row) / max(1, len(row)) for row in letters]


def overlong(group, share=0.2):
    """0 up to the last `share` of the token budget, then down in a line to -1 at its end (DAPO, eq. 13)."""
    start = (1 - share) * group.max_new_tokens
    return [-max(0.0, (len(c.tokens) - start) / (group.max_new_tokens - start)) for c in group.completions]


# A reward takes a Group and returns a float for each completion: yours is one more function, and one more name here.
# The penalties lie in [-1, 0]. So long as their weights and that of `format` sum to less than that of `accuracy`, the
# worst right answer scores above the best wrong one; parse_rewards insists on it.
REWARDS = {fn.__name__: fn for fn in (accuracy, format, brevity, repetition, language, overlong)}


def parse_rewards(words):
    """["accuracy=1", "format=0.1"] -> {name: weight}.

    Raises ValueError for unknown names, and for weights that could reward a wrong answer more than a right one.
    """
    weights = {}
    for word in words:
        name, weight = split_weight(word)
        if name not in REWARDS:
            raise ValueError(f"--reward {word!r}: expected NAME=WEIGHT, a weight of at least 0 and a name of "
                             f"{', '.join(REWARDS)}")
        weights[name] = weight
    others = sum(weight for name, weight in weights.items() if name != "accuracy")
    if "accuracy" in weights and others >= weights["accuracy"]:
        raise ValueError(f"--reward: the other weights sum to {others:g}, accuracy has {weights['accuracy']:g}; "
                         "it has to have more, or a wrong answer may score above a right one")
    return weights


# ------------------------------------------------------------------------------------ advantages and loss


def group_advantages(rewards, scale="group"):
    """How much better each completion did than its group.

    rewards: [N, G] float. Returns [N, G] float: rows sum to zero; equal rewards give zeros.
    scale: what the difference is divided by: the standard deviation (n - 1) of the "group" or of the whole "batch",
    plus 1e-4, or "none". Raises ValueError when G < 2, since a group of one has no baseline.
    GRPO, arXiv:2402.03300, section 4.1.2; "none" is Dr. GRPO, arXiv:2503.20783; "batch" is REINFORCE++-baseline,
    arXiv:2501.03262.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {list(rewards.shape)}, expected [N, G] with G of at least 2")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}, expected group, batch or none")
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return advantages
    return advantages / ((rewards.std(1, keepdim=True) if scale == "group" else rewards.std()) + 1e-4)


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, loss="dapo", level="token", clip_low=0.2,
                clip_high=0.28, clip_hard=None, beta=0.0, kl="k3", max_completion_tokens=None, total=None, weights=None,
                bonus=None):
    """The loss whose gradient improves the policy, and what to log of it.

    logprobs, old_logprobs, ref_logprobs: [B, T] float, under the policy, the policy that sampled, the reference (None
    when beta is 0). advantages: [B]. mask: [B, T], 1 for the tokens that count. bonus: [B, T], added to each token's
    objective (entropy), or None. weights: [B, T], factors of each token's term, or None.
    loss: how the tokens' terms become the loss, "grpo" | "bnpo" | "dr_grpo" | "dapo" | "cispo".
    level: "token", or "sequence" for the ratio of GSPO.   kl: "k1" | "k2" | "k3" | "k3_corrected".
    total: what the sum is divided by, over the whole optimizer step; None: this call's own. "grpo": rows; "bnpo",
    "dapo", "cispo": tokens; "dr_grpo": rows times max_completion_tokens.
    Returns (loss, stats): a scalar, and sums over the tokens of this call {name: scalar}, "tokens" among them.
    """
    mask = mask.to(logprobs.dtype)
    lengths = mask.sum(1).clamp(min=1)  # [B]
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20) * mask  # a padded or absurd value must not become inf * 0
    token_ratio = log_ratio.exp()  # [B, T]
    if level == "sequence":  # GSPO, arXiv:2507.18071, eq. 7: the geometric mean over the sequence
        ratio = (log_ratio.sum(1) / lengths).exp()[:, None].expand_as(token_ratio)
    elif level == "token":
        ratio = token_ratio
    else:
        raise ValueError(f"level is {level!r}, expected token or sequence")
    A = advantages[:, None]  # [B, 1]
    if loss == "cispo":  # arXiv:2506.13585, eq. 4: the weight is clipped, from above only; the token keeps its gradient
        objective = ratio.detach().clamp(max=1 + clip_high) * A * logprobs
    else:  # PPO, arXiv:1707.06347, eq. 7; clip_high > clip_low: DAPO, eq. 10; clip_hard: INTELLECT-2, arXiv:2505.07291
        bounded = ratio if clip_hard is None else ratio.clamp(max=clip_hard)
        objective = torch.minimum(bounded * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    per_token = -objective
    divergence = torch.zeros_like(per_token)
    if beta:
        gap = (ref_logprobs - logprobs).clamp(-20, 20) * mask  # log of reference over policy
        divergence = {  # Schulman 2020, http://joschu.net/blog/kl-approx.html
            "k1": lambda: -gap,
            "k2": lambda: gap.square() / 2,
            "k3": lambda: gap.exp() - gap - 1,  # GRPO, eq. 4
            # DeepSeek-V3.2, arXiv:2512.02556: unbiased off policy, and in its gradient
            "k3_corrected": lambda: token_ratio * (gap.exp() - gap - 1),
        }[kl]()
        per_token = per_token + beta * divergence
    if bonus is not None:
        per_token = per_token - bonus
    if weights is not None:
        per_token = per_token * weights
    per_token = per_token * mask
    if loss == "grpo":  # arXiv:2402.03300, eq. 3: the mean over a completion's tokens, then over completions
        value = (per_token.sum(1) / lengths).sum() / (total or len(mask))
    elif loss == "dr_grpo":  # arXiv:2503.20783: a constant instead of the length
        if max_completion_tokens is None:
            raise ValueError("dr_grpo divides by max_completion_tokens, which is None")
        value = per_token.sum() / (total or len(mask) * max_completion_tokens)
    elif loss in ("bnpo", "dapo", "cispo"):  # the mean over all tokens: of the batch, of the whole step (DAPO, eq. 8)
        value = per_token.sum() / (total or mask.sum().clamp(min=1))
    else:
        raise ValueError(f"loss is {loss!r}, expected grpo, bnpo, dr_grpo, dapo or cispo")
    with torch.no_grad():
        low, high = (ratio < 1 - clip_low) & (A < 0), (ratio > 1 + clip_high) & (A > 0)
        if loss == "cispo":  # whatever the advantage
            low, high = torch.zeros_like(low), ratio > 1 + clip_high
        sums = {"ratio": ratio, "clipped_low": low, "clipped_high": high, "kl": divergence}
        stats = {"tokens": mask.sum()} | {name: (value * mask).sum() for name, value in sums.items()}
    return value, stats


def loss_total(loss, lengths, max_completion_tokens):
    """`total` of policy_loss for an optimizer step over completions of these lengths."""
    return {"grpo": len(lengths), "dr_grpo": len(lengths) * max_completion_tokens}.get(loss, sum(lengths)) or 1


# ------------------------------------------------------------------------------------ rollouts


class Rollout(NamedTuple):
    """A problem with its completions, graded."""
    problem: dict
    prompt_tokens: list[int]
    completions: list
    texts: list[str]
    parts: dict[str, list[float]]  # each reward by name, unweighted
    rewards: list[float]
    right: list[bool | None]


def problem_order(sets, weights, seed, curriculum=False):
    """Endless (place, problem): a set is drawn by its weight; each is gone through in permutations by (seed, epoch)."""
    taken, orders = [0] * len(sets), [None] * len(sets)
    for place in itertools.count():
        i = random.Random(f"{seed} {place}").choices(range(len(sets)), weights)[0]
        epoch, index = divmod(taken[i], len(sets[i]))
        if index == 0:
            rng = random.Random(f"{seed} {i} {epoch}")
            orders[i] = rng.sample(range(len(sets[i])), len(sets[i]))
            if curriculum:  # by level, blurred by one
                orders[i].sort(key=lambda j: sets[i][j].get("level", 3) + rng.random())
        taken[i] += 1
        yield place, sets[i][orders[i][index]]


def reward_group(group, weights):
    """({name: [G] unweighted}, [G] weighted sums)."""
    parts = {name: REWARDS[name](group) for name in weights}
    return parts, [sum(weights[name] * parts[name][i] for name in weights) for i in range(len(group.texts))]


def roll_out(params, config, tokenizer, problems, step, args, system, weights):
    """A Rollout for each (place, problem). A completion's noise derives from (seed, step, place, sample) alone."""
    places, problems = zip(*problems) if problems else ((), ())
    prompts = [render_prompt(args.prompt, p, system=system, think_tag=args.think_tag) for p in problems]
    prompt_tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
    ends = end_tokens(tokenizer, config)
    answers = generate(params, config, prompt_tokens, num_samples=args.group, max_new_tokens=args.max_new_tokens,
                       temperature=args.temperature, stop_tokens=ends, seed=zlib.crc32(f"{args.seed} {step}".encode()),
                       seeds=places, max_batch=args.max_batch)
    said = [[completion_text(tokenizer, c, ends) for c in row] for row in answers]
    pairs = [(text, problem["answer"]) for problem, texts in zip(problems, said) for text in texts]
    verdicts, rollouts = iter(verify_many(pairs, strict=True)), []  # None: not decided in time, and no reward
    for problem, prompt, ids, completions, texts in zip(problems, prompts, prompt_tokens, answers, said):
        right = [next(verdicts) for _ in texts]
        group = Group(problem, prompt, texts, completions, right, args.max_new_tokens, args.think_tag)
        parts, rewards = reward_group(group, weights)
        rollouts.append(Rollout(problem, ids, completions, texts, parts, rewards, right))
    return rollouts


def gather_rollouts(params, config, tokenizer, problems, step, args, system, weights):
    """This process's share of a step: (rollouts to learn from, all rollouts, problems taken by all processes).

    A group whose rewards are equal has no gradient. Up to --refill times, as many new problems as there were such
    groups are asked (dynamic sampling, DAPO, section 3.2). The problems are the same for any number of processes, and
    divided among them.
    """
    rank, world = rank_and_world()
    kept, seen, missing, taken = [], [], args.prompts, 0
    sampler = sampling_params(params, config, args.sampler_dtype and getattr(torch, args.sampler_dtype))
    for _ in range(1 + args.refill):
        batch = list(itertools.islice(problems, missing))
        taken += missing
        new = roll_out(sampler, config, tokenizer, batch[rank::world], step, args, system, weights)
        seen += new
        kept += [r for r in new if max(r.rewards) - min(r.rewards) > 1e-6]
        missing = args.prompts - round(all_sum([len(kept)])[0])
        if not missing:
            break
    return kept, seen, taken


# ------------------------------------------------------------------------------------ learning


class Sequence(NamedTuple):
    """One completion as the loss needs it."""
    tokens: list[int]
    logprobs: list[float]  # the sampler's
    advantage: float
    counts: bool  # False: left out of the loss (--mask-truncated)


def sequences_of(rollout, advantages, mask_truncated):
    return [Sequence(c.tokens, c.logprobs, advantage, c.finish == "stop" or not mask_truncated)
            for c, advantage in zip(rollout.completions, advantages)]


def pack_groups(groups, micro_tokens):
    """[(prompt tokens, [Sequence, ...]), ...] -> rows of groups, of at most `micro_tokens` tokens where that can be.

    A group that is longer by itself is divided; each part then pays for the prompt, and the gradient is the same.
    """
    pieces = []
    for prompt, sequences in groups:
        piece, size = [], math.inf
        for sequence in sequences:
            if size + len(sequence.tokens) > micro_tokens:
                piece, size = [], len(prompt)
                pieces.append((prompt, piece))
            piece.append(sequence)
            size += len(sequence.tokens)
    rows, size = [], math.inf
    for prompt, piece in pieces:
        length = len(prompt) + sum(len(s.tokens) for s in piece)
        if size + length > micro_tokens:
            rows.append([])
            size = 0
        rows[-1].append((prompt, piece))
        size += length
    return rows


def training_rows(kept, args):
    """(the packed rows of this process, `total` of policy_loss over all of them); 0 when there is nothing to learn."""
    rewards = gather_objects([r.rewards for r in kept])
    if not any(rewards):
        return [], 0
    advantages = group_advantages(torch.tensor([r for share in rewards for r in share]), args.scale)  # [N, G]
    mine = advantages[sum(map(len, rewards[:rank_and_world()[0]])):]
    groups = [(r.prompt_tokens, sequences_of(r, row.tolist(), args.mask_truncated)) for r, row in zip(kept, mine)]
    lengths = [len(s.tokens) for _, sequences in groups for s in sequences if s.counts]
    lengths = [n for share in gather_objects(lengths) for n in share]
    if not lengths:  # all of them masked
        return [], 0
    return pack_groups(groups, args.micro_tokens), loss_total(args.loss, lengths, args.max_new_tokens)


def row_logprobs(params, config, row, temperature, checkpointing=False, entropy_grad=False):
    """Of the completions of a packed row, each prompt computed once: (logprobs [B, T], entropy [B, T], mask [B, T])."""
    device = params["model.embed_tokens.weight"].device
    lengths = [(len(prompt), [len(s.tokens) for s in piece]) for prompt, piece in row]
    tokens = [t for prompt, piece in row for t in itertools.chain(prompt, *(s.tokens for s in piece))]
    tokens = torch.tensor(tokens, device=device)  # [T]
    hidden = packed_hidden_states(params, config, tokens, lengths, checkpointing)  # [T, D]
    reads, targets, end = [], [], 0  # a token is read off the one before it, a completion's first off the prompt's last
    for prompt, pieces in lengths:
        begin, end = end + prompt, end + prompt
        for n in pieces:
            reads += [begin - 1, *range(end, end + n - 1)]
            targets += range(end, end + n)
            end += n
    sizes = [n for _, pieces in lengths for n in pieces]
    flat = head_logprobs(params, config, hidden[reads], tokens[targets], temperature, entropy_grad=entropy_grad)
    logprobs, entropy = (pad_sequence(x.split(sizes), batch_first=True) for x in flat)  # [B, T]
    counts = torch.tensor([s.counts for _, piece in row for s in piece], device=device)
    mask = torch.arange(logprobs.shape[1], device=device) < torch.tensor(sizes, device=device)[:, None]
    return logprobs, entropy, mask & counts[:, None]


def update(params, ref_params, config, optimizer, rows, total, lr, args):
    """--updates optimizer steps on this process's rows: (sums of statistics, last gradient norm, updates skipped)."""
    device = params["model.embed_tokens.weight"].device
    score = lambda p, row, **kw: row_logprobs(p, config, row, args.temperature, args.checkpointing, **kw)
    start = time.perf_counter()
    with torch.no_grad():
        ref = [score(ref_params, row)[0] for row in rows] if args.beta else [None] * len(rows)
        # with one update the policy that sampled is the one that learns: no rounding can be clipped
        old = [score(params, row)[0] for row in rows] if args.updates > 1 else [None] * len(rows)
    sums, norms, skipped = Counter(score_s=time.perf_counter() - start), [], 0
    for _ in range(args.updates):
        for row, old_logprobs, ref_logprobs in zip(rows, old, ref):
            sequences = [s for _, piece in row for s in piece]
            logprobs, entropy, mask = score(params, row, entropy_grad=args.entropy_bonus != 0)
            if old_logprobs is None:
                old_logprobs = logprobs.detach()
            sampled = pad_sequence([torch.tensor(s.logprobs, device=device) for s in sequences], batch_first=True)
            mismatch = (old_logprobs - sampled) * mask  # [B, T]
            advantages = torch.tensor([s.advantage for s in sequences], device=device)  # [B]
            loss, stats = policy_loss(
                logprobs, old_logprobs, ref_logprobs, advantages, mask, loss=args.loss, level=args.level,
                clip_low=args.clip_low, clip_high=args.clip_high, clip_hard=args.clip_hard, beta=args.beta, kl=args.kl,
                max_completion_tokens=args.max_new_tokens, total=total,
                bonus=args.entropy_bonus * entropy if args.entropy_bonus else None,
                weights=mismatch.exp().clamp(max=args.sampler_cap))  # truncated importance sampling; 1 on policy
            loss.backward()
            stats["loss"], stats["mismatch"] = loss.detach(), mismatch.abs().sum()
            stats["entropy"] = (entropy.detach() * mask).sum()
            sums.update({name: value.item() for name, value in stats.items()})
            sums["mismatch_max"] = max(sums["mismatch_max"], mismatch.abs().max().item())
        stats = optimizer_step(optimizer, lr, betas=args.betas, weight_decay=args.weight_decay, clip=args.clip)
        norms.append(stats["grad_norm"])
        skipped += stats["skipped"]
    return sums, norms[-1], skipped


# ------------------------------------------------------------------------------------ watching

CURVES = ("accuracy", "dev_accuracy", "length", "length_wrong", "entropy", "no_spread", "second_thoughts", "grad_norm")
SECOND_THOUGHTS = re.compile(r"\b(wait|hold on|let me (?:re)?check|let me verify|actually|mistake)\b", re.IGNORECASE)


def measure(params, config, tokenizer, problems, args, system, prompt=None):
    """Greedy answers to held-out problems, divided among the processes: the records, on each of them."""
    rank, world = rank_and_world()
    weights = {name: tensor.detach() for name, tensor in params.items()}
    mine = evaluate(weights, config, tokenizer, problems[rank::world], prompt=prompt or args.prompt, system=system,
                    think_tag=args.think_tag, max_new_tokens=args.max_new_tokens, max_batch=args.max_batch,
                    progress=False)
    shares = gather_objects(mine)
    return [shares[i % world][i // world] for i in range(len(problems))]


def rollout_metrics(kept, seen, args):
    """What a step's completions were like, over all processes."""
    rows = [(r, i, c) for r in seen for i, c in enumerate(r.completions)]
    names = list(parse_rewards(args.reward))
    sums = Counter({"n": len(rows), "groups": len(seen), "kept": len(kept)})
    for r, i, c in rows:
        sums.update({"reward": r.rewards[i], "accuracy": r.right[i] is True, "length": len(c.tokens),
                     "length_right": len(c.tokens) * (r.right[i] is True), "undecided": r.right[i] is None,
                     "truncated": c.finish != "stop", "second_thoughts": bool(SECOND_THOUGHTS.search(r.texts[i]))})
        sums.update({f"reward_{name}": r.parts[name][i] for name in names})
    means = ["reward", "accuracy", "length", "truncated", "undecided", "second_thoughts"]
    means += [f"reward_{name}" for name in names]
    keys = ["n", "groups", "kept", "length_right"] + means
    s = dict(zip(keys, all_sum([float(sums[k]) for k in keys])))
    return {k: s[k] / max(1, s["n"]) for k in means} | {
        "length_right": s["length_right"] / max(1, s["accuracy"]),
        "length_wrong": (s["length"] - s["length_right"]) / max(1, s["n"] - s["accuracy"]),
        "no_spread": 1 - s["kept"] / max(1, s["groups"]), "completions": s["n"]}


def best_and_worst(rollouts):
    """The best and the worst completion of each, whole, for samples.jsonl."""
    samples = []
    for r in rollouts:
        order = sorted(range(len(r.texts)), key=r.rewards.__getitem__)
        samples += [{"problem": r.problem["problem"], "answer": r.problem["answer"], "text": r.texts[i],
                     "reward": r.rewards[i], "parts": {name: values[i] for name, values in r.parts.items()},
                     "finish": r.completions[i].finish} for i in (order[-1], order[0])]
    return samples


def write_results(run, rows):
    """results.md: one row per measurement on the test split."""
    text = markdown(["", "problems", "accuracy %, 95 % interval", "tokens per answer", "truncated %"],
                    [[r["method"], str(r["n"]), percent(r["accuracy"], r["low"], r["high"]), f"{r['tokens_mean']:.0f}",
                      percent(r["truncated"])] for r in rows])
    (run.dir / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


# ------------------------------------------------------------------------------------ planning and timing

ALLOWANCE_GIB = {"cpu": 0.5, "cuda": 1.0}  # Python and its libraries; CUDA's context, work spaces and fragmentation


def plan_memory(config, args, world=1, device="cpu", prompt=200):
    """What a run needs at most on each device, part by part, in GiB, before it starts.

    Returns {"throughout": {part: GiB}, "update": ..., "rollouts": ..., "host": ...}. The update and the rollouts take
    turns: the peak is what is held throughout and the larger of the two. "host": of each process, beside its GPU.
    Completions are taken to be as long as --max-new-tokens, and rows to be full. prompt: tokens of a problem, chat
    template included; GSM8K's take about 200.
    """
    V, D, I, L = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    Q, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    on_gpu, dtype, rank = device == "cuda", compute_dtype(args.dtype, device), args.lora_rank
    size, wide = dtype.itemsize, dtype == torch.float32
    shapes = param_shapes(config)
    num_weights = sum(map(math.prod, shapes.values()))
    linears = [shape for name, shape in shapes.items() if name.removesuffix(".weight").endswith(LINEARS)]
    trained = sum(rank * sum(shape) for shape in linears) if rank else num_weights
    state = 4 * trained / world  # of each of the master and Adam's two moments
    offloaded = args.offload and on_gpu
    throughout = {
        f"weights, {str(dtype).removeprefix('torch.')}": size * num_weights,
        "adapter": 4 * trained if rank else 0,
        "float32 masters": 0 if offloaded or wide or rank else state,  # what is float32 is its own master
        "gradients": 4 * trained,
        "Adam's moments": 0 if offloaded else 2 * state,
        "reference": size * num_weights if args.beta and not rank else 0}
    host = {"masters and moments": 3 * state if offloaded else 0,
            "weights in float32, while they are loaded": 4 * num_weights if on_gpu and not rank else 0}

    groups = -(-args.prompts // world)
    completions = args.group * args.max_new_tokens
    tokens = padded_length(min(max(args.micro_tokens, prompt + args.max_new_tokens), groups * (prompt + completions)))
    seen = prompt + args.max_new_tokens  # keys in front of a completion's last token
    keys = seen / args.max_new_tokens  # copied for each token of a completion
    # bytes of a token that autograd keeps of a layer, in the order of model.block
    norms = 2 * size * D
    inputs = size * (2 * D + Q + I)
    if rank:  # an adapter works on a float32 copy of its own
        inputs = (inputs if wide else 4 * (5 * D + Q + I)) + 28 * rank
    attention = size * (Q + 2 * KV)
    if on_gpu or seen > 1024:  # a fused kernel keeps its arguments and its result
        attention += size * (2 * Q + 2 * keys * (Q if on_gpu else KV))
    else:
        attention += size * (Q + 2 * keys * KV + config.num_attention_heads * seen)
    layer = norms + inputs + attention + 3 * size * I
    head = min(tokens, head_slice(V, device))
    update = {
        "layer inputs" if args.checkpointing else "activations":
            tokens * L * (size * D if args.checkpointing else layer),
        "gradient of the embedding": 0 if rank or not config.tie_word_embeddings else size * V * D,
        "the head, or one layer, backward": max(
            (8 + size) * V * head + (0 if rank else (4 + size) * V * D),
            tokens * (2 * size * I + (layer if args.checkpointing else 0)))}

    batch, rows = Batch([], [], None, {}, on_cpu=not on_gpu), min(args.max_batch, groups * args.group)
    held = batch.count(rows) * batch.reach(args.max_new_tokens)
    held += batch.count(-(-rows // args.group)) * batch.reach(prompt)
    rollouts = {
        "the sampler's weights": size * (num_weights + (V * D if config.tie_word_embeddings else 0)),
        "merging an adapter": (8 + size) * max(map(math.prod, linears)) if rank else 0,
        f"key/value cache of {rows} rows": 2 * size * L * KV * held, "logits of a step": rows * V * (12 + size)}
    parts = {"throughout": throughout, "update": update, "rollouts": rollouts, "host": host}
    parts = {when: {name: n / 2**30 for name, n in of.items() if n} for when, of in parts.items()}
    parts["throughout"]["Python and libraries" if not on_gpu else "CUDA and fragmentation"] = ALLOWANCE_GIB[device]
    return parts


def plan_peaks(plan):
    """(GiB at the update's peak, GiB at the rollouts' peak) of plan_memory's parts."""
    throughout = sum(plan["throughout"].values())
    return throughout + sum(plan["update"].values()), throughout + sum(plan["rollouts"].values())


def memory_there(device, processes=1):
    """GiB of a GPU, or of this machine for each of its processes; `processes`: how many there will be."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / processes


def plan_line(plan, there, world=1):
    """One line on what a plan comes to, with a warning when it exceeds the GiB that are there."""
    update, rollouts = plan_peaks(plan)
    line = f"memory, about: {update:.1f} GiB in the update, {rollouts:.1f} in the rollouts, of {there:.1f} GiB"
    line += f" for each of {world} processes" if world > 1 else ""
    if max(update, rollouts) <= there:
        return line
    ways = ["--checkpointing", "a smaller --micro-tokens"] * (update > there)
    ways += ["a smaller --max-batch"] * (rollouts > there) + ["--offload", "--lora-rank 32", "more GPUs"]
    return line + f"\nwarning: that is more than there is; what helps: {', '.join(ways)} (--plan lists the parts)"


def print_plan(args):
    """--plan: the parts of plan_memory on this machine, or on the one that the flag describes as GPUS:GIB."""
    if args.plan == "here":
        device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        world, there = int(os.environ.get("WORLD_SIZE", args.processes)), memory_there(device, args.processes)
    else:
        if not re.fullmatch(r"[1-9]\d*:\d+(\.\d+)?", args.plan):
            raise ValueError(f"--plan {args.plan}: expected GPUS:GIB, such as 1:24 or 8:80")
        device, world, there = "cuda", int(args.plan.split(":")[0]), float(args.plan.split(":")[1])
    plan = plan_memory(load_config(resolve_model(args.model)), args, world, device)
    for when, parts in plan.items():
        if parts:
            print({"throughout": "throughout", "update": "in the update, also", "rollouts": "in the rollouts, also",
                   "host": "in the host memory of each process"}[when] + f": {sum(parts.values()):.2f} GiB")
        for name, gib in parts.items():
            print(f"    {gib:9.2f}  {name}")
    print(plan_line(plan, there, world))


# vocabulary, hidden, layers, heads, key/value heads, width of the MLP; embeddings tied
BENCHMARK_SIZES = {"tiny": (1024, 256, 4, 4, 2, 704), "30m": (4096, 512, 8, 8, 2, 1792)}


def odd(group):
    """The share of odd ids: a reward that costs nothing, and is never the same for all of a group."""
    return [sum(token % 2 for token in c.tokens) / len(c.tokens) for c in group.completions]


def matrix_rate(config, dtype, device, tokens, seconds=2.0):
    """FLOP per processor second of the products of one layer, forward and backward, over rows of so many tokens."""
    of_layer = [shape for name, shape in param_shapes(config).items() if name.startswith("model.layers.0.")]
    shapes = [shape for shape in of_layer if len(shape) == 2]
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    cases = [(new(tokens, n_in), new(n_out, n_in), new(tokens, n_out)) for n_out, n_in in shapes]
    flops, start = 0, None
    while start is None or time.process_time() - start < seconds:
        for x, weight, grad in cases:
            x @ weight.T, grad @ weight, grad.T @ x
        if start is None:  # the first round only warms up
            start = time.process_time()
        else:
            flops += sum(6 * tokens * math.prod(shape) for shape in shapes)
    return flops / (time.process_time() - start)


def benchmark(args, counted=3):
    """--benchmark: what a step costs on a load on which trainers can be compared: random weights, random words.

    fixed: 8 prompts of 24 to 40 tokens x 8 completions of 64.   mixed: 4 prompts of 300 x 16 completions of up to 256,
    ended by any of V / 100 tokens, so that lengths are geometric. One AdamW update a step; a first step warms up.
    """
    V, D, L, H, K, I = BENCHMARK_SIZES[args.size]
    ends = () if args.benchmark == "fixed" else tuple(range(1, 1 + V // 100))
    config = Config(V, D, I, L, H, K, max_position_embeddings=1024, eos_token_id=ends)
    args.prompts, args.group, args.max_new_tokens = (8, 8, 64) if args.benchmark == "fixed" else (4, 16, 256)
    args.prompt, args.temperature, args.lr = "plain", 1.0, 1e-5
    vocabulary = {"<unknown>": 0} | {f"w{i}": i for i in range(1, V)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    rng = random.Random(args.seed)
    lengths = [rng.randint(24, 40) if args.benchmark == "fixed" else 300 for _ in range(args.prompts)]
    problems = [{"id": str(i), "answer": "", "problem": " ".join(f"w{rng.randrange(1, V)}" for _ in range(n - 2))}
                for i, n in enumerate(lengths)]  # the chat template adds two words
    REWARDS["odd"] = odd
    rank, world, device = init_distributed(args.device, args.processes)
    dtype = compute_dtype(args.dtype, device)
    params, optimizer = init_optimizer(init_params(config, args.seed), device, dtype)
    clocks, tokens = [], Counter()
    clock = lambda: (time.perf_counter(), sum(os.times()[:4]))  # by the wall; of the processor, forks included
    for step in range(1 + counted):
        clocks.append([clock()])
        kept, _, _ = gather_rollouts(params, config, tokenizer, enumerate(problems), step, args, None, {"odd": 1.0})
        rows, total = training_rows(kept, args)
        clocks[-1].append(clock())
        update(params, None, config, optimizer, rows, total, args.lr, args)
        clocks[-1].append(clock())
        if step:
            learned = sum(len(s.tokens) for row in rows for _, piece in row for s in piece)  # by this process
            tokens.update(sampled=total, learned=learned,
                          computed=learned + sum(len(prompt) for row in rows for prompt, _ in row))
    (rollout_s, rollout_cpu), (update_s, update_cpu) = (
        [sum(row[i + 1][kind] - row[i][kind] for row in clocks[1:]) / counted for kind in (0, 1)] for i in (0, 1))
    in_layers = sum(math.prod(shape) for name, shape in param_shapes(config).items() if ".layers." in name)
    flops = 6 * (in_layers * tokens["computed"] + V * D * tokens["learned"]) / counted
    peak, plan = peak_memory_gib(device), plan_memory(config, args, world, device.type, max(lengths))
    rate = matrix_rate(config, dtype, device, min(args.micro_tokens, tokens["computed"] // counted))
    if rank:
        return
    print(f"{args.size} {sum(p.numel() for p in params.values()):,} parameters | {args.benchmark} | "
          f"{args.prompts * args.group} rows, {tokens['sampled'] / counted:.0f} sampled tokens a step | "
          + (f"{world} processes, the figures of one: " if world > 1 else "")
          + f"{torch.get_num_threads()} threads | {dtype} | --micro-tokens {args.micro_tokens}"
          + (" --checkpointing" if args.checkpointing else ""))
    for unit, rollout, learning in (("s", rollout_s, update_s), ("cpu_s", rollout_cpu, update_cpu)):
        print(f"{unit} per step {rollout + learning:.2f} | rollout {rollout:.2f} | update {learning:.2f} | "
              f"{tokens['sampled'] / counted / (rollout + learning):.0f} tokens/{unit}")
    print(f"update: {flops / update_cpu / 1e9:.0f} GFLOP/cpu_s in its matrix products, "
          f"{100 * flops / update_cpu / rate:.0f} % of the {rate / 1e9:.0f} that such products reach by themselves")
    print(f"peak memory {peak:.2f} GiB, planned {max(plan_peaks(plan)):.2f}")


# ------------------------------------------------------------------------------------ the run


def split_weight(word):
    """"gsm8k=2" -> ("gsm8k", 2.0); without a number behind it, the weight is 1."""
    found = re.fullmatch(r"(.+)=(\d*\.?\d+)", word)
    return (found[1], float(found[2])) if found else (word, 1.0)


def load_mixture(words, limit):
    """["gsm8k=2", "mine.jsonl"] -> ([problems of each set's train split], [weights])."""
    sets, weights = [], []
    for word in words:
        name, weight = split_weight(word)
        if weight == 0:
            raise ValueError(f"--data {word}: the weight is not a positive number")
        sets.append(load_problems(name, "train", limit))
        weights.append(weight)
    return sets, weights


def those_that_fit(problems, tokenizer, config, args, system):
    """The problems whose prompt leaves room for --max-new-tokens in the context."""
    prompts = [render_prompt(args.prompt, p, system=system, think_tag=args.think_tag) for p in problems]
    encoded = tokenizer.encode_batch(prompts, add_special_tokens=False)
    return [p for p, e in zip(problems, encoded) if len(e.ids) + args.max_new_tokens <= config.max_context]


def load_held_out(args):
    """(dev, test): problems that are never trained on. Of a file trained on, what its train split leaves is both."""
    dev = load_problems(args.eval_data, "dev", args.eval_limit)
    if not args.test_limit:
        return dev, []
    trained_on = [Path(split_weight(word)[0]).resolve() for word in args.data if ".jsonl" in word]
    split = "dev" if Path(args.eval_data).resolve() in trained_on else "test"
    return dev, load_problems(args.eval_data, split, args.test_limit)


def load_policy(args, model_dir, config, device):
    """(params, reference or None, optimizer). With LoRA the base is the reference, for free; else --beta has a copy."""
    dtype = compute_dtype(args.dtype, device)
    if args.lora_rank:
        base = load_params(model_dir, device, dtype)
        lora, optimizer = init_optimizer(init_lora(config, args.lora_rank, args.seed), device, offload=args.offload)
        return base | lora, base, optimizer
    params, optimizer = init_optimizer(load_params(model_dir), device, dtype, args.offload)
    return params, {k: v.detach().clone() for k, v in params.items()} if args.beta else None, optimizer


def main(args):
    check_args(args)
    if args.plan:
        return print_plan(args)
    if args.benchmark:
        return benchmark(args)
    del args.plan, args.benchmark, args.size  # no part of a run's flags
    reward_weights = parse_rewards(args.reward)
    model_dir = resolve_model(args.model)
    config, tokenizer, system = load_config(model_dir), load_tokenizer(model_dir), load_system_prompt(model_dir)
    all_sets, set_weights = load_mixture(args.data, args.train_limit)
    sets = [those_that_fit(problems, tokenizer, config, args, system) for problems in all_sets]
    left_out = sum(map(len, all_sets)) - sum(map(len, sets))
    if not all(sets):
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the context of "
                         f"{config.max_context}")
    dev, test = load_held_out(args)
    a_pass = sum(map(len, sets)) / args.prompts  # steps of an epoch
    steps = args.steps if args.epochs is None else math.ceil(args.epochs * a_pass)
    epoch_ends = {math.ceil(n * a_pass): n for n in range(1, math.ceil(args.epochs or 0))}

    rank, world, device = init_distributed(args.device, args.processes)
    run, checkpoint = start_run(args)
    if rank == 0:
        print(plan_line(plan_memory(config, args, world, device.type), memory_there(device), world), flush=True)
    params, ref_params, optimizer = load_policy(args, model_dir, config, device)
    state = {"step": 0, "best_step": None, "extra": {"best": -1.0, "taken": 0, "failures": 0, "rows": []}}
    if checkpoint:
        state = load_checkpoint(checkpoint, optimizer)
    best_step, extra = state["best_step"], state["extra"]
    problems = itertools.islice(problem_order(sets, set_weights, args.seed, args.curriculum), extra["taken"], None)

    def measure_test(method, prompt=None):
        records = measure(params, config, tokenizer, test, args, system, prompt)
        row = summarize(records, method=method, prompt=prompt or args.prompt)
        kept = ("method", "n", "accuracy", "low", "high", "levels", "tokens_mean", "truncated")
        extra["rows"] = [old for old in extra["rows"] if old["method"] != method] + [{name: row[name] for name in kept}]

    if rank == 0:
        num_trained = sum(p.numel() for p in params.values() if p.requires_grad)
        print(f"{sum(map(len, sets))} training problems, {len(dev)} held out for choosing and {len(test)} for the "
              f"result; {num_trained:,} weights to train on {world} x {device}"
              + (f"; {left_out} problems are too long for the context and left out" if left_out else ""), flush=True)
    if test and not extra["rows"]:
        measure_test("before")
        if args.prompt != "cot":
            measure_test("before, asked to think step by step", "cot")
        if rank == 0:
            write_results(run, extra["rows"])

    began, began_at = time.perf_counter(), state["step"]
    with stop_signals() as stop_requested:
        for step in range(state["step"] + 1, steps + 1):
            start = time.perf_counter()
            kept, seen, taken = gather_rollouts(params, config, tokenizer, problems, step, args, system, reward_weights)
            extra["taken"] += taken
            rolled = time.perf_counter()

            sums, grad_norm, skipped, lr = Counter(), 0.0, 0, learning_rate(step, steps, args.lr, args.warmup)
            rows, total = training_rows(kept, args)
            if total:
                sums, grad_norm, skipped = update(params, ref_params, config, optimizer, rows, total, lr, args)
            extra["failures"] = extra["failures"] + skipped if skipped else 0
            updated = time.perf_counter()

            names = ("tokens", "loss", "entropy", "ratio", "clipped_low", "clipped_high", "kl", "mismatch")
            s = dict(zip(names, all_sum([float(sums[name]) for name in names])))
            per_token = {name: s[name] / max(1, s["tokens"]) for name in names[2:]}
            metrics = {"step": step, "steps": steps, "epoch": extra["taken"] / sum(map(len, sets))}
            metrics |= rollout_metrics(kept, seen, args) | per_token | {
                "loss": s["loss"] / args.updates, "mismatch_max": max(gather_objects(sums["mismatch_max"])),
                "grad_norm": grad_norm, "skipped": skipped, "lr": lr, "rollout_s": rolled - start,
                "score_s": sums["score_s"], "update_s": updated - rolled - sums["score_s"],
                "peak_memory_gib": max(gather_objects(peak_memory_gib(device)))}
            sampled = metrics["length"] * metrics.pop("completions")
            metrics |= {"tokens_per_s": sampled / (updated - start), "sampled_tokens_per_s": sampled / (rolled - start),
                        "learned_tokens_per_s": s["tokens"] / (updated - rolled)}
            stopping = stop_requested()
            measured = step % args.eval_every == 0 or step in epoch_ends or step == steps
            if measured:
                correct = scores_of(measure(params, config, tokenizer, dev, args, system), PRESETS[args.prompt].grade)
                metrics["dev_accuracy"] = sum(correct) / len(correct)
                if metrics["dev_accuracy"] > extra["best"]:
                    extra["best"], best_step = metrics["dev_accuracy"], step
                log_samples(run, step, best_and_worst(seen[:4]))
            metrics["left_min"] = (time.perf_counter() - began) / (step - began_at) * (steps - step) / 60
            log_step(run, "step {step}/{steps} | reward {reward:.3f} | accuracy {accuracy:.3f} | "
                     "length {length:.0f} tok | truncated {truncated:.2f} | no spread {no_spread:.2f} | "
                     "entropy {entropy:.3f} nat | grad norm {grad_norm:.2f} | lr {lr:.1e} | "
                     "rollout {rollout_s:.1f} s | update {update_s:.1f} s | {left_min:.0f} min left"
                     + (" | dev accuracy {dev_accuracy:.3f}" if measured else ""), metrics)
            if rank == 0 and metrics["truncated"] > 0.5:
                print(f"more than half of the completions were cut off at --max-new-tokens {args.max_new_tokens}: "
                      "they earn nothing and teach little; raise it")
            if extra["failures"] >= 3:
                raise ValueError(f"the gradient was not finite in {extra['failures']} updates running, which were "
                                 "skipped; start another --run-dir from the last checkpoint, with --lr below "
                                 f"{args.lr:g} or --dtype float32")
            if test and (step == steps or step in epoch_ends):
                measure_test("after" if step == steps else f"after epoch {epoch_ends[step]}")
            if measured or step % args.save_every == 0 or stopping:
                save_checkpoint(args.run_dir, step, params, config, model_dir, optimizer, extra, args.keep, best_step)
            if rank == 0 and measured:
                draw_curves(run.dir, CURVES)
            if stopping and step < steps:
                if rank == 0:
                    print(f"stopped; go on with: {resume_command()}")
                return
    if rank == 0:
        if test:
            write_results(run, extra["rows"])
        print(f"best checkpoint, by accuracy {extra['best']:.3f} on the {len(dev)} held-out dev problems: "
              f"{Path(args.run_dir, 'checkpoints', 'best')} (step {best_step})")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"grpo.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # once it learns, Ctrl-C saves
        sys.exit("grpo.py: interrupted before the first step; there is nothing to save")
