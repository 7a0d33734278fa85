"""Sampling by the command: a tile is a function of its seed, in the units of its data, and says how it was made."""

import json

import numpy as np
import pytest
import tifffile
import torch
from diffusers import EDMEulerScheduler
from PIL import Image

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.data.images import open_image
from ray_pipeline.models.autoencoder import embedded_folder, load_autoencoder
from ray_pipeline.models.dit import DiT
from ray_pipeline.models.weights import save_weights
from ray_pipeline.monitoring.phase_state import BestCheckpoint, PhaseState

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def pixels(folder, *seeds, image=None):
    start = "" if image is None else f"{image}_"
    return np.stack([tifffile.imread(folder / f"{start}seed_{seed:05d}.tif") for seed in seeds])


def counts_apart(one, other):
    return int(np.abs(one.astype(np.int64) - other.astype(np.int64)).max())


def euler_of_diffusers(network, noise, steps=STEPS, **conditions):
    scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    x = noise * scheduler.sigmas[0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep)
            x = scheduler.step(network(scaled, timestep.expand(len(x)), **conditions), timestep, x).prev_sample
    return x


def test_tiles_are_those_of_diffusers_scheduler_and_autoencoder_in_units_of_the_data(
    write_weights, sample, noise_of, decoded_by_diffusers
):
    """The range is that of the data set with the most tiles: `other`, 3 to 250, 8 bit."""
    weights = write_weights()
    folder, text = sample(weights, "--seeds", 3, 7, "--batch-size", 2)
    units = decoded_by_diffusers(euler_of_diffusers(weights.network, noise_of([3, 7])))
    found = pixels(folder, 3, 7)
    assert found.dtype == np.uint16
    assert np.abs(found - (3 + units * 247)).max() <= 1
    assert np.ptp(found.astype(int)) > 60  # not all clipped to one end
    assert "units     other channel 0 (uint8 3 to 250)" in text
    assert "cells channel 0" in text
    assert f"calls     {STEPS} of the network for a tile\n" in text


def test_a_tile_depends_on_its_seed_alone(write_weights, sample):
    """Equal bits whatever --tiles; with another batch or place in it the rounding of sums may differ, by a count."""
    weights = write_weights()
    words = ("--dataset", "cells", "--channel", 0)
    five, _ = sample(weights, "--tiles", 5, "--seed", 3, *words, out="five")
    expected = pixels(five, 3, 4, 5, 6, 7)
    assert counts_apart(expected[0], expected[1]) > 500
    one, _ = sample(weights, "--tiles", 1, "--seed", 3, *words, out="one")
    assert np.array_equal(pixels(one, 3), expected[:1])
    assert (one / "seed_00003.tif").read_bytes() == (five / "seed_00003.tif").read_bytes()
    for out, others in {
        "batch 1": ("--batch-size", 1, "--tiles", 5, "--seed", 3),
        "batch 3": ("--batch-size", 3, "--tiles", 5, "--seed", 3),
        "order": ("--seeds", 7, 6, 5, 4, 3),
    }.items():
        folder, _ = sample(weights, *others, *words, out=out)
        assert counts_apart(pixels(folder, 3, 4, 5, 6, 7), expected) <= 1, out


def test_every_batch_is_full(write_weights, sample):
    """On some devices a tile of a smaller batch is rounded otherwise; here only the batches tell."""
    batches = []

    def note(module, inputs):
        if isinstance(module, DiT):
            batches.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        sample(write_weights(), "--tiles", 5, "--batch-size", 4)
    finally:
        hook.remove()
    assert batches == [4] * 2 * STEPS


