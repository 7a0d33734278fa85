"""What a checkpoint holds, in one place: network, optimizer, EMA, position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_pipeline.checkpoints import Checkpoint
from ray_pipeline.errors import UserError
from ray_pipeline.models.architectures import ARCHITECTURES
from ray_pipeline.models.dit import DiT
from ray_pipeline.training.ema import EMA

OPTIMIZER_GROUP = "optimizer"
MODEL_GROUP = "model"


@dataclass
class TrainState:
    """All that training changes. `step` optimizer steps are done in this phase."""

    network: DiT
    optimizer: torch.optim.AdamW
    ema: EMA | None
    step: int = 0

    @property
    def ema_group(self) -> str | None:
        """Name of the EMA's file, such as ema_decay_0.9999."""
        return None if self.ema is None else f"ema_decay_{self.ema.decay}"

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors to save, by file."""
        groups = {MODEL_GROUP: dict(self.network.state_dict()), OPTIMIZER_GROUP: self._optimizer_tensors()}
        if self.ema is not None:
            groups[self.ema_group] = self.ema.tensors()
        return groups

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become the state that `checkpoint` saved, with equal bits; UserError when its network or EMA is another."""
        _load_network(self.network, checkpoint[MODEL_GROUP], checkpoint)
        self._load_optimizer(checkpoint[OPTIMIZER_GROUP])
        if self.ema is not None:
            if self.ema_group not in checkpoint:
                raise UserError(
                    f"checkpoint {checkpoint.folder} holds {', '.join(checkpoint)}, not {self.ema_group}; "
                    "resume with the ema.decay that it was trained with"
                )
            self.ema.load(checkpoint[self.ema_group])
        self.step = checkpoint.state["step"]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self._named():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named():
            own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or self._step_on_device() else value
                for key, value in own.items()
            }

    def _step_on_device(self) -> bool:
        # a fused optimizer keeps its step counters beside the parameters, others keep them on the host
        return bool(self.optimizer.defaults.get("fused"))


def load_weights(network: DiT, checkpoint: Checkpoint) -> None:
    """Begin a phase from another phase's weights: the EMA where there is one. Hint control may be new, nothing else."""
    averaged = [group for group in checkpoint if group.startswith("ema_decay_")]
    weights = checkpoint[MODEL_GROUP]
    if averaged:
        weights = {**weights, **checkpoint[averaged[0]]}
    _load_network(network, weights, checkpoint, may_be_new="aligned_hint.")


def _load_network(
    network: DiT, weights: dict[str, Tensor], checkpoint: Checkpoint, may_be_new: str | None = None
) -> None:
    """load_state_dict with a UserError that says how the networks differ; the network is changed only if they agree."""
    differing = _differences(network, weights, checkpoint, may_be_new)
    if differing:
        raise UserError(
            f"checkpoint {checkpoint.folder} does not fit the model section ({differing}); "
            "use the architecture that it was trained with, or another checkpoint"
        )
    network.load_state_dict(weights, strict=False)


def _differences(network: DiT, weights: dict[str, Tensor], checkpoint: Checkpoint, may_be_new: str | None) -> str:
    """How a checkpoint's network differs from this one, in words; empty if it does not."""
    # num_heads and noise_embedding change no tensor's shape: only the recorded config tells
    trained = checkpoint.state.get("config", {}).get("model", {})
    trained = trained | ARCHITECTURES.get(trained.get("architecture"), {})
    keys = [
        f"{key} {trained[key]}, not {value}" for key, value in network.shape.items() if trained.get(key, value) != value
    ]
    if keys:
        return "it has " + ", ".join(keys)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    if may_be_new:
        own = {name: shape for name, shape in own.items() if name in given or not name.startswith(may_be_new)}
    wrong = [name for name in own if given.get(name) != own[name]] + [name for name in given if name not in own]
    return f"first differing parameter: {wrong[0]}" if wrong else ""
