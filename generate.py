"""The sampling engine: batched, with a key/value cache, and the log-probability of every token that it draws.

    python generate.py --model tiny --prompt "What is 3 + 4 * 5?"
    python generate.py --model qwen2.5-1.5b-instruct                    # a chat; Ctrl-D ends it
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --think-budget 200 --hide-thinking
    python generate.py --model tiny --benchmark

    completions = generate(params, config, prompts, num_samples=8, max_new_tokens=512, stop_tokens=config.eos_token_id)
    completions[prompt][sample].tokens, .logprobs, .finish

A prompt is computed once and its keys and values are held once: its samples attend to them together, and each to its
own tokens (Hydragen, arXiv:2402.05099). Rows that finish leave the batch and waiting ones take their place (Orca, OSDI
2022). Bounds on thinking are those of s1, arXiv:2501.19393. A GPU runs the same code, and replays it as CUDA graphs.
"""

import argparse
import hashlib
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import (load_config, load_params, load_system_prompt, load_tokenizer, merged_weight, padded_length,
                   render_chat, resolve_model, rope_table)
from optim import end_with_parent


def add_sampling_flags(parser, temperature=1.0, top_p=1.0, max_new_tokens=512):
    """The flags of everything that samples; the scripts that import this file share them."""
    add = parser.add_argument
    add("--temperature", type=float, default=temperature, help="0 is greedy")
    add("--top-p", type=float, default=top_p, help="sample from the likeliest tokens that hold this share; 1: all")
    add("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    add("--max-new-tokens", type=int, default=max_new_tokens, help="the longest completion, in tokens")
    add("--max-batch", type=int, default=64, help="rows that decode at once")
    add("--think-tag", default="think", help="name of the thinking block: <think> ... </think>")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--prompt", help="what to ask; without it, an interactive chat")
    add("--system", help="the system turn; default: the model's own")
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add_sampling_flags(p, temperature=0.7, top_p=0.8)
    add("--think-budget", type=int, default=0, help="tokens after which the thinking block is closed; 0: never")
    add("--think-minimum", type=int, default=0, help='tokens before which closing it is undone, by "Wait"')
    add("--repetition", type=int, default=0, help="stop when this many last tokens repeat one phrase; 0: never")
    add("--hide-thinking", action="store_true", help="show only what stands outside the thinking block")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--compile", action="store_true", help="torch.compile the layers (a minute, once)")
    add("--threads", type=int, help="default: what PyTorch chooses")
    add("--seed", type=int, default=0)
    add("--benchmark", nargs="*", choices=("fixed", "mixed", "context"), help="measure these loads; none named: all")
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 64], help="rows of the fixed load; of the mixed, the most")
    add("--new-tokens", type=int, default=64, help="prompt and completion length of the fixed load")
    add("--repeat", type=int, default=5, help="runs of each measurement, of which the median counts")
    return p.parse_args(argv)


class Completion(NamedTuple):
    tokens: list[int]  # the stop token, when one was drawn, is the last
    logprobs: list[float]  # of each token under the temperature-scaled distribution, before top-p and top-k cut it
    finish: str  # "stop" | "length" | "repetition"
    forced: list[int] = []  # indices of tokens put there by a thinking budget: not sampled, so not to be trained on


# ------------------------------------------------------------------------------------ drawing a token


def mix(x):
    """The finaliser of splitmix64: int64 -> int64, every bit of the result depending on every bit of x."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        unsigned = (x >> shift) & ((1 << (64 - shift)) - 1)  # >> carries the sign along
        x = (x ^ unsigned) * factor  # int64 wraps, as it should
    return x


def uniform(keys, draws):
    """Splitmix64, which has no state: a float32 in [0, 1) for each pair of keys and draws, int64 [B] each."""
    return (mix(keys + (draws + 1) * (0x9E3779B97F4A7C15 - 2**64)) >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int64 from which all the noise of one completion derives."""
    digest = hashlib.blake2b(f"{seed} {prompt_seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def inverse_cdf(weights, noise):
    """The index whose stretch of the cumulative sum holds the noise: [B, V] >= 0, [B, 1] in [0, 1) -> [B, 1] int64.

    A large vocabulary is searched in two levels, blocks of 64 and within one, without its whole cumulative sum.
    """
    B, V = weights.shape
    if V <= 4096:
        cdf = weights.cumsum(-1)
        return torch.searchsorted(cdf, noise * cdf[:, -1:], right=True)
    width = math.gcd(V, 64)
    blocks = weights.view(B, -1, width)
    cdf = blocks.sum(-1).cumsum(-1)  # [B, V / width]
    point = noise * cdf[:, -1:]
    which = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[1] - 1)
    inner = blocks.gather(1, which[..., None].expand(-1, -1, width))[:, 0].cumsum(-1)  # [B, width]
    point = point - (cdf.gather(1, which) - inner[:, -1:])
    # rounding may put the point a hair outside its block; a token of weight zero must not be chosen
    point = point.clamp_(min=0).minimum(inner[:, -1:] * (1 - 2**-24))
    return which * width + torch.searchsorted(inner, point, right=True)


