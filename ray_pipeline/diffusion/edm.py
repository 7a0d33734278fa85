"""EDM: preconditioning, training loss and noise grid of Karras et al. 2022, with diffusers' v-prediction sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class EDM:
    """The diffusion process of one model; sigma is the noise's standard deviation in units of the latents."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        if self.prediction_type not in ("v_prediction", "epsilon"):
            raise ValueError(f"prediction_type is {self.prediction_type!r}, expected 'v_prediction' or 'epsilon'")

    @property
    def _sign(self) -> float:
        return -1.0 if self.prediction_type == "v_prediction" else 1.0

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """EDM coefficients at noise level `sigma` (B,) -> four (B,) tensors c_skip, c_out, c_in, c_noise.

        Karras et al. 2022, Table 1, last column; with v_prediction c_out has the sign that diffusers'
        EDMEulerScheduler gives it.
        """
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = self._sign * sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4

    def denoise(self, network: Network, x: Tensor, sigma: Tensor, **network_kwargs) -> Tensor:
        """Denoised estimate D(x; sigma), shaped like x (Karras et al. 2022, equation 7)."""
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma)
        output = network(_expand(c_in, x) * x, c_noise, **network_kwargs)
        return _expand(c_skip, x) * x + _expand(c_out, x) * output.to(x.dtype)

    def target(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """What the network should output for x = x0 + sigma * noise; noise has unit variance.

        (x0 - c_skip x) / c_out with the powers of sigma cancelled by hand, so that small sigma loses no digits.
        """
        data = self.sigma_data
        scale = self._sign / (data * (sigma**2 + data**2).sqrt())
        return _expand(scale, x0) * (_expand(sigma, x0) * x0 - data**2 * noise)

    def loss(self, network: Network, x0: Tensor, sigma: Tensor, noise: Tensor, **network_kwargs) -> Tensor:
        """Weighted EDM loss a sample, (B,), the mean over its elements (Karras et al. 2022, equation 8).

        weight * (D - x0)^2 equals (F - target)^2 exactly; a network that returns zero scores 1 on latents whose
        standard deviation is sigma_data.
        """
        _, _, c_in, c_noise = self.preconditioning(sigma)
        x = x0 + _expand(sigma, x0) * noise
        output = network(_expand(c_in, x) * x, c_noise, **network_kwargs)
        return (output.to(x0.dtype) - self.target(x0, sigma, noise)).square().flatten(1).mean(dim=1)

    def sigma_from_normal(self, z: Tensor) -> Tensor:
        """Noise levels for training from standard normal numbers: ln sigma = P_mean + P_std z."""
        return (self.P_mean + self.P_std * z).exp()

    def sigmas(self, num_steps: int) -> Tensor:
        """Sampling grid (num_steps + 1,) float64, sigma_max down to sigma_min, then 0 (equation 5)."""
        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}, expected at least 2")
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)])

    def validation_sigmas(self, count: int) -> Tensor:
        """`count` fixed noise levels: midpoints of equal slices of the training distribution, float64."""
        quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return self.sigma_from_normal(torch.special.ndtri(quantile))


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
