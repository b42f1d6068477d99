"""The sampling engine: batched, cached, and with the log-probability of every token that it draws.

    python generate.py --prompt "What is 3 + 4 * 5?"             # the embedded tiny model
    python generate.py --model qwen2.5-1.5b-instruct             # a chat; Ctrl-D ends it
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --think-budget 200

    answers = generate(params, config, prompts, num_samples=8, max_new_tokens=512,
                       stop_tokens=config.eos_token_id)
    answers[prompt][sample].tokens, .logprobs, .finish

A prompt is computed once, and its keys and values are held once: its samples attend to them
together, and each to its own tokens (Hydragen, arXiv:2402.05099). Rows that end leave the batch,
and waiting ones take their places (Orca, OSDI 2022). The layers are `model.block`; a GPU replays a
step as a CUDA graph. Bounds on thinking: s1, arXiv:2501.19393.
"""

import hashlib
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

import model
from attention import Layout, decode_attention, padded_length, prefill_attention
from optim import (
    Parser,
    add_device_flags,
    at_least,
    between,
    compute_dtype,
    find_device,
    printable,
    run_main,
)


def add_sampling_flags(parser, temperature=1.0, top_p=1.0, max_new_tokens=512):
    """The flags of everything that samples, with the defaults of the script."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=at_least(0.0), default=temperature, help="0 is greedy")
    add("--top-p", type=between(1e-9, 1.0), default=top_p,
        help="sample from the likeliest tokens that hold this share; 1: from all")
    add("--top-k", type=at_least(0), default=0, help="sample from so many likeliest tokens; 0: all")
    add("--max-new-tokens", type=at_least(1), default=max_new_tokens, help="the longest completion")
    add("--max-batch", type=at_least(1), default=64, help="rows that decode at once")
    add("--think-tag", default="think", help="name of the thinking block: <think> ... </think>")


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--adapter", help="directory of a LoRA adapter (PEFT's format) for the model")
    add("--prompt", help="what to ask; without it, an interactive chat")
    add("--system", help="the system turn; default: the model's own")
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add("--think-budget", type=at_least(0), default=0, help="close a longer thought; 0: never")
    add("--think-minimum", type=at_least(0), default=0,
        help='tokens before which a closed thought is reopened with "Wait"')
    add("--repetition", type=at_least(0), default=0,
        help="stop when so many last tokens repeat one phrase; 0: never")
    add("--hide-thinking", action="store_true", help="show only what stands outside the thought")
    add("--compile", action="store_true", help="torch.compile the layers (a minute, once)")
    add("--threads", type=at_least(1), help="default: what PyTorch chooses")
    add("--seed", type=int, default=0)
    add_sampling_flags(p, temperature=0.7, top_p=0.8)
    add_device_flags(p)
    return p.parse_args(argv)


class Completion(NamedTuple):
    tokens: list[int]  # the stop token, when one was drawn, is the last
    logprobs: list[float]  # at the sampling temperature, of the distribution before top-p and top-k
    finish: str  # "stop" | "length" | "repetition"
    forced: list[int] = []  # indices of tokens from a thinking budget: not to be trained on


# ------------------------------------------------------------ drawing a token


def mix(x):
    """The finaliser of splitmix64: every bit of the result depends on every bit of x, int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        unsigned = (x >> shift) & ((1 << (64 - shift)) - 1)  # >> carries the sign along
        x = (x ^ unsigned) * (factor - 2**64 if factor > 1 else 1)  # int64 wraps, as it should
    return x


