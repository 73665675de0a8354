"""From rows of chat to token ids: templates, ids and loss mask in one pass, mixtures, preference pairs, the tokenised cache.

Reading order is leaf to root: tokenizer, templates, encode, sources, mixtures, documents, tokenised cache. packing.py goes on from there.
Letters: T tokens of a conversation, n documents of a dataset, B of its ids.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import NoneType

import numpy as np
import tokenizers

from packing import PackedBatch, common_prefix, pack
from plumbing import token_cache
from plumbing.files import UserError, progress_bar
from plumbing.sources import open_source
from plumbing.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# ---------------------------------------------------------------------------------------------------------------- tokenizer


# ---------------------------------------------------------------------------------------------------------------- templates

# The Jinja that goes out with a checkpoint. Training never runs it: `render` below writes the same characters by hand, with the spans.
# tulu    Tulu 3. No BOS, also for Llama-3.1: open-instruct ran without --add_bos and tokenises the rendered template without specials.
# zephyr  as published with zephyr-7b: every turn ends in EOS and a newline; no BOS in the template.
# llama3  Llama 3 Instruct: BOS once, contents stripped. Llama 3.1's own template also puts dates into a system turn; this one does not.
# chatml  without a default system prompt (SmolLM2's and Qwen2's own templates add one when the conversation has none).
TEMPLATES = {
    "tulu": "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
HEADERS = {"tulu": "<|{}|>\n", "zephyr": "<|{}|>\n", "llama3": "<|start_header_id|>{}<|end_header_id|>\n\n", "chatml": "<|im_start|>{}\n"}
SPECIAL_TOKENS = {"llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>", "<|im_end|>")}


def resolve_template(template: str | None, tokenizer: Tokenizer) -> str:
    """The template's name; None means the tokenizer's own, which must be, to the letter, one of TEMPLATES."""
    if template is None:
        for name, jinja in TEMPLATES.items():
            if tokenizer.chat_template == jinja:
                return name
        raise UserError(f"template=None: the chat template of {tokenizer.origin} is none of ours; expected one of {list(TEMPLATES)}")
    if template not in TEMPLATES:
        raise UserError(f"template={template!r}: expected one of {list(TEMPLATES)}")
    return template


@lru_cache(maxsize=16)
def end_of_turn(template: str, tokenizer: Tokenizer) -> str:
    """The token that ends an assistant turn (the EOS to train and to stop on). ValueError when `tokenizer` lacks a token of `template`."""
    eos = SPECIAL_TOKENS[template][-1] if template in SPECIAL_TOKENS else tokenizer.eos_token
    needed = [*SPECIAL_TOKENS.get(template, ()), eos]
    if template == "llama3":
        needed.append(tokenizer.bos_token)
    for token in needed:
        if token is None or len(tokenizer.encode(token)) != 1:
            what = token or "the BOS or EOS that it needs"
            raise UserError(f"template={template!r}: {what} is no special token of tokenizer {tokenizer.origin}; expected one id")
    return eos


def render(messages: list[dict], template: str, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one string, and per assistant turn the character span of its content and end-of-turn token.

    ValueError for no messages, a role not in ROLES, a content that is not a string, an answer that already ends in the end-of-turn token.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"messages={messages!r}: expected a list of at least one message {{role, content}}")
    eos, header = end_of_turn(template, tokenizer), HEADERS[template]
    pieces, spans = [tokenizer.bos_token if template == "llama3" else ""], []
    at = len(pieces[0])
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"message {i}: role={role!r}, content={type(content).__name__}; expected a role of {ROLES} and a string")
        is_answer = role == "assistant"
        content = content.strip() if template == "llama3" else content
        if is_answer and content.endswith(eos):
            raise UserError(f"message {i}: the answer already ends in {eos}; expected text without it (the template adds it)")
        body = content + (eos if is_answer or template != "tulu" else "")
        is_bare = template == "llama3" or (template == "tulu" and is_answer and i == len(messages) - 1)
        head = header.format(role)
        pieces += [head, body, "" if is_bare else "\n"]
        if is_answer:
            spans.append((at + len(head), at + len(head) + len(body)))
        at += len(head) + len(body) + (not is_bare)
    return "".join(pieces), spans


# ---------------------------------------------------------------------------------------------------------------- encode


def encode_chat(messages, tokenizer: Tokenizer, template: str, max_seq_len: int, supervise: str = "all") -> tuple[list[int], list[bool]]:
    """Ids of a conversation and whether each is trained on: assistant content + end-of-turn token, of all turns or of the "last" one.

    Cut at `max_seq_len` ids, from the right, as in Tulu 3. ValueError as in `render`.
    """
    text, spans = render(messages, template, tokenizer)
    (encoding,) = tokenizer.encode_batch([text])
    ids, mask, _ = ids_and_mask(encoding, spans, tokenizer, supervise)
    return ids[:max_seq_len].tolist(), mask[:max_seq_len].tolist()


def ids_and_mask(encoding, spans: list[tuple[int, int]], tokenizer: Tokenizer, supervise: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(T,) int32 ids; (T,) bool, True where a token overlaps a span; how many of those began before their span.

    The whole string was tokenised at once, so a token can straddle header and answer (BPEs merge newlines): it is supervised, and counted.
    """
    if supervise not in ("all", "last"):
        raise UserError(f"supervise={supervise!r}: expected 'all' or 'last'")
    ids = np.array(encoding.ids, dtype=np.int32)
    assert tokenizer.bos_id is None or ids[:2].tolist() != [tokenizer.bos_id] * 2, "double BOS"
    mask, straddling = np.zeros(len(ids), dtype=bool), 0
    for start, end in spans if supervise == "all" else spans[-1:]:
        # A character may be several tokens (the bytes of an emoji), of which this gives the first, or none (dropped by a normaliser).
        first = next(token for token in map(encoding.char_to_token, range(start, end)) if token is not None)
        last = encoding.char_to_token(end - 1)  # of the end-of-turn token, which is one token
        mask[first : last + 1] = True
        straddling += encoding.token_to_chars(first)[0] < start
    return ids, mask, straddling


