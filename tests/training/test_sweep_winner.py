"""Which trial wins: losses at one position, compared tile by tile; a difference within its error is a tie."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.sweep_records import EpochResult, SweepRecord, TrialRecord
from ray_pipeline.training.sweep_winner import choose, compare, table, write_results
from ray_pipeline.training.trial import searched_averages, trial_config
from ray_pipeline.training.validation import Validation, write_tile_losses

TILES, STEP = 40, 6


@pytest.fixture
def sweep(tmp_path):
    """(losses by trial and average, **statuses) -> config and record of a sweep of 2 epochs."""
    config = parse_config({
        "output_dir": str(tmp_path / "run"),
        "phases": [
            {"name": "phase1_unconditional", "epochs": 2},
            {"name": "phase2_conditional", "epochs": 4, "condition_types": ["canny"]},
        ],
        "sweep": {
            "enabled": True,
            "epochs": 2,
            "space": {"model.dropout": {"grid": [0.0, 0.1, 0.2]}, "ema.decay": {"grid": [0.9, 0.99]}},
        },
    })  # fmt: skip

    def make(losses, statuses=None):
        record = SweepRecord(base=config.dump(), averages=searched_averages(config))
        for number, found in losses.items():
            trial = TrialRecord(number=number, values={"model.dropout": 0.1 * number}, status="finished")
            if statuses and number in statuses:
                trial.status = statuses[number]
            own = trial_config(config, trial.name, trial.values)
            run = SimpleNamespace(config=own, phase=own.phases[1], state=SimpleNamespace(step=STEP))
            validations = {name: Validation(values[:, None], np.ones(1)) for name, values in found.items()}
            write_tile_losses(run, validations, epoch=2)
            means = {name: float(values.mean()) for name, values in found.items()}
            trial.results = [
                EpochResult(
                    epoch=2, step=STEP, position=8 * STEP, losses=means, standard_errors=dict.fromkeys(means, 0.1)
                )
            ]
            record.trials.append(trial)
        return config, record

    return make


def losses_of(*shifts, noise=0.001, seed=0):
    """Losses (tiles,) of two decays and a power-function average: tiles differ much, averages little."""
    rng = np.random.default_rng(seed)
    tiles = np.random.default_rng(99).uniform(0.2, 2, TILES)
    names = ("ema_decay_0.9", "ema_decay_0.99", "ema_power_0.05")
    return {name: tiles + shift + noise * rng.normal(size=TILES) for name, shift in zip(names, shifts, strict=True)}


def test_the_lowest_loss_of_all_trials_and_decays_wins(sweep):
    config, record = sweep(
        {0: losses_of(0.3, 0.2, 0), 1: losses_of(0.15, 0.1, 0, seed=1), 2: losses_of(0.4, 0.5, 0, seed=2)}
    )
    found = compare(config, record)
    assert [(one.trial, one.track) for one in found] == [
        (1, "ema_decay_0.99"), (1, "ema_decay_0.9"), (0, "ema_decay_0.99"), (0, "ema_decay_0.9"), (2, "ema_decay_0.9"),
        (2, "ema_decay_0.99"),
    ]  # fmt: skip
    winner = choose(config, record, found)
    assert (winner.trial, winner.track, winner.position) == (1, "ema_decay_0.99", 8 * STEP)
    assert winner.overrides == {"model.dropout": 0.1, "ema.decay": 0.99, "ema.more_decays": [0.9, 0.9999]}
    assert winner.ties == []
    assert (winner.runner_up.trial, winner.runner_up.track) == (1, "ema_decay_0.9")


def test_differences_are_paired_over_the_tiles(sweep):
    """By SciPy's paired t test: tiles that differ a hundred times as much as the trials do not hide which is better."""
    config, record = sweep({0: losses_of(0.01, 0.5, 0), 1: losses_of(0.0, 0.5, 0, seed=1)})
    best, second = compare(config, record)[:2]
    a, b = (losses_of(0.01, 0.5, 0)["ema_decay_0.9"], losses_of(0.0, 0.5, 0, seed=1)["ema_decay_0.9"])
    assert (best.trial, second.trial) == (1, 0)
    test = stats.ttest_rel(a, b)
    assert second.difference / second.paired_standard_error == pytest.approx(test.statistic, rel=1e-9)
    assert second.paired_standard_error < 0.05 * second.standard_error
    assert not second.tie


