"""Any width of average from a run's snapshots: the one that was never tracked, as weights that `sample` takes."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.diffusion.edm import EDM
from ray_pipeline.errors import UserError
from ray_pipeline.inference.posthoc import make_average
from ray_pipeline.inference.prior import load_network
from ray_pipeline.models.dit import build_dit
from ray_pipeline.models.posthoc_ema import combination, gamma_of_std, profile_error
from ray_pipeline.models.weights import load_weights_file
from ray_pipeline.monitoring.phase_state import PhaseState
from ray_pipeline.training.ema import PowerEMA

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"latent_size": 8, "depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
STORED, WANTED = (0.05, 0.10), (0.03, 0.07, 0.15)
STEPS, INTERVAL, EARLIER = 64, 4, 40  # 16 snapshots of each track
LORA = {"aligned": True, "lora_rank": 2, "lora_targets": ("x_embedder", "qkv", "fc2")}


class Phase:
    """A phase of a run folder: a network that was trained, what was tracked beside its snapshots, and all weights."""

    def __init__(self, root, name, header_for, network, hints=0):
        self.name, self.network, self.header_for, self.hints = name, network, header_for, hints
        self.checkpoints = CheckpointStore(root / "checkpoints")
        self.snapshots = CheckpointStore(root / "ema_snapshots" / name)
        self.power = PowerEMA(network, (*STORED, *WANTED))
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.weights, self.tracked = [], {}

    def train(self):
        optimizer = torch.optim.AdamW(self.trained, lr=5e-3, fused=True)
        for step in range(1, STEPS + 1):
            self.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.weights.append(vector(self.trained))
            self.power.update(step)
            if step % INTERVAL == 0:
                self.store_snapshot(step)
            if step in (EARLIER, STEPS):
                self.store_checkpoint(step)
                self.tracked |= {(std, step): copies(self.power[std].tensors()) for std in (*STORED, *WANTED)}
        return self

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        x0, noise = (torch.randn(8, 4, 8, 8, generator=generator) * scale for scale in (0.5, 1))
        sigma = torch.empty(8).log_normal_(-1.2, 1.2, generator=generator)
        conditions = {"hints": x0[:, None].expand(-1, self.hints, -1, -1, -1)} if self.hints else {}
        return EDM().loss(self.network, x0, sigma, noise, **conditions).mean()

    def about(self, step):
        header = self.header_for(self.network, phase=self.name, step=step, ema="ema_decay_0.9999")
        return header, {
            "phase": self.name,
            "step": step,
            "position": 8 * step,
            "weights": header.model_dump(mode="json"),
        }

    def store_snapshot(self, step):
        header, state = self.about(step)
        tracks = [self.power[std] for std in STORED]
        groups = {track.group: {n: t.half() for n, t in track.tensors().items()} for track in tracks}
        state |= {"stds": {track.group: track.std for track in tracks}}
        self.snapshots.save(f"{self.name}_step_{step:08d}", groups, state, header.metadata())

    def store_checkpoint(self, step):
        header, state = self.about(step)
        self.checkpoints.save(
            f"{self.name}_step_{step}", {"model": self.network.state_dict()}, state, header.metadata()
        )


def vector(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def draw_weights(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return network


@pytest.fixture(scope="module")
def trained(tmp_path_factory, header_for):
    """Folder of a run of two phases, and these: the first trains everything, the second what hints alone use."""
    root = tmp_path_factory.mktemp("posthoc") / "run"
    prior = Phase(root, "prior", header_for, draw_weights(build_dit("custom", **SIZES))).train()
    network = draw_weights(build_dit("custom", **SIZES, **LORA))
    network.freeze_base()
    hints = Phase(root, "hints", header_for, network, hints=1).train()
    (root / "config.yaml").write_text("phases: [{name: first, epochs: 1}]\n")
    state = PhaseState()
    for name in ("prior", "hints", "later"):
        state.phase(name)
    state.save(root / "phase_state.json")
    return root, {"prior": prior, "hints": hints}


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder that a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def phases(trained):
    return trained[1]


def tolerance(phase, wanted, std, step):
    """How far (L2) the reconstruction of an average may be: what its profile lacks, whatever the path of the weights
    was (Cauchy-Schwarz; the error's weights add up to 0), and the rounding of half precision."""
    profiles = [(stored, at) for stored in STORED for at in range(INTERVAL, step + 1, INTERVAL)]
    gamma = gamma_of_std(std)
    norm = (gamma + 1) / math.sqrt((2 * gamma + 1) * step)
    spread = torch.stack(phase.weights[:step]) - wanted
    amplification = np.linalg.norm(combination(profiles, std, step))
    lacking = profile_error(profiles, std, step) * norm * float(spread.norm())
    return lacking + 2**-11 * amplification * float(wanted.norm())


@pytest.mark.parametrize("name", ["prior", "hints"])
@pytest.mark.parametrize("step", [None, EARLIER], ids=["newest", "earlier"])
@pytest.mark.parametrize(("std", "share"), [(0.03, 0.3), (0.07, 0.1), (0.15, 0.1), (0.05, 0.1)])
def test_the_average_is_the_one_that_was_tracked(run, phases, name, step, std, share):
    phase, until = phases[name], step or STEPS
    made = make_average(run, std, phase=name, step=step)
    _, tensors = load_weights_file(made.path)
    tracked = phase.tracked[std, until]
    wanted = vector(tracked.values())
    distance = float((vector(tensors[name] for name in tracked) - wanted).norm())
    assert distance < tolerance(phase, wanted, std, until)
    others = [vector(phase.tracked[stored, until].values()) for stored in STORED if stored != std]
    assert distance < share * min(float((other - wanted).norm()) for other in others)
    assert (made.phase, made.step, made.snapshots) == (name, until, 2 * until // INTERVAL)
    profiles = [(stored, at) for stored in STORED for at in range(INTERVAL, until + 1, INTERVAL)]
    assert made.error == pytest.approx(profile_error(profiles, std, until), abs=1e-9)


def test_the_file_says_what_it_is_and_loads_as_a_network(run, phases):
    made = make_average(run, 0.07, phase="prior", step=EARLIER)
    assert made.path == run / "weights" / "prior_step_00000040_ema_power_0.07.safetensors"
    header, tensors = load_weights_file(made.path)
    assert (header.phase, header.step, header.ema) == ("prior", EARLIER, "ema_power_0.07")
    network = phases["prior"].network
    assert header.network == network.shape
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in network.state_dict().items()
    }
    loaded = load_network(made.path).network
    x, c_noise = torch.randn(2, 4, 8, 8), torch.tensor([-1.0, 0.3])
    expected = torch.func.functional_call(network.eval(), tensors, (x, c_noise))
    assert torch.equal(loaded(x, c_noise), expected)


def test_what_the_phase_does_not_train_is_its_checkpoint_s(run, phases):
    network = phases["hints"].network
    own = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in own} == {"aligned_hint", "hint_lora"}
    _, tensors = load_weights_file(make_average(run, 0.07).path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensors[name], tensor) == (name not in own), name
    assert load_network(run / "weights" / "hints_step_00000064_ema_power_0.07.safetensors").header.phase == "hints"


