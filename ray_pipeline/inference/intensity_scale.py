"""Which intensities -1 and 1 stand for: those of a data set that the weights were trained on, or of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_pipeline.data.images import from_unit
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import IntensityRange

TILE = "tile"
UINT16 = np.iinfo(np.uint16)
#: as `prepare` takes them by default
PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class IntensityScale:
    """low, high: what -1 and 1 are, in units of `dtype` pixels; words: whose units these are."""

    low: float
    high: float
    dtype: str
    words: str

    @property
    def is_uint16(self) -> bool:
        """Whether pixels are written as 16-bit integers; else as float32."""
        if self.dtype in ("uint8", "uint16"):  # a range may reach below 0, which no such pixel does
            return True
        return np.dtype(self.dtype).kind in "iu" and self.low >= 0 and self.high <= UINT16.max

    def written(self, tile: np.ndarray) -> np.ndarray:
        """Tile (H, W) in [-1, 1] -> pixels in these units, uint16 or float32."""
        unit = (tile.astype(np.float64) + 1) / 2
        return from_unit(unit, self.low, self.high, np.uint16 if self.is_uint16 else np.float32)


#: where neither weights nor images say whose units the results have
UNIT_SCALE = IntensityScale(0, UINT16.max, "uint16", "the unit range as 0 to 65535 (the weights record no intensities)")


def scale_of(entry: IntensityRange) -> IntensityScale:
    """The scale of a recorded range."""
    return IntensityScale(entry.low, entry.high, entry.dtype, _name(entry))


def scale_of_image(plane: np.ndarray, name: str) -> IntensityScale:
    """An image's own scale: its percentiles as `prepare` takes them, else minimum and maximum; UserError for a constant
    image."""
    low, high = (float(value) for value in np.percentile(plane, PERCENTILES))
    if low == high:
        low, high = float(plane.min()), float(plane.max())
    if low == high:
        raise UserError(f"{name}: found a constant image, every pixel is {low:g}; give another one")
    return IntensityScale(low, high, plane.dtype.name, f"those of {name}")


def choose_range(
    ranges: Sequence[IntensityRange], dataset: str | None = None, channel: int | None = None
) -> IntensityRange | None:
    """The recorded range of the data set, and channel, with the most training tiles; None where none is recorded.

    UserError for a data set or channel that none is recorded of.
    """
    tiles = [entry for entry in ranges if entry.role == TILE]
    fitting = [entry for entry in tiles if dataset in (None, entry.dataset) and channel in (None, entry.channel)]
    if not fitting and (dataset is not None or channel is not None):
        words = " ".join(
            [f"--dataset {dataset}"] * (dataset is not None) + [f"--channel {channel}"] * (channel is not None)
        )
        known = "; ".join(_name(entry) for entry in tiles) or "none"
        raise UserError(f"{words}: the weights record no intensities of it, known are: {known}; choose one of them")
    return max(fitting, key=lambda entry: entry.tiles, default=None)


def range_of_hint(ranges: Sequence[IntensityRange], chosen: IntensityRange, hint: str) -> IntensityRange | None:
    """What was recorded of a hint's partners in the data set and channel of `chosen`; None where nothing was."""
    fitting = [
        entry
        for entry in ranges
        if (entry.role, entry.dataset, entry.channel) == (hint, chosen.dataset, chosen.channel)
    ]
    return max(fitting, key=lambda entry: (entry.dtype == chosen.dtype, entry.tiles), default=None)


def alternatives(ranges: Sequence[IntensityRange], chosen: IntensityRange) -> str:
    """The other recorded ranges of tiles, in words; empty where there are none."""
    return "; ".join(_name(entry) for entry in ranges if entry.role == TILE and entry != chosen)


def _name(entry: IntensityRange) -> str:
    return f"{entry.dataset} channel {entry.channel} ({entry.dtype} {entry.low:g} to {entry.high:g})"
