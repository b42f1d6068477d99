"""Group Relative Policy Optimization: reinforcement learning with verifiable rewards, in one file.

    python grpo.py                                           # the embedded tiny model, on a laptop
    python grpo.py --model qwen2.5-1.5b                      # GSM8K, one 24 GB GPU
    torchrun --nproc-per-node 8 grpo.py --model qwen2.5-7b   # one node, or several
    python grpo.py --model DIR --data mine.jsonl=2 gsm8k=1   # a mixture of problem sets, 2 to 1
    python grpo.py --run-dir runs/grpo --resume              # goes on after Ctrl-C or a crash

A step: (1) roll out G completions of each of N problems; (2) grade them; (3) the advantage of a
completion is how much better it did than its group; (4) one or more AdamW updates of the clipped
policy loss. There is no critic. GRPO, arXiv:2402.03300; DeepSeek-R1, arXiv:2501.12948.

Where this departs from the GRPO paper, and what undoes it:
1. The loss is the mean over all tokens of a step, not over each completion first, and the ratio is
   clipped later from above (DAPO, arXiv:2503.14476): --loss grpo --clip-high 0.2.
2. There is no KL divergence in the loss, and so no reference model: --beta 0.04 --kl k3.
3. Groups of equal rewards teach nothing, and new problems replace them (DAPO): --refill 0.
4. Each token counts by how much likelier the trainer finds it than the sampler did, at most
   --sampler-cap times (truncated importance sampling): 1 but for rounding.
5. The deviation that divides the advantages is over n - 1, plus 1e-4, as in TRL.
Other losses: Dr. GRPO, arXiv:2503.20783; GSPO, arXiv:2507.18071; CISPO, arXiv:2506.13585.
"""

import argparse
import functools
import itertools
import math
import re
import time
import zlib
from collections import Counter
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import model
import optim
from data.mixture import load_held_out, load_mixture, problem_order, split_number
from data.prompts import PRESETS, THINK_TAGS, encode_prompt
from eval import interval, markdown, percent
from generate import Engine, cache_slots, completion_text, generate, sampling_params
from optim import at_least, gather_objects, init_optimizer, optimizer_step, rank_and_world
from verify import format_reward, verify_many

# What a flag left out means for a tiny model, and for any other.
TINY = {"data": ["arithmetic"], "prompt": "plain", "max_new_tokens": 128, "steps": 80,
        "lr": 5e-4, "micro_tokens": 2048, "checkpointing": False}
OTHERS = {"data": ["gsm8k"], "prompt": "boxed", "max_new_tokens": 1024, "steps": 150,
          "lr": 1e-6, "micro_tokens": 16384, "checkpointing": True}
LORA_RANK = 32  # where all weights do not fit the memory
LORA_LR = 3e-5  # an adapter stands larger steps
# A problem is asked by itself, and only the box earns the reward.
PROMPTS = [name for name, p in PRESETS.items() if not p.shots and p.grade == "strict"]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def add_flags(parser):
    parser.epilog = f"Flags left out mean, for a tiny model, {TINY}; for any other, {OTHERS}."
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--data", nargs="+", help="problem sets or .jsonl files, each NAME or NAME=PROPORTION")
    add("--eval-data", help="held-out problems (default the first of --data)")
    add("--eval-limit", type=at_least(1), default=200, help="dev problems, for choosing")
    add("--test-limit", type=at_least(0), default=500, help="test problems, before and after")
    add("--eval-every", type=at_least(1), default=25, help="steps between evaluations on dev")
    add("--prompt", choices=PROMPTS, help="how a problem is put")
    add("--think-tag", default="think", choices=THINK_TAGS, help="name of the thinking block")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=at_least(1), default=32, help="N: problems in a step")
    add("--group", type=at_least(2), default=8, help="G: completions of each")
    add("--max-new-tokens", type=at_least(1), help="tokens of the longest completion")
    add("--temperature", type=optim.above(0.0), default=1.0, help="also of every log-probability")
    add("--max-batch", type=at_least(1), default=128, help="rows that decode at once")
    add("--compile", action="store_true", help="torch.compile a GPU's decode step (a minute, once)")
    add("--refill", type=at_least(0), default=2, help="times that dull groups are replaced")
    add("--curriculum", action="store_true", help="in each epoch, easier problems first (by level)")
    add("--reward", nargs="+", default=["accuracy=1", "format=0.1"], metavar="NAME=COEFFICIENT",
        help=f"of {', '.join(REWARDS)}, summed")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="dapo", choices=LOSSES)
    add("--level", default="token", choices=("token", "sequence"), help="of the ratio; GSPO is "
        "sequence with --loss grpo --clip-low 3e-4 --clip-high 4e-4")
    add("--scale", default="group", choices=("group", "batch", "none"), help="of the advantages: "
        "by whose standard deviation they are divided")
    add("--clip-low", type=optim.below_one, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip-high", type=at_least(0.0), default=0.28, help="and above 1 + this")
    add("--clip-hard", type=optim.above(1.0), help="and here if the advantage is negative, too")
    add("--beta", type=at_least(0.0), default=0.0, help="of the KL divergence from the start")
    add("--kl", default="k3_corrected", choices=("k1", "k2", "k3", "k3_corrected"))
    add("--entropy-bonus", type=float, default=0.0, help="factor of the entropy")
    add("--updates", type=at_least(1), default=1, help="mu: optimizer steps on each batch")
    add("--sampler-cap", type=at_least(1.0), default=2.0, help="the most that a token counts")
    add("--mask-truncated", action="store_true", help="what was cut off is left out of the loss")
    add = parser.add_argument_group("size and length").add_argument
    add("--steps", type=at_least(1), help="batches of rollouts")
    add("--epochs", type=optim.above(0.0), help="instead of --steps: passes over the problems")
    add("--train-limit", type=at_least(1), help="training problems of each set, a random subset")
    add("--lora-rank", type=at_least(0), help="train an adapter of this rank; 0: all weights "
        f"(default 0 where memory allows, else {LORA_RANK}, with --lr {LORA_LR})")
    add("--micro-tokens", type=at_least(1), help="tokens in one packed row of training")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, a third more time")
    optim.add_train_flags(parser, lr=None, run_dir="runs/grpo")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=optim.HelpFormatter)
    add_flags(parser)
    return optim.parse_train_args(parser, argv)


