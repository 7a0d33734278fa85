"""Which dimension of a stored array is time, channel, depth, row or column, and how long a unit of length is.

An axis has one of the letters T C Z Y X S; S holds colour samples, which count as channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ray_pipeline.errors import UserError

LETTERS = "TCZYXS"
# The one axis beside Y and X that nobody named is taken for channels when it is this short.
MOST_UNNAMED_CHANNELS = 4
# Print resolutions (72 to 1200 dpi, 353 to 21 um) and bare pixel counts fill the same fields as a microscope's pixel.
LARGEST_PLAUSIBLE_UM_PIXEL = 20.0
UM_PER_UNIT = {
    "angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4, "m": 1e6, "meter": 1e6, "inch": 25400.0, "in": 25400.0,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One letter of LETTERS for each dimension of a stored array; '_' for a dimension of size 1 that has none."""

    letters: str
    shape: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Entries along T, C, Z, Y, X, in this order; 1 where the array has no such dimension."""
        found = dict(zip(self.letters, self.shape, strict=True))
        sizes = {letter: found.get(letter, 1) for letter in "TCZYX"}
        return sizes | {"C": sizes["C"] * found.get("S", 1)}

    def plane(self, array: Any, t: int, c: int, z: int) -> np.ndarray:
        """The plane (H, W) of an array that takes NumPy's indices; no other part of the array is asked for."""
        samples = dict(zip(self.letters, self.shape, strict=True)).get("S", 1)
        at = {"T": t, "Z": z, "C": c // samples, "S": c % samples, "Y": slice(None), "X": slice(None), "_": 0}
        plane = np.asarray(array[tuple(at[letter] for letter in self.letters)])
        return plane if self.letters.index("Y") < self.letters.index("X") else plane.T


def find_layout(path: Path | str, shape: Sequence[int], names: Sequence[str], axes: str | None) -> Layout:
    """Shape of a stored array, the file's own names of its dimensions and the user's `axes` -> Layout.

    names: a letter of LETTERS, another name, or '' where the file does not say. Dimensions of size 1 that `axes` has
    no letter for are passed over. Without `axes` a file must name every dimension longer than 1, or be 2-D with at
    most one unnamed axis more, of up to MOST_UNNAMED_CHANNELS entries: channels. UserError: anything else.
    """
    shape = tuple(int(size) for size in shape)
    if axes is not None:
        letters = _fitted(path, shape, names, _checked(path, axes))
    else:
        letters = _named(shape, names) or _guessed(shape, names)
        if letters is None:
            raise UserError(
                f"{path}: found shape {_words(shape, names)}, expected Y and X and names for the other axes (or one "
                f"unnamed axis of at most {MOST_UNNAMED_CHANNELS} channels); pass --axes, such as --axes ZYX."
            )
    return Layout(letters, shape)


def um_per(unit: str) -> float:
    """Name of a unit of length, as OME, ImageJ and NGFF write it -> micrometres; 0 where it is none."""
    # ImageJ writes the micro sign escaped; both Unicode micro signs and the angstrom's ring are in use.
    plain = unit.replace("\\u00B5", "u").replace("\u00b5", "u").replace("\u03bc", "u").replace("\u00c5", "angstrom")
    return UM_PER_UNIT.get(plain.strip().lower(), 0.0)


def plausible(um_pixel: float) -> float | None:
    """The pixel size, or None where no microscope has it."""
    return um_pixel if 0.0 < um_pixel < LARGEST_PLAUSIBLE_UM_PIXEL else None


def _checked(path: Path, axes: str) -> str:
    letters = axes.upper()
    if len(set(letters)) < len(letters) or not set("YX") <= set(letters) <= set(LETTERS):
        raise UserError(
            f"{path}: found --axes {axes}, expected Y, X and any of T, C, Z, S, each once; pass such as --axes ZYX."
        )
    return letters


def _fitted(path: Path, shape: tuple[int, ...], names: Sequence[str], axes: str) -> str:
    choices = list(_choices(shape, axes))
    if not choices:
        raise UserError(
            f"{path}: found --axes {axes} for an image of {len(shape)} dimensions, {_words(shape, names)}, expected "
            "one letter for each; correct --axes."
        )
    for letters in choices:
        if all(_agree(letter, name) for letter, name in zip(letters, names, strict=True)):
            return letters
    raise UserError(
        f"{path}: found --axes {axes}, expected what the file itself says, {_words(shape, names)}; correct or leave "
        "out --axes."
    )


def _choices(shape: tuple[int, ...], axes: str) -> Iterator[str]:
    for kept in combinations(range(len(shape)), len(axes)):
        if all(size == 1 for i, size in enumerate(shape) if i not in kept):
            letters = dict(zip(kept, axes, strict=True))
            yield "".join(letters.get(i, "_") for i in range(len(shape)))


def _agree(letter: str, name: str) -> bool:
    unsaid = letter == "_" or name not in tuple(LETTERS)
    return unsaid or letter == name or {letter, name} == {"C", "S"}


def _named(shape: tuple[int, ...], names: Sequence[str]) -> str | None:
    letters = [name if name in tuple(LETTERS) else "?" for name in names]
    letters = ["_" if letter == "?" and size == 1 else letter for letter, size in zip(letters, shape, strict=True)]
    known = [letter for letter in letters if letter != "_"]
    complete = "?" not in known and len(set(known)) == len(known) and {"Y", "X"} <= set(known)
    return "".join(letters) if complete else None


def _guessed(shape: tuple[int, ...], names: Sequence[str]) -> str | None:
    if len(shape) == 2 and not any(names):
        return "YX"
    kept = [i for i, (size, name) in enumerate(zip(shape, names, strict=True)) if size > 1 or name in ("Y", "X")]
    said = {names[i]: i for i in kept if names[i]}
    if len(kept) not in (2, 3) or (said and set(said) != {"Y", "X"}):
        return None
    y_x = [said["Y"], said["X"]] if said else sorted(sorted(kept, key=lambda i: (shape[i], i))[-2:])
    letters = dict(zip(y_x, "YX", strict=True))
    for i in set(kept) - set(y_x):
        if shape[i] > MOST_UNNAMED_CHANNELS:
            return None
        letters[i] = "C"
    return "".join(letters.get(i, "_") for i in range(len(shape)))


def _words(shape: tuple[int, ...], names: Sequence[str]) -> str:
    axes = ", ".join(f"{name or '?'}={size}" for name, size in zip(names, shape, strict=True))
    return f"{shape} ({axes})" if any(names) else f"{shape}"
