"""Sinks in threads of their own: what TensorBoard, W&B and others get, and that none of them holds training up."""

import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
from tensorboard.util.grpc_util import ChannelCredsType

from ray_pipeline.config import parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring import sinks
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    FaultEvent,
    PhaseEvent,
    SampleEvent,
    StepEvent,
    ValidationEvent,
    curves,
    from_record,
)
from ray_pipeline.monitoring.metrics_file import read_events
from ray_pipeline.monitoring.sink import SinkContext
from ray_pipeline.sections import MonitoringConfig
from ray_pipeline.sweep_records import sweep_folder

PHASE = "phase1_unconditional"
PLUGIN = """
import pathlib, time

class Told:
    def __init__(self, context):
        self.context, self.path = context, context.run_dir / "told.txt"
    def emit(self, event):
        with self.path.open("a") as file:
            file.write(f"{type(event).__name__} {event.step}\\n")
    def close(self):
        self.path.open("a").write("closed\\n")

class Slow(Told):
    close_seconds = 1
    def emit(self, event):
        time.sleep(3600)

class Uploading(Told):
    close_seconds = 60
    def close(self):
        time.sleep(2)
        super().close()

class Hanging(Told):
    close_seconds = 0.5
    def close(self):
        time.sleep(3600)

class Broken(Told):
    def emit(self, event):
        raise OSError("the server is gone")
    def close(self):
        (self.context.run_dir / "closed.txt").touch()
        raise OSError("nor does it say goodbye")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package with five sinks, as pip leaves it on the path."""
    folder = tmp_path / "site"
    info = folder / "told_sinks-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "told_sinks.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: told-sinks\nVersion: 1.0\n")
    points = "".join(
        f"{name.lower()} = told_sinks:{name}\n" for name in ("Told", "Slow", "Uploading", "Hanging", "Broken")
    )
    (info / "entry_points.txt").write_text(f"[ray_pipeline.sinks]\n{points}")
    monkeypatch.syspath_prepend(str(folder))


def step_event(step):
    return StepEvent(
        PHASE, step, 8 * step, 1, 1 / step, 1e-4, 0.5, 12.5, 0.01, 0, 0.64, 0.4, 0.1, 0.05, 0.01, 0.02, 0.3, 2e9
    )


def events(first, last):
    for step in range(first, last + 1):
        yield step_event(step)
        if step % 5 == 0:
            yield ValidationEvent(PHASE, step, 8 * step, 1, 0.5, 0.01, {"0.1": 0.5, "10": 0.25}, "ema_decay_0.999")
            yield CheckpointEvent(PHASE, step, 1, f"step_{step}", "safety", 0.25, 1.5)


