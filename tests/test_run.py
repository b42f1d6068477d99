"""Tests of run.py."""

import contextlib
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import model
import optim
import run
from tests.common import (
    ROOT,
    TRAIN_CONFIG,
    file_hashes,
    finish,
    merge_lora,
    raises,
    read_lines,
    start_training,
    temporary_dir,
    train_args,
    train_on,
    trained_state,
    wait_for_steps,
)


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def _save(run_dir, step, params, optimizer, keep=2, best_step=None):
    return run.save_checkpoint(run_dir, step, params, TRAIN_CONFIG, run_dir, optimizer,
                               {"seen": step}, keep, best_step)


@contextlib.contextmanager
def _saved():
    """(run_dir, params, optimizer, path) after one update, saved as step 1."""
    with temporary_dir() as run_dir:
        params, optimizer = trained_state(1)
        yield run_dir, params, optimizer, _save(run_dir, 1, params, optimizer)


def _equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name))
               for name in ("params", "master", "m", "v", "updates"))


def _open(*flags):
    """(Run, checkpoint), opened as a script does."""
    args = train_args(*flags)
    run.claim_run_dir(args)
    return run.start_run(args)


def test_run_checkpoint_bitwise():
    """Training resumes bit for bit from a fresh state that loads the checkpoint: in float32, in
    bfloat16, and with an adapter on a frozen model."""
    base = model.init_params(TRAIN_CONFIG, 0)
    for dtype, lora in ((torch.float32, None), (torch.bfloat16, None),
                        (torch.float32, model.init_lora(TRAIN_CONFIG, 2, 0))):
        with temporary_dir() as run_dir:
            params, uninterrupted = trained_state(3, dtype, lora)
            path = _save(run_dir, 3, base | params if lora else params, uninterrupted)
            _, resumed = optim.init_optimizer(lora or model.init_params(TRAIN_CONFIG, 9),
                                              dtype=dtype)
            assert run.load_checkpoint(path, resumed)["extra"] == {"seen": 3}
            assert _equal(uninterrupted, resumed)
            train_on(uninterrupted, range(3, 6))
            train_on(resumed, range(3, 6))
            assert _equal(uninterrupted, resumed)
            assert len({file.stat().st_mode for file in path.rglob("*.*")}) == 1
            # the directory is a model, with the adapter merged
            saved = model.load_params(path, dtype=dtype)
            assert set(saved) == set(base)
            start = merge_lora(base | optim.init_optimizer(lora)[0]) if lora else base
            assert any(not torch.equal(saved[name], start[name].to(dtype)) for name in base)
            _, other = optim.init_optimizer({"w": torch.zeros(3, 3)})
            with raises(ValueError, "other parameters", str(path)):
                run.load_checkpoint(path, other)


def test_run_keeps_the_last_and_the_best():
    with temporary_dir() as run_dir:
        params, optimizer = trained_state(1)
        for step in (5, 10, 15, 20):
            _save(run_dir, step, params, optimizer, keep=2, best_step=5)
        home = run_dir / "checkpoints"
        assert _names(home) == ["best", "step_000005", "step_000015", "step_000020"]
        assert (home / "best").resolve().name == "step_000005"
        assert set(model.load_params(home / "best")) == set(params)
        # replaces the checkpoint of the same step
        _save(run_dir, 20, params, optimizer, keep=1, best_step=20)
        assert _names(home) == ["best", "step_000020"]


def _die_at(last):
    """End this process just before its last-th change to the disk, counted from now."""
    calls = itertools.count(1)

    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and set("wa+") & set(args[1])
        changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod")
        if (writes or event in changes) and next(calls) == last:
            os._exit(9)

    sys.addaudithook(hook)


def test_run_killed_at_every_write():
    """Every checkpoint is complete, the newest holds either the old or the new state, and the next
    save removes leftovers."""
    with _saved() as (start, params, optimizer, _), temporary_dir() as home:
        old, new = trained_state(1)[1], trained_state(2)[1]
        train_on(optimizer, [1])
        outcomes = []
        code = 9
        while code == 9:
            run_dir = shutil.copytree(start, home / str(len(outcomes)))
            if (child := os.fork()) == 0:
                torch.set_num_threads(1)  # the parent's threads do not survive the fork
                _die_at(len(outcomes) + 1)
                _save(run_dir, 2, params, optimizer, keep=1, best_step=2)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            _, loaded = optim.init_optimizer(params)
            for checkpoint in run.list_checkpoints(run_dir):
                model.load_params(checkpoint)
                run.load_checkpoint(checkpoint, loaded)
            outcomes.append(checkpoint.name)
            if checkpoint.name == "step_000001":
                assert _equal(loaded, old), outcomes
            else:
                best = checkpoint.with_name("best").resolve()
                assert _equal(loaded, new) and best == checkpoint.resolve(), outcomes
            _save(run_dir, 2, params, optimizer, keep=1, best_step=2)
            assert _names(run_dir / "checkpoints") == ["best", "step_000002"], outcomes
        assert code == 0 and outcomes == sorted(outcomes) and len(set(outcomes)) == 2, outcomes
        assert len(outcomes) > 25, outcomes


