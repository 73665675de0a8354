"""The same rows and the same weights on both sides, for tools/diff_open_instruct.py."""

import copy
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import torch

from data import encode_chat
from families import load_pretrained
from formats import find_schema
from packing import pack
from plumbing.files import UserError
from plumbing.sources import open_source
from tools.agreement import call
from tools.checkout import NotFound
from train_dpo import answer_logps

TRANSFORM = {"sft": "sft_tulu_tokenize_and_truncate_v1", "dpo": "preference_tulu_tokenize_and_truncate_v1"}
TOKENIZERS = [
    "get_tokenizer_tulu_v2_2",
    "get_tokenizer_tulu_v2_1",
    "get_tokenizer_tulu_v1",
]  # the newest first
SCRIPT = {"sft": "finetune", "dpo": "dpo_tune_cache"}


def masks_of(documents):
    """The masks of [(ids, mask)]."""
    return [mask for _, mask in documents]


def by_side(documents, rows, size):
    """The documents of these rows, of `size` sides each: for dpo all chosen ones, then all rejected ones."""
    found = []
    for side in range(size):
        for row in rows:
            found.append(documents[row * size + side])
    return found


class Case:
    """Rows, tokenizers and models of both sides.

    `documents` are the rows' conversations, for dpo chosen and rejected in turn.
    """

    def __init__(self, args, checkout):
        self.args, self.checkout, self.stage = args, checkout, args.stage
        self.sides = ("messages",) if args.stage == "sft" else ("chosen", "rejected")
        source = open_source(args.data)
        schema = find_schema(args.data, source, self.sides)
        self.documents, self.dropped = [], 0
        for row in source.read(range(min(args.rows, len(source)))):
            conversations = schema.read(row)
            if isinstance(conversations, str):  # the reason why the schema drops the row
                self.dropped += 1
            else:
                self.documents += conversations[: len(self.sides)]
        self.model, self.tokenizer = load_pretrained(args.model)

    def name(self, i):
        """Document i in words."""
        row, side = divmod(i, len(self.sides))
        return f"row {row}, {self.sides[side]}"

    @cached_property
    def their_tokenizer(self):
        """Theirs, made by their function, with the template of --template."""
        names = dict(tokenizer_name_or_path=self.args.model, tokenizer_revision=None)
        # As they were called from January to March 2025.
        names |= dict(model_name_or_path=self.args.model, revision=None)
        settings = dict(
            trust_remote_code=False, use_fast=True, chat_template_name=self.args.template, add_bos=False
        )
        config = SimpleNamespace(**names, **settings)
        try:
            tokenizer = call(self.checkout.find(TOKENIZERS, ["dataset_transformation"]), config)
        except NotFound:  # before 2025 main() did it
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.args.model)
            templates = self.checkout.find(["CHAT_TEMPLATES"], ["dataset_processor"])
            tokenizer.chat_template = call(templates.__getitem__, self.args.template)  # may not have it
        # Transformers 5 returns a dict unless asked; code written for 4 does not ask.
        render = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = lambda *args, **kwargs: render(
            *args, **{"return_dict": False} | kwargs
        )
        return tokenizer

    @cached_property
    def their_rows(self):
        """[{(chosen_, rejected_)input_ids, labels, attention_mask}] as their transform makes them.

        Their lists or tensors.
        """
        try:
            transform = self.checkout.find(["TRANSFORM_FNS"], ["dataset_transformation"])[
                TRANSFORM[self.stage]
            ][0]
        except NotFound:  # before 2025
            transform = self.checkout.find([f"encode_{self.stage}_example"], [SCRIPT[self.stage]])
        size, documents = len(self.sides), self.documents
        rows = []
        for i in range(0, len(documents), size):
            row = dict(zip(self.sides, documents[i : i + size]))
            rows.append(call(transform, row, self.their_tokenizer, self.args.max_seq_len))
        return rows

    @cached_property
    def their_documents(self):
        """[(ids, mask)] as lists, in the order of `documents`; without a checkout, ours."""
        if self.checkout is None:
            return self.our_documents("all")
        prefixes = ("",) if self.stage == "sft" else ("chosen_", "rejected_")
        documents = []
        for row in self.their_rows:
            for prefix in prefixes:
                ids = torch.as_tensor(row[f"{prefix}input_ids"])
                labels = torch.as_tensor(row[f"{prefix}labels"])
                documents.append((ids.tolist(), (labels != -100).tolist()))
        return documents

    def our_documents(self, supervise):
        """[(ids, mask)] as lists, by `data.encode_chat`."""
        return [
            encode_chat(m, self.tokenizer, self.args.template, self.args.max_seq_len, supervise)
            for m in self.documents
        ]

    @cached_property
    def supervise(self):
        """The turns that theirs trains on: "last" only if that fits and "all" does not."""
        theirs = masks_of(self.their_documents)
        all_fits = masks_of(self.our_documents("all")) == theirs
        last_fits = masks_of(self.our_documents("last")) == theirs
        return "last" if last_fits and not all_fits else "all"

    @cached_property
    def kept(self):
        """Indices of the rows that can be trained on: every side has a supervised token, by their mask."""
        size, masks = len(self.sides), masks_of(self.their_documents)
        kept = []
        for row in range(len(masks) // size):
            if all(any(mask[1:]) for mask in masks[row * size : (row + 1) * size]):
                kept.append(row)
        if not kept:
            raise UserError(
                f"--rows {self.args.rows} --max-seq-len {self.args.max_seq_len}: no row has a supervised "
                "token; expected longer"
            )
        return kept

    @cached_property
    def their_model(self):
        """The same weights in transformers, fp32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)

    def packed(self, rows):
        """Our PackedBatch of *their* ids and masks; for dpo chosen, then rejected.

        So a number differs for its own reasons only.
        """
        documents = by_side(self.their_documents, rows, len(self.sides))
        return pack([(np.array(ids), np.array(mask)) for ids, mask in documents])

    @cached_property
    def padding_tokenizer(self):
        """Their tokenizer, padding with EOS.

        The row that open-instruct would add to the embeddings for its padding token is not in the weights.
        """
        tokenizer = copy.deepcopy(self.their_tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def reference(self):
        """(2, N) float32 summed log-probs for both sides.

        The policy's, shifted by noise per answer, so that pairs differ.
        """
        with torch.no_grad():
            policy, counts = answer_logps(self.model, self.packed(self.kept), len(self.kept))
        noise = np.random.RandomState(0).randn(*policy.shape).astype(np.float32)
        return policy + 0.1 * counts * torch.from_numpy(noise)
