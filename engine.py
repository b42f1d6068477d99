"""What the sampler runs on: its form of the weights, KV caches and CUDA graphs.

`generate` takes the same steps with either kind of batch: choose the rows to run and prefill their
prompts (`seat`, `seat_in_slots`), then decode.

    Batch     runs everywhere; its caches grow and shrink with the running rows, and all samples of
              a prompt share its keys and values
    Engine    needs FlashAttention's variable-length kernel; a fixed cache, and one CUDA graph for
              each power of two of rows, are kept from call to call

Continuous batching: Orca, OSDI 2022. Shared prompts: Hydragen, arXiv:2402.05099.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch

import model
from attention import Layout, Slots, mask_bias, power_of_two

# ------------------------------------------------------------ weights


def sampling_params(params, config, device=None, out=None):
    """The weights in the form that `generate` runs on, a new dict. Call again after an update.

    Adapters are merged. On a CPU, matrices are packed for oneDNN, whose products are bitwise equal
    for (almost) any number of rows. When weights are copied anyway, layers with the same input are
    fused (model.FUSED). Unchanged tensors are shared with `params`; weights that are packed already
    are returned as they are.
    out: an earlier result to overwrite in place, so that CUDA graphs can keep reading it.
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
        sources = fused_sources(sources, config)
    prepared = {}
    for name, parts in sources.items():  # one by one: never two copies of all weights
        parts = [model.merged_weight(params, part).detach() for part in parts]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        weight = weight.to(device, like.dtype)
        if packed and weight.dim() == 2 and name != "model.embed_tokens.weight":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        elif out and out[name].data_ptr() != weight.data_ptr():
            weight = out[name].copy_(weight)
        prepared[name] = weight
    return prepared


def fused_sources(sources, config):
    """{name: [name]} with model.FUSED layers replaced by {fused name: [names to concatenate]}."""
    fused = dict(sources)
    for layer in range(config.num_hidden_layers):
        for part, names in model.FUSED.items():
            pre = f"model.layers.{layer}.{part}"
            for kind in (".weight", ".bias"):
                found = [pre + name + kind for name in names]
                if found[0] in fused:  # the MLP has no biases
                    fused[pre + "+".join(names) + kind] = [fused.pop(name)[0] for name in found]
    return fused


# ------------------------------------------------------------ both kinds of batch


class State(NamedTuple):
    """What a decode step reads and updates: tensors only, so that no step waits for the host."""
    tokens: torch.Tensor  # [B] the last token of each row, to be fed next
    positions: torch.Tensor  # [B] its position
    keys: torch.Tensor  # [B] of the row's noise
    draws: torch.Tensor  # [B] noise values used
    forced: torch.Tensor  # [B] the token to force next, or -1


def batch_state(rows, B, device):
    """The State of rows ({row: its place}) in B places. Empty places hold zeros."""
    columns = [[0] * B for _ in range(5)]
    for row, place in rows.items():
        last = row.tokens[-1] if row.tokens else row.last_prompt_token
        values = (last, row.cached + len(row.tokens), row.key, row.draws, -1)  # as in State
        for column, value in zip(columns, values):
            column[place] = value
    return State(*torch.tensor(columns).to(device))


def admit(waiting, num_running, max_batch):
    """Remove rows from the queue until `max_batch` rows are running. Returns the removed rows."""
    return [waiting.popleft() for _ in range(min(max_batch - num_running, len(waiting)))]


def prefill(params, config, layers, prompts, first_slots, chunk):
    """Write the keys and values of prompts into the cache, about `chunk` tokens at a time.

    layers: [keys, values] of each layer, [slots, K, head_dim] each.
    first_slots: {index of a prompt: [first slot of each of its copies]}.
    """
    device = layers[0][0].device
    todo = [p for p in first_slots if len(prompts[p]) > 1]  # the last token is left to decoding
    while todo:
        selected = [todo.pop()]
        while todo and sum(len(prompts[p]) for p in [*selected, todo[-1]]) <= chunk:
            selected.append(todo.pop())
        tokens, sources, slots, lengths = [], [], [], []
        for p in selected:
            n = len(prompts[p]) - 1
            lengths.append(n)
            for first in first_slots[p]:
                sources += range(len(tokens), len(tokens) + n)
                slots += range(first, first + n)
            tokens += prompts[p][:-1]
        tokens, sources, slots = (
            torch.tensor(column, device=device) for column in (tokens, sources, slots))
        model.packed_hidden_states(params, config, tokens, [(0, lengths)],
                                   store=(layers, sources, slots))


# ------------------------------------------------------------ the plain batch: caches that grow


