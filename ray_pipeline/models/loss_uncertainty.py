"""Uncertainty of the loss as a function of the noise level (Karras et al. 2024, EDM2, equations 14 to 16)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ray_pipeline.models.noise_embedding import FourierFeatures

FEATURES = 128


class LossUncertainty(nn.Module):
    """u(c_noise), linear in 128 Fourier features: training minimises loss / exp(u) + u, whose best u is the logarithm
    of the expected loss, so that every noise level has equal weight. A fresh one is 0, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FourierFeatures(FEATURES)
        self.linear = nn.Linear(FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise (B,) -> u (B,) float32, under autocast too."""
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.linear(self.features(c_noise))[:, 0]
