"""Group Relative Policy Optimization: reinforcement learning with verifiable rewards.

    python grpo.py                                           # the embedded tiny model, on a laptop
    python grpo.py --model qwen2.5-1.5b                      # GSM8K, one 24 GB GPU
    torchrun --nproc-per-node 8 grpo.py --model qwen2.5-7b   # one node, or several
    python grpo.py --model DIR --data mine.jsonl=2 gsm8k=1   # a mixture of problem sets, 2 to 1
    python grpo.py --run-dir runs/grpo --resume              # goes on after Ctrl-C or a crash
    python grpo.py --teacher qwen2.5-math-7b-instruct --model qwen2.5-1.5b   # distillation

A step: (1) roll out G completions of each of N problems; (2) grade them; (3) the advantage of a
completion is how much better it did than its group; (4) one or more AdamW updates of the clipped
policy loss. There is no critic. GRPO, arXiv:2402.03300; DeepSeek-R1, arXiv:2501.12948.

Where this departs from the GRPO paper, and what undoes it:
1. The loss is the mean over all tokens of a step, not over each completion first, and the ratio is
   clipped later from above (DAPO, arXiv:2503.14476): --loss grpo --clip-high 0.2.
2. There is no KL divergence in the loss, and so no reference model: --beta 0.04 --kl k3.
3. Groups of equal rewards teach nothing, and new problems replace them (DAPO), at once, in the
   batch that is running: --refill 0.
4. A token is weighted by the trainer's probability over the sampler's, at most --sampler-cap
   (truncated importance sampling); that is 1 but for rounding. --sampler-level sequence leaves out
   whole completions instead.
5. The deviation that divides the advantages is over n - 1, plus 1e-4, as in TRL.
On-policy distillation (arXiv:2306.13649, arXiv:2306.08543): with --teacher, that KL divergence is
from another model, and there are no rewards unless --reward names them.
Other losses and advantages are in losses.py, other rewards in data/rewards.py, with their papers.
"""

import argparse
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
from data.rewards import REWARDS, has_spread, parse_rewards, reward_group
from engine import Engine, sampling_params
from eval import drop_long_prompts, leave_out
from generate import completion_text, generate
from launch import at_least, below_one, gather_objects, rank_and_world, say
from losses import group_advantages, policy_loss
from plan import fit_memory, halve_on_oom, plan_grpo, plan_line
from stats import rate_metrics
from verify import verify_many

# What a flag left out means for a tiny model, and for any other.
TINY = {"data": ["arithmetic"], "prompt": "plain", "max_new_tokens": 128, "steps": 80,
        "lr": 5e-4, "micro_tokens": 2048, "checkpointing": False}
OTHERS = {"data": ["gsm8k"], "prompt": "boxed", "max_new_tokens": 1024, "steps": 150,
          "lr": 1e-6, "micro_tokens": 16384, "checkpointing": True}
REWARDED = ["accuracy=1", "format=0.1"]  # the format where a box is asked for
LORA_RANK = 32  # where all weights do not fit the memory
LORA_LR = 3e-5  # an adapter stands larger steps
PROMPTS = [name for name, preset in PRESETS.items() if not preset.shots]


