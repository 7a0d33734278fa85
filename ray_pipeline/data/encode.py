"""Ray Data job: tiles and their hints -> latent shards. One row of the job is one shard, encoded in an actor.

A shard's bytes depend only on its tiles, the autoencoder and the hint settings, so a job that was cut off goes on
with the shards that are not there yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import ray.data
import torch

from ray_pipeline.data.hints import dihedral, make_hint
from ray_pipeline.data.images import read_tile
from ray_pipeline.data.latents import (
    FORMAT_VERSION,
    LatentStats,
    LatentStore,
    read_stats,
    shard_is_whole,
    write_shard,
)
from ray_pipeline.data.listing import EncodeJob, Listing, TileRow
from ray_pipeline.data.listing import list_tiles as list_tiles
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder
from ray_pipeline.monitoring.phase_state import replace_file

#: tiles an actor reads before they are encoded; each comes with every variant of itself and of its hints
_READ_AHEAD = 4
_FP16_MAX = float(np.finfo(np.float16).max)


def fingerprint(job: EncodeJob, listing: Listing, autoencoder: Autoencoder) -> str:
    """sha256 of manifests, autoencoder weights, and every setting that changes a stored byte."""
    skipped = ("root", "store", "autoencoder", "batch_size")
    settings = {k: v for k, v in dataclasses.asdict(job).items() if k not in skipped}
    parts = [FORMAT_VERSION, settings, listing.fingerprint, autoencoder.fingerprint()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_store(job: EncodeJob, expected: str) -> bool:
    """True when a finished store with this fingerprint is there; UserError when it is another one.

    False also when an index or a shard of it is gone or cut short, so that `encode` makes them again.
    """
    stats_file = Path(job.store) / "stats.json"
    if not stats_file.is_file():
        return False
    found = read_stats(stats_file).fingerprint
    if found != expected:
        raise UserError(
            f"{job.store} was encoded from other tiles, autoencoder or hint settings (fingerprint {found[:12]}, "
            f"expected {expected[:12]}); run `ray-pipeline encode --overwrite` or set data.latents to another folder"
        )
    try:
        return not any(LatentStore.open(Path(job.store) / split).missing() for split in SPLITS)
    except UserError:
        return False


def encode(
    job: EncodeJob,
    listing: Listing,
    expected: str,
    *,
    actors: int,
    gpus_per_actor: float,
    progress: Callable[[int], None],
) -> LatentStats:
    """Encode what is missing with `actors` autoencoder actors on the Ray that is running; returns the statistics.

    progress is called with the number of tiles just stored.
    """
    store = Path(job.store)
    store.mkdir(parents=True, exist_ok=True)
    # the mark of a finished store: from the first new shard on, this is none
    (store / "stats.json").unlink(missing_ok=True)
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with closing(_shard_records(job, listing, expected, actors, gpus_per_actor)) as stored:
        for split, record in stored:
            records[split].append(record)
            progress(record["rows"])
    for split, shards in records.items():
        shards.sort(key=_number)  # sums of floats depend on their order, too
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": expected,
            "shape": job.shape,
            "hints": job.hints,
            "variants": job.variants,
            "datasets": listing.datasets[split],
            "shards": [{key: shard[key] for key in ("file", "rows", "sha256")} for shard in shards],
        }
        _write_json(store / split / "index.json", index)
        _remove_strays(store / split, shards)
    stats = _statistics(records["train"], expected)
    _write_json(store / "stats.json", stats.as_json())
    return stats


def verify(store: str | Path) -> int:
    """Check every shard of every split against its hash; returns how many there are, UserError names the bad ones."""
    bad, count = [], 0
    for split in SPLITS:
        opened = LatentStore.open(Path(store) / split)
        bad += [str(opened.folder / name) for name in opened.verify()]
        count += len(opened.index["shards"])
    if bad:
        raise UserError(
            f"{len(bad)} latent shards are missing or damaged, first {bad[0]}; run `ray-pipeline encode --overwrite`"
        )
    return count


class ShardEncoder:
    """Ray actor: holds the autoencoder, turns rows of {"shard": JSON} into files."""

    def __init__(self, job: EncodeJob, expected: str, use_gpu: bool):
        torch.set_num_threads(1)
        self.job, self.expected = job, expected
        device = "cuda" if use_gpu else "cpu"
        self.autoencoder = load_autoencoder(job.autoencoder, device=device, precision=job.precision)
        self.readers = ThreadPoolExecutor(2)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards = [json.loads(str(text)) for text in batch["shard"]]
        return {
            "path": np.array([shard["path"] for shard in shards], dtype=object),
            "record": np.array([self._answer(shard) for shard in shards], dtype=object),
        }

    def _answer(self, shard: dict) -> str:
        """The shard's record, or what is wrong with its tiles: Ray keeps no cause of an error that a task raises."""
        try:
            return self._encode(shard)
        except UserError as error:
            return json.dumps({"wrong": str(error)})

    def _encode(self, shard: dict) -> str:
        path = Path(shard["path"])
        columns = self._columns([TileRow(**row) for row in shard["rows"]])
        record = {"file": path.name, "rows": len(shard["rows"]), "sha256": write_shard(path, columns)}
        latents = [values for name, values in columns.items() if name.startswith("latent@")]
        record["count"] = sum(values.size // values.shape[1] for values in latents)
        record["sum"] = sum(values.sum(axis=(0, 2, 3), dtype=np.float64) for values in latents).tolist()
        record["square"] = sum(np.square(values, dtype=np.float64).sum(axis=(0, 2, 3)) for values in latents).tolist()
        record["fingerprint"] = self.expected
        _write_json(path.with_suffix(".json"), record)
        return json.dumps(record)

    def _columns(self, rows: Sequence[TileRow]) -> dict[str, np.ndarray]:
        names = [f"{name}@{k}" for k in range(self.job.variants) for name in ("latent", *_hint_columns(self.job))]
        columns = {name: np.empty((len(rows), *self.job.shape), np.float16) for name in names}
        pending: list[tuple[str, int, np.ndarray]] = []
        for number, images in enumerate(self._read(rows)):
            pending += [(name, number, image) for name, image in zip(names, images, strict=True)]
            while len(pending) >= self.job.batch_size:
                self._flush(pending, columns)
        while pending:
            self._flush(pending, columns)
        return columns

    def _read(self, rows: Sequence[TileRow]) -> Iterator[list[np.ndarray]]:
        """Images of each row, in order; a slow autoencoder must not let the images of a whole shard pile up."""
        ahead: deque = deque()
        for row in rows:
            ahead.append(self.readers.submit(self._images, row))
            if len(ahead) > _READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _flush(self, pending: list[tuple[str, int, np.ndarray]], columns: dict[str, np.ndarray]) -> None:
        taken = pending[: self.job.batch_size]
        del pending[: self.job.batch_size]
        latents = self.autoencoder.encode(torch.from_numpy(np.stack([image for _, _, image in taken])))
        for (name, number, _), latent in zip(taken, latents.cpu().numpy(), strict=True):
            if not np.abs(latent).max() <= _FP16_MAX:
                raise UserError(
                    f"the autoencoder gave a latent that fp16 cannot hold for row {number} of a shard, column {name}; "
                    "check vae.pretrained, and use vae.precision=fp32"
                )
            columns[name][number] = latent

    def _images(self, row: TileRow) -> list[np.ndarray]:
        """Tile and hints of every variant, in the order of the columns."""
        tile = self._tile(row.path)
        partners = {name: read_tile(path) for name, path in row.partners.items()}
        images = []
        for variant in range(self.job.variants):
            turned = dihedral(tile, variant)
            images.append(turned)
            for name in self.job.hints:
                partner = dihedral(partners[name], variant) if name in partners else None
                images.append(make_hint(name, turned, partner, row.id, variant, self.job.hint_settings))
        return images

    def _tile(self, path: str) -> np.ndarray:
        tile = read_tile(path)
        side = self.job.tile_size
        if tile.shape != (side, side):
            raise UserError(
                f"{path} is {tile.shape[0]}x{tile.shape[1]} px, but data.tile_size is {side}; prepare tiles of that "
                "size or change data.tile_size and model.latent_size"
            )
        return tile


def _shard_records(
    job: EncodeJob, listing: Listing, expected: str, actors: int, gpus: float
) -> Iterator[tuple[str, dict]]:
    """Split and record of every shard, those already stored first; one pool of actors encodes all splits."""
    todo = []
    for split in SPLITS:
        folder = Path(job.store, split).absolute()
        folder.mkdir(exist_ok=True)
        for start in range(0, len(listing.rows[split]), job.shard_rows):
            path = folder / f"shard-{start // job.shard_rows:05d}.arrow"
            rows = listing.rows[split][start : start + job.shard_rows]
            record = _stored_record(path, expected)
            if record:
                yield split, record
            else:
                todo.append(json.dumps({"path": str(path), "rows": [dataclasses.asdict(row) for row in rows]}))
    if not todo:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"shard": text} for text in todo], override_num_blocks=len(todo))
    encoded = dataset.map_batches(
        ShardEncoder,
        fn_constructor_args=(job, expected, gpus > 0),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(todo)))),
    )
    for row in encoded.iter_rows():
        record = json.loads(row["record"])
        if "wrong" in record:
            raise UserError(record["wrong"])
        yield Path(row["path"]).parent.name, record


