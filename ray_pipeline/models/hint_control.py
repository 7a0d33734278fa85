"""Hints as token groups beside the image tokens (OminiControl), plus an aligned path.

Tan et al. 2024 ("OminiControl"): a hint passes the same patch embedding and positions as the image, is conditioned
on the clean noise level, image tokens attend to every token, and a hint group attends only to itself. Its keys and
values therefore do not depend on the noise level and serve every sampling step.

The aligned path (a zero-initialised patch embedding of the mean hint, added to the image tokens) lets a network
use a spatially aligned hint from the first steps; attention alone must first discover that equal positions belong
together. It carries no label of the hint either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn


@dataclass(frozen=True)
class HintCache:
    """What the image tokens need of the hints: independent of the noise level.

    keys, values: one (B, heads, K*T, head_dim) tensor a block; aligned: (B, K, T, hidden) or None where the network
    has no aligned path; mask: (B, K) bool, True = present; tokens: T.
    """

    keys: list[Tensor]
    values: list[Tensor]
    aligned: Tensor | None
    mask: Tensor
    tokens: int

    def masked(self, mask: Tensor | None) -> HintCache:
        """The same cache with only those hints present that `mask` (B, K) keeps as well; None keeps all."""
        return self if mask is None else replace(self, mask=self.mask & present(mask, *self.mask.shape, mask.device))


class AlignedHint(nn.Module):
    """Zero-initialised patch embedding of hints, so that a fresh one changes nothing."""

    def __init__(self, latent_size: int, patch_size: int, latent_channels: int, hidden_size: int):
        super().__init__()
        self.embedder = PatchEmbed(latent_size, patch_size, latent_channels, hidden_size)
        nn.init.zeros_(self.embedder.proj.weight)
        nn.init.zeros_(self.embedder.proj.bias)

    def forward(self, hints: Tensor) -> Tensor:
        """hints (B*K, C, H, W) -> (B*K, T, hidden)."""
        return self.embedder(hints)


def present(mask: Tensor | None, batch: int, hints: int, device: torch.device) -> Tensor:
    """The hint mask as (B, K) bool; None means that every hint is present."""
    if mask is None:
        return torch.ones(batch, hints, dtype=torch.bool, device=device)
    if mask.shape != (batch, hints):
        raise ValueError(f"hint_mask has shape {tuple(mask.shape)}, expected {(batch, hints)}")
    return mask.to(device=device, dtype=torch.bool)


def attention_bias(cache: HintCache, image_tokens: int, strength: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Additive attention bias (B, 1, 1, image_tokens + K*T): 0 for image tokens, ln(strength) for a present hint,
    -inf for a masked one."""
    bias = torch.zeros(cache.mask.shape, dtype=dtype, device=cache.mask.device)
    if strength is not None:
        bias = bias + strength.to(bias).log()
    bias = bias.masked_fill(~cache.mask, float("-inf"))
    bias = bias.repeat_interleave(cache.tokens, dim=1)
    return torch.nn.functional.pad(bias, (image_tokens, 0))[:, None, None, :]


def aligned_tokens(cache: HintCache, strength: Tensor | None) -> Tensor | None:
    """Mean over the present hints of their aligned tokens, weighted by strength, times the largest strength;
    (B, T, hidden) or None. So a hint whose strength goes to 0 fades out of the mean, as if it were absent."""
    if cache.aligned is None:
        return None
    weight = cache.mask.to(cache.aligned.dtype)
    if strength is not None:
        weight = weight * strength.to(weight)
    total = weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.einsum("bk,bkth->bth", weight / total * weight.amax(dim=1, keepdim=True), cache.aligned)
