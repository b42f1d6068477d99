"""Shared test helpers: assertions, running our scripts as a user does, tiny models."""

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import attention
import launch
import model
import optim

ROOT = Path(__file__).resolve().parent.parent

# ---- a GPU's attention on a CPU


def varlen_on_cpu():
    """Replace attention.varlen_attn, which needs a GPU, with its documented computation."""
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1),
                    enable_gqa=False, seqused_k=None):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[0] == -1
        outs = []
        for i, (begin, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:])):
            first, last = cu_seq_k[i:i + 2].tolist()
            if seqused_k is not None:
                assert seqused_k[i] <= last - first
                last = first + int(seqused_k[i])
            assert end - begin <= max_q and last - first <= max_k
            q, k, v = (x.transpose(0, 1)[None] for x in (
                query[begin:end], key[first:last], value[first:last]))
            mask = torch.ones(end - begin, last - first, dtype=torch.bool)
            if window_size[1] == 0:  # causal, aligned at the bottom right
                mask = mask.tril(last - first - (end - begin))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return mock.patch.object(attention, "varlen_attn", varlen_attn)


# ---- assertions


@contextlib.contextmanager
def raises(kind, *words):
    """The block must raise `kind`, with a one-line message that contains all of `words`."""
    try:
        yield
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(word in text for word in words), (words, text)
    else:
        raise AssertionError(f"expected a {kind.__name__} with {words}, but nothing was raised")


def skip_unless(found, variable, what):
    """Skip the test if `what` was not found, or fail it if `variable`, meant to locate it, is set.

    CI sets the variables for the files it has, so that no test is skipped there unnoticed.
    """
    if not found:
        message = f"{what}: not found; set {variable} to its path"
        assert variable not in os.environ, f"{message}, now {os.environ[variable]}"
        raise unittest.SkipTest(message)


def gradients(params, loss_fn):
    """{name: gradient} after loss_fn(leaves), which calls backward(), on a copy of params."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    loss_fn(leaves)
    return {name: tensor.grad for name, tensor in leaves.items()}


def assert_same_gradients(a, b, tolerance=1e-9):
    for name in a:
        gap = (a[name] - b[name]).abs().max()
        assert gap <= tolerance, (name, gap)


# ---- our scripts

# A GRPO run of a few seconds.
GRPO_RUN = ["grpo.py", "--model", "tiny", "--prompts", 4, "--group", 4, "--max-new-tokens", 40,
            "--steps", 4, "--eval-limit", 4, "--test-limit", 4, "--train-limit", 40,
            "--eval-every", 2, "--save-every", 1, "--keep", 9, "--lr", 1e-4, "--processes", 1]


def run(*words, ok=True, env=None):
    """Stdout of `python *words` in a new process or, with ok=False, its one-line error."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def in_process(script, *words):
    """Run the script's main() in this process, where it can be patched; returns its output."""
    module = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.main(module.parse_args(list(map(str, words))))
    return out.getvalue()


def error_of(script, *words):
    """The error message with which the script rejects these flags."""
    try:
        in_process(script, *words)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    raise AssertionError(f"{script} accepted {words}")


def weights_of(run_dir, step):
    path = Path(run_dir) / "checkpoints" / f"step_{step:06d}" / "model.safetensors"
    return path.read_bytes()


# ---- tiny models


def formula_model(tied=True, yarn=False):
    """(params, config) with weights from a formula, so that another library can recreate them."""
    scaling = model.Yarn(4.0, 16) if yarn else None
    config = model.Config(96, 64, 80, 3, 4, 2, max_position_embeddings=16 if yarn else 64,
                          rope_theta=10000.0, tie_word_embeddings=tied, rope_scaling=scaling,
                          eos_token_id=(95,))
    params = {}
    for i, (name, shape) in enumerate(model.param_shapes(config).items()):
        squares = torch.arange(math.prod(shape), dtype=torch.float64).square()
        wave = (squares * 0.7 + i).sin().view(shape)
        if name.endswith("norm.weight"):
            params[name] = (1 + 0.2 * wave).float()
        elif name.endswith("bias"):
            params[name] = (0.5 * wave).float()
        else:
            params[name] = (0.25 * wave).float()
    return params, config


FORMULA_TOKENS = (torch.arange(40) ** 2 * 7 % 96)[None]  # [1, 40]


def double_model(vocab=64, **changes):
    """(params, config) of a random float64 model with grouped-query attention."""
    config = model.Config(vocab, 32, 48, 2, 4, 2, max_position_embeddings=256,
                          initializer_range=0.15, eos_token_id=(1,))
    config = config._replace(**changes)
    return model.init_params(config, seed=0, dtype=torch.float64), config


def merge_lora(params):
    """A copy of params with the adapter merged."""
    return {name: model.merged_weight(params, name) for name in params if ".lora_" not in name}


