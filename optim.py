"""Trains a dict of tensors on one process or many: AdamW over flat buffers, sharded; checkpoints; the run's log.

    rank, world, device = init_distributed(args.device)         # torchrun's environment, or a world of one
    run, checkpoint = start_run(args)                           # the run directory; what --resume goes on from
    params, optimizer = init_optimizer(load_params(model_dir), device, dtype)
    done = load_checkpoint(checkpoint, optimizer)["step"] if checkpoint else 0
    with stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            loss_fn(params).backward()                          # once per micro-batch
            stats = optimizer_step(optimizer, lr := learning_rate(step, steps, args.lr, args.warmup))
            log_step(run, "step {step}/{steps} | loss {loss:.3f} nat | lr {lr:.1e}", {"step": step, ...} | stats)
            if stop_requested() or step % args.save_every == 0:
                save_checkpoint(run.dir, step, params, config, model_dir, optimizer, extra={})

Parameters are views into one flat buffer. Gradients are summed in a second one and reduce-scattered; each process
holds the float32 master and the Adam moments of its shard; the updated buffer is all-gathered in place (ZeRO,
arXiv:1910.02054). AdamW, arXiv:1711.05101. A world of one runs the same code.
"""

import argparse
import atexit
import ctypes
import functools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import read_json, save_model

ALIGN = 64  # elements: every parameter starts on a cache line, so that products over it are fast and round alike
SLICE = 1 << 20  # elements of a shard updated at a time: temporaries stay small, and in the cache of a CPU
FREE_FLAGS = {"run_dir", "keep", "save_every", "device", "processes", "offload", "wandb", "steps"}  # may change

# ------------------------------------------------------------------------------------ flags


def bounded(kind, fits, expected):
    """An argparse type: `kind` (int or float), finite, for which fits(value) holds."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    parse.__name__ = {int: "integer", float: "number"}[kind]  # what argparse calls it in its errors
    return parse


def at_least(low):
    """An argparse type: low or more; integers when `low` is one."""
    return bounded(type(low), lambda value: value >= low, f"at least {low}")


def above(low):
    """An argparse type: more than low; integers when `low` is one."""
    return bounded(type(low), lambda value: value > low, f"more than {low}")


def between(low, high):
    """An argparse type: from low to high, both included; integers when `low` is one."""
    return bounded(type(low), lambda value: low <= value <= high, f"{low} to {high}")


below_one = bounded(float, lambda value: 0 <= value < 1, "0 or more and less than 1")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a docstring, and shows the default of every flag that has one."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, argparse.SUPPRESS) or default is False or "default" in action.help:
            return action.help
        return action.help + " (default %(default)s)"


def add_device_flags(parser):
    """The flags of every script that samples or trains: --device, --dtype, --processes."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda or cuda:N")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the computation; auto: bfloat16 on a GPU, float32 on a CPU")
    add("--processes", type=at_least(1), help="fork into this many processes of one thread each, on "
        "a CPU under Linux (default: one per core, at most 8 and as many as memory holds)")


def add_train_flags(parser, lr, run_dir, lr_help="peak learning rate"):
    """The flags that sft.py and grpo.py share. lr, run_dir: defaults; lr_help says what None is."""
    add_device_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=above(0.0), default=lr, help=lr_help)
    add("--warmup", type=at_least(0), default=10, help="steps of linear warm-up")
    add("--betas", type=below_one, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"),
        help="of AdamW")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="of the matrices")
    add("--clip", type=at_least(0.0), default=1.0, help="largest norm of the gradient; 0: any")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="every random choice follows from it")
    add("--offload", action="store_true",
        help="keep masters and Adam moments in host memory (GPU only)")
    add("--run-dir", default=run_dir, help="where the run lives")
    add("--save-every", type=at_least(1), default=25, help="steps between checkpoints")
    add("--keep", type=at_least(1), default=2, help="checkpoints kept, beside the best")
    add("--wandb", metavar="PROJECT",
        help="also log to this project of Weights & Biases (pip install wandb)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true",
                       help="go on from the newest checkpoint of --run-dir, with the run's own "
                       "flags as defaults; from the start when there is none yet")
    again.add_argument("--overwrite", action="store_true",
                       help="delete the run that --run-dir holds, and start again")


def parse_train_args(parser, argv=None):
    """parser.parse_args(argv); with --resume the run's own flags are the defaults, so that nobody types them again."""
    args = parser.parse_args(argv)
    saved = Path(args.run_dir) / "flags.json"
    if args.resume and saved.is_file():
        parser.set_defaults(**{k: v for k, v in read_json(saved).items() if k in vars(args) and k != "run_dir"})
        args = parser.parse_args(argv)
    return args


