"""The sampling engine: batched, with a key/value cache, and the log-probability of every token that it draws.

    python generate.py --model tiny --prompt "What is 3 + 4 * 5?"
    python generate.py --model qwen2.5-1.5b-instruct                    # a chat; Ctrl-D ends it
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --think-budget 200 --hide-thinking
    python generate.py --model tiny --benchmark

    completions = generate(params, config, prompts, num_samples=8, max_new_tokens=512, stop_tokens=config.eos_token_id)
    completions[prompt][sample].tokens, .logprobs, .finish

A prompt is computed once and its keys and values are held once; its samples attend to them together, and each to its own tokens
(Hydragen, arXiv:2402.05099). Rows that finish leave the batch and waiting ones take their place (Orca, OSDI 2022). Budgets for thinking
are those of s1, arXiv:2501.19393.
"""

import argparse
import hashlib
import math
import os
import random
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import (load_config, load_params, load_system_prompt, load_tokenizer, merge_lora, render_chat, resolve_model,
                   rope_table)


def add_sampling_flags(parser, temperature=1.0, top_p=1.0, max_new_tokens=512):
    """The flags of everything that samples; the scripts that import this file share them."""
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=top_p, help="sample from the likeliest tokens that hold this share; 1: all")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="the longest completion, in tokens")
    parser.add_argument("--max-batch", type=int, default=64, help="rows that decode at once")
    parser.add_argument("--think-tag", default="think", help="name of the thinking block: <think> ... </think>")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    p.add_argument("--prompt", help="what to ask; without it, an interactive chat")
    p.add_argument("--system", help="the system turn; default: the model's own")
    p.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add_sampling_flags(p, temperature=0.7, top_p=0.8)
    p.add_argument("--think-budget", type=int, default=0, help="tokens after which the thinking block is closed; 0: never")
    p.add_argument("--think-minimum", type=int, default=0, help='tokens before which a closed block is reopened with "Wait"')
    p.add_argument("--repetition", type=int, default=0, help="stop when the last tokens, this many, repeat one phrase; 0: never")
    p.add_argument("--hide-thinking", action="store_true", help="show only what stands outside the thinking block")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--compile", action="store_true", help="torch.compile the layers (a minute, once)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--benchmark", nargs="*", choices=("fixed", "mixed", "context"), help="measure these loads instead; none named: all")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64], help="of the fixed load")
    p.add_argument("--new-tokens", type=int, default=64, help="of the fixed load: prompt and completion length")
    p.add_argument("--repeat", type=int, default=5, help="runs of each measurement, of which the median counts")
    p.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    return p.parse_args(argv)


class Completion(NamedTuple):
    tokens: list[int]  # the stop token, when one was drawn, is the last
    logprobs: list[float]  # of each token under the temperature-scaled distribution, before top-p and top-k cut it
    finish: str  # "stop" | "length" | "repetition"
    forced: list[int] = []  # indices of the tokens that a thinking budget put there: not sampled, so not to be trained on


# ------------------------------------------------------------------------------------ drawing a token


def mix(x):
    """The finaliser of splitmix64: int64 -> int64, every bit of the result depending on every bit of x."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # int64 wraps as it should; >> would carry the sign along
    return x


def uniform(keys, draws):
    """Noise without state: a float32 in [0, 1) for each pair of keys and draws, int64 [B] each."""
    return (mix(keys + mix(draws + 1)) >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int64 from which all the noise of one completion derives."""
    digest = hashlib.blake2b(f"{seed} {prompt_seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def inverse_cdf(weights, noise):
    """The index whose stretch of the cumulative sum holds the noise: weights [B, V] >= 0, noise [B, 1] in [0, 1) -> [B, 1].

    In two levels, blocks of 64 and within one, so that the cumulative sum over a large vocabulary is never made.
    """
    B, V = weights.shape
    width = math.gcd(V, 64)
    blocks = weights.view(B, -1, width)
    cdf = blocks.sum(-1).cumsum(-1)  # [B, V / width]
    point = noise * cdf[:, -1:]
    which = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[1] - 1)
    end = cdf.gather(1, which)
    inner = blocks.gather(1, which[..., None].expand(-1, -1, width))[:, 0].cumsum(-1)  # [B, width]
    # rounding may put the point a hair outside its block; a token of weight zero is never chosen
    point = (point - (end - inner[:, -1:])).clamp_(min=0).minimum(inner[:, -1:] * (1 - 2**-24))
    return which * width + torch.searchsorted(inner, point, right=True)