# ------------------------------------------------------------ rewards


class Group(NamedTuple):
    """A problem and its G completions, as the reward functions see them, and their grades."""
    problem: dict
    prompt: list[int]  # tokens
    texts: list[str]  # without end tokens, and without what the prompt opened of the thinking block
    completions: list  # of generate.Completion: tokens, logprobs, finish
    right: list[bool | None]  # None: undecided
    max_new_tokens: int
    think_tag: str
    place: int = 0  # of the problem in the order of the run
    parts: dict[str, list[float]] = {}  # each reward by name, [G]
    rewards: list[float] = ()  # [G] their sum, each times its coefficient
    advantages: list[float] = ()  # [G]


def accuracy(group):
    return [float(right is True) for right in group.right]


def well_formed(group):
    """A well-formed thinking block at most, one boxed answer, nothing after it."""
    return [format_reward(text, group.think_tag) for text in group.texts]


def brevity(group):
    """0 for the shortest right completion, down to -1 for one of three times its length; wrong: 0.

    Relative to the group, so that easy problems get short thoughts and hard ones may stay long.
    """
    lengths = [len(c.tokens) for c in group.completions]
    shortest = min((n for n, right in zip(lengths, group.right) if right), default=0)
    return [-min(1.0, (n - shortest) / (2 * shortest)) if right else 0.0
            for n, right in zip(lengths, group.right)]


def repetition(group, n=4, free=0.2):
    """Down to -1 with the share of repeated token n-grams above `free`, in any language."""
    rewards = []
    for c in group.completions:
        grams = [tuple(c.tokens[i:i + n]) for i in range(len(c.tokens) - n + 1)]
        share = 1 - len(set(grams)) / max(1, len(grams))
        rewards.append(-max(0.0, share - free) / (1 - free) if grams else 0.0)
    return rewards


def script_of(letter):
    if ord(letter) < 0x250:
        return "latin"
    return ord(letter) >> 8 if ord(letter) < 0x2E80 else "east asian"


def language(group):
    """Down to -1 with the share of letters of scripts that the problem does not use.

    Latin is free: formulas need it.
    """
    home = {"latin"} | {script_of(c) for c in group.problem["problem"] if c.isalpha()}
    letters = [[c for c in text if c.isalpha()] for text in group.texts]
    return [-sum(script_of(c) not in home for c in row) / max(1, len(row)) for row in letters]


def overlong(group, share=0.2):
    """0 up to the last `share` of the token budget, then in a line to -1 (DAPO, eq. 13)."""
    start = (1 - share) * group.max_new_tokens
    return [-max(0.0, (len(c.tokens) - start) / (group.max_new_tokens - start))
            for c in group.completions]


# A reward takes a Group and returns a float for each completion: yours is one more function and one
# more name here. The penalties lie in [-1, 0].
REWARDS = {"accuracy": accuracy, "format": well_formed, "brevity": brevity,
           "repetition": repetition, "language": language, "overlong": overlong}


def parse_rewards(words):
    """["accuracy=1", "format=0.1"] -> {name: coefficient}.

    Raises ValueError for unknown names, and when a wrong answer could score above a right one.
    """
    coefficients = dict(map(split_number, words))
    for name in coefficients:
        if name not in REWARDS:
            raise ValueError(f"--reward {name!r}: expected NAME=COEFFICIENT, a number of at least "
                             f"0 and a name of {', '.join(REWARDS)}")
    of_accuracy = coefficients.get("accuracy", math.inf)
    others = sum(c for name, c in coefficients.items() if name != "accuracy")
    if others >= of_accuracy:
        raise ValueError(f"--reward: the other coefficients sum to {others:g}, that of accuracy is "
                         f"{of_accuracy:g}; it needs more, or a wrong answer may beat a right one")
    return coefficients


