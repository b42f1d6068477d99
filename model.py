"""Qwen-2.5 as plain functions over the dict of tensors that its safetensors files hold.

The checkpoint is the model: `params` maps Hugging Face names to tensors, `forward(params, config, tokens)` is a
function of it. The reference model is another dict; a LoRA adapter is a small dict over the first, `params | lora`.

    params, config = load_params(path), load_config(path)       # path = resolve_model("qwen2.5-1.5b")
    logits = forward(params, config, tokens)                    # [B, T] -> [B, T, V] float32
    save_model("out", params, config, like=path)                # a directory that transformers loads as it is

Qwen2.5 technical report, arXiv:2412.15115; RMSNorm arXiv:1910.07467; RoPE arXiv:2104.09864; YaRN arXiv:2309.00071;
grouped-query attention arXiv:2305.13245; SwiGLU arXiv:2002.05202; LoRA arXiv:2106.09685.
"""

import functools
import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent
HUB_SIZES = {"": ("0.5B", "1.5B", "3B", "7B", "14B"), "Math-": ("1.5B", "7B")}
HUB_IDS = {f"Qwen2.5-{kind}{size}{tuned}".lower(): f"Qwen/Qwen2.5-{kind}{size}{tuned}"
           for kind, sizes in HUB_SIZES.items() for size in sizes for tuned in ("", "-Instruct")}
SYSTEM_PROMPTS = {  # what each variant's chat template says when the conversation brings no system turn
    "base": "You are a helpful assistant.",
    "instruct": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "math": r"Please reason step by step, and put your final answer within \boxed{}.",
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CPU_SCRATCH = 2**21  # elements of a temporary that stays in the cache of a CPU

# ------------------------------------------------------------------------------------ a model directory: finding it


def resolve_model(name):
    """The directory of a model: "tiny", "qwen2.5-1.5b[-instruct]", "qwen2.5-math-7b", a hub id, or a directory.

    Hub models are taken from models/NAME beside this file when they are there, else downloaded through huggingface_hub.
    Raises FileNotFoundError, saying how to place the files by hand, when there is no such directory and no hub.
    """
    if name == "tiny":
        return ROOT / "data" / "tiny"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    hub_id = HUB_IDS.get(str(name).lower(), str(name))
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
        raise FileNotFoundError(f"no model {str(name)!r}: expected a directory, a hub id such as Qwen/Qwen2.5-1.5B, "
                                f"or one of tiny, {', '.join(HUB_IDS)}")
    by_hand = ROOT / "models" / hub_id.split("/")[-1].lower()
    if by_hand.is_dir():
        return by_hand
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub's errors share no base class: not found, gated, offline, time-outs, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no directory {str(name)!r}, and could not download {hub_id} ({reason}); place its "
                                "config.json, generation_config.json, tokenizer.json, tokenizer_config.json and "
                                f"*.safetensors in {by_hand}, or pass their directory") from None


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError that name the file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; a model directory holds config.json, tokenizer.json and "
                                "*.safetensors") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
    return raw


# ------------------------------------------------------------------------------------ config


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
    eos_token_id: tuple[int, ...] = ()  # every id that ends a text: config.json and generation_config.json together

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def max_context(self):
        """Tokens that the positions reach: the trained length, or what YaRN stretches it to."""
        yarn = self.rope_scaling
        stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, stretched)


