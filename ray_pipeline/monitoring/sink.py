"""What takes the events of a run beside its metrics.jsonl.

A sink is made by a function of a SinkContext and has two methods, emit(event) and close(). It lives in a thread of its
own on rank 0, from where nothing that it does or fails to do reaches the training. One that raises is closed and gets
no more events; PictureLost costs it that event alone. The end of a phase waits 30 s for what it has left to do, or as
long as its attribute close_seconds says; a stop, and a phase that goes back to a checkpoint, a quarter of
ray.stop_timeout_seconds at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ray_pipeline.monitoring.events import Event, SampleEvent, from_record
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.run_copy import location_of
from ray_pipeline.storage import Folder
from ray_pipeline.sweep_records import FOLDER


@dataclass(frozen=True)
class SinkContext:
    """Whose events come. config: the run's, as plain values; resume_step: events up to this step were told to earlier
    attempts, which may have told of later ones too; None: there was none. sizes: of the files of records, before the
    first event."""

    run_dir: Path
    phase: str
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_step: int | None = None
    sizes: Mapping[Path, int] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """Last part of the run's location; of a sweep's trial, which is called as those of other sweeps are, behind
        that of its run: first/trial_000."""
        folder = Folder(location_of(self.run_dir))
        return f"{folder.parent.parent.name}/{folder.name}" if folder.parent.name == FOLDER else folder.name

    def recorded(self) -> Iterator[Event]:
        """Events with numbers that earlier attempts recorded and that still hold, and all of their faults."""
        records = read_events(self.run_dir, self.phase, sizes=self.sizes) if self.resume_step is not None else ()
        for record in records:
            has_numbers = record["event"] in ("step", "validation", "checkpoint")
            if record["event"] == "fault" or (has_numbers and record["step"] <= self.resume_step):
                yield from_record(record)


class PictureLost(Exception):
    """The picture of a SampleEvent is missing or damaged."""


def read_picture(run_dir: Path, event: SampleEvent) -> Image.Image:
    """The picture of a SampleEvent, in RGB; raises PictureLost."""
    try:
        with Image.open(run_dir / event.image_path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise PictureLost(f"{event.image_path} ({type(error).__name__})") from error


class Sink(Protocol):
    """What takes events, in the order in which they come."""

    def emit(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """No more will come."""
