"""Which kinds of data `prepare` knows: those of this package and those that others add."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.sources.collection import METADATA, Collection, Source
from ray_pipeline.data.sources.fmd import list_fmd
from ray_pipeline.data.sources.sr_caco2 import list_sr_caco2
from ray_pipeline.errors import UserError
from ray_pipeline.plugins import SOURCES, load_plugin, plugin_names, plugin_version
from ray_pipeline.sections import PAIRED_TYPES

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


def list_images(kind: str, root: Path) -> Collection:
    """What the source of this kind lists below `root`; UserError for what it says, or does, wrong."""
    source = source_of(kind)
    if kind in RELEASES:
        return source(root)
    try:
        return checked(kind, source(root))
    except UserError:
        raise
    except Exception as error:  # whatever another package's function raises
        raise UserError(
            f"source {kind!r} of package {plugin_version(SOURCES, kind)} fails ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); correct its function"
        ) from error


def checked(kind: str, collection: object) -> Collection:
    """What another package's source returned; UserError where it is no collection whose partners have their images."""
    if not isinstance(collection, Collection):
        raise UserError(f"source {kind!r} returned {type(collection).__name__}, expected a Collection; correct it")
    for image in collection.images:
        wrong = {
            "a path that leaves its root": image.name.startswith("/") or ".." in image.name.split("/"),
            f"the split {image.split!r}": image.split not in (None, *SPLITS),
            f"the task {image.task!r}": image.pair is not None and image.task not in PAIRED_TYPES,
            f"metadata {', '.join(image.metadata)}": not set(image.metadata) <= set(METADATA),
        }
        found = [what for what, is_wrong in wrong.items() if is_wrong]
        if found:
            raise UserError(
                f"source {kind!r} gave {image.name} {found[0]}, expected a path below the root, a split of "
                f"{', '.join(SPLITS)}, a task of {', '.join(PAIRED_TYPES)} and metadata of {', '.join(METADATA)}; "
                "correct it"
            )
    foundation = {image.name for image in collection.images if image.pair is None}
    lost = [image.name for image in collection.images if image.pair is not None and image.pair not in foundation]
    names = [image.name for image in collection.images]
    if lost or len(set(names)) < len(names):
        what = f"{lost[0]} pairs with an image that it does not list" if lost else "a name stands twice"
        raise UserError(f"source {kind!r}: {what}; correct it")
    return collection
