"""Blocks on this node's disk: fetched once by all processes, never wrong, never more than the limit."""

import fcntl
import hashlib
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.data import block_cache as module
from ray_pipeline.data.block_cache import BlockCache, block_cache
from ray_pipeline.errors import UserError

SIZE = 10_000
STORED = SIZE + 32
SPANS = [(0, 5), (9_000, 1_000), (17, 0)]


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def sha256(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


class Source:
    """Object storage, of whose answers the tests keep count."""

    def __init__(self, cache: BlockCache):
        self.cache, self.fetched = cache, []

    def read(self, number: int, spans=SPANS) -> list[bytes] | None:
        return self.cache.read(sha256(number), 128, SIZE, spans, lambda: self.fetch(number))

    def fetch(self, number: int) -> bytes:
        self.fetched.append(number)
        return content(number)


def expected(number: int, spans=SPANS) -> list[bytes]:
    return [content(number)[first : first + count] for first, count in spans]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "total")


@pytest.fixture
def source(tmp_path) -> Source:
    return Source(BlockCache(100 * STORED, str(tmp_path / "cache")))


def test_a_block_is_fetched_once_and_its_parts_are_those_of_the_file(source):
    for _ in range(3):
        for number in (1, 2):
            assert source.read(number) == expected(number)
    assert source.fetched == [1, 2]
    assert source.read(1, [(3, 4)]) == expected(1, [(3, 4)])


def test_a_cache_that_travels_finds_what_is_there(source):
    source.read(1)
    data = pickle.dumps(source.cache)
    assert len(data) < 300
    other = Source(pickle.loads(data))
    assert other.read(1) == expected(1)
    assert other.fetched == []


def test_blocks_of_another_file_or_of_another_place_in_it_are_not_taken(source):
    source.read(1)
    cache = source.cache
    assert cache.read(sha256(2), 128, SIZE, SPANS, lambda: content(2)) == expected(2)
    assert cache.read(sha256(1), 128 + SIZE, SIZE, SPANS, lambda: content(3)) == expected(3)
    assert cache.read(sha256(1), 128, 100, [(0, 100)], lambda: content(4)[:100]) == [content(4)[:100]]
    assert source.read(1) == expected(1)


def test_the_limit_is_never_passed_and_what_was_used_last_stays(tmp_path):
    folder = tmp_path / "cache"
    source = Source(BlockCache(10 * STORED, str(folder)))
    for number in range(10):
        source.read(number)
    assert bytes_in(folder) == 10 * STORED
    source.read(0)
    for number in range(10, 14):
        source.read(number)
        assert bytes_in(folder) <= 10 * STORED
    source.fetched.clear()
    for number in (0, 13, 12, 11, 10):
        assert source.read(number) == expected(number)
    assert source.fetched == []
    assert source.read(1) == expected(1)
    assert source.fetched == [1]


