"""Samples a second of real training steps of DiT-XL/8: ours beside a plain loop, as a ratio measured in one run.

The plain loop is written as public DiT trainers write it: eager fp32, AdamW with PyTorch's defaults (foreach), an EMA
that walks over the tensors one by one. Both train the same network on the same batch with the same loss. They run as
alternating processes, so that one is in memory at a time: 15 GB, and nothing else should run on the machine.

    python benchmarks/step.py                     # DiT-XL/8, batch 8
    python benchmarks/step.py --architecture DiT-S/8 --steps 10
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

BATCH_SEED = 0


def main() -> None:
    arguments = _parse()
    if arguments.child:
        print(json.dumps(_measure(arguments)))
        return
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    loss: dict[str, float] = {}
    for number in range(arguments.rounds):
        # whichever runs second may find warmer caches or a slower machine, so the order alternates
        for kind in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
            result = _run_child(kind, arguments)
            seconds[kind] += result["seconds"]
            loss[kind] = result["loss"]
            print(
                f"round {number + 1} {kind:<6} {' '.join(f'{s:.2f}' for s in result['seconds'])} s a step", flush=True
            )
    rate = {kind: arguments.batch / statistics.median(values) for kind, values in seconds.items()}
    print(f"{arguments.architecture}, batch {arguments.batch}, ours in {_our_precision(arguments)}, plain in fp32")
    print(f"samples/s  plain {rate['plain']:.2f}, ours {rate['ours']:.2f}; loss plain {loss['plain']:.4f}, "
          f"ours {loss['ours']:.4f}")  # fmt: skip
    print(f"ratio  {rate['ours'] / rate['plain']:.2f}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="DiT-XL/8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process; one more comes before them")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of ours")
    parser.add_argument("--child", choices=("plain", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_child(kind: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--child", kind, "--architecture", arguments.architecture]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps), "--precision", arguments.precision]
    environment = dict(os.environ)
    if kind == "ours":
        from ray_pipeline.training.launch import WORKER_ENVIRONMENT

        environment |= WORKER_ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict:
    torch.set_num_threads(os.cpu_count() or 1)
    step = (_plain_step if arguments.child == "plain" else _our_step)(arguments)
    loss = step()
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "loss": loss}


def _batch(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(BATCH_SEED)
    shape = (arguments.batch, 4, 64, 64)
    x0 = 0.5 * torch.randn(shape, generator=generator)
    return x0, torch.randn(shape, generator=generator), torch.randn(arguments.batch, generator=generator)


def _plain_step(arguments: argparse.Namespace):
    from ray_pipeline.diffusion.edm import EDM
    from ray_pipeline.models.dit import build_dit

    torch.manual_seed(0)
    edm, network = EDM(), build_dit(arguments.architecture)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)
    x0, noise, z = _batch(arguments)

    def step() -> float:
        loss = edm.loss(network, x0, edm.sigma_from_normal(z), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights = dict(network.named_parameters())
            for name, parameter in average.named_parameters():
                parameter.mul_(0.9999).add_(weights[name].data, alpha=1 - 0.9999)
        return loss.item()

    return step


def _our_precision(arguments: argparse.Namespace) -> str:
    from ray_pipeline.training.build import precision

    return precision(_config(arguments), "cpu")


def _config(arguments: argparse.Namespace):
    from ray_pipeline.config import load_config

    root = Path(__file__).resolve().parent.parent
    values = {
        "model.architecture": arguments.architecture,
        "model.hidden_size": "null",
        "train.precision": arguments.precision,
        "train.batch_size": arguments.batch,
        "train.global_batch": arguments.batch,
        "scheduler.P_mean": -1.2,
        "scheduler.P_std": 1.2,
        "optimizer.warmup_steps": 0,
        "optimizer.grad_clip": "null",
        "ema.start_step": 0,
        "ema.power_stds": "[]",  # one average, as the plain loop has
    }
    return load_config(root / "configs" / "microscopy.yaml", [f"{key}={value}" for key, value in values.items()])


def _our_step(arguments: argparse.Namespace):
    from bare_run import bare_run

    from ray_pipeline.training.build import prepare_torch
    from ray_pipeline.training.step import MicroBatch, optimize

    config = _config(arguments)
    prepare_torch(config, torch.device("cpu"), local_workers=1)
    run = bare_run(config)
    x0, noise, z = _batch(arguments)
    batches = [MicroBatch(x0=x0, noise=noise, z=z, hints=None, mask=None)]

    def step() -> float:
        return optimize(run, run.state.step, batches).loss

    return step


if __name__ == "__main__":
    main()