def check_train_flags(args):
    """Nothing is left to check; goes once nobody calls it."""


# ------------------------------------------------------------------------------------ many processes


FORKS = []  # ids of the processes that this one has forked, ranks 1, 2, ...


def find_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N"; torchrun's processes take a GPU each.

    Raises ValueError when there is no such device.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name} is not known; expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    index = torch.device(name).index or 0
    if rank_and_world()[1] > 1:
        index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= gpus:
        raise ValueError(f"GPU {index} is wanted and there are {gpus}; run fewer processes, or "
                         "pass --device cpu")
    return torch.device("cuda", index)


def memory_there(device, processes=1):
    """GiB of a GPU, or of this machine for each of so many processes; inf where it is not known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return gib / int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def default_processes(device, gib_each, gib_shared=0.0):
    """What --processes means when it is left out.

    Under Linux on a CPU a process per usable core, at most 8, and at most what memory holds; else,
    and under torchrun, 1. gib_each: what a process takes beside the gib_shared that all of them use.
    """
    if sys.platform != "linux" or "WORLD_SIZE" in os.environ or find_device(device).type != "cpu":
        return 1
    fitting = int((memory_there("cpu") - gib_shared) / gib_each)
    return max(1, min(len(os.sched_getaffinity(0)), 8, fitting))


def init_distributed(device="auto", processes=1):
    """(rank, world, device), the process group set up: torchrun's, or `processes` forks of this one.

    processes: without torchrun, become so many here, on a CPU under Linux; None: 1. Callers pass
    `args.processes or default_processes(...)`. What was loaded before, frozen weights, they share.
    device: as for find_device. A process that fails says why and leaves at once, and so ends all.
    """
    rank, world = rank_and_world()
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (processes or 1) > 1 and world == 1:
        if device.type != "cpu" or sys.platform != "linux":
            raise ValueError(f"--processes {processes} forks on a CPU under Linux only; elsewhere "
                             "torchrun starts many processes, and --processes 1 is one")
        rank, world = fork_into(processes), processes
    if world > 1:
        dist.init_process_group("gloo") if device.type == "cpu" else dist.init_process_group("nccl", device_id=device)
        atexit.register(dist.destroy_process_group)
        sys.excepthook = leave_at_once
    return rank, world, device


def fork_into(count):
    """Become `count` processes of one thread each, in the environment that torchrun would give them; returns the rank.

    They need no launcher and share what Python and its libraries hold. Forks end with rank 0, whatever ends that.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "TOKENIZERS_PARALLELISM": "false"}  # its threads are not forked
    sys.stdout.flush()
    parent = os.getpid()
    for rank in range(1, count):
        if (fork := os.fork()) == 0:
            end_with_parent(parent)
            FORKS.clear()
            break
        FORKS.append(fork)
    else:
        rank = 0
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    return rank


def end_with_parent(parent):
    """Called in a fork of process `parent`, under Linux: the fork is killed when that ends, whatever ends it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def leave_at_once(kind, error, trace):
    """The excepthook of one process among many: leaves without the clean-up that could wait for the others for ever.

    Those that only lost a peer keep quiet while torchrun ends them, so that the error to be read is the first.
    """
    text = "".join(traceback.format_exception(kind, error, trace))
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(5)
        text = f"it lost another process, whose error is the one to read ({str(error).splitlines()[0]})\n"
        for rank, fork in enumerate(FORKS, 1):
            gone, status = os.waitpid(fork, os.WNOHANG)
            if gone and os.WIFSIGNALED(status):
                text = f"process {rank} was ended by signal {os.WTERMSIG(status)}; 9 often means that memory ran out\n"
    sys.stdout.flush()
    sys.stderr.write(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} failed: {text}")
    sys.stderr.flush()
    os._exit(1)


def rank_and_world():
    """(rank, number of processes): of torchrun or of --processes, known from the start; else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def all_sum(values):
    """The sums of a list of floats over all processes, in float64, known to every process."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value):
    """What every process passed, in the order of their ranks, known to every process. Waits for all of them."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def compute_dtype(name, device):
    """The dtype that --dtype names; "auto": bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name if name != "auto" else "float32" if torch.device(device).type == "cpu" else "bfloat16")


def peak_memory_gib(device):
    """The most that this process has held so far: resident memory on a CPU (what forks of it add while they sample is
    not in it), allocated tensors on a GPU. GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------ AdamW over flat buffers


