"""Tests of generate.py."""

import contextlib
import os
import signal
import subprocess
import sys
import unittest
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import model
from generate import (
    generate,
    inverse_cdf,
    row_key,
    sample_tokens,
    sampling_params,
    text_streamer,
    uniform,
)
from model import Config, forward, init_lora, init_params, merge_lora, token_logprobs
from tests.common import ROOT, raises


def _sampler(seed=0, **changes):
    """A tiny random model, its weights large enough for its distributions to have a shape."""
    config = Config(**{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "max_position_embeddings": 512} | changes)
    params = init_params(config, seed)
    return {name: tensor * 8 if tensor.dim() == 2 else tensor for name, tensor in params.items()}, config


def _parrot(text):
    """A model over bytes that says `text` in a circle, whatever stands before its last letter, and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    config = Config(256, 256, 8, 1, 4, 2, tie_word_embeddings=False)
    params = {name: tensor * 0 if ".layers." in name else tensor for name, tensor in init_params(config, 0).items()}
    params["model.embed_tokens.weight"], params["lm_head.weight"] = torch.eye(256), torch.zeros(256, 256)
    ids = tokenizer.encode(text).ids
    for this, following in zip(ids, ids[1:] + ids[:1]):
        params["lm_head.weight"][following, this] = 4.0
    return params, config, tokenizer


_PROMPTS = [[5, 6, 7], [9, 3, 4, 11, 12, 30, 2, 17, 8, 44, 51, 26, 6, 6, 1, 0, 20, 21, 22, 23], [60], [8, 8, 8, 8, 8, 8, 8, 8]]


def _tokens(answers):
    return [[completion.tokens for completion in row] for row in answers]


def test_generate_greedy_equals_the_plain_loop():
    """Ragged prompts in one batch, cached and packed, against a loop that computes every prefix from its start."""
    params, config = _sampler()
    answers = generate(params, config, _PROMPTS, max_new_tokens=24, temperature=0)
    for prompt, [answer] in zip(_PROMPTS, answers):
        tokens = list(prompt)
        for _ in range(24):
            tokens.append(int(forward(params, config, torch.tensor([tokens]))[0, -1].argmax()))
        assert answer.tokens == tokens[len(prompt):] and answer.finish == "length"


def test_generate_logprobs_equal_the_scorers():
    params, config = _sampler()
    for settings in ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8, "top_k": 20}, {"temperature": 0}):
        for share in (True, False):
            answers = generate(params, config, _PROMPTS, num_samples=3, max_new_tokens=20, share_prompts=share, **settings)
            for prompt, row in zip(_PROMPTS, answers):
                for answer in row:
                    whole = torch.tensor([prompt + answer.tokens])
                    expected = token_logprobs(params, config, whole, settings["temperature"] or 1.0)[0, len(prompt) - 1:]
                    assert (expected - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_says_the_same_in_any_company():
    """Noise belongs to (seed, prompt, sample): neither the batch size, nor sharing, nor chunks, nor a small cache change a token."""
    params, config = _sampler()
    ask = {"num_samples": 3, "max_new_tokens": 70, "stop_tokens": (3,), "temperature": 0.9}
    whole = _tokens(generate(params, config, _PROMPTS, **ask))
    assert len({len(tokens) for row in whole for tokens in row}) > 3, "rows should end at different times"
    stats = {}
    slot_gib = 2 * 2 * 2 * 8 * 4 / 2**30  # one slot: keys and values, 2 layers, 2 heads of 8 float32
    for changes in ({"max_batch": 1}, {"max_batch": 5}, {"share_prompts": False}, {"chunk": 16}, {"chunk": 16, "share_prompts": False},
                    {"cache_gib": 600 * slot_gib}, {"cache_gib": 600 * slot_gib, "share_prompts": False}):
        assert _tokens(generate(params, config, _PROMPTS, **ask, **changes, stats=stats)) == whole, changes
        assert stats["cache_gib"] <= changes.get("cache_gib", 1), changes
    alone = [generate(params, config, [prompt], seeds=[i], **ask)[0] for i, prompt in enumerate(_PROMPTS)]
    assert _tokens(alone) == whole
    assert _tokens(generate(params, config, _PROMPTS, seed=1, **ask)) != whole


def test_generate_cache_grows_past_its_blocks():
    params, config = _sampler(max_position_embeddings=300)
    [[answer]] = generate(params, config, [_PROMPTS[1] * 5], max_new_tokens=400, temperature=0.8, chunk=48)
    assert len(answer.tokens) == 200 and answer.finish == "length", "the context ends a row"
    scored = token_logprobs(params, config, torch.tensor([_PROMPTS[1] * 5 + answer.tokens]), 0.8)[0, 99:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_shared_prompts_need_less_cache():
    """8 prompts of 512 tokens, 16 samples of 128 new tokens: prompt + G x completion, not G x (prompt + completion)."""
    params, config = _sampler(max_position_embeddings=1024, num_hidden_layers=1)
    prompts, gib = [[i + 1] * 512 for i in range(8)], {}
    for share in (True, False):
        stats = {}
        generate(params, config, prompts, num_samples=16, max_new_tokens=128, max_batch=128, share_prompts=share, stats=stats)
        gib[share] = stats["cache_gib"]
    assert gib[True] <= 0.35 * gib[False], gib


def _chi_square(counts, probs):
    """Whether counts may come from probs: Pearson's statistic against its 0.9999 quantile (Wilson and Hilferty)."""
    if any(count and not p for count, p in zip(counts, probs)):
        return False
    cells = [(count, sum(counts) * p) for count, p in zip(counts, probs) if p]
    df = len(cells) - 1
    return sum((count - mean) ** 2 / mean for count, mean in cells) < df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3


