import math
import resource

import cv2
import numpy as np
import pytest
from PIL import Image

from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    EventLog,
    PhaseEvent,
    StepEvent,
    ValidationEvent,
    read_events,
)
from ray_pipeline.monitoring.plots import plot_progress, sample_grid


def write_run(run_dir, losses, validated=True, ema=("ema_decay_0.9999",)):
    with EventLog(run_dir, "phase1", tensorboard=False) as log:
        for step, loss in enumerate(losses, start=1):
            epoch = 1 + (step - 1) // 10
            log.emit(StepEvent("phase1", step, 8 * step, epoch, loss, 1e-4, 2 * loss, 60.0, 0.01))
            if validated and step % 10 == 0:
                for track in ema:
                    levels = {"0.1": 2 * loss, "10": 0.1 * loss}
                    log.emit(ValidationEvent("phase1", step, 8 * step, epoch, loss, 0.01, levels, track))
                log.emit(CheckpointEvent("phase1", step, epoch, f"step_{step}", "epoch", 0.5))
            if step == 15:
                log.emit(PhaseEvent("phase1", "resumed", step, "attempt 2"))
    return read_events(run_dir, "phase1")


def plot(records, path, **options):
    plot_progress(records, path, title="phase1_unconditional", **options)
    with Image.open(path) as picture:
        assert picture.size == (1400, 900)
        return np.asarray(picture.convert("RGB"))


def shown_color(picture, color):
    """Number of pixels of exactly this colour."""
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


DECAY = [1.0 / (1 + 0.1 * step) for step in range(60)]
RED = (0xC0, 0x39, 0x2B)


def test_chart_shows_the_data(tmp_path):
    first = plot(write_run(tmp_path / "a", DECAY), tmp_path / "plots" / "a.png")
    other = plot(write_run(tmp_path / "b", DECAY[::-1]), tmp_path / "plots" / "b.png")
    again = plot(read_events(tmp_path / "a", "phase1"), tmp_path / "plots" / "a.png")
    assert (first != other).any()
    # The time of writing is part of the records, so the same records give the same picture.
    assert (first == again).all()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0]])
def test_chart_of_few_records_and_no_validation(tmp_path, losses):
    records = write_run(tmp_path, losses, validated=False)
    assert plot(records, tmp_path / "chart.png").std() > 0


def test_non_finite_losses_are_marked_in_red(tmp_path):
    healthy = plot(write_run(tmp_path / "a", DECAY, validated=False), tmp_path / "a.png")
    losses = [*DECAY[:5], math.nan, math.inf, *DECAY[7:]]
    diverged = plot(write_run(tmp_path / "b", losses, validated=False), tmp_path / "b.png")
    assert shown_color(healthy, RED) == 0
    assert shown_color(diverged, RED) > 20


def test_chart_of_a_run_that_diverged_completely(tmp_path):
    plot(write_run(tmp_path, [math.nan] * 20), tmp_path / "chart.png", baseline=math.nan)


def test_baseline_and_second_ema_track_appear(tmp_path):
    one = write_run(tmp_path / "a", DECAY)
    two = write_run(tmp_path / "b", DECAY, ema=("ema_decay_0.9999", "ema_power_0.05"))
    plain = plot(one, tmp_path / "plain.png")
    assert (plot(one, tmp_path / "baseline.png", baseline=0.3) != plain).any()
    assert (plot(two, tmp_path / "tracks.png") != plain).any()