def sample_tokens(logits, noise, temperature=1.0, top_p=1.0, top_k=0, forced=None):
    """One token per row: logits [B, V] float32, noise [B] in [0, 1) -> tokens [B] int64, log-probabilities [B] float32.

    Top-k is applied first, then top-p to what it left. Temperature 0: greedy, with log-probabilities at temperature 1.
    forced: [B] tokens to take instead of drawing; -1: draw.
    """
    logits = logits if temperature in (0, 1) else logits / temperature
    probs = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif top_k == 0 and top_p == 1:
        tokens = inverse_cdf(probs, noise[:, None])
    else:
        # A nucleus seldom needs more than 1,024 tokens. Asking whether it does would stall a GPU, which sorts faster.
        few = min(top_k or (1024 if logits.device.type == "cpu" else logits.shape[1]), logits.shape[1])
        weights, ids = probs.topk(few)  # [B, few], likeliest first
        if not top_k and few < logits.shape[1] and bool((weights.sum(-1) < top_p).any()):
            weights, ids = probs.sort(descending=True)
        if top_p < 1:
            likelier = weights.cumsum(-1) - weights  # the share of those before each
            weights = weights * (likelier < top_p * (weights.sum(-1, keepdim=True) if top_k else 1))
        cdf = weights.cumsum(-1)
        tokens = ids.gather(1, torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True))
    logprobs = probs.gather(1, tokens).log()
    if forced is not None:  # relative to the drawn token, whose probability has not underflowed
        drawn, tokens = tokens, torch.where(forced[:, None] < 0, tokens, forced[:, None])
        logprobs = logprobs + (logits.gather(1, tokens) - logits.gather(1, drawn))
    return tokens[:, 0], logprobs[:, 0]


# ------------------------------------------------------------------------------------ the forward pass, for sampling


def sampling_params(params, config, dtype=None, device=None, packed=None, out=None):
    """The weights as `generate` runs on them, a new dict; call this again after an update.

    The adapter is merged; q, k and v are joined; the weights of each norm, and the square root of D that turns x / |x|
    into a root mean square, are multiplied into the layer behind it. On a CPU matrices are packed for oneDNN, whose
    products are the same to the last bit for (almost) any number of rows.
    out: an earlier result, not packed, to be written in place: CUDA graphs read the weights where they were.
    """
    merged, weights = partial(merged_weight, params), {}  # one after the other: no second copy of all
    like = merged("model.norm.weight")
    dtype, device = dtype or like.dtype, torch.device(device or like.device)
    if packed is None:
        packed = device.type == "cpu" and torch.backends.mkldnn.is_available()

    def put(name, tensor, norm=None):
        if norm is not None:
            tensor = tensor * (merged(norm).float() * config.hidden_size ** 0.5)
        tensor = tensor.detach().to(device, dtype)
        if packed and name.endswith(".weight"):
            weights[name] = torch.ops.mkldnn._reorder_linear_weight(tensor.contiguous(), 32)
        else:
            weights[name] = out[name].copy_(tensor) if out else tensor.clone()

    for layer in range(config.num_hidden_layers):
        pre = f"model.layers.{layer}."
        norm1, norm2 = pre + "input_layernorm.weight", pre + "post_attention_layernorm.weight"
        put(f"{layer}.qkv.weight", torch.cat([merged(f"{pre}self_attn.{name}_proj.weight") for name in "qkv"]), norm1)
        put(f"{layer}.qkv.bias", torch.cat([merged(f"{pre}self_attn.{name}_proj.bias") for name in "qkv"]))
        put(f"{layer}.o.weight", merged(pre + "self_attn.o_proj.weight"))
        put(f"{layer}.gate.weight", merged(pre + "mlp.gate_proj.weight"), norm2)
        put(f"{layer}.up.weight", merged(pre + "mlp.up_proj.weight"), norm2)
        put(f"{layer}.down.weight", merged(pre + "mlp.down_proj.weight"))
    embedding = merged("model.embed_tokens.weight")
    put("embedding", embedding)
    put("head.weight", embedding if config.tie_word_embeddings else merged("lm_head.weight"), "model.norm.weight")
    return weights


def project(weights, name, x, then="none", other=None):
    """A linear layer and what follows it: [N, in] -> [N, out]. then: "none", "swish"; "add" or "mul" with `other`."""
    weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
    if weight.is_mkldnn:
        fused = torch.ops.mkldnn._linear_pointwise
        return fused(x, weight, bias, then, [], "") if other is None else fused.binary(x, other, weight, bias, then)
    out = F.linear(x, weight, bias)
    return out if then == "none" else F.silu(out) if then == "swish" else other + out if then == "add" else other * out


def unit_norm(x, config):
    """x / sqrt(|x|^2 + D eps): RMSNorm but for the factors that the weights hold. [N, D] -> [N, D]."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()  # [N, 1]
    return (x * torch.rsqrt(squares + config.hidden_size * config.rms_norm_eps)).to(x.dtype)


def first_half(weights, config, x, cos, sin):
    """A layer up to its attention: x [N, D], cos and sin [N, 1, head_dim] -> q [N, H, head_dim], kv [N, 2 K, head_dim].

    sin: from rope_for_sampling, which spares the rotation its minus.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    qkv = project(weights, "qkv", unit_norm(x, config)).view(len(x), H + 2 * K, config.head_dim)
    qk = qkv[:, :H + K]
    first, second = qk.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    qk.mul_(cos).addcmul_(swapped, sin)
    return qkv.split((H, 2 * K), 1)


def second_half(weights, config, x, attended):
    """The rest of the layer: x [N, D], attended [N, H * head_dim] -> [N, D]."""
    x = project(weights, "o", attended, "add", x)
    h = unit_norm(x, config)
    return project(weights, "down", project(weights, "up", h, "mul", project(weights, "gate", h, "swish")), "add", x)


