"""TensorBoard's own file format (TFRecord of Event messages), one event file a start.

tensorboardX's SummaryWriter is passed over for its messages alone: its queue holds events back for up to two minutes,
its writer thread dies on a full disk and the caller then waits for ever, and its file names, one a second, let a quick
restart overwrite the attempt before it.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ray_pipeline.json_lines import write_whole
from ray_pipeline.monitoring.events import Event, FaultEvent, SampleEvent, curves, note
from ray_pipeline.monitoring.sink import SinkContext, read_picture
from ray_pipeline.storage import replace_file

PREVIEW_PIXELS = 1024
#: tags of what is written once for all attempts
_ONCE = "_hparams_/"
#: of the texts of faults
_FAULTS = "fault/text_summary"
_HYPERPARAMETERS = ("model", "optimizer", "train", "ema", "scheduler", "hint_control")


class TensorBoard:
    """Sink: curves, texts, pictures and hyperparameters of one phase in logs/tensorboard/<phase>.

    What earlier attempts wrote after context.resume_step is taken out of their files; points up to it that a kill kept
    from the disk are written now, and so are faults after it: they hold for good.
    """

    def __init__(self, context: SinkContext):
        # tensorboardX imports torch, which importers of this module need not have loaded.
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._summary, self._event, self._checksum = summary, event_pb2.Event, masked_crc32c
        self._run_dir = context.run_dir
        folder = context.run_dir / "logs" / "tensorboard" / context.phase
        folder.mkdir(parents=True, exist_ok=True)
        resume_step, told = context.resume_step, _Told()
        # TensorBoard reads the files of a folder in the order of their names, so the name begins with time.
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        for path in earlier if resume_step is not None else ():
            # The newest in any case: a superseded writer that still lives keeps the old file.
            _cut(path, resume_step, self._event, told, always=path == earlier[-1])
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self._file = FileIO(folder / name, "x")
        self._write(file_version="brain.Event:2")
        if resume_step is not None:
            # For a TensorBoard that runs and has read what is cut now: it hides what it has from this step on
            # (purge_step). Its data server does not know the mark, and shows a cut point until a new one comes.
            self._write(step=resume_step + 1, session_log={"status": event_pb2.SessionLog.START})
            for event in context.recorded():
                self._write_curves(event, [tag for tag in curves(event) if event.step > told.last.get(tag, -1)])
                if isinstance(event, FaultEvent):  # the data server shows it until one of an earlier step comes
                    told.faults[event.step] -= 1
                    if told.faults[event.step] < 0:
                        self._write_note(event)
        if not earlier and context.config:
            values = hyperparameters(context.config, context.phase)
            for part in summary.hparams(values, {_judged_curve(context.config): math.nan}):
                self._write(summary=part)

    def emit(self, event: Event) -> None:
        self._write_curves(event, list(curves(event)))
        self._write_note(event)
        if isinstance(event, SampleEvent):
            self._write_picture(event)

    def close(self) -> None:
        self._file.close()

    def _write_curves(self, event: Event, tags: list[str]) -> None:
        points = curves(event)
        if tags:
            values = [{"tag": tag, "simple_value": float(points[tag])} for tag in tags]
            self._write(step=int(event.step), summary={"value": values})

    def _write_note(self, event: Event) -> None:
        told = note(event)
        if told:
            self._write(step=int(event.step), summary=self._summary.text(*told))

    def _write_picture(self, event: SampleEvent) -> None:
        # The record's checksum runs in Python at 0.3 s a MiB: hence one channel for gray, and a small preview.
        pixels = np.asarray(read_picture(self._run_dir, event))
        gray = (pixels == pixels[..., :1]).all()
        picture = Image.fromarray(pixels[..., 0] if gray else pixels)
        picture = picture.reduce(math.ceil(max(picture.size) / PREVIEW_PIXELS))
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        image = {"height": picture.height, "width": picture.width, "colorspace": len(picture.getbands())}
        value = {"tag": "samples", "image": {**image, "encoded_image_string": buffer.getvalue()}}
        self._write(step=int(event.step), summary={"value": [value]})

    def _write(self, **event_fields: Any) -> None:
        data = self._event(wall_time=time.time(), **event_fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        write_whole(self._file, length + next(checksums) + data + next(checksums))


def _judged_curve(config: Mapping[str, Any]) -> str:
    """The validation loss by which a run is judged."""
    ema = config["ema"]
    return f"validation/loss/ema_decay_{ema['decay']}" if ema["enabled"] else "validation/loss/weights"


def hyperparameters(config: Mapping[str, Any], phase: str) -> dict[str, bool | int | float | str]:
    """What may be varied from run to run, by key; the phase's own stand under `phase`."""
    own = next((one for one in config["phases"] if one["name"] == phase), {})
    sections = {name: config[name] for name in _HYPERPARAMETERS} | {"phase": own}
    found = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    plain = {key: value for key, value in found.items() if isinstance(value, bool | int | float | str)}
    return {"seed": config["seed"], **plain}


def _records(path: Path, kind: type) -> Iterator[tuple[bytes, Any]]:
    """(record as it stands there, its event) of an event file, up to a torn end."""
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", head)
            rest = file.read(length + 4)
            if len(rest) < length + 4:
                return
            yield head + rest, kind.FromString(rest[:length])


def _is_cut(event: Any, resume_step: int) -> bool:
    """Whether an event was told after the step from which the next attempt goes on."""
    told = any(not value.tag.startswith(_ONCE) for value in event.summary.value)
    return told and event.step > resume_step


@dataclass
class _Told:
    """What event files hold: of each curve the last step, since a kill keeps the newest points alone from the disk, and
    the number of faults by step."""

    last: dict[str, int] = field(default_factory=dict)
    faults: Counter[int] = field(default_factory=Counter)

    def add(self, event: Any) -> None:
        for value in event.summary.value:
            if value.HasField("simple_value"):
                self.last[value.tag] = max(event.step, self.last.get(value.tag, -1))
            if value.tag == _FAULTS:
                self.faults[event.step] += 1


def _cut(path: Path, resume_step: int, kind: type, told: _Told, always: bool) -> None:
    """Replace an event file by one without the events after `resume_step`; without `always` only if it has any.

    told: gets those that stay.
    """

    def kept(told: _Told) -> Iterator[bytes]:
        for record, event in _records(path, kind):
            if not _is_cut(event, resume_step):
                told.add(event)
                yield record

    if not always and sum(map(len, kept(told))) == path.stat().st_size:
        return
    # a hidden name without "tfevents", which TensorBoard does not read and a run's copy does not store
    new = path.with_name(".cut")
    replace_file(new, kept(told if always else _Told()))
    os.replace(new, path)
