"""The order of samples: every epoch whole, the same for any number of workers, uniform, and planned in O(1)."""

import itertools
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from ray_pipeline.data.plan import SamplePlan, permute, round_keys

BILLION = 10**9
PLANS = (
    SamplePlan(101, 8, seed=1, phase="p"),
    SamplePlan(101, 8, seed=1, phase="p", shard_rows=10, window=25),
    SamplePlan(100, 9, seed=1, phase="p", shard_rows=10, window=30),  # no short shard, a short last window
    SamplePlan(7, 16, seed=1, phase="p"),  # a batch spans three epochs
    SamplePlan(7, 16, seed=1, phase="p", shard_rows=16, window=64),  # one short shard, one window
    SamplePlan(1, 8, seed=1, phase="p"),
)
every_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=lambda p: f"{p.num_samples}-{p.global_batch}-{p.shard_rows}-{p.window}"
)
WORLD_SIZES = (1, 2, 3, 4, 8)


def sequence(plan: SamplePlan, epochs: int) -> np.ndarray:
    return np.concatenate([plan.batch(step) for step in range(plan.steps(epochs))])


def orders(plan: SamplePlan, epochs: int) -> np.ndarray:
    return plan.ids(np.arange(epochs * plan.num_samples)).reshape(epochs, -1)


def assert_plausible(pvalue: float) -> None:
    # too even is as wrong as too uneven
    assert 1e-3 < pvalue < 1 - 1e-3


@every_plan
def test_every_epoch_is_a_permutation_of_all_rows(plan):
    ids = sequence(plan, epochs=4)
    assert ids.dtype == np.int64
    for epoch in range(4):
        rows = ids[epoch * plan.num_samples : (epoch + 1) * plan.num_samples]
        np.testing.assert_array_equal(np.sort(rows), np.arange(plan.num_samples))


@every_plan
def test_at_any_step_every_sample_was_seen_equally_often_give_or_take_one(plan):
    seen = np.zeros(plan.num_samples, int)
    for step in range(plan.steps(5)):
        np.add.at(seen, plan.batch(step), 1)
        assert seen.max() - seen.min() <= 1
    assert seen.min() >= 5


def test_the_tail_of_an_epoch_opens_the_batch_that_the_next_epoch_fills():
    plan = SamplePlan(101, 8, seed=1)
    missed = np.setdiff1d(np.arange(101), sequence(plan, epochs=1)[:96])
    np.testing.assert_array_equal(np.sort(plan.batch(12)[:5]), missed)


@pytest.mark.parametrize("windowed", [{}, {"shard_rows": 10, "window": 40}])
def test_epochs_seeds_and_phases_differ_in_their_order(windowed):
    plans = [SamplePlan(1000, 1000, seed, phase, **windowed) for seed, phase in ((1, "p"), (2, "p"), (1, "q"))]
    rows = [plans[0].batch(1)] + [plan.batch(0) for plan in plans]
    for one, two in itertools.combinations(rows, 2):
        assert (one == two).mean() < 0.02


@every_plan
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_slices_of_the_ranks_make_up_the_batch_and_differ_by_at_most_one(plan, world_size):
    for step in (0, 3, 40):
        slices = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(slices), plan.batch(step))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


@every_plan
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_has_samples_at_every_step_whatever_divides_what(plan, world_size):
    for rank in range(world_size):
        assert all(len(plan.positions(step, rank, world_size)) for step in range(plan.steps(3)))


@every_plan
def test_starting_at_any_position_equals_skipping_to_it(plan):
    ids = plan.ids(np.arange(210))
    for start in (1, 6, 100, 101, 207):
        np.testing.assert_array_equal(plan.ids(np.arange(start, 210)), ids[start:])
    mixed_up = np.random.default_rng(0).permutation(210)
    np.testing.assert_array_equal(plan.ids(mixed_up), ids[mixed_up])
    assert plan.ids(np.arange(0)).shape == (0,)


