"""A checkpoint exists as a whole or not at all, and comes back bit for bit."""

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ray_pipeline.checkpoints import CheckpointStore, DamagedCheckpoint, open_checkpoint
from ray_pipeline.errors import UserError
from ray_pipeline.storage import StorageError

PHASE = "phase1"


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=generator)
    model = {
        "weight": weight,
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(3, generator=generator).bfloat16(),
        "turned": torch.randn(5, 2, generator=generator).T,  # not contiguous
        "scalar": torch.tensor(3.5),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    optimizer = {"weight/step": torch.tensor(7, dtype=torch.int64), "weight/flags": torch.tensor([True, False])}
    return {"model": model, "optimizer": optimizer}


def state(position: int, phase: str = PHASE, **more) -> dict:
    return {"phase": phase, "position": position, **more}


def save(store: CheckpointStore, number: int, **more) -> str:
    return store.save(f"{PHASE}_epoch_{number:03d}", tensors(number), state(100 * number, **more))


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_tensors_and_state_come_back_with_equal_bits(store):
    saved_state = state(12, loss=0.1, config={"a": [1, 2.5, None], "b": {"c": "text"}}, counts={3: "three", 20: "x"})
    saved = tensors()
    name = store.save("phase1_epoch_001", saved, saved_state)
    loaded = store.load(name)
    assert set(loaded) == {"model", "optimizer"}
    for group, expected in saved.items():
        found = loaded[group]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            same = found[key].contiguous().view(torch.uint8) if tensor.ndim else found[key]
            other = tensor.detach().contiguous().view(torch.uint8) if tensor.ndim else tensor
            assert torch.equal(same, other), key
    assert loaded.state == json.loads(json.dumps(saved_state))


def test_a_diverged_loss_does_not_make_a_checkpoint_unreadable(store):
    store.save("phase1_epoch_001", tensors(), state(1, val_loss=float("nan"), best=float("inf")))
    assert store.names() == ["phase1_epoch_001.ckpt"]
    assert store.load("phase1_epoch_001").state["best"] == float("inf")


def test_names_are_sorted_by_phase_and_position(store):
    for name, phase, position in [
        ("phase1_epoch_010", "phase1", 1000),
        ("phase1_epoch_009", "phase1", 900),
        ("phase1_step_00000950", "phase1", 950),
        ("phase2_epoch_001", "phase2", 10),
        ("phase10_epoch_001", "phase10", 5000),
    ]:
        store.save(name, tensors(), state(position, phase))
    assert store.names("phase1") == [
        "phase1_epoch_009.ckpt",
        "phase1_step_00000950.ckpt",
        "phase1_epoch_010.ckpt",
    ]
    assert store.names("phase2") == ["phase2_epoch_001.ckpt"]
    assert len(store.names()) == 5
    assert store.latest("phase1").state["position"] == 1000


def test_an_empty_or_absent_store_has_no_checkpoint(store, tmp_path):
    assert store.names() == []
    assert store.latest(PHASE) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "phase1_epoch_001.ckpt").write_text("a file, no folder")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert store.names() == []


class Interrupted(dict):
    """Groups that a save does not get to the end of."""

    def items(self):
        yield from super().items()
        raise KeyboardInterrupt


def test_an_interrupted_save_is_no_checkpoint_though_all_its_tensors_are_there(store):
    with pytest.raises(KeyboardInterrupt):
        store.save("phase1_epoch_001", Interrupted(tensors(1)), state(100))
    left = {path.name for path in Path(store.path("phase1_epoch_001")).iterdir()}
    assert left == {"model.safetensors", "optimizer.safetensors"}
    fresh = CheckpointStore(store.root)
    assert fresh.names() == []
    found = fresh.search(PHASE)
    assert found.checkpoint is None
    assert re.search(
        r"phase1_epoch_001\.ckpt is no checkpoint that counts: its save was interrupted", *found.passed_over
    )
    # what was left behind does not stand in the way
    save(fresh, 1)
    fresh.load("phase1_epoch_001").verify()


def test_files_appear_whole_and_leave_no_others(store):
    name = save(store, 1)
    files = {path.name for path in Path(store.path(name)).iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_files_are_plain_safetensors_and_hold_no_pickle(store):
    name = save(store, 1)
    folder = Path(store.path(name))
    assert torch.equal(
        safetensors.torch.load_file(folder / "model.safetensors")["weight"], tensors(1)["model"]["weight"]
    )
    assert json.loads((folder / "state.json").read_text())["state"]["position"] == 100
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())


