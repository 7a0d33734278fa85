"""What Ray Tune asks while a sweep runs: which trial comes next, and which one is given up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
from ray.actor import ActorHandle
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_pipeline.config import Config
from ray_pipeline.sweep_records import SweepRecord, TrialRecord
from ray_pipeline.sweep_space import DECAY, Point, point, space_of
from ray_pipeline.training.trial import EPOCH


class TrialSearch(Searcher):
    """Gives Tune its trials: those that `next_trial` has left from an earlier start, then points of the space, drawn by
    `inner` where there is one. ended: no more of them."""

    def __init__(
        self,
        config: Config,
        next_trial: Callable[[Callable[[int], Point]], TrialRecord | None],
        inner: Searcher | None,
    ):
        super().__init__(metric=config.sweep.metric, mode="min")
        self.config, self.next_trial, self.inner, self.ended = config, next_trial, inner, False
        self._drawn: set[str] = set()

    def suggest(self, trial_id: str) -> dict | str | None:
        trial = None if self.ended else self.next_trial(partial(self._draw, trial_id))
        if trial is None:
            return Searcher.FINISHED
        return {"number": trial.number, "name": trial.name, "values": trial.values}

    def _draw(self, trial_id: str, number: int) -> Point:
        if self.inner is None:
            return point(self.config, number)
        self._drawn.add(trial_id)
        return {key.replace("/", "."): value for key, value in self.inner.suggest(trial_id).items()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self._drawn:  # others it has not drawn
            self.inner.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: sweep.json is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a resume is a new search over what is left."""


class OrderlyHalving(AsyncHyperBandScheduler):
    """ASHA (Li et al. 2020) that asks a trial to stop and lets it end by itself.

    earlier: by number of a trial that ended before this start, its results as Tune is told of them, which count too.
    """

    def __init__(self, notes: ActorHandle, earlier: Mapping[int, Sequence[dict]], **settings: Any):
        super().__init__(time_attr=EPOCH, **settings)
        self._notes, self._earlier, self._asked = notes, earlier, set()

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """By Tune, before the first trial."""
        taken = super().set_search_properties(metric, mode, **spec)
        for number, results in self._earlier.items():
            trial = SimpleNamespace(trial_id=f"earlier_{number}")
            self.on_trial_add(None, trial)
            for result in results:
                super().on_trial_result(None, trial, result)
        return taken

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        if trial.trial_id in self._asked:
            return TrialScheduler.CONTINUE
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._asked.add(trial.trial_id)
            ray.get(self._notes.stop.remote(trial.config["number"], "the scheduler"))
        return TrialScheduler.CONTINUE


def scheduler(config: Config, record: SweepRecord, notes: ActorHandle) -> TrialScheduler:
    """As asked for; `notes` is told of a trial that is to stop."""
    sweep = config.sweep
    if sweep.scheduler == "fifo":
        return FIFOScheduler()
    return OrderlyHalving(
        notes,
        {
            trial.number: [{EPOCH: result.epoch, sweep.metric: record.told_loss(result)} for result in trial.results]
            for trial in _ended(record)
        },
        max_t=sweep.epochs,
        grace_period=min(sweep.grace_epochs, sweep.epochs),
        reduction_factor=sweep.reduction_factor,
    )


def optuna_search(config: Config, record: SweepRecord) -> Searcher | None:
    """Where it is asked for; it knows the trials that ended before."""
    if config.sweep.search != "optuna":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    kinds = {"uniform": ray.tune.uniform, "log_uniform": ray.tune.loguniform}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for key, dimension in space_of(config).items():
        if key == DECAY:
            continue
        if dimension.values is not None:
            space[key] = ray.tune.choice(list(dimension.values))
        else:
            name = "uniform" if dimension.uniform else "log_uniform"
            space[key] = kinds[name](*dimension.bounds)
    converted = OptunaSearch.convert_search_space(space)
    seed = config.seed + len(record.trials)
    search = OptunaSearch(space=converted, metric=config.sweep.metric, mode="min", seed=seed)
    for trial in _ended(record):
        search.add_evaluated_point(dict(trial.values), record.told_loss(trial.results[-1]))
    return search


def _ended(record: SweepRecord) -> list[TrialRecord]:
    """Trials with results that count."""
    return [trial for trial in record.trials if trial.status in ("finished", "stopped")]
