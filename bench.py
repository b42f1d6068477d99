"""Benchmarks, and memory plans.

    python bench.py sample                                   # the sampling engine, on two loads
    python bench.py sample --model DIR --load fixed --batch 1 8 32 --dtype bfloat16
    python bench.py sample --size 1.5b --load fixed --batch 1 64 256     # random weights
    python bench.py step --load mixed --size 30m             # a step of grpo.py, random weights
    python bench.py plan --model qwen2.5-1.5b --gpus 1:8 1:24    # what fits, and with which flags

`step` and `plan` also take the flags of grpo.py. `plan` reads only config.json.
"""

import argparse
import math
import random
import re
import time

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.benchmark import Timer

import generate
import grpo
import launch
import model
from data.prompts import encode_prompt
from engine import Engine, sampling_params
from launch import at_least, gather_objects, rank_and_world, say
from plan import LORA_RANK, fit_memory, plan_grpo
from run import make_trainable
from stats import markdown

SAMPLE_LOADS = ("fixed", "mixed")
STEP_LOADS = {  # for comparing trainers: flags of grpo.py, and the range of prompt lengths
    "fixed": ({"prompts": 8, "group": 8, "max_new_tokens": 64}, (24, 40)),
    # one token in a hundred is an end token, so completion lengths are geometric
    "mixed": ({"prompts": 4, "group": 16, "max_new_tokens": 256}, (300, 300))}
SIZES = {
    "tiny": model.Config(1024, 256, 704, 4, 4, 2),
    "30m": model.Config(4096, 512, 1792, 8, 8, 2),
    "0.5b": model.Config(151936, 896, 4864, 24, 14, 2),
    "1.5b": model.Config(151936, 1536, 8960, 28, 12, 2),
    "7b": model.Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)}


def gpus_and_gib(text):
    """An argparse type: "8:80" -> (8, 80.0)."""
    found = re.fullmatch(r"([1-9]\d*):(\d+(?:\.\d+)?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: expected GPUS:GIB, such as 1:24 or 8:80")
    return int(found[1]), float(found[2])


def parse_args(argv=None):
    parser = launch.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="sample|step|plan", prog="bench.py")
    sample = commands.add_parser("sample", description=bench_sample.__doc__)
    sample.set_defaults(bench_fn=bench_sample, processes=1)
    add = sample.add_argument
    add("--model", default="tiny", help="a name, a hub id, or a directory")
    add("--size", choices=SIZES, help="random weights of this size instead of --model")
    add("--load", nargs="+", choices=SAMPLE_LOADS, default=SAMPLE_LOADS)
    add("--batch", type=at_least(1), nargs="+", default=[1, 8, 32, 64],
        help="rows of the fixed load; the mixed load decodes the largest at once")
    add("--new-tokens", type=at_least(1), default=64,
        help="length of each prompt and each completion in the fixed load")
    add("--repeat", type=at_least(1), default=5, help="runs; the median is reported")
    add("--compile", action="store_true", help="torch.compile the decode step")
    launch.add_device_flags(sample)
    step = commands.add_parser("step", description=bench_step.__doc__)
    step.set_defaults(bench_fn=bench_step)
    step.add_argument("--load", choices=STEP_LOADS, default="fixed")
    step.add_argument("--size", choices=SIZES, default="tiny", help="size of the model")
    grpo.add_flags(step)
    plan = commands.add_parser("plan", description=bench_plan.__doc__)
    plan.set_defaults(bench_fn=bench_plan)
    plan.add_argument("--gpus", type=gpus_and_gib, metavar="GPUS:GIB", nargs="+",
                      help="number of GPUs and GiB of each, such as 8:80 (default: this machine)")
    plan.add_argument("--size", choices=SIZES, help="a model of this size instead of --model")
    grpo.add_flags(plan)
    return parser.parse_args(argv)


# ------------------------------------------------------------ sample


