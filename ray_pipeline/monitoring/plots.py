"""The progress chart of a run."""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
# A long run has 100,000 steps recorded: a table of what is not drawn would cost time.
_STEP_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "samples_per_second", "data_wait_seconds")
# More are not seen apart in a panel.
MOST_POINTS, MOST_MARKS = 1500, 400


def plot_progress(
    records: Sequence[dict],
    path: str | Path,
    *,
    title: str,
    baseline: float | None = None,
    plot_loss: bool = True,
    plot_lr: bool = True,
) -> None:
    """Chart the records of one phase (`read_events(run_dir, phase)`) as a 1400 x 900 PNG at `path`: its `panels`.

    The file is replaced atomically.
    """
    drawings = list(panels(records, baseline=baseline, plot_loss=plot_loss, plot_lr=plot_lr).values())
    figure = Figure(figsize=(14, 9), dpi=100, facecolor="white")
    # Fixed margins: a layout engine would draw everything twice, and panels would jump between updates.
    figure.subplots_adjust(left=0.046, right=0.956, bottom=0.06, top=0.858, wspace=0.16, hspace=0.3)
    across = 3 if len(drawings) > 4 else 2
    axes = figure.subplots(2 if len(drawings) > 2 else 1, across, squeeze=False).ravel()
    for ax in axes[len(drawings) :]:
        ax.set_visible(False)
    for number, draw in enumerate(drawings):
        draw(axes[number], epochs=number < across)
    figure.text(0.012, 0.972, title, fontsize=17, fontweight="bold", color=INK, va="center")
    figure.text(0.012, 0.938, _summary(records), fontsize=11, color=MUTED, va="center")
    newest = max((record["time"][:19] for record in records), default="").replace("T", " ")
    if newest:
        figure.text(0.988, 0.972, f"{newest} UTC", fontsize=11, color=MUTED, va="center", ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    replace_file(path, buffer.getvalue())


def panels(
    records: Sequence[dict], *, baseline: float | None = None, plot_loss: bool = True, plot_lr: bool = True
) -> dict[str, Callable[..., None]]:
    """By name, what draws each panel of one phase on an axis, complete: draw(ax, epochs=True) has epochs above.

    Against the step: training loss, validation loss, validation loss by noise level, learning rate, gradient norm,
    throughput. `baseline` is a validation loss to beat. Losses that are not finite are marked in red, checkpoints by
    triangles and faults by crosses in the first panel, resumes by dashed lines. `plot_loss` and `plot_lr` off leave out
    the three losses and the learning rate.
    """
    steps, validations = _table(records, "step"), _table(records, "validation")
    checkpoints, phases, faults = (_table(records, event) for event in ("checkpoint", "phase", "fault"))
    resumes = phases.step[phases.status == "resumed"].tolist() if len(phases) else []
    limits = _step_limits(records)
    curves = {
        "training loss": lambda ax: _step_panel(ax, steps, "loss", "training loss", BLUE),
        "validation loss": lambda ax: _validation_loss(ax, validations, baseline),
        "validation loss by noise level": lambda ax: _loss_by_sigma(ax, validations),
    }
    curves = curves if plot_loss else {}
    if plot_lr:
        curves["learning rate"] = lambda ax: _learning_rate(ax, steps)
    curves["gradient norm"] = lambda ax: _step_panel(ax, steps, "grad_norm", "gradient norm", ORANGE)
    curves["throughput and wait for data"] = lambda ax: _throughput(ax, steps)

    def draw(name: str, ax: Axes, epochs: bool) -> None:
        curves[name](ax)
        _finish(ax, limits, resumes)
        if epochs:
            _epoch_axis(ax, steps)
        if name == next(iter(curves)):
            _explain_marks(ax, checkpoints, faults, resumes)
        if ax.get_legend() is None:
            _legend(ax)

    return {name: partial(draw, name) for name in curves}


def _table(records: Sequence[dict], event: str) -> pd.DataFrame:
    rows = [record for record in records if record["event"] == event]
    names = _STEP_COLUMNS if rows and event == "step" else sorted(set().union(*rows))
    return pd.DataFrame({name: [row.get(name) for row in rows] for name in names})


def _step_limits(records: Sequence[dict]) -> tuple[float, float]:
    steps = [record["step"] for record in records if "step" in record] or [0]
    low, high = min(steps), max(steps)
    pad = max(0.03 * (high - low), 0.5)
    return low - pad, high + pad


def _summary(records: Sequence[dict]) -> str:
    newest = {record["event"]: record for record in records}
    measured = [record for record in records if record["event"] == "validation" and math.isfinite(record["loss"])]
    parts = []
    if last := newest.get("step"):
        parts = [f"step {last['step']:,}", f"epoch {last['epoch']}", f"training loss {last['loss']:.4g}"]
    if measured:
        best = min(measured, key=lambda record: record["loss"])
        parts.append(f"best validation loss {best['loss']:.4g} at step {best['step']:,}")
    if last := newest.get("checkpoint"):
        parts.append(f"last checkpoint at step {last['step']:,}")
    return "   |   ".join(parts) or "no records yet"


def _curve(ax: Axes, step: pd.Series, value: pd.Series, color: str, label: str | None = None) -> None:
    """Line through few values; many are shown faint under their exponential mean. Non-finite ones are red."""
    finite = np.isfinite(value)
    x, y = step[finite], value[finite]
    if len(y) <= FEW:
        ax.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
    else:
        shown = _outline(y)
        ax.plot(x.iloc[shown], y.iloc[shown], color=color, alpha=0.3, linewidth=0.8)
        smooth = y.ewm(span=len(y) / 25, min_periods=len(y) // 100).mean()
        shown = _spread(len(y), MOST_POINTS)
        ax.plot(x.iloc[shown], smooth.iloc[shown], color=color, linewidth=1.9, label=label or "smoothed")
    if not finite.all():
        lost = step[~finite]
        _mark(
            ax, lost, 0, "|", f"not finite ({len(lost)})", color=RED, markersize=16, markeredgewidth=1.6, clip_on=False
        )


def _outline(values: pd.Series) -> np.ndarray:
    """Places of at most MOST_POINTS values whose line looks as that of all: the extremes of each stretch."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(values.to_numpy(), MOST_POINTS // 2)
    begins = np.cumsum([0, *map(len, stretches[:-1])])
    extremes = [[part.argmin(), part.argmax()] for part in stretches]
    return np.unique(np.sort(begins[:, None] + extremes, axis=None))


def _spread(count: int, most: int) -> np.ndarray:
    """Places of at most so many of `count`, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _mark(ax: Axes, steps: pd.Series, height: float, marker: str, label: str, **look: Any) -> None:
    """Marks at steps, at a height from 0 to 1 in the panel; a picture shows no more than MOST_MARKS apart."""
    steps = steps.iloc[_spread(len(steps), MOST_MARKS)]
    heights = np.full(len(steps), height)
    ax.plot(steps, heights, marker, transform=ax.get_xaxis_transform(), label=label, **{"zorder": 5, **look})


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
    shown = steps.iloc[_spread(len(steps), MOST_POINTS)]
    ax.plot(shown.step, shown.lr / 10.0**power, color=GREEN, linewidth=1.8, marker=marker, markersize=4)
    ax.set_ylim(0, max(highest / 10.0**power, 1e-3) * 1.08)


def _validation_loss(ax: Axes, validations: pd.DataFrame, baseline: float | None) -> None:
    ax.set_title("validation loss (band: 1 standard error)")
    if not len(validations):
        return _say_empty(ax, "no validation yet")
    groups = list(validations.groupby("ema", sort=False))
    for index, (ema, track) in enumerate(groups):
        color = TRACK_COLORS[index % len(TRACK_COLORS)]
        track = track.iloc[_outline(track.loss)]
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
    track = track.iloc[_spread(len(track), MOST_POINTS)]
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
    steps = steps[steps.samples_per_second.notna()]  # nan: of steps that were not computed
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


def _explain_marks(ax: Axes, checkpoints: pd.DataFrame, faults: pd.DataFrame, resumes: Sequence[int]) -> None:
    if len(checkpoints):
        _mark(ax, checkpoints.step, 0.02, "^", "checkpoint", color=INK, markersize=6, alpha=0.75, zorder=4)
    if len(faults):
        _mark(ax, faults.step, 0.08, "x", f"fault ({len(faults)})", color=RED, markersize=7, markeredgewidth=2)
    if resumes:
        ax.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.1, label="resumed")


def _legend(ax: Axes, title: str | None = None, ncols: int = 1, loc: str = "best") -> None:
    labels = ax.get_legend_handles_labels()[1]
    if labels and labels != ["smoothed"]:
        look = {"fontsize": 9, "title_fontsize": 9, "labelcolor": INK, "framealpha": 0.85, "edgecolor": "none"}
        ax.legend(title=title, ncols=ncols, loc=loc, **look)
