"""What a first hour on a GPU should confirm: kernels, agreement with a CPU, gradients, captures.

    python -m docs.gpu_check    # two minutes; needs a GPU from sm80 on

Every line ends in ok or WRONG; the exit code is the number of the latter.
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

wrong = []


def report(what, value, bound):
    """One line: a figure that must not exceed `bound`."""
    if not value <= bound:
        wrong.append(what)
    verdict = "ok" if value <= bound else "WRONG"
    print(f"{what}: {value:.3g} (at most {bound:g}) {verdict}", flush=True)


def distance(a, b):
    """How far a is from b, as a share of b's norm."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def check_attention(device):
    """A packed row forward and backward, and decoding with 1 to 64 rows, against float64."""
    generator = torch.Generator().manual_seed(0)
    groups = [(70, [300, 20, 1]), (0, [129, 64]), (1, [5])]
    T = sum(prompt + sum(lengths) for prompt, lengths in groups)
    exact = [torch.randn(1, heads, T, 128, generator=generator).double().requires_grad_()
             for heads in (12, 2, 2)]
    weights = torch.randn(1, 12, T, 128, generator=generator)
    want = attention.packed_attention(groups, dtype=torch.float64)(0, *(x.float() for x in exact))
    want_grads = torch.autograd.grad((want * weights).sum(), exact)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in exact]
        out = attention.packed_attention(groups, device, dtype)(0, *inputs)
        report(f"packed row, {dtype}", distance(out, want), bound)
        grads = torch.autograd.grad((out * weights.to(device)).sum(), inputs)
        for name, got, expected in zip("qkv", grads, want_grads):
            report(f"its gradient of {name}", distance(got, expected), bound)
    for rows in (1, 3, 64):
        size = 256
        cache = attention.Slots([[torch.randn(64 * size, 2, 128, generator=generator)
                                  .to(device, torch.bfloat16) for _ in range(2)]], size)
        positions = torch.randint(0, size, (rows,), generator=generator)
        q, k, v = (torch.randn(rows, heads, 1, 128, generator=generator).to(device, torch.bfloat16)
                   for heads in (12, 2, 2))
        out = attention.slot_decode(cache, positions.to(device))(0, q, k, v)
        keys, values = (x[:rows * size].view(rows, size, 2, 128).transpose(1, 2).double().cpu()
                        for x in cache.layers[0])
        scores = q.double().cpu().view(rows, 2, 6, 128) @ keys.mT / 128**0.5
        unseen = torch.arange(size) > positions[:, None]
        expected = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values
        report(f"decode, {rows} rows", distance(out.view(rows, 2, 6, 128), expected), 1e-2)


def check_sampler(device, count=40):
    """The tiny model: the same tokens on a CPU and a GPU, and log-probabilities near the scorer's.
    """
    path = model.resolve_model("tiny")
    config, tokenizer = model.load_config(path), model.load_tokenizer(path)
    problems = load_problems("arithmetic", "test", count)
    prompts = [encode_prompt(tokenizer, "plain", problem) for problem in problems]
    on_cpu = model.load_params(path)
    ends = model.end_tokens(tokenizer, config)
    for temperature in (0.0, 1.0):
        for changes in ({}, {"max_batch": 7}, {"think_budget": 20, "tokenizer": tokenizer}):
            ask = {"num_samples": 2, "max_new_tokens": 100, "stop_tokens": ends,
                   "temperature": temperature} | changes
            want = sum(generate.generate(on_cpu, config, prompts, **ask), [])
            for dtype, bound in ((torch.float32, 0.05), (torch.bfloat16, 0.5)):
                params = {name: t.to(device, dtype) for name, t in on_cpu.items()}
                engine = Engine()
                got = sum(generate.generate(params, config, prompts, engine=engine, **ask), [])
                differ = sum(a.tokens != b.tokens for a, b in zip(want, got)) / len(want)
                report(f"temperature {temperature}, {[*changes]}, {dtype}: rows that differ from a "
                       f"CPU's; {len(engine.graphs)} captures", differ, bound)
    return config, on_cpu, prompts, want


def check_gradients(device, config, on_cpu, prompts, completions):
    """One packed row through the model and the policy loss: a CPU's gradients and a GPU's."""
    row = [(prompt, [grpo.Sequence(c.tokens, c.logprobs, advantage)
                     for c, advantage in zip(pair, (1.0, -1.0))])
           for prompt, pair in zip(prompts[:12], zip(completions[::2], completions[1::2]))]
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
            report(f"gradient of a row, {dtype}, checkpointing {checkpointing}",
                   distance(gradients(params, checkpointing), want), bound)
    lora = {name: t + 0.02 for name, t in model.init_lora(config, 8, 0).items()}
    want = gradients(on_cpu | lora)
    params = {name: t.to(device, torch.bfloat16) for name, t in on_cpu.items()}
    params |= {name: t.to(device) for name, t in lora.items()}
    report("gradient of a row, bfloat16 and an adapter", distance(gradients(params), want), 0.1)


def main():
    device = launch.find_device("cuda")
    print(torch.__version__, "| CUDA", torch.version.cuda, "| cuDNN",
          torch.backends.cudnn.version(), "|", torch.cuda.get_device_name(device),
          torch.cuda.get_device_capability(device), flush=True)
    print("collectives:", [name for name in dir(torch.distributed) if name.endswith("_single")])
    print("varlen_attn has a kernel here:", attention.has_varlen(device, torch.bfloat16))
    check_attention(device)
    check_gradients(device, *check_sampler(device))
    sys.exit(len(wrong))


if __name__ == "__main__":
    main()