def seconds(run):
    """Median seconds of run(), by PyTorch's timer, which warms up and synchronizes the GPU."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


@torch.inference_mode()
def peak_rates(like):
    """Measured peak rates, summed over processes: (memory bytes/s, FLOP/s of a large product).

    like: a tensor with the dtype and device of the weights.
    """
    size = 8192 if like.is_cuda else 2048
    big = torch.ones(2**29 if like.is_cuda else 2**27, device=like.device)  # exceeds any cache
    x, weight = like.new_ones(2, size, size)
    if like.device.type == "cpu" and torch.backends.mkldnn.is_available():
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, size)
    gather_objects(None)  # a barrier
    read_s = seconds(big.sum)
    product_s = seconds(lambda: model.project(x, weight))
    rates = gather_objects((big.nbytes / read_s, 2 * size**3 / product_s))
    return [sum(column) for column in zip(*rates)]


def roofline_s(config, like, rows, context, read_rate, product_rate):
    """Roofline seconds of a decode step: weights and cache are read and multiplied once."""
    weights = sum(map(math.prod, model.param_shapes(config).values()))
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    width = config.num_key_value_heads * config.head_dim
    cached = 2 * config.num_hidden_layers * width * rows * context
    read = rank_and_world()[1] * weights + cached  # each process reads the weights
    attended = 4 * config.num_hidden_layers * config.hidden_size * rows * context
    flops = 2 * weights * rows + attended
    return max(read * like.element_size() / read_rate, flops / product_rate)


def sample_loads(args):
    """Yield (name, prompt lengths, completion lengths [prompt][sample], max_batch)."""
    rng = random.Random(0)
    if "fixed" in args.load:
        for rows in args.batch:
            yield "fixed", [args.new_tokens] * rows, [[args.new_tokens]] * rows, rows
    if "mixed" in args.load:
        limits = [[rng.randint(16, 256) for _ in range(8)] for _ in range(64)]
        yield "mixed", [rng.randint(50, 400) for _ in limits], limits, max(args.batch)


def time_sampling(params, config, args, lengths, limits, max_batch):
    """Stats of the median run, from its slowest process. "cache_gib" is summed over processes."""
    rank, world = rank_and_world()
    rng = random.Random(0)
    prompts = [[rng.randrange(3, config.vocab_size) for _ in range(n)] for n in lengths]
    engine = Engine()
    runs = []
    for _ in range(args.repeat + 1):
        gather_objects(None)  # a barrier
        stats = {}
        generate.generate(params, config, prompts[rank::world], max_new_tokens=limits[rank::world],
                          num_samples=len(limits[0]), max_batch=-(-max_batch // world), stats=stats,
                          compiled=args.compile, engine=engine)
        stats["total_s"] = stats["prefill_s"] + stats["decode_s"]
        all_stats = gather_objects(stats)
        slowest = max(all_stats, key=lambda stats: stats["total_s"])
        slowest["cache_gib"] = sum(stats["cache_gib"] for stats in all_stats)
        runs.append(slowest)
    first, *runs = runs  # the first run captures the graphs
    median = sorted(runs, key=lambda stats: stats["total_s"])[len(runs) // 2]
    return median | {"capture_s": first["capture_s"], "captures": len(engine.graphs)}


def bench_sample(args):
    """Time the sampling engine on random tokens and compare it with the machine's peak rates."""
    device = launch.find_device(args.device)
    dtype = launch.compute_dtype(args.dtype, device)
    if args.size:
        config = SIZES[args.size]
        params = model.init_params(config, 0, device, dtype)
    else:
        path = model.resolve_model(args.model)
        config = model.load_config(path)
        params = model.load_params(path, "cpu", dtype)
    params = sampling_params(params, config, device=device)
    _, world, _ = launch.init_distributed(args.device, args.processes)
    like = params["model.norm.weight"]
    read_rate, product_rate = peak_rates(like)
    say(f"{args.size or args.model} | {like.dtype} | {world} x {torch.get_num_threads()} threads | "
        f"memory {read_rate / 1e9:.1f} GB/s | products {product_rate / 1e9:.0f} GFLOP/s")
    for name, lengths, limits, rows in sample_loads(args):
        stats = time_sampling(params, config, args, lengths, limits, rows)
        sampled = sum(map(sum, limits))
        step_s = stats["decode_s"] / stats["steps"]
        line = (f"{name}, batch {rows:3d} | {sampled / stats['total_s']:8.1f} sampled tok/s, "
                f"prefill included | prefill {sum(lengths) / stats['prefill_s']:8.1f} tok/s | "
                f"decode {sampled / stats['decode_s']:8.1f} tok/s, {step_s * 1e3:6.2f} ms a step")
        if name == "fixed":
            context = lengths[0] + limits[0][0] / 2
            best_s = roofline_s(config, like, rows, context, read_rate, product_rate)
            line += f", {best_s / step_s:4.0%} of the roofline"
        if stats["captures"]:
            line += f" | {stats['captures']} captures, {stats['capture_s']:.1f} s"
        say(f"{line} | cache {stats['cache_gib'] * 1024:.1f} MiB, peak "
            f"{launch.peak_memory_gib(device):.2f} GiB")


# ------------------------------------------------------------ step


def reward_odd_ids(group):
    """Reward each completion with its share of odd ids: cheap, and never equal across a group."""
    rewards = [sum(token % 2 for token in c.tokens) / len(c.tokens) for c in group.completions]
    return group._replace(rewards=rewards)


def word_tokenizer(vocab_size):
    """A tokenizer of words w1, w2, ... without control tokens, so no word ends a completion."""
    vocabulary = {"<unknown>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def random_problems(tokenizer, count, shortest, longest, seed):
    """Problems of random words. Their prompts have from `shortest` to `longest` tokens."""
    words = list(tokenizer.get_vocab())
    template = len(encode_prompt(tokenizer, "plain", {"problem": ""}))
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) - template for _ in range(count)]
    return [{"problem": " ".join(rng.choices(words, k=n)), "answer": ""} for n in lengths]


