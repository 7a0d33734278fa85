"""Where tiles lie in an image, a grid with overlap that never leaves it, and what they are called."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter

LONGEST_STEM = 150


def tile_origins(length: int, tile_size: int, overlap: int = 0, multiple: int = 1) -> list[int]:
    """First pixels of the tiles along one axis of `length` pixels.

    A grid of step tile_size - overlap; for a remainder one more tile, which ends at the border. All are multiples of
    `multiple`, so that partners of so many times fewer pixels have their tiles at whole pixels; then the last tile may
    end up to multiple - 1 pixels before the border, and the step is cut to a multiple. Empty where no tile fits.
    """
    step = max(multiple, (tile_size - overlap) // multiple * multiple)
    last = (length - tile_size) // multiple * multiple
    if length < tile_size:
        return []
    origins = list(range(0, last + 1, step))
    return origins if origins[-1] == last else [*origins, last]


def tile_stems(names: list[str]) -> dict[str, str]:
    """Image names -> unique, file-name safe stems; a hash is added where two would be alike or one is long."""
    plain = {name: safe_name(os.path.splitext(name)[0].replace("/", "__")) for name in names}
    uses = Counter(stem.lower() for stem in plain.values())
    return {
        name: stem
        if uses[stem.lower()] == 1 and 0 < len(stem) <= LONGEST_STEM
        else f"{stem[:LONGEST_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, stem in plain.items()
    }


def safe_name(text: str) -> str:
    """Text -> ASCII letters, digits, '.', '_' and '-', fit for a file name; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
