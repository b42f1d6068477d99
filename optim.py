"""Trains a dict of tensors on one process or many: AdamW, checkpoints that resume exactly, the log.

Parameters are views into one flat buffer. Gradients are summed in a second and reduce-scattered;
each process holds the float32 master and the Adam moments of its shard; the updated buffer is
all-gathered in place (ZeRO, arXiv:1910.02054). One process runs the same code as a world of one.
"""

import argparse
import atexit
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from model import (
    did_you_mean,
    head_slice,
    param_shapes,
    read_json,
    save_model,
    token_logprobs,
)

ALIGN = 64  # elements: every parameter starts on a cache line, so that products round alike
SLICE = 1 << 20  # elements of a shard updated at a time: temporaries fit a CPU's cache
STATE = ("master", "m", "v")  # of an Optimizer: what a checkpoint holds
NO_FLAGS = ("resume", "overwrite")  # of a run: they say how to open it
FREE_FLAGS = (  # may change on --resume
    "run_dir", "keep", "save_every", "device", "processes", "offload", "wandb", "steps", "until",
    "timeout_min", "compile")

# ------------------------------------------------------------ flags


def bounded(kind, fits, expected):
    """An argparse type: `kind` (int or float), finite, for which fits(value) holds."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its errors
    return parse


def at_least(low):
    return bounded(type(low), lambda value: value >= low, f"at least {low}")


def above(low):
    return bounded(type(low), lambda value: value > low, f"more than {low}")


def between(low, high):
    return bounded(type(low), lambda value: low <= value <= high, f"{low} to {high}")


below_one = bounded(float, lambda value: 0 <= value < 1, "at least 0 and less than 1")
step_size = bounded(float, lambda value: 0 < value <= 1, "more than 0 and at most 1: AdamW moves "
                    "every weight by about so much in a step")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring, shows defaults, and leaves out the list of all flags."""

    def add_usage(self, *_):  # an error is one line
        pass

    def _get_help_string(self, action):
        default = str(action.default)
        if default in ("None", "False", argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return action.help + " (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse's, with such help, and a guess at what an unknown flag was meant to be."""

    def __init__(self, description, **more):
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}"
                       f"{did_you_mean(flag, self._option_string_actions)}")
        return args


def add_device_flags(parser):
    """The flags of every script that samples or trains: --device, --dtype, --processes."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the computation; auto: bfloat16 on a GPU that has it, else float32")
    add("--processes", type=at_least(1), help="forks of one thread each, on a CPU under Linux "
        "(default: one per core, at most 8 and as many as memory holds)")


def add_train_flags(parser, lr, run_dir, lr_help="peak learning rate"):
    """The flags that sft.py and grpo.py share. lr, run_dir: defaults; lr_help says what None is."""
    add_device_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--adapter", help="directory of a LoRA adapter (PEFT's format) to go on from")
    add("--lr", type=step_size, default=lr, help=lr_help)
    add("--warmup", type=at_least(0), default=10, help="steps of linear warm-up")
    add("--betas", type=below_one, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="of the matrices")
    add("--clip", type=at_least(0.0), default=1.0, help="largest norm of the gradient; 0: any")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="every random choice follows from it")
    add("--offload", action="store_true", help="masters and Adam moments in host memory (GPU only)")
    add("--timeout-min", type=above(0.0), default=120.0,
        help="minutes that a process waits for the others before all end")
    add("--run-dir", default=run_dir, help="where the run lives")
    add("--save-every", type=at_least(1), default=25, help="steps between checkpoints")
    add("--keep", type=at_least(1), default=2, help="checkpoints kept, beside the best")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too (pip install wandb)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--overwrite", action="store_true", help="delete the run in --run-dir first")


def parse_train_args(parser, argv=None):
    """parser.parse_args(argv); with --resume, the run's own flags are the defaults."""
    args = parser.parse_args(argv)
    saved = Path(args.run_dir, "flags.json")
    if args.resume and saved.is_file():
        flags = {name: value for name, value in read_json(saved).items() if name in vars(args)}
        parser.set_defaults(**flags | {"run_dir": args.run_dir})
        args = parser.parse_args(argv)
    return args


