"""A run goes on with a changed config only where that can be right: every key is judged."""

import pytest

from ray_pipeline.config import Config, parse_config
from ray_pipeline.config_changes import accepted, differences, notes
from ray_pipeline.config_kinds import JUDGED, Kind, rule_of
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.sections import Section, flatten

PHASES = [
    {"name": "one", "epochs": 4},
    {"name": "two", "epochs": 2, "condition_types": ["canny"]},
]


def config(**sections):
    return parse_config({"data": {"tile_size": 512}, "phases": PHASES} | sections)


def phases(*changes, more=()):
    """PHASES with the changes of each, and more behind them."""
    return {"phases": [phase | change for phase, change in zip(PHASES, changes, strict=True)] + list(more)}


def state(**phases) -> PhaseState:
    """name=(status, epoch, epochs) of phases that have a checkpoint."""
    made = PhaseState()
    for name, (status, epoch, epochs) in phases.items():
        progress = made.phase(name)
        progress.status, progress.epoch, progress.epochs = status, epoch, epochs
        progress.checkpoints = [f"{name}_epoch_{epoch:03d}.ckpt"]
    return made


IN_ONE = state(one=("running", 2, 4))
BETWEEN = state(one=("finished", 4, 4))
IN_TWO = state(one=("finished", 4, 4), two=("running", 1, 2))
AFTER = state(one=("finished", 4, 4), two=("finished", 2, 2))


def go_on(where: PhaseState, now: Config, *allow: str) -> list[str]:
    return [str(change) for change in accepted("run", config(), now, where, allow)]


def refusal(where: PhaseState, now: Config, *allow: str) -> str:
    with pytest.raises(UserError) as caught:
        accepted("run", config(), now, where, allow)
    return str(caught.value)


def keys_of(model: type[Section], path: str = "") -> list[str]:
    """Every key of a section and of those in it, such as phases.*.epochs."""
    found = []
    for name, field in model.model_fields.items():
        key = f"{path}{name}"
        inner = [kind for kind in flatten(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        found += keys_of(inner[0], f"{key}.*." if "tuple" in str(field.annotation) else f"{key}.") if inner else [key]
    return found


def test_every_key_of_the_config_is_judged_and_every_judgement_is_of_a_key():
    known = keys_of(Config)
    assert len(known) > 90
    for key in known:
        rule_of(key)
    judged = [key for rule in JUDGED for key in rule.keys]
    assert len(set(judged)) == len(judged)
    for key in judged:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key


def test_a_key_that_nobody_judged_is_no_harmless_one():
    with pytest.raises(KeyError):
        rule_of("optimizer.momentum")
    with pytest.raises(KeyError):
        rule_of("rays.num_workers")


def test_what_changes_no_number_passes_and_is_told():
    now = config(
        ray={"num_workers": 2}, output_dir="moved", monitoring={"num_samples": 4}, train={"batch_size": 8, "threads": 1}
    )
    assert go_on(IN_TWO, now) == [
        "output_dir: training_output -> moved",
        "train.batch_size: 2 -> 8",
        "train.threads: null -> 1",
        "monitoring.num_samples: 16 -> 4",
        "ray.num_workers: 1 -> 2",
    ]


def test_another_training_is_refused_with_every_difference_until_its_keys_are_allowed():
    now = config(optimizer={"lr": 5e-4, "weight_decay": 0.1}, monitoring={"val_tiles": 9, "num_samples": 4})
    told = refusal(IN_ONE, now)
    for words in (
        "optimizer.lr: 0.0001 -> 0.0005",
        "optimizer.weight_decay: 0.0 -> 0.1",
        "monitoring.val_tiles: 512 -> 9",
        "monitoring.num_samples: 16 -> 4",
        "--allow-change optimizer.lr",
    ):
        assert words in told
    assert "--allow-change monitoring.num_samples" not in told
    assert "monitoring.val_tiles" in refusal(IN_ONE, now, "optimizer")
    assert "optimizer.weight_decay" in refusal(IN_ONE, now, "optimizer.lr", "monitoring.val_tiles")
    assert len(go_on(IN_ONE, now, "optimizer", "monitoring.val_tiles")) == 4


@pytest.mark.parametrize("key", ["optimizer.eps", "optimizer.l", "optimiser", "phases.1", "phases"])
def test_an_allowance_that_nothing_needs_is_refused_with_what_differs(key):
    told = refusal(IN_ONE, config(optimizer={"lr": 5e-4}), key)
    assert f"--allow-change {key}" in told
    assert "optimizer.lr: 0.0001 -> 0.0005" in told
    assert "nothing" in refusal(IN_ONE, config(), key)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"model": {"architecture": "DiT-B/8"}}, "model.architecture: DiT-XL/8 -> DiT-B/8"),
        ({"model": {"noise_embedding": "fourier"}}, "model.noise_embedding"),
        ({"scheduler": {"prediction_type": "epsilon"}}, "scheduler.prediction_type"),
        ({"train": {"global_batch": 128}}, "train.global_batch: 256 -> 128"),
        ({"train": {"uncertainty_weighting": True}}, "train.uncertainty_weighting"),
        ({"ema": {"decay": 0.99}}, "ema.decay: 0.9999 -> 0.99"),
        ({"ema": {"enabled": False}}, "ema.enabled: true -> false"),
    ],
)
def test_what_the_stored_state_would_not_fit_is_refused_even_when_allowed(sections, words):
    told = refusal(IN_ONE, config(**sections), *sections)
    assert words in told
    assert "cannot go on" in told
    assert "phases.0.init" in told
    # where no phase has saved yet, nothing is stored that it could not fit
    assert go_on(PhaseState(), config(**sections), *sections)