@pytest.mark.parametrize(("shift", "tie"), [(0.001, True), (0.02, False)])
def test_a_difference_below_its_paired_standard_error_is_a_tie(sweep, shift, tie):
    """Of losses that differ by 0.05 up and down from tile to tile, so by 0.008 in their mean."""
    one = losses_of(0.0, 0.5, 0)
    other = {name: values + shift + 0.05 * (-1.0) ** np.arange(TILES) for name, values in one.items()}
    config, record = sweep({0: one, 1: other})
    found = compare(config, record)
    expected = stats.ttest_rel(other["ema_decay_0.9"], one["ema_decay_0.9"])
    assert found[1].tie == (abs(expected.statistic) <= 1) == tie
    assert [candidate.trial for candidate in choose(config, record, found).ties] == [1] * tie


def test_averages_that_are_equal_leave_the_decay_as_it_was_configured(sweep):
    """As before ema.start_step, where all are copies of the weights."""
    equal = dict.fromkeys(losses_of(0, 0, 0), losses_of(0, 0, 0)["ema_decay_0.9"])
    config, record = sweep({0: equal})
    config = config.model_copy(update={"ema": config.ema.model_copy(update={"decay": 0.99})})
    winner = choose(config, record, compare(config, record))
    assert winner.overrides["ema.decay"] == 0.99
    assert [one.track for one in winner.ties] == ["ema_decay_0.9"]


def test_only_trials_that_came_to_the_end_are_compared(sweep):
    config, record = sweep(
        {0: losses_of(0.3, 0.3, 0), 1: losses_of(0.0, 0.0, 0), 2: losses_of(0.0, 0.1, 0)}, {1: "stopped", 2: "failed"}
    )
    assert {one.trial for one in compare(config, record)} == {0}
    lines = "\n".join(table(config, record, compare(config, record)))
    assert "stopped" in lines
    assert "failed" in lines


def test_a_trial_that_diverged_never_wins(sweep):
    diverged = {name: np.full(TILES, math.nan) for name in losses_of(0, 0, 0)}
    config, record = sweep({0: diverged, 1: losses_of(5.0, 6.0, 0)})
    winner = choose(config, record, compare(config, record))
    assert (winner.trial, winner.ties) == (1, [])
    config, record = sweep({0: diverged})
    with pytest.raises(UserError, match=r"every trial of the sweep in .* diverged"):
        choose(config, record, compare(config, record))


def test_results_are_written_as_a_table_a_picture_and_for_tensorboard(sweep, tmp_path):
    config, record = sweep({0: losses_of(0.3, 0.2, 0), 1: losses_of(0.15, 0.1, 0, seed=1)})
    record.trials.append(
        TrialRecord(number=2, values={"model.dropout": 0.2}, status="failed", message="out, of memory")
    )
    candidates = compare(config, record)
    write_results(config, record, candidates)
    folder = tmp_path / "run" / "sweep"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 2 * 3 + 1
    best = [row for row in rows if row["best"] == "True"]
    assert [(row["trial"], row["average"]) for row in best] == [("1", "ema_decay_0.99")]
    assert json.loads(best[0]["model.dropout"]) == 0.1
    assert float(best[0]["val_loss"]) == pytest.approx(candidates[0].loss)
    assert rows[-1]["message"] == "out, of memory"
    assert Image.open(folder / "sweep.png").size[0] > 1000
    events = list((tmp_path / "run" / "logs" / "tensorboard" / "sweep").rglob("events.*"))
    assert {path.parent.name for path in events} == {"trial_000", "trial_001"}


def test_without_tensorboard_a_sweep_writes_none(sweep, tmp_path):
    config, record = sweep({0: losses_of(0.3, 0.2, 0)})
    config = config.model_copy(update={"monitoring": config.monitoring.model_copy(update={"tensorboard": False})})
    write_results(config, record, compare(config, record))
    assert (tmp_path / "run" / "sweep" / "results.csv").is_file()
    assert not (tmp_path / "run" / "logs").exists()
