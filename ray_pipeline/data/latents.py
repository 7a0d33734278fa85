"""The latent store: row-addressable fp16 latents and hint latents in Arrow IPC shards, with an index and statistics.

<store>/stats.json                     per-channel mean and std of the training split, counts, fingerprint; written last
<store>/<split>/index.json             shards with rows and sha256, row ranges of the data sets, fingerprint
<store>/<split>/shard-00000.arrow      one fixed-size binary column a latent: latent@0, hint.denoising@0, ...

"@k" is the augmentation variant. Shards are uncompressed, so a local one is memory-mapped and a row is a slice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_pipeline.errors import UserError

FORMAT_VERSION = 1
_OPEN_SHARDS = 64
_INDEX_KEYS = ("version", "fingerprint", "shape", "hints", "variants", "datasets", "shards")
_REMEDY = "run `ray-pipeline encode --overwrite` (it keeps every whole shard)"


@dataclass(frozen=True)
class LatentStats:
    """Per-channel mean and std (C,) over the training latents, how many tiles they come from, and of what."""

    mean: np.ndarray
    std: np.ndarray
    count: int
    fingerprint: str

    def normalise(self, latents: np.ndarray, sigma_data: float) -> np.ndarray:
        """Stored latents (..., C, H, W) -> float32 with zero mean and std `sigma_data` a channel."""
        scale, shift = self._affine(sigma_data)
        return latents.astype(np.float32) * scale + shift

    def denormalise(self, latents: np.ndarray, sigma_data: float) -> np.ndarray:
        """The inverse of `normalise`, float32."""
        scale, shift = self._affine(sigma_data)
        return (latents.astype(np.float32) - shift) / scale

    def _affine(self, sigma_data: float) -> tuple[np.ndarray, np.ndarray]:
        scale = (sigma_data / self.std).astype(np.float32)[:, None, None]
        return scale, -self.mean.astype(np.float32)[:, None, None] * scale

    def as_json(self) -> dict:
        """Plain values; `parse_stats` reads them back."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "count": self.count,
            "fingerprint": self.fingerprint,
        }


def parse_stats(values: dict) -> LatentStats:
    """LatentStats from the values of `as_json`."""
    mean, std = (np.array(values[key], dtype=np.float64) for key in ("mean", "std"))
    return LatentStats(mean=mean, std=std, count=int(values["count"]), fingerprint=values["fingerprint"])


def read_stats(path: str | Path) -> LatentStats:
    """LatentStats of a stats.json; UserError when it is missing or damaged."""
    values = _read_json(Path(path), ("mean", "std", "count", "fingerprint"))
    try:
        return parse_stats(values)
    except (TypeError, ValueError):
        raise UserError(f"latent store: {path} does not hold statistics; {_REMEDY}") from None


