"""A picture of tiles and their hints in pixels, as the autoencoder will get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.hint_registry import hint_fingerprint, known_hints, resolve_hints
from ray_pipeline.data.listing import Listing, list_tiles, spread
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.rejected import in_words
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.errors import UserError


def preview(job: EncodeJob, count: int) -> tuple[list[str], list[list[np.ndarray]]]:
    """`count` tiles, evenly spaced over data sets and splits -> heads of columns, and a row of images for each.

    Columns are the tile and each hint of the job, as the first variant takes it: a degraded partner where there is
    one, else simulated. UserError: a tile or partner that cannot be used.
    """
    for name in job.hints:  # a model that does not load is told before a tile is opened
        hint_fingerprint(name, job.hint_settings[name])
    reader = TileReader(job)
    columns = ["latent", *(f"hint.{name}" for name in job.hints)]
    rows = []
    for row in _chosen(list_tiles(job), count):
        images = reader.images(Request(row, (0,), columns))
        if not isinstance(images, list):
            raise UserError(f"a tile cannot be used ({in_words([images])}); repair it")
        rows.append([image for _, image in images])
    return ["tile", *job.hints], rows


def with_hints(job: EncodeJob, names: Sequence[str], given: dict) -> EncodeJob:
    """The job with these hints, all that are known when none is named; given: data.hints."""
    hints = tuple(names) or known_hints()
    return replace(job, hints=hints, simulated=(), hint_settings=resolve_hints(given, hints))


def _chosen(listing: Listing, count: int) -> list[TileRow]:
    rows = [row for split in SPLITS for row in listing.rows[split]]
    return [rows[index] for index in spread(len(rows), count)]