def uniform(keys, draws):
    """Splitmix64, which has no state: keys, draws int64 [B] -> float32 [B] in [0, 1)."""
    bits = mix(keys + (draws + 1) * (0x9E3779B97F4A7C15 - 2**64))
    return (bits >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int64 from which all the noise of one completion derives."""
    digest = hashlib.blake2b(f"{seed} {prompt_seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def inverse_cdf(weights, noise):
    """The index at which the cumulative sum passes the noise: [B, V], [B, 1] in [0, 1) -> [B, 1].

    Searched in two levels, blocks of 64 and within one: a large vocabulary's sum takes long.
    """
    width = math.gcd(weights.shape[1], 64)
    blocks = weights.unflatten(1, (-1, width))
    cdf = blocks.sum(-1).cumsum(-1)  # [B, V / width]
    point = noise * cdf[:, -1:]
    which = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[1] - 1)
    inner = blocks.gather(1, which[..., None].expand(-1, -1, width))[:, 0].cumsum(-1)  # [B, width]
    point = point - (cdf.gather(1, which) - inner[:, -1:])
    # rounding may put the point just outside its block; a token of weight zero must not be drawn
    point = point.clamp_(min=0).minimum(inner[:, -1:] * (1 - 2**-24))
    inside = torch.searchsorted(inner, point, right=True).clamp_(max=width - 1)  # were it nan
    return which * width + inside


def sample_tokens(logits, noise, temperature=1.0, top_p=1.0, top_k=0, forced=None):
    """One token per row: logits [B, V] float32, noise [B] in [0, 1) -> tokens [B], logprobs [B].

    Top-k comes first, then top-p of what it left. Temperature 0: greedy, with log-probabilities at
    temperature 1. forced: [B] tokens to take instead of drawing; -1: draw.
    """
    logits = logits if temperature in (0, 1) else logits / temperature
    probs = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif top_k == 0 and top_p == 1:
        tokens = inverse_cdf(probs, noise[:, None])
    else:
        tokens = truncated_draw(probs, noise[:, None], top_p, top_k)
    logprobs = probs.gather(1, tokens).log()
    if forced is not None:  # relative to the drawn token, whose probability has not underflowed
        drawn = tokens
        tokens = torch.where(forced[:, None] < 0, drawn, forced[:, None])
        logprobs = logprobs + (logits.gather(1, tokens) - logits.gather(1, drawn))
    return tokens[:, 0], logprobs[:, 0]


def truncated_draw(probs, noise, top_p, top_k):
    """A token of the top k, and of those that hold top_p of their sum: [B, V], [B, 1] -> [B, 1]."""
    # A nucleus seldom needs more than 1,024 tokens. Asking whether it does would stall a GPU, which
    # sorts faster.
    few = min(top_k or (1024 if probs.device.type == "cpu" else probs.shape[1]), probs.shape[1])
    weights, ids = probs.topk(few)  # [B, few], the likeliest first
    if not top_k and few < probs.shape[1] and bool((weights.sum(-1) < top_p).any()):
        weights, ids = probs.sort(descending=True)
    if top_p < 1:
        likelier = weights.cumsum(-1) - weights  # the share of those before each
        total = weights.sum(-1, keepdim=True) if top_k else 1
        weights = weights * (likelier < top_p * total)
    cdf = weights.cumsum(-1)
    places = torch.searchsorted(cdf, noise * cdf[:, -1:], right=True)
    return ids.gather(1, places.clamp_(max=ids.shape[1] - 1))


# ------------------------------------------------------------ weights


def sampling_params(params, config, dtype=None, device=None, packed=None):
    """The form of the weights that `generate` runs on: a new dict, under the same names.

    Adapters are merged. On a CPU matrices are packed for oneDNN, whose products are the same to the
    last bit for (almost) any number of rows, and those of one input are joined, as model.linears
    knows; `packed` False leaves that out. Weights that stay as they are, are shared with `params`;
    what is packed already is returned. Call it again after an update.
    """
    if model.head_weight(params).is_mkldnn:
        return params
    like = params["model.norm.weight"]
    device = torch.device(device or like.device)
    if packed is None:
        packed = device.type == "cpu" and torch.backends.mkldnn.is_available()
    sources = {name: [name] for name in params if ".lora_" not in name}
    if packed:
        sources.setdefault("lm_head.weight", ["model.embed_tokens.weight"])
        for layer in range(config.num_hidden_layers):
            for part, names in model.JOINED.items():
                pre = f"model.layers.{layer}.{part}"
                for kind in (".weight", ".bias"):
                    found = [pre + name + kind for name in names]
                    if found[0] in sources:  # the MLP has no biases
                        sources = {k: v for k, v in sources.items() if k not in found}
                        sources[pre + "+".join(names) + kind] = found
    form = {}
    for name, parts in sources.items():  # one after the other: never a second copy of all weights
        parts = [model.merged_weight(params, part).detach() for part in parts]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        weight = weight.to(device, dtype or like.dtype)
        if packed and weight.dim() == 2 and name != "model.embed_tokens.weight":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        form[name] = weight
    return form


# ------------------------------------------------------------ stopping, and thinking budgets


class Sampling(NamedTuple):
    """What is asked of every completion, as `generate` documents it."""
    temperature: float
    top_p: float
    top_k: int
    stop_tokens: frozenset
    stop_strings: tuple
    tokenizer: Tokenizer | None
    repetition: int
    think_budget: int
    think_minimum: int
    think_tag: str

    @property
    def bounds_thinking(self):
        return bool(self.think_budget or self.think_minimum)

    @property
    def reads_text(self):
        """Whether each token has to be looked at before the next one is drawn."""
        return bool(self.stop_strings or self.repetition or self.bounds_thinking)

    def text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


@dataclass(eq=False)
class Row:
    """One completion on its way."""
    prompt: int
    sample: int
    key: int  # of its noise
    limit: int  # of its tokens
    first: int  # the last token of its prompt, which is the first that it feeds
    held: int  # tokens of its prompt that are in the cache
    thought_begin: int | None  # how many tokens it had when its thinking block opened
    shares: bool  # the prompt in the cache with its other samples
    thought_closed: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # indices of those that were not drawn
    queue: list[int] = field(default_factory=list)  # tokens to put next
    draws: int = 0

    @property
    def prompt_owner(self):
        """Who holds its prompt in the cache."""
        return self.prompt, 0 if self.shares else self.sample

    def extend(self, tokens, logprobs):
        if self.queue:
            self.forced.append(len(self.tokens))
            self.queue.pop(0)
        self.tokens += tokens
        self.logprobs += logprobs
        self.draws += len(tokens)

    def restarted(self):
        """As it was before its first token. It will say the same again: its noise has no state."""
        begin = 0 if self.thought_begin == 0 else None  # 0: its prompt opened the thought
        return replace(self, tokens=[], logprobs=[], forced=[], queue=[], draws=0,
                       thought_begin=begin, thought_closed=False)


def is_loop(tokens, span):
    """Whether the last `span` tokens are one phrase, said at least four times over."""
    tail = tokens[-span:]
    phrases = range(1, span // 4 + 1)
    return len(tail) == span and any(tail[n:] == tail[:-n] for n in phrases)


def steer_thinking(row, sampling):
    """Keep a thought between its minimum and its budget, by queueing what has to come next."""
    opening, closing = f"<{sampling.think_tag}>", f"</{sampling.think_tag}>"
    if row.thought_begin is None:
        if opening in sampling.text(row.tokens[-len(opening):]):
            row.thought_begin = len(row.tokens)
        return
    spent = len(row.tokens) - row.thought_begin
    tail = sampling.text(row.tokens[-min(spent, 32):] if spent else [])  # where the tag would stand
    if closing not in tail:
        if sampling.think_budget and spent >= sampling.think_budget and not row.queue:
            line_break = "" if tail.endswith("\n") else "\n"
            row.queue = model.encode_text(sampling.tokenizer, line_break + closing + "\n")
    elif spent < sampling.think_minimum and not row.queue and len(row.tokens) - 1 not in row.forced:
        thought = sampling.text(row.tokens[row.thought_begin:]).partition(closing)[0]
        while len(sampling.text(row.tokens[row.thought_begin:])) > len(thought):
            row.tokens.pop()  # the tag is taken back, in the cache, too
            row.logprobs.pop()
        row.queue = model.encode_text(sampling.tokenizer, "Wait")
    elif not row.queue:
        row.thought_closed = True


def finish_reason(row, sampling):
    """Why a row ends with its last token, or None. Queues what it has to say next."""
    if row.tokens[-1] in sampling.stop_tokens:
        return "stop"
    if sampling.stop_strings:  # a character takes four tokens at most, one for each of its bytes
        tail = sampling.text(row.tokens[-4 * max(map(len, sampling.stop_strings)):])
        if any(string in tail for string in sampling.stop_strings):
            return "stop"
    if sampling.bounds_thinking and not row.thought_closed:
        steer_thinking(row, sampling)
    if sampling.repetition and is_loop(row.tokens, sampling.repetition):
        return "repetition"
    return "length" if len(row.tokens) >= row.limit else None


# ------------------------------------------------------------ the cache and the scheduler


@dataclass
class Store:
    """Keys and values of owners, one row each: of the running rows, or of their prompts."""
    layers: list  # [keys, values] of each layer, [K, rows, slots, head_dim] each
    rows: dict  # owner: its row


def new_store(config, like):
    """An empty Store like the tensor `like`.

    With the heads outside, rows of a prompt that stand side by side are one product with its keys.
    A CPU has no bfloat16 product with float32 results: it keeps keys in float32 instead of turning
    them at every step.
    """
    key_dtype = like.dtype if like.is_cuda else torch.float32
    keys = like.new_zeros(config.num_key_value_heads, 0, 0, config.head_dim, dtype=key_dtype)
    layers = [[keys, keys.to(like.dtype)] for _ in range(config.num_hidden_layers)]
    return Store(layers, {})


@dataclass
class Batch:
    """The rows that decode together: what they have said, and their prompts."""
    own: Store
    prompts: Store
    graphs: dict  # of the decode step, as long as the stores stay where they are
    on_cpu: bool  # elsewhere shapes are few, for few CUDA graphs


def padded_rows(n, on_cpu):
    return n if on_cpu else 1 << max(0, n - 1).bit_length()


def padded_slots(length, on_cpu):
    """Slots for rows of this length, with room to go on."""
    block = 32 if on_cpu else 256
    return -(-(length + 1 + length // 16) // block) * block


def cache_slots(rows, prompts, prompt, completion, on_cpu):
    """Slots of so many rows and prompts, the longest of `completion` and `prompt` tokens."""
    own = padded_rows(rows, on_cpu) * padded_slots(completion, on_cpu)
    return own + padded_rows(prompts, on_cpu) * padded_slots(prompt, on_cpu)


def slots_needed(rows, on_cpu):
    prompts = len({row.prompt_owner for row in rows})
    longest = max(len(row.tokens) for row in rows)
    return cache_slots(len(rows), prompts, max(row.held for row in rows), longest, on_cpu)


def schedule(batch, waiting, max_batch, budget):
    """The rows to run: preempts some while over `budget` slots are needed, admits waiting ones."""
    running = list(batch.own.rows)
    while len(running) > 1 and slots_needed(running, batch.on_cpu) > budget:
        youngest = min(running, key=lambda row: len(row.tokens))
        running.remove(youngest)
        waiting.appendleft(youngest.restarted())
    while waiting and len(running) < max_batch:
        if running and slots_needed([*running, waiting[0]], batch.on_cpu) > budget:
            break
        running.append(waiting.popleft())
    return running


def allocate(batch, store, owners, length):
    """Give every owner a row of the store for `length` tokens, others none. Returns the new ones.

    The store is made anew, layer by layer, where it is too small, or a quarter too large.
    """
    store.rows = {owner: row for owner, row in store.rows.items() if owner in owners}
    rows, slots = padded_rows(len(owners), batch.on_cpu), padded_slots(length, batch.on_cpu)
    _, old_rows, old_slots, _ = store.layers[0][0].shape
    if not (0.75 * old_rows < rows <= old_rows and 0.75 * old_slots < slots <= old_slots):
        kept, both = list(store.rows.values()), min(slots, old_slots)
        for layer in store.layers:
            for i, old in enumerate(layer):
                layer[i] = old.new_zeros(old.shape[0], rows, slots, old.shape[3])
                layer[i][:, :len(kept), :both] = old[:, kept, :both]
        store.rows = {owner: row for row, owner in enumerate(store.rows)}
        batch.graphs.clear()
    fresh = [owner for owner in owners if owner not in store.rows]
    free = sorted(set(range(store.layers[0][0].shape[1])) - set(store.rows.values()))
    store.rows.update(zip(fresh, free))
    return fresh


# ------------------------------------------------------------ prefill and decode


class State(NamedTuple):
    """What a decode step reads and moves on, as tensors, so that no step waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, the next to be fed
    positions: torch.Tensor  # [B] where in its text it stands
    keys: torch.Tensor  # [B] of the noise
    draws: torch.Tensor  # [B] how many it has used
    forced: torch.Tensor  # [B] the token to put next, or -1
    layout: Layout

    def tensors(self):
        return [*self[:-1], *self.layout]


def batch_layout(batch):
    """The Layout of a batch; rows of the stores without an owner hold zeros."""
    K, B, slots, _ = batch.own.layers[0][0].shape
    N, P = batch.prompts.layers[0][0].shape[1:3]
    lengths, held = [0] * B, [0] * N
    groups = [[] for _ in range(N)]  # the rows of each prompt
    for row, at in sorted(batch.own.rows.items(), key=lambda item: item[1]):
        prompt = batch.prompts.rows[row.prompt_owner]
        lengths[at], held[prompt] = len(row.tokens), row.held
        groups[prompt].append(at)
    g = padded_rows(max(map(len, groups)), batch.on_cpu)
    places = [0] * B
    for prompt, group in enumerate(groups):
        for i, at in enumerate(group):
            places[at] = prompt * g + i
    members = [group + [0] * (g - len(group)) for group in groups]
    if sum(members, []) == list(range(B)):  # side by side: nothing need be gathered
        places = []
    lengths = torch.tensor(lengths)
    unseen = torch.arange(P) >= torch.tensor(held)[:, None]  # [N, P]
    prompt_bias = torch.zeros(N, P).masked_fill_(unseen, -torch.inf).repeat(K, 1)[:, None]
    next_slots = (torch.arange(K * B).view(K, B) * slots + lengths).flatten()
    columns = (next_slots, lengths, prompt_bias, members, places)
    device = batch.own.layers[0][0].device
    return Layout(*(torch.as_tensor(column).to(device) for column in columns))


def batch_state(batch, states):
    """The State of a batch's rows. states: {shapes: State}: a graph reads where it was captured."""
    columns = [[0] * batch.own.layers[0][0].shape[1] for _ in range(5)]
    for row, at in batch.own.rows.items():
        last = row.tokens[-1] if row.tokens else row.first
        values = (last, row.held + len(row.tokens), row.key, row.draws, -1)
        for column, value in zip(columns, values):
            column[at] = value
    device = batch.own.layers[0][0].device
    now = State(*(torch.tensor(column, device=device) for column in columns), batch_layout(batch))
    state = states.setdefault(tuple(tensor.shape for tensor in now.tensors()), now)
    for tensor, value in zip(state.tensors(), now.tensors()):
        tensor.copy_(value)
    return state


def prefill(params, config, store, owners, prompts, chunk):
    """Write the keys and values of the owners' prompts, about `chunk` tokens at a time."""
    todo = [(prompts[owner[0]][:-1], store.rows[owner]) for owner in owners]
    todo = sorted((pair for pair in todo if pair[0]), key=lambda pair: -len(pair[0]))
    device = store.layers[0][0].device
    while todo:
        longest = len(todo[0][0])
        width = min(padded_length(longest), chunk)
        padded = -(-longest // width) * width
        now, todo = todo[:chunk // width], todo[chunk // width:]
        tokens = [prompt + [0] * (padded - len(prompt)) for prompt, _ in now]
        tokens = torch.tensor(tokens, device=device)
        rows = torch.tensor([row for _, row in now], device=device)
        for begin in range(0, longest, width):
            part = tokens[:, begin:begin + width]
            positions = torch.arange(begin, begin + width, device=device).expand(part.shape)
            attend_fn = prefill_attention(store.layers, rows, begin)
            model.hidden_states(params, config, part, positions, attend_fn)


def decode_step(params, config, state, batch, sampling):
    """Feed each row's last token, draw the next: tokens, logprobs [B]. Writes `state` and cache."""
    attend_fn = decode_attention(batch.own.layers, batch.prompts.layers, state.layout)
    tokens, positions = state.tokens[:, None], state.positions[:, None]  # [B, 1]
    hidden = model.hidden_states(params, config, tokens, positions, attend_fn)
    logits = model.lm_head(hidden[:, 0], model.head_weight(params))  # [B, V]
    forced = state.forced if sampling.bounds_thinking else None
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), sampling.temperature,
                                     sampling.top_p, sampling.top_k, forced)
    state.tokens.copy_(tokens)
    for counter in (state.positions, state.draws, state.layout.slots, state.layout.lengths):
        counter.add_(1)
    return tokens, logprobs


def captured(step_fn, state, graphs):
    """step_fn(), on a GPU as a CUDA graph, captured once per shape; its tensors stay in place."""
    if state.tokens.device.type != "cuda":
        return step_fn()
    shape = tuple(tensor.shape for tensor in state.tensors())
    if shape not in graphs:
        before = [tensor.clone() for tensor in state.tensors()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
            step_fn()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, old in zip(state.tensors(), before):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step_fn()
        graphs[shape] = graph, out
    graph, out = graphs[shape]
    graph.replay()
    return [tensor.clone() for tensor in out]


def decode(params, config, batch, state, sampling, stride, step_fn):
    """At most `stride` steps for all rows: [(tokens [B], logprobs [B]), ...]."""
    _, B, slots, _ = batch.own.layers[0][0].shape
    if sampling.bounds_thinking:
        next_tokens = [-1] * B
        for row, at in batch.own.rows.items():
            next_tokens[at] = row.queue[0] if row.queue else -1
        state.forced.copy_(torch.tensor(next_tokens))

    def run_step():
        return step_fn(params, config, state, batch, sampling)

    room = [min(row.limit, slots) - len(row.tokens) for row in batch.own.rows]
    drawn = []
    for _ in range(min(stride, *room)):
        drawn.append(captured(run_step, state, batch.graphs))
        if batch.on_cpu and not sampling.stop_tokens.isdisjoint(drawn[-1][0].tolist()):
            break
    return drawn


def harvest(batch, drawn, sampling, results, on_token):
    """Hand the drawn tokens to their rows, and those that end to `results`.

    drawn: [(tokens [B], logprobs [B]), ...] of one step after another. Returns whether a thought
    was reopened: the row is then shorter than its cache.
    """
    tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]
    reopened = False
    for row, at in list(batch.own.rows.items()):
        ends = (n for n, token in enumerate(tokens[at], 1) if token in sampling.stop_tokens)
        end = next(ends, len(drawn))
        row.extend(tokens[at][:end], logprobs[at][:end])
        if math.isnan(sum(logprobs[at][:end])):
            raise ValueError("the model's log-probabilities are not finite: its weights are "
                             "damaged, or a training run has ruined them; use another checkpoint")
        length = len(row.tokens)
        finish = finish_reason(row, sampling)
        reopened |= len(row.tokens) < length
        if on_token:
            on_token(row.prompt, row.sample, row.tokens)
        if finish:
            completion = Completion(row.tokens, row.logprobs, finish, row.forced)
            results[row.prompt][row.sample] = completion
            del batch.own.rows[row]
    return reopened


# ------------------------------------------------------------ generate


def check_request(config, prompts, limits, **settings):
    """Raises ValueError for a setting out of range, or a prompt that cannot be gone on from."""
    settings["max_new_tokens"] = min((n for row in limits for n in row), default=1)
    for name, value in settings.items():
        low = 0 if name in ("temperature", "top_p", "top_k") else 1
        if not low <= value < math.inf or (name == "top_p" and not 0 < value <= 1):
            expected = "above 0 and at most 1" if name == "top_p" else f"at least {low}"
            raise ValueError(f"{name} is {value}, expected {expected}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it a token, such as <|endoftext|>")
        if len(prompt) >= config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which fill the context of "
                             f"{config.max_context}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of "
                             f"{config.vocab_size}")