def test_between_phases_what_only_an_open_phase_stores_may_change():
    changes = {"ema": {"decay": 0.99}, "train": {"global_batch": 128}}
    assert len(go_on(BETWEEN, config(**changes), "ema", "train")) == 2
    assert "train.global_batch" in refusal(BETWEEN, config(**changes), "ema")
    assert "cannot go on" in refusal(BETWEEN, config(seed=1), "seed")
    # a finished phase that gets more epochs is an open one
    more = config(**changes, **phases({"epochs": 6}, {}))
    assert "one has begun" in refusal(BETWEEN, more, "ema", "train", "phases")


def test_the_hint_network_may_change_until_a_phase_with_hints_has_begun():
    now = config(hint_control={"lora_rank": 4})
    assert go_on(BETWEEN, now, "hint_control") == ["hint_control.lora_rank: 16 -> 4"]
    assert "two has begun" in refusal(IN_TWO, now, "hint_control")


def test_a_finished_phase_is_given_more_epochs_only_while_no_later_one_builds_on_it():
    longer = config(**phases({"epochs": 6}, {}))
    assert go_on(BETWEEN, longer, "phases.0.epochs") == ["phases.0.epochs: 4 -> 6"]
    assert "phases.0.epochs: 4 -> 6" in refusal(BETWEEN, longer)
    assert "two has begun from what one was" in refusal(IN_TWO, longer, "phases.0.epochs")
    assert go_on(AFTER, config(**phases({}, {"epochs": 3})), "phases.1") == ["phases.1.epochs: 2 -> 3"]


def test_a_phase_that_began_from_weights_of_its_own_does_not_keep_the_one_before_short():
    apart = phases({}, {"init": "other.ckpt"})
    longer = config(**phases({"epochs": 6}, {"init": "other.ckpt"}))
    assert accepted("run", config(**apart), longer, IN_TWO, ["phases.0.epochs"])


@pytest.mark.parametrize(("where", "epochs"), [(IN_ONE, 1), (BETWEEN, 3)])
def test_epochs_that_are_done_are_not_taken_back(where, epochs):
    assert "trained epoch" in refusal(where, config(**phases({"epochs": epochs}, {})), "phases.0.epochs")


def test_a_running_phase_may_end_sooner():
    assert go_on(IN_ONE, config(**phases({"epochs": 2}, {})), "phases.0.epochs")


def test_a_change_to_a_phase_that_is_done_would_be_untrue():
    assert "one is finished" in refusal(IN_TWO, config(**phases({"lr": 1e-3}, {})), "phases.0.lr")
    assert go_on(IN_TWO, config(**phases({}, {"lr": 1e-3})), "phases.1.lr") == ["phases.1.lr: null -> 0.001"]
    assert "another than one without" in refusal(
        IN_TWO, config(**phases({}, {"condition_types": []})), "phases.1.condition_types"
    )
    assert "another network" in refusal(IN_TWO, config(**phases({}, {"trainable": "lora"})), "phases.1")


def test_a_phase_that_is_added_or_taken_away_is_one_difference():
    third = {"name": "three", "epochs": 5}
    longer = config(**phases({}, {}, more=[third]))
    assert go_on(AFTER, longer, "phases.2") == ["phases.2: not there -> three (5 epochs)"]
    assert "--allow-change phases.2" in refusal(AFTER, longer)
    assert go_on(BETWEEN, config(phases=PHASES[:1]), "phases") == ["phases.1: two (2 epochs) -> not there"]
    between = config(phases=[PHASES[0], third, PHASES[1]])
    assert go_on(BETWEEN, between, "phases.1") == ["phases.1: not there -> three (5 epochs)"]
    assert "two has begun, so the phases before it" in refusal(IN_TWO, between, "phases")
    assert "two has begun, so the phases before it" in refusal(IN_TWO, config(phases=PHASES[1:]), "phases")


def test_phases_are_compared_by_name_and_their_order_is_a_difference():
    third = {"name": "three", "epochs": 5}
    before = config(phases=[*PHASES, third])
    now = config(phases=[PHASES[0], third, PHASES[1] | {"epochs": 3}])
    found = [str(change) for change in differences(before, now)]
    assert found == ["phases.2.epochs: 2 -> 3", 'phases: ["one", "two", "three"] -> ["one", "three", "two"]']
    renamed = [str(change) for change in differences(config(), config(**phases({}, {"name": "hints"})))]
    assert renamed == ["phases.1: two (2 epochs) -> not there", "phases.1: not there -> hints (2 epochs)"]


def test_a_section_that_comes_or_goes_is_told():
    now = config(data={"tile_size": 512, "hints": {"canny": {"sigma": 2.0}}})
    assert [str(change) for change in differences(config(), now)] == ['data.hints.canny: not there -> {"sigma": 2.0}']
    assert rule_of("data.hints.canny").kind is Kind.TRAINING


def test_a_longer_cosine_is_pointed_out():
    for schedule, noted in (("cosine", True), ("constant", False)):
        now = config(**phases({"epochs": 6}, {}), optimizer={"schedule": schedule})
        before = config(optimizer={"schedule": schedule})
        assert bool(notes(differences(before, now), now)) == noted
