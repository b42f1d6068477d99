"""Group Relative Policy Optimization: reinforcement learning with verifiable rewards.

    python grpo.py                                           # the embedded tiny model, on a laptop
    python grpo.py --model qwen2.5-1.5b                      # GSM8K, one 24 GB GPU
    torchrun --nproc-per-node 8 grpo.py --model qwen2.5-7b   # one node, or several
    python grpo.py --model DIR --data mine.jsonl=2 gsm8k=1   # two problem sets, mixed 2 to 1
    python grpo.py --run-dir runs/grpo --resume              # after Ctrl-C or a crash
    python grpo.py --teacher qwen2.5-math-7b-instruct --model qwen2.5-1.5b   # distillation

Each step (1) samples G completions of each of N problems, (2) grades them, (3) computes the
advantage of a completion, which is how much better it did than its group, and (4) makes one or more
AdamW updates on the clipped policy loss. There is no critic. GRPO, arXiv:2402.03300; DeepSeek-R1,
arXiv:2501.12948.

Departures from the GRPO paper, and the flags that undo them:
1. The loss is the mean over all tokens of a step, not over each completion first, and the upper
   clipping bound is higher (DAPO, arXiv:2503.14476): --loss grpo --clip-high 0.2.
2. The loss has no KL divergence, so there is no reference model: --beta 0.04 --kl k3.
3. A group of equal rewards has no gradient. A new problem replaces it (DAPO), without waiting for
   the rest of the batch: --refill 0.
4. A token is weighted by the ratio of its probabilities under the trainer and the sampler, at most
   --sampler-cap (truncated importance sampling). The ratio differs from 1 only by rounding.
   --sampler-level sequence drops whole completions instead.
5. Advantages are divided by the sample standard deviation (n - 1) plus 1e-4, as in TRL.
On-policy distillation (arXiv:2306.13649, arXiv:2306.08543): with --teacher, the KL divergence is
from that model, and there are no rewards unless --reward names some.
Other losses and advantages are in losses.py, other rewards in data/rewards.py, with their papers.
"""

import argparse
import functools
import itertools
import math
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import launch
import losses
import metrics
import model
import optim
import run
import view
from data import mixture
from data.prompts import PRESETS, THINK_TAGS, encode_prompt, prompt_flag
from data.rewards import REWARDS, Group, has_spread, parse_rewards, reward_group
from engine import Engine, sampling_params
from eval import drop_held_out, drop_long_prompts
from generate import completion_text, generate
from launch import at_least, gather_objects, rank_and_world, say
from losses import group_advantages, policy_loss
from plan import LORA_RANK, choose_trainable, halve_on_oom
from stats import rate_metrics
from verify import verify_many

# Defaults of unset flags: for a tiny model, and for any other.
TINY = {"data": ["arithmetic"], "prompt": "plain", "max_new_tokens": 128, "steps": 80,
        "lr": 5e-4, "micro_tokens": 2048, "checkpointing": False}
OTHERS = {"data": ["gsm8k"], "prompt": "boxed", "max_new_tokens": 1024, "steps": 150,
          "lr": 1e-6, "micro_tokens": 16384, "checkpointing": True}
BOXED_REWARD = ["accuracy=1", "format=0.1"]
LORA_LR = 3e-5  # an adapter tolerates larger steps
PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots]


