"""Tiles cover an image without leaving it; their names are safe and unlike."""

from itertools import pairwise

import numpy as np
import pytest

from ray_pipeline.data.sources.tiling import LONGEST_STEM, safe_name, tile_origins, tile_stems


@pytest.mark.parametrize("multiple", [1, 2, 8])
@pytest.mark.parametrize("overlap", [0, 5, 31])
@pytest.mark.parametrize("length", [32, 33, 64, 71, 100, 512])
def test_tiles_cover_all_that_whole_pixels_of_a_partner_can(length, overlap, multiple):
    origins = tile_origins(length, 32, overlap, multiple)
    covered = np.zeros(length, int)
    for origin in origins:
        covered[origin : origin + 32] += 1
    assert origins == sorted(set(origins))
    assert all(origin % multiple == 0 and 0 <= origin <= length - 32 for origin in origins)
    assert covered[: length - multiple + 1].all()
    assert all(b - a <= max(multiple, 32 - overlap) for a, b in pairwise(origins))


def test_the_grid_has_the_overlap_that_was_asked_for():
    assert tile_origins(128, 32) == [0, 32, 64, 96]
    assert tile_origins(104, 32, 8) == [0, 24, 48, 72]
    assert tile_origins(100, 32) == [0, 32, 64, 68]
    assert tile_origins(101, 32, 0, 4) == [0, 32, 64, 68]
    assert tile_origins(104, 32, 6, 8) == [0, 24, 48, 72]
    assert tile_origins(32, 32, 16) == [0]
    assert tile_origins(31, 32) == []


def test_tile_names_are_unique_and_safe():
    names = [
        "a b.tif", "a-b.tif", "A-b.tif", "x/y.tif", "x__y.tif", "a.png", "\u00e9.tif", "n" * 300 + ".tif", "c.d.tif",
    ]  # fmt: skip
    stems = tile_stems(names)
    assert len({stem.lower() for stem in stems.values()}) == len(names)
    assert all(
        stem.isascii() and len(stem) <= LONGEST_STEM + 9 and not set(stem) & set("/ ") for stem in stems.values()
    )
    assert (stems["a.png"], stems["c.d.tif"]) == ("a", "c.d")
    assert stems == tile_stems(names[::-1])


@pytest.mark.parametrize(
    ("text", "name"), [("my plate (1)", "my-plate-1"), ("..", ""), (".hidden", "hidden"), ("a/b\\c", "a-b-c"), ("", "")]
)
def test_a_safe_name_neither_hides_nor_leaves_its_folder(text, name):
    assert safe_name(text) == name
