"""Exact ids and masks of literal conversations, transformers as oracle for the templates, and the way from
rows to columns of tokens.
"""

import csv
import dataclasses
import gzip
import importlib
import inspect
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import formats
from data import Documents, Pairs, encode_chat
from formats import find_schema
from plumbing import token_cache
from plumbing.files import UserError, progress_bar
from plumbing.sources import open_source
from plumbing.tokenizer import Tokenizer

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
# Pairs merged into one token, first to last: Ċ is a newline and Ġ a space in byte-level BPE.
MERGES = ["< |", "| >", "u s", "e r", "us er", "a s", "as s", "i s", "is t", "ass ist", "a n", "an t", "assist ant", "s y", "s t", "sy st",
          "e m", "syst em", "H i", "Ċ Ċ", "y o", "Ġ yo", "Ġyo u"]  # fmt: skip
GEMMA = ["<start_of_turn>", "<end_of_turn>"]

repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def write_tokenizer(folder, special=SPECIAL, **config):
    """A byte-level BPE made by hand: ids 0-6 are SPECIAL, 7-262 the 256 bytes, 263-285 the results of MERGES,
    286-287 GEMMA.
    """
    vocabulary = [
        *special,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
        *GEMMA,
    ]
    core = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [tuple(merge.split()) for merge in MERGES])
    )
    words = pre_tokenizers.Split(" ", "merged_with_next")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    core.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), bos]
    )  # as in Llama 3: both would harm a mask
    core.add_special_tokens([*special, *GEMMA])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|end_of_text|>"}  # names come in both forms
    names = {"bos_token": "<|begin_of_text|>", "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def datasets():
    """The library, imported by the one worker that runs this file: over a second of CPU time."""
    import datasets as library

    return library


@pytest.fixture(autouse=True)
def private_datasets_cache(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def chat(*contents, system=None):
    """user, assistant, user, ... after an optional system message."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def supervised(encoded):
    return [i for i, keep in zip(*encoded) if keep]


# ---------------------------------------------------------------------------------------------------------------- ids and masks


def test_the_tokenizer_reads_special_tokens_and_adds_none(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 288)
    # Hi, eot, " you": no BOS although the file's post-processor asks for one
    assert tokenizer.encode("Hi<|eot_id|> you") == [281, 4, 285]
    assert tokenizer.decode([281, 4, 285]) == "Hi<|eot_id|> you"


def test_a_padding_token_is_not_asked_for(tmp_path):
    """Nothing is padded here, and some models name one that tokenizer.json lacks."""
    assert write_tokenizer(tmp_path, pad_token="<pad>").eos_id == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, eos",
    [({}, "<|eot_id|>"), ({"added_tokens_decoder": {}}, "<|end_of_text|>")],
    ids=["old", "new"],
)
def test_two_files_that_name_another_eos(tmp_path, changes, eos):
    """The one that transformers takes, whose chat template the exported model runs with."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, **changes)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    )
    assert Tokenizer.from_dir(tmp_path).eos_token == AutoTokenizer.from_pretrained(tmp_path).eos_token == eos


# The conversation of the next test: system "u", user "Hi", assistant " you", user "Hi", assistant "\nHi". A
# tuple is supervised. Ids: 263 <|  264 |>  280 system  267 user  275 assistant  205 newline  282 two newlines
# 91 u  281 Hi  285 " you"  283 yo
#      0 bos  1 eos  2 <|start_header_id|>  3 <|end_header_id|>  4 <|eot_id|>  5 <|im_start|>  6 <|im_end|>
LITERAL = {
    "tulu": [263, 280, 264, 205, 91, 205, 263, 267, 264, 205, 281, 205, 263, 275, 264, 205, (285, 1), 205,
             263, 267, 264, 205, 281, 205, 263, 275, 264, (282, 281, 1)],  # 282: the header's newline and the answer's, merged
    "zephyr": [263, 280, 264, 205, 91, 1, 205, 263, 267, 264, 205, 281, 1, 205, 263, 275, 264, 205, (285, 1), 205,
               263, 267, 264, 205, 281, 1, 205, 263, 275, 264, (282, 281, 1), 205],
    "llama3": [0, 2, 280, 3, 282, 91, 4, 2, 267, 3, 282, 281, 4, 2, 275, 3, 282, (283, 91, 4),  # stripped: yo, u
               2, 267, 3, 282, 281, 4, 2, 275, 3, 282, (281, 4)],
    "chatml": [5, 280, 205, 91, 6, 205, 5, 267, 205, 281, 6, 205, 5, 275, 205, (285, 6), 205,
               5, 267, 205, 281, 6, 205, 5, 275, (282, 281, 6), 205],
    "gemma": [0, 286, 267, 205, 281, 287, 205, 286, 83, 85, 74, 75, 82, 205, (283, 91, 287), 205,  # no system turn; m o d e l
              286, 267, 205, 281, 287, 205, 286, 83, 85, 74, 75, 82, 205, (281, 287), 205],
}  # fmt: skip
LITERAL["tulu_bos"] = [0, *LITERAL["tulu"]]


@pytest.mark.parametrize("template", LITERAL)
def test_literal_ids_and_masks(tokenizer, template):
    messages = chat("Hi", " you", "Hi", "\nHi", system="u")
    if template == "gemma":
        messages = messages[1:]
    groups = [group if isinstance(group, tuple) else (group,) for group in LITERAL[template]]
    ids, mask = encode_chat(messages, tokenizer, template, 100)
    assert ids == [i for group in groups for i in group]
    assert mask == [
        isinstance(group, tuple)
        for group in LITERAL[template]
        for _ in (group if isinstance(group, tuple) else [0])
    ]
    last = max(i for i, group in enumerate(LITERAL[template]) if isinstance(group, tuple))
    assert supervised(encode_chat(messages, tokenizer, template, 100, supervise="last")) == list(
        LITERAL[template][last]
    )


def test_truncation_cuts_ids_and_mask_from_the_right(tokenizer):
    ids, mask = encode_chat(chat("Hi", "Hi you"), tokenizer, "tulu", 100)
    assert (ids[-3:], mask[-3:]) == ([281, 285, 1], [True] * 3)
    assert encode_chat(chat("Hi", "Hi you"), tokenizer, "tulu", len(ids) - 1) == (ids[:-1], mask[:-1])


@pytest.mark.slow
@repeatable
@given(
    st.lists(st.text(max_size=20), min_size=1, max_size=3),
    st.text(max_size=20),
    st.sampled_from(list(data.TEMPLATES)),
)
def test_supervised_ids_decode_to_the_answers_and_their_end_of_turn(tokenizer, answers, prompt, template):
    messages = [message for answer in answers for message in chat(prompt, answer)]
    text, spans = data.render(messages, template, tokenizer)
    (encoding,) = tokenizer.encode_batch([text])
    eos = data.end_of_turn(template, tokenizer)
    for answer, span in zip(answers, spans):
        ids, mask, straddling = data.ids_and_mask(encoding, [span], tokenizer, template)
        expected = (answer.strip() if template in ("llama3", "gemma") else answer) + eos
        assert tokenizer.decode(ids[mask]) == "\n" * straddling + expected
        assert straddling == (template not in ("llama3", "gemma") and answer.startswith("\n"))


PIECES = [
    "Hi",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "e\u0301",
    "\ufb01",
    "\u00a0",
    "\u200b",
    "\x00",
    "😀",
    "👨‍👩‍👧",
    "日本",
    "▁",
]
PIECES += ["<|user|>", "<|im_end|>", "<s>", "</s>"]
MASKED = {  # transformers' own way to say which characters are the assistant's
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
}


def write_other_tokenizer(folder, kind):
    """What Llama 2, Mistral and Zephyr have (spaces as ▁, bytes for unknown characters); a Unigram; a
    normaliser that drops characters.
    """
    special, text = (
        ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"],
        ["Hi there\n\nuser assistant e\u0301 日本 system |> <|"] * 9,
    )
    if kind == "llama 2":
        byte_ids = {f"<0x{byte:02X}>": byte + 5 for byte in range(256)}
        vocabulary = (
            {word: i for i, word in enumerate(special)}
            | byte_ids
            | {"▁": 261, "H": 262, "i": 263, "Hi": 264, "▁▁": 265}
        )
        core = tokenizers.Tokenizer(
            models.BPE(vocabulary, [("H", "i"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>")
        )
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.add_special_tokens(special)
    elif kind == "unigram":
        core = tokenizers.Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.train_from_iterator(
            text,
            trainers.UnigramTrainer(
                vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
            ),
        )
    else:
        core = tokenizers.Tokenizer(models.BPE())
        core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), sorted(pre_tokenizers.ByteLevel.alphabet())
        core.train_from_iterator(
            text, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        )
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_dir(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama 2", "unigram", "normaliser"])
def test_other_tokenizers_mask_what_transformers_masks(tmp_path, kind):
    """100 conversations of awkward pieces, special tokens among them: ids and mask."""
    from transformers import AutoTokenizer

    ours, theirs, rng = (
        write_other_tokenizer(tmp_path, kind),
        AutoTokenizer.from_pretrained(tmp_path),
        random.Random(0),
    )
    for template in MASKED:
        for _ in range(50):
            messages = chat(
                *("".join(rng.choices(PIECES, k=rng.randint(0, 6))) + "." for _ in range(rng.randint(2, 5)))
            )
            out = theirs.apply_chat_template(
                messages, chat_template=MASKED[template], return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = encode_chat(messages, ours, template, 10_000)
            assert (
                ids == out["input_ids"]
                and mask == [bool(keep) for keep in out["assistant_masks"]]
                and any(mask)
            )


def test_an_answer_may_begin_with_a_character_that_the_tokenizer_drops(tmp_path):
    """No token has an accent that is stripped; transformers' mask ends at such an answer."""
    tokenizer = write_other_tokenizer(tmp_path, "normaliser")
    accented, plain = (
        encode_chat(chat("Hi", answer, "Hi", "Hi"), tokenizer, "zephyr", 100) for answer in ("\u0301Hi", "Hi")
    )
    assert accented == plain and tokenizer.decode(supervised(plain)) == "Hi</s>Hi</s>"


CONVERSATIONS = {
    "one turn": chat("Hi", "yo"),
    "system": chat("Hi", "yo", system="u"),
    "several turns": chat("Hi", " you", "\n\nHi", "Hi\n", "a", "é😀<|"),
    "white space around": chat("  Hi \n", "\n Hi\n\n", "Hi", " "),
    "ends with the user": chat("Hi", "yo", "Hi"),
    "empty contents": chat("", "", system=""),
    "an answer first": chat("Hi", "yo")[1:],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", data.TEMPLATES)
def test_transformers_renders_the_exported_template_to_the_same_ids(tokenizer, tmp_path, template, name):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, data.TEMPLATES[template])
    oracle, messages = AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS[name]
    if template == "gemma" and name in ("system", "an answer first", "empty contents"):  # refused by both
        with pytest.raises(jinja2.TemplateError, match="System role not supported|roles must alternate"):
            oracle.apply_chat_template(messages)
        with pytest.raises(
            ValueError, match="message 0: role='(system|assistant)'; expected user, assistant, user"
        ):
            encode_chat(messages, tokenizer, template, 10_000)
        return
    assert encode_chat(messages, tokenizer, template, 10_000)[0] == oracle.apply_chat_template(
        messages, return_dict=False
    )
    text, spans = data.render(messages, template, tokenizer)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, (start, _) in zip(answers, spans):
        if i > 0:  # the prompt that generation starts from is what training saw before the answer
            prompt = oracle.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
            assert text[:start] == prompt


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages=\\[\\]: expected a list of at least one message"),
        (None, "messages=None: expected a list"),
        (["Hi"], "messages=\\['Hi'\\]: expected a list of at least one message"),
        ([{"role": "tool", "content": "Hi"}], "message 0: role='tool'"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}],
            "message 1: role='assistant', content=NoneType",
        ),
        (
            chat("Hi", "yo<|end_of_text|>"),
            "message 1: the answer already ends in <|end_of_text|>".replace("|", "\\|"),
        ),
    ],
)
def test_bad_messages_are_refused(tokenizer, messages, problem):
    with pytest.raises(ValueError, match=problem):
        encode_chat(messages, tokenizer, "tulu", 100)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path):
    plain = write_tokenizer(tmp_path / "plain", special=SPECIAL[:2])
    for template, token in (("llama3", "start_header_id"), ("chatml", "im_start")):
        with pytest.raises(
            ValueError,
            match=f"template='{template}': .*{token}.* is no special token of tokenizer .*plain; expected one id",
        ):
            encode_chat(chat("Hi", "yo"), plain, template, 100)
    nameless = write_tokenizer(tmp_path / "nameless", eos_token=None)
    with pytest.raises(ValueError, match="template='tulu': the BOS or EOS .* of tokenizer .*nameless"):
        encode_chat(chat("Hi", "yo"), nameless, "tulu", 100)


def test_template_none_is_the_tokenizers_own(tokenizer, tmp_path):
    for name, jinja in data.TEMPLATES.items():
        for text in (jinja, jinja.replace(r"\n", "\n")):  # a newline as its escape, or as itself
            tokenizer.save(tmp_path / name, text)
            assert data.resolve_template(None, Tokenizer.from_dir(tmp_path / name)) == name
    with pytest.raises(ValueError, match="template=None: the chat template of .* is none of ours"):
        data.resolve_template(None, tokenizer)
    with pytest.raises(ValueError, match="template='tuluu': expected one of .*'tulu'"):
        data.resolve_template("tuluu", tokenizer)


SPELLINGS = {  # as tokenizer_config.json has them, or a script: with a newline in the text or its escape
    "tulu": "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",  # open-instruct
    "zephyr": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",  # open-instruct
    "zephyr ": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",  # zephyr-7b-beta
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",  # OpenHermes-2.5, TRL
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPELLINGS)
def test_another_spelling_of_a_template_is_known(tokenizer, tmp_path, name):
    """Those in SAME_TEXT: transformers renders each to the text of ours, with and without a generation
    prompt.
    """
    from transformers import AutoTokenizer

    jinja, ours = SPELLINGS[name], name.strip()
    for text in (jinja, jinja.replace("'\n'", r"'\n'").replace("|>\n'", r"|>\n'")):
        tokenizer.save(tmp_path, text)
        assert data.resolve_template(None, Tokenizer.from_dir(tmp_path)) == ours
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            options = dict(add_generation_prompt=prompt, tokenize=False)
            expected = theirs.apply_chat_template(messages, chat_template=data.TEMPLATES[ours], **options)
            assert theirs.apply_chat_template(messages, chat_template=jinja, **options) == expected
    tokenizer.save(tmp_path, jinja.replace("eos_token", "''").replace("im_end", "im_stop"))
    with pytest.raises(ValueError, match="template=None: the chat template of .* is none of ours"):
        data.resolve_template(None, Tokenizer.from_dir(tmp_path))


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        Tokenizer.from_dir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- sources

PAIR = (chat("Hi", "yo"), chat("Hi", "no"))
PKU = {
    "prompt": "Hi",
    "response_0": "no",
    "response_1": "yo",
    "better_response_id": 0,
    "safer_response_id": 1,
}
ROWS = {  # one row of every schema that holds PAIR
    "message lists": {"prompt": "Hi", "chosen": PAIR[0], "rejected": PAIR[1]},
    "strings": {"prompt": "Hi", "chosen": "yo", "rejected": "no"},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: yo", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    "pku": PKU | {"is_response_0_safe": False, "is_response_1_safe": True},
    "pku pairs": {"response": ["yo", "no"], "prompt": "Hi"},
}


def converted(row, sides):
    return find_schema("here", [row], sides).read(row)


@pytest.mark.parametrize("schema", ROWS)
def test_every_preference_schema_gives_the_same_pair(schema):
    assert converted(ROWS[schema], ("chosen", "rejected")) == list(PAIR)
    assert converted(ROWS[schema], ("messages",))[0] == PAIR[0]  # SFT on the chosen answers


def test_messages_come_first_for_sft_and_are_no_pair():
    both = ROWS["message lists"] | {"messages": chat("a", "b")}
    assert converted(both, ("messages",)) == [chat("a", "b")]
    assert converted(both, ("chosen", "rejected")) == list(PAIR)
    with pytest.raises(
        ValueError, match="'here': columns messages \\(list\\); expected one of: prompt, chosen, rejected"
    ):
        converted({"messages": chat("a", "b")}, ("chosen", "rejected"))


@pytest.mark.parametrize("safe", [(True, True), (False, False), (None, True), (True, None)])
def test_pku_rows_without_exactly_one_safe_response_are_dropped(safe):
    row = PKU | {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    assert formats._pku(row) == "for not exactly one safe response"


def test_a_transcript_of_several_turns():
    text = "\n\nHuman: a\n\nb\n\nAssistant: c: d\n\nHuman: e\n\nAssistant:"
    assert formats._transcript(text) == chat("a\n\nb", "c: d", "e", "")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"question": "Hi", "answer": "yo"},
            r"columns question \(str\), answer \(str\); expected one of: messages; conv",
        ),
        (
            {"prompt": chat("Hi"), "chosen": "yo", "rejected": "no"} | {"chosen": 1},
            "columns prompt \\(list\\)",
        ),
    ],
)
def test_unknown_columns_are_refused(row, problem):
    with pytest.raises(ValueError, match=f"data 'here': {problem}"):
        converted(row, ("messages",))


