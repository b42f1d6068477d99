"""The sampling engine: batched, cached generation with the log-probability of every token.

    python generate.py --prompt "What is 3 + 4 * 5?"             # the embedded tiny model
    python generate.py --model qwen2.5-1.5b-instruct             # a chat; Ctrl-D quits
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --think-budget 200

    answers = generate(params, config, prompts, num_samples=8, max_new_tokens=512,
                       stop_tokens=config.eos_token_id)
    answers[prompt][sample].tokens, .logprobs, .finish

Each prompt is prefilled once for all its samples. Finished rows leave the batch and waiting rows
take their place (Orca, OSDI 2022). The layers are `model.block`. engine.py holds the KV caches and
CUDA graphs. Limits on thinking: s1, arXiv:2501.19393.
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
    """Add the sampling flags, with the calling script's defaults."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=at_least(0.0), default=temperature, help="0 is greedy")
    add("--top-p", type=between(1e-9, 1.0), default=top_p,
        help="sample from the most likely tokens holding this probability mass; 1: all")
    add("--top-k", type=at_least(0), default=0, help="sample from the k most likely tokens; 0: all")
    add("--max-new-tokens", type=at_least(1), default=max_new_tokens, help="limit per completion")
    add("--max-batch", type=at_least(1), default=64, help="maximum rows decoded at once")
    add("--think-tag", default="think", help="name of the thinking block: <think> ... </think>")
    add("--compile", action="store_true", help="torch.compile a GPU's decode step (a minute, once)")


def parse_args(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, qwen2.5-1.5b[-instruct], a hub id, or a directory")
    add("--adapter", help="directory of a LoRA adapter (PEFT format) for the model")
    add("--prompt", help="a single prompt; without it, an interactive chat")
    add("--system", help="system message; default: the model's own")
    add("--hide-thinking", action="store_true", help="show only the text outside thinking blocks")
    add("--raw", action="store_true", help="pass the prompt as it is, without the chat template")
    add("--think-budget", type=at_least(0), default=0,
        help="close a thinking block after this many tokens; 0: never")
    add("--think-minimum", type=at_least(0), default=0,
        help='reopen a thinking block closed before this many tokens, with "Wait"')
    add("--repetition", type=at_least(0), default=0,
        help="stop when this many tokens in a row repeat one phrase; 0: never")
    add("--seed", type=int, default=0)
    add_sampling_flags(p, temperature=0.7, top_p=0.8)
    add_device_flags(p)
    return p.parse_args(argv)


class Completion(NamedTuple):
    tokens: list[int]  # including the stop token, if one was drawn
    logprobs: list[float]  # at the sampling temperature, before top-p and top-k
    finish: str  # "stop" | "length" | "repetition"
    forced: list[int] = []  # indices of tokens forced by limits on thinking; not to be trained on


# ------------------------------------------------------------ drawing a token


def mix(x):
    """The splitmix64 finaliser on int64: every output bit depends on every input bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64),
                          (31, 1)):
        unsigned = (x >> shift) & ((1 << (64 - shift)) - 1)  # int64 >> copies the sign bit
        x = (x ^ unsigned) * factor  # int64 wraps, as intended
    return x


def uniform(keys, draws):
    """Stateless splitmix64: stream keys and draw counts, int64 [B] -> float32 [B] in [0, 1)."""
    bits = mix(keys + (draws + 1) * (0x9E3779B97F4A7C15 - 2**64))
    return (bits >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int64 key of one completion's noise."""
    digest = hashlib.blake2b(f"{seed} {prompt_seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def inverse_cdf(weights, noise):
    """Sample by inverting the CDF: weights [B, V], noise [B, 1] in [0, 1) -> indices [B, 1].

    Searches blocks of 64 first, then inside one: a cumulative sum over all of V is slow.
    """
    width = math.gcd(weights.shape[1], 64)
    blocks = weights.unflatten(1, (-1, width))
    cdf = blocks.sum(-1).cumsum(-1)  # [B, V / width]
    point = noise * cdf[:, -1:]
    block = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[1] - 1)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, width))[:, 0].cumsum(-1)  # [B, width]
    point = point - (cdf.gather(1, block) - inner[:, -1:])
    # rounding may move the point outside its block, onto a token of weight zero
    point = point.clamp_(min=0).minimum(inner[:, -1:] * (1 - 2**-24))
    index = torch.searchsorted(inner, point, right=True).clamp_(max=width - 1)  # for nan weights
    return block * width + index


