"""Power-function averages of weights, and how stored ones give any other after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), section 3, appendix C.
The average of exponent gamma at step t counts the weights of step s by its profile p(s), proportional to s^gamma up to
t and 0 after it; its relative std is the profile's standard deviation divided by t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_STD = math.sqrt(1 / 12)  # gamma 0: the plain mean of all steps

# Snapshots that are all but equal, such as one given twice, make the equations singular: directions below this share of
# the largest singular value are left out. 256 snapshots of each of two tracks go down to 2e-8 only.
_SINGULAR = 1e-12


@dataclass(frozen=True)
class Snapshot:
    """A stored power-function average. `step`: the last optimizer step, from 1, whose weights are in it."""

    std: float
    step: int
    tensors: Mapping[str, Tensor]


def std_of_gamma(gamma: float) -> float:
    """Relative std of the profile t^gamma; ValueError for a negative gamma."""
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}, expected at least 0")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of_std(std: float) -> float:
    """Exponent of the profile with relative std `std`, 0.05 -> 16.97; ValueError outside (0, sqrt(1/12)]."""
    if not 0 < std <= MAX_STD:
        raise ValueError(f"relative std is {std}, expected more than 0 and at most {MAX_STD:.4f}")
    # std^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 has one root that is not negative
    inverse = std**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def power_beta(step: int, gamma: float, every: int = 1) -> float:
    """Decay of the update at optimizer step `step`, from 1, with an update each `every` steps; 0 at the first.

    After n updates the i-th has exactly the weight (i/n)^(gamma+1) - ((i-1)/n)^(gamma+1), the integral of the
    continuous profile over its steps: what combines the profiles combines the averages, however short the run.
    """
    return 0.0 if step <= every else (1 - every / step) ** (gamma + 1)


def combination(profiles: Sequence[tuple[float, int]], target_std: float, target_step: int) -> np.ndarray:
    """Weights (N,) float64 of N averages (std, step) whose sum is nearest to the average of `target_std` at
    `target_step`.

    Least squares over the continuous profiles, among weights that add up to 1. The paper's add up to it only nearly
    (0.91 to 1.01 with four snapshots of each track), which its layers forgive, for they normalise their weights, and
    ours do not. Averages after `target_step` have weight 0: they contain steps that the target does not. ValueError
    when all are, or for a std or step out of range.
    """
    gammas, steps = _exponents(profiles)
    target = _exponents([(target_std, target_step)])
    past = steps <= target_step
    if not past.any():
        raise ValueError(f"no average at or before step {target_step}; the steps are {sorted(set(steps.tolist()))}")
    gammas, steps = gammas[past], steps[past]
    gram = _inner_product(gammas[:, None], steps[:, None], gammas, steps)
    norms = np.sqrt(np.diag(gram))  # profiles of equal norm: a tenth of the condition number
    sides = np.stack([_inner_product(gammas, steps, *target), np.ones(len(steps))], axis=1) / norms[:, None]
    solved = np.linalg.lstsq(gram / np.outer(norms, norms), sides, rcond=_SINGULAR)[0] / norms[:, None]
    nearest, along = solved.T  # `along`: where the Lagrange multiplier of the sum moves the unconstrained solution
    weights = np.zeros(len(profiles))
    weights[past] = nearest + along * (1 - nearest.sum()) / along.sum()
    return weights


def profile_error(profiles: Sequence[tuple[float, int]], target_std: float, target_step: int) -> float:
    """Relative L2 distance of the profile that `combination` gives from the wanted one; below 1e-7 it is rounding."""
    weights = combination(profiles, target_std, target_step)
    gammas, steps = _exponents(profiles)
    target = _exponents([(target_std, target_step)])
    gram = _inner_product(gammas[:, None], steps[:, None], gammas, steps)
    wanted = _inner_product(*target, *target).item()
    squared = wanted - 2 * weights @ _inner_product(gammas, steps, *target) + weights @ gram @ weights
    return math.sqrt(max(0.0, squared) / wanted)


@torch.no_grad()
def reconstruct(snapshots: Sequence[Snapshot], target_std: float, target_step: int | None = None) -> dict[str, Tensor]:
    """Average of relative std `target_std` at `target_step` (default: the newest snapshot's), float32 by name.

    Sums one tensor at a time in float64, so snapshots may be read lazily; those after `target_step` are not read.
    ValueError without snapshots, or when their names or shapes differ.
    """
    if not snapshots:
        raise ValueError("no snapshots to reconstruct from")
    ordered = sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.std))
    until = ordered[-1].step if target_step is None else target_step
    weights = combination([(snapshot.std, snapshot.step) for snapshot in ordered], target_std, until)
    used = [(float(w), snapshot) for w, snapshot in zip(weights, ordered, strict=True) if snapshot.step <= until]
    names = list(used[0][1].tensors)
    for _, snapshot in used:
        differing = set(names) ^ set(snapshot.tensors)
        if differing:
            raise ValueError(f"not all snapshots have {min(differing)}; expected those of one network")
    return {name: _weighted_sum(name, used) for name in names}


def _weighted_sum(name: str, weighted: list[tuple[float, Snapshot]]) -> Tensor:
    total = None
    for weight, snapshot in weighted:
        tensor = snapshot.tensors[name]
        if total is None:
            total = torch.zeros_like(tensor, dtype=torch.float64)
        if tensor.shape != total.shape:
            raise ValueError(
                f"{name} of the snapshot of std {snapshot.std} at step {snapshot.step} is {tuple(tensor.shape)}, "
                f"expected {tuple(total.shape)} as in the others"
            )
        total.add_(tensor, alpha=weight)
    return total.float()


def _exponents(profiles: Sequence[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """gamma and step of each (std, step), (N,) float64 each."""
    early = [step for _, step in profiles if step < 1]
    if early:
        raise ValueError(f"step is {early[0]}, expected at least 1")
    return np.array([gamma_of_std(std) for std, _ in profiles]), np.array([step for _, step in profiles], np.float64)


def _inner_product(gamma_a, step_a, gamma_b, step_b) -> np.ndarray:
    """Integral over time of the product of two profiles (EDM2, appendix C), broadcasting."""
    earlier, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    gamma_later = np.where(step_a < step_b, gamma_b, gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (earlier / later) ** gamma_later / later
