"""A folder of images through `prepare`, and what lies on disk then, read without this package."""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from ray_pipeline.data.sources.collection import add_metadata
from ray_pipeline.data.sources.cut import Cutting
from ray_pipeline.data.sources.folder import list_folder, partner_rule
from ray_pipeline.data.sources.planes import PlaneChoice
from ray_pipeline.data.sources.prepare import Prepared, Settings, prepare

TILE_ID = re.compile(r"(.+)_c(\d+)((?:_t\d+)?(?:_z\d+|_max|_focus)?)_y(\d{5})_x(\d{5})(?:_depth)?")
CHOICES = ("axes", "channels", "z", "t")
CUTS = ("overlap", "min_content", "fit_partners")


@dataclass(frozen=True)
class Tile:
    """A row of a manifest as text, its split, what its id says, its levels (uint16) and its pixels in source units."""

    row: dict[str, str]
    split: str
    levels: np.ndarray

    @property
    def id(self) -> str:
        return self.row["id"]

    @property
    def image(self) -> str:
        """Stem of the image that the tile was cut from."""
        return TILE_ID.fullmatch(self.id)[1]

    @property
    def plane(self) -> str:
        """Channel, time and depth, such as 0, 1_z2 or 0_max."""
        found = TILE_ID.fullmatch(self.id)
        return found[2] + found[3]

    @property
    def place(self) -> tuple[slice, slice]:
        """Where the tile lies in its own image."""
        y, x, height, width = (int(self.row[key]) for key in ("y0", "x0", "height", "width"))
        return np.s_[y : y + height, x : x + width]

    @property
    def pixels(self) -> np.ndarray:
        lo, hi = float(self.row["norm_lo"]), float(self.row["norm_hi"])
        values = lo + self.levels / 65535 * (hi - lo)
        return np.rint(values).astype(self.row["dtype"]) if "int" in self.row["dtype"] else values


@pytest.fixture(scope="session")
def read_tiles() -> Callable[..., dict[str, Tile]]:
    """read_tiles(data root, kind, dataset) -> {id: Tile} in the manifest's order."""

    def read(out: Path, kind: str = "foundation", dataset: str = "cells") -> dict[str, Tile]:
        folder, tables = out / kind / dataset, {}
        for name in ("manifest", "train", "val", "test"):
            with (folder / "manifests" / f"{name}.csv").open(newline="") as file:
                tables[name] = list(csv.DictReader(file))
        split_of = {row["id"]: name for name in ("train", "val", "test") for row in tables[name]}
        assert sum(map(len, tables.values())) == 2 * len(split_of) == 2 * len(tables["manifest"])
        assert len(list((folder / "images").iterdir())) == len(split_of)
        return {
            row["id"]: Tile(row, split_of[row["id"]], cv2.imread(str(folder / row["image"]), cv2.IMREAD_UNCHANGED))
            for row in tables["manifest"]
        }

    return read


@pytest.fixture
def prepare_folder(ray_cluster) -> Callable[..., Prepared]:
    """list_folder, then prepare, with fields of Settings, Cutting and PlaneChoice by their names; every image may serve
    for training unless the test says otherwise."""

    def run(
        root: Path, out: Path, *, tile_size=32, dataset="cells", group=None, partners=(), meta=(), report=None, **more
    ) -> Prepared:
        pattern = None if group is None else re.compile(group)
        rules = [partner_rule(*words) for words in partners]
        collection = add_metadata(list_folder(root, dataset=dataset, group=pattern, partners=rules), meta)
        choice = PlaneChoice(**{key: more.pop(key) for key in CHOICES if key in more})
        cutting = Cutting(tile_size, **{key: more.pop(key) for key in CUTS if key in more}, choice=choice)
        settings = Settings(cutting, **({"val_fraction": 0.0, "percentiles": (0, 100)} | more))
        return prepare(collection, out, settings, report or (lambda *_: None))

    return run


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """tree(folder) -> the bytes of every file below it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return read


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def cells(rng) -> Callable[..., np.ndarray]:
    """cells(shape, dtype, peak): random intensities of 0 to `peak`, most of them low, as in fluorescence."""

    def draw(shape, dtype="uint16", peak=4000) -> np.ndarray:
        return np.clip(rng.gamma(2.0, peak / 10, shape), 0, peak).astype(dtype)

    return draw
