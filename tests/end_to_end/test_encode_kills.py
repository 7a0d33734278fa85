"""Kill -9 of the encode command, and of an autoencoder actor: the store ends with the bytes of an undisturbed one."""

import subprocess
import sys
from pathlib import Path

DRILL = Path(__file__).parents[2] / "benchmarks" / "drill_encode.py"


def test_a_store_whose_driver_and_actor_were_killed_equals_an_undisturbed_one():
    done = subprocess.run(
        [sys.executable, DRILL, "--kills", "2", "--fields", "24", "--actors", "1"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [line for line in done.stdout.splitlines() if line.startswith("kill")]
    assert [line.split(" after ")[0] for line in kills] == ["kill: driver", "kill: actor", "killed_0: equal"], kills
