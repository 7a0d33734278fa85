"""A folder is listed whole: images, groups and pairs by path, links and other formats by name; no pixel is read."""

import re

import pytest

from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.folder import list_folder, partner_rule
from ray_pipeline.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_every_image_is_listed_and_every_other_file_counted(tmp_path):
    names = ["A01/f1.TIF", "A01/f2.tiff", "b.PNG", "c.npy", "d.npz", "photo.jpg", "raw.czi"]
    touch(tmp_path, *names, "README.md", "A01/Thumbs.db", ".hidden.tif", ".cache/e.tif")
    touch(tmp_path, "plate.ome.zarr/0/0.0", "plate.ome.zarr/inner.tif")
    listed = list_folder(tmp_path, dataset="cells", metadata={"marker": "DAPI"})
    assert [image.name for image in listed.images] == [*names[:5], "photo.jpg", "plate.ome.zarr", "raw.czi"]
    assert listed.images[0] == SourceImage(names[0], "cells", group=names[0], metadata={"marker": "DAPI"})
    assert len({id(image.metadata) for image in listed.images}) == 1
    assert (listed.rejected, listed.ignored, listed.root) == ([], 3, tmp_path)


def test_links_out_of_the_folder_are_rejected_and_links_inside_kept(tmp_path):
    root, far = touch(tmp_path / "in", "a.tif"), touch(tmp_path / "far", "x.tif", "z.zarr/0")
    (root / "far.tif").symlink_to(far / "x.tif")
    (root / "folder").symlink_to(far)
    (root / "z.zarr").symlink_to(far / "z.zarr")
    (root / "b.tif").symlink_to(root / "a.tif")
    listed = list_folder(root, dataset="cells")
    assert [image.name for image in listed.images] == ["a.tif", "b.tif"]
    assert [name for name, _ in listed.rejected] == ["far.tif", "folder", "z.zarr"]
    assert all(f"a link to {far}" in reason for _, reason in listed.rejected)


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        (r"(w\d+)_", ["w1", "w1", "w22"]),
        (r"w\d+", ["w1", "w1", "w22"]),
        (r"_(?:f)(\d)", ["1", "2", "1"]),
        (None, ["w1_f1.tif", "w1_f2.tif", "w22_f1.tif"]),
    ],
)
def test_groups_are_what_the_pattern_finds(tmp_path, pattern, groups):
    touch(tmp_path, "w1_f1.tif", "w1_f2.tif", "w22_f1.tif")
    listed = list_folder(tmp_path, dataset="cells", group=None if pattern is None else re.compile(pattern))
    assert [image.group for image in listed.images] == groups


def test_an_image_without_a_group_is_named(tmp_path):
    touch(tmp_path, "w1_f1.tif", "overview.tif")
    with pytest.raises(UserError, match=r"--group 'w.0-9.' finds nothing in overview\.tif"):
        list_folder(tmp_path, dataset="cells", group=re.compile(r"w[0-9]"))


def test_partners_are_paired_by_path_with_task_scale_and_averages(tmp_path):
    names = ["clean/a.tif", "clean/b.tif", "low/a_x4.tif"]
    names += [f"noisy{n}/{image}_{k}.tif" for n in (1, 16) for image in "ab" for k in range(3)]
    touch(tmp_path, *names)
    rules = [
        partner_rule("denoising", r"noisy(?P<averages>\d+)/(?P<image>.)_\d\.tif", r"clean/\g<image>.tif"),
        partner_rule("super_resolution", r"low/(.*)_x\d\.tif", r"clean/\1.tif"),
    ]
    listed = list_folder(tmp_path, dataset="cells", partners=rules)
    by_name = {image.name: image for image in listed.images}
    assert sorted(by_name) == sorted(names)
    assert listed.rejected == []
    for name, image in by_name.items():
        found = (image.pair, image.task, image.scale, image.averages)
        if name.startswith("noisy"):
            assert found == (f"clean/{name.split('/')[1][0]}.tif", "denoising", 1, 16 if "16" in name else 1)
        elif name.startswith("low"):
            assert found == ("clean/a.tif", "super_resolution", None, None)
        else:
            assert found == (None, "", 1, None)


def test_partners_without_their_image_are_rejected_by_name(tmp_path):
    touch(tmp_path, "a.tif", "a_noisy.tif", "b_noisy.tif", "a_noisy_noisy.tif")
    rule = partner_rule("denoising", r"(.*)_noisy\.tif", r"\1.tif")
    listed = list_folder(tmp_path, dataset="cells", partners=[rule])
    assert [image.name for image in listed.images] == ["a.tif", "a_noisy.tif"]
    assert listed.rejected == [
        ("a_noisy_noisy.tif", "its foundation image a_noisy.tif is not there"),
        ("b_noisy.tif", "its foundation image b.tif is not there"),
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("sharpening", "(.*)", r"\1"), "--partners sharpening: expected super_resolution or denoising"),
        (("denoising", "noisy/(.*", r"\1"), r"--partners 'noisy/\(\.\*' is no regular expression"),
        (("denoising", "noisy/(.*)", r"clean/\2"), r"--partners: 'clean/..2' does not fit the groups of 'noisy/"),
        (("denoising", "noisy/(.*)", r"clean/\g<well>"), "does not fit the groups of"),
        (("denoising", "noise/(.*)", r"clean/\1"), r"no image of .* has such a path, such as clean/a\.tif"),
        (("denoising", "noisy", "clean"), "must match all of the path"),
        (("denoising", r"noisy/(?P<averages>\w)(.*)", r"clean/\1\2"), "averages holds 'a' in noisy/a.tif, expected"),
        (("denoising", r"noisy/(?P<averages>0)_(.*)", r"clean/\2"), "averages holds '0'"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_meant_are_refused(tmp_path, words, found):
    touch(tmp_path, "clean/a.tif", "noisy/a.tif", "noisy/0_a.tif")
    with pytest.raises(UserError, match=found):
        list_folder(tmp_path, dataset="cells", partners=[partner_rule(*words)])


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    touch(tmp_path, "a.tif")
    for path in (tmp_path / "nowhere", tmp_path / "a.tif"):
        with pytest.raises(UserError, match="no such folder, expected one with images"):
            list_folder(path, dataset="cells")
