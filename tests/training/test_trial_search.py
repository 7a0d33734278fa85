"""What Tune is given to train: what is left of an earlier start first, then new points, until there are enough."""

from types import SimpleNamespace

import pytest
import ray
from ray.tune.search import Searcher

from ray_pipeline.config import parse_config
from ray_pipeline.sweep_records import EpochResult, SweepRecord, TrialRecord, read_sweep
from ray_pipeline.sweep_space import point
from ray_pipeline.training.sweep import _Driver
from ray_pipeline.training.trial import EPOCH
from ray_pipeline.training.trial_search import optuna_search, scheduler

PHASES = [
    {"name": "phase1_unconditional", "epochs": 2},
    {"name": "phase2_conditional", "epochs": 4, "condition_types": ["canny"]},
]
SPACE = {"model.dropout": {"choice": [0.0, 0.1, 0.2]}, "optimizer.lr": {"log_uniform": [1e-5, 1e-2]}}


@pytest.fixture
def driver(ray_cluster, tmp_path):
    """(record, **sweep settings) -> what runs a sweep, before it trains."""

    def make(record=None, **sweep):
        sweep = {"enabled": True, "space": SPACE, "num_trials": 5, "epochs": 2} | sweep
        config = parse_config({"phases": PHASES, "sweep": sweep, "output_dir": str(tmp_path)})
        record = record or SweepRecord(base=config.dump(), averages=["ema_decay_0.9999"])
        (tmp_path / "sweep").mkdir(exist_ok=True)
        job = SimpleNamespace(epochs_before=0)
        return _Driver(config, job, record, tmp_path / "sweep", print)

    return make


def suggested(driver, count=99):
    found = []
    while len(found) < count and (given := driver.search.suggest(f"id{len(found)}")) != Searcher.FINISHED:
        found.append(given)
    return found


def trial(number, status, loss=1.0, **values):
    result = EpochResult(
        epoch=2, step=6, position=48, losses={"ema_decay_0.9999": loss}, standard_errors={"ema_decay_0.9999": 0.1}
    )
    return TrialRecord(number=number, values=values, status=status, results=[result])


def test_new_trials_are_the_points_of_the_space_and_are_written_down_before_they_begin(driver, tmp_path):
    made = driver()
    for number in range(5):
        given = made.search.suggest(f"id{number}")
        assert given["number"] == number
        assert given["values"] == point(made.config, number)
        assert read_sweep(tmp_path).trials[-1].values == given["values"]
    assert made.search.suggest("more") == Searcher.FINISHED


def test_a_resume_takes_what_is_left_first_and_leaves_alone_what_is_done(driver):
    record = SweepRecord(averages=["ema_decay_0.9999"])
    for number, status in enumerate(("finished", "running", "stopped", "failed", "interrupted")):
        record.trials.append(trial(number, status, **{"model.dropout": 0.0, "optimizer.lr": 10.0**-number}))
    made = driver(record, num_trials=6)
    assert [given["number"] for given in suggested(made)] == [1, 3, 4, 5]
    assert [t.status for t in record.trials] == ["finished", "running", "stopped", "running", "running", "running"]


def test_a_sweep_that_ends_begins_no_more_trials(driver):
    made = driver()
    assert len(suggested(made, 2)) == 2
    made.search.ended = True
    assert suggested(made) == []


def test_optuna_draws_within_the_space_and_is_told_of_earlier_trials(driver):
    """By what came out: after trials that say that small learning rates are good, it draws them more often."""
    record = SweepRecord(averages=["ema_decay_0.9999"])
    for number in range(30):
        lr = 10 ** (-5 + 3 * number / 29)
        values = {"model.dropout": 0.1, "optimizer.lr": lr}
        record.trials.append(trial(number, "finished", loss=1.0 + lr * 1e4, **values))
    made = driver(record, search="optuna", num_trials=50)
    drawn = [given["values"] for given in suggested(made)]
    assert len(drawn) == 20
    assert all(
        values["model.dropout"] in (0.0, 0.1, 0.2) and 1e-5 <= values["optimizer.lr"] <= 1e-2 for values in drawn
    )
    small = sum(values["optimizer.lr"] < 10**-3.5 for values in drawn)  # half of the range of exponents
    assert small > 15
    assert optuna_search(made.config.model_copy(update={"sweep": made.config.sweep.model_copy(
        update={"search": "random"})}), record) is None  # fmt: skip


@pytest.mark.parametrize(("loss", "asked"), [(2.0, "the scheduler"), (0.5, "")])
def test_halving_judges_by_trials_of_an_earlier_start_too(driver, loss, asked):
    """The first trial of a resume, beside three that ended before it, is given up unless it is among the best third."""
    record = SweepRecord(averages=["ema_decay_0.9999"])
    record.trials += [trial(number, "finished", loss=1.0, **{"model.dropout": 0.0}) for number in range(3)]
    made = driver(record, epochs=4, grace_epochs=2)
    halving = scheduler(made.config, record, made.notes)
    assert halving.set_search_properties("val_loss", "min")
    new = SimpleNamespace(trial_id="new", config={"number": 3})
    halving.on_trial_add(None, new)
    halving.on_trial_result(None, new, {EPOCH: 2, "val_loss": loss})
    assert ray.get(made.notes.asked.remote(3)) == asked
