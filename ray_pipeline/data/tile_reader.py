"""Tiles and their hints in pixels, as the autoencoder gets them: read, turned, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.hint_registry import BrokenHint, make_hint
from ray_pipeline.data.hints import choose_partner, dihedral
from ray_pipeline.data.rejected import Rejected
from ray_pipeline.data.tile_table import TileRow
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError


@dataclass(frozen=True)
class Request:
    """What to encode of one tile: these columns in these augmentation variants."""

    row: TileRow
    variants: Sequence[int]
    columns: Sequence[str]


class TileReader:
    """Makes the images of a request. Several threads may ask it at once."""

    def __init__(self, job: EncodeJob):
        self.job, self.root = job, Folder(job.root)

    def images(self, request: Request) -> list[tuple[tuple[int, int], np.ndarray]] | Rejected:
        """(variant, column) places and images, or what is wrong with the tile; a column asked for twice comes once.

        StorageError: object storage does not answer, which is no fault of the tile.
        """
        row, files = request.row, TileFiles(self.job, self.root, request.row)
        images = []
        try:
            tile = files.tile()
            for place, variant in enumerate(request.variants):
                turned = dihedral(tile, variant)
                turned.setflags(write=False)  # the image of the tile itself, which a hint must not change
                for column, name in enumerate(request.columns):
                    if request.columns.index(name) == column and name != "std":
                        images.append(((place, column), self._image(name, turned, files, variant)))
        except (BrokenHint, StorageError):
            raise
        except UserError as error:
            return Rejected(row.id, files.last, str(error).removeprefix(f"{self.root.where(files.last)}: "))
        return images

    def _image(self, column: str, turned: np.ndarray, files: TileFiles, variant: int) -> np.ndarray:
        """Tile or hint in one variant; `turned` is the tile in it already."""
        kind, _, hint = column.partition(".")
        if kind == "latent":
            return turned
        partner = None if kind == "simulated" else files.partner(hint, variant)
        row, settings = files.row, self.job.hint_settings
        return make_hint(hint, turned, partner, row.id, variant, settings, row.psf_fwhm_px)


class TileFiles:
    """The files of one tile, each read once. last: path (relative to the data root) of the one read last."""

    def __init__(self, job: EncodeJob, root: Folder, row: TileRow):
        self.job, self.root, self.row = job, root, row
        self.last = row.path
        self.opened: dict[str, np.ndarray] = {}

    def tile(self) -> np.ndarray:
        """The tile; UserError where it is not a whole square of job.tile_size pixels that differ."""
        tile, side = self._read(self.row.path), self.job.tile_size
        if tile.shape != (side, side):
            raise UserError(
                f"found {tile.shape[0]}x{tile.shape[1]} px, but data.tile_size is {side}; prepare tiles of that size "
                "or change data.tile_size and model.latent_size"
            )
        if tile.min() == tile.max():
            raise UserError(f"found a constant tile, every pixel is {tile[0, 0]:g} of -1 to 1; remove it")
        return tile

    def partner(self, hint: str, variant: int) -> np.ndarray | None:
        """The partner that this variant takes, turned into it; None where the tile has none for the hint."""
        paths = self.row.partners.get(hint)
        if not paths:
            return None
        turned = dihedral(self._read(paths[choose_partner(hint, self.row.id, variant, len(paths))]), variant)
        turned.setflags(write=False)
        return turned

    def _read(self, path: str) -> np.ndarray:
        self.last = path
        if path not in self.opened:
            local = self.root.local
            self.opened[path] = read_tile(local / path) if local is not None else self._fetch(path)
        return self.opened[path]

    def _fetch(self, path: str) -> np.ndarray:
        """A tile in object storage."""
        where = self.root.where(path)
        try:
            return read_tile(where, self.root.read(path))
        except FileNotFoundError:
            raise UserError(f"{where}: no such image file; copy it there again") from None
