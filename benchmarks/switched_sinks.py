"""All sinks of a run in one, which a benchmark switches on and off while the run trains; monitoring.py installs it.

What comes while it is off waits until it is on again.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from ray_pipeline.monitoring.events import Event, PhaseEvent
from ray_pipeline.monitoring.ray_metrics import RayMetrics
from ray_pipeline.monitoring.sink import SinkContext
from ray_pipeline.monitoring.sinks import open_sink

#: in the run's folder while the sinks are off
SWITCH = "sinks_are_off"
_POLL_SECONDS = 0.1


class SwitchedSinks:
    """Sink: TensorBoard and Weights & Biases, which do nothing without events, and Ray's metrics, which set theirs
    again each second and are closed while they are off."""

    def __init__(self, context: SinkContext):
        self.context, self.switch = context, context.run_dir / SWITCH
        offline = {**context.config["monitoring"], "wandb": "offline"}
        told = replace(context, config={**context.config, "monitoring": offline})
        self.sinks = [open_sink(name, told) for name in ("tensorboard", "wandb")]
        self.ray: RayMetrics | None = None
        self.begin: PhaseEvent | None = None
        self.on, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="switch").start()

    def emit(self, event: Event) -> None:
        self.on.wait()
        self.begin = self.begin or event
        for sink in (*self.sinks, self.ray):
            sink.emit(event)

    def close(self) -> None:
        self.ended.set()
        for sink in (*self.sinks, *filter(None, [self.ray])):
            sink.close()

    def _watch(self) -> None:
        while not self.ended.wait(_POLL_SECONDS):
            wanted = not self.switch.exists()
            if wanted and not self.on.is_set():
                self.ray = RayMetrics(self.context)
                if self.begin is not None:  # it tells of all the phase's steps
                    self.ray.emit(self.begin)
                self.on.set()
            elif not wanted and self.on.is_set():
                self.on.clear()
                self.ray.close()