def test_steps_complete_the_epochs_and_no_step_too_many():
    plan = SamplePlan(101, 8, seed=0)
    for epochs in (1, 2, 8, 50):
        assert (plan.steps(epochs) - 1) * 8 < 101 * epochs <= plan.steps(epochs) * 8
    assert SamplePlan(5, 16, seed=0).steps(3) == 1
    assert [plan.epoch(position) for position in (0, 100, 101, 202)] == [1, 1, 2, 3]


def test_a_window_reads_few_shards():
    plan = SamplePlan(100_200, 1000, seed=3, shard_rows=500, window=4000)
    windows = [plan.ids(np.arange(4000) + 4000 * window) for window in range(25)]
    # the rows of 8 shards, cut at both ends and perhaps with the short shard among them
    assert max(len(np.unique(ids // 500)) for ids in windows) <= 8 + 2
    # and yet from all over the data set
    assert min(np.ptp(ids) for ids in windows) > 40_000


@pytest.mark.parametrize("size", [*range(1, 40), 64, 100, 1000])
def test_the_permutation_reaches_every_place_once(size):
    permuted = permute(np.arange(size), size, round_keys("any", size))
    np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


@pytest.mark.parametrize(
    ("size", "windowed", "epochs"),
    [
        (2, {}, 200),
        (3, {}, 300),
        (4, {}, 600),
        (5, {}, 1200),
        (6, {}, 2160),
        (4, {"shard_rows": 3, "window": 4}, 480),
        (5, {"shard_rows": 2, "window": 64}, 840),  # a window above the data set is a full shuffle
        (4, {"shard_rows": 1, "window": 2}, 480),
    ],
)
def test_all_orders_of_a_few_rows_are_equally_likely(size, windowed, epochs):
    seen = [tuple(order) for order in orders(SamplePlan(size, size, seed=5, **windowed), epochs).tolist()]
    counts = [seen.count(order) for order in itertools.permutations(range(size))]
    assert_plausible(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize("size", [7, 8, 9, 15, 23, 25, 49])
def test_even_and_odd_permutations_are_equally_likely(size):
    # on a rectangle of odd sides every round is even, and the full range would never see an odd permutation
    epochs = 400
    signs = [np.linalg.det(np.eye(size)[order]) for order in orders(SamplePlan(size, size, seed=5), epochs)]
    assert abs(sum(signs)) < 3.3 * math.sqrt(epochs)


@pytest.mark.parametrize(
    "plan",
    [SamplePlan(size, size, seed=5) for size in (2, 3, 6, 8, 16, 25, 100)]
    + [
        SamplePlan(24, 24, seed=5, shard_rows=4, window=8),
        SamplePlan(20, 20, seed=5, shard_rows=6, window=8),  # nothing divides anything
        SamplePlan(20, 20, seed=5, shard_rows=6, window=64),
        SamplePlan(5, 5, seed=5, shard_rows=2, window=3),
    ],
    ids=lambda p: f"{p.num_samples}-{p.shard_rows}-{p.window}",
)
def test_every_row_comes_at_every_place_equally_often(plan):
    epochs, size = 300, plan.num_samples
    places = np.broadcast_to(np.arange(size), (epochs, size))
    table = np.zeros((size, size))
    np.add.at(table, (orders(plan, epochs), places), 1)
    squares = ((table - epochs / size) ** 2 / (epochs / size)).sum()
    # row and column sums are given: (size - 1)^2 degrees of freedom, each of variance size / (size - 1)
    assert_plausible(stats.chi2.sf(squares * (size - 1) / size, (size - 1) ** 2))


@pytest.mark.parametrize(("size", "epochs"), [(8, 600), (16, 600), (100, 600), (1500, 100)])
def test_neighbours_of_a_full_shuffle_are_uniform(size, epochs):
    # pairs that share no place are almost independent; lags up to 3 show neighbours of neighbours
    rows, firsts = orders(SamplePlan(size, size, seed=6), epochs), np.arange(0, size - 3, 4)
    for lag in (1, 2, 3):
        differences = (rows[:, firsts + lag] - rows[:, firsts]) % size
        assert_plausible(stats.chisquare(np.bincount(differences.ravel(), minlength=size)[1:]).pvalue)


def test_four_rows_at_the_corners_of_a_rectangle_scatter_as_any_four():
    # of 16 rows, laid out 4 x 4: what too few Feistel rounds betray first
    sides = list(itertools.combinations(range(4), 2))
    corners = [[4 * top + left, 4 * top + right, 4 * bottom + left, 4 * bottom + right]
               for (top, bottom), (left, right) in itertools.product(sides, sides)]  # fmt: skip

    def balance(fours: np.ndarray) -> np.ndarray:
        return fours // 4 @ [1, -1, -1, 1] % 4 == 0

    balanced = balance(orders(SamplePlan(16, 16, seed=6), 1000)[:, corners]).mean(axis=1)
    expected = balance(np.array(list(itertools.permutations(range(16), 4)))).mean()
    assert stats.ttest_1samp(balanced, expected).pvalue > 1e-3


def test_no_two_windows_are_shuffled_alike():
    # one shard, so that the rows of a window lie in their order before they are shuffled
    plan = SamplePlan(2000, 8, seed=1, shard_rows=2000, window=1000)
    windows = plan.ids(np.arange(4000)).reshape(4, 1000)
    for one, two in itertools.combinations(windows, 2):
        assert np.bincount((one - two) % 2000).max() < 15


def test_neighbours_in_a_window_are_any_two_of_its_rows():
    size, shards, windows, epochs = 12, (range(5), range(5, 10), range(10, 12)), ((0, 7), (7, 12)), 800
    plan = SamplePlan(size, size, seed=7, shard_rows=5, window=7)
    rows = plan.ids(np.arange(epochs)[:, None] * size + [0, 1, 7, 8])
    for (first, end), pairs in zip(windows, (rows[:, :2], rows[:, 2:]), strict=True):
        expected, observed = np.zeros((2, size, size))
        for shuffled, start in itertools.product(itertools.permutations(shards), range(size)):
            ring = np.roll(list(itertools.chain(*shuffled)), -start)
            for one, two in itertools.permutations(ring[first:end], 2):
                expected[one, two] += 1
        np.add.at(observed, (pairs[:, 0], pairs[:, 1]), 1)
        possible = expected > 0
        expected *= epochs / expected.sum()
        assert not observed[~possible].any()
        assert_plausible(stats.chisquare(observed[possible], expected[possible]).pvalue)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_variants_are_uniform_and_independent_of_order_and_of_each_other(count):
    plan = SamplePlan(1000, 16, seed=3, phase="p")
    positions = np.arange(40_000)
    drawn = plan.variants(positions, count)
    assert drawn.dtype == np.int64
    others = {"row": plan.ids(positions) % count, "place": positions % 1000 % count}
    # 1000 later lies the next epoch; powers of two are where a weak hash shows
    others |= {lag: plan.variants(positions + lag, count) for lag in (1, 2, 3, 8, 1000, 4096, 1 << 32, 1 << 40)}
    assert_plausible(stats.chisquare(np.bincount(drawn, minlength=count)).pvalue)
    for other in others.values():
        table = np.bincount(drawn * count + other, minlength=count**2).reshape(count, count)
        assert stats.chi2_contingency(table, correction=False).pvalue > 1e-3


def test_a_sample_meets_all_its_variants_and_any_slice_draws_the_same():
    plan = SamplePlan(10, 4, seed=3)
    drawn = plan.variants(np.arange(400), 4)
    for row in range(10):
        assert set(drawn[plan.ids(np.arange(400)) == row]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(plan.variants(np.array([399, 7]), 4), drawn[[399, 7]])
    assert not plan.variants(np.arange(5), 1).any()


@pytest.mark.parametrize("windowed", [{}, {"shard_rows": 1024, "window": 100_000}])
def test_fifty_epochs_of_a_billion_rows_are_planned_in_a_millisecond_anywhere(windowed):
    def make() -> SamplePlan:
        return SamplePlan(BILLION, 8192, seed=0, phase="p", **windowed)

    # the best of several: another process may hold the cores
    assert min(seconds(make) for _ in range(5)) < 1e-3
    plan = make()
    last = plan.steps(50) - 1
    for first in (0, last - 49):
        assert min(seconds(plan.rank_batch, step, 1023, 1024) for step in range(first, first + 50)) < 1e-3
    ids = plan.batch(last)
    assert len(np.unique(ids)) >= 8192 - 1  # the last batch may reach into epoch 51
    assert ids.min() >= 0
    assert ids.max() < BILLION


def seconds(call, *arguments) -> float:
    started = time.process_time()
    call(*arguments)
    return time.process_time() - started


def test_a_process_that_plans_a_billion_rows_stays_below_50_mb():
    pytest.importorskip("psutil", reason="psutil, which reads resident memory, is not installed")
    script = (
        "from ray_pipeline.data.plan import SamplePlan\n"
        f"plan = SamplePlan({BILLION}, 8192, seed=0, shard_rows=1024, window=100000)\n"
        "for step in range(0, plan.steps(50), plan.steps(50) // 100): plan.rank_batch(step, 5, 1024)\n"
        "import psutil; print(psutil.Process().memory_info().rss)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50e6


def test_numpy_integers_plan_as_integers_do():
    one, two = SamplePlan(100, 8, seed=3), SamplePlan(np.int64(100), np.int32(8), seed=np.int64(3))
    np.testing.assert_array_equal(one.batch(7), two.batch(np.int64(7)))


def test_the_order_is_the_recorded_one():
    # a run that is resumed with another order repeats some samples and skips others
    assert SamplePlan(20, 20, seed=0, phase="phase1").batch(0).tolist() == GOLDEN_FULL
    assert SamplePlan(20, 20, seed=0, phase="phase1", shard_rows=6, window=8).batch(1).tolist() == GOLDEN_WINDOWED
    assert SamplePlan(10**9, 4, seed=0, phase="phase1").batch(10**6).tolist() == GOLDEN_LARGE
    assert SamplePlan(20, 20, seed=0, phase="phase1").variants(np.arange(20), 8).tolist() == GOLDEN_VARIANTS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"window": 4}, "window and shard_rows go together"),
        ({"window": 0, "shard_rows": 4}, "window is 0"),
        ({"window": 4, "shard_rows": 0}, "shard_rows 0"),
    ],
)
def test_impossible_plans_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SamplePlan(**({"num_samples": 10, "global_batch": 4, "seed": 0} | arguments))


@pytest.mark.parametrize(("step", "rank", "world_size"), [(-1, 0, 1), (0, 2, 2), (0, -1, 2), (0, 0, 5)])
def test_slices_that_do_not_exist_are_refused(step, rank, world_size):
    with pytest.raises(ValueError, match=r"step|no slice"):
        SamplePlan(10, 4, seed=0).rank_batch(step, rank, world_size)


GOLDEN_FULL = [4, 16, 0, 9, 8, 19, 5, 12, 10, 1, 13, 6, 15, 17, 3, 18, 14, 2, 7, 11]
GOLDEN_WINDOWED = [15, 17, 14, 6, 13, 7, 12, 16, 2, 9, 11, 10, 3, 0, 8, 1, 18, 19, 4, 5]
GOLDEN_LARGE = [342258765, 651735152, 917110587, 710359724]
GOLDEN_VARIANTS = [4, 1, 5, 2, 0, 0, 3, 6, 2, 7, 6, 6, 0, 5, 3, 0, 7, 7, 6, 4]
