"""Hints are pure functions of the tile, aligned with it, and turn with it."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from ray_pipeline.data import optics
from ray_pipeline.data.encode_job import HintSettings
from ray_pipeline.data.hints import HINTS, dihedral, make_hint
from ray_pipeline.errors import UserError
from ray_pipeline.sections import CONDITION_TYPES, PAIRED_TYPES

SETTINGS = HintSettings(super_resolution_scale=4)
every_hint = pytest.mark.parametrize("name", list(HINTS))


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    """Bright discs and a line on a dark ground, slightly blurred, in [-1, 1]."""
    canvas = np.full((96, 96), 0.08, np.float32)
    for x, y, radius, grey in ((20, 30, 9, 0.9), (60, 25, 14, 0.5), (45, 70, 11, 0.7)):
        cv2.circle(canvas, (x, y), radius, grey, -1)
    cv2.line(canvas, (70, 60), (90, 88), 0.8, 2)
    return (2 * cv2.GaussianBlur(canvas, (0, 0), 1.0) - 1).astype(np.float32)


def hint(name: str, tile: np.ndarray, partner=None, sample_id="set/a", variant=0, settings=SETTINGS) -> np.ndarray:
    return make_hint(name, tile, partner, sample_id, variant, settings)


def test_every_condition_type_of_the_config_has_its_hint():
    assert tuple(HINTS) == CONDITION_TYPES
    assert set(PAIRED_TYPES) < set(HINTS)


@every_hint
def test_equal_arguments_give_equal_bits(name, tile):
    before = tile.copy()
    one, two = hint(name, tile), hint(name, tile)
    assert one.tobytes() == two.tobytes()
    np.testing.assert_array_equal(tile, before)


@every_hint
@pytest.mark.parametrize("content", ["tile", "black", "white", "noise"])
def test_a_hint_has_the_shape_of_its_tile_and_stays_in_range(name, tile, content):
    rng = np.random.default_rng(0)
    contents = {"tile": tile, "black": -np.ones_like(tile), "white": np.ones_like(tile)}
    contents["noise"] = rng.uniform(-1, 1, tile.shape).astype(np.float32)
    made = hint(name, contents[content])
    assert made.shape == tile.shape
    assert made.dtype == np.float32
    assert made.flags["C_CONTIGUOUS"]
    assert made.min() >= -1
    assert made.max() <= 1


@pytest.mark.parametrize("name", PAIRED_TYPES)
def test_simulated_degradations_differ_between_samples_and_variants(name, tile):
    base = hint(name, tile)
    assert not np.array_equal(base, hint(name, tile, sample_id="set/b"))
    assert not np.array_equal(base, hint(name, tile, variant=1))


@pytest.mark.parametrize("name", ["canny", "depth"])
def test_computed_hints_do_not_depend_on_names(name, tile):
    np.testing.assert_array_equal(hint(name, tile), hint(name, tile, sample_id="set/b", variant=3))


def test_canny_is_the_one_of_opencv_on_the_smoothed_tile(tile):
    unit = (tile + 1) / 2
    smooth = np.rint(255 * cv2.GaussianBlur(unit, (13, 13), 1.4, borderType=cv2.BORDER_REFLECT_101)).astype(np.uint8)
    gradient = np.hypot(
        ndimage.sobel(smooth.astype(float), 0, mode="mirror"), ndimage.sobel(smooth.astype(float), 1, mode="mirror")
    )
    high = max(20.0, np.percentile(gradient, 90))
    expected = cv2.Canny(smooth, 0.4 * high, high, L2gradient=True)
    np.testing.assert_array_equal(hint("canny", tile), np.where(expected > 0, 1, -1))
    assert 0.01 < (expected > 0).mean() < 0.2


def test_canny_edges_lie_on_the_border_of_a_disc():
    y, x = np.mgrid[:96, :96]
    radius = np.hypot(x - 48, y - 48)
    edges = hint("canny", np.where(radius < 24, 0.6, -0.8).astype(np.float32)) > 0
    assert edges.sum() > 100
    assert np.abs(radius[edges] - 24).max() < 2


@pytest.mark.parametrize("level", [-1.0, 0.3, 1.0])
def test_an_empty_tile_has_no_edges_even_with_camera_noise(level):
    rng = np.random.default_rng(1)
    empty = np.clip(level + 0.02 * rng.standard_normal((96, 96)), -1, 1).astype(np.float32)
    assert (hint("canny", np.full((96, 96), level, np.float32)) == -1).all()
    assert (hint("canny", empty) == -1).all()


def test_the_eight_variants_are_the_symmetries_of_the_square(tile):
    corner = tile[:48, :48] + np.arange(48, dtype=np.float32)  # no symmetry of its own
    images = [dihedral(corner, variant) for variant in range(8)]
    np.testing.assert_array_equal(images[0], corner)
    expected = [turned for image in (corner, corner.T) for turned in (np.rot90(image, k) for k in range(4))]
    assert {image.tobytes() for image in images} == {np.ascontiguousarray(image).tobytes() for image in expected}
    assert len({image.tobytes() for image in images}) == 8
    # closed: two of them in a row are again one of them
    for one in range(8):
        for two in range(8):
            assert dihedral(dihedral(corner, one), two).tobytes() in {image.tobytes() for image in images}


@pytest.mark.parametrize("variant", range(8))
def test_edges_and_relief_turn_with_the_tile(tile, variant):
    for name, share in (("canny", 0.99), ("depth", 1.0)):
        turned = dihedral(hint(name, tile), variant)
        made = hint(name, dihedral(tile, variant), variant=variant)
        assert (np.abs(turned - made)[4:-4, 4:-4] < 1e-4).mean() >= share


def test_a_noisy_partner_is_taken_as_it_is(tile):
    partner = np.random.default_rng(2).uniform(-1, 1, tile.shape).astype(np.float32)
    np.testing.assert_array_equal(hint("denoising", tile, partner), partner)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_low_resolution_partner_is_enlarged_to_the_tile(tile, scale):
    partner = np.random.default_rng(2).uniform(-1, 1, (96 // scale, 96 // scale)).astype(np.float32)
    expected = cv2.resize((partner + 1) / 2, (96, 96), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(hint("super_resolution", tile, partner), 2 * np.clip(expected, 0, 1) - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("denoising", (48, 48), "noisy partner of 48x48 px belongs to a tile of 96x96"),
        ("super_resolution", (40, 40), "40x40 px does not divide its tile of 96x96"),
        ("super_resolution", (24, 32), "24x32 px does not divide"),
        ("super_resolution", (192, 192), "192x192 px does not divide"),
    ],
)
def test_a_partner_of_the_wrong_size_is_refused(tile, name, shape, said):
    with pytest.raises(UserError, match=said):
        hint(name, tile, np.zeros(shape, np.float32))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_simulated_low_resolution_lies_on_the_tile_and_lacks_its_detail(tile, scale):
    made = hint("super_resolution", tile, settings=HintSettings(super_resolution_scale=scale))
    blurred = ndimage.gaussian_filter(tile, 0.5 * scale)
    assert np.corrcoef(made.ravel(), blurred.ravel())[0, 1] > 0.9
    # half a low-resolution pixel of misregistration at most: the best match is no further away
    shifts = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]
    match = {shift: np.corrcoef(np.roll(made, shift, (0, 1)).ravel(), blurred.ravel())[0, 1] for shift in shifts}
    assert max(map(abs, max(match, key=match.get))) <= 1


def test_noise_of_simulated_denoising_follows_its_variance_law():
    # flat fields: variance a * u + b (Foi et al. 2008), with the two numbers that the generator drew
    levels, checked = np.array([0.25, 0.4, 0.55]), 0
    for seed in range(8):
        draws = np.random.default_rng(seed)
        a = np.exp(draws.uniform(np.log(0.002), np.log(0.08)))
        b = draws.uniform(0, 0.01)
        if a > 0.02:
            continue  # a wide noise is cut off at 0
        checked += 1
        fields = np.repeat(2 * levels - 1, 4000).reshape(1, -1).astype(np.float32)
        made = HINTS["denoising"](fields, None, np.random.default_rng(seed), SETTINGS)
        residual = ((made - fields) / 2).reshape(3, 4000)
        np.testing.assert_allclose(residual.mean(axis=1), 0, atol=0.01)
        np.testing.assert_allclose(residual.var(axis=1), a * levels + b, rtol=0.12)
    assert checked >= 3


def test_strength_of_simulated_noise_differs_between_samples(tile):
    strengths = [np.std(hint("denoising", tile, sample_id=f"set/{n}") - tile) for n in range(60)]
    assert max(strengths) > 2 * min(strengths)


def test_relief_rises_with_brightness(tile):
    unit = (tile + 1) / 2
    relief = hint("depth", tile)
    smooth = optics.blur(unit, 96 / 40)
    order = smooth.ravel().argsort()
    assert (np.diff(relief.ravel()[order]) >= -1e-6).all()
    # log1p(20 u) / log 21 from 0 to 1
    np.testing.assert_allclose(relief, 2 * np.log1p(20 * smooth) / np.log(21) - 1, atol=1e-5)
