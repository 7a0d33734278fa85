"""Latents come back as they were written, whatever the order they are asked for in, and damage is named."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from ray_pipeline.data import shard_reader
from ray_pipeline.data.block_cache import BlockCache
from ray_pipeline.data.latents import FORMAT_VERSION, DataSet, LatentStats, LatentStore, parse_stats
from ray_pipeline.data.shards import write_shard
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import AutoencoderHeader, IntensityRange
from ray_pipeline.storage import Folder

SHAPE = (4, 8, 8)
SHARD_ROWS = (5, 1, 7, 3)
HINTS = ("super_resolution", "denoising", "canny")
SIMULATED = ("denoising",)  # the one hint that also comes from the tile
COLUMNS = ("latent", *(f"hint.{hint}" for hint in HINTS), "simulated.denoising")
VARIANTS = 2
AUTOENCODER = AutoencoderHeader(pretrained="some/autoencoder", sha256="a" * 64)
INTENSITY = (
    IntensityRange(dataset="one", role="tile", channel=0, dtype="uint16", low=90.5, high=4000.0, tiles=5),
    IntensityRange(dataset="two", role="denoising", channel=1, dtype="float32", low=-0.25, high=1.5, tiles=3),
)
ROWS = sum(SHARD_ROWS)


def name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def write_store(root: Folder) -> dict[str, np.ndarray]:
    """A store with a training split of four shards; returns all columns by name, each (16, variants, C, H, W) fp16."""
    rng = np.random.default_rng(3)
    scale, shift = np.array([1, 3, 0.2, 7])[:, None, None], np.array([0, -2, 1, 5])[:, None, None]
    values = (rng.standard_normal((ROWS, VARIANTS, len(COLUMNS), *SHAPE)) * scale + shift).astype(np.float16)
    borders = np.cumsum([0, *SHARD_ROWS])
    folder = root.child("train")
    shards = [write_shard(folder, name(n), values[borders[n] : borders[n + 1]]) for n in range(len(SHARD_ROWS))]
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": "f" * 64,
        "shape": SHAPE,
        "hints": HINTS,
        "simulated": SIMULATED,
        "posterior": "mode",
        "variants": VARIANTS,
        "rejected": 0,
        "datasets": [
            {"name": "one", "start": 0, "count": 6, "partners": {"denoising": 2}},
            {"name": "two", "start": 6, "count": 10, "partners": {}},
        ],
        "shards": shards,
        "autoencoder": AUTOENCODER.model_dump(),
        "intensity": [entry.model_dump() for entry in INTENSITY],
    }
    folder.write("index.json", json.dumps(index).encode())
    plain = values[:, :, 0].astype(np.float64)
    stats = LatentStats(plain.mean(axis=(0, 1, 3, 4)), plain.std(axis=(0, 1, 3, 4)), ROWS, "f" * 64)
    root.write("stats.json", json.dumps(stats.as_json()).encode())
    return {column: values[:, :, k] for k, column in enumerate(COLUMNS)}


def change(folder: Folder, file: str, **changes) -> None:
    folder.write(file, json.dumps(json.loads(folder.read(file)) | changes).encode())


@dataclass
class Written:
    """A store and what was written to it."""

    root: Folder
    values: dict[str, np.ndarray]
    cache: BlockCache | None = None

    @property
    def train(self) -> Folder:
        return self.root.child("train")

    def open(self) -> LatentStore:
        return LatentStore.open(self.root, self.cache)


@pytest.fixture(params=["local", "s3", "s3 with a cache"])
def store(request, tmp_path) -> Written:
    root = Folder(tmp_path) if request.param == "local" else Folder(request.getfixturevalue("s3")).child(tmp_path.name)
    cache = BlockCache(2**24, str(tmp_path / "cache")) if request.param == "s3 with a cache" else None
    return Written(root, write_store(root), cache)


@pytest.fixture
def local(tmp_path) -> Written:
    return Written(Folder(tmp_path), write_store(Folder(tmp_path)))


@pytest.mark.parametrize(
    "ids",
    [[0], [15, 0, 5, 4, 6, 12, 13], list(range(ROWS)), list(range(ROWS))[::-1], [7, 7, 2, 7, 2], []],
    ids=["one", "borders", "all", "backwards", "twice", "none"],
)
def test_gather_returns_the_rows_that_were_written_in_the_order_asked_for(store, ids):
    gathered = store.open().gather(ids)
    assert list(gathered) == ["latent", *(f"hint.{hint}" for hint in HINTS)]
    for column, rows in gathered.items():
        assert rows.dtype == np.float16
        assert rows.shape == (len(ids), *SHAPE)
        np.testing.assert_array_equal(rows, store.values[column][ids, 0].reshape(-1, *SHAPE))


def test_gather_takes_variant_and_hints_and_their_origin_for_each_row(store):
    """All three at once, against plain indexing of what was written."""
    opened, rng = store.open(), np.random.default_rng(0)
    for hints in ((), ("canny",), ("denoising", "super_resolution"), HINTS[::-1], None):
        ids, variants = rng.integers(ROWS, size=30), rng.integers(VARIANTS, size=30)
        simulated = rng.random(30) < 0.5
        gathered = opened.gather(ids, variants, hints, simulated)
        chosen = HINTS if hints is None else hints
        assert list(gathered) == ["latent", *(f"hint.{hint}" for hint in chosen)]
        for column, rows in gathered.items():
            expected = store.values[column][ids, variants]
            if column == "hint.denoising":
                made = store.values["simulated.denoising"][ids, variants]
                expected = np.where(simulated[:, None, None, None], made, expected)
            np.testing.assert_array_equal(rows, expected)


def test_what_is_gathered_can_be_changed_and_is_of_the_callers_own(store):
    opened = store.open()
    for rows in opened.gather([3, 3]).values():
        rows[0] = 0
    np.testing.assert_array_equal(opened.gather([3])["latent"], store.values["latent"][[3], 0])


@pytest.mark.parametrize("ids", [[16], [0, -1], [1000]])
def test_an_id_outside_the_split_is_an_error_and_never_another_row(store, ids):
    with pytest.raises(IndexError, match=r"ids reach .* the split has 16"):
        store.open().gather(ids)


@pytest.mark.parametrize("variants", [[0, 2], [-1, 0]])
def test_a_variant_that_is_not_stored_is_an_error_and_never_another_row(store, variants):
    with pytest.raises(IndexError, match=r"variants reach .* the split has 2"):
        store.open().gather([1, 2], variants)


def test_as_many_variants_and_flags_as_ids_are_wanted(store):
    with pytest.raises(ValueError):
        store.open().gather([1, 2], [0])
    with pytest.raises(ValueError):
        store.open().gather([1, 2], simulated=[True])


def test_a_hint_that_is_not_stored_is_named(local):
    with pytest.raises(UserError, match=r"no hint 'depth', its hints are super_resolution, denoising, canny.*encode"):
        local.open().gather([1], hints=("canny", "depth"))


@pytest.mark.parametrize("hints", [(), ("canny",), ("denoising", "canny")])
def test_where_the_posterior_is_stored_its_std_comes_with_every_latent(write_latents, tmp_path, hints):
    """Columns are latent, std, hint.denoising, hint.canny, simulated.denoising; each value tells its place."""
    places = np.arange(6)[:, None, None], 10 * np.arange(VARIANTS)[:, None], 100 * np.arange(5)
    values = np.broadcast_to(sum(places)[..., None, None, None], (6, VARIANTS, 5, *SHAPE)).astype(np.float16)
    opened = write_latents(tmp_path, values, HINTS[1:], SIMULATED, posterior="sample", shard_rows=4)
    assert opened.columns == ("latent", "std", "hint.denoising", "hint.canny", "simulated.denoising")
    gathered = opened.gather([5, 0, 3], [1, 0, 1], hints, [True, False, False])
    assert list(gathered) == ["latent", "std", *(f"hint.{hint}" for hint in hints)]
    columns = {"latent": [0, 0, 0], "std": [1, 1, 1], "hint.denoising": [4, 2, 2], "hint.canny": [3, 3, 3]}
    for name, rows in gathered.items():
        expected = np.array([5, 0, 3]) + 10 * np.array([1, 0, 1]) + 100 * np.array(columns[name])
        np.testing.assert_array_equal(rows, np.broadcast_to(expected[:, None, None, None], rows.shape))
    assert list(opened.gather([1])) == ["latent", "std", "hint.denoising", "hint.canny"]


@pytest.mark.parametrize("ids", [[], [0], [6, 15, 5, 6]])
def test_records_are_all_that_is_stored_of_a_row(store, ids):
    records = store.open().records(ids)
    assert records.shape[0] == len(ids)
    for place, row in enumerate(ids):
        for column, name in enumerate(COLUMNS):
            np.testing.assert_array_equal(records[place, :, column], store.values[name][row])


def fetched(server, before: int) -> list[int]:
    """Bytes of each range asked for since, the openings of files left out."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for method, _, asked in server.requests[before:] if asked]
    return [int(r[2]) - int(r[1]) + 1 for r in ranges]