def add_flags(parser):
    parser.epilog = f"Defaults of unset flags: for a tiny model, {TINY}; for any other, {OTHERS}."
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--data", nargs="+", help="problem sets or .jsonl files, each NAME or NAME=PROPORTION")
    add("--eval-data", help="held-out problems (default: the first of --data)")
    add("--eval-limit", type=at_least(1), default=200, help="dev problems, to choose checkpoints")
    add("--test-limit", type=at_least(0), default=500, help="test problems, before and after")
    add("--eval-every", type=at_least(1), default=25, help="steps between evaluations on dev")
    add("--prompt", type=prompt_flag(PROMPTS), metavar="NAME",
        help=f"prompt style: {', '.join(PROMPTS)}, or your own text containing {{problem}}")
    add("--think-tag", default="think", choices=THINK_TAGS, help="name of the thinking block")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=at_least(1), default=32, help="N: problems per step")
    add("--group", type=at_least(2), default=8, help="G: completions per problem")
    add("--max-new-tokens", type=at_least(1), help="length limit of a completion")
    add("--temperature", type=launch.above(0.0), default=1.0, help="for sampling and scoring")
    add("--max-batch", type=at_least(1), default=128, help="completions that decode at once")
    add("--compile", action="store_true", help="torch.compile a GPU's decode step (a minute, once)")
    add("--refill", type=at_least(0), default=2, help="times to replace a group of equal rewards")
    add("--filter-by-pass-rate", type=launch.between(0.0, 1.0), nargs=2, metavar=("LOW", "HIGH"),
        help="before training, sample G completions of each problem; keep pass rates in this range")
    add("--reward", nargs="+", metavar="NAME=COEFFICIENT", help=f"of {', '.join(REWARDS)}, or "
        "mine.py:short, def short(group) in your mine.py (default: none with --teacher, accuracy=1 "
        f"with --scale mean or a prompt without a box, else {' '.join(BOXED_REWARD)})")
    add("--combine", default="sum", choices=("sum", "normalise"), help="normalise: GDPO")
    losses.add_loss_flags(parser)
    add = parser.add_argument_group("update").add_argument
    add("--teacher", help="model to distil from, with the same tokenizer; --beta is then 1")
    add("--updates", type=at_least(1), default=1, help="mu: optimizer steps on each batch")
    add("--mask-truncated", action="store_true", help="do not train on truncated completions")
    add = parser.add_argument_group("size and length").add_argument
    add("--steps", type=at_least(1), help="batches of rollouts")
    add("--epochs", type=launch.above(0.0), help="passes over the problems, instead of --steps")
    add("--until", type=launch.between(0.0, 1.0), help="stop at this accuracy on dev, such as 0.9")
    add("--train-limit", type=at_least(1), help="training problems of each set, a random subset")
    add("--lora-rank", type=at_least(0), help="rank of the adapter to train; 0: all weights "
        f"(default: 0 if that fits in memory, else {LORA_RANK} with --lr {LORA_LR})")
    add("--micro-tokens", type=at_least(1), help="tokens in one packed row of training")
    add("--free-sampler", action="store_true", help="free a GPU sampler's memory for each update")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, a third more time")
    launch.add_train_flags(parser, lr=None, run_dir="runs/grpo")


def parse_args(argv=None):
    parser = launch.Parser(__doc__)
    add_flags(parser)
    return launch.parse_train_args(parser, argv)


# ------------------------------------------------------------ rollouts


class Policy(NamedTuple):
    """A model and what is needed to sample from it."""
    params: dict[str, torch.Tensor]
    config: model.Config
    tokenizer: Any  # tokenizers.Tokenizer
    system: str | None  # the model's own system turn
    engine: Engine | None = None  # a GPU sampler's cache and graphs


def encode_problem(policy, problem, args):
    return encode_prompt(policy.tokenizer, args.prompt, problem, system=policy.system,
                         think_tag=args.think_tag)


def grade(place, problem, prompt, completions, texts, args):
    """The rewards.Group of these completions, graded."""
    pairs = [(text, problem["answer"]) for text in texts]
    right = verify_many(pairs, strict=PRESETS[args.prompt].grade == "strict")
    group = Group(problem, prompt, texts, completions, right, args.max_new_tokens, args.think_tag,
                  place)
    return reward_group(group, parse_rewards(args.reward))


