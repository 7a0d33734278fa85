"""The progress chart of a run."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ray_pipeline.monitoring.progress import format_count
from ray_pipeline.storage import replace_file

INK, MUTED, GRID = "#22303c", "#7a8894", "#e3e8ec"
BLUE, ORANGE, GREEN, VIOLET, RED = "#2369bd", "#d9822b", "#2e8b57", "#8e5bb5", "#c0392b"
TRACK_COLORS = (BLUE, ORANGE, GREEN, VIOLET, "#5d6d7e")
# A line through so few points needs dots to be seen, and no smoothing.
FEW = 30


def plot_progress(
    records: Sequence[dict],
    path: str | Path,
    *,
    title: str,
    baseline: float | None = None,
    plot_loss: bool = True,
    plot_lr: bool = True,
) -> None:
    """Chart the records of one phase (`read_events(run_dir, phase)`) as a 1400 x 900 PNG at `path`.

    Panels: training loss, validation loss, validation loss by noise level, learning rate, gradient norm,
    throughput; against the step, with epochs above. `baseline` is a validation loss to beat. Losses that are
    not finite are marked in red, checkpoints by triangles, resumes by dashed lines. `plot_loss` and `plot_lr`
    off leave out the three losses and the learning rate. The file is replaced atomically.
    """
    steps, validations = _table(records, "step"), _table(records, "validation")
    checkpoints, phases = _table(records, "checkpoint"), _table(records, "phase")
    resumes = phases.step[phases.status == "resumed"].tolist() if len(phases) else []
    figure = Figure(figsize=(14, 9), dpi=100, facecolor="white")
    # Fixed margins: a layout engine would draw everything twice, and panels would jump between updates.
    figure.subplots_adjust(left=0.046, right=0.956, bottom=0.06, top=0.858, wspace=0.16, hspace=0.3)
    losses = [
        lambda ax: _step_panel(ax, steps, "loss", "training loss", BLUE),
        lambda ax: _validation_loss(ax, validations, baseline),
        lambda ax: _loss_by_sigma(ax, validations),
    ]
    panels = losses if plot_loss else []
    panels += [lambda ax: _learning_rate(ax, steps)] if plot_lr else []
    panels += [lambda ax: _step_panel(ax, steps, "grad_norm", "gradient norm", ORANGE)]
    panels += [lambda ax: _throughput(ax, steps)]
    across = 3 if len(panels) > 4 else 2
    grid = figure.subplots(2 if len(panels) > 2 else 1, across, squeeze=False)
    axes = grid.ravel()[: len(panels)]
    for ax in grid.ravel()[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax)

    limits = _step_limits(records)
    for ax in axes:
        _finish(ax, limits, resumes)
    for ax in grid[0][: len(panels)]:
        _epoch_axis(ax, steps)
    _explain_marks(axes[0], checkpoints, resumes)
    for ax in axes:
        if ax.get_legend() is None:
            _legend(ax)
    figure.text(0.012, 0.972, title, fontsize=17, fontweight="bold", color=INK, va="center")
    figure.text(0.012, 0.938, _summary(steps, validations, checkpoints), fontsize=11, color=MUTED, va="center")
    newest = max((record["time"][:19] for record in records), default="").replace("T", " ")
    if newest:
        figure.text(0.988, 0.972, f"{newest} UTC", fontsize=11, color=MUTED, va="center", ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    replace_file(path, buffer.getvalue())


def _table(records: Sequence[dict], event: str) -> pd.DataFrame:
    return pd.DataFrame([record for record in records if record["event"] == event])


def _step_limits(records: Sequence[dict]) -> tuple[float, float]:
    steps = [record["step"] for record in records if "step" in record] or [0]
    low, high = min(steps), max(steps)
    pad = max(0.03 * (high - low), 0.5)
    return low - pad, high + pad


def _summary(steps: pd.DataFrame, validations: pd.DataFrame, checkpoints: pd.DataFrame) -> str:
    parts = []
    if len(steps):
        last = steps.iloc[-1]
        parts = [f"step {last.step:,}", f"epoch {last.epoch}", f"training loss {last.loss:.4g}"]
    if len(validations) and np.isfinite(validations.loss).any():
        best = validations.loc[validations.loss.idxmin()]
        parts.append(f"best validation loss {best.loss:.4g} at step {best.step:,}")
    if len(checkpoints):
        parts.append(f"last checkpoint at step {checkpoints.step.iloc[-1]:,}")
    return "   |   ".join(parts) or "no records yet"


def _curve(ax: Axes, step: pd.Series, value: pd.Series, color: str, label: str | None = None) -> None:
    """Line through few values; many are shown faint under their exponential mean. Non-finite ones are red."""
    finite = np.isfinite(value)
    x, y = step[finite], value[finite]
    if len(y) <= FEW:
        ax.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
    else:
        ax.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
        smooth = y.ewm(span=len(y) / 25, min_periods=len(y) // 100).mean()
        ax.plot(x, smooth, color=color, linewidth=1.9, label=label or "smoothed")
    if not finite.all():
        bottom = np.zeros(int((~finite).sum()))
        ax.plot(
            step[~finite], bottom, "|", color=RED, markersize=16, markeredgewidth=1.6, clip_on=False,
            transform=ax.get_xaxis_transform(), label=f"not finite ({len(bottom)})", zorder=5,
        )  # fmt: skip


def _step_panel(ax: Axes, steps: pd.DataFrame, column: str, title: str, color: str) -> None:
    ax.set_title(title)
    if not len(steps):
        return _say_empty(ax, "no steps yet")
    _curve(ax, steps.step, steps[column], color)
    _fit_scale(ax, steps[column])


def _learning_rate(ax: Axes, steps: pd.DataFrame) -> None:
    ax.set_title("learning rate")
    if not len(steps):
        return _say_empty(ax, "no steps yet")
    highest = steps.lr.max()
    power = math.floor(math.log10(highest)) if highest > 0 else 0
    ax.set_title(f"learning rate (x 1e{power})" if power else "learning rate")
    marker = "o" if len(steps) <= FEW else None
    ax.plot(steps.step, steps.lr / 10.0**power, color=GREEN, linewidth=1.8, marker=marker, markersize=4)
    ax.set_ylim(0, max(highest / 10.0**power, 1e-3) * 1.08)


def _validation_loss(ax: Axes, validations: pd.DataFrame, baseline: float | None) -> None:
    ax.set_title("validation loss (band: 1 standard error)")
    if not len(validations):
        return _say_empty(ax, "no validation yet")
    groups = list(validations.groupby("ema", sort=False))
    for index, (ema, track) in enumerate(groups):
        color = TRACK_COLORS[index % len(TRACK_COLORS)]
        marker = "o" if len(track) <= FEW else None
        ax.plot(track.step, track.loss, color=color, marker=marker, markersize=4, linewidth=1.6, label=ema)
        low, high = track.loss - track.standard_error, track.loss + track.standard_error
        ax.fill_between(track.step, low, high, color=color, alpha=0.18, linewidth=0)
    finite = validations[np.isfinite(validations.loss)]
    if len(finite):
        best = finite.loc[finite.loss.idxmin()]
        ax.plot(
            best.step, best.loss, "*", color=RED, markersize=13, zorder=5,
            markeredgecolor="white", label=f"best {best.loss:.4g}",
        )  # fmt: skip
    if baseline is not None and math.isfinite(baseline):
        ax.axhline(baseline, color=MUTED, linestyle=(0, (6, 3)), linewidth=1.3, label=f"baseline {baseline:.4g}")
    _fit_scale(ax, finite.loss)


def _loss_by_sigma(ax: Axes, validations: pd.DataFrame) -> None:
    ax.set_title("validation loss by noise level")
    if not len(validations):
        return _say_empty(ax, "no validation yet")
    # One track only: the best one, or the newest where every loss is nan.
    losses = validations.loss.where(np.isfinite(validations.loss))
    ema = validations.ema[losses.idxmin()] if losses.notna().any() else validations.ema.iloc[-1]
    track = validations[validations.ema == ema]
    levels = sorted({sigma for row in track.loss_by_sigma for sigma in row}, key=_sigma_order)
    if not levels:
        return _say_empty(ax, "not measured")
    curves = np.array([[row.get(sigma, math.nan) for sigma in levels] for row in track.loss_by_sigma])
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(levels)))
    for sigma, curve, color in zip(levels, curves.T, colors, strict=True):
        marker = "o" if len(track) <= FEW else None
        ax.plot(track.step, curve, color=color, marker=marker, markersize=3.5, linewidth=1.5, label=sigma)
    _fit_scale(ax, pd.Series(curves.ravel()))
    # Curves fill this panel, so the legend gets room of its own above them.
    bottom, top = ax.transScale.transform([(0, limit) for limit in ax.get_ylim()])[:, 1]
    raised = ax.transScale.inverted().transform((0, top + 0.12 * math.ceil(len(levels) / 4 + 1) * (top - bottom)))
    ax.set_ylim(top=raised[1])
    _legend(ax, title=f"sigma ({ema})", ncols=4, loc="upper center")


def _sigma_order(sigma: str) -> tuple[float, str]:
    try:
        return float(sigma), sigma
    except ValueError:
        return math.inf, sigma


def _throughput(ax: Axes, steps: pd.DataFrame) -> None:
    ax.set_title("throughput and wait for data")
    if not len(steps):
        return _say_empty(ax, "no steps yet")
    rate, wait = steps.samples_per_second, steps.data_wait_seconds
    right = ax.twinx()
    _curve(ax, steps.step, rate, BLUE, "samples/s (left)")
    _curve(right, steps.step, wait, VIOLET)
    ax.plot([], [], color=VIOLET, linewidth=1.9, label="data wait, s (right)")
    ax.set_ylim(0, 1.3 * _highest(rate))
    # The wait keeps to the lower third, so that the two curves do not cross.
    right.set_ylim(0, 3.5 * _highest(wait))
    right.tick_params(labelsize=10, labelcolor=VIOLET, length=0)
    right.yaxis.set_major_locator(MaxNLocator(5))
    right.spines[:].set_visible(False)


def _highest(values: pd.Series) -> float:
    return float(np.max(values.to_numpy(), initial=1e-3, where=np.isfinite(values.to_numpy())))


def _fit_scale(ax: Axes, values: pd.Series) -> None:
    """Logarithmic axis where positive values span more than a factor of ten, else linear."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _say_empty(ax: Axes, words: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none"}
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=13, color=MUTED, bbox=box)
    ax.set_yticks([])


