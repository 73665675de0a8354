"""The demo's base model.

A tokenizer and a Llama of 0.24 million weights, trained from nothing on the small world of demo/axioms.py.

The loop below is all that training a language model takes here: documents packed into one stream, a forward
pass, the log-probs of the next tokens, a step of AdamW. train_sft.py and train_dpo.py add what many GPUs,
restarts and preferences need.
"""

import dataclasses
import json
import time

import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

from kernels import token_logps
from model import Llama, LlamaConfig
from optim import learning_rate
from packing import pack, step_examples
from plumbing.tokenizer import Tokenizer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")  # one token each: the tulu template costs few tokens
# 5 special tokens, 256 bytes (so any text can be written), 379 merges: most of the words are one token
VOCAB_SIZE = 640


def train_tokenizer(texts):
    """A byte-level BPE of VOCAB_SIZE tokens learned from `texts`.

    It is the data.Tokenizer of a Hugging Face folder.
    """
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS, *ROLES],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    return Tokenizer(
        {
            "tokenizer.json": bpe.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        },
        "demo/tiny.py",
    )


def pretrain(texts, tokenizer, steps=600, batch_size=8, lr=1e-2, seed=0):
    """Train LlamaConfig.preset("tiny") to predict every next token of `texts`.

    Returns (model, [loss of each step, nats per token]).
    """
    documents = [encoding.ids + [tokenizer.eos_id] for encoding in tokenizer.encode_batch(texts)]
    model = Llama(dataclasses.replace(LlamaConfig.preset("tiny"), vocab_size=tokenizer.vocab_size))
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        chosen = [documents[i] for i in step_examples(step, len(documents), batch_size, seed)]
        batch = pack([(ids, [True] * len(ids)) for ids in chosen])
        hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)  # (T, D)
        # Of all but each document's last token.
        logps = token_logps(hidden[batch.supervised], model.lm_head.weight, batch.targets)
        loss = -logps.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, "cosine", warmup=20)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent, elapsed = sum(losses[-50:]) / 50, time.perf_counter() - start
            print(f"pretrain {step + 1:4}/{steps} | loss {recent:.3f} | {elapsed:5.1f} s", flush=True)
    return model, losses
