"""Images given as hints, made into what the network was trained with: one plane, the tile's size, -1 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ray_pipeline.data.hint_registry import make_hint
from ray_pipeline.data.images import IMAGE_SUFFIXES, is_zarr, open_image, to_unit
from ray_pipeline.errors import UserError
from ray_pipeline.inference.intensity_scale import IntensityScale, range_of_hint, scale_of, scale_of_image
from ray_pipeline.models.autoencoder import Autoencoder
from ray_pipeline.models.weights import IntensityRange, WeightsHeader
from ray_pipeline.sections import PAIRED_TYPES, PARTNER_TYPES

#: data: the range that was recorded in training. image: the image's own. tile: it is a tile as `prepare` writes them
Intensity = Literal["data", "image", "tile"]
#: more of an image than this outside the recorded range is told; `prepare` leaves 0.002 of a data set outside
_MUCH_OUTSIDE = 0.1
_FP16_MAX = float(np.finfo(np.float16).max)
_FULL_SCALE = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class HintImage:
    """The hints of one field of view. hints: (K, H, W) float32 in [-1, 1]; scale: of the image, where results take its
    units; notes: what looks wrong."""

    name: str
    hints: np.ndarray
    scale: IntensityScale | None
    notes: tuple[str, ...]


class HintReader:
    """Image files of each hint, in the order of the header's hints; `read` makes those of one field of view."""

    def __init__(
        self,
        given: Mapping[str, Path],
        header: WeightsHeader,
        tile_size: int,
        intensity: Intensity,
        chosen: IntensityRange | None,
    ):
        """given: a file, or a folder of images, of each hint; chosen: recorded range of the tiles. UserError: a hint
        that the weights do not know, no images, more of one hint than of another."""
        unknown = sorted(given.keys() - header.hints.keys())
        if unknown:
            if not header.hints:
                raise UserError(
                    f"--hint {unknown[0]}: the weights were trained without hints; give those of a later phase"
                )
            known = ", ".join(header.hints)
            raise UserError(f"--hint {unknown[0]}: the weights were trained with the hints {known}; choose among these")
        self.files = {name: image_files(given[name]) for name in header.hints if name in given}
        counts = {len(files) for files in self.files.values()}
        if len(counts) > 1:
            words = ", ".join(f"{name} {len(files)}" for name, files in self.files.items())
            raise UserError(f"--hint: found unequal numbers of images ({words}), expected one of each hint a field")
        self.header, self.tile_size, self.intensity, self.chosen = header, tile_size, intensity, chosen
        self._names = image_names(next(iter(self.files.values()), []))

    @property
    def hints(self) -> tuple[str, ...]:
        """Names of the hints."""
        return tuple(self.files)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, number: int) -> HintImage:
        """Hints of one field of view; UserError for files that are not one plane of the right size."""
        hints, scales, notes = [], {}, []
        for name, files in self.files.items():
            plane = one_plane(files[number])
            check_size(name, files[number], plane, self.tile_size)
            scale = self._scale(name, plane, files[number])
            scales[name] = scale
            unit = to_unit(plane, scale.low, scale.high)
            notes += self._outside(files[number], plane, scale)
            hints.append(self._hint(name, _as_tile(unit), files[number]))
        return HintImage(self._names[number], np.stack(hints), self._of_results(scales), tuple(notes))

    def _scale(self, name: str, plane: np.ndarray, path: Path) -> IntensityScale:
        if self.intensity == "tile":
            low, high = (0, np.iinfo(plane.dtype).max) if plane.dtype.kind in "iu" else (-1, 1)
            return IntensityScale(low, high, plane.dtype.name, "those of tiles")
        if self.intensity == "data":
            entry = range_of_hint(self.header.intensity, self.chosen, name)
            if entry is not None:
                return scale_of(entry)
            if name != "depth":  # whose values are no intensities
                return scale_of(self.chosen)
        return scale_of_image(plane, path.name)

    def _hint(self, name: str, tile: np.ndarray, path: Path) -> np.ndarray:
        settings = {name: dict(self.header.hints[name])}
        if name not in PARTNER_TYPES:
            return make_hint(name, tile, None, path.name, 0, settings)
        if name in PAIRED_TYPES:
            settings[name]["simulated_share"] = 0.0
        # of the tile itself, which is to be found, only the size is known
        unknown = np.zeros((self.tile_size, self.tile_size), np.float32)
        return make_hint(name, unknown, tile, path.name, 0, settings)

    def _of_results(self, scales: dict[str, IntensityScale]) -> IntensityScale | None:
        """Of the image whose units the results take: a degraded one rather than what edges or the like come from."""
        if self.intensity != "image":
            return None
        ordered = sorted((name for name in scales if name != "depth"), key=lambda name: name not in PAIRED_TYPES)
        return scales[ordered[0]] if ordered else None

    def _outside(self, path: Path, plane: np.ndarray, scale: IntensityScale) -> list[str]:
        share = float(((plane < scale.low) | (plane > scale.high)).mean())
        if self.intensity != "data" or share <= _MUCH_OUTSIDE:
            return []
        return [
            f"{path.name}: {100 * share:.0f} % of its pixels lie outside {scale.low:g} to {scale.high:g} "
            f"({scale.words}); --intensity image takes its own range, and tile is for tiles that `prepare` wrote"
        ]


