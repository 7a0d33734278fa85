"""Which images a request gives: each column once, each file once, the right partner in every variant."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data import tile_reader
from ray_pipeline.data.hint_registry import make_hint
from ray_pipeline.data.hints import choose_partner, dihedral
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.data.tiles import read_tile, write_tile


@pytest.fixture
def job(job_for, copy_of_data):
    return job_for(copy_of_data)


@pytest.fixture
def row(job):
    return list_tiles(job).rows["train"][0]


def images(job, row, variants, columns) -> dict[tuple[int, int], np.ndarray]:
    found = TileReader(job).images(Request(row, variants, columns))
    assert len(dict(found)) == len(found)
    return dict(found)


def test_images_come_by_variant_and_column_and_equal_columns_once(job, row):
    columns = ("latent", "std", "hint.denoising", "hint.canny", "hint.canny", "simulated.denoising")
    found = images(job, row, (3, 0), columns)
    assert list(found) == [(place, column) for place in (0, 1) for column in (0, 2, 3, 5)]
    tile, partner = (read_tile(Path(job.root, path)) for path in (row.path, row.partners["denoising"][0]))
    for place, variant in enumerate((3, 0)):
        turned = dihedral(tile, variant)
        np.testing.assert_array_equal(found[place, 0], turned)
        np.testing.assert_array_equal(found[place, 2], dihedral(partner, variant))
        rest = (row.id, variant, job.hint_settings, row.psf_fwhm_px)
        np.testing.assert_array_equal(found[place, 3], make_hint("canny", turned, None, *rest))
        np.testing.assert_array_equal(found[place, 5], make_hint("denoising", turned, None, *rest))


def test_each_file_is_read_once(job, row, monkeypatch):
    read = []
    monkeypatch.setattr(tile_reader, "read_tile", lambda path: read.append(path) or read_tile(path))
    images(job, row, range(8), ("latent", "hint.denoising", "hint.super_resolution", "hint.canny"))
    paths = [row.path, row.partners["denoising"][0], row.partners["super_resolution"][0]]
    assert sorted(map(str, read)) == sorted(str(Path(job.root, path)) for path in paths)


def test_variants_of_a_tile_with_several_partners_take_different_ones(job, row):
    paths = []
    for number in range(8):
        paths.append(f"degraded/simulated/images/capture{number}.png")
        level = np.full((64, 64), 0.1 * (number + 1))
        level[0, 0] = 0
        write_tile(Path(job.root, paths[-1]), level)
    row = replace(row, partners={"denoising": tuple(paths)})
    found = images(job, row, range(8), ("latent", "hint.denoising"))
    levels = [float(np.median(found[variant, 1])) for variant in range(8)]
    taken = [choose_partner("denoising", row.id, variant, 8) for variant in range(8)]
    np.testing.assert_allclose(levels, [0.2 * (number + 1) - 1 for number in taken], atol=1e-4)
    assert len(set(taken)) == 8
    alone = images(job, row, (5,), ("latent", "hint.denoising"))
    np.testing.assert_array_equal(alone[0, 1], found[5, 1])


def test_a_depth_map_on_disk_goes_before_the_pseudo_depth(job, row):
    path = "degraded/simulated/images/depth.png"
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    write_tile(Path(job.root, path), ramp)
    given = images(job, replace(row, partners={"depth": (path,)}), (0, 6), ("latent", "hint.depth"))
    for place, variant in enumerate((0, 6)):
        np.testing.assert_allclose(given[place, 1], dihedral((2 * ramp - 1).astype(np.float32), variant), atol=1e-4)
    assert np.abs(images(job, row, (0,), ("latent", "hint.depth"))[0, 1] - given[0, 1]).max() > 0.1


def test_the_tile_s_own_psf_narrows_the_simulated_blur(job, row):
    """The wider the tile's own microscope sees a point, the less has to be added."""
    settings = {name: dict(values) for name, values in job.hint_settings.items()}
    settings["super_resolution"] |= {"a": [0.0, 0.0], "b": [0.0, 0.0], "shift": 0.0, "bits": [16]}
    job = replace(job, hint_settings=settings)
    sharpness = []
    for width in (0.0, 3.0, 100.0):
        found = images(job, replace(row, psf_fwhm_px=width), (0,), ("latent", "simulated.super_resolution"))
        sharpness.append(np.abs(np.diff(found[0, 1])).mean())
    assert sharpness[0] < sharpness[1] < sharpness[2]
