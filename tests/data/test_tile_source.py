"""Tiles that are encoded when they are asked for give what a store of them holds, in the same order."""

import pickle
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ray_pipeline.config import Config, parse_config
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.manifest import load_manifest, write_manifests
from ray_pipeline.data.mixture import make_mixture
from ray_pipeline.data.stream import StreamSettings, stream
from ray_pipeline.data.tile_source import TileSource
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

HINTS = ("super_resolution", "denoising", "canny")
VARIANTS = 5
ANOTHER, SIMULATED = 6, 24  # training tiles of the two data sets


# `gather` sets it, as it is called in actors; put back for the tests of other files
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tiny_data, tmp_path_factory) -> Path:
    """Two data sets: one without partners; the other has a partner of low resolution for every tile, and a noisy one
    for every other."""
    root = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("tiles") / "mit Leerzeichen \u00b5"))
    source = root / "foundation" / "simulated"
    csv = root / "degraded" / "simulated" / "manifests" / "manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    kept = load_manifest(source).table["id"][::2]
    table[(table["task"] != "denoising") | table["pair_id"].isin(kept)].to_csv(csv, index=False)
    rows = [load_manifest(source, split).table.to_dict("records") for split in ("train", "val")]
    split_of = {row["id"]: split for split, some in zip(("train", "val"), rows, strict=True) for row in some[:ANOTHER]}
    folder = Path(shutil.copytree(source, root / "foundation" / "another"))
    write_manifests(folder, [row for some in rows for row in some[:ANOTHER]], split_of)
    return root


@pytest.fixture(scope="module")
def config(root, tiny_autoencoder) -> Config:
    """A phase that draws tiles with noisy partners, and the same ones with noise made from them."""
    choices = [
        {"name": "simulated", "weight": 1},
        {"name": "simulated", "weight": 1, "degradations": "simulated"},
        {"name": "another", "weight": 1},
    ]
    return parse_config(
        {
            "data": {"root": str(root), "tile_size": 64, "augment_variants": VARIANTS, "shard_rows": 11},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "vae": {"pretrained": str(tiny_autoencoder), "batch_size": 4},
            "train": {"global_batch": 8, "batch_size": 4},
            "phases": [{"name": "one", "epochs": 1, "condition_types": HINTS, "datasets": choices}],
        }
    )


@pytest.fixture(scope="module")
def job(config) -> EncodeJob:
    assert encode_job(config).simulated == PAIRED_TYPES
    return encode_job(config)


@pytest.fixture(scope="module")
def store(run_job_here, job) -> LatentStore:
    """The encoded training tiles."""
    run_job_here(job)
    return LatentStore.open(job.store)


@pytest.fixture(scope="module")
def table(store) -> TileTable:
    return TileTable(store.folder, "tiles.arrow")


@pytest.fixture(scope="module")
def source(job, table) -> TileSource:
    return TileSource(job, table)


def check_same_but_for_rounding(found: dict, expected: dict) -> None:
    """In another batch fp32 sums have another order, which changes these latents of up to 0.11 by 1e-8 (5e-7 leaves
    room for other processors). Few of them lie so near a border of rounding that fp16 makes one unit in the last
    place of it."""
    assert list(found) == list(expected)
    for name, latents in expected.items():
        assert found[name].dtype == latents.dtype == np.float16
        assert found[name].shape == latents.shape
        unit = np.spacing(np.maximum(np.abs(found[name]), np.abs(latents))).astype(np.float32)
        assert (np.abs(found[name].astype(np.float32) - latents.astype(np.float32)) <= unit + 5e-7).all(), name
        assert (found[name] == latents).mean() > 0.99, name


