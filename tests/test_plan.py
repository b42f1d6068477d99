"""Tests of plan.py."""

import math
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import grpo
import losses
import model
from engine import cache_slots
from plan import ALLOWANCE_GIB, plan_grpo
from run import make_trainable
from tests.test_grpo import CONFIG_1_5B, TINY, _args

CONFIG_7B = model.Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages on the meta device, for a run that would be on a GPU."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.now = self.peak = 0

    def drop(self, key):
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out


def _fused_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """A GPU's fused kernel in place of scaled_dot_product_attention."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bias = None
    if attn_mask is not None:
        *rest, S = attn_mask.shape
        padded = q.new_zeros(*rest, -(-S // 16) * 16)
        bias = padded[..., :S].expand(*q.shape[:2], -1, -1)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, bias, True, 0.0, is_causal)[0]


def _traced_peak_gib(config, args):
    """Peak GiB of grpo.update on tensors without storage, for one full row."""
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused_attention)
    with attention, _LiveBytes() as counter:
        params = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16)
                  for name, shape in model.param_shapes(config).items()}
        params, optimizer = make_trainable(params, config, args, "meta")
        completion = grpo.Sequence([1] * 500, [-1.0] * 500, 0.5)
        row = [([1] * 96, [completion] * 8)] * 4  # 16,384 tokens
        counter.peak = counter.now
        policy = grpo.Policy(params, config, None, None)
        grpo.update(policy, None, optimizer, [row], losses.Total(16000, 16000), 1e-6, args)
        return counter.peak / 2**30


def test_plan_is_at_most_a_fifth_above_the_traced_peak():
    """And never below it: 1.5b with an adapter for 24 GB; four layers of 7b with all weights."""
    four_layers = CONFIG_7B._replace(num_hidden_layers=4)
    for config, words in ((CONFIG_1_5B, ["--lora-rank", 32]),
                          (four_layers, ["--no-checkpointing", "--lora-rank", 0]),
                          (four_layers, ["--lora-rank", 0])):
        args = _args(*words, "--max-new-tokens", 500, "--group", 8, "--prompts", 4, "--dtype",
                     "bfloat16", config=config)
        traced = _traced_peak_gib(config, args)
        plan = plan_grpo(config, args, 1, "cuda", prompt_tokens=96)
        planned = plan.update - ALLOWANCE_GIB["cuda"]
        # a GPU's sampler keeps its cache and weights, which are not traced
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        planned -= 2 * width * cache_slots(32, 4, 96, 500, True) / 2**30
        if args.lora_rank:
            planned -= 2 * sum(map(math.prod, model.param_shapes(config).values())) / 2**30
        assert 1.0 <= planned / traced < 1.2, (words, planned, traced)


def test_plan_counts_the_worked_examples_of_a_prompt():
    config = model.load_config(TINY)
    bare, with_examples = (
        plan_grpo(config, _args("--prompt", name, "--lora-rank", 0), 1, "cpu").update
        for name in ("question", "qwen-base-gsm8k"))
    assert with_examples > bare
