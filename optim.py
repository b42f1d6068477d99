"""Trains a dict of tensors on one process or many: AdamW over flat buffers, sharded; checkpoints; the run's log.

    rank, world, device = init_distributed(args.device)               # torchrun's environment, or a world of one
    run, checkpoint = start_run(args)                                 # the run directory; what --resume goes on from
    params, optimizer = init_optimizer(load_params(model_dir), device, dtype)
    done = load_checkpoint(checkpoint, optimizer)["step"] if checkpoint else 0
    with stop_signals() as stop_requested:
        for step in range(done + 1, steps + 1):
            loss(params).backward()                                   # once per micro-batch
            stats = optimizer_step(optimizer, learning_rate(step, steps, args.lr, args.warmup))
            log_step(run, "step {step}/{steps} | loss {loss:.3f} nat | lr {lr:.1e}", {"step": step, ...})
            if stop_requested() or step % args.save_every == 0:
                save_checkpoint(args.run_dir, step, params, config, model_dir, optimizer, extra={})

Parameters are views into one flat buffer. Gradients are summed in a second one, reduce-scattered; each process holds the float32
master and the Adam moments of its shard; the updated buffer is all-gathered in place (ZeRO, arXiv:1910.02054, stage 1).
AdamW, arXiv:1711.05101. A world of one runs the same code.
"""

import atexit
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import read_json, save_model

ALIGN = 64  # elements: every parameter starts on a cache line, where matrix products are fast and always round alike
SLICE = 1 << 20  # elements of a shard that are updated at a time: the temporaries stay small, and in the cache of a CPU
FREE_FLAGS = ("resume", "overwrite", "keep", "save_every", "device", "offload", "wandb", "steps")  # may change on --resume
RUN_FILES = ("flags.json", "metrics.jsonl", "samples.jsonl", "curves.png", "results.md", "wandb_id", "checkpoints")

# ------------------------------------------------------------------------------------ flags


