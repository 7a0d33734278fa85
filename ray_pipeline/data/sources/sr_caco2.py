"""SR-CACO-2 as downloaded: confocal patches of Caco-2 cysts, scanned at four resolutions (Belharbi et al. 2024)."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from ray_pipeline.data.images import IMAGE_SUFFIXES
from ray_pipeline.data.sources.collection import Collection, SourceImage
from ray_pipeline.data.sources.folder import OTHER_IMAGE_SUFFIXES
from ray_pipeline.errors import UserError

RESOLUTIONS = {1: "HighRes1024", 2: "LowRes512", 4: "LowRes256", 8: "LowRes128"}
PATCHES = {"train": 7349, "val": 1117, "test": 1471}  # published, of each cell and scale
TILES = dict.fromkeys(range(1, 23), "train") | dict.fromkeys((7, 11, 19), "val")
TILES |= dict.fromkeys((9, 10, 14, 20), "test")
# Markers: data card (Fig. 14) and Fig. 3 of arXiv 2406.09168, which name a Zeiss LSM 700. Neither they nor the TIFF
# files say NA, wavelengths or pixel size, so those columns stay empty.
METADATA = {
    cell: {"modality": "confocal", "specimen": "Caco-2", "marker": marker}
    for cell, marker in (
        ("CELL0", "survivin"),
        ("CELL1", "E-cadherin or GFP-tubulin"),
        ("CELL2", "mCherry-histone H2B"),
    )
}
LINK = "a link to {}, expected files in the folder; copy them there"
EXAMPLE = "tile_HighRes1024-10_0_0_640_1280_1920_CELL0.tif"
PATCH_NAME = re.compile(r"hr_div_([1248])/tile_(\w+)-(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_(CELL[012])\.tif")
FOLD_NAME = re.compile(r"caco2_(train|val|test)_X_([248])_in_\d+_out_512_cell_(CELL[012])")


class Patch(NamedTuple):
    """A patch at one scan resolution; box: first and last row, first and last column, in pixels of the HR tile."""

    scale: int
    tile: int
    number: int
    box: tuple[int, int, int, int]
    cell: str


class Folds(NamedTuple):
    """What the fold lists say: {(scale, cell): names}, {tile: split}, and the scales and cells with a list of every
    split, which say which patches there are; those of one split do not."""

    names: dict[tuple[int, str], set[str]]
    split: dict[int, str]
    complete: set[tuple[int, str]]


def list_sr_caco2(root: Path) -> Collection:
    """Lists the patches of a download of SR-CACO-2, whole or in part; no pixel is read.

    root: the folder with hr_div_1 (foundation), hr_div_2, 4, 8 (real low resolution), or the one that holds it as
    caco2/. Split by tile, as published or as lists in <root>/folds/super-resolution say. UserError: no HR patch, or
    lists that contradict themselves. Belharbi et al. 2024, arXiv 2406.09168; github.com/sbelharbi/sr-caco-2.
    """
    root = Path(root)
    base = _find_patches(root)
    folds = read_folds(next((f for f in (root / "folds", base / "folds") if f.is_dir()), base) / "super-resolution")
    names, rejected, ignored = _scan(root, base)
    split = TILES | folds.split
    images: dict[str, SourceImage] = {}
    found: Counter = Counter()
    alone: Counter = Counter()
    present = set(names)
    for name in names:  # sorted: HR patches come first
        patch = parse_patch(name)
        high = images.get(hr_name(patch)) if patch and patch.scale > 1 else None
        if patch is None:
            reason = f"the name does not fit the release's pattern, such as hr_div_1/{EXAMPLE}"
        elif (patch.scale, patch.cell) in folds.complete and name not in folds.names[patch.scale, patch.cell]:
            reason = f"named by none of the fold lists for {patch.cell} that are present"
        elif patch.tile not in split:
            reason = f"tile {patch.tile} is in no published split (1 to 22)"
        elif patch.scale > 1 and high is None and hr_name(patch) not in present:
            alone[patch.scale] += 1
            reason = ""
        elif patch.scale > 1 and high is None:
            reason = f"its high-resolution patch {hr_name(patch)} is rejected"
        else:
            images[name] = _image(name, patch, split[patch.tile], high)
            reason = ""
        if patch is not None:
            found[patch.scale, patch.cell, split.get(patch.tile)] += 1
        if reason:
            rejected.append((name, reason))
    if not images:
        example = "; {}: {}".format(*rejected[0]) if rejected else ""
        raise UserError(f"{base}: found no patch that can be used, expected hr_div_1/{EXAMPLE} and others{example}.")
    notes = _notes(found, folds, images, rejected)
    notes += [f"hr_div_{s}: {n:,} patches left aside, whose hr_div_1 patch is not here." for s, n in alone.items()]
    return Collection(base, list(images.values()), sorted(rejected), notes, ignored + alone.total())


def parse_patch(name: str) -> Patch | None:
    """Path below caco2/ -> what its name says, or None where it does not fit the release's pattern."""
    match = PATCH_NAME.fullmatch(name)
    if match is None or RESOLUTIONS[int(match[1])] != match[2]:
        return None
    scale, tile, number, *corners = (int(match[i]) for i in (1, 3, 4, 5, 6, 7, 8))
    return Patch(scale, tile, number, tuple(scale * corner for corner in corners), match[9])