def sample_groups(policy, problems, args, seed, refills):
    """This process's share of roll_out."""
    rank, world = rank_and_world()
    preset = PRESETS[args.prompt]
    ends = model.end_tokens(policy.tokenizer, policy.config)
    queue = [each for batch in (problems, *refills) for each in batch[rank::world]]
    prompts = [encode_problem(policy, problem, args) for _, problem in queue]
    first = len(problems[rank::world])
    groups = []

    def on_done(i, completions):
        """Grade a complete group; return the index of the prompt that replaces it, if any."""
        texts = [completion_text(policy.tokenizer, c, ends, preset.stop) for c in completions]
        group = grade(*queue[i], prompts[i], completions, texts, args)
        groups.append(group)
        replacement = i + first
        if has_spread(group) or replacement >= len(queue):
            return None
        on_step([], 0, joined=args.group)
        return replacement

    name = "sampling" if args.temperature else "answering"
    with launch.progress_bar(len(problems) * args.group, name, quiet=True) as on_step:
        generate(
            policy.params, policy.config, prompts, num_samples=args.group, seed=seed, first=first,
            seeds=[place for place, _ in queue], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, max_batch=args.max_batch, stop_tokens=ends,
            stop_strings=preset.stop, tokenizer=policy.tokenizer, engine=policy.engine,
            compiled=args.compile, on_step=on_step, on_done=on_done)
    return groups


def roll_out(policy, problems, args, seed=0, refills=()):
    """Sample and grade G completions of each (place, problem): a list of Groups.

    Each process samples its share, and all return every group. The noise of a completion depends
    on (seed, place, sample) alone.
    refills: lists as long as `problems`. As soon as a group is found to have no spread, the problem
    at its index in the next list replaces it.
    """
    sample = functools.partial(sample_groups, policy, problems, args, seed, refills)
    groups = halve_on_oom(args, "max_batch", sample, policy.engine)
    return sorted(itertools.chain(*gather_objects(groups)), key=lambda group: group.place)


def as_sampler(policy):
    """The policy with weights in the sampler's form. On a GPU they overwrite the previous ones."""
    engine = policy.engine
    form = sampling_params(policy.params, policy.config, out=engine and engine.params)
    if engine and form["model.norm.weight"].is_cuda:
        engine.params = form
    return policy._replace(params=form)


def step_seed(args, step):
    return zlib.crc32(f"{args.seed} {step}".encode())


def roll_out_step(policy, orders, step, args):
    """The groups of a step, from the next --prompts problems of each of `orders`.

    A group without spread is replaced by the problem at its place in the next order (dynamic
    sampling, DAPO, section 3.2). So the replacement depends neither on which group ends first nor
    on the number of processes.
    """
    N = args.prompts
    problems, *refills = [list(enumerate(itertools.islice(order, N), i * N))
                          for i, order in enumerate(orders)]
    return roll_out(as_sampler(policy), problems, args, step_seed(args, step), refills)


def with_advantages(groups, args):
    """The groups with their advantages.

    A group without spread gets zeros, and does not count in the standard deviation of the batch. An
    undecided completion gets None, and does not count in the baseline of its group.
    """
    learned = [g for g in groups if has_spread(g)]
    found = torch.empty(0)
    if learned and args.combine == "normalise":
        coefficients = parse_rewards(args.reward)
        parts = {name: losses.as_tensor([g.parts[name] for g in learned]) for name in coefficients}
        found = losses.combined_advantages(parts, coefficients, args.scale)
    elif learned:
        found = group_advantages(losses.as_tensor([g.rewards for g in learned]), args.scale)
    rows = iter(found.tolist())
    result = []
    for g in groups:
        row = next(rows) if has_spread(g) else [0.0] * len(g.rewards)
        advantages = [None if reward is None else a for reward, a in zip(g.rewards, row)]
        result.append(g._replace(advantages=advantages))
    return result


# ------------------------------------------------------------ learning


class Sequence(NamedTuple):
    """What the loss needs of a completion."""
    tokens: list[int]
    logprobs: list[float]  # the sampler's
    advantage: float


def num_tokens(row):
    """The length of a packed row, [(prompt tokens, [Sequence, ...]), ...]."""
    return sum(len(prompt) + sum(len(s.tokens) for s in piece) for prompt, piece in row)


