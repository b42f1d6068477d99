"""Tests of launch.py."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import tqdm.std

import launch
import model
from tests.common import (
    ROOT,
    TRAIN_CONFIG,
    file_hashes,
    finish,
    raises,
    read_lines,
    start_training,
    temporary_dir,
    train_args,
    wait_for_steps,
)


def _parse_error(parse, words):
    """The one-line error with which the parser rejects these flags."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            raise AssertionError(f"{words} was accepted: {parse(words.split())}")
        except SystemExit as error:
            assert error.code == 2
    assert stderr.getvalue().count("\n") == 1, stderr.getvalue()
    return stderr.getvalue()


def test_launch_rejects_bad_flags_and_devices():
    for flags in ("--lr 0", "--lr nan", "--lr 1e9", "--lr fast", "--warmup -1", "--warmup 1.5",
                  "--processes 0", "--processes 999", "--betas 0.9 1", "--weight-decay -1",
                  "--clip -1", "--seed -1", "--save-every 0", "--keep 0", "--overwrite --resume"):
        assert flags.split()[0] in _parse_error(lambda words: train_args(*words), flags)
    parser = launch.Parser("A script.")
    parser.add_argument("--max-new-tokens", type=int)
    for word, end in (("--max-new-token5=3", "; did you mean --max-new-tokens?\n"), ("x", ": x\n")):
        assert _parse_error(parser.parse_args, word).endswith(end)
    for name, words in (("tpu", ["tpu", "cuda"]), ("cuda:99", ["GPU 99", "--device cpu"])):
        with raises(ValueError, *words):
            launch.init_distributed(name)
    with mock.patch.object(sys, "platform", "darwin"), raises(ValueError, "--processes 2", "Linux"):
        launch.init_distributed("cpu", 2)


def test_launch_default_processes():
    """One per core, at most 8, as memory allows; 1 wherever this process cannot fork."""
    def count(*gib, cores=16, platform="linux", environ={}):
        with (mock.patch.object(launch, "usable_cores", lambda: cores),
              mock.patch.object(launch, "total_memory_gib", lambda *_: 10.0),
              mock.patch.object(sys, "platform", platform), mock.patch.dict(os.environ, environ)):
            return launch.default_processes("cpu", *gib)

    assert [count(0.1), count(0.1, cores=3), count(2.0), count(100.0)] == [8, 3, 5, 1]
    assert [count(2.0, 5.0), count(1.0, 12.0)] == [2, 1]
    assert count(0.1, platform="darwin") == count(0.1, environ={"WORLD_SIZE": "1"}) == 1


def _fails_once(home, *flags, processes=1):
    """The last of three processes fails: all of them end, and its error is the one shown."""
    process = start_training(home, "run", "--save-every", "6", "--fail-at", "8", *flags,
                             processes=processes)
    _, err = finish(process, code=1)
    assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err, err
    assert err.count("failed: Traceback") == 1, err


def test_launch_many_processes():
    """A run of three processes fails; resumed by two, it matches a run of one."""
    with temporary_dir() as home:
        alone = start_training(home, "alone")
        _fails_once(home, processes=3)
        finish(start_training(home, "run", "--fail-at", "0", "--resume", processes=2))
        finish(alone)
        one, many = (model.load_params(home / run / "checkpoints" / "step_000012")
                     for run in ("alone", "run"))
        start = model.init_params(TRAIN_CONFIG, 0)
        gap = max((one[name] - many[name]).abs().max().item() for name in one)
        change = min((one[name] - start[name]).abs().max().item() for name in one)
        assert gap < 1e-5 and change > 1e-3, (gap, change)
        losses = [[row["loss"] for row in read_lines(home / run / "metrics.jsonl")]
                  for run in ("alone", "run")]
        assert len(losses[0]) == 12 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


