"""Every way of attending: `model.block` computes a layer, and an attend_fn decides who sees whom.

An attend_fn(layer, q, k, v) -> out is called once in each layer:

    q [B, H, T, head_dim], k and v [B, K, T, head_dim] -> out [B, H, T, head_dim]

    causal_attention    every token sees those before it
    packed_attention    a row of many texts, completions sharing their prompt: training, scoring
    cached_attention    a rectangle of keys and values that `model.forward` fills
    prefill_attention   prompts, a chunk at a time, into the sampler's cache
    decode_attention    one new token for each running row, rows of a prompt sharing its keys

Where FlashAttention has a kernel for texts of different lengths (`has_varlen`: half precision, on a
GPU), the last, the second and the fourth are one call a layer instead: `varlen_packed`,
`slot_prefill` and `slot_decode`. Everything else takes the plain way, which runs everywhere.

Scores and their softmax are float32 on every path. Scores of the real Qwen-2.5 reach 13,000, where
bfloat16 counts in steps of 64; rounding them costs more than all other rounding together.

Grouped-query attention, arXiv:2305.13245; shared prompts, Hydragen, arXiv:2402.05099;
FlashAttention-2, arXiv:2307.08691.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F


def padded_length(n):
    """n rounded up, by at most 31 or a sixteenth, so that lengths are few.

    oneDNN keeps a kernel for every shape it meets: with lengths of every size, the memory of a
    bfloat16 run on a CPU would grow with each step.
    """
    step = 1 << max(5, (n - 1).bit_length() - 5)
    return -(-n // step) * step


def power_of_two(n):
    """The power of two at or above n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def length_class(n):
    """Texts of one class attend in one call: a power of two, at least 32; 0 for no text."""
    return max(32, power_of_two(n)) if n else 0


# ------------------------------------------------------------ the products


CPU_SCRATCH = 2**18  # scores made at a time: they stay in the cache of a CPU


def float_scores(q, k):
    """q k^T / sqrt(head_dim) in float32: [N, M, head_dim], [N, S, head_dim] -> [N, M, S]."""
    scale = q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32).mul_(scale)
    zero = torch.zeros((), device=q.device)
    return torch.baddbmm(zero, q.float(), k.float().mT, beta=0, alpha=scale)


class SlicedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim) + bias) v, a few of the N products at a time.

    q [N, R * T, head_dim], k and v [N, S, head_dim], bias [N, T, S] float32 -> like q. Only the
    softmax's results are kept, in the dtype of q: to hold all scores in float32 at once takes an
    update in bfloat16 half as long again, and a third more memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        weights = q.new_empty(*q.shape[:2], k.shape[1])
        out = torch.empty_like(q)
        step = max(1, CPU_SCRATCH // weights[0].numel())
        for begin in range(0, len(q), step):
            part = slice(begin, begin + step)
            scores = float_scores(q[part], k[part])
            scores.view(len(scores), -1, *bias.shape[1:]).add_(bias[part, None])
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


def plain_attention(q, k, v, seen):
    """The CPU's way. `seen` as for `attention`, but not None."""
    B, H, T, head_dim = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B * K, -1, head_dim)  # the R query heads of one key head stand together
    k, v = (x.reshape(B * K, S, head_dim) for x in (k, v))
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    bias = bias.expand(B, T, S).repeat_interleave(K, 0)  # [B * K, T, S]
    return SlicedAttention.apply(q, k, v, bias).view(B, H, T, head_dim)


def fused_attention(q, k, v, seen=None):
    """The GPU's way: one kernel that never holds the scores. `seen` as for `attention`."""
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    if H != K:  # with a mask and grouped heads at once, no kernel avoids the scores
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(B, T, S)[:, None])