def reward_group(group, coefficients):
    """The group with `parts` and `rewards`."""
    parts = {name: REWARDS[name](group) for name in coefficients}
    rewards = [0.0] * len(group.texts)
    for name, coefficient in coefficients.items():
        rewards = [total + coefficient * part for total, part in zip(rewards, parts[name])]
    return group._replace(parts=parts, rewards=rewards)


# ------------------------------------------------------------ the loss


def group_advantages(rewards, scale="group"):
    """How much better each completion did than its group.

    rewards: [N, G] float. Returns [N, G] float: rows sum to zero; equal rewards give zeros.
    scale: divide by the standard deviation (n - 1) of the "group" (GRPO, arXiv:2402.03300) or of
    the "batch" (REINFORCE++-baseline, arXiv:2501.03262), plus 1e-4, or "none" (Dr. GRPO,
    arXiv:2503.20783). Raises ValueError when G < 2: one alone has no baseline.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {list(rewards.shape)}, expected [N, G] with G of at least 2")
    advantages = rewards - rewards.mean(1, keepdim=True)  # [N, G]
    if scale == "none":
        return advantages
    if scale == "group":
        return advantages / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "batch":
        return advantages / (rewards.std() + 1e-4)
    raise ValueError(f"scale is {scale!r}, expected group, batch or none")


def kl_divergence(gap, ratio, kl):
    """Estimates of KL(policy || reference) for each token, [B, T].

    gap: [B, T], log of reference over policy. Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    if kl == "k1":
        return -gap
    if kl == "k2":
        return gap.square() / 2
    k3 = gap.exp() - gap - 1  # GRPO, eq. 4
    if kl == "k3":
        return k3
    if kl == "k3_corrected":  # DeepSeek-V3.2, arXiv:2512.02556: its gradient is unbiased
        return ratio * k3
    raise ValueError(f"kl is {kl!r}, expected k1, k2, k3 or k3_corrected")


def policy_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, loss="dapo",
                level="token", clip_low=0.2, clip_high=0.28, clip_hard=None, beta=0.0, kl="k3",
                max_completion_tokens=None, total=None, weights=None, bonus=0.0):
    """The loss whose gradient improves the policy, and what to log of it.

    logprobs, old_logprobs, ref_logprobs: [B, T] float, under the policy, the policy that sampled,
    the reference (None when beta is 0). advantages: [B]. mask: [B, T], 1 for tokens that count.
    weights: [B, T], factors of the tokens' terms, or None. bonus: [B, T], added to each token's
    objective (entropy). loss: one of LOSSES. level: "token", or "sequence" for the ratio of GSPO.
    total: what the sum is divided by, over the whole optimizer step; None: this call's own. "grpo":
    rows; "bnpo", "dapo", "cispo": tokens; "dr_grpo": rows times max_completion_tokens.
    Returns (loss, stats): a scalar, and sums over the tokens of this call, "tokens" among them.
    """
    if loss not in LOSSES or level not in ("token", "sequence"):
        raise ValueError(f"loss is {loss!r}, level {level!r}, expected one of {', '.join(LOSSES)}, "
                         "and token or sequence")
    mask = mask.to(logprobs.dtype)  # [B, T]
    lengths = mask.sum(1).clamp(min=1)  # [B]
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20) * mask  # [B, T]; never inf * 0
    token_ratio = log_ratio.exp()  # [B, T]
    ratio = token_ratio
    if level == "sequence":  # GSPO, arXiv:2507.18071, eq. 7: the geometric mean over the sequence
        ratio = (log_ratio.sum(1) / lengths).exp()[:, None].expand_as(token_ratio)  # [B, T]
    A = advantages[:, None]  # [B, 1]
    if loss == "cispo":  # arXiv:2506.13585, eq. 4: a clipped factor; every token keeps its gradient
        objective = ratio.detach().clamp(max=1 + clip_high) * A * logprobs  # [B, T]
    else:  # PPO, arXiv:1707.06347, eq. 7; clip_hard: INTELLECT-2, arXiv:2505.07291
        bounded = ratio if clip_hard is None else ratio.clamp(max=clip_hard)
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
        objective = torch.minimum(bounded * A, clipped * A)  # [B, T]
    divergence = torch.zeros_like(logprobs)  # [B, T]
    if beta:
        gap = (ref_logprobs - logprobs).clamp(-20, 20) * mask
        divergence = kl_divergence(gap, token_ratio, kl)
    per_token = (beta * divergence - objective - bonus) * mask  # [B, T]
    if weights is not None:
        per_token = per_token * weights
    if loss == "grpo":  # arXiv:2402.03300, eq. 3: the mean over tokens, then over completions
        value = (per_token.sum(1) / lengths).sum() / (total or len(mask))
    elif loss == "dr_grpo":  # arXiv:2503.20783: a constant instead of the length
        if max_completion_tokens is None:
            raise ValueError("dr_grpo divides by max_completion_tokens, which is None")
        value = per_token.sum() / (total or len(mask) * max_completion_tokens)
    else:  # the mean over all tokens: of the batch (bnpo), of the whole step (DAPO, eq. 8)
        value = per_token.sum() / (total or mask.sum().clamp(min=1))
    with torch.no_grad():
        low = (ratio < 1 - clip_low) & (A < 0)
        high = (ratio > 1 + clip_high) & (A > 0)
        if loss == "cispo":  # whatever the advantage, and from above only
            low, high = torch.zeros_like(low), ratio > 1 + clip_high
        sums = {"ratio": ratio, "clipped_low": low, "clipped_high": high, "kl": divergence}
        stats = {name: (each * mask).sum() for name, each in sums.items()}
    return value, stats | {"tokens": mask.sum()}