def test_of_a_remote_shard_only_what_is_asked_for_is_fetched(s3, s3_server, tmp_path):
    root = Folder(s3).child(tmp_path.name)
    write_store(root)
    opened, latent = LatentStore.open(root), 2 * 4 * 8 * 8
    opened.gather(range(ROWS), hints=())  # all shards are open from here on
    for arguments, expected in (
        ({"ids": [0, 8, 15], "hints": ()}, [latent] * 3),
        ({"ids": [0, 8]}, [4 * latent] * 2),
        ({"ids": [0, 8], "hints": ("super_resolution",)}, [2 * latent] * 2),
        ({"ids": [4, 5], "variants": [1, 1], "simulated": [True, False]}, [4 * latent, 5 * latent]),
        ({"ids": []}, []),
    ):
        before = len(s3_server.requests)
        opened.gather(**arguments)
        assert sorted(fetched(s3_server, before)) == expected
        assert len(s3_server.requests) - before == len(expected)


def test_only_shards_that_hold_the_rows_are_opened(store):
    opened = store.open()
    store.train.remove([name(1), name(3)])
    np.testing.assert_array_equal(opened.gather([0, 7])["latent"], store.values["latent"][[0, 7], 0])


@pytest.mark.parametrize("times", [8, 3])
def test_more_shards_than_are_kept_open_are_read_right(store, monkeypatch, times):
    monkeypatch.setattr(shard_reader, "_MAPPED_SHARDS", 2 * times)
    monkeypatch.setattr(shard_reader, "_REMOTE_SHARDS", 2 * times)
    index = json.loads(store.train.read("index.json"))
    change(store.train, "index.json", shards=index["shards"] * times)
    opened, rng = store.open(), np.random.default_rng(0)
    assert len(opened) == ROWS * times
    for batch in range(3):
        ids = rng.permutation(ROWS * times)[: 40 * (batch + 1)]
        np.testing.assert_array_equal(opened.gather(ids)["latent"], store.values["latent"][ids % ROWS, 0])
        assert len(opened._reader._opened) <= 2 * times