# ---------------------------------------------------------------------------------------------------------------- sources


def _transcript(text: str) -> list[dict]:
    """Messages of an hh-rlhf transcript: "\\n\\nHuman: ..\\n\\nAssistant: ..", contents stripped."""
    head, *turns = re.split(r"\n\n(Human|Assistant):", text or "")
    if head.strip() or not turns:
        raise UserError(
            f"transcript begins {text[:40] if text else text!r}; expected '\\n\\nHuman:' (answers alone need a column prompt beside them)"
        )
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[who], "content": content.strip()} for who, content in zip(turns[::2], turns[1::2])]


def _exchanges(prompt: str, answers: list[str] | None) -> list[list[dict]]:
    if len(answers or ()) != 2:
        raise UserError(f"{len(answers or ())} answers; expected two")
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for answer in answers]


def _dialogues(row: dict) -> list[list[dict]]:
    for side in ("chosen", "rejected"):
        is_user = [isinstance(message, dict) and message.get("role") == "user" for message in row[side] or ()]
        if row.get("prompt") and is_user and not any(is_user):
            raise UserError(f"{side} has no user message; expected chosen and rejected to repeat the prompt")
    return [row["chosen"], row["rejected"]]


def _pku(row: dict) -> list[list[dict]] | str:
    is_safe = [row["is_response_0_safe"], row["is_response_1_safe"]]
    if set(is_safe) != {True, False}:  # one that has no label is neither
        return "for not exactly one safe response"
    first, second = row["response_0"], row["response_1"]
    return _exchanges(row["prompt"], [first, second] if is_safe[0] else [second, first])


