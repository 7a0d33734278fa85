"""Beside a phase that trains: its progress line, its chart and the report, from the records that it writes.

Drawing takes seconds and the interpreter's lock, so it is done here, in the process that waits for the training.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from ray_pipeline.config import Config
from ray_pipeline.json_lines import parse_line
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import EVENT_NAMES, restore_floats
from ray_pipeline.monitoring.metrics_file import metrics_files, read_events
from ray_pipeline.monitoring.phase_state import DamagedState, PhaseState
from ray_pipeline.monitoring.progress import Progress
from ray_pipeline.run_copy import run_path

_POLL_SECONDS = 0.5
#: between two drawings at least; and so many times as long as one takes, so that all of them take at most 1 %
_PAUSE_SECONDS, _PAUSE_FACTOR = 20.0, 100
_LEAST_PRIORITY = 19


class Follower:
    """A context manager around a phase. progress: show the line; report: keep the run's report.html up to date, too.
    Leaving it draws the last state."""

    def __init__(self, config: Config, phase: str, *, progress: bool, report: bool):
        self.config, self.phase, self.show, self.report = config, phase, progress, report
        self.run_dir = run_path(config.output_dir)
        self.read = {path: path.stat().st_size for path in metrics_files(self.run_dir)}  # bytes of each file
        self.progress: Progress | None = None
        self.changed, self.due_at = False, time.monotonic() + _PAUSE_SECONDS
        self._failed: set[str] = set()
        self._ended = threading.Event()
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
            for record in self._new_records():
                self._take(record)
            if self.changed and (ended or time.monotonic() >= self.due_at):
                self._draw()
        if self.progress is not None:
            self.progress.close()

    def _new_records(self) -> list[dict]:
        """Of this phase, whole lines that were appended since the last call."""
        # None where a resume has cut away the beginning of a line
        lines = [line for path in metrics_files(self.run_dir) for line in self._new_lines(path)]
        records = [record for line in lines if (record := parse_line(line)) is not None]
        ours = [record for record in records if record.get("phase") == self.phase]
        return [restore_floats(record) for record in ours if record["event"] in EVENT_NAMES.values()]

    def _new_lines(self, path: Path) -> list[bytes]:
        # a resume cuts the file, so it may have become shorter than what was read
        begin = min(self.read.get(path, 0), path.stat().st_size)
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read[path] = begin + len(whole)
        return whole.splitlines()

    def _take(self, record: dict) -> None:
        self.changed = True
        if self.show:
            self._advance(record)
        if record["event"] == "checkpoint" and record["kind"] == "epoch":
            self._guard("the chart of a step", lambda: self._draw_chart(record["step"]))

    def _advance(self, record: dict) -> None:
        """The progress line."""
        told = datetime.fromisoformat(record["time"]).timestamp()  # records of another node may come some at a time
        if record["event"] == "phase" and self.progress is None:
            state = self._state()
            self.progress = Progress(
                state.phase(self.phase).steps,
                self.phase,
                start=record["step"],
                samples_per_unit=self.config.train.global_batch,
                clock=time.time,
                began=told,
                later_units=state.later_steps(self.phase, [phase.name for phase in self.config.phases]),
            )
        if self.progress is None:
            return
        if record["event"] == "step":
            self.progress.update(record["step"], at=told, epoch=record["epoch"], loss=record["loss"])
        elif record["event"] == "validation":
            self.progress.update(record["step"], at=told, val=record["loss"])

    def _draw(self) -> None:
        started, self.changed = time.monotonic(), False
        self._guard("the chart", lambda: self._draw_chart(None))
        if self.report:
            self._guard("report.html", self._write_report)
        taken = time.monotonic() - started
        self.due_at = time.monotonic() + max(_PAUSE_SECONDS, _PAUSE_FACTOR * taken)

    def _draw_chart(self, until: int | None) -> None:
        """latest_progress.png, or the picture of a step that stays."""
        from ray_pipeline.monitoring.plots import plot_progress  # a second of import, at the first picture

        monitoring = self.config.monitoring
        if not (monitoring.plot_loss or monitoring.plot_lr):
            return
        records = read_events(self.run_dir, phase=self.phase)
        name = "latest_progress.png"
        if until is not None:
            records = [record for record in records if record.get("step", 0) <= until]
            name = f"training_progress_step_{until:08d}.png"
        path = self.run_dir / "plots" / self.phase / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_progress(
            records,
            path,
            title=self.phase,
            baseline=self._state().phase(self.phase).baseline_val_loss,
            plot_loss=monitoring.plot_loss,
            plot_lr=monitoring.plot_lr,
        )

    def _write_report(self) -> None:
        from ray_pipeline.monitoring.report import write_report

        write_report(self.run_dir)

    def _state(self) -> PhaseState:
        """Without what is known of a run while its file is damaged: the worker that mends it goes on meanwhile."""
        try:
            return phase_state.load(self.run_dir / phase_state.FILE)
        except DamagedState:
            return PhaseState()

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # no picture is worth a run
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(f"{what} cannot be drawn: {type(error).__name__}: {error}", stacklevel=2)
