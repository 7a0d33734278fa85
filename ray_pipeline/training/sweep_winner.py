"""What a sweep found: its candidates at one position, the winner with its ties, and how the run goes on from it."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_pipeline.checkpoints import Checkpoint, CheckpointStore
from ray_pipeline.config import Config
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import header_in
from ray_pipeline.monitoring.metrics_file import copy_records
from ray_pipeline.monitoring.sweep_chart import plot_sweep
from ray_pipeline.monitoring.sweep_log import log_trials
from ray_pipeline.retention import checkpoint_name
from ray_pipeline.run_copy import run_path
from ray_pipeline.storage import Folder, replace_file
from ray_pipeline.sweep_records import (
    FOLDER,
    Candidate,
    EpochResult,
    SweepRecord,
    TrialRecord,
    Winner,
    sweep_folder,
)
from ray_pipeline.sweep_space import DECAY, PHASE, continues, decays, phase_index
from ray_pipeline.training.ema import average_group
from ray_pipeline.training.snapshots import snapshots_folder
from ray_pipeline.training.trial import searched_averages, trial_dir, trial_folder, trial_store
from ray_pipeline.training.validation import read_tile_losses, standard_error

WINNER = "winner"


@dataclass(frozen=True)
class _Judged:
    """A candidate with its losses (tiles,), by which two are compared."""

    candidate: Candidate
    losses: np.ndarray


def compare(config: Config, record: SweepRecord) -> list[Candidate]:
    """Every average of every trial that came to the last epoch, those that a trial is judged by, best first, with their
    differences to the best: equal tiles, noise levels and noise, so that the differences are paired."""
    judged = []
    for trial, result in _whole(config, record):
        _, stored = read_tile_losses(trial_folder(config, trial.name), _phase(config), result.step)
        for track in searched_averages(config):
            losses = stored[track].mean(axis=1)
            found = Candidate(
                trial=trial.number, track=track, loss=float(losses.mean()), standard_error=standard_error(losses)
            )
            judged.append(_Judged(found, losses))
    # before ema.start_step all averages are copies of the weights: equal ones say nothing against the one configured
    configured = average_group(config.ema.decay)
    judged.sort(
        key=lambda one: (
            not math.isfinite(one.candidate.loss),
            one.candidate.loss,
            one.candidate.trial,
            one.candidate.track != configured,
        )
    )
    for one in judged[1:]:
        _pair(one, judged[0])
    return [one.candidate for one in judged]


def _pair(one: _Judged, best: _Judged) -> None:
    difference = one.losses - best.losses
    one.candidate.difference = float(difference.mean())
    one.candidate.paired_standard_error = standard_error(difference)
    # a single tile has no standard error, so nothing can be told apart
    apart = one.candidate.difference > one.candidate.paired_standard_error
    one.candidate.tie = math.isfinite(one.candidate.loss) and not apart


def choose(config: Config, record: SweepRecord, candidates: list[Candidate]) -> Winner:
    """The best candidate, with what it sets in the config of what follows. UserError when every trial diverged."""
    best = candidates[0] if candidates else None
    if best is None or not math.isfinite(best.loss):
        raise UserError(
            f"every trial of the sweep in {sweep_folder(config.output_dir)} diverged, or none came to epoch "
            f"{config.sweep.epochs}; choose other values for sweep.space and take the folder away"
        )
    trial = record.trials[best.trial]
    result = trial.results[-1]
    index = phase_index(config)
    overrides: dict[str, Any] = {key.replace(PHASE, f"phases.{index}."): value for key, value in trial.values.items()}
    found = decays(config)
    if found:
        decay = next(decay for decay in found if average_group(decay) == best.track)
        rest = [other for other in (*found, config.ema.decay, *config.ema.more_decays) if other != decay]
        overrides |= {DECAY: decay, "ema.more_decays": list(dict.fromkeys(rest))}
    if continues(config):
        overrides[f"phases.{index + 1}.init"] = _sweep_store(config).path(WINNER)
    return Winner(
        trial=best.trial,
        overrides=overrides,
        track=None if best.track == "weights" else best.track,
        checkpoint=_adopted_path(config, result),
        phase=_phase(config),
        epoch=result.epoch,
        step=result.step,
        position=result.position,
        loss=best.loss,
        standard_error=best.standard_error,
        runner_up=candidates[1] if len(candidates) > 1 else None,
        ties=[candidate for candidate in candidates[1:] if candidate.tie],
    )


def adopt(config: Config, trial: TrialRecord, winner: Winner) -> bool:
    """Give the run what the winning trial has learnt; False where it has it already. config: the run's, with the
    winner's overrides.

    The phase that trials were the first epochs of gets its checkpoints, records and stored averages, and goes on from
    there; one that follows a phase which trials continued begins from it.
    """
    store = _sweep_store(config) if continues(config) else CheckpointStore(config.checkpoint_store)
    held = store.checkpoints(winner.phase)
    if held and held[-1].state["step"] >= winner.step:
        return False
    last = _trial_checkpoint(config, trial)
    if continues(config):
        store.save(WINNER, last, *_adopted(config, last, winner, trial.results[-1]))
        return True
    copy_records(trial_folder(config, trial.name), run_path(config.output_dir), winner.phase, winner.step)
    _copy_snapshots(config, trial, winner.phase)
    store.begin(winner.phase, last.state["world_size"]).update(start_step=0)
    results = {result.step: result for result in trial.results}
    for checkpoint in CheckpointStore(trial_store(config, trial.name)).checkpoints(winner.phase):
        result = results.get(checkpoint.state["step"])
        if result is not None:  # else it was saved in mid-epoch; the winner's own comes last
            name = checkpoint_name(winner.phase, result.step, result.epoch)
            store.save(name, checkpoint, *_adopted(config, checkpoint, winner, result))
    return True


def _adopted(
    config: Config, source: Checkpoint, winner: Winner, result: EpochResult
) -> tuple[dict[str, Any], dict[str, str]]:
    """State and metadata of a trial's checkpoint as one of the run's, judged by the average that won."""
    weights = header_in(source.state, source.folder).model_copy(update={"ema": winner.track})
    loss = result.losses[winner.track or "weights"]
    state = {key: value for key, value in source.state.items() if key != "attempt"}
    state |= {
        "val_loss": loss,
        "weights": weights.model_dump(mode="json"),
        "config": config.dump(),
        "metrics": state["metrics"] | {"val_loss": loss},
    }
    return state, weights.metadata()


def discard_trials(config: Config, record: SweepRecord) -> None:
    """Delete the checkpoints and stored averages of the trials, the winner's too, which was adopted; records stay."""
    for trial in record.trials:
        Folder(trial_store(config, trial.name)).delete()
        snapshots_folder(trial_dir(config, trial.name)).delete()


