"""What there is to encode: the tiles of every data set under a root, with their degraded partners, checked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.manifest import SPLITS, bad_tiles, dataset_folders, file_size, load_manifest, load_pairs
from ray_pipeline.data.optics import FWHM_FACTORS, fwhm_um, modality_key
from ray_pipeline.data.rejected import Rejected, in_words
from ray_pipeline.data.source_ranges import RangeTally, SourceRange, source_ranges
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import IntensityRange
from ray_pipeline.sections import PARTNER_TYPES


@dataclass(frozen=True)
class Listing:
    """Tiles of every split in the order of their rows, the data sets' ranges, a hash of all of it, the tiles that are
    known to be bad before they are opened, and the intensities of the training tiles in units of their source."""

    rows: dict[str, list[TileRow]]
    datasets: dict[str, list[DataSet]]
    fingerprint: str
    rejected: tuple[Rejected, ...] = ()
    intensity: tuple[IntensityRange, ...] = ()

    def thinned(self, limit: int) -> Listing:
        """At most `limit` tiles of each data set and split, evenly spaced."""
        rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
        datasets: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
        for split, entries in self.datasets.items():
            for entry in entries:
                chosen = entry.start + spread(np.arange(entry.count), limit)
                datasets[split].append(_dataset(entry.name, rows[split], [self.rows[split][row] for row in chosen]))
        return replace(self, rows=rows, datasets=datasets)

    def without(self, bad: Mapping[str, Collection[str]]) -> Listing:
        """The same without the tiles of these ids in each split."""
        rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
        datasets: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
        for split, entries in self.datasets.items():
            gone = set(bad.get(split, ()))
            for entry in entries:
                listed = self.rows[split][entry.start : entry.start + entry.count]
                kept = [row for row in listed if row.id not in gone]
                datasets[split].append(_dataset(entry.name, rows[split], kept))
        return replace(self, rows=rows, datasets=datasets)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _dataset(name: str, before: list[TileRow], rows: list[TileRow]) -> DataSet:
    """Append a data set's rows to those before, and tell where they are."""
    partners = {hint: sum(hint in row.partners for row in rows) for hint in PARTNER_TYPES}
    entry = DataSet(name=name, start=len(before), count=len(rows), partners=partners)
    before += rows
    return entry


def list_tiles(job: EncodeJob) -> Listing:
    """Every foundation data set under the root, by name; UserError for missing manifests or splits, and for more bad
    tiles than job.max_rejected."""
    folders = dataset_folders(job.root)
    if not folders:
        raise UserError(
            f"data.root={job.root} holds no foundation/<dataset>/manifests; write some with `ray-pipeline prepare` or "
            "`ray-pipeline simulate`, or correct data.root"
        )
    rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
    ranges: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    rejected: list[Rejected] = []
    tally = RangeTally()
    for folder in folders:
        pairs = _partners(job, folder.name)
        found: set[str] = set()
        for split in SPLITS:
            listed = _split_rows(folder, split, job, pairs, digest, rejected, tally)
            ranges[split].append(_dataset(folder.name, rows[split], listed))
            found.update(row.id.removeprefix(f"{folder.name}/") for row in listed)
        found.update(row.id.removeprefix(f"{folder.name}/") for row in rejected)
        alone = sorted(pairs.keys() - found)
        if alone:
            warnings.warn(
                f"degraded/{folder.name}: the partners of {len(alone)} tiles belong to none that is there, first "
                f"{alone[0]!r}; correct pair_id, or prepare the data again",
                stacklevel=2,
            )
    if len(rejected) > job.max_rejected:
        total = len(rejected) + sum(map(len, rows.values()))
        raise UserError(
            f"data.root={job.root}: {len(rejected)} of {total} tiles cannot be used, more than data.max_rejected "
            f"{job.max_rejected} ({in_words(rejected)}); restore them, prepare the data again, or set "
            f"data.max_rejected={len(rejected)}"
        )
    for split in ("train", "val"):
        if not rows[split]:
            raise UserError(f"data.root={job.root} has no tile in split {split}; prepare the data with both splits")
    return Listing(rows, ranges, digest.hexdigest(), tuple(rejected), tally.ranges())


@dataclass(frozen=True)
class _Partner:
    path: str  # relative to the data root
    sha256: str  # of the manifest, empty where it has none
    size: tuple[float, float]  # height and width as the manifest gives them, nan where it does not
    source: SourceRange | None


