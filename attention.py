"""All attention functions. `model.block` calls an attend_fn(layer, q, k, v) -> out in each layer:

    q [B, H, T, head_dim], k and v [B, K, T, head_dim] -> out [B, H, T, head_dim]

    causal_attention    each token attends to itself and to earlier tokens
    packed_attention    one row of many sequences, with shared prompts: for training, scoring and
                        the sampler's prefill
    cached_attention    a rectangular KV cache, for `model.forward`
    decode_attention    one new token per running row, with the keys of shared prompts read once

On a GPU in half precision (`has_varlen`), packed attention and decoding are one call per layer to
FlashAttention's variable-length kernel: `varlen_packed` and `slot_decode`. The rest is plain
PyTorch and runs everywhere.

Scores and softmax are float32 on every path. Scores of the real Qwen-2.5 reach 13,000, where
bfloat16 values are 64 apart; rounding them costs more than all other rounding combined.

Grouped-query attention, arXiv:2305.13245; shared prompts, Hydragen, arXiv:2402.05099;
FlashAttention-2, arXiv:2307.08691.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F


def padded_length(n):
    """n rounded up, by at most 31 or n / 16, so that there are few distinct lengths.

    oneDNN caches a kernel for every shape: with arbitrary lengths, the memory of a bfloat16 run on
    a CPU would grow at every step.
    """
    step = 1 << max(5, (n - 1).bit_length() - 5)
    return -(-n // step) * step


def power_of_two(n):
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def length_bucket(n):
    """The length class of a sequence: a power of two, at least 32; 0 if it is empty."""
    return max(32, power_of_two(n)) if n else 0


# ------------------------------------------------------------ kernels

CPU_SCRATCH = 2**18  # scores computed at a time, which fit in a CPU's cache


def mask_bias(masked):
    """-inf where `masked` is true, else 0: float32, to be added to scores."""
    return torch.zeros(masked.shape, device=masked.device).masked_fill_(masked, -torch.inf)


def float_scores(q, k, bias):
    """q k^T / sqrt(head_dim) + bias in float32: [N, M, head_dim], [N, S, head_dim] -> [N, M, S].

    bias: float32, broadcast; 0, or -inf for masked keys.
    """
    scale = q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32).mul_(scale).add_(bias)
    return torch.baddbmm(bias, q.float(), k.float().mT, alpha=scale)


class SlicedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim)) v over the unmasked keys, a few of the N products at a time.

    q [N, R * T, head_dim], k and v [N, S, head_dim], masked bool [N, T, S] -> like q. Only the
    softmax is saved, in the dtype of q: holding all scores in float32 at once makes a bfloat16
    update take half as long again, with a third more memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, masked):
        weights = q.new_empty(*q.shape[:2], k.shape[1])
        out = torch.empty_like(q)
        step = max(1, CPU_SCRATCH // weights[0].numel())
        zero = torch.zeros((), device=q.device)
        for begin in range(0, len(q), step):
            part = slice(begin, begin + step)
            scores = float_scores(q[part], k[part], zero)
            heads = scores.view(len(scores), -1, *masked.shape[1:])  # [step, R, T, S]
            heads.masked_fill_(masked[part, None], -torch.inf)
            weights[part] = scores.softmax(-1)
            torch.bmm(weights[part], v[part], out=out[part])
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        """For p = softmax(s): ds = p (dp - sum(p dp))."""
        q, k, v, weights = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        step = max(1, CPU_SCRATCH // weights[0].numel())
        for begin in range(0, len(q), step):
            part = slice(begin, begin + step)
            grad_p = torch.bmm(grad[part], v[part].mT)
            grad_s = torch._softmax_backward_data(grad_p, weights[part], -1, q.dtype)
            torch.bmm(grad_s, k[part], out=grad_q[part])
            torch.bmm(grad_s.mT, q[part], out=grad_k[part])
        return grad_q.mul_(scale), grad_k.mul_(scale), torch.bmm(weights.mT, grad), None


def plain_attention(q, k, v, visible):
    """`attention` in explicit products, for a CPU. `visible` must be given."""
    B, H, T, head_dim = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B * K, -1, head_dim)  # [B * K, R * T, head_dim]: R query heads per key head
    k, v = (x.reshape(B * K, S, head_dim) for x in (k, v))
    masked = (~visible).expand(B, T, S).repeat_interleave(K, 0)  # [B * K, T, S]
    return SlicedAttention.apply(q, k, v, masked).view(B, H, T, head_dim)


def fused_attention(q, k, v, visible=None):
    """`attention` in one kernel that never stores the scores, for a GPU."""
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    if H != K:  # given both a mask and grouped heads, every kernel stores the scores
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.expand(B, T, S)[:, None])


def attention(q, k, v, visible=None):
    """Softmax attention: q [B, H, T, head_dim], k and v [B, K, S, head_dim] -> like q.

    visible: bool [T, S] or [B, T, S], the keys each query attends to; None: causal, with T = S.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and S <= 1024:  # the fused kernel takes three times as long here
        if visible is None:
            visible = torch.ones(T, S, dtype=torch.bool).tril()
        return plain_attention(q, k, v, visible)
    return fused_attention(q, k, v, visible)


