"""Records of the shards of a latent store: mapped on a disk; of object storage a request each, or parts of blocks that
are kept on this node's disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from ray_pipeline.data.block_cache import BlockCache
from ray_pipeline.data.shards import Shard
from ray_pipeline.storage import Folder

_MAPPED_SHARDS = 256  # kept open on a disk
_REMOTE_SHARDS = 65536  # kept open in object storage, where one is a name and a header, and opening takes two requests
_REQUESTS = 32  # to object storage at once
#: a request of object storage takes about as long as so many bytes, and one rank's requests stay below 128 MiB
_BLOCK_BYTES = 4 * 2**20
#: of a cache that rows read together may take; the rest is for what was read before them and for other splits
SHARE_USED = 0.8


class Place(NamedTuple):
    """The first `count` columns of one variant of a shard's row."""

    shard: int
    row: int
    variant: int
    count: int


class ShardReader:
    """Reads the shards of one split; entries: of its index. shape: (variants, columns, C, H, W).

    cache: used in object storage alone. together: rows that are read at about the same time; a cache that does not hold
    them would only make each request larger, and is not used.
    """

    def __init__(
        self,
        folder: Folder,
        entries: Sequence[dict],
        shape: tuple[int, ...],
        cache: BlockCache | None = None,
        together: int = 0,
    ):
        self.folder, self.entries, self.shape = folder, entries, shape
        self.latent_bytes = 2 * int(np.prod(shape[2:]))
        self.row_bytes = shape[0] * shape[1] * self.latent_bytes
        self.block_rows = max(1, _BLOCK_BYTES // self.row_bytes)
        fits = cache is not None and together * self.row_bytes <= SHARE_USED * cache.limit
        self.cache = cache if fits else None
        self._opened: dict[int, Shard] = {}
        self._opening: dict[int, Lock] = {}

    def records(self, places: Sequence[Place]) -> Iterable[np.ndarray]:
        """(count, C, H, W) fp16 of each place, in order. UserError names a shard that is missing or damaged."""
        if self.folder.local is not None:
            shards = self._shards({place.shard for place in places}, map)
            for place in places:
                shards[place.shard].announce(place.row, place.variant, place.count)
            return [shards[place.shard].record(*place[1:]) for place in places]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            if self.cache is not None:
                return self._of_blocks(places, pool.map)
            shards = self._shards({place.shard for place in places}, pool.map)
            return list(pool.map(lambda place: shards[place.shard].record(*place[1:]), places))

    def _of_blocks(self, places: Sequence[Place], each: Callable) -> list[np.ndarray]:
        groups: dict[tuple[int, int], list[int]] = {}
        for number, place in enumerate(places):
            groups.setdefault((place.shard, place.row // self.block_rows), []).append(number)
        found: list[np.ndarray | None] = [None] * len(places)
        blocks = [(*block, [places[number] for number in numbers]) for block, numbers in groups.items()]
        for numbers, records in zip(groups.values(), each(lambda block: self._of_block(*block), blocks), strict=True):
            for number, record in zip(numbers, records, strict=True):
                found[number] = record
        self._forget()
        return found

    def _of_block(self, number: int, block: int, places: Sequence[Place]) -> list[np.ndarray]:
        """Records that lie in one block of a shard."""
        entry, variants, columns = self.entries[number], *self.shape[:2]
        header = entry["bytes"] - entry["rows"] * self.row_bytes
        start = block * self.block_rows
        first, size = header + start * self.row_bytes, min(self.block_rows, entry["rows"] - start) * self.row_bytes
        spans = [
            (((row - start) * variants + variant) * columns * self.latent_bytes, count * self.latent_bytes)
            for _, row, variant, count in places
        ]
        parts = self.cache.read(entry["sha256"], first, size, spans, lambda: self._shard(number).part(first, size))
        if parts is None:
            return [self._shard(number).record(*place[1:]) for place in places]
        return [np.frombuffer(part, dtype=np.float16).reshape(-1, *self.shape[2:]) for part in parts]

    def _shards(self, numbers: Iterable[int], each: Callable) -> dict[int, Shard]:
        """Shards by number; `each` maps opening over those that are not open."""
        shards = {number: self._opened.pop(number, None) for number in numbers}
        closed = [number for number, shard in shards.items() if shard is None]
        shards |= zip(closed, each(self._open, closed), strict=True)
        for shard in shards.values():
            shard.check()
        self._opened |= shards  # those used last stand last
        self._forget()
        return shards

    def _shard(self, number: int) -> Shard:
        """One shard, opened by the first of several threads."""
        with self._opening.setdefault(number, Lock()):
            if number not in self._opened:
                self._opened[number] = self._open(number)
            return self._opened[number]

    def _forget(self) -> None:
        kept = _REMOTE_SHARDS if self.folder.local is None else _MAPPED_SHARDS
        for number in list(self._opened)[:-kept]:
            self._opened.pop(number, None)

    def _open(self, number: int) -> Shard:
        entry = self.entries[number]
        return Shard(self.folder, entry, (entry["rows"], *self.shape))
