"""Pixels from files and back: microscope images as they come, tiles as the network sees them.

A unit image is float32 in [0, 1]. A tile on disk is a 16-bit grayscale PNG that holds round(unit * 65535);
the network sees 2 * unit - 1. Source intensity = norm_lo + unit * (norm_hi - norm_lo).
"""

import hashlib
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ray_pipeline.data.tiff import read_tiff
from ray_pipeline.errors import UserError

IMAGE_SUFFIXES = (".tif", ".tiff", ".png")
SOURCE_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class MicroscopeImage:
    """One field of view: `pixels` (C, H, W) in the file's own dtype; `um_pixel` in micrometres or None."""

    pixels: np.ndarray
    um_pixel: float | None


def read_image(path: str | Path) -> MicroscopeImage:
    """A 2-D, CYX or YXC image file (TIFF, ImageJ or OME TIFF, PNG) -> pixels (C, H, W) and pixel size.

    Pixels keep the file's dtype (8, 16 or 32-bit integers, floats) and values: a palette is a look-up table
    for display and is not applied to a TIFF; an alpha channel is left out. An axis that a TIFF does not name
    is taken for channels when it has at most 4 entries. UserError: unreadable, truncated or empty file,
    values that are not finite, Z or T axes, several images in one file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: expected a TIFF or PNG image, found {suffix or 'no suffix'}; convert it first.")
    if not path.is_file():
        raise UserError(f"{path}: no such image file; check the path.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: expected a {suffix} image, found an empty file; copy it again or remove it.")
    try:
        pixels, um_pixel = (_read_png(path), None) if suffix == ".png" else read_tiff(path)
    except (OSError, cv2.error) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: the image cannot be read ({detail}); check it or remove it.") from error
    if pixels.dtype.name not in SOURCE_DTYPES:
        raise UserError(
            f"{path}: found pixels of type {pixels.dtype}, expected 8, 16 or 32-bit integers or floats; "
            "convert the image."
        )
    if pixels.size == 0:
        raise UserError(f"{path}: found an image of shape {pixels.shape}, expected some pixels; remove it.")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        bad = int(pixels.size - np.isfinite(pixels).sum())
        raise UserError(
            f"{path}: found {bad} pixels that are NaN or infinite, expected finite values; repair or remove the image."
        )
    return MicroscopeImage(np.ascontiguousarray(pixels), um_pixel)


def write_tile(path: str | Path, unit_image: np.ndarray) -> str:
    """Writes a unit image (H, W) as a 16-bit grayscale PNG, atomically -> sha256 (hex) of the file's bytes.

    Values are clipped to [0, 1] and rounded to 1/65535; the same input gives the same bytes. The parent
    folder is made when missing. ValueError: not 2-D or not finite.
    """
    unit_image = np.asarray(unit_image)
    if unit_image.ndim != 2 or not np.isfinite(unit_image).all():
        raise ValueError(f"{path}: a tile is a finite (H, W) array, got shape {unit_image.shape}.")
    levels = np.rint(np.clip(unit_image, 0.0, 1.0) * 65535.0).astype(np.uint16)
    _, encoded = cv2.imencode(".png", levels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    payload = encoded.tobytes()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(payload)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(payload).hexdigest()


def read_tile(path: str | Path) -> np.ndarray:
    """A tile (16 or 8-bit PNG or TIFF, or .npy/.npz in [-1, 1]) -> float32 (H, W) in [-1, 1].

    UserError: missing, unreadable or truncated file, more than one channel, another dtype, array values
    outside [-1, 1].
    """
    path = Path(path)
    if path.suffix.lower() in (".npy", ".npz"):
        return _read_array_tile(path)
    pixels = read_image(path).pixels
    if pixels.shape[0] != 1 or pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"{path}: expected a tile of one channel in 8 or 16 bit, found {pixels.shape[0]} channel(s) of "
            f"{pixels.dtype}; make tiles with `ray-pipeline prepare`."
        )
    return pixels[0].astype(np.float32) * np.float32(2.0 / np.iinfo(pixels.dtype).max) - np.float32(1.0)


def to_unit(pixels: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """Source intensities (any shape, any real dtype) -> float32 (pixels - lo) / (hi - lo) within [0, 1]."""
    if not hi > lo:
        raise ValueError(f"to_unit needs hi > lo, got lo {lo} and hi {hi}.")
    # float32 holds every 16-bit integer exactly; wider types need float64 before lo is taken away.
    work = np.float32 if pixels.dtype.itemsize <= 2 else np.float64
    unit = np.subtract(pixels, lo, dtype=work)
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


def _read_array_tile(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as archive:
                if len(archive.files) != 1:
                    raise UserError(
                        f"{path}: expected one array in the tile, found {len(archive.files)} "
                        f"({', '.join(archive.files[:5])}); keep one."
                    )
                array = archive[archive.files[0]]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: expected a NumPy tile, found an unreadable file ({error}); prepare it again."
        ) from error
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(
            f"{path}: expected a float tile of shape (H, W), found {array.dtype} {array.shape}; prepare it again."
        )
    if not (np.abs(array) <= 1.0 + 1e-3).all():
        raise UserError(
            f"{path}: expected tile values in [-1, 1], found {array.min():.4g} to {array.max():.4g}; prepare it again."
        )
    return np.clip(array.astype(np.float32), -1.0, 1.0)


def _read_png(path: Path) -> np.ndarray:
    payload = path.read_bytes()
    colour_type = _check_png(path, payload)
    pixels = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"{path}: found a PNG that cannot be decoded; save it again or remove it.")
    if pixels.ndim == 2:
        return pixels[None]
    colours = pixels[..., 2::-1].transpose(2, 0, 1)  # OpenCV's order is BGR(A)
    grey = colour_type == 4 or (colour_type == 3 and (colours == colours[:1]).all())
    return colours[:1] if grey else colours


def _check_png(path: Path, payload: bytes) -> int:
    # OpenCV decodes a truncated PNG in part, with no error: check every chunk's length and checksum.
    if not payload.startswith(PNG_SIGNATURE):
        raise UserError(f"{path}: expected a PNG image, found other content under that name; rename or remove it.")
    colour_type, offset, kind = -1, len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        chunk = payload[offset : offset + 8]
        length, kind = struct.unpack(">I4s", chunk) if len(chunk) == 8 else (0, b"")
        end = offset + 12 + length
        if len(chunk) < 8 or end > len(payload):
            raise UserError(f"{path}: found a truncated PNG ({len(payload)} bytes); copy it again or remove it.")
        if zlib.crc32(payload[offset + 4 : end - 4]) != struct.unpack(">I", payload[end - 4 : end])[0]:
            raise UserError(f"{path}: found a damaged PNG (checksum at byte {offset}); copy it again or remove it.")
        if kind == b"IHDR":
            colour_type = payload[offset + 17]
        offset = end
    return colour_type
