"""What `train --dry-run` promises, against what a network, a checkpoint and a training step really take."""

import shutil
from collections import namedtuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ray_pipeline import estimate
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.errors import UserError
from ray_pipeline.monitoring.progress import format_bytes
from ray_pipeline.storage import Folder
from ray_pipeline.sweep_sections import SweepConfig
from ray_pipeline.training.build import make_network, make_state
from ray_pipeline.training.device_peak import matmul_rate

HINTS = ("denoising", "canny")
SMALL = {"architecture": "custom", "depth": 3, "hidden_size": 64, "num_heads": 4, "patch_size": 2, "latent_size": 16}


def make_config(model=SMALL, ema=True, batch=4, precision="fp32", **phase):
    phases = [{"name": "one", "epochs": 4}, {"name": "two", "epochs": 4, "condition_types": HINTS}]
    return parse_config(
        {
            "model": model,
            "data": {"tile_size": 8 * model["latent_size"]},
            "ema": {"enabled": ema},
            "train": {"batch_size": batch, "global_batch": 6, "precision": precision},
            "phases": [entry | phase for entry in phases],
        }
    )


def one_pass(config, phase):
    """Forward and backward pass of one micro-step, as training does it; returns the network's parameters."""
    network, batch, side = make_network(config, phase), config.train.batch_size, 16
    x, c_noise = torch.randn(batch, 4, side, side), torch.zeros(batch)
    hints = mask = None
    if phase.condition_types:
        hints = torch.randn(batch, len(phase.condition_types), 4, side, side)
        mask = torch.ones(hints.shape[:2], dtype=torch.bool)
    network(x, c_noise, hints, mask).square().mean().backward()


@pytest.mark.parametrize(
    ("number", "changes", "depth"),
    [
        (0, {}, 1),
        (0, {}, 3),
        (1, {}, 1),
        (1, {}, 3),
        (1, {"aligned": False}, 3),
        (1, {"trainable": "lora"}, 3),
        (1, {"trainable": "lora", "aligned": False}, 6),
    ],
)
def test_flops_of_a_sample_are_those_torch_counts(number, changes, depth):
    config = make_config({**SMALL, "depth": depth})
    control = config.hint_control.model_copy(update={"aligned": changes.get("aligned", True)})
    phase = config.phases[number].model_copy(update={"trainable": changes.get("trainable", "full")})
    config = config.model_copy(update={"phases": (phase,), "hint_control": control})
    # the plain kernel: a flash kernel computes the scores again in its backward pass, which is no model's work
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one_pass(config, phase)
    counted = counter.get_total_flops() / config.train.batch_size
    assert estimate.sample_flops(config, phase) == pytest.approx(counted, rel=0.03)


def test_xl_8_takes_175_gflop_a_sample():
    """29.1 GMAC forward (measured on the reference), two operations each, three passes."""
    config = make_config({"architecture": "DiT-XL/8", "latent_size": 64})
    assert estimate.sample_flops(config, config.phases[0]) == pytest.approx(6 * 29.1e9, rel=0.03)


def test_parameters_are_the_network_s():
    config = make_config()
    for phase in config.phases:
        network = make_network(config, phase)
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert estimate.estimate_phase(config, phase, 10).parameters == trainable


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("phase", [0, 1])
def test_checkpoint_bytes_are_those_really_saved(tmp_path, ema, phase):
    config = make_config({**SMALL, "hidden_size": 128}, ema=ema)
    state = make_state(config, make_network(config, config.phases[phase]))
    for parameter in state.network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state.optimizer.step()
    store = CheckpointStore(tmp_path)
    name = store.save("one", state.groups(), {"step": 1})
    saved = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    expected = estimate.estimate_phase(config, config.phases[phase], 10).checkpoint_bytes
    assert expected == pytest.approx(saved, rel=0.01)


