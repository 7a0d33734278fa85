"""What rank 0 does about its checkpoints and records while the storage refuses, and what it keeps."""

import json
import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import full_disk
from phase_runs import make_phase_run

from ray_pipeline.attempts import Superseded
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.data.encode import STORED_TILES
from ray_pipeline.data.tile_table import TileRow, write_tile_table
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.retention import obsolete_names
from ray_pipeline.training.nonfinite import SkippedSteps, Trouble
from ray_pipeline.training.phase import finish_step
from ray_pipeline.training.pictures import draw_samples
from ray_pipeline.training.profiling import profiled
from ray_pipeline.training.records import PhaseRecords
from ray_pipeline.training.sample_log import SampleLog
from ray_pipeline.training.setup import Start
from ray_pipeline.training.step import StepInput, StepResult, avoid
from ray_pipeline.training.validation import Validation

MODEL = {
    "latent_size": 8, "architecture": "custom", "depth": 1, "hidden_size": 64, "num_heads": 2, "patch_size": 4,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, write_latents):
    """A phase of 4 epochs of 4 steps on one worker, under its first attempt, that keeps its epoch 2."""
    values = np.random.default_rng(5).normal(size=(16, 1, 1, 4, 8, 8)).astype(np.float16)
    store = write_latents(tmp_path / "store", values)
    config = parse_config({
        "phases": [{"name": "prior", "epochs": 4, "epochs_to_save": [2]}],
        "model": MODEL,
        "data": {"tile_size": 64},
        "train": {"batch_size": 4, "global_batch": 4, "precision": "fp32"},
        "monitoring": {"tensorboard": False, "plot_loss": False, "plot_lr": False, "plot_samples": False},
        "checkpoint": {"every_minutes": None},
        "ema": {"power_stds": []},
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    checkpoints = CheckpointStore(config.checkpoint_store)
    attempt = checkpoints.begin("prior", 1)
    attempt.update(start_step=0)
    return make_phase_run(config, store, checkpoints=checkpoints, start=Start(attempt=attempt.number))


def validated(records, loss):
    """An epoch's validation with this loss; whether it is the best so far."""
    return records.validation(Validation(np.full((2, 1), loss), torch.tensor([1.0])), epoch_end=True)


def committed(run):
    return [run.checkpoints.load(name).state["step"] for name in run.checkpoints.names("prior")]


def told(run, event):
    return read_events(run.config.output_dir, "prior", event)


def test_only_the_epochs_to_save_the_best_and_the_last_are_kept(run):
    with PhaseRecords(run) as records:
        for epoch, loss in ((1, 0.5), (2, 0.7), (3, 0.8), (4, 0.9)):
            run.state.step = 4 * epoch
            assert validated(records, loss) == (epoch == 1)
            records.save("epoch" if epoch == 2 else "last", epoch=epoch)
            assert records.commits.saver.drain(60)
            records.after_step(save=False)
        assert committed(run) == [4, 8, 16]
        assert records.progress.best.epoch == 1
        assert records.progress.last == "prior_epoch_004.ckpt"


@pytest.mark.parametrize("again", [2, 3], ids=["whose epoch came again", "of another epoch"])
def test_what_a_kill_left_of_a_checkpoint_goes_and_one_saved_again_in_its_place_stays(run, again):
    left = Path(run.checkpoints.path("prior_epoch_002.ckpt"))
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    with PhaseRecords(run) as records:
        for epoch in range(again, 5):
            run.state.step = 4 * epoch
            records.save("epoch" if epoch == 2 else "last", epoch=epoch)
        assert records.commits.saver.drain(60)
        records.after_step(save=False)
        assert committed(run) == ([8, 16] if again == 2 else [16])
        assert left.exists() == (again == 2)


def test_a_checkpoint_saved_again_while_what_a_kill_left_of_it_is_taken_away_is_known_and_goes_in_its_turn(run):
    left = Path(run.checkpoints.path("prior_epoch_001.ckpt"))
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    with PhaseRecords(run) as records:
        run.state.step = 3
        records.save("safety")  # takes away what was left
        run.state.step = 4
        assert validated(records, 0.9)
        records.save("best", epoch=1)  # asked for before it has
        assert records.commits.saver.drain(60)
        records.after_step(save=False)
        assert records.progress.best.epoch == 1
        run.state.step = 8
        assert validated(records, 0.5)
        records.save("epoch", epoch=2)
        assert records.commits.saver.drain(60)
        assert committed(run) == [8]


def test_a_loss_that_is_not_finite_is_never_the_best(run):
    with PhaseRecords(run) as records:
        run.state.step = 4
        assert not validated(records, math.nan)
        records.save("last", epoch=1)
        run.state.step = 8
        assert validated(records, 0.9)
        assert records.commits.saver.drain(60)


def test_what_is_kept_of_saves_that_end_no_epoch_is_the_newest():
    phase = parse_config({"phases": [{"name": "p", "epochs": 4, "epochs_to_save": [2]}]}).phases[0]
    states = {
        "p_epoch_001.ckpt": {"kind": "best", "val_loss": 0.5, "step": 4, "epoch": 1, "skipped": []},
        "p_step_00000006.ckpt": {"kind": "safety", "val_loss": 0.1, "step": 6, "epoch": 2, "skipped": []},
        "p_epoch_002.ckpt": {"kind": "epoch", "val_loss": 0.7, "step": 8, "epoch": 2, "skipped": []},
        "p_step_00000010.ckpt": {"kind": "stop", "val_loss": 0.2, "step": 10, "epoch": 3, "skipped": []},
    }
    assert obsolete_names(phase, states, "p_step_00000010.ckpt") == ("p_step_00000006.ckpt",)
    # that before a step which was skipped lately: the run may have to go back to it
    states["p_step_00000010.ckpt"]["skipped"] = [7]
    assert obsolete_names(phase, states, "p_step_00000010.ckpt") == ()
    states["p_step_00000010.ckpt"] |= {"step": 107, "skipped": [7]}
    assert obsolete_names(phase, states, "p_step_00000010.ckpt") == ("p_step_00000006.ckpt",)


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_the_disk_is_full_and_nothing_committed_is_lost(run, background):
    run.config = run.config.model_copy(
        update={"checkpoint": run.config.checkpoint.model_copy(update={"background": background})}
    )
    with PhaseRecords(run) as records:
        run.state.step = 4
        validated(records, 0.9)
        records.save("best", epoch=1)
        assert records.commits.saver.drain(60)
        records.after_step(save=False)
        with full_disk():
            run.state.step = 6
            records.save("safety")
            records.commits.saver.drain(0.5)
            records.after_step(save=False)
            assert committed(run) == [4]
        faults = told(run, "fault")
        assert [record["kind"] for record in faults] == ["save"]
        assert "prior_step_00000006.ckpt" in faults[0]["message"]
        assert "File too large" in faults[0]["message"]
        run.state.step = 16
        records.finish()
    assert committed(run)[-1] == 16
    assert 4 in committed(run)
    assert phase_state.load(Path(run.config.output_dir, "phase_state.json")).phase("prior").status == "finished"


def test_the_best_checkpoint_outlives_a_better_one_that_was_refused(run):
    """Saves that come while one is being written, or is refused, are all committed, in their order."""
    with PhaseRecords(run) as records:
        run.state.step = 4
        validated(records, 0.9)
        records.save("best", epoch=1)
        assert records.commits.saver.drain(60)
        with full_disk():
            run.state.step = 12
            validated(records, 0.5)
            records.save("best", epoch=3)
            records.commits.saver.drain(0.5)
            for step in (13, 14):
                run.state.step = step
                records.save("safety")
            assert committed(run) == [4]
        assert records.commits.saver.drain(60)
        records.after_step(save=False)
        assert committed(run) == [12, 14]
        assert records.progress.best.epoch == 3


def test_a_step_is_not_saved_twice(run):
    with PhaseRecords(run) as records:
        run.state.step = 4
        validated(records, 0.9)
        records.save("best", epoch=1)
        records.after_step(save=True)
        assert records.commits.saver.drain(60)
        assert committed(run) == [4]


def test_a_sample_log_that_a_full_disk_refused_is_written_once_there_is_room(run, caplog):
    def takes(steps):
        for step in steps:
            log.add(StepInput(step, np.arange(100), ()))

    with SampleLog(run) as log:
        with full_disk():
            takes(range(100))
        assert caplog.text.count("cannot be written") == 1
        takes([100])
    lines = log.lines.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 102))


