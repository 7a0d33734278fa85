"""Which kinds of data `prepare` knows: those of this package and those that others add."""

from __future__ import annotations

from ray_pipeline.data.sources.collection import Collection, Source
from ray_pipeline.data.sources.fmd import list_fmd
from ray_pipeline.data.sources.sr_caco2 import list_sr_caco2
from ray_pipeline.errors import UserError
from ray_pipeline.plugins import SOURCES, load_plugin, plugin_names, plugin_version

#: releases whose layout is known; a folder of images is sources/folder.py
RELEASES: dict[str, Source] = {"sr-caco2": list_sr_caco2, "fmd": list_fmd}
FOLDER = "folder"


def known_kinds() -> tuple[str, ...]:
    """Names that `prepare` takes, this package's own first."""
    own = (*RELEASES, FOLDER)
    return (*own, *(name for name in plugin_names(SOURCES) if name not in own))


def source_of(kind: str) -> Source:
    """The function that lists a release's images; UserError for an unknown one, or one whose package does not load."""
    if kind in (*RELEASES, FOLDER) and kind in plugin_names(SOURCES):
        raise UserError(
            f"{SOURCES} {kind!r} of package {plugin_version(SOURCES, kind)} has the name of a source of ray-pipeline; "
            "rename it there, or uninstall that package"
        )
    return RELEASES[kind] if kind in RELEASES else load_plugin(SOURCES, kind)


def checked(kind: str, collection: object) -> Collection:
    """What another package's source returned; UserError where it is no collection whose partners have their images."""
    if not isinstance(collection, Collection):
        raise UserError(f"source {kind!r} returned {type(collection).__name__}, expected a Collection; correct it")
    foundation = {image.name for image in collection.images if image.pair is None}
    lost = [image.name for image in collection.images if image.pair is not None and image.pair not in foundation]
    names = [image.name for image in collection.images]
    if lost or len(set(names)) < len(names):
        what = f"{lost[0]} pairs with an image that it does not list" if lost else "a name stands twice"
        raise UserError(f"source {kind!r}: {what}; correct it")
    return collection
