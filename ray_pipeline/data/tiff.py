"""TIFF files as microscopes and ImageJ write them: axes, channels and pixel size; damaged ones are refused."""

import io
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from ray_pipeline.data.axes import plausible, um_per
from ray_pipeline.errors import UserError

TIFFFILE_LOG = logging.getLogger("tifffile")
# Records of the file that is being read; by context, since files are read in several threads.
_WITHHELD: ContextVar[list[logging.LogRecord] | None] = ContextVar("withheld", default=None)


def read_tiff(path: Path | str, content: bytes | None = None) -> tuple[np.ndarray, list[str], float | None, list[str]]:
    """A TIFF, ImageJ or OME TIFF file of one image, or its bytes -> pixels as stored, axes, micrometres a pixel,
    channel names.

    axes: one letter a dimension as tifffile has them, '' where the file does not name it. UserError: unreadable or
    truncated file, several images, an image in several files. OSError: a file that cannot be opened.
    """
    source = path if content is None else io.BytesIO(content)
    try:
        with _log_of_good_files_only(), tifffile.TiffFile(source) as tiff:
            ome = ElementTree.fromstring(tiff.ome_metadata) if tiff.is_ome and tiff.ome_metadata else None
            if ome is not None:
                _check_ome_is_one_file(path, ome)
            if len(tiff.series) != 1 or tiff.series[0].is_multifile:
                raise UserError(
                    f"{path}: expected one image, found {len(tiff.series)} image series or parts in other "
                    "files; save each image to a file of its own."
                )
            series = tiff.series[0]
            _check_tiff_is_whole(path, tiff)
            if ome is not None:
                _check_ome_planes(path, series)
            axes = series.get_axes(False)
            pixels = series.asarray().reshape(series.get_shape(False))
            if tiff.pages[0].photometric == tifffile.PHOTOMETRIC.RGB and "S" in axes:
                colours = pixels.shape[axes.index("S")] - len(_alpha_samples(tiff.pages[0]))
                pixels = pixels.take(range(colours), axes.index("S"))
            if "S" in axes and pixels.shape[axes.index("S")] == 1:  # tifffile adds it to every OME and ImageJ file
                pixels, axes = pixels.squeeze(axes.index("S")), axes.replace("S", "")
            channel_names = _imagej_channel_names(tiff) if ome is None else _ome_channel_names(ome)
            return pixels, _names(series, axes), _um_pixel(tiff, ome), channel_names
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


def _check_tiff_is_whole(path: Path | str, tiff: tifffile.TiffFile) -> None:
    # Strips behind the end of a truncated file may read as zeros and lost pages are only logged: compare
    # strips, and where the last page says the next one stands, with the size instead of trusting.
    size = tiff.filehandle.size
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


def _check_ome_is_one_file(path: Path | str, ome: ElementTree.Element) -> None:
    # tifffile puts zeros where another file is missing. A renamed file is known by its UUID, without one by its name.
    own, others = ome.get("UUID"), set()
    for uuid in ome.findall(".//{*}TiffData/{*}UUID"):
        name = uuid.get("FileName", "another file")
        is_own = uuid.text == own if own else name.lower() == Path(path).name.lower()
        others |= set() if is_own else {name}
    others |= {part.get("MetadataFile", "another file") for part in ome.findall("{*}BinaryOnly")}
    if others:
        raise UserError(
            f"{path}: expected one image in one file, found OME metadata that refers to other files "
            f"({', '.join(sorted(others)[:3])}); save the whole image as one OME-TIFF."
        )


def _check_ome_planes(path: Path | str, series: tifffile.TiffPageSeries) -> None:
    # An acquisition that was stopped declares more planes than it wrote; tifffile puts zeros in their place.
    lacking = sum(page is None for page in series.pages)
    if lacking:
        raise UserError(
            f"{path}: found {len(series.pages) - lacking} of the {len(series.pages)} planes that its OME metadata "
            "declares; save the planes that exist as a new image."
        )


def _names(series: tifffile.TiffPageSeries, axes: str) -> list[str]:
    # tifffile's I and Q are its own words for an axis without a name; a shape that tifffile itself stored without
    # axes says nothing of Y and X either.
    unnamed = series.kind.lower() == "shaped" and "Q" in axes
    return ["" if unnamed or axis in "IQ" else axis for axis in axes]


def _alpha_samples(page: tifffile.TiffPage) -> list:
    alpha = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
    return [sample for sample in page.extrasamples if sample in alpha]


def _ome_channel_names(ome: ElementTree.Element) -> list[str]:
    names = []
    for channel in ome.findall("{*}Image/{*}Pixels/{*}Channel"):
        samples = int(channel.get("SamplesPerPixel", 1))
        names += [channel.get("Name", "")] if samples == 1 else [""] * samples
    return names


def _imagej_channel_names(tiff: tifffile.TiffFile) -> list[str]:
    # ImageJ labels planes: a label is the channel's only where all planes of the channel bear it and no others do.
    metadata = tiff.imagej_metadata or {} if tiff.is_imagej else {}
    channels, labels = int(metadata.get("channels", 1)), metadata.get("Labels", [])
    if not isinstance(labels, list) or not labels or len(labels) % channels:
        return []
    by_channel = [set(labels[c::channels]) for c in range(channels)]
    alike = all(len(found) == 1 for found in by_channel) and len(set().union(*by_channel)) == channels
    return [found.pop().strip() for found in by_channel] if alike else []


def _um_pixel(tiff: tifffile.TiffFile, ome: ElementTree.Element | None) -> float | None:
    if ome is not None:
        pixels = ome.find("{*}Image/{*}Pixels")
        size = None if pixels is None else pixels.get("PhysicalSizeX")
        return plausible(float(size) * um_per(pixels.get("PhysicalSizeXUnit", "um"))) if size else None
    tags = tiff.pages[0].tags
    resolution = tags["XResolution"].value if "XResolution" in tags else (0, 1)
    if not all(resolution):
        return None
    units_per_pixel = resolution[1] / resolution[0]
    if tiff.is_imagej:
        return plausible(units_per_pixel * um_per((tiff.imagej_metadata or {}).get("unit", "")))
    unit = tags["ResolutionUnit"].value if "ResolutionUnit" in tags else 1
    return plausible(units_per_pixel * {2: 25400.0, 3: 1e4}.get(int(unit), 0.0))
