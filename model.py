"""Qwen-2.5 as plain functions over the dict of tensors in its safetensors files.

The checkpoint is the model: `params` maps Hugging Face names to tensors, and `forward(params,
config, tokens)` is a plain function of it. The reference model is another dict, and a LoRA adapter
is a small dict on top: `params | lora`. Below the model come loading, saving and chat templates.

    path = resolve_model("qwen2.5-1.5b")
    params, config = load_params(path), load_config(path)
    logits = forward(params, config, tokens)      # [B, T] -> [B, T, V] float32
    save_model("out", params, config, like=path)  # a directory that transformers can load

Qwen2.5, arXiv:2412.15115; RMSNorm, arXiv:1910.07467; rotary positions, arXiv:2104.09864; YaRN,
arXiv:2309.00071; SwiGLU, arXiv:2002.05202; LoRA, arXiv:2106.09685.
"""

import difflib
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

import attention

# ------------------------------------------------------------ config


class Yarn(NamedTuple):
    """rope_scaling as documented by Qwen-2.5 for contexts longer than the trained one."""
    factor: float
    original_max_position_embeddings: int


class Config(NamedTuple):
    """The fields of config.json that define the model, under their original names."""
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
    eos_token_id: tuple[int, ...] = ()

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def max_context(self):
        """Longest sequence in tokens: the trained length, or YaRN's extension of it."""
        yarn = self.rope_scaling
        extended = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, extended)


def is_tiny(config):
    """True for the embedded model and its fine-tunes, which know only the generated problems."""
    return config.hidden_size * config.num_hidden_layers < 4096


def param_shapes(config):
    """{name: shape} of every tensor in a checkpoint, in the order of the published files."""
    D, MLP, V = config.hidden_size, config.intermediate_size, config.vocab_size
    KV = config.num_key_value_heads * config.head_dim
    layer_shapes = {
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
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def init_params(config, seed, device="cpu", dtype=torch.float32):
    """Random weights from normal(0, initializer_range). As in GPT-2, the two projections in each
    layer that write to the residual stream are scaled by 1 / sqrt(2 L)."""
    generator = torch.Generator(device).manual_seed(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        if len(shape) == 2:
            std = config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * config.num_hidden_layers)
            tensor = torch.randn(shape, generator=generator, device=device) * std
        else:
            tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        params[name] = tensor.to(device, dtype)
    return params


# ------------------------------------------------------------ the transformer


def rope_frequencies(config, device="cpu"):
    """Radians per position for each pair of dimensions [head_dim / 2]; a scale for cos and sin."""
    half = config.head_dim // 2
    pairs = torch.arange(half, dtype=torch.float32, device=device)
    # in transformers' order of operations: at position 100,000 one rounding shows in the logits
    periods = config.rope_theta ** (pairs / half)  # divided by 2 pi
    yarn = config.rope_scaling
    if yarn is None:
        return 1 / periods, 1.0
    # the pairs that make 32 turns and 1 turn over the trained context (YaRN, section 3.2)
    trained = yarn.original_max_position_embeddings / (2 * math.pi)
    low = max(math.floor(half * math.log(trained / 32) / math.log(config.rope_theta)), 0)
    high = math.ceil(half * math.log(trained) / math.log(config.rope_theta))
    high = min(high, config.head_dim - 1)
    keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)  # 0: divide by the factor
    frequencies = 1 / (yarn.factor * periods) * (1 - keep) + 1 / periods * keep
    return frequencies, 0.1 * math.log(max(1, yarn.factor)) + 1  # equation 22


