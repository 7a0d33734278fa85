"""Files of JSON objects, one a line, that are only ever appended to and survive a kill and a full disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def whole_lines(data: bytes) -> Iterator[bytes]:
    """Lines that end in a newline: an object and its newline are one write, so any other end is a torn one."""
    yield from data.split(b"\n")[:-1]


def parse_line(line: bytes) -> dict | None:
    """The object of a line; None for anything else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def write_whole(file: FileIO, data: bytes) -> None:
    """All of it, or an OSError; part of it may be there then."""
    written = file.write(data)
    if written != len(data):
        raise OSError(f"only {written} of {len(data)} bytes were written (disk full?)")


class JsonLines:
    """An open file. What the disk refuses is kept and written with the next object."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file, self._kept = path, FileIO(path, "a"), b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one object of JSON values, none of them NaN or infinite; a file that refuses is warned of once."""
        line = json.dumps(record, allow_nan=False) + "\n"
        self._write(self._kept + line.encode("ascii"))

    def close(self) -> None:
        """OSError when what was kept cannot be written now either; a second call does nothing."""
        if self._kept and not self._file.closed:
            self._write(self._kept)
        self._file.close()
        if self._kept:
            raise OSError(f"the last {len(self._kept)} bytes of {self.path} could not be written")

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            write_whole(self._file, data)
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # part of a line may be there
            if not self._kept:
                logger.warning("%s cannot be written (%s); its records are kept until it can", self.path, error)
            self._kept = data
        else:
            self._kept = b""
