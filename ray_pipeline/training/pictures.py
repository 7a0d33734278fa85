"""Pictures of a run: sample grids and the progress chart. Rank 0 only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ray_pipeline.data.listing import spread
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.diffusion.samplers import sample_euler
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder
from ray_pipeline.monitoring.events import EventLog, SampleEvent, read_events
from ray_pipeline.monitoring.plots import plot_progress
from ray_pipeline.monitoring.tile_grid import Window, sample_grid
from ray_pipeline.storage import replace_file
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import stack_hints

_DECODE_BATCH = 4
_PAIR_ROWS = 6  # a grid with hints, sample and target side by side shows this many tiles at most


def draw_samples(run: PhaseRun, records: EventLog, epoch: int) -> Path:
    """Sample with EMA weights from noise that is the same at every epoch, and write samples_epoch_<epoch>.png.

    Unconditional: a square grid. With hints: hints, sample and target of validation tiles side by side, and the
    sample's PSNR (dB, full range) against the target. Hints and targets are shown as the autoencoder gives them back,
    since that is what the network gets.
    """
    monitoring = run.config.monitoring
    count = min(monitoring.num_samples, _PAIR_ROWS, len(run.val_rows)) if run.hints else monitoring.num_samples
    autoencoder = load_autoencoder(run.config.vae.pretrained, device=run.device, precision=run.config.vae.precision)
    noise = draw(run.config.seed, "samples", range(count), run.train_store.shape).noise
    shown = spread(np.arange(len(run.val_rows)), count)
    values = run.val_store.gather(run.val_rows[shown], hints=run.hints, simulated=run.val_simulated[shown])
    samples = _decode(run, autoencoder, _sample(run, torch.from_numpy(noise), values))
    target = _decode(run, autoencoder, values["latent"])
    window = Window.of(target)
    columns, captions = [("sample", window.shown(samples))], {}
    if run.hints:
        columns = [
            (name, window.of_hint(name, _decode(run, autoencoder, values[f"hint.{name}"]))) for name in run.hints
        ]
        columns += [("sample", window.shown(samples)), ("target", window.shown(target))]
        captions = {(row, len(columns) - 2): f"{_psnr(samples[row], target[row]):.1f} dB" for row in range(count)}
    path = Path(run.config.output_dir, "samples", run.phase.name) / f"samples_epoch_{epoch:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{run.phase.name}, epoch {epoch}, step {run.state.step}"
    picture = sample_grid(columns, path, captions=captions, title=title)
    records.image("samples", picture, run.state.step)
    records.emit(SampleEvent(run.phase.name, run.state.step, epoch, str(path.relative_to(run.config.output_dir))))
    return path


def draw_progress(run: PhaseRun, baseline: float | None, keep: bool = False) -> None:
    """Write latest_progress.png from the records so far; with `keep`, a copy named after the step too."""
    monitoring = run.config.monitoring
    if not (monitoring.plot_loss or monitoring.plot_lr):
        return
    records = read_events(run.config.output_dir, phase=run.phase.name)
    folder = Path(run.config.output_dir, "plots", run.phase.name)
    folder.mkdir(parents=True, exist_ok=True)
    latest = folder / "latest_progress.png"
    plot_progress(
        records,
        latest,
        title=run.phase.name,
        baseline=baseline,
        plot_loss=monitoring.plot_loss,
        plot_lr=monitoring.plot_lr,
    )
    if keep:
        replace_file(folder / f"training_progress_step_{run.state.step:08d}.png", latest.read_bytes())


@torch.no_grad()
def _sample(run: PhaseRun, noise: torch.Tensor, values: dict[str, np.ndarray]) -> np.ndarray:
    """Latents as the autoencoder knows them, (N, C, H, W) float32."""
    sigma_data, stats = run.config.scheduler.sigma_data, run.train_store.stats
    network = run.state.network.eval()
    parts = []
    with run.ema_weights(), run.autocast():
        for start in range(0, len(noise), run.config.train.batch_size):
            part = slice(start, start + run.config.train.batch_size)
            conditions = {}
            if run.hints:
                chosen = {key: array[part] for key, array in values.items()}
                hints = stack_hints(chosen, run.hints, stats, sigma_data).to(run.device)
                conditions["hints"] = network.encode_hints(hints)
            steps = run.config.monitoring.sample_steps
            parts.append(sample_euler(run.edm, network, noise[part].to(run.device), steps, **conditions).float().cpu())
    network.train()
    return stats.denormalise(torch.cat(parts).numpy(), sigma_data)


def _decode(run: PhaseRun, autoencoder: Autoencoder, latents: np.ndarray) -> np.ndarray:
    """(N, C, h, w) -> (N, H, W) float32 in [-1, 1]."""
    tensor = torch.from_numpy(latents.astype(np.float32)).to(run.device)
    return torch.cat([autoencoder.decode(part).cpu() for part in tensor.split(_DECODE_BATCH)]).numpy()


def _psnr(image: np.ndarray, target: np.ndarray) -> float:
    from skimage.metrics import peak_signal_noise_ratio  # a second of import, which no restart should wait for

    return float(peak_signal_noise_ratio(target, image, data_range=2.0))
