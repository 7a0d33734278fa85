"""Where the time of a step goes, and what it is compared with."""

import gzip
import json
import subprocess
import sys
import time

import pytest
import torch

from ray_pipeline.training.device_peak import matmul_rate, peak_flops
from ray_pipeline.training.step_clock import StepClock

CPU = torch.device("cpu")


def test_parts_add_up_and_are_taken_once():
    clock = StepClock(CPU)
    for _ in range(2):
        with clock.part("compute"):
            time.sleep(0.02)
    with clock.part("saving"):
        time.sleep(0.01)
    taken = clock.take()
    assert taken["compute"] >= 0.04
    assert taken["saving"] >= 0.01
    assert taken["ema"] == 0
    assert set(clock.take().values()) == {0.0}


def test_a_part_that_fails_is_counted_and_the_error_goes_on():
    clock = StepClock(CPU)
    with pytest.raises(KeyError), clock.part("logging"):
        {}[time.sleep(0.01)]
    assert clock.take()["logging"] >= 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_timed_by_its_own_events():
    clock = StepClock(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    with clock.part("compute"):
        for _ in range(20):
            a = a @ a
    assert clock.take()["compute"] > 20 * 2 * 4096**3 / 2e15


def test_the_peak_of_a_cpu_is_what_matrix_products_reach():
    peak = peak_flops(CPU, "fp32")
    assert 1e8 < peak < 1e14
    assert matmul_rate(CPU, "fp32") < 3 * peak


def test_peak_memory_grows_by_what_is_taken():
    # in a process of its own: this one may have had more before
    code = (
        "import torch; from ray_pipeline.training.device_peak import peak_memory as peak; cpu = torch.device('cpu'); "
        "before = peak(cpu); taken = torch.ones(80_000_000); print(peak(cpu) - before, torch.is_tensor(taken))"
    )
    grown, _ = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert 300e6 < int(grown) < 600e6


def test_a_profile_holds_operators_of_a_few_steps(tmp_path):
    from types import SimpleNamespace

    from ray_pipeline.config import parse_config
    from ray_pipeline.training.profiling import profiled

    config = parse_config({"output_dir": str(tmp_path), "phases": [{"name": "p1", "epochs": 1}]})
    run = SimpleNamespace(
        job=SimpleNamespace(profile=True), rank=0, config=config, phase=config.phases[0],
        state=SimpleNamespace(step=10), end_step=30,
    )  # fmt: skip
    with profiled(run) as trace_step:
        for _ in range(20):
            torch.ones(64, 64) @ torch.ones(64, 64)
            trace_step()
    (path,) = (tmp_path / "logs" / "profile").iterdir()
    assert path.name == "p1_step_00000015.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("aten::mm") == 3
    run.job.profile = False
    with profiled(run) as trace_step:
        trace_step()
    assert len(list((tmp_path / "logs" / "profile").iterdir())) == 1
