"""An optimizer step with a loss or gradient that is not finite is left out by all ranks, who know whose it was."""

import json
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from phase_runs import make_phase_run

from ray_pipeline.config import parse_config
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.training.step import avoid, micro_batches, optimize

MODEL = {"architecture": "custom", "latent_size": 8, "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
ROWS, GLOBAL_BATCH, RANKS = 16, 8, 2
TRAIN = {"batch_size": 2, "global_batch": GLOBAL_BATCH, "precision": "fp32"}
BAD_RANK = 1  # the one whose samples are poisoned
CASES = {
    "clean": {},
    "clean hints": {"hints": True},
    "NaN in a latent": {"latent": math.nan},
    "infinite latent": {"latent": math.inf},
    # a square beyond float32, of which the gradient is not; of u's it would be, as 1 - loss / exp(u)
    "infinite loss, finite gradient": {"latent": 1e20, "uncertainty": False},
    "NaN in a hint": {"hints": True, "hint.denoising": math.nan},
    "NaN in the last micro-batch": {"latent": math.nan, "row": -1},
    "NaN in a hint of a low-rank phase": {"hints": True, "hint.denoising": math.nan, "trainable": "lora"},
    "NaN without a limit of the gradient": {"latent": math.nan, "grad_clip": None},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(store, rank=0, world_size=1, hints=False, trainable="full", uncertainty=True, **optimizer):
    """A phase on one worker, with two micro-batches a step or more."""
    phase = {"name": "p", "epochs": 2, "trainable": trainable, "condition_dropout": 0.0}
    config = parse_config({
        "phases": [{"name": "base", "epochs": 1}, phase | {"condition_types": ["denoising"] * hints}],
        "model": MODEL,
        "data": {"tile_size": 64},
        "train": TRAIN | {"uncertainty_weighting": uncertainty},
        "ema": {"start_step": 0, "decay": 0.9},
        "optimizer": {"lr": 1e-3, **optimizer},
    })  # fmt: skip
    return make_phase_run(config, store, number=1, rank=rank, world_size=world_size)


def batches_of(run, step, poison=None):
    """Micro-batches of this rank's slice of a global batch; `poison`: column -> value of one number of one sample."""
    own = np.array_split(np.arange(GLOBAL_BATCH), run.world_size)[run.rank]
    index = step * GLOBAL_BATCH + own
    values = run.train_store.gather(index % ROWS, hints=run.hints)
    values = {name: column.astype(np.float32) for name, column in values.items()} | {"index": index}
    poison = dict(poison or {})
    row = poison.pop("row", 0)
    for column, value in poison.items():
        values[column][row, 0, 3, 4] = value
    return micro_batches(run, values)


def copies(run):
    """All that training changes."""
    return {f"{group}/{n}": t.clone() for group, tensors in run.state.groups().items() for n, t in tensors.items()}


def learned(run):
    """The same without the averages, which follow the weights at every position."""
    return {name: tensor for name, tensor in copies(run).items() if not name.startswith("ema_")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def outcome_of(run, step, batches):
    """What a step does to a run: its result, and whether it left weights and optimizer as they were."""
    before = learned(run)
    result = optimize(run, step, batches)
    assert run.state.step == step + 1
    return vars(result) | {"unchanged": same(before, learned(run)), "skips": list(run.state.skipped)}


def train_rank(rank, folder):
    """Both ranks of all cases: a good step, then one with the poison on one rank; outcomes in <folder>/<rank>.json."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    store, outcomes = LatentStore.open(Path(folder, "store")), {}
    for name, case in CASES.items():
        poison = {key: value for key, value in case.items() if key in ("latent", "hint.denoising", "row")}
        settings = {key: value for key, value in case.items() if key not in poison}
        run = make_run(store, rank, RANKS, **settings)
        good = outcome_of(run, 0, batches_of(run, 0))
        bad = outcome_of(run, 1, batches_of(run, 1, poison if rank == BAD_RANK else None))
        outcomes[name] = {"good": good, "bad": bad}
        if not poison:
            torch.save(copies(run), Path(folder, f"{name} {rank}.pt"))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    torch.distributed.destroy_process_group()


def latents():
    """(rows, variants, columns, C, H, W) fp16: tiles and one hint of each."""
    return np.random.default_rng(5).normal(size=(ROWS, 1, 2, 4, 8, 8)).astype(np.float16)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, write_latents):
    """Folder of the ranks' files, and the outcomes of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_latents(folder / "store", latents(), ["denoising"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(train_rank, args=(str(folder),), nprocs=RANKS)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("clean")])
def test_what_one_rank_cannot_compute_both_leave_out(outcomes, case):
    for rank in outcomes[1]:
        good, bad = rank[case]["good"], rank[case]["bad"]
        assert not good["skipped"]
        assert not good["unchanged"]
        assert bad["skipped"]
        assert bad["unchanged"]
        assert bad["skips"] == [2]
        assert not (math.isfinite(bad["loss"]) and math.isfinite(bad["grad_norm"]))


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("clean")])
def test_both_ranks_know_whose_sample_it_was(outcomes, case):
    """The poisoned row of rank 1: the first of its slice, or the last."""
    own = np.array_split(np.arange(GLOBAL_BATCH), RANKS)[BAD_RANK]
    expected = GLOBAL_BATCH + int(own[CASES[case].get("row", 0)])
    for rank in outcomes[1]:
        assert rank[case]["bad"]["suspects"] == [expected]


def test_a_loss_may_be_infinite_while_the_gradient_is_finite(outcomes):
    """So the case of that name is one: no rank sees it in its gradient."""
    for rank in outcomes[1]:
        bad = rank["infinite loss, finite gradient"]["bad"]
        assert bad["loss"] == math.inf
        assert math.isfinite(bad["grad_norm"])


@pytest.mark.parametrize("hints", [False, True], ids=["unconditional", "hints"])
def test_finite_samples_train_two_ranks_as_they_train_one(outcomes, hints):
    """Without poison no step is refused; loss, gradient and weights are those of a single process."""
    folder, ranks = outcomes
    name = "clean hints" if hints else "clean"
    run = make_run(LatentStore.open(folder / "store"), hints=hints)
    expected = [outcome_of(run, step, batches_of(run, step)) for step in range(2)]
    for rank in range(RANKS):
        for found, alone in zip((ranks[rank][name]["good"], ranks[rank][name]["bad"]), expected, strict=True):
            assert not found["skipped"]
            assert not found["unchanged"]
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    states = [torch.load(folder / f"{name} {rank}.pt") for rank in range(RANKS)]
    assert same(*states)
    for key, tensor in copies(run).items():
        torch.testing.assert_close(states[0][key], tensor, atol=2e-5, rtol=1e-4)


@pytest.fixture
def store(tmp_path, write_latents):
    return write_latents(tmp_path / "store", latents(), ["denoising"])


@pytest.mark.parametrize(
    ("poison", "hints"),
    [({"latent": math.nan}, False), ({"latent": -math.inf}, False), ({"hint.denoising": math.nan}, True)],
    ids=str,
)
def test_one_process_alone_leaves_them_out_too(store, poison, hints):
    run = make_run(store, hints=hints)
    assert not outcome_of(run, 0, batches_of(run, 0))["skipped"]
    outcome = outcome_of(run, 1, batches_of(run, 1, poison))
    assert outcome["skipped"]
    assert outcome["unchanged"]
    assert outcome["suspects"] == (GLOBAL_BATCH,)
    assert not outcome_of(run, 2, batches_of(run, 2))["skipped"]


@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_a_gradient_that_overflows_is_left_out_though_the_loss_is_finite(store, grad_clip):
    run = make_run(store, uncertainty=False, grad_clip=grad_clip)
    outcome_of(run, 0, batches_of(run, 0))
    with torch.no_grad():
        run.state.network.final_layer.linear.weight.normal_(0, 5e16)
    outcome = outcome_of(run, 1, batches_of(run, 1))
    assert math.isfinite(outcome["loss"])
    assert outcome["grad_norm"] == math.inf
    assert outcome["skipped"]
    assert outcome["unchanged"]
    assert outcome["suspects"] == ()


def test_a_step_that_is_avoided_leaves_what_a_skipped_one_leaves(store):
    """So a replay that knows of the bad step equals the run that met it."""
    met, told = make_run(store), make_run(store)
    for run in (met, told):
        outcome_of(run, 0, batches_of(run, 0))
    outcome_of(met, 1, batches_of(met, 1, {"latent": math.nan}))
    assert avoid(told, 1).skipped
    for run in (met, told):
        outcome_of(run, 2, batches_of(run, 2))
    assert same(copies(met), copies(told))
    assert met.state.skipped == told.state.skipped == [2]
    assert met.state.step == told.state.step == 3


@pytest.mark.parametrize("asked", [{"save": True}, {"stop": True}, {}])
def test_what_a_rank_asks_for_comes_with_its_step(store, asked):
    run = make_run(store)
    result = optimize(run, 0, batches_of(run, 0), **asked)
    assert {"save": result.save, "stop": result.stop} == {"save": False, "stop": False} | asked


def test_a_masked_hint_may_hold_anything(store):
    run = make_run(store, hints=True)
    batches = batches_of(run, 0, {"hint.denoising": math.nan})
    batches[0].mask[0] = False
    assert not outcome_of(run, 0, batches)["skipped"]


def test_a_step_reports_the_unweighted_loss(store):
    """Whatever the uncertainty, which would otherwise be read as progress."""
    run = make_run(store)
    with torch.no_grad():
        run.state.uncertainty.linear.weight.normal_(0, 0.3)
        run.state.network.final_layer.linear.weight.normal_(0, 0.1)
        run.state.network.final_layer.adaLN_modulation[1].weight.normal_(0, 0.1)
    batches, losses, objectives = batches_of(run, 0), [], []
    with torch.no_grad():
        for batch in batches:
            sigma = run.edm.sigma_from_normal(batch.z)
            losses += run.edm.loss(run.state.network, batch.x0, sigma, batch.noise).tolist()
            objectives += run.model(batch.x0, batch.noise, batch.z)[1].tolist()
    assert len(losses) == GLOBAL_BATCH
    assert abs(np.mean(objectives) - np.mean(losses)) > 0.05
    assert optimize(run, 0, batches).loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_step_follows_the_gradient_of_the_objective(store):
    """Of its mean over the global batch, whose norm is reported, before clipping."""
    run = make_run(store, grad_clip=1e-3)
    with torch.no_grad():
        run.state.uncertainty.linear.weight.normal_(0, 0.3)
    batches = batches_of(run, 0)
    objective = torch.cat([run.model(batch.x0, batch.noise, batch.z)[1] for batch in batches]).mean()
    gradients = torch.autograd.grad(objective, list(run.state.trained().values()), allow_unused=True)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None))
    assert optimize(run, 0, batches).grad_norm == pytest.approx(norm, rel=1e-4)
    # AdamW's first moment after a step is (1 - beta1) times the gradient, here clipped to its limit
    moments = [run.state.optimizer.state[p]["exp_avg"] for p in run.state.trained().values()]
    clipped = [0.1 * gradient * (1e-3 / norm) for gradient in gradients]
    for moment, expected in zip(moments, clipped, strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-9)
