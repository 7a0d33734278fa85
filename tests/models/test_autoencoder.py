"""Autoencoders in diffusers format: grey tiles in, latents out; every wrong folder is refused in one sentence."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder


def tiny(channels=3, latent_channels=4, levels=4, width=8):
    return AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent_channels,
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    )


def kl(channels=3, latent_channels=4, levels=4):
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latent_channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        layers_per_block=1,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved once: {name: folder}; tests that damage one copy it."""
    root = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    made = {"tiny": tiny(), "tiny_grey": tiny(1), "kl": kl(), "kl_16": kl(latent_channels=16), "wide": tiny(width=16)}
    for name, network in made.items():
        network.save_pretrained(root / name)
    return {name: root / name for name in made}


def tiles(batch=2, side=32):
    return torch.rand(batch, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("name", "channels"), [("tiny", 4), ("tiny_grey", 4), ("kl", 4), ("kl_16", 16)])
def test_loads_by_its_own_config_and_makes_tiles_8_times_smaller(folders, name, channels):
    autoencoder = load_autoencoder(str(folders[name]))
    assert autoencoder.latent_channels == channels
    latents = autoencoder.encode(tiles())
    assert latents.shape == (2, channels, 4, 4)
    assert latents.dtype == torch.float32
    back = autoencoder.decode(latents)
    assert back.shape == (2, 32, 32)
    assert back.abs().max() <= 1
    assert not any(p.requires_grad for p in autoencoder.network.parameters())
    assert not autoencoder.network.training