def run_main(main, parse_args):
    """A script's main as a command. What its user can mend is one line on stderr, exit code 2.

    Ctrl-C is one, too, with how to go on, and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    script = Path(sys.argv[0]).name
    how = ""
    try:
        args = parse_args()
        how = how_to_go_on(args)
        main(args)
    except (ValueError, OSError) as error:
        if rank_and_world()[0] > 0:
            time.sleep(2)  # if process 0 fails for the same reason, this one is over before
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # the clean-up would wait for the others
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_and_world()[0] == 0:
            print(f"\n{script}: stopped{how}", file=sys.stderr)
        sys.exit(130)


def how_to_go_on(args):
    """What a script says when it is stopped, by the flags that it has."""
    if hasattr(args, "resume"):
        return f"; go on with: {resume_command()}"
    if getattr(args, "records", None):
        return f"; the same command goes on from what {args.records} holds"
    return "; with --records it could go on from here" if hasattr(args, "records") else ""


# ------------------------------------------------------------ processes


def rank_and_world():
    """(rank, number of processes), under torchrun known from the start; (0, 1) for one process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_device(name):
    """The torch.device of "auto", "cpu", "cuda", "cuda:N" or "mps" (never chosen by "auto").

    torchrun's processes take a GPU each. Raises ValueError when there is no such device.
    """
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: PyTorch finds no Apple GPU here; pass --device cpu")
        return torch.device("mps")
    # for packed rows; they are of every length, and it is read when CUDA is first used
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    gpus = torch.cuda.device_count()
    if name == "cpu" or name == "auto" and not gpus:
        return torch.device("cpu")
    found = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if not found:
        raise ValueError(f"--device {name} is not known; expected auto, cpu, cuda, cuda:N or mps")
    index = int(os.environ.get("LOCAL_RANK", found[1] or 0))
    if index >= gpus:
        raise ValueError(f"GPU {index} is wanted and there are {gpus}; run fewer processes, or "
                         "pass --device cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, up to 0.4 s, for every shape
    return torch.device("cuda", index)


def default_processes(device, gib_each, gib_shared=0.0):
    """What --processes means when it is left out: a usable core each, at most 8, as memory allows.

    1 where this process cannot fork, or torchrun has started it. gib_each: what a process takes
    beside the gib_shared that all of them read.
    """
    if sys.platform != "linux" or "WORLD_SIZE" in os.environ or find_device(device).type != "cpu":
        return 1
    fitting = int((memory_there("cpu") - gib_shared) / gib_each)
    return max(1, min(len(os.sched_getaffinity(0)), 8, fitting))


def init_distributed(device="auto", processes=1, timeout_min=120):
    """(rank, world, device), the process group set up: torchrun's, or forks of this process.

    device: as for find_device. processes: how many to become without torchrun. They share what was
    loaded before, such as frozen weights. When one fails, all end; so they do when one has waited
    `timeout_min` minutes for the others.
    """
    device = find_device(device)
    on_gpu = device.type == "cuda"
    forks = []
    if on_gpu:
        torch.cuda.set_device(device)
    if processes > 1 and rank_and_world()[1] == 1:
        if on_gpu or sys.platform != "linux":
            raise ValueError(f"--processes {processes} forks on a CPU under Linux only; elsewhere "
                             "torchrun starts many processes, and --processes 1 is one")
        most = max(8, len(os.sched_getaffinity(0)))
        if processes > most:
            raise ValueError(f"--processes {processes} is more than 8 and more than the usable "
                             f"cores of this machine; expected at most {most}")
        forks = fork_into(processes)
    rank, world = rank_and_world()
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(minutes=timeout_min))
        atexit.register(dist.destroy_process_group)
        quit_on_second_signal()
        sys.excepthook = functools.partial(leave_at_once, forks)
    return rank, world, device


def fork_into(count):
    """Become `count` processes of one thread each, in the environment that torchrun gives.

    Returns the ids of the forks, ranks 1, 2, ..., to rank 0. They end with it, whatever ends it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    parent = os.getpid()
    rank = 0
    forks = []
    while rank == 0 and len(forks) < count - 1:
        forks.append(os.fork())
        if forks[-1] == 0:
            rank = len(forks)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it had ended before
                os._exit(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "TOKENIZERS_PARALLELISM": "false"}  # the tokenizer's threads are not forked
    torch.set_num_threads(1)
    return forks if rank == 0 else []


def leave_at_once(forks, kind, error, trace):
    """The excepthook of one process among many, without the clean-up that could wait for ever."""
    rank, world = rank_and_world()
    text = "".join(traceback.format_exception(kind, error, trace))
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        # the process that failed first ends this one, when its error is shown
        time.sleep(5 if rank == 0 else 30)
        text = f"it lost another process, whose error is the one to read: {error}\n"
        for number, fork in enumerate(forks, 1):
            gone, status = os.waitpid(fork, os.WNOHANG)
            if gone and os.WIFSIGNALED(status):
                text = (f"process {number} was ended by signal {os.WTERMSIG(status)}; 9 often "
                        "means that memory ran out\n")
    sys.stdout.flush()
    sys.stderr.write(f"process {rank} of {world} failed: {text}")
    sys.stderr.flush()
    os._exit(1)


def say(*words):
    """Print, on process 0 only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


