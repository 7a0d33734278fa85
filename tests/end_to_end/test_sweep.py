"""A sweep between the phases: killed and gone on with, it finds what is best, and the phase goes on from it exactly."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ray_pipeline import pipeline
from ray_pipeline.checkpoints import CheckpointStore, open_checkpoint
from ray_pipeline.cli import main
from ray_pipeline.config import load_config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.monitoring import phase_state
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.sweep_records import read_sweep, read_winner
from ray_pipeline.training.trial import seed_trial, trial_config

SECOND = "phase2_conditional"
CONFIG = """
data: {{root: {data}, latents: {folder}/latents, tile_size: 64, shard_rows: 8}}
model: {{architecture: custom, latent_size: 8, depth: 2, hidden_size: 64, num_heads: 2, patch_size: 2, dropout: 0.1}}
vae: {{pretrained: {vae}, actors: 1}}
ema: {{decay: 0.5, more_decays: [0.9, 0.99], start_step: 1, power_stds: [0.1]}}
optimizer: {{lr: 2.0e-3, warmup_steps: 1, schedule: cosine}}
train: {{batch_size: 4, global_batch: 8, threads: 1, precision: fp32}}
monitoring: {{log_every_n_steps: 1, val_tiles: 8, val_noise_levels: 2, plot_samples: false, tensorboard: false}}
phases:
  - {{name: phase1_unconditional, epochs: 2}}
  - {{name: phase2_conditional, epochs: 5, condition_types: [denoising]}}
ray: {{use_gpu: false, max_failures: 0}}
"""
# one learning rate at which nothing is learnt; averages as in CONFIG, the first of which forgets fastest
SPACE = "{optimizer.lr: {grid: [1.0e-9, 2.0e-3]}, ema.decay: {grid: [0.99, 0.5, 0.9]}}"


@pytest.fixture(scope="module")
def config(tmp_path_factory, run_job_here, tiny_data, tiny_autoencoder) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "config.yaml"
    path.write_text(CONFIG.format(data=tiny_data, folder=path.parent, vae=tiny_autoencoder))
    run_job_here(encode_job(load_config(path)))
    return path


def words(config: Path, out: Path, **settings) -> list[str]:
    found = ["--config", str(config), "--set", f"output_dir={out}"]
    return found + [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


@pytest.fixture(scope="module")
def plain(ray_cluster, config) -> Path:
    """Both phases without a sweep, with the values that are best."""
    out = config.parent / "plain"
    assert main(["train", *words(config, out)]) == 0
    return out


def before_phase_two(run: Path, out: Path) -> None:
    """A copy of a run in which phase 2 was never begun."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(f"{SECOND}*"))
    records = out / "logs" / "metrics.jsonl"
    records.write_text("".join(line for line in records.open() if SECOND not in line))
    state = phase_state.load(out / "phase_state.json")
    del state.phases[SECOND]
    state.save(out / "phase_state.json")


