"""How long a run still takes, from when its steps were recorded: validation, pictures and checkpoints count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ray_pipeline.monitoring.phase_state import PhaseState

#: step records that the pace is taken from
RECENT = 200


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the current phase ends, and until all do; nan where nobody can know."""

    phase: float
    run: float


def seconds_a_step(records: Sequence[dict]) -> float:
    """Wall time of a step of one phase lately, in the attempt that recorded last; nan before it has two records since
    it last counted steps that it did not compute.

    records: those of the phase, in order (`read_events`).
    """
    steps: list[dict] = []
    for record in records:
        if record["event"] == "phase" and record["status"] in ("started", "resumed"):
            steps = []
        elif record["event"] == "step":
            if math.isnan(record["samples_per_second"]):
                steps = []
            steps.append(record)
    recent = steps[-RECENT:]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return math.nan
    first, last = (datetime.fromisoformat(recent[place]["time"]) for place in (0, -1))
    return (last - first).total_seconds() / (recent[-1]["step"] - recent[0]["step"])


def time_left(state: PhaseState, records: Sequence[dict], order: Sequence[str]) -> TimeLeft:
    """Of a run; records: all of its; order: names of its phases.

    A phase to come is taken to be as much slower as its network has more to compute for a sample.
    """
    current = state.phases.get(state.current_phase or "")
    if current is None or current.steps is None or state.current_phase not in order:
        return TimeLeft(math.nan, math.nan)
    pace = seconds_a_step([record for record in records if record.get("phase") == state.current_phase])
    own = 0.0 if current.status == "finished" else pace * (current.steps - current.step)
    later = state.later_steps(state.current_phase, order)
    return TimeLeft(own, own + pace * later if later else own)