def _partners(job: EncodeJob, dataset: str) -> dict[str, dict[str, list[_Partner]]]:
    """Foundation id -> {hint name: its partners, in the order of the manifest}."""
    table = load_pairs(job.root, dataset)
    if "task" not in table:
        csv = Path(job.root, "degraded", dataset, "manifests", "manifest.csv")
        raise UserError(f"{csv} has no column task; add it with {' or '.join(PARTNER_TYPES)} in each row")
    hashes = table["sha256"] if "sha256" in table else [""] * len(table)
    heights, widths = (table[name] if name in table else [math.nan] * len(table) for name in ("height", "width"))
    partners: dict[str, dict[str, list[_Partner]]] = {}
    unknown: Counter[str] = Counter()
    columns = (table["task"], table["pair_id"], table["image"], hashes, heights, widths, source_ranges(table))
    for task, pair, image, sha256, height, width, source in zip(*columns, strict=True):
        if task not in PARTNER_TYPES:
            unknown[task] += 1
        elif task in job.hints:
            partner = _Partner(_posix("degraded", dataset, image), sha256, (height, width), source)
            partners.setdefault(pair, {}).setdefault(task, []).append(partner)
    for task, rows in unknown.items():
        warnings.warn(
            f"degraded/{dataset}: {rows} rows of task {task!r} are no partners, expected {', '.join(PARTNER_TYPES)}; "
            "correct the column task",
            stacklevel=2,
        )
    return partners


def _split_rows(
    folder: Path,
    split: str,
    job: EncodeJob,
    pairs: dict[str, dict[str, list[_Partner]]],
    digest,
    rejected: list[Rejected],
    tally: RangeTally,
) -> list[TileRow]:
    """Good tiles of one manifest; the others are added to `rejected`, and those of the training split are counted."""
    csv = folder / "manifests" / f"{split}.csv"
    if _is_empty(csv) or (split == "test" and not csv.is_file()):
        return []
    manifest = load_manifest(csv)
    bad = bad_tiles(manifest, job.tile_size)
    widths, sources = _psf_widths(manifest.table), source_ranges(manifest.table)
    digest.update(f"{folder.name}/{split}/{manifest.fingerprint()}".encode())
    rows = []
    for number, (identifier, image) in enumerate(zip(manifest.table["id"], manifest.table["image"], strict=True)):
        partners = pairs.get(identifier, {})
        tile, path = f"{folder.name}/{identifier}", _posix("foundation", folder.name, image)
        wrong = (path, bad[number]) if number in bad else _bad_partner(job, partners)
        if wrong is not None:
            rejected.append(Rejected(tile, *wrong))
            digest.update(f"without {identifier}".encode())
            continue
        named = sorted((hint, Path(p.path).name, p.sha256) for hint, some in partners.items() for p in some)
        digest.update(json.dumps(named).encode())
        files = {hint: tuple(sorted(partner.path for partner in some)) for hint, some in partners.items()}
        rows.append(TileRow(tile, path, files, widths[number]))
        if split == "train":
            tally.add(folder.name, "tile", sources[number])
            for hint, some in partners.items():
                for partner in some:
                    tally.add(folder.name, hint, partner.source)
    return rows


def _bad_partner(job: EncodeJob, partners: dict[str, list[_Partner]]) -> tuple[str, str] | None:
    """Path and reason of the first partner that is known not to fit its tile, before it is opened."""
    for hint, some in partners.items():
        for partner in some:
            size = file_size(Path(job.root, partner.path))
            if size <= 0:
                return partner.path, f"the {hint} partner is {'empty' if size == 0 else 'missing'}"
            known = [side for side in partner.size if not math.isnan(side)]
            fits = [
                side == job.tile_size or (hint == "super_resolution" and side >= 1 and job.tile_size % side == 0)
                for side in known
            ]
            if not all(fits) or len(set(known)) > 1:
                size = "x".join(f"{side:g}" for side in partner.size)
                return partner.path, f"the {hint} partner of {size} px does not fit a tile of {job.tile_size} px"
    return None


def _psf_widths(table: pd.DataFrame) -> list[float]:
    """FWHM of each tile's PSF in pixels, 0 where modality, NA, lambda or um_pixel are not given or not known."""
    needed = ("modality", "NA", "lambda", "um_pixel")
    if not set(needed) <= set(table.columns):
        return [0.0] * len(table)
    known = {modality_key(name) for name in FWHM_FACTORS}
    return [
        fwhm_um(modality, NA, wavelength) / um_pixel
        if modality_key(modality) in known and NA > 0 and wavelength > 0 and um_pixel > 0  # nan is not
        else 0.0
        for modality, NA, wavelength, um_pixel in zip(*(table[name] for name in needed), strict=True)
    ]


def _posix(*parts: str) -> str:
    # from the names alone: the manifest's own path is resolved, and a root or data set may be a link
    return PurePosixPath(*parts).as_posix()


def _is_empty(csv: Path) -> bool:
    """True for a manifest that has its header and no tile: a data set may lack a split that others have."""
    if not csv.is_file():
        return False
    with csv.open(encoding="utf-8", errors="replace") as text:
        lines = [line for line in itertools.islice(text, 2) if line.strip()]
    return len(lines) == 1 and {"id", "image"} <= set(lines[0].strip().split(","))
