"""A run's directory: checkpoints that resume exactly, the log, the lock, and stopping.

    flags.json       what the run was started with, and --resume goes on with
    starts.jsonl     a line for each start: when, where, by which command and commit
    metrics.jsonl    a line of numbers for each step
    samples.jsonl    whole completions, now and then
    checkpoints/     step_000100/, ..., each a model directory and the trainer's state; best is a
                     link to one

Whenever a process is killed, a checkpoint is whole or bears another name, and --resume cuts the
logs back to the newest.
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

STATE = ("master", "m", "v")  # of an Optimizer: what a checkpoint holds
NO_FLAGS = ("resume", "overwrite")  # of a run: they say how to open it
FREE_FLAGS = (  # may change on --resume
    "run_dir", "keep", "save_every", "device", "processes", "offload", "wandb", "steps", "until",
    "timeout_min", "compile", "micro_tokens", "max_batch", "free_sampler", "checkpointing")

# ------------------------------------------------------------ weights


def load_base(path, args):
    """The weights to start from. Frozen ones are loaded as they are computed with."""
    if not args.lora_rank:
        return model.load_params(path)
    device = find_device(args.device)
    return model.load_params(path, device, compute_dtype(args.dtype, device))


def make_trainable(base, config, args, device):
    """(params, optimizer): all weights of `base`, or an adapter (--lora-rank, --adapter) on it."""
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
    """Turns what a full or read-only disk raises into a ValueError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for partial in path.parent.glob(f"{path.name}.partial*"):
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: could not be written ({reason}). What was saved before is "
                         "untouched: make room, or name another place; a run goes on with --resume"
                         ) from None


def write_whole(path, text):
    """Write a small file, or replace it, at a stroke. ValueError when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def append_lines(path, objects):
    """Append the objects to a .jsonl file, made at need: all of them or none.

    Raises ValueError when it cannot be written.
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


def remove_whole(path):
    """Delete a directory so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(path.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


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


def fingerprint(path):
    """[bytes, CRC-32] of a file; None when there is none."""
    if not path.is_file():
        return None
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def fingerprints(directory, names):
    """{name: fingerprint} of these files, and of those that the other processes name."""
    sums = {}
    for share in gather_objects({name: fingerprint(directory / name) for name in names}):
        sums |= share
    return sums


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
    names = []
    with disk_errors(path):
        if rank == 0:
            for left in home.glob("step_*.*"):  # by a process that was killed here
                shutil.rmtree(left)
            save_model(partial, params, config, like)
            (partial / "trainer.json").write_text(json.dumps(trainer, indent=1))
            keys = "\n".join(sorted(read_trained_on(like).union(trained_on)))
            for weights_dir in (partial, *partial.glob("adapter")):
                (weights_dir / "trained_on.txt").write_text(keys)
            names = [file.relative_to(partial).as_posix() for file in partial.rglob("*.*")]
        gather_objects(None)  # the directory is there
        save_file({name: getattr(optimizer, name).cpu() for name in STATE}, shard)
        shutil.copymode(partial / "config.json", shard)
        sums = fingerprints(partial, [*names, shard.name])
        if rank == 0:
            (partial / "checksums.json").write_text(json.dumps(sums, indent=1))
            for file in partial.rglob("*.*"):  # on the disk before the name says that it is whole
                with open(file, "r+b") as handle:  # Windows syncs what it may write
                    os.fsync(handle.fileno())
            if path.exists():
                remove_whole(path)
            os.replace(partial, path)
            point_to_best(home, best_step)
            for old in list_checkpoints(run_dir)[:-keep]:
                if step_of(old) != best_step:
                    remove_whole(old)
    gather_objects(None)  # it has its name
    return path


def load_checkpoint(path, optimizer):
    """Fill `optimizer`, and so the parameters, with what save_checkpoint wrote, bit for bit.

    On any number of processes. path: None for a run without one, which is at step 0. Returns
    {"step", "best_step", "extra", ...}. Raises ValueError in every process when the checkpoint is
    damaged, and when it is of other parameters.
    """
    if path is None:
        return {"step": 0, "best_step": None, "extra": {}}
    path = Path(path)
    rank, world = rank_and_world()
    written = {}
    with suppress(OSError, ValueError):
        written = read_json(path / "checksums.json")
    found = fingerprints(path, sorted(written)[rank::world])
    damaged = [name for name in written if found[name] != written[name]]
    if damaged or "trainer.json" not in written:
        raise ValueError(f"{path / (damaged or ['checksums.json'])[0]} is damaged. Remove {path}; "
                         "then --resume goes on from the checkpoint before it, or from the start")
    trainer = read_json(path / "trainer.json")
    if {name: tuple(span) for name, span in trainer["spans"].items()} != optimizer.spans:
        raise ValueError(f"{path}: holds the state of other parameters than are to be trained; "
                         "resume with the run's model and LoRA rank")
    for index in range(trainer["world"]):
        begin = index * trainer["shard"] - rank * len(optimizer.master)  # in this process's share
        mine = slice(max(0, begin), max(0, begin + trainer["shard"]))
        start = max(0, -begin)
        with safe_open(path / shard_name(index, trainer["world"]), framework="pt") as file:
            for name in STATE:
                target = getattr(optimizer, name)[mine]
                if len(target):
                    target.copy_(file.get_slice(name)[start:start + len(target)])
    optimizer.updates.fill_(trainer["updates"])
    shard = optimizer.params.view(world, -1)[rank]
    with torch.no_grad():
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


def cut_log(path, step):
    """Drop the records of later steps from a .jsonl file, and a line that a kill cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        with suppress(ValueError, TypeError, LookupError):  # not a record: it goes, too
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line.decode())
    write_whole(path, "".join(kept))


