"""A tiny base model, its tokenizer and data on disk, and whole runs of the training scripts on any number of
processes.

The processes are forked from one server that has imported everything already (forks.py): a run of 8 ranks
costs seconds, not 8 imports of torch. They do what torchrun's workers do (env:// rendezvous through a store
that the parent holds); test_runs.py also starts the real torchrun.
"""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import forks
import tokenizers
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import random_llama, tiny_config, whole

import train_dpo
import train_sft
from data import load_preferences, load_sft
from plumbing import checkpoint, logbook, parallel
from plumbing.config import load
from plumbing.tokenizer import Tokenizer
from training import load_model, read_model_config

ROOT = Path(__file__).parent.parent
# Variables with which torchrun's own ranks are forked too. That script's first line looks for python3 in PATH.
FORKED_RANKS = {
    "PYTHON_EXEC": str(ROOT / "tests/forked_python.py"),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
WORDS = "the a cat dog runs fast slow kind mean help please sorry thanks never always good bad answer question tell me about".split()
SECONDS = 300  # a run that takes longer hangs: it is killed, and its test fails by the exit code
NUM_ROWS = 35  # with 16 a step: 16, 16 and 3, the last one fewer than 4 or 8 ranks


def make_world(root):
    """root/base (a Llama of 2 layers, tied embeddings), root/sft.jsonl, root/pref.jsonl; rows of very unequal
    lengths.
    """
    root, rng = Path(root), random.Random(0)
    (root / "base").mkdir(parents=True)
    write_tokenizer(root / "base", rng)
    vocab_size = Tokenizer.from_dir(root / "base").vocab_size
    config = tiny_config(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, head_dim=8, tie_word_embeddings=True
    )
    write_model(root / "base", random_llama(config, std=0.1))

    def words(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    def turns(*contents):
        return [
            {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents)
        ]

    sft = [
        {"messages": turns(words(1, 5), words(1, 12), *([words(1, 3), words(1, 5)] if i % 3 == 0 else []))}
        for i in range(NUM_ROWS)
    ]
    pairs = [
        {"prompt": words(1, 5), "chosen": "good " + words(1, 8), "rejected": "bad " + words(1, 14)}
        for _ in range(NUM_ROWS)
    ]
    write_rows(root / "sft.jsonl", sft)
    write_rows(root / "pref.jsonl", pairs)
    return root


def write_tokenizer(folder, rng):
    """A byte-level BPE of WORDS with a BOS and an EOS."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    text = [" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(100)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    core.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_model(folder, model):
    weights = {
        name: param.detach().clone() for name, param in model.named_parameters()
    }  # a tied lm_head is not among them
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))


def change_weights(folder, change):
    """change({name: tensor}) edits the weights of a model folder in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def killed_before(number):
    """End the block before its fsync, rename or unlink of that number, counted from 1, as a kill would.

    Yields a list of the calls, which has fewer entries than `number` where the block came to its end.
    """
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        stack.enter_context(suppress(KeyboardInterrupt))
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "unlink")):
            stack.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
        yield calls


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(folder, world, **changes):
    """folder/config.py for both stages, run folders folder/sft and folder/dpo; `changes` may hold common
    keys, or dicts sft= and dpo=.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sft = dict(data={f"{world}/sft.jsonl": 1.0}, lr=1e-2, out_dir=f"{folder}/sft") | changes.pop("sft", {})
    dpo = dict(data={f"{world}/pref.jsonl": 1.0}, lr=1e-2, out_dir=f"{folder}/dpo") | changes.pop("dpo", {})
    shape = dict(
        max_seq_len=64,
        tokens_per_microbatch=192,
        global_batch_size=16,
        num_epochs=2,
        max_steps=4,
        warmup_steps=1,
        precision="fp32",
    )
    common = shape | dict(model_path=f"{world}/base", cache_dir=f"{folder}/cache", log_every=1) | changes
    path = folder / "config.py"
    path.write_text(f"common = {common!r}\nsft = {sft!r}\ndpo = {dpo!r}\n")
    return path


def plain_adamw(model, weight_decay):
    """torch's AdamW, every number said, with decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Outcome:
    """What became of a run: exit codes and printed text, one per rank."""

    codes: list
    out: list
    err: list

    def ok(self):
        assert not any(self.codes), (self.codes, *self.err)
        return self


def launch(stage, config, *args, ranks=1, machine=None, prepare=None, logs="logs"):
    """Run train_<stage>.py CONFIG args on so many processes; prepare() is called in each first. Returns its
    Outcome.
    """
    work = partial(_train, stage, [str(config), *args], prepare)
    return spawn(work, Path(config).parent / logs, ranks, machine)


