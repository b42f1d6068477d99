"""Tests of attention.py."""

import math
import random
from collections import Counter

import torch

import attention
import model
from tests.common import FORMULA_TOKENS, formula_model, varlen_on_cpu


def test_attention_is_causal_and_positions_shift():
    """Later tokens never affect earlier logits, and only relative positions matter."""
    params, config = formula_model()
    other = FORMULA_TOKENS.clone()
    other[0, 25] = (other[0, 25] + 1) % 96
    positions = torch.arange(40)[None]
    a, b = (model.forward(params, config, t) for t in (FORMULA_TOKENS, other))
    assert torch.equal(a[:, :25], b[:, :25]) and (a[:, 25:] - b[:, 25:]).abs().max() > 1e-2
    shifted = model.forward(params, config, FORMULA_TOKENS, positions=positions + 1000)
    assert (shifted - a).abs().max() < 1e-3
    spread = model.forward(params, config, FORMULA_TOKENS, positions=positions * 2)
    assert (spread - a).abs().max() > 1e-2


def test_attention_kernels_equal_the_formula():
    """Values and gradients of the CPU and GPU kernels match the formula in float64."""
    generator = torch.Generator().manual_seed(4)
    for T, S, mask_dims in ((40, 40, 0), (300, 300, 0), (5, 40, 2), (5, 1100, 2), (5, 40, 3)):
        q, k, v = (torch.randn(2, heads, rows, 8, generator=generator)
                   for heads, rows in ((4, T), (2, S), (2, S)))
        visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        if mask_dims == 3:  # [B, T, S]
            visible = torch.stack((visible, visible & (torch.arange(S) % 3 != 1)))
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        keys, values = (x.repeat_interleave(2, 1) for x in exact[1:])
        scores = exact[0] @ keys.mT / math.sqrt(8)
        masked = ~visible.expand(2, T, S)[:, None]
        want = scores.masked_fill(masked, -math.inf).softmax(-1) @ values
        grad = torch.randn(want.shape, generator=generator)
        want_grads = torch.autograd.grad((want * grad).sum(), exact)
        for kernel in (attention.plain_attention, attention.fused_attention, attention.attention):
            mask = visible if mask_dims or kernel is attention.plain_attention else None
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            got = kernel(*inputs, mask)
            assert got.shape == q.shape and (got - want).abs().max() < 1e-5, (T, S, kernel)
            grads = torch.autograd.grad((got * grad).sum(), inputs)
            for ours, theirs in zip(grads, want_grads):
                assert (ours - theirs).abs().max() < 1e-4, (T, S, kernel)


def test_attention_scores_are_float32():
    """Scores of the real Qwen-2.5 reach 13,000, where bfloat16 values are 64 apart.

    An offset shared by all keys does not change the softmax, unless scores are rounded.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator).bfloat16() for _ in "qkv")
    q[..., 0] = 128
    k[..., 0] += 64
    visible = torch.ones(64, 64, dtype=torch.bool).tril()
    scores = (q.double() @ k.double().mT / 4).masked_fill(~visible, -torch.inf)
    exact = scores.softmax(-1) @ v.double()
    for got in (attention.attention(q, k, v), attention.causal_attention(0, q, k, v)):
        assert (got.double() - exact).abs().max() < 0.02
    keys = k.transpose(0, 1).float()  # [K, B, S, head_dim]
    values = v.transpose(0, 1)
    own = [[keys[:, :, 40:].clone(), values[:, :, 40:].clone()]]
    prompts = [[keys[:, :, :40].clone(), values[:, :, :40].clone()]]
    layout = attention.Layout(torch.tensor([40]), torch.zeros(2, 1, 40), torch.tensor([[0]]),
                              torch.empty(0))
    decode = attention.decode_attention(own, prompts, layout, torch.tensor([63]))
    got = decode(0, q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
    assert (got.double() - exact[:, :, -1:]).abs().max() < 0.02


class _MatrixSizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the dimensions of all matrices in products, including batched products."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if fn in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            for tensor in [x for x in args if x.dim() > 1][-2:]:
                self.counts.update(tensor.shape[-2:])
        return fn(*args, **(kwargs or {}))


def test_attention_packed_rows_have_few_shapes():
    """Sequences of any length lead to products of few shapes. oneDNN caches a kernel for every
    shape, so memory used to grow."""
    assert [attention.padded_length(n) for n in (0, 1, 32, 33, 511, 513, 1000, 1025, 16000)] == \
        [0, 32, 32, 64, 512, 544, 1024, 1088, 16384]
    assert all(n <= attention.padded_length(n) <= max(n + 31, n * 17 / 16 + 1) for n in range(5000))
    params, config = formula_model()
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    rng = random.Random(0)
    with _MatrixSizes() as sizes:
        for _ in range(5):
            groups = [(rng.randint(0, 70), [rng.randint(1, 90) for _ in range(3)])
                      for _ in range(2)]
            total = sum(prompt + sum(lengths) for prompt, lengths in groups)
            tokens = torch.randint(0, config.vocab_size, (total,))
            hidden = model.packed_hidden_states(params, config, tokens, groups)
            logprobs, _ = model.head_logprobs(params, config, hidden[1:], tokens[1:])
            logprobs.sum().backward()
    model_sizes = {*config, config.head_dim, config.num_key_value_heads * config.head_dim}
    assert {n for n in sizes.counts if n not in model_sizes and n % 32} == set(), sizes.counts


def test_attention_varlen_equals_padded():
    """Values and gradients, with and without prompts shared by several completions."""
    generator = torch.Generator().manual_seed(5)
    for groups in ([(5, [3, 40, 1])], [(0, [7, 4]), (33, [2]), (1, [1, 1])]):
        T = sum(prompt + sum(lengths) for prompt, lengths in groups)
        inputs = [torch.randn(1, heads, T, 8, generator=generator, requires_grad=True)
                  for heads in (4, 2, 2)]
        weights = torch.randn(1, 4, T, 8, generator=generator)
        padded = attention.packed_attention(groups)(0, *inputs)
        with varlen_on_cpu():
            varlen = attention.varlen_packed(attention.packed_sequences(groups), "cpu")(0, *inputs)
        assert (padded - varlen).abs().max() < 1e-5
        want = torch.autograd.grad((padded * weights).sum(), inputs)
        got = torch.autograd.grad((varlen * weights).sum(), inputs)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(want, got))