def pack_groups(groups, micro_tokens):
    """[(prompt tokens, [Sequence, ...]), ...] -> rows of groups, each of at most `micro_tokens`.

    A group that does not fit in the rest of a row starts the next. A group longer than a row is
    split, and each part repeats the prompt: the gradient is the same. A completion longer than a
    row gets its own.
    """
    rows = []
    room = 0  # in the last row
    for prompt, sequences in groups:
        size = num_tokens([(prompt, sequences)])
        if size <= room:
            rows[-1].append((prompt, sequences))
            room -= size
            continue
        room = 0
        for sequence in sequences:
            if len(sequence.tokens) > room:
                piece = []
                rows.append([(prompt, piece)])
                room = micro_tokens - len(prompt)
            piece.append(sequence)
            room -= len(sequence.tokens)
    return rows


def training_rows(groups, args):
    """(this process's packed rows, the losses.Total of all processes)."""
    learned = []
    for g in groups:
        sequences = []
        for c, advantage in zip(g.completions, g.advantages):
            masked = args.mask_truncated and c.finish != "stop"
            if advantage is not None and not masked:
                sequences.append(Sequence(c.tokens, c.logprobs, advantage))
        if sequences and (args.teacher or has_spread(g)):
            learned.append((g.prompt, sequences))
    lengths = [len(s.tokens) for _, sequences in learned for s in sequences]
    rank, world = rank_and_world()
    rows = sorted(pack_groups(learned, args.micro_tokens), key=num_tokens, reverse=True)
    ranks = itertools.cycle([*range(world), *reversed(range(world))])  # 0 1 2 2 1 0: even shares
    mine = [row for row, owner in zip(rows, ranks) if owner == rank]
    return mine, losses.loss_total(args.loss, lengths, args.max_new_tokens)


