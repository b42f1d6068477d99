"""What every script needs as a command: flags, devices, processes, and what it says on the way.

torchrun starts many processes, or on a CPU the first one forks. From then on they are the same:
ranked, in one process group, and ended together by an error or a second Ctrl-C.
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


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the docstring, and shows the defaults that there are."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's, with such help, and a guess at what an unknown flag was meant to be."""

    def __init__(self, description, **more):
        super().__init__(description=description, formatter_class=HelpFormatter,
                         usage=argparse.SUPPRESS, **more)  # an error is one line

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
    """The flags of every script that samples or trains: --device, --dtype, --processes."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (a GPU when there is one), cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the computation; auto: bfloat16 on a GPU that has it, else float32")
    add("--processes", type=between(1, max(8, usable_cores())), help="forks of one thread each, on "
        "a CPU under Linux (default: one per core, at most 8 and as many as memory holds)")


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


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def fill_unset(args, defaults):
    """Fill in the flags that were left out. Writes into `args`."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse_train_args(parser, argv=None):
    """parser.parse_args(argv); with --resume, the run's own flags are the defaults."""
    args = parser.parse_args(argv)
    saved = Path(args.run_dir, "flags.json")
    if args.resume and saved.is_file():
        flags = {name: value for name, value in read_json(saved).items() if name in vars(args)}
        parser.set_defaults(**flags | {"run_dir": args.run_dir})
        args = parser.parse_args(argv)
    return args


# ------------------------------------------------------------ devices


def find_device(name):
    """The torch.device of "auto", "cpu", "cuda", "cuda:N" or "mps" (never chosen by "auto").

    torchrun's processes take a GPU each. Raises ValueError when there is no such device.
    """
    # for packed rows; they are of every length, and it is read when CUDA is first used
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    found = re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", name)
    if not found:
        raise ValueError(f"--device {name} is not known; expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch finds no Apple GPU here; pass --device cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", found[1] or 0))
    if index >= gpus:
        raise ValueError(f"GPU {index} is wanted and there are {gpus}; run fewer processes, or "
                         "pass --device cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, up to 0.4 s, for every shape
    return torch.device("cuda", index)


def compute_dtype(name, device):
    """The dtype of --dtype NAME; "auto": bfloat16 on a GPU that computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    kind = torch.device(device).type
    modern = kind == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
    if kind == "cuda":  # a plan may be made where there is none
        modern = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if modern else torch.float32


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
    if sys.platform == "win32":
        return math.nan
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------ processes


def rank_and_world():
    """(rank, number of processes), under torchrun known from the start; (0, 1) for one process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def default_processes(device, gib_each, gib_shared=0.0):
    """What --processes means when it is left out: a usable core each, at most 8, as memory allows.

    1 where this process cannot fork, or torchrun has started it. gib_each: what a process takes
    beside the gib_shared that all of them read.
    """
    if sys.platform != "linux" or "WORLD_SIZE" in os.environ or find_device(device).type != "cpu":
        return 1
    return max(1, min(usable_cores(), 8, int((memory_there("cpu") - gib_shared) / gib_each)))


def fork_into(count):
    """Become `count` processes of one thread each, in the environment that torchrun gives.

    This one is rank 0. The others end with it, whatever ends it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    parent = os.getpid()
    rank = 0
    for number in range(1, count):
        if rank == 0 and os.fork() == 0:
            rank = number
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it had ended before
                os._exit(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "TOKENIZERS_PARALLELISM": "false"}  # the tokenizer's threads are not forked
    torch.set_num_threads(1)


def leave_at_once(kind, error, trace):
    """The excepthook of one process among many, without the clean-up that could wait for ever."""
    rank, world = rank_and_world()
    text = "".join(traceback.format_exception(error))
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        # the process that failed first ends this one, when its error is shown
        time.sleep(5 if rank == 0 else 30)
        text = (f"it lost another process, whose error is the one to read; without one it was "
                f"killed, often because memory ran out ({error})\n")
    print(f"process {rank} of {world} failed: {text}", end="", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


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


def init_distributed(device="auto", processes=1, timeout_min=120):
    """(rank, world, device), the process group set up: torchrun's, or forks of this process.

    device: as for find_device. processes: how many to become without torchrun. They share what was
    loaded before, such as frozen weights. When one fails, all end; so they do when one has waited
    `timeout_min` minutes for the others.
    """
    device = find_device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if processes > 1 and rank_and_world()[1] == 1:
        if on_gpu or sys.platform != "linux":
            raise ValueError(f"--processes {processes} forks on a CPU under Linux only; elsewhere "
                             "torchrun starts many processes, and --processes 1 is one")
        fork_into(processes)
    rank, world = rank_and_world()
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None,
                                timeout=timedelta(minutes=timeout_min))
        atexit.register(dist.destroy_process_group)
        quit_on_second_signal()
        sys.excepthook = leave_at_once
    return rank, world, device


def gather_objects(value):
    """What every process passed, in the order of their ranks, known to every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------ what it says


def say(*words):
    """Print, on process 0 only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


say_once = functools.cache(say)  # the same words


def printable(text):
    """A model's or a server's text without the codes that a terminal would obey, spelled out."""
    codes = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(codes, lambda code: ascii(code[0])[1:-1], text)


@contextmanager
def progress_bar(total, name=None, quiet=False):
    """Yields an on_step for `generate`, which moves a bar over so many completions.

    They are those of all processes, guessed from this one's. The bar says how many tokens a second
    these are, and how long the rest will take; in a log file, once a minute. quiet: only on a
    terminal, and gone at the end. on_step(..., joined): so many more completions are asked for.
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


def show_phase(items, name):
    """The items, with a bar while they are gone through: on process 0's terminal, and then gone."""
    return tqdm(items, desc=name, leave=False, disable=rank_and_world()[0] > 0 or None)


# ------------------------------------------------------------ the command


def own_command():
    """The command that this script was started with, but for --resume and --overwrite."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    launcher = "python"
    if dist.is_torchelastic_launched():
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{launcher} {shlex.join(words)}"


def how_to_go_on(args):
    """What a script says when it is stopped, by the flags that it has."""
    if hasattr(args, "resume"):
        return f"; go on with: {own_command()} --resume"
    if getattr(args, "records", None):
        return f"; the same command goes on from what {args.records} holds"
    return "; with --records it could go on from here" if hasattr(args, "records") else ""


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
