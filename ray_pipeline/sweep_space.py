"""What the trials of a sweep are: points of its space, each a function of (seed, number), as configs."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_pipeline.config import Config, parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.sweep_records import SweepRecord, Winner, read_winner
from ray_pipeline.sweep_sections import Dimension

#: values of one trial by key
Point = dict[str, Any]

DECAY = "ema.decay"
PHASE = "phases[]."
#: keys that no trial may change, and why
_FIXED = {
    "the trials see the same samples and noise, so that their losses can be compared": (
        "seed", "data", "vae", "train.global_batch", "phases[].condition_types", "phases[].datasets",
    ),
    "validation losses of the trials could not be compared": (
        "monitoring", "scheduler", "train.uncertainty_weighting", "model.latent_size", "model.latent_channels",
    ),
    "the sweep itself sets it": ("phases[].name", "phases[].epochs", "phases[].init", "sweep", "ema.more_decays"),
    "it does not change what is learnt": (
        "output_dir", "checkpoint", "ray", "phases[].epochs_to_save", "ema.snapshots", "ema.power_stds", "ema.enabled",
    ),
    "it belongs to a phase that the trials do not train": ("phases",),
}  # fmt: skip
_MANY = 100_000
_MISSING = object()
_STREAM = 0x5EE9  # of random numbers that are the sweep's own


def trained_phase(config: Config) -> PhaseConfig:
    """The phase that trials train; UserError when there is none of this name, or none that it would serve."""
    index = phase_index(config)
    phase, sweep = config.phases[index], config.sweep
    if index == 0 and len(config.phases) == 1:
        raise UserError(
            f"sweep.trains={sweep.trains} is the only phase, so nothing would go on from the best trial; name a later "
            "one, or set sweep.enabled=false"
        )
    if index and sweep.epochs > phase.epochs:
        raise UserError(
            f"sweep.epochs={sweep.epochs}: trials are the first epochs of {phase.name}, which has {phase.epochs}; "
            "choose fewer"
        )
    return phase


def phase_index(config: Config) -> int:
    """Number of the phase that trials train."""
    names = [phase.name for phase in config.phases]
    if config.sweep.trains not in names:
        raise UserError(f"sweep.trains={config.sweep.trains} is no phase; the phases are {', '.join(names)}")
    return names.index(config.sweep.trains)


def continues(config: Config) -> bool:
    """Whether trials are further epochs of a finished phase, and not the first ones of a phase to come."""
    return phase_index(config) == 0


def space_of(config: Config) -> dict[str, Dimension]:
    """The space as given, else that of averages and dropout."""
    if config.sweep.space:
        return config.sweep.space
    space = {"model.dropout": Dimension(choice=(0.0, 0.05, 0.1))}
    if config.ema.enabled:
        space[DECAY] = Dimension(choice=(0.999, 0.9995, 0.9999))
    if trained_phase(config).condition_types:
        space[f"{PHASE}condition_dropout"] = Dimension(choice=(0.05, 0.1, 0.2))
    return space


def decays(config: Config) -> tuple[float, ...]:
    """Candidates for ema.decay, which every trial follows; none where it is not searched."""
    dimension = space_of(config).get(DECAY)
    return () if dimension is None else tuple(float(value) for value in dimension.values)


def check_space(config: Config) -> None:
    """UserError for a key that cannot be searched, or for a value that its key does not take."""
    trained_phase(config)
    for key, dimension in space_of(config).items():
        for why, keys in _FIXED.items():
            general = _general(key, config)
            if any(general == fixed or general.startswith(f"{fixed}.") for fixed in keys):
                raise UserError(f"sweep.space.{key} cannot be searched: {why}; leave it out")
        if key == DECAY and (dimension.values is None or not config.ema.enabled):
            why = "expected choice or grid" if config.ema.enabled else "ema.enabled is false"
            raise UserError(f"sweep.space.{DECAY}: {why}, since every trial follows all of its values; change it")
        for value in dimension.bounds if dimension.values is None else dimension.values:
            alone = {"ema.more_decays": []} if key == DECAY else {}  # they may be among its values
            with_values(config, {key: value, **alone}, f"sweep.space.{key}, value {value!r}")
    if config.sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError(
            "sweep.search=optuna needs the package optuna; install it with `pip install ray-pipeline[optuna]`, or use "
            "random"
        )
    for number in range(count(config) if config.sweep.search == "random" else 0):
        values = point(config, number)
        with_values(config, values, f"sweep.space, trial {number} ({values})")
    if continues(config) and config.phases[1].init and read_winner(config.output_dir) is None:
        raise UserError(
            f"phases.1.init={config.phases[1].init}, but {config.phases[1].name} begins from the best trial of the "
            "sweep; leave it out, or set sweep.enabled=false"
        )
    grids = math.prod(len(values) for values in _grids(config).values())
    if config.sweep.num_trials < grids:
        raise UserError(
            f"sweep.num_trials={config.sweep.num_trials} does not cover the {grids} combinations of the grids; raise "
            "it, or use choice"
        )


def count(config: Config) -> int:
    """Trainings of the sweep: num_trials, or as many as differ."""
    if any(dimension.values is None for dimension in _trained(config).values()):
        return config.sweep.num_trials
    return min(config.sweep.num_trials, math.prod(len(d.values) for d in _trained(config).values()))


def point(config: Config, number: int) -> Point:
    """Values of trial `number` (from 0), without ema.decay. Grid points come in turn; for each of them the same values
    are drawn, none twice where they are all from lists."""
    grids, trained = _grids(config), _trained(config)
    combinations = list(itertools.product(*grids.values()))
    round_, place = divmod(number, len(combinations))
    drawn = {key: dimension for key, dimension in trained.items() if key not in grids}
    found = dict(zip(grids, combinations[place], strict=True)) | _draw(config.seed, round_, drawn)
    return {key: found[key] for key in trained}


def _draw(seed: int, number: int, dimensions: Mapping[str, Dimension]) -> Point:
    lists = {key: dimension.values for key, dimension in dimensions.items() if dimension.values is not None}
    sizes = [len(values) for values in lists.values()]
    total, rng = math.prod(sizes), np.random.default_rng([seed, _STREAM])
    # of very many combinations, two that are drawn hardly ever agree
    few = total <= _MANY
    index = rng.permutation(total)[number % total] if few else rng.integers(total, size=number + 1)[-1]
    places = np.unravel_index(index, sizes) if sizes else ()
    found = {key: values[place] for (key, values), place in zip(lists.items(), places, strict=True)}
    shares = iter(np.random.default_rng([seed, _STREAM, number]).random(len(dimensions)).tolist())
    return found | {key: d.at(next(shares)) for key, d in dimensions.items() if d.values is None}


def with_winner(config: Config, record: SweepRecord, winner: Winner) -> Config:
    """The config with what the winner sets; a key that was changed since the sweep began, or overruled, keeps its
    value."""
    began, now = record.base, config.dump()
    unchanged = {
        key: value
        for key, value in winner.overrides.items()
        if key not in winner.overruled and _at(now, key) == _at(began, key)
    }
    return with_values(config, unchanged, "the sweep's winner")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, list) and int(part) >= len(tree):
            return _MISSING  # a phase was taken away
        tree = tree[int(part) if isinstance(tree, list) else part]
    return tree


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """A config with these keys set; UserError naming `source` for what it does not take."""
    tree = config.dump()
    for key, value in values.items():
        own = key.replace(PHASE, f"phases.{phase_index(config)}.") if key.startswith(PHASE) else key
        *path, last = own.split(".")
        node: Any = tree
        for part in path:
            node = node[int(part)] if isinstance(node, list) and part.isdecimal() else _below(node, part, key)
        _below(node, last, key, leaf=True)
        node[last] = value
    return parse_config(tree, source)


def _below(node: Any, part: str, key: str, *, leaf: bool = False) -> Any:
    if not isinstance(node, dict) or part not in node:
        known = f"; {', '.join(node)} are known there" if isinstance(node, dict) else ""
        raise UserError(f"sweep.space.{key} is no key of the config{known}; correct it")
    if leaf and isinstance(node[part], dict):
        raise UserError(f"sweep.space.{key} is a section, expected one of its keys")
    return node[part]


def _general(key: str, config: Config) -> str:
    """phases[].lr for phases.1.lr, where phase 1 is the one that trials train."""
    own = f"phases.{phase_index(config)}."
    return PHASE + key.removeprefix(own) if key.startswith(own) else key


def _trained(config: Config) -> dict[str, Dimension]:
    """Keys that cost trainings."""
    return {key: dimension for key, dimension in space_of(config).items() if key != DECAY}


def _grids(config: Config) -> dict[str, tuple[Any, ...]]:
    return {key: dimension.grid for key, dimension in _trained(config).items() if dimension.grid is not None}
