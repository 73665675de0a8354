"""planner/budget.py and planner/plan.py: measured peaks and rates, arithmetic by hand, counts of data, what
`--plan` prints.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import statistics
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from world import ROOT, write_config

import aqi
import steer
import train_dpo
import training
from data import load_preferences, load_sft
from families.falcon import FalconConfig
from model import LlamaConfig, training_flops
from planner import budget, plan
from planner.budget import (
    GPUS,
    Pass,
    Sizes,
    block_bytes,
    exchange_seconds,
    extract_seconds,
    extracts_in_fp32,
    find_gpu,
    forward_seconds,
    optimizer_seconds,
    peak_bytes,
    sharded_seconds,
    skeleton,
    slowed,
    state_bytes,
    sweep_seconds,
    training_seconds,
)
from plumbing.config import check_capability, check_packages, load
from plumbing.files import UserError
from plumbing.tokenizer import Tokenizer
from train_dpo import DPOConfig
from train_sft import SFTConfig

CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 2**30
SHAPE = LlamaConfig.preset("llama-3.1-8b")
OLMO = LlamaConfig.preset("olmo-2-1b")
H200 = GPUS["h200"]
SMALL = dataclasses.replace(H200, gib=8.0)  # on which no model of these tests is read in fp32
VALUES = dict(model_path="meta-llama/Llama-3.1-8B", out_dir="o", data={"a.jsonl": 1.0}, max_seq_len=4096, global_batch_size=16,
              tokens_per_microbatch=8192, lr=1e-5)  # fmt: skip
FULL, LORA = dict(moments="bf16"), dict(lora_rank=64, lora_alpha=128.0)
PLAIN = dict(kernels="plain", recompute="full")
TIGHT = FULL | dict(gradients="bf16", recompute="full")


def parts(**keys):
    """(config, skeleton, sizes) of the 8B shape."""
    config = SFTConfig(**VALUES | keys)
    model = skeleton(SHAPE, config)
    return config, model, Sizes.of(model)


def documents(*lengths, targets):
    return np.array(lengths), np.array(targets)


# documents and pairs of bench/llama8b.py
DOCUMENT = Pass.of(SHAPE, [documents(4096, targets=[3085])])
PAIR = Pass.of(SHAPE, [documents(500, targets=[250])] * 2, np.array([250]))  # 250 shared + 250 + 250
WHOLE_PAIR = Pass.of(SHAPE, [documents(500, targets=[250])] * 2)


# ---------------------------------------------------------------- measured


@pytest.mark.parametrize(
    "keys, tokens, targets, keys_and_values, measured",
    [
        pytest.param(FULL, 8192, 6170, 8192, 114.5, id="SFT"),
        pytest.param(FULL, 12288, 9255, 12288, 126.1, id="SFT, 3 documents"),
        pytest.param(TIGHT, 4096, 3085, 4096, 77.45, id="SFT on an H100 of 80 GB"),
        pytest.param(FULL, 8316, 5500, 11088, 115.2, id="DPO, 11 pairs"),
        pytest.param(FULL, 7056, 3528, 7056, 111.3, id="DPO, 7 pairs, nothing shared"),
        pytest.param(LORA, 8192, 6170, 8192, 42.5, id="LoRA SFT"),
        pytest.param(LORA, 12288, 9255, 12288, 54.3, id="LoRA SFT, 3 documents"),
        pytest.param(LORA, 8316, 5500, 11088, 43.2, id="LoRA DPO, 11 pairs"),
    ],
)
def test_peaks_measured_on_one_gpu(keys, tokens, targets, keys_and_values, measured):
    """torch.cuda.max_memory_allocated in GiB, torch 2.11, several micro-batches a step."""
    config, _, sizes = parts(**keys)
    _, terms = peak_bytes(SHAPE, config, sizes, 1, tokens, targets, keys_and_values, accumulates=True)
    assert sum(terms.values()) / GIB == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize(
    "tokens, targets, accumulates, measured",
    [
        pytest.param(16384, 12452, True, 71.9, id="SFT, 2 micro-batches a step"),
        pytest.param(16000, 8000, False, 65.5, id="DPO, 1 micro-batch a step"),
    ],
)
def test_peaks_measured_on_two_gpus(tokens, targets, accumulates, measured, monkeypatch):
    """Of plain blocks, recomputed, and when token_logps walked 4,096 rows at a time."""
    monkeypatch.setattr(budget, "HEAD_ROWS", 4096)
    config, _, sizes = parts(**PLAIN, sharding="full")
    _, terms = peak_bytes(SHAPE, config, sizes, 2, tokens, targets, tokens, accumulates=accumulates)
    assert sum(terms.values()) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    "keys, gpu, work, measured",
    [
        pytest.param(FULL, "h200", DOCUMENT.times(8), 2.822, id="SFT"),
        pytest.param(FULL, "h200", DOCUMENT.times(12), 4.141, id="SFT, micro-batches of 3 documents"),
        pytest.param(LORA, "h200", DOCUMENT.times(12), 3.264, id="LoRA SFT"),
        pytest.param(FULL, "h200", PAIR.times(32), 1.917, id="DPO"),
        pytest.param(FULL, "h200", WHOLE_PAIR.times(32), 2.496, id="DPO, nothing shared"),
        pytest.param(LORA, "h200", PAIR.times(32), 1.449, id="LoRA DPO"),
        pytest.param(TIGHT, "h100", DOCUMENT.times(8), 3.890, id="SFT on an H100"),
    ],
)
def test_seconds_of_a_step_measured(keys, gpu, work, measured):
    """The optimizer's included. Nothing was fitted to the H100's, nor to micro-batches of 3 documents."""
    config, model, sizes = parts(**keys)
    seconds = training_seconds(work, model, config, GPUS[gpu]) + optimizer_seconds(
        config, sizes, 1, GPUS[gpu]
    )
    assert seconds == pytest.approx(measured, rel=0.045)


def test_forward_and_optimizer_rates_measured_on_h200():
    hidden_states = Pass.of(SHAPE, [documents(4096, 4096, targets=[0, 0])])
    assert 1 / forward_seconds(PAIR, SHAPE, GPUS["h200"]) == pytest.approx(56, rel=0.05), (
        "pairs/s of the reference pass"
    )
    tokens_per_second = 8192 / forward_seconds(hidden_states, SHAPE, GPUS["h200"])
    assert tokens_per_second == pytest.approx(39_700, rel=0.05)
    config, _, sizes = parts(**FULL)
    assert optimizer_seconds(config, sizes, 1, GPUS["h200"]) == pytest.approx(0.049, rel=0.05)
    # AdamW's kernels took 38.5 ms on one H200 and 19.7 on each of two: a GPU steps its rows only.
    for keys in (FULL | {"sharding": "optimizer"}, {"sharding": "full"}):
        config, _, sizes = parts(**keys)
        alone, each_of_two = (optimizer_seconds(config, sizes, count, GPUS["h200"]) for count in (1, 2))
        assert each_of_two == alone / 2, keys


@pytest.mark.parametrize(
    "stage, measured",
    [("sft", 49_152 / 59_180), ("sft", 49_152 / 60_180), ("dpo", 32 / 84.53)],
)
def test_seconds_of_a_step_of_olmo_2_1b_measured(stage, measured):
    """On an H200, the optimizer's included. Pairs of 504 tokens share 252, as bench/world.py writes them."""
    work = Pass.of(OLMO, [documents(4096, targets=[3085])]).times(12)
    if stage == "dpo":
        work = Pass.of(OLMO, [documents(504, targets=[250])] * 2, np.array([252])).times(32)
    config = SFTConfig(**VALUES | FULL)
    model = skeleton(OLMO, config)
    seconds = training_seconds(work, model, config, GPUS["h200"])
    seconds += optimizer_seconds(config, Sizes.of(model), 1, GPUS["h200"])
    assert seconds == pytest.approx(measured, rel=0.045)