class Optimizer(NamedTuple):
    """All parameters as n elements, padding included, of which this process owns n / world. Written in place."""
    spans: dict[str, tuple[int, int]]  # name -> where the parameter begins and ends in the flat buffers
    num_decayed: int  # matrices come first, so that weight decay is for a prefix
    params: torch.Tensor  # [n] in the dtype of the computation
    grads: torch.Tensor  # [n] float32
    master: torch.Tensor  # [n / world] float32; the shard of `params` itself when that is float32 and not offloaded
    m: torch.Tensor  # [n / world] float32: running mean of the gradients
    v: torch.Tensor  # [n / world] float32: running mean of their squares
    updates: torch.Tensor  # [] int64: updates made, for the bias correction


def init_optimizer(trainable, device="cpu", dtype=torch.float32, offload=False):
    """Lays the tensors of `trainable` (any device and dtype) into one buffer. Returns (params, Optimizer).

    params: the same names and values, in `dtype` on `device`, requiring a gradient. Gradients are summed in float32
    over backward passes, whatever `dtype` is; never set `.grad` to None. Masters keep `trainable` in full precision.
    offload: masters and moments live in pinned host memory, and pass through the GPU a slice at a time.
    """
    (rank, world), device = rank_and_world(), torch.device(device)
    spans, size, num_decayed = {}, 0, 0
    for name in sorted(trainable, key=lambda name: trainable[name].dim() < 2):  # stable: matrices, then vectors
        spans[name] = (size, size + trainable[name].numel())
        size += -(-trainable[name].numel() // ALIGN) * ALIGN
        num_decayed = size if trainable[name].dim() >= 2 else num_decayed
    shard = -(-size // (ALIGN * world)) * ALIGN
    first = rank * shard
    flat = torch.zeros(shard * world, device=device, dtype=dtype)
    grads = torch.zeros(shard * world, device=device)
    offload = offload and device.type == "cuda"
    home = {"device": "cpu", "pin_memory": True} if offload else {"device": device}
    shares = dtype == torch.float32 and not offload
    master = flat[first:first + shard] if shares else torch.zeros(shard, **home)
    params = {}
    for name, tensor in trainable.items():
        begin, end = spans[name]
        values = tensor.detach().flatten()
        flat[begin:end] = values
        low, high = max(begin, first), min(end, first + shard)  # what of it lies in this shard
        if low < high and not shares:
            master[low - first:high - first] = values[low - begin:high - begin]
        params[name] = param = flat[begin:end].view(tensor.shape).requires_grad_()
        grad = grads[begin:end].view(tensor.shape)
        if dtype == torch.float32:
            param.grad = grad  # backward adds to what it finds
        else:
            param.register_post_accumulate_grad_hook(functools.partial(move_grad, total=grad))
    m, v = torch.zeros(shard, **home), torch.zeros(shard, **home)
    return params, Optimizer(spans, num_decayed, flat, grads, master, m, v, torch.zeros((), dtype=torch.int64))


def move_grad(param, total):
    total += param.grad
    param.grad = None


def learning_rate(step, steps, peak, warmup, floor=0.1):
    """Rate of step 1, 2, ..., `steps`: up in a line over `warmup` steps, then down a cosine to floor * peak."""
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def optimizer_step(optimizer, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0):
    """One AdamW update from the gradients summed over backward passes and processes; they are zero afterwards.

    clip: the largest norm of the whole gradient; 0: any. weight_decay is for matrices only.
    Returns {"grad_norm": before clipping, "skipped": 0 or 1}; a norm that is not finite skips the update everywhere.
    arXiv:1711.05101, algorithm 2, with the decay multiplied by the learning rate as in torch.optim.AdamW.
    """
    rank, world = rank_and_world()
    shard = len(optimizer.master)
    first = rank * shard
    params, grads = optimizer.params[first:first + shard], optimizer.grads[first:first + shard]
    if world > 1:
        dist.reduce_scatter_single(grads, optimizer.grads)
    squares = torch.stack([torch.linalg.vector_norm(g) for g in grads.split(SLICE)]).double().square().sum()
    if world > 1:
        dist.all_reduce(squares)
    norm = squares.sqrt().item()
    if finite := math.isfinite(norm):
        optimizer.updates.add_(1)
        fix1, fix2 = (1 - beta ** optimizer.updates.item() for beta in betas)
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for begin in range(0, shard, SLICE):
            piece = slice(begin, begin + SLICE)
            at_home = [t[piece] for t in (optimizer.master, optimizer.m, optimizer.v)]
            p, m, v = (t.to(grads.device, non_blocking=True) for t in at_home)  # the same tensors unless offloaded
            g = grads[piece].mul_(scale)
            p[:max(0, optimizer.num_decayed - first - begin)].mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(fix2)).add_(eps), value=-lr / fix1)
            for t, updated in zip(at_home, (p, m, v)):
                if t is not updated:
                    t.copy_(updated, non_blocking=True)
            if p.data_ptr() != params[piece].data_ptr():
                params[piece] = p
        if world > 1:
            dist.all_gather_single(optimizer.params, params)
        if optimizer.m.is_pinned():
            torch.cuda.synchronize()  # the host may read its copies from here on
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not finite)}


