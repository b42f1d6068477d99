"""Command-line support for every script: flags, devices, processes, console output, errors.

Multiple processes are started by torchrun or, on a CPU, by forking. Either way they form one
process group, and an error in any of them ends all of them.
"""

import argparse
import atexit
import ctypes
import functools
import math
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import did_you_mean, read_json

# ------------------------------------------------------------ flags


def bounded(kind, fits, expected):
    """Return an argparse type: a finite `kind` (int or float) for which fits(value) is true."""
    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse prints this name in its errors
    return parse


def at_least(low):
    return bounded(type(low), lambda value: value >= low, f"at least {low}")


def above(low):
    return bounded(type(low), lambda value: value > low, f"more than {low}")


def between(low, high):
    return bounded(type(low), lambda value: low <= value <= high, f"{low} to {high}")


below_one = bounded(float, lambda value: 0 <= value < 1, "at least 0 and less than 1")
step_size = bounded(float, lambda value: 0 < value <= 1, "more than 0 and at most 1: AdamW moves "
                    "each weight by about this much per step")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Preserves the docstring's line breaks and shows the default of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with this help format, which suggests a match for an unknown flag."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, formatter_class=HelpFormatter,
                         usage=argparse.SUPPRESS, **kwargs)  # keeps errors to one line

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}"
                       f"{did_you_mean(flag, self._option_string_actions)}")
        return args


def usable_cores():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def add_device_flags(parser):
    """Add --device, --dtype and --processes, which every script that samples or trains has."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="compute dtype; auto: bfloat16 on a GPU that supports it, else float32")
    add("--processes", type=between(1, max(8, usable_cores())), help="single-threaded forks "
        "on a Linux CPU (default: one per core, at most 8, as memory allows)")


def add_train_flags(parser, lr, run_dir, lr_help="peak learning rate"):
    """Add the flags common to sft.py and grpo.py. lr, run_dir: their defaults."""
    add_device_flags(parser)
    add = parser.add_argument_group("training").add_argument
    add("--adapter", help="directory of a LoRA adapter (PEFT format) to start from")
    add("--lr", type=step_size, default=lr, help=lr_help)
    add("--warmup", type=at_least(0), default=10, help="steps of linear warm-up")
    add("--betas", type=below_one, nargs=2, default=[0.9, 0.999], help="AdamW's betas")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="applied to matrices only")
    add("--clip", type=at_least(0.0), default=1.0, help="maximum gradient norm; 0: no limit")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="seed of every random choice")
    add("--offload", action="store_true", help="masters and Adam moments in host memory (GPU only)")
    add("--timeout-min", type=above(0.0), default=120.0,
        help="minutes a process waits for the others before the run is aborted")
    add("--run-dir", default=run_dir, help="directory of the run")
    add("--save-every", type=at_least(1), default=25, help="steps between checkpoints")
    add("--keep", type=at_least(1), default=2, help="recent checkpoints to keep besides the best")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases (pip install wandb)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue from the newest checkpoint, if any")
    add("--overwrite", action="store_true", help="delete the run in --run-dir first")


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def fill_unset(args, defaults):
    """Set the flags of `args` that are None to their defaults, in place."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse_train_args(parser, argv=None):
    """parser.parse_args(argv); with --resume, flags default to the values saved with the run."""
    args = parser.parse_args(argv)
    saved = Path(args.run_dir, "flags.json")
    if args.resume and saved.is_file():
        flags = {name: value for name, value in read_json(saved).items() if name in vars(args)}
        parser.set_defaults(**flags | {"run_dir": args.run_dir})
        args = parser.parse_args(argv)
    return args


# ------------------------------------------------------------ devices