def sample_tokens(logits, noise, temperature=1.0, top_p=1.0, top_k=0, forced=None):
    """Draw one token per row: logits [B, V] float32, noise [B] -> tokens [B], logprobs [B].

    Top-k is applied first, then top-p to what remains. Temperature 0 is greedy, and its
    log-probabilities are those at temperature 1. forced: [B] tokens to return instead, -1 to draw.
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
    if forced is not None:  # a forced token's probability may underflow; the drawn one's does not
        drawn = tokens
        tokens = torch.where(forced[:, None] < 0, drawn, forced[:, None])
        logprobs = logprobs + (logits.gather(1, tokens) - logits.gather(1, drawn))
    return tokens[:, 0], logprobs[:, 0]


def truncated_draw(probs, noise, top_p, top_k):
    """Draw with top-k, then top-p: probs [B, V], noise [B, 1] -> tokens [B, 1]."""
    # A nucleus rarely exceeds 1,024 tokens. A GPU sorts them all: it sorts fast, and checking
    # whether 1,024 are enough would stall it.
    few = min(top_k or (1024 if probs.device.type == "cpu" else probs.shape[1]), probs.shape[1])
    weights, ids = probs.topk(few)  # [B, few], in descending order
    if not top_k and few < probs.shape[1] and bool((weights.sum(-1) < top_p).any()):
        weights, ids = probs.sort(descending=True)
    if top_p < 1:
        mass_before = weights.cumsum(-1) - weights  # of the more likely tokens
        total = weights.sum(-1, keepdim=True) if top_k else 1
        weights = weights * (mass_before < top_p * total)
    cdf = weights.cumsum(-1)
    index = torch.searchsorted(cdf, noise * cdf[:, -1:], right=True)
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1))


# ------------------------------------------------------------ stopping, and limits on thinking


class Sampling(NamedTuple):
    """The settings of `generate` that apply to every completion; see its docstring."""
    stop_tokens: frozenset
    temperature: float
    top_p: float
    top_k: int
    stop_strings: tuple
    tokenizer: Tokenizer | None
    repetition: int
    think_budget: int
    think_minimum: int
    think_tag: str

    @property
    def limits_thinking(self):
        return bool(self.think_budget or self.think_minimum)

    def text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


@dataclass(eq=False)
class Row:
    """One completion in progress."""
    prompt: int  # index into the prompts
    sample: int
    key: int  # of its noise
    limit: int  # maximum number of tokens
    last_prompt_token: int  # the first to decode: only decode steps compute logits
    cached: int  # prompt tokens in the cache, all but the last
    thought_begin: int | None  # number of tokens when the thinking block opened
    thought_closed: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # indices of tokens that were not drawn
    queue: list[int] = field(default_factory=list)  # tokens to force next
    draws: int = 0  # noise values used


def is_loop(tokens, span):
    """Whether the last `span` tokens repeat one phrase at least four times."""
    tail = tokens[-span:]
    periods = range(1, span // 4 + 1)
    return len(tail) == span and any(tail[n:] == tail[:-n] for n in periods)


def steer_thinking(row, sampling):
    """Enforce the thinking budget and minimum, by queueing tokens to force."""
    opening, closing = f"<{sampling.think_tag}>", f"</{sampling.think_tag}>"
    if row.thought_begin is None:
        if opening in sampling.text(row.tokens[-len(opening):]):
            row.thought_begin = len(row.tokens)
        return
    if row.queue:
        return
    thought = row.tokens[row.thought_begin:]
    tail = sampling.text(thought[-32:])  # long enough for the closing tag
    if closing not in tail:
        if sampling.think_budget and len(thought) >= sampling.think_budget:
            line_break = "" if tail.endswith("\n") else "\n"
            row.queue = model.encode_text(sampling.tokenizer, line_break + closing + "\n")
    elif len(thought) < sampling.think_minimum and len(row.tokens) - 1 not in row.forced:
        kept = sampling.text(thought).partition(closing)[0]
        while len(sampling.text(row.tokens[row.thought_begin:])) > len(kept):
            row.tokens.pop()  # the row is then reseated, without them in the cache
            row.logprobs.pop()
        row.queue = model.encode_text(sampling.tokenizer, "Wait")
    else:
        row.thought_closed = True


def finish_reason(row, sampling):
    """The reason to end the row after its last token, or None. May queue tokens to force."""
    if row.tokens[-1] in sampling.stop_tokens:
        return "stop"
    if sampling.stop_strings:  # a character is at most four tokens, one per byte
        tail = sampling.text(row.tokens[-4 * max(map(len, sampling.stop_strings)):])
        if any(string in tail for string in sampling.stop_strings):
            return "stop"
    if sampling.limits_thinking and not row.thought_closed:
        steer_thinking(row, sampling)
    if sampling.repetition and is_loop(row.tokens, sampling.repetition):
        return "repetition"
    return "length" if len(row.tokens) >= row.limit else None


# ------------------------------------------------------------ decode


def decode_step(params, config, cache, temperature, top_p, top_k, forced, state):
    """Feed each row's last token and draw the next: tokens, logprobs [B].

    Writes into `state` and the cache. cache: Slots, or the first arguments of decode_attention.
    forced: whether to look at state.forced.
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
    """Run at most `steps` decode steps: [(tokens [B], logprobs [B]), ...]."""
    if sampling.limits_thinking:
        forced = [-1] * len(state.tokens)
        for row, place in rows.items():
            forced[place] = row.queue[0] if row.queue else -1
        state.forced.copy_(torch.tensor(forced))
    drawn = []
    for _ in range(steps):
        drawn.append(step_fn(state))
        tokens, _ = drawn[-1]  # reading them is free on a CPU
        if tokens.device.type == "cpu" and not sampling.stop_tokens.isdisjoint(tokens.tolist()):
            break
    return drawn