def test_generate_samples_the_right_distribution():
    params, config = _sampler(vocab_size=12)
    exact = (forward(params, config, torch.tensor([[3, 1, 4]]))[0, -1] / 0.8).softmax(-1).tolist()
    ranked = sorted(range(12), key=lambda t: -exact[t])
    for top_p, top_k in ((1.0, 0), (0.75, 0), (1.0, 5), (0.75, 5), (1e-6, 0), (1.0, 1)):
        kept = ranked[:top_k or 12]
        mass = sum(exact[t] for t in kept)
        nucleus = [t for i, t in enumerate(kept) if sum(exact[u] for u in kept[:i]) < top_p * mass]  # the fewest that hold top_p
        probs = [exact[t] / sum(exact[u] for u in nucleus) if t in nucleus else 0.0 for t in range(12)]
        rows = generate(params, config, [[3, 1, 4]], num_samples=2000, max_new_tokens=1, temperature=0.8, top_p=top_p, top_k=top_k,
                        max_batch=2000)[0]
        counts = [sum(row.tokens == [t] for row in rows) for t in range(12)]
        assert counts[ranked[0]] == 2000 if len(nucleus) == 1 else _chi_square(counts, probs), (top_p, top_k, counts, probs)


def test_generate_nucleus_of_a_flat_distribution():
    """Top-p looks at a thousand tokens first; where those hold too little, it must look at all."""
    logits = torch.zeros(2, 5000)
    logits[0, 7] = 20.0
    noise = torch.tensor([[0.1, 0.9999]]).T.expand(2, 2)
    for column in noise.T:
        tokens, logprobs = sample_tokens(logits, column, top_p=0.9)
        assert tokens[0] == 7 and abs(float(logprobs[1].exp()) - 1 / 5000) < 1e-6
    seen = {int(sample_tokens(logits, torch.full((2,), i / 64), top_p=0.9)[0][1]) for i in range(64)}
    assert len(seen) == 64, "the flat row draws from 4,500 tokens, 64 different ones at 64 levels"


def test_generate_draws_no_token_of_weight_zero():
    weights = torch.zeros(3, 128)
    weights[0, 5], weights[1, 127], weights[2, 0], weights[2, 64] = 0.3, 1e-30, 1.0, 1e-8
    for noise in (0.0, 0.5, 1 - 2**-24):
        drawn = inverse_cdf(weights, torch.full((3, 1), noise))
        assert (weights.gather(1, drawn) > 0).all()


