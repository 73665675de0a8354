"""plumbing/files.py and tensors.py: tables, hashes, files whose every bit counts."""

import os

import pytest
import torch

from plumbing.files import UserError, publish, read_verified_json, table, verify_hashes, write_hashes
from plumbing.tensors import is_finite, read_verified, write_verified


def test_table_aligns_words_left_and_numbers_right():
    rows = [["sft", "12", "1,000", "fits"], ["dpo_lora", "3", "7", "does not"]]
    assert table(["run", "steps", "tokens", "memory"], rows, left=(0, -1)) == (
        "run       steps  tokens  memory\n"
        "sft          12   1,000  fits\n"
        "dpo_lora      3       7  does not"
    )  # fmt: skip
    assert table(["a", "b"], []) == "a  b"


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@pytest.mark.slow
def test_hashes_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "tokenizer.json").write_text("{}")
    verify_hashes(tmp_path)  # without hashes.json: a folder of others
    write_hashes(tmp_path)
    (tmp_path / "README.md").write_text("added later, not listed")
    verify_hashes(tmp_path)
    for name in ("config.json", "hashes.json"):
        whole = (tmp_path / name).read_bytes()
        for bit in range(0, 8 * len(whole), 5):
            (tmp_path / name).write_bytes(flipped(whole, bit))
            with pytest.raises(UserError, match=f"{tmp_path}.*(damaged|missing)"):
                verify_hashes(tmp_path)
        (tmp_path / name).write_bytes(whole)
    verify_hashes(tmp_path)
    (tmp_path / "aqi.json").write_text('{"verdicts": []}')
    assert read_verified_json(tmp_path / "aqi.json") == {"verdicts": []}  # not listed
    write_hashes(tmp_path, ["aqi.json"])
    assert read_verified_json(tmp_path / "aqi.json") == {"verdicts": []}
    (tmp_path / "aqi.json").write_text('{"verdicts": [1]}')
    with pytest.raises(UserError, match="aqi.json: damaged"):
        read_verified_json(tmp_path / "aqi.json")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="missing tokenizer.json, which hashes.json lists"):
        verify_hashes(tmp_path)


@pytest.mark.slow
def test_every_bit_of_a_verified_file_counts(tmp_path):
    path = tmp_path / "cache/table.safetensors"
    tensors = {
        "logps": torch.tensor([[-1.5, -2.0], [float("nan"), -3.0]]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    write_verified(path, tensors)
    assert [file.name for file in path.parent.iterdir()] == ["table.safetensors"]
    found = read_verified(path)
    assert torch.equal(found["half"], tensors["half"])
    assert torch.equal(found["logps"].view(torch.int32), tensors["logps"].view(torch.int32))
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(UserError, match=f"{path}: (damaged|truncated)"):
            read_verified(path)


def test_is_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for bad in (float("nan"), float("inf"), -float("inf")):
            tensor = torch.zeros(5, 7, dtype=dtype)
            assert is_finite(tensor)
            tensor[3, 6] = bad
            assert not is_finite(tensor)
    assert is_finite(torch.full((2,), 3e38)) and is_finite(torch.zeros(0, 4)) and is_finite(torch.tensor(3))


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Every file, then the folder, then the rename, then the parent: what a power cut may find under the name
    is whole.
    """
    folder, calls = tmp_path / ".tmp_final", []
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    fsync, rename = os.fsync, type(folder).rename

    def renamed(self, target):
        calls.append(f"rename to {target.name}")
        return rename(self, target)

    def synced(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(type(folder), "rename", renamed)
    publish(folder, tmp_path / "final")
    assert calls == ["tokenizer.json", ".tmp_final", "rename to final", tmp_path.name]
