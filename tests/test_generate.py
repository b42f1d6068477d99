"""Tests of generate.py."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

import attention
import generate as generate_module
import model
from generate import (
    decode_step,
    generate,
    inverse_cdf,
    row_key,
    sample_tokens,
    sampling_params,
    text_streamer,
    uniform,
)
from model import Config, forward, init_lora, init_params, token_logprobs
from tests.common import (
    bytes_tokenizer,
    in_process,
    merge_lora,
    raises,
    scripted,
    small_model,
    varlen_on_cpu,
)

_PROMPTS = [[5, 6, 7],
            [9, 3, 4, 11, 12, 30, 2, 17, 8, 44, 51, 26, 6, 6, 1, 0, 20, 21, 22, 23],
            [60],
            [8, 8, 8, 8, 8, 8, 8, 8]]


def _sampler(**changes):
    """A tiny random model with large weights, for uneven distributions."""
    config = Config(61, 32, 48, 2, 4, 2, max_position_embeddings=512)._replace(**changes)
    params = init_params(config, seed=0)
    scaled = {name: tensor * 8 for name, tensor in params.items() if tensor.dim() == 2}
    return params | scaled, config


def _repeating_model(text):
    """(params, config, tokenizer) of a byte model that repeats `text`; its letters must differ."""
    tokenizer = bytes_tokenizer()
    config = Config(256, 256, 8, 1, 4, 2, tie_word_embeddings=False)
    params = init_params(config, 0)
    params |= {name: tensor * 0 for name, tensor in params.items() if ".layers." in name}
    params["model.embed_tokens.weight"] = torch.eye(256)
    head = params["lm_head.weight"] = torch.zeros(256, 256)
    ids = tokenizer.encode(text).ids
    for token, next_token in zip(ids, ids[1:] + ids[:1]):
        head[next_token, token] = 4.0
    return params, config, tokenizer


def _tokens(answers):
    return [[completion.tokens for completion in row] for row in answers]


def _gaps(params, config, prompts, answers, temperature=1.0):
    """Absolute differences between the recorded log-probabilities and the scorer's, per token."""
    gaps = []
    for prompt, row in zip(prompts, answers):
        for answer in row:
            tokens = torch.tensor([prompt + answer.tokens])
            scored = token_logprobs(params, config, tokens, temperature)[0, len(prompt) - 1:]
            gaps.append((scored - torch.tensor(answer.logprobs)).abs())
    return torch.cat(gaps)


def test_generate_greedy_equals_the_plain_loop():
    """Ragged prompts in one batch, compared with a loop that recomputes every prefix."""
    params, config = _sampler()
    answers = generate(params, config, _PROMPTS, max_new_tokens=24, temperature=0)
    for prompt, [answer] in zip(_PROMPTS, answers):
        tokens = list(prompt)
        for _ in range(24):
            tokens.append(int(forward(params, config, torch.tensor([tokens]))[0, -1].argmax()))
        assert answer.tokens == tokens[len(prompt):] and answer.finish == "length"


def test_generate_logprobs_equal_the_scorers():
    params, config = _sampler()
    for settings in ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8, "top_k": 20},
                     {"temperature": 0}):
        temperature = settings["temperature"] or 1.0
        answers = generate(params, config, _PROMPTS, num_samples=3, max_new_tokens=20, **settings)
        assert _gaps(params, config, _PROMPTS, answers, temperature).max() < 1e-4


def test_generate_is_independent_of_the_batch():
    """Noise depends on (seed, prompt, sample), not on the batch size or the prefill chunks."""
    params, config = _sampler()
    settings = {"num_samples": 3, "max_new_tokens": 70, "stop_tokens": (3,), "temperature": 0.9}
    expected = _tokens(generate(params, config, _PROMPTS, **settings))
    lengths = {len(tokens) for row in expected for tokens in row}
    assert len(lengths) > 3, "rows should end at different times"
    for changes in ({"max_batch": 1}, {"max_batch": 5}, {"chunk": 16}):
        answers = generate(params, config, _PROMPTS, **settings, **changes)
        assert _tokens(answers) == expected, changes
    alone = [generate(params, config, [prompt], seeds=[i], **settings)[0]
             for i, prompt in enumerate(_PROMPTS)]
    assert _tokens(alone) == expected
    assert _tokens(generate(params, config, _PROMPTS, seed=1, **settings)) != expected


