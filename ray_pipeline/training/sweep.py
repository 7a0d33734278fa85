"""The sweep: trials by Ray Tune, each a TorchTrainer on the same phase code.

What was tried stands in sweep.json, which a resume reads; of Tune's own records none is read, and they lie in a
temporary folder.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ray
import ray.tune
from ray.tune.progress_reporter import TrialProgressCallback

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import Config
from ray_pipeline.config_changes import differences
from ray_pipeline.config_kinds import Kind, rule_of
from ray_pipeline.errors import RunStopped, UserError
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import SweepEvent
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.phase_state import utc_now
from ray_pipeline.monitoring.sinks import chosen_sinks
from ray_pipeline.run_copy import refresh, run_path
from ray_pipeline.storage import Folder
from ray_pipeline.sweep_records import FOLDER, EpochResult, SweepRecord, TrialRecord, read_sweep, sweep_folder
from ray_pipeline.sweep_space import Point, count, phase_index
from ray_pipeline.training.board import open_notes
from ray_pipeline.training.launch import check_resources
from ray_pipeline.training.placement import groups_that_fit
from ray_pipeline.training.stopping import SIGNAL_NAMES, signals_into
from ray_pipeline.training.trial import (
    EPOCH,
    SweepJob,
    epoch_results,
    run_trial,
    searched_averages,
    trial_folder,
    trial_store,
)
from ray_pipeline.training.trial_search import TrialSearch, optuna_search, scheduler

#: a trial's own process is light, and beside the workers' CPUs there may be none left for it
_TRIAL_RESOURCES = {"cpu": 0, "node:__internal_head__": 0.001}
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that was asked to stop may have no result yet
}
_OPEN = ("running", "interrupted", "failed")  # what a resume goes on with


def run_sweep(config: Config, job: SweepJob, say: Callable[[str], None]) -> SweepRecord:
    """Train all trials that are not done yet, on the Ray that is running; a failed one does not end the others.

    SIGINT and SIGTERM ask every trial to commit and to return; RunStopped then. UserError: the sweep has begun with
    other settings, or no trial came to an end.
    """
    check_resources(config)
    folder = sweep_folder(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = _opened(config, read_sweep(config.output_dir), folder)
    waiting = [trial for trial in record.trials if trial.status in _OPEN]
    if waiting or len(record.trials) < count(config):
        at_once = trials_at_once(config)
        done = len(record.trials) - len(waiting)
        say(f"sweep     {count(config)} trials of {config.sweep.epochs} epoch(s), {done} done, {at_once} at once")
        _Driver(config, job, record, folder, say).drive(at_once)
    finished = [trial for trial in record.trials if trial.status in ("finished", "stopped")]
    if not finished:
        failure = next((trial for trial in record.trials if trial.status == "failed"), None)
        words = f"; {failure.name} ({failure.in_words}): {failure.message}" if failure else ""
        raise UserError(f"no trial of the sweep in {folder} came to an end{words}; mend it and go on with --resume")
    return record


def _opened(config: Config, record: SweepRecord | None, folder: Path) -> SweepRecord:
    """The record to go on with. A sweep keeps the settings that it was begun with."""
    if record is None:
        Folder(config.checkpoint_store).child(FOLDER).delete()  # of a sweep whose records were taken away
        return SweepRecord(base=config.dump(), averages=searched_averages(config))
    before = Config.model_validate(record.base)
    changed = [str(found) for found in differences(before, config) if found.is_list or _decides(found.key)]
    if changed:
        raise UserError(
            f"the sweep in {folder} was begun with other settings ({'; '.join(changed)}), so its trials could not be "
            "compared with new ones; put them back, or take the folder away to search anew"
        )
    return record


def _decides(key: str) -> bool:
    """Whether a change of this key makes trials other trials."""
    if key.startswith("sweep."):
        more = ("enabled", "num_trials", "max_concurrent_trials", "keep_trials")
        return key.removeprefix("sweep.") not in more
    return rule_of(key).kind is not Kind.HARMLESS


def trials_at_once(config: Config) -> int:
    """Trials at a time."""
    asked, room = config.sweep.max_concurrent_trials, groups_that_fit(config)
    if asked != "auto" and asked > room:
        raise UserError(
            f"sweep.max_concurrent_trials={asked}, but this Ray has room for {room} trial(s) with "
            f"ray.num_workers={config.ray.max_workers} at once; lower it, or use auto"
        )
    return min(count(config), room if asked == "auto" else asked)


class _Driver:
    """The driver while its trials train: Tune's `fit` in a thread, signals in this one."""

    def __init__(self, config: Config, job: SweepJob, record: SweepRecord, folder: Path, say: Callable[[str], None]):
        self.config, self.job, self.record, self.folder, self.say = config, job, record, folder, say
        self.notes = open_notes()
        sinks = [name for name in chosen_sinks(config.monitoring) if name != "tensorboard"]  # it gets a page of its own
        self.events = EventLog(run_path(config.output_dir), FOLDER, sinks, config=config.dump())
        told = read_events(run_path(config.output_dir), FOLDER)  # a trial that is gone on with tells its epochs again
        self.told = {(event["trial"], event["epoch"], event["status"]) for event in told if event["event"] == "sweep"}
        self.trials = {trial.number: trial for trial in record.trials}
        self.search = TrialSearch(config, self.next_trial, optuna_search(config, record))
        self.phase = config.phases[phase_index(config)].name

    def __getstate__(self) -> dict:
        """Nothing: Tune pickles whatever its callbacks know, for a restore that never comes."""
        return {}

    def drive(self, at_once: int) -> None:
        """Until every trial has ended."""
        events: SimpleQueue[int | BaseException | None] = SimpleQueue()
        with self.events, tempfile.TemporaryDirectory() as scratch, _environment(), signals_into(events):
            fit = threading.Thread(target=self._fit, args=(scratch, at_once, events), daemon=True, name="tune-fit")
            fit.start()
            stopped_by, deadline = None, math.inf
            while True:
                try:
                    event = events.get(timeout=min(3600.0, max(0, deadline - time.monotonic())))
                except Empty:
                    if time.monotonic() < deadline:
                        continue
                    break
                if not isinstance(event, int):
                    if event is not None and stopped_by is None:
                        raise event
                    break
                if stopped_by is not None:
                    break
                stopped_by, deadline = event, time.monotonic() + self.config.ray.stop_timeout_seconds
                self.search.ended = True
                self.notes.stop_everyone.remote(SIGNAL_NAMES[event])
                print("\nstopping: the trials are asked to commit, again to stop at once", file=sys.stderr, flush=True)
        if stopped_by is not None:
            words = "" if not fit.is_alive() else " before all trials had committed"
            raise RunStopped(f"stopped by {SIGNAL_NAMES[stopped_by]}{words}; go on with --resume", 128 + stopped_by)

    def _fit(self, scratch: str, at_once: int, events: SimpleQueue) -> None:
        try:
            ray.tune.Tuner(
                ray.tune.with_resources(partial(run_trial, sweep=self.job, notes=self.notes), _TRIAL_RESOURCES),
                tune_config=ray.tune.TuneConfig(
                    metric=self.config.sweep.metric,
                    mode="min",
                    num_samples=-1,
                    max_concurrent_trials=at_once,
                    search_alg=self.search,
                    scheduler=scheduler(self.config, self.record, self.notes),
                ),
                run_config=ray.tune.RunConfig(
                    name="sweep", storage_path=scratch, verbose=0, callbacks=[_Bookkeeping(self), _Silence()]
                ),
            ).fit()
        except BaseException as error:  # whatever it is, `drive` raises it, in the thread that waits
            events.put(error)
        else:
            events.put(None)

    def next_trial(self, draw: Callable[[int], Point]) -> TrialRecord | None:
        """The next one to train: what is left of an earlier start first."""
        left = [trial for trial in self.record.trials if trial.status in _OPEN and trial.number in self.trials]
        if left:
            trial = left[0]
            trial.status, trial.message = "running", ""
        elif len(self.record.trials) < count(self.config):
            number = len(self.record.trials)
            trial = TrialRecord(number=number, values=draw(number), began=utc_now())
            self.record.trials.append(trial)
        else:
            return None
        self.trials.pop(trial.number, None)
        self.record.save(self.folder)
        return trial

    def note(self, number: int) -> TrialRecord:
        """Take over what a trial has recorded."""
        trial = self.record.trials[number]
        refresh(self.config.output_dir)
        folder = trial_folder(self.config, trial.name)
        trial.results = epoch_results(folder, self.phase, self.job.epochs_before)
        self.record.save(self.folder)
        return trial

    def tell(self, number: int, epoch: int, loss: float) -> None:
        """After an epoch."""
        trial = self.note(number)
        words = f"{trial.name} ({trial.in_words}): epoch {epoch}, validation loss {loss:.4f}"
        self._emit(trial, next(result for result in trial.results if result.epoch == epoch), "epoch", words)
        self.say(f"sweep     {words}")

    def conclude(self, number: int) -> None:
        """After a trial returned."""
        trial, asked = self.note(number), ray.get(self.notes.asked.remote(number))
        trial.ended, last = utc_now(), trial.results[-1] if trial.results else None
        committed = CheckpointStore(trial_store(self.config, trial.name)).checkpoints(self.phase)
        whole = last and last.epoch >= self.config.sweep.epochs and committed
        if whole and committed[-1].state["step"] == last.step:
            trial.status = "finished"
        elif self.search.ended:
            trial.status = "interrupted"
        elif asked and last:
            trial.status, trial.message = "stopped", f"given up after epoch {last.epoch}"
        else:
            trial.status, trial.message = "failed", "it returned without the results and the checkpoint of its end"
        self.record.save(self.folder)
        words = f"{trial.name}: {trial.message or trial.status}"
        self._emit(trial, last, trial.status, words)
        if trial.status != "finished":
            self.say(f"sweep     {words}")

    def fail(self, number: int) -> None:
        """After a trial raised, or its process was lost."""
        trial = self.note(number)
        trial.status, trial.ended = "failed", utc_now()
        trial.message = ray.get(self.notes.failure.remote(number))
        self.record.save(self.folder)
        words = f"{trial.name} ({trial.in_words}) failed: {trial.message.strip().splitlines()[-1]}"
        self._emit(trial, trial.results[-1] if trial.results else None, "failed", words)
        self.say(f"sweep     {words}")

    def _emit(self, trial: TrialRecord, result: EpochResult | None, status: str, words: str) -> None:
        step, epoch = (result.step, result.epoch) if result else (0, 0)
        if (trial.number, epoch, status) not in self.told:
            self.told.add((trial.number, epoch, status))
            loss = self.record.loss(result) if result else math.nan
            self.events.emit(SweepEvent(FOLDER, step, trial.number, epoch, loss, status, words))


class _Bookkeeping(ray.tune.Callback):
    """In the driver, after each result and each end of a trial."""

    def __init__(self, driver: _Driver):
        self.driver = driver

    def on_trial_result(self, iteration: int, trials: Sequence, trial, result: dict, **_: Any) -> None:
        self.driver.tell(trial.config["number"], result[EPOCH], result[self.driver.config.sweep.metric])

    def on_trial_complete(self, iteration: int, trials: Sequence, trial, **_: Any) -> None:
        self.driver.conclude(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: Sequence, trial, **_: Any) -> None:
        self.driver.fail(trial.config["number"])


class _Silence(TrialProgressCallback):
    """In the place of Tune's own, which tells of a trial that ended without a new result, however low `verbose` is."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        pass


@contextmanager
def _environment() -> Iterator[None]:
    """Tune quiet, and without files of its own; whoever set a variable keeps it."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ |= added
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
        for name in added:
            del os.environ[name]
