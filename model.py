"""Llama from scratch: one packed token stream in, hidden states out.

It is Llama 2 / 3 / 3.1 / 3.2, Mistral, Zephyr, Tulu 3, SmolLM2 and Qwen2, which differ in shape, biases and
rotary frequencies only; and Qwen3, OLMo 2 and OLMo 3, which also differ in their norms. Shapes: T tokens of a
packed stream, N documents in it, D hidden size, H query heads, G key/value heads, K head size, V vocabulary,
L blocks. Module names are Hugging Face's, so their weights load strictly with no key map.
"""

import functools
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import attention, fused_block, reference, rms_norm
from plumbing import kinds
from plumbing.files import UserError, read_config

# every linear of a block
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------- configuration
# config.json is the only description of a model. What it can say and this file cannot compute is refused by
# name: a model that differs in one silent key trains, and exports, something else.


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama. Field names and meanings are config.json's; biases and norms are ours."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    # the mask of a sliding window is not implemented: documents longer than this are refused
    sliding_window: int | None = None
    # Qwen2 and Qwen3 with a window: the blocks from this one on have it. Long documents are refused anyway.
    max_window_layers: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    # RMSNorm of q and k before the rotation: over each head (Qwen3) or over their whole width (OLMo 2)
    qk_norm: Literal["head", "width"] | None = None
    post_norm: bool = False  # OLMo 2: a block's norms are behind attention and MLP, not before them
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None  # only kept, for the export: documents are packed, nothing is padded

    final_logit_softcapping = None  # a Gemma's, see next_logits

    def require_length(self, max_seq_len):
        """UserError when documents of max_seq_len tokens are longer than the model was made for."""
        for key in ("sliding_window", "max_position_embeddings"):
            limit = getattr(self, key)
            if limit and max_seq_len > limit:
                raise UserError(f"max_seq_len={max_seq_len}: expected at most the model's {key}={limit}")

    @classmethod
    def from_hf(cls, directory):
        """Read config.json in `directory`.

        UserError, naming the key, for anything this file cannot represent exactly.
        """
        return _config_from_hf(read_config(directory), Path(directory) / "config.json")

    @classmethod
    def preset(cls, name):
        """A known shape without its weights: one of PRESETS; tiny is the demo's."""
        if name not in PRESETS:
            raise UserError(f"preset={name!r}: expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def to_hf(self):
        """The config.json dict with which transformers builds the same model."""
        rope = {"rope_type": "default"}
        if self.rope_scaling:
            rope = {"rope_type": "llama3"} | vars(self.rope_scaling)
        keys = (*_REQUIRED, "num_key_value_heads", "head_dim", "tie_word_embeddings", "model_type")
        out = {key: getattr(self, key) for key in (*keys, "bos_token_id", "eos_token_id")}
        # an OLMo without the key has transformers' default, 1
        if self.pad_token_id is not None or self.model_type in ("olmo2", "olmo3"):
            out["pad_token_id"] = self.pad_token_id
        out["architectures"] = [_ARCHITECTURES[self.model_type]]
        out |= {"hidden_act": "silu", "attention_dropout": 0.0}
        # both spellings: transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters
        out |= {"rope_theta": self.rope_theta, "rope_scaling": rope if self.rope_scaling else None}
        out["rope_parameters"] = rope | {"rope_theta": self.rope_theta}
        if self.model_type == "olmo3":  # a rope for each kind of layer
            out["rope_parameters"] = dict.fromkeys(_OLMO3_LAYERS, out["rope_parameters"])
        if self.model_type in _ATTENTION_BIAS:
            if self.qkv_bias != self.o_bias:
                one_switch = "Hugging Face's class has one switch, attention_bias, for both"
                raise UserError(f"qkv_bias != o_bias: {one_switch}")
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.model_type in ("mistral", "olmo3"):
            out["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            out["use_sliding_window"] = self.sliding_window is not None
            out["sliding_window"] = self.sliding_window
            if self.sliding_window:
                out["max_window_layers"] = self.max_window_layers
        return out

    def weight_shapes(self):
        """{name: {key of config.json: size}} of a few weights that together hold every size.

        They are compared with the files before anything is allocated.
        """
        V, D, block = self.vocab_size, self.hidden_size, "model.layers.0"
        queries = self.num_attention_heads * self.head_dim
        keys_of_heads = self.num_key_value_heads * self.head_dim
        return {
            "model.embed_tokens.weight": {"vocab_size": V, "hidden_size": D},
            "lm_head.weight": {"vocab_size": V, "hidden_size": D},
            f"{block}.self_attn.q_proj.weight": {"num_attention_heads * head_dim": queries, "hidden_size": D},
            f"{block}.self_attn.k_proj.weight": {
                "num_key_value_heads * head_dim": keys_of_heads,
                "hidden_size": D,
            },
            f"{block}.mlp.up_proj.weight": {"intermediate_size": self.intermediate_size, "hidden_size": D},
        }

    def flops(self, length, logits=None):
        """Forward FLOPs of one document of `length` tokens: matmuls and causal attention, exactly.

        logits: positions whose logits are taken (default: all). Both may be int64 arrays, one entry per
        document.
        """
        D = self.hidden_size
        q_and_o = 2 * D * self.num_attention_heads * self.head_dim  # weights
        k_and_v = 2 * D * self.num_key_value_heads * self.head_dim
        mlp = 3 * D * self.intermediate_size
        # A weight is multiplied and added once for each token. Norms, rotations and softmax are not counted,
        # as in every published mfu.
        blocks = self.num_hidden_layers * 2 * length * (q_and_o + k_and_v + mlp)
        head = 2 * D * self.vocab_size * (length if logits is None else logits)
        return blocks + self.attention_flops(length) + head

    def attention_flops(self, length):
        """Forward FLOPs of attention's two products over all layers.

        4 H K for each of length (length + 1) / 2 visible pairs of tokens.
        """
        return self.num_hidden_layers * 2 * self.num_attention_heads * self.head_dim * length * (length + 1)


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
# what the name of an architecture says about its norms, and no key does
_NORMS = {
    "qwen3": dict(qk_norm="head"),
    "olmo2": dict(qk_norm="width", post_norm=True),
    "olmo3": dict(qk_norm="width", post_norm=True),
}
_ATTENTION_BIAS = ("llama", "qwen3", "olmo2", "olmo3")  # the classes with this switch
_OLMO3_LAYERS = ("sliding_attention", "full_attention")
# what a config.json must say, because there is no default that is right for all
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip

_LLAMA3 = dict(vocab_size=128256, rope_theta=500000.0, max_position_embeddings=131072, num_key_value_heads=8)
# the published config.json files: a plan and a benchmark need no download
PRESETS = {
    "llama-3.1-8b": LlamaConfig(
        **_LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        head_dim=128, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
    "llama-3.2-1b": LlamaConfig(
        **_LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        head_dim=64, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), tie_word_embeddings=True,
    ),
    "mistral-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        sliding_window=4096, model_type="mistral",
    ),
    "olmo-2-1b": LlamaConfig(
        vocab_size=100352, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128, rms_norm_eps=1e-6, rope_theta=500000.0,
        qk_norm="width", post_norm=True, model_type="olmo2",
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
    ),
}  # fmt: skip

# what may stand under the keys that are read
CONFIG_KINDS = {
    **dict.fromkeys(_REQUIRED, kinds.SIZE),
    "num_hidden_layers": kinds.LAYERS,
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), kinds.SIZE | kinds.NULL),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), kinds.TOKEN_ID | kinds.NULL),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), kinds.SWITCH
    ),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), kinds.OBJECT | kinds.NULL),
    "eos_token_id": kinds.TOKEN_ID | kinds.list_of(kinds.TOKEN_ID) | kinds.NULL,
    "max_window_layers": kinds.SIZE,
    "model_type": kinds.TEXT,
    "rms_norm_eps": kinds.NOT_NEGATIVE,
    "rope_theta": kinds.POSITIVE,
}
_ROPE_KINDS = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), kinds.POSITIVE),
    **dict.fromkeys(("rope_type", "type"), kinds.TEXT),
    "original_max_position_embeddings": kinds.SIZE,
}