def test_generate_batches_prompts_of_any_length():
    """Prompts of one token, which leave nothing to prefill, and of very different lengths."""
    params, config = _sampler()
    settings = {"num_samples": 2, "max_new_tokens": 40, "temperature": 0.9}
    single = [[5], [9], [60]]
    mixed = [[7], [3 * i % 61 for i in range(40)], [7 * i % 61 for i in range(300)]]
    for prompts in (single, mixed):
        alone = [generate(params, config, [prompt], seeds=[i], **settings)[0]
                 for i, prompt in enumerate(prompts)]
        for max_batch in (3, 6):
            answers = generate(params, config, prompts, max_batch=max_batch, **settings)
            assert _tokens(answers) == _tokens(alone), max_batch


def test_generate_further_prompts_join_the_running_batch():
    """Replacements once waited until all prompts were done, which left steps nearly empty."""
    params, config = _sampler()
    prompts = [*_PROMPTS, [1, 2], [7] * 30, [3]]
    limits = [[4, 9], [40, 2], [40, 39], [5, 5], [30, 30], [1, 30], [9, 9]]
    settings = {"num_samples": 2, "max_new_tokens": limits, "temperature": 0.9}
    expected = _tokens(generate(params, config, prompts, **settings)[:6])
    captured = []
    for static, max_batch in ((False, 8), (False, 3), (True, 8), (True, 3)):
        calls, stats = {}, {}

        def on_done(i, completions):
            calls[i] = completions
            return {0: 4, 4: 5}.get(i)

        with _static(captured) if static else nullcontext():
            *answers, never = generate(params, config, prompts, first=4, on_done=on_done,
                                       max_batch=max_batch, stats=stats, **settings)
        assert _tokens(answers) == expected and never == [None, None]
        assert sorted(calls) == list(range(6)) and all(calls[i] is answers[i] for i in calls)
        assert max_batch == 3 or stats["steps"] < 40 + 30 + 30, stats
    assert len(set(captured)) <= 4 and len(captured) <= 4 + 3  # of two engines


def test_generate_ended_rows_write_only_into_their_own_slots():
    """A row that ended near the end of its slots used to write into those of the next row."""
    params, config = _sampler()
    prompts = [[5 + i] for i in range(40)]
    limits = [[31], *[[10]] * 31, *[[60]] * 8]
    answers = generate(params, config, prompts, max_new_tokens=limits, max_batch=32)
    assert _gaps(params, config, prompts, answers).max() < 1e-4


def test_generate_cache_grows():
    params, config = _sampler(max_position_embeddings=300)
    prompt = _PROMPTS[1] * 5
    [[answer]] = generate(params, config, [prompt], max_new_tokens=400, temperature=0.8, chunk=48)
    assert len(answer.tokens) == 200 and answer.finish == "length", "a row ends with the context"
    assert _gaps(params, config, [prompt], [[answer]], 0.8).max() < 1e-4


def test_generate_shared_prompts_need_less_cache():
    """A group takes the slots of prompt + 16 completions, not of 16 (prompt + completion)."""
    params, config = _sampler(max_position_embeddings=1024, num_hidden_layers=1)
    prompts = [[i + 1] * 512 for i in range(8)]
    stats = {}
    generate(params, config, prompts, num_samples=16, max_new_tokens=128, max_batch=128,
             stats=stats)
    slot_gib = 2 * 2 * 8 * 4 / 2**30  # keys and values of 2 heads, 8 float32 each
    unshared = 8 * 16 * (512 + 128) * slot_gib
    assert stats["cache_gib"] <= 0.35 * unshared, stats


def _chi_square(counts, probs):
    """Whether Pearson's statistic is below its 0.9999 quantile (Wilson-Hilferty approximation)."""
    if any(count and not p for count, p in zip(counts, probs)):
        return False
    cells = [(count, sum(counts) * p) for count, p in zip(counts, probs) if p]
    df = len(cells) - 1
    quantile = df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3
    return sum((count - mean) ** 2 / mean for count, mean in cells) < quantile


