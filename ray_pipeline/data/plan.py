"""Which sample at which step: a pure function of (seed, phase, step), with no permutation array.

Samples form one endless sequence, epoch after epoch. Element p of epoch e is found by a keyed permutation: a Feistel
network on the smallest even number of bits that holds the range, applied again while it lands outside ("cycle
walking", Black & Rogaway 2002). Any element costs O(1) time and memory.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass

import numpy as np

# six rounds leave neighbours of each other too often neighbours where there are under a hundred rows
_ROUNDS = 12


@dataclass(frozen=True)
class SamplePlan:
    """Global batches of one phase over `num_samples` rows.

    shard_rows, window: rows of a shard and of a shuffle window. Without a window each epoch is a full shuffle. With
    one, shards are shuffled, their rows are laid end to end, and rows are shuffled inside consecutive windows, so
    that the rows of a window lie in few shards.
    """

    num_samples: int
    global_batch: int
    seed: int
    phase: str = ""
    shard_rows: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "global_batch", "seed", "shard_rows", "window"):
            value = getattr(self, name)
            # a numpy integer overflows, and prints otherwise than the same int
            object.__setattr__(self, name, None if value is None else operator.index(value))
        for name in ("num_samples", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if (self.window is None) != (self.shard_rows is None):
            raise ValueError("window and shard_rows go together: give both or neither")
        if self.window is not None and min(self.window, self.shard_rows) < 1:
            raise ValueError(f"window is {self.window} and shard_rows {self.shard_rows}, expected at least 1 each")

    def steps(self, epochs: int) -> int:
        """Optimizer steps after which `epochs` epochs are complete; the last batch may reach into the next epoch."""
        return -(-self.num_samples * epochs // self.global_batch)

    def epoch(self, position: int) -> int:
        """Epoch (from 1) that the sample at `position` belongs to."""
        return position // self.num_samples + 1

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Indices in the endless sequence of a rank's slice of global batch `step`, int64; slices differ by at most
        one sample."""
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        if not 0 <= rank < world_size <= self.global_batch:
            raise ValueError(
                f"rank {rank} of world size {world_size} has no slice of a global batch of {self.global_batch}"
            )
        start = int(step) * self.global_batch
        low, high = (start + self.global_batch * part // world_size for part in (rank, rank + 1))
        return np.arange(low, high, dtype=np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Row ids of global batch `step` (from 0), (global_batch,) int64."""
        return self.ids(self.positions(step))

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Row ids of a rank's slice of global batch `step`, int64."""
        return self.ids(self.positions(step, rank, world_size))

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Row ids at positions of the endless sequence, int64 -> int64."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._epoch_ids(int(epoch), places[chosen])
        return ids

    def _epoch_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.window is None:
            return permute(places, self.num_samples, self._key("rows", epoch))
        return self._unshard(epoch, self._within_windows(epoch, places))

    def _within_windows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        shuffled = np.empty_like(places)
        windows = places // self.window
        for window in np.unique(windows):
            chosen, start = windows == window, int(window) * self.window
            size = min(self.window, self.num_samples - start)
            key = self._key("window", epoch, int(window))
            shuffled[chosen] = start + permute(places[chosen] - start, size, key)
        return shuffled

    def _unshard(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Place in the sequence of shuffled shards -> row id; the last shard may be short and shift what follows."""
        rows = self.shard_rows
        shards = -(-self.num_samples // rows)
        key = self._key("shards", epoch)
        missing = shards * rows - self.num_samples
        short = int(unpermute(np.array([shards - 1]), shards, key)[0])
        behind = places >= short * rows + rows - missing
        places = np.where(behind, places + missing, places)
        return permute(places // rows, shards, key) * rows + places % rows

    def _key(self, *parts: str | int) -> tuple[int, ...]:
        return round_keys(self.seed, self.phase, *parts)


def round_keys(*parts: str | int) -> tuple[int, ...]:
    """Keys of the Feistel rounds from strings and integers; equal parts give equal keys on every machine."""
    digest = hashlib.shake_256(repr(parts).encode()).digest(8 * _ROUNDS)
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(values: np.ndarray, size: int, keys: tuple[int, ...]) -> np.ndarray:
    """A keyed permutation of range(size) at `values`, int64 -> int64."""
    return _walk(values, size, lambda halves, bits: _feistel(halves, bits, keys))


def unpermute(values: np.ndarray, size: int, keys: tuple[int, ...]) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(values, size, lambda halves, bits: _feistel_inverse(halves, bits, keys))


def _walk(values: np.ndarray, size: int, step) -> np.ndarray:
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    walked = np.asarray(values).astype(np.uint64)
    outside = np.ones(walked.shape, dtype=bool)
    while outside.any():
        walked[outside] = step(walked[outside], bits)
        outside = walked >= np.uint64(size)
    return walked.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: tuple[int, ...]) -> np.ndarray:
    left, right, mask = _split(values, bits)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << np.uint64(bits)) | right


def _feistel_inverse(values: np.ndarray, bits: int, keys: tuple[int, ...]) -> np.ndarray:
    left, right, mask = _split(values, bits)
    for key in reversed(keys):
        left, right = right ^ (_mix(left, key) & mask), left
    return (left << np.uint64(bits)) | right


def _split(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.uint64]:
    mask = np.uint64((1 << bits) - 1)
    return values >> np.uint64(bits), values & mask, mask


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014) on value + key, modulo 2^64."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
