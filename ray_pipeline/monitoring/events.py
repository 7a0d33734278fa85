"""What happens in a run, as typed events; each is a line of logs/metrics.jsonl and a point in the other sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ray_pipeline.monitoring.phase_state import utc_now


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, or the mean over the steps since the last such event; `skipped` of them had no finite loss or
    gradient and changed nothing.

    loss: mean over all ranks. grad_norm: of the joint gradient before it is clipped. The seconds are those of a step on
    rank 0: step_seconds all of it but validation and pictures, and its parts. utilisation: floating-point operations of
    the network over the device's peak. These and the rate are nan where nothing was computed, since earlier attempts
    had found all of the steps without a finite loss. memory_bytes: the most that was allocated on the GPU, or resident
    on a CPU, so far.
    """

    phase: str
    step: int
    position: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    data_wait_seconds: float
    skipped: int = 0
    step_seconds: float = math.nan
    compute_seconds: float = math.nan
    optimizer_seconds: float = math.nan
    ema_seconds: float = math.nan
    logging_seconds: float = math.nan
    saving_seconds: float = math.nan
    utilisation: float = math.nan
    memory_bytes: float = math.nan


@dataclass(frozen=True)
class ValidationEvent:
    """Validation loss of the weights of EMA track `ema`; `loss_by_sigma` maps a noise level to its loss."""

    phase: str
    step: int
    position: int
    epoch: int
    loss: float
    standard_error: float
    loss_by_sigma: dict[str, float]
    ema: str


@dataclass(frozen=True)
class SampleEvent:
    """A picture of samples was written to `image_path`, relative to the run directory."""

    phase: str
    step: int
    epoch: int
    image_path: str


@dataclass(frozen=True)
class CheckpointEvent:
    """Checkpoint `name` was committed; `kind` says why, `seconds` how long training stood still for it,
    `write_seconds` how long writing took; nan where a kill came before they were written down."""

    phase: str
    step: int
    epoch: int
    name: str
    kind: str
    seconds: float
    write_seconds: float


@dataclass(frozen=True)
class PhaseEvent:
    """The phase changed its `status`: started, resumed (plots mark the step), finished, ...

    total_steps: of the whole phase; 0: not told.
    """

    phase: str
    status: str
    step: int
    message: str
    total_steps: int = 0


@dataclass(frozen=True)
class SweepEvent:
    """A trial of the sweep, `phase` being its folder's name: an epoch, with its validation loss, or its end."""

    phase: str
    step: int
    trial: int
    epoch: int
    loss: float
    status: str
    message: str


@dataclass(frozen=True)
class FaultEvent:
    """Something went wrong and the run went on; `kind`: skip, rollback, save, damage, ..."""

    phase: str
    step: int
    kind: str
    message: str


Event = StepEvent | ValidationEvent | SampleEvent | CheckpointEvent | PhaseEvent | SweepEvent | FaultEvent

EVENT_NAMES: dict[type, str] = {
    StepEvent: "step",
    ValidationEvent: "validation",
    SampleEvent: "sample",
    CheckpointEvent: "checkpoint",
    PhaseEvent: "phase",
    SweepEvent: "sweep",
    FaultEvent: "fault",
}
#: by name for people, the parts of a step whose <part>_seconds a StepEvent has
STEP_PARTS = {
    "data wait": "data_wait",
    "forward and backward": "compute",
    "optimizer": "optimizer",
    "EMA": "ema",
    "logging": "logging",
    "saving": "saving",
}
_EVENTS = {name: kind for kind, name in EVENT_NAMES.items()}


def to_record(event: Event) -> dict[str, Any]:
    """The event as a flat dict of plain JSON values; nan and infinities become "nan", "inf", "-inf".

    Strict JSON has no word for them, and null would hide which of them it was. NumPy and 0-d torch numbers
    are accepted.
    """
    record: dict[str, Any] = {"event": EVENT_NAMES[type(event)], "time": utc_now()}
    for field in fields(event):
        record[field.name] = _plain(getattr(event, field.name), field.type)
    return record


def restore_floats(record: dict) -> dict:
    """A line of JSON with the numbers of its event as floats again, in place; what is no event stays as it is."""
    for name in _FLOATS.get(record.get("event"), ()):
        if name in record:
            record[name] = float(record[name])
    if "loss_by_sigma" in record:
        record["loss_by_sigma"] = {key: float(value) for key, value in record["loss_by_sigma"].items()}
    return record


def from_record(record: dict) -> Event:
    """The event of such a record; TypeError where one of its values is missing."""
    kind = _EVENTS[record["event"]]
    return kind(**{field.name: record[field.name] for field in fields(kind) if field.name in record})


def curves(event: Event) -> dict[str, float]:
    """Points that an event adds to curves over its phase's steps, by name; {} for events without a number."""
    if isinstance(event, StepEvent):
        return {f"train/{name}": getattr(event, name) for name in _STEP_CURVES}
    if isinstance(event, ValidationEvent):
        found = {
            f"validation/loss/{event.ema}": event.loss,
            f"validation/standard_error/{event.ema}": event.standard_error,
        }
        for sigma, loss in event.loss_by_sigma.items():
            found[f"validation_by_sigma/{event.ema}/{sigma}"] = loss
        return found
    if isinstance(event, CheckpointEvent):
        return {"checkpoint/seconds": event.seconds} if math.isfinite(event.seconds) else {}
    return {}


def note(event: Event) -> tuple[str, str] | None:
    """Kind and words of an event that is told in words."""
    if isinstance(event, PhaseEvent | SweepEvent):
        return EVENT_NAMES[type(event)], event.message
    if isinstance(event, FaultEvent):
        return "fault", f"{event.kind}: {event.message}"
    return None


_FLOATS = {name: tuple(field.name for field in fields(kind) if field.type == "float") for name, kind in _EVENTS.items()}
_STEP_CURVES = (*_FLOATS["step"], "skipped")


def _plain(value: Any, kind: str) -> Any:
    if kind == "float":
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if kind in ("int", "str"):
        return {"int": int, "str": str}[kind](value)
    return {str(key): _plain(item, "float") for key, item in value.items()}
