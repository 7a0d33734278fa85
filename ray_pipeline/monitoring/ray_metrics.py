"""Ray's own metrics: gauges that each node serves to Prometheus, named ray_pipeline_..., by run and phase."""

from __future__ import annotations

import math
import threading
from collections import deque
from functools import cache

from ray.util.metrics import Counter, Gauge

from ray_pipeline.monitoring.events import CheckpointEvent, Event, FaultEvent, PhaseEvent, StepEvent, ValidationEvent
from ray_pipeline.monitoring.pace import RECENT, seconds_a_step
from ray_pipeline.monitoring.phase_state import utc_now
from ray_pipeline.monitoring.sink import SinkContext

_TAGS = ("run", "phase")
#: by gauge: field of a StepEvent, and what it is
STEP_GAUGES = {
    "train_loss": ("loss", "Training loss, mean over all ranks."),
    "step": ("step", "Optimizer steps done in the phase."),
    "epoch": ("epoch", "Epoch in progress, from 1."),
    "learning_rate": ("lr", "Learning rate of the last step."),
    "gradient_norm": ("grad_norm", "Norm of the joint gradient before clipping."),
    "samples_per_second": ("samples_per_second", "Training samples a second, over all ranks."),
    "step_seconds": ("step_seconds", "Seconds of a step."),
    "data_wait_seconds": ("data_wait_seconds", "Seconds of a step that rank 0 waits for data."),
    "compute_seconds": ("compute_seconds", "Seconds of a step in the forward and backward passes."),
    "utilisation": ("utilisation", "Floating-point operations of the network over the device's peak, 0 to 1."),
    "memory_bytes": ("memory_bytes", "Most memory so far: allocated on the GPU, or resident on a CPU."),
}
OTHER_GAUGES = {
    "status": "0 in training, 1 stopped in order, 2 finished; a series that ends at 0 is of a worker that died.",
    "total_steps": "Optimizer steps of the whole phase.",
    "seconds_left": "Seconds until the phase ends, at the pace of the last steps.",
    "val_loss": "Validation loss of the average that checkpoints are judged by.",
    "checkpoint_seconds": "Seconds for which training stood still for the last checkpoint.",
    "checkpoint_write_seconds": "Seconds that writing the last checkpoint took.",
}
COUNTERS = {
    "skipped_steps": "Steps without a finite loss or gradient.",
    "faults": "Things that went wrong while the run went on.",
}
#: Ray takes over what a worker set last when it kills it, and shows it for another 20 s
_STATUS = {"started": 0, "resumed": 0, "stopped": 1, "finished": 2}
#: Ray forgets a gauge that nobody set for two of its reports, which are at least a second apart
_REFRESH_SECONDS = 1.0


class RayMetrics:
    """Sink: the newest values of one phase, which it sets again and again until it is closed: steps, and validations
    all the more, may be minutes apart. What is not finite is left out: a gauge holds its last value then."""

    def __init__(self, context: SinkContext):
        self._tags = {"run": context.run_name, "phase": context.phase}
        self._average: str | None = None
        self._total_steps = 0
        self._steps: deque[dict] = deque(maxlen=RECENT)
        self._values: dict[str, tuple[str, float]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._refresh, daemon=True, name="ray-metrics").start()

    def emit(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            for name, (field, words) in STEP_GAUGES.items():
                self._set(name, words, getattr(event, field))
            self._count("skipped_steps", event.skipped)
            told = {"event": "step", "step": event.step, "samples_per_second": event.samples_per_second}
            self._steps.append(told | {"time": utc_now()})
            if self._total_steps:
                pace = seconds_a_step(self._steps)
                self._set("seconds_left", OTHER_GAUGES["seconds_left"], pace * (self._total_steps - event.step))
        elif isinstance(event, PhaseEvent):
            self._emit_phase(event)
        elif isinstance(event, ValidationEvent):
            self._average = self._average or event.ema  # the first of several is the one that decides
            if event.ema == self._average:
                self._set("val_loss", OTHER_GAUGES["val_loss"], event.loss)
        elif isinstance(event, CheckpointEvent):
            self._set("checkpoint_seconds", OTHER_GAUGES["checkpoint_seconds"], event.seconds)
            self._set("checkpoint_write_seconds", OTHER_GAUGES["checkpoint_write_seconds"], event.write_seconds)
        elif isinstance(event, FaultEvent):
            self._count("faults", 1)

    def close(self) -> None:
        """Ray reports the last values once more, even if the process is killed."""
        self._closed.set()

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_SECONDS):
            with self._lock:
                for name, (words, value) in self._values.items():
                    _gauge(name, words).set(value, tags=self._tags)

    def _emit_phase(self, event: PhaseEvent) -> None:
        if event.status in _STATUS:
            self._set("status", OTHER_GAUGES["status"], _STATUS[event.status])
        if event.total_steps:
            self._total_steps = event.total_steps
            self._set("total_steps", OTHER_GAUGES["total_steps"], event.total_steps)

    def _set(self, name: str, words: str, value: float) -> None:
        if math.isfinite(value):
            with self._lock:
                self._values[name] = words, value
                _gauge(name, words).set(value, tags=self._tags)

    def _count(self, name: str, number: int) -> None:
        if number:
            _counter(name, COUNTERS[name]).inc(number, tags=self._tags)


@cache  # one of a name a process
def _gauge(name: str, words: str) -> Gauge:
    return Gauge(f"pipeline_{name}", description=words, tag_keys=_TAGS)


@cache
def _counter(name: str, words: str) -> Counter:
    return Counter(f"pipeline_{name}", description=words, tag_keys=_TAGS)
