"""The sampling engine: batched, cached, and with the log-probability of every token that it draws.

    python generate.py --prompt "What is 3 + 4 * 5?"             # the embedded tiny model
    python generate.py --model qwen2.5-1.5b-instruct             # a chat; Ctrl-D ends it
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --think-budget 200

    answers = generate(params, config, prompts, num_samples=8, max_new_tokens=512,
                       stop_tokens=config.eos_token_id)
    answers[prompt][sample].tokens, .logprobs, .finish

A prompt is computed once, and its keys and values are held once: its samples attend to them together,
and each to its own tokens (Hydragen, arXiv:2402.05099). Rows that end leave the batch, and waiting ones
take their places (Orca, OSDI 2022). The layers are `model.block`; a GPU replays a step as a CUDA graph.
Bounds on thinking: s1, arXiv:2501.19393.
"""

import argparse
import hashlib
import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from attention import Layout, decode_attention, padded_length, prefill_attention
from model import encode_chat, encode_text, end_tokens, head_weight, hidden_states, lm_head
from model import load_config, load_params, load_system_prompt, load_tokenizer, merged_weight, resolve_model
from optim import HelpFormatter, add_device_flags, at_least, between, compute_dtype, find_device


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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
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
    logprobs: list[float]  # at the sampling temperature, before top-p and top-k cut the distribution
    finish: str  # "stop" | "length" | "repetition"
    forced: list[int] = []  # indices of tokens that a thinking budget put there: not to be trained on


# ------------------------------------------------------------ drawing a token