@pytest.mark.parametrize(
    "preset, gpu, measured, error",
    [
        pytest.param("llama-3.1-8b", SMALL, 40_370, 0.05, id="8B, bf16, 32 texts of 512"),
        pytest.param("llama-3.1-8b", SMALL, 40_043, 0.05, id="8B, bf16, 136 texts of 60"),
        pytest.param("llama-3.1-8b", SMALL, 42_470, 0.05, id="8B, bf16, 32 texts of 512, another session"),
        pytest.param("llama-3.1-8b", H200, 3_448, 0.05, id="8B, fp32, 32 texts of 512"),
        pytest.param("llama-3.1-8b", H200, 3_383, 0.05, id="8B, fp32, 64 texts of 200"),
        pytest.param("llama-3.2-1b", SMALL, 239_356, 0.05, id="1B, bf16, 32 texts of 512"),
        pytest.param("llama-3.2-1b", SMALL, 212_884, 0.12, id="1B, bf16, 136 texts of 60: half a batch"),
        pytest.param("llama-3.2-1b", H200, 23_336, 0.05, id="1B, fp32, 32 texts of 512"),
        pytest.param("llama-3.2-1b", H200, 22_265, 0.07, id="1B, fp32, 136 texts of 60: half a batch"),
    ],
)
def test_rates_of_extract_measured_on_h200(preset, gpu, measured, error):
    """read_states, tokens/s of one batch; steering.packed_batches fills them to 16,384 tokens."""
    rate = 1e6 / extract_seconds(LlamaConfig.preset(preset), 1e6, gpu)
    assert rate == pytest.approx(measured, rel=error)


# ---------------------------------------------------------------- by hand


def test_narrow_models_take_longer_for_a_flop():
    """4,096 / 2,048 - 1 is 1, 4,096 / 1,024 - 1 is 3; wider than 4,096 is as 4,096."""
    assert [slowed(size, 0.125) for size in (8192, 4096, 2048, 1024)] == [1, 1, 1.125, 1.375]


def test_seconds_of_extract_and_sweep():
    """Of the blocks alone: 32 of 218,112,000 parameters and a norm of 4,096; 16 of 60,821,504 (2 x 2048 x 2048
    + 2 x 2048 x 512 + 3 x 2048 x 8192 + 2 norms of 2048), whose embedding is its lm_head.
    """
    blocks, small_blocks = 32 * 218_112_000 + 4096, 16 * 60_821_504 + 2048
    small = LlamaConfig.preset("llama-3.2-1b")
    assert extract_seconds(SHAPE, 1000, H200) == pytest.approx(2000 * blocks / (67e12 * 0.69))
    bf16 = 989.4e12 * 0.8
    assert extract_seconds(SHAPE, 1000, SMALL) == pytest.approx(2000 * blocks / (bf16 * 0.73))
    expected = 2000 * small_blocks / (bf16 * 0.73) * 1.25
    assert extract_seconds(small, 1000, SMALL) == pytest.approx(expected)
    assert sweep_seconds(SHAPE, 1000, H200) == pytest.approx(2000 * blocks / (bf16 * 0.79))
    expected = 2000 * small_blocks / (bf16 * 0.79) * 1.125
    assert sweep_seconds(small, 1000, H200) == pytest.approx(expected)


def test_seconds_of_extract_of_another_family():
    """A block of Falcon-7B: q, k, v 4544 x 4672, o 4544 x 4544, MLP 2 x 4544 x 18176, one LayerNorm of 2 x
    4544. So 207,070,080 parameters in each of 32, and a LayerNorm behind them.
    """
    falcon = FalconConfig(65_024, 4544, 18_176, 32, 71)
    blocks = 32 * 207_070_080 + 2 * 4544
    seconds = extract_seconds(falcon, 1000, GPUS["a100-80"])
    assert seconds == pytest.approx(2000 * blocks / (19.5e12 * 0.69))


@pytest.mark.parametrize("gpu, is_precise", [("rtx3090", False), ("a40", False), ("a100-80", True)])
def test_the_cards_size_decides_whether_extract_reads_fp32(gpu, is_precise):
    """8 bytes for each of 8.03e9 parameters are 59.8 GiB."""
    assert extracts_in_fp32(SHAPE, GPUS[gpu]) == is_precise
    assert extracts_in_fp32(OLMO, GPUS[gpu]), "1.48e9 parameters: 11.1 GiB"


def test_sizes_and_flops_of_8b():
    """Block: 2 x 4096 x 4096 (q, o) + 2 x 4096 x 1024 (k, v) + 3 x 4096 x 14336 + 2 norms of 4096 =
    218,112,000, times 32; embedding and lm_head 128,256 x 4096 each, one norm. Adapters of rank 64: 64 x (2 x
    8192 + 2 x 5120 + 3 x 18432) = 5,242,880 a block.

    Forward per token of a document of 4,096, all supervised: 2 x 32 x 218,103,808 + 2 x 32 x 4096 x 4097 + 2
    x 4096 x 128,256 = 16.083 GF; three times that is 48.25; twice that, once more attention's 1.07, and 6 for each
    of 167.8 M adapter weights, 34.25.
    """
    (_, model, sizes), (_, lora, adapted) = parts(), parts(**LORA)
    assert sizes == Sizes(trained=8_030_261_248, frozen=0, root=1_050_677_248, block=218_112_000)
    assert (adapted.trained, adapted.frozen, adapted.block) == (
        167_772_160,
        8_030_261_248,
        218_112_000 + 5_242_880,
    )
    work = Pass.of(SHAPE, [documents(4096, targets=[4096])])
    assert training_flops(model, work.flops, work.attention, work.tokens) / 4096 / 1e9 == pytest.approx(48.25, abs=0.005)
    assert training_flops(lora, work.flops, work.attention, work.tokens) / 4096 / 1e9 == pytest.approx(34.25, abs=0.005)


def test_a_pass_over_a_million_documents_does_not_overflow():
    """One document of 750 tokens takes 11 TF, so a million take more than int64 counts (9.2e18)."""
    one, many = (Pass.of(SHAPE, [(np.full(n, 750), np.full(n, 560))]) for n in (1, 1_000_000))
    assert many.flops == pytest.approx(1e6 * one.flops) and many.flops > 2**63
    assert many.slow_attention == pytest.approx(1e6 * one.slow_attention) and (many.tokens, many.targets) == (
        750_000_000,
        560_000_000,
    )


