"""Qwen-2.5 as plain functions over the dict of tensors that its safetensors files hold.

The checkpoint is the model: `params` maps Hugging Face names to tensors, and `forward(params,
config, tokens)` is a function of it. The reference model is another dict; a LoRA adapter is a small
dict laid over the first, `params | lora`. First comes the model, then its files.

    path = resolve_model("qwen2.5-1.5b")
    params, config = load_params(path), load_config(path)
    logits = forward(params, config, tokens)      # [B, T] -> [B, T, V] float32
    save_model("out", params, config, like=path)  # a directory that transformers loads as it is

Qwen2.5, arXiv:2412.15115; RMSNorm, arXiv:1910.07467; rotary positions, arXiv:2104.09864; YaRN,
arXiv:2309.00071; SwiGLU, arXiv:2002.05202; LoRA, arXiv:2106.09685.
"""

import difflib
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

import attention
from attention import causal_attention, padded_length

# ------------------------------------------------------------ config


class Yarn(NamedTuple):
    """rope_scaling as Qwen-2.5 documents it for contexts beyond the trained one."""
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Config(NamedTuple):
    """The frozen numbers of config.json, under its names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    rope_scaling: Yarn | None = None
    eos_token_id: tuple[int, ...] = ()  # of config.json and generation_config.json together

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def max_context(self):
        """Tokens that the positions reach: the trained length, or what YaRN stretches it to."""
        yarn = self.rope_scaling
        stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, stretched)


def is_tiny(config):
    """Whether this is the embedded model, or trained from it: it knows generated problems only."""
    return config.hidden_size * config.num_hidden_layers < 4096


# ------------------------------------------------------------ the transformer


def project(x, weight, bias=None):
    """x @ weight.T + bias: [..., in] -> [..., out]. The sampler packs its weights for oneDNN."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(params, name, x):
    """The linear layer `name`, and its adapter when `params` holds one: [..., in] -> [..., out]."""
    out = project(x, params[name + ".weight"], params.get(name + ".bias"))
    if (down := params.get(name + ".lora_A.weight")) is not None:
        # added: merged into bfloat16 weights, small updates would be lost
        up = params[name + ".lora_B.weight"]
        out = out + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
    return out


# layers of one input, whose weights the sampler joins; one that `block` calls alone must leave
JOINED = {"self_attn.": ("q_proj", "k_proj", "v_proj"), "mlp.": ("gate_proj", "up_proj")}