def test_generate_noise_is_uniform_and_independent():
    keys = torch.tensor([row_key(0, i // 50, i % 50) for i in range(2500)])
    noise = torch.stack([uniform(keys, torch.full_like(keys, n)) for n in range(40)])  # [40, 2500]
    assert noise.min() >= 0 and noise.max() < 1
    assert _chi_square(torch.histc(noise, 50, 0, 1).tolist(), [1 / 50] * 50)
    for other in (noise.roll(1, 0), noise.roll(1, 1)):  # the next draw of a row, the same draw of its neighbour
        pairs = torch.histc((noise * 8).floor() * 8 + (other * 8).floor(), 64, -0.5, 63.5)
        assert _chi_square(pairs.tolist(), [1 / 64] * 64)


def test_generate_finish_reasons():
    params, config, tokenizer = _parrot("abcdefghi")
    prompt = tokenizer.encode("a").ids
    ask = {"max_new_tokens": 60, "temperature": 0, "tokenizer": tokenizer}

    def say(**changes):
        [[answer]] = generate(params, config, [prompt], **ask | changes)
        return tokenizer.decode(answer.tokens), answer.finish

    assert say(max_new_tokens=5) == ("bcdef", "length")
    assert say(stop_tokens=tokenizer.encode("d").ids) == ("bcd", "stop"), "the stop token is kept"
    assert say(stop_strings=["zz", "ef"]) == ("bcdef", "stop")
    assert say(repetition=40) == (("bcdefghia" * 5)[:40], "repetition"), "nine letters, four times and more"
    assert say(repetition=32)[1] == "length", "nine letters are more than a quarter of 32"


def test_generate_thinking_budget_closes_the_block():
    params, config, tokenizer = _parrot("abcdefghi")
    prompt = tokenizer.encode("<think>\na").ids
    [[answer]] = generate(params, config, [prompt], max_new_tokens=40, temperature=0, tokenizer=tokenizer, think_budget=6)
    assert tokenizer.decode(answer.tokens).startswith("bcdefg\n</think>\n")
    assert answer.forced == list(range(6, 16)) and len(answer.tokens) == len(answer.logprobs) == 40
    scored = token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4, "forced tokens carry the model's log-probability, too"
    [[other]] = generate(params, config, [tokenizer.encode("a").ids], max_new_tokens=40, temperature=0, tokenizer=tokenizer, think_budget=6)
    assert other.forced == [], "no block was opened"


def test_generate_thinking_minimum_takes_the_tag_back():
    """The model closes its block after one letter; the tag is taken back and "Wait" put there, until the minimum is reached."""
    params, config, tokenizer = _parrot("a</think>")
    prompt = tokenizer.encode("<think>>").ids  # ">" is followed by "a"
    [[answer]] = generate(params, config, [prompt], max_new_tokens=30, temperature=0, tokenizer=tokenizer, think_minimum=12)
    assert tokenizer.decode(answer.tokens).startswith("aWaithink>a</think>a"), tokenizer.decode(answer.tokens)
    assert answer.forced == [1, 2, 3, 4] and len(answer.tokens) == 30
    scored = token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:]
    assert (scored - torch.tensor(answer.logprobs)).abs().max() < 1e-4


def test_generate_runs_on_adapters_and_packed_weights():
    """An adapter counts; packed weights say what the checkpoint says, and are packed once only."""
    params, config = _sampler()
    lora = init_lora(config, 2, 0)
    lora = {name: tensor + 0.3 if "lora_B" in name else tensor for name, tensor in lora.items()}
    ask = {"max_new_tokens": 12, "temperature": 0.9}
    plain = _tokens(generate(params, config, _PROMPTS, **ask))
    adapted = _tokens(generate(params | lora, config, _PROMPTS, **ask))
    assert plain != adapted
    assert _tokens(generate(merge_lora(params | lora), config, _PROMPTS, **ask)) == adapted
    packed = sampling_params(params | lora, config)
    assert _tokens(generate(packed, config, _PROMPTS, **ask)) == adapted
    again = sampling_params(packed, config)
    assert again.keys() == packed.keys() and all(again[n] is packed[n] for n in packed if packed[n].is_mkldnn)


def test_generate_layer_is_the_models_own():
    """Who edits `model.block` has edited the sampler, too: its log-probabilities stay the scorer's."""
    params, config = _sampler()
    block = model.block

    def edited(params, config, layer, x, *rest):
        return block(params, config, layer, x, *rest) * 1.1 + 0.01 * layer

    plain = _tokens(generate(params, config, _PROMPTS, max_new_tokens=20))
    with mock.patch.object(model, "block", edited):
        answers = generate(params, config, _PROMPTS, num_samples=2, max_new_tokens=20)
        for prompt, row in zip(_PROMPTS, answers):
            for answer in row:
                scored = token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))
                drawn = torch.tensor(answer.logprobs)
                assert (scored[0, len(prompt) - 1:] - drawn).abs().max() < 1e-4
        assert _tokens(answers) != plain