@pytest.mark.parametrize(
    "keys, count, trained, frozen",
    [
        (dict(), 1, 16, 0),  # 2 + 2 + 8 + 4
        (dict(moments="bf16"), 1, 12, 0),
        (dict(moments="bf16", gradients="bf16"), 1, 10, 0),
        (dict(sharding="full"), 8, 2, 0),
        (dict(sharding="optimizer"), 8, 2 + 4 + (2 + 8) / 8, 0),
        (dict(sharding="optimizer", moments="bf16", gradients="bf16"), 2, 2 + 2 + (2 + 4) / 2, 0),
        (dict(sharding="optimizer", precision="fp32"), 4, 4 + 4 + 8 / 4, 0),
        (dict(precision="fp32"), 1, 16, 0),
        (LORA, 1, 16, 2),
        (LORA | dict(sharding="full"), 2, 8, 1),
        (LORA | dict(sharding="optimizer"), 2, 4 + 4 + 8 / 2, 2),
    ],
)
def test_state_in_bytes_a_parameter(keys, count, trained, frozen):
    config, _, sizes = parts(**keys)
    assert sum(state_bytes(config, sizes, count).values()) == trained * sizes.trained + frozen * sizes.frozen


def test_a_fused_block_keeps_92_kb_a_token():
    """4 x 4096 (input, middle, q, output) + 2 x 1024 (k, v) + 2 x 14336 numbers of 2 bytes; softmax's 32 sums
    of 4 bytes come on top.
    """
    kept, recomputed, _ = block_bytes(SHAPE, parts()[0], 1, 1)
    assert (kept, recomputed) == (92 * 1024 + 32 * 4, 8 * 1024)
    assert block_bytes(SHAPE, parts()[0], 1, 2)[0] - kept == 4096, (
        "another document's k and v of a shared token"
    )
    assert block_bytes(SHAPE, parts()[0], 1, 1)[2] == 2 * (4 * 14336 + 4096), (
        "its backward: gate, up, product, product again; the stream"
    )
    plain = block_bytes(SHAPE, parts(kernels="plain")[0], 1, 1)
    assert plain == (kept + 2 * (2 * 4096 + 2 * 14336), recomputed, 2 * (14336 + 4096)), (
        "two norms, silu(gate) and the product more"
    )


def test_a_fused_block_of_an_olmo_2_1b_keeps_72_kb_a_token():
    """A Llama of its shape keeps 56: 4 x 2048 (input, middle, q, output) + 2 x 2048 (k, v) + 2 x 8192 numbers.

    On top come q and k before their norms, and what attention and MLP gave before theirs. Plain blocks keep
    silu(gate) and the product more.
    """
    config, olmo = parts()[0], LlamaConfig.preset("olmo-2-1b")
    llama = dataclasses.replace(olmo, qk_norm=None, post_norm=False)
    softmax = 4 * 16
    kept, recomputed, backward = block_bytes(olmo, config, 1, 1)
    kept_of_llama, _, backward_of_llama = block_bytes(llama, config, 1, 1)
    assert (kept - softmax, kept_of_llama - softmax, recomputed) == (72 * 1024, 56 * 1024, 4 * 1024)
    assert backward - backward_of_llama == 2 * 2048, "of the MLP's result, before and behind its norm"
    plain = block_bytes(olmo, parts(kernels="plain")[0], 1, 1)
    assert plain == (kept + 2 * 2 * 8192, recomputed, 2 * (8192 + 2048))


def test_half_of_an_odd_number_of_blocks_is_the_larger_half():
    config, shape = parts(recompute="half")[0], dataclasses.replace(SHAPE, num_hidden_layers=3)
    _, terms = peak_bytes(shape, config, Sizes.of(skeleton(shape, config)), 1, 100, 60, 100, accumulates=True)
    kept, recomputed, _ = block_bytes(shape, config, 100, 100)
    assert terms["activations"] == 2 * recomputed + kept + 2 * 4096 * (100 + 60)


def test_what_two_gpus_gather_at_the_peak():
    """Embedding, lm_head, norm and one block of bf16 weights; beside them the next block's, and this one's
    gradient, in bf16 and fp32.
    """
    root, block = 2 * 128256 * 4096 + 4096, 218_112_000
    moment, terms = peak_bytes(
        SHAPE, parts(sharding="full")[0], parts()[2], 2, 8192, 6170, 8192, accumulates=True
    )
    assert (moment, terms["gathered weights"]) == ("the last block's backward", 2 * (root + block))
    backward = block_bytes(SHAPE, parts()[0], 8192, 8192)[2]
    assert (
        terms["backward of a block"]
        == backward + 2 * 4096 * 8192 + 2 * 128256 * 4096 + 2 * block + (2 + 4) * block
    )


def test_a_step_that_half_fills_a_micro_batch_may_need_two():
    """A pair is 750 tokens with 500 targets and 1,000 keys: 7,500 tokens hold ten."""
    for batch, accumulates in ((5, False), (6, True)):
        config = DPOConfig(
            **VALUES | dict(max_seq_len=512, tokens_per_microbatch=7500, global_batch_size=batch)
        )
        planned = plan.Plan("dpo", config, "h200", 1, (1.0, 1.0), SHAPE, PAIR.times(100), None)
        assert planned.microbatches == batch / 10
        assert planned.peak == peak_bytes(
            SHAPE, config, planned.sizes, 1, 7500, 5000, 10000, accumulates=accumulates
        )


def test_seconds_of_eight_gpus_by_their_link():
    """2 steps of 32 pairs on 8 x A40, 24,000 tokens a step: 2.1, so 3 micro-batches of 1,400 each. 7/8 of the
    weights come at 19.2 GB/s, twice a micro-batch in bf16 with the gradients in float32, once for log-probs:
    those of the 64 pairs that are trained and 20 held out; evaluated before, between and after. All of it
    beside no computing: that comes on top."""
    keys = dict(
        max_seq_len=512,
        tokens_per_microbatch=1400,
        global_batch_size=32,
        max_steps=2,
        data_eval=0.2,
        eval_every=1,
    )
    assert (
        plan.Plan(
            "dpo", DPOConfig(**VALUES | keys), "a40", 8, (1.0, 1.0), SHAPE, PAIR, None
        ).resolved.sharding
        == "full"
    )
    keys["sharding"] = "full"
    planned = plan.Plan(
        "dpo", DPOConfig(**VALUES | keys), "a40", 8, (1.0, 1.0), SHAPE, PAIR.times(100), PAIR.times(20)
    )
    pass_over = 7 / 8 * 8_030_261_248 / (32e9 * 0.6)  # seconds a byte of a parameter
    busy = (
        budget.slowest_of(8) / budget.slowest_of(2) / budget.SHARDED_FULL / 8
    )  # a GPU's seconds of one GPU's
    trained = training_seconds(PAIR.times(64), planned.model, planned.config, GPUS["a40"]) * busy
    referred, evaluated = (
        forward_seconds(PAIR.times(count), SHAPE, GPUS["a40"]) * busy for count in (64 + 20, 20)
    )
    assert planned.seconds == pytest.approx({
        "training": 2 * 3 * (2 + 2 + 4) * pass_over + trained, "optimizer": 2 * optimizer_seconds(planned.config, planned.sizes, 8, GPUS["a40"]),
        "reference log-probs": (64 + 20) / 32 * 3 * 2 * pass_over + referred, "evaluation": 3 * (20 / 32 * 3 * 2 * pass_over + evaluated),
    })  # fmt: skip
    simpo = DPOConfig(**VALUES | keys | dict(loss="simpo", gamma_beta_ratio=0.3))
    assert dataclasses.replace(planned, config=simpo).seconds.keys() == planned.seconds.keys() - {
        "reference log-probs"
    }


