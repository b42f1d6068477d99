"""What the sampler runs on: its form of the weights, and the rows that decode together.

There are two kinds of batch, and `generate` goes through the same steps with either: choose the
rows that run, bring their prompts into the cache (`seat`, `seat_in_slots`), decode.

    Batch     runs everywhere: stores of keys and values that grow and shrink with their rows; the
              samples of a prompt share its keys
    Engine    where FlashAttention has a kernel for texts of different lengths: slots allotted once,
              and a CUDA graph for each power of two of rows, kept from call to call

Admitting rows: Orca, OSDI 2022. Shared prompts: Hydragen, arXiv:2402.05099.
"""

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch

import model
from attention import Layout, Slots, power_of_two

# ------------------------------------------------------------ weights


def sampling_params(params, config, device=None, out=None):
    """The form of the weights that `generate` runs on, a new dict; make it anew after an update.

    Adapters are merged. On a CPU, matrices are packed for oneDNN, whose products are the same to
    the last bit for (almost) any number of rows. Where weights are copied anyway, layers of one
    input are joined (model.FUSED). Tensors that need no change are shared with `params`, and a form
    that is packed already is returned as it is.
    out: an earlier form, which is overwritten in place, so that CUDA graphs may go on reading it.
    """
    if model.head_weight(params).is_mkldnn:
        return params
    like = params["model.norm.weight"]
    device = torch.device(device or like.device)
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
        weight = weight.to(device, like.dtype)
        if packed and weight.dim() == 2 and name != "model.embed_tokens.weight":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        elif out and out[name].data_ptr() != weight.data_ptr():
            weight = out[name].copy_(weight)
        form[name] = weight
    return form


def joined_sources(sources, config):
    """{name: [itself]} with the FUSED layers under one name: {joined name: their names}."""
    joined = dict(sources)
    for layer in range(config.num_hidden_layers):
        for part, names in model.FUSED.items():
            pre = f"model.layers.{layer}.{part}"
            for kind in (".weight", ".bias"):
                found = [pre + name + kind for name in names]
                if found[0] in joined:  # the MLP has no biases
                    joined[pre + "+".join(names) + kind] = [joined.pop(name)[0] for name in found]
    return joined


# ------------------------------------------------------------ of both kinds of batch


class State(NamedTuple):
    """What a decode step reads and moves on, as tensors, so that no step waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, the next to be fed
    positions: torch.Tensor  # [B] where in its text it stands
    keys: torch.Tensor  # [B] of the noise
    draws: torch.Tensor  # [B] how many it has used
    forced: torch.Tensor  # [B] the token to put next, or -1


def batch_state(rows, B, device):
    """The State of rows in B places; a place without a row holds zeros."""
    columns = [[0] * B for _ in range(5)]
    for row, at in rows.items():
        last = row.tokens[-1] if row.tokens else row.first
        values = (last, row.held + len(row.tokens), row.key, row.draws, -1)  # `decode` forces
        for column, value in zip(columns, values):
            column[at] = value
    return State(*torch.tensor(columns).to(device))


def prefill(params, config, layers, prompts, begins, chunk):
    """Write the keys and values of prompts into the cache, about `chunk` tokens at a time.

    layers: [keys, values] of each layer, [slots, K, head_dim] each. begins: {prompt: [the first
    slot of each of its copies]}.
    """
    device = layers[0][0].device
    todo = [p for p in begins if len(prompts[p]) > 1]  # rows feed the last token themselves
    while todo:
        now = [todo.pop()]
        while todo and sum(len(prompts[p]) for p in [*now, todo[-1]]) <= chunk:
            now.append(todo.pop())
        tokens, sources, slots = [], [], []
        for p in now:
            n = len(prompts[p]) - 1
            for begin in begins[p]:
                sources += range(len(tokens), len(tokens) + n)
                slots += range(begin, begin + n)
            tokens += prompts[p][:-1]
        groups = [(0, [len(prompts[p]) - 1 for p in now])]
        tokens, sources, slots = (
            torch.tensor(column, device=device) for column in (tokens, sources, slots))
        model.packed_hidden_states(params, config, tokens, groups, store=(layers, sources, slots))


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


def schedule(batch, waiting, max_batch):
    """The rows to run: those that do, and waiting ones while the budget holds all they may say."""
    running = list(batch.rows)
    while waiting and len(running) < max_batch:
        rows = [*running, waiting[0]]
        prompts = len({row.prompt for row in rows})
        longest = max(row.held for row in rows), max(row.limit for row in rows)
        if running and cache_slots(len(rows), prompts, *longest, static=False) > batch.budget:
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


def batch_layout(batch):
    """The Layout of a batch; rows of the stores without an owner hold zeros."""
    B = batch.own.layers[0][0].shape[1]
    K, N, P, _ = batch.prompts.layers[0][0].shape
    held, prompt_lengths = [0] * B, [0] * N
    groups = [[] for _ in range(N)]  # the rows of each prompt
    for row, at in sorted(batch.rows.items(), key=lambda item: item[1]):
        prompt = batch.prompts.rows[row.prompt]
        held[at] = prompt_lengths[prompt] = row.held
        groups[prompt].append(at)
    g = max(map(len, groups))
    places = [0] * B
    for prompt, group in enumerate(groups):
        for i, at in enumerate(group):
            places[at] = prompt * g + i
    members = [group + [0] * (g - len(group)) for group in groups]
    if sum(members, []) == list(range(B)):  # side by side: nothing need be gathered
        places = []
    ended = torch.arange(P) >= torch.tensor(prompt_lengths * K)[:, None, None]  # [K * N, 1, P]
    device = batch.own.layers[0][0].device
    return Layout(*(torch.as_tensor(column).to(device)
                    for column in (held, ended, members, places)))


def seat(params, config, batch, waiting, prompts, max_batch, chunk):
    """Choose the rows that run and bring their prompts into the cache: (their State, the cache)."""
    running = schedule(batch, waiting, max_batch)
    allocate(batch.own, running, max(len(row.tokens) for row in running))
    owners = dict.fromkeys(row.prompt for row in running)
    fresh = allocate(batch.prompts, owners, max(row.held for row in running))
    slots = batch.prompts.layers[0][0].shape[2]
    begins = {prompt: [batch.prompts.rows[prompt] * slots] for prompt in fresh}
    layers = [[held.flatten(1, 2).transpose(0, 1) for held in layer]
              for layer in batch.prompts.layers]  # [rows * slots, K, head_dim] each
    prefill(params, config, layers, prompts, begins, chunk)
    keys = batch.own.layers[0][0]
    state = batch_state(batch.rows, keys.shape[1], keys.device)
    return state, (batch.own.layers, batch.prompts.layers, batch_layout(batch))


# ------------------------------------------------------------ the static batch: slots that stay


@dataclass
class Engine:
    """What a GPU keeps from one call of `generate` to the next; none of it moves in memory.

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