def find_device(name):
    """Return the torch.device for auto, cpu, cuda, cuda:N or mps (which auto never picks).

    Under torchrun each process gets its own GPU. Raises ValueError if there is no such device.
    """
    # packed rows vary in length and fragment memory; must be set before CUDA is first used
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"unknown --device {name}; expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch found no Apple GPU; pass --device cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", match[1] or 0))
    if index >= gpus:
        raise ValueError(f"no GPU {index}, {gpus} found; run fewer processes or pass --device cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN replans for every shape, up to 0.4 s
    return torch.device("cuda", index)


def compute_dtype(name, device):
    """Return the dtype for --dtype; "auto": bfloat16 on a GPU that supports it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    kind = torch.device(device).type
    modern = kind == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
    if kind == "cuda":  # if none is present, assume a recent one
        modern = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if modern else torch.float32


def total_memory_gib(device, processes=1):
    """Total GiB of the GPU, or of host memory per process; inf if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return gib / int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def peak_memory_gib(device):
    """This process's peak memory in GiB: allocated tensors on a GPU, resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------ processes


def rank_and_world():
    """(rank, number of processes), also before init_distributed; (0, 1) for a single process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def default_processes(device, gib_each, gib_shared=0.0):
    """Return the default of --processes: one per usable core, at most 8, as memory allows.

    1 where forking is unavailable, and under torchrun. gib_each: memory per process, in addition
    to the gib_shared that all of them share.
    """
    if sys.platform != "linux" or "WORLD_SIZE" in os.environ or find_device(device).type != "cpu":
        return 1
    return max(1, min(usable_cores(), 8, int((total_memory_gib("cpu") - gib_shared) / gib_each)))


def fork_processes(count):
    """Become `count` single-threaded processes, with torchrun's environment variables set.

    This process is rank 0; whatever ends it, the kernel kills the others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    parent = os.getpid()
    rank = 0
    for child_rank in range(1, count):
        if rank == 0 and os.fork() == 0:
            rank = child_rank
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # the parent ended before the prctl call
                os._exit(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "TOKENIZERS_PARALLELISM": "false"}  # its threads do not survive a fork
    torch.set_num_threads(1)


def exit_immediately(kind, error, trace):
    """The excepthook of multi-process runs: report the error; skip clean-up, which could hang."""
    rank, world = rank_and_world()
    text = "".join(traceback.format_exception(error))
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        # give the process that failed first time to report; its exit ends this one
        time.sleep(5 if rank == 0 else 30)
        text = (f"another process failed; see its error. If there is none, it was killed, often "
                f"for lack of memory ({error})\n")
    print(f"process {rank} of {world} failed: {text}", end="", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def quit_on_second_signal():
    """From now on, a second Ctrl-C or SIGTERM ends this process at once, even inside a collective.

    Python runs signal handlers in the main thread only, which stays in a collective for as long as
    another process is frozen. A thread reads the signals from the interpreter's wakeup socket.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())

    def wait():
        count = 0
        while count < 2:
            number = reader.recv(1)[0]
            count += number in (signal.SIGINT, signal.SIGTERM)
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


def init_distributed(device="auto", processes=1, timeout_min=120):
    """Set up the process group and return (rank, world, device).

    device: a name for find_device. processes: how many to fork into if torchrun started none; forks
    share memory loaded before the call, such as frozen weights. All processes end when one fails
    or has waited `timeout_min` minutes for the others.
    """
    device = find_device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if processes > 1 and rank_and_world()[1] == 1:
        if on_gpu or sys.platform != "linux":
            raise ValueError(f"--processes {processes} works on a CPU under Linux only; elsewhere "
                             "use torchrun, or --processes 1")
        fork_processes(processes)
    rank, world = rank_and_world()
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(minutes=timeout_min))
        atexit.register(dist.destroy_process_group)
        quit_on_second_signal()
        sys.excepthook = exit_immediately
    return rank, world, device


def gather_objects(value):
    """Return every process's value, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------ console output


def say(*words):
    """Print, on process 0 only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


say_once = functools.cache(say)  # each distinct message


def printable(text):
    """Escape the control codes in a model's or server's text, so that no terminal acts on them."""
    codes = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(codes, lambda code: ascii(code[0])[1:-1], text)


@contextmanager
def progress_bar(total, name=None, quiet=False):
    """Show progress over `total` completions. Yields the on_step callback to pass to `generate`.

    Counts cover all processes, extrapolated from this one. The bar shows tokens per second and the
    time left; in a log file it prints once a minute. quiet: only on a terminal, and cleared at the
    end. on_step(..., joined=n) adds n completions to the total.
    """
    rank, world = rank_and_world()
    terminal = sys.stderr.isatty()
    tokens = 0

    def on_step(ended, num_tokens, joined=0):
        nonlocal tokens
        tokens += world * num_tokens
        speed = tokens / max(1e-9, bar.format_dict["elapsed"])
        bar.set_postfix_str(f"{speed:.0f} tok/s", refresh=False)
        bar.total += world * joined
        bar.update(min(world * len(ended), bar.total - bar.n))

    hidden = rank > 0 or total == 0 or quiet and not terminal
    with tqdm(total=total, desc=name, unit="answer", disable=hidden, leave=not quiet,
              miniters=0, mininterval=0.3 if terminal else 60) as bar:
        yield on_step
        bar.n = bar.total


def phase_bar(items, name):
    """Iterate over `items` with a bar, on process 0's terminal only, cleared at the end."""
    return tqdm(items, desc=name, leave=False, disable=rank_and_world()[0] > 0 or None)


# ------------------------------------------------------------ the command


def own_command():
    """The command that started this script, without --resume and --overwrite."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    launcher = "python"
    if dist.is_torchelastic_launched():
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{launcher} {shlex.join(words)}"


def resume_hint(args):
    """How to resume, given the script's flags."""
    if hasattr(args, "resume"):
        return f"; resume with: {own_command()} --resume"
    if getattr(args, "records", None):
        return f"; run the same command again to continue from {args.records}"
    return "; pass --records to make it resumable" if hasattr(args, "records") else ""


def run_main(main, parse_args):
    """Run a script's main. A user's error becomes one line on stderr and exit code 2.

    Ctrl-C becomes one line with how to resume, and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    script = Path(sys.argv[0]).name
    hint = ""
    try:
        args = parse_args()
        hint = resume_hint(args)
        main(args)
    except (ValueError, OSError) as error:
        if rank_and_world()[0] > 0:
            time.sleep(2)  # if process 0 fails for the same reason, its exit ends this one
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():  # clean-up would wait for the others
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_and_world()[0] == 0:
            print(f"\n{script}: stopped{hint}", file=sys.stderr)
        sys.exit(130)
