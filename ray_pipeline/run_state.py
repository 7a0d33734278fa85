"""A run directory as it is found: its config and its state, taken from checkpoints and records where files are lost."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import Config, load_config, parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.phase_state import HistoryEntry, PhaseProgress, PhaseState
from ray_pipeline.retention import best_of
from ray_pipeline.run_copy import run_path
from ray_pipeline.storage import Folder, is_uri

CONFIG_FILE = "config.yaml"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Run:
    """A run that somebody wants to look at. config: with the output_dir where it lies now."""

    config: Config
    state: PhaseState


def read_run(run_dir: str | Path, expected: str = "the output_dir of a training") -> Run:
    """Config and state of a run, for reading: what is lost or damaged is rebuilt in memory, with a warning.

    UserError when there is no run; `expected`: what the user might have meant.
    """
    location = str(run_dir) if is_uri(str(run_dir)) else str(Path(run_dir))
    config = recorded_config(location, Folder(location).child("checkpoints").location)
    if config is None:
        what = f"no run (no {CONFIG_FILE})" if run_path(location).is_dir() else "no run: there is nothing"
        raise UserError(f"{run_dir} holds {what}, expected {expected}; correct the path")
    config = config.model_copy(update={"output_dir": location})
    found = read_state(config)
    if found.problem:
        _warn(f"{found.problem}; what is used here was rebuilt from checkpoints and records")
    return Run(config, found.state)


def recorded_config(output_dir: str, store: str) -> Config | None:
    """The config that a run was begun with, from config.yaml or, with a warning, from its newest checkpoint in `store`;
    None where there is neither."""
    path = run_path(output_dir, CONFIG_FILE)
    if path.is_file():
        try:
            return load_config(path)
        except UserError as error:
            raise UserError(
                f"{error}; this file is the run's own: put it right, or take it away and `train --resume` takes the "
                "config of the newest checkpoint"
            ) from None
    states = [state for state in _states(CheckpointStore(store)).values() if "config" in state]
    if not states:
        return None
    newest = max(states, key=_place_in_run)
    name = f"{newest['phase']}, step {newest['step']}"
    _warn(f"{path} is lost; the config is that of the newest checkpoint in {store} ({name})")
    return parse_config(newest["config"], source=f"the config in checkpoint {name} of {store}")


def _place_in_run(state: Mapping[str, Any]) -> tuple[int, int]:
    names = [phase["name"] for phase in state["config"]["phases"]]
    return names.index(state["phase"]), state["position"]


@dataclass(frozen=True)
class FoundState:
    """problem: what is wrong with phase_state.json, whose place the rebuilt state takes; empty where nothing is."""

    state: PhaseState
    problem: str = ""


def read_state(config: Config) -> FoundState:
    """The state of the run in config.output_dir; rebuilt, in memory, where its file is lost or damaged. Where there is
    nothing to rebuild it from, a run has not begun, and a missing file is no problem."""
    path = run_path(config.output_dir, phase_state.FILE)
    try:
        state = phase_state.load(path)
    except phase_state.DamagedState as error:
        problem, _, _ = str(error).rpartition("; ")  # without what to do, which is what happens here
        return FoundState(rebuild(config), problem)
    if path.exists():
        return FoundState(state)
    rebuilt = rebuild(config)
    begun = any(progress.status != "pending" for progress in rebuilt.phases.values())
    return FoundState(rebuilt, f"{path} is lost" if begun else "")


def mend_state(config: Config) -> PhaseState:
    """As read_state, and a rebuilt state is written; the damaged file stays beside it. Only who trains may do so."""
    found = read_state(config)
    if found.problem:
        path = run_path(config.output_dir, phase_state.FILE)
        kept = ""
        if path.exists():
            os.replace(path, f"{path}{DAMAGED}")
            kept = f"; the damaged file is kept as {path.name}{DAMAGED}"
        count = sum(len(progress.checkpoints) for progress in found.state.phases.values())
        words = f"rebuilt from {count} checkpoints in {config.checkpoint_store} and from the records in logs"
        found.state.record("rebuilt", f"{path.name} was {words}")
        found.state.save(path)
        _warn(f"{found.problem}; it was {words}{kept}")
    return found.state


def rebuild(config: Config) -> PhaseState:
    """The state that checkpoints and logs/metrics.jsonl tell of.

    A phase is finished or stopped when its record of that is of the newest checkpoint's step, else running: a resume
    opens it again at that step. Only metrics taken after the last checkpoint are lost (the gains by hints).
    """
    states = _states(CheckpointStore(config.checkpoint_store))
    events = [
        event for event in read_events(run_path(config.output_dir)) if event.get("event") in ("phase", "checkpoint")
    ]
    state = PhaseState()
    for phase in (phase.name for phase in config.phases):
        own = {name: committed for name, committed in states.items() if committed.get("phase") == phase}
        told = [event for event in events if event["event"] == "phase" and event["phase"] == phase]
        state.phases[phase] = _progress(phase, own, told)
        if own or told:
            state.current_phase = phase
        if own:
            *_, newest = own.values()
            state.run["latents"] = newest.get("weights", {}).get("latents", {}).get("fingerprint")
    state.history = [_history(event) for event in events][-phase_state.HISTORY_LIMIT :]
    return state


def _progress(phase: str, states: Mapping[str, Mapping], told: list[Mapping]) -> PhaseProgress:
    if not states:
        return PhaseProgress(status="running" if told else "pending")
    *_, newest = states.values()
    last = told[-1] if told else {}
    ended = last.get("status") in ("finished", "stopped") and last["step"] == newest["step"]
    epochs = {entry["name"]: entry["epochs"] for entry in newest.get("config", {}).get("phases", ())}
    val_loss = newest.get("val_loss")
    return PhaseProgress(
        status=last["status"] if ended else "running",
        step=newest["step"],
        position=newest["position"],
        epoch=newest["epoch"],
        steps=newest.get("total_steps"),
        epochs=epochs.get(phase),
        attempt=max(state.get("attempt") or 0 for state in states.values()),
        best=best_of(states),
        last=list(states)[-1],
        checkpoints=list(states),
        baseline_val_loss=newest.get("baseline_val_loss"),
        metrics=newest.get("metrics") or ({} if val_loss is None else {"val_loss": val_loss}),
    )


def _history(event: Mapping) -> HistoryEntry:
    """A record as rank 0 put it in the history when it wrote both."""
    if event["event"] == "checkpoint":
        return HistoryEntry(time=event["time"], event="checkpoint", message=f"{event['name']} ({event['kind']})")
    return HistoryEntry(time=event["time"], event=event["status"], message=f"{event['phase']}: {event['message']}")


def _states(store: CheckpointStore) -> dict[str, dict]:
    """What each committed checkpoint says of itself, by phase and position."""
    return {checkpoint.name: checkpoint.state for checkpoint in store.checkpoints()}


def committed(config: Config) -> dict[str, list[str]]:
    """Names of the committed checkpoints of each phase that has any, by position."""
    found: dict[str, list[str]] = {}
    for name, state in _states(CheckpointStore(config.checkpoint_store)).items():
        found.setdefault(state["phase"], []).append(name)
    return found


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
