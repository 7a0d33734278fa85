"""Validation on fixed tiles, noise levels and noise, with EMA weights, shared among the ranks."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import spread
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.run_copy import run_path
from ray_pipeline.storage import replace_file
from ray_pipeline.training.ema import EMA, PowerTrack
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import stack_hints

_MAX_LEVELS = 1000  # noise of level l of row i is number i * _MAX_LEVELS + l


@dataclass(frozen=True)
class Validation:
    """Weighted EDM loss of each tile at each noise level, (tiles, levels) float64, and the levels."""

    losses: np.ndarray
    sigmas: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean over tiles; nan for a single tile."""
        return standard_error(self.losses.mean(axis=1))

    @property
    def by_sigma(self) -> dict[str, float]:
        """Mean loss over tiles of each level; levels have as many digits as tell them apart, three at least."""
        for digits in range(3, 18):
            names = [f"{sigma:.{digits}g}" for sigma in self.sigmas]
            if len(set(names)) == len(names):
                break
        return dict(zip(names, self.losses.mean(axis=0).tolist(), strict=True))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; nan for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_gain(right: Validation, shuffled: Validation) -> tuple[float, float]:
    """How much lower the loss with the right hints is than with shuffled ones: mean over tiles and its paired standard
    error."""
    difference = (shuffled.losses - right.losses).mean(axis=1)
    return float(difference.mean()), standard_error(difference)


@torch.no_grad()
def validate(
    run: PhaseRun,
    *,
    average: EMA | PowerTrack | None = None,
    hints: tuple[str, ...] | None = None,
    shuffled: bool = False,
) -> Validation:
    """Validation loss of the EMA weights; all ranks call it and get the same result.

    average: the one to validate, default the first. hints: those that are given, default all of the phase. With
    `shuffled`, each tile gets the hints of another one.
    """
    given = run.hints if hints is None else hints
    sigmas = run.edm.validation_sigmas(run.config.monitoring.val_noise_levels)
    tiles = run.val_rows
    losses = torch.zeros((len(tiles), len(sigmas)), dtype=torch.float64, device=run.device)
    network = run.state.network.eval()
    with run.ema_weights() if average is None else average.applied():
        for start in range(0, len(tiles), run.config.train.batch_size * run.world_size):
            own = np.arange(start, min(start + run.config.train.batch_size * run.world_size, len(tiles)))
            own = own[own % run.world_size == run.rank]
            if len(own):
                _fill(run, network, own, sigmas, losses, given, shuffled)
    network.train()
    if run.world_size > 1:
        torch.distributed.all_reduce(losses)
    return Validation(losses=losses.cpu().numpy(), sigmas=sigmas.numpy())


def validate_averages(run: PhaseRun) -> dict[str, Validation]:
    """Validation of each average by its name, that of `validate` first; all ranks call it."""
    return {average.group: validate(run, average=average) for average in run.state.averages} or {
        run.state.average_name: validate(run)
    }


