"""Samplers: Euler steps are diffusers', Heun is Algorithm 2 and second-order, both end on the data."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.diffusion.samplers import Churn, CountedNetwork, sample_euler, sample_heun

SAMPLERS = [sample_euler, sample_heun]
PREDICTIONS = ["v_prediction", "epsilon"]
SHAPE = (1, 2, 3)  # of the Gaussian latents
CHURNS = {
    "every step": {"s_churn": 2.0},
    "at most sqrt(2) - 1": {"s_churn": 40.0, "s_noise": 1.007},
    "inside an interval": {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
}


def network(x, c_noise):
    """Any function of both inputs will do."""
    return torch.tanh(x.flip(-1)) + c_noise.view(-1, 1, 1, 1) * x.cos()


def unit_noise(shape=(2, 4, 5, 5), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_of_steps(shape, dtype=torch.float64):
    return lambda step: unit_noise(shape, seed=100 + step, dtype=dtype)


class GaussianData:
    """N(mu, C) with a dense covariance C of six dimensions whose standard deviations are 0.2 to 1.2 along its axes."""

    def __init__(self):
        rng = np.random.default_rng(5)
        self.mu = rng.uniform(-0.5, 0.5, 6)
        self.variances = np.linspace(0.2, 1.2, 6) ** 2
        self.axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
        self.C = self.axes * self.variances @ self.axes.T

    def network(self, edm):
        """The network whose denoised estimate mu + C (C + s^2 I)^-1 (x - mu) is exact."""
        mu, C = torch.from_numpy(self.mu), torch.from_numpy(self.C)

        def exact(x_in, c_noise):
            sigma = (4 * c_noise).exp()
            c_skip, c_out, c_in, _ = (c.view(-1, 1) for c in edm.preconditioning(sigma))
            x = x_in.flatten(1) / c_in
            shrink = C @ torch.linalg.inv(C + sigma[0] ** 2 * torch.eye(6, dtype=x.dtype))
            return (((mu + (x - mu) @ shrink.T) - c_skip * x) / c_out).view_as(x_in)

        return exact

    def flow(self, edm, noise):
        """The probability-flow ODE solved by hand from sigma_max down to 0; (N, 6)."""
        start = edm.sigma_max * noise.flatten(1).numpy()
        ratio = np.sqrt(self.variances / (self.variances + edm.sigma_max**2))
        return self.mu + (start - self.mu) @ (self.axes * ratio @ self.axes.T)

    def whitened(self, samples):
        """C^-1/2 (x - mu): standard normal for samples of the data, (N, 6)."""
        return (samples.flatten(1).numpy() - self.mu) @ (self.axes / np.sqrt(self.variances))


def raised_level(t, steps, churn):
    """Lines 4 to 6 of Algorithm 2: t_hat, and by how much the fresh noise of unit variance is multiplied."""
    churn = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0} | (churn or {})
    inside = churn["s_tmin"] <= t <= churn["s_tmax"]
    gamma = min(churn["s_churn"] / steps, math.sqrt(2) - 1) if inside else 0.0
    t_hat = t + gamma * t
    return t_hat, churn["s_noise"] * math.sqrt(t_hat**2 - t**2)


def transcribed_sampler(noise, steps, *, heun, prediction_type, churn, fresh):
    """Algorithm 2 of Karras et al. 2022, line by line, in float64 numpy, with `network`; without churn Algorithm 1.

    Without `heun` its lines 9 to 11 are left out.
    """
    t = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]

    def D(x, sigma, data=0.5):
        x_in, c_noise = x / math.hypot(sigma, data), math.log(sigma) / 4
        F = np.tanh(x_in[..., ::-1]) + c_noise * np.cos(x_in)
        c_out = sigma * data / math.hypot(sigma, data) * (-1 if prediction_type == "v_prediction" else 1)
        return data**2 / (sigma**2 + data**2) * x + c_out * F

    x = t[0] * noise
    for i in range(steps):
        t_hat, added = raised_level(t[i], steps, churn)
        x_hat = x + added * fresh(i)
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if heun and t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("churn", [None, *CHURNS.values()], ids=["no churn", *CHURNS])
def test_every_euler_step_is_that_of_diffusers_scheduler(prediction_type, churn):
    """Largest error of a step 1e-6 of the largest |x| that it starts from; the scheduler computes in float32."""
    edm, steps = EDM(prediction_type=prediction_type), 12
    noise = unit_noise(dtype=torch.float64)
    sigmas, inputs, outputs = edm.sigmas(steps).tolist(), [], []

    def recorded(x, c_noise):
        inputs.append(x)
        outputs.append(network(x, c_noise))
        return outputs[-1]

    drawn = noise_of_steps(noise.shape)
    end = sample_euler(edm, recorded, noise, steps, churn=None if churn is None else Churn(**churn, noise=drawn))

    def before(step):
        """Our sampler's x before `step`: the network's input, no longer scaled, less the fresh noise."""
        if step == steps:
            return end
        raised, added = raised_level(sigmas[step], steps, churn)
        return inputs[step] * math.hypot(raised, edm.sigma_data) - added * drawn(step)

    scheduler = EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    for step, timestep in enumerate(scheduler.timesteps):
        x, generator = before(step), torch.Generator().manual_seed(100 + step)
        scheduler.scale_model_input(x, timestep)
        after = scheduler.step(outputs[step], timestep, x, **(churn or {}), generator=generator).prev_sample
        assert float((before(step + 1) - after).abs().max()) < 1e-6 * float(x.abs().max())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_euler_in_float32_is_a_loop_of_diffusers_scheduler_steps(prediction_type):
    """Both in float32 with a network of their own; what rounding leaves after 12 steps is below 1e-5."""
    edm, noise = EDM(prediction_type=prediction_type), unit_noise()
    scheduler = EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(12)
    x = noise * scheduler.sigmas[0]
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(output, timestep, x).prev_sample
    torch.testing.assert_close(sample_euler(edm, network, noise, 12), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("churn", [None, *CHURNS.values()], ids=["no churn", *CHURNS])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_is_algorithm_2(sampler, churn, prediction_type):
    edm, noise = EDM(prediction_type=prediction_type), unit_noise(dtype=torch.float64)
    fresh = noise_of_steps(noise.shape)
    samples = sampler(edm, network, noise, 18, churn=None if churn is None else Churn(**churn, noise=fresh))
    expected = transcribed_sampler(
        noise.numpy(),
        18,
        heun=sampler is sample_heun,
        prediction_type=prediction_type,
        churn=churn,
        fresh=lambda step: fresh(step).numpy(),
    )
    np.testing.assert_allclose(samples.numpy(), expected, rtol=0, atol=1e-10)


def error(sampler, num_steps):
    edm, data, noise = EDM(), GaussianData(), unit_noise((8, *SHAPE), dtype=torch.float64)
    return np.abs(sampler(edm, data.network(edm), noise, num_steps).flatten(1).numpy() - data.flow(edm, noise)).max()


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


@pytest.mark.parametrize("s_churn", [0.0, 40.0])
def test_heun_samples_have_the_mean_and_covariance_of_the_data(s_churn):
    """Whitened by the data's own moments, n samples have means of variance 1/n and covariances of variance 1/n, 2/n on
    the diagonal; 27 such numbers stay within 4.5 standard errors but once in 5000 draws of the noise. That steps are
    finite moves the variances by 1 %, less than one standard error."""
    edm, data, n = EDM(), GaussianData(), 8000
    noise = unit_noise((n, *SHAPE), dtype=torch.float64)
    churn = Churn(s_churn=s_churn, noise=noise_of_steps(noise.shape))
    white = data.whitened(sample_heun(edm, data.network(edm), noise, 128, churn=churn))
    covariance = np.cov(white.T) - np.eye(6)
    assert np.abs(white.mean(axis=0)).max() < 4.5 / math.sqrt(n)
    assert (np.abs(covariance) / np.sqrt((1 + np.eye(6)) / n)).max() < 4.5


@pytest.mark.parametrize(("sampler", "expected"), [(sample_euler, 9), (sample_heun, 17)])
@pytest.mark.parametrize("s_churn", [0.0, 40.0])
def test_network_calls(sampler, expected, s_churn):
    levels = []

    def watched(x, c_noise):
        levels.append(c_noise)
        return network(x, c_noise)

    counted, noise = CountedNetwork(watched), unit_noise()
    sampler(EDM(), counted, noise, 9, churn=Churn(s_churn=s_churn, noise=noise_of_steps(noise.shape)))
    assert counted.calls == expected  # one a batch
    assert torch.stack(levels).shape == (expected, len(noise))
    assert torch.isfinite(torch.stack(levels)).all()  # never asked at sigma 0, where c_noise is -inf


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("edges", "asked"), [((2, 5), [2, 3, 4, 5]), ((0, 0), [0]), ((8, 8), [8])])
def test_churn_asks_for_noise_inside_its_closed_interval_only(sampler, edges, asked):
    """Also at the ends of the grid, which float64 makes 40.00000000000001 and 0.002000000000000003 here."""
    edm, noise, steps = EDM(sigma_max=40.0), unit_noise(), []
    named = {0: 40.0, 8: 0.002}
    s_tmax, s_tmin = (named.get(edge, float(edm.sigmas(9)[edge])) for edge in edges)

    def drawn(step):
        steps.append(step)
        return unit_noise(seed=step)

    sampler(edm, network, noise, 9, churn=Churn(s_churn=1.0, s_tmin=s_tmin, s_tmax=s_tmax, noise=drawn))
    assert steps == asked


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_churn_of_zero_asks_for_no_noise(sampler):
    def refused(step):
        raise AssertionError("no noise is needed")

    samples = sampler(EDM(), network, unit_noise(), 5, churn=Churn(s_churn=0.0, noise=refused))
    assert torch.equal(samples, sampler(EDM(), network, unit_noise(), 5))


def test_churn_noise_of_one_sample_for_all_is_refused():
    churn = Churn(s_churn=1.0, noise=lambda step: unit_noise()[:1])
    with pytest.raises(ValueError, match=r"has shape \(1, 4, 5, 5\), expected \(2, 4, 5, 5\)"):
        sample_euler(EDM(), network, unit_noise(), 5, churn=churn)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s_churn": -1.0}, "s_churn is -1.0, expected at least 0"),
        ({"s_churn": math.nan}, "s_churn is nan"),
        ({"s_churn": 1.0, "s_tmin": -0.1}, "s_tmin is -0.1"),
        (
            {"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0},
            "s_tmin is 2.0 and s_tmax 1.0, expected 0 <= s_tmin <= s_tmax",
        ),
        ({"s_churn": 1.0, "s_tmax": math.nan}, "s_tmax nan"),
        ({"s_churn": 1.0, "s_noise": 0.0}, "s_noise is 0.0, expected a finite number above 0"),
        ({"s_churn": 1.0, "s_noise": math.inf}, "s_noise is inf"),
    ],
)
def test_churn_of_impossible_values_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Churn(**values, noise=unit_noise)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditions_reach_every_call_and_no_graph_is_kept(sampler):
    edm, seen = EDM(), []
    weight = torch.ones(1, requires_grad=True)

    def conditioned(x, c_noise, hints):
        seen.append(hints)
        return weight * x

    samples = sampler(edm, conditioned, unit_noise(), 3, hints="the hints")
    assert seen == ["the hints"] * (3 if sampler is sample_euler else 5)
    assert not samples.requires_grad


@pytest.mark.parametrize("s_churn", [0.0, 40.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler, s_churn):
    """Each sample draws its noise from its own seed; in float64, so that only a dependence shows."""

    def sample(seeds):
        def drawn(step):
            return torch.cat([unit_noise((1, 4, 5, 5), 1000 * seed + step, torch.float64) for seed in seeds])

        start = torch.cat([unit_noise((1, 4, 5, 5), seed, torch.float64) for seed in seeds])
        return sampler(EDM(), network, start, 6, churn=Churn(s_churn=s_churn, noise=drawn))

    together = sample([3, 1, 2])
    torch.testing.assert_close(together[1:2], sample([1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[2:], sample([2]), rtol=0, atol=1e-12)