def test_run_full_disk():
    full = OSError(errno.ENOSPC, "No space left on device")
    for owner in (model, run):
        with _saved() as (run_dir, params, optimizer, path):
            with mock.patch.object(owner, "save_file", side_effect=full):
                with raises(ValueError, "No space left", "make room", "--resume"):
                    _save(run_dir, 2, params, optimizer)
            assert _names(run_dir / "checkpoints") == [path.name]  # no leftovers fill the disk
            run.load_checkpoint(path, optimizer)


def test_run_damaged_checkpoint():
    """Every process names the damaged file and what to remove. Processes that had found no damage
    themselves read on and ended in a traceback."""
    def write(text):
        return lambda path: path.write_text(text)

    def flip(path):  # one bit, which keeps the size and the format
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    sums, trainer, shard = "checksums.json", "trainer.json", run.shard_name(0, 1)
    for name, damage in ((shard, flip), ("model.safetensors", flip), (trainer, flip),
                         (shard, Path.unlink), (trainer, write("{}")),
                         ("model.safetensors", lambda p: os.truncate(p, 1000)),
                         (sums, Path.unlink), *((sums, write(t)) for t in ('{"a"', "[]", "{}"))):
        with _saved() as (_, _, optimizer, path):
            damage(path / name)
            with raises(ValueError, f"{path / name} is damaged", f"Remove {path};"):
                run.load_checkpoint(path, optimizer)
    with _saved() as (_, _, optimizer, path):
        run.load_checkpoint(path, optimizer)
        with mock.patch.object(run, "gather_objects", lambda own: [own, {shard: None}]):
            with raises(ValueError, f"{shard} is damaged"):  # found by another process
                run.load_checkpoint(path, optimizer)


def test_run_never_saves_non_finite_weights():
    """NaN weights, or finite ones with which the model overflows. A run used to save them, and no
    resume recovered from that."""
    for damage in (lambda w: w[3, 3].fill_(float("nan")), lambda w: w.mul_(1e30)):
        with _saved() as (run_dir, params, optimizer, path):
            with torch.no_grad():
                for name in ("up_proj", "gate_proj"):
                    damage(params[f"model.layers.0.mlp.{name}.weight"])
            with raises(ValueError, "not finite", "--lr"):
                _save(run_dir, 2, params, optimizer)
            assert run.list_checkpoints(run_dir) == [path]


def test_run_directory():
    """A run is overwritten only with --overwrite; --resume restores its flags and truncates its
    logs to the checkpoint."""
    with temporary_dir() as home, contextlib.redirect_stdout(None):
        run_dir = ("--run-dir", str(home / "run"))
        flags = (*run_dir, "--lr", "0.5")
        # no run yet: starts at step 0
        opened, checkpoint = _open(*flags, "--resume")
        assert checkpoint is None
        params, optimizer = trained_state(1)
        for step in range(6):
            run.log_step(opened, "step {step} | reward {reward:.1f}",
                         {"step": step, "reward": float("nan") if step == 1 else 0.5})
            run.log_samples(opened, step,
                            [{"text": "a line separator \u2028 and half a surrogate \ud800"}])
            if step == 3:
                _save(opened.dir, step, params, optimizer)
        (opened.dir / "notes.txt").write_text("mine")
        with raises(ValueError, "holds a run", "--resume", "--overwrite"):
            _open(*flags)
        with raises(ValueError, "--seed is 1", "started with 0"):
            _open(*flags, "--resume", "--seed", "1")
        resume = (*run_dir, "--resume")
        for tail, again in (('{"step": 3, "rew', resume), ('[3]\n5\n{"reward": 1}\n', resume),
                            ('{"step": 3}', (*resume, "--steps", "20"))):
            with open(opened.dir / "metrics.jsonl", "a") as file:
                file.write(tail)  # killed mid-line, lines that are no records, no line end
            assert train_args(*again).lr == 0.5
            _, checkpoint = _open(*again)
            assert checkpoint.name == "step_000003"
            records = read_lines(opened.dir / "metrics.jsonl")
            assert [r["step"] for r in records] == [0, 1, 2, 3] and records[1]["reward"] is None
            assert len(read_lines(opened.dir / "samples.jsonl")) == 4
        assert json.loads((opened.dir / "flags.json").read_text())["steps"] == 20
        starts = read_lines(opened.dir / "starts.jsonl")
        assert [s["from"] for s in starts] == ["the start"] + 3 * ["step_000003"]
        assert all(s["versions"] and s["machine"].startswith("1 x cpu: ") for s in starts)
        _, checkpoint = _open(*flags, "--overwrite")
        assert checkpoint is None and not (opened.dir / "checkpoints").exists()
        assert not (opened.dir / "metrics.jsonl").read_bytes()
        assert len(read_lines(opened.dir / "starts.jsonl")) == 1
        assert (opened.dir / "notes.txt").read_text() == "mine"
        (opened.dir / "flags.json").unlink()
        for flag in ("--overwrite", "--resume"):  # not a run, but perhaps a home directory
            with raises(ValueError, "no run", "another --run-dir"):
                _open(*flags, flag)


