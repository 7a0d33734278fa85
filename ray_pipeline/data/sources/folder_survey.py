"""The images of a folder before any tile is cut: which there are, which can be used, how bright they are."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ray_pipeline.data.images import IMAGE_SUFFIXES, read_image
from ray_pipeline.data.intensity import Group, add_counts, count_bins, count_values, intensity_ranges, is_narrow
from ray_pipeline.errors import UserError

# Image formats that are not read: a person expects them in the result, so they are rejected, not ignored.
OTHER_IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".jp2", ".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".oir",
    ".ims", ".dv", ".stk", ".vsi", ".svs", ".mrc",
)  # fmt: skip
# Below this share of its group's range an image is reported: it may belong to a data set of its own.
DIM_PEAK = 0.3
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Survey:
    """First look at an image: `reason` when rejected, else (minimum, maximum) of channels that become tiles."""

    name: str
    reason: str = ""
    dtype: str = ""
    limits: dict[int, tuple[float, float]] = field(default_factory=dict)
    empty: tuple[int, ...] = ()


def list_images(source: Path) -> tuple[list[str], list[tuple[str, str]], int]:
    """Files below `source` -> image names (relative, sorted), rejected links (name, reason), others' count.

    Hidden files count as others, hidden folders are not entered. Linked folders, and linked images from
    outside `source`, are rejected.
    """
    names, rejected, others = [], [], 0
    root = source.resolve()
    for folder, folders, files in os.walk(source):
        links = [f for f in folders if Path(folder, f).is_symlink()]
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files + links:
            path = Path(folder, file)
            name = path.relative_to(source).as_posix()
            is_image = path.suffix.lower() in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES
            if file.startswith(".") or (not is_image and file not in links):
                others += 1
            elif file in links or not path.resolve().is_relative_to(root):
                reason = f"a link to {path.resolve()}, expected a file in the folder; copy it there"
                rejected.append((name, reason))
            else:
                names.append(name)
    return sorted(names), sorted(rejected), others


def survey_images(
    source: Path, names: list[str], tile_size: int, channels: tuple[int, ...] | None, report: Callable[[int], None]
) -> tuple[list[Survey], dict[Group, np.ndarray]]:
    """`survey_image` of all `names`, in their order, and the sum of their counts; report(images done)."""
    surveys, counts = [], {}
    for survey, new in in_threads(lambda name: survey_image(source, name, tile_size, channels), names):
        surveys.append(survey)
        add_counts(counts, new)
        report(len(surveys))
    return surveys, counts


def survey_image(
    source: Path, name: str, tile_size: int, channels: tuple[int, ...] | None
) -> tuple[Survey, dict[Group, np.ndarray]]:
    """Reads one image -> Survey (with a reason when no tile can be cut), counts of 8 and 16-bit intensities."""
    path = source / name
    try:
        pixels = read_image(path).pixels
    except UserError as error:
        return Survey(name, str(error).removeprefix(f"{path}: ")), {}
    count, height, width = pixels.shape
    if min(height, width) < tile_size:
        return Survey(name, f"{height} x {width} pixels, smaller than a tile of {tile_size}"), {}
    wanted = range(count) if channels is None else [c for c in channels if c < count]
    if not wanted:
        return Survey(name, f"{count} channel(s), none of those asked for ({channels})"), {}
    limits = {c: (float(pixels[c].min()), float(pixels[c].max())) for c in wanted}
    empty = tuple(c for c, (lo, hi) in limits.items() if lo == hi)
    if len(empty) == len(limits):
        return Survey(name, f"constant image, every pixel is {limits[empty[0]][0]:g}"), {}
    limits = {c: limit for c, limit in limits.items() if c not in empty}
    dtype = pixels.dtype.name
    narrow = limits if is_narrow(dtype) else ()
    counts = {(c, dtype): count_values(pixels[c]) for c in narrow}
    return Survey(name, "", dtype, limits, empty), counts


def ranges_of_surveys(
    source: Path,
    surveys: list[Survey],
    counts: dict[Group, np.ndarray],
    percentiles: tuple[float, float],
) -> dict[Group, tuple[float, float]]:
    """Percentiles over all pixels of each (channel, dtype) -> (lo, hi) in source units, lo < hi.

    `counts` holds the 8 and 16-bit groups. Images of wider types are read a second time, now that the limits
    of their bins are known.
    """
    limits: dict[Group, tuple[float, float]] = {}
    for survey in surveys:
        for c, (lo, hi) in survey.limits.items():
            group_lo, group_hi = limits.get((c, survey.dtype), (lo, hi))
            limits[c, survey.dtype] = min(lo, group_lo), max(hi, group_hi)

    def read_again(survey: Survey) -> dict[Group, np.ndarray]:
        pixels = read_image(source / survey.name).pixels
        groups = {(c, survey.dtype): pixels[c] for c in survey.limits}
        return {group: count_bins(plane, *limits[group]) for group, plane in groups.items()}

    counts = dict(counts)
    for new in in_threads(read_again, [s for s in surveys if not is_narrow(s.dtype)]):
        add_counts(counts, new)
    return intensity_ranges(counts, limits, percentiles)


def is_dim(survey: Survey, ranges: dict[Group, tuple[float, float]]) -> bool:
    """Whether every channel of an image stays below DIM_PEAK of its group's range."""
    groups = {c: ranges[c, survey.dtype] for c in survey.limits}
    return all((survey.limits[c][1] - lo) < DIM_PEAK * (hi - lo) for c, (lo, hi) in groups.items())


def in_threads(work: Callable, items: Iterable) -> Iterator:
    """Results in the order of items, with no more than a few items in memory."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
