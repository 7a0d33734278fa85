"""The preview shows the images that would be encoded, and draws them into a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_pipeline import encoding
from ray_pipeline.config import parse_config
from ray_pipeline.data.hint_preview import preview, with_hints
from ray_pipeline.data.hint_registry import known_hints, make_hint, resolve_hints
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.errors import UserError
from ray_pipeline.sections import CONDITION_TYPES


@pytest.fixture
def config(tiny_data, tiny_autoencoder):
    return parse_config(
        {
            "data": {"root": str(tiny_data), "tile_size": 64, "hints": {"canny": {"sigma": 2}}},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "vae": {"pretrained": str(tiny_autoencoder)},
            "phases": [{"name": "one", "epochs": 1}],
        }
    )


def test_rows_are_tiles_of_both_splits_with_the_hints_that_would_be_encoded(job_for, tiny_data):
    job = job_for(tiny_data, "canny", "denoising")
    heads, rows = preview(job, 5)
    assert heads == ["tile", "denoising", "canny"]
    listed = [row for split in ("train", "val") for row in list_tiles(job).rows[split]]
    chosen = [listed[k] for k in np.linspace(0, 31, 5).round().astype(int)]
    for row, shown in zip(chosen, rows, strict=True):
        tile, partner = (read_tile(tiny_data / path) for path in (row.path, row.partners["denoising"][0]))
        np.testing.assert_array_equal(shown[0], tile)
        np.testing.assert_array_equal(shown[1], partner)
        np.testing.assert_array_equal(shown[2], make_hint("canny", tile, None, row.id, 0, job.hint_settings))
    assert len(preview(job, 100)[1]) == 32


def test_any_hint_may_be_asked_for_with_the_parameters_of_the_yaml(job_for, tiny_data):
    job = job_for(tiny_data, "canny", simulated=("denoising",))
    asked = with_hints(job, ("depth", "canny"), {"canny": {"sigma": 2}})
    assert (asked.hints, asked.simulated) == (("depth", "canny"), ())
    assert asked.hint_settings["canny"]["sigma"] == 2
    assert with_hints(job, (), {}).hints == CONDITION_TYPES
    with pytest.raises(UserError, match=r"unknown hint 'canyn', expected some of super_res.*nearest is 'canny'"):
        with_hints(job, ("canyn",), {})


@pytest.mark.parametrize("names", [(), ("canny", "super_resolution")])
def test_the_picture_has_a_row_a_tile_and_a_column_a_hint(config, tmp_path, names):
    path = tmp_path / "hints.png"
    encoding.preview_hints(config, names, 3, path)
    picture = np.asarray(Image.open(path).convert("L"))
    columns = 1 + (len(names) or len(CONDITION_TYPES))
    assert picture.shape[0] > 3 * 128  # 64 px, magnified
    assert picture.shape[1] > columns * 128
    assert picture.std() > 20


def test_settings_of_every_hint_are_told_with_those_of_the_yaml(config):
    settings = resolve_hints(config.data.hints, known_hints())
    assert tuple(settings) == CONDITION_TYPES
    assert settings["canny"]["sigma"] == 2


def test_no_tiles_or_a_bad_one_are_told(config, job_for, copy_of_data, tmp_path):
    with pytest.raises(UserError, match="--tiles 0: expected at least 1"):
        encoding.preview_hints(config, (), 0, tmp_path / "hints.png")
    job = job_for(copy_of_data, "canny")
    path = Path(list_tiles(job).rows["train"][0].path)
    (copy_of_data / path).write_text("none")
    with pytest.raises(UserError, match=rf"a tile cannot be used \({path}: expected a PNG image.*; repair it"):
        preview(job, 2)
