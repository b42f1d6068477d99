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

import functools
import hashlib
import itertools
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

import model
from attention import (
    Layout,
    Slots,
    decode_attention,
    has_varlen,
    padded_length,
    prefill_attention,
    slot_decode,
    slot_prefill,
)
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


def sampling_params(params, config, dtype=None, device=None, packed=None, out=None):
    """The form of the weights that `generate` runs on: a new dict, under the same names.

    Adapters are merged. On a CPU matrices are packed for oneDNN, whose products are the same to the
    last bit for (almost) any number of rows; `packed` False leaves that out. Where weights are
    copied anyway, those of one input are joined, as model.linears knows. Those that stay as they
    are, are shared with `params`; what is packed already is returned. Call it again after an
    update; out: the form of before, which a GPU writes into, so that what reads it may stay.
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
    if packed or device != like.device or len(sources) < len(params):
        sources = joined_sources(sources, config)
    form = {}
    for name, parts in sources.items():  # one after the other: never a second copy of all weights
        parts = [model.merged_weight(params, part).detach() for part in parts]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        weight = weight.to(device, dtype or like.dtype)
        if packed and weight.dim() == 2 and name != "model.embed_tokens.weight":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        elif out and out[name].data_ptr() != weight.data_ptr():
            weight = out[name].copy_(weight)
        form[name] = weight
    return form


def joined_sources(sources, config):
    """{name: [itself]} with the JOINED layers under one name: {joined name: their names}."""
    for layer in range(config.num_hidden_layers):
        for part, names in model.JOINED.items():
            pre = f"model.layers.{layer}.{part}"
            for kind in (".weight", ".bias"):
                found = [pre + name + kind for name in names]
                if found[0] in sources:  # the MLP has no biases
                    sources = {k: v for k, v in sources.items() if k not in found}
                    sources[pre + "+".join(names) + kind] = found
    return sources


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


# ------------------------------------------------------------ the plain batch: stores that grow


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
    budget: float  # slots that they may take

    @property
    def rows(self):
        return self.own.rows

    @property
    def layers(self):
        return self.own.layers + self.prompts.layers


def padded_slots(length, block=32):
    """Slots for rows of this length, with room to go on."""
    return -(-(length + 1 + length // 16) // block) * block


def cache_slots(rows, prompts, prompt, completion, static):
    """Slots that so many rows and prompts take, the longest of `completion` and `prompt` tokens."""
    if static:
        return power_of_two(rows) * static_slots(prompt + completion)
    return rows * padded_slots(completion) + prompts * padded_slots(prompt)


def slots_needed(rows):
    prompts = len({row.prompt_owner for row in rows})
    longest = max(len(row.tokens) for row in rows)
    return cache_slots(len(rows), prompts, max(row.held for row in rows), longest, static=False)


def schedule(batch, waiting, max_batch):
    """The rows to run: preempts some while the budget is exceeded, admits waiting ones."""
    running = list(batch.rows)
    while len(running) > 1 and slots_needed(running) > batch.budget:
        youngest = min(running, key=lambda row: len(row.tokens))
        running.remove(youngest)
        waiting.appendleft(youngest.restarted())
    while waiting and len(running) < max_batch:
        if running and slots_needed([*running, waiting[0]]) > batch.budget:
            break
        running.append(waiting.popleft())
    return running


def allocate(store, owners, length):
    """Give every owner a row of the store for `length` tokens, others none. Returns the new ones.

    The store is made anew, layer by layer, where it is too small, or a quarter too large.
    """
    store.rows = {owner: row for owner, row in store.rows.items() if owner in owners}
    rows, slots = len(owners), padded_slots(length)
    _, old_rows, old_slots, _ = store.layers[0][0].shape
    if not (0.75 * old_rows < rows <= old_rows and 0.75 * old_slots < slots <= old_slots):
        kept, both = list(store.rows.values()), min(slots, old_slots)
        for layer in store.layers:
            for i, old in enumerate(layer):
                layer[i] = old.new_zeros(old.shape[0], rows, slots, old.shape[3])
                layer[i][:, :len(kept), :both] = old[:, kept, :both]
        store.rows = {owner: row for row, owner in enumerate(store.rows)}
    fresh = [owner for owner in owners if owner not in store.rows]
    free = sorted(set(range(store.layers[0][0].shape[1])) - set(store.rows.values()))
    store.rows.update(zip(fresh, free))
    return fresh


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


def batch_layout(batch):
    """The Layout of a batch; rows of the stores without an owner hold zeros."""
    K, B, slots, _ = batch.own.layers[0][0].shape
    N, P = batch.prompts.layers[0][0].shape[1:3]
    lengths, held = [0] * B, [0] * N
    groups = [[] for _ in range(N)]  # the rows of each prompt
    for row, at in sorted(batch.rows.items(), key=lambda item: item[1]):
        prompt = batch.prompts.rows[row.prompt_owner]
        lengths[at], held[prompt] = len(row.tokens), row.held
        groups[prompt].append(at)
    g = max(map(len, groups))
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


def seat(params, config, batch, waiting, prompts, max_batch, chunk):
    """Choose the rows that run and bring their prompts into the cache. Returns their State."""
    running = schedule(batch, waiting, max_batch)
    allocate(batch.own, running, max(len(row.tokens) for row in running))
    owners = dict.fromkeys(row.prompt_owner for row in running)
    fresh = allocate(batch.prompts, owners, max(row.held for row in running))
    prefill(params, config, batch.prompts, fresh, prompts, chunk)
    keys = batch.own.layers[0][0]
    return batch_state(batch.rows, keys.shape[1], keys.device)._replace(layout=batch_layout(batch))


# ------------------------------------------------------------ the static batch: slots that stay


@dataclass
class Engine:
    """What a GPU keeps from one call of `generate` to the next: it all stays where it is.

    A row holds its prompt and what it said in the slots of its place, among the first B = 1, 2, 4,
    ... places. A CUDA graph of a step with B rows is captured once, and replayed from then on.
    """
    cache: Slots | None = None
    rows: dict = field(default_factory=dict)  # the running rows, and their places
    graphs: dict = field(default_factory=dict)  # {(B, settings): (graph, its State, what it draws)}
    weights: tuple = ()  # addresses of the tensors that the graphs read
    stream: Any = None  # on which they are captured
    form: dict | None = None  # the weights, by who updates them in place

    @property
    def layers(self):
        return self.cache.layers

    @property
    def places(self):
        return len(self.layers[0][0]) // self.cache.size

    def release(self):
        """Give all memory back; the next call allots and captures anew."""
        self.rows.clear()
        self.graphs.clear()
        self.cache = self.form = None


def power_of_two(n):
    """The power of two at or above n."""
    return 1 << max(0, n - 1).bit_length()


def static_slots(length):
    """Slots of a place for rows of this length: few sizes, so that a cache fits the next call."""
    return -(-length // 128) * 128


def prepare(engine, params, config, rows, length, budget):
    """A cache for so many rows of `length` tokens, as many as `budget` slots hold, at least one.

    What is there stays when it is large enough, and so do the graphs while weights and cache do.
    """
    engine.rows.clear()
    size = static_slots(length)
    rows = power_of_two(rows)
    while rows > 1 and rows * size > budget:
        rows //= 2
    weights = tuple(tensor.data_ptr() for tensor in params.values())
    like = params["model.norm.weight"]
    small = not engine.cache or engine.cache.size < size or engine.places < rows
    if small or engine.layers[0][0].dtype != like.dtype:
        if engine.cache:
            size, rows = max(size, engine.cache.size), max(rows, engine.places)
            engine.cache = None  # before the next one is allotted
        shape = (rows * size, config.num_key_value_heads, config.head_dim)
        layers = [[like.new_zeros(shape) for _ in range(2)]
                  for _ in range(config.num_hidden_layers)]
        engine.cache = Slots(layers, size)
    if small or weights != engine.weights:
        engine.graphs.clear()
    engine.weights = weights


def take_places(engine, waiting, most):
    """Admit waiting rows, at most `most` in all: (B, the new rows).

    A row that stands beyond the first B places moves into a free one.
    """
    admitted = [waiting.popleft() for _ in range(min(most - len(engine.rows), len(waiting)))]
    B = power_of_two(len(engine.rows) + len(admitted))
    free = sorted(set(range(B)) - set(engine.rows.values()), reverse=True)
    moves = {}
    for row, place in engine.rows.items():
        if place >= B:
            moves[place] = engine.rows[row] = free.pop()
    if moves:
        device = engine.layers[0][0].device
        old, new = (torch.tensor([*places], device=device) for places in (moves, moves.values()))
        for cached in itertools.chain(*engine.layers):
            cached = cached.unflatten(0, (-1, engine.cache.size))
            cached.index_copy_(0, new, cached.index_select(0, old))
    engine.rows.update((row, free.pop()) for row in admitted)
    return B, admitted


def prefill_slots(params, config, engine, rows, prompts, chunk):
    """Write the keys and values of the prompts of `rows`, about `chunk` tokens at a time."""
    places = {}  # of the samples of each prompt
    for row in rows:
        if row.held:
            places.setdefault(row.prompt, []).append(engine.rows[row])
    device = engine.layers[0][0].device
    todo = list(places)
    while todo:
        now = [todo.pop()]
        while todo and sum(len(prompts[p]) for p in [*now, todo[-1]]) <= chunk:
            now.append(todo.pop())
        lengths = [len(prompts[p]) - 1 for p in now]
        tokens, positions, sources, slots = [], [], [], []
        for p, n in zip(now, lengths):
            for place in places[p]:
                sources += range(len(tokens), len(tokens) + n)
                slots += range(place * engine.cache.size, place * engine.cache.size + n)
            tokens += prompts[p][:-1]
            positions += range(n)
        tokens, positions, sources, slots = (
            torch.tensor(column, device=device) for column in (tokens, positions, sources, slots))
        attend_fn = slot_prefill(engine.cache, lengths, sources, slots)
        model.hidden_states(params, config, tokens[None], positions[None], attend_fn)


def seat_in_slots(params, config, engine, waiting, prompts, max_batch, chunk):
    """As `seat`, for the static batch."""
    B, admitted = take_places(engine, waiting, min(max_batch, engine.places))
    prefill_slots(params, config, engine, admitted, prompts, chunk)
    return batch_state(engine.rows, B, engine.layers[0][0].device)


# ------------------------------------------------------------ decode


class State(NamedTuple):
    """What a decode step reads and moves on, as tensors, so that no step waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, the next to be fed
    positions: torch.Tensor  # [B] where in its text it stands
    keys: torch.Tensor  # [B] of the noise
    draws: torch.Tensor  # [B] how many it has used
    forced: torch.Tensor  # [B] the token to put next, or -1
    layout: Layout | None = None  # of the plain batch