def test_run_two_processes_in_one_run_directory():
    """The second truncated the first one's logs and moved its checkpoints. The error names the
    holder, and killing the holder frees the directory without any clean-up."""
    hold = ("import sys, time\nfrom pathlib import Path\nimport run\n"
            "lock = run.lock_run(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)")
    with temporary_dir() as home:
        holder = subprocess.Popen([sys.executable, "-c", hold, str(home)], cwd=ROOT,
                                  stdout=subprocess.PIPE)
        holder.stdout.readline()
        (home / "flags.json").write_text("{}")
        for flag in ("--resume", "--overwrite"):
            with raises(ValueError, f"in use by process {holder.pid}", "another --run-dir"):
                run.claim_run_dir(train_args("--run-dir", str(home), flag))
        holder.kill()
        holder.communicate()
        run.claim_run_dir(train_args("--run-dir", str(home), "--resume"))


def test_run_resumes_the_same_wandb_run():
    with (temporary_dir() as home, contextlib.redirect_stdout(None),
          mock.patch.dict(sys.modules, wandb=mock.Mock())):
        for flag in ("--overwrite", "--resume", "--overwrite"):
            opened, _ = _open("--run-dir", str(home / "run"), "--wandb", "mine", flag)
            run.log_step(opened, "", {"step": 1, "loss": math.nan})
            opened.wandb.log.assert_called_with({"step": 1, "loss": None}, step=1)
        first, again, new = (call.kwargs["id"] for call in sys.modules["wandb"].init.call_args_list)
        assert first == again != new


def test_run_second_ctrl_c_quits():
    """In a child whose terminal is closed, the first signal requests a stop, though it cannot print
    its message, and the second one quits."""
    before = signal.getsignal(signal.SIGINT)
    with run.stop_signals() as stop_requested:
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


def test_run_killed_and_resumed():
    """After Ctrl-C and kill -9 at random moments, the last checkpoint and the metrics equal an
    uninterrupted run's."""
    with temporary_dir() as home:
        uninterrupted = start_training(home, "uninterrupted", "--save-every", "1")
        metrics = home / "run" / "metrics.jsonl"
        process = start_training(home, "run", "--save-every", "1")
        wait_for_steps(metrics, 1, process)
        process.send_signal(signal.SIGINT)
        _, err = finish(process, code=130)
        command = "python script.py --run-dir run --save-every 1 --resume"
        assert err.endswith(f"script.py: stopped; resume with: {command}\n"), err
        assert "interrupt again to quit" in err and "Traceback" not in err, err
        for _ in range(2):
            process = start_training(home, "run", "--save-every", "1", "--resume")
            wait_for_steps(metrics, metrics.read_bytes().count(b"\n") + 1, process)
            time.sleep(random.random() * 0.05)
            process.kill()
            process.communicate()
        assert 1 < int(run.list_checkpoints(home / "run")[-1].name[5:]) < 12
        finish(start_training(home, "run", "--save-every", "1", "--resume"))
        finish(uninterrupted)
        first, second = (file_hashes(home / name / "checkpoints" / "step_000012")
                         for name in ("uninterrupted", "run"))
        assert first == second and len(first) == 6, (first, second)
        assert metrics.read_bytes() == (home / "uninterrupted" / "metrics.jsonl").read_bytes()
