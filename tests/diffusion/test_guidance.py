"""Guidance: the formula inside its interval, the network alone outside, and no call that is not needed."""

import math

import numpy as np
import pytest
import torch

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.diffusion.guidance import Guidance, guided_denoise
from ray_pipeline.diffusion.samplers import Churn, CountedNetwork, sample_euler, sample_heun

SAMPLERS = [sample_euler, sample_heun]
STEPS = 9


def network(x, c_noise, hints=None):
    """Any function of its inputs that takes hints, or none, will do."""
    given = 0 if hints is None else hints.sum(dim=1)
    return torch.tanh(x.flip(-1) + given) + c_noise.view(-1, 1, 1, 1) * x.cos()


def worse_network(x, c_noise, hints=None):
    return 0.7 * network(x, c_noise, hints) + 0.1 * x


def numpy_network(x, c_noise, hints=None):
    given = 0 if hints is None else hints.sum(axis=1)
    return np.tanh(x[..., ::-1] + given) + c_noise * np.cos(x)


def numpy_worse_network(x, c_noise, hints=None):
    return 0.7 * numpy_network(x, c_noise, hints) + 0.1 * x


def denoised(F, x, sigma, data=0.5, **conditions):
    """Equation 7 of Karras et al. 2022 in numpy, v-prediction."""
    output = F(x / math.hypot(sigma, data), math.log(sigma) / 4, **conditions)
    return data**2 / (sigma**2 + data**2) * x - sigma * data / math.hypot(sigma, data) * output


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents():
    return unit(3, 4, 5, 5)


def hints():
    return unit(3, 2, 4, 5, 5, seed=1)


def refused(*args, **kwargs):
    raise AssertionError("the guide is not needed")


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("sigma", [0.002, 0.6, 80.0])
def test_guidance_on_hints_is_the_formula(weight, sigma):
    x = sigma * latents()
    result = guided_denoise(EDM(), network, x, sigma, Guidance(weight), hints=hints())
    with_hints = denoised(numpy_network, x.numpy(), sigma, hints=hints().numpy())
    without = denoised(numpy_network, x.numpy(), sigma)
    np.testing.assert_allclose(result.numpy(), weight * with_hints + (1 - weight) * without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioned", [False, True])
def test_autoguidance_is_the_formula_with_the_guide_s_own_conditions(conditioned):
    other = unit(3, 1, 4, 5, 5, seed=2)
    conditions = {"hints": other} if conditioned else {}
    result = guided_denoise(
        EDM(), network, latents(), 0.6, Guidance(1.8, worse_network, conditions=conditions), hints=hints()
    )
    good = denoised(numpy_network, latents().numpy(), 0.6, hints=hints().numpy())
    bad = denoised(numpy_worse_network, latents().numpy(), 0.6, hints=other.numpy() if conditioned else None)
    np.testing.assert_allclose(result.numpy(), 1.8 * good - 0.8 * bad, rtol=0, atol=1e-12)


def test_guide_with_other_hints_is_the_same_network():
    one = hints()[:, :1]
    result = guided_denoise(EDM(), network, latents(), 0.6, Guidance(3.0, conditions={"hints": one}), hints=hints())
    both = denoised(numpy_network, latents().numpy(), 0.6, hints=hints().numpy())
    without = denoised(numpy_network, latents().numpy(), 0.6, hints=one.numpy())
    np.testing.assert_allclose(result.numpy(), 3 * both - 2 * without, rtol=0, atol=1e-12)


def test_interval_is_open_below_and_closed_above():
    def is_guided(sigma):
        guidance = Guidance(2.0, interval=(0.25, 0.75))
        result = guided_denoise(EDM(), network, latents(), sigma, guidance, hints=hints())
        plain = denoised(numpy_network, latents().numpy(), sigma, hints=hints().numpy())
        return not np.allclose(result.numpy(), plain, rtol=0, atol=1e-12)

    assert all(map(is_guided, (0.2501, 0.5, 0.75)))
    assert not any(map(is_guided, (0.1, 0.25, 0.7501, 3.0)))


def test_interval_up_to_sigma_max_holds_the_grid_s_first_level():
    """Which float64 makes 40.00000000000001."""
    edm = EDM(sigma_max=40.0)
    first = float(edm.sigmas(STEPS)[0])
    assert first > 40
    assert Guidance(2.0, interval=(0.3, 40.0)).acts(first)


def guided_levels(sampler, interval):
    """The levels at which a guided sampler without churn asks the guide."""
    sigmas = EDM().sigmas(STEPS).tolist()[:-1]
    evaluated = sigmas if sampler is sample_euler else sigmas + sigmas[1:]
    return [sigma for sigma in evaluated if interval[0] < sigma <= interval[1]]


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.2, 5.0), (100.0, 200.0)])
@pytest.mark.parametrize(("sampler", "calls"), [(sample_euler, STEPS), (sample_heun, 2 * STEPS - 1)])
def test_network_calls_of_guidance_on_hints(sampler, calls, interval):
    counted = CountedNetwork(network)
    sampler(EDM(), counted, latents(), STEPS, guidance=Guidance(2.0, interval=interval), hints=hints())
    assert counted.calls == calls + len(guided_levels(sampler, interval))


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.2, 5.0), (100.0, 200.0)])
@pytest.mark.parametrize(("sampler", "calls"), [(sample_euler, STEPS), (sample_heun, 2 * STEPS - 1)])
def test_network_calls_of_autoguidance(sampler, calls, interval):
    main, guide = CountedNetwork(network), CountedNetwork(worse_network)
    sampler(EDM(), main, latents(), STEPS, guidance=Guidance(2.0, guide, interval))
    assert main.calls == calls
    assert guide.calls == len(guided_levels(sampler, interval))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weight_1_calls_no_guide_and_is_the_plain_sampler(sampler):
    counted = CountedNetwork(network)
    samples = sampler(EDM(), counted, latents(), STEPS, guidance=Guidance(1.0, refused), hints=hints())
    plain = CountedNetwork(network)
    assert torch.equal(samples, sampler(EDM(), plain, latents(), STEPS, hints=hints()))
    assert counted.calls == plain.calls


