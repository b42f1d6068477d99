"""A run's directory: checkpoints that resume exactly, the log, the lock, and stopping.

    flags.json       the run's flags, which --resume restores
    starts.jsonl     one line per start: time, machine, command and commit
    metrics.jsonl    one line of numbers per step
    samples.jsonl    some completions, in full
    checkpoints/     step_000100/, ..., each a model directory plus the trainer's state; best links
                     to one of them

A kill at any moment leaves no incomplete checkpoint under a final name. --resume truncates the
logs to the newest checkpoint.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import model
from launch import (
    compute_dtype,
    find_device,
    flag_name,
    gather_objects,
    own_command,
    rank_and_world,
)
from model import read_json, save_model, token_logprobs
from optim import init_optimizer

STATE = ("master", "m", "v")  # the fields of an Optimizer that a checkpoint stores
UNSAVED_FLAGS = ("resume", "overwrite")  # they apply to a single start
FREE_FLAGS = (  # may change on --resume
    "run_dir", "keep", "save_every", "device", "processes", "offload", "wandb", "steps", "until",
    "timeout_min", "compile", "micro_tokens", "max_batch", "free_sampler", "checkpointing")

# ------------------------------------------------------------ weights


def load_base(path, args):
    """Load the initial weights; frozen ones on --device, in the compute dtype."""
    if not args.lora_rank:
        return model.load_params(path)
    device = find_device(args.device)
    return model.load_params(path, device, compute_dtype(args.dtype, device))


def make_trainable(base, config, args, device):
    """(params, optimizer) that train all weights of `base`, or a LoRA adapter on top of it."""
    if not args.lora_rank:
        return init_optimizer(base, device, compute_dtype(args.dtype, device), args.offload)
    if args.adapter:
        lora = model.load_adapter(args.adapter, config)
    else:
        lora = model.init_lora(config, args.lora_rank, args.seed)
    lora, optimizer = init_optimizer(lora, device, offload=args.offload)
    return {name: tensor.to(device) for name, tensor in base.items()} | lora, optimizer


# ------------------------------------------------------------ files


@contextmanager
def disk_errors(path):
    """Turn the errors of a full or read-only disk into a ValueError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for partial in path.parent.glob(f"{path.name}.partial*"):
            shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: could not be written ({reason}). Earlier files are intact: "
                         "make room or choose another path; resume a run with --resume") from None


