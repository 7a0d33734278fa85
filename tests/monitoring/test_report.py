import base64
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ray_pipeline.cli import main
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.event_log import EventLog
from ray_pipeline.monitoring.events import (
    CheckpointEvent,
    FaultEvent,
    PhaseEvent,
    SampleEvent,
    StepEvent,
    ValidationEvent,
    to_record,
)
from ray_pipeline.monitoring.metrics_file import metrics_path, read_events
from ray_pipeline.monitoring.phase_state import FILE, BestCheckpoint, PhaseState
from ray_pipeline.monitoring.plots import panels
from ray_pipeline.monitoring.report import write_report
from ray_pipeline.storage import Folder
from ray_pipeline.sweep_records import EpochResult, SweepRecord, TrialRecord, Winner, sweep_folder

ATTACK = "<script>alert('x')</script>"
CONFIG = "phases:\n- {name: phase1, epochs: 4}\n- {name: phase2, epochs: 2}\n"
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements as (tag, attributes) in order, text by the id of the section around it, and what was left open."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.open, self._section = [], {}, [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.all_text = " ".join(self.text.values())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("section", "header", "footer", "script", "style"):
            self._section = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        words = " ".join(data.split())
        self.text[self._section] = f"{self.text.get(self._section, '')} {words}".strip()

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, section):
        return " ".join(self.text[section].split())


def report(run_dir):
    return Page(write_report(run_dir))


