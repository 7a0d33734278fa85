"""Diffusion transformer (Peebles & Xie 2023) without classes, for EDM, with hints as tokens.

Parameter names are the reference DiT's, so that its weights load with strict=False leaving only y_embedder aside.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_pipeline.models.architectures import ARCHITECTURES as ARCHITECTURES
from ray_pipeline.models.hint_control import AlignedHint, HintCache, aligned_tokens, attention_bias, present

#: c_noise = ln(sigma) / 4 of a clean image, taken at sigma_min = 0.002 (Karras et al. 2022)
CLEAN_C_NOISE = math.log(0.002) / 4

NoiseEmbedding = Literal["reference", "scaled"]


class NoiseEmbedder(nn.Module):
    """Sinusoid of c_noise, then a two-layer MLP: (B,) -> (B, hidden).

    `reference` feeds c_noise as it is. `scaled` multiplies it by 1000, as DiT's own timesteps reach 1000: over EDM's
    range of ln(sigma)/4 the unscaled sinusoid leaves most of its 256 dimensions constant.
    """

    frequencies = 256

    def __init__(self, hidden_size: int, embedding: NoiseEmbedding):
        super().__init__()
        self.scale = {"reference": 1.0, "scaled": 1000.0}[embedding]
        self.mlp = nn.Sequential(
            nn.Linear(self.frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device) / half
        angle = (self.scale * c_noise.float())[:, None] * torch.exp(-math.log(10000) * exponent)[None]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention by SDPA; image queries may attend to further keys and values (hints)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_drop = nn.Dropout(dropout)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, hidden) -> queries, keys, values, each (B, heads, T, head_dim)."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention and output projection -> (B, T, hidden)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class DiTBlock(nn.Module):
    """adaLN-Zero block (Peebles & Xie 2023, Figure 3)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, dropout)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(
            hidden_size,
            int(hidden_size * mlp_ratio),
            act_layer=lambda: nn.GELU(approximate="tanh"),
            drop=dropout,
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition (B, hidden) -> shift, scale, gate of attention, then of the MLP, each (B, 1, hidden)."""
        return self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)

    def heads(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the modulated, normalised tokens."""
        return self.attn.heads(_modulate(self.norm1(x), parts[0], parts[1]))

    def rest(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """Both residual branches, given the attention's output."""
        x = torch.addcmul(x, parts[2], attended)
        return torch.addcmul(x, parts[5], self.mlp(_modulate(self.norm2(x), parts[3], parts[4])))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        hint_k: Tensor | None = None,
        hint_v: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        parts = self.modulation(condition)
        q, k, v = self.heads(x, parts)
        if hint_k is not None:
            k, v = torch.cat([k, hint_k.to(k.dtype)], dim=2), torch.cat([v, hint_v.to(v.dtype)], dim=2)
        return self.rest(x, self.attn.attend(q, k, v, bias), parts)

    def forward_hint(self, x: Tensor, condition: Tensor, last: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Hint tokens attend to their own group; returns the tokens (None after the last block), keys and values."""
        parts = self.modulation(condition)
        q, k, v = self.heads(x, parts)
        return (None if last else self.rest(x, self.attn.attend(q, k, v), parts)), k, v


class FinalLayer(nn.Module):
    """adaLN and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Unconditional diffusion transformer; with `hint_control` it also has the aligned hint path.

    A fresh network returns exactly 0. `activation_checkpointing` trades one more forward pass for memory.
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
        hint_control: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.latent_size, self.latent_channels, self.patch_size = latent_size, latent_channels, patch_size
        #: what decides how its weights compute, named as in the model section
        self.shape = {
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "latent_size": latent_size,
            "latent_channels": latent_channels,
            "noise_embedding": noise_embedding,
        }
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(latent_size, patch_size, latent_channels, hidden_size)
        self.t_embedder = NoiseEmbedder(hidden_size, noise_embedding)
        positions = torch.from_numpy(sincos_positions(hidden_size, latent_size // patch_size)).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, dropout) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, latent_channels)
        self.aligned_hint = AlignedHint(latent_size, patch_size, latent_channels, hidden_size) if hint_control else None
        self._initialise()

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
        mask = present(hint_mask, batch, count, hints.device)
        # a masked hint may hold anything, and a weight of 0 times inf or NaN is not 0
        flat = hints.masked_fill(~mask[:, :, None, None, None], 0).flatten(0, 1)
        clean = torch.full((1,), CLEAN_C_NOISE, device=hints.device)
        condition = self.t_embedder(clean)
        tokens = self.x_embedder(flat) + self.pos_embed
        length = tokens.shape[1]
        keys, values = [], []
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            tokens, k, v = self._run(block.forward_hint, tokens, condition, last)
            keys.append(_join_groups(k, batch))
            values.append(_join_groups(v, batch))
        aligned = None
        if self.aligned_hint is not None:
            aligned = self.aligned_hint(flat).unflatten(0, (batch, count))
        return HintCache(keys=keys, values=values, aligned=aligned, mask=mask, tokens=length)

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

    Overrides: depth, hidden_size, num_heads, patch_size, noise_embedding, hint_control, activation_checkpointing.
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


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _join_groups(x: Tensor, batch: int) -> Tensor:
    """(B*K, heads, T, d) -> (B, heads, K*T, d)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
