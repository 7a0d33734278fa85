"""How the config of a run that goes on differs from the one it was begun with, and whether it may."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_pipeline.config import Config
from ray_pipeline.config_kinds import Kind, Rule, rule_of
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.phase_sections import PhaseConfig

_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One key that differs; `phase`: the phase that it is about, where it is about one. A phase that is there in one of
    the configs alone, or the order of phases, is one difference with is_list True."""

    key: str
    old: Any
    new: Any
    phase: str | None = None
    is_list: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {_words(self.old)} -> {_words(self.new)}"

    def is_below(self, key: str) -> bool:
        """Whether `key` names it, or a section that it is in."""
        return self.key == key or self.key.startswith(f"{key}.")


def _words(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    return value if isinstance(value, str) else json.dumps(value)


def differences(before: Config, now: Config) -> list[Difference]:
    """What differs, key by key; phases are compared with those of the same name and stand under their new numbers."""
    old, new = before.dump(), now.dump()
    old_phases, new_phases = old.pop("phases"), new.pop("phases")
    return _leaves(old, new, "") + _phases(old_phases, new_phases)


def _leaves(old: Any, new: Any, path: str, phase: str | None = None) -> list[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for key in old | new
            for found in _leaves(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}".strip("."), phase)
        ]
    return [] if old == new else [Difference(path, old, new, phase)]


def _phases(old: list[dict], new: list[dict]) -> list[Difference]:
    was, is_now = ({phase["name"]: phase for phase in phases} for phases in (old, new))
    found = [
        Difference(f"phases.{index}", _described(phase), _ABSENT, phase["name"], is_list=True)
        for index, phase in enumerate(old)
        if phase["name"] not in is_now
    ]
    for index, phase in enumerate(new):
        if phase["name"] in was:
            found += _leaves(was[phase["name"]], phase, f"phases.{index}", phase["name"])
        else:
            found.append(Difference(f"phases.{index}", _ABSENT, _described(phase), phase["name"], is_list=True))
    common = [[name for name in names if name in was and name in is_now] for names in (was, is_now)]
    if common[0] != common[1]:
        found.append(Difference("phases", *common, is_list=True))
    return found


def _described(phase: dict) -> str:
    return f"{phase['name']} ({phase['epochs']} epochs)"


def accepted(where: str, before: Config, now: Config, state: PhaseState, allow: Sequence[str]) -> list[Difference]:
    """All differences of a run that goes on, when each of them may be; `allow`: keys and sections that --allow-change
    names.

    UserError with the differences: some cannot be, some were not allowed, or nothing differs that was.
    """
    found = differences(before, now)
    check_named(where, found, allow)
    judge = _Judge(before, now, state)
    reasons = {str(difference): judge.forbids(difference) for difference in found}
    forbidden = [f"{words} ({reason})" for words, reason in reasons.items() if reason]
    if forbidden:
        raise UserError(
            f"the run in {where} cannot go on with {'; '.join(forbidden)}; put this back as it was, or train into "
            "another output_dir, with phases.0.init to begin from one of its checkpoints"
        )
    refused = [
        difference
        for difference in found
        if judge.kind(difference) is not Kind.HARMLESS and not any(difference.is_below(key) for key in allow)
    ]
    if refused:
        words = " ".join(f"--allow-change {difference.key}" for difference in refused)
        harmless = [str(difference) for difference in found if judge.kind(difference) is Kind.HARMLESS]
        raise UserError(
            f"the run in {where} was started with other settings ({'; '.join(map(str, refused))}"
            f"{'; and harmless, ' if harmless else ''}{'; '.join(harmless)}): it would be another training from here "
            f"on; put them back, say {words}, or set another output_dir"
        )
    return found


def check_named(where: str, found: Sequence[Difference], allow: Sequence[str]) -> None:
    """UserError for a key of --allow-change that nothing differs in."""
    listed = "; ".join(map(str, found)) or "nothing"
    for key in allow:
        if not any(difference.is_below(key) for difference in found):
            raise UserError(
                f"--allow-change {key}: it does not differ from the run in {where}, but {listed}; correct it"
            )


class _Judge:
    """What a difference means to the phases as they stand."""

    def __init__(self, before: Config, now: Config, state: PhaseState):
        self.before, self.now, self.state = before, now, state
        self.phases: dict[str, PhaseConfig] = {phase.name: phase for phase in now.phases}
        self.begun = {name for name, progress in state.phases.items() if progress.checkpoints}
        self.open = {
            name for name in self.begun & self.phases.keys() if not state.phase(name).is_done(self.phases[name].epochs)
        }

    def kind(self, difference: Difference) -> Kind:
        return Kind.TRAINING if difference.is_list else rule_of(difference.key).kind

    def forbids(self, difference: Difference) -> str | None:
        """Why it cannot be; None where it can."""
        if difference.is_list:
            return self._other_beginning()
        rule, of = rule_of(difference.key), difference.phase
        if rule.kind is Kind.HARMLESS:
            return None
        if of is not None:
            return self._forbids_in_phase(difference, rule)
        concerned = self.open if rule.kind is Kind.PHASE else self.begun
        if difference.is_below("hint_control"):
            hinted = {phase.name for phase in self.before.phases if phase.condition_types}
            concerned = concerned & hinted
        if rule.kind is Kind.TRAINING or not concerned:
            return None
        return f"{', '.join(sorted(concerned))} has begun: {rule.why}"

    def _other_beginning(self) -> str | None:
        """A phase that has begun must come after the phases that it came after."""
        was, is_now = ([phase.name for phase in config.phases] for config in (self.before, self.now))
        for name in was:
            if name in self.begun and name in is_now and was[: was.index(name)] != is_now[: is_now.index(name)]:
                return f"{name} has begun, so the phases before it must stay as they are"
        return None

    def _forbids_in_phase(self, difference: Difference, rule: Rule) -> str | None:
        name, field = difference.phase, difference.key.rpartition(".")[2]
        if name not in self.begun:
            return None
        if rule.kind is Kind.RUN:
            return f"{name} has begun: {rule.why}"
        if field == "condition_types" and not (difference.old and difference.new):
            return f"{name} has begun: a network with hints is another than one without"
        if field == "epochs":
            return self._forbids_epochs(name, difference.new)
        if name not in self.open:
            return f"{name} is finished, so it would change only what config.yaml says of it"
        return None

    def _forbids_epochs(self, name: str, epochs: int) -> str | None:
        done = self.state.phase(name).epoch
        if epochs < done:
            return f"{name} has trained epoch {done} already"
        names = list(self.phases)
        own_init = {phase.name for phase in self.before.phases if phase.init}
        after = [other for other in names[names.index(name) + 1 :] if other in self.begun]
        if after and after[0] not in own_init:
            return f"{after[0]} has begun from what {name} was then, and what {name} became would not reach it"
        return None


def notes(changes: Sequence[Difference], now: Config) -> Mapping[str, str]:
    """By key, what a person might not think of."""
    if now.optimizer.schedule != "cosine":
        return {}
    words = "the learning rate follows the cosine of the new length from here on"
    return {change.key: words for change in changes if re.fullmatch(r"phases\.\d+\.epochs", change.key)}