# What it is; its columns and their types in the first row; row -> [messages], or [chosen, rejected], or the reason to drop it.
# The first that fits is used; for SFT, preference rows give their chosen side.
SCHEMAS = (
    ("messages", {"messages": list}, lambda row: [row["messages"]]),
    # Not with a list as prompt: then nothing says whether chosen repeats it.
    ("chosen, rejected: message lists", {"chosen": list, "rejected": list, "prompt": (str, NoneType)}, _dialogues),
    ("prompt, chosen, rejected: strings", {"prompt": str, "chosen": str, "rejected": str},
     lambda row: _exchanges(row["prompt"], [row["chosen"], row["rejected"]])),
    ("chosen, rejected: hh-rlhf transcripts", {"chosen": str, "rejected": str},
     lambda row: [_transcript(row["chosen"]), _transcript(row["rejected"])]),
    ("prompt, response_0, response_1, is_response_0_safe, is_response_1_safe: PKU-SafeRLHF, rows where exactly one is safe",
     {"prompt": str, "response_0": str, "response_1": str, "is_response_0_safe": bool, "is_response_1_safe": bool}, _pku),
    # Which of the two is safer is inferred from their contents; no column says so.
    ("prompt, response: PKU-SafeRLHF pairs, the safer first", {"prompt": str, "response": list},
     lambda row: _exchanges(row["prompt"], row["response"])),
)  # fmt: skip


def find_schema(name: str, rows, sides: tuple[str, ...]):
    """(columns, row -> conversations) of the first of SCHEMAS that fits the columns. ValueError listing both when none does."""
    if len(rows) == 0:
        raise UserError(f"data {name!r}: no rows")
    first, known = rows[0], SCHEMAS if len(sides) == 1 else SCHEMAS[1:]  # messages alone are no pair
    for _, columns, convert in known:
        if all(isinstance(first.get(column), kind) for column, kind in columns.items()):
            return [column for column in columns if column in first], convert
    found = ", ".join(f"{column} ({type(value).__name__})" for column, value in first.items())
    raise UserError(f"data {name!r}: columns {found}; expected one of: {'; '.join(what for what, _, _ in known)}")


# ---------------------------------------------------------------------------------------------------------------- mixtures


def mixture_rows(n: int, amount: float | int) -> np.ndarray:
    """Row numbers that open-instruct picks of n rows: a float is a fraction, an int a count; beyond n whole repeats, then a random rest.

    The rest is `RandomState(42).choice` in that order, whatever the run's seed; exactly n rows (1.0) stay in file order.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
        raise UserError(f"data amount {amount!r}: expected a float fraction or an int count above 0")
    repeats, rest = divmod(int(amount * n) if isinstance(amount, float) else amount, n)
    return np.concatenate([np.arange(n)] * repeats + [np.random.RandomState(42).choice(n, rest, replace=False)]).astype(np.int64)


def is_held_out(messages: list[dict], fraction: float) -> bool:
    """Whether the first user message hashes into `fraction`: rows and dialogues that open alike fall on one side, in every dataset."""
    prompt = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) < fraction * 2**64


# ---------------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents:
    """n tokenised conversations end to end, as numpy columns that may be memory-mapped files."""

    input_ids: np.ndarray  # (total,) int32
    loss_mask: np.ndarray  # (total,) bool, True where the token is trained on
    offsets: np.ndarray  # (n + 1,) int64, document i is [offsets[i], offsets[i + 1])
    row_ids: np.ndarray  # (n,) str, "source#row"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[span], self.loss_mask[span]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(n,) int64 positions that predict a supervised token; a document's first token is predicted by nothing."""
        first = self.offsets[:-1]
        return np.add.reduceat(self.loss_mask, first, dtype=np.int64) - self.loss_mask[first]  # no document is empty

    def flops(self, config, ids) -> np.ndarray:
        """(B,) forward FLOPs of documents `ids`; the vocabulary matmul runs on supervised positions only."""
        return config.flops(self.lengths[ids], self.num_targets[ids])

    def pack(self, ids) -> PackedBatch:
        return pack([self[i] for i in ids])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of ids, mask and offsets: equal means the same tokens in the same order."""
        digest = hashlib.sha256()
        for column in (self.input_ids, self.loss_mask, self.offsets):
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()


@dataclass(frozen=True)
class Pairs:
    """n preference pairs; chosen[i] and rejected[i] come from one row."""

    chosen: Documents
    rejected: Documents
    share_prefix: bool = True  # the tokens that both sides begin with are in a stream once

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def prefixes(self) -> np.ndarray:
        """(n,) int64 tokens that both sides begin with, whatever their masks, and that leave rejected at least one; 0 if not shared."""
        if not self.share_prefix:
            return np.zeros(len(self), dtype=np.int64)
        # np.asarray: slices of a memory map take three times as long; 300k pairs in 2 s
        sides = [np.split(np.asarray(side.input_ids), side.offsets[1:-1]) for side in (self.chosen, self.rejected)]
        return np.array([common_prefix(chosen, rejected[:-1]) for chosen, rejected in zip(*sides)], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of a stream that a pair takes."""
        return self.chosen.lengths + self.rejected.lengths - self.prefixes

    def flops(self, config, ids) -> np.ndarray:
        """(B,) forward FLOPs of pairs `ids`, a shared prefix counted once."""
        return self.chosen.flops(config, ids) + self.rejected.flops(config, ids) - config.flops(self.prefixes[ids], logits=0)

    def pack(self, ids) -> PackedBatch:
        """One stream: the chosen answers of `ids` in order, then the rejected ones, from the end of their shared prefixes on."""
        documents = [side[i] for side in (self.chosen, self.rejected) for i in ids]
        return pack(documents, self.prefixes[ids] if self.share_prefix else ())

    @property
    def row_ids(self) -> np.ndarray:
        return self.chosen.row_ids

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256((self.chosen.fingerprint + self.rejected.fingerprint).encode()).hexdigest()


