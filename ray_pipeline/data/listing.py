"""What there is to encode: the tiles of every data set under a root, with their degraded partners, checked."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from ray_pipeline.data.data_root import FileSizes, dataset_folders
from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.manifest import SPLITS, bad_tiles, load_manifest, load_pairs
from ray_pipeline.data.optics import FWHM_FACTORS, fwhm_um, modality_key
from ray_pipeline.data.rejected import Rejected, in_words
from ray_pipeline.data.source_ranges import RangeTally, SourceRange, source_ranges
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import IntensityRange
from ray_pipeline.sections import PARTNER_TYPES
from ray_pipeline.storage import Folder

_HEADER_BYTES = 1 << 16  # of a manifest, to see whether it has a tile


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
                chosen = entry.start + spread(entry.count, limit)
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


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` of the numbers below `total`, evenly spaced, int64."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(np.int64)


def _dataset(name: str, before: list[TileRow], rows: list[TileRow]) -> DataSet:
    """Append a data set's rows to those before, and tell where they are."""
    partners = {hint: sum(hint in row.partners for row in rows) for hint in PARTNER_TYPES}
    entry = DataSet(name=name, start=len(before), count=len(rows), partners=partners)
    before += rows
    return entry


def list_tiles(job: EncodeJob) -> Listing:
    """Every foundation data set under the root, by name; UserError for missing manifests or splits, and for more bad
    tiles than job.max_rejected."""
    lister = _Lister(job)
    folders = dataset_folders(lister.root)
    if not folders:
        raise UserError(
            f"data.root={job.root} holds no foundation/<dataset>/manifests; write some with `ray-pipeline prepare` or "
            "`ray-pipeline simulate`, or correct data.root"
        )
    rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
    ranges: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
    for folder in folders:
        for split, listed in lister.splits(folder).items():
            ranges[split].append(_dataset(folder.name, rows[split], listed))
    rejected = lister.rejected
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
    return Listing(rows, ranges, lister.digest.hexdigest(), tuple(rejected), lister.tally.ranges())


@dataclass(frozen=True)
class _Partner:
    path: str  # relative to the data root
    sha256: str  # of the manifest, empty where it has none
    size: tuple[float, float]  # height and width as the manifest gives them, nan where it does not
    source: SourceRange | None


