"""A Hugging Face depth model gives the hint what it gives to anybody; what does not load is told in one sentence."""

import builtins
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from ray_pipeline.data.hint_registry import hint_fingerprint, make_hint, resolve_hints
from ray_pipeline.errors import UserError
from ray_pipeline.models.depth import load_depth_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A GLPN of random weights, and its image processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GLPNConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, max_depth=10,
        )  # fmt: skip
        network = transformers.GLPNForDepthEstimation(config)
    path = tmp_path_factory.mktemp("depth") / "glpn"
    network.save_pretrained(path)
    transformers.GLPNImageProcessor(size_divisor=32).save_pretrained(path)
    return str(path)


@pytest.fixture
def unit() -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.random((96, 96)).astype(np.float32), (0, 0), 4)


def test_the_hint_is_what_the_model_gives_for_the_grey_tile_on_its_own_scale(folder, unit):
    image = np.repeat(np.rint(255 * unit).astype(np.uint8)[..., None], 3, axis=2)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    network = transformers.AutoModelForDepthEstimation.from_pretrained(folder).eval()
    with torch.no_grad():
        depth = network(**processor(images=image, return_tensors="pt")).predicted_depth
    depth = torch.nn.functional.interpolate(depth[None], (96, 96), mode="bilinear", align_corners=False)[0, 0].numpy()
    assert np.ptp(depth) > 0
    expected = (depth - depth.min()) / np.ptp(depth)
    found = load_depth_model(folder).estimate(unit)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    settings = resolve_hints({"depth": {"model": folder}}, ["depth"])
    tile = 2 * unit - 1
    np.testing.assert_allclose(make_hint("depth", tile, None, "a", 0, settings), 2 * expected - 1, atol=1e-3)
    partner = tile[::-1].copy()  # depth from focus goes before any model
    np.testing.assert_array_equal(make_hint("depth", tile, partner, "a", 0, settings), partner)


def test_an_image_without_relief_has_a_middle_depth(folder):
    model = load_depth_model(folder)
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        for tensor in model.network.parameters():
            tensor.zero_()
        found = model.estimate(np.full((64, 64), 0.3, np.float32))
        model.network.load_state_dict(before)
    np.testing.assert_array_equal(found, np.full((64, 64), 0.5, np.float32))


def test_fingerprint_follows_weights_and_processor_and_not_the_folder(folder, tmp_path):
    def of(path) -> str:
        return hint_fingerprint("depth", {"model": str(path)})["model"]

    network = transformers.AutoModelForDepthEstimation.from_pretrained(folder)
    network.save_pretrained(tmp_path / "same")
    network.save_pretrained(tmp_path / "resized")
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3
    network.save_pretrained(tmp_path / "other")
    for name, divisor in (("same", 32), ("other", 32), ("resized", 64)):
        transformers.GLPNImageProcessor(size_divisor=divisor).save_pretrained(tmp_path / name)
    assert of(tmp_path / "same") == of(folder)
    assert len({of(folder), of(tmp_path / "other"), of(tmp_path / "resized")}) == 3


def test_threads_that_ask_at_once_get_one_model(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)  # not loaded yet under this name
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load_depth_model, [str(tmp_path / "model")] * 4))
    assert len({id(model) for model in models}) == 1


def test_a_local_folder_is_found_from_wherever_workers_run(folder, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    resolved = resolve_hints({"depth": {"model": "model"}}, ["depth"])
    assert resolved["depth"]["model"] == str(tmp_path / "model")


def test_without_transformers_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as error:
        load_depth_model("some/model")
    assert str(error.value) == (
        "data.hints.depth.model=some/model needs transformers; install it with pip install 'ray-pipeline[depth]'"
    )


@pytest.mark.parametrize("damage", ["no folder", "empty", "weights", "autoencoder"])
def test_what_is_no_depth_model_is_told_in_one_sentence(folder, tiny_autoencoder, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "model"
    said = "does not load as a depth-estimation model"
    if damage == "no folder":
        said = "no such folder; correct the path or give a hub id"
    elif damage == "autoencoder":
        path = tiny_autoencoder
    else:
        path.mkdir()
        if damage == "weights":
            for name in ("config.json", "preprocessor_config.json"):
                (path / name).write_bytes((tmp_path / folder / name).read_bytes())
    with pytest.raises(UserError, match=said) as error:
        load_depth_model(str(path))
    assert str(error.value).startswith(f"data.hints.depth.model={path}")
    assert "\n" not in str(error.value)