def stored_latents(autoencoder: Autoencoder, images: np.ndarray, name: str) -> np.ndarray:
    """Images (K, H, W) of a field of view -> latents (K, C, h, w) fp16, as `encode` stores them; UserError for what
    fp16 cannot hold."""
    latents = np.concatenate([autoencoder.encode(torch.from_numpy(image[None])).cpu().numpy() for image in images])
    if not np.abs(latents).max() <= _FP16_MAX:
        raise UserError(f"the autoencoder gave a latent that fp16 cannot hold for the hints of {name}; check the image")
    return latents.astype(np.float16)


def image_files(path: Path) -> list[Path]:
    """The image at `path`, or those in the folder, by name; UserError where there is none."""
    if not path.is_dir() or is_zarr(path):
        return [path]
    found = sorted(
        entry
        for entry in path.iterdir()
        if not entry.name.startswith(".") and (entry.suffix.lower() in IMAGE_SUFFIXES or is_zarr(entry))
    )
    if not found:
        raise UserError(f"{path}: found no image in this folder, expected TIFF, PNG, NumPy or OME-Zarr; correct it")
    return found


def image_names(files: Sequence[Path]) -> tuple[str, ...]:
    """Names that tell the files of one folder apart: their stems, or with the suffix where two share a stem."""
    stems = [path.stem for path in files]
    return tuple(stems if len(set(stems)) == len(stems) else [path.name.replace(".", "_") for path in files])


def one_plane(path: Path) -> np.ndarray:
    """The only plane (H, W) of an image, in its own dtype; UserError for several."""
    image = open_image(path)
    planes = {axis: image.sizes[axis] for axis in "TCZ" if image.sizes[axis] > 1}
    if planes:
        found = ", ".join(f"{axis}={size}" for axis, size in planes.items())
        raise UserError(f"{path}: expected an image of one plane, found {found}; save the plane alone")
    return image.plane(0, 0, 0)


def check_size(hint: str, path: Path, plane: np.ndarray, tile_size: int) -> None:
    """UserError where the plane is no tile; of low resolution it may be smaller by a whole number."""
    height, width = plane.shape
    low = hint == "super_resolution" and tile_size % height == 0
    if height != width or (height != tile_size and not low):
        also = " divided by a whole number" if hint == "super_resolution" else ""
        raise UserError(
            f"{path}: found {height}x{width} px, expected {tile_size}x{tile_size}{also} for the hint {hint}; cut the "
            "image to the tile's size"
        )


def _as_tile(unit: np.ndarray) -> np.ndarray:
    """A unit image as it comes back from a tile on disk, float32 in [-1, 1]."""
    levels = np.rint(unit * _FULL_SCALE).astype(np.uint16)
    return levels.astype(np.float32) * np.float32(2 / _FULL_SCALE) - np.float32(1)
