"""Where the time of a step goes, and what it is compared with."""

import gzip
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from ray_pipeline.training.device_peak import data_sheet, matmul_rate, peak_flops, peak_memory
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


@pytest.mark.parametrize(
    ("gpu", "bf16"),
    [
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-32GB", 112.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_gpu_is_known_by_the_whole_of_its_name(gpu, bf16):
    assert data_sheet(gpu)[0] == bf16


@pytest.mark.parametrize(
    "gpu",
    [
        "NVIDIA T400 4GB",
        "NVIDIA L400",
        "NVIDIA GB200X",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_a_gpu_that_only_begins_like_a_known_one_is_measured(gpu):
    assert data_sheet(gpu) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_measured_within_little_memory_and_without_any_it_has_no_peak(monkeypatch):
    gpu = torch.device("cuda")
    known = peak_flops(gpu, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new one")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert 0.4 * known < peak_flops(gpu, "bf16") < 1.1 * known
    assert peak_memory(gpu) - before <= 192 * 2**20
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        assert math.isnan(peak_flops(gpu, "bf16"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


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
    with profiled(run, lambda what, write: write()) as trace_step:
        for _ in range(20):
            torch.ones(64, 64) @ torch.ones(64, 64)
            trace_step()
    (path,) = (tmp_path / "logs" / "profile").iterdir()
    assert path.name == "p1_step_00000015.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert names.count("aten::mm") == 3
    run.job.profile = False
    with profiled(run, lambda what, write: write()) as trace_step:
        trace_step()
    assert len(list((tmp_path / "logs" / "profile").iterdir())) == 1
