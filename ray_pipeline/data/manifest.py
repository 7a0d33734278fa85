"""The table of tiles: schema, reading, checking, writing.

<root>/foundation/<dataset>/manifests/{manifest,train,val,test}.csv; `image` is relative to the data set's
folder. Read from a disk or object storage, written to a disk.
"""

import hashlib
import io
import os
from csv import DictWriter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ray_pipeline.data.data_root import FileSizes, dataset_folders
from ray_pipeline.data.rejected import Rejected, in_words
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

COLUMNS = (
    "id", "image", "dataset", "task", "channel_idx", "norm_lo", "norm_hi", "x0", "y0", "modality", "specimen",
    "NA", "lambda", "um_pixel", "marker", "pair_id", "degradation", "scale", "averages", "height", "width",
    "dtype", "sha256",
)  # fmt: skip
NUMBER_COLUMNS = (
    "channel_idx", "norm_lo", "norm_hi", "x0", "y0", "NA", "lambda", "um_pixel", "scale", "averages",
    "height", "width",
)  # fmt: skip
SPLITS = ("train", "val", "test")
PREPARE_HINT = "run `ray-pipeline prepare` (or `ray-pipeline simulate` for a sample)"


@dataclass(frozen=True)
class Manifest:
    """Tiles of one data set: `folder` is <root>/foundation/<dataset>, `split` None means every split."""

    folder: Folder
    dataset: str
    split: str | None
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def path(self, row: int) -> Path:
        """Absolute path of the tile in `row` (from 0); UserError in object storage."""
        if self.folder.local is None:
            raise UserError(f"{self.folder} is in object storage, expected a data set on a disk; copy it to one.")
        return self.folder.local / self.table["image"].iat[row]

    def fingerprint(self) -> str:
        """sha256 (hex) of columns and rows in their order; the same wherever the folder stands.

        Pixels take part through the `sha256` column, where the manifest has one.
        """
        return hashlib.sha256(self.table.to_csv(index=False, lineterminator="\n").encode()).hexdigest()