def loss_total(loss, lengths, max_completion_tokens):
    """`total` of policy_loss for an optimizer step over completions of these lengths."""
    if loss == "grpo":
        return len(lengths)
    return len(lengths) * max_completion_tokens if loss == "dr_grpo" else sum(lengths)


# ------------------------------------------------------------ rollouts


class Policy(NamedTuple):
    params: dict[str, torch.Tensor]
    config: model.Config
    tokenizer: Any  # tokenizers.Tokenizer
    system: str | None  # the model's own system turn
    engine: Engine | None = None  # the sampler's, which a GPU keeps


def encode_problem(policy, problem, args, preset=None):
    return encode_prompt(policy.tokenizer, preset or args.prompt, problem, system=policy.system,
                         think_tag=args.think_tag)


def roll_out(policy, problems, args, seed=0, preset=None, greedy=False):
    """A Group for each (place, problem): dealt out to the processes, and known to all of them.

    A completion's noise derives from (seed, place, sample) alone. preset: instead of --prompt.
    greedy: one completion each, without noise.
    """
    rank, world = rank_and_world()
    problems = problems[rank::world]
    G = 1 if greedy else args.group
    prompts = [encode_problem(policy, problem, args, preset) for _, problem in problems]
    ends = model.end_tokens(policy.tokenizer, policy.config)
    rows = generate(policy.params, policy.config, prompts, num_samples=G,
                    max_new_tokens=args.max_new_tokens, max_batch=args.max_batch, stop_tokens=ends,
                    temperature=0.0 if greedy else args.temperature, seed=seed,
                    seeds=[place for place, _ in problems], engine=policy.engine,
                    compiled=args.compile)
    texts = [[completion_text(policy.tokenizer, c, ends) for c in row] for row in rows]
    pairs = [(text, p["answer"]) for (_, p), row in zip(problems, texts) for text in row]
    verdicts = verify_many(pairs, strict=True)
    coefficients = parse_rewards(args.reward)
    groups = []
    for i, (place, problem) in enumerate(problems):
        group = Group(problem, prompts[i], texts[i], rows[i], verdicts[i * G:(i + 1) * G],
                      args.max_new_tokens, args.think_tag, place)
        groups.append(reward_group(group, coefficients))
    shares = gather_objects(groups)
    return sorted(itertools.chain(*shares), key=lambda group: group.place)


def sampler_weights(policy):
    """The weights in the sampler's form; on a GPU, in the place of those of before."""
    engine = policy.engine
    form = sampling_params(policy.params, policy.config, out=engine and engine.form)
    if engine and form["model.norm.weight"].is_cuda:
        engine.form = form
    return form


def has_spread(group):
    """Groups whose rewards are all equal have no gradient."""
    return max(group.rewards) - min(group.rewards) > 1e-6


def roll_out_step(policy, problems, step, args):
    """The groups of a step, one for each problem taken from the iterator `problems`.

    Up to --refill times, as many new problems are asked as there were groups without spread
    (dynamic sampling, DAPO, section 3.2).
    """
    sampler = policy._replace(params=sampler_weights(policy))
    seed = zlib.crc32(f"{args.seed} {step}".encode())
    groups = []
    missing = args.prompts
    for _ in range(1 + args.refill):
        batch = list(itertools.islice(problems, missing))
        groups += roll_out(sampler, batch, args, seed)
        missing = args.prompts - sum(map(has_spread, groups))
        if missing == 0:
            break
    return groups


def with_advantages(groups, scale):
    """The groups with their advantages.

    Those without spread get zeros, and have no part in the deviation of the batch.
    """
    rewards = torch.tensor([g.rewards for g in groups])  # [N, G]
    spread = torch.tensor([has_spread(g) for g in groups])  # [N]
    advantages = torch.zeros_like(rewards)
    if spread.any():
        advantages[spread] = group_advantages(rewards[spread], scale)
    return [g._replace(advantages=row) for g, row in zip(groups, advantages.tolist())]


# ------------------------------------------------------------ learning