def test_a_name_is_never_overwritten(store):
    name = save(store, 1)
    before = Path(store.path(name), "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="committed already"):
        store.save(name, tensors(9), state(5))
    assert Path(store.path(name), "model.safetensors").read_bytes() == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    # the position becomes 300 instead of 200, a tensor another number: still JSON, still safetensors
    data = bytearray(path.read_bytes())
    mark = b'"position": '
    data[data.index(mark) + len(mark) if mark in data else -9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, flip])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_latest_falls_back_to_the_newest_whole_checkpoint(store, damage, file):
    for number in (1, 2):
        save(store, number)
    damage(Path(store.path("phase1_epoch_002"), file))
    assert store.latest(PHASE).state["position"] == 100
    if file == "state.json":
        assert store.names() == ["phase1_epoch_001.ckpt"]
    else:
        with pytest.raises(DamagedCheckpoint, match=f"phase1_epoch_002.ckpt/{file}"):
            store.load("phase1_epoch_002").verify()


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_run_that_fell_back_saves_over_the_damaged_name(store, file):
    for number in (1, 2):
        save(store, number)
    flip(Path(store.path("phase1_epoch_002"), file))
    save(store, 2, attempt=2)
    assert store.latest(PHASE).state["attempt"] == 2


def test_tensors_are_read_only_when_asked_for(store):
    name = save(store, 1)
    Path(store.path(name), "optimizer.safetensors").unlink()
    checkpoint = store.load(name)
    assert checkpoint["model"]["weight"].shape == (6, 4)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors is missing"):
        checkpoint["optimizer"]


def test_groups_can_be_chosen(store):
    name = save(store, 1)
    assert list(store.load(name, groups=["model"])) == ["model"]
    with pytest.raises(KeyError):
        store.load(name, groups=["model"])["optimizer"]
    with pytest.raises(UserError, match=r"has no 'ema'; it holds model, optimizer"):
        store.load(name, groups=["ema"])


def test_size_is_that_of_the_tensor_files(store):
    name = save(store, 1)
    files = Path(store.path(name)).glob("*.safetensors")
    assert store.load(name).bytes == sum(path.stat().st_size for path in files)


def test_what_is_deleted_is_gone_and_stays_so(store):
    name = save(store, 1)
    store.delete(name)
    assert not Path(store.path(name)).exists()
    assert store.names() == []
    store.delete(name)


def test_what_was_passed_over_is_told(store):
    for number in (1, 2, 3):
        save(store, number)
    flip(Path(store.path("phase1_epoch_003"), "model.safetensors"))
    truncate(Path(store.path("phase1_epoch_002"), "state.json"))
    found = store.search(PHASE)
    assert found.checkpoint.name == "phase1_epoch_001.ckpt"
    unmarked, changed = found.passed_over
    assert "phase1_epoch_002.ckpt is no checkpoint" in unmarked
    assert "phase1_epoch_003.ckpt/model.safetensors was changed after it was saved" in changed


def test_a_file_that_cannot_be_read_for_now_is_not_taken_for_damaged(store):
    """Else a run would go back, or begin again at 0, because its disk did not answer."""
    name = save(store, 1)
    file = Path(store.path(name), "model.safetensors")
    file.unlink()
    file.mkdir()
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be used"):
        store.latest(PHASE)


def test_a_missing_checkpoint_is_named_with_those_that_are_there(store):
    save(store, 1)
    with pytest.raises(UserError, match=r"phase1_epoch_009\.ckpt; found: phase1_epoch_001\.ckpt"):
        store.load("phase1_epoch_009")


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "a b"])
def test_names_cannot_leave_the_store(store, name):
    with pytest.raises(UserError, match="checkpoint name"):
        store.save(name, tensors(), state(1))


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(store):
    name = save(store, 1)
    mark = Path(store.path(name), "state.json")
    mark.unlink()
    mark.mkdir()  # opening it fails, though it is there
    with pytest.raises(StorageError, match=r"state\.json cannot be used"):
        store.latest(PHASE)


def test_a_file_uri_is_the_same_store_as_its_path(store):
    name = save(store, 1)
    same = CheckpointStore(f"file://{store.root}")
    assert same.names() == [name]
    save(same, 2)
    assert store.latest(PHASE).state["position"] == 200


def test_any_storage_of_pyarrow_will_do():
    memory = CheckpointStore("mock:///bucket/run")
    for number in (1, 2):
        save(memory, number)
    assert memory.names() == ["phase1_epoch_001.ckpt", "phase1_epoch_002.ckpt"]
    assert torch.equal(memory.latest(PHASE)["model"]["weight"], tensors(2)["model"]["weight"])
    memory.delete("phase1_epoch_002")
    assert memory.latest(PHASE).state["position"] == 100


def test_an_unknown_kind_of_storage_is_named():
    with pytest.raises(UserError, match=r"floppy://a.*s3://bucket"):
        CheckpointStore("floppy://a")


def test_a_checkpoint_opens_by_its_own_folder(store, monkeypatch):
    name = save(store, 1)
    assert open_checkpoint(f"{store.path(name)}/").state["position"] == 100
    monkeypatch.chdir(store.root)
    assert open_checkpoint(name).state["position"] == 100
    with pytest.raises(UserError, match=r"does not end in \.ckpt"):
        open_checkpoint(store.root)
    with pytest.raises(UserError, match="no committed checkpoint"):
        open_checkpoint(f"{store.root}/absent.ckpt")
