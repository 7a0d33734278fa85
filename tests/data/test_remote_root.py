"""A data root in object storage gives the same tiles, fingerprints and latents as on a disk, and names its files."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from ray_pipeline import encoding, pipeline
from ray_pipeline.cli import main
from ray_pipeline.config import parse_config
from ray_pipeline.data.encode import check_store
from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.manifest import load_manifest, write_manifests
from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.data.sources.upload import upload_data
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.data.tile_source import TileSource
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.data.tiles import read_tile, write_tile
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError


@pytest.fixture(scope="module")
def remote(s3, tiny_data) -> Folder:
    """A copy of tiny_data in a bucket."""
    folder = Folder(s3).child("remote root", "of \u00b5m")
    upload_data(tiny_data, folder)
    return folder


@pytest.fixture(scope="module")
def local_job(tiny_data, job_for, run_job_here, tmp_path_factory) -> EncodeJob:
    """A job whose root and store, which it has encoded, lie on a disk."""
    store = tmp_path_factory.mktemp("local") / "latents"
    job = job_for(tiny_data, "denoising", "canny", store=store, simulated=("denoising",), variants=2, shard_rows=10)
    run_job_here(job)
    return job


def noise(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).random((side, side))


@pytest.fixture
def small(tmp_path, s3) -> tuple[Path, Folder]:
    """Four tiles, two of them with a noisy partner, on a disk and in a bucket."""
    made, tiles, partners = tmp_path / "small", [], []
    for number in range(4):
        row = {"id": f"t{number}", "image": f"images/{number % 2}/{number}.png"}
        write_tile(made / "foundation/cells" / row["image"], noise(number))
        tiles.append(row)
        if number < 2:
            partner = {"id": f"p{number}", "image": f"{number}.png", "pair_id": row["id"], "task": "denoising"}
            write_tile(made / "degraded/cells" / partner["image"], noise(number + 10))
            partners.append(partner)
    write_manifests(
        made / "foundation/cells", tiles, {row["id"]: "val" if row["id"] == "t3" else "train" for row in tiles}
    )
    write_manifests(made / "degraded/cells", partners, {row["id"]: "train" for row in partners})
    root = Folder(s3).child(tmp_path.name)
    upload_data(made, root)
    return made, root


def files(folder: Folder) -> dict[str, str]:
    return {name: hashlib.sha256(folder.read(name)).hexdigest() for name in folder.tree()}


def config_of(root: str | Path, autoencoder: Path, **data):
    return parse_config(
        {
            "data": {"root": str(root), "tile_size": 64, **data},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "vae": {"pretrained": str(autoencoder)},
            "phases": [{"name": "one", "epochs": 1, "condition_types": ["denoising"]}],
        }
    )


def test_what_is_listed_is_what_is_listed_on_a_disk(remote, tiny_data, job_for, fingerprint_of, s3_server):
    job = job_for(remote.location)
    assert job.store == remote.child("latents").location
    before = len(s3_server.requests)
    found = list_tiles(job)
    asked = [(method, path) for method, path, _ in s3_server.requests[before:]]
    assert found == list_tiles(job_for(tiny_data))
    assert fingerprint_of(job) == fingerprint_of(job_for(tiny_data))
    assert not [path for _, path in asked if path.endswith(".png")]  # the folders are listed
    assert len(asked) < 40


def test_manifests_load_by_uri_of_root_folder_and_file(remote, tiny_data):
    place = remote.child("foundation", "simulated")
    for uri in (remote.location, place.location, place.child("manifests", "manifest.csv").location):
        manifest = load_manifest(uri, "val")
        assert (manifest.dataset, manifest.split, len(manifest)) == ("simulated", "val", 8)
        assert manifest.fingerprint() == load_manifest(tiny_data, "val").fingerprint()
    with pytest.raises(UserError, match=r"s3://tests/.* is in object storage, expected a data set on a disk"):
        manifest.path(0)
    with pytest.raises(UserError, match=r"s3://tests/.*/manifests/train\.csv: no such manifest"):
        load_manifest(remote.child("latents", "manifests", "train.csv").location)


def test_a_store_that_is_encoded_from_a_bucket_into_a_bucket_has_the_bytes_of_one_on_a_disk(
    remote, local_job, run_job, fingerprint_of, tmp_path
):
    job = replace(local_job, root=remote.location, store=remote.parent.child(tmp_path.name).location)
    run_job(job)
    assert files(Folder(job.store)) == files(Folder(local_job.store))
    assert check_store(job, fingerprint_of(local_job))
    assert check_store(local_job, fingerprint_of(job))


def test_tiles_that_are_encoded_while_it_trains_have_the_same_bits(remote, local_job):
    table = TileTable(Folder(local_job.store).child("train"), "tiles.arrow")
    ids, variants, made = [17, 0, 5], [1, 0, 1], [False, True, False]
    local, far = (
        TileSource(job, table).gather(ids, variants, job.hints, made)
        for job in (local_job, replace(local_job, root=remote.location))
    )
    for name, latents in local.items():
        assert far[name].tobytes() == latents.tobytes(), name


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".npz"])
def test_a_tile_of_every_format_is_read_as_from_a_disk(s3, tmp_path, suffix):
    path, values = tmp_path / f"a b{suffix}", np.rint(noise(0) * 65535).astype(np.uint16)
    if suffix == ".png":
        cv2.imwrite(str(path), values)
    elif suffix == ".tif":
        tifffile.imwrite(path, values, compression="zlib")
    else:
        (np.save if suffix == ".npy" else np.savez)(path, (noise(0) * 2 - 1).astype(np.float32))
    folder = Folder(s3).child(tmp_path.name)
    folder.write(path.name, path.read_bytes())
    where = folder.where(path.name)
    np.testing.assert_array_equal(read_tile(where, folder.read(path.name)), read_tile(path))
    for content in (path.read_bytes()[:-100], b"", b"nothing of the kind"):
        with pytest.raises(UserError, match=r"^s3://tests/.*a b\.\w+: (expected|found)"):
            read_tile(where, content)


def test_tiles_and_partners_that_are_gone_or_empty_are_named_before_any_is_opened(small, job_for, s3_server):
    _, root = small
    tiles, partners = root.child("foundation", "cells", "images", "0"), root.child("degraded", "cells")
    job = job_for(root.location, "denoising")
    assert len(list_tiles(job).rows["train"]) == 3
    tiles.remove(["2.png"])
    partners.write("1.png", b"")
    before = len(s3_server.requests)
    listed = list_tiles(replace(job, max_rejected=2)).rejected
    assert {(row.path, row.reason) for row in listed} == {
        ("foundation/cells/images/0/2.png", "no such file"),
        ("degraded/cells/1.png", "the denoising partner is empty"),
    }
    assert not [path for method, path, _ in s3_server.requests[before:] if path.endswith(".png")]
    with pytest.raises(
        UserError, match=r"^data\.root=s3://tests/.*2 of 4 tiles cannot be used.*images/0/2\.png: no such"
    ):
        list_tiles(job)


def test_manifests_that_name_what_object_storage_cannot_hold_are_refused(small, job_for):
    made, root = small
    manifests = root.child("foundation", "cells", "manifests")
    text = (made / "foundation/cells/manifests/train.csv").read_text()
    manifests.write("train.csv", text.replace("images/0/0.png", "images/0.zarr").encode())
    with pytest.raises(UserError, match=r"images/0\.zarr: it is an OME-Zarr folder, .*\(save it as TIFF or PNG\)"):
        list_tiles(job_for(root.location, "canny"))
    manifests.write("train.csv", text.replace("images/0/0.png", "../0.png").encode())
    with pytest.raises(UserError, match=r"^s3://tests/.*/manifests/train\.csv: found image path \.\./0\.png"):
        list_tiles(job_for(root.location, "canny"))
    manifests.write("train.csv", b"id,picture\n1,a.png\n")
    with pytest.raises(UserError, match=r"^s3://tests/.*/train\.csv: found columns id, picture, expected also image"):
        list_tiles(job_for(root.location, "canny"))


def test_a_tile_that_goes_bad_is_rejected_and_one_that_cannot_be_asked_for_is_not(small, job_for, s3_server):
    made, root = small
    job = job_for(root.location, "denoising")
    rows = {row.id: row for row in list_tiles(job).rows["train"]}
    tiles = root.child("foundation", "cells", "images")
    tiles.child("0").write("0.png", (made / "foundation/cells/images/0/0.png").read_bytes()[:-9])
    tiles.child("1").remove(["1.png"])
    reader = TileReader(job)
    for name, reason in (("t0", "found a truncated PNG"), ("t1", "no such image file; copy it there again")):
        found = reader.images(Request(rows[f"cells/{name}"], (0,), ("latent",)))
        assert found.path == rows[f"cells/{name}"].path
        assert found.reason.startswith(reason)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::sealed/*"]}
    sealed = replace(job, root=s3_server.make_bucket("sealed"))
    s3_server.put(f"sealed/{rows['cells/t2'].path}", b"x")
    s3_server.make_bucket("sealed", {"Version": "2012-10-17", "Statement": [deny]})
    with pytest.raises(StorageError, match=r"^s3://sealed/foundation/cells/images/0/2\.png cannot .*ACCESS_DENIED"):
        TileReader(sealed).images(Request(rows["cells/t2"], (0,), ("latent",)))


def test_the_sample_data_are_written_into_an_empty_bucket_manifests_last(s3, s3_server, tmp_path, tiny_autoencoder):
    simulated = {"fields": 2, "field_size": 64, "seed": 1}
    root = Folder(s3).child(tmp_path.name)
    config = config_of(root.location, tiny_autoencoder, simulate=simulated)
    assert not encoding.has_data(config)
    before = len(s3_server.requests)
    encoding.prepare_data(config)
    assert encoding.has_data(config)
    written = [path for method, path, _ in s3_server.requests[before:] if method == "PUT"]
    names = [path.partition(tmp_path.name)[2] for path in written]
    kinds = ["manifests" if "/manifests/" in name else "images" for name in names]
    assert kinds == sorted(kinds)
    assert names[-2:] == [f"/{kind}/simulated/manifests/manifest.csv" for kind in ("degraded", "foundation")]
    simulate(tmp_path / "local", **simulated, tile_size=64)
    assert files(root) == files(Folder(tmp_path / "local"))
    before = len(s3_server.requests)
    encoding.prepare_data(config)  # they are there
    assert not [path for method, path, _ in s3_server.requests[before:] if method == "PUT"]


def test_a_config_with_a_uri_is_looked_through_and_previewed(remote, tiny_data, tiny_autoencoder, tmp_path):
    far, near = (config_of(root, tiny_autoencoder) for root in (remote.location, tiny_data))
    assert encoding.look(far).fingerprint == encoding.look(near).fingerprint
    pictures = []
    for number, config in enumerate((far, near)):
        encoding.preview_hints(config, ["denoising"], 2, tmp_path / f"{number}.png")
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] == pictures[1]
    text = pipeline.dry_run(far.model_copy(update={"output_dir": str(tmp_path / "run")}))
    assert "tiles        train 24, val 8, test 0\n" in text
    assert f"latents      {remote.child('latents').location}: " in text


def test_a_cache_too_small_for_what_is_shuffled_together_is_told(remote, tiny_autoencoder):
    def look(gib: float, window: int | None = None) -> None:
        encoding.look(config_of(remote.location, tiny_autoencoder, cache_gib=gib, shuffle_window=window, shard_rows=8))

    row = 2 * 4 * 8 * 8 * 2 / 2**30
    look(25 * row / 0.8)
    look(0)
    look(9 * row / 0.8, 8)
    with pytest.warns(
        UserWarning, match=r"data\.cache_gib=\S+ is too little .* set it to 1, or data\.shuffle_window=9$"
    ):
        look(9.5 * row / 0.8)


def test_a_bucket_that_is_not_there_is_told_for_each_key(remote, tiny_data, tiny_autoencoder):
    absent = remote.location.replace("s3://tests/", "s3://absent/")
    with pytest.raises(UserError, match=r"^data\.root=s3://absent/.*there is no such bucket"):
        encoding.look(config_of(absent, tiny_autoencoder))
    config = config_of(tiny_data, tiny_autoencoder, latents=absent)
    for use in (encoding.look, encoding.verify, pipeline.dry_run):
        with pytest.raises(UserError, match=r"^data\.latents=s3://absent/.*there is no such bucket"):
            use(config)


@pytest.mark.parametrize("words", [["prepare", "folder", "images"], ["simulate"]])
def test_commands_that_write_to_a_disk_alone_say_how_to_bring_data_to_a_bucket(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", "s3://bucket/data"])
    assert stopped.value.code == 2
    assert (
        "s3://bucket/data is a URI, expected a local or mounted folder: write to one, copy it"
        in capsys.readouterr().err
    )
    assert os.listdir(tmp_path) == []


def test_a_file_uri_is_a_path(tiny_data, tmp_path, job_for, fingerprint_of):
    copied = Path(shutil.copytree(tiny_data, tmp_path / "a b", ignore=shutil.ignore_patterns("latents")))
    assert fingerprint_of(job_for(copied.as_uri())) == fingerprint_of(job_for(tiny_data))
