"""The commands sample and ema: parse words, call the job, print what it made; no logic."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from ray_pipeline.cli_words import Add, ascii_text
from ray_pipeline.errors import UserError

_TILES, _SEED = 16, 0
_MOST_TILES = 1_000_000


def add_inference_commands(add: Add) -> None:
    """Add the commands, in the order of --help."""
    parser = add(
        "sample",
        _sample,
        "draw tiles from trained weights, with or without hint images",
        "ray-pipeline sample demo_output/run --out tiles\n"
        "         ray-pipeline sample run/checkpoints/phase2_epoch_010.ckpt --out tiles --hint denoising=noisy.tif",
    )
    parser.add_argument("weights_path", metavar="PATH", help="a run's output_dir, a checkpoint folder or .safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--weights", default="ema", metavar="NAME", help="ema (default), model, or an average's name")
    parser.add_argument("--vae", metavar="PATH", help="the autoencoder, where it is no longer where training had it")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--tiles", type=int, metavar="N", help=f"how many, of each hint image (default {_TILES})")
    tiles.add_argument("--seed", type=int, metavar="S", help=f"tiles have seeds S to S+N-1 (default {_SEED})")
    tiles.add_argument("--seeds", type=int, nargs="+", metavar="S", help="or these seeds")
    tiles.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="B",
        help="tiles at once (default 4); always so many, so fewer tiles are no faster",
    )
    sampler = parser.add_argument_group("sampler (Karras et al. 2022)")
    sampler.add_argument("--sampler", choices=("heun", "euler"), default="heun", help="steps (default heun)")
    sampler.add_argument("--steps", type=int, default=32, help="of the noise grid (default 32)")
    sampler.add_argument("--churn", type=float, default=0.0, metavar="S_CHURN", help="fresh noise (default 0: none)")
    sampler.add_argument("--churn-min", type=float, default=0.0, metavar="SIGMA", help="from this noise level up")
    sampler.add_argument("--churn-max", type=float, default=math.inf, metavar="SIGMA", help="up to this noise level")
    sampler.add_argument("--churn-noise", type=float, default=1.0, metavar="S_NOISE", help="its std (default 1)")
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument(
        "--guidance", type=float, default=1.0, metavar="W",
        help="weight against the estimate without hints, or that of --guide (default 1: none)",
    )  # fmt: skip
    guidance.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, math.inf), metavar=("LO", "HI"),
        help="noise levels where it acts (default: all)",
    )  # fmt: skip
    guidance.add_argument("--guide", metavar="PATH", help="a worse model of the same latents (autoguidance)")
    guidance.add_argument("--guide-weights", default="ema", metavar="NAME", help="its weights (default ema)")
    hints = parser.add_argument_group("hints and intensities")
    hints.add_argument(
        "--hint", action="append", default=[], metavar="NAME=PATH",
        help="an image, or a folder of images, of the tile's size; for super_resolution of low resolution",
    )  # fmt: skip
    hints.add_argument("--strength", action="append", default=[], metavar="NAME=X", help="of a hint; 1 as trained")
    hints.add_argument("--dataset", metavar="NAME", help="in whose units tiles are written (default: of most tiles)")
    hints.add_argument("--channel", type=int, metavar="N", help="channel of that data set (default: of most tiles)")
    hints.add_argument(
        "--intensity", choices=("data", "image", "tile"),
        help="of hint images: the range of the training data (default where it is known), the image's own percentiles, "
        "or it is a tile that `prepare` wrote",
    )  # fmt: skip
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA where there is"
    )
    device.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the network (auto: bf16 on CUDA)"
    )
    _add_ema(add)


def _add_ema(add: Add) -> None:
    parser = add(
        "ema",
        _ema,
        "make the weights of a power-function average of any width from a run's snapshots",
        "ray-pipeline ema demo_output/run --std 0.08",
    )
    parser.add_argument("run", help="the run's output_dir")
    parser.add_argument(
        "--std", type=float, required=True, metavar="S", help="relative width, such as 0.08 (at most 0.288)"
    )
    parser.add_argument("--phase", metavar="NAME", help="of this phase (default: the last that has snapshots)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="at the snapshot of this optimizer step (default: the newest)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .safetensors file (default: in <run>/weights)")


def _ema(arguments) -> None:
    from ray_pipeline.inference.posthoc import make_average

    made = make_average(arguments.run, arguments.std, phase=arguments.phase, step=arguments.step, out=arguments.out)
    print(f"weights   {ascii_text(str(made.path))}")
    print(
        f"average   relative width {arguments.std} at step {made.step} of {made.phase}, from {made.snapshots} snapshots"
    )
    words = "more than it should be; choose a width nearer to those of ema.power_stds"
    print(f"profile   {made.error:.2g} (relative L2) from the wanted one" + (f": {words}" if made.error > 0.1 else ""))
    print(f"next      ray-pipeline sample {ascii_text(shlex.quote(str(made.path)))} --out tiles")


def _sample(arguments) -> None:
    from ray_pipeline.inference.job import sample
    from ray_pipeline.inference.settings import SampleJob, SamplerSettings

    settings = SamplerSettings(
        sampler=arguments.sampler,
        steps=arguments.steps,
        churn=arguments.churn,
        churn_min=arguments.churn_min,
        churn_max=arguments.churn_max,
        churn_noise=arguments.churn_noise,
        guidance=arguments.guidance,
        guidance_interval=tuple(arguments.guidance_interval),
    )
    job = SampleJob(
        weights_path=arguments.weights_path,
        out=arguments.out,
        seeds=_seeds(arguments),
        sampler=settings,
        batch_size=arguments.batch_size,
        weights=arguments.weights,
        vae=arguments.vae,
        guide=arguments.guide,
        guide_weights=arguments.guide_weights,
        hints={name: Path(path) for name, path in _pairs("--hint", arguments.hint).items()},
        strength={name: _number(name, value) for name, value in _pairs("--strength", arguments.strength).items()},
        dataset=arguments.dataset,
        channel=arguments.channel,
        intensity=arguments.intensity,
        device=arguments.device,
        precision=arguments.precision,
    )
    _print_sampled(sample(job, say=lambda words: print(ascii_text(words), flush=True)), arguments)


def _seeds(arguments) -> tuple[int, ...]:
    if arguments.seeds is not None:
        if arguments.tiles is not None or arguments.seed is not None:
            raise UserError("--seeds names every seed, so --tiles and --seed have no place beside it; leave them out")
        return tuple(arguments.seeds)
    count = _TILES if arguments.tiles is None else arguments.tiles
    if not 1 <= count <= _MOST_TILES:
        raise UserError(f"--tiles {count}: expected 1 to {_MOST_TILES}; change it")
    first = _SEED if arguments.seed is None else arguments.seed
    return tuple(range(first, first + count))


def _pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (name and separator and value):
            raise UserError(f"{option} {word}: expected NAME={'PATH' if option == '--hint' else 'X'}; change it")
        if name in pairs:
            raise UserError(f"{option} {name} is given twice; give it once")
        pairs[name] = value
    return pairs


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--strength {name}={text}: expected a number above 0, 1 as trained; change it") from None


def _print_sampled(sampled, arguments) -> None:
    first, count = sampled.files[0], len(sampled.files)
    print(f"tiles     {ascii_text(str(first))}" + (f" and {count - 1} more" if count > 1 else ""))
    print(f"picture   {ascii_text(str(sampled.picture))}")
    print(f"record    {ascii_text(str(sampled.record))}")
    of_the_guide = f", and {sampled.guide_calls} of the guide" if sampled.guide_calls else ""
    print(f"calls     {sampled.calls} of the network for a tile{of_the_guide}")
    if sampled.hints and not arguments.hint:
        words = shlex.join(["ray-pipeline", "sample", arguments.weights_path, "--out", f"{arguments.out}_hinted"])
        print(f"next      {ascii_text(words)} --hint {sampled.hints[0]}=IMAGE")
