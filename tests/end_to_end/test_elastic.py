"""A node comes and goes while a run trains: more workers, then fewer, on the same samples to the same loss."""

import subprocess
import sys
from pathlib import Path

DRILL = Path(__file__).parents[2] / "benchmarks" / "drill_elastic.py"


def test_a_run_grows_with_a_new_node_and_shrinks_with_its_loss_on_the_same_samples():
    done = subprocess.run([sys.executable, DRILL], capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "on two workers" in done.stdout, said
    assert "same samples, same final loss" in done.stdout, said
