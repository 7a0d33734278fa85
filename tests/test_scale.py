"""benchmarks/scale.py: what it computes and counts, against formulas written out again, real stores and checkpoints."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.data import shard_reader
from ray_pipeline.data.block_cache import BlockCache
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.data.shards import Shard
from ray_pipeline.storage import Folder
from ray_pipeline.training.build import make_network, make_state

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"
SHARD_ROWS, ROWS, EPOCHS = 4, 96, 4
CACHE_BYTES = 2**20
CONFIG = {
    "data": {"tile_size": 128, "shard_rows": SHARD_ROWS, "augment_variants": 2,
             "cache_gib": CACHE_BYTES / 2**30},
    "model": {"architecture": "custom", "depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 2,
              "latent_size": 16},
    "ema": {"more_decays": [0.99], "power_stds": [0.05]},
    "train": {"batch_size": 2, "global_batch": 6},
    "checkpoint": {"every_minutes": 5},
    "phases": [{"name": "one", "epochs": EPOCHS},
               {"name": "two", "epochs": EPOCHS, "condition_types": ["canny", "depth"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def scale():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


@pytest.fixture
def job(scale):
    """Of the phase with two hints."""
    return scale.open_job(parse_config(CONFIG), 1, ROWS)


@pytest.fixture
def assumed(scale):
    return scale.Assumptions(
        batch=6, global_batch=None, samples_per_second=300.0, gpus_a_node=8, nvlink=4e9, network=1e9, storage=1e9,
        overlap=0.0, samples=ROWS, window=16, chunk_seconds=0.06, request_limit=5500.0, request_seconds=0.02,
    )  # fmt: skip


@pytest.fixture
def cost(scale):
    return scale.StreamCost(gather=1e-4, prepare=2e-4, open=5e-5, index_entry=100)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_all_reduce_volume_is_what_a_ring_of_ranks_sends(scale, ranks):
    parts = np.random.default_rng(0).integers(0, 9, (ranks, ranks, 5))  # a rank, a piece of its gradient
    total, sent = parts.sum(axis=0), np.zeros(ranks)
    for add in (True, False):  # reduce-scatter, all-gather
        for turn in range(ranks - 1):
            moved = [(rank, (rank - turn + (not add)) % ranks) for rank in range(ranks)]
            taken = [parts[rank, piece].copy() for rank, piece in moved]
            for (rank, piece), values in zip(moved, taken, strict=True):
                sent[rank] += values.nbytes
                after = (rank + 1) % ranks
                parts[after, piece] = parts[after, piece] + values if add else values
    assert (parts == total).all()
    np.testing.assert_allclose(sent, scale.ring_bytes(total.nbytes, ranks))


@pytest.mark.parametrize("number", [0, 1])
def test_gradients_have_the_bytes_that_are_reduced(scale, number):
    job = scale.open_job(parse_config(CONFIG), number, ROWS)
    network = make_network(job.config, job.phase)
    hints = torch.ones(1, 2, 4, 16, 16) if number else None
    network(torch.randn(1, 4, 16, 16), torch.zeros(1), hints).sum().backward()
    assert job.gradient_bytes == sum(p.grad.nbytes for p in network.parameters() if p.requires_grad)


def test_a_step_is_computing_and_then_the_all_reduce_over_the_slowest_link(scale, job, assumed):
    row = scale.step_row(job, assumed, 16)
    reduce = 2 * 15 / 16 * job.gradient_bytes / 1e9
    assert row["reduce_seconds"] == pytest.approx(reduce)
    assert row["steps_per_second"] == pytest.approx(1 / (6 / 300 + reduce))
    assert (row["nodes"], row["global_batch"]) == (2, 96)
    assert scale.step_row(job, assumed, 8)["reduce_seconds"] == pytest.approx(2 * 7 / 8 * job.gradient_bytes / 4e9)
    assert scale.step_row(job, assumed, 1)["samples_per_second"] == pytest.approx(300)


def opens_by_hand(plan: SamplePlan, rank: int, keep: int) -> tuple[int, int]:
    """Of chunks of 8 steps, 64 steps in all, from step 32 on: samples and opened shards of the last two."""
    parts = [range(32)] + [range(first, first + 8) for first in range(32, 64, 8)]
    kept, samples, opens = [], 0, 0
    for number, steps in enumerate(parts):
        ids = np.concatenate([plan.batch(step)[3 * rank : 3 * rank + 3] for step in steps])
        needed = set((ids // SHARD_ROWS).tolist())
        if number >= 3:
            samples, opens = samples + len(ids), opens + len(needed - set(kept))
        kept = [*(shard for shard in kept if shard not in needed), *needed][-keep:]
    return samples, opens


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("keep", [1, 10, 256])
def test_counted_openings_are_those_of_files(scale, job, assumed, write_latents, tmp_path, monkeypatch, keep, window):
    monkeypatch.setattr(shard_reader, "_MAPPED_SHARDS", keep)
    plan = job.plan(ROWS, 6, window)
    assert plan.steps(EPOCHS) == 64
    counted = scale.count_reads(job, assumed, scale.empty_store(job, ROWS), plan, world_size=2, remote=False)
    by_hand = np.sum([opens_by_hand(plan, rank, keep) for rank in (0, 1)], axis=0)
    assert [counted.samples, counted.opens] == by_hand.tolist()

    values = np.zeros((ROWS, 2, 3, 4, 2, 2), np.float16)
    root = write_latents(tmp_path, values, job.phase.condition_types, shard_rows=SHARD_ROWS).folder
    mapped, real_map = [], Shard._map
    monkeypatch.setattr(Shard, "_map", lambda shard, path: mapped.append(path) or real_map(shard, path))
    turns = scale.turns(job, plan, {rank: LatentStore.open(root) for rank in (0, 1)}, 2)
    for turn in turns[:2]:
        turn()
    before = len(mapped)
    assert turns[2]() + turns[3]() == counted.samples
    assert len(mapped) - before == counted.opens
    assert len(turns) == 4


@pytest.mark.parametrize(("keep", "window"), [(10, None), (256, None), (256, 48)])
def test_counted_requests_are_those_that_object_storage_gets(
    scale, assumed, s3, s3_server, write_latents, tmp_path, monkeypatch, keep, window
):
    """With the window, blocks of two rows are kept in a cache that both ranks share."""
    monkeypatch.setattr(shard_reader, "_REMOTE_SHARDS", keep)
    one_epoch = [phase | {"epochs": 1} for phase in CONFIG["phases"]]
    job = scale.open_job(parse_config(CONFIG | {"phases": one_epoch}), 1, ROWS)
    for module in (scale, shard_reader):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 2 * job.stored.row_bytes)
    plan = job.plan(ROWS, 6, window)
    # without a window all rows are read together, for which this cache is too small
    assert window is None or window * job.stored.row_bytes < CACHE_BYTES < ROWS * job.stored.row_bytes
    counted = scale.count_reads(job, assumed, scale.empty_store(job, ROWS), plan, world_size=2, remote=True)

    # of equal shards the cache would keep one
    values = np.random.default_rng(0).standard_normal((ROWS, 2, 3, *job.stored.shape)).astype(np.float16)
    root = Folder(s3).child(tmp_path.name)
    write_latents(root, values, job.phase.condition_types, shard_rows=SHARD_ROWS)
    cache = BlockCache(CACHE_BYTES, str(tmp_path / "cache"))
    turns = scale.turns(job, plan, {rank: LatentStore.open(root, cache, window) for rank in (0, 1)}, 2)
    for turn in turns[:2]:
        turn()
    before = len(s3_server.requests)
    assert turns[2]() + turns[3]() == counted.samples == 24
    requests = s3_server.requests[before:]
    assert len(requests) == counted.requests
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for _, _, asked in requests if asked]
    sizes = [int(found[2]) - int(found[1]) + 1 for found in ranges]
    assert sum(size for size in sizes if size > 256) == counted.bytes  # but for headers
    assert (counted.requests < counted.samples) == (window is not None)


def test_checkpoints_and_restarts_have_the_bytes_of_real_ones(
    scale, job, assumed, cost, header_for, tmp_path, monkeypatch
):
    network = make_network(job.config, job.phase)
    state = make_state(job.config, network)
    for parameter in state.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    store = CheckpointStore(tmp_path)
    weights = header_for(network, phase="two").model_dump(mode="json")
    told = {"phase": "two", "position": 6, "step": 1, "skipped": [], "weights": weights}
    name = store.save("two_epoch_001", state.groups(), told)
    row = scale.checkpoint_row(job, assumed, scale.step_row(job, assumed, 2), cost)
    sizes = {path.name: path.stat().st_size for path in Path(tmp_path, name).glob("*.safetensors")}
    # names and shapes stand in the files, too
    assert row["checkpoint_bytes"] == pytest.approx(sum(sizes.values()), rel=0.02)
    assert row["timed_bytes_per_second"] == row["checkpoint_bytes"] / 300

    read, real_stream = [], Folder.stream
    monkeypatch.setattr(Folder, "stream", lambda folder, file: read.append(file) or real_stream(folder, file))
    newest = store.search("two").checkpoint  # rank 0
    for _ in range(2):
        make_state(job.config, make_network(job.config, job.phase)).restore(newest)
    index = 2 * 100 * ROWS // SHARD_ROWS
    assert row["restart_bytes"] - index == pytest.approx(sum(sizes[file] for file in read), rel=0.02)


def test_the_script_prints_a_row_for_every_number_of_gpus(scale, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(CONFIG))
    monkeypatch.setattr(scale, "_CHUNK_BYTES", 2**20)
    arguments = ["--config", config, "--gpus", 1, 8, 16, "--global-batch", 12, "--samples", 5000, "--window", 64]
    monkeypatch.setattr(sys, "argv", ["scale.py", *map(str, arguments), "--json", str(tmp_path / "rows.json")])
    assert scale.main() == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert max(map(len, printed.splitlines())) <= 160
    assert "refused: 16 GPUs" in printed
    for title in scale.TABLES:
        lines = printed.partition(f"\n{title}\n")[2].splitlines()
        # two lines of heading, where each number comes from, a rule, two rows
        assert set(lines[2].split()) <= {"measured", "computed"}
        assert len(lines[2].split()) == len(lines[3].split()) - 1
        assert [line.split()[0] for line in lines[4:6]] == ["1", "8"]
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["gpus"] for row in written["rows"]] == [1, 8]
    assert written["refused"] == [16]
    assert written["rows"][1]["batch"] == 1.5
    assert all(written["kinds"][f"plan_seconds_{size}"] == "measured" for size in scale.PLANNED)


def test_every_gpu_needs_a_sample(scale, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--gpus", "64", "--global-batch", "32"])
    with pytest.raises(SystemExit, match=r"64.*has a sample of a global batch of 32"):
        scale.main()