def add_flags(parser):
    parser.epilog = f"Flags left out mean, for a tiny model, {TINY}; for any other, {OTHERS}."
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--data", nargs="+", help="problem sets or .jsonl files, each NAME or NAME=PROPORTION")
    add("--eval-data", help="held-out problems (default the first of --data)")
    add("--eval-limit", type=at_least(1), default=200, help="dev problems, for choosing")
    add("--test-limit", type=at_least(0), default=500, help="test problems, before and after")
    add("--eval-every", type=at_least(1), default=25, help="steps between evaluations on dev")
    add("--prompt", type=prompt_flag(PROMPTS), metavar="NAME",
        help=f"how a problem is put: {', '.join(PROMPTS)}, or your text with {{problem}} in it")
    add("--think-tag", default="think", choices=THINK_TAGS, help="name of the thinking block")
    add = parser.add_argument_group("rollouts").add_argument
    add("--prompts", type=at_least(1), default=32, help="N: problems in a step")
    add("--group", type=at_least(2), default=8, help="G: completions of each")
    add("--max-new-tokens", type=at_least(1), help="tokens of the longest completion")
    add("--temperature", type=launch.above(0.0), default=1.0, help="of sampling and of scoring")
    add("--max-batch", type=at_least(1), default=128, help="rows that decode at once")
    add("--compile", action="store_true", help="torch.compile a GPU's decode step (a minute, once)")
    add("--refill", type=at_least(0), default=2, help="times to replace a group of equal rewards")
    add("--filter-by-pass-rate", type=launch.between(0.0, 1.0), nargs=2, metavar=("LOW", "HIGH"),
        help="before training, ask each problem G times and keep those solved this often")
    add("--reward", nargs="+", metavar="NAME=COEFFICIENT", help=f"of {', '.join(REWARDS)}, or "
        "mine.py:short, def short(group) in your mine.py (default none with --teacher, accuracy=1 "
        f"with --scale mean or a prompt that asks for no box, else {' '.join(REWARDED)})")
    add("--combine", default="sum", choices=("sum", "normalise"), help="normalise: GDPO")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="dapo", choices=losses.LOSSES)
    add("--level", default="token", choices=("token", "sequence"), help="sequence: GSPO's ratio")
    add("--scale", default="group", choices=("group", "batch", "none", "mean"), help="of the "
        "advantages: by whose standard deviation, or by the group's mean (MaxRL), they are divided")
    add("--clip-low", type=below_one, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip-high", type=at_least(0.0), help="and above 1 + this (default 0.28, of dppo 0.2, "
        "whose bounds are of the probability's change)")
    add("--clip-hard", type=launch.above(1.0), help="and, where the advantage is negative, here")
    add("--teacher", help="a model of the same tokenizer to learn from, by --beta (then 1)")
    add("--beta", type=at_least(0.0), help="weight of the KL divergence from the start (default 0)")
    add("--kl", default="k3_corrected", choices=("k1", "k2", "k3", "k3_corrected"))
    add("--entropy-bonus", type=float, default=0.0, help="factor of the entropy")
    add("--updates", type=at_least(1), default=1, help="mu: optimizer steps on each batch")
    add("--sampler-level", default="token", choices=("token", "sequence"), help="where sampler and "
        "trainer disagree, truncate a token's weight, or leave out the whole completion")
    add("--sampler-cap", type=at_least(1.0), help="beyond this ratio (default 2; of sequence 3)")
    add("--mask-truncated", action="store_true", help="completions that were cut off are left out")
    add = parser.add_argument_group("size and length").add_argument
    add("--steps", type=at_least(1), help="batches of rollouts")
    add("--epochs", type=launch.above(0.0), help="passes over the problems, instead of --steps")
    add("--until", type=launch.between(0.0, 1.0), help="stop at this accuracy on dev, such as 0.9")
    add("--train-limit", type=at_least(1), help="training problems of each set, a random subset")
    add("--lora-rank", type=at_least(0), help="train an adapter of this rank; 0: all weights "
        f"(default 0 where memory allows, else {LORA_RANK}, with --lr {LORA_LR})")
    add("--micro-tokens", type=at_least(1), help="tokens in one packed row of training")
    add("--free-sampler", action="store_true", help="a GPU's sampler makes room for each update")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, a third more time")
    launch.add_train_flags(parser, lr=None, run_dir="runs/grpo")


def parse_args(argv=None):
    parser = launch.Parser(__doc__)
    add_flags(parser)
    return launch.parse_train_args(parser, argv)


# ------------------------------------------------------------ rollouts


class Group(NamedTuple):
    """A problem and its G completions, as the reward functions see them, and their grades."""
    problem: dict
    prompt: list[int]  # tokens
    texts: list[str]  # without end tokens, and without what the prompt opened of the thinking block
    completions: list  # of generate.Completion: tokens, logprobs, finish
    right: list[bool | None]  # None: undecided
    max_new_tokens: int
    think_tag: str
    place: int = 0  # of the problem in the step
    parts: dict[str, list] = {}  # each reward by name, [G]
    rewards: list[float | None] = ()  # [G] their sum, each times its coefficient; None: undecided
    advantages: list[float | None] = ()  # [G] None: undecided, and not learned from


class Policy(NamedTuple):
    """A model, and what is needed to ask it."""
    params: dict[str, torch.Tensor]
    config: model.Config
    tokenizer: Any  # tokenizers.Tokenizer
    system: str | None  # the model's own system turn
    engine: Engine | None = None  # the sampler's, which a GPU keeps


def encode_problem(policy, problem, args):
    return encode_prompt(policy.tokenizer, args.prompt, problem, system=policy.system,
                         think_tag=args.think_tag)


def grade(policy, place, problem, prompt, completions, args):
    """The Group of these completions, rewarded."""
    preset = PRESETS[args.prompt]
    ends = model.end_tokens(policy.tokenizer, policy.config)
    texts = [completion_text(policy.tokenizer, c, ends, preset.stop) for c in completions]
    pairs = [(text, problem["answer"]) for text in texts]
    group = Group(problem, prompt, texts, completions,
                  verify_many(pairs, strict=preset.grade == "strict"), args.max_new_tokens,
                  args.think_tag, place)
    return reward_group(group, parse_rewards(args.reward))


def roll_out(policy, problems, args, seed=0, refills=()):
    """A Group for each (place, problem); each process samples its share, and all get every group.

    A completion's noise derives from (seed, place, sample) alone.
    refills: lists as long as `problems`. A group without spread is replaced, while others are still
    being sampled: by what stands at its index in the first list, then in the next.
    """
    rank, world = rank_and_world()
    asked = [(place, problem, encode_problem(policy, problem, args))
             for batch in (problems, *refills) for place, problem in batch[rank::world]]
    first = len(problems[rank::world])

    def sample():
        groups = []

        def on_done(i, completions):
            groups.append(grade(policy, *asked[i], completions, args))
            if has_spread(groups[-1]) or i + first >= len(asked):
                return None
            on_step([], 0, joined=args.group)
            return i + first

        name = "sampling" if args.temperature else "answering"
        with launch.progress_bar(len(problems) * args.group, name, quiet=True) as on_step:
            generate(
                policy.params, policy.config, [prompt for _, _, prompt in asked],
                num_samples=args.group, seed=seed, first=first,
                seeds=[place for place, _, _ in asked], max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, max_batch=args.max_batch,
                stop_tokens=model.end_tokens(policy.tokenizer, policy.config),
                stop_strings=PRESETS[args.prompt].stop, tokenizer=policy.tokenizer,
                engine=policy.engine, compiled=args.compile, on_step=on_step, on_done=on_done)
        return groups

    groups = halve_on_oom(args, "max_batch", sample, policy.engine)
    return sorted(itertools.chain(*gather_objects(groups)), key=lambda group: group.place)


def as_sampler(policy):
    """The policy with its weights in the sampler's form; on a GPU, in the place of those before."""
    engine = policy.engine
    form = sampling_params(policy.params, policy.config, out=engine and engine.form)
    if engine and form["model.norm.weight"].is_cuda:
        engine.form = form
    return policy._replace(params=form)


def roll_out_step(policy, orders, step, args):
    """The groups of a step, on the next --prompts problems of each of `orders`.

    Those of the first order are asked. A group without spread is replaced by the problem that has
    its place in the next order, up to --refill times (dynamic sampling, DAPO, section 3.2): which
    one that is depends neither on who ends first nor on the number of processes.
    """
    N = args.prompts
    problems, *refills = [list(enumerate(itertools.islice(order, N), i * N))
                          for i, order in enumerate(orders)]
    seed = zlib.crc32(f"{args.seed} {step}".encode())
    return roll_out(as_sampler(policy), problems, args, seed, refills)


def as_tensor(rows):
    """Lists of floats as [N, G], with nan for None."""
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows])