class LatentStore:
    """Read access to one split; an id is a row of it. Cheap to pickle: shards are opened where they are read."""

    def __init__(self, folder: Path, index: dict, stats: LatentStats):
        self.folder, self.index, self.stats = folder, index, stats
        self._starts = np.cumsum([0] + [shard["rows"] for shard in index["shards"]])
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> LatentStore:
        """Open <store>/<split>, or the training split of <store>; UserError when missing, unfinished or damaged."""
        folder = Path(path)
        if not (folder / "index.json").is_file() and (folder / "train" / "index.json").is_file():
            folder = folder / "train"
        index = _read_json(folder / "index.json", _INDEX_KEYS)
        if index["version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder / 'index.json'} has version {index['version']!r}, expected {FORMAT_VERSION}; {_REMEDY}"
            )
        stats = read_stats(folder.parent / "stats.json")
        if index["fingerprint"] != stats.fingerprint:
            raise UserError(
                f"{folder} was encoded from other tiles or settings (fingerprint {index['fingerprint'][:12]}) than "
                f"the stats.json beside it ({stats.fingerprint[:12]}); {_REMEDY}"
            )
        return cls(folder, index, stats)

    def __reduce__(self):
        return LatentStore, (self.folder, self.index, self.stats)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return tuple(self.index["shape"])

    @property
    def hint_names(self) -> tuple[str, ...]:
        return tuple(self.index["hints"])

    @property
    def variants(self) -> int:
        """Stored augmentation variants of every row."""
        return self.index["variants"]

    def rows(self, datasets: Sequence[str] = ()) -> np.ndarray:
        """Rows of the named data sets (default: all of them), int64, in their order."""
        ranges = {entry["name"]: entry for entry in self.index["datasets"]}
        unknown = [name for name in datasets if name not in ranges]
        if unknown:
            raise UserError(
                f"phases[].datasets names {unknown[0]!r}, but {self.folder} holds {', '.join(ranges)}; "
                "correct the name or encode that data set"
            )
        chosen = [ranges[name] for name in (datasets or ranges)]
        parts = [np.arange(entry["start"], entry["start"] + entry["count"], dtype=np.int64) for entry in chosen]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def gather(
        self, ids: Sequence[int], variants: Sequence[int] | None = None, hints: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Rows `ids` -> {"latent": (B, C, H, W) fp16, "hint.<name>": same}; variant 0 unless given.

        hints: which hints to read (default: all that are stored). IndexError for an id outside the split.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"ids reach from {ids.min()} to {ids.max()}, the split has {len(self)} rows")
        picked = np.zeros(len(ids), np.int64) if variants is None else np.asarray(variants, dtype=np.int64)
        names = ["latent"] + [f"hint.{name}" for name in (self.hint_names if hints is None else hints)]
        out = {name: np.empty((len(ids), *self.shape), np.float16) for name in names}
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for shard in np.unique(shards):
            batch = self._shard(int(shard))
            for name in names:
                for variant in np.unique(picked[shards == shard]):
                    chosen = np.flatnonzero((shards == shard) & (picked == variant))
                    rows = self._column(batch, f"{name}@{variant}")
                    out[name][chosen] = rows[ids[chosen] - self._starts[shard]]
        return out

    def verify(self) -> list[str]:
        """Names of shards that are missing or whose bytes differ from the index; reads all of them."""
        return [s["file"] for s in self.index["shards"] if not shard_is_whole(self.folder / s["file"], s["sha256"])]

    def missing(self) -> list[str]:
        """Names of shards that are not there or too short for their rows; reads none of them."""
        row_bytes = self._latent_bytes * self.variants * (1 + len(self.hint_names))
        return [s["file"] for s in self.index["shards"] if _size(self.folder / s["file"]) < s["rows"] * row_bytes]

    @property
    def _latent_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def _shard(self, number: int) -> pa.RecordBatch:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / self.index["shards"][number]["file"]
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"latent shard {path} is missing or damaged ({reason}); {_REMEDY}") from error
        expected = self.index["shards"][number]["rows"]
        if batch.num_rows != expected:
            raise UserError(f"latent shard {path} has {batch.num_rows} rows, expected {expected}; {_REMEDY}")
        self._check_columns(path, batch.schema)
        self._open[number] = batch
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return batch

    def _check_columns(self, path: Path, schema: pa.Schema) -> None:
        kind = pa.binary(self._latent_bytes)
        for name in ("latent", *(f"hint.{hint}" for hint in self.hint_names)):
            for variant in range(self.variants):
                position = schema.get_field_index(f"{name}@{variant}")
                if position < 0 or schema.field(position).type != kind:
                    raise UserError(f"latent shard {path} lacks column {name}@{variant} as {kind}; {_REMEDY}")

    def _column(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        values = np.frombuffer(column.buffers()[1], dtype=np.float16)
        width = int(np.prod(self.shape))
        return values[column.offset * width : (column.offset + len(column)) * width].reshape(-1, *self.shape)


def write_shard(path: Path, columns: dict[str, np.ndarray]) -> str:
    """Write {name: (rows, C, H, W) fp16} as one Arrow IPC file, atomically; returns its sha256."""
    arrays = []
    for values in columns.values():
        values = np.ascontiguousarray(values, dtype=np.float16)
        kind = pa.binary(values[0].nbytes)
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)]))
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def shard_is_whole(path: Path, sha256: str) -> bool:
    """True when the file is there and has this hash."""
    return path.is_file() and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _read_json(path: Path, keys: Sequence[str]) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"latent store: {path} is missing; encode the tiles with `ray-pipeline encode`") from None
    except ValueError:  # of JSON and of UTF-8
        raise UserError(f"latent store: {path} is not valid JSON; {_REMEDY}") from None
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        raise UserError(f"latent store: {path} lacks some of the keys {', '.join(keys)}; {_REMEDY}")
    return values