def parse_yarn(raw, max_position_embeddings):
    """`rope_scaling` of a config.json as a Yarn, or None for plain rotary positions. Raises ValueError for another."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type {kind!r} is not supported; Qwen-2.5 documents 'yarn' only")
    given = {k: v for k, v in raw.items() if v is not None and k not in ("type", "rope_type", "rope_theta")}
    if unknown := sorted(given.keys() - set(Yarn._fields)):
        raise ValueError(f"rope_scaling has {', '.join(unknown)}; expected only {', '.join(Yarn._fields)}")
    for name, value in given.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling {name} is {value!r}, expected a positive number")
    if given.get("factor", 0) < 1:
        raise ValueError(f"rope_scaling factor is {given.get('factor')}, expected 1 or more")
    given.setdefault("original_max_position_embeddings", max_position_embeddings)
    given.setdefault("attention_factor", 0.1 * math.log(given["factor"]) + 1.0)  # YaRN, eq. 22
    return Yarn(**given)


def load_config(model_dir):
    """The Config of a model directory. Raises ValueError when it is not a Qwen-2.5 that this file computes exactly."""
    path = Path(model_dir) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "qwen2":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen2'")
    for name, only in (("hidden_act", "silu"), ("use_sliding_window", False), ("quantization_config", None)):
        if (raw.get(name) or only) != only:
            raise ValueError(f"{path}: {name} is {raw[name]!r}, expected {only!r}: what Qwen-2.5 does not use is not "
                             "implemented")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 5: the latter, with rope_theta
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object")
    # what a file leaves out is what transformers takes it for
    fields = {"rope_theta": 10000.0, "tie_word_embeddings": False}
    fields |= {name: source[name] for source in (raw, {"rope_theta": rope.get("rope_theta")}) for name in Config._fields
               if source.get(name) is not None}
    if missing := [name for name in Config._fields if name not in fields and name not in Config._field_defaults]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    config = Config(**fields)
    for name, kind in Config.__annotations__.items():
        value = getattr(config, name)
        if kind is int and (type(value) is not int or value < 1):
            raise ValueError(f"{path}: {name} is {value!r}, expected a positive integer")
        if kind is float and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{path}: {name} is {value!r}, expected a positive number")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{path}: {name} is {value!r}, expected true or false")
    head_dim = raw.get("head_dim") or config.head_dim
    if config.hidden_size != head_dim * config.num_attention_heads or head_dim % 2:
        raise ValueError(f"{path}: hidden_size {config.hidden_size} is not {config.num_attention_heads} heads of an "
                         f"even head_dim; head_dim is {head_dim}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{path}: {config.num_attention_heads} heads are no multiple of {config.num_key_value_heads} "
                         "key/value heads")
    generation = path.with_name("generation_config.json")
    ends = []
    for end in (raw.get("eos_token_id"), read_json(generation).get("eos_token_id") if generation.is_file() else None):
        ends += end if isinstance(end, list) else [] if end is None else [end]
    if any(type(end) is not int for end in ends):
        raise ValueError(f"{path}: eos_token_id is {ends}, expected integers (generation_config.json counts, too)")
    try:
        yarn = parse_yarn(rope, config.max_position_embeddings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config._replace(rope_scaling=yarn, eos_token_id=tuple(sorted(set(ends))))


def config_json(config):
    """The inverse of load_config: what transformers reads, as a dict."""
    raw = {k: v for k, v in config._asdict().items() if k not in ("rope_scaling", "eos_token_id")}
    if config.rope_scaling:
        raw["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **config.rope_scaling._asdict()}
    eos = list(config.eos_token_id)
    return raw | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
                  "use_sliding_window": False, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}


# ------------------------------------------------------------------------------------ weights in and out


def param_shapes(config):
    """{name: shape} of every tensor of a checkpoint, in the order of the published files."""
    D, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (Q, D), "self_attn.q_proj.bias": (Q,),
            "self_attn.k_proj.weight": (KV, D), "self_attn.k_proj.bias": (KV,),
            "self_attn.v_proj.weight": (KV, D), "self_attn.v_proj.bias": (KV,),
            "self_attn.o_proj.weight": (D, Q),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (I, D), "mlp.up_proj.weight": (I, D), "mlp.down_proj.weight": (D, I)}.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def load_params(model_dir, device="cpu", dtype=torch.float32):
    """The tensors of model.safetensors, or else of the shards that model.safetensors.index.json lists.

    Files are memory-mapped and read tensor by tensor: never a second copy of the weights. On a CPU, tensors that are of
    `dtype` already stay views of the mapping, which is private: writing into them leaves the file as it is.
    Raises FileNotFoundError, or ValueError that names every missing, extra or misshapen tensor.
    """
    model_dir = Path(model_dir)
    config, names = load_config(model_dir), ["model.safetensors"]
    index = model_dir / "model.safetensors.index.json"
    if index.is_file() and not (model_dir / names[0]).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: holds no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    shapes, params, wrong, seen = param_shapes(config), {}, [], set()
    for name in names:
        path = model_dir / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model directory holds model.safetensors, or an index and "
                                    "its shards")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():
                    stored = file.get_slice(key)
                    shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                    seen.add(key)
                    if key.endswith("rotary_emb.inv_freq"):  # a table of old exports, made from the config here
                        continue
                    # a tied head may be stored all the same
                    expected = shapes["model.embed_tokens.weight"] if key == "lm_head.weight" else shapes.get(key)
                    if expected is None:
                        wrong.append(f"extra {key} {list(shape)}")
                    elif shape != expected or kind not in ("F32", "BF16", "F16"):
                        wrong.append(f"{key} is {kind} {list(shape)}, expected {list(expected)} of F32, BF16 or F16")
                    else:
                        params[key] = file.get_tensor(key).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None
    wrong += [f"missing {key} {list(shapes[key])}" for key in shapes if key not in seen]
    if config.tie_word_embeddings and not wrong and "lm_head.weight" in params:
        if not torch.equal(params["lm_head.weight"], params["model.embed_tokens.weight"]):
            wrong = ["lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings is true"]
    if wrong:
        raise ValueError(f"{model_dir}: the tensors do not fit its config.json: {'; '.join(wrong)}")
    return {key: params[key] for key in shapes}


def save_model(out_dir, params, config, like):
    """Write a directory that transformers, and every script here, loads as it is.

    like: the directory whose tokenizer, chat template and generation settings to copy. An adapter in `params` is merged
    into its weights. The directory appears whole; a model of the same name is put aside until then, and removed.
    Raises ValueError when `out_dir` holds something that is not a model.
    """
    out_dir, like = Path(out_dir).resolve(), Path(like)
    if out_dir.exists() and not (out_dir / "config.json").is_file() and (out_dir.is_file() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not a model directory; name another, or remove it")
    staging, old = (out_dir.with_name(out_dir.name + end) for end in (".writing", ".replaced"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                 "vocab.json", "merges.txt"):
        if (like / name).is_file():
            shutil.copyfile(like / name, staging / name)
    tensors = {k: v.detach().cpu().contiguous() for k, v in merge_lora(params).items()}
    save_file({k: tensors[k] for k in param_shapes(config)}, staging / "model.safetensors", metadata={"format": "pt"})
    raw = config_json(config) | {"torch_dtype": str(tensors["model.norm.weight"].dtype).removeprefix("torch.")}
    (staging / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(staging / "config.json", staging / "model.safetensors")  # safetensors lets only its owner read it
    for path in staging.iterdir():  # on the disk before the name says that it is whole
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if out_dir.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out_dir, old)
    os.replace(staging, out_dir)
    shutil.rmtree(old, ignore_errors=True)


def init_params(config, seed, device="cpu", dtype=torch.float32):
    """Random weights: normal(0, initializer_range), smaller by 1/sqrt(2L) in the two projections of a layer that write
    to the residual stream, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        if name.endswith("norm.weight"):
            tensor = torch.ones(shape)
        elif name.endswith("bias"):
            tensor = torch.zeros(shape)
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if writes else 1)
            tensor = torch.randn(shape, generator=generator) * std
        params[name] = tensor.to(device, dtype)
    return params


