"""EDM: coefficients and grid of diffusers' EDMEulerScheduler, and the loss of Karras et al. 2022 to the last digits."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from ray_pipeline.diffusion.edm import EDM

PREDICTIONS = ["v_prediction", "epsilon"]
SIGMAS = [0.002, 0.03, 0.5, 1.7, 80.0]


def scheduler_of(edm):
    return EDMEulerScheduler(
        sigma_min=edm.sigma_min,
        sigma_max=edm.sigma_max,
        sigma_data=edm.sigma_data,
        rho=edm.rho,
        prediction_type=edm.prediction_type,
    )


def network(x, c_noise):
    """Any function of both inputs will do."""
    return torch.tanh(x.flip(-1)) + c_noise.view(-1, 1, 1, 1) * x.cos()


def latents(seed=0, dtype=torch.float32, count=5):
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_levels(dtype):
    return torch.logspace(-3, math.log10(80), 40, dtype=dtype)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_coefficients_are_diffusers(prediction_type, sigma_data, dtype, tolerance):
    """Each one by itself, relative error, from below the sampling grid's sigma_min up to its sigma_max."""
    edm = EDM(sigma_data=sigma_data, prediction_type=prediction_type)
    scheduler, sigma = scheduler_of(edm), all_levels(dtype)
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    expected = (
        scheduler.precondition_outputs(one, zero, sigma),
        scheduler.precondition_outputs(zero, one, sigma),
        scheduler.precondition_inputs(one, sigma),
        scheduler.precondition_noise(sigma),
    )
    for ours, theirs in zip(edm.preconditioning(sigma), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_denoise_is_diffusers(prediction_type):
    """In float64, element by element; relative error 1e-6."""
    edm, sigma = EDM(prediction_type=prediction_type), all_levels(torch.float64)
    scheduler, x = scheduler_of(edm), latents(count=len(sigma), dtype=torch.float64)
    denoised = edm.denoise(network, x, sigma)
    for row, level in enumerate(sigma):
        one = x[row : row + 1]
        output = network(scheduler.precondition_inputs(one, level), scheduler.precondition_noise(level).view(1))
        expected = scheduler.precondition_outputs(one, output, level)
        torch.testing.assert_close(denoised[row : row + 1], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_steps", [2, 18, 50])
@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0}])
def test_sampling_grid_is_diffusers(num_steps, options):
    edm = EDM(**options)
    scheduler = scheduler_of(edm)
    scheduler.set_timesteps(num_steps)
    sigmas = edm.sigmas(num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=1e-6, atol=0)


def test_sampling_grid_is_equation_5():
    edm = EDM()
    for i, sigma in enumerate(edm.sigmas(7)[:-1].tolist()):
        expected = (80 ** (1 / 7) + i / 6 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigma == pytest.approx(expected, rel=1e-10)


def test_grid_of_one_step_is_refused():
    with pytest.raises(ValueError, match="num_steps is 1, expected at least 2"):
        EDM().sigmas(1)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"'sample', expected 'v_prediction' or 'epsilon'"):
        EDM(prediction_type="sample")


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_is_the_weighted_squared_error_of_the_denoised(prediction_type, sigma, dtype):
    """Equation 8 in float64 numpy, term by term; the implementation cancels powers of sigma by hand."""
    edm, data = EDM(prediction_type=prediction_type), 0.5
    rng = np.random.default_rng(0)
    x0, noise, output = (rng.normal(size=(2, 4, 6, 6)).astype(dtype) for _ in range(3))
    given = [torch.from_numpy(v) for v in (x0, np.full(2, sigma, dtype), noise)]
    loss = edm.loss(lambda x, c_noise: torch.from_numpy(output), *given)
    x0, noise, output = (v.astype(np.float64) for v in (x0, noise, output))
    sigma = float(dtype(sigma))
    sign = -1 if prediction_type == "v_prediction" else 1
    x = x0 + sigma * noise
    denoised = data**2 / (sigma**2 + data**2) * x + sign * sigma * data / math.sqrt(sigma**2 + data**2) * output
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = (weight * (denoised - x0) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6 if dtype is np.float32 else 1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_loss_is_that_of_denoise(prediction_type):
    edm = EDM(prediction_type=prediction_type)
    x0, noise = latents(2, dtype=torch.float64), latents(3, dtype=torch.float64)
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    denoised = edm.denoise(network, x0 + sigma.view(-1, 1, 1, 1) * noise, sigma)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (denoised - x0).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(edm.loss(network, x0, sigma, noise), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_zero_network_scores_1_on_latents_of_std_sigma_data_and_not_on_others(sigma_data):
    edm = EDM(sigma_data=sigma_data)
    generator = torch.Generator().manual_seed(0)
    unit, noise = (torch.randn(64, 4, 16, 16, generator=generator) for _ in range(2))
    sigma = edm.sigma_from_normal(torch.randn(64, generator=generator))

    def score(scale):
        return float(edm.loss(lambda x, c_noise: torch.zeros_like(x), scale * unit, sigma, noise).mean())

    assert score(sigma_data) == pytest.approx(1, abs=0.02)
    assert abs(score(0.5 * sigma_data) - 1) > 0.1
    assert abs(score(2.0 * sigma_data) - 1) > 0.1


def test_loss_gradient_reaches_the_network():
    weight = torch.full((1,), 0.3, requires_grad=True)
    edm = EDM()
    edm.loss(lambda x, c_noise: weight * x, latents(), torch.tensor(SIGMAS), latents(1)).mean().backward()
    assert weight.grad.abs() > 1e-3


def test_conditions_reach_the_network_unchanged():
    seen = {}

    def conditioned(x, c_noise, **conditions):
        seen.update(conditions)
        return torch.zeros_like(x)

    hints = torch.ones(5, 2)
    EDM().loss(conditioned, latents(), torch.tensor(SIGMAS), latents(1), hints=hints, hint_mask=None)
    assert seen["hints"] is hints
    assert seen["hint_mask"] is None


def test_training_noise_levels_are_log_normal():
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logarithm = EDM(P_mean=-0.4, P_std=1.0).sigma_from_normal(z).log()
    assert float(logarithm.mean()) == pytest.approx(-0.4, abs=0.01)
    assert float(logarithm.std()) == pytest.approx(1.0, abs=0.01)


def test_validation_noise_levels_are_quantile_midpoints():
    normal = NormalDist(mu=-1.2, sigma=1.2)
    expected = [math.exp(normal.inv_cdf(quantile)) for quantile in (0.125, 0.375, 0.625, 0.875)]
    np.testing.assert_allclose(EDM().validation_sigmas(4).numpy(), expected, rtol=1e-10)