def sample_tokens(logits, noise, temperature=1.0, top_p=1.0, top_k=0, forced=None):
    """One token per row: logits [B, V] float32, noise [B] in [0, 1) -> tokens [B] int64 and their log-probabilities [B] float32.

    Top-k is applied first, then top-p to what it left. Temperature 0 is greedy, with log-probabilities at temperature 1.
    forced: [B] tokens to take instead of drawing; -1: draw.
    """
    logits = logits if temperature in (0, 1) else logits / temperature
    probs = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif top_k == 0 and top_p == 1:
        tokens = inverse_cdf(probs, noise[:, None])
    else:
        V = logits.shape[1]
        # a nucleus seldom needs more than a thousand tokens; asking whether it does is a synchronisation, which only a CPU has for free
        few = min(top_k or (1024 if logits.device.type == "cpu" else V), V)
        weights, ids = probs.topk(few)  # [B, few], likeliest first
        if not top_k and few < V and bool((weights.sum(-1) < top_p).any()):
            weights, ids = probs.sort(descending=True)
        if top_p < 1:
            before = weights.cumsum(-1) - weights  # the share of those that are likelier
            weights = weights * (before < top_p * (weights.sum(-1, keepdim=True) if top_k else 1))
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

    The adapter is merged; q, k and v are joined; the weights of each norm, and the square root of D that turns x / |x| into a
    root mean square, are multiplied into the layer behind it; and on a CPU matrices are packed for oneDNN: 1.2 to 2.5 times
    (fp32) and 2.5 to 4 times (bf16) as fast as F.linear in fp32 for up to 64 rows on a two-core AMD, and the same to the last
    bit for any number of rows.
    out: an earlier result, not packed, to be written in place: CUDA graphs read the weights where they were.
    """
    merged = merge_lora(params)
    like = merged["model.norm.weight"]
    dtype, device = dtype or like.dtype, torch.device(device or like.device)
    if packed is None:
        packed = device.type == "cpu" and torch.backends.mkldnn.is_available()
    scale, weights = config.hidden_size ** 0.5, {}

    def put(name, tensor, norm=None):
        if norm is not None:
            tensor = tensor * (merged[norm].float() * scale)
        tensor = tensor.detach().to(device, dtype)
        if packed and name.endswith(".weight"):
            weights[name] = torch.ops.mkldnn._reorder_linear_weight(tensor.contiguous(), 32)
        else:
            weights[name] = out[name].copy_(tensor) if out else tensor.clone()

    for layer in range(config.num_hidden_layers):
        pre = f"model.layers.{layer}."
        norm1, norm2 = pre + "input_layernorm.weight", pre + "post_attention_layernorm.weight"
        put(f"{layer}.qkv.weight", torch.cat([merged[f"{pre}self_attn.{name}_proj.weight"] for name in "qkv"]), norm1)
        put(f"{layer}.qkv.bias", torch.cat([merged[f"{pre}self_attn.{name}_proj.bias"] for name in "qkv"]))
        put(f"{layer}.o.weight", merged[pre + "self_attn.o_proj.weight"])
        put(f"{layer}.gate.weight", merged[pre + "mlp.gate_proj.weight"], norm2)
        put(f"{layer}.up.weight", merged[pre + "mlp.up_proj.weight"], norm2)
        put(f"{layer}.down.weight", merged[pre + "mlp.down_proj.weight"])
    put("embedding", merged["model.embed_tokens.weight"])
    put("head.weight", merged["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"],
        "model.norm.weight")
    return weights


def project(weights, name, x, then="none", other=None):
    """A linear layer, and what follows it: x [N, in] -> [N, out]. then: "none", "swish", or "add" or "mul" with `other`."""
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


def queries_keys_values(weights, config, x, cos, sin):
    """The first half of a layer: x [N, D], cos and sin [N, 1, head_dim] -> q [N, H, head_dim], k and v [N, 2 K, head_dim].

    sin: with its first half negated, as from rope_for_sampling.
    """
    H, K = config.num_attention_heads, config.num_key_value_heads
    qkv = project(weights, "qkv", unit_norm(x, config)).view(len(x), H + 2 * K, config.head_dim)
    qk = qkv[:, :H + K]
    first, second = qk.chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    qk.mul_(cos).addcmul_(swapped, sin)
    return qkv.split((H, 2 * K), 1)


def rest_of_layer(weights, config, x, attended):
    """The second half: x [N, D], attended [N, H * head_dim] -> [N, D]."""
    x = project(weights, "o", attended, "add", x)
    h = unit_norm(x, config)
    return project(weights, "down", project(weights, "up", h, "mul", project(weights, "gate", h, "swish")), "add", x)


def rope_for_sampling(config, length, like):
    """cos and sin of positions 0 to length - 1, [length, 1, head_dim]; the first half of sin is negated, which saves a rotation its minus."""
    cos, sin = rope_table(config, torch.arange(length, device=like.device)[None], torch.float32)
    sin[..., :config.head_dim // 2].neg_()
    return cos[0, 0][:, None].to(like.dtype), sin[0, 0][:, None].to(like.dtype)


# ------------------------------------------------------------------------------------ the cache


def new_store(config, rows, slots, like):
    """Keys and values: one tensor [2, rows, K, slots, head_dim] per layer, in the dtype and on the device of `like`."""
    shape = (2, rows, config.num_key_value_heads, slots, config.head_dim)
    return [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]


def resize_store(store, rows, slots, kept):
    """Give every layer `rows` rows of `slots` tokens, in place, the old rows `kept` first. One layer at a time is held twice."""
    for layer, old in enumerate(store):
        store[layer] = old.new_zeros(2, rows, old.shape[2], slots, old.shape[4])
        both = min(slots, old.shape[3])
        store[layer][:, :len(kept), :, :both] = old[:, kept, :, :both]


def prefill(weights, layers, config, store, rows, prompts, rope, chunk):
    """Write the keys and values of `prompts` into `rows` of the store; at most `chunk` tokens go through the layers at once."""
    todo = sorted(((prompt, row) for prompt, row in zip(prompts, rows) if prompt), key=lambda pair: -len(pair[0]))
    device = weights["embedding"].device
    while todo:
        longest = len(todo[0][0])
        width = min(longest, chunk)
        group, todo = todo[:chunk // width], todo[chunk // width:]
        n, at = len(group), torch.tensor([row for _, row in group], device=device)
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt, _ in group], device=device)  # [n, T]
        for begin in range(0, longest, width):
            end = min(begin + width, longest)
            seen = torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin) if begin else None
            cos, sin = (table[begin:end].repeat(n, 1, 1) for table in rope)
            x = F.embedding(tokens[:, begin:end], weights["embedding"]).flatten(0, 1)  # [n * T, D]
            for of_layer, memory in zip(layers, store):
                q, kv = queries_keys_values(of_layer, config, x, cos, sin)
                k, v = kv.view(n, end - begin, 2, -1, config.head_dim).permute(2, 0, 3, 1, 4)  # [n, K, T, head_dim] each
                memory[0, at, :, begin:end], memory[1, at, :, begin:end] = k, v
                if of_layer is layers[-1]:
                    break  # nothing reads what comes after
                if begin:
                    k, v = memory[:, at, :, :end]
                q = q.view(n, end - begin, -1, config.head_dim).transpose(1, 2)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
                x = rest_of_layer(of_layer, config, x, out.transpose(1, 2).reshape(len(x), -1))


# ------------------------------------------------------------------------------------ one step for every row


class State(NamedTuple):
    """What a decode step reads and moves on, as tensors, so that a step never waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, the next to be fed
    lengths: torch.Tensor  # [B] tokens held in the row's own part
    bases: torch.Tensor  # [B] tokens held in the shared prompt
    keys: torch.Tensor  # [B] of the noise
    draws: torch.Tensor  # [B] how many it has used
    forced: torch.Tensor  # [B] the token to put next, or -1
    members: torch.Tensor  # [N, g] the rows of each shared prompt, padded with row 0
    places: torch.Tensor  # [B] where in members, flattened, a row stands