@pytest.mark.parametrize("churned", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_samples_are_those_of_the_formula_in_numpy(sampler, churned):
    """The interval cuts through the grid; with churn the noise level that counts is the raised one."""
    low, high, weight, data = 0.2, 5.0, 2.5, hints().numpy()

    def D(x, sigma):
        main = denoised(numpy_network, x, sigma, hints=data)
        if not low < sigma <= high:
            return main
        guide = denoised(numpy_worse_network, x, sigma)
        return guide + weight * (main - guide)

    def fresh(step):
        return unit(*latents().shape, seed=100 + step)

    churn = Churn(s_churn=40.0, noise=fresh) if churned else None
    guidance = Guidance(weight, worse_network, (low, high))
    samples = sampler(EDM(), network, latents(), STEPS, churn=churn, guidance=guidance, hints=hints())

    gamma = math.sqrt(2) - 1 if churned else 0.0
    sigmas = EDM().sigmas(STEPS).tolist()
    guided = [low < sigma <= high for sigma in sigmas]
    raised = [low < sigma * (1 + gamma) <= high for sigma in sigmas]
    assert (guided != raised) is churned

    x = sigmas[0] * latents().numpy()
    for step in range(STEPS):
        sigma, following = sigmas[step] * (1 + gamma), sigmas[step + 1]
        x = x + math.sqrt(sigma**2 - sigmas[step] ** 2) * fresh(step).numpy()
        slope = (x - D(x, sigma)) / sigma
        after = x + (following - sigma) * slope
        if sampler is sample_heun and following:
            after = x + (following - sigma) * (slope + (after - D(after, following)) / following) / 2
        x = after
    np.testing.assert_allclose(samples.numpy(), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_guided_sample_does_not_depend_on_its_batch(sampler):
    def sample(rows):
        churn = Churn(s_churn=10.0, noise=lambda step: unit(*latents().shape, seed=100 + step)[rows])
        guidance = Guidance(2.0, worse_network, (0.1, 10.0), conditions={"hints": hints()[rows, :1]})
        start = latents()[rows]
        return sampler(EDM(), network, start, STEPS, churn=churn, guidance=guidance, hints=hints()[rows])

    torch.testing.assert_close(sample([0, 1, 2])[1:2], sample([1]), rtol=0, atol=1e-12)


def test_no_graph_is_kept_of_the_guide():
    weight = torch.ones(1, requires_grad=True)
    guidance = Guidance(2.0, lambda x, c_noise: weight * x)
    assert not sample_euler(EDM(), network, latents(), 3, guidance=guidance).requires_grad


@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf])
def test_impossible_weight_is_refused(weight):
    with pytest.raises(ValueError, match=f"guidance weight is {weight}, expected a finite number of at least 0"):
        Guidance(weight)


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_impossible_interval_is_refused(interval):
    with pytest.raises(ValueError, match=r"guidance interval is \(.*\], expected 0 <= lo < hi"):
        Guidance(2.0, interval=interval)
