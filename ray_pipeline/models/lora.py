"""Low-rank adaptation (Hu et al. 2021) of the hint branch: the layers that hints pass compute W x + B A x, while image
tokens pass W alone, so that without hints a network with frozen W is the one that it was."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import PatchEmbed
from torch import Tensor, nn

from ray_pipeline.models.architectures import LORA_TARGETS

#: in the last block hints only give keys and values, so nothing after these layers would ever have a gradient
_LAST_BLOCK = ("adaLN_modulation", "qkv")


class HintLoRA(nn.Module):
    """The B A of every target layer. B begins as zero, so that a fresh one changes nothing. alpha = rank: no further
    scale."""

    def __init__(self, rank: int, targets: Sequence[str], *, depth: int, hidden_size: int, embedder: PatchEmbed):
        super().__init__()
        unknown = [name for name in targets if name not in LORA_TARGETS]
        if unknown or rank < 1 or not targets:
            raise ValueError(f"expected rank >= 1 and targets of {', '.join(LORA_TARGETS)}, found {rank}, {targets}")
        sizes = {
            "adaLN_modulation": (hidden_size, 6 * hidden_size),
            "qkv": (hidden_size, 3 * hidden_size),
            "proj": (hidden_size, hidden_size),
            "fc1": (hidden_size, 4 * hidden_size),
            "fc2": (4 * hidden_size, hidden_size),
        }
        self.x_embedder = None
        if "x_embedder" in targets:
            size, patch, channels = embedder.img_size, embedder.patch_size, embedder.proj.in_channels
            self.x_embedder = _low_rank(PatchEmbed(size, patch, channels, rank, bias=False), rank, hidden_size)
        inner = [name for name in targets if name in sizes]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                name: _low_rank(nn.Linear(sizes[name][0], rank, bias=False), rank, sizes[name][1])
                for name in inner
                if index < depth - 1 or name in _LAST_BLOCK
            })
            for index in range(depth)
        )  # fmt: skip


def adapted(layer: nn.Module, x: Tensor, lora: nn.ModuleDict | None, name: str) -> Tensor:
    """layer(x), plus the low-rank part of that name where there is one."""
    out = layer(x)
    return out + lora[name](x) if lora is not None and name in lora else out


def _low_rank(down: nn.Module, rank: int, out: int) -> nn.Sequential:
    up = nn.Linear(rank, out, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)