def attend_part(q, k, v, bias):
    """Softmax attention over one part of the context: q [n, T, head_dim], k and v [n, S, head_dim], bias [n, 1, S] -> like q.

    Also returns the log of the normaliser [n, T, 1], by which parts are joined.
    """
    scores = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5)  # [n, T, S]
    top = scores.amax(-1, keepdim=True).float()
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights.to(v.dtype), v).float() / total, top + total.log()


def decode_layer(weights, config, x, cos, sin, own, shared, state, index, own_bias, shared_bias):
    """One layer for one new token per row: x [B, D] -> [B, D]. Writes the token's key and value into `own`."""
    B, K, head_dim = len(x), config.num_key_value_heads, config.head_dim
    q, kv = queries_keys_values(weights, config, x, cos, sin)
    own.view(-1, head_dim).index_copy_(0, index, kv.reshape(-1, head_dim))
    own_k, own_v = own.flatten(1, 2)  # [B * K, S, head_dim] each
    q = q.reshape(B * K, -1, head_dim)  # the R query heads of one key head stand together
    if shared is None:
        scores = torch.baddbmm(own_bias, q, own_k.mT, alpha=head_dim ** -0.5)  # [B * K, R, S]
        return rest_of_layer(weights, config, x, torch.bmm(scores.softmax(-1), own_v).view(B, -1))
    (N, g), R = state.members.shape, q.shape[1]
    together = q.view(B, K, R, head_dim)[state.members].transpose(1, 2).reshape(N * K, g * R, head_dim)
    parts = attend_part(together, *shared.flatten(1, 2), shared_bias)  # one product for all samples of a prompt
    prompt_out, prompt_log = (part.view(N, K, g, R, -1).transpose(1, 2).reshape(N * g, K, R, -1)[state.places].flatten(0, 1)
                              for part in parts)
    own_out, own_log = attend_part(q, own_k, own_v, own_bias)
    share = (prompt_log - own_log).sigmoid()  # of the joint softmax that falls to the prompt
    return rest_of_layer(weights, config, x, own_out.lerp(prompt_out, share).to(x.dtype).view(B, -1))


