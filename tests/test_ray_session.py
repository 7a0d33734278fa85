"""The Ray that a command starts ends with it, however it ends."""

import signal
import subprocess
import sys

import psutil
import pytest

SESSION = """
import time
from ray_pipeline.ray_session import ray_session
from ray_pipeline.sections import RayConfig

with ray_session(RayConfig(address="local")):
    print("started", flush=True)
    time.sleep(3000)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_ends_the_process_and_the_ray_that_it_started(number, code):
    """Not under Train, which asks its workers first; an uncaught KeyboardInterrupt is Python's -SIGINT."""
    for _ in range(3):  # Ray waits 30 s for its own processes, which a busy machine may need longer to start
        process = subprocess.Popen([sys.executable, "-c", SESSION], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if started := process.stdout.readline() == b"started\n":
            break
        process.wait()
    assert started
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 2
    process.send_signal(number)
    assert process.wait(60) == code
    _, alive = psutil.wait_procs(family, timeout=60)
    # where nobody waits for orphans, a process that has ended stays as a zombie
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
