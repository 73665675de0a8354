"""Passes without a backward on the 8B shape, beside transformers.

`python bench/forward.py reference_pass|extract` (one GPU, a minute).

reference_pass: log-probs of 2 x 250 answer tokens behind one prompt of 250 tokens, pairs/s. The peer pads
nothing here (all rows are 500 tokens long) and does what TRL's trainer does: the prompt twice, logits of all
positions, log-softmax, gather. extract: every layer's last and mean state of 512-token documents, tokens/s.
The peer keeps all hidden states of a batch and pools them. Weights are random, made on the device; both sides
run the same ones, in bf16, and their results are compared. Appends to results.jsonl.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.steering import POOLINGS, read_states
from bench.clocks import Clocks
from bench.record import append
from data import Documents, Pairs
from model import Llama, LlamaConfig, apply_fused
from packing import pack
from train_dpo import answer_logps

PROMPT, ANSWER, PAIRS = 250, 250, 16
DOCUMENTS, LENGTH = 32, 512


def models():
    """Our model and transformers' with the same random weights."""
    config = LlamaConfig.preset("llama-3.1-8b")
    with torch.device("cuda"):
        torch.manual_seed(0)
        peer = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig.from_dict(config.to_hf()),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        ).eval()
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model.load_state_dict(peer.state_dict(), assign=True)  # the same tensors: one copy on the device
    apply_fused(model)
    return model, peer


def rate(work, amount, seconds):
    """(amount / median time of work(), after two calls to warm up; clocks)."""
    times, end = [], time.perf_counter() + seconds
    with Clocks() as clocks:
        while len(times) < 5 or time.perf_counter() < end:
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return amount / statistics.median(times[2:]), clocks.median()


def random_pairs(rng, n):
    """n pairs whose sides share a prompt."""
    prompts = rng.integers(1000, 100_000, (n, PROMPT))

    def side():
        ids = np.concatenate([prompts, rng.integers(1000, 100_000, (n, ANSWER))], axis=1).astype(np.int32)
        mask = np.tile(np.arange(PROMPT + ANSWER) >= PROMPT, n)
        return Documents(ids.ravel(), mask, np.arange(n + 1) * (PROMPT + ANSWER), np.arange(n).astype(str))

    return Pairs(side(), side())


def reference_pass(model, peer, seconds):
    """((our pairs/s, clocks), (the peer's, clocks), largest difference in nats per token)."""
    pairs = random_pairs(np.random.default_rng(0), PAIRS)
    batch = pairs.pack(np.arange(PAIRS)).to("cuda")
    both = np.concatenate([pairs.chosen.input_ids, pairs.rejected.input_ids])
    ids = torch.from_numpy(both.reshape(2 * PAIRS, -1).astype(np.int64)).cuda()

    def theirs():
        logits = peer(input_ids=ids).logits[:, PROMPT - 1 : -1].float()
        return logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None]).squeeze(2).sum(1).view(2, -1)

    gap = ((answer_logps(model, batch, PAIRS)[0] - theirs()) / ANSWER).abs().max().item()
    return rate(lambda: answer_logps(model, batch, PAIRS), PAIRS, seconds), rate(theirs, PAIRS, seconds), gap


def extract(model, peer, seconds):
    """((our tokens/s, clocks), (the peer's, clocks), largest relative difference of a pooled state)."""
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(1000, 100_000, LENGTH).astype(np.int32), np.ones(LENGTH, bool))
        for _ in range(DOCUMENTS)
    ]
    batch = pack(documents).to("cuda")
    ids = torch.from_numpy(np.stack([ids for ids, _ in documents]).astype(np.int64)).cuda()

    def theirs():
        states = peer.model(input_ids=ids, output_hidden_states=True).hidden_states[1:]
        return {
            "last": torch.stack([s[:, -1].float() for s in states], 1),
            "mean": torch.stack([s.float().mean(1) for s in states], 1),
        }

    ours, expected = read_states(model, batch), theirs()
    gaps = []
    for mine, name in zip(
        ours[:, :, :-1], POOLINGS, strict=True
    ):  # the peer's last layer is behind the final norm
        gaps.append(((mine - expected[name][:, :-1]).norm() / mine.norm()).item())
    tokens = DOCUMENTS * LENGTH
    return rate(lambda: read_states(model, batch), tokens, seconds), rate(theirs, tokens, seconds), max(gaps)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("reference_pass", "extract"), nargs="+")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="another jsonl file than bench/results.jsonl")
    args = parser.parse_args()
    model, peer = models()
    for name in args.name:
        measure, unit = {"reference_pass": (reference_pass, "pairs/s"), "extract": (extract, "tokens/s")}[
            name
        ]
        (ours, our_clocks), (theirs, their_clocks), gap = measure(model, peer, args.seconds)
        print(
            f"{name}: {ours:,.1f} {unit}, transformers {theirs:,.1f} ({ours / theirs:.2f}x); largest "
            f"difference {gap:.4f}"
        )
        assert gap < 0.1, gap
        peer_of = (f"transformers {transformers.__version__}", theirs, ours / theirs)
        about = (
            torch.cuda.get_device_name(),
            1,
            torch.__version__,
            f"bench/forward.py {name}",
            f"{our_clocks}; {their_clocks}",
        )
        append(name, ours, unit, peer_of, *about, path=args.out)


if __name__ == "__main__":
    main()
