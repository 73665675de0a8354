"""A tiny checkout with open-instruct's names and none of its code, whose agreement with ours is known:
`write(folder, *edits)`.
"""

from pathlib import Path

FILES = {
    "logger_utils": "import logging\n\ndef setup_logger(name):\n    return logging.getLogger(name)\n",
    "padding_free_collator": """
import a_library_that_nobody_has
import torch

def calculate_per_token_logps(logits: a_library_that_nobody_has.Tensor, labels):
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1))
    return torch.log_softmax(logits, dim=-1).gather(2, following.clamp(min=0)[..., None])[..., 0]
""",
    "dataset_transformation": """
import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer
from open_instruct import logger_utils
from open_instruct.padding_free_collator import a_library_that_nobody_has as unused

logger = logger_utils.setup_logger(__name__)
TURN = "{{ '<|' + m['role'] + '|>\\\\n' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
TULU = "{% for m in messages %}" + TURN + "{% if m['role'] != 'assistant' or not loop.last %}{{ '\\\\n' }}{% endif %}{% endfor %}"
TULU += "{% if add_generation_prompt %}{{ '<|assistant|>\\\\n' }}{% endif %}"

def get_tokenizer_tulu_v2_2(tc):
    tokenizer = AutoTokenizer.from_pretrained(tc.tokenizer_name_or_path)
    tokenizer.chat_template, tokenizer.pad_token = {"tulu": TULU}[tc.chat_template_name], tokenizer.eos_token
    return tokenizer

def encode(messages, tokenizer, limit):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            spans.append((start, len(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))))
    inside = [any(a < stop and start < b for start, stop in spans) for a, b in encoded["offset_mapping"]]
    labels = [token if keep else -100 for token, keep in zip(encoded["input_ids"], inside)]
    return {"input_ids": encoded["input_ids"][:limit], "labels": labels[:limit], "attention_mask": [1] * len(labels[:limit])}

def one(row, tokenizer, limit):
    logger.debug("one row")
    return encode(row["messages"], tokenizer, limit)

def pair(row, tokenizer, limit):
    return {f"{side}_{key}": value for side in ("chosen", "rejected") for key, value in encode(row[side], tokenizer, limit).items()}

TRANSFORM_FNS = {
    "sft_tulu_tokenize_and_truncate_v1": (one, "map"),
    "preference_tulu_tokenize_and_truncate_v1": (pair, "map"),
}

def sft_tulu_filter_v1(row, tokenizer):
    return max(row["labels"]) >= 0

def preference_tulu_filter_v1(row, tokenizer):
    return max(row["chosen_labels"]) >= 0 and max(row["rejected_labels"]) >= 0

class Source:
    def __init__(self, name, amount):
        rows = load_dataset(name)
        wanted = int(float(amount) * len(rows)) if "." in amount else int(amount)
        times, rest = divmod(wanted, len(rows))
        self.dataset = rows.select([*range(len(rows))] * times + np.random.RandomState(42).choice(len(rows), rest, replace=False).tolist())

def load_dataset_configs(mixer, splits, functions, arguments):
    return [Source(*mixer)]
""",
    "dpo_utils": """
from dataclasses import dataclass
import torch
from torch.nn.functional import logsigmoid, pad
from open_instruct import padding_free_collator
from open_instruct.padding_free_collator import calculate_per_token_logps

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return -logsigmoid(margin), None, None

def simpo_loss(chosen, rejected, beta, gamma_beta_ratio):
    return -logsigmoid(beta * (chosen - rejected) - beta * gamma_beta_ratio), None, None

@dataclass
class DataCollatorForSeq2SeqDPO:
    tokenizer: object
    model: object
    padding: str

    def __call__(self, features):
        length = max(len(row[f"{side}_labels"]) for row in features for side in ("chosen", "rejected"))
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {f"{side}_{key}": torch.tensor([row[f"{side}_{key}"] + [value] * (length - len(row[f"{side}_{key}"])) for row in features])
                for side in ("chosen", "rejected") for key, value in fill.items()}

def concatenated_forward(model, batch, average_log_prob=False):
    keys = ("input_ids", "labels", "attention_mask")
    ids, labels, mask = (torch.cat([batch[f"{side}_{key}"] for side in ("chosen", "rejected")]) for key in keys)
    taken = pad((labels != -100)[:, 1:], (0, 1))
    sums = (padding_free_collator.calculate_per_token_logps(model(input_ids=ids, attention_mask=mask).logits, labels) * taken).sum(dim=1)
    return *(sums / taken.sum(dim=1) if average_log_prob else sums).chunk(2), None
""",
    "utils": """
def get_optimizer_grouped_parameters(model, weight_decay):
    small = [p for name, p in model.named_parameters() if name.endswith(("norm.weight", "bias"))]
    large = [p for p in model.parameters() if not any(p is other for other in small)]
    return [{"params": large, "weight_decay": weight_decay}, {"params": small, "weight_decay": 0.0}]
""",
    "finetune": """
import a_library_that_nobody_has
from transformers import get_scheduler

def main(args, tc):
    lr_scheduler = get_scheduler(args.lr_scheduler_type, optimizer, int(args.warmup_ratio * num_training_steps_for_scheduler),
                                 num_training_steps_for_scheduler)
    for batch in a_library_that_nobody_has.batches():
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
""",
}
FILES["dpo_tune_cache"] = FILES["finetune"]


def write(folder, *edits):
    """The checkout in `folder`; edits are (file, old text, new text), each of which must apply."""
    files = dict(FILES)
    for name, old, new in edits:
        assert old in files[name], (name, old)
        files[name] = files[name].replace(old, new)
    package = Path(folder) / "open_instruct"
    package.mkdir(parents=True)
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return folder
