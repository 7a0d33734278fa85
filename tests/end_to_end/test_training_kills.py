"""Kill -9 of a worker, of the command and in mid-save, and SIGTERM: a run goes on to the bits of an undisturbed one."""

import subprocess
import sys
from pathlib import Path

DRILL = Path(__file__).parents[2] / "benchmarks" / "drill_training.py"


def test_a_run_that_was_killed_and_stopped_equals_an_undisturbed_one():
    done = subprocess.run([sys.executable, DRILL, "--short"], capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    kills = [line for line in done.stdout.splitlines() if line.startswith("kill ")]
    for kind in ("worker", "driver", "SIGTERM", "mid-save"):
        assert any(f", {kind} at phase " in line for line in kills), said
    assert "4 kills: every run ended as the undisturbed one, bit for bit" in done.stdout, said
