"""Samplers from noise to latents: Euler and Heun steps, with or without fresh noise and guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_pipeline.diffusion.edm import EDM, Network
from ray_pipeline.diffusion.guidance import Guidance, guided_denoise

_Slope = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Churn:
    """Fresh noise before each step (Karras et al. 2022, Algorithm 2, whose names these are).

    noise: step from 0 -> unit-variance noise shaped like the batch, asked for only where it is added. It is the
    caller's, so that a sample can depend on its own seed and not on its batch.
    s_tmin and s_tmax are compared in float32, as in diffusers' EDMEulerScheduler, so that the rounding of a sampling
    grid's ends does not exclude them.
    """

    s_churn: float
    noise: Callable[[int], Tensor]
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.s_churn >= 0:
            raise ValueError(f"s_churn is {self.s_churn}, expected at least 0")
        if not 0 <= self.s_tmin <= self.s_tmax:
            raise ValueError(f"s_tmin is {self.s_tmin} and s_tmax {self.s_tmax}, expected 0 <= s_tmin <= s_tmax")
        if not 0 < self.s_noise < math.inf:
            raise ValueError(f"s_noise is {self.s_noise}, expected a finite number above 0")

    def gamma(self, sigma: float, num_steps: int) -> float:
        """By which fraction of itself the noise level `sigma` is raised in one of `num_steps` steps."""
        if not np.float32(self.s_tmin) <= np.float32(sigma) <= np.float32(self.s_tmax):
            return 0.0
        return min(self.s_churn / num_steps, math.sqrt(2) - 1)

    def apply(self, x: Tensor, sigma: float, step: int, num_steps: int) -> tuple[Tensor, float]:
        """x (B, ...) at `sigma` -> (x_hat, sigma_hat); raises ValueError for noise of another shape than x."""
        gamma = self.gamma(sigma, num_steps)
        if gamma == 0:
            return x, sigma
        noise = self.noise(step)
        if noise.shape != x.shape:
            raise ValueError(f"churn noise has shape {tuple(noise.shape)}, expected {tuple(x.shape)}")
        sigma_hat = sigma * (1 + gamma)
        return x + self.s_noise * math.sqrt(sigma_hat**2 - sigma**2) * noise.to(x), sigma_hat


@dataclass
class CountedNetwork:
    """A network that counts its evaluations in `calls`; one of a whole batch is one."""

    network: Network
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.network(*args, **kwargs)


def sample_euler(
    edm: EDM,
    network: Network,
    noise: Tensor,
    num_steps: int,
    *,
    churn: Churn | None = None,
    guidance: Guidance | None = None,
    **network_kwargs: Any,
) -> Tensor:
    """Euler steps of the probability-flow ODE, as diffusers' EDMEulerScheduler takes them; `num_steps` network calls,
    and as many of the guide as there are steps inside its interval.

    noise: (B, C, H, W) of unit variance; returns latents of the same shape.
    """
    return _sample(_euler_step, edm, network, noise, num_steps, churn, guidance, network_kwargs)


def sample_heun(
    edm: EDM,
    network: Network,
    noise: Tensor,
    num_steps: int,
    *,
    churn: Churn | None = None,
    guidance: Guidance | None = None,
    **network_kwargs: Any,
) -> Tensor:
    """Heun steps (Karras et al. 2022, Algorithm 1, with churn Algorithm 2); 2 * num_steps - 1 network calls, and one of
    the guide for each that is inside its interval.

    noise: (B, C, H, W) of unit variance; returns latents of the same shape.
    """
    return _sample(_heun_step, edm, network, noise, num_steps, churn, guidance, network_kwargs)


@torch.no_grad()
def _sample(
    step: Callable[[_Slope, Tensor, float, float], Tensor],
    edm: EDM,
    network: Network,
    noise: Tensor,
    num_steps: int,
    churn: Churn | None,
    guidance: Guidance | None,
    network_kwargs: dict[str, Any],
) -> Tensor:
    def slope(x: Tensor, sigma: float) -> Tensor:
        """dx/dsigma = (x - D(x; sigma)) / sigma."""
        return (x - guided_denoise(edm, network, x, sigma, guidance, **network_kwargs)) / sigma

    sigmas = edm.sigmas(num_steps).tolist()
    x = noise * sigmas[0]
    for number, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        if churn is not None:
            x, sigma = churn.apply(x, sigma, number, num_steps)
        x = step(slope, x, sigma, following)
    return x


def _euler_step(slope: _Slope, x: Tensor, sigma: float, following: float) -> Tensor:
    return x + (following - sigma) * slope(x, sigma)


def _heun_step(slope: _Slope, x: Tensor, sigma: float, following: float) -> Tensor:
    first = slope(x, sigma)
    euler = x + (following - sigma) * first
    if following == 0:  # the network is not defined there
        return euler
    return x + (following - sigma) * ((first + slope(euler, following)) / 2)