@pytest.mark.parametrize(
    "gib, verdict",
    [(76, "fits"), (77, "fits with 3.0 GiB to spare: tight"), (81, "does not fit, 1.0 GiB too much")],
)
def test_five_per_cent_is_tight(gib, verdict):
    planned = types.SimpleNamespace(gib=gib, gpu=dataclasses.replace(GPUS["h100"], gib=80))
    assert plan._verdict(planned).split(",")[0] == verdict.split(",")[0]


def test_recompute_trades_activations_for_time():
    work, gpu, seen = DOCUMENT.times(2), GPUS["h200"], []
    for mode in ("none", "half", "full"):
        config, model, sizes = parts(recompute=mode)
        _, terms = peak_bytes(SHAPE, config, sizes, 1, 8192, 6226, 8192, accumulates=True)
        seen.append((terms["activations"] / GIB, training_seconds(work, model, config, gpu)))
    memory, seconds = zip(*seen)
    # 32 x 92 KB x 8192 = 23 GiB, 32 x 8 KB x 8192 = 2 GiB; the last block's states, before and after picking,
    # are 0.11
    assert memory == pytest.approx((23.14, 12.63, 2.11), abs=0.01)
    without_head = Pass.of(SHAPE, [documents(4096, targets=[0])]).times(2)
    assert seconds[2] - seconds[0] == pytest.approx(forward_seconds(without_head, SHAPE, gpu))
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2)


def test_exchange_is_by_the_link_and_overlaps():
    """7 of 8 parts of 64 GB at 60 % of 32 GB/s; between machines at that of eight network cards; computing
    alone for 10 s, 11.3 s beside NCCL's kernels (11 s under LoRA).

    Beside it over NVLink in one machine, after it over PCIe or between machines, where no overlap was
    measured."""
    exchange = exchange_seconds(64e9, 8, GPUS["a40"])
    assert exchange == pytest.approx(64 * 7 / 8 / (32 * 0.6))
    assert exchange_seconds(64e9, 8, GPUS["h200"]) == pytest.approx(64 * 7 / 8 / (450 * 0.6))
    assert exchange_seconds(64e9, 16, GPUS["h200"]) == pytest.approx(64 * 15 / 16 / (8 * 50 * 0.6))
    assert exchange_seconds(64e9, 16, GPUS["a40"]) == pytest.approx(64 * 15 / 16 / (8 * 1.5 * 0.6))
    full = SFTConfig(**VALUES, sharding="full")
    lora = SFTConfig(**VALUES | LORA, sharding="full")
    whole = SFTConfig(**VALUES, sharding="optimizer")
    nvlink, pcie, wait = GPUS["h200"], GPUS["a40"], budget.slowest_of(8)
    assert wait == pytest.approx(1.0359, abs=1e-4)  # 0.025 * 1.434, the 0.9242 quantile of a normal
    assert sharded_seconds(10.0, 3.0, full, 2, nvlink) == pytest.approx(10 / 0.885)
    assert sharded_seconds(10.0, 3.0, lora, 2, nvlink) == pytest.approx(10 / 0.91)
    assert sharded_seconds(10.0, 3.0, full, 8, nvlink) == pytest.approx(
        10 / 0.885 * wait / budget.slowest_of(2)
    )
    assert sharded_seconds(10.0, 3.0, whole, 8, nvlink) == pytest.approx(10 * wait + 0.2 * 3)
    assert sharded_seconds(10.0, 3.0, whole, 8, pcie) == pytest.approx(10 * wait + 3)
    assert sharded_seconds(10.0, 3.0, whole, 16, nvlink) == pytest.approx(10 * budget.slowest_of(16) + 3)
    assert sharded_seconds(1.0, 3.0, full, 8, nvlink) == 3.0
    assert sharded_seconds(1.0, exchange_seconds(64e9, 1, pcie), full, 1, pcie) == 1.0


@pytest.mark.parametrize(
    ("gpu", "count", "keys", "expected"),
    [
        ("h200", 2, {}, "optimizer"),
        ("h100", 2, {}, "full"),
        # Streams of the data's mean would fit, the largest there can be do not.
        ("h100", 8, {"tokens_per_microbatch": 6656}, "full"),
        ("h100", 16, {"tokens_per_microbatch": 8192}, "hybrid"),
    ],
)
def test_a_run_picks_the_sharding_of_the_plan(gpu, count, keys, expected, monkeypatch, capsys):
    """The 8B shape, on cards of which another process holds all but 1 GiB."""
    config, model, _ = parts(**keys)
    work = Pass.of(SHAPE, [documents(750, targets=[560])]).times(1000)
    planned = plan.Plan("sft", config, gpu, count, (1.0, 1.0), SHAPE, work, None)
    assert planned.resolved.sharding == expected
    ranks = dict(world_size=lambda: count, machine_size=lambda: min(count, 8), max_across_ranks=lambda value: value, say=print)
    for name, answer in ranks.items():
        monkeypatch.setattr(training.parallel, name, answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, int(GPUS[gpu].gib * GIB)))
    assert training.pick_sharding(config, model, torch.device("cuda", 0)) == expected
    assert capsys.readouterr().out == f"sharding={expected}, picked for GPUs of {GPUS[gpu].gib:.1f} GiB\n"


def test_sharding_is_picked_by_what_fits():
    """8B on two cards: 2 + 4 bytes a parameter everywhere and (2 + 8) / 2 fit 140 GB beside the activations,
    not 80.
    """
    for gpu, keys, expected in (("h200", {}, "optimizer"), ("h100", {}, "full"), ("h100", LORA, "optimizer"), ("h100", FULL, "optimizer"),
                                ("h200", {"sharding": "full"}, "full")):  # fmt: skip
        planned = plan.Plan(
            "sft", SFTConfig(**VALUES | keys), gpu, 2, (1.0, 1.0), SHAPE, DOCUMENT.times(24), None
        )
        assert planned.resolved.sharding == expected, (gpu, keys)


def of_70b(gpu, count, **keys):
    """The Plan of a step with four documents of 4,096 tokens on each GPU."""
    shape = dataclasses.replace(
        SHAPE, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    )
    config = SFTConfig(**VALUES | dict(recompute="full", global_batch_size=4 * count) | keys)
    work = Pass.of(shape, [documents(4096, targets=[3085])]).times(4 * count)
    return plan.Plan("sft", config, gpu, count, (1.0, 1.0), shape, work, None)


@pytest.mark.slow
def test_a_70b_is_sharded_in_each_machine_where_that_fits():
    """LoRA: 141 GB of frozen weights over eight h100. All weights: 16 bytes each, 1,129 GB, fit eight b200 and
    not eight h100. One machine, and 12 GPUs, are not machines of eight.
    """
    for gpu, count, keys, expected in (("h100", 16, LORA, "hybrid"), ("h100", 64, LORA, "hybrid"), ("h100", 8, LORA, "full"),
                                       ("h100", 12, LORA, "full"), ("h100", 64, {}, "full"), ("b200", 64, {}, "hybrid"),
                                       ("b200", 16, LORA, "optimizer")):  # fmt: skip
        planned = of_70b(gpu, count, **keys)
        assert (planned.resolved.sharding, planned.fits) == (expected, True), (gpu, count, keys)


