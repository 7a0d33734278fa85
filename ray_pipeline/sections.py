"""The sections of the YAML as typed, validated models; every key has one home here."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ray_pipeline.models.architectures import ARCHITECTURES, LORA_TARGETS
from ray_pipeline.runtime_env import check_runtime_env

CONDITION_TYPES = ("super_resolution", "denoising", "canny", "depth")
#: those whose hint is a degraded image, a partner on disk or simulated
PAIRED_TYPES = ("super_resolution", "denoising")
#: those whose hint may be an image on disk: degraded partners, and the depth that `prepare` takes from focus
PARTNER_TYPES = (*PAIRED_TYPES, "depth")

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A mapping of the YAML; refuses keys it does not know and never changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, and YAML reads on and yes as true
        kinds = flatten(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and value not in kinds:
            raise ValueError(f"expected another value than {'true' if value else 'false'}")
        return value


class SimulateConfig(Section):
    """The embedded sample data set; written to `data.root` when nothing is there yet."""

    fields: Annotated[int, Field(ge=2)] = 64  # one for each split at least
    field_size: Positive = 512
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    scale: Literal[2, 4, 8] = 4  # of the low-resolution partners
    seed: Annotated[int, Field(ge=0)] = 0


class DataConfig(Section):
    """Where the tiles are and how they become latents; root and latents are paths or URIs.

    cache_gib, cache_dir: each node keeps blocks of latents of object storage on its own disk, so much at most; 0: none.
    Where that is less than what is shuffled together (all rows, or shuffle_window), nothing is kept.
    """

    root: str = "data"
    mode: Literal["latents", "tiles"] = "latents"  # tiles are encoded once before training, or while it runs
    tile_size: Positive = 512
    latents: str | None = None  # default: <root>/latents
    cache_gib: Annotated[float, Field(ge=0)] = 20.0
    cache_dir: str | None = None  # default: ray_pipeline-<user id> in TMPDIR of the node, else in /var/tmp
    augment_variants: Annotated[int, Field(ge=1, le=8)] = 1
    shard_rows: Positive = 1024
    shuffle_window: Positive | None = None  # rows; None: as large as the data set, a full shuffle
    max_rejected: Annotated[int, Field(ge=0)] = 0  # bad tiles that encoding may leave out
    hints: dict[str, dict[str, Any]] = {}  # parameters of each hint: data/hint_registry.py knows and checks them
    simulate: SimulateConfig | None = None

    @field_validator("cache_dir")
    @classmethod
    def _check_cache_dir(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith(("/", "~")):
            raise ValueError(f"expected an absolute path, which every node takes for its own disk, found {folder!r}")
        return folder


class ModelConfig(Section):
    """The diffusion transformer. `architecture: custom` takes depth, hidden_size, num_heads and patch_size."""

    architecture: str = "DiT-XL/8"
    latent_size: Positive = 64
    latent_channels: Positive = 4
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    patch_size: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    noise_embedding: Literal["reference", "scaled", "fourier"] = "scaled"
    qk_norm: bool = False  # root-mean-square norm of each head's queries and keys

    @model_validator(mode="after")
    def _check_architecture(self) -> ModelConfig:
        shape = {k: getattr(self, k) for k in ("depth", "hidden_size", "num_heads", "patch_size")}
        if self.architecture == "custom":
            missing = [k for k, v in shape.items() if v is None]
            if missing:
                raise ValueError(f"architecture custom needs {', '.join(missing)}")
            if self.hidden_size % self.num_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        elif self.architecture not in ARCHITECTURES:
            nearest = difflib.get_close_matches(self.architecture, ARCHITECTURES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown architecture {self.architecture!r}; the nearest known one is {nearest!r}, and "
                "'custom' takes depth, hidden_size, num_heads and patch_size"
            )
        else:
            for key, expected in ARCHITECTURES[self.architecture].items():
                if shape[key] not in (None, expected):
                    raise ValueError(
                        f"{key} {shape[key]} does not fit {self.architecture}, which has {expected}; "
                        f"leave it out or use architecture: custom"
                    )
        patch = self.shape["patch_size"]
        if self.latent_size % patch:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of the patch size {patch}")
        if self.shape["hidden_size"] % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (sin-cos positions need it)")
        return self

    @property
    def shape(self) -> dict[str, int]:
        """depth, hidden_size, num_heads and patch_size, whether named or custom."""
        if self.architecture == "custom":
            return {k: getattr(self, k) for k in ("depth", "hidden_size", "num_heads", "patch_size")}
        return dict(ARCHITECTURES[self.architecture])


class HintControlConfig(Section):
    """How hints reach the network: as tokens always, and by the aligned path beside them.

    lora_rank, lora_targets: of the low-rank parts that phases[].trainable: lora trains.
    """

    aligned: bool = True
    lora_rank: Positive = 16
    lora_targets: Annotated[tuple[Literal[LORA_TARGETS], ...], Field(min_length=1)] = (
        "x_embedder",
        "adaLN_modulation",
        "qkv",
        "proj",
        "fc2",
    )

    @field_validator("lora_targets")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"lora_targets lists an entry twice: {', '.join(names)}")
        return names


class VaeConfig(Section):
    """The autoencoder: `embedded`, a folder in diffusers format, or a hub id."""

    pretrained: str = "embedded"
    batch_size: Positive = 4  # images an actor encodes at once
    actors: Positive | None = None  # default: one a GPU worker, else one a CPU core
    gpus_per_actor: PositiveFloat | None = None  # default: a GPU each to encode beforehand, none in data.mode tiles
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    posterior: Literal["mode", "sample"] = "mode"  # AutoencoderKL: sample also stores the std and draws from it


class SchedulerConfig(Section):
    """EDM (Karras et al. 2022); the names are those of diffusers' EDMEulerScheduler."""

    type: Literal["EDMEulerScheduler"] = "EDMEulerScheduler"
    num_train_timesteps: Positive = 1000
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    rho: PositiveFloat = 7.0
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    P_mean: float = -1.2
    P_std: PositiveFloat = 1.2

    @model_validator(mode="after")
    def _check_range(self) -> SchedulerConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must lie below sigma_max {self.sigma_max}")
        return self


