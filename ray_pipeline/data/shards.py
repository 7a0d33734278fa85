"""One shard of the latent store: a .npy file (rows, variants, columns, C, H, W) of fp16, on a disk or remote."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from pathlib import Path

import numpy as np

from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

#: what to do about a store that is damaged
REMEDY = "run `ray-pipeline encode --overwrite` (it keeps every whole shard)"
_HEADER = 256  # bytes that hold the header numpy writes for six axes
_PIECE = 8 << 20  # bytes a request when all of a shard is read


class Shard:
    """An open shard. On a disk it is memory-mapped, and the kernel told that rows come in any order: what it reads
    ahead by itself is of other rows. Of a remote shard, each record or part is one request."""

    def __init__(self, folder: Folder, entry: dict, shape: tuple[int, ...]):
        self.folder, self.name, self.shape = folder, entry["file"], shape
        self.latent_bytes = 2 * int(np.prod(shape[3:]))
        try:
            self.file = folder.open(self.name)
            with folder.reaching(self.name):
                start = self.file.read_at(_HEADER, 0)
            self.header = _header_bytes(start, self.file.size(), entry["bytes"], shape)
        except UserError:  # not the shard: the network, or a right that is lacking
            raise
        except (FileNotFoundError, ValueError) as error:
            raise _damaged(folder, self.name, error) from error
        self.mapped = None if folder.local is None else self._map(folder.local / self.name)

    def _map(self, path: Path) -> np.ndarray:
        self._disk = path.open("rb")
        self._pages = mmap.mmap(self._disk.fileno(), 0, access=mmap.ACCESS_READ)
        self._pages.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(self._pages, dtype=np.float16, offset=self.header).reshape(self.shape)

    def check(self) -> None:
        """UserError where a mapped shard has become shorter: what is mapped behind its end would be read as zeros."""
        if self.mapped is not None and os.fstat(self._disk.fileno()).st_size < len(self._pages):
            raise _damaged(self.folder, self.name, EOFError(f"it was cut to less than {len(self._pages)} bytes"))

    def announce(self, row: int, variant: int, count: int) -> None:
        """Tell the kernel that a record of a mapped shard is asked for next, so that it fetches several at once."""
        start = self._place(row, variant)
        page = start - start % mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_WILLNEED, page, start + count * self.latent_bytes - page)

    def record(self, row: int, variant: int, count: int) -> np.ndarray:
        """The first `count` columns of one row, (count, C, H, W) fp16. May be called by several threads at once."""
        if self.mapped is not None:
            return self.mapped[row, variant, :count]
        data = self.part(self._place(row, variant), count * self.latent_bytes)
        return np.frombuffer(data, dtype=np.float16).reshape(count, *self.shape[3:])

    def part(self, first: int, size: int) -> bytes:
        """`size` bytes of a remote shard from `first` on, in one request."""
        try:
            with self.folder.reaching(self.name):
                data = self.file.read_at(size, first)
        except FileNotFoundError as error:
            raise _damaged(self.folder, self.name, error) from error
        if len(data) != size:
            raise _damaged(self.folder, self.name, EOFError(f"it ends before byte {first + size}"))
        return data

    def _place(self, row: int, variant: int) -> int:
        """Where a record begins in the file."""
        _, variants, columns = self.shape[:3]
        return self.header + (row * variants + variant) * columns * self.latent_bytes


def _header_bytes(start: bytes, size: int, expected_size: int, shape: tuple[int, ...]) -> int:
    """Length of the header that a .npy file of `size` bytes starts with; ValueError unless it is of this shape, fp16,
    in C order and whole."""
    if size != expected_size:
        raise ValueError(f"found {size} bytes, expected {expected_size}")
    file = io.BytesIO(start)
    try:
        np.lib.format.read_magic(file)
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # numpy parses the header as Python, which foreign bytes fail in many ways
        raise ValueError("not a .npy file") from None
    if (found, dtype) != (shape, np.float16):
        raise ValueError(f"found {found} {dtype}, expected {shape} float16")
    if fortran:
        raise ValueError("found columns last, expected rows first")
    return file.tell()


def _damaged(folder: Folder, name: str, error: Exception) -> UserError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return UserError(f"latent shard {folder.where(name)} is missing or damaged ({reason}); {REMEDY}")


def write_shard(folder: Folder, name: str, values: np.ndarray) -> dict:
    """Write (rows, variants, columns, C, H, W) fp16 as one .npy file, whole or not at all; returns its entry in the
    index."""
    values = np.ascontiguousarray(values, dtype=np.float16)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    parts = (header.getvalue(), memoryview(values.reshape(-1).view(np.uint8)))
    folder.write(name, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {
        "file": name,
        "rows": len(values),
        "bytes": sum(map(len, parts)),
        "sha256": digest.hexdigest(),
    }


def shard_is_whole(folder: Folder, name: str, sha256: str) -> bool:
    """True when the file is there and has this hash."""
    digest = hashlib.sha256()
    try:
        with folder.reaching(name), folder.open(name) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == sha256