def load_sft(config, tokenizer: Tokenizer, log=print) -> tuple[Documents, Documents | None]:
    """Training and held-out documents of config.data; keys read: data, data_eval, template, max_seq_len, supervise, cache_dir.

    data: {"hub/name" or "path", optionally with "[split]": float fraction or int count}. data_eval: None, the same, or the fraction of
    prompts (see is_held_out) that `data` goes without. Preference rows give their chosen side. Tokenised once and kept under cache_dir:
    one process per machine calls this first, then the others, which find the files. What was kept and dropped goes to `log`.
    ValueError for what a source or a key has wrong, naming source and row.
    """
    train, held_out = _load(config, ("messages",), tokenizer, log)
    return train[0], held_out and held_out[0]


def load_preferences(config, tokenizer: Tokenizer, log=print) -> tuple[Pairs, Pairs | None]:
    """As load_sft, for preference pairs; reads share_prefix too.

    Each side is cut at max_seq_len by itself; a pair goes when either side is left without answer.
    """
    train, held_out = _load(config, ("chosen", "rejected"), tokenizer, log)
    return Pairs(*train, config.share_prefix), held_out and Pairs(*held_out, config.share_prefix)


def _load(config, sides: tuple[str, ...], tokenizer: Tokenizer, log) -> tuple[list[Documents], list[Documents] | None]:
    template = resolve_template(config.template, tokenizer)
    end_of_turn(template, tokenizer)  # a template that this tokenizer cannot write is refused before anything is read
    settings = {"template": template, "max_seq_len": config.max_seq_len, "supervise": config.supervise}
    settings["held_out"] = config.data_eval if isinstance(config.data_eval, float) else 0.0
    mixtures = {"data": config.data} | ({"data_eval": config.data_eval} if isinstance(config.data_eval, dict) else {})
    opened = {key: _open_mixture(key, mixture, sides, log) for key, mixture in mixtures.items()}  # both, before either is tokenised
    loaded = {key: _load_mixture(key, opened[key], sides, tokenizer, settings, Path(config.cache_dir), log) for key in opened}
    held_out = loaded["data_eval"]["train"] if "data_eval" in loaded else loaded["data"].get("eval")
    return loaded["data"]["train"], held_out


# ---------------------------------------------------------------------------------------------------------------- tokenised cache

CHUNK = 1024  # rows read and tokenised at a time: enough work for every thread, little memory


