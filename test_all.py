"""Every test, in the order of the files from the ground up.

    python test_all.py                  # all
    python test_all.py verify resume    # those whose name contains one of the words
    pytest test_all.py                  # the same functions

Everything runs on a CPU in minutes, on the embedded tiny model or on tiny random weights. What cannot run here
raises `unittest.SkipTest` with its reason.
"""

import sys
import time
import traceback
import unittest
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------ model.py

import json
import math
import random
import tempfile
from collections import Counter
from unittest import mock

import model


def _raises(kind, words, fn, *args, **kwargs):
    """Calls fn, which must raise `kind` in one line that holds all of `words`."""
    try:
        fn(*args, **kwargs)
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(word in text for word in words), (words, text)
    else:
        raise AssertionError(f"no {kind.__name__} with {words}")


def _formula_model(tied=True, yarn=False):
    """A tiny model whose weights are a formula: the same here and wherever a reference is computed."""
    scaling = model.parse_yarn({"type": "yarn", "factor": 4.0}, 16) if yarn else None
    config = model.Config(96, 64, 80, 3, 4, 2, max_position_embeddings=16 if yarn else 64, rope_theta=10000.0,
                          tie_word_embeddings=tied, rope_scaling=scaling, eos_token_id=(95,))
    params = {}
    for i, (name, shape) in enumerate(model.param_shapes(config).items()):
        wave = (torch.arange(math.prod(shape), dtype=torch.float64).square() * 0.7 + i).sin().view(shape)
        mean, spread = (1, 0.2) if name.endswith("norm.weight") else (0, 0.5) if name.endswith("bias") else (0, 0.25)
        params[name] = (mean + spread * wave).float()
    return params, config


_FORMULA_TOKENS = (torch.arange(40) ** 2 * 7 % 96)[None]  # [1, 40]
# What transformers 5.23.0 computes in float32 on a CPU. To see it again, in an environment that has transformers, too:
#     params, config = test_all._formula_model(tied, yarn); model.save_model("m", params, config, like=".")
#     theirs = AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32)
#     theirs(_FORMULA_TOKENS).logits[0, [5, 20, 39], :4]; theirs.generate(_FORMULA_TOKENS, do_sample=False,
#                                                                       max_new_tokens=24, eos_token_id=-1)[0, 40:]
_FORMULA_REFERENCE = {  # (tied, yarn): the logits, the greedy continuation
    (True, False): ([[1.70953, 0.57179, 1.13275, -0.91146], [-0.59251, 1.82117, 1.11064, -0.12725],
                     [0.72466, 0.89008, 2.88952, 0.53489]],
                    [22, 1, 1, 1, 1, 1, 1, 31, 1, 1, 31, 1, 31, 53, 2, 22, 1, 1, 1, 1, 31, 1, 31, 1]),
    (True, True): ([[1.69489, 0.24927, 0.98146, -1.11961], [-0.44387, 1.8918, 1.0639, 0.42575],
                    [1.29142, 0.51876, 3.45154, 0.93268]],
                   [94, 22, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 41, 22, 41, 65, 94, 20]),
    (False, False): ([[1.24725, 0.52637, 0.97172, -0.24292], [0.22113, 1.98648, 0.81383, 0.81902],
                      [0.3794, 0.99318, 2.54028, 1.13628]],
                     [22, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 31, 1, 31, 1, 22, 1, 1, 1, 1, 1, 31, 1]),
    (False, True): ([[1.35495, 0.04719, 0.80294, -0.47521], [0.29833, 2.10734, 0.57313, 1.27681],
                     [0.97931, 0.86421, 2.95399, 1.54956]],
                    [22, 89, 28, 53, 94, 22, 54, 1, 1, 1, 1, 1, 1, 31, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
}


def test_model_equals_transformers():
    """Stored logits and greedy text; under YaRN, 16 trained positions are stretched to 64."""
    for (tied, yarn), (logits, continuation) in _FORMULA_REFERENCE.items():
        params, config = _formula_model(tied, yarn)
        with torch.inference_mode():
            ours = model.forward(params, config, _FORMULA_TOKENS)
            assert ours.shape == (1, 40, 96) and ours.dtype == torch.float32
            gap = (ours[0, [5, 20, 39], :4] - torch.tensor(logits)).abs().max().item()
            assert gap < 2e-5, (tied, yarn, gap)
            cache, step, written = model.init_cache(config, 1, 64), _FORMULA_TOKENS, []
            while len(written) < 24:
                step = model.forward(params, config, step, cache=cache)[:, -1:].argmax(-1)
                written.append(step.item())
            assert written == continuation, (tied, yarn, written)


def test_model_yarn_frequencies_by_hand():
    """Qwen-2.5's documented 4x on 32,768: pairs that turn 32 times or more are kept, those below one turn quartered."""
    config = model.Config(96, 128, 80, 1, 1, 1, rope_scaling=model.parse_yarn({"type": "yarn", "factor": 4.0}, 32768))
    plain = model.rope_frequencies(config._replace(rope_scaling=None))
    ratio = (model.rope_frequencies(config) / plain).tolist()
    assert abs(plain[1].item() - 1e6 ** (-1 / 64)) < 1e-7 and len(ratio) == 64
    low, high = 23, 40  # 64 ln(32768 / (32 * 2 pi)) / ln 1e6 = 23.6, down; 64 ln(32768 / (2 pi)) / ln 1e6 = 39.7, up
    for pair, got in enumerate(ratio):
        interpolated = min(max((pair - low) / (high - low), 0), 1)
        assert abs(got - (1 - interpolated + interpolated / 4)) < 1e-6, (pair, got)
    assert config.max_context == 131072 and config._replace(rope_scaling=None).max_context == 32768
    assert abs(config.rope_scaling.attention_factor - (0.1 * math.log(4) + 1)) < 1e-12
    cos, sin = model.rope_table(config, torch.tensor([[0, 131071]]), torch.float32)
    assert cos.shape == (1, 1, 2, 128) and torch.allclose(cos.square() + sin.square(), torch.tensor(1.1386294 ** 2))


def test_model_sizes_as_published():
    """The parameter counts on the model cards follow from the published shapes."""
    for count, tied, vocab, *shape in ((494_032_768, True, 151936, 896, 4864, 24, 14, 2),
                                       (1_543_714_304, True, 151936, 1536, 8960, 28, 12, 2),
                                       (3_085_938_688, True, 151936, 2048, 11008, 36, 16, 2),
                                       (7_615_616_512, False, 152064, 3584, 18944, 28, 28, 4),
                                       (14_770_033_664, False, 152064, 5120, 13824, 48, 40, 8)):
        shapes = model.param_shapes(model.Config(vocab, *shape, tie_word_embeddings=tied))
        assert sum(map(math.prod, shapes.values())) == count


def test_model_cached_chunked_ragged_equal_uncached():
    for yarn in (False, True):
        params, config = _formula_model(yarn=yarn)
        tokens = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole = model.forward(params, config, tokens)
            for chunks in ((40,), (1, 39), (7, 1, 1, 16, 15), (1,) * 40):
                cache = model.init_cache(config, 3, 48)
                parts = [model.forward(params, config, part, cache=cache) for part in tokens.split(chunks, 1)]
                assert (torch.cat(parts, 1) - whole).abs().max() < 2e-5, chunks
                assert cache.lengths.tolist() == [40] * 3
            # rows of 30, 17 and 5 tokens, padded to 30, then continued each from its own end
            lengths, rows = torch.tensor([30, 17, 5]), torch.arange(3)
            padded = tokens[:, :30].where(torch.arange(30) < lengths[:, None], 0)
            cache = model.init_cache(config, 3, 48)
            first = model.forward(params, config, padded, cache=cache)
            assert (first[rows, lengths - 1] - whole[rows, lengths - 1]).abs().max() < 2e-5
            for i in range(10):
                at = lengths + i
                step = model.forward(params, config, tokens[rows, at][:, None], positions=at[:, None], cache=cache)
                assert (step[:, 0] - whole[rows, at]).abs().max() < 2e-5, i
                assert cache.lengths.tolist() == (at + 1).tolist()
            alone = model.forward(params, config, tokens[2:, :5])
            assert (alone - model.forward(params, config, padded)[2:, :5]).abs().max() < 2e-5  # without a cache, too


def test_model_attention_is_causal_and_positions_shift():
    """A later token never moves an earlier logit; without YaRN's scale, only distances between positions count."""
    params, config = _formula_model()
    other = _FORMULA_TOKENS.clone()
    other[0, 25] = (other[0, 25] + 1) % 96
    a, b = (model.forward(params, config, t) for t in (_FORMULA_TOKENS, other))
    assert torch.equal(a[:, :25], b[:, :25]) and (a[:, 25:] - b[:, 25:]).abs().max() > 1e-2
    shifted = model.forward(params, config, _FORMULA_TOKENS, positions=torch.arange(40)[None] + 1000)
    assert (shifted - a).abs().max() < 1e-3
    spread = model.forward(params, config, _FORMULA_TOKENS, positions=torch.arange(40)[None] * 2)
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


def test_model_context_and_cache_limits():
    params, config = _formula_model()
    long = torch.zeros(1, 65, dtype=torch.int64)
    _raises(ValueError, ["65 tokens", "context of 64"], model.forward, params, config, long)
    cache = model.init_cache(config, 1, 8)
    model.forward(params, config, long[:, :8], cache=cache)
    _raises(ValueError, ["position 8", "8 slots"], model.forward, params, config, long[:, :1], cache=cache)


def test_model_bfloat16():
    """Weights and cache in bf16, logits in float32 and close to those of fp32."""
    params, config = _formula_model()
    half = {k: v.bfloat16() for k, v in params.items()}
    with torch.inference_mode():
        wide, narrow = (model.forward(p, config, _FORMULA_TOKENS) for p in (params, half))
        cache = model.init_cache(config, 1, 40, dtype=torch.bfloat16)
        cached = model.forward(half, config, _FORMULA_TOKENS, cache=cache)
    assert narrow.dtype == cached.dtype == torch.float32
    assert (narrow - wide).abs().mean() < 0.03 and (cached - wide).abs().mean() < 0.03


def test_model_token_logprobs_values_and_gradients():
    """Slices, checkpointing and temperature change neither the values nor any gradient of log_softmax(forward)."""
    for tied, temperature in ((True, 1.0), (False, 0.6)):
        params, config = _formula_model(tied)
        params = {k: v.requires_grad_() for k, v in params.items()}
        tokens = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
        weight = torch.linspace(-1, 2, 57).view(3, 19)
        logits = model.forward(params, config, tokens)[:, :-1] / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        direct = distribution.log_prob(tokens[:, 1:])
        wanted = torch.autograd.grad((direct * weight).sum(), list(params.values()))

        def check(logprobs):
            assert logprobs.shape == (3, 19) and logprobs.dtype == torch.float32
            assert (logprobs - direct).abs().max() < 1e-5
            grads = torch.autograd.grad((logprobs * weight).sum(), list(params.values()))
            for name, got, want in zip(params, grads, wanted):
                assert (got - want).abs().max() < 1e-4 * (1 + want.abs().max()), name

        for checkpointing in (False, True):
            check(model.token_logprobs(params, config, tokens, temperature, checkpointing=checkpointing))
        for slice_tokens in (10, 57, None):
            hidden = model.hidden_states(params, config, tokens)[:, :-1].flatten(0, 1)
            logprobs, entropy = model.head_logprobs(params, config, hidden, tokens[:, 1:].flatten(), temperature,
                                                    slice_tokens=slice_tokens)
            check(logprobs.view(3, 19))
            assert not entropy.requires_grad
            assert (entropy - distribution.entropy().flatten()).abs().max() < 1e-5
            with torch.inference_mode():
                again, _ = model.head_logprobs(params, config, hidden, tokens[:, 1:].flatten(), temperature,
                                               slice_tokens=slice_tokens)
            assert torch.allclose(again, logprobs, atol=1e-6)
    assert model.token_logprobs(params, config, tokens[:, :1]).shape == (3, 0)


def test_model_checkpointing_keeps_less():
    params, config = _formula_model()
    params = {k: v.requires_grad_() for k, v in params.items()}
    kept = {}
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.hidden_states(params, config, _FORMULA_TOKENS, checkpointing=checkpointing)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 10, kept


def test_model_gradients_by_hand_equal_autograd():
    """The two backward passes written out, of the norm and of the rotation, against autograd through the formula."""
    def norm(x, weight):
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))

    def turned(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(8, generator=generator)
    cos, sin = model.rope_table(_formula_model()[1]._replace(hidden_size=32), torch.arange(5)[None], torch.float32)
    for ours, plain, inputs, num in ((lambda x, w: model.rms_norm(x, w, 1e-3), norm, (x, weight), 2),
                                     (model.rotate, turned, (x, cos, sin), 1)):
        results = []
        for fn in (ours, plain):
            leaves = [t.clone().requires_grad_(i < num) for i, t in enumerate(inputs)]
            out = fn(*leaves)
            (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves[:num])])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_model_entropy_gradient():
    """Alone and beside that of the log-probabilities, to the hidden states and to the head."""
    params, config = _formula_model()
    head = params["model.embed_tokens.weight"].requires_grad_()
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    targets, share = torch.arange(9), torch.linspace(-1, 1, 9)
    direct = torch.distributions.Categorical(logits=model.lm_head(params, config, hidden) / 0.8)
    for weight in (0, share):
        wanted = torch.autograd.grad(direct.entropy().sum() + (weight * direct.log_prob(targets)).sum(), (hidden, head),
                                     retain_graph=True)
        for slice_tokens in (4, 9):
            logprobs, entropy = model.head_logprobs(params, config, hidden, targets, 0.8, slice_tokens, entropy_grad=True)
            got = torch.autograd.grad(entropy.sum() + (weight * logprobs).sum(), (hidden, head))
            assert (entropy - direct.entropy()).abs().max() < 1e-5
            assert all((g - w).abs().max() < 1e-5 * (1 + w.abs().max()) for g, w in zip(got, wanted))


class _TensorSizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest number of elements of any tensor that is made."""
    largest = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_model_head_never_holds_all_logits():
    """512 positions of 3,000 words in slices of 32: no tensor beyond a slice, forward or backward, and none is kept."""
    config = model.Config(3000, 16, 16, 1, 1, 1)
    params = {"model.embed_tokens.weight": torch.randn(3000, 16).requires_grad_()}
    hidden, targets, kept = torch.randn(512, 16).requires_grad_(), torch.arange(512), []
    with _TensorSizes() as sizes:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            logprobs, entropy = model.head_logprobs(params, config, hidden, targets, 0.9, slice_tokens=32)
        logprobs.sum().backward()
    assert sizes.largest == 32 * 3000 and hidden.grad is not None
    assert sum(kept) < 32 * 3000, sum(kept)
    with _TensorSizes() as sizes:  # the tracker does see the whole, when it is made
        model.head_logprobs(params, config, hidden, targets, 0.9, slice_tokens=512)[0].sum().backward()
    assert sizes.largest == 512 * 3000
    for device, words, expected in (("cpu", 65536, 128), ("meta", 151936, 883)):  # the default goes by the vocabulary
        few = {"model.embed_tokens.weight": torch.empty(words, 1, device=device)}
        with mock.patch.object(model, "slices", wraps=model.slices) as slices:
            model.head_logprobs(few, config._replace(vocab_size=words), torch.empty(130, 1, device=device),
                                torch.zeros(130, dtype=torch.int64, device=device))
        assert slices.call_args.args == (160, expected)


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
    params, config = _formula_model()
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


def test_model_lora():
    """The adapter starts as nothing, is all that learns, and merged is what it was laid over."""
    for dtype in (torch.float32, torch.bfloat16):
        params, config = _formula_model(tied=False)
        params = {k: v.to(dtype) for k, v in params.items()}
        lora = {k: v.requires_grad_() for k, v in model.init_lora(config, 4, seed=0).items()}
        assert len(lora) == 2 * 7 * 3 and all(v.dtype == torch.float32 for v in lora.values())
        assert all(lora[k].shape[0] == 4 for k in lora if "lora_A" in k)
        base = model.token_logprobs(params, config, _FORMULA_TOKENS)
        overlaid = model.token_logprobs(params | lora, config, _FORMULA_TOKENS)
        assert torch.equal(base, overlaid) and not base.requires_grad
        overlaid.sum().backward()
        assert all(v.grad.abs().max() > 0 for k, v in lora.items() if "lora_B" in k)
        assert all(v.grad.abs().max() == 0 for k, v in lora.items() if "lora_A" in k)  # since B is zero
        assert all(v.grad is None for v in params.values())
        with torch.no_grad():
            for name, tensor in lora.items():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        before = {k: v.clone() for k, v in params.items()}
        overlaid, bare = (model.forward(p, config, _FORMULA_TOKENS) for p in (params | lora, params))
        merged = model.merge_lora(params | lora)
        assert merged.keys() == params.keys() and all(torch.equal(params[k], before[k]) for k in params)
        assert merged["model.embed_tokens.weight"] is params["model.embed_tokens.weight"]
        gap = (model.forward(merged, config, _FORMULA_TOKENS) - overlaid).abs()
        assert gap.max() < 1e-4 if dtype == torch.float32 else gap.mean() < 0.05, gap.max()
        assert (overlaid - bare).abs().max() > 0.1
    a, b = model.init_lora(config, 4, seed=0), model.init_lora(config, 4, seed=1)
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(a[name], model.init_lora(config, 4, seed=0)[name]) and not torch.equal(a[name], b[name])
    _raises(ValueError, ["rank 0"], model.init_lora, config, 0, 0)


def test_model_init_params():
    config = model.Config(500, 64, 128, 8, 4, 2)
    params = model.init_params(config, seed=3)
    assert {k: tuple(v.shape) for k, v in params.items()} == model.param_shapes(config)
    assert all(torch.equal(v, model.init_params(config, seed=3)[k]) for k, v in params.items())
    assert abs(params["model.embed_tokens.weight"].std().item() - 0.02) < 5e-4
    assert abs(params["model.layers.5.mlp.down_proj.weight"].std().item() - 0.005) < 2e-4  # 0.02 / sqrt(2 * 8)
    assert params["model.norm.weight"].eq(1).all() and params["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    assert all(v.dtype == torch.bfloat16 for v in model.init_params(config, 3, dtype=torch.bfloat16).values())


def test_model_save_and_load_round_trip():
    """Bit for bit, config included; one flat buffer behind all tensors, as in training, is no obstacle."""
    with tempfile.TemporaryDirectory() as home:
        like, out = Path(home) / "like", Path(home) / "deep" / "out"
        like.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
            (like / name).write_text(json.dumps({"file": name}))
        for tied in (True, False):
            for yarn in (False, True):
                for dtype in (torch.float32, torch.bfloat16):
                    params, config = _formula_model(tied, yarn)
                    config = config._replace(eos_token_id=(3, 95) if yarn else (95,))
                    flat = torch.cat([v.flatten() for v in params.values()]).to(dtype).requires_grad_()
                    pieces = flat.split([v.numel() for v in params.values()])
                    params = {k: piece.view(v.shape) for (k, v), piece in zip(params.items(), pieces)}
                    model.save_model(out, params, config, like)
                    assert model.load_config(out) == config
                    loaded = model.load_params(out, dtype=dtype)
                    assert list(loaded) == list(params) and all(torch.equal(loaded[k], params[k]) for k in params)
                    wide = model.load_params(out)
                    assert all(torch.equal(wide[k], params[k].float()) for k in params)
        raw = json.loads((out / "config.json").read_text())
        assert raw["model_type"] == "qwen2" and raw["torch_dtype"] == "bfloat16" and raw["eos_token_id"] == [3, 95]
        assert len({path.stat().st_mode for path in out.iterdir()}) == 1             # whoever may read one may read all
        assert raw["rope_scaling"]["rope_type"] == raw["rope_scaling"]["type"] == "yarn"  # new and old readers
        assert sorted(p.name for p in out.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors",
                                                         "tokenizer.json", "tokenizer_config.json"]
        assert (out / "tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()
        assert [p.name for p in out.parent.iterdir()] == ["out"]  # nothing left of the writing
        loaded["model.norm.weight"].zero_()  # a view of the file's private mapping
        assert model.load_params(out)["model.norm.weight"].abs().min() > 0
        model.save_model(out, loaded, config, like=out)  # over the very files that are mapped, tokenizer from itself
        assert model.load_params(out)["model.norm.weight"].abs().max() == 0 and (out / "tokenizer.json").is_file()
        lora = model.init_lora(config, 2, seed=0)
        lora = {k: v + 0.01 for k, v in lora.items()}
        model.save_model(out, params | lora, config, like)
        merged = model.merge_lora(params | lora)
        assert all(torch.equal(v, merged[k]) for k, v in model.load_params(out, dtype=torch.bfloat16).items())


def test_model_save_never_loses_the_old_one():
    """A save that dies at any rename leaves a whole model behind, the old or the new; the next save cleans up."""
    params, config = _formula_model()
    newer = {k: v + 1 for k, v in params.items()}
    replace = model.os.replace
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "out"
        for dies_at in (1, 2):
            model.save_model(out, params, config, home)
            calls = []

            def dying(a, b):
                calls.append(b)
                if len(calls) == dies_at:
                    raise KeyboardInterrupt
                replace(a, b)

            with mock.patch.object(model.os, "replace", dying):
                try:
                    model.save_model(out, newer, config, home)
                except KeyboardInterrupt:
                    pass
            whole = next(p for p in (out, out.with_name("out.replaced")) if p.is_dir())
            assert torch.equal(model.load_params(whole)["model.norm.weight"], params["model.norm.weight"]), dies_at
            model.save_model(out, newer, config, home)
            assert [p.name for p in Path(home).iterdir()] == ["out"]
            assert torch.equal(model.load_params(out)["model.norm.weight"], newer["model.norm.weight"])
        thesis = Path(home) / "thesis"
        thesis.mkdir()
        (thesis / "chapter1").write_text("years of work")
        _raises(ValueError, ["thesis", "not a model directory"], model.save_model, thesis, params, config, home)
        assert (thesis / "chapter1").is_file()


def _write_model(path, params, config, shards=1):
    """A model directory, in `shards` files with an index when there is more than one."""
    model.save_model(path, params, config, like=path)
    if shards > 1:
        (path / "model.safetensors").unlink()
        names = list(params)
        weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            model.save_file({n: params[n].contiguous() for n in names if weight_map[n] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_model_sharded_checkpoint():
    params, config = _formula_model(tied=False)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "m"
        _write_model(path, params, config, shards=4)
        loaded = model.load_params(path)
        assert list(loaded) == list(params) and all(torch.equal(loaded[k], params[k]) for k in params)
        (path / "model-00003-of-00004.safetensors").unlink()
        _raises(FileNotFoundError, ["model-00003-of-00004.safetensors", "no such file"], model.load_params, path)
        index = path / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("00003-of", "00002-of"))  # names a shard that lacks them
        lost = [f"missing {name} " for i, name in enumerate(params) if i % 4 == 2]
        _raises(ValueError, lost, model.load_params, path)
        for text, words in (("{}", ["weight_map"]), ("[1]", ["expected a JSON object"]), ("{", ["not JSON"])):
            index.write_text(text)
            _raises(ValueError, ["model.safetensors.index.json", *words], model.load_params, path)


def test_model_load_names_every_wrong_tensor():
    params, config = _formula_model()
    norm, gate = "model.norm.weight", "model.layers.2.mlp.gate_proj.weight"
    bias = "model.layers.1.self_attn.k_proj.bias"
    with tempfile.TemporaryDirectory() as home:
        path = Path(home)
        _write_model(path / "m", params, config)
        file = path / "m" / "model.safetensors"

        def stored(tensors):
            file.unlink(missing_ok=True)  # the mapping of an earlier load goes on to hold the old file
            model.save_file({k: v.contiguous() for k, v in tensors.items()}, file)
            return path / "m"

        wrong = {k: v for k, v in params.items() if k not in (norm, gate)} | {
            bias: torch.zeros(31), "model.layers.3.input_layernorm.weight": torch.ones(64),
            "vision.weight": torch.ones(2)}
        _raises(ValueError, [f"missing {norm} [64]", f"missing {gate} [80, 64]", f"{bias} is F32 [31], expected [32]",
                             "extra model.layers.3.input_layernorm.weight [64]", "extra vision.weight [2]"],
                model.load_params, stored(wrong))
        _raises(ValueError, [f"{gate} is I8 [80, 64]", "F32, BF16 or F16"],
                model.load_params, stored(params | {gate: params[gate].char()}))  # quantised: would load as garbage
        # a tied head stored all the same, and the rotary table of an old export
        same = params | {"lm_head.weight": params["model.embed_tokens.weight"].clone(),
                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        assert model.load_params(stored(same)).keys() == params.keys()
        _raises(ValueError, ["lm_head.weight", "tie_word_embeddings"],
                model.load_params, stored(same | {"lm_head.weight": params["model.embed_tokens.weight"] + 1}))
        whole = (stored(params) / "model.safetensors").read_bytes()
        for part in (whole[:-1], whole[:2000], whole[:5], b"", b"not a checkpoint", b"\xff" * 64):
            file.unlink()
            file.write_bytes(part)
            _raises(ValueError, ["model.safetensors", "cannot be read"], model.load_params, path / "m")
        file.unlink()
        _raises(FileNotFoundError, ["model.safetensors", "no such file"], model.load_params, path / "m")
        _write_model(path / "m", *_formula_model(tied=False))
        stored(params)
        _raises(ValueError, ["missing lm_head.weight [96, 64]"], model.load_params, path / "m")


_QWEN_CONFIG = {  # as published for Qwen2.5-0.5B-Instruct
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936}


def _config_of(changes, generation=None):
    """load_config of the published file with `changes`; a change to None takes the field out."""
    with tempfile.TemporaryDirectory() as home:
        raw = {k: v for k, v in (_QWEN_CONFIG | changes).items() if v is not None}
        (Path(home) / "config.json").write_text(json.dumps(raw))
        if generation is not None:
            (Path(home) / "generation_config.json").write_text(json.dumps(generation))
        return model.load_config(home)


def test_model_config_of_published_files():
    config = _config_of({}, {"eos_token_id": [151645, 151643]})
    assert config == model.Config(151936, 896, 4864, 24, 14, 2, eos_token_id=(151643, 151645)) and config.head_dim == 64
    assert _config_of({}).eos_token_id == (151645,) and _config_of({"eos_token_id": None}).eos_token_id == ()
    # what a file leaves out is read as transformers reads it
    bare = _config_of({"tie_word_embeddings": None, "rope_theta": None})
    assert bare.tie_word_embeddings is False and bare.rope_theta == 10000.0
    assert _config_of({"head_dim": 64}) == _config_of({})
    documented = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    yarn = _config_of({"rope_scaling": documented})
    assert yarn.max_context == 131072 and yarn.rope_scaling[:2] == (4.0, 32768) and yarn.rope_scaling[3:] == (32.0, 1.0)
    # transformers 5: one dict, which goes before the field of old
    new = {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0}
    moved = _config_of({"rope_parameters": new})
    assert moved.rope_theta == 5000.0 and moved.rope_scaling == yarn.rope_scaling
    plain = _config_of({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    assert plain == _config_of({})


def test_model_config_refuses_what_it_cannot_compute():
    for changes, *words in (
            ({"model_type": "llama"}, "model_type", "'llama'", "'qwen2'"),
            ({"use_sliding_window": True}, "use_sliding_window", "True", "False"),
            ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
            ({"quantization_config": {"bits": 4}}, "quantization_config", "bits"),
            ({"hidden_size": None, "vocab_size": None}, "missing", "hidden_size", "vocab_size"),
            ({"num_hidden_layers": "24"}, "num_hidden_layers", "'24'", "positive integer"),
            ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
            ({"vocab_size": 1.5}, "vocab_size", "1.5"),
            ({"vocab_size": True}, "vocab_size", "True"),
            ({"max_position_embeddings": -1}, "max_position_embeddings", "-1"),
            ({"rms_norm_eps": "1e-6"}, "rms_norm_eps", "'1e-6'", "positive number"),
            ({"rms_norm_eps": math.nan}, "rms_norm_eps", "nan"),
            ({"rope_theta": math.inf}, "rope_theta", "inf"),
            ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "'no'"),
            ({"hidden_size": 900}, "hidden_size 900", "14 heads"),
            ({"hidden_size": 14 * 63}, "even head_dim", "63"),
            ({"head_dim": 128}, "head_dim is 128"),
            ({"num_key_value_heads": 4}, "14 heads", "4 key/value heads"),
            ({"eos_token_id": "<|im_end|>"}, "eos_token_id", "<|im_end|>"),
            ({"eos_token_id": [1, [2]]}, "eos_token_id", "[2]"),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'", "'yarn'"),
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
            ({"rope_scaling": ["yarn"]}, "rope_scaling", "object"),
            ({"rope_scaling": {"type": "yarn"}}, "factor", "None"),
            ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor", "0.5"),
            ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor", "'4'"),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -1}}, "beta_fast", "-1"),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale", "expected only")):
        _raises(ValueError, ["config.json", *words], _config_of, changes)
    _raises(ValueError, ["generation_config.json", "JSON object"], _config_of, {}, generation=[])
    with tempfile.TemporaryDirectory() as home:
        _raises(FileNotFoundError, ["config.json", "No such file"], model.load_config, home)
        for text in ("", "{'a': 1}", '{"vocab_size": 1', "\xff\xfe", "[" * 100000):
            (Path(home) / "config.json").write_text(text, encoding="latin-1")
            _raises(ValueError, ["config.json", "not JSON"], model.load_config, home)


def test_model_names_and_the_hub():
    """Names become hub ids; without a hub, the message says which files to put where, and there they are found."""
    assert len(model.HUB_IDS) == 14 and model.HUB_IDS["qwen2.5-math-1.5b-instruct"] == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    assert model.HUB_IDS["qwen2.5-14b"] == "Qwen/Qwen2.5-14B"
    asked = []

    def offline(hub_id, **_):
        asked.append(hub_id)
        raise OSError("Cannot reach the hub\nand a long story")

    with tempfile.TemporaryDirectory() as home, mock.patch("huggingface_hub.snapshot_download", offline), \
            mock.patch.object(model, "ROOT", Path(home)):
        place = Path(home) / "models" / "qwen2.5-1.5b"
        for name in ("qwen2.5-1.5b", "Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"):
            _raises(FileNotFoundError, ["Qwen/Qwen2.5-1.5B", "Cannot reach the hub", "config.json", str(place)],
                    model.resolve_model, name)
        assert asked == ["Qwen/Qwen2.5-1.5B"] * 3
        for name in ("gpt2", "qwen2.5-2b", "/no/such/place", "../nowhere", "a/b/c", "x y/z"):
            _raises(FileNotFoundError, [repr(name), "qwen2.5-0.5b-instruct"], model.resolve_model, name)
        assert len(asked) == 3  # such names are not looked for
        place.mkdir(parents=True)
        assert model.resolve_model("qwen2.5-1.5b") == place
        for name in (f"{home}/gone/qwen2.5-1.5b", "models/x/", "models/.."):  # a path that is gone is not another model
            _raises(FileNotFoundError, [repr(name)], model.resolve_model, name)
        assert model.resolve_model(home) == Path(home)
    with mock.patch("huggingface_hub.snapshot_download", lambda hub_id, **_: f"/cache/{hub_id}"):
        assert model.resolve_model("qwen2.5-0.5b-instruct") == Path("/cache/Qwen/Qwen2.5-0.5B-Instruct")
    assert model.resolve_model("tiny") == model.ROOT / "data" / "tiny"


def test_model_chat_template():
    """ChatML as the published templates render it (the strings are transformers' apply_chat_template's)."""
    ask = [{"role": "user", "content": "Hi"}]
    assert model.render_chat(ask) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    talk = [{"role": "system", "content": "Be brief."}, *ask, {"role": "assistant", "content": " yes\n"}]
    assert model.render_chat(talk, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n yes\n<|im_end|>\n")
    assert model.render_chat(ask, system=None) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.render_chat([{"role": "system", "content": ""}], False) == "<|im_start|>system\n<|im_end|>\n"


_QWEN_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- '@' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\n@<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}"""


