"""Tiles from noise: each is a function of its seed, its hints and the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from ray_pipeline.diffusion.guidance import Guidance
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.diffusion.samplers import Churn, CountedNetwork, sample_euler, sample_heun
from ray_pipeline.errors import UserError
from ray_pipeline.inference.prior import Prior, TrainedNetwork
from ray_pipeline.inference.settings import SamplerSettings
from ray_pipeline.models.dit import DiT

SAMPLERS = {"euler": sample_euler, "heun": sample_heun}


class TileSampler:
    """Draws batches of tiles. calls, guide_calls: network evaluations so far, one of a whole batch is one."""

    def __init__(
        self,
        prior: Prior,
        settings: SamplerSettings,
        *,
        precision: str = "fp32",
        hints: Sequence[str] = (),
        strength: Mapping[str, float] | None = None,
        guide: TrainedNetwork | None = None,
        tick: Callable[[int], None] = lambda calls: None,
    ):
        """hints: names, in the order in which `draw` gets them; strength: of those that are not 1; tick: told after
        each call of the network how many there were."""
        self.prior, self.settings, self.guide, self.hints = prior, settings, guide, tuple(hints)
        self._precision, self._strength, self._tick = precision, dict(strength or {}), tick
        self._network = CountedNetwork(prior.network)
        self._guide = CountedNetwork(prior.network if guide is None else guide.network)

    @property
    def calls(self) -> int:
        return self._network.calls

    @property
    def guide_calls(self) -> int:
        return self._guide.calls

    @torch.no_grad()
    def draw(self, seeds: Sequence[int], hints: np.ndarray | None = None) -> np.ndarray:
        """One tile a seed, (B, H, W) float32 in [-1, 1]; hints: stored latents (B, K, C, h, w).

        UserError where a result is not finite.
        """
        prior, settings = self.prior, self.settings
        normalised = None
        if hints is not None:
            normalised = torch.from_numpy(prior.stats.normalise(hints, prior.edm.sigma_data)).to(prior.device)
        with self._autocast():
            latents = SAMPLERS[settings.sampler](
                prior.edm,
                self._told,
                self._noise(seeds, "sample", 0),
                settings.steps,
                churn=self._churn(seeds),
                guidance=self._guidance(normalised),
                **self._conditions(prior.network, self.hints, normalised),
            )
        stored = prior.stats.denormalise(latents.float().cpu().numpy(), prior.edm.sigma_data)
        for seed, latent in zip(seeds, stored, strict=True):
            if not np.isfinite(latent).all():
                raise UserError(
                    f"the tile of seed {seed} is not finite; use --precision fp32, or less --guidance and --churn"
                )
        # one by one: so a tile does not depend on its batch here, and large ones need no more memory
        tiles = [prior.autoencoder.decode(torch.from_numpy(latent[None]))[0].cpu() for latent in stored]
        return torch.stack(tiles).numpy()

    def _noise(self, seeds: Sequence[int], purpose: str, index: int) -> Tensor:
        shape = self.prior.latent_shape
        return torch.from_numpy(np.concatenate([draw(seed, purpose, [index], shape).noise for seed in seeds])).to(
            self.prior.device
        )

    def _churn(self, seeds: Sequence[int]) -> Churn | None:
        settings = self.settings
        if settings.churn == 0:
            return None
        return Churn(
            settings.churn,
            noise=lambda step: self._noise(seeds, "sample churn", step),
            s_tmin=settings.churn_min,
            s_tmax=settings.churn_max,
            s_noise=settings.churn_noise,
        )

    def _guidance(self, hints: Tensor | None) -> Guidance | None:
        if self.settings.guidance == 1:
            return None
        conditions = {}
        if self.guide is not None:
            known = [name for name in self.hints if name in self.guide.header.hints]
            chosen = None if not known else hints[:, [self.hints.index(name) for name in known]]
            conditions = self._conditions(self.guide.network, known, chosen)
        return Guidance(
            self.settings.guidance,
            network=self._guide,
            interval=self.settings.guidance_interval,
            conditions=conditions,
        )

    def _conditions(self, network: DiT, names: Sequence[str], hints: Tensor | None) -> dict:
        """Keyword arguments of a network for a batch: its hints, encoded once for all noise levels."""
        if hints is None:
            return {}
        conditions = {"hints": network.encode_hints(hints)}
        strength = [self._strength.get(name, 1.0) for name in names]
        if any(value != 1 for value in strength):
            conditions["hint_strength"] = hints.new_tensor([strength] * len(hints))
        return conditions

    def _told(self, *args, **kwargs) -> Tensor:
        output = self._network(*args, **kwargs)
        self._tick(self.calls)
        return output

    def _autocast(self) -> AbstractContextManager:
        if self._precision == "bf16":
            return torch.autocast(self.prior.device.type, torch.bfloat16)
        return nullcontext()
