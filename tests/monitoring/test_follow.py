"""Pictures and the progress line beside a phase, from the records that it writes."""

import io
import warnings

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
        log.emit(PhaseEvent(PHASE, "started", first - 1, "attempt 1"))
        for step in range(first, last + 1):
            log.emit(StepEvent(PHASE, step, 8 * step, 1, 1 / step, 1e-4, 0.5, 12.5, 0.01))
            if step == 10:
                log.emit(CheckpointEvent(PHASE, step, 1, "step_10", kind, 0.1, 0.2))


def test_the_end_of_a_phase_leaves_its_chart_the_one_of_a_kept_epoch_and_the_report(config, tmp_path):
    with Follower(config, PHASE, progress=False, report=True):
        train(tmp_path, 1, 20)
    names = {path.name for path in (tmp_path / "plots" / PHASE).iterdir()}
    assert names == {"latest_progress.png", "training_progress_step_00000010.png"}
    assert "newest 0.05 at step 20" in (tmp_path / "report.html").read_text()  # of the training loss


def test_only_a_kept_epoch_has_a_chart_that_stays_and_a_report_is_made_where_it_is_asked_for(config, tmp_path):
    with Follower(config, PHASE, progress=False, report=False):
        train(tmp_path, 1, 20, kind="safety")
    assert [path.name for path in (tmp_path / "plots" / PHASE).iterdir()] == ["latest_progress.png"]
    assert not (tmp_path / "report.html").exists()


def test_a_picture_that_cannot_be_written_is_told_once_and_nothing_else(config, tmp_path):
    (tmp_path / "plots").write_text("in the way")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Follower(config, PHASE, progress=False, report=False):
            train(tmp_path, 1, 5)
    assert len([warning for warning in told if "the chart cannot be drawn" in str(warning.message)]) == 1


def test_the_line_is_ascii_and_tells_the_time_left_for_all_phases():
    clock = iter(range(100)).__next__
    stream = io.StringIO()
    with Progress(10, "phase\u00b5", stream=stream, min_seconds=0, later_units=30.0, clock=clock) as progress:
        progress.update(4, loss=0.5)
    assert stream.getvalue().isascii()
    first = stream.getvalue().splitlines()[0]
    assert "left 1.5s" in first
    assert "in all 9.0s" in first
