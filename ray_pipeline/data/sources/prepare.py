"""Images of a collection -> tiles and manifests of a data root; nothing that was listed vanishes from the counts."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ray_pipeline.data.manifest import ManifestWriter
from ray_pipeline.data.ray_map import ray_map
from ray_pipeline.data.rejected import REJECTED_FILE, Rejected, in_words, rejected_csv
from ray_pipeline.data.sources.collection import Collection
from ray_pipeline.data.sources.cut import Cutting, Unit, cut_unit, partner_scale
from ray_pipeline.data.sources.splits import Counts, count_images, degree, split_images
from ray_pipeline.data.sources.staging import check_target, put_in_place, staging_folder
from ray_pipeline.data.sources.survey import (
    SATURATED_SHARE,
    Survey,
    is_dim,
    ranges_of_surveys,
    survey_images,
)
from ray_pipeline.data.sources.tiling import tile_stems
from ray_pipeline.errors import UserError
from ray_pipeline.storage import replace_file

_UNITS_TOGETHER = 4  # units of one task
Report = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class Settings:
    """How a collection becomes a data root. val_fraction, test_fraction: shares of the groups whose split the source
    does not publish. percentiles: intensities that become 0 and 1."""

    cutting: Cutting
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    seed: int = 0
    percentiles: tuple[float, float] = (0.1, 99.9)
    max_rejected: int = 0
    overwrite: bool = False


@dataclass
class Prepared:
    """What `prepare` did. listed: images; of them accepted + rejected = listed. tiles: counts of tiles. left_out: tiles
    of good images that are constant or too empty. dim, saturated, off_scale: names of images to look at."""

    folders: dict[str, Path]
    listed: int
    accepted: int
    rejected: list[Rejected]
    images: Counts
    tiles: Counts = field(default_factory=Counter)
    left_out: int = 0
    dim: list[str] = field(default_factory=list)
    saturated: list[str] = field(default_factory=list)
    off_scale: list[str] = field(default_factory=list)


def prepare(collection: Collection, out: Path, settings: Settings, report: Report = lambda *_: None) -> Prepared:
    """Images of a collection -> <out>/{foundation,degraded}/<dataset>, on the Ray that is running.

    Foundation images are cut into tiles without invented pixels, their partners at the matching places. Intensity:
    percentiles over all foundation images of a data set, kind, channel and dtype, never by image or tile; minimum and
    maximum where both are equal. Splits are those of the source, else by group. Images that cannot be used stand in
    rejected.csv (id, path, reason), and more than max_rejected stop the job before a tile is written; constant
    channels, constant tiles and those below min_content are left out and listed there too. A data set appears complete
    or not at all, and replaces an old one only with `overwrite`. UserError: wrong settings, no images, too many
    rejected.
    """
    root, images = collection.root.absolute(), collection.images  # Ray's workers may have another current folder
    check_settings(settings)
    targets = {dataset: out / "foundation" / dataset for dataset in sorted({image.dataset for image in images})}
    for dataset, target in targets.items():
        check_target(collection.root, target, dataset, settings.overwrite)
    choice = settings.cutting.choice
    report("looking", 0, len(images))
    surveys, counts = survey_images(
        root, images, settings.cutting.tile_size, choice, lambda done: report("looking", done, len(images))
    )
    surveys = _with_pairs_checked(surveys, settings.cutting)
    rejected = [Rejected("", name, reason) for name, reason in collection.rejected]
    rejected += [Rejected("", survey.image.name, survey.reason) for survey in surveys if survey.reason]
    accepted = [survey for survey in surveys if not survey.reason]
    _refuse(collection, out, rejected, len(accepted), settings.max_rejected)

    foundation = [survey for survey in accepted if survey.image.pair is None]
    split_of = split_images(
        [survey.image for survey in foundation], settings.val_fraction, settings.test_fraction, settings.seed
    )
    intensities = ranges_of_surveys(root, foundation, counts, settings.percentiles, choice)
    done = Prepared(
        folders=targets,
        listed=len(images) + len(collection.rejected),
        accepted=len(accepted),
        rejected=rejected,
        images=count_images([survey.image for survey in accepted], split_of),
        dim=[survey.image.name for survey in foundation if is_dim(survey, intensities.ranges)],
        saturated=[survey.image.name for survey in foundation if survey.saturated >= SATURATED_SHARE],
    )
    staging = staging_folder(out)
    units = _units(accepted)
    cut = partial(cut_unit, root, staging.absolute(), settings.cutting, intensities)
    writers = _Writers(staging)
    report("writing tiles", 0, len(units))
    kept = {survey.image.dataset for survey in foundation}
    try:
        with writers, closing(ray_map(cut, units, together=_UNITS_TOGETHER)) as cuts:
            for number, (unit, made) in enumerate(zip(units, cuts, strict=True), 1):
                writers.write(unit, made, split_of, done)
                report("writing tiles", number, len(units))
        _list_left_out(staging, accepted, done, writers.left_out, kept)
        for dataset in sorted(kept):
            # another job may have made it meanwhile
            check_target(collection.root, targets[dataset], dataset, settings.overwrite)
            put_in_place(out, staging, dataset)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return done


def check_settings(settings: Settings) -> None:
    """UserError for settings that cannot be meant."""
    cutting, (low, high) = settings.cutting, settings.percentiles
    fractions = (settings.val_fraction, settings.test_fraction)
    wrong = {
        f"--tile-size {cutting.tile_size}: expected at least 1 pixel": cutting.tile_size < 1,
        f"--overlap {cutting.overlap}: expected 0 to {cutting.tile_size - 1} pixels": not 0
        <= cutting.overlap
        < cutting.tile_size,
        f"--min-content {cutting.min_content}: expected 0 to 1": not 0 <= cutting.min_content <= 1,
        f"--percentiles {low} {high}: expected 0 <= low < high <= 100": not 0 <= low < high <= 100,
        f"--max-rejected {settings.max_rejected}: expected 0 or more": settings.max_rejected < 0,
        f"--val-fraction, --test-fraction {fractions}: expected 0 to 1, below 1 together": min(fractions) < 0
        or sum(fractions) >= 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"{message}; change it.")


class _Writers:
    """The manifests of every data set and kind, written row by row, and the list of tiles left out."""

    def __init__(self, staging: Path):
        self.staging = staging
        self.open: dict[tuple[str, str], ManifestWriter] = {}
        self.left_out: dict[str, list[Rejected]] = defaultdict(list)

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind, *_) -> None:
        for writer in self.open.values():
            writer.close()

    def write(self, unit: Unit, made, split_of: dict[str, str], done: Prepared) -> None:
        image = unit.foundation.image
        split = split_of[image.name]
        for kind, rows in made.rows.items():
            for row in rows:
                key = (kind, image.dataset)
                if key not in self.open:
                    self.open[key] = ManifestWriter(self.staging / kind / image.dataset)
                self.open[key].write(row, split)
                done.tiles[image.dataset, split, row["task"], image.kind, degree(row["scale"], row["averages"])] += 1
        self.left_out[image.dataset] += made.left_out
        done.left_out += len(made.left_out)
        done.off_scale += sorted(made.off_scale)


def _with_pairs_checked(surveys: list[Survey], cutting: Cutting) -> list[Survey]:
    """Partners that do not fit their foundation image get the reason why."""
    foundation = {survey.image.name: survey for survey in surveys if survey.image.pair is None}
    return [
        survey
        if survey.image.pair is None or survey.reason
        else replace(survey, reason=_misfit(foundation.get(survey.image.pair), survey, cutting))
        for survey in surveys
    ]


def _misfit(foundation: Survey | None, partner: Survey, cutting: Cutting) -> str:
    name = partner.image.pair
    if foundation is None or foundation.reason:
        return f"its foundation image {name} is {'rejected' if foundation else 'not there'}"
    scale = partner_scale(foundation, partner)
    if scale == 0 or (partner.image.task == "denoising" and scale != 1):
        return (
            f"{partner.height} x {partner.width} pixels do not fit those of its foundation image {name}, "
            f"{foundation.height} x {foundation.width}"
        )
    if not cutting.fit_partners and partner.dtype != foundation.dtype:
        return (
            f"{partner.dtype} pixels cannot be on the scale of its foundation image {name}, {foundation.dtype}; pass "
            "--partner-intensity fit"
        )
    if cutting.tile_size % scale:
        return f"tiles of {cutting.tile_size} pixels do not divide by its scale, {scale}; choose another --tile-size"
    channels = {channel for channel, *_ in foundation.places}
    if {place for place in partner.places if place[0] in channels} != set(foundation.places):
        return f"its channels, depths or times are not those of its foundation image {name}"
    return ""


def _units(accepted: list[Survey]) -> list[Unit]:
    partners: dict[str, list[Survey]] = defaultdict(list)
    for survey in accepted:
        if survey.image.pair is not None:
            partners[survey.image.pair].append(survey)
    stems = tile_stems([survey.image.name for survey in accepted])
    return [
        Unit(survey, tuple(own), {s.image.name: stems[s.image.name] for s in (survey, *own)})
        for survey in accepted
        if survey.image.pair is None
        for own in (partners[survey.image.name],)
    ]


def _list_left_out(
    staging: Path, accepted: list[Survey], done: Prepared, left_out: dict[str, list[Rejected]], kept: set[str]
) -> None:
    """Write rejected.csv of each data set; UserError where no tile of one is left."""
    for dataset in sorted(kept):
        if not (staging / "foundation" / dataset / "manifests").is_dir():
            raise UserError(
                f"{dataset}: none of its tiles can be used ({in_words(left_out[dataset])}); lower --min-content."
            )
        empty = [
            Rejected("", survey.image.name, f"channel {c} is constant: left out, others kept")
            for survey in accepted
            if survey.image.dataset == dataset
            for c in survey.empty
        ]
        rows = [*done.rejected, *empty, *left_out[dataset]]
        replace_file(staging / "foundation" / dataset / REJECTED_FILE, rejected_csv(rows))


def _refuse(collection: Collection, out: Path, rejected: list[Rejected], accepted: int, max_rejected: int) -> None:
    if accepted + len(rejected) == 0:
        raise UserError(f"{collection.root}: found no image, expected TIFF, PNG, NumPy or OME-Zarr; correct the path.")
    if accepted and len(rejected) <= max_rejected:
        return
    datasets = sorted({image.dataset for image in collection.images}) or ["images"]
    listing = out / "foundation" / datasets[0]
    # the list of a data set that stays as it is must not change
    listing = out / f".{datasets[0]}.{REJECTED_FILE}" if (listing / "manifests").exists() else listing / REJECTED_FILE
    listing.parent.mkdir(parents=True, exist_ok=True)
    replace_file(listing, rejected_csv(rejected))
    raise UserError(
        f"{collection.root}: {len(rejected)} of {accepted + len(rejected)} images cannot be used, expected at most "
        f"{max_rejected} and one good image ({in_words(rejected)}; all in {listing}); repair them, choose a smaller "
        f"--tile-size or pass --max-rejected {len(rejected)}."
    )