# ------------------------------------------------------------------------------------ tokenizer and chat template


def load_tokenizer(model_dir):
    """The tokenizers.Tokenizer of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy tokenizer.json from the model's page")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path}: not a tokenizer ({error})") from None


def load_system_prompt(model_dir):
    """The system turn that a model's chat template adds when there is none; None when it adds none.

    Found by rendering the template, in Jinja's sandbox, around an empty question. Raises ValueError when that fails.
    """
    path = Path(model_dir) / "chat_template.jinja"  # where transformers 5 puts it; before, in tokenizer_config.json
    if path.is_file():
        template = path.read_text(encoding="utf-8")
    else:
        path = Path(model_dir) / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):
        return None
    try:
        chat = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        text = chat.render(messages=[{"role": "user", "content": ""}])
    except TemplateError as error:
        raise ValueError(f"{path}: the chat template does not render ({error})") from None
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL)
    return found[1] if found else None


def render_chat(messages, add_generation_prompt=True, system=SYSTEM_PROMPTS["instruct"]):
    """ChatML as Qwen-2.5 defines it: [{"role": "user", "content": "Hi"}, ...] as one string.

    system: the turn put in front when the messages bring none; None for none.
    """
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


# ------------------------------------------------------------------------------------ the forward pass


def linear(params, name, x):
    """x @ W.T (+ bias) (+ the adapter, when `params` holds one for this weight): [..., in] -> [..., out]."""
    weight = params[name + ".weight"]
    if weight.is_mkldnn:  # packed for oneDNN by the sampler
        return torch.ops.mkldnn._linear_pointwise(x, weight, params.get(name + ".bias"), "none", [], "")
    out = F.linear(x, weight, params.get(name + ".bias"))
    if (down := params.get(name + ".lora_A.weight")) is not None:
        # the adapter is fp32, and added rather than merged: W + BA in bf16 would lose small updates
        out = out + F.linear(F.linear(x.to(down.dtype), down), params[name + ".lora_B.weight"]).to(out.dtype)
    return out


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight: x [..., D], weight [D] -> like x. Computed in float32, of which it keeps 1 / rms(x) only."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        """For u = x / rms(x) and its gradient g: dx = (g - u mean(g u)) / rms(x)."""
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_unit = (grad * weight).float()
        mean = torch.linalg.vecdot(grad_unit, unit)[..., None] / x.shape[-1]
        return (grad_unit - unit.mul_(mean)).mul_(scale).to(x.dtype), grad_weight, None


rms_norm = RMSNorm.apply


def rope_frequencies(config, device="cpu"):
    """Radians per position of each pair of dimensions, [head_dim / 2] float32; stretched by parts under YaRN."""
    half = config.head_dim // 2
    # the published code's order of operations: at position 100,000, one rounding of a frequency shows in the logits
    periods = config.rope_theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)  # over 2 pi
    if (yarn := config.rope_scaling) is None:
        return 1 / periods

    def pair_of(turns):  # the pair that makes so many full turns within the trained context (YaRN, section 3.2)
        period = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return half * math.log(period) / math.log(config.rope_theta)

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = (torch.arange(half, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1: turns often, kept as it is; 0: never turns once, interpolated
    return 1 / (yarn.factor * periods) * (1 - keep) + 1 / periods * keep


def rope_table(config, positions, dtype):
    """cos and sin at `positions` [B, T], each [B, 1, T, head_dim] in `dtype`."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)  # [B, T, head_dim / 2]
    angles = torch.cat((angles, angles), -1)[:, None]
    scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Rotation(torch.autograd.Function):
    """Turns the pairs (i, i + head_dim/2) of x [B, H, T, head_dim] by their angles; its gradient is turned back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, -1)
        return (x * cos).addcmul_(torch.cat((-second, first), -1), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin), None, None


rotate = Rotation.apply


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v; the softmax is computed in float32 and kept for the backward pass in the dtype of q.

    q [N, R * T, head_dim], scaled; k and v [N, S, head_dim]; bias [N, T, S] -> like q. Of the scores only a few rows
    of N are there at a time, which stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        weights, out = q.new_empty(*q.shape[:2], k.shape[1]), torch.empty_like(q)  # [N, R * T, S]
        for part in slices(len(q), max(1, CPU_SCRATCH // weights[0].numel())):
            scores = torch.bmm(q[part], k[part].mT)
            scores.view(len(scores), -1, *bias.shape[1:]).add_(bias[part, None])
            torch.softmax(scores, -1, out=weights[part])
            torch.bmm(weights[part], v[part], out=out[part])
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for part in slices(len(q), max(1, CPU_SCRATCH // weights[0].numel())):
            grad_weights = torch.bmm(grad[part], v[part].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights[part], -1, q.dtype)
            torch.bmm(grad_scores, k[part], out=grad_q[part])
            torch.bmm(grad_scores.mT, q[part], out=grad_k[part])
        return grad_q, grad_k, torch.bmm(weights.mT, grad), None


def attention(q, k, v, seen=None):
    """Softmax attention with grouped heads: q [B, H, T, head_dim], k and v [B, K, S, head_dim] -> like q.

    seen: bool [T, S] or [B, T, S], which keys a query sees; None: causal, T = S.
    """
    B, H, T, head_dim = q.shape
    K, S = k.shape[1:3]
    if q.device.type == "cpu" and S <= 1024:  # the CPU's kernel takes three times as long for short rows in bfloat16
        if seen is None:
            seen = torch.ones(T, S, dtype=torch.bool).tril()
        q = q.reshape(B * K, -1, head_dim) * head_dim ** -0.5
        k, v = (x.reshape(B * K, S, head_dim) for x in (k, v))
        bias = torch.zeros(B, T, S, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        return ShortAttention.apply(q, k, v, bias.repeat_interleave(K, 0)).view(B, H, T, head_dim)
    if seen is not None and H != K:  # a mask and grouped heads together have no kernel that makes no scores
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    mask = None if seen is None else seen.expand(B, T, S)[:, None]  # [B, 1, T, S]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=seen is None, enable_gqa=H != k.shape[1])


def causal_attention(layer, q, k, v):
    """Each position sees itself and what stands before: q [B, H, T, head_dim], k and v [B, K, T, head_dim] -> like q.

    An attend_fn is given to every layer in turn. Others: `packed_attention`, `cached_attention` and the sampler's.
    """
    return attention(q, k, v)


def padded_length(n):
    """The next of few lengths, at most 31 or a sixteenth above n.

    oneDNN keeps a kernel for every shape that it meets, in between the buffers of the moment, whose space is then not
    whole again: with rows of any length, the memory of a run in bfloat16 on a CPU would grow with every step.
    """
    step = 1 << max(5, (n - 1).bit_length() - 5)
    return -(-n // step) * step


def packed_positions(groups):
    """[1, T] int64: the position of each token of a packed row within its own text. groups: as for packed_attention."""
    return torch.cat([torch.arange(n) + begin for prompt, lengths in groups
                      for begin, n in [(0, prompt), *((prompt, n) for n in lengths)]])[None]


class Rearrangement(torch.autograd.Function):
    """x [n, ...] -> x[index], zeros where it says n. back: index of the inverse, by which the gradient returns."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(index, back)
        if len(index) > len(x):  # there are such places
            x = F.pad(x, (0, 0, 0, 1))
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, back = ctx.saved_tensors
        return Rearrangement.apply(grad, back, index), None, None