def add_train_flags(parser, lr, run_dir):
    """The flags that sft.py and grpo.py share. lr, run_dir: the script's defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=float, default=lr, help="peak learning rate (default %(default)g)")
    group.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up (default %(default)s)")
    group.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="of AdamW (default 0.9 0.999)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of the matrices (default %(default)s)")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no clipping (default %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default %(default)s)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s: a GPU when there is one)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                       help="of the computation; masters are float32 (default %(default)s: bfloat16 on a GPU, float32 on a CPU)")
    group.add_argument("--offload", action="store_true", help="keep masters and Adam moments in host memory (GPU only)")
    group.add_argument("--run-dir", default=run_dir, help="where the run lives (default %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --run-dir, with the run's own "
                       "flags as defaults; from the start when there is none yet")
    group.add_argument("--overwrite", action="store_true", help="delete the run that --run-dir holds, and start again")
    group.add_argument("--save-every", type=int, default=25, help="steps between checkpoints (default %(default)s)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints kept, beside the best (default %(default)s)")
    group.add_argument("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases (pip install wandb)")


def parse_train_args(parser, argv=None):
    """parser.parse_args(argv); with --resume, the flags of the run stand in for the defaults, so that nobody types them again."""
    args = parser.parse_args(argv)
    saved = Path(args.run_dir) / "flags.json"
    if args.resume and saved.is_file():
        parser.set_defaults(**{k: v for k, v in read_json(saved).items() if k in vars(args) and k not in ("resume", "overwrite")})
        args = parser.parse_args(argv)
    return args


def check_train_flags(args):
    """Raises ValueError for the first flag of add_train_flags that is out of range, saying what was expected."""
    def check(flag, holds, expected):
        if not holds(value := getattr(args, flag.replace("-", "_"))):
            raise ValueError(f"--{flag} {value} is out of range; expected {expected}")

    check("lr", lambda x: 0 < x < math.inf, "a positive number, such as 1e-6")
    check("warmup", lambda x: x >= 0, "0 steps or more")
    check("betas", lambda x: all(0 <= b < 1 for b in x), "two numbers from 0 to below 1")
    check("weight-decay", lambda x: 0 <= x < math.inf, "0 or more")
    check("clip", lambda x: 0 <= x < math.inf, "a positive norm, or 0 for no clipping")
    check("seed", lambda x: 0 <= x < 2**63, "an integer from 0 to 2**63 - 1")
    check("save-every", lambda x: x >= 1, "1 step or more")
    check("keep", lambda x: x >= 1, "1 checkpoint or more")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of them")


# ------------------------------------------------------------------------------------ many processes


def init_distributed(device="auto"):
    """(rank, world, device) from torchrun's environment, the process group set up; (0, 1, device) without one.

    device: "auto", "cpu", "cuda" or "cuda:N"; torchrun's processes take one GPU each (NCCL), or the CPU (gloo).
    Raises ValueError for a device that is not there. A process that fails says why and leaves at once; torchrun ends the others.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus = torch.cuda.device_count()
    name = ("cuda" if gpus else "cpu") if device == "auto" else str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name} is not known; expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        device = torch.device("cpu")
    else:
        index = local if world > 1 else int(name.partition(":")[2] or 0)
        if index >= gpus:
            raise ValueError(f"GPU {index} is wanted and there are {gpus}; lower --nproc-per-node, or pass --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("gloo" if name == "cpu" else "nccl", device_id=None if name == "cpu" else device)
        atexit.register(dist.destroy_process_group)
        sys.excepthook = leave_at_once
    return rank, world, device


def compute_dtype(name, device):
    """The dtype that --dtype names; "auto": bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name if name != "auto" else "float32" if torch.device(device).type == "cpu" else "bfloat16")


def leave_at_once(kind, error, trace):
    """The excepthook of one process among many.

    Those that only lost a peer keep quiet while torchrun ends them, so that the error on the screen is the one that began it.
    Leaving without clean-up keeps a process from waiting for collectives that will never end.
    """
    text = "".join(traceback.format_exception(kind, error, trace))
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        time.sleep(5)
        text = f"it lost another process, whose error is the one to read ({str(error).splitlines()[0]})\n"
    sys.stdout.flush()
    print(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} failed: {text}", end="", file=sys.stderr, flush=True)
    os._exit(1)


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(values):
    """The sums of a list of floats over all processes, in float64, known to every process."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(value):
    """What every process passed, in the order of their ranks, known to every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def peak_memory_gib(device):
    """The most that this process has held so far: resident memory on a CPU, allocated tensors on a GPU. GiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------ AdamW over flat buffers


class Optimizer(NamedTuple):
    """n elements over all parameters, padding included; this process owns a shard of n / world of them. Written in place."""
    spans: dict[str, tuple[int, int]]  # name -> where the parameter begins and ends in the flat buffers
    num_decayed: int  # matrices come first, so that weight decay is for a prefix
    params: torch.Tensor  # [n] in the dtype of the computation
    grads: torch.Tensor  # [n] float32
    master: torch.Tensor  # [n / world] float32: the shard of `params` itself when that is float32 and stays on the device
    m: torch.Tensor  # [n / world] float32: mean of the gradients
    v: torch.Tensor  # [n / world] float32: mean of their squares
    updates: torch.Tensor  # [] int64: updates made, for the bias correction


def init_optimizer(trainable, device="cpu", dtype=torch.float32, offload=False):
    """Lays the tensors of `trainable` (any device and dtype) into one buffer. Returns (params, Optimizer).

    params: the same names and values, in `dtype` on `device`, requiring a gradient. Their gradients are summed in float32 over
    backward passes, whatever `dtype` is; never set `.grad` to None. Masters keep the full precision of `trainable`.
    offload: masters and moments live in pinned host memory, and pass through the device a slice at a time.
    """
    (rank, world), device = rank_and_world(), torch.device(device)
    spans, end, num_decayed = {}, 0, 0
    for name in sorted(trainable, key=lambda name: trainable[name].dim() < 2):  # stable: matrices, then vectors
        spans[name] = (end, end + trainable[name].numel())
        end += -(-trainable[name].numel() // ALIGN) * ALIGN
        num_decayed = end if trainable[name].dim() >= 2 else num_decayed
    shard = -(-end // (ALIGN * world)) * ALIGN
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
        flat[begin:end] = tensor.detach().flatten()
        low, high = max(begin, first), min(end, first + shard)  # what of it is in this shard
        if low < high and not shares:
            master[low - first:high - first] = tensor.detach().flatten()[low - begin:high - begin]
        param, grad = flat[begin:end].view(tensor.shape).requires_grad_(), grads[begin:end].view(tensor.shape)
        if dtype == torch.float32:
            param.grad = grad  # backward adds to what it finds
        else:
            param.register_post_accumulate_grad_hook(lambda param, grad=grad: move_grad(param, grad))
        params[name] = param
    return params, Optimizer(spans, num_decayed, flat, grads, master, torch.zeros(shard, **home), torch.zeros(shard, **home),
                             torch.zeros((), dtype=torch.int64))


def move_grad(param, total):
    total += param.grad
    param.grad = None


def learning_rate(step, steps, peak, warmup, floor=0.1):
    """Rate of step 1, 2, ..., `steps`: up in a line over `warmup` steps, then down a cosine to floor * peak at the last."""
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def optimizer_step(optimizer, lr, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1.0):
    """One AdamW update from the gradients summed over backward passes and processes; they are zero afterwards.

    clip: the largest norm of the whole gradient; 0: no clipping. weight_decay is for matrices only.
    Returns {"grad_norm": before clipping, "skipped": 0 or 1}. When the norm is not finite nothing is updated, on any process.
    AdamW, arXiv:1711.05101, algorithm 2, with the rate multiplied into the decay as in torch.optim.AdamW.
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
            torch.cuda.synchronize()
    optimizer.grads.zero_()
    return {"grad_norm": norm, "skipped": int(not finite)}


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


def sync(path):
    """What was written to a file, or the names in a directory, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path):
    """[bytes, CRC-32] of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def remove(path):
    """Delete a directory so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(path.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save_checkpoint(run_dir, step, params, config, like, optimizer, extra, keep=2, best_step=None):
    """Write run_dir/checkpoints/step_000100 and return its path: a model directory, and what load_checkpoint needs beside it.

    params, config, like: as save_model takes them; pass `params | lora`, and the adapter is merged for others to load, while
    the trainer's files keep it apart. extra: counters, best score, ..., as JSON; load_checkpoint hands them back.
    best_step: the step of the best checkpoint so far (this one, perhaps), which `checkpoints/best` then points to.
    It appears whole or not at all; then all but the last `keep` and the best are deleted. Every process calls this, on a file
    system that all see. Raises ValueError when it cannot be written; the checkpoints before it are untouched.
    """
    rank, world = rank_and_world()
    home = Path(run_dir, "checkpoints")
    path, partial = home / f"step_{step:06d}", home / f"step_{step:06d}.partial"
    try:
        if rank == 0:
            home.mkdir(parents=True, exist_ok=True)
            for left in home.iterdir():  # by a process that was killed here
                if left.suffix in (".partial", ".writing", ".deleted") and not left.is_symlink():
                    shutil.rmtree(left)
            save_model(partial, params, config, like)
        gather_objects(None)  # wait until the directory is there
        shard = partial / shard_name(rank, world)
        save_file({name: getattr(optimizer, name).cpu() for name in ("master", "m", "v")}, shard)
        sync(shard)
        shards = gather_objects([shard.name, fingerprint(shard)])
        if rank == 0:
            trainer = {"step": step, "updates": optimizer.updates.item(), "best_step": best_step, "world": world,
                       "shard": len(optimizer.master), "spans": optimizer.spans, "extra": extra}
            (partial / "trainer.json").write_text(json.dumps(trainer, indent=1), encoding="utf-8")
            sums = {p.name: fingerprint(p) for p in sorted(partial.iterdir()) if not p.name.startswith("trainer-")} | dict(shards)
            (partial / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for name in ("trainer.json", "checksums.json", "."):
                sync(partial / name)
            if path.exists():
                remove(path)
            os.replace(partial, path)
            sync(home)
            point_to_best(home, best_step)
            for old in list_checkpoints(run_dir)[:-keep]:
                if old.name != f"step_{best_step or 0:06d}":
                    remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(str(partial) + ".writing", ignore_errors=True)
        last = latest_checkpoint(run_dir)
        raise ValueError(f"{path}: could not be written ({error}); {shutil.disk_usage(run_dir).free / 2**30:.2f} GiB are free there. "
                         f"Make room, then go on with --resume from {last.name if last else 'the start: there is no earlier one'}") from None
    gather_objects(None)
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
    try:
        sums = sorted(read_json(path / "checksums.json").items())
        for name, expected in sums[part::parts]:
            if not (path / name).is_file():
                return f"{path / name}: no such file; the checkpoint is not whole"
            if (found := fingerprint(path / name)) != expected:
                return (f"{path / name}: damaged: found {found[0]} bytes with checksum {found[1]:08x}, expected "
                        f"{expected[0]} bytes with {expected[1]:08x}")
    except (ValueError, OSError, TypeError, AttributeError, IndexError) as error:
        return f"{path / 'checksums.json'}: damaged ({error})"
    return None


def load_checkpoint(path, optimizer):
    """Fill `optimizer`, and so the parameters, with what save_checkpoint wrote, bit for bit; any number of processes.

    Returns {"step", "best_step", "extra", ...}. Raises ValueError naming the file when the checkpoint is damaged, or is of other parameters.
    """
    path, (rank, world) = Path(path), rank_and_world()
    if damage := find_damage(path, rank, world):
        whole = [p.name for p in reversed(list_checkpoints(path.parent.parent)) if p != path and not find_damage(p)]
        raise ValueError(f"{damage}. Remove {path}, and --resume goes on from " + (f"{whole[0]}, which is whole" if whole else "the start"))
    trainer = read_json(path / "trainer.json")
    if (found := {k: tuple(v) for k, v in trainer["spans"].items()}) != optimizer.spans:
        differs = next(name for name in (optimizer.spans | found) if found.get(name) != optimizer.spans.get(name))
        raise ValueError(f"{path / 'trainer.json'}: holds the state of other parameters than are trained now (the first is {differs}); "
                         "resume with the --model and the LoRA flags that the run was started with")
    shard, old = len(optimizer.master), trainer["shard"]
    first = rank * shard
    for index in range(trainer["world"]):
        low, high = max(first, index * old), min(first + shard, (index + 1) * old)  # what of that file is in this shard
        if low < high:
            with safe_open(path / shard_name(index, trainer["world"]), framework="pt") as file:
                for name in ("master", "m", "v"):
                    getattr(optimizer, name)[low - first:high - first] = file.get_slice(name)[low - index * old:high - index * old]
    optimizer.updates.fill_(trainer["updates"])
    optimizer.params[first:first + shard] = optimizer.master
    if world > 1:
        dist.all_gather_single(optimizer.params, optimizer.params[first:first + shard])
    if rank == 0:
        point_to_best(path.parent, trainer["best_step"])  # a kill may have come between the checkpoint and its link
    return trainer


# ------------------------------------------------------------------------------------ the run and its log


class Run(NamedTuple):
    dir: Path
    rank: int
    wandb: Any = None  # the run of Weights & Biases, on process 0


def start_run(args, free_flags=()):
    """Open the directory of a run: (Run, the checkpoint to go on from or None). Process 0 writes, all others wait for it.

    Without --resume the directory must be empty, or --overwrite given. With it, the logs are cut back to the checkpoint, so that no
    step stands in them twice. free_flags: flags of the script, beside FREE_FLAGS, that may change on --resume. Raises ValueError.
    """
    (rank, _), run_dir = rank_and_world(), Path(args.run_dir)
    checkpoint = None
    if rank == 0:
        flags = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}, default=str))
        held = [p.name for p in run_dir.iterdir()] if run_dir.is_dir() else []
        if args.resume:
            checkpoint = latest_checkpoint(run_dir)
            print(f"resuming from {checkpoint}" if checkpoint else f"{run_dir}: no checkpoint to resume from; starting at the first step")
            if "flags.json" in held:
                compare_flags(flags, read_json(run_dir / "flags.json"), run_dir, checkpoint, FREE_FLAGS + tuple(free_flags))
        elif held and not args.overwrite:
            raise ValueError(f"{run_dir} is not empty; --resume goes on with the run in it, --overwrite deletes it, "
                             "--run-dir takes another directory")
        elif held and "flags.json" not in held:
            raise ValueError(f"{run_dir} is not empty and holds no run (no flags.json); --overwrite will not touch it, choose another --run-dir")
        elif held:
            for name in RUN_FILES[::-1]:  # flags.json last: until then this is still a run
                path = run_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_log(run_dir / name, int(checkpoint.name[5:]) if checkpoint else -1)
        write_whole(run_dir / "flags.json", json.dumps(flags, indent=1) + "\n")
        print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items()), flush=True)
    checkpoint = gather_objects(checkpoint)[0]
    return Run(run_dir, rank, start_wandb(run_dir, args) if args.wandb and rank == 0 else None), checkpoint