def causal_attention(layer, q, k, v):
    """The attend_fn in which each token attends to itself and to earlier tokens."""
    return attention(q, k, v)


# ------------------------------------------------------------ packed rows


def packed_sequences(groups):
    """The sequences of a packed row, as pairs of ranges: the prompt before it, and its own tokens.

    groups: [(prompt length, [completion length, ...]), ...] in the order of the row; a prompt of
    length 0 makes its completions independent sequences.
    """
    sequences, start = [], 0
    for prompt_length, lengths in groups:
        prompt = range(start, start + prompt_length)
        if prompt_length:
            sequences.append((range(0), prompt))
        start += prompt_length
        for length in lengths:
            sequences.append((prompt, range(start, start + length)))
            start += length
    return sequences


def packed_positions(groups):
    """[1, T] int64: the position of each token of a packed row, counted from its prompt's start."""
    sequences = packed_sequences(groups)
    return torch.tensor([[len(prompt) + i for prompt, own in sequences for i in range(len(own))]])


def padded(ranges, padding, device):
    """[n, longest] int64: the ranges as rows, with the longest rounded up by padded_length."""
    longest = padded_length(max(map(len, ranges)))
    return torch.tensor([[*r, *[padding] * (longest - len(r))] for r in ranges], device=device)


def padded_batches(sequences, T, device):
    """Batches of sequences that attend in one call, because their length_buckets are the same.

    [(queries [n, Q], keys [n, S], visible [n, Q, S] or None if causal), ...]: queries and keys are
    indices into the row of T tokens, with T for padding.
    """
    buckets = {}
    for prompt, own in sequences:
        key = length_bucket(len(prompt)), length_bucket(len(own))
        buckets.setdefault(key, []).append((prompt, own))
    batches = []
    for (prompt_bucket, _), members in buckets.items():
        prompts, owns = zip(*members)
        queries = keys = padded(owns, T, device)
        visible = None
        if prompt_bucket:
            n, Q = queries.shape
            prompts = padded(prompts, T, device)
            keys = torch.cat((prompts, queries), 1)
            causal = torch.ones(n, Q, Q, dtype=torch.bool, device=device).tril()
            visible = torch.cat(((prompts < T)[:, None].expand(-1, Q, -1), causal), 2)
        batches.append((queries, keys, visible))
    return batches


def packed_attention(groups, device="cpu", dtype=torch.float32, store=None):
    """The attend_fn of one packed row [1, T]: prompts, each followed by completions that see it.

    groups: as in packed_sequences. dtype: of the queries.
    store: (layers, sources, slots), to also write to the sampler's cache. layers: [keys, values] of
    each layer, [slots, K, head_dim] each. sources, slots: int64 [n], tokens and where they go.
    """
    sequences = packed_sequences(groups)
    packed = varlen_packed if has_varlen(device, dtype) else padded_packed
    attend_fn = packed(sequences, device)
    if store is None:
        return attend_fn
    layers, sources, slots = store

    def store_and_attend(layer, q, k, v):
        for cached, new in zip(layers[layer], (k, v)):
            new = new[0].transpose(0, 1).index_select(0, sources)  # [n, K, head_dim]
            cached.index_copy_(0, slots, new.to(cached.dtype))
        return attend_fn(layer, q, k, v)

    return store_and_attend