def log_step(run, line, metrics):
    """Print `line`, a format string over `metrics`, and append `metrics` to metrics.jsonl.

    metrics: {"step": int, name: number, ...}; what is not finite becomes null in the file. Log a
    step before saving its checkpoint, or a kill in between loses its record. Process 0 only.
    """
    if run.rank == 0:
        print(line.format(**metrics), flush=True)
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_lines(run.dir / "metrics.jsonl", [record])
        if run.wandb:
            run.wandb.log(record, step=metrics["step"])


def log_samples(run, step, samples):
    """Append whole completions, a dict each, to samples.jsonl. Process 0 only."""
    if run.rank == 0:
        append_lines(run.dir / "samples.jsonl", [{"step": step} | sample for sample in samples])


# ------------------------------------------------------------ the directory


def lock_run(run_dir):
    """Lock a run's directory until this process ends, killed or not: the system frees the lock, and
    the file that remains means nothing. Returns the open handle, which holds it.

    Raises ValueError, with the holder's id, when another process has it.
    """
    path = run_dir / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if sys.platform == "win32":
            import msvcrt
            os.lseek(handle, 1 << 20, os.SEEK_SET)  # what is locked there cannot be read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{run_dir} is in use by {path.read_text()}; wait until it ends, or "
                         "choose another --run-dir") from None
    except OSError as error:
        print(f"{run_dir} cannot be locked ({error}): let no other process use it")
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
    return handle


def claim_run_dir(args):
    """Make --run-dir this process's until it ends. Call it first, and before any fork.

    Raises ValueError when it holds something else, or a run and no word on what to do with it, and
    when another process is at work there.
    """
    path = Path(args.run_dir)
    held = [p.name for p in path.glob("*") if p.name != "lock" and p.suffix != ".partial"]
    if held and "flags.json" not in held:
        raise ValueError(f"{path} is not empty and holds no run (no flags.json); choose another "
                         "--run-dir")
    if held and not args.resume and not args.overwrite:
        raise ValueError(f"{path} holds a run; --resume goes on with it, --overwrite deletes it, "
                         "--run-dir takes another directory")
    if rank_and_world()[0] == 0:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock_run(path)


def save_flags(args, path, checkpoint):
    """Print the flags and write them to flags.json; compare them with what stood there before."""
    flags = {name: value for name, value in vars(args).items() if name not in NO_FLAGS}
    flags = json.loads(json.dumps(flags, default=str))  # as they will be read back
    saved = read_json(path) if args.resume and path.is_file() else {}
    for name in flags.keys() & saved.keys():
        if flags[name] != saved[name]:
            change = (f"{flag_name(name)} is {flags[name]}, and the run was started with "
                      f"{saved[name]}")
            if checkpoint and name not in FREE_FLAGS:
                raise ValueError(f"{change}; put it back, or start a new run with --model "
                                 f"{checkpoint} and another --run-dir")
            print(change)
    write_whole(path, json.dumps(flags, indent=1) + "\n")
    print(*(f"{flag_name(name)} {value}" for name, value in flags.items()), flush=True)


def code_commit():
    """The commit of this code, with -dirty if files differ from it; None outside a repository."""
    words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None


def describe_start(args, checkpoint):
    """Where a run comes from, for starts.jsonl: command, commit, machine and versions."""
    device = find_device(args.device)
    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif sys.platform == "linux":  # where the above is empty
        cpuinfo = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)|$", cpuinfo)[1] or name
    packages = ("torch", "tokenizers", "safetensors", "numpy")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return {
        "time": time.time(), "command": own_command(), "commit": code_commit(),
        "from": checkpoint.name if checkpoint else "the start",
        "machine": f"{rank_and_world()[1]} x {device.type}: {name}, {os.cpu_count()} cores, "
                   f"{platform.platform()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}"}


def start_wandb(args):
    """The run of Weights & Biases, on --resume the one that was there."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package: pip install wandb") from None
    run_dir = Path(args.run_dir)
    known = run_dir / "wandb_id"
    if not (args.resume and known.is_file()):
        known.write_text(os.urandom(4).hex())
    return wandb.init(project=args.wandb, name=run_dir.name, dir=run_dir, config=vars(args),
                      resume="allow", id=known.read_text())


def start_run(args):
    """Open the run in a directory that claim_run_dir got: (Run, the checkpoint to go on from or
    None).

    With --resume the logs are cut back to the checkpoint; ValueError for a flag that differs from
    flags.json and is not one of FREE_FLAGS, as the run would not go on as it began. Process 0
    writes, the others wait.
    """
    rank, _ = rank_and_world()
    run_dir = Path(args.run_dir)
    checkpoint = wandb_run = None
    if rank == 0:
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
        append_lines(run_dir / "starts.jsonl", [describe_start(args, checkpoint)])
        if args.wandb:
            wandb_run = start_wandb(args)
    return Run(run_dir, rank, wandb_run), gather_objects(checkpoint)[0]


# ------------------------------------------------------------ stopping


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

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: any(gather_objects(bool(received)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
