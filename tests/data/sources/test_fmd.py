import os
from dataclasses import replace
from pathlib import Path

import pytest

from ray_pipeline.data.sources.collection import METADATA, Collection
from ray_pipeline.data.sources.fmd import TYPES, list_fmd
from ray_pipeline.errors import UserError

LEVELS = ("raw", "avg2", "avg4", "avg8", "avg16")


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def release(root: Path, kinds=("Confocal_FISH",), levels=LEVELS, fields=range(1, 21), captures=50) -> Path:
    """Empty files in the release's layout; capture names as the microscope's program wrote them."""
    for kind in kinds:
        for field in fields:
            touch(root / kind / "gt" / str(field) / "avg50.png")
            for level in levels:
                for n in range(captures):
                    touch(root / kind / level / str(field) / f"HV110_P0500510{n:03d}.png")
    return root


def pairs_are_foundations(listed: Collection) -> bool:
    by_name = {image.name: image for image in listed.images}
    partners = [image for image in listed.images if image.pair is not None]
    return all(
        by_name[p.pair].pair is None
        and (by_name[p.pair].kind, by_name[p.pair].group, by_name[p.pair].split) == (p.kind, p.group, p.split)
        for p in partners
    )


def test_a_whole_type_is_listed_with_pairs_and_published_test_field(tmp_path):
    listed = list_fmd(release(tmp_path))
    assert len(listed.images) == 20 * (1 + 5 * 50)
    assert listed.images == sorted(listed.images, key=lambda image: image.name)
    assert pairs_are_foundations(listed)
    by_name = {image.name: image for image in listed.images}
    truth = by_name["Confocal_FISH/gt/7/avg50.png"]
    assert (truth.pair, truth.task, truth.averages, truth.scale) == (None, "", 50, 1)
    for level, averages in zip(LEVELS, (1, 2, 4, 8, 16), strict=True):
        noisy = by_name[f"Confocal_FISH/{level}/7/HV110_P0500510003.png"]
        assert (noisy.pair, noisy.task, noisy.averages, noisy.scale) == (truth.name, "denoising", averages, 1)
    assert {image.split for image in listed.images if "/19/" in image.name} == {"test"}
    assert {image.split for image in listed.images if "/19/" not in image.name} == {None}
    assert listed.rejected == []
    assert len(listed.notes) == 1
    assert listed.notes[0].startswith("11 of 12 types are missing: Confocal_BPAE_R, ")


def test_stains_of_a_field_share_a_group_and_have_channels_of_their_own(tmp_path):
    kinds = [f"{instrument}_BPAE_{stain}" for instrument in ("Confocal", "WideField") for stain in "RGB"]
    listed = list_fmd(release(tmp_path, [*kinds, "TwoPhoton_MICE"], ("raw",), (6, 7), 1))
    groups = {image.kind: image.group for image in listed.images if "/7/" in image.name}
    assert {groups[f"Confocal_BPAE_{stain}"] for stain in "RGB"} == {"Confocal_BPAE/7"}
    assert {groups[f"WideField_BPAE_{stain}"] for stain in "RGB"} == {"WideField_BPAE/7"}
    assert groups["TwoPhoton_MICE"] == "TwoPhoton_MICE/7"
    channels = {image.kind: image.channel for image in listed.images}
    assert [channels[f"Confocal_BPAE_{stain}"] for stain in "RGB"] == [0, 1, 2]
    assert channels["TwoPhoton_MICE"] == 0


def test_metadata_is_shared_and_says_only_what_is_published(tmp_path):
    listed = list_fmd(release(tmp_path, TYPES, ("raw",), (1,), 1))
    told = {image.kind: image.metadata for image in listed.images}
    assert told["WideField_BPAE_G"] == {"modality": "wide-field", "specimen": "BPAE cells"}
    assert told["Confocal_FISH"] == {"modality": "confocal", "specimen": "zebrafish"}
    assert told["TwoPhoton_MICE"] == {"modality": "two-photon", "specimen": "mouse brain"}
    assert set().union(*told.values()) <= set(METADATA)
    assert len({id(image.metadata) for image in listed.images}) == len(TYPES) == 12


def test_the_folder_above_gives_the_same_listing(tmp_path):
    release(tmp_path / "dataset", ("Confocal_MICE",), ("raw",), (1, 19), 2)
    (tmp_path / "other").mkdir()
    assert list_fmd(tmp_path) == list_fmd(tmp_path / "dataset")


def test_two_folders_with_types_are_refused_rather_than_one_left_out(tmp_path):
    release(tmp_path / "a", ("Confocal_MICE",), ("raw",), (1,), 1)
    release(tmp_path / "b", ("TwoPhoton_MICE",), ("raw",), (1,), 1)
    with pytest.raises(UserError, match="found types in a, b, expected one folder"):
        list_fmd(tmp_path)


