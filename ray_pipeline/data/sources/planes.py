"""Which planes of an image become tiles: channels, depths and times, chosen and never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ray_pipeline.data.focus import depth_from_focus, extended_focus
from ray_pipeline.data.images import MicroscopeImage
from ray_pipeline.errors import UserError

Chosen = tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class PlaneChoice:
    """channels, z, t: indices from 0 or `all`; z also `max`, the brightest of each pixel, or `focus`, the sharpest.
    None: all channels, and the only depth and time; an image with several is refused."""

    axes: str | None = None
    channels: Chosen | None = None
    z: Chosen | Literal["max", "focus"] | None = None
    t: Chosen | None = None

    @property
    def projects(self) -> bool:
        """Whether a stack gives one plane, so that a depth map belongs to it."""
        return self.z in ("max", "focus")


@dataclass(frozen=True)
class Plane:
    """One plane (H, W); place: its channel, time and depth, depth 0 where it is made from a stack; suffix: what tells
    it from others of the channel; depth: (H, W) in [0, 1] from focus, where it was made from a stack, else None."""

    place: tuple[int, int, int]
    suffix: str
    pixels: np.ndarray
    depth: np.ndarray | None = None

    @property
    def channel(self) -> int:
        return self.place[0]


def planes(image: MicroscopeImage, choice: PlaneChoice) -> Iterator[Plane]:
    """The chosen planes by channel, time and depth; UserError where the image has axes that nobody chose from."""
    times, channels = _indices(image, "T", choice.t), _indices(image, "C", choice.channels or "all")
    depths = tuple(range(image.sizes["Z"])) if choice.projects else _indices(image, "Z", choice.z)
    for c in channels:
        for t in times:
            time = f"_t{t}" if image.sizes["T"] > 1 else ""
            if choice.projects and len(depths) > 1:
                stack = np.stack([image.plane(t, c, z) for z in depths])
                pixels = stack.max(axis=0) if choice.z == "max" else extended_focus(stack)
                yield Plane((c, t, 0), f"{time}_{choice.z}", pixels, depth_from_focus(stack))
                continue
            for z in depths:
                yield Plane((c, t, z), time + (f"_z{z}" if image.sizes["Z"] > 1 else ""), image.plane(t, c, z))


def _indices(image: MicroscopeImage, axis: str, chosen: Chosen | None) -> tuple[int, ...]:
    size, option = image.sizes[axis], {"T": "--t", "C": "--channels", "Z": "--z"}[axis]
    if chosen is None:
        if size > 1:
            more = ", max or focus" if axis == "Z" else ""
            raise UserError(
                f"{image.path}: found {size} planes along {axis}, expected one; pass {option} with numbers from 0 to "
                f"{size - 1}, all{more}"
            )
        return (0,)
    if chosen == "all":
        return tuple(range(size))
    beyond = [index for index in chosen if index >= size]
    if beyond:
        raise UserError(
            f"{image.path}: found {size} along {axis}, expected also number {beyond[0]} (from 0); correct {option}"
        )
    return tuple(chosen)
