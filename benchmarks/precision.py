"""Does bf16 autocast train as fp32 does? The demo's Phase 1 in both, from the same weights on the same samples.

    python benchmarks/precision.py --steps 200

Prints how far the mean loss in bf16 is from that in fp32, over all steps and over the last quarter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from demo_run import encode, next_batches, open_run

from ray_pipeline.config import load_config
from ray_pipeline.training.step import optimize

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fields", type=int, default=64, help="of 512 px, four tiles each")
    arguments = parser.parse_args()
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        base = [f"data.root={folder}/data", f"output_dir={folder}/run", f"data.simulate.fields={arguments.fields}"]
        encode(load_config(ROOT / "configs" / "demo.yaml", base))
        for precision in ("fp32", "bf16"):
            run = open_run(load_config(ROOT / "configs" / "demo.yaml", [*base, f"train.precision={precision}"]), 0)
            steps = range(arguments.steps)
            losses[precision] = np.array([optimize(run, step, next_batches(run)[1]).loss for step in steps])
    parts = {
        "the first ten steps": slice(10),
        "all steps": slice(None),
        "the last quarter": slice(-len(steps) // 4, None),
    }
    for name, part in parts.items():
        exact, rough = (losses[kind][part].mean() for kind in ("fp32", "bf16"))
        print(f"{name}: loss {exact:.4f} in fp32, {rough:.4f} in bf16, {100 * (rough / exact - 1):+.2f} %")


if __name__ == "__main__":
    main()
