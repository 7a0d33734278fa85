"""The parts of a training step that need no worker: learning rate, stack of hints, what a micro-batch holds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from ray_pipeline.config import parse_config
from ray_pipeline.data.latents import LatentStats
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.sections import OptimizerConfig
from ray_pipeline.training.step import learning_rate, micro_batches, stack_hints


def test_constant_rate_warms_up_linearly_and_then_stays():
    settings = OptimizerConfig(lr=1e-3, warmup_steps=4)
    rates = [learning_rate(settings, step, 100) for step in range(8)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(OptimizerConfig(lr=1e-3), 0, 100) == 1e-3


def test_cosine_goes_from_the_full_rate_to_1_percent():
    settings = OptimizerConfig(lr=2e-3, schedule="cosine")
    rates = [learning_rate(settings, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3)
    assert rates[500] == pytest.approx(2e-3 * 0.505)
    assert rates[250] == pytest.approx(2e-3 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2))
    assert rates[-1] == pytest.approx(2e-5, rel=0.01)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(settings, 5000, 1000) == pytest.approx(2e-5)  # never up again


def test_a_phase_may_have_a_rate_of_its_own():
    settings = OptimizerConfig(lr=1e-3, warmup_steps=2)
    assert learning_rate(settings, 0, 100, phase_lr=4e-3) == pytest.approx(2e-3)
    assert learning_rate(settings, 50, 100, phase_lr=4e-3) == 4e-3


def test_hints_are_stacked_in_the_order_of_their_names_and_normalised_like_the_tiles():
    rng = np.random.default_rng(0)
    mean, std = np.array([1.0, -2.0, 0.5, 0.0]), np.array([2.0, 0.5, 1.0, 4.0])
    stats = LatentStats(mean=mean, std=std, count=3, fingerprint="")
    values = {f"hint.{name}": rng.normal(size=(3, 4, 5, 5)).astype(np.float16) for name in ("canny", "depth", "other")}
    stacked = stack_hints(values, ("depth", "canny"), stats, sigma_data=0.5)
    assert stacked.shape == (3, 2, 4, 5, 5)
    for number, name in enumerate(("depth", "canny")):
        wide = values[f"hint.{name}"].astype(np.float64)
        expected = (wide - mean[:, None, None]) / std[:, None, None] * 0.5
        np.testing.assert_allclose(stacked[:, number].numpy(), expected, atol=1e-5)


SHAPE = (4, 8, 8)


def of_phase(store, batch_size: int = 3) -> SimpleNamespace:
    """What `micro_batches` takes of a phase without hints."""
    config = parse_config({"phases": [{"name": "p", "epochs": 1}], "train": {"batch_size": batch_size}})
    plan = SamplePlan(len(store), 8, seed=5, phase="p")
    return SimpleNamespace(config=config, phase=config.phases[0], plan=plan, hints=(), train_store=store)


@pytest.fixture
def stored(write_latents, tmp_path):
    """A store with means of 2 and standard deviations of 0.25, whose statistics are mean 0 and std 1."""
    values = np.full((16, 1, 2, *SHAPE), 2, np.float16)
    values[:, :, 1] = 0.25
    return write_latents(tmp_path, values, posterior="sample")


def test_a_stored_posterior_is_sampled_with_noise_of_its_own(stored):
    """x0 = (mean + std e) sigma_data, e standard normal; sigma_data is 0.5."""
    batch = stored.gather(range(16)) | {"index": np.arange(100, 116)}
    batches = micro_batches(of_phase(stored), batch)
    assert [len(one.x0) for one in batches] == [3, 3, 3, 3, 3, 1]
    x0, noise = (torch.cat([getattr(one, name) for one in batches]).numpy() for name in ("x0", "noise"))
    assert x0.dtype == np.float32
    e = (x0 / 0.5 - 2) / 0.25
    assert distributions.kstest(e.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(e.ravel(), noise.ravel())[0, 1]) < 0.05
    assert len({one.tobytes() for one in e}) == 16
    # the noise that is added for the diffusion is what it is without a posterior
    np.testing.assert_array_equal(noise, draw(5, "p", batch["index"], SHAPE).noise)
    again = torch.cat([one.x0 for one in micro_batches(of_phase(stored, batch_size=16), batch)])
    np.testing.assert_array_equal(again.numpy(), x0)
    moved = {name: values[4:9] for name, values in batch.items()}  # as another rank or a resume would get them
    np.testing.assert_array_equal(micro_batches(of_phase(stored, 5), moved)[0].x0, x0[4:9])


def test_without_a_posterior_the_latent_is_taken_as_it_is(stored):
    batch = {"latent": stored.gather(range(16))["latent"], "index": np.arange(16)}
    assert (micro_batches(of_phase(stored), batch)[0].x0 == 1).all()
