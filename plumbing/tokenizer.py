"""A Hugging Face fast tokenizer without transformers."""

import hashlib
import json
from pathlib import Path

import tokenizers

from plumbing import kinds
from plumbing.files import UserError, parse_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)


# what may stand under the keys of tokenizer_config.json and special_tokens_map.json that are read
_TOKEN = kinds.TEXT | kinds.object_with({"content": kinds.TEXT}) | kinds.NULL
_TEMPLATE = kinds.object_with({"name": kinds.TEXT, "template": kinds.TEXT})
_KINDS = {
    "bos_token": _TOKEN,
    "eos_token": _TOKEN,
    "chat_template": kinds.TEXT | kinds.list_of(_TEMPLATE) | kinds.NULL,
}


def _text(token: dict | str | None) -> str | None:
    """A token of tokenizer_config.json, which writes it as text or as {"content": text, ..}."""
    return token["content"] if isinstance(token, dict) else token


def _read(content: bytes, source: str) -> dict:
    """The object in a tokenizer's JSON file. UserError naming it when it is torn or of the wrong types."""
    value = parse_json(content, source)
    kinds.check(source, value, _KINDS)
    return value


class Tokenizer:
    """A Hugging Face fast tokenizer without transformers: `tokenizer.json` runs, `tokenizer_config.json`
    names the special tokens.

    Never adds a token by itself; special-token strings inside the text are recognised, as transformers does
    with a rendered chat template.
    """

    def __init__(self, files: dict[str, bytes], origin: str):
        self.files, self.origin = files, origin
        config = _read(files["tokenizer_config.json"], f"{origin}/tokenizer_config.json")
        # As in transformers: without added_tokens_decoder, the other file's names come first.
        if "added_tokens_decoder" not in config and "special_tokens_map.json" in files:
            config |= _read(files["special_tokens_map.json"], f"{origin}/special_tokens_map.json")
        try:
            self.core = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except BaseException as error:  # the library has nothing narrower
            # A panic of its Rust code is no Exception, and has a name only.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            problem = f"{origin}/tokenizer.json: torn, or of a version that is not known here"
            raise UserError(f"{problem}: {error}") from error
        self.core.no_truncation()
        self.core.no_padding()
        # It would add BOS, and trims white space off the character offsets that the mask is made from.
        self.core.post_processor = None
        self.bos_token = _text(config.get("bos_token"))
        self.eos_token = _text(config.get("eos_token"))
        self.bos_id = self.single_id(self.bos_token)
        self.eos_id = self.single_id(self.eos_token)
        # Some ids below it may belong to no token.
        self.vocab_size = max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError(f"{origin}/tokenizer.json: no token; expected a vocabulary")
        self.fingerprint = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if "chat_template.jinja" in files:
            template = files["chat_template.jinja"].decode()
        self.chat_template = template

    @classmethod
    def from_dir(cls, folder) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder.

        ValueError when it has no tokenizer.json or no tokenizer_config.json.
        """
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if name not in files:
                needs = "expected a Hugging Face folder with a fast tokenizer"
                raise UserError(f"tokenizer: {folder / name} does not exist; {needs}")
        return cls(files, str(folder))

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """On all cores: the threads are the tokenizer's own, so no worker processes and nothing to fork."""
        return self.core.encode_batch(texts, add_special_tokens=False)

    def single_id(self, token: str | None) -> int | None:
        """The id of a special token; None without one.

        ValueError when the tokenizer does not read it as one.
        """
        if not token:
            return None
        ids = self.encode(token)
        if len(ids) != 1:
            raise UserError(
                f"tokenizer {self.origin}: {token} becomes {len(ids)} ids; expected a special token"
            )
        return ids[0]

    def decode(self, ids) -> str:
        return self.core.decode(list(ids), skip_special_tokens=False)

    def save(self, folder, chat_template: str | None = None) -> None:
        """Write the original files into `folder`, as AutoTokenizer reads them.

        With `chat_template` (Jinja, see TEMPLATES) where given.
        """
        files = dict(self.files)
        if chat_template is not None:  # in both places: older readers know only tokenizer_config.json
            config = json.loads(files["tokenizer_config.json"]) | {"chat_template": chat_template}
            files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
            files["chat_template.jinja"] = chat_template.encode()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
