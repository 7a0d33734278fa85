"""The embedded sample data set: simulated fluorescence fields with noisy and low-resolution partners.

A field is one stain of one culture, seen through one objective. Structure is drawn in micrometres, so cells
get larger and sparser with the magnification. What is random about a field is a pure function of
(seed, field index). The structures are in specimen.py, objectives and cameras in microscope.py.
"""

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from ray_pipeline.data.manifest import write_manifests
from ray_pipeline.data.sources.microscope import (
    CAMERA_OFFSET,
    CAMERA_SPAN,
    PEDESTAL,
    Optics,
    capture,
    draw_noise,
    draw_optics,
    expected_image,
    low_resolution,
)
from ray_pipeline.data.sources.specimen import PAINTERS
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError

STAINS = tuple(PAINTERS)
DEGRADATIONS = ("denoising", "super_resolution")
# Part of the request: data written by another version of the renderer is not "the same data set". Raise it
# with every change of specimen or microscope that changes a pixel.
RENDERER_VERSION = 2
FOUNDATION_AVERAGES = 256
LOW_RESOLUTION_AVERAGES = 4


@dataclass(frozen=True)
class Request:
    """All that decides the bytes of a data set."""

    fields: int
    seed: int
    field_size: int
    tile_size: int
    dataset: str
    degradations: tuple[str, ...]
    val_fraction: float
    scale: int
    renderer: int = RENDERER_VERSION


@dataclass(frozen=True)
class SimulatedDataset:
    """Where the data set lies and what it holds: tiles and partners by split; reused = it was there already."""

    root: Path
    foundation: Path
    degraded: Path
    tiles: dict[str, int]
    partners: dict[str, dict[str, int]]
    reused: bool


def simulate(
    root: Path,
    *,
    fields: int,
    seed: int,
    field_size: int = 512,
    tile_size: int = 512,
    dataset: str = "simulated",
    degradations: tuple = DEGRADATIONS,
    val_fraction: float = 0.15,
    scale: int = 4,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> SimulatedDataset:
    """Write `fields` simulated fields as tiles with partners and manifests under `root`; returns a summary.

    Field i shows stain i mod 4. Tiles are 16-bit PNG; x0, y0 are in the pixels of the row's own image.
    Splits are by field. The bytes depend on every argument but `workers` and `progress`, which is called
    with (fields done, fields). The manifests come last; the same request again returns at once. Raises
    UserError for impossible sizes, or if `root` holds this data set from another request.
    """
    root = Path(root)
    request = _checked(Request(fields, seed, field_size, tile_size, dataset, tuple(degradations), val_fraction, scale))
    if _already_there(root, request):
        return _summary(root, request, reused=True)
    _write_record(root, request)
    foundation, degraded = _render_all(root, request, workers, progress)
    splits = split_of_fields(request)
    per_field = (field_size // tile_size) ** 2
    split_of = {row["id"]: splits[i // per_field] for i, row in enumerate(foundation)}
    summary = _summary(root, request, reused=False)
    if degraded:
        write_manifests(summary.degraded, degraded, {row["id"]: split_of[row["pair_id"]] for row in degraded})
    write_manifests(summary.foundation, foundation, split_of)
    return summary


def split_of_fields(request: Request) -> list[str]:
    """Split of each field: val_fraction of them to val, spread evenly over the stains."""
    if request.fields < 2 or request.val_fraction == 0:
        return ["train"] * request.fields
    wanted = min(request.fields - 1, max(1, round(request.fields * request.val_fraction)))
    order = stream(request.seed, request.fields, 1 << 16).permutation(request.fields)
    turn, seen = [], dict.fromkeys(range(len(STAINS)), 0)
    for index in order:
        turn.append(seen[index % len(STAINS)])
        seen[index % len(STAINS)] += 1
    val = set(order[np.argsort(turn, kind="stable")][:wanted].tolist())
    return ["val" if index in val else "train" for index in range(request.fields)]


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Generator of one purpose in one field; nothing else in the program advances it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index, purpose))))


