"""Rows of the data formats that people have, as conversations.

A conversation is a list of {"role", "content"}, which data.py renders. Reading order: turns, context (system
and history), pairs, the table of schemas. docs/data.md has an example of every schema. A column or key that
carries meaning is used, or its row is refused. All other columns are named in the `data:` line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

from plumbing.files import UserError

# ---------------------------------------------------------------- turns

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TRAIN_KEYS = ("weight", "train", "trainable", "loss_mask")  # 0 or false: the turn is context, not a target
# No template here renders these. Without them an answer is trained that its context does not explain.
NOT_RENDERED = ("tools", "tool_calls", "functions", "function_call", "reasoning_content", "thinking")


def _turn(i: int, turn: dict) -> dict:
    """Turn i of a row as {"role", "content"}, and train=False where one of TRAIN_KEYS says so."""
    for key in NOT_RENDERED:
        if turn.get(key):
            raise UserError(
                f"message {i}: key {key!r}: no template here renders it; expected turns of text alone"
            )
    # Tables give every turn all keys, null where it has none.
    if turn.get("role") is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
    else:
        role, content = turn.get("role"), turn.get("content")
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    message = {"role": role, "content": _text(i, content)}
    for key in TRAIN_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        # A loss of single turns at other weights is another loss than the one that is documented.
        if isinstance(value, (list, dict, str)) or value not in (0, 1):
            raise UserError(
                f"message {i}: {key}={value!r}; expected 0 or 1 (one weight for all trained tokens)"
            )
        if value and role != "assistant":
            raise UserError(
                f"message {i}: {key}={value!r} on a turn of role {role!r}; expected it on answers only"
            )
        if not value and role == "assistant":
            message["train"] = False
    return message


def _text(i: int, content):
    """Content as one string where it is a list of text parts; anything else is for data.render to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"message {i}: a content part of type {kind!r}; expected text parts only")
        texts.append(part["text"])
    return "".join(texts)


def _turns(messages) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise UserError(f"messages={str(messages)[:60]!r}: expected a list of messages {{role, content}}")
    return [_turn(i, turn) for i, turn in enumerate(messages)]


def _exchange(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _transcript(text: str) -> list[dict]:
    """Messages of an hh-rlhf transcript: "\\n\\nHuman: ..\\n\\nAssistant: ..", contents stripped."""
    head, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if head.strip() or not turns:
        needs = "expected '\\n\\nHuman:' (answers alone need a column prompt beside them)"
        raise UserError(f"transcript begins {text[:40]!r}; {needs}")
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[who], "content": content.strip()} for who, content in zip(turns[::2], turns[1::2])]


# ---------------------------------------------------------------- context

SYSTEM = ("system", "system_prompt")
MEANINGFUL = (*SYSTEM, "history", *NOT_RENDERED, *TRAIN_KEYS)  # columns that are used, or refuse their row


def _context(row: dict) -> list[dict]:
    """The turns that the columns system and history put before a row's own."""
    turns = []
    systems = [row[column] for column in SYSTEM if row.get(column)]
    if systems:
        if len(set(map(str, systems))) > 1 or not isinstance(systems[0], str):
            raise UserError(f"columns {' and '.join(SYSTEM)}: expected one string")
        turns.append({"role": "system", "content": systems[0]})
    for exchange in row.get("history") or ():
        is_exchange = isinstance(exchange, list) and len(exchange) == 2
        if not is_exchange or not all(isinstance(text, str) for text in exchange):
            raise UserError(
                f"column 'history' holds {str(exchange)[:60]!r}; expected lists of [prompt, answer]"
            )
        turns += _exchange(*exchange)
    return turns


def _with_context(context: list[dict], messages: list[dict]) -> list[dict]:
    has_both = context and messages and context[0]["role"] == messages[0]["role"] == "system"
    if has_both and context[0]["content"] == messages[0]["content"]:
        return context + messages[1:]
    if has_both:
        raise UserError(
            "column 'system' and a system turn in the messages say different things; expected one"
        )
    return context + messages


# ---------------------------------------------------------------- pairs

ANOTHER_PROMPT = "for sides that answer different prompts"


def _pair(row: dict, prompt: str) -> list[list[dict]]:
    return [_exchange(prompt, row["chosen"]), _exchange(prompt, row["rejected"])]


