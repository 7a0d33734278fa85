"""A data set in the making, beside its place, and how it gets there: complete or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from ray_pipeline.data.rejected import REJECTED_FILE
from ray_pipeline.data.sources.tiling import safe_name
from ray_pipeline.errors import UserError


def staging_folder(out: Path) -> Path:
    """A new hidden folder for a data set in the making; those of killed jobs of this machine are removed."""
    host = safe_name(socket.gethostname())
    for left in out.glob(f".prepare-{host}-*"):
        number = left.name.rpartition("-")[2]
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    return out / f".prepare-{host}-{os.getpid()}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def check_target(source: Path, target: Path, dataset: str, overwrite: bool) -> None:
    """UserError where a data set cannot be made at `target`: a wrong name, inside its source, or already there."""
    if not dataset or safe_name(dataset) != dataset:
        raise UserError(
            f"--dataset {dataset!r}: expected ASCII letters, digits, '.', '_' or '-', the first no '.'; change it."
        )
    inside, outside = source.resolve(), target.resolve()
    if outside.is_relative_to(inside) or inside.is_relative_to(outside):
        raise UserError(
            f"{target}: the result and the source {source} lie in each other, expected separate folders; choose "
            "another --out."
        )
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    if "manifests" in found and not overwrite:
        raise UserError(
            f"{target}: found a prepared data set, expected none of that name; pass --overwrite or another --dataset."
        )
    if found - {REJECTED_FILE} and "manifests" not in found:
        raise UserError(
            f"{target}: found a folder that is no prepared data set ({', '.join(sorted(found)[:5])}), expected "
            "none; move it away or pass another --dataset."
        )


def put_in_place(out: Path, staging: Path, dataset: str) -> None:
    """Put a finished data set in the place of an old one; a kill in between leaves no foundation, but no wrong pair."""
    targets = {kind: out / kind / dataset for kind in ("foundation", "degraded")}
    for target in targets.values():
        old = target.with_name(f".{dataset}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
    for kind in ("degraded", "foundation"):
        made = staging / kind / dataset
        if made.exists():
            targets[kind].parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, targets[kind])
        shutil.rmtree(targets[kind].with_name(f".{dataset}.old"), ignore_errors=True)