def test_generate_in_bfloat16_stays_near_the_scorer():
    params, config = _sampler()
    answers = generate(sampling_params(params, config, torch.bfloat16), config, _PROMPTS, num_samples=2, max_new_tokens=16)
    gaps = [(token_logprobs(params, config, torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1:] - torch.tensor(answer.logprobs)).abs().mean()
            for prompt, row in zip(_PROMPTS, answers) for answer in row]
    assert 0 < sum(gaps) / len(gaps) < 0.1, gaps


def test_generate_layers_compile_to_one_graph():
    """What a GPU compiles, traced without a compiler: fullgraph raises where Python would have to step in; three layers share graphs."""
    params, config = _sampler(num_hidden_layers=3)
    for num_samples in (1, 2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ask = {"num_samples": num_samples, "max_new_tokens": 12, "temperature": 0.9}
        compiled = generate(params, config, _PROMPTS[:2], compile_backend="aot_eager", **ask)
        assert _tokens(compiled) == _tokens(generate(params, config, _PROMPTS[:2], **ask))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_refuses_bad_input():
    params, config = _sampler()
    good = {"prompts": [[1, 2]], "max_new_tokens": 4}
    for changes, words in (({"prompts": [[1], []]}, "prompt 1 is empty"), ({"prompts": [[1] * 512]}, "512 tokens"),
                           ({"prompts": [[61]]}, "vocabulary of 61"), ({"temperature": -1}, "temperature is -1"), ({"top_p": 0}, "top_p is 0"),
                           ({"top_p": 1.5}, "top_p is 1.5"), ({"top_k": -2}, "top_k is -2"), ({"num_samples": 0}, "num_samples is 0"),
                           ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"max_batch": 0}, "max_batch is 0"),
                           ({"stop_strings": ["x"]}, "need the tokenizer"), ({"temperature": float("nan")}, "temperature is nan")):
        try:
            generate(params, config, **good | changes)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{changes} was taken")
    assert generate(params, config, [], max_new_tokens=4) == []


def test_generate_streams_text_with_its_thinking_dimmed_or_hidden():
    _, _, tokenizer = _parrot("a")
    text = "Hm. <think>\n1 < 2\u00e9\n</think>\n\\boxed{2} <thin"
    ids = tokenizer.encode(text).ids
    for hide, dim, expected in ((False, False, text), (True, False, "Hm. \n\\boxed{2} <thin"),
                                (False, True, text.replace("<think>", "\033[2m<think>").replace("</think>", "</think>\033[0m"))):
        written = []
        show = text_streamer(tokenizer, {0}, written.append, hide=hide, dim=dim)
        for n in range(1, len(ids) + 1):
            show(ids[:n])
            assert not "".join(written).endswith("<"), "what may become a tag is kept back"
        show([*ids, 0], last=True)
        assert "".join(written).replace("\033[0m\033[2m", "") == expected, written
