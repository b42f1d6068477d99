"""Sampling from a model: batched, with a key/value cache, and the log-probability of every token it draws.

    python generate.py --model tiny --prompt "What is 3 + 4 * 5?"
    python generate.py --model qwen2.5-1.5b-instruct                    # a chat; Ctrl-D ends it
    python generate.py --model qwen2.5-math-1.5b --prompt "..." --temperature 0 --hide-thinking

    completions = generate(params, config, prompts, num_samples=8, max_new_tokens=512, stop_tokens=config.eos_token_id)
    completions[prompt][sample].tokens, .logprobs, .finish
"""

import argparse
import sys
from typing import NamedTuple

import torch

from model import (forward, init_cache, load_config, load_params, load_system_prompt, load_tokenizer, render_chat,
                   resolve_model)


def add_sampling_flags(parser, temperature=1.0, top_p=1.0, max_new_tokens=512):
    """The flags of everything that samples; the scripts that import this file share them."""
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=top_p, help="sample from the most likely tokens that hold this share; 1: all")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many most likely tokens; 0: all")
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
    p.add_argument("--hide-thinking", action="store_true", help="show only what stands outside the thinking block")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------ drawing a token


class Completion(NamedTuple):
    tokens: list[int]  # the stop token, when one was drawn, is the last
    logprobs: list[float]  # of each token under the temperature-scaled distribution, before top-p and top-k cut it
    finish: str  # "stop" | "length" | "repetition"