@dataclass
class Store:
    """A cache with one row for each owner. Owners are the running rows, or their prompts."""
    layers: list  # [keys, values] of each layer, [K, rows, slots, head_dim] each
    rows: dict  # {owner: its row}


def new_store(config, like):
    """An empty Store, with the device and dtype of the tensor `like`.

    Heads are the first dimension, so that neighbouring rows of a prompt share one product with its
    keys. On a CPU, keys are float32: it has no bfloat16 product with float32 results, and would
    convert all keys in every step.
    """
    key_dtype = like.dtype if like.is_cuda else torch.float32
    keys = like.new_zeros(config.num_key_value_heads, 0, 0, config.head_dim, dtype=key_dtype)
    layers = [[keys, keys.to(like.dtype)] for _ in range(config.num_hidden_layers)]
    return Store(layers, {})


@dataclass
class Batch:
    """The running rows, and the caches of their completions and of their prompts."""
    own: Store  # owners: the rows
    prompts: Store  # owners: indices of prompts

    @property
    def rows(self):
        return self.own.rows

    @property
    def layers(self):
        return self.own.layers + self.prompts.layers


def padded_slots(length):
    """Slots for a row of this length, with room to grow: a multiple of 32."""
    return -(-(length + 1 + length // 16) // 32) * 32


def cache_slots(rows, prompts, prompt, completion, static):
    """Slots for this many rows and prompts, of at most `completion` and `prompt` tokens each."""
    if static:
        return power_of_two(rows) * static_slots(prompt + completion)
    return rows * padded_slots(completion) + prompts * padded_slots(prompt)


def allocate(store, owners, length):
    """Give each owner a row for `length` tokens and drop all other rows. Returns the new owners.

    Layers are reallocated, one by one, if they are too small or more than a quarter too large.
    """
    store.rows = {owner: row for owner, row in store.rows.items() if owner in owners}
    rows, slots = len(owners), padded_slots(length)
    _, old_rows, old_slots, _ = store.layers[0][0].shape
    if not (0.75 * old_rows < rows <= old_rows and 0.75 * old_slots < slots <= old_slots):
        kept = list(store.rows.values())
        common = min(slots, old_slots)
        for layer in store.layers:
            for i, old in enumerate(layer):
                layer[i] = old.new_zeros(old.shape[0], rows, slots, old.shape[3])
                layer[i][:, :len(kept), :common] = old[:, kept, :common]
        store.rows = {owner: row for row, owner in enumerate(store.rows)}
    fresh = [owner for owner in owners if owner not in store.rows]
    free = sorted(set(range(store.layers[0][0].shape[1])) - set(store.rows.values()))
    store.rows.update(zip(fresh, free))
    return fresh


def batch_layout(batch):
    """The Layout of a batch. Rows of the stores without an owner hold zeros."""
    B = batch.own.layers[0][0].shape[1]
    K, N, P, _ = batch.prompts.layers[0][0].shape
    cached, prompt_lengths = [0] * B, [0] * N
    groups = [[] for _ in range(N)]  # the rows of each prompt
    for row, place in sorted(batch.rows.items(), key=lambda item: item[1]):
        prompt = batch.prompts.rows[row.prompt]
        cached[place] = prompt_lengths[prompt] = row.cached
        groups[prompt].append(place)
    g = max(map(len, groups))
    index = [0] * B
    for prompt, group in enumerate(groups):
        for i, place in enumerate(group):
            index[place] = prompt * g + i
    members = [group + [0] * (g - len(group)) for group in groups]
    if sum(members, []) == list(range(B)):  # in order already: no gather needed
        index = []
    bias = mask_bias(torch.arange(P) >= torch.tensor(prompt_lengths * K)[:, None, None])
    device = batch.own.layers[0][0].device
    return Layout(*(torch.as_tensor(column).to(device)
                    for column in (cached, bias, members, index)))


def seat(params, config, batch, waiting, prompts, max_batch, chunk):
    """Admit waiting rows and prefill their prompts: (State, arguments of decode_attention)."""
    running = [*batch.rows, *admit(waiting, len(batch.rows), max_batch)]
    allocate(batch.own, running, max(len(row.tokens) for row in running))
    owners = dict.fromkeys(row.prompt for row in running)
    fresh = allocate(batch.prompts, owners, max(row.cached for row in running))
    slots = batch.prompts.layers[0][0].shape[2]
    first_slots = {prompt: [batch.prompts.rows[prompt] * slots] for prompt in fresh}
    layers = [[cached.flatten(1, 2).transpose(0, 1) for cached in layer]
              for layer in batch.prompts.layers]  # [rows * slots, K, head_dim] each
    prefill(params, config, layers, prompts, first_slots, chunk)
    keys = batch.own.layers[0][0]
    state = batch_state(batch.rows, keys.shape[1], keys.device)
    return state, (batch.own.layers, batch.prompts.layers, batch_layout(batch))


# ------------------------------------------------------------ the static batch: a fixed cache


@dataclass
class Engine:
    """What a GPU keeps between calls of `generate`, at fixed addresses.

    The cache is divided into places of equal size. A row keeps its prompt and its completion in one
    place, among the first B = 1, 2, 4, ... of them. A step with B rows is captured once as a CUDA
    graph, then replayed.
    """
    cache: Slots | None = None
    rows: dict = field(default_factory=dict)  # {running row: its place}
    graphs: dict = field(default_factory=dict)  # {(B, settings): (graph, its State, its output)}
    weights: tuple = ()  # addresses of the tensors that the graphs read
    stream: Any = None  # for capturing
    params: dict | None = None  # sampling_params, for a caller that updates them in place

    @property
    def layers(self):
        return self.cache.layers

    @property
    def places(self):
        return len(self.layers[0][0]) // self.cache.size

    def release(self):
        """Free all memory. The next call allocates and captures again."""
        self.rows.clear()
        self.graphs.clear()
        self.cache = self.params = None


def static_slots(length):
    """Slots per place for rows of this length, in steps of 128 so that calls share a cache."""
    return -(-length // 128) * 128


def prepare(engine, params, config, rows, length):
    """Make sure that the engine can hold this many rows of `length` tokens, and remove all rows.

    A large enough cache is kept, and its graphs with it unless the weights have moved.
    """
    engine.rows.clear()
    size, rows = static_slots(length), power_of_two(rows)
    weights = tuple(tensor.data_ptr() for tensor in params.values())
    fits = engine.cache and engine.cache.size >= size and engine.places >= rows
    if not fits:
        if engine.cache:  # grow, never shrink: calls of two kinds may alternate
            size, rows = max(size, engine.cache.size), max(rows, engine.places)
            engine.cache = None  # free it before allocating the next
        like = params["model.norm.weight"]
        shape = (rows * size, config.num_key_value_heads, config.head_dim)
        engine.cache = Slots([[like.new_zeros(shape), like.new_zeros(shape)]
                              for _ in range(config.num_hidden_layers)], size)
    if not fits or weights != engine.weights:
        engine.graphs.clear()
    engine.weights = weights


def assign_places(engine, waiting, max_batch):
    """Admit waiting rows and move all rows into the first B places: (B, the new rows)."""
    admitted = admit(waiting, len(engine.rows), max_batch)
    B = power_of_two(len(engine.rows) + len(admitted))
    free = sorted(set(range(B)) - set(engine.rows.values()), reverse=True)
    moves = {}  # {old place: new place}
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
    """`seat` for the static batch: (State, Slots)."""
    B, admitted = assign_places(engine, waiting, max_batch)
    first_slots = {}
    for row in admitted:
        first_slots.setdefault(row.prompt, []).append(engine.rows[row] * engine.cache.size)
    prefill(params, config, engine.layers, prompts, first_slots, chunk)
    return batch_state(engine.rows, B, engine.layers[0][0].device), engine.cache


# ------------------------------------------------------------ CUDA graphs


def graph_step(engine, state, settings, step_fn):
    """Capture step_fn(state) as a CUDA graph, unless the engine has one for B and the settings.

    Returns (the graph's own State, now with the values of `state`; a function that replays it).
    """
    key = len(state.tokens), settings
    if key not in engine.graphs:
        stream = engine.stream = engine.stream or torch.cuda.Stream()  # each would pin a workspace
        graph_state = State(*(tensor.clone() for tensor in state))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: compile, and let libraries allocate
            step_fn(graph_state)
        torch.cuda.current_stream().wait_stream(stream)
        pools = [graph.pool() for graph, _, _ in engine.graphs.values()]  # all graphs share one
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pools[0] if pools else None, stream=stream):
            out = step_fn(graph_state)
        engine.graphs[key] = graph, graph_state, out
    graph, graph_state, out = engine.graphs[key]
    for tensor, value in zip(graph_state, state):
        tensor.copy_(value)

    def replay(state):
        graph.replay()
        return [tensor.clone() for tensor in out]

    return graph_state, replay


def steps_left(batch):
    """Steps until a row must end or needs more slots; for an Engine, until the last row ends."""
    room = [row.limit - len(row.tokens) for row in batch.rows]
    if isinstance(batch, Engine):
        return max(room, default=0)
    slots = batch.own.layers[0][0].shape[2]
    return min([slots - len(row.tokens) for row in batch.rows] + room, default=0)