def packed_attention(groups):
    """The attend_fn of one row [1, T] that holds groups: a prompt, then completions that each see it and themselves.

    groups: [(prompt length, [completion length, ...]), ...] in the order of the row. Prompts of no tokens make the
    completions texts of their own. The linear layers see every token once and no padding; only here are texts padded,
    so that all whose lengths round up to the same power of two, as do their prompts', attend in one call.
    """
    def rounded(n):
        return max(32, 1 << (n - 1).bit_length()) if n else 0

    parts, T = {}, 0  # {(rounded length of the prompt that is seen, own rounded length): [(begin, length, its prompt)]}
    for prompt, lengths in groups:
        front, which = rounded(prompt), None
        if prompt:
            alike = parts.setdefault((0, front), [])
            which = len(alike)
            alike.append((T, prompt, None))
        T += prompt
        for n in lengths:
            parts.setdefault((front, rounded(n)), []).append((T, n, which))
            T += n
    positions = {}  # {part: [texts, longest] int64}, T for padding
    for key, spans in parts.items():
        begins, lengths = (torch.tensor(column)[:, None] for column in list(zip(*spans))[:2])
        steps = torch.arange(padded_length(int(lengths.max())))
        positions[key] = torch.where(steps < lengths, begins + steps, T)
    # {part: {prompt: how many of the texts see it}}
    counts = {key: Counter(prompt for *_, prompt in spans) for key, spans in parts.items() if key[0]}

    @functools.cache  # the same in every layer
    def arrangement(heads, device):
        """From x [T * heads, head_dim] to [texts, heads, longest, head_dim] of each part, end to end; and back."""
        index = torch.cat([(at[:, None] * heads + torch.arange(heads)[:, None]).clamp(max=T * heads).flatten()
                           for at in positions.values()])
        back = torch.empty(T * heads + 1, dtype=torch.int64)
        back[index] = torch.arange(len(index))
        return index.to(device), back[:-1].to(device)

    @functools.cache
    def seen(key, device):  # bool [texts, longest, longest prompt + longest]
        n, own = positions[key].shape
        prompts = (positions[0, key[0]] < T)[[prompt for *_, prompt in parts[key]]]  # [texts, longest prompt]
        return torch.cat((prompts[:, None].expand(-1, own, -1), torch.ones(n, own, own, dtype=torch.bool).tril()),
                         -1).to(device)

    def apart(x):  # [1, heads, T, head_dim] -> {part: [texts, heads, longest, head_dim]}
        heads, head_dim = x.shape[1], x.shape[3]
        x = Rearrangement.apply(x[0].transpose(0, 1).reshape(-1, head_dim), *arrangement(heads, x.device))
        pieces = x.split([at.numel() * heads for at in positions.values()])
        return {key: piece.view(len(at), heads, -1, head_dim) for (key, at), piece in zip(positions.items(), pieces)}

    def attend_fn(layer, q, k, v):
        qs, ks, vs = map(apart, (q, k, v))
        outs = []
        for key in parts:
            k1, v1, mask = ks[key], vs[key], None
            if key[0]:
                k1, v1 = (torch.cat((torch.cat([x[0, key[0]][i].expand(n, -1, -1, -1) for i, n in counts[key].items()]),
                                     x[key]), 2) for x in (ks, vs))
                mask = seen(key, q.device)
            outs.append(attention(qs[key], k1, v1, mask).flatten(0, 2))
        index, back = arrangement(q.shape[1], q.device)
        out = Rearrangement.apply(torch.cat(outs), back, index)  # [T * H, head_dim]
        return out.view(1, T, -1, out.shape[1]).transpose(1, 2)

    return attend_fn


