"""The whole line through the command line: data, latents, both phases, on a real Ray."""

import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.cli import main
from ray_pipeline.data.encode import STORED_TILES
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.models.weights import load_weights_file
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.events import STEP_PARTS
from ray_pipeline.monitoring.metrics_file import read_events

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data.tile_size": 64,
    "data.simulate": "null",
    "data.shard_rows": 8,
    "model.latent_size": 8,
    "model.depth": 2,
    "model.hidden_size": 64,
    "model.num_heads": 2,
    "model.patch_size": 2,
    "train.batch_size": 3,  # does not divide the global batch: the last micro-step is short
    "train.global_batch": 8,
    "train.threads": 1,
    "train.precision": "fp32",
    "ema.decay": 0.9,
    "ema.start_step": 4,
    "optimizer.warmup_steps": 2,
    "monitoring.log_every_n_steps": 1,
    "monitoring.val_tiles": 8,
    "monitoring.sample_every_n_epochs": 2,
    "monitoring.num_samples": 4,
    "monitoring.sample_steps": 2,
    "phases.0.epochs": 4,
    "phases.1.epochs": 2,
    "ray.max_failures": 0,
    "sweep.enabled": "false",
}


def overrides(**changes) -> list[str]:
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def train(data: Path, autoencoder: Path, out: Path, *words: str, **changes) -> int:
    paths = {"data.root": data, "vae.pretrained": autoencoder, "output_dir": out}
    settings = [word for key, value in paths.items() for word in ("--set", f"{key}={value}")]
    return main(["train", "--config", str(ROOT / "configs/demo.yaml"), *overrides(**changes), *settings, *words])


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_data, tiny_autoencoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("line") / "run"
    assert train(tiny_data, tiny_autoencoder, out) == 0
    return out


def weights(run: Path, phase: str) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    checkpoint = store.load(store.names(phase)[-1])
    return {f"{group}/{name}": tensor for group in checkpoint for name, tensor in checkpoint[group].items()}


def snapshots(run: Path, phase: str) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "ema_snapshots" / phase)
    stored = {name: store.load(name) for name in store.names(phase)}
    return {
        f"{name}/{group}/{key}": tensor
        for name, checkpoint in stored.items()
        for group in checkpoint
        for key, tensor in checkpoint[group].items()
    }


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not differing, differing[:3]


def test_a_run_leaves_checkpoints_pictures_and_records_of_both_phases(finished):
    for phase, epochs, saved in (("phase1_unconditional", 4, (1, 2, 3, 4)), ("phase2_conditional", 2, (1, 2))):
        names = CheckpointStore(finished / "checkpoints").names(phase)
        assert {f"{phase}_epoch_{epoch:03d}.ckpt" for epoch in saved} <= set(names)
        assert Image.open(finished / "samples" / phase / f"samples_epoch_{epochs:03d}.png").size > (64, 64)
        assert Image.open(finished / "plots" / phase / "latest_progress.png").size == (1400, 900)
        assert list((finished / "logs/tensorboard" / phase).glob("events.*"))
        assert {r["event"] for r in read_events(finished, phase)} == {
            "phase", "step", "validation", "sample", "checkpoint",
        }  # fmt: skip
    state = phase_state.load(finished / "phase_state.json")
    assert [progress.status for progress in state.phases.values()] == ["finished", "finished"]
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["global_batch"] == 8


def test_every_step_is_recorded_once_with_a_finite_loss(finished):
    steps = read_events(finished, "phase1_unconditional", "step")
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert all(0 < record["loss"] < 10 for record in steps)


def test_every_step_tells_where_its_time_went(finished):
    for record in read_events(finished, event="step"):
        parts = [record[f"{part}_seconds"] for part in STEP_PARTS.values()]
        assert all(0 <= seconds < math.inf for seconds in parts)
        assert 0 < sum(parts) <= 1.01 * record["step_seconds"]
        assert record["samples_per_second"] == pytest.approx(8 / record["step_seconds"])
        assert 0 < record["utilisation"] < 1
        assert record["memory_bytes"] > 1e8


def test_tensorboards_own_reader_shows_the_records_of_a_run(finished):
    for phase in ("phase1_unconditional", "phase2_conditional"):
        board = EventAccumulator(str(finished / "logs/tensorboard" / phase), size_guidance={"scalars": 0})
        board.Reload()
        shown = [(point.step, point.value) for point in board.Scalars("train/loss")]
        recorded = [(record["step"], record["loss"]) for record in read_events(finished, phase, "step")]
        assert shown == [(step, pytest.approx(loss)) for step, loss in recorded]
        assert board.Tags()["images"] == ["samples"]


def test_the_report_of_a_run_shows_both_phases_and_what_they_were_trained_with(finished):
    page = (finished / "report.html").read_text()
    assert "All 2 phases are trained." in page
    for words in (
        "phase1_unconditional",
        "phase2_conditional",
        "global batch",
        importlib.metadata.version("torch"),
        "image/webp",
    ):
        assert words in page