def bytes_tokenizer():
    """A byte-level tokenizer with ChatML's three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def small_model(seed=0):
    """(params, config, tokenizer) of a random byte-level model."""
    config = model.Config(259, 32, 48, 2, 4, 2, max_position_embeddings=2048, eos_token_id=(258,))
    return model.init_params(config, seed), config, bytes_tokenizer()


# ---- a small training run

TRAIN_CONFIG = model.Config(61, 32, 64, 2, 4, 2)
TRAIN_SCRIPT = '''  # a small training run; its data depend only on the step
import run, time, torch
from launch import *
from model import init_params, token_logprobs
from optim import *
from run import *
from tests.common import TRAIN_CONFIG as config, train_args
run.FREE_FLAGS += ("fail_at",)

def main(args):
    torch.set_num_threads(1)
    claim_run_dir(args)
    rank, world, device = init_distributed("cpu", args.processes or 1)
    run, checkpoint = start_run(args)
    params, optimizer = init_optimizer(init_params(config, seed=0), device)
    done = load_checkpoint(checkpoint, optimizer)["step"]
    with stop_signals() as stop_requested:
        for step in range(done + 1, 13):
            rows = torch.randint(61, (6, 9), generator=torch.Generator().manual_seed(step))
            loss = -token_logprobs(params, config, rows[rank::world]).sum() / 48
            loss.backward()
            time.sleep(0.02)
            if step == args.fail_at and rank == world - 1:
                raise RuntimeError("the planted failure")
            lr = learning_rate(step, 12, args.lr, args.warmup)
            metrics = optimizer_step(optimizer, lr, weight_decay=0.1, clip=0.5)
            metrics |= {"step": step, "loss": sum(gather_objects(loss.item()))}
            log_step(run, "step {step}/12 | loss {loss:.4f} nat", metrics)
            stopping = stop_requested()
            if stopping or step % args.save_every == 0 or step == 12:
                save_checkpoint(run.dir, step, params, config, run.dir, optimizer,
                                {"seen": 6 * step}, args.keep, best_step=1)
            if stopping:
                raise KeyboardInterrupt

run_main(main, train_args)
'''


@contextlib.contextmanager
def temporary_dir():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def start_training(home, run, *flags, processes=1):
    """Start TRAIN_SCRIPT in `home`, in one process or under torchrun; returns the Popen."""
    (home / "script.py").write_text(TRAIN_SCRIPT)
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen([sys.executable, *launcher, "script.py", "--run-dir", run, *flags],
                            cwd=home, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def wait_for_steps(path, steps, process):
    """Wait until the run has logged this many steps, or has ended."""
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < steps):
        time.sleep(0.005)


def write_lines(path, rows):
    """Write the rows to a .jsonl file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    """The objects in a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def file_hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def trained_state(steps, dtype=torch.float32, trainable=None):
    """(params, optimizer) of a tiny model after some updates with random gradients."""
    params, optimizer = optim.init_optimizer(trainable or model.init_params(TRAIN_CONFIG, 0),
                                             dtype=dtype)
    train_on(optimizer, range(steps))
    return params, optimizer


def train_on(optimizer, steps):
    """Apply one update per step, with random gradients seeded by it."""
    for step in steps:
        optimizer.grads.normal_(generator=torch.Generator().manual_seed(step))
        optim.optimizer_step(optimizer, 1e-3)


def train_args(*flags):
    """Parse these flags as a training script does; the command line's if there are none."""
    parser = launch.Parser("A run.")
    launch.add_train_flags(parser, lr=1e-3, run_dir="runs/none")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fail-at", type=int, default=0)
    return launch.parse_train_args(parser, flags or None)


# ---- scripted models


def sum_problems(n):
    return [{"id": f"sum/{i}", "problem": f"{i}+1", "answer": str(i + 1), "level": i % 5 + 1,
             "subject": "sums"} for i in range(n)]


def scripted(reply_fn):
    """A fake generate() that answers reply_fn(prompt text, prompt seed, sample), in bytes.

    Replies are truncated to max_new_tokens.
    """
    from generate import Completion

    tokenizer = bytes_tokenizer()

    def complete(reply, limit):
        tokens = tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False).ids
        finish = "stop" if len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        return Completion(tokens, [-0.25] * len(tokens), finish)

    def generate(params, config, prompts, *, num_samples=1, seeds=None, max_new_tokens=100,
                 on_step=None, on_done=None, **_):
        rows = []
        for i, prompt in enumerate(prompts):
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            seed = seeds[i] if seeds else i
            rows.append([complete(reply_fn(text, seed, sample), max_new_tokens)
                         for sample in range(num_samples)])
            if on_done:
                on_done(i, rows[-1])
            if on_step:
                ended = [(i, sample, c) for sample, c in enumerate(rows[-1])]
                on_step(ended, sum(len(c.tokens) for c in rows[-1]))
        return rows

    return generate


@contextlib.contextmanager
def answering(reply_fn, script="eval"):
    """Replace the script's generate() with scripted(reply_fn), and hide progress bars.

    Yields a StringIO with the printed output.
    """
    with (mock.patch(f"{script}.generate", scripted(reply_fn)),
          contextlib.redirect_stderr(io.StringIO()),
          contextlib.redirect_stdout(io.StringIO()) as output):
        yield output


def parse_sum(text):
    """The n in a prompt that asks for n+1."""
    return int(re.search(r"user\n(\d+)\+1", text)[1])


def scripted_setup(problems, **options):
    """An eval.Setup of these problems and a small model, for use with a patched generate()."""
    from data.prompts import encode_prompt
    from eval import Setup

    params, config, tokenizer = small_model()
    defaults = {"prompt": "cot", "system": None, "shots": [], "think_tag": "think",
                "num_samples": 1, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "seed": 0,
                "max_new_tokens": 100, "max_batch": 64}
    settings = {"model": "tiny", "data": "sums", "split": "test"}
    prompts = [encode_prompt(tokenizer, "cot", p) for p in problems]
    return Setup(params, config, tokenizer, problems, prompts, defaults | options, settings)
