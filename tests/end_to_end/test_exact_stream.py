"""Training workers see the same samples and noise at each step, however many they are and wherever they start."""

import hashlib
import json
from pathlib import Path

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from ray_pipeline import pipeline
from ray_pipeline.config import load_config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.stream import ReadAhead, stream
from ray_pipeline.training.setup import PhaseJob, job_values, open_data, stream_settings
from ray_pipeline.training.step import prepared

ROOT = Path(__file__).resolve().parents[2]
STEPS = 9  # of 5 samples: beyond the first epoch of 24


@pytest.fixture(scope="module")
def job(ray_cluster, tiny_data, tiny_autoencoder, tmp_path_factory) -> PhaseJob:
    """Phase 2 of a small job: three augmentation variants, real and simulated degradations in a ratio of 2 to 1."""
    folder = tmp_path_factory.mktemp("exact")
    drawn = "[{name: simulated, weight: 2, degradations: real}, {name: simulated, weight: 1, degradations: simulated}]"
    values = {
        "data.root": tiny_data, "data.latents": folder / "latents", "data.tile_size": 64, "data.simulate": "null",
        "data.augment_variants": 3, "data.shard_rows": 7, "data.shuffle_window": 10, "model.latent_size": 8,
        "model.patch_size": 2, "vae.pretrained": tiny_autoencoder, "train.batch_size": 2, "train.global_batch": 5,
        "train.dataloader_workers": 2, "phases.1.datasets": drawn, "output_dir": folder / "run",
    }  # fmt: skip
    config = load_config(ROOT / "configs/demo.yaml", [f"{key}={value}" for key, value in values.items()])
    pipeline.encode(config, pipeline.look(config))
    store = encode_job(config).store
    return PhaseJob(config=config.dump(), phase=1, latents=store, init=None)


def samples(job: PhaseJob, out: Path, workers: int, first: int = 0) -> list:
    """(step, position, digest) of every sample, in the order of positions."""
    out.mkdir()

    def record(values: dict) -> None:
        """Write what this rank is given at each step: index, and a digest of tile, noise, hints and which of them it
        keeps, of each sample."""
        data = open_data(PhaseJob(**values["job"]))
        seen = []
        batches = ReadAhead(prepared(data, stream(stream_settings(data), values["first"], STEPS)))
        for taken in batches:
            index = data.plan.positions(taken.step, data.rank, data.world_size).tolist()
            assert taken.positions.tolist() == index
            samples = [sample for batch in taken.batches for sample in zip(*vars(batch).values(), strict=True)]
            for position, sample in zip(index, samples, strict=True):
                parts = b"".join(part.contiguous().numpy().tobytes() for part in sample)
                seen.append((taken.step, position, hashlib.sha256(parts).hexdigest()))
        (Path(values["out"]) / f"rank{data.rank}.json").write_text(json.dumps(seen))

    TorchTrainer(
        record,
        train_loop_config={"job": job_values(job), "first": first, "out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name=out.name, storage_path=str(out.parent / "ray")),
    ).fit()
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    assert len(ranks) == workers
    steps = [{step for step, _, _ in rank} for rank in ranks]
    assert all(rank == set(range(first, STEPS)) for rank in steps)
    return sorted((sample for rank in ranks for sample in rank), key=lambda sample: sample[1])


def test_two_workers_are_given_the_samples_and_noise_of_one_and_a_resume_those_it_has_not_seen(job, tmp_path):
    one = samples(job, tmp_path / "one", workers=1)
    assert [(step, position) for step, position, _ in one] == [(n // 5, n) for n in range(5 * STEPS)]
    assert len({digest for _, _, digest in one}) == len(one)
    assert samples(job, tmp_path / "two", workers=2) == one
    assert samples(job, tmp_path / "later", workers=1, first=4) == [sample for sample in one if sample[0] >= 4]
