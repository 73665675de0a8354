"""Gemma 2 from scratch, for inference: the published comparison's pair with soft caps and a window.

What differs from a Llama: a norm before and behind attention and MLP, whose weights are stored as w of 1 + w;
scores and logits squeezed into +-cap by tanh; a window in every second block; a GELU in the MLP; and an
embedding scaled by sqrt(D). Shapes: T tokens of a packed stream, N documents in it, U tokens that a document
has so far, D hidden size, H query heads, G key/value heads, K head size. Module names are Hugging Face's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from families.keys import config_file, read_keys
from kernels import reference
from model import LlamaConfig, RopeScaling, rope_from_hf, rope_tables
from plumbing.files import UserError

# what the code below takes for granted; a key that is absent has this value in transformers too
_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "use_bidirectional_attention": None,
    "quantization_config": None,
}
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
)  # fmt: skip
_LAYER_TYPES = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class GemmaConfig:
    """Shape of a Gemma 2. Field names, meanings and defaults are config.json's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float  # scores are divided by its root, not by sqrt(K)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 8192
    sliding_window: int = 4096
    layer_types: tuple[str, ...] | None = None  # None: a window in blocks 0, 2, 4, ...
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    model_type = "gemma2"

    @classmethod
    def from_hf(cls, directory):
        """Read config.json in `directory`.

        UserError, naming the keys, for anything this file cannot represent exactly.
        """
        values, problems, raw = read_keys(cls, directory, _FIXED, _REQUIRED)
        types = values.get("layer_types")
        if types and (len(types) != raw["num_hidden_layers"] or not set(types) <= set(_LAYER_TYPES)):
            expected = f"{' or '.join(_LAYER_TYPES)} for each of num_hidden_layers"
            problems.append(f"layer_types={types}: expected {expected}")
        if values.get("sliding_window", 4096) is None:
            problems.append("sliding_window=None: expected a number of tokens")
        if not problems:
            H, G, K = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
            if H % G or K % 2:
                found = f"num_attention_heads={H}, num_key_value_heads={G}, head_dim={K}"
                problems.append(f"{found}: expected a multiple of the key/value heads, and an even head size")
        source = config_file(directory)
        if problems:
            raise UserError(f"{source}: " + "; ".join(problems))
        theta, scaling = rope_from_hf(raw, source)
        return cls(**values | {"rope_theta": theta, "rope_scaling": scaling})

    weight_shapes = LlamaConfig.weight_shapes  # its names, and the fields are called alike

    def window(self, layer):
        """Keys that a query of block `layer` sees, itself included; None: all that are before it."""
        is_windowed = self.layer_types[layer] == "sliding_attention" if self.layer_types else layer % 2 == 0
        return self.sliding_window if is_windowed else None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))  # w of 1 + w
        self.eps = eps

    def forward(self, x):
        # 1 + w in float32: bf16 has no 1.001
        return reference.rms_norm(x, 1 + self.weight.float(), self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped heads, capped scores and, in some blocks, a window."""

    def __init__(self, config, layer):
        super().__init__()
        D, K, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim, self.layer, self.window = K, layer, config.window(layer)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=bias)

    def forward(self, x, cos, sin, cu_seqlens, cache):
        """x (T, D) -> (T, D)."""
        T = x.shape[0]
        q = reference.rotate(self.q_proj(x).view(T, -1, self.head_dim), cos, sin)  # (T, H, K)
        k = reference.rotate(self.k_proj(x).view(T, -1, self.head_dim), cos, sin)  # (T, G, K)
        v = self.v_proj(x).view(T, -1, self.head_dim)
        lengths = cu_seqlens.diff().tolist()
        if cache is None:
            keys, values = k.split(lengths), v.split(lengths)
        else:
            cache.store(self.layer, k, v, cu_seqlens)
            filled = (cache.lengths + cu_seqlens.diff()).tolist()
            keys = [row[:U] for row, U in zip(cache.k[self.layer], filled, strict=True)]
            values = [row[:U] for row, U in zip(cache.v[self.layer], filled, strict=True)]
        mixed = [self.attend(*document) for document in zip(q.split(lengths), keys, values, strict=True)]
        return self.o_proj(torch.cat(mixed).reshape(T, -1))

    def attend(self, q, k, v):
        """One document: q (T, H, K), the last T of its U tokens; k and v (U, G, K) -> (T, H, K).

        Plain, with (H, T, U) scores held: no flash kernel of torch's caps them.
        """
        repeats = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeats, dim=1)  # (U, H, K)
        v = v.repeat_interleave(repeats, dim=1)
        scores = reference.soft_cap(torch.einsum("thk,uhk->htu", q, k).float() * self.scale, self.cap)
        key = torch.arange(len(k), device=q.device)
        distance = key[-len(q) :, None] - key  # (T, U), from a query back to a key
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("htu,uhk->thk", weights.to(q.dtype), v)


class MLP(nn.Module):
    """GeGLU (Shazeer 2020) with the GELU's tanh approximation: down(gelu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, *stream):
        mixed = self.self_attn(self.input_layernorm(hidden), *stream)
        hidden = hidden + self.post_attention_layernorm(mixed)
        return hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma(nn.Module):
    """A Gemma 2 with model.Llama's forward, taps, KV cache and generate; no LoRA, no sharding, no export.

    Its logits are soft_cap(hidden @ lm_head.weight.T): whoever takes them reads final_logit_softcapping.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, tap=None, cache=None, resume=None):
        """Hidden states after the final norm, (T, D), of a packed stream.

        Arguments as of model.Llama.forward.
        """
        cos, sin = rope_tables(self.config, position_ids)
        if resume is not None:
            first, hidden = resume
        else:
            hidden = self.model.embed_tokens(input_ids)
            # sqrt(D) is rounded to the weights' dtype first, as in training: 55.5 for 3,072 in bf16
            first, hidden = 0, hidden * torch.tensor(self.config.hidden_size**0.5).to(hidden)
        for index, block in enumerate(self.model.layers[first:], first):
            hidden = block(hidden, cos, sin, cu_seqlens, cache)
            if tap is not None:
                hidden = tap(index, hidden)
        return self.model.norm(hidden)