@pytest.mark.slow
def test_machines_that_hold_copies_sum_their_gradients_once_a_step():
    """64 b200: memory and exchange of one machine of eight. Then each GPU sends and receives 7/8 of the float32
    gradients of its rows, 35 GB, by its own card, beside no computing.
    """
    planned = of_70b("b200", 64, sharding="hybrid")
    one_machine = of_70b("b200", 8, sharding="full")
    assert planned.peak == one_machine.peak
    assert planned.step == pytest.approx(one_machine.step)
    compute, exchange = planned.step
    between = 2 * 7 / 8 * 4 * planned.sizes.trained / 8 / (50e9 * 0.6)
    busy = compute / budget.SHARDED_FULL * budget.slowest_of(64) / budget.slowest_of(2)
    assert busy > exchange
    assert planned.seconds["training"] == pytest.approx(busy + between)
    ours, theirs = planned.seconds["optimizer"], one_machine.seconds["optimizer"]
    assert ours == pytest.approx(theirs)
    lines = "\n".join(plan._scaling_lines(planned))
    assert "sharding=hybrid" in lines and "NVLink, 900 GB/s by the datasheet: exchange 1.83 s" in lines
    assert "50 GB/s a card between machines of 8 (assumed): gradients are summed in 2.06 s a step" in lines
    assert "hybrid was not measured" in lines
    assert "hybrid" not in "\n".join(plan._scaling_lines(one_machine))


@pytest.mark.parametrize("keys, tokens, targets, keys_and_values, measured", [
    pytest.param(FULL, 12288, 9174, 12288, 103.7, id="SFT"), pytest.param(LORA, 12288, 9174, 12288, 53.6, id="LoRA SFT"),
    pytest.param(FULL, 8272, 5500, 11000, 92.7, id="DPO, 11 pairs")])  # fmt: skip
def test_peaks_measured_on_two_gpus_that_share_the_optimizer(
    keys, tokens, targets, keys_and_values, measured
):
    config, _, sizes = parts(**keys, sharding="optimizer")
    _, terms = peak_bytes(SHAPE, config, sizes, 2, tokens, targets, keys_and_values, accumulates=True)
    assert sum(terms.values()) / GIB == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize("keys, measured", [(FULL, 4.210), (LORA, 3.349)], ids=["SFT", "LoRA SFT"])
def test_seconds_of_a_step_measured_on_two_gpus_that_share_the_optimizer(keys, measured):
    config = SFTConfig(**VALUES | keys | dict(global_batch_size=24, tokens_per_microbatch=12288))
    planned = plan.Plan("sft", config, "h200", 2, (1.0, 1.0), SHAPE, DOCUMENT.times(24), None)
    assert planned.resolved.sharding == "optimizer"
    assert sum(planned.seconds.values()) == pytest.approx(measured, rel=0.045)


@pytest.mark.parametrize("line, stage, keys, work, microbatch", [
    ("sft_full_2gpu", "sft", FULL, DOCUMENT.times(12), 12288), ("sft_full_4gpu", "sft", FULL, DOCUMENT.times(12), 12288),
    ("sft_lora_2gpu", "sft", LORA, DOCUMENT.times(12), 12288), ("dpo_lora_2gpu", "dpo", LORA, PAIR.times(32), 8320),
    ("dpo_full_shared_4gpu", "dpo", FULL, PAIR.times(32), 8320)])  # fmt: skip
def test_scaling_measured_on_two_and_four_gpus(line, stage, keys, work, microbatch):
    """Rates of bench/results.jsonl, of a GPU among several beside one of the same machine, within 1 % of the
    mean over machines, which are up to 2 % apart; and memory within 3 %.
    """
    lines = [json.loads(text) for text in (ROOT / "bench/results.jsonl").read_text().splitlines()]
    beside_one = [
        found for found in lines if found["metric"] == line and (found["peer"] or "").startswith("one GPU of")
    ]
    measured = beside_one[-1]
    ratio = statistics.mean(found["ratio"] for found in beside_one)
    peak = [found for found in lines if found["metric"] == f"mem_{line}"][-1]["value"]
    config = (SFTConfig if stage == "sft" else DPOConfig)(
        **VALUES | keys | dict(tokens_per_microbatch=microbatch)
    )
    config = dataclasses.replace(config, global_batch_size=work.examples * measured["gpus"])
    several = plan.Plan(
        stage, config, "h200", measured["gpus"], (1.0, 1.0), SHAPE, work.times(measured["gpus"]), None
    )
    alone = dataclasses.replace(
        several, count=1, config=dataclasses.replace(config, global_batch_size=work.examples), train=work
    )
    training = [planned.seconds["training"] + planned.seconds["optimizer"] for planned in (several, alone)]
    assert several.resolved.sharding == "optimizer"
    assert training[1] / training[0] == pytest.approx(ratio, rel=0.01)
    assert several.gib - plan.CONTEXT_GIB == pytest.approx(peak, rel=0.03)


def test_bytes_of_a_checkpoint():
    """float32 weights and two moments; of 8.03 B parameters 96 GB, with bf16 moments 64."""
    for keys, size in ((PLAIN, 12), (dict(moments="bf16"), 8), (LORA, 12)):
        config, _, sizes = parts(**keys)
        assert budget.checkpoint_bytes(config, sizes) == size * sizes.trained
    planned = plan.Plan(
        "sft",
        SFTConfig(**VALUES, save_every=9, keep_last=1),
        "h200",
        8,
        (1.0, 1.0),
        SHAPE,
        DOCUMENT.times(24),
        None,
    )
    (line,) = plan._disk_lines(planned)
    assert (
        line
        == "disk     a checkpoint 96.4 GB, 12 bytes a trained parameter; the run folder up to 209 GB with final/"
    )


@pytest.mark.parametrize("keys, measured", [({}, 4.775), (LORA, 3.67)], ids=["SFT", "LoRA SFT"])
def test_seconds_of_a_step_measured_on_two_gpus(keys, measured):
    """24 documents in micro-batches of 12,288 tokens on two H200s; 4.75 to 4.80 s, and 3.67 under LoRA."""
    keys = keys | {"sharding": "full"}
    config = SFTConfig(**VALUES | keys | dict(global_batch_size=24, tokens_per_microbatch=12288))
    planned = plan.Plan("sft", config, "h200", 2, (1.0, 1.0), SHAPE, DOCUMENT.times(24), None)
    assert planned.steps == 1 and planned.turns == 4
    assert sum(planned.seconds.values()) == pytest.approx(measured, rel=0.045)
    assert planned.speedup / 2 == pytest.approx(0.91 if "lora_rank" in keys else 0.885, abs=0.02)


@pytest.mark.slow
def test_cards_that_wait_for_pcie_are_not_called_fine():
    """8 x A40, one short micro-batch a step: the weights take longer to come than one card takes for
    everything.
    """
    config = SFTConfig(
        **VALUES | LORA | dict(global_batch_size=8, tokens_per_microbatch=4096, sharding="full")
    )
    slow = plan.Plan(
        "sft",
        config,
        "a40",
        8,
        (1.0, 1.0),
        SHAPE,
        Pass.of(SHAPE, [documents(*[128] * 8, targets=[64] * 8)]),
        None,
    )
    text = plan.describe(slow, "", "")
    assert (
        slow.speedup < 1
        and "SLOWER THAN ONE a40" in text
        and "the GPUs wait for it" in text
        and "PCIe, 32 GB/s" in text
    )
    fast = plan.describe(dataclasses.replace(slow, gpu_name="h200", train=DOCUMENT.times(64)), "", "")
    assert (
        "NVLink, 450 GB/s" in fast
        and "hidden behind it" in fast
        and "SLOWER" not in fast
        and "lower bound" not in fast
    )