class _Lister:
    """Lists one data set after another, and gathers the hash, the bad tiles and the intensities of all."""

    def __init__(self, job: EncodeJob):
        self.job, self.root = job, Folder(job.root)
        self.partner_files = FileSizes(self.root)
        self.digest = hashlib.sha256()
        self.rejected: list[Rejected] = []
        self.tally = RangeTally()

    def splits(self, folder: Folder) -> dict[str, list[TileRow]]:
        """Good tiles of each split of a data set; the others are added to `rejected`."""
        pairs, files = self._partners(folder.name), FileSizes(folder)
        listed = {split: self._split_rows(folder, split, pairs, files) for split in SPLITS}
        found = [*(row.id for rows in listed.values() for row in rows), *(row.id for row in self.rejected)]
        alone = sorted(pairs.keys() - {identifier.removeprefix(f"{folder.name}/") for identifier in found})
        if alone:
            warnings.warn(
                f"degraded/{folder.name}: the partners of {len(alone)} tiles belong to none that is there, first "
                f"{alone[0]!r}; correct pair_id, or prepare the data again",
                stacklevel=2,
            )
        return listed

    def _partners(self, dataset: str) -> dict[str, dict[str, list[_Partner]]]:
        """Foundation id -> {hint name: its partners, in the order of the manifest}."""
        table = load_pairs(self.root, dataset)
        if "task" not in table:
            csv = self.root.child("degraded", dataset, "manifests").where("manifest.csv")
            raise UserError(f"{csv} has no column task; add it with {' or '.join(PARTNER_TYPES)} in each row")
        hashes = table["sha256"] if "sha256" in table else [""] * len(table)
        heights, widths = (table[name] if name in table else [math.nan] * len(table) for name in ("height", "width"))
        partners: dict[str, dict[str, list[_Partner]]] = {}
        unknown: Counter[str] = Counter()
        columns = (table["task"], table["pair_id"], table["image"], hashes, heights, widths, source_ranges(table))
        for task, pair, image, sha256, height, width, source in zip(*columns, strict=True):
            if task not in PARTNER_TYPES:
                unknown[task] += 1
            elif task in self.job.hints:
                partner = _Partner(_posix("degraded", dataset, image), sha256, (height, width), source)
                partners.setdefault(pair, {}).setdefault(task, []).append(partner)
        for task, rows in unknown.items():
            warnings.warn(
                f"degraded/{dataset}: {rows} rows of task {task!r} are no partners, expected "
                f"{', '.join(PARTNER_TYPES)}; correct the column task",
                stacklevel=2,
            )
        return partners

    def _split_rows(
        self, folder: Folder, split: str, pairs: dict[str, dict[str, list[_Partner]]], files: FileSizes
    ) -> list[TileRow]:
        """Good tiles of one manifest; the others are added to `rejected`, and those of the training split counted."""
        manifests, csv = folder.child("manifests"), f"{split}.csv"
        if _is_empty(manifests, csv) or (split == "test" and manifests.size(csv) < 0):
            return []
        manifest = load_manifest(folder, split)
        bad = bad_tiles(manifest, self.job.tile_size, files)
        widths, sources = _psf_widths(manifest.table), source_ranges(manifest.table)
        self.digest.update(f"{folder.name}/{split}/{manifest.fingerprint()}".encode())
        rows = []
        for number, (identifier, image) in enumerate(zip(manifest.table["id"], manifest.table["image"], strict=True)):
            partners = pairs.get(identifier, {})
            tile, path = f"{folder.name}/{identifier}", _posix("foundation", folder.name, image)
            wrong = (path, bad[number]) if number in bad else self._bad_partner(partners)
            if wrong is not None:
                self.rejected.append(Rejected(tile, *wrong))
                self.digest.update(f"without {identifier}".encode())
                continue
            named = [(hint, PurePosixPath(p.path).name, p.sha256) for hint, some in partners.items() for p in some]
            self.digest.update(json.dumps(sorted(named)).encode())
            hints = {hint: tuple(sorted(partner.path for partner in some)) for hint, some in partners.items()}
            rows.append(TileRow(tile, path, hints, widths[number]))
            if split == "train":
                self.tally.add(folder.name, "tile", sources[number])
                for hint, some in partners.items():
                    for partner in some:
                        self.tally.add(folder.name, hint, partner.source)
        return rows

    def _bad_partner(self, partners: dict[str, list[_Partner]]) -> tuple[str, str] | None:
        """Path and reason of the first partner that is known not to fit its tile, before it is opened."""
        side = self.job.tile_size
        for hint, some in partners.items():
            for partner in some:
                if fault := self.partner_files.fault(partner.path):
                    return partner.path, f"the {hint} partner is {fault}"
                known = [length for length in partner.size if not math.isnan(length)]
                fits = [
                    length == side or (hint == "super_resolution" and length >= 1 and side % length == 0)
                    for length in known
                ]
                if not all(fits) or len(set(known)) > 1:
                    size = "x".join(f"{length:g}" for length in partner.size)
                    return partner.path, f"the {hint} partner of {size} px does not fit a tile of {side} px"
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


def _is_empty(folder: Folder, csv: str) -> bool:
    """True for a manifest that has its header and no tile: a data set may lack a split that others have."""
    if folder.size(csv) < 0:
        return False
    with folder.open(csv) as file, folder.reaching(csv):
        start = file.read(_HEADER_BYTES).decode("utf-8", errors="replace")
    lines = [line for line in start.splitlines()[:2] if line.strip()]
    return len(lines) == 1 and {"id", "image"} <= set(lines[0].strip().split(","))
