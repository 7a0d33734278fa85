"""Points of a sweep: functions of (seed, number), none twice, all of a grid, and refused where they mean nothing."""

import warnings

import numpy as np
import pytest

from ray_pipeline import pipeline
from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.sweep_records import SweepRecord, Winner
from ray_pipeline.sweep_space import check_space, continues, count, decays, point, with_values, with_winner

PHASES = [
    {"name": "phase1_unconditional", "epochs": 2},
    {"name": "phase2_conditional", "epochs": 4, "condition_types": ["canny"]},
]


def config_of(space, seed=0, model=None, **sweep):
    sweep = {"enabled": True, "space": space, "epochs": 2, **sweep}
    return parse_config({"phases": PHASES, "seed": seed, "sweep": sweep, "model": model or {}})


def points(config, number=None):
    return [point(config, n) for n in range(count(config) if number is None else number)]


def test_every_combination_of_grids_comes_once_in_their_order():
    config = config_of({"model.dropout": {"grid": [0.0, 0.1]}, "optimizer.lr": {"grid": [1e-4, 2e-4, 3e-4]}})
    assert count(config) == 6
    expected = [{"model.dropout": d, "optimizer.lr": lr} for d in (0.0, 0.1) for lr in (1e-4, 2e-4, 3e-4)]
    assert points(config) == expected


def test_choices_are_drawn_without_repetition_and_differ_by_seed():
    space = {"model.dropout": {"choice": [0.0, 0.1, 0.2]}, "phases[].condition_dropout": {"choice": [0.1, 0.2]}}
    config = config_of(space, num_trials=50)
    assert count(config) == 6
    found = points(config)
    assert len({tuple(values.items()) for values in found}) == 6
    assert points(config_of(space, num_trials=50)) == found
    assert any(points(config_of(space, num_trials=50, seed=seed)) != found for seed in (1, 2))


def test_values_of_a_range_are_spread_over_it_as_it_says():
    """Uniformly, and uniformly in the logarithm; compared with the moments of a uniform distribution."""
    space = {"model.dropout": {"uniform": [0.1, 0.3]}, "optimizer.lr": {"log_uniform": [1e-6, 1e-2]}}
    found = points(config_of(space, num_trials=1), 4000)
    for values, low, high in (
        ([p["model.dropout"] for p in found], 0.1, 0.3),
        (np.log([p["optimizer.lr"] for p in found]), np.log(1e-6), np.log(1e-2)),
    ):
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=4 * (high - low) / np.sqrt(12 * 4000))
        assert np.std(values) == pytest.approx((high - low) / np.sqrt(12), rel=0.03)


def test_all_points_of_a_grid_meet_the_same_drawn_values():
    space = {"model.dropout": {"grid": [0.0, 0.1]}, "optimizer.lr": {"log_uniform": [1e-6, 1e-2]}}
    found = points(config_of(space, num_trials=6))
    assert [p["model.dropout"] for p in found] == [0.0, 0.1] * 3
    assert [p["optimizer.lr"] for p in found[::2]] == [p["optimizer.lr"] for p in found[1::2]]
    assert len({p["optimizer.lr"] for p in found}) == 3


def test_values_of_the_decay_cost_no_trial():
    config = config_of({"model.dropout": {"grid": [0.0, 0.1]}, "ema.decay": {"choice": [0.9, 0.99, 0.999]}})
    assert count(config) == 2
    assert decays(config) == (0.9, 0.99, 0.999)
    assert all(list(values) == ["model.dropout"] for values in points(config))


def test_the_space_of_an_empty_section_is_that_of_averages_and_dropout():
    config = config_of({})
    check_space(config)
    assert set(points(config)[0]) == {"model.dropout", "phases[].condition_dropout"}
    assert len(decays(config)) > 1
    for values in points(config):
        with_values(config, values, "a trial")


def test_keys_of_the_trained_phase_reach_it():
    config = config_of({"phases[].lr": {"grid": [1e-5]}})
    assert with_values(config, point(config, 0), "a trial").phases[1].lr == 1e-5
    same = config_of({"phases.1.lr": {"grid": [1e-5]}})
    assert with_values(same, point(same, 0), "a trial").phases[1].lr == 1e-5


def test_candidates_for_the_decay_may_be_tracked_beside_it_already():
    config = config_of({"ema.decay": {"grid": [0.9, 0.99]}})
    check_space(config.model_copy(update={"ema": config.ema.model_copy(update={"more_decays": (0.9, 0.99)})}))