def test_model_system_prompt_of_a_template():
    """Found by rendering. A search of the template's source missed most ways of writing it: the newline as an escape or
    as itself, the prompt in the same literal or its own, the template in tokenizer_config.json or in its own file."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home)
        assert model.load_system_prompt(path) is None  # no file at all
        for prompt in model.SYSTEM_PROMPTS.values():
            source = _QWEN_TEMPLATE.replace("@", prompt.replace("\\", "\\\\"))
            for newline in (r"system\n", "system\n", r"system\n' + '"):
                template = source.replace(r"system\n", newline)
                (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
                assert model.load_system_prompt(path) == prompt
        for template, found in ((None, None), ([], None), ("{{ messages[0].content }}", None),
                                ("{% if 1 %}\n  {% if 1 %}\n<|im_start|>system\nA\nB<|im_end|>{% endif %}{% endif %}",
                                 "A\nB"),
                                ("{% for %}", ValueError),
                                ("{{ raise_exception('no') }}", ValueError),
                                ("{{ ''.__class__.__mro__[1]() }}", ValueError)):
            (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
            if found is ValueError:
                _raises(ValueError, ["tokenizer_config.json", "does not render"], model.load_system_prompt, path)
            else:
                assert model.load_system_prompt(path) == found, template
        (path / "chat_template.jinja").write_text(_QWEN_TEMPLATE.replace("@", "Think."))
        assert model.load_system_prompt(path) == "Think."


def test_model_tokenizer_errors():
    with tempfile.TemporaryDirectory() as home:
        _raises(FileNotFoundError, ["tokenizer.json", "no such file"], model.load_tokenizer, home)
        for text in ("", "{}", '{"model": 1}'):
            (Path(home) / "tokenizer.json").write_text(text)
            _raises(ValueError, ["tokenizer.json", "not a tokenizer"], model.load_tokenizer, home)


# ------------------------------------------------------------------------------------------------ verify.py

import doctest
import random
import re
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor

import verify as verifier

_EQUAL = r"""
14{,}916 = 14916 || 5,\!636 = 5636 || 5\,636 = 5{,}636 || 1,234,567 = 1234567 || 11,\! 111,\! 100 = 11111100
1\frac45 = 9/5 || 1\frac45 = 1.8 || 2 1/3 = \frac73 || -1\frac{1}{2} = -1.5 || 8\text{ }\frac47 = \frac{60}{7}
2½ = 2.5
\frac12 = .5 || \frac 59 = \frac{10}{18} || \tfrac{3}4 = 0.75 || (3)/(4) = \left(\frac{3}{4}\right)
-\frac{9}{15} = \frac{-3}5
1.5\times10^3 = 1500 || 6.02e23 = 6.02 \cdot 10^{23} || 1e-6 = 10^{-6} || 3.2x10^5 = 320000
10.50 \times 10^{6} = 1.05e7
0.\overline{6} = 2/3 || 0.1\overline{6} = 1/6 || 0.333... = 1/3 || 2.\overline{3} = \frac73
3.33333333333 = \frac{10}{3}
\$18.90 = 18.9 || \$-8,192 = -8192 || €5 = 5 || 15\mbox{ cm}^2 = 15 || 5\mathrm{~cm}^2 = 5 || 12 cm² = 12
5\text{ m/s} = 5
17 \text{ any text} = 17 || -80\ \mathrm{square\ units} = -80 || 5 \text{ million} = 5000000
3\frac12\text{ hours} = 3.5
28\% = 28 || 28\% = 0.28 || \frac{1}{2}\% = 0.005 || 198 \% = 198 || 50\text{ percent} = 50
90^\circ = 90 || 54° = 54^{\circ} || \angle ABC = 69^\circ := 69\text{ degrees} || \cos 60^\circ = \frac12
\sin(90^\circ-x) = \cos x
\text{(C)} = c || \textbf{(C)} = C || (C) = \mathrm{C} || \text{(A)}\ 12 = A || (A) 12 = 12 || \text{Monday.} = monday
\text{does not exist} = \text{DNE} || \text{an ellipse} = ellipse || \text{five} = 5 || \text{No solution} = \emptyset
\{\} = \varnothing
52_8 = 52_{8} || 52_{\text{eight}} = 52_8 || 2^{100} = 1267650600228229401496703205376 || 6 \cdot 6^{999} = 6^{1000}
\binom{30}{11} = \binom{30}{19} || {10 \choose 3} = 120 || 13 \cdot 12! = 13! || n! = n (n-1)!
\frac{1}{2024!} = 1/2024!
2^{300000} = 4^{150000} || \frac{9^{9^9}}{9^{9^9}} = 1 || \binom{n}{2} = \frac{n(n-1)}{2} || \gcd(12,18) = 6
8\sqrt2 = \sqrt{128} || 5√7 = \sqrt[2]{175} || \sqrt[3]{-8} = -2 || \sqrt{3+2\sqrt2} = 1+\sqrt2
8 \cdot 2^{1/2} = 8\sqrt 2 || sqrt(3)/2 = \frac{\sqrt3}{2}
\frac{\pi}{4} = 0.7853981634 || 3π = 3\pi || 256*pi = 256 \pi || 18+2pi = 2(9+\pi) || e^{i\pi} = -1
\log_2 3 = \frac{\ln 3}{\ln 2} || \log 100 = 2 || \ln 8 = 3 \ln 2 || \log(xy) = \log x + \log y
\sin^{-1} x = \arcsin x || \tan^2 y + 1 = \sec^2 y
i = 0+1i || 27i - 11 = -11 + 27 \cdot i || 4+6\mathrm{i} = 6i+4 || 8 - 2*I = 8-2i || |3-4i| = 5 || z = 8 - 1i := 8-i
x**2 = x² || \frac{1}{y}+y = \frac{y^2+1}{y} || 36x\sqrt{35x} = 36\sqrt{35}x^{\frac32} || |x-3| = |3-x|
\frac{1}{\sqrt{n}} = 1/sqrt(n)
(x+1)/(x-1) = \frac{x+1}{x-1} || \sqrt{x^2} = |x| || x^{2/3} = \sqrt[3]{x^2} || \sin 3x = sin(3*x)
\lfloor x+1\rfloor = 1+\lfloor x\rfloor
(x,y) = (1,2) := (1,2) || x=1, y=2 := (1,2) || \bigl(-3 ,\, 2\bigr) = (-3,2) || \langle 1,2\rangle = (1,2)
(1,2,3) = \begin{pmatrix}1\\2\\3\end{pmatrix}
3, 5, 7 = \{7,3,5\} || 3 \text{ and } 4 = 4,3 || x=24, x=-3 := -3, 24 || 0; 1; 2 = 2,1,0
(1,2),(3,4) = (3,4) \text{ and } (1,2) || 100,101,102 = 100, 101, 102
1\pm\sqrt5 = 1-\sqrt5, 1+\sqrt5 || x = \pm 3 := 3 \text{ or } -3 || \{1\pm\sqrt5,-2\} = -2, 1\pm\sqrt{5}
-4 ± 2i = -4+2i,-4-2i
(2,12)\cup(12,102) = (12,102) \cup (2, 12) || [1,2]\cup[2,3] = [1,3] || -2\le x<3 = [-2,3)
\{x|-2\leq x < 1\} = [-2,1) || x \in [46, +\infty) = x \ge 46
x \ne 0 = (-\infty,0)\cup(0,\infty) || \mathbb{R}\setminus\{0\} = x \neq 0 || ℝ = (-∞, ∞) || |x|<3 = (-3,3)
-x >= -1 = x <= 1
x \le -2 \text{ or } x \ge 5 = (-\infty,-2]\cup[5,\infty) || k \ge -36 \text{ and } k \le 104 = -36 \le k \le 104
a \geqslant 1.5 = a \ge \frac32 || x+y>2 = 2 < x+y
\begin{bmatrix}1 & 2\\ 3 & 4\\ \end{bmatrix} = \left[\begin{array}{cc}1&2\\3&4\end{array}\right]
[[1,2],[3,4]] = A = \begin{pmatrix}1&2\\3&4\end{pmatrix}
\frac13\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}1/3\\2/3\end{pmatrix}
x=5 := 5 || 5=x := 5 || k=1+1=2 := 2 || x=1/3\approx0.33 := 1/3 || f(x)=2x+3 := y = 2x+3 || y=2x+3 := 2x-y+3=0
x^2/16+y^2/12=1/4 := \frac{x^2}{4}+\frac{y^2}3=1
f^{-1}(x) = \frac{x-1}{2} := \frac{x-1}2 || \frac{dy}{dx} = 2x := 2x || |AB| = 1 := 1 || S_{MBCN}:S=7:32 := 7:32
\sum_{k=1}^3 k = 6 := 6 || 3:4 = 6:8
{3 \over 7} = \sfrac{3}{7} || .\overline{3} = \frac13 || 0.1\overline{6} = \nicefrac{1}{6} || 0.(3) = 1/3
\frac{3}{7} = 0.428\ldots := 3/7
1'000 = 1{,}\!000 || \text{forty-two} = 42 || \text{negative seven} = {-}7 || \text{two hundred five thousand} = 205000
12 1/2 \% = 12.5 || 2{\frac{3}{4}} = 2.75 || 45 per cent = 0.45 || 3.2 X 10^{5} = 320000
\frac12 \text{ or } 50\% = 0.5
US\$15 = 15 || {\$}15 = \text{\$}15 || \text{USD }15 = 15 || 60 \frac{\text{km}}{\text{h}} = 60 km/h
12\ {\rm cm}^2 = 12
60\,\mathrm{km\,h^{-1}} = 60 || 144 (\text{ways}) = 144 || 80\;\mathrm m = 80
72{}^\circ = 72^{\mathrm{o}} || 72º = 72 || \measuredangle ABC = 72^\circ := 72 || \sin \pi/6 = \frac12
(1011)_2 = 1011_{(2)} || 2A5_{16} = \text{2A5}_{16} || 1011_{\text{base }2} = 1011_2 || \text{BEEF}_{16} = BEEF_{16}
\root 3 \of {4} = ∛4 || 12𝜋 = 12\pi || \sqrt{-9} = 3i || \operatorname{cis} 60^\circ = e^{i\pi/3} || -\sqrt{-4} = -2i
P(3,-1) = (3,-1) || \{x=3, y=-1\} := (3,-1) || x = 3 \quad y = -1 := (3,-1) || (1,2) \quad (3,4) = (3,4),(1,2)
\left\{\begin{array}{l}x=3\\y=-1\end{array}\right. := (3,-1) || 2, 5, \& 7 = 5,7,2 || \text{A and C} = C, A
[2,5[ = [2,5) || ]-\infty,3] = x \le 3 || 2 \le f(x) < 5 = [2,5)
(-\infty,1)\text{ or }(4,\infty) = x<1 \text{ or } x>4
\R - \{2\} = x \not= 2 || \text{All real numbers except } 2 = x \ne 2 || \mathbb{R}^+ = x > 0
[1,2]\cup\{3\} = 1 \le x \le 2 \text{ or } x=3
\{1,2\} \cap \{2,3\} = \{2\} || \text{There is no solution} = \emptyset || \text{the set of all integers} = \mathbf{Z}
\binom{n}{k} = \frac{n!}{k!(n-k)!} || {}_{12}C_5 = 792 || C(12,5) = C_{12}^{7}
\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix} = \pmatrix{1&2\cr3&4} || \begin{pmatrix}5&-2\end{pmatrix}^T = (5,-2)
\binom{5}{-2} = \begin{pmatrix}5\\-2\end{pmatrix}
3 \text{ to } 4 = 3{:}4 || 7 p.m. = 7\text{ PM} || \triangle ABC = ABC || │x│ = |x| || \textbf{(B) }12 = (B) 12
\text{Answer: B} = B)
f{\left(x\right)} = x+1 := x+1 || f \colon x \mapsto x+1 = x+1 || \Large 42 = 42\ || 42 \checkmark = 42
n \equiv 1 (\bmod 3) := n \equiv 1 \pmod 3 || x = k\pi \; (k \in \mathbb{Z}) := k\pi || 1, 2, \ldots, n = 1,2,...,n
10^{\text{th}} = 10th
\text{II and III} = III, II || \frac{\partial f}{\partial x} = 2xy := 2xy || |z|^2 = z\bar{z} || \overline{AB} = AB
"""
_DIFFERENT = r"""
(2,1) = (1,2) || [0,1) = [0,1] || (1,2) = 1,2 || \{1,2\} = (1,2) || (1,2) = [1,2] || (1,2,0) = (1,2)
3 \text{ or } 4 = 3 || 3,4,17 = 3,4 || 1,1,2 = 1,2,2
0.33 = 1/3 || 0.333 = \frac13 || 3.14 = \pi || 7.78 = \frac{70}{9} || 30.01 = 30 || 2.9999999999 = 3
99999999999.5 = 100000000000 || 1.41421357 = \sqrt2
52_8 = 52_7 || 52_8 = 52 || 52_8 = 42 || 28\% = 2.8 || 28\% = 2800\% || 0.28 = 28 || \$5 = 50 || 10\text{ units} = 100
1,2345 = 12345 || (2, 598) = 2598
2^{100} = 2^{100}+1 || 6^{1000} = 6^{1001} || 2^{300000} = 2^{300000}+1 || \frac{1}{2024!} = \frac{1}{2025!}
1e-20 = 2e-20 || e^{-200} = e^{-201} || 10^{-20} = 0
\sqrt{10^{40}+1} = 10^{20} || 1234567890123456789 = 1234567890123456788 || 123456789x = 123456788x || 5! = 60
\binom{30}{11} = \binom{30}{12}
8\sqrt2 = 2\sqrt8 || 10\sqrt2 = 10+\sqrt2 || \sqrt{x^2} = x || \sin x = \cos x || \log_2 3 = \log_3 2
\sin x^2 = \sin^2 x || f(x) = f(y) || x = y || 2x = x
1+2i = 1-2i || 5i = 5 || 1\frac45 = \frac{14}5 || 8\frac47 = \frac{84}7 || \frac{72}{425} = 72425 || 41230x = 41230
-3^2 = 9 || (4^2)^3 = 4^{2^3}
\infty = -\infty || \emptyset = 0 || \mathbb{R} = \mathbb{Z} || \mathbb{R} = (0,\infty) || \text{DNE} = 0
\text{none of the above} = \emptyset || \text{infinitely many} = \infty
x>3 = x\ge 3 || x>3 = x<3 || x>3 = 3 || x \ne 5 = 5 || (-\infty,3) = (-\infty,3]
-36 < k \le 104 = -36 \le k \le 104 || k \le 104 = -36 \le k \le 104 || [x,y) = [1,2) || k>5 = x>5
(1,2)\cap(3,4) = (1,2)\cup(3,4) || (1,2)\cup(3,4) = (1,4) || x^2+y^2<4 = x^2+y^2\le4 || \{x|-2\leq x < 1\} = (-2,1)
(2,-1] = (2,-1) || (1,1] = (1,1) || [5, \infty] = [5,\infty) || 2.33333333334 = \frac73 || 1\pm\sqrt5 = 1+\sqrt5
y^2=12x := 12x || 4x-5y=-50 := -50 || x+y=5 := 5 || x=5 := y=5 || y=2x+3 := y=3x+2
2x - 3y + 7 = 0 := 2x - 3y + 8 = 0 || \cos x=\frac12 := \sin x=\frac12 || x = x := x || 0 = 0 := 1
\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} = \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} = \begin{pmatrix}1&3\\2&4\end{pmatrix}
\text{not Monday} = \text{Monday} || \text{June 20} = \text{July 20} || 3 hours 20 minutes = 20 hours 3 minutes
\text{5 or more} = 5 || \text{at least 5} = 5 || odd = oddd || (A) 12 = B
\int_0^1 x dx = \frac12 || \sum_{k=1}^{10} k = 55 || 2+2=5 := 5 || ANSWER = 5 || ? = 5 || , = 3, 4 || () = (1,2)
\ldots = 5 || - = 5 || 3 \pmod 7 = 4 \pmod 7 || 7:32 = 32:7
7 p.m. = 7 a.m. || 7:30\text{ PM} = \text{7:30 AM} || 10,00 = 10,000 || 10,0000 = 10,000 || 5,40 = 5,040
\{\emptyset\} = \emptyset
3:4:5 = 3:4 || (B) or (C) = B || (E), 97 = E || \text{(C)}+1 = C || \sin\pi/6 = 0 || (x+y)/x y = \frac{x+y}{xy}
3 \le x \text{ or } 97 = x \ge 3 || x \in (1,2) = y \in (1,2) || \frac{1}{2004!} = \frac{i}{2004!} || 2=3 := 4=6
[2,5[ = [2,5]
\frac{712}{425} \approx 0.169 := \frac{72}{425} \approx 0.169 || \begin{pmatrix}5\\-2\end{pmatrix} = \binom{5}{2}
\binom{12}{5} = (12,5)
\text{forty-two} = 24 || \text{five or six} = 5 || (1011)_2 = (1011)_3 || 2A5_{16} = 2A6_{16} || 5m := 5x
60 \text{ to } 70 = 60
\mathbb{R} - \{2\} = \mathbb{R} - \{3\} || \{1,2\} \cap \{2,3\} = \{1,2,3\}
\begin{pmatrix}5&-2\end{pmatrix}^T = \begin{pmatrix}5&-2\end{pmatrix}
\pm1\pm1\pm1\pm1\pm1 = 5 || n \equiv 1 \pmod 4 := n \equiv 1 \pmod 3 || \overline{z} = z || 1,2,\ldots,8 = 1,2,\ldots,9
"""


def _pairs(table):
    """The (a, b) of a table whose cells read `a = b`, or `a := b` where an equals sign belongs to an answer."""
    cells = [cell.strip() for line in table.strip().splitlines() for cell in line.split("||")]
    return [cell.split(" := " if " := " in cell else " = ", 1) for cell in cells]


def test_verify_tables():
    """Both directions of every pair; a shared canonical key means equivalence."""
    for table, expected in ((_EQUAL, True), (_DIFFERENT, False)):
        for a, b in _pairs(table):
            for answer, reference in ((a, b), (b, a)):
                verdict = verifier.judge(answer, reference)
                assert verdict[0] is expected, (answer, reference, verdict)
            assert expected or verifier.canonical(a) != verifier.canonical(b), (a, b)
            assert verifier.read(a) == ("raw", "") or verifier.equivalent(a, f" {a} "), a


def test_verify_examples_in_docstrings():
    assert doctest.testmod(verifier).failed == 0


def test_verify_extraction():
    """The last box wins, joined boxes are one answer, what follows the thinking block outranks what is in it."""
    for text, reference, expected in [
        (r"We get \boxed{1}. Wait: \boxed{2}.", "2", True),
        (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "1,-2", True),
        (r"\boxed{3} or \boxed{4}", "3", False), (r"$\boxed{15\frac12},$ or $\boxed{\frac{31}2}$", "15.5", True),
        ("\\boxed{3}\n\n\\boxed{4}", "4", True), (r"\boxed {\frac{1}{2}}", "0.5", True),
        (r"\fbox{\{1,2\}}", "2,1", True),
        (r"\boxed{$75$}", "75", True), (r"\boxed{\text{The answer is } 5}", "5", True), (r"$\boxed{5", "5", True),
        (r"\boxed{50} percent", "0.5", True), (r"$\boxed{57}$, after 18 trials, see page 117.", "57", True),
        (r"\boxed{}", "", False), (r"\beginboxed{8\sqrt{6}}", r"8\sqrt6", True), ("\x08oxed{12}", "12", True),
        (r"<think>\boxed{16}</think> It is $\boxed{17}$.", "16", False), (r"<think>maybe 4</think>7", "7", True),
        (r"<thought>\boxed{5}</thought>\boxed{6}", "6", True), ("<think>the answer is 5", "5", True),
        (r"\boxed{42}<|im_end|><|im_start|>user \boxed{6}", "42", True), ("First 451.\n#### 452", "451", False),
        ("<think>x</think><answer>$4a-2$</answer>", "4a-2", True), ("**Answer**: $549$", "549", True),
        ("**Final Answer:** **161**", "161", True), ("## Final Answer\n$$\\frac{1}{2}$$", "1/2", True),
        ("The answers are $3$ and $4$.", "4,3", True), ("The answer is 3 or 4.", "3", False), ("Answer: C", "C", True),
        ("Option F tempts, but the correct answer is (E).", "E", True),
        ("The answer is 42 because 6*7 = 42.", "42", True),
        ("Answer: 5!", "120", True), ("The answer is yes, because 3 > 2.", "yes", True), ("A: 160,000", "160000", True),
        ("The answer isn't 5. It's 6.", "6", True), ("Final Answer: The largest $n$ is 34.", "34", True),
        ("Then $m=3$, so she pays $18 a day.", "18", True), ("So, 5 + 4 = 9.", "9", True), ("x = -5", "-5", True),
        ("Note that $9$ is not the answer since it fails. The final answer is $8$.", "9", False),
        ("Okay, hmm, wait.", "5", False), ("", "5", False), ("The answer is not 11.", "11", False),
        ("答案是11。", "11", True),
        ("The answer is 25π square units.", r"25\pi", True), (r"The probability is \frac{3}{8}.", "3/8", True),
        ("The ratio is 3:4.", "3:4", True), (r"\boxed{(A) or (B)}", "A", False),
    ]:  # fmt: skip
        assert verifier.verify(text, reference) is expected, (text, verifier.extract_answer(text))


def test_verify_strict_extraction():
    """For rewards only a closed box after a closed block counts."""
    assert verifier.extract_answer("The answer is 5", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}", strict=True) is None
    assert verifier.extract_answer(r"<think>\boxed{5}</think> so 5", strict=True) is None
    assert verifier.extract_answer(r"\boxed{4} and \boxed{5", strict=True) is None
    assert verifier.extract_answer(r"a</think> \boxed{5}", strict=True) == "5"
    assert verifier.accuracy_reward(r"<think>a</think> \boxed{\frac{2}{4}}", "0.5") == 1.0
    assert verifier.accuracy_reward(r"The answer is 0.5", "0.5") == 0.0


def test_verify_format_reward():
    good = [r"<think>a</think> So \boxed{5}.", r"\boxed{5}", "<think>\na\n</think>\n\\[\\boxed{5}\\]", r"$\boxed{8}$."]
    bad = [
        r"<think></think>\boxed{5}", r"<think> </think>\boxed{5}", r"<think>a\boxed{5}", r"a</think>\boxed{5}", "5",
        r"x<think>a</think>\boxed{5}", r"<think>a</think><think>b</think>\boxed{5}", r"<think>a</think>\boxed{}", "",
        r"<think>\boxed{5}</think>", r"\boxed{5}\boxed{5}", r"\boxed{5} as I said", r"\boxed{5",
        r"<think>a</think></think>\boxed{5}",
    ]  # fmt: skip
    assert [verifier.format_reward(text) for text in good + bad] == [1.0] * len(good) + [0.0] * len(bad)
    assert verifier.format_reward(r"<thought>a</thought> \boxed{5}<|im_end|>", think_tag="thought") == 1.0


def _random_value(rng, depth):
    """(a LaTeX, a plain and a wordy spelling, the value by Python's own arithmetic) of a random expression."""
    if depth == 0 or rng.random() < 0.2:
        n = rng.randrange(1, 50)
        kind = rng.randrange(4)
        if kind == 0:
            return rf"\sqrt{{{n}}}", f"sqrt({n})", f"{n}^{{1/2}}", n**0.5
        if kind == 1:
            return r"\pi", "pi", "π", math.pi
        if kind == 2:
            return rf"\frac{{{n}}}{{8}}", f"{n}/8", rf"\tfrac{{{2 * n}}}{{16}}", n / 8
        return str(n), f"{n}.0", rf"\frac{{{n * 3}}}3", float(n)
    (la, pa, wa, a), (lb, pb, wb, b) = _random_value(rng, depth - 1), _random_value(rng, depth - 1)
    kind = rng.randrange(5)
    if kind == 0:
        return f"{la}+{lb}", f"({pb}) + ({pa})", rf"\left({wb}\right)+{wa}", a + b
    if kind == 1:
        return f"{la}-\\left({lb}\\right)", f"-(({pb}) - ({pa}))", rf"(-1 \cdot ({wb}) + ({wa}))", a - b
    if kind == 2:
        return rf"\left({la}\right)\left({lb}\right)", f"({pb})*({pa})", rf"({wa}) \times ({wb})", a * b
    if kind == 3:
        return rf"\frac{{{la}}}{{{lb}}}", f"({pa})/({pb})", rf"({wa})\left({wb}\right)^{{-1}}", a / b if b else math.nan
    return rf"\left({la}\right)^2", f"({pa})**2", rf"({wa})({wa})", a * a


def test_verify_random_expressions():
    """A random number in three spellings is one number, for Python's arithmetic as for ours; a perturbed one is not."""
    rng, checked = random.Random(0), 0
    while checked < 250:
        *spellings, value = _random_value(rng, rng.randrange(1, 4))
        if not 1e-6 < abs(value) < 1e9 or max(map(len, spellings)) > 400:
            continue
        checked += 1
        a, b = rng.sample(spellings, 2)
        assert verifier.equivalent(a, b), (a, b)
        assert abs(complex(verifier.to_sympy(verifier.read(a))) - value) < 1e-9 * abs(value), (a, value)
        for wrong in (f"{a}+1", f"-({a})", f"2({a})", f"{a}+10^{{-12}}", f"({a}, {b})", f"({a})x", rf"{a} \pm 1"):
            assert verifier.judge(wrong, b)[0] is False, (wrong, b)


def test_verify_unit_letters():
    """A last letter may be a unit of the answer; where the reference has it, it is a variable."""
    assert verifier.equivalent("80m", "80") and verifier.equivalent("t = 2 s", r"2\text{ seconds}")
    assert not verifier.equivalent("80", "80m") and not verifier.equivalent("80x", "80")


def test_verify_symmetry():
    """Neither side has a special role, but for a unit, and what equals one thing is equal to one another."""
    rng = random.Random(3)
    cells = [cell for pair in [*_pairs(_EQUAL), *_pairs(_DIFFERENT)] for cell in pair if "%" not in cell]
    for a, b in _pairs(_EQUAL):
        for c in (*rng.sample(cells, 4), rng.choice(cells) + "m"):
            verdicts = [verifier.judge(*pair)[0] for pair in ((a, c), (c, a), (b, c))]
            assert c[-1] == "m" or verdicts[0] == verdicts[1], (a, c)
            one_of_two = re.search(r"%|cent|\(A\)", a + b)  # 28 % is 28 and 0.28, (A) 12 is A and 12
            assert one_of_two or verdicts[0] == verdicts[2], (a, b, c)


def test_verify_random_structures():
    """Lists ignore order, tuples do not; an interval is its inequality; brackets and endpoints count."""
    rng = random.Random(1)
    for _ in range(100):
        values = rng.sample([f"{n}" for n in range(-9, 10)] + [r"\frac{1}{3}", r"\sqrt{2}", r"-\frac{\pi}{2}"], 3)
        other = values[:]
        while other == values:
            rng.shuffle(other)
        a, b, c, d = ", ".join(values), ", ".join(other), ",".join(values[:2]), ", ".join([*values, "17"])
        assert verifier.equivalent(a, b) and verifier.equivalent(rf"\{{{a}\}}", b.replace(", ", r" \text{ and } "))
        assert not verifier.equivalent(f"({a})", f"({b})") and verifier.equivalent(rf"\left({a} \right)", f"({a})")
        assert not verifier.equivalent(a, c) and not verifier.equivalent(a, d)
        assert not verifier.equivalent(f"({a})", f"({d})")
        low, high = sorted(rng.sample(range(-9, 10), 2))
        left, right = rng.choice("[("), rng.choice("])")
        less = {"[": r"\le", "(": "<", "]": r"\le", ")": "<"}
        interval, inequality = f"{left}{low},{high}{right}", f"{low} {less[left]} x {less[right]} {high}"
        assert verifier.equivalent(interval, inequality) and verifier.equivalent(rf"\{{x : {inequality}\}}", interval)
        flipped = {"[": "(", "(": "["}[left]
        assert not verifier.equivalent(f"{flipped}{low},{high}{right}", inequality)
        assert not verifier.equivalent(f"{left}{low},{high + 1}{right}", inequality)


def test_verify_many_keeps_order_and_kills():
    """A comparison that goes to a worker is decided there or is None in time; the others do not wait for it in vain."""
    tower = (r"\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}")  # both too large for everything but SymPy, which never ends
    begin = time.perf_counter()
    verdicts = verifier.verify_many([("#### 5", "5"), tower, ("#### 5", "6"), (None, "5")], timeout_s=0.3)
    assert verdicts == [True, None, False, False] and time.perf_counter() - begin < 60, verdicts
    assert verifier.verify(*tower) is False
    hard = (r"\boxed{x^{10^{9}} (x^{10^{9}} + 1)}", r"x^{10^{9}} + x^{2 \cdot 10^{9}}")
    assert verifier.judge(verifier.extract_answer(hard[0]), hard[1])[0] is None
    assert verifier.verify_many([hard, hard], timeout_s=30) == [True, True]
    assert verifier.verify_many([]) == []


def test_verify_same_everywhere():
    """Verdicts in threads equal those alone. A grader whose time limit is a signal fails off the main thread."""
    pairs = [*_pairs(_EQUAL), *_pairs(_DIFFERENT)][::3]
    alone = [verifier.judge(*pair)[0] for pair in pairs]
    verifier._judge.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: verifier.judge(*pair)[0], pairs)) == alone


def test_verify_imports_little():
    """Neither SymPy nor mpmath is loaded before it is needed, and nothing of this repository."""
    code = "import sys, verify; verify.verify('#### 1/2', '0.5'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"sympy", "mpmath", "torch", "model", "generate", "eval"} & set(done.stdout.split())


def test_verify_command_line():
    def run(*flags):
        return subprocess.run([sys.executable, ROOT / "verify.py", *flags], capture_output=True, text=True)

    done = run("--answer", r"so \boxed{\frac{2}{4}}", "--reference", "0.5")
    assert done.returncode == 0 and "equal, by: exact number" in done.stdout, done
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        right = {"pred": "#### 5", "gold": "5", "expected": True, "category": "a"}
        rows = [right, {"answer": "6", "reference": "5", "expected": True}]
        file.write_text("\n".join(map(json.dumps, rows)))
        done = run("--file", str(file))
        assert done.returncode == 0 and "2 answers | 1 right" in done.stdout and "WRONG" in done.stdout, done
        file.write_text('{"pred": "5"}')
        for flags in ([], ["--file", str(file)], ["--file", "missing.jsonl"]):
            done = run(*flags)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done


_PIECES = (
    r"\frac \sqrt { } ( ) [ ] \{ \} | , ; + - * / ^ _ ! % = < \le \pm \cup \in \infty x y n i e f 1 9 99 0.5 . 1e9 e99 "
    r"\pi \sin \log \binom \text{ \text{and} \begin{pmatrix} \end{pmatrix} & \\ \left \overline ° ² √ ∞ é $ \boxed{ ** "
    r"^{9^{9^9}} \mathbb{R} \circ sqrt __import__('os') lambda:0 : \mid \lfloor \pmod gcd percent million cm "
    "<think> ½ ١ ̅ "
).split() + ["\x00", "\ud800", "\u202e", " ", "\n", "9" * 50]


def _hostile_text(rng):
    """A random expression, a soup of pieces, a mutated expression, random characters or something repeated for long."""

    def expression(depth):
        if depth == 0 or rng.random() < 0.25:
            return rng.choice([*"xyein0123", "3.5", "10", r"\pi", str(rng.randrange(10**9)), r"\infty", "-4"])
        a, b = expression(depth - 1), expression(depth - 1)
        return rng.choice([
            f"{a}+{b}", f"{a}-{b}", rf"\frac{{{a}}}{{{b}}}", rf"\sqrt{{{a}}}", f"({a})^{{{b}}}", f"({a},{b})",
            f"[{a},{b})", rf"\{{{a},{b}\}}", f"{a}={b}", rf"{a} \le {b}", f"|{a}|", rf"\sin({a})", f"({a})!",
            rf"\binom{{{a}}}{{{b}}}", rf"\log_{{{a}}} {b}", rf"{a} \pm {b}", rf"{a}\%", f"({a})({b})", f"f({a})",
            rf"x \in {a}", f"({a})^{{({b})!}}", rf"\begin{{pmatrix}}{a} \\ {b}\end{{pmatrix}}", rf"{a} \cup {b}",
            rf"\{{x \mid {a} < x\}}", rf"{a} \text{{ or }} {b}",
        ])  # fmt: skip

    kind = rng.random()
    if kind < 0.4:
        return expression(rng.randrange(1, 5))
    if kind < 0.7:
        return "".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 40)))
    if kind < 0.85:
        text = list(expression(3))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(2)] = [rng.choice(_PIECES)]
        return "".join(text)
    if kind < 0.95:
        return "".join(chr(rng.randrange(rng.choice((127, 0x110000)))) for _ in range(rng.randrange(100)))
    count = rng.randrange(10, 3000)
    return rng.choice(_PIECES) * count + rng.choice(["", "1", "x"]) + rng.choice(["", ")", "}"]) * rng.randrange(count)