def spawn(work, logs, ranks=1, machine=None):
    """Call work() -> exit code in so many processes that parallel.init joins to a group; work must be
    picklable. Returns its Outcome. machine: the processes of each machine; None: all are on one.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs.mkdir(exist_ok=True)
    processes = []
    for rank in range(ranks):
        arguments = rank, ranks, machine or ranks, store.port, logs, work
        processes.append(forks.Process(partial(_rank, *arguments)))
    codes = [process.wait(SECONDS) for process in processes]
    out, err = ([(logs / f"{rank}.{kind}").read_text() for rank in range(ranks)] for kind in ("out", "err"))
    return Outcome(codes, out, err)


def run_script(arguments, folder, environment):
    """`python ARGUMENTS` in that folder, as subprocess.run would give it back, from a process that has imported
    torch and the repository already.
    """
    with tempfile.TemporaryDirectory() as logs:
        work = partial(script_main, arguments, folder, environment)
        code = forks.Process(partial(_rank, 0, 1, 1, None, Path(logs), work)).wait(SECONDS)
        out, err = ((Path(logs) / f"0.{kind}").read_text() for kind in ("out", "err"))
    return subprocess.CompletedProcess(arguments, code, out, err)


def interpreted(script):
    """What tests/SCRIPT prints as JSON under Triton's interpreter."""
    done = run_script([str(ROOT / "tests" / script)], ROOT, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_torchrun(arguments, folder, environment):
    """`torchrun ARGUMENTS`, as run_script: torchrun's parser, and the ranks that it would start."""
    # Not above: the import takes a third of a second.
    from torch.distributed.run import get_args_parser

    typed = get_args_parser().parse_args(arguments)
    script = [typed.training_script, *typed.training_script_args]
    with tempfile.TemporaryDirectory() as logs:
        done = spawn(partial(script_main, script, folder, environment), Path(logs), int(typed.nproc_per_node))
    code = int(any(done.codes))
    return subprocess.CompletedProcess(arguments, code, "".join(done.out), "".join(done.err))


def script_main(arguments, folder, environment):
    """Become `python ARGUMENTS` in that folder; returns when the script has ended."""
    os.chdir(folder)
    os.environ |= environment
    sys.path.insert(0, str(folder))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def _rank(rank, ranks, machine, port, logs, work):
    for name, stream in (("out", 1), ("err", 2)):
        # Appended: torchrun and its ranks write to one file.
        how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        os.dup2(os.open(logs / f"{rank}.{name}", how), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if ranks >= 2 * len(cores):
        # gloo's event loop spins while another thread of its rank holds a lock and waits for a core. Ranks that
        # keep to one core each take a third less CPU time.
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_RANK": str(rank % machine), "LOCAL_WORLD_SIZE": str(machine)}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    return work()


def _train(stage, argv, prepare):
    sys.argv = [f"train_{stage}.py", *argv]
    if prepare:
        prepare()
    return parallel.run({"sft": train_sft.main, "dpo": train_dpo.main}[stage], argv)


def signal_after(step, number, rank=0):
    """Send this process a signal once `step` is logged, before it is saved."""
    original = logbook.Logbook.step

    def hooked(self, done, *args):
        original(self, done, *args)
        if done == step and self.world.rank == rank:
            os.kill(os.getpid(), number)

    logbook.Logbook.step = hooked


def save_at_once(kill_after=None):
    """Make every save wait for its writer, so that what a kill leaves behind does not depend on timing; kill
    once that step is saved.
    """
    save = checkpoint.Checkpointer.save

    def hooked(self, step, *args):
        save(self, step, *args)
        self.wait()
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpointer.save = hooked


# ---------------------------------------------------------------- what a run left


def metrics(run, kind="loss"):
    """The lines of metrics.jsonl that have the key `kind`: training steps, or "eval/loss"."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def trace(run, *names):
    """(steps, len(names)) float64 of metrics per step."""
    return torch.tensor([[line[name] for name in names] for line in metrics(run)], dtype=torch.float64)


def final_weights(run):
    return load_file(Path(run) / "final/model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


# ---------------------------------------------------------------- a stage without its loop


def stage_parts(stage, config_path, ranks, *args):
    """(config, training data, sharded model) of a stage, as its main() makes them."""
    config = load(stage, [str(config_path), *args])
    tokenizer = Tokenizer.from_dir(config.model_path)
    model_config = read_model_config(config, config.model_path, tokenizer, ranks.device)
    data, _ = {"sft": load_sft, "dpo": load_preferences}[stage](config, tokenizer, ranks.say)
    return config, data, load_model(config, Path(config.model_path), model_config, ranks.device)


class SilentLog:
    """Where a pass wants a Logbook for its progress bar."""

    def progress(self, label, items):
        return items


def whole_gradients(model):
    """{name: gradient} with all ranks' rows, and none left on the model."""
    grads = {}
    for name, shard in parallel.shards(model).items():
        if shard.grad is not None:
            grads[name], shard.grad = parallel.of_all_ranks(model, name, shard.grad), None
    return whole(grads)


def assert_gradients_equal(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    scale = max(gradient.abs().max().item() for gradient in b.values())
    assert 0 < scale and largest_difference(a, b) <= tolerance * scale


def save_gradients(step, config_path, ids, path):
    """For spawn: (loss, gradients) = step(config_path, ids, ranks), which rank 0 writes to `path`."""
    ranks = parallel.init()
    loss, gradients = step(config_path, ids, ranks)
    if ranks.main:
        save_file(gradients | {"loss": torch.tensor(loss, dtype=torch.float64)}, path)
    parallel.shutdown()
    return 0