def block(params, config, layer, x, cos, sin, attend_fn):
    """One transformer layer: x [B, T, D] -> [B, T, D]."""
    B, T, _ = x.shape
    pre = f"model.layers.{layer}."
    h = rms_norm(x, params[pre + "input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (linear(params, f"{pre}self_attn.{part}_proj", h).view(B, T, -1, config.head_dim).transpose(1, 2)
               for part in "qkv")  # [B, H, T, head_dim], [B, K, T, head_dim], [B, K, T, head_dim]
    out = attend_fn(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + linear(params, pre + "self_attn.o_proj", out.transpose(1, 2).reshape(B, T, -1))
    h = rms_norm(x, params[pre + "post_attention_layernorm.weight"], config.rms_norm_eps)
    h = F.silu(linear(params, pre + "mlp.gate_proj", h)) * linear(params, pre + "mlp.up_proj", h)  # [B, T, I]
    return x + linear(params, pre + "mlp.down_proj", h)


class Cache(NamedTuple):
    """Keys and values by slot; the token at position p of a row is held in slot p."""
    k: torch.Tensor  # [L, B, K, S, head_dim]
    v: torch.Tensor
    lengths: torch.Tensor  # [B] int64: tokens held in each row


def init_cache(config, batch, slots, device="cpu", dtype=torch.float32):
    """An empty cache for `batch` rows of at most `slots` tokens."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
    return Cache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype),
                 torch.zeros(batch, dtype=torch.int64, device=device))


def cached_attention(cache, positions):
    """The attend_fn that writes keys and values into `cache` and attends to all it holds up to each position."""
    B, T = positions.shape
    rows = torch.arange(B, device=positions.device)[:, None].expand(B, T)
    seen = torch.arange(cache.k.shape[3], device=positions.device) <= positions[:, None, :, None]  # [B, 1, T, S]

    def attend_fn(layer, q, k, v):
        cache.k[layer][rows, :, positions] = k.transpose(1, 2).to(cache.k.dtype)
        cache.v[layer][rows, :, positions] = v.transpose(1, 2).to(cache.v.dtype)
        return F.scaled_dot_product_attention(q, cache.k[layer].to(q.dtype), cache.v[layer].to(q.dtype), attn_mask=seen,
                                              enable_gqa=q.shape[1] != k.shape[1])

    return attend_fn


def hidden_states(params, config, tokens, positions=None, attend_fn=causal_attention, checkpointing=False):
    """What the head reads: tokens [B, T], positions [B, T] (default 0, 1, ...) -> [B, T, D], after the last norm.

    checkpointing: keep only each layer's input for the backward pass and compute the rest again (arXiv:1604.06174).
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    x = F.embedding(tokens, params["model.embed_tokens.weight"])  # [B, T, D]
    cos, sin = rope_table(config, positions, x.dtype)
    for layer in range(config.num_hidden_layers):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, params, config, layer, x, cos, sin, attend_fn, use_reentrant=False)
        else:
            x = block(params, config, layer, x, cos, sin, attend_fn)
    return rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)


