"""Encoding on a real Ray: what is stored is what the autoencoder gives, whatever interrupted it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderTiny

from ray_pipeline.data.encode import (
    EncodeJob,
    Listing,
    ShardEncoder,
    check_store,
    encode,
    fingerprint,
    list_tiles,
    verify,
)
from ray_pipeline.data.hints import HINTS, PAIRED, HintSettings, dihedral, make_hint
from ray_pipeline.data.images import read_tile, write_tile
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.manifest import load_manifest, load_pairs, write_manifests
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder

VARIANTS = 2
TRAIN, VAL = 24, 8  # tiles of tiny_data


def job_for(data: Path, autoencoder: Path, store: Path, **changes) -> EncodeJob:
    job = EncodeJob(
        root=str(data),
        store=str(store),
        tile_size=64,
        hints=tuple(HINTS),
        hint_settings=HintSettings(),
        variants=VARIANTS,
        shard_rows=7,
        autoencoder=str(autoencoder),
        precision="fp32",
        latent_channels=4,
        batch_size=4,
    )
    return replace(job, **changes)


def run(job: EncodeJob, progress=lambda tiles: None) -> Listing:
    listing = list_tiles(job)
    expected = fingerprint(job, listing, load_autoencoder(job.autoencoder))
    encode(job, listing, expected, actors=1, gpus_per_actor=0, progress=progress)
    return listing


def fingerprint_of(job: EncodeJob) -> str:
    return fingerprint(job, list_tiles(job), load_autoencoder(job.autoencoder))


@pytest.fixture(scope="module")
def encoded(ray_cluster, tiny_data, tiny_autoencoder, tmp_path_factory) -> EncodeJob:
    """A finished store of tiny_data with every hint, as the job that made it."""
    job = job_for(tiny_data, tiny_autoencoder, tmp_path_factory.mktemp("encoded") / "latents")
    counted = []
    run(job, counted.append)
    assert sum(counted) == TRAIN + VAL
    return job


@pytest.fixture
def copy_of_data(tiny_data, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("latents")))


def files(store: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("variant", range(VARIANTS))
def test_the_store_holds_the_autoencoder_s_latents_of_tiles_and_hints(encoded, tiny_data, split, variant):
    manifest = load_manifest(tiny_data / "foundation/simulated", split)
    pairs = load_pairs(tiny_data, "simulated").set_index(["pair_id", "task"])["image"]
    network = AutoencoderTiny.from_pretrained(encoded.autoencoder)
    stored = LatentStore.open(Path(encoded.store, split))
    assert len(stored) == len(manifest) == {"train": TRAIN, "val": VAL}[split]
    gathered = stored.gather(range(len(manifest)), [variant] * len(manifest))
    assert set(gathered) == {"latent", *(f"hint.{name}" for name in HINTS)}
    for row, identifier in enumerate(manifest.table["id"]):
        tile = dihedral(read_tile(manifest.path(row)), variant)
        images = {"latent": tile}
        for name in HINTS:
            partner = None
            if name in PAIRED:
                partner = dihedral(read_tile(tiny_data / "degraded/simulated" / pairs[identifier, name]), variant)
            images[f"hint.{name}"] = make_hint(
                name, tile, partner, f"simulated/{identifier}", variant, encoded.hint_settings
            )
        with torch.no_grad():
            expected = network.encode(torch.from_numpy(np.stack(list(images.values())))[:, None]).latents.numpy()
        for name, latent in zip(images, expected, strict=True):
            # half a unit in the last place of fp16, and what the order of sums changes
            np.testing.assert_allclose(gathered[name][row], latent, rtol=2**-11, atol=2e-6, err_msg=name)


def test_statistics_are_those_of_all_variants_of_the_training_tiles(encoded):
    store = LatentStore.open(encoded.store)
    latents = np.concatenate([store.gather(range(TRAIN), [k] * TRAIN)["latent"] for k in range(VARIANTS)])
    values = latents.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1)
    stats = json.loads(Path(encoded.store, "stats.json").read_text())
    np.testing.assert_allclose(stats["mean"], values.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(stats["std"], values.std(axis=1), rtol=1e-9)
    assert stats["count"] == TRAIN


def test_a_finished_store_is_recognised_and_whole(encoded):
    assert check_store(encoded, fingerprint_of(encoded))
    assert verify(encoded.store) == 4 + 2  # shards of 7 rows: 24 and 8 tiles
    assert len(LatentStore.open(Path(encoded.store, "test"))) == 0


def test_a_job_cut_off_half_way_goes_on_to_the_same_bytes(encoded, tmp_path):
    job = replace(encoded, store=str(tmp_path / "latents"))

    def cut_off(tiles: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, cut_off)
    assert not check_store(job, fingerprint_of(job))
    shards = sorted((tmp_path / "latents/train").glob("*.arrow"))
    assert shards, "the first shard was stored before the job was cut off"
    for left in shards[1:]:  # however far the actor got: one whole shard stays, one is torn, the others are gone
        left.unlink()
    torn = tmp_path / "latents/train/shard-00001.arrow"
    torn.write_bytes(shards[0].read_bytes()[:1000])
    before = shards[0].stat().st_mtime_ns
    counted = []
    run(job, counted.append)
    assert sum(counted) == TRAIN + VAL
    assert shards[0].stat().st_mtime_ns == before
    assert files(job.store) == files(encoded.store)


def test_a_whole_store_is_not_encoded_again(encoded):
    before = {path: path.stat().st_mtime_ns for path in Path(encoded.store).rglob("*.arrow")}
    contents = files(encoded.store)
    run(encoded)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(encoded.store) == contents


def test_shards_that_the_index_does_not_name_are_removed(encoded, tmp_path):
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)
    for name in ("shard-00009.arrow", "shard-00009.json", "shard-00000.arrow.123.partial"):
        (tmp_path / "latents/train" / name).write_text("left by an earlier job with smaller shards, or by a kill")
    run(job)
    assert files(job.store) == files(encoded.store)


@pytest.mark.parametrize(
    "change",
    [
        {"variants": 1},
        {"hints": ("canny",)},
        {"shard_rows": 8},
        {"hint_settings": HintSettings(super_resolution_scale=2)},
        {"precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_store_of_other_settings_is_refused(encoded, change):
    job = replace(encoded, **change)
    with pytest.raises(UserError, match=r"encoded from other tiles, .*encode --overwrite"):
        check_store(job, fingerprint_of(job))


def test_where_things_lie_does_not_make_another_store(encoded, copy_of_data, tmp_path):
    autoencoder = shutil.copytree(encoded.autoencoder, tmp_path / "autoencoder")
    moved = replace(encoded, root=str(copy_of_data), autoencoder=str(autoencoder), batch_size=1)
    assert check_store(moved, fingerprint_of(moved))


def test_other_pixels_of_a_tile_or_of_a_partner_make_another_store(encoded, copy_of_data):
    job = replace(encoded, root=str(copy_of_data))
    for kind in ("foundation", "degraded"):
        before = fingerprint_of(job)
        for csv in (copy_of_data / kind / "simulated" / "manifests").glob("*.csv"):
            table = pd.read_csv(csv, dtype=str, keep_default_na=False)
            table["sha256"] = ["0" * 64, *table["sha256"][1:]][: len(table)]
            table.to_csv(csv, index=False)
        assert fingerprint_of(job) != before


def test_other_weights_make_another_store(encoded):
    autoencoder = load_autoencoder(encoded.autoencoder)
    next(iter(autoencoder.network.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match="other tiles, autoencoder"):
        check_store(encoded, fingerprint(encoded, list_tiles(encoded), autoencoder))


def test_a_store_that_is_being_made_again_is_no_finished_one(encoded, tmp_path):
    # an interrupted overwrite leaves new shards among old ones: the mark must go before the first of them is written
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)

    def cut_off(tiles: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, cut_off)
    assert not check_store(job, fingerprint_of(job))
    with pytest.raises(UserError, match=r"stats\.json is missing"):
        LatentStore.open(job.store)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_verify_names_a_damaged_shard(encoded, tmp_path, damage):
    store = shutil.copytree(encoded.store, tmp_path / "latents")
    damage(store / "val" / "shard-00001.arrow")
    with pytest.raises(UserError, match=rf"1 latent shards.*first {store}/val/shard-00001\.arrow.*--overwrite"):
        verify(store)


@pytest.mark.parametrize("name", ["train/shard-00001.arrow", "val/index.json"])
def test_a_store_that_lost_a_file_is_not_taken_for_a_finished_one(encoded, tmp_path, name):
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)
    assert check_store(job, fingerprint_of(job))
    Path(job.store, name).unlink()
    assert not check_store(job, fingerprint_of(job))


def test_damaged_statistics_are_named(encoded, tmp_path):
    store = shutil.copytree(encoded.store, tmp_path / "latents")
    (store / "stats.json").write_text('{"mean": [0.1')
    job = replace(encoded, store=str(store))
    with pytest.raises(UserError, match=r"stats\.json is not valid JSON.*--overwrite"):
        check_store(job, fingerprint_of(job))


def shard_of(job: EncodeJob, folder: Path, rows: int = 3) -> dict:
    """One shard of the training split, as the job's actor is given it."""
    listed = list_tiles(job).rows["train"][:rows]
    shard = {"path": str(folder / "shard-00000.arrow"), "rows": [vars(row) for row in listed]}
    return {"shard": np.array([json.dumps(shard)], dtype=object)}


