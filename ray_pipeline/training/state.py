"""What a checkpoint holds, in one place: network, optimizer, EMA, position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ray_pipeline.checkpoints import Checkpoint
from ray_pipeline.errors import UserError
from ray_pipeline.models.dit import DiT
from ray_pipeline.models.loss_uncertainty import LossUncertainty
from ray_pipeline.models.weights import header_in
from ray_pipeline.training.ema import EMA, PowerTrack

OPTIMIZER_GROUP = "optimizer"
MODEL_GROUP = "model"
UNCERTAINTY_GROUP = "loss_uncertainty"
#: arguments of build_dit that decide what the base network computes; hint control may be new
SHAPE_KEYS = (
    "depth", "hidden_size", "num_heads", "patch_size", "latent_size", "latent_channels", "noise_embedding", "qk_norm",
)  # fmt: skip


@dataclass
class TrainState:
    """All that training changes. `step` optimizer steps are done in this phase, of which those in `skipped` (from 1)
    changed no weight; the first of the averages is the one that validation, samples and the next phase use."""

    network: DiT
    optimizer: torch.optim.AdamW
    averages: list[EMA | PowerTrack]
    uncertainty: LossUncertainty | None = None
    step: int = 0
    skipped: list[int] = field(default_factory=list)

    @property
    def ema(self) -> EMA | PowerTrack | None:
        """The average that validation uses; None where there is none."""
        return self.averages[0] if self.averages else None

    @property
    def average_name(self) -> str:
        """Of the weights that validation uses, in records and in weight files."""
        return "weights" if self.ema is None else self.ema.group

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        named = dict(self.network.named_parameters())
        if self.uncertainty is not None:
            named |= {f"{UNCERTAINTY_GROUP}.{name}": p for name, p in self.uncertainty.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to save, by file."""
        groups = {MODEL_GROUP: dict(self.network.state_dict()), OPTIMIZER_GROUP: self._optimizer_tensors()}
        if self.uncertainty is not None:
            groups[UNCERTAINTY_GROUP] = dict(self.uncertainty.state_dict())
        return groups | {average.group: average.tensors() for average in self.averages}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that `checkpoint` saved, with equal bits; UserError when its network or EMA is another."""
        wanted = [average.group for average in self.averages] + [UNCERTAINTY_GROUP] * (self.uncertainty is not None)
        missing = [group for group in wanted if group not in checkpoint]
        if missing:
            raise UserError(
                f"checkpoint {checkpoint.folder} holds {', '.join(checkpoint)}, not {missing[0]}; "
                "resume with the ema and train sections that it was trained with"
            )
        _load_network(self.network, checkpoint[MODEL_GROUP], checkpoint)
        self._load_optimizer(checkpoint[OPTIMIZER_GROUP])
        if self.uncertainty is not None:
            self.uncertainty.load_state_dict(checkpoint[UNCERTAINTY_GROUP])
        for average in self.averages:
            average.load(checkpoint[average.group])
        self.step, self.skipped = checkpoint.state["step"], list(checkpoint.state["skipped"])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.trained().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained().items():
            own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or self._step_on_device() else value
                for key, value in own.items()
            }

    def _step_on_device(self) -> bool:
        # a fused optimizer keeps its step counters beside the parameters, others keep them on the host
        return bool(self.optimizer.defaults.get("fused"))


def load_weights(network: DiT, checkpoint: Checkpoint) -> None:
    """Begin a phase from another phase's weights: the average that it was validated by, where there is one. What hints
    alone use may be new, nothing else."""
    average = header_in(checkpoint.state, checkpoint.folder).ema
    weights = checkpoint[MODEL_GROUP]
    if average is not None:
        weights = {**weights, **checkpoint[average]}
    _load_network(network, weights, checkpoint, may_be_new=("aligned_hint.", "hint_lora."))


def _load_network(
    network: DiT, weights: dict[str, Tensor], checkpoint: Checkpoint, may_be_new: tuple[str, ...] = ()
) -> None:
    """load_state_dict with a UserError that says how the networks differ; the network is changed only if they agree."""
    differing = _differences(network, weights, checkpoint, may_be_new)
    if differing:
        raise UserError(
            f"checkpoint {checkpoint.folder} does not fit the model section ({differing}); "
            "use the architecture that it was trained with, or another checkpoint"
        )
    network.load_state_dict(weights, strict=False)


def _differences(network: DiT, weights: dict[str, Tensor], checkpoint: Checkpoint, may_be_new: tuple[str, ...]) -> str:
    """How a checkpoint's network differs from this one, in words; empty if it does not."""
    # num_heads and noise_embedding change no tensor's shape: only the header tells
    trained = header_in(checkpoint.state, checkpoint.folder).network
    keys = [
        f"{key} {trained[key]}, not {network.shape[key]}" for key in SHAPE_KEYS if trained[key] != network.shape[key]
    ]
    if keys:
        return "it has " + ", ".join(keys)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    own = {name: shape for name, shape in own.items() if name in given or not name.startswith(may_be_new)}
    wrong = [name for name in own if given.get(name) != own[name]] + [name for name in given if name not in own]
    return f"first differing parameter: {wrong[0]}" if wrong else ""