@contextmanager
def progress_bar(total, name=None, quiet=False):
    """Yields an on_step for `generate`, which moves a bar over so many completions.

    They are those of all processes, guessed from this one's. The bar says how many tokens a second
    these are, and how long the rest will take; in a log file, once a minute. quiet: only on a
    terminal, and gone at the end.
    """
    rank, world = rank_and_world()
    terminal = sys.stderr.isatty()
    interval_s = 0.3 if terminal else 60
    began = shown = time.monotonic()
    tokens = 0

    def on_step(ended, num_tokens):
        nonlocal shown, tokens
        tokens += world * num_tokens
        bar.n = min(total, bar.n + world * len(ended))
        now = time.monotonic()
        if now - shown > interval_s:
            bar.set_postfix_str(f"{tokens / (now - began):.0f} tok/s")
            shown = now

    hidden = rank > 0 or total == 0 or quiet and not terminal
    with tqdm(total=total, desc=name, unit="answer", disable=hidden, leave=not quiet) as bar:
        yield on_step
        bar.n = total


def show_phase(items, name):
    """The items, with a bar while they are gone through: on process 0's terminal, and then gone."""
    hidden = rank_and_world()[0] > 0 or not sys.stderr.isatty()
    return tqdm(items, desc=name, leave=False, disable=hidden)


def printable(text):
    """A model's or a server's text without the codes that a terminal would obey, spelled out."""
    codes = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(codes, lambda code: ascii(code[0])[1:-1], text)


