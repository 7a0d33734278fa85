"""The job of `ray-pipeline sample`: weights, hints, tiles, files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_pipeline import __version__
from ray_pipeline.errors import UserError
from ray_pipeline.inference.hint_images import HintReader, stored_latents
from ray_pipeline.inference.intensity_scale import UNIT_SCALE, IntensityScale, alternatives, choose_range, scale_of
from ray_pipeline.inference.outputs import (
    SHOWN_ROWS,
    SHOWN_TILES,
    ShownTile,
    TileName,
    claim_folder,
    draw_picture,
    write_record,
    write_tile_image,
)
from ray_pipeline.inference.prior import Prior, TrainedNetwork, check_guide, load_network, load_prior
from ray_pipeline.inference.sampling import TileSampler
from ray_pipeline.inference.settings import SampleJob
from ray_pipeline.models.weights import IntensityRange
from ray_pipeline.monitoring.progress import Progress

_MOST_NOTES = 3


@dataclass(frozen=True)
class Sampled:
    """What was made. calls, guide_calls: network evaluations for each tile."""

    files: tuple[Path, ...]
    picture: Path
    record: Path
    calls: int
    guide_calls: int
    hints: tuple[str, ...]  # of the weights


@dataclass(frozen=True)
class _Field:
    """One field of view that tiles are made of: with its hints, or without any."""

    name: str | None
    latents: np.ndarray | None
    hints: np.ndarray | None  # in pixels, of those that are shown
    scale: IntensityScale


def sample(job: SampleJob, say: Callable[[str], None] = lambda words: None) -> Sampled:
    """Draw all tiles and write them; `say` gets lines of text before and between.

    UserError: what `load_prior`, `check_guide`, `HintReader` and `choose_range` refuse, settings that cannot be meant,
    and a folder that holds such files already.
    """
    job.check()
    device = _device(job.device)
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(job.precision, job.precision)
    prior = load_prior(job.weights_path, weights=job.weights, device=device, vae=job.vae)
    header = prior.header
    say(f"weights   {prior.source} ({prior.weights}): phase {header.phase}, step {header.step}")
    guide = None
    if job.guide is not None:
        guide = load_network(job.guide, weights=job.guide_weights, device=device)
        check_guide(prior, guide)
        say(f"guide     {guide.source} ({guide.weights}): phase {guide.header.phase}, step {guide.header.step}")
    chosen = choose_range(header.intensity, job.dataset, job.channel)
    claim_folder(job.out, [])
    hints, fields = _fields(job, prior, chosen, say)
    names = [TileName(seed, each.name) for seed in job.seeds for each in fields]
    claim_folder(job.out, names)
    say(_units(fields, header.intensity, chosen))

    calls, batches = job.sampler.calls, -(-len(names) // job.batch_size)
    with Progress(batches * calls, "sample", unit="call") as progress:
        sampler = TileSampler(
            prior,
            job.sampler,
            precision=precision,
            hints=hints,
            strength=job.strength,
            guide=guide,
            tick=lambda done: progress.update(done, tiles=min(done // calls * job.batch_size, len(names))),
        )
        shown = _draw_all(job, prior, sampler, names, fields)
    title = f"{header.phase}, step {header.step}, {prior.weights}"
    sampled = Sampled(
        files=tuple(job.out / name.file for name in names),
        picture=draw_picture(job.out, shown, hints, title),
        record=job.out / "sample.json",
        calls=sampler.calls // batches,
        guide_calls=sampler.guide_calls // batches,
        hints=tuple(header.hints),
    )
    write_record(job.out, _record(job, prior, guide, precision, fields, names, sampled))
    return sampled


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows no CUDA device; use --device cpu or auto")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # the same seed, the same image
    return device


def _fields(
    job: SampleJob, prior: Prior, chosen: IntensityRange | None, say: Callable[[str], None]
) -> tuple[tuple[str, ...], list[_Field]]:
    """Names of the hints, and every field of view with its hints as `encode` would store them.

    All are read before anything is sampled, so that a wrong one is told at once.
    """
    scale = UNIT_SCALE if chosen is None else scale_of(chosen)
    if not job.hints:
        return (), [_Field(None, None, None, scale)]
    intensity = job.intensity or ("image" if chosen is None else "data")
    if intensity == "data" and chosen is None:
        raise UserError("--intensity data: the weights record no intensities; use --intensity image")
    reader = HintReader(job.hints, prior.header, prior.tile_size, intensity, chosen)
    fields, noted = [], 0
    with Progress(len(reader), "hints", unit="image") as progress:
        for number in range(len(reader)):
            image = reader.read(number)
            for note in image.notes:
                noted += 1
                if noted <= _MOST_NOTES:
                    say(f"note      {note}")
            shown = image.hints if number < SHOWN_ROWS else None
            latents = stored_latents(prior.autoencoder, image.hints, image.name)
            fields.append(_Field(image.name, latents, shown, image.scale or scale))
            progress.update(number + 1)
    if noted > _MOST_NOTES:
        say(f"note      ... {noted} such notes in all")
    return reader.hints, fields


def _units(fields: Sequence[_Field], ranges: Sequence[IntensityRange], chosen: IntensityRange | None) -> str:
    scale = fields[0].scale
    words = f"units     {scale.words}" + (", each image its own" if any(f.scale != scale for f in fields) else "")
    if not all(each.scale.is_uint16 for each in fields):
        words += "; written as float32, since these are no 16-bit integers"
    others = "" if chosen is None or scale != scale_of(chosen) else alternatives(ranges, chosen)
    return words + (f"; others (--dataset, --channel): {others}" if others else "")


def _draw_all(
    job: SampleJob,
    prior: Prior,
    sampler: TileSampler,
    names: Sequence[TileName],
    fields: Sequence[_Field],
) -> list[ShownTile]:
    """Draw and write every tile; returns those of the picture. Tile n is of field n modulo the number of fields."""
    shown: list[ShownTile] = []
    limit = SHOWN_TILES if fields[0].latents is None else SHOWN_ROWS
    for start in range(0, len(names), job.batch_size):
        numbers = list(range(start, min(start + job.batch_size, len(names))))
        # a full last batch: with another shape its tiles would be rounded otherwise
        padded = numbers + [numbers[-1]] * (job.batch_size - len(numbers))
        latents = None
        if fields[0].latents is not None:
            latents = np.stack([fields[number % len(fields)].latents for number in padded])
        tiles = sampler.draw([names[number].seed for number in padded], latents)
        for number, tile in zip(numbers, tiles, strict=False):
            each, name = fields[number % len(fields)], names[number]
            write_tile_image(job.out / name.file, tile, each.scale, _description(job, prior, name, each))
            if len(shown) < limit:
                shown.append(ShownTile(name, tile, each.hints))
    return shown


def _description(job: SampleJob, prior: Prior, name: TileName, each: _Field) -> dict[str, Any]:
    scale = each.scale
    return {
        "software": f"ray-pipeline {__version__}",
        "seed": name.seed,
        "image": name.image,
        "sampler": job.sampler.sampler,
        "steps": job.sampler.steps,
        "weights_file": prior.source,
        "weights": prior.weights,
        "units": scale.words,
        "low": scale.low,
        "high": scale.high,
    }


def _record(
    job: SampleJob,
    prior: Prior,
    guide: TrainedNetwork | None,
    precision: str,
    fields: Sequence[_Field],
    names: Sequence[TileName],
    sampled: Sampled,
) -> dict[str, Any]:
    """All that repeats the sampling, as JSON values."""
    settings = dataclasses.asdict(job.sampler)
    settings["churn_max"], settings["guidance_interval"] = (
        None if settings["churn_max"] == math.inf else settings["churn_max"],
        [None if value == math.inf else value for value in settings["guidance_interval"]],
    )
    scales = {each.name: each.scale for each in fields}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": str(prior.device),
        "precision": precision,
        "weights": _origin(prior),
        "guide": None if guide is None else _origin(guide),
        "autoencoder": {"pretrained": prior.autoencoder.name, "sha256": prior.header.autoencoder.sha256},
        "sampler": settings,
        "batch_size": job.batch_size,
        "hints": {name: str(path) for name, path in job.hints.items()},
        "strength": dict(job.strength),
        "intensity": job.intensity,
        "dataset": job.dataset,
        "channel": job.channel,
        "calls": {"network": sampled.calls, "guide": sampled.guide_calls},
        "tiles": [
            {"file": name.file, "seed": name.seed, "image": name.image, **dataclasses.asdict(scales[name.image])}
            for name in names
        ],
    }


def _origin(trained: TrainedNetwork) -> dict[str, Any]:
    header = trained.header
    return {
        "path": trained.source,
        "weights": trained.weights,
        "phase": header.phase,
        "step": header.step,
        "network": header.network,
        "edm": header.edm,
    }