def compare_flags(flags, saved, run_dir, checkpoint, free):
    for name in sorted(k for k in flags.keys() & saved.keys() if flags[k] != saved[k]):
        flag = f"--{name.replace('_', '-')}"
        if checkpoint and name not in free and name != "run_dir":
            raise ValueError(f"{flag} is {flags[name]}, and the run in {run_dir} was started with {saved[name]}; leave the flag out, "
                             f"or start a new run with --model {checkpoint} and another --run-dir")
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


def write_whole(path, text):
    """Replace a small file by a new one at a stroke."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def cut_log(path, step):
    """Drop the records of later steps from a .jsonl file, and a line that a kill cut short."""
    if path.is_file():
        partial = path.with_name(path.name + ".partial")
        with open(path, "rb") as old, open(partial, "wb") as new:
            for line in old:
                try:
                    if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                        new.write(line)
                except (ValueError, KeyError, TypeError):
                    continue
        os.replace(partial, path)


def append_record(path, record):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def log_step(run, line, metrics):
    """Print `line`, a format string over `metrics`, for a person, and append `metrics` to metrics.jsonl. Process 0 only.

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


def read_metrics(run_dir):
    """The records of metrics.jsonl, one dict per step."""
    with open(Path(run_dir) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def draw_curves(run_dir, names=None):
    """Draw metrics.jsonl as curves.png, a panel for each of `names` (default: all). Says so when it cannot; never raises."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves.png is not drawn: pip install matplotlib")
        return
    try:
        records = read_metrics(run_dir)
        names = names or [n for n in dict.fromkeys(k for r in records for k in r) if n not in ("step", "steps")]
        rows = -(-len(names) // 4)
        figure = Figure(figsize=(16, 2.6 * rows), layout="constrained")
        for index, name in enumerate(names):
            points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
            axes = figure.add_subplot(rows, 4, index + 1, title=name, xlabel="step")
            axes.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 30 else None)
        figure.savefig(Path(run_dir) / "curves.partial.png", dpi=100)
        os.replace(Path(run_dir) / "curves.partial.png", Path(run_dir) / "curves.png")
    except Exception as error:  # whatever it is, a picture is not worth a run
        print(f"curves.png is not drawn: {error}")


# ------------------------------------------------------------------------------------ stopping


@contextmanager
def stop_signals():
    """Inside, Ctrl-C and SIGTERM only ask to stop: yields a function that says, at the end of a step, whether to.

    All processes get the same answer. A second signal quits at once. torchrun passes the signal on, and kills after 30 s;
    `torchrun --shutdown-timeout 600` gives a longer step the time to end.
    """
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if rank_and_world()[0] == 0:
            os.write(2, b"\nstopping after this step, with a checkpoint; once more to quit at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: all_sum([len(received)])[0] > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command():
    """The command that goes on with this run, to be shown when it stops."""
    words = [w for w in sys.argv if w not in ("--resume", "--overwrite")] + ["--resume"]
    _, world = rank_and_world()
    return ("python " if world == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world)} ") + shlex.join(words)