# keys of other people's configs that change the model, each with the values under which it is ours
_FIXED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "original_max_position_embeddings": (None,),
    "pretraining_tp": (1, None),
}


def _config_from_hf(raw, source):
    def refuse(key, expected):
        raise UserError(f"{source}: {key}={raw.get(key)!r}: expected {expected}")

    kinds.check(source, raw, CONFIG_KINDS)
    # First the architecture: another one gives keys of the same name another meaning.
    if raw.get("model_type") not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        refuse("model_type", f"one of {known}: this code represents no other architecture exactly")
    if raw.get("quantization_config") is not None:
        refuse("quantization_config", "no such key: quantised weights are not supported")
    for key, allowed in _FIXED.items():
        if key in raw and raw[key] not in allowed:
            refuse(key, repr(allowed[0]))
    # Qwen3's own defaults, 128 and 32, follow from no other key
    also = ("head_dim", "num_key_value_heads") if raw["model_type"] == "qwen3" else ()
    if missing := [key for key in _REQUIRED + also if raw.get(key) is None]:
        keys = ", ".join(missing)
        raise UserError(f"{source}: {keys}: missing; expected in every {raw['model_type']} config")
    model_type = raw["model_type"]
    heads = raw["num_attention_heads"]
    # configs of Llama 2's time have neither key: a key/value head for each query head, and D split evenly
    kv_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % kv_heads or head_dim % 2:
        found = f"num_attention_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim}"
        expected = "a multiple of the key/value heads, and an even head size (RoPE turns pairs)"
        raise UserError(f"{source}: {found}: expected {expected}")
    # Qwen2 has biases on q, k and v without a key for it; a Mistral has a window unless it says null
    attention_bias = model_type in _ATTENTION_BIAS and raw.get("attention_bias", False)
    is_qwen = model_type in ("qwen2", "qwen3")
    windowed = model_type in ("mistral", "olmo3") or (is_qwen and raw.get("use_sliding_window", False))
    rope_theta, rope_scaling = (_olmo3_rope if model_type == "olmo3" else rope_from_hf)(raw, source)
    eos = raw.get("eos_token_id")
    return LlamaConfig(
        **{key: raw[key] for key in _REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        # 4096 and 28: transformers' defaults
        sliding_window=raw.get("sliding_window", 4096) if windowed else None,
        max_window_layers=raw.get("max_window_layers", 28) if windowed and is_qwen else None,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=model_type == "llama" and raw.get("mlp_bias", False),
        **_NORMS.get(model_type, {}),
        model_type=model_type,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=raw.get("pad_token_id"),
    )


def rope_from_hf(raw, source):
    """Read (theta, RopeScaling | None) from either spelling of the keys.

    transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling. UserError where both
    are there and say different things: which one counts depends on the version that reads them.
    """
    found = {key: _rope(raw, key, source) for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    if len(set(found.values())) > 1:
        both = ", ".join(f"{key}={raw[key]}" for key in found)
        raise UserError(f"{source}: {both}: expected one of them, or the same in both")
    return next(iter(found.values()), (raw.get("rope_theta", 10000.0), None))


def _olmo3_rope(raw, source):
    """(theta, None) where both kinds of OLMo 3's layers turn alike; UserError otherwise."""

    def refuse(key, expected):
        raise UserError(f"{source}: {key}={raw[key]!r}: expected {expected}")

    # As released, its rope is stretched (yarn) in the layers without a window only.
    pattern = [_OLMO3_LAYERS[i % 4 == 3] for i in range(raw["num_hidden_layers"])]
    if raw.get("layer_types") not in (None, pattern):
        refuse("layer_types", "the window in three of four layers, the fourth without")
    if raw.get("rope_scaling"):
        refuse("rope_scaling", "null: stretching the layers without a window only is not implemented")
    ropes = raw.get("rope_parameters")
    if not ropes:
        return raw.get("rope_theta", 500000.0), None  # transformers' default
    if ropes.keys() != set(_OLMO3_LAYERS) or len({_rope(ropes, kind, source) for kind in ropes}) > 1:
        refuse("rope_parameters", f"the same for each of {', '.join(_OLMO3_LAYERS)}")
    theta, scaling = _rope(ropes, _OLMO3_LAYERS[0], source)
    if scaling:
        refuse("rope_parameters", "rope_type='default'")
    return theta, None


def _rope(raw, key, source):
    kinds.check(source, raw, {key: kinds.OBJECT})
    rope = raw[key]
    kinds.check(f"{source}: {key}", rope, _ROPE_KINDS)
    if rope.get("partial_rotary_factor", 1) != 1:
        factor = rope["partial_rotary_factor"]
        raise UserError(f"{source}: {key}: partial_rotary_factor={factor!r}: expected 1")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{source}: {key}: rope_type={kind!r}: expected 'default' or 'llama3'")
    names = RopeScaling.__dataclass_fields__
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"{source}: {key}: {', '.join(missing)}: missing; expected with rope_type='llama3'")
    scaling = RopeScaling(**{name: rope[name] for name in names})
    if scaling.low_freq_factor >= scaling.high_freq_factor:  # the ramp between them divides by the difference
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        raise UserError(f"{source}: {key}: low_freq_factor={low}: expected less than high_freq_factor={high}")
    return theta, scaling


# ---------------------------------------------------------------- rotary positions
# Position enters in one place: q and k are turned by angles, so that their product depends on the distance
# between two tokens only. Llama 3.1 stretches 8,192 trained positions to 131,072: slow pairs turn slower.


# Cached: every forward uses the same (K/2,) numbers, and a copy to a GPU makes the host wait.
@functools.lru_cache(maxsize=8)
def rope_frequencies(config, device):
    """Angle per position of each of the K/2 rotated pairs, (K/2,) float32 (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling:
        # Llama 3.1: pairs that turn often enough within the original context stay, those that turn too seldom
        # are slowed down by `factor`, with a ramp between the two
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        ramp = ramp.clamp(0, 1)
        frequencies = ramp * frequencies + (1 - ramp) * frequencies / scaling.factor
    return frequencies.to(device)


def rope_tables(config, position_ids):
    """cos and sin of the angles of T positions, (T, 1, K/2) each: one row for all heads.

    In float32 whatever the weights are: bf16 would round position 4,097 to 4,096.
    """
    angles = position_ids[:, None, None] * rope_frequencies(config, position_ids.device)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------- the blocks
# Documents lie end to end in one stream of T tokens, so nothing is padded and every tensor of a block is (T,
# ..). Only attention knows where documents begin. The modules below are the definition, and run as written on
# CPUs and under kernels="plain"; fused_block.py computes the same numbers with its own backward pass.


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size, self.eps = size, eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=config.o_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            is_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(K if is_head else self.q_proj.out_features, config.rms_norm_eps)
            self.k_norm = RMSNorm(K if is_head else self.k_proj.out_features, config.rms_norm_eps)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen, attend):
        """x (T, D) -> (T, D). attend: kernels.attention, or a KV cache's."""
        T = x.shape[0]
        q, k = self.q_proj(x), self.k_proj(x)  # (T, H K) and (T, G K)
        if self.q_norm is not None:
            # over the last dimension: a head's K numbers, or all of a token's
            q = self.q_norm(q.view(T, -1, self.q_norm.size))
            k = self.k_norm(k.view(T, -1, self.k_norm.size))
        # the specification, not a kernel: autograd differentiates it here
        q = reference.rotate(q.view(T, -1, self.head_dim), cos, sin)  # (T, H, K)
        k = reference.rotate(k.view(T, -1, self.head_dim), cos, sin)  # (T, G, K)
        v = self.v_proj(x).view(T, -1, self.head_dim)
        return self.o_proj(attend(q, k, v, cu_seqlens, max_seqlen).reshape(T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.post_norm = config.post_norm
        others = "post_feedforward_layernorm" if config.post_norm else "input_layernorm"
        for name in (others, "post_attention_layernorm"):
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.fused, self.fp8, self.recompute = False, False, False  # see apply_fused and apply_recompute

    def forward(self, hidden, *stream):
        # stream: cos, sin, cu_seqlens, max_seqlen, attend; the same for all blocks, so none is named here
        run = fused_block.block if self.fused else Block.plain
        if self.recompute and torch.is_grad_enabled():
            # only LoRA's dropout is random, and that is in the plain block only
            options = dict(use_reentrant=False, preserve_rng_state=not self.fused)
            return checkpoint(run, self, hidden, *stream, **options)
        return run(self, hidden, *stream)

    def norms(self):
        """The norms before and behind attention, then those of the MLP; None where the model has none."""
        # Hugging Face's names: post_attention_layernorm is the MLP's input norm, except where post_norm
        if self.post_norm:
            return None, self.post_attention_layernorm, None, self.post_feedforward_layernorm
        return self.input_layernorm, None, self.post_attention_layernorm, None

    def plain(self, hidden, *stream):
        """The definition of a block, hidden (T, D) -> (T, D); fused_block.block computes the same."""
        if self.post_norm:
            hidden = hidden + self.post_attention_layernorm(self.self_attn(hidden, *stream))
            return hidden + self.post_feedforward_layernorm(self.mlp(hidden))
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *stream)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        # zeros until weights are loaded or drawn: nn.Embedding draws its own, and imports a compiler for it
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A decoder whose forward stops at the hidden states.

    Logits would be (T, V), 4 GB for 8,192 tokens of Llama 3. kernels.token_logps takes log-probs from the
    hidden states and lm_head.weight without holding them all.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.attention_kernel = "flash2"  # on GPUs, see kernels.attention
        # one parameter under two names: its gradient is the sum of both uses
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids, position_ids, cu_seqlens, max_seqlen, tap=None, cache=None, resume=None, shared=None
    ):
        """Hidden states after the final norm, (T, D), of a packed stream.

        input_ids, position_ids (T,) int64, positions counted from 0 in each document; cu_seqlens (N+1,)
        int32; max_seqlen int, of the longest document, its prefix included.

        tap(layer, hidden) -> hidden sees, and may replace, the residual stream (T, D) after each block (layer
        = 0..L-1), before the final norm: the one place to read from and to steer at.
        cache: a KVCache that holds the documents' earlier tokens. resume=(first, hidden): skip the embedding
        and the blocks below `first`; hidden (T, D) is what enters it. shared: a kernels.SharedPrefix;
        positions of documents without their prefix count from its length.
        """
        config = self.config
        longest = max_seqlen if cache is None else cache.slots  # a new token sees all the cached ones
        if config.sliding_window and longest > config.sliding_window:
            raise UserError(
                f"sliding_window={config.sliding_window}: a document of {longest} tokens needs a window "
                f"mask, which is not implemented; expected max_seq_len <= {config.sliding_window}"
            )
        cos, sin = rope_tables(config, position_ids)
        assert cache is None or shared is None, "a cache holds whole documents"
        # what a block calls to mix tokens: everything about documents is bound here
        attend = functools.partial(attention, shared=shared, kernel=self.attention_kernel)
        # a sweep runs the blocks below the first steered one once, and those above it for each lambda
        if resume is not None:
            first, hidden = resume
        else:
            first, hidden = 0, fused_block.embed(self.model.embed_tokens.weight, input_ids)  # (T, D)
        for index, layer in enumerate(self.model.layers[first:], first):
            if cache is not None:
                attend = functools.partial(cache.attend, index)
            hidden = layer(hidden, cos, sin, cu_seqlens, max_seqlen, attend)  # (T, D)
            # behind the block, where Hugging Face's output_hidden_states[index + 1] is read
            if tap is not None:
                hidden = tap(index, hidden)
        return self.model.norm(hidden)

    @torch.no_grad()
    def init_weights(self, seed):
        """Random weights for training from scratch: normal(0, 0.02), norms at one, biases at zero."""
        generator = torch.Generator().manual_seed(seed)
        # 2 L outputs are added to the residual stream, whose variance must not grow with depth (GPT-2)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, param in self.named_parameters():
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                param.copy_(torch.randn(param.shape, generator=generator) * std)


# ---------------------------------------------------------------- how blocks are run
# Each apply_* sets one switch from outside, so the blocks stay readable. training.load_model has their order.


def apply_fused(model, fp8=False):
    """Run every block through fused_block.block: the same numbers up to rounding, in less time and memory.

    It keeps 92 KB a token and layer of the 8B shape for the backward pass, not 200.
    fp8: multiply by the blocks' seven linears, forward and backward, in float8 (reference.Float8).
    """
    for layer in model.model.layers:
        layer.fused, layer.fp8 = True, fp8


def apply_recompute(model, mode):
    """Recompute blocks in the backward pass: more time, less memory.

    A block that recomputes keeps its input only: 8 KB a token and layer of the 8B shape, not 92. mode:
    "none", "half" (every second block: 1.16x the FLOPs) or "full" (1.31x).
    """
    for index, layer in enumerate(model.model.layers):
        layer.recompute = mode == "full" or (mode == "half" and index % 2 == 0)


# ---------------------------------------------------------------- LoRA
# The adapted linear keeps its weight's name, so that a frozen model loads as it would without LoRA. Switching
# adapters off gives the base model: the DPO reference of a LoRA run costs no memory.


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / rank) B A x, with W and b frozen (Hu et al. 2021, eq. 3).

    Keeps the plain linear's parameter names.
    """

    def __init__(self, linear, rank, alpha, dropout):
        # not nn.Linear's: it would allocate a second weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # float32 beside a bf16 weight: what AdamW moves it by is small beside bf16's spacing
        kind = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **kind))
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout
        self.enabled = True  # see adapters_disabled

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        # rank first: (T, in) -> (T, rank) -> (T, out) costs rank (in + out) a token, B A would cost in * out
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))

    def merged_weight(self):
        """W + (alpha / rank) B A, added in float32 and rounded once to W's dtype: (out, in)."""
        update = self.scale * self.lora_B.float() @ self.lora_A.float()
        return (self.weight.float() + update).to(self.weight.dtype)


