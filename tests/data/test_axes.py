"""Every dimension gets the meaning the file or the user gives it; what neither says is refused, not guessed."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data.axes import find_layout, um_per
from ray_pipeline.errors import UserError

PATH = Path("cells.tif")
SIZE = {"T": 2, "C": 3, "S": 4, "Z": 5, "Y": 6, "X": 7}


@pytest.mark.parametrize("named", [True, False])
def test_planes_are_found_in_every_order_of_axes(named):
    coordinates = np.arange(np.prod(list(SIZE.values()))).reshape(list(SIZE.values()))  # T C S Z Y X
    for order in permutations(SIZE):
        axes = "".join(order)
        array = np.einsum(f"TCSZYX->{axes}", coordinates)
        layout = find_layout(PATH, array.shape, axes if named else [""] * 6, None if named else axes)
        assert layout.sizes == {"T": 2, "C": 12, "Z": 5, "Y": 6, "X": 7}
        np.testing.assert_array_equal(layout.plane(array, 1, 4 * 2 + 3, 2), coordinates[1, 2, 3, 2], err_msg=axes)


@pytest.mark.parametrize(
    ("shape", "names", "letters"),
    [
        ((6, 7), ["", ""], "YX"),
        ((1, 7), ["", ""], "YX"),
        ((3, 6, 7), [""] * 3, "CYX"),
        ((6, 7, 4), [""] * 3, "YXC"),
        ((6, 3, 7), [""] * 3, "YCX"),
        ((2, 2, 2), [""] * 3, "CYX"),
        ((1, 6, 7), [""] * 3, "_YX"),
        ((1, 2, 6, 7), [""] * 4, "_CYX"),
        ((4, 6, 7), ["", "Y", "X"], "CYX"),
        ((9, 6, 7), ["Z", "Y", "X"], "ZYX"),
        ((1, 6, 7), ["R", "Y", "X"], "_YX"),
        ((2, 1, 1), ["C", "Y", "X"], "CYX"),
    ],
)
def test_what_is_accepted_without_axes(shape, names, letters):
    assert find_layout(PATH, shape, names, None).letters == letters


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((5, 6, 7), ["", "", ""]),
        ((2, 3, 6, 7), ["", "", "", ""]),
        ((7,), [""]),
        ((5, 6, 7), ["", "Y", "X"]),
        ((2, 6, 7), ["R", "Y", "X"]),
        ((2, 3, 6, 7), ["", "C", "Y", "X"]),
        ((2, 6, 7), ["", "Z", "X"]),
        ((5, 6), ["Z", "X"]),
        ((2, 2, 6, 7), ["C", "C", "Y", "X"]),
    ],
)
def test_what_nobody_named_is_refused_without_axes(shape, names):
    with pytest.raises(UserError) as caught:
        find_layout(PATH, shape, names, None)
    assert f"{PATH}: found shape {shape}" in str(caught.value)
    assert "pass --axes, such as --axes ZYX" in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "found"),
    [
        ("ZZYX", "--axes ZZYX, expected Y, X and any of T, C, Z, S, each once"),
        ("ZCX", "--axes ZCX, expected Y, X"),
        ("QYX", "--axes QYX, expected Y, X"),
        ("", "--axes , expected Y, X"),
        ("TZCYX", "--axes TZCYX for an image of 4 dimensions.*expected one letter for each"),
        ("ZYX", "--axes ZYX for an image of 4 dimensions.*expected one letter for each"),
        ("TCYX", "--axes TCYX, expected what the file itself says.*Z=2, C=3"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, found):
    with pytest.raises(UserError, match=rf"cells\.tif: found {found}"):
        find_layout(PATH, (2, 3, 6, 7), ["Z", "C", "Y", "X"], axes)


def test_axes_pass_over_dimensions_of_size_1():
    assert find_layout(PATH, (1, 9, 6, 7, 1), [""] * 5, "ZYX").letters == "_ZYX_"
    assert find_layout(PATH, (1, 9, 6, 7, 1), ["T", "Z", "Y", "X", "S"], "zyx").letters == "_ZYX_"
    assert find_layout(PATH, (3, 6, 7), ["C", "Y", "X"], "SYX").letters == "SYX"


def test_a_named_row_of_one_pixel_is_no_other_axis():
    assert find_layout(PATH, (2, 1, 7), ["C", "Y", "X"], "CYX").letters == "CYX"
    with pytest.raises(UserError, match="expected what the file itself says"):
        find_layout(PATH, (2, 1, 7), ["C", "Y", "X"], "YX")


@pytest.mark.parametrize(
    ("unit", "um"),
    [("nm", 1e-3), ("nanometer", 1e-3), ("\u00b5m", 1.0), ("\u03bcm", 1.0), ("\\u00B5m", 1.0), ("micrometer", 1.0)]
    + [("mm", 1e3), ("millimeter", 1e3), ("\u00c5", 1e-4), ("angstrom", 1e-4), ("pixel", 0.0), ("", 0.0)],
)
def test_units_of_length_are_known_by_every_name_in_use(unit, um):
    assert um_per(unit) == um
