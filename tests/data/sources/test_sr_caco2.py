import os
from pathlib import Path

import pytest

from ray_pipeline.data.sources.collection import METADATA
from ray_pipeline.data.sources.sr_caco2 import list_sr_caco2
from ray_pipeline.errors import UserError

FOLDERS = {1: "HighRes1024", 2: "LowRes512", 4: "LowRes256", 8: "LowRes128"}
SIZES = {2: 256, 4: 128, 8: 64}
CELLS = ("CELL0", "CELL1", "CELL2")
# As published, with the numbers of the tiles written out.
TRAIN = (1, 2, 3, 4, 5, 6, 8, 12, 13, 15, 16, 17, 18, 21, 22)
VAL = (7, 11, 19)
TEST = (9, 10, 14, 20)


def name_of(scale, tile, number=3, row=768, column=1280, cell="CELL0"):
    corners = "_".join(str(x // scale) for x in (row, row + 640, column, column + 640))
    return f"hr_div_{scale}/tile_{FOLDERS[scale]}-{tile}_{number}_{corners}_{cell}.tif"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def release(base: Path, tiles=(*TRAIN, *VAL, *TEST), scales=(1, 2, 4, 8), cells=CELLS) -> Path:
    for tile in tiles:
        for scale in scales:
            for cell in cells:
                touch(base / name_of(scale, tile, cell=cell))
    return base


def write_lists(root: Path, split: str, scale: int, tiles, cell="CELL0", orders=("l_h", "h_l")) -> Path:
    folder = root / f"folds/super-resolution/caco2_{split}_X_{scale}_in_{SIZES[scale]}_out_512_cell_{cell}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(name_of(scale, tile, cell=cell), name_of(1, tile, cell=cell)) for tile in tiles]
    for order in orders:
        lines = [",".join(pair if order == "l_h" else pair[::-1]) for pair in pairs]
        (folder / f"{order}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_names_of_the_released_fold_lists_are_paired(tmp_path):
    """Two lines of the lists in github.com/sbelharbi/sr-caco-2, folds.zip."""
    lines = (
        "hr_div_4/tile_LowRes256-19_315_1792_1952_1472_1632_CELL1.tif,"
        "hr_div_1/tile_HighRes1024-19_315_7168_7808_5888_6528_CELL1.tif",
        "hr_div_8/tile_LowRes128-20_359_832_912_32_112_CELL0.tif,"
        "hr_div_1/tile_HighRes1024-20_359_6656_7296_256_896_CELL0.tif",
    )
    for line in lines:
        for name in line.split(","):
            touch(tmp_path / name)
    listed = list_sr_caco2(tmp_path)
    partners = {image.name: image for image in listed.images if image.pair}
    assert {f"{image.name},{image.pair}" for image in partners.values()} == set(lines)
    assert [(p.split, p.scale, p.kind, p.channel, p.group) for _, p in sorted(partners.items())] == [
        ("val", 4, "CELL1", 1, "tile_19"),
        ("test", 8, "CELL0", 0, "tile_20"),
    ]


def test_a_release_is_split_by_tile_and_every_partner_has_its_patch(tmp_path):
    listed = list_sr_caco2(release(tmp_path))
    by_name = {image.name: image for image in listed.images}
    assert list(by_name) == sorted(by_name)
    assert len(by_name) == 22 * 4 * 3
    for image in listed.images:
        tile = int(image.group.removeprefix("tile_"))
        assert image.split == ("train" if tile in TRAIN else "val" if tile in VAL else "test")
        assert image.name == name_of(image.scale, tile, cell=image.kind)
        if image.name.startswith("hr_div_1/"):
            assert (image.pair, image.task, image.scale) == (None, "", 1)
        else:
            assert (image.pair, image.task) == (name_of(1, tile, cell=image.kind), "super_resolution")
            assert by_name[image.pair].pair is None
    assert (listed.rejected, listed.ignored) == ([], 0)


def test_metadata_is_shared_and_says_only_what_is_published(tmp_path):
    listed = list_sr_caco2(release(tmp_path, tiles=(1, 7)))
    told = {image.kind: image.metadata for image in listed.images}
    assert told["CELL0"] == {"modality": "confocal", "specimen": "Caco-2", "marker": "survivin"}
    assert "E-cadherin" in told["CELL1"]["marker"]
    assert "H2B" in told["CELL2"]["marker"]
    assert set().union(*told.values()) <= set(METADATA)
    assert len({id(image.metadata) for image in listed.images}) == 3


def test_the_download_folder_and_caco2_in_it_give_the_same_images(tmp_path):
    release(tmp_path / "caco2", tiles=(1, 7))
    touch(tmp_path / "caco2-tiles/all-tiles/HighRes1024/HighRes1024-1.tif")
    assert list_sr_caco2(tmp_path) == list_sr_caco2(tmp_path / "caco2")


def test_fold_lists_decide_the_split(tmp_path):
    release(tmp_path / "caco2", tiles=(1, 7), scales=(1, 2), cells=("CELL0", "CELL1"))
    write_lists(tmp_path, "test", 2, (1,))
    write_lists(tmp_path, "train", 2, (7,), orders=("h_l",))
    listed = list_sr_caco2(tmp_path)
    # CELL1 has no lists: its patches follow the same tiles, or a tile would stand in two splits.
    assert {(image.group, image.split) for image in listed.images} == {("tile_1", "test"), ("tile_7", "train")}
    assert len(listed.images) == 8
    assert listed.rejected == []


def test_patches_that_no_list_of_their_cell_and_scale_names_are_rejected(tmp_path):
    release(tmp_path, tiles=(1, 7, 9, 8), cells=("CELL0", "CELL1"))
    for split, tile in (("train", 1), ("val", 7), ("test", 9)):
        write_lists(tmp_path, split, 2, (tile,))
    listed = list_sr_caco2(tmp_path)
    reasons = dict(listed.rejected)
    assert set(reasons) == {name_of(scale, 8) for scale in FOLDERS}
    assert "named by none of the fold lists for CELL0" in reasons[name_of(1, 8)]
    assert "named by none of the fold lists for CELL0" in reasons[name_of(2, 8)]
    assert "is rejected" in reasons[name_of(4, 8)]


def test_lists_of_one_split_leave_the_others_to_the_published_one(tmp_path):
    release(tmp_path, tiles=(1, 7, 9), cells=("CELL0",))
    write_lists(tmp_path, "train", 2, (1,))
    listed = list_sr_caco2(tmp_path)
    assert listed.rejected == []
    assert {image.group: image.split for image in listed.images} == {
        "tile_1": "train",
        "tile_7": "val",
        "tile_9": "test",
    }


def test_both_orders_of_a_list_are_read(tmp_path):
    release(tmp_path, tiles=(1,), cells=("CELL0",))
    lists = write_lists(tmp_path, "train", 2, (1,))
    (lists / "h_l.txt").write_text((lists / "l_h.txt").read_text())
    assert list_sr_caco2(tmp_path).rejected == []


def test_files_of_a_list_that_are_not_there_are_noted(tmp_path):
    release(tmp_path, tiles=(1,), scales=(1, 2))
    write_lists(tmp_path, "train", 2, (1, 2, 3))
    notes = list_sr_caco2(tmp_path).notes
    assert f"hr_div_2: 2 CELL0 patches that fold lists name are missing, such as {name_of(2, 2)}." in notes
    assert f"hr_div_1: 2 CELL0 patches that fold lists name are missing, such as {name_of(1, 2)}." in notes


def test_a_tile_in_two_splits_is_refused_with_file_and_line(tmp_path):
    release(tmp_path, tiles=(1, 2))
    first = write_lists(tmp_path, "test", 4, (2, 1))
    second = write_lists(tmp_path, "train", 4, (3, 1))
    with pytest.raises(UserError, match="found tile 1 in train, expected test") as error:
        list_sr_caco2(tmp_path)
    assert f"{second}/l_h.txt: line 2" in str(error.value)
    assert f"{first}/l_h.txt: line 2" in str(error.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"{name_of(2, 1)}", "expected low,high"),
        (f"{name_of(2, 1)},{name_of(1, 1)}", "again, as in line 1"),
        (f"{name_of(2, 5)},{name_of(1, 6)}", "one CELL0 patch in hr_div_2"),
        (f"{name_of(2, 5)},{name_of(1, 5, row=0)}", "one CELL0 patch in hr_div_2"),
        (f"{name_of(4, 5)},{name_of(1, 5)}", "one CELL0 patch in hr_div_2"),
        (f"{name_of(2, 5, cell='CELL1')},{name_of(1, 5, cell='CELL1')}", "one CELL0 patch in hr_div_2"),
    ],
)
def test_a_wrong_line_of_a_list_is_refused_with_file_and_line(tmp_path, line, found):
    release(tmp_path, tiles=(1,))
    path = write_lists(tmp_path, "train", 2, (1,), orders=("l_h",)) / "l_h.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=found) as error:
        list_sr_caco2(tmp_path)
    assert str(error.value).startswith(f"{path}: line 2: ")


def test_lists_of_one_folder_that_disagree_are_refused(tmp_path):
    release(tmp_path, tiles=(1, 2))
    folder = write_lists(tmp_path, "train", 2, (1, 2))
    write_lists(tmp_path, "train", 2, (1,), orders=("h_l",))
    with pytest.raises(UserError, match="the other list beside it does not say") as error:
        list_sr_caco2(tmp_path)
    assert str(error.value).startswith(f"{folder}/l_h.txt: line 2: ")


def test_a_partial_download_says_what_is_missing(tmp_path):
    release(tmp_path, tiles=(1, 7), scales=(1, 4), cells=("CELL0", "CELL2"))
    touch(tmp_path / name_of(1, 2))
    few = "1 of 1,117 val, 0 of 1,471 test."
    assert list_sr_caco2(tmp_path).notes == [
        f"hr_div_1: CELL0 patches: 2 of 7,349 train, {few}",
        "hr_div_1: CELL1 patches: none.",
        f"hr_div_1: CELL2 patches: 1 of 7,349 train, {few}",
        "hr_div_2: no patches, the release has 29,811.",
        f"hr_div_4: CELL0 patches: 1 of 7,349 train, {few}",
        "hr_div_4: CELL1 patches: none.",
        f"hr_div_4: CELL2 patches: 1 of 7,349 train, {few}",
        "hr_div_8: no patches, the release has 29,811.",
    ]


def test_a_patch_without_its_high_resolution_patch_is_left_aside_with_a_note(tmp_path):
    release(tmp_path, tiles=(1,), cells=("CELL0",))
    touch(tmp_path / name_of(2, 1, number=4, row=1152))
    listed = list_sr_caco2(tmp_path)
    assert listed.rejected == []
    assert name_of(2, 1, number=4, row=1152) not in {image.name for image in listed.images}
    assert "hr_div_2: 1 patches left aside, whose hr_div_1 patch is not here." in listed.notes
    assert listed.ignored == 1


def test_odd_names_are_rejected_and_other_files_counted(tmp_path):
    release(tmp_path, tiles=(1,), cells=("CELL0",))
    odd = (
        "hr_div_1/tile_LowRes512-1_3_768_1408_1280_1920_CELL0.tif",
        "hr_div_2/tile_LowRes512-1_3_384_704_640_960_CELL3.tif",
        "hr_div_2/montage.png",
        name_of(1, 23),
    )
    for name in odd:
        touch(tmp_path / name)
    touch(tmp_path / "hr_div_4/hr_div_4" / Path(name_of(4, 2)).name)
    for name in ("config.yaml", "log.txt", "hr_div_1/.hidden.tif", "hr_div_1/Thumbs.db"):
        touch(tmp_path / name)
    listed = list_sr_caco2(tmp_path)
    reasons = dict(listed.rejected)
    assert set(reasons) == {*odd, "hr_div_4/hr_div_4"}
    assert "does not fit" in reasons["hr_div_2/montage.png"]
    assert reasons[name_of(1, 23)] == "tile 23 is in no published split (1 to 22)"
    assert len(listed.images) == 4
    assert listed.ignored == 4


def test_links_out_of_the_root_are_rejected_and_links_inside_kept(tmp_path):
    root = release(tmp_path / "root", tiles=(1,), scales=(1,), cells=("CELL0",))
    elsewhere = release(tmp_path / "elsewhere", tiles=(2,), cells=("CELL0",))
    os.symlink(elsewhere / name_of(1, 2), root / name_of(1, 2))
    os.symlink(root / name_of(1, 1), root / name_of(1, 3))
    os.symlink(elsewhere / "hr_div_2", root / "hr_div_2")
    listed = list_sr_caco2(root)
    assert {image.name for image in listed.images} == {name_of(1, 1), name_of(1, 3)}
    assert [name for name, _ in listed.rejected] == [name_of(1, 2), "hr_div_2"]
    assert all(str(elsewhere) in reason for _, reason in listed.rejected)


def test_a_folder_without_the_release_is_refused_in_words(tmp_path):
    touch(tmp_path / "holiday.png")
    with pytest.raises(UserError, match=r"found holiday.png, expected the SR-CACO-2 patches, hr_div_1/tile_HighRes"):
        list_sr_caco2(tmp_path)
    with pytest.raises(UserError, match="found no files, expected the SR-CACO-2 patches"):
        list_sr_caco2(tmp_path / "missing")
    touch(tmp_path / name_of(2, 1))
    with pytest.raises(UserError, match="found no patch that can be used"):
        list_sr_caco2(tmp_path)
