"""Beside a command that works on a run: its report.html, made anew while the run's records change."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable

from ray_pipeline.config import Config
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.metrics_file import MetricsReader, metrics_files
from ray_pipeline.run_copy import run_path
from ray_pipeline.sweep_records import sweep_folder

_POLL_SECONDS = 1.0
#: between two pages at least
_PAUSE_SECONDS = 20.0
#: and so many times as long as one takes, so that all of them take at most 0.25 %
_PAUSE_FACTOR = 400
#: a page that is older is marked: the command lives, though the run's records are the same or the next page is not due
_ALIVE_SECONDS = 600.0
_LEAST_PRIORITY = 19


class LiveReport:
    """A context manager around all that a command does with a run; leaving it draws the last state. Nothing where
    monitoring.report is off."""

    def __init__(self, config: Config):
        self.wanted, self.run_dir = config.monitoring.report, run_path(config.output_dir)
        self._sweep, self._reader = sweep_folder(config.output_dir), MetricsReader(self.run_dir)
        self._ended = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="live-report")

    def __enter__(self) -> LiveReport:
        if self.wanted:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self.wanted:
            self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a priority may be one thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        from ray_pipeline.monitoring.report import mark_alive, write_report  # a second of import

        drawn, ended, due_at, marked_at = None, False, 0.0, 0.0
        while not ended:
            ended = self._ended.wait(_POLL_SECONDS)
            began, found = time.monotonic(), self._found()
            if found != drawn and (ended or began >= due_at):
                if self._tried(lambda: write_report(self.run_dir, alive=True, reader=self._reader)):
                    drawn = found
                marked_at = time.monotonic()
                due_at = marked_at + max(_PAUSE_SECONDS, _PAUSE_FACTOR * (marked_at - began))
            elif began - marked_at >= _ALIVE_SECONDS:
                self._tried(lambda: mark_alive(self.run_dir))
                marked_at = began

    def _found(self) -> list[tuple[int, int]]:
        """Of the run's records, what changes when one of them does."""
        paths = [*metrics_files(self.run_dir), self.run_dir / phase_state.FILE, *self._sweep.glob("*.json")]
        found = []
        for path in paths:
            try:
                about = path.stat()
            except OSError:  # it goes, or comes, just now
                continue
            found.append((about.st_mtime_ns, about.st_size))
        return found

    def _tried(self, write: Callable[[], object]) -> bool:
        """Whether the page could be written."""
        try:
            write()
        except Exception as error:  # no picture is worth a run
            if not self._told:
                self._told = True
                warnings.warn(f"report.html cannot be drawn: {type(error).__name__}: {error}", stacklevel=2)
            return False
        return True