def gather(x, index):
    """x [T, heads, head_dim] at the tokens in index [n, S]: [n, heads, S, head_dim]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def padded_packed(sequences, device):
    """packed_attention in plain PyTorch: sequences are padded for attention only."""
    T = sum(len(own) for _, own in sequences)
    batches = padded_batches(sequences, T, device)
    order = torch.cat([queries.flatten() for queries, _, _ in batches])  # T for padding
    back = order.argsort()[:T]  # undoes the order and drops the padding

    def attend_fn(layer, q, k, v):
        q, k, v = (F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 1)) for x in (q, k, v))  # [T + 1, ..
        outs = []
        for queries, keys, visible in batches:
            out = attention(gather(q, queries), gather(k, keys), gather(v, keys), visible)
            outs.append(out.transpose(1, 2).flatten(0, 1))  # [n * Q, H, head_dim]
        return torch.cat(outs).index_select(0, back).transpose(0, 1)[None]  # [1, H, T, head_dim]

    return attend_fn


# ------------------------------------------------------------ the cache of model.forward


class Cache(NamedTuple):
    """A rectangular KV cache: the token at position p of a row is in slot p."""
    k: torch.Tensor  # [L, B, K, S, head_dim]
    v: torch.Tensor
    lengths: torch.Tensor  # [B] int64: tokens in each row


def cached_attention(cache, positions):
    """The attend_fn that writes to `cache` at `positions` [B, T] and attends up to them."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    slots = torch.arange(cache.k.shape[3], device=positions.device)
    visible = slots <= positions[..., None]  # [B, T, S]

    def attend_fn(layer, q, k, v):
        cache.k[layer][rows, :, positions] = k.transpose(1, 2).to(cache.k.dtype)
        cache.v[layer][rows, :, positions] = v.transpose(1, 2).to(cache.v.dtype)
        return attention(q, cache.k[layer].to(q.dtype), cache.v[layer].to(q.dtype), visible)

    return attend_fn


# ------------------------------------------------------------ decoding with shared prompts


class Layout(NamedTuple):
    """Which of the running rows share a prompt."""
    cached: torch.Tensor  # [B] int64: tokens of each row's prompt, cached apart from the row
    bias: torch.Tensor  # [K * N, 1, P] float32: -inf for slots after the end of each prompt
    members: torch.Tensor  # [N, g] int64: the rows of each prompt, padded with row 0
    index: torch.Tensor  # [B] int64: of each row in members.flatten(); empty if already in order


def decode_attention(own, prompts, layout, positions):
    """The attend_fn for one new token per row, at `positions` [B]; it writes to `own`.

    own, prompts: the caches of the completions and of their prompts, [keys, values] of each layer,
    [K, rows, slots, head_dim] each.
    The rows of a prompt share one product with its keys, and both parts of a row's scores share one
    softmax. A finished row keeps running in its last slot until it is replaced.
    """
    K, B, S = own[0][0].shape[:3]
    N, g = layout.members.shape
    device = positions.device
    last = (positions - layout.cached).clamp(max=S - 1).repeat(K)  # [K * B]
    bias = mask_bias(torch.arange(S, device=device) > last[:, None, None])  # [K * B, 1, S]
    slots = torch.arange(0, K * B * S, S, device=device) + last  # of the new tokens, flattened

    def by_prompt(rows):  # [K * B, R, n] -> [K * N, g * R, n]
        if len(layout.index):
            rows = rows.unflatten(0, (K, B)).index_select(1, layout.members.flatten())
        return rows.reshape(K * N, -1, rows.shape[-1])

    def by_row(groups):  # the inverse
        if len(layout.index):
            groups = groups.view(K, N * g, -1, groups.shape[-1]).index_select(1, layout.index)
        return groups.reshape(K * B, -1, groups.shape[-1])

    def attend_fn(layer, q, k, v):
        head_dim = q.shape[-1]
        keys, values = (cached.flatten(0, 1) for cached in own[layer])  # [K * B, S, head_dim] each
        for cached, new in ((keys, k), (values, v)):
            new = new.transpose(0, 1).reshape(-1, head_dim).to(cached.dtype)  # [K * B, head_dim]
            cached.view(-1, head_dim).index_copy_(0, slots, new)
        q = q.view(B, K, -1, head_dim).transpose(0, 1).reshape(K * B, -1, head_dim)
        scores = float_scores(q, keys, bias)  # [K * B, R, S]
        prompt_keys, prompt_values = (cached.flatten(0, 1) for cached in prompts[layer])
        prompt_scores = by_row(float_scores(by_prompt(q), prompt_keys, layout.bias))
        weights = torch.cat((prompt_scores, scores), -1).softmax(-1).to(q.dtype)
        prompt_weights, own_weights = weights.split((prompt_keys.shape[1], S), -1)
        out = by_row(torch.bmm(by_prompt(prompt_weights), prompt_values))
        out = out.baddbmm_(own_weights, values)  # [K * B, R, head_dim]
        return out.view(K, B, -1, head_dim).transpose(0, 1).reshape(B, -1, 1, head_dim)

    return attend_fn


