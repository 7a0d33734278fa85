"""Rank 0's records of a phase: events, phase_state.json, checkpoints and which of them are kept."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.data.hint_registry import resolve_hints
from ray_pipeline.models.weights import LatentsHeader, WeightsHeader
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import CheckpointEvent, EventLog, PhaseEvent, ValidationEvent
from ray_pipeline.training.pictures import draw_progress
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.snapshots import save_snapshot
from ray_pipeline.training.validation import Validation

#: a chart takes about a second, so it is drawn at most this often between epochs that are kept
_SECONDS_BETWEEN_CHARTS = 20.0


class PhaseRecords:
    """A context manager around the phase on rank 0; other ranks have none."""

    def __init__(self, run: PhaseRun):
        self.run = run
        self.state_file = Path(run.job.run_dir) / "phase_state.json"
        self.state = phase_state.load(self.state_file)
        self.progress = self.state.phase(run.phase.name)
        self.events = EventLog(
            run.job.run_dir,
            run.phase.name,
            tensorboard=run.config.monitoring.tensorboard,
            resume_step=run.state.step or -1,  # a start at 0 makes its step-0 records again
        )
        self.saved_at = time.monotonic()
        self.charted_at = -math.inf

    def __enter__(self) -> PhaseRecords:
        run, progress = self.run, self.progress
        names = run.checkpoints.names(run.phase.name)
        progress.status, progress.attempt = "running", run.job.attempt
        progress.steps, progress.epochs = run.total_steps, run.phase.epochs
        progress.checkpoints, progress.last = names, names[-1] if names else None
        progress.best = best_of(run.checkpoints, names)
        self.state.current_phase = run.phase.name
        word = "resumed" if run.state.step else "started"
        message = f"{word} at step {run.state.step} of {run.total_steps} on {run.world_size} worker(s)"
        self.events.emit(PhaseEvent(run.phase.name, word, run.state.step, message))
        self.state.record(word, f"{run.phase.name}: {message}")
        self._write()
        return self

    def __exit__(self, *exception: object) -> None:
        self.events.close()

    def epoch(self) -> int:
        """Epoch (from 1) that the step just done belongs to."""
        position = max(0, self.run.state.step * self.run.plan.global_batch - 1)
        return min(self.run.plan.epoch(position), self.run.phase.epochs)

    def note_step(self) -> None:
        self._write()

    def validation(self, validation: Validation, epoch_end: bool = False) -> bool:
        """Record a validation; True if it is an epoch's end and the best so far."""
        run = self.run
        self.events.emit(
            ValidationEvent(
                phase=run.phase.name,
                step=run.state.step,
                position=run.state.step * run.plan.global_batch,
                epoch=self.epoch(),
                loss=validation.loss,
                standard_error=validation.standard_error,
                loss_by_sigma=validation.by_sigma,
                ema=run.state.ema.group if run.state.ema else "weights",
            )
        )
        self.progress.metrics["val_loss"] = validation.loss
        self._write()
        if time.monotonic() - self.charted_at > _SECONDS_BETWEEN_CHARTS:
            draw_progress(run, self.progress.baseline_val_loss)
            self.charted_at = time.monotonic()
        best = self.progress.best
        return epoch_end and (best is None or validation.loss < best.val_loss)

    def safety_save_is_due(self) -> bool:
        minutes = self.run.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def save(self, kind: str, epoch: int | None = None) -> None:
        """Commit a checkpoint, then drop those that are no longer kept."""
        run, progress = self.run, self.progress
        started = time.perf_counter()
        suffix = f"step_{run.state.step:08d}" if epoch is None else f"epoch_{epoch:03d}"
        val_loss = progress.metrics.get("val_loss")
        state = {
            "phase": run.phase.name,
            "step": run.state.step,
            "position": run.state.step * run.plan.global_batch,
            "epoch": self.epoch(),
            "attempt": run.job.attempt,
            "world_size": run.world_size,
            "kind": kind,
            "init": run.job.init,
            "val_loss": val_loss,
            "baseline_val_loss": progress.baseline_val_loss,
            "weights": (header := self.header()).model_dump(mode="json"),
            "config": run.job.config,
        }
        name = run.checkpoints.save(f"{run.phase.name}_{suffix}", run.state.groups(), state, header.metadata())
        if epoch is not None and (progress.best is None or val_loss < progress.best.val_loss):
            progress.best = phase_state.BestCheckpoint(checkpoint=name, val_loss=val_loss, epoch=epoch)
        progress.last = name
        self._prune()
        seconds = time.perf_counter() - started
        self.saved_at = time.monotonic()
        self.events.emit(CheckpointEvent(run.phase.name, run.state.step, self.epoch(), name, kind, seconds))
        self.state.record("checkpoint", f"{name} ({kind})")
        self._write()

    def header(self) -> WeightsHeader:
        """What the weights of this step are."""
        run = self.run
        return WeightsHeader(
            phase=run.phase.name,
            step=run.state.step,
            network=run.state.network.shape,
            edm=asdict(run.edm),
            latents=LatentsHeader(**run.train_store.stats.as_json()),
            autoencoder=run.train_store.autoencoder,
            intensity=run.train_store.intensity,
            hints=resolve_hints(run.config.data.hints, run.hints),
            ema=run.state.ema.group if run.state.ema else None,
        )

    def snapshot(self) -> None:
        """Store the power-function averages of this step."""
        save_snapshot(self.run, self.header())

    def finish(self) -> None:
        run = self.run
        message = f"finished after {run.total_steps} steps, {run.phase.epochs} epochs"
        self.events.emit(PhaseEvent(run.phase.name, "finished", run.state.step, message))
        draw_progress(run, self.progress.baseline_val_loss)
        self.progress.status = "finished"
        self.state.record("finished", f"{run.phase.name}: {message}")
        self._write()

    def _prune(self) -> None:
        """Keep the epochs of epochs_to_save, the best and the last; only after the newer one is committed."""
        run, progress = self.run, self.progress
        kept = {f"{run.phase.name}_epoch_{epoch:03d}.ckpt" for epoch in run.phase.save_epochs}
        kept |= {progress.last, progress.best.checkpoint if progress.best else None}
        for name in run.checkpoints.names(run.phase.name):
            if name not in kept:
                run.checkpoints.delete(name)
        progress.checkpoints = run.checkpoints.names(run.phase.name)

    def _write(self) -> None:
        progress, run = self.progress, self.run
        progress.step, progress.position = run.state.step, run.state.step * run.plan.global_batch
        progress.epoch = self.epoch() if run.state.step else 0
        self.state.save(self.state_file)


def best_of(store: CheckpointStore, names: list[str]) -> phase_state.BestCheckpoint | None:
    """The best of committed epochs by their own records: a kill may come between a save and phase_state.json."""
    states = {name: store.load(name).state for name in names}
    scored = {name: state for name, state in states.items() if state["kind"] != "safety" and state["val_loss"]}
    if not scored:
        return None
    name = min(scored, key=lambda name: (scored[name]["val_loss"], scored[name]["step"]))
    return phase_state.BestCheckpoint(checkpoint=name, val_loss=scored[name]["val_loss"], epoch=scored[name]["epoch"])
