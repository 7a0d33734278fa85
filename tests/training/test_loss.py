"""What training minimises: the weighted EDM loss, or with an uncertainty u of it loss / exp(u) + u."""

import numpy as np
import pytest
import torch

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.models.dit import build_dit
from ray_pipeline.models.loss_uncertainty import LossUncertainty
from ray_pipeline.training.loss import TrainingLoss

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"latent_size": 8, "depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
EDM_SETTINGS = {"sigma_data": 0.6, "P_mean": -0.8, "P_std": 1.1}


def draw_weights(module, seed=0, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, std, generator=generator)
    return module


def make_loss(trained=True):
    """A loss with an uncertainty: a random one, or a fresh one."""
    uncertainty = draw_weights(LossUncertainty(), seed=1) if trained else LossUncertainty()
    network = draw_weights(build_dit("custom", **SIZES, aligned=True))
    return TrainingLoss(EDM(**EDM_SETTINGS), network.eval(), uncertainty)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    return {
        "x0": torch.randn(6, 4, 8, 8, generator=generator) * 0.6,
        "noise": torch.randn(6, 4, 8, 8, generator=generator),
        "z": torch.linspace(-2, 2, 6),
        "hints": torch.randn(6, 2, 4, 8, 8, generator=generator),
        "mask": torch.tensor([[True, True], [True, False], [False, True], [False, False], [True, True], [True, False]]),
    }


def unconditional(batch):
    return {name: batch[name] for name in ("x0", "noise", "z")}


@torch.no_grad()
def losses_of(loss, batch):
    """Losses (B,) float64 by equations 7 and 8 of Karras et al. 2022, from the network's output."""
    x0, noise, z = (batch[name].double().numpy() for name in ("x0", "noise", "z"))
    data = EDM_SETTINGS["sigma_data"]
    sigma = np.exp(EDM_SETTINGS["P_mean"] + EDM_SETTINGS["P_std"] * z)
    total = sigma**2 + data**2
    wide = (slice(None), None, None, None)
    x = x0 + sigma[wide] * noise
    conditions = (batch["hints"], batch["mask"]) if "hints" in batch else ()
    c_in, c_noise = 1 / np.sqrt(total), np.log(sigma) / 4
    output = loss.network(torch.from_numpy(c_in[wide] * x).float(), torch.from_numpy(c_noise).float(), *conditions)
    denoised = (data**2 / total)[wide] * x - (sigma * data / np.sqrt(total))[wide] * output.double().numpy()
    return total / (sigma * data) ** 2 * np.square(denoised - x0).mean(axis=(1, 2, 3))


def uncertainty_of(loss, batch):
    """u (B,) float64 from the weights."""
    state = {name: tensor.double().numpy() for name, tensor in loss.uncertainty.state_dict().items()}
    c_noise = (EDM_SETTINGS["P_mean"] + EDM_SETTINGS["P_std"] * batch["z"].double().numpy()) / 4
    angle = 2 * np.pi * (np.outer(c_noise, state["features.frequencies"]) + state["features.phases"])
    return np.sqrt(2) * np.cos(angle) @ state["linear.weight"][0] + state["linear.bias"][0]


@pytest.mark.parametrize("hints", [True, False], ids=["hints", "unconditional"])
def test_loss_is_the_weighted_error_and_the_objective_its_uncertainty_weighting(batch, hints):
    loss = make_loss()
    batch = batch if hints else unconditional(batch)
    found, objective = loss(**batch)
    expected, u = losses_of(loss, batch), uncertainty_of(loss, batch)
    assert found.shape == objective.shape == (6,)
    assert found.dtype == objective.dtype == torch.float32
    assert np.abs(u).max() > 0.3
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(objective.detach().numpy(), expected / np.exp(u) + u, rtol=1e-4)


@pytest.mark.parametrize("hints", [True, False], ids=["hints", "unconditional"])
def test_without_an_uncertainty_the_objective_is_the_loss(batch, hints):
    weighted = make_loss()
    loss = TrainingLoss(weighted.edm, weighted.network)
    batch = batch if hints else unconditional(batch)
    found, objective = loss(**batch)
    assert torch.equal(objective, found)
    assert torch.equal(found, weighted(**batch)[0])  # what is reported does not depend on the weighting
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"network"}


def test_a_fresh_uncertainty_changes_neither_objective_nor_gradients(batch):
    fresh = make_loss(trained=False)
    gradients = []
    for loss in (fresh, TrainingLoss(fresh.edm, fresh.network)):
        loss.zero_grad()
        losses, objective = loss(**batch)
        assert torch.equal(objective, losses)
        objective.mean().backward()
        gradients.append({name: p.grad.clone() for name, p in loss.network.named_parameters() if p.requires_grad})
    weighted, plain = gradients
    assert all(torch.equal(gradient, plain[name]) for name, gradient in weighted.items())
    # of its bias: mean of 1 - loss
    assert fresh.uncertainty.linear.bias.grad.item() == pytest.approx(1 - losses.mean().item(), rel=1e-4)


def test_gradients_of_the_network_are_divided_by_the_exponential_of_the_uncertainty(batch):
    loss = make_loss()
    u = uncertainty_of(loss, batch)
    gradients = []
    for weights in (None, torch.from_numpy(np.exp(-u)).float()):
        loss.zero_grad()
        losses, objective = loss(**batch)
        (objective.sum() if weights is None else (losses * weights).sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in loss.network.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_every_parameter_is_seen_and_has_a_gradient(batch):
    loss = make_loss()
    owners = {name.partition(".")[0] for name, _ in loss.named_parameters()}
    assert owners == {"network", "uncertainty"}
    _, objective = loss(**batch)
    objective.mean().backward()
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
            assert (parameter.grad != 0).any(), name


def test_in_bf16_the_loss_is_near_and_its_uncertainty_exact(batch):
    """Rounded to bf16 the uncertainty would move in steps of its own."""
    loss = make_loss()
    exact, _ = loss(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        found, objective = loss(**batch)
    assert found.dtype == objective.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02)
    assert not torch.equal(found, exact)
    u = torch.from_numpy(uncertainty_of(loss, batch)).float()
    torch.testing.assert_close(objective, found / u.exp() + u, rtol=1e-4, atol=1e-4)