def with_advantages(groups, args):
    """The groups with their advantages.

    A group without spread gets zeros, and does not count towards the deviation of the batch. An
    undecided completion gets None, and does not count towards the baseline of its group.
    """
    learned = [g for g in groups if has_spread(g)]
    found = torch.empty(0)
    if learned and args.combine == "normalise":
        coefficients = parse_rewards(args.reward)
        parts = {name: as_tensor([g.parts[name] for g in learned]) for name in coefficients}
        found = losses.combined_advantages(parts, coefficients, args.scale)
    elif learned:
        found = group_advantages(as_tensor([g.rewards for g in learned]), args.scale)
    rows = iter(found.tolist())
    advantages = [next(rows) if has_spread(g) else [0.0] * len(g.rewards) for g in groups]
    return [g._replace(advantages=[None if r is None else a for r, a in zip(g.rewards, row)])
            for g, row in zip(groups, advantages)]


# ------------------------------------------------------------ learning


class Sequence(NamedTuple):
    """One completion as the loss needs it."""
    tokens: list[int]
    logprobs: list[float]  # the sampler's
    advantage: float


def num_tokens(row):
    """Of a packed row: [(prompt tokens, [Sequence, ...]), ...]."""
    return sum(len(prompt) + sum(len(s.tokens) for s in piece) for prompt, piece in row)


