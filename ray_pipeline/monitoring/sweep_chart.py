"""The picture of a sweep: loss against each searched value, and the trials over time."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_pipeline.monitoring.plots import BLUE, GRID, INK, MUTED, RED, TRACK_COLORS
from ray_pipeline.storage import replace_file
from ray_pipeline.sweep_records import Candidate, SweepRecord

_ACROSS = 3


def plot_sweep(
    record: SweepRecord,
    candidates: Sequence[Candidate],
    decays: Mapping[str, float],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Chart a sweep as a PNG at `path`, which is replaced atomically.

    candidates: every average of every trial at the position where they are compared, the best first; decays: by
    average, the candidates for ema.decay. A panel a searched key, then the best average of each trial by epoch. The
    winner is red; bars are paired standard errors of the difference to it.
    """
    trials = record.trials
    numbers = {trial.number: trial for trial in trials}
    best: dict[int, Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.trial, candidate)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    panels = [lambda ax, key=key: _against(ax, key, [(numbers[c.trial].values[key], c) for c in best.values()])
              for key in keys]  # fmt: skip
    followed = [(decays[c.track], c) for c in candidates if c.track in decays]
    if followed:
        panels.append(lambda ax: _against(ax, "ema.decay", followed))
    panels.append(lambda ax: _over_time(ax, record, candidates[0].trial if candidates else None))
    across, down = min(_ACROSS, len(panels)), math.ceil(len(panels) / _ACROSS)
    figure = Figure(figsize=(4.8 * across, 0.6 + 3.6 * down), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.01, ha="left")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes, panels, strict=False):
        panel(ax)
        ax.grid(True, color=GRID, linewidth=0.9)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    replace_file(path, buffer.getvalue())


def _against(ax: Axes, key: str, found: Sequence[tuple[object, Candidate]]) -> None:
    """Loss against the values of one key; what is no number has a place of its own on the axis."""
    ax.set_title(key, fontsize=11, color=INK, loc="left")
    ax.set_ylabel("validation loss", fontsize=9, color=MUTED)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in found)
    names = [str(value) for value, _ in found]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    for number, ((value, candidate), name) in enumerate(zip(found, names, strict=True)):
        winner = number == 0
        ax.errorbar(
            value if numeric else order[name], candidate.loss, candidate.paired_standard_error, fmt="o", markersize=6,
            color=RED if winner else BLUE, alpha=1.0 if winner else 0.65, zorder=4 if winner else 3,
        )  # fmt: skip
    values = [value for value, _ in found]
    if numeric and len(values) > 1 and min(values) > 0 and max(values) > 20 * min(values):
        ax.set_xscale("log")
    if not numeric:
        ax.set_xticks(list(order.values()), list(order))


def _over_time(ax: Axes, record: SweepRecord, winner: int | None) -> None:
    ax.set_title("trials over time (best average)", fontsize=11, color=INK, loc="left")
    ax.set_xlabel("epoch", fontsize=9, color=MUTED)
    for index, trial in enumerate(record.trials):
        epochs = [result.epoch for result in trial.results]
        losses = [record.loss(result) for result in trial.results]
        won = trial.number == winner
        color = RED if won else TRACK_COLORS[index % len(TRACK_COLORS)]
        ax.plot(
            epochs, losses, color=color, marker="o", markersize=4, linewidth=2.2 if won else 1.3,
            label=f"{trial.number}{'' if trial.status == 'finished' else f' ({trial.status})'}",
        )  # fmt: skip
    if any(trial.results for trial in record.trials):
        ax.legend(title="trial", fontsize=8, title_fontsize=8, ncols=1 + len(record.trials) // 8, framealpha=0.85)
        losses = [record.loss(result) for trial in record.trials for result in trial.results]
        finite = [loss for loss in losses if np.isfinite(loss)]
        if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
            ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
