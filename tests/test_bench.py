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
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main(args)
    return out.getvalue()


def test_bench_step_peak_is_as_planned():
    """On a CPU, the measured peak memory of the process is within 0.35 GiB of the plan."""
    out = run("bench.py", "step", "--load", "fixed", "--dtype", "bfloat16", "--processes", 1)
    peak, planned = map(float, re.search(r"peak memory (\S+) GiB, planned (\S+)", out).groups())
    assert abs(peak - planned) < 0.35, out
    assert "4096 sampled tokens" in out and "--micro-tokens 2048" in out, out


def test_bench_step_keeps_an_engine():
    """Without one, a GPU captured its graphs again in every step, as part of the rollout time."""
    with mock.patch.object(bench.grpo, "roll_out_step", side_effect=StopIteration) as roll_out:
        with contextlib.suppress(StopIteration):
            _printed("step", "--processes", 1)
    [(policy, *_)] = [call.args for call in roll_out.call_args_list]
    assert policy.engine is not None


def test_bench_plan_shows_which_flags_fit():
    out = _printed("plan", "--size", "1.5b", "--gpus", "1:6", "1:8", "8:80")
    head, _, six, eight, large = (line.split(" | ") for line in out.strip().splitlines())
    assert head[0] == "| 1.5b" and "`--lora-rank 32` |" in head
    assert all(cell.startswith("no: ") for cell in six[1:]) and eight[1].startswith("no: ")
    assert "`--micro-tokens " in eight[3] and "`--max-batch " in eight[3], eight
    assert large[0] == "| 8 x 80 GiB" and not any("no:" in cell or "`" in cell for cell in large)
    update, rollouts = map(float, re.match(r"(\S+), (\S+) `--free-sampler`", eight[3]).groups())
    assert max(update, rollouts) <= 8, eight
    assert "| tiny | all weights |" in _printed("plan")  # on this machine
    assert "GPUS:GIB" in run("bench.py", "plan", "--gpus", 24, ok=False)


def test_bench_plan_reads_only_the_config():
    """It used to download a model's weights before reporting that they do not fit."""
    resolved = []

    def resolve(name, config_only=False):
        resolved.append((name, config_only))
        return ROOT / "data" / "tiny"

    with mock.patch.object(model, "resolve_model", resolve), \
            mock.patch.object(model, "load_params", side_effect=AssertionError):
        _printed("plan", "--model", "qwen2.5-7b")
    assert resolved == [("qwen2.5-7b", True)]


def test_bench_sample_prints_rates():
    out = _printed("sample", "--batch", 2, "--new-tokens", 4, "--repeat", 1, "--load", "fixed")
    assert re.search(r"fixed, batch +2 \|.*sampled tok/s.*% of the roofline", out), out
