"""What a change of each key does to a run that goes on, and why: the table JUDGED. A new key wants a place in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a change of a key does. HARMLESS: to nothing that training computes, but for rounding. TRAINING: it is
    another training from here on, which the user may want. PHASE: what a phase stored that is not finished would not
    fit. RUN: what any phase stored would not fit."""

    HARMLESS = 0
    TRAINING = 1
    PHASE = 2
    RUN = 3


@dataclass(frozen=True)
class Rule:
    """Why these keys are of this kind; a key may be a whole section, * stands for a number."""

    kind: Kind
    why: str
    keys: tuple[str, ...]


JUDGED = (
    Rule(
        Kind.HARMLESS,
        "where things lie: their contents are compared by the store's fingerprint",
        ("data.root", "data.latents", "data.simulate", "vae.pretrained"),
    ),
    Rule(Kind.HARMLESS, "copies of what lies in object storage", ("data.cache_gib", "data.cache_dir")),
    Rule(
        Kind.HARMLESS,
        "where the run lies: it must hold the checkpoints that phase_state.json tells of",
        ("output_dir", "checkpoint.store"),
    ),
    Rule(
        Kind.HARMLESS,
        "who does the work; dropout differs with the number of workers",
        ("ray", "train.dataloader_workers", "vae.actors", "vae.gpus_per_actor"),
    ),
    Rule(
        Kind.HARMLESS,
        "how much is computed at once: rounding, and the draws of dropout",
        ("train.batch_size", "train.threads", "train.compile", "train.activation_checkpointing", "vae.batch_size"),
    ),
    Rule(
        Kind.HARMLESS,
        "what is written and drawn beside the training",
        (
            "checkpoint.every_minutes", "checkpoint.background", "phases.*.epochs_to_save", "ema.snapshots",
            "monitoring.log_every_n_steps", "monitoring.val_check_interval", "monitoring.val_averages",
            "monitoring.plot_loss", "monitoring.plot_lr", "monitoring.plot_samples", "monitoring.sample_every_n_epochs",
            "monitoring.num_samples", "monitoring.sample_steps", "monitoring.tensorboard", "monitoring.log_samples",
            "monitoring.ray_metrics", "monitoring.wandb", "monitoring.wandb_project", "monitoring.sinks",
            "monitoring.report", "monitoring.nearest_tiles",
        ),
    ),
    Rule(
        Kind.HARMLESS,
        "the grid of sampling; training draws its noise levels by P_mean and P_std",
        ("scheduler.num_train_timesteps", "scheduler.sigma_min", "scheduler.sigma_max", "scheduler.rho"),
    ),
    Rule(Kind.HARMLESS, "says whether a store is taken, not what is in it", ("data.max_rejected",)),
    Rule(Kind.HARMLESS, "a sweep that has begun keeps its own settings, and refuses others", ("sweep",)),
    Rule(Kind.HARMLESS, "when the run goes back or gives up", ("train.max_skipped_steps",)),
    Rule(
        Kind.TRAINING,
        "which samples there are, and their order",
        (
            "data.mode", "data.augment_variants", "data.shard_rows", "data.shuffle_window", "data.hints",
            "vae.precision", "vae.posterior", "phases.*.datasets",
        ),
    ),
    Rule(
        Kind.TRAINING,
        "what is learnt, and how",
        (
            "optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.warmup_steps",
            "optimizer.schedule", "optimizer.grad_clip", "scheduler.P_mean", "scheduler.P_std", "model.dropout",
            "train.precision", "ema.update_every", "ema.start_step", "phases.*.epochs", "phases.*.condition_types",
            "phases.*.condition_dropout", "phases.*.init", "phases.*.lr",
        ),
    ),
    Rule(
        Kind.TRAINING,
        "validation losses before and after cannot be compared, and the best is chosen by them",
        ("monitoring.val_tiles", "monitoring.val_noise_levels"),
    ),
    Rule(
        Kind.PHASE,
        "averages are stored under their widths, and only those stored can go on",
        ("ema.enabled", "ema.decay", "ema.more_decays", "ema.power_stds"),
    ),
    Rule(Kind.PHASE, "a phase counts its samples in steps of it", ("train.global_batch",)),
    Rule(Kind.PHASE, "its weights are stored with the optimizer", ("train.uncertainty_weighting",)),
    Rule(
        Kind.RUN,
        "the stored weights are those of another network",
        (
            "model.architecture", "model.latent_size", "model.latent_channels", "model.hidden_size", "model.depth",
            "model.num_heads", "model.patch_size", "model.noise_embedding", "model.qk_norm", "data.tile_size",
            "hint_control.aligned", "hint_control.lora_rank", "hint_control.lora_targets", "phases.*.trainable",
        ),
    ),
    Rule(
        Kind.RUN,
        "the stored weights mean something else",
        ("scheduler.type", "scheduler.sigma_data", "scheduler.prediction_type"),
    ),
    Rule(Kind.RUN, "order, noise and validation of the whole run hang on it", ("seed",)),
    Rule(Kind.RUN, "its checkpoints bear it", ("phases.*.name",)),
)  # fmt: skip


def rule_of(key: str) -> Rule:
    """The rule of a key such as phases.1.epochs; KeyError for one that nobody judged."""
    general = re.sub(r"^phases\.\d+", "phases.*", key)
    for rule in JUDGED:
        for judged in rule.keys:
            if general == judged or general.startswith(f"{judged}."):
                return rule
    raise KeyError(key)