def hr_name(patch: Patch) -> str:
    """Name of the HR patch that shows the same part of the tile."""
    corners = "_".join(map(str, patch.box))
    return f"hr_div_1/tile_{RESOLUTIONS[1]}-{patch.tile}_{patch.number}_{corners}_{patch.cell}.tif"


def read_folds(folder: Path) -> Folds:
    """Reads all fold lists below <folds>/super-resolution; none where the folder is missing.

    UserError, with file and line: a line that is no pair of one patch, a patch named twice, one that l_h.txt and
    h_l.txt do not both name, a tile in two splits.
    """
    folds, first = Folds({}, {}, set()), {}
    seen: dict[tuple[int, str], set[str]] = defaultdict(set)
    for lists in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = FOLD_NAME.fullmatch(lists.name)
        paths = [lists / name for name in ("l_h.txt", "h_l.txt") if (lists / name).is_file()]
        if match is None or not paths:
            continue
        split, scale, cell = match[1], int(match[2]), match[3]
        pairs = [_read_pairs(path) for path in paths]
        for path, here, there in zip(paths, pairs, reversed(pairs), strict=True):
            for low, (line, high) in here.items():
                if there.get(low, ("", ""))[1] != high:
                    raise UserError(
                        f"{path}: line {line}: found {low} with {high}, which the other list beside it does not say, "
                        "expected the same pairs in l_h.txt and h_l.txt; download both again."
                    )
        for low, (line, high) in pairs[0].items():
            where, patch = f"{paths[0]}: line {line}", parse_patch(low)
            if patch is None or (patch.scale, patch.cell) != (scale, cell) or hr_name(patch) != high:
                raise UserError(
                    f"{where}: found {low} with {high}, expected names of one {cell} patch in hr_div_{scale} and "
                    "hr_div_1; correct the line or remove the list."
                )
            if folds.split.setdefault(patch.tile, split) != split:
                raise UserError(
                    f"{where}: found tile {patch.tile} in {split}, expected {folds.split[patch.tile]} as in "
                    f"{first[patch.tile]}, since patches of a tile overlap; keep each tile in one split."
                )
            first.setdefault(patch.tile, where)
            folds.names.setdefault((scale, cell), set()).add(low)
            folds.names.setdefault((1, cell), set()).add(high)
        seen[scale, cell].add(split)
    for (scale, cell), splits in seen.items():
        if splits == set(PATCHES):
            folds.complete.update({(scale, cell), (1, cell)})
    return folds


