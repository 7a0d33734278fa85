"""The uncertainty learns the logarithm of the loss of each noise level, and changes nothing before it has."""

import math

import numpy as np
import pytest
import torch

from ray_pipeline.models.loss_uncertainty import LossUncertainty

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = torch.log(torch.tensor([0.004, 0.02, 0.08, 0.3, 1.0, 4.0, 20.0, 70.0])) / 4
LOSSES = torch.tensor([0.98, 0.7, 0.31, 0.12, 0.05, 0.008, 0.3, 2.5])


def fit(sample_losses, steps, seed=0):
    """AdamW on loss / exp(u) + u, with one loss of each level a step."""
    uncertainty, generator = LossUncertainty(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(uncertainty.parameters(), lr=0.02, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        u = uncertainty(LEVELS)
        (sample_losses(generator) / u.exp() + u).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return uncertainty


def test_a_fresh_one_is_zero_at_every_noise_level():
    u = LossUncertainty()(torch.linspace(-3, 3, 200))
    assert u.shape == (200,)
    assert (u == 0).all()


def test_its_best_value_is_the_logarithm_of_the_loss():
    uncertainty = fit(lambda _: LOSSES, 600)
    u = uncertainty(LEVELS).detach()
    torch.testing.assert_close(u, LOSSES.log(), atol=0.02, rtol=0)
    # so every level weighs the same: d(objective)/d(ln loss) = loss / exp(u)
    torch.testing.assert_close(LOSSES / u.exp(), torch.ones(8), atol=0.02, rtol=0)


def test_of_losses_that_vary_it_is_the_logarithm_of_their_mean():
    """And not the mean of their logarithms, which for these is lower by 0.58."""
    uncertainty = fit(lambda generator: LOSSES * torch.empty(8).exponential_(generator=generator), 1500)
    torch.testing.assert_close(uncertainty(LEVELS).detach(), LOSSES.log(), atol=0.2, rtol=0)


def test_it_is_linear_in_fourier_features_of_the_noise_level():
    uncertainty = fit(lambda _: LOSSES, 20)
    state = {name: tensor.double().numpy() for name, tensor in uncertainty.state_dict().items()}
    frequencies, phases = state["features.frequencies"], state["features.phases"]
    assert frequencies.shape == phases.shape == (128,)
    c_noise = np.linspace(-1.5, 1.1, 50)
    features = math.sqrt(2) * np.cos(2 * np.pi * (np.outer(c_noise, frequencies) + phases))
    expected = features @ state["linear.weight"][0] + state["linear.bias"][0]
    found = uncertainty(torch.from_numpy(c_noise).float()).detach().numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_every_one_has_the_same_features():
    torch.manual_seed(1)
    one = LossUncertainty().state_dict()
    torch.manual_seed(2)
    other = LossUncertainty().state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
