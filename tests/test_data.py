"""Exact ids and masks of literal conversations, transformers as oracle for the templates, and the way from rows to columns of tokens."""

import dataclasses
import gzip
import json
import random
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from data import Documents, Pairs, encode_chat
from plumbing.files import progress_bar
from plumbing.tokenizer import Tokenizer

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
# Pairs merged into one token, first to last: Ċ is a newline and Ġ a space in byte-level BPE.
MERGES = ["< |", "| >", "u s", "e r", "us er", "a s", "as s", "i s", "is t", "ass ist", "a n", "an t", "assist ant", "s y", "s t", "sy st",
          "e m", "syst em", "H i", "Ċ Ċ", "y o", "Ġ yo", "Ġyo u"]  # fmt: skip

repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def write_tokenizer(folder, special=SPECIAL, **config):
    """A byte-level BPE made by hand: ids 0-6 are SPECIAL, 7-262 the 256 bytes, 263-285 the results of MERGES in their order."""
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    core = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, [tuple(merge.split()) for merge in MERGES]))
    words = pre_tokenizers.Split(" ", "merged_with_next")
    core.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])  # as in Llama 3: both would harm a mask
    core.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|end_of_text|>"}  # names come in both forms
    names = {"bos_token": "<|begin_of_text|>", "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def chat(*contents, system=None):
    """user, assistant, user, ... after an optional system message."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def supervised(encoded):
    return [i for i, keep in zip(*encoded) if keep]


# ---------------------------------------------------------------------------------------------------------------- ids and masks


def test_the_tokenizer_reads_special_tokens_and_adds_none(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 286)
    # Hi, eot, " you": no BOS although the file's post-processor asks for one
    assert tokenizer.encode("Hi<|eot_id|> you") == [281, 4, 285]
    assert tokenizer.decode([281, 4, 285]) == "Hi<|eot_id|> you"


def test_a_padding_token_is_not_asked_for(tmp_path):
    """Nothing is padded here, and some models name one that tokenizer.json lacks."""
    assert write_tokenizer(tmp_path, pad_token="<pad>").eos_id == 1


@pytest.mark.parametrize("changes, eos", [({}, "<|eot_id|>"), ({"added_tokens_decoder": {}}, "<|end_of_text|>")], ids=["old", "new"])
def test_two_files_that_name_another_eos(tmp_path, changes, eos):
    """The one that transformers takes, whose chat template the exported model runs with."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, **changes)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}))
    assert Tokenizer.from_dir(tmp_path).eos_token == AutoTokenizer.from_pretrained(tmp_path).eos_token == eos


# The conversation of the next test: system "u", user "Hi", assistant " you", user "Hi", assistant "\nHi". A tuple is supervised.
# Ids: 263 <|  264 |>  280 system  267 user  275 assistant  205 newline  282 two newlines  91 u  281 Hi  285 " you"  283 yo
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
}  # fmt: skip


@pytest.mark.parametrize("template", LITERAL)
def test_literal_ids_and_masks(tokenizer, template):
    messages = chat("Hi", " you", "Hi", "\nHi", system="u")
    groups = [group if isinstance(group, tuple) else (group,) for group in LITERAL[template]]
    ids, mask = encode_chat(messages, tokenizer, template, 100)
    assert ids == [i for group in groups for i in group]
    assert mask == [isinstance(group, tuple) for group in LITERAL[template] for _ in (group if isinstance(group, tuple) else [0])]
    last = max(i for i, group in enumerate(LITERAL[template]) if isinstance(group, tuple))
    assert supervised(encode_chat(messages, tokenizer, template, 100, supervise="last")) == list(LITERAL[template][last])


def test_truncation_cuts_ids_and_mask_from_the_right(tokenizer):
    ids, mask = encode_chat(chat("Hi", "Hi you"), tokenizer, "tulu", 100)
    assert (ids[-3:], mask[-3:]) == ([281, 285, 1], [True] * 3)
    assert encode_chat(chat("Hi", "Hi you"), tokenizer, "tulu", len(ids) - 1) == (ids[:-1], mask[:-1])


