"""TIFF files as microscopes and ImageJ write them: axes, channels and pixel size; damaged ones are refused."""

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import tifffile

from ray_pipeline.errors import UserError

# Print resolutions (72 to 1200 dpi, 353 to 21 um) fill the same TIFF tag as a microscope's pixel size.
LARGEST_PLAUSIBLE_UM_PIXEL = 20.0
# An axis that the file does not name is taken for channels when it is this short.
MOST_UNNAMED_CHANNELS = 4
UM_PER_UNIT = {
    "nm": 1e-3, "nanometer": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "inch": 25400.0, "in": 25400.0,
}  # fmt: skip
TIFFFILE_LOG = logging.getLogger("tifffile")
# Records of the file that is being read; by context, since files are read in several threads.
_WITHHELD: ContextVar[list[logging.LogRecord] | None] = ContextVar("withheld", default=None)


def read_tiff(path: Path) -> tuple[np.ndarray, float | None]:
    """A TIFF, ImageJ or OME TIFF file of one image -> pixels (C, H, W) as stored, micrometres a pixel or None.

    Axes and the meaning of channels as in `images.read_image`. UserError: unreadable or truncated file, Z or T
    axes, several images. OSError: a file that cannot be opened.
    """
    try:
        with _log_of_good_files_only(), tifffile.TiffFile(path) as tiff:
            if len(tiff.series) != 1 or tiff.series[0].is_multifile:
                raise UserError(
                    f"{path}: expected one image, found {len(tiff.series)} image series or parts in other "
                    "files; save each image to a file of its own."
                )
            series = tiff.series[0]
            _check_tiff_is_whole(path, tiff)
            pixels = _channels_first(path, series.asarray(), series.axes)
            if tiff.pages[0].photometric == tifffile.PHOTOMETRIC.RGB and series.axes.endswith("S"):
                pixels = pixels[: pixels.shape[0] - len(_alpha_samples(tiff.pages[0]))]
            return pixels, _um_pixel(tiff)
    except (UserError, OSError):
        raise
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: expected a TIFF image, found an unreadable file ({detail}); copy it again or remove it."
        ) from error


@contextmanager
def _log_of_good_files_only() -> Iterator[None]:
    """Withholds what tifffile logs, and drops it where an exception refuses the file: the UserError says it."""
    records = []
    token = _WITHHELD.set(records)
    try:
        yield
    finally:
        _WITHHELD.reset(token)
    for record in records:
        TIFFFILE_LOG.handle(record)


def _withhold(record: logging.LogRecord) -> bool:
    records = _WITHHELD.get()
    if records is not None:
        records.append(record)
    return records is None


TIFFFILE_LOG.addFilter(_withhold)


def _check_tiff_is_whole(path: Path, tiff: tifffile.TiffFile) -> None:
    # Strips behind the end of a truncated file may read as zeros and lost pages are only logged: compare
    # strips, and where the last page says the next one stands, with the size instead of trusting.
    size = path.stat().st_size
    ends = [a + b for page in tiff.pages for a, b in zip(page.dataoffsets, page.databytecounts, strict=True)]
    series, layout, handle = tiff.series[0], tiff.tiff, tiff.filehandle
    if series.dataoffset is not None:
        ends.append(series.dataoffset + series.nbytes)
    handle.seek(tiff.pages[len(tiff.pages) - 1].offset)
    (tags,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    handle.seek(tags * layout.tagsize, os.SEEK_CUR)
    ends += struct.unpack(layout.offsetformat, handle.read(layout.offsetsize))
    if max(ends) > size:
        raise UserError(f"{path}: found a truncated TIFF ({size} bytes, {max(ends)} expected); copy or save it again.")


def _channels_first(path: Path, pixels: np.ndarray, axes: str) -> np.ndarray:
    kept = [(axis, size) for axis, size in zip(axes, pixels.shape, strict=True) if axis in "YX" or size > 1]
    names, shape = "".join(axis for axis, _ in kept), [size for _, size in kept]
    if sorted(names) == ["X", "Y"]:
        return pixels.reshape(1, *shape)
    channel = next((i for i, name in enumerate(names) if name in "CS"), None)
    if channel is None and not set(names) & set("ZT") and min(shape) <= MOST_UNNAMED_CHANNELS:
        channel = int(np.argmin(shape))
    if channel is None or len(names) != 3:
        found = ", ".join(f"{axis}={size}" for axis, size in kept)
        raise UserError(
            f"{path}: found axes {found}, expected Y, X and at most one channel axis; split the stack into 2-D files."
        )
    return np.moveaxis(pixels.reshape(shape), channel, 0)


def _alpha_samples(page: tifffile.TiffPage) -> list:
    alpha = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
    return [sample for sample in page.extrasamples if sample in alpha]


def _um_pixel(tiff: tifffile.TiffFile) -> float | None:
    if tiff.is_ome:
        pixels = tifffile.xml2dict(tiff.ome_metadata or "<OME/>").get("OME", {}).get("Image", {})
        pixels = (pixels[0] if isinstance(pixels, list) else pixels).get("Pixels", {})
        size, unit = pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeXUnit", "um")
        return _plausible(float(size) * _um_per(unit)) if size else None
    tags = tiff.pages[0].tags
    resolution = tags["XResolution"].value if "XResolution" in tags else (0, 1)
    if not all(resolution):
        return None
    units_per_pixel = resolution[1] / resolution[0]
    if tiff.is_imagej:
        return _plausible(units_per_pixel * _um_per((tiff.imagej_metadata or {}).get("unit", "")))
    unit = tags["ResolutionUnit"].value if "ResolutionUnit" in tags else 1
    return _plausible(units_per_pixel * {2: 25400.0, 3: 1e4}.get(int(unit), 0.0))


def _um_per(unit: str) -> float:
    # ImageJ writes the micro sign escaped; both Unicode micro signs are in use.
    plain = unit.replace("\\u00B5", "u").replace("\u00b5", "u").replace("\u03bc", "u").strip().lower()
    return UM_PER_UNIT.get(plain, 0.0)


def _plausible(um_pixel: float) -> float | None:
    return um_pixel if 0.0 < um_pixel < LARGEST_PLAUSIBLE_UM_PIXEL else None
