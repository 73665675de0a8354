"""From conversations to token ids.

Templates, ids and loss mask in one pass, mixtures, documents, the tokenised cache. Reading order is leaf to
root. formats/__init__.py comes before this file (rows to conversations), packing.py after it. Letters: T
tokens of a conversation, n documents of a dataset, B of its ids.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

import formats
from formats import ANOTHER_PROMPT, answer_one_prompt, find_schema, in_one_line
from packing import PackedBatch, common_prefix, pack
from plumbing import sources, token_cache
from plumbing.files import UserError, progress_bar
from plumbing.sources import find_source
from plumbing.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

# ---------------------------------------------------------------- templates

# The Jinja that goes out with a checkpoint. Training never runs it: `render` writes the same characters, and
# knows where each answer is. tests/test_data.py compares both.
# tulu    Tulu 3. No BOS, also for Llama 3.1: open-instruct ran without --add_bos.
# zephyr  as published with zephyr-7b: every turn ends in EOS and a newline; no BOS.
# llama3  Llama 3 Instruct: BOS once, contents stripped. Llama 3.1's own adds dates to a system turn.
# chatml  without a default system prompt (SmolLM2's and Qwen2's own add one to a conversation that has none).
# gemma   Gemma 2's own, letter for letter: no system turn, and turns that alternate.
# tulu_bos: tulu behind a BOS, as OLMo 2 was trained (open-instruct's --add_bos).
_TULU = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "tulu": _TULU,
    "tulu_bos": "{{ bos_token }}" + _TULU,
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
        "{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
    ),
}
# What they write before a content: `render` has to know where the content begins.
HEADERS = {
    "tulu": "<|{}|>\n",
    "tulu_bos": "<|{}|>\n",
    "zephyr": "<|{}|>\n",
    "llama3": "<|start_header_id|>{}<|end_header_id|>\n\n",
    "chatml": "<|im_start|>{}\n",
    "gemma": "<start_of_turn>{}\n",
}
# What differs between them beside the header.
BEGINS_WITH_BOS = ("tulu_bos", "llama3", "gemma")
STRIPS_CONTENTS = ("llama3", "gemma")
ENDS_ONLY_ANSWERS = ("tulu", "tulu_bos")  # the user's and the system's turns end in a newline alone
# The last of a template's own tokens ends a turn. The other templates end it with the tokenizer's EOS.
SPECIAL_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
# sha256 of other spellings that render every conversation to the same characters, with newlines as such:
# tests/test_data.py has the texts, and lets Jinja render them. Here it need not run.
SAME_TEXT = {
    "ac7498a36a719da630e99d48e6ebc4409de85a77556c2b6159eeb735bcbd11df": "tulu",  # open-instruct
    "0cb09b6231ee57a6b277a7bf821a0d64e7cf03649de51cf829ac9a4bb4f727ad": "zephyr",  # open-instruct
    "66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362": "zephyr",  # zephyr-7b-beta
    "153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3": "chatml",  # OpenHermes-2.5, TRL
}


def resolve_template(template: str | None, tokenizer: Tokenizer) -> str:
    """The template's name. None means the tokenizer's own: one of TEMPLATES, or a spelling in SAME_TEXT."""
    if template is None:
        # Jinja files spell a newline in a string as \n or as itself: one spelling, or the tables double.
        text = (tokenizer.chat_template or "").replace("\\n", "\n")
        for name, jinja in TEMPLATES.items():
            if text == jinja.replace("\\n", "\n"):
                return name
        spelling = hashlib.sha256(text.encode()).hexdigest()
        if spelling in SAME_TEXT:
            return SAME_TEXT[spelling]
        found = f"the chat template of {tokenizer.origin} is none of ours"
        raise UserError(f"template=None: {found}; expected one of {list(TEMPLATES)}")
    if template not in TEMPLATES:
        raise UserError(f"template={template!r}: expected one of {list(TEMPLATES)}")
    return template


@lru_cache(maxsize=16)
def end_of_turn(template: str, tokenizer: Tokenizer) -> str:
    """The token that ends an assistant turn: the EOS to train and to stop on.

    UserError when `tokenizer` lacks a token.
    """
    # A base Llama 3 names <|end_of_text|> as EOS, and its chats end in <|eot_id|>: the template decides.
    eos = SPECIAL_TOKENS[template][-1] if template in SPECIAL_TOKENS else tokenizer.eos_token
    # One id each, or the template's text would be spelled out in pieces that the model never saw as marks.
    needed = [*SPECIAL_TOKENS.get(template, ()), eos]
    if template in BEGINS_WITH_BOS:
        needed.append(tokenizer.bos_token)
    for token in needed:
        if token is None or len(tokenizer.encode(token)) != 1:
            what = token or "the BOS or EOS that it needs"
            problem = f"{what} is no special token of tokenizer {tokenizer.origin}"
            raise UserError(f"template={template!r}: {problem}; expected one id")
    return eos


@lru_cache(maxsize=16)
def _end_id(template: str, tokenizer: Tokenizer) -> int:
    return tokenizer.single_id(end_of_turn(template, tokenizer))


def render(messages: list[dict], template: str, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as one string, and per answer the character span of its content and end-of-turn token.

    UserError for no messages, a role not in ROLES, a content that is not a string, an answer that already
    ends in the end-of-turn token.
    """
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not messages:
        found = f"messages={str(messages)[:60]}"
        raise UserError(f"{found}: expected a list of at least one message {{role, content}}")
    eos = end_of_turn(template, tokenizer)
    # BOS is text here, and the tokenizer adds none: no path can add it twice.
    text = tokenizer.bos_token if template in BEGINS_WITH_BOS else ""
    spans = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            found = f"role={role!r}, content={type(content).__name__}"
            raise UserError(f"message {i}: {found}; expected a role of {ROLES} and a string")
        if template in STRIPS_CONTENTS:
            content = content.strip()
        is_answer = role == "assistant"
        if template == "gemma":
            if role == "system" or is_answer != (i % 2 == 1):
                expected = "user, assistant, user, ...: Gemma's template has no other conversations"
                raise UserError(f"message {i}: role={role!r}; expected {expected}")
            role = "model" if is_answer else "user"
        if is_answer and content.endswith(eos):
            needs = "expected text without it (the template adds it)"
            raise UserError(f"message {i}: the answer already ends in {eos}; {needs}")
        text += HEADERS[template].format(role)
        start = len(text)
        text += content
        if is_answer or template not in ENDS_ONLY_ANSWERS:
            text += eos
        if is_answer:
            spans.append((start, len(text)))
        # no newline after llama3's turns, nor after an answer that ends a tulu conversation
        is_last_answer = is_answer and i == len(messages) - 1
        if template != "llama3" and not (template in ENDS_ONLY_ANSWERS and is_last_answer):
            text += "\n"
    return text, spans


