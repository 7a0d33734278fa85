"""The table of tiles: what loads, what is refused, and what its fingerprint follows."""

import shutil

import numpy as np
import pandas as pd
import pytest

from ray_pipeline.data.data_root import dataset_folders
from ray_pipeline.data.manifest import (
    COLUMNS,
    ManifestWriter,
    bad_tiles,
    check_tiles,
    load_manifest,
    load_pairs,
    write_manifests,
)
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError


def make_dataset(root, dataset="cells", kind="foundation", count=4):
    folder = root / kind / dataset
    rows, split_of = [], {}
    for i in range(count):
        row = {"id": f"{kind[0]}{i}", "image": f"images/{i}.png", "dataset": dataset, "channel_idx": 0}
        row |= {"norm_lo": 0.5, "norm_hi": 250.0, "height": 16, "width": 16, "dtype": "uint8"}
        row |= {"pair_id": f"f{i}"} if kind == "degraded" else {}
        row["sha256"] = write_tile(folder / row["image"], np.full((16, 16), i / 8))
        rows.append(row)
        split_of[row["id"]] = "val" if i == 1 else "train"
    write_manifests(folder, rows, split_of)
    return folder


def write_csv(folder, text, name="manifest.csv"):
    (folder / "manifests").mkdir(parents=True, exist_ok=True)
    (folder / "manifests" / name).write_text(text)
    return folder / "manifests" / name


def test_written_manifests_load_by_root_folder_and_file(tmp_path):
    folder = make_dataset(tmp_path)
    for path in (tmp_path, folder, folder / "manifests" / "manifest.csv"):
        manifest = load_manifest(path)
        assert (manifest.dataset, manifest.split, len(manifest)) == ("cells", None, 4)
        assert tuple(manifest.table.columns) == COLUMNS
        assert manifest.path(2) == folder.resolve() / "images" / "2.png"
    assert manifest.table["norm_lo"].tolist() == [0.5] * 4
    assert load_manifest(tmp_path, "val").table["id"].tolist() == ["f1"]
    assert load_manifest(folder / "manifests" / "manifest.csv", "train").split == "train"
    assert load_manifest(folder / "manifests" / "train.csv").table["id"].tolist() == ["f0", "f2", "f3"]
    check_tiles(manifest, 16)


def test_splits_without_tiles_are_a_header_and_numbers_keep_their_form(tmp_path):
    folder = make_dataset(tmp_path)
    assert (folder / "manifests" / "test.csv").read_text() == ",".join(COLUMNS) + "\n"
    first = (folder / "manifests" / "manifest.csv").read_text().splitlines()[1]
    assert first.startswith("f0,images/0.png,cells,,0,0.5,250.0,,,")
    assert sorted(p.name for p in (folder / "manifests").iterdir()) == [
        "manifest.csv",
        "test.csv",
        "train.csv",
        "val.csv",
    ]


@pytest.mark.parametrize(
    ("rows", "split_of", "found"),
    [
        ([{"id": "a"}, {"id": "a"}], {"a": "train"}, "twice"),
        ([{"id": "a"}, {"id": "b"}], {"a": "train"}, "without a split.*b"),
        ([{"id": "a"}], {"a": "training"}, "without a split.*a"),
    ],
)
def test_inconsistent_rows_are_not_written(tmp_path, rows, split_of, found):
    with pytest.raises(ValueError, match=found):
        write_manifests(tmp_path, rows, split_of)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_of_the_old_columns_loads_and_unknown_columns_stay(tmp_path):
    csv = write_csv(tmp_path / "foundation" / "old", "id,image,plate\n007,images/a.npz,0123\nNA,b.png,\n")
    manifest = load_manifest(csv)
    assert manifest.table["id"].tolist() == ["007", "NA"]
    assert manifest.table["plate"].tolist() == ["0123", ""]
    extra = {"id": "a", "image": "a.png", "plate": "P1"}
    write_manifests(tmp_path / "new", [extra], {"a": "train"})
    assert load_manifest(tmp_path / "new").table.columns.tolist() == [*COLUMNS, "plate"]


