"""Wrong input ends with one clear sentence and a non-zero exit, never with a traceback."""

import shutil
from pathlib import Path

import pytest

from ray_pipeline.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data.tile_size=64", "data.simulate=null", "model.latent_size=8", "model.patch_size=2"]


def spoil_manifest(data: Path, autoencoder: Path) -> list[str]:
    shutil.rmtree(data / "foundation" / "simulated" / "manifests")
    return []


def spoil_image_missing(data: Path, autoencoder: Path) -> list[str]:
    next((data / "foundation" / "simulated" / "images").glob("*.png")).unlink()
    return []


def spoil_image_unreadable(data: Path, autoencoder: Path) -> list[str]:
    path = next((data / "foundation" / "simulated" / "images").glob("*.png"))
    path.write_bytes(path.read_bytes()[:100])
    return []


def spoil_partner_missing(data: Path, autoencoder: Path) -> list[str]:
    next((data / "degraded" / "simulated" / "images").glob("*.png")).unlink()
    return []


def spoil_autoencoder_folder(data: Path, autoencoder: Path) -> list[str]:
    return [f"vae.pretrained={data}"]


def spoil_autoencoder_weights(data: Path, autoencoder: Path) -> list[str]:
    path = autoencoder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    return []


def spoil_key(data: Path, autoencoder: Path) -> list[str]:
    return ["optimizer.learning_rate=1e-4"]


def spoil_resources(data: Path, autoencoder: Path) -> list[str]:
    return ["ray.num_workers=500", "train.global_batch=512"]


def spoil_later_checkpoint(data: Path, autoencoder: Path) -> list[str]:
    return [f"phases.1.init={data / 'absent.ckpt'}"]


def spoil_later_dataset(data: Path, autoencoder: Path) -> list[str]:
    return ["phases.1.datasets=[absent]"]


def spoil_uri(data: Path, autoencoder: Path) -> list[str]:
    return ["output_dir=s3://bucket/run?endpoint_override=127.0.0.1:9"]


def spoil_output(data: Path, autoencoder: Path) -> list[str]:
    (data / "occupied").write_text("a file")
    return [f"output_dir={data / 'occupied' / 'run'}"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_key, ["optimizer.learning_rate", "nearest known key is optimizer.lr"]),
        (spoil_manifest, ["data.root", "prepare"]),
        (spoil_image_missing, ["no such file", ".png", "data.max_rejected"]),
        (spoil_image_unreadable, [".png"]),
        (spoil_partner_missing, ["partner", ".png", "missing"]),
        (spoil_autoencoder_folder, ["vae.pretrained", "config.json"]),
        (spoil_autoencoder_weights, ["vae.pretrained", "fresh copy"]),
        (spoil_resources, ["ray.num_workers=500", "CPU"]),
        (spoil_later_checkpoint, ["absent.ckpt"]),
        (spoil_later_dataset, ["phases[].datasets of phase2_conditional", "absent", "simulated"]),
        (spoil_uri, ["output_dir=s3://bucket/run", "the endpoint does not answer", "correct endpoint_override"]),
        (spoil_output, ["output_dir", "cannot be written"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_input_is_told_in_one_sentence(ray_cluster, tiny_data, tiny_autoencoder, tmp_path, capfd, spoil, said):
    data, autoencoder = tmp_path / "data", tmp_path / "autoencoder"
    shutil.copytree(tiny_data, data, ignore=shutil.ignore_patterns("latents"))
    shutil.copytree(tiny_autoencoder, autoencoder)
    settings = [*SMALL, f"data.root={data}", f"vae.pretrained={autoencoder}", f"output_dir={tmp_path / 'run'}"]
    settings += spoil(data, autoencoder)
    words = [word for setting in settings for word in ("--set", setting)]
    # an endpoint that does not answer may do so when it is asked again
    assert main(["train", "--config", str(ROOT / "configs/demo.yaml"), *words]) == (75 if spoil is spoil_uri else 2)
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for words in said:
        assert words in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--config", "absent.yaml"], "absent.yaml does not exist"),
        (["status", "absent_run"], "absent_run holds no run"),
        (["prepare", "folder", "absent_folder", "--out", "data"], "absent_folder"),
        (["encode", "--config", str(ROOT / "configs/demo.yaml"), "--verify"], "encode"),
        (["train-vae", "absent_data", "--out", "weights"], "absent_data"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_command_names_what_is_not_there(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_data_whose_simulation_was_cut_off_is_simulated_again(tmp_path):
    from ray_pipeline.config import load_config
    from ray_pipeline.encoding import prepare_data

    config = load_config(
        ROOT / "configs/demo.yaml",
        [f"data.root={tmp_path}", "data.simulate.fields=2", "data.simulate.field_size=256"],
    )
    (tmp_path / "foundation" / "simulated" / "manifests").mkdir(parents=True)
    prepare_data(config)
    assert (tmp_path / "foundation" / "simulated" / "manifests" / "manifest.csv").is_file()
