"""Specimens and what they are drawn with, against what their names promise."""

import numpy as np
import pytest

from ray_pipeline.data.sources.specimen import PAINTERS
from ray_pipeline.data.sources.specimen_geometry import (
    add_patch,
    draw_bodies,
    draw_cells,
    label_at,
    persistent_walks,
    smooth_noise,
    splat,
)


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("stain", PAINTERS)
def test_every_stain_is_light_that_repeats_with_its_generator(stain):
    painted = np.stack(PAINTERS[stain](philox(1), 96, 0.16))
    assert painted.shape == (2, 96, 96)
    assert np.isfinite(painted).all()
    assert painted[0].max() > 0
    assert painted.min() >= -0.01 * painted.max()  # cubic interpolation overshoots a little
    np.testing.assert_array_equal(painted, np.stack(PAINTERS[stain](philox(1), 96, 0.16)))
    assert not np.array_equal(painted, np.stack(PAINTERS[stain](philox(2), 96, 0.16)))


@pytest.mark.parametrize("seed", range(4))
def test_a_field_is_never_without_cells(seed):
    cells = draw_cells(philox(seed), 64, 300.0)
    nearest = np.abs(cells.centres[cells.present] - 32).max(axis=1).min()
    assert nearest < 300


def test_a_nucleus_lies_in_a_cell_body():
    cells = draw_cells(philox(3), 128, 60.0)
    bodies = draw_bodies(philox(4), cells, 128, 0.3)
    assert set(np.unique(bodies.labels)) <= {0, *(np.flatnonzero(cells.present) + 1)}
    assert bodies.outlines.keys() == set(np.flatnonzero(cells.present))
    assert (bodies.labels > 0)[bodies.nucleus > 0.9].mean() > 0.99


def test_points_keep_their_light_and_their_place_between_pixels():
    xy, light = philox(5).uniform(2, 29, (40, 2)), philox(6).gamma(2, 1, 40)
    image = splat(xy, light, 32)
    y, x = np.mgrid[:32, :32]
    assert image.sum() == pytest.approx(light.sum(), rel=1e-5)
    centroid = np.array([(image * x).sum(), (image * y).sum()]) / image.sum()
    np.testing.assert_allclose(centroid, light @ xy / light.sum(), atol=1e-3)
    assert not splat(np.array([[-0.5, 4.0], [31.5, 4.0], [4.0, 40.0]]), np.ones(3), 32).any()


def test_a_patch_at_the_border_is_cut_there():
    image = np.zeros((16, 16), np.float32)
    add_patch(image, np.ones((5, 5), np.float32), np.array([15.0, 8.0]))
    assert image.sum() == 3 * 5
    assert image[6:11, 13:].all()
    add_patch(image, np.ones((5, 5), np.float32), np.array([40.0, -40.0]))
    assert image.sum() == 3 * 5


@pytest.mark.parametrize("sigma_px", [1.5, 6.0])
def test_smooth_noise_has_unit_variance_and_the_correlation_of_a_gaussian_filter(sigma_px):
    fields = np.stack([smooth_noise(philox(seed), 256, sigma_px) for seed in range(4)])
    assert fields.var() == pytest.approx(1.0, rel=0.1)
    lag = round(2 * sigma_px)
    found = (fields[:, lag:] * fields[:, :-lag]).mean() / fields.var()
    assert found == pytest.approx(np.exp(-(lag**2) / (4 * sigma_px**2)), abs=0.06)


def test_a_walk_forgets_its_heading_over_the_persistence_length():
    walks = persistent_walks(philox(7), np.zeros((4000, 2)), np.zeros(4000), 40, 1.0, 20.0)
    steps = np.diff(walks, axis=1)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=-1), 1.0, atol=1e-4)
    for s in (5, 20):  # worm-like chain: <cos> = exp(-s / P)
        assert (steps[:, 0] * steps[:, s]).sum(-1).mean() == pytest.approx(np.exp(-s / 20), abs=0.03)


def test_no_label_stands_outside_the_image():
    labels = np.arange(1, 17).reshape(4, 4)
    np.testing.assert_array_equal(label_at(labels, np.array([[2.2, 0.8], [-1.0, 0.0], [3.0, 4.0]])), [7, 0, 0])
