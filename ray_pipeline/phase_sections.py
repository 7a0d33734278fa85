"""The entries of `phases`: one training each, and what it draws from."""

from __future__ import annotations

import difflib
import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_pipeline.plugins import HINTS, plugin_names
from ray_pipeline.sections import CONDITION_TYPES, PAIRED_TYPES, Fraction, Positive, PositiveFloat, Section


class DatasetChoice(Section):
    """A data set that a phase draws from; in the YAML a bare name stands for {name: NAME}.

    weight: its share of the samples is weight / sum of weights. degradations: hints from degraded partners where there
    are some and simulated ones elsewhere (auto), from partners alone (real), or simulated alone.
    """

    name: str
    weight: PositiveFloat | None = None
    degradations: Literal["auto", "real", "simulated"] = "auto"


class PhaseConfig(Section):
    """One training: unconditional without condition_types, hint-conditioned with them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    epochs: Positive
    epochs_to_save: tuple[Positive, ...] | None = None
    condition_types: tuple[str, ...] = ()
    condition_dropout: Fraction = 0.1
    trainable: Literal["full", "lora"] = "full"  # lora: only what hints alone use; the network stays as it was
    datasets: tuple[DatasetChoice, ...] = ()  # default: every data set under data.root
    init: str | None = None  # a checkpoint folder; default: the best EMA weights of the phase before
    lr: PositiveFloat | None = None  # default: optimizer.lr

    @field_validator("condition_types")
    @classmethod
    def _known_hints(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = (*CONDITION_TYPES, *plugin_names(HINTS))
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"unknown condition type {name!r}, expected some of {', '.join(known)}; the nearest is {nearest!r}"
                )
        return names

    @field_validator("datasets", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value]

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        # auto and real give the same hints wherever real is possible
        drawn = [choice.name + " (simulated)" * (choice.degradations == "simulated") for choice in self.datasets]
        for field, values in (("condition_types", self.condition_types), ("datasets", drawn)):
            if len(set(values)) != len(values):
                raise ValueError(f"{field} lists an entry twice: {', '.join(values)}")
        unweighted = [choice.name for choice in self.datasets if choice.weight is None]
        if unweighted and len(unweighted) < len(self.datasets):
            raise ValueError(f"datasets: {unweighted[0]} has no weight but others have; give all of them one, or none")
        chosen = [choice.name for choice in self.datasets if choice.degradations != "auto"]
        if chosen and not set(self.condition_types) & set(PAIRED_TYPES):
            raise ValueError(
                f"datasets: degradations of {chosen[0]} has no effect, since condition_types holds neither "
                f"{' nor '.join(PAIRED_TYPES)}; leave it out"
            )
        if self.trainable == "lora" and not self.condition_types:
            raise ValueError(
                f"trainable: lora trains what hints use, but phase {self.name} has no condition_types; "
                "give it some, or use trainable: full"
            )
        beyond = [e for e in self.epochs_to_save or () if e > self.epochs]
        if beyond:
            warnings.warn(
                f"phase {self.name}: epochs_to_save {beyond} lie beyond its {self.epochs} epochs and are never reached",
                stacklevel=2,
            )
        return self

    @property
    def save_epochs(self) -> tuple[int, ...]:
        """Epochs (from 1) after which a checkpoint is kept: as given, else 25, 50, 75 and 100 %."""
        if self.epochs_to_save is not None:
            return tuple(sorted({e for e in self.epochs_to_save if e <= self.epochs}))
        return tuple(sorted({max(1, round(self.epochs * quarter / 4)) for quarter in (1, 2, 3, 4)}))