class EmaConfig(Section):
    """Exponential moving averages of the weights; validation and samples use the one of `decay`.

    Before `start_step` that average is a copy of the weights. more_decays: tracked beside it. power_stds: relative
    widths of power-function averages (Karras et al. 2024), stored `snapshots` times a phase: `ray-pipeline ema` makes
    any other width from two of them.
    """

    enabled: bool = True
    decay: Decay = 0.9999
    update_every: Positive = 1
    start_step: Annotated[int, Field(ge=0)] = 2000
    more_decays: tuple[Decay, ...] = ()
    power_stds: tuple[Annotated[float, Field(gt=0, le=0.25)], ...] = (0.05, 0.1)
    snapshots: Annotated[int, Field(ge=0, le=1000)] = 16

    @model_validator(mode="after")
    def _check_tracks(self) -> EmaConfig:
        for key, values in (("more_decays", (self.decay, *self.more_decays)), ("power_stds", self.power_stds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: two averages of {max(values, key=values.count)}; name each once")
        return self


class OptimizerConfig(Section):
    """Fused AdamW."""

    lr: PositiveFloat = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: PositiveFloat | None = 1.0


class TrainConfig(Section):
    """A micro-step (`batch_size`, on one device) and an optimizer step (`global_batch`, over all of them)."""

    batch_size: Positive = 2
    global_batch: Positive = 256
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware has it, else fp32
    dataloader_workers: Positive = 1  # gather tasks a rank
    threads: Positive | None = None  # CPU threads a worker; default: the node's cores over its workers
    compile: bool = False
    activation_checkpointing: bool = False  # less memory for one more forward pass
    uncertainty_weighting: bool = False  # weigh noise levels by a learned uncertainty (Karras et al. 2024)
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10  # of 100 steps, those whose loss may be not finite


class MonitoringConfig(Section):
    """What is recorded and how often; the unit of intervals is the optimizer step.

    nearest_tiles: beside each unconditional sample its nearest training tile is shown, of so many at most; 0: none.
    """

    log_every_n_steps: Positive = 10
    val_check_interval: Positive = 100
    val_tiles: Positive = 512  # at most so many validation tiles
    val_noise_levels: Annotated[int, Field(ge=1, le=1000)] = 4
    val_averages: Literal["first", "all"] = "first"  # at an epoch's end: the average of ema.decay, or each of them
    plot_loss: bool = True
    plot_lr: bool = True
    plot_samples: bool = True
    sample_every_n_epochs: Positive = 5
    num_samples: Positive = 16
    sample_steps: Annotated[int, Field(ge=2)] = 20
    tensorboard: bool = True
    ray_metrics: bool = True  # gauges for Prometheus, served by every node of the Ray
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases
    wandb_project: str = "ray-pipeline"
    sinks: tuple[str, ...] = ()  # of other packages, by their entry points ray_pipeline.sinks
    report: bool = True  # report.html, made anew while the run goes on
    nearest_tiles: Annotated[int, Field(ge=0)] = 20_000  # training tiles searched for the nearest to each sample
    log_samples: bool = False  # which samples each rank took at each step, in logs/samples/<phase>/


class CheckpointConfig(Section):
    """Where checkpoints lie, and safety saves between the epochs that a phase keeps; the newest one replaces the one
    before.

    background: write a copy in memory while training goes on (auto: where there is memory for it), or stand still.
    """

    store: str | None = None  # a path or URI; default: <output_dir>/checkpoints
    every_minutes: PositiveFloat | None = 30.0
    background: Literal["auto", True, False] = "auto"


class RayConfig(Section):
    """Where the work runs. `address: local` starts a Ray of its own and shuts it down at the end.

    num_workers: a number, or [min, max]: training goes on with as many as the cluster has room for, and looks for room
    for more every resize_minutes. timeout_minutes: how long anything may wait: workers for their place, a worker for a
    batch or for the other workers. stop_timeout_seconds: how long a run that is asked to stop may take to commit.
    autoscaling: nodes come when they are asked for, so the cluster may have no room for the workers yet; they wait.
    data_cpus: logical CPUs that actors with an autoencoder, one each, may take at once. object_store_gib: memory for
    Ray's objects on a node of a local Ray, and on any Ray what one execution of Ray Data (encoding, or the stream of a
    worker) may hold there. runtime_env: what Ray brings to every node, its own fields that runtime_env.py lets pass.
    """

    address: str = "auto"  # auto: the cluster this process runs in (RAY_ADDRESS, a Ray job), else local
    num_workers: int | tuple[int, int] = 1
    use_gpu: Literal["auto", True, False] = "auto"
    autoscaling: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    resources_per_worker: dict[str, PositiveFloat] = {}
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    data_cpus: Positive | None = None
    object_store_gib: Annotated[float, Field(ge=0.1)] | None = None  # Ray starts with 75 MiB at least
    runtime_env: dict[str, Any] = {}
    max_failures: Annotated[int, Field(ge=0)] = 3
    stop_timeout_seconds: PositiveFloat = 60.0
    timeout_minutes: PositiveFloat = 30.0
    resize_minutes: PositiveFloat = 1.0
    dashboard: bool = False

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        bounds = value if isinstance(value, (list, tuple)) else [value, value]
        whole = all(isinstance(bound, int) and not isinstance(bound, bool) and bound > 0 for bound in bounds)
        if len(bounds) != 2 or not whole or bounds[0] > bounds[1]:
            raise ValueError(f"expected a number of workers, or [min, max] with 1 <= min <= max, found {value!r}")
        return value

    @field_validator("runtime_env")
    @classmethod
    def _check_runtime_env(cls, fields: dict[str, Any]) -> dict[str, Any]:
        check_runtime_env(fields)
        return fields

    @model_validator(mode="after")
    def _check_autoscaling(self) -> RayConfig:
        if self.autoscaling and self.use_gpu == "auto":
            raise ValueError("autoscaling with use_gpu=auto: GPUs may not have come yet; set use_gpu to true or false")
        if self.autoscaling and self.address == "local":
            raise ValueError("autoscaling with address=local: no node ever joins a Ray of the run's own")
        return self

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during a run."""
        return isinstance(self.num_workers, tuple)

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


def flatten(annotation: Any) -> list[Any]:
    """The plain types that an annotation is made of."""
    arguments = getattr(annotation, "__args__", None)
    if not arguments:
        return [annotation]
    return [leaf for argument in arguments for leaf in flatten(argument)]
