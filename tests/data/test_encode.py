"""Encoding on a real Ray: what is stored is what the autoencoder gives, whatever interrupted it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ray_pipeline.data.encode import check_shards, check_store, stored_tiles
from ray_pipeline.data.hint_registry import make_hint
from ray_pipeline.data.hints import HINTS, dihedral
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.manifest import SPLITS, load_manifest, load_pairs, write_manifests
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.sections import PAIRED_TYPES
from ray_pipeline.storage import Folder

VARIANTS = 2
TRAIN, VAL = 24, 8  # tiles of tiny_data

pytestmark = pytest.mark.usefixtures("one_thread")


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
    picked = [variant] * len(manifest)
    gathered = stored.gather(range(len(manifest)), picked)
    assert set(gathered) == {"latent", *(f"hint.{name}" for name in HINTS)}
    made = stored.gather(range(len(manifest)), picked, simulated=[True] * len(manifest))
    gathered["simulated.denoising"] = made.pop("hint.denoising")
    for name, latents in made.items():  # of no other hint was asked for a simulated one
        np.testing.assert_array_equal(latents, gathered[name])
    for row, identifier in enumerate(manifest.table["id"]):
        tile = dihedral(read_tile(manifest.path(row)), variant)
        images = {"latent": tile}
        for name in HINTS:
            partner = None
            if name in PAIRED_TYPES:
                partner = dihedral(read_tile(tiny_data / "degraded/simulated" / pairs[identifier, name]), variant)
            rest = (f"simulated/{identifier}", variant, encoded.hint_settings)
            images[f"hint.{name}"] = make_hint(name, tile, partner, *rest)
            if name == "denoising":
                images["simulated.denoising"] = make_hint(name, tile, None, *rest)
        with torch.no_grad():
            expected = network.encode(torch.from_numpy(np.stack(list(images.values())))[:, None]).latents.numpy()
        for name, latent in zip(images, expected, strict=True):
            # half a unit in the last place of fp16, and what the order of sums changes
            np.testing.assert_allclose(gathered[name][row], latent, rtol=2**-11, atol=5e-7, err_msg=name)


def test_statistics_are_those_of_all_variants_of_the_training_tiles(encoded):
    store = LatentStore.open(encoded.store)
    latents = np.concatenate([store.gather(range(TRAIN), [k] * TRAIN)["latent"] for k in range(VARIANTS)])
    values = latents.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1)
    stats = json.loads(Path(encoded.store, "stats.json").read_text())
    np.testing.assert_allclose(stats["mean"], values.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(stats["std"], values.std(axis=1), rtol=1e-9)
    assert stats["count"] == TRAIN


def test_the_index_tells_the_autoencoder_and_the_ranges_of_the_training_tiles(encoded):
    listed = list_tiles(encoded).intensity
    assert {entry.role for entry in listed} == {"tile", *PAIRED_TYPES}
    for split in ("train", "val"):
        stored = LatentStore.open(Path(encoded.store, split))
        assert stored.intensity == listed
        assert stored.autoencoder.pretrained == encoded.autoencoder
        assert stored.autoencoder.sha256 == load_autoencoder(encoded.autoencoder).fingerprint()


def test_a_job_cut_off_half_way_goes_on_with_two_actors_to_the_same_bytes(encoded, tmp_path, run_job, fingerprint_of):
    job = replace(encoded, store=str(tmp_path / "latents"))

    def cut_off(tiles: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, cut_off)
    assert not check_store(job, fingerprint_of(job))
    shards = sorted((tmp_path / "latents/train").glob("*.npy"))
    assert shards, "the first shard was stored before the job was cut off"
    for left in shards[1:]:  # however far the actor got: one whole shard stays, one is torn, the others are gone
        left.unlink()
    torn = tmp_path / "latents/train/shard-00001.npy"
    torn.write_bytes(shards[0].read_bytes()[:1000])
    before = shards[0].stat().st_mtime_ns
    counted = []
    run_job(job, counted.append, actors=2)  # batches are padded to one shape, and end with their shard
    assert sum(counted) == TRAIN + VAL
    assert shards[0].stat().st_mtime_ns == before
    assert files(job.store) == files(encoded.store)


def test_a_sampled_posterior_is_stored_and_counted_in_the_statistics(
    job_for, run_job_here, tiny_data, tiny_kl, tmp_path
):
    """Against diffusers' own posterior, and the variance of a mixture: that of the means and the mean of the others."""
    changes = {"autoencoder": str(tiny_kl), "store": tmp_path / "latents", "posterior": "sample", "variants": 2}
    job = job_for(tiny_data, "canny", **changes)
    run_job_here(job)
    store, network = LatentStore.open(job.store), AutoencoderKL.from_pretrained(tiny_kl)
    assert store.columns == ("latent", "std", "hint.canny")
    manifest = load_manifest(tiny_data / "foundation/simulated", "train")
    for variant in range(2):
        gathered = store.gather(range(TRAIN), [variant] * TRAIN)
        tiles = np.stack([dihedral(read_tile(manifest.path(row)), variant) for row in range(TRAIN)])
        with torch.no_grad():
            posterior = network.encode(torch.from_numpy(tiles)[:, None]).latent_dist
        np.testing.assert_allclose(gathered["latent"], posterior.mean, rtol=2**-10, atol=5e-5)
        np.testing.assert_allclose(gathered["std"], posterior.std, rtol=2**-10, atol=5e-5)
    values = [
        np.concatenate([store.gather(range(TRAIN), [v] * TRAIN)[name] for v in (0, 1)]) for name in ("latent", "std")
    ]
    means, stds = (x.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1) for x in values)
    np.testing.assert_allclose(store.stats.mean, means.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(store.stats.std**2, means.var(axis=1) + (stds**2).mean(axis=1), rtol=1e-9)


def test_a_whole_store_is_not_encoded_again(encoded, run_job):
    before = {path: path.stat().st_mtime_ns for path in Path(encoded.store).rglob("*.npy")}
    contents = files(encoded.store)
    run_job(encoded)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(encoded.store) == contents


def test_shards_that_the_index_does_not_name_are_removed(encoded, tmp_path, run_job):
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)
    # of an earlier job with smaller shards, of another version, of a kill
    for name in ("shard-00009.npy", "shard-00009.json", "shard-00000.arrow", ".shard-00001.npy.123.tmp"):
        (tmp_path / "latents/train" / name).write_text("left over")
    run_job(job)
    assert files(job.store) == files(encoded.store)


