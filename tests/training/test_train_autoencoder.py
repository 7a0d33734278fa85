"""`train-vae`: it learns, it repeats itself, and what it cannot do it says before it starts."""

import json

import cv2
import numpy as np
import pytest
import torch

from ray_pipeline.data.manifest import load_manifest, write_manifests
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder
from ray_pipeline.training import autoencoder as training
from ray_pipeline.training.autoencoder import (
    AutoencoderTraining,
    build_tiny_autoencoder,
    reconstruction_psnr,
    train_autoencoder,
)

SETTINGS = AutoencoderTraining(steps=30, width=8, blocks=(0, 1, 1, 1), batch_size=2, crop=32, lr=5e-3)


def make_dataset(root, name, count=6, side=64, val=(5,), sizes=True):
    """Smooth blobs, each tile its own."""
    folder, rows = root / "foundation" / name, []
    for i in range(count):
        rng = np.random.default_rng([i, len(name)])
        blobs = cv2.GaussianBlur(rng.random((side, side)), (0, 0), 4)
        blobs = (blobs - blobs.min()) / np.ptp(blobs)
        row = {"id": f"t{i}", "image": f"images/{i}.png", "dataset": name}
        row |= {"height": side, "width": side} if sizes else {}
        rows.append(row | {"sha256": write_tile(folder / row["image"], blobs)})
    write_manifests(folder, rows, {f"t{i}": "val" if i in val else "train" for i in range(count)})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("train_vae")
    sources = [make_dataset(root, "cells"), make_dataset(root, "nuclei")]
    return sources, root / "vae", train_autoencoder(sources, root / "vae", SETTINGS)


def test_30_steps_improve_every_data_set(trained):
    sources, _, psnr = trained
    torch.manual_seed(SETTINGS.seed)
    untrained = Autoencoder(build_tiny_autoencoder(SETTINGS.width, SETTINGS.blocks), "untrained")
    assert list(psnr) == ["cells", "nuclei"]
    for source in sources:
        assert psnr[source.name] > reconstruction_psnr(untrained, load_manifest(source, split="val")) + 3


def test_what_was_written_loads_and_scores_what_was_reported(trained):
    sources, out, psnr = trained
    autoencoder = load_autoencoder(str(out), latent_channels=4)
    for source in sources:
        assert reconstruction_psnr(autoencoder, load_manifest(source, split="val")) == pytest.approx(
            psnr[source.name], abs=1e-3
        )
    assert {p.name for p in out.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "training.json"}
    record = json.loads((out / "training.json").read_text())
    assert record["val_psnr"] == psnr
    assert record["settings"]["steps"] == 30
    assert [p.name for p in out.parent.iterdir() if "partial" in p.name] == []


def test_psnr_is_that_of_a_data_range_of_1(trained):
    sources, out, _ = trained
    manifest = load_manifest(sources[0], split="val")
    pixels = cv2.imread(str(manifest.path(0)), cv2.IMREAD_UNCHANGED) / 65535
    autoencoder = load_autoencoder(str(out))
    back = autoencoder.decode(autoencoder.encode(torch.from_numpy(2 * pixels - 1).float()[None]))[0].numpy()
    error = np.mean((pixels - (back + 1) / 2) ** 2)
    assert reconstruction_psnr(autoencoder, manifest) == pytest.approx(-10 * np.log10(error), abs=1e-3)


def test_equal_seeds_give_equal_bytes_and_others_do_not(trained, tmp_path):
    sources, out, _ = trained
    name = "diffusion_pytorch_model.safetensors"
    train_autoencoder(sources, tmp_path / "again", SETTINGS)
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    settings = AutoencoderTraining(**{**vars(SETTINGS), "steps": 2, "seed": 1})
    train_autoencoder(sources[:1], tmp_path / "one", settings)
    train_autoencoder(sources[:1], tmp_path / "two", AutoencoderTraining(**{**vars(settings), "seed": 2}))
    assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "two" / name).read_bytes()


