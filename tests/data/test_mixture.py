"""A phase draws from the data sets that it names, as often and with the degradations that it says."""

import numpy as np
import pytest

from ray_pipeline.config import Config, parse_config
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.mixture import Member, Mixture, choose_members, make_mixture, validation_rows
from ray_pipeline.data.plan import MixedPlan, SamplePlan
from ray_pipeline.errors import UserError

# of "beads" and of the third tile on of "cells", none has a partner of low resolution; "empty" has no training tile
STORED = (
    DataSet("beads", 0, 5, {}),
    DataSet("cells", 5, 30, {"denoising": 30, "super_resolution": 2}),
    DataSet("empty", 35, 0, {}),
    DataSet("neurons", 35, 13, {"denoising": 13, "super_resolution": 13}),
)
BATCH = 8
SIMULATED = {"degradations": "simulated"}


def configured(*datasets, hints=("denoising",), **changes) -> Config:
    phase = {"name": "p", "epochs": 2, "datasets": list(datasets), "condition_types": list(hints)}
    return parse_config({"phases": [phase], "train": {"global_batch": BATCH}, **changes})


def mixture(*datasets, **changes) -> Mixture:
    config = configured(*datasets, **changes)
    return make_mixture(config, config.phases[0], STORED, "store/train")


def epoch(mixed: Mixture, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    size = mixed.plan.num_samples
    return mixed.rows(np.arange(number * size, (number + 1) * size))


def refusal(*datasets, stored=STORED, hints=("denoising",)) -> str:
    config = configured(*datasets, hints=hints)
    with pytest.raises(UserError) as caught:
        make_mixture(config, config.phases[0], stored, "store/train")
    return str(caught.value)


def test_without_datasets_every_row_of_the_store_comes_once_an_epoch_with_given_hints():
    mixed = mixture()
    assert [member.name for member in mixed.members] == ["beads", "cells", "empty", "neurons"]
    for number in range(3):
        rows, simulated = epoch(mixed, number)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(np.sort(rows), np.arange(48))
        assert not simulated.any()


def test_without_weights_every_row_of_the_named_data_sets_comes_once_an_epoch():
    # in another order than in the store, one between them left out, one without tiles among them
    rows, simulated = epoch(mixture("neurons", "empty", {"name": "beads", **SIMULATED}))
    np.testing.assert_array_equal(np.sort(rows), [*range(5), *range(35, 48)])
    np.testing.assert_array_equal(simulated, rows < 5)


def test_real_against_simulated_degradations_of_one_data_set_shows_each_tile_with_both():
    mixed = mixture({"name": "cells", "degradations": "real"}, {"name": "cells", **SIMULATED})
    assert mixed.plan.num_samples == 60
    rows, simulated = epoch(mixed)
    for flag in (False, True):
        np.testing.assert_array_equal(np.sort(rows[simulated == flag]), np.arange(5, 35))


@pytest.mark.parametrize("window", [None, 10])
def test_weights_are_the_shares_of_the_samples_and_each_data_set_keeps_its_epochs(window):
    data = {"shuffle_window": window, "shard_rows": 4}
    mixed = mixture({"name": "neurons", "weight": 3}, {"name": "cells", "weight": 1, **SIMULATED}, data=data)
    rows, simulated = mixed.rows(np.arange(4 * 13 * 10))
    own = {"neurons": rows[rows >= 35], "cells": rows[rows < 35]}
    assert len(own["neurons"]) == pytest.approx(390, abs=2)
    np.testing.assert_array_equal(simulated, rows < 35)
    for name, start, count in (("neurons", 35, 13), ("cells", 5, 30)):
        whole = len(own[name]) // count * count
        for passed in own[name][:whole].reshape(-1, count):
            np.testing.assert_array_equal(np.sort(passed), np.arange(start, start + count))


def test_a_data_set_drawn_twice_has_two_orders():
    mixed = mixture({"name": "cells", "weight": 1}, {"name": "cells", "weight": 1, **SIMULATED})
    rows, simulated = mixed.rows(np.arange(80))
    assert (rows[simulated][:30] != rows[~simulated][:30]).sum() > 20


def test_a_mixture_is_the_same_whatever_data_sets_lie_beside_its_own():
    chosen = [{"name": "cells", "weight": 1}, {"name": "neurons", "weight": 2}]
    config = configured(*chosen)
    beside = [DataSet(e.name, e.start + 100, e.count, e.partners) for e in STORED if e.name in ("cells", "neurons")]
    one, other = (make_mixture(config, config.phases[0], stored, "s") for stored in (STORED, beside))
    positions = np.arange(200)
    np.testing.assert_array_equal(one.rows(positions)[0] + 100, other.rows(positions)[0])


def test_any_positions_may_be_asked_for_in_any_order():
    for mixed in (
        mixture("neurons", "beads"),
        mixture({"name": "neurons", "weight": 1}, {"name": "beads", "weight": 1}),
    ):
        rows = mixed.rows(np.arange(300))[0]
        positions = np.array([299, 3, 3, 150, 151, 0])
        np.testing.assert_array_equal(mixed.rows(positions)[0], rows[positions])
        assert [len(part) for part in mixed.rows(np.arange(0))] == [0, 0]


def test_the_plan_is_of_the_run_and_the_phase():
    plan = mixture("cells", seed=9, data={"shuffle_window": 20, "shard_rows": 6}).plan
    assert plan == SamplePlan(30, BATCH, 9, "p", shard_rows=6, window=20)
    plan = mixture({"name": "cells", "weight": 1.5}, seed=9).plan
    assert isinstance(plan, MixedPlan)
    assert (plan.num_samples, plan.global_batch, plan.seed, plan.phase) == (30, BATCH, 9, "p")


def test_an_unknown_name_is_refused_with_the_known_ones():
    said = refusal("cells", "cell")
    assert said.startswith("phases[].datasets of p names 'cell', but store/train holds beads, cells, empty, neurons; ")


@pytest.mark.parametrize(
    ("name", "hints", "lacking"),
    [
        ("beads", ("denoising",), "5 of 5 tiles of beads have no partner for denoising"),
        ("cells", ("denoising", "super_resolution"), "28 of 30 tiles of cells have no partner for super_resolution"),
    ],
)
def test_real_degradations_of_tiles_without_a_partner_are_refused(name, hints, lacking):
    said = refusal({"name": name, "degradations": "real"}, hints=hints)
    assert lacking in said
    assert "use degradations: auto" in said
    for other in ("auto", "simulated"):
        assert mixture({"name": name, "degradations": other}, hints=hints).plan.num_samples > 0


def test_real_degradations_ask_for_partners_of_the_phase_s_own_hints_alone():
    config = configured({"name": "cells", "degradations": "real"}, hints=("denoising", "canny"))
    member = Member("cells", 5, 30, None, simulated=False)
    assert choose_members(config.phases[0], STORED, "s") == (member,)


def test_a_data_set_of_a_weight_must_have_a_tile():
    said = refusal({"name": "cells", "weight": 1}, {"name": "empty", "weight": 1})
    assert said == "phase p: empty of store/train hold no training tile; prepare some"


def test_data_sets_without_any_training_tile_are_refused():
    assert "empty of store/train hold no training tile" in refusal("empty")
    assert "of store/train hold no training tile" in refusal(stored=())


def test_validation_takes_every_row_of_the_phase_s_data_sets_with_the_degradations_it_says():
    config = configured({"name": "neurons", "weight": 9}, {"name": "beads", "weight": 1, **SIMULATED})
    rows, simulated = validation_rows(config.phases[0], STORED, "store/val")
    np.testing.assert_array_equal(rows, [*range(35, 48), *range(5)])
    np.testing.assert_array_equal(simulated, [False] * 13 + [True] * 5)
    everything, _ = validation_rows(configured().phases[0], STORED, "store/val")
    np.testing.assert_array_equal(everything, np.arange(48))


def test_a_phase_without_a_validation_tile_is_refused():
    with pytest.raises(UserError, match="phase p: its data sets have no validation tile in store/val; prepare some"):
        validation_rows(configured("empty").phases[0], STORED, "store/val")