def batch_state(rows, B, device):
    """The State of rows in B places; a place without a row holds zeros."""
    columns = [[0] * B for _ in range(5)]
    for row, at in rows.items():
        last = row.tokens[-1] if row.tokens else row.first
        forced = row.queue[0] if row.queue else -1
        values = (last, row.held + len(row.tokens), row.key, row.draws, forced)
        for column, value in zip(columns, values):
            column[at] = value
    return State(*torch.tensor(columns).to(device))


def decode_step(params, config, state, cache, sampling):
    """Feed each row's last token, draw the next: tokens, logprobs [B]. Writes `state` and cache.

    cache: Slots, or the layers of the two stores.
    """
    if isinstance(cache, Slots):
        attend_fn = slot_decode(cache, state.positions)
    else:
        attend_fn = decode_attention(*cache, state.layout)
    tokens, positions = state.tokens[:, None], state.positions[:, None]  # [B, 1]
    hidden = model.hidden_states(params, config, tokens, positions, attend_fn)
    logits = model.lm_head(hidden[:, 0], model.head_weight(params))  # [B, V]
    forced = state.forced if sampling.bounds_thinking else None
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), sampling.temperature,
                                     sampling.top_p, sampling.top_k, forced)
    state.tokens.copy_(tokens)
    counters = [state.positions, state.draws]
    if state.layout:
        counters += [state.layout.slots, state.layout.lengths]
    for counter in counters:
        counter.add_(1)
    return tokens, logprobs


