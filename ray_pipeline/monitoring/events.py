"""The records of a run: typed events, written by rank 0 to a JSON-lines file and to TensorBoard.

Both sinks write each event with one unbuffered write, so a killed process loses nothing it has emitted.
tensorboardX's own SummaryWriter is passed over for that reason and two more: its queue holds events back for
up to two minutes, its writer thread dies on a full disk and the caller then waits for ever, and its
file names, one a second, let a quick restart overwrite the attempt before it.
"""

import logging
import math
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ray_pipeline.errors import UserError
from ray_pipeline.json_lines import JsonLines, parse_line, whole_lines, write_whole
from ray_pipeline.monitoring.phase_state import utc_now
from ray_pipeline.storage import replace_file

logger = logging.getLogger(__name__)

PREVIEW_PIXELS = 1024


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, or the mean over the steps since the last such event; `skipped` of them had no finite loss or
    gradient and changed nothing."""

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
    """A picture of samples was written to `image_path`."""

    phase: str
    step: int
    epoch: int
    image_path: str


@dataclass(frozen=True)
class CheckpointEvent:
    """Checkpoint `name` was committed; `kind` says why, `seconds` how long training stood still for it,
    `write_seconds` how long writing took."""

    phase: str
    step: int
    epoch: int
    name: str
    kind: str
    seconds: float
    write_seconds: float


@dataclass(frozen=True)
class PhaseEvent:
    """The phase changed its `status`: started, resumed (plots mark the step), finished, ..."""

    phase: str
    status: str
    step: int
    message: str


@dataclass(frozen=True)
class FaultEvent:
    """Something went wrong and the run went on; `kind`: skip, rollback, save, damage, ..."""

    phase: str
    step: int
    kind: str
    message: str


Event = StepEvent | ValidationEvent | SampleEvent | CheckpointEvent | PhaseEvent | FaultEvent

EVENT_NAMES: dict[type, str] = {
    StepEvent: "step",
    ValidationEvent: "validation",
    SampleEvent: "sample",
    CheckpointEvent: "checkpoint",
    PhaseEvent: "phase",
    FaultEvent: "fault",
}
_FLOAT_FIELDS = {
    name: tuple(field.name for field in fields(kind) if field.type is float) for kind, name in EVENT_NAMES.items()
}


def to_record(event: Event) -> dict[str, Any]:
    """The event as a flat dict of plain JSON values; nan and infinities become "nan", "inf", "-inf".

    Strict JSON has no word for them, and null would hide which of them it was. NumPy and 0-d torch numbers
    are accepted.
    """
    record: dict[str, Any] = {"event": EVENT_NAMES[type(event)], "time": utc_now()}
    for field in fields(event):
        record[field.name] = _plain(getattr(event, field.name), field.type)
    return record


def _plain(value: Any, kind: Any) -> Any:
    if kind is float:
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if kind in (int, str):
        return kind(value)
    return {str(key): _plain(item, float) for key, item in value.items()}


def metrics_path(run_dir: str | Path) -> Path:
    """Where the JSON lines of a run are kept."""
    return Path(run_dir) / "logs" / "metrics.jsonl"


def read_events(run_dir: str | Path, phase: str | None = None, event: str | None = None) -> list[dict]:
    """The records of a run in the order written, non-finite floats restored; [] when there are none yet.

    A last line torn by a kill is left out; a damaged line elsewhere is left out with a warning.
    """
    path = metrics_path(run_dir)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(whole_lines(path.read_bytes()), start=1):
        record = parse_line(line)
        if record is None:
            logger.warning("%s line %d is damaged and was left out", path, number)
        elif phase in (None, record.get("phase")) and event in (None, record.get("event")):
            records.append(_restore_floats(record))
    return records


def copy_records(source: str | Path, target: str | Path, phase: str, until: int) -> None:
    """Give the run `target` the steps, validations and faults of a phase of the run `source` up to a step, in place of
    those that it has of this phase."""
    path = metrics_path(target)
    lines = whole_lines(path.read_bytes()) if path.exists() else ()
    kept = [line for line in lines if (parse_line(line) or {}).get("phase") != phase]
    for line in whole_lines(metrics_path(source).read_bytes()):
        record = parse_line(line) or {}
        taken = record.get("event") in ("step", "validation", "fault") and record["phase"] == phase
        kept += [line] if taken and record["step"] <= until else []
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(line + b"\n" for line in kept))


def _restore_floats(record: dict) -> dict:
    for name in _FLOAT_FIELDS.get(record.get("event"), ()):
        if name in record:
            record[name] = float(record[name])
    if "loss_by_sigma" in record:
        record["loss_by_sigma"] = {key: float(value) for key, value in record["loss_by_sigma"].items()}
    return record


def cut_records(path: Path, phase: str, resume_step: int | None) -> None:
    """Drop the torn last line and, given `resume_step`, the records of `phase` after that step, but for faults.

    The file is replaced even when nothing is cut: a superseded writer that still lives keeps the old file.
    """
    if not path.exists():
        return
    kept = []
    for line in whole_lines(path.read_bytes()):
        record = parse_line(line)
        ours = record is not None and record.get("phase") == phase
        behind = resume_step is not None and ours and record.get("step", 0) > resume_step
        if not behind or record.get("event") == EVENT_NAMES[FaultEvent]:  # what went wrong did so for good
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


class _Records:
    """Sink: metrics.jsonl."""

    def __init__(self, path: Path, phase: str, resume_step: int | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_records(path, phase, resume_step)
        self.lines = JsonLines(path)

    def emit(self, event: Event) -> None:
        self.lines.append(to_record(event))

    def close(self) -> None:
        self.lines.close()


class _TensorBoard:
    """Sink: TensorBoard's own file format (TFRecord of Event messages), one event file a start."""

    def __init__(self, folder: Path, resume_step: int | None):
        # tensorboardX imports torch, which importers of this module need not have loaded.
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._text, self._event, self._checksum = summary.text, event_pb2.Event, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, so the name begins with time.
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self.file = FileIO(folder / name, "x")
        self._write(file_version="brain.Event:2")
        if resume_step is not None:
            # A session that starts at step k hides what earlier files hold from step k on (purge_step).
            self._write(step=resume_step + 1, session_log={"status": event_pb2.SessionLog.START})

    def emit(self, event: Event) -> None:
        if isinstance(event, PhaseEvent | FaultEvent):
            word = event.status if isinstance(event, PhaseEvent) else event.kind
            summary = self._text(EVENT_NAMES[type(event)], f"{word}: {event.message}")
        else:
            points = tensorboard_scalars(event).items()
            summary = {"value": [{"tag": tag, "simple_value": float(value)} for tag, value in points]}
        self._write(step=int(event.step), summary=summary)

    def image(self, tag: str, hwc_uint8: np.ndarray, step: int) -> None:
        # The record's checksum runs in Python at 0.3 s a MiB: hence one channel for gray, and a small preview.
        gray = (hwc_uint8 == hwc_uint8[..., :1]).all()
        picture = Image.fromarray(hwc_uint8[..., 0] if gray else hwc_uint8)
        picture = picture.reduce(math.ceil(max(picture.size) / PREVIEW_PIXELS))
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        image = {"height": picture.height, "width": picture.width, "colorspace": len(picture.getbands())}
        value = {"tag": tag, "image": {**image, "encoded_image_string": buffer.getvalue()}}
        self._write(step=int(step), summary={"value": [value]})

    def _write(self, **event_fields: Any) -> None:
        data = self._event(wall_time=time.time(), **event_fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        write_whole(self.file, length + next(checksums) + data + next(checksums))

    def close(self) -> None:
        self.file.close()


def tensorboard_scalars(event: Event) -> dict[str, float]:
    """Curves that an event adds a point to: {tag: value}; {} for events without a number."""
    if isinstance(event, StepEvent):
        return {f"train/{name}": getattr(event, name) for name in _FLOAT_FIELDS["step"]}
    if isinstance(event, ValidationEvent):
        curves = {
            f"validation/loss/{event.ema}": event.loss,
            f"validation/standard_error/{event.ema}": event.standard_error,
        }
        for sigma, loss in event.loss_by_sigma.items():
            curves[f"validation_by_sigma/{event.ema}/{sigma}"] = loss
        return curves
    if isinstance(event, CheckpointEvent):
        return {"checkpoint/seconds": event.seconds}
    return {}


class EventLog:
    """Context manager that writes the events of one phase under `run_dir`/logs.

    With `resume_step` N what earlier attempts of this phase wrote after step N is cut away, in the JSON lines
    for good and in TensorBoard by a restart mark; other phases are untouched. A sink that fails is dropped
    with one warning: monitoring never stops training. `run_dir` must be a local path (UserError otherwise).
    """

    def __init__(self, run_dir: str | Path, phase: str, *, tensorboard: bool = True, resume_step: int | None = None):
        if "://" in str(run_dir):
            raise UserError(
                f"output_dir {run_dir} is not a local path, and logs can only be appended to local files; "
                "give the log a local folder."
            )
        path = metrics_path(run_dir)
        self._sinks: dict[str, Any] = {}
        self._add(str(path), lambda: _Records(path, phase, resume_step))
        if tensorboard:
            folder = path.parent / "tensorboard" / phase
            self._add(str(folder), lambda: _TensorBoard(folder, resume_step))

    def emit(self, event: Event) -> None:
        """Write one event to every sink."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, lambda sink=sink: sink.emit(event))

    def image(self, tag: str, hwc_uint8: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) uint8 in TensorBoard, reduced to at most PREVIEW_PIXELS a side.

        The JSON lines name the file of the full picture in a SampleEvent.
        """
        for name, sink in list(self._sinks.items()):
            if isinstance(sink, _TensorBoard):
                self._guard(name, lambda sink=sink: sink.image(tag, hwc_uint8, step))

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)

    def _add(self, name: str, make: Callable[[], Any]) -> None:
        def add():
            self._sinks[name] = make()

        self._guard(name, add)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._sinks.pop(name, None)
            logger.warning("%s is switched off for this run: %s: %s", name, type(error).__name__, error)

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
