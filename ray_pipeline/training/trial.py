"""One trial of a sweep: the same phase code on a run directory of its own, called by Ray Tune.

A trial is told to stop by the sweep's Notes and ends by returning: Tune's own early stop kills the trial's process, and
its workers then keep their place in the cluster for good where there is no dashboard.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.actor import ActorHandle

from ray_pipeline.checkpoints import Checkpoint, CheckpointStore, open_checkpoint
from ray_pipeline.config import Config, parse_config
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.phase_state import utc_now
from ray_pipeline.ray_session import limited_data
from ray_pipeline.run_copy import run_path, working_copy
from ray_pipeline.run_state import CONFIG_FILE
from ray_pipeline.storage import Folder, replace_file
from ray_pipeline.sweep_records import FOLDER, EpochResult, SweepRecord, sweep_folder
from ray_pipeline.sweep_space import Point, continues, decays, phase_index, with_values
from ray_pipeline.training.board import open_board
from ray_pipeline.training.ema import average_group
from ray_pipeline.training.launch import run_phase
from ray_pipeline.training.setup import PhaseJob
from ray_pipeline.training.validation import read_tile_losses, tile_losses_steps

_POLL_SECONDS = 0.5
#: told to Tune with the loss of an epoch
EPOCH = "epoch"


@dataclass(frozen=True)
class SweepJob:
    """What all trials share. base: the run's config, as plain values; latents: their store; init: the checkpoint that
    they begin from, or, where they continue a finished phase, that they go on from; epochs: that this one has behind
    it; sample_flops: of one trained sample."""

    base: dict
    latents: str
    init: str
    epochs_before: int
    sample_flops: float

    @property
    def config(self) -> Config:
        return parse_config(self.base, "the sweep's config")


def trial_folder(base: Config, name: str) -> Path:
    """The run directory of a trial, on this machine."""
    return sweep_folder(base.output_dir) / name


def trial_dir(base: Config, name: str) -> str:
    """Its output_dir: path or URI."""
    return Folder(base.output_dir).child(FOLDER, name).location


def trial_store(base: Config, name: str) -> str:
    """Where its checkpoints lie: path or URI."""
    if base.checkpoint.store is None:
        return Folder(trial_dir(base, name)).child("checkpoints").location
    return Folder(base.checkpoint.store).child(FOLDER).child(name).location


def trial_config(base: Config, name: str, values: Point) -> Config:
    """The config of a trial: these values, all candidates for ema.decay, and a run directory of its own."""
    index, sweep = phase_index(base), base.sweep
    phase = base.phases[index]
    epochs = phase.epochs + (sweep.epochs if continues(base) else 0)
    candidates = decays(base) or (base.ema.decay,)
    followed = [decay for decay in (base.ema.decay, *base.ema.more_decays) if decay not in candidates]
    own = {
        "output_dir": trial_dir(base, name),
        "checkpoint": base.checkpoint.model_dump(mode="json") | {"store": trial_store(base, name)},
        "sweep": {},
        "ema": base.ema.model_dump(mode="json") | {"decay": candidates[0], "more_decays": [*candidates[1:], *followed]},
    }
    config = parse_config(base.dump() | own, f"the sweep's {name}")
    settings = {
        f"phases.{index}.epochs": epochs,
        # those of the winner become the run's
        f"phases.{index}.epochs_to_save": [
            epoch for epoch in phase.save_epochs if epoch <= sweep.epochs and not continues(base)
        ],
        "monitoring.val_averages": "all",
        "monitoring.plot_samples": False,
    }
    keep = config.model_copy(update={"sweep": sweep})  # which phase `phases[].` stands for
    tuned = with_values(keep, settings | values, f"the sweep's {name}")
    return tuned.model_copy(update={"sweep": config.sweep})


def epoch_results(folder: Path, phase: str, epochs_before: int) -> list[EpochResult]:
    """What the trial in `folder` has recorded at the ends of its epochs, counted from its own beginning."""
    steps, found = tile_losses_steps(folder, phase), []
    events = {record["step"]: record for record in read_events(folder, phase, "validation")} if steps else {}
    for step in steps:
        if step not in events:  # of an attempt that went on from before it
            continue
        epoch, stored = read_tile_losses(folder, phase, step)
        losses = {name: array.mean(axis=1) for name, array in stored.items()}
        found.append(
            EpochResult(
                epoch=epoch - epochs_before,
                step=step,
                position=events[step]["position"],
                losses={name: float(values.mean()) for name, values in losses.items()},
                standard_errors={
                    name: float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
                    for name, values in losses.items()
                },
            )
        )
    return [result for result in found if result.epoch > 0]


def searched_averages(config: Config) -> list[str]:
    """Names of the averages that a trial is judged by: the candidates for ema.decay, or that of the config."""
    if not config.ema.enabled:
        return ["weights"]
    return [average_group(decay) for decay in decays(config) or (config.ema.decay,)]


def run_trial(values: dict[str, Any], *, sweep: SweepJob, notes: ActorHandle) -> None:
    """Train one trial and tell Tune of each epoch; `values`: number, name, and the values of the searched keys."""
    number, base = values["number"], sweep.config
    if ray.get(notes.asked.remote(number)):
        return
    try:
        config = trial_config(base, values["name"], values["values"])
        with working_copy(config.output_dir, follow=True):
            _train(config, base, sweep, number, notes)
    except Exception as error:
        ray.get(notes.fail.remote(number, f"{type(error).__name__}: {error}"))
        raise


def _train(config: Config, base: Config, sweep: SweepJob, number: int, notes: ActorHandle) -> None:
    folder, index, more = run_path(config.output_dir), phase_index(base), continues(base)
    phase, judged = config.phases[index].name, SweepRecord(averages=searched_averages(base))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG_FILE, config.to_yaml().encode())
    if more:
        seed_trial(config, open_checkpoint(sweep.init))
    job = PhaseJob(
        config=config.dump(),
        phase=index,
        latents=sweep.latents,
        init=None if more else sweep.init,
        epochs=None if more else base.sweep.epochs,
        judged=base.sweep.scheduler != "fifo",
        sample_flops=sweep.sample_flops,
    )
    board, ended, told, began = open_board(folder.name), [], 0, utc_now()

    def fit() -> None:
        try:
            with limited_data(config.ray):
                run_phase(config, job, board=board, show=False)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="trial-fit")
    thread.start()
    try:
        while True:
            last = not thread.is_alive()
            reason = ray.get(notes.asked.remote(number))
            if reason and not last:
                board.stop.remote(reason)
            # after a trial has been given up, its results would still count against the others
            # and those of an earlier start count once this one has begun from its checkpoint
            news = len(tile_losses_steps(folder, phase)) > told
            counted = news and not reason and (last or _begun(folder, phase, began))
            for result in epoch_results(folder, phase, sweep.epochs_before)[told:] if counted else []:
                told += 1
                ray.tune.report({base.sweep.metric: judged.told_loss(result), EPOCH: result.epoch})
                reason = ray.get(notes.asked.remote(number))
                if reason:
                    board.stop.remote(reason)
                    break
                board.judge.remote(result.step)
            if last:
                break
            thread.join(_POLL_SECONDS)
    finally:
        board.stop.remote("the trial ends")  # a fit that is left behind would keep its workers
        thread.join()
    # one that was asked to stop before it had workers ends with an error
    if ended[0] is not None and not ray.get(notes.asked.remote(number)):
        raise ended[0]


def _begun(folder: Path, phase: str, since: str) -> bool:
    """Whether workers have opened the records of a trial."""
    return any(record["time"] >= since for record in read_events(folder, phase, "phase"))


def seed_trial(config: Config, source: Checkpoint) -> None:
    """Give a trial that continues a finished phase its last checkpoint. An average that was not followed so far begins
    as the one that validation used."""
    store = CheckpointStore(config.checkpoint_store)
    if store.names():
        return
    wanted = [average_group(decay) for decay in (config.ema.decay, *config.ema.more_decays)]
    new = [group for group in wanted if config.ema.enabled and group not in source]
    groups = _Groups(source, {group: group for group in source} | dict.fromkeys(new, source.state["weights"]["ema"]))
    state = {key: value for key, value in source.state.items() if key != "attempt"}
    store.save(source.name, groups, state)


class _Groups(Mapping):
    """Groups of a checkpoint, by names that may be others than its own; each is read when it is asked for."""

    def __init__(self, source: Checkpoint, names: Mapping[str, str]):
        self._source, self._names = source, names

    def __getitem__(self, group: str):
        return self._source[self._names[group]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
