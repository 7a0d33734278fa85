"""A split is by group, the same on every machine, and never against a published one."""

import pytest

from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.splits import count_images, degree, split_images
from ray_pipeline.errors import UserError


def images(names, dataset="cells", **fields):
    return [SourceImage(name, dataset, group=name, **fields) for name in names]


NAMES = [f"a/{i}.tif" for i in range(100)]


def test_the_split_depends_on_seed_and_group_alone():
    split = split_images(images(NAMES), 0.1, 0.05, seed=0)
    assert split == split_images(images(NAMES[::-1]), 0.1, 0.05, seed=0)
    assert split != split_images(images(NAMES), 0.1, 0.05, seed=1)
    assert [list(split.values()).count(s) for s in ("train", "val", "test")] == [85, 10, 5]
    renamed = [SourceImage(f"b/{name}", "cells", group=name) for name in NAMES]
    assert [split_images(renamed, 0.1, 0.05, seed=0)[f"b/{name}"] for name in NAMES] == [split[n] for n in NAMES]


def test_few_groups_leave_one_for_training():
    assert set(split_images(images(NAMES[:1]), 0.1, 0.1, seed=0).values()) == {"train"}
    assert sorted(split_images(images(NAMES[:2]), 0.1, 0.0, seed=0).values()) == ["train", "val"]
    assert sorted(split_images(images(NAMES[:3]), 0.1, 0.1, seed=0).values()) == ["test", "train", "val"]
    assert set(split_images(images(NAMES), 0.0, 0.0, seed=0).values()) == {"train"}
    with pytest.raises(UserError, match=r"--val-fraction 0\.6, --test-fraction 0\.3: found 3 images"):
        split_images(images(NAMES[:3]), 0.6, 0.3, seed=0)


def test_images_of_a_group_share_a_split():
    wells = [SourceImage(f"{well}_{field}", "cells", group=str(well)) for well in range(20) for field in range(5)]
    split = split_images(wells, 0.25, 0.1, seed=4)
    found = {well: {split[f"{well}_{field}"] for field in range(5)} for well in range(20)}
    assert sorted(len(splits) for splits in found.values()) == [1] * 20
    assert list(split.values()).count("val") == 25
    assert list(split.values()).count("test") == 10


def test_published_splits_are_kept_and_the_others_are_drawn_by_data_set():
    published = images(["t1", "t2"], split="test") + images(["v"], split="val")
    open_images = images(NAMES[:10]) + images(NAMES[:40], "other")
    by_name = split_images(published + images(NAMES[:10]), 0.1, 0.2, seed=0)
    assert [by_name[name] for name in ("t1", "t2", "v")] == ["test", "test", "val"]
    assert sorted(by_name[name] for name in NAMES[:10]).count("train") == 7
    with_other = split_images(
        published + [SourceImage(f"{i.dataset}/{i.name}", i.dataset, group=i.group) for i in open_images], 0.1, 0.2, 0
    )
    assert sorted(s for n, s in with_other.items() if n.startswith("other/")).count("train") == 28
    assert {n: with_other[f"cells/{n}"] for n in NAMES[:10]} == {n: by_name[n] for n in NAMES[:10]}


def test_counts_are_by_data_set_split_role_kind_and_degree():
    listed = [
        SourceImage("a", "cells", kind="nuclei"),
        SourceImage("a4", "cells", kind="nuclei", pair="a", task="super_resolution", scale=4),
        SourceImage("n1", "cells", kind="nuclei", pair="a", task="denoising", averages=2),
        SourceImage("n2", "cells", kind="nuclei", pair="a", task="denoising", averages=2),
    ]
    assert count_images(listed, {"a": "val"}) == {
        ("cells", "val", "foundation", "nuclei", ""): 1,
        ("cells", "val", "super_resolution", "nuclei", "x4"): 1,
        ("cells", "val", "denoising", "nuclei", "avg2"): 2,
    }


@pytest.mark.parametrize(
    ("scale", "averages", "words"),
    [(1, None, ""), (None, None, ""), (4, None, "x4"), (1, 1, "avg1"), (2, 8, "x2 avg8")],
)
def test_a_degree_says_scale_and_averages_where_there_are_any(scale, averages, words):
    assert degree(scale, averages) == words


def test_an_image_goes_with_the_published_split_of_its_group():
    field = [SourceImage(name, "cells", group="7") for name in ("a", "b")]
    published = [SourceImage("c", "cells", group="7", split="test")]
    others = images(NAMES)
    split = split_images([*field, *others, *published], 0.1, 0.0, seed=0)
    assert (split["a"], split["b"], split["c"]) == ("test", "test", "test")
    assert "test" not in {split[name] for name in NAMES}


def test_images_without_a_group_are_split_one_by_one():
    split = split_images([SourceImage(name, "cells") for name in NAMES], 0.1, 0.05, seed=0)
    assert [list(split.values()).count(s) for s in ("train", "val", "test")] == [85, 10, 5]


def test_every_kind_is_held_back():
    kinds = [SourceImage(f"{kind}/{n}", "cells", kind, group=f"{kind}/{n}") for kind in "abcdef" for n in range(19)]
    for seed in range(5):
        split = split_images(kinds, 0.1, 0.0, seed)
        held = [name[0] for name, to in split.items() if to == "val"]
        assert len(held) == 11
        assert set(held) == set("abcdef")
