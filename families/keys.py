"""Reading a config.json whose keys are the fields of a dataclass: what Falcon and Gemma share."""

from pathlib import Path

from model import CONFIG_KINDS
from plumbing import kinds
from plumbing.files import read_config

# what may stand under the keys that are read
KINDS = CONFIG_KINDS | {
    "ffn_hidden_size": kinds.SIZE | kinds.NULL,
    "layer_norm_epsilon": kinds.NOT_NEGATIVE,
    "query_pre_attn_scalar": kinds.POSITIVE,
    "attn_logit_softcapping": kinds.POSITIVE | kinds.NULL,
    "final_logit_softcapping": kinds.POSITIVE | kinds.NULL,
    "layer_types": kinds.list_of(kinds.TEXT) | kinds.NULL,
}


def read_keys(cls, directory, fixed, required):
    """(values, problems, raw) of config.json in `directory`.

    values: those of the dataclass `cls`'s fields that the file has, lists as tuples. problems: every key with
    a value that is not the one in `fixed`, and every one of `required` that is missing.
    """
    raw = read_config(directory)
    given = {key: value for key, value in raw.items() if value is not None or key not in required}
    kinds.check(config_file(directory), given, KINDS)
    problems = []
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            problems.append(f"{key}={raw[key]!r}: expected {value!r}")
    if raw.get("model_type") != cls.model_type:
        problems.append(f"model_type={raw.get('model_type')!r}: expected {cls.model_type!r}")
    problems += [f"{key}: missing" for key in required if raw.get(key) is None]
    values = {}
    for key in cls.__dataclass_fields__.keys() & raw.keys():
        values[key] = tuple(raw[key]) if isinstance(raw[key], list) else raw[key]
    return values, problems, raw


def config_file(directory):
    """Path of the config.json, for messages."""
    return Path(directory) / "config.json"
