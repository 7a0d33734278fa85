"""Tiles and their hints -> latents: reads, turns, makes the hints, and runs the autoencoder in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.hints import dihedral, make_hint
from ray_pipeline.data.images import read_tile
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder

#: tiles that are read before they are encoded; each comes with every variant of itself and of its hints
_READ_AHEAD = 4
_FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Request:
    """What to encode of one tile: these columns in these augmentation variants."""

    row: TileRow
    variants: Sequence[int]
    columns: Sequence[str]


class TileEncoder:
    """Holds the autoencoder and two threads that read."""

    def __init__(self, job: EncodeJob, use_gpu: bool):
        self.job = job
        device = "cuda" if use_gpu else "cpu"
        self.autoencoder = load_autoencoder(job.autoencoder, device=device, precision=job.precision)
        self.readers = ThreadPoolExecutor(2)

    def encode(self, requests: Sequence[Request]) -> np.ndarray:
        """Latents (requests, variants, columns, C, H, W) fp16; all requests ask for equally many.

        Images pass the autoencoder in batches of job.batch_size in the order of the requests, so that equal requests
        give equal bits. Raises UserError for a tile or partner that does not fit, and for latents beyond fp16.
        """
        requests = [_without_copies(request) for request in requests]
        wide = (len(requests), len(requests[0].variants), len(requests[0].columns))
        values = np.empty((*wide, *self.job.shape), np.float16)
        pending: list[tuple[tuple[int, int, int], np.ndarray]] = []
        for number, images in enumerate(self._read(requests)):
            pending += [((number, *place), image) for place, image in images]
            while len(pending) >= self.job.batch_size:
                self._flush(pending, requests, values)
        while pending:
            self._flush(pending, requests, values)
        for number, request in enumerate(requests):
            for column, name in enumerate(request.columns):
                values[number, :, column] = values[number, :, request.columns.index(name)]
        return values

    def _read(self, requests: Sequence[Request]) -> Iterator[list[tuple[tuple[int, int], np.ndarray]]]:
        """Images of each request, in order; a slow autoencoder must not let the images of a whole shard pile up."""
        ahead: deque = deque()
        for request in requests:
            ahead.append(self.readers.submit(self._images, request))
            if len(ahead) > _READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _images(self, request: Request) -> list[tuple[tuple[int, int], np.ndarray]]:
        """(variant, column) places and images; a column that is asked for twice comes once."""
        tile = self._tile(request.row.path)
        wanted = {name for name in request.row.partners if f"hint.{name}" in request.columns}
        partners = {name: read_tile(self._path(request.row.partners[name])) for name in wanted}
        images = []
        for place, variant in enumerate(request.variants):
            turned = dihedral(tile, variant)
            for column, name in enumerate(request.columns):
                if request.columns.index(name) == column:
                    images.append(((place, column), self._image(name, turned, partners, request.row, variant)))
        return images

    def _image(self, column: str, turned: np.ndarray, partners: dict, row: TileRow, variant: int) -> np.ndarray:
        """Tile or hint in one variant; `turned` is the tile in it already."""
        kind, _, hint = column.partition(".")
        if kind == "latent":
            return turned
        if kind == "simulated" or hint not in partners:
            return make_hint(hint, turned, None, row.id, variant, self.job.hint_settings)
        try:
            partner = dihedral(partners[hint], variant)
            return make_hint(hint, turned, partner, row.id, variant, self.job.hint_settings)
        except UserError as error:
            raise UserError(f"{self._path(row.partners[hint])}: {error}") from error

    def _tile(self, path: str) -> np.ndarray:
        tile = read_tile(self._path(path))
        side = self.job.tile_size
        if tile.shape != (side, side):
            raise UserError(
                f"{self._path(path)} is {tile.shape[0]}x{tile.shape[1]} px, but data.tile_size is {side}; prepare "
                "tiles of that size or change data.tile_size and model.latent_size"
            )
        return tile

    def _path(self, relative: str) -> Path:
        return Path(self.job.root, relative)

    def _flush(self, pending: list, requests: Sequence[Request], values: np.ndarray) -> None:
        taken = pending[: self.job.batch_size]
        del pending[: self.job.batch_size]
        latents = self.autoencoder.encode(torch.from_numpy(np.stack([image for _, image in taken])))
        for ((number, place, column), _), latent in zip(taken, latents.cpu().numpy(), strict=True):
            if not np.abs(latent).max() <= _FP16_MAX:
                request = requests[number]
                raise UserError(
                    f"the autoencoder gave a latent that fp16 cannot hold for {request.columns[column]} of "
                    f"{self._path(request.row.path)}; check vae.pretrained, and use vae.precision=fp32"
                )
            values[number, place, column] = latent


def _without_copies(request: Request) -> Request:
    """Where a tile has no partner, its hint is made from the tile anyway: one name for both columns."""
    columns = []
    for name in request.columns:
        kind, _, hint = name.partition(".")
        columns.append(f"hint.{hint}" if kind == "simulated" and hint not in request.row.partners else name)
    return Request(request.row, request.variants, columns)
