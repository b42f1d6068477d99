"""Tests of launch.py."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import launch
import model
from tests.common import (
    ROOT,
    TRAIN_CONFIG,
    file_hashes,
    finish,
    raises,
    start_training,
    temporary_dir,
    train_args,
    wait_for_steps,
)


def test_launch_flags_out_of_range():
    for flags in ("--lr 0", "--lr nan", "--lr 1e9", "--lr fast", "--warmup -1", "--warmup 1.5",
                  "--processes 0", "--betas 0.9 1", "--weight-decay -1", "--clip -1", "--seed -1",
                  "--save-every 0", "--keep 0", "--overwrite --resume"):
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            raise AssertionError(f"{flags} was accepted: {train_args(*flags.split())}")
        assert flags.split()[0] in said.getvalue() and said.getvalue().count("\n") == 1, flags
    for name, words in (("tpu", ["tpu", "cuda"]), ("cuda:99", ["GPU 99", "--device cpu"])):
        with raises(ValueError, *words):
            launch.init_distributed(name)
    with raises(ValueError, "--processes 999", "expected at most"):
        launch.init_distributed("cpu", 999)
    with mock.patch.object(sys, "platform", "darwin"), raises(ValueError, "--processes 2", "Linux"):
        launch.init_distributed("cpu", 2)


def test_launch_unknown_flags_are_guessed():
    parser = launch.Parser("A script.")
    parser.add_argument("--max-new-tokens", type=int)
    for word, end in (("--max-new-token5=3", "; did you mean --max-new-tokens?\n"), ("x", ": x\n")):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                parser.parse_args([word])
            except SystemExit as stopped:
                assert stopped.code == 2
        assert said.getvalue().endswith(end) and said.getvalue().count("\n") == 1, said.getvalue()


def test_launch_default_processes():
    """A core each, at most 8, and what memory holds; 1 wherever this process cannot fork."""
    def count(*gib, cores=16, platform="linux", environ={}):
        affinity = mock.patch.object(os, "sched_getaffinity", lambda _: range(cores), create=True)
        with affinity, mock.patch.object(launch, "memory_there", lambda *_: 10.0), \
                mock.patch.object(sys, "platform", platform), mock.patch.dict(os.environ, environ):
            return launch.default_processes("cpu", *gib)

    assert [count(0.1), count(0.1, cores=3), count(2.0), count(100.0)] == [8, 3, 5, 1]
    assert [count(2.0, 5.0), count(1.0, 12.0)] == [2, 1]
    assert count(0.1, platform="darwin") == count(0.1, environ={"WORLD_SIZE": "1"}) == 1


def test_launch_many_processes():
    """Three processes, of which one fails: its error ends all and is the one shown. Resumed by two,
    they reach what one does."""
    with temporary_dir() as home:
        alone = start_training(home, "alone")
        _, err = finish(start_training(home, "run", "--save-every", "6", "--fail-at", "8",
                                              processes=3), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err, err
        assert err.count("failed: Traceback") == 1, err
        finish(start_training(home, "run", "--fail-at", "0", "--resume", processes=2))
        finish(alone)
        one, many = (model.load_params(home / run / "checkpoints" / "step_000012")
                     for run in ("alone", "run"))
        start = model.init_params(TRAIN_CONFIG, 0)
        worst = max((one[name] - many[name]).abs().max().item() for name in one)
        moved = min((one[name] - start[name]).abs().max().item() for name in one)
        assert worst < 1e-5 < 1e-3 < moved, (worst, moved)
        losses = [[json.loads(line)["loss"] for line in open(home / run / "metrics.jsonl")]
                  for run in ("alone", "run")]
        assert len(losses[0]) == 12 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


def test_launch_forks_end_together():
    """--processes: a planted failure, a killed fork, a killed parent and Ctrl-C.

    What is written then is what torchrun's processes write, to the last bit.
    """
    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    with temporary_dir() as home:
        _, err = finish(start_training(home, "run", "--processes", "3", "--save-every", "6",
                                              "--fail-at", "8"), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err, err
        assert err.count("failed: Traceback") == 1, err
        metrics = home / "run" / "metrics.jsonl"

        def resumed():  # from step 6, in two processes that have made two steps more
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
            process = start_training(home, "run", "--processes", "2", "--resume", "--fail-at", "0")
            wait_for_steps(metrics, 8, process)
            return process

        for victim, message in (("fork", "process 1 was ended by signal 9"), ("parent", "")):
            process = resumed()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            [fork] = map(int, children.split())
            os.kill(fork if victim == "fork" else process.pid, signal.SIGKILL)
            _, err = finish(process, code=1 if victim == "fork" else -9)
            assert message in err, err
            for _ in range(200):
                if not Path(f"/proc/{fork}").exists():
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("a fork outlived its parent")
        process = resumed()
        process.send_signal(signal.SIGINT)
        _, err = finish(process, code=130)
        command = "python script.py --run-dir run --processes 2 --fail-at 0 --resume"
        assert f"go on with: {command}" in err, err
        finish(start_training(home, "forked", "--processes", "2"))
        finish(start_training(home, "launched", processes=2))
        first, second = (file_hashes(home / run / "checkpoints" / "step_000012")
                         for run in ("forked", "launched"))
        assert first == second and len(first) == 7, (first, second)


def test_launch_second_ctrl_c_quits_inside_a_collective():
    """A frozen process: the other waits for it in a collective, where Python's handlers do not run,
    and could only be killed."""
    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    with temporary_dir() as home:
        process = start_training(home, "run", "--processes", "2")
        wait_for_steps(home / "run" / "metrics.jsonl", 1, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGSTOP)
        time.sleep(0.5)
        steps = (home / "run" / "metrics.jsonl").read_bytes().count(b"\n")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None and steps < 12
        process.send_signal(signal.SIGINT)
        finish(process, code=130)


def test_launch_ctrl_c_before_the_first_step():
    """While a model is loaded or problems are read, too: one line, which says how to go on."""
    with temporary_dir() as home:
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
            _, err = finish(process, code=130)
            assert f"{script}: stopped; " in err and err.endswith(f"{how}\n"), err
            assert "Traceback" not in err, err


def test_launch_progress_moves_on_a_terminal_and_once_a_minute_in_a_log():
    now = [0.0]
    for terminal, quiet, moves in ((True, False, 3), (True, True, 3), (False, False, 1),
                                   (False, True, 0)):
        said = io.StringIO()
        said.isatty = lambda: terminal
        with (contextlib.redirect_stderr(said),
              mock.patch.object(launch.time, "monotonic", lambda: now[0]),
              launch.progress_bar(8, "sampling", quiet) as on_step):
            for seconds in (1, 30, 60):
                now[0] += seconds
                on_step([None] * 2, 50, joined=1)
        assert said.getvalue().count("tok/s") >= moves, said.getvalue()
        assert bool(said.getvalue()) == bool(moves), "nothing extra in a log file"
        if moves == 3:
            assert "2/9" in said.getvalue() and "6/11" in said.getvalue()
            assert "50 tok/s" in said.getvalue() and "2 tok/s" in said.getvalue()
