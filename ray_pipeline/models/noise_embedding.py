"""Embeddings of the noise level c_noise = ln(sigma) / 4 for the diffusion transformer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

NoiseEmbedding = Literal["reference", "scaled", "fourier"]
FREQUENCIES = 256


class NoiseEmbedder(nn.Module):
    """Features of c_noise, then a two-layer MLP: (B,) -> (B, hidden).

    `reference` is the reference DiT's sinusoid of c_noise as it is. `scaled` multiplies c_noise by 1000, as DiT's own
    timesteps reach 1000: over EDM's range of ln(sigma)/4 the unscaled sinusoid leaves most of its 256 dimensions
    constant. `fourier` are random Fourier features sqrt(2) cos(2 pi (f c_noise + phi)) (Karras et al. 2024, EDM2).
    """

    def __init__(self, hidden_size: int, embedding: NoiseEmbedding):
        super().__init__()
        self.scale = 1000.0 if embedding == "scaled" else 1.0
        self.fourier = FourierFeatures(FREQUENCIES) if embedding == "fourier" else None
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, c_noise: Tensor) -> Tensor:
        features = sinusoid(self.scale * c_noise) if self.fourier is None else self.fourier(c_noise)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class FourierFeatures(nn.Module):
    """Random Fourier features of a number, (B,) -> (B, count) float32: f standard normal, phi uniform in [0, 1).

    They are part of the weights, and the same in every network.
    """

    def __init__(self, count: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.empty(count))
        self.register_buffer("phases", torch.empty(count))
        if self.frequencies.device.type != "meta":
            self.frequencies.copy_(torch.randn(count, generator=generator, device="cpu"))
            self.phases.copy_(torch.rand(count, generator=generator, device="cpu"))

    def forward(self, value: Tensor) -> Tensor:
        angle = value.float()[:, None] * self.frequencies[None] + self.phases[None]
        return math.sqrt(2) * (2 * math.pi * angle).cos()


def sinusoid(position: Tensor) -> Tensor:
    """Cosines, then sines, of position (B,) at FREQUENCIES / 2 frequencies from 1 down to 1/10000 -> (B, FREQUENCIES)
    float32; the reference DiT's timestep embedding."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / half
    angle = position.float()[:, None] * torch.exp(-math.log(10000) * exponent)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
