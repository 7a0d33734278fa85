"""Which sample at which step: a pure function of (seed, phase, step), with no permutation array.

Samples form one endless sequence, epoch after epoch. Element p of epoch e is found by a keyed permutation: a Feistel
network over a rectangle a x b that just holds the range (Black & Rogaway 2002, "generalized Feistel"), applied again
while it lands outside ("cycle walking"). Any element costs O(1) time and memory.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

# Feistel rounds by the shorter side of the rectangle, the first that fits. Computed over ideal rounds: where four rows
# come differs from uniform by a chi-square divergence of about side^(4 - rounds), and on 4 x 2 by 7e-6 after 24 rounds
_ROUNDS = ((32, 8), (4, 12), (1, 24))

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
    one, shards are shuffled, their rows are laid end to end in a ring that starts anywhere, and rows are shuffled
    inside consecutive windows, so that the rows of a window lie in few shards.
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
        for epoch, chosen in _groups(epochs):
            ids[chosen] = self._epoch_ids(epoch, places[chosen])
        return ids

    def _epoch_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.window is None:
            return permute(places, self.num_samples, self._key("rows", epoch))
        return self._unshard(epoch, self._within_windows(epoch, places))

    def _within_windows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        shuffled = np.empty_like(places)
        for window, chosen in _groups(places // self.window):
            start = window * self.window
            size = min(self.window, self.num_samples - start)
            shuffled[chosen] = start + permute(places[chosen] - start, size, self._key("window", epoch, window))
        return shuffled

    def _unshard(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Place in the ring of shuffled shards -> row id."""
        # with a fixed start, some places would see some rows more often where shards and windows do not divide the data
        # set; and on a ring that starts anywhere, a short last shard can keep its place
        start = self._key("start", epoch)[0].item() % self.num_samples
        shards, rests = np.divmod((places + start) % self.num_samples, self.shard_rows)
        full_shards = self.num_samples // self.shard_rows
        full = shards < full_shards
        shards[full] = permute(shards[full], max(full_shards, 1), self._key("shards", epoch))
        return shards * self.shard_rows + rests

    def _key(self, *parts: str | int) -> tuple[np.ndarray, ...]:
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
        breaks = np.flatnonzero(positions[1:] - positions[:-1] != 1) + 1
        for start, end in pairwise((0, *breaks.tolist(), len(positions))):
            pairs[start:end, 0], pairs[start:end, 1] = self._run(positions[start:end])
        return pairs

    def _run(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data sets and rows of positions that follow each other."""
        where = (positions.astype(np.uint64) * _uint64(_TURN_STEP) + _uint64(self._offset)) % _uint64(_TURN)
        chosen = np.searchsorted(self._borders, where.astype(np.int64), side="right") - 1
        rows = np.empty_like(chosen)
        for number, places in _groups(chosen):
            first = self._count_before(int(positions[0]), number)
            rows[places] = self.plans[number].ids(np.arange(first, first + len(rows[places])))
        return chosen, rows

    def _count_before(self, position: int, number: int) -> int:
        """How many of the positions before `position` belong to data set `number`."""
        low, high = (self._offset + _TURN - border for border in self._borders[number : number + 2])
        return _floor_sum(position, _TURN, _TURN_STEP, low) - _floor_sum(position, _TURN, _TURN_STEP, high)


def _groups(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Each label and where it stands."""
    found = set(labels.ravel().tolist())  # far quicker than np.unique where there are few
    for label in found:
        yield label, labels == label if len(found) > 1 else slice(None)


# the border between two data sets ends the one and starts the other
@lru_cache(maxsize=64)
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
    most = _ROUNDS[-1][1]
    words = np.frombuffer(hashlib.shake_256(repr(parts).encode()).digest(8 * most), dtype="<u8")
    return tuple(words[number, ...] for number in range(most))


def permute(values: np.ndarray, size: int, keys: tuple[np.ndarray, ...]) -> np.ndarray:
    """A keyed permutation of range(size) at `values`, int64 -> int64; size below 2^62."""
    # a round on two odd sides is an even permutation: half of all orders would never come
    even = (math.isqrt(size - 1) + 2) // 2 * 2
    other = -(-size // even)  # fewer than `even` places too many
    sides, keys = (_uint64(even), _uint64(other)), keys[: next(count for side, count in _ROUNDS if other >= side)]
    walked = _feistel(np.asarray(values).astype(np.uint64), sides, keys)
    while (outside := walked >= size).any():
        walked[outside] = _feistel(walked[outside], sides, keys)
    return walked.astype(np.int64)


def _feistel(values: np.ndarray, sides: tuple[np.ndarray, np.ndarray], keys: tuple[np.ndarray, ...]) -> np.ndarray:
    halves = list(np.divmod(values, sides[1]))
    for number, key in enumerate(keys):
        turn = number % 2
        halves[turn] = (halves[turn] + _mix(halves[1 - turn], key)) % sides[turn]
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
