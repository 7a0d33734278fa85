"""Tiles and their hints -> latents: runs the autoencoder in batches, while threads read and make the hints."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.rejected import Rejected
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder

#: threads that read, and tiles that are read before they are encoded: each comes with every variant of itself and of
#: its hints. Object storage answers late, but many at once
_THREADS, _READ_AHEAD = 2, 4
_REMOTE_THREADS, _REMOTE_READ_AHEAD = 8, 8
_FP16_MAX = float(np.finfo(np.float16).max)


class TileEncoder:
    """Holds the autoencoder and the threads that read."""

    def __init__(self, job: EncodeJob, use_gpu: bool):
        self.job = job
        device = "cuda" if use_gpu else "cpu"
        self.autoencoder = load_autoencoder(
            job.autoencoder, device=device, precision=job.precision, posterior=job.posterior
        )
        self.reader = TileReader(job)
        remote = self.reader.root.local is None
        self.threads = ThreadPoolExecutor(_REMOTE_THREADS if remote else _THREADS)
        self.read_ahead = _REMOTE_READ_AHEAD if remote else _READ_AHEAD

    def encode(self, requests: Sequence[Request]) -> tuple[np.ndarray, dict[int, Rejected]]:
        """Latents (requests, variants, columns, C, H, W) fp16, all requests asking for equally many; and the requests,
        by number, whose tile or partner cannot be used: their latents are of no meaning.

        Images pass the autoencoder in batches of job.batch_size, the last one padded, in the order of the requests, so
        that equal requests give equal bits. UserError for latents beyond fp16.
        """
        requests = [_without_copies(request) for request in requests]
        wide = (len(requests), len(requests[0].variants), len(requests[0].columns))
        values = np.empty((*wide, *self.job.shape), np.float16)
        bad: dict[int, Rejected] = {}
        pending: list[tuple[tuple[int, int, int], np.ndarray]] = []
        for number, images in enumerate(self._read(requests)):
            if isinstance(images, Rejected):
                bad[number] = images
                continue
            pending += [((number, *place), image) for place, image in images]
            while len(pending) >= self.job.batch_size:
                self._flush(pending, requests, values)
        while pending:
            self._flush(pending, requests, values)
        for number, request in enumerate(requests):
            for column, name in enumerate(request.columns):
                values[number, :, column] = values[number, :, request.columns.index(name)]
        return values, bad

    def _read(self, requests: Sequence[Request]) -> Iterator[list[tuple[tuple[int, int], np.ndarray]] | Rejected]:
        """Images of each request, or what is wrong with it, in order; a slow autoencoder must not let the images of a
        whole shard pile up."""
        ahead: deque = deque()
        for request in requests:
            ahead.append(self.threads.submit(self.reader.images, request))
            if len(ahead) > self.read_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _flush(self, pending: list, requests: Sequence[Request], values: np.ndarray) -> None:
        taken = pending[: self.job.batch_size]
        del pending[: self.job.batch_size]
        side = self.job.tile_size
        images = np.zeros((self.job.batch_size, side, side), np.float32)  # one shape for every batch
        images[: len(taken)] = [image for _, image in taken]
        latents = self.autoencoder.posterior(torch.from_numpy(images))
        means, stds = (None if values is None else values.cpu().numpy() for values in latents)
        for index, ((number, place, column), _) in enumerate(taken):
            columns = requests[number].columns
            values[number, place, column] = self._checked(means[index], requests[number], columns[column])
            if stds is not None and columns[column] == "latent" and "std" in columns:
                std = self._checked(stds[index], requests[number], "std")
                values[number, place, columns.index("std")] = std

    def _checked(self, latent: np.ndarray, request: Request, column: str) -> np.ndarray:
        if not np.abs(latent).max() <= _FP16_MAX:
            raise UserError(
                f"the autoencoder gave a latent that fp16 cannot hold for {column} of "
                f"{self.reader.root.where(request.row.path)}; check vae.pretrained, and use vae.precision=fp32"
            )
        return latent


def _without_copies(request: Request) -> Request:
    """Where a tile has no partner, its hint is made from the tile anyway: one name for both columns."""
    columns = []
    for name in request.columns:
        kind, _, hint = name.partition(".")
        columns.append(f"hint.{hint}" if kind == "simulated" and hint not in request.row.partners else name)
    return Request(request.row, request.variants, columns)
