"""Which device a process computes on, and whether torch can use the GPU that is there."""

import os
import re
from pathlib import Path

import torch

from plumbing.files import UserError

DRIVER_VERSION = Path("/proc/driver/nvidia/version")  # there while NVIDIA's driver is loaded
DEVICE_NODES = Path("/dev")


def pick_device(local_rank=0):
    """This rank's GPU, or the CPU of a machine without one.

    UserError where there is a GPU that torch cannot use: a run that silently takes the CPU needs weeks.
    """
    if torch.version.hip:
        raise UserError(
            "torch is built for ROCm, which nothing here was tried on: expected a build for CUDA or CPUs"
        )
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"rank {local_rank} of this machine has no GPU: expected --nproc-per-node {count}"
            )
        check_architecture(torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list())
        return torch.device("cuda", local_rank)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if has_nvidia_gpu() and not hidden:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        raise UserError(
            f"torch {torch.__version__} (built for {build}) cannot use the NVIDIA GPU here, whose driver is "
            f"{driver_version()}: expected a newer driver, a torch for the CUDA that `nvidia-smi` names, or "
            "CUDA_VISIBLE_DEVICES='' to compute on the CPU"
        )
    return torch.device("cpu")


def check_architecture(capability, built_for):
    """UserError for a GPU older than all that torch was compiled for.

    Its kernels would fail at the first launch.

    capability (major, minor); built_for: as torch.cuda.get_arch_list, for example ["sm_75", "sm_90",
    "compute_120"].
    """
    numbers = [int(re.sub(r"\D", "", name)) for name in built_for]
    if numbers and 10 * capability[0] + capability[1] < min(numbers):
        found = f"{capability[0]}.{capability[1]}"
        oldest = f"{min(numbers) // 10}.{min(numbers) % 10}"
        raise UserError(
            f"this GPU has compute capability {found}, torch {torch.__version__} needs "
            f"{oldest}: expected a newer GPU, or a torch for an older CUDA than {torch.version.cuda}"
        )


def check_bf16(capability):
    """UserError for a GPU without bf16 and flash attention; capability (major, minor)."""
    if capability < (8, 0):
        found = f"{capability[0]}.{capability[1]}"
        raise UserError(f"this GPU has compute capability {found}: expected 8.0 (Ampere) or newer, for bf16")


def has_nvidia_gpu():
    """Whether NVIDIA's driver is loaded and this process may see a GPU of it (a container may not)."""
    return DRIVER_VERSION.exists() and any(DEVICE_NODES.glob("nvidia[0-9]*"))


def driver_version():
    """The driver's version as its own file says it: 550.54.15."""
    return re.search(r"\d+\.\d+(\.\d+)?", DRIVER_VERSION.read_text()).group()