def attention(q, k, v, seen=None):
    """Softmax attention: q [B, H, T, head_dim], k and v [B, K, S, head_dim] -> like q.

    seen: bool [T, S] or [B, T, S], the keys that each query sees; None: causal, with T = S.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and S <= 1024:  # a CPU's fused kernel takes three times as long there
        seen = torch.ones(T, S, dtype=torch.bool).tril() if seen is None else seen
        return plain_attention(q, k, v, seen)
    return fused_attention(q, k, v, seen)


def causal_attention(layer, q, k, v):
    """Every token sees itself and those before it."""
    return attention(q, k, v)


# ------------------------------------------------------------ packed rows


class Part(NamedTuple):
    """Texts of a packed row that attend in one call: of one length_class, as are their prompts."""
    tokens: torch.Tensor  # [n, longest] int64: where in the row each token stands; T for padding
    prompts: torch.Tensor | None  # [n] int64, of completions: which prompt of their part
    seen: torch.Tensor | None  # bool [n, longest, longest prompt + longest]; None: causal


def packed_positions(groups):
    """[1, T] int64: where each token of a packed row stands in its own text; groups as below."""
    spans = []
    for prompt, lengths in groups:
        spans.append(torch.arange(prompt))
        spans += [torch.arange(prompt, prompt + n) for n in lengths]
    return torch.cat(spans)[None]


def packed_parts(groups):
    """{(padded length of the prompt or 0, own padded length): Part}, prompts first, on the CPU."""
    texts, begin = {}, 0  # texts: {key: [(begin, length, index of its prompt), ...]}
    for prompt, lengths in groups:
        front, which = length_class(prompt), None
        if prompt:
            alike = texts.setdefault((0, front), [])
            which = len(alike)
            alike.append((begin, prompt, None))
            begin += prompt
        for n in lengths:
            texts.setdefault((front, length_class(n)), []).append((begin, n, which))
            begin += n
    parts = {}
    for key in sorted(texts):
        begins, lengths, prompts = zip(*texts[key])
        steps = torch.arange(padded_length(max(lengths)))
        inside = steps < torch.tensor(lengths)[:, None]  # [n, longest]
        tokens = torch.where(inside, torch.tensor(begins)[:, None] + steps, begin)
        parts[key] = Part(tokens, None, None)
        if key[0]:
            n, own = tokens.shape
            prompts = torch.tensor(prompts)
            in_prompt = (parts[0, key[0]].tokens < begin)[prompts]  # [n, longest prompt]
            causal = inside.new_ones(n, own, own).tril()
            seen = torch.cat((in_prompt[:, None].expand(-1, own, -1), causal), -1)
            parts[key] = Part(tokens, prompts, seen)
    return parts


def packed_attention(groups, device="cpu", dtype=torch.float32):
    """The attend_fn of one row [1, T] of groups: a prompt, then completions that each see it.

    groups: [(prompt length, [completion length, ...]), ...] in the order of the row; a prompt of
    length 0 makes its completions independent texts. dtype: of the queries.
    The linear layers see every token once and no padding. Texts are padded for attention alone, a
    Part at a time; varlen_packed pads nothing at all.
    """
    if has_varlen(device, dtype):
        return varlen_packed(groups, device)
    parts = packed_parts(groups)
    T = sum(prompt + sum(lengths) for prompt, lengths in groups)
    order = torch.cat([part.tokens.flatten() for part in parts.values()])  # [places], T for padding
    back = torch.empty(T + 1, dtype=torch.int64)
    back[order] = torch.arange(len(order))
    order, back = order.to(device), back[:T].to(device)
    for key, part in parts.items():
        parts[key] = Part(*(x if x is None else x.to(device) for x in part))

    def split(x):  # [1, heads, T, head_dim] -> {key: [n, heads, longest, head_dim]}
        x = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 1)).index_select(0, order)
        pieces = x.split([part.tokens.numel() for part in parts.values()])
        return {key: piece.unflatten(0, part.tokens.shape).transpose(1, 2)
                for (key, part), piece in zip(parts.items(), pieces)}

    def attend_fn(layer, q, k, v):
        q, k, v = split(q), split(k), split(v)
        outs = []
        for key, part in parts.items():
            keys, values = k[key], v[key]
            if part.prompts is not None:
                keys = torch.cat((k[0, key[0]].index_select(0, part.prompts), keys), 2)
                values = torch.cat((v[0, key[0]].index_select(0, part.prompts), values), 2)
            out = attention(q[key], keys, values, part.seen)  # [n, H, longest, head_dim]
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, back).transpose(0, 1)[None]  # [1, H, T, head_dim]

    return attend_fn


# ------------------------------------------------------------ a rectangular cache


class Cache(NamedTuple):
    """Keys and values by slot; the token at position p of a row is held in slot p."""
    k: torch.Tensor  # [L, B, K, S, head_dim]
    v: torch.Tensor
    lengths: torch.Tensor  # [B] int64: tokens held in each row


def cached_attention(cache, positions):
    """Write keys and values into `cache` at `positions` [B, T]; each sees all up to its own."""
    B, T = positions.shape
    rows = torch.arange(B, device=positions.device)[:, None].expand(B, T)
    slots = torch.arange(cache.k.shape[3], device=positions.device)
    seen = slots <= positions[..., None]  # [B, T, S]

    def attend_fn(layer, q, k, v):
        cache.k[layer][rows, :, positions] = k.transpose(1, 2).to(cache.k.dtype)
        cache.v[layer][rows, :, positions] = v.transpose(1, 2).to(cache.v.dtype)
        return attention(q, cache.k[layer].to(q.dtype), cache.v[layer].to(q.dtype), seen)

    return attend_fn


# ------------------------------------------------------------ the sampler's cache


def prefill_attention(store, rows, begin):
    """Write tokens from `begin` on of prompts into `rows` [n] of the store; they see those before.

    store: for each layer [keys, values], each [K, rows, slots, head_dim]. Padding beyond the slots
    is dropped.
    """
    def attend_fn(layer, q, k, v):
        T = q.shape[2]
        seen = []
        for held, new in zip(store[layer], (k, v)):
            end = min(begin + T, held.shape[2])
            held[:, rows, begin:end] = new.transpose(0, 1)[:, :, :end - begin].to(held.dtype)
            before = held[:, rows, :begin].transpose(0, 1).to(new.dtype)  # [n, K, begin, head_dim]
            seen.append(torch.cat((before, new), 2) if begin else new)
        mask = torch.ones(T, begin + T, dtype=torch.bool, device=q.device).tril(begin)
        return attention(q, *seen, mask if begin else None)

    return attend_fn


class Layout(NamedTuple):
    """Where the running rows hold their keys and values, and which rows share a prompt."""
    lengths: torch.Tensor  # [B] int64: slots that each row holds
    prompt_bias: torch.Tensor  # [K * N, 1, P] float32: -inf where a prompt has ended
    members: torch.Tensor  # [N, g] int64: the rows of each prompt, padded with row 0
    places: torch.Tensor  # [B] int64: where each row stands in members, flattened; empty if that is
    #                       0, 1, ..., B - 1, so that nothing has to be gathered


def decode_attention(own, prompts, layout):
    """One new token for each row: q [B, H, 1, head_dim]. Its key and value go into `own` first.

    own, prompts: stores as for prefill_attention, of what the rows have said and of their prompts.
    The rows of a prompt ask it together, in one product; both parts of a row's scores share one
    softmax. A row that has ended runs on until its place is given away: it stays in its last slot.
    """
    K, B, S = own[0][0].shape[:3]
    N, g = layout.members.shape
    device = layout.lengths.device
    lengths = layout.lengths.clamp(max=S - 1).repeat(K)  # [K * B]
    next_slots = torch.arange(0, K * B * S, S, device=device) + lengths
    unseen = torch.arange(S, device=device) > lengths[:, None]  # [K * B, S]: the new token is seen
    own_bias = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, -torch.inf)[:, None]

    def gather(rows):  # [K * B, R, n] -> [K * N, g * R, n]: all rows of a prompt
        if len(layout.places):
            rows = rows.unflatten(0, (K, B)).index_select(1, layout.members.flatten())
        return rows.reshape(K * N, -1, rows.shape[-1])

    def scatter(groups):  # and back
        if len(layout.places):
            groups = groups.view(K, N * g, -1, groups.shape[-1]).index_select(1, layout.places)
        return groups.reshape(K * B, -1, groups.shape[-1])

    def attend_fn(layer, q, k, v):
        head_dim = q.shape[-1]
        keys, values = (held.flatten(0, 1) for held in own[layer])  # [K * B, S, head_dim] each
        for held, new in ((keys, k), (values, v)):
            new = new.transpose(0, 1).reshape(-1, head_dim).to(held.dtype)  # [K * B, head_dim]
            held.view(-1, head_dim).index_copy_(0, next_slots, new)
        q = q.view(B, K, -1, head_dim).transpose(0, 1).reshape(K * B, -1, head_dim)
        scores = float_scores(q, keys).add_(own_bias)  # [K * B, R, S]
        prompt_keys, prompt_values = (held.flatten(0, 1) for held in prompts[layer])
        prompt_scores = float_scores(gather(q), prompt_keys).add_(layout.prompt_bias)
        both = torch.cat((scatter(prompt_scores), scores), -1).softmax(-1).to(q.dtype)
        of_prompt, of_own = both.split((prompt_keys.shape[1], S), -1)
        out = scatter(torch.bmm(gather(of_prompt), prompt_values)).baddbmm_(of_own, values)
        return out.view(K, B, -1, head_dim).transpose(0, 1).reshape(B, -1, 1, head_dim)

    return attend_fn


# ------------------------------------------------------------ texts of different lengths, on a GPU


def has_varlen(device, dtype):
    """Whether FlashAttention's kernel for texts of different lengths runs here."""
    return (torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(device) >= (8, 0))


