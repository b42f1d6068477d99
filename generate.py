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
import math
import re
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

import model
from attention import Slots, decode_attention, has_varlen, slot_decode
from engine import (
    Batch,
    Engine,
    graph_step,
    new_store,
    prepare,
    sampling_params,
    seat,
    seat_in_slots,
    steps_left,
)
from launch import (
    Parser,
    add_device_flags,
    at_least,
    between,
    compute_dtype,
    find_device,
    printable,
    run_main,
    say_once,
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
    add("--compile", action="store_true", help="torch.compile a GPU's decode step (a minute, once)")


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--adapter", help="directory of a LoRA adapter (PEFT's format) for the model")
    add("--prompt", help="what to ask; without it, an interactive chat")
    add("--system", help="the system turn; default: the model's own")
    add("--hide-thinking", action="store_true", help="show only what stands outside the thought")
    add("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    add("--think-budget", type=at_least(0), default=0, help="close a longer thought; 0: never")
    add("--think-minimum", type=at_least(0), default=0,
        help='tokens before which a closed thought is reopened with "Wait"')
    add("--repetition", type=at_least(0), default=0,
        help="stop when so many last tokens repeat one phrase; 0: never")
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


# ------------------------------------------------------------ stopping, and thinking budgets


class Sampling(NamedTuple):
    """What is asked of every completion, as `generate` documents it."""
    stop_tokens: frozenset
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple = ()
    tokenizer: Tokenizer | None = None
    repetition: int = 0
    think_budget: int = 0
    think_minimum: int = 0
    think_tag: str = "think"

    @property
    def bounds_thinking(self):
        return bool(self.think_budget or self.think_minimum)

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
    thought_closed: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # indices of those that were not drawn
    queue: list[int] = field(default_factory=list)  # tokens to put next
    draws: int = 0


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


# ------------------------------------------------------------ decode


def decode_step(params, config, cache, temperature, top_p, top_k, forced, state):
    """Feed each row's last token, draw the next: tokens, logprobs [B]. Writes `state` and cache.

    cache: Slots, or what decode_attention needs. forced: whether `state` may force a token.
    """
    if isinstance(cache, Slots):
        attend_fn = slot_decode(cache, state.positions)
    else:
        attend_fn = decode_attention(*cache, state.positions)
    tokens, positions = state.tokens[:, None], state.positions[:, None]  # [B, 1]
    hidden = model.hidden_states(params, config, tokens, positions, attend_fn)
    logits = model.lm_head(hidden[:, 0], model.head_weight(params))  # [B, V]
    tokens, logprobs = sample_tokens(logits, uniform(state.keys, state.draws), temperature, top_p,
                                     top_k, state.forced if forced else None)
    state.tokens.copy_(tokens)
    state.positions.add_(1)
    state.draws.add_(1)
    return tokens, logprobs


def decode(step_fn, state, rows, steps, sampling):
    """(tokens [B], logprobs [B]) of each of at most `steps` steps."""
    if sampling.bounds_thinking:
        next_tokens = [-1] * len(state.tokens)
        for row, at in rows.items():
            next_tokens[at] = row.queue[0] if row.queue else -1
        state.forced.copy_(torch.tensor(next_tokens))
    drawn = []
    for _ in range(steps):
        drawn.append(step_fn(state))
        tokens, _ = drawn[-1]
        # on a CPU, looking for stop tokens is free
        if tokens.device.type == "cpu" and not sampling.stop_tokens.isdisjoint(tokens.tolist()):
            break
    return drawn


def harvest(rows, drawn, sampling, on_token):
    """Append the drawn tokens to their rows, and take out those that end.

    drawn: (tokens [B], logprobs [B]) of each step. Returns (ended, num_tokens, reopened): what
    on_step is told, and whether a thought was reopened, which leaves a row shorter than what the
    cache holds of it.
    """
    tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]
    ended, num_tokens, reopened = [], 0, False
    for row, at in list(rows.items()):
        ends = (n for n, token in enumerate(tokens[at], 1) if token in sampling.stop_tokens)
        end = min(next(ends, len(drawn)), row.limit - len(row.tokens))
        if row.queue:
            row.forced.append(len(row.tokens))
            row.queue.pop(0)
        row.tokens += tokens[at][:end]
        row.logprobs += logprobs[at][:end]
        row.draws += end
        if math.isnan(sum(logprobs[at][:end])):
            raise ValueError("the model's log-probabilities are not finite: its weights are "
                             "damaged, or a training run has ruined them; use another checkpoint")
        length = len(row.tokens)
        finish = finish_reason(row, sampling)
        reopened |= len(row.tokens) < length
        num_tokens += end + len(row.tokens) - length
        if on_token:
            on_token(row.prompt, row.sample, row.tokens)
        if finish:
            completion = Completion(row.tokens, row.logprobs, finish, row.forced)
            ended.append((row.prompt, row.sample, completion))
            del rows[row]
    return ended, num_tokens, reopened


# ------------------------------------------------------------ generate


def check_request(config, prompts, sampling, **counts):
    """Raises ValueError for a setting out of range, or a prompt that cannot be continued."""
    counts |= {"temperature": sampling.temperature, "top_k": sampling.top_k}
    for name, value in counts.items():
        least = 0 if name in ("temperature", "top_k") else 1
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected above 0 and at most 1")
    if (sampling.stop_strings or sampling.bounds_thinking) and sampling.tokenizer is None:
        raise ValueError("stop strings and bounds on thinking need the tokenizer")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, expected at least 1, and less "
                             f"than the context of {config.max_context}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of "
                             f"{config.vocab_size}")


def new_rows(config, prompts, limits, seed, seeds, sampling):
    """A Row for every sample of every prompt: [prompt][sample]."""
    rows = []
    for p, prompt in enumerate(prompts):
        thought_begin = None
        if sampling.bounds_thinking:
            tail, tag = sampling.text(prompt[-32:]), f"{sampling.think_tag}>"
            thought_begin = 0 if tail.rfind("<" + tag) > tail.rfind("</" + tag) else None
        held = len(prompt) - 1  # rows feed the last token themselves: only decode makes logits
        rows.append([])
        for sample, limit in enumerate(limits[p]):
            key = row_key(seed, p if seeds is None else seeds[p], sample)
            limit = min(limit, config.max_context - len(prompt))
            rows[-1].append(Row(p, sample, key, limit, prompt[-1], held, thought_begin))
    return rows


def new_batch(params, config, rows, waiting, max_batch, cache_gib, engine):
    """The batch in which `waiting` ones of all `rows` decode: an Engine where a GPU has one."""
    like = params["model.norm.weight"]
    pair = like.element_size() + (like.element_size() if like.is_cuda else 4)  # a key and a value
    width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    budget = cache_gib * 2**30 / (width * pair)  # slots
    if has_varlen(like.device, like.dtype):
        engine = engine or Engine()
        longest = max(row.held + 1 + row.limit for row in chain(*rows))
        prepare(engine, params, config, min(max_batch, len(waiting)), longest, budget)
        return engine
    if like.device.type != "cpu":
        say_once(f"{like.device.type} in {like.dtype}: the sampler takes the plain path, which is "
                 "slower; CUDA graphs need bfloat16 and a card from sm80 on")
    return Batch(new_store(config, like), new_store(config, like), budget)


def clock(tensor):
    """Seconds, once a GPU has finished, so that times can be told apart."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, stop_tokens=(), seed=0,
             seeds=None, max_batch=64, cache_gib=math.inf, chunk=None, compiled=False, engine=None,
             on_token=None, on_step=None, on_done=None, first=None, stats=None, **settings):
    """`num_samples` completions of each prompt, lists of token ids: -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, how much it has used): what it says
    depends neither on who shares its batch nor on the batch size, but for a rounding that moves a
    draw across the very edge of two tokens.
    params: a checkpoint's tensors, with or without an adapter, or sampling_params of them.
    max_new_tokens: an int, or one for each [prompt][sample]; the context's end is a limit, too.
    seeds: an int for each prompt; default its index.
    settings: the others of Sampling, with their defaults:
        stop_strings: need the tokenizer, as do think_...; the tokens that say them are kept.
        repetition: end a row whose last so many tokens repeat one phrase at least four times.
        think_budget, think_minimum: tokens after which a thought is closed, before which it is not.
    cache_gib: bound of the cache, as long as one row fits; the rows beyond it wait.
    chunk: tokens of prompts that go through the layers at once; a longer prompt goes alone.
    compiled: torch.compile the decode step of a GPU's engine; it takes a minute, once.
    engine: an Engine, whose cache and graphs a GPU uses again while the weights stay in place.
    on_token(prompt, sample, tokens): called with a row's tokens so far.
    on_step(ended, num_tokens): called every few steps with the [(prompt, sample, Completion), ...]
    that have ended since, and the number of tokens drawn.
    on_done(prompt, completions): called when all samples of a prompt have ended. It may return the
    index of a prompt that waits for that, which joins the queue: of those beyond the `first` ones.
    stats: a dict that is given steps, cache_gib (peak), prefill_s, capture_s and decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [[max_new_tokens] * num_samples for _ in prompts]
    sampling = Sampling(frozenset(stop_tokens), **settings)
    check_request(config, prompts, sampling, num_samples=num_samples, max_batch=max_batch,
                  max_new_tokens=min(chain(*limits), default=1))
    stats = {} if stats is None else stats
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "capture_s": 0.0, "decode_s": 0.0}
    results = [[None] * num_samples for _ in prompts]
    rows = new_rows(config, prompts, limits, seed, seeds, sampling)
    # long prompts first: neighbours are alike
    waiting = deque(chain(*sorted(rows[:first], key=lambda samples: -samples[0].held)))
    if not waiting:
        return results

    params = sampling_params(params, config)
    like = params["model.norm.weight"]
    batch = new_batch(params, config, rows, waiting, max_batch, cache_gib, engine)
    static = isinstance(batch, Engine)
    seat_fn = seat_in_slots if static else seat
    step_fn = decode_step
    if static and compiled:
        torch._dynamo.config.recompile_limit = 64  # for every size of the batch and settings
        step_fn = torch.compile(decode_step, dynamic=False)
    chunk = chunk or (16384 if static else 1024)
    # steps between two looks at what was drawn
    reads_text = sampling.stop_strings or sampling.repetition or sampling.bounds_thinking
    stride = 1 if on_token or reads_text else 16 if static else 8
    drawing = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.bounds_thinking)
    while waiting or batch.rows:
        begin = clock(like)
        state, cache = seat_fn(params, config, batch, waiting, prompts, max_batch, chunk)
        full = bool(waiting)  # all who had room are in
        step = functools.partial(step_fn, params, config, cache, *drawing)
        seated = clock(like)
        if static:
            state, step = graph_step(batch, state, drawing, step)
        ready = clock(like)
        stats["prefill_s"] += seated - begin
        stats["capture_s"] += ready - seated
        held = sum(tensor.nbytes for layer in batch.layers for tensor in layer)
        stats["cache_gib"] = max(stats["cache_gib"], held / 2**30)
        changed = False
        while not changed and (left := steps_left(batch)):
            drawn = decode(step, state, batch.rows, min(stride, left), sampling)
            stats["steps"] += len(drawn)
            ended, num_tokens, reopened = harvest(batch.rows, drawn, sampling, on_token)
            for p, sample, completion in ended:
                results[p][sample] = completion
                further = on_done(p, results[p]) if on_done and None not in results[p] else None
                waiting.extend([] if further is None else rows[further])
            if on_step:
                on_step(ended, num_tokens)
            # several prompts are prefilled at once, and a smaller batch takes a copy of the cache
            places = B = len(state.tokens)
            if waiting:
                places = min(B, max_batch) if full else max_batch
            free = places - len(batch.rows)
            sparse = free >= max(1, B // (16 if waiting else 2 if static else 4))
            changed = reopened or sparse
        stats["decode_s"] += clock(like) - ready
    return results


# ------------------------------------------------------------ the command line


def completion_text(tokenizer, completion, ends, stop=()):
    """What a completion says, without its end token, and up to the first of the stop strings."""
    tokens = [token for token in completion.tokens if token not in ends]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return text[:min((i for i in map(text.find, stop) if i >= 0), default=len(text))]


def text_streamer(tokenizer, ends, write, think_tag="think", hide=False, dim=True):
    """show(tokens, last): writes what is new of a completion's text, its thought dim or hidden."""
    tags = f"<{think_tag}>", f"</{think_tag}>"
    block = re.compile(rf"({tags[0]}.*?(?:{tags[1]}|\Z))", re.DOTALL)
    shown = 0

    def show(tokens, last=False):
        nonlocal shown
        kept = [token for token in tokens if token not in ends]
        text = tokenizer.decode(kept, skip_special_tokens=False)
        if not last:  # keep back what may become a tag, or the rest of a character
            starts = (tag[:n] for tag in tags for n in range(len(tag)) if text.endswith(tag[:n]))
            text = text[:len(text) - max(map(len, starts))].rstrip("\N{REPLACEMENT CHARACTER}")
        at = 0
        for i, part in enumerate(block.split(text)):  # every other one is a thought
            new = printable(part[max(0, shown - at):])
            at += len(part)
            if not (i % 2 and hide):
                write(f"\033[2m{new}\033[0m" if new and i % 2 and dim else new)
        shown = max(shown, at)

    return show


def reply(params, config, tokenizer, system, engine, messages, args):
    """The conversation with the answer to its last question, which is printed as it comes.

    The oldest questions and answers go where the context does not hold them.
    Raises ValueError when the question alone fills it.
    """
    room = config.max_context - min(args.max_new_tokens, config.max_context // 2)
    kept = messages
    prompt = model.encode_chat(tokenizer, kept, system=system)
    while len(prompt) > room and len(kept) > 1:
        kept = kept[2:]
        prompt = model.encode_chat(tokenizer, kept, system=system)
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
        print(f"(the context of {config.max_context} tokens is full: the "
              f"{len(messages) - len(kept)} oldest turns are forgotten)")
    return [*kept, {"role": "assistant", "content": completion_text(tokenizer, answer, ends)}]


def main(args):
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