def clock():
    """[wall-clock seconds, CPU seconds of this process]"""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def bench_step(args, timed_steps=3):
    """Time grpo.py steps, of one AdamW update each, on random weights, after a warm-up step."""
    config = SIZES[args.size]
    if args.load == "mixed":
        config = config._replace(eos_token_id=tuple(range(1, 1 + config.vocab_size // 100)))
    flags, prompt_lengths = STEP_LOADS[args.load]
    vars(args).update(flags, prompt="plain", refill=0)
    if args.size in ("tiny", "30m"):  # use the tiny model's defaults
        args.micro_tokens = args.micro_tokens or grpo.TINY["micro_tokens"]
        args.checkpointing = bool(args.checkpointing)
    grpo.resolve_flags(args, config)
    _, world, device = launch.init_distributed(args.device, args.processes)
    dtype = launch.compute_dtype(args.dtype, device)
    base = model.init_params(config, args.seed, device, dtype if args.lora_rank else torch.float32)
    params, optimizer = make_trainable(base, config, args, device)
    reference = grpo.make_reference(params, config, args)
    del base
    tokenizer = word_tokenizer(config.vocab_size)
    policy = grpo.Policy(params, config, tokenizer, None, Engine())
    problems = random_problems(tokenizer, args.prompts, *prompt_lengths, args.seed)
    spent = torch.zeros(2, 2, dtype=torch.float64)  # [rollout, update] seconds, as from clock
    sampled = 0
    for step in range(1 + timed_steps):
        begin = clock()
        groups = list(map(reward_odd_ids, grpo.roll_out_step(policy, [problems], step, args)))
        rows, total = grpo.training_rows(grpo.with_advantages(groups, args), args)
        rolled = clock()
        grpo.update(policy, reference, optimizer, rows, total, args.lr, args)
        if step:
            spent += torch.stack((rolled - begin, clock() - rolled)) / timed_steps
            sampled += sum(len(c.tokens) for g in groups for c in g.completions) / timed_steps
    plan = plan_grpo(config, args, world, device.type, prompt_lengths[1])
    say(f"{args.size} | {args.load} | {args.prompts * args.group} rows, {sampled:.0f} sampled "
        f"tokens a step | {world} x {torch.get_num_threads()} threads, times of process 0 | "
        f"{dtype} | --micro-tokens {args.micro_tokens}"
        + (" --checkpointing" if args.checkpointing else ""))
    units = ["s"] if device.type == "cuda" else ["s", "cpu_s"]
    for unit, (rollout, update) in zip(units, spent.T):
        both = rollout + update
        say(f"{unit} per step {both:.2f} | rollout {rollout:.2f} | update {update:.2f} "
            f"| {sampled / both:.0f} tokens/{unit}")
    say(f"peak memory {launch.peak_memory_gib(device):.2f} GiB, planned {plan.peak:.2f}")


# ------------------------------------------------------------ plan


def plan_cell(config, args, world, device, available_gib, lora_rank, offload):
    """A table cell: the planned GiB of update and rollouts, and the flags needed to fit."""
    args = argparse.Namespace(**vars(args) | {"lora_rank": lora_rank, "offload": offload})
    requested = vars(args).copy()
    plan = fit_memory(config, args, world, device, available_gib)
    if plan.peak > available_gib:
        return f"no: {plan.peak:.1f}"
    flags = ["`--free-sampler`"] if args.free_sampler else []
    flags += [f"`{launch.flag_name(name)} {getattr(args, name)}`"
              for name in ("micro_tokens", "max_batch") if getattr(args, name) < requested[name]]
    return " ".join([f"{plan.update:.1f}, {plan.rollouts:.1f}", *flags])


def bench_plan(args):
    """Print the GiB that a run of grpo.py needs in the update and in the rollouts.

    If it does not fit, print the flags that make it fit, or "no:" and the least that it needs.
    """
    config = SIZES.get(args.size)
    if config is None:
        config = model.load_config(model.resolve_model(args.model, config_only=True))
    grpo.fill_defaults(args, config)
    device = "cuda" if args.gpus else launch.find_device(args.device).type
    processes = args.processes or 1
    machines = args.gpus or [(processes, launch.total_memory_gib(device, processes))]
    rank = args.lora_rank or LORA_RANK
    columns = {  # (lora_rank, offload)
        "all weights": (0, False), "all weights, `--offload`": (0, True),
        f"`--lora-rank {rank}`": (rank, False)}
    rows = []
    for world, available_gib in machines:
        cells = [plan_cell(config, args, world, device, available_gib, *column)
                 for column in columns.values()]
        rows.append([f"{world} x {available_gib:.3g} GiB", *cells])
    print(markdown([args.size or args.model, *columns], rows))


def main(args):
    args.bench_fn(args)


if __name__ == "__main__":
    launch.run_main(main, parse_args)