def test_generate_samples_the_right_distribution():
    params, config = _sampler(vocab_size=12)
    exact = (forward(params, config, torch.tensor([[3, 1, 4]]))[0, -1] / 0.8).softmax(-1).tolist()
    ranked = sorted(range(12), key=lambda t: -exact[t])
    for top_p, top_k in ((1.0, 0), (0.75, 0), (1.0, 5), (0.75, 5), (1e-6, 0), (1.0, 1)):
        nucleus = {}  # the fewest top-k tokens that hold top_p of their mass
        kept = ranked[:top_k or 12]
        for token in kept:
            if sum(nucleus.values()) < top_p * sum(exact[t] for t in kept):
                nucleus[token] = exact[token]
        probs = [nucleus.get(t, 0.0) / sum(nucleus.values()) for t in range(12)]
        [rows] = generate(params, config, [[3, 1, 4]], num_samples=2000, max_new_tokens=1,
                          temperature=0.8, top_p=top_p, top_k=top_k, max_batch=2000)
        counts = [sum(row.tokens == [t] for row in rows) for t in range(12)]
        if len(nucleus) == 1:
            assert counts[ranked[0]] == 2000
        else:
            assert _chi_square(counts, probs), (top_p, top_k, counts, probs)


def test_generate_nucleus_of_a_flat_distribution():
    """Top-p sorts about a thousand tokens first, and all of them if those hold too little."""
    logits = torch.zeros(2, 5000)
    logits[0, 7] = 20.0
    for noise in (0.1, 0.9999):
        tokens, logprobs = sample_tokens(logits, torch.full((2,), noise), top_p=0.9)
        assert tokens[0] == 7 and abs(float(logprobs[1].exp()) - 1 / 5000) < 1e-6
    seen = {int(sample_tokens(logits, torch.full((2,), i / 64), top_p=0.9)[0][1])
            for i in range(64)}
    assert len(seen) == 64, "64 noise levels draw 64 of the flat row's 4,500 tokens"


def test_generate_never_draws_a_token_of_weight_zero():
    weights = torch.zeros(3, 128)
    weights[0, 5] = 0.3
    weights[1, 127] = 1e-30
    weights[2, 0] = 1.0
    weights[2, 64] = 1e-8
    for noise in (0.0, 0.5, 1 - 2**-24):
        drawn = inverse_cdf(weights, torch.full((3, 1), noise))
        assert (weights.gather(1, drawn) > 0).all()