def test_test_mix_is_left_out_and_counted(tmp_path):
    release(tmp_path, levels=("raw",), fields=(19,), captures=3)
    before = list_fmd(tmp_path)
    for folder in ("gt", "raw", "avg2"):
        touch(tmp_path / "test_mix" / folder / "Confocal_FISH_1.png")
    listed = list_fmd(tmp_path)
    assert listed.images == before.images
    assert listed.ignored == before.ignored + 3
    assert listed.notes[:-1] == before.notes
    assert listed.notes[-1] == "test_mix: 3 files left out, copies of captures of field 19."


def test_a_partial_download_says_what_is_missing(tmp_path):
    release(tmp_path, levels=("raw", "avg2"), fields=(1, 2, 19))
    for n in range(4):
        (tmp_path / "Confocal_FISH/raw/2" / f"HV110_P0500510{n:03d}.png").unlink()
    listed = list_fmd(tmp_path)
    fields = ", ".join(str(field) for field in range(3, 21) if field != 19)
    assert listed.notes[1:] == [
        f"Confocal_FISH/gt: no images of fields {fields}.",
        f"Confocal_FISH/raw: no images of fields {fields}.",
        "Confocal_FISH/raw: fewer than 50 captures of fields 2 (46).",
        f"Confocal_FISH/avg2: no images of fields {fields}.",
        "Confocal_FISH/avg4: no images.",
        "Confocal_FISH/avg8: no images.",
        "Confocal_FISH/avg16: no images.",
    ]
    assert len(listed.images) == 3 * 101 - 4


def test_captures_without_ground_truth_are_left_aside_with_a_note(tmp_path):
    release(tmp_path, levels=("raw",), fields=(1, 2), captures=1)
    (tmp_path / "Confocal_FISH/gt/2/avg50.png").unlink()
    listed = list_fmd(tmp_path)
    assert listed.rejected == []
    assert listed.ignored == 1
    assert any("1 captures of 1 fields left aside" in n and "Confocal_FISH/gt/2/avg50.png" in n for n in listed.notes)
    assert pairs_are_foundations(listed)


def test_images_out_of_place_are_rejected_and_other_files_counted(tmp_path):
    release(tmp_path, levels=("raw",), fields=(1,), captures=1)
    odd = ("raw/21/a.png", "raw/0/a.png", "raw/1/a.tif", "gt/1/avg49.png", "raw/a.png", "avg3/1/a.png")
    for name in odd:
        touch(tmp_path / "Confocal_FISH" / name)
    for name in ("Confocal_FISH/raw/1/.a.png", "Confocal_FISH/readme.txt", "Confocal_FISH.tar"):
        touch(tmp_path / name)
    touch(tmp_path / "Confocal_FISH/.cache/1/a.png")
    listed = list_fmd(tmp_path)
    assert [name for name, _ in listed.rejected] == sorted(f"Confocal_FISH/{name}" for name in odd)
    assert all("does not fit the release's layout" in reason for _, reason in listed.rejected)
    assert len(listed.images) == 2
    assert listed.ignored == 3


def test_links_out_of_the_root_are_rejected_and_links_inside_kept(tmp_path):
    root = release(tmp_path / "root", levels=("raw",), fields=(1,), captures=1)
    touch(tmp_path / "elsewhere/a.png")
    os.symlink(tmp_path / "elsewhere/a.png", root / "Confocal_FISH/raw/1/out.png")
    os.symlink(root / "Confocal_FISH/raw/1/nowhere", root / "Confocal_FISH/raw/1/broken.png")
    os.symlink(root / "Confocal_FISH/raw/1/HV110_P0500510000.png", root / "Confocal_FISH/raw/1/in.png")
    os.symlink(tmp_path / "elsewhere", root / "Confocal_FISH/raw/2")
    os.symlink(tmp_path / "elsewhere", root / "Confocal_MICE")
    listed = list_fmd(root)
    assert [name for name, _ in listed.rejected] == [
        "Confocal_FISH/raw/1/broken.png",
        "Confocal_FISH/raw/1/out.png",
        "Confocal_FISH/raw/2",
        "Confocal_MICE",
    ]
    assert "Confocal_FISH/raw/1/in.png" in {image.name for image in listed.images}


def test_a_folder_without_the_release_is_refused_in_words(tmp_path):
    touch(tmp_path / "holiday.png")
    with pytest.raises(UserError, match=r"found holiday.png, expected .*<type>/gt/<field>/avg50.png"):
        list_fmd(tmp_path)
    with pytest.raises(UserError, match="found no files, expected"):
        list_fmd(tmp_path / "missing")
    release(tmp_path, levels=("raw",), fields=(1,), captures=1)
    (tmp_path / "Confocal_FISH/gt/1/avg50.png").unlink()
    with pytest.raises(UserError, match="found no ground truth"):
        list_fmd(tmp_path)


def test_the_order_of_files_on_disk_does_not_matter(tmp_path):
    release(tmp_path / "a", levels=("raw", "avg2"), fields=(3, 1, 2), captures=2)
    release(tmp_path / "b", levels=("avg2", "raw"), fields=(1, 2, 3), captures=2)
    assert replace(list_fmd(tmp_path / "a"), root=tmp_path) == replace(list_fmd(tmp_path / "b"), root=tmp_path)