def pack_groups(groups, micro_tokens):
    """[(prompt tokens, [Sequence, ...]), ...] -> rows of groups, of at most `micro_tokens` tokens.

    A group that does not fit the rest of a row begins another; one that is too long for a row is
    divided, each part pays for the prompt, and the gradient is the same. A completion that is
    longer by itself has its own row.
    """
    rows = []
    room = 0  # in the last row
    for prompt, sequences in groups:
        if num_tokens([(prompt, sequences)]) > room:
            room = 0
        piece = []
        for sequence in sequences:
            size = len(sequence.tokens)
            if size + (0 if piece else len(prompt)) > room:
                rows.append([])
                room = micro_tokens
                piece = []
            if not piece:
                rows[-1].append((prompt, piece))
                room -= len(prompt)
            piece.append(sequence)
            room -= size
    return rows


def training_rows(groups, args):
    """(this process's packed rows, `total` of policy_loss over all); a total of 0: no update."""
    learned = []
    for g in groups:
        if args.teacher or has_spread(g):
            sequences = [Sequence(c.tokens, c.logprobs, advantage)
                         for c, advantage in zip(g.completions, g.advantages)
                         if advantage is not None
                         and (c.finish == "stop" or not args.mask_truncated)]
            learned.append((g.prompt, sequences))
    lengths = [len(s.tokens) for _, sequences in learned for s in sequences]
    rank, world = rank_and_world()
    rows = sorted(pack_groups(learned, args.micro_tokens), key=num_tokens, reverse=True)
    turns = itertools.cycle([*range(world), *reversed(range(world))])  # there and back: fair
    mine = [row for row, turn in zip(rows, turns) if turn == rank]
    return mine, losses.loss_total(args.loss, lengths, args.max_new_tokens)


def row_logprobs(params, config, row, temperature, checkpointing=False):
    """(logprobs, entropy, mask), [B, T] each, of the B completions of a packed row.

    row: [(prompt tokens, [Sequence, ...]), ...]; each prompt is computed once.
    """
    device = params["model.embed_tokens.weight"].device
    groups = [(len(prompt), [len(s.tokens) for s in piece]) for prompt, piece in row]
    tokens, reads, targets = [], [], []  # the head reads, and so predicts a target
    for prompt, piece in row:
        tokens += prompt
        last = len(tokens) - 1  # which predicts the first token of each completion
        for s in piece:
            begin, end = len(tokens), len(tokens) + len(s.tokens)
            tokens += s.tokens
            reads += [last, *range(begin, end - 1)]
            targets += range(begin, end)
    tokens = torch.tensor(tokens, device=device)  # [row]
    hidden = model.packed_hidden_states(params, config, tokens, groups, checkpointing)  # [row, D]
    flat = model.head_logprobs(params, config, hidden[reads], tokens[targets], temperature)
    counted = torch.ones_like(flat[0], dtype=torch.bool)
    lengths = [length for _, piece in groups for length in piece]  # B of them
    return [pad_sequence(x.split(lengths), batch_first=True) for x in (*flat, counted)]


def row_loss(params, config, row, old_logprobs, ref_logprobs, total, args):
    """policy_loss of one packed row: (loss, stats).

    old_logprobs, ref_logprobs: [B, T], or None: those of this very pass, and no KL divergence.
    """
    logprobs, entropy, mask = row_logprobs(params, config, row, args.temperature,
                                           args.checkpointing)  # [B, T] each
    if old_logprobs is None:  # on policy: no rounding can be clipped
        old_logprobs = logprobs.detach()
    new = logprobs.new_tensor
    sequences = [s for _, piece in row for s in piece]
    sampled = pad_sequence([new(s.logprobs) for s in sequences], batch_first=True)  # [B, T]
    mismatch = (old_logprobs - sampled) * mask  # [B, T]
    weights = losses.mismatch_weights(mismatch, args.sampler_cap, args.sampler_level)
    if args.loss == "dppo":  # its bounds are around the sampler itself
        old_logprobs, weights = sampled, torch.ones_like(weights)
    loss, stats = policy_loss(
        logprobs, old_logprobs, ref_logprobs, new([s.advantage for s in sequences]), mask,
        loss=args.loss, level=args.level, clip_low=args.clip_low, clip_high=args.clip_high,
        clip_hard=args.clip_hard, beta=args.beta, kl=args.kl, total=total.loss, weights=weights)
    if args.entropy_bonus:  # the mean over the step's tokens, whatever the loss divides by
        loss = loss - args.entropy_bonus * (entropy * mask).sum() / total.tokens
    return loss, stats | {"loss": loss.detach(), "mismatch": mismatch.abs().sum(),
                          "sampler_weight": (weights * mask).sum(),
                          "entropy": (entropy.detach() * mask).sum()}