def test_a_pickled_store_is_small_and_reads_the_same_rows(store):
    opened = store.open()
    opened.gather(range(ROWS))  # shards are open now, and must not travel
    data = pickle.dumps(opened)
    assert len(data) < 4000
    np.testing.assert_array_equal(pickle.loads(data).gather([3, 9])["latent"], store.values["latent"][[3, 9], 0])


def test_the_index_tells_what_the_split_holds(local):
    opened = local.open()
    assert (len(opened), opened.shape, opened.variants) == (ROWS, SHAPE, VARIANTS)
    assert (opened.hint_names, opened.columns) == (HINTS, COLUMNS)
    assert opened.datasets == (DataSet("one", 0, 6, {"denoising": 2}), DataSet("two", 6, 10, {}))


def test_normalised_latents_have_zero_mean_and_std_sigma_data(local):
    stored = local.values["latent"].reshape(-1, *SHAPE)
    for sigma_data in (0.5, 1.0):
        normal = local.open().stats.normalise(stored, sigma_data)
        assert normal.dtype == np.float32
        np.testing.assert_allclose(normal.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=1e-5)
        np.testing.assert_allclose(normal.std(axis=(0, 2, 3), dtype=np.float64), sigma_data, rtol=1e-5)


def test_denormalise_is_the_inverse_of_normalise(local):
    stats, values = local.open().stats, local.values["latent"][:, 0]
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


def remove(folder: Folder, file: str) -> None:
    folder.remove([file])


def truncate(folder: Folder, file: str) -> None:
    folder.write(file, folder.read(file)[:-2000])


def lengthen(folder: Folder, file: str) -> None:
    folder.write(file, folder.read(file) + b"\0")


