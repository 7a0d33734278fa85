"""The latent store: row-addressable fp16 latents and hint latents in numpy shards, with an index and statistics.

<store>/stats.json                     per-channel mean and std of the training split, counts, fingerprint; written last
<store>/<split>/index.json             shards with rows, bytes and sha256, columns, data sets, fingerprint, autoencoder,
                                       intensity ranges of the training tiles in units of their source
<store>/<split>/shard-00000.npy        (rows, variants, columns, C, H, W) fp16
<store>/<split>/tiles.arrow            which tile each row is (data/tile_table.py)

A column is `latent`, `std` (of an AutoencoderKL's posterior, where asked for), `hint.<name>` or, where a hint comes
from a partner on disk, `simulated.<name>` as well. What one sample needs, a tile and its hints in one augmentation
variant, lies together: one read on a disk; one request of object storage, of these bytes alone, or a part of a block of
rows that is kept on this node's disk (data/block_cache.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ray_pipeline.data.block_cache import BlockCache
from ray_pipeline.data.shard_reader import Place, ShardReader
from ray_pipeline.data.shards import REMEDY, shard_is_whole
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

if TYPE_CHECKING:  # it imports torch, which the actors that gather latents do without
    from ray_pipeline.models.weights import AutoencoderHeader, IntensityRange

FORMAT_VERSION = 4
_HASHERS = 4  # shards that are verified at once
_INDEX_KEYS = (
    "version", "fingerprint", "shape", "posterior", "hints", "simulated", "variants", "rejected", "datasets", "shards",
    "autoencoder", "intensity",
)  # fmt: skip


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


def read_stats(store: Folder) -> LatentStats:
    """LatentStats of <store>/stats.json; UserError when it is missing or damaged."""
    values = _read_json(store, "stats.json", ("mean", "std", "count", "fingerprint"))
    try:
        return parse_stats(values)
    except (TypeError, ValueError):
        raise UserError(f"latent store: {store.where('stats.json')} does not hold statistics; {REMEDY}") from None


@dataclass(frozen=True)
class DataSet:
    """Rows start to start + count - 1 of a split; partners: hint name -> how many rows have a degraded partner."""

    name: str
    start: int
    count: int
    partners: dict[str, int]


class LatentStore:
    """Read access to one split; an id is a row of it. Cheap to pickle: shards are opened where they are read.

    cache: of blocks, for a split in object storage. window: data.shuffle_window, rows of each data set that are read
    together; None: any row may follow any other.
    """

    def __init__(
        self,
        folder: Folder,
        index: dict,
        stats: LatentStats,
        cache: BlockCache | None = None,
        window: int | None = None,
    ):
        self.folder, self.index, self.stats = folder, index, stats
        self.cache, self.window = cache, window
        self._starts = np.cumsum([0] + [shard["rows"] for shard in index["shards"]])
        together = rows_together(len(self), window, len(index["datasets"]))
        shape = (self.variants, len(self.columns), *self.shape)
        self._reader = ShardReader(folder, index["shards"], shape, cache, together)

    @classmethod
    def open(cls, path: str | Path | Folder, cache: BlockCache | None = None, window: int | None = None) -> LatentStore:
        """Open <store>/<split>, or the training split of <store>; UserError when missing, unfinished or damaged."""
        folder = path if isinstance(path, Folder) else Folder(path)
        if folder.size("index.json") < 0 and folder.child("train").size("index.json") >= 0:
            folder = folder.child("train")
        index = _read_json(folder, "index.json", _INDEX_KEYS)
        if index["version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder.where('index.json')} has version {index['version']!r}, expected {FORMAT_VERSION}; {REMEDY}"
            )
        stats = read_stats(folder.parent)
        if index["fingerprint"] != stats.fingerprint:
            raise UserError(
                f"{folder} was encoded from other tiles or settings (fingerprint {index['fingerprint'][:12]}) than "
                f"the stats.json beside it ({stats.fingerprint[:12]}); {REMEDY}"
            )
        return cls(folder, index, stats, cache, window)

    def __reduce__(self):
        return LatentStore, (self.folder, self.index, self.stats, self.cache, self.window)

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
    def columns(self) -> tuple[str, ...]:
        """Names of the latents stored for every row and variant, in their order."""
        return column_names(self.index["hints"], self.index["simulated"], self.index["posterior"])

    @property
    def variants(self) -> int:
        """Stored augmentation variants of every row."""
        return self.index["variants"]

    @property
    def datasets(self) -> tuple[DataSet, ...]:
        """What the split holds, in the order of its rows."""
        return tuple(DataSet(**entry) for entry in self.index["datasets"])

    @property
    def autoencoder(self) -> AutoencoderHeader:
        """What made the latents."""
        from ray_pipeline.models.weights import AutoencoderHeader

        return AutoencoderHeader(**self.index["autoencoder"])

    @property
    def intensity(self) -> tuple[IntensityRange, ...]:
        """Ranges of the training tiles and partners in the units of their source, where these are known."""
        from ray_pipeline.models.weights import IntensityRange

        return tuple(IntensityRange(**entry) for entry in self.index["intensity"])

    def gather(
        self,
        ids: Sequence[int],
        variants: Sequence[int] | None = None,
        hints: Sequence[str] | None = None,
        simulated: Sequence[bool] | None = None,
    ) -> dict[str, np.ndarray]:
        """Rows `ids` -> {"latent": (B, C, H, W) fp16, "hint.<name>": same}, and "std" where it is stored.

        variants: (B,), variant 0 unless given. hints: which to read (default: all that are stored). simulated: (B,),
        True takes hints made from the tile even where it has a degraded partner. Raises IndexError for an id or
        variant outside the split, UserError for a hint or shard that is not there.
        """
        ids = np.asarray(ids, dtype=np.int64)
        picked = np.zeros(len(ids), np.int64) if variants is None else np.asarray(variants, dtype=np.int64)
        made = [False] * len(ids) if simulated is None else [bool(flag) for flag in simulated]
        _check_range("ids", ids, len(self))
        _check_range("variants", picked, self.variants)
        names = self.hint_names if hints is None else tuple(hints)
        sources = [self._sources(names, flag) for flag in (False, True)]
        keys = (*column_names((), (), self.index["posterior"]), *(f"hint.{name}" for name in names))
        out = [np.empty((len(ids), *self.shape), np.float16) for _ in keys]
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[numbers]
        columns = [sources[flag] for flag in made]
        places = [
            Place(number, row, variant, 1 + max(taken))
            for number, row, variant, taken in zip(
                numbers.tolist(), rows.tolist(), picked.tolist(), columns, strict=True
            )
        ]
        for place, (record, taken) in enumerate(zip(self._reader.records(places), columns, strict=True)):
            for values, column in zip(out, taken, strict=True):
                values[place] = record[column]
        return dict(zip(keys, out, strict=True))

    def records(self, ids: Sequence[int]) -> np.ndarray:
        """All that is stored of rows `ids`: (B, variants, columns, C, H, W) fp16."""
        ids = np.asarray(ids, dtype=np.int64)
        _check_range("ids", ids, len(self))
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        places = [
            Place(number, row, variant, len(self.columns))
            for number, row in zip(numbers.tolist(), (ids - self._starts[numbers]).tolist(), strict=True)
            for variant in range(self.variants)
        ]
        values = np.array(list(self._reader.records(places)), dtype=np.float16)
        return values.reshape(len(ids), self.variants, len(self.columns), *self.shape)

    def _sources(self, hints: Sequence[str], simulated: bool) -> list[int]:
        """Numbers of the columns that give the latent and these hints."""
        unknown = set(hints) - set(self.hint_names)
        if unknown:
            held = ", ".join(self.hint_names) or "none"
            raise UserError(f"{self.folder} holds no hint {min(unknown)!r}, its hints are {held}; {REMEDY}")
        names = list(column_names((), (), self.index["posterior"]))
        for hint in hints:
            made = f"simulated.{hint}"
            names.append(made if simulated and made in self.columns else f"hint.{hint}")
        return [self.columns.index(name) for name in names]

    def verify(self) -> list[str]:
        """Names of shards that are missing or whose bytes differ from the index; reads all of them."""
        shards = self.index["shards"]
        with ThreadPoolExecutor(_HASHERS) as pool:
            whole = list(pool.map(lambda shard: shard_is_whole(self.folder, shard["file"], shard["sha256"]), shards))
        return [shard["file"] for shard, fine in zip(shards, whole, strict=True) if not fine]

    def missing(self) -> list[str]:
        """Names of shards that are not there or have another size than the index says; reads none of them."""
        sizes = self.folder.sizes()
        return [shard["file"] for shard in self.index["shards"] if sizes.get(shard["file"]) != shard["bytes"]]


def column_names(hints: Sequence[str], simulated: Sequence[str], posterior: str = "mode") -> tuple[str, ...]:
    """Columns of a store with these hints and these hints made from the tile besides; `sample` stores a std."""
    tile = ("latent", "std") if posterior == "sample" else ("latent",)
    return (*tile, *(f"hint.{name}" for name in hints), *(f"simulated.{name}" for name in simulated))


def rows_together(rows: int, window: int | None, datasets: int) -> int:
    """Rows of a split that are read at about the same time: those of a window of each data set, or all."""
    return rows if window is None else min(rows, window * datasets)


def _check_range(name: str, values: np.ndarray, count: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= count):
        raise IndexError(f"{name} reach from {values.min()} to {values.max()}, the split has {count}")


def _read_json(folder: Folder, name: str, keys: Sequence[str]) -> dict:
    where = folder.where(name)
    try:
        data = folder.read(name)
    except FileNotFoundError:
        raise UserError(f"latent store: {where} is missing; encode the tiles with `ray-pipeline encode`") from None
    try:
        values = json.loads(data)
    except ValueError:  # of JSON and of UTF-8
        raise UserError(f"latent store: {where} is not valid JSON; {REMEDY}") from None
    if isinstance(values, dict) and values.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        return values
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        raise UserError(f"latent store: {where} lacks some of the keys {', '.join(keys)}; {REMEDY}")
    return values
