import json
import logging
import math
import resource
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    PhaseEvent,
    SampleEvent,
    StepEvent,
    ValidationEvent,
    from_record,
)
from ray_pipeline.monitoring.metrics_file import metrics_path, read_events


def step_event(step, phase="phase1", loss=None, lr=1e-4):
    loss = 1.0 / step if loss is None else loss
    return StepEvent(phase, step, step * 8, 1 + step // 10, loss, lr, 0.5, 12.5, 0.01)


BOARD = ("tensorboard",)


def emit_steps(run_dir, phase, steps, resume_step=None, sinks=BOARD):
    with EventLog(run_dir, phase, sinks, resume_step=resume_step) as log:
        for step in steps:
            log.emit(step_event(step, phase))


def crc32c(data):
    """Bit by bit, from the definition (reflected polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecords(path):
    """Event messages of a TFRecord file: length, its checksum, data, its checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        message = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 8)[0] == masked(data[at : at + 8])
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(message)
        yield event_pb2.Event.FromString(message)
        at += 16 + length


def tensorboard_events(run_dir, phase):
    """What TensorBoard shows: files by name, and a session start at step k hides earlier events from k on."""
    shown = []
    files = sorted((run_dir / "logs" / "tensorboard" / phase).iterdir())
    for path in files:
        assert "tfevents" in path.name
        for number, event in enumerate(tfrecords(path)):
            assert number > 0 or event.file_version == "brain.Event:2"
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [old for old in shown if old.step < event.step]
            elif event.HasField("summary"):
                shown.append(event)
    return shown


def tensorboard_curve(run_dir, phase, tag):
    return [
        (event.step, value.simple_value)
        for event in tensorboard_events(run_dir, phase)
        for value in event.summary.value
        if value.tag == tag
    ]


def steps_in_jsonl(run_dir, phase):
    return [record["step"] for record in read_events(run_dir, phase, "step")]


@contextmanager
def disk_full_at(size):
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_constant(word):
    raise AssertionError(f"{word} is no JSON")


def test_crc32c_of_this_test_gives_the_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def test_every_event_is_one_strict_json_line_and_reads_back(tmp_path):
    events = [
        PhaseEvent("phase1", "started", 0, "attempt 1"),
        step_event(1, loss=np.float32(0.5)),
        ValidationEvent("phase1", 2, 16, 1, 0.75, 0.01, {"0.1": 0.5, "10": 0.25}, "ema_decay_0.9999"),
        SampleEvent("phase1", 2, 1, "samples/phase1/samples_epoch_001.png"),
        CheckpointEvent("phase1", 2, 1, "phase1_epoch_001.ckpt", "epoch", 1.5, 2.5),
    ]
    with EventLog(tmp_path, "phase1", BOARD) as log:
        for event in events:
            log.emit(event)
    lines = metrics_path(tmp_path).read_text(encoding="ascii").splitlines()
    strict = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    assert [record["event"] for record in strict] == ["phase", "step", "validation", "sample", "checkpoint"]
    assert all(record["time"].endswith("+00:00") for record in strict)
    for event, record in zip(events, read_events(tmp_path), strict=True):
        again = from_record(record)
        assert {name: value for name, value in vars(again).items() if value == value} == {
            name: value for name, value in vars(event).items() if value == value
        }
    assert [record["event"] for record in read_events(tmp_path, event="sample")] == ["sample"]
    assert read_events(tmp_path, phase="phase2") == []


def test_non_finite_losses_stay_visible_in_strict_json(tmp_path):
    with EventLog(tmp_path, "phase1", BOARD) as log:
        log.emit(step_event(1, loss=math.nan, lr=math.inf))
        log.emit(ValidationEvent("phase1", 1, 8, 1, -math.inf, 0.0, {"0.1": math.nan}, "nan"))
    raw = [json.loads(line, parse_constant=refuse_constant) for line in metrics_path(tmp_path).read_text().splitlines()]
    assert (raw[0]["loss"], raw[0]["lr"], raw[1]["loss"]) == ("nan", "inf", "-inf")
    step, validation = read_events(tmp_path)
    assert math.isnan(step["loss"])
    assert step["lr"] == math.inf
    assert validation["loss"] == -math.inf
    assert math.isnan(validation["loss_by_sigma"]["0.1"])
    # A text that looks like a number stays a text.
    assert validation["ema"] == "nan"
    assert math.isnan(tensorboard_curve(tmp_path, "phase1", "train/loss")[0][1])