@repeatable
@given(st.lists(st.text(max_size=20), min_size=1, max_size=3), st.text(max_size=20), st.sampled_from(list(data.TEMPLATES)))
def test_supervised_ids_decode_to_the_answers_and_their_end_of_turn(tokenizer, answers, prompt, template):
    messages = [message for answer in answers for message in chat(prompt, answer)]
    text, spans = data.render(messages, template, tokenizer)
    (encoding,) = tokenizer.encode_batch([text])
    eos = data.end_of_turn(template, tokenizer)
    for answer, span in zip(answers, spans):
        ids, mask, straddling = data.ids_and_mask(encoding, [span], tokenizer, "all")
        expected = (answer.strip() if template == "llama3" else answer) + eos
        assert tokenizer.decode(ids[mask]) == "\n" * straddling + expected
        assert straddling == (template != "llama3" and answer.startswith("\n"))


PIECES = ["Hi", " ", "  ", "\n", "\n\n", "\t", "e\u0301", "\ufb01", "\u00a0", "\u200b", "\x00", "😀", "👨‍👩‍👧", "日本", "▁"]
PIECES += ["<|user|>", "<|im_end|>", "<s>", "</s>"]
MASKED = {  # transformers' own way to say which characters are the assistant's
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
}


def write_other_tokenizer(folder, kind):
    """What Llama 2, Mistral and Zephyr have (spaces as ▁, bytes for unknown characters); a Unigram; a normaliser that drops characters."""
    special, text = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"], ["Hi there\n\nuser assistant e\u0301 日本 system |> <|"] * 9
    if kind == "llama 2":
        byte_ids = {f"<0x{byte:02X}>": byte + 5 for byte in range(256)}
        vocabulary = {word: i for i, word in enumerate(special)} | byte_ids | {"▁": 261, "H": 262, "i": 263, "Hi": 264, "▁▁": 265}
        core = tokenizers.Tokenizer(models.BPE(vocabulary, [("H", "i"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.add_special_tokens(special)
    elif kind == "unigram":
        core = tokenizers.Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.train_from_iterator(
            text, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
        )
    else:
        core = tokenizers.Tokenizer(models.BPE())
        core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, alphabet = decoders.ByteLevel(), sorted(pre_tokenizers.ByteLevel.alphabet())
        core.train_from_iterator(text, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize("kind", ["llama 2", "unigram", "normaliser"])
def test_other_tokenizers_mask_what_transformers_masks(tmp_path, kind):
    """100 conversations of awkward pieces, special tokens among them: ids and mask."""
    from transformers import AutoTokenizer

    ours, theirs, rng = write_other_tokenizer(tmp_path, kind), AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    for template in MASKED:
        for _ in range(50):
            messages = chat(*("".join(rng.choices(PIECES, k=rng.randint(0, 6))) + "." for _ in range(rng.randint(2, 5))))
            out = theirs.apply_chat_template(messages, chat_template=MASKED[template], return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = encode_chat(messages, ours, template, 10_000)
            assert ids == out["input_ids"] and mask == [bool(keep) for keep in out["assistant_masks"]] and any(mask)


def test_an_answer_may_begin_with_a_character_that_the_tokenizer_drops(tmp_path):
    """No token has an accent that is stripped; transformers' mask ends at such an answer."""
    tokenizer = write_other_tokenizer(tmp_path, "normaliser")
    accented, plain = (encode_chat(chat("Hi", answer, "Hi", "Hi"), tokenizer, "zephyr", 100) for answer in ("\u0301Hi", "Hi"))
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


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", data.TEMPLATES)
def test_transformers_renders_the_exported_template_to_the_same_ids(tokenizer, tmp_path, template, name):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, data.TEMPLATES[template])
    oracle, messages = AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS[name]
    assert encode_chat(messages, tokenizer, template, 10_000)[0] == oracle.apply_chat_template(messages, return_dict=False)
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
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "message 1: role='assistant', content=NoneType"),
        (chat("Hi", "yo<|end_of_text|>"), "message 1: the answer already ends in <|end_of_text|>".replace("|", "\\|")),
    ],
)
def test_bad_messages_are_refused(tokenizer, messages, problem):
    with pytest.raises(ValueError, match=problem):
        encode_chat(messages, tokenizer, "tulu", 100)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path):
    plain = write_tokenizer(tmp_path / "plain", special=SPECIAL[:2])
    for template, token in (("llama3", "start_header_id"), ("chatml", "im_start")):
        with pytest.raises(
            ValueError, match=f"template='{template}': .*{token}.* is no special token of tokenizer .*plain; expected one id"
        ):
            encode_chat(chat("Hi", "yo"), plain, template, 100)
    nameless = write_tokenizer(tmp_path / "nameless", eos_token=None)
    with pytest.raises(ValueError, match="template='tulu': the BOS or EOS .* of tokenizer .*nameless"):
        encode_chat(chat("Hi", "yo"), nameless, "tulu", 100)


def test_template_none_is_the_tokenizers_own(tokenizer, tmp_path):
    for name, jinja in data.TEMPLATES.items():
        tokenizer.save(tmp_path / name, jinja)
        assert data.resolve_template(None, Tokenizer.from_dir(tmp_path / name)) == name
    with pytest.raises(ValueError, match="template=None: the chat template of .* is none of ours"):
        data.resolve_template(None, tokenizer)
    with pytest.raises(ValueError, match="template='tuluu': expected one of .*'tulu'"):
        data.resolve_template("tuluu", tokenizer)


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        Tokenizer.from_dir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- sources

PAIR = (chat("Hi", "yo"), chat("Hi", "no"))
PKU = {"prompt": "Hi", "response_0": "no", "response_1": "yo", "better_response_id": 0, "safer_response_id": 1}
ROWS = {  # one row of every schema that holds PAIR
    "message lists": {"prompt": "Hi", "chosen": PAIR[0], "rejected": PAIR[1]},
    "strings": {"prompt": "Hi", "chosen": "yo", "rejected": "no"},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: yo", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    "pku": PKU | {"is_response_0_safe": False, "is_response_1_safe": True},
    "pku pairs": {"response": ["yo", "no"], "prompt": "Hi"},
}


def converted(row, sides):
    columns, convert = data.find_schema("here", datasets.Dataset.from_list([row]), sides)
    assert set(columns) <= set(row)
    return convert(row)


@pytest.mark.parametrize("schema", ROWS)
def test_every_preference_schema_gives_the_same_pair(schema):
    assert converted(ROWS[schema], ("chosen", "rejected")) == list(PAIR)
    assert converted(ROWS[schema], ("messages",))[0] == PAIR[0]  # SFT on the chosen answers


def test_messages_come_first_for_sft_and_are_no_pair():
    both = ROWS["message lists"] | {"messages": chat("a", "b")}
    assert converted(both, ("messages",)) == [chat("a", "b")]
    assert converted(both, ("chosen", "rejected")) == list(PAIR)
    with pytest.raises(ValueError, match="'here': columns messages \\(list\\); expected one of: chosen, rejected"):
        converted({"messages": chat("a", "b")}, ("chosen", "rejected"))


@pytest.mark.parametrize("safe", [(True, True), (False, False), (None, True), (True, None)])
def test_pku_rows_without_exactly_one_safe_response_are_dropped(safe):
    row = PKU | {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    assert data._pku(row) == "for not exactly one safe response"


def test_a_transcript_of_several_turns():
    text = "\n\nHuman: a\n\nb\n\nAssistant: c: d\n\nHuman: e\n\nAssistant:"
    assert data._transcript(text) == chat("a\n\nb", "c: d", "e", "")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "Hi", "answer": "yo"}, "columns question \\(str\\), answer \\(str\\); expected one of: messages; chosen"),
        ({"prompt": chat("Hi"), "chosen": chat("Hi", "yo")[1:], "rejected": chat("Hi", "no")[1:]}, "columns prompt \\(list\\)"),
    ],
)
def test_unknown_columns_are_refused(row, problem):
    with pytest.raises(ValueError, match=f"data 'here': {problem}"):
        converted(row, ("messages",))