def row_logprobs(params, config, row, temperature, checkpointing=False):
    """(logprobs, entropy, mask), [B, T] each, of the B completions in a packed row.

    row: [(prompt tokens, [Sequence, ...]), ...]; each prompt is computed once.
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(len(prompt), [len(s.tokens) for s in piece]) for prompt, piece in row]
    tokens, reads, targets = [], [], []  # the head at position reads[i] predicts targets[i]
    for prompt, piece in row:
        tokens += prompt
        last = len(tokens) - 1  # predicts the first token of each completion
        for s in piece:
            begin, end = len(tokens), len(tokens) + len(s.tokens)
            tokens += s.tokens
            reads += [last, *range(begin, end - 1)]
            targets += range(begin, end)
    tokens = torch.tensor(tokens, device=device)  # [row]
    hidden = model.packed_hidden_states(params, config, tokens, groups, checkpointing)  # [row, D]
    flat = model.head_logprobs(params, config, hidden[reads], tokens[targets], temperature)
    mask = torch.ones_like(flat[0], dtype=torch.bool)
    lengths = [length for _, piece in groups for length in piece]  # [B]
    return [pad_sequence(x.split(lengths), batch_first=True) for x in (*flat, mask)]


@torch.no_grad()
def score_rows(policy, rows, temperature):
    """The logprobs of row_logprobs for each row, without gradient."""
    return [row_logprobs(policy.params, policy.config, row, temperature)[0] for row in rows]


def row_loss(params, config, row, old_logprobs, ref_logprobs, total, args):
    """policy_loss of one packed row: (loss, stats).

    old_logprobs, ref_logprobs: [B, T], or None: this forward pass's own, and no KL divergence.
    """
    logprobs, entropy, mask = row_logprobs(params, config, row, args.temperature,
                                           args.checkpointing)  # [B, T] each
    if old_logprobs is None:  # on policy: the ratio is exactly 1
        old_logprobs = logprobs.detach()
    sequences = [s for _, piece in row for s in piece]
    advantages = logprobs.new_tensor([s.advantage for s in sequences])  # [B]
    sampled = pad_sequence([logprobs.new_tensor(s.logprobs) for s in sequences],
                           batch_first=True)  # [B, T]
    mismatch = (old_logprobs - sampled) * mask  # [B, T]
    weights = losses.mismatch_weights(mismatch, args.sampler_cap, args.sampler_level)
    if args.loss == "dppo":  # bounds the distance to the sampler itself
        old_logprobs, weights = sampled, torch.ones_like(weights)
    loss, stats = policy_loss(
        logprobs, old_logprobs, ref_logprobs, advantages, mask, loss=args.loss, level=args.level,
        clip_low=args.clip_low, clip_high=args.clip_high, clip_hard=args.clip_hard, beta=args.beta,
        kl=args.kl, total=total.loss, weights=weights)
    if args.entropy_bonus:  # always a mean over the step's tokens
        loss = loss - args.entropy_bonus * (entropy * mask).sum() / total.tokens
    return loss, stats | {"loss": loss.detach(), "mismatch": mismatch.abs().sum(),
                          "sampler_weight": (weights * mask).sum(),
                          "entropy": (entropy.detach() * mask).sum()}


def update(policy, reference, optimizer, rows, total, lr, args):
    """Make --updates optimizer steps on this process's rows. reference: a Policy, for --beta.

    Returns row_loss's stats, summed over rows, processes and optimizer steps, with the "grad_norm"
    of the last step and the number of steps "skipped".
    """
    old = ref = [None] * len(rows)
    if args.beta:
        ref = score_rows(reference, rows, args.temperature)
    if args.updates > 1:
        old = score_rows(policy, rows, args.temperature)
    own = Counter()  # of tensors: reading them in the loop would stall a GPU
    skipped = 0
    for _ in range(args.updates):
        for each in launch.phase_bar(list(zip(rows, old, ref)), "updating"):
            loss, stats = row_loss(policy.params, policy.config, *each, total, args)
            loss.backward()
            own.update(stats)
        done = optim.optimizer_step(optimizer, lr, betas=args.betas, clip=args.clip,
                                    weight_decay=args.weight_decay)
        skipped += done["skipped"]
    sums = Counter(grad_norm=done["grad_norm"], skipped=skipped)
    for share in gather_objects({name: value.item() for name, value in own.items()}):
        sums.update(share)
    return sums


def update_within_memory(policy, reference, optimizer, rows, total, lr, args):
    """`update`, retried on rows half as long if a GPU runs out of memory: the same gradient."""
    if not total.tokens:
        return Counter()
    before = optimizer.updates.item()

    def attempt():
        if optimizer.updates.item() > before:
            raise ValueError(f"memory ran out after the first of --updates {args.updates}; "
                             "--resume with a smaller --micro-tokens")
        optim.clear_gradients(policy.params, optimizer)
        parts = [part for row in rows for part in pack_groups(row, args.micro_tokens)]
        return update(policy, reference, optimizer, parts, total, lr, args)

    if args.free_sampler:
        policy.engine.release()
    sums = halve_on_oom(args, "micro_tokens", attempt, policy.engine)
    args.micro_tokens = min(gather_objects(args.micro_tokens))  # the same rows in every process
    return sums


# ------------------------------------------------------------ defaults


def fill_defaults(args, config):
    """Fill in the unset flags that depend on the model or on other flags. Writes into `args`.

    Raises ValueError for flags that contradict each other.
    """
    if args.epochs and args.steps:
        raise ValueError(f"--steps {args.steps} and --epochs {args.epochs}: expected one of them")
    defaults = TINY if model.is_tiny(config) else OTHERS
    strict = PRESETS[args.prompt or defaults["prompt"]].grade == "strict"
    reward = BOXED_REWARD if strict and args.scale != "mean" else ["accuracy=1"]
    defaults = defaults | {
        "steps": None if args.epochs else defaults["steps"],
        "clip_high": 0.2 if args.loss == "dppo" else 0.28,
        "sampler_cap": 2.0 if args.sampler_level == "token" else 3.0,
        "beta": 1.0 if args.teacher else 0.0,
        "reward": [] if args.teacher else reward,
        "eval_data": mixture.split_number((args.data or defaults["data"])[0])[0]}
    launch.fill_unset(args, defaults)
    if args.adapter:
        args.lora_rank = model.adapter_config(args.adapter, args.lora_rank).r
    if args.teacher and not args.beta:
        raise ValueError("--beta is 0, expected more than 0 with --teacher")
    if parse_rewards(args.reward).keys() - {"accuracy"} and args.scale == "mean":
        raise ValueError("--scale mean is for rewards of 0 and 1, and --reward is "
                         f"{' '.join(args.reward)}; expected accuracy alone")
    if args.clip_hard and args.clip_hard <= 1 + args.clip_high:
        raise ValueError(f"--clip-hard is {args.clip_hard}, expected more than 1 + --clip-high "
                         f"{args.clip_high}")


def check_teacher(args):
    """Raises ValueError unless teacher and student have the same vocabulary."""
    paths = [model.resolve_model(name, config_only=True) for name in (args.model, args.teacher)]
    student, teacher = (model.load_tokenizer(path).get_vocab() for path in paths)
    if student != teacher:
        raise ValueError(f"--teacher {args.teacher}: the tokens of its tokenizer differ from those "
                         f"of --model {args.model}; use a teacher of the student's family")


def resolve_flags(args, config):
    """Fill in every unset flag, from the model, the other flags and the available memory.

    Writes into `args`. Raises ValueError for flags that contradict each other or do not fit.
    """
    lr = args.lr
    fill_defaults(args, config)
    if args.teacher:
        check_teacher(args)
    choose_trainable(config, args)
    if args.lora_rank:
        args.lr = lr or LORA_LR


# ------------------------------------------------------------ the run


def load_data(policy, args):
    """(training sets, dev, test). Held-out problems are not trained on.

    Sets the flag args.data_sha256, so that --resume refuses changed data.
    """
    sets, _ = mixture.load_mixture(args.data, args.train_limit)
    held_out = mixture.load_held_out(args.eval_data, args.data, args.eval_limit, args.test_limit)
    *sets, dev, test = [
        drop_long_prompts(problems, policy.tokenizer, policy.config, args.prompt,
                          args.max_new_tokens, system=policy.system, think_tag=args.think_tag)
        for problems in (*sets, *held_out)]
    for path in mixture.files_of(args.data) & mixture.files_of([args.eval_data]):
        say(f"{path} is used for training and for evaluation: a tenth is held out as dev and test")
    shared = set(mixture.keys_of(dev)) & set(mixture.keys_of(test))
    if shared:
        say(f"{len(shared)} of {len(test)} test problems are also dev problems, on which the best "
            "checkpoint is chosen")
    held_out = mixture.keys_of(dev + test)
    sets = [drop_held_out(problems, mixture.keys_of(problems), held_out, word)
            for problems, word in zip(sets, args.data)]
    args.data_sha256 = mixture.data_hash(*sets, dev, test)
    return sets, dev, test


def filter_by_pass_rate(sets, policy, args, counts):
    """The sets without the problems that the policy solves too rarely or too often.

    counts: {id: [right, sampled]}; filled if empty. Raises ValueError if a set is left empty.
    """
    low, high = args.filter_by_pass_rate
    if not counts:
        problems = list(enumerate(sum(sets, [])))
        say(f"sampling {args.group} completions of each of {len(problems)} problems")
        sampler = as_sampler(policy)
        for begin in range(0, len(problems), args.prompts):
            batch = problems[begin:begin + args.prompts]
            metrics.count_right(roll_out(sampler, batch, args, step_seed(args, 0)), counts)
    rates = {name: right / sampled for name, (right, sampled) in counts.items()}
    kept = [[p for p in problems if low <= rates[p["id"]] <= high] for problems in sets]
    found = list(rates.values())
    summary = (f"--filter-by-pass-rate {low:g} {high:g} keeps {sum(map(len, kept))} of "
               f"{len(found)} problems; {found.count(0)} are never solved, {found.count(1)} always")
    if not all(kept):
        raise ValueError(f"{summary}. A set is left empty: widen the bounds")
    say(summary)
    return kept


def problem_orders(sets, done, args):
    """The problems after `done` steps, in a separate order for each attempt of --refill."""
    proportions = [mixture.split_number(word)[1] for word in args.data]
    for attempt in range(1 if args.teacher else 1 + args.refill):
        seed = f"{args.seed}, refill {attempt}" if attempt else args.seed
        order = mixture.problem_order(sets, proportions, seed)
        yield itertools.islice(order, done * args.prompts, None)


class Training(NamedTuple):
    """An open run."""
    policy: Policy
    reference: Policy
    optimizer: optim.Optimizer
    orders: list  # of problem_orders
    num_problems: int  # to train on
    dev: list[dict]
    test: list[dict]
    progress: dict  # saved with each checkpoint
    run: run.Run
    model_dir: Path  # of the initial model
    trained_on: set[str]  # keys of problems
    done: int  # steps before this start
    args: argparse.Namespace


def make_reference(params, config, args):
    """The Policy that the KL divergence is from: --teacher, or a copy of the initial weights."""
    weights = None
    if args.teacher:
        path = model.resolve_model(args.teacher)
        head = model.head_weight(params)
        config = model.load_config(path)
        weights = model.load_params(path, head.device, head.dtype)
    elif args.beta:  # frozen weights are shared, not copied
        weights = {name: tensor.detach().clone() if tensor.requires_grad else tensor
                   for name, tensor in params.items()}
    return Policy(weights, config, None, None)


def open_training(args):
    """The Training that the flags describe."""
    config = model.load_config(model.resolve_model(args.model, config_only=True))
    resolve_flags(args, config)
    run.claim_run_dir(args)
    path = model.resolve_model(args.model)
    policy = Policy(None, config, model.load_tokenizer(path), model.load_system_prompt(path),
                    Engine())
    sets, dev, test = load_data(policy, args)
    base = run.load_base(path, args)  # before forking, so that processes share frozen weights
    _, world, device = launch.init_distributed(args.device, args.processes, args.timeout_min)
    opened, checkpoint = run.start_run(args)
    params, optimizer = run.make_trainable(base, config, args, device)
    del base
    policy = policy._replace(params=params)
    reference = make_reference(params, config, args)  # of the initial weights, not a checkpoint's
    state = run.load_checkpoint(checkpoint, optimizer)
    progress = {"failures": 0, "rows": [], "dev": [], "right": {}, "pass_rates": {}}
    progress |= state["extra"]
    if args.filter_by_pass_rate:
        sets = filter_by_pass_rate(sets, policy, args, progress["pass_rates"])
    problems = sum(sets, [])
    say(f"{len(problems)} training problems, {len(dev)} dev, {len(test)} test, {world} x {device}")
    trained_on = run.read_trained_on(args.adapter).union(mixture.keys_of(problems))
    orders = list(problem_orders(sets, state["step"], args))
    return Training(policy, reference, optimizer, orders, len(problems), dev, test, progress,
                    opened, path, trained_on, state["step"], args)


def answer_greedily(sampler, problems, args, prompt=None):
    """A Group of one completion for each problem. prompt: in place of --prompt."""
    changes = {"group": 1, "temperature": 0.0, "prompt": prompt or args.prompt}
    return roll_out(sampler, list(enumerate(problems)), argparse.Namespace(**vars(args) | changes))


def evaluate_dev(training, sampler, step, groups=()):
    """rate_metrics on dev, recorded in `progress`. Logs a few groups to samples.jsonl."""
    progress = training.progress
    answered = answer_greedily(sampler, training.dev, training.args)
    shown = (metrics.sample_records(groups[:4], "rollout", sampler.tokenizer)
             + metrics.sample_records(answered[:8], "held_out", sampler.tokenizer))
    run.log_samples(training.run, step, shown)
    right = metrics.right_answers(answered)
    progress["dev"] = metrics.keep_first_and_best([*progress["dev"], [step, right]])
    return rate_metrics("dev_accuracy", right)


def evaluate_test(training, sampler, method, prompt=None):
    """Add a row on the test split to results.md, unless --test-limit is 0."""
    if training.test:
        answered = answer_greedily(sampler, training.test, training.args, prompt)
        metrics.add_result(training.run, training.progress["rows"], method, answered)


def save(training, step):
    """Write a checkpoint, and point `best` to the best one."""
    policy = training.policy
    best_step, _ = training.progress["dev"][-1]
    run.save_checkpoint(training.run.dir, step, policy.params, policy.config, training.model_dir,
                        training.optimizer, training.progress, training.args.keep, best_step,
                        training.trained_on)


def evaluate_start(training):
    """Evaluate and save the model before training."""
    sampler = as_sampler(training.policy)
    record = {"step": 0} | evaluate_dev(training, sampler, 0)
    run.log_step(training.run, "step {step}" + metrics.DEV_ACCURACY, record)
    evaluate_test(training, sampler, "before")
    if training.args.prompt != "cot":
        evaluate_test(training, sampler, "before, asked to think step by step", "cot")
    save(training, 0)


def finish_step(training, groups, record, stop_requested):
    """Evaluate, log and save, each when it is due; return whether this was the last step.

    record: the metrics of the step. Raises KeyboardInterrupt if asked to stop.
    """
    args, progress, step = training.args, training.progress, record["step"]
    finished = step == record["steps"]
    epoch_ends = args.epochs and step * args.prompts % training.num_problems < args.prompts
    evaluating = finished or step % args.eval_every == 0 or epoch_ends
    line = metrics.STEP_LINE + bool(args.beta) * metrics.KL
    if evaluating:
        sampler = as_sampler(training.policy)
        record |= evaluate_dev(training, sampler, step, groups)
        line += metrics.DEV_ACCURACY
    last = finished or metrics.reached(progress["dev"], args.until)
    stopping = stop_requested()
    run.log_step(training.run, line, record)
    progress["failures"] = optim.count_failures(progress["failures"], record["skipped"], args.lr)
    if last or epoch_ends:
        method = "after" if last else f"after epoch {int(record['epoch'])}"
        evaluate_test(training, sampler, method)
    if evaluating or stopping or step % args.save_every == 0:
        save(training, step)
    if evaluating:
        view.write_report(training.run)
    if stopping and not last:
        raise KeyboardInterrupt  # saved; run_main prints how to resume
    return last


def main(args):
    training = open_training(args)
    policy, reference, optimizer, *_ = training
    progress = training.progress
    steps = args.steps or math.ceil(args.epochs * training.num_problems / args.prompts)
    if not progress["dev"]:
        evaluate_start(training)
    if metrics.reached(progress["dev"], args.until):
        steps = training.done
    view.write_report(training.run)

    began = time.perf_counter()
    with run.stop_signals() as stop_requested:
        for step in range(training.done + 1, steps + 1):
            lr = optim.learning_rate(step, steps, args.lr, args.warmup)
            start = time.perf_counter()
            groups = with_advantages(roll_out_step(policy, training.orders, step, args), args)
            rolled = time.perf_counter()
            rows, total = training_rows(groups, args)
            learned = update_within_memory(policy, reference, optimizer, rows, total, lr, args)
            updated = time.perf_counter()
            metrics.count_right(groups, progress["right"])
            num_sampled = sum(len(c.tokens) for g in groups for c in g.completions)
            peaks = gather_objects(launch.peak_memory_gib(optimizer.params.device))
            record = metrics.step_metrics(groups, learned, args) | {
                "step": step, "steps": steps, "epoch": step * args.prompts / training.num_problems,
                "lr": lr, "time": time.time(),
                "rollout_s": rolled - start, "update_s": updated - rolled,
                "tokens_per_s": num_sampled / (updated - start),
                "left_min": (updated - began) / (step - training.done) * (steps - step) / 60,
                "peak_memory_gib": max(peaks)}
            if finish_step(training, groups, record, stop_requested):
                break
    metrics.save_solved(training.run, progress["right"])
    best = training.run.dir / "checkpoints" / "best"
    say(f"{metrics.training_verdict(progress['dev'])}; best checkpoint: {best}")


if __name__ == "__main__":
    launch.run_main(main, parse_args)
