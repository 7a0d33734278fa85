"""What is encoded is what the config asks for, and a stored row takes as many bytes as the job says."""

from pathlib import Path

import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.data.encode_job import SAMPLE_ROWS, EncodeJob, encode_job
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.errors import UserError
from ray_pipeline.sections import CONDITION_TYPES


def config_for(**data) -> dict:
    return {
        "data": {"root": "some/data", "tile_size": 64} | data,
        "model": {"architecture": "DiT-S/8", "latent_size": 8},
        "phases": [
            {"name": "one", "epochs": 1},
            {"name": "two", "epochs": 1, "condition_types": ["canny", "denoising"]},
            {
                "name": "three",
                "epochs": 1,
                "condition_types": ["denoising"],
                "datasets": [{"name": "a", "degradations": "real"}, {"name": "a", "degradations": "simulated"}],
            },
        ],
    }


def test_the_job_is_what_the_config_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vae").mkdir()
    hints = {"denoising": {"b": [0, 0.001]}, "super_resolution": {"scales": [2]}}
    config = config_for(augment_variants=3, shard_rows=9, hints=hints, max_rejected=5)
    config["vae"] = {"pretrained": "vae", "precision": "bf16", "batch_size": 6, "posterior": "sample"}
    assert encode_job(parse_config(config)) == EncodeJob(
        root=f"{tmp_path}/some/data",
        store=f"{tmp_path}/some/data/latents",
        tile_size=64,
        hints=("denoising", "canny"),
        simulated=("denoising",),
        hint_settings={
            "denoising": {
                "simulated_share": 0.0, "a": [0.002, 0.08], "b": [0.0, 0.001], "averages": [1], "bits": [8, 12, 16],
            },
            "canny": {"sigma": 1.4, "percentile": 90.0, "floor": 20.0, "low_ratio": 0.4},
        },
        variants=3,
        shard_rows=9,
        sample_rows=None,
        autoencoder=f"{tmp_path}/vae",
        precision="bf16",
        posterior="sample",
        latent_channels=4,
        batch_size=6,
        max_rejected=5,
    )  # fmt: skip


@pytest.mark.parametrize("hints", [{"denoizing": {}}, {"canny": {"sigmas": 1}}, {"depth": {"model": 3}}])
def test_hints_that_cannot_be_meant_are_refused_before_anything_is_listed(hints):
    with pytest.raises(UserError, match=r"data\.hints\."):
        encode_job(parse_config(config_for(hints=hints)))


def test_a_job_that_streams_tiles_stores_a_sample_beside_where_all_would_lie(tmp_path):
    root = tmp_path / "data"
    job = encode_job(parse_config(config_for(mode="tiles", root=str(root))))
    assert (job.store, job.sample_rows) == (f"{root}/latents_sample", SAMPLE_ROWS)
    for chosen in (str(tmp_path / "elsewhere"), "s3://bucket/latents?region=eu-west-1"):
        job = encode_job(parse_config(config_for(mode="tiles", root=str(root), latents=chosen)))
        assert job.store == chosen


def test_a_row_takes_the_bytes_of_its_columns_in_every_variant(encoded):
    assert encoded.columns == ("latent", *(f"hint.{name}" for name in CONDITION_TYPES), "simulated.denoising")
    assert encoded.shape == (4, 8, 8)
    store = LatentStore.open(encoded.store)
    shards = store.folder.sizes()
    assert store.columns == encoded.columns
    rows = len(list_tiles(encoded).rows["train"])
    # beside the rows a header that numpy pads to 64 bytes
    assert sum(shards[f"shard-{k:05d}.npy"] for k in range(4)) == rows * encoded.row_bytes + 4 * 128
