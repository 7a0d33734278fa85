"""The whole YAML as typed, validated models; every key has one home here.

`load_config` is the only reader: unknown or misspelt keys are refused with their path and the nearest right one.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ray_pipeline.errors import UserError
from ray_pipeline.models.architectures import ARCHITECTURES

# what pydantic says in Python's words
_EXPECTED = {"tuple_type": "Expected a list", "model_type": "Expected keys and values"}

CONDITION_TYPES = ("super_resolution", "denoising", "canny", "depth")
#: those whose hint may be a degraded partner on disk
PAIRED_TYPES = ("super_resolution", "denoising")

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A mapping of the YAML; refuses keys it does not know and never changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, and YAML reads on and yes as true
        kinds = _flatten(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and value not in kinds:
            raise ValueError(f"expected another value than {'true' if value else 'false'}")
        return value


class SimulateConfig(Section):
    """The embedded sample data set; written to `data.root` when nothing is there yet."""

    fields: Annotated[int, Field(ge=2)] = 64  # one for each split at least
    field_size: Positive = 512
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Annotated[int, Field(ge=0)] = 0


class DataConfig(Section):
    """Where the tiles are and how they become latents."""

    root: str = "data"
    mode: Literal["latents", "tiles"] = "latents"  # tiles are encoded once before training, or while it runs
    tile_size: Positive = 512
    latents: str | None = None  # default: <root>/latents
    augment_variants: Annotated[int, Field(ge=1, le=8)] = 1
    shard_rows: Positive = 1024
    shuffle_window: Positive | None = None  # rows; None: as large as the data set, a full shuffle
    super_resolution_scale: Literal[2, 4, 8] = 4
    simulate: SimulateConfig | None = None


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
    noise_embedding: Literal["reference", "scaled"] = "scaled"

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


class VaeConfig(Section):
    """The autoencoder: `embedded`, a folder in diffusers format, or a hub id."""

    pretrained: str = "embedded"
    batch_size: Positive = 4  # images an actor encodes at once
    actors: Positive | None = None  # default: one a GPU worker, else one a CPU core
    gpus_per_actor: PositiveFloat | None = None  # default: a GPU each to encode beforehand, none in data.mode tiles
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


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
    """Exponential moving average of the weights; validation and samples use it.

    Before `start_step` the average is a copy of the weights.
    """

    enabled: bool = True
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    update_every: Positive = 1
    start_step: Annotated[int, Field(ge=0)] = 2000


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


class MonitoringConfig(Section):
    """What is recorded and how often; the unit of intervals is the optimizer step."""

    log_every_n_steps: Positive = 10
    val_check_interval: Positive = 100
    val_tiles: Positive = 512  # at most so many validation tiles
    val_noise_levels: Annotated[int, Field(ge=1, le=1000)] = 4
    plot_loss: bool = True
    plot_lr: bool = True
    plot_samples: bool = True
    sample_every_n_epochs: Positive = 5
    num_samples: Positive = 16
    sample_steps: Annotated[int, Field(ge=2)] = 20
    tensorboard: bool = True


class CheckpointConfig(Section):
    """Safety saves between the epochs that a phase keeps; the newest one replaces the one before."""

    every_minutes: PositiveFloat | None = 30.0


class SweepConfig(Section):
    """The search between the phases."""

    enabled: bool = False

    @field_validator("enabled")
    @classmethod
    def _refuse(cls, enabled: bool) -> bool:
        if enabled:
            raise ValueError("this version has no sweep; set sweep.enabled: false")
        return enabled


class DatasetChoice(Section):
    """A data set that a phase draws from; in the YAML a bare name stands for {name: NAME}.

    weight: its share of the samples is weight / sum of weights. degradations: hints from degraded partners where there
    are some and simulated ones elsewhere (auto), from partners alone (real), or simulated alone.
    """

    name: str
    weight: PositiveFloat | None = None
    degradations: Literal["auto", "real", "simulated"] = "auto"


class PhaseConfig(Section):
    """One training: unconditional without condition_types, hint-conditioned with them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    epochs: Positive
    epochs_to_save: tuple[Positive, ...] | None = None
    condition_types: tuple[Literal[CONDITION_TYPES], ...] = ()
    condition_dropout: Fraction = 0.1
    datasets: tuple[DatasetChoice, ...] = ()  # default: every data set under data.root
    init: str | None = None  # a checkpoint folder; default: the best EMA weights of the phase before
    lr: PositiveFloat | None = None  # default: optimizer.lr

    @field_validator("datasets", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value]

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        # auto and real give the same hints wherever real is possible
        drawn = [choice.name + " (simulated)" * (choice.degradations == "simulated") for choice in self.datasets]
        for field, values in (("condition_types", self.condition_types), ("datasets", drawn)):
            if len(set(values)) != len(values):
                raise ValueError(f"{field} lists an entry twice: {', '.join(values)}")
        unweighted = [choice.name for choice in self.datasets if choice.weight is None]
        if unweighted and len(unweighted) < len(self.datasets):
            raise ValueError(f"datasets: {unweighted[0]} has no weight but others have; give all of them one, or none")
        chosen = [choice.name for choice in self.datasets if choice.degradations != "auto"]
        if chosen and not set(self.condition_types) & set(PAIRED_TYPES):
            raise ValueError(
                f"datasets: degradations of {chosen[0]} has no effect, since condition_types holds neither "
                f"{' nor '.join(PAIRED_TYPES)}; leave it out"
            )
        beyond = [e for e in self.epochs_to_save or () if e > self.epochs]
        if beyond:
            warnings.warn(
                f"phase {self.name}: epochs_to_save {beyond} lie beyond its {self.epochs} epochs and are never reached",
                stacklevel=2,
            )
        return self

    @property
    def save_epochs(self) -> tuple[int, ...]:
        """Epochs (from 1) after which a checkpoint is kept: as given, else 25, 50, 75 and 100 %."""
        if self.epochs_to_save is not None:
            return tuple(sorted({e for e in self.epochs_to_save if e <= self.epochs}))
        return tuple(sorted({max(1, round(self.epochs * quarter / 4)) for quarter in (1, 2, 3, 4)}))