def test_without_a_phase_it_is_the_last_that_has_snapshots(run):
    assert make_average(run, 0.07).phase == "hints"
    shutil.rmtree(run / "ema_snapshots" / "hints")
    assert make_average(run, 0.07).phase == "prior"


def test_it_is_written_where_it_is_asked_for(run, tmp_path):
    out = tmp_path / "new" / "mine.safetensors"
    assert make_average(run, 0.07, out=out).path == out
    assert load_weights_file(out)[0].ema == "ema_power_0.07"
    assert not (run / "weights").exists()


def test_a_snapshot_that_was_not_finished_is_left_out(run):
    (run / "ema_snapshots" / "prior" / "prior_step_00000064.ckpt" / "state.json").unlink()
    made = make_average(run, 0.07, phase="prior")
    assert (made.step, made.snapshots) == (60, 30)


def test_snapshots_and_checkpoints_are_not_changed(run):
    def contents():
        return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

    before = contents()
    made = make_average(run, 0.07)
    after = contents()
    assert after.pop(made.path)
    assert after == before


@pytest.mark.parametrize("std", [0.0, -0.05, 0.2887, 1.0, float("nan"), float("inf")])
def test_a_width_that_no_average_has_is_refused(run, std):
    with pytest.raises(UserError, match=rf"--std {std}: a relative width is more than 0 and at most 0\.289"):
        make_average(run, std)


def test_a_folder_without_a_run_is_refused(run):
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=rf"{run} holds no run \(no config\.yaml\), expected the output_dir"):
        make_average(run, 0.07)


def test_a_run_without_snapshots_is_refused(run):
    shutil.rmtree(run / "ema_snapshots")
    with pytest.raises(
        UserError, match=rf"{run} holds no ema_snapshots; train with ema\.power_stds and ema\.snapshots"
    ):
        make_average(run, 0.07)


@pytest.mark.parametrize("phase", ["later", "novel", "../prior"])
def test_a_phase_without_snapshots_is_refused_by_those_that_have_some(run, phase):
    with pytest.raises(UserError, match=rf"--phase {phase}: .*ema_snapshots has snapshots of prior, hints; choose one"):
        make_average(run, 0.07, phase=phase)


@pytest.mark.parametrize("step", [3, 5, 10**6])
def test_a_step_without_a_snapshot_is_refused(run, step):
    """Between snapshots and after the last the profile of a wanted average is far from any sum of stored ones."""
    with pytest.raises(UserError, match=rf"--step {step}: hints has snapshots of steps 4, \d+, .*; choose one of them"):
        make_average(run, 0.07, step=step)
    assert make_average(run, 0.07, step=4).snapshots == 2


def test_a_name_that_sample_would_not_know_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--out .*average\.txt: expected a name that ends in \.safetensors"):
        make_average(run, 0.07, out=tmp_path / "average.txt")


def test_a_phase_whose_snapshots_are_all_unfinished_is_refused(run):
    for mark in (run / "ema_snapshots" / "hints").glob("*/state.json"):
        mark.unlink()
    with pytest.raises(UserError, match=r"ema_snapshots/hints holds no finished snapshot; train on, or choose another"):
        make_average(run, 0.07)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.unlink(),
    ],
    ids=["a bit", "cut off", "missing"],
)
def test_a_damaged_snapshot_is_refused_by_its_file(run, damage):
    path = run / "ema_snapshots" / "prior" / "prior_step_00000020.ckpt" / "ema_power_0.1.safetensors"
    damage(path)
    with pytest.raises(UserError, match=rf"{path} (was changed after it was saved|is missing)"):
        make_average(run, 0.07, phase="prior")
    assert not (run / "weights").exists()


def test_a_phase_without_a_checkpoint_is_refused(run):
    for folder in (run / "checkpoints").glob("prior_*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=rf"{run}/checkpoints holds no checkpoint of prior"):
        make_average(run, 0.07, phase="prior")