def apply_lora(model, rank, alpha, dropout=0.0, targets=LINEARS):
    """Freeze the model and put LoRA adapters on every linear named in `targets`.

    They leave it unchanged. On the meta device, init_lora fills them once they are allocated.
    """
    unknown = set(targets) - set(LINEARS)
    if unknown or not targets:
        raise UserError(f"lora_targets={sorted(targets)}: expected a choice of {', '.join(LINEARS)}")
    # everything, embeddings and norms too: an adapter folder holds A and B, and nothing else
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in set(targets) & set(dict(parent.named_children())):
                setattr(parent, name, LoRALinear(getattr(parent, name), rank, alpha, dropout))
    if not model.lm_head.weight.is_meta:
        init_lora(model, seed=0)


@torch.no_grad()
def init_lora(model, seed, assign=lambda param, values: param.copy_(values)):
    """Draw A anew, and set B to zero, so that the model starts unchanged.

    A is uniform in +-1/sqrt(in), as PEFT's kaiming_uniform with a = sqrt(5). `assign(param, values)` stores a
    full float32 tensor. A sharded model passes parallel.assign.
    """
    # drawn whole on the CPU: any number of ranks and any device get the same A
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith("lora_A"):
            assign(param, (torch.rand(param.shape, generator=generator) * 2 - 1) / math.sqrt(param.shape[1]))
        elif name.endswith("lora_B"):
            assign(param, torch.zeros(param.shape))