class RayConfig(Section):
    """Where the work runs. `address: local` starts a Ray of its own and shuts it down at the end."""

    address: str = "auto"  # auto: the cluster this process runs in (RAY_ADDRESS, a Ray job), else local
    num_workers: Positive = 1
    use_gpu: Literal["auto", True, False] = "auto"
    cpus_per_worker: PositiveFloat = 1.0
    resources_per_worker: dict[str, PositiveFloat] = {}
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: Annotated[int, Field(ge=0)] = 3
    dashboard: bool = False


class Config(Section):
    """The whole job."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output_dir: str = "training_output"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    vae: VaeConfig = VaeConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    ema: EmaConfig = EmaConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sweep: SweepConfig = SweepConfig()
    phases: tuple[PhaseConfig, ...]
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check_together(self) -> Config:
        if not self.phases:
            raise ValueError("phases is empty; list at least one, with its name and epochs")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases: two phases share a name: {', '.join(names)}")
        if self.data.tile_size % 8:
            raise ValueError(
                f"data.tile_size {self.data.tile_size} is not a multiple of 8, the autoencoder's downscaling; "
                f"prepare tiles of {max(8, self.data.tile_size // 8 * 8)} px"
            )
        if self.data.tile_size != 8 * self.model.latent_size:
            raise ValueError(
                f"data.tile_size {self.data.tile_size} and model.latent_size {self.model.latent_size} do "
                f"not fit: the autoencoder makes tiles 8 times smaller, so set model.latent_size="
                f"{self.data.tile_size // 8}"
            )
        simulated = self.data.simulate
        if simulated is not None and simulated.field_size % self.data.tile_size:
            raise ValueError(
                f"data.simulate.field_size {simulated.field_size} is not a multiple of data.tile_size "
                f"{self.data.tile_size}; choose one that is"
            )
        if self.ray.num_workers > self.train.global_batch:
            raise ValueError(
                f"ray.num_workers {self.ray.num_workers} exceeds train.global_batch "
                f"{self.train.global_batch}: a worker would have no sample"
            )
        return self

    @property
    def hint_names(self) -> tuple[str, ...]:
        """Every condition type that some phase uses, in the order of CONDITION_TYPES."""
        used = {name for phase in self.phases for name in phase.condition_types}
        return tuple(name for name in CONDITION_TYPES if name in used)

    @property
    def simulated_names(self) -> tuple[str, ...]:
        """Condition types that some phase wants made from the tile even where it has a degraded partner."""
        used = {
            name
            for phase in self.phases
            if any(choice.degradations == "simulated" for choice in phase.datasets)
            for name in phase.condition_types
        }
        return tuple(name for name in PAIRED_TYPES if name in used)

    def dump(self) -> dict[str, Any]:
        """The resolved config as plain YAML/JSON values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML text that `load_config` reads back to an equal Config."""
        return yaml.safe_dump(self.dump(), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, validate.

    Raises UserError that names the file, the key's path and the nearest right key.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; give an existing YAML file to --config") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"config file {path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} holds {type(tree).__name__}, expected sections such as data: and model:")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Validate a config given as plain values; raises UserError with every wrong key, one sentence each."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_describe(problem) for problem in error.errors())) from None


def _apply_override(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r} is not of the form key.path=value, such as optimizer.lr=2e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from None
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                items = f"items 0 to {len(node) - 1}" if node else "no items"
                raise UserError(f"--set {key}: {where} has {items}, not {part!r}; or set the whole list, {where}=[...]")
            part = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"--set {key}: {'.'.join(parts[:depth])} holds a plain value, it has no key {part!r}")
        if last:
            node[part] = value
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = node[part]


def _describe(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(str(problem["loc"][-1]), _keys_at(problem["loc"][:-1]))
        return f"unknown key {path}; the nearest known key is {'.'.join([*path.split('.')[:-1], nearest])}"
    if problem["type"] == "missing":
        return f"{path} is missing and has no default"
    message = _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if path == "config" else f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, found {problem['input']!r}"


def _nearest(key: str, known: Sequence[str]) -> str:
    initials = "".join(word[:1] for word in key.split("_"))
    if initials in known:  # learning_rate -> lr
        return initials
    return max(known, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """Known keys of the section at `location`."""
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        sections = [t for t in _flatten(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = sections[0]
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", None)
    if not arguments:
        return [annotation]
    return [leaf for argument in arguments for leaf in _flatten(argument)]
