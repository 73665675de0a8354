"""safetensors files, written tensor by tensor and read by rows: one tensor is in memory at a time."""

import hashlib
import json
import os
import shutil
import struct

import torch
from safetensors import SafetensorError, safe_open

from plumbing.files import UserError

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(path, tensors, read, metadata=None):
    """Write one safetensors file (8-byte length, JSON header, raw bytes) and fsync it. Returns its sha256
    (hex).

    tensors: {name: (dtype, shape)}, wider dtypes first. read(name) is called in that order, its result cast
    and dropped: one tensor is in memory, where the library's own writer needs all of them. OSError (disk
    full, quota) names the path and the bytes needed.
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


def open_safetensors(path):
    """Memory-map a safetensors file. UserError when it is missing, truncated or something else."""
    if not path.is_file():
        raise UserError(f"{path}: missing file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path}: truncated, or not a safetensors file ({size:,} bytes): {error}") from error