class Sequence(NamedTuple):
    """One completion as the loss needs it."""
    tokens: list[int]
    logprobs: list[float]  # the sampler's
    advantage: float
    counts: bool  # False: left out of the loss (--mask-truncated)


def pack_groups(groups, micro_tokens):
    """[(prompt tokens, [Sequence, ...]), ...] -> rows of groups, of at most `micro_tokens` tokens.

    A group that does not fit the rest of a row is divided; each part pays for the prompt, and the
    gradient is the same. A completion that is longer by itself has its own row.
    """
    rows = []
    size = math.inf  # of the last row
    for prompt, sequences in groups:
        if size + len(prompt) + sum(len(s.tokens) for s in sequences) > micro_tokens:
            size = math.inf
        in_row = False  # the prompt
        for sequence in sequences:
            if size + len(prompt) * (not in_row) + len(sequence.tokens) > micro_tokens:
                rows.append([])
                size = 0
                in_row = False
            if not in_row:
                rows[-1].append((prompt, []))
                size += len(prompt)
                in_row = True
            rows[-1][-1][1].append(sequence)
            size += len(sequence.tokens)
    return rows


def training_rows(groups, args):
    """(this process's packed rows, `total` of policy_loss over all); a total of 0: no update."""
    learned = []
    lengths = []
    for g in filter(has_spread, groups):
        sequences = []
        for c, advantage in zip(g.completions, g.advantages):
            counts = c.finish == "stop" or not args.mask_truncated
            sequences.append(Sequence(c.tokens, c.logprobs, advantage, counts))
        learned.append((g.prompt, sequences))
        lengths += [len(s.tokens) for s in sequences if s.counts]
    total = loss_total(args.loss, lengths, args.max_new_tokens)
    return deal_rows(pack_groups(learned, args.micro_tokens)), total


def deal_rows(rows):
    """This process's share of packed rows: each goes, longest first, to who has least to do."""
    rank, world = rank_and_world()
    shares = [[] for _ in range(world)]
    loads = [0] * world
    sizes = [sum(len(p) + sum(len(s.tokens) for s in piece) for p, piece in row) for row in rows]
    for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(rows[i])
        loads[least] += sizes[i]
    return shares[rank]