def test_a_run_without_records_reads_as_empty(tmp_path):
    assert read_events(tmp_path) == []


def test_torn_last_line_is_left_out_and_never_joined_to_the_next_record(tmp_path, caplog):
    emit_steps(tmp_path, "phase1", [1, 2, 3], sinks=())
    path = metrics_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    assert steps_in_jsonl(tmp_path, "phase1") == [1, 2]
    emit_steps(tmp_path, "phase1", [3, 4], sinks=())
    assert steps_in_jsonl(tmp_path, "phase1") == [1, 2, 3, 4]
    assert len(path.read_bytes().splitlines()) == 4
    assert not caplog.records


def test_damaged_line_in_the_middle_is_reported_not_fatal(tmp_path, caplog):
    emit_steps(tmp_path, "phase1", [1, 2, 3], sinks=())
    path = metrics_path(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\x00\xff\n" + lines[2])
    assert steps_in_jsonl(tmp_path, "phase1") == [1, 3]
    assert "line 2" in caplog.text


def test_resume_cuts_later_steps_of_this_phase_only(tmp_path):
    emit_steps(tmp_path, "phase1", range(1, 21), sinks=())
    emit_steps(tmp_path, "phase2", range(1, 13), sinks=())
    phase1_bytes = metrics_path(tmp_path).read_bytes().splitlines()[:20]
    emit_steps(tmp_path, "phase2", range(8, 15), resume_step=7, sinks=())
    assert steps_in_jsonl(tmp_path, "phase2") == list(range(1, 15))
    assert metrics_path(tmp_path).read_bytes().splitlines()[:20] == phase1_bytes
    assert sorted(path.name for path in metrics_path(tmp_path).parent.iterdir()) == ["metrics.jsonl"]


def test_resume_at_zero_forgets_the_steps_of_an_attempt_that_committed_nothing(tmp_path):
    emit_steps(tmp_path, "phase1", range(1, 6))
    emit_steps(tmp_path, "phase1", range(1, 4), resume_step=0)
    assert steps_in_jsonl(tmp_path, "phase1") == [1, 2, 3]
    assert [step for step, _ in tensorboard_curve(tmp_path, "phase1", "train/loss")] == [1, 2, 3]


def test_after_a_kill_and_a_resume_both_sinks_hold_every_step_once(tmp_path):
    emit_steps(tmp_path, "other", [1, 2])
    program = (
        "import os, signal, sys\n"
        "from ray_pipeline.monitoring.event_log import EventLog\n"
        "from ray_pipeline.monitoring.events import StepEvent\n"
        "log = EventLog(sys.argv[1], 'phase1', ('tensorboard',), resume_step=0)\n"
        "for step in range(1, 31):\n"
        "    log.emit(StepEvent('phase1', step, step, 1, float(step), 0.0, 0.0, 0.0, 0.0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    # What was emitted is in the records although nothing was closed; TensorBoard gets what it lacks at the next start.
    assert steps_in_jsonl(tmp_path, "phase1") == list(range(1, 31))
    with open(metrics_path(tmp_path), "ab") as file:
        file.write(b'{"event": "step", "phase": "phase1", "st')

    emit_steps(tmp_path, "phase1", range(21, 41), resume_step=20)
    expected = [(step, float(step) if step <= 20 else 1.0 / step) for step in range(1, 41)]
    jsonl = [(record["step"], record["loss"]) for record in read_events(tmp_path, "phase1", "step")]
    assert jsonl == expected
    curve = tensorboard_curve(tmp_path, "phase1", "train/loss")
    assert [step for step, _ in curve] == [step for step, _ in expected]
    assert np.allclose([loss for _, loss in curve], [loss for _, loss in expected], rtol=1e-6)
    assert steps_in_jsonl(tmp_path, "other") == [1, 2]
    assert [step for step, _ in tensorboard_curve(tmp_path, "other", "train/loss")] == [1, 2]


def test_a_superseded_writer_cannot_write_into_the_new_attempts_records(tmp_path):
    old = EventLog(tmp_path, "phase1")
    old.emit(step_event(1))
    with EventLog(tmp_path, "phase1", resume_step=1) as new:
        new.emit(step_event(2))
        old.emit(step_event(3))
    old.close()
    assert steps_in_jsonl(tmp_path, "phase1") == [1, 2]


def test_tensorboard_shows_validation_by_track_and_noise_level(tmp_path):
    with EventLog(tmp_path, "phase1", BOARD) as log:
        log.emit(PhaseEvent("phase1", "started", 0, "attempt 1"))
        log.emit(ValidationEvent("phase1", 5, 40, 1, 0.75, 0.125, {"0.1": 0.5}, "ema_decay_0.9999"))
    values = {value.tag: value for event in tensorboard_events(tmp_path, "phase1") for value in event.summary.value}
    assert values["validation/loss/ema_decay_0.9999"].simple_value == 0.75
    assert values["validation/standard_error/ema_decay_0.9999"].simple_value == 0.125
    assert values["validation_by_sigma/ema_decay_0.9999/0.1"].simple_value == 0.5
    assert values["phase/text_summary"].tensor.string_val == [b"attempt 1"]


@pytest.mark.parametrize("gray", [True, False])
def test_tensorboard_image_holds_the_pixels(tmp_path, gray):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    if gray:
        picture[...] = picture[..., :1]
    Image.fromarray(picture).save(tmp_path / "samples.png")
    with EventLog(tmp_path, "phase1", BOARD) as log:
        log.emit(SampleEvent("phase1", 7, 1, "samples.png"))
    (event,) = tensorboard_events(tmp_path, "phase1")
    (tmp_path / "back.png").write_bytes(event.summary.value[0].image.encoded_image_string)
    assert (event.step, event.summary.value[0].tag) == (7, "samples")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "back.png").convert("RGB")), picture)