def packed_hidden_states(params, config, tokens, groups, checkpointing=False):
    """`hidden_states` of one packed row: tokens [T], groups as for packed_attention -> [T, D]."""
    T = len(tokens)
    extra = padded_length(T) - T
    groups = groups + [(0, [extra])] * bool(extra)  # a text of its own, which nothing reads
    positions = packed_positions(groups).to(tokens.device)
    tokens = F.pad(tokens, (0, extra))[None]
    return hidden_states(params, config, tokens, positions, packed_attention(groups), checkpointing)[0, :T]


def lm_head(params, config, hidden):
    """Logits in float32: [..., D] -> [..., V]. The matrix product runs in the dtype of the weights."""
    return F.linear(hidden, head_weight(params, config)).float()


def head_weight(params, config):
    """[V, D]: of the head, or of the embedding, which is then tied to it."""
    return params["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]


def forward(params, config, tokens, positions=None, cache=None):
    """Logits of every position: tokens [B, T] -> [B, T, V] float32.

    positions: [B, T] absolute positions; default 0, 1, ..., or with a cache, on from what each row holds.
    cache: from init_cache; written in place. Rows of different lengths stand left-aligned: what was written behind a
    row's real end is never seen, once `positions` says where the row really continues.
    Raises ValueError when the tokens outgrow the context, or with a cache, its slots.
    """
    if cache is None:
        if tokens.shape[1] > config.max_context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit the context of {config.max_context}")
        return lm_head(params, config, hidden_states(params, config, tokens, positions))
    if positions is None:
        positions = cache.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    if (last := int(positions.max())) >= cache.k.shape[3]:
        raise ValueError(f"position {last} does not fit a cache of {cache.k.shape[3]} slots")
    hidden = hidden_states(params, config, tokens, positions, cached_attention(cache, positions))
    cache.lengths.copy_(positions[:, -1] + 1)
    return lm_head(params, config, hidden)


# ------------------------------------------------------------------------------------ log-probabilities


class HeadLogprobs(torch.autograd.Function):
    """What `head_logprobs` returns, a slice of the positions at a time; the backward pass makes the logits again.

    Nothing of [positions, V] outlives its slice: with 151,936 words, 8,192 positions of float32 logits and their
    gradient would take 9.3 GiB. When all positions are one slice, the backward pass, which begins here, finds their
    probabilities kept: that takes no more memory than to make them again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, slice_tokens, entropy_grad):
        ctx.settings = temperature, slice_tokens, entropy_grad
        logprobs = torch.empty_like(targets, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        parts, p = slices(len(targets), slice_tokens), None
        for part in parts:
            logp = vocabulary_logits(hidden[part], weight, temperature).log_softmax(-1)
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            p = logp.exp()
            entropy[part] = -logp.mul_(p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, *[p] * (len(parts) == 1 and not entropy_grad))
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """For logits z: d log p(target) / dz = onehot(target) - p, and dH / dz = -p (log p + H)."""
        hidden, weight, targets, *kept = ctx.saved_tensors
        temperature, slice_tokens, entropy_grad = ctx.settings
        grad, grad_entropy = grad / temperature, grad_entropy / temperature if entropy_grad else None
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for part in slices(len(targets), slice_tokens):
            if entropy_grad:
                logp = vocabulary_logits(hidden[part], weight, temperature).log_softmax(-1)
                p = logp.exp()
                logp -= (p * logp).sum(-1, keepdim=True)  # log p + H
                grad_logits = p * -(grad[part, None] + grad_entropy[part, None] * logp)
            else:
                p = kept[0] if kept else vocabulary_logits(hidden[part], weight, temperature).softmax(-1)
                grad_logits = p * -grad[part, None]
            grad_logits = grad_logits.scatter_add_(1, targets[part, None], grad[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if ctx.needs_input_grad[1]:  # summed in float32
                product = grad_logits.T @ hidden[part]
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        return grad_hidden, grad_weight, None, None, None, None


def vocabulary_logits(hidden, weight, temperature):
    """hidden [n, D], weight [V, D] -> [n, V] float32, divided by the temperature."""
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1 else logits / temperature


def slices(n, size):
    return [slice(begin, begin + size) for begin in range(0, n, size)]


def head_slice(vocab_size, device):
    """Positions whose logits are made at a time: 2**27 logits, 0.5 GiB, on a GPU, and CPU_SCRATCH on a CPU; but 128
    positions at least."""
    return max(128, (CPU_SCRATCH if device == "cpu" else 2**27) // vocab_size)


def head_logprobs(params, config, hidden, targets, temperature=1.0, slice_tokens=None, entropy_grad=False):
    """log p(targets) and the entropy of the distribution (nats): hidden [N, D], targets [N] -> ([N], [N]) float32.

    The logits are divided by `temperature` first, and made for `slice_tokens` positions at a time; default: head_slice.
    The entropy carries a gradient only when `entropy_grad` asks for it.
    """
    n, extra = len(targets), padded_length(len(targets)) - len(targets)
    hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
    slice_tokens = slice_tokens or head_slice(config.vocab_size, hidden.device.type)
    logprobs, entropy = HeadLogprobs.apply(hidden, head_weight(params, config), targets, temperature, slice_tokens,
                                           entropy_grad)
    return logprobs[:n], entropy[:n]


def token_logprobs(params, config, tokens, temperature=1.0, checkpointing=False):
    """Log-probability of every token but the first, given those before it: [B, T] -> [B, T-1] float32, differentiable.

    Padding stands at the right of a row, where causal attention keeps it from mattering.
    """
    hidden = hidden_states(params, config, tokens, checkpointing=checkpointing)[:, :-1]  # [B, T-1, D]
    logprobs, _ = head_logprobs(params, config, hidden.flatten(0, 1), tokens[:, 1:].flatten(), temperature)
    return logprobs.view(hidden.shape[:2])


# ------------------------------------------------------------------------------------ LoRA


def init_lora(config, rank, seed, device="cpu"):
    """An adapter for every linear layer: {name.lora_A.weight: [rank, in], name.lora_B.weight: [out, rank]} in float32.

    B starts at zero, so `params | lora` starts as `params`. The scale alpha / rank of the paper is 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is not positive")
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name, shape in param_shapes(config).items():
        if (stem := name.removesuffix(".weight")).endswith(LINEARS):
            bound = math.sqrt(3 / shape[1])  # Kaiming uniform, gain 1
            down = (torch.rand(rank, shape[1], generator=generator) * 2 - 1) * bound
            lora[stem + ".lora_A.weight"] = down.to(device)
            lora[stem + ".lora_B.weight"] = torch.zeros(shape[0], rank, device=device)
    return lora


def merged_weight(params, name):
    """A weight with its adapter in `params` worked in, W + B A, computed in float32; without one, as it is."""
    weight, stem = params[name], name.removesuffix(".weight")
    if stem + ".lora_A.weight" not in params:
        return weight
    down, up = (params[f"{stem}.lora_{half}.weight"].float() for half in "AB")
    return (weight.float() + up @ down).to(weight.dtype)


def merge_lora(params):
    """Every weight with its adapter worked in, a new dict; what has no adapter is shared with `params`."""
    return {name: merged_weight(params, name) for name in params if ".lora_" not in name}
