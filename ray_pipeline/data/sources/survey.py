"""First look at a collection's images, before any tile is cut: which can be used, and how bright they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ray_pipeline.data.images import open_image
from ray_pipeline.data.intensity import (
    Group,
    add_counts,
    background_levels,
    count_bins,
    count_values,
    intensity_ranges,
    is_narrow,
    narrower_window,
)
from ray_pipeline.data.ray_map import ray_map
from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.planes import PlaneChoice, planes
from ray_pipeline.errors import UserError

#: below this share of its group's range an image is reported: it may belong to a data set of its own
DIM_PEAK = 0.3
#: an image is reported as saturated when so many of its pixels have the top value of its detector
SATURATED_SHARE = 0.001
#: full scale of detectors of 8 to 16 bit; wider types and floats have none that a file tells
FULL_SCALES = tuple(2.0**bits - 1 for bits in (8, 10, 11, 12, 14, 16))
_TOGETHER = 8  # images of one task


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of an image: `reason` when it is rejected, else its size and, of channels that become tiles,
    (minimum, maximum). empty: constant channels. places: of the planes chosen, see planes.Plane. saturated: share of
    pixels at the top value of the detector. written_ns: when the file was last written."""

    image: SourceImage
    reason: str = ""
    dtype: str = ""
    height: int = 0
    width: int = 0
    limits: dict[int, tuple[float, float]] = field(default_factory=dict)
    empty: tuple[int, ...] = ()
    places: tuple[tuple[int, int, int], ...] = ()
    saturated: float = 0.0
    written_ns: int = 0

    def group(self, channel: int) -> Group:
        """What is normalised together: data set, kind, channel and dtype. An 8-bit image beside 16-bit ones would come
        out black."""
        return (self.image.dataset, self.image.kind, self.image.channel + channel, self.dtype)


@dataclass(frozen=True)
class Intensities:
    """Of each group in source units: ranges (lo, hi), lo < hi, that become 0 and 1; and the level above which a pixel
    is content."""

    ranges: dict[Group, tuple[float, float]]
    background: dict[Group, float]


def survey_images(
    root: Path, images: list[SourceImage], tile_size: int, choice: PlaneChoice, report: Callable[[int], None]
) -> tuple[list[Survey], dict[Group, np.ndarray]]:
    """Surveys of all images in their order, and the counts of foundation intensities of 8 and 16 bit; report(images
    done)."""
    surveys: list[Survey] = []
    counts: dict[Group, np.ndarray] = {}
    chunks = [images[start : start + _TOGETHER] for start in range(0, len(images), _TOGETHER)]
    for some, new in ray_map(partial(_survey_chunk, root, tile_size, choice), chunks):
        surveys += some
        add_counts(counts, new)
        report(len(surveys))
    return surveys, counts


def ranges_of_surveys(
    root: Path,
    surveys: Iterable[Survey],
    counts: dict[Group, np.ndarray],
    percentiles: tuple[float, float],
    choice: PlaneChoice,
) -> Intensities:
    """Percentiles over all pixels of each group of foundation images.

    `counts` holds the 8 and 16-bit groups. Images of wider types are read a second time, now that the limits of their
    bins are known, and again where a few pixels far off, such as hot ones, left the percentiles few of the bins.
    """
    surveys = list(surveys)
    limits: dict[Group, tuple[float, float]] = {}
    for survey in surveys:
        for c, (lo, hi) in survey.limits.items():
            group_lo, group_hi = limits.get(survey.group(c), (lo, hi))
            limits[survey.group(c)] = min(lo, group_lo), max(hi, group_hi)
    counts, windows = dict(counts), dict(limits)
    todo = {group: window for group, window in windows.items() if not is_narrow(group[3])}
    while todo:
        wide = [survey for survey in surveys if any(survey.group(c) in todo for c in survey.limits)]
        chunks = [wide[start : start + _TOGETHER] for start in range(0, len(wide), _TOGETHER)]
        fresh: dict[Group, np.ndarray] = {}
        for new in ray_map(partial(_count_chunk, root, todo, choice), chunks):
            add_counts(fresh, new)
        windows |= todo
        counts |= fresh
        narrower = {group: narrower_window(counts[group], windows[group], percentiles) for group in todo}
        todo = {group: window for group, window in narrower.items() if window is not None}
    ranges = intensity_ranges(counts, limits, windows, percentiles)
    return Intensities(ranges, background_levels(counts, windows))


