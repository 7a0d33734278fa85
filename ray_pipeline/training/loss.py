"""What a training pass computes, as one module, so that DistributedDataParallel sees every trained parameter in it."""

from __future__ import annotations

from torch import Tensor, nn

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.models.loss_uncertainty import LossUncertainty


class TrainingLoss(nn.Module):
    """The weighted EDM loss of a network, and what its gradient is taken of."""

    def __init__(self, edm: EDM, network: nn.Module, uncertainty: LossUncertainty | None = None):
        super().__init__()
        self.edm, self.network, self.uncertainty = edm, network, uncertainty

    def forward(
        self, x0: Tensor, noise: Tensor, z: Tensor, hints: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x0, noise (B, C, H, W), z (B,), hints (B, K, C, H, W), mask (B, K) -> loss and objective, each (B,) float32.

        The objective is the loss, or with an uncertainty u of it loss / exp(u) + u.
        """
        sigma = self.edm.sigma_from_normal(z)
        conditions = {} if hints is None else {"hints": hints, "hint_mask": mask}
        loss = self.edm.loss(self.network, x0, sigma, noise, **conditions)
        if self.uncertainty is None:
            return loss, loss
        u = self.uncertainty(sigma.log() / 4)
        return loss, loss * (-u).exp() + u