def _finish(ax: Axes, limits: tuple[float, float], resumes: Sequence[int]) -> None:
    ax.set_title(ax.get_title(), fontsize=12.5, color=INK, loc="left", fontweight="bold", pad=8)
    ax.title.set_text("")
    ax.set_xlim(*limits)
    ax.set_xlabel("step", fontsize=10.5, color=MUTED)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _step_label(step)))
    ax.tick_params(labelsize=10, colors=INK, length=3, color=GRID)
    ax.grid(True, color=GRID, linewidth=0.9)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b9c3cb")
    for step in resumes:
        ax.axvline(step, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.1, zorder=1)


def _step_label(step: float) -> str:
    return f"{step:.0f}" if abs(step) < 10_000 else format_count(step)


def _epoch_axis(ax: Axes, steps: pd.DataFrame) -> None:
    """Axis above the panel that says at which step an epoch begins (its first recorded step)."""
    if not len(steps):
        return
    first = steps.groupby("epoch").step.min()
    first = first.iloc[:: math.ceil(len(first) / 8)]
    above = ax.secondary_xaxis("top")
    names = [str(epoch) for epoch in first.index]
    above.set_xticks(first.to_numpy(), [f"epoch {names[0]}", *names[1:]])
    above.tick_params(labelsize=9, labelcolor=MUTED, length=3, color="#b9c3cb")
    above.spines[:].set_visible(False)


def _explain_marks(ax: Axes, checkpoints: pd.DataFrame, resumes: Sequence[int]) -> None:
    if len(checkpoints):
        ax.plot(
            checkpoints.step, np.full(len(checkpoints), 0.02), "^", color=INK, markersize=6, alpha=0.75,
            transform=ax.get_xaxis_transform(), label="checkpoint", zorder=4,
        )  # fmt: skip
    if resumes:
        ax.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.1, label="resumed")


def _legend(ax: Axes, title: str | None = None, ncols: int = 1, loc: str = "best") -> None:
    labels = ax.get_legend_handles_labels()[1]
    if labels and labels != ["smoothed"]:
        look = {"fontsize": 9, "title_fontsize": 9, "labelcolor": INK, "framealpha": 0.85, "edgecolor": "none"}
        ax.legend(title=title, ncols=ncols, loc=loc, **look)