def is_dim(survey: Survey, ranges: dict[Group, tuple[float, float]]) -> bool:
    """Whether every channel of an image stays below DIM_PEAK of its group's range."""
    groups = {c: ranges[survey.group(c)] for c in survey.limits}
    return all((survey.limits[c][1] - lo) < DIM_PEAK * (hi - lo) for c, (lo, hi) in groups.items())


def _survey_chunk(
    root: Path, tile_size: int, choice: PlaneChoice, images: list[SourceImage]
) -> tuple[list[Survey], dict[Group, np.ndarray]]:
    surveys, counts = [], {}
    for image in images:
        survey, new = survey_image(root, image, tile_size, choice)
        surveys.append(survey)
        add_counts(counts, new)
    return surveys, counts


def survey_image(
    root: Path, image: SourceImage, tile_size: int, choice: PlaneChoice
) -> tuple[Survey, dict[Group, np.ndarray]]:
    """Read one image -> Survey (with a reason where no tile can be cut), and, of a foundation image of 8 or 16 bit, its
    counts of intensities."""
    path = root / image.name
    try:
        opened = open_image(path, choice.axes)
        height, width = opened.sizes["Y"], opened.sizes["X"]
        if image.pair is None and min(height, width) < tile_size:
            return Survey(image, f"{height} x {width} pixels, smaller than a tile of {tile_size}"), {}
        survey = Survey(image, "", opened.dtype.name, height, width, written_ns=path.stat().st_mtime_ns)
        limits: dict[int, tuple[float, float]] = {}
        counts: dict[Group, np.ndarray] = {}
        places: list[tuple[int, int, int]] = []
        at_top = pixels = 0
        for plane in planes(opened, choice):
            lo, hi = float(plane.pixels.min()), float(plane.pixels.max())
            before = limits.get(plane.channel, (lo, hi))
            limits[plane.channel] = min(lo, before[0]), max(hi, before[1])
            at_top += int((plane.pixels == hi).sum()) if lo < hi and hi in FULL_SCALES else 0
            pixels += plane.pixels.size
            places.append(plane.place)
            if image.pair is None and is_narrow(survey.dtype):
                add_counts(counts, {survey.group(plane.channel): count_values(plane.pixels)})
    except UserError as error:
        return Survey(image, str(error).removeprefix(f"{path}: ")), {}
    empty = tuple(c for c, (lo, hi) in limits.items() if lo == hi)
    if len(empty) == len(limits):
        return Survey(image, f"constant image, every pixel is {limits[empty[0]][0]:g}"), {}
    limits = {c: limit for c, limit in limits.items() if c not in empty}
    counts = {survey.group(c): counts[survey.group(c)] for c in limits if survey.group(c) in counts}
    return replace(survey, limits=limits, empty=empty, places=tuple(places), saturated=at_top / pixels), counts


def _count_chunk(
    root: Path, windows: dict[Group, tuple[float, float]], choice: PlaneChoice, surveys: list[Survey]
) -> dict[Group, np.ndarray]:
    counts: dict[Group, np.ndarray] = {}
    for survey in surveys:
        for plane in planes(open_image(root / survey.image.name, choice.axes), choice):
            group = survey.group(plane.channel)
            if plane.channel in survey.limits and group in windows:
                add_counts(counts, {group: count_bins(plane.pixels, *windows[group])})
    return counts