def test_steps_and_samples_cover_every_epoch():
    config = make_config()
    found = estimate.estimate_phase(config, config.phases[0], 10)
    assert found.samples == 40  # 10 tiles, 4 epochs
    assert found.steps == 7  # of 6 samples each
    assert found.flops == pytest.approx(40 * estimate.sample_flops(config, config.phases[0]))


@pytest.mark.parametrize(
    ("phase", "kept"),
    [
        # epochs 1 to 3, the best and the last, and then the one of epoch 4, before the last goes
        ({}, 6),
        # epochs 1 and 2, the best (3), the last (4), and a safety save before that one goes
        ({"epochs_to_save": (1, 2), "epochs": 5}, 5),
        ({"epochs_to_save": ()}, 3),
    ],
)
def test_checkpoints_at_once_count_the_new_one_before_the_old_one_goes(phase, kept):
    config = make_config(**phase)
    assert estimate.estimate_phase(config, config.phases[0], 10).checkpoints == kept


def held_for_backward(config, phase):
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    network = make_network(config, phase)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # else its memory, and so its address, would be used again
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = config.train.batch_size
    x, conditions = torch.randn(batch, 4, 16, 16), ()
    if phase.condition_types:
        count = len(phase.condition_types)
        conditions = (torch.randn(batch, count, 4, 16, 16), torch.ones(batch, count, dtype=torch.bool))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        network(x, torch.zeros(batch), *conditions)
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("phase", [0, 1], ids=["unconditional", "two hints"])
def test_memory_is_weights_gradients_moments_average_and_what_backward_needs(precision, phase):
    config = make_config({**SMALL, "hidden_size": 128, "depth": 6}, batch=8, precision=precision)
    phase = config.phases[phase]
    parameters = estimate.estimate_phase(config, phase, 10).parameters
    # weights, gradients, two moments, the average of ema.decay and the two of ema.power_stds
    activations = estimate.worker_memory(config, phase, "cpu") - 7 * 4 * parameters
    assert activations == pytest.approx(held_for_backward(config, phase), rel=0.15)


@pytest.mark.parametrize("phase", [0, 1], ids=["unconditional", "two hints"])
def test_activation_checkpointing_keeps_what_enters_each_block(phase):
    """And one whole block while it is computed again, which the forward pass does not show."""
    config = make_config({**SMALL, "hidden_size": 128, "depth": 6}, batch=8)
    whole = estimate.worker_memory(config, config.phases[phase], "cpu")
    train = config.train.model_copy(update={"activation_checkpointing": True})
    lean = config.model_copy(update={"train": train})
    block = held_for_backward(config, config.phases[phase]) / 6
    saved = whole - estimate.worker_memory(lean, lean.phases[phase], "cpu")
    held = held_for_backward(lean, lean.phases[phase])
    assert held < block
    assert saved == pytest.approx(5 * block - held, rel=0.15)


@pytest.mark.parametrize(
    ("simulated", "posterior", "images"),
    [((), "mode", 3), (("denoising",), "mode", 4), ((), "sample", 4), (("denoising",), "sample", 5)],
)
def test_latents_bytes_hold_every_tile_variant_and_hint_and_std(simulated, posterior, images):
    job = EncodeJob(
        root="data",
        store="store",
        tile_size=512,
        hints=HINTS,
        simulated=simulated,
        hint_settings={},
        variants=2,
        shard_rows=4,
        sample_rows=None,
        autoencoder="embedded",
        precision="fp32",
        posterior=posterior,
        latent_channels=4,
        batch_size=1,
        max_rejected=0,
    )
    needed = 100 * 2 * images * 4 * 64 * 64 * 2  # tiles, variants, images, channels, side, side, bytes
    assert needed <= estimate.latents_bytes(job, 100) <= 1.1 * needed