def linears(params, pre, part, sizes, x):
    """The JOINED layers of a part of layer `pre`: an output of each size."""
    names = JOINED[part]
    if pre + part + "+".join(names) + ".weight" in params:
        return linear(params, pre + part + "+".join(names), x).split(sizes, -1)
    return [linear(params, pre + part + name, x) for name in names]


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension, computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rope_frequencies(config, device="cpu"):
    """Radians per position of each pair of dimensions: [head_dim / 2]; YaRN stretches some."""
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / half
    # the published order of operations: at position 100,000 one rounding shows in the logits
    periods = config.rope_theta**exponents  # over 2 pi
    yarn = config.rope_scaling
    if yarn is None:
        return 1 / periods

    def pair_of(turns):  # the pair that turns so often in the trained context (YaRN, section 3.2)
        period = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return half * math.log(period) / math.log(config.rope_theta)

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = (torch.arange(half, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1: turns often, is kept; 0: below one turn, interpolated
    return 1 / (yarn.factor * periods) * (1 - keep) + 1 / periods * keep


def rope_table(config, positions, dtype):
    """cos and sin at `positions` [B, T], [B, 1, T, head_dim] each, as `rotate` takes them."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    angles = torch.cat((-angles, angles), -1)[:, None]  # the two dimensions of a pair
    scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + head_dim / 2) of x [B, H, T, head_dim] by their angles."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def block(params, config, layer, x, cos, sin, attend_fn):
    """One transformer layer: x [B, T, D] -> [B, T, D]. The only one: the sampler calls it, too."""
    B, T, D = x.shape
    KV, MLP = config.num_key_value_heads * config.head_dim, config.intermediate_size
    pre = f"model.layers.{layer}."

    h = rms_norm(x, params[pre + "input_layernorm.weight"], config.rms_norm_eps)
    qkv = linears(params, pre, "self_attn.", (D, KV, KV), h)
    q, k, v = (part.view(B, T, -1, config.head_dim).transpose(1, 2) for part in qkv)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, head_dim], [B, K, T, head_dim]
    out = attend_fn(layer, q, k, v).transpose(1, 2).reshape(B, T, D)
    x = x + linear(params, pre + "self_attn.o_proj", out)

    h = rms_norm(x, params[pre + "post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = linears(params, pre, "mlp.", (MLP, MLP), h)  # [B, T, MLP] each
    return x + linear(params, pre + "mlp.down_proj", F.silu(gate) * up)


def hidden_states(params, config, tokens, positions=None, attend_fn=causal_attention,
                  checkpointing=False):
    """What the head reads: tokens [B, T] at positions [B, T] (default 0, 1, ...) -> [B, T, D].

    checkpointing: keep only each layer's input for the backward pass, and compute the rest again
    (arXiv:1604.06174).
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    x = F.embedding(tokens, params["model.embed_tokens.weight"])  # [B, T, D]
    cos, sin = rope_table(config, positions, x.dtype)

    def run_layer(layer, x):
        return block(params, config, layer, x, cos, sin, attend_fn)

    for layer in range(config.num_hidden_layers):
        if checkpointing and torch.is_grad_enabled():  # it walks all that it is given
            x = checkpoint(run_layer, layer, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run_layer(layer, x)
    return rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)


def packed_hidden_states(params, config, tokens, groups, checkpointing=False, store=None):
    """hidden_states of one packed row: tokens [T] -> [T, D]. groups, store: as packed_attention's.
    """
    T = len(tokens)
    extra = padded_length(T) - T if tokens.device.type == "cpu" else 0
    if extra:
        groups = [*groups, (0, [extra])]  # a text of its own that nothing reads
    dtype = params["model.embed_tokens.weight"].dtype
    attend_fn = attention.packed_attention(groups, tokens.device, dtype, store)
    positions = attention.packed_positions(groups).to(tokens.device)
    tokens = F.pad(tokens, (0, extra))[None]
    return hidden_states(params, config, tokens, positions, attend_fn, checkpointing)[0, :T]


def head_weight(params):
    """[V, D]: of the head, or of the embedding when the two are tied."""
    return params.get("lm_head.weight", params["model.embed_tokens.weight"])


def lm_head(hidden, weight, temperature=1.0):
    """Logits in float32: hidden [..., D], weight [V, D] -> [..., V]."""
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if hidden.is_cuda and hidden.dtype != torch.float32 and not learns:  # it has no derivative
        logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)
        logits = logits.unflatten(0, hidden.shape[:-1])
    else:
        logits = project(hidden, weight).float()
    return logits if temperature == 1 else logits / temperature


def init_cache(config, batch, slots, device="cpu", dtype=torch.float32):
    """An empty cache for `batch` rows of at most `slots` tokens."""
    L, K = config.num_hidden_layers, config.num_key_value_heads
    k, v = torch.zeros(2, L, batch, K, slots, config.head_dim, device=device, dtype=dtype)
    return attention.Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


def forward(params, config, tokens, positions=None, cache=None):
    """Logits of every position: tokens [B, T] -> [B, T, V] float32.

    positions: [B, T], absolute; default 0, 1, ..., or with a cache, on from what each row holds.
    cache: from init_cache; written in place. Rows of different lengths stand left-aligned: what
    lies behind a row's real end is never seen once `positions` says where the row really goes on.
    Raises ValueError when the tokens outgrow the context or the cache.
    """
    T = tokens.shape[1]
    if cache is None:
        if T > config.max_context:
            raise ValueError(f"{T} tokens do not fit the context of {config.max_context}")
        return lm_head(hidden_states(params, config, tokens, positions), head_weight(params))
    if positions is None:
        positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)
    if (last := int(positions.max())) >= cache.k.shape[3]:
        raise ValueError(f"position {last} does not fit a cache of {cache.k.shape[3]} slots")
    attend_fn = attention.cached_attention(cache, positions)
    hidden = hidden_states(params, config, tokens, positions, attend_fn)
    cache.lengths.copy_(positions[:, -1] + 1)
    return lm_head(hidden, head_weight(params))


