"""Microscope images as they come: TIFF, PNG, NumPy files and OME-Zarr folders; intensities to unit images and back.

A unit image is float32 in [0, 1]. Source intensity = norm_lo + unit * (norm_hi - norm_lo).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ray_pipeline.data.axes import Layout, find_layout
from ray_pipeline.data.ome_zarr import open_ome_zarr
from ray_pipeline.data.png import read_png
from ray_pipeline.data.tiff import read_tiff
from ray_pipeline.errors import UserError

# Files that open_image reads; it also reads folders for which is_zarr holds.
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".npy", ".npz")
SOURCE_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class MicroscopeImage:
    """One image file or OME-Zarr folder.

    sizes: of T, C, Z, Y, X in this order, 1 where the file has none. dtype: the file's own, in native byte order.
    um_pixel: lateral pixel size in micrometres, None where the file does not say. channel_names: one a channel, ""
    where the file gives none.
    """

    path: Path | str
    sizes: dict[str, int]
    dtype: np.dtype
    um_pixel: float | None
    channel_names: tuple[str, ...]
    stored: Any = field(repr=False)  # an array that takes NumPy's indices
    layout: Layout = field(repr=False)

    def plane(self, t: int, c: int, z: int) -> np.ndarray:
        """One plane (H, W) in the file's own dtype; of an OME-Zarr only this plane is read.

        UserError: no such plane, values that are not finite, a damaged OME-Zarr.
        """
        wanted = {"T": t, "C": c, "Z": z}
        if not all(0 <= index < self.sizes[axis] for axis, index in wanted.items()):
            sizes = ", ".join(f"{axis}={self.sizes[axis]}" for axis in wanted)
            raise UserError(f"{self.path}: found {sizes}, expected a plane t={t}, c={c}, z={z}; count from 0.")
        try:
            plane = self.layout.plane(self.stored, t, c, z)
        except Exception as error:
            raise UserError(
                f"{self.path}: the plane t={t}, c={c}, z={z} cannot be read ({_words(error)}); copy the image again."
            ) from error
        if plane.dtype.kind == "f" and not np.isfinite(plane).all():
            bad = int(plane.size - np.isfinite(plane).sum())
            raise UserError(
                f"{self.path}: found {bad} pixels that are NaN or infinite in the plane t={t}, c={c}, z={z}, expected "
                "finite values; repair or remove the image."
            )
        return np.ascontiguousarray(plane, dtype=self.dtype)


def is_zarr(path: str | Path) -> bool:
    """Whether a path is named like an OME-Zarr folder: one image, whose inner files are none."""
    return Path(path).suffix.lower() == ".zarr"


def open_image(path: str | Path, axes: str | None = None, content: bytes | None = None) -> MicroscopeImage:
    """A TIFF (ImageJ, OME), PNG, .npy, .npz or OME-Zarr folder -> its planes, pixel size and channel names.

    axes: one letter of T C Z Y X S for each dimension, such as "ZYX", where the file does not name them; without it
    an unnamed axis of at most 4 entries holds channels. Pixels keep the file's dtype and values: a palette is a
    look-up table for display and is not applied to a TIFF; an alpha channel is left out. content: the bytes of a file
    in object storage, whose name in messages `path` is. UserError: unreadable, truncated or empty file, several images
    in one file, axes that are unknown or do not fit.
    """
    path = Path(path) if content is None else str(path)
    _check_path(path, content)
    try:
        stored, names, um_pixel, channel_names = _read(path, content)
    except (OSError, cv2.error) as error:
        raise UserError(f"{path}: the image cannot be read ({_words(error)}); check it or remove it.") from error
    if stored.dtype.name not in SOURCE_DTYPES:
        raise UserError(
            f"{path}: found pixels of type {stored.dtype}, expected 8, 16 or 32-bit integers or floats; "
            "convert the image."
        )
    if 0 in stored.shape:
        raise UserError(f"{path}: found an image of shape {stored.shape}, expected some pixels; remove it.")
    layout = find_layout(path, stored.shape, names, axes)
    channels = layout.sizes["C"]
    channel_names = tuple(channel_names) if len(channel_names) == channels else ("",) * channels
    dtype = np.dtype(stored.dtype).newbyteorder("=")
    return MicroscopeImage(path, layout.sizes, dtype, um_pixel, channel_names, stored, layout)


def load_array(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """The one array of a .npy or .npz file, or of its bytes; UserError: unreadable, pickled, several arrays, other
    content."""
    suffix = Path(path).suffix
    try:
        with open(path, "rb") if content is None else io.BytesIO(content) as file:
            array = np.load(file, allow_pickle=False)
            rest = b"" if suffix.lower() == ".npz" else file.read(1)
            if isinstance(array, np.lib.npyio.NpzFile) != (suffix.lower() == ".npz") or rest:
                raise UserError(f"{path}: expected a {suffix} file of one array, found other content; save it again.")
            if isinstance(array, np.ndarray):
                return array
            if len(array.files) != 1:
                raise UserError(
                    f"{path}: expected one array in the archive, found {len(array.files)} "
                    f"({', '.join(array.files[:5])}); keep one."
                )
            return array[array.files[0]]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: expected a NumPy array, found an unreadable file ({_words(error)}); save it again."
        ) from error


def to_unit(pixels: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Source intensities (any shape, any real dtype) -> float32 (pixels - lo) / (hi - lo) within [0, 1]."""
    if not hi > lo:
        raise ValueError(f"to_unit needs hi > lo, got lo {lo} and hi {hi}.")
    # in float32 some values of a full 16-bit range would not come back to themselves
    unit = np.subtract(pixels, lo, dtype=np.float64)
    unit *= 1.0 / (hi - lo)
    return np.clip(unit, 0.0, 1.0, out=unit).astype(np.float32, copy=False)


def from_unit(unit: np.ndarray, lo: float, hi: float, dtype: str | np.dtype) -> np.ndarray:
    """Unit image (any shape) -> lo + unit * (hi - lo) in `dtype`; integers are rounded and kept in range."""
    dtype = np.dtype(dtype)
    values = np.multiply(unit, hi - lo, dtype=np.float64) + lo
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(dtype)


def _check_path(path: Path | str, content: bytes | None) -> None:
    suffix = Path(path).suffix.lower()
    if not is_zarr(path) and suffix not in IMAGE_SUFFIXES:
        raise UserError(
            f"{path}: expected a TIFF or PNG image, a NumPy array or an OME-Zarr folder, found "
            f"{suffix or 'no suffix'}; convert it first."
        )
    if content is None and not (path.is_dir() if is_zarr(path) else path.is_file()):
        raise UserError(f"{path}: no such image {'folder' if is_zarr(path) else 'file'}; check the path.")
    if not content and (content is not None or (path.is_file() and path.stat().st_size == 0)):
        raise UserError(f"{path}: expected a {suffix} image, found an empty file; copy it again or remove it.")


def _read(path: Path | str, content: bytes | None) -> tuple[Any, Sequence[str], float | None, Sequence[str]]:
    """Stored array, names of its dimensions, micrometres a pixel, names of its channels."""
    suffix = Path(path).suffix.lower()
    if is_zarr(path):
        return open_ome_zarr(path)
    if suffix in (".npy", ".npz"):
        array = load_array(path, content)
        return array, [""] * array.ndim, None, ()
    if suffix == ".png":
        return read_png(path, content), "YXS", None, ()
    return read_tiff(path, content)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