def test_output_has_room_for_every_kept_checkpoint():
    config = make_config()
    phases = [estimate.estimate_phase(config, phase, 10) for phase in config.phases]
    needed = sum(phase.checkpoint_bytes * phase.checkpoints for phase in phases)
    assert needed < estimate.output_bytes(phases) < 1.2 * needed + 2**27


def test_a_sweep_counts_as_trials_of_the_first_epochs_with_every_candidate_s_average():
    sweep = {"enabled": True, "epochs": 2, "num_trials": 9, "space": {
        "model.dropout": {"grid": [0.0, 0.1, 0.2]}, "ema.decay": {"grid": [0.9, 0.99, 0.9999]}}}  # fmt: skip
    phases = [{"name": "phase1_unconditional", "epochs": 2}, {"name": "phase2_conditional", "epochs": 8}]
    config = parse_config({"phases": phases, "model": {"architecture": "DiT-S/8"}, "sweep": sweep})
    plain = [estimate.estimate_phase(config, phase, 1024) for phase in config.phases]
    found = estimate.estimate_sweep(config, plain)
    assert (found.trials, found.steps) == (3, plain[1].steps // 4)
    assert found.flops == pytest.approx(3 * plain[1].flops / 4)
    per_trial = (3 + 1) * (plain[1].checkpoint_bytes + 2 * 4 * plain[1].parameters) + plain[1].snapshot_bytes / 4
    assert found.bytes == pytest.approx(3 * per_trial)
    assert estimate.output_bytes(plain, found) > estimate.output_bytes(plain) + found.bytes
    assert estimate.estimate_sweep(config.model_copy(update={"sweep": SweepConfig()}), plain) is None


def test_a_full_disk_is_named_with_what_is_free_and_needed(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    estimate.check_disk(folder, 1024, "output_dir")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=rf"output_dir={folder} has .* free, but .* are needed; .*--set output_dir="):
        estimate.check_disk(folder, 2 * free, "output_dir")
    assert not (tmp_path / "not").exists()


def test_disk_of_the_folder_itself_is_asked(tmp_path, monkeypatch):
    usage, asked = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10, 0, 10))
    (tmp_path / "mounted").mkdir()
    with pytest.raises(UserError, match=r"data\.latents=.*10 B free, but 11 B are needed"):
        estimate.check_disk(tmp_path / "mounted" / "store", 11, "data.latents")
    assert asked == [tmp_path / "mounted"]


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    estimate.check_writable(tmp_path / "new" / "run", "output_dir")
    with pytest.raises(UserError, match=r"output_dir=.*run cannot be written \(.*file is no writable folder\)"):
        estimate.check_writable(tmp_path / "file" / "run", "output_dir")


def test_object_storage_has_no_size_and_is_asked_for_rights_beforehand(s3, tmp_path):
    place = Folder(s3).child(tmp_path.name)
    estimate.check_disk(place.location, 2**80, "output_dir")
    estimate.check_writable(place.location, "output_dir")
    assert not place.tree()


def test_the_report_counts_the_samples_of_each_phase_and_the_bytes_of_the_stored_tiles():
    """A phase may draw fewer or more samples an epoch than tiles are stored: from some data sets, or streamed."""
    config = make_config()
    job = encode_job(config)
    tiles = {"train": 20, "val": 7, "test": 3}
    text = estimate.report(config, job, tiles, [10, 1234], stored=False)
    assert "tiles        train 20, val 7, test 3\n" in text
    assert f"latents      {job.store}: {format_bytes(estimate.latents_bytes(job, 30))}\n" in text
    assert "steps      7 in 4 epochs, 40 samples" in text  # of 6 samples each
    assert f"steps      {-(-4 * 1234 // 6)} in 4 epochs, 4.94k samples" in text
    assert "(stored already)" in estimate.report(config, job, tiles, [10, 1234], stored=True)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_measured_matrix_rate_is_that_of_a_real_processor(kind):
    assert 1e8 < matmul_rate(torch.device("cpu"), kind) < 1e14
