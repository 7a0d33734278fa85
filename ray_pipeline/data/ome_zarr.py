"""OME-Zarr folders (NGFF 0.4 and 0.5): the highest resolution of one image, read plane by plane."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.data.axes import plausible, um_per
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    import zarr

METADATA_FILES = (".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json")
LETTER_OF_NAME = {"t": "T", "time": "T", "c": "C", "channel": "C", "z": "Z", "y": "Y", "x": "X"}
LETTER_OF_TYPE = {"time": "T", "channel": "C"}


def open_ome_zarr(path: Path) -> tuple[zarr.Array, list[str], float | None, list[str]]:
    """An OME-Zarr folder of one image -> its largest array (unread), axes, micrometres a pixel, channel names.

    axes: a letter of T C Z Y X, another name, or '' where the file has none. A bare Zarr array has no metadata but
    the names of its dimensions. https://ngff.openmicroscopy.org/0.5 and /0.4. UserError: zarr is not installed, no
    Zarr, several images, a well plate, no pixel data.
    """
    try:
        import zarr
    except ImportError as error:
        raise UserError(f"{path}: reading OME-Zarr needs zarr 3; run pip install 'ray-pipeline[zarr]'.") from error
    try:
        node = zarr.open(path, mode="r")
        found = _bare(node) if isinstance(node, zarr.Array) else _image_of_group(path, node)
    except UserError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: expected an OME-Zarr image, found a folder that cannot be read ({detail}); copy it again."
        ) from error
    folder = path / found[0].path
    if not any(file.is_file() and file.name not in METADATA_FILES for file in folder.rglob("*")):
        raise UserError(f"{path}: found metadata and no pixels in {folder}; copy the whole folder again.")
    return found


def _image_of_group(path: Path, group: zarr.Group) -> tuple[zarr.Array, list[str], float | None, list[str]]:
    metadata = _ome(group)
    if "bioformats2raw.layout" in metadata:
        # The layout of the converter bioformats2raw: a group for every image of the converted file.
        images = sorted(name for name in group.group_keys() if name != "OME")
        if len(images) != 1:
            raise UserError(
                f"{path}: expected one image, found {len(images)} ({', '.join(images[:5])}); save each to a folder "
                "*.zarr of its own."
            )
        group = group[images[0]]
        metadata = _ome(group)
    if "plate" in metadata or "well" in metadata:
        raise UserError(
            f"{path}: expected one image, found a well plate; save each field to a folder *.zarr of its own."
        )
    scales = metadata.get("multiscales", [])
    arrays = [array for _, array in group.arrays()] if not scales else []
    if len(arrays) == 1:
        return _bare(arrays[0])
    if len(scales) != 1:
        raise UserError(
            f"{path}: expected one OME-Zarr image, found {len(scales)} images and {len(arrays)} bare arrays; save each "
            "image to a folder *.zarr of its own."
        )
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in scales[0].get("axes", [])]
    array = group[scales[0]["datasets"][0]["path"]]  # the specification orders them from the largest
    names = [_letter(axis) for axis in axes] if axes else [""] * array.ndim
    if len(names) != array.ndim:
        raise UserError(
            f"{path}: found {len(names)} named axes for an array of shape {array.shape}, expected one for each "
            "dimension; write the metadata again."
        )
    channels = metadata.get("omero", group.attrs.get("omero", {})).get("channels", [])
    return array, names, _um_pixel(scales[0], axes, names), [str(c.get("label") or "") for c in channels]


def _ome(group: zarr.Group) -> dict[str, Any]:
    """NGFF metadata of a group: under the key `ome` since 0.5."""
    attributes = dict(group.attrs)
    return attributes.get("ome", attributes)


def _bare(array: zarr.Array) -> tuple[zarr.Array, list[str], None, list[str]]:
    names = getattr(array.metadata, "dimension_names", None) or [None] * array.ndim
    return array, [_letter({"name": name}) if name else "" for name in names], None, []


def _letter(axis: dict[str, str]) -> str:
    name = str(axis.get("name", ""))
    return LETTER_OF_TYPE.get(axis.get("type", ""), LETTER_OF_NAME.get(name.lower(), name.lower()))


def _um_pixel(scales: dict[str, Any], axes: list[dict[str, str]], names: list[str]) -> float | None:
    if "X" not in names:
        return None
    x = names.index("X")
    # The transformations of all resolutions follow those of the one.
    steps = scales["datasets"][0].get("coordinateTransformations", []) + scales.get("coordinateTransformations", [])
    factors = [step["scale"][x] for step in steps if "scale" in step]
    return plausible(math.prod(factors) * um_per(axes[x].get("unit") or "")) if factors else None
