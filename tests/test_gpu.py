"""Tests of what a GPU does, on tensors that only say that they are on one: see fake_cuda.py."""

from contextlib import redirect_stdout
from io import StringIO

import torch

import attention
import grpo
import launch
import model
from data import load_problems
from engine import Engine, sampling_params
from eval import evaluate
from generate import generate
from tests.common import ROOT, raises, run, small_model
from tests.fake_cuda import fake_gpu

TINY = ROOT / "data" / "tiny"


def test_gpu_path_on_a_cpu():
    """The checks below, in a process of their own, since they change what torch.cuda is."""
    run("-m", "tests.test_gpu")


def to_gpu(params):
    return {name: tensor.to("cuda:0") for name, tensor in params.items()}


def assert_captured_once(captured, engine):
    """One graph for each power of two of rows and each setting, all of one pool and one stream."""
    assert len(captured) == len(engine.graphs) > 0
    assert all(rows & (rows - 1) == 0 for rows, _ in engine.graphs)
    assert len({pool for _, pool, _ in captured}) == len({stream for *_, stream in captured}) == 1


def check_rules():
    with fake_gpu():
        here, there = torch.ones(2), torch.ones(2, device="cuda:0")
        assert there.is_cuda and (there + there).tolist() == [2, 2]
        with raises(RuntimeError, "two devices"):
            here + there
        for wait in (there.tolist, there.sum().item, there.cpu, lambda: there.copy_(here)):
            with torch.cuda.graph(torch.cuda.CUDAGraph()), raises(RuntimeError, "captured"):
                wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = there.mul_(2)[:1] + 1
        assert there.tolist() == [1, 1]  # captured, not run
        graph.replay()
        graph.replay()
        assert there.tolist() == [4, 4] and doubled.tolist() == [5]


def check_generate():
    """In its modes, by the static engine and the plain one: the tokens of a CPU."""
    params, config, tokenizer = small_model()
    params = {name: 8 * t if t.dim() == 2 else t for name, t in params.items()}  # uneven
    prompts = [tokenizer.encode(text).ids for text in ("1+2=<think>", "How many?<think>", "7")]
    ask = {"num_samples": 2, "max_new_tokens": 20, "tokenizer": tokenizer, "stop_tokens": {7, 8, 9}}
    modes = ({}, {"temperature": 0}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 20}, {"max_batch": 3},
             {"think_minimum": 12, "think_budget": 4}, {"stop_strings": ["e", "3"]}, {"chunk": 8},
             {"max_new_tokens": [[1, 20], [9, 17], [3, 3]]}, {"cache_gib": 1e-4},
             {"on_token": lambda prompt, sample, tokens: None})
    wanted = [generate(params, config, prompts, **ask | mode) for mode in modes]
    assert {len(c.tokens) for c in sum(wanted[0], [])} != {20} and wanted[5][0][0].forced
    for static, count in ((True, len(modes)), (False, 3)):
        engine = Engine()
        with fake_gpu(float32=static) as captured, redirect_stdout(StringIO()) as said:
            on_gpu = to_gpu(params)
            for mode, want in zip(modes[:count], wanted):
                got = generate(on_gpu, config, prompts, engine=engine, **ask | mode)
                for a, b in zip(sum(got, []), sum(want, [])):
                    assert (a.tokens, a.finish, a.forced) == (b.tokens, b.finish, b.forced), mode
                    gaps = torch.tensor(a.logprobs) - torch.tensor(b.logprobs)
                    assert gaps.abs().max() < 1e-3, (mode, gaps)
        assert bool(captured) == static
        assert said.getvalue().count("plain path") == int(not static)  # said once
        if static:
            assert_captured_once(captured, engine)