# ------------------------------------------------------------ log-probabilities


def head_slice(vocab_size, device):
    """Positions whose logits are made at a time: 0.5 GiB on a GPU, a CPU's cache; at least 128."""
    return max(128, (2**21 if device == "cpu" else 2**27) // vocab_size)


class HeadLogprobs(torch.autograd.Function):
    """What `head_logprobs` returns, slice by slice; the backward pass makes the logits again.

    Nothing of [positions, V] outlives its slice: with 151,936 words, 8,192 positions of float32
    logits and their gradient would take 9.3 GiB. Where all positions are one slice, the backward
    pass, which begins here, finds its probabilities kept; no peak is higher for it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, slice_tokens, entropy_grad):
        logprobs = torch.empty_like(targets, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for begin in range(0, len(targets), slice_tokens):
            part = slice(begin, begin + slice_tokens)
            logp = lm_head(hidden[part], weight, temperature).log_softmax(-1)  # [n, V]
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            p = logp.exp()
            entropy[part] = -logp.mul_(p).sum(-1)
        kept = [p] if 0 < len(targets) <= slice_tokens else []
        ctx.save_for_backward(hidden, weight, targets, entropy, *kept)
        ctx.settings = temperature, slice_tokens, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """For logits z: d log p(target) / dz = onehot(target) - p, and dH / dz = -p (log p + H)."""
        hidden, weight, targets, entropy, *kept = ctx.saved_tensors
        temperature, slice_tokens, entropy_grad = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for begin in range(0, len(targets), slice_tokens):
            part = slice(begin, begin + slice_tokens)
            p = kept[0] if kept else lm_head(hidden[part], weight, temperature).softmax(-1)
            of_logprobs = grad[part, None] / temperature
            grad_logits = p * -of_logprobs  # [n, V]
            if entropy_grad:
                of_entropy = torch.special.xlogy(p, p).addcmul_(p, entropy[part, None])
                grad_logits -= of_entropy * (grad_entropy[part, None] / temperature)
            grad_logits.scatter_add_(1, targets[part, None], of_logprobs)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if ctx.needs_input_grad[1]:  # summed in float32
                product = grad_logits.T @ hidden[part]  # [V, D]
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        return grad_hidden, grad_weight, None, None, None, None


def head_logprobs(params, config, hidden, targets, temperature=1.0, slice_tokens=None,
                  entropy_grad=False):
    """log p(targets) and the entropy of the distribution, in nats: [N, D], [N] -> [N], [N] float32.

    The logits are divided by `temperature`, and made for `slice_tokens` positions at a time
    (default: head_slice). The entropy carries a gradient only where `entropy_grad` asks for it.
    """
    n = len(targets)
    extra = padded_length(n) - n
    hidden = F.pad(hidden, (0, 0, 0, extra))
    targets = F.pad(targets, (0, extra))
    slice_tokens = slice_tokens or head_slice(config.vocab_size, hidden.device.type)
    logprobs, entropy = HeadLogprobs.apply(hidden, head_weight(params), targets, temperature,
                                           slice_tokens, entropy_grad)
    return logprobs[:n], entropy[:n]


def token_logprobs(params, config, tokens, temperature=1.0, checkpointing=False):
    """Log-probability of every token but the first, given those before it, differentiable.

    tokens: [B, T] -> [B, T - 1] float32. Padding stands at the right of a row, where causal
    attention keeps it from mattering.
    """
    hidden = hidden_states(params, config, tokens, checkpointing=checkpointing)[:, :-1]
    targets = tokens[:, 1:].flatten()
    logprobs, _ = head_logprobs(params, config, hidden.flatten(0, 1), targets, temperature)
    return logprobs.view(hidden.shape[:2])


# ------------------------------------------------------------ LoRA

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def lora_shapes(config, rank):
    """{name: shape} of an adapter for every linear layer: lora_A [rank, in], lora_B [out, rank]."""
    shapes = {}
    for name, shape in param_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.endswith(LINEARS):
            shapes[stem + ".lora_A.weight"] = (rank, shape[1])
            shapes[stem + ".lora_B.weight"] = (shape[0], rank)
    return shapes


def init_lora(config, rank, seed, device="cpu"):
    """A float32 adapter for every linear layer: NAME.lora_A.weight [rank, in], lora_B [out, rank].

    B starts at zero, so that `params | lora` starts as `params`. The paper's alpha / rank is 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is not positive")
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, shape in lora_shapes(config, rank).items():
        tensor = torch.zeros(shape)
        if "lora_A" in name:
            bound = math.sqrt(3 / shape[1])  # Kaiming uniform, gain 1
            tensor = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        lora[name] = tensor.to(device)
    return lora


def merged_weight(params, name):
    """W + B A, computed in float32, where `params` has an adapter for this weight; else just W."""
    weight = params[name]
    down = params.get(name.removesuffix("weight") + "lora_A.weight")
    if down is None:
        return weight
    up = params[name.removesuffix("weight") + "lora_B.weight"]
    return (weight.float() + up.float() @ down.float()).to(weight.dtype)


def merge_lora(params):
    """A new dict with every adapter merged; weights without one are shared with `params`."""
    return {name: merged_weight(params, name) for name in params if ".lora_" not in name}


# ------------------------------------------------------------ finding a model

ROOT = Path(__file__).resolve().parent
HUB_SIZES = {"": ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"), "Math-": ("1.5B", "7B", "72B"),
             "Coder-": ("0.5B", "1.5B", "3B", "7B", "14B", "32B")}
HUB_IDS = {f"Qwen2.5-{kind}{size}{tuned}".lower(): f"Qwen/Qwen2.5-{kind}{size}{tuned}"
           for kind, sizes in HUB_SIZES.items() for size in sizes for tuned in ("", "-Instruct")}
MAX_JSON_BYTES = 2**26
MAX_LAYERS = 1000
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt"]


def did_you_mean(word, known):
    """The end of an error message that names what is known and spelled alike, or nothing."""
    near = difflib.get_close_matches(str(word).lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_model(name, config_only=False):
    """The directory of a model: "tiny", "qwen2.5-1.5b[-instruct]", a hub id, or a directory.

    The names ignore case. Hub models are taken from models/NAME beside this file where they are
    there, else downloaded through huggingface_hub; config_only: without their weights.
    Raises FileNotFoundError, saying how to place the files by hand, where there is neither.
    """
    if str(name).lower() == "tiny":
        return ROOT / "data" / "tiny"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    hub_id = HUB_IDS.get(str(name).lower(), str(name))
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
        raise FileNotFoundError(
            f"no model {str(name)!r}: expected a directory, a hub id such as Qwen/Qwen2.5-1.5B, "
            "tiny, or qwen2.5-[math-|coder-]SIZE[-instruct] with a size of "
            f"{', '.join(HUB_SIZES['']).lower()}{did_you_mean(name, ['tiny', *HUB_IDS])}")
    by_hand = ROOT / "models" / hub_id.split("/")[-1].lower()
    if by_hand.is_dir():
        return by_hand
    from huggingface_hub import snapshot_download
    patterns = [pattern for pattern in HUB_FILES if not (config_only and "safetensors" in pattern)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # not found, gated, offline, time-out, ...: they share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"no directory {str(name)!r}, and could not download {hub_id} ({reason}); place its "
            "config.json, generation_config.json, tokenizer.json, tokenizer_config.json and "
            f"*.safetensors in {by_hand}, or pass their directory") from None


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError that name the file."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would never end
        raise ValueError(f"{path}: expected a file, found something else")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; a model directory holds config.json, "
                                "tokenizer.json and *.safetensors") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
    return raw


# ------------------------------------------------------------ config.json


def check_numbers(record):
    """Raises ValueError for a field of a Config or a Yarn of another type, or not positive."""
    for name, kind in record.__annotations__.items():
        value = getattr(record, name)
        most = 2**31 if kind is int else 1e15
        fits = type(value) in (int, kind) and 0 < value < most
        if kind in (int, float) and not fits:
            whole = "integer" if kind is int else "number"
            raise ValueError(f"{name} is {value!r:.40}, expected a positive {whole} below {most:g}")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{name} is {value!r}, expected true or false")


def parse_yarn(raw, max_position_embeddings):
    """`rope_scaling` of a config.json as a Yarn; None for plain positions. Raises ValueError."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type {kind!r} is not supported; Qwen-2.5 documents 'yarn'")
    if unknown := sorted(raw.keys() - {"type", "rope_type", "rope_theta", *Yarn._fields}):
        raise ValueError(f"rope_scaling has {', '.join(unknown)}; expected only "
                         f"{', '.join(Yarn._fields)}")
    given = {"factor": None, "original_max_position_embeddings": max_position_embeddings}
    given |= {"attention_factor": 1.0}
    given |= {name: raw[name] for name in Yarn._fields if raw.get(name) is not None}
    check_numbers(yarn := Yarn(**given))
    if yarn.factor < 1:
        raise ValueError(f"rope_scaling factor is {yarn.factor}, expected 1 or more")
    if raw.get("attention_factor") is None:
        yarn = yarn._replace(attention_factor=0.1 * math.log(yarn.factor) + 1.0)  # YaRN, eq. 22
    return yarn


def parse_config(raw):
    """The Config of config.json's object. Raises ValueError unless it is computed here exactly."""
    if raw.get("model_type") != "qwen2":
        raise ValueError(f"model_type is {raw.get('model_type')!r}, expected 'qwen2'")
    for name, only in (("hidden_act", "silu"), ("use_sliding_window", False),
                       ("quantization_config", None)):
        if (raw.get(name) or only) != only:
            raise ValueError(f"{name} is {raw[name]!r}, expected {only!r}: what Qwen-2.5 does not "
                             "use is not implemented")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the latter: transformers 5
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}, expected an object")
    # what a file leaves out is what transformers takes it for
    given = {"rope_theta": 10000.0, "tie_word_embeddings": False}
    given |= {k: raw[k] for k in Config._fields if raw.get(k) is not None}
    given["rope_theta"] = rope.get("rope_theta") or given["rope_theta"]
    if missing := set(Config._fields) - set(Config._field_defaults) - set(given):
        raise ValueError(f"missing {', '.join(sorted(missing))}")
    config = Config(**given)
    check_numbers(config)
    if config.num_hidden_layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, expected at most "
                         f"{MAX_LAYERS}")
    heads, head_dim = config.num_attention_heads, raw.get("head_dim") or config.head_dim
    if config.hidden_size != head_dim * heads or head_dim % 2:
        raise ValueError(f"hidden_size {config.hidden_size} is not {heads} heads of an even "
                         f"head_dim; head_dim is {head_dim}")
    if heads % config.num_key_value_heads:
        raise ValueError(f"{heads} heads are no multiple of {config.num_key_value_heads} key/value "
                         "heads")
    return config._replace(rope_scaling=parse_yarn(rope, config.max_position_embeddings))