def test_a_block_larger_than_the_limit_is_read_all_the_same(tmp_path):
    source = Source(BlockCache(SIZE // 2, str(tmp_path / "cache")))
    for _ in range(2):
        assert source.read(1) == expected(1)
    assert source.fetched == [1, 1]
    assert bytes_in(tmp_path / "cache") == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[SIZE // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"\0" * STORED)


@pytest.mark.parametrize("spoil", [flip, cut, empty])
def test_a_damaged_block_is_fetched_again(source, spoil):
    source.read(1)
    (path,) = source.cache.place.glob("*-*")
    spoil(path)
    again = Source(pickle.loads(pickle.dumps(source.cache)))  # another process: this one has seen the block whole
    for _ in range(2):
        assert again.read(1) == expected(1)
    assert again.fetched == [1]


def test_a_block_that_is_cut_or_gone_while_it_is_used_is_fetched_again(source):
    source.read(1)
    (path,) = source.cache.place.glob("*-*")
    cut(path)
    assert source.read(1) == expected(1)
    path.unlink()
    assert source.read(1) == expected(1)
    shutil.rmtree(source.cache.place)
    assert source.read(1) == expected(1)
    assert source.fetched == [1] * 4


def apart() -> BaseContext:
    """Not forks of this process, whose Ray client they would break."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def read_all(cache: BlockCache, log: str, numbers: list[int]) -> None:
    def fetch(number: int) -> bytes:
        with open(log, "a") as file:  # appends are whole
            file.write(f"{number}\n")
        time.sleep(0.05)
        return content(number)

    for number in numbers:
        found = cache.read(sha256(number), 128, SIZE, SPANS, lambda number=number: fetch(number))
        if found != expected(number):
            os._exit(1)


def test_processes_that_want_the_same_blocks_fetch_each_of_them_once(source, tmp_path):
    """Fewer blocks than fit, so that none is fetched twice."""
    log = tmp_path / "fetched"
    orders = [np.random.default_rng(seed).permutation(12).tolist() for seed in range(4)]
    processes = [apart().Process(target=read_all, args=(source.cache, str(log), order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(12))


def test_processes_that_make_room_for_each_other_read_right_and_stay_below_the_limit(tmp_path):
    folder = tmp_path / "cache"
    cache = BlockCache(5 * STORED, str(folder))
    orders = [np.random.default_rng(seed).permutation(12).tolist() * 2 for seed in range(4)]
    processes = [apart().Process(target=read_all, args=(cache, str(tmp_path / "log"), order)) for order in orders]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        if (folder / "total").exists():
            most = max(most, total_now(folder))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < most <= 5 * STORED
    assert bytes_in(folder) <= 5 * STORED


def total_now(folder: Path) -> int:
    """Bytes of the blocks, while nobody may add or remove one."""
    sizes = []
    with open(folder / "total") as book:
        fcntl.flock(book, fcntl.LOCK_EX)
        for path in folder.glob("*-*"):
            with suppress(FileNotFoundError):  # one that is found damaged, or not kept, goes at any time
                sizes.append(path.stat().st_size)
    return sum(sizes)


def die(cache: BlockCache, number: int) -> None:
    cache.read(sha256(number), 128, SIZE, SPANS, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_kill_while_a_block_is_fetched_leaves_it_to_the_next_process(source):
    process = apart().Process(target=die, args=(source.cache, 1))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in source.cache.place.iterdir()] == [".part"]
    assert source.read(1) == expected(1)
    assert source.fetched == [1]
    assert not list(source.cache.place.glob("*.part"))


def test_what_killed_processes_left_makes_room(tmp_path):
    folder = tmp_path / "cache"
    source = Source(BlockCache(4 * STORED, str(folder)))
    source.read(0)
    for number in (8, 9):  # killed half way, and before the bytes were counted
        (folder / f"{sha256(number)}-128-{SIZE}.part").write_bytes(content(number)[: SIZE // 2])
    (folder / "total").write_bytes(b"12")
    for number in range(6):
        assert source.read(number) == expected(number)
        assert bytes_in(folder) <= 4 * STORED
    assert not list(folder.glob("*.part"))


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "thesis.tex").write_bytes(bytes(50 * STORED))
    source = Source(BlockCache(3 * STORED, str(tmp_path)))
    for number in range(9):
        assert source.read(number) == expected(number)
    assert source.fetched == list(range(9))
    assert (tmp_path / "thesis.tex").stat().st_size == 50 * STORED
    assert len(list(tmp_path.glob("*-128-*"))) in (2, 3)


def test_a_folder_that_cannot_be_used_is_told_once_and_nothing_is_fetched_in_vain(tmp_path):
    (tmp_path / "file").write_text("")
    source = Source(BlockCache(10 * STORED, str(tmp_path / "file" / "cache")))
    with pytest.warns(UserWarning, match=r"cache .*file/cache takes no more blocks .*data\.cache_dir") as told:
        assert [source.read(number) for number in range(3)] == [None] * 3
    assert len(told) == 1
    assert source.fetched == []


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_once_and_what_is_there_is_still_read(source):
    source.read(1)
    large = np.random.default_rng(5).bytes(30_000)
    with no_file_above(20_000), pytest.warns(UserWarning, match=r"takes no more blocks \(File too large\)") as told:
        found = [source.cache.read(sha256(n), 0, 30_000, [(9, 9)], lambda: large) for n in (5, 6)]
    assert found == [[large[9:18]], None]
    assert source.read(1) == expected(1)
    assert len(told) == 1
    assert [path.name for path in source.cache.place.glob("*-*")] == [f"{sha256(1)}-128-{SIZE}"]


def test_a_disk_that_is_nearly_full_is_left_alone(source, monkeypatch):
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(total=1000 * SIZE, free=100 * SIZE))
    with pytest.warns(UserWarning, match="less than 10% of the disk would stay free"):
        assert source.read(1) == expected(1)
    assert source.read(2) is None


def test_what_object_storage_refuses_is_no_fault_of_the_cache(source):
    def refuse() -> bytes:
        raise UserError("denied")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="denied"):
            source.cache.read(sha256(1), 128, SIZE, SPANS, refuse)
        assert source.read(1) == expected(1)
    assert not list(source.cache.place.glob("*.part"))


def test_the_default_folder_is_this_user_s_own_on_a_disk_of_the_node(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = Source(BlockCache(10 * STORED))
    assert source.read(1) == expected(1)
    (place,) = tmp_path.iterdir()
    assert place.name == f"ray_pipeline-{os.getuid()}"
    assert place.stat().st_mode & 0o077 == 0
    monkeypatch.delenv("TMPDIR")
    assert BlockCache(1).place.parent == Path("/var/tmp")


def test_a_link_in_the_place_of_the_default_folder_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"ray_pipeline-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="takes no more blocks"):
        assert Source(BlockCache(10 * STORED)).read(1) is None
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_config_says_how_much_and_where(tmp_path):
    phases = {"phases": [{"name": "one", "epochs": 1}]}
    assert block_cache(parse_config(phases)).limit == 20 * 2**30
    assert block_cache(parse_config({"data": {"cache_gib": 0}} | phases)) is None
    chosen = block_cache(parse_config({"data": {"cache_gib": 0.5, "cache_dir": str(tmp_path)}} | phases))
    assert (chosen.limit, chosen.place) == (2**29, tmp_path)
    assert block_cache(parse_config({"data": {"cache_dir": "~/c"}} | phases)).place == Path.home() / "c"
    for wrong in ("cache", "s3://bucket/cache", ""):
        with pytest.raises(UserError, match=r"data\.cache_dir.*absolute path"):
            parse_config({"data": {"cache_dir": wrong}} | phases)


def test_a_full_folder_is_listed_once_for_many_blocks(tmp_path, monkeypatch):
    source, listed = Source(BlockCache(100 * STORED, str(tmp_path))), []
    scandir = os.scandir
    monkeypatch.setattr(module.os, "scandir", lambda path: listed.append(path) or scandir(path))
    for number in range(140):
        source.read(number, [(0, 1)])
    assert len(listed) <= 1 + 5  # the first time, and each time a tenth is free again