def test_verify_fuzz(count=1500, seed=0):
    """No exception, no hang, no growth. Longer: python -c "import test_all as t; print(t.test_verify_fuzz(100_000))" """
    rng, previous, slowest = random.Random(seed), "x", (0.0, "")
    verifier.equivalent(r"\sqrt2", "1.41421356")  # mpmath is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        text = _hostile_text(rng)
        reference, previous = rng.choice([previous, text, _hostile_text(rng)]), text
        begin = time.thread_time()
        for output in (text, rf"so \boxed{{{text}}}"):
            for strict in (False, True):
                answer = verifier.extract_answer(output, strict)
                assert answer is None or verifier.judge(answer, reference)[1] != "error", (answer, reference)
        verifier.canonical(text)
        verifier.format_reward(text)
        slowest = max(slowest, (time.thread_time() - begin, text[:200]))
    growth_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert slowest[0] < 1.0 and growth_mb < 100, (slowest, growth_mb)
    return slowest, growth_mb


def test_verify_hostile():
    """Resource bombs, code and malformed text end in False, each within a fraction of a second of CPU time."""
    bombs = [
        "9**9**9", "9^{9^{9^9}}", "10^{10^{10}}", "((9!)!)!", "99999999!", "!" * 5000, "-" * 100_000 + "1",
        "(" * 100_000,
        r"\frac{" * 50_000, r"\sqrt{" * 999 + "2" + "}" * 999, "1" * 1_000_000, "0." + "1" * 900, r"\binom{10^9}{10^8}",
        "e^{e^{e^{e^{e}}}}", r"\sin(10^{100000})", "1/0", "0^0", r"\tan(\pi/2)", r"\ln 0", "1e999999", r"2^{-2^{100}}",
        "__import__('os').system('touch /tmp/verify_was_here')", "().__class__", r"\input{/etc/passwd}", "[0]*10**10",
        "\x00", "\ud800", "a" + "̅" * 10_000, "½" * 1000, "²" * 1000, r"\pm 1" * 30, "|" * 10_000, r"\text{" * 10_000,
        "$" * 300_000, r"\[" * 100_000, "answer is " * 50_000, "answer" + " " * 500_000, "\\" * 500_000,
        "<think>" * 50_000, r"\boxed{" * 100_000, r"\boxed{5}, " * 50_000, r"\boxed{" + "1, " * 300 + "2}",
        "x<" * 400 + "1",
        "[1,2]\\cup" * 80 + "[3,4]",
        r"\begin{pmatrix}" * 1000, "x^{10^{100}}", "(x+y+z)^{500}", "((x!)!)!", r"3 \pmod{0}", "10_{1}",
        "gcd(" + "9" * 900 + ",6)",
    ]  # fmt: skip
    for bomb in bombs:
        for text in (bomb, rf"so $\boxed{{{bomb}}}$", "The answer is " + bomb):
            begin = time.thread_time()
            for reference in ("5", "x^2+1"):
                right = reference == "5" and r"\boxed{5}, " in text
                assert verifier.verify(text, reference) is right, (bomb[:60], reference)
            verifier.format_reward(text), verifier.canonical(text)
            assert time.thread_time() - begin < 1.0, (bomb[:60], time.thread_time() - begin)
    assert not Path("/tmp/verify_was_here").exists()


# ------------------------------------------------------------------------------------------------ optim.py

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
from argparse import ArgumentParser
from unittest import mock

import model
import optim

_OPTIM_CONFIG = model.Config(61, 32, 64, 2, 4, 2)
_OPTIM_SCRIPT = '''  # a training run in small: data and weights follow from (seed, step)
import argparse, sys, time, torch
from model import Config, init_params, token_logprobs
from optim import *
parser = argparse.ArgumentParser()
add_train_flags(parser, lr=1e-3, run_dir="run")
parser.add_argument("--fail-at", type=int, default=0)
args = parse_train_args(parser)
torch.set_num_threads(1)
rank, world, device = init_distributed("cpu", args.processes)
run, checkpoint = start_run(args, free_flags=["fail_at"])
config = Config(61, 32, 64, 2, 4, 2)
params, optimizer = init_optimizer(init_params(config, seed=0), device)
done = load_checkpoint(checkpoint, optimizer)["step"] if checkpoint else 0
with stop_signals() as stop_requested:
    for step in range(done + 1, 13):
        rows = torch.randint(61, (6, 9), generator=torch.Generator().manual_seed(step)).split(1)
        losses = [-token_logprobs(params, config, row).sum() / 48 for row in rows[rank::world]]
        for loss in losses:
            loss.backward()
        time.sleep(0.02)
        if step == args.fail_at and rank == world - 1:
            raise RuntimeError("the planted failure")
        stats = optimizer_step(optimizer, learning_rate(step, 12, args.lr, args.warmup), weight_decay=0.1, clip=0.5)
        loss = all_sum([sum(loss.item() for loss in losses)])[0]
        log_step(run, "step {step}/12 | loss {loss:.4f} nat", {"step": step, "loss": loss} | stats)
        stopping = stop_requested()
        if stopping or step % args.save_every == 0 or step == 12:
            save_checkpoint(run.dir, step, params, config, run.dir, optimizer, {"seen": 6 * step}, args.keep, best_step=1)
        if stopping:
            if rank == 0:
                print("go on with:", resume_command())
            break
'''


@contextlib.contextmanager
def _optim_dir():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _optim_command(home, run, *flags, processes=1):
    """Popen of _OPTIM_SCRIPT in `home`, in one process or under torchrun."""
    (home / "script.py").write_text(_OPTIM_SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, "script.py", "--run-dir", run, *flags], cwd=home, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _optim_finish(process, code=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def _optim_wait_for(path, steps, process):
    """Until the run has logged that many steps."""
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < steps):
        time.sleep(0.005)


def _optim_hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def _optim_state(steps, dtype=torch.float32, trainable=None):
    """(params, optimizer) of a tiny model after some updates from random gradients."""
    params, optimizer = optim.init_optimizer(trainable or model.init_params(_OPTIM_CONFIG, 0), dtype=dtype)
    _optim_train(optimizer, range(steps))
    return params, optimizer


def _optim_train(optimizer, steps):
    for step in steps:
        optimizer.grads.normal_(generator=torch.Generator().manual_seed(step))
        optim.optimizer_step(optimizer, 1e-3)


def _optim_save(run_dir, step, params, optimizer, keep=2, best_step=None):
    return optim.save_checkpoint(run_dir, step, params, _OPTIM_CONFIG, run_dir, optimizer, {"seen": step}, keep, best_step)


def _optim_equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("params", "master", "m", "v", "updates"))


def _optim_raises(kind, fn, *words):
    try:
        fn()
    except kind as error:
        assert all(word in str(error) for word in words), (words, str(error))
    else:
        raise AssertionError(f"expected {kind.__name__} with {words}")


def _optim_args(*flags):
    parser = ArgumentParser()
    optim.add_train_flags(parser, lr=1e-3, run_dir="runs/none")
    parser.add_argument("--steps", type=int, default=10)
    return optim.parse_train_args(parser, flags)


def test_optim_learning_rate():
    rates = [optim.learning_rate(step, 100, 2.0, 10) for step in range(1, 101)]
    assert abs(rates[0] - 0.2) < 1e-12 and rates[9] == 2.0 and abs(rates[99] - 0.2) < 1e-12
    assert abs(rates[54] - 1.1) < 1e-12  # half way down the cosine: the mean of peak and floor
    assert rates[9:] == sorted(rates[9:], reverse=True) and optim.learning_rate(1, 1, 2.0, 0) == 0.2


def test_optim_adamw_equals_torch():
    """Fifty steps with clipping, decay of the matrices only, and slices that cut through parameters.

    Both get the same gradients: in a model, those that should be zero (of the key biases) are noise, and Adam blows it up.
    """
    start = model.init_params(_OPTIM_CONFIG, 1)
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    groups = [{"params": [t for t in theirs.values() if t.dim() == 2], "weight_decay": 0.1},
              {"params": [t for t in theirs.values() if t.dim() == 1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=False)
    ours, optimizer = optim.init_optimizer(start)
    assert list(ours) == list(start) and optimizer.master.data_ptr() == optimizer.params.data_ptr()
    generator, clipped = torch.Generator().manual_seed(0), 0
    with mock.patch.object(optim, "SLICE", 1000):
        for step in range(1, 51):
            for _ in range(2):  # micro-batches
                noise = {name: torch.randn(t.shape, generator=generator) / step for name, t in start.items()}
                for params in (ours, theirs):
                    sum((params[name] * noise[name]).sum() for name in params).backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 10.0).item()
            clipped += norm > 10
            for group in reference.param_groups:
                group["lr"] = optim.learning_rate(step, 50, 1e-2, 5)
            reference.step()
            reference.zero_grad()
            lr = optim.learning_rate(step, 50, 1e-2, 5)
            stats = optim.optimizer_step(optimizer, lr, betas=(0.9, 0.98), weight_decay=0.1, clip=10.0)
            assert abs(stats["grad_norm"] / norm - 1) < 1e-5 and not optimizer.grads.any(), step
    assert 5 < clipped < 45, clipped
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert worst < 1e-6, worst


def test_optim_masters_keep_small_steps():
    """A 1e-4 step is below the spacing of bfloat16 at 1, and would be rounded away without a float32 master; and so would
    a small micro-batch gradient beside a large one, if gradients were summed in bfloat16."""
    params, optimizer = optim.init_optimizer({"w": torch.ones(4, 3), "b": torch.full((2,), 1.001)}, dtype=torch.bfloat16)
    assert optimizer.master[optimizer.spans["b"][0]] == torch.tensor(1.001)  # the master is not rounded first
    for _ in range(41):
        params["w"].sum().backward()
        optim.optimizer_step(optimizer, 1e-4, clip=0)
    assert (params["w"] - (1 - 41e-4)).abs().max() < 2e-3 and params["w"].max() < 1
    assert (optimizer.master[:12] - (1 - 41e-4)).abs().max() < 1e-5
    params["w"].sum().backward()
    for _ in range(100):
        (params["w"].sum() * 1e-3).backward()
    assert (optimizer.grads[:12] - 1.1).abs().max() < 1e-3 and params["w"].grad is None


def test_optim_skips_what_is_not_finite():
    for bad in (float("nan"), float("inf")):
        params, optimizer = _optim_state(3)
        before = [t.clone() for t in (optimizer.params, optimizer.m, optimizer.v, optimizer.updates)]
        optimizer.grads[optimizer.spans["model.norm.weight"][0]] = bad
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 1 and not optimizer.grads.any()
        assert all(map(torch.equal, before, (optimizer.params, optimizer.m, optimizer.v, optimizer.updates)))
        optimizer.grads.fill_(1e-3)
        assert optim.optimizer_step(optimizer, 1e-3)["skipped"] == 0 and not torch.equal(before[0], optimizer.params)


def test_optim_checkpoint_bitwise():
    """Loaded into a fresh state, training goes on bit for bit; in float32, in bfloat16, and with an adapter on a frozen model."""
    base = model.init_params(_OPTIM_CONFIG, 0)
    for dtype, lora in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, model.init_lora(_OPTIM_CONFIG, 2, 0))):
        with _optim_dir() as run_dir:
            params, unbroken = _optim_state(3, dtype, lora)
            path = _optim_save(run_dir, 3, base | params if lora else params, unbroken)
            _, resumed = optim.init_optimizer(lora or model.init_params(_OPTIM_CONFIG, 9), dtype=dtype)
            assert optim.load_checkpoint(path, resumed)["extra"] == {"seen": 3} and _optim_equal(unbroken, resumed)
            _optim_train(unbroken, range(3, 6))
            _optim_train(resumed, range(3, 6))
            assert _optim_equal(unbroken, resumed)
            assert len({file.stat().st_mode for file in path.iterdir()}) == 1
            saved = model.load_params(path, dtype=dtype)  # the directory is a model, with the adapter merged
            _, again = _optim_state(3, dtype, lora)
            merged = model.merge_lora(base | optim.init_optimizer(lora)[0]) if lora else base
            assert set(saved) == set(base) and any(not torch.equal(saved[name], merged[name].to(dtype)) for name in base)
            _, other = optim.init_optimizer({"w": torch.zeros(3, 3)})
            _optim_raises(ValueError, lambda: optim.load_checkpoint(path, other), "other parameters", str(path))


def test_optim_keeps_the_last_and_the_best():
    with _optim_dir() as run_dir:
        params, optimizer = _optim_state(1)
        for step in (5, 10, 15, 20):
            _optim_save(run_dir, step, params, optimizer, keep=2, best_step=5)
        assert [p.name for p in optim.list_checkpoints(run_dir)] == ["step_000005", "step_000015", "step_000020"]
        assert (run_dir / "checkpoints" / "best").resolve().name == "step_000005"
        assert set(model.load_params(run_dir / "checkpoints" / "best")) == set(params)
        _optim_save(run_dir, 20, params, optimizer, keep=1, best_step=20)  # over one of the same step
        assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["best", "step_000020"]


class _Killed(BaseException):
    """Stands for a kill: no `except OSError` sees it."""


def test_optim_killed_at_every_write():
    """A save is ended before each thing that it does to the disk, or half way through it: what stands under the name of a
    checkpoint is whole, the newest is the old state or the new, and the next save clears up."""
    with _optim_dir() as home:
        params, optimizer = _optim_state(1)
        _optim_save(home / "start", 1, params, optimizer)
        old, new = _optim_state(1)[1], _optim_state(2)[1]
        _optim_train(optimizer, [1])
        calls = 0

        def dying(real, half):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == last:
                    half(*args, **kwargs)
                    raise _Killed
                return real(*args, **kwargs)
            return call

        def half_removed(path, *_, **__):
            for file in list(Path(path).glob("*"))[:2]:
                file.unlink()

        points = [(os, "replace", lambda *_: None), (os, "fsync", lambda *_: None), (shutil, "rmtree", half_removed),
                  (Path, "write_text", lambda path, *_, **__: path.touch()), (Path, "symlink_to", lambda *_: None),
                  (model, "save_file", lambda _, path, **__: Path(path).write_bytes(b"half")),
                  (optim, "save_file", lambda _, path, **__: Path(path).write_bytes(b"half"))]
        outcomes, finished, last = [], False, 0
        while not finished:
            last, calls, run_dir = last + 1, 0, home / f"run{last}"
            shutil.copytree(home / "start", run_dir)
            with contextlib.ExitStack() as stack:
                for owner, name, half in points:
                    stack.enter_context(mock.patch.object(owner, name, dying(getattr(owner, name), half)))
                try:
                    _optim_save(run_dir, 2, params, optimizer, keep=1, best_step=2)
                    finished = True
                except _Killed:
                    pass
            newest = optim.latest_checkpoint(run_dir)
            assert not any(map(optim.find_damage, optim.list_checkpoints(run_dir))), last
            _, loaded = optim.init_optimizer(params)
            optim.load_checkpoint(newest, loaded)
            assert _optim_equal(loaded, old if newest.name == "step_000001" else new), last
            outcomes.append(newest.name)
            _optim_save(run_dir, 2, params, optimizer, keep=1, best_step=2)
            assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["best", "step_000002"], last
        assert outcomes == sorted(outcomes) and len(set(outcomes)) == 2 and len(outcomes) > 15, outcomes


def test_optim_full_disk():
    full = OSError(errno.ENOSPC, "No space left on device")
    for owner, name in ((model, "save_file"), (optim, "save_file"), (os, "fsync")):
        with _optim_dir() as run_dir:
            params, optimizer = _optim_state(1)
            _optim_save(run_dir, 1, params, optimizer)
            with mock.patch.object(owner, name, side_effect=full):
                _optim_raises(ValueError, lambda: _optim_save(run_dir, 2, params, optimizer), "No space left", "GiB", "--resume")
            assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_000001"]  # nothing else takes up room
            assert optim.find_damage(optim.latest_checkpoint(run_dir)) is None


def test_optim_damaged_checkpoint():
    """Each kind of damage names its file and the checkpoint to go on from."""
    def flip(path):  # one bit, which keeps the size and the format
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    shard = optim.shard_name(0, 1)
    for name, damage in ((shard, flip), ("model.safetensors", flip), ("trainer.json", flip), (shard, Path.unlink),
                         ("model.safetensors", lambda p: os.truncate(p, 1000)), ("checksums.json", Path.unlink),
                         ("checksums.json", lambda p: p.write_text("{\"a\": 1")), ("checksums.json", lambda p: p.write_text("[]"))):
        with _optim_dir() as run_dir:
            params, optimizer = _optim_state(1)
            for step in (1, 2):
                path = _optim_save(run_dir, step, params, optimizer)
            damage(path / name)
            _optim_raises(ValueError, lambda: optim.load_checkpoint(path, optimizer), f"step_000002/{name}", "step_000001, which is whole")
            shutil.rmtree(optim.list_checkpoints(run_dir)[0])
            _optim_raises(ValueError, lambda: optim.load_checkpoint(path, optimizer), "the start")


def test_optim_run_directory():
    """Never written over unasked; on --resume the run's flags are the defaults and its logs are cut back to the checkpoint."""
    with _optim_dir() as home, contextlib.redirect_stdout(None):
        flags = ("--run-dir", str(home / "run"), "--lr", "0.5")
        run, checkpoint = optim.start_run(_optim_args(*flags, "--resume"))  # nothing there yet: from the start
        assert checkpoint is None
        params, optimizer = _optim_state(1)
        for step in range(6):
            optim.log_step(run, "step {step} | reward {reward:.1f}", {"step": step, "reward": float("nan") if step == 1 else 0.5})
            optim.log_samples(run, step, [{"text": "a line separator \u2028 and half a surrogate \ud800"}])
            if step == 3:
                _optim_save(run.dir, step, params, optimizer)
        optim.draw_curves(run.dir)  # draws, or says what to install
        (home / "run" / "notes.txt").write_text("mine")
        _optim_raises(ValueError, lambda: optim.start_run(_optim_args(*flags)), "holds a run", "--resume", "--overwrite")
        _optim_raises(ValueError, lambda: optim.start_run(_optim_args(*flags, "--resume", "--seed", "1")), "--seed is 1", "started with 0")
        short = ("--run-dir", str(home / "run"), "--resume")
        for cut, resume in (('{"step": 3, "rew', short), ('{"step": 3}', (*short, "--steps", "20"))):
            with open(run.dir / "metrics.jsonl", "a") as file:
                file.write(cut)  # a kill in the middle of a line, and just before its end
            assert _optim_args(*resume).lr == 0.5
            run, checkpoint = optim.start_run(_optim_args(*resume))
            assert checkpoint.name == "step_000003"
            records = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
            assert [r["step"] for r in records] == [0, 1, 2, 3] and records[1]["reward"] is None
            assert sum(1 for _ in open(run.dir / "samples.jsonl")) == 4
        assert json.loads((run.dir / "flags.json").read_text())["steps"] == 20
        _, checkpoint = optim.start_run(_optim_args(*flags, "--overwrite"))
        assert checkpoint is None and not list((run.dir / "checkpoints").iterdir()) and not (run.dir / "metrics.jsonl").read_bytes()
        assert (run.dir / "notes.txt").read_text() == "mine"
        (run.dir / "flags.json").unlink()
        for flag in ("--overwrite", "--resume"):  # not a run: somebody's home directory, perhaps
            _optim_raises(ValueError, lambda: optim.start_run(_optim_args(*flags, flag)), "no run", "another --run-dir")