def load_config(model_dir):
    """The Config of a model directory. Raises FileNotFoundError or ValueError."""
    ends = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if name == "config.json" or path.is_file():
            raw = read_json(path)
            given = raw.get("eos_token_id")
            given = given if isinstance(given, list) else [] if given is None else [given]
            if any(type(end) is not int for end in given):
                raise ValueError(f"{path}: eos_token_id is {given}, expected integers")
            ends.update(given)
    try:
        return parse_config(raw)._replace(eos_token_id=tuple(sorted(ends)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_json(config):
    """The inverse of load_config: what transformers reads, as a dict."""
    raw = config._asdict()
    yarn = raw.pop("rope_scaling")
    if yarn:
        raw["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **yarn._asdict()}
    eos = list(config.eos_token_id)
    raw["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    return raw | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                  "hidden_act": "silu", "use_sliding_window": False}


# ------------------------------------------------------------ weights


def param_shapes(config):
    """{name: shape} of every tensor of a checkpoint, in the order of the published files."""
    D, MLP, V = config.hidden_size, config.intermediate_size, config.vocab_size
    KV = config.num_key_value_heads * config.head_dim
    of_layer = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (D, D), "self_attn.q_proj.bias": (D,),
        "self_attn.k_proj.weight": (KV, D), "self_attn.k_proj.bias": (KV,),
        "self_attn.v_proj.weight": (KV, D), "self_attn.v_proj.bias": (KV,),
        "self_attn.o_proj.weight": (D, D),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (MLP, D), "mlp.up_proj.weight": (MLP, D),
        "mlp.down_proj.weight": (D, MLP)}
    shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def init_params(config, seed, device="cpu", dtype=torch.float32):
    """Random weights: normal(0, initializer_range), smaller by 1 / sqrt(2 L) in the two projections
    of a layer that write to the residual stream, as in GPT-2."""
    generator = torch.Generator(device).manual_seed(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        std = config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        if len(shape) == 2:
            tensor = torch.randn(shape, generator=generator, device=device) * std
        else:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        params[name] = tensor.to(device, dtype)
    return params


def weight_files(model_dir):
    """model.safetensors, or else the shards that model.safetensors.index.json lists."""
    whole = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: holds no weight_map")
    return [model_dir / name for name in sorted(set(map(str, weight_map.values())))]


def load_params(model_dir, device="cpu", dtype=torch.float32, adapter=None):
    """The tensors of a model directory under their Hugging Face names, in `dtype` on `device`.

    adapter: the directory of one to lay over them, as for load_adapter.

    Files are memory-mapped and read tensor by tensor: never a second copy of the weights. On a CPU,
    tensors that are of `dtype` already stay views of the mapping, which is private: writing into
    them leaves the file as it is.
    Raises FileNotFoundError, or ValueError that names every missing, extra or misshapen tensor.
    """
    model_dir = Path(model_dir)
    config = load_config(model_dir)
    shapes = param_shapes(config)
    known = {"lm_head.weight": shapes["model.embed_tokens.weight"]} | shapes  # a tied head, stored
    params, wrong = {}, []
    seen = set()
    for path in weight_files(model_dir):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model directory holds "
                                    "model.safetensors, or an index and its shards")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():
                    seen.add(key)
                    shape = tuple(file.get_slice(key).get_shape())
                    kind = file.get_slice(key).get_dtype()
                    if key in known and shape == known[key] and kind in ("F32", "BF16", "F16"):
                        params[key] = file.get_tensor(key).to(dtype)
                    elif key in known:
                        wrong.append(f"{key} is {kind} {list(shape)}, expected {list(known[key])} "
                                     "of F32, BF16 or F16")
                    elif not key.endswith("rotary_emb.inv_freq"):  # a table that old exports hold
                        wrong.append(f"extra {key} {list(shape)}")
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None
    wrong += [f"missing {key} {list(shapes[key])}" for key in shapes if key not in seen]
    if config.tie_word_embeddings and not wrong and "lm_head.weight" in params:
        if not torch.equal(params["lm_head.weight"], params["model.embed_tokens.weight"]):
            wrong = ["lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings "
                     "is true"]
    if wrong:
        more = f"; and {len(wrong) - 50} more" if len(wrong) > 50 else ""
        raise ValueError(f"{model_dir}: the tensors do not fit its config.json: "
                         f"{'; '.join(wrong[:50])}{more}")
    params = {key: params[key] for key in shapes}
    return params | load_adapter(adapter, config, device) if adapter else params


def save_model(out_dir, params, config, like):
    """Write a directory that transformers, and every script here, loads as it is.

    like: the directory whose tokenizer, chat template and generation settings to copy. An adapter
    in `params` is merged, and kept in the subdirectory `adapter`, for PEFT. The directory appears
    whole, and only then replaces one of its name.
    Raises ValueError when `out_dir` holds something that is not a model.
    """
    out_dir = Path(out_dir).resolve()
    empty = not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir()))
    if not empty and not (out_dir / "config.json").is_file():
        raise ValueError(f"{out_dir} exists and is not a model directory; name another, or remove "
                         "it")
    staging, old = (out_dir.with_name(out_dir.name + end) for end in (".writing", ".replaced"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja", "vocab.json", "merges.txt"):
        if (Path(like) / name).is_file():
            shutil.copyfile(Path(like) / name, staging / name)
    merged = merge_lora(params)
    tensors = {name: merged[name].detach().cpu().contiguous() for name in param_shapes(config)}
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    text = json.dumps(config_json(config) | {"torch_dtype": dtype}, indent=2) + "\n"
    (staging / "config.json").write_text(text, encoding="utf-8")
    shutil.copymode(staging / "config.json", staging / "model.safetensors")  # not its owner's alone
    if any(".lora_" in name for name in params):
        save_adapter(staging / "adapter", params, like)
    for path in staging.rglob("*.*"):  # on the disk before the name says that it is whole
        with open(path, "r+b") as file:  # Windows syncs what it may write
            os.fsync(file.fileno())
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out_dir, old)
    os.replace(staging, out_dir)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------ adapters, in PEFT's format

PEFT_PREFIX = "base_model.model."
# Variants that change what is computed, though the tensors look the same.
PEFT_VARIANTS = ("alpha_pattern", "layer_replication", "alora_invocation_tokens", "use_qalora",
                 "use_bdlora")


def save_adapter(out_dir, params, base):
    """Write the adapter in `params` as PEFT's LoraConfig and tensors.

    base: the directory of the model that it was trained on, which PEFT is told.
    `PeftModel.from_pretrained(model, out_dir)` of the peft package loads it, as does load_adapter.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lora = {name: tensor for name, tensor in params.items() if ".lora_" in name}
    rank = next(tensor.shape[0] for name, tensor in lora.items() if ".lora_A." in name)
    targets = {name.split(".lora_")[0].split(".")[-1] for name in lora}
    raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
           "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(targets),
           "base_model_name_or_path": str(Path(base).resolve()), "inference_mode": True}
    path = out_dir / "adapter_config.json"
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous()
               for name, tensor in lora.items()}
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copymode(path, out_dir / "adapter_model.safetensors")


def adapter_rank(adapter_dir, rank=None):
    """The rank of a saved adapter. Raises ValueError where another `rank` is asked for."""
    found = read_json(Path(adapter_dir) / "adapter_config.json").get("r")
    if type(found) is not int or found < 1:
        raise ValueError(f"{adapter_dir}: r is {found!r}, expected a positive integer")
    if rank not in (None, found):
        raise ValueError(f"--lora-rank is {rank}, and {adapter_dir} holds an adapter of rank "
                         f"{found}; leave --lora-rank out, or pass a merged model as --model")
    return found


def load_adapter(adapter_dir, config, device="cpu"):
    """A LoRA adapter in PEFT's format, as `params` takes it: float32, alpha / rank within lora_B.

    It need not have a part for every linear layer. Raises FileNotFoundError, or ValueError for what
    does not fit `config` and for variants of LoRA that are not computed here.
    """
    adapter_dir = Path(adapter_dir)
    raw = read_json(adapter_dir / "adapter_config.json")
    rank = adapter_rank(adapter_dir)
    odd = [name for name in PEFT_VARIANTS if raw.get(name)]
    if raw.get("peft_type") != "LORA":
        odd.append(f"peft_type {raw.get('peft_type')}")
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian"):
        odd.append(f"init_lora_weights {raw['init_lora_weights']}")  # they change the base, too
    if odd:
        raise ValueError(f"{adapter_dir}: {', '.join(odd)}, expected plain LoRA; merge it with "
                         "PEFT, and pass the result as --model")
    alpha = raw.get("lora_alpha")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e15:
        raise ValueError(f"{adapter_dir}: lora_alpha is {alpha!r:.40}, expected a positive number")
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    shapes = lora_shapes(config, rank)
    path = adapter_dir / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; PEFT's save_pretrained writes it")
    lora, wrong = {}, []
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for key in file.keys():
                name = key.removeprefix(PEFT_PREFIX)
                shape = tuple(file.get_slice(key).get_shape())
                if shapes.get(name) != shape:
                    wrong.append(f"{name} is {list(shape)}, expected {shapes.get(name, 'no such')}")
                    continue
                tensor = file.get_tensor(key).float()
                lora[name] = tensor * scale if ".lora_B." in name else tensor
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None
    halves = Counter(name.split(".lora_")[0] for name in lora)
    wrong += [f"{name} has one half of two" for name, n in halves.items() if n < 2]
    if wrong or not lora:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong) or 'it is empty'}")
    return {name: lora[name] for name in shapes if name in lora}


# ------------------------------------------------------------ tokenizer and chat

INSTRUCT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CONTROL = re.compile(r"<\|\w+\|>")


def load_tokenizer(model_dir):
    """The tokenizers.Tokenizer of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy tokenizer.json from the model's page")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()  # a file may have been saved with them, and prompts be cut in silence
    tokenizer.no_padding()
    return tokenizer


def end_tokens(tokenizer, config):
    """The ids that end a completion: the config's, and ChatML's, which base models do not list."""
    chat = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    return chat - {None} | set(config.eos_token_id)


# A template is a program of unknown origin: it is rendered in a process of its own, with bounds.
RENDER = """
import sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
except (ImportError, ValueError, OSError):
    pass  # on Windows, say; there time alone is bounded
sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
template = sandbox.from_string(sys.stdin.buffer.read().decode())
text = template.render(messages=[{"role": "user", "content": ""}])
sys.stdout.buffer.write(text[:100_000].encode("utf-8", "replace"))
"""


@functools.cache
def render_template(template, timeout_s=10):
    """A chat template around an empty question. Raises ValueError when it fails or takes long."""
    try:
        done = subprocess.run([sys.executable, "-c", RENDER], timeout=timeout_s,
                              input=template.encode("utf-8", "replace"), capture_output=True)
    except subprocess.TimeoutExpired:
        raise ValueError(f"not within {timeout_s} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        raise ValueError(said or f"exit code {done.returncode}")
    return done.stdout.decode()


def load_system_prompt(model_dir):
    """The system turn that a model's chat template adds when there is none; None when it adds none.

    Found by rendering the template. Raises ValueError when it does not render.
    """
    path = Path(model_dir) / "chat_template.jinja"  # where transformers 5 keeps it
    if path.is_file():
        template = path.read_bytes().decode("utf-8", "replace")
    else:
        path = Path(model_dir) / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):
        return None
    try:
        text = render_template(template)
    except ValueError as error:
        raise ValueError(f"{path}: the chat template does not render ({error})") from None
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found[1] if found else None


def with_system(messages, system):
    """The messages, behind a system turn when they bring none; system None: as they are."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render_chat(messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """ChatML as Qwen-2.5 defines it: [{"role": "user", "content": "Hi"}, ...] as one string.

    system: the turn put in front when the messages bring none; None for none.
    """
    text = ""
    for message in with_system(messages, system):
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def plain_pieces(text):
    """Yields (where it begins, a piece of the text), so cut that no piece names a control token."""
    begin = 0
    for found in CONTROL.finditer(text):  # behind its first character
        yield begin, text[begin:found.start() + 1]
        begin = found.start() + 1
    yield begin, text[begin:]


def encode_text(tokenizer, text):
    """The ids of a text in which names of control tokens, such as <|im_end|>, are plain text."""
    text = text.encode("utf-8", "replace").decode()  # half a character becomes a question mark
    ids = []
    for _, piece in plain_pieces(text):
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def encode_chat(tokenizer, messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """The ids of render_chat's string, but that no content can make a control token.

    A problem, a user or a teacher may write "<|im_end|>\\n<|im_start|>assistant": it stays text.
    """
    start, end = (tokenizer.encode(mark, add_special_tokens=False).ids
                  for mark in ("<|im_start|>", "<|im_end|>\n"))
    ids = []
    for message in with_system(messages, system):
        ids += start + encode_text(tokenizer, f"{message['role']}\n{message['content']}") + end
    return ids + (start + encode_text(tokenizer, "assistant\n") if add_generation_prompt else [])