def update(policy, reference, optimizer, rows, total, lr, args):
    """--updates optimizer steps on this process's rows. reference: a Policy, for --beta.

    Returns row_loss's stats, summed over the rows of all processes and all steps, the "grad_norm"
    of the last step, and how many steps were "skipped".
    """
    params, config, *_ = policy
    how = (args.temperature, args.checkpointing)
    old = ref = [None] * len(rows)
    with torch.no_grad():
        if args.beta:
            ref = [row_logprobs(*reference[:2], row, *how)[0] for row in rows]
        if args.updates > 1:
            old = [row_logprobs(params, config, row, *how)[0] for row in rows]
    own = Counter()  # of tensors, so that the device is not waited for
    skipped = 0
    for _ in range(args.updates):
        for each in launch.phase_bar(list(zip(rows, old, ref)), "updating"):
            loss, stats = row_loss(params, config, *each, total, args)
            loss.backward()
            own.update(stats)
        norms = optim.optimizer_step(optimizer, lr, betas=args.betas, clip=args.clip,
                                     weight_decay=args.weight_decay)
        skipped += norms["skipped"]
    sums = Counter(grad_norm=norms["grad_norm"], skipped=skipped)
    for share in gather_objects({name: value.item() for name, value in own.items()}):
        sums.update(share)
    return sums


def update_within_memory(policy, reference, optimizer, rows, total, lr, args):
    """`update`, with rows of half the tokens where a GPU's memory runs out: the same gradient."""
    if not total.tokens:
        return Counter()
    before = optimizer.updates.item()

    def attempt():
        if optimizer.updates.item() > before:
            raise ValueError(f"memory ran out in the midst of --updates {args.updates}: go on with "
                             "--resume and a smaller --micro-tokens")
        optim.clear_gradients(policy.params, optimizer)
        parts = [part for row in rows for part in pack_groups(row, args.micro_tokens)]
        return update(policy, reference, optimizer, parts, total, lr, args)

    if args.free_sampler:
        policy.engine.release()
    sums = halve_on_oom(args, "micro_tokens", attempt, policy.engine)
    args.micro_tokens = min(gather_objects(args.micro_tokens))  # one for all, who deal the rows
    return sums


# ------------------------------------------------------------ flags left out


def fill_defaults(args, config):
    """Fill in the flags that were left out and depend on the model or on others, in `args`.

    Raises ValueError for flags that contradict each other.
    """
    if args.epochs and args.steps:
        raise ValueError(f"--steps is {args.steps}, expected nothing beside --epochs {args.epochs}")
    defaults = TINY if model.is_tiny(config) else OTHERS
    boxed = PRESETS[args.prompt or defaults["prompt"]].grade == "strict" and args.scale != "mean"
    defaults = defaults | {
        "steps": None if args.epochs else defaults["steps"],
        "clip_high": 0.2 if args.loss == "dppo" else 0.28,
        "sampler_cap": 2.0 if args.sampler_level == "token" else 3.0,
        "beta": 1.0 if args.teacher else 0.0,
        "reward": [] if args.teacher else REWARDED[:1 + boxed],
        "eval_data": mixture.split_number((args.data or defaults["data"])[0])[0]}
    launch.fill_unset(args, defaults)
    if args.adapter:
        args.lora_rank = model.adapter_config(args.adapter, args.lora_rank).r
    if args.teacher and not args.beta:
        raise ValueError("--beta is 0, expected more than 0 beside --teacher, which it weighs")
    if parse_rewards(args.reward).keys() - {"accuracy"} and args.scale == "mean":
        raise ValueError("--scale mean is for rewards of 0 and 1, and --reward is "
                         f"{' '.join(args.reward)}; expected accuracy alone")
    if args.clip_hard and args.clip_hard <= 1 + args.clip_high:
        raise ValueError(f"--clip-hard is {args.clip_hard}, expected more than 1 + --clip-high "
                         f"{args.clip_high}")


