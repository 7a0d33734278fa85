"""What a sweep has tried and found: <run>/sweep/sweep.json, the truth that a resume reads, and winner.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ray_pipeline.errors import UserError
from ray_pipeline.run_copy import run_path
from ray_pipeline.storage import replace_file

FOLDER = "sweep"
_DIVERGED = 1e9


class _Record(BaseModel):
    # a loss that diverged must survive the round trip
    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class EpochResult(_Record):
    """After an epoch of a trial: `losses` and their standard errors over the tiles by average (ema_decay_0.999 ...)."""

    epoch: int
    step: int
    position: int
    losses: dict[str, float]
    standard_errors: dict[str, float]


class TrialRecord(_Record):
    """One training. values: of the searched keys, without ema.decay. stopped: the scheduler gave it up; interrupted:
    the sweep ended before it did, and a resume goes on with it."""

    number: int
    values: dict[str, JsonValue]
    status: Literal["running", "interrupted", "finished", "stopped", "failed"] = "running"
    message: str = ""
    began: str = ""
    ended: str = ""
    results: list[EpochResult] = Field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"trial_{self.number:03d}"

    @property
    def in_words(self) -> str:
        """Such as model.dropout=0.1 phases[].lr=1e-4"""
        return " ".join(f"{key}={_short(value)}" for key, value in self.values.items()) or "as configured"


class SweepRecord(_Record):
    """A sweep; base: the config that it was begun with, as plain values; averages: names of those by which a trial is
    judged."""

    version: Literal[1] = 1
    base: dict[str, JsonValue] = Field(default_factory=dict)
    averages: list[str] = Field(default_factory=list)
    trials: list[TrialRecord] = Field(default_factory=list)

    def loss(self, result: EpochResult) -> float:
        """Of the best average; infinite where the trial diverged."""
        losses = [result.losses[name] for name in self.averages]
        return min((loss for loss in losses if math.isfinite(loss)), default=math.inf)

    def told_loss(self, result: EpochResult) -> float:
        """What a scheduler or a search is told, which may take means of losses."""
        return min(self.loss(result), _DIVERGED)

    def save(self, folder: Path) -> None:
        """Replace sweep.json."""
        replace_file(folder / "sweep.json", self.model_dump_json(indent=1).encode() + b"\n")


class Candidate(_Record):
    """A trial with one of its averages, at the position where all are compared; difference: its loss less the winner's,
    with the paired standard error over the tiles."""

    trial: int
    track: str
    loss: float
    standard_error: float
    difference: float = 0.0
    paired_standard_error: float = 0.0
    tie: bool = False


class Winner(_Record):
    """What the sweep found. overrides: of the config of what follows; track: the average that was best there;
    checkpoint: path or URI; runner_up: the next best; ties: all that do not differ from it by more than the paired
    standard error. overruled: keys of the overrides that a resume took back. confirmed: validation losses of all
    averages at the end of the phase that went on from it."""

    version: Literal[1] = 1
    trial: int
    overrides: dict[str, JsonValue]
    track: str | None
    checkpoint: str
    phase: str
    epoch: int
    step: int
    position: int
    loss: float
    standard_error: float
    runner_up: Candidate | None = None
    ties: list[Candidate] = Field(default_factory=list)
    overruled: list[str] = Field(default_factory=list)
    confirmed: dict[str, float] | None = None

    @property
    def in_words(self) -> str:
        """What it sets."""
        return ", ".join(f"{key}={_short(value)}" for key, value in self.overrides.items()) or "the config as it is"

    def save(self, folder: Path) -> None:
        """Replace winner.json."""
        replace_file(folder / "winner.json", self.model_dump_json(indent=1).encode() + b"\n")


def sweep_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its sweep."""
    return run_path(run_dir, FOLDER)


def read_sweep(run_dir: str | Path) -> SweepRecord | None:
    """The sweep of a run; None where none has begun."""
    return _read(sweep_folder(run_dir) / "sweep.json", SweepRecord)


def read_winner(run_dir: str | Path) -> Winner | None:
    """The winner of a run's sweep; None before there is one."""
    return _read(sweep_folder(run_dir) / "winner.json", Winner)


def _short(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path, model: type[BaseModel]):
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({' '.join(str(error).split())[:200]}); bring it "
            "back from a copy, or begin anew in another output_dir"
        ) from None