def varlen_attn(*args, **settings):
    """PyTorch's varlen_attn: q [Tq, H, head_dim], k and v [Tk, K, head_dim] -> like q.

    Next come where the texts begin in q and in k (`starts_of`), and the length of the longest in q
    and in k. seqused_k: how many of its keys each text sees, if not all.
    """
    from torch.nn.attention import varlen  # it loads the compiler, which takes a second
    return varlen.varlen_attn(*args, **settings)


def starts_of(lengths, device):
    """int32 [N + 1]: where each of N texts laid end to end begins, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def varlen_packed(groups, device):
    """packed_attention in one call: each text's keys are gathered, its prompt's and its own."""
    queries, keys, seen = [], [], []  # lengths of a text's queries and keys; where its keys stand
    begin = 0
    for prompt, completions in groups:
        texts = [(begin, 0, prompt)] if prompt else []  # begin of the text, tokens it sees before
        at = begin + prompt
        for n in completions:
            texts.append((at, prompt, n))
            at += n
        for text, before, n in texts:
            queries.append(n)
            keys.append(before + n)
            seen += [*range(begin, begin + before), *range(text, text + n)]
        begin = at
    q_starts, k_starts = starts_of(queries, device), starts_of(keys, device)
    seen = torch.tensor(seen, device=device)

    def attend_fn(layer, q, k, v):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, head_dim]
        # in float32: many completions add to the gradient of a prompt's keys
        k, v = (x.float().index_select(0, seen).to(x.dtype) for x in (k, v))
        out = varlen_attn(q, k, v, q_starts, k_starts, max(queries), max(keys), enable_gqa=True,
                          window_size=(-1, 0))  # causal, the last query seeing the last key
        return out.transpose(0, 1)[None]

    return attend_fn


class Slots(NamedTuple):
    """The cache of a GPU's sampler, which stays where it is: row b has slots b * S to b * S + S."""
    layers: list  # [keys, values] of each layer, [rows * S, K, head_dim] each
    size: int  # S