def test_every_file_format_gives_the_same_rows(datasets, tmp_path):
    rows = [{"prompt": f"Hi {i}", "chosen": "yo", "rejected": "no"} for i in range(3)]
    lines, whole = "".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows)
    for name, text in (("a.jsonl", lines), ("b.json", whole)):
        (tmp_path / name).write_text(text)
        with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
            file.write(text)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "c.parquet")
    table.to_csv(tmp_path / "d.csv")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.jsonl.gz", "b.json", "b.json.gz", "c.parquet", "d.csv", "saved", "splits"):
        assert list(open_source(str(tmp_path / name))) == rows, name
    assert list(open_source(f"{tmp_path}/splits[test]")) == rows[2:]
    with pytest.raises(
        ValueError, match=r"splits\[dev\]': no split 'dev'; expected \[split\] to be one of train, test"
    ):
        open_source(f"{tmp_path}/splits[dev]")
    with pytest.raises(ValueError, match=r"saved\[test\]': the folder has no splits; expected no \[split\]"):
        open_source(f"{tmp_path}/saved[test]")


@pytest.mark.parametrize("full_row", [0, 1])
def test_a_key_that_some_rows_lack_is_null_in_its_column(tmp_path, full_row):
    rows = [{"axiom": "a", "label": "safe"}] * 2
    rows[full_row] = rows[full_row] | {"text": "Hi"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        read = open_source(str(tmp_path / name))
        assert list(read) == rows and set(read.column_names) == {"axiom", "label", "text"}
        assert read["text"] == [row.get("text") for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet", "d.csv"])
def test_a_local_file_is_read_without_a_bar_and_what_comes_later_has_one(datasets, tmp_path, capfd, name):
    table = datasets.Dataset.from_list([{"prompt": "Hi", "chosen": "yo", "rejected": "no"}])
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[2:], table.to_json)(tmp_path / name)
    capfd.readouterr()  # writing has a bar of its own
    open_source(str(tmp_path / name))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("name", ["a*b.jsonl", "a[1]/b.jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    for i, path in enumerate((tmp_path / name, tmp_path / "aXb.jsonl")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"prompt": f"Hi {i}"}) + "\n")
    assert list(open_source(str(tmp_path / name))) == [{"prompt": "Hi 0"}]


@pytest.mark.parametrize("name", ["missing.jsonl", "/no/such/folder", "nowhere"])
def test_a_missing_source_is_named_and_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"data '{name}': no such file or folder"):
        open_source(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name in ("a.txt", "a.parquet.gz"):
        (tmp_path / name).write_text("Hi")
        with pytest.raises(
            ValueError,
            match=rf"{name}': expected a file of .*'.parquet', '.csv'\] \(or, but for parquet, .gz of one\)",
        ):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, name):
    rows = {"a.jsonl": '{"text": "a"}\n{"text": "é"}\n', "b.csv": "text\na\né\n"}
    (tmp_path / name).write_text(rows[name], encoding="latin-1")
    with pytest.raises(ValueError, match=f"data '{tmp_path}/{name}', row 1: .*[Uu][Tt][Ff].?8"):
        list(open_source(str(tmp_path / name)))


def test_only_an_empty_cell_of_a_csv_is_null(tmp_path):
    """pandas takes the answers "None", "NA", "null" and "nan" for missing ones unless told."""
    texts = ["None", "NA", "null", "nan", ""]
    (tmp_path / "a.csv").write_text(
        "id,text,safe\n" + "".join(f"{i},{text},True\n" for i, text in enumerate(texts)) + "5,a,\n"
    )
    rows = open_source(str(tmp_path / "a.csv"))
    assert rows["text"] == [*texts[:4], None, "a"]
    assert rows["id"] == [*"012345"] and rows["safe"] == ["True"] * 5 + [None]  # text as it is written


# ---------------------------------------------------------------------------------------------------------------- mixtures


def test_mixtures_pick_the_rows_that_open_instruct_picks():
    n = 1005
    assert (
        data.mixture_rows(n, 0.1).tolist()
        == np.random.RandomState(42).choice(n, int(0.1 * n), replace=False).tolist()
    )
    assert data.mixture_rows(n, 0.1)[:3].tolist() == [926, 630, 682], "numpy's frozen stream"
    assert data.mixture_rows(n, 7).tolist() == np.random.RandomState(42).choice(n, 7, replace=False).tolist()
    assert data.mixture_rows(n, 1.0).tolist() == data.mixture_rows(n, n).tolist() == list(range(n))
    rest = np.random.RandomState(42).choice(n, int(2.5 * n) - 2 * n, replace=False).tolist()
    assert (
        data.mixture_rows(n, 2.5).tolist()
        == data.mixture_rows(n, int(2.5 * n)).tolist()
        == [*range(n), *range(n), *rest]
    )
    for amount in (0, -1, 0.0, True, "0.1", float("nan")):
        with pytest.raises(ValueError, match="expected a float fraction or an int count above 0"):
            data.mixture_rows(n, amount)


# ---------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def config(tmp_path):
    """A config of 40 conversations over 20 prompts, of which the last can be changed by `write`."""
    path = tmp_path / "chats.jsonl"

    def write(last):
        rows = [{"messages": chat(f"Hi {i % 20}", f"you {i}")} for i in range(39)] + [{"messages": last}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(chat("Hi 19", "you 39"))
    keys = dict(
        data={str(path): 1.0}, data_eval=None, template="tulu", max_seq_len=64, supervise="all", rows="choice"
    )
    return SimpleNamespace(write=write, path=path, share_prefix=False, cache_dir=tmp_path / "cache", **keys)


def contents(documents):
    return [
        (documents[i][0].tolist(), documents[i][1].tolist(), str(documents.row_ids[i]))
        for i in range(len(documents))
    ]


def test_documents_are_the_encoded_rows_in_order(tokenizer, config):
    config.data = {str(config.path): 0.5}
    documents, held_out = data.load_sft(config, tokenizer)
    rows = np.random.RandomState(42).choice(40, 20, replace=False)
    expected = [
        (*encode_chat(chat(f"Hi {i % 20}", f"you {i}"), tokenizer, "tulu", 64), f"{config.path}#{i}")
        for i in rows
    ]
    assert contents(documents) == expected and held_out is None
    assert documents.lengths.tolist() == [len(ids) for ids, _, _ in expected]
    assert documents.num_targets.tolist() == [sum(mask[1:]) for _, mask, _ in expected]
    assert isinstance(documents.input_ids, np.memmap) and documents.input_ids.dtype == np.int32


def test_pairs_share_their_rows_and_are_cut_each_by_itself(tokenizer, config):
    long = "\n\nHuman: Hi\n\nAssistant: " + "you " * 60
    config.path.write_text(
        json.dumps(ROWS["transcripts"]) + "\n" + json.dumps(ROWS["transcripts"] | {"rejected": long}) + "\n"
    )
    lines = []
    pairs, _ = data.load_preferences(config, tokenizer, lines.append)
    chosen, rejected = (
        encode_chat(PAIR[0], tokenizer, "tulu", 64),
        encode_chat(PAIR[1], tokenizer, "tulu", 64),
    )
    assert contents(pairs.chosen) == [(*chosen, f"{config.path}#{i}") for i in range(2)]
    assert (
        pairs.rejected.lengths.tolist() == [len(rejected[0]), 64]
        and (pairs.row_ids == pairs.rejected.row_ids).all()
    )
    assert pairs.lengths.tolist() == [len(chosen[0]) + len(rejected[0]), len(chosen[0]) + 64]
    assert lines[-1].startswith("data: 2 rows: 2 train, 0 dropped;") and lines[-1].endswith(
        "1 conversations truncated"
    )


@pytest.mark.parametrize("at", [0, 1])
def test_messages_may_have_keys_that_others_lack(tokenizer, config, at):
    expected = contents(data.load_sft(config, tokenizer)[0])
    rows = [json.loads(line) for line in config.path.read_text().splitlines()]
    rows[at]["messages"][1] |= {"weight": 1, "tool_calls": None}
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert contents(data.load_sft(config, tokenizer)[0]) == expected


def test_messages_stored_as_json_are_decoded(datasets, tokenizer, config, tmp_path):
    """As the datasets library stores lists of unlike structs."""
    column = datasets.Features({"messages": datasets.List(datasets.Json())})
    rows = [
        {"messages": chat("Hi", "yo")},
        {"messages": [chat("Hi")[0], {"role": "assistant", "content": "no", "weight": 1}]},
    ]
    datasets.Dataset.from_list(rows, features=column).save_to_disk(tmp_path / "saved")
    config.data = {str(tmp_path / "saved"): 1.0}
    documents, _ = data.load_sft(config, tokenizer)
    assert [ids for ids, _, _ in contents(documents)] == [
        encode_chat(messages, tokenizer, "tulu", 64)[0] for messages in PAIR
    ]


def test_a_row_that_lacks_a_column_is_named(tokenizer, config):
    config.path.write_text(
        json.dumps(ROWS["strings"]) + "\n" + json.dumps({"prompt": "Hi", "chosen": "yo"}) + "\n"
    )
    with pytest.raises(ValueError, match="row 1: column 'rejected' holds NoneType; expected str"):
        data.load_preferences(config, tokenizer)


def test_rows_without_supervised_tokens_are_dropped_and_counted_by_reason(tokenizer, config):
    rows = [chat("Hi", "\nyo"), chat("Hi"), chat("Hi" * 100, "yo"), chat("u" * 100, "yo")]
    config.path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    lines = []
    documents, _ = data.load_sft(config, tokenizer, lines.append)
    assert [row_id.split("#")[1] for row_id in documents.row_ids] == ["0"]
    assert (
        "4 rows: 1 train, 1 dropped without an assistant turn, 2 dropped without an answer in the first 64 tokens;"
        in lines[-1]
    )
    assert lines[-1].endswith("1 tokens straddle header and answer (supervised)")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_which_one_side_has_no_answer_left_is_dropped(tokenizer, config, side):
    config.supervise = "last"
    rows = [ROWS["message lists"], ROWS["message lists"] | {side: chat("Hi", "yo", "u" * 100, "yo")}]
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    pairs, _ = data.load_preferences(config, tokenizer, lines.append)
    assert (
        len(pairs) == 1
        and "2 rows: 1 train, 1 dropped without an answer in the first 64 tokens;" in lines[-1]
    )


@pytest.mark.parametrize("less, count", [(0, 0), (1, 1)])
def test_a_conversation_that_just_fits_is_not_truncated(tokenizer, config, less, count):
    config.path.write_text(json.dumps({"messages": PAIR[0]}) + "\n")
    config.max_seq_len, lines = len(encode_chat(PAIR[0], tokenizer, "tulu", 64)[0]) - less, []
    data.load_sft(config, tokenizer, lines.append)
    assert f"; {count} conversations truncated" in lines[-1]


def test_a_first_token_is_no_target():
    """5 6 7 and 8 9, all but 5 supervised: 6, 7 and 9 are predicted, 8 is first."""
    mask = np.array([False, True, True, True, True])
    assert Documents(
        np.arange(5, 10), mask, np.array([0, 3, 5]), np.array(["a", "b"])
    ).num_targets.tolist() == [2, 1]


def test_nothing_or_everything_supervised_is_refused(tokenizer, config, monkeypatch):
    config.write(chat("Hi"))
    config.data = {str(config.path): 1.0}
    config.max_seq_len = 5
    with pytest.raises(
        ValueError,
        match="40 rows: 0 train, 39 dropped without an answer in the first 5 tokens, 1 dropped without an assistant turn",
    ):
        data.load_sft(config, tokenizer)
    config.max_seq_len, honest = 64, data.ids_and_mask
    monkeypatch.setattr(
        data, "ids_and_mask", lambda *args: (honest(*args)[0], np.ones_like(honest(*args)[1]), 0)
    )
    with pytest.raises(
        ValueError, match="expected rows on every side, and some but not all of their tokens supervised"
    ):
        data.load_sft(config, tokenizer)


def test_pairs_that_are_all_equal_are_refused(tokenizer, config):
    """Also those that max_seq_len makes equal: nothing could be learned from them, after a reference pass
    over all.
    """
    rows = [ROWS["strings"] | {"chosen": "yo u", "rejected": "yo"}] * 2
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(data.load_preferences(config, tokenizer)[0]) == 2
    config.max_seq_len = len(encode_chat(PAIR[0], tokenizer, "tulu", 64)[0]) - 1  # "yo" of both
    with pytest.raises(
        ValueError,
        match=r"2 pairs with two equal answers .*expected pairs of different answers \(cut at max_seq_len=",
    ):
        data.load_preferences(config, tokenizer)


def test_a_bad_row_is_named_by_source_and_number(tokenizer, config):
    config.write([{"role": "tool", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"data '.*chats.jsonl', row 39: message 0: role='tool'"):
        data.load_sft(config, tokenizer)
    for answers, problem in (
        (["a", "b", "c"], "3 answers; expected two"),
        (None, "column 'response' holds NoneType; expected list"),
    ):
        rows = [ROWS["pku pairs"], {"prompt": "Hi", "response": answers}]
        config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=f"row 1: {problem}"):
            data.load_preferences(config, tokenizer)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_prompt_that_an_answer_does_not_repeat_is_refused(tokenizer, config, side):
    rows = [ROWS["message lists"], ROWS["message lists"] | {side: chat("Hi", "yo")[1:]}]
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError,
        match=f"row 1: {side} has no user message; expected chosen and rejected to repeat the prompt",
    ):
        data.load_preferences(config, tokenizer)


def test_a_source_of_which_no_row_is_left_is_refused(tokenizer, config, tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps({"messages": PAIR[0]}) + "\n")
    config.data |= {f"{tmp_path}/few.jsonl": 0.9}
    with pytest.raises(
        ValueError,
        match="data '.*few.jsonl': 0.9 of 1 rows is less than one; expected a larger fraction, or a count",
    ):
        data.load_sft(config, tokenizer)


def test_rows_are_counted_without_a_progress_bar_too(tokenizer, config, monkeypatch):
    """TQDM_DISABLE=1 in the environment: tqdm counts nothing then."""
    monkeypatch.setattr(
        data, "progress_bar", lambda items=None, **options: progress_bar(items, **options | {"disable": True})
    )
    lines = []
    data.load_sft(config, tokenizer, lines.append)
    assert lines[-1].startswith("data: 40 rows: 40 train, 0 dropped;")


def never(*_):
    raise AssertionError("tokenised although it is cached")


def test_the_second_load_reads_the_cache(tokenizer, config, monkeypatch):
    first, _ = data.load_sft(config, tokenizer)
    assert not list(config.cache_dir.glob(".*")), "no scratch folder stays behind"
    monkeypatch.setattr(data, "_tokenise", never)
    lines = []
    again, _ = data.load_sft(config, tokenizer, lines.append)
    assert contents(again) == contents(first) and again.fingerprint == first.fingerprint
    assert len(lines) == 1 and lines[0].startswith("data: 40 rows: 40 train, 0 dropped")


TOKENIZERS = {
    "eos": dict(eos_token="<|eot_id|>"),  # the same tokenizer.json, another end of turn
    "bos": dict(bos_token="<|im_start|>"),
    "tokenizer.json": dict(special=[*SPECIAL, "<|more|>"]),
}
CHANGES = (
    "content",
    "template",
    "max_seq_len",
    "supervise",
    "amount",
    "data_eval",
    *TOKENIZERS,
    "tokenizers' version",
    "code",
)


@pytest.mark.parametrize("changed", CHANGES)
def test_whatever_changes_the_tokens_misses_the_cache(tokenizer, config, monkeypatch, tmp_path, changed):
    data.load_sft(config, tokenizer)
    if changed == "content":
        config.write(chat("Hi 19", "you 40"))
    elif changed == "amount":
        config.data = {str(config.path): 39}
    elif changed in TOKENIZERS:
        tokenizer = write_tokenizer(tmp_path, **TOKENIZERS[changed])
    elif changed == "tokenizers' version":
        monkeypatch.setattr(tokenizers, "__version__", "another")
    elif changed == "code":
        monkeypatch.setattr(data, "_token_code", lambda: "another")
    else:
        setattr(
            config,
            changed,
            {"template": "zephyr", "max_seq_len": 63, "supervise": "last", "data_eval": 0.5}[changed],
        )
    monkeypatch.setattr(data, "_tokenise", never)
    with pytest.raises(AssertionError, match="tokenised"):
        data.load_sft(config, tokenizer)


def test_the_same_pairs_are_cached_for_sft_and_for_dpo(tokenizer, config):
    config.path.write_text(json.dumps(ROWS["strings"]) + "\n")
    documents, _ = data.load_sft(config, tokenizer)
    pairs, _ = data.load_preferences(config, tokenizer)
    assert contents(pairs.chosen) == contents(documents) != contents(pairs.rejected)


def test_chunks_lose_and_repeat_no_row(tokenizer, config, monkeypatch):
    """40 rows as one chunk, and as 16, 16 and 8."""
    whole, _ = data.load_sft(config, tokenizer)
    monkeypatch.setattr(data, "CHUNK", 16)
    config.cache_dir = config.cache_dir / "another"
    assert contents(data.load_sft(config, tokenizer)[0]) == contents(whole)


def test_equal_rows_at_other_places_keep_their_own_row_ids(tokenizer, config):
    config.data = {str(config.path): 2}
    for n in (10, 11):  # the same two contents are picked, from other rows
        config.path.write_text((json.dumps({"messages": chat("Hi", "yo")}) + "\n") * n)
        documents, _ = data.load_sft(config, tokenizer)
        assert documents.row_ids.tolist() == [
            f"{config.path}#{i}" for i in np.random.RandomState(42).choice(n, 2, replace=False)
        ]


@pytest.mark.parametrize(
    "damage", ["flipped byte", "truncated", "missing", "no meta.json", "torn meta.json", "flipped meta.json"]
)
def test_a_damaged_cache_is_tokenised_again(tokenizer, config, damage):
    first = contents(data.load_sft(config, tokenizer)[0])
    (file,) = config.cache_dir.glob("*/train.messages.input_ids.npy")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    if damage == "flipped byte":
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-5])
    elif damage == "torn meta.json":
        (file.parent / "meta.json").write_text('{"sha')
    elif damage == "flipped meta.json":  # still JSON
        meta = (file.parent / "meta.json").read_text()
        (file.parent / "meta.json").write_text(
            re.sub(r"\d", lambda digit: str(int(digit[0]) ^ 1), meta, count=1)
        )
    else:
        (file if damage == "missing" else file.parent / "meta.json").unlink()
    lines = []
    assert contents(data.load_sft(config, tokenizer, lines.append)[0]) == first
    named = "meta.json" if "meta" in damage else "train.messages.input_ids.npy"
    assert f"{named} missing or damaged; tokenising again" in lines[0]
    assert contents(data.load_sft(config, tokenizer, lines.append)[0]) == first


def test_a_run_that_shares_a_damaged_cache_may_have_removed_it(tokenizer, config):
    """Two runs find the damage at once, and the other is the first to remove the folder."""
    first = contents(data.load_sft(config, tokenizer)[0])
    (file,) = config.cache_dir.glob("*/meta.json")
    file.write_text("")
    lines = []

    def log(line):
        lines.append(line)
        if "damaged" in line:
            shutil.rmtree(file.parent)

    assert contents(data.load_sft(config, tokenizer, log)[0]) == first
    assert "damaged" in lines[0] and [path.name for path in config.cache_dir.iterdir()] == [file.parent.name]


def test_a_run_that_shares_the_cache_may_be_faster(tokenizer, config, monkeypatch):
    """While this one tokenises, another writes the same folder and maps it: that one stays, and both have the
    same documents.
    """
    tokenise, other = data._tokenise, []

    def slow(*args):
        monkeypatch.setattr(data, "_tokenise", tokenise)
        other.append(data.load_sft(config, tokenizer)[0])
        (folder,) = config.cache_dir.glob("*/")
        other.append((folder / "meta.json").stat().st_ino)
        return tokenise(*args)

    monkeypatch.setattr(data, "_tokenise", slow)
    documents, _ = data.load_sft(config, tokenizer)
    (folder,) = config.cache_dir.iterdir()
    assert contents(documents) == contents(other[0]) and (folder / "meta.json").stat().st_ino == other[1]


def test_a_full_disk_is_named(tokenizer, config, monkeypatch):
    """numpy's own message, "1074 requested and 992 written", names neither file nor cause."""

    def full(*args, **kwargs):
        raise OSError("1074 requested and 992 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        OSError,
        match=rf"not written, [\d,]+ bytes needed, [\d,]+ free: 1074 requested.*: '{config.cache_dir}/",
    ):
        data.load_sft(config, tokenizer)
    assert not list(config.cache_dir.iterdir())


def prompts(documents):
    return {int(row_id.split("#")[1]) % 20 for row_id in documents.row_ids}


def test_held_out_prompts_are_on_one_side_only(tokenizer, config):
    config.data_eval = 0.3
    train, held_out = data.load_sft(config, tokenizer)
    assert len(train) + len(held_out) == 40 and prompts(train) | prompts(held_out) == set(range(20))
    assert not prompts(train) & prompts(held_out)
    # the side is the prompt's own: another row, system message, dialogue or dataset does not move it
    for i in range(20):
        for messages in (chat(f"Hi {i}", "yo"), chat(f"Hi {i}", "yo", "a", "b", system="u")):
            assert data.is_held_out(messages, 0.3) == (i in prompts(held_out))
    assert 0.28 < np.mean([data.is_held_out(chat(str(i)), 0.3) for i in range(5000)]) < 0.32


@pytest.mark.parametrize("template", data.STRIPS_CONTENTS)
def test_a_prompt_with_outer_blanks_is_on_its_own_side(tokenizer, template):
    """It is rendered without them, so its ids would be trained on and held out."""
    same = []
    for i in range(1000):
        bare, blank = (chat(prompt, "yo") for prompt in (f"Hi {i}", f"\n Hi {i} "))
        same.append(data.is_held_out(bare, 0.3) == data.is_held_out(blank, 0.3))
    assert all(same)
    texts = [data.render(messages, template, tokenizer)[0] for messages in (bare, blank)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "part, old, new",
    [
        (data, "fraction * 2**64", "fraction * 2**63"),  # a prompt on the other side
        (data, 'STRIPS_CONTENTS = ("llama3", "gemma")', 'STRIPS_CONTENTS = ("llama3",)'),
        (data.Tokenizer, "self.core.post_processor = None", "pass"),
    ],
)
def test_the_cache_depends_on_all_that_decides_ids_and_sides(monkeypatch, part, old, new):
    before, read = data._token_code.__wrapped__(), inspect.getsource

    def changed(this):
        return read(this).replace(old, new) if this is part else read(this)

    assert old in read(part)
    monkeypatch.setattr(data.token_cache.inspect, "getsource", changed)
    assert data._token_code.__wrapped__() != before


def test_held_out_data_can_be_another_mixture(tokenizer, config):
    config.data, config.data_eval = {str(config.path): 30}, {str(config.path): 3}
    train, held_out = data.load_sft(config, tokenizer)
    assert (len(train), len(held_out)) == (30, 3)


@pytest.mark.parametrize(
    "held_out, count",
    [
        (["Hi 2", "Hi", "yo"], 0),  # Hi 2 is in the file and not picked
        (["Hi 1", "yo", " Hi 1\n", "Hi 2", "Hi"], 2),
        (["Hi 0", "Hi 1", "Hi 0"], 3),
    ],
)
@pytest.mark.parametrize("load", [data.load_sft, data.load_preferences])
def test_held_out_prompts_that_are_trained_too_are_counted(
    tokenizer, config, monkeypatch, load, held_out, count
):
    """Hi 0 and Hi 1 are trained: the first 2 of 3 rows. The answers differ, and outer blanks do not count.

    A start that finds the cache says the same.
    """

    def write(path, prompts, answer):
        rows = [{"prompt": prompt, "chosen": f"{answer} you", "rejected": answer} for prompt in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    config.rows, path = "first", config.path.with_name("held_out.jsonl")
    write(config.path, ["Hi 0", "Hi 1", "Hi 2"], "yo")
    write(path, held_out, "us")
    config.data, config.data_eval = {str(config.path): 2}, {str(path): 1.0}
    first, again = [], []
    documents = load(config, tokenizer, first.append)
    assert data.count_trained_openings(*documents) == count
    shared = f"data_eval: {count} of {len(held_out)} rows have a prompt that is trained on too: "
    expected = [f"{shared}in eval/, they are not held-out data"] if count else []
    assert [line for line in first if "trained on too" in line] == expected
    monkeypatch.setattr(data, "_tokenise", never)
    load(config, tokenizer, again.append)
    assert again == first


def test_missing_held_out_data_is_found_before_anything_is_tokenised(tokenizer, config, monkeypatch):
    monkeypatch.setattr(data, "_tokenise", never)
    config.data_eval = {"missing.jsonl": 1.0}
    with pytest.raises(ValueError, match="data 'missing.jsonl': no such file"):
        data.load_sft(config, tokenizer)


def test_a_fingerprint_is_of_ids_masks_and_boundaries():
    ids, mask = np.arange(6, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1], dtype=bool)
    documents = Documents(ids, mask, np.array([0, 3, 6]), np.array(["a#0", "a#1"]))
    others = [
        dataclasses.replace(documents, input_ids=ids + 1),
        dataclasses.replace(documents, loss_mask=~mask),
        dataclasses.replace(documents, offsets=np.array([0, 2, 6])),
    ]
    assert len({documents.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert (
        dataclasses.replace(documents, row_ids=np.array(["b#0", "b#1"])).fingerprint == documents.fingerprint
    )
    sides = ((documents, documents), (documents, others[0]), (others[0], documents))
    assert len({Pairs(*pair).fingerprint for pair in sides}) == 3


def test_prompts_of_pairs_are_what_stands_before_the_last_answer():
    """7 8 | 1, 7 8 | 2 3 and 7 | 8 are of the prompts 7 8, 7 8 and 7; 7 | 8 | 7 | 1 and 7 | 8 | 9 | 1, whose
    second and fourth tokens are trained, of 7 8 7 and 7 8 9.
    """
    ids = np.array([7, 8, 1, 7, 8, 2, 3, 7, 8, 7, 8, 7, 1, 7, 8, 9, 1], dtype=np.int32)
    mask = np.array([0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], dtype=bool)
    names = np.array([f"a#{i}" for i in range(5)])
    chosen = Documents(ids, mask, np.array([0, 3, 7, 9, 13, 17]), names)
    assert Pairs(chosen, chosen).prompts.tolist() == [0, 0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------- formats

DOCUMENT = Path(__file__).parent.parent / "docs/data.md"
EXAMPLES = {
    name: json.loads(row)
    for name, row in re.findall(r"^\| (.+?) \| `(\{.+\})` \|$", DOCUMENT.read_text(), re.M)
}
HELLO, GO = chat("Hi", "Hello."), chat("Hi", "Go.")
SUM = chat("Add 1.\n2", "3")
CONVERSATIONS_OF = {name: [HELLO] for name in EXAMPLES} | {
    "instruction, input, output: Alpaca": [SUM],
    "question, chosen, rejected: Orca": [
        chat("Hi", "Hello.", system="Be kind."),
        chat("Hi", "Go.", system="Be kind."),
    ],
    "instruction, input, chosen, rejected": [SUM, chat("Add 1.\n2", "4")],
}


def write_rows(config, rows):
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def loaded(config, tokenizer, rows, is_pair):
    """(contents of each side, the `data:` line) of rows."""
    write_rows(config, rows)
    lines = []
    if not is_pair:
        return [contents(data.load_sft(config, tokenizer, lines.append)[0])], lines[-1]
    pairs, _ = data.load_preferences(config, tokenizer, lines.append)
    return [contents(pairs.chosen), contents(pairs.rejected)], lines[-1]


def test_the_document_has_an_example_of_every_schema():
    assert list(EXAMPLES) == [schema.name for schema in formats.SCHEMAS]


@pytest.mark.parametrize("schema", formats.SCHEMAS, ids=lambda schema: schema.name)
def test_every_format_gives_the_ids_and_masks_of_its_plain_form(tokenizer, config, schema):
    """The example of docs/data.md, beside the same content as messages, or as chosen and rejected message
    lists.
    """
    row = EXAMPLES[schema.name]
    sides = ("chosen", "rejected") if schema.is_pair else ("messages",)
    assert find_schema("here", [row], sides) is schema
    expected = CONVERSATIONS_OF[schema.name]
    if schema.is_pair and len(expected) == 1:
        expected = [HELLO, GO]
    assert schema.read(row) == expected
    plain = dict(zip(sides, expected))
    assert (
        loaded(config, tokenizer, [row] * 2, schema.is_pair)[0]
        == loaded(config, tokenizer, [plain] * 2, schema.is_pair)[0]
    )


def test_a_system_column_and_history_become_turns(tokenizer, config):
    row = EXAMPLES["prompt, chosen, rejected: strings"]
    given = row | {"system": "u", "history": [["a", "b"]]}
    turns = chat("a", "b", "Hi", system="u")
    plain = {"chosen": [*turns, HELLO[1]], "rejected": [*turns, GO[1]]}
    assert loaded(config, tokenizer, [given], True)[0] == loaded(config, tokenizer, [plain], True)[0]
    messages = {"messages": chat("Hi", "yo", system="u")}
    assert converted(messages | {"system": "u"}, ("messages",)) == [messages["messages"]]  # it says so twice
    with pytest.raises(
        ValueError, match="column 'system' and a system turn in the messages say different things"
    ):
        converted(messages | {"system": "a"}, ("messages",))


REFUSED = {
    "tools": ({"messages": HELLO, "tools": [{"type": "function"}]}, "column 'tools' is not read with 'messages', and carries meaning"),
    "tool_calls": ({"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "message 1: key 'tool_calls'"),
    "reasoning_content": ({"messages": [HELLO[0], HELLO[1] | {"reasoning_content": "a"}]}, "message 1: key 'reasoning_content'"),
    "thinking": ({"messages": HELLO, "thinking": "a"}, "column 'thinking' is not read"),
    "history beside messages": ({"messages": HELLO, "history": [["a", "b"]]}, "column 'history' is not read with 'messages'"),
    "weight of a row": ({"messages": HELLO, "weight": 0}, "column 'weight' is not read"),
    "half a weight": ({"messages": [HELLO[0], HELLO[1] | {"weight": 0.5}]}, "message 1: weight=0.5; expected 0 or 1"),
    "a trained prompt": ({"messages": [HELLO[0] | {"train": True}, HELLO[1]]}, "message 0: train=True on a turn of role 'user'"),
    "an image": ({"messages": [HELLO[0] | {"content": [{"type": "image"}]}]}, "message 0: a content part of type 'image'"),
    "KTO": ({"prompt": "Hi", "completion": "Go.", "label": False}, "column 'label': a rating of the completion"),
    "another type later": ({"messages": "Hi"}, "column 'messages' holds str; expected list"),
    "a ShareGPT tool": ({"messages": [{"from": "function_call", "value": "Hi"}]}, "message 0: role='function_call'"),
    "half a character": ({"messages": chat("Hi \ud83d", "yo")}, r"column 'messages' holds '\\ud83d', half of a character"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_carries_meaning_is_used_or_its_row_refused(tokenizer, config, case):
    row, problem = REFUSED[case]
    good = {"prompt": "Hi", "completion": "yo"} if "prompt" in row else {"messages": HELLO}
    write_rows(config, [good, good, row])
    with pytest.raises(UserError, match=f"data '.*chats.jsonl', row 2: {problem}"):
        data.load_sft(config, tokenizer)


@pytest.mark.parametrize("key", formats.TRAIN_KEYS)
def test_a_turn_that_is_not_to_be_trained_is_context(tokenizer, config, key):
    messages = chat("Hi", "no", "Hi", "yo")
    expected = (
        encode_chat(messages, tokenizer, "tulu", 64)[0],
        encode_chat(messages, tokenizer, "tulu", 64, supervise="last")[1],
    )
    messages[1][key], messages[3][key] = 0, True
    (documents,), _ = loaded(config, tokenizer, [{"messages": messages}], False)
    assert documents[0][:2] == tuple(expected)
    messages[3][key] = False
    with pytest.raises(UserError, match="1 dropped without a turn to train on"):
        loaded(config, tokenizer, [{"messages": messages}], False)


def test_all_other_columns_are_named(tokenizer, config):
    row = EXAMPLES["chosen, rejected: message lists"] | {"id": 1}
    _, line = loaded(config, tokenizer, [row, row | {"rejected": chat("Hi", "no"), "source": "late"}], True)
    assert line.endswith("; columns not read: score_chosen, id, source")


PROMPTS = {  # of a row that is dropped
    "two": {"chosen": chat("a", "yo"), "rejected": chat("b", "no")},
    "two system turns": {"chosen": chat("a", "yo", system="u"), "rejected": chat("a", "no")},
    "another column": {
        "prompt": "Another question",
        "chosen": chat("The question", "yo"),
        "rejected": chat("The question", "no"),
    },
    "a triple": {"prompt": chat("a"), "chosen": chat("a", "yo"), "rejected": chat("b", "no")},
}


@pytest.mark.parametrize("case", PROMPTS)
def test_sides_that_answer_different_prompts_are_dropped_and_counted(tokenizer, config, case):
    row = PROMPTS[case]
    good = (
        row
        | {"chosen": chat("Hi", "yo"), "rejected": chat("Hi", "no")}
        | ({"prompt": chat("Hi")} if case == "a triple" else {})
    )
    if case == "another column":
        good["prompt"] = "Hi"
    (chosen, _), line = loaded(config, tokenizer, [good, row], True)
    assert len(chosen) == 1 and "2 rows: 1 train, 1 dropped for sides that answer different prompts;" in line
    write_rows(config, [good, row, row])
    with pytest.raises(
        UserError, match="chats.jsonl': 2 of 3 rows dropped for sides that .* prompts; expected at most 50%"
    ):
        data.load_preferences(config, tokenizer)


def test_a_prompt_column_may_be_any_turn_or_a_transcript():
    chosen = chat("a", "b", "c", "d")
    for prompt in ("a", " c ", "Human: a\nAssistant: b\nHuman: c", None, ""):
        row = {"prompt": prompt, "chosen": chosen, "rejected": chat("a", "b", "c", "e")}
        assert converted(row, ("chosen", "rejected"))[0] == chosen


def test_an_answer_that_ends_in_eos_is_dropped_and_counted(tokenizer, config):
    ends = {"messages": chat("Hi", "yo<|end_of_text|>")}
    _, line = loaded(config, tokenizer, [{"messages": HELLO}, ends], False)
    assert "1 dropped for an answer that ends in the end-of-turn token;" in line
    write_rows(config, [ends] * 2)
    with pytest.raises(
        UserError, match="2 of 2 rows dropped for an answer that ends in the end-of-turn token"
    ):
        data.load_sft(config, tokenizer)


@pytest.mark.parametrize(
    "prompt, marker",
    [("<|im_start|>user\nHi", "<|im_start|>"), ("\n\nHuman: Hi", "Human:"), ("[INST] Hi", "[INST]")],
)
def test_a_rendered_template_in_a_prompt_is_said(tokenizer, config, prompt, marker):
    row = EXAMPLES["prompt, chosen, rejected: strings"]
    _, line = loaded(config, tokenizer, [row, row | {"prompt": prompt}], True)
    assert (
        f"WARNING: 1 prompts hold a rendered template, which is rendered again (first: {config.path}#1: {marker})"
        in line
    )


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>\n", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>"])
def test_an_answer_that_another_template_ended_is_said(tokenizer, config, end):
    """The tokenizer's own end token, <|end_of_text|>, drops its row; others are text that is learned."""
    row = EXAMPLES["prompt, chosen, rejected: strings"]
    inside = row | {"rejected": f"a {end} b"}
    _, line = loaded(config, tokenizer, [row, inside, row | {"chosen": f"yes{end}"}], True)
    problem = "WARNING: 1 answers end in an end token that is not this template's"
    assert f"{problem} (first: {config.path}#2: {end.strip()})" in line


def test_empty_answers_and_duplicates_are_counted(tokenizer, config):
    row = {"prompt": "Same", "chosen": "a", "rejected": "b"}
    rows = [row, row, row, row | {"prompt": "Empty", "chosen": ""}, row | {"prompt": "Other"}]
    (chosen, _), line = loaded(config, tokenizer, rows, True)
    assert len(chosen) == 5 and line.endswith("; 1 empty answer, 2 duplicates")
    config.data = {str(config.path): 2.0}  # the repeats that an amount asks for are none
    assert loaded(config, tokenizer, rows, True)[1].endswith("; 2 empty answers, 4 duplicates")


def split_eos(folder):
    """A tokenizer whose EOS is one id by itself, and split inside text: it was added as normalized, and
    spaces are rewritten.
    """
    characters = sorted(set("▁</s>|abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n"))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        character: i + 3 for i, character in enumerate(characters)
    }
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens([tokenizers.AddedToken(token, normalized=True) for token in ("<s>", "</s>")])
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize("template", ["tulu", "zephyr"])
def test_an_eos_that_is_split_inside_text_is_refused_before_anything_is_read(tmp_path, config, template):
    config.template, config.data = template, {"missing.jsonl": 1.0}
    problem = rf"template='{template}': tokenizer {tmp_path} splits </s> inside text; expected every answer to end in id 2"
    with pytest.raises(UserError, match=problem):
        data.load_sft(config, split_eos(tmp_path))


# ---------------------------------------------------------------------------------------------------------------- sources


def test_a_file_replaced_by_one_of_equal_size_and_time_is_read_anew(tokenizer, config):
    first, _ = data.load_sft(config, tokenizer)
    times = config.path.stat()
    config.write(chat("Hi 19", "you 93"))
    os.utime(config.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (config.path.stat().st_size, config.path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert contents(data.load_sft(config, tokenizer)[0])[-1] != contents(first)[-1]


def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, config, monkeypatch):
    tokenise = data._tokenise

    def change(*args):
        config.write(chat("Hi 19", "another"))
        return tokenise(*args)

    monkeypatch.setattr(data, "_tokenise", change)
    with pytest.raises(UserError, match="chats.jsonl': changed while it was read"):
        data.load_sft(config, tokenizer)
    assert not list(config.cache_dir.glob("*/"))


def test_local_data_leaves_nothing_in_the_librarys_cache(datasets, tokenizer, config, tmp_path):
    with gzip.open(tmp_path / "chats.jsonl.gz", "wt") as file:
        file.write(config.path.read_text())
    datasets.Dataset.from_list([{"messages": HELLO}] * 3).to_parquet(tmp_path / "a.parquet")
    config.data = {str(tmp_path / name): 1.0 for name in ("chats.jsonl", "chats.jsonl.gz", "a.parquet")}
    lines = []
    assert len(data.load_sft(config, tokenizer, lines.append)[0]) == 83
    assert not (tmp_path / "datasets_cache").exists() and len(list(config.cache_dir.iterdir())) == 1
    size = config.path.stat().st_size
    assert (
        lines[0]
        == f"data: {tmp_path}/chats.jsonl.gz: unpacked into {config.cache_dir} while this process runs: {size:,} bytes"
    )
    lines.clear()
    data.load_sft(config, tokenizer, lines.append)
    assert len(lines) == 1, "the second time nothing is unpacked"


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "parquet"])
def test_folders_and_patterns_are_read_whole_in_order(datasets, tmp_path, kind):
    rows = [{"prompt": f"Hi {i}"} for i in range(6)]
    for i in range(3):
        part = rows[2 * i : 2 * i + 2]
        path = tmp_path / f"part-{i}.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(part).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "README.md").write_text("Hi")
    for name in (
        f"{tmp_path}",
        f"{tmp_path}/part-*.{kind}",
        f"{tmp_path.parent}/{tmp_path.name}/**/*.{kind}",
    ):
        read = open_source(name)
        assert list(read) == rows and read.read([5, 0, 3]) == [rows[5], rows[0], rows[3]]
    assert read.where(3) == f"row 3 (part-1.{kind}, row 1)"
    with pytest.raises(UserError, match="files none; expected one or more"):
        open_source(f"{tmp_path}/nothing-*.{kind}")


def test_the_splits_of_a_folder_are_not_mixed(tmp_path):
    for i, name in enumerate(("train-0", "train-1", "test")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"i": i}) + "\n")
    assert open_source(f"{tmp_path}")["i"] == [0, 1] and open_source(f"{tmp_path}[test]")["i"] == [2]
    with pytest.raises(
        UserError, match=r"files begin with test, train; expected \[split\] to be one of these"
    ):
        open_source(f"{tmp_path}[dev]")
    (tmp_path / "train-1.csv").write_text("i\n1\n")
    with pytest.raises(
        UserError, match="train-0.jsonl, train-1.csv, train-1.jsonl; expected one or more, all of one kind"
    ):
        open_source(f"{tmp_path}")


BAD = {  # file: (its content, the row that is named)
    "a.jsonl": (b'{"a": 1}\n\n{"a": 2}\n{"a": ', 2),
    "b.jsonl": (b'{"a": 1}\n[1]\n', 1),
    "c.json": (b'[{"a": 1}, {"a": 2}, {"a": 3]', 2),
    "d.json": (b'[{"a": 1}, {"a": 2} {"a": 3}]', 1),
    "e.json": (b'[{"a": 1}]\n[{"a": 1}]', 1),
    "f.csv": (b'a,b\n1,2\n"1\n2",3\n4\n', 2),
    "g.csv": (b'a,b\n1,2\n3,"4\n', 1),
    "h.jsonl": (b'{"a": 1}\n' + b"[" * 100_000 + b"\n", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_read_is_named_by_its_own_number(tmp_path, name):
    content, row = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^data '{tmp_path}/{name}', row {row}: [^\n]+$"):
        list(open_source(str(tmp_path / name)))


BROKEN = {"a.parquet": b"PAR1 no", "b.jsonl.gz": b"no gzip", "c.json.gz": gzip.compress(b"[]" * 99)[:20], "d.csv": b"a,a\n1,2\n",
          "e.csv.gz": gzip.compress(b"a\n" * 99)[:-20] + b"no" * 6, "f.csv": b"prompt;answer\na, b;c\n", "g.csv": b"a\tb\n1\t2\n"}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=f"^data '{tmp_path}/{name}': not a [^\n]+$"):
        open_source(str(tmp_path / name))


def test_a_torn_saved_data_set_is_named_in_one_line(datasets, tmp_path):
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match=f"^data '{tmp_path}/saved': not a saved data set: [^\n]+$"):
        open_source(f"{tmp_path}/saved")


def test_columns_that_are_not_needed_may_hold_anything(tmp_path):
    """A type that changes late, a key that appears late, an id that is a number and then text: pyarrow
    refuses all three.
    """
    rows = [
        {"id": i if i < 4 else "five", "prompt": f"Q{i}", "score": None if i < 5 else 0.5} for i in range(8)
    ]
    rows[7] |= {"source": [{"a": 1}]}
    rows[3]["score"] = []
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    assert list(open_source(f"{tmp_path}/a.jsonl")) == list(open_source(f"{tmp_path}/b.json")) == rows


def test_cells_of_a_csv_are_text_as_written(tmp_path):
    cells = ["007", "1e5", "True", " a ", 'say ""Hi""', "two\nlines", "a\r\nb", "\u2028", "é,"]
    (tmp_path / "a.csv").write_bytes(
        ("\ufeffid,text\r\n" + "".join(f'{i},"{cell}"\r\n' for i, cell in enumerate(cells))).encode()
    )
    read = open_source(f"{tmp_path}/a.csv")
    assert read["text"] == [cell.replace('""', '"') for cell in cells] and read["id"] == [*"012345678"]


@pytest.mark.parametrize("name", ["a.json", "b.jsonl", "c.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    rows = [{"prompt": "é"}, {"prompt": "\U0001f600"}]
    text = (
        json.dumps(rows, ensure_ascii=False)
        if name == "a.json"
        else "".join(json.dumps(row) + "\r\n" for row in rows)
    )
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(open_source(f"{tmp_path}/{name}")) == rows


@pytest.mark.parametrize("rule", ["first", "shuffle"])
def test_rows_picked_as_open_instruct_did_before(datasets, tokenizer, config, rule):
    """first: dataset.select(range(n)); shuffle: dataset.shuffle(seed=42) before it."""
    numbered = datasets.Dataset.from_dict({"row": list(range(40))})
    if rule == "shuffle":
        numbered = numbered.shuffle(seed=42)
    config.data, config.rows = {str(config.path): 0.3}, rule
    documents, _ = data.load_sft(config, tokenizer)
    assert [int(row_id.split("#")[1]) for row_id in documents.row_ids] == numbered.select(range(12))["row"]
    with pytest.raises(UserError, match=f"rows='{rule}': 41 of 40 rows; expected at most all of them"):
        data.mixture_rows(40, 41, rule)


def test_scratch_folders_of_processes_that_ended_are_removed(tokenizer, config):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname()
    names = {
        "dead": f".tmp_{here}_{ended.pid}_abc",
        "alive": f".tmp_{here}_{os.getpid()}_abc",
        "elsewhere": f".tmp_another_{ended.pid}_abc",
    }
    for name in names.values():
        (config.cache_dir / name).mkdir(parents=True)
    data.load_sft(config, tokenizer)
    assert {path.name for path in config.cache_dir.glob(".*")} == {names["alive"], names["elsewhere"]}


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for i, body in enumerate(("return 1", '"""One."""\n    return 1  # one', "return 2")):
        (tmp_path / f"code_{i}.py").write_text(f"def f():\n    {body}\n")
        hashes.append(token_cache.hash_code([importlib.import_module(f"code_{i}")]))
    assert hashes[0] == hashes[1] != hashes[2]


# ---------------------------------------------------------------------------------------------------------------- fuzz

TEXTS = st.one_of(
    st.sampled_from(
        [
            "Hi",
            "yo",
            "",
            " ",
            "\n",
            "<|end_of_text|>",
            "\n\nHuman: a\n\nAssistant: b",
            "\ud83d",
            "\u2028",
            '"',
            ",",
            "\x00",
        ]
    ),
    st.text(max_size=6),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXTS | VALUES},
    optional={key: VALUES for key in ("weight", "train", "tool_calls", "name")},
)
COLUMN = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "system",
        "history",
        "tools",
        "weight",
        "id",
        "input",
        "completion",
    ]
)


@st.composite
def source_files(draw):
    """(name, bytes) of a data file: rows like an example's, some of them changed, and sometimes bytes that
    are damaged.
    """
    example = EXAMPLES[draw(st.sampled_from(list(EXAMPLES)))]
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        row = dict(example)
        for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
            column = draw(st.sampled_from(list(example)) | COLUMN)
            row[column] = draw(VALUES | TEXTS | st.lists(TURNS, max_size=3))
        rows.append(row)
    suffix = draw(st.sampled_from(["jsonl", "json", "csv", "jsonl.gz"]))
    if suffix == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, list(example), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue().encode(errors="replace")
    else:
        lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
        text = "[" + ", ".join(lines) + "]" if suffix == "json" else "\n".join(lines)
        content = text.encode(errors="replace" if draw(st.booleans()) else "surrogatepass")
    damage = draw(st.integers(0, 5))
    if damage == 1:
        content = content[: draw(st.integers(0, len(content)))]
    elif damage == 2:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + 1 :]
    if suffix.endswith("gz"):
        content = gzip.compress(content)
        content = content[: len(content) - draw(st.sampled_from([0, 0, 0, 1, 9]))]
    return f"a.{suffix}", content