def test_a_sample_log_that_cannot_be_mended_is_given_up_with_one_warning(run, caplog):
    """A device that is always full refuses to be cut, too."""
    path = Path(run.config.output_dir, "logs", "samples", "prior", "attempt_000001_rank_0.jsonl")
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    with SampleLog(run) as log:
        for step in range(3):
            log.add(StepInput(step, np.arange(100), ()))
    assert caplog.text.count("ends before step 1:") == 1
    assert caplog.text.count("ends before step") == 1


def test_a_trace_that_cannot_be_written_is_a_fault_and_no_reason_to_stop(run):
    run.job = replace(run.job, profile=True)
    folder = Path(run.config.output_dir, "logs", "profile")
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with PhaseRecords(run) as records, profiled(run, records.draw) as trace_step:
        for _ in range(8):
            torch.ones(2).sum()
            trace_step()
    (fault,) = told(run, "fault")
    assert "the trace of the profiler cannot be made: FileExistsError" in fault["message"]


def test_records_that_a_full_disk_refused_are_written_once_there_is_room(run):
    with PhaseRecords(run) as records:
        run.state.step = 2
        with full_disk():
            for number in range(200):
                records.fault("test", f"message {number} " + "x" * 200)
        records.fault("test", "the last one")
    messages = [record["message"].split(" x")[0] for record in told(run, "fault")]
    expected = [f"message {number}" for number in range(200)] + ["the last one"]
    assert [words for words in messages if "phase_state.json" not in words] == expected
    for line in Path(run.config.output_dir, "logs", "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_stop_commits_the_step_it_is_at_and_no_step_twice(run):
    with PhaseRecords(run) as records:
        run.state.step = 3
        records.stop("SIGTERM")
        assert committed(run) == [3]
        records.stop("SIGTERM")
        assert committed(run) == [3]
    state = phase_state.load(Path(run.config.output_dir, "phase_state.json"))
    assert state.phase("prior").status == "stopped"
    assert "stopped after step 3 of 16 (SIGTERM)" in state.history[-1].message


HANGING = """
import time

class Hanging:
    def __init__(self, context):
        pass
    def emit(self, event):
        time.sleep(3600)
    def close(self):
        pass
"""


@pytest.mark.parametrize("asked", [True, False], ids=["a stop", "going back"])
def test_who_waits_for_a_stop_does_not_wait_long_for_a_sink_that_hangs(run, tmp_path, monkeypatch, asked):
    """Which may take 30 s at a phase's own end."""
    info = tmp_path / "site" / "hanging-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "hanging_sink.py").write_text(HANGING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ray_pipeline.sinks]\nhanging = hanging_sink:Hanging\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    settings = run.config.monitoring.model_copy(update={"sinks": ("hanging",)})
    timeout = run.config.ray.model_copy(update={"stop_timeout_seconds": 8.0})
    run.config = run.config.model_copy(update={"monitoring": settings, "ray": timeout})
    with PhaseRecords(run) as records:
        run.state.step = 3
        if asked:
            records.stop("SIGTERM")
        else:
            (skipped := SkippedSteps(run)).add(StepResult(math.inf, math.nan, skipped=True))
            records.skip(skipped, Trouble(3, 3, False, "report.json"))
        began = time.monotonic()
    assert 1 < time.monotonic() - began < 8
    state = phase_state.load(records.state_file)
    assert state.phase("prior").status == ("stopped" if asked else "starting")
    assert "monitoring by hanging is switched off" in state.history[-1].message
    assert "2 s after the phase ended" in state.history[-1].message


def test_a_superseded_worker_writes_neither_checkpoint_nor_state(run):
    with PhaseRecords(run) as records:
        run.state.step = 3
        before = Path(run.config.output_dir, "phase_state.json").read_bytes()
        CheckpointStore(run.config.checkpoint_store).begin("prior", 1)
        with pytest.raises(Superseded):
            records.stop("SIGTERM")
    assert committed(run) == []
    assert Path(run.config.output_dir, "phase_state.json").read_bytes() == before


def test_what_earlier_attempts_left_behind_goes_with_the_first_commit(run):
    folder = Path(run.checkpoints.path("prior_step_00000002"))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half of it")
    with PhaseRecords(run) as records:
        assert folder.exists()
        run.state.step = 4
        records.save("safety")
        assert records.commits.saver.drain(60)
    assert not folder.exists()
    assert committed(run) == [4]


def test_a_sink_that_cannot_be_opened_is_a_fault_of_the_run_and_nothing_more(run):
    """A file stands where TensorBoard's folder would be."""
    Path(run.config.output_dir, "logs").mkdir(parents=True)
    Path(run.config.output_dir, "logs", "tensorboard").write_text("in the way")
    settings = run.config.monitoring.model_copy(update={"tensorboard": True})
    run.config = run.config.model_copy(update={"monitoring": settings})
    with PhaseRecords(run) as records:
        until = time.monotonic() + 60
        while not told(run, "fault") and time.monotonic() < until:
            records.note_step()
            time.sleep(0.05)
    (fault,) = told(run, "fault")
    assert fault["kind"] == "monitoring"
    assert "monitoring by tensorboard is switched off" in fault["message"]
    assert "monitoring by tensorboard" in phase_state.load(records.state_file).history[-1].message


def test_a_step_that_an_earlier_attempt_left_out_is_no_second_fault(run):
    rows = [TileRow(f"tile{row}", f"tile{row}.tif", {}) for row in range(16)]
    write_tile_table(run.train_store.folder, STORED_TILES, rows, run.train_store.datasets)
    run.state.step = 3
    run.state.skipped.append(3)
    with suppress(KeyboardInterrupt), PhaseRecords(run) as records:
        skipped = SkippedSteps(run)
        assert skipped.add(StepResult(math.inf, math.nan, skipped=True, suspects=(9,))) is None
        records.skip(skipped, None)
        raise KeyboardInterrupt  # the kill
    (fault,) = told(run, "fault")
    assert (fault["step"], fault["kind"]) == (3, "skip")
    assert "its loss is inf" in fault["message"]
    report = skipped.path.read_bytes()

    attempt = run.checkpoints.begin("prior", 1)
    run.start = Start(attempt=attempt.number, avoid=frozenset({3}))
    run.state.step = 0
    run.state.skipped.clear()
    with PhaseRecords(run) as records:
        skipped = SkippedSteps(run)
        assert skipped.add(avoid(run, 2)) is None
        records.skip(skipped, None)
    assert [record["kind"] for record in told(run, "fault")] == ["skip", "restart"]
    assert skipped.path.read_bytes() == report
    assert run.checkpoints.attempts()[-1].skipped == (3,)


def with_pictures(run, autoencoder):
    """The same run, that draws after every epoch; writes its checkpoints before it goes on."""
    config = run.config
    run.config = config.model_copy(
        update={
            "vae": config.vae.model_copy(update={"pretrained": str(autoencoder)}),
            "monitoring": config.monitoring.model_copy(update={"plot_samples": True, "sample_every_n_epochs": 1}),
            "checkpoint": config.checkpoint.model_copy(update={"background": False}),
        }
    )
    return run


def test_a_picture_that_cannot_be_made_costs_no_checkpoint_and_is_a_fault(run, tmp_path):
    """The autoencoder is gone, which is no OSError."""
    with_pictures(run, tmp_path / "no_autoencoder")
    with PhaseRecords(run) as records:
        for epoch in (1, 2):
            run.state.step = 4 * epoch
            finish_step(run, records)
        assert committed(run)[-1] == 8
    (fault,) = told(run, "fault")
    assert fault["kind"] == "picture"
    assert "samples cannot be made: UserError" in fault["message"]
    events = [record["event"] for record in read_events(run.config.output_dir, "prior")]
    assert events.index("checkpoint") < events.index("fault")


def test_a_network_whose_sampling_failed_trains_on(run, tiny_autoencoder):
    with_pictures(run, tiny_autoencoder)
    network = run.state.network

    def no_memory(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = network.register_forward_pre_hook(no_memory)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with PhaseRecords(run) as records:
        records.draw("samples", lambda: draw_samples(run, records.events, 1))
    hook.remove()
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())  # not the averages
    (fault,) = told(run, "fault")
    assert "RuntimeError: CUDA out of memory" in fault["message"]