def write_field(root: Path, request: Request, index: int) -> tuple[list[dict], list[dict]]:
    """Render field `index`, write its tiles and partners; returns their rows (foundation, degraded)."""
    stain = STAINS[index % len(STAINS)]
    rng = stream(request.seed, index, 0)
    optics = draw_optics(rng, stain)
    focus, defocus = PAINTERS[stain](rng, request.field_size, optics.um_pixel)
    expected = expected_image(rng, focus, defocus, optics)
    a, b = draw_noise(rng, optics.modality)
    name = f"{request.dataset}_{index:05d}_{stain}"

    def write(kind, image, optics, scale, suffix="", **columns):
        rows = []
        for x, y, tile in _tiles(image, request.tile_size // scale):
            tile_id = f"{name}_y{y * scale:04d}_x{x * scale:04d}"
            row = _row(request, stain, optics, id=tile_id + suffix, x0=x, y0=y, scale=scale, **columns)
            row |= {"height": tile.shape[0], "width": tile.shape[1], "pair_id": tile_id if suffix else ""}
            row["sha256"] = write_tile(root / kind / request.dataset / row["image"], tile)
            rows.append(row)
        return rows

    clean = capture(expected, a, b, stream(request.seed, index, 1), FOUNDATION_AVERAGES, 16)
    foundation = write(
        "foundation", clean, optics, 1, task="foundation", degradation="none", averages=FOUNDATION_AVERAGES
    )
    degraded = []
    for task in request.degradations:
        rng = stream(request.seed, index, 2 + DEGRADATIONS.index(task))
        a, b = draw_noise(rng, optics.modality)
        bits = int(rng.choice((8, 12, 16)))
        source, seen_with, scale, averages = expected, optics, 1, 1
        if task == "super_resolution":
            source, seen_with = low_resolution(rng, expected, optics, request.scale)
            scale, averages = request.scale, LOW_RESOLUTION_AVERAGES
        image = capture(source, a, b, rng, averages, bits)
        kind = "psf+point_sampling+poisson_gaussian" if scale > 1 else "poisson_gaussian"
        text = f"{kind} a={a:.5f} b={b:.6f} dark={PEDESTAL} bits={bits}"
        degraded += write(
            "degraded", image, seen_with, scale, f"_{task}", task=task, degradation=text, averages=averages
        )
    return foundation, degraded


def _checked(request: Request) -> Request:
    unknown = [name for name in request.degradations if name not in DEGRADATIONS]
    if unknown:
        raise UserError(f"degradation {unknown[0]!r} is not known; expected {' or '.join(DEGRADATIONS)}")
    if not re.fullmatch(r"\w[\w.-]*", request.dataset):
        raise UserError(
            f"dataset name {request.dataset!r} cannot be a folder name; use letters, digits, '_', '-' and '.'"
        )
    if request.fields < 1 or request.seed < 0 or not 0 <= request.val_fraction < 1:
        raise UserError(
            f"fields {request.fields}, seed {request.seed}, val_fraction {request.val_fraction}: expected "
            "fields >= 1, seed >= 0 and a val_fraction from 0 to below 1"
        )
    if request.tile_size < 1 or request.field_size % request.tile_size:
        raise UserError(
            f"field_size {request.field_size} is not a multiple of tile_size {request.tile_size}; "
            "choose a tile_size that divides it"
        )
    if request.scale < 2 or request.tile_size % request.scale:
        raise UserError(f"scale {request.scale} does not divide tile_size {request.tile_size}; choose 2, 4 or 8")
    return request


def _already_there(root: Path, request: Request) -> bool:
    """True if `request` was finished here; UserError if something else stands under its name."""
    folders = [root / kind / request.dataset / "manifests" for kind in ("foundation", "degraded")]
    record = folders[0] / "simulate.json"
    same = record.exists() and record.read_text() == _record(request)
    found = [folder / "manifest.csv" for folder in folders if (folder / "manifest.csv").exists()]
    if found and not same:
        raise UserError(
            f"{found[0]} holds a data set of another request (see {record}); choose another root or dataset name, "
            f"or remove {found[0].parents[1]}"
        )
    wanted = folders if request.degradations else folders[:1]
    names = ("manifest", "train", "val", "test")
    return same and all((folder / f"{name}.csv").exists() for folder in wanted for name in names)


def _record(request: Request) -> str:
    return json.dumps(asdict(request), indent=1) + "\n"


def _write_record(root: Path, request: Request) -> None:
    record = root / "foundation" / request.dataset / "manifests" / "simulate.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f".simulate.json.{os.getpid()}")
    partial.write_text(_record(request))
    os.replace(partial, record)


def _render_all(root: Path, request: Request, workers: int, progress) -> tuple[list[dict], list[dict]]:
    foundation, degraded = [], []
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(
            min(workers, request.fields),
            multiprocessing.get_context("spawn"),
            initializer=cv2.setNumThreads,  # the processes share the cores already
            initargs=(1,),
        )
    try:
        indices = range(request.fields)
        each = (
            pool.map(write_field, [root] * request.fields, [request] * request.fields, indices)
            if pool
            else (write_field(root, request, index) for index in indices)
        )
        for done, (tiles, partners) in enumerate(each, start=1):
            foundation += tiles
            degraded += partners
            if progress is not None:
                progress(done, request.fields)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return foundation, degraded


def _tiles(image: np.ndarray, side: int):
    for y in range(0, image.shape[0], side):
        for x in range(0, image.shape[1], side):
            yield x, y, image[y : y + side, x : x + side]


def _row(request: Request, stain: str, optics: Optics, **columns) -> dict:
    span = CAMERA_SPAN[stain]
    low = CAMERA_OFFSET - PEDESTAL * span
    return {
        "image": f"images/{columns['id']}.png",
        "dataset": request.dataset,
        "channel_idx": STAINS.index(stain),
        "norm_lo": low,
        "norm_hi": low + span,
        "modality": optics.modality,
        "specimen": "simulated cells",
        "NA": optics.NA,
        "lambda": optics.wavelength_nm,
        "um_pixel": optics.um_pixel,
        "marker": stain,
        "dtype": "uint16",
        **columns,
    }


def _summary(root: Path, request: Request, reused: bool) -> SimulatedDataset:
    splits = split_of_fields(request)
    per_field = (request.field_size // request.tile_size) ** 2
    counts = {split: splits.count(split) * per_field for split in ("train", "val", "test")}
    return SimulatedDataset(
        root=root,
        foundation=root / "foundation" / request.dataset,
        degraded=root / "degraded" / request.dataset,
        tiles=counts,
        partners={task: dict(counts) for task in request.degradations},
        reused=reused,
    )
