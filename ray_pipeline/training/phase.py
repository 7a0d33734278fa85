"""One phase on one worker, from its first step to its last. entry.py calls `train_phase` on every worker."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import ray.train
import torch
import torch.distributed

from ray_pipeline.data.stream import ReadAhead, stream
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.events import StepEvent
from ray_pipeline.run_copy import working_copy
from ray_pipeline.training.build import precision
from ray_pipeline.training.device_peak import peak_flops, peak_memory
from ray_pipeline.training.nodes import check_this_node
from ray_pipeline.training.nonfinite import SkippedSteps, Trouble
from ray_pipeline.training.pictures import draw_samples
from ray_pipeline.training.profiling import profiled
from ray_pipeline.training.records import PhaseRecords
from ray_pipeline.training.sample_log import SampleLog
from ray_pipeline.training.setup import PhaseJob, PhaseRun, open_data, open_phase, stream_settings
from ray_pipeline.training.snapshots import snapshot_is_due
from ray_pipeline.training.step import StepInput, StepResult, avoid, learning_rate, optimize, prepared, warm_up
from ray_pipeline.training.stopping import StopWatch
from ray_pipeline.training.validation import has_tile_losses, paired_gain, untrained_loss, validate, validate_averages

_UNTRAINED_TOLERANCE = 0.02


def train_phase(job: dict) -> None:
    """Train what is left of a phase: resume is a start at a later step, so there is no other path.

    After too many steps without a finite loss it goes back to the checkpoint before them and leaves their range out;
    UserError when that happens again.
    """
    job = PhaseJob(**job)
    check_this_node(job.config["output_dir"], job.mark)
    first = ray.train.get_context().get_world_rank() == 0
    with StopWatch(job.stop) as watch, working_copy(job.config["output_dir"], empty=not first):
        while (trouble := train_attempt(job, watch)) is not None:
            if trouble.again:
                raise UserError(
                    f"more than train.max_skipped_steps of the steps {trouble.first} to {trouble.last} have no finite "
                    f"loss or gradient, and it is not the first time; {trouble.report} lists their samples; lower "
                    "optimizer.lr or set train.precision=fp32 (--allow-change), or mend the tiles"
                )


def train_attempt(job: PhaseJob, watch: StopWatch) -> Trouble | None:
    """Train from the newest checkpoint until the phase ends, someone asks to stop, or there is trouble."""
    data = open_data(job)
    with ExitStack() as stack:
        # first of all: Ray Data needs seconds to start, as building the network does
        steps = ReadAhead(stream(stream_settings(data), data.first_step, data.end_step))
        stack.callback(steps.close)
        inputs = ReadAhead(prepared(data, steps))
        stack.callback(inputs.close)
        run = open_phase(data)
        records = stack.enter_context(PhaseRecords(run, watch.committed)) if run.rank == 0 else None
        log = stack.enter_context(SampleLog(run)) if run.config.monitoring.log_samples else None
        if run.state.step == 0:
            measure_untrained(run, records)
        warm_up(run)
        trace_step = stack.enter_context(profiled(run, records.draw if records else None))
        interval, skipped = Interval(run, records), SkippedSteps(run)
        while run.state.step < run.end_step:
            taken = interval.next(inputs)
            result = train_step(run, taken, watch)
            interval.add(result)
            trace_step()
            if log:
                with run.clock.part("logging"):
                    log.add(taken)
            if result.skipped and run.state.step not in run.start.forgiven:
                trouble = skipped.add(result)
                if records:
                    records.skip(skipped, trouble)
                if trouble:
                    return trouble
            if run.state.step % run.config.monitoring.log_every_n_steps == 0 or run.state.step == run.end_step:
                with run.clock.part("logging"):
                    interval.report()
            finish_step(run, records)
            if records and run.job.judged and run.state.step < run.end_step and has_tile_losses(run):
                watch.await_verdict(run.state.step)
            if records:
                records.after_step(save=result.save)
            if result.stop:
                if records:
                    records.stop(watch.stop)
                return None
            interval.restart_clock()
        if run.end_step == run.total_steps:
            finish_phase(run, records)
        elif records:
            records.stop(f"epoch {run.job.epochs} ends it for now", asked=False)
    return None


def train_step(run: PhaseRun, taken: StepInput, watch: StopWatch) -> StepResult:
    """One step, unless it is known to have no finite loss."""
    if taken.step + 1 in run.start.avoid:
        return avoid(run, taken.step)
    return optimize(run, taken.step, taken.batches, save=watch.save, stop=bool(watch.stop))


def ended_epochs(run: PhaseRun) -> range:
    """Epochs (from 1) that the step just done completed; may be several, or none."""
    step, size, rows = run.state.step, run.plan.global_batch, run.plan.num_samples
    return range((step - 1) * size // rows + 1, min(step * size // rows, run.phase.epochs) + 1)


def finish_step(run: PhaseRun, records: PhaseRecords | None) -> None:
    """What follows an update: validation, checkpoint, samples, in this order: no picture can cost a checkpoint."""
    ended = ended_epochs(run)
    if records and snapshot_is_due(run.state.step, run.total_steps, run.config.ema.snapshots):
        records.save_snapshot()
    if not ended:
        if run.state.step % run.config.monitoring.val_check_interval == 0:
            validation = validate(run)
            if records:
                records.validation(validation)
        return
    every_average = run.config.monitoring.val_averages == "all"
    found = validate_averages(run) if every_average else {run.state.average_name: validate(run)}
    if not records:
        return
    best = records.validation(found[run.state.average_name], epoch_end=True)
    if every_average:
        records.averages(found, ended[-1])
    last = run.phase.epochs in ended
    kept = [epoch for epoch in ended if epoch in run.phase.save_epochs]
    if kept or best or last:
        records.save("epoch" if kept else "best" if best else "last", epoch=(kept or list(ended))[-1])
    every = run.config.monitoring.sample_every_n_epochs
    if run.config.monitoring.plot_samples and (last or any(epoch % every == 0 for epoch in ended)):
        records.draw("samples", lambda: draw_samples(run, records.events, ended[-1]))


def measure_untrained(run: PhaseRun, records: PhaseRecords | None) -> None:
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
    if records:
        if fresh:
            records.progress.metrics["untrained_loss"] = loss
        records.progress.baseline_val_loss = validation.loss
        records.validation(validation)


def finish_phase(run: PhaseRun, records: PhaseRecords | None) -> None:
    """After the last step: how good is each average, and does the network use its hints, all together and each alone?
    Then the phase is finished."""
    if len(run.state.averages) > 1:
        found = validate_averages(run)
        if records:
            records.progress.metrics |= {f"val_loss/{name}": one.loss for name, one in found.items()}
    if run.hints:
        metrics = hint_metrics(run, run.hints)
        for name in run.hints if len(run.hints) > 1 else ():
            metrics |= {f"{key}/{name}": value for key, value in hint_metrics(run, (name,)).items()}
        if records:
            records.progress.metrics.update(metrics)
    if records:
        records.finish()
    if run.world_size > 1:
        torch.distributed.barrier()
    ray.train.report({"phase": run.phase.name, "step": run.state.step})


def hint_metrics(run: PhaseRun, hints: tuple[str, ...]) -> dict[str, float]:
    """Validation losses with these hints alone, right and shuffled among the tiles, and what the right ones gain; all
    ranks call it."""
    right, shuffled = validate(run, hints=hints), validate(run, hints=hints, shuffled=True)
    gain, error = paired_gain(right, shuffled)
    return {
        "val_loss_right_hints": right.loss,
        "val_loss_shuffled_hints": shuffled.loss,
        "hint_gain": gain,
        "hint_gain_standard_error": error,
    }


@dataclass
class Interval:
    """Steps since the last report, which `records`, on rank 0, gets. Every checkpoint ends one, so that a run which
    goes on from there has each step in exactly one record."""

    run: PhaseRun
    records: PhaseRecords | None
    results: list[StepResult] = field(default_factory=list)
    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    peak: float | None = None

    def __post_init__(self):
        if self.records:
            self.records.before_save = self.report

    def next(self, inputs: Iterator[StepInput]) -> StepInput:
        """The next step's input."""
        with self.run.clock.part("data_wait"):
            return next(inputs)

    def add(self, result: StepResult) -> None:
        self.results.append(result)
        self.seconds += time.perf_counter() - self.since
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what was spent on validation and pictures; logging and saving have clocks of their own."""
        self.since = time.perf_counter()

    def report(self) -> None:
        """Mean loss and gradient norm over the steps of this interval that changed something, and for each that was
        computed its pace and where the time went; nothing where there was no step."""
        run, records, count = self.run, self.records, len(self.results)
        if not count:
            return
        done = [result for result in self.results if not result.skipped]
        computed = sum(not result.avoided for result in self.results) or math.nan
        seconds = {name: part / computed for name, part in run.clock.take().items()}
        step_seconds = max(self.seconds, 1e-9) / computed + seconds["logging"] + seconds["saving"]
        if records:
            step = run.state.step
            records.events.emit(
                StepEvent(
                    phase=run.phase.name,
                    step=step,
                    position=step * run.plan.global_batch,
                    epoch=records.epoch(),
                    loss=_mean([result.loss for result in done]),
                    lr=learning_rate(run.config.optimizer, step - 1, run.total_steps, run.phase.lr),
                    grad_norm=_mean([result.grad_norm for result in done]),
                    samples_per_second=run.plan.global_batch / step_seconds,
                    data_wait_seconds=seconds["data_wait"],
                    skipped=count - len(done),
                    step_seconds=step_seconds,
                    compute_seconds=seconds["compute"],
                    optimizer_seconds=seconds["optimizer"],
                    ema_seconds=seconds["ema"],
                    logging_seconds=seconds["logging"],
                    saving_seconds=seconds["saving"],
                    utilisation=self._utilisation(step_seconds),
                    memory_bytes=peak_memory(run.device),
                )
            )
            records.note_step()
        self.results, self.seconds = [], 0.0

    def _utilisation(self, step_seconds: float) -> float:
        """Of one device by the network's own operations."""
        run = self.run
        if self.peak is None:  # measured now, where it must be: the other ranks wait for this one
            self.peak = peak_flops(run.device, precision(run.config, run.device.type))
        return run.job.sample_flops * run.plan.global_batch / run.world_size / step_seconds / self.peak


def _mean(values: Sequence[float]) -> float:
    """nan where there is none."""
    return math.fsum(values) / len(values) if values else math.nan
