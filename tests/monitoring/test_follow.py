"""Pictures and the progress line beside a phase, from the records that it writes."""

import io
import os
import time
import warnings
from contextlib import contextmanager

import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import CheckpointEvent, PhaseEvent, StepEvent
from ray_pipeline.monitoring.follow import Follower
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.monitoring.progress import Progress

PHASE = "phase1_unconditional"


@pytest.fixture
def config(tmp_path):
    config = parse_config({"output_dir": str(tmp_path), "phases": [{"name": PHASE, "epochs": 2}]})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    state = PhaseState(current_phase=PHASE)
    state.phase(PHASE).steps = 20
    state.save(tmp_path / "phase_state.json")
    return config


def train(run_dir, first, last, kind="epoch"):
    with EventLog(run_dir, PHASE, resume_step=first - 1) as log:
        log.emit(PhaseEvent(PHASE, "started", first - 1, "attempt 1", total_steps=20))
        for step in range(first, last + 1):
            log.emit(StepEvent(PHASE, step, 8 * step, 1, 1 / step, 1e-4, 0.5, 12.5, 0.01))
            if step == 10:
                log.emit(CheckpointEvent(PHASE, step, 1, "step_10", kind, 0.1, 0.2))


def test_the_end_of_a_phase_leaves_its_chart_and_the_one_of_a_kept_epoch(config, tmp_path):
    with Follower(config, PHASE, progress=False):
        train(tmp_path, 1, 20)
    names = {path.name for path in (tmp_path / "plots" / PHASE).iterdir()}
    assert names == {"latest_progress.png", "training_progress_step_00000010.png"}


def test_the_chart_of_a_kept_epoch_counts_into_the_pause_before_the_next_chart(config, tmp_path):
    with Follower(config, PHASE, progress=False) as follower:
        due_at = follower.due_at
        train(tmp_path, 1, 20)
        until = time.monotonic() + 60
        while not (tmp_path / "plots" / PHASE / "training_progress_step_00000010.png").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)
        assert follower.due_at > due_at
        assert not (tmp_path / "plots" / PHASE / "latest_progress.png").exists()


def test_only_a_kept_epoch_has_a_chart_that_stays(config, tmp_path):
    with Follower(config, PHASE, progress=False):
        train(tmp_path, 1, 20, kind="safety")
    assert [path.name for path in (tmp_path / "plots" / PHASE).iterdir()] == ["latest_progress.png"]


def test_a_picture_that_cannot_be_written_is_told_once_and_nothing_else(config, tmp_path):
    (tmp_path / "plots").write_text("in the way")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Follower(config, PHASE, progress=False):
            train(tmp_path, 1, 5)
    assert len([warning for warning in told if "the chart cannot be drawn" in str(warning.message)]) == 1


def wait_for_warning(told, words):
    until = time.monotonic() + 60
    while not any(words in str(warning.message) for warning in told):
        assert time.monotonic() < until
        time.sleep(0.05)


@contextmanager
def unreadable(path):
    """Within, a folder stands where a file was."""
    aside = path.with_suffix(".aside")
    os.replace(path, aside)
    path.mkdir()
    yield
    path.rmdir()
    os.replace(aside, path)


def test_records_that_cannot_be_read_for_a_while_are_followed_afterwards(config, tmp_path):
    train(tmp_path, 1, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Follower(config, PHASE, progress=False):
            with unreadable(tmp_path / "logs" / "metrics.jsonl"):
                wait_for_warning(told, "the records of the run cannot be read")
            train(tmp_path, 2, 20)
    assert len(told) == 1
    names = {path.name for path in (tmp_path / "plots" / PHASE).iterdir()}
    assert names == {"latest_progress.png", "training_progress_step_00000010.png"}


def test_a_state_that_cannot_be_read_for_a_while_delays_the_line_of_progress(config, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Follower(config, PHASE, progress=True):
            with unreadable(tmp_path / "phase_state.json"):
                train(tmp_path, 1, 1)
                wait_for_warning(told, "the line of progress cannot be shown")
            train(tmp_path, 2, 20)
    assert f"{PHASE}  step 20/20  100%" in capsys.readouterr().err
    assert (tmp_path / "plots" / PHASE / "latest_progress.png").exists()


def test_the_line_counts_to_the_steps_of_its_attempt_and_not_to_those_of_a_plan_before(config, tmp_path, capsys):
    state = PhaseState(current_phase=PHASE)
    state.phase(PHASE).steps = 10
    state.save(tmp_path / "phase_state.json")
    with Follower(config, PHASE, progress=True):
        train(tmp_path, 11, 20)
    assert f"{PHASE}  step 20/20  100%" in capsys.readouterr().err


def test_what_a_resume_has_cut_and_written_again_between_two_looks_is_not_missed(config, tmp_path):
    train(tmp_path, 1, 15, kind="safety")
    follower = Follower(config, PHASE, progress=False)
    train(tmp_path, 1, 20)  # cuts all of it, and is longer than what was known
    with follower:
        pass
    assert (tmp_path / "plots" / PHASE / "training_progress_step_00000010.png").exists()


def test_a_file_that_was_replaced_without_a_resume_tells_nothing_twice(config, tmp_path):
    train(tmp_path, 1, 20)
    follower = Follower(config, PHASE, progress=False)
    with EventLog(tmp_path, PHASE):  # takes away what a kill left of a line
        pass
    with follower:
        pass
    assert not (tmp_path / "plots").exists()


def test_the_line_is_ascii_and_tells_the_time_left_for_all_phases():
    clock = iter(range(100)).__next__
    stream = io.StringIO()
    with Progress(10, "phase\u00b5", stream=stream, min_seconds=0, later_units=30.0, clock=clock) as progress:
        progress.update(4, loss=0.5)
    assert stream.getvalue().isascii()
    first = stream.getvalue().splitlines()[0]
    assert "left 1.5s" in first
    assert "in all 9.0s" in first
