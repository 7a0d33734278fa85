"""Parts of the diffusion transformer: attention, the adaLN-Zero block, and the final layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ray_pipeline.models.lora import adapted


class Attention(nn.Module):
    """Multi-head self-attention by SDPA; image queries may attend to further keys and values (hints).

    With `qk_norm`, queries and keys of each head are divided by their root mean square (Dehghani et al. 2023, with
    RMSNorm), which keeps the products small in low precision.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_drop = nn.Dropout(dropout)

    def heads(self, x: Tensor, lora: nn.ModuleDict | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, hidden) -> queries, keys, values, each (B, heads, T, head_dim)."""
        batch, tokens, hidden = x.shape
        qkv = adapted(self.qkv, x, lora, "qkv").view(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, lora: nn.ModuleDict | None = None
    ) -> Tensor:
        """Scaled dot-product attention and output projection -> (B, T, hidden)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.proj_drop(adapted(self.proj, out.transpose(1, 2).flatten(2), lora, "proj"))


class DiTBlock(nn.Module):
    """adaLN-Zero block (Peebles & Xie 2023, Figure 3). `lora`: what is added to its layers where hints pass them."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, qk_norm: bool, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, dropout, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(
            hidden_size,
            int(hidden_size * mlp_ratio),
            act_layer=lambda: nn.GELU(approximate="tanh"),
            drop=dropout,
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        hint_k: Tensor | None = None,
        hint_v: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Image tokens x (B, T, hidden), condition (B, hidden); hint_k, hint_v (B, heads, K*T, head_dim)."""
        parts = self._modulation(condition)
        q, k, v = self._heads(x, parts)
        if hint_k is not None:
            k, v = torch.cat([k, hint_k.to(k.dtype)], dim=2), torch.cat([v, hint_v.to(v.dtype)], dim=2)
        return self._residuals(x, self.attn.attend(q, k, v, bias), parts)

    def forward_hint(
        self, x: Tensor, condition: Tensor, last: bool, lora: nn.ModuleDict | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Hint tokens attend to their own group; returns the tokens (None after the last block), keys and values."""
        parts = self._modulation(condition, lora)
        q, k, v = self._heads(x, parts, lora)
        if last:
            return None, k, v
        return self._residuals(x, self.attn.attend(q, k, v, lora=lora), parts, lora), k, v

    def _modulation(self, condition: Tensor, lora: nn.ModuleDict | None = None) -> tuple[Tensor, ...]:
        """condition (B, hidden) -> shift, scale, gate of attention, then of the MLP, each (B, 1, hidden)."""
        silu, linear = self.adaLN_modulation
        return adapted(linear, silu(condition), lora, "adaLN_modulation")[:, None].chunk(6, dim=-1)

    def _heads(
        self, x: Tensor, parts: tuple[Tensor, ...], lora: nn.ModuleDict | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the modulated, normalised tokens."""
        return self.attn.heads(modulate(self.norm1(x), parts[0], parts[1]), lora)

    def _residuals(
        self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...], lora: nn.ModuleDict | None = None
    ) -> Tensor:
        """Both residual branches, given the attention's output."""
        x = torch.addcmul(x, parts[2], attended)
        inner = adapted(self.mlp.fc1, modulate(self.norm2(x), parts[3], parts[4]), lora, "fc1")
        inner = adapted(self.mlp.fc2, self.mlp.drop1(self.mlp.act(inner)), lora, "fc2")
        return torch.addcmul(x, parts[5], self.mlp.drop2(inner))


class FinalLayer(nn.Module):
    """adaLN and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)