def test_every_file_format_gives_the_same_rows(tmp_path):
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
        assert data.open_source(str(tmp_path / name)).to_list() == rows, name
    assert data.open_source(f"{tmp_path}/splits[test]").to_list() == rows[2:]
    with pytest.raises(ValueError, match=r"splits\[dev\]': no split 'dev'; expected \[split\] to be one of train, test"):
        data.open_source(f"{tmp_path}/splits[dev]")
    with pytest.raises(ValueError, match=r"saved\[test\]': the folder has no splits; expected no \[split\]"):
        data.open_source(f"{tmp_path}/saved[test]")


@pytest.mark.parametrize("full_row", [0, 1])
def test_a_key_that_some_rows_lack_is_null_there(tmp_path, full_row):
    rows = [{"axiom": "a", "label": "safe"}] * 2
    rows[full_row] = rows[full_row] | {"text": "Hi"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        assert data.open_source(str(tmp_path / name)).to_list() == [{"text": None} | row for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet", "d.csv"])
def test_a_local_file_is_read_without_a_bar_and_what_comes_later_has_one(tmp_path, capfd, name):
    table = datasets.Dataset.from_list([{"prompt": "Hi", "chosen": "yo", "rejected": "no"}])
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[2:], table.to_json)(tmp_path / name)
    capfd.readouterr()  # writing has a bar of its own
    data.open_source(str(tmp_path / name))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("name", ["a*b.jsonl", "a[1]/b.jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    for i, path in enumerate((tmp_path / name, tmp_path / "aXb.jsonl")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"prompt": f"Hi {i}"}) + "\n")
    assert data.open_source(str(tmp_path / name)).to_list() == [{"prompt": "Hi 0"}]


@pytest.mark.parametrize("name", ["missing.jsonl", "/no/such/folder", "nowhere"])
def test_a_missing_source_is_named_and_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"data '{name}': no such file or folder"):
        data.open_source(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name in ("a.txt", "a.parquet.gz"):
        (tmp_path / name).write_text("Hi")
        with pytest.raises(ValueError, match=rf"{name}': expected a file of .*'.parquet', '.csv'\] \(or, but for parquet, .gz of one\)"):
            data.open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, name):
    rows = {"a.jsonl": '{"text": "a"}\n{"text": "é"}\n', "b.csv": "text\na\né\n"}
    (tmp_path / name).write_text(rows[name], encoding="latin-1")
    with pytest.raises(ValueError, match=f"data '{tmp_path}/{name}': no rows, or not a .{name[2:]} file: .*[Uu][Tt][Ff].?8"):
        data.open_source(str(tmp_path / name))


def test_only_an_empty_cell_of_a_csv_is_null(tmp_path):
    """pandas takes the answers "None", "NA", "null" and "nan" for missing ones unless told."""
    texts = ["None", "NA", "null", "nan", ""]
    (tmp_path / "a.csv").write_text("id,text,safe\n" + "".join(f"{i},{text},True\n" for i, text in enumerate(texts)) + "5,a,\n")
    rows = data.open_source(str(tmp_path / "a.csv"))
    assert rows["text"][:] == [*texts[:4], None, "a"]
    assert rows["id"][:] == [*range(6)] and rows["safe"][:] == [True] * 5 + [None]


# ---------------------------------------------------------------------------------------------------------------- mixtures


def test_mixtures_pick_the_rows_that_open_instruct_picks():
    n = 1005
    assert data.mixture_rows(n, 0.1).tolist() == np.random.RandomState(42).choice(n, int(0.1 * n), replace=False).tolist()
    assert data.mixture_rows(n, 0.1)[:3].tolist() == [926, 630, 682], "numpy's frozen stream"
    assert data.mixture_rows(n, 7).tolist() == np.random.RandomState(42).choice(n, 7, replace=False).tolist()
    assert data.mixture_rows(n, 1.0).tolist() == data.mixture_rows(n, n).tolist() == list(range(n))
    rest = np.random.RandomState(42).choice(n, int(2.5 * n) - 2 * n, replace=False).tolist()
    assert data.mixture_rows(n, 2.5).tolist() == data.mixture_rows(n, int(2.5 * n)).tolist() == [*range(n), *range(n), *rest]
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
    keys = dict(data={str(path): 1.0}, data_eval=None, template="tulu", max_seq_len=64, supervise="all", cache_dir=tmp_path / "cache")
    return SimpleNamespace(write=write, path=path, share_prefix=False, **keys)


def contents(documents):
    return [(documents[i][0].tolist(), documents[i][1].tolist(), str(documents.row_ids[i])) for i in range(len(documents))]


def test_documents_are_the_encoded_rows_in_order(tokenizer, config):
    config.data = {str(config.path): 0.5}
    documents, held_out = data.load_sft(config, tokenizer)
    rows = np.random.RandomState(42).choice(40, 20, replace=False)
    expected = [(*encode_chat(chat(f"Hi {i % 20}", f"you {i}"), tokenizer, "tulu", 64), f"{config.path}#{i}") for i in rows]
    assert contents(documents) == expected and held_out is None
    assert documents.lengths.tolist() == [len(ids) for ids, _, _ in expected]
    assert documents.num_targets.tolist() == [sum(mask[1:]) for _, mask, _ in expected]
    assert isinstance(documents.input_ids, np.memmap) and documents.input_ids.dtype == np.int32


def test_pairs_share_their_rows_and_are_cut_each_by_itself(tokenizer, config):
    long = "\n\nHuman: Hi\n\nAssistant: " + "you " * 60
    config.path.write_text(json.dumps(ROWS["transcripts"]) + "\n" + json.dumps(ROWS["transcripts"] | {"rejected": long}) + "\n")
    lines = []
    pairs, _ = data.load_preferences(config, tokenizer, lines.append)
    chosen, rejected = encode_chat(PAIR[0], tokenizer, "tulu", 64), encode_chat(PAIR[1], tokenizer, "tulu", 64)
    assert contents(pairs.chosen) == [(*chosen, f"{config.path}#{i}") for i in range(2)]
    assert pairs.rejected.lengths.tolist() == [len(rejected[0]), 64] and (pairs.row_ids == pairs.rejected.row_ids).all()
    assert pairs.lengths.tolist() == [len(chosen[0]) + len(rejected[0]), len(chosen[0]) + 64]
    assert lines[-1].startswith("data: 2 rows: 2 train, 0 dropped;") and lines[-1].endswith("1 conversations truncated")


@pytest.mark.parametrize("at", [0, 1])
def test_messages_may_have_keys_that_others_lack(tokenizer, config, at):
    expected = contents(data.load_sft(config, tokenizer)[0])
    rows = [json.loads(line) for line in config.path.read_text().splitlines()]
    rows[at]["messages"][1] |= {"weight": 1, "tool_calls": None}
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert contents(data.load_sft(config, tokenizer)[0]) == expected


def test_messages_stored_as_json_are_decoded(tokenizer, config, tmp_path):
    """As the datasets library stores lists of unlike structs."""
    column = datasets.Features({"messages": datasets.List(datasets.Json())})
    rows = [{"messages": chat("Hi", "yo")}, {"messages": [chat("Hi")[0], {"role": "assistant", "content": "no", "weight": 1}]}]
    datasets.Dataset.from_list(rows, features=column).save_to_disk(tmp_path / "saved")
    config.data = {str(tmp_path / "saved"): 1.0}
    documents, _ = data.load_sft(config, tokenizer)
    assert [ids for ids, _, _ in contents(documents)] == [encode_chat(messages, tokenizer, "tulu", 64)[0] for messages in PAIR]


def test_a_row_that_lacks_a_column_is_named(tokenizer, config):
    config.path.write_text(json.dumps(ROWS["strings"]) + "\n" + json.dumps({"prompt": "Hi", "chosen": "yo"}) + "\n")
    with pytest.raises(ValueError, match="row 1: message 1: role='assistant', content=NoneType"):
        data.load_preferences(config, tokenizer)


def test_rows_without_supervised_tokens_are_dropped_and_counted_by_reason(tokenizer, config):
    rows = [chat("Hi", "\nyo"), chat("Hi"), chat("Hi" * 100, "yo"), chat("u" * 100, "yo")]
    config.path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    lines = []
    documents, _ = data.load_sft(config, tokenizer, lines.append)
    assert [row_id.split("#")[1] for row_id in documents.row_ids] == ["0"]
    assert "4 rows: 1 train, 1 dropped without an assistant turn, 2 dropped without an answer in the first 64 tokens;" in lines[-1]
    assert lines[-1].endswith("1 tokens straddle header and answer (supervised)")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_which_one_side_has_no_answer_left_is_dropped(tokenizer, config, side):
    rows = [ROWS["message lists"], ROWS["message lists"] | {side: chat("u" * 100, "yo")}]
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    pairs, _ = data.load_preferences(config, tokenizer, lines.append)
    assert len(pairs) == 1 and "2 rows: 1 train, 1 dropped without an answer in the first 64 tokens;" in lines[-1]


@pytest.mark.parametrize("less, count", [(0, 0), (1, 1)])
def test_a_conversation_that_just_fits_is_not_truncated(tokenizer, config, less, count):
    config.path.write_text(json.dumps({"messages": PAIR[0]}) + "\n")
    config.max_seq_len, lines = len(encode_chat(PAIR[0], tokenizer, "tulu", 64)[0]) - less, []
    data.load_sft(config, tokenizer, lines.append)
    assert f"; {count} conversations truncated" in lines[-1]


def test_a_first_token_is_no_target():
    """5 6 7 and 8 9, all but 5 supervised: 6, 7 and 9 are predicted, 8 is first."""
    mask = np.array([False, True, True, True, True])
    assert Documents(np.arange(5, 10), mask, np.array([0, 3, 5]), np.array(["a", "b"])).num_targets.tolist() == [2, 1]


def test_nothing_or_everything_supervised_is_refused(tokenizer, config, monkeypatch):
    config.write(chat("Hi"))
    config.data = {str(config.path): 1.0}
    config.max_seq_len = 5
    with pytest.raises(
        ValueError, match="40 rows: 0 train, 39 dropped without an answer in the first 5 tokens, 1 dropped without an assistant turn"
    ):
        data.load_sft(config, tokenizer)
    config.max_seq_len, honest = 64, data.ids_and_mask
    monkeypatch.setattr(data, "ids_and_mask", lambda *args: (honest(*args)[0], np.ones_like(honest(*args)[1]), 0))
    with pytest.raises(ValueError, match="expected rows on every side, and some but not all of their tokens supervised"):
        data.load_sft(config, tokenizer)


def test_pairs_that_are_all_equal_are_refused(tokenizer, config):
    """Also those that max_seq_len makes equal: nothing could be learned from them, after a reference pass over all."""
    rows = [ROWS["strings"] | {"chosen": "yo u", "rejected": "yo"}] * 2
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(data.load_preferences(config, tokenizer)[0]) == 2
    config.max_seq_len = len(encode_chat(PAIR[0], tokenizer, "tulu", 64)[0]) - 1  # "yo" of both
    with pytest.raises(ValueError, match=r"2 pairs with two equal answers .*expected pairs of different answers \(cut at max_seq_len="):
        data.load_preferences(config, tokenizer)


def test_a_bad_row_is_named_by_source_and_number(tokenizer, config):
    config.write([{"role": "tool", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"data '.*chats.jsonl', row 39: message 0: role='tool'"):
        data.load_sft(config, tokenizer)
    for answers, count in ((["a", "b", "c"], 3), (None, 0)):
        rows = [ROWS["pku pairs"], {"prompt": "Hi", "response": answers}]
        config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=f"row 1: {count} answers; expected two"):
            data.load_preferences(config, tokenizer)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_prompt_that_an_answer_does_not_repeat_is_refused(tokenizer, config, side):
    rows = [ROWS["message lists"], ROWS["message lists"] | {side: chat("Hi", "yo")[1:]}]
    config.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"row 1: {side} has no user message; expected chosen and rejected to repeat the prompt"):
        data.load_preferences(config, tokenizer)


def test_a_source_of_which_no_row_is_left_is_refused(tokenizer, config, tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps({"messages": PAIR[0]}) + "\n")
    config.data |= {f"{tmp_path}/few.jsonl": 0.9}
    with pytest.raises(ValueError, match="data '.*few.jsonl': 0.9 of 1 rows is less than one; expected a larger fraction, or a count"):
        data.load_sft(config, tokenizer)


def test_rows_are_counted_without_a_progress_bar_too(tokenizer, config, monkeypatch):
    """TQDM_DISABLE=1 in the environment: tqdm counts nothing then."""
    monkeypatch.setattr(data, "progress_bar", lambda items=None, **options: progress_bar(items, **options | {"disable": True}))
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
CHANGES = ("content", "template", "max_seq_len", "supervise", "amount", "data_eval", *TOKENIZERS, "tokenizers' version", "code")


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
        monkeypatch.setattr(data, "TOKEN_CODE", b"another")
    else:
        setattr(config, changed, {"template": "zephyr", "max_seq_len": 63, "supervise": "last", "data_eval": 0.5}[changed])
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
        assert documents.row_ids.tolist() == [f"{config.path}#{i}" for i in np.random.RandomState(42).choice(n, 2, replace=False)]


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing", "no meta.json", "torn meta.json"])
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
    """While this one tokenises, another writes the same folder and maps it: that one stays, and both have the same documents."""
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
    with pytest.raises(OSError, match=rf"not written, [\d,]+ bytes needed, [\d,]+ free: 1074 requested.*: '{config.cache_dir}/"):
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


def test_held_out_data_can_be_another_mixture(tokenizer, config):
    config.data, config.data_eval = {str(config.path): 30}, {str(config.path): 3}
    train, held_out = data.load_sft(config, tokenizer)
    assert (len(train), len(held_out)) == (30, 3)


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
    assert dataclasses.replace(documents, row_ids=np.array(["b#0", "b#1"])).fingerprint == documents.fingerprint
    sides = ((documents, documents), (documents, others[0]), (others[0], documents))
    assert len({Pairs(*pair).fingerprint for pair in sides}) == 3
