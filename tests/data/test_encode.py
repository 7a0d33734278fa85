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

from ray_pipeline.config import parse_config
from ray_pipeline.data.encode import ShardEncoder, check_store, encode, fingerprint, stored_tiles, verify
from ray_pipeline.data.encode_job import SAMPLE_ROWS, EncodeJob, HintSettings, encode_job
from ray_pipeline.data.hints import HINTS, dihedral, make_hint
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import Listing, list_tiles
from ray_pipeline.data.manifest import SPLITS, load_manifest, load_pairs, write_manifests
from ray_pipeline.data.tile_table import TileTable, write_tile_table
from ray_pipeline.data.tiles import read_tile, write_tile
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.sections import PAIRED_TYPES
from ray_pipeline.storage import Folder

VARIANTS = 2
TRAIN, VAL = 24, 8  # tiles of tiny_data


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the actors; two threads wait for each other where other processes are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_for(data: Path, autoencoder: Path, store: Path | str, **changes) -> EncodeJob:
    job = EncodeJob(
        root=str(data),
        store=str(store),
        tile_size=64,
        hints=tuple(HINTS),
        simulated=("denoising",),
        hint_settings=HintSettings(),
        variants=VARIANTS,
        shard_rows=7,
        sample_rows=None,
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
    """A finished store of tiny_data with every hint, one of them simulated besides, as the job that made it."""
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
            settings = encoded.hint_settings
            images[f"hint.{name}"] = make_hint(name, tile, partner, f"simulated/{identifier}", variant, settings)
            if name == "denoising":
                images["simulated.denoising"] = make_hint(
                    name, tile, None, f"simulated/{identifier}", variant, settings
                )
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
    shards = sorted((tmp_path / "latents/train").glob("*.npy"))
    assert shards, "the first shard was stored before the job was cut off"
    for left in shards[1:]:  # however far the actor got: one whole shard stays, one is torn, the others are gone
        left.unlink()
    torn = tmp_path / "latents/train/shard-00001.npy"
    torn.write_bytes(shards[0].read_bytes()[:1000])
    before = shards[0].stat().st_mtime_ns
    counted = []
    run(job, counted.append)
    assert sum(counted) == TRAIN + VAL
    assert shards[0].stat().st_mtime_ns == before
    assert files(job.store) == files(encoded.store)


def test_a_whole_store_is_not_encoded_again(encoded):
    before = {path: path.stat().st_mtime_ns for path in Path(encoded.store).rglob("*.npy")}
    contents = files(encoded.store)
    run(encoded)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(encoded.store) == contents


def test_shards_that_the_index_does_not_name_are_removed(encoded, tmp_path):
    job = replace(encoded, store=str(tmp_path / "latents"))
    shutil.copytree(encoded.store, job.store)
    # of an earlier job with smaller shards, of another version, of a kill
    for name in ("shard-00009.npy", "shard-00009.json", "shard-00000.arrow", ".shard-00001.npy.123.tmp"):
        (tmp_path / "latents/train" / name).write_text("left over")
    run(job)
    assert files(job.store) == files(encoded.store)


@pytest.mark.parametrize(
    "change",
    [
        {"variants": 1},
        {"hints": ("canny",)},
        {"simulated": ()},
        {"sample_rows": 5},
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
    damage(store / "val" / "shard-00001.npy")
    with pytest.raises(UserError, match=rf"1 latent shards.*first {store}/val/shard-00001\.npy.*--overwrite"):
        verify(store)


@pytest.mark.parametrize("name", ["train/shard-00001.npy", "val/index.json", "train/tiles.arrow"])
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


def encode_one(job: EncodeJob, encoder: ShardEncoder, rows: int = 3) -> dict:
    """What the job's actor answers for one shard of the training split."""
    folder = Folder(job.store).child("train")
    write_tile_table(folder, "tiles.arrow", list_tiles(job).rows["train"][:rows], [])
    answer = encoder({"split": np.array(["train"], dtype=object), "shard": np.array([0])})
    assert answer["split"].tolist() == ["train"]
    return json.loads(answer["record"][0])


def test_a_tile_of_the_wrong_size_is_named(tiny_autoencoder, copy_of_data, tmp_path):
    job = job_for(copy_of_data, tiny_autoencoder, tmp_path / "latents")
    path = load_manifest(copy_of_data, "train").path(1)
    write_tile(path, np.zeros((32, 48)))
    assert encode_one(job, ShardEncoder(job, "f", use_gpu=False)) == {
        "wrong": f"{path} is 32x48 px, but data.tile_size is 64; prepare tiles of that size or change "
        "data.tile_size and model.latent_size"
    }
    assert [path.name for path in (tmp_path / "latents/train").iterdir()] == ["tiles.arrow"]


@pytest.mark.parametrize("scale", [float("nan"), 1e9])
def test_latents_that_fp16_cannot_hold_are_never_stored(tiny_autoencoder, tiny_data, tmp_path, scale):
    job = job_for(tiny_data, tiny_autoencoder, tmp_path / "latents", hints=(), simulated=())
    encoder = ShardEncoder(job, "f", use_gpu=False)
    encoder.encoder.autoencoder.network.encoder.layers[-1].weight *= scale
    assert "fp16 cannot hold" in encode_one(job, encoder)["wrong"]
    assert [path.name for path in (tmp_path / "latents/train").iterdir()] == ["tiles.arrow"]


def test_a_damaged_tile_ends_the_job_with_its_name(ray_cluster, tiny_autoencoder, copy_of_data, tmp_path):
    job = job_for(copy_of_data, tiny_autoencoder, tmp_path / "latents", shard_rows=16)
    path = load_manifest(copy_of_data, "train").path(20)
    flip(path)
    with pytest.raises(UserError, match=f"^{path}: found a damaged PNG"):
        run(job)
    assert not check_store(job, fingerprint_of(job))


def as_kept(store: str) -> dict[str, bytes]:
    """Contents of every file of a store, wherever it lies."""
    folders = {"": Folder(store)} | {f"{split}/": Folder(store).child(split) for split in SPLITS}
    return {prefix + name: folder.read(name) for prefix, folder in folders.items() for name in folder.names()}


def test_a_store_in_object_storage_is_made_whole_with_the_bytes_of_a_local_one(encoded, s3, s3_server, tmp_path):
    job = replace(encoded, store=Folder(s3).child(tmp_path.name, "mit Leerzeichen \u00b5").location)
    store, whole = Folder(job.store), as_kept(encoded.store)
    for name, data in whole.items():
        if name not in ("train/shard-00001.npy", "train/shard-00002.npy"):
            store.child(*name.split("/")[:-1]).write(Path(name).name, data)
    assert not check_store(job, fingerprint_of(job))
    with pytest.raises(UserError, match=r"2 latent shards .*first s3://tests/.*/train/shard-00001\.npy; run"):
        verify(job.store)
    store.child("val").remove(store.child("val").names())  # this split is encoded from nothing
    s3_server.requests.clear()
    run(job)
    written = {"/".join(path.split("/")[-2:]) for method, path, _ in s3_server.requests if method in ("PUT", "POST")}
    assert {name for name in written if name.endswith(".npy")} == {
        "train/shard-00001.npy",
        "train/shard-00002.npy",
        "val/shard-00000.npy",
        "val/shard-00001.npy",
    }
    assert as_kept(job.store) == whole
    assert check_store(job, fingerprint_of(job))
    assert verify(job.store) == 4 + 2
    found, expected = (LatentStore.open(at).gather([23, 0, 8], [1, 0, 1]) for at in (job.store, encoded.store))
    for name, latents in expected.items():
        np.testing.assert_array_equal(found[name], latents)


def test_of_a_sample_so_many_tiles_of_each_data_set_are_stored_and_all_are_listed(encoded, copy_of_data, tmp_path):
    root = copy_of_data.rename(tmp_path / "mit Leerzeichen \u00b5")
    folder = shutil.copytree(root / "foundation/simulated", root / "foundation/another")
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    job = replace(encoded, root=str(root), store=f"{root}/latents_sample", sample_rows=5)
    counted = []
    listing = run(job, counted.append)
    assert sum(counted) == 5 + 5 + 5
    assert check_store(job, fingerprint_of(job))
    assert verify(job.store) == 2 + 1
    before = as_kept(job.store)
    Path(job.store, "train/streamed_tiles.arrow").write_bytes(before["train/streamed_tiles.arrow"][:1000])
    with pytest.raises(UserError, match=r"train/streamed_tiles\.arrow is missing or damaged"):
        verify(job.store)
    Path(job.store, "train/streamed_tiles.arrow").unlink()
    assert not check_store(job, fingerprint_of(job))
    run(job)
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
def test_stored_tiles_are_all_or_the_sample(tiny_data, tiny_autoencoder, tmp_path, rows):
    job = job_for(tiny_data, tiny_autoencoder, tmp_path, sample_rows=rows)
    listing = list_tiles(job)
    stored = stored_tiles(job, listing)
    assert {split: len(tiles) for split, tiles in stored.rows.items()} == {
        "train": rows or TRAIN,
        "val": rows or VAL,
        "test": 0,
    }


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
    config = config_for(augment_variants=3, shard_rows=9, super_resolution_scale=2)
    config["vae"] = {"pretrained": "vae", "precision": "bf16", "batch_size": 6}
    assert encode_job(parse_config(config)) == EncodeJob(
        root=f"{tmp_path}/some/data",
        store=f"{tmp_path}/some/data/latents",
        tile_size=64,
        hints=("denoising", "canny"),
        simulated=("denoising",),
        hint_settings=HintSettings(super_resolution_scale=2),
        variants=3,
        shard_rows=9,
        sample_rows=None,
        autoencoder=f"{tmp_path}/vae",
        precision="bf16",
        latent_channels=4,
        batch_size=6,
    )


def test_a_job_that_streams_tiles_stores_a_sample_beside_where_all_would_lie(tmp_path):
    root = tmp_path / "data"
    job = encode_job(parse_config(config_for(mode="tiles", root=str(root))))
    assert (job.store, job.sample_rows) == (f"{root}/latents_sample", SAMPLE_ROWS)
    for chosen in (str(tmp_path / "elsewhere"), "s3://bucket/latents?region=eu-west-1"):
        job = encode_job(parse_config(config_for(mode="tiles", root=str(root), latents=chosen)))
        assert job.store == chosen


def test_a_row_takes_the_bytes_of_its_columns_in_every_variant(encoded):
    assert encoded.columns == ("latent", *(f"hint.{name}" for name in HINTS), "simulated.denoising")
    assert encoded.shape == (4, 8, 8)
    store = LatentStore.open(encoded.store)
    shards = store.folder.sizes()
    assert store.columns == encoded.columns
    # beside the rows a header that numpy pads to 64 bytes
    assert sum(shards[f"shard-{k:05d}.npy"] for k in range(4)) == TRAIN * encoded.row_bytes + 4 * 128