def check_teacher(args):
    """Raises ValueError unless the teacher reads the student's tokens as the student means them."""
    paths = [model.resolve_model(name, config_only=True) for name in (args.model, args.teacher)]
    student, teacher = (model.load_tokenizer(path).get_vocab() for path in paths)
    if student != teacher:
        raise ValueError(f"--teacher {args.teacher}: the tokens of its tokenizer are not those of "
                         f"--model {args.model}; take a teacher of the student's family")


def resolve_flags(args, config):
    """Fill in the unset flags from the model and the available memory; print what is trained.

    Writes into `args`. Raises ValueError for flags that contradict each other, and when not even an
    adapter fits in memory.
    """
    device = launch.find_device(args.device).type
    world = max(rank_and_world()[1], args.processes or 1)
    available_gib = launch.total_memory_gib(device, world)
    lr = args.lr
    fill_defaults(args, config)
    if args.teacher:
        check_teacher(args)
    automatic = args.lora_rank is None
    args.lora_rank = args.lora_rank or 0
    plan = plan_grpo(config, args, world, device)
    if automatic and plan.peak > available_gib:
        args.lora_rank = LORA_RANK
        plan = fit_memory(config, args, world, device, available_gib)
    sizes = f"--micro-tokens {args.micro_tokens} and --max-batch {args.max_batch}"
    if automatic and plan.peak > available_gib:
        raise ValueError(
            f"not even an adapter of rank {LORA_RANK} fits: it needs {plan.peak:.1f} GiB at "
            f"{sizes}, and {available_gib:.1f} are available; try a smaller --max-new-tokens, or "
            f"more GPUs; `python bench.py plan --model {args.model}` shows what fits")
    trained = "all weights"
    if args.lora_rank:
        args.lr = lr or LORA_LR
        trained = (f"an adapter of rank {args.lora_rank} (--lora-rank 0: all weights) with {sizes}"
                   + args.free_sampler * " --free-sampler")
    say(f"training {trained}: {plan_line(plan, available_gib)}")
    if args.processes is None:
        args.processes = launch.default_processes(args.device, plan.peak - plan.shared, plan.shared)


# ------------------------------------------------------------ the run


def load_data(policy, args):
    """(sets of problems to train on, dev, test), with their hash as a flag: --resume must find the
    same. Those that are held out are not trained on."""
    sets, _ = mixture.load_mixture(args.data, args.train_limit)
    held_out = mixture.load_held_out(args.eval_data, args.data, args.eval_limit, args.test_limit)
    *sets, dev, test = [
        drop_long_prompts(problems, policy.tokenizer, policy.config, args.prompt,
                          args.max_new_tokens, system=policy.system, think_tag=args.think_tag)
        for problems in (*sets, *held_out)]
    for path in mixture.files_of(args.data) & mixture.files_of([args.eval_data]):
        say(f"{path} is given for training and for evaluation: a tenth of it is held out, "
            "for dev and test alike")
    shared = set(mixture.keys_of(dev)) & set(mixture.keys_of(test))
    if shared:
        say(f"{len(shared)} of the {len(test)} test problems are dev problems, too: the best "
            "checkpoint is chosen by them")
    held_out = mixture.keys_of(dev + test)
    sets = [leave_out(problems, mixture.keys_of(problems), held_out, word)
            for problems, word in zip(sets, args.data)]
    args.data_sha256 = mixture.data_hash(*sets, dev, test)
    return sets, dev, test


def filter_by_pass_rate(sets, policy, args, counts):
    """The sets without the problems that the policy solves too rarely or too often.

    counts: as of count_right; if it is empty, all problems are asked, and it is filled.
    Raises ValueError when nothing is left of a set.
    """
    low, high = args.filter_by_pass_rate
    problems = list(enumerate(sum(sets, [])))
    if not counts:
        say(f"asking {len(problems)} problems {args.group} times each")
        sampler = as_sampler(policy)
        seed = zlib.crc32(f"{args.seed} 0".encode())
        for begin in range(0, len(problems), args.prompts):
            batch = problems[begin:begin + args.prompts]
            metrics.count_right(roll_out(sampler, batch, args, seed), counts)
    rates = {name: right / asked for name, (right, asked) in counts.items()}
    kept = [[p for p in problems if low <= rates[p["id"]] <= high] for problems in sets]
    said = (f"--filter-by-pass-rate {low:g} {high:g} keeps {sum(map(len, kept))} of {len(rates)} "
            f"problems: {[*rates.values()].count(0)} were never solved, "
            f"{[*rates.values()].count(1)} always")
    if not all(kept):
        raise ValueError(f"{said}. Nothing is left of a set: widen the bounds")
    say(said)
    return kept