def two_steps(base, lora, engine):
    """Two steps of grpo.py with a refill, scored and evaluated; the adapter changes in place.

    [(groups, log-probabilities, records of eval.py, addresses of the sampler's weights), ...]
    """
    config, tokenizer = model.load_config(TINY), model.load_tokenizer(TINY)
    args = grpo.parse_args(["--prompts", "4", "--group", "2", "--refill", "1", "--max-batch", "4",
                            "--max-new-tokens", "24"])
    grpo.fill_defaults(args, config)
    policy = grpo.Policy(base | lora, config, tokenizer, None, engine)
    problems = load_problems("arithmetic", "train", 20)
    found = []
    for step in range(2):
        for i, name in enumerate(lora):
            noise = torch.randn(lora[name].shape, generator=torch.Generator().manual_seed(i))
            lora[name].add_(0.03 * noise.to(lora[name].device))
        orders = [problems[10 * step:], problems[10 * step + 4:]]
        groups = grpo.roll_out_step(policy, orders, step, args)
        row = [(g.prompt, [grpo.Sequence(c.tokens, c.logprobs, 1.0) for c in g.completions])
               for g in groups]
        with torch.no_grad():
            logprobs, *_ = grpo.row_logprobs(policy.params, config, row, args.temperature)
        form = grpo.as_sampler(policy).params
        records = evaluate(form, config, tokenizer, problems[:3], max_new_tokens=24, max_batch=4,
                           quiet=True, engine=engine)
        addresses = [tensor.data_ptr() for tensor in engine.form.values()] if engine else []
        records = [record | {"seconds": 0} for record in records]
        found.append((groups, logprobs.cpu(), records, addresses))
    return found


def check_steps_of_grpo():
    """What the first step allots, merges and captures serves the second, and says what a CPU does.
    """
    lora = model.init_lora(model.load_config(TINY), 4, 0)
    wanted = two_steps(model.load_params(TINY), {name: t.clone() for name, t in lora.items()}, None)
    with fake_gpu(float32=True) as captured:
        engine = Engine()
        found = two_steps(to_gpu(model.load_params(TINY)), to_gpu(lora), engine)
    assert_captured_once(captured, engine)
    for (groups, logprobs, records, addresses), want in zip(found, wanted):
        assert [g.texts for g in groups] == [g.texts for g in want[0]] and len(groups) > 4
        assert (logprobs - want[1]).abs().max() < 1e-4
        assert records == want[2] and addresses == found[0][3]
    assert found[0][0][0].texts != found[1][0][0].texts


def check_bfloat16():
    """Where a card has it. An adapter is merged in float32 and rounded once, logits never are."""
    with fake_gpu(capability=(7, 5)):
        assert launch.compute_dtype("auto", "cuda:0") == torch.float32
        assert not attention.has_varlen("cuda:0", torch.float16)
    config = model.load_config(TINY)
    base = {name: t.bfloat16() for name, t in model.load_params(TINY).items()}
    lora = {name: t + 0.002 for name, t in model.init_lora(config, 4, 0).items()}
    name = "model.layers.1.mlp.down_proj"
    exact = (base[f"{name}.weight"].double()
             + lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double())
    with fake_gpu():
        device = launch.find_device("auto")
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan for every shape
        assert launch.compute_dtype("auto", device) == torch.bfloat16
        params = to_gpu(base | lora)
        merged = sampling_params(params, config)[f"{name}.weight"].cpu()
        [answers] = generate(params, config, [[5, 6, 7]], num_samples=4, max_new_tokens=12)
        row = [([5, 6, 7], [grpo.Sequence(c.tokens, [], 1.0) for c in answers])]
        with torch.no_grad():
            logprobs, *_ = grpo.row_logprobs(params, config, row, 1.0)
            logits = model.lm_head(params["model.norm.weight"][None], model.head_weight(params))
    assert (merged != exact.bfloat16()).float().mean() < 0.001
    gaps = logprobs.held - torch.tensor([c.logprobs for c in answers])
    assert gaps.abs().mean() < 0.05 and (logits.held != logits.held.bfloat16()).any(), gaps


if __name__ == "__main__":
    for check in (check_rules, check_generate, check_steps_of_grpo, check_bfloat16):
        check()