def test_gpus_are_named_with_a_suggestion():
    assert find_gpu("h200").gib > find_gpu("h100").gib
    for wrong, near in (("a100", "a100-40"), ("h20", "h200"), ("A100", "a100-40"), ("rtx-4090", "rtx4090")):
        with pytest.raises(
            ValueError, match=rf"gpu='{wrong}' \(--gpu\): expected one of rtx3090, .*, did you mean '{near}'"
        ):
            find_gpu(wrong)


# ---------------------------------------------------------------- counts


def test_counts_of_data_that_is_here_are_exact(world, tmp_path):
    """35 pairs, 16 a step: 3 steps an epoch, the last of them partial; 4 steps of 2 epochs train 35 + 16."""
    path = str(write_config(tmp_path, world, sft=dict(data_eval=0.2)))
    for stage, read in (("sft", load_sft), ("dpo", load_preferences)):
        config, tokenizer = load(stage, [path]), Tokenizer.from_dir(world / "base")
        dataset, held_out = read(config, tokenizer, lambda line: None)
        planned, _, counted = plan.make(stage, path, [], "h100", 1, log=lambda line: None)
        work, shape, ids = planned.train, LlamaConfig.from_hf(world / "base"), np.arange(len(dataset))
        assert counted.startswith("exact") and planned.steps == 4 and work.examples == len(dataset)
        assert work.tokens == dataset.lengths.sum()
        assert work.flops == pytest.approx(dataset.flops(shape, ids).sum())
        assert (planned.held_out and planned.held_out.examples) == (held_out and len(held_out))
        assert ("evaluation" in planned.seconds, "reference log-probs" in planned.seconds) == (
            stage == "sft",
            stage == "dpo",
        )
    assert planned.trained.examples == pytest.approx(51)
    assert work.keys - work.tokens == dataset.prefixes.sum() > 0
    assert work.targets == dataset.chosen.num_targets.sum() + dataset.rejected.num_targets.sum()
    assert not (tmp_path / "sft").exists() and not (tmp_path / "dpo").exists()


def test_counts_of_the_tulu_mixtures_are_marked_as_estimates():
    """A tenth of 271,409 pairs: 27,140, so 213 steps of 128; 250 + 384 + 384 tokens each.

    Cut at 300 tokens a pair is 250 + 50 + 50. A card is $1.20-2.80 an hour."""
    tulu10, whole = str(CONFIGS / "tulu10.py"), ["--data_eval=none"]
    planned, origin, counted = plan.make("dpo", tulu10, whole, "a100-80", 8)
    assert counted.startswith("estimate") and "assumed" in counted
    assert (planned.train.examples, planned.steps, planned.train.tokens) == (27_140, 213, 27_140 * 1018)
    assert planned.shape == SHAPE and "to come from meta-llama/Llama-3.1-8B" in origin
    assert planned.usd_per_hour == pytest.approx((9.6, 22.4))
    short, _, _ = plan.make("dpo", tulu10, ["--max_seq_len=300", "--data_eval=0.5"], "a100-80", 8)
    assert (short.train.examples, short.held_out.examples, short.train.tokens) == (
        13_570,
        13_570,
        13_570 * 350,
    )
    apart, _, _ = plan.make("dpo", tulu10, [*whole, "--share_prefix=false"], "a100-80", 8)
    assert apart.train.tokens == 27_140 * (1018 + 250) and apart.hours > planned.hours


def test_pinned_names_are_planned_as_those_without_a_revision(tmp_path):
    hours = []
    for pin in ("", "@v1"):
        keys = dict(
            model_path=f"meta-llama/Llama-3.1-8B{pin}", data={f"allenai/tulu-3-sft-mixture{pin}": 0.1}
        )
        (tmp_path / "x.py").write_text(f"sft = {VALUES | keys!r}")
        planned, origin, counted = plan.make("sft", str(tmp_path / "x.py"), [], "h200", 8)
        assert (
            origin.startswith(f"meta-llama/Llama-3.1-8B{pin} ")
            and f"allenai/tulu-3-sft-mixture{pin}: " in counted
        )
        hours.append(planned.hours)
    assert hours[0] == hours[1]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda base: (base / "model.safetensors").write_bytes(b"torn"), "model.safetensors: truncated, or"),
        (
            lambda base: (base / "model.safetensors").rename(base / "adapter_model.safetensors"),
            "a LoRA adapter",
        ),
        (
            lambda base: (base / "adapter_config.json").write_text("{}"),
            "a LoRA adapter .* beside a whole model",
        ),
        (lambda base: (base / "hashes.json").write_text('{"config.json": "0"}'), "config.json: damaged"),
    ],
    ids=["torn", "adapter", "both", "changed"],
)
def test_a_folder_that_no_run_could_start_from_is_not_planned(world, tmp_path, spoil, message):
    path = str(write_config(tmp_path, world, model_path=f"{tmp_path}/base"))
    spoil(shutil.copytree(world / "base", tmp_path / "base"))
    for stage in ("sft", "dpo"):
        with pytest.raises(UserError, match=message):
            plan.make(stage, path, [], "h100", 1)
    assert not (tmp_path / "cache").exists(), "refused before the data are read"


def test_a_plan_reads_no_weights(world, tmp_path):
    """Zeros in place of the weights change no plan; nor does a folder of config and tokenizer alone."""
    base = shutil.copytree(world / "base", tmp_path / "base")
    path = str(write_config(tmp_path, world, model_path=str(base)))
    planned, _, _ = plan.make("sft", path, [], "h100", 1, log=lambda line: None)
    weights = base / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (base / "hashes.json").write_text(json.dumps({"model.safetensors": digest}))
    with weights.open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header)
        file.write(bytes(weights.stat().st_size - 8 - header))
    for _ in range(2):
        again, _, _ = plan.make("sft", path, [], "h100", 1, log=lambda line: None)
        assert again.hours == planned.hours and again.gib == planned.gib
        weights.unlink(missing_ok=True)
        (base / "hashes.json").unlink(missing_ok=True)


def test_what_is_not_known_here_is_refused(tmp_path):
    def problem(**keys):
        path = tmp_path / "x.py"
        path.write_text(f"sft = {VALUES | keys!r}")
        with pytest.raises(ValueError) as error:
            plan.make("sft", str(path), [], "h100", 1)
        return str(error.value)

    assert "data 'a.jsonl': cannot be counted here" in problem()
    refused = "model_path='nobody/nothing': not on this machine; expected a folder (its config.json is enough), or one of"
    assert refused in problem(model_path="nobody/nothing")


@pytest.mark.slow
def test_evaluations_are_counted():
    """Before the first step, every 10th of 25, and after the last: 1 + 2 + 1; as many in 30 steps, whose last
    is a 10th.
    """
    shape, work = SHAPE, DOCUMENT.times(2)
    keys = dict(
        data={"a.jsonl": 1.0}, data_eval=0.5, max_steps=25, num_epochs=100, global_batch_size=2, eval_every=10
    )
    config = SFTConfig(**VALUES | keys)
    for steps in (25, 30):
        planned = plan.Plan(
            "sft", dataclasses.replace(config, max_steps=steps), "h200", 1, (1.0, 1.0), shape, work, work
        )
        assert planned.seconds["evaluation"] == pytest.approx(4 * forward_seconds(work, shape, GPUS["h200"]))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.slow
