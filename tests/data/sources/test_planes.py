"""Planes are those that were asked for, in their order; axes that nobody chose from are refused."""

import numpy as np
import pytest

from ray_pipeline.data.focus import depth_from_focus, extended_focus
from ray_pipeline.data.images import open_image
from ray_pipeline.data.sources.planes import PlaneChoice, planes
from ray_pipeline.errors import UserError


@pytest.fixture
def pixels(cells):
    return cells((2, 3, 4, 16, 20))  # T C Z Y X


@pytest.fixture
def image(tmp_path, pixels):
    np.save(tmp_path / "a.npy", pixels)
    return open_image(tmp_path / "a.npy", "TCZYX")


@pytest.mark.parametrize(
    ("choice", "suffixes"),
    [
        ({"z": (2, 0), "t": (1,)}, [(c, 1, z) for c in range(3) for z in (2, 0)]),
        ({"z": "all", "t": "all"}, [(c, t, z) for c in range(3) for t in range(2) for z in range(4)]),
        ({"channels": (2, 0), "z": (3,), "t": (0,)}, [(2, 0, 3), (0, 0, 3)]),
        ({"channels": "all", "z": (3,), "t": (0,)}, [(c, 0, 3) for c in range(3)]),
    ],
)
def test_planes_are_those_chosen(image, pixels, choice, suffixes):
    found = list(planes(image, PlaneChoice(**choice)))
    assert [plane.place for plane in found] == suffixes
    assert [plane.channel for plane in found] == [c for c, _, _ in suffixes]
    for plane, (c, t, z) in zip(found, suffixes, strict=True):
        assert plane.suffix == f"_t{t}_z{z}"
        assert plane.depth is None
        np.testing.assert_array_equal(plane.pixels, pixels[t, c, z])


@pytest.mark.parametrize("z", ["max", "focus"])
def test_a_stack_becomes_one_plane_and_its_depth(image, pixels, z):
    found = list(planes(image, PlaneChoice(channels=(1,), z=z, t="all")))
    assert [(plane.place, plane.suffix) for plane in found] == [((1, t, 0), f"_t{t}_{z}") for t in range(2)]
    for t, plane in enumerate(found):
        stack = pixels[t, 1]
        np.testing.assert_array_equal(plane.pixels, stack.max(axis=0) if z == "max" else extended_focus(stack))
        np.testing.assert_array_equal(plane.depth, depth_from_focus(stack))


@pytest.mark.parametrize("z", [None, "all", "max", "focus", (0,)])
def test_an_image_of_one_plane_needs_no_choice_and_no_suffix(tmp_path, cells, z):
    np.save(tmp_path / "a.npy", cells((16, 20)))
    (plane,) = planes(open_image(tmp_path / "a.npy"), PlaneChoice(z=z))
    assert (plane.place, plane.suffix, plane.depth) == ((0, 0, 0), "", None)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (
            {"t": (0,)},
            r"a\.npy: found 4 planes along Z, expected one; pass --z with numbers from 0 to 3, all, max or f",
        ),
        ({"z": "max"}, r"a\.npy: found 2 planes along T, expected one; pass --t with numbers from 0 to 1, all$"),
        ({"z": (0, 7), "t": (0,)}, r"found 4 along Z, expected also number 7"),
        ({"z": (4, 7), "t": (0,)}, r"found 4 along Z, expected also number 4 \(from 0\); correct --z"),
        ({"z": (0,), "t": (2,)}, r"found 2 along T, expected also number 2 \(from 0\); correct --t"),
        ({"channels": (3,), "z": "all", "t": "all"}, r"found 3 along C, expected also number 3 \(from 0\)"),
    ],
)
def test_a_choice_that_nobody_made_is_not_guessed(image, choice, found):
    with pytest.raises(UserError, match=found):
        list(planes(image, PlaneChoice(**choice)))