def test_the_fingerprint_follows_the_rows_and_not_the_place(tmp_path):
    folder = make_dataset(tmp_path / "here")
    before = load_manifest(folder).fingerprint()
    moved = tmp_path / "there" / "foundation" / "cells"
    shutil.copytree(folder, moved)
    assert load_manifest(moved).fingerprint() == before
    csv = moved / "manifests" / "manifest.csv"
    text = csv.read_text()
    csv.write_text(text.replace("f2,", "g2,"))
    assert load_manifest(moved).fingerprint() != before
    lines = text.splitlines()
    csv.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    assert load_manifest(moved).fingerprint() != before


def refuse_missing(root):
    (root / "foundation" / "cells" / "manifests").mkdir(parents=True)
    return root


def refuse_two(root):
    make_dataset(root, "cells")
    make_dataset(root, "more")
    return root


def refuse_link(root):
    outside = root / "elsewhere"
    folder = root / "data" / "foundation" / "cells"
    write_tile(outside / "a.png", np.zeros((4, 4)))
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").symlink_to(outside / "a.png")
    return write_csv(folder, "id,image\na,images/a.png\n")


def refuse_linked_folder(root):
    outside = root / "elsewhere"
    folder = root / "data" / "foundation" / "cells"
    write_tile(outside / "a.png", np.zeros((4, 4)))
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(outside)
    return write_csv(folder, "id,image\na,images/a.png\n")


def refuse_binary(root):
    csv = write_csv(root, "")
    csv.write_bytes(b"id,image\n\xff\xfe,\x80\n")
    return csv


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda root: root / "nowhere", "nowhere: no such folder or manifest.*ray-pipeline prepare"),
        (lambda root: root, "found no foundation.*ray-pipeline prepare"),
        (refuse_missing, r"manifest\.csv: no such manifest.*ray-pipeline prepare"),
        (refuse_two, "2 data sets .cells, more.*name one, for example"),
        (refuse_link, "a link to .*elsewhere.*copy them there"),
        (refuse_linked_folder, "a link to .*elsewhere.*copy them there"),
        (refuse_binary, r"manifest\.csv: expected a CSV manifest"),
        ("", r"manifest\.csv: expected a CSV manifest"),
        ("id,image\n", r"manifest\.csv: found no tiles"),
        ("id,path\na,b.png\n", r"manifest\.csv: found columns id, path, expected also image"),
        ("id,image\na,a.png\na,b.png\n", r"manifest\.csv: found 1 ids more than once \(a\)"),
        ("id,image\na,a.png\n,b.png\n", r"manifest\.csv: found no id in line 3"),
        ("id,image\na,/etc/a.png\n", r"manifest\.csv: found image path /etc/a\.png.*make it relative"),
        ("id,image\na,x/../../a.png\n", r"manifest\.csv: found image path x/\.\./\.\./a\.png"),
        ("id,image\na,..\\a.png\n", r"manifest\.csv: found image path"),
        ("id,image,norm_lo\na,a.png,low\n", r"manifest\.csv: column norm_lo expects numbers.*low"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_in_words(tmp_path, make, found):
    path = write_csv(tmp_path, make) if isinstance(make, str) else make(tmp_path)
    with pytest.raises(UserError, match=found):
        load_manifest(path)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="'validation', expected one of train, val, test"):
        load_manifest(make_dataset(tmp_path), "validation")


def test_missing_empty_and_wrongly_sized_tiles_are_counted_and_named(tmp_path):
    folder = make_dataset(tmp_path, count=9)
    manifest = load_manifest(folder)
    assert bad_tiles(manifest, 16) == {}
    with pytest.raises(
        UserError, match=r"9 of 9 tiles cannot.*0\.png: its height is 16 pixels, expected 32; .*prepare"
    ):
        check_tiles(manifest, 32)
    for i in range(7):
        (folder / "images" / f"{i}.png").unlink()
    (folder / "images" / "8.png").write_bytes(b"")
    assert bad_tiles(manifest) == dict.fromkeys(range(7), "no such file") | {8: "the file is empty"}
    with pytest.raises(
        UserError, match=r"8 of 9 tiles cannot be used \(.*0\.png: no such file; .*4\.png: .*; \.\.\.\)"
    ):
        check_tiles(manifest)