def decode_step(weights, layers, config, state, own, shared, rope, sampling, layer_fn):
    """Feed each row's last token and draw the next: -> tokens [B], log-probabilities [B]. Moves `state` on, writes into `own`."""
    _, B, K, S, _ = own[0].shape
    device, dtype = own[0].device, own[0].dtype
    slots = torch.arange(2 * B * K, device=device).view(2, B, K).transpose(0, 1) * S + state.lengths[:, None, None]  # [B, 2, K]
    hidden = torch.arange(S, device=device) > state.lengths[:, None]  # [B, S]
    own_bias = (hidden.to(dtype) * -1e30).repeat_interleave(K, 0)[:, None]  # [B * K, 1, S]
    shared_bias = None
    if shared is not None:
        hidden = torch.arange(shared[0].shape[3], device=device) >= state.bases[state.members[:, :1]]  # [N, P]
        shared_bias = (hidden.to(dtype) * -1e30).repeat_interleave(K, 0)[:, None]  # [N * K, 1, P]
    cos, sin = (table[state.bases + state.lengths] for table in rope)  # [B, 1, head_dim]
    x = F.embedding(state.tokens, weights["embedding"])  # [B, D]
    for layer, of_layer in enumerate(layers):
        x = layer_fn(of_layer, config, x, cos, sin, own[layer], shared and shared[layer], state, slots.flatten(), own_bias,
                     shared_bias)
    logits = project(weights, "head", unit_norm(x, config)).float()
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), *sampling, state.forced)
    state.tokens.copy_(tokens)
    state.lengths.add_(1)
    state.draws.add_(1)
    return tokens, logprobs


def captured_step(step_fn, state, graphs, shape):
    """step_fn(), on a GPU as a CUDA graph, captured once per shape and then replayed. `state` and what step_fn closes over stay in place."""
    if state.tokens.device.type != "cuda":
        return step_fn()
    if shape not in graphs:
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
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
    stop_tokens: frozenset = frozenset()
    stop_strings: tuple = ()
    repetition: int = 0
    think_budget: int = 0
    think_minimum: int = 0
    think_tag: str = "think"
    tokenizer: Tokenizer | None = None

    def text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def opened_in(self, prompt):
        """0 when a prompt ends within a thinking block, else None: the completion opens its own."""
        if not (self.think_budget or self.think_minimum):
            return None
        _, opening, after = self.text(prompt[-32:]).rpartition(f"<{self.think_tag}>")
        return 0 if opening and f"</{self.think_tag}>" not in after else None