def harvest(rows, drawn, sampling, on_token):
    """Append the drawn tokens to their rows and remove the rows that have ended.

    drawn: (tokens [B], logprobs [B]) of each step. Returns (ended, num_tokens, reopened): the
    arguments of on_step, and whether a thinking block was reopened: that row must be reseated.
    """
    tokens, logprobs = (torch.stack(column, 1).tolist() for column in zip(*drawn))  # [B][steps]
    ended, num_tokens, reopened = [], 0, False
    for row, place in list(rows.items()):
        new_tokens = tokens[place][:row.limit - len(row.tokens)]
        stops = [n for n, token in enumerate(new_tokens, 1) if token in sampling.stop_tokens]
        new_tokens = new_tokens[:stops[0]] if stops else new_tokens
        new_logprobs = logprobs[place][:len(new_tokens)]
        if math.isnan(sum(new_logprobs)):
            raise ValueError("the model's log-probabilities are not finite: its weights are "
                             "damaged, perhaps by a diverged training run; use another checkpoint")
        if row.queue:
            row.forced.append(len(row.tokens))
            row.queue.pop(0)
        length = len(row.tokens)
        row.tokens += new_tokens
        row.logprobs += new_logprobs
        row.draws += len(new_tokens)
        finish = finish_reason(row, sampling)
        reopened |= len(row.tokens) < length + len(new_tokens)
        num_tokens += len(row.tokens) - length
        if on_token:
            on_token(row.prompt, row.sample, row.tokens)
        if finish:
            completion = Completion(row.tokens, row.logprobs, finish, row.forced)
            ended.append((row.prompt, row.sample, completion))
            del rows[row]
    return ended, num_tokens, reopened


# ------------------------------------------------------------ generate


def check_request(config, prompts, sampling, **counts):
    """Raise ValueError if a setting is out of range or a prompt cannot be continued."""
    counts |= {"temperature": sampling.temperature, "top_k": sampling.top_k}
    for name, value in counts.items():
        least = 0 if name in ("temperature", "top_k") else 1
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected above 0 and at most 1")
    if (sampling.stop_strings or sampling.limits_thinking) and sampling.tokenizer is None:
        raise ValueError("stop strings and limits on thinking need the tokenizer")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, expected at least 1 and fewer "
                             f"than the context of {config.max_context}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of "
                             f"{config.vocab_size}")


def new_rows(config, prompts, limits, seed, seeds, sampling):
    """A Row for each sample of each prompt: [prompt][sample]."""
    rows = []
    for p, prompt in enumerate(prompts):
        thought_begin = None
        if sampling.limits_thinking:  # the prompt may end inside a thinking block
            tail, tag = sampling.text(prompt[-32:]), f"{sampling.think_tag}>"
            thought_begin = 0 if tail.rfind("<" + tag) > tail.rfind("</" + tag) else None
        prompt_seed = p if seeds is None else seeds[p]
        rows.append([
            Row(prompt=p, sample=sample, key=row_key(seed, prompt_seed, sample),
                limit=min(limit, config.max_context - len(prompt)), last_prompt_token=prompt[-1],
                cached=len(prompt) - 1, thought_begin=thought_begin)
            for sample, limit in enumerate(limits[p])])
    return rows