def board(run_dir):
    """Points by tag and step, as TensorBoard's own reader shows them."""
    found = EventAccumulator(str(run_dir / "logs" / "tensorboard" / PHASE), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    return {(tag, point.step): point.value for tag in tags for point in found.Scalars(tag)}, found


def data_server(run_dir, newest):
    """Points by tag and step, and tags of texts, as the data server reads them, which `tensorboard --logdir` asks.

    newest: the last step in the last file, which it reads last.
    """
    ingester = SubprocessServerDataIngester(
        get_server_binary(),
        str(run_dir / "logs" / "tensorboard"),
        reload_interval=0,
        channel_creds_type=ChannelCredsType.LOCAL,
        samples_per_plugin={"scalars": 0},
    )
    ingester.start()
    points, deadline = {}, time.monotonic() + 60
    while ("train/loss", newest) not in points:
        assert time.monotonic() < deadline
        scalars = ingester.data_provider.read_scalars(
            RequestContext(), experiment_id="any", plugin_name="scalars", downsample=10**6
        )
        points = {(tag, one.step): one.value for tag, series in scalars.get(PHASE, {}).items() for one in series}
    texts = ingester.data_provider.list_tensors(RequestContext(), experiment_id="any", plugin_name="text")
    return points, set(texts.get(PHASE, {}))


def told(run_dir):
    """The same points as the records have them."""
    return {
        (name, event.step): value
        for event in map(from_record, read_events(run_dir, PHASE))
        for name, value in curves(event).items()
    }


def assert_equal(shown, expected):
    assert shown.keys() == expected.keys()
    assert np.allclose(list(shown.values()), [expected[key] for key in shown], rtol=1e-6, equal_nan=True)


def test_a_trial_is_named_behind_its_run_so_that_those_of_two_sweeps_differ(tmp_path):
    named = [SinkContext(folder, PHASE).run_name for folder in (tmp_path, sweep_folder(tmp_path) / "trial_000")]
    assert named == [tmp_path.name, f"{tmp_path.name}/trial_000"]


def test_tensorboards_own_reader_gets_what_the_records_hold(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "grid.png")
    config = parse_config({"optimizer": {"lr": 3e-4}, "phases": [{"name": PHASE, "epochs": 2}]}).dump()
    with EventLog(tmp_path, PHASE, ("tensorboard",), config=config) as log:
        log.emit(PhaseEvent(PHASE, "started", 0, "attempt 1"))
        for event in events(1, 20):
            log.emit(event)
        log.emit(SampleEvent(PHASE, 20, 1, "grid.png"))
        log.emit(FaultEvent(PHASE, 20, "save", "the disk is full"))
    shown, reader = board(tmp_path)
    assert_equal(shown, told(tmp_path))
    assert reader.Tags()["images"] == ["samples"]
    assert {"fault/text_summary", "phase/text_summary"} <= set(reader.Tags()["tensors"])
    metadata = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in metadata
    assert b"phase.epochs" in metadata


def test_after_a_kill_and_a_resume_tensorboard_has_every_point_of_the_records_once(tmp_path):
    program = (
        "import os, signal, sys\n"
        "sys.path[:0] = [sys.argv[2]]\n"
        "from test_sinks import EventLog, PHASE, events\n"
        "log = EventLog(sys.argv[1], PHASE, ('tensorboard',), resume_step=0)\n"
        "for event in events(1, 400):\n"
        "    log.emit(event)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), os.path.dirname(__file__)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    for resume_step in (300, 250, 265):  # of the last but one the first file is cut, too
        with EventLog(tmp_path, PHASE, ("tensorboard",), resume_step=resume_step) as log:
            for event in events(resume_step + 1, resume_step + 20):
                log.emit(event)
        assert [record["step"] for record in read_events(tmp_path, PHASE, "step")] == list(range(1, resume_step + 21))
        assert_equal(board(tmp_path)[0], told(tmp_path))


def test_no_reader_of_tensorboard_shows_what_a_killed_attempt_told_after_the_resume_step_but_its_faults(tmp_path):
    config = parse_config({"phases": [{"name": PHASE, "epochs": 2}]}).dump()
    with EventLog(tmp_path, PHASE, ("tensorboard",), config=config, resume_step=-1) as log:
        log.emit(FaultEvent(PHASE, 20, "save", "the disk is nearly full"))  # the sink has not read the records yet
        for event in events(1, 43):
            log.emit(event)
        log.emit(PhaseEvent(PHASE, "stopped", 43, "stopped after step 43"))
        log.emit(FaultEvent(PHASE, 41, "save", "the disk is full"))
    folder = tmp_path / "logs" / "tensorboard" / PHASE
    (first,) = folder.iterdir()
    with first.open("ab") as file:
        file.write(struct.pack("<Q", 100) + b"torn")
    with EventLog(tmp_path, PHASE, ("tensorboard",), config=config, resume_step=22) as log:
        for event in events(23, 24):
            log.emit(event)
    assert log.troubles() == []
    expected = told(tmp_path)
    assert {step for tag, step in expected if tag == "checkpoint/seconds"} == {5, 10, 15, 20}
    shown, texts = data_server(tmp_path, 24)
    assert_equal(shown, expected)
    assert texts == {"fault/text_summary"}  # faults hold for good
    points, reader = board(tmp_path)
    assert_equal(points, expected)
    faults = [(record["step"], f"save: {record['message']}") for record in read_events(tmp_path, PHASE, "fault")]
    shown = [(one.step, one.tensor_proto.string_val[0].decode()) for one in reader.Tensors("fault/text_summary")]
    assert shown == faults
    assert [step for step, _ in faults] == [20, 41]
    assert b"phase.epochs" in reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert sorted(folder.iterdir())[0] == first
    assert len(list(folder.iterdir())) == 2


def test_a_superseded_attempt_that_still_lives_writes_nothing_that_tensorboard_shows(tmp_path):
    before = EventLog(tmp_path, PHASE, ("tensorboard",), resume_step=0)
    for event in events(1, 10):
        before.emit(event)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*tfevents*")) or len(board(tmp_path)[0]) < len(told(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with EventLog(tmp_path, PHASE, ("tensorboard",), resume_step=10) as log:
        log.emit(step_event(11))
    for event in events(21, 25):
        before.emit(event)
    before.close()
    assert_equal(data_server(tmp_path, 11)[0], told(tmp_path))


def test_a_picture_that_is_gone_or_torn_is_told_once_and_costs_the_sink_nothing_else(tmp_path):
    Image.new("L", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with EventLog(tmp_path, PHASE, ("tensorboard",)) as log:
        for step, name in enumerate(("gone.png", "torn.png", "whole.png"), start=1):
            log.emit(SampleEvent(PHASE, step, step, name))
            log.emit(step_event(step))
    (words,) = log.troubles()
    assert words.endswith("tensorboard leaves out pictures that cannot be read, first gone.png (FileNotFoundError)")
    points, reader = board(tmp_path)
    assert_equal(points, told(tmp_path))
    assert [picture.step for picture in reader.Images("samples")] == [3]


def test_a_sink_of_another_package_gets_every_event_in_order(tmp_path, plugin):
    with EventLog(tmp_path, PHASE, ("told",)) as log:
        log.emit(PhaseEvent(PHASE, "started", 0, "attempt 1"))
        log.emit(step_event(1))
    assert (tmp_path / "told.txt").read_text().split("\n") == ["PhaseEvent 0", "StepEvent 1", "closed", ""]


def test_a_sink_that_hangs_or_breaks_neither_slows_nor_stops_and_says_so_once(tmp_path, plugin, caplog):
    with caplog.at_level(logging.WARNING):
        log = EventLog(tmp_path, PHASE, ("slow", "broken", "told"))
        started = time.monotonic()
        for event in events(1, 2000):
            log.emit(event)
            time.sleep(0.0005)
        assert time.monotonic() - started < 60
        log.close()
    found = log.troubles()
    assert sorted(words.split()[2] for words in found) == ["broken", "slow"]
    assert "OSError: the server is gone" in " ".join(found)
    assert (tmp_path / "closed.txt").exists()
    assert len(caplog.records) == 2
    assert log.troubles() == []
    lines = (tmp_path / "told.txt").read_text().split("\n")
    assert lines.count("closed") == 1
    assert len(lines) == len(list(events(1, 2000))) + 2
    assert len(read_events(tmp_path, PHASE, "step")) == 2000


def test_the_end_of_a_phase_waits_as_long_as_a_sink_says_that_it_needs(tmp_path, plugin):
    log = EventLog(tmp_path, PHASE, ("hanging", "uploading"))
    log.emit(step_event(1))
    while not (tmp_path / "told.txt").exists() or (tmp_path / "told.txt").read_text().count("StepEvent") < 2:
        time.sleep(0.05)
    log.close()
    assert (tmp_path / "told.txt").read_text().split("\n")[-2:] == ["closed", ""]
    (words,) = log.troubles()
    assert words.endswith("hanging is switched off for this attempt: it was not done 0.5 s after the phase ended")


def test_a_config_chooses_sinks_and_unknown_ones_are_refused(plugin):
    assert sinks.chosen_sinks(MonitoringConfig()) == ("tensorboard", "ray")
    assert sinks.chosen_sinks(MonitoringConfig(tensorboard=False, ray_metrics=False, sinks=("told",))) == ("told",)
    with pytest.raises(UserError, match="no installed package offers 'nobody'"):
        sinks.chosen_sinks(MonitoringConfig(sinks=("nobody",)))
    with pytest.raises(UserError, match="lists wandb, which has a key of its own"):
        sinks.chosen_sinks(MonitoringConfig(sinks=("wandb",)))


def wandb_records(data):
    """Messages of a .wandb file: LevelDB's log format after a header of 7 bytes, chunks in blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a message, or its last part
            yield parts
            parts = b""


def test_an_offline_run_of_wandb_holds_every_point_the_config_and_the_pictures(tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    config = parse_config({"monitoring": {"wandb": "offline"}, "phases": [{"name": PHASE, "epochs": 2}]}).dump()
    for first, last, resume_step in ((1, 10, None), (11, 20, 10)):
        with EventLog(tmp_path, PHASE, ("wandb",), config=config, resume_step=resume_step) as log:
            for event in events(first, last):
                log.emit(event)
            log.emit(SampleEvent(PHASE, last, 1, "grid.png"))
        assert log.troubles() == []
        time.sleep(1)  # wandb names a folder by the second, and no run starts twice within one
    found, ids, pictures = {}, set(), 0
    for path in sorted((tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            step = values.pop(f"{PHASE}/step", None)
            pictures += f"{PHASE}/samples/path" in values
            numbers = {name: value for name, value in values.items() if name.startswith(f"{PHASE}/")}
            found |= {
                (name.removeprefix(f"{PHASE}/"), int(step)): float(value)
                for name, value in numbers.items()
                if not name.startswith(f"{PHASE}/samples/")
            }
    assert len(ids) == 1
    assert pictures == 2
    expected = {key: value for key, value in told(tmp_path).items() if not math.isnan(value)}
    assert_equal(found, expected)