def churned_euler(network, noise, fresh, s_churn, s_tmax, s_noise, steps=STEPS):
    """Algorithm 2 of Karras et al. 2022 without its second-order lines, in float64 but for the network."""
    ramp = np.arange(steps) / (steps - 1)
    sigmas = [*((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7), 0.0]
    x = noise.double() * sigmas[0]
    for step in range(steps):
        sigma = sigmas[step]
        gamma = min(s_churn / steps, 2**0.5 - 1) if sigma <= s_tmax else 0.0
        raised = sigma * (1 + gamma)
        x = x + (raised**2 - sigma**2) ** 0.5 * s_noise * fresh(step).double()
        total = raised**2 + 0.25
        with torch.no_grad():
            output = network((x / total**0.5).float(), torch.tensor([np.log(raised) / 4] * len(x), dtype=torch.float32))
        denoised = 0.25 / total * x - raised * 0.5 / total**0.5 * output.double()
        x = x + (sigmas[step + 1] - raised) * (x - denoised) / raised
    return x


def test_churn_is_keyed_by_seed_and_step(write_weights, sample, noise_of, decoded_by_diffusers):
    weights = write_weights()
    words = ("--churn", 2, "--churn-max", 50, "--churn-noise", 1.01, "--dataset", "cells", "--channel", 0)
    folder, _ = sample(weights, "--seeds", 4, 2, "--batch-size", 2, *words)

    def fresh(step):
        return noise_of([4, 2], "sample churn", step)

    latents = churned_euler(weights.network, noise_of([4, 2]), fresh, 2, 50, 1.01)
    assert np.abs(pixels(folder, 4, 2) - np.clip(100 + 4000 * decoded_by_diffusers(latents), 0, 65535)).max() <= 2
    other, _ = sample(weights, "--seeds", 2, "--batch-size", 1, *words, out="other")
    assert counts_apart(pixels(other, 2), pixels(folder, 2)) <= 1
    plain, _ = sample(weights, "--seeds", 2, *words[-4:], out="plain")
    assert counts_apart(pixels(plain, 2), pixels(folder, 2)) > 50


def test_heun_is_the_default_and_takes_two_calls_a_step_but_for_the_last(write_weights, tmp_path, sample):
    weights = write_weights()
    heun, text = sample(weights, "--tiles", 2, "--sampler", "heun", out="heun")
    assert f"calls     {2 * STEPS - 1} of the network for a tile\n" in text
    euler, _ = sample(weights, "--tiles", 2, out="euler")
    assert counts_apart(pixels(heun, 0, 1), pixels(euler, 0, 1)) > 0
    record = json.loads((heun / "sample.json").read_text())
    assert record["calls"] == {"network": 7, "guide": 0}
    assert record["sampler"]["sampler"] == "heun"


@pytest.mark.parametrize(
    ("ranges", "words", "dtype", "low", "high"),
    [
        (None, ("--dataset", "cells"), np.uint16, 100, 4100),
        (None, ("--dataset", "cells", "--channel", 1), np.float32, -0.25, 1.5),
        ([("uint32", 0, 1e6)], (), np.float32, 0, 1e6),
        ([("int16", -500, 3000)], (), np.float32, -500, 3000),
        ([("int32", 10, 3000)], (), np.uint16, 10, 3000),
        ([("uint16", -2000, 9000)], (), np.uint16, -2000, 9000),
        ([], (), np.uint16, 0, 65535),
    ],
)
def test_values_invert_the_recorded_range(
    write_weights, sample, noise_of, decoded_by_diffusers, ranges, words, dtype, low, high
):
    if ranges is not None:
        keys = {"dataset": "a", "role": "tile", "channel": 0, "tiles": 1}
        ranges = [keys | {"dtype": kind, "low": lo, "high": hi} for kind, lo, hi in ranges]
    weights = write_weights() if ranges is None else write_weights(ranges=ranges)
    folder, text = sample(weights, "--tiles", 1, "--batch-size", 1, *words)
    (unit,) = decoded_by_diffusers(euler_of_diffusers(weights.network, noise_of([0])))
    (found,) = pixels(folder, 0)
    expected = low + unit * (high - low)
    assert found.dtype == dtype
    if dtype == np.uint16:
        expected = np.clip(expected, 0, 65535)
        assert np.abs(found - expected).max() <= max(1, (high - low) / 4000)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * (high - low))
    assert ("written as float32" in text) == (dtype == np.float32)
    assert ("record no intensities" in text) == (ranges == [])


def test_files_say_how_they_were_made_and_open_as_plain_images(write_weights, sample):
    weights = write_weights()
    folder, text = sample(weights, "--seeds", 12, 5, "--dataset", "cells")
    assert sorted(path.name for path in folder.iterdir()) == [
        "sample.json", "samples.png", "seed_00005.tif", "seed_00012.tif",
    ]  # fmt: skip
    with tifffile.TiffFile(folder / "seed_00012.tif") as file:
        assert len(file.pages) == 1
        assert (file.pages[0].shape, file.pages[0].photometric.name) == ((64, 64), "MINISBLACK")
        described = json.loads(file.pages[0].description)
    assert (described["seed"], described["sampler"], described["steps"]) == (12, "euler", STEPS)
    assert (described["weights_file"], described["weights"]) == (str(weights.path), "ema_decay_0.9")
    assert (described["low"], described["high"]) == (100, 4100)
    image = open_image(folder / "seed_00012.tif")  # as `prepare` would
    assert {axis: size for axis, size in image.sizes.items() if size > 1} == {"Y": 64, "X": 64}
    with Image.open(folder / "samples.png") as picture:
        assert picture.width > 2 * 64
    record = json.loads((folder / "sample.json").read_text())
    assert [tile["seed"] for tile in record["tiles"]] == [12, 5]
    assert record["weights"]["phase"] == "phase1"
    assert (record["weights"]["step"], record["weights"]["weights"]) == (7, "ema_decay_0.9")
    for word in ("weights   ", "units     ", "tiles     ", "picture   ", "record    ", "phase phase1, step 7"):
        assert word in text


