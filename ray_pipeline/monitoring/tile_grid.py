"""Pictures of tiles beside each other, with their names."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ray_pipeline.sections import PAIRED_TYPES
from ray_pipeline.storage import replace_file

MIN_TILE_PIXELS = 128
MARGIN, GAP = 20, 10
PAPER, TEXT, FAINT_TEXT = (241, 241, 241), (40, 40, 40), (120, 120, 120)
NOT_FINITE = (255, 0, 0)


@dataclass(frozen=True)
class Window:
    """Intensities shown as black and white; one for a whole picture, and the same at every epoch."""

    low: float
    high: float

    @classmethod
    def of(cls, tiles: np.ndarray) -> Window:
        """From the darkest to nearly the brightest of the target tiles, as a microscope's viewer opens a file."""
        low, high = np.percentile(tiles, (0.1, 99.8))
        return cls(float(low), float(max(high, low + 1e-3)))

    def shown(self, tiles: np.ndarray) -> np.ndarray:
        return 2 * (tiles - self.low) / (self.high - self.low) - 1

    def of_hint(self, name: str, tiles: np.ndarray) -> np.ndarray:
        """Tiles and degraded images in this window; computed ones (edges, depth) in their own full range."""
        return self.shown(tiles) if name in ("tile", *PAIRED_TYPES) else tiles


def sample_grid(
    columns: Sequence[tuple[str, np.ndarray]],
    path: str | Path,
    *,
    captions: Mapping[tuple[int, int], str] | None = None,
    title: str,
    groups: int = 1,
) -> np.ndarray:
    """Draw tiles with their names as a PNG at `path` and return the picture (H, W, 3) uint8.

    `columns` are (heading, tiles (N, H, W) float in [-1, 1]), all of one shape. One column is laid out as a
    square grid, row by row; several (hints, sample, target) stand side by side, tile n of each in row n; with
    `groups` the rows are cut into so many parts that stand beside each other.
    `captions` maps (n, column) to a line under that tile. Each pixel is shown as a square of whole pixels:
    1:1, or magnified until tiles are at least 128 wide; values outside [-1, 1] are clipped, and pixels that
    are not finite are red. Raises ValueError on shapes that do not fit.
    """
    shapes = {tiles.shape for _, tiles in columns}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3 or 0 in next(iter(shapes)):
        raise ValueError(f"columns must be non-empty (N, H, W) arrays of one shape, found {sorted(shapes)}")
    captions = captions or {}
    count, height, width = next(iter(shapes))
    scale = max(1, math.ceil(MIN_TILE_PIXELS / max(height, width)))
    fonts = {name: ImageFont.load_default(size) for name, size in (("title", 22), ("head", 17), ("note", 15))}

    square = math.ceil(math.sqrt(count)) if len(columns) == 1 else None
    down = math.ceil(count / (square or groups))
    across = square or len(columns) * math.ceil(count / down)
    texts = [fonts["note"].getlength(text) for text in captions.values()]
    texts += [] if square else [fonts["head"].getlength(name) for name, _ in columns]
    cell = math.ceil(max([width * scale, *texts]))
    row_height = height * scale + (24 if captions else 0) + GAP
    header = MARGIN + 34 + (28 if any(name for name, _ in columns) else 0)
    canvas_width = max(across * (cell + GAP) - GAP, math.ceil(fonts["title"].getlength(title))) + 2 * MARGIN
    canvas = np.full((header + down * row_height - GAP + MARGIN, canvas_width, 3), PAPER, dtype=np.uint8)

    labels = [((MARGIN, MARGIN - 4), title, fonts["title"], TEXT, "la")]
    for column, (name, tiles) in enumerate(columns):
        for first in range(column, across, len(columns)) if not square else [0]:
            left = MARGIN + first * (cell + GAP)
            anchor = (left, header - 8, "ls") if square else (left + cell // 2, header - 8, "ms")
            labels.append((anchor[:2], name, fonts["head"], FAINT_TEXT if square else TEXT, anchor[2]))
        for n, tile in enumerate(tiles):
            row, place = divmod(n, square) if square else (n % down, n // down * len(columns) + column)
            x = MARGIN + place * (cell + GAP) + (cell - width * scale) // 2
            y = header + row * row_height
            canvas[y : y + height * scale, x : x + width * scale] = _gray_pixels(tile, scale)
            spot = (x + width * scale // 2, y + height * scale + 18)
            labels.append((spot, captions.get((n, column), ""), fonts["note"], TEXT, "ms"))
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for spot, text, font, color, anchor in labels:
        draw.text(spot, text, fill=color, font=font, anchor=anchor)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=4)
    replace_file(path, buffer.getvalue())
    return np.asarray(picture)


def _gray_pixels(tile: np.ndarray, scale: int) -> np.ndarray:
    """(H, W) float in [-1, 1] -> (H*scale, W*scale, 3) uint8, -1 black, 1 white, not finite red."""
    finite = np.isfinite(tile)
    gray = np.rint((np.clip(np.where(finite, tile, 0.0), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    pixels = np.where(finite[..., None], gray[..., None], np.array(NOT_FINITE, dtype=np.uint8))
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
