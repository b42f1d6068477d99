"""Every way of attending: `model.block` computes a layer, and an attend_fn decides who sees whom.

An attend_fn(layer, q, k, v) -> out is called once in each layer:

    q [B, H, T, head_dim], k and v [B, K, T, head_dim] -> out [B, H, T, head_dim]

    causal_attention    every token sees those before it
    packed_attention    a row of many texts, completions sharing their prompt: training, scoring,
                        and the sampler's prompts
    cached_attention    a rectangle of keys and values that `model.forward` fills
    decode_attention    one new token for each running row, rows of a prompt sharing its keys

Where FlashAttention has a kernel for texts of different lengths (`has_varlen`: half precision, on a
GPU), the second and the last are one call a layer instead: `varlen_packed` and `slot_decode`.
Everything else takes the plain way, which runs everywhere.

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
    """softmax(q k^T / sqrt(head_dim)) v over what is seen, a few of the N products at a time.

    q [N, R * T, head_dim], k and v [N, S, head_dim], unseen bool [N, T, S] -> like q. Only the
    softmax's results are kept, in the dtype of q: to hold all scores in float32 at once takes an
    update in bfloat16 half as long again, and a third more memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, unseen):
        weights = q.new_empty(*q.shape[:2], k.shape[1])
        out = torch.empty_like(q)
        step = max(1, CPU_SCRATCH // weights[0].numel())
        for begin in range(0, len(q), step):
            part = slice(begin, begin + step)
            scores = float_scores(q[part], k[part])
            heads = scores.view(len(scores), -1, *unseen.shape[1:])  # [step, R, T, S]
            heads.masked_fill_(unseen[part, None], -torch.inf)
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
    unseen = (~seen).expand(B, T, S).repeat_interleave(K, 0)  # [B * K, T, S]
    return SlicedAttention.apply(q, k, v, unseen).view(B, H, T, head_dim)


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


def packed_texts(groups):
    """The texts of a packed row, two ranges of it each: what they see before themselves, their own.

    groups: [(prompt length, [completion length, ...]), ...] in the order of the row; a prompt of
    length 0 makes its completions independent texts.
    """
    texts, at = [], 0
    for prompt, lengths in groups:
        front = range(at, at + prompt)
        if prompt:
            texts.append((range(0), front))
        at += prompt
        for n in lengths:
            texts.append((front, range(at, at + n)))
            at += n
    return texts


def packed_positions(groups):
    """[1, T] int64: where each token of a packed row stands in its own text."""
    texts = packed_texts(groups)
    return torch.tensor([[len(front) + i for front, own in texts for i in range(len(own))]])


def padded(ranges, padding):
    """[n, longest] int64, the longest a padded_length."""
    longest = padded_length(max(map(len, ranges)))
    return torch.tensor([[*r, *[padding] * (longest - len(r))] for r in ranges])


def padded_parts(texts, T):
    """The texts that attend in one call, those of one length_class whose prompts are, too.

    [(queries [n, Q], keys [n, S], seen [n, Q, S] or None: causal), ...]: the first two say where
    in the row of T tokens they stand, T for padding.
    """
    alike = {}
    for front, own in texts:
        key = length_class(len(front)), length_class(len(own))
        alike.setdefault(key, []).append((front, own))
    parts = []
    for (front_class, _), texts in alike.items():
        fronts, owns = zip(*texts)
        queries = keys = padded(owns, T)
        seen = None
        if front_class:
            n, Q = queries.shape
            fronts = padded(fronts, T)
            keys = torch.cat((fronts, queries), 1)
            causal = torch.ones(n, Q, Q, dtype=torch.bool).tril()
            seen = torch.cat(((fronts < T)[:, None].expand(-1, Q, -1), causal), 2)
        parts.append((queries, keys, seen))
    return parts


def packed_attention(groups, device="cpu", dtype=torch.float32, store=None):
    """The attend_fn of one row [1, T] of groups: a prompt, then completions that each see it.

    groups: as for packed_texts. dtype: of the queries.
    store: (layers, sources, slots), the sampler's cache, [keys, values] of each layer, each
    [slots, K, head_dim], and which tokens go into which of its slots, int64 [n] each.
    """
    texts = packed_texts(groups)
    attend_fn = (varlen_packed if has_varlen(device, dtype) else padded_packed)(texts, device)
    if store is None:
        return attend_fn
    layers, sources, slots = store

    def store_and_attend(layer, q, k, v):
        for held, new in zip(layers[layer], (k, v)):
            new = new[0].transpose(0, 1).index_select(0, sources)  # [n, K, head_dim]
            held.index_copy_(0, slots, new.to(held.dtype))
        return attend_fn(layer, q, k, v)

    return store_and_attend


def padded_packed(texts, device):
    """The plain way: texts are padded for attention alone, not for the linear layers."""
    T = sum(len(own) for _, own in texts)
    parts = padded_parts(texts, T)
    order = torch.cat([queries.flatten() for queries, _, _ in parts])  # T for padding
    back = torch.empty(T + 1, dtype=torch.int64)
    back[order] = torch.arange(len(order))
    back = back[:T].to(device)
    parts = [[x if x is None else x.to(device) for x in part] for part in parts]

    def attend_fn(layer, q, k, v):
        q, k, v = (F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 1)) for x in (q, k, v))  # [T + 1, ..
        outs = []
        for queries, keys, seen in parts:
            taken = [x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
                     for x, places in ((q, queries), (k, keys), (v, keys))]
            out = attention(*taken, seen)  # [n, H, Q, head_dim]
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


