"""Latents come back as they were written, whatever the order they are asked for in, and damage is named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, parse_stats, write_shard
from ray_pipeline.errors import UserError

SHAPE = (4, 8, 8)
SHARD_ROWS = (5, 1, 7, 3)
HINTS = ("denoising", "canny")
VARIANTS = 2


def write_store(root: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A store with a training split of four shards; returns all columns by name, each (16, C, H, W) fp16."""
    names = [f"{name}@{k}" for k in range(VARIANTS) for name in ("latent", *(f"hint.{hint}" for hint in HINTS))]
    scale, shift = np.array([1, 3, 0.2, 7])[:, None, None], np.array([0, -2, 1, 5])[:, None, None]
    values = {name: (rng.standard_normal((16, *SHAPE)) * scale + shift).astype(np.float16) for name in names}
    folder = root / "train"
    folder.mkdir(parents=True)
    shards, start = [], 0
    for number, rows in enumerate(SHARD_ROWS):
        file = f"shard-{number:05d}.arrow"
        columns = {name: column[start : start + rows] for name, column in values.items()}
        shards.append({"file": file, "rows": rows, "sha256": write_shard(folder / file, columns)})
        start += rows
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": "f" * 64,
        "shape": SHAPE,
        "hints": HINTS,
        "variants": VARIANTS,
        "datasets": [{"name": "one", "start": 0, "count": 6}, {"name": "two", "start": 6, "count": 10}],
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index))
    latents = np.concatenate([values[f"latent@{k}"] for k in range(VARIANTS)]).astype(np.float64)
    stats = LatentStats(latents.mean(axis=(0, 2, 3)), latents.std(axis=(0, 2, 3)), 16, "f" * 64)
    (root / "stats.json").write_text(json.dumps(stats.as_json()))
    return values


@pytest.fixture
def store(tmp_path) -> tuple[LatentStore, dict[str, np.ndarray]]:
    values = write_store(tmp_path, np.random.default_rng(3))
    return LatentStore.open(tmp_path), values


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "ids",
    [[0], [15, 0, 5, 4, 6, 12, 13], list(range(16)), list(range(15, -1, -1)), [7, 7, 2, 7, 2], []],
    ids=["one", "borders", "all", "backwards", "twice", "none"],
)
def test_gather_returns_the_rows_that_were_written_in_the_order_asked_for(store, ids):
    opened, values = store
    gathered = opened.gather(ids)
    assert set(gathered) == {"latent", "hint.denoising", "hint.canny"}
    for name, rows in gathered.items():
        assert rows.dtype == np.float16
        np.testing.assert_array_equal(rows, values[f"{name}@0"][ids].reshape(-1, *SHAPE))


def test_gather_takes_a_variant_for_each_row(store):
    opened, values = store
    rng = np.random.default_rng(0)
    ids, variants = rng.integers(16, size=50), rng.integers(VARIANTS, size=50)
    for name, rows in opened.gather(ids, variants).items():
        both = np.stack([values[f"{name}@{k}"] for k in range(VARIANTS)])
        np.testing.assert_array_equal(rows, both[variants, ids])


def test_gather_reads_only_the_hints_asked_for(store):
    opened, _ = store
    assert list(opened.gather([1], hints=())) == ["latent"]
    assert list(opened.gather([1], hints=("canny",))) == ["latent", "hint.canny"]


@pytest.mark.parametrize("ids", [[16], [0, -1], [1000]])
def test_an_id_outside_the_split_is_an_error_and_never_another_row(store, ids):
    with pytest.raises(IndexError, match="16 rows"):
        store[0].gather(ids)


def test_more_shards_than_are_kept_open_are_read_right(tmp_path):
    rng = np.random.default_rng(0)
    values = write_store(tmp_path, rng)
    index = json.loads((tmp_path / "train" / "index.json").read_text())
    rewrite(tmp_path / "train" / "index.json", shards=index["shards"] * 30)
    opened = LatentStore.open(tmp_path)
    assert len(opened) == 480
    ids = rng.permutation(480)
    np.testing.assert_array_equal(opened.gather(ids)["latent"], values["latent@0"][ids % 16])


def test_rows_of_data_sets_are_their_ranges(store):
    opened, _ = store
    assert opened.rows().tolist() == list(range(16))
    assert opened.rows(["two"]).tolist() == list(range(6, 16))
    assert opened.rows(["two", "one"]).tolist() == [*range(6, 16), *range(6)]
    with pytest.raises(UserError, match=r"'three'.*holds one, two"):
        opened.rows(["three"])


def test_a_pickled_store_is_small_and_reads_the_same_rows(store):
    opened, values = store
    opened.gather(range(16))  # shards are open now, and must not travel
    data = pickle.dumps(opened)
    assert len(data) < 4000
    np.testing.assert_array_equal(pickle.loads(data).gather([3, 9])["latent"], values["latent@0"][[3, 9]])


def test_normalised_latents_have_zero_mean_and_std_sigma_data(store):
    opened, values = store
    stored = np.concatenate([values[f"latent@{k}"] for k in range(VARIANTS)])
    for sigma_data in (0.5, 1.0):
        normal = opened.stats.normalise(stored, sigma_data)
        assert normal.dtype == np.float32
        np.testing.assert_allclose(normal.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=1e-5)
        np.testing.assert_allclose(normal.std(axis=(0, 2, 3), dtype=np.float64), sigma_data, rtol=1e-5)


