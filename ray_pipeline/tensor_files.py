"""Safetensors files written and read piece by piece, hashed on the way: no second copy of the tensors in memory.

The library writes from memory to a local path, or makes one bytes object of all tensors; a checkpoint goes to any
storage, and may be as large as the memory that is left. The format is https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Readable(Protocol):
    """A binary file, read from its beginning to its end."""

    def read(self, size: int) -> bytes: ...

    def readinto(self, buffer: memoryview) -> int: ...


def tensor_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """Bytes of the file of these tensors, one part a tensor; on the host a part is a view of the tensor's memory.

    Raises ValueError for a dtype that a checkpoint does not hold.
    """
    # the widest numbers first, so that all are aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name} is {tensor.dtype}, expected one of {', '.join(map(str, _NAMES))}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield _bytes_of(tensor.detach().contiguous().cpu())


class Hashed(Iterator[memoryview]):
    """Passes parts on; `sha256` and `bytes` are those of what has passed."""

    def __init__(self, parts: Iterator[memoryview]):
        self._parts, self._digest, self.bytes = parts, hashlib.sha256(), 0

    def __next__(self) -> memoryview:
        part = next(self._parts)
        self._digest.update(part)
        self.bytes += part.nbytes
        return part

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def read_tensors(file: Readable, size: int) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file of `size` bytes, and the sha256 of its bytes; ValueError when it is not such a file."""
    digest = hashlib.sha256()

    def take(count: int) -> bytes:
        data = file.read(count)
        digest.update(data)
        return data

    length = int.from_bytes(take(8), "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(take(length))
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    place = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        fits = place == start <= end <= size - 8 - length and end - start == math.prod(shape) * dtype.itemsize
        if not fits or min(shape, default=0) < 0:
            raise ValueError(f"tensor {name} does not fit its place in the file")
        tensor = torch.empty(shape, dtype=dtype)
        view = _bytes_of(tensor)
        if file.readinto(view) != len(view):
            raise ValueError(f"tensor {name} is cut short")
        digest.update(view)
        tensors[name], place = tensor, end
    if place != size - 8 - length or file.read(1):
        raise ValueError("there are bytes behind the last tensor")
    return tensors, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