def _stored_record(path: Path, expected: str) -> dict | None:
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    same = record.get("fingerprint") == expected and shard_is_whole(path, record["sha256"])
    return record if same else None


def _statistics(shards: Sequence[dict], expected: str) -> LatentStats:
    tiles, count = (sum(shard[key] for shard in shards) for key in ("rows", "count"))
    mean = np.sum([shard["sum"] for shard in shards], axis=0) / count
    variance = np.sum([shard["square"] for shard in shards], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    if (std < 1e-6).any():
        dead = np.flatnonzero(std < 1e-6).tolist()
        raise UserError(
            f"latent channels {dead} are constant over all training tiles; check the tiles and vae.pretrained"
        )
    return LatentStats(mean=mean, std=std, count=tiles, fingerprint=expected)


def _hint_columns(job: EncodeJob) -> list[str]:
    return [f"hint.{name}" for name in job.hints]


def _write_json(path: Path, value: dict) -> None:
    replace_file(path, (json.dumps(value) + "\n").encode())


def _number(record: dict) -> int:
    # by number: the sixth digit of the millionth shard would spoil the order of names
    return int(record["file"].removeprefix("shard-").removesuffix(".arrow"))


def _remove_strays(folder: Path, shards: Sequence[dict]) -> None:
    """Delete shards and records that the index does not name: left by another shard size, or by a kill."""
    kept = {shard["file"] for shard in shards} | {Path(shard["file"]).with_suffix(".json").name for shard in shards}
    for path in folder.glob("shard-*.*"):
        if path.name not in kept:
            path.unlink()
