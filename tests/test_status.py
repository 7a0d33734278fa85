"""What `ray-pipeline status` says of a run."""

import math
from pathlib import Path

import pytest

from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import FaultEvent, StepEvent
from ray_pipeline.monitoring.metrics_file import MetricsReader, read_events
from ray_pipeline.run_copy import run_path
from ray_pipeline.status import describe_run, watch_run
from ray_pipeline.storage import Folder


@pytest.mark.parametrize(("gain", "error"), [(0.0, 0.0), (0.25, math.nan)], ids=["same in all tiles", "one tile"])
def test_a_hint_gain_without_a_standard_error_is_told_alone(half_run, gain, error):
    state = phase_state.load(half_run.state_file)
    for hint, standard_error in (("", 0.125), ("/canny", error)):
        state.phase("two").metrics |= {
            f"val_loss_right_hints{hint}": 0.5,
            f"val_loss_shuffled_hints{hint}": 0.5 + gain,
            f"hint_gain{hint}": gain,
            f"hint_gain_standard_error{hint}": standard_error,
        }
    state.save(half_run.state_file)
    text = describe_run(half_run.folder)
    assert f"shuffled {0.5 + gain:.4f}: gain {gain:.4f} = {gain / 0.125:.1f} paired standard errors" in text
    assert f"with canny alone, right 0.5000, shuffled {0.5 + gain:.4f}: gain {gain:.4f}\n" in text + "\n"


def test_a_validation_loss_of_0_at_the_start_has_no_ratio(half_run):
    state = phase_state.load(half_run.state_file)
    state.phase("two").baseline_val_loss = 0.0
    state.save(half_run.state_file)
    assert "at the start 0.0000\n" in describe_run(half_run.folder)


def test_what_was_not_measured_of_a_step_is_no_number(half_run):
    with EventLog(half_run.folder, "two") as log:
        log.emit(StepEvent("two", 3, 24, 1, 0.5, 1e-4, 0.5, 12.5, 0.125, step_seconds=0.5, compute_seconds=0.25))
    text = describe_run(half_run.folder)
    assert "data wait 25.0%, forward and backward 50.0%, optimizer not measured, " in text
    assert "model FLOP utilisation not measured, " in text
    assert "nan%" not in text


def test_watching_a_run_in_object_storage_keeps_one_copy_and_sees_what_changes(half_run, s3, tmp_path):
    remote = Folder(s3).child(tmp_path.name, "run")
    for name in ("config.yaml", "phase_state.json", "logs/metrics.jsonl"):
        remote.write(name, Path(half_run.folder, name).read_bytes())
    watched = watch_run(remote.location, 0.1)
    assert "two: running" in next(watched)
    copy = run_path(remote.location)
    state = phase_state.load(half_run.state_file)
    state.phase("two").status = "stopped"
    state.record("stopped", "two: stopped by hand")
    state.save(half_run.state_file)
    remote.write("phase_state.json", half_run.state_file.read_bytes())
    assert "two: stopped" in next(watched)
    assert run_path(remote.location) == copy
    assert not list(watched)
    assert not copy.exists()


def test_watching_parses_each_line_of_the_records_once(half_run, caplog):
    path = half_run.folder / "logs" / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b"no JSON\n")
    watched = watch_run(half_run.folder, 0.1)
    for _ in range(3):
        next(watched)
    assert caplog.text.count("is damaged and was left out") == 1


def test_a_reader_of_records_knows_what_was_appended_and_what_was_cut(half_run):
    reader = MetricsReader(half_run.folder)
    first = reader.events()
    assert first == read_events(half_run.folder)
    assert len(first) > 4
    for resume_step in (None, 0):  # appended; cut, and longer than before
        with EventLog(half_run.folder, "two", resume_step=resume_step) as log:
            for step in range(1, 100):
                log.emit(FaultEvent("two", step, "test", f"{resume_step} at {step}"))
        assert reader.events() == read_events(half_run.folder)
        assert reader.events()[-1]["message"] == f"{resume_step} at 99"
