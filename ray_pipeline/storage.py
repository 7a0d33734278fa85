"""Folders on a local disk, NFS or in object storage through pyarrow.fs; files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from ray_pipeline.errors import UserError
from ray_pipeline.passwords import uri_credential

Data = bytes | bytearray | memoryview
_STREAM_BYTES = 4 * 2**20
#: what a disk says of a path that is wrong however often it is tried
_LASTING = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip


class StorageError(UserError):
    """The disk, the network or the service refuses; the message names the file."""

    passing = True


def may_pass(error: BaseException) -> bool:
    """Whether what a disk, the network or a service said may be over later: it is full, or does not answer."""
    return not (isinstance(error, OSError) and error.errno in _LASTING)


def is_uri(text: str) -> bool:
    """Whether a location is a URI such as s3://bucket/folder, and not a path."""
    return "://" in text


def shown(location: str) -> str:
    """A location for messages and lists: of a URI neither user nor query."""
    if not is_uri(location):
        return location
    scheme, _, rest = location.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class FileStamp(NamedTuple):
    """By which a change of a file is seen: bytes, and nanoseconds since 1970; object storage counts whole seconds."""

    size: int
    mtime_ns: int


class Folder:
    """A folder given by a path or a URI that pyarrow opens (s3://bucket/folder, gs://..., file:///...).

    Cheap to pickle: the connection is made where it is used. Credentials come from the environment alone: a URI that
    holds one is a UserError. What the disk, the network or the service refuses is a StorageError; a file that is not
    there is a FileNotFoundError.
    """

    def __init__(self, location: str | Path):
        text = str(location)
        if not is_uri(text):
            self.location = str(Path(text).expanduser().absolute())
            return
        base, mark, query = text.partition("?")
        if (found := uri_credential(text)) is not None:  # it would be printed, logged and pickled
            where = re.sub(r"^([^:]+://[^/:]*):.*", r"\1", base.rpartition("@")[2])  # a secret may hold a ?, too
            raise UserError(
                f"the location in {where} holds a password or key ({found}); leave it out and give it "
                "in the environment of every node (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, "
                "GOOGLE_APPLICATION_CREDENTIALS for gs://, AZURE_CLIENT_SECRET for abfss://)"
            )
        self.location = base.rstrip("/") + mark + query

    def __reduce__(self):
        return Folder, (self.location,)

    def __str__(self) -> str:
        return self.location

    @cached_property
    def opened(self) -> tuple[fs.FileSystem, str]:
        """The connection, and the path of the folder in it."""
        if not is_uri(self.location):
            return fs.LocalFileSystem(), self.location
        try:
            return fs.FileSystem.from_uri(self.location)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{self.location} is no location that pyarrow opens ({' '.join(str(error).split())[:200]}); give a "
                "path or a URI such as s3://bucket/folder"
            ) from None

    @property
    def local(self) -> Path | None:
        """The folder as a path of this machine, None in object storage."""
        filesystem, path = self.opened
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def child(self, *names: str) -> Folder:
        """The folder below; a URI's query stays behind it."""
        if not is_uri(self.location):
            return Folder(Path(self.location, *names))
        base, mark, query = self.location.partition("?")
        below = Folder("/".join([base, *map(quote, names)]) + mark + query)
        if "opened" in vars(self):  # one connection for all
            filesystem, path = self.opened
            vars(below)["opened"] = filesystem, "/".join([path.rstrip("/"), *names])
        return below

    @property
    def name(self) -> str:
        """Last part of the location."""
        return unquote(self.location.partition("?")[0] if is_uri(self.location) else self.location).rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder above; of a bucket the bucket itself."""
        if not is_uri(self.location):
            return Folder(Path(self.location).parent)
        base, mark, query = self.location.partition("?")
        above, _, name = base.rpartition("/")
        return self if not name or above.endswith("/") else Folder(above + mark + query)

    def where(self, name: str) -> str:
        """Location of a file in words, for messages."""
        return f"{self.location.partition('?')[0] if is_uri(self.location) else self.location}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file, -1 where there is none."""
        with self.reaching(name):
            found = self.opened[0].get_file_info(self._path(name))
        return found.size if found.type == fs.FileType.File else -1

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in this folder by name, sorted; none where the folder is not there."""
        filesystem, path = self.opened
        with self.reaching():
            listed = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return dict(sorted((info.base_name, info.size) for info in listed if info.type == fs.FileType.File))

    def tree(self) -> dict[str, FileStamp]:
        """Each file in this folder and below, by its path from here with slashes; none where it is not there."""
        filesystem, path = self.opened
        with self.reaching():
            listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return {
            info.path.removeprefix(path.rstrip("/") + "/"): FileStamp(info.size, info.mtime_ns or 0)
            for info in listed
            if info.type == fs.FileType.File
        }

    def stamp(self, name: str) -> FileStamp | None:
        """Of a file; None where there is none."""
        with self.reaching(name):
            found = self.opened[0].get_file_info(self._path(name))
        return FileStamp(found.size, found.mtime_ns or 0) if found.type == fs.FileType.File else None

    def folders(self) -> list[str]:
        """Names of the folders in this folder, sorted; none where it is not there."""
        filesystem, path = self.opened
        with self.reaching():
            listed = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in listed if info.type == fs.FileType.Directory)

    def names(self) -> list[str]:
        """Names of the files in this folder, sorted; none where the folder is not there."""
        return list(self.sizes())

    def read(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""
        while True:
            with self.reaching(name), self.open(name) as file:
                data = file.read()
            # an object's size is asked for before its bytes: of one that was replaced between, too few or too many
            # bytes come
            if self.local is not None or self.size(name) == len(data):
                return data

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access; FileNotFoundError where there is none. What it reads wants `reaching` around it."""
        with self.reaching(name):
            return self.opened[0].open_input_file(self._path(name))

    def stream(self, name: str) -> pa.NativeFile:
        """A file from its beginning to its end; else as `open`."""
        with self.reaching(name):
            return self.opened[0].open_input_stream(self._path(name), buffer_size=_STREAM_BYTES)

    def write(self, name: str, parts: Data | Iterable[Data]) -> None:
        """Write a file from its bytes, or their parts in order: a reader, or a kill, finds the old one or the new one,
        never a piece.

        A local write that fails leaves the old file, one to object storage may leave none.
        """
        with self.reaching(name):
            if self.local is not None:
                replace_file(self.local / name, parts)
            else:
                self._upload(self._path(name), _parts(parts))

    def _upload(self, path: str, parts: Iterable[Data]) -> None:
        filesystem, _ = self.opened
        stream = filesystem.open_output_stream(path)  # the object is there once this is closed
        try:
            for part in parts:
                stream.write(part)
        except BaseException:
            # pyarrow cannot give an upload up: closing it, or dropping it, makes an object of what was written
            with suppress(OSError, pa.ArrowException):
                stream.close()
                filesystem.delete_file(path)
            raise
        stream.close()

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that are there."""
        for name in names:
            with self.reaching(name), suppress(FileNotFoundError):
                self.opened[0].delete_file(self._path(name))

    def create(self) -> None:
        """Make the folder, where the storage has such things."""
        with self.reaching():
            self.opened[0].create_dir(self.opened[1], recursive=True)

    def delete(self) -> None:
        """Delete the folder and all in it, if it is there."""
        with self.reaching(), suppress(FileNotFoundError):
            self.opened[0].delete_dir(self.opened[1])

    @contextmanager
    def reaching(self, name: str = "") -> Iterator[None]:
        """Make a StorageError of what goes wrong within; a FileNotFoundError stays one."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            remedy = (
                "check the path, its permissions and the free space"
                if self.local is not None
                else "check the location, the credentials in the environment and the network"
            )
            refused = StorageError(f"{self.where(name).rstrip('/')} cannot be used ({_reason(error)}); {remedy}")
            refused.passing = may_pass(error)
            raise refused from error

    def _path(self, name: str) -> str:
        return f"{self.opened[1].rstrip('/')}/{name}"


def _reason(error: BaseException) -> str:
    """What went wrong, of pyarrow's several sentences the one that says it."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())
    of_service = re.search(r"AWS Error .*?(?=\.? \(Request ID|\.?$)", text)
    return (of_service[0] if of_service else text)[:200]


def _parts(data: Data | Iterable[Data]) -> Iterable[Data]:
    return (data,) if isinstance(data, Data) else data


def replace_file(path: str | Path, data: Data | Iterable[Data]) -> None:
    """Write bytes, or their parts in order, to `path` so that a reader, or a kill, finds the old file or the new one,
    never a part; when this returns the new one outlives a loss of power.

    Creates the folder. Raises OSError, and then the old file is still there and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in _parts(data):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must reach the disk
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
