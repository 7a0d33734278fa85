"""The nearest stored tile, against scipy's search over all of them."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.training.nearest import nearest


@pytest.fixture(scope="module")
def store(encoded):
    return LatentStore.open(f"{encoded.store}/train")


def test_a_copied_tile_is_found_at_distance_zero_whatever_its_variant(store):
    rows = [3, len(store) - 1]
    variants = [0, store.variants - 1]
    copies = store.gather(rows, variants, hints=())["latent"].astype(np.float32)
    found = nearest(store, copies, 10**6)
    assert found.searched == len(store) * store.variants
    assert (found.rows.tolist(), found.variants.tolist()) == (rows, variants)
    assert np.allclose(found.distances, 0, atol=1e-3)


def test_distances_are_those_of_an_exhaustive_search(store):
    samples = np.random.default_rng(0).normal(size=(5, *store.shape)).astype(np.float32)
    found = nearest(store, samples, 10**6)
    every = np.concatenate(
        [store.gather(range(len(store)), [v] * len(store), hints=())["latent"] for v in range(store.variants)]
    )
    normal = [store.stats.normalise(part, 1.0).reshape(len(part), -1) for part in (samples, every)]
    distances = cdist(*normal) / normal[0].shape[1] ** 0.5
    assert np.allclose(found.distances, distances.min(axis=1), rtol=1e-4)
    chosen = found.variants * len(store) + found.rows
    assert np.allclose(distances[np.arange(5), chosen], distances.min(axis=1), rtol=1e-4)


def test_a_limit_searches_so_many_tiles(store):
    samples = np.zeros((1, *store.shape), np.float32)
    assert nearest(store, samples, 4).searched == 4
