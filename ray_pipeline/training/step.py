"""One optimizer step: micro-batches, loss, gradients, update. No Ray in here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ray_pipeline.data.latents import LatentStats
from ray_pipeline.diffusion.noise import draw, kept_hints
from ray_pipeline.sections import OptimizerConfig
from ray_pipeline.training.setup import PhaseData, PhaseRun


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass, on the host: x0, noise (B, C, H, W), z (B,), hints (B, K, C, H, W), mask (B, K);
    the last two None in an unconditional phase."""

    x0: Tensor
    noise: Tensor
    z: Tensor
    hints: Tensor | None
    mask: Tensor | None

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: None if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()}
        return MicroBatch(**moved)


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch, and the norm of the joint gradient; nan for a step that was avoided.

    skipped: nothing was learned, since one of them is not finite; avoided: nor was anything computed. suspects:
    positions of the samples whose own loss is not finite. save, stop: whether any rank asked for it.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    avoided: bool = False
    suspects: tuple[int, ...] = ()
    save: bool = False
    stop: bool = False


def micro_batches(data: PhaseData, batch: dict[str, np.ndarray]) -> list[MicroBatch]:
    """Cut a rank's slice of a global batch into micro-steps and add the randomness that belongs to its samples."""
    size = data.config.train.batch_size
    return [
        _micro_batch(data, {key: values[start : start + size] for key, values in batch.items()})
        for start in range(0, len(batch["index"]), size)
    ]


def stack_hints(values: dict[str, np.ndarray], names: tuple[str, ...], stats: LatentStats, sigma_data: float) -> Tensor:
    """Stored hint latents -> (B, K, C, H, W) float32, normalised like the tiles."""
    stacked = np.stack([values[f"hint.{name}"] for name in names], axis=1)
    return torch.from_numpy(stats.normalise(stacked, sigma_data))


def optimize(
    run: PhaseRun, step: int, batches: list[MicroBatch], *, save: bool = False, stop: bool = False
) -> StepResult:
    """One optimizer step on all ranks together; the gradient is that of the mean objective over the global batch.

    Where the loss or the joint gradient is not finite, all ranks leave the update out. save, stop: this rank asks the
    others to save or stop after this step.
    """
    state, plan = run.state, run.plan
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(run.config.optimizer, step, run.total_steps, run.phase.lr)
    own: list[Tensor] = []
    for number, batch in enumerate(batches):
        _seed_dropout(run, step, number)
        moved = batch.to(run.device)
        with run.clock.part("compute"), _sync(run.model, last=number == len(batches) - 1):
            with run.autocast():
                losses, objectives = run.model(**vars(moved))
            # DDP averages over ranks; slices may differ by one sample, so each rank gives its sum
            (objectives.sum() * (run.world_size / plan.global_batch)).backward()
        own.append(losses.detach())
    limit = run.config.optimizer.grad_clip or math.inf
    with run.clock.part("optimizer"):
        gradient = torch.nn.utils.clip_grad_norm_(state.optimizer.param_groups[0]["params"], limit)
    told = torch.stack([sum(losses.sum() for losses in own), *torch.tensor([save, stop], device=run.device).float()])
    if run.world_size > 1:
        torch.distributed.all_reduce(told)  # a loss may be infinite on one rank and its gradient 0
    total, saves, stops, norm = torch.stack([*told, gradient]).tolist()
    loss = total / plan.global_batch
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if skipped:
        state.skipped.append(step + 1)
    else:
        with run.clock.part("optimizer"):
            state.optimizer.step()
    _end_step(run, step)
    suspects = _suspects(run, step, own) if skipped else ()
    return StepResult(loss, norm, skipped, suspects=suspects, save=saves > 0, stop=stops > 0)


def avoid(run: PhaseRun, step: int) -> StepResult:
    """A step that is known to have no finite loss: the position advances, nothing is computed."""
    run.state.skipped.append(step + 1)
    _end_step(run, step)
    return StepResult(math.nan, math.nan, skipped=True, avoided=True)