def row_logprobs(params, config, row, temperature, checkpointing=False, entropy_grad=False):
    """Of the completions of a packed row, each prompt computed once.

    Returns (logprobs, entropy, mask), each [B, T].
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(len(prompt), [len(s.tokens) for s in piece]) for prompt, piece in row]
    sequences = [s for _, piece in row for s in piece]  # B of them
    tokens, reads, targets = [], [], []  # a token is read off the one before it,
    for prompt, piece in row:
        tokens += prompt
        last = len(tokens) - 1  # a completion's first off the prompt's last
        for s in piece:
            begin, end = len(tokens), len(tokens) + len(s.tokens)
            tokens += s.tokens
            reads += [last, *range(begin, end - 1)]
            targets += range(begin, end)
    tokens = torch.tensor(tokens, device=device)  # [row]
    hidden = model.packed_hidden_states(params, config, tokens, groups, checkpointing)  # [row, D]
    flat = model.head_logprobs(params, config, hidden[reads], tokens[targets], temperature,
                               entropy_grad=entropy_grad)
    lengths = [len(s.tokens) for s in sequences]
    logprobs, entropy = (pad_sequence(x.split(lengths), batch_first=True) for x in flat)  # [B, T]
    lengths = torch.tensor([len(s.tokens) * s.counts for s in sequences], device=device)  # [B]
    mask = torch.arange(logprobs.shape[1], device=device) < lengths[:, None]  # [B, T]
    return logprobs, entropy, mask


def row_loss(params, config, row, old_logprobs, ref_logprobs, total, args):
    """policy_loss of one packed row: (loss, stats); old_logprobs None: those of this pass."""
    logprobs, entropy, mask = row_logprobs(params, config, row, args.temperature,
                                           args.checkpointing, args.entropy_bonus != 0)  # [B, T]
    if old_logprobs is None:  # on policy: no rounding can be clipped
        old_logprobs = logprobs.detach()
    new = logprobs.new_tensor
    sequences = [s for _, piece in row for s in piece]
    sampled = pad_sequence([new(s.logprobs) for s in sequences], batch_first=True)  # [B, T]
    mismatch = (old_logprobs - sampled) * mask  # [B, T]
    loss, stats = policy_loss(
        logprobs, old_logprobs, ref_logprobs, new([s.advantage for s in sequences]), mask,
        loss=args.loss, level=args.level, clip_low=args.clip_low, clip_high=args.clip_high,
        clip_hard=args.clip_hard, beta=args.beta, kl=args.kl, total=total,
        max_completion_tokens=args.max_new_tokens, bonus=args.entropy_bonus * entropy,
        weights=mismatch.exp().clamp(max=args.sampler_cap))
    return loss, stats | {"loss": loss.detach(), "mismatch": mismatch.abs().sum(),
                          "entropy": (entropy.detach() * mask).sum()}


def update(policy, ref_params, optimizer, rows, total, lr, args):
    """--updates optimizer steps on this process's rows.

    Returns sums of policy_loss's statistics over the tokens of all processes, with "grad_norm" of
    the last step and the number of steps "skipped".
    """
    params, config, *_ = policy
    settings = (args.temperature, args.checkpointing)
    old = ref = [None] * len(rows)
    with torch.no_grad():
        if args.beta:
            ref = [row_logprobs(ref_params, config, row, *settings)[0] for row in rows]
        if args.updates > 1:
            old = [row_logprobs(params, config, row, *settings)[0] for row in rows]
    own = Counter()  # of tensors, so that the device is not waited for
    skipped = 0
    for _ in range(args.updates):
        for row, old_logprobs, ref_logprobs in zip(rows, old, ref):
            loss, stats = row_loss(params, config, row, old_logprobs, ref_logprobs, total, args)
            loss.backward()
            own.update(stats)
        norms = optimizer_step(optimizer, lr, betas=args.betas, clip=args.clip,
                               weight_decay=args.weight_decay)
        skipped += norms["skipped"]
    sums = Counter()
    for share in gather_objects({name: value.item() for name, value in own.items()}):
        sums.update(share)
    sums["grad_norm"] = norms["grad_norm"]
    sums["skipped"] = skipped
    return sums


# ------------------------------------------------------------ watching

CURVES = ("accuracy", "dev_accuracy", "length", "length_wrong", "entropy", "no_spread",
          "second_thoughts", "grad_norm")
STEP_LINE = (
    "step {step}/{steps} | reward {reward:.3f} | accuracy {accuracy:.3f} | length {length:.0f} tok"
    " | truncated {truncated:.2f} | no spread {no_spread:.2f} | entropy {entropy:.3f} nat"
    " | grad norm {grad_norm:.2f} | lr {lr:.1e} | rollout {rollout_s:.1f} s"
    " | update {update_s:.1f} s | {left_min:.0f} min left")
SECOND_THOUGHTS = re.compile(
    r"\b(wait|hold on|let me (?:re)?check|let me verify|actually|mistake)\b", re.IGNORECASE)


def step_metrics(groups, learned, args):
    """What a step's groups and its update were like. learned: from update."""
    rows = []  # of a completion each
    for g in groups:
        for i, completion in enumerate(g.completions):
            rows.append({
                "reward": g.rewards[i], "accuracy": g.right[i] is True,
                "undecided": g.right[i] is None, "length": len(completion.tokens),
                "truncated": completion.finish != "stop",
                "second_thoughts": bool(SECOND_THOUGHTS.search(g.texts[i]))})
            rows[-1].update({f"reward_{name}": values[i] for name, values in g.parts.items()})
    metrics = {name: fmean(row[name] for row in rows) for name in rows[0]}
    for name, right in (("length_right", True), ("length_wrong", False)):
        lengths = [row["length"] for row in rows if row["accuracy"] == right]
        metrics[name] = fmean(lengths) if lengths else 0.0
    for name in ("entropy", "ratio", "clipped_low", "clipped_high", "kl", "mismatch"):
        metrics[name] = learned[name] / max(1, learned["tokens"])
    return metrics | {
        "no_spread": fmean(not has_spread(g) for g in groups),
        "loss": learned["loss"] / args.updates,
        "grad_norm": learned["grad_norm"], "skipped": learned["skipped"]}


def sample_records(groups, kind, tokenizer):
    """Groups, whole, as samples.jsonl holds them."""
    records = []
    for g in groups:
        completions = []
        for i, c in enumerate(g.completions):
            completions.append({
                "text": g.texts[i], "tokens": c.tokens,
                "logprobs": [round(x, 4) for x in c.logprobs],
                "rewards": {name: values[i] for name, values in g.parts.items()},
                "reward": g.rewards[i], "advantage": g.advantages[i] if g.advantages else None,
                "right": g.right[i], "finish": c.finish})
        records.append({
            "kind": kind, "problem": g.problem["problem"], "answer": g.problem["answer"],
            "prompt": tokenizer.decode(g.prompt, skip_special_tokens=False),
            "completions": completions})
    return records


def evaluate(policy, dev, groups, args, run, step):
    """The accuracy on `dev`. A few groups of the step and of `dev` go, whole, to samples.jsonl."""
    sampler = policy._replace(params=sampler_weights(policy))
    answered = roll_out(sampler, list(enumerate(dev)), args, greedy=True)
    optim.log_samples(run, step, sample_records(groups[:4], "rollout", policy.tokenizer)
                      + sample_records(answered[:8], "held_out", policy.tokenizer))
    return fmean(g.right[0] is True for g in answered)


