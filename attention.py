"""Every way of attending: `model.block` computes a layer, and an attend_fn decides who sees whom.

An attend_fn(layer, q, k, v) -> out is called once in each layer:

    q [B, H, T, head_dim], k and v [B, K, T, head_dim] -> out [B, H, T, head_dim]

    causal_attention    every token sees those before it
    packed_attention    a row of many texts, completions sharing their prompt: training, scoring
    cached_attention    a rectangle of keys and values that `model.forward` fills
    prefill_attention   prompts, a chunk at a time, into the sampler's cache
    decode_attention    one new token for each running row, rows of a prompt sharing its keys

Scores and their softmax are float32 on every path. Scores of the real Qwen-2.5 reach 13,000, where
bfloat16 counts in steps of 64; rounding them costs more than all other rounding together.

Grouped-query attention, arXiv:2305.13245; shared prompts, Hydragen, arXiv:2402.05099.
"""

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
    """The power of two at or above n, at least 32; 0 for 0."""
    return max(32, 1 << (n - 1).bit_length()) if n else 0


# ------------------------------------------------------------ the products


def float_scores(q, k):
    """q k^T / sqrt(head_dim) in float32: [N, M, head_dim], [N, S, head_dim] -> [N, M, S]."""
    scale = q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32) * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.bmm(q.to(wide) * scale, k.to(wide).mT)


def plain_attention(q, k, v, seen):
    """The CPU's way: scores, softmax, product. `seen` as for `attention`, but not None."""
    B, H, T, head_dim = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B * K, -1, head_dim)  # the query heads of one key head stand together
    k, v = (x.reshape(B * K, S, head_dim) for x in (k, v))
    scores = float_scores(q, k)  # [B * K, H / K * T, S]
    scores.view(B, -1, T, S).masked_fill_(~seen.expand(B, T, S)[:, None], -torch.inf)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(B, H, T, head_dim)


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
    """Texts of a packed row that attend in one call: their lengths, and prompts', are alike."""
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
        front, which = power_of_two(prompt), None
        if prompt:
            alike = texts.setdefault((0, front), [])
            which = len(alike)
            alike.append((begin, prompt, None))
            begin += prompt
        for n in lengths:
            texts.setdefault((front, power_of_two(n)), []).append((begin, n, which))
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


def packed_attention(groups, device="cpu"):
    """The attend_fn of one row [1, T] of groups: a prompt, then completions that each see it.

    groups: [(prompt length, [completion length, ...]), ...] in the order of the row. A prompt of no
    tokens makes its completions texts of their own. The linear layers see every token once and no
    padding. Only here are texts padded: those whose lengths, and prompts', round up to the same
    powers of two attend in one call.
    """
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
    """Write the tokens from `begin` on of prompts into `rows` [n] of the store; they see all before.

    store: keys and values, for each layer [2, K, rows, slots, head_dim]. Padding beyond the slots
    is dropped.
    """
    def attend_fn(layer, q, k, v):
        kv = torch.stack((k.transpose(0, 1), v.transpose(0, 1)))  # [2, K, n, T, head_dim]
        end = min(begin + k.shape[2], store[layer].shape[3])
        store[layer][:, :, rows, begin:end] = kv[..., :end - begin, :]
        if begin == 0:
            return attention(q, k, v)
        before = store[layer][:, :, rows, :begin]
        keys, values = torch.cat((before, kv), 3).transpose(1, 2)  # [n, K, begin + T, head_dim]
        seen = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(begin)
        return attention(q, keys, values, seen)

    return attend_fn


class Layout(NamedTuple):
    """Where the running rows hold their keys and values, and which rows share a prompt."""
    slots: torch.Tensor  # [2 * K * B] int64: where in the flattened store the next key, value goes
    lengths: torch.Tensor  # [B] int64: slots that each row holds
    prompt_bias: torch.Tensor  # [K * N, 1, P] float32: -inf where a prompt has ended
    members: torch.Tensor  # [N, g] int64: the rows of each prompt, padded with row 0
    places: torch.Tensor  # [B] int64: where in members, flattened, a row stands; empty: members is
    #                       0, 1, ..., B - 1 and nothing need be gathered


def decode_attention(own, shared, layout, S):
    """One new token for each row: q [B, H, 1, head_dim]. Its key and value go into `own` first.

    own, shared: stores as for prefill_attention, of the rows and of their prompts (None: rows hold
    those, too). S: own slots to attend to. The rows of a prompt ask it together, in one product;
    both parts of a row's scores share one softmax.
    """
    K, B = own[0].shape[1:3]
    N, g = layout.members.shape if shared else (0, 0)
    slots = torch.arange(S, device=layout.lengths.device)
    unseen = slots > layout.lengths[:, None]  # [B, S]; the new token sees itself
    own_bias = torch.zeros(unseen.shape, device=slots.device).masked_fill_(unseen, -torch.inf)
    own_bias = own_bias.repeat(K, 1)[:, None]  # [K * B, 1, S]

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
        kv = torch.stack((k.transpose(0, 1), v.transpose(0, 1)))  # [2, K, B, 1, head_dim]
        own[layer].view(-1, head_dim).index_copy_(0, layout.slots, kv.view(-1, head_dim))
        keys, values = own[layer].flatten(1, 2)[:, :, :S]  # [K * B, S, head_dim] each
        q = q.view(B, K, -1, head_dim).transpose(0, 1).reshape(K * B, -1, head_dim)
        scores = float_scores(q, keys).add_(own_bias)  # [K * B, R, S]
        if shared is None:
            out = torch.bmm(scores.softmax(-1).to(q.dtype), values)
        else:
            P = layout.prompt_bias.shape[2]
            prompt_keys, prompt_values = shared[layer].flatten(1, 2)[:, :, :P]  # [K * N, P, head_dim]
            prompt_scores = float_scores(gather(q), prompt_keys)  # [K * N, g * R, P]
            prompt_scores = scatter(prompt_scores.add_(layout.prompt_bias))  # [K * B, R, P]
            weights = torch.cat((prompt_scores, scores), -1).softmax(-1).to(q.dtype)
            of_prompt, of_own = weights.split((P, S), -1)
            out = scatter(torch.bmm(gather(of_prompt), prompt_values)).baddbmm_(of_own, values)
        return out.view(K, B, -1, head_dim).transpose(0, 1).reshape(B, -1, 1, head_dim)

    return attend_fn