def empty(folder: Folder, file: str) -> None:
    folder.write(file, b"")


def flip(folder: Folder, file: str) -> None:
    data = bytearray(folder.read(file))
    data[len(data) // 2] ^= 1
    folder.write(file, data)


def flip_in_header(folder: Folder, file: str) -> None:
    data = bytearray(folder.read(file))
    data[data.index(b"(7, 2,") + 1] ^= 1
    folder.write(file, data)


Damage = Callable[[Folder, str], None]


@pytest.mark.parametrize("damage", [remove, truncate, lengthen, empty, flip, flip_in_header])
def test_verify_names_the_shard_that_is_not_as_written(store, damage: Damage):
    opened = store.open()
    assert opened.verify() == []
    damage(store.train, name(2))
    assert opened.verify() == [name(2)]


@pytest.mark.parametrize("damage", [remove, truncate, lengthen, empty, flip_in_header])
def test_a_damaged_shard_is_named_when_it_is_read_and_the_others_are_not_lost(store, damage: Damage):
    opened = store.open()
    assert opened.missing() == []
    damage(store.train, name(2))
    assert opened.missing() == ([] if damage is flip_in_header else [name(2)])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{store.train.where(name(2))} is .*damaged.*encode --overwrite"):
            opened.gather([0, 7])
    np.testing.assert_array_equal(opened.gather([0, 15])["latent"], store.values["latent"][[0, 15], 0])


def test_what_is_missing_is_told_without_reading_a_shard(s3, s3_server, tmp_path):
    root = Folder(s3).child(tmp_path.name)
    write_store(root)
    opened, before = LatentStore.open(root), len(s3_server.requests)
    assert opened.missing() == []
    assert len(s3_server.requests) - before == 1


def test_the_training_split_is_what_a_store_opens_as(store):
    assert store.open().folder.location == LatentStore.open(store.train).folder.location == store.train.location
    assert LatentStore.open(store.root.location).folder.location == store.train.location


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("train/index.json", None, "index.json is missing"),
        ("train/index.json", b"{", "index.json is not valid JSON"),
        ("train/index.json", b"[]", "index.json lacks"),
        ("stats.json", None, "stats.json is missing"),
        ("stats.json", b"\xff", "stats.json is not valid JSON"),
        ("stats.json", b'{"mean": [1]}', "stats.json lacks"),
        ("stats.json", b'{"mean": ["x"], "std": [1], "count": 1, "fingerprint": "a"}', "does not hold statistics"),
    ],
)
def test_a_damaged_store_is_named_and_the_remedy_told(store, file, content, said):
    if content is None:
        store.root.remove([file])
    else:
        store.root.write(file, content)
    with pytest.raises(UserError, match=rf"{store.root.where('')}.*{said}.*ray-pipeline encode"):
        LatentStore.open(store.train)


@pytest.mark.parametrize("version", [1, 2, 99])
def test_a_store_of_another_format_version_is_refused(local, version):
    # of another version are its other keys, too
    local.train.write("index.json", json.dumps({"version": version, "shards": []}).encode())
    with pytest.raises(UserError, match=rf"index\.json has version {version}, expected {FORMAT_VERSION}.*encode"):
        local.open()


def test_shards_and_statistics_of_different_encodes_are_never_read_together(store):
    change(store.root, "stats.json", fingerprint="e" * 64)
    with pytest.raises(UserError, match="other tiles or settings"):
        store.open()


def test_a_store_that_must_not_be_read_is_not_called_damaged(s3_server):
    uri = s3_server.make_bucket("locked")
    write_store(Folder(uri))
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::locked/*"]}
    s3_server.make_bucket("locked", {"Version": "2012-10-17", "Statement": [deny]})
    with pytest.raises(UserError, match=r"s3://locked/index\.json cannot be used .*ACCESS_DENIED.*credentials"):
        LatentStore.open(uri)


def test_a_store_tells_its_autoencoder_and_the_ranges_of_its_training_tiles(store):
    opened = store.open()
    assert opened.autoencoder == AUTOENCODER
    assert opened.intensity == INTENSITY


def test_what_gathers_latents_does_without_torch():
    """Of the actors that feed a rank each would otherwise take its memory and seconds."""
    code = "import sys; import ray_pipeline.data.latents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