def mix(x):
    """The finaliser of splitmix64: every bit of the result depends on every bit of x, int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        unsigned = (x >> shift) & ((1 << (64 - shift)) - 1)  # >> carries the sign along
        x = (x ^ unsigned) * (factor - 2**64 if factor > 1 else 1)  # int64 wraps, as it should
    return x


def uniform(keys, draws):
    """Splitmix64, which has no state: float32 in [0, 1) for each pair of keys and draws, int64 [B]."""
    return (mix(keys + (draws + 1) * (0x9E3779B97F4A7C15 - 2**64)) >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int64 from which all the noise of one completion derives."""
    digest = hashlib.blake2b(f"{seed} {prompt_seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def inverse_cdf(weights, noise):
    """The index at which the cumulative sum passes the noise: [B, V], [B, 1] in [0, 1) -> [B, 1].

    A large vocabulary is searched in two levels, blocks of 64 and within one.
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
    # rounding may put the point just outside its block; a token of weight zero must not be drawn
    point = point.clamp_(min=0).minimum(inner[:, -1:] * (1 - 2**-24))
    return which * width + torch.searchsorted(inner, point, right=True)


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
    return ids.gather(1, torch.searchsorted(cdf, noise * cdf[:, -1:], right=True))


# ------------------------------------------------------------ weights


def sampling_params(params, config, dtype=None, device=None, packed=None):
    """The form of the weights that `generate` runs on: a new dict under the same names.

    Adapters are merged. On a CPU matrices are packed for oneDNN, whose products are the same to the last
    bit for (almost) any number of rows; `packed` False keeps them. What has its form already is shared
    with `params`, so that this costs nothing the second time. Call it again after an update.
    """
    like = params["model.norm.weight"]
    dtype = dtype or like.dtype
    device = torch.device(device or like.device)
    if packed is None:
        packed = device.type == "cpu" and torch.backends.mkldnn.is_available()

    def pack(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)

    form = {}
    for name, weight in params.items():
        if ".lora_" in name or weight.is_mkldnn:
            continue
        weight = merged_weight(params, name).detach().to(device, dtype)
        matrix = weight.dim() == 2 and name != "model.embed_tokens.weight"
        form[name] = pack(weight) if packed and matrix else weight
    form |= {name: weight for name, weight in params.items() if weight.is_mkldnn}
    if packed and "lm_head.weight" not in form:  # a tied head needs a form of its own
        form["lm_head.weight"] = pack(form["model.embed_tokens.weight"])
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
    prompt: int = -1
    sample: int = -1
    key: int = 0  # of its noise
    limit: int = 0  # of its tokens
    first: int = 0  # the last token of its prompt, which is the first that it feeds
    shared: int = 0  # tokens of its prompt in the shared part of the cache
    private: int = 0  # tokens of its prompt in its own part
    thought_begin: int | None = None  # how many tokens it had when its thinking block opened
    thought_closed: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # indices of those that were not drawn
    queue: list[int] = field(default_factory=list)  # tokens to put next
    draws: int = 0

    @property
    def length(self):
        """Slots that it holds in its own part of the cache."""
        return self.private + len(self.tokens)

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
    """Keep a thought between its minimum and its budget, by queueing tokens that are to come next."""
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
            row.queue = encode_text(sampling.tokenizer, line_break + closing + "\n")
    elif spent < sampling.think_minimum and not row.queue and len(row.tokens) - 1 not in row.forced:
        thought = sampling.text(row.tokens[row.thought_begin:]).partition(closing)[0]
        while len(sampling.text(row.tokens[row.thought_begin:])) > len(thought):
            row.tokens.pop()  # the tag is taken back, in the cache, too
            row.logprobs.pop()
        row.queue = encode_text(sampling.tokenizer, "Wait")
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


# ------------------------------------------------------------ the scheduler


def new_store(config, rows, slots, like):
    """Keys and values, zeros: for each layer [2, K, rows, slots, head_dim], like the tensor `like`.

    With the heads outside, rows of one prompt that stand side by side are one product with its keys.
    On a CPU a slot takes no memory before it is written.
    """
    shape = (2, config.num_key_value_heads, rows, slots, config.head_dim)
    return [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]


@dataclass
class Batch:
    """The rows that decode together, and what they have cached."""
    places: list  # the Row in each place of the batch, None in free ones
    own: list  # store of what each row has said, and of its prompt unless that is shared
    shared: list | None  # store of the prompts that running rows share
    prompts: dict  # prompt: its row in `shared`
    on_cpu: bool  # elsewhere shapes are few, for few CUDA graphs
    graphs: dict = field(default_factory=dict)  # of the decode step, while the stores stay in place

    @property
    def running(self):
        return [row for row in self.places if row]

    def padded_rows(self, n):
        return n if self.on_cpu else 1 << max(0, n - 1).bit_length()

    def padded_slots(self, length, store):
        """Slots to attend to for rows of this length, with room for one more token at least."""
        padded = padded_length(length + 1) if self.on_cpu else -(-(length + 1) // 256) * 256
        return min(padded, store[0].shape[3])

    def slots_needed(self, rows):
        """Slots that `rows` and their prompts take."""
        longest = max(row.length for row in rows)
        needed = self.padded_rows(len(rows)) * self.padded_slots(longest, self.own)
        if self.shared:
            longest = max(row.shared for row in rows)
            prompts = self.padded_rows(len({row.prompt for row in rows}))
            needed += prompts * self.padded_slots(longest, self.shared)
        return needed


def resize_store(batch, store, rows, kept, length):
    """Make it `rows` rows, in place: the rows `kept` first, `length` slots of each. Layer by layer."""
    batch.graphs.clear()
    for layer, old in enumerate(store):
        store[layer] = old.new_zeros(*old.shape[:2], rows, *old.shape[3:])
        store[layer][:, :, :len(kept), :length] = old[:, :, kept, :length]


def cache_slots(rows, group, prompt, completion, on_cpu):
    """Slots of the cache at most, for `rows` rows of `group` to a prompt: what a plan of memory needs."""
    batch = Batch([], None, None, {}, on_cpu)
    prompts = batch.padded_rows(-(-rows // group))
    return batch.padded_rows(rows) * (completion + 1) + prompts * prompt


def schedule(batch, waiting, max_batch, budget):
    """Preempt rows while the cache needs over `budget` slots, admit waiting ones: those that enter."""
    running = batch.running
    while len(running) > 1 and batch.slots_needed(running) > budget:
        youngest = min(running, key=lambda row: len(row.tokens))
        running.remove(youngest)
        batch.places[batch.places.index(youngest)] = None
        waiting.appendleft(youngest.restarted())
    entering = []
    while waiting and len(running) < max_batch:
        if running and batch.slots_needed([*running, waiting[0]]) > budget:
            break
        entering.append(waiting.popleft())
        running.append(entering[-1])
    return entering


def misfit(needed, held):
    return needed > held or needed <= 0.75 * held


def allocate(batch, entering):
    """Give the entering rows places, and their prompts rows of the store: [(prompt, row), ...] to fill."""
    running = batch.running
    rows = batch.padded_rows(len(running) + len(entering))
    if misfit(rows, len(batch.places)):
        kept = [place for place, row in enumerate(batch.places) if row]
        longest = max((row.length for row in running), default=0)
        resize_store(batch, batch.own, rows, kept, longest)
        batch.places = running + [None] * (rows - len(running))
    for row in entering:
        batch.places[batch.places.index(None)] = row
    if not batch.shared:
        return [(row.prompt, batch.places.index(row)) for row in entering]
    prompts = list(dict.fromkeys(row.prompt for row in running + entering))
    batch.prompts = {prompt: at for prompt, at in batch.prompts.items() if prompt in prompts}
    rows = batch.padded_rows(len(prompts))
    if misfit(rows, batch.shared[0].shape[2]):
        longest = max(row.shared for row in running + entering)
        resize_store(batch, batch.shared, rows, list(batch.prompts.values()), longest)
        batch.prompts = {prompt: at for at, prompt in enumerate(batch.prompts)}
    free = sorted(set(range(batch.shared[0].shape[2])) - set(batch.prompts.values()))
    fresh = list(zip((prompt for prompt in prompts if prompt not in batch.prompts), free))
    batch.prompts.update(fresh)
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
    """The Layout of a batch; places without a row hold zeros, and what they draw is thrown away."""
    _, K, B, slots, _ = batch.own[0].shape
    N = batch.shared[0].shape[2] if batch.shared else 0
    lengths = torch.tensor([row.length if row else 0 for row in batch.places])
    groups = [[] for _ in range(N)]  # the places of each prompt's rows
    for place, row in enumerate(batch.places):
        if row and N:
            groups[batch.prompts[row.prompt]].append(place)
    held = torch.tensor([max((batch.places[i].shared for i in group), default=0) for group in groups])
    seen = batch.padded_slots(int(held.max()), batch.shared) if N else 0
    unseen = torch.arange(seen) >= held[:, None]  # [N, P]
    prompt_bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf).repeat(K, 1)[:, None]

    if N and B % N == 0 and all(i // (B // N) == at for at, group in enumerate(groups) for i in group):
        members, places = torch.arange(B).view(N, -1), []  # side by side: nothing need be gathered
    else:
        g = batch.padded_rows(max(map(len, groups), default=1))
        members = [group + [0] * (g - len(group)) for group in groups]
        places = [0] * B
        for at, group in enumerate(groups):
            for j, i in enumerate(group):
                places[i] = at * g + j
    next_slots = (torch.arange(2 * K * B).view(-1, B) * slots + lengths).flatten()
    columns = (next_slots, lengths, prompt_bias, members, places)
    return Layout(*(torch.as_tensor(column).to(batch.own[0].device) for column in columns))


def batch_state(batch, states):
    """The State of a batch's rows. states: {shapes: State}; a graph reads the one it was captured with."""
    rows = [row or Row() for row in batch.places]
    columns = [[row.tokens[-1] if row.tokens else row.first for row in rows],
               [row.shared + row.length for row in rows], [row.key for row in rows],
               [row.draws for row in rows], [-1] * len(rows)]
    device = batch.own[0].device
    now = State(*(torch.tensor(column, device=device) for column in columns), batch_layout(batch))
    state = states.setdefault(tuple(tensor.shape for tensor in now.tensors()), now)
    for tensor, value in zip(state.tensors(), now.tensors()):
        tensor.copy_(value)
    return state


def prefill(params, config, store, rows, prompts, chunk):
    """Write the keys and values of `prompts` into `rows` of the store, about `chunk` tokens at a time."""
    todo = sorted(((prompt, row) for prompt, row in zip(prompts, rows) if prompt),
                  key=lambda pair: -len(pair[0]))
    device = store[0].device
    while todo:
        longest = len(todo[0][0])
        width = min(padded_length(longest), chunk)
        padded = -(-longest // width) * width
        now, todo = todo[:chunk // width], todo[chunk // width:]
        tokens = torch.tensor([prompt + [0] * (padded - len(prompt)) for prompt, _ in now], device=device)
        at = torch.tensor([row for _, row in now], device=device)
        for begin in range(0, longest, width):
            part = tokens[:, begin:begin + width]
            positions = torch.arange(begin, begin + width, device=device).expand(part.shape)
            hidden_states(params, config, part, positions, prefill_attention(store, at, begin))


def decode_step(params, config, state, own, shared, seen, sampling):
    """Feed each row's last token, draw the next: tokens [B], logprobs [B]. Writes `state` and `own`.

    seen: how many of its own slots a row attends to.
    """
    attend_fn = decode_attention(own, shared, state.layout, seen)
    hidden = hidden_states(params, config, state.tokens[:, None], state.positions[:, None], attend_fn)
    logits = lm_head(hidden, head_weight(params))[:, 0]  # [B, V]
    forced = state.forced if sampling.bounds_thinking else None
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), sampling.temperature,
                                     sampling.top_p, sampling.top_k, forced)
    state.tokens.copy_(tokens)
    for counter in (state.positions, state.draws, state.layout.slots, state.layout.lengths):
        counter.add_(1)
    return tokens, logprobs


def captured(step_fn, state, graphs, shape):
    """step_fn(), on a GPU as a CUDA graph, captured once per shape: its tensors must stay in place."""
    if state.tokens.device.type != "cuda":
        return step_fn()
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
    running = batch.running
    longest = max(row.length for row in running)
    seen = batch.padded_slots(longest, batch.own)
    if sampling.bounds_thinking:
        next_tokens = [row.queue[0] if row and row.queue else -1 for row in batch.places]
        state.forced.copy_(torch.tensor(next_tokens))
    shape = (seen, *(tensor.shape for tensor in state.tensors()))

    def run_step():
        return step_fn(params, config, state, batch.own, batch.shared, seen, sampling)

    drawn = []
    for _ in range(min(stride, seen - longest, *(row.limit - len(row.tokens) for row in running))):
        drawn.append(captured(run_step, state, batch.graphs, shape))
        if batch.on_cpu and not sampling.stop_tokens.isdisjoint(drawn[-1][0].tolist()):
            break
    return drawn


def harvest(batch, drawn, sampling, results, on_token):
    """Hand the drawn tokens to their rows, and those that end to `results`.

    drawn: [(tokens [B], logprobs [B]), ...] of one step after another. Returns whether a thought was
    reopened: the row is then shorter than its cache.
    """
    tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]: waits
    reopened = False
    for place, row in enumerate(batch.places):
        if row is None:
            continue
        ends = (n for n, token in enumerate(tokens[place], 1) if token in sampling.stop_tokens)
        end = next(ends, len(drawn))
        row.extend(tokens[place][:end], logprobs[place][:end])
        length = row.length
        finish = finish_reason(row, sampling)
        reopened |= row.length < length
        if on_token:
            on_token(row.prompt, row.sample, row.tokens)
        if finish:
            results[row.prompt][row.sample] = Completion(row.tokens, row.logprobs, finish, row.forced)
            batch.places[place] = None
    return reopened


