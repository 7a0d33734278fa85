"""What cannot be sampled is told in one sentence, before anything is written."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch

from ray_pipeline.cli import main
from ray_pipeline.models.weights import save_weights
from ray_pipeline.monitoring.phase_state import PhaseState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weights(write_weights):
    return write_weights(hints=("denoising", "super_resolution", "canny", "depth"))


@pytest.fixture
def image(tmp_path):
    """(name, pixels) -> a TIFF; by default a good one."""

    def write(name="good.tif", values=None):
        if values is None:
            values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
        tifffile.imwrite(tmp_path / name, values, photometric="minisblack")
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tiles", 0), "--tiles 0: expected 1 to 1000000"),
        (("--batch-size", 0), "--batch-size 0: expected at least 1"),
        (("--tiles", 2_000_000_000), "--tiles 2000000000: expected 1 to 1000000"),
        (("--steps", 1), "--steps 1: expected 2 to 10000"),
        (("--steps", 10**11), "--steps 100000000000: expected 2 to 10000"),
        (("--seeds", 3, 7, 3), "--seeds: 3 stands there 2 times"),
        (("--seeds", 3, "--tiles", 2), "--seeds names every seed"),
        (("--seeds", 3, "--seed", 0), "--seeds names every seed"),
        (("--churn", -1), "--churn -1.0: expected a finite number"),
        (("--churn", "nan"), "--churn nan: expected a finite number"),
        (("--churn", 1, "--churn-min", 5, "--churn-max", 2), "--churn-min 5.0 --churn-max 2.0: expected"),
        (("--churn", 1, "--churn-noise", 0), "--churn-noise 0.0: expected"),
        (("--churn-noise", 1.1), "no effect without --churn"),
        (("--guidance", "inf"), "--guidance inf: expected a finite"),
        (("--guidance", 2), "--guidance needs something to be guided by"),
        (("--guidance", 2, "--guidance-interval", 3, 3), "--guidance-interval 3.0 3.0: expected"),
        (("--guidance-interval", 1, 3), "--guidance-interval has no effect with --guidance 1"),
        (("--guide-weights", "model"), "--guide-weights without --guide"),
        (("--hint", "canny"), "--hint canny: expected NAME=PATH"),
        (("--hint", "=x.tif"), "--hint =x.tif: expected NAME=PATH"),
        (("--hint", "canny=a", "--hint", "canny=b"), "--hint canny is given twice"),
        (("--hint", "cany=a.tif"), "--hint cany: the weights were trained with the hints denoising, super_resolution"),
        (("--hint", "canny=none.tif"), "none.tif: no such image file"),
        (("--strength", "canny=2"), "--strength canny: there is no --hint canny"),
        (("--intensity", "image"), "--intensity is about hint images"),
        (("--hint", "canny=a", "--intensity", "image", "--dataset", "cells"), "no effect with --intensity image"),
        (
            ("--weights", "ema_power_0.1"),
            "holds no weights 'ema_power_0.1', expected ema or one of model, ema_decay_0.9",
        ),
        (("--weights", "optimizer"), "holds no weights 'optimizer'"),
        (("--dataset", "cell"), "--dataset cell: the weights record no intensities of it, known are: cells channel 0"),
        (("--dataset", "other", "--channel", 1), "--dataset other --channel 1: the weights record no"),
        (("--vae", "/no/such/vae"), "vae.pretrained=/no/such/vae does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_words_that_cannot_be_meant(weights, refused, words, sentence):
    assert sentence in refused(weights, *words)


@pytest.mark.parametrize("strength", ["0", "-1", "inf", "nan", "much"])
def test_a_strength_is_above_0(weights, refused, image, strength):
    said = refused(weights, "--hint", f"canny={image()}", "--strength", f"canny={strength}")
    assert f"--strength canny={strength}: expected a" in said


def test_cuda_where_there_is_none(weights, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine shows no CUDA device" in refused(weights, "--device", "cuda")


@pytest.mark.parametrize(
    ("hint", "values", "sentence"),
    [
        ("denoising", np.zeros((32, 32), np.uint16), "found 32x32 px, expected 64x64 for the hint denoising"),
        ("canny", np.zeros((128, 128), np.uint16), "found 128x128 px, expected 64x64"),
        ("depth", np.zeros((64, 32), np.float32), "found 64x32 px, expected 64x64"),
        ("super_resolution", np.zeros((24, 24), np.uint16), "found 24x24 px, expected 64x64 divided by a whole number"),
        ("super_resolution", np.zeros((16, 32), np.uint16), "found 16x32 px, expected"),
        ("super_resolution", np.zeros((128, 128), np.uint16), "found 128x128 px, expected"),
        ("denoising", np.zeros((3, 64, 64), np.uint16), "expected an image of one plane, found C=3"),
        ("denoising", np.full((64, 64), np.nan, np.float32), "4096 pixels that are NaN"),
        ("denoising", np.zeros((64, 64), np.complex64), "pixels of type complex64"),
    ],
)  # fmt: skip
def test_images_that_are_no_hint(weights, refused, image, hint, values, sentence):
    path = image("wrong.tif", values)
    said = refused(weights, "--hint", f"{hint}={path}")
    assert sentence in said
    assert str(path) in said


def test_a_constant_image_has_no_range_of_its_own(weights, refused, image):
    path = image("flat.tif", np.full((64, 64), 7, np.uint16))
    said = refused(weights, "--hint", f"denoising={path}", "--intensity", "image")
    assert "flat.tif: found a constant image, every pixel is 7" in said


def test_folders_with_no_or_unequal_numbers_of_images(weights, refused, image, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "found no image in this folder" in refused(weights, "--hint", f"canny={tmp_path / 'empty'}")
    (tmp_path / "two").mkdir()
    for name in "ab":
        shutil.copy(image(), tmp_path / "two" / f"{name}.tif")
    said = refused(weights, "--hint", f"canny={tmp_path / 'two'}", "--hint", f"denoising={image()}")
    assert "unequal numbers of images (denoising 1, canny 2)" in said


def test_the_range_of_data_that_is_not_recorded(write_weights, refused, image):
    weights = write_weights(hints=("canny",), ranges=[])
    said = refused(weights, "--hint", f"canny={image()}", "--intensity", "data")
    assert "the weights record no intensities; use --intensity image" in said


def test_another_autoencoder(weights, refused, tiny_autoencoder):
    said = refused(weights, "--vae", tiny_autoencoder)
    assert weights.header.autoencoder.sha256[:12] in said
    assert "give the right one with --vae" in said


def test_weights_that_are_none(weights, refused, tmp_path):
    assert "nothing, expected a checkpoint folder (.ckpt), a .safetensors file" in refused(tmp_path / "nowhere")
    assert "no committed checkpoint" in refused(tmp_path / "no.ckpt")
    assert "is no safetensors file" in refused(tmp_path / "no.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "is no safetensors file" in refused(tmp_path / "text.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "bare.safetensors")
    assert "does not say what its weights are" in refused(tmp_path / "bare.safetensors")
    assert "no run (no config.yaml)" in refused(tmp_path)


def test_a_run_without_a_checkpoint(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("phases: [{name: first, epochs: 1}]\n")
    state = PhaseState()
    state.phase("first")
    state.save(tmp_path / "run" / "phase_state.json")
    assert "has no checkpoint with a validation loss yet" in refused(tmp_path / "run")


def test_a_part_of_a_checkpoint_that_is_no_network(weights, refused):
    for part in ("ema_decay_0.9", "optimizer"):
        said = refused(weights.path / f"{part}.safetensors")
        assert "do not fit the network" in said
        assert f"give {weights.path} and choose among its weights" in said
    assert "holds one kind of weights" in refused(weights.path / "model.safetensors", "--weights", "model")


@pytest.mark.parametrize("group", ["model", "ema_decay_0.9"])
def test_a_damaged_checkpoint(weights, refused, group):
    path = weights.path / f"{group}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert f"checkpoint file {path} was changed after it was saved" in refused(weights)
    path.unlink()
    assert f"checkpoint file {path} is missing" in refused(weights)


@pytest.mark.parametrize("network", [{"hidden_size": 64}, {"depth": 3}, {"hidden_size": 30}, {"unknown": 1}])
def test_a_header_of_another_network_than_the_weights(write_weights, refused, tmp_path, network):
    weights = write_weights()
    header = weights.header.model_copy(update={"network": weights.header.network | network})
    save_weights(tmp_path / "other.safetensors", weights.network.state_dict(), header)
    assert "do not fit the network that they say they are of" in refused(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"autoencoder": {"pretrained": "embedded", "sha256": "b" * 64}}, "its autoencoder is bbbbbbbbbbbb"),
        ({"latents": {"mean": [0] * 4, "std": [1] * 4, "count": 1, "fingerprint": "g"}}, "its latent mean is"),
        ({"edm": {"sigma_data": 1.0}}, "its sigma_data is 1.0, expected 0.5"),
        ({"edm": {"sigma_data": 0.5, "prediction_type": "epsilon"}}, "its prediction_type is epsilon"),
        ({"network": {"latent_size": 16}}, "its latent shape is 4x16x16, expected 4x8x8"),
    ],
)
def test_a_guide_of_something_else(weights, write_weights, refused, changes, sentence):
    guide = write_weights("guide", **changes)
    said = refused(weights, "--guidance", 2, "--guide", guide.path)
    assert sentence in said
    assert f"--guide {guide.path} cannot guide" in said


def test_a_guide_without_guidance(weights, refused):
    assert "--guide has no effect with --guidance 1" in refused(weights, "--guide", weights.path)


def test_a_folder_that_holds_samples_stays_as_it_is(write_weights, sample, tmp_path, capsys):
    weights = write_weights()
    folder, _ = sample(weights, "--tiles", 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["sample", str(weights.path), "--out", str(folder), "--tiles", "2", "--steps", "2"]) == 2
    assert f"--out {folder} holds samples already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tiles_that_are_not_finite_are_told_and_not_written(write_weights, sample, tmp_path, capsys):
    weights = write_weights()
    words = ["sample", str(weights.path), "--out", str(tmp_path / "nan"), "--steps", "8", "--guide", str(weights.path)]
    assert main([*words, "--guide-weights", "model", "--guidance", "1e38", "--seeds", "4"]) == 2
    assert "the tile of seed 4 is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "nan").glob("*.tif"))
