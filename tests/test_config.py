"""The YAML is read as it is meant, and what it cannot mean is refused in words."""

import warnings
from pathlib import Path

import pytest
import yaml

from ray_pipeline.config import Config, load_config, parse_config
from ray_pipeline.errors import UserError
from ray_pipeline.phase_sections import DatasetChoice

CONFIGS = Path(__file__).parents[1] / "configs"
PHASES = {"phases": [{"name": "one", "epochs": 8}]}
MICROSCOPY = {
    "model.architecture": "DiT-XL/8",
    "model.latent_size": 64,
    "model.hidden_size": 1152,
    "data.tile_size": 512,
    "scheduler.type": "EDMEulerScheduler",
    "scheduler.num_train_timesteps": 1000,
    "scheduler.sigma_min": 0.002,
    "scheduler.sigma_max": 80.0,
    "scheduler.sigma_data": 0.5,
    "scheduler.rho": 7.0,
    "scheduler.prediction_type": "v_prediction",
    "ema.enabled": True,
    "ema.decay": 0.9999,
    "ema.update_every": 1,
    "ema.start_step": 2000,
    "monitoring.log_every_n_steps": 10,
    "monitoring.val_check_interval": 100,
    "monitoring.plot_loss": True,
    "monitoring.plot_lr": True,
    "monitoring.plot_samples": True,
    "monitoring.sample_every_n_epochs": 5,
    "train.batch_size": 2,
    "phases.0.name": "phase1_unconditional",
    "phases.0.epochs": 50,
    "phases.0.epochs_to_save": (12, 25, 37, 50),
    "phases.0.condition_types": (),
    "phases.1.name": "phase2_conditional",
    "phases.1.epochs": 30,
    "phases.1.epochs_to_save": (8, 15, 22, 30),
    "phases.1.condition_types": ("super_resolution", "denoising", "canny", "depth"),
    "phases.1.condition_dropout": 0.1,
}


def drawing(datasets, hints=("denoising",), name="one") -> dict:
    """A config whose one phase draws from these data sets."""
    return {"phases": [{"name": name, "epochs": 8, "datasets": datasets, "condition_types": list(hints)}]}


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(PHASES))
    return path


def value_at(config: Config, path: str):
    value = config
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def refusal(tree: dict) -> str:
    with pytest.raises(UserError) as error:
        parse_config(tree)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_without_a_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(path)


@pytest.mark.parametrize("key", MICROSCOPY)
def test_the_full_job_is_the_one_that_was_asked_for(key):
    assert value_at(load_config(CONFIGS / "microscopy.yaml"), key) == MICROSCOPY[key]