def new_batch(params, config, rows, max_batch, engine):
    """An empty batch for `max_batch` of the rows at once: an Engine if the GPU supports one."""
    like = params["model.norm.weight"]
    if has_varlen(like.device, like.dtype):
        engine = engine or Engine()
        longest = max(row.cached + 1 + row.limit for row in chain(*rows))
        prepare(engine, params, config, max_batch, longest)
        return engine
    if like.device.type != "cpu":
        say_once(f"{like.device.type} in {like.dtype}: sampling takes the plain path, which is "
                 "slower; CUDA graphs need bfloat16 and a GPU of sm80 or newer")
    return Batch(new_store(config, like), new_store(config, like))


def clock(tensor):
    """Time in seconds, after pending GPU work has finished."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0,
             top_k=0, stop_tokens=(), stop_strings=(), tokenizer=None, repetition=0, think_budget=0,
             think_minimum=0, think_tag="think", seed=0, seeds=None, max_batch=64, chunk=None,
             compiled=False, engine=None, on_token=None, on_step=None, on_done=None, first=None,
             stats=None):
    """Sample completions of prompts (lists of token ids): [prompt][sample] Completion.

    The noise of a row depends on (seed, seeds[prompt], sample) and its draw count alone, so its
    tokens do not depend on the batch, unless a rounding error tips a draw between two tokens.
    params: the tensors of a checkpoint, with or without an adapter, or sampling_params of them.
    max_new_tokens: an int, or [prompt][sample] ints; the end of the context is always a limit.
    temperature: 0 is greedy. top_k, top_p: applied in this order; 0 and 1 turn them off.
    stop_tokens, stop_strings: end a row, and stay in it.
    tokenizer: needed for stop strings and for the limits on thinking.
    repetition: end a row whose last `repetition` tokens repeat one phrase at least four times.
    think_budget: close a thinking block at this length. think_minimum: reopen a shorter one.
    seeds: an int for each prompt; default: its index.
    max_batch: maximum rows decoded at once; together with their length it sets the cache size.
    chunk: prompt tokens prefilled at once; a longer prompt is prefilled by itself.
    compiled: torch.compile the decode step of an Engine; takes a minute, once.
    engine: an Engine to reuse: its cache and, while the weights stay in place, its CUDA graphs.
    on_token(prompt, sample, tokens): called with a row's tokens so far.
    on_step(ended, num_tokens): called every few steps with the completions that ended since the
    last call, [(prompt, sample, Completion), ...], and the number of tokens drawn.
    on_done(prompt, completions): called when all samples of a prompt have ended. May return the
    index of another prompt to queue. first: how many prompts to queue at the start; default: all.
    stats: a dict to fill with steps, cache_gib (peak), prefill_s, capture_s and decode_s.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    limits = max_new_tokens
    if isinstance(max_new_tokens, int):
        limits = [[max_new_tokens] * num_samples for _ in prompts]
    sampling = Sampling(frozenset(stop_tokens), temperature, top_p, top_k, stop_strings, tokenizer,
                        repetition, think_budget, think_minimum, think_tag)
    check_request(config, prompts, sampling, num_samples=num_samples, max_batch=max_batch,
                  max_new_tokens=min(chain(*limits), default=1))
    stats = {} if stats is None else stats
    stats |= {"steps": 0, "cache_gib": 0.0, "prefill_s": 0.0, "capture_s": 0.0, "decode_s": 0.0}
    results = [[None] * num_samples for _ in prompts]
    rows = new_rows(config, prompts, limits, seed, seeds, sampling)
    # longest prompts first, so that rows of similar length run together
    waiting = deque(chain(*sorted(rows[:first], key=lambda samples: -samples[0].cached)))
    if not waiting:
        return results

    params = sampling_params(params, config)
    like = params["model.norm.weight"]
    batch = new_batch(params, config, rows, min(max_batch, len(waiting)), engine)
    static = isinstance(batch, Engine)
    seat_fn = seat_in_slots if static else seat
    step_fn = decode_step
    if static and compiled:
        torch._dynamo.config.recompile_limit = 64  # one for each batch size and set of settings
        step_fn = torch.compile(decode_step, dynamic=False)
    chunk = chunk or (16384 if static else 1024)
    stride = 16 if static else 8  # decode steps between two calls of `harvest`
    if on_token or stop_strings or repetition or sampling.limits_thinking:
        stride = 1  # these look at every token
    settings = (temperature, top_p, top_k, sampling.limits_thinking)
    while waiting or batch.rows:
        begin = clock(like)
        state, cache = seat_fn(params, config, batch, waiting, prompts, max_batch, chunk)
        step = functools.partial(step_fn, params, config, cache, *settings)
        prefilled = clock(like)
        if static:
            state, step = graph_step(batch, state, settings, step)
        captured = clock(like)
        stats["prefill_s"] += prefilled - begin
        stats["capture_s"] += captured - prefilled
        num_bytes = sum(tensor.nbytes for layer in batch.layers for tensor in layer)
        stats["cache_gib"] = max(stats["cache_gib"], num_bytes / 2**30)
        reseat = False
        while not reseat and (left := steps_left(batch)):
            drawn = decode(step, state, batch.rows, min(stride, left), sampling)
            stats["steps"] += len(drawn)
            ended, num_tokens, reopened = harvest(batch.rows, drawn, sampling, on_token)
            for p, sample, completion in ended:
                results[p][sample] = completion
                if on_done and None not in results[p]:
                    further = on_done(p, results[p])
                    waiting.extend([] if further is None else rows[further])
            if on_step:
                on_step(ended, num_tokens)
            # Wait for several free places before seating new rows, whose prompts are then
            # prefilled together, or shrinking the batch, which copies the cache.
            B = len(state.tokens)
            if waiting:
                free, enough = max_batch - len(batch.rows), B // 16
            else:
                free, enough = B - len(batch.rows), B // (2 if static else 4)
            reseat = reopened or free >= max(1, enough)
        stats["decode_s"] += clock(like) - captured
    return results


