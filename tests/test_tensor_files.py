"""Files that the safetensors library reads, written and read without a second copy; compared with the library."""

import hashlib
import io
import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from ray_pipeline.tensor_files import Hashed, read_tensors, tensor_parts

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def some_tensors():
    generator = torch.Generator().manual_seed(3)
    values = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    turned = torch.randn(4, 6, generator=generator).T
    return values | {
        "turned": turned,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "odd": torch.ones(7).half(),
    }


def written(tensors, metadata=None):
    return b"".join(tensor_parts(tensors, metadata))


def test_the_library_reads_what_is_written(tmp_path):
    tensors = some_tensors()
    (tmp_path / "a.safetensors").write_bytes(written(tensors, {"who": "test"}))
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"who": "test"}


def test_what_the_library_writes_is_read():
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    data = safetensors.torch.save(tensors, metadata={"who": "test"})
    found, sha256 = read_tensors(io.BytesIO(data), len(data))
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_hash_and_size_are_those_of_the_bytes_that_passed():
    parts = Hashed(tensor_parts(some_tensors()))
    data = b"".join(parts)
    assert (parts.sha256, parts.bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_parts_are_views_of_the_tensors_memory():
    tensor = torch.zeros(1000)
    parts = list(tensor_parts({"a": tensor}))
    tensor[0] = 1.0
    assert np.frombuffer(parts[1], np.float32)[0] == 1.0


def test_numbers_lie_aligned_to_their_size():
    data = written(some_tensors())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_a_dtype_that_no_checkpoint_holds_is_named():
    with pytest.raises(ValueError, match=r"tensor a is torch\.complex64"):
        written({"a": torch.zeros(2, dtype=torch.complex64)})


def header_of(entry, payload=b"\0" * 8):
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 12),
        header_of({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header_of({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}),
        header_of({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        header_of({"a": {"dtype": "F32", "shape": [2]}}),
        header_of(["no", "mapping"]),
        header_of({"a": None}),
    ],
)
def test_other_bytes_are_refused_before_they_cost_memory(data):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        read_tensors(io.BytesIO(data), len(data))