# ------------------------------------------------------------ generate


def check_request(config, prompts, limits, **settings):
    """Raises ValueError for a setting out of range, or a prompt that the model cannot go on from."""
    settings["max_new_tokens"] = min((n for row in limits for n in row), default=1)
    for name, value in settings.items():
        low = 0 if name in ("temperature", "top_p", "top_k") else 1
        if not low <= value < math.inf or (name == "top_p" and not 0 < value <= 1):
            expected = "above 0 and at most 1" if name == "top_p" else f"at least {low}"
            raise ValueError(f"{name} is {value}, expected {expected}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as <|endoftext|>")
        if len(prompt) >= config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which fill the context of "
                             f"{config.max_context}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of {config.vocab_size}")


def new_rows(config, prompts, limits, seed, seeds, shares, sampling):
    """A waiting Row for every sample of every prompt, long prompts first: neighbours are alike."""
    waiting = deque()
    for p in sorted(range(len(prompts)), key=lambda p: -len(prompts[p])):
        thought_begin = None
        if sampling.bounds_thinking:
            _, opening, since = sampling.text(prompts[p][-32:]).rpartition(f"<{sampling.think_tag}>")
            thought_begin = 0 if opening and f"</{sampling.think_tag}>" not in since else None
        held = len(prompts[p]) - 1  # rows feed the last token themselves: only decode makes logits
        shared, private = (held, 0) if shares else (0, held)
        for sample, limit in enumerate(limits[p]):
            key = row_key(seed, p if seeds is None else seeds[p], sample)
            limit = min(limit, config.max_context - len(prompts[p]))
            waiting.append(Row(p, sample, key, limit, prompts[p][-1], shared, private, thought_begin))
    return waiting


