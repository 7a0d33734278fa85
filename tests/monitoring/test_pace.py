"""How long a run still takes."""

import math
from datetime import UTC, datetime, timedelta

import pytest

from ray_pipeline.monitoring.pace import seconds_a_step, time_left
from ray_pipeline.monitoring.phase_state import PhaseState

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds):
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def steps(first, last, begin, each, phase="one", rate=8.0):
    return [
        {
            "event": "step", "phase": phase, "step": step, "samples_per_second": rate,
            "time": at(begin + each * (step - first)),
        }
        for step in range(first, last + 1)
    ]  # fmt: skip


def started(status, step, seconds, phase="one"):
    return {"event": "phase", "phase": phase, "status": status, "step": step, "time": at(seconds)}


def test_the_pause_before_a_resume_is_no_time_of_a_step():
    records = [started("started", 0, 0), *steps(1, 10, 0, 5.0), started("resumed", 10, 9000)]
    assert math.isnan(seconds_a_step(records))
    records += steps(11, 20, 9000, 2.0)
    assert seconds_a_step(records) == pytest.approx(2.0)


def test_steps_that_were_not_computed_say_nothing_of_the_pace():
    records = [started("resumed", 0, 0), *steps(1, 10, 2, 2.0), *steps(11, 60, 20, 0.001, rate=math.nan)]
    assert math.isnan(seconds_a_step(records))
    assert seconds_a_step([*records, *steps(61, 70, 22.049, 2.0)]) == pytest.approx(2.0)


def test_later_phases_take_as_much_longer_as_they_have_more_to_compute():
    state = PhaseState(current_phase="one")
    one, two = state.phase("one"), state.phase("two")
    one.status, one.step, one.steps, one.sample_flops = "running", 20, 50, 1e9
    two.steps, two.sample_flops = 100, 3e9
    records = [started("started", 0, 0), *steps(1, 20, 0, 2.0)]
    left = time_left(state, records, ["one", "two"])
    assert left.phase == pytest.approx(60)
    assert left.run == pytest.approx(60 + 2 * 3 * 100)
    two.sample_flops = None
    assert math.isnan(time_left(state, records, ["one", "two"]).run)
    assert time_left(state, records, ["one"]).run == pytest.approx(60)


def test_a_run_that_has_not_begun_has_no_pace():
    assert math.isnan(time_left(PhaseState(), [], ["one"]).run)
