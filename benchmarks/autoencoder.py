"""What an autoencoder keeps of images it has not seen, and how its latents behave; several autoencoders side by side.

    python benchmarks/autoencoder.py --autoencoders embedded other/folder --images tiles/ more.tif

Prints for each autoencoder: reconstruction PSNR (dB, data range 1; mean and lowest over the images), std of each latent
channel, how much latents change when the image moves by one pixel (relative to their own norm; smaller is smoother),
and the time to encode one image relative to the first autoencoder, measured in alternation in this run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from ray_pipeline.data.images import IMAGE_SUFFIXES, open_image
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoders", nargs="+", default=["embedded"])
    parser.add_argument("--images", nargs="+", type=Path, required=True, help="8- or 16-bit images or folders of them")
    parser.add_argument("--limit", type=int, default=1000, help="images to use at most")
    arguments = parser.parse_args()
    tiles = [tile for path in _files(arguments.images)[: arguments.limit] for tile in _tiles(path)]
    autoencoders = {name: load_autoencoder(name) for name in arguments.autoencoders}
    seconds: dict[str, list[float]] = {name: [] for name in autoencoders}
    scores: dict[str, list[float]] = {name: [] for name in autoencoders}
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in autoencoders}
    moved: dict[str, list[float]] = {name: [] for name in autoencoders}
    for tile in tiles:
        for name, autoencoder in autoencoders.items():
            started = time.perf_counter()
            code = autoencoder.encode(tile[None])
            seconds[name].append(time.perf_counter() - started)
            latents[name].append(code)
            back = autoencoder.decode(code)[0].numpy()
            scores[name].append(peak_signal_noise_ratio((tile.numpy() + 1) / 2, (back + 1) / 2, data_range=1.0))
            moved[name].append(shift_change(autoencoder, tile))
    first = statistics.median(seconds[next(iter(autoencoders))])
    print(f"{len(tiles)} images")
    for name in autoencoders:
        std = torch.cat([code.transpose(0, 1).flatten(1) for code in latents[name]], dim=1).std(dim=1)
        print(f"{name}")
        print(f"  PSNR            {np.mean(scores[name]):.2f} dB, lowest {min(scores[name]):.2f}")
        print(f"  latent std      {' '.join(f'{value:.3f}' for value in std.tolist())}")
        print(f"  one-pixel shift {statistics.mean(moved[name]):.3f}")
        print(f"  encode time     {statistics.median(seconds[name]) / first:.2f} of the first")


def shift_change(autoencoder: Autoencoder, tile: torch.Tensor) -> float:
    """Relative change of centred latents when the tile moves by one pixel; the border is left out."""
    here = autoencoder.encode(tile[None, :-8, :-8])[..., 2:-2, 2:-2]
    there = autoencoder.encode(tile[None, :-8, 1:-7])[..., 2:-2, 2:-2]
    centred = here - here.mean(dim=(2, 3), keepdim=True)
    return float((there - here).norm() / centred.norm())


def _files(paths: list[Path]) -> list[Path]:
    found = []
    for path in paths:
        inner = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found += inner if path.is_dir() else [path]
    return found


def _tiles(path: Path) -> list[torch.Tensor]:
    """Every plane as a tile in [-1, 1], cut to multiples of 8."""
    image = open_image(path)
    pixels = np.stack([image.plane(*index) for index in np.ndindex(*(image.sizes[axis] for axis in "TCZ"))])
    unit = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    height, width = (8 * (n // 8) for n in unit.shape[1:])
    return [torch.from_numpy(np.ascontiguousarray(2 * plane[:height, :width] - 1)) for plane in unit]


if __name__ == "__main__":
    main()
