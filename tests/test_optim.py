"""Tests of optim.py."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from argparse import ArgumentParser
from pathlib import Path
from unittest import mock

import torch

import model
import optim
from tests.common import ROOT, raises

_OPTIM_CONFIG = model.Config(61, 32, 64, 2, 4, 2)
_OPTIM_SCRIPT = '''  # a training run in small: data and weights follow from (seed, step)
import argparse, optim, time, torch
from model import Config, init_params, token_logprobs
from optim import *
optim.FREE_FLAGS += ("fail_at",)

def parse_args():
    parser = argparse.ArgumentParser()
    add_train_flags(parser, lr=1e-3, run_dir="run")
    parser.add_argument("--fail-at", type=int, default=0)
    return parse_train_args(parser)

def main(args):
    torch.set_num_threads(1)
    rank, world, device = init_distributed("cpu", args.processes or 1)
    run, checkpoint = start_run(args)
    config = Config(61, 32, 64, 2, 4, 2)
    params, optimizer = init_optimizer(init_params(config, seed=0), device)
    done = load_checkpoint(checkpoint, optimizer)["step"] if checkpoint else 0
    with stop_signals() as stop_requested:
        for step in range(done + 1, 13):
            rows = torch.randint(61, (6, 9), generator=torch.Generator().manual_seed(step)).split(1)
            losses = [-token_logprobs(params, config, row).sum() / 48 for row in rows[rank::world]]
            for loss in losses:
                loss.backward()
            time.sleep(0.02)
            if step == args.fail_at and rank == world - 1:
                raise RuntimeError("the planted failure")
            lr = learning_rate(step, 12, args.lr, args.warmup)
            stats = optimizer_step(optimizer, lr, weight_decay=0.1, clip=0.5)
            loss = all_sum([sum(loss.item() for loss in losses)])[0]
            metrics = {"step": step, "loss": loss} | stats
            log_step(run, "step {step}/12 | loss {loss:.4f} nat", metrics)
            stopping = stop_requested()
            if stopping or step % args.save_every == 0 or step == 12:
                save_checkpoint(run.dir, step, params, config, run.dir, optimizer,
                                {"seen": 6 * step}, args.keep, best_step=1)
            if stopping:
                raise KeyboardInterrupt

optim.run_main(main, parse_args)
'''


@contextlib.contextmanager
def _optim_dir():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _optim_command(home, run, *flags, processes=1):
    """Popen of _OPTIM_SCRIPT in `home`, in one process or under torchrun."""
    (home / "script.py").write_text(_OPTIM_SCRIPT)
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen([sys.executable, *launcher, "script.py", "--run-dir", run, *flags],
                            cwd=home, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _optim_finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def _optim_wait_for(path, steps, process):
    """Until the run has logged that many steps."""
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < steps):
        time.sleep(0.005)


def _optim_hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def _optim_state(steps, dtype=torch.float32, trainable=None):
    """(params, optimizer) of a tiny model after some updates from random gradients."""
    params, optimizer = optim.init_optimizer(trainable or model.init_params(_OPTIM_CONFIG, 0),
                                             dtype=dtype)
    _optim_train(optimizer, range(steps))
    return params, optimizer


def _optim_train(optimizer, steps):
    for step in steps:
        optimizer.grads.normal_(generator=torch.Generator().manual_seed(step))
        optim.optimizer_step(optimizer, 1e-3)


def _optim_save(run_dir, step, params, optimizer, keep=2, best_step=None):
    return optim.save_checkpoint(run_dir, step, params, _OPTIM_CONFIG, run_dir, optimizer,
                                 {"seen": step}, keep, best_step)


def _optim_equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name))
               for name in ("params", "master", "m", "v", "updates"))


def _optim_args(*flags):
    parser = ArgumentParser(formatter_class=optim.HelpFormatter)
    optim.add_train_flags(parser, lr=1e-3, run_dir="runs/none")
    parser.add_argument("--steps", type=int, default=10)
    return optim.parse_train_args(parser, flags)


def test_optim_learning_rate():
    rates = [optim.learning_rate(step, 100, 2.0, 10) for step in range(1, 101)]
    assert abs(rates[0] - 0.2) < 1e-12 and rates[9] == 2.0 and abs(rates[99] - 0.2) < 1e-12
    assert abs(rates[54] - 1.1) < 1e-12  # half way down the cosine: the mean of peak and floor
    assert rates[9:] == sorted(rates[9:], reverse=True) and optim.learning_rate(1, 1, 2.0, 0) == 0.2


def test_optim_adamw_equals_torch():
    """Fifty steps: clipping, decay of the matrices only, slices that cut through parameters.

    Both get the same gradients: in a model, those that should be zero (of the key biases) are
    noise, and Adam blows it up.
    """
    start = model.init_params(_OPTIM_CONFIG, 1)
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    groups = [{"params": [t for t in theirs.values() if t.dim() == 2], "weight_decay": 0.1},
              {"params": [t for t in theirs.values() if t.dim() == 1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False)
    ours, optimizer = optim.init_optimizer(start)
    assert list(ours) == list(start) and optimizer.master.data_ptr() == optimizer.params.data_ptr()
    generator, clipped = torch.Generator().manual_seed(0), 0
    with mock.patch.object(optim, "SLICE", 1000):
        for step in range(1, 51):
            for _ in range(2):  # micro-batches
                noise = {name: torch.randn(t.shape, generator=generator) / step
                         for name, t in start.items()}
                for params in (ours, theirs):
                    sum((params[name] * noise[name]).sum() for name in params).backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 10.0).item()
            clipped += norm > 10
            for group in reference.param_groups:
                group["lr"] = optim.learning_rate(step, 50, 1e-2, 5)
            reference.step()
            reference.zero_grad()
            lr = optim.learning_rate(step, 50, 1e-2, 5)
            stats = optim.optimizer_step(optimizer, lr, betas=(0.9, 0.98), weight_decay=0.1,
                                         clip=10.0)
            assert abs(stats["grad_norm"] / norm - 1) < 1e-5 and not optimizer.grads.any(), step
    assert 5 < clipped < 45, clipped
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert worst < 1e-6, worst


def test_optim_masters_keep_small_steps():
    """A 1e-4 step is below the spacing of bfloat16 at 1, and lost without a float32 master.

    So is a small micro-batch gradient beside a large one, if gradients are summed in bfloat16.
    """
    params, optimizer = optim.init_optimizer({"w": torch.ones(4, 3), "b": torch.full((2,), 1.001)},
                                             dtype=torch.bfloat16)
    # the master is not rounded first
    assert optimizer.master[optimizer.spans["b"][0]] == torch.tensor(1.001)
    for _ in range(41):
        params["w"].sum().backward()
        optim.optimizer_step(optimizer, 1e-4, clip=0)
    assert (params["w"] - (1 - 41e-4)).abs().max() < 2e-3 and params["w"].max() < 1
    assert (optimizer.master[:12] - (1 - 41e-4)).abs().max() < 1e-5
    params["w"].sum().backward()
    for _ in range(100):
        (params["w"].sum() * 1e-3).backward()
    assert (optimizer.grads[:12] - 1.1).abs().max() < 1e-3 and params["w"].grad is None


def test_optim_skips_what_is_not_finite():
    for bad in (float("nan"), float("inf")):
        params, optimizer = _optim_state(3)
        watched = (optimizer.params, optimizer.m, optimizer.v, optimizer.updates)
        before = [t.clone() for t in watched]
        optimizer.grads[optimizer.spans["model.norm.weight"][0]] = bad
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 1 and not optimizer.grads.any()
        assert all(map(torch.equal, before, watched))
        optimizer.grads.fill_(1e-3)
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 0
        assert not torch.equal(before[0], optimizer.params)


def test_optim_checkpoint_bitwise():
    """Loaded into a fresh state, training goes on bit for bit; in float32, in bfloat16, and with an
    adapter on a frozen model."""
    base = model.init_params(_OPTIM_CONFIG, 0)
    for dtype, lora in ((torch.float32, None), (torch.bfloat16, None),
                        (torch.float32, model.init_lora(_OPTIM_CONFIG, 2, 0))):
        with _optim_dir() as run_dir:
            params, unbroken = _optim_state(3, dtype, lora)
            path = _optim_save(run_dir, 3, base | params if lora else params, unbroken)
            _, resumed = optim.init_optimizer(lora or model.init_params(_OPTIM_CONFIG, 9),
                                              dtype=dtype)
            assert optim.load_checkpoint(path, resumed)["extra"] == {"seen": 3}
            assert _optim_equal(unbroken, resumed)
            _optim_train(unbroken, range(3, 6))
            _optim_train(resumed, range(3, 6))
            assert _optim_equal(unbroken, resumed)
            assert len({file.stat().st_mode for file in path.rglob("*.*")}) == 1
            # the directory is a model, with the adapter merged
            saved = model.load_params(path, dtype=dtype)
            _, again = _optim_state(3, dtype, lora)
            merged = model.merge_lora(base | optim.init_optimizer(lora)[0]) if lora else base
            assert set(saved) == set(base)
            assert any(not torch.equal(saved[name], merged[name].to(dtype)) for name in base)
            _, other = optim.init_optimizer({"w": torch.zeros(3, 3)})
            with raises(ValueError, "other parameters", str(path)):
                optim.load_checkpoint(path, other)


def test_optim_keeps_the_last_and_the_best():
    with _optim_dir() as run_dir:
        params, optimizer = _optim_state(1)
        for step in (5, 10, 15, 20):
            _optim_save(run_dir, step, params, optimizer, keep=2, best_step=5)
        kept = [p.name for p in optim.list_checkpoints(run_dir)]
        assert kept == ["step_000005", "step_000015", "step_000020"]
        assert (run_dir / "checkpoints" / "best").resolve().name == "step_000005"
        assert set(model.load_params(run_dir / "checkpoints" / "best")) == set(params)
        # over one of the same step
        _optim_save(run_dir, 20, params, optimizer, keep=1, best_step=20)
        assert _names(run_dir / "checkpoints") == ["best", "step_000020"]


class _Killed(BaseException):
    """Stands for a kill: no `except OSError` sees it."""


def test_optim_killed_at_every_write():
    """A save is ended before each thing that it does to the disk, or half way through it.

    What stands under the name of a checkpoint is whole, the newest is the old state or the new, and
    the next save clears up.
    """
    with _optim_dir() as home:
        params, optimizer = _optim_state(1)
        _optim_save(home / "start", 1, params, optimizer)
        old, new = _optim_state(1)[1], _optim_state(2)[1]
        _optim_train(optimizer, [1])
        calls = 0

        def dying(real, half):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == last:
                    half(*args, **kwargs)
                    raise _Killed
                return real(*args, **kwargs)
            return call

        def half_removed(path, *_, **__):
            for file in list(Path(path).glob("*"))[:2]:
                file.unlink()

        points = [(os, "replace", lambda *_: None), (shutil, "rmtree", half_removed),
                  (Path, "write_text", lambda path, *_, **__: path.touch()),
                  (Path, "symlink_to", lambda *_: None),
                  (model, "save_file", lambda _, path, **__: Path(path).write_bytes(b"half")),
                  (optim, "save_file", lambda _, path, **__: Path(path).write_bytes(b"half"))]
        outcomes, finished, last = [], False, 0
        while not finished:
            last, calls, run_dir = last + 1, 0, home / f"run{last}"
            shutil.copytree(home / "start", run_dir)
            with contextlib.ExitStack() as stack:
                for owner, name, half in points:
                    dies = dying(getattr(owner, name), half)
                    stack.enter_context(mock.patch.object(owner, name, dies))
                try:
                    _optim_save(run_dir, 2, params, optimizer, keep=1, best_step=2)
                    finished = True
                except _Killed:
                    pass
            newest = optim.list_checkpoints(run_dir)[-1]
            for checkpoint in optim.list_checkpoints(run_dir):
                optim.check_files(checkpoint)
            _, loaded = optim.init_optimizer(params)
            optim.load_checkpoint(newest, loaded)
            assert _optim_equal(loaded, old if newest.name == "step_000001" else new), last
            outcomes.append(newest.name)
            _optim_save(run_dir, 2, params, optimizer, keep=1, best_step=2)
            assert _names(run_dir / "checkpoints") == ["best", "step_000002"], last
        assert outcomes == sorted(outcomes) and len(set(outcomes)) == 2, outcomes
        assert len(outcomes) > 15, outcomes


def test_optim_full_disk():
    full = OSError(errno.ENOSPC, "No space left on device")
    for owner, name in ((model, "save_file"), (optim, "save_file")):
        with _optim_dir() as run_dir:
            params, optimizer = _optim_state(1)
            _optim_save(run_dir, 1, params, optimizer)
            with mock.patch.object(owner, name, side_effect=full):
                with raises(ValueError, "No space left", "GiB", "--resume"):
                    _optim_save(run_dir, 2, params, optimizer)
            assert _names(run_dir / "checkpoints") == ["step_000001"]  # nothing else takes up room
            optim.check_files(optim.list_checkpoints(run_dir)[-1])


def test_optim_damaged_checkpoint():
    """Each kind of damage names its file and what to remove."""
    def flip(path):  # one bit, which keeps the size and the format
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    shard = optim.shard_name(0, 1)
    for name, damage in ((shard, flip), ("model.safetensors", flip), ("trainer.json", flip),
                         (shard, Path.unlink),
                         ("model.safetensors", lambda p: os.truncate(p, 1000)),
                         ("checksums.json", Path.unlink),
                         ("checksums.json", lambda p: p.write_text("{\"a\": 1")),
                         ("checksums.json", lambda p: p.write_text("[]")),
                         ("checksums.json", lambda p: p.write_text("{}")),
                         ("checksums.json", lambda p: p.write_text("5")),
                         ("trainer.json", lambda p: p.write_text("{}"))):
        with _optim_dir() as run_dir:
            params, optimizer = _optim_state(1)
            path = _optim_save(run_dir, 2, params, optimizer)
            damage(path / name)
            with raises(ValueError, f"step_000002/{name} is damaged", f"Remove {path}"):
                optim.load_checkpoint(path, optimizer)


def test_optim_damage_is_known_to_every_process():
    """Each checks a part of the files. Those that had found nothing read on, into a traceback."""
    with _optim_dir() as run_dir:
        path = _optim_save(run_dir, 2, *_optim_state(1))
        (path / "trainer.json").write_text("{}")
        found = []
        for rank in range(2):
            def gather(value):
                found.append(value)
                return []

            with mock.patch.object(optim, "rank_and_world", lambda rank=rank: (rank, 2)), \
                    mock.patch.object(optim, "gather_objects", gather):
                optim.check_files(path)
        assert sorted(map(bool, found)) == [False, True]
        with mock.patch.object(optim, "gather_objects", lambda _: found), \
                raises(ValueError, "damaged"):
            optim.check_files(path)


def test_optim_run_directory():
    """Never written over unasked; on --resume the run's flags are the defaults and its logs are cut
    back to the checkpoint."""
    with _optim_dir() as home, contextlib.redirect_stdout(None):
        flags = ("--run-dir", str(home / "run"), "--lr", "0.5")
        # nothing there yet: from the start
        run, checkpoint = optim.start_run(_optim_args(*flags, "--resume"))
        assert checkpoint is None
        params, optimizer = _optim_state(1)
        for step in range(6):
            optim.log_step(run, "step {step} | reward {reward:.1f}",
                           {"step": step, "reward": float("nan") if step == 1 else 0.5})
            optim.log_samples(run, step,
                              [{"text": "a line separator \u2028 and half a surrogate \ud800"}])
            if step == 3:
                _optim_save(run.dir, step, params, optimizer)
        (home / "run" / "notes.txt").write_text("mine")
        with raises(ValueError, "holds a run", "--resume", "--overwrite"):
            optim.start_run(_optim_args(*flags))
        with raises(ValueError, "--seed is 1", "started with 0"):
            optim.start_run(_optim_args(*flags, "--resume", "--seed", "1"))
        short = ("--run-dir", str(home / "run"), "--resume")
        for cut, resume in (('{"step": 3, "rew', short), ('[3]\n5\n{"reward": 1}\n', short),
                            ('{"step": 3}', (*short, "--steps", "20"))):
            with open(run.dir / "metrics.jsonl", "a") as file:
                file.write(cut)  # a kill in the middle of a line, and just before its end
            assert _optim_args(*resume).lr == 0.5
            run, checkpoint = optim.start_run(_optim_args(*resume))
            assert checkpoint.name == "step_000003"
            records = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
            assert [r["step"] for r in records] == [0, 1, 2, 3] and records[1]["reward"] is None
            assert sum(1 for _ in open(run.dir / "samples.jsonl")) == 4
        assert json.loads((run.dir / "flags.json").read_text())["steps"] == 20
        starts = [json.loads(line) for line in open(run.dir / "starts.jsonl")]
        assert [s["from"] for s in starts] == ["the start"] + 3 * ["step_000003"]
        assert all(s["versions"] and s["machine"].startswith("1 x cpu: ") for s in starts)
        _, checkpoint = optim.start_run(_optim_args(*flags, "--overwrite"))
        assert checkpoint is None and not (run.dir / "checkpoints").exists()
        assert not (run.dir / "metrics.jsonl").read_bytes()
        assert len(open(run.dir / "starts.jsonl").readlines()) == 1
        assert (run.dir / "notes.txt").read_text() == "mine"
        (run.dir / "flags.json").unlink()
        for flag in ("--overwrite", "--resume"):  # not a run: somebody's home directory, perhaps
            with raises(ValueError, "no run", "another --run-dir"):
                optim.start_run(_optim_args(*flags, flag))


def test_optim_flags_out_of_range():
    for flags in ("--lr 0", "--lr nan", "--lr 1e9", "--lr fast", "--warmup -1", "--warmup 1.5",
                  "--processes 0", "--betas 0.9 1", "--weight-decay -1", "--clip -1", "--seed -1",
                  "--save-every 0", "--keep 0", "--overwrite --resume"):
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            raise AssertionError(f"{flags} was accepted: {_optim_args(*flags.split())}")
        assert flags.split()[0] in said.getvalue() and said.getvalue().count("\n") == 1, flags
    for name, words in (("tpu", ["tpu", "cuda"]), ("cuda:99", ["GPU 99", "--device cpu"])):
        with raises(ValueError, *words):
            optim.init_distributed(name)
    with raises(ValueError, "--processes 999", "expected at most"):
        optim.init_distributed("cpu", 999)
    with mock.patch.object(sys, "platform", "darwin"), raises(ValueError, "--processes 2", "Linux"):
        optim.init_distributed("cpu", 2)


def test_optim_default_processes():
    """A core each, at most 8, and what memory holds; 1 wherever this process cannot fork."""
    def count(*gib, cores=16, platform="linux", environ={}):
        affinity = mock.patch.object(os, "sched_getaffinity", lambda _: range(cores), create=True)
        with affinity, mock.patch.object(optim, "memory_there", lambda *_: 10.0), \
                mock.patch.object(sys, "platform", platform), mock.patch.dict(os.environ, environ):
            return optim.default_processes("cpu", *gib)

    assert [count(0.1), count(0.1, cores=3), count(2.0), count(100.0)] == [8, 3, 5, 1]
    assert [count(2.0, 5.0), count(1.0, 12.0)] == [2, 1]
    assert count(0.1, platform="darwin") == count(0.1, environ={"WORLD_SIZE": "1"}) == 1


def test_optim_second_ctrl_c_quits():
    """In a child whose terminal is gone: the first signal asks, though its message cannot be shown,
    and the second ends."""
    before = signal.getsignal(signal.SIGINT)
    with optim.stop_signals() as stop_requested:
        assert not stop_requested()
        if (child := os.fork()) == 0:
            try:
                os.close(2)
                os.kill(os.getpid(), signal.SIGINT)
                if stop_requested():
                    os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == before


def test_optim_second_ctrl_c_quits_inside_a_collective():
    """A frozen process: the other waits for it in a collective, where Python's handlers do not run,
    and could only be killed."""
    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    with _optim_dir() as home:
        process = _optim_command(home, "run", "--processes", "2")
        _optim_wait_for(home / "run" / "metrics.jsonl", 1, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGSTOP)
        time.sleep(0.5)
        steps = (home / "run" / "metrics.jsonl").read_bytes().count(b"\n")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and steps < 12
        process.send_signal(signal.SIGINT)
        _optim_finish(process, code=130)


def test_optim_ctrl_c_before_the_first_step():
    """While a model is loaded or problems are read, too: one line, which says how to go on."""
    with _optim_dir() as home:
        run, records = home / "run", home / "records.jsonl"
        for script, words, how in (
                ("grpo.py", ["--run-dir", run], f"python grpo.py --run-dir {run} --resume"),
                ("eval.py", ["--records", records, "--results", home / "results.jsonl"],
                 f"the same command goes on from what {records} holds")):
            process = subprocess.Popen(
                [sys.executable, script, *map(str, words)], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                # what a shell starts in the background ignores Ctrl-C, and so would this
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = _optim_finish(process, code=130)
            assert f"{script}: stopped; " in err and err.endswith(f"{how}\n"), err
            assert "Traceback" not in err, err


def test_optim_two_processes_in_one_run_directory():
    """The second cut the logs of the first and moved its checkpoints. Who has the directory is
    named, and when he is killed it is free, with nothing to clear away."""
    with _optim_dir() as home, contextlib.redirect_stdout(None):
        flags = ["--run-dir", str(home / "run")]
        optim.start_run(_optim_args(*flags))
        hold = ("import optim, pathlib, time\n"
                f"optim.lock_run(pathlib.Path({str(home / 'run')!r}))\n"
                "print('held', flush=True)\ntime.sleep(60)")
        os.close(optim.lock_run(home / "run"))  # this process's own, which start_run took
        holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
        holder.stdout.readline()
        for how in ("--resume", "--overwrite"):
            for opens in (optim.start_run, optim.check_run_dir):
                with raises(ValueError, f"in use by process {holder.pid}", "another --run-dir"):
                    opens(_optim_args(*flags, how))
        holder.kill()
        holder.communicate()
        optim.start_run(_optim_args(*flags, "--resume"))


def test_optim_ruined_weights_are_not_saved():
    """Not a number among the weights, or finite ones under which the model overflows: a run saved
    them, and every resume ended alike."""
    for ruin in (lambda w: w[3, 3].fill_(float("nan")), lambda w: w.mul_(1e30)):
        with _optim_dir() as run_dir:
            params, optimizer = _optim_state(1)
            _optim_save(run_dir, 1, params, optimizer)
            with torch.no_grad():
                for name in ("up_proj", "gate_proj"):
                    ruin(params[f"model.layers.0.mlp.{name}.weight"])
            with raises(ValueError, "not finite", "--lr"):
                _optim_save(run_dir, 2, params, optimizer)
            assert [p.name for p in optim.list_checkpoints(run_dir)] == ["step_000001"]


def test_optim_killed_and_resumed():
    """Ctrl-C, then kill -9 at random moments: the files of the last checkpoint and the metrics end
    as those of an unbroken run."""
    with _optim_dir() as home:
        unbroken = _optim_command(home, "unbroken", "--save-every", "1")
        metrics = home / "run" / "metrics.jsonl"
        process = _optim_command(home, "run", "--save-every", "1")
        _optim_wait_for(metrics, 1, process)
        process.send_signal(signal.SIGINT)
        _, err = _optim_finish(process, code=130)
        command = "python script.py --run-dir run --save-every 1 --resume"
        assert err.endswith(f"script.py: stopped; go on with: {command}\n"), err
        assert "once more to quit" in err and "Traceback" not in err, err
        for _ in range(2):
            process = _optim_command(home, "run", "--save-every", "1", "--resume")
            _optim_wait_for(metrics, metrics.read_bytes().count(b"\n") + 1, process)
            time.sleep(random.random() * 0.05)
            process.kill()
            process.communicate()
        assert 1 < int(optim.list_checkpoints(home / "run")[-1].name[5:]) < 12
        _optim_finish(_optim_command(home, "run", "--save-every", "1", "--resume"))
        _optim_finish(unbroken)
        first, second = (_optim_hashes(home / run / "checkpoints" / "step_000012")
                         for run in ("unbroken", "run"))
        assert first == second and len(first) == 6, (first, second)
        assert metrics.read_bytes() == (home / "unbroken" / "metrics.jsonl").read_bytes()


def test_optim_many_processes():
    """Three processes, of which one fails: its error ends all and is the one shown. Resumed by two,
    they reach what one does."""
    with _optim_dir() as home:
        alone = _optim_command(home, "alone")
        _, err = _optim_finish(_optim_command(home, "run", "--save-every", "6", "--fail-at", "8",
                                              processes=3), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err, err
        assert err.count("failed: Traceback") == 1, err
        _optim_finish(_optim_command(home, "run", "--fail-at", "0", "--resume", processes=2))
        _optim_finish(alone)
        one, many = (model.load_params(home / run / "checkpoints" / "step_000012")
                     for run in ("alone", "run"))
        start = model.init_params(_OPTIM_CONFIG, 0)
        worst = max((one[name] - many[name]).abs().max().item() for name in one)
        moved = min((one[name] - start[name]).abs().max().item() for name in one)
        assert worst < 1e-5 < 1e-3 < moved, (worst, moved)
        losses = [[json.loads(line)["loss"] for line in open(home / run / "metrics.jsonl")]
                  for run in ("alone", "run")]
        assert len(losses[0]) == 12 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


def test_optim_forks_end_together():
    """--processes: a planted failure, a killed fork, a killed parent and Ctrl-C.

    What is written then is what torchrun's processes write, to the last bit.
    """
    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    with _optim_dir() as home:
        _, err = _optim_finish(_optim_command(home, "run", "--processes", "3", "--save-every", "6",
                                              "--fail-at", "8"), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err, err
        assert err.count("failed: Traceback") == 1, err
        metrics = home / "run" / "metrics.jsonl"

        def resumed():  # from step 6, in two processes that have made two steps more
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
            process = _optim_command(home, "run", "--processes", "2", "--resume", "--fail-at", "0")
            _optim_wait_for(metrics, 8, process)
            return process

        for victim, message in (("fork", "process 1 was ended by signal 9"), ("parent", "")):
            process = resumed()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            [fork] = map(int, children.split())
            os.kill(fork if victim == "fork" else process.pid, signal.SIGKILL)
            _, err = _optim_finish(process, code=1 if victim == "fork" else -9)
            assert message in err, err
            for _ in range(200):
                if not Path(f"/proc/{fork}").exists():
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("a fork outlived its parent")
        process = resumed()
        process.send_signal(signal.SIGINT)
        _, err = _optim_finish(process, code=130)
        command = "python script.py --run-dir run --processes 2 --fail-at 0 --resume"
        assert f"go on with: {command}" in err, err
        _optim_finish(_optim_command(home, "forked", "--processes", "2"))
        _optim_finish(_optim_command(home, "launched", processes=2))
        first, second = (_optim_hashes(home / run / "checkpoints" / "step_000012")
                         for run in ("forked", "launched"))
        assert first == second and len(first) == 7, (first, second)


def test_optim_unknown_flags_are_guessed():
    parser = optim.Parser("A script.")
    parser.add_argument("--max-new-tokens", type=int)
    for word, end in (("--max-new-token5=3", "; did you mean --max-new-tokens?\n"), ("x", ": x\n")):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                parser.parse_args([word])
            except SystemExit as stopped:
                assert stopped.code == 2
        assert said.getvalue().endswith(end) and said.getvalue().count("\n") == 1, said.getvalue()


def test_optim_progress_moves_on_a_terminal_and_once_a_minute_in_a_log():
    now = [0.0]
    for terminal, quiet, moves in ((True, False, 3), (True, True, 3), (False, False, 1),
                                   (False, True, 0)):
        said = io.StringIO()
        said.isatty = lambda: terminal
        with (contextlib.redirect_stderr(said),
              mock.patch.object(optim.time, "monotonic", lambda: now[0]),
              optim.progress_bar(8, "sampling", quiet) as on_step):
            for seconds in (1, 30, 60):
                now[0] += seconds
                on_step([None] * 2, 50)
        assert said.getvalue().count("tok/s") >= moves, said.getvalue()
        assert bool(said.getvalue()) == bool(moves), "nothing extra in a log file"
        if moves == 3:
            assert "2/8" in said.getvalue() and "6/8" in said.getvalue()
            assert "50 tok/s" in said.getvalue() and "2 tok/s" in said.getvalue()
