import io
import os
import pty
import re

import pytest

from ray_pipeline.monitoring.progress import Progress, format_bytes, format_count, format_seconds, track


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lines_of(stream):
    return stream.getvalue().splitlines()


def test_line_has_count_share_values_rate_and_time_left():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(400, "phase1_unconditional", stream=stream, samples_per_unit=8, clock=clock)
    clock.now += 78.0
    progress.update(120, epoch="3/10", loss=0.8421, val=0.861)
    # 120 steps of 8 samples in 78 s; 280 steps are left at 78/120 s each.
    assert lines_of(stream) == [
        "phase1_unconditional  step 120/400  30%  epoch 3/10  loss 0.842  val 0.861  12.3 samples/s  left 3m02s"
    ]


def test_rate_ignores_the_part_done_before_the_resume():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, "train", stream=stream, start=900, clock=clock)
    clock.now += 25.0
    progress.update(950)
    assert lines_of(stream) == ["train  step 950/1000  95%  2.00 steps/s  left 25s"]


def test_rate_is_that_of_the_last_minute():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100_000, "train", stream=stream, clock=clock)
    for step in range(1, 101):  # 1 step/s
        clock.now += 1.0
        progress.update(step)
    for step in range(101, 1001):  # then 10 steps/s for 90 s
        clock.now += 0.1
        progress.update(step)
    assert progress.rate(clock.now) == pytest.approx(10.0, rel=0.02)


def test_steps_that_took_no_work_do_not_count_for_the_rate():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, "train", stream=stream, clock=clock)
    clock.now += 10.0
    progress.update(10)
    clock.now += 0.01
    progress.update(110, counted=False)
    assert progress.line(clock.now) == "train  step 110/1000  11%  left ?"
    clock.now += 5.0
    progress.update(115)
    assert progress.line(clock.now) == "train  step 115/1000  11%  1.00 steps/s  left 14m45s"


def test_records_that_arrive_together_have_the_rate_of_their_own_times():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, "train", stream=stream, clock=clock, began=clock.now - 20.0)
    for step in range(1, 11):
        progress.update(step, at=clock.now - 20.0 + 2.0 * step)
    assert progress.rate(clock.now) == pytest.approx(0.5)
    progress.close()
    assert lines_of(stream)[-1] == "train  step 10/100  10%  took 20s"


def test_rate_of_slow_units_spans_more_than_the_window():
    clock = Clock()
    progress = Progress(10, "encode", stream=io.StringIO(), clock=clock)
    for step in (1, 2, 3):
        clock.now += 300.0
        progress.update(step)
    assert progress.rate(clock.now) == pytest.approx(1 / 300)


def test_memory_stays_bounded_over_many_updates():
    clock = Clock()
    progress = Progress(None, "read", stream=io.StringIO(), clock=clock)
    for step in range(1, 50_001):
        clock.now += 0.002
        progress.update(step)
    assert len(progress.points) < 200
    assert progress.rate(clock.now) == pytest.approx(500.0, rel=0.01)


def test_log_file_gets_plain_lines_at_a_limited_pace():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, "encode", "tile", stream=stream, clock=clock)
    for tile in range(1, 101):
        clock.now += 0.5
        progress.update(tile)
    progress.close("in latents/")
    lines = lines_of(stream)
    assert "\r" not in stream.getvalue()
    # 50 s at one line in 10 s, the first at once, and the last word.
    assert [line.split()[2] for line in lines] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert lines[-1] == "encode  tile 100/100  100%  took 50s  in latents/"


def test_values_stay_until_replaced():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, "train", stream=stream, min_seconds=0, clock=clock)
    progress.update(1, loss=0.9, val=0.95)
    progress.update(2, loss=0.8)
    assert "loss 0.8  val 0.95" in lines_of(stream)[-1]


def test_nothing_done_yet_has_no_rate_and_says_so():
    clock, stream = Clock(), io.StringIO()
    Progress(10, "train", stream=stream, start=4, clock=clock).update(4)
    assert lines_of(stream) == ["train  step 4/10  40%  left ?"]


def test_percent_is_not_100_before_the_end():
    clock, stream = Clock(), io.StringIO()
    Progress(1000, "train", stream=stream, clock=clock).update(999)
    assert " 99% " in lines_of(stream)[0]


def test_output_is_ascii_whatever_the_values_are():
    stream = io.StringIO()
    Progress(2, "Z\u00fcrich", stream=stream).update(1, note="\u00b5m", loss=float("nan"), lr=1e-4)
    assert stream.getvalue().isascii()
    assert "loss nan  lr 0.0001" in stream.getvalue()


def test_terminal_rewrites_one_line_that_never_wraps():
    controller, terminal = pty.openpty()
    clock = Clock()
    with os.fdopen(terminal, "w") as stream:
        os.system(f"stty cols 60 < {os.ttyname(stream.fileno())}")
        progress = Progress(100, "phase1_unconditional", stream=stream, clock=clock)
        for step in range(1, 6):
            clock.now += 0.6
            progress.update(step, epoch="1/10", loss=0.123, val=0.456, grad_norm=1.0)
        progress.close()
        shown = b""
        # The kernel hands terminal output over in pieces; the last one ends in the only newline.
        while not shown.endswith(b"\n"):
            shown += os.read(controller, 65536)
    os.close(controller)
    shown = shown.decode()
    rewritten = shown.replace("\r\n", "\n").split("\r")[1:]
    # Updates at 0.6, 1.8 and 3.0 s of one a second, then the close.
    assert len(rewritten) == 4
    assert all(len(line) == 59 for line in rewritten[:-1])
    assert shown.count("\n") == 1
    assert "took 3.0s" in rewritten[-1]


def test_stream_that_fails_does_not_stop_the_work(tmp_path):
    with open(tmp_path / "log.txt", "w") as stream:
        progress = Progress(10, "train", stream=stream, min_seconds=0)
        progress.update(1)
    progress.update(2)
    progress.close()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_close_writes_once():
    stream = io.StringIO()
    with Progress(1, "train", stream=stream) as progress:
        progress.close("done")
    assert len(lines_of(stream)) == 1


def test_track_yields_everything_and_counts_it():
    stream = io.StringIO()
    assert list(track([5, 6, 7], None, "prepare", "file", stream=stream)) == [5, 6, 7]
    assert re.fullmatch(r"prepare  file 3/3  100%  took \d\.\ds", lines_of(stream)[-1])


def test_track_without_a_length_shows_no_share():
    stream = io.StringIO()
    assert sum(track((n for n in range(4)), None, "prepare", "file", stream=stream)) == 6
    assert re.fullmatch(r"prepare  file 4  took \d\.\ds", lines_of(stream)[-1])


def test_track_says_when_it_was_stopped():
    stream = io.StringIO()

    def work():
        for n in track(range(10), None, "prepare", "file", stream=stream):
            if n == 3:
                raise RuntimeError("bad file")

    with pytest.raises(RuntimeError):
        work()
    assert re.search(r"file 3/10  30%  took \d\.\ds  stopped$", lines_of(stream)[-1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (161, "2m41s"),
        (3599.6, "1h00m"), (3720, "1h02m"), (86399, "1d00h"), (187200, "2d04h"),
        (float("nan"), "?"), (float("inf"), "?"), (-1, "?"),
    ],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (3.2 * 2**30, "3.20 GiB")],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999.7, "1.00k"), (12_345, "12.3k"), (675_129_632, "675M"), (2.87e9, "2.87B")],
)
def test_format_count(count, text):
    assert format_count(count) == text