def test_the_grey_channel_is_repeated_for_colour_autoencoders(folders):
    colour = tiles()[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(folders["tiny"]).encode(colour).latents
        torch.testing.assert_close(load_autoencoder(str(folders["tiny"])).encode(tiles()), expected)
        expected = AutoencoderKL.from_pretrained(folders["kl"]).eval().encode(colour).latent_dist.mode()
        torch.testing.assert_close(load_autoencoder(str(folders["kl"])).encode(tiles()), expected)


def test_decoding_averages_the_colours(folders):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        colour = AutoencoderTiny.from_pretrained(folders["tiny"]).decode(latents).sample
    assert colour.std(dim=1).max() > 1e-3
    expected = colour.mean(dim=1).clamp(-1, 1)
    torch.testing.assert_close(load_autoencoder(str(folders["tiny"])).decode(latents), expected)


def test_encoding_is_deterministic(folders):
    autoencoder = load_autoencoder(str(folders["kl"]))
    assert torch.equal(autoencoder.encode(tiles()), autoencoder.encode(tiles()))


def test_bf16_latents_come_as_float32_and_close(folders):
    exact = load_autoencoder(str(folders["tiny"])).encode(tiles())
    rough = load_autoencoder(str(folders["tiny"]), precision="bf16").encode(tiles())
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", ["kl", "kl_16"])
def test_a_sampled_posterior_has_the_mean_and_std_of_diffusers(folders, name):
    colour = tiles()[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folders[name]).eval().encode(colour).latent_dist
    mean, std = load_autoencoder(str(folders[name]), posterior="sample").posterior(tiles())
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    assert std.dtype == torch.float32
    assert std.min() > 0


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_the_mode_comes_without_a_std(folders, name):
    autoencoder = load_autoencoder(str(folders[name]))
    mean, std = autoencoder.posterior(tiles())
    assert std is None
    assert torch.equal(mean, autoencoder.encode(tiles()))


def test_an_autoencoder_without_a_posterior_is_refused_where_it_should_be_sampled(folders):
    said = r"vae\.posterior=sample, but vae\.pretrained=.*tiny is an AutoencoderTiny, .* use vae\.posterior=mode or"
    with pytest.raises(UserError, match=said):
        load_autoencoder(str(folders["tiny"]), posterior="sample")


def copy(folders, name, tmp_path):
    return shutil.copytree(folders[name], tmp_path / name)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def weights_file(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"_class_name": ')


def list_config(folder):
    (folder / "config.json").write_text("[]")


def wrong_class(folder):
    edit_config(folder, _class_name="UNet2DModel")


def missing_weights(folder):
    weights_file(folder).unlink()


def truncated_weights(folder):
    payload = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(payload[: len(payload) // 2])


def truncated_in_the_header(folder):
    weights_file(folder).write_bytes(weights_file(folder).read_bytes()[:100])


def empty_weights(folder):
    weights_file(folder).write_bytes(b"")


def wider_config(folder):
    edit_config(
        folder, encoder_block_out_channels=[16] * 4, decoder_block_out_channels=[16] * 4, block_out_channels=[16] * 4
    )


def deeper_config(folder):
    edit_config(folder, num_encoder_blocks=[1, 1, 1, 2])


def shallower_config(folder):
    edit_config(folder, num_encoder_blocks=[1, 1, 1, 0])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (no_config, r"config\.json is missing; expected a folder in diffusers format"),
        (broken_config, r"config\.json is not a JSON object"),
        (list_config, r"config\.json is not a JSON object"),
        (wrong_class, "names class 'UNet2DModel', expected one of AutoencoderTiny, AutoencoderKL"),
        (missing_weights, r"no diffusion_pytorch_model\.safetensors"),
        (truncated_weights, "does not load as AutoencoderTiny.*take a fresh copy"),
        (truncated_in_the_header, "does not load as AutoencoderTiny.*take a fresh copy"),
        (empty_weights, "does not load as AutoencoderTiny.*take a fresh copy"),
        (wider_config, r"weights do not fit config\.json \(first key: decoder\.\S*\).*same release"),
        (deeper_config, "weights do not fit config.json.*same release"),
        (shallower_config, "weights do not fit config.json.*same release"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folders, tmp_path, damage, found):
    folder = copy(folders, "tiny", tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=found) as caught:
        load_autoencoder(str(folder))
    message = str(caught.value)
    assert message.startswith(f"vae.pretrained={folder}")
    assert "\n" not in message
    assert len(message) < 700


def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path):
    with pytest.raises(UserError, match="does not exist; give a folder in diffusers format, a hub id"):
        load_autoencoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder("embeded")


def test_a_file_is_refused(folders):
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_autoencoder(str(folders["tiny"] / "config.json"))


@pytest.mark.parametrize(("make", "levels", "factor"), [(tiny, 3, 4), (kl, 3, 4), (kl, 5, 16)])
def test_another_number_of_levels_is_refused(tmp_path, make, levels, factor):
    make(levels=levels).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"makes tiles {factor} times smaller, expected 8"):
        load_autoencoder(str(tmp_path / "other"))


def test_another_number_of_latent_channels_than_the_model_s_is_refused(folders):
    with pytest.raises(UserError, match=r"has 16 latent channels, but model\.latent_channels is 4; set .*=16"):
        load_autoencoder(str(folders["kl_16"]), latent_channels=4)
    assert load_autoencoder(str(folders["kl_16"]), latent_channels=16).latent_channels == 16


def test_fingerprint_follows_the_weights_and_not_the_folder(folders, tmp_path):
    original = load_autoencoder(str(folders["tiny"])).fingerprint()
    folder = copy(folders, "tiny", tmp_path)
    assert load_autoencoder(str(folder)).fingerprint() == original
    network = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-6
    network.save_pretrained(folder)
    assert load_autoencoder(str(folder)).fingerprint() != original
    assert load_autoencoder(str(folders["wide"])).fingerprint() != original


def test_fingerprint_follows_what_the_config_changes_in_the_latents(folders, tmp_path):
    original = load_autoencoder(str(folders["tiny"])).fingerprint()
    folder = copy(folders, "tiny", tmp_path)
    edit_config(folder, act_fn="silu")
    other = load_autoencoder(str(folder))
    assert not torch.equal(other.encode(tiles()), load_autoencoder(str(folders["tiny"])).encode(tiles()))
    assert other.fingerprint() != original
