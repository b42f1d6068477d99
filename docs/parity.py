"""Compare a real checkpoint with transformers, and bfloat16 with float32. Needs `transformers`.

    python -m docs.parity DIR TEXT_FILE [TEXT_FILE ...]

Against transformers, in float32: the greedy continuation of each text's first 40 tokens, and the
log-probabilities of its first 1,000. Then bfloat16 weights against float32: the log-probabilities
of the same text, and those recorded while sampling.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import model
from engine import sampling_params
from generate import generate

NEW = 128  # tokens to generate


def reference(model_dir, texts):
    """(log-probabilities of each text, greedy continuation of each prefix) by transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected, greedy = [], []
    for text in texts:
        logp = theirs(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        expected.append(logp.gather(1, torch.tensor(text[1:])[:, None])[:, 0])
        out = theirs.generate(torch.tensor([text[:40]]), do_sample=False, max_new_tokens=NEW,
                              min_new_tokens=NEW, repetition_penalty=1.0)
        greedy.append(out[0, 40:].tolist())
    return expected, greedy


@torch.inference_mode()
def main(model_dir, *files):
    config = model.load_config(model_dir)
    tokenizer = model.load_tokenizer(model_dir)
    texts = [tokenizer.encode(Path(file).read_text(encoding="utf-8")).ids[:1000] for file in files]
    expected, greedy = reference(model_dir, texts)
    params = model.load_params(model_dir)
    answers = generate(params, config, [text[:40] for text in texts], max_new_tokens=NEW,
                       temperature=0)
    exact = [model.token_logprobs(params, config, torch.tensor([text]))[0] for text in texts]
    for file, [answer], tokens, ours, want in zip(files, answers, greedy, exact, expected):
        same = sum(a == b for a, b in zip(answer.tokens, tokens))
        print(f"{file}: {same} of {NEW} greedy tokens match transformers; log-probabilities of "
              f"{len(ours)} tokens differ by at most {(ours - want).abs().max():.1e}")
    half = sampling_params(model.load_params(model_dir, dtype=torch.bfloat16), config)
    for file, text, ours in zip(files, texts, exact):
        gap = model.token_logprobs(half, config, torch.tensor([text]))[0] - ours
        [[answer]] = generate(half, config, [text[:-NEW]], max_new_tokens=NEW)
        scored = model.token_logprobs(params, config, torch.tensor([text[:-NEW] + answer.tokens]))
        drawn = torch.tensor(answer.logprobs) - scored[0, -NEW:]
        print(f"{file}: bfloat16 against float32: scored, mean error {gap.abs().mean():.4f}, "
              f"maximum {gap.abs().max():.3f}; sampled after {len(text) - NEW} tokens, mean error "
              f"{drawn.abs().mean():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