def test_no_crop_of_one_step_comes_again_in_the_next(tmp_path):
    """Philox streams one counter apart overlap: 11,084 of 28,800 crops of a training were repeats once."""
    folder = make_dataset(tmp_path, "cells", count=8, side=256)
    manifest = load_manifest(folder, split="train")
    batches = [training._batch([manifest], SETTINGS, step) for step in range(60)]
    # gain and orientation are drawn anew, so crops are compared by sorted pixels over their largest
    found = set()
    for crop in torch.cat(batches).numpy():
        unit = np.sort((crop + 1).ravel())
        found.add(tuple(np.round(unit[:: len(unit) // 8] / unit[-1], 4)))
    assert len(found) > 0.98 * 120


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    manifest = load_manifest(make_dataset(tmp_path, "cells"), split="train")
    one = training._batch([manifest], SETTINGS, 7)
    assert one.shape == (2, 1, 32, 32)
    assert one.min() >= -1
    assert one.max() <= 1
    assert torch.equal(one, training._batch([manifest], SETTINGS, 7))
    assert not torch.equal(one, training._batch([manifest], SETTINGS, 8))


def test_every_data_set_is_drawn_equally_often_whatever_its_size(tmp_path):
    bright, dark = (make_dataset(tmp_path, name, count=n, val=()) for name, n in (("a", 20), ("b", 2)))
    for folder, level in ((bright, 1.0), (dark, 0.0)):
        for path in (folder / "images").iterdir():
            write_tile(path, np.full((64, 64), level))
    manifests = [load_manifest(folder, split="train") for folder in (bright, dark)]
    batches = torch.cat([training._batch(manifests, SETTINGS, step) for step in range(100)])
    share = float((batches.amax(dim=(1, 2, 3)) == -1).float().mean())
    assert share == pytest.approx(0.5, abs=0.12)  # 200 draws: three standard deviations are 0.106


def refused(sources, out, found, settings=SETTINGS):
    """UserError at once: no step is taken, nothing is written."""
    with pytest.raises(UserError, match=found):
        train_autoencoder(sources, out, settings)
    assert not out.with_name(out.name + ".partial").exists()


def test_an_existing_out_is_refused(trained, tmp_path):
    sources, out, _ = trained
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(sources, out, "exists already; give a new folder to --out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_missing_validation_tiles_are_noticed_before_training(tmp_path):
    source = make_dataset(tmp_path, "cells", val=())
    refused([source], tmp_path / "vae", r"val\.csv: found no tiles")


def test_missing_training_tiles_are_noticed(tmp_path):
    source = make_dataset(tmp_path, "cells", val=range(6))
    refused([source], tmp_path / "vae", r"train\.csv: found no tiles")


def test_a_lost_validation_tile_is_noticed_before_training(tmp_path):
    source = make_dataset(tmp_path, "cells")
    (source / "images" / "5.png").unlink()
    refused([source], tmp_path / "vae", r"1 of 1 tiles cannot be used.*5\.png")


def test_tiles_smaller_than_a_crop_are_noticed_before_training(tmp_path):
    source = make_dataset(tmp_path, "cells", side=24)
    refused([source], tmp_path / "vae", r"5 tiles have a height below 32 px .*give a smaller --crop")


def test_tiles_of_unknown_size_smaller_than_a_crop_are_named(tmp_path):
    source = make_dataset(tmp_path, "cells", side=24, sizes=False)
    with pytest.raises(UserError, match=r"\d\.png is 24x24 px, smaller than --crop 32"):
        train_autoencoder([source], tmp_path / "vae", SETTINGS)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ({"crop": 100}, "--crop 100 is not a multiple of 8"),
        ({"crop": 0}, "--crop 0 is not a number above 0"),
        ({"batch_size": 0}, "--batch-size 0 is not a number above 0"),
        ({"steps": -1}, "--steps -1 is not a number above 0"),
    ],
)
def test_impossible_settings_are_refused(setting, found):
    with pytest.raises(UserError, match=found):
        AutoencoderTraining(**setting)


def test_a_manifest_file_without_a_manifests_folder_trains(tmp_path):
    """Its validation tiles lie in the CSV beside it, wherever that is."""
    folder = make_dataset(tmp_path, "cells")
    for path in (folder / "manifests").iterdir():
        path.rename(folder / path.name)
    (folder / "manifests").rmdir()
    settings = AutoencoderTraining(**{**vars(SETTINGS), "steps": 1})
    assert list(train_autoencoder([folder / "manifest.csv"], tmp_path / "vae", settings)) == ["cells"]
