"""Rank 0's records of a phase: events, phase_state.json, checkpoints and which of them are kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict

from ray_pipeline.data.hint_registry import resolve_hints
from ray_pipeline.models.weights import LatentsHeader, WeightsHeader
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import CheckpointEvent, FaultEvent, PhaseEvent, ValidationEvent
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.sinks import chosen_sinks
from ray_pipeline.retention import best_of
from ray_pipeline.run_copy import guard, run_path
from ray_pipeline.run_state import mend_state
from ray_pipeline.storage import StorageError
from ray_pipeline.training.commits import PATIENCE_SECONDS, Commits
from ray_pipeline.training.nonfinite import SkippedSteps, Trouble
from ray_pipeline.training.saving import Save
from ray_pipeline.training.setup import PhaseRun, resources
from ray_pipeline.training.snapshots import snapshot
from ray_pipeline.training.validation import Validation, write_tile_losses

logger = logging.getLogger(__name__)

#: characters that are told of an error
_MOST_WORDS = 300
#: a run that was superseded learns it within so many seconds, and before every file of a checkpoint
_SECONDS_BETWEEN_CHECKS = 5.0
#: step records may come many a second, and with 1000 events in its history the state takes 5 ms to write
_SECONDS_BETWEEN_WRITES = 2.0
#: of ray.stop_timeout_seconds, the share that sinks may take when somebody waits for the phase to stop or to go back
_SINKS_SHARE = 0.25
#: after a storage did not answer, it is asked again so much later
_RETRY_SECONDS = 60.0


class PhaseRecords:
    """A context manager around the phase on rank 0; other ranks have none. tell: who hears of each commit, its step and
    name."""

    def __init__(self, run: PhaseRun, tell: Callable[[int, str], None] | None = None):
        self.run, self.tell = run, tell
        guard(run.config.output_dir, run.checkpoints.superseded)
        self.state_file = run_path(run.config.output_dir, phase_state.FILE)
        self.state = mend_state(run.config)
        self.progress = self.state.phase(run.phase.name)
        self.events = EventLog(
            run_path(run.config.output_dir),
            run.phase.name,
            chosen_sinks(run.config.monitoring),
            config=run.job.config,
            resume_step=run.state.step or -1,  # a start at 0 makes its step-0 records again
        )
        self.commits = Commits(run, self.fault, self._committed)
        #: tells the steps up to this one, which a checkpoint is to be made of
        self.before_save: Callable[[], None] = lambda: None
        self.said: set[str] = set()
        self.checked_at, self.written_at, self.behind = time.monotonic(), -math.inf, False
        self.awaited = False  # somebody waits for its end
        self._stack = ExitStack()

    def __enter__(self) -> PhaseRecords:
        run, progress = self.run, self.progress
        self._stack.callback(self._close_events)
        self._stack.enter_context(self.commits)
        before = {} if run.newest is None else run.newest.state
        progress.baseline_val_loss = before.get("baseline_val_loss")
        progress.metrics = dict(before.get("metrics", {}))
        self._note_checkpoints()
        lost = progress.model_copy() if progress.status == "running" else None
        progress.status, progress.attempt = "running", run.start.attempt
        progress.steps, progress.epochs = run.total_steps, run.phase.epochs
        self.state.current_phase = run.phase.name
        self.state.run["resources"] = resources(run)
        word = "resumed" if run.state.step else "started"
        message = f"{word} at step {run.state.step} of {run.total_steps} on {run.world_size} worker(s)"
        self.events.emit(PhaseEvent(run.phase.name, word, run.state.step, message, run.total_steps))
        self.state.record(word, f"{run.phase.name}: {message}, attempt {run.start.attempt}")
        self._tell_untold_commits()
        if lost:
            ended = f"attempt {lost.attempt} ended without a word after step {lost.step}"
            self.fault("restart", f"{ended}, this one goes on from step {run.state.step}")
        for words in run.start.passed_over:
            self.fault("checkpoint", words)
        self._write()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        late = self.events.troubles()
        for words in late:
            self.state.record("fault", f"{self.run.phase.name}: {words}")
        if late and exception[0] is None:  # else another attempt may have the file
            self._write()

    def epoch(self) -> int:
        """Epoch (from 1) that the step just done belongs to."""
        position = max(0, self.run.state.step * self.run.plan.global_batch - 1)
        return min(self.run.plan.epoch(position), self.run.phase.epochs)

    def fault(self, kind: str, message: str) -> None:
        """Record what went wrong, once."""
        if message in self.said:
            return
        self.said.add(message)
        self.events.emit(FaultEvent(self.run.phase.name, self.run.state.step, kind, message))
        self.state.record("fault", f"{self.run.phase.name}, step {self.run.state.step}: {message}")
        self._write()

    def note_step(self) -> None:
        """A step was told; phase_state.json may be some seconds behind, but not behind a checkpoint."""
        for words in self.events.troubles():
            self.fault("monitoring", words)
        self._check_attempt()
        self.behind = True
        if time.monotonic() - self.written_at > _SECONDS_BETWEEN_WRITES:
            self._write()

    def after_step(self, save: bool) -> None:
        """Take note of what was committed meanwhile; save when it is time, or when asked."""
        with self.run.clock.part("saving"):
            self.commits.collect()
        if (save or self.commits.due()) and not self.commits.has_step():
            self.save("safety")

    def skip(self, skipped: SkippedSteps, trouble: Trouble | None) -> None:
        """Record a step without a finite loss, so that no later attempt computes it; after too many, their range."""
        if self.run.state.step not in self.run.start.avoid:  # else it was not computed, and the attempt that did told
            self.fault("skip", skipped.describe())
            self.draw("the report of skipped steps", skipped.write_report)
        attempt = self.run.checkpoints.attempt
        known = {*attempt.record.skipped, self.run.state.step}
        if trouble is None or trouble.again:
            try:
                attempt.update(skipped=tuple(sorted(known)))
            except StorageError as error:  # the next checkpoint tells it, too
                self.fault("skip", f"step {self.run.state.step} is not yet written down as skipped: {error}")
            return
        known |= set(range(trouble.first, trouble.last + 1))
        self.commits.wait(PATIENCE_SECONDS)
        attempt.update(skipped=tuple(sorted(known)), valid_until=trouble.first - 1)
        self.awaited = True
        self.progress.status = "starting"  # anew, from the checkpoint before them
        self.fault(
            "rollback",
            f"too many steps without a finite loss or gradient: back to the last checkpoint before step "
            f"{trouble.first}; the steps {trouble.first} to {trouble.last} are left out from now on, "
            f"{trouble.report} lists their samples",
        )

    def stop(self, reason: str, *, asked: bool = True) -> None:
        """Commit this step and leave the phase for later. asked: by somebody who waits for it."""
        self.awaited = asked
        self.commits.secure(lambda: self.save("stop"), math.inf)
        message = f"stopped after step {self.run.state.step} of {self.run.total_steps} ({reason})"
        self.events.emit(PhaseEvent(self.run.phase.name, "stopped", self.run.state.step, message))
        self.state.record("stopped", f"{self.run.phase.name}: {message}")
        self.progress.status = "stopped"
        self._write()

    def validation(self, validation: Validation, epoch_end: bool = False) -> bool:
        """Record a validation; True if it is an epoch's end and the best so far."""
        run = self.run
        self._emit_validation(validation, run.state.average_name)
        self.progress.metrics["val_loss"] = validation.loss
        self._write()
        best = best_of(self.commits.states)
        better = math.isfinite(validation.loss) and (best is None or validation.loss < best.val_loss)
        return epoch_end and better

    def averages(self, found: Mapping[str, Validation], epoch: int) -> None:
        """Record a validation of every average, by name, at the end of an epoch: the others' losses, and the losses of
        all at each tile and noise level, for whoever compares trainings pairwise."""
        run = self.run
        for name, validation in found.items():
            if name != run.state.average_name:
                self._emit_validation(validation, name)
        self.draw("the losses of the tiles", lambda: write_tile_losses(run, found, epoch))

    def draw(self, what: str, action: Callable[[], object]) -> None:
        """Draw a picture or write a report; one that fails, for want of memory or whatever else, is a fault and no
        reason to stop."""
        try:
            action()
        except Exception as error:
            logger.warning("%s cannot be made", what, exc_info=True)
            words = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_WORDS]
            self.fault("picture", f"{what} cannot be made: {words}")

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

    def save(self, kind: str, epoch: int | None = None) -> None:
        """Have a checkpoint of this step written; the records reach up to it."""
        with self.run.clock.part("logging"):
            self.before_save()
            if self.behind:
                self._write()
        with self.run.clock.part("saving"):
            header = self.header()
            self.commits.save(self._state(kind, header), header.metadata(), epoch)

    def save_snapshot(self) -> None:
        """Store the power-function averages of this step, if there are any."""
        with self.run.clock.part("saving"):
            save = snapshot(self.run, self.header())
            if save is not None:
                self.commits.submit(save)

    def finish(self) -> None:
        """The phase is done, and its last step committed."""
        run = self.run
        self.commits.secure(lambda: self.save("last", run.phase.epochs), PATIENCE_SECONDS)
        message = f"finished after {run.total_steps} steps, {run.phase.epochs} epochs"
        self.events.emit(PhaseEvent(run.phase.name, "finished", run.state.step, message))
        self.progress.status = "finished"
        self.state.record("finished", f"{run.phase.name}: {message}")
        self._write()

    def _close_events(self) -> None:
        patience = _SINKS_SHARE * self.run.config.ray.stop_timeout_seconds
        self.events.close(at_most=patience if self.awaited else math.inf)

    def _emit_validation(self, validation: Validation, average: str) -> None:
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
                ema=average,
            )
        )

    def _state(self, kind: str, header: WeightsHeader) -> dict:
        run, progress = self.run, self.progress
        return {
            "phase": run.phase.name,
            "step": run.state.step,
            "total_steps": run.total_steps,
            "position": run.state.step * run.plan.global_batch,
            "epoch": self.epoch(),
            "world_size": run.world_size,
            "kind": kind,
            "init": run.job.init,
            "skipped": list(run.state.skipped),
            "val_loss": progress.metrics.get("val_loss"),
            "baseline_val_loss": progress.baseline_val_loss,
            "metrics": dict(progress.metrics),
            "weights": header.model_dump(mode="json"),
            "config": run.job.config,
        }

    def _committed(self, save: Save, stood_still: float, seconds: float) -> None:
        self._tell_commit(save.name, save.state, stood_still, seconds)
        if self.tell:
            self.tell(save.state["step"], save.name)
        self._note_checkpoints()
        self._write()

    def _tell_commit(self, name: str, state: Mapping, stood_still: float, seconds: float) -> None:
        self.events.emit(
            CheckpointEvent(
                phase=state["phase"],
                step=state["step"],
                epoch=state["epoch"],
                name=name,
                kind=state["kind"],
                seconds=stood_still,
                write_seconds=seconds,
            )
        )
        self.state.record("checkpoint", f"{name} ({state['kind']})")

    def _tell_untold_commits(self) -> None:
        """Those that a kill came too soon after; how long they took is not known."""
        try:
            records = read_events(run_path(self.run.config.output_dir), self.run.phase.name, "checkpoint")
        except OSError as error:
            self.fault("monitoring", f"earlier records cannot be read: {error}")
            return
        told = {(record["name"], record["step"]) for record in records}
        for name, state in self.commits.committed().items():
            if (name, state["step"]) not in told:
                self._tell_commit(name, state, math.nan, math.nan)

    def _note_checkpoints(self) -> None:
        progress, states = self.progress, self.commits.committed()
        progress.checkpoints = list(states)
        progress.last = progress.checkpoints[-1] if states else None
        progress.best = best_of(states)

    def _check_attempt(self) -> None:
        """Superseded where another one has begun; asked now and then."""
        run = self.run
        if run.checkpoints.attempt is not None and time.monotonic() - self.checked_at > _SECONDS_BETWEEN_CHECKS:
            self.checked_at = time.monotonic()
            try:
                run.checkpoints.check_attempt()
            except StorageError as error:  # a save says so, too, and comes again
                self.checked_at += _RETRY_SECONDS
                self.said.add(message := f"the storage of checkpoints does not answer: {error}")
                self.events.emit(FaultEvent(run.phase.name, run.state.step, "save", message))

    def _write(self) -> None:
        self._check_attempt()
        self.written_at, self.behind = time.monotonic(), False
        progress, run = self.progress, self.run
        progress.step, progress.position = run.state.step, run.state.step * run.plan.global_batch
        progress.epoch = self.epoch() if run.state.step else 0
        try:
            self.state.save(self.state_file)
        except OSError as error:  # the checkpoints are the truth; it is written again soon
            message = f"{self.state_file} cannot be written: {error}"
            if message not in self.said:
                self.said.add(message)
                self.events.emit(FaultEvent(run.phase.name, run.state.step, "state", message))
