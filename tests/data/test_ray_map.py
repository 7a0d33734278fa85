"""A function over many items in Ray tasks: in order, few at a time, through a worker's death, and with its errors."""

import os
import signal
import time

import pytest
import ray

from ray_pipeline.data.ray_map import ray_map
from ray_pipeline.errors import UserError

# The functions are defined within the tests: Ray then sends them by value, and its workers need not find this file.


@pytest.mark.parametrize("together", [1, 4, 50])
def test_results_come_in_the_order_of_the_items(ray_cluster, together):
    def slow_first(item):
        time.sleep(0.1 if item == 0 else 0)
        return item * item

    assert list(ray_map(slow_first, range(37), together=together)) == [n * n for n in range(37)]
    assert list(ray_map(slow_first, [])) == []


def test_a_task_whose_process_dies_is_run_again(ray_cluster, tmp_path):
    def die_once(item):
        mark = tmp_path / f"died{item}"
        if item in (3, 8) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert list(ray_map(die_once, range(12), together=2)) == list(range(12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["died3", "died8"]


@pytest.mark.parametrize("error", [UserError("a.tif: found no pixel"), ZeroDivisionError("x")])
def test_what_the_function_raises_is_raised_as_it_is(ray_cluster, error):
    def fail_at_five(item):
        if item == 5:
            raise error
        return item

    results = ray_map(fail_at_five, range(9))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(type(error), match=str(error)):
        next(results)


def test_only_a_few_results_wait_for_a_slow_reader(ray_cluster, tmp_path):
    def mark(item):
        (tmp_path / str(item)).touch()
        return item

    results = ray_map(mark, range(100))
    assert next(results) == 0
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 2 * ray.cluster_resources()["CPU"]
    assert list(results) == list(range(1, 100))


@pytest.mark.parametrize("by", ["error", "close"])
def test_when_it_ends_early_no_task_writes_any_more(ray_cluster, tmp_path, by):
    def write_slowly(item):
        if item == 0 and by == "error":
            raise UserError("stop")
        if item > 0:
            time.sleep(1)
            (tmp_path / str(item)).touch()
        return item

    results = ray_map(write_slowly, range(20))
    if by == "error":
        with pytest.raises(UserError, match="stop"):
            next(results)
    else:
        assert next(results) == 0
        results.close()
    written = set(tmp_path.iterdir())
    assert len(written) < 12
    time.sleep(1.5)
    assert set(tmp_path.iterdir()) == written
