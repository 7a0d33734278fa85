"""Sample grids, by rank 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_pipeline.data.listing import spread
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.diffusion.samplers import sample_euler
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import SampleEvent
from ray_pipeline.monitoring.tile_grid import Window, sample_grid
from ray_pipeline.run_copy import run_path
from ray_pipeline.training.nearest import nearest
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import stack_hints

_DECODE_BATCH = 4
_PAIR_ROWS = 6  # a grid with hints, sample, target and error side by side shows this many tiles at most


def draw_samples(run: PhaseRun, events: EventLog, epoch: int) -> Path:
    """Sample with EMA weights from noise that is the same at every epoch, and write samples_epoch_<epoch>.png.

    Unconditional: each sample beside the training tile whose latent is nearest to its own, with their distance in units
    of the latents' standard deviation: a copied tile shows. With hints: hints, sample, target and absolute error of
    validation tiles side by side, and the sample's PSNR (dB, full range). Hints and targets are shown as the
    autoencoder gives them back, since that is what the network gets.
    """
    count = run.config.monitoring.num_samples
    if run.hints:
        count = min(count, _PAIR_ROWS, len(run.val_rows))
    autoencoder = load_autoencoder(run.config.vae.pretrained, device=run.device, precision=run.config.vae.precision)
    noise = torch.from_numpy(draw(run.config.seed, "samples", range(count), run.train_store.shape).noise)
    columns = _conditional(run, autoencoder, noise) if run.hints else _unconditional(run, autoencoder, noise)
    run_dir = run_path(run.config.output_dir)
    path = run_dir / "samples" / run.phase.name / f"samples_epoch_{epoch:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{run.phase.name}, epoch {epoch}, step {run.state.step}"
    sample_grid(columns.tiles, path, captions=columns.captions, title=title, groups=columns.groups)
    events.emit(SampleEvent(run.phase.name, run.state.step, epoch, str(path.relative_to(run_dir))))
    return path


@dataclass(frozen=True)
class _Columns:
    """What `sample_grid` shows, in how many groups beside each other."""

    tiles: list[tuple[str, np.ndarray]]
    captions: dict[tuple[int, int], str]
    groups: int = 1


def _unconditional(run: PhaseRun, autoencoder: Autoencoder, noise: torch.Tensor) -> _Columns:
    samples = _sample(run, noise, {})
    limit = run.config.monitoring.nearest_tiles
    shown = run.val_store.gather(run.val_rows[spread(len(run.val_rows), len(noise))], hints=())["latent"]
    window = Window.of(_decode(run, autoencoder, shown))
    columns, captions = [("sample", window.shown(_decode(run, autoencoder, samples)))], {}
    if limit:
        found = nearest(run.train_store, samples, limit)
        tiles = run.train_store.gather(found.rows, found.variants, hints=())["latent"]
        columns.append((f"nearest of {found.searched} training tiles", window.shown(_decode(run, autoencoder, tiles))))
        captions = {(row, 1): f"distance {distance:.2f}" for row, distance in enumerate(found.distances)}
    return _Columns(columns, captions, groups=math.ceil(math.sqrt(len(noise) / len(columns))))


def _conditional(run: PhaseRun, autoencoder: Autoencoder, noise: torch.Tensor) -> _Columns:
    shown = spread(len(run.val_rows), len(noise))
    values = run.val_store.gather(run.val_rows[shown], hints=run.hints, simulated=run.val_simulated[shown])
    samples = _decode(run, autoencoder, _sample(run, noise, values))
    target = _decode(run, autoencoder, values["latent"])
    window = Window.of(target)
    columns = [(name, window.of_hint(name, _decode(run, autoencoder, values[f"hint.{name}"]))) for name in run.hints]
    error = np.abs(samples - target)
    columns += [
        ("sample", window.shown(samples)),
        ("target", window.shown(target)),
        ("absolute error", 2 * error / (window.high - window.low) - 1),
    ]
    captions = {(row, len(run.hints)): f"{_psnr(samples[row], target[row]):.1f} dB" for row in range(len(noise))}
    return _Columns(columns, captions)


@torch.no_grad()
def _sample(run: PhaseRun, noise: torch.Tensor, values: dict[str, np.ndarray]) -> np.ndarray:
    """Latents as the autoencoder knows them, (N, C, H, W) float32."""
    sigma_data, stats = run.config.scheduler.sigma_data, run.train_store.stats
    network = run.state.network.eval()
    parts = []
    try:
        with run.ema_weights(), run.autocast():
            for start in range(0, len(noise), run.config.train.batch_size):
                part = slice(start, start + run.config.train.batch_size)
                conditions = {}
                if run.hints:
                    chosen = {key: array[part] for key, array in values.items()}
                    hints = stack_hints(chosen, run.hints, stats, sigma_data).to(run.device)
                    conditions["hints"] = network.encode_hints(hints)
                steps = run.config.monitoring.sample_steps
                found = sample_euler(run.edm, network, noise[part].to(run.device), steps, **conditions)
                parts.append(found.float().cpu())
    finally:  # a picture may fail, and training goes on
        network.train()
    return stats.denormalise(torch.cat(parts).numpy(), sigma_data)


def _decode(run: PhaseRun, autoencoder: Autoencoder, latents: np.ndarray) -> np.ndarray:
    """(N, C, h, w) -> (N, H, W) float32 in [-1, 1]."""
    tensor = torch.from_numpy(latents.astype(np.float32)).to(run.device)
    return torch.cat([autoencoder.decode(part).cpu() for part in tensor.split(_DECODE_BATCH)]).numpy()


def _psnr(image: np.ndarray, target: np.ndarray) -> float:
    from skimage.metrics import peak_signal_noise_ratio  # a second of import, which no restart should wait for

    return float(peak_signal_noise_ratio(target, image, data_range=2.0))
