"""Hints given as images are what training would have stored of them, and reach the network; so do strength and
guidance."""

import json

import cv2
import numpy as np
import pytest
import tifffile
import torch
from diffusers import AutoencoderTiny, EDMEulerScheduler

from ray_pipeline.data import optics
from ray_pipeline.data.hint_registry import make_hint, resolve_hints
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.inference.hint_images import HintReader, stored_latents
from ray_pipeline.models.autoencoder import embedded_folder, load_autoencoder

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
HINTS = ("super_resolution", "denoising", "canny", "depth")


def pixels(folder, name):
    return tifffile.imread(folder / name)


def counts_apart(one, other):
    return int(np.abs(one.astype(np.int64) - other.astype(np.int64)).max())


def field(seed, size=64, low=90, high=3500):
    """A smooth field with spots, as 16-bit counts from below `low` to above `high`."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.random((size, size)), (0, 0), 2.5)
    unit = (smooth - smooth.min()) / np.ptp(smooth)
    return np.rint(low - 20 + unit * (high - low + 60)).astype(np.uint16)


def as_tile(counts, low, high):
    """What `prepare` makes of pixels, by the definition of a tile: 16 bits between low and high."""
    unit = np.clip((counts.astype(np.float64) - low) / (high - low), 0, 1)
    return (2 * np.rint(unit * 65535) / 65535 - 1).astype(np.float32)


def hint_latents(images, mean, std):
    """(K, H, W) in [-1, 1] -> (1, K, C, h, w) as training gets them: fp16 on disk, then normalised to 0.5."""
    network = AutoencoderTiny.from_pretrained(embedded_folder()).eval()
    with torch.no_grad():
        stored = torch.cat([network.encode(torch.from_numpy(image)[None, None]).latents for image in images]).half()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return ((stored.double() - mean) / std * 0.5).float()[None]


def euler_of_diffusers(estimate, noise):
    """estimate: (x scaled, c_noise, x, sigma) -> the network's output."""
    scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(STEPS)
    x = noise * scheduler.sigmas[0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = estimate(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
            x = scheduler.step(output, timestep, x).prev_sample
    return x


def header_statistics(weights):
    return weights.header.latents.mean, weights.header.latents.std


def expected_counts(decoded, low=100, high=4100):
    return np.clip(low + decoded * (high - low), 0, 65535)


@pytest.fixture
def noisy(tmp_path):
    path = tmp_path / "noisy.tif"
    tifffile.imwrite(path, field(0))
    return path


def test_a_tile_with_a_hint_is_the_network_s_with_the_latents_that_encode_would_store(
    write_weights, sample, noise_of, decoded_by_diffusers, noisy
):
    """The recorded range of the data set's denoising partners, not of its tiles, and not simulated whatever the
    settings say."""
    settings = {"denoising": {"simulated_share": 1.0}}
    weights = write_weights(hints=("canny", "denoising"), settings=settings)
    words = ("--hint", f"denoising={noisy}", "--seeds", 5, "--batch-size", 1, "--dataset", "cells", "--channel", 0)
    folder, text = sample(weights, *words)
    hints = hint_latents([as_tile(field(0), 90, 3500)], *header_statistics(weights))
    latents = euler_of_diffusers(lambda x, c: weights.network(x, c, hints), noise_of([5]))
    (decoded,) = decoded_by_diffusers(latents)
    found = pixels(folder, "noisy_seed_00005.tif")
    assert np.abs(found - expected_counts(decoded)).max() <= 2
    without, _ = sample(weights, *words[2:], out="without")
    assert counts_apart(found, pixels(without, "seed_00005.tif")) > 50
    assert "written as float32" not in text


def test_each_kind_of_hint_is_made_as_encode_makes_it(write_weights, sample, noise_of, decoded_by_diffusers, tmp_path):
    """All four at once, in another order than the header's: low resolution upsampled, edges from an image, depth as it
    is (no range was recorded of depth, so its own)."""
    settings = {"canny": {"sigma": 0.7, "floor": 5.0}, "super_resolution": {"simulated_share": 0.5}}
    weights = write_weights(hints=HINTS, settings=settings)
    small, depth = field(1, 16), np.linspace(0.2, 0.9, 64 * 64, dtype=np.float32).reshape(64, 64)
    tifffile.imwrite(tmp_path / "small.tif", small)
    tifffile.imwrite(tmp_path / "noisy.tif", field(2))
    cv2.imwrite(str(tmp_path / "edges.png"), field(3))
    np.save(tmp_path / "depth.npy", depth)
    given = {"depth": "depth.npy", "canny": "edges.png", "super_resolution": "small.tif", "denoising": "noisy.tif"}
    words = [word for name, path in given.items() for word in ("--hint", f"{name}={tmp_path / path}")]
    folder, _ = sample(weights, *words, "--seeds", 1, "--batch-size", 1, "--dataset", "cells", "--channel", 0)
    low_res = as_tile(small, 100, 4100)  # no range was recorded of such partners: that of the tiles
    low, high = np.percentile(depth, (0.1, 99.9))
    images = [
        2 * optics.upsample(((low_res + 1) / 2).astype(np.float32), 4) - 1,
        as_tile(field(2), 90, 3500),
        make_hint("canny", as_tile(field(3), 100, 4100), None, "x", 0, resolve_hints(settings, ["canny"])),
        as_tile(depth, low, high),
    ]
    assert len(np.unique(images[2])) == 2  # edges there are
    hints = hint_latents(images, *header_statistics(weights))
    latents = euler_of_diffusers(lambda x, c: weights.network(x, c, hints), noise_of([1]))
    (decoded,) = decoded_by_diffusers(latents)
    found = pixels(folder, "small_seed_00001.tif")
    assert np.abs(found - expected_counts(decoded)).max() <= 2


def test_a_stored_hint_and_the_same_image_on_the_command_line_give_the_same_tile(
    write_weights, sample, noise_of, decoded_by_diffusers, tiny_data, job_for, run_job_here, tmp_path
):
    """Against a store that `encode` made of a data root; --intensity tile: its partners are tiles already."""
    changes = {"store": tmp_path / "latents", "autoencoder": "embedded"}
    job = job_for(tiny_data, "super_resolution", "denoising", **changes)
    run_job_here(job)
    store, row = LatentStore.open(job.store), list_tiles(job).rows["train"][3]
    latents = {"mean": store.stats.mean.tolist(), "std": store.stats.std.tolist(), "count": 1, "fingerprint": "f"}
    intensity = [entry.model_dump() for entry in store.intensity]
    weights = write_weights(
        hints=job.hints, settings=job.hint_settings, latents=latents, ranges=intensity,
        autoencoder=store.autoencoder.model_dump(),
    )  # fmt: skip
    words = [w for name in job.hints for w in ("--hint", f"{name}={tiny_data / row.partners[name][0]}")]
    folder, _ = sample(weights, *words, "--intensity", "tile", "--seeds", 2, "--batch-size", 1)
    gathered = store.gather([3])
    reader = HintReader(
        {name: tiny_data / row.partners[name][0] for name in job.hints}, weights.header, 64, "tile", None
    )
    again = stored_latents(load_autoencoder("embedded"), reader.read(0).hints, "it")
    for name, latent in zip(job.hints, again, strict=True):
        assert latent.dtype == np.float16
        # the last place of fp16, since another batch is rounded otherwise
        np.testing.assert_allclose(latent, gathered[f"hint.{name}"][0], rtol=2**-10, atol=1e-6)
    stacked = np.stack([gathered[f"hint.{name}"] for name in job.hints], axis=1).astype(np.float64)
    mean, std = store.stats.mean[:, None, None], store.stats.std[:, None, None]
    hints = torch.from_numpy((stacked - mean) / std * 0.5).float()
    made = euler_of_diffusers(lambda x, c: weights.network(x, c, hints), noise_of([2]))
    scaled = made.double() * torch.from_numpy(std) / 0.5 + torch.from_numpy(mean)
    own_mean, own_std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in decoded_by_diffusers.statistics)
    (decoded,) = decoded_by_diffusers((scaled - own_mean) / own_std * 0.5)
    (record,) = json.loads((folder / "sample.json").read_text())["tiles"]
    found = pixels(folder, record["file"]).astype(np.float64)
    expected = np.clip(record["low"] + decoded * (record["high"] - record["low"]), 0, 65535)
    assert np.abs(found - expected).max() <= 4 * (record["high"] - record["low"]) / 4000


def test_an_image_normalised_by_itself_gives_results_in_its_own_units(
    write_weights, sample, noise_of, decoded_by_diffusers, noisy
):
    """The percentiles that `prepare` takes by default."""
    low, high = np.percentile(field(0), (0.1, 99.9))
    for ranges, words in ((None, ("--intensity", "image")), ([], ())):  # the default where nothing is recorded
        kept = {} if ranges is None else {"ranges": ranges}
        weights = write_weights(f"weights{len(words)}", hints=("denoising",), **kept)
        words = (*words, "--hint", f"denoising={noisy}", "--tiles", 1, "--batch-size", 1)
        folder, text = sample(weights, *words, out=f"out{len(words)}")
        hints = hint_latents([as_tile(field(0), low, high)], *header_statistics(weights))
        latents = euler_of_diffusers(lambda x, c: weights.network(x, c, hints), noise_of([0]))  # noqa: B023
        (decoded,) = decoded_by_diffusers(latents)
        found = pixels(folder, "noisy_seed_00000.tif")
        assert np.abs(found - expected_counts(decoded, low, high)).max() <= 2
        assert "units     those of noisy.tif\n" in text


def test_an_image_far_outside_the_recorded_range_is_told(write_weights, sample, tmp_path):
    weights = write_weights(hints=("denoising",))
    tifffile.imwrite(tmp_path / "bright.tif", field(0, low=2000, high=60000))
    words = ("--hint", f"denoising={tmp_path / 'bright.tif'}", "--tiles", 1)
    _, text = sample(weights, *words, "--dataset", "cells", "--channel", 0)
    assert "note      bright.tif: " in text
    assert "% of its pixels lie outside 90 to 3500" in text
    _, text = sample(weights, *words, "--intensity", "image", out="image")
    assert "note" not in text


def test_folders_of_images_give_each_its_tiles_with_its_own_hints(write_weights, sample, tmp_path):
    """Three fields and two seeds; each tile is that of its field alone, and --tiles changes none of them."""
    weights = write_weights(hints=("denoising", "canny"))
    for kind, first in (("noisy", 0), ("edges", 10)):
        (tmp_path / kind).mkdir()
        for number, name in enumerate("cab"):
            tifffile.imwrite(tmp_path / kind / f"{name}.tif", field(first + number))
        (tmp_path / kind / "notes.txt").write_text("no image")
    words = ("--dataset", "cells", "--channel", 0)
    both = ("--hint", f"denoising={tmp_path / 'noisy'}", "--hint", f"canny={tmp_path / 'edges'}")
    folder, _ = sample(weights, *both, "--tiles", 2, *words)
    names = [f"{name}_seed_{seed:05d}.tif" for seed in (0, 1) for name in "abc"]
    assert sorted(path.name for path in folder.glob("*.tif")) == sorted(names)
    fewer, _ = sample(weights, *both, "--tiles", 1, *words, out="fewer")
    assert all((fewer / name).read_bytes() == (folder / name).read_bytes() for name in names[:3])
    alone = [word for kind, name in (("noisy", "denoising"), ("edges", "canny"))
             for word in ("--hint", f"{name}={tmp_path / kind / 'b.tif'}")]  # fmt: skip
    one, _ = sample(weights, *alone, "--tiles", 2, *words, out="alone")
    for seed in (0, 1):
        name = f"b_seed_{seed:05d}.tif"
        assert counts_apart(pixels(one, name), pixels(folder, name)) <= 1
    tiles = [pixels(folder, name) for name in names]
    apart = [counts_apart(tiles[i], tiles[j]) for i in range(6) for j in range(i)]
    assert min(apart) > 10


def test_strength_is_the_network_s_and_1_changes_nothing(write_weights, sample, noise_of, decoded_by_diffusers, noisy):
    weights = write_weights(hints=("denoising",))
    words = ("--hint", f"denoising={noisy}", "--tiles", 1, "--batch-size", 1, "--dataset", "cells", "--channel", 0)
    name = "noisy_seed_00000.tif"
    plain, _ = sample(weights, *words, out="plain")
    one, _ = sample(weights, *words, "--strength", "denoising=1", out="one")
    assert np.array_equal(pixels(one, name), pixels(plain, name))
    weak, _ = sample(weights, *words, "--strength", "denoising=0.25", out="weak")
    assert counts_apart(pixels(weak, name), pixels(plain, name)) > 10
    hints = hint_latents([as_tile(field(0), 90, 3500)], *header_statistics(weights))
    strength = torch.tensor([[0.25]])
    latents = euler_of_diffusers(lambda x, c: weights.network(x, c, hints, hint_strength=strength), noise_of([0]))
    (decoded,) = decoded_by_diffusers(latents)
    assert np.abs(pixels(weak, name) - expected_counts(decoded)).max() <= 2


def test_guidance_on_hints_is_against_the_network_without_them(
    write_weights, sample, noise_of, decoded_by_diffusers, noisy
):
    """In v-prediction the denoised estimate is linear in the output, so outputs may be combined. The interval takes the
    last two of four steps in, and only these call the network a second time."""
    weights = write_weights(hints=("denoising",))
    words = ("--hint", f"denoising={noisy}", "--tiles", 1, "--batch-size", 1, "--dataset", "cells", "--channel", 0)
    hints = hint_latents([as_tile(field(0), 90, 3500)], *header_statistics(weights))
    for interval, levels in ((), (0.0, np.inf)), ((0, 1), (0.0, 1.0)):

        def estimate(x, c, levels=levels):
            output = weights.network(x, c, hints)
            inside = levels[0] < float(torch.exp(4 * c[0])) <= levels[1]
            return weights.network(x, c) + 2.5 * (output - weights.network(x, c)) if inside else output

        more = ("--guidance-interval", *interval) if interval else ()
        folder, text = sample(weights, *words, "--guidance", 2.5, *more, out=f"out{len(interval)}")
        (decoded,) = decoded_by_diffusers(euler_of_diffusers(estimate, noise_of([0])))
        found = pixels(folder, "noisy_seed_00000.tif")
        assert np.abs(found - expected_counts(decoded)).max() <= 3
        calls = json.loads((folder / "sample.json").read_text())["calls"]
        assert calls == {"network": STEPS, "guide": 2 if interval else STEPS}
        assert f"{STEPS} of the network for a tile, and {calls['guide']} of the guide" in text


@pytest.mark.parametrize("guide_hints", [(), ("canny",), ("canny", "denoising")])
def test_autoguidance_gives_the_guide_the_hints_that_it_knows(
    write_weights, sample, noise_of, decoded_by_diffusers, noisy, guide_hints
):
    weights = write_weights(hints=("denoising", "canny"))
    guide = write_weights("guide", seed=5, hints=guide_hints, network={"depth": 1})
    words = ("--tiles", 1, "--batch-size", 1, "--dataset", "cells", "--channel", 0, "--guidance", 1.75)
    words += ("--hint", f"denoising={noisy}", "--hint", f"canny={noisy}", "--guide", guide.path)
    folder, _ = sample(weights, *words)
    settings = resolve_hints({}, ["canny"])
    images = {
        "denoising": as_tile(field(0), 90, 3500),
        "canny": make_hint("canny", as_tile(field(0), 100, 4100), None, "x", 0, settings),
    }
    hints = hint_latents([images["denoising"], images["canny"]], *header_statistics(weights))
    known = hint_latents([images[name] for name in guide_hints], *header_statistics(weights)) if guide_hints else None

    def estimate(x, c):
        worse = guide.network(x, c, known)
        return worse + 1.75 * (weights.network(x, c, hints) - worse)

    (decoded,) = decoded_by_diffusers(euler_of_diffusers(estimate, noise_of([0])))
    found = pixels(folder, "noisy_seed_00000.tif")
    assert np.abs(found - expected_counts(decoded)).max() <= 3
    plain, _ = sample(weights, *words[:6], *words[8:12], out="plain")
    assert counts_apart(pixels(plain, "noisy_seed_00000.tif"), found) > 10


def test_a_guide_of_other_weights_of_the_same_checkpoint(write_weights, sample):
    weights = write_weights()
    words = ("--tiles", 1, "--guidance", 2, "--guide", weights.path)
    same, text = sample(weights, *words, out="same")
    plain, _ = sample(weights, "--tiles", 1, out="plain")
    assert counts_apart(pixels(same, "seed_00000.tif"), pixels(plain, "seed_00000.tif")) <= 1
    other, text = sample(weights, *words, "--guide-weights", "model", out="other")
    assert counts_apart(pixels(other, "seed_00000.tif"), pixels(plain, "seed_00000.tif")) > 3
    assert "guide     " in text
    assert "(model)" in text


def test_depth_gives_no_units_to_results(write_weights, sample, tmp_path):
    """With a depth map alone, results are in units of the data set that is asked for, whatever depth is scaled by."""
    weights = write_weights(hints=("depth", "canny"))
    np.save(tmp_path / "depth.npy", np.linspace(0, 1, 64 * 64).reshape(64, 64))
    words = ("--hint", f"depth={tmp_path / 'depth.npy'}", "--tiles", 1)
    for intensity in (("--intensity", "image"), ("--intensity", "data"), ()):
        out = "out" + "".join(intensity)
        folder, text = sample(weights, *words, *intensity, "--dataset", "cells", "--channel", 1, out=out)
        assert "units     cells channel 1 (float32 -0.25 to 1.5); written as float32" in text
        assert pixels(folder, "depth_seed_00000.tif").max() <= 1.5
    both = ("--hint", f"canny={tmp_path / 'depth.npy'}", "--intensity", "image")
    _, text = sample(weights, *words, *both, out="both")
    assert "units     those of depth.npy" in text