def test_optim_flags_out_of_range():
    optim.check_train_flags(_optim_args())
    for flags in ("--lr 0", "--lr nan", "--warmup -1", "--processes 0", "--betas 0.9 1", "--weight-decay -1", "--clip -1", "--seed -1", "--save-every 0",
                  "--keep 0", "--resume --overwrite"):
        _optim_raises(ValueError, lambda: optim.check_train_flags(_optim_args(*flags.split())), flags.split()[0])
    _optim_raises(ValueError, lambda: optim.init_distributed("tpu"), "tpu", "cuda")
    _optim_raises(ValueError, lambda: optim.init_distributed("cuda:99"), "GPU 99", "--device cpu")
    with mock.patch.object(sys, "platform", "darwin"):
        _optim_raises(ValueError, lambda: optim.init_distributed("cpu", 2), "--processes 2", "Linux")


def test_optim_second_ctrl_c_quits():
    """In a child whose terminal is gone: the first signal asks, though its message cannot be shown, and the second ends."""
    before = signal.getsignal(signal.SIGINT)
    with optim.stop_signals() as stop_requested:
        assert not stop_requested()
        if (child := os.fork()) == 0:
            try:
                os.close(2)
                os.kill(os.getpid(), signal.SIGINT)
                if stop_requested():
                    os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == before


def test_optim_killed_and_resumed():
    """Ctrl-C, then kill -9 at random moments: the files of the last checkpoint and the metrics end as those of an unbroken run."""
    with _optim_dir() as home:
        unbroken = _optim_command(home, "unbroken", "--save-every", "1")
        metrics = home / "run" / "metrics.jsonl"
        process = _optim_command(home, "run", "--save-every", "1")
        _optim_wait_for(metrics, 1, process)
        process.send_signal(signal.SIGINT)
        out, err = _optim_finish(process)
        assert "go on with: python script.py --run-dir run --save-every 1 --resume" in out and "once more to quit" in err
        for _ in range(2):
            process = _optim_command(home, "run", "--save-every", "1", "--resume")
            _optim_wait_for(metrics, metrics.read_bytes().count(b"\n") + 1, process)
            time.sleep(random.random() * 0.05)
            process.kill()
            process.communicate()
        assert 1 < int(optim.latest_checkpoint(home / "run").name[5:]) < 12
        _optim_finish(_optim_command(home, "run", "--save-every", "1", "--resume"))
        _optim_finish(unbroken)
        first, second = (_optim_hashes(home / run / "checkpoints" / "step_000012") for run in ("unbroken", "run"))
        assert first == second and len(first) == 5, (first, second)
        assert metrics.read_bytes() == (home / "unbroken" / "metrics.jsonl").read_bytes()


def test_optim_many_processes():
    """Three processes, of which one fails: its error ends all and is the one shown. Resumed by two, they reach what one does."""
    with _optim_dir() as home:
        alone = _optim_command(home, "alone")
        _, err = _optim_finish(_optim_command(home, "run", "--save-every", "6", "--fail-at", "8", processes=3), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err and err.count("failed: Traceback") == 1, err
        out, _ = _optim_finish(_optim_command(home, "run", "--fail-at", "0", "--resume", processes=2))
        assert "written by 3 processes" in out
        _optim_finish(alone)
        one, many = (model.load_params(home / run / "checkpoints" / "step_000012") for run in ("alone", "run"))
        start = model.init_params(_OPTIM_CONFIG, 0)
        worst = max((one[name] - many[name]).abs().max().item() for name in one)
        moved = min((one[name] - start[name]).abs().max().item() for name in one)
        assert worst < 1e-5 < 1e-3 < moved, (worst, moved)
        losses = [[json.loads(line)["loss"] for line in open(home / run / "metrics.jsonl")] for run in ("alone", "run")]
        assert len(losses[0]) == 12 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


def test_optim_forks_end_together():
    """--processes: a planted failure, a killed fork, a killed parent and Ctrl-C; then what is written is what torchrun's
    processes write, to the last bit."""
    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    with _optim_dir() as home:
        _, err = _optim_finish(_optim_command(home, "run", "--processes", "3", "--save-every", "6", "--fail-at", "8"), code=1)
        assert "process 2 of 3 failed" in err and "RuntimeError: the planted failure" in err and err.count("failed: Traceback") == 1, err
        metrics = home / "run" / "metrics.jsonl"

        def resumed():  # from step 6, in two processes that have made two steps more
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
            process = _optim_command(home, "run", "--processes", "2", "--resume", "--fail-at", "0")
            _optim_wait_for(metrics, 8, process)
            return process

        for victim, message in (("fork", "process 1 was ended by signal 9"), ("parent", "")):
            process = resumed()
            [fork] = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            os.kill(fork if victim == "fork" else process.pid, signal.SIGKILL)
            _, err = _optim_finish(process, code=1 if victim == "fork" else -9)
            assert message in err, err
            for _ in range(200):
                if not Path(f"/proc/{fork}").exists():
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("a fork outlived its parent")
        process = resumed()
        process.send_signal(signal.SIGINT)
        out, _ = _optim_finish(process)
        assert "go on with: python script.py --run-dir run --processes 2 --fail-at 0 --resume" in out, out
        _optim_finish(_optim_command(home, "forked", "--processes", "2"))
        _optim_finish(_optim_command(home, "launched", processes=2))
        first, second = (_optim_hashes(home / run / "checkpoints" / "step_000012") for run in ("forked", "launched"))
        assert first == second and len(first) == 6, (first, second)


# ------------------------------------------------------------------------------------------------ data/

import ast
import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from fractions import Fraction
from unittest import mock

import sympy

from data import FAMILIES, files, gsm8k, load_problems, math500, programs, split_of, teachers, traces
from data.families import REPAIRS, conclude
from data.steps import check_text, first_wrong_step
from model import init_params, load_config, resolve_model, save_model
from verify import verify

_FAMILY = {name: getattr(__import__(f"data.{name}"), name) for name in FAMILIES}


def _data_raises(kind, *words, call):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words) and "\n" not in str(error), error
        return
    raise AssertionError(f"no {kind.__name__} about {words}")


def _write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_data_files_name_line_and_field():
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "p.jsonl"
        good = {"problem": "1+1", "answer": 2}
        for row, *words in [({"problem": "x"}, "line 2", "'answer'", "problem"), ({"answer": "x"}, "line 2", "'problem'"),
                            (good | {"level": 7}, "line 2", "level 7"), (good | {"answer": " "}, "line 2", "'answer'"),
                            (good | {"answer": [1]}, "line 2", "'answer'"), ([], "line 2", "list"),
                            (good | {"id": "a"}, "line 2", "'a'", "line 1")]:
            _write_lines(path, [good | {"id": "a"}, row])
            _data_raises(ValueError, str(path), *words, call=lambda: load_problems(path))
        path.write_text('{"problem": "x", "answer": "y"}\n{"problem": \n')
        _data_raises(ValueError, "line 2", "JSON", call=lambda: load_problems(path))
        path.write_text("\n")
        _data_raises(ValueError, "empty", call=lambda: load_problems(path))
        _data_raises(FileNotFoundError, "no file", call=lambda: load_problems(Path(home) / "other.jsonl"))
        _data_raises(ValueError, "gsm9k", "knights", "jsonl", call=lambda: load_problems("gsm9k"))
        _data_raises(ValueError, "'half'", "train", call=lambda: load_problems("words", "half"))
        _data_raises(ValueError, "0", call=lambda: load_problems("words", "test", 0))
        raw = {"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 1,204"}
        [problem] = load_problems(_write_lines(path, [raw]))
        assert problem["answer"] == "1204" and problem["problem"] == "How many?" and problem["solution"] == "2+2 = <<2+2=4>>4"


def test_data_subsets_are_no_prefix_and_splits_do_not_meet():
    with tempfile.TemporaryDirectory() as home:
        path = _write_lines(Path(home) / "p.jsonl", [{"id": i, "problem": f"p {i}", "answer": i} for i in range(1000)])
        everything, ten, fifty = (load_problems(path, limit=n) for n in (None, 10, 50))
        assert len(everything) == 1000 and fifty[:10] == ten == load_problems(path, limit=10)
        assert max(int(p["id"]) for p in ten) > 300 and load_problems(path, limit=10, seed=1) != ten
        train, dev = (load_problems(path, split) for split in ("train", "dev"))
        assert not {p["id"] for p in train} & {p["id"] for p in dev} and len(train) + len(dev) == 1000
        assert 60 < len(dev) < 140


def test_data_published_files_are_fetched_checked_and_never_half_there():
    content = json.dumps({"question": "q", "answer": "a #### 3"}).encode() + b"\n"
    with tempfile.TemporaryDirectory() as home, mock.patch.object(files, "CACHE", Path(home) / "cache"), \
            mock.patch.dict(os.environ), contextlib.redirect_stderr(io.StringIO()):
        os.environ.pop("REASONER_DATA", None)
        source = Path(home) / "test.jsonl"
        source.write_bytes(content)
        published = {"test.jsonl": (1, hashlib.sha256(content).hexdigest())}
        with mock.patch.object(gsm8k, "URL", f"file://{home}/"), mock.patch.object(gsm8k, "FILES", published):
            assert load_problems("gsm8k")[0]["answer"] == "3"
            assert [p.name for p in (Path(home) / "cache/gsm8k").iterdir()] == ["test.jsonl"]
            source.unlink()
            assert load_problems("gsm8k")[0]["id"] == "gsm8k/test/1"                    # from the cache now
            (Path(home) / "cache/gsm8k/test.jsonl").write_bytes(content * 2)
            _data_raises(ValueError, "2 rows", "expected 1", call=lambda: load_problems("gsm8k"))
            (Path(home) / "cache/gsm8k/test.jsonl").unlink()
            _data_raises(FileNotFoundError, "by hand", str(Path(home) / "cache/gsm8k/test.jsonl"), "REASONER_DATA",
                         call=lambda: load_problems("gsm8k"))
            assert not list((Path(home) / "cache/gsm8k").iterdir())
            os.environ["REASONER_DATA"] = home
            (Path(home) / "gsm8k").mkdir()
            (Path(home) / "gsm8k/test.jsonl").write_bytes(content)
            assert len(load_problems("gsm8k")) == 1


