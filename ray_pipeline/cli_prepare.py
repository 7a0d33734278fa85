"""The command prepare: parses words, calls the job, prints what it did; no logic."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.cli_words import Add, ascii_text, local_path
from ray_pipeline.errors import UserError


def add_prepare(add: Add) -> None:
    """Add `prepare KIND ROOT`."""
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
    parser.add_argument(
        "--out", type=local_path, metavar="DATA_ROOT", help="data root to write; not needed with --dry-run"
    )
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
        if len(collection.rejected) > settings.max_rejected:
            print(f"stop      more are rejected than --max-rejected {settings.max_rejected}: the job would not start")
        print("next      the same command with --out DATA_ROOT in the place of --dry-run")
        return
    if arguments.out is None:
        raise UserError("--out is missing: give the data root to write, or --dry-run to write nothing")
    with ray_session(RayConfig()):
        summary = prepare(collection, arguments.out, settings, _progress_lines())
    _print_prepared(summary, arguments, collection.ignored)


def _collection(arguments):
    from ray_pipeline.data.sources.collection import add_metadata
    from ray_pipeline.data.sources.folder import compiled_pattern, list_folder, partner_rule
    from ray_pipeline.data.sources.kinds import FOLDER, list_images
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
        collection = list_images(kind, root)
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
        print(f"left out  {summary.left_out} tiles or partners of good images (constant, too little content, no pair)")
    for folder in summary.folders.values():
        print(f"data set  {folder} (what was rejected or left out: rejected.csv)")
    for what, names, words in (
        ("saturated", summary.saturated, "at their detector's top value; what is brighter was lost"),
        (
            "off scale",
            summary.off_scale,
            "partners brighter or darker than their images; --partner-intensity fit brings them to one scale",
        ),
        (
            "dim",
            summary.dim,
            "use less than 30 % of their range; those of another experiment want a data set of their own",
        ),
    ):
        if names:
            print(f"{what:<9} {len(names)} image(s), first {ascii_text(names[0])}: {words}")
    size = arguments.tile_size
    sizes = "" if size == 512 else f" --set data.tile_size={size} --set model.latent_size={size // 8}"
    print(f"next      ray-pipeline train --config configs/microscopy.yaml --set data.root={arguments.out}{sizes}")


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
