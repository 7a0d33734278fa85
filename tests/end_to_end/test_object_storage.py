"""A run whose output lies in object storage alone, on workers that are killed, equals one on a local disk."""

import json
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_pipeline import pipeline
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import load_config
from ray_pipeline.inference.prior import load_network
from ray_pipeline.monitoring.metrics_file import metrics_files, read_events
from ray_pipeline.monitoring.plots import panels
from ray_pipeline.run_copy import reading_copy
from ray_pipeline.status import describe_run
from ray_pipeline.storage import Folder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from run_proof import differing, last_tensors
from small_run import TRAIN_WORKER, descendants, prepare

PHASE, STEPS = "phase1_unconditional", 9
ONE_PHASE = "phases=[{name: phase1_unconditional, epochs: 6}]"


@pytest.fixture(scope="module")
def runs(ray_cluster, s3, tmp_path_factory) -> tuple[str, str]:
    """Locations of an undisturbed run on the local disk, and of one on S3 whose worker was killed behind its first
    checkpoint."""
    work = tmp_path_factory.mktemp("object_storage")
    path, _ = prepare(work, 4, (6, 1))
    settings = [ONE_PHASE, "ray.max_failures=3", "monitoring.tensorboard=true", "monitoring.plot_samples=true"]
    local, remote = str(work / "local"), Folder(s3).child(work.name, "run").location
    pipeline.train(load_config(path, [f"output_dir={local}", *settings]), say=lambda words: None)
    killed: list[int] = []

    def kill() -> None:
        while not CheckpointStore(f"{Folder(remote).child('checkpoints')}").names(PHASE):
            time.sleep(0.02)
        for worker in descendants(psutil.Process(), TRAIN_WORKER):
            worker.kill()
            killed.append(worker.pid)

    threading.Thread(target=kill, daemon=True).start()
    pipeline.train(load_config(path, [f"output_dir={remote}", *settings]), resume="auto", say=lambda words: None)
    assert killed
    return local, remote


def test_its_checkpoints_are_those_of_an_undisturbed_run_bit_for_bit(runs):
    local, remote = (last_tensors(Folder(run).child("checkpoints").location, PHASE) for run in runs)
    assert local
    assert differing(local, remote) == []


def test_its_records_are_one_curve_without_a_gap_or_a_repetition(runs):
    with reading_copy(runs[1]) as folder:
        steps = read_events(folder, PHASE, "step")
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        assert [e["status"] for e in read_events(folder, PHASE, "phase")][-2:] == ["resumed", "finished"]
        board = EventAccumulator(str(folder / "logs" / "tensorboard" / PHASE)).Reload()
        assert [(point.step, pytest.approx(point.value)) for point in board.Scalars("train/loss")] == [
            (record["step"], record["loss"]) for record in steps
        ]
    assert len(Folder(runs[1]).child("logs", "metrics").names()) == 2


def test_its_charts_are_one_curve_with_a_mark_where_it_was_resumed(runs):
    with reading_copy(runs[1]) as folder:
        records = read_events(folder, PHASE)
        segment, *_ = metrics_files(folder)[1].read_text().splitlines()  # which says what it cuts away
    resumed = json.loads(segment)["resume_step"]
    drawings = panels(records)
    for name in ("training loss", "learning rate", "gradient norm", "throughput and wait for data"):
        axis = Figure().subplots()
        drawings[name](axis, epochs=False)
        curve, *others = (list(line.get_xdata()) for line in axis.get_lines())
        assert curve == list(range(1, STEPS + 1)), name
        assert [resumed, resumed] in others, name


def test_everything_else_of_a_run_is_there_and_can_be_used(runs):
    _, remote = runs
    files = set(Folder(remote).tree())
    assert {"config.yaml", "phase_state.json", "report.html", f"plots/{PHASE}/latest_progress.png"} <= files
    assert f"samples/{PHASE}/samples_epoch_006.png" in files
    assert f"step {STEPS}/{STEPS} (100%), epoch 6/6" in describe_run(remote)
    assert load_network(remote).header.step == STEPS
    assert b"ray_pipeline_run_" not in Folder(remote).read("report.html")  # the folder of a copy


def test_no_file_of_a_run_holds_a_secret_of_the_environment(runs):
    for run in runs:
        folder = Folder(run)
        held = {name: folder.read(name) for name in folder.tree()}
        assert any(name.endswith("state.json") for name in held)
        assert [name for name, data in held.items() if b"planted-" in data] == []