@pytest.fixture(scope="module")
def swept(plain, config) -> Path:
    """Goes on from phase 1 with a sweep whose command is stopped before it has any result, then killed after the first
    one, and is then gone on with."""
    import ray

    out = config.parent / "swept"
    before_phase_two(plain, out)
    settings = {"sweep__enabled": "true", "sweep__epochs": 2, "sweep__scheduler": "fifo", "sweep__space": SPACE}
    command = [sys.executable, "-m", "ray_pipeline", "train", *words(config, out, **settings), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    until = time.monotonic() + 300
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "sweep" / "trial_000" / "config.yaml").exists():  # no trial has a result yet
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    said, told = driver.communicate(timeout=120)
    assert driver.returncode == 143, told
    assert "Last result" not in said  # words of Tune's own
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("stopped by SIGTERM")
    assert {trial.status for trial in read_sweep(out).trials} == {"interrupted"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not ((record := read_sweep(out)) and any(trial.results for trial in record.trials)):
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert read_winner(out) is None
    assert main(["train", *words(config, out, **settings), "--resume"]) == 0
    return out


def tensors(run: Path, phase: str = SECOND) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(run / "checkpoints").latest(phase)
    return {f"{group}/{name}": tensor for group in checkpoint for name, tensor in checkpoint[group].items()}


def test_a_killed_sweep_finds_the_value_that_is_plainly_best(swept):
    winner = read_winner(swept)
    record = read_sweep(swept)
    assert [trial.status for trial in record.trials] == ["finished", "finished"]
    assert winner.overrides["optimizer.lr"] == 2e-3
    assert winner.overrides["ema.decay"] == 0.5
    assert set(winner.overrides["ema.more_decays"]) == {0.9, 0.99}
    assert record.trials[winner.trial].values == {"optimizer.lr": 2e-3}
    assert winner.position == 2 * 24
    assert winner.ties == []


def test_the_phase_goes_on_from_the_winner_as_if_it_had_been_trained_from_the_start(swept, plain):
    """Position, losses of all its steps, and every tensor at the end: averages, optimizer and stored averages too."""
    steps = {run: read_events(run, SECOND, "step") for run in (swept, plain)}
    told = [[(step["step"], step["position"], step["loss"]) for step in steps[run]] for run in (swept, plain)]
    assert told[0] == told[1]
    one, other = tensors(swept), tensors(plain)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    resumed = [event for event in read_events(swept, SECOND, "phase") if event["status"] == "resumed"]
    assert [event["step"] for event in resumed] == [read_winner(swept).step]
    for folder in ("checkpoints", f"ema_snapshots/{SECOND}"):  # those of epochs within the sweep, too
        stored = [CheckpointStore(run / folder).names(SECOND) for run in (swept, plain)]
        assert stored[0] == stored[1]


def test_every_trial_validates_every_average_at_equal_positions(swept):
    rows = list(csv.DictReader((swept / "sweep" / "results.csv").open()))
    for trial in ("0", "1"):
        found = [(row["average"], int(row["epoch"]), int(row["position"])) for row in rows if row["trial"] == trial]
        averages = ("ema_decay_0.99", "ema_decay_0.5", "ema_decay_0.9", "ema_power_0.1")
        assert sorted(found) == sorted((name, epoch, 24 * epoch) for name in averages for epoch in (1, 2))
    # before the first step nothing differs, so a trial that learns nothing stays where all began
    useless = [float(row["val_loss"]) for row in rows if row["trial"] == "0"]
    assert max(useless) - min(useless) < 1e-4


def test_the_winner_is_in_the_config_the_history_and_the_status_of_the_run(swept, capsys):
    used, alone = (yaml.safe_load((swept / name).read_text()) for name in ("config.yaml", "sweep/winner.yaml"))
    for found in (used, alone):
        assert found["optimizer"]["lr"] == 2e-3
        assert found["ema"]["decay"] == 0.5
    assert not alone["sweep"]["enabled"]
    state = phase_state.load(swept / "phase_state.json")
    messages = [entry.message for entry in state.history if entry.event == "sweep"]
    assert any("trial 1 wins" in message for message in messages)
    assert "ema_decay_0.5 is confirmed" in messages[-1]
    assert set(read_winner(swept).confirmed) == {"ema_decay_0.5", "ema_decay_0.9", "ema_decay_0.99", "ema_power_0.1"}
    assert main(["status", str(swept)]) == 0
    text = capsys.readouterr().out
    assert "sweep: finished" in text
    assert "trial_000 optimizer.lr=1e-09: finished" in text


def test_every_epoch_and_end_of_a_trial_is_one_event_of_the_run(swept):
    events = [(event["trial"], event["epoch"], event["status"]) for event in read_events(swept, "sweep", "sweep")]
    assert sorted(event for event in events if event[2] != "interrupted") == sorted(
        (trial, epoch, status) for trial in (0, 1) for epoch, status in ((1, "epoch"), (2, "epoch"), (2, "finished"))
    )


def test_trials_leave_their_records_and_no_checkpoints(swept):
    for trial in ("trial_000", "trial_001"):
        assert read_events(swept / "sweep" / trial, SECOND, "step")
        assert not list((swept / "sweep" / trial).rglob("*.safetensors"))


def test_a_bad_trial_is_given_up_early_one_that_fails_does_not_sink_the_sweep_and_the_next_ones_start(
    plain, config, capsys
):
    """By successive halving, one trial at a time, on a Ray without a dashboard; all resources come back."""
    import ray

    out = config.parent / "halved"
    before_phase_two(plain, out)
    space = "{optimizer.lr: {grid: [2.0e-3, 1.0e-9, 1.0e+30]}}"  # the last one is soon not finite
    settings = {
        "sweep__epochs": 3, "sweep__scheduler": "asha", "sweep__reduction_factor": 2, "sweep__space": space,
        "sweep__max_concurrent_trials": 1, "sweep__keep_trials": "true", "train__max_skipped_steps": 0,
    }  # fmt: skip
    assert main(["sweep", *words(config, out, **settings)]) == 0
    trials = read_sweep(out).trials
    assert [trial.status for trial in trials] == ["finished", "stopped", "failed"]
    assert [result.epoch for result in trials[1].results] == [1]
    assert "have no finite loss or gradient" in trials[2].message
    assert read_winner(out).trial == 0
    assert "have no finite loss" in (out / "sweep" / "results.csv").read_text()
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.5)
    assert main(["sweep", *words(config, out, **settings)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_trials_may_continue_the_first_phase_and_the_next_begins_from_the_best(plain, config, capsys):
    out = config.parent / "continued"
    before_phase_two(plain, out)
    settings = {
        "sweep__trains": "phase1_unconditional", "sweep__epochs": 1, "sweep__keep_trials": "true",
        "sweep__space": "{ema.decay: {grid: [0.5, 0.7]}}",
    }  # fmt: skip
    assert main(["sweep", *words(config, out, **settings)]) == 0
    winner, first = read_winner(out), CheckpointStore(out / "checkpoints").latest("phase1_unconditional")
    assert f"phase2_conditional begins from {winner.checkpoint}" in capsys.readouterr().out
    assert winner.overrides["phases.1.init"] == winner.checkpoint
    best = open_checkpoint(winner.checkpoint)
    assert best.state["weights"]["ema"] == winner.track
    assert best.state["step"] == winner.step == first.state["step"] + 3
    used = load_config(out / "config.yaml")
    assert pipeline.initial_weights(used, 1) == winner.checkpoint


def test_a_trial_goes_on_from_all_that_a_phase_has_learnt(plain, tmp_path):
    """An average that was not followed so far begins as the one that validation used."""
    source = CheckpointStore(plain / "checkpoints").latest("phase1_unconditional")
    words = [
        f"output_dir={tmp_path}",
        "sweep.trains=phase1_unconditional",
        "sweep.space={ema.decay: {grid: [0.5, 0.7]}}",
    ]
    own = trial_config(load_config(plain / "config.yaml", words), "trial_000", {})
    seed_trial(own, source)
    seed = CheckpointStore(own.checkpoint_store).latest("phase1_unconditional")
    assert {*seed} == {*source, "ema_decay_0.7"}
    assert seed.state["step"] == source.state["step"]
    for group in seed:
        expected = source["ema_decay_0.5" if group == "ema_decay_0.7" else group]
        assert seed[group].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in seed[group].items())
