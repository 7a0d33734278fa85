"""Snapshots of the power-function averages: as often as asked for, in half precision, beside the checkpoints."""

import numpy as np
import pytest
import torch
from phase_runs import make_phase_run

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.models.weights import load_weights_file
from ray_pipeline.training.phase import finish_step
from ray_pipeline.training.records import PhaseRecords
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.snapshots import snapshot_is_due
from ray_pipeline.training.step import micro_batches, optimize

MODEL = {"architecture": "custom", "latent_size": 8, "depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
GLOBAL_BATCH = 4
EMA = {"decay": 0.9, "start_step": 0, "power_stds": [0.05, 0.1]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("total", [16, 17, 31, 32, 100, 1000, 1601, 12_345])
def test_there_are_as_many_as_asked_for_and_the_last_step_is_one(total):
    due = [step for step in range(1, total + 1) if snapshot_is_due(step, total, 16)]
    assert len(due) == 16
    assert due[-1] == total
    # at equal distances, but for a step
    np.testing.assert_allclose(np.diff([0, *due]), total / 16, atol=1)


@pytest.mark.parametrize("total", range(1, 16))
def test_of_fewer_steps_all_are_stored(total):
    assert all(snapshot_is_due(step, total, 16) for step in range(1, total + 1))


@pytest.mark.parametrize("total", [1, 15, 16, 1000])
def test_a_count_of_0_stores_none_and_of_1_the_last(total):
    assert not any(snapshot_is_due(step, total, 0) for step in range(1, total + 1))
    assert [step for step in range(1, total + 1) if snapshot_is_due(step, total, 1)] == [total]


@pytest.fixture
def make_run(tmp_path, write_latents):
    """(**ema settings) -> a run of one process in <tmp>/run."""
    values = np.random.default_rng(5).normal(size=(16, 1, 1, 4, 8, 8)).astype(np.float16)
    store = write_latents(tmp_path / "store", values)

    def make(**ema) -> PhaseRun:
        config = parse_config({
            "phases": [{"name": "prior", "epochs": 4, "epochs_to_save": [4]}],
            "model": MODEL,
            "data": {"tile_size": 64},
            "train": {"batch_size": 4, "global_batch": GLOBAL_BATCH, "precision": "fp32"},
            "optimizer": {"lr": 1e-2},
            "monitoring": {"tensorboard": False, "plot_loss": False, "plot_lr": False, "plot_samples": False},
            "ema": EMA | ema,
            "output_dir": str(tmp_path / "run"),
        })  # fmt: skip
        return make_phase_run(config, store)

    return make


def train(run, steps):
    for step in range(run.state.step, run.state.step + steps):
        index = (step * GLOBAL_BATCH + np.arange(GLOBAL_BATCH)) % 16
        values = run.train_store.gather(index, hints=()) | {"index": index}
        optimize(run, step, micro_batches(run, values))


def stored(run):
    return CheckpointStore(f"{run.config.output_dir}/ema_snapshots/prior")


def snapshot(run):
    """As rank 0 does it; the header of the weights."""
    with PhaseRecords(run) as records:
        records.save_snapshot()
        assert records.commits.saver.drain(60)
        return records.header()


def test_a_snapshot_holds_each_track_in_half_precision(make_run):
    run = make_run()
    train(run, 5)
    header = snapshot(run)
    assert stored(run).names() == ["prior_step_00000005.ckpt"]
    saved = stored(run).load("prior_step_00000005")
    assert {key: saved.state[key] for key in ("phase", "step", "position")} == {
        "phase": "prior",
        "step": 5,
        "position": 20,
    }
    assert saved.state["stds"] == {"ema_power_0.05": 0.05, "ema_power_0.1": 0.1}
    assert saved.state["weights"] == header.model_dump(mode="json")
    assert set(saved) == {"ema_power_0.05", "ema_power_0.1"}  # not the exponential one
    for track in run.state.averages[1:]:
        found = saved[track.group]
        assert found.keys() == track.tensors().keys()
        for name, tensor in track.tensors().items():
            assert found[name].dtype == torch.float16
            assert torch.equal(found[name], tensor.half()), name
            assert tensor.dtype == torch.float32
        told, _ = load_weights_file(saved.path(track.group))
        assert told == header
    assert not torch.equal(
        saved["ema_power_0.05"]["x_embedder.proj.bias"], saved["ema_power_0.1"]["x_embedder.proj.bias"]
    )


def test_a_snapshot_is_of_the_last_step_that_its_tracks_took_in(make_run):
    run = make_run(update_every=4)
    train(run, 3)
    snapshot(run)  # nothing is in them yet
    assert stored(run).names() == []
    train(run, 4)
    snapshot(run)
    taken = run.state.averages[1].tensors()["final_layer.linear.weight"].clone()
    train(run, 1)
    snapshot(run)
    states = [stored(run).load(name) for name in stored(run).names()]
    assert [(state.folder.rpartition("_")[2], state.state["step"], state.state["position"]) for state in states] == [
        ("00000007.ckpt", 4, 16),
        ("00000008.ckpt", 8, 32),
    ]
    assert torch.equal(states[0]["ema_power_0.05"]["final_layer.linear.weight"], taken.half())
    assert not torch.equal(states[1]["ema_power_0.05"]["final_layer.linear.weight"], taken.half())


def test_without_tracks_nothing_is_written(make_run, tmp_path):
    for settings in ({"power_stds": []}, {"enabled": False}):
        run = make_run(**settings)
        train(run, 2)
        snapshot(run)
    assert not (tmp_path / "run" / "ema_snapshots").exists()


def test_a_resume_replaces_the_snapshots_that_it_makes_again(make_run):
    run = make_run()
    train(run, 4)
    snapshot(run)
    first = stored(run).load("prior_step_00000004")["ema_power_0.1"]
    damaged = stored(run).load("prior_step_00000004").path("ema_power_0.1")
    again = make_run()
    train(again, 4)
    with torch.no_grad():
        for tensor in again.state.averages[2].averages:
            tensor.add_(1)
    for damage in (lambda: None, lambda: open(damaged, "wb").close()):
        damage()
        snapshot(again)
        assert stored(run).names() == ["prior_step_00000004.ckpt"]
        second = stored(run).load("prior_step_00000004")["ema_power_0.1"]
        assert all(torch.equal(second[name], again.state.averages[2].tensors()[name].half()) for name in first)
        assert not any(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_retention_of_checkpoints_leaves_snapshots_alone(make_run):
    run = make_run()
    with PhaseRecords(run) as records:
        for _ in range(4):
            train(run, 1)
            records.save_snapshot()
            records.save("safety")
            records.progress.metrics["val_loss"] = 1.0 / run.state.step
        train(run, 1)
        records.save("last", epoch=2)
        assert records.commits.saver.drain(60)
    assert run.checkpoints.names() == ["prior_epoch_002.ckpt"]  # the newest safety save replaces the one before
    assert stored(run).names() == [f"prior_step_{step:08d}.ckpt" for step in range(1, 5)]
    for name in stored(run).names():
        stored(run).load(name).verify()
    # and a resume does not take one for a checkpoint
    assert run.checkpoints.latest("prior").state["kind"] == "last"


def test_training_takes_them_in_equal_parts_of_the_phase(make_run):
    run = make_run(snapshots=5)
    with PhaseRecords(run) as records:
        for _ in range(run.total_steps):
            train(run, 1)
            finish_step(run, records)
        assert records.commits.saver.drain(60)
    assert run.total_steps == 16
    assert [stored(run).load(name).state["step"] for name in stored(run).names()] == [4, 7, 10, 13, 16]