@torch.no_grad()
def merge_lora(model):
    """Replace every LoRALinear of an unsharded model by the plain linear with its merged weight."""
    parents = [module for module in model.modules() if isinstance(module, (Attention, MLP))]
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                # on the meta device: the new linear takes the merged weight and allocates none of its own
                has_bias = child.bias is not None
                plain = nn.Linear(child.in_features, child.out_features, bias=has_bias, device="meta")
                plain.weight, plain.bias = nn.Parameter(child.merged_weight()), child.bias
                setattr(parent, name, plain)


@contextmanager
def adapters_disabled(model):
    """Within the context the model is the frozen base: the DPO reference, at no memory cost."""
    # only those that are on: contexts may be nested, and the inner one must not switch them on again
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear) and m.enabled]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def training_flops(model, forward_flops, attention_flops, tokens):
    """FLOPs of a forward and a backward pass over `tokens` tokens, whose forward pass has forward_flops.

    A product has two gradients, so the backward pass costs two forwards. Under LoRA a frozen weight has none;
    attention, which has attention_flops of the forward_flops, multiplies no weights and keeps both.
    """
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if not adapters:
        return 3 * forward_flops
    return 2 * forward_flops + attention_flops + 6 * adapters * tokens


# ---------------------------------------------------------------- generation
# For samples in the log and for steered answers, so it is simple rather than fast: prompts are read as one
# packed stream, then all documents grow by one token at a time.


