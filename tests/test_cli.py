"""The command line: help with an example, truthful exit status, ASCII only."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ray_pipeline.cli import main

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "simulate", "prepare", "train-vae", "hints", "encode", "train", "sweep", "submit", "sample", "ema", "status",
    "check",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example: ray-pipeline {command}" in text
    assert text.isascii()


def test_the_module_is_the_same_door_as_the_command():
    done = subprocess.run([sys.executable, "-m", "ray_pipeline", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


def test_simulate_and_prepare_end_with_what_to_do_next(ray_cluster, tmp_path, capsys):
    words = ["simulate", "--out", str(tmp_path / "sim"), "--fields", "4", "--field-size", "64", "--tile-size", "64"]
    assert main([*words, "--workers", "1"]) == 0
    assert "next      ray-pipeline train" in capsys.readouterr().out
    images = tmp_path / "sim" / "foundation" / "simulated" / "images"
    words = [
        "prepare",
        "folder",
        str(images),
        "--out",
        str(tmp_path / "data"),
        "--tile-size",
        "32",
        "--dataset",
        "mine",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "4 listed = 4 accepted + 0 rejected" in text
    assert "next      ray-pipeline train" in text
    assert (tmp_path / "data" / "foundation" / "mine" / "manifests" / "train.csv").is_file()


def test_hints_are_listed_with_their_parameters_and_drawn(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["hints", "--config", str(ROOT / "configs/demo.yaml"), "--set", f"data.root={tiny_data}"]
    words += ["--set", "data.tile_size=64", "--set", "model.latent_size=8", "--set", "data.simulate=null"]
    assert main([*words, "--set", "data.hints.canny.sigma=2.5", "--preview"]) == 0
    text = capsys.readouterr().out
    for name in ("super_resolution: simulated_share=0.0", "denoising: ", "canny: sigma=2.5", "depth: model=None"):
        assert name in text
    with Image.open(tmp_path / "hints.png") as picture:
        assert picture.height > 6 * 64


def test_check_reports_each_part_and_fails_for_a_wrong_autoencoder(ray_cluster, tiny_autoencoder, tmp_path, capsys):
    words = ["check", "--config", str(ROOT / "configs/demo.yaml"), "--set", f"output_dir={tmp_path / 'run'}"]
    assert main([*words, "--set", f"vae.pretrained={tiny_autoencoder}"]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text
    for part in ("torch", "ray", "autoencoder", "training step", "output_dir", "ready"):
        assert part in text
    assert main([*words, "--set", f"vae.pretrained={tmp_path}"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  autoencoder" in text
    assert "1 problem(s)" in text
