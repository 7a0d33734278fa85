"""The pure parts of a training step: learning rate and the stack of hints."""

import math

import numpy as np
import pytest

from ray_pipeline.data.latents import LatentStats
from ray_pipeline.sections import OptimizerConfig
from ray_pipeline.training.step import learning_rate, stack_hints


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