def test_trials_of_the_first_phase_continue_it():
    assert continues(config_of({}, trains="phase1_unconditional"))
    assert not continues(config_of({}))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"model.droput": {"choice": [0.1]}}, r"sweep.space.model.droput is no key of the config; .*dropout"),
        ({"model": {"choice": [0.1]}}, r"sweep.space.model is a section"),
        ({"seed": {"choice": [1, 2]}}, r"sweep.space.seed cannot be searched: the trials see the same samples"),
        ({"train.global_batch": {"choice": [8]}}, r"train.global_batch cannot be searched"),
        ({"monitoring.val_tiles": {"choice": [8]}}, r"validation losses of the trials could not be compared"),
        ({"phases.1.epochs": {"choice": [8]}}, r"phases.1.epochs cannot be searched: the sweep itself sets it"),
        ({"model.dropout": {"choice": [0.1, 1.5]}}, r"sweep.space.model.dropout, value 1.5: model.dropout: "),
        ({"model.dropout": {"uniform": [0.1, 1.5]}}, r"sweep.space.model.dropout, value 1.5: model.dropout: "),
        (
            {"phases.0.lr": {"choice": [1e-4]}},
            r"phases.0.lr cannot be searched: it belongs to a phase",
        ),
        ({"optimizer.warmup_steps": {"uniform": [0, 100]}}, r"sweep.space, trial 0 .*optimizer.warmup_steps: "),
        ({"ema.decay": {"uniform": [0.9, 0.99]}}, r"sweep.space.ema.decay: expected choice or grid"),
        ({"optimizer.lr": {"grid": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]}}, r"num_trials=6 does not cover the 7"),
    ],
)
def test_a_space_that_means_nothing_is_refused_in_words(space, said):
    with pytest.raises(UserError, match=said):
        check_space(config_of(space))


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"space": {"model.dropout": {"choice": [0.1], "grid": [0.1]}}}, "expected one of .* found choice and"),
        ({"space": {"model.dropout": {}}}, "expected one of choice, .* found none"),
        ({"space": {"model.dropout": {"choice": [0.1, 0.1]}}}, "choice lists a value twice"),
        ({"space": {"optimizer.lr": {"log_uniform": [0.0, 1.0]}}}, "expected 0 < low < high"),
        ({"space": {"optimizer.lr": {"uniform": [1.0, 0.5]}}}, "expected low < high"),
        ({"search": "optuna", "space": {"optimizer.lr": {"grid": [1.0]}}}, "optuna draws values, so there is no grid"),
    ],
)  # fmt: skip
def test_a_section_that_contradicts_itself_is_refused(sweep, said):
    with pytest.raises(UserError, match=said):
        config_of(sweep.pop("space", {}), **sweep)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"trains": "phase3"}, "sweep.trains=phase3 is no phase; the phases are phase1_unconditional, phase2"),
        ({"epochs": 5}, "sweep.epochs=5: trials are the first epochs of phase2_conditional, which has 4"),
    ],
)
def test_trials_need_a_phase_to_train(sweep, said):
    with pytest.raises(UserError, match=said):
        check_space(config_of({}, **sweep))


def test_a_winner_sets_its_values_but_for_those_that_were_changed_after_the_sweep():
    config = config_of({"model.dropout": {"grid": [0.0, 0.1]}, "phases[].lr": {"grid": [1e-4, 2e-4]}})
    found = {"model.dropout": 0.1, "phases.1.lr": 2e-4}
    winner = Winner(
        trial=0, overrides=found, track=None, checkpoint="c", phase="p", epoch=1, step=1, position=1, loss=1.0,
        standard_error=0.1,
    )  # fmt: skip
    record = SweepRecord(base=config.dump())
    first = with_winner(config, record, winner)
    assert (first.model.dropout, first.phases[1].lr) == (0.1, 2e-4)
    assert with_winner(first, record, winner) == first
    changed = with_winner(with_values(config, {"model.dropout": 0.3}, "a person"), record, winner)
    assert (changed.model.dropout, changed.phases[1].lr) == (0.3, 2e-4)
    taken_back = winner.model_copy(update={"overruled": ["model.dropout"]})
    assert with_winner(config, record, taken_back).model.dropout == config.model.dropout
    shorter = config.model_copy(update={"phases": config.phases[:1]})
    assert with_winner(shorter, record, winner).model.dropout == 0.1


def test_weights_given_to_a_phase_that_the_best_trial_begins_are_refused():
    phases = [PHASES[0], PHASES[1] | {"init": "elsewhere"}]
    space = {"model.dropout": {"grid": [0.0, 0.1]}}
    config = parse_config({"phases": phases, "sweep": {"space": space, "trains": "phase1_unconditional"}})
    with pytest.raises(UserError, match=r"phases.1.init=elsewhere, but phase2_conditional begins from the best trial"):
        check_space(config)


def test_trials_that_end_before_averages_begin_are_warned_of(tmp_path):
    space = {"ema.decay": {"grid": [0.9, 0.99]}, "model.dropout": {"grid": [0.0, 0.1]}}
    small = {"architecture": "custom", "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    config = with_values(config_of(space, model=small), {"output_dir": str(tmp_path), "ema.start_step": 20}, "a test")
    with pytest.warns(UserWarning, match=r"trials end at step 2, and averages begin at ema.start_step=20"):
        pipeline.check_room(config, [config.train.global_batch] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.check_room(config, [config.train.global_batch * 11] * 2)


def test_a_misspelt_word_of_a_space_is_named():
    with pytest.raises(UserError, match=r"unknown key sweep.space.model.dropout.chioce; .*\.choice"):
        config_of({"model.dropout": {"chioce": [0.1]}})