def test_the_full_job_names_every_key_there_is():
    # the YAML is the reference of all keys: one that it lacks is one that nobody finds
    written = yaml.safe_load((CONFIGS / "microscopy.yaml").read_text())

    def lacking(full, given, path=""):
        if isinstance(full, dict) and isinstance(given, dict):
            return [found for key in full for found in (
                lacking(full[key], given[key], f"{path}{key}.") if key in given else [path + key]
            )]  # fmt: skip
        if isinstance(full, list) and isinstance(given, list):
            pairs = enumerate(zip(full, given, strict=True))
            return [found for number, (a, b) in pairs for found in lacking(a, b, f"{path}{number}.")]
        return []

    assert lacking(load_config(CONFIGS / "microscopy.yaml").dump(), written) == []


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("modle", "model"),
        ("optimizer.learning_rate", "lr"),
        ("optimizer.warmup_step", "warmup_steps"),
        ("data.simulate.feilds", "fields"),
        ("ray.numworkers", "num_workers"),
        ("phases.0.epochs_to_sav", "epochs_to_save"),
        ("phases.0.condition_type", "condition_types"),
        ("phases.0.datasets.1.wieght", "weight"),
        ("vae.gpu_per_actor", "gpus_per_actor"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(path, nearest):
    phase = {"name": "one", "epochs": 8, "datasets": ["a", {"name": "b"}]}
    tree = {"phases": [phase], "data": {"simulate": {}}, "optimizer": {}, "ray": {}, "vae": {}}
    node = tree
    *parents, leaf = path.split(".")
    for part in parents:
        node = node[int(part)] if part.isdecimal() else node[part]
    node[leaf] = 1
    nearest_path = ".".join([*path.split(".")[:-1], nearest])
    assert refusal(tree) == f"config: unknown key {path}; the nearest known key is {nearest_path}"


def test_every_wrong_key_is_told_at_once(minimal):
    with pytest.raises(UserError, match=r"minimal\.yaml: ema\.decay.*; .*optimizer\.lrr"):
        load_config(minimal, ["optimizer.lrr=1", "ema.decay=2"])


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=2e-4", "optimizer.lr", 2e-4),  # YAML 1.1 reads a number without a dot as text
        ("optimizer.lr=0.5", "optimizer.lr", 0.5),
        ("seed=7", "seed", 7),
        ("phases.0.epochs=2", "phases.0.epochs", 2),
        ("phases.0.epochs_to_save=[1, 2]", "phases.0.epochs_to_save", (1, 2)),
        ("phases.0.condition_types=[canny]", "phases.0.condition_types", ("canny",)),
        ("phases=[{name: a, epochs: 1}, {name: b, epochs: 2}]", "phases.1.epochs", 2),
        ("optimizer.betas=[0.8, 0.95]", "optimizer.betas", (0.8, 0.95)),
        ("ema.enabled=false", "ema.enabled", False),
        ("optimizer.grad_clip=null", "optimizer.grad_clip", None),
        ("optimizer.grad_clip=", "optimizer.grad_clip", None),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("data.simulate.fields=3", "data.simulate.fields", 3),
        ("ray.resources_per_worker.A100=0.5", "ray.resources_per_worker", {"A100": 0.5}),
        ("ray.use_gpu=true", "ray.use_gpu", True),
        ("ray.use_gpu=auto", "ray.use_gpu", "auto"),
        ("data.mode=tiles", "data.mode", "tiles"),
        ("vae.gpus_per_actor=0.25", "vae.gpus_per_actor", 0.25),
        ("vae.gpus_per_actor=null", "vae.gpus_per_actor", None),
        ("phases.0.datasets=[a, {name: b}]", "phases.0.datasets.1.name", "b"),
        ("phases.0.datasets=[{name: a, weight: 2}]", "phases.0.datasets.0.weight", 2.0),
    ],
)
def test_any_key_can_be_set_from_the_command_line(minimal, override, path, value):
    found = value_at(load_config(minimal, [override]), path)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_single_items_of_a_list_can_be_set(minimal):
    overrides = ["phases.0.epochs_to_save=[1, 2]", "phases.0.epochs_to_save.1=4", "seed=1", "seed=2"]
    config = load_config(minimal, overrides)
    assert config.phases[0].epochs_to_save == (1, 4)
    assert config.seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("seed=[", "not valid YAML"),
        ("phases.1.epochs=2", r"phases has items 0 to 0, not '1'"),
        ("phases.one.epochs=2", r"phases has items 0 to 0, not 'one'"),
        ("phases.0.name.first=x", r"phases.0.name holds a plain value"),
        ("nonsense.key=1", "unknown key nonsense"),
        ("seed=x", "seed: .*integer.*found 'x'"),
    ],
)
def test_a_wrong_override_is_named(minimal, override, said):
    with pytest.raises(UserError, match=said):
        load_config(minimal, [override])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"phases": [{"name": "one", "epochs": "many"}]}, "phases.0.epochs: input should be a valid integer"),
        ({"phases": [{"name": "one", "epochs": 2.5}]}, "phases.0.epochs"),
        ({"phases": [{"name": "one", "epochs": 0}]}, "phases.0.epochs: input should be greater than 0, found 0"),
        ({"phases": [{"name": "one", "epochs": True}]}, "phases.0.epochs: expected another value than true"),
        ({"phases": [{"name": "one"}]}, "phases.0.epochs is missing"),
        ({"phases": [{"name": "a b", "epochs": 1}]}, "phases.0.name"),
        ({"phases": []}, "phases is empty"),
        ({}, "phases is missing"),
        ({"phases": {"name": "one", "epochs": 1}}, "phases: expected a list"),
        ({**PHASES, "optimizer": 3}, "optimizer: expected keys and values, found 3"),
        ({**PHASES, "optimizer": {"lr": 0}}, "optimizer.lr: input should be greater than 0"),
        ({**PHASES, "optimizer": {"lr": float("nan")}}, "optimizer.lr: input should be a finite number"),
        ({**PHASES, "optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1: input should be less than 1"),
        ({**PHASES, "optimizer": {"betas": [0.9]}}, "optimizer.betas.1 is missing"),
        ({**PHASES, "ema": {"decay": 1}}, "ema.decay"),
        ({**PHASES, "train": {"batch_size": False}}, "train.batch_size: expected another value than false"),
        ({**PHASES, "train": {"precision": "fp8"}}, "'auto', 'fp32' or 'bf16', found 'fp8'"),
        ({**PHASES, "ray": {"use_gpu": "maybe"}}, "ray.use_gpu: input should be 'auto', True or False, found 'maybe'"),
        ({**PHASES, "sweep": {"scheduler": "pbt"}}, "sweep.scheduler: input should be 'asha' or 'fifo', found 'pbt'"),
        ({**PHASES, "data": {"root": None}}, "data.root: input should be a valid string"),
        ({**PHASES, "data": {"simulate": {"val_fraction": 0}}}, "data.simulate.val_fraction"),
        ({**PHASES, "data": {"max_rejected": -1}}, "data.max_rejected: input should be greater than or equal to 0"),
        ({**PHASES, "data": {"hints": ["canny"]}}, "data.hints: input should be a valid dictionary"),
        ({**PHASES, "data": {"hints": {"canny": 3}}}, "data.hints.canny: input should be a valid dictionary, found 3"),
        ({**PHASES, "vae": {"posterior": "mean"}}, "vae.posterior: input should be 'mode' or 'sample', found 'mean'"),
        ({**PHASES, "data": {"mode": "pixels"}}, "data.mode: input should be 'latents' or 'tiles', found 'pixels'"),
        ({**PHASES, "vae": {"gpus_per_actor": 0}}, "vae.gpus_per_actor: input should be greater than 0, found 0"),
        ({**PHASES, "vae": {"gpus_per_actor": True}}, "vae.gpus_per_actor: expected another value than true"),
        (drawing("a"), "phases.0.datasets: expected a list, found 'a'"),
        (drawing([3]), "phases.0.datasets.0: expected keys and values, found 3"),
        (drawing([{"weight": 1}]), "phases.0.datasets.0.name is missing"),
        (drawing([{"name": "a", "weight": 0}]), "phases.0.datasets.0.weight: input should be greater than 0, found 0"),
        (drawing([{"name": "a", "weight": True}]), "phases.0.datasets.0.weight: expected another value than true"),
        (
            drawing([{"name": "a", "degradations": "fake"}]),
            "phases.0.datasets.0.degradations: input should be 'auto', 'real' or 'simulated', found 'fake'",
        ),
        ({**PHASES, 3: 1}, "3: keys should be strings"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_the_path_of_its_key_alone(tree, said):
    message = refusal(tree)
    assert said in message
    assert "; " not in message.removeprefix("config: ").replace("; list at least one", "")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"data": {"tile_size": 256}}, "set model.latent_size=32"),
        ({"data": {"tile_size": 500}}, "data.tile_size 500 is not a multiple of 8"),
        ({"model": {"hidden_size": 1024}}, "hidden_size 1024 does not fit DiT-XL/8, which has 1152"),
        ({"model": {"depth": 3}}, "depth 3 does not fit DiT-XL/8"),
        ({"model": {"architecture": "DiT-XL/9"}}, "nearest known one is 'DiT-XL/8'"),
        ({"model": {"architecture": "custom", "depth": 2}}, "custom needs hidden_size, num_heads, patch_size"),
        ({"model": {"latent_size": 60}, "data": {"tile_size": 480}}, "60 is not a multiple of the patch size 8"),
        ({"scheduler": {"sigma_min": 90.0}}, "sigma_min 90.0 must lie below sigma_max 80.0"),
        ({"train": {"global_batch": 2}, "ray": {"num_workers": 3}}, "ray.num_workers 3 exceeds train.global_batch 2"),
        ({"train": {"global_batch": 2}, "ray": {"num_workers": [1, 3]}}, "num_workers 3 exceeds train.global_batch 2"),
        (
            {"data": {"mode": "tiles"}, "ray": {"num_workers": [1, 3]}},
            "num_workers [1, 3] may change, but in data.mode",
        ),
        ({"ray": {"autoscaling": True}}, "GPUs may not have come yet; set use_gpu to true or false"),
        ({"ray": {"autoscaling": True, "use_gpu": True, "address": "local"}}, "no node ever joins"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(tree, said):
    assert said in refusal(PHASES | tree)


@pytest.mark.parametrize("workers", [0, -1, True, "two", 1.5, [], [1], [2, 1], [0, 2], [1, 2, 3], [1, True]])
def test_a_number_of_workers_is_a_positive_one_or_two_that_rise(workers):
    message = refusal({**PHASES, "ray": {"num_workers": workers}})
    assert "ray.num_workers: expected" in message
    assert "; " not in message


@pytest.mark.parametrize(("workers", "bounds"), [(3, (3, 3, False)), ([2, 8], (2, 8, True)), ([2, 2], (2, 2, True))])
def test_the_bounds_of_the_workers_survive_yaml(tmp_path, workers, bounds):
    path = tmp_path / "config.yaml"
    path.write_text(parse_config({**PHASES, "ray": {"num_workers": workers}}).to_yaml())
    ray = load_config(path).ray
    assert (ray.min_workers, ray.max_workers, ray.elastic) == bounds


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"hidden_size": 66, "num_heads": 3}, "hidden_size 66 is not a multiple of 4"),
    ],
)
def test_a_custom_architecture_must_be_possible(shape, said):
    model = {"architecture": "custom", "depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 8} | shape
    assert said in refusal({**PHASES, "model": model})


def test_the_shape_of_the_network_is_known_whether_named_or_custom():
    assert parse_config(PHASES).model.shape == {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 8}
    custom = {"depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 8}
    assert parse_config({**PHASES, "model": {"architecture": "custom", **custom}}).model.shape == custom


@pytest.mark.parametrize(
    ("epochs", "saved"),
    [(100, (25, 50, 75, 100)), (8, (2, 4, 6, 8)), (3, (1, 2, 3)), (1, (1,))],
)
def test_without_epochs_to_save_every_quarter_is_kept(epochs, saved):
    assert parse_config({"phases": [{"name": "one", "epochs": epochs}]}).phases[0].save_epochs == saved


def test_epochs_to_save_beyond_the_end_warn_and_are_left_out():
    phase = {"name": "one", "epochs": 8, "epochs_to_save": [8, 2, 9, 2, 100]}
    with pytest.warns(UserWarning, match=r"phase one: epochs_to_save \[9, 100\] lie beyond its 8 epochs"):
        config = parse_config({"phases": [phase]})
    assert config.phases[0].save_epochs == (2, 8)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"name": "a", "epochs": 1}, {"name": "a", "epochs": 1}], "two phases share a name"),
        ([{"name": "a", "epochs": 1, "condition_types": ["canny", "canny"]}], "condition_types lists an entry twice"),
        ([{"name": "a", "epochs": 1, "datasets": ["x", "x"]}], "datasets lists an entry twice"),
        (
            [{"name": "a", "epochs": 1, "condition_types": ["canny", "cany"]}],
            "phases.0.condition_types: unknown condition type 'cany', expected some of super_resolution, denoising, "
            "canny, depth; the nearest is 'canny'",
        ),
    ],
)
def test_phases_that_contradict_themselves_are_refused(phases, said):
    assert said in refusal({"phases": phases})