def _open_mixture(key: str, data: dict, sides, log) -> list[tuple]:
    """[(name, rows, picked row numbers, row -> conversations)] of the sources of a config key."""
    sources = []
    for name, amount in data.items():
        rows = open_source(name)
        columns, convert = find_schema(name, rows, sides)
        numbers = mixture_rows(len(rows), amount)
        if len(numbers) == 0:
            raise UserError(f"{key} {name!r}: {amount} of {len(rows):,} rows is less than one; expected a larger fraction, or a count")
        if len(numbers) != len(rows):
            log(f"{key}: {name}: {len(numbers):,} picked of {len(rows):,} rows ({amount})")
        sources.append((name, rows.select_columns(columns), numbers, convert))
    return sources


def _load_mixture(key: str, sources, sides, tokenizer: Tokenizer, settings: dict, cache_dir: Path, log) -> dict[str, list[Documents]]:
    """{"train" and, if rows are held out, "eval": [Documents per side]}, memory-mapped from cache_dir; tokenised into it when not there."""
    folder = cache_dir / _cache_key(sources, sides, tokenizer, settings)[:32]
    if not token_cache.is_intact(folder, log):
        columns, stats = _tokenise(sources, sides, tokenizer, settings)
        data = {name: len(numbers) for name, _, numbers, _ in sources}
        token_cache.write(folder, columns, {"data": data, "settings": settings, "stats": stats})
    stats = json.loads((folder / "meta.json").read_text())["stats"]
    log(describe(stats, key))

    def documents(split, side):
        files = [folder / f"{split}.{side}.{field.name}.npy" for field in dataclasses.fields(Documents)]
        return Documents(*[np.load(file, mmap_mode="r", allow_pickle=False) for file in files])

    return {split: [documents(split, side) for side in sides] for split in stats["kept"]}


def _chunks(rows, numbers: np.ndarray):
    """(row numbers, those rows in the format of `rows`), CHUNK at a time."""
    for first in range(0, len(numbers), CHUNK):
        picked = numbers[first : first + CHUNK]
        yield picked, rows[picked]


def _cache_key(sources, sides, tokenizer: Tokenizer, settings: dict) -> str:
    """sha256 of all that the columns depend on: the picked rows' names and content, the tokenizer, the settings, and the code that makes tokens."""
    parts = [sides, settings, tokenizer.fingerprint, tokenizer.bos_token, tokenizer.eos_token, tokenizers.__version__]
    digest = hashlib.sha256(json.dumps(parts).encode() + TOKEN_CODE)
    for name, rows, numbers, _ in sources:
        digest.update(json.dumps([name, len(numbers)]).encode() + numbers.tobytes())
        chunks = _chunks(rows.with_format("arrow"), numbers)
        for _, table in progress_bar(chunks, desc="hashing rows", total=math.ceil(len(numbers) / CHUNK), delay=5):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
    return digest.hexdigest()