def make_run(run_dir, status="running", losses=(), epochs=(1, 2), faults=(), phase="phase1"):
    """A run in its first phase, with one step, validation and checkpoint an epoch."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    state = PhaseState(current_phase=phase)
    progress = state.phase(phase)
    with EventLog(run_dir, phase) as log:
        log.emit(PhaseEvent(phase, "started", 0, "attempt 1"))
        for step, loss in enumerate(losses, start=1):
            parts = (0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.5)
            log.emit(StepEvent(phase, step, 8 * step, step, loss, 1e-4, 2.5, 61.75, parts[0], 0, 0.5, *parts[1:]))
            log.emit(ValidationEvent(phase, step, 8 * step, step, loss, 0.01, {"0.1": 2 * loss}, "ema_decay_0.9999"))
            log.emit(CheckpointEvent(phase, step, step, f"{phase}_epoch_{step:03d}.ckpt", "epoch", 0.5, 1.5))
        for epoch in epochs:
            log.emit(SampleEvent(phase, epoch, epoch, write_picture(run_dir, phase, epoch)))
        for step, kind, message in faults:
            log.emit(FaultEvent(phase, step, kind, message))
            state.record("fault", f"{phase}, step {step}: {message}")
    progress.status, progress.step, progress.steps = status, len(losses), 10 if status != "finished" else len(losses)
    progress.epoch, progress.epochs, progress.baseline_val_loss = len(losses), 4, 1.25
    if losses:
        last = f"{phase}_epoch_{len(losses):03d}.ckpt"
        progress.last, progress.best = last, BestCheckpoint(checkpoint=last, val_loss=0.6, epoch=len(losses))
        progress.checkpoints = [last]
    state.record("started", f"{phase}: attempt 1")
    state.save(run_dir / FILE)
    return run_dir, state


def write_picture(run_dir, phase, epoch, width=64):
    path = Path("samples", phase, f"samples_epoch_{epoch:03d}.png")
    (run_dir / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, width), 3 * epoch, np.uint8)).save(run_dir / path)
    return str(path)


def add_sweep(run_dir, message=""):
    results = [EpochResult(epoch=3, step=30, position=240, losses={"a": 0.4321}, standard_errors={"a": 0.01})]
    trials = [
        TrialRecord(number=0, values={"optimizer.lr": 0.002}, status="finished", results=results),
        TrialRecord(number=1, values={"optimizer.lr": 0.5}, status="failed", message=message),
    ]
    sweep_folder(run_dir).mkdir()
    SweepRecord(averages=["a"], trials=trials).save(sweep_folder(run_dir))
    Winner(
        trial=0, overrides={"optimizer.lr": 0.002}, track="a", checkpoint="c", phase="phase2", epoch=3, step=30,
        position=240, loss=0.4321, standard_error=0.01,
    ).save(sweep_folder(run_dir))  # fmt: skip


def test_page_loads_nothing_and_refuses_to(tmp_path):
    run_dir, _ = make_run(tmp_path / "run")
    page = report(run_dir)
    places = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert len(places) > 15
    assert all(place.startswith(("data:", "#")) for place in places)
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[\w+/=]+", "", page.source))
    assert "default-src 'none'" in page.source
    assert page.open == []
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {place[1:] for place in places if place.startswith("#")} <= set(identifiers)


def test_text_of_files_is_never_markup(tmp_path):
    run_dir, state = make_run(tmp_path / "run", faults=[(4, "skip", ATTACK)], phase="phase1")
    add_sweep(run_dir, message=ATTACK)
    (run_dir / "config.yaml").write_text(f"# {ATTACK}\n{CONFIG}")
    state.record(ATTACK, ATTACK)
    state.run = {"environment": {ATTACK: ATTACK}, "resources": {"GPUs": 2}}
    state.phase(ATTACK).status = "pending"
    state.save(run_dir / FILE)
    page = report(run_dir)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in page.source
    for section in ("progress", "sweep", "history", "about", "config"):
        assert ATTACK in page.words(section)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("pending", "starting", "Nothing is trained yet"),
        ("running", "healthy", "phase1, step 0 of 10"),
        ("stopped", "stopped", "train --resume"),
        ("starting", "starting", "is about to go on: phase1"),
        ("failed", "failed", "Training has failed at phase1, step 0 of 10"),
    ],
)
def test_state_is_said_at_a_glance(tmp_path, status, kind, words):
    run_dir, _ = make_run(tmp_path / "run", status)
    page = report(run_dir)
    assert f"{kind} " in page.words("header")
    assert words in page.words("header")
    assert any(box.get("id") == "refresh" for box in page.all("input"))


def test_a_run_that_failed_says_why(tmp_path):
    words = "RuntimeError: training stopped: rank 0: Traceback:\n  in step\nOutOfMemoryError: CUDA out of memory"
    run_dir, _ = make_run(tmp_path / "run", "failed", losses=(0.9,), faults=[(1, "failed", words)])
    assert "step 1 of 10: OutOfMemoryError: CUDA out of memory" in report(run_dir).words("header")


@pytest.mark.parametrize(("newest", "kind"), [(1.2, "healthy"), (1e10, "faults"), (1e50, "faults")])
def test_a_loss_far_above_that_of_the_start_is_no_health(tmp_path, newest, kind):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9, newest))
    with EventLog(run_dir, "phase1") as log:
        log.emit(StepEvent("phase1", 3, 24, 3, newest, 1e-4, 2.5, 61.75, 0.25))
    assert f"{kind} Training" in report(run_dir).words("header")


def test_a_finished_run_needs_no_refresh(tmp_path):
    run_dir, state = make_run(tmp_path / "run", "finished")
    assert "healthy phase1 is trained" in report(run_dir).words("header")
    state.phase("phase2").status = "finished"
    state.save(run_dir / FILE)
    page = report(run_dir)
    assert "finished All 2 phases are trained." in page.words("header")
    assert not [box for box in page.all("input") if box["type"] == "checkbox"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = report(tmp_path)
    assert "starting" in page.words("header")
    assert ("phase1 pending phase2 pending") in page.words("progress")
    assert page.all("img") == []


def test_there_is_no_page_where_there_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(no config.yaml\), expected the output_dir"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_those_of_the_records(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9, 0.8, 0.54321))
    page = report(run_dir)
    progress = page.words("progress")
    for words in (
        "Step 3 of 10 (30%)",
        "Training loss 0.5432",
        "Validation loss 0.5432 1.25 at the start, ratio 0.4346; best 0.6 after epoch 3",
        "Samples a second 61.75",
        "Model FLOP utilisation 50.0%",
        "phase1 running, 3 of 10 steps (30%), epoch 3 of 4",
    ):
        assert words in progress
    assert [(bar["value"], bar["max"]) for bar in page.all("progress")] == [("3", "10"), ("0", "1")]
    assert "data wait 0.25 50.0% forward and backward 0.125 25.0% optimizer 0.0625 12.5%" in page.words("time")
    assert "everything else 0.007812 1.6%" in page.words("time")
    assert "phase1_epoch_003.ckpt best, last epoch 3 3 0.5s 1.5s" in page.words("checkpoints")
    assert "phase1_epoch_002.ckpt cleaned up" in page.words("checkpoints")
    charts = [image["alt"] for image in page.all("img") if image["alt"].startswith("Chart of")]
    assert len(charts) == 6
    assert charts[0] == "Chart of training loss by step in phase1: newest 0.5432 at step 3"
    assert CONFIG.strip().splitlines()[0] in page.words("config")


def test_what_was_not_measured_is_said_so(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=())
    with EventLog(run_dir, "phase1") as log:
        log.emit(StepEvent("phase1", 1, 8, 1, 0.5, 1e-4, 1.0, 60.0, 0.01))
    page = report(run_dir)
    assert "optimizer not measured" in page.words("time")
    assert "Model FLOP utilisation not measured" in page.words("progress")


def test_losses_that_are_not_finite_are_no_health(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9,))
    with EventLog(run_dir, "phase1", resume_step=1) as log:
        log.emit(StepEvent("phase1", 2, 16, 2, math.nan, 1e-4, math.inf, 60.0, 0.01))
    page = report(run_dir)
    assert "faults The newest training loss is not finite" in page.words("header")
    assert "Training loss not finite (nan)" in page.words("progress")


def test_faults_are_seen_until_a_checkpoint_follows(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9, 0.8), faults=[(4, "save", "the disk is full")])
    page = report(run_dir)
    assert "faults Training goes on" in page.words("header")
    assert "save, the disk is full" in page.words("header")
    assert "Faults 1" in page.words("progress")
    assert "phase1 4 save the disk is full" in page.words("history")
    assert len([row for row in page.all("tr") if row.get("class") == "fault"]) == 2
    with EventLog(run_dir, "phase1", resume_step=10) as log:
        log.emit(CheckpointEvent("phase1", 5, 5, "phase1_step_5.ckpt", "safety", 0.1, 0.1))
    page = report(run_dir)
    assert "healthy" in page.words("header")
    assert "Faults 1" in page.words("progress")


def test_faults_are_marked_in_the_first_panel_only(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9, 0.8, 0.7), faults=[(2, "skip", "one"), (3, "skip", "two")])
    axes = Figure().subplots(2).ravel()
    drawings = list(panels(read_events(run_dir, "phase1")).values())
    for ax, draw in zip(axes, drawings, strict=False):
        draw(ax, epochs=False)
    crosses = [[line for line in ax.get_lines() if line.get_marker() == "x"] for ax in axes]
    assert [list(line.get_xdata()) for line in crosses[0]] == [[2, 3]]
    assert "fault (2)" in [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert crosses[1] == []


def shown_epochs(page):
    """Epochs of the pictures of samples in the page, and which of them is shown at first."""
    images = [image for image in page.all("img") if image["alt"].startswith("Samples of")]
    epochs = [int(re.search(r"epoch (\d+)", image["alt"])[1]) for image in images]
    shown = [epoch for epoch, image in zip(epochs, images, strict=True) if "hidden" not in image]
    return epochs, shown


def test_slider_has_each_epoch_and_shows_the_newest(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", epochs=(1, 2, 4))
    page = report(run_dir)
    assert shown_epochs(page) == ([1, 2, 4], [4])
    (slider,) = [box for box in page.all("input") if box["type"] == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    assert slider["aria-valuetext"] == "epoch 4, step 4"
    assert slider["id"] in [label["for"] for label in page.all("label") if "for" in label]


def test_of_many_epochs_some_are_left_out_but_not_the_newest(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", epochs=range(1, 41))
    page = report(run_dir)
    epochs, shown = shown_epochs(page)
    assert (len(epochs), epochs[0], shown) == (12, 1, [40])
    assert np.ptp(np.diff(epochs)) <= 1
    assert "28 more epoch(s) are left out" in page.words("samples")


def test_wide_pictures_are_made_smaller(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", epochs=())
    with EventLog(run_dir, "phase1", resume_step=10) as log:
        log.emit(SampleEvent("phase1", 4, 4, write_picture(run_dir, "phase1", 4, width=3000)))
    (image,) = [image for image in report(run_dir).all("img") if image["alt"].startswith("Samples of")]
    kind, data = image["src"].removeprefix("data:").split(";base64,")
    (tmp_path / "back").write_bytes(base64.b64decode(data))
    with Image.open(tmp_path / "back") as picture:
        assert (kind, picture.size) == ("image/webp", (1200, 16))
        assert abs(np.asarray(picture).mean() - 12) < 2


def test_missing_and_damaged_pictures_are_named(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", epochs=(1, 2, 3, 4))
    add_sweep(run_dir)
    (run_dir / "samples/phase1/samples_epoch_002.png").unlink()
    whole = (run_dir / "samples/phase1/samples_epoch_004.png").read_bytes()
    (run_dir / "samples/phase1/samples_epoch_004.png").write_bytes(whole[: len(whole) // 2])
    with EventLog(run_dir, "phase1", resume_step=10) as log:
        log.emit(SampleEvent("phase1", 5, 5, "../secret.png"))
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    page = report(run_dir)
    assert shown_epochs(page) == ([1, 3], [3])
    assert "samples/phase1/samples_epoch_002.png is missing" in page.words("samples")
    assert "samples/phase1/samples_epoch_004.png is damaged" in page.words("samples")
    assert "../secret.png lies outside of the run" in page.words("samples")
    assert "sweep/sweep.png is missing" in page.words("sweep")


def test_sweep_tells_trials_and_winner(tmp_path):
    run_dir, _ = make_run(tmp_path / "run")
    assert "sweep" not in report(run_dir).text
    add_sweep(run_dir, "out of memory")
    page = report(run_dir)
    assert "Trial 0 won with optimizer.lr=0.002: validation loss 0.4321 after epoch 3" in page.words("sweep")
    assert "0 0.002 finished winner 3 0.4321 1 0.5 failed out of memory none" in page.words("sweep")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=(0.9,))
    (run_dir / FILE).write_text('{"version": 1, "cur')
    sweep_folder(run_dir).mkdir()
    (sweep_folder(run_dir) / "sweep.json").write_text("{")
    (run_dir / "config.yaml").write_bytes(b"phases: [\xff")
    page = report(run_dir)
    assert f"{FILE} is damaged" in page.words("header")
    assert "sweep.json is damaged" in page.words("header")
    assert "config.yaml is not readable YAML" in page.words("header")
    assert "phase1_epoch_001.ckpt" in page.words("checkpoints")


def test_environment_and_resources(tmp_path):
    run_dir, state = make_run(tmp_path / "run")
    assert page_words(run_dir, "about") == "Environment and resources Environment Not recorded. Resources Not recorded."
    state.run = {"environment": {"python": "3.11.9"}, "resources": {"workers": 2}}
    state.save(run_dir / FILE)
    words = page_words(run_dir, "about")
    assert words == "Environment and resources Environment python 3.11.9 Resources workers 2"


def page_words(run_dir, section):
    return report(run_dir).words(section)


def test_page_of_a_long_run_stays_small(tmp_path):
    run_dir, _ = make_run(tmp_path / "run", losses=())
    record = json.dumps(to_record(StepEvent("phase1", 0, 8, 1, 0.5, 1e-4, 1.0, 60.0, 0.01)))
    begin, between, end = record.replace('"step": 0,', '"step": @,').replace('"loss": 0.5', '"loss": @').split("@")
    losses = np.random.default_rng(0).random(200_000).tolist()
    not_finite = '"nan"'
    with open(metrics_path(run_dir), "a") as file:
        for step, loss in enumerate(losses, start=1):
            file.write(f"{begin}{step}{between}{loss if step % 100 else not_finite}{end}\n")
    began = time.perf_counter()
    path = write_report(run_dir)
    assert path.stat().st_size < 2e6
    assert time.perf_counter() - began < 30  # seconds; a few on a machine with nothing else to do
    page = Page(path)
    svg = base64.b64decode(page.all("img")[0]["src"].partition("base64,")[2]).decode()
    assert "not finite (2000)" in svg


def test_rewriting_replaces_the_page_as_a_whole(tmp_path):
    run_dir, _ = make_run(tmp_path / "run")
    first = write_report(run_dir)
    shutil.rmtree(run_dir / "logs")
    assert write_report(str(run_dir)) == first == run_dir / "report.html"
    assert "Nothing is recorded yet" in Page(first).words("charts")
    assert [path.name for path in run_dir.glob(".*")] == []


def test_the_command_draws_the_page_anew_where_it_is_asked_for(tmp_path, capsys):
    run_dir, _ = make_run(tmp_path / "run")
    for words, page in (
        ([], run_dir / "report.html"),
        (["--out", str(tmp_path / "page.html")], tmp_path / "page.html"),
    ):
        assert main(["report", str(run_dir), *words]) == 0
        assert str(page) in capsys.readouterr().out
        assert "phase1" in Page(page).words("charts")
        page.unlink()
    assert main(["report", str(tmp_path / "nowhere")]) == 2


def test_the_page_of_a_run_in_object_storage_is_drawn_here(tmp_path, s3, monkeypatch):
    run_dir, _ = make_run(tmp_path / "run")
    remote = Folder(s3).child(tmp_path.name, "run")
    for path in run_dir.rglob("*"):
        if path.is_file():
            remote.child(*path.relative_to(run_dir).parts[:-1]).write(path.name, path.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["report", remote.location]) == 0
    assert "phase1" in Page(tmp_path / "report.html").words("charts")


def test_importing_the_report_imports_no_torch():
    program = "import sys; import ray_pipeline.monitoring.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
