"""A run that is asked to stop commits first; failures and waits end in words. Real signals, real workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray

from ray_pipeline.config import parse_config
from ray_pipeline.errors import RunStopped, UserError
from ray_pipeline.training.board import open_board
from ray_pipeline.training.launch import Attendance, fit_to_the_end, make_trainer
from ray_pipeline.training.placement import NoRoom, check_resources, groups_that_fit
from ray_pipeline.training.setup import PhaseJob


def config_of(folder: Path, **settings):
    return parse_config({"output_dir": str(folder), "phases": [{"name": "one", "epochs": 1}], "ray": settings})


def attend(folder: Path, loop: Callable, board=None, collective_minutes=30.0, **settings) -> None:
    """Run `loop(job, folder)` in Train workers as a phase is run; workers wait for each other so long."""
    config, board = config_of(folder, **settings), board or open_board("test")
    waiting = config_of(folder, **settings | {"timeout_minutes": collective_minutes})
    trainer = make_trainer(waiting, PhaseJob({}, 0, "", None, stop=board))
    trainer.train_loop_per_worker = lambda job: loop(job["stop"], folder)
    Attendance(config, board).attend(trainer)


def once(condition: Callable[[], bool], action: Callable[[], None]) -> Thread:
    """Do something as soon as a condition holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        action()

    thread = Thread(target=wait, daemon=True)
    thread.start()
    return thread


def loop_until_told() -> Callable:
    def loop(board, folder):
        import os
        import time

        import ray.train
        import torch

        from ray_pipeline.training.stopping import StopWatch

        rank = ray.train.get_context().get_world_rank()
        with StopWatch(board) as watch:
            step = 0
            while True:
                step += 1
                (folder / f"training_{rank}").write_text(str(os.getpid()))
                told = torch.tensor([float(bool(watch.stop))])
                torch.distributed.all_reduce(told)
                if told:
                    if rank == 0:
                        watch.committed(step, "step_0")
                    (folder / f"told_{rank}").write_text(f"{step} {watch.stop}")
                    return
                time.sleep(0.02)

    return loop


def loop_for_ever() -> Callable:
    def loop(board, folder):
        import os
        import time

        (folder / "training_0").write_text(str(os.getpid()))
        while True:
            time.sleep(0.1)

    return loop


def test_sigterm_lets_all_workers_commit_at_the_same_step_and_names_the_commit(ray_cluster, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    once((tmp_path / "training_1").exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped, match=r"SIGTERM; the newest checkpoint is step_0, step \d+; .*--resume") as stopped:
        attend(tmp_path, loop_until_told(), num_workers=2)
    assert stopped.value.exit_code == 143
    (first, reason), (second, unknown) = ((tmp_path / f"told_{rank}").read_text().split(" ") for rank in (0, 1))
    assert first == second
    assert (reason, unknown) == ("SIGTERM", "")  # rank 1 learns it from rank 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("signals", [1, 2])
def test_workers_that_do_not_stop_are_ended_after_the_time_or_at_a_second_signal(ray_cluster, tmp_path, signals):
    def stop() -> None:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    once((tmp_path / "training_0").exists, stop)
    with pytest.raises(RunStopped, match="Ctrl-C before the workers had committed") as stopped:
        attend(tmp_path, loop_for_ever(), stop_timeout_seconds=1 if signals == 1 else 3000)
    assert stopped.value.exit_code == 130
    worker = int((tmp_path / "training_0").read_text())
    until = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.5)


def test_a_rank_that_hangs_or_raises_stops_the_others_and_the_last_traceback_arrives(ray_cluster, tmp_path):
    """The first attempt ends by the time-out of the collective operation, the second by an error of one rank."""

    def loop(board, folder):
        import time

        import ray.train
        import torch

        attempt = folder / f"attempt_{ray.train.get_context().get_world_rank()}"
        first = not attempt.exists()
        with attempt.open("a") as file:
            file.write("started\n")
        if ray.train.get_context().get_world_rank() == 0:
            if first:
                torch.distributed.barrier()
            time.sleep(3000)
        if first:
            time.sleep(3000)

        def divide_by_nothing(depth):
            return 1 / depth

        divide_by_nothing(0)

    with pytest.raises(RuntimeError, match=r"rank 1: (.|\n)*in divide_by_nothing\n(.|\n)*ZeroDivisionError"):
        attend(tmp_path, loop, num_workers=2, max_failures=1, collective_minutes=0.2)
    assert [(tmp_path / f"attempt_{rank}").read_text() for rank in (0, 1)] == ["started\n" * 2] * 2


def test_a_worker_trains_on_without_its_board_and_wrong_input_ends_the_run_without_a_retry(ray_cluster, tmp_path):
    """Run off the main thread, where no handler can be installed."""

    def loop(board, folder):
        import time

        from ray_pipeline.errors import UserError
        from ray_pipeline.training.stopping import StopWatch

        with (folder / "starts").open("a") as file:
            file.write("started\n")
        with StopWatch(board) as watch:
            while not (folder / "lost").exists():
                time.sleep(0.05)
            watch.committed(1, "step_1")
            time.sleep(2)
            (folder / "ended").write_text(watch.stop)
        raise UserError("tiles.csv has no column id; add it")

    board, raised = open_board("test"), []

    def lose() -> None:
        ray.kill(board)
        (tmp_path / "lost").touch()

    def run() -> None:
        try:
            attend(tmp_path, loop, board, max_failures=3)
        except UserError as error:
            raised.append(str(error))

    once((tmp_path / "starts").exists, lose)
    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert raised == ["tiles.csv has no column id; add it"]
    assert (tmp_path / "starts").read_text() == "started\n"
    assert (tmp_path / "ended").read_text() == ""


