"""Exponential moving average of a network's trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of the trainable parameters: average = decay * average + (1 - decay) * weights.

    `update` counts optimizer steps from 1 and acts on every `update_every`-th. Up to and including `start_step` the
    average is a copy of the weights.
    """

    def __init__(self, model: nn.Module, decay: float, update_every: int = 1, start_step: int = 0):
        self.decay, self.update_every, self.start_step = decay, update_every, start_step
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self.averages: list[Tensor] = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        if step <= self.start_step:
            torch._foreach_copy_(self.averages, [p.detach() for p in self._parameters])
        elif step % self.update_every == 0:
            torch._foreach_lerp_(self.averages, [p.detach() for p in self._parameters], 1 - self.decay)

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

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self.averages[index] = self.averages[index], parameter.data