def _tokenise(sources, sides, tokenizer: Tokenizer, settings: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Columns {"train.chosen.input_ids": array, ..} of the rows that are kept, and the counts."""
    splits = ["train", "eval"] if settings["held_out"] else ["train"]
    documents = {(split, side): [] for split in splits for side in sides}  # (ids, mask) each
    row_ids, dropped = {split: [] for split in splits}, Counter()
    counts = Counter(tokens=0, supervised=0, straddling=0, truncated=0, equal=0)
    total = sum(len(numbers) for _, _, numbers, _ in sources)
    with progress_bar(total=total, desc="tokenising", unit=" rows") as progress:
        for name, rows, picked, convert in sources:
            for numbers, columns in _chunks(rows.with_format(None), picked):  # decoded, where a column is stored as JSON
                chats = [dict(zip(columns, row)) for row in zip(*columns.values())]
                conversations = _render_rows(name, numbers, chats, convert, sides, tokenizer, settings["template"])
                for number, row in zip(numbers, _encode_rows(conversations, tokenizer, settings, counts)):
                    if isinstance(row, str):
                        dropped[row] += 1
                        continue
                    split, encoded = row
                    row_ids[split].append(f"{name}#{number}")
                    for side, document in zip(sides, encoded):
                        documents[split, side].append(document)
                progress.update(len(numbers))
    stats = {"rows": total, "kept": {split: len(row_ids[split]) for split in splits}, "dropped": dropped, **counts}
    if 0 in stats["kept"].values() or counts["supervised"] in (0, counts["tokens"]):
        raise UserError(f"{describe(stats)}; expected rows on every side, and some but not all of their tokens supervised")
    if counts["equal"] == sum(stats["kept"].values()):
        raise UserError(f"{describe(stats)}; expected pairs of different answers (cut at max_seq_len={settings['max_seq_len']})")
    columns = {}
    for (split, side), pieces in documents.items():
        columns[f"{split}.{side}.input_ids"] = np.concatenate([ids for ids, _ in pieces])
        columns[f"{split}.{side}.loss_mask"] = np.concatenate([mask for _, mask in pieces])
        columns[f"{split}.{side}.offsets"] = np.cumsum([0] + [len(ids) for ids, _ in pieces], dtype=np.int64)
        columns[f"{split}.{side}.row_ids"] = np.array(row_ids[split])
    return columns, stats


def _render_rows(name: str, numbers, rows: list[dict], convert, sides, tokenizer: Tokenizer, template: str) -> list:
    """Per row: [(messages, text, spans) per side], or the reason why it is dropped. ValueError names source and row."""
    rendered = []
    for number, row in zip(numbers, rows):
        try:
            conversations = convert(row)
            if not isinstance(conversations, str):
                conversations = [(messages, *render(messages, template, tokenizer)) for messages in conversations[: len(sides)]]
        except ValueError as error:
            raise UserError(f"data {name!r}, row {number}: {error}") from error
        rendered.append(conversations)
    return rendered


def _encode_rows(rendered: list, tokenizer: Tokenizer, settings: dict, counts: Counter):
    """Per row of `rendered`: ("train" or "eval", [(ids, mask) per side]), or the reason why it is dropped. Adds to `counts`."""
    texts = [text for row in rendered if not isinstance(row, str) for _, text, _ in row]
    encodings = iter(tokenizer.encode_batch(texts))
    limit = settings["max_seq_len"]
    for row in rendered:
        if isinstance(row, str):
            yield row
            continue
        whole = [ids_and_mask(next(encodings), spans, tokenizer, settings["supervise"]) for _, _, spans in row]
        cut = [(ids[:limit], mask[:limit]) for ids, mask, _ in whole]
        if not all(spans for _, _, spans in row):
            yield "without an assistant turn"
        elif not all(mask.any() for _, mask in cut):
            yield f"without an answer in the first {limit} tokens"
        else:
            counts["equal"] += len(cut) == 2 and np.array_equal(cut[0][0], cut[1][0])
            for (ids, mask), (all_ids, _, straddling) in zip(cut, whole):
                counts.update(tokens=len(ids), supervised=int(mask.sum()), straddling=straddling, truncated=len(all_ids) > limit)
            yield "eval" if is_held_out(row[0][0], settings["held_out"]) else "train", cut


def describe(stats: dict, key: str = "data") -> str:
    """The line that says what became of the rows of a config key's mixture."""
    kept = " + ".join(f"{count:,} {split if key == 'data' else 'held out'}" for split, count in stats["kept"].items())
    equal = f"; {stats['equal']:,} pairs with two equal answers (they teach nothing)" if stats["equal"] else ""
    straddling = f"; {stats['straddling']:,} tokens straddle header and answer (supervised)" if stats["straddling"] else ""
    dropped = "".join(f", {count:,} dropped {reason}" for reason, count in stats["dropped"].items())
    return (
        f"{key}: {stats['rows']:,} rows: {kept}{dropped or ', 0 dropped'}; {stats['tokens']:,} tokens, {stats['supervised']:,} supervised; "
        f"{stats['truncated']:,} conversations truncated{straddling}{equal}"
    )


# The code that decides ids and masks, without its comments: another version of it makes another cache.
_DECIDES_TOKENS = (render, end_of_turn, ids_and_mask, mixture_rows, is_held_out, find_schema, _transcript, _exchanges, _dialogues, _pku,
                   _render_rows, _encode_rows, _tokenise)  # fmt: skip
TOKEN_CODE = json.dumps([ast.dump(ast.parse(inspect.getsource(function))) for function in _DECIDES_TOKENS]).encode()