def test_a_tile_of_the_wrong_size_is_named(tiny_autoencoder, copy_of_data, tmp_path):
    job = job_for(copy_of_data, tiny_autoencoder, tmp_path)
    path = load_manifest(copy_of_data, "train").path(1)
    write_tile(path, np.zeros((32, 48)))
    record = json.loads(ShardEncoder(job, "f", use_gpu=False)(shard_of(job, tmp_path))["record"][0])
    assert record == {
        "wrong": f"{path} is 32x48 px, but data.tile_size is 64; prepare tiles of that size or change "
        "data.tile_size and model.latent_size"
    }
    assert not (tmp_path / "shard-00000.arrow").exists()


@pytest.mark.parametrize("scale", [float("nan"), 1e9])
def test_latents_that_fp16_cannot_hold_are_never_stored(tiny_autoencoder, tiny_data, tmp_path, scale):
    job = job_for(tiny_data, tiny_autoencoder, tmp_path, hints=())
    encoder = ShardEncoder(job, "f", use_gpu=False)
    encoder.autoencoder.network.encoder.layers[-1].weight *= scale
    record = json.loads(encoder(shard_of(job, tmp_path))["record"][0])
    assert "fp16 cannot hold" in record["wrong"]
    assert not (tmp_path / "shard-00000.arrow").exists()


