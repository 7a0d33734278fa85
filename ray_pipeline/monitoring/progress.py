"""One line that says how far a long job is, how fast it goes and how long it still takes; ASCII only."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

RATE_WINDOW_SECONDS = 60.0
_WINDOW_POINTS = 120


def format_seconds(seconds: float) -> str:
    """Duration for people: 0.4s, 45s, 2m41s, 1h02m, 3d04h; ? when it is not finite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def format_bytes(size: float) -> str:
    """Size in binary units: 512 B, 1.50 KiB, 3.20 GiB."""
    return _scaled(size, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def format_share(value: float) -> str:
    """Share of a whole, 0 to 1, in percent; not measured when it is not finite."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "not measured"


def format_count(count: float) -> str:
    """Number with three digits and a magnitude: 950, 12.3k, 675M, 2.87B."""
    return _scaled(count, 1000.0, ("", "k", "M", "B", "T"))


def _scaled(value: float, base: float, suffixes: tuple[str, ...]) -> str:
    value = float(value)
    if not math.isfinite(value):
        return f"{value}{suffixes[0]}"
    power = 0
    # 999.6 rounds to 1000, which is the next magnitude's 1.00.
    while abs(value) >= base - 0.5 and power < len(suffixes) - 1:
        value, power = value / base, power + 1
    if power == 0 and value == round(value):
        return f"{value:.0f}{suffixes[0]}"
    return f"{_three_digits(value)}{suffixes[power]}"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def _format_value(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    number = float(value)
    if not math.isfinite(number) or 1e-3 <= abs(number) < 1000:
        return f"{number:.3g}"
    return format_count(number) if abs(number) >= 1000 else f"{number:.2g}"


_silenced = False


def silence() -> None:
    """No line of progress from this process any more, but to streams that are named."""
    global _silenced
    _silenced = True


class Progress:
    """Progress of a job of `total` units (None: unknown), of which `start` were done before this process.

    On a terminal one line is rewritten; elsewhere (log files, Ray workers) plain lines are written, at most
    one in `min_seconds` (default 1 s on a terminal, 10 s elsewhere). The rate covers the last minute of this
    process, never the resumed part; with `samples_per_unit` (a step's global batch) it is in samples. With
    `later_units` of other jobs that follow (nan: unknown) the time left for all is told, too. A stream that fails is
    given up silently: progress never stops the work. `clock` gives seconds, `began` is when this process began, by it.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "step",
        stream: TextIO | None = None,
        min_seconds: float | None = None,
        start: int = 0,
        samples_per_unit: int | None = None,
        later_units: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):
        self.total, self.label, self.unit = total, label, unit
        self.samples_per_unit, self.later_units = samples_per_unit, later_units
        self.stream: TextIO | None = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        if stream is None and _silenced:
            self.stream = None
        self.min_seconds = (1.0 if self.terminal else 10.0) if min_seconds is None else min_seconds
        self.clock = clock
        self.done = start
        self.values: dict[str, Any] = {}
        self.started = clock() if began is None else began
        self.points: deque[tuple[float, int]] = deque([(self.started, start)])
        self.printed_at = -math.inf
        self.closed = False

    def update(self, n: int, *, at: float | None = None, counted: bool = True, **values: Any) -> None:
        """`n` units are done in all, and were at the time `at`, which is now where nothing else is said; `values`
        (loss=0.842, epoch="3/10") stay on the line until replaced. Not `counted`: they took no work, and the rate is
        taken anew from here."""
        now = self.clock()
        self.done = n
        if not counted:
            self.points.clear()
        self.values.update(values)
        self._remember(now if at is None else at)
        if now - self.printed_at >= self.min_seconds:
            self.printed_at = now
            self._print(self.line(now), end="")

    def close(self, message: str = "") -> None:
        """Write the last line with the time taken and `message`; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        parts = [*self._head(), f"took {format_seconds(self.clock() - self.started)}", message]
        self._print("  ".join(part for part in parts if part), end="\n")

    def rate(self, now: float) -> float:
        """Units a second over the last minute; nan before the first unit is done."""
        then, done_then = self.points[0]
        return (self.done - done_then) / (now - then) if self.done > done_then and now > then else math.nan

    def line(self, now: float) -> str:
        """The progress line at time `now`, as ASCII."""
        rate = self.rate(now)
        per_unit, noun = (1, self.unit) if self.samples_per_unit is None else (self.samples_per_unit, "sample")
        parts = self._head()
        if math.isfinite(rate):
            parts.append(f"{_three_digits(rate * per_unit)} {noun}s/s")
        if self.total is not None:
            left = self.total - self.done
            parts.append(f"left {format_seconds(left / rate)}")
            if self.later_units:
                parts.append(f"in all {format_seconds((left + self.later_units) / rate)}")
        return "  ".join(parts)

    def _head(self) -> list[str]:
        parts = [self.label, f"{self.unit} {self.done}" + ("" if self.total is None else f"/{self.total}")]
        if self.total:
            # Rounded down: 100% is said only when all is done.
            parts.append(f"{100 * self.done // self.total}%")
        return parts + [f"{name} {_format_value(value)}" for name, value in self.values.items()]

    def _remember(self, now: float) -> None:
        if len(self.points) > 1 and now - self.points[-2][0] < RATE_WINDOW_SECONDS / _WINDOW_POINTS:
            self.points.pop()
        self.points.append((now, self.done))
        while len(self.points) > 2 and now - self.points[1][0] >= RATE_WINDOW_SECONDS:
            self.points.popleft()

    def _print(self, line: str, end: str) -> None:
        if self.stream is None:
            return
        line = line.encode("ascii", "replace").decode("ascii")
        try:
            if self.terminal:
                width = os.get_terminal_size(self.stream.fileno()).columns or 80
                # A line as wide as the terminal wraps, and \r then no longer returns to its start.
                shown = line if end else line[: width - 1]
                self.stream.write("\r" + shown.ljust(width - 1) + end)
            else:
                self.stream.write(line + "\n")
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self.close("" if kind is None else "stopped")


def track(iterable: Iterable, total: int | None, label: str, unit: str = "item", **options: Any) -> Iterator:
    """Yield from `iterable`, showing progress; `total` None takes its length, if it has one.

    `options` go to Progress.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with Progress(total, label, unit, **options) as progress:
        for count, item in enumerate(iterable, start=progress.done + 1):
            yield item
            progress.update(count)