def rope_table(config, positions, dtype):
    """cos and sin for `rotate` at `positions` [B, T]: [B, 1, T, head_dim] each."""
    frequencies, scale = rope_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((-angles, angles), -1)[:, None]  # `rotate` subtracts the first half's sines
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Rotate each pair (i, i + head_dim / 2) of x [B, H, T, head_dim] by its angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def project(x, weight, bias=None):
    """x @ weight.T + bias: [..., in] -> [..., out]."""
    if weight.is_mkldnn:  # packed by the sampler
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(params, name, x):
    """The linear layer `name`, plus its adapter if `params` has one: [..., in] -> [..., out]."""
    out = project(x, params[name + ".weight"], params.get(name + ".bias"))
    if name + ".lora_A.weight" in params:  # merging into bfloat16 would lose small updates
        down, up = (params[name + end].to(x.dtype) for end in (".lora_A.weight", ".lora_B.weight"))
        out = out + F.linear(F.linear(x, down), up)
    return out


# Linear layers with the same input, which the sampler fuses; `block` must call them together.
FUSED = {"self_attn.": ("q_proj", "k_proj", "v_proj"), "mlp.": ("gate_proj", "up_proj")}


def fused_linears(params, pre, part, sizes, x):
    """Outputs of the FUSED[part] layers under the prefix `pre`, [..., size] for each size."""
    names = FUSED[part]
    fused = pre + part + "+".join(names)
    if fused + ".weight" in params:
        return linear(params, fused, x).split(sizes, -1)
    return [linear(params, pre + part + name, x) for name in names]


def block(params, config, layer, x, cos, sin, attend_fn):
    """One transformer layer, for training and for sampling: x [B, T, D] -> [B, T, D]."""
    B, T, D = x.shape
    KV, MLP = config.num_key_value_heads * config.head_dim, config.intermediate_size
    pre = f"model.layers.{layer}."

    h = F.rms_norm(x, (D,), params[pre + "input_layernorm.weight"], config.rms_norm_eps)
    qkv = fused_linears(params, pre, "self_attn.", (D, KV, KV), h)
    q, k, v = (part.view(B, T, -1, config.head_dim).transpose(1, 2) for part in qkv)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, head_dim], [B, K, T, head_dim]
    out = attend_fn(layer, q, k, v).transpose(1, 2).reshape(B, T, D)
    x = x + linear(params, pre + "self_attn.o_proj", out)

    h = F.rms_norm(x, (D,), params[pre + "post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = fused_linears(params, pre, "mlp.", (MLP, MLP), h)  # [B, T, MLP] each
    return x + linear(params, pre + "mlp.down_proj", F.silu(gate) * up)


def hidden_states(params, config, tokens, positions=None, attend_fn=attention.causal_attention,
                  checkpointing=False):
    """The head's input: tokens [B, T] at positions [B, T] (default 0, 1, ...) -> [B, T, D].
    checkpointing: save only each layer's input for the backward pass (arXiv:1604.06174)."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    x = F.embedding(tokens, params["model.embed_tokens.weight"])  # [B, T, D]
    cos, sin = rope_table(config, positions, x.dtype)

    def run_layer(layer, x):  # a closure: checkpoint() traverses its arguments, such as `params`
        return block(params, config, layer, x, cos, sin, attend_fn)

    for layer in range(config.num_hidden_layers):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(run_layer, layer, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = run_layer(layer, x)
    return F.rms_norm(x, x.shape[-1:], params["model.norm.weight"], config.rms_norm_eps)


def packed_hidden_states(params, config, tokens, groups, checkpointing=False, store=None):
    """hidden_states of a packed row: tokens [T] -> [T, D]. groups, store: see packed_attention."""
    T = len(tokens)
    extra = attention.padded_length(T) - T if tokens.device.type == "cpu" else 0
    if extra:
        groups = [*groups, (0, [extra])]  # a separate sequence, which no token attends to
    dtype = params["model.embed_tokens.weight"].dtype
    attend_fn = attention.packed_attention(groups, tokens.device, dtype, store)
    positions = attention.packed_positions(groups).to(tokens.device)
    tokens = F.pad(tokens, (0, extra))[None]
    return hidden_states(params, config, tokens, positions, attend_fn, checkpointing)[0, :T]


def head_weight(params):
    """The head's weight [V, D], which is the embedding if the two are tied."""
    return params.get("lm_head.weight", params["model.embed_tokens.weight"])


def lm_head(hidden, weight, temperature=1.0):
    """Logits: hidden [..., D], weight [V, D] -> [..., V] float32."""
    if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
        logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)  # no backward
        logits = logits.unflatten(0, hidden.shape[:-1])
    else:
        logits = project(hidden, weight).float()
    return logits if temperature == 1 else logits / temperature


def init_cache(config, batch, slots, device="cpu", dtype=torch.float32):
    """An empty KV cache for `batch` rows of at most `slots` tokens."""
    L, K = config.num_hidden_layers, config.num_key_value_heads
    k, v = torch.zeros(2, L, batch, K, slots, config.head_dim, device=device, dtype=dtype)
    return attention.Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device))