def same_bits(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(
    "hints",
    [(), ("canny",), ("denoising",), ("denoising", "super_resolution"), HINTS, HINTS[::-1]],
    ids=lambda hints: "+".join(hints) or "none",
)
def test_what_is_gathered_is_what_is_stored(store, source, hints):
    rng = np.random.default_rng(len(hints))
    ids = rng.permutation(np.r_[np.arange(len(store)), 3, 3, 17])[:20]
    variants, simulated = rng.integers(VARIANTS, size=len(ids)), rng.random(len(ids)) < 0.5
    assert set(ids) & set(range(ANOTHER))
    found, expected = (of.gather(ids, variants, hints, simulated) for of in (source, store))
    check_same_but_for_rounding(found, expected)
    assert all(values.flags["C_CONTIGUOUS"] for values in found.values())


def test_every_row_in_every_variant_with_both_kinds_of_hints_is_what_is_stored(store, source):
    ids = np.arange(len(store))
    for variant in range(VARIANTS):
        variants = np.full(len(ids), variant)
        for flag in (False, True):
            arguments = (ids, variants, HINTS, np.full(len(ids), flag))
            check_same_but_for_rounding(source.gather(*arguments), store.gather(*arguments))


def test_a_source_tells_what_the_store_tells(store, source):
    assert len(source) == len(store) == ANOTHER + SIMULATED
    assert source.shape == store.shape == (4, 8, 8)
    assert source.variants == store.variants == VARIANTS
    assert source.table.datasets == store.datasets


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_simulated_hints_are_others_than_those_of_partners_and_the_same_where_there_is_none(store, source, table, kind):
    rows = source.gather if kind == "streamed" else store.gather
    ids = np.arange(len(store))
    variants = ids % VARIANTS
    given, made = (rows(ids, variants, HINTS, np.full(len(ids), flag)) for flag in (False, True))
    for name in ("latent", "hint.canny"):
        np.testing.assert_array_equal(given[name], made[name])
    for hint in PAIRED_TYPES:
        has_partner = np.array([hint in row.partners for row in table.rows(ids)])
        assert 0 < has_partner.sum() < len(ids)
        equal = (given[f"hint.{hint}"] == made[f"hint.{hint}"]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(equal, ~has_partner)


def test_equal_calls_give_equal_bits_from_a_pickled_source_too(source):
    arguments = ([20, 1, 7, 7, 29, 12], [4, 0, 3, 1, 2, 0], HINTS, [True, False] * 3)
    first = source.gather(*arguments)
    assert same_bits(source.gather(*arguments), first)
    data = pickle.dumps(source)
    assert len(data) < 2000  # the autoencoder and the table are loaded where they are used
    assert same_bits(pickle.loads(data).gather(*arguments), first)


def test_a_row_is_the_same_but_for_rounding_in_any_batch(source):
    ids, variants, simulated = np.array([8, 25, 2, 14, 9]), np.array([1, 0, 4, 2, 3]), np.array([0, 1, 1, 0, 1], bool)
    alone = [source.gather(ids[k : k + 1], variants[k : k + 1], HINTS, simulated[k : k + 1]) for k in range(len(ids))]
    found = {name: np.concatenate([one[name] for one in alone]) for name in alone[0]}
    check_same_but_for_rounding(found, source.gather(ids, variants, HINTS, simulated))


def test_nothing_but_what_is_asked_for_passes_the_autoencoder(job, table):
    source, passed = TileSource(job, table), []
    source.gather([0], [0], (), [False])
    network = source._encoder.autoencoder.network
    network.encoder.register_forward_hook(lambda _, images, __: passed.append(len(images[0])))
    rows = range(ANOTHER, ANOTHER + 6)
    for hints, each in (((), 1), (("canny",), 2), (("denoising", "super_resolution"), 3)):
        for flag in (False, True):
            passed.clear()
            source.gather(rows, [0] * 6, hints, [flag] * 6)
            assert passed == [4] * -(-6 * each // 4)  # the last batch is filled up


def test_a_data_root_that_is_moved_gives_the_same_bits(job, source, table, tmp_path):
    moved = shutil.copytree(job.root, tmp_path / "moved", ignore=shutil.ignore_patterns("latents"))
    arguments = ([3, 28, 11], [2, 0, 4], HINTS, [False, True, False])
    found = TileSource(replace(job, root=str(moved)), table).gather(*arguments)
    assert same_bits(found, source.gather(*arguments))


def test_a_tile_that_is_gone_or_damaged_is_named_when_it_is_read(job, table, tmp_path):
    moved = replace(job, root=str(shutil.copytree(job.root, tmp_path / "moved")))
    gone, torn = (Path(moved.root, row.path) for row in table.rows([9, 13]))
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:-20])
    source = TileSource(moved, table)
    for row, path, said in ((9, gone, "no such image file"), (13, torn, "found a truncated PNG")):
        path = path.relative_to(moved.root)
        with pytest.raises(UserError, match=rf"^1 of 3 tiles of a batch cannot be used \({path}: {said}.*\); "):
            source.gather([8, row, 10], [0, 0, 0], (), [False] * 3)
    source.gather([8, 10], [0, 0], (), [False] * 2)


@pytest.mark.parametrize("row", [-1, ANOTHER + SIMULATED])
def test_a_row_outside_the_split_is_an_error_and_never_another_row(source, row):
    with pytest.raises(IndexError):
        source.gather([0, row], [0, 0], (), [False, False])


def test_streamed_tiles_come_in_the_order_of_the_plan_and_a_step_has_its_own_bits(ray_cluster, config, store, source):
    mixture = make_mixture(config, config.phases[0], source.table.datasets, "here")
    settings = StreamSettings(mixture, source, HINTS[:2], rank=0, world_size=2, name="tiles", workers=2)
    with closing(stream(settings, 2, 6)) as batches:
        arrived = dict(batches)
    assert list(arrived) == list(range(2, 6))
    kinds = set()
    for step, batch in arrived.items():
        index = mixture.plan.positions(step, 0, 2)
        np.testing.assert_array_equal(batch["index"], index)
        rows, simulated = mixture.rows(index)
        kinds |= set(zip(rows >= ANOTHER, simulated, strict=True))
        arguments = (rows, mixture.plan.variants(index, VARIANTS), HINTS[:2], simulated)
        latents = {name: values for name, values in batch.items() if name != "index"}
        check_same_but_for_rounding(latents, store.gather(*arguments))
        assert same_bits(latents, source.gather(*arguments))
    assert kinds == {(True, False), (True, True), (False, False)}


def test_a_sampled_posterior_comes_with_its_std_as_from_a_store(job_for, tiny_data, tiny_kl, run_job_here, tmp_path):
    changes = {"autoencoder": str(tiny_kl), "posterior": "sample", "variants": 2, "store": tmp_path / "latents"}
    job = job_for(tiny_data, "canny", **changes)
    run_job_here(job)
    store = LatentStore.open(job.store)
    source = TileSource(job, TileTable(store.folder, "tiles.arrow"))
    arguments = ([3, 20, 7], [0, 1, 1], ("canny",), [False] * 3)
    found, expected = source.gather(*arguments), store.gather(*arguments)
    assert list(found) == list(expected) == ["latent", "std", "hint.canny"]
    for name, latents in expected.items():
        np.testing.assert_allclose(found[name].astype(float), latents.astype(float), rtol=2**-9, atol=1e-4)
