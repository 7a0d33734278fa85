"""Which design choices lower the validation loss at equal time: the measurements behind the defaults.

    python benchmarks/choices.py noise-embedding      # Phase 1 with each embedding of the noise level
    python benchmarks/choices.py hint-control         # Phase 2: tokens, the aligned path, all weights or low-rank parts
    python benchmarks/choices.py noisy-hints          # Phase 2, denoising alone: autoencoder latents or pixels as hint

Trains the demo's network on the embedded sample data with one choice changed, in one process and thread, each for the
same CPU time (validation left out), from the same start, on the same samples and noise. Prints weighted EDM losses of
validation tiles with the EMA weights at parts of the time, the loss with each tile given the hints of another, and the
difference to the first row with its paired standard error. Noise of the validation is fixed here, apart from that of a
run, so that pixels can stand in for latents; losses compare within one table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_run import encode, next_batches, open_run
from timm.layers import PatchEmbed

from ray_pipeline.config import Config, load_config
from ray_pipeline.data.encode import STORED_TILES
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.diffusion.noise import draw
from ray_pipeline.models.architectures import DOWNSCALE
from ray_pipeline.models.dit import DiT
from ray_pipeline.models.hint_control import AlignedHint
from ray_pipeline.training.build import make_network
from ray_pipeline.training.setup import PhaseRun
from ray_pipeline.training.step import optimize
from ray_pipeline.training.validation import other_tiles, standard_error

ROOT = Path(__file__).resolve().parent.parent
PARTS = (0.25, 0.5, 1.0)
_FAR_STEPS = 10**6  # a phase that time ends, not its steps


@dataclass(frozen=True)
class Choice:
    """One row of the table: settings that differ from the demo's, and whether hints are pixels."""

    name: str
    settings: tuple[str, ...] = ()
    pixels: bool = False


TOKENS, ALIGNED = "hint_control.aligned=false", "hint_control.aligned=true"
LORA = "phases.1.trainable=lora"
CHOICES = {
    "noise-embedding": [
        Choice(kind, (f"model.noise_embedding={kind}",)) for kind in ("scaled", "reference", "fourier")
    ],
    "hint-control": [
        Choice("tokens + aligned, full", (ALIGNED,)),
        Choice("tokens, full", (TOKENS,)),
        Choice("tokens + aligned, lora 16", (ALIGNED, LORA)),
        Choice("tokens, lora 16", (TOKENS, LORA)),
        Choice("tokens, lora 4", (TOKENS, LORA, "hint_control.lora_rank=4")),
    ],
    "noisy-hints": [Choice("autoencoder"), Choice("pixels", pixels=True)],
}


