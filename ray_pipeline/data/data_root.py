"""What lies in a data root, on a disk or in object storage: data sets, and how long their files are."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.data.images import is_zarr
from ray_pipeline.storage import Folder


def dataset_folders(root: str | Path | Folder, kind: str = "foundation") -> list[Folder]:
    """Folders <root>/<kind>/<dataset> that hold manifests, by name; `kind` is foundation or degraded."""
    place = (root if isinstance(root, Folder) else Folder(root)).child(kind)
    found = [place.child(name) for name in place.folders() if not name.startswith(".")]
    return [folder for folder in found if "manifests" in folder.folders()]


class FileSizes:
    """Finds missing and empty files below a folder. In object storage each folder is listed once, whatever the number
    of its files that are asked for."""

    def __init__(self, root: Folder):
        self.root = root
        self._listed: dict[str, dict[str, int]] = {}

    def fault(self, name: str) -> str:
        """What a file is, by its path below the root, when it cannot be read: missing, empty, an OME-Zarr in object
        storage; '' for a file that has some bytes."""
        if self.root.local is None and is_zarr(name):
            return "an OME-Zarr folder, which is read from a disk alone (save it as TIFF or PNG)"
        size = self._size(name)
        return "" if size > 0 else "empty" if size == 0 else "missing"

    def _size(self, name: str) -> int:
        if self.root.local is not None:
            return _local_size(self.root.local / name)
        folder, _, file = name.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = (self.root.child(*folder.split("/")) if folder else self.root).sizes()
        return self._listed[folder].get(file, -1)


def _local_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