def test_what_to_turn_when_it_does_not_fit_in_order():
    config = SFTConfig(**VALUES)
    work = DOCUMENT.times(200)
    small = plan.Plan("sft", config, "a40", 1, (1.0, 2.0), SHAPE, work, None)
    assert not small.fits
    names, plans = zip(*plan.remedies(small))
    assert names == ("--recompute=half", "--recompute=full", "--tokens_per_microbatch=4096", "--moments=bf16", "--gradients=bf16",
                     "or --lora_rank=64 --lora_alpha=128 --moments=fp32 --gradients=fp32",
                     "or --count 4 --moments=fp32 --gradients=fp32")  # fmt: skip
    assert [p.fits for p in plans] == [False] * 5 + [True, True]
    assert all(a.gib > b.gib for a, b in zip((small, *plans), plans[:5]))
    assert plans[4].gib == pytest.approx(small.gib - 6 * 8_030_261_248 / GIB - 22.11, abs=0.02), (
        "6 bytes a parameter, and activations"
    )
    assert (
        plans[-1].count == 4 and plans[-1].usd_per_hour == (4.0, 8.0) and plans[-1].config.moments == "fp32"
    )
    text = plan.describe(small, "", "")
    assert f"does not fit, {small.gib - 44.4:.1f} GiB too much" in text and "if it did fit" in text
    assert all(name in text and f"{p.gib:7.2f} GiB" in text for name, p in zip(names, plans))


@pytest.mark.parametrize(
    ("count", "keys"),
    [(1, []), (8, ["--moments=bf16"]), (4, ["--sharding=optimizer", "--recompute=full"])],
)
def test_what_to_turn_can_be_typed(count, keys):
    """tulu10 on A40s: with the arguments of its lines, the command plans what the lines promise."""

    def planned(count, keys):
        return plan.make("sft", str(CONFIGS / "tulu10.py"), keys, "a40", count)[0]

    tried = plan.remedies(planned(count, keys))
    assert tried[-1][1].fits
    for what, promised in tried:
        typed = what.removeprefix("or ").split()
        more = [word for word in typed if "=" in word]
        cards = int(typed[1]) if typed[0] == "--count" else count
        assert planned(cards, keys + more).gib == pytest.approx(promised.gib), what
        if not what.startswith("or "):
            keys = keys + more


def test_bf16_that_was_asked_for_is_taken_back_last():
    """tulu10 on eight L40S: recomputing all fits in bf16, and takes 2.0 h where full sharding takes 3.6."""
    keys = ["--moments=bf16", "--gradients=bf16"]
    tried = plan.remedies(plan.make("sft", str(CONFIGS / "tulu10.py"), keys, "l40s", 8)[0])
    assert [what for what, _ in tried] == ["--recompute=half", "--recompute=full"] and tried[-1][1].fits


def test_the_first_knob_that_is_enough_is_the_last_one_named():
    large = plan.Plan("sft", SFTConfig(**VALUES), "h200", 1, (1.0, 1.0), SHAPE, DOCUMENT.times(200), None)
    ((name, half),) = plan.remedies(large)
    assert (large.fits, name, half.fits, half.config.recompute) == (False, "--recompute=half", True, "half")


def test_a_pair_of_longest_answers_bounds_the_micro_batch():
    config = DPOConfig(**VALUES | dict(tokens_per_microbatch=16384, max_seq_len=2048, recompute="full"))
    small = plan.Plan("dpo", config, "rtx4090", 1, (1.0, 1.0), SHAPE, PAIR.times(100), None)
    assert plan.remedies(small)[0][0] == "--tokens_per_microbatch=4096"


# ---------------------------------------------------------------- the command line


@pytest.fixture
def no_gpu(monkeypatch):
    """Whoever asks for a GPU fails."""

    def asked(*_):
        raise AssertionError("a plan asked for a GPU")

    for name in ("is_available", "device_count", "_lazy_init", "set_device"):
        monkeypatch.setattr(torch.cuda, name, asked)


