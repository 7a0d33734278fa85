"""A run in object storage: what one process writes, others see; what the storage refuses comes later or is said."""

import shutil
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest

from ray_pipeline import run_copy
from ray_pipeline.errors import UserError
from ray_pipeline.estimate import check_writable
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import FaultEvent, PhaseEvent, StepEvent
from ray_pipeline.monitoring.metrics_file import copy_records, metrics_files, read_events
from ray_pipeline.run_copy import WorkingCopy, guard, location_of, reading_copy, refresh, run_path, share, working_copy
from ray_pipeline.storage import Folder, StorageError


@pytest.fixture
def uri(s3, tmp_path):
    """Location of a run of the test's own."""
    return Folder(s3).child(tmp_path.name, "run").location


def step(number, loss=1.0):
    return StepEvent("one", number, 8 * number, 1, loss, 1e-4, 1.0, 1.0, 0.0)


@contextmanager
def elsewhere(location):
    """The copy that another process would have."""
    with TemporaryDirectory() as folder:
        copy = WorkingCopy(Folder(location), Path(folder), follow=True)
        copy.pull()
        yield copy


def wait_until(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def told(location):
    with elsewhere(location) as copy:
        return [(record["event"], record["step"]) for record in read_events(copy.folder)]


def test_a_local_run_is_its_own_folder(tmp_path):
    with working_copy(tmp_path / "run"):
        assert run_path(tmp_path / "run", "logs") == tmp_path / "run" / "logs"
    assert location_of(tmp_path) == str(tmp_path)


def test_what_is_written_changed_and_deleted_reaches_the_storage(uri):
    with working_copy(uri):
        path = run_path(uri, "plots", "one", "chart.png")
        assert location_of(path) == Folder(uri).child("plots", "one", "chart.png").location
        path.parent.mkdir(parents=True)
        path.write_bytes(b"first")
        run_path(uri, "gone.txt").write_bytes(b"x")
        run_path(uri, ".hidden").write_bytes(b"x")
        share(uri)
        assert Folder(uri).child("plots", "one").read("chart.png") == b"first"
        path.write_bytes(b"again")
        run_path(uri, "gone.txt").unlink()
    assert not path.exists()
    assert list(Folder(uri).tree()) == ["plots/one/chart.png"]
    assert Folder(uri).child("plots", "one").read("chart.png") == b"again"


def test_a_location_below_is_found_in_the_copy_of_the_whole(uri):
    below = Folder(uri).child("sweep", "trial_000").location
    with working_copy(uri):
        with working_copy(below):
            assert run_path(below, "x") == run_path(uri, "sweep", "trial_000", "x")
        with pytest.raises(RuntimeError, match="has no copy on this machine"):
            run_path(Folder(uri).parent.child("other").location)


def test_another_process_sees_what_was_shared_even_within_a_second(uri):
    with working_copy(uri), elsewhere(uri) as other:
        seen = []
        for text in (b"one", b"two", b"six"):  # of one size, and the times of the storage are whole seconds
            run_path(uri, "phase_state.json").write_bytes(text)
            share(uri)
            other.pull()
            seen.append((other.folder / "phase_state.json").read_bytes())
        assert seen == [b"one", b"two", b"six"]
    with working_copy(uri, follow=True):
        mine = run_path(uri, "phase_state.json")
        for text in (b"new", b"old", b"now"):
            Folder(uri).write("phase_state.json", text)
            refresh(uri)
            assert mine.read_bytes() == text
        mine.write_bytes(b"mine")  # changed on both sides: what this process wrote stands
        Folder(uri).write("phase_state.json", b"other")
        refresh(uri)
        assert (mine.read_bytes(), Folder(uri).read("phase_state.json")) == (b"mine", b"mine")
        Folder(uri).remove(["phase_state.json"])
        refresh(uri)
        assert not mine.exists()


def test_a_file_that_no_longer_changes_is_read_no_more(uri, s3_server):
    """Not even the newest: no later one tells that it is old."""
    Folder(uri).write("report.html", b"done")
    with elsewhere(uri) as other:
        time.sleep(3.1)
        other.pull()  # read when it was new, it might have changed since within the same second
        before = len(s3_server.requests)
        other.pull()
        assert not [path for method, path, _ in s3_server.requests[before:] if path.endswith("report.html")]
        Folder(uri).write("report.html", b"again")
        other.pull()
        assert (other.folder / "report.html").read_bytes() == b"again"


def test_checkpoints_and_averages_are_left_where_they_are(uri):
    for folder in ("checkpoints", "ema_snapshots", "logs"):
        Folder(uri).child(folder).write("model.safetensors", b"large")
    with working_copy(uri), reading_copy(uri) as folder:
        assert folder == run_path(uri)
    with reading_copy(uri) as folder:
        assert [path.parent.name for path in folder.rglob("*.safetensors")] == ["logs"]
    with reading_copy(uri, averages=True) as folder:
        assert sorted(path.parent.name for path in folder.rglob("*.safetensors")) == ["ema_snapshots", "logs"]


def test_each_attempt_has_a_segment_and_readers_see_each_step_once(uri):
    with working_copy(uri), EventLog(run_path(uri), "one", resume_step=-1) as events:
        for number in (1, 2, 3):
            events.emit(step(number))
        events.emit(FaultEvent("one", 3, "skip", "words"))
    with working_copy(uri), EventLog(run_path(uri), "one", resume_step=2) as events:
        events.emit(PhaseEvent("one", "resumed", 2, "words"))
        events.emit(step(3, loss=0.5))
        share(uri)
        expected = [("step", 1), ("step", 2), ("fault", 3), ("phase", 2), ("step", 3)]
        assert told(uri) == expected
    assert Folder(uri).child("logs", "metrics").names() == ["000001.jsonl", "000002.jsonl"]
    assert told(uri) == expected


def test_what_a_superseded_attempt_still_writes_is_cut_away(uri):
    with working_copy(uri), EventLog(run_path(uri), "one", resume_step=-1) as events:
        events.emit(step(1))
        first = metrics_files(run_path(uri))[0].read_bytes()
    with working_copy(uri), EventLog(run_path(uri), "one", resume_step=1) as events:
        events.emit(step(2, loss=0.5))
    line = first.splitlines(keepends=True)[-1].replace(b'"step": 1', b'"step": 2')
    Folder(uri).child("logs", "metrics").write("000001.jsonl", first + line + line[:20])
    assert told(uri) == [("step", 1), ("step", 2)]
    with reading_copy(uri) as folder:
        assert read_events(folder)[-1]["loss"] == 0.5


def test_a_superseded_process_gives_nothing_but_the_log_of_what_it_took(uri):
    with working_copy(uri):
        state, samples = run_path(uri, "phase_state.json"), run_path(uri, "logs", "samples", "one", "rank_0.jsonl")
        samples.parent.mkdir(parents=True)
        state.write_bytes(b"old")
        share(uri)
        Folder(uri).write("phase_state.json", b"of the attempt after it")
        guard(uri, lambda: True)
        for path in (state, samples, run_path(uri, "late.png")):
            path.write_bytes(b"late")
    assert Folder(uri).read("phase_state.json") == b"of the attempt after it"
    assert sorted(Folder(uri).tree()) == ["logs/samples/one/rank_0.jsonl", "phase_state.json"]


def test_records_of_a_trial_become_the_runs(uri):
    trial = Folder(uri).child("sweep", "trial_000").location
    with working_copy(trial), EventLog(run_path(trial), "one", resume_step=-1) as events:
        for number in (1, 2, 3):
            events.emit(step(number))
    with working_copy(uri):
        copy_records(run_path(trial), run_path(uri), "one", 2)
        assert [record["step"] for record in read_events(run_path(uri))] == [1, 2]
    assert told(uri) == [("step", 1), ("step", 2)]


def test_a_bucket_that_is_not_there_is_named(s3_server, aws_environment):
    missing = f"s3://nowhere/run?endpoint_override={quote(s3_server.endpoint, safe='')}"
    with pytest.raises(UserError, match=r"^output_dir=s3://nowhere/run.*: there is no such bucket; create it"):
        check_writable(missing, "output_dir")


@pytest.mark.filterwarnings("ignore:the records of the run are behind")
def test_what_the_storage_never_takes_is_an_error(s3_server, aws_environment):
    missing = f"s3://nowhere/run?endpoint_override={quote(s3_server.endpoint, safe='')}"
    with pytest.raises(StorageError, match=r"s3://nowhere/run/x cannot be used"), working_copy(missing):
        run_path(missing, "x").write_bytes(b"x")


@pytest.mark.filterwarnings("ignore:the records of the run are behind")
def test_a_storage_that_refuses_for_a_while_gets_all_of_it_in_the_end(s3_server, aws_environment):
    name = f"later{time.time_ns()}"
    bucket = f"s3://{name}?endpoint_override={quote(s3_server.endpoint, safe='')}"
    timer = threading.Timer(4.0, lambda: s3_server.make_bucket(name))
    with working_copy(bucket, empty=True):
        run_path(bucket, "late.txt").write_bytes(b"late")
        timer.start()
    timer.join()
    assert Folder(bucket).read("late.txt") == b"late"


def test_folders_that_are_deleted_while_they_are_listed_are_no_error(s3, tmp_path):
    """As TensorBoard's, which are written anew."""
    copy, ended = WorkingCopy(Folder(s3).child(tmp_path.name), tmp_path, follow=False), threading.Event()

    def make_and_delete() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / "logs" / "trials" / str(number)).mkdir(parents=True)
            shutil.rmtree(tmp_path / "logs")

    thread = threading.Thread(target=make_and_delete)
    thread.start()
    try:
        for _ in range(500):
            copy.push()
    finally:
        ended.set()
        thread.join()


def test_what_this_machine_does_not_take_is_told_and_comes_once_it_does(uri, monkeypatch):
    monkeypatch.setattr(run_copy, "_PAUSE_SECONDS", 0.1)
    with working_copy(uri, follow=True), warnings.catch_warnings(record=True) as told:
        obstacle = run_path(uri, ".plots")  # a file where a folder must come; as hidden, itself nobody's
        obstacle.write_bytes(b"")
        Folder(uri).child(".plots").write("chart.png", b"picture")
        wait_until(lambda: told)
        assert "records of the run are behind" in str(told[0].message)
        with pytest.raises(StorageError, match=r"chart\.png cannot be used \(File exists\)"):
            refresh(uri)
        obstacle.unlink()
        wait_until((obstacle / "chart.png").is_file)


def test_a_copy_that_was_deleted_deletes_nothing_in_the_storage(uri):
    Folder(uri).write("phase_state.json", b"{}")
    with elsewhere(uri) as copy:
        shutil.rmtree(copy.folder)
        with pytest.raises(
            StorageError, match=rf"^{copy.folder}, the copy of s3://\S+/run on this machine, was deleted"
        ):
            copy.push()
        copy.folder.mkdir()
    assert Folder(uri).read("phase_state.json") == b"{}"
