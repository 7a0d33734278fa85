"""Checkpoints that exist as a whole or not at all, on any storage that pyarrow opens.

<store>/<name>.ckpt/<group>.safetensors   tensors, one file a group; no pickle
<store>/<name>.ckpt/state.json            position, config and the sha256 of each file and of itself; written last: the
                                          commit mark
<store>/attempts/                         who may commit, see attempts.py
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ray_pipeline.attempts import READERS, Attempt, AttemptRecord, Superseded, begin_attempt, counts, read_attempts
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError
from ray_pipeline.tensor_files import Hashed, read_tensors, tensor_parts

SUFFIX = ".ckpt"
MARK = "state.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERIFY_BYTES = 4 * 2**20


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or its bytes are not those that were committed."""


class Checkpoint(Mapping[str, dict[str, Tensor]]):
    """One committed checkpoint: `state`, and groups of tensors that are read and checked when they are asked for."""

    def __init__(self, folder: Folder, record: dict, groups: list[str] | None = None):
        self._folder, self._files = folder, record["files"]
        self.state: dict = record["state"]
        self._groups = list(self._files) if groups is None else groups
        unknown = [group for group in self._groups if group not in self._files]
        if unknown:
            raise UserError(f"checkpoint {folder} has no {unknown[0]!r}; it holds {', '.join(self._files)}")

    @property
    def folder(self) -> str:
        """Path or URI."""
        return self._folder.location

    @property
    def name(self) -> str:
        return self._folder.name

    def __contains__(self, group: object) -> bool:
        return group in self._groups  # Mapping would read the file

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group by name; DamagedCheckpoint when the file is not the one that was committed."""
        if group not in self._groups:
            raise KeyError(group)
        with self._reading(group):
            try:
                with self._folder.stream(_file(group)) as file:
                    tensors, sha256 = read_tensors(file, self._files[group]["bytes"])
            except (ValueError, KeyError, TypeError, AttributeError):  # what comes of reading other bytes as a header
                sha256 = None
        if sha256 != self._files[group]["sha256"]:
            raise self._changed(group)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self._files.values())

    def path(self, group: str) -> str:
        """Location of the file of a group."""
        return self._folder.where(_file(group))

    def verify(self) -> None:
        """Read every file and compare its hash; DamagedCheckpoint names the first that differs."""
        for group, entry in self._files.items():
            digest = hashlib.sha256()
            with self._reading(group), self._folder.stream(_file(group)) as file:
                while data := file.read(_VERIFY_BYTES):
                    digest.update(data)
            if digest.hexdigest() != entry["sha256"]:
                raise self._changed(group)

    @contextmanager
    def _reading(self, group: str) -> Iterator[None]:
        # a store that does not answer is another matter: its StorageError passes
        try:
            with self._folder.reaching(_file(group)):
                yield
        except (FileNotFoundError, StorageError) as error:
            gone = isinstance(error, FileNotFoundError) or getattr(error.__cause__, "errno", None) == errno.EIO
            if not gone:
                raise
            raise DamagedCheckpoint(
                f"checkpoint file {self.path(group)} is missing or unreadable; use another checkpoint"
            ) from None

    def _changed(self, group: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            f"checkpoint file {self.path(group)} was changed after it was saved; use another checkpoint"
        )


@dataclass(frozen=True)
class Listing:
    """What a store holds of a phase, or of all. checkpoints: those that count, by phase and position; strays: folders
    named like a checkpoint of the phase that are none, or do not count."""

    checkpoints: tuple[Checkpoint, ...]
    strays: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be used, and in words each newer one that cannot."""

    checkpoint: Checkpoint | None
    passed_over: tuple[str, ...]