def test_a_store_that_is_being_made_again_is_no_finished_one(encoded, tmp_path, run_job, fingerprint_of):
    # an interrupted overwrite leaves new shards among old ones: the mark must go before the first of them is written
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)

    def cut_off(tiles: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, cut_off)
    assert not check_store(job, fingerprint_of(job))
    with pytest.raises(UserError, match=r"stats\.json is missing"):
        LatentStore.open(job.store)


def as_kept(store: str) -> dict[str, bytes]:
    """Contents of every file of a store, wherever it lies."""
    folders = {"": Folder(store)} | {f"{split}/": Folder(store).child(split) for split in SPLITS}
    return {prefix + name: folder.read(name) for prefix, folder in folders.items() for name in folder.names()}


def test_a_store_in_object_storage_is_made_whole_with_the_bytes_of_a_local_one(
    encoded, s3, s3_server, tmp_path, run_job, fingerprint_of
):
    job = replace(encoded, store=Folder(s3).child(tmp_path.name, "mit Leerzeichen \u00b5").location)
    store, whole = Folder(job.store), as_kept(encoded.store)
    for name, data in whole.items():
        if name not in ("train/shard-00001.npy", "train/shard-00002.npy"):
            store.child(*name.split("/")[:-1]).write(Path(name).name, data)
    assert not check_store(job, fingerprint_of(job))
    with pytest.raises(UserError, match=r"2 latent shards .*first s3://tests/.*/train/shard-00001\.npy; run"):
        check_shards(job.store)
    store.child("val").remove(store.child("val").names())  # this split is encoded from nothing
    s3_server.requests.clear()
    run_job(job)
    written = {"/".join(path.split("/")[-2:]) for method, path, _ in s3_server.requests if method in ("PUT", "POST")}
    assert {name for name in written if name.endswith(".npy")} == {
        "train/shard-00001.npy",
        "train/shard-00002.npy",
        "val/shard-00000.npy",
        "val/shard-00001.npy",
    }
    assert as_kept(job.store) == whole
    assert check_store(job, fingerprint_of(job))
    assert check_shards(job.store) == 4 + 2
    found, expected = (LatentStore.open(at).gather([23, 0, 8], [1, 0, 1]) for at in (job.store, encoded.store))
    for name, latents in expected.items():
        np.testing.assert_array_equal(found[name], latents)