def measure_test(policy, test, args, run, rows, method, preset=None):
    """Add the accuracy on the test split to `rows`, and write these as results.md."""
    if not test:
        return
    sampler = policy._replace(params=sampler_weights(policy))
    groups = roll_out(sampler, list(enumerate(test)), args, preset=preset, greedy=True)
    accuracy, low, high = interval([float(g.right[0] is True) for g in groups])
    row = {"method": method, "n": len(groups), "accuracy": accuracy, "low": low, "high": high,
           "tokens_mean": fmean(len(g.completions[0].tokens) for g in groups),
           "truncated": fmean(g.completions[0].finish != "stop" for g in groups)}
    rows[:] = [other for other in rows if other["method"] != method] + [row]
    head = ["", "problems", "accuracy %, 95 % interval", "tokens per answer", "truncated %"]
    lines = [[r["method"], r["n"], percent(r["accuracy"], r["low"], r["high"]),
              f"{r['tokens_mean']:.0f}", percent(r["truncated"])] for r in rows]
    if run.rank == 0:
        optim.write_whole(run.dir / "results.md", markdown(head, lines))
        print(markdown(head, lines), flush=True)


# ------------------------------------------------------------ the run


def memory_plan(config, args, world=1, device="cpu", prompt=200):
    """optim.plan_memory of a run. prompt: tokens of a problem; of GSM8K's, with template, 200."""
    groups = math.ceil(args.prompts / world)
    longest = prompt + args.max_new_tokens
    in_all = groups * (prompt + args.group * args.max_new_tokens)
    rows = min(args.max_batch, groups * args.group)
    prompts = math.ceil(rows / args.group)
    dtype = optim.compute_dtype(args.dtype, device)
    slots = cache_slots(rows, prompts, prompt, args.max_new_tokens, device == "cuda")
    return optim.plan_memory(
        config, dtype, device, world, longest=longest,
        row_tokens=min(max(args.micro_tokens, longest), in_all), rows=rows, cache_slots=slots,
        lora_rank=args.lora_rank, checkpointing=args.checkpointing, reference=args.beta > 0,
        offload=args.offload)


def fill_defaults(args, config):
    """Give flags that were left out what they mean for this model. Writes into `args`.

    Raises ValueError for flags that contradict each other.
    """
    parse_rewards(args.reward)
    if args.epochs and args.steps:
        raise ValueError(f"--steps is {args.steps}, expected nothing beside --epochs {args.epochs}")
    if args.clip_hard and args.clip_hard <= 1 + args.clip_high:
        raise ValueError(f"--clip-hard is {args.clip_hard}, expected more than 1 + --clip-high "
                         f"{args.clip_high}")
    defaults = dict(TINY if model.is_tiny(config) else OTHERS)
    if args.epochs:
        del defaults["steps"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_data = args.eval_data or split_number(args.data[0])[0]


def settle_flags(args, config):
    """Fill in what was left out, by the model and the memory there is, and say what is trained.

    Writes into `args`. Raises ValueError for flags that contradict each other, and when neither
    all weights nor an adapter can be trained in the memory.
    """
    device = optim.find_device(args.device).type
    world = max(rank_and_world()[1], args.processes or 1)
    there = optim.memory_there(device, world)
    lr = args.lr
    fill_defaults(args, config)
    plan = memory_plan(config, args, world, device)
    if args.lora_rank is None and plan.peak > there:
        args.lora_rank = LORA_RANK
        plan = memory_plan(config, args, world, device)
        if plan.peak > there:
            raise ValueError(
                f"not even an adapter of rank {LORA_RANK} can be trained: it takes {plan.peak:.1f} "
                f"GiB, and there are {there:.1f}. Try a smaller --micro-tokens or --max-batch, or "
                f"more GPUs; `python bench.py plan --model {args.model}` shows what they save")
    trained = "all weights"
    args.lora_rank = args.lora_rank or 0
    if args.lora_rank:
        trained = f"an adapter of rank {args.lora_rank} (--lora-rank 0: all weights)"
        args.lr = lr or LORA_LR
    optim.say(f"training {trained}: {optim.plan_line(plan, there)}")
    if args.processes is None:
        args.processes = optim.default_processes(args.device, plan.peak - plan.shared, plan.shared)


def drop_long_prompts(problems, policy, args):
    """The problems whose prompt leaves room for --max-new-tokens in the context.

    Raises ValueError when none does.
    """
    room = policy.config.max_context - args.max_new_tokens
    kept = [p for p in problems if len(encode_problem(policy, p, args)) <= room]
    if not kept:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in "
                         f"the context of {policy.config.max_context}")
    if len(kept) < len(problems):
        optim.say(f"{len(problems) - len(kept)} problems are too long for the context: left out")
    return kept


def count_steps(args, num_problems):
    """(steps of the run, {last step of an epoch: epoch}), the end of the run not among these."""
    epoch = num_problems / args.prompts  # in steps
    epochs = args.epochs or 0
    ends = {math.ceil(n * epoch): n for n in range(1, math.ceil(epochs))}
    return args.steps or math.ceil(epochs * epoch), ends


