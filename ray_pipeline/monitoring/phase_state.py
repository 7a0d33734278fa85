"""Where a run stands: `phase_state.json`, replaced as a whole so that a reader never sees half of it."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ray_pipeline.errors import UserError
from ray_pipeline.storage import replace_file

HISTORY_LIMIT = 1000
FILE = "phase_state.json"


class DamagedState(UserError):
    """The file does not hold a phase state that this version reads; checkpoints and records can give another one."""


def utc_now() -> str:
    """Time of day as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Record(BaseModel):
    # A diverged loss must survive the round trip, and bare NaN is no JSON: non-finite floats become strings.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, ser_json_inf_nan="strings")


class BestCheckpoint(_Record):
    """The checkpoint with the lowest validation loss so far."""

    checkpoint: str
    val_loss: float
    epoch: int


class PhaseProgress(_Record):
    """One phase: `step` of `steps` optimizer steps, `position` in samples, `epoch` of `epochs` (from 1); sample_flops:
    floating-point operations of one trained sample.

    starting: a command goes on with a phase that was stopped or had failed, and its workers do not train yet.
    """

    status: Literal["pending", "starting", "running", "stopped", "failed", "finished"] = "pending"
    step: int = 0
    position: int = 0
    epoch: int = 0
    steps: int | None = None
    epochs: int | None = None
    sample_flops: float | None = None
    attempt: int = 0
    best: BestCheckpoint | None = None
    last: str | None = None
    checkpoints: list[str] = Field(default_factory=list)
    baseline_val_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)

    def has_begun(self) -> bool:
        """Whether it was ever trained: a start may end before that."""
        return self.attempt > 0 or self.step > 0 or self.status in ("running", "finished")

    def is_done(self, epochs: int) -> bool:
        """Whether nothing of a phase of `epochs` is left to train: it is finished, and was not given more since."""
        return self.status == "finished" and self.epochs == epochs


class HistoryEntry(_Record):
    """One line of the run's history; `time` is ISO 8601 in UTC."""

    time: str
    event: str
    message: str


class PhaseState(_Record):
    """Contents of `phase_state.json`; `phases` is in the order in which the phases run.

    run: facts about the whole run; `latents`, the fingerprint of the latent store that it trains on.
    """

    version: Literal[1] = 1
    current_phase: str | None = None
    phases: dict[str, PhaseProgress] = Field(default_factory=dict)
    history: list[HistoryEntry] = Field(default_factory=list)
    run: dict[str, JsonValue] = Field(default_factory=dict)

    def phase(self, name: str) -> PhaseProgress:
        """The record of phase `name`, made as pending when there is none; change it in place, then save."""
        return self.phases.setdefault(name, PhaseProgress())

    def later_steps(self, current: str, order: Sequence[str]) -> float:
        """Steps of the phases that follow `current`, counted in its own: those of a network that has more to compute
        for a sample are so many times as long; nan where that is not known."""
        own, total = self.phases.get(current, PhaseProgress()), 0.0
        for name in order[order.index(current) + 1 :]:
            later = self.phases.get(name, PhaseProgress())
            if not (later.steps and later.sample_flops and own.sample_flops):
                return math.nan
            total += (later.steps - later.step) * later.sample_flops / own.sample_flops
        return total

    def record(self, event: str, message: str) -> None:
        """Append to the history, which keeps the newest HISTORY_LIMIT entries."""
        self.history.append(HistoryEntry(time=utc_now(), event=event, message=message))
        del self.history[:-HISTORY_LIMIT]

    def save(self, path: str | Path) -> None:
        """Replace the file at `path`; raises OSError with the old file left in place."""
        replace_file(path, self.model_dump_json(indent=2, ensure_ascii=True).encode() + b"\n")


def load(path: str | Path) -> PhaseState:
    """The state saved at `path`, or a fresh one when there is no such file.

    Raises DamagedState when the file does not hold a phase state, UserError when it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return PhaseState()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected the run's JSON state file; "
            "make it a file that this user can read, or choose another output_dir."
        ) from error
    try:
        return PhaseState.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        found = f"key {key}: {first['msg']}" if key else first["msg"]
        raise DamagedState(
            f"{path} is damaged: found {found} in {len(data)} bytes, expected the JSON that training wrote; "
            "`train --resume` rebuilds it from the checkpoints"
        ) from error