@dataclass
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
    def last(self):
        return self.tokens[-1] if self.tokens else self.first

    @property
    def held(self):
        return self.private + len(self.tokens)

    def take(self, token, logprob):
        if self.queue:
            self.forced.append(len(self.tokens))
            self.queue.pop(0)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.draws += 1


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
    spent, thought = len(row.tokens) - row.opened, rules.text(row.tokens[row.opened:][-32:])
    if closing in thought:
        if row.forced[-1:] != [len(row.tokens) - 1] and spent < rules.think_minimum:
            thought = rules.text(row.tokens[row.opened:])
            while len(rules.text(row.tokens[row.opened:])) > thought.rindex(closing):  # take the tag back; the cache forgets it, too
                row.tokens.pop()
                row.logprobs.pop()
            row.queue = rules.encode("Wait")
        elif not row.queue:
            row.closed = True
    elif rules.think_budget and spent >= rules.think_budget and not row.queue:
        row.queue = rules.encode(("" if thought.endswith("\n") else "\n") + closing + "\n")


def finish_reason(row, rules):
    """Why a row ends with its last token, or None. Queues what it has to say next."""
    if row.tokens[-1] in rules.stop_tokens:
        return "stop"
    if rules.stop_strings:  # every character takes at least one token but those of several bytes, which take up to four
        tail = rules.text(row.tokens[-4 * max(map(len, rules.stop_strings)):])
        if any(string in tail for string in rules.stop_strings):
            return "stop"
    if (rules.think_budget or rules.think_minimum) and not row.closed:
        steer_thinking(row, rules)
    if rules.repetition and len(row.tokens) % 8 == 0 and loops(row.tokens, rules.repetition):
        return "repetition"
    return "length" if len(row.tokens) >= row.limit else None


# ------------------------------------------------------------------------------------ the engine


def check_request(config, prompts, **settings):
    fine = {"num_samples": (1, math.inf), "temperature": (0, math.inf), "top_p": (1e-9, 1), "top_k": (0, math.inf), "max_batch": (1, math.inf),
            "max_new_tokens": (1, math.inf), "repetition": (0, math.inf), "think_budget": (0, math.inf), "think_minimum": (0, math.inf)}
    for name, value in settings.items():
        least, most = fine[name]
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}, expected {'above 0' if name == 'top_p' else f'at least {least}'}"
                             + (f" and at most {most}" if most < math.inf else ""))
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as the end-of-text token")
        if len(prompt) >= config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in the context of {config.max_context}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(f"prompt {i} holds a token outside the vocabulary of {config.vocab_size}")