def all_sum(values):
    """The sums of a list of floats over all processes, in float64, known to every process."""
    if not dist.is_initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value):
    """What every process passed, in the order of their ranks, known to every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------ memory

ALLOWANCE_GIB = {"cpu": 0.5, "cuda": 1.0}  # Python and libraries; CUDA's context, fragmentation


def compute_dtype(name, device):
    """The dtype that --dtype names; "auto": bfloat16 on a GPU that computes in it, else float32.
    """
    kind = torch.device(device).type
    if name == "auto" and kind == "cuda":  # a plan may be made where there is none
        old = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
        name = "float32" if old else "bfloat16"
    if name == "auto":
        modern = kind == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
        name = "bfloat16" if modern else "float32"
    return getattr(torch, name)


def memory_there(device, processes=1):
    """GiB of a GPU, or of this machine for each of so many processes; inf where it is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return gib / int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def peak_memory_gib(device):
    """The most that this process has held: resident on a CPU, allocated tensors on a GPU. GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if torch.device(device).type == "mps":  # what is held now: it keeps no record
        return torch.mps.driver_allocated_memory() / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class MemoryPlan(NamedTuple):
    """What each process of a run needs, in GiB."""
    update: float
    rollouts: float
    shared: float  # of both: frozen weights, which forks share

    @property
    def peak(self):
        return max(self.update, self.rollouts)


def plan_memory(config, dtype, device="cpu", world=1, *, longest, row_tokens, rows, cache_slots,
                lora_rank=0, checkpointing=True, reference=None, offload=False, keep_sampler=True):
    """The MemoryPlan of a run before it starts: up to a fifth too high, rather than too low.

    longest: tokens of a prompt and its completion. row_tokens: of a packed row of training. rows:
    that decode at once. cache_slots: that they take. reference: the Config of a frozen model that
    is held, too. keep_sampler: on a GPU, its cache and weights stay during the update.
    """
    D, V, width = config.hidden_size, config.vocab_size, config.intermediate_size
    L, size = config.num_hidden_layers, dtype.itemsize
    on_gpu = torch.device(device).type == "cuda"
    shapes = param_shapes(config)
    weights = sum(map(math.prod, shapes.values()))
    trained = weights
    if lora_rank:
        linears = [shape for name, shape in shapes.items() if "proj.weight" in name]
        trained = lora_rank * sum(map(sum, linears))

    held = size * weights + 4 * trained  # and gradients
    if lora_rank:
        held += 4 * trained  # the adapter itself
    if reference:
        held += size * sum(map(math.prod, param_shapes(reference).values()))
    if not (offload and on_gpu):  # moments, and masters of what is not float32
        held += (12 if size < 4 and not lora_rank else 8) * trained / world

    cache = 2 * size * L * config.num_key_value_heads * config.head_dim * cache_slots
    sampler = size * weights if lora_rank or not on_gpu else 0  # merged, or packed
    if on_gpu and keep_sampler:  # where its graphs read them
        held += cache + sampler

    layer = size * (12 * D + 5 * width)  # bytes that autograd keeps of a token
    if lora_rank:
        layer += size * (5 * D + width)  # inputs of the adapter
    if not on_gpu:  # a fused kernel keeps no scores
        layer += size * config.num_attention_heads * longest
    head = (8 + size) * V * min(row_tokens, head_slice(V, device))
    if not lora_rank:
        head += (4 + 3 * size) * V * D  # the gradient of the embedding, and what it is made of
    again = 2 * size * width  # what the backward pass of one layer holds
    if checkpointing:
        again += layer
        layer = size * D
    update = held + row_tokens * L * layer + max(head, row_tokens * again)

    rollouts = held + rows * V * (12 + size)  # logits
    if not (on_gpu and keep_sampler):
        rollouts += cache + sampler
    allowance = ALLOWANCE_GIB["cuda" if on_gpu else "cpu"]
    shared = size * weights if lora_rank else 0
    return MemoryPlan(update / 2**30 + allowance, rollouts / 2**30 + allowance, shared / 2**30)


def plan_line(plan, there):
    """What a plan comes to, with a warning when it exceeds the GiB that are there."""
    line = (f"about {plan.update:.1f} GiB in the update, {plan.rollouts:.1f} in the rollouts, "
            f"of {there:.1f} GiB")
    if plan.peak > there:
        line += ("\nwarning: that is more than there is; what helps: --checkpointing, a smaller "
                 "--micro-tokens (update) or --max-batch (rollouts), --offload, --lora-rank, more "
                 "GPUs")
    return line


def halve_on_oom(args, name, attempt, engine=None):
    """attempt(), and where a GPU's memory runs out, once more with half of args.NAME, for good.

    For sizes on which no result depends. engine: the sampler's, which gives back what it keeps.
    Raises ValueError when half is too much as well.
    """
    for _ in range(2):
        size = getattr(args, name)
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        if engine:  # out of the handler, whose traceback holds what was allotted
            engine.release()
        torch.cuda.empty_cache()
        setattr(args, name, max(1, size // 2))
        flag = f"--{name.replace('_', '-')}"
        print(f"{reason} at {flag} {size}: going on with {max(1, size // 2)}", flush=True)
    raise ValueError(f"{reason} at {flag} {size}, which is half of what was tried before; start "
                     "with less, or see what fits: python bench.py plan --help")


# ------------------------------------------------------------ AdamW


class Optimizer(NamedTuple):
    """All parameters as n elements with their padding, n / world of them here. Written in place."""
    spans: dict[str, tuple[int, int]]  # name -> begin and end in the flat buffers
    num_decayed: int  # matrices come first, so that weight decay is for a prefix
    params: torch.Tensor  # [n] in the dtype of the computation
    grads: torch.Tensor  # [n] float32
    master: torch.Tensor  # [n / world] float32; the shard of `params` itself where it can be
    m: torch.Tensor  # [n / world] float32: running mean of the gradients
    v: torch.Tensor  # [n / world] float32: running mean of their squares
    updates: torch.Tensor  # [] int64: updates made, for the bias correction


def init_optimizer(trainable, device="cpu", dtype=torch.float32, offload=False):
    """Lays the tensors of `trainable` (any device and dtype) into one buffer: (params, Optimizer).

    params: the same names and values, in `dtype` on `device`, requiring a gradient. Gradients are
    summed in float32 over backward passes, whatever `dtype` is; never set `.grad` to None. Masters
    keep `trainable` in full precision.
    offload: masters and moments live in pinned host memory and pass through the GPU slice by slice.
    """
    rank, world = rank_and_world()
    offload = offload and torch.device(device).type == "cuda"
    home = {"device": "cpu", "pin_memory": True} if offload else {"device": device}
    spans = {}
    size = num_decayed = 0
    for name in sorted(trainable, key=lambda name: trainable[name].dim() < 2):  # matrices first
        spans[name] = (size, size + trainable[name].numel())
        size += -(-trainable[name].numel() // ALIGN) * ALIGN
        if trainable[name].dim() >= 2:
            num_decayed = size
    shard = -(-size // (ALIGN * world)) * ALIGN
    first = rank * shard
    flat = torch.zeros(shard * world, device=device, dtype=dtype)
    grads = torch.zeros(shard * world, device=device)
    m, v = torch.zeros(shard, **home), torch.zeros(shard, **home)
    master = flat[first:first + shard]
    if offload or dtype != torch.float32:
        master = torch.zeros(shard, **home)
    params = {}
    for name, tensor in trainable.items():
        begin, end = spans[name]
        values = tensor.detach().flatten()
        flat[begin:end] = values
        mine = master[max(0, begin - first):max(0, end - first)]
        mine.copy_(values[max(0, first - begin):][:len(mine)])
        params[name] = param = flat[begin:end].view(tensor.shape).requires_grad_()
        grad = grads[begin:end].view(tensor.shape)
        if dtype == torch.float32:
            param.grad = grad  # backward adds to what it finds
        else:
            param.register_post_accumulate_grad_hook(functools.partial(move_grad, total=grad))
    updates = torch.zeros((), dtype=torch.int64)
    return params, Optimizer(spans, num_decayed, flat, grads, master, m, v, updates)


def move_grad(param, total):
    total += param.grad
    param.grad = None


def clear_gradients(params, optimizer):
    """Forget what an interrupted backward pass has summed so far."""
    optimizer.grads.zero_()
    for param in params.values():
        if param.dtype != torch.float32:  # whose .grad is no part of `grads`
            param.grad = None


def learning_rate(step, steps, peak, warmup, floor=0.1):
    """Of step 1, ..., `steps`: up in a line over `warmup` steps, down a cosine to floor * peak."""
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def optimizer_step(optimizer, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0):
    """One AdamW update from the gradients summed over backward passes and processes; zeroes them.

    clip: the largest norm of the whole gradient; 0: any. weight_decay is for matrices only.
    Returns {"grad_norm": before clipping, "skipped": 0 or 1}; a norm that is not finite skips the
    update everywhere. arXiv:1711.05101, algorithm 2, with the decay multiplied by the learning rate
    as in torch.optim.AdamW.
    """
    rank, world = rank_and_world()
    shard = len(optimizer.master)
    first = rank * shard
    params = optimizer.params[first:first + shard]
    grads = optimizer.grads[first:first + shard]
    if world > 1:
        dist.reduce_scatter_single(grads, optimizer.grads)
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads.split(SLICE)])
    squares = norms.double().square().sum()
    if world > 1:
        dist.all_reduce(squares)
    norm = squares.sqrt().item()
    if math.isfinite(norm):
        optimizer.updates.add_(1)
        fix1, fix2 = (1 - beta ** optimizer.updates.item() for beta in betas)
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for begin in range(0, shard, SLICE):
            piece = slice(begin, begin + SLICE)
            at_home = [t[piece] for t in (optimizer.master, optimizer.m, optimizer.v)]
            p, m, v = (t.to(grads.device, non_blocking=True) for t in at_home)  # themselves, mostly
            g = grads[piece].mul_(scale)
            p[:max(0, optimizer.num_decayed - first - begin)].mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(fix2)).add_(eps), value=-lr / fix1)
            if optimizer.m.is_pinned():
                for t, updated in zip(at_home, (p, m, v)):
                    t.copy_(updated, non_blocking=True)
            if p.data_ptr() != params[piece].data_ptr():
                params[piece] = p
        if world > 1:
            dist.all_gather_single(optimizer.params, params)
        if optimizer.m.is_pinned():
            torch.cuda.synchronize()  # the host may read its copies from here on
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not math.isfinite(norm))}


def count_failures(failures, skipped, lr):
    """Updates skipped running, this step's included; ValueError for the third."""
    failures = failures + skipped if skipped else 0
    if failures >= 3:
        raise ValueError(f"the gradient was not finite in {failures} updates running, which were "
                         "skipped; start another --run-dir from the last checkpoint, with --lr "
                         f"below {lr:g} or --dtype float32")
    return failures


