"""FMD as downloaded: noisy captures, their averages and ground truths of fluorescence (Zhang, Zhu et al. 2019)."""

import os
import re
from collections import Counter
from pathlib import Path

from ray_pipeline.data.images import IMAGE_SUFFIXES
from ray_pipeline.data.sources.collection import Collection, SourceImage
from ray_pipeline.data.sources.folder import OTHER_IMAGE_SUFFIXES
from ray_pipeline.errors import UserError

AVERAGES = {"gt": 50, "raw": 1, "avg2": 2, "avg4": 4, "avg8": 8, "avg16": 16}
CAPTURES = 50  # of each field at each noise level
FIELDS = range(1, 21)
TEST_FIELD = 19
MODALITIES = {"Confocal": "confocal", "TwoPhoton": "two-photon", "WideField": "wide-field"}
SPECIMENS = {"BPAE": "BPAE cells", "FISH": "zebrafish", "MICE": "mouse brain"}
# Types, folders and test field: denoising/utils/data_loader.py of the release's code; modalities and specimens: the
# abstract of arXiv 1812.10366. Stains and optics are in neither, so those columns stay empty.
TYPES = [f"{instrument}_BPAE_{stain}" for instrument in MODALITIES for stain in "RGB"]
TYPES += ["Confocal_FISH", "Confocal_MICE", "TwoPhoton_MICE"]
METADATA = {
    kind: {"modality": MODALITIES[kind.split("_")[0]], "specimen": SPECIMENS[kind.split("_")[1]]} for kind in TYPES
}
IMAGE_NAME = re.compile(r"(\w+)/(?:(gt)/(\d+)/avg50|(raw|avg2|avg4|avg8|avg16)/(\d+)/[^/]+)\.png")
LAYOUT = "<type>/{raw,avg2,avg4,avg8,avg16}/<field 1-20>/*.png and <type>/gt/<field>/avg50.png"


def list_fmd(root: Path) -> Collection:
    """Lists the images of a download of FMD, whole or in part; no pixel is read.

    root: the folder that holds the types' folders, or the one above it. Ground truths (means of 50 captures) are the
    foundation; field 19 is the published test set, the others have no published split. UserError: no ground truth.
    Zhang, Zhu et al. 2019, arXiv 1812.10366; github.com/yinhaoz/denoising-fluorescence.
    """
    root = Path(root)
    base = _find_types(root)
    names, rejected, ignored = _walk(root, base)
    images: list[SourceImage] = []
    truths: dict[tuple[str, int], SourceImage] = {}
    found: Counter = Counter()
    alone: Counter = Counter()
    for name in sorted(names, key=lambda name: ("/gt/" not in name, name)):
        match = IMAGE_NAME.fullmatch(name)
        kind, level, number = (match[1], match[2] or match[4], int(match[3] or match[5])) if match else ("", "", 0)
        if number not in FIELDS:
            rejected.append((name, f"the name does not fit the release's layout, {LAYOUT}"))
            continue
        found[kind, level, number] += 1
        truth = truths.get((kind, number))
        if level != "gt" and truth is None:
            alone[kind, number] += 1
            continue
        image = _image(name, kind, level, number, truth)
        images.append(image)
        if level == "gt":
            truths[kind, number] = image
    if not images:
        example = "; {}: {}".format(*rejected[0]) if rejected else ""
        raise UserError(f"{base}: found no ground truth <type>/gt/<field>/avg50.png, expected {LAYOUT}{example}.")
    copies = sum(len(files) for _, _, files in os.walk(base / "test_mix"))
    notes = _notes(found)
    if alone:
        kind, number = min(alone)
        notes.append(
            f"{alone.total():,} captures of {len(alone)} fields left aside, whose ground truth is not here, such as "
            f"{kind}/gt/{number}/avg50.png."
        )
    if copies:
        notes.append(f"test_mix: {copies:,} files left out, copies of captures of field {TEST_FIELD}.")
    images.sort(key=lambda image: image.name)
    return Collection(base, images, sorted(rejected), notes, ignored + copies + alone.total())


def _find_types(root: Path) -> Path:
    """The folder that holds folders of types: root, or the one folder in it that does."""
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    below = [p for p in folders if not p.name.startswith(".") and p.resolve().is_relative_to(root.resolve())]
    bases = [base for base in (root, *below) if any((base / kind).is_dir() for kind in TYPES)]
    if bases and (bases[0] == root or len(bases) == 1):
        return bases[0]
    if bases:
        found = "types in " + ", ".join(base.name for base in bases)
    else:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else ""
    raise UserError(
        f"{root}: found {found or 'no files'}, expected one folder with the FMD layout, {LAYOUT}, types such as "
        "Confocal_FISH; check the path, or put all types into one folder."
    )


def _walk(root: Path, base: Path) -> tuple[list[str], list[tuple[str, str]], int]:
    """Image names of all types; linked folders and links out of root, rejected; count of other files."""
    names, rejected, ignored = [], [], sum(entry.is_file() for entry in os.scandir(base))
    tops = [base / kind for kind in TYPES if not (base / kind).is_symlink()]
    links = [base / kind for kind in TYPES if (base / kind).is_symlink()]
    for folder, folders, files in (step for top in tops for step in os.walk(top)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [Path(folder, name) for name in folders if os.path.islink(f"{folder}/{name}")]
        prefix = Path(folder).relative_to(base).as_posix()
        for file in files:
            if file.startswith(".") or not file.lower().endswith(IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES):
                ignored += 1
            elif os.path.islink(f"{folder}/{file}") and not _is_file_inside(Path(folder, file), root):
                links.append(Path(folder, file))
            else:
                names.append(f"{prefix}/{file}")
    for link in links:
        reason = f"a link to {link.resolve()}, expected a file or folder of its own; copy it there"
        rejected.append((link.relative_to(base).as_posix(), reason))
    return names, rejected, ignored


def _is_file_inside(link: Path, root: Path) -> bool:
    return link.is_file() and link.resolve().is_relative_to(root.resolve())


def _image(name: str, kind: str, level: str, number: int, truth: SourceImage | None) -> SourceImage:
    instrument, specimen, *stain = kind.split("_")
    return SourceImage(
        name=name,
        dataset="fmd",
        kind=kind,
        group=truth.group if truth else f"{instrument}_{specimen}/{number}",  # stains of a field share a split
        split="test" if number == TEST_FIELD else None,
        channel="RGB".index(stain[0]) if stain else 0,
        pair=truth.name if truth else None,
        task="denoising" if truth else "",
        averages=AVERAGES[level],
        metadata=METADATA[kind],
    )


def _notes(found: Counter) -> list[str]:
    """Types, noise levels, fields and captures that the release has and the download lacks."""
    kinds = {kind for kind, _, _ in found}
    missing = [kind for kind in TYPES if kind not in kinds]
    notes = [f"{len(missing)} of {len(TYPES)} types are missing: {', '.join(missing)}."] if missing else []
    for kind in (kind for kind in TYPES if kind in kinds):
        for level in AVERAGES:
            counts = {number: found[kind, level, number] for number in FIELDS}
            absent = [str(number) for number, count in counts.items() if not count]
            few = [f"{number} ({count})" for number, count in counts.items() if 0 < count < CAPTURES]
            if len(absent) == len(FIELDS):
                notes.append(f"{kind}/{level}: no images.")
                continue
            if absent:
                notes.append(f"{kind}/{level}: no images of fields {', '.join(absent)}.")
            if few and level != "gt":
                notes.append(f"{kind}/{level}: fewer than {CAPTURES} captures of fields {', '.join(few)}.")
    return notes
