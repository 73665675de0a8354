"""Random weights of a real shape and rows of known length, for timing:

    python bench/world.py DIR [--tokenizer FOLDER] [--preset NAME] [--no-weights]

Writes DIR/base (a Hugging Face folder, bf16), DIR/{sft,dpo}_{fixed,mix}.jsonl and DIR/labelled.csv, the
prompts of a sweep. Speed and memory do not depend on what the weights are. Words are common English ones that
byte-level BPEs encode as one token each, so a row's length in tokens is its number of words. Without a
tokenizer one is trained on these words and the template's: speed does not depend on which it is either.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import Llama, LlamaConfig
from plumbing import parallel
from plumbing.files import write_json
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained

WORDS = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but "
    "what all were"
).split()
SFT_ROWS, DPO_ROWS = 512, 1024
AXIOMS, PROMPTS = 7, 100  # of each axiom and label


def words(rng, n):
    """n words: n tokens, give or take one at the edges."""
    return " ".join(rng.choice(WORDS, max(1, int(n))))


def tulu_like_lengths(rng, n, mean=600, sigma=1.1, longest=4096):
    """n document lengths with a long tail: lognormal with the given mean, cut at `longest`."""
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n), 32, longest).astype(int)


def write_tokenizer(folder):
    """A byte-level BPE in which each of WORDS, with a space before it or not, is one token."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = (
        sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        ["<|begin_of_text|>", "<|end_of_text|>"],
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    text = [
        "<|user|>",
        "<|assistant|>",
        *WORDS,
        *(f" {word}" for word in WORDS),
    ]  # a text's first word has no space before it
    core.train_from_iterator(["\n".join(text)] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    about = {"bos_token": special[0], "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", about)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(rng, prompt, answer):
    return {
        "messages": [
            {"role": "user", "content": words(rng, prompt)},
            {"role": "assistant", "content": words(rng, answer)},
        ]
    }


def pair(rng, prompt, chosen, rejected):
    return {"prompt": words(rng, prompt), "chosen": words(rng, chosen), "rejected": words(rng, rejected)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder that has one")
    parser.add_argument(
        "--preset", default="llama-3.1-8b", help="shape, of LlamaConfig.preset (default: %(default)s)"
    )
    parser.add_argument(
        "--no-weights", action="store_true", help="only the rest of base/: bench/session.py draws its own"
    )
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.folder / "base", ignore_errors=True)  # its hashes would be those of the one before
    # Truncated to max_seq_len = 4,096.
    write_rows(args.folder / "sft_fixed.jsonl", [chat(rng, 1000, 3200) for _ in range(SFT_ROWS)])
    write_rows(
        args.folder / "sft_mix.jsonl",
        [chat(rng, 0.3 * n, 0.7 * n) for n in tulu_like_lengths(rng, 4 * SFT_ROWS)],
    )
    # 2 x 500 tokens with the template.
    write_rows(args.folder / "dpo_fixed.jsonl", [pair(rng, 243, 249, 249) for _ in range(DPO_ROWS)])
    prompts = tulu_like_lengths(rng, DPO_ROWS, 200, longest=1000)
    chosen = tulu_like_lengths(rng, DPO_ROWS, 300, longest=1000)
    rejected = tulu_like_lengths(rng, DPO_ROWS, 300, longest=1000)
    write_rows(
        args.folder / "dpo_mix.jsonl",
        [pair(rng, *lengths) for lengths in zip(prompts, chosen, rejected, strict=True)],
    )

    labelled = ["id,input,axiom,safety_label"]
    for i, n in enumerate(tulu_like_lengths(rng, 2 * AXIOMS * PROMPTS, mean=60, sigma=0.6, longest=400)):
        labelled.append(f"{i},{words(rng, n)},axiom {i % AXIOMS},{'safe' if i // AXIOMS % 2 else 'unsafe'}")
    (args.folder / "labelled.csv").write_text("\n".join(labelled) + "\n")

    if args.tokenizer is None:
        args.tokenizer = args.folder / "tokenizer"
        write_tokenizer(args.tokenizer)
    tokenizer = Tokenizer.from_dir(args.tokenizer)
    config = LlamaConfig.preset(args.preset)
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if args.no_weights:
        (args.folder / "base").mkdir(exist_ok=True)
        write_json(args.folder / "base/config.json", config.to_hf())
        tokenizer.save(args.folder / "base", None)
        return
    parallel.init()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = Llama(config).to(torch.bfloat16)
    for param in model.parameters():
        if param.ndim == 2:
            torch.nn.init.normal_(param, std=0.02)
    save_pretrained(model, tokenizer, args.folder / "base", dtype=torch.bfloat16)
    parallel.shutdown()
    print(
        f"{args.folder}: {sum(p.numel() for p in model.parameters()):,} parameters in base/, rows in *.jsonl"
    )


if __name__ == "__main__":
    main()
