"""Files of a sampling: a TIFF a tile in the source's units, a picture of the first ones, and how to repeat it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ray_pipeline.errors import UserError
from ray_pipeline.inference.intensity_scale import IntensityScale
from ray_pipeline.monitoring.tile_grid import Window, sample_grid
from ray_pipeline.storage import replace_file

PICTURE, RECORD = "samples.png", "sample.json"
#: tiles in the picture at most: alone, and in rows beside their hints
SHOWN_TILES, SHOWN_ROWS = 64, 16


@dataclass(frozen=True)
class TileName:
    """One tile to make: its seed, and which image its hints are of, if any."""

    seed: int
    image: str | None = None

    @property
    def file(self) -> str:
        """File name of its TIFF."""
        seed = f"seed_{self.seed:05d}.tif"
        return seed if self.image is None else f"{self.image}_{seed}"


@dataclass(frozen=True)
class ShownTile:
    """A tile, and its hints if any, as they are drawn: (H, W) and (K, H, W) float32 in [-1, 1]."""

    name: TileName
    tile: np.ndarray
    hints: np.ndarray | None


def claim_folder(folder: Path, names: Sequence[TileName]) -> None:
    """Make the folder; UserError where a file that will be written is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [name for name in (RECORD, PICTURE, *(tile.file for tile in names)) if (folder / name).exists()]
    if there:
        raise UserError(f"--out {folder} holds samples already ({there[0]}); give another folder, or remove them")


def write_tile_image(path: Path, tile: np.ndarray, scale: IntensityScale, description: Mapping[str, Any]) -> None:
    """A tile (H, W) in [-1, 1] as a TIFF of one plane, uint16 or float32, in the units of `scale`; whole or not at all.

    description: JSON values, for the tag ImageDescription.
    """
    buffer = io.BytesIO()
    words = json.dumps(description)
    tifffile.imwrite(buffer, scale.written(tile), photometric="minisblack", description=words, metadata=None)
    replace_file(path, buffer.getvalue())


def draw_picture(folder: Path, shown: Sequence[ShownTile], hints: Sequence[str], title: str) -> Path:
    """Tiles with their seeds as samples.png: a square grid, or beside their hints, in one window of intensities."""
    tiles = np.stack([entry.tile for entry in shown])
    window = Window.of(tiles)
    columns = [
        (name, window.of_hint(name, np.stack([entry.hints[number] for entry in shown])))
        for number, name in enumerate(hints)
    ]
    columns.append(("sample", window.shown(tiles)))
    captions = {(row, len(hints)): f"seed {entry.name.seed}" for row, entry in enumerate(shown)}
    sample_grid(columns, folder / PICTURE, captions=captions, title=title)
    return folder / PICTURE


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write sample.json."""
    replace_file(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return folder / RECORD
