"""Cuts a surveyed image and its partners into tiles, at places that match."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ray_pipeline.data.images import MicroscopeImage, open_image, to_unit
from ray_pipeline.data.optics import area_mean
from ray_pipeline.data.rejected import Rejected
from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.planes import Plane, PlaneChoice, planes
from ray_pipeline.data.sources.survey import Intensities, Survey
from ray_pipeline.data.sources.tiling import tile_origins
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError

#: partners are reported whose black or white level is off by this share of the range
OFF_SCALE = 0.1


@dataclass(frozen=True)
class Cutting:
    """How images become tiles. overlap: pixels that neighbours share. min_content: the share of a tile's pixels that
    must lie above its group's background. fit_partners: bring each partner onto the intensities of its foundation image
    by a line fitted to the pair, instead of taking both as they are."""

    tile_size: int
    overlap: int = 0
    min_content: float = 0.0
    fit_partners: bool = False
    choice: PlaneChoice = field(default_factory=PlaneChoice)


@dataclass(frozen=True)
class Unit:
    """A foundation image with the partners that belong to it, and the stems of their tiles' ids by image name."""

    foundation: Survey
    partners: tuple[Survey, ...]
    stems: dict[str, str]


@dataclass(frozen=True)
class Cut:
    """Manifest rows of a unit, by kind foundation and degraded, the tiles that were left out, and the
    partners whose intensities are not on the scale of their foundation image."""

    rows: dict[str, list[dict]]
    left_out: list[Rejected]
    off_scale: set[str]


