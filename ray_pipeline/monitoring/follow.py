"""Beside a phase that trains: its progress line and its chart, from the records that it writes.

Drawing takes seconds and the interpreter's lock, so it is done here, in the process that waits for the training.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType

from ray_pipeline.config import Config
from ray_pipeline.json_lines import parse_line
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import EVENT_NAMES, restore_floats
from ray_pipeline.monitoring.metrics_file import MetricsReader, metrics_files
from ray_pipeline.monitoring.phase_state import DamagedState, PhaseState
from ray_pipeline.monitoring.progress import Progress
from ray_pipeline.run_copy import run_path

_POLL_SECONDS = 0.5
#: between two drawings of the newest chart at least; and so many times as long as the charts took, so that they take at
#: most 0.25 %, or what those of kept epochs take, which are drawn at once
_PAUSE_SECONDS, _PAUSE_FACTOR = 20.0, 400
_LEAST_PRIORITY = 19
_BEGUN = ("started", "resumed")


class Follower:
    """A context manager around a phase. progress: show the line. Leaving it draws the last state."""

    def __init__(self, config: Config, phase: str, *, progress: bool):
        self.config, self.phase, self.show = config, phase, progress
        self.run_dir = run_path(config.output_dir)
        self.progress: Progress | None = None
        self._reader = MetricsReader(self.run_dir)  # of the charts
        self.read: dict[Path, tuple[int, int]] = {}  # of each file its inode, and how many bytes
        self._begin: bytes | None = None  # the newest line that an attempt has begun with
        self._began: dict | None = None  # and its record, once it was taken
        self.changed, self.due_at = False, time.monotonic() + _PAUSE_SECONDS
        self._failed: set[str] = set()
        self._ended = threading.Event()
        self._guard("the records of the run cannot be read", lambda: list(self._new_lines()))  # what was before
        self._thread = threading.Thread(target=self._run, daemon=True, name="follower")

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a priority may be one thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        ended = False
        while not ended:
            ended = self._ended.wait(_POLL_SECONDS)
            self._guard("the records of the run cannot be read", self._take_new)
            if self.changed and (ended or time.monotonic() >= self.due_at):
                self.changed = False
                self._draw("the chart cannot be drawn", None)
        if self.progress is not None:
            self.progress.close()

    def _take_new(self) -> None:
        for line in self._new_lines():
            record = parse_line(line)  # None where a resume has cut away the beginning of a line
            if record is not None and record.get("phase") == self.phase and record.get("event") in EVENT_NAMES.values():
                self._guard("a record cannot be read", partial(self._take, record))

    def _new_lines(self) -> Iterator[bytes]:
        """Whole lines that were appended since the last call."""
        for path in metrics_files(self.run_dir):
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                inode, size = self.read.get(path, (about.st_ino, 0))
                known = min(size, about.st_size)  # a resume cuts the file
                replaced = inode != about.st_ino
                skipped = 0 if replaced else known
                file.seek(skipped)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.read[path] = about.st_ino, skipped + len(whole)
            begin = self._last_begin(whole)
            if replaced:  # grown again since, it tells of an attempt that is new; all before that is known
                whole = whole[known if begin in (None, self._begin) else whole.rfind(begin) :]
            self._begin = begin or self._begin
            yield from whole.splitlines()

    def _last_begin(self, lines: bytes) -> bytes | None:
        """The last line that says that an attempt at this phase has begun."""
        for line in reversed(lines.splitlines()):
            record = parse_line(line) if b'"event": "phase"' in line else None
            if record and record.get("phase") == self.phase and record.get("status") in _BEGUN:
                return line
        return None

    def _take(self, record: dict) -> None:
        restore_floats(record)
        self.changed = True
        if record["event"] == "phase" and record["status"] in _BEGUN:
            self._began = self._began or record
        if self.show:
            self._guard("the line of progress cannot be shown", partial(self._advance, record))
        if record["event"] == "checkpoint" and record["kind"] == "epoch":
            self._draw("the chart of a step cannot be drawn", record["step"])

    def _advance(self, record: dict) -> None:
        """The progress line."""
        # their own times: records of another node may come some at a time
        told, began = (datetime.fromisoformat(one["time"]).timestamp() for one in (record, self._began or record))
        if self._began is not None and self.progress is None:
            state = self._state()
            self.progress = Progress(
                self._began["total_steps"],  # the state may still hold those of an earlier plan
                self.phase,
                start=self._began["step"],
                samples_per_unit=self.config.train.global_batch,
                clock=time.time,
                began=began,
                later_units=state.later_steps(self.phase, [phase.name for phase in self.config.phases]),
            )
        if self.progress is None:
            return
        if record["event"] == "step":
            computed = not math.isnan(record["samples_per_second"])
            self.progress.update(record["step"], at=told, counted=computed, epoch=record["epoch"], loss=record["loss"])
        elif record["event"] == "validation":
            self.progress.update(record["step"], at=told, val=record["loss"])

    def _draw(self, what: str, until: int | None) -> None:
        if not (self.config.monitoring.plot_loss or self.config.monitoring.plot_lr):
            return
        self._guard(what, _plots)  # seconds, once: not what the next chart will take
        began = time.monotonic()
        self._guard(what, lambda: self._draw_chart(until))
        now = time.monotonic()
        self.due_at = max(now + _PAUSE_SECONDS, max(self.due_at, now) + _PAUSE_FACTOR * (now - began))

    def _draw_chart(self, until: int | None) -> None:
        """latest_progress.png, or the picture of a step that stays."""
        monitoring = self.config.monitoring
        records = [record for record in self._reader.events() if record.get("phase") == self.phase]
        name = "latest_progress.png"
        if until is not None:
            records = [record for record in records if record.get("step", 0) <= until]
            name = f"training_progress_step_{until:08d}.png"
        path = self.run_dir / "plots" / self.phase / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _plots().plot_progress(
            records,
            path,
            title=self.phase,
            baseline=self._state().phase(self.phase).baseline_val_loss,
            plot_loss=monitoring.plot_loss,
            plot_lr=monitoring.plot_lr,
        )

    def _state(self) -> PhaseState:
        """Without what is known of a run while its file is damaged: the worker that mends it goes on meanwhile."""
        try:
            return phase_state.load(self.run_dir / phase_state.FILE)
        except DamagedState:
            return PhaseState()

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # no picture is worth a run; the next one may succeed
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(f"{what}: {type(error).__name__}: {error}", stacklevel=2)


def _plots() -> ModuleType:
    """What draws charts, imported at the first of them."""
    from ray_pipeline.monitoring import plots

    return plots