def test_ema_raw_and_power_weights_differ_and_ema_is_the_default(write_weights, sample, noise_of, decoded_by_diffusers):
    """A checkpoint that says it has no average is sampled with the weights themselves."""
    weights = write_weights()
    folders = {name: sample(weights, "--weights", name, "--tiles", 1, out=name)[0] for name in (
        "ema", "ema_decay_0.9", "model", "ema_power_0.05",
    )}  # fmt: skip
    tiles = {name: pixels(folder, 0) for name, folder in folders.items()}
    assert np.array_equal(tiles["ema"], tiles["ema_decay_0.9"])
    assert counts_apart(tiles["ema"], tiles["model"]) > 5
    assert counts_apart(tiles["ema"], tiles["ema_power_0.05"]) > 5
    without = write_weights("without", ema=None)
    raw, _ = sample(without, "--tiles", 1, out="without")
    assert np.array_equal(pixels(raw, 0), tiles["model"])


def test_a_file_and_a_run_give_the_tiles_of_their_checkpoint(write_weights, sample, tmp_path):
    weights, other = write_weights(), write_weights("other", seed=1)
    expected, _ = sample(weights, "--tiles", 1, out="checkpoint")
    save_weights(tmp_path / "alone.safetensors", weights.network.state_dict(), weights.header)
    alone, _ = sample(tmp_path / "alone.safetensors", "--tiles", 1, out="alone")
    assert np.array_equal(pixels(alone, 0), pixels(expected, 0))
    part, _ = sample(other.path / "model.safetensors", "--tiles", 1, out="part")
    model, _ = sample(other, "--weights", "model", "--tiles", 1, out="model")
    assert np.array_equal(pixels(part, 0), pixels(model, 0))

    state = PhaseState()
    for phase, checkpoint in (("first", other), ("second", weights)):
        state.phase(phase).best = BestCheckpoint(checkpoint=checkpoint.path.name, val_loss=1.0, epoch=1)
    state.phase("third")  # without a checkpoint yet
    state.save(tmp_path / "run" / "phase_state.json")
    (tmp_path / "run" / "config.yaml").write_text("phases: [{name: first, epochs: 1}]\n")
    run, text = sample(tmp_path / "run", "--tiles", 1, out="from_run")
    assert np.array_equal(pixels(run, 0), pixels(expected, 0))
    assert "one.ckpt" in text


def test_the_optimizer_is_not_read(write_weights, sample):
    weights = write_weights()
    (weights.path / "optimizer.safetensors").unlink()
    sample(weights, "--tiles", 1)
    assert CheckpointStore(weights.path.parent).names() == [weights.path.name]


def test_an_autoencoder_that_moved_is_named(write_weights, sample):
    header = write_weights().header.autoencoder
    gone = write_weights("gone", autoencoder={"pretrained": "/no/such/folder", "sha256": header.sha256})
    sample(gone, "--tiles", 1, "--vae", embedded_folder())


def test_an_autoencoder_that_encoded_in_bf16_is_recognised(write_weights, sample):
    sha256 = load_autoencoder("embedded", precision="bf16").fingerprint()
    weights = write_weights(autoencoder={"pretrained": "embedded", "sha256": sha256})
    sample(weights, "--tiles", 1)


def test_bf16_is_near_fp32(write_weights, sample):
    weights = write_weights()
    exact, _ = sample(weights, "--tiles", 2, out="exact")
    rough, _ = sample(weights, "--tiles", 2, "--precision", "bf16", out="rough")
    difference = np.abs(pixels(exact, 0, 1).astype(float) - pixels(rough, 0, 1))
    assert 0 < difference.mean() < 8  # of 250