# ------------------------------------------------------------ the command line


def completion_text(tokenizer, completion, stop_tokens, stop_strings=()):
    """The text of a completion, without stop tokens and up to the first stop string."""
    tokens = [token for token in completion.tokens if token not in stop_tokens]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    cuts = [text.find(string) for string in stop_strings if string in text]
    return text[:min(cuts, default=len(text))]


def text_streamer(tokenizer, stop_tokens, write, think_tag="think", hide=False, dim=True):
    """show(tokens, last=False): write a completion's new text, its thinking dimmed or hidden."""
    tags = f"<{think_tag}>", f"</{think_tag}>"
    block = re.compile(rf"({tags[0]}.*?(?:{tags[1]}|\Z))", re.DOTALL)
    shown = 0

    def show(tokens, last=False):
        nonlocal shown
        kept = [token for token in tokens if token not in stop_tokens]
        text = tokenizer.decode(kept, skip_special_tokens=False)
        if not last:  # hold back the beginning of a tag and an incomplete character
            starts = (tag[:n] for tag in tags for n in range(len(tag)) if text.endswith(tag[:n]))
            text = text[:len(text) - max(map(len, starts))].rstrip("\N{REPLACEMENT CHARACTER}")
        begin = 0
        for i, part in enumerate(block.split(text)):  # odd parts are thinking blocks
            new = printable(part[max(0, shown - begin):])
            begin += len(part)
            if not (i % 2 and hide):
                write(f"\033[2m{new}\033[0m" if new and i % 2 and dim else new)
        shown = max(shown, begin)

    return show


def reply(params, config, tokenizer, system, engine, messages, args):
    """Stream the answer to the last message; return the conversation with the answer added.

    Drops the oldest turns until the rest fits in the context.
    Raises ValueError if the last message alone fills it.
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
              f"{len(messages) - len(kept)} oldest messages were dropped)")
    return [*kept, {"role": "assistant", "content": completion_text(tokenizer, answer, ends)}]


def main(args):
    path = model.resolve_model(args.model)
    config, tokenizer = model.load_config(path), model.load_tokenizer(path)
    system = args.system or model.load_system_prompt(path)
    device = find_device(args.device)
    params = model.load_params(path, device, compute_dtype(args.dtype, device), args.adapter)
    params = sampling_params(params, config)
    chat = functools.partial(reply, params, config, tokenizer, system, Engine())
    if args.prompt is not None:
        chat([{"role": "user", "content": args.prompt}], args)
        return
    print(f"{args.model} on {device}. Ctrl-D quits, Ctrl-C stops an answer, /reset starts over.")
    messages = []
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            return
        if question == "/reset":
            messages = []
            print("(new conversation)")
        elif question:
            try:
                messages = chat([*messages, {"role": "user", "content": question}], args)
            except (ValueError, RuntimeError, KeyboardInterrupt) as error:
                reason = str(error) or "stopped"
                print(f"\n(no answer: {reason}; the conversation is unchanged)")


if __name__ == "__main__":
    run_main(main, parse_args)