def new_rows(config, prompts, limits, seed, seeds, shares, sampling):
    """A waiting Row for every sample of every prompt, long prompts first: neighbours are alike."""
    waiting = deque()
    for p in sorted(range(len(prompts)), key=lambda p: -len(prompts[p])):
        thought_begin = None
        if sampling.bounds_thinking:
            tail, tag = sampling.text(prompts[p][-32:]), f"{sampling.think_tag}>"
            thought_begin = 0 if tail.rfind("<" + tag) > tail.rfind("</" + tag) else None
        held = len(prompts[p]) - 1  # rows feed the last token themselves: only decode makes logits
        for sample, limit in enumerate(limits[p]):
            key = row_key(seed, p if seeds is None else seeds[p], sample)
            limit = min(limit, config.max_context - len(prompts[p]))
            row = Row(p, sample, key, limit, prompts[p][-1], held, thought_begin, shares)
            waiting.append(row)
    return waiting


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0,
             top_k=0, stop_tokens=(), seed=0, max_batch=64, seeds=None, stop_strings=(),
             tokenizer=None, repetition=0, think_budget=0, think_minimum=0, think_tag="think",
             share_prompts=True, cache_gib=math.inf, chunk=2048, compile_backend=None,
             on_token=None, stats=None):
    """`num_samples` completions of each prompt, lists of token ids: -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, how much it has used): what it says
    depends neither on who shares its batch nor on the batch size, but for a rounding that moves a
    draw across the very edge of two tokens.
    params: a checkpoint's tensors, with or without an adapter, or sampling_params of them.
    max_new_tokens: an int, or one for each [prompt][sample]; the context's end is a limit, too.
    seeds: an int for each prompt; default its index.
    stop_strings: need the tokenizer, as do think_...; the tokens that say them are kept.
    repetition: end a row whose last tokens, so many, say one phrase four times or more.
    think_budget, think_minimum: tokens after which a thought is closed, before which it is not.
    share_prompts: hold a prompt's keys and values once for its samples.
    cache_gib: bound of the cache, as long as one row fits; the rows beyond it wait.
    chunk: tokens of prompts that go through the layers at once.
    compile_backend: "inductor" to torch.compile the decode step.
    on_token(prompt, sample, tokens): called with a row's tokens so far.
    stats: a dict that is given steps, cache_gib (peak), prefill_s and decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [[max_new_tokens] * num_samples for _ in prompts]
    check_request(config, prompts, limits, num_samples=num_samples, temperature=temperature,
                  top_p=top_p, top_k=top_k, max_batch=max_batch, chunk=chunk)
    sampling = Sampling(temperature, top_p, top_k, frozenset(stop_tokens), tuple(stop_strings),
                        tokenizer, repetition, think_budget, think_minimum, think_tag)
    if (sampling.stop_strings or sampling.bounds_thinking) and tokenizer is None:
        raise ValueError("stop strings and bounds on thinking need the tokenizer")
    stats = {} if stats is None else stats
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
    results = [[None] * num_samples for _ in prompts]
    if not prompts:
        return results

    params = sampling_params(params, config, packed=False if compile_backend else None)
    embedding = params["model.embed_tokens.weight"]
    step_fn = decode_step
    if compile_backend:
        step_fn = torch.compile(decode_step, backend=compile_backend)
    on_cpu = embedding.device.type == "cpu"
    batch = Batch(new_store(config, embedding), new_store(config, embedding), {}, on_cpu)
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    slot_bytes = width * sum(tensor.element_size() for tensor in batch.own.layers[0])
    budget = cache_gib * 2**30 / slot_bytes
    waiting = new_rows(config, prompts, limits, seed, seeds, share_prompts, sampling)
    # steps between two looks at what was drawn; on a CPU, looking for stop tokens is free
    stride = 1 if on_token or sampling.reads_text else 8
    states = {}
    while waiting or batch.own.rows:
        begin = time.perf_counter()
        running = schedule(batch, waiting, max_batch, budget)
        allocate(batch, batch.own, running, max(len(row.tokens) for row in running))
        owners = dict.fromkeys(row.prompt_owner for row in running)
        fresh = allocate(batch, batch.prompts, owners, max(row.held for row in running))
        prefill(params, config, batch.prompts, fresh, prompts, chunk)
        state = batch_state(batch, states)
        decoding = time.perf_counter()
        stats["prefill_s"] += decoding - begin
        layers = batch.own.layers + batch.prompts.layers
        held = sum(tensor.nbytes for layer in layers for tensor in layer)
        stats["cache_gib"] = max(stats["cache_gib"], held / 2**30)
        changed = False
        while not changed:
            drawn = decode(params, config, batch, state, sampling, stride, step_fn)
            stats["steps"] += len(drawn)
            reopened = harvest(batch, drawn, sampling, results, on_token)
            # several prompts are prefilled at once, and a smaller batch takes a copy of the cache
            _, B, slots, _ = batch.own.layers[0][0].shape
            ended = B - len(batch.own.rows) >= max(1, B // (16 if waiting else 4))
            full = any(len(row.tokens) == slots for row in batch.own.rows)
            changed = reopened or ended or full
        stats["decode_s"] += time.perf_counter() - decoding
    return results


# ------------------------------------------------------------ the command line


def completion_text(tokenizer, completion, ends, stop=()):
    """What a completion says, without its end token, and up to the first of the stop strings."""
    tokens = [token for token in completion.tokens if token not in ends]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return text[:min((i for i in map(text.find, stop) if i >= 0), default=len(text))]


def text_streamer(tokenizer, ends, write, think_tag="think", hide=False, dim=True):
    """show(tokens, last): writes what is new of a completion's text, its thought dim or hidden."""
    shown, thinking = 0, False

    def show(tokens, last=False):
        nonlocal shown, thinking
        kept = [token for token in tokens if token not in ends]
        text = tokenizer.decode(kept, skip_special_tokens=False)
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
                new = printable(text[shown:end])
                write(f"\033[2m{new}\033[0m" if thinking and dim else new)
            shown = max(shown, end)
            if at < 0:
                return
            thinking = not thinking

    return show