def capture(step_fn, state, graphs, stream):
    """A CUDA graph of step_fn(), the state that it reads, and what it gives."""
    before = [tensor.clone() for tensor in state[:-1]]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they need
        step_fn()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, old in zip(state, before):
        tensor.copy_(old)
    pool = next(iter(graphs.values()))[0].pool() if graphs else None  # one for all
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        out = step_fn()
    return graph, state, out


def graph_step(engine, state, settings, step_fn):
    """(the state of this step's graph, a function that replays it): captured if it is not there."""
    key = len(state.tokens), settings
    if key not in engine.graphs:
        engine.stream = engine.stream or torch.cuda.Stream()  # each would pin a workspace
        engine.graphs[key] = capture(step_fn, state, engine.graphs, engine.stream)
    graph, held, out = engine.graphs[key]
    for tensor, value in zip(held[:-1], state):
        tensor.copy_(value)

    def replay():
        graph.replay()
        return [tensor.clone() for tensor in out]

    return held, replay


def wait_for(tensor):
    """Until a GPU has done what it was asked, so that times are told apart."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def steps_left(batch):
    """Until a row must end, or needs more slots; in the static batch, until none can go on."""
    room = [row.limit - len(row.tokens) for row in batch.rows]
    if isinstance(batch, Engine):
        return max(room, default=0)
    slots = batch.own.layers[0][0].shape[2]
    return min([slots - len(row.tokens) for row in batch.rows] + room, default=0)


def decode(step_fn, state, rows, steps, sampling):
    """At most `steps` for all rows: [(tokens [B], logprobs [B]), ...]."""
    if sampling.bounds_thinking:
        next_tokens = [-1] * len(state.tokens)
        for row, at in rows.items():
            next_tokens[at] = row.queue[0] if row.queue else -1
        state.forced.copy_(torch.tensor(next_tokens))
    drawn = []
    for _ in range(steps):
        drawn.append(step_fn())
        tokens, _ = drawn[-1]
        # on a CPU, looking for stop tokens is free
        if tokens.device.type == "cpu" and not sampling.stop_tokens.isdisjoint(tokens.tolist()):
            break
    return drawn


def harvest(rows, drawn, sampling, results, on_token):
    """Hand the drawn tokens to their rows, and those that end to `results`.

    drawn: [(tokens [B], logprobs [B]), ...] of one step after another. Returns whether a thought
    was reopened: the row is then shorter than its cache.
    """
    tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]
    reopened = False
    for row, at in list(rows.items()):
        ends = (n for n, token in enumerate(tokens[at], 1) if token in sampling.stop_tokens)
        end = min(next(ends, len(drawn)), row.limit - len(row.tokens))
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
            del rows[row]
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
             share_prompts=True, cache_gib=math.inf, chunk=None, compiled=False, engine=None,
             on_token=None, on_step=None, stats=None):
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
    share_prompts: hold a prompt's keys and values once for its samples (not on a GPU).
    cache_gib: bound of the cache, as long as one row fits; the rows beyond it wait.
    chunk: tokens of prompts that go through the layers at once.
    compiled: torch.compile the decode step of a GPU's engine; it takes a minute, once.
    engine: an Engine, whose cache and graphs a GPU uses again while the weights stay in place.
    on_token(prompt, sample, tokens): called with a row's tokens so far.
    on_step(ended, num_tokens): called every few steps with the [(prompt, sample, Completion), ...]
    that have ended since, and the number of tokens drawn.
    stats: a dict that is given steps, cache_gib (peak), prefill_s, capture_s and decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [[max_new_tokens] * num_samples for _ in prompts]
    check_request(config, prompts, limits, num_samples=num_samples, temperature=temperature,
                  top_p=top_p, top_k=top_k, max_batch=max_batch, chunk=chunk or 1)
    sampling = Sampling(temperature, top_p, top_k, frozenset(stop_tokens), tuple(stop_strings),
                        tokenizer, repetition, think_budget, think_minimum, think_tag)
    if (sampling.stop_strings or sampling.bounds_thinking) and tokenizer is None:
        raise ValueError("stop strings and bounds on thinking need the tokenizer")
    stats = {} if stats is None else stats
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "capture_s": 0.0, "decode_s": 0.0}
    results = [[None] * num_samples for _ in prompts]
    if not prompts:
        return results

    params = sampling_params(params, config)
    like = params["model.norm.weight"]
    waiting = new_rows(config, prompts, limits, seed, seeds, share_prompts, sampling)
    pair = config.num_key_value_heads * config.head_dim * 2 * like.element_size()  # bytes of a slot
    budget = cache_gib * 2**30 / (config.num_hidden_layers * pair)
    step_fn = decode_step
    static = has_varlen(like.device, like.dtype)
    if static:
        batch = Engine() if engine is None else engine
        longest = max(row.held + 1 + row.limit for row in waiting)
        prepare(batch, params, config, min(max_batch, len(waiting)), longest, budget)
        if compiled:
            step_fn = torch.compile(decode_step, dynamic=False)
    else:
        batch = Batch(new_store(config, like), new_store(config, like), budget)
    chunk = chunk or (16384 if static else 2048)
    # steps between two looks at what was drawn
    stride = 1 if on_token or sampling.reads_text else 16 if static else 8
    settings = (temperature, top_p, top_k, sampling.bounds_thinking)
    while waiting or batch.rows:
        begin = time.perf_counter()
        state = (seat_in_slots if static else seat)(params, config, batch, waiting, prompts,
                                                    max_batch, chunk)
        cache = batch.cache if static else (batch.own.layers, batch.prompts.layers)
        step = functools.partial(step_fn, params, config, state, cache, sampling)
        wait_for(like)
        capturing = time.perf_counter()
        if static:
            state, step = graph_step(batch, state, settings, step)
        decoding = time.perf_counter()
        stats["prefill_s"] += capturing - begin
        stats["capture_s"] += decoding - capturing
        held = sum(tensor.nbytes for layer in batch.layers for tensor in layer)
        stats["cache_gib"] = max(stats["cache_gib"], held / 2**30)
        changed = False
        while not changed:
            steps = min(stride, steps_left(batch))
            drawn = decode(step, state, batch.rows, steps, sampling)
            stats["steps"] += len(drawn)
            before = {row: len(row.tokens) for row in batch.rows}
            reopened = harvest(batch.rows, drawn, sampling, results, on_token)
            if on_step:
                ended = [row for row in before if row not in batch.rows]
                on_step([(row.prompt, row.sample, results[row.prompt][row.sample])
                         for row in ended], sum(len(row.tokens) - n for row, n in before.items()))
            # several prompts are prefilled at once, and a smaller batch takes a copy of the cache
            B = len(state.tokens)
            ended = B - len(batch.rows) >= max(1, B // (16 if waiting else 2 if static else 4))
            changed = reopened or ended or not steps_left(batch)
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


def reply(params, config, tokenizer, system, engine, messages, args):
    """The conversation with the answer to its last question, which is printed as it comes.

    Raises ValueError when the question alone fills the context.
    """
    room = config.max_context - min(args.max_new_tokens, config.max_context // 2)
    kept, prompt = fit_turns(tokenizer, messages, system, room)
    if args.raw:
        text = messages[-1]["content"].encode("utf-8", "replace").decode()
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
    ends = model.end_tokens(tokenizer, config)
    show = text_streamer(tokenizer, ends, lambda text: print(text, end="", flush=True),
                         args.think_tag, args.hide_thinking, sys.stdout.isatty())
    [[answer]] = generate(
        params, config, [prompt], max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, stop_tokens=ends,
        seed=args.seed, seeds=[len(messages)], tokenizer=tokenizer, repetition=args.repetition,
        think_budget=args.think_budget, think_minimum=args.think_minimum,
        think_tag=args.think_tag, compiled=args.compile, engine=engine,
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
    params = sampling_params(params, config)
    policy = (params, config, tokenizer, system, Engine())
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