@dataclass
class Batch:
    """The rows that decode together, and what they have cached."""
    live: list  # the Row in each place of the batch; None where there is none
    own: list  # store of what each row has said, and of its prompt when that is not shared: one row per place
    shared: list | None  # store of the prompts, when their samples share them
    slots: dict  # prompt: its row in `shared`
    block: int  # slots are allotted in multiples of this many
    power_of_two: bool  # places, too: few shapes, few CUDA graphs

    @property
    def rows(self):
        return [row for row in self.live if row]

    def count(self, n):
        return 1 << (n - 1).bit_length() if self.power_of_two else n

    def reach(self, held):
        """Slots for rows that hold `held` tokens, with room to go on."""
        return -(-(held + 1 + held // 16) // self.block) * self.block

    def needs(self, rows, held, prompts, base):
        """Slots in all, for this many rows of at most `held` tokens and this many prompts of at most `base`."""
        return self.count(rows) * self.reach(held) + (self.count(prompts) * self.reach(base) if self.shared else 0)


def choose_rows(batch, waiting, max_batch, budget):
    """Send the youngest rows back to `waiting` while the cache needs more than `budget` slots; else let rows enter, and return those."""
    rows, entering = batch.rows, []

    def needs(more=()):
        held, base = (max((getattr(row, name) for row in [*rows, *more]), default=0) for name in ("held", "base"))
        return batch.needs(len(rows) + len(more), held, len({row.prompt for row in [*rows, *more]}), base)

    while len(rows) > 1 and needs() > budget:
        gone = min(rows, key=lambda row: len(row.tokens))
        rows.remove(gone)
        batch.live[batch.live.index(gone)] = None
        opened = 0 if gone.opened == 0 else None
        waiting.appendleft(replace(gone, tokens=[], logprobs=[], forced=[], queue=[], draws=0, opened=opened, closed=False))
    while waiting and len(rows) < max_batch and (budget == math.inf or not rows or needs([waiting[0]]) <= budget):
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
    fresh = [prompt for prompt in prompts if prompt not in batch.slots]
    places, slots = batch.count(len(prompts)), batch.reach(max(row.base for row in rows))
    if misfits(places, batch.shared[0].shape[1]) or misfits(slots, batch.shared[0].shape[3]):
        resize_store(batch.shared, places, slots, list(batch.slots.values()))
        batch.slots, moved = {prompt: slot for slot, prompt in enumerate(batch.slots)}, True
    taken = set(batch.slots.values())
    batch.slots |= zip(fresh, [slot for slot in range(batch.shared[0].shape[1]) if slot not in taken])
    return [(prompt, batch.slots[prompt]) for prompt in fresh], moved


def batch_state(batch, device):
    """The State of a batch's rows; places without a row hold zeros, and what they draw is thrown away."""
    members = [[] for _ in range(batch.shared[0].shape[1])] if batch.shared else []
    for i, row in enumerate(batch.live):
        if row and batch.shared:
            members[batch.slots[row.prompt]].append(i)
    g = batch.count(max(map(len, members), default=1))
    place = {i: slot * g + j for slot, group in enumerate(members) for j, i in enumerate(group)}
    rows = [row or Row() for row in batch.live]
    return State(*(torch.tensor(values, device=device) for values in (
        [row.last for row in rows], [row.held for row in rows], [row.base for row in rows], [row.key for row in rows],
        [row.draws for row in rows], [-1] * len(rows), [group + [0] * (g - len(group)) for group in members],
        [place.get(i, 0) for i in range(len(rows))])))


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(), seed=0,
             max_batch=64, seeds=None, stop_strings=(), tokenizer=None, repetition=0, think_budget=0, think_minimum=0, think_tag="think",
             share_prompts=True, cache_gib=math.inf, chunk=1024, compile_backend=None, on_token=None, stats=None):
    """`num_samples` completions of each prompt, lists of token ids: -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, how many it has used): what it says depends neither on who shares its
    batch nor on the batch size (but for roundings at the seventh digit, where a draw falls on the very edge of two tokens).
    params: a checkpoint's tensors or, to pay for the packing once, sampling_params of them.
    max_new_tokens: an int, or one for each [prompt][sample]. The context's end is a limit, too.
    seeds: an int per prompt; default its index.   stop_strings, think_...: need the tokenizer. The tokens that say them are kept.
    repetition: end a row whose last tokens, this many, say one phrase four times or more; looked at every eight tokens.
    think_budget, think_minimum: tokens after which the thinking block is closed, before which it is not (Completion.forced).
    share_prompts: hold a prompt's keys and values once for its samples.   cache_gib: bound of the cache; rows beyond it wait.
    chunk: tokens of prompts that go through the layers at once.   compile_backend: "inductor" to torch.compile the layers.
    on_token(prompt, sample, token): called as tokens are drawn.   stats: a dict that is given steps, cache_gib, prefill_s, decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = [[max_new_tokens] * num_samples if isinstance(max_new_tokens, int) else max_new_tokens[p] for p in range(len(prompts))]
    check_request(config, prompts, num_samples=num_samples, temperature=temperature, top_p=top_p, top_k=top_k, max_batch=max_batch,
                  max_new_tokens=min((n for row in limits for n in row), default=1), repetition=repetition,
                  think_budget=think_budget, think_minimum=think_minimum)
    rules = Rules(frozenset(stop_tokens), tuple(stop_strings), repetition, think_budget, think_minimum, think_tag, tokenizer)
    if (stop_strings or think_budget or think_minimum) and tokenizer is None:
        raise ValueError("stop strings and thinking budgets need the tokenizer")
    results = [[None] * num_samples for _ in prompts]
    if not prompts:
        return results
    if "embedding" not in params:
        params = sampling_params(params, config, packed=False if compile_backend else None)
    embedding = params["embedding"]
    device, on_cpu = embedding.device, embedding.device.type == "cpu"
    layers = [{name.removeprefix(f"{layer}."): tensor for name, tensor in params.items() if name.startswith(f"{layer}.")}
              for layer in range(config.num_hidden_layers)]  # all under the same names: one graph serves them all
    layer_fn = torch.compile(decode_layer, fullgraph=True, backend=compile_backend) if compile_backend else decode_layer

    waiting, shares = deque(), share_prompts and num_samples > 1
    for p in sorted(range(len(prompts)), key=lambda p: -len(prompts[p])):  # longest first: neighbours are alike, and windows shrink
        held = len(prompts[p]) - 1  # its last token is the first that a row feeds: only decode steps make logits
        for s in range(num_samples):
            waiting.append(Row(p, s, row_key(seed, p if seeds is None else seeds[p], s), min(limits[p][s], config.max_context - held - 1),
                               prompts[p][-1], held if shares else 0, 0 if shares else held, rules.opened_in(prompts[p])))
    batch = Batch([], new_store(config, 0, 0, embedding), new_store(config, 0, 0, embedding) if shares else None, {},
                  32 if on_cpu else 256, not on_cpu)
    budget = cache_gib * 2**30 / (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * embedding.element_size())
    reach = batch.reach(max(len(prompts[row.prompt]) + row.limit for row in waiting))
    rope = rope_for_sampling(config, reach, embedding)
    # steps between two looks at what was drawn; on a CPU looking for stop tokens is free
    stride = 1 if on_token or stop_strings or think_budget or think_minimum else 8
    stats = {} if stats is None else stats
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
    graphs, states, changed, longest = {}, {}, True, 0
    while waiting or batch.rows:
        begin = time.perf_counter()
        if changed or longest == batch.own[0].shape[3]:
            fresh, moved = seat_rows(batch, choose_rows(batch, waiting, max_batch, budget))
            prefill(params, layers, config, batch.shared or batch.own, [slot for _, slot in fresh], [prompts[p][:-1] for p, _ in fresh], rope, chunk)
            held = sum(tensor.nbytes for tensor in [*batch.own, *(batch.shared or [])])
            stats["cache_gib"] = max(stats["cache_gib"], held / 2**30)
            if moved:
                graphs.clear()
            now = batch_state(batch, device)
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
            return decode_step(params, layers, config, state, batch.own, batch.shared, rope, (temperature, top_p, top_k), layer_fn)

        drawn = []
        for _ in range(min(stride, batch.own[0].shape[3] - longest, min(row.limit - len(row.tokens) for row in rows))):
            drawn.append(captured_step(step_fn, state, graphs, (len(batch.live), *state.members.shape)))
            if on_cpu and not rules.stop_tokens.isdisjoint(drawn[-1][0].tolist()):
                break
        tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]: here the host waits
        stats["steps"] += len(drawn)
        longest += len(drawn)
        for i, row in enumerate(batch.live):
            if row is None:
                continue
            for token, logprob in zip(tokens[i], logprobs[i]):
                row.take(token, logprob)
                taken = len(row.tokens)
                finish = finish_reason(row, rules)
                changed |= finish is not None or len(row.tokens) < taken
                if on_token:
                    on_token(row.prompt, row.sample, row.tokens)
                if finish:
                    results[row.prompt][row.sample] = Completion(row.tokens, row.logprobs, finish, row.forced)
                    batch.live[i] = None
                    break
        stats["decode_s"] += time.perf_counter() - begin
    return results


# ------------------------------------------------------------------------------------ how fast


def median_time(run, repeat):
    """Median seconds of run(), after one run that does not count."""
    times = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeat // 2]


def machine_ceiling(weights, repeat):
    """What a step cannot beat: (bytes/s read from memory, floating-point operations/s of a large product in the weights' dtype)."""
    like, size = weights["embedding"], 2048
    big = torch.ones(2**27, device=like.device)  # 0.5 GiB, beyond any CPU's cache
    x, w = like.new_ones(size, size), like.new_ones(size, size)
    packed = {"w.weight": torch.ops.mkldnn._reorder_linear_weight(w, size) if weights["head.weight"].is_mkldnn else w}
    wait = torch.cuda.synchronize if like.is_cuda else lambda: None
    return (big.nbytes / median_time(lambda: (big.sum(), wait()), repeat),
            2 * size**3 / median_time(lambda: (project(packed, "w", x), wait()), repeat))


def step_floor_s(config, weights, batch, context, ceiling):
    """Seconds of a decode step at the roofline: every weight and cached key read once, every product at the measured rate."""
    matrices = sum(math.prod(tensor.shape) for name, tensor in weights.items() if tensor.dim() == 2 and name != "embedding")
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * context
    attended = 4 * config.num_hidden_layers * config.hidden_size * batch * context
    return max((matrices + cached) * weights["embedding"].element_size() / ceiling[0], (2 * matrices * batch + attended) / ceiling[1])


def peak_memory_gib(device):
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.inference_mode()
def benchmark(weights, config, args):
    """Print the machine's ceiling, then tokens/s of each load, random tokens throughout; medians of args.repeat runs."""
    rng, like = random.Random(0), weights["embedding"]
    ceiling = machine_ceiling(weights, args.repeat)
    print(f"{args.model} | {str(like.dtype).removeprefix('torch.')} | {torch.get_num_threads()} threads | load {os.getloadavg()[0]:.1f} | "
          f"memory {ceiling[0] / 1e9:.1f} GB/s | products {ceiling[1] / 1e9:.0f} GFLOP/s")

    def random_prompt(n):
        return [rng.randrange(3, config.vocab_size) for _ in range(n)]

    def measure(prompts, **settings):
        """The stats of the run with the median time, with tok_s: sampled tokens per second, prefill included."""
        runs = []
        for _ in range(args.repeat + 1):
            runs.append(stats := {})
            begin = time.perf_counter()
            answers = generate(weights, config, prompts, stats=stats, compile_backend="inductor" if args.compile else None, **settings)
            stats["seconds"] = time.perf_counter() - begin
            stats["tok_s"] = sum(len(answer.tokens) for row in answers for answer in row) / stats["seconds"]
        return sorted(runs[1:], key=lambda stats: stats["seconds"])[args.repeat // 2]

    for batch in args.batch if "fixed" in args.benchmark else ():
        n = args.new_tokens
        stats = measure([random_prompt(n) for _ in range(batch)], max_new_tokens=n, max_batch=batch)
        step_s = stats["decode_s"] / n
        print(f"fixed batch {batch:3d} | {stats['tok_s']:8.1f} sampled tok/s, prefill included | prefill {batch * n / stats['prefill_s']:8.1f} tok/s | "
              f"decode {batch / step_s:8.1f} tok/s, {step_s * 1e3:6.2f} ms a step, "
              f"{step_floor_s(config, weights, batch, 1.5 * n, ceiling) / step_s:4.0%} of the roofline", flush=True)
    if "mixed" in args.benchmark:
        prompts = [random_prompt(rng.randint(50, 400)) for _ in range(64)]
        lengths = [[rng.randint(16, 256) for _ in range(8)] for _ in prompts]
        for share in (True, False):
            stats = measure(prompts, num_samples=8, max_new_tokens=lengths, max_batch=64, share_prompts=share)
            print(f"mixed, prompts {'shared' if share else 'not shared'} | {stats['tok_s']:8.1f} sampled tok/s | {stats['steps']} steps | "
                  f"prefill {stats['prefill_s']:.1f} s | cache {stats['cache_gib'] * 1024:.1f} MiB", flush=True)
    for n in (1024, 2048, 4096, 8192) if "context" in args.benchmark else ():
        if n <= config.max_context - 32:
            stats = measure([random_prompt(n)], max_new_tokens=32)
            step_s = stats["decode_s"] / 32
            print(f"context {n:5d} | prefill {n / stats['prefill_s']:8.1f} tok/s | {step_s * 1e3:6.2f} ms a step, "
                  f"{step_floor_s(config, weights, 1, n, ceiling) / step_s:4.0%} of the roofline | peak memory {peak_memory_gib(like.device):.2f} GiB", flush=True)


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
            elif thinking:
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
    params = sampling_params(load_params(path, dtype=dtype), config, device=args.device, packed=False if args.compile else None)
    if args.benchmark is not None:
        args.benchmark = args.benchmark or ["fixed", "mixed", "context"]
        return benchmark(params, config, args)
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
        show = text_streamer(tokenizer, ends, lambda text: print(text, end="", flush=True), args.think_tag, args.hide_thinking, sys.stdout.isatty())
        [[answer]] = generate(
            params, config, [tokenizer.encode(text, add_special_tokens=False).ids], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, stop_tokens=ends, seed=args.seed, seeds=[len(messages)],
            tokenizer=tokenizer, repetition=args.repetition, think_budget=args.think_budget, think_minimum=args.think_minimum,
            think_tag=args.think_tag, compile_backend="inductor" if args.compile else None, on_token=lambda prompt, sample, tokens: show(tokens))
        show(answer.tokens, last=True)
        print()
        if args.prompt is not None:
            return
        messages.append({"role": "assistant", "content": tokenizer.decode([token for token in answer.tokens if token not in ends])})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