def fit_turns(tokenizer, messages, system, room):
    """(messages, their ids) less the oldest questions and answers until `room` tokens hold them.

    The last question stays.
    """
    ids = model.encode_chat(tokenizer, messages, system=system)
    while len(ids) > room and len(messages) > 1:
        messages = messages[2:]
        ids = model.encode_chat(tokenizer, messages, system=system)
    return messages, ids


def reply(params, config, tokenizer, system, messages, args):
    """The conversation with the answer to its last question, which is printed as it comes.

    Raises ValueError when the question alone fills the context.
    """
    room = config.max_context - min(args.max_new_tokens, config.max_context // 2)
    kept, prompt = fit_turns(tokenizer, messages, system, room)
    if args.raw:
        prompt = tokenizer.encode(messages[-1]["content"], add_special_tokens=False).ids
    ends = model.end_tokens(tokenizer, config)
    show = text_streamer(tokenizer, ends, lambda text: print(text, end="", flush=True),
                         args.think_tag, args.hide_thinking, sys.stdout.isatty())
    [[answer]] = generate(
        params, config, [prompt], max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, stop_tokens=ends,
        seed=args.seed, seeds=[len(messages)], tokenizer=tokenizer, repetition=args.repetition,
        think_budget=args.think_budget, think_minimum=args.think_minimum,
        think_tag=args.think_tag, compile_backend="inductor" if args.compile else None,
        on_token=lambda prompt, sample, tokens: show(tokens))
    show(answer.tokens, last=True)
    print()
    if len(kept) < len(messages):
        print(f"(the context of {config.max_context} tokens is full: forgotten are the "
              f"{len(messages) - len(kept)} oldest turns)")
    return [*kept, {"role": "assistant", "content": completion_text(tokenizer, answer, ends)}]


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    path = model.resolve_model(args.model)
    config, tokenizer = model.load_config(path), model.load_tokenizer(path)
    system = args.system or model.load_system_prompt(path)
    device = find_device(args.device)
    params = model.load_params(path, device, compute_dtype(args.dtype, device), args.adapter)
    params = sampling_params(params, config, packed=False if args.compile else None)
    policy = (params, config, tokenizer, system)
    if args.prompt is not None:
        reply(*policy, [{"role": "user", "content": args.prompt}], args)
        return
    print(f"{args.model} on {device}. Ctrl-D ends, Ctrl-C stops an answer, /reset starts anew.")
    messages = []
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            return
        if question == "/reset":
            messages = []
            print("(a new conversation)")
        elif question:
            try:
                asked = {"role": "user", "content": question}
                messages = reply(*policy, [*messages, asked], args)
            except (ValueError, RuntimeError, KeyboardInterrupt) as error:
                why = str(error) or "stopped"
                print(f"\n(no answer: {why}; the conversation is as it was before)")


if __name__ == "__main__":
    run_main(main, parse_args)