def test_data_sets_are_chosen_by_name_or_with_share_and_degradations():
    datasets = parse_config(drawing(["a", {"name": "b", "degradations": "simulated"}])).phases[0].datasets
    assert datasets == (DatasetChoice(name="a"), DatasetChoice(name="b", degradations="simulated"))
    assert datasets[0].weight is None
    assert datasets[0].degradations == "auto"
    weighted = parse_config(drawing([{"name": "a", "weight": 2}, {"name": "b", "weight": 0.5}]))
    assert [choice.weight for choice in weighted.phases[0].datasets] == [2, 0.5]
    assert parse_config(PHASES).phases[0].datasets == ()


def test_one_data_set_may_be_drawn_with_given_and_with_simulated_degradations():
    both = [{"name": "a", "weight": 1, "degradations": way} for way in ("real", "simulated")]
    assert len(parse_config(drawing(both)).phases[0].datasets) == 2


@pytest.mark.parametrize(
    ("datasets", "hints", "said"),
    [
        ([{"name": "a", "weight": 1}, "b"], ("denoising",), "phases.0: datasets: b has no weight but others have"),
        (["a", "b", "a"], ("denoising",), "datasets lists an entry twice: a, b, a"),
        ([{"name": "a", "weight": 1}, {"name": "a", "weight": 2}], ("denoising",), "lists an entry twice: a, a"),
        # where all tiles have partners these two are one, elsewhere the second is refused
        (["a", {"name": "a", "degradations": "real"}], ("denoising",), "lists an entry twice: a, a"),
        ([{"name": "a", "degradations": "simulated"}] * 2, ("denoising",), "twice: a (simulated), a (simulated)"),
        ([{"name": "a", "degradations": "real"}], (), "degradations of a has no effect"),
        (["b", {"name": "a", "degradations": "simulated"}], ("canny",), "degradations of a has no effect"),
    ],
)
def test_choices_of_data_sets_that_contradict_themselves_are_refused(datasets, hints, said):
    assert said in refusal(drawing(datasets, hints))


