"""What cached hints save: sampling with the hints' keys and values computed once, beside computing them at every step.

    python benchmarks/sampling.py                 # DiT-B/8, 20 Euler steps, one hint and four

Prints the ratio of the times, measured in turns in one run, and the largest difference of the samples.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.diffusion.samplers import sample_euler
from ray_pipeline.models.dit import DiT, build_dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="DiT-B/8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hints", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    network = random_network(arguments.architecture)
    for count in arguments.hints:
        compare(network, count, arguments)


def random_network(architecture: str) -> DiT:
    """A network whose every layer does something; a fresh one returns 0 whatever is in its attention."""
    torch.manual_seed(0)
    network = build_dit(architecture, aligned=True).eval()
    for name, parameter in network.named_parameters():
        if "adaLN" in name or "final_layer" in name or "aligned" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def compare(network: DiT, count: int, arguments: argparse.Namespace) -> None:
    """Time both ways in turns and print a line."""
    edm, size = EDM(), (arguments.batch, 4, network.latent_size, network.latent_size)
    noise, hints = torch.randn(size), 0.5 * torch.randn(size[0], count, *size[1:])

    @torch.no_grad()
    def cached() -> torch.Tensor:
        return sample_euler(edm, network, noise, arguments.steps, hints=network.encode_hints(hints))

    def uncached() -> torch.Tensor:
        return sample_euler(edm, network, noise, arguments.steps, hints=hints)

    seconds: dict[Callable, list[float]] = {cached: [], uncached: []}
    samples = {way: way() for way in seconds}  # not timed: the first pass fills caches and allocates
    for _ in range(arguments.rounds):
        for way in seconds:
            started = time.perf_counter()
            way()
            seconds[way].append(time.perf_counter() - started)
    ratio = statistics.median(seconds[uncached]) / statistics.median(seconds[cached])
    difference = float((samples[cached] - samples[uncached]).abs().max())
    print(
        f"{arguments.architecture}, batch {arguments.batch}, {arguments.steps} steps, {count} hint(s): "
        f"cached hints {ratio:.2f} times as fast, samples differ by at most {difference:.1g}",
        flush=True,
    )


if __name__ == "__main__":
    main()
