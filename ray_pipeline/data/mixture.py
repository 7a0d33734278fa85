"""What a phase draws its samples from: data sets, in which proportion, with which degradations, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_pipeline.config import Config
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.plan import MixedPlan, Plan, SamplePlan
from ray_pipeline.errors import UserError
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.sections import PAIRED_TYPES


@dataclass(frozen=True)
class Member:
    """Rows start to start + count - 1 of a split; simulated: with hints made from the tile, not from its partner."""

    name: str
    start: int
    count: int
    weight: float | None
    simulated: bool


@dataclass(frozen=True)
class Mixture:
    """Members and the plan over them: a SamplePlan over all their rows end to end, or a MixedPlan."""

    members: tuple[Member, ...]
    plan: Plan

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the split (B,) int64, and whether each takes simulated hints (B,) bool."""
        ids = self.plan.ids(positions)
        if ids.ndim == 2:
            chosen, own = ids.T
        else:
            ends = np.cumsum([member.count for member in self.members])
            chosen = np.searchsorted(ends, ids, side="right")
            own = ids - np.concatenate([[0], ends])[chosen]
        starts = np.array([member.start for member in self.members])
        simulated = np.array([member.simulated for member in self.members])
        return starts[chosen] + own, simulated[chosen]


def choose_members(phase: PhaseConfig, datasets: Sequence[DataSet], where: str) -> tuple[Member, ...]:
    """The members that phases[].datasets names among `datasets`, in its order; all of them where it names none.

    Raises UserError for a name that is not there, and for real degradations of tiles without a partner.
    """
    known = {entry.name: entry for entry in datasets}
    if not phase.datasets:
        return tuple(Member(entry.name, entry.start, entry.count, None, simulated=False) for entry in datasets)
    members = []
    for choice in phase.datasets:
        entry = known.get(choice.name)
        if entry is None:
            raise UserError(
                f"phases[].datasets of {phase.name} names {choice.name!r}, but {where} holds {', '.join(known)}; "
                "correct the name or prepare that data set"
            )
        for hint in PAIRED_TYPES:
            lacking = entry.count - entry.partners.get(hint, 0)
            if choice.degradations == "real" and hint in phase.condition_types and lacking:
                raise UserError(
                    f"phase {phase.name}: degradations: real, but {lacking} of {entry.count} tiles of {entry.name} "
                    f"have no partner for {hint} in {where}; prepare their partners, or use degradations: auto"
                )
        simulated = choice.degradations == "simulated"
        members.append(Member(entry.name, entry.start, entry.count, choice.weight, simulated))
    return tuple(members)


def make_mixture(config: Config, phase: PhaseConfig, datasets: Sequence[DataSet], where: str) -> Mixture:
    """Members and order of a phase's training samples; UserError where it has none, or one of a weight has none."""
    members = choose_members(phase, datasets, where)
    empty = [member.name for member in members if not member.count and member.weight is not None]
    if empty or not any(member.count for member in members):
        names = ", ".join(empty or [member.name for member in members]) or "it"
        raise UserError(f"phase {phase.name}: {names} of {where} hold no training tile; prepare some")
    window = config.data.shuffle_window
    windowed = {"shard_rows": config.data.shard_rows, "window": window} if window else {}
    size, seed = config.train.global_batch, config.seed
    if members[0].weight is None:
        total = sum(member.count for member in members)
        return Mixture(members, SamplePlan(total, size, seed, phase.name, **windowed))
    plans = []
    for member in members:
        key = f"{phase.name}/{member.name}/{'simulated' if member.simulated else 'given'}"
        plans.append(SamplePlan(member.count, size, seed, key, **windowed))
    weights = [member.weight for member in members]
    return Mixture(members, MixedPlan(plans, weights, size, seed, phase.name))


def validation_rows(phase: PhaseConfig, datasets: Sequence[DataSet], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Every validation row of a phase's data sets (N,) int64, and whether it takes simulated hints (N,) bool."""
    members = choose_members(phase, datasets, where)
    rows = [np.arange(member.start, member.start + member.count) for member in members]
    if not sum(map(len, rows)):
        raise UserError(f"phase {phase.name}: its data sets have no validation tile in {where}; prepare some")
    simulated = [np.full(member.count, member.simulated) for member in members]
    return np.concatenate(rows), np.concatenate(simulated)
