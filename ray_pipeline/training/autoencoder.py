"""Train a small autoencoder (diffusers' AutoencoderTiny) on the tiles of manifests: `ray-pipeline train-vae`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from ray_pipeline.data.manifest import Manifest, check_tiles, load_manifest
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.diffusion.noise import sample_generator, stream_key
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import Autoencoder
from ray_pipeline.monitoring.progress import Progress
from ray_pipeline.training.autoencoder_settings import AutoencoderTraining


def train_autoencoder(sources: Sequence[Path], out: Path, settings: AutoencoderTraining) -> dict[str, float]:
    """Train on the train split of each source, write `out` in diffusers format (fp16), return PSNR a data set.

    Sources are manifests, data set folders or data roots. Every data set is drawn equally often, whatever its size.
    Returns the mean reconstruction PSNR (dB, data range 1) over each data set's validation tiles.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give a new folder to --out")
    manifests, validation = ([load_manifest(source, split=split) for source in sources] for split in ("train", "val"))
    for manifest in manifests + validation:
        check_tiles(manifest)
    for manifest in manifests:
        _check_sizes(manifest, settings.crop)
    torch.manual_seed(settings.seed)
    network = build_tiny_autoencoder(settings.width, settings.blocks)
    network.to(memory_format=torch.channels_last)
    _fit(network, manifests, settings)
    partial = _fresh(out)
    network.half().save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    network.float().to(memory_format=torch.channels_last)
    autoencoder = Autoencoder(network, str(out))
    psnr = {manifest.dataset: reconstruction_psnr(autoencoder, manifest) for manifest in validation}
    record = {"settings": asdict(settings), "datasets": [m.dataset for m in manifests], "val_psnr": psnr}
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, out)
    return psnr


def build_tiny_autoencoder(width: int, blocks: Sequence[int]) -> AutoencoderTiny:
    """One grey channel, 4 latent channels, 8 times smaller; the decoder mirrors the encoder."""
    return AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=tuple(blocks),
        num_decoder_blocks=tuple(reversed(blocks)),
    )


def reconstruction_psnr(autoencoder: Autoencoder, manifest: Manifest) -> float:
    """Mean PSNR (dB) of decode(encode(tile)) over a manifest, data range 1; nan for an empty one."""
    scores = []
    for index in range(len(manifest)):
        tile = read_tile(manifest.path(index))
        rows, columns = (8 * (n // 8) for n in tile.shape)
        tile = tile[:rows, :columns]
        back = autoencoder.decode(autoencoder.encode(torch.from_numpy(tile)[None]))[0].numpy()
        scores.append(peak_signal_noise_ratio((tile + 1) / 2, (back + 1) / 2, data_range=1.0))
    return float(np.mean(scores)) if scores else math.nan


def _fit(network: AutoencoderTiny, manifests: Sequence[Manifest], settings: AutoencoderTraining) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
    progress = Progress(settings.steps, "autoencoder", unit="step")
    for step, crops in enumerate(_batches(manifests, settings)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        loss, squared = _loss(network, crops, settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1, psnr=f"{-10 * math.log10(float(squared) / 4):.1f}")
    progress.close()


def _loss(network: AutoencoderTiny, crops: Tensor, settings: AutoencoderTraining) -> tuple[Tensor, Tensor]:
    latents = network.encode(crops).latents
    error = network.decode(latents).sample - crops
    squared = error.square().mean()
    loss = squared + settings.l1_weight * error.abs().mean() + settings.latent_weight * latents.square().mean()
    return loss, squared.detach()


def _learning_rate(step: int, settings: AutoencoderTraining) -> float:
    """Linear warm-up over 50 steps, then half a cosine down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * cosine)


def _batches(manifests: Sequence[Manifest], settings: AutoencoderTraining) -> Iterator[Tensor]:
    """Batches (B, 1, crop, crop) in [-1, 1], a pure function of (seed, step), read ahead in threads."""
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(_batch, manifests, settings, step) for step in range(min(3, settings.steps))]
        for step in range(settings.steps):
            batch = ahead.pop(0).result()
            if step + 3 < settings.steps:
                ahead.append(pool.submit(_batch, manifests, settings, step + 3))
            yield batch


def _batch(manifests: Sequence[Manifest], settings: AutoencoderTraining, step: int) -> Tensor:
    # streams of neighbouring steps must not overlap: a bare counter=step starts four draws further on the same one
    rng = sample_generator(stream_key(settings.seed, "autoencoder"), step)
    crops = [_crop(manifests[rng.integers(len(manifests))], settings.crop, rng) for _ in range(settings.batch_size)]
    batch = torch.from_numpy(np.stack(crops))[:, None]
    return batch.contiguous(memory_format=torch.channels_last)


def _crop(manifest: Manifest, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop, turned and mirrored; half of them dimmed, since laboratories differ in gain."""
    index = int(rng.integers(len(manifest)))
    tile = read_tile(manifest.path(index))
    if min(tile.shape) < size:
        raise UserError(f"{manifest.path(index)} is {tile.shape[1]}x{tile.shape[0]} px, smaller than --crop {size}")
    top, left = (int(rng.integers(n - size + 1)) for n in tile.shape)
    crop = np.rot90(tile[top : top + size, left : left + size], int(rng.integers(4)))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.5:
        crop = (crop + 1) * np.float32(rng.uniform(0.3, 1.0)) - 1
    return np.ascontiguousarray(crop, dtype=np.float32)


def _check_sizes(manifest: Manifest, crop: int) -> None:
    """UserError when the manifest says that a tile is smaller than a crop: better now than in the last minute."""
    for column in manifest.table.columns.intersection(["height", "width"]):
        small = manifest.table["image"][manifest.table[column] < crop]
        if len(small):
            raise UserError(
                f"{manifest.folder}: {len(small)} tiles have a {column} below {crop} px (first: {small.iat[0]}), "
                f"the size of a training crop; give a smaller --crop or larger tiles"
            )


def _fresh(out: Path) -> Path:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
