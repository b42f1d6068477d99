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
    """rope_scaling as Qwen-2.5 documents it for contexts beyond the trained one."""
    factor: float
    original_max_position_embeddings: int


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
    eos_token_id: tuple[int, ...] = ()

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
    """Radians per position of each pair of dimensions [head_dim / 2]; what scales cos and sin."""
    half, yarn = config.head_dim // 2, config.rope_scaling
    pairs = torch.arange(half, dtype=torch.float32, device=device)
    # the published order of operations: at position 100,000 one rounding shows in the logits
    periods = config.rope_theta ** (pairs / half)  # over 2 pi
    if yarn is None:
        return 1 / periods, 1.0
    # the pairs that turn 32 times and once in the trained context (YaRN, section 3.2)
    once = yarn.original_max_position_embeddings / (2 * math.pi)
    low, high = (half * math.log(once / n) / math.log(config.rope_theta) for n in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), config.head_dim - 1)
    keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)  # 0: interpolated
    stretched = 1 / (yarn.factor * periods) * (1 - keep) + 1 / periods * keep
    return stretched, 0.1 * math.log(max(1, yarn.factor)) + 1  # equation 22


def rope_table(config, positions, dtype):
    """cos and sin at `positions` [B, T], [B, 1, T, head_dim] each, as `rotate` takes them."""
    frequencies, scale = rope_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((-angles, angles), -1)[:, None]  # the two dimensions of a pair
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + head_dim / 2) of x [B, H, T, head_dim] by their angles."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def project(x, weight, bias=None):
    """x @ weight.T + bias: [..., in] -> [..., out]. The sampler packs its weights for oneDNN."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(params, name, x):
    """The linear layer `name`, and its adapter when `params` holds one: [..., in] -> [..., out]."""
    out = project(x, params[name + ".weight"], params.get(name + ".bias"))
    if name + ".lora_A.weight" in params:  # not merged: bfloat16 weights would lose small updates
        down, up = (params[name + end].to(x.dtype) for end in (".lora_A.weight", ".lora_B.weight"))
        out = out + F.linear(F.linear(x, down), up)
    return out


# layers of one input, whose weights the sampler joins; one that `block` calls alone must leave
JOINED = {"self_attn.": ("q_proj", "k_proj", "v_proj"), "mlp.": ("gate_proj", "up_proj")}


def linears(params, pre, part, sizes, x):
    """The JOINED layers of a part of layer `pre`: an output of each size."""
    names = JOINED[part]
    if pre + part + "+".join(names) + ".weight" in params:
        return linear(params, pre + part + "+".join(names), x).split(sizes, -1)
    return [linear(params, pre + part + name, x) for name in names]


def block(params, config, layer, x, cos, sin, attend_fn):
    """One transformer layer: x [B, T, D] -> [B, T, D]. The only one: the sampler calls it, too."""
    B, T, D = x.shape
    KV, MLP = config.num_key_value_heads * config.head_dim, config.intermediate_size
    pre = f"model.layers.{layer}."

    h = F.rms_norm(x, (D,), params[pre + "input_layernorm.weight"], config.rms_norm_eps)
    qkv = linears(params, pre, "self_attn.", (D, KV, KV), h)
    q, k, v = (part.view(B, T, -1, config.head_dim).transpose(1, 2) for part in qkv)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, head_dim], [B, K, T, head_dim]
    out = attend_fn(layer, q, k, v).transpose(1, 2).reshape(B, T, D)
    x = x + linear(params, pre + "self_attn.o_proj", out)

    h = F.rms_norm(x, (D,), params[pre + "post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = linears(params, pre, "mlp.", (MLP, MLP), h)  # [B, T, MLP] each
    return x + linear(params, pre + "mlp.down_proj", F.silu(gate) * up)


def hidden_states(params, config, tokens, positions=None, attend_fn=attention.causal_attention,
                  checkpointing=False):
    """What the head reads: tokens [B, T] at positions [B, T] (default 0, 1, ...) -> [B, T, D].
    checkpointing: the backward pass finds only each layer's input kept (arXiv:1604.06174)."""
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
    return F.rms_norm(x, x.shape[-1:], params["model.norm.weight"], config.rms_norm_eps)


