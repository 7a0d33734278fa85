"""What there is to encode: the tiles of every data set under a root, with their degraded partners, checked."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_pipeline.data.hints import PAIRED, HintSettings
from ray_pipeline.data.manifest import SPLITS, check_tiles, dataset_folders, load_manifest, load_pairs
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import DOWNSCALE


@dataclass(frozen=True)
class EncodeJob:
    """All that decides the bytes of a store."""

    root: str
    store: str
    tile_size: int
    hints: tuple[str, ...]
    hint_settings: HintSettings
    variants: int
    shard_rows: int
    autoencoder: str
    precision: str
    latent_channels: int
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.tile_size // DOWNSCALE
        return (self.latent_channels, side, side)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row: every variant of the tile and of each hint, fp16."""
        return int(np.prod(self.shape)) * 2 * self.variants * (1 + len(self.hints))


@dataclass(frozen=True)
class TileRow:
    """One tile to encode: its id, file, and the files of its degraded partners by hint name."""

    id: str
    path: str
    partners: dict[str, str]


@dataclass(frozen=True)
class Listing:
    """Tiles of every split in the order of their rows, the data sets' ranges, and a hash of all of it."""

    rows: dict[str, list[TileRow]]
    datasets: dict[str, list[dict]]
    fingerprint: str


def list_tiles(job: EncodeJob) -> Listing:
    """Every foundation data set under the root, by name; UserError for missing manifests, images or splits."""
    folders = dataset_folders(job.root)
    if not folders:
        raise UserError(
            f"data.root={job.root} holds no foundation/<dataset>/manifests; write some with `ray-pipeline prepare` or "
            "`ray-pipeline simulate`, or correct data.root"
        )
    rows: dict[str, list[TileRow]] = {split: [] for split in SPLITS}
    ranges: dict[str, list[dict]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    for folder in folders:
        pairs = _partners(job, folder.name)
        for split in SPLITS:
            listed = _split_rows(folder, split, job, pairs, digest)
            ranges[split].append({"name": folder.name, "start": len(rows[split]), "count": len(listed)})
            rows[split] += listed
    for split in ("train", "val"):
        if not rows[split]:
            raise UserError(f"data.root={job.root} has no tile in split {split}; prepare the data with both splits")
    return Listing(rows=rows, datasets=ranges, fingerprint=digest.hexdigest())


@dataclass(frozen=True)
class _Partner:
    path: str
    sha256: str  # of the manifest, empty where it has none


def _partners(job: EncodeJob, dataset: str) -> dict[str, dict[str, _Partner]]:
    """Foundation id -> {hint name: its degraded partner}; the first one, where the manifest lists several."""
    table = load_pairs(job.root, dataset)
    folder = Path(job.root).absolute() / "degraded" / dataset
    if "task" not in table:
        raise UserError(
            f"{folder / 'manifests' / 'manifest.csv'} has no column task; add it with {' or '.join(PAIRED)} in each row"
        )
    hashes = table["sha256"] if "sha256" in table else [""] * len(table)
    partners: dict[str, dict[str, _Partner]] = {}
    for task, pair, image, sha256 in zip(table["task"], table["pair_id"], table["image"], hashes, strict=True):
        if task in PAIRED and task in job.hints:
            partners.setdefault(pair, {}).setdefault(task, _Partner(str(folder / image), sha256))
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
    for number, identifier in enumerate(manifest.table["id"]):
        partners = pairs.get(identifier, {})
        missing = [partner.path for partner in partners.values() if not Path(partner.path).is_file()]
        if missing:
            raise UserError(
                f"degraded partner {missing[0]} of tile {identifier} is missing; restore it or drop its row"
            )
        named = sorted((hint, Path(partner.path).name, partner.sha256) for hint, partner in partners.items())
        digest.update(json.dumps(named).encode())
        files = {hint: partner.path for hint, partner in partners.items()}
        rows.append(TileRow(id=f"{folder.name}/{identifier}", path=str(manifest.path(number)), partners=files))
    return rows


def _is_empty(csv: Path) -> bool:
    """True for a manifest that has its header and no tile: a data set may lack a split that others have."""
    if not csv.is_file():
        return False
    with csv.open(encoding="utf-8", errors="replace") as lines:
        return len([line for line in itertools.islice(lines, 2) if line.strip()]) == 1