def _end_step(run: PhaseRun, step: int) -> None:
    state = run.state
    state.optimizer.zero_grad(set_to_none=True)
    state.step = step + 1
    with run.clock.part("ema"):
        for average in state.averages:
            average.update(state.step)


def _suspects(run: PhaseRun, step: int, losses: list[Tensor]) -> tuple[int, ...]:
    """Positions of the samples of all ranks whose loss is not finite."""
    broken = ~torch.isfinite(torch.cat(losses)).cpu().numpy()
    own = run.plan.positions(step, run.rank, run.world_size)[broken].tolist()
    parts = [own] * run.world_size
    if run.world_size > 1:
        torch.distributed.all_gather_object(parts, own)
    return tuple(position for part in parts for position in part)


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int, phase_lr: float | None = None) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or half a cosine to 1 %."""
    base = phase_lr or settings.lr
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return base * warm
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))
    return base * warm * (0.01 + 0.99 * left)


def warm_up(run: PhaseRun) -> None:
    """Two throwaway passes: DDP rebuilds its buckets after its first backward, which changes the order of summation.

    Afterwards a resumed worker sums as one that never stopped.
    """
    if run.world_size == 1:
        return
    shape = (1, *run.train_store.shape)
    names = run.hints
    for _ in range(2):
        batch = MicroBatch(
            x0=torch.zeros(shape),
            noise=torch.ones(shape),
            z=torch.zeros(1),
            hints=torch.zeros((1, len(names), *shape[1:])) if names else None,
            mask=torch.ones((1, len(names)), dtype=torch.bool) if names else None,
        )
        with run.autocast():
            _, objectives = run.model(**vars(batch.to(run.device)))
        objectives.sum().backward()
        run.state.optimizer.zero_grad(set_to_none=True)


def _micro_batch(data: PhaseData, values: dict[str, np.ndarray]) -> MicroBatch:
    sigma_data, stats = data.config.scheduler.sigma_data, data.train_store.stats
    draws = draw(data.plan.seed, data.plan.phase, values["index"], data.train_store.shape, len(data.hints))
    hints = mask = None
    if data.hints:
        hints = stack_hints(values, data.hints, stats, sigma_data)
        mask = torch.from_numpy(kept_hints(draws, data.phase.condition_dropout))
    latent = values["latent"]
    if "std" in values:  # the posterior is sampled from a stream of its own, so that the noise stays what it is
        posterior = draw(data.plan.seed, f"{data.plan.phase}/posterior", values["index"], data.train_store.shape)
        latent = latent.astype(np.float32) + values["std"] * posterior.noise
    return MicroBatch(
        x0=torch.from_numpy(stats.normalise(latent, sigma_data)),
        noise=torch.from_numpy(draws.noise),
        z=torch.from_numpy(draws.z),
        hints=hints,
        mask=mask,
    )


def _sync(model: torch.nn.Module, last: bool) -> AbstractContextManager:
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def _seed_dropout(run: PhaseRun, step: int, number: int) -> None:
    if run.config.model.dropout:
        parts = (run.config.seed, run.phase.name, step, run.rank, number)
        torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1)


@dataclass(frozen=True)
class StepInput:
    """What one rank needs for one step: its samples' positions in the endless sequence, and the samples."""

    step: int
    positions: np.ndarray
    batches: list[MicroBatch]


def prepared(data: PhaseData, steps: Iterator[tuple[int, dict[str, np.ndarray]]]) -> Iterator[StepInput]:
    """Each step of the stream, ready to compute; pinned for a GPU."""
    for step, batch in steps:
        batches = micro_batches(data, batch)
        if data.device.type == "cuda":
            batches = [
                MicroBatch(**{k: None if v is None else v.pin_memory() for k, v in vars(b).items()}) for b in batches
            ]
        yield StepInput(step, batch["index"], batches)
