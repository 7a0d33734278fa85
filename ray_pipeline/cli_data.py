"""The commands around data: simulate, train-vae, hints. Parses words, calls the job, prints; no logic."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ray_pipeline.cli_prepare import add_prepare
from ray_pipeline.cli_words import Add, add_config, config_words, counts_in_words, local_path


def add_data_commands(add: Add) -> None:
    """Add the commands, in the order of --help."""
    _add_simulate(add)
    add_prepare(add)
    _add_train_vae(add)
    _add_hints(add)


def _add_simulate(add: Add) -> None:
    parser = add(
        "simulate",
        _simulate,
        "write the embedded sample data set: fluorescence fields with degraded partners",
        "ray-pipeline simulate --out data --fields 64",
    )
    parser.add_argument("--out", type=local_path, required=True, help="data root to write")
    parser.add_argument("--fields", type=int, default=64, help="fields of view (default 64)")
    parser.add_argument("--field-size", type=int, default=512, help="pixels of a field (default 512)")
    parser.add_argument("--tile-size", type=int, default=512, help="pixels of a tile; divides the field (default 512)")
    parser.add_argument("--val-fraction", type=float, default=0.15, help="share of fields for validation")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8), help="of the low-resolution partners")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.add_argument("--dataset", default="simulated", help="name of the data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def _add_train_vae(add: Add) -> None:
    from ray_pipeline.training.autoencoder_settings import AutoencoderTraining

    parser = add(
        "train-vae",
        _train_vae,
        "train a small autoencoder (diffusers' AutoencoderTiny) on prepared tiles",
        "ray-pipeline train-vae data/foundation/my_images --out my_autoencoder",
    )
    parser.add_argument("sources", type=Path, nargs="+", help="data set folders, manifests or data roots")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in diffusers format")
    for field in dataclasses.fields(AutoencoderTraining):
        many = isinstance(field.default, tuple)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default[0]) if many else type(field.default),
            nargs=len(field.default) if many else None,
            default=field.default,
            help=f"default {field.default}",
        )


def _add_hints(add: Add) -> None:
    parser = add(
        "hints",
        _hints,
        "list the hints with their parameters; --preview draws them for your tiles",
        "ray-pipeline hints --config configs/demo.yaml --preview hints.png",
    )
    add_config(parser)
    parser.add_argument(
        "--preview", type=Path, nargs="?", const=Path("hints.png"), metavar="PNG",
        help="write a picture of tiles with their hints (default hints.png)",
    )  # fmt: skip
    parser.add_argument("--names", nargs="+", default=[], metavar="HINT", help="which hints (default: all)")
    parser.add_argument("--tiles", type=int, default=6, help="tiles to draw, spread over the data (default 6)")


def _simulate(arguments) -> None:
    from ray_pipeline.data.sources.simulate import simulate
    from ray_pipeline.monitoring.progress import Progress

    progress = Progress(arguments.fields, "simulate", unit="field")
    summary = simulate(
        arguments.out,
        fields=arguments.fields,
        seed=arguments.seed,
        field_size=arguments.field_size,
        tile_size=arguments.tile_size,
        dataset=arguments.dataset,
        val_fraction=arguments.val_fraction,
        scale=arguments.scale,
        workers=arguments.workers,
        progress=lambda done, _: progress.update(done),
    )
    progress.close("was there already" if summary.reused else "")
    print(f"tiles     {summary.foundation}: {counts_in_words(summary.tiles)}")
    print(f"partners  {summary.degraded}: {', '.join(summary.partners)}")
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set data.root={arguments.out}")


def _train_vae(arguments) -> None:
    from ray_pipeline.training.autoencoder import train_autoencoder
    from ray_pipeline.training.autoencoder_settings import AutoencoderTraining

    names = [field.name for field in dataclasses.fields(AutoencoderTraining)]
    values = {name: getattr(arguments, name) for name in names}
    settings = AutoencoderTraining(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for dataset, psnr in train_autoencoder(arguments.sources, arguments.out, settings).items():
        print(f"{dataset}: {psnr:.2f} dB on its validation tiles")
    print(f"weights   {arguments.out}")
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set vae.pretrained={arguments.out}")


def _hints(arguments) -> None:
    from ray_pipeline.config import load_config
    from ray_pipeline.data.hint_registry import known_hints, resolve_hints

    config = load_config(arguments.config, arguments.overrides)
    for name, settings in resolve_hints(config.data.hints, arguments.names or known_hints()).items():
        print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    if arguments.preview is not None:
        from ray_pipeline import encoding

        encoding.preview_hints(config, arguments.names, arguments.tiles, arguments.preview)
        print(f"picture   {arguments.preview}")
        print(f"next      ray-pipeline encode {config_words(arguments)}")
    else:
        print(f"next      ray-pipeline hints {config_words(arguments)} --preview hints.png")