def test_a_tile_without_a_size_in_the_manifest_may_have_any(tmp_path):
    folder = tmp_path / "foundation" / "old"
    for name in ("a", "b"):
        write_tile(folder / f"{name}.png", np.zeros((16, 16)))
    manifest = load_manifest(write_csv(folder, "id,image,height,width\na,a.png,,\nb,b.png,16,8\n"))
    assert bad_tiles(manifest, 16) == {1: "its width is 8 pixels, expected 16"}


def test_pairs_name_their_foundation_tile(tmp_path):
    make_dataset(tmp_path)
    assert load_pairs(tmp_path, "cells").empty
    folder = make_dataset(tmp_path, kind="degraded")
    pairs = load_pairs(tmp_path, "cells")
    assert pairs["pair_id"].tolist() == load_manifest(tmp_path).table["id"].tolist()
    csv = folder / "manifests" / "manifest.csv"
    csv.write_text("id,image,pair_id\na,a.png,f0\nb,b.png,\n")
    with pytest.raises(UserError, match=r"degraded/cells/manifests/manifest\.csv: found rows without pair_id"):
        load_pairs(tmp_path, "cells")
    csv.write_text("id,image,pair_id\na,../a.png,f0\n")
    with pytest.raises(UserError, match=r"found image path \.\./a\.png"):
        load_pairs(tmp_path, "cells")


def test_pairs_of_a_manifest_without_that_column_are_those_of_equal_id(tmp_path):
    write_csv(tmp_path / "degraded" / "old", "id,image\nf0,a.png\nf3,b.png\n")
    assert load_pairs(tmp_path, "old")["pair_id"].tolist() == ["f0", "f3"]


def test_rows_written_one_by_one_are_the_tables_that_load(tmp_path):
    folder = tmp_path / "foundation" / "cells"
    writer = ManifestWriter(folder)
    rows = [{"id": f"t{i}", "image": f"images/{i}.png", "norm_lo": 0.1, "x0": 5, "um_pixel": None} for i in range(6)]
    for i, row in enumerate(rows):
        writer.write(row | ({"saturated": 0.5} if i == 0 else {}), ("train", "val", "train")[i % 3])
    writer.close()
    text = (folder / "manifests" / "manifest.csv").read_text().splitlines()
    assert text[0] == ",".join((*COLUMNS, "saturated"))
    assert text[1] == "t0,images/0.png,,,,0.1,,5,,,,,,,,,,,,,,,,0.5"
    assert load_manifest(tmp_path).table["id"].tolist() == [row["id"] for row in rows]
    assert load_manifest(tmp_path, "val").table["id"].tolist() == ["t1", "t4"]
    assert (folder / "manifests" / "test.csv").read_text().splitlines() == text[:1]
    assert load_manifest(tmp_path).table["x0"].tolist() == [5] * 6


def test_rows_written_one_by_one_do_not_mix_with_an_old_table_or_unknown_columns(tmp_path):
    writer = ManifestWriter(tmp_path)
    with pytest.raises(ValueError, match="plate"):
        writer.write({"id": "a", "image": "a.png", "plate": "P1"}, "train")
    writer.close()
    with pytest.raises(FileExistsError):
        ManifestWriter(tmp_path)


def test_dataset_folders_are_those_with_manifests(tmp_path):
    more, cells = make_dataset(tmp_path, "more"), make_dataset(tmp_path, "cells")
    (tmp_path / "foundation" / "unfinished" / "images").mkdir(parents=True)
    shutil.copytree(more, tmp_path / "foundation" / ".more.partial")
    assert [folder.local for folder in dataset_folders(tmp_path)] == [cells, more]
    assert dataset_folders(tmp_path, "degraded") == []


def test_an_interrupted_rewrite_leaves_no_manifest_that_mixes_two_runs(tmp_path):
    folder = make_dataset(tmp_path)
    (folder / "manifests" / "val.csv").unlink()
    (folder / "manifests" / "val.csv").mkdir()  # makes the second of the four replacements fail
    with pytest.raises(OSError):
        write_manifests(folder, [{"id": "a", "image": "a.png"}], {"a": "train"})
    assert not (folder / "manifests" / "manifest.csv").exists()
    assert pd.read_csv(folder / "manifests" / "train.csv")["id"].tolist() == ["a"]
