"""Checks for the first hour on a GPU: kernels, agreement with the CPU, gradients.

    python -m docs.gpu_check    # two minutes; needs a GPU of compute capability 8.0 or above

Checks yield (label, value, bound). Lines end in ok or WRONG; the exit code counts the latter.
"""

import sys

import torch

import attention
import generate
import grpo
import launch
import losses
import model
from data import load_problems
from data.prompts import encode_prompt
from engine import Engine


def load_task(count):
    """(config, params on the CPU, prompts, sampling arguments) of the tiny model."""
    path = model.resolve_model("tiny")
    config, tokenizer = model.load_config(path), model.load_tokenizer(path)
    problems = load_problems("arithmetic", "test", count)
    prompts = [encode_prompt(tokenizer, "plain", problem) for problem in problems]
    sampling = {"num_samples": 2, "max_new_tokens": 100, "tokenizer": tokenizer,
                "stop_tokens": model.end_tokens(tokenizer, config)}
    return config, model.load_params(path), prompts, sampling


def distance(a, b):
    """The norm of a - b, relative to the norm of b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def check_packed_row(device):
    """Attention over a packed row, forward and backward, against float64."""
    generator = torch.Generator().manual_seed(0)
    groups = [(70, [300, 20, 1]), (0, [129, 64]), (1, [5])]
    T = sum(prompt + sum(lengths) for prompt, lengths in groups)
    exact = [torch.randn(1, heads, T, 128, generator=generator).double().requires_grad_()
             for heads in (12, 2, 2)]  # q, k, v: [1, heads, T, 128]
    weights = torch.randn(1, 12, T, 128, generator=generator)
    want = attention.packed_attention(groups, dtype=torch.float64)(0, *(x.float() for x in exact))
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in exact]
        out = attention.packed_attention(groups, device, dtype)(0, *inputs)
        yield f"packed row, {dtype}", distance(out, want), bound
        grads = torch.autograd.grad((out * weights.to(device)).sum(), inputs)
        for name, got, expected in zip("qkv", grads, want_grads):
            yield f"packed row, {dtype}, gradient of {name}", distance(got, expected), bound


def check_decode(device):
    """One decode step in bfloat16 with 1 to 64 rows, against float64."""
    generator = torch.Generator().manual_seed(0)
    size = 256  # slots per row

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    for rows in (1, 3, 64):
        cache = attention.Slots([[draw(64 * size, 2, 128), draw(64 * size, 2, 128)]], size)
        positions = torch.randint(0, size, (rows,), generator=generator)
        q, k, v = (draw(rows, heads, 1, 128) for heads in (12, 2, 2))
        out = attention.slot_decode(cache, positions.to(device))(0, q, k, v)
        keys, values = (x[:rows * size].view(rows, size, 2, 128).transpose(1, 2).double().cpu()
                        for x in cache.layers[0])  # [rows, 2, size, 128]
        scores = q.double().cpu().view(rows, 2, 6, 128) @ keys.mT / 128**0.5  # [rows, 2, 6, size]
        unseen = torch.arange(size) > positions[:, None]  # [rows, size]
        expected = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values
        yield f"decode, {rows} rows", distance(out.view(rows, 2, 6, 128), expected), 1e-2


def check_sampler(device, config, on_cpu, prompts, sampling):
    """The share of rows whose tokens differ between the CPU and the GPU."""
    for temperature in (0.0, 1.0):
        for changes in ({}, {"max_batch": 7}, {"think_budget": 20}):
            options = sampling | {"temperature": temperature} | changes
            want = sum(generate.generate(on_cpu, config, prompts, **options), [])
            for dtype, bound in ((torch.float32, 0.05), (torch.bfloat16, 0.5)):
                params = {name: t.to(device, dtype) for name, t in on_cpu.items()}
                engine = Engine()
                got = sum(generate.generate(params, config, prompts, engine=engine, **options), [])
                differ = sum(a.tokens != b.tokens for a, b in zip(want, got)) / len(want)
                label = f"temperature {temperature}, {[*changes]}, {dtype}"
                yield (f"{label}: share of rows that differ from the CPU's "
                       f"({len(engine.graphs)} graph captures)", differ, bound)


def check_gradients(device, config, on_cpu, prompts, sampling):
    """Gradients of the policy loss on one packed row, against the CPU's."""
    pairs = generate.generate(on_cpu, config, prompts[:12], think_budget=20, **sampling)
    row = [(prompt, [grpo.Sequence(a.tokens, a.logprobs, 1.0),
                     grpo.Sequence(b.tokens, b.logprobs, -1.0)])
           for prompt, (a, b) in zip(prompts, pairs)]
    args = grpo.parse_args(["--device", device.type])
    grpo.fill_defaults(args, config)

    def gradients(params, checkpointing=False):
        leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
        args.checkpointing = checkpointing
        loss, _ = grpo.row_loss(leaves, config, row, None, None, losses.Total(1000, 1000), args)
        loss.backward()
        return torch.cat([t.grad.double().cpu().flatten() for t in leaves.values()])

    want = gradients(on_cpu)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        params = {name: t.to(device, dtype) for name, t in on_cpu.items()}
        for checkpointing in (False, True):
            yield (f"gradient of a row, {dtype}, checkpointing {checkpointing}",
                   distance(gradients(params, checkpointing), want), bound)
    lora = {name: t + 0.02 for name, t in model.init_lora(config, 8, 0).items()}
    want = gradients(on_cpu | lora)
    params = {name: t.to(device, torch.bfloat16) for name, t in on_cpu.items()}
    params |= {name: t.to(device) for name, t in lora.items()}
    yield "gradient of a row, bfloat16 with LoRA", distance(gradients(params), want), 0.1


def run_checks(device, task):
    """Print every figure; returns the number that exceed their bound."""
    num_wrong = 0
    for figures in (check_packed_row(device), check_decode(device), check_sampler(device, *task),
                    check_gradients(device, *task)):
        for label, value, bound in figures:
            verdict = "ok" if value <= bound else "WRONG"
            num_wrong += verdict == "WRONG"
            print(f"{label}: {value:.3g} (at most {bound:g}) {verdict}", flush=True)
    return num_wrong


def main():
    device = launch.find_device("cuda")
    print(torch.__version__, "| CUDA", torch.version.cuda, "| cuDNN",
          torch.backends.cudnn.version(), "|", torch.cuda.get_device_name(device),
          torch.cuda.get_device_capability(device), flush=True)
    print("collectives:", [name for name in dir(torch.distributed) if name.endswith("_single")])
    print("varlen_attn is available:", attention.has_varlen(device, torch.bfloat16))
    sys.exit(run_checks(device, load_task(40)))


if __name__ == "__main__":
    main()
