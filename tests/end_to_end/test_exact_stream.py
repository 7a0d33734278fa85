"""Training workers see the same samples and noise at each step, however many they are and wherever they start."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray.train
from ray.train.torch import TorchTrainer

from ray_pipeline.config import load_config
from ray_pipeline.data.encode_job import encode_job
from ray_pipeline.data.stream import ReadAhead, stream
from ray_pipeline.training.setup import PhaseJob, job_values, open_data, stream_settings
from ray_pipeline.training.step import prepared

ROOT = Path(__file__).resolve().parents[2]
STEPS = 9  # of 5 samples: beyond the first epoch of 24


@pytest.fixture(scope="module")
def job(run_job_here, tiny_data, tiny_autoencoder, tmp_path_factory) -> PhaseJob:
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
    encoded = encode_job(config)
    run_job_here(encoded)
    return PhaseJob(config=config.dump(), phase=1, latents=encoded.store, init=None)


#: what each of two workers takes in turn: name, rank, of how many, from which step
TAKEN = ((("two", 0, 2, 0), ("one", 0, 1, 0)), (("two", 1, 2, 0), ("later", 0, 1, 4)))


@pytest.fixture(scope="module")
def samples(ray_cluster, job, tmp_path_factory) -> dict[str, list]:
    """By name of TAKEN: (step, position, digest) of every sample, in the order of positions."""
    out = tmp_path_factory.mktemp("samples")

    def record(values: dict) -> None:
        """Write what is given at each step: index, and a digest of tile, noise, hints and which of them it keeps, of
        each sample."""
        worker = open_data(PhaseJob(**values["job"]))
        for name, rank, world_size, first in values["taken"][worker.rank]:
            data, seen = replace(worker, rank=rank, world_size=world_size), []
            for taken in ReadAhead(prepared(data, stream(stream_settings(data), first, STEPS))):
                index = data.plan.positions(taken.step, rank, world_size).tolist()
                assert taken.positions.tolist() == index
                samples = [sample for batch in taken.batches for sample in zip(*vars(batch).values(), strict=True)]
                for position, sample in zip(index, samples, strict=True):
                    parts = b"".join(part.contiguous().numpy().tobytes() for part in sample)
                    seen.append((taken.step, position, hashlib.sha256(parts).hexdigest()))
            assert {step for step, _, _ in seen} == set(range(first, STEPS))
            (Path(values["out"]) / f"{name}_{rank}.json").write_text(json.dumps(seen))

    TorchTrainer(
        record,
        train_loop_config={"job": job_values(job), "taken": TAKEN, "out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name="samples", storage_path=str(out / "ray")),
    ).fit()
    found: dict[str, list] = {}
    for path in sorted(out.glob("*.json")):
        found.setdefault(path.stem.split("_")[0], []).extend(map(tuple, json.loads(path.read_text())))
    return {name: sorted(taken, key=lambda sample: sample[1]) for name, taken in found.items()}


def test_two_workers_are_given_the_samples_and_noise_of_one(samples):
    assert [(step, position) for step, position, _ in samples["one"]] == [(n // 5, n) for n in range(5 * STEPS)]
    assert len({digest for _, _, digest in samples["one"]}) == 5 * STEPS
    assert samples["two"] == samples["one"]


def test_a_resume_is_given_the_samples_and_noise_that_it_has_not_seen(samples):
    assert samples["later"] == [sample for sample in samples["one"] if sample[0] >= 4]
