"""What a device can do at most, and how much of its memory was taken."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

import torch

#: by part of a GPU's name, the first that fits: dense bf16 (float16 where there is none) and fp32 as prepare_torch
#: has it (TF32 where there is one), in 1e12 a second, from NVIDIA's data sheets
_DATA_SHEETS = (
    ("B200", 2250.0, 1100.0),
    ("H200", 989.5, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("A10", 125.0, 62.5),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)
_REPEATS = 5


def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second, `precision` bf16 or fp32: the data sheet's of a known GPU, else the best of a
    few matrix products, about 0.1 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bf16, fp32 in _DATA_SHEETS:
            if part in name:
                return 1e12 * (bf16 if precision == "bf16" else fp32)
    return max(_product_rates(device, precision))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process had allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose getrusage(2) begins from the most of the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that matrix products reach on this device now."""
    rates = _product_rates(device, precision)
    return len(rates) / sum(1 / rate for rate in rates)


def _product_rates(device: torch.device, precision: str) -> list[float]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # large enough on a GPU that waiting for it weighs nothing
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    rates = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        (a @ a).sum().item()
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates
