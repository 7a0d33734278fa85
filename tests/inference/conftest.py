"""Tiny weights in checkpoints as training writes them, and the command in this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

SHAPE = (4, 8, 8)  # of a latent: tiles of 64 px
NETWORK = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 2, "latent_size": 8, "latent_channels": 4}
MEAN, STD = (-0.06, 0.19, 0.0, 0.27), (0.09, 0.13, 0.08, 0.15)
RANGES = (
    {
        "dataset": "cells",
        "role": "denoising",
        "channel": 0,
        "dtype": "uint16",
        "low": 90.0,
        "high": 3500.0,
        "tiles": 40,
    },
    {"dataset": "cells", "role": "tile", "channel": 0, "dtype": "uint16", "low": 100.0, "high": 4100.0, "tiles": 50},
    {"dataset": "cells", "role": "tile", "channel": 1, "dtype": "float32", "low": -0.25, "high": 1.5, "tiles": 20},
    {"dataset": "other", "role": "tile", "channel": 0, "dtype": "uint8", "low": 3.0, "high": 250.0, "tiles": 60},
)


@dataclass
class Weights:
    """A checkpoint on disk, its network with the weights that validation used, and what its header says."""

    path: Path
    network: torch.nn.Module
    header: object


@pytest.fixture
def write_weights(tmp_path) -> Callable[..., Weights]:
    """(name, seed, hints, ranges, **header) -> Weights in <tmp>/run/checkpoints/<name>.ckpt: groups model, optimizer,
    ema_decay_0.9 and ema_power_0.05, each with other numbers; the EMA groups lack what is not trained."""
    from ray_pipeline.checkpoints import CheckpointStore
    from ray_pipeline.data.hint_registry import resolve_hints
    from ray_pipeline.models.autoencoder import load_autoencoder
    from ray_pipeline.models.dit import build_dit
    from ray_pipeline.models.weights import WeightsHeader

    sha256 = load_autoencoder("embedded").fingerprint()

    def write(name="one", seed=0, hints=(), ranges=RANGES, settings=None, network=None, **changes) -> Weights:
        torch.manual_seed(seed)
        shape = NETWORK | {"aligned": bool(hints)} | (network or {})
        raw, averaged, power = (build_dit("custom", **shape).eval() for _ in range(3))
        for each in (raw, averaged, power):
            for parameter in each.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.08)
        header = WeightsHeader.model_validate({
            "phase": "phase1", "step": 7, "network": raw.shape,
            "edm": {"sigma_data": 0.5, "prediction_type": "v_prediction"},
            "latents": {"mean": MEAN, "std": STD, "count": 9, "fingerprint": "f"},
            "autoencoder": {"pretrained": "embedded", "sha256": sha256},
            "intensity": ranges, "hints": resolve_hints(settings or {}, hints), "ema": "ema_decay_0.9",
        } | changes)  # fmt: skip
        groups = {"model": raw.state_dict(), "optimizer": {"x/exp_avg": torch.zeros(2)}}
        for group, each in (("ema_decay_0.9", averaged), ("ema_power_0.05", power)):
            groups[group] = {name: p.detach() for name, p in each.named_parameters() if p.requires_grad}
        state = {"phase": "phase1", "step": 7, "weights": header.model_dump(mode="json")}
        folder = tmp_path / "run" / "checkpoints"
        store = CheckpointStore(folder)
        saved = store.save(name, groups, state, metadata=header.metadata())
        return Weights(folder / saved, averaged if header.ema else raw, header)

    return write


@pytest.fixture
def sample(tmp_path, capsys) -> Callable[..., tuple[Path, str]]:
    """(weights, *words, out) -> folder and printed text of `ray-pipeline sample`, four Euler steps unless told."""
    from ray_pipeline.cli import main

    def run(weights: Weights | Path, *words: object, out: str = "out", steps: int = 4) -> tuple[Path, str]:
        path = getattr(weights, "path", weights)
        folder = tmp_path / out
        steps_words = ["--steps", str(steps)] if "--steps" not in words else []
        words = [*map(str, words)]
        if "--sampler" not in words:
            words += ["--sampler", "euler"]
        capsys.readouterr()
        code = main(["sample", str(path), "--out", str(folder), *words, *steps_words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        assert printed.out.isascii()
        return folder, printed.out

    return run


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """(weights, *words) -> the one sentence with which `ray-pipeline sample` refuses them."""
    from ray_pipeline.cli import main

    def run(weights: Weights | Path, *words: object) -> str:
        path = getattr(weights, "path", weights)
        capsys.readouterr()
        code = main(["sample", str(path), "--out", str(tmp_path / "refused"), "--steps", "2", *map(str, words)])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), error
        assert "Traceback" not in error
        assert lines[0].isascii()
        assert not list((tmp_path / "refused").glob("*"))
        return lines[0]

    return run


@pytest.fixture(scope="session")
def noise_of() -> Callable[[Sequence[int]], torch.Tensor]:
    """Seeds -> the noise that their tiles begin with, from Philox keyed by blake2b of (seed, "sample"); or that of
    another purpose and number."""
    import hashlib

    def make(seeds, purpose="sample", number=0):
        rows = []
        for seed in seeds:
            key = int.from_bytes(hashlib.blake2b(repr((seed, purpose)).encode(), digest_size=16).digest(), "little")
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
            generator.standard_normal(dtype=np.float32), generator.random(dtype=np.float32)
            rows.append(generator.standard_normal(SHAPE, dtype=np.float32))
        return torch.from_numpy(np.stack(rows))

    return make


@pytest.fixture(scope="session")
def decoded_by_diffusers() -> Callable[[torch.Tensor], np.ndarray]:
    """Normalised latents (B, C, h, w) -> tiles (B, H, W) in [0, 1], with diffusers' own AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    from ray_pipeline.models.autoencoder import embedded_folder

    network = AutoencoderTiny.from_pretrained(embedded_folder()).eval()

    def decode(latents):
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        stored = (latents.double() / 0.5 * std + mean).float()
        with torch.no_grad():
            images = network.decode(stored).sample.clamp(-1, 1)
        return (images[:, 0].double().numpy() + 1) / 2

    decode.statistics = (MEAN, STD)
    return decode