def new_batch(config, waiting, like):
    """A Batch without rows, whose stores have slots for the longest of those that wait."""
    slots = max(row.private + row.limit for row in waiting) + 1
    prompt_slots = max(row.shared for row in waiting)
    shared = new_store(config, 0, prompt_slots, like) if prompt_slots else None
    return Batch([], new_store(config, 0, slots, like), shared, {}, like.device.type == "cpu")


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0,
             top_k=0, stop_tokens=(), seed=0, max_batch=64, seeds=None, stop_strings=(),
             tokenizer=None, repetition=0, think_budget=0, think_minimum=0, think_tag="think",
             share_prompts=True, cache_gib=math.inf, chunk=2048, compile_backend=None, on_token=None,
             stats=None):
    """`num_samples` completions of each prompt, lists of token ids: -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, how much it has used): what it says depends
    neither on who shares its batch nor on the batch size, but for a rounding that moves a draw across
    the very edge of two tokens.
    params: a checkpoint's tensors, with or without an adapter, or sampling_params of them.
    max_new_tokens: an int, or one for each [prompt][sample]. The end of the context is a limit, too.
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
    limits = [[max_new_tokens] * num_samples if isinstance(max_new_tokens, int) else max_new_tokens[p]
              for p in range(len(prompts))]
    check_request(config, prompts, limits, num_samples=num_samples, temperature=temperature,
                  top_p=top_p, top_k=top_k, max_batch=max_batch, chunk=chunk)
    sampling = Sampling(temperature, top_p, top_k, frozenset(stop_tokens), tuple(stop_strings), tokenizer,
                        repetition, think_budget, think_minimum, think_tag)
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
    shares = share_prompts and num_samples > 1
    waiting = new_rows(config, prompts, limits, seed, seeds, shares, sampling)
    batch = new_batch(config, waiting, embedding)
    slot_gib = sum(layer.nbytes for layer in new_store(config, 1, 1, embedding)) / 2**30
    budget = cache_gib / slot_gib
    # steps between two looks at what was drawn; on a CPU, looking for stop tokens is free
    stride = 1 if on_token or sampling.reads_text else 8
    states = {}
    while waiting or batch.running:
        begin = time.perf_counter()
        fresh = allocate(batch, schedule(batch, waiting, max_batch, budget))
        prefill(params, config, batch.shared or batch.own, [at for _, at in fresh],
                [prompts[p][:-1] for p, _ in fresh], chunk)
        state = batch_state(batch, states)
        decoding = time.perf_counter()
        stats["prefill_s"] += decoding - begin
        changed = False
        while not changed and (batch.slots_needed(batch.running) <= budget or len(batch.running) == 1):
            held_gib = batch.slots_needed(batch.running) * slot_gib
            stats["cache_gib"] = max(stats["cache_gib"], held_gib)
            drawn = decode(params, config, batch, state, sampling, stride, step_fn)
            stats["steps"] += len(drawn)
            reopened = harvest(batch, drawn, sampling, results, on_token)
            # several prompts are prefilled at once, and a smaller batch takes a copy of the cache
            enough = max(1, len(batch.places) // (16 if waiting else 4))
            changed = reopened or batch.places.count(None) >= enough
        stats["decode_s"] += time.perf_counter() - decoding
    return results


# ------------------------------------------------------------ the command line


def completion_text(tokenizer, completion, ends, stop=()):
    """What a completion says, without its end token, and up to the first of the stop strings."""
    tokens = [token for token in completion.tokens if token not in ends]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return text[:min((i for i in map(text.find, stop) if i >= 0), default=len(text))]


def text_streamer(tokenizer, ends, write, think_tag="think", hide=False, dim=True):
    """show(tokens, last): writes what is new in a completion's text, its thought dimmed or hidden."""
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
    config, tokenizer, system = load_config(path), load_tokenizer(path), load_system_prompt(path)
    device = find_device(args.device)
    params = load_params(path, device, compute_dtype(args.dtype, device))
    params = sampling_params(params, config, packed=False if args.compile else None)
    ends = end_tokens(tokenizer, config)
    messages = []
    while True:
        try:
            question = args.prompt if args.prompt is not None else input("\n> ")
        except EOFError:
            return
        messages.append({"role": "user", "content": question})
        prompt = encode_chat(tokenizer, messages, system=args.system or system)
        if args.raw:
            prompt = tokenizer.encode(question, add_special_tokens=False).ids
        show = text_streamer(tokenizer, ends, lambda text: print(text, end="", flush=True),
                             args.think_tag, args.hide_thinking, sys.stdout.isatty())
        [[answer]] = generate(
            params, config, [prompt], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            top_p=args.top_p, top_k=args.top_k, stop_tokens=ends, seed=args.seed,
            seeds=[len(messages)], tokenizer=tokenizer, repetition=args.repetition,
            think_budget=args.think_budget, think_minimum=args.think_minimum,
            think_tag=args.think_tag, compile_backend="inductor" if args.compile else None,
            on_token=lambda prompt, sample, tokens: show(tokens))
        show(answer.tokens, last=True)
        print()
        if args.prompt is not None:
            return
        messages.append({"role": "assistant", "content": completion_text(tokenizer, answer, ends)})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
