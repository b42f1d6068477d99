"""Tests of bench.py."""

import contextlib
import io
import re
from unittest import mock

import bench
import model
from tests.common import ROOT, run


def _printed(*words):
    """What bench.py prints in this process."""
    args = bench.parse_args([str(word) for word in words])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        args.bench_fn(args)
    return said.getvalue()


def test_bench_step_peak_is_as_planned():
    """On the CPU the measured peak of a whole process lies within 0.35 GiB of the plan."""
    out = run("bench.py", "step", "--load", "fixed", "--dtype", "bfloat16", "--processes", 1)
    peak, planned = map(float, re.search(r"peak memory (\S+) GiB, planned (\S+)", out).groups())
    assert abs(peak - planned) < 0.35, out
    assert "4096 sampled tokens" in out and "--micro-tokens 2048" in out, out


def test_bench_plan_warns_and_says_what_helps():
    out = _printed("plan", "--gpus", "1:0.5")
    assert "warning" in out and "--checkpointing" in out, out
    assert "all weights:" in out and "adapter of rank 32:" in out, out
    assert "warning" not in _printed("plan", "--gpus", "8:80")
    assert "GPUS:GIB" in run("bench.py", "plan", "--gpus", 24, ok=False)


def test_bench_plan_reads_the_config_alone():
    """It downloaded a model's weights before it said that they do not fit."""
    asked = []

    def resolve(name, config_only=False):
        asked.append((name, config_only))
        return ROOT / "data" / "tiny"

    with mock.patch.object(model, "resolve_model", resolve), \
            mock.patch.object(model, "load_params", side_effect=AssertionError):
        _printed("plan", "--model", "qwen2.5-7b")
    assert asked == [("qwen2.5-7b", True)]


def test_bench_sample_measures_every_load():
    out = _printed("sample", "--batch", 2, "--new-tokens", 4, "--repeat", 1, "--load", "fixed",
                   "context")
    assert re.search(r"fixed, batch +2 \|.*sampled tok/s.*% of the roofline", out), out
