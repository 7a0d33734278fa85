"""The events of a phase on rank 0: into metrics.jsonl at once, and to each sink by a thread of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from queue import Full, Queue
from typing import Any

from ray_pipeline.monitoring.events import Event
from ray_pipeline.monitoring.metrics_file import MetricsFile, metrics_path, metrics_sizes
from ray_pipeline.monitoring.sink import PictureLost, Sink, SinkContext
from ray_pipeline.monitoring.sinks import open_sink

logger = logging.getLogger(__name__)

#: events that a slow sink may be behind
_BEHIND = 1000
#: how long the end of a phase waits for a sink that does not say, all at the same time
_CLOSE_SECONDS = 30.0


class EventLog:
    """Context manager that tells the events of one phase of the run in `run_dir`.

    sinks: their names. With `resume_step` N what earlier attempts of this phase told after step N, but for faults, is
    cut away in the JSON lines, and hidden where a sink can; other phases are untouched. A file that cannot be written,
    and a sink that fails or cannot keep up, are given up with one line in `troubles`: monitoring never stops or slows
    training. The first picture that a sink cannot read is told there, too.
    """

    def __init__(
        self,
        run_dir: str | Path,
        phase: str,
        sinks: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ):
        self._troubles: list[str] = []
        self._path, self._file, sizes = metrics_path(run_dir), None, {}
        try:
            self._file, sizes = MetricsFile(run_dir, phase, resume_step), metrics_sizes(run_dir)
        except OSError as error:
            self._switch_off(error)
        context = SinkContext(Path(run_dir), phase, config or {}, resume_step, sizes)
        self._channels = [_Channel(name, lambda name=name: open_sink(name, context), self._trouble) for name in sinks]

    def emit(self, event: Event) -> None:
        """Write an event down, and hand it to the sinks; does not wait for them."""
        if self._file is not None:
            try:
                self._file.emit(event)
            except OSError as error:
                self._switch_off(error)
        for channel in self._channels:
            channel.send(event)

    def troubles(self) -> list[str]:
        """What went wrong since this was asked last, in words."""
        told, self._troubles = self._troubles, []
        return told

    def close(self, at_most: float = math.inf) -> None:
        """Wait a while for the sinks, no longer than `at_most` seconds, and close them; a second call does nothing."""
        ended = time.monotonic()
        for channel in self._channels:
            channel.end()
        for channel in self._channels:
            channel.join(ended, at_most)
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._switch_off(error)

    def _switch_off(self, error: OSError) -> None:
        self._file = None
        self._trouble(f"{self._path} is switched off: {error}")

    def _trouble(self, words: str) -> None:
        logger.warning("%s", words)
        self._troubles.append(words)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Channel:
    """A sink with its thread and the events that wait for it."""

    def __init__(self, name: str, make: Callable[[], Sink], trouble: Callable[[str], None]):
        self.name, self._make, self._trouble = name, make, trouble
        self._waiting: Queue[Event | None] = Queue(_BEHIND)
        self._given_up, self._close_seconds = False, _CLOSE_SECONDS
        self._lost_picture = False
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"sink-{name}")
        self._thread.start()

    def send(self, event: Event) -> None:
        if self._given_up:
            return
        try:
            self._waiting.put_nowait(event)
        except Full:
            self._give_up(f"it is more than {_BEHIND} events behind")

    def end(self) -> None:
        """No more events."""
        try:
            self._waiting.put_nowait(None)
        except Full:
            self._give_up(f"it is {_BEHIND} events behind at the end of the phase")

    def join(self, ended: float, at_most: float) -> None:
        """Wait for what is left, as long as the sink may need since the phase ended, or `at_most` seconds."""
        seconds = min(self._close_seconds, at_most)
        self._thread.join(max(0.0, ended + seconds - time.monotonic()))
        if self._thread.is_alive() and not self._given_up:
            left = max(0, self._waiting.qsize() - 1)  # without the end
            words = f"{left} event(s) were left" if left else "it was not done"
            self._give_up(f"{words} {seconds:g} s after the phase ended")

    def _run(self) -> None:
        with self._failure_gives_up(), closing(self._make()) as sink, self._failure_gives_up():
            self._close_seconds = getattr(sink, "close_seconds", _CLOSE_SECONDS)
            while (event := self._waiting.get()) is not None and not self._given_up:
                try:
                    sink.emit(event)
                except PictureLost as error:
                    self._tell_lost_picture(error)

    @contextmanager
    def _failure_gives_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _tell_lost_picture(self, error: PictureLost) -> None:
        if not self._lost_picture:
            self._lost_picture = True
            self._trouble(f"monitoring by {self.name} leaves out pictures that cannot be read, first {error}")

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._trouble(f"monitoring by {self.name} is switched off for this attempt: {why}")