class Training(NamedTuple):
    """A run in hand, from its first step to its last."""
    policy: Policy
    reference: Policy
    optimizer: optim.Optimizer
    sets: list[list[dict]]  # of problems to train on
    dev: list[dict]
    test: list[dict]
    progress: dict  # what a checkpoint has to remember beside the weights
    run: run.Run
    model_dir: Path  # of the model that it began with
    trained_on: set[str]  # keys of problems
    args: argparse.Namespace


def make_reference(params, config, args):
    """What --beta holds the policy to, as a Policy: the --teacher, or the weights as they are."""
    weights = None
    if args.teacher:
        path = model.resolve_model(args.teacher)
        head = model.head_weight(params)
        config = model.load_config(path)
        weights = model.load_params(path, head.device, head.dtype)
    elif args.beta:  # what is frozen is shared
        weights = {name: tensor.detach().clone() if tensor.requires_grad else tensor
                   for name, tensor in params.items()}
    return Policy(weights, config, None, None)


def open_training(args):
    """(the Training that the flags name, the number of steps that it has behind it)."""
    config = model.load_config(model.resolve_model(args.model, config_only=True))
    resolve_flags(args, config)
    run.claim_run_dir(args)
    path = model.resolve_model(args.model)
    policy = Policy(None, config, model.load_tokenizer(path), model.load_system_prompt(path),
                    Engine())
    sets, dev, test = load_data(policy, args)
    base = run.load_base(path, args)  # before this process forks, so that all share what is frozen
    _, world, device = launch.init_distributed(args.device, args.processes, args.timeout_min)
    opened, checkpoint = run.start_run(args)
    params, optimizer = run.make_trainable(base, config, args, device)
    del base
    policy = policy._replace(params=params)
    reference = make_reference(params, config, args)
    state = run.load_checkpoint(checkpoint, optimizer)
    progress = {"failures": 0, "rows": [], "dev": [], "right": {}, "pass_rates": {}}
    progress |= state["extra"]
    if args.filter_by_pass_rate:
        sets = filter_by_pass_rate(sets, policy, args, progress["pass_rates"])
    problems = sum(sets, [])
    say(f"{len(problems)} training problems, {len(dev)} held out for choosing and {len(test)} for "
        f"the result, on {world} x {device}")
    trained_on = run.read_trained_on(args.adapter).union(mixture.keys_of(problems))
    return Training(policy, reference, optimizer, sets, dev, test, progress, opened, path,
                    trained_on, args), state["step"]


def problem_orders(sets, done, args):
    """For each attempt, the first one and those of --refill, the problems after `done` steps."""
    proportions = [mixture.split_number(word)[1] for word in args.data]
    for attempt in range(1 if args.teacher else 1 + args.refill):
        seed = f"{args.seed}, refill {attempt}" if attempt else args.seed
        order = mixture.problem_order(sets, proportions, seed)
        yield itertools.islice(order, done * args.prompts, None)


def answer(sampler, problems, args, prompt=None):
    """A Group of one greedy completion for each problem. prompt: instead of --prompt."""
    once = {"group": 1, "temperature": 0.0, "prompt": prompt or args.prompt}
    return roll_out(sampler, list(enumerate(problems)), argparse.Namespace(**vars(args) | once))


def evaluate(training, sampler, step, groups=()):
    """rate_metrics of the answers on dev, which are noted in `progress`.

    A few groups of the step and of dev go, whole, to samples.jsonl.
    """
    progress = training.progress
    answered = answer(sampler, training.dev, training.args)
    shown = (metrics.sample_records(groups[:4], "rollout", sampler.tokenizer)
             + metrics.sample_records(answered[:8], "held_out", sampler.tokenizer))
    run.log_samples(training.run, step, shown)
    right = metrics.right_answers(answered)
    progress["dev"] = metrics.keep_first_and_best([*progress["dev"], [step, right]])
    return rate_metrics("dev_accuracy", right)