def write_tile_losses(run: PhaseRun, found: Mapping[str, Validation], epoch: int) -> None:
    """Store the losses of each average at each tile and noise level, (tiles, levels) float64, as of this step, which
    ends an epoch."""
    buffer = io.BytesIO()
    np.savez(buffer, epoch=np.int64(epoch), **{name: validation.losses for name, validation in found.items()})
    path = tile_losses_path(run.config.output_dir, run.phase.name, run.state.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def has_tile_losses(run: PhaseRun) -> bool:
    """Whether those of this step are stored: it ends an epoch, and the disk took them."""
    return tile_losses_path(run.config.output_dir, run.phase.name, run.state.step).exists()


def read_tile_losses(run_dir: str | Path, phase: str, step: int) -> tuple[int, dict[str, np.ndarray]]:
    """What `write_tile_losses` stored: the epoch that ended, and losses by average."""
    with np.load(tile_losses_path(run_dir, phase, step), allow_pickle=False) as file:
        stored = dict(file)
    return int(stored.pop("epoch")), stored


def tile_losses_path(run_dir: str | Path, phase: str, step: int) -> Path:
    """Where they lie."""
    return _tile_losses_folder(run_dir, phase) / f"step_{step:08d}.npz"


def tile_losses_steps(run_dir: str | Path, phase: str) -> list[int]:
    """Steps of which there are some, in order."""
    return sorted(
        int(path.stem.removeprefix("step_")) for path in _tile_losses_folder(run_dir, phase).glob("step_*.npz")
    )


def _tile_losses_folder(run_dir: str | Path, phase: str) -> Path:
    return run_path(run_dir, "logs", "validation", phase)


def _fill(run: PhaseRun, network, own: np.ndarray, sigmas, losses, given: tuple[str, ...], shuffled: bool) -> None:
    x0 = _tiles(run, run.val_store, run.val_rows[own])
    conditions = {}
    if given:
        source = other_tiles(run.val_rows)[own] if shuffled else own
        values = run.val_store.gather(run.val_rows[source], hints=given, simulated=run.val_simulated[source])
        hints = stack_hints(values, given, run.val_store.stats, run.config.scheduler.sigma_data)
        with run.autocast():
            conditions["hints"] = network.encode_hints(hints.to(run.device))
    for level in range(len(sigmas)):
        losses[own, level] = _loss_at(run, network, x0, "validation", run.val_rows[own], sigmas, level, **conditions)


def other_tiles(rows: np.ndarray) -> np.ndarray:
    """For each place in `rows` (N,) the place of another row, each place once; far away, since neighbours are cut from
    one image. A row may be there several times, with real and with simulated degradations."""
    order = np.argsort(rows, kind="stable")
    most = int(np.unique(rows, return_counts=True)[1].max())
    shift = max(most, min(2 * len(rows) // 5, len(rows) - most))
    others = np.empty_like(order)
    others[order] = np.roll(order, -shift)
    return others


@torch.no_grad()
def untrained_loss(run: PhaseRun, limit: int = 1024) -> tuple[float, float]:
    """Loss of the network before its first step on tiles that its latent statistics came from, and its standard error.

    A fresh DiT returns zero, so this is 1 if and only if the latents are normalised to sigma_data. On all of those
    tiles only the noise n differs from what is expected: the target is v = c n - s x with c^2 + s^2 = 1 and x^2 = 1 in
    the mean, so a value of v^2 has the variance 2 c^4 + 4 c^2 s^2 <= 2. On `limit` of them the choice differs too, and
    the error is measured. All ranks call it.
    """
    tiles = spread(len(run.train_store), limit)
    sigmas = run.edm.validation_sigmas(run.config.monitoring.val_noise_levels)
    losses = torch.zeros((len(tiles), len(sigmas)), dtype=torch.float64, device=run.device)
    network = run.state.network.eval()
    size = run.config.train.batch_size
    own = np.arange(run.rank, len(tiles), run.world_size)
    for start in range(0, len(own), size):
        taken = own[start : start + size]
        x0 = _tiles(run, run.train_store, tiles[taken])
        for level in range(len(sigmas)):
            losses[taken, level] = _loss_at(run, network, x0, "untrained", tiles[taken], sigmas, level)
    network.train()
    if run.world_size > 1:
        torch.distributed.all_reduce(losses)
    means = losses.mean(dim=1).cpu().numpy()
    if len(tiles) < len(run.train_store):
        return float(means.mean()), standard_error(means)
    return float(means.mean()), math.sqrt(2 / (losses.numel() * math.prod(run.train_store.shape)))


def _tiles(run: PhaseRun, store: LatentStore, rows: np.ndarray) -> torch.Tensor:
    latents = store.gather(rows, hints=())["latent"]
    return torch.from_numpy(store.stats.normalise(latents, run.config.scheduler.sigma_data)).to(run.device)


def _loss_at(run: PhaseRun, network, x0: torch.Tensor, purpose: str, rows, sigmas, level: int, **conditions):
    """Losses (B,) float64 at one noise level; the noise is keyed by purpose, row and level alone, so that every
    validation sees the same, however many tiles it takes."""
    noise = draw(run.config.seed, purpose, rows * _MAX_LEVELS + level, run.train_store.shape).noise
    at = sigmas[level].float().to(run.device).expand(len(rows))
    with run.autocast():
        return run.edm.loss(network, x0, at, torch.from_numpy(noise).to(run.device), **conditions).double()
