"""The sweep section: which values trials take, how many trials there are, and when one is given up."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ray_pipeline.sections import Positive, Section


class Dimension(Section):
    """Values of one key: exactly one of these.

    choice: drawn from a list. grid: every one of a list, with every one of the other grids. uniform, log_uniform: drawn
    between two bounds.
    """

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"expected one of choice, grid, uniform and log_uniform, found {found}")
        values = self.values
        if values is not None and any(value in values[:number] for number, value in enumerate(values)):
            raise ValueError(f"{given[0]} lists a value twice: {list(values)}")
        if values is None:
            low, high = self.bounds
            if low >= high or (self.log_uniform and low <= 0):
                least = "0 < low < high" if self.log_uniform else "low < high"
                raise ValueError(f"{given[0]} is [{low}, {high}], expected {least}")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Of a choice or a grid; None for a range."""
        return self.choice if self.choice is not None else self.grid

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a range."""
        return self.uniform or self.log_uniform

    def at(self, share: float) -> float:
        """The value of a range at a share of its way, 0 to 1."""
        if self.uniform:
            low, high = self.uniform
            return low + share * (high - low)
        low, high = map(math.log, self.log_uniform)
        return math.exp(low + share * (high - low))


class SweepConfig(Section):
    """The search before a conditional phase: short trainings that differ in some keys of the config.

    trains: the phase whose first `epochs` epochs the trials are; it then goes on from the best trial. Or the first
    phase: trials are further epochs of it, and the next phase begins from the best. space: by key, `phases[].` standing
    for the phase that the trials train; empty: averages, dropout and hint dropout. num_trials: trainings at most;
    values of ema.decay cost none. asha ends a trial after grace_epochs, after reduction_factor times as many, and so
    on, unless its loss is among the best 1 / reduction_factor of the trials that have come so far.
    """

    enabled: bool = False
    trains: str = "phase2_conditional"
    space: dict[str, Dimension] = Field(default_factory=dict)
    num_trials: Positive = 6
    epochs: Positive = 3
    scheduler: Literal["asha", "fifo"] = "asha"
    grace_epochs: Positive = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    search: Literal["random", "optuna"] = "random"
    metric: Literal["val_loss"] = "val_loss"
    max_concurrent_trials: Literal["auto"] | Positive = "auto"  # auto: as many as the Ray has room for
    keep_trials: bool = False  # checkpoints of trials that did not win

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if self.search == "optuna":
            grids = [key for key, dimension in self.space.items() if dimension.grid is not None]
            if grids and grids[0] != "ema.decay":
                raise ValueError(f"space.{grids[0]}: optuna draws values, so there is no grid; use choice")
        return self