# ------------------------------------------------------------------------------------ files that are whole or absent


def sync(path):
    """What was written to a file, or the names in a directory, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path, text):
    """Write a small file, or replace it, at a stroke."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def remove_whole(path):
    """Delete a directory so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(path.name + ".deleted")
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
        free = shutil.disk_usage(next(p for p in Path(path).resolve().parents if p.is_dir())).free / 2**30
        raise ValueError(f"{path}: could not be written ({error}); {free:.2f} GiB are free there. What was saved "
                         "before is untouched: make room, then go on with --resume") from None


# ------------------------------------------------------------------------------------ checkpoints


def list_checkpoints(run_dir):
    """The checkpoints of a run by step, the newest last. Those half written or half deleted bear other names."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((p for p in found if re.fullmatch(r"step_\d+", p.name)), key=lambda p: int(p.name[5:]))


def latest_checkpoint(run_dir):
    """The newest checkpoint of a run, or None."""
    return (list_checkpoints(run_dir) or [None])[-1]


def shard_name(rank, world):
    return f"trainer-{rank + 1:05d}-of-{world:05d}.safetensors"


def save_checkpoint(run_dir, step, params, config, like, optimizer, extra, keep=2, best_step=None):
    """Write run_dir/checkpoints/step_000100 and return its path: a model directory, and the trainer's state beside it.

    params, config, like: for save_model; `params | lora` saves a merged model, and the adapter apart in the state.
    extra: counters, best score, ..., as JSON; load_checkpoint hands them back. best_step: the step of the best
    checkpoint so far, perhaps this one, which `checkpoints/best` then points to. All but it and the last `keep` are
    deleted, after the new one has appeared, whole or not at all. Every process calls this, on a file system that all
    of them see. Raises ValueError when it cannot be written.
    """
    rank, world = rank_and_world()
    home = Path(run_dir, "checkpoints")
    path = home / f"step_{step:06d}"
    partial = home / f"{path.name}.partial"
    shard = partial / shard_name(rank, world)
    with disk_errors(path):
        try:
            if rank == 0:
                home.mkdir(parents=True, exist_ok=True)
                for left in home.glob("step_*.*"):  # by a process that was killed here
                    shutil.rmtree(left)
                save_model(partial, params, config, like)
            gather_objects(None)  # the directory is there
            save_file({name: getattr(optimizer, name).cpu() for name in ("master", "m", "v")}, shard)
            shutil.copymode(partial / "config.json", shard)
            sync(shard)
            shards = gather_objects((shard.name, fingerprint(shard)))
            if rank == 0:
                write_whole(partial / "trainer.json", json.dumps({
                    "step": step, "updates": optimizer.updates.item(), "best_step": best_step, "extra": extra,
                    "world": world, "shard": len(optimizer.master), "spans": optimizer.spans}, indent=1))
                others = [p for p in sorted(partial.iterdir()) if not p.name.startswith("trainer-")]
                sums = {p.name: fingerprint(p) for p in others} | dict(shards)
                write_whole(partial / "checksums.json", json.dumps(sums, indent=1))
                sync(partial)
                if path.exists():
                    remove_whole(path)
                os.replace(partial, path)
                sync(home)
                point_to_best(home, best_step)
                for old in list_checkpoints(run_dir)[:-keep]:
                    if best_step is None or int(old.name[5:]) != best_step:
                        remove_whole(old)
        except (OSError, SafetensorError):
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            shutil.rmtree(f"{partial}.writing", ignore_errors=True)
            raise
    gather_objects(None)  # it has its name
    return path


def point_to_best(home, best_step):
    """Make checkpoints/best a link to the checkpoint of that step."""
    if best_step is not None:
        link = home / "best.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(f"step_{best_step:06d}")
        os.replace(link, home / "best")


