"""Chat to ids and loss mask on one core: data.py beside transformers, the same template, tokenizer and rows.

    python bench/tokenise.py --tokenizer FOLDER --data FILE [FILE ...] [--record]

FILE: anything data.py reads as SFT rows; its words, in their order, fill one-turn chats with a long tail of
lengths (mean 600 words, as bench/world.py's). The peers: `apply_chat_template` with the assistant mask on a
list of chats and on one at a time (as a `map` calls it), and the way of open-instruct, whose template has no
mask: every turn's edges come from tokenising what is before them. CPU seconds of this process, the smallest
of interleaved repeats; all give the same ids and, but for the last, masks, or this stops.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}  # one core: before tokenizers is imported

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.record import append
from bench.world import tulu_like_lengths
from data import ids_and_mask
from data import render as render_chat
from formats import find_schema
from plumbing.sources import open_source
from plumbing.tokenizer import Tokenizer

# TEMPLATES["tulu"], with the marks from which transformers takes the mask
TULU = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% "
    "endgeneration %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def chats(files):
    """One-turn chats of real words, 30 % prompt and 70 % answer, as long as tulu_like_lengths says."""
    words = []
    for name in map(str, files):
        rows = open_source(name)
        schema = find_schema(name, rows, ("messages",))
        contents = []
        for messages, *_ in map(schema.read, rows):
            contents += [message["content"] for message in messages]
        words += " ".join(contents).split(" ")
    lengths = tulu_like_lengths(np.random.default_rng(0), len(words) // 300)
    ends = np.cumsum(lengths)
    out = []
    for end, n in zip(ends[ends <= len(words)], lengths):
        answer = int(0.7 * n)
        prompt, answer = words[end - n : end - answer], words[end - answer : end]
        out.append(
            [
                {"role": "user", "content": " ".join(prompt)},
                {"role": "assistant", "content": " ".join(answer)},
            ]
        )
    return out


def ours(rows, tokenizer):
    texts, spans = zip(*[render_chat(messages, "tulu", tokenizer) for messages in rows])
    out = []
    for encoding, answers in zip(tokenizer.encode_batch(list(texts)), spans):
        ids, mask, _ = ids_and_mask(encoding, answers, tokenizer, "tulu")
        out.append((ids, mask))
    return out


def generation_mask(rows, tokenizer):
    out = tokenizer.apply_chat_template(
        rows, chat_template=TULU, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(out["input_ids"], out["assistant_masks"]))


def generation_mask_by_row(rows, tokenizer):
    return [generation_mask([messages], tokenizer)[0] for messages in rows]


def prefixes(rows, tokenizer):
    def ids_of(messages, prompt=False):
        return tokenizer.apply_chat_template(
            messages, chat_template=TULU, return_dict=False, add_generation_prompt=prompt
        )

    out = []
    for messages in rows:
        ids = ids_of(messages)
        mask = [0] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = len(ids_of(messages[:i], prompt=True)), len(ids_of(messages[: i + 1]))
                mask[start:end] = [1] * (end - start)
        out.append((ids, mask))
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder that has one")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="files of SFT rows, for their words"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="of every side, of which the fastest counts (default: %(default)s)",
    )
    parser.add_argument("--record", action="store_true", help="append to bench/results.jsonl")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_dir(args.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    rows = chats(args.data)
    ways = {
        "ours": lambda: ours(rows, tokenizer),
        "tokenizer.json alone": lambda: tokenizer.encode_batch(
            [render_chat(messages, "tulu", tokenizer)[0] for messages in rows]
        ),
        "apply_chat_template, a list": lambda: generation_mask(rows, theirs),
        "apply_chat_template, by row": lambda: generation_mask_by_row(rows, theirs),
        "prefixes, by row": lambda: prefixes(rows, theirs),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(args.repeats):
        results = {}
        for name, work in ways.items():
            start = time.process_time()
            results[name] = work()
            seconds[name] = min(seconds[name], time.process_time() - start)
    mine = results.pop("ours")
    results.pop("tokenizer.json alone")
    for name, result in results.items():
        others = 0
        for (our_ids, our_mask), (their_ids, their_mask) in zip(mine, result, strict=True):
            assert list(our_ids) == list(their_ids), f"{name}: other ids"
            others += list(our_mask) != list(their_mask)
        if name.startswith("prefixes"):  # a token that straddles header and answer moves their edge
            print(f"{name}: another mask in {others} rows")
        else:
            assert not others, f"{name}: another mask in {others} rows"
    lengths = [len(ids) for ids, _ in mine]
    tokens = sum(lengths)
    print(f"{len(rows):,} rows, {tokens:,} tokens, longest {max(lengths):,}; one core")
    for name, value in seconds.items():
        print(
            f"{name:28} {len(rows) / value:8,.0f} rows/s {tokens / value:10,.0f} tokens/s   x "
            f"{value / seconds['ours']:.2f}"
        )
    if args.record:
        peer = min(list(results), key=seconds.get)
        beside = (
            f"transformers {transformers.__version__}, {peer}",
            tokens / seconds[peer],
            seconds[peer] / seconds["ours"],
        )
        append(
            "tokenise",
            tokens / seconds["ours"],
            "tokens/s per core",
            beside,
            "1 CPU core",
            0,
            torch.__version__,
            "bench/tokenise.py",
        )


if __name__ == "__main__":
    main()