def make_trainable(base, config, args, device):
    """(params, reference or None, optimizer). An adapter's reference is the base, for free."""
    if args.lora_rank:
        lora = model.init_lora(config, args.lora_rank, args.seed)
        lora, optimizer = init_optimizer(lora, device, offload=args.offload)
        return base | lora, base, optimizer
    dtype = optim.compute_dtype(args.dtype, device)
    params, optimizer = init_optimizer(base, device, dtype, args.offload)
    reference = {name: t.detach().clone() for name, t in params.items()} if args.beta else None
    return params, reference, optimizer


def learn_step(policy, ref_params, optimizer, problems, step, lr, args):
    """One step of the algorithm: (its groups, metrics)."""
    start = time.perf_counter()
    groups = roll_out_step(policy, problems, step, args)
    groups = with_advantages(groups, args.scale)
    rolled = time.perf_counter()
    rows, total = training_rows(groups, args)
    learned = Counter()
    if total:
        learned = update(policy, ref_params, optimizer, rows, total, lr, args)
    updated = time.perf_counter()
    metrics = step_metrics(groups, learned, args)
    peaks = gather_objects(optim.peak_memory_gib(optimizer.params.device))
    num_tokens = metrics["length"] * sum(len(g.completions) for g in groups)
    return groups, metrics | {
        "step": step, "lr": lr, "rollout_s": rolled - start, "update_s": updated - rolled,
        "tokens_per_s": num_tokens / (updated - start), "peak_memory_gib": max(peaks)}


def main(args):
    config = model.load_config(model.resolve_model(args.model, config_only=True))
    settle_flags(args, config)
    optim.check_run_dir(args)
    path = model.resolve_model(args.model)
    policy = Policy(None, config, model.load_tokenizer(path), model.load_system_prompt(path))
    sets, proportions = load_mixture(args.data, args.train_limit)
    sets = [drop_long_prompts(problems, policy, args) for problems in sets]
    dev, test = load_held_out(args.eval_data, args.data, args.eval_limit, args.test_limit)
    num_problems = sum(map(len, sets))
    steps, epoch_ends = count_steps(args, num_problems)
    if args.lora_rank:  # frozen; loaded before this process forks, so that all share them
        device = optim.find_device(args.device)
        base = model.load_params(path, device, optim.compute_dtype(args.dtype, device))
    else:
        base = model.load_params(path)
    _, world, device = optim.init_distributed(args.device, args.processes, args.timeout_min)
    run, checkpoint = optim.start_run(args)
    params, ref_params, optimizer = make_trainable(base, config, args, device)
    del base
    policy = policy._replace(params=params, engine=Engine())
    optim.say(f"{num_problems} training problems, {len(dev)} held out for choosing and {len(test)} "
              f"for the result, on {world} x {device}")

    done, best_step = 0, None
    extra = {"best": -1.0, "taken": 0, "failures": 0, "rows": []}
    if checkpoint:
        state = optim.load_checkpoint(checkpoint, optimizer)
        done, best_step, extra = state["step"], state["best_step"], state["extra"]
    measure = functools.partial(measure_test, policy, test, args, run, extra["rows"])
    if not checkpoint:
        evaluate(policy, dev[:8], [], args, run, 0)
        measure("before")
        if args.prompt != "cot":
            measure("before, asked to think step by step", preset="cot")
    problems = problem_order(sets, proportions, args.seed, args.curriculum)
    problems = itertools.islice(problems, extra["taken"], None)

    began = time.perf_counter()
    with optim.stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            lr = optim.learning_rate(step, steps, args.lr, args.warmup)
            groups, metrics = learn_step(policy, ref_params, optimizer, problems, step, lr, args)
            extra["taken"] += len(groups)
            last = step == steps
            stopping = stop_requested()
            evaluating = last or step % args.eval_every == 0 or step in epoch_ends
            line = STEP_LINE
            if evaluating:
                line += " | dev accuracy {dev_accuracy:.3f}"
                accuracy = evaluate(policy, dev, groups, args, run, step)
                metrics["dev_accuracy"] = accuracy
                if accuracy > extra["best"]:
                    extra["best"] = accuracy
                    best_step = step
            mean_s = (time.perf_counter() - began) / (step - done)
            optim.log_step(run, line, metrics | {
                "steps": steps, "epoch": extra["taken"] / num_problems,
                "left_min": mean_s * (steps - step) / 60})
            extra["failures"] = optim.count_failures(extra["failures"], metrics["skipped"], args.lr)
            if last or step in epoch_ends:
                measure("after" if last else f"after epoch {epoch_ends[step]}")
            if evaluating or stopping or step % args.save_every == 0:
                optim.save_checkpoint(run.dir, step, params, config, path, optimizer, extra,
                                      args.keep, best_step)
            if evaluating:
                optim.draw_curves(run.dir, CURVES)
            if stopping and not last:
                return optim.say(f"stopped; go on with: {optim.resume_command()}")
    optim.say(f"best checkpoint, by accuracy {extra['best']:.3f} on the {len(dev)} held-out dev "
              f"problems: {run.dir / 'checkpoints' / 'best'} (step {best_step})")


if __name__ == "__main__":
    optim.run_main(main, parse_args)
