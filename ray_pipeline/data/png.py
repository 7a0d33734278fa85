"""PNG files: grey or colour, every chunk checked before a pixel is believed."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

from ray_pipeline.errors import UserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_png(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """A PNG -> pixels (H, W, S), S = 1 (grey) or 3 (red, green, blue), 8 or 16 bit; an alpha channel is left out.

    content: its bytes, where it is not on a disk. UserError: other content, truncated or damaged file.
    """
    payload = path.read_bytes() if content is None else content
    colour_type = _check_png(path, payload)
    pixels = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"{path}: found a PNG that cannot be decoded; save it again or remove it.")
    if pixels.ndim == 2:
        return pixels[..., None]
    colours = pixels[..., 2::-1]  # OpenCV's order is BGR(A)
    grey = colour_type == 4 or (colour_type == 3 and (colours == colours[..., :1]).all())
    return colours[..., :1] if grey else colours


def _check_png(path: Path | str, payload: bytes) -> int:
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
