import cv2
import numpy as np
import pytest
from PIL import Image

from ray_pipeline.monitoring.tile_grid import Window, sample_grid


def shown_color(picture, color):
    """Number of pixels of exactly this colour."""
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


def random_tiles(count, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size))


def expected_gray(tile):
    """-1 is black, 1 is white, to the nearest of 256 grays."""
    return np.floor((tile + 1) / 2 * 255 + 0.5).astype(np.uint8)


def find(picture, block):
    """(y, x) of the only place where the gray `block` stands in `picture`, pixel for pixel."""
    distance = cv2.matchTemplate(picture[..., 0], block, cv2.TM_SQDIFF)
    y, x = np.unravel_index(distance.argmin(), distance.shape)
    height, width = block.shape
    assert (picture[y : y + height, x : x + width] == block[..., None]).all()
    return int(y), int(x)


def test_one_column_is_a_square_grid_of_exact_pixels(tmp_path):
    tiles = random_tiles(5, 130)
    canvas = sample_grid([("18 steps", tiles)], tmp_path / "grid.png", title="phase1, epoch 5")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert canvas.dtype == np.uint8
    assert canvas.shape[2] == 3
    assert (picture == canvas).all()
    places = [find(picture, expected_gray(tile)) for tile in tiles]
    rows, columns = sorted({y for y, _ in places}), sorted({x for _, x in places})
    assert (len(rows), len(columns)) == (2, 3)
    assert places == [(rows[n // 3], columns[n % 3]) for n in range(5)]


def test_small_tiles_are_magnified_by_a_whole_factor(tmp_path):
    tiles = random_tiles(4, 32)
    canvas = sample_grid([("", tiles)], tmp_path / "grid.png", title="t")
    for tile in tiles:
        find(canvas, np.kron(expected_gray(tile), np.ones((4, 4), np.uint8)))


def test_hint_sample_and_target_of_a_tile_share_a_row(tmp_path):
    names = ["super_resolution", "sample", "target"]
    columns = [(name, random_tiles(2, 128, seed)) for seed, name in enumerate(names)]
    captions = {(0, 1): "24.1 dB", (1, 1): "a caption that is much wider than the tile it stands under"}
    plain = sample_grid(columns, tmp_path / "plain.png", title="phase2")
    captioned = sample_grid(columns, tmp_path / "captioned.png", captions=captions, title="phase2")
    for canvas in (plain, captioned):
        places = np.array([[find(canvas, expected_gray(tile)) for tile in tiles] for _, tiles in columns])
        assert (places[:, :, 0] == places[0, :, 0]).all()
        assert (places[:, :, 1] == places[:, :1, 1]).all()
        assert (np.diff(places[:, 0, 1]) > 128).all()
        assert (np.diff(places[0, :, 0]) > 128).all()
    paper = captioned[0, 0]
    # Nothing is cut off at the rim, and the captions are there.
    for rim in (captioned[0], captioned[-1], captioned[:, 0], captioned[:, -1]):
        assert (rim == paper).all()
    (y, x) = find(captioned, expected_gray(columns[1][1][0]))
    assert (captioned[y + 128 : y + 150, x : x + 128] != paper).any()
    (y, x) = find(captioned, expected_gray(columns[0][1][0]))
    assert (captioned[y + 128 : y + 150, x : x + 128] == paper).all()


def test_values_out_of_range_are_clipped_and_non_finite_ones_red(tmp_path):
    tile = np.zeros((1, 128, 128))
    tile[0, :64] = 3.0
    tile[0, 64:96] = -3.0
    tile[0, 96:] = np.nan
    canvas = sample_grid([("", tile)], tmp_path / "grid.png", title="t")
    assert shown_color(canvas, (255, 255, 255)) == 64 * 128
    assert shown_color(canvas, (0, 0, 0)) == 32 * 128
    assert shown_color(canvas, (255, 0, 0)) == 32 * 128


@pytest.mark.parametrize("shape", [(3, 16, 17), (2, 16, 16), (16, 16), (0, 16, 16)])
def test_columns_that_do_not_fit_together_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="one shape"):
        sample_grid([("a", np.zeros((3, 16, 16))), ("b", np.zeros(shape))], tmp_path / "grid.png", title="t")


def test_one_window_of_the_targets_shows_them_and_their_partners_alike(tmp_path):
    targets = random_tiles(2, 128) * 0.1 - 0.8
    low, high = np.percentile(targets, (0.1, 99.8))
    window = Window.of(targets)
    canvas = sample_grid([("target", window.shown(targets))], tmp_path / "grid.png", title="t")
    for tile in targets:
        find(canvas, expected_gray(np.clip((tile - low) / (high - low), 0, 1) * 2 - 1))
    noisy = targets + 0.01
    for name in ("tile", "denoising", "super_resolution"):
        np.testing.assert_allclose(window.of_hint(name, noisy), 2 * (noisy - low) / (high - low) - 1)
    np.testing.assert_array_equal(window.of_hint("depth", noisy), noisy)


def test_a_window_of_empty_targets_is_one_that_can_be_shown():
    shown = Window.of(np.full((2, 8, 8), -1.0)).shown(np.full((1, 8, 8), -1.0))
    np.testing.assert_array_equal(shown, -np.ones((1, 8, 8)))


def test_rows_cut_into_groups_stand_beside_each_other_with_their_partners(tmp_path):
    """Five pairs in two groups: three rows, the fourth pair begins at the top again."""
    columns = [(name, random_tiles(5, 128, seed)) for seed, name in enumerate("ab")]
    canvas = sample_grid(columns, tmp_path / "grid.png", title="t", groups=2)
    first, second = ([find(canvas, expected_gray(tile)) for tile in tiles] for _, tiles in columns)
    assert [y for y, _ in first] == [y for y, _ in second]
    rows, across = sorted({y for y, _ in first}), sorted({x for _, x in first + second})
    assert [rows.index(y) for y, _ in first] == [0, 1, 2, 0, 1]
    assert [across.index(x) for _, x in first] == [0, 0, 0, 2, 2]
    assert [across.index(x) for _, x in second] == [1, 1, 1, 3, 3]