def partner_scale(foundation: Survey, partner: Survey) -> int:
    """How many times smaller the partner is; 0 where its size does not fit, or is not the one it was listed with."""
    scale = round(foundation.height / partner.height)
    sides = ((foundation.height, partner.height), (foundation.width, partner.width))
    # a remainder is cut off by some programs, and makes a pixel more in others
    fits = scale >= 1 and all(small in (large // scale, -(-large // scale)) for large, small in sides)
    return scale if fits and partner.image.scale in (None, scale) else 0


def cut_unit(root: Path, out: Path, cutting: Cutting, intensities: Intensities, unit: Unit) -> Cut:
    """Write <out>/{foundation,degraded}/<dataset>/images/*.png of one unit.

    A tile is left out where it is constant or has too little content, and its partners with it.
    """
    survey, choice = unit.foundation, cutting.choice
    opened = _reopened(root, survey, choice)
    scales = [partner_scale(survey, partner) for partner in unit.partners]
    multiple = math.lcm(*scales)
    corners = [
        (y, x)
        for y in tile_origins(survey.height, cutting.tile_size, cutting.overlap, multiple)
        for x in tile_origins(survey.width, cutting.tile_size, cutting.overlap, multiple)
    ]
    cut = Cut({"foundation": [], "degraded": []}, [], set())
    images = [_reopened(root, partner, choice) for partner in unit.partners]
    of_partners = [planes(image, choice) for image in images]
    for plane in planes(opened, choice):
        seen = [_at(plane.place, each) for each in of_partners]
        if plane.channel not in survey.limits:
            continue
        writer = _Writer(out, cutting, unit, opened, plane, intensities)
        kept = writer.foundation(corners, cut)
        for partner, image, scale, other in zip(unit.partners, images, scales, seen, strict=True):
            if plane.channel in partner.limits:
                cut.off_scale.update(writer.off_scale(partner, other, scale))
                writer.partner(partner, image, scale, other, kept, cut)
        writer.depth(kept, cut)
    return cut


def _reopened(root: Path, survey: Survey, choice: PlaneChoice) -> MicroscopeImage:
    """The image of a survey; UserError where it is another one by now."""
    path = root / survey.image.name
    image = open_image(path, choice.axes)
    if path.stat().st_mtime_ns != survey.written_ns:
        raise UserError(f"{path} was written while it was prepared; leave the images alone and prepare them again.")
    return image


@dataclass(frozen=True)
class _Writer:
    """Writes the tiles of one plane and of what pairs with it."""

    out: Path
    cutting: Cutting
    unit: Unit
    opened: MicroscopeImage
    plane: Plane
    intensities: Intensities

    @property
    def range(self) -> tuple[float, float]:
        return self.intensities.ranges[self.unit.foundation.group(self.plane.channel)]

    def tile_id(self, name: str, y: int, x: int) -> str:
        return f"{self.unit.stems[name]}_c{self.plane.channel}{self.plane.suffix}_y{y:05d}_x{x:05d}"

    def foundation(self, corners: list[tuple[int, int]], cut: Cut) -> list[tuple[int, int]]:
        """Write the foundation's tiles -> the corners of those that were kept."""
        survey, kept = self.unit.foundation, []
        side, background = self.cutting.tile_size, self.intensities.background[survey.group(self.plane.channel)]
        for y, x, pixels in _squares(self.plane.pixels, corners, 1, side):
            identifier = self.tile_id(survey.image.name, y, x)
            content = float((pixels > background).mean())
            unit = to_unit(pixels, *self.range)
            reason = ""
            if unit.min() == unit.max():
                reason = f"constant tile, every pixel is {unit[0, 0]:g} of its range"
            elif content < self.cutting.min_content:
                reason = f"{content:.4f} of the tile lies above the background of {background:g}"
            if reason:
                cut.left_out.append(Rejected(identifier, survey.image.name, reason))
                continue
            kept.append((y, x))
            row = self._row("foundation", survey.image, identifier, unit, self.range, y, x, self._um_pixel(1))
            row |= {"task": "foundation", "degradation": "none", "dtype": survey.dtype, "scale": 1}
            cut.rows["foundation"].append(row | {"saturated": round(survey.saturated, 6)})
        return kept

    def partner(
        self,
        partner: Survey,
        image: MicroscopeImage,
        scale: int,
        other: Plane,
        kept: list[tuple[int, int]],
        cut: Cut,
    ) -> None:
        """Write the tiles of one partner at the places of those kept."""
        name = partner.image.name
        lo_hi = self._fitted(other.pixels, scale) if self.cutting.fit_partners else self.range
        if not lo_hi[0] < lo_hi[1]:
            reason = f"it gets darker where {self.unit.foundation.image.name} gets brighter: no image of the same field"
            cut.left_out.append(Rejected("", name, reason))
            return
        um_pixel = image.um_pixel or self._um_pixel(scale)
        for y, x, pixels in _squares(other.pixels, kept, scale, self.cutting.tile_size):
            corner = (y // scale, x // scale)
            unit = to_unit(pixels, *lo_hi)
            row = self._row("degraded", partner.image, self.tile_id(name, y, x), unit, lo_hi, *corner, um_pixel)
            row |= {"task": partner.image.task, "degradation": "measured", "scale": scale, "dtype": partner.dtype}
            cut.rows["degraded"].append(row | {"pair_id": self.tile_id(self.unit.foundation.image.name, y, x)})

    def depth(self, kept: list[tuple[int, int]], cut: Cut) -> None:
        """Write the depth from focus of the stack that the plane was made from, if it was."""
        if self.plane.depth is None:
            return
        image = self.unit.foundation.image
        for y, x, depth in _squares(self.plane.depth, kept, 1, self.cutting.tile_size):
            tile = self.tile_id(image.name, y, x)
            row = self._row("degraded", image, f"{tile}_depth", depth, (0.0, 1.0), y, x, self._um_pixel(1))
            row |= {"task": "depth", "degradation": "depth from focus", "scale": 1, "dtype": "float32"}
            cut.rows["degraded"].append(row | {"pair_id": tile})

    def _um_pixel(self, scale: int) -> float | None:
        known = self.opened.um_pixel or self.unit.foundation.image.metadata.get("um_pixel")
        return None if known is None else known * scale

    def off_scale(self, partner: Survey, other: Plane, scale: int) -> set[str]:
        """The partner's name where its range, by the line over its foundation image, is another one by more than
        OFF_SCALE of it; a fit takes that away."""
        if self.cutting.fit_partners:
            return set()
        (lo, hi), found = self.range, self._fitted(other.pixels, scale)
        apart = max(abs(found[0] - lo), abs(found[1] - hi))
        return {partner.image.name} if apart > OFF_SCALE * (hi - lo) else set()

    def _fitted(self, pixels: np.ndarray, scale: int) -> tuple[float, float]:
        """The range in the partner's units: its line over the foundation's pixels, by least squares."""
        clean = area_mean(self.plane.pixels, scale)
        seen = pixels[: clean.shape[0], : clean.shape[1]].astype(np.float64)
        slope, offset = np.polyfit(clean.ravel(), seen.ravel(), 1)
        lo, hi = self.range
        return float(offset + slope * lo), float(offset + slope * hi)

    def _row(
        self,
        kind: str,
        image: SourceImage,
        identifier: str,
        unit: np.ndarray,
        lo_hi: tuple[float, float],
        y: int,
        x: int,
        um_pixel: float | None,
    ) -> dict:
        path = f"images/{identifier}.png"
        known = {key: value for key, value in image.metadata.items() if key != "um_pixel"}
        marker = self.opened.channel_names[self.plane.channel] or known.get("marker", "")
        row = {"id": identifier, "image": path, "dataset": image.dataset, **known, "marker": marker}
        row |= {"channel_idx": image.channel + self.plane.channel, "norm_lo": lo_hi[0], "norm_hi": lo_hi[1]}
        row |= {"x0": x, "y0": y, "um_pixel": um_pixel, "averages": image.averages}
        row |= {"height": unit.shape[0], "width": unit.shape[1]}
        return row | {"sha256": write_tile(self.out / kind / image.dataset / path, unit)}


def _at(place: tuple[int, int, int], partner: Iterator[Plane]) -> Plane:
    """The partner's next plane at a place; channels that only the partner has are passed over."""
    return next(plane for plane in partner if plane.place == place)


def _squares(
    pixels: np.ndarray, corners: list[tuple[int, int]], scale: int, side: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Corners, in pixels of the foundation, and what an image `scale` times smaller shows there."""
    for y, x in corners:
        yield y, x, pixels[y // scale : (y + side) // scale, x // scale : (x + side) // scale]