def find_damage(path, part=0, parts=1):
    """What is wrong with a checkpoint, naming the file, or None. Looks at every `parts`-th file, from `part` on."""
    listing = path / "checksums.json"
    try:
        sums = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {listing.name: [0, 0]}
        for name, (size, crc) in sorted(sums.items())[part::parts]:
            if not (path / name).is_file():
                return f"{path / name} is missing"
            if (found := fingerprint(path / name)) != [size, crc]:
                return f"{path / name} is damaged: {found[0]} bytes with CRC-32 {found[1]}, expected {size} with {crc}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{listing} is damaged ({error})"
    return None


def load_checkpoint(path, optimizer):
    """Fill `optimizer`, and so the parameters, with what save_checkpoint wrote, bit for bit; any number of processes.

    Returns {"step", "best_step", "extra", ...}. Raises ValueError naming the file when the checkpoint is damaged, and
    when it is of other parameters.
    """
    path, (rank, world) = Path(path), rank_and_world()
    if damage := find_damage(path, rank, world):
        whole = [p for p in list_checkpoints(path.parents[1]) if p.name != path.name and not find_damage(p)]
        raise ValueError(f"{damage}. Remove {path}; then --resume goes on from " +
                         (f"{whole[-1].name}, which is whole" if whole else "the start: no other checkpoint is whole"))
    trainer = read_json(path / "trainer.json")
    found = {name: tuple(span) for name, span in trainer["spans"].items()}
    if differing := [name for name in found | optimizer.spans if found.get(name) != optimizer.spans.get(name)]:
        raise ValueError(f"{path}: holds the state of other parameters than are to be trained ({differing[0]}, ...); "
                         "resume with the model and the LoRA rank that the run was started with")
    shard, old = len(optimizer.master), trainer["shard"]
    first = rank * shard
    for index in range(trainer["world"]):
        low, high = max(first, index * old), min(first + shard, (index + 1) * old)  # what of that file is in this shard
        if low < high:
            with safe_open(path / shard_name(index, trainer["world"]), framework="pt") as file:
                for name in ("master", "m", "v"):
                    values = file.get_slice(name)[low - index * old:high - index * old]
                    getattr(optimizer, name)[low - first:high - first] = values
    optimizer.updates.fill_(trainer["updates"])
    with torch.no_grad():
        optimizer.params[first:first + shard] = optimizer.master
        if world > 1:
            dist.all_gather_single(optimizer.params, optimizer.params[first:first + shard])
    if rank == 0:
        point_to_best(path.parent, trainer["best_step"])  # a kill may have come between a checkpoint and its link
        if world != trainer["world"]:
            print(f"{path} was written by {trainer['world']} processes; on {world}, results will differ by rounding")
    return trainer


# ------------------------------------------------------------------------------------ the run and its log


class Run(NamedTuple):
    dir: Path
    rank: int
    wandb: Any = None  # the run of Weights & Biases, on process 0


def start_run(args, free_flags=()):
    """Open the directory of a run: (Run, the checkpoint to go on from or None). Process 0 writes, the others wait.

    Without --resume the directory must be empty, or --overwrite given. With it, the logs are cut back to the
    checkpoint, so that no step stands in them twice. free_flags: flags of the script, beside FREE_FLAGS, that may
    change on --resume; another that differs from flags.json raises ValueError, as the run would not go on as it began.
    """
    (rank, _), run_dir, checkpoint = rank_and_world(), Path(args.run_dir), None
    if rank == 0:
        flags = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
        flags = json.loads(json.dumps(flags, default=str))  # as they will be read back
        held = [p.name for p in run_dir.iterdir() if p.suffix != ".partial"] if run_dir.is_dir() else []
        if held and "flags.json" not in held:
            raise ValueError(f"{run_dir} is not empty and holds no run (no flags.json); choose another --run-dir")
        if held and not args.resume and not args.overwrite:
            raise ValueError(f"{run_dir} holds a run; --resume goes on with it, --overwrite deletes it, "
                             "--run-dir takes another directory")
        with disk_errors(run_dir / "flags.json"):
            if args.overwrite:
                for path in list_checkpoints(run_dir):
                    remove_whole(path)
                for name in ("checkpoints/best", "samples.jsonl", "curves.png", "results.md", "wandb_id"):
                    (run_dir / name).unlink(missing_ok=True)
            checkpoint = latest_checkpoint(run_dir)
            if args.resume:
                print(f"resuming from {checkpoint or 'the start: there is no checkpoint in ' + str(run_dir)}")
            if args.resume and held:
                compare_flags(flags, read_json(run_dir / "flags.json"), checkpoint, FREE_FLAGS.union(free_flags))
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_log(run_dir / name, int(checkpoint.name[5:]) if checkpoint else -1)
            write_whole(run_dir / "flags.json", json.dumps(flags, indent=1) + "\n")
        print(*(f"--{name.replace('_', '-')} {value}" for name, value in flags.items()), flush=True)
    checkpoint = gather_objects(checkpoint)[0]
    return Run(run_dir, rank, start_wandb(run_dir, args) if args.wandb and rank == 0 else None), checkpoint


