"""One phase on one worker, from its first step to its last. Ray Train calls `train_phase` on every worker."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ray.train
import torch
import torch.distributed

from ray_pipeline.data.stream import StreamSettings, read_ahead, stream
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    EventLog,
    PhaseEvent,
    StepEvent,
    ValidationEvent,
)
from ray_pipeline.training.pictures import draw_progress, draw_samples
from ray_pipeline.training.setup import PhaseJob, PhaseRun, open_phase
from ray_pipeline.training.step import StepResult, learning_rate, optimize, prepared, warm_up
from ray_pipeline.training.validation import Validation, paired_gain, untrained_loss, validate

#: a chart takes about a second, so it is drawn at most this often between epochs that are kept
_SECONDS_BETWEEN_CHARTS = 20.0
_UNTRAINED_TOLERANCE = 0.02


def train_phase(job: dict) -> None:
    """Train what is left of a phase: resume is a start at a later step, so there is no other path."""
    run = open_phase(PhaseJob(**job))
    with ExitStack() as stack:
        books = stack.enter_context(Books(run)) if run.rank == 0 else None
        if run.state.step == 0:
            measure_untrained(run, books)
        warm_up(run)
        interval = Interval(run)
        steps = stream(_stream_settings(run), run.state.step, run.total_steps)
        batches = read_ahead(prepared(run, steps))
        stack.callback(batches.close)
        while run.state.step < run.total_steps:
            started = time.perf_counter()
            step, micro = next(batches)
            interval.waited += time.perf_counter() - started
            interval.add(optimize(run, step, micro))
            if run.state.step % run.config.monitoring.log_every_n_steps == 0 or run.state.step == run.total_steps:
                interval.report(books)
            finish_step(run, books)
            interval.restart_clock()
        finish_phase(run, books)


def ended_epochs(run: PhaseRun) -> range:
    """Epochs (from 1) that the step just done completed; may be several, or none."""
    step, size, rows = run.state.step, run.plan.global_batch, run.plan.num_samples
    return range((step - 1) * size // rows + 1, min(step * size // rows, run.phase.epochs) + 1)


def finish_step(run: PhaseRun, books: Books | None) -> None:
    """What follows an update: validation, samples, checkpoint, in this order."""
    ended = ended_epochs(run)
    if not ended:
        if run.state.step % run.config.monitoring.val_check_interval == 0:
            validation = validate(run)
            if books:
                books.validation(validation)
        if books and books.safety_save_is_due():
            books.save("safety")
        return
    validation = validate(run)
    if not books:
        return
    best = books.validation(validation, epoch_end=True)
    last = run.phase.epochs in ended
    every = run.config.monitoring.sample_every_n_epochs
    if run.config.monitoring.plot_samples and (last or any(epoch % every == 0 for epoch in ended)):
        draw_samples(run, books.records, ended[-1])
    kept = [epoch for epoch in ended if epoch in run.phase.save_epochs]
    if kept or best or last:
        books.save("epoch" if kept else "best" if best else "last", epoch=(kept or list(ended))[-1])
    if kept:
        draw_progress(run, books.progress.baseline_val_loss, ended[-1])


def measure_untrained(run: PhaseRun, books: Books | None) -> None:
    """Before the first step: the network's loss on its statistics' tiles, and on the validation tiles.

    A fresh unconditional network must score 1: anything else means that the latents are not normalised.
    """
    fresh = run.job.init is None
    loss, error = untrained_loss(run) if fresh else (math.nan, math.nan)
    if fresh and not abs(loss - 1) <= _UNTRAINED_TOLERANCE + 3 * error:
        raise UserError(
            f"an untrained network scores {loss:.3f} +- {error:.3f} on the training latents, expected 1.00: the store "
            f"at {run.job.latents} does not have the statistics of its stats.json; encode again"
        )
    validation = validate(run)
    if books:
        if fresh:
            books.progress.metrics["untrained_loss"] = loss
        books.progress.baseline_val_loss = validation.loss
        books.validation(validation)


def finish_phase(run: PhaseRun, books: Books | None) -> None:
    """After the last step: does the network use its hints? Then the phase is finished."""
    if run.hints:
        right, shuffled = validate(run), validate(run, shuffled=True)
        if books:
            gain, error = paired_gain(right, shuffled)
            books.progress.metrics.update(
                val_loss_right_hints=right.loss,
                val_loss_shuffled_hints=shuffled.loss,
                hint_gain=gain,
                hint_gain_standard_error=error,
            )
    if books:
        books.finish()
    if run.world_size > 1:
        torch.distributed.barrier()
    ray.train.report({"phase": run.phase.name, "step": run.state.step})


@dataclass
class Interval:
    """Steps since the last report."""

    run: PhaseRun
    results: list[StepResult] = field(default_factory=list)
    waited: float = 0.0
    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult) -> None:
        self.results.append(result)
        self.seconds += time.perf_counter() - self.since
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what was spent on validation, pictures and checkpoints."""
        self.since = time.perf_counter()

    def report(self, books: Books | None) -> None:
        """Mean loss over all ranks and the steps of this interval; all ranks call it."""
        run, count = self.run, len(self.results)
        total = torch.stack([result.loss_sum for result in self.results]).sum()
        if run.world_size > 1:
            torch.distributed.all_reduce(total)
        samples = run.plan.global_batch * count
        if books:
            step = run.state.step
            books.records.emit(
                StepEvent(
                    phase=run.phase.name,
                    step=step,
                    position=step * run.plan.global_batch,
                    epoch=books.epoch(),
                    loss=float(total) / samples,
                    lr=learning_rate(run.config.optimizer, step - 1, run.total_steps, run.phase.lr),
                    grad_norm=self.results[-1].grad_norm,
                    samples_per_second=samples / max(self.seconds, 1e-9),
                    data_wait_seconds=self.waited / count,
                )
            )
            books.note_step()
        self.results, self.waited, self.seconds = [], 0.0, 0.0


