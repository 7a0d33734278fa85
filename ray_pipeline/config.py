"""The whole YAML: `load_config` is its only reader; unknown or misspelt keys are refused with their path and the
nearest right one. The sections are in sections.py and phase_sections.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ray_pipeline.errors import UserError
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.sections import (
    CONDITION_TYPES,
    PAIRED_TYPES,
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    HintControlConfig,
    ModelConfig,
    MonitoringConfig,
    OptimizerConfig,
    RayConfig,
    SchedulerConfig,
    Section,
    TrainConfig,
    VaeConfig,
    flatten,
)
from ray_pipeline.storage import Folder, is_uri
from ray_pipeline.sweep_sections import SweepConfig

# what pydantic says in Python's words
_EXPECTED = {"tuple_type": "Expected a list", "model_type": "Expected keys and values"}


class Config(Section):
    """The whole job."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output_dir: str = "training_output"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    hint_control: HintControlConfig = HintControlConfig()
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
        first = self.phases[0]
        if first.trainable == "lora" and first.init is None:
            raise ValueError(
                f"phases.0.trainable: lora leaves the network as it is, but {first.name} is the first phase, so its "
                "network is untrained; put a phase before it, or set phases.0.init to a checkpoint"
            )
        if self.hint_control.lora_rank > self.model.shape["hidden_size"]:
            raise ValueError(
                f"hint_control.lora_rank {self.hint_control.lora_rank} exceeds the network's hidden size of "
                f"{self.model.shape['hidden_size']}, so it would be no low rank; choose a smaller one"
            )
        if self.ray.max_workers > self.train.global_batch:
            raise ValueError(
                f"ray.num_workers {self.ray.max_workers} exceeds train.global_batch "
                f"{self.train.global_batch}: a worker would have no sample"
            )
        if self.ray.elastic and self.data.mode == "tiles":
            raise ValueError(
                f"ray.num_workers {list(self.ray.num_workers)} may change, but in data.mode tiles each worker shares "
                "the cluster with autoencoders; use data.mode: latents, or one number of workers"
            )
        return self

    @property
    def hint_names(self) -> tuple[str, ...]:
        """Every condition type that some phase uses, those of CONDITION_TYPES first, in their order."""
        used = {name for phase in self.phases for name in phase.condition_types}
        known = [name for name in CONDITION_TYPES if name in used]
        return (*known, *sorted(used.difference(known)))

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

    @property
    def checkpoint_store(self) -> str:
        """Where the run's checkpoints lie: a path or a URI."""
        if self.checkpoint.store is None and is_uri(self.output_dir):
            return Folder(self.output_dir).child("checkpoints").location
        return self.checkpoint.store or f"{self.output_dir}/checkpoints"

    def has_lora(self, phase: PhaseConfig) -> bool:
        """Whether a phase's network has low-rank parts: it trains them, or a phase before it did."""
        before = self.phases[: self.phases.index(phase) + 1]
        return bool(phase.condition_types) and any(earlier.trainable == "lora" for earlier in before)

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
        raise UserError(f"{source}: " + "; ".join(describe_problem(p, Config) for p in error.errors())) from None


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


def describe_problem(problem: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> str:
    """What pydantic found wrong in the values of `model`, in one sentence; `prefix` is the path of its section."""
    path = ".".join([prefix] * bool(prefix) + [str(part) for part in problem["loc"]]) or "config"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1], model)
        if not known:
            return f"unknown key {path}; {prefix} has no keys"
        nearest = _nearest(str(problem["loc"][-1]), known)
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


def _keys_at(location: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    """Known keys of the section at `location` of `model`."""
    for part in location:
        if part not in model.model_fields:  # an item of a list, or a key of a mapping to this model
            continue
        annotation = model.model_fields[part].annotation
        sections = [t for t in flatten(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        model = sections[0]
    return list(model.model_fields)
