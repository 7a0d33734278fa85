"""Where a run stands: the text of `ray-pipeline status`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import STEP_PARTS
from ray_pipeline.monitoring.metrics_file import MetricsReader
from ray_pipeline.monitoring.pace import time_left
from ray_pipeline.monitoring.progress import format_bytes, format_seconds, format_share
from ray_pipeline.run_copy import reading_copy, run_path
from ray_pipeline.run_state import Run, read_run
from ray_pipeline.storage import Folder
from ray_pipeline.sweep_records import read_sweep, read_winner


def describe_run(run_dir: str | Path) -> str:
    """Phases with progress, losses, checkpoints and time left, as text; UserError when there is no run."""
    with reading_copy(run_dir):
        run = read_run(run_dir)
        return _describe(run, _reader(run))


def _describe(run: Run, reader: MetricsReader) -> str:
    config, state = run.config, run.state
    lines = [f"run  {Folder(config.output_dir).location}"]
    for phase in config.phases:
        progress = state.phases.get(phase.name, phase_state.PhaseProgress())
        lines += ["", f"{phase.name}: {progress.status}"]
        if progress.steps:
            percent = 100 * progress.step // progress.steps
            lines.append(f"  step {progress.step}/{progress.steps} ({percent}%), epoch {progress.epoch}/{phase.epochs}")
        lines += _losses(progress)
        if progress.status == "running":
            lines += _pace(run, reader.events())
        if progress.best:
            lines.append(f"  best {progress.best.checkpoint}, validation loss {progress.best.val_loss:.4f}")
        if progress.last:
            lines.append(f"  checkpoints {', '.join(progress.checkpoints)}")
    lines += _sweep(config.output_dir)
    if state.history:
        lines += ["", "latest events"]
        lines += [f"  {entry.time}  {entry.message}" for entry in state.history[-5:]]
    return "\n".join(lines)


def watch_run(run_dir: str | Path, seconds: float) -> Iterator[str]:
    """`describe_run` every so many seconds, until no phase or sweep can go on by itself: all are finished, or the run
    was stopped or has failed."""
    with reading_copy(run_dir):  # one for all looks: of a run in object storage only what changed is read again
        reader = _reader(read_run(run_dir))
        while True:
            with reading_copy(run_dir):
                run = read_run(run_dir)
                yield _describe(run, reader)
            found = [run.state.phases.get(phase.name, phase_state.PhaseProgress()) for phase in run.config.phases]
            ended = any(progress.status in ("stopped", "failed") for progress in found)
            if ended or all(progress.status == "finished" for progress in found):
                return
            time.sleep(seconds)


def _sweep(output_dir: str) -> list[str]:
    """Trials with their status and newest loss, and what won."""
    record, winner = read_sweep(output_dir), read_winner(output_dir)
    if record is None:
        return []
    lines = ["", f"sweep: {'finished' if winner else 'running or to be gone on with'}"]
    for trial in record.trials:
        last = trial.results[-1] if trial.results else None
        words = f", epoch {last.epoch}, validation loss {record.loss(last):.4f}" if last else ""
        lines.append(f"  {trial.name} {trial.in_words}: {trial.status}{words}")
    if winner:
        ties = f", {len(winner.ties)} tie(s)" if winner.ties else ""
        lines.append(f"  winner trial {winner.trial}: {winner.in_words}, validation loss {winner.loss:.4f}{ties}")
    return lines


def _losses(progress: phase_state.PhaseProgress) -> list[str]:
    metrics, lines = progress.metrics, []
    if "untrained_loss" in metrics:
        lines.append(f"  untrained network on its training tiles {metrics['untrained_loss']:.4f} (1 = normalised)")
    if progress.baseline_val_loss is not None and "val_loss" in metrics:
        start = progress.baseline_val_loss
        ratio = f" (ratio {metrics['val_loss'] / start:.3f})" if start else ""
        lines.append(f"  validation loss {metrics['val_loss']:.4f}, at the start {start:.4f}{ratio}")
    for gain in (name for name in metrics if name.split("/")[0] == "hint_gain"):
        _, alone, hint = gain.partition("/")
        right, shuffled, error = (
            metrics[f"{name}{alone}{hint}"]
            for name in ("val_loss_right_hints", "val_loss_shuffled_hints", "hint_gain_standard_error")
        )
        # 0: a hint that is the same in all tiles; nan: a single tile
        known = math.isfinite(error) and error > 0
        errors = f" = {metrics[gain] / error:.1f} paired standard errors" if known else ""
        lines.append(
            f"  validation loss with {f'{hint} alone, right' if hint else 'the right hints'} {right:.4f}, shuffled "
            f"{shuffled:.4f}: gain {metrics[gain]:.4f}{errors}"
        )
    return lines


def _reader(run: Run) -> MetricsReader:
    return MetricsReader(run_path(run.config.output_dir))


def _pace(run: Run, records: Sequence[dict]) -> list[str]:
    """Throughput, where a step's time goes, and the time left; nothing before the first record."""
    steps = [record for record in records if record["event"] == "step" and record["phase"] == run.state.current_phase]
    if not steps:
        return []
    last, left = steps[-1], time_left(run.state, records, [phase.name for phase in run.config.phases])
    age = time.time() - datetime.fromisoformat(last["time"]).timestamp()
    rate = last["samples_per_second"]
    pace = f"{rate:.3g} samples/s" if math.isfinite(rate) else "steps without a finite loss are passed over"
    lines = [
        f"  {pace}, {format_seconds(left.phase)} left in this phase, "
        f"{format_seconds(left.run)} in all; last record {last['time']}, {format_seconds(age)} ago"
    ]
    parts = {name: last.get(f"{key}_seconds", math.nan) for name, key in STEP_PARTS.items()}
    if math.isfinite(last.get("step_seconds", math.nan)):
        shares = ", ".join(f"{name} {format_share(part / last['step_seconds'])}" for name, part in parts.items())
        lines.append(
            f"  a step takes {format_seconds(last['step_seconds'])}: {shares}; model FLOP utilisation "
            f"{format_share(last['utilisation'])}, memory {format_bytes(last['memory_bytes'])}"
        )
    return lines