class Books:
    """Rank 0's records of the phase: events, phase_state.json, checkpoints and which of them are kept."""

    def __init__(self, run: PhaseRun):
        self.run = run
        self.state_file = Path(run.job.run_dir) / "phase_state.json"
        self.state = phase_state.load(self.state_file)
        self.progress = self.state.phase(run.phase.name)
        self.records = EventLog(
            run.job.run_dir,
            run.phase.name,
            tensorboard=run.config.monitoring.tensorboard,
            resume_step=run.state.step or -1,  # a start at 0 makes its step-0 records again
        )
        self.saved_at = time.monotonic()
        self.charted_at = -math.inf

    def __enter__(self) -> Books:
        run, progress = self.run, self.progress
        names = run.checkpoints.names(run.phase.name)
        progress.status, progress.attempt = "running", run.job.attempt
        progress.steps, progress.epochs = run.total_steps, run.phase.epochs
        progress.checkpoints, progress.last = names, names[-1] if names else None
        if progress.best is not None and progress.best.checkpoint not in names:
            progress.best = None
        self.state.current_phase = run.phase.name
        word = "resumed" if run.state.step else "started"
        message = f"{word} at step {run.state.step} of {run.total_steps} on {run.world_size} worker(s)"
        self.records.emit(PhaseEvent(run.phase.name, word, run.state.step, message))
        self.state.record(word, f"{run.phase.name}: {message}")
        self._write()
        return self

    def __exit__(self, *exception: object) -> None:
        self.records.close()

    def epoch(self) -> int:
        """Epoch (from 1) that the step just done belongs to."""
        position = max(0, self.run.state.step * self.run.plan.global_batch - 1)
        return min(self.run.plan.epoch(position), self.run.phase.epochs)

    def note_step(self) -> None:
        self._write()

    def validation(self, validation: Validation, epoch_end: bool = False) -> bool:
        """Record a validation; True if it is an epoch's end and the best so far."""
        run = self.run
        self.records.emit(
            ValidationEvent(
                phase=run.phase.name,
                step=run.state.step,
                position=run.state.step * run.plan.global_batch,
                epoch=self.epoch(),
                loss=validation.loss,
                standard_error=validation.standard_error,
                loss_by_sigma=validation.by_sigma,
                ema=run.state.ema_group or "weights",
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
            "val_loss": val_loss,
            "baseline_val_loss": progress.baseline_val_loss,
            "latent_stats": run.train_store.stats.as_json(),
            "config": run.job.config,
        }
        name = run.checkpoints.save(f"{run.phase.name}_{suffix}", run.state.groups(), state)
        if epoch is not None and (progress.best is None or val_loss < progress.best.val_loss):
            progress.best = phase_state.BestCheckpoint(checkpoint=name, val_loss=val_loss, epoch=epoch)
        progress.last = name
        self._prune()
        seconds = time.perf_counter() - started
        self.saved_at = time.monotonic()
        self.records.emit(CheckpointEvent(run.phase.name, run.state.step, self.epoch(), name, kind, seconds))
        self.state.record("checkpoint", f"{name} ({kind})")
        self._write()

    def finish(self) -> None:
        run = self.run
        message = f"finished after {run.total_steps} steps, {run.phase.epochs} epochs"
        self.records.emit(PhaseEvent(run.phase.name, "finished", run.state.step, message))
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


def _stream_settings(run: PhaseRun) -> StreamSettings:
    return StreamSettings(
        plan=run.plan,
        store=run.train_store,
        rows=run.rows,
        hints=run.hints,
        rank=run.rank,
        world_size=run.world_size,
        name=f"{run.phase.name}-rank{run.rank}",
        workers=run.config.train.dataloader_workers,
    )


def job_values(job: PhaseJob) -> dict:
    """A PhaseJob as Ray Train's train_loop_config."""
    return asdict(job)