def _read_pairs(path: Path) -> dict[str, tuple[int, str]]:
    """One list -> {low-resolution name: (line, HR name)}; names are relative to caco2/."""
    pairs: dict[str, tuple[int, str]] = {}
    order = "low,high" if path.name == "l_h.txt" else "high,low"
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        names = [name.strip() for name in line.split(",")]
        # told by the folders: copies of the lists are about whose h_l.txt has the order of l_h.txt
        low, high = names[::-1] if names[0].startswith("hr_div_1/") else (names[0], names[-1])
        if line.strip() and (len(names) != 2 or low in pairs):
            problem = f"{low} again, as in line {pairs[low][0]}" if low in pairs else repr(line[:200])
            raise UserError(
                f"{path}: line {number}: found {problem}, expected {order} and each pair once; correct the line."
            )
        if line.strip():
            pairs[low] = (number, high)
    return pairs


def _find_patches(root: Path) -> Path:
    """The folder that holds hr_div_*: root, or caco2 in it (where that is no link to elsewhere)."""
    for base in (root, root / "caco2"):
        inside = base.resolve().is_relative_to(root.resolve())
        if inside and any((base / f"hr_div_{scale}").is_dir() for scale in RESOLUTIONS):
            return base
    found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    raise UserError(
        f"{root}: found {', '.join(found[:8]) or 'no files'}, expected the SR-CACO-2 patches, hr_div_1/{EXAMPLE} and "
        "so on with hr_div_2, hr_div_4, hr_div_8 beside it, here or in caco2/; check the path or download them."
    )


def _scan(root: Path, base: Path) -> tuple[list[str], list[tuple[str, str]], int]:
    """Image names of hr_div_*, sorted; links out of root and folders among the patches, rejected; others' count."""
    names, rejected, ignored = [], [], sum(entry.is_file() for entry in os.scandir(base))
    for folder in (f"hr_div_{scale}" for scale in RESOLUTIONS if (base / f"hr_div_{scale}").is_dir()):
        outside = not (base / folder).resolve().is_relative_to(root.resolve())
        for entry in [] if outside else os.scandir(base / folder):
            name = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                ignored += entry.is_file()
            elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
                rejected.append((name, LINK.format(os.path.realpath(entry.path))))
            elif not entry.is_file():
                rejected.append((name, f"not a file, expected the patches themselves in {folder}; move them there"))
            elif name.lower().endswith(IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES):
                names.append(name)
            else:
                ignored += 1
        if outside:
            rejected.append((folder, LINK.format((base / folder).resolve())))
    return sorted(names), rejected, ignored


def _image(name: str, patch: Patch, split: str, high: SourceImage | None) -> SourceImage:
    return SourceImage(
        name=name,
        dataset="sr_caco2",
        kind=patch.cell,
        group=f"tile_{patch.tile}",
        split=split,
        channel=int(patch.cell[-1]),
        pair=high.name if high else None,
        task="super_resolution" if high else "",
        scale=patch.scale,
        metadata=METADATA[patch.cell],
    )


def _notes(found: Counter, folds: Folds, images: dict[str, SourceImage], rejected: list[tuple[str, str]]) -> list[str]:
    """What the release or its fold lists have and the download lacks."""
    here = images.keys() | {name for name, _ in rejected}
    notes = []
    for scale in RESOLUTIONS:
        counts = {cell: {split: found[scale, cell, split] for split in PATCHES} for cell in METADATA}
        if not any(sum(of.values()) for of in counts.values()):
            notes.append(f"hr_div_{scale}: no patches, the release has {3 * sum(PATCHES.values()):,}.")
            continue
        for cell, of in counts.items():
            few = ", ".join(f"{of[s]:,} of {PATCHES[s]:,} {s}" for s in PATCHES if of[s] < PATCHES[s])
            if few:
                notes.append(f"hr_div_{scale}: {cell} patches: {few if sum(of.values()) else 'none'}.")
            missing = sorted(folds.names.get((scale, cell), set()) - here) if sum(of.values()) else []
            if missing:
                many = f"{len(missing):,} {cell} patches that fold lists name are missing"
                notes.append(f"hr_div_{scale}: {many}, such as {missing[0]}.")
    return notes