def test_sink_that_cannot_open_warns_once_and_the_other_goes_on(tmp_path, caplog):
    metrics_path(tmp_path).mkdir(parents=True)
    with caplog.at_level(logging.WARNING), EventLog(tmp_path, "phase1", BOARD) as log:
        log.emit(step_event(1))
        log.emit(step_event(2))
    assert len(caplog.records) == 1
    assert "metrics.jsonl is switched off" in caplog.text
    assert [step for step, _ in tensorboard_curve(tmp_path, "phase1", "train/loss")] == [1, 2]


def test_full_disk_warns_once_a_sink_and_never_raises(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), EventLog(tmp_path, "phase1", BOARD) as log:
        log.emit(step_event(1))
        with disk_full_at(600):
            for step in range(2, 12):
                log.emit(step_event(step))
            until = time.monotonic() + 30
            while len(caplog.records) < 2 and time.monotonic() < until:
                time.sleep(0.01)
        log.emit(step_event(13))
    assert sorted("tensorboard" in record.getMessage() for record in caplog.records) == [False, True]
    # What the full disk refused is there since it took more, and the next start finds no torn end.
    before = steps_in_jsonl(tmp_path, "phase1")
    assert before == [*range(1, 12), 13]
    emit_steps(tmp_path, "phase1", [50], sinks=())
    assert steps_in_jsonl(tmp_path, "phase1") == [*before, 50]


def test_close_twice_is_harmless(tmp_path, caplog):
    log = EventLog(tmp_path, "phase1", BOARD)
    log.close()
    log.close()
    assert not caplog.records


def test_importing_monitoring_does_not_import_torch():
    program = (
        "import sys\n"
        "from ray_pipeline.monitoring import events, phase_state, plots, progress\n"
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