def _dialogues(row: dict) -> list[list[dict]]:
    for side in ("chosen", "rejected"):
        turns = _turns(row[side])
        if row.get("prompt") and turns and not any(turn["role"] == "user" for turn in turns):
            raise UserError(f"{side} has no user message; expected chosen and rejected to repeat the prompt")
    return [row["chosen"], row["rejected"]]


def _continued(prompt: list, answer: list) -> list:
    """A conversation whose answer is only what follows the prompt (TRL), or repeats the prompt first."""
    return answer if answer[: len(prompt)] == prompt else prompt + answer


def _triple(row: dict) -> list[list[dict]] | str:
    prompt, sides = row["prompt"], []
    for side in (row["chosen"], row["rejected"]):
        whole = _continued(prompt, side)
        if whole is not side and _turns(side)[:1] and _turns(side)[0]["role"] != "assistant":
            return ANOTHER_PROMPT
        sides.append(whole)
    return sides


def _opening(messages: list[dict]) -> list[tuple]:
    """The turns before the first answer."""
    opening = []
    for message in messages:
        if message["role"] == "assistant":
            break
        opening.append((message["role"], message["content"]))
    return opening


def answer_one_prompt(row: dict, chosen: list[dict], rejected: list[dict]) -> bool:
    """Whether both sides open alike, and with the column `prompt` where it is a string.

    The column may hold any of the user's turns, or a whole transcript: one need only contain the other.
    """
    # Later turns may differ: some pairs of hh-rlhf part before their last answer.
    if _opening(chosen) != _opening(rejected):
        return False
    prompt = row.get("prompt")
    asked = [
        message["content"].strip()
        for message in chosen
        if message["role"] == "user" and isinstance(message["content"], str)
    ]
    if not isinstance(prompt, str) or not asked:
        return True
    return any(text in prompt or prompt.strip() in text for text in asked)


# ---------------------------------------------------------------- schemas


def _completion(row: dict) -> list[list[dict]]:
    if isinstance(row.get("label"), bool):  # TRL's unpaired preferences: half of the completions are bad ones
        raise UserError("column 'label': a rating of the completion; expected rows without one, or pairs")
    if isinstance(row["prompt"], list):
        return [_continued(row["prompt"], row["completion"])]
    return [_exchange(row["prompt"], row["completion"])]


def _instruction(row: dict) -> str:
    return row["instruction"] + ("\n" + row["input"] if row.get("input") else "")


def _pku(row: dict) -> list[list[dict]] | str:
    spelled = {
        True: True,
        False: False,
        "True": True,
        "False": False,
        "true": True,
        "false": False,
    }  # csv has text
    is_safe = [spelled.get(row["is_response_0_safe"]), spelled.get(row["is_response_1_safe"])]
    if set(is_safe) != {True, False}:  # a response without a label is neither
        return "for not exactly one safe response"
    first, second = row["response_0"], row["response_1"]
    chosen, rejected = (first, second) if is_safe[0] else (second, first)
    return [_exchange(row["prompt"], chosen), _exchange(row["prompt"], rejected)]


def _pku_pair(row: dict) -> list[list[dict]]:
    if len(row["response"]) != 2:
        raise UserError(f"{len(row['response'])} answers; expected two")
    return [_exchange(row["prompt"], answer) for answer in row["response"]]


@dataclass(frozen=True)
class Schema:
    """How rows with certain columns become conversations."""

    name: str
    columns: dict[str, type | tuple]  # the columns it needs, and the types of their values
    convert: Callable  # row -> [messages] or [chosen, rejected], or the reason to drop the row
    is_pair: bool = False
    optional: tuple = SYSTEM  # columns that are used where a row has them

    def fits(self, row: dict) -> bool:
        """Whether a row, the first of its source, has the columns."""
        return all(column in row and isinstance(row[column], kind) for column, kind in self.columns.items())

    def read(self, row: dict) -> list[list[dict]] | str:
        """[messages], or [chosen, rejected] of a pair, or the reason to drop the row.

        UserError names column or turn.
        """
        self._check_columns(row)
        conversations = self.convert(row)
        if isinstance(conversations, str):
            return conversations
        context = _context(row)
        return [_with_context(context, _turns(messages)) for messages in conversations]

    def ignored(self, columns) -> list[str]:
        """Those of `columns` that it does not read."""
        used = {*self.columns, *self.optional, *MEANINGFUL}
        return [column for column in columns if column not in used]

    def _check_columns(self, row: dict) -> None:
        for column, kind in self.columns.items():
            if not isinstance(row.get(column), kind):
                kinds = " or ".join(kind.__name__ for kind in (kind if isinstance(kind, tuple) else (kind,)))
                raise UserError(f"column {column!r} holds {type(row.get(column)).__name__}; expected {kinds}")
        for column in self.optional:
            if column in ("prompt", "input") and not isinstance(row.get(column), str | NoneType):
                raise UserError(f"column {column!r} holds {type(row[column]).__name__}; expected str")
        # Empty values are what a table holds for rows that have none.
        for column in MEANINGFUL:
            value = row.get(column)
            says_nothing = column in TRAIN_KEYS and not isinstance(value, list) and value in (1, "1", "True")
            if column not in self.optional and (value or value is False or value == 0) and not says_nothing:
                problem = f"column {column!r} is not read with {self.name!r}, and carries meaning"
                raise UserError(f"{problem}; expected rows without it")


