"""Compile every Triton launch for a GPU that is not there, for test_triton.py: `compile_kernels.py ARCH...`
prints JSON.

Triton asks a driver which GPU to compile for; the one below only names it. warmup=True compiles and does not
launch. Prints {arch: [{kernel, shared, spilled (bytes), registers, threads}]}, of the metadata and of ptxas's
own log; and "large tile", a kernel whose tile does not fit.
"""

import contextlib
import functools
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # an empty one: what comes from a cache has no log

import torch
import triton
from launches import LLAMA_8B, empty, kernel_names, launch_all, launch_float8, launch_tsne
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import triton_block


class NamedTarget:
    """A driver that names a target. The device's number is the architecture's: Triton keeps one cache a
    device."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, grid, found):
    """What `kernel[grid]` is here: a launch that compiles, and notes what the compiler says."""

    def launch(*args, **options):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        if not log.getvalue():  # compiled already
            return
        spilled = re.findall(r"(\d+) bytes spill stores", log.getvalue())
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        found.append(
            {
                "kernel": kernel.__name__,
                "shared": compiled.metadata.shared,
                "spilled": max(map(int, spilled)),
                "registers": max(map(int, registers)),
                "threads": 32 * compiled.metadata.num_warps,
            }
        )

    return launch


def compile_for(arch, launch):
    """The rows of what launch() launches."""
    found = []
    triton.runtime.driver.set_active(NamedTarget(arch))
    JITFunction.__getitem__ = functools.partialmethod(compile_only, found=found)
    launch()
    return found


def launch_everything(arch):
    # But for e4m3, 89 is as 80: each kernel of 16 bits takes the same shared memory and at most 7 registers more.
    if arch != 89:
        launch_all(LLAMA_8B, torch.bfloat16)
        launch_tsne(LLAMA_8B)
    if arch == 90:  # what a kernel takes in float32 hardly depends on the architecture
        launch_all(LLAMA_8B, torch.float32)
    if arch >= 89:  # e4m3 exists from Ada on
        launch_float8(LLAMA_8B)


def launch_large_tile():
    triton_block._TILE = (512, 128)
    triton_block.quantize_transposed(empty(4096, 4096), empty(4096, dtype=torch.float32))


def main(architectures):
    triton.knobs.nvidia.dump_ptxas_log = True
    # Line numbers take a tenth of the time, and no register.
    triton.knobs.compilation.disable_line_info = True
    compiled = {}
    for arch in map(int, architectures):
        compiled[arch] = compile_for(arch, functools.partial(launch_everything, arch))
        assert arch < 90 or {row["kernel"] for row in compiled[arch]} == kernel_names()
    compiled["large tile"] = compile_for(90, launch_large_tile)
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
