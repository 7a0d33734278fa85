"""Hints are functions of the tile or its partner, aligned with it, and turn with it; what is drawn is keyed by tile."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy import ndimage

from ray_pipeline.data import hints, optics
from ray_pipeline.data.hint_registry import make_hint, resolve_hints
from ray_pipeline.data.hints import HINTS, Tile, choose_partner, dihedral, hint_generator
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

every_hint = pytest.mark.parametrize("name", list(HINTS))
FIXED_NOISE = {"a": (0.02, 0.02), "b": (0.001, 0.001), "bits": (12,)}


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    """Bright discs and a line on a dark ground, slightly blurred, in [-1, 1]."""
    canvas = np.full((96, 96), 0.08, np.float32)
    for x, y, radius, grey in ((20, 30, 9, 0.9), (60, 25, 14, 0.5), (45, 70, 11, 0.7)):
        cv2.circle(canvas, (x, y), radius, grey, -1)
    cv2.line(canvas, (70, 60), (90, 88), 0.8, 2)
    return (2 * cv2.GaussianBlur(canvas, (0, 0), 1.0) - 1).astype(np.float32)


def hint(name, tile, partner=None, sample_id="set/a", variant=0, psf_fwhm_px=0.0, **parameters) -> np.ndarray:
    settings = resolve_hints({name: parameters}, [name])
    return make_hint(name, tile, partner, sample_id, variant, settings, psf_fwhm_px)


def seeded(tile, seed=0, **fields) -> Tile:
    return replace(Tile(tile, None, np.random.Generator(np.random.Philox(seed))), **fields)


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


def test_what_a_hint_draws_is_keyed_by_hint_tile_and_variant():
    keys = [(name, tile, variant) for name in ("denoising", "canny") for tile in ("a", "b") for variant in range(3)]
    drawn = [hint_generator(*key).random(4).tobytes() for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [hint_generator(*key).random(4).tobytes() for key in keys]


@pytest.mark.parametrize(("sigma", "percentile"), [(1.4, 90.0), (3.0, 75.0)])
def test_canny_is_the_one_of_opencv_on_the_smoothed_tile(tile, sigma, percentile):
    unit, side = (tile + 1) / 2, 2 * int(np.ceil(4 * sigma)) + 1
    smooth = cv2.GaussianBlur(unit, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    smooth = np.rint(255 * smooth).astype(np.uint8)
    gradient = np.hypot(
        ndimage.sobel(smooth.astype(float), 0, mode="mirror"), ndimage.sobel(smooth.astype(float), 1, mode="mirror")
    )
    high = max(30.0, np.percentile(gradient, percentile))
    expected = cv2.Canny(smooth, 0.5 * high, high, L2gradient=True)
    made = hint("canny", tile, sigma=sigma, percentile=percentile, floor=30.0, low_ratio=0.5)
    np.testing.assert_array_equal(made, np.where(expected > 0, 1, -1))
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


@pytest.mark.parametrize("name", ["denoising", "depth"])
def test_a_partner_of_the_tile_s_size_is_taken_as_it_is(tile, name):
    partner = np.random.default_rng(2).uniform(-1, 1, tile.shape).astype(np.float32)
    np.testing.assert_array_equal(hint(name, tile, partner), partner)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_low_resolution_partner_is_enlarged_to_the_tile(tile, scale):
    partner = np.random.default_rng(2).uniform(-1, 1, (96 // scale, 96 // scale)).astype(np.float32)
    expected = cv2.resize((partner + 1) / 2, (96, 96), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(hint("super_resolution", tile, partner), 2 * np.clip(expected, 0, 1) - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("denoising", (48, 48), "noisy partner of 48x48 px belongs to a tile of 96x96"),
        ("depth", (48, 96), "depth map of 48x96 px belongs to a tile of 96x96"),
        ("super_resolution", (40, 40), "40x40 px does not divide its tile of 96x96"),
        ("super_resolution", (24, 32), "24x32 px does not divide"),
        ("super_resolution", (192, 192), "192x192 px does not divide"),
        ("super_resolution", (0, 0), "0x0 px does not divide"),
    ],
)
def test_a_partner_of_the_wrong_size_is_refused(tile, name, shape, said):
    with pytest.raises(UserError, match=said):
        hint(name, tile, np.zeros(shape, np.float32))


@pytest.mark.parametrize(("name", "side"), [("denoising", 16), ("super_resolution", 4)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_simulated_share_is_the_share_of_tiles_with_a_partner_that_are_simulated(name, side, share):
    tile = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
    partner = np.full((side, side), 0.125, np.float32)
    settings = resolve_hints({name: {"simulated_share": share}}, [name])
    made = [make_hint(name, tile, partner, f"set/{n}", n % 8, settings) for n in range(600)]
    given = np.mean([np.ptp(image) < 1e-6 for image in made])
    assert 1 - given == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 600))


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_variants_take_other_partners_while_there_are_enough(count):
    chosen = {tile: [choose_partner("denoising", tile, v, count) for v in range(8)] for tile in ("set/a", "set/b")}
    for partners in chosen.values():
        assert set(partners) <= set(range(count))
        assert len(set(partners)) == min(8, count)
        assert partners[count:] == partners[: 8 - count] or count >= 8
    assert chosen["set/a"] == [choose_partner("denoising", "set/a", v, count) for v in range(8)]
    orders = [tuple(choose_partner("denoising", f"set/{n}", v, count) for v in range(8)) for n in range(20)]
    assert (len(set(orders)) > 1) == (count > 1)  # a tile's own


def test_every_partner_is_taken_about_as_often():
    first = [choose_partner("denoising", f"set/{n}", 0, 4) for n in range(2000)]
    np.testing.assert_allclose(np.bincount(first), 500, atol=100)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_simulated_low_resolution_lies_on_the_tile_and_lacks_its_detail(tile, scale):
    made = hint("super_resolution", tile, scales=[scale])
    blurred = ndimage.gaussian_filter(tile, 0.5 * scale)
    assert np.corrcoef(made.ravel(), blurred.ravel())[0, 1] > 0.9
    # half a pixel of misregistration at most: the best match is no further away
    shifts = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]
    match = {shift: np.corrcoef(np.roll(made, shift, (0, 1)).ravel(), blurred.ravel())[0, 1] for shift in shifts}
    assert max(map(abs, max(match, key=match.get))) <= 1


@pytest.mark.parametrize("known_psf", [0.0, 2.0, 100.0])
def test_low_resolution_is_blur_points_noise_and_levels_of_what_was_drawn(tile, known_psf):
    """The tile's own PSF adds to the blur in quadrature; one that is wider than the coarse microscope's leaves none."""
    settings = {"scales": (4,), "psf_fwhm": (1.1, 1.1), "shift": 0.0, **FIXED_NOISE}
    made = hints.super_resolution(seeded(tile, 3, psf_fwhm_px=known_psf), **settings)
    sigma = np.sqrt(max((4 * 1.1) ** 2 - known_psf**2, 0)) / 2.3548
    seen = ndimage.gaussian_filter((tile + 1) / 2, sigma, mode="mirror") if sigma else (tile + 1) / 2
    centres = np.arange(24) * 4 + 1.5
    points = ndimage.map_coordinates(seen, np.meshgrid(centres, centres, indexing="ij"), order=3, mode="mirror")
    expected = 2 * cv2.resize(points, (96, 96), interpolation=cv2.INTER_CUBIC) - 1
    error = (made - expected)[8:-8, 8:-8]
    noise = 2 * np.sqrt(0.02 * points.mean() + 0.001)
    assert abs(error.mean()) < 0.02
    assert 0.5 * noise < error.std() < 1.2 * noise  # interpolation averages some of it away
    clean = settings | {"a": (0.0, 0.0), "b": (0.0, 0.0), "bits": (16,)}
    made = hints.super_resolution(seeded(tile, 3, psf_fwhm_px=known_psf), **clean)
    np.testing.assert_allclose(made[8:-8, 8:-8], expected[8:-8, 8:-8], atol=0.03 if sigma else 0.2)


def test_low_resolution_is_moved_by_at_most_the_misregistration(tile):
    smooth = ndimage.gaussian_filter(tile, 6)
    settings = {"scales": (2,), "psf_fwhm": (0.0, 0.0), "a": (0.0, 0.0), "b": (0.0, 0.0), "bits": (16,)}
    gradient = np.stack(np.gradient(smooth)).reshape(2, -1)
    moved = []
    for seed in range(40):
        made = hints.super_resolution(seeded(smooth, seed), shift=1.0, **settings)
        moved.append(np.linalg.lstsq(gradient.T, (made - smooth).ravel(), rcond=None)[0])
    moved = np.abs(moved)
    assert moved.max() < 1.1
    assert moved.mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("averages", [1, 4])
def test_noise_of_simulated_denoising_follows_its_variance_law(averages):
    # flat fields: variance (a x + b) / N (Foi et al. 2008)
    levels, settings = np.array([0.25, 0.4, 0.55]), {"a": (0.01, 0.01), "b": (0.002, 0.002), "bits": (16,)}
    fields = np.repeat(2 * levels - 1, 20000).reshape(3, -1).astype(np.float32)
    residual = (hints.denoising(seeded(fields), averages=(averages,), **settings) - fields) / 2
    np.testing.assert_allclose(residual.mean(axis=1), 0, atol=0.003)
    np.testing.assert_allclose(residual.var(axis=1), (0.01 * levels + 0.002) / averages, rtol=0.05)


def test_gain_is_drawn_log_uniformly_and_the_rest_from_its_ranges(monkeypatch):
    drawn = []
    monkeypatch.setattr(optics, "degrade", lambda unit, how, rng: drawn.append(how) or unit)
    tile, settings = np.zeros((8, 8), np.float32), {"averages": (1, 2, 16), "bits": (8, 12)}
    for seed in range(1500):
        hints.denoising(seeded(tile, seed), **settings)
    a, b = (np.array([getattr(how, name) for how in drawn]) for name in "ab")
    assert optics.GAIN_RANGE[0] <= a.min() < a.max() <= optics.GAIN_RANGE[1]
    quarters = np.geomspace(*optics.GAIN_RANGE, 5)
    np.testing.assert_allclose(np.histogram(a, quarters)[0], 375, atol=75)
    np.testing.assert_allclose(np.histogram(b, np.linspace(*optics.READ_NOISE_RANGE, 5))[0], 375, atol=75)
    assert {how.averages for how in drawn} == {1, 2, 16}
    assert {how.bits for how in drawn} == {8, 12}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_simulated_hint_has_the_levels_of_its_detector(tile, bits):
    made = hint("denoising", tile, bits=[bits])
    levels = (made + 1) / 2 * (2**bits - 1)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)


def test_relief_rises_with_brightness(tile):
    unit = (tile + 1) / 2
    relief = hint("depth", tile)
    smooth = optics.blur(unit, 96 / 40)
    order = smooth.ravel().argsort()
    assert (np.diff(relief.ravel()[order]) >= -1e-6).all()
    # log1p(20 u) / log 21 from 0 to 1
    np.testing.assert_allclose(relief, 2 * np.log1p(20 * smooth) / np.log(21) - 1, atol=1e-5)
    np.testing.assert_allclose(relief, hints.pseudo_depth(unit), atol=1e-6)
