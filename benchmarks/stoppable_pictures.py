"""Charts and the page of a run, drawn in a process of their own as the command draws them; monitoring.py stops it and
lets it go on.

    python benchmarks/stoppable_pictures.py CONFIG OUTPUT_DIR PHASE

Its pauses between two drawings do not count the time for which it is stopped. It draws until it is killed.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from ray_pipeline.config import load_config
from ray_pipeline.monitoring import follow, live_report

_TICK_SECONDS = 0.1
#: a longer one was a stop
_LONGEST_TICK_SECONDS = 3.0


class Clock:
    """Seconds for which this process was not stopped; `run` notices when it was, and until then the time stands."""

    def __init__(self):
        self._tick = time.monotonic(), 0.0  # when it last came, and the seconds of all stops before

    def monotonic(self) -> float:
        last, stopped = self._tick
        now = time.monotonic()
        return (last if now - last > _LONGEST_TICK_SECONDS else now) - stopped

    def run(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            last, stopped = self._tick
            now = time.monotonic()
            self._tick = now, stopped + (now - last if now - last > _LONGEST_TICK_SECONDS else 0.0)


def main() -> None:
    path, output_dir, phase = sys.argv[1:]
    config, clock = load_config(path, [f"output_dir={output_dir}"]), Clock()
    follow.time = live_report.time = SimpleNamespace(monotonic=clock.monotonic, time=time.time)
    with live_report.LiveReport(config), follow.Follower(config, phase, progress=True):
        clock.run()


if __name__ == "__main__":
    main()
