"""What the config's sections become: network, diffusion process, optimizer, averages, and torch's own settings."""

from __future__ import annotations

import os
from itertools import chain

import torch
from torch import nn

from ray_pipeline.config import Config
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import DiT, build_dit
from ray_pipeline.models.loss_uncertainty import LossUncertainty
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.training.ema import EMA, PowerEMA
from ray_pipeline.training.state import TrainState


def precision(config: Config, device_type: str) -> str:
    """fp32 or bf16; `auto` is bf16 on CUDA and on a CPU that multiplies bf16 matrices itself, else fp32."""
    if config.train.precision != "auto":
        return config.train.precision
    native = device_type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def make_edm(config: Config) -> EDM:
    """The diffusion process of the scheduler section."""
    keys = ("sigma_data", "sigma_min", "sigma_max", "rho", "prediction_type", "P_mean", "P_std")
    return EDM(**{key: getattr(config.scheduler, key) for key in keys})


def make_network(config: Config, phase: PhaseConfig) -> DiT:
    """The network of a phase, its weights fresh; what the phase does not train has requires_grad False."""
    model, control = config.model, config.hint_control
    lora = config.has_lora(phase)
    network = build_dit(
        "custom",
        latent_size=model.latent_size,
        latent_channels=model.latent_channels,
        dropout=model.dropout,
        noise_embedding=model.noise_embedding,
        qk_norm=model.qk_norm,
        aligned=bool(phase.condition_types) and control.aligned,
        lora_rank=control.lora_rank if lora else 0,
        lora_targets=control.lora_targets if lora else (),
        activation_checkpointing=config.train.activation_checkpointing,
        **model.shape,
    )
    if phase.trainable == "lora":
        network.freeze_base()
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UserError(
                f"phase {phase.name} has nothing to train: hint_control.aligned is false, and in a network of this "
                f"depth hints pass none of hint_control.lora_targets {', '.join(control.lora_targets)}; add qkv"
            )
    return network


def make_state(config: Config, network: DiT) -> TrainState:
    """Optimizer, averages and, where it is asked for, the loss's uncertainty, for what the network trains."""
    uncertainty = None
    if config.train.uncertainty_weighting:
        uncertainty = LossUncertainty().to(next(network.parameters()).device)
    return TrainState(
        network=network,
        optimizer=make_optimizer(config, network, uncertainty),
        averages=make_averages(config, network),
        uncertainty=uncertainty,
    )


def make_optimizer(config: Config, *modules: nn.Module | None) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters of the modules that are there."""
    settings = config.optimizer
    parameters = chain.from_iterable(module.parameters() for module in modules if module is not None)
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_averages(config: Config, network: DiT) -> list:
    """The averages of the ema section, the one that validation uses first; none when it is disabled."""
    settings = config.ema
    if not settings.enabled:
        return []
    decays = (settings.decay, *settings.more_decays)
    averages = [EMA(network, decay, settings.update_every, settings.start_step) for decay in decays]
    return [*averages, *PowerEMA(network, settings.power_stds, settings.update_every).tracks]


def prepare_torch(config: Config, device: torch.device, local_workers: int) -> None:
    """Threads and determinism of this process."""
    if device.type == "cpu":
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs, which says nothing about the cores it may use
        torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // local_workers))
    else:
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = True
