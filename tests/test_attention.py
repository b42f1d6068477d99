"""Tests of model.py's attention."""

import math
import random
from collections import Counter

import torch

import model
from tests.common import FORMULA_TOKENS, formula_model


def test_model_attention_is_causal_and_positions_shift():
    """A later token never moves an earlier logit; without YaRN's scale, only distances between positions count."""
    params, config = formula_model()
    other = FORMULA_TOKENS.clone()
    other[0, 25] = (other[0, 25] + 1) % 96
    a, b = (model.forward(params, config, t) for t in (FORMULA_TOKENS, other))
    assert torch.equal(a[:, :25], b[:, :25]) and (a[:, 25:] - b[:, 25:]).abs().max() > 1e-2
    shifted = model.forward(params, config, FORMULA_TOKENS, positions=torch.arange(40)[None] + 1000)
    assert (shifted - a).abs().max() < 1e-3
    spread = model.forward(params, config, FORMULA_TOKENS, positions=torch.arange(40)[None] * 2)
    assert (spread - a).abs().max() > 1e-2


def test_model_attention_equals_its_definition():
    """In float64, head by head; 40 and 1,100 keys take different ways on a CPU; with masks for all texts or for each.
    900 by 900 scores are made in several parts."""
    generator = torch.Generator().manual_seed(4)
    for T, S, given in ((40, 40, 0), (900, 900, 0), (1100, 1100, 0), (5, 40, 2), (5, 1100, 2), (5, 40, 3),
                        (5, 1100, 3)):
        q, k, v = (torch.randn(2, heads, rows, 8, generator=generator) for heads, rows in ((4, T), (2, S), (2, S)))
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        if given == 3:  # [B, T, S]
            seen = torch.stack((seen, seen & (torch.arange(S) % 3 != 1)))
        got = model.attention(q, k, v, seen if given else None)
        assert got.shape == q.shape
        for head in range(4):
            scores = q[:, head].double() @ k[:, head // 2].double().mT / math.sqrt(8)
            want = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, head // 2].double()
            assert (got[:, head] - want).abs().max() < 1e-5, (T, S, head)


class _RowCounts(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of rows of every matrix product, and of each of a batch of them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            for tensor in [x for x in args if x.dim() > 1][-2:]:
                self.counts.update(tensor.shape[-2:])
        return fn(*args, **(kwargs or {}))


def test_model_packed_rows_have_few_shapes():
    """Texts of any lengths make products of few shapes: for each new one oneDNN keeps a kernel, and memory grows."""
    assert [model.padded_length(n) for n in (0, 1, 32, 33, 511, 513, 1000, 1025, 16000)] == \
        [0, 32, 32, 64, 512, 544, 1024, 1088, 16384]
    assert all(n <= model.padded_length(n) <= max(n + 31, n * 17 / 16 + 1) for n in range(5000))
    params, config = formula_model()
    params, rng = {k: v.requires_grad_() for k, v in params.items()}, random.Random(0)
    with _RowCounts() as rows:
        for _ in range(5):
            groups = [(rng.randint(0, 70), [rng.randint(1, 90) for _ in range(3)]) for _ in range(2)]
            total = sum(prompt + sum(lengths) for prompt, lengths in groups)
            tokens = torch.randint(0, config.vocab_size, (total,))
            hidden = model.packed_hidden_states(params, config, tokens, groups)
            logprobs, _ = model.head_logprobs(params, config, hidden[1:], tokens[1:])
            logprobs.sum().backward()
    sizes = set(config) | {config.head_dim, config.num_key_value_heads * config.head_dim}
    assert {n for n in rows.counts if n not in sizes and n % 32} == set(), rows.counts
