"""What a device can do at most, and how much of its memory was taken."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from pathlib import Path

import torch

#: by words of a GPU's name, the first that fits: dense bf16 (float16 where there is none) and fp32 as prepare_torch
#: has it (TF32 where there is one), in 1e12 a second, from NVIDIA's data sheets
_DATA_SHEETS = (
    ("B200", 2250.0, 1100.0),
    ("H200 NVL", 835.5, 417.5),
    ("H200", 989.5, 494.7),
    ("GH200", 989.5, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.5),
    ("H100", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("A40", 149.7, 74.8),
    ("A30", 165.0, 82.0),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("A10", 125.0, 62.5),
    ("A10G", 70.0, 35.0),
    ("RTX A6000", 154.8, 77.4),
    ("V100 PCIE", 112.0, 14.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)
#: words that name another GPU, or a part of one, than the same name without them
_VARIANTS = {"TI", "SUPER", "D", "LAPTOP", "MAX", "MIG"}
_REPEATS = 5


def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations a second, `precision` bf16 or fp32: the data sheet's of a known GPU, else the best of a
    few matrix products, about 0.1 s; nan where a GPU has no memory left for them, at most 192 MiB."""
    sheet = data_sheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if sheet is not None:
        bf16, fp32 = sheet
        return 1e12 * (bf16 if precision == "bf16" else fp32)
    try:
        return max(_product_rates(device, precision))
    except torch.OutOfMemoryError:
        return math.nan


def data_sheet(gpu: str) -> tuple[float, float] | None:
    """Dense bf16 and fp32 operations of a GPU of this name, in 1e12 a second; None for one that is not known."""
    words = set(re.findall(r"\w+", gpu.upper()))
    for name, bf16, fp32 in _DATA_SHEETS:
        if set(name.upper().split()) <= words and not words & _VARIANTS:
            return bf16, fp32
    return None


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
    # On a GPU several products follow each other, so that waiting for them weighs nothing; large ones would take memory
    # from the network that trains.
    size, products = (4096, 8) if device.type == "cuda" else (1024, 1)
    a = torch.ones(size, size, device=device, dtype=dtype)
    product = a @ a
    rates = []
    for _ in range(_REPEATS):
        product[0, 0].item()
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a, out=product)
        product[0, 0].item()
        rates.append(2 * products * size**3 / (time.perf_counter() - started))
    return rates