class CheckpointStore:
    """Checkpoints under one local path or URI. Names end in .ckpt and begin with the phase's name.

    attempt: whoever saves under an attempt is stopped (attempts.Superseded) once another one has begun.
    """

    def __init__(self, uri: str | Path | Folder, attempt: Attempt | None = None):
        self._folder = uri if isinstance(uri, Folder) else Folder(uri)
        self.attempt = attempt
        _ = self._folder.local  # a location that cannot be opened is told now

    @property
    def root(self) -> str:
        """Path or URI of the store."""
        return self._folder.location

    def path(self, name: str) -> str:
        """Path or URI of checkpoint `name`; `open_checkpoint` opens it."""
        return self._at(name).location

    def begin(self, phase: str, world_size: int) -> Attempt:
        """Take the next attempt at the run, under which this store saves from now on."""
        self.attempt = begin_attempt(self._folder, phase, world_size)
        return self.attempt

    def attempts(self) -> list[AttemptRecord]:
        """All attempts at the run so far, by number."""
        return read_attempts(self._folder)

    def save(
        self,
        name: str,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Write and commit `groups` {file: {tensor name: tensor}} with `state` (JSON values); returns the name.

        metadata: what every safetensors file says of itself, so that it can be used alone.
        FileExistsError when `name` is committed already. What an interrupted save left behind is replaced, and so is
        a checkpoint that is damaged or does not count: the run that fell back to an older one comes to this name again.
        """
        folder = self._at(name)
        if self._stands(folder):
            raise FileExistsError(f"checkpoint {folder} is committed already; a name is never overwritten")
        self.check_attempt()
        self.delete(name)
        folder.create()
        files = {}
        for group, tensors in groups.items():
            self.check_attempt()
            parts = Hashed(tensor_parts(tensors, metadata))
            folder.write(_file(group), parts)
            files[group] = {"sha256": parts.sha256, "bytes": parts.bytes}
        attempt = {} if self.attempt is None else {"attempt": self.attempt.number}
        record = json.loads(json.dumps({"files": files, "state": {**state, **attempt}}))  # as it will be read
        self.check_attempt()
        folder.write(MARK, json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())
        return folder.name

    def load(self, name: str, groups: list[str] | None = None) -> Checkpoint:
        """The committed checkpoint `name`; tensors are read when asked for. UserError when it does not exist."""
        folder = self._at(name)
        record = _record(folder)
        if record is None:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"no committed checkpoint at {folder}; found: {known}")
        return Checkpoint(folder, record, groups)

    def names(self, phase: str | None = None) -> list[str]:
        """Committed checkpoints of a phase (default: of all) that count, by phase and position."""
        return [checkpoint.name for checkpoint in self.checkpoints(phase)]

    def checkpoints(self, phase: str | None = None) -> tuple[Checkpoint, ...]:
        """As `names`, opened."""
        return self.listing(phase).checkpoints

    def listing(self, phase: str | None = None) -> Listing:
        """What there is, at one look; strays only of a phase."""
        attempts, found, strays = self.attempts(), [], []
        folders = [self._folder.child(name) for name in self._folder.folders() if name.endswith(SUFFIX)]
        own = re.compile(rf"{re.escape(phase or '')}_(epoch|step)_\d+{re.escape(SUFFIX)}")
        with ThreadPoolExecutor(READERS) as pool:  # a request to object storage is mostly waiting
            for folder, record in zip(folders, pool.map(_record, folders), strict=True):
                if record is not None and counts(record["state"], attempts):
                    if phase in (None, record["state"].get("phase")):
                        found.append(Checkpoint(folder, record))
                elif own.fullmatch(folder.name):
                    strays.append(folder.name)
        found.sort(key=lambda one: (str(one.state.get("phase")), one.state.get("position", 0), one.name))
        return Listing(tuple(found), tuple(strays))

    def latest(self, phase: str) -> Checkpoint | None:
        """The newest checkpoint of a phase whose every byte is the committed one; None when there is none."""
        return self.search(phase).checkpoint

    def search(self, phase: str) -> Found:
        """As `latest`, with what was passed over."""
        listing = self.listing(phase)
        passed_over = [
            f"{self.path(name)} is no checkpoint that counts: its save was interrupted or its {MARK} was lost or "
            "changed, or a superseded attempt made it"
            for name in listing.strays
        ]
        for checkpoint in reversed(listing.checkpoints):
            try:
                checkpoint.verify()
            except DamagedCheckpoint as error:
                passed_over.append(str(error))
                continue
            return Found(checkpoint, tuple(passed_over))
        return Found(None, tuple(passed_over))

    def delete(self, name: str) -> None:
        """Remove a checkpoint, its commit mark first."""
        folder = self._at(name)
        folder.remove([MARK])
        folder.delete()

    def _at(self, name: str) -> Folder:
        if not _NAME.fullmatch(name):
            raise UserError(f"checkpoint name {name!r} may hold letters, digits, '.', '_' and '-' only")
        return self._folder.child(f"{name.removesuffix(SUFFIX)}{SUFFIX}")

    def check_attempt(self) -> None:
        """Superseded (attempts.py) when another attempt has begun since this one."""
        if self.attempt is not None:
            self.attempt.check()

    def superseded(self) -> bool:
        """Whether another attempt has begun since this one."""
        try:
            self.check_attempt()
        except Superseded:
            return True
        return False

    def _stands(self, folder: Folder) -> bool:
        """Whether this name is committed, whole and counts."""
        record = _record(folder)
        if record is None or not counts(record["state"], self.attempts()):
            return False
        try:
            Checkpoint(folder, record).verify()
        except DamagedCheckpoint:
            return False
        return True


def open_checkpoint(location: str) -> Checkpoint:
    """A checkpoint by the path or URI of its own folder; UserError when it is not a committed one."""
    folder = Folder(location)
    if not folder.name.endswith(SUFFIX):
        raise UserError(f"{location} does not end in {SUFFIX}; give the folder of one checkpoint")
    return CheckpointStore(folder.parent).load(folder.name)


def _file(group: str) -> str:
    return f"{group}.safetensors"


def _record(folder: Folder) -> dict | None:
    """What the commit mark says, None where there is no whole one."""
    try:
        record = json.loads(folder.read(MARK))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict):
        return None
    return record if record.pop("sha256", None) == _digest(record) else None


def _digest(record: Mapping) -> str:
    """sha256 of a record's values, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
