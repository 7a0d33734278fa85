"""`check` on a cluster: the plan against what three nodes have; folders that are not the same one on every node; and
`train` there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ray_pipeline
from ray_pipeline.check_cluster import memory_line, memory_split
from ray_pipeline.checkpoints import CheckpointStore
from ray_pipeline.config import parse_config
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.estimate import worker_memory
from ray_pipeline.training.build import make_network, make_state
from ray_pipeline.training.nodes import Node

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from run_proof import unplanned_samples, world_sizes

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("nodes_program.py")
#: of a training with a worker on each of two nodes, as neither has room for both; batches span epochs, cut unevenly
TRAINED = [
    "ray.num_workers=2", "ray.placement_strategy=STRICT_SPREAD", "ray.cpus_per_worker=2", "ray.max_failures=0",
    "vae.actors=2", "train.global_batch=5", "train.batch_size=2", "train.threads=1", "model.hidden_size=64",
    "model.depth=2", "model.num_heads=2", "model.patch_size=2", "sweep.enabled=false", "monitoring.val_tiles=4",
    "monitoring.plot_samples=false", "monitoring.tensorboard=false", "monitoring.log_samples=true",
    "phases=[{name: phase1, epochs: 2}]",
]  # fmt: skip
#: below it, another folder on one of the nodes
LOCAL = "/proc/self/cwd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_data, tiny_autoencoder) -> Path:
    """`shared` and what the run reads in it; `other`: this package, one line of it changed."""
    folder = tmp_path_factory.mktemp("nodes")
    shutil.copytree(tiny_autoencoder, folder / "shared" / "autoencoder")
    shutil.copytree(tiny_data, folder / "shared" / "data", ignore=shutil.ignore_patterns("latents"))
    shutil.copytree(Path(ray_pipeline.__file__).parent, folder / "other" / "ray_pipeline")
    with open(folder / "other" / "ray_pipeline" / "errors.py", "a") as file:
        file.write("# another version\n")
    return folder


@pytest.fixture(scope="module")
def answers(folder, s3_server) -> dict:
    """What each command said."""
    store = s3_server.make_bucket("nodes").replace("?", "/run?")
    small = ["data.tile_size=64", "model.latent_size=8", "data.simulate=null", "train.global_batch=16"]
    there = [f"data.root={folder}/shared/data", f"vae.pretrained={folder}/shared/autoencoder"]
    well = [f"output_dir={folder}/shared/run", *there, f"checkpoint.store={store}", "ray.num_workers=[1,3]"]
    settings = {
        "bare": [*well, "ray.autoscaling=true", "ray.use_gpu=false"],
        "well": [*well, "ray.data_cpus=4", "ray.object_store_gib=0.25"],
        "wrong": [
            f"output_dir={LOCAL}/run", f"data.root={LOCAL}/data", f"vae.pretrained={LOCAL}/autoencoder",
            "ray.num_workers=3", "ray.placement_strategy=STRICT_SPREAD", "train.batch_size=100000000",
            f"ray.runtime_env={{py_modules: [{folder}/other/ray_pipeline]}}",
        ],
    }  # fmt: skip
    commands = {
        name: ["check", "--config", f"{ROOT}/configs/demo.yaml", *(f"--set={word}" for word in [*small, *changes])]
        for name, changes in settings.items()
    }
    words = [*small, *there, *TRAINED, f"output_dir={folder}/shared/trained", f"data.latents={folder}/shared/latents"]
    commands["train"] = ["train", "--config", f"{ROOT}/configs/demo.yaml", *(f"--set={word}" for word in words)]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(answer: tuple[int, str]) -> dict[str, str]:
    """What each line says after its name, FAIL in front where something is wrong."""
    found = re.findall(r"^(ok|FAIL) +(memory \S+|\S+ on nodes|node .*?\)|\w+ \w+|\S+)  *(.*)$", answer[1], re.MULTILINE)
    return {what: ("FAIL " if state == "FAIL" else "") + words for state, what, words in found}


def test_a_plan_that_fits_is_told_fact_by_fact(answers):
    code, text = answers["well"]
    lines = lines_of(answers["well"])
    assert code == 0, text
    assert "FAIL" not in text
    nodes = [words for what, words in lines.items() if what.startswith("node ")]
    assert sorted(words[:5] for words in nodes) == ["0 CPU", "2 CPU", "3 CPU"]
    assert sorted(int(re.search(r"takes (\d)", words)[1]) for words in nodes) == [0, 0, 3]  # PACK
    assert lines["workers"] == "1 to 3 of 1 CPU needed (PACK), room for 5"
    assert lines["batch"] == "16 a step = 6 or 5 on each of 3 worker(s), in 1 micro-step(s) of 16"
    assert lines["encode actors"].startswith("4 of 1 CPU wanted (ray.data_cpus=4), room for 5")
    assert "gather, of 0 CPU each" in lines["streams"]
    assert "at most 256 MiB" in lines["object store"]
    for part in ("parameters", "gradients", "Adam", "average(s)", "activations", "for 3 worker(s), of"):
        assert part in lines["memory phase1_unconditional"]
    for what in ("output_dir", "data.latents", "checkpoint.store"):
        assert re.search(rf"^ok    {what} .*the same folder, readable and writable, on 2 node", text, re.MULTILINE)
    assert "4 file(s) the same on 2 node(s)" in lines["data.root"]
    assert f"{torch.__version__.partition('+')[0]}" in lines["torch on nodes"]
    assert "on 3 node(s)" in lines["sources on nodes"]
    assert "endpoint_override" not in text


def test_on_a_cluster_whose_nodes_have_yet_to_come_nothing_is_wrong(answers):
    code, text = answers["bare"]
    lines = lines_of(answers["bare"])
    assert code == 0, text
    assert lines["workers"].endswith("room for 0 now, the rest within 30 minutes or not at all")
    assert "room for 0 now" in lines["encode actors"]
    assert "folders asked before a run begins" in " ".join(text.split())


def test_every_part_that_does_not_fit_is_named(answers):
    code, text = answers["wrong"]
    lines = lines_of(answers["wrong"])
    failed = {what for what, words in lines.items() if words.startswith("FAIL")}
    memory = {"memory phase1_unconditional", "memory phase2_conditional"}
    places = {"data.latents", "data.root", "vae.pretrained"}
    assert code == 1
    assert failed - {"output_dir"} == {"workers", "sources on nodes"} | memory | places, text
    assert "room for 2:" in lines["workers"]
    assert "train.activation_checkpointing" in lines["memory phase1_unconditional"]
    assert f"output_dir={LOCAL}/run is not the same folder on every node" in text
    assert re.search("data.root=.* does not hold the same files .* has no foundation/simulated/manifests/", text)
    assert re.search("vae.pretrained=.* has no config.json there", text)
    assert "other source files than here on" in lines["sources on nodes"]
    assert "8 problem(s)" in text


def test_before_training_a_local_folder_is_refused_in_one_sentence(answers):
    shared, words = answers["check_nodes"]
    assert shared == ""
    assert re.fullmatch(
        rf"output_dir={LOCAL}/run is not the same folder on every node: node \S+ \(.*\) does not see what the driver "
        r"wrote there; give a folder that all nodes share \(NFS, \.\.\.\) or an s3:// URI",
        words,
    )


def test_a_node_that_does_not_answer_is_named(answers):
    assert re.match(r"node \S+ \(.*?\) did not answer within 3 s;", answers["silent"])


def test_workers_on_two_nodes_train_on_what_was_planned(answers, folder):
    code, text = answers["train"]
    assert code == 0, text
    run, plan = folder / "shared" / "trained", SamplePlan(24, global_batch=5, seed=0, phase="phase1")
    assert world_sizes(run, "phase1") == [2]
    assert unplanned_samples(run, "phase1", plan, total_steps=10) == []
    assert CheckpointStore(run / "checkpoints").names("phase1")[-1] == "phase1_epoch_002.ckpt"


def test_nothing_is_left_behind(answers, folder):
    assert [path for path in folder.rglob("*") if "probe" in path.name] == [
        folder / "other" / "ray_pipeline" / "node_probe.py"
    ]


def made_config(changes):
    model = {"architecture": "custom", "depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 2, "latent_size": 8}
    tree = {"model": model, "data": {"tile_size": 64}, "phases": [{"name": "one", "epochs": 1}]}
    return parse_config(tree | changes)


@pytest.mark.parametrize(("use_gpu", "auto"), [(True, "bf16"), (False, "fp32")])
def test_workers_are_judged_by_the_device_that_they_get_and_not_by_the_drivers(use_gpu, auto, monkeypatch):
    """train.precision=auto is bf16 on each GPU of a cluster whose head has none."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # as on most CPUs
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    told = {"1": {"gpu_memory": [2**40], "memory": 2**40}}
    said = {}
    for precision in ("auto", "bf16", "fp32"):
        config = made_config({"train": {"precision": precision}, "ray": {"use_gpu": use_gpu}})
        _, well, said[precision] = memory_line(config, config.phases[0], [Node("1", "one", {})], {"1": 1}, told)
        assert well
    assert said["bf16"] != said["fp32"]
    assert said["auto"] == said[auto]


@pytest.mark.parametrize("changes", [{}, {"ema": {"enabled": False}}, {"train": {"precision": "bf16"}}])
def test_the_memory_of_a_worker_is_told_by_its_parts(changes):
    config = made_config(changes)
    split = memory_split(config, config.phases[0], "cpu")
    network = make_network(config, config.phases[0])
    state = make_state(config, network)
    weights = sum(4 * p.numel() for p in network.parameters())
    trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
    averaged = sum(4 * tensor.numel() for average in state.averages for tensor in average.tensors().values())
    assert split["parameters"] == weights
    assert (split["gradients"], split["Adam"]) == (trained, 2 * trained)
    assert split[f"{len(state.averages)} average(s)"] == averaged
    assert split["activations"] > 0
    assert sum(split.values()) == worker_memory(config, config.phases[0], "cpu")
