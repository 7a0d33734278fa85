"""Settings of `ray-pipeline train-vae`; apart from the training, so that the command line need not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ray_pipeline.errors import UserError


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of one training; `blocks` counts residual blocks a level, from full resolution down."""

    steps: int = 3600
    width: int = 32
    blocks: tuple[int, int, int, int] = (0, 2, 4, 6)
    batch_size: int = 8
    crop: int = 128
    lr: float = 1.5e-3
    l1_weight: float = 0.03
    latent_weight: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "width", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a number above 0")
        if self.crop % 8:
            raise UserError(f"--crop {self.crop} is not a multiple of 8, the autoencoder's downscaling")
