"""Diffusion transformer (Peebles & Xie 2023) without classes, for EDM, with hints as tokens.

Parameter names are the reference DiT's, so that its weights load with strict=False leaving only y_embedder aside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_pipeline.models.architectures import ARCHITECTURES as ARCHITECTURES
from ray_pipeline.models.blocks import DiTBlock, FinalLayer
from ray_pipeline.models.hint_control import AlignedHint, HintCache, aligned_tokens, attention_bias, checked_mask
from ray_pipeline.models.lora import HintLoRA
from ray_pipeline.models.noise_embedding import NoiseEmbedder, NoiseEmbedding

#: c_noise = ln(sigma) / 4 of a clean image, taken at sigma_min = 0.002 (Karras et al. 2022)
CLEAN_C_NOISE = math.log(0.002) / 4


class DiT(nn.Module):
    """Unconditional diffusion transformer that takes hints as tokens.

    aligned: it also has the aligned hint path. lora_rank, lora_targets: low-rank parts of the layers that hints pass, 0
    for none. A fresh network returns exactly 0. `activation_checkpointing` trades one more forward pass for memory.
    """

    def __init__(
        self,
        *,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        latent_size: int = 64,
        latent_channels: int = 4,
        dropout: float = 0.0,
        noise_embedding: NoiseEmbedding = "scaled",
        qk_norm: bool = False,
        aligned: bool = False,
        lora_rank: int = 0,
        lora_targets: Sequence[str] = (),
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.latent_size, self.latent_channels, self.patch_size = latent_size, latent_channels, patch_size
        #: what decides how its weights compute, as arguments of build_dit
        self.shape = {
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "latent_size": latent_size,
            "latent_channels": latent_channels,
            "noise_embedding": noise_embedding,
            "qk_norm": qk_norm,
            "aligned": aligned,
            "lora_rank": lora_rank,
            "lora_targets": list(lora_targets),
        }
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(latent_size, patch_size, latent_channels, hidden_size)
        self.t_embedder = NoiseEmbedder(hidden_size, noise_embedding)
        positions = torch.from_numpy(sincos_positions(hidden_size, latent_size // patch_size)).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, dropout, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, latent_channels)
        self.aligned_hint = AlignedHint(latent_size, patch_size, latent_channels, hidden_size) if aligned else None
        self._initialise()
        self.hint_lora = None
        if lora_rank:
            self.hint_lora = HintLoRA(
                lora_rank, lora_targets, depth=depth, hidden_size=hidden_size, embedder=self.x_embedder
            )

    def freeze_base(self) -> None:
        """Leave only what hints alone use to be trained: the aligned path and the low-rank parts."""
        own = {id(p) for part in (self.aligned_hint, self.hint_lora) if part is not None for p in part.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in own)

    def _initialise(self) -> None:
        for module in (self.blocks, self.final_layer):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].weight, std=0.02)
            nn.init.zeros_(self.t_embedder.mlp[index].bias)
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        hints: Tensor | HintCache | None = None,
        hint_mask: Tensor | None = None,
        hint_strength: Tensor | None = None,
    ) -> Tensor:
        """Network output F for noisy latents x (B, C, H, W) at c_noise (B,), shaped like x.

        hints: (B, K, C, H, W) clean latents in any order, or a HintCache of them; hint_mask (B, K) bool, True =
        present (of a HintCache it masks further hints); hint_strength (B, K) above 0, 1 = as trained, towards 0 =
        absent. hints=None is the unconditional network.
        """
        condition = self.t_embedder(c_noise.expand(x.shape[0]))
        tokens = self.x_embedder(x) + self.pos_embed
        cache, bias = None, None
        if hints is not None:
            cache = hints.masked(hint_mask) if isinstance(hints, HintCache) else self.encode_hints(hints, hint_mask)
            bias = attention_bias(cache, tokens.shape[1], hint_strength, tokens.dtype)
            aligned = aligned_tokens(cache, hint_strength)
            if aligned is not None:
                tokens = tokens + aligned
        for index, block in enumerate(self.blocks):
            pair = (cache.keys[index], cache.values[index], bias) if cache else ()
            tokens = self._run(block, tokens, condition, *pair)
        return self._unpatchify(self.final_layer(tokens, condition))

    def encode_hints(self, hints: Tensor, hint_mask: Tensor | None = None) -> HintCache:
        """Keys and values of hints (B, K, C, H, W) in every block; serves all noise levels of a sample."""
        batch, count = hints.shape[:2]
        mask = checked_mask(hint_mask, batch, count, hints.device)
        if mask is not None:
            # a masked hint may hold anything, and a weight of 0 times inf or NaN is not 0
            hints = hints.masked_fill(~mask[:, :, None, None, None], 0)
        flat = hints.flatten(0, 1)
        clean = torch.full((1,), CLEAN_C_NOISE, device=hints.device)
        condition = self.t_embedder(clean)
        tokens = self._embed_hints(flat) + self.pos_embed
        length = tokens.shape[1]
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            lora = None if self.hint_lora is None else self.hint_lora.blocks[index]
            tokens, k, v = self._run(block.forward_hint, tokens, condition, last, lora)
            keys.append(_join_groups(k, batch))
            values.append(_join_groups(v, batch))
        aligned = None
        if self.aligned_hint is not None:
            aligned = self.aligned_hint(flat).unflatten(0, (batch, count))
        return HintCache(keys=keys, values=values, aligned=aligned, mask=mask, count=count, tokens=length)

    def _embed_hints(self, hints: Tensor) -> Tensor:
        """hints (B*K, C, H, W) -> tokens (B*K, T, hidden), without positions."""
        tokens = self.x_embedder(hints)
        lora = None if self.hint_lora is None else self.hint_lora.x_embedder
        return tokens if lora is None else tokens + lora(hints)

    def _run(self, function, *arguments):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, T, p*p*C) -> (B, C, H, W)."""
        grid, patch, channels = self.latent_size // self.patch_size, self.patch_size, self.latent_channels
        x = x.view(x.shape[0], grid, grid, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], channels, grid * patch, grid * patch)


def build_dit(
    architecture: str, latent_size: int = 64, latent_channels: int = 4, dropout: float = 0.0, **overrides
) -> DiT:
    """A DiT by name ("DiT-XL/8", or "custom" with every size among the overrides).

    Overrides: depth, hidden_size, num_heads, patch_size, noise_embedding, qk_norm, aligned, lora_rank, lora_targets,
    activation_checkpointing.
    Raises ValueError for an unknown name.
    """
    if architecture != "custom" and architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}, custom")
    shape = {**ARCHITECTURES.get(architecture, {}), **overrides}
    return DiT(latent_size=latent_size, latent_channels=latent_channels, dropout=dropout, **shape)


def sincos_positions(hidden_size: int, grid: int) -> np.ndarray:
    """Fixed 2-D sine-cosine positions (grid*grid, hidden_size), float64, column coordinate first (as MAE and DiT)."""

    def axis(coordinate: np.ndarray) -> np.ndarray:
        quarter = hidden_size // 4
        omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
        angle = coordinate.reshape(-1)[:, None] * omega[None]
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    rows, columns = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64), indexing="ij")
    return np.concatenate([axis(columns), axis(rows)], axis=1)


def _join_groups(x: Tensor, batch: int) -> Tensor:
    """(B*K, heads, T, d) -> (B, heads, K*T, d)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