# ------------------------------------------------------------ variable-length kernels, on a GPU


def has_varlen(device, dtype):
    """Whether FlashAttention's variable-length kernel supports this device and dtype."""
    return (torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(device) >= (8, 0))


def varlen_attn(*args, **settings):
    """PyTorch's varlen_attn: q [Tq, H, head_dim], k and v [Tk, K, head_dim] -> like q.

    The next arguments are `cu_seqlens` of q and of k, and the longest length in q and in k.
    seqused_k: the number of keys that each sequence uses; default all.
    """
    from torch.nn.attention import varlen  # imports the compiler, which takes a second
    return varlen.varlen_attn(*args, **settings)


def cu_seqlens(lengths, device):
    """int32 [N + 1]: the cumulative lengths of N concatenated sequences, from 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def varlen_packed(sequences, device):
    """packed_attention in one kernel call, with a prompt's keys copied for every completion."""
    queries = [len(own) for _, own in sequences]
    keys = [len(prompt) + len(own) for prompt, own in sequences]
    q_starts, k_starts = cu_seqlens(queries, device), cu_seqlens(keys, device)
    sources = torch.tensor([i for prompt, own in sequences for i in (*prompt, *own)], device=device)

    def attend_fn(layer, q, k, v):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, head_dim]
        # float32, because many completions add to the gradient of their prompt's keys
        k, v = (x.float().index_select(0, sources).to(x.dtype) for x in (k, v))
        out = varlen_attn(q, k, v, q_starts, k_starts, max(queries), max(keys), enable_gqa=True,
                          window_size=(-1, 0))  # causal, aligned at the last query and key
        return out.transpose(0, 1)[None]

    return attend_fn


class Slots(NamedTuple):
    """The sampler's KV cache on a GPU, at a fixed address: row b has slots b * S to b * S + S."""
    layers: list  # [keys, values] of each layer, [rows * S, K, head_dim] each
    size: int  # S


def slot_decode(cache, positions):
    """The attend_fn for one new token in each of the first B rows, at `positions` [B].

    A finished row keeps running in its last slot until it is replaced.
    """
    B, S = len(positions), cache.size
    positions = positions.clamp(max=S - 1)
    starts = torch.arange(B + 1, device=positions.device, dtype=torch.int32)
    slots = starts[:-1].long() * S + positions
    lengths = (positions + 1).int()

    def attend_fn(layer, q, k, v):
        for cached, new in zip(cache.layers[layer], (k, v)):
            cached.index_copy_(0, slots, new[:, :, 0])
        keys, values = (cached[:B * S] for cached in cache.layers[layer])
        out = varlen_attn(q[:, :, 0], keys, values, starts, starts * S, 1, S, seqused_k=lengths,
                          enable_gqa=True)
        return out[:, :, None]  # [B, H, 1, head_dim]

    return attend_fn