def test_an_actor_reads_only_a_few_tiles_ahead_of_the_autoencoder(tiny_autoencoder, tiny_data, tmp_path):
    # a shard of 1024 tiles of 512 px with four hints and eight variants is 43 GB of pixels
    job = job_for(tiny_data, tiny_autoencoder, tmp_path, hints=(), variants=1)
    encoder = ShardEncoder(job, "f", use_gpu=False)
    rows = list_tiles(job).rows["train"]
    read = []
    images_of = encoder._images
    encoder._images = lambda row: read.append(row.id) or images_of(row)
    images = encoder._read(rows)
    for number in range(len(rows)):
        np.testing.assert_array_equal(next(images)[0], read_tile(rows[number].path))
        assert len(read) <= number + 6
    assert next(images, None) is None
    assert sorted(read) == sorted(row.id for row in rows)


@pytest.mark.parametrize("kind", ["foundation", "degraded"])
def test_a_missing_image_is_named_before_work_starts(copy_of_data, tiny_autoencoder, tmp_path, kind):
    job = job_for(copy_of_data, tiny_autoencoder, tmp_path / "latents")
    tile = load_manifest(copy_of_data, "train").table["id"].iat[5]
    lost = copy_of_data / kind / "simulated/images" / (tile + ("_denoising.png" if kind == "degraded" else ".png"))
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost}.*missing|missing.*{lost}"):
        list_tiles(job)
    if kind == "degraded":  # a partner that no hint asks for is not missed
        list_tiles(replace(job, hints=("canny", "super_resolution")))


def test_a_root_without_data_sets_or_without_a_split_is_named(copy_of_data, tiny_autoencoder, tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*ray-pipeline prepare"):
        list_tiles(job_for(tmp_path / "nothing", tiny_autoencoder, tmp_path))
    folder = copy_of_data / "foundation" / "simulated"
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    with pytest.raises(UserError, match="no tile in split val"):
        list_tiles(job_for(copy_of_data, tiny_autoencoder, tmp_path))


def test_a_degraded_manifest_without_tasks_is_named(copy_of_data, tiny_autoencoder, tmp_path):
    csv = copy_of_data / "degraded/simulated/manifests/manifest.csv"
    pd.read_csv(csv, dtype=str).drop(columns="task").to_csv(csv, index=False)
    with pytest.raises(UserError, match=rf"{csv} has no column task"):
        list_tiles(job_for(copy_of_data, tiny_autoencoder, tmp_path))


def test_data_sets_follow_each_other_and_one_may_lack_a_split(copy_of_data, tiny_autoencoder, tmp_path):
    folder = shutil.copytree(copy_of_data / "foundation/simulated", copy_of_data / "foundation/another")
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    listing = list_tiles(job_for(copy_of_data, tiny_autoencoder, tmp_path))
    assert listing.datasets["train"] == [
        {"name": "another", "start": 0, "count": TRAIN + VAL},
        {"name": "simulated", "start": TRAIN + VAL, "count": TRAIN},
    ]
    assert [entry["count"] for entry in listing.datasets["val"]] == [0, VAL]
    for split, ranges in listing.datasets.items():
        for entry in ranges:
            listed = listing.rows[split][entry["start"] : entry["start"] + entry["count"]]
            assert {row.id.split("/")[0] for row in listed} <= {entry["name"]}
    # the other data set has no degraded partners: its hints are simulated
    assert not any(row.partners for row in listing.rows["train"][: TRAIN + VAL])
    assert all(set(row.partners) == set(PAIRED) for row in listing.rows["train"][TRAIN + VAL :])