def test_failures_are_counted_anew_after_a_commit_and_storage_that_refuses_may_be_tried_again(ray_cluster, tmp_path):
    def loop(board, folder):
        from ray_pipeline.storage import StorageError
        from ray_pipeline.training.stopping import StopWatch

        with (folder / "starts").open("a") as file:
            file.write("started\n")
        if (folder / "starts").read_text().count("started") == 1:
            with StopWatch(board) as watch:
                watch.committed(1, "step_1")
        raise StorageError("s3://bucket/run/step_1 cannot be used (it does not answer); check the network")

    config, board = config_of(tmp_path, max_failures=0), open_board("test")

    def make():
        trainer = make_trainer(config, PhaseJob({}, 0, "", None, stop=board))
        trainer.train_loop_per_worker = lambda job: loop(job["stop"], tmp_path)
        return trainer

    with pytest.raises(UserError, match=r"^s3://bucket/run/step_1 cannot be used") as raised:
        fit_to_the_end(config, board, make)
    assert (tmp_path / "starts").read_text() == "started\n" * 2
    assert raised.value.passing


def test_workers_that_find_no_place_are_waited_for_so_long_and_the_words_say_what_is_free(ray_cluster, tmp_path):
    taken = ray.remote(num_cpus=5)(type("Other", (), {})).remote()
    try:
        with pytest.raises(NoRoom, match=r"no place for ray.timeout_minutes=0.05: .* 4 CPU a worker.* 1 CPU free"):
            attend(tmp_path, loop_for_ever(), cpus_per_worker=4, timeout_minutes=0.05)
    finally:
        ray.kill(taken)
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray_cluster["CPU"]:  # nothing waits for the place any more
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)
    time.sleep(1)
    assert ray.available_resources()["CPU"] == ray_cluster["CPU"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_workers": 2, "placement_strategy": "STRICT_SPREAD"}, r"num_workers=2 .*STRICT_SPREAD.* room for 1:"),
        ({"num_workers": [2, 3], "placement_strategy": "STRICT_SPREAD"}, r"num_workers=\[2, 3\].*room for 2 worker"),
        ({"num_workers": [7, 9]}, r"num_workers=\[7, 9\] .* needs 7 CPU, but this Ray has 6"),
        ({"resources_per_worker": {"microscope": 1}}, "needs 1 microscope, but this Ray has 0"),
    ],
)
def test_workers_that_can_never_be_placed_are_refused_at_once(ray_cluster, settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        check_resources(config_of(tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "groups"),
    [({"num_workers": 1}, 6), ({"num_workers": 4}, 1), ({"num_workers": 2, "cpus_per_worker": 1.5}, 2)],
)
def test_as_many_groups_of_workers_fit_as_the_cluster_has_room_for(ray_cluster, settings, groups, tmp_path):
    config = config_of(tmp_path, **settings)
    single = config.model_copy(update={"train": config.train.model_copy(update={"threads": 1})})
    assert groups_that_fit(single) == groups
    # one that computes with more threads takes more
    greedy = config.model_copy(update={"train": config.train.model_copy(update={"threads": 3})})
    assert groups_that_fit(greedy) == max(1, 6 // (3 * settings["num_workers"]))


def test_an_elastic_run_needs_room_for_the_fewest_workers_alone(ray_cluster, tmp_path):
    check_resources(config_of(tmp_path, num_workers=[1, 64]))


def test_a_notice_that_a_node_will_be_taken_away_asks_once_for_a_checkpoint(aws_environment):
    """In a cluster of its own, whose node Ray drains as for a preemption."""
    done = subprocess.run([sys.executable, "-c", DRAIN], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["saves 1"], done.stderr[-3000:]


DRAIN = """
import tempfile, threading, time
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray_pipeline.config import parse_config
from ray_pipeline.training.launch import Attendance, fit_to_the_end, make_trainer
from ray_pipeline.training.setup import PhaseJob
from ray_pipeline.training.board import open_board

def loop(job):
    import time
    from ray_pipeline.training.stopping import StopWatch
    saves = 0
    with StopWatch(job["stop"]) as watch:
        job["stop"].committed.remote(0, "training")
        while not watch.stop:
            saves += watch.save
            if saves:
                job["stop"].committed.remote(saves, "saved")
            time.sleep(0.02)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)
config = parse_config({"output_dir": tempfile.mkdtemp(), "phases": [{"name": "one", "epochs": 1}]})
board = open_board("test")
trainer = make_trainer(config, PhaseJob({}, 0, "", None, stop=board))
trainer.train_loop_per_worker = loop
run = threading.Thread(target=Attendance(config, board).attend, args=(trainer,))
run.start()
committed = lambda: ray.get(board.news.remote()).committed
while committed() != (0, "training"):
    time.sleep(0.1)
node = next(node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU"))
why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
assert ray._raylet.GcsClient(address=cluster.address).drain_node(node, why, "", int(1000 * (time.time() + 600)))[0]
while committed() == (0, "training"):
    time.sleep(0.1)
time.sleep(2)
saves = committed()[0]
ray.get(board.stop.remote("the end"))
run.join()
ray.shutdown()
cluster.shutdown()
print("saves", saves)
"""