def check_file(tokenizer, folder, name, content, load):
    """Rows are kept, dropped and counted, or the file is refused in one line that names it. Returns what
    happened, and the rows kept.
    """
    (folder / name).write_bytes(content)
    options = dict(
        data_eval=None, template="tulu", max_seq_len=64, supervise="all", rows="choice", share_prefix=True
    )
    config = SimpleNamespace(data={str(folder / name): 1.0}, cache_dir=folder / "cache", **options)
    lines = []
    try:
        documents, _ = load(config, tokenizer, lines.append)
    except UserError as error:
        message = str(error)
        assert message.startswith("data") and "\n" not in message, message
        assert str(folder / name) in message or message.startswith("data: "), (
            message
        )  # the latter: of the whole mixture
        return "refused", 0
    rows = len(open_source(str(folder / name), log=lines.append))
    counts = [
        int(count)
        for count in re.findall(
            r"(\d+) (?:rows:|train|dropped)", lines[-2] if name.endswith("gz") else lines[-1]
        )
    ]
    assert counts[0] == rows == sum(counts[1:]) and counts[1] == len(documents)
    return "read", len(documents)


@pytest.mark.slow
@settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(source_files(), st.sampled_from([data.load_sft, data.load_preferences]))
def test_whatever_is_in_a_file_rows_are_counted_or_it_is_refused_by_name(
    tokenizer, tmp_path_factory, file, load
):
    check_file(tokenizer, tmp_path_factory.mktemp("fuzz"), *file, load)