def write_atomic(path, text):
    """Write or replace a small file atomically. Raises ValueError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def append_lines(path, objects):
    """Append the objects, all or none, to a .jsonl file, which is created if missing.

    Raises ValueError if it cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(o) + "\n" for o in objects)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as file:
                file.write(text.encode())
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def remove_dir(path):
    """Delete a directory. Renaming it first means a kill leaves no partial one under its name."""
    doomed = path.with_name(path.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


# ------------------------------------------------------------ checkpoints


def step_of(checkpoint):
    return int(checkpoint.name[5:])


def list_checkpoints(run_dir):
    """A run's complete checkpoints, oldest first; incomplete ones have other names."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=step_of)


def shard_name(rank, world):
    return f"trainer-{rank + 1:05d}-of-{world:05d}.safetensors"


def read_trained_on(*directories):
    """The keys (data.mixture.problem_key) of all problems that these model or adapter directories
    record as training data. None entries are skipped."""
    paths = [Path(directory, "trained_on.txt") for directory in directories if directory]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    return set(" ".join(texts).split())


def check_output(params, config):
    """Raise ValueError if the weights or the model's log-probabilities are not finite."""
    embedding = params["model.embed_tokens.weight"]
    tokens = torch.arange(min(16, config.vocab_size), device=embedding.device)[None]
    with torch.no_grad():
        finite = token_logprobs(params, config, tokens).isfinite().all()
        finite &= all(tensor.sum().isfinite() for tensor in params.values())
    if not finite:
        raise ValueError("the weights or the model's log-probabilities are not finite: training "
                         "diverged, and this step was not saved. Start a new --run-dir from the "
                         "last checkpoint with a smaller --lr")


def link_best(home, best_step):
    """Link checkpoints/best to the checkpoint of that step; copy it if Windows forbids links."""
    if best_step is None:
        return
    best, partial = home / "best", home / "best.partial"
    for old in (partial, best):
        if old.is_dir() and not old.is_symlink():
            remove_dir(old)
    partial.unlink(missing_ok=True)
    name = f"step_{best_step:06d}"
    try:
        partial.symlink_to(name)
    except OSError:
        shutil.copytree(home / name, partial)
    os.replace(partial, best)


def fingerprint(path):
    """[size in bytes, CRC-32] of a file; None if it is missing."""
    if not path.is_file():
        return None
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def fingerprints(directory, names):
    """{name: fingerprint} of these files and of those that the other processes pass."""
    sums = {}
    for share in gather_objects({name: fingerprint(directory / name) for name in names}):
        sums |= share
    return sums


def save_checkpoint(run_dir, step, params, config, like, optimizer, extra, keep=2, best_step=None,
                    trained_on=()):
    """Write run_dir/checkpoints/step_000100: a model directory plus the trainer's state.

    params, config, like: as for save_model. extra: counters, best score, ..., stored as JSON and
    returned by load_checkpoint. best_step: step of the best checkpoint, possibly this one, which
    `checkpoints/best` links to. trained_on: problem keys, added to those that `like` records.
    The checkpoint appears complete or not at all; then all but the best and the last `keep` are
    deleted. Every process must call this, on a shared file system.
    Raises ValueError if it cannot be written, or if the model's output is not finite.
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
    names = []
    with disk_errors(path):
        if rank == 0:
            for partial_dir in home.glob("step_*.*"):  # left by a killed process
                shutil.rmtree(partial_dir)
            save_model(partial, params, config, like)
            (partial / "trainer.json").write_text(json.dumps(trainer, indent=1))
            keys = "\n".join(sorted(read_trained_on(like).union(trained_on)))
            for weights_dir in (partial, *partial.glob("adapter")):
                (weights_dir / "trained_on.txt").write_text(keys)
            names = [file.relative_to(partial).as_posix() for file in partial.rglob("*.*")]
        gather_objects(None)  # wait until the directory exists
        save_file({name: getattr(optimizer, name).cpu() for name in STATE}, shard)
        shutil.copymode(partial / "config.json", shard)
        sums = fingerprints(partial, [*names, shard.name])
        if rank == 0:
            (partial / "checksums.json").write_text(json.dumps(sums, indent=1))
            for file in partial.rglob("*.*"):  # on disk before it gets its final name
                with open(file, "r+b") as handle:  # Windows can sync only a writable file
                    os.fsync(handle.fileno())
            if path.exists():
                remove_dir(path)
            os.replace(partial, path)
            link_best(home, best_step)
            for old in list_checkpoints(run_dir)[:-keep]:
                if step_of(old) != best_step:
                    remove_dir(old)
    gather_objects(None)  # wait until it has its final name
    return path


def load_checkpoint(path, optimizer):
    """Restore the optimizer and the parameters, bit for bit, from a checkpoint.

    The number of processes may differ from the one that saved it. path: None for a new run, at
    step 0. Returns {"step", "best_step", "extra", ...}. Raises ValueError in every process if the
    checkpoint is damaged or has other parameters.
    """
    if path is None:
        return {"step": 0, "best_step": None, "extra": {}}
    rank, world = rank_and_world()
    expected = {}
    with suppress(OSError, ValueError):
        expected = read_json(path / "checksums.json")
    found = fingerprints(path, sorted(expected)[rank::world])
    damaged = [name for name in expected if found[name] != expected[name]]
    if "trainer.json" not in expected:
        damaged.append("checksums.json")
    if damaged:
        raise ValueError(f"{path / damaged[0]} is damaged. Remove {path}; "
                         "--resume then continues from the checkpoint before it, or from step 0")
    trainer = read_json(path / "trainer.json")
    if {name: tuple(span) for name, span in trainer["spans"].items()} != optimizer.spans:
        raise ValueError(f"{path} has other parameters than this run trains; resume with the "
                         "run's own model and LoRA rank")
    for index in range(trainer["world"]):
        offset = index * trainer["shard"] - rank * len(optimizer.master)  # in this process's shard
        overlap = slice(max(0, offset), max(0, offset + trainer["shard"]))
        start = max(0, -offset)  # in the saved shard
        with safe_open(path / shard_name(index, trainer["world"]), framework="pt") as file:
            for name in STATE:
                target = getattr(optimizer, name)[overlap]
                if len(target):
                    target.copy_(file.get_slice(name)[start:start + len(target)])
    optimizer.updates.fill_(trainer["updates"])
    shard = optimizer.params.view(world, -1)[rank]
    with torch.no_grad():
        shard.copy_(optimizer.master)
        if world > 1:
            dist.all_gather_single(optimizer.params, shard)
    if rank == 0:
        link_best(path.parent, trainer["best_step"])  # in case a kill prevented the link
    return trainer


# ------------------------------------------------------------ the log


class Run(NamedTuple):
    dir: Path
    rank: int
    wandb: Any = None  # the Weights & Biases run, on process 0


def truncate_log(path, step):
    """Drop records of later steps, and lines that a kill cut short, from a .jsonl file."""
    data = path.read_bytes() if path.is_file() else b""
    kept = []
    for line in data.splitlines(keepends=True):
        with suppress(ValueError, TypeError, LookupError):  # drop what is not a record
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line.decode())
    write_atomic(path, "".join(kept))


def log_step(run, line, metrics):
    """Print `line`, a format string over `metrics`, and append `metrics` to metrics.jsonl.

    metrics: {"step": int, name: number, ...}; non-finite values become null in the file. Log a
    step before saving its checkpoint, or a kill in between loses its record. Process 0 only.
    """
    if run.rank == 0:
        print(line.format(**metrics), flush=True)
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_lines(run.dir / "metrics.jsonl", [record])
        if run.wandb:
            run.wandb.log(record, step=metrics["step"])


def log_samples(run, step, samples):
    """Append completions, one dict each, to samples.jsonl. Process 0 only."""
    if run.rank == 0:
        append_lines(run.dir / "samples.jsonl", [{"step": step} | sample for sample in samples])


# ------------------------------------------------------------ the directory


def lock_run(run_dir):
    """Lock a run's directory until this process ends. Returns the open handle that holds the lock.

    The system releases the lock even after a kill; a leftover lock file has no effect. Raises
    ValueError with the holder's process id if another process holds the lock.
    """
    path = run_dir / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if sys.platform == "win32":
            import msvcrt
            os.lseek(handle, 1 << 20, os.SEEK_SET)  # past the text: locked bytes are unreadable
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{run_dir} is in use by {path.read_text()}; wait for it to end or "
                         "choose another --run-dir") from None
    except OSError as error:
        print(f"could not lock {run_dir} ({error}): make sure no other process uses it")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
    return handle


def claim_run_dir(args):
    """Reserve --run-dir for this process. Call it first, before any fork.

    Raises ValueError if the directory holds anything but a run, holds a run without --resume or
    --overwrite being set, or is in use by another process.
    """
    path = Path(args.run_dir)
    files = [p.name for p in path.glob("*") if p.name != "lock" and p.suffix != ".partial"]
    if files and "flags.json" not in files:
        raise ValueError(f"{path} is not empty but holds no run (no flags.json); choose another "
                         "--run-dir")
    if files and not args.resume and not args.overwrite:
        raise ValueError(f"{path} holds a run; pass --resume to continue it, --overwrite to delete "
                         "it, or another --run-dir")
    if rank_and_world()[0] == 0:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock_run(path)


def save_flags(args, path, checkpoint):
    """Print the flags and save them in flags.json; with --resume, compare them with those there."""
    flags = {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS}
    flags = json.loads(json.dumps(flags, default=str))  # as they will be read back
    saved = read_json(path) if args.resume and path.is_file() else {}
    for name in flags.keys() & saved.keys():
        if flags[name] != saved[name]:
            change = (f"{flag_name(name)} is {flags[name]}, but the run was started with "
                      f"{saved[name]}")
            if checkpoint and name not in FREE_FLAGS:
                raise ValueError(f"{change}; restore that value, or start a new run with --model "
                                 f"{checkpoint} and another --run-dir")
            print(change)
    write_atomic(path, json.dumps(flags, indent=1) + "\n")
    print(*(f"{flag_name(name)} {value}" for name, value in flags.items()), flush=True)


def code_commit():
    """This code's commit, with -dirty if files differ from it; None outside a repository."""
    words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None


def describe_start(args, checkpoint):
    """The record for starts.jsonl: command, commit, machine and versions."""
    device = find_device(args.device)
    processor = platform.processor()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif sys.platform == "linux":  # platform.processor() is empty
        cpuinfo = Path("/proc/cpuinfo").read_text()
        processor = re.search(r"model name\s*: (.*)|$", cpuinfo)[1] or processor
    packages = ("torch", "tokenizers", "safetensors", "numpy")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return {
        "time": time.time(), "command": own_command(), "commit": code_commit(),
        "from": checkpoint.name if checkpoint else "the start",
        "machine": f"{rank_and_world()[1]} x {device.type}: {processor}, {os.cpu_count()} cores, "
                   f"{platform.platform()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}"}


def start_wandb(args):
    """Start a Weights & Biases run, or with --resume continue the previous one."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    run_dir = Path(args.run_dir)
    id_file = run_dir / "wandb_id"
    if not (args.resume and id_file.is_file()):
        id_file.write_text(os.urandom(4).hex())
    return wandb.init(project=args.wandb, name=run_dir.name, dir=run_dir, config=vars(args),
                      resume="allow", id=id_file.read_text())


def start_run(args):
    """Open the run that claim_run_dir reserved: (Run, the checkpoint to resume from or None).

    With --resume, truncates the logs to the checkpoint and raises ValueError if a flag other than
    FREE_FLAGS differs from flags.json, since the run would then differ from an uninterrupted one.
    Process 0 writes; the others wait.
    """
    rank = rank_and_world()[0]
    run_dir = Path(args.run_dir)
    checkpoint = wandb_run = None
    if rank == 0:
        if args.overwrite and (run_dir / "checkpoints").exists():
            remove_dir(run_dir / "checkpoints")
        checkpoint = max(list_checkpoints(run_dir), key=step_of, default=None)
        if args.resume:
            print("resuming from", checkpoint or f"step 0: {run_dir} holds no checkpoint")
        save_flags(args, run_dir / "flags.json", checkpoint)
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate_log(run_dir / name, step_of(checkpoint) if checkpoint else -1)
        if not checkpoint:
            (run_dir / "starts.jsonl").unlink(missing_ok=True)
        append_lines(run_dir / "starts.jsonl", [describe_start(args, checkpoint)])
        if args.wandb:
            wandb_run = start_wandb(args)
    return Run(run_dir, rank, wandb_run), gather_objects(checkpoint)[0]


# ------------------------------------------------------------ stopping


@contextmanager
def stop_signals():
    """Defer Ctrl-C and SIGTERM: yields a function that returns whether a stop was requested.

    All processes get the same answer. A second signal quits at once. torchrun kills its processes
    30 s after the first; `torchrun --shutdown-timeout 600` gives longer steps time to finish.
    """
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        if rank_and_world()[0] == 0:
            with suppress(OSError):  # a closed terminal may be why we were signalled
                os.write(2, b"\nfinishing this step, then saving; interrupt again to quit now\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: any(gather_objects(bool(received)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
