"""Which sample at which step: a pure function of (seed, phase, step), with no permutation array.

Samples form one endless sequence, epoch after epoch. Element p of epoch e is found by a keyed permutation: a Feistel
network over a rectangle a x b that just holds the range (Black & Rogaway 2002, "generalized Feistel"), applied again
while it lands outside ("cycle walking"). Any element costs O(1) time and memory.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np

# six rounds leave neighbours of each other too often neighbours where there are under a hundred rows
_ROUNDS = 12

# of the sequence n * step mod 2^32 that spreads data sets; 2^32 over the golden ratio, so no gap is ever long
_TURN = 1 << 32
_TURN_STEP = 2654435769


def _uint64(value: int) -> np.ndarray:
    # of no dimension: numpy is slower with its scalars, and a step plans with arrays of few elements
    return np.array(value, dtype=np.uint64)


_FACTORS = _uint64(0xBF58476D1CE4E5B9), _uint64(0x94D049BB133111EB)
_HALF = _uint64(32)


class Plan:
    """Global batches cut from an endless sequence of samples: what `SamplePlan` and `MixedPlan` share.

    num_samples: samples of an epoch; position: index in the endless sequence.
    """

    num_samples: int
    global_batch: int
    seed: int
    phase: str

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """What stands at `positions` of the endless sequence."""
        raise NotImplementedError

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
        """Ids of global batch `step` (from 0), (global_batch, ...) int64."""
        return self.ids(self.positions(step))

    def rank_batch(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Ids of a rank's slice of global batch `step`, int64."""
        return self.ids(self.positions(step, rank, world_size))

    def variants(self, positions: np.ndarray, count: int) -> np.ndarray:
        """Augmentation variant, 0 to count - 1, of the samples at `positions`, int64."""
        key = round_keys(self.seed, self.phase, "variant")[0]
        return (_mix(np.asarray(positions).astype(np.uint64), key) % _uint64(count)).astype(np.int64)