def _fork_of(process):
    if sys.platform != "linux":
        process.kill()
        raise unittest.SkipTest("forks only on Linux")
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def test_launch_forks_end_together():
    """--processes: a planted failure, a killed fork, a killed parent and Ctrl-C.

    An undisturbed run writes the same bytes as one under torchrun.
    """
    with temporary_dir() as home:
        _fails_once(home, "--processes", "3")
        metrics = home / "run" / "metrics.jsonl"

        def resume():  # from step 6 in two processes, and wait for two more steps
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
            process = start_training(home, "run", "--processes", "2", "--resume", "--fail-at", "0")
            wait_for_steps(metrics, 8, process)
            return process

        for victim, code, message in (("fork", 1, "it was killed, often for lack of memory"),
                                      ("parent", -9, "")):
            process = resume()
            fork = _fork_of(process)
            os.kill(fork if victim == "fork" else process.pid, signal.SIGKILL)
            _, err = finish(process, code)
            assert message in err, err
            killed = time.monotonic()
            while Path(f"/proc/{fork}").exists():
                assert time.monotonic() < killed + 2, "a fork outlived its parent"
        process = resume()
        process.send_signal(signal.SIGINT)
        _, err = finish(process, code=130)
        command = "python script.py --run-dir run --processes 2 --fail-at 0 --resume"
        assert f"resume with: {command}" in err, err
        finish(start_training(home, "forked", "--processes", "2"))
        finish(start_training(home, "launched", processes=2))
        first, second = (file_hashes(home / run / "checkpoints" / "step_000012")
                         for run in ("forked", "launched"))
        assert first == second and len(first) == 7, (first, second)


def test_launch_second_ctrl_c_quits_inside_a_collective():
    """One process is frozen. The other waits for it in a collective, where Python's handlers do not
    run; only kill -9 used to end it."""
    with temporary_dir() as home:
        process = start_training(home, "run", "--processes", "2")
        wait_for_steps(home / "run" / "metrics.jsonl", 1, process)
        os.kill(_fork_of(process), signal.SIGSTOP)
        time.sleep(0.5)
        steps = len(read_lines(home / "run" / "metrics.jsonl"))
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and steps < 12
        process.send_signal(signal.SIGINT)
        finish(process, code=130)


def test_launch_ctrl_c_before_the_first_step():
    """Ctrl-C while loading a model or problems also prints one line with how to resume."""
    with temporary_dir() as home:
        run, records = home / "run", home / "records.jsonl"
        for script, words, hint in (
                ("grpo.py", ["--run-dir", run], f"python grpo.py --run-dir {run} --resume"),
                ("eval.py", ["--records", records, "--results", home / "results.jsonl"],
                 f"run the same command again to continue from {records}")):
            process = subprocess.Popen(
                [sys.executable, script, *map(str, words)], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                # a shell's background jobs, and so their children, ignore Ctrl-C
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = finish(process, code=130)
            assert f"{script}: stopped; " in err and err.endswith(f"{hint}\n"), err
            assert "Traceback" not in err, err


def test_launch_progress_bar_on_a_terminal_and_in_a_log():
    now = [0.0]
    for terminal, quiet, updates in ((True, False, 3), (True, True, 3), (False, False, 1),
                                   (False, True, 0)):
        log = io.StringIO()
        log.isatty = lambda: terminal
        with (contextlib.redirect_stderr(log), mock.patch.object(tqdm.std, "time", lambda: now[0]),
              launch.progress_bar(8, "sampling", quiet) as on_step):
            for seconds, ended in ((1, 2), (30, 0), (60, 4)):
                now[0] += seconds
                on_step([None] * ended, 50, joined=1)
        text = log.getvalue()
        # plus a final line, unless the bar is cleared
        assert text.count("tok/s") == updates + (updates and not quiet), text
        assert bool(text) == bool(updates), "nothing else in a log file"
        if updates == 3:
            assert "2/9" in text and "6/11" in text and "50 tok/s" in text and "2 tok/s" in text
