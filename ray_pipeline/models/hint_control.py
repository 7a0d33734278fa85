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
    has no aligned path; mask: (B, K) bool, True = present, or None where all are; count: K; tokens: T.
    """

    keys: list[Tensor]
    values: list[Tensor]
    aligned: Tensor | None
    mask: Tensor | None
    count: int
    tokens: int

    def masked(self, mask: Tensor | None) -> HintCache:
        """The same cache with only those hints present that `mask` (B, K) keeps as well; None keeps all."""
        mask = checked_mask(mask, len(self.keys[0]), self.count, self.keys[0].device)
        if mask is None:
            return self
        return replace(self, mask=mask if self.mask is None else self.mask & mask)


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


def checked_mask(mask: Tensor | None, batch: int, hints: int, device: torch.device) -> Tensor | None:
    """The hint mask as (B, K) bool, None where every hint is present; ValueError for another shape."""
    if mask is None:
        return None
    if mask.shape != (batch, hints):
        raise ValueError(f"hint_mask has shape {tuple(mask.shape)}, expected {(batch, hints)}")
    return mask.to(device=device, dtype=torch.bool)


def attention_bias(cache: HintCache, image_tokens: int, strength: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive attention bias (B, 1, 1, image_tokens + K*T): 0 for image tokens, ln(strength) for a present hint,
    -inf for a masked one; None where it would be 0 everywhere, so that attention takes its fastest path."""
    if cache.mask is None and strength is None:
        return None
    bias = torch.zeros((len(cache.keys[0]), cache.count), dtype=dtype, device=cache.keys[0].device)
    if strength is not None:
        bias = bias + strength.to(bias).log()
    if cache.mask is not None:
        bias = bias.masked_fill(~cache.mask, float("-inf"))
    bias = bias.repeat_interleave(cache.tokens, dim=1)
    return torch.nn.functional.pad(bias, (image_tokens, 0))[:, None, None, :]


def aligned_tokens(cache: HintCache, strength: Tensor | None) -> Tensor | None:
    """Mean over the present hints of their aligned tokens, weighted by strength, times the largest strength;
    (B, T, hidden) or None. So a hint whose strength goes to 0 fades out of the mean, as if it were absent."""
    if cache.aligned is None:
        return None
    weight = cache.aligned.new_ones(cache.aligned.shape[:2])
    if cache.mask is not None:
        weight = weight * cache.mask
    if strength is not None:
        weight = weight * strength.to(weight)
    total = weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.einsum("bk,bkth->bth", weight / total * weight.amax(dim=1, keepdim=True), cache.aligned)
