"""AQI sweep of the 8B shape: 7,000 prompts x 5 lambdas, here and the published way.

The published way is transformers, one full forward per lambda.

    python bench/world.py runs/bench --tokenizer FOLDER
    python bench/sweep.py runs/bench/base [--prompts 7000] [--nulls 99] [--out FILE.jsonl]

Both sides embed the same random-word prompts (mean 60 tokens) at the same five lambdas with the same
additions at the last five layers: mean over tokens of the final hidden state, bf16. Ours adds the bootstrap
of the verdict. The peer runs padded batches of 32 in data order.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.curves import bootstrap
from analysis.nulls import isotropic_directions, null_curves
from analysis.steering import additions, pool, steered_runs
from analysis.vector import plain_document
from analysis.verdict import judge
from bench.clocks import Clocks
from bench.record import append
from bench.world import tulu_like_lengths, words
from families import load_pretrained
from model import apply_fused

LAMBDAS = [0.0, 0.25, 0.5, 0.75, 1.0]
AXIOMS, BATCH = 7, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of --nulls: the sweep itself needs CUDA


def timed(work):
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return result, time.perf_counter() - start


def nulls(model, documents, add, label, axiom, args):
    """Time args.nulls random directions at lambda 1, beside as many forward passes over all prompts.

    One such pass is measured: the rest of them tell nothing more.
    """
    directions = isotropic_directions(add, args.nulls)
    axioms = [f"axiom {i}" for i in range(AXIOMS)]
    clocks = Clocks()
    if DEVICE == "cuda":
        clocks.start()
    curves, seconds = timed(
        lambda: null_curves(model, documents, directions, [0.0, 1.0], axiom, label, axioms, DEVICE)
    )
    clocks.stop()
    assert torch.isfinite(curves).all()
    _, one_pass = timed(lambda: [run.index for run in steered_runs(model, documents, add, [0.0], DEVICE)])
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    peer = (f"{args.nulls} forward passes, one measured", args.nulls * one_pass)
    print(f"{args.nulls} nulls of {args.prompts:,} prompts: {seconds:.1f} s; {peer[0]}: {peer[1]:.1f} s")
    append(
        f"aqi_nulls_{args.nulls}", seconds, "s", (*peer, peer[1] / seconds), hardware, 1, torch.__version__,
        f"bench/sweep.py {args.folder} --prompts {args.prompts} --nulls {args.nulls}", clocks.median(),
        path=args.out,
    )  # fmt: skip


def ours(model, documents, add, label, axiom):
    """(embeddings (K, n, D), seconds to embed, seconds of the verdict)."""

    def embed():
        out = torch.zeros(len(LAMBDAS), len(documents), model.config.hidden_size, device="cuda")
        for run in steered_runs(model, documents, add, LAMBDAS, "cuda"):
            out[run.index, torch.from_numpy(run.rows).cuda()] = pool(run.hidden, run.batch.cu_seqlens, "mean")
        return out

    embeddings, seconds = timed(embed)
    axioms = list(map(str, range(AXIOMS)))
    _, verdict_seconds = timed(lambda: judge(bootstrap(embeddings, axiom, label, axioms)))
    return embeddings.cpu(), seconds, verdict_seconds


@torch.no_grad()
def published(folder, documents, add):
    """(embeddings (K, n, D), seconds) of the published way.

    A hook on each steered layer, right-padded batches, one forward per lambda.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cuda", attn_implementation="sdpa"
    )
    strength = [0.0]
    for layer, a in add.items():
        a = a.cuda().bfloat16()
        model.model.layers[layer].register_forward_hook(
            lambda module, inputs, out, a=a: out + strength[0] * a
        )

    def embed():
        out = torch.zeros(len(LAMBDAS), len(documents), model.config.hidden_size)
        for k, value in enumerate(LAMBDAS):
            strength[0] = value
            for start in range(0, len(documents), BATCH):
                rows = [ids for ids, _ in documents[start : start + BATCH]]
                width = max(map(len, rows))
                ids = torch.tensor(
                    np.stack([np.pad(row, (0, width - len(row))) for row in rows]), device="cuda"
                ).long()
                mask = (
                    torch.arange(width, device="cuda")
                    < torch.tensor([len(row) for row in rows], device="cuda")[:, None]
                )
                hidden = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
                out[k, start : start + BATCH] = (
                    (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                ).cpu()
        return out

    return timed(embed)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="model, as bench/world.py makes one")
    parser.add_argument("--prompts", type=int, default=7000, help="number of them (default: %(default)s)")
    parser.add_argument("--nulls", type=int, help="time so many null directions instead of the sweep")
    parser.add_argument("--out", type=Path, help="another jsonl file than bench/results.jsonl")
    args = parser.parse_args()

    model, tokenizer = load_pretrained(args.folder, torch.bfloat16, DEVICE)
    apply_fused(model)
    rng = np.random.default_rng(0)
    lengths = tulu_like_lengths(rng, args.prompts, mean=60, sigma=0.6, longest=400)
    documents = [plain_document(words(rng, n), tokenizer, 512) for n in lengths]
    layers, D = model.config.num_hidden_layers, model.config.hidden_size
    v = torch.randn(layers, D, generator=torch.Generator().manual_seed(0)) * 0.01
    add = additions("cumulative", v, list(range(max(0, layers - 5), layers)))
    label = torch.arange(args.prompts) % 2
    axiom = torch.arange(args.prompts) // 2 % AXIOMS

    list(steered_runs(model, documents[:256], add, LAMBDAS, DEVICE))  # warm-up
    if args.nulls:
        return nulls(model, documents, add, label, axiom, args)
    with Clocks() as our_clocks:
        mine, embed_s, verdict_s = ours(model, documents, add, label, axiom)
    tokens, peak = sum(len(ids) for ids, _ in documents), torch.cuda.max_memory_allocated() / 2**30
    del model
    torch.cuda.empty_cache()
    with Clocks() as their_clocks:
        theirs, peer_s = published(args.folder, documents, add)
    gap = ((mine - theirs).norm() / theirs.norm()).item()
    print(
        f"{args.prompts:,} prompts, {tokens:,} tokens, {len(LAMBDAS)} lambdas: ours {embed_s:.1f} s + "
        f"verdict {verdict_s:.1f} s, "
        f"peak {peak:.1f} GiB; published way {peer_s:.1f} s; relative difference of the embeddings {gap:.4f}"
    )
    assert gap < 0.05, gap
    import transformers

    value = embed_s + verdict_s
    peer = f"transformers {transformers.__version__}, embedding only"
    metric = "aqi_sweep" if args.prompts == 7000 else f"aqi_sweep_{args.prompts}"
    command = f"bench/sweep.py {args.folder} --prompts {args.prompts}"
    about = (
        torch.cuda.get_device_name(),
        1,
        torch.__version__,
        command,
        f"{our_clocks.median()}; {their_clocks.median()}",
    )
    append(metric, value, "s", (peer, peer_s, peer_s / value), *about, path=args.out)


if __name__ == "__main__":
    main()