# ------------------------------------------------------------ files


def sync(*paths):
    """What was written to these files and directories is on the disk when this returns."""
    for path in paths:
        with suppress(PermissionError):  # Windows opens no directories, and syncs what it may write
            handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            os.fsync(handle)
            os.close(handle)


def write_whole(path, text):
    """Write a small file, or replace it, at a stroke."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def remove_whole(path):
    """Delete a directory so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(path.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def fingerprint(path):
    """[bytes, CRC-32] of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


@contextmanager
def disk_errors(path):
    """Turns what a full or read-only disk raises into a ValueError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for partial in path.parent.glob(f"{path.name}.*"):
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        there = next(p for p in path.resolve().parents if p.is_dir())
        free = shutil.disk_usage(there).free / 2**30
        raise ValueError(f"{path}: could not be written ({error}); {free:.2f} GiB are free there. "
                         "What was saved before is untouched: make room, then go on with --resume"
                         ) from None


# ------------------------------------------------------------ checkpoints


def step_of(checkpoint):
    return int(checkpoint.name[5:])


def list_checkpoints(run_dir):
    """A run's checkpoints, the newest last. Half written or deleted ones bear other names."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=step_of)


def shard_name(rank, world):
    return f"trainer-{rank + 1:05d}-of-{world:05d}.safetensors"


def read_trained_on(*directories):
    """The keys (data.mixture.problem_key) of the problems that the models or adapters in these
    directories are known to have been trained on. None stands for no directory."""
    paths = [Path(directory, "trained_on.txt") for directory in directories if directory]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    return set(" ".join(texts).split())


def check_output(params, config):
    """Raises ValueError when the weights, or what the model says with them, are not finite."""
    embedding = params["model.embed_tokens.weight"]
    tokens = torch.arange(min(16, config.vocab_size), device=embedding.device)[None]
    with torch.no_grad():
        finite = token_logprobs(params, config, tokens).isfinite().all()
        finite &= all(tensor.sum().isfinite() for tensor in params.values())
    if not finite:
        raise ValueError("the weights or the model's log-probabilities are not finite: training "
                         "went wrong, and this step is not saved. Start another --run-dir from "
                         "the last checkpoint, with a smaller --lr")


def save_checkpoint(run_dir, step, params, config, like, optimizer, extra, keep=2, best_step=None,
                    trained_on=()):
    """Write run_dir/checkpoints/step_000100: a model directory, and the trainer's state beside it.

    params, config, like: for save_model. extra: counters, best score, ..., as JSON, which
    load_checkpoint hands back. best_step: that of the best checkpoint, perhaps this one, to which
    `checkpoints/best` points. trained_on: keys of problems; those that `like` names are added.
    The new one appears whole or not at all; then all but the best and the last `keep` are deleted.
    Every process calls this, on a file system that all of them see.
    Raises ValueError when it cannot be written, and when the model says nothing finite any more.
    """
    check_output(params, config)
    rank, world = rank_and_world()
    home = Path(run_dir, "checkpoints")
    path = home / f"step_{step:06d}"
    partial = home / f"{path.name}.partial"
    shard = partial / shard_name(rank, world)
    trainer = {"step": step, "updates": optimizer.updates.item(), "best_step": best_step,
               "extra": extra, "world": world, "shard": len(optimizer.master),
               "spans": optimizer.spans}
    with disk_errors(path):
        if rank == 0:
            home.mkdir(parents=True, exist_ok=True)
            for left in home.glob("step_*.*"):  # by a process that was killed here
                shutil.rmtree(left)
            save_model(partial, params, config, like)
            write_whole(partial / "trainer.json", json.dumps(trainer, indent=1))
            keys = "\n".join(sorted(read_trained_on(like).union(trained_on)))
            for weights_dir in (partial, *partial.glob("adapter")):
                write_whole(weights_dir / "trained_on.txt", keys)
        gather_objects(None)  # the directory is there
        save_file({name: getattr(optimizer, name).cpu() for name in STATE}, shard)
        shutil.copymode(partial / "config.json", shard)
        sums = dict(gather_objects((shard.name, fingerprint(shard))))
        if rank == 0:
            others = [p for p in partial.rglob("*.*") if not p.name.startswith("trainer-")]
            sums |= {p.relative_to(partial).as_posix(): fingerprint(p) for p in others}
            write_whole(partial / "checksums.json", json.dumps(sums, indent=1))
            sync(*partial.iterdir(), partial)
            if path.exists():
                remove_whole(path)
            os.replace(partial, path)
            sync(home)
            point_to_best(home, best_step)
            for old in list_checkpoints(run_dir)[:-keep]:
                if step_of(old) != best_step:
                    remove_whole(old)
    gather_objects(None)  # it has its name
    return path


def point_to_best(home, best_step):
    """Make checkpoints/best a link to the checkpoint of that step: a copy where Windows forbids."""
    if best_step is None:
        return
    best, partial = home / "best", home / "best.partial"
    for left in (partial, best):
        if left.is_dir() and not left.is_symlink():
            remove_whole(left)
    partial.unlink(missing_ok=True)
    name = f"step_{best_step:06d}"
    try:
        partial.symlink_to(name)
    except OSError:
        shutil.copytree(home / name, partial)
    os.replace(partial, best)


def check_files(path):
    """Raises ValueError in every process, naming the file, when a checkpoint is damaged."""
    rank, world = rank_and_world()
    damage = None
    suspect = path / "checksums.json"
    try:
        sums = json.loads(suspect.read_text(encoding="utf-8"))
        if "trainer.json" not in sums:
            raise ValueError("it does not name trainer.json")
        for name, expected in sorted(sums.items())[rank::world]:
            suspect = path / name
            found = fingerprint(suspect)
            if found != expected:
                raise ValueError(f"bytes and CRC-32 are {found}, expected {expected}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        damage = f"{suspect} is damaged: {error}"
    for found in gather_objects(damage):
        if found:
            raise ValueError(f"{found}. Remove {path}; then --resume goes on from the checkpoint "
                             "before it, or from the start")


def load_checkpoint(path, optimizer):
    """Fill `optimizer`, and so the parameters, with what save_checkpoint wrote, bit for bit.

    On any number of processes. Returns {"step", "best_step", "extra", ...}. Raises ValueError,
    naming the file, when the checkpoint is damaged, and when it is of other parameters.
    """
    path = Path(path)
    rank, world = rank_and_world()
    check_files(path)
    trainer = read_json(path / "trainer.json")
    spans = {name: tuple(span) for name, span in trainer["spans"].items()}
    if spans != optimizer.spans:
        raise ValueError(f"{path}: holds the state of other parameters than are to be trained; "
                         "resume with the run's model and LoRA rank")
    first = rank * len(optimizer.master)
    for index in range(trainer["world"]):
        begin = index * trainer["shard"]
        mine = slice(max(0, begin - first), max(0, begin + trainer["shard"] - first))
        start = max(0, first - begin)
        with safe_open(path / shard_name(index, trainer["world"]), framework="pt") as file:
            for name in STATE:
                target = getattr(optimizer, name)[mine]
                if len(target):
                    target.copy_(file.get_slice(name)[start:start + len(target)])
    optimizer.updates.fill_(trainer["updates"])
    with torch.no_grad():
        shard = optimizer.params[first:first + len(optimizer.master)]
        shard.copy_(optimizer.master)
        if world > 1:
            dist.all_gather_single(optimizer.params, shard)
    if rank == 0:
        point_to_best(path.parent, trainer["best_step"])  # a kill may have come before its link
    return trainer


# ------------------------------------------------------------ the log


class Run(NamedTuple):
    dir: Path
    rank: int
    wandb: Any = None  # the run of Weights & Biases, on process 0


def start_run(args):
    """Open the directory of a run: (Run, the checkpoint to go on from or None).

    Without --resume the directory must be empty, or --overwrite given. With it, the logs are cut
    back to the checkpoint; ValueError for a flag that differs from flags.json and is not one of
    FREE_FLAGS, as the run would not go on as it began. Process 0 writes, the others wait. The
    directory is this process's until it ends; ValueError when it is another's.
    """
    rank, _ = rank_and_world()
    run_dir = Path(args.run_dir)
    checkpoint = wandb_run = None
    if rank == 0:
        check_run_dir(args)
        with disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        lock_run(run_dir)
        if args.overwrite and (run_dir / "checkpoints").exists():
            remove_whole(run_dir / "checkpoints")
        checkpoint = (list_checkpoints(run_dir) or [None])[-1]
        if args.resume:
            print("resuming from", checkpoint or f"the start: {run_dir} holds no checkpoint")
        save_flags(args, run_dir / "flags.json", checkpoint)
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_log(run_dir / name, step_of(checkpoint) if checkpoint else -1)
        if not checkpoint:
            (run_dir / "starts.jsonl").unlink(missing_ok=True)
        append_records(run_dir / "starts.jsonl", [describe_start(args, checkpoint)])
        if args.wandb:
            wandb_run = start_wandb(args)
    return Run(run_dir, rank, wandb_run), gather_objects(checkpoint)[0]


def check_run_dir(args):
    """Raises ValueError when --run-dir holds something else, or a run and no word on what to do.

    Also when another process is at work there.
    """
    path = Path(args.run_dir)
    held = [p.name for p in path.glob("*") if p.name != "lock" and p.suffix != ".partial"]
    if held and "flags.json" not in held:
        raise ValueError(f"{path} is not empty and holds no run (no flags.json); choose another "
                         "--run-dir")
    if held and not args.resume and not args.overwrite:
        raise ValueError(f"{path} holds a run; --resume goes on with it, --overwrite deletes it, "
                         "--run-dir takes another directory")
    if held and rank_and_world()[0] == 0:
        os.close(lock_run(path))  # only asked; start_run takes it


def lock_run(run_dir):
    """Lock a run's directory and return the file handle. Closed, or when this process ends, killed
    or not, the system frees the lock; the file that remains means nothing.

    Raises ValueError, with the holder's id, when another process has it.
    """
    handle = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        if sys.platform == "win32":
            import msvcrt
            os.lseek(handle, 1 << 20, os.SEEK_SET)  # what is locked there cannot be read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, 200).decode()
        os.close(handle)
        raise ValueError(f"{run_dir} is in use by {holder}; wait until it ends, or choose another "
                         "--run-dir") from None
    except OSError as error:
        print(f"{run_dir} cannot be locked ({error}): let no other process use it")
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def save_flags(args, path, checkpoint):
    """Print the flags and write them to flags.json; compare them with what stood there before."""
    flags = {name: value for name, value in vars(args).items() if name not in NO_FLAGS}
    flags = json.loads(json.dumps(flags, default=str))  # as they will be read back
    saved = read_json(path) if args.resume and path.is_file() else {}
    for name in flags.keys() & saved.keys():
        flag = f"--{name.replace('_', '-')}"
        if flags[name] != saved[name]:
            if checkpoint and name not in FREE_FLAGS:
                remedy = "put the data back" if name == "data_sha256" else "leave it out"
                raise ValueError(f"{flag} is {flags[name]}, and the run was started with "
                                 f"{saved[name]}; {remedy}, or start a new run with --model "
                                 f"{checkpoint} and another --run-dir")
            print(f"{flag} is now {flags[name]}; it was {saved[name]}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(flags, indent=1) + "\n")
    print(*(f"--{name.replace('_', '-')} {value}" for name, value in flags.items()), flush=True)


def describe_start(args, checkpoint):
    """Where a run comes from, for starts.jsonl: command, commit, machine and versions."""
    device = find_device(args.device)
    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    packages = ("torch", "tokenizers", "safetensors", "numpy")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return {
        "time": time.time(), "command": own_command(), "commit": code_commit(),
        "from": checkpoint.name if checkpoint else "the start",
        "machine": f"{rank_and_world()[1]} x {device.type}: {name}, {os.cpu_count()} cores, "
                   f"{platform.platform()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}"}


def code_commit():
    """The commit of this code, with -dirty if files differ from it; None outside a repository."""
    words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None


def start_wandb(args):
    """The run of Weights & Biases, on --resume the one that was there."""
    run_dir = Path(args.run_dir)
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    known = run_dir / "wandb_id"
    run = wandb.init(project=args.wandb, name=run_dir.name, dir=run_dir, config=vars(args),
                     resume="allow",
                     id=known.read_text() if args.resume and known.is_file() else None)
    write_whole(known, run.id)
    return run


def cut_log(path, step):
    """Drop the records of later steps from a .jsonl file, and a line that a kill cut short."""
    if not path.is_file():
        return
    partial = path.with_name(path.name + ".partial")
    with open(path, "rb") as old, open(partial, "wb") as new:
        for line in old:
            with suppress(ValueError, TypeError, LookupError):  # not a record: it goes, too
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    new.write(line)
    os.replace(partial, path)


def append_records(path, records):
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def log_step(run, line, metrics):
    """Print `line`, a format string over `metrics`, and append `metrics` to metrics.jsonl.

    metrics: {"step": int, name: number, ...}; what is not finite becomes null in the file. Log a
    step before saving its checkpoint, or a kill in between loses its record. Process 0 only.
    """
    if run.rank == 0:
        print(line.format(**metrics), flush=True)
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_records(run.dir / "metrics.jsonl", [record])
        if run.wandb:
            run.wandb.log(record, step=metrics["step"])


def log_samples(run, step, samples):
    """Append whole completions, a dict each, to samples.jsonl. Process 0 only."""
    if run.rank == 0:
        append_records(run.dir / "samples.jsonl", [{"step": step} | sample for sample in samples])


# ------------------------------------------------------------ stopping


def quit_on_second_signal():
    """From here on a second Ctrl-C or SIGTERM ends this process at once, even in a collective.

    Python's own handlers wait until the main thread is back from it, which is never when another
    process is frozen. What the system's handler writes to a socket, a thread reads at once.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())

    def wait():
        received = []
        while len(received) < 2:
            received += {signal.SIGINT, signal.SIGTERM}.intersection(ours.recv(1))
        os._exit(128 + received[-1])

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def stop_signals():
    """Inside, Ctrl-C and SIGTERM only ask to stop: yields a function that says whether to.

    All processes get the same answer. A second signal quits at once. torchrun kills 30 s after
    the first; `torchrun --shutdown-timeout 600` leaves a longer step the time to end.
    """
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if rank_and_world()[0] == 0:
            with suppress(OSError):  # the terminal may be gone, which is why we are asked to stop
                os.write(2, b"\nstopping after this step, with a checkpoint; once more to quit\n")

    def stop_requested():
        return all_sum([len(received)])[0] > 0

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_command():
    """The command that this script was started with, but for --resume and --overwrite."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    launcher = "python"
    if dist.is_torchelastic_launched():
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{launcher} {shlex.join(words)}"


def resume_command():
    """The command that goes on with this run, to be shown when it stops."""
    return f"{own_command()} --resume"
