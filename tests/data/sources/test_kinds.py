"""Kinds of data from other installed packages are found by name, checked, and refused in words."""

import sys

import pytest

from ray_pipeline.data.sources.fmd import list_fmd
from ray_pipeline.data.sources.kinds import known_kinds, list_images, source_of
from ray_pipeline.errors import UserError

MODULE = """
from ray_pipeline.data.sources.collection import Collection, SourceImage

A = SourceImage("a.tif", "plates")

def list_plates(root):
    return Collection(root, [A, SourceImage("n.tif", "plates", pair="a.tif", task="denoising")])

def list_orphans(root):
    return Collection(root, [A, SourceImage("n.tif", "plates", pair="b.tif", task="denoising")])

def list_twice(root):
    return Collection(root, [SourceImage("a.tif", "plates"), SourceImage("a.tif", "plates")])

def list_far(root):
    return Collection(root, [SourceImage("../a.tif", "plates")])

def list_other_split(root):
    return Collection(root, [SourceImage("a.tif", "plates", split="training")])

def list_other_task(root):
    return Collection(root, [A, SourceImage("n.tif", "plates", pair="a.tif", task="noise")])

def list_other_metadata(root):
    return Collection(root, [SourceImage("a.tif", "plates", metadata={"gain": 3})])

def fails(root):
    raise KeyError("oops")

def list_names(root):
    return ["a.tif"]

nothing = 7
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(package, {name: object}): a package on the path that offers sources; its module is all_plates."""
    (tmp_path / "all_plates.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "all_plates", raising=False)

    def write(package, sources):
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {target}" for name, target in sources.items()]
        (info / "entry_points.txt").write_text("[ray_pipeline.sources]\n" + "\n".join(lines) + "\n")

    return write


def test_a_kind_of_another_package_is_known_and_lists_its_images(install, tmp_path):
    assert known_kinds()[:3] == ("sr-caco2", "fmd", "folder")
    install("plates", {"plates": "all_plates:list_plates"})
    assert known_kinds()[-1] == "plates"
    collection = list_images("plates", tmp_path)
    assert [image.name for image in collection.images] == ["a.tif", "n.tif"]
    assert source_of("fmd") is list_fmd


@pytest.mark.parametrize(
    ("name", "target", "found"),
    [
        ("fmd", "all_plates:list_plates", r"'fmd' of package plates 1\.2 has the name of a source of ray-pipeline"),
        ("folder", "all_plates:list_plates", r"'folder' of package plates 1\.2 has the name of a source"),
        ("plates", "all_plates:gone", r"'plates' of package plates 1\.2 cannot be loaded from all_plates:gone"),
        ("plates", "no_such_module:x", r"cannot be loaded from no_such_module:x \(ModuleNotFoundError"),
        ("plates", "all_plates:nothing", r"all_plates:nothing of package plates 1\.2 is no function"),
        ("other", "all_plates:list_plates", r"no installed package offers 'plates'.*found .*other.*install it"),
    ],
)
def test_a_kind_that_cannot_be_used_is_refused_in_words(install, name, target, found):
    install("plates", {name: target})
    with pytest.raises(UserError, match=found):
        source_of(name if name in ("fmd", "folder") else "plates")


def test_a_kind_that_two_packages_offer_is_refused(install):
    install("plates", {"plates": "all_plates:list_plates"})
    install("wells", {"plates": "all_plates:list_twice"})
    with pytest.raises(UserError, match=r"'plates' is offered by plates 1\.2 and wells 1\.2; uninstall one"):
        source_of("plates")


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("list_orphans", r"source 'plates': n\.tif pairs with an image that it does not list"),
        ("list_twice", "source 'plates': a name stands twice"),
        ("list_far", r"source 'plates' gave \.\./a\.tif a path that leaves its root"),
        ("list_other_split", r"source 'plates' gave a\.tif the split 'training'"),
        ("list_other_task", r"source 'plates' gave n\.tif the task 'noise'"),
        ("list_other_metadata", r"source 'plates' gave a\.tif metadata gain"),
        ("fails", r"source 'plates' of package plates 1\.2 fails \(KeyError: 'oops'\); correct its function"),
        ("list_names", "source 'plates' returned list, expected a Collection"),
    ],
)
def test_a_collection_that_contradicts_itself_is_refused(install, tmp_path, target, found):
    install("plates", {"plates": f"all_plates:{target}"})
    with pytest.raises(UserError, match=found):
        list_images("plates", tmp_path)