def load_manifest(path_or_root: str | Path | Folder, split: str | None = None) -> Manifest:
    """A manifest CSV, a dataset folder, or a data root with one foundation data set, path or URI -> Manifest.

    Columns `id` and `image` are required, the others optional; unknown ones are kept as text. A CSV given
    together with `split` means that split's CSV beside it. Pixels are not opened. UserError: missing or
    empty manifest, several data sets, duplicate ids, image paths that leave the dataset folder.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}; choose one of them.")
    manifests, name = _manifest_file(path_or_root if isinstance(path_or_root, Folder) else Folder(path_or_root), split)
    folder = manifests.parent if manifests.name == "manifests" else manifests
    if folder.local is not None:
        folder = Folder(folder.local.resolve())
    table, csv = _read_table(manifests, name), manifests.where(name)
    if table.empty:
        raise UserError(f"{csv}: found no tiles, expected at least one row; {PREPARE_HINT} again.")
    _check_paths(csv, folder, table)
    stem = Path(name).stem
    return Manifest(folder, folder.name, stem if stem in SPLITS else None, table)


def bad_tiles(manifest: Manifest, tile_size: int | None = None, files: FileSizes | None = None) -> dict[int, str]:
    """Rows (from 0) whose tile is known to be bad without opening it -> the reason.

    Their file is missing or empty or, with `tile_size` (pixels), the manifest gives them another height or width.
    files: of the manifest's folder, where they have been listed for another split.
    """
    files = files or FileSizes(manifest.folder)
    bad = {}
    for column in ("width", "height"):
        if tile_size is not None and column in manifest.table:
            sizes = manifest.table[column]
            for row in np.flatnonzero(sizes.notna() & (sizes != tile_size)).tolist():
                bad[row] = f"its {column} is {sizes.iat[row]:g} pixels, expected {tile_size}"
    for row, image in enumerate(manifest.table["image"]):
        if fault := files.fault(image):
            bad[row] = {"missing": "no such file", "empty": "the file is empty"}.get(fault, f"it is {fault}")
    return bad


def check_tiles(manifest: Manifest, tile_size: int | None = None) -> None:
    """UserError that names the first of `bad_tiles`, where there are any."""
    images = manifest.table["image"]
    found = bad_tiles(manifest, tile_size)
    bad = [Rejected("", manifest.folder.where(images.iat[row]), reason) for row, reason in found.items()]
    if bad:
        raise UserError(
            f"{manifest.folder}: {len(bad)} of {len(manifest)} tiles cannot be used ({in_words(bad)}); copy them again "
            "or run `ray-pipeline prepare` again."
        )


def write_manifests(folder: str | Path, rows: list[dict], split_of: dict[str, str]) -> None:
    """Writes <folder>/manifests/{train,val,test,manifest}.csv, each atomically, manifest.csv last.

    `rows` have keys of COLUMNS (missing ones stay empty, others follow behind), `split_of` maps each id to
    train, val or test. Rows keep their order; the same rows give the same bytes. ValueError: duplicate
    ids, an id without a split.
    """
    identifiers = [row["id"] for row in rows]
    if len(set(identifiers)) != len(identifiers):
        raise ValueError(f"{folder}: rows hold an id twice.")
    wrong = [i for i in identifiers if split_of.get(i) not in SPLITS]
    if wrong:
        raise ValueError(f"{folder}: ids without a split of {SPLITS}: {_first(wrong)}.")
    extra = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    # object columns: pandas would turn whole numbers beside an empty cell into floats
    table = pd.DataFrame(rows, columns=[*COLUMNS, *extra], dtype=object)
    splits = table["id"].map(split_of)
    manifests = Path(folder) / "manifests"
    manifests.mkdir(parents=True, exist_ok=True)
    # an interrupted rewrite must not leave the old table beside new splits
    (manifests / "manifest.csv").unlink(missing_ok=True)
    for split in SPLITS:
        _write_csv(manifests / f"{split}.csv", table[splits == split])
    _write_csv(manifests / "manifest.csv", table)


class ManifestWriter:
    """Writes <folder>/manifests/{train,val,test,manifest}.csv row by row, so that memory does not grow with them.

    For a folder that is put in its place when all of it is written: a kill leaves the files cut off.
    """

    def __init__(self, folder: Path):
        self.columns = (*COLUMNS, "saturated")
        manifests = folder / "manifests"
        manifests.mkdir(parents=True)
        names = (*SPLITS, "manifest")
        self._files = {name: (manifests / f"{name}.csv").open("w", encoding="utf-8", newline="") for name in names}
        self._writers = {
            name: DictWriter(file, self.columns, lineterminator="\n") for name, file in self._files.items()
        }
        for writer in self._writers.values():
            writer.writeheader()

    def write(self, row: dict, split: str) -> None:
        """Add a row to its split and to the whole; missing columns stay empty. ValueError: unknown columns."""
        for name in (split, "manifest"):
            self._writers[name].writerow(row)

    def close(self) -> None:
        """Write what is left, to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def load_pairs(root: str | Path | Folder, dataset: str) -> pd.DataFrame:
    """Rows of <root>/degraded/<dataset>/manifests/manifest.csv, an empty frame when the file is absent.

    `pair_id` names the foundation tile, and is the row's own id in manifests without that column; `image` is
    relative to <root>/degraded/<dataset>. UserError: as load_manifest, or rows of which some have no `pair_id`.
    """
    folder = (root if isinstance(root, Folder) else Folder(root)).child("degraded", dataset)
    manifests, name = folder.child("manifests"), "manifest.csv"
    if manifests.size(name) < 0:
        return pd.DataFrame(columns=list(COLUMNS))
    table, csv = _read_table(manifests, name), manifests.where(name)
    if "pair_id" not in table:
        table["pair_id"] = table["id"]
    if (table["pair_id"] == "").any():
        raise UserError(
            f"{csv}: found rows without pair_id, expected the id of the foundation tile in each; prepare the "
            "pairs again."
        )
    _check_paths(csv, folder if folder.local is None else Folder(folder.local.resolve()), table)
    return table