def test_generate_noise_is_uniform_and_independent():
    keys = torch.tensor([row_key(0, i // 50, i % 50) for i in range(2500)])
    noise = torch.stack([uniform(keys, torch.full_like(keys, n)) for n in range(40)])  # [40, 2500]
    assert noise.min() >= 0 and noise.max() < 1
    assert _chi_square(torch.histc(noise, 50, 0, 1).tolist(), [1 / 50] * 50)
    # pairs with the next draw of the same row, and with the same draw of the next row
    for other in (noise.roll(1, 0), noise.roll(1, 1)):
        pairs = torch.histc((noise * 8).floor() * 8 + (other * 8).floor(), 64, -0.5, 63.5)
        assert _chi_square(pairs.tolist(), [1 / 64] * 64)


def test_generate_finish_reasons():
    params, config, tokenizer = _repeating_model("abcdefghi")
    prompt = tokenizer.encode("a").ids
    settings = {"max_new_tokens": 60, "temperature": 0, "tokenizer": tokenizer}

    def complete(**changes):
        [[answer]] = generate(params, config, [prompt], **settings | changes)
        return tokenizer.decode(answer.tokens), answer.finish

    assert complete(max_new_tokens=5) == ("bcdef", "length")
    stop = tokenizer.encode("d").ids
    assert complete(stop_tokens=stop) == ("bcd", "stop"), "the stop token is kept"
    assert complete(stop_strings=["zz", "ef"]) == ("bcdef", "stop")
    assert complete(repetition=40) == (("bcdefghia" * 5)[:40], "repetition"), "40 > 4 x 9"
    assert complete(repetition=32)[1] == "length", "32 < 4 x 9"


def _think(text, prompt, max_new_tokens, **limits):
    """(text, Completion) of _repeating_model(text). Forced tokens have logprobs like all others."""
    params, config, tokenizer = _repeating_model(text)
    prompt = tokenizer.encode(prompt).ids
    [[answer]] = generate(params, config, [prompt], max_new_tokens=max_new_tokens, temperature=0,
                          tokenizer=tokenizer, **limits)
    assert len(answer.tokens) == len(answer.logprobs) == max_new_tokens
    assert _gaps(params, config, [prompt], [[answer]]).max() < 1e-4
    return tokenizer.decode(answer.tokens), answer


def test_generate_thinking_budget_closes_the_block():
    output, answer = _think("abcdefghi", "<think>\na", 40, think_budget=6)
    assert output.startswith("bcdefg\n</think>\n")
    assert answer.forced == list(range(6, 16))
    _, other = _think("abcdefghi", "a", 40, think_budget=6)
    assert other.forced == [], "no block was opened"


def test_generate_thinking_minimum_reopens_the_block():
    """The model closes its block after one letter; "Wait" replaces the closing tag."""
    output, answer = _think("a</think>", "<think>>", 30, think_minimum=12)  # "a" follows ">"
    assert output.startswith("aWaithink>a</think>a"), output
    assert answer.forced == [1, 2, 3, 4]


def test_generate_runs_on_adapters_and_packed_weights():
    """Adapters are merged, packing does not change the output, and weights are packed only once."""
    params, config = _sampler()
    lora = {name: tensor + 0.3 if "lora_B" in name else tensor
            for name, tensor in init_lora(config, 2, 0).items()}

    def sample(params):
        return _tokens(generate(params, config, _PROMPTS, max_new_tokens=12, temperature=0.9))

    adapted = sample(params | lora)
    assert sample(params) != adapted
    assert sample(merge_lora(params | lora)) == adapted
    packed = sampling_params(params | lora, config)
    assert sample(packed) == adapted
    again = sampling_params(packed, config)
    assert again.keys() == packed.keys()
    assert all(again[name] is packed[name] for name in packed if packed[name].is_mkldnn)


def test_generate_runs_the_models_own_block():
    """Editing `model.block` also edits the sampler: its log-probabilities still match the scorer's.
    """
    params, config = _sampler()
    block = model.block

    def edited(params, config, layer, x, *rest):
        return block(params, config, layer, x, *rest) * 1.1 + 0.01 * layer

    settings = {"num_samples": 2, "max_new_tokens": 20}
    plain = _tokens(generate(params, config, _PROMPTS, **settings))
    with mock.patch.object(model, "block", edited):
        answers = generate(params, config, _PROMPTS, **settings)
        assert _gaps(params, config, _PROMPTS, answers).max() < 1e-4
    assert _tokens(answers) != plain


def test_generate_in_bfloat16_stays_near_the_scorer():
    params, config = _sampler()
    half = {name: tensor.bfloat16() for name, tensor in params.items()}
    answers = generate(half, config, _PROMPTS, num_samples=2, max_new_tokens=16)
    assert 0 < _gaps(params, config, _PROMPTS, answers).mean() < 0.1


@contextmanager
def _static(captured):
    """Make `generate` use an Engine on the CPU, without graphs and with common.py's varlen_attn.

    captured: a list that receives the keys of the graphs that a GPU would capture.
    """
    def graph_step(engine, state, settings, step_fn):
        key = len(state.tokens), settings
        if key not in engine.graphs:
            captured.append(key)
            engine.graphs[key] = None
        return state, step_fn

    with varlen_on_cpu(), mock.patch.multiple(
            generate_module, has_varlen=lambda device, dtype: True, graph_step=graph_step,
            sampling_params=lambda params, config: params):  # packed tensors have no address
        yield


def test_generate_static_engine_equals_the_plain_batch():
    params, config = _sampler()
    settings = {"num_samples": 3, "max_new_tokens": 18, "stop_tokens": {5, 6}, "temperature": 0.9}
    limits = [[3, 17, 11], [18, 1, 2], [7, 7, 9]]
    for changes in ({}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}, {"max_batch": 4},
                    {"max_new_tokens": limits},
                    {"on_token": lambda prompt, sample, tokens: None}):
        plain = generate(params, config, _PROMPTS[:3], **settings | changes)
        with _static(captured := []):
            static = generate(params, config, _PROMPTS[:3], **settings | changes)
        assert _tokens(static) == _tokens(plain), changes
        gaps = [abs(x - y) for a, b in zip(sum(plain, []), sum(static, []))
                for x, y in zip(a.logprobs, b.logprobs)]
        assert max(gaps) < 1e-4
        assert len(captured) == len(set(captured)) <= 5


def test_generate_static_engine_keeps_its_graphs_unless_the_weights_move():
    params, config = _sampler()
    engine = generate_module.Engine()
    with _static(captured := []):
        for _ in range(2):
            generate(params, config, _PROMPTS, num_samples=2, max_new_tokens=9, engine=engine)
        first = list(captured)
        with mock.patch.object(torch.backends.mkldnn, "is_available", lambda: False):
            kept = sampling_params({name: 2 * t for name, t in params.items()}, config, out=params)
        changed = generate(kept, config, _PROMPTS, num_samples=2, max_new_tokens=9, engine=engine)
        assert captured == first and len(first) == len(set(first))
        other = {name: tensor.clone() for name, tensor in params.items()}
        generate(other, config, _PROMPTS, max_new_tokens=9, engine=engine)
        assert len(captured) > len(first)  # or the graphs would read freed memory
    assert _tokens(changed) == _tokens(generate(params, config, _PROMPTS, num_samples=2,
                                                max_new_tokens=9))


def test_generate_static_engine_keeps_its_cache_between_calls_of_two_kinds():
    """Many short rows and few long ones alternate without reallocating or capturing again."""
    params, config = _sampler()
    engine = generate_module.Engine()
    caches = []
    with _static(captured := []):
        for prompts in ([[5]] * 8, [[5] * 200] * 4, [[5]] * 8, [[5] * 200] * 4):
            generate(params, config, prompts, max_new_tokens=9, engine=engine)
            caches.append((engine.cache.layers[0][0].data_ptr(), len(captured)))
    assert caches[0] != caches[1] and caches[1][0] == caches[2][0] and caches[2] == caches[3]


def test_generate_static_engine_reseats_only_for_free_places():
    """With max_batch 3 in 4 places, rows used to be reseated after every few steps."""
    params, config = _sampler()
    seat = mock.Mock(wraps=generate_module.seat_in_slots)
    with _static([]), mock.patch.object(generate_module, "seat_in_slots", seat):
        generate(params, config, _PROMPTS[:1], num_samples=4, max_new_tokens=64, max_batch=3)
    assert seat.call_count == 2


def test_generate_step_of_the_static_engine_compiles_to_one_graph():
    """Traced without a compiler: fullgraph raises at a graph break."""
    params, config = _sampler(num_hidden_layers=3)
    compiled = torch.compile(decode_step, backend="aot_eager", fullgraph=True, dynamic=False)
    settings = {"num_samples": 2, "max_new_tokens": 6, "temperature": 0.9}
    with _static([]):
        plain = generate(params, config, _PROMPTS[:2], **settings)
        on_cpu = attention.varlen_attn

        @torch.library.custom_op("tests::varlen", mutates_args=())
        def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor,
               k_starts: torch.Tensor, max_k: int, held: torch.Tensor) -> torch.Tensor:
            return on_cpu(q, k, v, q_starts, k_starts, 1, max_k, enable_gqa=True, seqused_k=held)

        @op.register_fake
        def fake(q, *rest):
            return torch.empty_like(q)

        def varlen_attn(q, k, v, q_starts, k_starts, max_q, max_k, seqused_k=None, **causal):
            if seqused_k is None:
                return on_cpu(q, k, v, q_starts, k_starts, max_q, max_k, **causal)
            return op(q, k, v, q_starts, k_starts, max_k, seqused_k)

        with mock.patch.object(generate_module, "decode_step", compiled), \
                mock.patch.object(attention, "varlen_attn", varlen_attn):
            assert _tokens(generate(params, config, _PROMPTS[:2], **settings)) == _tokens(plain)
        # eight batch sizes, greedy and not; past the recompile limit nothing is compiled
        with mock.patch.object(torch, "compile", lambda step_fn, **settings: step_fn), \
                torch._dynamo.config.patch(recompile_limit=8):
            generate(params, config, _PROMPTS[:2], compiled=True, **settings)
            assert torch._dynamo.config.recompile_limit > 16


def test_generate_reports_completions_as_they_end():
    """Answers used to be reported in large batches, after minutes without progress."""
    params, config = _sampler()
    calls = []
    answers = generate(params, config, _PROMPTS, num_samples=2, max_new_tokens=30, max_batch=3,
                       stop_tokens=range(5), on_step=lambda *call: calls.append(call))
    ended = [item for call in calls for item in call[0]]
    assert sorted(item[:2] for item in ended) == [(p, s) for p in range(4) for s in range(2)]
    assert all(completion is answers[p][s] for p, s, completion in ended)
    total = sum(len(c.tokens) for row in answers for c in row)
    assert sum(num_tokens for _, num_tokens in calls) == total
    assert any(num_tokens and not ended for ended, num_tokens in calls), "some report only tokens"


def test_generate_rejects_bad_input():
    params, config = _sampler()
    good = {"prompts": [[1, 2]], "max_new_tokens": 4}
    for changes, words in (({"prompts": [[1], []]}, "prompt 1 has 0 tokens"),
                           ({"prompts": [[1] * 512]}, "512 tokens"),
                           ({"prompts": [[61]]}, "vocabulary of 61"),
                           ({"temperature": -1}, "temperature is -1"),
                           ({"temperature": float("nan")}, "temperature is nan"),
                           ({"top_p": 0}, "top_p is 0"),
                           ({"top_p": 1.5}, "top_p is 1.5"),
                           ({"top_k": -2}, "top_k is -2"),
                           ({"num_samples": 0}, "num_samples is 0"),
                           ({"max_new_tokens": 0}, "max_new_tokens is 0"),
                           ({"max_batch": 0}, "max_batch is 0"),
                           ({"stop_strings": ["x"]}, "need the tokenizer")):
        with raises(ValueError, words):
            generate(params, config, **good | changes)
    assert generate(params, config, [], max_new_tokens=4) == []


def test_generate_streams_text_with_its_thinking_dimmed_or_hidden():
    tokenizer = bytes_tokenizer()
    text = "Hm. <think>\n1 < 2\u00e9\n</think>\n\\boxed{2} <thin"
    dimmed = text.replace("<think>", "\033[2m<think>").replace("</think>", "</think>\033[0m")
    ids = tokenizer.encode(text).ids
    for hide, dim, expected in ((False, False, text), (True, False, "Hm. \n\\boxed{2} <thin"),
                                (False, True, dimmed)):
        written = []
        show = text_streamer(tokenizer, {0}, written.append, hide=hide, dim=dim)
        for n in range(1, len(ids) + 1):
            show(ids[:n])
            assert not "".join(written).endswith("<"), "the beginning of a tag is held back"
        show([*ids, 0], last=True)
        assert "".join(written).replace("\033[0m\033[2m", "") == expected, written


def _chat(lines, *words):
    """What a chat with the tiny model prints, given these lines as input."""
    with mock.patch("builtins.input", mock.Mock(side_effect=[*lines, EOFError])):
        return in_process("generate", "--temperature", 0, "--max-new-tokens", 20, *words)


def test_generate_chat_prints_its_keys_and_resets():
    printed = _chat(["", "  ", "What is 3 + 4?", "/reset", "What is 3 + 4?", "/reset", "\udcff"])
    first, printed = printed.split("\n", 1)
    assert first.startswith("tiny on ") and "Ctrl-D quits" in first and "/reset" in first
    one, two, three = printed.split("(new conversation)\n")
    assert one == two and "<think>" in one and three


def test_generate_chat_drops_old_turns_and_survives_errors():
    requests = []

    def answer(text, seed, sample):
        requests.append(text)
        if text.endswith("stop<|im_end|>\n<|im_start|>assistant\n"):
            raise KeyboardInterrupt
        if text.endswith("fail<|im_end|>\n<|im_start|>assistant\n"):
            raise RuntimeError("out of memory")
        return "\033[2Jyes"

    params, config, tokenizer = small_model()
    with (mock.patch.object(model, "load_params", lambda *_: params),
          mock.patch.object(model, "load_config", lambda _: config),
          mock.patch.object(model, "load_tokenizer", lambda _: tokenizer),
          mock.patch("generate.generate", scripted(answer))):
        printed = _chat(["one", "fail", "stop", "two", "x" * 1200, "y" * 1200])
    assert "no answer: out of memory" in printed and "no answer: stopped" in printed
    assert all(word in requests[3] for word in ("one", "yes", "two")), "the conversation goes on"
    assert "fail" not in requests[3] and "stop" not in requests[3]
    assert "two" in requests[4]
    assert "xx" not in requests[5] and "yy" in requests[5], "the oldest turns are dropped first"
    assert printed.count("dropped") == 1, printed
    assert "the 6 oldest messages were dropped" in printed, printed
    assert r"\x1b[2Jyes" in printed and "\033" not in printed, "no escape code reaches the terminal"


def test_generate_chat_survives_a_question_that_fills_the_context():
    printed = _chat(["What is 3 + 4?", "1 + " * 600, "What is 3 + 4?"])
    assert "no answer: prompt 0 has" in printed and "dropped" not in printed, printed
    assert printed.count("<think>") == 2