class PixelHintDiT(DiT):
    """A DiT whose hints are pixels: each patch covers the same tile area as a latent patch does."""

    def __init__(self, **shape):
        super().__init__(**shape)
        size, patch, channels, hidden = self.latent_size, self.patch_size, DOWNSCALE**2, shape["hidden_size"]
        self.pixel_embedder = PatchEmbed(size, patch, channels, hidden)
        self.aligned_hint = AlignedHint(size, patch, channels, hidden)

    def _embed_hints(self, hints: torch.Tensor) -> torch.Tensor:
        return self.pixel_embedder(hints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CHOICES)
    parser.add_argument("--minutes", type=float, default=4.0, help="CPU minutes a choice")
    parser.add_argument("--base-minutes", type=float, default=6.0, help="CPU minutes of Phase 1 before hints")
    parser.add_argument("--fields", type=int, default=160, help="of 512 px, four tiles each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the choices, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = [f"data.root={folder}/data", f"output_dir={folder}/run", f"data.simulate.fields={arguments.fields}"]
        base += ["optimizer.schedule=constant", "train.precision=fp32", "ema.power_stds=[]"]
        if arguments.what == "noisy-hints":
            base.append("phases.1.condition_types=[denoising]")
        encode(load_config(ROOT / "configs" / "demo.yaml", base))
        for seed in range(arguments.seeds):
            compare(arguments, [*base, f"seed={seed}"])


def compare(arguments: argparse.Namespace, base: list[str]) -> None:
    """Train every choice of the table with one seed, and print it."""
    choices = CHOICES[arguments.what]
    if arguments.only:
        choices = [choices[number] for number in arguments.only]
    phase = 0 if arguments.what == "noise-embedding" else 1
    start = None
    if phase:
        run = open_run(load_config(ROOT / "configs" / "demo.yaml", base), 0)
        for _ in train(run, arguments.base_minutes, (1.0,), lambda batch, rows: batch):
            pass
        start = {**run.state.network.state_dict(), **run.state.ema.tensors()}
        print(f"{base[-1]}: Phase 1 for {arguments.base_minutes:g} CPU minutes, {run.state.step} steps, "
              f"loss {validate(run, None).mean():.4f}", flush=True)  # fmt: skip
    first = None
    for choice in choices:
        config = load_config(ROOT / "configs" / "demo.yaml", [*base, *choice.settings])
        network = PixelHintDiT(**make_network(config, config.phases[phase]).shape) if choice.pixels else None
        run = open_run(config, phase, network)
        if start is not None:
            load(run.state.network, start)
        pixels = {split: read_pixels(config, split) for split in ("train", "val")} if choice.pixels else None
        hints = val_hints(run, pixels and pixels["val"])
        with_hints = (lambda batch, rows: batch) if pixels is None else substituted(pixels["train"])
        parts = []
        for _ in train(run, arguments.minutes, PARTS, with_hints):
            losses = validate(run, hints)
            parts.append(f"{losses.mean():.4f}")
        first = losses if first is None else first
        difference = (losses - first).mean(axis=1)
        shuffled = "" if hints is None else f", shuffled {validate(run, hints[other_tiles(run.val_rows)]).mean():.4f}"
        print(f"{choice.name:<28} {run.state.step:5d} steps, loss {' '.join(parts)}{shuffled}, to the first "
              f"{difference.mean():+.4f} +- {standard_error(difference):.4f}", flush=True)  # fmt: skip


def load(network: DiT, start: dict[str, torch.Tensor]) -> None:
    """Begin from the weights of Phase 1; what hints alone use may be new."""
    missing, unexpected = network.load_state_dict(start, strict=False)
    new = {name.split(".")[0] for name in missing} - {"aligned_hint", "hint_lora", "pixel_embedder"}
    assert not new | set(unexpected), f"not those of Phase 1: {new}, {unexpected}"


def train(run: PhaseRun, minutes: float, parts: tuple[float, ...], with_hints: Callable) -> Iterator[None]:
    """Train for so many CPU minutes; yields at each part of them, and what happens then is not counted."""
    spent, pending = 0.0, list(parts)
    while pending:
        started = time.process_time()
        rows, batches = next_batches(run)
        optimize(run, run.state.step, [with_hints(batch, taken) for batch, taken in zip(batches, rows, strict=True)])
        spent += time.process_time() - started
        if spent >= 60 * minutes * pending[0]:
            pending.pop(0)
            yield


def val_hints(run: PhaseRun, pixels: torch.Tensor | None) -> torch.Tensor | None:
    """Hints of every validation tile, (N, K, C, H, W)."""
    if pixels is not None or not run.hints:
        return pixels
    stored, stats = run.val_store.gather(run.val_rows, hints=run.hints), run.val_store.stats
    stacked = np.stack([stored[f"hint.{name}"] for name in run.hints], axis=1)
    return torch.from_numpy(stats.normalise(stacked, run.config.scheduler.sigma_data))


@torch.no_grad()
def validate(run: PhaseRun, hints: torch.Tensor | None) -> np.ndarray:
    """Losses (tiles, levels) with the EMA weights; noise keyed by tile and level."""
    network, sigmas = run.state.network.eval(), run.edm.validation_sigmas(4)
    latents = run.val_store.gather(run.val_rows, hints=())["latent"]
    x0 = torch.from_numpy(run.val_store.stats.normalise(latents, run.config.scheduler.sigma_data))
    losses = np.empty((len(x0), len(sigmas)))
    with run.ema_weights():
        for part in np.array_split(np.arange(len(x0)), max(1, len(x0) // 32)):
            cache = {} if hints is None else {"hints": network.encode_hints(hints[part])}
            for level, sigma in enumerate(sigmas):
                noise = torch.from_numpy(draw(0, "validation", part * 4 + level, x0.shape[1:]).noise)
                losses[part, level] = run.edm.loss(network, x0[part], sigma.float().expand(len(part)), noise, **cache)
    network.train()
    return losses


def read_pixels(config: Config, split: str) -> torch.Tensor:
    """The denoising hint of every tile in pixels, (N, 1, 64, H/8, W/8): 8x8 pixels stand where a latent does."""
    job = encode_job(config)
    reader, table = TileReader(job), TileTable(LatentStore.open(Path(job.store) / split).folder, STORED_TILES)
    rows = table.rows(range(len(table)))
    images = np.stack([reader.images(Request(row, [0], ["hint.denoising"]))[0][1] for row in rows])
    return F.pixel_unshuffle(torch.from_numpy(images)[:, None], DOWNSCALE)[:, None]


def substituted(pixels: torch.Tensor) -> Callable:
    """A function that gives a micro-batch of these rows its hints as pixels."""
    return lambda batch, rows: replace(batch, hints=pixels[torch.from_numpy(rows)])


if __name__ == "__main__":
    main()
