"""A folder of microscope images -> foundation tiles and manifests (`ray-pipeline prepare folder`)."""

import csv
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray_pipeline.data.images import read_image, to_unit, write_tile
from ray_pipeline.data.intensity import Group
from ray_pipeline.data.manifest import SPLITS, write_manifests
from ray_pipeline.data.sources.folder_survey import (
    Survey,
    in_threads,
    is_dim,
    list_images,
    ranges_of_surveys,
    survey_images,
)
from ray_pipeline.errors import UserError

LONGEST_STEM = 150
Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class PreparedFolder:
    """What `prepare_folder` did; names are paths relative to the source folder.

    `tiles` and `images`: counts by split; listed = sum of `images` + len(`rejected`). `ranges`: (lo, hi) in
    source units. `dim`: images whose brightest pixel stays below 0.3 of their range.
    """

    folder: Path
    dataset: str
    listed: int
    ignored: int
    tiles: dict[str, int]
    images: dict[str, int]
    rejected: list[tuple[str, str]]
    empty_channels: list[tuple[str, str]]
    ranges: dict[Group, tuple[float, float]]
    dim: list[str]


def prepare_folder(
    source: Path,
    out: Path,
    *,
    dataset: str | None = None,
    tile_size: int = 512,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    percentiles: tuple[float, float] = (0.1, 99.9),
    channels: tuple[int, ...] | None = None,
    max_rejected: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedFolder:
    """TIFF and PNG images below `source`, any size from one tile up -> <out>/foundation/<dataset>.

    Every channel (of `channels`, from 0; None: all) is cut into tiles of `tile_size` pixels that cover the
    image without invented pixels. Intensity: percentiles over all images together, never by image or tile,
    one pair for each (channel, dtype), since an 8-bit image beside 16-bit ones would come out black; minimum
    and maximum where both percentiles are equal. Train, val and test are split by image. Images that cannot
    be used stand in rejected.csv (path, reason), and more than `max_rejected` stop the job; constant channels
    of good images are left out and listed there too. The folder appears complete or not at all, and replaces
    an old one only with `overwrite`. UserError: wrong settings, no images, too many rejected.
    """
    source, out = Path(source), Path(out)
    _check_settings(source, tile_size, (val_fraction, test_fraction), percentiles, channels)
    dataset = (safe_name(source.resolve().name) or "images") if dataset is None else dataset
    target = out / "foundation" / dataset
    _check_target(source, target, dataset, overwrite)
    report = progress or (lambda stage, done, total: None)
    names, links, ignored = list_images(source)
    surveys, counts = survey_images(
        source, names, tile_size, channels, lambda done: report("reading intensities", done, len(names))
    )
    accepted = [s for s in surveys if not s.reason]
    rejected = links + [(s.name, s.reason) for s in surveys if s.reason]
    empty = [(s.name, f"channel {c} is constant: left out, others kept") for s in accepted for c in s.empty]
    staging = target.with_name(f".{dataset}.partial")
    _refuse(source, target, staging, rejected, len(accepted), max_rejected)

    split = split_images([s.name for s in accepted], val_fraction, test_fraction, seed)
    ranges = ranges_of_surveys(source, accepted, counts, percentiles)
    shutil.rmtree(staging, ignore_errors=True)
    rows, split_of = _write_all(source, staging, dataset, tile_size, accepted, ranges, split, report)
    write_rejected(staging / "rejected.csv", rejected + empty)
    write_manifests(staging, rows, split_of)
    _replace(target, staging)
    return PreparedFolder(
        folder=target,
        dataset=dataset,
        listed=len(names) + len(links),
        ignored=ignored,
        tiles=_count_splits(split_of),
        images=_count_splits(split),
        rejected=rejected,
        empty_channels=empty,
        ranges=ranges,
        dim=[s.name for s in accepted if is_dim(s, ranges)],
    )


def tile_origins(length: int, tile_size: int) -> list[int]:
    """First pixels of the tiles along one axis: a grid, and for a remainder one more that ends at the border."""
    origins = list(range(0, length - tile_size + 1, tile_size))
    return origins if length % tile_size == 0 else [*origins, length - tile_size]


def split_images(names: list[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """Image names -> {name: train | val | test}, by rank of sha256(seed, name).

    round(fraction * n) images each, at least one where the fraction is above 0 and n >= 2 (test: n >= 3); a
    single image trains. UserError when none is left for training.
    """
    n = len(names)
    val = max(round(val_fraction * n), 1) if val_fraction > 0 and n >= 2 else 0
    test = max(round(test_fraction * n), 1) if test_fraction > 0 and n >= 3 else 0
    if val + test >= n:
        raise UserError(
            f"--val-fraction {val_fraction}, --test-fraction {test_fraction}: found {n} images, expected at "
            f"least one for training beside {val} + {test}; lower them."
        )
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return {x: "val" if i < val else "test" if i < val + test else "train" for i, x in enumerate(ranked)}


def tile_stems(names: list[str]) -> dict[str, str]:
    """Image names -> unique, file-name safe stems; a hash is added where two would be alike or one is long."""
    plain = {name: safe_name(os.path.splitext(name)[0].replace("/", "__")) for name in names}
    uses = Counter(stem.lower() for stem in plain.values())
    return {
        name: stem
        if uses[stem.lower()] == 1 and 0 < len(stem) <= LONGEST_STEM
        else f"{stem[:LONGEST_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, stem in plain.items()
    }


def write_tiles(
    source: Path,
    folder: Path,
    dataset: str,
    tile_size: int,
    ranges: dict[Group, tuple[float, float]],
    stems: dict[str, str],
    survey: Survey,
) -> list[dict]:
    """Cuts one surveyed image into <folder>/images/*.png -> manifest rows (channel, then y, then x)."""
    image = read_image(source / survey.name)
    height, width = image.pixels.shape[1:]
    rows = []
    for c in survey.limits:
        lo, hi = ranges[c, survey.dtype]
        for y in tile_origins(height, tile_size):
            for x in tile_origins(width, tile_size):
                identifier = f"{stems[survey.name]}_c{c}_y{y:05d}_x{x:05d}"
                unit = to_unit(image.pixels[c, y : y + tile_size, x : x + tile_size], lo, hi)
                row = {"id": identifier, "image": f"images/{identifier}.png", "dataset": dataset}
                row |= {"channel_idx": c, "norm_lo": lo, "norm_hi": hi, "x0": x, "y0": y}
                row |= {"um_pixel": image.um_pixel, "height": tile_size, "width": tile_size}
                row |= {"dtype": survey.dtype, "sha256": write_tile(folder / row["image"], unit)}
                rows.append(row)
    return rows


def write_rejected(path: Path, rows: list[tuple[str, str]]) -> None:
    """Writes (path, reason) rows as CSV, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *rows])
    os.replace(temporary, path)


def safe_name(text: str) -> str:
    """Text -> ASCII letters, digits, '.', '_' and '-', fit for a file name; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")


def _write_all(
    source: Path,
    folder: Path,
    dataset: str,
    tile_size: int,
    surveys: list[Survey],
    ranges: dict[Group, tuple[float, float]],
    split: dict[str, str],
    report: Progress,
) -> tuple[list[dict], dict[str, str]]:
    stems = tile_stems([s.name for s in surveys])
    rows, split_of = [], {}
    write = partial(write_tiles, source, folder, dataset, tile_size, ranges, stems)
    for done, (survey, new) in enumerate(zip(surveys, in_threads(write, surveys), strict=True), 1):
        rows += new
        split_of |= dict.fromkeys((row["id"] for row in new), split[survey.name])
        report("writing tiles", done, len(surveys))
    return rows, split_of


def _count_splits(split_of: dict[str, str]) -> dict[str, int]:
    counts = Counter(split_of.values())
    return {split: counts[split] for split in SPLITS}


def _check_settings(
    source: Path,
    tile_size: int,
    fractions: tuple[float, float],
    percentiles: tuple[float, float],
    channels: tuple[int, ...] | None,
) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder, expected one with TIFF or PNG images; correct the path.")
    low, high = percentiles
    wrong = {
        f"--tile-size {tile_size}: expected at least 1 pixel": tile_size < 1,
        f"--percentiles {low} {high}: expected 0 <= low < high <= 100": not 0 <= low < high <= 100,
        f"--channels {channels}: expected numbers from 0, each once": channels is not None
        and (not channels or min(channels) < 0 or len(set(channels)) < len(channels)),
        f"--val-fraction, --test-fraction {fractions}: expected 0 to 1, below 1 together": min(fractions) < 0
        or sum(fractions) >= 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"{message}; change it.")


def _check_target(source: Path, target: Path, dataset: str, overwrite: bool) -> None:
    if not dataset or safe_name(dataset) != dataset:
        raise UserError(
            f"--dataset {dataset!r}: expected ASCII letters, digits, '.', '_' or '-', the first no '.'; change it."
        )
    inside, outside = source.resolve(), target.resolve()
    if outside.is_relative_to(inside) or inside.is_relative_to(outside):
        raise UserError(
            f"{target}: the result and the source {source} lie in each other, expected separate folders; choose "
            "another --out."
        )
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    if "manifests" in found and not overwrite:
        raise UserError(
            f"{target}: found a prepared data set, expected none of that name; pass --overwrite or another --dataset."
        )
    if found - {"rejected.csv"} and "manifests" not in found:
        raise UserError(
            f"{target}: found a folder that is no prepared data set ({', '.join(sorted(found)[:5])}), expected "
            "none; move it away or pass another --dataset."
        )


def _refuse(
    source: Path,
    target: Path,
    staging: Path,
    rejected: list[tuple[str, str]],
    accepted: int,
    max_rejected: int,
) -> None:
    if accepted + len(rejected) == 0:
        raise UserError(f"{source}: found no image, expected TIFF or PNG files; correct the path.")
    if accepted and len(rejected) <= max_rejected:
        return
    # the list of a data set that stays as it is must not change
    listing = (staging if (target / "manifests").exists() else target) / "rejected.csv"
    write_rejected(listing, rejected)
    first = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in rejected[:5])
    raise UserError(
        f"{source}: {len(rejected)} of {accepted + len(rejected)} images cannot be used, expected at most "
        f"{max_rejected} and one good image ({first}{'; ...' if len(rejected) > 5 else ''}; all in {listing}); "
        f"repair them, choose a smaller --tile-size or pass --max-rejected {len(rejected)}."
    )


def _replace(target: Path, staging: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staging, target)
    shutil.rmtree(old, ignore_errors=True)
