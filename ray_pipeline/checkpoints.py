"""Checkpoints that exist as a whole or not at all, on any storage that pyarrow opens.

<store>/<name>.ckpt/<group>.safetensors   tensors, one file a group; no pickle
<store>/<name>.ckpt/state.json            position, config and the sha256 of each file and of itself; written last: the
                                          commit mark
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.fs
import safetensors.torch
from torch import Tensor

from ray_pipeline.errors import UserError
from ray_pipeline.storage import replace_file

SUFFIX = ".ckpt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or its bytes are not those that were committed."""


class Checkpoint(Mapping[str, dict[str, Tensor]]):
    """One committed checkpoint: `state`, and groups of tensors that are read and checked when they are asked for."""

    def __init__(self, filesystem: pyarrow.fs.FileSystem, folder: str, record: dict, groups: list[str] | None = None):
        self._filesystem, self.folder, self._files = filesystem, folder, record["files"]
        self.state: dict = record["state"]
        self._groups = list(self._files) if groups is None else groups
        unknown = [group for group in self._groups if group not in self._files]
        if unknown:
            raise UserError(f"checkpoint {folder} has no {unknown[0]!r}; it holds {', '.join(self._files)}")

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group by name; DamagedCheckpoint when the file is not the one that was committed."""
        if group not in self._groups:
            raise KeyError(group)
        return safetensors.torch.load(self._read(group))

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self._files.values())

    def path(self, group: str) -> str:
        """Where the file of a group lies on the checkpoint's filesystem."""
        return f"{self.folder}/{group}.safetensors"

    def verify(self) -> None:
        """Read every file and compare its hash; DamagedCheckpoint names the first that differs."""
        for group in self._files:
            self._read(group)

    def _read(self, group: str) -> bytes:
        path = self.path(group)
        try:
            with self._filesystem.open_input_file(path) as file:
                data = file.read()
        except OSError:
            raise DamagedCheckpoint(
                f"checkpoint file {path} is missing or unreadable; use another checkpoint"
            ) from None
        if hashlib.sha256(data).hexdigest() != self._files[group]["sha256"]:
            raise DamagedCheckpoint(f"checkpoint file {path} was changed after it was saved; use another checkpoint")
        return data


class CheckpointStore:
    """Checkpoints under one local path or URI. Names end in .ckpt and begin with the phase's name."""

    def __init__(self, uri: str | Path):
        text = str(uri)
        if "://" not in text:
            self._filesystem, self.root = pyarrow.fs.LocalFileSystem(), str(Path(text).absolute())
        else:
            try:
                self._filesystem, self.root = pyarrow.fs.FileSystem.from_uri(text)
            except (ValueError, OSError) as error:
                raise UserError(
                    f"checkpoint store {text} cannot be opened ({' '.join(str(error).split())}); give a local folder "
                    "or a URI such as s3://bucket/folder"
                ) from None
        self._local = isinstance(self._filesystem, pyarrow.fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Where checkpoint `name` lies on its filesystem."""
        if not _NAME.fullmatch(name):
            raise UserError(f"checkpoint name {name!r} may hold letters, digits, '.', '_' and '-' only")
        return f"{self.root}/{name.removesuffix(SUFFIX)}{SUFFIX}"

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
        a damaged checkpoint: the run that fell back to an older one comes to this name again.
        """
        folder = self.path(name)
        if self._is_whole(folder):
            raise FileExistsError(f"checkpoint {folder} is committed already; a name is never overwritten")
        self.delete(name)
        self._filesystem.create_dir(folder, recursive=True)
        files = {}
        for group, tensors in groups.items():
            plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
            data = safetensors.torch.save(plain, metadata=None if metadata is None else dict(metadata))
            files[group] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            self._write(f"{folder}/{group}.safetensors", data)
        record = json.loads(json.dumps({"files": files, "state": dict(state)}))  # as it will be read
        self._write(f"{folder}/state.json", json.dumps(record | {"sha256": _digest(record)}, indent=1).encode())
        return folder.rsplit("/", 1)[1]

    def load(self, name: str, groups: list[str] | None = None) -> Checkpoint:
        """The committed checkpoint `name`; tensors are read when asked for. UserError when it does not exist."""
        folder = self.path(name)
        record = self._record(folder)
        if record is None:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"no committed checkpoint at {folder}; found: {known}")
        return Checkpoint(self._filesystem, folder, record, groups)

    def names(self, phase: str | None = None) -> list[str]:
        """Committed checkpoints of a phase (default: of all), by phase and position."""
        found = []
        selector = pyarrow.fs.FileSelector(self.root, allow_not_found=True)
        for entry in self._filesystem.get_file_info(selector):
            record = self._record(entry.path) if entry.base_name.endswith(SUFFIX) else None
            if record is None or phase not in (None, record["state"].get("phase")):
                continue
            state = record["state"]
            found.append((str(state.get("phase")), state.get("position", 0), entry.base_name))
        return [name for _, _, name in sorted(found)]

    def latest(self, phase: str) -> Checkpoint | None:
        """The newest checkpoint of a phase whose every byte is the committed one; None when there is none."""
        for name in reversed(self.names(phase)):
            checkpoint = self.load(name)
            try:
                checkpoint.verify()
            except DamagedCheckpoint:
                continue
            return checkpoint
        return None

    def delete(self, name: str) -> None:
        """Remove a checkpoint, its commit mark first."""
        folder = self.path(name)
        if self._exists(f"{folder}/state.json"):
            self._filesystem.delete_file(f"{folder}/state.json")
        self._remove(folder)

    def _write(self, path: str, data: bytes) -> None:
        # an object store shows an object only once it is whole; a local file needs the rename, and must have reached
        # the disk before the checkpoint before this one is deleted
        if self._local:
            replace_file(path, data)
            return
        with self._filesystem.open_output_stream(path) as file:
            file.write(data)

    def _record(self, folder: str) -> dict | None:
        path = f"{folder}/state.json"
        try:
            with self._filesystem.open_input_file(path) as file:
                record = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            # a store that does not answer must not look like an empty one: the run would begin again at 0
            raise UserError(
                f"checkpoint file {path} cannot be read ({' '.join(str(error).split())}); check the storage and its "
                "permissions, then resume"
            ) from error
        if not isinstance(record, dict):
            return None
        return record if record.pop("sha256", None) == _digest(record) else None

    def _is_whole(self, folder: str) -> bool:
        record = self._record(folder)
        if record is None:
            return False
        try:
            Checkpoint(self._filesystem, folder, record).verify()
        except DamagedCheckpoint:
            return False
        return True

    def _exists(self, path: str) -> bool:
        return self._filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound

    def _remove(self, folder: str) -> None:
        if self._exists(folder):
            self._filesystem.delete_dir(folder)


def _digest(record: Mapping) -> str:
    """sha256 of a record's values, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def open_checkpoint(folder: str) -> Checkpoint:
    """A checkpoint by the path or URI of its own folder; UserError when it is not a committed one."""
    parent, _, name = folder.rstrip("/").rpartition("/")
    if not name.endswith(SUFFIX):
        raise UserError(f"{folder} does not end in {SUFFIX}; give the folder of one checkpoint")
    return CheckpointStore(parent or ".").load(name)
