"""A data root that was made on a disk is brought to object storage: complete or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_pipeline.storage import Folder

_REQUESTS = 32  # at once


def upload_data(made: Path, root: Folder) -> None:
    """Copy every file below `made`. Manifests come last, and foundation/<dataset>/manifests/manifest.csv behind all
    others, so that a kill leaves no data set that lacks a tile."""
    files = sorted((path.relative_to(made) for path in made.rglob("*") if path.is_file()), key=_turn)
    tiles = [file for file in files if not _is_manifest(file)]

    def send(file: Path) -> None:
        root.write(file.as_posix(), (made / file).read_bytes())

    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(send, tiles))
    for file in files[len(tiles) :]:
        send(file)


def _is_manifest(file: Path) -> bool:
    return file.parent.name == "manifests"


def _turn(file: Path) -> tuple[bool, bool, bool, Path]:
    return _is_manifest(file), file.name == "manifest.csv", file.parts[0] == "foundation", file