def test_data_math_as_published_and_as_lines():
    with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, REASONER_DATA=home):
        _data_raises(FileNotFoundError, "by hand", call=lambda: load_problems("math"))
        row = {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": "first \\boxed{2}, no, \\boxed{\\frac{1}{2}}."}
        for i, subject in enumerate(("algebra", "geometry", "algebra", "precalculus")):
            file = Path(home) / "math/test" / subject / f"{i}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row | {"problem": f"p{i}", "level": "Level ?" if i == 3 else "Level 5"}))
        problems = load_problems("math")
        assert [p["answer"] for p in problems] == ["\\frac{1}{2}"] * 4 and problems[0]["subject"] == "Algebra"
        assert [p.get("level") for p in problems] == [5, 5, 5, None] and problems[1]["id"] == "math/test/algebra/2"
        _write_lines(Path(home) / "math/test.jsonl", [{"problem": "p", "solution": "no box", "level": 3}])
        _data_raises(ValueError, "math/test/1", "boxed", call=lambda: load_problems("math"))
        _data_raises(ValueError, "test split only", "'math'", call=lambda: load_problems("math500", "train"))


def test_data_published_sets_where_they_lie():
    places = [place / "test.jsonl" for name in ("gsm8k", "math500") for place in files.places(name)]
    if sum(place.is_file() for place in places) < 2:
        raise unittest.SkipTest("GSM8K and MATH-500 are neither in data/cache/ nor in $REASONER_DATA")
    assert len(load_problems("gsm8k")) == 1319 and len(load_problems("math500")) == 500
    assert Counter(p["level"] for p in load_problems("math500")) == {1: 43, 2: 90, 3: 105, 4: 128, 5: 134}


def test_data_families_splits_share_no_key():
    for name, family in _FAMILY.items():
        splits = {split: family.problems(split, 20) for split in ("train", "dev", "test")}
        keys = {split: {p["key"] for p in problems} for split, problems in splits.items()}
        for a, b in itertools.combinations(keys.values(), 2):
            assert len(a) == len(b) == 20 and not a & b, name
        assert family.problems("dev", 20) == splits["dev"] != family.problems("dev", 20, seed=1), name
        everything = [p for problems in splits.values() for p in problems]
        assert len({p["id"] for p in everything}) == 60 and {p["level"] for p in everything} == {1, 2, 3, 4, 5}, name
        assert all(split_of(p["key"]) == "train" and p["subject"] == name for p in splits["train"]), name
        for p in splits["test"]:
            response = teachers.respond(p["solution"], p["answer"], "think")
            assert verify(response, p["answer"], strict=True), (name, p["answer"])


def test_data_levels_and_several_sets_by_name():
    levels = lambda name, **asked: Counter((p["subject"], p["level"]) for p in load_problems(name, **asked))
    assert levels("words:2", limit=5) == {("words", 2): 5}
    assert levels("words:1-2,science:5", limit=8) == {("words", 1): 2, ("words", 2): 2, ("science", 5): 4}
    assert load_problems("words", limit=7) == load_problems("words:1-5", limit=7)
    with tempfile.TemporaryDirectory() as home:
        rows = [{"problem": f"{n}+1", "answer": n + 1, "level": n % 5 + 1} for n in range(20)]
        path = _write_lines(Path(home) / "a,b.jsonl", rows)
        assert len(load_problems(path)) == 20 and {p["level"] for p in load_problems(f"{path}:3")} == {3}
        _data_raises(ValueError, "none has a level of 3 to 1", call=lambda: load_problems("words:3-1"))
        path = _write_lines(Path(home) / "plain.jsonl", [{"problem": "1+1", "answer": 2}])
        _data_raises(ValueError, "none has a level", call=lambda: load_problems(f"{path}:1"))


def test_data_step_checkers():
    """The small version of `python data/traces.py --self-test 2000`; and what they must not let pass besides wrong steps."""
    for name, family in _FAMILY.items():
        rng = random.Random(name)
        for p in family.problems("train", 60, seed=3):
            p = json.loads(json.dumps(p))                                    # as it comes back from a file
            lines = p["solution"].split("\n")
            assert family.check_steps(p, p["solution"]) is None, p
            planted = family.plant_error(p, rng)
            assert planted.split("\n")[-1].endswith(lines[-1].removeprefix("=")), planted          # the answer is still right
            index, line, reason = family.check_steps(p, planted)
            assert planted.split("\n")[index] == line and reason, planted
            assert lines[index:index + 1] != [line], planted
            assert family.check_steps(p, family.plant_slip(p, rng)) is None
            assert family.check_steps(p, "\n".join(lines[:-1])) is not None                     # stops short
            for text in ("", lines[-1], "I think so.\n" + p["solution"], p["solution"] + "\nThe answer is 7777.",
                         "(" * 5000, "9" * 5000, "\N{ARABIC-INDIC DIGIT ONE}\n" * 3):
                if text != p["solution"]:
                    assert family.check_steps(p, text) is not None, (name, text[:50])


def test_data_slips_are_forgiven_only_when_repaired_at_once():
    family, [p] = _FAMILY["words"], _FAMILY["words"].problems("train", 1)
    p = next(p for p in family.problems("train", 50) if p["level"] == 3)
    one, two, three, last = p["solution"].split("\n")
    wrong = one[:-1] + str((int(one[-1]) + 1) % 10)
    check = lambda *lines: family.check_steps(p, "\n".join(lines))
    assert check(wrong, REPAIRS[0] + one, two, three, last) is None
    assert check(one, two, three, last) is None
    assert check(wrong, one, two, three, last)[0] == 0                              # not taken back
    assert check(wrong, REPAIRS[0] + wrong, two, three, last)[0] == 0               # taken back, and wrong again
    assert check(wrong, REPAIRS[0] + two, one, three, last)[0] == 0                 # taken back, about something else
    assert check(one, REPAIRS[1] + one, two, three, last)[0] == 1                   # nothing to take back
    assert check(one, two, wrong, REPAIRS[0] + one, three, last) is None
    assert check(one, two, three, conclude(int(p["answer"]) + 1))[0] == 3


def test_data_words_by_reading_the_text():
    """The answer, computed from the sentences of the riddle by other means than the plan behind them."""
    read = 0
    for p in _FAMILY["words"].problems("test", 200):
        *told, question = re.split(r"(?<=[.?]) ", p["problem"])
        values, rules = {}, []
        for sentence in told:
            if found := re.fullmatch(r"(\w+) has (\d+) [\w-]+\.", sentence):
                values[found[1]] = Fraction(found[2])
            elif found := re.fullmatch(r"(\w+) has (\d+) (more|fewer|times as many) [\w-]+ (?:than|as) (\w+)\.", sentence):
                rules.append((found[1], found[4], found[3], int(found[2])))
            elif found := re.fullmatch(r"If (\w+) had (\d+) times as many [\w-]+, it would be as many as (\w+) has\.", sentence):
                rules.append((found[1], found[3], "part", int(found[2])))
        asked = re.fullmatch(r"How many [\w-]+ does (\w+) have\?", question)
        if not asked:
            continue
        for _ in rules:
            for name, other, kind, k in rules:
                if other in values:
                    x = values[other]
                    values[name] = {"more": x + k, "fewer": x - k, "times as many": x * k, "part": x / k}[kind]
        assert values[asked[1]] == Fraction(p["answer"]), p
        read += 1
    assert read > 60


def test_data_knights_have_one_solution():
    """Every puzzle is read from its text and solved by trying all worlds, without the bit masks of the generator."""
    def holds(words, speaker, world):
        if found := re.fullmatch(r"if (.*), then (.*)", words):
            return not holds(found[1], speaker, world) or holds(found[2], speaker, world)
        if found := re.fullmatch(r"(.*) or (.*), or both", words):
            return holds(found[1], speaker, world) or holds(found[2], speaker, world)
        if found := re.fullmatch(r"(\w+) and (\w+) are of (the same|different) kinds?", words):
            a, b = (speaker if name == "I" else name for name in found.groups()[:2])
            return (world[a] == world[b]) == (found[3] == "the same")
        if found := re.fullmatch(r"(.* a kn\w+) and (.*)", words):
            return holds(found[1], speaker, world) and holds(found[2], speaker, world)
        name, kind = re.fullmatch(r"(\w+) (?:is|am) a (knight|knave)", words).groups()
        return world[speaker if name == "I" else name] == (kind == "knight")

    supposed = 0
    for p in _FAMILY["knights"].problems("test", 60):
        said = re.findall(r'(\w+) says: "([^"]*)\."', p["problem"])
        names = [name for name, _ in said]
        worlds = [dict(zip(names, kinds)) for kinds in itertools.product((True, False), repeat=len(names))]
        fitting = [w for w in worlds if all(holds(words, name, w) == w[name] for name, words in said)]
        assert len(fitting) == 1 and p["answer"] == (", ".join(n for n in names if fitting[0][n]) or "none"), p
        supposed += "Suppose" in p["solution"]
    assert supposed > 20


def test_data_algebra_agrees_with_sympy():
    for p in _FAMILY["algebra"].problems("test", 60):
        symbols = {letter: sympy.Symbol(letter) for letter in "xyzntwk"}
        def value(text):
            text = re.sub(r"(?<=[\da-z)])(?=[a-z(])", "*", text).replace("^", "**")
            return sympy.parse_expr(text, local_dict=symbols, evaluate=True)         # our own problem, never a model's text
        text = re.sub(r"^.*(?:for \w: |of |simplify: |constant k is )|\?$| for all \w\?$", "", p["problem"])
        left, _, right = text.partition(" = ")
        letter = symbols[p["letter"]]
        if p["problem"].startswith("Expand"):
            assert sympy.expand(value(left) - value(p["answer"])) == 0, p
        elif "constant k" in p["problem"]:
            assert sympy.expand(value(left) - int(p["answer"]) * letter) == 0, p
        else:
            assert max(sympy.solve(value(left) - value(right), letter)) == Fraction(p["answer"]), p


def test_data_programs_do_what_python_does():
    """The interpreter behind the debugging family against Python itself, on our own programs; and what their tests are worth."""
    for p in _FAMILY["debugging"].problems("test", 60):
        space = {}
        exec(p["program"], space)
        function = space[p["program"][4:p["program"].index("(")]]
        assert [function(*a) for a, _ in p["tests"]] == [programs.trace(p["program"], a)[1] for a, _ in p["tests"]]
        assert function(*p["arguments"]) != p["wanted"] and [p["arguments"], p["wanted"]] in p["tests"]
    check = _FAMILY["debugging"].check_outcome
    number, code = re.fullmatch(r"line (\d+): (.*)", p["answer"]).groups()
    assert check(p, p["answer"]) and not check(p, f"line {number}: {p['program'].split(chr(10))[int(number) - 1].strip()}")
    for answer in ("", "line 99: x = 1", f"line {number}: import os", f"line {number}: return [", code, f"line {number}: " + "(" * 150):
        assert not check(p, answer), answer


def test_data_programs_first_wall():
    for body in ("import os", "return open('x')", "return n.real", "return __import__('os')", "return (lambda: 1)()", "return f(n)",
                 "return [x for x in n]", "exec('1')", "return n ** n", "return f'{n}'", "global n", "x[0] = 1", "return 1.5",
                 "with n: pass", "return " + "(" * 300 + "1" + ")" * 300, "return " + "-" * 3000 + "1", "return n[::]"):
        for source in (f"def f(n):\n {body}", body):
            assert not programs.run_tests(source, [[[1], 1]]), body
    _data_raises(ValueError, "steps", call=lambda: programs.trace("def f(n):\n while n > 0:\n  n = n + 1\n return n", [1]))
    _data_raises(ValueError, "large", call=lambda: programs.trace("def f(n):\n while n > 0:\n  n = n * n\n return n", [9]))
    _data_raises(ValueError, "large", call=lambda: programs.trace("def f(n):\n n = [1]\n while 1 > 0:\n  n = n + n\n return n", [9]))
    _data_raises(ValueError, "large", call=lambda: programs.trace("def f(n):\n return sum(range(99999999))", [9]))


def test_data_programs_second_wall():
    """Programs that got past the first wall, as if it had a hole: they still reach no file and no time or memory to speak of."""
    assert programs.run_limited("def f(n):\n return n + 1", "f", [[[1], 2]])
    assert not programs.run_limited("def f(n):\n return n + 1", "f", [[[1], 3]])
    with tempfile.TemporaryDirectory() as home:
        target = Path(home) / "written"
        find = ("def f(n):\n io = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'FileLoader'][0]\n"
                " modules = io.__init__.__globals__['sys'].modules\n")
        assert programs.run_limited(find + " return 5", "f", [[[1], 5]])                                # the hole is real
        assert not programs.run_limited(find + f" modules['posix'].open({str(target)!r}, 65)\n return 5", "f", [[[1], 5]])
        assert not programs.run_limited(find + " modules['posix'].open('/etc/hostname', 0)\n return 5", "f", [[[1], 5]])
        assert not target.exists()
    begin = time.perf_counter()
    assert not programs.run_limited("def f(n):\n while True: pass", "f", [[[1], 1]])
    assert not programs.run_limited("def f(n):\n return [0] * 10**9 and 1", "f", [[[1], 1]])
    find = find.replace("return", "")
    assert not programs.run_limited(find + " modules['time'].sleep(60)\n return 1", "f", [[[1], 1]], wall_s=0.5)
    assert time.perf_counter() - begin < 20


def test_data_steps_by_hand():
    """Verdicts on single lines; most of them are how GSM8K's authors write."""
    for text, *verdicts in [
            ("48/2 = 24", "right"), ("48/2 = 26", "wrong"), ("Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.", "right", "right"),
            ("12 apples + 3 apples = 15 apples", "right"), ("She has 5 + 3 = 8 = 9.", "right", "wrong"),
            ("\\frac{1}{2} \\times 6 = 3", "right"), ("$\\frac12 \\cdot 6 = 4$", "wrong"), ("20% of 50 = 10", "right"),
            ("10/50 = 20%", "right"), ("9/21*100% = 42.857", "right"), ("50% * 20 = 1000", "wrong"), ("10 / 3 = 3.33", "right"),
            ("10/3 = 3", "wrong"), ("10/3 is about 3, so 10/3 ≈ 3", "right"), ("2/3 = 0.66 and 0.67 * 3 = 2", "right", "wrong"),
            ("2 1/2 * 4 = 10", "right"), ("$1,200 / 12 = $100", "right"), ("5 hours * $60/hour = $300", "right"),
            ("80 000 + 5 = 80 005", "right"), ("3 x 4 = 12", "right"), ("0.2x50=10", "right"), ("3 × 4 − 2 = 10", "right"),
            ("Step 1: 3+4 = 8", "wrong"), ("2. 3+4 = 7", "right"), ("1 hour = 60 minutes", "unchecked"), ("x = 5", "unchecked"),
            ("Area of 1 room = 11 * 11 = 121", "unchecked", "right"), ("3 groups of 4 = 12", "unchecked"), ("A * 3 = 12",  "unchecked"),
            ("cost of pens * 3 = 12",), ("it arrives at 6:00+48 = 6:48",), ("2 hours + 30 minutes = 150 minutes", "unchecked"),
            ("(x+1)^2 = x^2 + 2x + 1", "right"), ("2x + 3x = 5x", "right"), ("2x + 3 = 11, so 2x = 8, so x = 4", "unchecked", "right", "right"),
            ("2x + 3 = 11 => 2x = 9", "unchecked", "wrong"), ("2**10 = 1024", "right"), ("1/0 = 5",), ("9^9^9^9 = 1",), ("= = =",),
            ("5 * 3 = 16. Wait, 5 * 3 = 15.", "repaired", "right"), ("5 * 3 = 16. Wait, 5 * 4 = 20.", "wrong", "right")]:
        assert [step.verdict for step in check_text(text)] == verdicts, (text, check_text(text))
    assert first_wrong_step("1+1 = 2\n2+2 = 5\n3+3 = 7").text == "2 + 2 = 5"


def test_data_steps_catch_a_changed_digit():
    """Chains of random arithmetic in prose, right as written; then with one digit of one result changed."""
    rng = random.Random(0)
    for _ in range(300):
        a, b, c = (rng.randint(2, 400) for _ in range(3))
        op, value = rng.choice([("+", a + b), ("*", a * b), ("-", a - b), ("x", a * b), ("/", Fraction(a, b))])
        shown = str(value) if op != "/" else f"{float(value):.3f}"
        text = f"She pays ${a} {op} {b} = ${shown} for pens,\nand then 3 boxes + {c} boxes = {c + 3} boxes."
        assert [s.verdict for s in check_text(text)] == ["right", "right"], check_text(text)
        place = rng.choice([i for i, char in enumerate(shown) if char.isdigit()][:3])
        digit = str((int(shown[place]) + rng.randint(1, 9)) % 10)
        wrong = text.replace(f"= ${shown} ", f"= ${shown[:place]}{digit}{shown[place + 1:]} ")
        assert first_wrong_step(wrong) is not None, wrong


def test_data_steps_catch_planted_slips_in_gsm8k():
    """One annotated result changed in each solution that is free of wrong steps, in the annotation and in the text behind it."""
    if not any((place / "train.jsonl").is_file() for place in files.places("gsm8k")):
        raise unittest.SkipTest("GSM8K is neither in data/cache/ nor in $REASONER_DATA")
    rng, tried, caught = random.Random(0), 0, 0
    for p in load_problems("gsm8k", "dev"):
        places = list(re.finditer(r"<<([^<>=]*)=(\d+)>>\2(?!\d)", p["solution"]))
        if first_wrong_step(p["solution"]) or not places:
            continue
        place = rng.choice(places)
        value = int(place[2]) + rng.choice([off for off in (-10, -2, -1, 1, 2, 10) if int(place[2]) + off > 0])
        text = f"{p['solution'][:place.start()]}<<{place[1]}={value}>>{value}{p['solution'][place.end():]}"
        tried, caught = tried + 1, caught + (first_wrong_step(text) is not None)
    assert tried > 650 and caught >= 0.995 * tried, (tried, caught)


def test_data_steps_survive_hostile_text():
    begin = time.perf_counter()
    for text in ("(" * 3000 + "1" + ")" * 3000 + " = 1", "1+" * 50000 + "1 = 2", "9" * 100000 + " = 1 + 1", "-" * 3000 + "1 = 1",
                 "(x+y+z+w)^12 = 1", "2^12^12^12 = 1", "((a+b)^12)^12 = 1", "= " * 50000, "a b c " * 20000 + "= 3", "<<" * 20000,
                 "\\frac{" * 5000 + " = 1", "1 = 1\n" * 5000, "1e999999 = 1", "\x00\ud800 1 = 2", "٣ + ٤ = ٧", "²+1=5", "1" + " 000" * 400 + "=1"):
        check_text(text)
    assert time.perf_counter() - begin < 20


# The pipeline


def _traces(home, *flags, code=0):
    """Runs the pipeline in this process: (records, data card, raw lines, what it printed)."""
    out, said = Path(home) / "traces.jsonl", io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        assert traces.main(traces.parse_args(["--decontaminate", "--out", str(out), *map(str, flags)])) == code
    raw = [json.loads(line) for line in open(out.with_suffix(".raw.jsonl"), encoding="utf-8")][1:]
    return [json.loads(line) for line in open(out, encoding="utf-8")], out.with_suffix(".md").read_text(), raw, said.getvalue()


def test_data_traces_of_the_solver():
    """Outcome filtering lets every planted error pass, process verification none of them, and nothing else is lost."""
    flags = ("--data", "words", "knights", "algebra", "science", "--limit", 40, "--error-rate", 0.4)
    with tempfile.TemporaryDirectory() as home:
        records, card, raw, _ = _traces(home, *flags, "--self-correction", 0.3)
        planted = sum(row["planted_error"] for row in raw)
        assert len(raw) == 160 and 40 < planted < 90 and len(records) == 160 - planted
        assert f"planted errors: {planted}, of which 0" in card and f"{len(records)} of 160 raw traces" in card
        for r in records:
            assert r["response"] == f"<think>\n{r['thought']}\n</think>\n\\boxed{{{r['answer']}}}"
            assert {"id", "problem", "thought", "answer", "level", "subject", "source"} <= r.keys()
        slips = [r for r in records if "self_correction" in r["source"]]
        assert 15 < len(slips) < 45 and all(any(words in r["thought"] for words in REPAIRS) for r in slips)
        again, *_ = _traces(home, *flags, "--self-correction", 0.3)
        assert again == records
        kept, card, _, _ = _traces(home, *flags, "--steps", "off")
        assert len(kept) == 160 and f"of which {planted} are still there" in card
        _data_raises(ValueError, "error_rate", "0.5", "--out", call=lambda: _traces(home, *flags[:-1], 0.5))


def test_data_traces_of_gsm8k_solutions():
    rows = [{"question": "How many clips did Natalia sell in May?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nSo 24 it is.\n#### 24"},
            {"question": "And how many did her cousin sell in April?", "answer": "She sold 48/2 = <<48/2=25>>24 clips.\n#### 24"}]
    with tempfile.TemporaryDirectory() as home:
        path = _write_lines(Path(home) / "g.jsonl", rows)
        [record], card, _, _ = _traces(home, "--data", path, "--teacher", "gsm8k-solutions", "--split", "test", "--think-tag", "thought")
        assert record["response"] == "<thought>\nShe sold 48/2 = 24 clips.\nSo 24 it is.\n</thought>\n\\boxed{24}"
        assert "| process | 1 | a wrong equation 1 |" in card and "48 / 2 = 25" in card
        _data_raises(ValueError, "gsm8k", "--teacher", call=lambda: _traces(home, "--data", "words", "--teacher", "gsm8k-solutions",
                                                                           "--out", Path(home) / "other.jsonl"))


def test_data_traces_curation():
    """One trace for every reason to drop one, and one that stays."""
    with tempfile.TemporaryDirectory() as home:
        story = "The {0} in the garden of the old mill were counted by {1} on a rainy day in May, and there were {2} of them all told. "
        thought = "The text says that there were {2} of them, and that nobody took any away, so the number is the same as it was before."
        problems = {name: {"id": name, "problem": story.format(name, name[::-1], n) + f"How many {name} are there?", "answer": str(n), "level": 1}
                    for n, name in enumerate(("pears", "plums", "apples", "cherries", "quinces", "medlars", "walnuts", "figs", "grapes"), 3)}
        problems["easy"] = {"id": "easy", "problem": "What is one and one?", "answer": "2", "pass_rate": 1.0, "level": 1}
        problems["figs"]["problem"] = "Nobody in the village could remember a year in which the figs fell so late. Which year was it?"
        path = _write_lines(Path(home) / "p.jsonl", problems.values())
        held_out = _write_lines(Path(home) / "held.jsonl", [{"problem": "As told: " + problems["figs"]["problem"].upper(), "answer": "1"}])
        texts = {name: thought.format("", "", p["answer"]) + f" I call them {name}. \\boxed{{{p['answer']}}}" for name, p in problems.items()}
        texts["plums"] = "There are four.\n\\boxed{5}"
        texts["apples"] = "It is 2 + 2 = 5.\n\\boxed{5}"
        texts["cherries"] = "一二三四五六七八九十。 \\boxed{6}"
        texts["quinces"] = "let us see\n" * 9 + "\\boxed{7}"
        texts["medlars"] = "a " * 7000 + "\\boxed{8}"
        settings = {"teacher": "endpoint", "model": "m", "seed": 0, "temperature": 0.7, "max_new_tokens": 2048,
                    "instruction": teachers.INSTRUCTION}
        rows = [{"settings": settings}] + [{"problem_id": name, "sample": 0, "text": text, "finish": "stop"} for name, text in texts.items()]
        rows += [rows[1] | {"sample": 1}, rows[1] | {"sample": 2, "text": rows[1]["text"].replace("I call", "i call")},
                 rows[1] | {"sample": 3, "finish": "length"}, rows[1] | {"sample": 3, "text": "doubled"}]
        _write_lines(Path(home) / "traces.raw.jsonl", rows)
        flags = ("--data", path, "--split", "test", "--teacher-url", "http://127.0.0.1:9", "--teacher-model", "m", "--retries", 0,
                 "--max-pass-rate", 0.9)
        with mock.patch.object(traces, "ask_endpoint", lambda *a, **k: 0):
            records, card, _, _ = _traces(home, *flags, "--decontaminate", held_out)
        assert {r["id"] for r in records} == {"pears#0", "walnuts#0", "grapes#0"}, card
        assert r"\boxed" not in records[0]["thought"]
        for cell in ("| outcome | 1 | the answer is wrong 1", "| process | 1 | a wrong equation 1", "language 1", "repetition 1", "length 1",
                     "cut off 1", "| exact duplicate | 1", "| near duplicate | 1", "| contamination | 1", "| difficulty | 1"):
            assert cell in card, (cell, card)
        lopsided = [{"subject": "a", "level": i % 2, "id": str(i)} for i in range(10)] + [{"subject": "b", "level": 1, "id": "x"}] * 40
        gone = traces.balance(lopsided, 2, random.Random(0))
        assert len(gone) == 30 and all(lopsided[i]["subject"] == "b" for i in gone)


def test_data_near_duplicates_are_those_of_the_plain_comparison():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    records = []
    for text in texts:
        for changes in (0, 1, 12):
            parts = text.split()
            for place in rng.sample(range(60), changes):
                parts[place] = "new"
            records.append({"problem": "", "thought": " ".join(parts)})
    found = traces.near_duplicates(records, 0.85)
    sets = [traces.ngrams(r["thought"].split(), 3) for r in records]
    plain = {i for i in range(len(sets)) if any(len(sets[i] & sets[j]) >= 0.85 * len(sets[i] | sets[j]) for j in range(i))}
    assert len(plain) >= 35 and len(plain - found.keys()) <= 1 and not found.keys() - plain      # MinHash may miss one, never invents


class _Teacher(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that solves "a + b = ?", after whatever faults `server.faults` holds for it."""

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            fault = server.faults.pop(0) if server.faults else None
            server.log.append((time.monotonic(), fault, self.headers.get("Authorization"), request))
        if fault == "hang up":
            return self.connection.close()
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "1" if fault == 429 else "soon")
            self.end_headers()
            return self.wfile.write(b"no such key\nsecond line" if fault < 429 else b"busy")
        a, b = map(int, re.findall(r"\d+", request["messages"][-1]["content"])[:2])
        message = {"role": "assistant", "content": f"The sum is {a} + {b} = {a + b}.\n\\boxed{{{a + b}}}"}
        if request["seed"] == 1:
            message = {"content": f"\\boxed{{{a + b}}}", "reasoning_content": f"Add them: {a} + {b} = {a + b}."}
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 10, "completion_tokens": 7}}
        body = {None: json.dumps(body).encode(), "garbage": b"\xff\xfe<html>", "empty": b'{"choices": []}', "list": b"[" * 9000,
                "null": b'{"choices": [{"message": {"content": null}}]}', "short": json.dumps(body).encode()[:50]}[fault]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (9 if fault == "short" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def _teacher(faults=()):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Teacher)
    server.faults, server.log, server.lock, server.daemon_threads = list(faults), [], threading.Lock(), True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server, ("--teacher-url", f"http://127.0.0.1:{server.server_port}/v1", "--teacher-model", "t", "--backoff-s", 0.01)
    finally:
        server.shutdown()
        server.server_close()


def _sums_file(home, n):
    return _write_lines(Path(home) / "p.jsonl", [{"id": f"s{i}", "problem": f"{i} + {3 * i} = ?", "answer": str(4 * i)} for i in range(n)])


def test_data_http_teacher_loses_and_doubles_nothing():
    """Faults of every kind, then an interruption, then a crash in the middle of a line: in the end each trace is there once."""
    faults = [500, "garbage", "hang up", "empty", None, "null", 503, "list", "short", None, 408]
    with tempfile.TemporaryDirectory() as home, _teacher(faults) as (server, flags), \
            mock.patch.dict(os.environ, OPENAI_API_KEY="sk-secret"):
        flags = ("--data", _sums_file(home, 20), "--split", "test", "--samples", 2, "--concurrency", 3, *flags)
        kept, real = [], teachers.append

        def interrupted(file, row):
            real(file, row)
            kept.append(row)
            if len(kept) == 12:                                        # the settings and eleven traces
                raise KeyboardInterrupt

        with mock.patch.object(teachers, "append", interrupted):
            _data_raises(KeyboardInterrupt, call=lambda: _traces(home, *flags))
        raw = Path(home) / "traces.raw.jsonl"
        first = raw.read_bytes()
        assert len(kept) == len(first.splitlines()) and 12 <= len(kept) <= 15         # what was asked already is kept as well
        raw.write_bytes(first + first.splitlines()[3][:40])                           # as kill -9 would leave it
        asked = len(server.log)
        records, card, rows, said = _traces(home, *flags)
        assert raw.read_bytes().startswith(first)
        assert sorted((row["problem_id"], row["sample"]) for row in rows) == sorted((f"s{i}", s) for i in range(20) for s in (0, 1))
        assert len(server.log) - asked == 40 - (len(kept) - 1)                        # only what was missing is asked for
        assert asked == len(kept) - 1 + sum(fault is not None for fault in faults)
        assert len(records) == 40 and {r["thought"] for r in records if r["id"] == "s5#1"} == {"Add them: 5 + 15 = 20."}
        assert f"{10 * (41 - len(kept))} prompt + {7 * (41 - len(kept))} completion tokens" in said
        assert {auth for _, _, auth, _ in server.log} == {"Bearer sk-secret"} and "sk-secret" not in card + raw.read_text()
        assert _traces(home, *flags)[0] == records and len(server.log) == asked + 41 - len(kept)


def test_data_http_teacher_keeps_to_the_rate_and_waits_when_told():
    with tempfile.TemporaryDirectory() as home, _teacher() as (server, flags):
        flags = ("--data", _sums_file(home, 12), "--split", "test", *flags)
        _traces(home, *flags, "--requests-per-minute", 600)
        times = sorted(t for t, *_ in server.log)
        assert len(times) == 12 and times[-1] - times[0] > 0.9 * 11 * 0.1
        server.log.clear()
        server.faults += [429]
        _traces(home, *flags, "--out", Path(home) / "traces.jsonl", "--samples", 2, "--concurrency", 1)
        (first, fault, *_), (second, *_) = server.log[:2]
        assert fault == 429 and second - first > 0.95 and len(server.log) == 13


def test_data_http_teacher_that_refuses_or_never_answers():
    with tempfile.TemporaryDirectory() as home, _teacher([401]) as (server, flags):
        flags = ("--data", _sums_file(home, 6), "--split", "test", "--concurrency", 1, "--retries", 1, *flags)
        _data_raises(ValueError, "401", "no such key", call=lambda: _traces(home, *flags))
        assert len(server.log) <= 2
        server.faults[:] = [500, "garbage"]                            # twice for the same trace: given up, for now
        records, card, raw, _ = _traces(home, *flags)
        assert len(records) == len(raw) == 5 and "unanswered: 1" in card
        assert len(_traces(home, *flags)[0]) == 6
        _data_raises(ValueError, "temperature 0.7, now 0.1", call=lambda: _traces(home, *flags, "--temperature", 0.1))
        server.faults[:] = [302]                                       # to follow it would show the key to another host
        _data_raises(ValueError, "302", call=lambda: _traces(home, *flags, "--samples", 2))


def test_data_traces_of_a_local_model():
    """Random weights teach nothing, so no trace is left; but what they wrote is kept, and not written again."""
    tiny = resolve_model("tiny")
    config = load_config(tiny)
    with tempfile.TemporaryDirectory() as home:
        save_model(Path(home) / "m", init_params(config, 0), config, like=tiny)
        flags = ("--data", "arithmetic", "--limit", 3, "--teacher", Path(home) / "m", "--samples", 2, "--max-new-tokens", 4,
                 "--instruction", "")
        _data_raises(ValueError, "no trace is left", "outcome 6", call=lambda: _traces(home, *flags))
        raw = (Path(home) / "traces.raw.jsonl").read_text()
        rows = [json.loads(line) for line in raw.splitlines()[1:]]
        assert len({(r["problem_id"], r["sample"]) for r in rows}) == len(rows) == 6 and rows[0]["text"] != rows[1]["text"]
        (Path(home) / "traces.raw.jsonl").write_text("".join(raw.splitlines(True)[:-2]))
        _data_raises(ValueError, "no trace is left", call=lambda: _traces(home, *flags))
        assert (Path(home) / "traces.raw.jsonl").read_text() == raw                    # the same samples, one by one


def test_data_judge_tells_right_answers_from_right_thoughts():
    """By hand: a right thought, a wrong step before a right answer, no thinking block, and a wrong answer."""
    from data import judge
    problems = load_problems("words:1-2,arithmetic:2", "dev", 8)
    settings = {"data": "words:1-2,arithmetic:2", "split": "dev", "data_seed": 0, "think_tag": "think"}
    texts, expected = [], []
    for n, p in enumerate(problems):
        wrong = _FAMILY[p["subject"]].plant_error(p, random.Random(n))
        thought = wrong if n % 4 == 1 else p["solution"]
        text = f"\\boxed{{{p['answer']}}}" if n % 4 == 2 else teachers.respond(thought, "1234567" if n % 4 == 3 else p["answer"], "think")
        texts.append(text)
        expected.append([(True, True, True, False), (True, True, False, True), (True, False, False, True), (False, True, True, False)][n % 4])
    with tempfile.TemporaryDirectory() as home:
        rows = [{"id": p["id"], "subject": p["subject"], "settings": settings, "samples": [{"text": t, "strict": e[0]}]}
                for p, t, e in zip(problems, texts, expected)]
        path = _write_lines(Path(home) / "r.jsonl", rows)
        found = judge.read_verdicts(path)
        assert [found[p["id"]][:2] for p in problems] == [(p["subject"], e) for p, e in zip(problems, expected)]
        assert all((found[p["id"]][2] is None) == e[2] for p, e in zip(problems, expected))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            judge.main(judge.parse_args([str(path), str(path)]))
        assert "| words | 4 | 75.0 [30.1, 95.4] |" in said.getvalue() and "+0.0 points [+0.0, +0.0]" in said.getvalue()
        problem = {"subject": "gsm8k"}
        assert judge.first_fault(problem, "She had 3 + 4 = 7 clips.") is None
        assert judge.first_fault(problem, "She had 3 + 4 = 8 clips.") and judge.first_fault(problem, "She had 7.")
        path = _write_lines(path, [rows[0] | {"id": "words/none"}])
        _data_raises(ValueError, "'words/none'", call=lambda: judge.read_verdicts(path))


def test_data_traces_user_errors_are_one_line():
    script = [sys.executable, str(ROOT / "data/traces.py")]
    run = subprocess.run([*script, "--data", "nothing.jsonl"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "traces.py: no file nothing.jsonl\n", run
    for flags, word in [(["--error-rate", "2"], "between 0 and 1"), (["--samples", "0"], "less than 1"), (["--teacher-url", "x"], "--teacher-model")]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            _data_raises(SystemExit, "2", call=lambda: traces.parse_args(flags))
        assert word in said.getvalue()


# ------------------------------------------------------------------------------------------------ generate.py

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from generate import generate, inverse_cdf, row_key, sample_tokens, sampling_params, text_streamer, uniform
from model import Config, forward, init_lora, init_params, merge_lora, token_logprobs


def _sampler(seed=0, **changes):
    """A tiny random model, its weights large enough for its distributions to have a shape."""
    config = Config(**{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "max_position_embeddings": 512} | changes)
    params = init_params(config, seed)
    return {name: tensor * 8 if tensor.dim() == 2 else tensor for name, tensor in params.items()}, config


def _parrot(text):
    """A model over bytes that says `text` in a circle, whatever stands before its last letter, and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    config = Config(256, 256, 8, 1, 4, 2, tie_word_embeddings=False)
    params = {name: tensor * 0 if ".layers." in name else tensor for name, tensor in init_params(config, 0).items()}
    params["model.embed_tokens.weight"], params["lm_head.weight"] = torch.eye(256), torch.zeros(256, 256)
    ids = tokenizer.encode(text).ids
    for this, following in zip(ids, ids[1:] + ids[:1]):
        params["lm_head.weight"][following, this] = 4.0
    return params, config, tokenizer


_PROMPTS = [[5, 6, 7], [9, 3, 4, 11, 12, 30, 2, 17, 8, 44, 51, 26, 6, 6, 1, 0, 20, 21, 22, 23], [60], [8, 8, 8, 8, 8, 8, 8, 8]]


def _tokens(answers):
    return [[completion.tokens for completion in row] for row in answers]


def test_generate_greedy_equals_the_plain_loop():
    """Ragged prompts in one batch, cached and packed, against a loop that computes every prefix from its start."""
    params, config = _sampler()
    answers = generate(params, config, _PROMPTS, max_new_tokens=24, temperature=0)
    for prompt, [answer] in zip(_PROMPTS, answers):
        tokens = list(prompt)
        for _ in range(24):
            tokens.append(int(forward(params, config, torch.tensor([tokens]))[0, -1].argmax()))
        assert answer.tokens == tokens[len(prompt):] and answer.finish == "length"


def test_generate_logprobs_equal_the_scorers():
    params, config = _sampler()
    for settings in ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8, "top_k": 20}, {"temperature": 0}):
        for share in (True, False):
            answers = generate(params, config, _PROMPTS, num_samples=3, max_new_tokens=20, share_prompts=share, **settings)
            for prompt, row in zip(_PROMPTS, answers):
                for answer in row:
                    whole = torch.tensor([prompt + answer.tokens])
                    expected = token_logprobs(params, config, whole, settings["temperature"] or 1.0)[0, len(prompt) - 1:]
                    assert (expected - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_says_the_same_in_any_company():
    """Noise belongs to (seed, prompt, sample): neither the batch size, nor sharing, nor chunks, nor a small cache change a token."""
    params, config = _sampler()
    ask = {"num_samples": 3, "max_new_tokens": 70, "stop_tokens": (3,), "temperature": 0.9}
    whole = _tokens(generate(params, config, _PROMPTS, **ask))
    assert len({len(tokens) for row in whole for tokens in row}) > 3, "rows should end at different times"
    stats = {}
    slot_gib = 2 * 2 * 2 * 8 * 4 / 2**30  # one slot: keys and values, 2 layers, 2 heads of 8 float32
    for changes in ({"max_batch": 1}, {"max_batch": 5}, {"share_prompts": False}, {"chunk": 16}, {"chunk": 16, "share_prompts": False},
                    {"cache_gib": 600 * slot_gib}, {"cache_gib": 600 * slot_gib, "share_prompts": False}):
        assert _tokens(generate(params, config, _PROMPTS, **ask, **changes, stats=stats)) == whole, changes
        assert stats["cache_gib"] <= changes.get("cache_gib", 1), changes
    alone = [generate(params, config, [prompt], seeds=[i], **ask)[0] for i, prompt in enumerate(_PROMPTS)]
    assert _tokens(alone) == whole
    assert _tokens(generate(params, config, _PROMPTS, seed=1, **ask)) != whole


def test_generate_says_the_same_from_several_processes():
    """With two threads the prompts are dealt out to two processes: same tokens; a fork that dies or fails is an error,
    one whose parent is gone ends, and none stays behind."""
    import multiprocessing

    import generate as generate_module

    params, config = _sampler()
    prompts, threads, said = [[i + 1, 7, i] for i in range(40)], torch.get_num_threads(), []
    parent, step = os.getpid(), generate_module.decode_step

    def die_in_the_fork(*args):
        return step(*args) if os.getpid() == parent else os.kill(os.getpid(), signal.SIGKILL)

    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with mock.patch.object(generate_module, "generate_in_processes",
                                   wraps=generate_module.generate_in_processes) as dealt:
                said.append(_tokens(generate(params, config, prompts, num_samples=2, max_new_tokens=9, stop_tokens=(3,),
                                             stats=(stats := {}))))
            assert dealt.called == (n == 2 and sys.platform == "linux")
            assert torch.get_num_threads() == n and stats["decode_s"] > 0
        assert said[0] == said[1]
        with mock.patch.object(generate_module, "decode_step", side_effect=RuntimeError("planted")):
            _raises(RuntimeError, ["planted"], generate, params, config, prompts, max_new_tokens=9)
        if sys.platform == "linux":
            with mock.patch.object(generate_module, "decode_step", die_in_the_fork):
                _raises(RuntimeError, ["-9", "memory"], generate, params, config, prompts, max_new_tokens=9)
        assert torch.get_num_threads() == 2 and not multiprocessing.active_children()
    finally:
        torch.set_num_threads(threads)


def test_generate_forks_end_with_their_parent():
    """A fork ends when its parent is killed: at work, or waiting to hand over answers, more than a pipe holds."""
    import select

    if sys.platform != "linux":
        raise unittest.SkipTest("forks are for Linux")
    script = """if True:
        import os, sys, time, generate
        parent = os.getpid()
        def stand_in(*args, **kwargs):
            if os.getpid() == parent:
                time.sleep(1)  # the fork is at it by then
                print("ready", flush=True)
            if os.getpid() == parent or sys.argv[1] == "at work":
                time.sleep(600)
            return ["x" * 2**20]
        generate.generate = stand_in
        generate.generate_in_processes({}, None, [[1], [1]], [[1], [1]], [0, 1], 2, {})
    """
    for what in ("at work", "handing over"):
        process = subprocess.Popen([sys.executable, "-c", script, what], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True, start_new_session=True)
        try:
            assert process.stdout.readline() == "ready\n"
            process.kill()
            process.wait()
            ended, _, _ = select.select([process.stdout], [], [], 5)  # at its end, once the fork has left it, too
            assert ended and process.stdout.read() == "", f"{what}, the fork outlived its parent by five seconds"
        finally:
            process.stdout.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_generate_cache_grows_past_its_blocks():
    params, config = _sampler(max_position_embeddings=300)
    [[answer]] = generate(params, config, [_PROMPTS[1] * 5], max_new_tokens=400, temperature=0.8, chunk=48)
    assert len(answer.tokens) == 200 and answer.finish == "length", "the context ends a row"
    scored = token_logprobs(params, config, torch.tensor([_PROMPTS[1] * 5 + answer.tokens]), 0.8)[0, 99:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_shared_prompts_need_less_cache():
    """8 prompts of 512 tokens, 16 samples of 128 new tokens: prompt + G x completion, not G x (prompt + completion)."""
    params, config = _sampler(max_position_embeddings=1024, num_hidden_layers=1)
    prompts, gib = [[i + 1] * 512 for i in range(8)], {}
    for share in (True, False):
        stats = {}
        generate(params, config, prompts, num_samples=16, max_new_tokens=128, max_batch=128, share_prompts=share, stats=stats)
        gib[share] = stats["cache_gib"]
    assert gib[True] <= 0.35 * gib[False], gib


def _chi_square(counts, probs):
    """Whether counts may come from probs: Pearson's statistic against its 0.9999 quantile (Wilson and Hilferty)."""
    if any(count and not p for count, p in zip(counts, probs)):
        return False
    cells = [(count, sum(counts) * p) for count, p in zip(counts, probs) if p]
    df = len(cells) - 1
    return sum((count - mean) ** 2 / mean for count, mean in cells) < df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


def test_generate_samples_the_right_distribution():
    params, config = _sampler(vocab_size=12)
    exact = (forward(params, config, torch.tensor([[3, 1, 4]]))[0, -1] / 0.8).softmax(-1).tolist()
    ranked = sorted(range(12), key=lambda t: -exact[t])
    for top_p, top_k in ((1.0, 0), (0.75, 0), (1.0, 5), (0.75, 5), (1e-6, 0), (1.0, 1)):
        kept = ranked[:top_k or 12]
        mass = sum(exact[t] for t in kept)
        nucleus = [t for i, t in enumerate(kept) if sum(exact[u] for u in kept[:i]) < top_p * mass]  # the fewest that hold top_p
        probs = [exact[t] / sum(exact[u] for u in nucleus) if t in nucleus else 0.0 for t in range(12)]
        rows = generate(params, config, [[3, 1, 4]], num_samples=2000, max_new_tokens=1, temperature=0.8, top_p=top_p, top_k=top_k,
                        max_batch=2000)[0]
        counts = [sum(row.tokens == [t] for row in rows) for t in range(12)]
        assert counts[ranked[0]] == 2000 if len(nucleus) == 1 else _chi_square(counts, probs), (top_p, top_k, counts, probs)


def test_generate_nucleus_of_a_flat_distribution():
    """Top-p looks at a thousand tokens first; where those hold too little, it must look at all."""
    logits = torch.zeros(2, 5000)
    logits[0, 7] = 20.0
    noise = torch.tensor([[0.1, 0.9999]]).T.expand(2, 2)
    for column in noise.T:
        tokens, logprobs = sample_tokens(logits, column, top_p=0.9)
        assert tokens[0] == 7 and abs(float(logprobs[1].exp()) - 1 / 5000) < 1e-6
    seen = {int(sample_tokens(logits, torch.full((2,), i / 64), top_p=0.9)[0][1]) for i in range(64)}
    assert len(seen) == 64, "the flat row draws from 4,500 tokens, 64 different ones at 64 levels"


def test_generate_draws_no_token_of_weight_zero():
    weights = torch.zeros(3, 128)
    weights[0, 5], weights[1, 127], weights[2, 0], weights[2, 64] = 0.3, 1e-30, 1.0, 1e-8
    for noise in (0.0, 0.5, 1 - 2**-24):
        drawn = inverse_cdf(weights, torch.full((3, 1), noise))
        assert (weights.gather(1, drawn) > 0).all()


def test_generate_noise_is_uniform_and_independent():
    keys = torch.tensor([row_key(0, i // 50, i % 50) for i in range(2500)])
    noise = torch.stack([uniform(keys, torch.full_like(keys, n)) for n in range(40)])  # [40, 2500]
    assert noise.min() >= 0 and noise.max() < 1
    assert _chi_square(torch.histc(noise, 50, 0, 1).tolist(), [1 / 50] * 50)
    for other in (noise.roll(1, 0), noise.roll(1, 1)):  # the next draw of a row, the same draw of its neighbour
        pairs = torch.histc((noise * 8).floor() * 8 + (other * 8).floor(), 64, -0.5, 63.5)
        assert _chi_square(pairs.tolist(), [1 / 64] * 64)


def test_generate_finish_reasons():
    params, config, tokenizer = _parrot("abcdefghi")
    prompt = tokenizer.encode("a").ids
    ask = {"max_new_tokens": 60, "temperature": 0, "tokenizer": tokenizer}

    def say(**changes):
        [[answer]] = generate(params, config, [prompt], **ask | changes)
        return tokenizer.decode(answer.tokens), answer.finish

    assert say(max_new_tokens=5) == ("bcdef", "length")
    assert say(stop_tokens=tokenizer.encode("d").ids) == ("bcd", "stop"), "the stop token is kept"
    assert say(stop_strings=["zz", "ef"]) == ("bcdef", "stop")
    assert say(repetition=40) == (("bcdefghia" * 5)[:40], "repetition"), "nine letters, four times and more"
    assert say(repetition=32)[1] == "length", "nine letters are more than a quarter of 32"


def test_generate_thinking_budget_closes_the_block():
    params, config, tokenizer = _parrot("abcdefghi")
    prompt = tokenizer.encode("<think>\na").ids
    [[answer]] = generate(params, config, [prompt], max_new_tokens=40, temperature=0, tokenizer=tokenizer, think_budget=6)
    assert tokenizer.decode(answer.tokens).startswith("bcdefg\n</think>\n")
    assert answer.forced == list(range(6, 16)) and len(answer.tokens) == len(answer.logprobs) == 40
    scored = token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4, "forced tokens carry the model's log-probability, too"
    [[other]] = generate(params, config, [tokenizer.encode("a").ids], max_new_tokens=40, temperature=0, tokenizer=tokenizer, think_budget=6)
    assert other.forced == [], "no block was opened"


def test_generate_thinking_minimum_takes_the_tag_back():
    """The model closes its block after one letter; the tag is taken back and "Wait" put there, until the minimum is reached."""
    params, config, tokenizer = _parrot("a</think>")
    prompt = tokenizer.encode("<think>>").ids  # ">" is followed by "a"
    [[answer]] = generate(params, config, [prompt], max_new_tokens=30, temperature=0, tokenizer=tokenizer, think_minimum=12)
    assert tokenizer.decode(answer.tokens).startswith("aWaithink>a</think>a"), tokenizer.decode(answer.tokens)
    assert answer.forced == [1, 2, 3, 4] and len(answer.tokens) == 30
    scored = token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_runs_on_adapters_and_copies():
    """An adapter counts; a packed copy says what the checkpoint says, and stays as it was when the checkpoint moves on."""
    params, config = _sampler()
    lora = {name: tensor + 0.3 if "lora_B" in name else tensor for name, tensor in init_lora(config, 2, 0).items()}
    ask = {"max_new_tokens": 12, "temperature": 0.9}
    plain, adapted = (_tokens(generate(p, config, _PROMPTS, **ask)) for p in (params, params | lora))
    assert plain != adapted
    assert _tokens(generate(merge_lora(params | lora), config, _PROMPTS, **ask)) == adapted
    packed = sampling_params(params | lora, config)
    for tensor in params.values():
        tensor.zero_()
    assert _tokens(generate(packed, config, _PROMPTS, **ask)) == adapted


def test_generate_in_bfloat16_stays_near_the_scorer():
    params, config = _sampler()
    answers = generate(sampling_params(params, config, torch.bfloat16), config, _PROMPTS, num_samples=2, max_new_tokens=16)
    gaps = [(token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:] - torch.tensor(answer.logprobs)).abs().mean()
            for prompt, row in zip(_PROMPTS, answers) for answer in row]
    assert 0 < sum(gaps) / len(gaps) < 0.1, gaps


def test_generate_layers_compile_to_one_graph():
    """What a GPU compiles, traced without a compiler: fullgraph raises where Python would have to step in; three layers share graphs."""
    params, config = _sampler(num_hidden_layers=3)
    for num_samples in (1, 2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ask = {"num_samples": num_samples, "max_new_tokens": 12, "temperature": 0.9}
        compiled = generate(params, config, _PROMPTS[:2], compile_backend="aot_eager", **ask)
        assert _tokens(compiled) == _tokens(generate(params, config, _PROMPTS[:2], **ask))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_refuses_bad_input():
    params, config = _sampler()
    good = {"prompts": [[1, 2]], "max_new_tokens": 4}
    for changes, words in (({"prompts": [[1], []]}, "prompt 1 is empty"), ({"prompts": [[1] * 512]}, "512 tokens"),
                           ({"prompts": [[61]]}, "vocabulary of 61"), ({"temperature": -1}, "temperature is -1"), ({"top_p": 0}, "top_p is 0"),
                           ({"top_p": 1.5}, "top_p is 1.5"), ({"top_k": -2}, "top_k is -2"), ({"num_samples": 0}, "num_samples is 0"),
                           ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_batch": 0}, "max_batch is 0"),
                           ({"stop_strings": ["x"]}, "need the tokenizer"), ({"temperature": float("nan")}, "temperature is nan")):
        try:
            generate(params, config, **good | changes)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{changes} was taken")
    assert generate(params, config, [], max_new_tokens=4) == []


def test_generate_streams_text_with_its_thinking_dimmed_or_hidden():
    _, _, tokenizer = _parrot("a")
    text = "Hm. <think>\n1 < 2\u00e9\n</think>\n\\boxed{2} <thin"
    ids = tokenizer.encode(text).ids
    for hide, dim, expected in ((False, False, text), (True, False, "Hm. \n\\boxed{2} <thin"),
                                (False, True, text.replace("<think>", "\033[2m<think>").replace("</think>", "</think>\033[0m"))):
        written = []
        show = text_streamer(tokenizer, {0}, written.append, hide=hide, dim=dim)
        for n in range(1, len(ids) + 1):
            show(ids[:n])
            assert not "".join(written).endswith("<"), "what may become a tag is kept back"
        show([*ids, 0], last=True)
        assert "".join(written).replace("\033[0m\033[2m", "") == expected, written

# ------------------------------------------------------------------------------------------------ eval.py

import contextlib
import importlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import tempfile
from collections import Counter
from unittest import mock


def _bytes_tokenizer():
    """A tokenizer of single bytes and ChatML's three special tokens, made on the spot."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer


def _small_model(seed=0):
    from model import Config, init_params

    config = Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=(258,),
    )
    return init_params(config, seed), config, _bytes_tokenizer()


def _scripted(reply_fn, calls=None):
    """A generate() whose completions are reply_fn(prompt text, prompt seed, sample); a reply without its end was cut off."""
    from generate import Completion

    tokenizer = _bytes_tokenizer()

    def generate(params, config, prompts, *, num_samples=1, seeds=None, max_new_tokens=100, **_):
        if calls is not None:
            calls.append(len(prompts))
        rows = []
        for i, prompt in enumerate(prompts):
            text, row = tokenizer.decode(prompt, skip_special_tokens=False), []
            for sample in range(num_samples):
                tokens = tokenizer.encode(
                    reply_fn(text, seeds[i] if seeds else i, sample) + "<|im_end|>", add_special_tokens=False
                ).ids
                row.append(
                    Completion(
                        tokens[:max_new_tokens],
                        [-0.25] * min(len(tokens), max_new_tokens),
                        "stop" if len(tokens) <= max_new_tokens else "length",
                    )
                )
            rows.append(row)
        return rows

    return generate


def _sums(n):
    return [
        {"id": f"sum/{i}", "problem": f"{i}+1", "answer": str(i + 1), "level": i % 5 + 1, "subject": "sums"}
        for i in range(n)
    ]


def test_eval_wilson_is_the_root_of_its_definition():
    """The bounds are the p for which correct/n lies 1.96 standard errors of p away; found here by bisection."""
    from eval import interval, wilson

    for correct, n in ((0, 7), (3, 7), (7, 7), (120, 500), (499, 500), (1, 1319)):
        rate, z = correct / n, 1.959963984540054
        gap = lambda p: abs(rate - p) - z * math.sqrt(p * (1 - p) / n)  # negative inside the interval
        for bound, outside in zip(wilson(correct, n), (0.0, 1.0)):
            inside = rate
            if correct in (0, n) and outside == rate:
                assert abs(bound - rate) < 1e-9, (correct, n, bound)
                continue
            for _ in range(100):
                middle = (inside + outside) / 2
                inside, outside = (middle, outside) if gap(middle) < 0 else (inside, middle)
            assert abs(bound - inside) < 1e-9, (correct, n, bound, inside)
        assert [round(x, 12) for x in interval([1] * correct + [0] * (n - correct))] == [
            round(x, 12) for x in (rate, *wilson(correct, n))
        ]


def test_eval_interval_counts_problems_not_samples():
    """40 problems with ten equal samples each know no more than 40 problems; samples that differ narrow the interval, to 400 at best."""
    from eval import interval, wilson

    rate, low, high = interval([1.0] * 10 + [0.0] * 30)
    assert (rate, low, high) == (0.25, *wilson(10, 40))
    _, low, high = interval([0.2, 0.3] * 20)
    assert 0 < low and high - low < 0.5 * (wilson(10, 40)[1] - wilson(10, 40)[0])
    assert interval([0.5] * 8)[1:] == wilson(4, 8), "no variance at all is no certainty"


def test_eval_interval_covers():
    """Of 400 simulated evaluations of 60 problems, 4 samples each, about 95 % of the intervals hold the true rate."""
    from eval import interval

    rng, held = random.Random(0), 0
    for _ in range(400):
        rates = [rng.betavariate(0.6, 1.4) for _ in range(60)]  # mean 0.3: most problems easy or hard, as real ones are
        _, low, high = interval([sum(rng.random() < p for _ in range(4)) / 4 for p in rates])
        held += low <= 0.3 <= high
    assert 0.92 <= held / 400 <= 0.98, held


def test_eval_pass_at_k_is_the_mean_over_subsets():
    from infer_scale import pass_at_k

    for n, c in ((1, 0), (1, 1), (6, 0), (6, 2), (7, 6), (8, 8)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(outcomes, k)]
            assert abs(pass_at_k(n, c, k) - sum(subsets) / len(subsets)) < 1e-12, (n, c, k)
    for k in (0, 5):
        try:
            pass_at_k(4, 2, k)
        except ValueError:
            continue
        raise AssertionError(f"pass@{k} of 4 samples has no meaning")


def test_eval_maj_at_k_is_the_mean_over_subsets():
    """Brute force over every subset, with silent samples, ties shared, and no right class, one, or two."""
    from eval import maj_at_k

    rng = random.Random(1)
    for _ in range(150):
        votes = [rng.choice((None, 0, 0, 1, 2)) for _ in range(rng.randint(1, 8))]
        right = {c for c in (0, 2) if rng.random() < 0.6}
        for k in range(1, len(votes) + 1):
            total = count = 0
            for subset in itertools.combinations(votes, k):
                counts = Counter(v for v in subset if v is not None)
                leaders = [v for v in counts if counts[v] == max(counts.values())]
                total += sum(v in right for v in leaders) / len(leaders) if leaders else 0
                count += 1
            assert abs(maj_at_k(votes, right, k) - total / count) < 1e-12, (votes, right, k)


def test_eval_bootstrap_agrees_with_the_exact_binomial():
    """When B solves 30 of 200 problems more and loses none, a resample's mean is Binomial(200, 0.15)/200 exactly."""
    from eval import paired_bootstrap

    a, b = [0] * 200, [1] * 30 + [0] * 170
    change, low, high = paired_bootstrap(a, b, draws=20_000)
    chances = [math.comb(200, x) * 0.15**x * 0.85 ** (200 - x) for x in range(201)]
    quantile = lambda q: next(x for x in range(201) if sum(chances[: x + 1]) >= q) / 200
    assert change == 0.15
    assert abs(low - quantile(0.025)) <= 1 / 200 and abs(high - quantile(0.975)) <= 1 / 200, (low, high)
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0), "pairing removes what both runs share"


def test_eval_mcnemar_is_the_exact_sign_test():
    """Against all 2^n ways in which the problems that differ could have fallen."""
    from eval import mcnemar

    for gained, lost in ((0, 0), (1, 0), (3, 3), (9, 2), (0, 10)):
        n = gained + lost
        ways = [abs(2 * sum(bits) - n) >= abs(gained - lost) for bits in itertools.product((0, 1), repeat=n)]
        assert abs(mcnemar(gained, lost) - sum(ways) / len(ways)) < 1e-12, (gained, lost)


def test_eval_prompts_to_the_letter():
    """The published protocols fail by a space: demonstrations joined by blank lines, nothing behind the last colon."""
    from eval import PRESETS, prompt_hash, render_prompt

    problem = {"problem": r"What is {x} in \boxed{}?"}
    assert (
        render_prompt("plain", problem)
        == "<|im_start|>user\nWhat is {x} in \\boxed{}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt("plain", problem, system="S").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n")
    boxed = render_prompt("boxed", problem, system="the model's own")
    assert boxed.startswith(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    ), boxed
    gsm8k = render_prompt("qwen-base-gsm8k", problem)
    assert (
        gsm8k.count("Question: ") == 5 and gsm8k.count("The answer is ") == 4 and gsm8k.endswith("\\boxed{}?\nAnswer:")
    )
    assert "The answer is 8.\n\nQuestion: What is {x}" in gsm8k and "\\\n" not in gsm8k
    minerva = render_prompt("minerva-math", problem)
    assert (
        minerva.count("Problem:\n") == 5
        and minerva.count("I hope it is correct.\n\nProblem:\n") == 4
        and minerva.endswith("?\n\nSolution:")
    )
    assert "<thought>" in render_prompt("r1", problem, think_tag="thought") and "<think>" not in render_prompt(
        "r1", problem, think_tag="thought"
    )
    shot = {"problem": "2*3", "solution": "2*3=<<2*3=6>>6", "answer": "6"}
    assert render_prompt("cot", problem, shots=[shot]).startswith(
        "<|im_start|>user\n2*3\nLet's think step by step.<|im_end|>\n<|im_start|>assistant\n<think>\n2*3=6\n</think>\n\\boxed{6}<|im_end|>\n"
    )
    hashes = [prompt_hash(p) for p in PRESETS if p != "few-shot-cot"] + [
        prompt_hash("plain", system="S"),
        prompt_hash("cot", shots=[shot]),
    ]
    assert len(set(hashes)) == len(hashes) and prompt_hash("few-shot-cot") == prompt_hash("cot"), hashes


def test_eval_corpus_says_what_the_prompts_ask():
    """The tiny model knows its prompts from its corpus, so the two texts must be one."""
    import eval as eval_module
    import refine

    corpus = (ROOT / "data" / "tiny" / "corpus.py").read_text(encoding="utf-8")
    for text in (eval_module.COT.removeprefix("{problem}"), refine.CHECK, refine.AGAIN, refine.APPROVAL):
        assert json.dumps(text) in corpus, text


def test_eval_examples_are_never_problems_asked():
    from argparse import Namespace

    from eval import load_shots

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        path.write_text("".join(json.dumps(p | {"solution": "so"}) + "\n" for p in _sums(30)), encoding="utf-8")
        args = Namespace(shots_from=None, data_seed=0)
        try:
            load_shots(args, str(path), _sums(30), 2)
        except ValueError as error:
            assert "--shots-from" in str(error), error
        else:
            raise AssertionError("an example with its answer stood in front of the same problem")
        assert len(load_shots(args, "arithmetic", [], 3)) == 3
        assert load_shots(args, "arithmetic", [], 3) == load_shots(args, "arithmetic", [], 5)[:3], (
            "few are the first of many"
        )


def test_eval_counts_what_there_is_to_count():
    """One record of each kind: right in the box, right only in words, cut off, silent, undecided."""
    import eval as eval_module

    replies = {
        0: "\\boxed{1}",
        1: "the answer is 2",
        2: "<think>\nlet me see, 2 and 1 make ...",
        3: "no idea",
        4: "\\boxed{6}",
    }
    reply = lambda text, seed, sample: replies[int(re.search(r"user\n(\d+)\+1", text)[1])]
    undecided = lambda pairs, strict: [
        None if "{6}" in text else eval_module.extract_answer(text, strict) == ref for text, ref in pairs
    ]
    with (
        mock.patch.object(eval_module, "generate", _scripted(reply)),
        mock.patch.object(eval_module, "verify_many", undecided),
    ):
        records = eval_module.evaluate(None, *_small_model()[1:], _sums(5), max_new_tokens=20, progress=False)
    row = eval_module.summarize(records, method="greedy", prompt="plain")
    assert (row["accuracy"], row["strict"][0], row["lenient"][0]) == (0.2, 0.2, 0.4), row
    assert (row["truncated"], row["no_answer"], row["undecided"], row["n"]) == (0.2, 0.6, 1, 5), row
    assert eval_module.summarize(records, method="greedy", prompt="plain", grade="lenient")["accuracy"] == 0.4
    lengths = [len(r) + 1 for r in (replies[0], replies[1])] + [20, len(replies[3]) + 1, len(replies[4]) + 1]
    assert (
        row["tokens_mean"] == sum(lengths) / 5
        and row["tokens_median"] == sorted(lengths)[2]
        and row["tokens_per_correct"] == sum(lengths)
    )
    assert row["levels"]["1"][0] == 1.0 and row["levels"]["2"][0] == 0.0 and row["levels"]["1"][3] == 1


def test_eval_votes_pool_equivalent_answers():
    """\\frac12, 0.5 and 2/4 are one candidate; a sample without a box casts no vote, not even for its last number."""
    import eval as eval_module

    replies = ["\\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{2/4}", "\\boxed{3}", "\\boxed{3}", "it is 3", "or 3"]
    problem = [{"id": "a", "problem": "half?", "answer": "1/2"}]
    with mock.patch.object(eval_module, "generate", _scripted(lambda text, seed, sample: replies[sample])):
        [record] = eval_module.evaluate(
            None, *_small_model()[1:], problem, num_samples=7, temperature=1.0, max_new_tokens=50, progress=False
        )
    votes, right = eval_module.votes_of(record)
    assert votes == [0, 0, 0, 1, 1, None, None] and right == {0}
    row = eval_module.summarize([record], method="sampled", prompt="plain")
    assert row["maj_at"]["5"][0] > row["maj_at"]["1"][0] == row["accuracy"] == 3 / 7
    assert abs(row["pass_at"]["1"][0] - 3 / 7) < 1e-12 and row["pass_at"]["5"][0] == 1.0


def test_eval_interrupted_run_ends_with_the_same_records():
    """Killed in its third chunk with half a line written, the run goes on; nothing is asked twice, and the order is kept."""
    import eval as eval_module

    problems, wrong = _sums(11), lambda text, seed, sample: f"\\boxed{{{seed % 3}}}"
    model = (None, *_small_model()[1:])
    options = {"max_new_tokens": 50, "max_batch": 1, "settings": {"model": "m", "temperature": 0.0}, "progress": False}
    bare = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    with tempfile.TemporaryDirectory() as folder:
        path, calls = Path(folder) / "records.jsonl", []
        with mock.patch.object(eval_module, "generate", _scripted(wrong)):
            whole = eval_module.evaluate(*model, problems, **options)

        def killed(*args, **kwargs):
            if len(calls) == 2:
                raise KeyboardInterrupt
            return _scripted(wrong, calls)(*args, **kwargs)

        with mock.patch.object(eval_module, "generate", killed):
            try:
                eval_module.evaluate(*model, problems, **options, path=path)
            except KeyboardInterrupt:
                pass
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") == 6
        path.write_text(text + text[:70], encoding="utf-8")  # the machine went down while a line was written
        with mock.patch.object(eval_module, "generate", _scripted(wrong, calls)):
            resumed = eval_module.evaluate(*model, problems, **options, path=path)
            assert bare(resumed) == bare(whole) and sum(calls) == 11, calls
            assert bare(eval_module.read_records(path).values()) == bare(whole)
            try:
                eval_module.evaluate(
                    *model, problems, **options | {"settings": {"model": "m", "temperature": 1.0}}, path=path
                )
            except ValueError as error:
                assert "temperature 0.0 (now 1.0)" in str(error), error
            else:
                raise AssertionError("records of two different runs were mixed")


def test_eval_a_record_depends_on_its_problem_alone():
    """Real sampling on random weights: the same completions alone, in any batch, in any order."""
    from eval import evaluate

    model, problems = _small_model(), _sums(9)
    options = {"num_samples": 3, "temperature": 1.0, "max_new_tokens": 12, "progress": False}
    texts = lambda records: {r["id"]: [s["text"] for s in r["samples"]] for r in records}
    together = texts(evaluate(*model, problems, **options))
    assert texts(evaluate(*model, problems[::-1], **options, max_batch=2)) == together
    assert texts(evaluate(*model, problems[4:5], **options)) == {"sum/4": together["sum/4"]}
    assert len({t for row in together.values() for t in row}) == 27, "every sample has noise of its own"
    assert texts(evaluate(*model, problems, **options, seed=1)) != together


def test_eval_compare_is_paired():
    import eval as eval_module

    with tempfile.TemporaryDirectory() as folder:
        for name, right in (("a", 4), ("b", 9)):
            reply = lambda text, seed, sample: (
                f"\\boxed{{{(n := int(re.search(r'user.(.+?)[+]1', text, re.S)[1])) + (1 if n < right else 7)}}}"
            )
            with mock.patch.object(eval_module, "generate", _scripted(reply)):
                eval_module.evaluate(
                    None,
                    *_small_model()[1:],
                    _sums(12)[: 12 if name == "a" else 10],
                    max_new_tokens=50,
                    progress=False,
                    path=Path(folder) / name,
                    settings={"prompt": "plain", "model": name},
                )
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            eval_module.compare(Path(folder) / "a", Path(folder) / "b")
    assert "40.0" in out.getvalue() and "90.0" in out.getvalue() and "difference in points: +50.0" in out.getvalue(), (
        out.getvalue()
    )
    assert (
        "model 'a' / 'b'" in out.getvalue() and "5 problems gained, 0 lost; McNemar's exact p = 0.062" in out.getvalue()
    ), out.getvalue()


def test_eval_rows_are_found_by_what_they_are():
    """The report takes the newest row that agrees in every field, and weights are told apart by content, not by path."""
    from eval import append_row, find_row, fingerprint, read_rows
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        assert read_rows(path) == []
        for accuracy, weights in ((0.1, "x"), (0.2, "x"), (0.3, "y")):
            append_row(path, {"method": "greedy", "weights": weights, "accuracy": accuracy})
        assert find_row(read_rows(path), method="greedy", weights="x")["accuracy"] == 0.2
        assert find_row(read_rows(path), method="greedy", weights="z") is None
        assert {"command", "commit", "torch"} <= set(read_rows(path)[0])
        prints = []
        for value in (0.0, 0.0, 1.0):
            save_file({"w": torch.full((4,), value)}, Path(folder) / "model.safetensors")
            prints.append(fingerprint(folder))
        assert prints[0] == prints[1] != prints[2]


def test_eval_user_errors_are_one_line():
    cases = {
        "eval.py --data nowhere.jsonl": "nowhere.jsonl",
        "eval.py --num-samples 4": "temperature",
        "eval.py --compare no.jsonl no.jsonl": "no.jsonl",
        "infer_scale.py --num-samples 4 --votes 5": "--votes",
        "refine.py --prompt minerva-math": "no chat",
    }
    with tempfile.TemporaryDirectory() as folder:
        from model import save_model

        params, config, tokenizer = _small_model()
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        save_model(Path(folder) / "model", params, config, like=folder)
        for command, expected in cases.items():
            script, *flags = command.split()
            module = importlib.import_module(script.removesuffix(".py"))
            try:
                args = module.parse_args(
                    [*flags, "--model", str(Path(folder) / "model"), "--results", str(Path(folder) / "r.jsonl")]
                )
                with contextlib.redirect_stdout(io.StringIO()):
                    module.main(args)
            except (ValueError, FileNotFoundError) as error:
                assert expected in str(error) and "\n" not in str(error), (command, error)
            else:
                raise AssertionError(f"{command} went through")
        done = subprocess.run(
            [sys.executable, ROOT / "eval.py", "--model", folder + "/none"], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done


def test_eval_report_measures_what_is_missing_and_nothing_else():
    """Rows of other weights, shots or temperatures do not pass for the ones asked; each script is run once, for all its rows."""
    import eval as eval_module
    from model import save_model

    ran = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        params, config, tokenizer = _small_model()
        tokenizer.save(str(folder / "tokenizer.json"))
        save_model(folder / "base", params, config, like=folder)
        save_model(folder / "trained", _small_model(seed=1)[0], config, like=folder)
        same = {"data": "arithmetic", "split": "test", "data_seed": 0, "seed": 0, "n": 10, "shots": 0, "grade": "strict", "seconds": 1.0}
        shares = {
            "accuracy": 0.5,
            "low": 0.4,
            "high": 0.6,
            "tokens_mean": 20.0,
            "tokens_per_correct": 40.0,
            "levels": {"1": [0.5, 0.4, 0.6, 5], "2": [0.3, 0.1, 0.6, 5]},
        }
        results = str(folder / "results.jsonl")

        def neighbour(script, *flags):
            flags = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
            ran.append(
                (script, Path(flags["model"]).name, flags["prompt"] + (", sampled" if "num-samples" in flags else ""))
            )
            row = (
                same
                | shares
                | {"weights": eval_module.fingerprint(flags["model"]), "prompt": flags["prompt"], "temperature": 0.7}
            )
            methods = {
                "eval.py": ["sampled" if "num-samples" in flags else "greedy"],
                "infer_scale.py": ["one sample", "majority of 10"],
                "refine.py": ["refine, K = 2", "self-consistency at the tokens of K = 2"],
            }[script]
            for method in methods:
                eval_module.append_row(
                    results, row | {"method": method} | ({"temperature": 0.0} if method == "greedy" else {})
                )

        decoy = (
            same
            | shares
            | {
                "weights": eval_module.fingerprint(folder / "base"),
                "method": "greedy",
                "prompt": "plain",
                "temperature": 0.0,
            }
        )
        for wrong in (
            {"shots": 4},
            {"weights": "other"},
            {"temperature": 0.7},
            {"n": 11},
            {"prompt": "cot", "split": "dev"},
        ):
            eval_module.append_row(results, decoy | wrong | {"accuracy": 0.99})
        args = eval_module.parse_args(
            [
                "--report",
                "--model",
                str(folder / "base"),
                "--trained",
                str(folder / "trained"),
                "--limit",
                "10",
                "--results",
                results,
                "--out",
                str(folder / "out"),
            ]
        )
        with mock.patch.object(eval_module, "run_neighbour", neighbour), contextlib.redirect_stdout(io.StringIO()):
            eval_module.main(args)
            assert ran == [
                ("eval.py", "base", "plain"),
                ("eval.py", "base", "cot"),
                ("infer_scale.py", "base", "cot"),
                ("refine.py", "base", "cot"),
                ("eval.py", "trained", "plain"),
                ("eval.py", "base", "plain, sampled"),
                ("eval.py", "trained", "plain, sampled"),
            ], ran
            eval_module.main(args)
            assert len(ran) == 7, "what is there is not measured again"
        text = (folder / "out" / "results.md").read_text(encoding="utf-8")
        assert text.count("50.0 [40.0, 60.0]") == 9 and "99.0" not in text and "| + GRPO |" in text, text

# ------------------------------------------------------------------------------------------------ infer_scale.py


def test_scale_majority_vote_by_hand():
    from infer_scale import majority_vote

    assert majority_vote(["3", "1/2", None, "0.5", "3", "\\frac{2}{4}"]) == "1/2", (
        "three spellings of a half outvote two threes"
    )
    assert majority_vote(["7", "8"]) == "7", "of equals, the first"
    assert majority_vote(["7", "8"], weights=[0.1, 0.2]) == "8"
    assert majority_vote([None, None]) is None and majority_vote([]) is None


def test_scale_best_of_k_is_the_mean_over_subsets():
    from infer_scale import best_of_k

    rng = random.Random(2)
    for _ in range(60):
        n = rng.randint(1, 8)
        confidences, right = [rng.random() for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]
        for k in range(1, n + 1):
            picks = [right[max(subset, key=lambda i: confidences[i])] for subset in itertools.combinations(range(n), k)]
            assert abs(best_of_k(confidences, right, k) - sum(picks) / len(picks)) < 1e-12


def test_scale_weighted_vote():
    """Equal weights are the plain vote; a confident minority can win; subsets of k average to the brute-force mean."""
    from eval import maj_at_k
    from infer_scale import vote_once, weighted_maj_at_k

    votes, right, weights = [0, 0, 1, None, 1, 1], {0}, [0.9, 0.8, 0.1, 0.9, 0.2, 0.3]
    assert vote_once(votes, right) == 0.0 and vote_once(votes, right, weights) == 1.0
    assert vote_once([None], right) == 0.0 and vote_once([0, 1], right) == 0.5
    assert weighted_maj_at_k(votes, right, [1] * 6, 6) == maj_at_k(votes, right, 6)
    exact = [
        vote_once([votes[i] for i in s], right, [weights[i] for i in s]) for s in itertools.combinations(range(6), 3)
    ]
    drawn = weighted_maj_at_k(votes, right, weights, 3, draws=4000)
    assert abs(drawn - sum(exact) / len(exact)) < 0.03, (drawn, sum(exact) / len(exact))


def test_scale_lead_is_the_beta_tail():
    """Against the integral of x^a (1-x)^b above one half, by small steps."""
    from infer_scale import leads

    for a, b in ((0, 0), (3, 0), (4, 0), (5, 2), (2, 5), (12, 8)):
        grid = [(i + 0.5) / 20000 for i in range(20000)]
        mass = [x**a * (1 - x) ** b for x in grid]
        assert abs(leads(a, b) - sum(mass[10000:]) / sum(mass)) < 1e-6, (a, b)


def test_scale_a_decided_vote_cannot_turn():
    """Stopped once the rest cannot change it, the vote ends as the full one would, whatever the order; surer stops later."""
    from infer_scale import adaptive, samples_until_decided, vote_once

    rng = random.Random(3)
    for _ in range(200):
        votes = [rng.choice((None, 0, 0, 0, 1, 2)) for _ in range(rng.randint(1, 12))]
        used = samples_until_decided(votes)
        totals = Counter(v for v in votes if v is not None)
        if used < len(votes):
            assert vote_once(votes[:used], {0}) == vote_once(votes, {0}) in (0.0, 1.0), votes
        success, mean_used = adaptive(votes, {0}, None)
        assert abs(success - vote_once(votes, {0})) < 1e-12 and mean_used <= len(votes), (votes, totals)
    assert samples_until_decided([0] * 20, 0.95) == 4 and samples_until_decided([0] * 20, 0.9) == 3
    assert samples_until_decided([0] * 20) == 11 and samples_until_decided([0, 1] * 10, 0.95) == 20


def _scale_run(problems, ask):
    from eval import Run

    params, config, tokenizer = _small_model()
    ask = {
        "prompt": "cot",
        "system": None,
        "shots": [],
        "think_tag": "think",
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "max_new_tokens": 100,
        "max_batch": 64,
    } | ask
    return Run(params, config, tokenizer, problems, ask, {"model": "scripted", "data": "sums", "split": "test"})


def test_scale_budget_by_level():
    """A model that is right once it may think 10 tokens per level: the table and the verdict on each level follow."""
    import eval as eval_module
    import infer_scale
    from generate import Completion

    tokenizer = _bytes_tokenizer()

    def generate(params, config, prompts, *, think_budget=0, temperature, **_):
        assert temperature == 0
        rows = []
        for prompt in prompts:
            n = int(re.search(r"user\n(\d+)\+1", tokenizer.decode(prompt, skip_special_tokens=False))[1])
            needed = 10 * (n % 2 + 1)
            thought = "." * min(needed, think_budget or needed)
            tokens = tokenizer.encode(f"{thought}\\boxed{{{n + 1 if len(thought) == needed else 99}}}").ids
            rows.append([Completion(tokens, [-0.1] * len(tokens), "stop")])
        return rows

    problems = [p | {"level": i % 2 + 1} for i, p in enumerate(_sums(40))]
    out, args = io.StringIO(), infer_scale.parse_args(["--budgets", "5", "10", "15"])
    with (
        mock.patch.object(eval_module, "generate", generate),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        rows = infer_scale.sweep_budget(_scale_run(problems, {}), args)
    assert (
        [r["accuracy"] for r in rows] == [0, 0.5, 0.5, 1]
        and rows[1]["levels"]["1"][0] == 1
        and rows[1]["levels"]["2"][0] == 0
    )
    assert (
        "level 1: 10 tokens of thought are not" in out.getvalue()
        and "level 2: every budget tried costs" in out.getvalue()
    ), out.getvalue()
    assert "| thought of at most 10 tokens | 50.0 |" in out.getvalue(), "half of the thoughts were cut"


def test_scale_every_method_costs_what_it_draws():
    """From one scripted pool: rows of k votes cost k samples, the majority is right where one sample often is not."""
    import eval as eval_module
    import infer_scale

    def reply(text, seed, sample):  # two of three samples are right, the wrong ones differ
        n = int(re.search(r"user\n(\d+)\+1", text)[1])
        return f"\\boxed{{{n + 1 + (20 * sample if sample % 3 == 0 else 0)}}}"

    problems = [p | {"problem": f"{10 + i}+1", "answer": str(11 + i)} for i, p in enumerate(_sums(10))]
    problems, run = [p for p in problems], _scale_run(problems, {})
    args = infer_scale.parse_args(["--num-samples", "9", "--votes", "3", "9"])
    out = io.StringIO()
    with (
        mock.patch.object(eval_module, "generate", _scripted(reply)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        records, settings = eval_module.measure(run, num_samples=9)
        rows = {r["method"]: r for r in infer_scale.self_consistency(records, settings, args)}
    assert abs(rows["one sample"]["accuracy"] - 7 / 9) < 1e-9, "sample 0 is off by nothing, 3 and 6 are wrong"
    assert (
        rows["majority of 9"]["accuracy"] == 1.0
        and rows["one sample"]["accuracy"] < rows["majority of 3"]["accuracy"] < 1
    )
    assert (
        rows["majority of 9"]["tokens_mean"]
        == 9 * rows["one sample"]["tokens_mean"]
        == 9 * rows["best of 9 by mean log-probability"]["tokens_mean"] / 9
    )
    assert (
        rows["adaptive majority, outcome fixed"]["accuracy"] == 1.0
        and rows["adaptive majority, outcome fixed"]["samples"] < 9
    )
    assert "| 0.9 | 0.0 | - |" in out.getvalue(), "nobody holds nine tenths of the votes, so nothing is answered"

# ------------------------------------------------------------------------------------------------ refine.py


def test_refine_finds_the_answer_span():
    """The characters of the last box, and the tokens that write them, whatever the tokens' borders."""
    from tokenizers import AddedToken

    from refine import box_span, token_span

    tokenizer = _bytes_tokenizer()
    tokenizer.add_tokens([AddedToken("4}", normalized=False)])
    text = "<think>\n\\boxed{1}\n</think>\n\\boxed{\\frac{1}{24}} done"
    begin, end = box_span(text)
    assert text[begin:end] == "\\frac{1}{24}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    first, last = token_span(tokenizer, tokens, begin, end)
    assert tokenizer.decode(tokens[first:last]) == "\\frac{1}{24}", "the token that holds 4 and } counts whole"
    assert box_span("no box") is None and box_span("\\boxed{never closed") is None and box_span("\\boxed{}") == (7, 7)


def test_refine_scores_are_the_models_own_logprobs():
    """What response_logprobs finds behind a prompt is what the sampler recorded at temperature 1, in any batch."""
    from generate import generate
    from refine import response_logprobs, score_response

    params, config, tokenizer = _small_model()
    prompts = [list(range(3, 3 + n)) for n in (4, 9, 6)]
    drawn = [
        row[0] for row in generate(params, config, prompts, max_new_tokens=11, temperature=1.0, stop_tokens=(258,))
    ]
    for max_batch in (1, 64):
        found = response_logprobs(params, config, prompts, [c.tokens for c in drawn], max_batch)
        assert all(abs(a - b) < 1e-4 for mine, c in zip(found, drawn) for a, b in zip(mine, c.logprobs)) and list(
            map(len, found)
        ) == [len(c.tokens) for c in drawn]
    text = "a\\boxed{42}"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids + [258]
    scores = score_response(tokenizer, tokens, [-float(i) for i in range(len(tokens))], text, "think")
    assert (
        scores["answer-total"] == -17.0
        and scores["answer-mean"] == -8.5
        and scores["total"] == -66.0
        and scores["mean"] == -5.5
    )
    assert (
        scores["format"] == 1.0
        and score_response(tokenizer, tokens[:3], [-1.0] * 3, "a\\b", "think")["answer-mean"] == -math.inf
    )


def _refine_reply(log):
    """Drafts are off by one; the critic doubts all but multiples of 3; a revision is right for even numbers, else unchanged."""

    def reply(text, seed, sample):
        n, turns = int(re.search(r"user\n(\d+)\+1", text)[1]), text.count("<|im_start|>assistant\n")
        log.append(text)
        if turns == 1:
            return f"\\boxed{{{n + 2}}}"
        if turns == 2:
            return "Every step is right." if n % 3 == 0 else "Step 1 is wrong."
        return f"\\boxed{{{n + (1 if n % 2 == 0 else 2)}}}"

    return reply


def _refine(problems, rounds, accept_fn, log):
    import refine as refine_module
    from eval import render_prompt

    params, config, tokenizer = _small_model()
    prompts = [tokenizer.encode(render_prompt("cot", p), add_special_tokens=False).ids for p in problems]
    with mock.patch.object(refine_module, "generate", _scripted(_refine_reply(log))):
        return refine_module.refine(
            params,
            config,
            tokenizer,
            prompts,
            rounds=rounds,
            accept_fn=accept_fn,
            max_new_tokens=60,
            critique_prompt="Check each step.",
            revise_prompt="Solve it again.",
            approval="Every step is right.",
        )


def test_refine_rounds_by_hand():
    """Six problems through two rounds: approved, settled and open ones, what each costs, and what the model is shown."""
    log = []
    history = _refine(_sums(6), 2, lambda i, k, old, new: True, log)
    answers = [[s.attempt.answer for s in states] for states in history]
    assert answers == [
        ["2", "2", "2"],
        ["3", "3", "3"],
        ["4", "3", "3"],
        ["5", "5", "5"],
        ["6", "5", "5"],
        ["7", "7", "7"],
    ], answers
    box, approve, doubt = len("\\boxed{2}") + 1, len("Every step is right.") + 1, len("Step 1 is wrong.") + 1
    spent = [[s.spent for s in states] for states in history]
    assert spent[0] == [box, box + approve, box + approve], "approved: settled after one critique"
    assert spent[1] == [box, 2 * box + doubt, 2 * box + doubt], "the same answer again: settled after one revision"
    assert spent[2] == [box, 2 * box + doubt, 3 * box + 2 * doubt], "a new answer was accepted: one more round"
    assert [s.settled for s in history[2]] == [False, False, True] and history[2][2].revision.answer == "3"
    assert len(log) == 6 + 6 + 4 + 2 + 2, "drafts, critiques, revisions; then the two that are open"
    assert log[12] == (
        "<|im_start|>user\n1+1\nLet's think step by step.<|im_end|>\n<|im_start|>assistant\n\\boxed{3}<|im_end|>\n"
        "<|im_start|>user\nCheck each step.<|im_end|>\n<|im_start|>assistant\nStep 1 is wrong.<|im_end|>\n"
        "<|im_start|>user\nSolve it again.<|im_end|>\n<|im_start|>assistant\n"
    ), log[12]


def test_refine_gate_keeps_the_old_answer():
    log = []
    history = _refine(_sums(6), 1, lambda i, k, old, new: False, log)
    assert [s[1].attempt.answer for s in history] == [str(i + 2) for i in range(6)]
    assert history[2][1].spent > history[2][0].spent and not history[2][1].accepted, "a refused revision is paid for"


def test_refine_loop_never_sees_the_reference():
    """Run twice by the command's own main, with right and with absurd reference answers: the model is asked and says the very same."""
    import eval as eval_module
    import refine as refine_module

    traces, asked = [], []
    with tempfile.TemporaryDirectory() as folder:
        for answers in ("right", "absurd"):
            problems = [p if answers == "right" else p | {"answer": "-77"} for p in _sums(6)]
            run, log, path = _scale_run(problems, {}), [], Path(folder) / answers
            args = refine_module.parse_args(
                [
                    "--traces",
                    str(path),
                    "--rounds",
                    "2",
                    "--results",
                    str(Path(folder) / "rows"),
                    "--approval",
                    "Every step is right.",
                ]
            )
            with (
                mock.patch.object(refine_module, "open_run", lambda *a, **k: run),
                contextlib.redirect_stdout(io.StringIO()),
                mock.patch.object(refine_module, "generate", _scripted(_refine_reply(log))),
                contextlib.redirect_stderr(io.StringIO()),
                mock.patch.object(eval_module, "generate", _scripted(_refine_reply([]))),
            ):
                refine_module.main(args)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            traces.append([[{k: v for k, v in r.items() if k != "right"} for r in row["rounds"]] for row in rows])
            asked.append(log[: len(_calls_of(traces[-1]))])
        assert traces[0] == traces[1] and asked[0] == asked[1]
        rows = [json.loads(line) for line in (Path(folder) / "rows").read_text(encoding="utf-8").splitlines()]
    rows = {r["method"]: r["accuracy"] for r in rows if r["accuracy"] > 0}
    assert rows["refine, K = 2, oracle gate (a bound)"] == 2 / 6, rows


def _calls_of(traces):
    """One draft each, and the critiques and revisions that were asked for."""
    return [
        x
        for rounds in traces
        for r in rounds
        for x in ("draft" if r is rounds[0] else None, r["critique"], r["revision"])
        if x
    ]


def test_refine_equal_cost_is_equal():
    """Self-consistency beside K rounds costs exactly what they cost, by one sample more on a part of the problems."""
    import eval as eval_module
    import refine as refine_module

    run = _scale_run(_sums(9), {})
    reply = lambda text, seed, sample: f"\\boxed{{{int(re.search('user.([0-9]+)', text, re.S)[1]) + 1 + (sample % 2)}}}"
    with mock.patch.object(eval_module, "generate", _scripted(reply)), contextlib.redirect_stderr(io.StringIO()):
        rows = refine_module.equal_cost_rows(run, [10.0, 24.0, 31.0])
    for row, tokens in zip(rows, (24.0, 31.0)):
        assert abs(row["tokens_mean"] - tokens) < 1e-9, row


def test_refine_auroc_counts_pairs():
    from refine import auroc, reliability

    rng = random.Random(4)
    for _ in range(50):
        right = [rng.random() < 0.4 for _ in range(12)]
        confidences = [rng.choice((-math.inf, -2.0, -1.0, 0.0)) + (0.3 if r else 0) for r in right]
        pairs = [
            (a > b) + (a == b) / 2 for a, r in zip(confidences, right) if r for b, q in zip(confidences, right) if not q
        ]
        expected = sum(pairs) / len(pairs) if pairs else None
        found = auroc(confidences, right)
        assert found == expected or abs(found - expected) < 1e-12, (found, expected)
    bins = reliability([0.1, 0.9, 0.2, 0.8], [False, True, True, True], bins=2)
    assert [(round(c, 9), r, n) for c, r, n in bins] == [(0.15, 0.5, 2), (0.85, 1.0, 2)]

# ------------------------------------------------------------------------------------------------ sft.py


def _small(vocab=64, **changes):
    """A random model big enough to have grouped heads, small enough for float64."""
    import model

    config = model.Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, eos_token_id=(1,))
    config = config._replace(**changes)
    return model.init_params(config, seed=0, dtype=torch.float64), config


def _gradients(params, loss_fn):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    loss_fn(leaves)
    return {name: tensor.grad for name, tensor in leaves.items()}


def _assert_same_gradients(a, b, tolerance=1e-9):
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), (name, (a[name] - b[name]).abs().max())


def _examples(count=7):
    import random

    import sft
    rng = random.Random(0)
    return [sft.Example([rng.randrange(64) for _ in range(n)], [-1] * (n - 4) + [0, 0, 1, 2])
            for n in rng.sample(range(6, 30), count)]


def test_sft_packed_equals_unpacked():
    """Loss and gradient are those of each example alone: the weighted mean of -log p over the supervised tokens."""
    import model
    import sft

    params, config = _small()
    examples = _examples()

    def alone(p):
        terms, weight = 0, 0
        for e in examples:
            logprobs = model.forward(p, config, torch.tensor([e.tokens])).double().log_softmax(-1)[0]
            for i, part in enumerate(e.parts):
                if part >= 0:
                    w = 1.5 if part == 1 else 1.0
                    terms, weight = terms - w * logprobs[i - 1, e.tokens[i]], weight + w
        (terms / weight).backward()
        losses.append((terms / weight).item())

    losses = []
    plain = _gradients(params, alone)
    together = lambda p: losses.append(sft.batch_loss(p, config, examples, 1.5, 10_000, backward=True)[0])
    packed = _gradients(params, together)
    assert abs(losses[0] - losses[1]) < 1e-6, losses
    _assert_same_gradients(plain, packed, 1e-6)  # logits are float32


def test_sft_gradient_does_not_depend_on_micro_batches():
    import sft

    params, config = _small()
    whole, split, recomputed = (
        _gradients(params, lambda p: sft.batch_loss(p, config, _examples(), 1.2, micro, checkpointing, backward=True))
        for micro, checkpointing in ((10_000, False), (25, False), (40, True)))
    _assert_same_gradients(whole, split, 1e-6)
    _assert_same_gradients(whole, recomputed, 1e-6)


def test_sft_learns_the_reply_its_end_token_and_nothing_else():
    """The prompt is masked, the end token learned in every turn: a mask that lost either has cost others whole runs."""
    import model
    import sft

    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    end = tokenizer.token_to_id("<|im_end|>")
    row = {"problem": "7+8", "response": "<think>\n7+8\n=15\n</think>\n\\boxed{15}"}
    example = sft.encode_example(row, tokenizer, end)
    learned = [t for t, part in zip(example.tokens, example.parts) if part >= 0]
    assert tokenizer.decode(learned, skip_special_tokens=False) == row["response"] + "<|im_end|>"
    assert tokenizer.decode([t for t, p in zip(example.tokens, example.parts) if p == 1]) == "\\boxed{15}"
    assert example.parts[-1] == 2 and example.tokens[-1] == end
    turns = ("user", "7+8"), ("assistant", "\\boxed{15}"), ("user", "Check it."), ("assistant", "Every step is right.")
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = sft.encode_example(talk, tokenizer, end)
    learned = [t for t, part in zip(example.tokens, example.parts) if part >= 0]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "\\boxed{15}<|im_end|>Every step is right.<|im_end|>"
    whole = model.render_chat(talk["messages"], False, system=None)
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) + "\n" == whole
    assert sft.show_example(example, tokenizer).count("[end: <|im_end|>]") == 2


def test_sft_answer_is_the_box_and_nothing_else():
    """All that stood behind the last box had the answer's weight, and a box in the thinking block was an answer."""
    import model
    import sft

    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    for response, answer in (
            (r"<think>\n3+4\n=7\n</think>\n\boxed{7} is what comes out.", r"\boxed{7}"),
            (r"<think>\boxed{3}</think>$\boxed{\frac{1}{2}}$.", r"\boxed{\frac{1}{2}}"),
            (r"\boxed{1} or \boxed{2}!", r"\boxed{2}"), (r"<think>\boxed{3}</think>It is three.", ""),
            (r"It is \boxed{4", ""), ("4", "")):
        response = response.replace(r"\n", "\n")
        example = sft.encode_example({"problem": "3+4", "response": response}, tokenizer, 332)
        assert tokenizer.decode([t for t, p in zip(example.tokens, example.parts) if p == 1]) == answer, response
        said = [t for t, p in zip(example.tokens, example.parts) if p in (0, 1)]
        assert tokenizer.decode(said) == response


def test_sft_default_learning_rate():
    """An adapter on the tiny model got the rate meant for all weights of a large one, and learned nothing."""
    import model
    import sft

    tiny = model.load_config(ROOT / "data" / "tiny")
    large = tiny._replace(hidden_size=1536, num_hidden_layers=28)
    rates = {(config.hidden_size, rank): sft.default_lr(config, rank) for config in (tiny, large) for rank in (0, 8)}
    assert rates[128, 8] > rates[128, 0] > rates[1536, 8] > rates[1536, 0] == 1e-5, rates


def test_sft_epochs_are_permutations():
    import sft

    examples = list(range(10))
    steps = [sft.batch_of_step(examples, step, 4, seed=3) for step in range(1, 6)]
    assert sorted(x for batch in steps for x in batch) == sorted(examples * 2)
    assert steps[2] == sft.batch_of_step(examples, 3, 4, seed=3) != sft.batch_of_step(examples, 3, 4, seed=4)


def _run(*words, ok=True, env=None):
    """A script of ours as a user runs it: its standard output, or with ok=False the line of its error."""
    import os
    import subprocess

    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def _weights_of(run_dir, step):
    return (Path(run_dir) / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


def test_sft_run_resumes_exactly_and_continues_in_grpo():
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        rows = [{"problem": f"{a}+{a}", "response": f"\\boxed{{{2 * a}}}"} for a in range(1, 40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["sft.py", "--model", "tiny", "--data", data, "--batch", 8, "--validation", 5, "--lr", 1e-4,
                 "--save-every", 3, "--eval-every", 3]
        out = _run(*flags, "--epochs", 1.4, "--run-dir", f"{scratch}/whole")
        assert "[answer: \\boxed{" in out and "step 6/6" in out, out
        _run(*flags, "--epochs", 1.4, "--run-dir", f"{scratch}/broken")
        import shutil
        shutil.rmtree(f"{scratch}/broken/checkpoints/step_000006")
        assert "step 4/6" in _run("sft.py", "--run-dir", f"{scratch}/broken", "--data", data, "--resume")
        assert _weights_of(f"{scratch}/whole", 6) == _weights_of(f"{scratch}/broken", 6)
        assert [json.loads(line)["step"] for line in open(f"{scratch}/broken/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        shutil.copy(data, other := Path(scratch) / "other.jsonl")
        error = _run("sft.py", "--run-dir", f"{scratch}/broken", "--data", other, "--resume", ok=False)
        assert str(other) in error and str(data) in error, error
        data.write_text(data.read_text().replace("5+5", "6+4"))  # the same name, other examples
        error = _run("sft.py", "--run-dir", f"{scratch}/broken", "--data", data, "--resume", ok=False)
        assert "has changed" in error and "sha256" in error, error
        out = _run("grpo.py", "--model", f"{scratch}/whole/checkpoints/best", "--data", "arithmetic", "--prompts", 2,
                   "--prompt", "plain", "--group", 2, "--max-new-tokens", 8, "--steps", 1, "--eval-limit", 2,
                   "--test-limit", 0, "--train-limit", 8, "--run-dir", f"{scratch}/grpo")
        assert "step 1/1" in out, out


def _in_process(script, *words):
    """The script's main in this process, for tests that replace a part of it: what it printed."""
    import contextlib
    import importlib
    import io

    module = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.main(module.parse_args(list(map(str, words))))
    return out.getvalue()


def _error(script, *words):
    """The message with which the script refuses."""
    try:
        _in_process(script, *words)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    raise AssertionError(f"{script} accepted {words}")


def test_sft_stops_early_once():
    """A run that --patience ended was trained further by each --resume, until the next evaluation."""
    import json
    import tempfile
    from unittest import mock

    import sft
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        data.write_text("".join(json.dumps({"problem": f"{a}+1", "response": str(a + 1)}) + "\n" for a in range(20)))
        words = ["--model", "tiny", "--data", data, "--batch", 4, "--validation", 4, "--patience", 1, "--eval-every", 1,
                 "--run-dir", f"{scratch}/run"]
        losses = iter([({"val_loss": 3.0}, []), ({"val_loss": 4.0}, [])])
        with mock.patch.object(sft, "run_evaluation", lambda *_: next(losses)):
            assert "no better" in _in_process("sft", *words)
            out = _in_process("sft", *words, "--resume")
        assert "no better" in out and "loss 3.0000" in out and "step 1)" in out and "| loss" not in out, out


def test_sft_and_grpo_stop_after_skipped_steps():
    """Weights that overflow skip every step: sft went on for hours, grpo advised a --resume that was then refused."""
    import json
    import tempfile
    from unittest import mock

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        data.write_text("".join(json.dumps({"problem": f"{a}+1", "response": str(a + 1)}) + "\n" for a in range(20)))
        spread = lambda group: [float(i % 2) for i in range(len(group.texts))]
        for script, words in (
                ("sft", ["--model", "tiny", "--data", data, "--batch", 2, "--validation", 0]),
                ("grpo", [*_GRPO[1:], "--steps", 9, "--test-limit", 0, "--max-new-tokens", 4, "--reward", "format=1"])):
            words += ["--run-dir", f"{scratch}/{script}", "--save-every", 99, "--eval-every", 99]
            module = __import__(script)
            with mock.patch.object(module, "optimizer_step", lambda *_, **__: {"grad_norm": math.nan, "skipped": 1}), \
                    mock.patch.dict(__import__("grpo").REWARDS, format=spread):
                error = _error(script, *words)
            assert "not finite in 3" in error and "another --run-dir" in error
            assert len(open(f"{scratch}/{script}/metrics.jsonl").readlines()) == 3


def test_sft_bad_conversations():
    """A conversation in which nobody replies divided by zero, one without a role was a KeyError."""
    import json
    import tempfile

    import model
    import sft
    tokenizer = model.load_tokenizer(ROOT / "data" / "tiny")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "talks.jsonl"
        for messages in ("hello", [], [{"role": "user", "content": "hello"}], [{"content": "hello"}], ["hello"],
                         [{"role": "assistant", "content": None}]):
            path.write_text(json.dumps({"messages": messages}) + "\n")
            try:
                sft.read_examples(path, tokenizer, 1, 100)
            except ValueError as error:
                assert "line 1" in str(error) and "expected" in str(error)
            else:
                raise AssertionError(messages)


def test_sft_bad_input():
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        empty, wrong = Path(scratch) / "empty.jsonl", Path(scratch) / "wrong.jsonl"
        empty.write_text("")
        wrong.write_text('{"problem": "1+1"}\n')
        for words, said in (
                ([empty], "no example"), ([wrong], "line 1"), ([f"{scratch}/nowhere.jsonl"], "nowhere.jsonl"),
                ([empty, "--batch", 0], "--batch is 0"),
                ([empty, "--validation", 0, "--patience", 2], "--patience is 2")):
            error = _error("sft", "--run-dir", f"{scratch}/run", "--data", *words)
            assert said in error, (words, error)
        assert "--batch is 0" in _run("sft.py", "--data", empty, "--batch", 0, ok=False)


# ------------------------------------------------------------------------------------------------ grpo.py

import re
import weakref
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import grpo


def _reference_loss(logprobs, old, ref, advantages, mask, loss, level, low, high, hard, beta, kl, longest, total):
    """The formulas of the papers, a token at a time."""
    (B, T), number = mask.shape, lambda x: torch.tensor(x, dtype=torch.float64)
    rows = []
    for i in range(B):
        length = int(mask[i].sum())
        terms = []
        log_ratios = [logprobs[i, t] - old[i, t] for t in range(T) if mask[i, t]]
        mean_ratio = torch.exp(sum(log_ratios, number(0.0)) / max(1, length))
        for t in range(T):
            if not mask[i, t]:
                continue
            A, own = advantages[i], torch.exp(logprobs[i, t] - old[i, t])
            r = mean_ratio if level == "sequence" else own
            if loss == "cispo":
                term = -min(r.item(), 1 + high) * A * logprobs[i, t]
            else:
                unclipped = (r if hard is None or r <= hard else number(hard)) * A
                clipped = (number(1 - low) if r < 1 - low else number(1 + high) if r > 1 + high else r) * A
                term = -(unclipped if unclipped <= clipped else clipped)
            if beta:
                d = ref[i, t] - logprobs[i, t]
                k3 = torch.exp(d) - 1 - d
                term = term + beta * {"k1": -d, "k2": d * d / 2, "k3": k3, "k3_corrected": own * k3}[kl]
            terms.append(term)
        rows.append(terms)
    tokens = sum(map(len, rows))
    if loss == "grpo":
        return sum(sum(terms) / len(terms) for terms in rows if terms) / (total or B)
    if loss == "dr_grpo":
        return sum(sum(terms) for terms in rows) / (total or B * longest)
    return sum(sum(terms) for terms in rows) / (total or tokens)


def _loss_case(seed=0, B=5, T=6):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    logprobs = -draw(B, T).abs() - 0.1
    old, ref = logprobs + 0.4 * draw(B, T), logprobs + 0.5 * draw(B, T)
    mask = torch.arange(T) < torch.tensor([6, 4, 1, 5, 0])[:, None]  # a whole row, a single token, an empty row
    return logprobs, old, ref, draw(B), mask


def test_grpo_every_loss_equals_its_formula():
    """Value and gradient, float64, against a loop over tokens: every loss, level, bound, divergence and normaliser."""
    import itertools

    logprobs, old, ref, advantages, mask = _loss_case()
    checked = 0
    for loss, level, hard, (beta, kl), total in itertools.product(
            ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), ("token", "sequence"), (None, 1.5),
            ((0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3"), (0.3, "k3_corrected")), (None, 37)):
        ours, theirs = (logprobs.clone().requires_grad_() for _ in range(2))
        value, _ = grpo.policy_loss(ours, old, ref if beta else None, advantages, mask, loss=loss, level=level,
                                    clip_hard=hard, beta=beta, kl=kl, max_completion_tokens=6, total=total)
        wanted = _reference_loss(theirs, old, ref, advantages, mask, loss, level, 0.2, 0.28, hard, beta, kl, 6, total)
        value.backward(), wanted.backward()
        assert abs(value.item() - wanted.item()) < 1e-12, (loss, level, hard, beta, kl, total)
        assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12), (loss, level, hard, beta, kl, total)
        checked += 1
    assert checked == 200


def test_grpo_negative_advantage_keeps_its_gradient_above_the_clip():
    """A max() where PPO takes min() left bad completions that had become likelier without a gradient, in other code."""
    logprobs = torch.tensor([[0.9]], dtype=torch.float64, requires_grad=True)  # ratio e^0.9, far above 1.28
    case = logprobs, torch.zeros(1, 1), None, torch.tensor([-1.0]), torch.ones(1, 1)
    loss, stats = grpo.policy_loss(*case)
    loss.backward()
    assert logprobs.grad.item() > 1 and stats["clipped_high"] == 0
    bounded = grpo.policy_loss(*case, clip_hard=1.5)[0]
    assert abs(bounded.item() - 1.5) < 1e-9


def test_grpo_loss_survives_degenerate_rows():
    """Padding may hold anything; rows of no tokens count for nothing; absurd log-probabilities stay finite."""
    logprobs, old, ref, advantages, mask = _loss_case()
    spoilt = [torch.where(mask, x, torch.tensor(v, dtype=torch.float64))
              for x, v in ((logprobs, -1e30), (old, 1e30), (ref, 5e29))]
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        kw = {"loss": loss, "beta": 0.1, "max_completion_tokens": 6}
        spoilt[0].requires_grad_()
        a, b = (grpo.policy_loss(*case, advantages, mask, **kw)[0] for case in (spoilt, (logprobs, old, ref)))
        gradient, = torch.autograd.grad(a, spoilt[0])
        assert torch.isfinite(a) and torch.isclose(a, b) and not gradient[~mask].any(), loss
        none = torch.zeros_like(mask)
        assert grpo.policy_loss(logprobs, old, ref, advantages, none, **kw)[0] == 0
    far = (torch.full((1, 1), x) for x in (-1.0, -500.0, -900.0))
    assert torch.isfinite(grpo.policy_loss(*far, torch.ones(1), torch.ones(1, 1), beta=1.0)[0])


def test_grpo_k1_in_the_loss_has_no_mean_gradient():
    """Why k1 is no penalty: over the policy's samples, log p - log ref has that of log p, which is 0 in the mean."""
    logits = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)

    def mean_gradient(kl):
        logprobs = logits.log_softmax(-1)
        triples = [[x[i].view(1, 1) for x in (logprobs, logprobs.detach(), ref)] for i in range(8)]
        each = [grpo.policy_loss(*three, torch.zeros(1), torch.ones(1, 1), beta=1.0, kl=kl)[0] for three in triples]
        return torch.autograd.grad(sum(p.item() * loss for p, loss in zip(logprobs.exp(), each)), logits)[0]

    exact, = torch.autograd.grad((logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - ref)).sum(), logits)
    assert mean_gradient("k1").abs().max() < 1e-12
    assert torch.allclose(mean_gradient("k3_corrected"), exact)  # the corrected k3 has that of the divergence itself
    assert not torch.allclose(mean_gradient("k3"), exact, atol=1e-2)


def test_grpo_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.1, 1.1, 0, 1]])
    for scale in ("group", "batch", "none"):
        a = grpo.group_advantages(rewards, scale)
        assert a.sum(1).abs().max() < 1e-5 and not a[1].any()
    a = grpo.group_advantages(rewards)
    assert torch.allclose(a[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))  # deviation over n - 1: 0.5
    assert torch.allclose(grpo.group_advantages(rewards, "batch")[0, 0], 0.75 / (rewards.std() + 1e-4))
    for bad in (lambda: grpo.group_advantages(torch.ones(3, 1)), lambda: grpo.group_advantages(rewards, "std")):
        try:
            bad()
        except ValueError as error:
            assert "expected" in str(error)
        else:
            raise AssertionError("no error")


def _group(texts, answers=None, lengths=None, limit=100):
    import generate
    import verify

    problem = {"problem": "How many?", "answer": "4"}
    lengths = lengths or [len(t) for t in texts]
    completions = [generate.Completion(list(range(n)), [0.0] * n, "stop") for n in lengths]
    right = [verify.accuracy_reward(text, "4") == 1 for text in texts]
    return grpo.Group(problem, "", texts, completions, right, limit, "think")


def test_grpo_worst_right_answer_beats_best_wrong_one():
    """Over all the weights that are accepted: the penalties at their worst against the bonuses at their best."""
    import random

    rng = random.Random(0)
    for _ in range(200):
        raw = {name: rng.random() for name in grpo.REWARDS if name != "accuracy"}
        scale = rng.uniform(0.1, 0.999) / sum(raw.values())
        weights = grpo.parse_rewards(["accuracy=1"] + [f"{name}={value * scale:.6f}" for name, value in raw.items()])
        worst_right = weights["accuracy"] - sum(w for name, w in weights.items() if name not in ("accuracy", "format"))
        assert worst_right > weights["format"], weights
    try:
        grpo.parse_rewards(["accuracy=1", "format=0.5", "brevity=0.5"])
    except ValueError as error:
        assert "wrong answer" in str(error)
    else:
        raise AssertionError("weights that reward wrong answers were accepted")
    right = "<think>\nla la la la la la 的的的的\n</think>\n\\boxed{4} 的"
    group = _group([right, "<think>\nthought\n</think>\n\\boxed{5}"], lengths=[100, 40])
    group = group._replace(completions=[group.completions[0]._replace(tokens=[7] * 100), group.completions[1]])
    weights = ["accuracy=1", "format=0.1", "brevity=0.2", "repetition=0.2", "language=0.1", "overlong=0.2"]
    parts, rewards = grpo.reward_group(group, grpo.parse_rewards(weights))
    assert rewards[0] > rewards[1], parts
    assert all(-1 <= v <= 1 for values in parts.values() for v in values)


def test_grpo_each_reward():
    box = "\\boxed{4}"
    texts = [f"<think>\n{t}\n</think>\n{box}" for t in ("a", "b", "c")] + ["\\boxed{5}"]
    group = _group(texts, lengths=[10, 20, 40, 5], limit=40)
    assert grpo.accuracy(group) == [1, 1, 1, 0]
    assert grpo.brevity(group) == [0, -0.5, -1, 0]  # relative to the shortest right one, of 10; the wrong one is not it
    assert grpo.overlong(group) == [0, 0, -1, 0]
    assert grpo.format(group)[0] == 1
    assert grpo.format(_group(["<think>\nno end \\boxed{4}", f"{box} and more text {box}"])) == [0, 0]
    looped = _group(["x"])._replace(completions=[_group(["x"]).completions[0]._replace(tokens=[1, 2] * 50)])
    assert grpo.repetition(looped)[0] < -0.9 and grpo.repetition(_group(["x"], lengths=[60])) == [0]
    assert grpo.language(_group(["plain text", "половина half"])) == [0, -8 / 12]
    assert grpo.language(_group(["x"])._replace(problem={"problem": "Сколько?"}, texts=["ответ x"])) == [0]


def _rollout_groups(config, sampler, seed=0):
    """Groups with completions of very different lengths, sampled by the engine."""
    import generate
    prompts = [[5, 9, 3, 7, 2, 8, 4], [11, 2], [6] * 12]
    answers = generate.generate(sampler, config, prompts, num_samples=4, max_new_tokens=12, temperature=0.8,
                                stop_tokens=(1, 3, 7, 9), seed=seed)
    return [(prompt, [grpo.Sequence(c.tokens, c.logprobs, a, True) for c, a in zip(row, (1.0, -0.5, 0.3, -0.8))])
            for prompt, row in zip(prompts, answers)]


def test_grpo_packed_group_equals_one_row_each():
    """The prompt computed once for its G completions: the loss and the gradient of G rows by themselves."""
    import model

    params, config = _small()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    assert len({len(s.tokens) for _, sequences in groups for s in sequences}) > 2, "the lengths should differ"

    def packed(p):
        logprobs, _, mask = grpo.row_logprobs(p, config, groups, 0.8)
        A = torch.tensor([s.advantage for _, sequences in groups for s in sequences])
        grpo.policy_loss(logprobs, logprobs.detach(), None, A, mask)[0].backward()

    def alone(p):
        total = sum(len(s.tokens) for _, sequences in groups for s in sequences)
        for prompt, sequences in groups:
            for s in sequences:
                logprobs = model.token_logprobs(p, config, torch.tensor([prompt + s.tokens]), temperature=0.8)
                said = logprobs[:, len(prompt) - 1:]
                (-s.advantage * (said - said.detach()).exp().sum() / total).backward()

    _assert_same_gradients(_gradients(params, packed), _gradients(params, alone), 1e-6)


def test_grpo_sampler_and_scorer_agree():
    """On policy the ratio is 1: the engine recorded what training computes, end token and temperature included."""
    params, config = _small()
    params = {k: v.float() for k, v in params.items()}
    for prompt, sequences in _rollout_groups(config, params):
        logprobs, entropy, mask = grpo.row_logprobs(params, config, [(prompt, sequences)], 0.8)
        for row, seen, s in zip(logprobs, mask, sequences):
            assert seen.sum() == len(s.tokens)  # the end token is in the loss
            assert (row[seen] - torch.tensor(s.logprobs)).abs().max() < 1e-4


def _update(params, config, groups, micro_tokens, **changes):
    import optim

    words = ["--model", "tiny", "--micro-tokens", str(micro_tokens), "--lr", "1e-3", "--temperature", "0.8",
             "--max-new-tokens", "12"]
    args = grpo.parse_args(words + [w for k, v in changes.items() for w in (f"--{k.replace('_', '-')}", str(v))])
    trained, optimizer = optim.init_optimizer({k: v.float() for k, v in params.items()})
    total = grpo.loss_total(args.loss, [len(s.tokens) for _, sequences in groups for s in sequences], 12)
    reference, rows = {k: v.float() for k, v in params.items()}, grpo.pack_groups(groups, micro_tokens)
    sums, norm, _ = grpo.update(trained, reference, config, optimizer, rows, total, 1e-3, args)
    return {k: v.detach().clone() for k, v in trained.items()}, sums, norm


def test_grpo_update_does_not_depend_on_micro_batches():
    """For every loss: one row of everything, or rows so short that groups are divided (trl#3021, #5619)."""
    params, config = _small()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        _, sums, norm = _update(params, config, groups, 10_000, loss=loss, beta=0.05)
        for micro_tokens in (60, 18):
            _, other, other_norm = _update(params, config, groups, micro_tokens, loss=loss, beta=0.05)
            assert abs(norm - other_norm) < 1e-4 * norm, (loss, micro_tokens, norm, other_norm)
            assert abs(sums["loss"] - other["loss"]) < 1e-5 and sums["tokens"] == other["tokens"]


def test_grpo_first_update_is_on_policy_and_later_ones_are_not():
    params, config = _small()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    _, sums, _ = _update(params, config, groups, 10_000)
    assert sums["ratio"] == sums["tokens"] and sums["clipped_low"] == sums["clipped_high"] == 0
    assert sums["mismatch_max"] < 1e-4
    _, sums, _ = _update(params, config, groups, 10_000, updates=3)
    assert abs(sums["ratio"] / sums["tokens"] - 1) > 1e-6


def test_grpo_pack_groups_keeps_every_completion():
    groups = [([1] * p, [grpo.Sequence([g] * n, [0.0] * n, 0.0, True) for g, n in enumerate(sizes)])
              for p, sizes in ((5, (3, 9, 2)), (2, (30, 1)), (7, (4,)))]
    for budget in (1, 12, 20, 1000):
        rows = grpo.pack_groups(groups, budget)
        packed = [s for row in rows for _, piece in row for s in piece]
        assert packed == [s for _, sequences in groups for s in sequences]
        for row in rows:
            size = sum(len(prompt) + sum(len(s.tokens) for s in piece) for prompt, piece in row)
            assert size <= budget or (len(row) == 1 and len(row[0][1]) == 1)


def test_grpo_order_of_problems_is_a_function_of_the_seed():
    import itertools

    sets = [[{"id": f"a{i}", "level": i % 5 + 1} for i in range(10)], [{"id": f"b{i}"} for i in range(4)]]
    take = lambda n, skip=0: [p["id"] for _, p in itertools.islice(grpo.problem_order(sets, [3, 1], 0), skip, skip + n)]
    assert take(60)[20:] == take(40, skip=20)
    first = [x for x in take(200) if x[0] == "a"]
    assert all(len(set(first[i:i + 10])) == 10 for i in range(0, 100, 10)), "each epoch asks each problem once"
    assert 0.6 < len(first) / 200 < 0.9
    levels = [p["level"] for _, p in itertools.islice(grpo.problem_order(sets[:1], [1], 0, curriculum=True), 10)]
    assert sum(levels[:5]) < sum(levels[5:])


_GRPO = ["grpo.py", "--model", "tiny", "--prompts", 4, "--group", 4, "--max-new-tokens", 40, "--steps", 4,
         "--eval-limit", 4, "--test-limit", 4, "--train-limit", 40, "--eval-every", 2, "--save-every", 1, "--keep", 9,
         "--lr", 1e-4]


def test_grpo_killed_and_resumed_ends_with_the_same_weights(kills=1, seed=0):
    """kill -9 at random moments; the run that goes on ends with the weights of the unbroken one, bit for bit."""
    import json
    import os
    import random
    import shutil
    import subprocess
    import tempfile

    rng, steps = random.Random(seed), 3 + 2 * kills
    flags = [*_GRPO, "--steps", steps]  # argparse heeds the last
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = (Path(scratch) / name for name in ("whole", "broken"))
        _run(*flags, "--run-dir", whole)
        for _ in range(kills):
            resume = list(broken.glob("checkpoints/step_*"))
            if not resume:  # it died before it could save
                shutil.rmtree(broken, ignore_errors=True)
            words = ["grpo.py", "--run-dir", broken, "--resume"] if resume else [*flags, "--run-dir", broken]
            process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
            next((line for line in process.stdout if line.startswith("step ")), None)
            time.sleep(rng.uniform(0, 1))  # in a rollout, an update, an evaluation or a save
            process.kill()
            process.wait()
        out = _run("grpo.py", "--run-dir", broken, "--resume")
        assert "resuming from" in out and f"step {steps}/{steps}" in out, out
        assert _weights_of(whole, steps) == _weights_of(broken, steps)
        timed = ("rollout_s", "score_s", "update_s", "tokens_per_s", "sampled_tokens_per_s", "learned_tokens_per_s",
                 "left_min", "peak_memory_gib")
        logs = [[{k: v for k, v in json.loads(line).items() if k not in timed} for line in open(run / "metrics.jsonl")]
                for run in (whole, broken)]
        assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == list(range(1, steps + 1))
        assert (whole / "results.md").read_text() == (broken / "results.md").read_text()


def test_grpo_entropy_bonus_is_of_a_token_in_every_loss():
    """It was divided by the loss's normaliser, rows for "grpo": a bonus as many times larger as a row has tokens."""
    logprobs, old, ref, advantages, mask = (x[:4] for x in _loss_case())
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"):
        value, _ = grpo.policy_loss(logprobs, old, ref, 0 * advantages, mask, loss=loss, max_completion_tokens=6,
                                    bonus=torch.ones_like(logprobs))
        assert abs(value.item() + (mask.sum().item() / 24 if loss == "dr_grpo" else 1)) < 1e-12, (loss, value)
    params, config = _small()
    groups = _rollout_groups(config, {k: v.float() for k, v in params.items()})
    groups = [(prompt, [s._replace(advantage=0.0) for s in sequences]) for prompt, sequences in groups]
    for bonus in (0.5, -0.5):  # entropy goes up, or down
        after, sums, norm = _update(params, config, groups, 10_000, entropy_bonus=bonus)
        assert norm > 0 and abs(sums["loss"] + bonus * sums["entropy"] / sums["tokens"]) < 1e-4
        _, then, _ = _update(after, config, groups, 10_000, entropy_bonus=bonus)
        assert (then["entropy"] - sums["entropy"]) * bonus > 0


def test_grpo_cispo_counts_what_it_clips():
    """It clips from above only, whatever the sign of the advantage; PPO's regions were counted."""
    logprobs, A = torch.tensor([[0.9, 0.0], [0.9, -0.9]]), torch.tensor([1.0, -1.0])
    case = logprobs, torch.zeros(2, 2), None, A, torch.ones(2, 2)
    stats = grpo.policy_loss(*case, loss="cispo")[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (0, 2)
    stats = grpo.policy_loss(*case)[1]
    assert (stats["clipped_low"], stats["clipped_high"]) == (1, 1)


def test_grpo_truncated_rows_alone_make_no_update():
    """With --mask-truncated and nothing finished, a zero gradient still moved the weights by their momentum."""
    import json
    import tempfile
    from unittest import mock

    spread = lambda group: [float(i % 2) for i in range(len(group.texts))]
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(grpo.REWARDS, format=spread):
        words = [*_GRPO[1:], "--steps", 1, "--test-limit", 0, "--max-new-tokens", 2, "--reward", "format=1"]
        for flags, updates in (([], 1), (["--mask-truncated"], 0)):
            run = f"{scratch}/{updates}"
            out = _in_process("grpo", *words, *flags, "--run-dir", run)
            assert "truncated 1.00" in out and "no spread 0.00" in out, out
            assert json.load(open(f"{run}/checkpoints/step_000001/trainer.json"))["updates"] == updates


def test_grpo_held_out_problems_are_not_trained_on():
    """--data ./mine.jsonl --eval-data mine.jsonl: taken for two files, and measured on what was trained on."""
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mine.jsonl"
        path.write_text("".join(f'{{"problem": "What is {i}+{i}?", "answer": "{2 * i}"}}\n' for i in range(60)))
        for spelled in (path, os.path.relpath(path), f"{scratch}/../{Path(scratch).name}/mine.jsonl"):
            args = grpo.parse_args(["--data", f"{spelled}=2", "--eval-data", str(path)])
            trained = {p["id"] for p in grpo.load_mixture(args.data, None)[0][0]}
            dev, test = grpo.load_held_out(args)
            assert dev and test and not trained & {p["id"] for p in dev + test}, spelled
        args = grpo.parse_args(["--data", "arithmetic", "--eval-data", str(path)])
        assert len(grpo.load_held_out(args)[1]) == 60


def test_grpo_and_sft_pass_offload_on():
    """--offload was read, printed and saved, and changed nothing."""
    import tempfile
    from unittest import mock

    import model
    import sft
    config, told = model.load_config(ROOT / "data" / "tiny"), []

    def stop(trainable, device="cpu", dtype=None, offload=False):
        told.append(offload)
        raise InterruptedError

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "examples.jsonl"
        data.write_text('{"problem": "1+1", "response": "2"}\n')
        for rank in ("0", "2"):
            flags = ["--offload", "--lora-rank", rank, "--run-dir", f"{scratch}/{rank}"]
            with mock.patch.object(grpo, "init_optimizer", stop), mock.patch.object(sft, "init_optimizer", stop):
                for run in (lambda: grpo.load_policy(grpo.parse_args(flags), ROOT / "data" / "tiny", config, "cpu"),
                            lambda: _in_process("sft", "--data", data, "--validation", 0, *flags)):
                    try:
                        run()
                    except InterruptedError:
                        pass
    assert told == [True] * 4


def test_grpo_and_sft_help():
    """--help died of a default that is only known with the model."""
    import contextlib
    import io

    for script, shown in (("grpo", "tiny 5e-4"), ("sft", "all weights 1e-5")):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                __import__(script).parse_args(["--help"])
            except SystemExit as done:
                assert done.code == 0
        assert shown in out.getvalue() and out.getvalue().count("  --lr LR") == 1
    parse = __import__("grpo").parse_args
    rates = [parse(words).lr for words in ([], ["--lora-rank", "8"], ["--model", "other"], ["--lr", "0.5"])]
    assert rates == [5e-4, 3e-5, 1e-6, 0.5]


def test_grpo_prompts_can_earn_the_reward():
    """Presets with worked examples, which training does not show, and those that ask for no box are refused."""
    import eval
    assert "boxed" in grpo.PROMPTS and "few-shot-cot" not in grpo.PROMPTS and "minerva-math" not in grpo.PROMPTS
    assert all(not eval.PRESETS[name].stop for name in grpo.PROMPTS)  # roll_out would have to cut the text there
    assert grpo.parse_args(["--epochs", "2"]).steps is None


def test_grpo_result_does_not_depend_on_the_number_of_processes():
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        _run(*_GRPO, "--run-dir", f"{scratch}/one", "--steps", 2)
        _run("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29653, *_GRPO,
             "--run-dir", f"{scratch}/two", "--steps", 2, "--device", "cpu")
        if sys.platform == "linux":
            _run(*_GRPO, "--run-dir", f"{scratch}/forked", "--steps", 2, "--processes", 2)
            weights = [Path(scratch, name, "checkpoints", "step_000002", "model.safetensors").read_bytes() for name in ("two", "forked")]
            assert weights[0] == weights[1]
        one, two = ([json.loads(line) for line in open(f"{scratch}/{name}/metrics.jsonl")] for name in ("one", "two"))
        for key in ("reward", "accuracy", "length", "no_spread", "dev_accuracy"):
            for a, b in zip(one, two):  # sums in another order: equal but for rounding
                assert abs(a.get(key, 0) - b.get(key, 0)) < 1e-9, (key, a.get(key), b.get(key))
        for a, b in zip(one, two):
            a, b = a["grad_norm"], b["grad_norm"]
            assert abs(a - b) < 1e-3 * max(1e-3, a), (a, b)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live: on the meta device, of a GPU's run."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def drop(self, key):
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out


def _traced_peak_gib(config, words):
    """GiB at the peak of grpo.update on tensors without storage, for one full row; attention by a GPU's fused kernel."""
    import optim

    args = grpo.parse_args(["--model", "none", *words])

    def fused(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        bias = None
        if attn_mask is not None:
            *rest, S = attn_mask.shape
            bias = q.new_zeros(*rest, -(-S // 16) * 16)[..., :S].expand(*q.shape[:2], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]

    adapter = {name: tensor.to("meta") for name, tensor in model.init_lora(config, max(1, args.lora_rank), 0).items()}
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused), _LiveBytes() as counter:
        base = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16 if args.lora_rank else torch.float32)
                for name, shape in model.param_shapes(config).items()}
        if args.lora_rank:
            lora, optimizer = optim.init_optimizer(adapter, "meta")
            params = base | lora
        else:
            params, optimizer = optim.init_optimizer(base, "meta", torch.bfloat16)
            del base
        row = [([1] * 96, [grpo.Sequence([1] * 500, [-1.0] * 500, 0.5, True)] * 8)] * 4  # 16,384 tokens
        counter.peak = counter.now
        grpo.update(params, None, config, optimizer, [row], 16000, 1e-6, args)
        return counter.peak / 2**30


def test_grpo_plan_equals_the_traced_memory_of_an_update():
    """1.5b with an adapter for 24 GB; the layers of 7b, four of 28, with all weights: a plan within a tenth."""
    config_1_5b = model.Config(151936, 1536, 8960, 28, 12, 2)
    config_7b = model.Config(152064, 3584, 18944, 4, 28, 4, tie_word_embeddings=False)
    for config, words in ((config_1_5b, ["--lora-rank", "32"]), (config_7b, ["--no-checkpointing"]), (config_7b, [])):
        words = [*words, "--max-new-tokens", "500", "--group", "8", "--prompts", "4"]
        traced = _traced_peak_gib(config, words)
        plan = grpo.plan_memory(config, grpo.parse_args(["--model", "none", *words]), 1, "cuda", prompt=96)
        planned = grpo.plan_peaks(plan)[0] - grpo.ALLOWANCE_GIB["cuda"]
        assert abs(planned / traced - 1) < 0.1, (words, planned, traced)


def test_grpo_benchmark_peak_is_as_planned():
    """On the CPU the measured peak of a whole process lies within 0.35 GiB of the plan."""
    out = _run("grpo.py", "--benchmark", "fixed", "--dtype", "bfloat16")
    peak, planned = map(float, re.search(r"peak memory (\S+) GiB, planned (\S+)", out).groups())
    assert abs(peak - planned) < 0.35, out


def test_grpo_plan_warns_and_says_what_helps():
    out = _run("grpo.py", "--plan", "1:0.5")
    assert "activations" in out and "warning" in out and "--checkpointing" in out, out
    assert "warning" not in _run("grpo.py", "--plan", "8:80")
    assert "GPUS:GIB" in _error("grpo", "--plan", "24")


def test_grpo_prompts_that_fill_the_context_are_left_out():
    long = {"id": "long", "problem": "What is " + "1 + " * 600 + "1?", "answer": "601"}
    short = {"id": "short", "problem": "What is 1 + 1?", "answer": "2"}
    args = grpo.parse_args([])
    tokenizer, config = model.load_tokenizer(ROOT / "data/tiny"), model.load_config(ROOT / "data/tiny")
    assert grpo.those_that_fit([long, short], tokenizer, config, args, None) == [short]


def test_grpo_a_problem_twice_in_a_step_draws_its_own_noise_each_time():
    tiny = ROOT / "data/tiny"
    params, config, tokenizer = model.load_params(tiny), model.load_config(tiny), model.load_tokenizer(tiny)
    problem = {"id": "one", "problem": "What is 17 * 6 - 48?", "answer": "54"}
    args = grpo.parse_args(["--group", "4", "--prompt", "cot"])
    first, second = grpo.roll_out(params, config, tokenizer, [(0, problem), (1, problem)], 1, args, None, {"accuracy": 1.0})
    assert [c.tokens for c in first.completions] != [c.tokens for c in second.completions]


def test_grpo_bad_input():
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty.jsonl"
        empty.write_text("")
        (Path(scratch) / "full").mkdir()
        (Path(scratch) / "full" / "file").write_text("mine")
        for words, said in (
                (["--model", "no-such-model"], "no-such-model"), (["--group", 1], "--group is 1"),
                (["--temperature", 0], "--temperature is 0"), (["--data", f"{scratch}/none.jsonl"], "none.jsonl"),
                (["--data", empty], "empty"), (["--data", "arithmetic=0"], "not a positive"),
                (["--reward", "kindness=1"], "kindness"), (["--lr", -1], "lr"),
                (["--run-dir", f"{scratch}/full"], "not empty"), (["--max-new-tokens", 4000], "4000"),
                (["--epochs", 2, "--steps", 8], "--epochs")):
            error = _error("grpo", "--run-dir", f"{scratch}/run", *words)
            assert said in error, (words, error)
        assert "--group is 1" in _run("grpo.py", "--group", 1, ok=False)


# ------------------------------------------------------------------------------------------------ the runner


def main(words):
    tests = [(name, fn) for name, fn in globals().items() if name.startswith("test_") and callable(fn)]
    chosen = [(name, fn) for name, fn in tests if not words or any(word in name for word in words)]
    if not chosen:
        print(f"no test has {' or '.join(map(repr, words))} in its name; there are:", *(n for n, _ in tests), sep="\n  ")
        return 2
    passed = failed = skipped = 0
    for name, fn in chosen:
        begin = time.perf_counter()
        try:
            fn()
            passed, verdict = passed + 1, "ok"
        except unittest.SkipTest as reason:
            skipped, verdict = skipped + 1, f"skipped: {reason}"
        except Exception:
            failed, verdict = failed + 1, "FAILED\n" + traceback.format_exc()
        print(f"{name} ({time.perf_counter() - begin:.1f} s) {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
