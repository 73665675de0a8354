"""safetensors files, written tensor by tensor and read by rows: one tensor is in memory at a time."""

import hashlib
import json
import math
import os
import shutil
import struct

import torch
from safetensors import SafetensorError, safe_open

from plumbing.files import UserError, remove_leftovers, sync, temporary_beside

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(path, tensors, read, metadata=None):
    """Write one safetensors file and fsync it; returns its sha256 (hex).

    8-byte length, JSON header, raw bytes. tensors: {name: (dtype, shape)}, wider dtypes first. read(name) is
    called in that order, its result cast and dropped: one tensor is in memory, where the library's own writer
    needs all of them. OSError (disk full, quota) names the path and the bytes needed.
    """
    header = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        assert end % dtype.itemsize == 0, f"{name}: unaligned"
        start = end
        end += num_bytes(dtype, shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for data in _pieces(head, tensors, read):
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
    except OSError as error:
        size = 8 + len(head) + end
        free = shutil.disk_usage(path.parent).free
        path.unlink(missing_ok=True)  # a torn file is of no use, and its space may be needed to go on
        needs = f"{size:,} bytes needed, {free:,} free; what was saved earlier is untouched"
        raise OSError(error.errno, f"{error.strerror}: {needs}", str(path)) from error


def _pieces(head, tensors, read):
    yield struct.pack("<Q", len(head)) + head
    for name, (dtype, shape) in tensors.items():
        yield _raw_bytes(read(name), dtype, shape)


def _raw_bytes(tensor, dtype, shape):
    assert tensor.shape == torch.Size(shape), (tensor.shape, shape)
    tensor = tensor.detach().to(dtype).cpu().contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data  # through uint8: numpy has no bfloat16


def num_bytes(dtype, shape):
    """Bytes of a tensor of that dtype and shape."""
    return dtype.itemsize * torch.Size(shape).numel()


def is_finite(tensor):
    """Whether no element is NaN or infinite: one pass without a temporary."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if any element is
    return math.isfinite(low) and math.isfinite(high)


def write_verified(path, tensors):
    """Write {name: tensor} so that read_verified finds any change of a bit.

    By a rename when all of it is on the disk. The sha256 in the header covers the tensors and the header's
    other entries. For small files: they are hashed first.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    metadata = {"format": "pt", "sha256": _content_hash(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_beside(path)
    write_safetensors(temporary, specs, tensors.get, metadata)
    temporary.rename(path)
    sync(path.parent)


def read_verified(path):
    """{name: tensor} of write_verified.

    UserError when a bit differs from what was written, or no hash is there.
    """
    file = open_safetensors(path)
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    if file.metadata() != {"format": "pt", "sha256": _content_hash(tensors)}:
        problem = f"{path}: damaged, or not written by this project"
        raise UserError(f"{problem}: its sha256 is not the one in its header; delete it")
    return tensors


def _content_hash(tensors):
    """sha256 (hex) of names, dtypes, shapes and bytes."""
    about = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([about, {"format": "pt"}], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(_raw_bytes(tensors[name], tensors[name].dtype, tensors[name].shape))
    return digest.hexdigest()


def open_safetensors(path):
    """Memory-map a safetensors file. UserError when it is missing, truncated or something else."""
    if not path.is_file():
        raise UserError(f"{path}: missing file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path}: truncated, or not a safetensors file ({size:,} bytes): {error}") from error