def packed_hidden_states(params, config, tokens, groups, checkpointing=False, store=None):
    """hidden_states of a packed row: tokens [T] -> [T, D]. groups, store: as packed_attention's."""
    T = len(tokens)
    extra = attention.padded_length(T) - T if tokens.device.type == "cpu" else 0
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
    if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
        logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32)  # no derivative
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
    positions: [B, T]; default 0, 1, ..., or on from what each row of the cache holds. cache: from
    init_cache, written in place; what lies behind a row's real end is never seen once `positions`
    says where the row goes on. Raises ValueError where the context or the cache is too short."""
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
    """Positions whose logits are made at a time: 0.5 GiB on a GPU, a CPU's cache; at least 128."""
    return max(128, (2**21 if device == "cpu" else 2**27) // vocab_size)


class HeadLogprobs(torch.autograd.Function):
    """What `head_logprobs` returns, slice by slice; the backward pass makes the logits again.
    Nothing of [positions, V] outlives its slice: with 151,936 words, 8,192 positions of float32
    logits and their gradient would take 9.3 GiB. The probabilities of an only slice are kept: the
    backward pass begins here, and no peak is higher for it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        logprobs, entropy = [], []
        for h, target in zip(hidden.split(size), targets.split(size)):
            logp = lm_head(h, weight, temperature).log_softmax(-1)  # [n, V]
            logprobs.append(logp.gather(1, target[:, None])[:, 0])
            p = logp.exp()
            entropy.append(-logp.mul_(p).sum(-1))
        kept = [p] if len(entropy) == 1 else []
        logprobs, entropy = torch.cat(logprobs), torch.cat(entropy)
        ctx.save_for_backward(hidden, weight, targets, entropy, *kept)
        ctx.settings = temperature, size
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """For logits z: d log p(target) / dz = onehot(target) - p, and dH / dz = -p (log p + H)."""
        hidden, weight, targets, entropy, *kept = ctx.saved_tensors
        temperature, size = ctx.settings
        grad = torch.zeros_like(entropy) if grad is None else grad
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for begin in range(0, len(targets), size):
            part = slice(begin, begin + size)
            p = kept[0] if kept else lm_head(hidden[part], weight, temperature).softmax(-1)
            of_logprobs = grad[part, None] / temperature
            grad_logits = p * -of_logprobs  # [n, V]
            if grad_entropy is not None:
                of_entropy = torch.special.xlogy(p, p).addcmul_(p, entropy[part, None])
                grad_logits -= of_entropy * (grad_entropy[part, None] / temperature)
            grad_logits.scatter_add_(1, targets[part, None], of_logprobs)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if ctx.needs_input_grad[1]:  # summed in float32
                product = grad_logits.T @ hidden[part]  # [V, D]
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        return grad_hidden, grad_weight, None, None, None


def head_logprobs(params, config, hidden, targets, temperature=1.0):
    """log p(targets) and the entropy, in nats, of softmax(logits / temperature).
    hidden [N, D], targets [N] -> [N], [N] float32."""
    n = len(targets)
    extra = attention.padded_length(n) - n
    hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
    size = head_slice(config.vocab_size, hidden.device.type)
    pair = HeadLogprobs.apply(hidden, head_weight(params), targets, temperature, size)
    return tuple(x[:n] for x in pair)


def token_logprobs(params, config, tokens, temperature=1.0, checkpointing=False):
    """Log-probability of every token but the first: [B, T] -> [B, T - 1] float32, differentiable.
    Padding stands at the right of a row, where causal attention keeps it from mattering."""
    hidden = hidden_states(params, config, tokens, checkpointing=checkpointing)[:, :-1]
    targets = tokens[:, 1:].flatten()
    logprobs, _ = head_logprobs(params, config, hidden.flatten(0, 1), targets, temperature)
    return logprobs.view(hidden.shape[:2])


# ------------------------------------------------------------ LoRA


def lora_shapes(config, rank):
    """{name: shape} of an adapter for every linear layer: lora_A [rank, in], lora_B [out, rank]."""
    shapes = {}
    for name, shape in param_shapes(config).items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            shapes[stem + "lora_A.weight"] = (rank, shape[1])
            shapes[stem + "lora_B.weight"] = (shape[0], rank)
    return shapes


def init_lora(config, rank, seed):
    """A new float32 adapter. A is random and B zero, so that `params | lora` starts as `params`;
    the paper's alpha is `rank`, and nothing scales B A."""
    generator = torch.Generator().manual_seed(seed)
    lora = {name: torch.zeros(shape) for name, shape in lora_shapes(config, rank).items()}
    for name, tensor in lora.items():
        if "lora_A" in name:
            bound = math.sqrt(3 / tensor.shape[1])  # Kaiming uniform, gain 1
            lora[name] = (torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound
    return lora


def merged_weight(params, name):
    """W + B A, computed in float32, where `params` has an adapter for this weight; else just W."""
    weight = params[name]
    stem = name.removesuffix("weight")
    down, up = params.get(stem + "lora_A.weight"), params.get(stem + "lora_B.weight")
    return weight if down is None else (weight.float() + up.float() @ down.float()).to(weight.dtype)


# ------------------------------------------------------------ a model's directory

ROOT = Path(__file__).resolve().parent
SIZES = {"": "0.5b 1.5b 3b 7b 14b 32b 72b", "math-": "1.5b 7b 72b",
         "coder-": "0.5b 1.5b 3b 7b 14b 32b"}
NAMES = [f"qwen2.5-{kind}{size}{tuned}" for kind, sizes in SIZES.items()
         for size in sizes.split() for tuned in ("", "-instruct")]


def did_you_mean(word, known):
    """The end of an error message that names what is known and spelled alike, or nothing."""
    near = difflib.get_close_matches(str(word).lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_model(name, config_only=False):
    """The directory of a model: "tiny", "qwen2.5-1.5b[-instruct]", a hub id, or a directory.
    Hub models are taken from models/NAME beside this file where they are there, else downloaded;
    config_only: without their weights. Raises FileNotFoundError, with how to place them by hand."""
    name = str(name)
    path = ROOT / "data" / "tiny" if name.lower() == "tiny" else Path(name).expanduser()
    if path.is_dir():
        return path
    hub_id = f"Qwen/{name.title()}" if name.lower() in NAMES else name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
        raise FileNotFoundError(
            f"no model {name!r}: expected a directory, a hub id such as Qwen/Qwen2.5-1.5B, tiny, "
            f"or qwen2.5-[math-|coder-]SIZE[-instruct] with a size of {SIZES['']}"
            f"{did_you_mean(name, ['tiny', *NAMES])}")
    by_hand = ROOT / "models" / hub_id.split("/")[-1].lower()
    if by_hand.is_dir():
        return by_hand
    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.jinja", "*.txt"] + ["*.safetensors"] * (not config_only)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # not found, gated, offline, time-out, ...: they share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"could not download {hub_id} ({reason}); place its *.json and "
                                f"*.safetensors in {by_hand}, or pass their directory") from None


@contextmanager
def reading(path, kind):
    """Whatever fails in this block is a FileNotFoundError or ValueError that names the file."""
    if not path.is_file():  # a pipe, say, which would never end
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right directory?")
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the panics of some libraries are no Exceptions
        raise ValueError(f"{path}: not {kind} ({error})") from None


def read_json(path):
    """The object in a JSON file, a Path. Raises FileNotFoundError or ValueError that name it."""
    with reading(path, "a JSON object"):
        if path.stat().st_size > 2**26:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {2**26:,} are read")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"found a {type(raw).__name__}")
    return raw


def read_record(record, raw, only):
    """The NamedTuple `record` of the fields of a JSON object. Raises ValueError for a number of
    another type or not positive, and where a field of `only` has none of its values."""
    found = record._field_defaults | {name: raw[name] for name in raw if raw[name] is not None}
    wrong = [f"{name} is {found[name]!r:.40}, expected {' or '.join(map(repr, values)) or 'none'}"
             for name, values in only.items() if found.get(name) not in (None, *values)]
    for name, kind in record.__annotations__.items():
        value = found.get(name)
        if kind in (int, float) and not (type(value) in (int, kind) and 0 < value < 2**31):
            wrong.append(f"{name} is {value!r:.40}, expected a positive {kind.__name__} < 2**31")
    if wrong:
        raise ValueError("; ".join(wrong))
    return record(**{name: found.get(name) for name in record._fields})


QWEN2 = {"model_type": ["qwen2"], "hidden_act": ["silu"], "use_sliding_window": [False],
         "tie_word_embeddings": [True, False], "quantization_config": []}
YARN = {"rope_type": ["yarn"], "type": ["yarn"], "beta_fast": [32], "beta_slow": [1],
        "attention_factor": [0.1 * math.log(4) + 1]}  # of the documented factor


def load_config(model_dir):
    """The Config of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "config.json"
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    with reading(path, "a config of Qwen-2.5"):
        ends = raw.get("eos_token_id", [])
        ends = ends if isinstance(ends, list) else [ends]
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # of transformers 5
        # what a file leaves out is what transformers takes it for
        raw = {"rope_theta": 10000.0, "tie_word_embeddings": False} | raw | rope
        raw |= {"eos_token_id": tuple(sorted(map(int, ends))), "rope_scaling": None}
        config = read_record(Config, raw, QWEN2)
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            trained = {"original_max_position_embeddings": config.max_position_embeddings}
            config = config._replace(rope_scaling=read_record(Yarn, trained | rope, YARN))
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = raw.get("head_dim", config.head_dim)
        if config.hidden_size % (2 * heads) or heads % kv_heads or head_dim != config.head_dim:
            raise ValueError(f"hidden_size {config.hidden_size}, {heads} heads of head_dim "
                             f"{head_dim} and {kv_heads} key/value heads do not go together")
        if config.num_hidden_layers > 1000:  # to list their tensors would take minutes
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, at most 1000")
    return config


def check_tensors(tensors, shapes, path):
    """Raises ValueError, naming all that is wrong, unless these are floats of these shapes."""
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shapes.get(name)}"
              for name, tensor in tensors.items()
              if tensor.shape != shapes.get(name) or not tensor.is_floating_point()]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:50])}")


def load_params(model_dir, device="cpu", dtype=torch.float32, adapter=None):
    """The tensors of a model directory under their Hugging Face names, in `dtype` on `device`.
    adapter: the directory of one to lay over them. On a CPU, tensors that are of `dtype` already
    stay views of the file, which is mapped: what is written into them stays in memory.
    Raises FileNotFoundError, or ValueError that names every missing, extra or misshapen tensor."""
    model_dir = Path(model_dir)
    config = load_config(model_dir)
    tensors = {}
    for path in sorted(model_dir.glob("model*.safetensors")) or [model_dir / "model.safetensors"]:
        with reading(path, "a safetensors file"):  # a shard, perhaps
            tensors |= load_file(path)
    heads = [tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
    if config.tie_word_embeddings and None not in heads and torch.equal(*heads):
        del tensors["lm_head.weight"]  # stored, although it is tied
    shapes = param_shapes(config)
    check_tensors(tensors, shapes, model_dir)
    params = {name: tensors[name].to(device, dtype) for name in shapes}
    return params | load_adapter(adapter, config, device) if adapter else params


def write_files(out_dir, raw, tensors, prefix=""):
    """Write the config and the tensors of a new directory."""
    out_dir.mkdir(parents=True)
    config_path, path = out_dir / f"{prefix}config.json", out_dir / f"{prefix}model.safetensors"
    config_path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(config_path, path)  # else it is for its owner alone


def save_model(out_dir, params, config, like):
    """Write a directory that transformers, and every script here, loads as it is.
    like: the directory whose tokenizer, chat template and generation settings to copy. An adapter
    in `params` is merged, and kept in the subdirectory `adapter`, for PEFT. The directory appears
    whole, and only then replaces a model of its name; ValueError where something else has it."""
    out_dir, like = Path(out_dir).resolve(), Path(like).resolve()
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise ValueError(f"{out_dir} exists and is no model directory; name another, or remove it")
    staging, old = (out_dir.with_name(out_dir.name + end) for end in (".writing", ".replaced"))
    shutil.rmtree(staging, ignore_errors=True)
    raw = config._asdict() | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "use_sliding_window": False, "eos_token_id": list(config.eos_token_id) or None,
        "torch_dtype": str(params["model.norm.weight"].dtype).removeprefix("torch.")}
    if config.rope_scaling:  # for new readers and for old
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


# ------------------------------------------------------------ an adapter's, in PEFT's format

PEFT_PREFIX = "base_model.model."
PLAIN_LORA = {"peft_type": ["LORA"], "init_lora_weights": [True, False, "gaussian"],
              "alpha_pattern": [{}], "layer_replication": [], "alora_invocation_tokens": [],
              "use_qalora": [False], "use_bdlora": [False], "use_rslora": [False, True]}


class AdapterConfig(NamedTuple):
    """What adapter_config.json says of the rank and the scale, under its names."""
    r: int
    lora_alpha: float
    use_rslora: bool = False


def adapter_config(adapter_dir, rank=None):
    """The AdapterConfig of a saved adapter. Raises ValueError where another `rank` is asked for."""
    path = Path(adapter_dir) / "adapter_config.json"
    with reading(path, "an adapter of plain LoRA, which PEFT can merge into --model"):
        found = read_record(AdapterConfig, read_json(path), PLAIN_LORA)
    if rank not in (None, found.r):
        raise ValueError(f"--lora-rank is {rank}, and {adapter_dir} holds an adapter of rank "
                         f"{found.r}; leave --lora-rank out, or pass a merged model as --model")
    return found


def load_adapter(adapter_dir, config, device="cpu"):
    """A LoRA adapter in PEFT's format, as `params` takes it: float32, alpha / rank within lora_B.
    It may leave layers out. Raises FileNotFoundError or ValueError, for variants of LoRA, too."""
    rank, alpha, by_root = adapter_config(adapter_dir)
    path = Path(adapter_dir) / "adapter_model.safetensors"
    with reading(path, "a safetensors file"):
        tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(path).items()}
    layers = {name.split(".lora_")[0] for name in tensors}
    shapes = {name: shape for name, shape in lora_shapes(config, rank).items()
              if name.split(".lora_")[0] in layers or not layers}
    check_tensors(tensors, shapes, path)
    scale = alpha / (math.sqrt(rank) if by_root else rank)
    lora = {name: tensors[name].to(device, torch.float32) for name in shapes}
    return {name: t * scale if ".lora_B." in name else t for name, t in lora.items()}


# ------------------------------------------------------------ tokenizer and chat

INSTRUCT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def load_tokenizer(model_dir):
    """The tokenizers.Tokenizer of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "tokenizer.json"
    with reading(path, "a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # a file may have been saved with them, and prompts be cut in silence
    tokenizer.no_padding()
    return tokenizer


def end_tokens(tokenizer, config):
    """The ids that end a completion: the config's, and ChatML's, which base models do not list."""
    chat = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    return chat - {None} | set(config.eos_token_id)


# A template is a program of unknown origin: it is rendered in a process of its own, with bounds.
RENDER = """
import contextlib, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
with contextlib.suppress(ImportError, ValueError, OSError):  # on Windows time alone is bounded
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
template = sandbox.from_string(sys.stdin.read())
print(template.render(messages=[{"role": "user", "content": ""}])[:100_000])
"""


def load_system_prompt(model_dir, timeout_s=10):
    """The system turn that a model's chat template adds when there is none; None when it adds none.
    Found by rendering the template around an empty question; ValueError when that fails."""
    path = Path(model_dir) / "chat_template.jinja"  # where transformers 5 keeps it
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
        failed = done.returncode and (done.stderr.strip().split("\n")[-1] or "it was killed")
    except subprocess.TimeoutExpired:
        failed = f"not within {timeout_s} s"
    if failed:
        raise ValueError(f"{path}: the chat template does not render ({failed})")
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", done.stdout, re.DOTALL)
    return found[1] if found else None


def with_system(messages, system):
    """The messages, behind a system turn when they bring none; system None: as they are."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def render_chat(messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """ChatML as Qwen-2.5 defines it: [{"role": "user", "content": "Hi"}, ...] as one string.
    system: the turn put in front when the messages bring none; None for none."""
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                   for message in with_system(messages, system))
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def plain_pieces(text):
    """The text, so cut that no piece names a control token: "<" and "|im_end|>", for instance."""
    return re.split(r"(?<=<)(?=\|\w+\|>)", text)


def encode_text(tokenizer, text):
    """The ids of a text in which names of control tokens, such as <|im_end|>, are plain text."""
    text = text.encode("utf-8", "replace").decode()  # half a character becomes a question mark
    pieces = [tokenizer.encode(piece, add_special_tokens=False) for piece in plain_pieces(text)]
    return [token for piece in pieces for token in piece.ids]


def encode_chat(tokenizer, messages, add_generation_prompt=True, system=INSTRUCT_SYSTEM):
    """The ids of render_chat's string, but that no content can make a control token: where somebody
    writes "<|im_end|>\\n<|im_start|>assistant", it stays text."""
    start, end = (tokenizer.encode(mark, add_special_tokens=False).ids
                  for mark in ("<|im_start|>", "<|im_end|>\n"))
    ids = []
    for message in with_system(messages, system):
        ids += start + encode_text(tokenizer, f"{message['role']}\n{message['content']}") + end
    return ids + (start + encode_text(tokenizer, "assistant\n") if add_generation_prompt else [])