def test_an_untrained_network_scores_one_on_the_tiles_of_its_statistics(finished):
    metrics = phase_state.load(finished / "phase_state.json").phase("phase1_unconditional").metrics
    assert metrics["untrained_loss"] == pytest.approx(1, abs=0.02)


def test_phase_two_begins_from_the_best_averaged_weights_of_phase_one(finished):
    best = phase_state.load(finished / "phase_state.json").phase("phase1_unconditional").best
    losses = {record["step"]: record["loss"] for record in read_events(finished, "phase1_unconditional", "validation")}
    store = CheckpointStore(finished / "checkpoints")
    assert best.val_loss == min(loss for step, loss in losses.items() if step)
    second = store.load(store.names("phase2_conditional")[0])
    assert second.state["init"] == store.path(best.checkpoint)


def test_a_finished_run_is_left_alone_by_resume(finished, tmp_path, tiny_autoencoder, capsys):
    before = weights(finished, "phase2_conditional")
    assert train(tmp_path / "no_data", tiny_autoencoder, finished, "--resume") == 0
    assert_equal_bits(before, weights(finished, "phase2_conditional"))
    assert "is finished, so there is nothing to resume" in capsys.readouterr().out


def test_a_quiet_command_prints_nothing_where_nothing_is_wrong(finished):
    command = [sys.executable, "-m", "ray_pipeline", "train", "--config", str(finished / "config.yaml"), "--resume"]
    quiet = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=True, timeout=120)
    assert (quiet.stdout, quiet.stderr) == ("", "")
    loud = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "is finished" in loud.stdout