def test_hints_to_simulate_beside_their_partners_are_those_of_phases_that_ask_for_it():
    simulated = {"name": "a", "degradations": "simulated"}

    def names(*phases) -> tuple[str, ...]:
        trees = [drawing(datasets, hints, f"p{n}")["phases"][0] for n, (datasets, hints) in enumerate(phases)]
        return parse_config({"phases": trees}).simulated_names

    assert names((["a"], ("denoising", "super_resolution"))) == ()
    assert names(([{"name": "a", "degradations": "real"}], ("denoising",))) == ()
    assert names(([simulated], ("canny", "denoising"))) == ("denoising",)
    assert names(([simulated], ("denoising",)), (["b", simulated], ("super_resolution", "depth"))) == (
        "super_resolution",
        "denoising",
    )
    assert names((["a"], ("super_resolution",)), ([simulated], ("denoising",))) == ("denoising",)


def test_hints_are_those_of_all_phases_in_one_order():
    phases = [
        {"name": "a", "epochs": 1, "condition_types": ["depth", "canny"]},
        {"name": "b", "epochs": 1, "condition_types": ["super_resolution"]},
    ]
    assert parse_config({"phases": phases}).hint_names == ("super_resolution", "canny", "depth")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_written_as_yaml_is_read_back_equal(path, tmp_path):
    config = load_config(path, ["optimizer.lr=1e-4", "optimizer.eps=1e-8", "ray.resources_per_worker={A: 0.25}"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    assert parse_config(config.dump()) == config


def test_chosen_data_sets_are_written_and_read_back_equal(tmp_path):
    config = parse_config(drawing([{"name": "a", "weight": 2}, {"name": "b", "weight": 1, "degradations": "real"}]))
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    assert parse_config(config.dump()) == config
    assert config.dump()["phases"][0]["datasets"][0] == {"name": "a", "weight": 2.0, "degradations": "auto"}


def test_a_loaded_config_does_not_change(minimal):
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"a: [", "not readable YAML"),
        (b"", "NoneType"),
        (b"- 1", "list"),
        (b"\xff\xfe\xff", "not readable"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, said):
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"job\.yaml.*{said}"):
        load_config(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        load_config(tmp_path)


def test_a_low_rank_above_the_hidden_size_is_refused():
    with pytest.raises(UserError, match=r"hint_control\.lora_rank 2000 exceeds the network's hidden size of 1152"):
        parse_config({"phases": [{"name": "one", "epochs": 1}], "hint_control": {"lora_rank": 2000}})
