"""Memory of `ray-pipeline prepare folder` over 500 and over 5,000 image files, each in a process of its own.

python benchmarks/prepare.py
python benchmarks/prepare.py --files 500 5000 --size 256
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import tifffile

DIFFERENT = 50  # files; the others are hard links to them
MEGABYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs=2, default=(500, 5000))
    parser.add_argument("--size", type=int, default=256, help="pixels of an image, 16 bit; half float32")
    arguments = parser.parse_args()
    peaks = []
    for files in arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder, "images"), files, arguments.size)
            driver, worker, seconds = run(Path(folder))
        peaks.append((driver, worker))
        print(f"{files} files: driver at most {driver / MEGABYTE:.0f} MB, a worker at most {worker / MEGABYTE:.0f} MB, "
              f"{files / seconds:.0f} files/s with the start of Ray", flush=True)  # fmt: skip
    few, many = peaks
    times = arguments.files[1] / arguments.files[0]
    print(f"ratio for {times:g} times the files: driver {many[0] / few[0]:.2f}, worker {many[1] / few[1]:.2f}")


def write_images(folder: Path, files: int, size: int) -> None:
    """Images of noise over a gradient, in folders of 100."""
    rng = np.random.default_rng(0)
    for number in range(files):
        path = folder / f"{number // 100:03d}" / f"{number:06d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= DIFFERENT:
            first = number % DIFFERENT
            os.link(folder / "000" / f"{first:06d}.tif", path)
            continue
        image = rng.poisson(np.linspace(50, 4000, size)[None], (size, size))
        tifffile.imwrite(path, image.astype(np.uint16 if number % 2 else np.float32))


def run(folder: Path) -> tuple[int, int, float]:
    """Largest memory of the command and of one of its workers (bytes that nobody shares with it), and seconds."""
    command = [sys.executable, "-m", "ray_pipeline", "prepare", "folder", str(folder / "images")]
    command += ["--out", str(folder / "data"), "--tile-size", "128"]
    started = time.monotonic()
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver = worker = 0
    while job.poll() is None:
        driver = max(driver, _memory(psutil.Process(job.pid)))
        for process in psutil.Process(job.pid).children(recursive=True):
            try:
                # Ray names a worker's process after what it runs, and an idle one IDLE
                if process.name().startswith("ray::"):
                    worker = max(worker, _memory(process))
            except psutil.Error:  # it ended meanwhile
                continue
        time.sleep(0.2)
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {job.returncode}")
    return driver, worker, time.monotonic() - started


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:  # it ended meanwhile
        return 0


if __name__ == "__main__":
    main()