class KVCache:
    """Keys and values of N documents that grow together.

    k, v: (L, N, S, G, K) with S slots each; lengths: (N,).
    """

    def __init__(self, config, num_documents, slots, dtype, device):
        shape = (config.num_hidden_layers, num_documents, slots, config.num_key_value_heads, config.head_dim)
        # zeros, not empty: an unfilled slot has weight 0, and 0 times a NaN that lay in memory would be NaN
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = slots
        self.lengths = torch.zeros(num_documents, dtype=torch.int64, device=device)

    def store(self, layer, k, v, cu_seqlens):
        """Put the new tokens' k, v (T, G, K) behind each document's earlier ones, in its row of the cache."""
        counts = cu_seqlens.long().diff()  # (N,) new tokens per document
        document = torch.repeat_interleave(torch.arange(len(counts), device=k.device), counts)
        slot = torch.arange(len(document), device=k.device) - cu_seqlens[document] + self.lengths[document]
        self.k[layer, document, slot], self.v[layer, document, slot] = k, v

    def attend(self, layer, q, k, v, cu_seqlens, max_seqlen):
        """Store the new tokens' k, v, and attend.

        q (T, H, K) -> (T, H, K). Prompts come first, all at once into an empty cache; afterwards one new
        token for each document.
        """
        self.store(layer, k, v, cu_seqlens)
        if max_seqlen > 1 or not self.lengths.any():
            assert not self.lengths.any(), "prompts are read in one go, then one token at a time"
            return attention(q, k, v, cu_seqlens, max_seqlen)
        # one query a document, which sees its filled slots, its own included
        filled = torch.arange(self.slots, device=q.device) <= self.lengths[:, None]  # (N, S)
        repeats = q.shape[1] // k.shape[1]
        keys = self.k[layer].transpose(1, 2).repeat_interleave(repeats, dim=1)  # (N, H, S, K)
        values = self.v[layer].transpose(1, 2).repeat_interleave(repeats, dim=1)
        mask = filled[:, None, None]  # (N, 1, 1, S)
        mixed = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)  # (N, H, 1, K)
        return mixed[:, :, 0]


