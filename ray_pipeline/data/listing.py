"""What there is to encode: the tiles of every data set under a root, with their degraded partners, checked."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.manifest import SPLITS, check_tiles, dataset_folders, load_manifest, load_pairs
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES


@dataclass(frozen=True)
class Listing:
    """Tiles of every split in the order of their rows, the data sets' ranges, and a hash of all of it."""

    rows: dict[str, list[TileRow]]
    datasets: dict[str, list[DataSet]]
    fingerprint: str

    def thinned(self, limit: int) -> Listing:
        """At most `limit` tiles of each data set and split, evenly spaced."""
        rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
        datasets: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
        for split, entries in self.datasets.items():
            for entry in entries:
                chosen = entry.start + spread(np.arange(entry.count), limit)
                datasets[split].append(_dataset(entry.name, rows[split], [self.rows[split][row] for row in chosen]))
        return Listing(rows=rows, datasets=datasets, fingerprint=self.fingerprint)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def _dataset(name: str, before: list[TileRow], rows: list[TileRow]) -> DataSet:
    """Append a data set's rows to those before, and tell where they are."""
    partners = {hint: sum(hint in row.partners for row in rows) for hint in PAIRED_TYPES}
    entry = DataSet(name=name, start=len(before), count=len(rows), partners=partners)
    before += rows
    return entry


def list_tiles(job: EncodeJob) -> Listing:
    """Every foundation data set under the root, by name; UserError for missing manifests, images or splits."""
    folders = dataset_folders(job.root)
    if not folders:
        raise UserError(
            f"data.root={job.root} holds no foundation/<dataset>/manifests; write some with `ray-pipeline prepare` or "
            "`ray-pipeline simulate`, or correct data.root"
        )
    rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
    ranges: dict[str, list[DataSet]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    for folder in folders:
        pairs = _partners(job, folder.name)
        for split in SPLITS:
            listed = _split_rows(folder, split, job, pairs, digest)
            ranges[split].append(_dataset(folder.name, rows[split], listed))
    for split in ("train", "val"):
        if not rows[split]:
            raise UserError(f"data.root={job.root} has no tile in split {split}; prepare the data with both splits")
    return Listing(rows=rows, datasets=ranges, fingerprint=digest.hexdigest())


@dataclass(frozen=True)
class _Partner:
    path: str  # relative to the data root
    sha256: str  # of the manifest, empty where it has none


def _partners(job: EncodeJob, dataset: str) -> dict[str, dict[str, _Partner]]:
    """Foundation id -> {hint name: its degraded partner}; the first one, where the manifest lists several."""
    table = load_pairs(job.root, dataset)
    if "task" not in table:
        csv = Path(job.root, "degraded", dataset, "manifests", "manifest.csv")
        raise UserError(f"{csv} has no column task; add it with {' or '.join(PAIRED_TYPES)} in each row")
    hashes = table["sha256"] if "sha256" in table else [""] * len(table)
    partners: dict[str, dict[str, _Partner]] = {}
    for task, pair, image, sha256 in zip(table["task"], table["pair_id"], table["image"], hashes, strict=True):
        if task in PAIRED_TYPES and task in job.hints:
            partner = _Partner(_posix("degraded", dataset, image), sha256)
            partners.setdefault(pair, {}).setdefault(task, partner)
    return partners


def _split_rows(
    folder: Path, split: str, job: EncodeJob, pairs: dict[str, dict[str, _Partner]], digest
) -> list[TileRow]:
    csv = folder / "manifests" / f"{split}.csv"
    if _is_empty(csv) or (split == "test" and not csv.is_file()):
        return []
    manifest = load_manifest(csv)
    check_tiles(manifest, job.tile_size)
    digest.update(f"{folder.name}/{split}/{manifest.fingerprint()}".encode())
    rows = []
    for identifier, image in zip(manifest.table["id"], manifest.table["image"], strict=True):
        partners = pairs.get(identifier, {})
        missing = [partner.path for partner in partners.values() if not Path(job.root, partner.path).is_file()]
        if missing:
            raise UserError(
                f"degraded partner {Path(job.root, missing[0])} of tile {identifier} is missing; restore it or drop "
                "its row"
            )
        named = sorted((hint, Path(partner.path).name, partner.sha256) for hint, partner in partners.items())
        digest.update(json.dumps(named).encode())
        files = {hint: partner.path for hint, partner in partners.items()}
        path = _posix("foundation", folder.name, image)
        rows.append(TileRow(id=f"{folder.name}/{identifier}", path=path, partners=files))
    return rows


def _posix(*parts: str) -> str:
    # from the names alone: the manifest's own path is resolved, and a root or data set may be a link
    return PurePosixPath(*parts).as_posix()


def _is_empty(csv: Path) -> bool:
    """True for a manifest that has its header and no tile: a data set may lack a split that others have."""
    if not csv.is_file():
        return False
    with csv.open(encoding="utf-8", errors="replace") as lines:
        return len([line for line in itertools.islice(lines, 2) if line.strip()]) == 1