def compare_flags(flags, saved, checkpoint, free):
    for name in [name for name in flags if name in saved and flags[name] != saved[name]]:
        flag = f"--{name.replace('_', '-')}"
        if checkpoint and name not in free:
            raise ValueError(f"{flag} is {flags[name]}, and the run was started with {saved[name]}; leave it out, or "
                             f"start a new run with --model {checkpoint} and another --run-dir")
        print(f"{flag} is now {flags[name]}; it was {saved[name]}")


def start_wandb(run_dir, args):
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb") from None
    known = run_dir / "wandb_id"
    run = wandb.init(project=args.wandb, name=run_dir.name, dir=run_dir, config=vars(args), resume="allow",
                     id=known.read_text() if known.is_file() else None)
    write_whole(known, run.id)
    return run


def cut_log(path, step):
    """Drop the records of later steps from a .jsonl file, and a line that a kill cut short."""
    if not path.is_file():
        return
    partial = path.with_name(path.name + ".partial")
    with open(path, "rb") as old, open(partial, "wb") as new:
        for line in old:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    new.write(line)
            except ValueError:
                continue
    os.replace(partial, path)


def append_record(path, record):
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def log_step(run, line, metrics):
    """Print `line`, a format string over `metrics`, for a person, and append `metrics` to metrics.jsonl. On process 0.

    metrics: {"step": int, name: number, ...}; what is not finite becomes null in the file. Log a step before saving its
    checkpoint: a run killed in between then repeats the step instead of missing its record.
    """
    if run.rank == 0:
        print(line.format(**metrics), flush=True)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append_record(run.dir / "metrics.jsonl", finite)
        if run.wandb:
            run.wandb.log(finite, step=metrics["step"])


def log_samples(run, step, samples):
    """Append whole completions, a dict each, to samples.jsonl. Process 0 only."""
    if run.rank == 0:
        for sample in samples:
            append_record(run.dir / "samples.jsonl", {"step": step} | sample)


say_once = functools.cache(print)


def draw_curves(run_dir, names=None):
    """Draw metrics.jsonl as curves.png, a panel for each of `names` (default: all). Process 0 only; never raises."""
    if rank_and_world()[0]:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say_once("curves.png is not drawn: pip install matplotlib")
        return
    try:
        lines = Path(run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        names = names or [n for n in dict.fromkeys(n for r in records for n in r) if n not in ("step", "steps")]
        rows = -(-len(names) // 4)
        figure = Figure(figsize=(16, 2.6 * rows), layout="constrained")
        for index, name in enumerate(names):
            points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
            axes = figure.add_subplot(rows, 4, index + 1, title=name, xlabel="step")
            axes.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 30 else None)
        partial = Path(run_dir, "curves.png.partial")
        figure.savefig(partial, format="png", dpi=100)
        os.replace(partial, Path(run_dir, "curves.png"))
    except Exception as error:  # whatever it is, a picture is not worth a run
        print(f"curves.png is not drawn: {error}")


# ------------------------------------------------------------------------------------ stopping


@contextmanager
def stop_signals():
    """Inside, Ctrl-C and SIGTERM only ask to stop: yields a function that says, at the end of a step, whether to.

    All processes get the same answer. A second signal quits at once. torchrun passes the first on and kills after 30 s;
    `torchrun --shutdown-timeout 600` leaves a longer step the time to end.
    """
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if rank_and_world()[0] == 0:
            with suppress(OSError):  # the terminal may be gone, which is why we are asked to stop
                os.write(2, b"\nstopping after this step, with a checkpoint; once more to quit at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: all_sum([len(received)])[0] > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command():
    """The command that goes on with this run, to be shown when it stops."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")] + ["--resume"]
    torchrun = dist.is_torchelastic_launched()
    launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if torchrun else "python"
    return f"{launcher} {shlex.join(words)}"