def next_logits(model, hidden):
    """(T, V) float32 from hidden states (T, D), of any family: capped where its config says so."""
    logits = (hidden @ model.lm_head.weight.T).float()
    return reference.soft_cap(logits, model.config.final_logit_softcapping)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos_id=None, temperature=0.0, seed=0, tap=None):
    """Continue several prompts side by side with a KV cache.

    prompts: list of non-empty token-id lists. temperature 0 is greedy, above 0 samples softmax(logits /
    temperature) with `seed`. `tap` as in Llama.forward. Returns one list of new ids per prompt, ended after
    eos_id (int or tuple) or at max_new_tokens.
    """
    # an empty one would answer from its neighbour's last state
    assert all(prompts), "every prompt has a token"
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    stops = set(eos_id) if isinstance(eos_id, (tuple, list)) else {eos_id}
    # new tokens of each document: its prompt, then one at a time
    counts = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (N,)
    cache = KVCache(model.config, len(prompts), int(counts.max()) + max_new_tokens, dtype, device)
    # on the model's device, because multinomial draws there: a GPU and a CPU sample other answers
    generator = torch.Generator(device).manual_seed(seed)
    input_ids = torch.tensor(list(itertools.chain(*prompts)), device=device)  # (T,)
    answers, done = [[] for _ in prompts], [False] * len(prompts)
    for _ in range(max_new_tokens):
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
        starts = zip(cache.lengths, counts, strict=True)
        positions = torch.cat([torch.arange(start, start + n, device=device) for start, n in starts])
        hidden = model(input_ids, positions, cu_seqlens, int(counts.max()), tap=tap, cache=cache)
        cache.lengths += counts
        last = hidden[cu_seqlens[1:].long() - 1]  # (N, D), of each document's last token
        logits = next_logits(model, last)  # (N, V)
        if temperature > 0:
            probabilities = (logits / temperature).softmax(-1)
            input_ids = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        else:
            input_ids = logits.argmax(-1)
        for n, token in enumerate(input_ids.tolist()):
            if not done[n]:
                answers[n].append(token)
                done[n] = token in stops
        if all(done):
            break
        # a finished document goes on, unread, so that the batch keeps its shape
        counts = torch.ones_like(counts)
    return answers
