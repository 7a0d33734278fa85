"""A run that ends otherwise than planned says so in its files."""

import subprocess
import sys

import pytest

from ray_pipeline.attempts import Superseded
from ray_pipeline.errors import RunStopped, UserError
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.ending import ending_noted
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.resume import open_run
from ray_pipeline.status import watch_run


def end(run, error, phase=None):
    with pytest.raises(type(error)), ending_noted(run.config, phase):
        raise error


def test_an_error_leaves_a_status_an_entry_in_the_history_and_a_fault(half_run):
    end(half_run, RuntimeError("training stopped: rank 0: Traceback:\nCUDA out of memory"), "two")
    state = phase_state.load(half_run.state_file)
    assert [progress.status for progress in state.phases.values()] == ["finished", "failed"]
    assert state.history[-1].event == "failed"
    (fault,) = read_events(half_run.folder, "two", "fault")
    assert state.history[-1].message == "two, step 3: CUDA out of memory"
    assert fault["message"] == "RuntimeError: training stopped: rank 0: Traceback:\nCUDA out of memory"
    assert (fault["kind"], fault["step"]) == ("failed", 3)


def test_an_error_is_told_once_though_it_passes_two_places(half_run):
    with pytest.raises(UserError), ending_noted(half_run.config), ending_noted(half_run.config, "two"):
        raise UserError("the workers found no place")
    assert [fault["message"] for fault in read_events(half_run.folder, "two", "fault")] == [
        "the workers found no place"
    ]


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (RunStopped("stopped by SIGTERM before the workers had committed", 143), "before the workers had committed"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
    ],
    ids=["of the workers", "Ctrl-C"],
)
def test_a_stop_that_the_workers_did_not_write_down_is_no_fault(half_run, stop, words):
    end(half_run, stop, "two")
    state = phase_state.load(half_run.state_file)
    assert state.phase("two").status == "stopped"
    assert state.history[-1].message.endswith(words)
    assert not read_events(half_run.folder, "two", "fault")


ENCODING = """
import sys, time
from ray_pipeline.config import load_config
from ray_pipeline.monitoring.ending import ending_noted
from ray_pipeline.ray_session import ray_session

config = load_config(sys.argv[1])
with ending_noted(config), ray_session(config.ray):
    print("started", flush=True)
    time.sleep(3000)
"""


def test_sigterm_before_the_workers_train_leaves_the_run_stopped(half_run):
    """Ray's own processes and handler are there."""
    start = open_run(half_run.config, resume=True)
    start.accept("f" * 64)
    program = [sys.executable, "-c", ENCODING, half_run.folder / "config.yaml"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        assert phase_state.load(half_run.state_file).phase("two").status == "running"
        process.terminate()
        assert process.wait(60) == 143
    state = phase_state.load(half_run.state_file)
    assert state.phase("two").status == "stopped"
    assert state.history[-1].message == "two, step 3: stopped by SIGTERM"


def test_what_ended_a_run_is_raised_though_it_cannot_be_written_down(half_run):
    half_run.state_file.unlink()
    half_run.state_file.mkdir()
    with pytest.warns(UserWarning, match=r"how the run ended could not be written down: .*phase_state\.json"):
        end(half_run, RuntimeError("CUDA out of memory"), "two")


def test_a_superseded_run_leaves_the_files_to_the_one_that_goes_on(half_run):
    before = half_run.state_file.read_bytes()
    end(half_run, Superseded("attempt 1 was superseded by attempt 2"), "two")
    assert half_run.state_file.read_bytes() == before
    assert not read_events(half_run.folder, "two", "fault")


def test_a_start_that_failed_before_it_trained_can_be_made_again(make_run):
    run = make_run()
    end(run, UserError("the workers found no place"))
    assert phase_state.load(run.state_file).phase("one").status == "failed"
    assert not open_run(run.config, resume=False).begun


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_watching_ends_with_the_run_and_not_while_another_command_goes_on_with_it(half_run, status):
    error = RuntimeError("CUDA out of memory") if status == "failed" else RunStopped("stopped by SIGTERM", 143)
    end(half_run, error, "two")
    (text,) = watch_run(half_run.folder, 0.1)
    assert f"two: {status}" in text
    start = open_run(half_run.config, resume=True)
    start.accept("f" * 64)
    watched = watch_run(half_run.folder, 0.1)
    assert "two: starting" in next(watched)
    assert "two: starting" in next(watched)
    end(half_run, error, "two")
    assert len(list(watched)) <= 2