def test_failing_write_leaves_the_old_chart(tmp_path):
    records = write_run(tmp_path / "run", DECAY[:3])
    path = tmp_path / "plots" / "latest_progress.png"
    old = plot(records, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            plot_progress(records[:1], path, title="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (np.asarray(Image.open(path).convert("RGB")) == old).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["latest_progress.png"]


def random_tiles(count, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size))


def expected_gray(tile):
    """-1 is black, 1 is white, to the nearest of 256 grays."""
    return np.floor((tile + 1) / 2 * 255 + 0.5).astype(np.uint8)


def find(picture, block):
    """(y, x) of the only place where the gray `block` stands in `picture`, pixel for pixel."""
    distance = cv2.matchTemplate(picture[..., 0], block, cv2.TM_SQDIFF)
    y, x = np.unravel_index(distance.argmin(), distance.shape)
    height, width = block.shape
    assert (picture[y : y + height, x : x + width] == block[..., None]).all()
    return int(y), int(x)


def test_one_column_is_a_square_grid_of_exact_pixels(tmp_path):
    tiles = random_tiles(5, 130)
    canvas = sample_grid([("18 steps", tiles)], tmp_path / "grid.png", title="phase1, epoch 5")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert canvas.dtype == np.uint8
    assert canvas.shape[2] == 3
    assert (picture == canvas).all()
    places = [find(picture, expected_gray(tile)) for tile in tiles]
    rows, columns = sorted({y for y, _ in places}), sorted({x for _, x in places})
    assert (len(rows), len(columns)) == (2, 3)
    assert places == [(rows[n // 3], columns[n % 3]) for n in range(5)]


def test_small_tiles_are_magnified_by_a_whole_factor(tmp_path):
    tiles = random_tiles(4, 32)
    canvas = sample_grid([("", tiles)], tmp_path / "grid.png", title="t")
    for tile in tiles:
        find(canvas, np.kron(expected_gray(tile), np.ones((4, 4), np.uint8)))


def test_hint_sample_and_target_of_a_tile_share_a_row(tmp_path):
    names = ["super_resolution", "sample", "target"]
    columns = [(name, random_tiles(2, 128, seed)) for seed, name in enumerate(names)]
    captions = {(0, 1): "24.1 dB", (1, 1): "a caption that is much wider than the tile it stands under"}
    plain = sample_grid(columns, tmp_path / "plain.png", title="phase2")
    captioned = sample_grid(columns, tmp_path / "captioned.png", captions=captions, title="phase2")
    for canvas in (plain, captioned):
        places = np.array([[find(canvas, expected_gray(tile)) for tile in tiles] for _, tiles in columns])
        assert (places[:, :, 0] == places[0, :, 0]).all()
        assert (places[:, :, 1] == places[:, :1, 1]).all()
        assert (np.diff(places[:, 0, 1]) > 128).all()
        assert (np.diff(places[0, :, 0]) > 128).all()
    paper = captioned[0, 0]
    # Nothing is cut off at the rim, and the captions are there.
    for rim in (captioned[0], captioned[-1], captioned[:, 0], captioned[:, -1]):
        assert (rim == paper).all()
    (y, x) = find(captioned, expected_gray(columns[1][1][0]))
    assert (captioned[y + 128 : y + 150, x : x + 128] != paper).any()
    (y, x) = find(captioned, expected_gray(columns[0][1][0]))
    assert (captioned[y + 128 : y + 150, x : x + 128] == paper).all()


def test_values_out_of_range_are_clipped_and_non_finite_ones_red(tmp_path):
    tile = np.zeros((1, 128, 128))
    tile[0, :64] = 3.0
    tile[0, 64:96] = -3.0
    tile[0, 96:] = np.nan
    canvas = sample_grid([("", tile)], tmp_path / "grid.png", title="t")
    assert shown_color(canvas, (255, 255, 255)) == 64 * 128
    assert shown_color(canvas, (0, 0, 0)) == 32 * 128
    assert shown_color(canvas, (255, 0, 0)) == 32 * 128


@pytest.mark.parametrize("shape", [(3, 16, 17), (2, 16, 16), (16, 16), (0, 16, 16)])
def test_columns_that_do_not_fit_together_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="one shape"):
        sample_grid([("a", np.zeros((3, 16, 16))), ("b", np.zeros(shape))], tmp_path / "grid.png", title="t")
