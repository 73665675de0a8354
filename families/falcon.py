"""Falcon-7B from scratch, for inference: the steering experiments' one published model that is no Llama.

Attention and MLP read the same LayerNorm side by side, all query heads share one key/value head, and the MLP
is a plain GELU. Falcon-40B and the ALiBi models are other architectures under the same name, and are refused.
Shapes: T tokens of a packed stream, N documents in it, D hidden size, H query heads, K head size. Module
names are Hugging Face's.
"""

import functools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from families.keys import config_file, read_keys
from kernels import attention, reference
from model import RopeScaling, rope_from_hf, rope_tables
from plumbing.files import UserError

# what the code below takes for granted; a key that is absent has this value in transformers too
_FIXED = {
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "multi_query": True,
    "activation": "gelu",
    "num_ln_in_parallel_attn": None,
    "apply_residual_connection_post_layernorm": False,
    "quantization_config": None,
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# spellings of 2023: transformers 5 ignores the first two and would build 32 layers of 71 heads in silence
_OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embed": "hidden_size"}


@dataclass(frozen=True)
class FalconConfig:
    """Shape of a Falcon-7B. Field names, meanings and defaults are config.json's."""

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 11
    eos_token_id: int | tuple[int, ...] | None = 11

    model_type = "falcon"
    final_logit_softcapping = None
    num_key_value_heads = 1  # config.json's num_kv_heads (71) counts only without multi_query

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, directory):
        """Read config.json in `directory`.

        UserError, naming the keys, for anything this file cannot represent exactly.
        """
        values, problems, raw = read_keys(cls, directory, _FIXED, _REQUIRED)
        for old, new in _OLD_NAMES.items():
            if old in raw and raw[old] != raw.get(new):
                problems.append(f"{old}={raw[old]!r}: expected it renamed to {new}, as in today's falcon-7b")
        if not problems and raw["hidden_size"] % (2 * raw["num_attention_heads"]):
            expected = "an even head size for each of num_attention_heads"
            problems.append(f"hidden_size={raw['hidden_size']}: expected {expected}")
        source = config_file(directory)
        if problems:
            raise UserError(f"{source}: " + "; ".join(problems))
        theta, scaling = rope_from_hf(raw, source)
        inner = raw.get("ffn_hidden_size") or 4 * raw["hidden_size"]
        shape = {"ffn_hidden_size": inner, "rope_theta": theta, "rope_scaling": scaling}
        return cls(**values | shape)

    def weight_shapes(self):
        """As LlamaConfig's."""
        V, D, block = self.vocab_size, self.hidden_size, "transformer.h.0"
        attention = {"hidden_size + 2 * (hidden_size / num_attention_heads)": D + 2 * self.head_dim}
        inner = {"ffn_hidden_size": self.ffn_hidden_size}
        return {
            "transformer.word_embeddings.weight": {"vocab_size": V, "hidden_size": D},
            "lm_head.weight": {"vocab_size": V, "hidden_size": D},
            f"{block}.self_attention.query_key_value.weight": attention | {"hidden_size": D},
            f"{block}.mlp.dense_h_to_4h.weight": inner | {"hidden_size": D},
        }


class Attention(nn.Module):
    """Causal self-attention whose query heads share one key and one value head (Shazeer 2019)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        heads = config.hidden_size + 2 * config.head_dim  # queries, one key, one value
        self.query_key_value = nn.Linear(config.hidden_size, heads, bias=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cu_seqlens, max_seqlen, attend):
        T = x.shape[0]
        heads = self.query_key_value(x).view(T, -1, self.head_dim)  # (T, H + 2, K)
        q, k, v = heads.split((self.num_heads, 1, 1), dim=1)
        q = reference.rotate(q, cos, sin)
        k = reference.rotate(k, cos, sin)
        return self.dense(attend(q, k, v, cu_seqlens, max_seqlen).reshape(T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))  # the exact GELU, with erf


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, hidden, *stream):
        x = self.input_layernorm(hidden)
        # in transformers' order: in bf16 it matters
        return hidden + (self.mlp(x) + self.self_attention(x, *stream))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)


class Falcon(nn.Module):
    """A Falcon-7B with model.Llama's forward, taps, KV cache and generate.

    No LoRA, no sharding, no export.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, tap=None, cache=None, resume=None):
        """Hidden states after the final norm, (T, D), of a packed stream.

        Arguments as of model.Llama.forward.
        """
        cos, sin = rope_tables(self.config, position_ids)
        if resume is not None:
            first, hidden = resume
        else:
            first, hidden = 0, self.transformer.word_embeddings(input_ids)
        for index, block in enumerate(self.transformer.h[first:], first):
            attend = attention if cache is None else functools.partial(cache.attend, index)
            hidden = block(hidden, cos, sin, cu_seqlens, max_seqlen, attend)
            if tap is not None:
                hidden = tap(index, hidden)
        return self.transformer.ln_f(hidden)
