"""Which images train and which are held back, by groups, and how many there are of each."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.errors import UserError

#: (data set, split, role, kind, scale or averages) -> how many
Counts = Counter[tuple[str, str, str, str, str]]


def split_images(images: Iterable[SourceImage], val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """Foundation images -> {name: train | val | test}: as published, the others by rank of sha256(seed, group).

    An image without a group is one of its own; one of a group with a published split goes with it.
    Of n groups of a data set without a published split round(fraction * n) each, at least one where the fraction is
    above 0 and n >= 2 (test: n >= 3); a single group trains. UserError when none is left for training.
    """
    images = list(images)
    split_of, open_groups = {}, defaultdict(lambda: defaultdict(list))
    published = {(image.dataset, image.group): image.split for image in images if image.split and image.group}
    kinds: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for image in images:
        kinds[image.dataset][image.group or image.name].add(image.kind)
        split = image.split or published.get((image.dataset, image.group))
        if split is None:
            open_groups[image.dataset][image.group or image.name].append(image.name)
        else:
            split_of[image.name] = split
    for dataset, groups in open_groups.items():
        n = len(groups)
        val = max(round(val_fraction * n), 1) if val_fraction > 0 and n >= 2 else 0
        test = max(round(test_fraction * n), 1) if test_fraction > 0 and n >= 3 else 0
        if val + test >= n:
            raise UserError(
                f"--val-fraction {val_fraction}, --test-fraction {test_fraction}: found {n} images "
                f"or groups of them in {dataset}, expected at least one for training beside {val} + {test}; lower them."
            )
        for rank, group in enumerate(_ranked(groups, kinds[dataset], seed)):
            split = "val" if rank < val else "test" if rank < val + test else "train"
            split_of |= dict.fromkeys(groups[group], split)
    return split_of


def _ranked(groups: Iterable[str], kinds: dict[str, set[str]], seed: int) -> list[str]:
    """Groups by the hash of seed and name, in turn from those of each set of kinds, so that every kind is held back."""
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    digests = {group: hashlib.sha256(f"{seed}/{group}".encode()).digest() for group in groups}
    for group in sorted(digests, key=digests.get):
        strata[tuple(sorted(kinds[group]))].append(group)
    places = {
        group: ((place + 0.5) / len(members), digests[group])
        for members in strata.values()
        for place, group in enumerate(members)
    }
    return sorted(places, key=places.get)


def count_images(images: Iterable[SourceImage], split_of: dict[str, str]) -> Counts:
    """How many images there are of each data set, split, role, kind and scale or averages."""
    counts: Counts = Counter()
    for image in images:
        split = split_of[image.pair or image.name]
        counts[image.dataset, split, image.task or "foundation", image.kind, degree(image.scale, image.averages)] += 1
    return counts


def degree(scale: int | None, averages: int | None) -> str:
    """Scale and averages in words, empty where there is nothing to say."""
    return " ".join([f"x{scale}"] * (scale not in (1, None)) + [f"avg{averages}"] * (averages is not None))
