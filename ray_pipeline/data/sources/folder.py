"""A folder of microscope images: what lies in it, which images pair, which belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_pipeline.data.images import IMAGE_SUFFIXES, is_zarr
from ray_pipeline.data.sources.collection import Collection, SourceImage
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

#: image formats that are not read: a person expects them in the result, so they are rejected, not ignored
OTHER_IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".jp2", ".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".oir",
    ".ims", ".dv", ".stk", ".vsi", ".svs", ".mrc",
)  # fmt: skip


@dataclass(frozen=True)
class PartnerRule:
    """Images whose path matches `pattern` as a whole are partners for `task`; `foundation`, filled in with the
    pattern's groups, is the path of the image that each belongs to. A group named averages says how many captures."""

    task: str
    pattern: re.Pattern
    foundation: str


def partner_rule(task: str, pattern: str, foundation: str) -> PartnerRule:
    """A rule from what was typed; UserError for another task, a pattern or a template that is none."""
    if task not in PAIRED_TYPES:
        raise UserError(f"--partners {task}: expected {' or '.join(PAIRED_TYPES)}; correct it.")
    compiled = compiled_pattern("--partners", pattern)
    try:
        re.compile(pattern + "|").fullmatch("").expand(foundation)
    except (re.error, IndexError) as error:
        raise UserError(f"--partners: {foundation!r} does not fit the groups of {pattern!r} ({error}).") from None
    return PartnerRule(task, compiled, foundation)


def compiled_pattern(option: str, pattern: str) -> re.Pattern:
    """A regular expression; UserError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option} {pattern!r} is no regular expression ({error}); correct it.") from None


def list_folder(
    root: Path,
    *,
    dataset: str,
    group: re.Pattern | None = None,
    partners: Sequence[PartnerRule] = (),
    metadata: Mapping[str, str | float] | None = None,
) -> Collection:
    """Every image below `root`, one data set.

    group: what the pattern finds in an image's path (its first group, if it has one) names the well, slide or field;
    without it every image is a group of its own. UserError: no folder, an image in which the pattern finds nothing.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder, expected one with images; correct the path.")
    names, rejected, ignored = list_files(root)
    known, present, images = dict(metadata or {}), set(names), []
    for name in names:
        rule, match = next(((r, m) for r in partners if (m := r.pattern.fullmatch(name))), (None, None))
        image = SourceImage(name, dataset, group=_group(group, name), metadata=known)
        if rule is None:
            images.append(image)
            continue
        foundation = match.expand(rule.foundation)
        if foundation not in present or any(r.pattern.fullmatch(foundation) for r in partners):
            rejected.append((name, f"its foundation image {foundation} is not there"))
            continue
        captures = _captures(rule, match)
        images.append(
            SourceImage(
                name, dataset, group=image.group, pair=foundation, task=rule.task, averages=captures, metadata=known,
                scale=1 if rule.task == "denoising" else None,
            )
        )  # fmt: skip
    for rule in partners:
        if not any(rule.pattern.fullmatch(name) for name in names):
            raise UserError(
                f"--partners {rule.task} {rule.pattern.pattern!r}: no image of {root} has such a path, such as "
                f"{names[0] if names else 'none'}; correct the pattern, which must match all of the path."
            )
    return Collection(root, images, rejected, ignored=ignored)


def list_files(root: Path) -> tuple[list[str], list[tuple[str, str]], int]:
    """Files below `root` -> image names (relative, sorted), rejected links (name, reason), others' count.

    Hidden files count as others, hidden folders are not entered; an OME-Zarr folder is one image. Linked folders, and
    linked images from outside `root`, are rejected.
    """
    names, rejected, others = [], [], 0
    resolved = root.resolve()
    for folder, folders, files in os.walk(root):
        links = [f for f in folders if Path(folder, f).is_symlink()]
        zarrs = [f for f in folders if is_zarr(f) and f not in links]
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in zarrs)
        for file in files + links + zarrs:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            is_image = path.suffix.lower() in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES or file in zarrs
            if file.startswith(".") or (not is_image and file not in links):
                others += 1
            elif not _is_utf8(name):
                rejected.append((name, "its name is not UTF-8; rename it"))
            elif file in links or not path.resolve().is_relative_to(resolved):
                rejected.append((name, f"a link to {path.resolve()}, expected a file in the folder; copy it there"))
            else:
                names.append(name)
    return sorted(names), sorted(rejected), others


def _captures(rule: PartnerRule, match: re.Match) -> int | None:
    averages = match.groupdict().get("averages")
    if not averages:
        return None
    if not averages.isdecimal() or int(averages) == 0:
        raise UserError(
            f"--partners {rule.task} {rule.pattern.pattern!r}: the group averages holds {averages!r} in "
            f"{match.string}, expected a number of captures; correct the pattern."
        )
    return int(averages)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _group(pattern: re.Pattern | None, name: str) -> str:
    if pattern is None:
        return name
    found = pattern.search(name)
    if found is None:
        raise UserError(
            f"--group {pattern.pattern!r} finds nothing in {name}; correct it so that each image has a group."
        )
    return found.group(1) if pattern.groups else found.group(0)
