"""What -1 and 1 are in the units of the source, as far as manifests tell it for all tiles of a group."""

from __future__ import annotations

import math

import pandas as pd

from ray_pipeline.models.weights import IntensityRange

#: (channel, dtype, low, high) of one manifest row
SourceRange = tuple[int, str, float, float]
_COLUMNS = ("channel_idx", "dtype", "norm_lo", "norm_hi")


def source_ranges(table: pd.DataFrame) -> list[SourceRange | None]:
    """The range of each row of a manifest; None where it does not tell channel and dtype, and low and high are nan
    where it does not tell these."""
    if not set(_COLUMNS) <= set(table.columns):
        return [None] * len(table)
    return [
        None if math.isnan(channel) or not dtype else (int(channel), dtype, float(low), float(high))
        for channel, dtype, low, high in zip(*(table[name] for name in _COLUMNS), strict=True)
    ]


class RangeTally:
    """Counts the tiles of each data set, role, channel and dtype while all of them have one range."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, int, str], tuple[float, float, int] | None] = {}

    def add(self, dataset: str, role: str, found: SourceRange | None) -> None:
        """Count one tile (role `tile`) or partner (role: the hint's name); a group of several ranges has none."""
        if found is None:
            return
        channel, dtype, low, high = found
        group = (dataset, role, channel, dtype)
        before = self._groups.get(group, (low, high, 0))
        agrees = before is not None and before[:2] == (low, high) and math.isfinite(high - low) and low < high
        self._groups[group] = (low, high, before[2] + 1) if agrees else None

    def ranges(self) -> tuple[IntensityRange, ...]:
        """The groups that have one range, in order."""
        return tuple(
            IntensityRange(dataset=dataset, role=role, channel=channel, dtype=dtype, low=low, high=high, tiles=tiles)
            for (dataset, role, channel, dtype), (low, high, tiles) in sorted(
                (group, known) for group, known in self._groups.items() if known is not None
            )
        )
