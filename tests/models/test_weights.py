"""Weights say what they are: what is written is read back to the bit, and anything else is refused by its file."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import build_dit
from ray_pipeline.models.weights import METADATA_KEY, header_in, load_weights_file, save_weights

SIZES = {"latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
KINDS = {
    "plain": {},
    "aligned": {"aligned": True},
    "lora": {"lora_rank": 3, "lora_targets": ("x_embedder", "qkv", "fc1")},
    "aligned lora": {"aligned": True, "lora_rank": 2, "lora_targets": ("proj",)},
    "fourier": {"noise_embedding": "fourier"},
    "qk_norm": {"qk_norm": True, "noise_embedding": "reference"},
}
INTENSITY = {"dataset": "a", "role": "tile", "channel": 1, "dtype": "uint16", "low": -0.1, "high": 1e4 / 3, "tiles": 7}


def make_network(**overrides):
    torch.manual_seed(0)
    network = build_dit("custom", **SIZES, **overrides).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return network


@pytest.fixture
def header(header_for):
    """A header whose every field differs from its default."""
    return header_for(
        make_network(aligned=True, lora_rank=3, lora_targets=("qkv",)),
        phase="hints",
        step=1234,
        edm={"sigma_data": 0.6, "P_mean": -0.4, "prediction_type": "epsilon"},
        latents={"mean": [0.1, -1 / 3, 1e-9, 5.0], "std": [1.0, 2.0, 0.7, 1e3], "count": 10, "fingerprint": "abc"},
        autoencoder={"pretrained": "some/folder with \u00e9", "sha256": "0" * 64},
        intensity=[INTENSITY],
        hints={"canny": {"sigma": 1.5}, "denoising": {}},
        ema="ema_decay_0.9999",
    )


@pytest.fixture
def saved(tmp_path, header):
    """A file with weights."""
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": torch.arange(1000.0)}, header)
    return path


def test_tensors_and_header_come_back_to_the_bit(tmp_path, header):
    network = make_network(aligned=True, lora_rank=3, lora_targets=("qkv",))
    tensors = {
        **network.state_dict(),
        "half": torch.randn(5).half(),
        "transposed": torch.randn(3, 5).t(),
        "number": torch.tensor(3.0, requires_grad=True),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = tmp_path / "new" / "folder" / "w.safetensors"
    save_weights(str(path), tensors, header)
    for location in (path, str(path)):
        found, loaded = load_weights_file(location)
        assert found == header
        assert found.model_dump() == header.model_dump()
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert loaded[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes(), name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_is_replaced_as_a_whole(saved, header):
    later = header.model_copy(update={"step": 5000})
    save_weights(saved, {"other": torch.ones(2)}, later)
    found, tensors = load_weights_file(saved)
    assert (found.step, list(tensors)) == (5000, ["other"])


def test_the_header_in_a_checkpoint_is_the_same(header):
    state = json.loads(json.dumps({"step": 3, "weights": header.model_dump(mode="json")}))
    assert header_in(state, "a.ckpt") == header
    with pytest.raises(UserError, match=r"^a\.ckpt does not say what its weights are .* give a checkpoint folder"):
        header_in({"step": 3}, "a.ckpt")
    state["weights"]["latents"].pop("std")
    with pytest.raises(UserError, match=r"^a\.ckpt: its metadata is damaged or of another version .*latents\.std"):
        header_in(state, "a.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_builds_the_network_that_its_weights_fit(tmp_path, header_for, kind):
    network = make_network(**KINDS[kind])
    save_weights(tmp_path / "w.safetensors", network.state_dict(), header_for(network))
    header, tensors = load_weights_file(tmp_path / "w.safetensors")
    built = header.build_network().eval()
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in network.state_dict().items()}
    assert built.shape == network.shape
    built.load_state_dict(tensors)
    generator = torch.Generator().manual_seed(1)
    x, hints = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        for given in (None, hints):
            output = built(x, torch.tensor([-1.0, 0.5]), given)
            assert torch.equal(output, network(x, torch.tensor([-1.0, 0.5]), given))


def test_the_header_builds_the_diffusion_process(header):
    edm = header.build_edm()
    assert (edm.sigma_data, edm.P_mean, edm.P_std, edm.prediction_type) == (0.6, -0.4, 1.2, "epsilon")


def rewrite(path, change):
    """The same tensors with other metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()[METADATA_KEY])
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata={METADATA_KEY: change(values)})


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "another writer's"])
def test_a_file_without_our_metadata_is_refused(tmp_path, metadata):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(UserError, match=rf"^{path} does not say what its weights are .*{METADATA_KEY}.*; give"):
        load_weights_file(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda values: json.dumps(values)[:-20], "char"),
        (lambda values: "", "Expecting value"),
        (lambda values: "[]", "valid dictionary"),
        (lambda values: json.dumps(values | {"version": 2}), "version"),
        (lambda values: json.dumps({k: v for k, v in values.items() if k != "edm"}), "edm Field required"),
        (lambda values: json.dumps(values | {"novel": 1}), "novel Extra inputs"),
        (lambda values: json.dumps(values | {"step": "many"}), "step"),
        (lambda values: json.dumps(values | {"intensity": [INTENSITY | {"low": None}]}), "intensity.0.low"),
    ],
    ids=["cut off", "empty", "a list", "version", "missing", "unknown", "wrong type", "inside"],
)
def test_damaged_metadata_and_another_version_are_refused(saved, change, found):
    rewrite(saved, change)
    with pytest.raises(UserError, match=rf"^{saved}: its metadata is damaged or of another version .*; give") as error:
        load_weights_file(saved)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 a pickled checkpoint" * 50),
        lambda path: path.write_text("weights: none\n"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["truncated", "header cut off", "empty", "pickle", "text", "missing", "folder"],
)
def test_what_is_no_safetensors_file_is_refused(saved, damage):
    damage(saved)
    with pytest.raises(UserError, match=rf"^{saved} is no safetensors file \(.+\); give a checkpoint folder") as error:
        load_weights_file(saved)
    assert "\n" not in str(error.value)