def test_denormalise_is_the_inverse_of_normalise(store):
    stats, values = store[0].stats, store[1]["latent@0"]
    back = stats.denormalise(stats.normalise(values, 0.5), 0.5)
    np.testing.assert_allclose(back, values.astype(np.float32), rtol=1e-5, atol=1e-5)
    # hints have one axis more
    stacked = np.stack([values, values], axis=1)
    np.testing.assert_array_equal(stats.normalise(stacked, 0.5)[:, 1], stats.normalise(values, 0.5))


def test_statistics_survive_json():
    stats = LatentStats(np.array([0.1, 1 / 3]), np.array([1e-7, 2.0]), 7, "ab")
    back = parse_stats(json.loads(json.dumps(stats.as_json())))
    assert back.mean.tobytes() == stats.mean.tobytes()
    assert back.std.tobytes() == stats.std.tobytes()
    assert (back.count, back.fingerprint) == (7, "ab")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, flip])
def test_verify_names_the_shard_that_is_not_as_written(store, damage):
    opened, _ = store
    assert opened.verify() == []
    damage(opened.folder / "shard-00002.arrow")
    assert opened.verify() == ["shard-00002.arrow"]


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty])
def test_a_shard_that_is_gone_or_cut_short_is_named_when_it_is_read(store, damage):
    opened, values = store
    assert opened.missing() == []
    damage(opened.folder / "shard-00002.arrow")
    assert opened.missing() == ["shard-00002.arrow"]
    with pytest.raises(UserError, match=r"shard-00002\.arrow .*encode --overwrite"):
        opened.gather([0, 7])
    np.testing.assert_array_equal(opened.gather([0, 15])["latent"], values["latent@0"][[0, 15]])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"rows": 4}, "has 4 rows, expected 7"),
        ({"names": ("latent@0", "latent@1")}, "lacks column hint.denoising@0"),
        ({"side": 4}, "lacks column latent@0"),
    ],
)
def test_a_shard_of_another_layout_is_named(store, columns, said):
    opened, _ = store
    names = columns.get("names", [f"{n}@{k}" for k in (0, 1) for n in ("latent", "hint.denoising", "hint.canny")])
    side = columns.get("side", 8)
    rows = np.zeros((columns.get("rows", 7), 4, side, side), np.float16)
    write_shard(opened.folder / "shard-00002.arrow", dict.fromkeys(names, rows))
    with pytest.raises(UserError, match=rf"shard-00002\.arrow.*{said}"):
        opened.gather([7])


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    rows = np.ones((3, *SHAPE), np.float16)
    digest = write_shard(tmp_path / "shard-00000.arrow", {"latent@0": rows})
    assert write_shard(tmp_path / "again.arrow", {"latent@0": rows}) == digest
    before = (tmp_path / "shard-00000.arrow").read_bytes()
    with pytest.raises(ValueError):  # columns of different length: writing fails half way
        write_shard(tmp_path / "shard-00000.arrow", {"latent@0": rows, "hint.canny@0": rows[:2]})
    assert (tmp_path / "shard-00000.arrow").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.arrow", "shard-00000.arrow"]


def test_a_reader_keeps_its_rows_while_a_shard_is_replaced(store):
    opened, values = store
    opened.gather([7])
    columns = {name: np.zeros_like(column[6:13]) for name, column in values.items()}
    write_shard(opened.folder / "shard-00002.arrow", columns)
    np.testing.assert_array_equal(opened.gather([7])["latent"], values["latent@0"][[7]])


def test_the_training_split_is_what_a_store_opens_as(tmp_path):
    write_store(tmp_path, np.random.default_rng(0))
    assert LatentStore.open(tmp_path).folder == LatentStore.open(tmp_path / "train").folder == tmp_path / "train"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train/index.json", None, "index.json is missing"),
        ("train/index.json", "{", "index.json is not valid JSON"),
        ("train/index.json", "[]", "index.json lacks"),
        ("stats.json", None, "stats.json is missing"),
        ("stats.json", "\xff", "stats.json is not valid JSON"),
        ("stats.json", '{"mean": [1]}', "stats.json lacks"),
        ("stats.json", '{"mean": ["x"], "std": [1], "count": 1, "fingerprint": "a"}', "does not hold statistics"),
    ],
)
def test_a_damaged_store_is_named_and_the_remedy_told(tmp_path, file, content, said):
    write_store(tmp_path, np.random.default_rng(0))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{said}.*ray-pipeline encode"):
        LatentStore.open(tmp_path / "train")


def test_a_store_of_another_format_version_is_refused(tmp_path):
    write_store(tmp_path, np.random.default_rng(0))
    rewrite(tmp_path / "train" / "index.json", version=99)
    with pytest.raises(UserError, match="version 99, expected 1"):
        LatentStore.open(tmp_path)


def test_shards_and_statistics_of_different_encodes_are_never_read_together(tmp_path):
    write_store(tmp_path, np.random.default_rng(0))
    rewrite(tmp_path / "stats.json", fingerprint="e" * 64)
    with pytest.raises(UserError, match="other tiles or settings"):
        LatentStore.open(tmp_path)