class Layout(NamedTuple):
    """Which of the running rows share a prompt."""
    held: torch.Tensor  # [B] int64: tokens of each row's prompt, whose slots are elsewhere
    ended: torch.Tensor  # [K * N, 1, P] bool: slots behind the end of a prompt
    members: torch.Tensor  # [N, g] int64: the rows of each prompt, padded with row 0
    places: torch.Tensor  # [B] int64: where each row stands in members, flattened; empty if that is
    #                       0, 1, ..., B - 1, so that nothing has to be gathered


def decode_attention(own, prompts, layout, positions):
    """One new token for each row, at `positions` [B]. Its key and value go into `own` first.

    own, prompts: [keys, values] of each layer, [K, rows, slots, head_dim] each: of what the rows
    have said, and of their prompts.
    The rows of a prompt ask it together, in one product; both parts of a row's scores share one
    softmax. A row that has ended runs on until its place is given away: it stays in its last slot.
    """
    K, B, S = own[0][0].shape[:3]
    N, g = layout.members.shape
    device = positions.device
    slots = (positions - layout.held).clamp(max=S - 1).repeat(K)  # [K * B], of the new token
    unseen = torch.arange(S, device=device) > slots[:, None, None]  # [K * B, 1, S]
    slots = torch.arange(0, K * B * S, S, device=device) + slots

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
            held.view(-1, head_dim).index_copy_(0, slots, new)
        q = q.view(B, K, -1, head_dim).transpose(0, 1).reshape(K * B, -1, head_dim)
        scores = float_scores(q, keys).masked_fill_(unseen, -torch.inf)  # [K * B, R, S]
        prompt_keys, prompt_values = (held.flatten(0, 1) for held in prompts[layer])
        prompt_scores = float_scores(gather(q), prompt_keys).masked_fill_(layout.ended, -torch.inf)
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


def varlen_packed(texts, device):
    """packed_attention in one call: each text's keys are gathered, its prompt's and its own."""
    queries = [len(own) for _, own in texts]
    keys = [len(front) + len(own) for front, own in texts]
    q_starts, k_starts = starts_of(queries, device), starts_of(keys, device)
    seen = torch.tensor([i for text in texts for part in text for i in part], device=device)

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
