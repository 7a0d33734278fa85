"""What a data source lists: the images of a release or a folder and how they belong together; no pixel is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_pipeline.errors import UserError

#: manifest columns that a source may know of an image
METADATA = ("modality", "specimen", "marker", "NA", "lambda", "um_pixel")
NUMBERS = ("NA", "lambda", "um_pixel")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image file. Many images may share one `metadata`.

    name: path below the collection's root, with '/'. kind: cell, stain or instrument within the data set; images of
    one data set, kind and channel are normalised together. group: images of one group (field, well, slide) share a
    split; without one, an image stands for itself. split: train, val or test where the release publishes it, else
    None. channel: channel_idx of the file's first channel. A degraded partner has `pair`, the name of its
    foundation image, and its `task`; it is `scale` times smaller than that image (None: as the sizes tell), and the
    mean of `averages` captures (None: not known).
    """

    name: str
    dataset: str
    kind: str = ""
    group: str = ""
    split: str | None = None
    channel: int = 0
    pair: str | None = None
    task: str = ""
    scale: int | None = 1
    averages: int | None = None
    metadata: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """All images under `root`.

    rejected: (name, reason) of images that cannot be used, such as a partner without its foundation image. notes: what
    a partial download lacks, one sentence each. ignored: files that are no images of this collection.
    """

    root: Path
    images: list[SourceImage]
    rejected: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: int = 0


#: what a source is: the function of a root that lists its images; UserError when the root holds none
Source = Callable[[Path], Collection]


def add_metadata(collection: Collection, words: Sequence[str]) -> Collection:
    """The collection with KEY=VALUE words added where its images do not say; UserError for an unknown key or value."""
    added: dict[str, str | float] = {}
    for word in words:
        key, mark, value = word.partition("=")
        if key not in METADATA or not mark or not value:
            raise UserError(f"--meta {word!r}: expected KEY=VALUE with a key of {', '.join(METADATA)}; correct it")
        added[key] = _positive(word, value) if key in NUMBERS else value
    if not added:
        return collection
    merged = {id(image.metadata): added | dict(image.metadata) for image in collection.images}  # shared by many images
    return replace(
        collection, images=[replace(image, metadata=merged[id(image.metadata)]) for image in collection.images]
    )


def _positive(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(f"--meta {word!r}: expected a positive number; correct it")
    return number
