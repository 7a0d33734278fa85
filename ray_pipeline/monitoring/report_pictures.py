"""Pictures inside the report page: charts as SVG, samples as WebP, both as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from ray_pipeline.monitoring.plots import panels

EPOCHS = 12
_WIDTH, _QUALITY = 1200, 80
# Inches: a panel is shown about as large on a phone, so that its text can be read there.
_CHART = (4.7, 3.2)
# Text is laid out in matplotlib's own font, which few devices have; any other is to be the reader's usual one.
_FONT_FAMILY = re.compile(r"font(-family)?:([^;\"]*)'DejaVu Sans'[^;\"]*sans-serif")
_COORDINATES = re.compile(r' d="[^"]*"')


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its size in pixels and what it shows."""

    uri: str
    width: int
    height: int
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Samples:
    """Pictures of a phase by epoch, the newest last; left_out: how many epochs are not shown; troubles: in words."""

    pictures: list[Picture]
    left_out: int
    troubles: list[str] = field(default_factory=list)


def chart_pictures(phase: str, records: Sequence[dict], baseline: float | None) -> list[dict[str, str]]:
    """The panels of a phase from its records: `uri`, `alt`, `width` and `height` of each."""
    newest = _newest_values(records)
    pictures = []
    for name, draw in panels(records, baseline=baseline).items():
        figure = Figure(figsize=_CHART, facecolor="white")
        ax = figure.subplots()
        draw(ax, epochs=True)
        has_right_axis = len(figure.axes) > 1
        figure.subplots_adjust(left=0.11, right=0.91 if has_right_axis else 0.97, bottom=0.155, top=0.81)
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        pictures.append(
            {
                "uri": _uri("image/svg+xml", _slim(buffer.getvalue()).encode()),
                "alt": f"Chart of {name} by step in {phase}: {newest.get(name, 'nothing recorded yet')}",
                "width": str(round(96 * _CHART[0])),
                "height": str(round(96 * _CHART[1])),
            }
        )
    return pictures


def sample_pictures(run_dir: Path, records: Sequence[dict]) -> Samples | None:
    """Of the sample records of a phase: at most EPOCHS pictures, evenly spread, the newest among them."""
    by_epoch = {record["epoch"]: record for record in records}
    if not by_epoch:
        return None
    epochs = sorted(by_epoch)
    count = min(len(epochs), EPOCHS)
    chosen = {epochs[round(place * (len(epochs) - 1) / max(1, count - 1))] for place in range(count)} | {epochs[-1]}
    pictures, troubles = [], []
    for epoch in sorted(chosen):
        record = by_epoch[epoch]
        picture, trouble = embedded_picture(run_dir / record["image_path"], run_dir)
        if picture is None:
            troubles.append(trouble)
        else:
            pictures.append(Picture(picture.uri, picture.width, picture.height, epoch, record["step"]))
    return Samples(pictures, len(epochs) - len(chosen), troubles)


def embedded_picture(path: Path, run_dir: Path) -> tuple[Picture | None, str]:
    """The picture, or None and why there is none."""
    name = path.relative_to(run_dir) if path.is_relative_to(run_dir) else path
    if not path.resolve().is_relative_to(run_dir.resolve()):
        return None, f"{name} lies outside of the run"
    try:
        return _encoded(path, path.stat().st_mtime_ns), ""
    except FileNotFoundError:
        return None, f"{name} is missing"
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        return None, f"{name} is damaged ({type(error).__name__})"


@lru_cache(maxsize=64)
def _encoded(path: Path, modified: int) -> Picture:
    """At most _WIDTH pixels wide. The report is made again and again, of pictures that stay as they are."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    if picture.width > _WIDTH:
        picture = picture.resize((_WIDTH, max(1, picture.height * _WIDTH // picture.width)))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=2)
    return Picture(_uri("image/webp", buffer.getvalue()), picture.width, picture.height)


def _newest_values(records: Sequence[dict]) -> dict[str, str]:
    """What each panel ends with, in words."""
    words = {}
    step = next((record for record in reversed(records) if record["event"] == "step"), None)
    if step:
        at = f"at step {step['step']:,}"
        words["training loss"] = f"newest {_value(step['loss'])} {at}"
        words["learning rate"] = f"newest {_value(step['lr'])} {at}"
        words["gradient norm"] = f"newest {_value(step['grad_norm'])} {at}"
    computed = (record for record in reversed(records) if record["event"] == "step")
    step = next((record for record in computed if not math.isnan(record["samples_per_second"])), None)
    if step:
        rate, wait = _value(step["samples_per_second"]), _value(step["data_wait_seconds"])
        pace = f"{rate} samples/s, {wait} s wait for data a step"
        words["throughput and wait for data"] = f"newest {pace}, at step {step['step']:,}"
    validations = [record for record in records if record["event"] == "validation"]
    newest = {record["ema"]: record for record in validations}
    if newest:
        losses = [f"{_value(record['loss'])} ({ema})" for ema, record in newest.items()]
        words["validation loss"] = f"newest {', '.join(losses)} at step {validations[-1]['step']:,}"
        levels = [f"{_value(loss)} at sigma {sigma}" for sigma, loss in validations[-1]["loss_by_sigma"].items()]
        words["validation loss by noise level"] = f"newest {', '.join(levels) or 'not measured'}"
    return words


def _value(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else f"not finite ({value})"


def _slim(svg: str) -> str:
    """Without what is not seen: the third decimal of a point, and where the picture comes from."""
    svg = _COORDINATES.sub(lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]).replace(" \n", " "), svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return _FONT_FAMILY.sub(r"font\1:\2sans-serif", svg)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