def test_of_a_sample_so_many_tiles_of_each_data_set_are_stored_and_all_are_listed(
    encoded, copy_of_data, tmp_path, run_job, fingerprint_of
):
    root = copy_of_data.rename(tmp_path / "mit Leerzeichen \u00b5")
    folder = shutil.copytree(root / "foundation/simulated", root / "foundation/another")
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    job = replace(encoded, root=str(root), store=f"{root}/latents_sample", sample_rows=5)
    counted = []
    listing = run_job(job, counted.append)
    assert sum(counted) == 5 + 5 + 5
    assert check_store(job, fingerprint_of(job))
    assert check_shards(job.store) == 2 + 1
    before = as_kept(job.store)
    Path(job.store, "train/streamed_tiles.arrow").write_bytes(before["train/streamed_tiles.arrow"][:1000])
    with pytest.raises(UserError, match=r"train/streamed_tiles\.arrow is missing or damaged"):
        check_shards(job.store)
    Path(job.store, "train/streamed_tiles.arrow").unlink()
    assert not check_store(job, fingerprint_of(job))
    run_job(job)
    assert as_kept(job.store) == before
    streamed = TileTable(Folder(job.store).child("train"), "streamed_tiles.arrow")
    assert streamed.rows(range(len(streamed))) == listing.rows["train"]
    assert streamed.datasets == tuple(listing.datasets["train"])
    assert [entry.count for entry in streamed.datasets] == [TRAIN + VAL, TRAIN]
    stored, full = LatentStore.open(job.store), LatentStore.open(encoded.store)
    assert [(entry.name, entry.start, entry.count) for entry in stored.datasets] == [
        ("another", 0, 5),
        ("simulated", 5, 5),
    ]
    assert [entry.partners["denoising"] for entry in stored.datasets] == [0, 5]
    even = np.round(np.linspace(0, TRAIN - 1, 5)).astype(int)
    for flag in (False, True):
        found = stored.gather(range(5, 10), simulated=[flag] * 5)
        expected = full.gather(even, simulated=[flag] * 5)
        for name, latents in expected.items():  # a unit of fp16: in another batch, sums have another order
            np.testing.assert_allclose(found[name].astype(float), latents.astype(float), rtol=2**-10, atol=5e-7)
    val = LatentStore.open(Folder(job.store).child("val"))
    assert [(entry.name, entry.start, entry.count) for entry in val.datasets] == [
        ("another", 0, 0),
        ("simulated", 0, 5),
    ]


@pytest.mark.parametrize("rows", [None, 3])
def test_stored_tiles_are_all_or_the_sample(tiny_data, tmp_path, rows, job_for):
    job = job_for(tiny_data, store=tmp_path, sample_rows=rows)
    listing = list_tiles(job)
    stored = stored_tiles(job, listing)
    assert {split: len(tiles) for split, tiles in stored.rows.items()} == {
        "train": rows or TRAIN,
        "val": rows or VAL,
        "test": 0,
    }
