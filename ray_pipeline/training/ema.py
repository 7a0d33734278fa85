"""Moving averages of a network's trained weights, exponential and power-function, for use and for saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ray_pipeline.models.posthoc_ema import gamma_of_std, power_beta
from ray_pipeline.models.posthoc_ema import reconstruct as reconstruct


class _Averages:
    """One average of each trainable parameter, at first a copy; `names`, `averages` in the model's order."""

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self.averages: list[Tensor] = [p.detach().clone() for p in self._parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model computes with the averages; storage is exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def tensors(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over averages by parameter name; KeyError for a missing one."""
        torch._foreach_copy_(self.averages, [tensors[name] for name in self.names])

    @torch.no_grad()
    def _take_in(self, share: float) -> None:
        """average = (1 - share) * average + share * weights; a copy for share 1."""
        weights = [p.detach() for p in self._parameters]
        if share == 1:
            torch._foreach_copy_(self.averages, weights)
        else:
            torch._foreach_lerp_(self.averages, weights, share)

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self.averages[index] = self.averages[index], parameter.data


def average_group(decay: float) -> str:
    """Name of the average of a decay, in checkpoints and records: ema_decay_0.9999."""
    return f"ema_decay_{decay}"


class EMA(_Averages):
    """Average of the trainable parameters: average = decay * average + (1 - decay) * weights.

    `update` counts optimizer steps from 1 and acts on every `update_every`-th. Up to and including `start_step` the
    average is a copy of the weights.
    """

    def __init__(self, model: nn.Module, decay: float, update_every: int = 1, start_step: int = 0):
        super().__init__(model)
        self.decay, self.update_every, self.start_step = decay, update_every, start_step

    @property
    def group(self) -> str:
        """Name to save it under, such as ema_decay_0.9999."""
        return average_group(self.decay)

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        if step <= self.start_step:
            self._take_in(1)
        elif step % self.update_every == 0:
            self._take_in(1 - self.decay)


class PowerTrack(_Averages):
    """Power-function average of relative std `std` (Karras et al. 2024, EDM2, section 3.1).

    `update` counts optimizer steps from 1 and acts on every `update_every`-th; the first is a copy.
    """

    def __init__(self, model: nn.Module, std: float, update_every: int = 1):
        self.std, self.gamma, self.update_every = std, gamma_of_std(std), update_every
        super().__init__(model)

    @property
    def group(self) -> str:
        """Name to save it under, such as ema_power_0.05."""
        return f"ema_power_{self.std}"

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        if step % self.update_every == 0:
            self._take_in(1 - power_beta(step, self.gamma, self.update_every))


class PowerEMA:
    """A PowerTrack for each relative std in `stds`; snapshots of two give any other by `reconstruct`."""

    def __init__(self, model: nn.Module, stds: Sequence[float], update_every: int = 1):
        if len(set(stds)) < len(stds):
            raise ValueError(f"stds are {list(stds)}, expected each once")
        self.tracks = [PowerTrack(model, std, update_every) for std in stds]

    def __getitem__(self, std: float) -> PowerTrack:
        """The track of relative std `std`; KeyError when there is none."""
        return {track.std: track for track in self.tracks}[std]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        for track in self.tracks:
            track.update(step)
