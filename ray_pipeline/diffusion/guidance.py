"""Guidance: a network's denoised estimate, moved away from that of a worse one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ray_pipeline.diffusion.edm import EDM, Network


@dataclass(frozen=True)
class Guidance:
    """Denoised estimate D_guide + weight * (D - D_guide), at noise levels inside `interval` only.

    weight: 1 is no guidance; Ho & Salimans 2022, equation 6, write 1 + w.
    network: the guide. None: the sampled network itself, with `conditions` in place of its own, so that by default it
    is guided towards its hints (Ho & Salimans 2022). Else an earlier or smaller model, as a rule with the same
    conditions (autoguidance: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself").
    interval: (lo, hi], in sigma (Kynkaanniemi et al. 2024); compared in float32, so that the rounding of a sampling
    grid's ends does not exclude them.
    conditions: keyword arguments of the guide for the batch that is sampled; a hint cache belongs to one network.
    """

    weight: float
    network: Network | None = None
    interval: tuple[float, float] = (0.0, math.inf)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"guidance weight is {self.weight}, expected a finite number of at least 0")
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"guidance interval is ({low}, {high}], expected 0 <= lo < hi")

    def acts(self, sigma: float) -> bool:
        """Whether the estimate at noise level `sigma` differs from the network's own."""
        low, high = map(np.float32, self.interval)
        return self.weight != 1 and bool(low < np.float32(sigma) <= high)


def guided_denoise(
    edm: EDM, network: Network, x: Tensor, sigma: float, guidance: Guidance | None, **network_kwargs: Any
) -> Tensor:
    """Denoised estimate of x (B, ...) at noise level `sigma` of the whole batch, shaped like x.

    Calls `network` once, and the guide once more where the guidance acts.
    """
    level = x.new_full((x.shape[0],), sigma)
    denoised = edm.denoise(network, x, level, **network_kwargs)
    if guidance is None or not guidance.acts(sigma):
        return denoised
    guide = network if guidance.network is None else guidance.network
    guide_denoised = edm.denoise(guide, x, level, **guidance.conditions)
    return guide_denoised + guidance.weight * (denoised - guide_denoised)
