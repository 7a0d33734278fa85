"""Deterministic samplers from noise to latents."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ray_pipeline.diffusion.edm import EDM, Network


@torch.no_grad()
def sample_euler(edm: EDM, network: Network, noise: Tensor, num_steps: int, **network_kwargs) -> Tensor:
    """Euler steps of the probability-flow ODE, as diffusers' EDMEulerScheduler takes them; `num_steps` network calls.

    noise: (B, C, H, W) of unit variance; returns latents of the same shape.
    """
    sigmas = edm.sigmas(num_steps)
    x = noise * float(sigmas[0])
    for sigma, following in itertools.pairwise(sigmas):
        slope = _slope(edm, network, x, sigma, network_kwargs)
        x = x + float(following - sigma) * slope
    return x


@torch.no_grad()
def sample_heun(edm: EDM, network: Network, noise: Tensor, num_steps: int, **network_kwargs) -> Tensor:
    """Heun steps (Karras et al. 2022, Algorithm 1); 2 * num_steps - 1 network calls.

    noise: (B, C, H, W) of unit variance; returns latents of the same shape.
    """
    sigmas = edm.sigmas(num_steps)
    x = noise * float(sigmas[0])
    for sigma, following in itertools.pairwise(sigmas):
        step = float(following - sigma)
        slope = _slope(edm, network, x, sigma, network_kwargs)
        euler = x + step * slope
        if following > 0:
            slope = (slope + _slope(edm, network, euler, following, network_kwargs)) / 2
            euler = x + step * slope
        x = euler
    return x


def _slope(edm: EDM, network: Network, x: Tensor, sigma: Tensor, network_kwargs: dict) -> Tensor:
    """dx/dsigma = (x - D(x; sigma)) / sigma."""
    level = sigma.to(device=x.device, dtype=x.dtype).expand(x.shape[0])
    return (x - edm.denoise(network, x, level, **network_kwargs)) / float(sigma)