def static_slots(length):
    """Slots of a place for rows of this length: few sizes, so that a cache fits the next call."""
    return -(-length // 128) * 128


def prepare(engine, params, config, rows, length, budget):
    """Give the engine a cache for so many rows of `length` tokens, or what `budget` slots allow.

    A cache that is large enough is kept, and the graphs as long as the cache and the weights are.
    One row is always allowed.
    """
    engine.rows.clear()
    size, rows = static_slots(length), power_of_two(rows)
    while rows > 1 and rows * size > budget:
        rows //= 2
    weights = tuple(tensor.data_ptr() for tensor in params.values())
    fits = engine.cache and engine.cache.size >= size and engine.places >= rows
    if not fits:
        if engine.cache:
            larger = max(size, engine.cache.size), max(rows, engine.places)
            if math.prod(larger) <= budget:  # it serves this call, and those like the last one
                size, rows = larger
            engine.cache = None  # before the next one is allotted
        like = params["model.norm.weight"]
        shape = (rows * size, config.num_key_value_heads, config.head_dim)
        engine.cache = Slots([[like.new_zeros(shape), like.new_zeros(shape)]
                              for _ in range(config.num_hidden_layers)], size)
    if not fits or weights != engine.weights:
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
        for cached in chain(*engine.layers):
            cached = cached.unflatten(0, (-1, engine.cache.size))
            cached.index_copy_(0, new, cached.index_select(0, old))
    engine.rows.update((row, free.pop()) for row in admitted)
    return B, admitted


def seat_in_slots(params, config, engine, waiting, prompts, max_batch, chunk):
    """As `seat`, for the static batch."""
    B, admitted = take_places(engine, waiting, min(max_batch, engine.places))
    begins = {}
    for row in admitted:
        begins.setdefault(row.prompt, []).append(engine.rows[row] * engine.cache.size)
    prefill(params, config, engine.layers, prompts, begins, chunk)
    return batch_state(engine.rows, B, engine.layers[0][0].device), engine.cache


# ------------------------------------------------------------ CUDA graphs


def graph_step(engine, state, settings, step_fn):
    """(the state that the graph of step_fn(state) reads, a function that replays the graph).

    It is captured if it is not there.
    """
    key = len(state.tokens), settings
    if key not in engine.graphs:
        stream = engine.stream = engine.stream or torch.cuda.Stream()  # each would pin a workspace
        held = State(*(tensor.clone() for tensor in state))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they need
            step_fn(held)
        torch.cuda.current_stream().wait_stream(stream)
        pools = [graph.pool() for graph, _, _ in engine.graphs.values()]  # one for all
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pools[0] if pools else None, stream=stream):
            out = step_fn(held)
        engine.graphs[key] = graph, held, out
    graph, held, out = engine.graphs[key]
    for tensor, value in zip(held, state):
        tensor.copy_(value)

    def replay(state):
        graph.replay()
        return [tensor.clone() for tensor in out]

    return held, replay


def steps_left(batch):
    """Steps until a row has to end or needs more slots; for an Engine, until the last row ends."""
    room = [row.limit - len(row.tokens) for row in batch.rows]
    if isinstance(batch, Engine):
        return max(room, default=0)
    slots = batch.own.layers[0][0].shape[2]
    return min([slots - len(row.tokens) for row in batch.rows] + room, default=0)