def test_a_model_in_the_hubs_cache_is_found(monkeypatch, tmp_path):
    """By its branch or its commit; a name that is not there costs no import of an HTTP client
    (test_config.py).
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    snapshot = tmp_path / "models--org--name/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text(commit)
    assert plan._folder("org/name") == plan._folder(f"org/name@{commit}") == snapshot
    assert (
        plan._folder("org/name@other") is None
        and plan._folder("org/other") is None
        and plan._folder("a b") is None
    )


@pytest.mark.slow
def test_a_training_script_plans_without_gpu_process_group_or_run_folder(
    no_gpu, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = [
        str(CONFIGS / "tulu10.py"),
        "--plan",
        "--gpu",
        "a100-80",
        "--count",
        "8",
        "--usd-per-hour",
        "16",
        "--recompute=full",
    ]
    assert train_dpo.main(argv) == 0
    assert not dist.is_initialized() and not torch.cuda.is_initialized() and not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    assert (
        "dpo on 8 x a100-80" in text
        and "8,030,261,248 parameters" in text
        and "recompute=full" in text
        and "26,598 pairs" in text
    )
    *terms, total = [float(number) for number in re.findall(r"^ +([\d.]+) GiB", text, re.M)]
    assert len(terms) >= 6 and sum(terms) == pytest.approx(total, abs=0.05)
    hours, usd = re.search(
        r"^total +([\d.]+) h, \$([\d.]+), at \$16.00 an hour for 8 x a100-80$", text, re.M
    ).groups()
    assert float(usd) == pytest.approx(16 * float(hours), abs=0.1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["x.py", "y.py", "--gpu", "h100"], "expected one config file"),
        ([str(CONFIGS / "tulu10.py")], "gpu=None (--gpu): expected one of rtx3090"),
        ([str(CONFIGS / "tulu10.py"), "--gpu", "h10"], "did you mean 'h100'"),
        ([str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--count", "0"], "count=0: expected at least 1"),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--count", "two"],
            "argument --count: invalid int value: 'two'",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--usd-per-hour", "-1"],
            "usd-per-hour=-1.0: expected a price",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--beat=1"],
            "unknown key 'beat', did you mean 'beta'",
        ),
        ([str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--count", "129"], "cannot be formed on 129 ranks"),
        (
            [
                str(CONFIGS / "tulu10.py"),
                "--gpu",
                "h100",
                "--count",
                "2",
                "--moments=bf16",
                "--sharding=full",
            ],
            "expected sharding='optimizer'",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--count", "8", "--sharding=hybrid"],
            "sharding='hybrid' on 8 ranks, 8 a machine: expected several machines",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--moments=bf16", "--sharding=hybrid"],
            "sharding='hybrid': FSDP2 keeps both in float32",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "a100-80", "--precision=fp8"],
            "precision='fp8' on a100-80, 8.0: expected a GPU of",
        ),
        (
            [str(CONFIGS / "tulu10.py"), "--gpu", "h100", "--max_seq_len=200000", "--tokens_per_microbatch=400000"],
            "max_seq_len=200000: expected at most the model's max_position_embeddings=131072",
        ),
    ],
)
def test_wrong_command_lines_are_refused(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.main("dpo", ["--plan", *argv])


@pytest.mark.slow
def test_the_prices_in_aqi_md_are_the_plans(capsys):
    """Of the rungs that a verdict may lead to: dollars from SFT to the sweep, on eight H100s."""
    text = (ROOT / "docs/aqi.md").read_text()
    for name, said in (
        ("tulu_full", "{hours:.1f} hours\nand {} to {} dollars"),
        ("tulu_full_lora", "`tulu_full_lora` {} to {}"),
        ("tulu10", "`tulu10` {} to {}"),
    ):
        plan.ladder([str(CONFIGS / f"{name}.py"), "--gpu", "h100", "--count", "8"])
        (total,) = re.findall(r"total +([\d.]+) +\$([\d.]+)-([\d.]+)", capsys.readouterr().out)
        hours, low, high = map(float, total)
        assert said.format(round(low), round(high), hours=hours) in text


def test_the_steering_stages_are_planned():
    """Both measured on an H200 with 7,000 prompts: the sweep's own five lambdas 19.86 s, 3.4 s of them the
    bootstrap; 99 null directions of one kind 151.7 s at lambdas 0 and 1, where one pass took 9.84 s. A kind
    is one pass and 5 of 32 blocks for each direction and once for lambda 0: 1 + 100 * 5 / 32 = 16.6 passes.
    """
    config = types.SimpleNamespace(
        mode="full", count=100, lambdas=(0, 0.25, 0.5, 0.75, 1), layers=5, max_text_tokens=400
    )
    passes = plan.steering_passes(config, SHAPE, GPUS["h200"], 500, 99, False)
    curve, kind = 1 + 5 * 5 / 32, 1 + 100 * 5 / 32
    tokens, seconds, width = passes["sweep"]
    assert (tokens, width) == (pytest.approx(7000 * 60 * (2 + curve + 2 * kind)), 2)
    one_pass = seconds / (2 + curve + 2 * kind)
    assert one_pass == pytest.approx(9.84, rel=0.055)
    assert one_pass * curve == pytest.approx(19.86 - 3.4, rel=0.05)
    assert one_pass * kind == pytest.approx(151.7, rel=0.05)
    extracted = 2 * 2 * 125 * 400  # two models, both texts of 125 pairs, cut at 400 tokens
    assert passes["extract"] == (extracted, extract_seconds(SHAPE, extracted, H200), 4)
    *_, width = plan.steering_passes(config, SHAPE, GPUS["a40"], 500, 99, False)["extract"]
    assert width == 2, "fp32 would take more than half of 44.4 GiB"
    assert {mode: aqi.MODES[steer.PROMPT_MODES[mode]] for mode in plan.PROMPTS} == plan.PROMPTS


def test_null_directions_at_a_lambda_other_than_0_are_planned_at_both_ends():
    config = types.SimpleNamespace(lambdas=(0.5, 1), layers=8)
    assert plan.sweep_forwards(config, 32, 19, False) == 2 + (1 + 2 / 4) + 2 * (1 + 38 / 4)
    deeper = types.SimpleNamespace(lambdas=(0, 1), layers=5)
    expected = 2 + (1 + 2) + 2 * (1 + 20)
    assert plan.sweep_forwards(deeper, 4, 19, False) == expected, "all blocks of a small model"


def test_the_oracle_is_planned():
    """Half of the prompts: once whole, and 21 times three passes through 8 of 32 blocks. The other half: once
    whole, and those blocks for each of two lambdas. So 1 / 2 + 63 / 8 + 1 / 2 + 2 / 8 passes over all.
    """
    config = types.SimpleNamespace(lambdas=(0, 1), layers=8)
    more = plan.sweep_forwards(config, 32, 19, True) - plan.sweep_forwards(config, 32, 19, False)
    assert more == 1 / 2 + 63 / 8 + 1 / 2 + 2 / 8


@pytest.mark.parametrize(
    "gpu, runs",
    [("rtx3090", ""), ("a40", ""), ("l40s", "fp8"), ("rtx5090", "fp8 flash4"), ("h100", "fp8 flash4")],
)
def test_a_key_that_needs_a_newer_card_is_refused(gpu, runs):
    """flash4's backward does not compile below 9.0, float8's matmuls do not below 8.9."""
    for precision, attention, word in (("fp8", "flash2", "fp8"), ("bf16", "flash4", "flash4")):
        config = types.SimpleNamespace(precision=precision, attention=attention)
        refused = pytest.raises(
            UserError, match=f"='{word}' on {gpu}, .*expected a GPU of compute capability"
        )
        with contextlib.nullcontext() if word in runs else refused:
            check_capability(config, GPUS[gpu].capability, gpu)


def test_a_plan_needs_no_package_of_the_run(monkeypatch):
    monkeypatch.setattr("plumbing.config._is_installed", lambda module: False)
    keys = ["--attention=flash4", "--tensorboard=true"]
    planned, *_ = plan.make("sft", str(CONFIGS / "tulu10.py"), keys, "h100", 8)
    with pytest.raises(UserError, match="'flash4': expected the package flash-attn-4, not installed here"):
        check_packages(planned.config)
    with pytest.raises(UserError, match="='flash4' on a40, 8.6: expected a GPU of compute capability 9.0"):
        plan.make("sft", str(CONFIGS / "tulu10.py"), keys, "a40", 8)


@pytest.mark.slow
def test_the_ladder_is_one_line_per_config_and_stage(no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan.ladder([*map(str, sorted(CONFIGS.glob("*.py"))), "--gpu", "h100", "--count", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = {
        tuple(re.search(r"(\w+)\.py +(sft|dpo) ", line).groups()): line
        for line in lines
        if re.search(r"\.py +(sft|dpo) ", line)
    }
    trained = [path.stem for path in CONFIGS.glob("*.py") if path.stem != "pairs"]
    assert set(stages) == {(name, stage) for name in trained for stage in ("sft", "dpo")}
    assert [line for line in lines if "pairs.py" in line and line.endswith("not a training config")]
    assert "error: model_path='runs/smol/base': not on this machine" in stages["smol", "sft"]
    of_tulu10 = [line.split() for line in lines if line.startswith(str(CONFIGS / "tulu10.py"))]
    assert [cells[1] for cells in of_tulu10] == ["sft", "dpo", "extract", "sweep", "total"]
    hours = [float(next(cell for cell in cells if re.fullmatch(r"\d+\.\d\d", cell))) for cells in of_tulu10]
    assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.02)
    assert (
        f"{26_598 * 1018:,}*" in stages["tulu10", "dpo"]
        and stages["tulu10", "dpo"].endswith("fits")
        and "$" in stages["tulu10", "dpo"]
    )


@pytest.mark.slow
def test_the_ladder_of_docs_is_planned():
    """Hours and dollars of every rung with all its stages, each on one of the three cards."""
    text = (CONFIGS.parent / "docs/recipes.md").read_text()
    rows = re.findall(r"^\| `(configs/\w+\.py)` \| (\d) \| (.+?) \| (.+?) \| (.+?) \| .+ \|$", text, re.M)
    assert len(rows) == 6
    for place, (path, count, *cells) in enumerate(rows):
        gpu, cell = ("a40", "a100-80", "h100")[place % 3], cells[place % 3]
        lines = plan._rows(
            str(CONFIGS.parent / path), types.SimpleNamespace(gpu=gpu, count=int(count), usd_per_hour=None)
        )
        assert cell == f"{lines[-1][5]} h, {lines[-1][6]}", (path, gpu)
