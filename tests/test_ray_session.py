"""The Ray that a command starts: as the section `ray` says, and ended with the command, however that ends."""

import json
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import psutil
import pytest
import ray
import ray.data
import ray.train.torch

from ray_pipeline.errors import UserError
from ray_pipeline.ray_session import ray_session
from ray_pipeline.sections import RayConfig

SESSION = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
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


LOCAL = """
import json, os, sys
import ray
from ray_pipeline.ray_session import ray_session
from ray_pipeline.sections import RayConfig

@ray.remote
def seen():
    return os.environ["HF_HOME"], open("note.txt").read()

environment = {"env_vars": {"HF_HOME": "yes"}, "working_dir": sys.argv[1]}
with ray_session(RayConfig(address="local", object_store_gib=0.125, runtime_env=environment)):
    print(json.dumps([ray.cluster_resources()["object_store_memory"], *ray.get(seen.remote())]))
"""


def test_a_local_ray_has_the_object_store_and_the_runtime_environment_that_were_asked_for(tmp_path):
    (tmp_path / "note.txt").write_text("brought along")
    done = subprocess.run([sys.executable, "-c", LOCAL, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [2**27, "yes", "brought along"]


ADDRESSES = """
import sys
from ray_pipeline.errors import UserError
from ray_pipeline.ray_session import ray_session
from ray_pipeline.sections import RayConfig

for address in sys.argv[1:]:
    try:
        with ray_session(RayConfig(address=address)):
            print("joined")
    except UserError as error:
        print(error)
"""


def test_an_address_where_nothing_answers_is_refused_at_once():
    """In a process that has joined no Ray; Ray itself would try for minutes."""
    addresses = ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:99999"]
    done = subprocess.run([sys.executable, "-c", ADDRESSES, *addresses], capture_output=True, text=True, timeout=120)
    for address, said in zip(addresses, done.stdout.splitlines(), strict=True):
        assert f"ray.address={address}: nothing answers there" in said


def test_a_runtime_environment_comes_too_late_for_a_ray_that_was_joined(ray_cluster):
    with (
        pytest.raises(UserError, match=r"ray\.runtime_env comes too late"),
        ray_session(RayConfig(runtime_env={"env_vars": {"TZ": "UTC"}})),
    ):
        pass


def test_an_execution_of_ray_data_holds_no_more_objects_than_object_store_gib(ray_cluster, tmp_path):
    """Blocks of 16 MiB, made while nobody takes more than the first."""

    def made(settings: RayConfig, enough: int, seconds: float) -> tuple[int, float]:
        """Blocks after so many seconds, or as soon as there are enough, and when that was."""
        folder = tmp_path / str(settings.object_store_gib)
        folder.mkdir()

        def make(batch):
            (folder / str(batch["item"][0])).touch()
            return {"block": np.zeros((1, 2**24), np.uint8)}

        with ray_session(settings):
            blocks = ray.data.from_items([*range(60)], override_num_blocks=60).map_batches(make, num_cpus=2)
        start = time.monotonic()
        with closing(iter(blocks.iter_batches(batch_size=None, prefetch_batches=1))) as batches:
            next(batches)
            while len([*folder.iterdir()]) < enough and time.monotonic() < start + seconds:
                time.sleep(0.1)
        return len([*folder.iterdir()]), time.monotonic() - start

    limit = ray.data.DataContext.get_current().execution_options.resource_limits
    blocks, seconds = made(RayConfig(), 25, 120)
    assert blocks >= 25
    assert made(RayConfig(object_store_gib=0.1), 25, 1.5 * seconds)[0] < 15
    assert ray.data.DataContext.get_current().execution_options.resource_limits == limit


def test_the_limit_of_the_object_store_reaches_the_workers_of_a_training(ray_cluster, tmp_path):
    def tell(config):
        limits = ray.data.DataContext.get_current().execution_options.resource_limits
        (tmp_path / "seen").write_text(str(int(limits.object_store_memory)))

    with ray_session(RayConfig(object_store_gib=0.25)):
        ray.train.torch.TorchTrainer(
            tell,
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(name="limit", storage_path=str(tmp_path / "storage")),
        ).fit()
    assert (tmp_path / "seen").read_text() == str(2**28)