def _manifest_file(place: Folder, split: str | None) -> tuple[Folder, str]:
    """Folder and name of the CSV that a CSV, a dataset folder or a data root stands for."""
    name = f"{split or 'manifest'}.csv"
    if place.name.lower().endswith(".csv"):
        found = place.parent, place.name if split is None or Path(place.name).stem == split else name
    elif place.local is not None and not place.local.is_dir():
        raise UserError(f"{place}: no such folder or manifest; {PREPARE_HINT} or correct the path.")
    elif "manifests" in place.folders():
        found = place.child("manifests"), name
    else:
        folders = dataset_folders(place)
        if not folders:
            raise UserError(
                f"{place}: found no foundation/<dataset>/manifests, expected a data root; {PREPARE_HINT} or "
                "correct the path."
            )
        if len(folders) > 1:
            raise UserError(
                f"{place}: found {len(folders)} data sets ({_first([f.name for f in folders])}), expected "
                f"one; name one, for example {folders[0]}."
            )
        found = folders[0].child("manifests"), name
    if found[0].size(found[1]) < 0:
        raise UserError(f"{found[0].where(found[1])}: no such manifest; {PREPARE_HINT} or correct the path.")
    return found


def _read_table(folder: Folder, name: str) -> pd.DataFrame:
    csv, data = folder.where(name), folder.read(name)
    try:
        # text first: an id such as "007" or "NA" must survive
        table = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        detail = " ".join(str(error).split())
        raise UserError(f"{csv}: expected a CSV manifest, found: {detail}; {PREPARE_HINT} again.") from error
    missing = [name for name in ("id", "image") if name not in table]
    if missing:
        raise UserError(
            f"{csv}: found columns {', '.join(map(str, table.columns[:8]))}, expected also "
            f"{', '.join(missing)}; add them."
        )
    for name in ("id", "image"):
        if (table[name].str.strip() == "").any():
            line = int((table[name].str.strip() == "").to_numpy().argmax()) + 2
            raise UserError(f"{csv}: found no {name} in line {line}, expected one in each row; fill it in.")
    twice = table["id"][table["id"].duplicated()].unique().tolist()
    if twice:
        raise UserError(
            f"{csv}: found {len(twice)} ids more than once ({_first(twice)}), expected unique ids; remove "
            "the duplicates."
        )
    for name in table.columns.intersection(NUMBER_COLUMNS):
        try:
            table[name] = pd.to_numeric(table[name])
        except ValueError as error:
            raise UserError(f"{csv}: column {name} expects numbers, found: {error}; correct it.") from error
    return table


def _check_paths(csv: str, folder: Folder, table: pd.DataFrame) -> None:
    parents: dict[str, set[str]] = {}
    for image in table["image"]:
        parts = image.split("/")
        if image.startswith("/") or ".." in parts or "\\" in image or ":" in parts[0]:
            raise UserError(
                f"{csv}: found image path {image}, expected a path below {folder} without '..'; make it relative."
            )
        parents.setdefault(PurePosixPath(image).parent.as_posix(), set()).add(parts[-1])
    if folder.local is not None:
        _check_links(csv, folder.local, parents)


def _check_links(csv: str, folder: Path, parents: dict[str, set[str]]) -> None:
    for parent, names in parents.items():
        # one listing a folder: resolving a million tiles one by one takes minutes on network storage
        directory = folder / parent
        suspects = [directory]
        if directory.is_dir():
            with os.scandir(directory) as entries:
                suspects += [Path(e.path) for e in entries if e.is_symlink() and e.name in names]
        for suspect in suspects:
            if not suspect.resolve().is_relative_to(folder):
                raise UserError(
                    f"{csv}: found {suspect}, a link to {suspect.resolve()} outside {folder}, expected tiles "
                    "inside the dataset folder; copy them there."
                )


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            table.to_csv(file, index=False, lineterminator="\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