def rope_for_sampling(config, length, like):
    """[length, 2, 1, head_dim]: cos and sin of positions 0, 1, ...; the first half of sin is negated."""
    cos, sin = rope_table(config, torch.arange(length, device=like.device)[None], torch.float32)
    sin[..., :config.head_dim // 2].neg_()
    return torch.stack((cos[0, 0], sin[0, 0]), 1)[:, :, None].to(like.dtype)


# ------------------------------------------------------------------------------------ the cache


def new_store(config, rows, slots, like):
    """Keys and values: a tensor [2, K, rows, slots, head_dim] per layer, in the dtype and on the device of `like`.

    Rows of one prompt that stand side by side are then, in each head, the rows of one product with its keys.
    """
    shape = (2, config.num_key_value_heads, rows, slots, config.head_dim)
    return [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]


def resize_store(store, rows, slots, kept):
    """Make it `rows` rows of `slots` tokens, in place, the old rows `kept` first. One layer at a time is held twice."""
    for layer, old in enumerate(store):
        store[layer] = old.new_zeros(2, old.shape[1], rows, slots, old.shape[4])
        both = min(slots, old.shape[3])
        store[layer][:, :, :len(kept), :both] = old[:, :, kept, :both]


def prefill(weights, layers, config, store, rows, prompts, rope, chunk):
    """Write the keys and values of `prompts` into `rows` of the store, at most `chunk` tokens of them at a time."""
    todo = sorted(((prompt, row) for prompt, row in zip(prompts, rows) if prompt), key=lambda pair: -len(pair[0]))
    device = weights["embedding"].device
    while todo:
        longest = len(todo[0][0])
        width = min(padded_length(longest), chunk)
        group, todo = todo[:chunk // width], todo[chunk // width:]
        n, at = len(group), torch.tensor([row for _, row in group], device=device)
        padded = -(-longest // width) * width
        tokens = torch.tensor([prompt + [0] * (padded - len(prompt)) for prompt, _ in group], device=device)
        for begin in range(0, longest, width):
            end = min(begin + width, longest)
            seen = torch.ones(width, begin + width, dtype=torch.bool, device=device).tril(begin) if begin else None
            cos, sin = rope[begin:begin + width].repeat(n, 1, 1, 1).unbind(1)  # [n * T, 1, head_dim] each
            x = F.embedding(tokens[:, begin:begin + width], weights["embedding"]).flatten(0, 1)  # [n * T, D]
            for of_layer, memory in zip(layers, store):
                q, kv = first_half(of_layer, config, x, cos, sin)
                kv = kv.view(n, width, 2, -1, config.head_dim).permute(2, 3, 0, 1, 4)  # [2, K, n, T, head_dim]
                memory[:, :, at, begin:end] = kv[..., :end - begin, :]
                if of_layer is layers[-1]:
                    break  # nothing reads what comes after
                if begin:
                    kv = torch.cat((memory[:, :, at, :begin], kv), 3)
                k, v = kv.transpose(1, 2)  # [n, K, S, head_dim]
                q = q.view(n, width, -1, config.head_dim).transpose(1, 2)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
                x = second_half(of_layer, config, x, out.transpose(1, 2).reshape(len(x), -1))


# ------------------------------------------------------------------------------------ one step for every row


class State(NamedTuple):
    """What a decode step reads and moves on, as tensors, so that a step never waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, the next to be fed
    positions: torch.Tensor  # [B] where in its text it stands
    slots: torch.Tensor  # [2 * K * B] where in the flattened cache its keys and values go
    own_bias: torch.Tensor  # [K * B, 1, S] added to scores: 0 for what the row's own part of the cache holds, or -1e30
    shared_bias: torch.Tensor  # [K * N, 1, P] the same of the prompts
    keys: torch.Tensor  # [B] of the noise
    draws: torch.Tensor  # [B] how many it has used
    forced: torch.Tensor  # [B] the token to put next, or -1
    members: torch.Tensor  # [N, g] the rows of each shared prompt, padded with row 0
    places: torch.Tensor  # [B] where in members, flattened, a row stands; empty when members is 0, 1, ..., B - 1


def decode_layer(weights, config, x, cos, sin, own, shared, state):
    """One layer for one new token per row: x [B, D] -> [B, D]. Writes its key and value into `own`."""
    B, K, head_dim = len(x), config.num_key_value_heads, config.head_dim
    q, kv = first_half(weights, config, x, cos, sin)
    own.view(-1, head_dim).index_copy_(0, state.slots, kv.transpose(0, 1).reshape(-1, head_dim))
    own_k, own_v = own.flatten(1, 2)  # [K * B, S, head_dim] each
    q = q.view(B, K, -1, head_dim).transpose(0, 1).flatten(0, 1)  # the R query heads of one key head stand together
    scale, R = head_dim ** -0.5, q.shape[1]
    scores = torch.baddbmm(state.own_bias, q, own_k.mT, alpha=scale)  # [K * B, R, S]
    if shared is None:
        out = torch.bmm(scores.softmax(-1), own_v)
    else:
        (N, g), (shared_k, shared_v) = state.members.shape, shared.flatten(1, 2)  # [K * N, P, head_dim] each

        def gathered(rows):  # [K * B, R, n] -> [K * N, g * R, n]: all rows of a prompt
            if len(state.places):
                rows = rows.unflatten(0, (K, B)).index_select(1, state.members.flatten())
            return rows.reshape(K * N, g * R, -1)

        def scattered(groups):  # and back
            if len(state.places):
                groups = groups.view(K, N * g, -1).index_select(1, state.places)
            return groups.view(K * B, R, -1)

        prompt_scores = torch.baddbmm(state.shared_bias, gathered(q), shared_k.mT, alpha=scale)  # [K * N, g * R, P]
        shares = torch.cat((scattered(prompt_scores), scores), -1).softmax(-1)
        of_prompt, of_own = shares.split((shared_k.shape[1], own_k.shape[1]), -1)
        out = scattered(torch.bmm(gathered(of_prompt), shared_v)).baddbmm_(of_own, own_v)
    return second_half(weights, config, x, out.view(K, B, -1).transpose(0, 1).reshape(B, -1))


def decode_step(weights, layers, config, state, own, shared, rope, sampling, layer_fn):
    """Feed each row's last token, draw the next: tokens [B] and log-probabilities [B]. Writes to `state` and `own`."""
    state.own_bias.view(-1).index_fill_(0, state.slots[:len(state.slots) // 2], 0)  # a token sees itself
    cos, sin = rope[state.positions].unbind(1)  # [B, 1, head_dim]
    x = F.embedding(state.tokens, weights["embedding"])  # [B, D]
    for i, of_layer in enumerate(layers):
        x = layer_fn(of_layer, config, x, cos, sin, own[i], shared and shared[i], state)
    logits = project(weights, "head", unit_norm(x, config)).float()
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), *sampling)
    state.tokens.copy_(tokens)
    for counter in (state.positions, state.slots, state.draws):
        counter.add_(1)
    return tokens, logprobs


def captured_step(step_fn, state, graphs, shape):
    """step_fn(), on a GPU as a CUDA graph, captured once per shape. What it reads and writes must stay where it is."""
    if state.tokens.device.type != "cuda":
        return step_fn()
    if shape not in graphs:
        before, side = [tensor.clone() for tensor in state], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
            step_fn()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, old in zip(state, before):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step_fn()
        graphs[shape] = graph, out
    graph, out = graphs[shape]
    graph.replay()
    return [tensor.clone() for tensor in out]


# ------------------------------------------------------------------------------------ what ends a row, or bends it


class Rules(NamedTuple):
    stop_tokens: frozenset
    stop_strings: tuple
    repetition: int
    think_budget: int
    think_minimum: int
    think_tag: str
    tokenizer: Tokenizer | None

    @property
    def bound_thinking(self):
        return bool(self.think_budget or self.think_minimum)

    def text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(eq=False)
class Row:
    """One completion on its way."""
    prompt: int = -1
    sample: int = -1
    key: int = 0  # of its noise
    limit: int = 0
    first: int = 0  # the last token of its prompt, which is the first that it feeds
    base: int = 0  # tokens of its prompt held in the shared part of the cache
    private: int = 0  # tokens of its prompt held in its own part
    opened: int | None = None  # how many tokens it had when its thinking block opened
    closed: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # indices of those that were put there
    queue: list[int] = field(default_factory=list)  # tokens to put next
    draws: int = 0

    @property
    def held(self):
        return self.private + len(self.tokens)

    def take(self, tokens, logprobs):
        if self.queue:
            self.forced.append(len(self.tokens))
            self.queue.pop(0)
        self.tokens += tokens
        self.logprobs += logprobs
        self.draws += len(tokens)


def loops(tokens, span):
    """Whether the last `span` tokens are one phrase, said at least four times over."""
    tail = tokens[-span:]
    return len(tail) == span and any(tail[n:] == tail[:-n] for n in range(1, span // 4 + 1))


def steer_thinking(row, rules):
    """Keep the thinking block between its minimum and its budget, by tokens queued to be put next."""
    opening, closing = f"<{rules.think_tag}>", f"</{rules.think_tag}>"
    if row.opened is None:
        if opening in rules.text(row.tokens[-len(opening):]):
            row.opened = len(row.tokens)
        return
    spent = len(row.tokens) - row.opened
    thought = rules.text(row.tokens[-min(spent, 32):] if spent else [])  # its end, where the tag would be
    if closing not in thought:
        if rules.think_budget and spent >= rules.think_budget and not row.queue:
            row.queue = rules.encode(("" if thought.endswith("\n") else "\n") + closing + "\n")
    elif spent < rules.think_minimum and not (row.queue or row.forced[-1:] == [len(row.tokens) - 1]):
        length = len(rules.text(row.tokens[row.opened:]).partition(closing)[0])
        while len(rules.text(row.tokens[row.opened:])) > length:  # take the tag back, as the cache does
            row.tokens.pop()
            row.logprobs.pop()
        row.queue = rules.encode("Wait")
    elif not row.queue:
        row.closed = True


def finish_reason(row, rules):
    """Why a row ends with its last token, or None. Queues what it has to say next."""
    if row.tokens[-1] in rules.stop_tokens:
        return "stop"
    if rules.stop_strings:  # a character takes four tokens at most, one for each of its bytes
        tail = rules.text(row.tokens[-4 * max(map(len, rules.stop_strings)):])
        if any(string in tail for string in rules.stop_strings):
            return "stop"
    if rules.bound_thinking and not row.closed:
        steer_thinking(row, rules)
    if rules.repetition and loops(row.tokens, rules.repetition):
        return "repetition"
    return "length" if len(row.tokens) >= row.limit else None


# ------------------------------------------------------------------------------------ who is in the batch


@dataclass
class Batch:
    """The rows that decode together, and what they have cached."""
    live: list  # the Row in each place of the batch; None where there is none
    own: list  # store of what each row has said, and of its prompt unless that is shared: one row per place
    shared: list | None  # store of the prompts, when their samples share them
    slots: dict  # prompt: its row in `shared`
    on_cpu: bool  # elsewhere few shapes are allotted, for few CUDA graphs

    @property
    def rows(self):
        return [row for row in self.live if row]

    def count(self, n):
        """Places for n rows."""
        return n if self.on_cpu else 1 << (n - 1).bit_length()

    def reach(self, held):
        """Slots for rows that hold `held` tokens, with room to go on."""
        block = 32 if self.on_cpu else 256
        return -(-(held + 1 + held // 16) // block) * block

    def needs(self, rows):
        """Slots that `rows` and their prompts need in all."""
        needed = self.count(len(rows)) * self.reach(max(row.held for row in rows))
        if self.shared:
            needed += self.count(len({row.prompt for row in rows})) * self.reach(max(row.base for row in rows))
        return needed


def choose_rows(batch, waiting, max_batch, budget):
    """Send young rows back to `waiting` while the cache needs over `budget` slots; let rows enter, and return those.

    A row that has to start again says the same again, since its noise has no state.
    """
    rows, entering = batch.rows, []
    while len(rows) > 1 and batch.needs(rows) > budget:
        gone = min(rows, key=lambda row: len(row.tokens))
        rows.remove(gone)
        batch.live[batch.live.index(gone)] = None
        waiting.appendleft(replace(gone, tokens=[], logprobs=[], forced=[], queue=[], draws=0, closed=False,
                                   opened=0 if gone.opened == 0 else None))
    while waiting and len(rows) < max_batch:
        if rows and budget < math.inf and batch.needs([*rows, waiting[0]]) > budget:
            break
        entering.append(waiting.popleft())
        rows.append(entering[-1])
    return entering


def seat_rows(batch, entering):
    """Give the entering rows places and slots, and the cache its size.

    Returns [(prompt, row of the store)] to be prefilled, and whether the cache has moved in memory.
    """
    def misfits(needed, held):
        return needed > held or needed <= 0.75 * held

    rows, moved = batch.rows + entering, False
    places, slots = batch.count(len(rows)), batch.reach(max(row.held for row in rows))
    if misfits(places, len(batch.live)) or misfits(slots, batch.own[0].shape[3]):
        kept = [i for i, row in enumerate(batch.live) if row]
        resize_store(batch.own, places, slots, kept)
        batch.live, moved = [batch.live[i] for i in kept] + [None] * (places - len(kept)), True
    for row in entering:
        batch.live[batch.live.index(None)] = row
    if not batch.shared:
        return [(row.prompt, batch.live.index(row)) for row in entering], moved
    prompts = dict.fromkeys(row.prompt for row in rows)
    batch.slots = {prompt: slot for prompt, slot in batch.slots.items() if prompt in prompts}
    places, slots = batch.count(len(prompts)), batch.reach(max(row.base for row in rows))
    if misfits(places, batch.shared[0].shape[2]) or misfits(slots, batch.shared[0].shape[3]):
        resize_store(batch.shared, places, slots, list(batch.slots.values()))
        batch.slots, moved = {prompt: slot for slot, prompt in enumerate(batch.slots)}, True
    free = sorted(set(range(batch.shared[0].shape[2])) - set(batch.slots.values()))
    fresh = list(zip((prompt for prompt in prompts if prompt not in batch.slots), free))
    batch.slots |= fresh
    return fresh, moved


def batch_state(batch):
    """The State of a batch's rows; places without a row hold zeros, and what they draw is thrown away."""
    _, K, B, S, _ = batch.own[0].shape
    N, P = batch.shared[0].shape[2:4] if batch.shared else (0, 0)
    rows = [row or Row() for row in batch.live]
    groups = [[] for _ in range(N)]
    for i, row in enumerate(batch.live):
        if row and N:
            groups[batch.slots[row.prompt]].append(i)
    bases = [max((rows[i].base for i in group), default=0) for group in groups]
    g = batch.count(max(map(len, groups), default=1))
    place = {i: slot * g + j for slot, group in enumerate(groups) for j, i in enumerate(group)}
    members, places = [group + [0] * (g - len(group)) for group in groups], [place.get(i, 0) for i in range(B)]
    if N and B % N == 0 and all(i // (B // N) == slot for slot, group in enumerate(groups) for i in group):
        members, places = torch.arange(B).view(N, -1), []
    lengths = torch.tensor([row.held for row in rows])
    slots = (torch.arange(2 * K * B).view(-1, B) * S + lengths).flatten()

    def bias(held, slots):
        return ((torch.arange(slots) >= held[:, None]).to(batch.own[0].dtype) * -1e30).repeat(K, 1)[:, None]

    columns = [[row.tokens[-1] if row.tokens else row.first for row in rows], [row.base + row.held for row in rows],
               slots, bias(lengths, S), bias(torch.tensor(bases), P), [row.key for row in rows],
               [row.draws for row in rows], [-1] * B, members, places]
    return State(*(torch.as_tensor(column).to(batch.own[0].device) for column in columns))


def check_request(config, prompts, **settings):
    for name, value in settings.items():
        least, most = (1e-9, 1) if name == "top_p" else (0 if name in ("temperature", "top_k") else 1, math.inf)
        if not least <= value <= most:
            bounds = "above 0 and at most 1" if name == "top_p" else f"at least {least}"
            raise ValueError(f"{name} is {value}, expected {bounds}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as the end-of-text token")
        if len(prompt) >= config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which fill the context of {config.max_context}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(f"prompt {i} holds a token outside the vocabulary of {config.vocab_size}")


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0,
             stop_tokens=(), seed=0, max_batch=64, seeds=None, stop_strings=(), tokenizer=None, repetition=0,
             think_budget=0, think_minimum=0, think_tag="think", share_prompts=True, cache_gib=math.inf, chunk=2048,
             compile_backend=None, on_token=None, stats=None):
    """`num_samples` completions of each prompt, lists of token ids: -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, how much it has used): what it says depends neither on who
    shares its batch nor on the batch size, but for a rounding that moves a draw across the very edge of two tokens.
    params: a checkpoint's tensors, with or without an adapter; or sampling_params of them, to pay for those once.
    max_new_tokens: an int, or one for each [prompt][sample]. The end of the context is a limit, too.
    seeds: an int for each prompt; default its index.
    stop_strings: need the tokenizer, as do think_...; the tokens that say them are kept.
    repetition: end a row whose last tokens, this many, say one phrase four times or more.
    think_budget, think_minimum: tokens after which the thinking block is closed, before which it is not; 0: no bound.
    share_prompts: hold a prompt's keys and values once for its samples.
    cache_gib: bound of the cache, as long as one row fits; the rows beyond it wait.
    chunk: tokens of prompts that go through the layers at once.
    compile_backend: "inductor" to torch.compile the layers.
    on_token(prompt, sample, tokens): called with a row's tokens so far. With it, a CPU samples in one process.
    stats: a dict that is given steps, cache_gib (peak), prefill_s and decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = [[max_new_tokens] * num_samples if isinstance(max_new_tokens, int) else max_new_tokens[p]
              for p in range(len(prompts))]
    check_request(config, prompts, num_samples=num_samples, temperature=temperature, top_p=top_p, top_k=top_k,
                  max_batch=max_batch, chunk=chunk, max_new_tokens=min((n for row in limits for n in row), default=1))
    rules = Rules(frozenset(stop_tokens), tuple(stop_strings), repetition, think_budget, think_minimum, think_tag,
                  tokenizer)
    if (rules.stop_strings or rules.bound_thinking) and tokenizer is None:
        raise ValueError("stop strings and bounds on thinking need the tokenizer")
    results = [[None] * num_samples for _ in prompts]
    if not prompts:
        return results
    weights = params
    if "embedding" not in params:
        weights = sampling_params(params, config, packed=False if compile_backend else None)
    embedding = weights["embedding"]
    on_cpu = embedding.device.type == "cpu"
    stats = {} if stats is None else stats
    streams = min(torch.get_num_threads(), len(prompts), max_batch // 8, len(prompts) * num_samples // 8)
    if on_cpu and streams > 1 and sys.platform == "linux" and not (on_token or compile_backend):
        return generate_in_processes(
            weights, config, prompts, limits, seeds or range(len(prompts)), streams, stats, num_samples=num_samples,
            temperature=temperature, top_p=top_p, top_k=top_k, stop_tokens=stop_tokens, seed=seed,
            max_batch=max_batch // streams, stop_strings=stop_strings, tokenizer=tokenizer, repetition=repetition,
            think_budget=think_budget, think_minimum=think_minimum, think_tag=think_tag, share_prompts=share_prompts,
            cache_gib=cache_gib / streams, chunk=chunk)
    layers = [{} for _ in range(config.num_hidden_layers)]  # each under the same names: one compiled graph serves all
    for name, tensor in weights.items():
        layer, _, short = name.partition(".")
        if layer.isdigit():
            layers[int(layer)][short] = tensor
    layer_fn = decode_layer
    if compile_backend:
        layer_fn = torch.compile(decode_layer, fullgraph=True, backend=compile_backend)

    waiting, shares = deque(), share_prompts and num_samples > 1
    for p in sorted(range(len(prompts)), key=lambda p: -len(prompts[p])):  # longest first: neighbours are alike
        opened = None
        if rules.bound_thinking:
            _, opening, since = rules.text(prompts[p][-32:]).rpartition(f"<{think_tag}>")
            opened = 0 if opening and f"</{think_tag}>" not in since else None
        held = len(prompts[p]) - 1  # its last token is the first that a row feeds: only decode steps make logits
        waiting.extend(Row(p, s, row_key(seed, p if seeds is None else seeds[p], s),
                           min(limits[p][s], config.max_context - held - 1), prompts[p][-1],
                           held if shares else 0, 0 if shares else held, opened) for s in range(num_samples))
    batch = Batch([], new_store(config, 0, 0, embedding), new_store(config, 0, 0, embedding) if shares else None, {},
                  on_cpu)
    slot_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * embedding.element_size()
    reach = batch.reach(max(len(prompts[row.prompt]) + row.limit for row in waiting))
    rope = rope_for_sampling(config, reach + chunk, embedding)  # a padded prompt may reach further
    # Steps between two looks at what was drawn. On a CPU looking for stop tokens is free.
    stride = 1 if on_token or repetition or rules.stop_strings or rules.bound_thinking else 8
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
    graphs, states, changed, longest = {}, {}, True, 0
    while waiting or batch.rows:
        begin = time.perf_counter()
        if changed or longest == batch.own[0].shape[3]:
            entering = choose_rows(batch, waiting, max_batch, cache_gib * 2**30 / slot_bytes)
            fresh, moved = seat_rows(batch, entering)
            prefill(weights, layers, config, batch.shared or batch.own, [slot for _, slot in fresh],
                    [prompts[p][:-1] for p, _ in fresh], rope, chunk)
            held = sum(tensor.nbytes for tensor in [*batch.own, *(batch.shared or [])])
            stats["cache_gib"] = max(stats["cache_gib"], held / 2**30)
            if moved:
                graphs.clear()
            now = batch_state(batch)
            state = states.setdefault(tuple(tensor.shape for tensor in now), now)  # graphs read it where it is
            for tensor, value in zip(state, now):
                tensor.copy_(value)
            longest, changed, forcing = max(row.held for row in batch.rows), False, False
        stats["prefill_s"] += time.perf_counter() - begin
        begin = time.perf_counter()
        rows = batch.rows
        if forcing or any(row.queue for row in rows):
            forcing = True
            state.forced.copy_(torch.tensor([row.queue[0] if row and row.queue else -1 for row in batch.live]))

        def step_fn():
            return decode_step(weights, layers, config, state, batch.own, batch.shared, rope,
                               (temperature, top_p, top_k, state.forced if rules.bound_thinking else None), layer_fn)

        drawn = []
        for _ in range(min(stride, batch.own[0].shape[3] - longest, *(row.limit - len(row.tokens) for row in rows))):
            shape = (len(batch.live), *state.members.shape, len(state.places))
            drawn.append(captured_step(step_fn, state, graphs, shape))
            if on_cpu and not rules.stop_tokens.isdisjoint(drawn[-1][0].tolist()):
                break
        tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]: a wait
        stats["steps"] += len(drawn)
        longest += len(drawn)
        for i, row in enumerate(batch.live):
            if row is None:
                continue
            end = next((n for n, token in enumerate(tokens[i], 1) if token in rules.stop_tokens), len(tokens[i]))
            row.take(tokens[i][:end], logprobs[i][:end])
            length = len(row.tokens)
            finish = finish_reason(row, rules)
            changed |= len(row.tokens) < length  # a thought that was reopened
            if on_token:
                on_token(row.prompt, row.sample, row.tokens)
            if finish:
                results[row.prompt][row.sample] = Completion(row.tokens, row.logprobs, finish, row.forced)
                batch.live[i] = None
        free = batch.live.count(None)
        changed |= free >= max(1, len(batch.live) // (16 if waiting else 4))  # prefill is better at several at once
        stats["decode_s"] += time.perf_counter() - begin
    return results


def generate_in_processes(weights, config, prompts, limits, seeds, streams, stats, **settings):
    """generate, the prompts dealt out to this process and `streams` - 1 forks of it, with one thread each.

    A step is many small operations, which two cores together hardly do faster than one; two steps at once they do.
    Threads of one process would wait for Python's lock at each operation. A fork shares the weights, as they are, and
    ends with its parent, whatever ends that.
    """
    threads, parent, fork = torch.get_num_threads(), os.getpid(), multiprocessing.get_context("fork")
    shares = [(prompts[i::streams], limits[i::streams], seeds[i::streams]) for i in range(streams)]

    def run(prompts, limits, seeds):
        torch.set_num_threads(1)  # more could hang in a fork, whose OpenMP has lost its threads
        answers = generate(weights, config, prompts, max_new_tokens=limits, seeds=seeds, stats=(of_part := {}),
                           **settings)
        return answers, of_part

    def run_forked(share, end):
        end_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides what it means
        end.send(run(*share))

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warns of every fork
    forks = []
    try:
        for share in shares[1:]:
            pipe, end = fork.Pipe(duplex=False)
            process = fork.Process(target=run_forked, args=(share, end))
            process.start()
            forks.append((process, pipe))
            end.close()
        parts = [run(*shares[0])]
        for process, pipe in forks:
            try:
                parts.append(pipe.recv())
            except EOFError:
                process.join()
                raise RuntimeError(f"a process that sampled ended with code {process.exitcode}, before its answers; "
                                   "-9 often means that memory ran out: try a smaller max_batch") from None
    finally:
        for process, pipe in forks:
            process.kill()
            process.join()
            pipe.close()
        torch.set_num_threads(threads)
    answers, parts_of_stats = zip(*parts)
    stats |= max(parts_of_stats, key=lambda part: part["prefill_s"] + part["decode_s"])
    stats["cache_gib"] = sum(part["cache_gib"] for part in parts_of_stats)
    return [answers[p % streams][p // streams] for p in range(len(prompts))]


# ------------------------------------------------------------------------------------ how fast


def median_s(run, repeat):
    """Median seconds of run(), after one run that does not count."""
    times = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeat // 2]


def machine_ceiling(weights, repeat):
    """What no step can beat: (bytes/s read from memory, operations/s of a large product in the weights' dtype)."""
    like, size = weights["embedding"], 2048
    big = torch.ones(2**27, device=like.device)  # 0.5 GiB, beyond any cache
    x, w = like.new_ones(size, size), like.new_ones(size, size)
    if weights["head.weight"].is_mkldnn:
        w = torch.ops.mkldnn._reorder_linear_weight(w, size)
    wait = torch.cuda.synchronize if like.is_cuda else lambda: None
    return (big.nbytes / median_s(lambda: (big.sum(), wait()), repeat),
            2 * size**3 / median_s(lambda: (project({"w.weight": w}, "w", x), wait()), repeat))


def step_floor_s(config, weights, batch, context, ceiling):
    """Seconds of a step at the roofline: all weights and cached keys read once, all products at the best rate."""
    matrices = sum(tensor.shape.numel() for name, tensor in weights.items() if name.endswith(".weight"))
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * context
    attended = 4 * config.num_hidden_layers * config.hidden_size * batch * context
    return max((matrices + cached) * weights["embedding"].element_size() / ceiling[0],
               (2 * matrices * batch + attended) / ceiling[1])


@torch.inference_mode()
def benchmark(weights, config, args):
    """Print the machine's ceiling, then tokens/s of each load; random tokens, medians of args.repeat runs."""
    rng, like = random.Random(0), weights["embedding"]
    ceiling = machine_ceiling(weights, args.repeat)
    print(f"{args.model} | {str(like.dtype).removeprefix('torch.')} | {torch.get_num_threads()} threads, load "
          f"{os.getloadavg()[0]:.1f} | memory {ceiling[0] / 1e9:.1f} GB/s | products {ceiling[1] / 1e9:.0f} GFLOP/s")

    def random_prompt(n):
        return [rng.randrange(3, config.vocab_size) for _ in range(n)]

    def measure(prompts, **settings):
        """The stats of the run with the median time, and its tok_s: sampled tokens per second, prefill included."""
        runs = []
        for _ in range(args.repeat + 1):
            runs.append(stats := {})
            answers = generate(weights, config, prompts, stats=stats, **settings,
                               compile_backend="inductor" if args.compile else None)
            seconds = stats["prefill_s"] + stats["decode_s"]
            stats["tok_s"] = sum(len(answer.tokens) for row in answers for answer in row) / seconds
        return sorted(runs[1:], key=lambda stats: stats["tok_s"])[args.repeat // 2]

    for batch in args.batch if "fixed" in args.benchmark else ():
        n = args.new_tokens
        stats = measure([random_prompt(n) for _ in range(batch)], max_new_tokens=n, max_batch=batch)
        step_s = stats["decode_s"] / n
        share = step_floor_s(config, weights, batch, 1.5 * n, ceiling) / step_s
        print(f"fixed, batch {batch:3d} | {stats['tok_s']:8.1f} sampled tok/s, prefill included | prefill "
              f"{batch * n / stats['prefill_s']:8.1f} tok/s | decode {batch / step_s:8.1f} tok/s, "
              f"{step_s * 1e3:6.2f} ms a step, {share:4.0%} of the roofline", flush=True)
    if "mixed" in args.benchmark:
        prompts = [random_prompt(rng.randint(50, 400)) for _ in range(64)]
        lengths = [[rng.randint(16, 256) for _ in range(8)] for _ in prompts]
        for share in (True, False):
            stats = measure(prompts, num_samples=8, max_new_tokens=lengths, max_batch=max(args.batch),
                            share_prompts=share)
            print(f"mixed, batch {max(args.batch):3d}, prompts {'shared' if share else 'not shared':10s} | "
                  f"{stats['tok_s']:8.1f} sampled tok/s | "
                  f"prefill {stats['prefill_s']:.1f} s, {stats['steps']} steps | "
                  f"cache {stats['cache_gib'] * 1024:.1f} MiB", flush=True)
    for n in (1024, 2048, 4096, 8192) if "context" in args.benchmark else ():
        if n > config.max_context - 32:
            break
        stats = measure([random_prompt(n)], max_new_tokens=32)
        step_s = stats["decode_s"] / 32
        peak_gib = (torch.cuda.max_memory_allocated() / 2**30 if like.is_cuda else
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        print(f"context {n:5d} | prefill {n / stats['prefill_s']:8.1f} tok/s | {step_s * 1e3:6.2f} ms a step, "
              f"{step_floor_s(config, weights, 1, n, ceiling) / step_s:4.0%} of the roofline | "
              f"peak memory of the process {peak_gib:.2f} GiB", flush=True)


# ------------------------------------------------------------------------------------ the command line


def text_streamer(tokenizer, stop_tokens, write, think_tag="think", hide=False, dim=True):
    """show(tokens, last): writes what is new in a completion's text, its thinking block dimmed or hidden."""
    shown, thinking = 0, False

    def show(tokens, last=False):
        nonlocal shown, thinking
        text = tokenizer.decode([token for token in tokens if token not in stop_tokens], skip_special_tokens=False)
        while True:
            tag = f"</{think_tag}>" if thinking else f"<{think_tag}>"
            at = text.find(tag, shown)
            end = at if at >= 0 else len(text)
            if at < 0 and not last:  # keep back what may become the tag, or the rest of a character
                end -= max(n for n in range(len(tag)) if text.endswith(tag[:n]))
                while end > shown and text[end - 1] == "\N{REPLACEMENT CHARACTER}":
                    end -= 1
            elif at >= 0 and thinking:
                end += len(tag)  # both tags belong to the block
            if end > shown and not (thinking and hide):
                write(f"\033[2m{text[shown:end]}\033[0m" if thinking and dim else text[shown:end])
            shown = max(shown, end)
            if at < 0:
                return
            thinking = not thinking

    return show


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    config, tokenizer = load_config(path), load_tokenizer(path)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    weights = sampling_params(load_params(path, dtype=dtype), config, device=args.device,
                              packed=False if args.compile else None)
    if args.benchmark is not None:
        args.benchmark = args.benchmark or ["fixed", "mixed", "context"]
        return benchmark(weights, config, args)
    system = args.system or load_system_prompt(path)
    ends = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")} - {None} | set(config.eos_token_id)
    messages = []
    while True:
        try:
            question = args.prompt if args.prompt is not None else input("\n> ")
        except EOFError:
            return
        messages.append({"role": "user", "content": question})
        text = question if args.raw else render_chat(messages, system=system)
        show = text_streamer(tokenizer, ends, lambda text: print(text, end="", flush=True), args.think_tag,
                             args.hide_thinking, sys.stdout.isatty())
        [[answer]] = generate(
            weights, config, [tokenizer.encode(text, add_special_tokens=False).ids], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, stop_tokens=ends, seed=args.seed,
            seeds=[len(messages)], tokenizer=tokenizer, repetition=args.repetition, think_budget=args.think_budget,
            think_minimum=args.think_minimum, think_tag=args.think_tag,
            compile_backend="inductor" if args.compile else None, on_token=lambda prompt, sample, tokens: show(tokens))
        show(answer.tokens, last=True)
        print()
        if args.prompt is not None:
            return
        reply = tokenizer.decode([token for token in answer.tokens if token not in ends], skip_special_tokens=False)
        messages.append({"role": "assistant", "content": reply})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