def test_a_run_whose_state_was_damaged_between_the_phases_goes_on_to_equal_bits(
    finished, tiny_data, tiny_autoencoder, tmp_path
):
    """Its records tell that the second phase was finished too, but there is no checkpoint of it."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("phase2_conditional*"))
    state_file = out / "phase_state.json"
    state_file.write_bytes(state_file.read_bytes()[:-100])
    assert train(tiny_data, tiny_autoencoder, out, "--resume") == 0
    assert (out / "phase_state.json.damaged").is_file()
    assert [progress.status for progress in phase_state.load(state_file).phases.values()] == ["finished", "finished"]
    assert_equal_bits(weights(finished, "phase2_conditional"), weights(out, "phase2_conditional"))
    assert_equal_bits(snapshots(finished, "phase2_conditional"), snapshots(out, "phase2_conditional"))


def test_a_finished_phase_that_gets_more_epochs_is_trained_on(finished, tiny_data, tiny_autoencoder, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = read_events(out, "phase2_conditional", "step")
    longer = {"phases__1__epochs": 3}
    assert train(tiny_data, tiny_autoencoder, out, "--resume", **longer) == 2
    assert "phases.1.epochs: 2 -> 3" in capsys.readouterr().err
    assert train(tiny_data, tiny_autoencoder, out, "--resume", "--allow-change", "phases.1.epochs", **longer) == 0
    assert "phases.1.epochs: 2 -> 3 (the learning rate follows the cosine" in capsys.readouterr().out
    steps = read_events(out, "phase2_conditional", "step")
    assert steps[: len(before)] == before  # nothing was trained again
    assert [record["step"] for record in steps] == list(range(1, 3 * len(before) // 2 + 1))
    state = phase_state.load(out / "phase_state.json")
    assert state.phase("phase2_conditional").is_done(3)
    assert "phase2_conditional_epoch_003.ckpt" in state.phase("phase2_conditional").checkpoints
    assert "phases.1.epochs: 2 -> 3" in [entry.message for entry in state.history if entry.event == "config"]
    assert yaml.safe_load((out / "config.yaml").read_text())["phases"][1]["epochs"] == 3


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ([], {}, "holds a run already; go on with --resume"),
        (["--resume"], {"optimizer__lr": 5e-4}, "optimizer.lr"),
    ],
)
def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(
    finished, tiny_data, tiny_autoencoder, capsys, words, changes, said
):
    assert train(tiny_data, tiny_autoencoder, finished, *words, **changes) == 2
    assert said in capsys.readouterr().err


def test_status_tells_where_a_finished_run_stands(finished, capsys):
    assert main(["status", str(finished)]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    for words in ("phase1_unconditional: finished", "untrained network", "paired standard errors", "100%"):
        assert words in text


def test_watching_a_finished_run_prints_it_once(finished, capsys):
    assert main(["status", str(finished), "--watch", "0.1"]) == 0
    assert capsys.readouterr().out.count("latest events") == 1


def test_status_tells_what_each_hint_alone_is_worth(finished, capsys):
    metrics = phase_state.load(finished / "phase_state.json").phase("phase2_conditional").metrics
    assert main(["status", str(finished)]) == 0
    text = capsys.readouterr().out
    for hint in ("super_resolution", "denoising", "canny", "depth"):
        gain = metrics[f"val_loss_shuffled_hints/{hint}"] - metrics[f"val_loss_right_hints/{hint}"]
        assert metrics[f"hint_gain/{hint}"] == pytest.approx(gain, abs=1e-9)
        assert f"with {hint} alone, right {metrics[f'val_loss_right_hints/{hint}']:.4f}" in text


def test_a_run_gives_weights_of_an_average_that_nobody_tracked_and_tiles_from_them(
    finished, tiny_autoencoder, tmp_path, capsys
):
    """Near the tracked two, to the half precision of the snapshots; sampled by the command for any weights."""
    out = tmp_path / "average.safetensors"
    assert main(["ema", str(finished), "--std", "0.08", "--phase", "phase2_conditional", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    header, made = load_weights_file(out)
    assert (header.phase, header.ema) == ("phase2_conditional", "ema_power_0.08")
    stored = weights(finished, "phase2_conditional")
    tracked = [stored[f"ema_power_{std}/blocks.0.attn.qkv.weight"] for std in (0.05, 0.1)]
    for one in tracked:
        assert 0 < float((made["blocks.0.attn.qkv.weight"] - one).norm()) < 1e-3 * float(one.norm())
    tiles = tmp_path / "tiles"
    words = ["--tiles", "2", "--steps", "2", "--vae", str(tiny_autoencoder), "--out", str(tiles)]
    assert main(["sample", str(out), *words]) == 0
    assert len(list(tiles.glob("*.tif"))) == 2


def test_tiles_encoded_while_it_trains_give_the_losses_of_stored_latents(
    finished, tiny_data, tiny_autoencoder, tmp_path
):
    out = tmp_path / "run"
    only_phase_one = "[{name: phase1_unconditional, epochs: 4}]"
    changes = {"data__mode": "tiles", "data__latents": tmp_path / "sample", "phases": only_phase_one}
    assert train(tiny_data, tiny_autoencoder, out, **changes) == 0
    one, two = (read_events(run, "phase1_unconditional", "step") for run in (finished, out))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-3)


def test_a_tile_without_a_finite_loss_is_left_out_and_gone_back_for_to_equal_bits(
    finished, tiny_data, tiny_autoencoder, tmp_path, capsys
):
    """Once as a step that is skipped, once past the limit: back to before it, and on without it; the second time in a
    phase it ends the run, with a report."""
    latents = Path(shutil.copytree(tiny_data / "latents", tmp_path / "latents"))
    store = LatentStore.open(latents)
    shard = np.load(latents / "train" / store.index["shards"][0]["file"], mmap_mode="r+")
    shard[3, :, [column.startswith("hint.") for column in store.columns]] = np.nan
    shard.flush()
    tile = TileTable(store.folder, STORED_TILES).rows([3])[0]
    first = CheckpointStore(finished / "checkpoints")
    init = first.path(phase_state.load(finished / "phase_state.json").phase("phase1_unconditional").best.checkpoint)
    hints = "[super_resolution, denoising, canny, depth]"
    hinted = f"{{name: hinted, epochs: 2, condition_types: {hints}, condition_dropout: 0.0, init: '{init}'}}"
    changes = {"phases": f"[{hinted}]", "data__latents": latents}

    skipping, going_back = tmp_path / "skipping", tmp_path / "going_back"
    assert train(tiny_data, tiny_autoencoder, skipping, **changes) == 0
    told = CheckpointStore(skipping / "checkpoints").latest("hinted").state["skipped"]
    assert len(told) == 2  # once an epoch
    assert all(tile.path in fault["message"] for fault in read_events(skipping, "hinted", "fault"))
    steps = read_events(skipping, "hinted", "step")
    assert [record["step"] for record in steps if record["skipped"]] == told

    capsys.readouterr()
    assert train(tiny_data, tiny_autoencoder, going_back, **changes, train__max_skipped_steps=0) == 2
    report = going_back / "logs" / "nonfinite_hinted.json"
    assert str(report) in capsys.readouterr().err
    entries = json.loads(report.read_text())
    assert [entry["step"] for entry in entries] == told
    for entry in entries:
        assert [suspect["id"] for suspect in entry["suspects"]] == [tile.id]
        assert len(entry["samples"]) == 8
    assert [fault["kind"] for fault in read_events(going_back, "hinted", "fault")] == [
        "skip", "rollback", "skip", "failed",
    ]  # fmt: skip
    one, other = (CheckpointStore(run / "checkpoints").load("hinted_epoch_001") for run in (skipping, going_back))
    assert other.state["skipped"] == told[:1]
    for group in one:
        assert_equal_bits(one[group], other[group])


def test_the_store_streams_what_the_plan_says(finished, tiny_data):
    store = LatentStore.open(tiny_data / "latents")
    plan = SamplePlan(len(store), 8, seed=0, phase="phase1_unconditional")
    steps = read_events(finished, "phase1_unconditional", "step")
    assert steps[-1]["step"] == plan.steps(4)
    assert steps[-1]["position"] == 8 * plan.steps(4)


def test_dry_run_says_what_a_job_takes_and_writes_nothing(ray_cluster, tiny_data, tiny_autoencoder, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(tiny_data, tiny_autoencoder, out, "--dry-run") == 0
    text = capsys.readouterr().out
    for words in ("steps", "memory", "time", "output", "latents", "GFLOP"):
        assert words in text
    assert not out.exists()


def test_metrics_are_strict_json_lines(finished):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in (finished / "logs/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
