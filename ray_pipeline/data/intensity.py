"""Intensity ranges of a data set: the percentiles of all its pixels, counted image by image.

8 and 16-bit integers are counted value by value, and their percentiles are exact; wider types are counted in
HISTOGRAM_BINS bins between the minimum and maximum of all their pixels.
"""

import numpy as np
from skimage.filters import threshold_otsu

HISTOGRAM_BINS = 1 << 20
#: where the percentiles lie in less than this part of the bins, they are counted again in a narrower window
FEW_BINS = 64
PIXELS_AT_ONCE = 1 << 22
Group = tuple[str, str, int, str]  # (data set, kind, channel, dtype)


def is_narrow(dtype: str | np.dtype) -> bool:
    """Whether `dtype` is an integer of at most 16 bit, so that `count_values` can count each value."""
    return np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize <= 2


def count_values(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a narrow dtype, any shape -> int64 counts of every value from the dtype's least on."""
    limits = np.iinfo(pixels.dtype)
    counts = np.zeros(limits.max - limits.min + 1, np.int64)
    flat = pixels.reshape(-1)
    for start in range(0, flat.size, PIXELS_AT_ONCE):  # bincount needs 8 bytes a pixel
        part = flat[start : start + PIXELS_AT_ONCE].astype(np.int64) - limits.min
        counts += np.bincount(part, minlength=counts.size)
    return counts


def count_bins(pixels: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Pixels, any shape -> int64 counts (HISTOGRAM_BINS,) in equal bins from lo to hi; those beyond are counted in the
    first and the last bin."""
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    flat = pixels.reshape(-1)
    for start in range(0, flat.size, PIXELS_AT_ONCE):
        # float16 and float32 cannot tell the edges of so many bins apart, and numpy makes the edges in that type
        part = np.clip(flat[start : start + PIXELS_AT_ONCE].astype(np.float64), lo, hi)
        counts += np.histogram(part, HISTOGRAM_BINS, (lo, hi))[0]
    return counts


def add_counts(total: dict[Group, np.ndarray], new: dict[Group, np.ndarray]) -> None:
    """Adds the counts of one image to those of its groups, in place."""
    for group, counts in new.items():
        total[group] = total.get(group, 0) + counts


def percentile_of_counts(counts: np.ndarray, first: float, step: float, q: float) -> float:
    """q-th percentile (0 to 100) of values first + step * index held `counts` times each.

    Linear between order statistics, as numpy.percentile.
    """
    cumulative = np.cumsum(counts)
    rank = (int(cumulative[-1]) - 1) * q / 100.0
    below, above = np.searchsorted(cumulative, [int(rank), np.ceil(rank)], side="right")
    return float(first + step * (below + (above - below) * (rank - int(rank))))


def intensity_ranges(
    counts: dict[Group, np.ndarray],
    limits: dict[Group, tuple[float, float]],
    windows: dict[Group, tuple[float, float]],
    percentiles: tuple[float, float],
) -> dict[Group, tuple[float, float]]:
    """Counts and (minimum, maximum) of each group -> its two percentiles (0 to 100) as (lo, hi), lo < hi.

    `counts` from `count_values` for narrow dtypes, else from `count_bins` over the group's window, which holds both
    percentiles. Both percentiles equal: minimum and maximum.
    """
    ranges = {}
    for group, (lo, hi) in sorted(limits.items()):
        first, step = scale_of_counts(group, windows)
        low, high = (min(max(percentile_of_counts(counts[group], first, step, q), lo), hi) for q in percentiles)
        ranges[group] = (low, high) if low < high else (lo, hi)
    return ranges


def narrower_window(
    counts: np.ndarray, window: tuple[float, float], percentiles: tuple[float, float]
) -> tuple[float, float] | None:
    """The bins that hold both percentiles, with one more on either side, where they are so few of all that a few pixels
    far off must have stretched the window; None where the window fits."""
    cumulative = np.cumsum(counts)
    ranks = [(int(cumulative[-1]) - 1) * q / 100.0 for q in percentiles]
    below, above = np.searchsorted(cumulative, [int(ranks[0]), np.ceil(ranks[1])], side="right")
    if (above - below + 3) * FEW_BINS > HISTOGRAM_BINS:
        return None
    step = (window[1] - window[0]) / HISTOGRAM_BINS
    narrower = (max(window[0], window[0] + step * (below - 1)), min(window[1], window[0] + step * (above + 2)))
    return narrower if window[0] < narrower[1] and narrower[0] < narrower[1] and narrower != window else None


def scale_of_counts(group: Group, windows: dict[Group, tuple[float, float]]) -> tuple[float, float]:
    """Intensity that the first count of a group stands for, and from one to the next."""
    (*_, dtype), (lo, hi) = group, windows[group]
    return (float(np.iinfo(dtype).min), 1.0) if is_narrow(dtype) else (lo, (hi - lo) / HISTOGRAM_BINS)


def background_levels(counts: dict[Group, np.ndarray], windows: dict[Group, tuple[float, float]]) -> dict[Group, float]:
    """Otsu's threshold between background and content of each group, in source units (Otsu 1979)."""
    levels = {}
    for group in windows:
        first, step = scale_of_counts(group, windows)
        held = np.flatnonzero(counts[group])
        levels[group] = float(threshold_otsu(hist=(counts[group][held], first + step * held)))
    return levels