def slot_prefill(cache, lengths, sources, slots):
    """Prompts of these lengths, end to end in one row [1, T], that each see themselves.

    sources, slots: int64 [n], which token's key and value go into which slot; those of a prompt go
    into the slots of all its samples.
    """
    starts = starts_of(lengths, slots.device)

    def attend_fn(layer, q, k, v):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, head_dim]
        for held, new in zip(cache.layers[layer], (k, v)):
            held.index_copy_(0, slots, new.index_select(0, sources))
        out = varlen_attn(q, k, v, starts, starts, max(lengths), max(lengths), enable_gqa=True,
                          window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    return attend_fn


def slot_decode(cache, positions):
    """One new token for each of the first B rows, at `positions` [B], seeing all before it.

    A row that has ended runs on until its place is given away: it stays in its last slot.
    """
    B, S = len(positions), cache.size
    positions = positions.clamp(max=S - 1)
    starts = torch.arange(B + 1, device=positions.device, dtype=torch.int32)
    slots = starts[:-1].long() * S + positions
    held = (positions + 1).int()

    def attend_fn(layer, q, k, v):
        for cached, new in zip(cache.layers[layer], (k, v)):
            cached.index_copy_(0, slots, new[:, :, 0])
        keys, values = (cached[:B * S] for cached in cache.layers[layer])
        out = varlen_attn(q[:, :, 0], keys, values, starts, starts * S, 1, S, seqused_k=held,
                          enable_gqa=True)
        return out[:, :, None]  # [B, H, 1, head_dim]

    return attend_fn