@dataclass(frozen=True)
class SamplePlan(Plan):
    """Global batches of one phase over `num_samples` rows; an id is a row.

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
        _make_int(self, "num_samples", "global_batch", "seed", "shard_rows", "window")
        for name in ("num_samples", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if (self.window is None) != (self.shard_rows is None):
            raise ValueError("window and shard_rows go together: give both or neither")
        if self.window is not None and min(self.window, self.shard_rows) < 1:
            raise ValueError(f"window is {self.window} and shard_rows {self.shard_rows}, expected at least 1 each")

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
        short = _place_of_last(shards, self.seed, self.phase, "shards", epoch)
        behind = places >= short * rows + rows - missing
        places = np.where(behind, places + missing, places)
        return permute(places // rows, shards, key) * rows + places % rows

    def _key(self, *parts: str | int) -> tuple[int, ...]:
        return round_keys(self.seed, self.phase, *parts)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """Global batches drawn from several data sets in given proportions; an id is a pair (data set, its row).

    Position n belongs to the data set in whose share of the circle n * 0.618... mod 1 falls (Weyl's sequence), so that
    any stretch holds each data set nearly in proportion. The j-th sample of a data set is the j-th of its own plan:
    its own epochs stay whole, and a small one of great weight repeats evenly. How many came before is counted in
    O(log n). An epoch of the mixture is as many samples as the data sets hold together.
    """

    plans: Sequence[SamplePlan]
    weights: Sequence[float]
    global_batch: int
    seed: int
    phase: str = ""
    _borders: tuple[int, ...] = field(init=False, repr=False)
    _offset: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _make_int(self, "global_batch", "seed")
        if self.global_batch < 1:
            raise ValueError(f"global_batch is {self.global_batch}, expected at least 1")
        if not self.plans or len(self.plans) != len(self.weights):
            raise ValueError(f"{len(self.plans)} plans and {len(self.weights)} weights, expected one weight a plan")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights are {list(self.weights)}, expected positive numbers")
        sums = list(accumulate(self.weights))
        borders = (0, *(round(_TURN * (part / sums[-1])) for part in sums))
        if len(set(borders)) < len(borders):
            raise ValueError(f"weights are {list(self.weights)}: the smallest share is below 1 in {_TURN}")
        object.__setattr__(self, "_borders", borders)
        object.__setattr__(self, "_offset", int(round_keys(self.seed, self.phase, "mixture")[0]) % _TURN)

    @property
    def num_samples(self) -> int:
        return sum(plan.num_samples for plan in self.plans)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """(data set, row id) at positions of the endless sequence, int64 (B,) -> int64 (B, 2)."""
        positions = np.asarray(positions, dtype=np.int64)
        pairs = np.empty((len(positions), 2), dtype=np.int64)
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            pairs[start:end] = self._run(int(positions[start]), int(end - start))
        return pairs

    def _run(self, first: int, count: int) -> np.ndarray:
        """Pairs of `count` positions in a row."""
        places = np.arange(first, first + count, dtype=np.uint64)
        where = (places * _uint64(_TURN_STEP) + _uint64(self._offset)) % _uint64(_TURN)
        chosen = np.searchsorted(self._borders, where.astype(np.int64), side="right") - 1
        before = [self._count_below(first, border) for border in self._borders]
        pairs = np.stack([chosen, np.empty_like(chosen)], axis=1)
        for number, plan in enumerate(self.plans):
            places = np.flatnonzero(chosen == number)
            own = before[number + 1] - before[number] + np.arange(len(places))
            pairs[places, 1] = plan.ids(own)
        return pairs

    def _count_below(self, end: int, border: int) -> int:
        """How many of the positions 0 to end - 1 fall below `border` on the circle."""
        low, high = self._offset, self._offset + _TURN - border
        return end + _floor_sum(end, _TURN, _TURN_STEP, low) - _floor_sum(end, _TURN, _TURN_STEP, high)


def _floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """Sum of floor((step * i + start) / modulus) for i = 0 to count - 1, by Euclid's reduction."""
    total = 0
    while count:
        total += (step // modulus) * (count * (count - 1) // 2) + (start // modulus) * count
        step, start = step % modulus, start % modulus
        top = step * count + start
        count, start = divmod(top, modulus)
        modulus, step = step, modulus
    return total


@lru_cache(maxsize=1024)
def round_keys(*parts: str | int) -> tuple[np.ndarray, ...]:
    """Keys of the Feistel rounds from strings and integers, uint64; equal parts give equal keys on every machine."""
    digest = hashlib.shake_256(repr(parts).encode()).digest(8 * _ROUNDS)
    return tuple(map(_uint64, np.frombuffer(digest, dtype="<u8")))


@lru_cache(maxsize=1024)
def _place_of_last(size: int, *key_parts: str | int) -> int:
    """Where a permutation of range(size) puts size - 1."""
    return int(unpermute(np.array([size - 1]), size, round_keys(*key_parts))[0])


def permute(values: np.ndarray, size: int, keys: tuple[np.ndarray, ...]) -> np.ndarray:
    """A keyed permutation of range(size) at `values`, int64 -> int64; size below 2^62."""
    return _walk(values, size, keys, _feistel)


def unpermute(values: np.ndarray, size: int, keys: tuple[np.ndarray, ...]) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(values, size, keys, _feistel_inverse)


def _walk(values: np.ndarray, size: int, keys: tuple[np.ndarray, ...], step) -> np.ndarray:
    side = math.isqrt(size - 1) + 1
    sides = _uint64(side), _uint64(-(-size // side))  # a rectangle with less than one row too many
    walked = step(np.asarray(values).astype(np.uint64), sides, keys)
    while (outside := walked >= size).any():
        walked[outside] = step(walked[outside], sides, keys)
    return walked.astype(np.int64)


def _feistel(values: np.ndarray, sides: tuple[np.ndarray, np.ndarray], keys: tuple[np.ndarray, ...]) -> np.ndarray:
    halves = list(np.divmod(values, sides[1]))
    for number, key in enumerate(keys):
        turn = number % 2
        halves[turn] = (halves[turn] + _mix(halves[1 - turn], key)) % sides[turn]
    return halves[0] * sides[1] + halves[1]


def _feistel_inverse(
    values: np.ndarray, sides: tuple[np.ndarray, np.ndarray], keys: tuple[np.ndarray, ...]
) -> np.ndarray:
    halves = list(np.divmod(values, sides[1]))
    for number, key in reversed(list(enumerate(keys))):
        turn = number % 2
        halves[turn] = (halves[turn] + sides[turn] - _mix(halves[1 - turn], key) % sides[turn]) % sides[turn]
    return halves[0] * sides[1] + halves[1]


def _mix(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """32 well-mixed bits of value + key: two multiplications modulo 2^64 with what splitmix64 (Steele et al. 2014)
    multiplies by, the upper half folded in between."""
    mixed = (values + key) * _FACTORS[0]
    return ((mixed ^ (mixed >> _HALF)) * _FACTORS[1]) >> _HALF


def _make_int(plan: Plan, *names: str) -> None:
    for name in names:
        value = getattr(plan, name)
        # a numpy integer overflows, and prints otherwise than the same int
        object.__setattr__(plan, name, None if value is None else operator.index(value))
