"""The randomness of training belongs to the sample, not to the batch, the rank or the machine."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from ray_pipeline.diffusion.noise import Draws, draw, kept_hints

SHAPE = (4, 8, 8)


def assert_equal_rows(one: Draws, rows: np.ndarray | slice, other: Draws) -> None:
    for name in ("z", "noise", "keep", "order"):
        np.testing.assert_array_equal(getattr(one, name)[rows], getattr(other, name), err_msg=name)


def test_numbers_of_a_sample_do_not_depend_on_the_batch_it_comes_in():
    whole = draw(1, "p", range(20), SHAPE, hints=3)
    assert_equal_rows(whole, slice(7, 9), draw(1, "p", [7, 8], SHAPE, hints=3))
    shuffled = np.array([13, 2, 2, 19])
    assert_equal_rows(whole, shuffled, draw(1, "p", shuffled, SHAPE, hints=3))


def test_noise_is_the_same_with_any_number_of_hints():
    # a run with three hints and one with four are compared on the same noise
    few, many = draw(1, "p", range(6), SHAPE), draw(1, "p", range(6), SHAPE, hints=4)
    for name in ("z", "noise", "keep"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name), err_msg=name)


@pytest.mark.parametrize("other", [(2, "p", 0), (1, "q", 0), (1, "p", 1)])
def test_seed_phase_and_sample_each_give_numbers_of_their_own(other):
    seed, phase, index = other
    one, two = draw(1, "p", [0], SHAPE), draw(seed, phase, [index], SHAPE)
    assert abs(np.corrcoef(one.noise.ravel(), two.noise.ravel())[0, 1]) < 0.25
    assert one.z != two.z


def test_numpy_and_python_integers_give_equal_numbers():
    assert_equal_rows(draw(1, "p", [5], SHAPE, hints=2), slice(None), draw(np.int64(1), "p", np.array([5]), SHAPE, 2))


def test_far_samples_of_an_endless_run_have_numbers_too():
    assert np.isfinite(draw(0, "p", [2**62], SHAPE).noise).all()


def test_the_first_numbers_are_the_recorded_ones():
    # a numpy that draws other numbers breaks the exact resume of every run before it: say so in the release notes
    draws = draw(0, "phase1", [0, 1, 10**9], SHAPE, hints=4)
    assert all(getattr(draws, name).dtype == np.float32 for name in ("z", "noise", "keep", "order"))
    digests = {
        name: hashlib.sha256(getattr(draws, name).tobytes()).hexdigest()[:16]
        for name in ("z", "noise", "keep", "order")
    }
    assert digests == GOLDEN_DIGESTS
    np.testing.assert_allclose(draws.z, GOLDEN_Z, rtol=1e-6)
    np.testing.assert_allclose(draws.noise[:, 0, 0, 0], GOLDEN_NOISE, rtol=1e-6)


def test_noise_and_z_are_standard_normal():
    draws = draw(3, "p", range(2000), (4, 4, 4))
    for values in (draws.z, draws.noise.ravel()):
        tolerance = 4 / np.sqrt(len(values))
        assert abs(values.mean()) < tolerance
        assert abs(values.var() - 1) < np.sqrt(2) * tolerance
        assert stats.kstest(values, "norm").pvalue > 1e-3
    # elements of one sample, and one element of neighbouring samples, are independent
    flat = draws.noise.reshape(2000, -1)
    assert abs(np.corrcoef(flat[:, 0], flat[:, 1])[0, 1]) < 0.09
    assert abs(np.corrcoef(flat[:-1, 0], flat[1:, 0])[0, 1]) < 0.09
    assert abs(np.corrcoef(draws.z, flat[:, 0])[0, 1]) < 0.09


def test_keep_and_order_are_uniform():
    draws = draw(3, "p", range(4000), (1, 1, 1), hints=3)
    assert stats.kstest(draws.keep, "uniform").pvalue > 1e-3
    assert stats.kstest(draws.order.ravel(), "uniform").pvalue > 1e-3
    ranks = draws.order.argsort(axis=1) @ (9, 3, 1)
    assert stats.chisquare(np.unique(ranks, return_counts=True)[1]).pvalue > 1e-3


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_hints_are_dropped_as_often_as_asked_and_else_any_number_stays(dropout):
    count = 20_000
    kept = kept_hints(synthetic(count, hints=4), dropout)
    sizes = np.bincount(kept.sum(axis=1), minlength=5)
    expected = count * np.array([dropout, *[(1 - dropout) / 4] * 4])
    assert stats.chisquare(sizes, expected).pvalue > 1e-3
    # of the samples with one hint, each hint is it equally often
    alone = kept[kept.sum(axis=1) == 1].sum(axis=0)
    assert stats.chisquare(alone).pvalue > 1e-3
    # each pair is equally frequent too
    pairs = kept[kept.sum(axis=1) == 2] @ (1, 2, 4, 8)
    assert stats.chisquare(np.unique(pairs, return_counts=True)[1]).pvalue > 1e-3


def test_real_draws_drop_hints_and_leave_every_hint_alone_sometimes():
    kept = kept_hints(draw(0, "p", range(3000), (1, 1, 1), hints=4), 0.1)
    assert stats.binomtest(int((~kept.any(axis=1)).sum()), 3000, 0.1).pvalue > 1e-3
    assert (kept[kept.sum(axis=1) == 1].sum(axis=0) > 100).all()


@pytest.mark.parametrize("hints", [1, 4])
def test_dropout_one_drops_all_and_zero_drops_none(hints):
    draws = synthetic(2000, hints)
    assert not kept_hints(draws, 1.0).any()
    assert kept_hints(draws, 0.0).any(axis=1).all()


def test_extreme_draws_keep_between_one_and_all_hints():
    keep = np.array([0.1, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    draws = Draws(z=keep, noise=keep, keep=keep, order=np.random.default_rng(0).random((2, 3), np.float32))
    assert kept_hints(draws, 0.1).sum(axis=1).tolist() == [1, 3]


def test_without_hints_nothing_is_kept():
    assert kept_hints(draw(0, "p", range(5), SHAPE), 0.1).shape == (5, 0)


def synthetic(count: int, hints: int) -> Draws:
    rng = np.random.default_rng(11)
    empty = np.empty(0, np.float32)
    return Draws(z=empty, noise=empty, keep=rng.random(count, np.float32), order=rng.random((count, hints), np.float32))


GOLDEN_DIGESTS = {
    "z": "3e94b5cca714d2dc",
    "noise": "6eccb68d0e2834ef",
    "keep": "5aa1fd87b5399fda",
    "order": "226bcb46354ab214",
}
GOLDEN_Z = [-0.2493872195482254, 0.4105225205421448, 0.36363646388053894]
GOLDEN_NOISE = [-0.2075699418783188, 1.0628432035446167, -0.5210973620414734]
