"""Tiles as the network sees them, on disk and back.

A tile on disk is a 16-bit grayscale PNG that holds round(unit * 65535), where a unit image is float32 in [0, 1]; the
network sees 2 * unit - 1.
"""

import hashlib
import os
import threading
from pathlib import Path

import cv2
import numpy as np

from ray_pipeline.data.images import load_array, open_image
from ray_pipeline.errors import UserError


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


def read_tile(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """A tile (16 or 8-bit PNG or TIFF, or .npy/.npz in [-1, 1]) -> float32 (H, W) in [-1, 1].

    content: the bytes of a file in object storage, whose name in messages `path` is. UserError: missing, unreadable or
    truncated file, more than one plane, another dtype, array values outside [-1, 1].
    """
    path = Path(path) if content is None else str(path)
    if Path(path).suffix.lower() in (".npy", ".npz"):
        return _read_array_tile(path, content)
    image = open_image(path, content=content)
    planes = image.sizes["T"] * image.sizes["C"] * image.sizes["Z"]
    if planes != 1 or image.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"{path}: expected a tile of one channel in 8 or 16 bit, found {planes} channel(s) or planes of "
            f"{image.dtype}; make tiles with `ray-pipeline prepare`."
        )
    return image.plane(0, 0, 0).astype(np.float32) * np.float32(2.0 / np.iinfo(image.dtype).max) - np.float32(1.0)


def _read_array_tile(path: Path | str, content: bytes | None) -> np.ndarray:
    array = load_array(path, content)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(
            f"{path}: expected a float tile of shape (H, W), found {array.dtype} {array.shape}; prepare it again."
        )
    if not (np.abs(array) <= 1.0 + 1e-3).all():
        found = f"{array.min():.4g} to {array.max():.4g}" if np.isfinite(array).all() else "NaN or infinite ones"
        raise UserError(f"{path}: expected tile values in [-1, 1], found {found}; prepare it again.")
    return np.clip(array.astype(np.float32), -1.0, 1.0)
