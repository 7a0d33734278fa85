"""The door: one sub-command a job. Parses words, calls the job, prints where its results are; no logic."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_pipeline.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 1 for a wrong set-up, 2 for wrong input, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        return arguments.job(arguments) or 0
    except UserError as error:
        print(f"error: {_ascii(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {_ascii(str(error.filename))}: {error.strerror}; give a path that can be used", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-pipeline", description="Train a diffusion prior for microscopy images on Ray, and use it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_simulate(commands)
    _add_prepare(commands)
    _add_train_vae(commands)
    encode = _add(commands, "encode", _encode, "turn tiles and hints into latent shards, once")
    _add_config(encode)
    encode.add_argument("--overwrite", action="store_true", help="replace a store of other tiles or settings")
    encode.add_argument("--verify", action="store_true", help="only check the hash of every stored shard")
    train = _add(commands, "train", _train, "the main job: all that is missing, then every phase")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on where the run in output_dir stopped")
    train.add_argument("--dry-run", action="store_true", help="print steps, memory, disk and time; write nothing")
    train.add_argument("--verbose", action="store_true", help="show what Ray's workers print")
    status = _add(commands, "status", _status, "print where a run stands", "ray-pipeline status demo_output/run")
    status.add_argument("run", type=Path, help="the run's output_dir")
    check = _add(commands, "check", _check, "verify the set-up: packages, device, autoencoder, Ray, a tiny step")
    _add_config(check)
    return parser


def _add(commands, name: str, run: Callable, words: str, example: str | None = None) -> argparse.ArgumentParser:
    example = example or f"ray-pipeline {name} --config configs/demo.yaml"
    parser = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(job=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file, such as configs/microscopy.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set one key of the config"
    )


def _add_simulate(commands) -> None:
    parser = _add(
        commands,
        "simulate",
        _simulate,
        "write the embedded sample data set: fluorescence fields with degraded partners",
        "ray-pipeline simulate --out data --fields 64",
    )
    parser.add_argument("--out", type=Path, required=True, help="data root to write")
    parser.add_argument("--fields", type=int, default=64, help="fields of view (default 64)")
    parser.add_argument("--field-size", type=int, default=512, help="pixels of a field (default 512)")
    parser.add_argument("--tile-size", type=int, default=512, help="pixels of a tile; divides the field (default 512)")
    parser.add_argument("--val-fraction", type=float, default=0.15, help="share of fields for validation")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8), help="of the low-resolution partners")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.add_argument("--dataset", default="simulated", help="name of the data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def _add_prepare(commands) -> None:
    parser = _add(
        commands,
        "prepare",
        _prepare,
        "turn images into tiles and manifests",
        "ray-pipeline prepare folder my_images --out data --tile-size 512",
    )
    parser.add_argument("kind", choices=("folder",), help="folder: any TIFF or PNG images below a folder")
    parser.add_argument("source", type=Path, metavar="ROOT", help="where the images are")
    parser.add_argument("--out", type=Path, required=True, metavar="DATA_ROOT", help="data root to write")
    parser.add_argument("--dataset", help="name of the data set (default: the folder's name)")
    parser.add_argument("--tile-size", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of images for validation (default 0.1)")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="share of images for test (default 0)")
    parser.add_argument("--channels", type=int, nargs="+", help="channels to take (default: all)")
    parser.add_argument(
        "--percentiles", type=float, nargs=2, default=(0.1, 99.9), metavar=("LO", "HI"),
        help="intensities that become 0 and 1, over all images (default 0.1 99.9)",
    )  # fmt: skip
    parser.add_argument("--max-rejected", type=int, default=0, help="images that may be left out (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")


def _add_train_vae(commands) -> None:
    from ray_pipeline.training.autoencoder_settings import AutoencoderTraining

    parser = _add(
        commands,
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
    print(f"tiles     {summary.foundation}: {_counts(summary.tiles)}")
    print(f"partners  {summary.degraded}: {', '.join(summary.partners)}")
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set data.root={arguments.out}")


def _prepare(arguments) -> None:
    from ray_pipeline.data.sources.folder import prepare_folder
    from ray_pipeline.monitoring.progress import Progress

    lines: dict[str, Progress] = {}

    def progress(stage: str, done: int, total: int) -> None:
        line = lines.setdefault(stage, Progress(total, stage, unit="image"))
        line.update(done)
        if done == total:
            line.close()

    summary = prepare_folder(
        arguments.source,
        arguments.out,
        dataset=arguments.dataset,
        tile_size=arguments.tile_size,
        val_fraction=arguments.val_fraction,
        test_fraction=arguments.test_fraction,
        seed=arguments.seed,
        percentiles=tuple(arguments.percentiles),
        channels=tuple(arguments.channels) if arguments.channels else None,
        max_rejected=arguments.max_rejected,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    print(f"images    {summary.listed} listed: {_counts(summary.images)}; {len(summary.rejected)} rejected")
    print(f"tiles     {summary.folder}: {_counts(summary.tiles)}")
    if summary.rejected:
        print(f"rejected  see {summary.folder / 'rejected.csv'}")
    if summary.dim:
        print(
            f"dim       {len(summary.dim)} image(s) use less than 30 % of their range, first {_ascii(summary.dim[0])};"
        )
        print("          if they come from another experiment, prepare them as a data set of their own")
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


def _encode(arguments) -> None:
    from ray_pipeline import pipeline
    from ray_pipeline.data.encode import verify
    from ray_pipeline.data.encode_job import encode_job
    from ray_pipeline.training.launch import ray_session

    config = _load(arguments)
    if arguments.verify:
        store = encode_job(config).store
        print(f"{verify(store)} shards of {store} are whole")
        return
    pipeline.prepare_data(config)
    prepared = pipeline.look(config, overwrite=arguments.overwrite)
    if prepared.stored:
        print(f"latents   {prepared.job.store}: stored already, nothing to do")
    else:
        with ray_session(config):
            pipeline.encode(config, prepared)
        print(f"latents   {prepared.job.store}: {_counts(prepared.tiles)}")
    print(f"next      ray-pipeline train --config {arguments.config}")


def _train(arguments) -> None:
    from ray_pipeline import pipeline
    from ray_pipeline.status import describe_run

    config = _load(arguments)
    if arguments.dry_run:
        print(_ascii(pipeline.dry_run(config)))
        return
    run_dir = pipeline.train(config, resume=arguments.resume, verbose=arguments.verbose)
    print(_ascii(describe_run(run_dir)))
    print()
    print(f"pictures  {run_dir / 'samples'}")
    print(f"          {run_dir / 'plots'}")
    print(f"weights   {run_dir / 'checkpoints'}")
    print(f"records   tensorboard --logdir {run_dir / 'logs' / 'tensorboard'}")


def _status(arguments) -> None:
    from ray_pipeline.status import describe_run

    print(_ascii(describe_run(arguments.run)))


def _check(arguments) -> int:
    from ray_pipeline.check import check

    failed = 0
    for what, works, words in check(_load(arguments)):
        print(f"{'ok  ' if works else 'FAIL'}  {what:<24} {_ascii(words)}", flush=True)
        failed += not works
    print(f"{failed} problem(s)" if failed else "ready: ray-pipeline train --config FILE")
    return 1 if failed else 0


def _load(arguments):
    from ray_pipeline.config import load_config

    return load_config(arguments.config, arguments.overrides)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items())


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # a warning of ours is for the person at the terminal; those of libraries belong to their authors
    if "ray_pipeline" in filename:
        print(f"warning: {_ascii(str(message))}", file=sys.stderr)
