"""Samplers: Euler is diffusers', Heun is second-order, both end on the data."""

import itertools

import pytest
import torch
from diffusers import EDMEulerScheduler

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.diffusion.samplers import sample_euler, sample_heun

DATA_STD, DATA_MEAN = 0.5, 0.3


def gaussian_network(edm, calls=None):
    """The network whose denoised estimate is exact for data ~ N(DATA_MEAN, DATA_STD^2)."""

    def network(x_in, c_noise):
        if calls is not None:
            calls.append(float(c_noise[0]))
        sigma = (4 * c_noise).exp()
        c_skip, c_out, c_in, _ = (c.view(-1, 1, 1, 1) for c in edm.preconditioning(sigma))
        x, variance = x_in / c_in, sigma.view(-1, 1, 1, 1) ** 2
        denoised = (DATA_STD**2 * x + variance * DATA_MEAN) / (DATA_STD**2 + variance)
        return (denoised - c_skip * x) / c_out

    return network


def exact_solution(edm, noise):
    """The probability-flow ODE of Gaussian data solved by hand, from sigma_max down to 0."""
    start = edm.sigma_max * noise
    return DATA_MEAN + (start - DATA_MEAN) * DATA_STD / (DATA_STD**2 + edm.sigma_max**2) ** 0.5


def unit_noise(dtype=torch.float32):
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_euler_is_a_loop_of_diffusers_scheduler_steps(prediction_type):
    edm = EDM(prediction_type=prediction_type)
    noise = unit_noise()

    def network(x, c_noise):
        return torch.tanh(x.flip(-1)) + c_noise.view(-1, 1, 1, 1) * x.cos()

    scheduler = EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(12)
    x = noise * scheduler.sigmas[0]
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(output, timestep, x, s_churn=0.0).prev_sample
    torch.testing.assert_close(sample_euler(edm, network, noise, 12), x, rtol=1e-4, atol=1e-4)


def test_a_scheduler_left_at_its_own_start_would_differ():
    """Guards the test above: with another start its tolerance is exceeded."""
    edm, noise = EDM(), unit_noise()
    shifted = sample_euler(edm, gaussian_network(edm), noise * 1.01, 12)
    assert (shifted - sample_euler(edm, gaussian_network(edm), noise, 12)).abs().max() > 1e-3


def error(sampler, num_steps):
    edm, noise = EDM(), unit_noise(torch.float64)
    return float((sampler(edm, gaussian_network(edm), noise, num_steps) - exact_solution(edm, noise)).abs().max())


def test_heun_is_second_order():
    errors = [error(sample_heun, steps) for steps in (32, 64, 128)]
    assert errors[-1] < 2e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 3.4 < coarse / fine < 4.8


def test_euler_is_first_order_and_worse_than_heun():
    errors = [error(sample_euler, steps) for steps in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 2.4
    assert error(sample_heun, 32) < errors[1]


@pytest.mark.parametrize(("sampler", "expected"), [(sample_euler, 9), (sample_heun, 17)])
def test_network_calls(sampler, expected):
    edm, calls = EDM(), []
    sampler(edm, gaussian_network(edm, calls), unit_noise(), 9)
    assert len(calls) == expected
    assert all(torch.isfinite(torch.tensor(calls)))  # never asked at sigma 0, where c_noise is -inf


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_samples_of_a_gaussian_have_its_moments(sampler):
    edm = EDM()
    noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = sampler(edm, gaussian_network(edm), noise, 200)
    assert float(samples.mean()) == pytest.approx(DATA_MEAN, abs=0.02)
    assert float(samples.std()) == pytest.approx(DATA_STD, rel=0.03)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_conditions_reach_every_call_and_no_graph_is_kept(sampler):
    edm, seen = EDM(), []
    weight = torch.ones(1, requires_grad=True)

    def network(x, c_noise, hints):
        seen.append(hints)
        return weight * x

    samples = sampler(edm, network, unit_noise(), 3, hints="the hints")
    assert set(seen) == {"the hints"}
    assert not samples.requires_grad


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_a_sample_does_not_depend_on_its_batch(sampler):
    edm, noise = EDM(), unit_noise()
    together = sampler(edm, gaussian_network(edm), noise, 6)
    torch.testing.assert_close(together[:1], sampler(edm, gaussian_network(edm), noise[:1], 6))
