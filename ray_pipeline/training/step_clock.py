"""Where the time of a step goes, on this rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: what is computed on the device, by kernels that a CPU only starts
_ON_DEVICE = ("compute", "optimizer", "ema")
#: seconds of the host: data_wait is that of the training thread, logging and saving follow the update
_ON_HOST = ("data_wait", "logging", "saving")


class StepClock:
    """Seconds by part since they were taken last. On a GPU, parts of the device are timed by events in its own stream,
    which wait for nothing."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys((*_ON_DEVICE, *_ON_HOST), 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within belongs to this part."""
        if self._cuda and name in _ON_DEVICE:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        taken, self._seconds, self._events = self._seconds, dict.fromkeys(self._seconds, 0.0), []
        return taken
