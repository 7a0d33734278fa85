"""The autoencoder that comes with the package: small, alive in every channel, smooth, and good on real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from ray_pipeline.data.images import open_image
from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.models.autoencoder import embedded_folder, load_autoencoder

SHARED = Path(__file__).parents[3] / "shared"
W2S = SHARED / "data" / "w2s_pairs" / "clean_avg400"
TAESDXL = SHARED / "vae" / "taesdxl"

needs_shared = pytest.mark.skipif(
    not (W2S.is_dir() and TAESDXL.is_dir()), reason=f"real images or the comparison autoencoder are not in {SHARED}"
)


@pytest.fixture(scope="module")
def embedded():
    return load_autoencoder("embedded", latent_channels=4)


@pytest.fixture(scope="module")
def taesdxl():
    return load_autoencoder(str(TAESDXL))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Eight simulated fields (8, 256, 256), two of each stain."""
    found = simulate(tmp_path_factory.mktemp("fields"), fields=8, seed=1234, field_size=256, tile_size=256)
    paths = sorted((found.foundation / "images").iterdir())
    assert len(paths) == 8
    return torch.from_numpy(np.stack([read_tile(path) for path in paths]))


@pytest.fixture(scope="module")
def real():
    """All clean fields of real cells (20, 512, 512). All: between fields the PSNR has a standard deviation of 3.6 dB,
    so that a mean over a few of them says which were picked."""
    paths = sorted(W2S.glob("*.tif"))
    assert len(paths) == 20
    pixels = np.stack([open_image(path).plane(0, 0, 0) for path in paths])
    assert pixels.dtype == np.uint8
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


def mean_psnr(autoencoder, tiles):
    """Mean over the tiles of the reconstruction PSNR, dB, data range 1."""
    scores = []
    for tile in tiles:
        back = autoencoder.decode(autoencoder.encode(tile[None]))[0]
        scores.append(peak_signal_noise_ratio(*((image.numpy() + 1) / 2 for image in (tile, back)), data_range=1.0))
    return float(np.mean(scores))


def shift_change(autoencoder, tiles):
    """Relative change of the latents, normalised per channel, when the tile moves by one pixel; rows and columns."""
    latents = autoencoder.encode(tiles[:, 8:-8, 8:-8])
    scale = latents.std(dim=(0, 2, 3), keepdim=True)
    changes = [autoencoder.encode(moved) - latents for moved in (tiles[:, 9:-7, 8:-8], tiles[:, 8:-8, 9:-7])]
    return float((torch.stack(changes) / scale).square().mean().sqrt())


def test_it_takes_at_most_3_mb():
    sizes = {path.name: path.stat().st_size for path in embedded_folder().iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) <= 3e6


def test_all_four_latent_channels_are_alive(embedded, simulated):
    std = embedded.encode(simulated).std(dim=(0, 2, 3))
    assert std.shape == (4,)
    assert (std >= 0.05 * std.max()).all()


def test_no_latent_channel_repeats_another(embedded, simulated):
    channels = embedded.encode(simulated).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(channels) - torch.eye(4)
    assert correlation.abs().max() < 0.98


def test_it_returns_simulated_fields_at_35_db(embedded, simulated):
    assert mean_psnr(embedded, simulated) >= 35


def test_fp16_weights_are_finite_and_latents_stay_in_range(embedded, simulated):
    """AutoencoderTiny's decoder saturates at latents of 3 (tanh(x / 3) * 3)."""
    assert all(torch.isfinite(p).all() for p in embedded.network.parameters())
    assert embedded.encode(simulated).abs().quantile(0.999) < 3


@needs_shared
def test_latents_move_no_more_under_a_one_pixel_shift_than_taesdxl_s(embedded, taesdxl, real):
    parts = real[:3, 128:384, 128:384]  # one of each channel
    assert shift_change(embedded, parts) <= 1.2 * shift_change(taesdxl, parts)


@needs_shared
def test_it_returns_real_clean_fields_at_38_db(embedded, real):
    assert mean_psnr(embedded, real) >= 38


@needs_shared
def test_it_returns_simulated_fields_better_than_taesdxl(embedded, taesdxl, simulated):
    assert mean_psnr(embedded, simulated) > mean_psnr(taesdxl, simulated)