def forward(params, config, tokens, positions=None, cache=None):
    """Logits at every position: tokens [B, T] -> [B, T, V] float32.
    positions: [B, T]; default 0, 1, ..., after the tokens already in the cache. cache: from
    init_cache, updated in place. After a right-padded prefill, pass the `positions` at which rows
    continue; the padding is overwritten. Raises ValueError if the context or cache is too short."""
    T = tokens.shape[1]
    attend_fn = attention.causal_attention
    if cache is None and T > config.max_context:
        raise ValueError(f"{T} tokens do not fit the context of {config.max_context}")
    if cache:
        if positions is None:
            positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)
        if (last := int(positions.max())) >= cache.k.shape[3]:
            raise ValueError(f"position {last} does not fit a cache of {cache.k.shape[3]} slots")
        attend_fn = attention.cached_attention(cache, positions)
        cache.lengths.copy_(positions[:, -1] + 1)
    hidden = hidden_states(params, config, tokens, positions, attend_fn)
    return lm_head(hidden, head_weight(params))


# ------------------------------------------------------------ log-probabilities


def head_slice(vocab_size, device):
    """Positions per slice of logits: 0.5 GiB on a GPU, in cache on a CPU; at least 128."""
    return max(128, (2**21 if device == "cpu" else 2**27) // vocab_size)


class HeadLogprobs(torch.autograd.Function):
    """`head_logprobs` in slices of `size` positions; the backward pass recomputes the logits.
    No tensor [positions, V] outlives its slice: with a vocabulary of 151,936, float32 logits and
    their gradient for 8,192 positions would take 9.3 GiB. If there is only one slice, its
    probabilities are saved: the backward pass starts here, so this does not raise peak memory."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        logprobs, entropy = [], []
        for h, target in zip(hidden.split(size), targets.split(size)):
            logp = lm_head(h, weight, temperature).log_softmax(-1)  # [n, V]
            logprobs.append(logp.gather(1, target[:, None])[:, 0])
            p = logp.exp()
            entropy.append(-logp.mul_(p).sum(-1))
        saved = [p] if len(entropy) == 1 else []
        logprobs, entropy = torch.cat(logprobs), torch.cat(entropy)
        ctx.save_for_backward(hidden, weight, targets, entropy, *saved)
        ctx.settings = temperature, size
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """For logits z: d log p(target) / dz = onehot(target) - p, and dH / dz = -p (log p + H)."""
        hidden, weight, targets, entropy, *saved = ctx.saved_tensors
        temperature, size = ctx.settings
        grad = torch.zeros_like(entropy) if grad is None else grad
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for begin in range(0, len(targets), size):
            part = slice(begin, begin + size)
            p = saved[0] if saved else lm_head(hidden[part], weight, temperature).softmax(-1)
            grad_target = grad[part, None] / temperature  # [n, 1]
            grad_logits = p * -grad_target  # [n, V]
            if grad_entropy is not None:
                slope = torch.special.xlogy(p, p).addcmul_(p, entropy[part, None])  # -dH / dz
                grad_logits -= slope * (grad_entropy[part, None] / temperature)
            grad_logits.scatter_add_(1, targets[part, None], grad_target)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if ctx.needs_input_grad[1]:  # accumulated in float32
                product = grad_logits.T @ hidden[part]  # [V, D]
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        return grad_hidden, grad_weight, None, None, None


def head_logprobs(params, config, hidden, targets, temperature=1.0):
    """Log-probabilities of the targets and entropies, in nats, of softmax(logits / temperature).
    hidden [N, D], targets [N] -> [N], [N] float32."""
    n = len(targets)
    extra = attention.padded_length(n) - n
    hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
    size = head_slice(config.vocab_size, hidden.device.type)
    logprobs, entropy = HeadLogprobs.apply(hidden, head_weight(params), targets, temperature, size)
    return logprobs[:n], entropy[:n]


def token_logprobs(params, config, tokens, temperature=1.0, checkpointing=False):
    """Log-probability of every token but the first: [B, T] -> [B, T - 1] float32, differentiable.
    Pad rows on the right, where causal attention keeps padding from affecting other tokens."""
    hidden = hidden_states(params, config, tokens, checkpointing=checkpointing)[:, :-1]
    targets = tokens[:, 1:].flatten()
    logprobs, _ = head_logprobs(params, config, hidden.flatten(0, 1), targets, temperature)
    return logprobs.view(hidden.shape[:2])


# ------------------------------------------------------------ LoRA


def lora_shapes(config, rank):
    """{name: shape} of an adapter on all linear layers: lora_A [rank, in], lora_B [out, rank]."""
    shapes = {}
    for name, shape in param_shapes(config).items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            shapes[stem + "lora_A.weight"] = (rank, shape[1])
            shapes[stem + "lora_B.weight"] = (shape[0], rank)
    return shapes


def init_lora(config, rank, seed):
    """A new float32 adapter. A is random and B is zero, so `params | lora` starts out equal to
    `params`. The paper's alpha equals `rank`, so B A needs no scaling."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, shape in lora_shapes(config, rank).items():
        lora[name] = torch.zeros(shape)
        if "lora_A" in name:
            bound = math.sqrt(3 / shape[1])  # Kaiming uniform, gain 1
            lora[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return lora


def merged_weight(params, name):
    """W + B A, computed in float32, if `params` has an adapter for this weight; otherwise W."""
    weight = params[name]
    stem = name.removesuffix("weight")
    if stem + "lora_A.weight" not in params:
        return weight
    down, up = params[stem + "lora_A.weight"].float(), params[stem + "lora_B.weight"].float()
    return (weight.float() + up @ down).to(weight.dtype)


# ------------------------------------------------------------ model directories

ROOT = Path(__file__).resolve().parent
SIZES = "0.5b 1.5b 3b 7b 14b 32b 72b"
MODELS = (f"{SIZES} math-1.5b math-7b math-72b "
          "coder-0.5b coder-1.5b coder-3b coder-7b coder-14b coder-32b").split()
NAMES = [f"qwen2.5-{size}{suffix}" for size in MODELS for suffix in ("", "-instruct")]


def did_you_mean(word, known):
    """The end of an error message: the known word closest in spelling, or "" if none is close."""
    near = difflib.get_close_matches(str(word).lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_model(name, config_only=False):
    """The directory of a model: "tiny", "qwen2.5-1.5b[-instruct]", a hub id or a directory.
    A hub model is read from models/NAME next to this file if that exists, otherwise downloaded,
    without its weights if config_only. The FileNotFoundError says how to install it."""
    name = str(name)
    path = ROOT / "data" / "tiny" if name.lower() == "tiny" else Path(name).expanduser()
    if path.is_dir():
        return path
    hub_id = f"Qwen/{name.title()}" if name.lower() in NAMES else name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
        raise FileNotFoundError(
            f"no model {name!r}: expected a directory, a hub id such as Qwen/Qwen2.5-1.5B, tiny, "
            f"or qwen2.5-[math-|coder-]SIZE[-instruct] with a size of {SIZES}"
            f"{did_you_mean(name, ['tiny', *NAMES])}")
    local = ROOT / "models" / hub_id.split("/")[-1].lower()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.jinja", "*.txt"] + ([] if config_only else ["*.safetensors"])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # not found, gated, offline, timeout, ...: no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"could not download {hub_id} ({reason}); place its *.json and "
                                f"*.safetensors in {local}, or pass their directory") from None


@contextmanager
def reading(path, kind):
    """Raise any error in this block as a FileNotFoundError or ValueError that names the file."""
    if not path.is_file():  # or a pipe, which would block the reader
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right directory?")
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics in Rust libraries are not Exceptions
        raise ValueError(f"{path}: not {kind} ({error})") from None


def read_json(path):
    """The object in a JSON file (a Path). Raises FileNotFoundError or ValueError naming it."""
    with reading(path, "a JSON object"):
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {2**26:,} are read")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"found a {type(raw).__name__}")
    return raw


def parse_record(record, raw, allowed):
    """The NamedTuple `record` from the fields of a JSON object. Raises ValueError if a number has
    the wrong type or is not positive, or if a field listed in `allowed` has any other value."""
    found = record._field_defaults | {name: raw[name] for name in raw if raw[name] is not None}
    wrong = []
    for name, values in allowed.items():
        if found.get(name) not in (None, *values):
            expected = " or ".join(map(repr, values)) or "none"
            wrong.append(f"{name} is {found[name]!r:.40}, expected {expected}")
    for name, kind in record.__annotations__.items():
        value = found.get(name)
        if kind in (int, float) and not (type(value) in (int, kind) and 0 < value < 2**31):
            wrong.append(f"{name} is {value!r:.40}, expected a positive {kind.__name__} < 2**31")
    if wrong:
        raise ValueError("; ".join(wrong))
    return record(**{name: found.get(name) for name in record._fields})


# The values that `forward` implements; missing fields are accepted.
QWEN2 = {"model_type": ["qwen2"], "hidden_act": ["silu"], "use_sliding_window": [False],
         "tie_word_embeddings": [True, False], "quantization_config": []}
YARN = {"rope_type": ["yarn"], "type": ["yarn"], "beta_fast": [32], "beta_slow": [1],
        "attention_factor": [0.1 * math.log(4) + 1]}  # for the documented factor


def load_config(model_dir):
    """The Config of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "config.json"
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    with reading(path, "a Qwen-2.5 config"):
        eos = raw.get("eos_token_id", [])
        eos = eos if isinstance(eos, list) else [eos]
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # in transformers 5
        defaults = {"rope_theta": 10000.0, "tie_word_embeddings": False}  # as in transformers
        raw = defaults | raw | rope
        raw |= {"eos_token_id": tuple(sorted(map(int, eos))), "rope_scaling": None}
        config = parse_record(Config, raw, QWEN2)
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            trained = {"original_max_position_embeddings": config.max_position_embeddings}
            config = config._replace(rope_scaling=parse_record(Yarn, trained | rope, YARN))
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = raw.get("head_dim", config.head_dim)
        if config.hidden_size % (2 * heads) or heads % kv_heads or head_dim != config.head_dim:
            raise ValueError(f"hidden_size {config.hidden_size}, {heads} heads of head_dim "
                             f"{head_dim} and {kv_heads} key/value heads are inconsistent")
        if config.num_hidden_layers > 1000:  # listing the tensors would take minutes
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, at most 1000")
    return config


def check_tensors(tensors, shapes, path):
    """Raise ValueError, listing all mismatches, unless the tensors are floats of these shapes."""
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shapes.get(name)}"
              for name, tensor in tensors.items()
              if tensor.shape != shapes.get(name) or not tensor.is_floating_point()]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not match: {'; '.join(wrong[:50])}")


def load_params(model_dir, device="cpu", dtype=torch.float32, adapter=None):
    """The tensors of a model directory under their Hugging Face names, in `dtype` on `device`.
    adapter: the directory of a LoRA adapter to add. On a CPU, tensors already in `dtype` are views
    of the memory-mapped file; writing to them does not change the file.
    Raises FileNotFoundError, or ValueError listing every missing, extra or misshapen tensor."""
    model_dir = Path(model_dir)
    config = load_config(model_dir)
    tensors = {}
    for path in sorted(model_dir.glob("model*.safetensors")) or [model_dir / "model.safetensors"]:
        with reading(path, "a safetensors file"):
            tensors |= load_file(path)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and torch.equal(tensors["lm_head.weight"], embedding):
            del tensors["lm_head.weight"]  # a stored copy
    shapes = param_shapes(config)
    check_tensors(tensors, shapes, model_dir)
    params = {name: tensors[name].to(device, dtype) for name in shapes}
    return params | load_adapter(adapter, config, device) if adapter else params


def write_files(out_dir, raw, tensors, prefix=""):
    """Create a directory with a config and tensors."""
    out_dir.mkdir(parents=True)
    config_path, path = out_dir / f"{prefix}config.json", out_dir / f"{prefix}model.safetensors"
    config_path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(config_path, path)  # save_file makes it readable by its owner only


def save_model(out_dir, params, config, like):
    """Write a directory that transformers and every script here can load.
    like: the directory to copy the tokenizer, chat template and generation settings from. An
    adapter in `params` is merged, and also saved for PEFT in the subdirectory `adapter`. Replaces
    an existing model once the new one is complete; ValueError if `out_dir` holds anything else."""
    out_dir, like = Path(out_dir).resolve(), Path(like).resolve()
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise ValueError(f"{out_dir} exists and is not a model directory; rename or remove it")
    staging, old = (out_dir.with_name(out_dir.name + end) for end in (".writing", ".replaced"))
    shutil.rmtree(staging, ignore_errors=True)
    raw = config._asdict() | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "use_sliding_window": False, "eos_token_id": list(config.eos_token_id) or None,
        "torch_dtype": str(params["model.norm.weight"].dtype).removeprefix("torch.")}
    if config.rope_scaling:  # new and old name of the same key
        raw["rope_scaling"] = {"rope_type": "yarn", "type": "yarn"} | config.rope_scaling._asdict()
    merged = {name: merged_weight(params, name) for name in param_shapes(config)}
    write_files(staging, raw, merged)
    lora = {PEFT_PREFIX + name: tensor for name, tensor in params.items() if ".lora_" in name}
    if lora:
        rank = next(tensor.shape[0] for name, tensor in lora.items() if ".lora_A." in name)
        raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
               "target_modules": sorted({name.split(".")[-3] for name in lora}),
               "base_model_name_or_path": str(like)}
        write_files(staging / "adapter", raw, lora, "adapter_")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja", "vocab.json", "merges.txt"):
        if (like / name).is_file():
            shutil.copyfile(like / name, staging / name)
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        out_dir.replace(old)
    staging.replace(out_dir)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------ LoRA adapters in PEFT's format

PEFT_PREFIX = "base_model.model."
PLAIN_LORA = {"peft_type": ["LORA"], "init_lora_weights": [True, False, "gaussian"],
              "alpha_pattern": [{}], "layer_replication": [], "alora_invocation_tokens": [],
              "use_qalora": [False], "use_bdlora": [False], "use_rslora": [False, True]}


class AdapterConfig(NamedTuple):
    """The rank and scale in adapter_config.json, under their original names."""
    r: int
    lora_alpha: float
    use_rslora: bool = False


def adapter_config(adapter_dir, rank=None):
    """The AdapterConfig of a saved adapter. Raises ValueError if `rank` is given and differs."""
    path = Path(adapter_dir) / "adapter_config.json"
    with reading(path, "a plain LoRA adapter; merge it into --model with PEFT"):
        found = parse_record(AdapterConfig, read_json(path), PLAIN_LORA)
    if rank not in (None, found.r):
        raise ValueError(f"--lora-rank is {rank}, but {adapter_dir} holds an adapter of rank "
                         f"{found.r}; omit --lora-rank, or pass a merged model as --model")
    return found


def load_adapter(adapter_dir, config, device="cpu"):
    """A plain LoRA adapter in PEFT's format, for `params | lora`: float32, with lora_B multiplied
    by alpha / rank. It may skip layers. Raises FileNotFoundError or ValueError."""
    rank, alpha, use_rslora = adapter_config(adapter_dir)
    path = Path(adapter_dir) / "adapter_model.safetensors"
    with reading(path, "a safetensors file"):
        tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(path).items()}
    layers = {name.split(".lora_")[0] for name in tensors}
    shapes = {name: shape for name, shape in lora_shapes(config, rank).items()
              if name.split(".lora_")[0] in layers or not layers}  # empty: report all missing
    check_tensors(tensors, shapes, path)
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    lora = {name: tensors[name].to(device, torch.float32) for name in shapes}
    return {name: t * scale if ".lora_B." in name else t for name, t in lora.items()}


# ------------------------------------------------------------ tokenizer and chat

INSTRUCT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def load_tokenizer(model_dir):
    """The tokenizers.Tokenizer of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "tokenizer.json"
    with reading(path, "a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # if the file enables it, prompts would be cut silently
    tokenizer.no_padding()
    return tokenizer


def end_tokens(tokenizer, config):
    """The ids that end a completion: the config's, and ChatML's, which base models do not list."""
    chat = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    return chat - {None} | set(config.eos_token_id)


# A template is an untrusted program: render it in a separate process, with limits.
RENDER = """
import contextlib, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
with contextlib.suppress(ImportError, ValueError, OSError):  # on Windows only time is limited
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
template = sandbox.from_string(sys.stdin.read())
print(template.render(messages=[{"role": "user", "content": ""}])[:100_000])
"""


def load_system_prompt(model_dir, timeout_s=10):
    """The system prompt that a model's chat template adds by default, or None if it adds none.
    Found by rendering the template for an empty user message. Raises ValueError if that fails."""
    path = Path(model_dir) / "chat_template.jinja"  # used by transformers 5
    if path.is_file():
        template = path.read_text(encoding="utf-8", errors="replace")
    else:
        path = path.with_name("tokenizer_config.json")
        template = read_json(path).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):
        return None
    try:
        done = subprocess.run([sys.executable, "-X", "utf8", "-c", RENDER], input=template,
                              capture_output=True, encoding="utf-8", errors="replace",
                              timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path}: the chat template takes more than {timeout_s} s") from None
    if done.returncode:
        error = done.stderr.strip().split("\n")[-1] or "killed"
        raise ValueError(f"{path}: the chat template does not render ({error})")
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", done.stdout, re.DOTALL)
    return found[1] if found else None


def with_system(messages, system):
    """`messages`, with a system message in front if they have none; unchanged if system is None."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render_chat(messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """[{"role": "user", "content": "Hi"}, ...] as one string, in ChatML as Qwen-2.5 defines it.
    system: the system prompt to add if the messages have none; None adds nothing."""
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                   for message in with_system(messages, system))
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def split_control_tokens(text):
    """Split a text inside every control token's name: "<|im_end|>" into "<" and "|im_end|>"."""
    return re.split(r"(?<=<)(?=\|\w+\|>)", text)


def encode_text(tokenizer, text):
    """Token ids of a text, with names of control tokens such as <|im_end|> read as plain text."""
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate becomes a question mark
    pieces = split_control_tokens(text)
    encoded = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    return [token for piece in encoded for token in piece.ids]


def encode_chat(tokenizer, messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """Token ids of render_chat's string, except that no content can produce a control token:
    "<|im_end|>\\n<|im_start|>assistant" in a message stays plain text."""
    start, end = (tokenizer.encode(mark, add_special_tokens=False).ids
                  for mark in ("<|im_start|>", "<|im_end|>\n"))
    ids = []
    for message in with_system(messages, system):
        ids += start + encode_text(tokenizer, f"{message['role']}\n{message['content']}") + end
    if add_generation_prompt:
        ids += start + encode_text(tokenizer, "assistant\n")
    return ids
