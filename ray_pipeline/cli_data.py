"""The commands that make data: simulate, prepare, train-vae, hints. Parses words, calls the job, prints; no logic."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ray_pipeline.errors import UserError

#: adds a sub-command: its name, what runs it, words, and an example
Add = Callable[..., argparse.ArgumentParser]


def add_data_commands(add: Add) -> None:
    """Add the commands, in the order of --help."""
    _add_simulate(add)
    _add_prepare(add)
    _add_train_vae(add)
    _add_hints(add)


def ascii_text(text: str) -> str:
    """Text as ASCII; other letters become escapes."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def counts_in_words(counts: Mapping[str, int]) -> str:
    """train 10, val 2"""
    return ", ".join(f"{split} {count}" for split, count in counts.items())


def _add_simulate(add: Add) -> None:
    parser = add(
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


def _add_prepare(add: Add) -> None:
    from ray_pipeline.data.sources.kinds import known_kinds

    parser = add(
        "prepare",
        _prepare,
        "turn images as downloaded, or your own, into tiles and manifests",
        "ray-pipeline prepare sr-caco2 SR-CACO-2 --out data\n"
        "         ray-pipeline prepare folder my_images --out data --tile-size 512\n"
        "         ray-pipeline prepare folder pairs --out data --partners denoising 'noisy/(.*)' 'clean/\\1'",
    )
    parser.add_argument("kind", choices=known_kinds(), help="a release's layout, or folder: any images below a folder")
    parser.add_argument("source", type=Path, metavar="ROOT", help="where the images are")
    parser.add_argument("--out", type=Path, metavar="DATA_ROOT", help="data root to write; not needed with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="print counts by split, role and kind; write nothing")
    tiles = parser.add_argument_group("tiles")
    tiles.add_argument("--tile-size", type=int, default=512, help="pixels (default 512)")
    tiles.add_argument("--overlap", type=int, default=0, help="pixels that neighbouring tiles share (default 0)")
    tiles.add_argument(
        "--min-content", type=float, default=0.0, metavar="SHARE",
        help="leave out tiles with a smaller share of pixels above the background (Otsu's level; default 0: none)",
    )  # fmt: skip
    tiles.add_argument(
        "--percentiles", type=float, nargs=2, default=(0.1, 99.9), metavar=("LO", "HI"),
        help="intensities that become 0 and 1, over all images of a data set and channel (default 0.1 99.9)",
    )  # fmt: skip
    tiles.add_argument(
        "--partner-intensity", choices=("same", "fit"), default="same",
        help="same: partners have the scale of their foundation image; fit: a line fitted to each pair gives it",
    )  # fmt: skip
    planes = parser.add_argument_group("planes of an image")
    planes.add_argument("--axes", help="such as ZYX or CYX, where the files do not name them")
    planes.add_argument("--channels", type=int, nargs="+", help="channels to take, from 0 (default: all)")
    planes.add_argument(
        "--z", nargs="+", metavar="Z",
        help="depths to take: numbers from 0, all, max (brightest), or focus (sharpest); max and focus also write "
        "depth from focus, for the hint depth",
    )  # fmt: skip
    planes.add_argument("--t", nargs="+", metavar="T", help="times to take: numbers from 0, or all")
    splits = parser.add_argument_group("splits")
    splits.add_argument("--val-fraction", type=float, default=0.1, help="share of groups for validation (default 0.1)")
    splits.add_argument("--test-fraction", type=float, default=0.0, help="share of groups for test (default 0)")
    splits.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    parser.add_argument(
        "--meta", action="append", default=[], metavar="KEY=VALUE",
        help="modality, specimen, marker, NA, lambda (nm) or um_pixel, where the source does not say",
    )  # fmt: skip
    parser.add_argument("--max-rejected", type=int, default=0, help="images that may be left out (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    folder = parser.add_argument_group("only for folder")
    folder.add_argument("--dataset", help="name of the data set (default: the folder's name)")
    folder.add_argument("--group", metavar="REGEX", help="its first group in an image's path names the well or slide")
    folder.add_argument(
        "--partners", nargs=3, action="append", default=[], metavar=("TASK", "REGEX", "IMAGE"),
        help="images whose path matches REGEX are denoising or super_resolution partners of IMAGE, filled in with the "
        "groups of REGEX",
    )  # fmt: skip


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
    parser.add_argument("--names", nargs="+", default=[], metavar="HINT", help="hints to draw (default: all)")
    parser.add_argument("--tiles", type=int, default=6, help="tiles to draw, spread over the data (default 6)")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config and --set."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, such as configs/microscopy.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set one key of the config"
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
    print(f"tiles     {summary.foundation}: {counts_in_words(summary.tiles)}")
    print(f"partners  {summary.degraded}: {', '.join(summary.partners)}")
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set data.root={arguments.out}")


def _prepare(arguments) -> None:
    from ray_pipeline.data.sources.cut import Cutting
    from ray_pipeline.data.sources.planes import PlaneChoice
    from ray_pipeline.data.sources.prepare import Settings, check_settings, prepare
    from ray_pipeline.data.sources.splits import count_images, split_images
    from ray_pipeline.ray_session import ray_session
    from ray_pipeline.sections import RayConfig

    choice = PlaneChoice(
        axes=arguments.axes,
        channels=_chosen("--channels", arguments.channels, ()),
        z=_chosen("--z", arguments.z, ("all", "max", "focus")),
        t=_chosen("--t", arguments.t, ("all",)),
    )
    settings = Settings(
        cutting=Cutting(
            tile_size=arguments.tile_size,
            overlap=arguments.overlap,
            min_content=arguments.min_content,
            fit_partners=arguments.partner_intensity == "fit",
            choice=choice,
        ),
        val_fraction=arguments.val_fraction,
        test_fraction=arguments.test_fraction,
        seed=arguments.seed,
        percentiles=tuple(arguments.percentiles),
        max_rejected=arguments.max_rejected,
        overwrite=arguments.overwrite,
    )
    check_settings(settings)
    collection = _collection(arguments)
    for note in collection.notes:
        print(f"note      {ascii_text(note)}")
    if arguments.dry_run:
        foundation = [image for image in collection.images if image.pair is None]
        split_of = split_images(foundation, settings.val_fraction, settings.test_fraction, settings.seed)
        _print_counts(count_images(collection.images, split_of), "images")
        _print_rejected(collection.rejected, collection.ignored)
        print(f"next      ray-pipeline prepare {arguments.kind} {arguments.source} --out data")
        return
    if arguments.out is None:
        raise UserError("--out is missing: give the data root to write, or --dry-run to write nothing")
    with ray_session(RayConfig()):
        summary = prepare(collection, arguments.out, settings, _progress_lines())
    _print_prepared(summary, arguments, collection.ignored)


def _collection(arguments):
    from ray_pipeline.data.sources.collection import add_metadata
    from ray_pipeline.data.sources.folder import compiled_pattern, list_folder, partner_rule
    from ray_pipeline.data.sources.kinds import FOLDER, checked, source_of
    from ray_pipeline.data.sources.tiling import safe_name

    root, kind = arguments.source, arguments.kind
    if kind == FOLDER:
        name = (safe_name(root.resolve().name) or "images") if arguments.dataset is None else arguments.dataset
        group = None if arguments.group is None else compiled_pattern("--group", arguments.group)
        rules = [partner_rule(*words) for words in arguments.partners]
        collection = list_folder(root, dataset=name, group=group, partners=rules)
    else:
        given = [f"--{key}" for key in ("dataset", "group", "partners") if getattr(arguments, key)]
        if given:
            raise UserError(f"{given[0]} is for `prepare folder` alone; {kind} names its data sets, fields and pairs")
        if not root.is_dir():
            raise UserError(f"{root}: no such folder, expected the release as downloaded; correct the path")
        collection = checked(kind, source_of(kind)(root))
    return add_metadata(collection, arguments.meta)


def _chosen(option: str, words: list[str] | list[int] | None, names: tuple[str, ...]):
    """A plane option as planes.PlaneChoice takes it."""
    if words is None:
        return None
    if len(words) == 1 and words[0] in names:
        return words[0]
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        or_names = "".join(f", or {name}" for name in names)
        raise UserError(
            f"{option} {' '.join(map(str, words))}: expected numbers from 0, each once{or_names}; change it"
        )
    return numbers


def _progress_lines():
    from ray_pipeline.monitoring.progress import Progress

    lines: dict[str, Progress] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in lines:
            lines[stage] = Progress(total, stage, unit="image")
        lines[stage].update(done)
        if done == total:
            lines[stage].close()

    return report


def _print_prepared(summary, arguments, ignored: int) -> None:
    print(f"images    {summary.listed} listed = {summary.accepted} accepted + {len(summary.rejected)} rejected")
    _print_counts(summary.tiles, "tiles")
    _print_rejected([(row.path, row.reason) for row in summary.rejected], ignored)
    if summary.left_out:
        print(f"left out  {summary.left_out} constant tiles or tiles with too little content")
    for folder in summary.folders.values():
        print(f"data set  {folder} (what was rejected or left out: rejected.csv)")
    for what, names, words in (
        ("saturated", summary.saturated, "at their detector's top value; what is brighter was lost"),
        (
            "dim",
            summary.dim,
            "use less than 30 % of their range; those of another experiment want a data set of their own",
        ),
    ):
        if names:
            print(f"{what:<9} {len(names)} image(s), first {ascii_text(names[0])}: {words}")
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set data.root={arguments.out}")


def _print_rejected(rejected: list[tuple[str, str]], ignored: int) -> None:
    for name, reason in rejected[:5]:
        print(f"rejected  {ascii_text(name)}: {ascii_text(reason)}")
    if len(rejected) > 5:
        print(f"rejected  ... {len(rejected)} in all")
    if ignored:
        print(f"ignored   {ignored} other files")


def _print_counts(counts, unit: str) -> None:
    head = ("data set", "split", "role", "cell or type", "degree", unit)
    rows = [(*key, str(count)) for key, count in sorted(counts.items())]
    total = sum(counts.values())
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(f"{ascii_text(cell):<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{total} {unit}")


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
    from ray_pipeline import pipeline
    from ray_pipeline.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    for name, settings in pipeline.hint_settings(config).items():
        print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    if arguments.preview is not None:
        pipeline.preview_hints(config, arguments.names, arguments.tiles, arguments.preview)
        print(f"picture   {arguments.preview}")
        print(f"next      ray-pipeline encode --config {arguments.config}")
    else:
        print(f"next      ray-pipeline hints --config {arguments.config} --preview hints.png")
