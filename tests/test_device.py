"""Which device is taken, with a faked torch, driver and /dev."""

import pytest
import torch

from plumbing import device
from plumbing.files import UserError

DRIVER = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC 2024
GCC version:  gcc version 11.4.0
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU; machine(node=True, ..) adds what is given."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(device, "DEVICE_NODES", tmp_path)

    def build(driver=False, node=False, cuda=None, hip=None, capability=None, built_for=()):
        if driver:
            (tmp_path / "version").write_text(DRIVER)
        if node:
            (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))

    return build


def test_a_machine_without_a_gpu_computes_on_its_cpu(machine):
    machine()
    assert device.pick_device() == torch.device("cpu")
    machine(driver=True)  # a container on a GPU machine that was given none
    assert device.pick_device() == torch.device("cpu")


CUDA_13 = {"driver": True, "node": True, "cuda": "13.0"}


def test_a_gpu_is_taken(machine):
    machine(**CUDA_13, capability=(8, 6), built_for=["sm_75", "sm_80", "sm_90", "compute_120"])
    assert device.pick_device(3) == torch.device("cuda", 3)


def test_more_ranks_than_gpus_are_refused(machine):
    machine(**CUDA_13, capability=(9, 0), built_for=["sm_90"])
    with pytest.raises(UserError, match="rank 4 of this machine has no GPU: expected --nproc-per-node 4"):
        device.pick_device(4)


@pytest.mark.parametrize("cuda, build", [("13.0", "CUDA 13.0"), (None, "CPUs only")])
def test_a_gpu_that_torch_cannot_use_is_refused(machine, monkeypatch, cuda, build):
    machine(driver=True, node=True, cuda=cuda)
    with pytest.raises(
        UserError, match=rf"built for {build}\) cannot use the NVIDIA GPU here, whose driver is 470.256.02"
    ):
        device.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.pick_device() == torch.device("cpu")


def test_a_gpu_older_than_torch_is_refused(machine):
    """A V100 under a torch for CUDA 13."""
    machine(**CUDA_13, capability=(7, 0), built_for=["sm_75", "sm_80", "sm_100", "compute_120"])
    with pytest.raises(
        UserError, match=r"compute capability 7.0, torch .* needs 7.5: .* older CUDA than 13.0"
    ):
        device.pick_device()


def test_a_gpu_without_bf16_is_refused():
    """A T4 is 7.5."""
    device.check_bf16((8, 0))
    with pytest.raises(UserError, match=r"7.5: expected 8.0 \(Ampere\) or newer, for bf16"):
        device.check_bf16((7, 5))


def test_rocm_is_refused(machine):
    machine(hip="6.4", capability=(9, 4))
    with pytest.raises(UserError, match="built for ROCm, which nothing here was tried on"):
        device.pick_device()
