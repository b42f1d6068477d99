"""Tests of the GPU code paths, on tensors that only claim to be on a GPU: see fake_cuda.py."""

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
    """Run the checks below in a separate process, since they patch torch.cuda."""
    run("-m", "tests.test_gpu")


def to_gpu(params):
    return {name: tensor.to("cuda:0") for name, tensor in params.items()}


def assert_captured_once(captured, engine):
    """One graph per power of two of rows and settings, all in one memory pool and stream."""
    assert len(captured) == len(engine.graphs) > 0
    assert all(rows & (rows - 1) == 0 for rows, _ in engine.graphs)
    assert len({pool for _, pool, _ in captured}) == len({stream for *_, stream in captured}) == 1


def check_rules():
    with fake_gpu():
        cpu, gpu = torch.ones(2), torch.ones(2, device="cuda:0")
        assert gpu.is_cuda and (gpu + gpu).tolist() == [2, 2]
        with raises(RuntimeError, "two devices"):
            cpu + gpu
        for wait in (gpu.tolist, gpu.sum().item, gpu.cpu, lambda: gpu.copy_(cpu)):
            with torch.cuda.graph(torch.cuda.CUDAGraph()), raises(RuntimeError, "captured"):
                wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gpu.mul_(2)[:1] + 1
        assert gpu.tolist() == [1, 1]  # captured, not run
        graph.replay()
        graph.replay()
        assert gpu.tolist() == [4, 4] and out.tolist() == [5]


def check_generate():
    """In every mode, the Engine and the plain batch draw the same tokens as a CPU."""
    params, config, tokenizer = small_model()
    # larger weights, for uneven distributions
    params = {name: 8 * t if t.dim() == 2 else t for name, t in params.items()}
    prompts = [tokenizer.encode(text).ids for text in ("1+2=<think>", "How many?<think>", "7")]
    common = {"num_samples": 2, "max_new_tokens": 20, "tokenizer": tokenizer,
              "stop_tokens": {7, 8, 9}}
    modes = ({}, {"temperature": 0}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 20}, {"max_batch": 3},
             {"think_minimum": 12, "think_budget": 4}, {"stop_strings": ["e", "3"]}, {"chunk": 8},
             {"max_new_tokens": [[1, 20], [9, 17], [3, 3]]},
             {"on_token": lambda prompt, sample, tokens: None})
    on_cpu = [generate(params, config, prompts, **common | mode) for mode in modes]
    assert {len(c.tokens) for c in sum(on_cpu[0], [])} != {20} and on_cpu[5][0][0].forced
    for static, count in ((True, len(modes)), (False, 3)):
        engine = Engine()
        with fake_gpu(float32=static) as captured, redirect_stdout(StringIO()) as printed:
            gpu_params = to_gpu(params)
            for mode, expected in zip(modes[:count], on_cpu):
                got = generate(gpu_params, config, prompts, engine=engine, **common | mode)
                for a, b in zip(sum(got, []), sum(expected, [])):
                    assert (a.tokens, a.finish, a.forced) == (b.tokens, b.finish, b.forced), mode
                    gaps = torch.tensor(a.logprobs) - torch.tensor(b.logprobs)
                    assert gaps.abs().max() < 1e-3, (mode, gaps)
        assert bool(captured) == static
        assert printed.getvalue().count("plain path") == int(not static)  # printed once
        if static:
            assert_captured_once(captured, engine)


def two_steps(base, lora, engine):
    """Run, score and evaluate two rollout steps with a refill; `lora` is changed in place.

    Returns [(groups, log-probabilities, records of eval.py, addresses of the sampler's weights)].
    """
    config, tokenizer = model.load_config(TINY), model.load_tokenizer(TINY)
    args = grpo.parse_args(["--prompts", "4", "--group", "2", "--refill", "1", "--max-batch", "4",
                            "--max-new-tokens", "24"])
    grpo.fill_defaults(args, config)
    policy = grpo.Policy(base | lora, config, tokenizer, None, engine)
    problems = load_problems("arithmetic", "train", 20)
    results = []
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
        merged = grpo.as_sampler(policy).params
        records = evaluate(merged, config, tokenizer, problems[:3], max_new_tokens=24, max_batch=4,
                           quiet=True, engine=engine)
        addresses = [tensor.data_ptr() for tensor in engine.params.values()] if engine else []
        records = [record | {"seconds": 0} for record in records]
        results.append((groups, logprobs.cpu(), records, addresses))
    return results


def check_grpo_steps():
    """The second step reuses the first one's cache, weights and graphs, and equals a CPU's."""
    lora = model.init_lora(model.load_config(TINY), 4, 0)
    cpu_lora = {name: t.clone() for name, t in lora.items()}
    on_cpu = two_steps(model.load_params(TINY), cpu_lora, None)
    with fake_gpu(float32=True) as captured:
        engine = Engine()
        on_gpu = two_steps(to_gpu(model.load_params(TINY)), to_gpu(lora), engine)
    assert_captured_once(captured, engine)
    for (groups, logprobs, records, addresses), expected in zip(on_gpu, on_cpu):
        assert [g.texts for g in groups] == [g.texts for g in expected[0]] and len(groups) > 4
        assert (logprobs - expected[1]).abs().max() < 1e-4
        assert records == expected[2] and addresses == on_gpu[0][3]
    assert on_gpu[0][0][0].texts != on_gpu[1][0][0].texts


def check_bfloat16():
    """Used if the GPU supports it. Adapters are merged in float32; logits are not rounded."""
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
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # it replans for every shape
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
    for check in (check_rules, check_generate, check_grpo_steps, check_bfloat16):
        check()
