"""Trained weights, wherever they lie, as a network that is ready to sample, with its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ray_pipeline.checkpoints import SUFFIX, Checkpoint, CheckpointStore, open_checkpoint
from ray_pipeline.data.latents import LatentStats
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.models.architectures import DOWNSCALE
from ray_pipeline.models.autoencoder import Autoencoder, load_autoencoder
from ray_pipeline.models.dit import DiT
from ray_pipeline.models.weights import WeightsHeader, header_in, load_weights_file
from ray_pipeline.run_copy import reading_copy
from ray_pipeline.run_state import read_run

#: the average that validation used, or the weights themselves where there was none
DEFAULT_WEIGHTS = "ema"
_MODEL = "model"
_AVERAGE = "ema_"  # how names of averages begin
_FILE = ".safetensors"
#: of encoding; each gives the autoencoder's weights other bytes, and so another sha256
_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in eval mode. source: the checkpoint or file; weights: which of its weights they are."""

    source: str
    weights: str
    header: WeightsHeader
    network: DiT


@dataclass(frozen=True)
class Prior(TrainedNetwork):
    """A network with all that turns its samples into tiles."""

    edm: EDM
    stats: LatentStats
    autoencoder: Autoencoder

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return (self.network.latent_channels, self.network.latent_size, self.network.latent_size)

    @property
    def tile_size(self) -> int:
        """Pixels of a tile's side."""
        return self.network.latent_size * DOWNSCALE

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.network.pos_embed.device


def load_prior(
    path: str | Path,
    *,
    weights: str = DEFAULT_WEIGHTS,
    device: torch.device | str = "cpu",
    vae: str | None = None,
) -> Prior:
    """Weights by path (as in `load_network`) with the autoencoder that their latents are of; vae: where that lies now.

    UserError: as in `load_network`, or an autoencoder that is not there or is another one.
    """
    trained = load_network(path, weights=weights, device=device)
    header = trained.header
    return Prior(
        **vars(trained),
        edm=header.build_edm(),
        stats=latent_stats(header),
        autoencoder=_load_autoencoder(trained, device, vae),
    )


def load_network(
    path: str | Path, *, weights: str = DEFAULT_WEIGHTS, device: torch.device | str = "cpu"
) -> TrainedNetwork:
    """A network by the path of a checkpoint folder (*.ckpt, also a URI), of a .safetensors file with metadata, or of a
    run, whose last phase that has one gives its best checkpoint.

    weights: `ema`, `model`, or the name of an average, such as ema_power_0.05; a file holds one kind only. UserError:
    nothing of that kind there, damaged, no such weights, weights that do not fit their header.
    """
    location = str(path).rstrip("/")
    if location.endswith(_FILE):
        if weights != DEFAULT_WEIGHTS:
            raise UserError(f"{location} holds one kind of weights, so {weights!r} cannot be chosen; leave it out")
        header, tensors = load_weights_file(location)
        return TrainedNetwork(location, Path(location).stem, header, _network(location, header, tensors, device))
    if not location.endswith(SUFFIX):
        location = _best_checkpoint(location)
    checkpoint = open_checkpoint(location)
    header = header_in(checkpoint.state, checkpoint.folder)
    name = (header.ema or _MODEL) if weights == DEFAULT_WEIGHTS else weights
    network = _network(location, header, _tensors(checkpoint, name), device)
    return TrainedNetwork(location, name, header, network)


def check_guide(prior: TrainedNetwork, guide: TrainedNetwork) -> None:
    """UserError where the guide denoises something else than the prior: other latents, or another parametrisation."""
    differing = {
        "autoencoder": [n.header.autoencoder.sha256[:12] for n in (prior, guide)],
        "latent mean": [list(n.header.latents.mean) for n in (prior, guide)],
        "latent std": [list(n.header.latents.std) for n in (prior, guide)],
        "latent shape": [
            f"{n.network.latent_channels}x{n.network.latent_size}x{n.network.latent_size}" for n in (prior, guide)
        ],
        "sigma_data": [n.header.build_edm().sigma_data for n in (prior, guide)],
        "prediction_type": [n.header.build_edm().prediction_type for n in (prior, guide)],
    }
    for what, (own, other) in differing.items():
        if own != other:
            raise UserError(
                f"--guide {guide.source} cannot guide {prior.source}: its {what} is {other}, expected {own}; give a "
                "checkpoint trained on the same latents"
            )


def latent_stats(header: WeightsHeader) -> LatentStats:
    """What the latents were normalised by."""
    latents = header.latents
    return LatentStats(np.array(latents.mean), np.array(latents.std), latents.count, latents.fingerprint)


def _best_checkpoint(run: str) -> str:
    """Folder of the best checkpoint of the last phase that has one."""
    with reading_copy(run):
        found = read_run(run, f"a checkpoint folder ({SUFFIX}), a {_FILE} file or the output_dir of a training")
    best = [progress.best.checkpoint for progress in found.state.phases.values() if progress.best is not None]
    if not best:
        raise UserError(
            f"{run} has no checkpoint with a validation loss yet; train longer, or give a checkpoint folder"
        )
    return CheckpointStore(found.config.checkpoint_store).path(best[-1])


def _tensors(checkpoint: Checkpoint, name: str) -> Mapping[str, Tensor]:
    """All weights of the network, of this name; an average holds the trained ones alone, the others are the model's."""
    known = [group for group in checkpoint if group == _MODEL or group.startswith(_AVERAGE)]
    if name not in known or _MODEL not in known:
        raise UserError(
            f"checkpoint {checkpoint.folder} holds no weights {name!r}, expected {DEFAULT_WEIGHTS} or one of "
            f"{', '.join(known) or 'none'}; choose among these"
        )
    tensors = checkpoint[_MODEL]
    return tensors if name == _MODEL else {**tensors, **checkpoint[name]}


def _network(source: str, header: WeightsHeader, tensors: Mapping[str, Tensor], device: torch.device | str) -> DiT:
    try:
        with torch.device("meta"):  # the weights take the place of the fresh ones, which are never made
            network = header.build_network()
        network.load_state_dict(dict(tensors), strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        part = Path(source).parent
        remedy = f"give {part} and choose among its weights" if part.suffix == SUFFIX else "use another file"
        raise UserError(
            f"the weights of {source} do not fit the network that they say they are of "
            f"({' '.join(str(error).split())[:200]}); {remedy}"
        ) from None
    # not frozen: autocast keeps the bf16 copies only of weights that could be trained
    return network.eval().to(device)


def _load_autoencoder(trained: TrainedNetwork, device: torch.device | str, vae: str | None) -> Autoencoder:
    """The autoencoder of the weights' header, in the precision that it encoded in."""
    header = trained.header.autoencoder
    pretrained = vae or header.pretrained
    channels = trained.network.latent_channels
    found = []
    for precision in _PRECISIONS:
        try:
            autoencoder = load_autoencoder(pretrained, device=device, precision=precision, latent_channels=channels)
        except UserError as error:
            raise UserError(
                f"{trained.source}: its autoencoder {pretrained} cannot be used ({error}); say with --vae where it is"
            ) from error
        found.append(autoencoder.fingerprint())
        if found[-1] == header.sha256:
            return autoencoder
    raise UserError(
        f"{trained.source} was trained on latents of the autoencoder with sha256 {header.sha256[:12]}, but that of "
        f"{pretrained} is {found[0][:12]}; give the right one with --vae"
    )