def measure(training, sampler, method, prompt=None):
    """Add a row on the test split to results.md, unless --test-limit is 0."""
    if training.test:
        answered = answer(sampler, training.test, training.args, prompt)
        metrics.add_result(training.run, training.progress["rows"], method, answered)


def save(training, step):
    """Write a checkpoint, and let `best` point to the best one."""
    policy = training.policy
    best_step, _ = training.progress["dev"][-1]
    run.save_checkpoint(training.run.dir, step, policy.params, policy.config, training.model_dir,
                        training.optimizer, training.progress, training.args.keep, best_step,
                        training.trained_on)


def measure_start(training):
    """How good the model is before it is trained."""
    sampler = as_sampler(training.policy)
    record = {"step": 0} | evaluate(training, sampler, 0)
    run.log_step(training.run, "step {step}" + metrics.DEV_ACCURACY, record)
    measure(training, sampler, "before")
    if training.args.prompt != "cot":
        measure(training, sampler, "before, asked to think step by step", "cot")
    save(training, 0)


def finish_step(training, groups, record, stop_requested):
    """Evaluate, log and save as it is time to; returns whether this was the last step.

    record: the metrics of the step. Raises KeyboardInterrupt when asked to stop.
    """
    args, progress, step = training.args, training.progress, record["step"]
    finished = step == record["steps"]
    num_problems = sum(map(len, training.sets))
    before, epoch = [n * args.prompts // num_problems for n in (step - 1, step)]
    epoch_ends = args.epochs and epoch > before
    evaluating = finished or step % args.eval_every == 0 or epoch_ends
    line = metrics.STEP_LINE + bool(args.beta) * metrics.KL
    if evaluating:
        sampler = as_sampler(training.policy)  # once for all that is asked of these weights
        record |= evaluate(training, sampler, step, groups)
        line += metrics.DEV_ACCURACY
    last = finished or metrics.reached(progress["dev"], args.until)
    stopping = stop_requested()
    run.log_step(training.run, line, record)
    progress["failures"] = optim.count_failures(progress["failures"], record["skipped"], args.lr)
    if last or epoch_ends:
        measure(training, sampler, "after" if last else f"after epoch {epoch}")
    if evaluating or stopping or step % args.save_every == 0:
        save(training, step)
    if evaluating:
        view.write_report(training.run)
    if stopping and not last:
        raise KeyboardInterrupt  # saved; run_main says how to go on
    return last


def main(args):
    training, done = open_training(args)
    policy, reference, optimizer, sets, *_ = training
    progress = training.progress
    num_problems = sum(map(len, sets))
    steps = args.steps or math.ceil(args.epochs * num_problems / args.prompts)
    if not progress["dev"]:
        measure_start(training)
    if metrics.reached(progress["dev"], args.until):
        steps = done
    view.write_report(training.run)
    orders = list(problem_orders(sets, done, args))

    began = time.perf_counter()
    with run.stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            lr = optim.learning_rate(step, steps, args.lr, args.warmup)
            start = time.perf_counter()
            groups = with_advantages(roll_out_step(policy, orders, step, args), args)
            rolled = time.perf_counter()
            rows, total = training_rows(groups, args)
            learned = update_within_memory(policy, reference, optimizer, rows, total, lr, args)
            updated = time.perf_counter()
            metrics.count_right(groups, progress["right"])
            num_sampled = sum(len(c.tokens) for g in groups for c in g.completions)
            peaks = gather_objects(launch.peak_memory_gib(optimizer.params.device))
            record = metrics.step_metrics(groups, learned, args) | {
                "step": step, "steps": steps, "epoch": step * args.prompts / num_problems, "lr": lr,
                "time": time.time(), "rollout_s": rolled - start, "update_s": updated - rolled,
                "tokens_per_s": num_sampled / (updated - start),
                "left_min": (updated - began) / (step - done) * (steps - step) / 60,
                "peak_memory_gib": max(peaks)}
            if finish_step(training, groups, record, stop_requested):
                break
    metrics.save_solved(training.run, progress["right"])
    best = training.run.dir / "checkpoints" / "best"
    say(f"{metrics.whether_it_helped(progress['dev'])}; best checkpoint: {best}")


if __name__ == "__main__":
    launch.run_main(main, parse_args)
