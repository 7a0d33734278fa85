"""The latent store: row-addressable fp16 latents and hint latents in Arrow IPC shards, with an index and statistics.

<store>/stats.json                     per-channel mean and std of the training split, counts, fingerprint
<store>/<split>/index.json             shards with rows and sha256, row ranges of the data sets; written last
<store>/<split>/shard-00000.arrow      one fixed-size binary column a latent: latent@0, hint.denoising@0, ...

"@k" is the augmentation variant. Shards are uncompressed, so a local one is memory-mapped and a row is a slice.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ray_pipeline.errors import UserError

FORMAT_VERSION = 1
_OPEN_SHARDS = 64


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


class LatentStore:
    """Read access to one split; an id is a row of it. Cheap to pickle: shards are opened where they are read."""

    def __init__(self, folder: Path, index: dict, stats: LatentStats):
        self.folder, self.index, self.stats = folder, index, stats
        self._starts = np.cumsum([0] + [shard["rows"] for shard in index["shards"]])
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> LatentStore:
        """Open <store>/<split>, or the training split of <store>; UserError when it is missing or damaged."""
        folder = Path(path)
        if not (folder / "index.json").is_file() and (folder / "train" / "index.json").is_file():
            folder = folder / "train"
        index = _read_json(folder / "index.json", "encode the tiles with `ray-pipeline encode`")
        if index.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{folder / 'index.json'} has version {index.get('version')!r}, expected {FORMAT_VERSION}; "
                "encode again with `ray-pipeline encode --overwrite`"
            )
        stats = parse_stats(_read_json(folder.parent / "stats.json", "encode again with `ray-pipeline encode`"))
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
        """Names of shards that are missing or whose bytes differ from the index."""
        return [s["file"] for s in self.index["shards"] if not shard_is_whole(self.folder / s["file"], s["sha256"])]

    def _shard(self, number: int) -> pa.RecordBatch:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / self.index["shards"][number]["file"]
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
            batch = table.to_batches()[0]
        except (OSError, pa.ArrowInvalid, IndexError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"latent shard {path} is missing or damaged ({reason}); run `ray-pipeline encode`"
            ) from error
        expected = self.index["shards"][number]["rows"]
        if batch.num_rows != expected:
            raise UserError(f"latent shard {path} has {batch.num_rows} rows, expected {expected}; encode again")
        self._open[number] = batch
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return batch

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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    payload = sink.getvalue()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(payload)
    partial.replace(path)
    return hashlib.sha256(payload).hexdigest()


def shard_is_whole(path: Path, sha256: str) -> bool:
    """True when the file is there and has this hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _read_json(path: Path, remedy: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"latent store: {path} is missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"latent store: {path} is not valid JSON; {remedy}") from None