# ---------------------------------------------------------------- ids and mask

# Two turns, so that an end of turn in the middle and one at the end are both tried.
PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}] * 2


def encode_chat(
    messages, tokenizer: Tokenizer, template: str, max_seq_len: int, supervise: str = "all"
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and whether each is trained on: answers and their end-of-turn tokens.

    supervise: "all" answers or the "last" one. A turn with train=False is context. Cut at `max_seq_len` ids,
    from the right, as in Tulu 3. UserError as in `render`.
    """
    # One call on the whole text, as open-instruct and TRL do: turns encoded one by one and joined give other
    # ids wherever a BPE merges across the seam.
    text, spans = render(messages, template, tokenizer)
    (encoding,) = tokenizer.encode_batch([text])
    ids, mask, _ = ids_and_mask(encoding, trained_spans(messages, spans, supervise), tokenizer, template)
    return ids[:max_seq_len].tolist(), mask[:max_seq_len].tolist()


def trained_spans(messages: list[dict], spans: list[tuple], supervise: str) -> list[tuple]:
    """The spans of the answers that are trained on: "all" or the "last", none that says train=False."""
    if supervise not in ("all", "last"):
        raise UserError(f"supervise={supervise!r}: expected 'all' or 'last'")
    # `render` gives one span an answer, in order, so the two lists are cut alike.
    answers = [message for message in messages if message["role"] == "assistant"]
    if supervise == "last":
        answers, spans = answers[-1:], spans[-1:]
    return [span for message, span in zip(answers, spans) if message.get("train", True)]


def ids_and_mask(encoding, spans, tokenizer: Tokenizer, template: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(T,) int32 ids; (T,) bool, True where a token overlaps a span; how many tokens begin before their span.

    The whole string was tokenised at once, so a token can straddle header and answer (BPEs merge newlines):
    it is supervised, and counted. UserError when an answer does not end in the id of the end-of-turn token: a
    tokenizer may split it inside text, and the model would never learn to stop.
    """
    ids = np.array(encoding.ids, dtype=np.int32)
    assert tokenizer.bos_id is None or ids[:2].tolist() != [tokenizer.bos_id] * 2, "double BOS"
    mask, straddling = np.zeros(len(ids), dtype=bool), 0
    end_id = _end_id(template, tokenizer)
    for start, end in spans:
        # Offsets are characters of the text, also where a normaliser changed its length.
        # A character may be several tokens (the bytes of an emoji), of which char_to_token gives the first,
        # or none (dropped by a normaliser).
        tokens = map(encoding.char_to_token, range(start, end))
        first = next(token for token in tokens if token is not None)
        last = encoding.char_to_token(end - 1)
        if last is None or ids[last] != end_id:
            found = f"tokenizer {tokenizer.origin} splits {end_of_turn(template, tokenizer)} inside text"
            raise UserError(f"template={template!r}: {found}; expected every answer to end in id {end_id}")
        mask[first : last + 1] = True
        straddling += encoding.token_to_chars(first)[0] < start
    return ids, mask, straddling


# ---------------------------------------------------------------- mixtures

# open-instruct's rules of picking rows, by what they do. Since 2025-07-21 (de8a14f3f): choice. From
# 2025-01-28 (45fd51f99): first. Before: shuffle, by the data library's Dataset.shuffle(seed=42). At 10 % two
# of them share 10 % of the rows.
ROW_RULES = ("choice", "first", "shuffle")


def mixture_rows(n: int, amount: float | int, rule: str = "choice") -> np.ndarray:
    """Row numbers that open-instruct picks of n rows: a float is a fraction, an int a count.

    choice: beyond n whole repeats, then a random rest by `RandomState(42).choice` in that order, whatever the
    run's seed; exactly n rows (1.0) stay in file order. first: the first ones. shuffle: the first ones of a
    permutation.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount > 0:
        raise UserError(f"data amount {amount!r}: expected a float fraction or an int count above 0")
    if rule not in ROW_RULES:
        raise UserError(f"rows={rule!r}: expected one of {list(ROW_RULES)}")
    # int() rounds down, as open-instruct does: 0.1 of 939,343 rows are 93,934.
    wanted = int(amount * n) if isinstance(amount, float) else amount
    if rule == "choice":
        # RandomState: numpy keeps its streams frozen across versions
        repeats, rest = divmod(wanted, n)
        picked = [np.arange(n)] * repeats + [np.random.RandomState(42).choice(n, rest, replace=False)]
        return np.concatenate(picked).astype(np.int64)
    if wanted > n:
        needs = "expected at most all of them (repeats need rows='choice')"
        raise UserError(f"rows={rule!r}: {amount} of {n:,} rows; {needs}")
    order = np.arange(n) if rule == "first" else np.random.default_rng(42).permutation(n)
    return order[:wanted].astype(np.int64)


def is_held_out(messages: list[dict], fraction: float) -> bool:
    """Whether the first user message hashes into `fraction`: dialogues that open alike fall on one side."""
    # By content and not by row number: a prompt that occurs twice must not be trained on and held out.
    return opening_hash(messages) < fraction * 2**64


def opening_hash(messages: list[dict]) -> int:
    """The first 64 bits of the opening prompt's sha256."""
    return int.from_bytes(hashlib.sha256(opening_prompt(messages).encode()).digest()[:8])


def opening_prompt(messages: list[dict]) -> str:
    """The first user message, or the first of any role, without outer blanks."""
    # Templates of STRIPS_CONTENTS render a prompt with and without a trailing blank to the same ids.
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return (asked[0] if asked else messages[0]["content"]).strip()


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents:
    """n tokenised conversations end to end, as numpy columns that may be memory-mapped files."""

    input_ids: np.ndarray  # (total,) int32
    loss_mask: np.ndarray  # (total,) bool, True where the token is trained on
    offsets: np.ndarray  # (n + 1,) int64, document i is [offsets[i], offsets[i + 1])
    row_ids: np.ndarray  # (n,) str, "source#row"
    openings: np.ndarray | None = None  # (n,) uint64, opening_hash of each; None of documents made by hand

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
        """(n,) int64 positions that predict a supervised token. A document's first token is no target."""
        # A position predicts the next token: n tokens have n - 1 targets, the mask without its first entry.
        first = self.offsets[:-1]
        supervised = np.add.reduceat(self.loss_mask, first, dtype=np.int64)  # no document is empty
        return supervised - self.loss_mask[first]

    def flops(self, config, ids) -> np.ndarray:
        """(B,) forward FLOPs of documents `ids`; the vocabulary matmul runs on supervised positions only."""
        return config.flops(self.lengths[ids], self.num_targets[ids])

    def attention_flops(self, config, ids) -> np.ndarray:
        """(B,) what attention has of `flops`."""
        return config.attention_flops(self.lengths[ids])

    def pack(self, ids) -> PackedBatch:
        return pack([self[i] for i in ids])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of ids, mask and offsets: equal means the same tokens in the same order."""
        # row_ids and openings are left out: the same tokens from a file of another name are the same data.
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
        """(n,) int64 tokens that both sides begin with, whatever their masks; 0 if they are not to be shared.

        At least one token of rejected is left: a document without a token of its own cannot be packed.
        """
        if not self.share_prefix:
            return np.zeros(len(self), dtype=np.int64)
        # Compared as ids and not as texts: a BPE may merge the prompt's end with an answer's first letters.
        # np.asarray: slices of a memory map take three times as long; 300k pairs in 2 s
        all_chosen = np.split(np.asarray(self.chosen.input_ids), self.chosen.offsets[1:-1])
        all_rejected = np.split(np.asarray(self.rejected.input_ids), self.rejected.offsets[1:-1])
        shared = [common_prefix(chosen, rejected[:-1]) for chosen, rejected in zip(all_chosen, all_rejected)]
        return np.array(shared, dtype=np.int64)

    @cached_property
    def prompts(self) -> np.ndarray:
        """(n,) int64 which prompt a pair answers, numbered by first appearance.

        Two are one prompt where the tokens before chosen's last trained answer are equal: an opening that
        many conversations share is none.
        """
        numbers, found = {}, []
        for i in range(len(self)):
            ids, is_trained = self.chosen[i]
            # where an answer begins: trained, behind a token that is not
            starts = np.flatnonzero(np.diff(is_trained, prepend=False) & is_trained)
            prompt = ids[: starts[-1]].tobytes()
            found.append(numbers.setdefault(prompt, len(numbers)))
        return np.array(found, dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of a stream that a pair takes."""
        return self.chosen.lengths + self.rejected.lengths - self.prefixes

    def flops(self, config, ids) -> np.ndarray:
        """(B,) forward FLOPs of pairs `ids`, a shared prefix counted once."""
        # Logits are not subtracted: a supervised token of a prefix is predicted once for each side.
        both = self.chosen.flops(config, ids) + self.rejected.flops(config, ids)
        return both - config.flops(self.prefixes[ids], logits=0)

    def attention_flops(self, config, ids) -> np.ndarray:
        """(B,) what attention has of `flops`."""
        both = self.chosen.attention_flops(config, ids) + self.rejected.attention_flops(config, ids)
        return both - config.attention_flops(self.prefixes[ids])

    def pack(self, ids) -> PackedBatch:
        """One stream: the chosen sides of `ids` in order, then the rejected ones without shared prefixes."""
        documents = [self.chosen[i] for i in ids] + [self.rejected[i] for i in ids]
        return pack(documents, self.prefixes[ids] if self.share_prefix else ())

    @property
    def row_ids(self) -> np.ndarray:
        return self.chosen.row_ids

    @property
    def openings(self) -> np.ndarray | None:
        return self.chosen.openings

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256((self.chosen.fingerprint + self.rejected.fingerprint).encode()).hexdigest()


def count_trained_openings(train: Documents | Pairs, held_out: Documents | Pairs) -> int:
    """How many rows of `held_out` have the opening prompt of a row of `train`."""
    assert train.openings is not None and held_out.openings is not None, "of data that _load has read"
    return int(np.isin(held_out.openings, train.openings).sum())


def load_sft(config, tokenizer: Tokenizer, log=print) -> tuple[Documents, Documents | None]:
    """Training and held-out documents of config.data. Preference rows give their chosen side.

    Keys read: data, data_eval, rows, template, max_seq_len, supervise, cache_dir. data: {name of a source
    (plumbing.sources): float fraction or int count}. data_eval: None, the same, or the share of prompts that
    `data` goes without (is_held_out). Tokenised once and kept under cache_dir: one process of a machine
    calls this first, then the others, which find the files. What was kept and dropped goes to `log`.
    UserError for what a source or a key has wrong, naming source and row.
    """
    train, held_out = _load(config, ("messages",), tokenizer, log)
    return train[0], held_out and held_out[0]


def load_preferences(config, tokenizer: Tokenizer, log=print) -> tuple[Pairs, Pairs | None]:
    """As load_sft, for preference pairs; reads share_prefix too.

    Each side is cut at max_seq_len by itself; a pair goes when either side is left without answer.
    """
    train, held_out = _load(config, ("chosen", "rejected"), tokenizer, log)
    return Pairs(*train, config.share_prefix), held_out and Pairs(*held_out, config.share_prefix)


def _load(config, sides: tuple[str, ...], tokenizer: Tokenizer, log):
    """([Documents per side] to train on, the same held out or None)."""
    template = resolve_template(config.template, tokenizer)
    # A tokenizer that lacks a token of the template, or splits it, is refused before anything is read.
    encode_chat(PROBE, tokenizer, template, 64)
    settings = {
        "template": template,
        "max_seq_len": config.max_seq_len,
        "supervise": config.supervise,
        "rows": config.rows,
        "held_out": config.data_eval if isinstance(config.data_eval, float) else 0.0,
    }
    # The share of prompts to hold out is taken from `data`; a mixture of its own is tokenised apart.
    mixtures = {"data": config.data}
    if isinstance(config.data_eval, dict):
        mixtures["data_eval"] = config.data_eval

    folders, opened = {}, {}
    for key, mixture in mixtures.items():
        found = [find_source(name) for name in mixture]
        name = _cache_key(found, mixture, sides, tokenizer, settings)
        folders[key] = Path(config.cache_dir) / name[:32]
        if not token_cache.is_intact(folders[key], log):
            options = (mixture, sides, settings, config.cache_dir, log)
            opened[key] = [_open(key, source, *options) for source in found]
    # All sources are open before the first is tokenised, which may take half an hour.
    for key, parts in opened.items():
        columns, stats = _tokenise(parts, sides, tokenizer, settings)
        for part in parts:
            part.source.check_unchanged()
        # The key says what the columns are of; meta.json says it to people, and holds what the log repeats.
        meta = {"data": mixtures[key], "settings": settings, "stats": stats}
        token_cache.write(folders[key], columns, meta)

    loaded = {key: _read_cache(folder, sides, key, log) for key, folder in folders.items()}
    if "data_eval" not in loaded:
        return loaded["data"]["train"], loaded["data"].get("eval")
    train, held_out = loaded["data"]["train"], loaded["data_eval"]["train"]
    # Said and not refused: the loss on a sample of the trained rows may be what is wanted.
    if count := count_trained_openings(train[0], held_out[0]):
        shared = f"{count:,} of {len(held_out[0]):,} rows have a prompt that is trained on too"
        log(f"data_eval: {shared}: in eval/, they are not held-out data")
    return train, held_out


# ---------------------------------------------------------------- pairs without a cache

SAME_PROMPT = "for a prompt that the vector's texts have"


class PairReader:
    """Pairs of one source row by row, checked and counted as `load_preferences` does it.

    For steer.py, which takes the first ones. key: what names the source in messages. template None:
    transcripts as they are, by encode(text, tokenizer, most tokens). UserError names source and row.
    """

    def __init__(self, key: str, source: str, tokenizer: Tokenizer, template, max_tokens: int, encode):
        self.key, self.tokenizer, self.encode, self.num_read = key, tokenizer, encode, 0
        self.settings = {"template": template, "max_seq_len": max_tokens, "supervise": "all"}
        self.settings |= {"rows": "first", "held_out": 0.0}
        options = {source: 1.0}, ("chosen", "rejected"), self.settings, None, print
        self.part, self.tally = _open(key, find_source(source), *options), _Tally()

    def pairs(self, seen: set):
        """Yield (prompt, [(ids, mask) of chosen, of rejected]) of the rows that are kept.

        A prompt is the first user message. Rows whose prompt is in `seen`, which may grow, are dropped.
        """
        for number in range(len(self.part.rows)):
            self.num_read += 1
            where = f"{self.key} {self.part.name!r}, {self.part.rows.where(number)}"
            (row,) = self.part.rows.read([number])
            self.tally.ignored |= dict.fromkeys(self.part.schema.ignored(row))
            try:
                found = self._render(row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            if isinstance(found, str):
                self.tally.suspect[found, self.part.name] += 1
            else:
                prompt = opening_prompt(found[0].messages)
                found = SAME_PROMPT if prompt in seen else self._encode(number, found)
            if isinstance(found, str):
                self.tally.dropped[found] += 1
            else:
                yield prompt, found

    def _render(self, row: dict):
        """[_Rendered per side] of a row, or the reason to drop it."""
        part = self.part
        if self.settings["template"] is not None:
            return _render_row(part.schema, row, ("chosen", "rejected"), self.tokenizer, self.settings)
        conversations = part.schema.read(row)
        if isinstance(conversations, str):
            return conversations
        if "prompt" in row or not all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
            where = "--template, or the pair's in configs/pairs.py"
            raise UserError(f"no transcript; expected a template to render it with ({where})")
        if not answer_one_prompt(row, *conversations):
            return ANOTHER_PROMPT
        rendered = []
        for side, messages in zip(("chosen", "rejected"), conversations):
            _check_characters(row[side], row)
            rendered.append(_Rendered(messages, row[side], [], []))
        return rendered

    def _encode(self, number: int, rendered: "list[_Rendered]"):
        """[(ids, mask) per side], cut, or the reason to drop the row."""
        if self.settings["template"] is not None:
            options = self.tokenizer, self.settings, self.tally
            (found,) = _encode_rows(self.part, [number], [rendered], *options)
            return found if isinstance(found, str) else found[1]
        limit, cut = self.settings["max_seq_len"], []
        self.tally.see_row(self.part, number, rendered)
        for conversation in rendered:
            ids, mask = self.encode(conversation.text, self.tokenizer, 1 << 30)
            cut.append((ids[:limit], mask[:limit]))
            self.tally.see_document(*cut[-1], 0, len(ids) > limit)
        self.tally.counts["equal"] += np.array_equal(cut[0][0], cut[1][0])
        return cut

    def describe(self, kept: dict) -> str:
        """The line of `describe` on the rows that were read. kept: {what for: pairs}."""
        return describe(self.tally.stats([self._read()], kept), f"{self.key} {self.part.name!r}")

    def check(self, kept: dict) -> None:
        """UserError where most rows were read the wrong way round, or all pairs have equal answers."""
        self.tally.check_source(self._read())
        if self.tally.counts["equal"] == sum(kept.values()):
            cut = f"cut at {self.settings['max_seq_len']} tokens"
            raise UserError(f"{self.describe(kept)}; expected pairs of different answers ({cut})")

    def _read(self) -> "_Part":
        """The part, of the rows that were read."""
        return dataclasses.replace(self.part, numbers=np.arange(self.num_read))


# ---------------------------------------------------------------- tokenised cache

CHUNK = 1024  # rows read and tokenised at a time: enough work for every thread, little memory
MOST = 0.5  # of a source's rows may be dropped for a reason of SUSPECT
ENDS_IN_EOS = "for an answer that ends in the end-of-turn token"
SUSPECT = (ANOTHER_PROMPT, ENDS_IN_EOS)
# A prompt that already holds a rendered template would be rendered twice.
RENDERED = re.compile(r"<\|(?:im_start|user|start_header_id)\|>|<start_of_turn>|\[INST\]|(?:^|\n)Human:")
# An answer that another template ended: the model learns to write these letters before its own end token.
ENDED = re.compile(r"(?:</s>|<\|(?:im_end|eot_id|end_of_text|endoftext)\|>|<end_of_turn>)\s*$")


@dataclass(frozen=True)
class _Part:
    """A source of a mixture, open, and which of its rows are wanted."""

    source: object  # of plumbing.sources
    rows: sources.Rows
    numbers: np.ndarray  # (rows wanted,) int64
    schema: formats.Schema
    amount: float | int

    @property
    def name(self) -> str:
        return self.source.name


def _open(key: str, source, mixture: dict, sides, settings: dict, cache_dir, log) -> _Part:
    rows, amount = source.open(cache_dir, log), mixture[source.name]
    # By the first row, before any is tokenised: rows of no known format show in seconds, not in half an hour.
    schema = find_schema(source.name, rows, sides)
    numbers = mixture_rows(len(rows), amount, settings["rows"])
    if len(numbers) == 0:
        picked = f"{amount} of {len(rows):,} rows is less than one"
        raise UserError(f"{key} {source.name!r}: {picked}; expected a larger fraction, or a count")
    return _Part(source, rows, numbers, schema, amount)


def _read_cache(folder: Path, sides, key: str, log) -> dict[str, list[Documents]]:
    """{"train" and, if rows are held out, "eval": [Documents per side]}, memory-mapped."""
    # The log is the same for a cache that was found as for one just made: nothing is said once only.
    stats = json.loads((folder / "meta.json").read_text())["stats"]
    for name, picked, rows, amount in stats["picked"]:
        if picked != rows:
            log(f"{key}: {name}: {picked:,} picked of {rows:,} rows ({amount})")
    log(describe(stats, key))

    loaded = {}
    for split in stats["kept"]:
        loaded[split] = [_map_documents(folder, f"{split}.{side}") for side in sides]
    return loaded


def _map_documents(folder: Path, prefix: str) -> Documents:
    # Mapped, not read: the ranks of a machine share one copy in memory, and a step reads a few pages of it.
    columns = {}
    for field in dataclasses.fields(Documents):
        file = folder / f"{prefix}.{field.name}.npy"
        columns[field.name] = np.load(file, mmap_mode="r", allow_pickle=False)
    return Documents(**columns)


def _cache_key(found: list, mixture: dict, sides, tokenizer: Tokenizer, settings: dict) -> str:
    """sha256 of all that the columns depend on: the sources' bytes, amounts, settings, tokenizer and code."""
    # Contents and not paths or times: a file that changed under its name is tokenised again, a copy is not.
    fingerprints = [source.fingerprint() for source in found]
    # `tokenizers` may change ids between versions, and its own text is not in tokenizer.json.
    reader = [tokenizer.fingerprint, tokenizer.bos_token, tokenizer.eos_token, tokenizers.__version__]
    parts = [list(mixture.items()), fingerprints, sides, settings, reader, _token_code()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _token_code() -> str:
    """Hash of the code that decides ids and masks: another version of it makes another cache."""
    # This file whole: from a list of functions and of the tables that they read, one is soon missing. A new
    # comment tokenises nothing again (half an hour for 939,343 rows), any other change of these files does.
    return token_cache.hash_code([sys.modules[__name__], sources, formats, Tokenizer])


def _tokenise(parts: list[_Part], sides, tokenizer: Tokenizer, settings: dict) -> tuple[dict, dict]:
    """Columns {"train.chosen.input_ids": array, ..} of the rows that are kept, and the counts."""
    splits = ["train", "eval"] if settings["held_out"] else ["train"]
    kept = {split: _Kept(sides) for split in splits}
    tally = _Tally()
    total = sum(len(part.numbers) for part in parts)
    with progress_bar(total=total, desc="tokenising", unit=" rows") as progress:
        for part in parts:
            # The order of the mixture, then of the numbers: a document's place is its row, on any machine.
            for first in range(0, len(part.numbers), CHUNK):
                numbers = part.numbers[first : first + CHUNK].tolist()
                rendered = _render_rows(part, numbers, sides, tokenizer, settings, tally)
                encoded = _encode_rows(part, numbers, rendered, tokenizer, settings, tally)
                for number, row in zip(numbers, encoded):
                    if isinstance(row, str):
                        tally.dropped[row] += 1
                    else:
                        split, documents, opening = row
                        kept[split].add(f"{part.name}#{number}", documents, opening)
                progress.update(len(numbers))
            tally.check_source(part)
    stats = tally.stats(parts, {split: len(kept[split].row_ids) for split in splits})
    _check_stats(stats, settings)
    columns = {}
    for split in splits:
        columns |= kept[split].columns(split)
    return columns, stats


class _Kept:
    """The documents of a split, side by side, until all are there."""

    def __init__(self, sides):
        self.row_ids, self.openings = [], []
        self.ids = {side: [] for side in sides}
        self.masks = {side: [] for side in sides}

    def add(self, row_id: str, documents: list[tuple], opening: int) -> None:
        """Add a row's (ids, mask) per side, and the hash of its opening prompt."""
        # Both sides at once: chosen[i] and rejected[i] are of one row because they are added together.
        self.row_ids.append(row_id)
        self.openings.append(opening)
        for side, (ids, mask) in zip(self.ids, documents):
            self.ids[side].append(ids)
            self.masks[side].append(mask)

    def columns(self, split: str) -> dict[str, np.ndarray]:
        """What the fields of Documents are, by "split.side.field"."""
        # Joined once, at the end: an array that grows by a row is copied a million times.
        columns = {}
        for side, ids in self.ids.items():
            lengths = [0] + [len(document) for document in ids]
            columns[f"{split}.{side}.input_ids"] = np.concatenate(ids)
            columns[f"{split}.{side}.loss_mask"] = np.concatenate(self.masks[side])
            columns[f"{split}.{side}.offsets"] = np.cumsum(lengths, dtype=np.int64)
            columns[f"{split}.{side}.row_ids"] = np.array(self.row_ids)
            columns[f"{split}.{side}.openings"] = np.array(self.openings, dtype=np.uint64)
        return columns


class _Tally:
    """What is said about the rows of a mixture, collected while they are read."""

    def __init__(self):
        self.counts = Counter(tokens=0, supervised=0, straddling=0, truncated=0)
        self.counts.update(equal=0, empty=0, duplicates=0, rendered=0, ended=0)
        self.dropped = Counter()  # {reason: rows}
        self.suspect = Counter()  # {(reason, source's name): rows}, of SUSPECT among others
        self.first_rendered = self.first_ended = None  # "source#row: marker"
        self.seen = {}  # {hash of a row's text: hash of its source and number}
        self.ignored = {}  # columns that are not read, in order

    def see_row(self, part: _Part, number: int, conversations: "list[_Rendered]") -> None:
        """Count what a row is kept with.

        Empty answers, answers that another template ended, prompts that hold a rendered template, and texts
        that another row had.
        """
        for conversation in conversations:
            answers = _contents(conversation.messages, "assistant")
            self.counts["empty"] += sum(not answer.strip() for answer in answers)
            for end in filter(None, map(ENDED.search, answers)):
                self.counts["ended"] += 1
                self.first_ended = self.first_ended or f"{part.name}#{number}: {end.group().strip()}"
        prompts = _contents(conversations[0].messages, "user", "system")
        marker = next(filter(None, map(RENDERED.search, prompts)), None)
        if marker:
            self.counts["rendered"] += 1
            self.first_rendered = self.first_rendered or f"{part.name}#{number}: {marker.group().strip()}"
        # Hashes: the texts of a million rows would take gigabytes. Rows that the amount repeats do not count.
        text = hash(tuple(conversation.text for conversation in conversations))
        row = hash((part.name, number))
        self.counts["duplicates"] += self.seen.setdefault(text, row) != row

    def see_document(self, ids: np.ndarray, mask: np.ndarray, straddling: int, is_cut: bool) -> None:
        """Count a document's tokens."""
        self.counts.update(tokens=len(ids), supervised=int(mask.sum()))
        self.counts.update(straddling=straddling, truncated=is_cut)

    def check_source(self, part: _Part) -> None:
        """UserError when more of a source was dropped than chance explains."""
        # A few such rows are dirt; half of a source means that its columns were read the wrong way round.
        for reason in SUSPECT:
            count, rows = self.suspect[reason, part.name], len(part.numbers)
            if count > MOST * rows:
                dropped = f"{count:,} of {rows:,} rows dropped {reason}"
                raise UserError(f"data {part.name!r}: {dropped}; expected at most {MOST:.0%}")

    def stats(self, parts: list[_Part], kept: dict) -> dict:
        """All of it, as meta.json keeps it."""
        sizes = [(part.name, len(part.numbers), len(part.rows), part.amount) for part in parts]
        rows = sum(len(part.numbers) for part in parts)
        said = {"first_rendered": self.first_rendered, "first_ended": self.first_ended}
        said["ignored"] = list(self.ignored)
        return {"rows": rows, "picked": sizes, "kept": kept, "dropped": self.dropped, **self.counts, **said}


def _check_stats(stats: dict, settings: dict) -> None:
    # Refused here, not after the reference pass: data without targets, or with nothing but targets.
    kept = sum(stats["kept"].values())
    assert stats["rows"] == kept + sum(stats["dropped"].values()), "a row is neither kept nor dropped"
    if 0 in stats["kept"].values() or stats["supervised"] in (0, stats["tokens"]):
        needs = "expected rows on every side, and some but not all of their tokens supervised"
        raise UserError(f"{describe(stats)}; {needs}")
    if stats["equal"] == kept:
        cut = f"cut at max_seq_len={settings['max_seq_len']}"
        raise UserError(f"{describe(stats)}; expected pairs of different answers ({cut})")


class _Rendered(NamedTuple):
    """A conversation, its text, and where its answers are."""

    messages: list[dict]
    text: str
    spans: list[tuple[int, int]]  # of all answers
    trained: list[tuple[int, int]]  # of those that are trained on


def _render_rows(part: _Part, numbers, sides, tokenizer: Tokenizer, settings: dict, tally: _Tally) -> list:
    """Per row: [_Rendered per side], or the reason to drop it. UserError names source and row."""
    rendered = []
    for number, row in zip(numbers, part.rows.read(numbers)):
        tally.ignored |= dict.fromkeys(part.schema.ignored(row))
        try:
            result = _render_row(part.schema, row, sides, tokenizer, settings)
        except UserError as error:
            raise UserError(f"data {part.name!r}, {part.rows.where(number)}: {error}") from error
        # A reason travels in the row's place: every row has one result, so none can be lost between lists.
        if isinstance(result, str):
            tally.suspect[result, part.name] += 1
        rendered.append(result)
    return rendered


def _render_row(schema, row: dict, sides, tokenizer: Tokenizer, settings: dict) -> list[_Rendered] | str:
    conversations = schema.read(row)
    if isinstance(conversations, str):  # why the schema has no conversation of it
        return conversations
    if schema.is_pair and not answer_one_prompt(row, *conversations):
        return ANOTHER_PROMPT
    template = settings["template"]
    rendered = []
    for messages in conversations[: len(sides)]:  # SFT takes the chosen side of a pair
        # The template adds the end-of-turn token: an answer that brings its own would end twice.
        eos = end_of_turn(template, tokenizer)
        if any(answer.rstrip().endswith(eos) for answer in _contents(messages, "assistant")):
            return ENDS_IN_EOS
        text, spans = render(messages, template, tokenizer)
        _check_characters(text, row)
        trained = trained_spans(messages, spans, settings["supervise"])
        rendered.append(_Rendered(messages, text, spans, trained))
    return rendered


def _contents(messages: list[dict], *roles: str) -> list[str]:
    """The texts of turns of these roles; anything else is for `render` to refuse."""
    contents = [turn["content"] for turn in messages if turn["role"] in roles]
    return [content for content in contents if isinstance(content, str)]


def _check_characters(text: str, row: dict) -> None:
    """UserError naming the column of half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start : error.end]
        columns = []
        for column, value in row.items():
            if broken in json.dumps(value, default=str, ensure_ascii=False):
                columns.append(column)
        problem = f"column {' or '.join(map(repr, columns))} holds {ascii(broken)}, half of a character"
        raise UserError(f"{problem}; expected text that UTF-8 can write") from error


def _encode_rows(part: _Part, numbers, rendered: list, tokenizer: Tokenizer, settings: dict, tally: _Tally):
    """Per row of `rendered`: ("train" or "eval", [(ids, mask) per side], opening_hash), or why not kept."""
    texts = []
    for row in rendered:
        if not isinstance(row, str):
            texts += [conversation.text for conversation in row]
    encodings = iter(tokenizer.encode_batch(texts))  # all at once: the tokenizer's threads share them out
    limit = settings["max_seq_len"]
    for number, row in zip(numbers, rendered):
        if isinstance(row, str):
            yield row
            continue
        whole, cut = [], []  # before and after the cut at max_seq_len, which the counts compare
        for conversation in row:
            encoded = ids_and_mask(next(encodings), conversation.trained, tokenizer, settings["template"])
            whole.append(encoded)
            cut.append((encoded[0][:limit], encoded[1][:limit]))
        reason = _why_drop(row, cut, limit)
        if reason:
            yield reason
            continue
        # Counted from here on, where the row is kept: a dropped one is counted by its reason alone.
        tally.see_row(part, number, row)
        tally.counts["equal"] += len(cut) == 2 and np.array_equal(cut[0][0], cut[1][0])
        for (ids, mask), (all_ids, _, straddling) in zip(cut, whole):
            tally.see_document(ids, mask, straddling, len(all_ids) > limit)
        messages = row[0].messages
        split = "eval" if is_held_out(messages, settings["held_out"]) else "train"
        yield split, cut, opening_hash(messages)


def _why_drop(row: list[_Rendered], cut: list[tuple], limit: int) -> str | None:
    """A row is dropped where a side of it has nothing to train on."""
    for conversation, (_, mask) in zip(row, cut):
        if not conversation.spans:
            return "without an assistant turn"
        if not conversation.trained:
            return "without a turn to train on"
        # What is left of a long prompt trains nothing, and would only dilute the mean of a step.
        if not mask.any():
            return f"without an answer in the first {limit} tokens"
    return None


def describe(stats: dict, key: str = "data") -> str:
    """The line that says what became of the rows of a config key's mixture."""
    names = {"train": "train", "eval": "eval"} if key == "data" else {"train": "held out"}
    # Counts of zero are left out, but for the dropped rows: that there are none is worth a word.
    kept = " + ".join(f"{count:,} {names.get(split, split)}" for split, count in stats["kept"].items())
    dropped = ", ".join(f"{count:,} dropped {reason}" for reason, count in stats["dropped"].items())
    lengths = f"{stats['tokens']:,} tokens, {stats['supervised']:,} supervised"
    notes = [f"{stats['truncated']:,} conversations truncated"]
    if stats["straddling"]:
        notes.append(f"{stats['straddling']:,} tokens straddle header and answer (supervised)")
    if stats["equal"]:
        notes.append(f"{stats['equal']:,} pairs with two equal answers (they teach nothing)")
    if stats["empty"] or stats["duplicates"]:
        empty = f"{stats['empty']:,} empty answer{'s' * (stats['empty'] != 1)}"
        notes.append(f"{empty}, {stats['duplicates']:,} duplicate{'s' * (stats['duplicates'] != 1)}")
    if stats["rendered"]:
        first = stats["first_rendered"]
        problem = "prompts hold a rendered template, which is rendered again"
        notes.append(f"WARNING: {stats['rendered']:,} {problem} (first: {first})")
    if stats["ended"]:
        problem = "answers end in an end token that is not this template's"
        notes.append(f"WARNING: {stats['ended']:,} {problem} (first: {stats['first_ended']})")
    if stats["ignored"]:
        notes.append(f"columns not read: {', '.join(map(in_one_line, stats['ignored']))}")
    return "; ".join([f"{key}: {stats['rows']:,} rows: {kept}, {dropped or '0 dropped'}", lengths, *notes])
