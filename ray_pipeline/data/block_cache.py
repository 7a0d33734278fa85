"""Blocks of files in object storage, kept on a disk of this node for all of its processes, up to a limit of bytes.

A block is a file of its own. Its name tells the sha256 of the file it is from and where in it it lies, so that it is
never another's; its last 32 bytes are the sha256 of what goes before. It appears by a rename, whole, and while one
process fetches it the others wait for it, since they would fetch the same: <name>.part is what is being written, and
held by flock, so that a kill lets it go. `total` counts the bytes of all blocks, those in the making as well, and stays
below the limit: blocks that were not used for longest make room. A block with a fault is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_pipeline.config import Config

_HASH = 32  # bytes
_PART, _TOTAL = ".part", "total"
_BLOCK = re.compile(r"[0-9a-f]{64}-\d+-\d+(\.part)?")  # nothing else in the folder is ours to remove
#: where room is made, it is for this share of the limit, lest every new block list the folder
_SHARE_FREED = 0.1
#: this share of the disk stays free; Ray writes no objects to a disk that is fuller than 95 %
_SHARE_FREE = 0.1

Span = tuple[int, int]  # first byte in the block, bytes


class BlockCache:
    """At most `limit` bytes in `folder`, by default one of this user on a disk of the node. Cheap to pickle, and for
    several threads at once."""

    def __init__(self, limit: int, folder: str | None = None):
        self.limit, self.folder = limit, folder
        self._whole: set[str] = set()  # blocks whose hash this process has seen
        self._believed = False  # the folder is there, and nobody else's
        self._refused = False

    def __reduce__(self):
        return BlockCache, (self.limit, self.folder)

    def read(
        self, sha256: str, first: int, size: int, spans: Sequence[Span], fetch: Callable[[], bytes]
    ) -> list[bytes] | None:
        """Spans of a block, from the disk, or from what `fetch` returns; None where it is not on the disk and the disk
        takes no more.

        sha256: of the file (hex), of which the block is `size` bytes from `first` on. fetch: may raise a UserError.
        """
        name, data = f"{sha256}-{first}-{size}", None
        try:
            if not self._believed:
                self._make_place()
            found = self._from_disk(name, size, spans)
            if found is not None or self._refused:
                return found
            with self._part(name) as part:
                if (found := self._from_disk(name, size, spans)) is not None:  # another process was first
                    return found
                data = fetch()
                self._keep(name, part, data)
        except OSError as error:
            self._refuse(error)
        return None if data is None else [data[start : start + count] for start, count in spans]

    @property
    def place(self) -> Path:
        """The folder on this node."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        base = os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
        return Path(base, f"ray_pipeline-{os.getuid()}")

    def _from_disk(self, name: str, size: int, spans: Sequence[Span]) -> list[bytes] | None:
        path = self.place / name
        try:
            with open(path, "rb", buffering=0) as file:
                found = [os.pread(file.fileno(), count, first) for first, count in spans]
                if name not in self._whole:
                    data = _all(file.fileno(), size + _HASH)
                    if hashlib.sha256(data[:size]).digest() != data[size:]:
                        raise EOFError
                    self._whole.add(name)
                if [len(data) for data in found] != [count for _, count in spans]:
                    raise EOFError
                with suppress(OSError):
                    os.utime(file.fileno())
        except EOFError:
            with suppress(OSError):
                path.unlink()
            return None
        except OSError:
            return None
        return found

    @contextmanager
    def _part(self, name: str) -> Iterator[int]:
        """The file in which a block is made, open and held by this thread alone; it is gone afterwards."""
        self._make_place()
        path = self.place / (name + _PART)
        while True:
            part = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(part, fcntl.LOCK_EX)
                if _is_at(part, path):  # not renamed or removed by who held it before
                    break
            except BaseException:
                os.close(part)
                raise
            os.close(part)
        try:
            yield part
        finally:
            with suppress(OSError):
                if _is_at(part, path):
                    path.unlink()
            os.close(part)

    def _make_place(self) -> None:
        """Make the folder. Where everybody may make one it must be this user's own, as its blocks are believed."""
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.place.lstat()
        if self.folder is None and not (stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()):
            raise OSError(errno.EPERM, "it is a link, or somebody else's")
        self._believed = True

    def _keep(self, name: str, part: int, data: bytes) -> None:
        """Put a block in its place, where there is or can be made room for it."""
        size = len(data) + _HASH
        if not self._take_room(part, size):
            return
        os.lseek(part, 0, os.SEEK_SET)
        for piece in (memoryview(data), hashlib.sha256(data).digest()):
            while piece:
                piece = piece[os.write(part, piece) :]
        with _held(self.place / _TOTAL):  # who lists the folder may miss a file that is renamed meanwhile
            os.replace(self.place / (name + _PART), self.place / name)
        self._whole.add(name)

    def _take_room(self, part: int, size: int) -> bool:
        """Whether `size` bytes may be added, which `part` then takes; older blocks may go for it."""
        disk = shutil.disk_usage(self.place)
        if disk.free - size < _SHARE_FREE * disk.total:
            raise OSError(errno.ENOSPC, f"less than {_SHARE_FREE:.0%} of the disk would stay free")
        with _held(self.place / _TOTAL) as book:
            total = _number(os.pread(book, 32, 0))
            if total is None or total + size > self.limit:
                total = self._make_room(size)
            if total + size > self.limit:
                return False
            os.pwrite(book, b"%020d\n" % (total + size), 0)  # first, so that a kill leaves it too high, if wrong
            os.ftruncate(part, size)
        return True

    def _make_room(self, size: int) -> int:
        """Bytes that the folder holds, after blocks were removed for `size` bytes more, where there must."""
        found = []
        with os.scandir(self.place) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if _BLOCK.fullmatch(entry.name):
                        about = entry.stat(follow_symlinks=False)
                        found.append((about.st_mtime_ns, about.st_size, entry.path))
        total = sum(held for _, held, _ in found)
        if total + size <= self.limit:
            return total
        for _, held, path in sorted(found):
            if total + size <= (1 - _SHARE_FREED) * self.limit:
                break
            if _remove(path):
                total -= held
        return total

    def _refuse(self, error: OSError) -> None:
        if self._refused:
            return
        self._refused = True
        warnings.warn(
            f"the cache {self.place} takes no more blocks ({error.strerror or error}), so rows are read from object "
            "storage one by one; make room there, set data.cache_dir to a folder on another disk, or data.cache_gib=0",
            stacklevel=2,
        )


def block_cache(config: Config) -> BlockCache | None:
    """The cache that a config asks for."""
    return BlockCache(int(config.data.cache_gib * 2**30), config.data.cache_dir) if config.data.cache_gib else None


def _all(file: int, size: int) -> bytes:
    data = os.pread(file, size, 0)
    while len(data) < size:
        more = os.pread(file, size - len(data), len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """A file, opened and held against other processes and threads."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _number(text: bytes) -> int | None:
    """The number of bytes written down; None where a kill has cut it off."""
    return int(text) if text.endswith(b"\n") and text[:-1].isdigit() else None


def _remove(path: str) -> bool:
    """Remove a block, or what a killed process left of one; False where it is being made."""
    with suppress(FileNotFoundError):
        if not path.endswith(_PART):
            os.unlink(path)
            return True
        file = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, Path(path)):
                os.unlink(path)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
    return True