def mix(x):
    """splitmix64's finaliser: int64 [...] -> int64 [...], every bit of the result depending on every bit of x."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # int64 wraps, and >> would carry the sign along
    return x


def uniform(keys, counters):
    """Counter-based noise: a float32 in [0, 1) for each (key, counter), int64 [B] each. No state, so no order matters."""
    return (mix(keys + mix(counters)) >> 40 & 0xFFFFFF).float() / 2**24


def row_key(seed, prompt_seed, sample):
    """The int that all the noise of one completion derives from."""
    key = torch.zeros((), dtype=torch.int64)
    for part in (seed, prompt_seed, sample):
        key = mix(key * 3 + part + 1)
    return int(key)


def sample_tokens(logits, noise, temperature, top_p, top_k):
    """One token per row and its log-probability: logits [B, V], noise [B] in [0, 1) -> ([B] int64, [B] float32).

    Inverse transform sampling: the token whose stretch of the cumulative distribution holds the noise. Temperature 0 is greedy,
    with log-probabilities at temperature 1.
    """
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        chosen = logprobs.argmax(-1)
        return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]
    ids = None
    weights = logprobs
    if top_k or top_p < 1:
        weights, ids = logprobs.topk(min(top_k or logprobs.shape[-1], logprobs.shape[-1]))  # sorted, likeliest first
    weights = weights.exp()
    if top_p < 1:
        share = weights / weights.sum(-1, keepdim=True)
        weights = weights * (share.cumsum(-1) - share < top_p)  # those before it hold less than top_p: the first always stays
    cdf = weights.cumsum(-1)
    chosen = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
    chosen = chosen if ids is None else ids.gather(-1, chosen)
    return chosen[:, 0], logprobs.gather(-1, chosen)[:, 0]


# ------------------------------------------------------------------------------------ the engine


def check_request(config, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_batch):
    for name, value, fine, expected in (
            ("num_samples", num_samples, num_samples >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("max_batch", max_batch, max_batch >= 1, "at least 1")):
        if not fine:
            raise ValueError(f"{name} is {value}, expected {expected}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as the end-of-text token")
        if len(prompt) >= config.max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in the context of {config.max_context}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(f"prompt {i} holds a token outside the vocabulary of {config.vocab_size}")


@torch.inference_mode()
def generate(params, config, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_tokens=(),
             seed=0, max_batch=64, seeds=None, on_token=None):
    """`num_samples` completions of each prompt: list of token ids -> [prompt][sample] Completion.

    A row's noise derives from (seed, seeds[prompt], sample, position) alone: what it says does not depend on who shares its batch.
    seeds: an int per prompt, by default its index.   on_token(prompt, sample, token): called as tokens are drawn.
    Raises ValueError for an empty prompt, one that fills the context, or a setting out of range.
    """
    check_request(config, prompts, num_samples, max_new_tokens, temperature, top_p, top_k, max_batch)
    device = params["model.embed_tokens.weight"].device
    stop_tokens = set(stop_tokens)
    rows = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    results = [[None] * num_samples for _ in prompts]
    for begin in range(0, len(rows), max_batch):
        batch = rows[begin:begin + max_batch]
        lengths = torch.tensor([len(prompts[p]) for p, _ in batch], device=device)
        limits = [min(max_new_tokens, config.max_context - len(prompts[p])) for p, _ in batch]
        width = int(lengths.max())
        tokens = torch.tensor([prompts[p] + [0] * (width - len(prompts[p])) for p, _ in batch], device=device)  # [B, T]
        cache = init_cache(config, len(batch), width + max(limits), device, params["model.embed_tokens.weight"].dtype)
        keys = torch.tensor([row_key(seed, seeds[p] if seeds else p, s) for p, s in batch], device=device)
        logits = forward(params, config, tokens, cache=cache)[torch.arange(len(batch)), lengths - 1]  # [B, V]
        drawn = [([], []) for _ in batch]
        finish = [None] * len(batch)
        for step in range(max(limits)):
            chosen, logprobs = sample_tokens(logits, uniform(keys, torch.full_like(keys, step)), temperature, top_p, top_k)
            for i, (token, logprob) in enumerate(zip(chosen.tolist(), logprobs.tolist())):
                if finish[i] is None:
                    drawn[i][0].append(token)
                    drawn[i][1].append(logprob)
                    if on_token:
                        on_token(*batch[i], token)
                    finish[i] = "stop" if token in stop_tokens else "length" if step + 1 == limits[i] else None
            if all(finish):
                break
            logits = forward(params, config, chosen[:, None], (lengths + step)[:, None].clamp(max=cache.k.shape[3] - 1), cache)[:, 0]
        for (p, s), (tokens, logprobs), end in zip(batch, drawn, finish):
            results[p][s] = Completion(tokens, logprobs, end)
    return results


# ------------------------------------------------------------------------------------ the command line


def text_streamer(tokenizer, stop_tokens, write, think_tag="think", hide=False, dim=True):
    """An on_token that writes text as it comes, its thinking block dimmed or hidden."""
    opening, closing = f"<{think_tag}>", f"</{think_tag}>"
    ids, state = [], {"shown": 0, "thinking": False}

    def on_token(prompt, sample, token):
        if token not in stop_tokens:
            ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        last = token in stop_tokens
        while True:
            rest, tag = text[state["shown"]:], closing if state["thinking"] else opening
            cut = rest.find(tag)
            if cut < 0:  # keep back what may yet become the tag, or the rest of a character
                keep = 0 if last else next((n for n in range(len(tag) - 1, 0, -1) if rest.endswith(tag[:n])), 0)
                cut = len(rest) - keep
                while not last and cut and rest[cut - 1] == "\N{REPLACEMENT CHARACTER}":
                    cut -= 1
            else:
                cut += len(tag) if state["thinking"] else 0
            if not (hide and state["thinking"]):
                write(f"\033[2m{rest[:cut]}\033[0m" if state["thinking"] and dim and cut else rest[:cut])
            state["shown"] += cut
            if not text[state["shown"] - (len(tag) if state["thinking"] else 0):].startswith(tag):
                return
            state["thinking"] = not state["thinking"]

    return on_token


def main(args):
    path = resolve_model(args.model)
    config, tokenizer = load_config(path), load_tokenizer(path)
    params = load_params(path, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
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
        write = lambda text: print(text, end="", flush=True)
        on_token = text_streamer(tokenizer, ends, write, args.think_tag, args.hide_thinking, sys.stdout.isatty())
        [[answer]] = generate(params, config, [tokenizer.encode(text, add_special_tokens=False).ids], max_new_tokens=args.max_new_tokens,
                              temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, stop_tokens=ends, seed=args.seed,
                              seeds=[len(messages)], on_token=on_token)
        print()
        if args.prompt is not None:
            return
        messages.append({"role": "assistant", "content": tokenizer.decode([t for t in answer.tokens if t not in ends])})


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FileNotFoundError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        sys.exit(2)