def write_results(config: Config, record: SweepRecord, candidates: list[Candidate]) -> None:
    """results.csv, sweep.png, and the trials in TensorBoard."""
    folder, keys = sweep_folder(config.output_dir), list(dict.fromkeys(k for t in record.trials for k in t.values))
    names = ["trial", "status", *keys, "average", "epoch", "step", "position", "val_loss", "standard_error", "best"]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(names + ["difference", "paired_standard_error", "tie", "message"])
    at_end = {(candidate.trial, candidate.track): candidate for candidate in candidates}
    for trial in record.trials:
        values = [trial.number, trial.status, *(json.dumps(trial.values[key]) for key in keys)]
        if not trial.results:
            writer.writerow([*values, "", "", "", "", "", "", "", "", "", "", trial.message])
        for result in trial.results:
            for track, loss in result.losses.items():
                last = at_end.get((trial.number, track)) if result is trial.results[-1] else None
                best = bool(candidates) and last is candidates[0]
                paired = ["", "", ""] if last is None else [last.difference, last.paired_standard_error, last.tie]
                writer.writerow(
                    [*values, track, result.epoch, result.step, result.position, loss, result.standard_errors[track],
                     best, *paired, trial.message]
                )  # fmt: skip
    replace_file(folder / "results.csv", buffer.getvalue().encode())
    by_average = {average_group(decay): decay for decay in decays(config)}
    title = f"sweep of {_phase(config)}: {len(record.trials)} trials"
    plot_sweep(record, candidates, by_average, folder / "sweep.png", title=title)
    if config.monitoring.tensorboard:
        log_trials(run_path(config.output_dir), record)


def table(config: Config, record: SweepRecord, candidates: list[Candidate]) -> list[str]:
    """The candidates as lines of text, best first; then trials that did not come to the end."""
    lines = [f"{'':2} {'trial':>5}  {'values':<44} {'average':<20} {'val loss':>9}  {'to the best':<20}"]
    for number, found in enumerate(candidates):
        words = record.trials[found.trial].in_words
        paired = f"+{found.difference:.4f} +- {found.paired_standard_error:.4f}{' tie' if found.tie else ''}"
        mark = "*" if number == 0 else ""
        lines.append(
            f"{mark:2} {found.trial:>5}  {words:<44} {found.track:<20} {found.loss:>9.4f}  {paired if number else ''}"
        )
    for trial in record.trials:
        if trial.number not in {found.trial for found in candidates}:
            why = trial.message.strip().splitlines()[-1:]
            lines.append(": ".join([f"   {trial.number:>5}  {trial.in_words:<44} {trial.status}", *why]))
    return [line.rstrip() for line in lines]


def _adopted_path(config: Config, result: EpochResult) -> str:
    """Where `adopt` puts the winner's checkpoint."""
    if continues(config):
        return _sweep_store(config).path(WINNER)
    return CheckpointStore(config.checkpoint_store).path(checkpoint_name(_phase(config), result.step, result.epoch))


def _whole(config: Config, record: SweepRecord) -> list[tuple[TrialRecord, Any]]:
    finished = [trial for trial in record.trials if trial.status == "finished"]
    return [(trial, trial.results[-1]) for trial in finished if trial.results[-1].epoch >= config.sweep.epochs]


def _trial_checkpoint(config: Config, trial: TrialRecord) -> Checkpoint:
    store = trial_store(config, trial.name)
    checkpoint = CheckpointStore(store).latest(_phase(config))
    if checkpoint is None or checkpoint.state["step"] != trial.results[-1].step:
        raise UserError(
            f"{store} holds no whole checkpoint of step {trial.results[-1].step}, where {trial.name} "
            f"won the sweep; take {sweep_folder(config.output_dir)} away to search anew"
        )
    return checkpoint


def _copy_snapshots(config: Config, trial: TrialRecord, phase: str) -> None:
    """What `ray-pipeline ema` makes other averages from."""
    source = CheckpointStore(snapshots_folder(trial_dir(config, trial.name), phase))
    target = CheckpointStore(snapshots_folder(config.output_dir, phase))
    for name in target.names(phase):
        target.delete(name)
    for checkpoint in source.checkpoints(phase):
        metadata = header_in(checkpoint.state, checkpoint.folder).metadata()
        target.save(checkpoint.name, checkpoint, checkpoint.state, metadata)


def _sweep_store(config: Config) -> CheckpointStore:
    return CheckpointStore(Folder(config.checkpoint_store).child(FOLDER))


def _phase(config: Config) -> str:
    return config.phases[phase_index(config)].name