FREE = (*SYSTEM, "history")  # where a row is one exchange, turns can be put before it
LABEL = (bool, str, NoneType)

# The first that fits the first row is used. For SFT, preference rows give their chosen side.
SCHEMAS = (
    Schema("messages", {"messages": list}, lambda row: [row["messages"]]),
    Schema("conversations: ShareGPT", {"conversations": list}, lambda row: [row["conversations"]]),
    Schema("prompt, completion: strings", {"prompt": str, "completion": str}, _completion, optional=FREE),
    Schema("prompt, completion: message lists", {"prompt": list, "completion": list}, _completion),
    Schema("instruction, input, output: Alpaca", {"instruction": str, "output": str},
           lambda row: [_exchange(_instruction(row), row["output"])], optional=("input", *FREE)),
    Schema("prompt, chosen, rejected: message lists", {"prompt": list, "chosen": list, "rejected": list},
           _triple, is_pair=True),
    Schema("chosen, rejected: message lists", {"chosen": list, "rejected": list}, _dialogues, is_pair=True,
           optional=("prompt", *SYSTEM)),
    Schema("prompt, chosen, rejected: strings", {"prompt": str, "chosen": str, "rejected": str},
           lambda row: _pair(row, row["prompt"]), is_pair=True, optional=FREE),
    Schema("question, chosen, rejected: Orca", {"question": str, "chosen": str, "rejected": str},
           lambda row: _pair(row, row["question"]), is_pair=True, optional=FREE),
    Schema("instruction, input, chosen, rejected", {"instruction": str, "chosen": str, "rejected": str},
           lambda row: _pair(row, _instruction(row)), is_pair=True, optional=("input", *FREE)),
    Schema("input, chosen, rejected", {"input": str, "chosen": str, "rejected": str},
           lambda row: _pair(row, row["input"]), is_pair=True, optional=FREE),
    Schema("chosen, rejected: hh-rlhf transcripts", {"chosen": str, "rejected": str},
           lambda row: [_transcript(row["chosen"]), _transcript(row["rejected"])], is_pair=True),
    Schema("prompt, response_0, response_1, is_response_0_safe, is_response_1_safe: PKU-SafeRLHF, "
           "rows where exactly one is safe",
           {"prompt": str, "response_0": str, "response_1": str,
            "is_response_0_safe": LABEL, "is_response_1_safe": LABEL},
           _pku, is_pair=True),
    # Which of the two is safer is inferred from their contents; no column says so.
    Schema("prompt, response: PKU-SafeRLHF pairs, the safer first", {"prompt": str, "response": list},
           _pku_pair, is_pair=True),
)  # fmt: skip


def in_one_line(column: str) -> str:
    """A column's name for a log: JSON allows newlines and terminal codes in it."""
    return column if column.isprintable() else ascii(column)


def find_schema(name: str, rows, sides: tuple[str, ...]) -> Schema:
    """The first of SCHEMAS that fits the first row; pairs only for two `sides`.

    UserError lists columns and schemas.
    """
    if len(rows) == 0:
        raise UserError(f"data {name!r}: no rows")
    known = [schema for schema in SCHEMAS if schema.is_pair or len(sides) == 1]
    # It decides for all rows: of a source with two formats, the others' rows are refused by number.
    first = rows[0]
    for schema in known:
        if schema.fits(first):
            return schema
    found = ", ".join(f"{in_one_line(column)} ({type(value).__name__})" for column, value in first.items())
    expected = "; ".join(schema.name for schema in known)
    raise UserError(f"data {name!r}: columns {found}; expected one of: {expected}")
