"""Whatever happens to a file of a checkpoint: the checkpoint is refused in words, and the one before it is found."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ray_pipeline.checkpoints import Checkpoint, CheckpointStore
from ray_pipeline.errors import UserError

PHASE = "phase1"
GROUPS = ("model", "optimizer", "ema_decay_0.9", "ema_power_0.05")
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json")


def tensors(number: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return {group: {"weight": torch.randn(8, 5, generator=generator), "bias": torch.ones(5)} for group in GROUPS}


def name(number: int) -> str:
    return f"{PHASE}_epoch_{number:03d}"


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    """Three checkpoints, the third the newest."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for number in (1, 2, 3):
        state = {"phase": PHASE, "step": 10 * number, "position": 80 * number, "epoch": number, "attempt": 1}
        store.save(name(number), tensors(number), state)
    return store


def file(tmp_path: Path, number: int, of: str) -> Path:
    return tmp_path / "checkpoints" / f"{name(number)}.ckpt" / of


def flipped(place: float) -> Callable[[Path], None]:
    """One bit at this part of the file turned."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(place * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(data)

    return flip


def cut(place: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def last_byte_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replaced_by_the_one_before(path: Path) -> None:
    shutil.copy(path.parent.parent / f"{name(2)}.ckpt" / path.name, path)


def replaced_by_another_group(path: Path) -> None:
    other = "optimizer.safetensors" if path.name == "model.safetensors" else "model.safetensors"
    shutil.copy(path.with_name(other), path)


DAMAGE = {
    "emptied": cut(0),
    "cut in its header": cut(0.02),
    "cut in half": cut(0.5),
    "last byte cut": last_byte_cut,
    "a byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first bit flipped": flipped(0),
    "bit flipped at a third": flipped(1 / 3),
    "bit flipped at two thirds": flipped(2 / 3),
    "last bit flipped": flipped(1),
    "deleted": Path.unlink,
    "of the checkpoint before": replaced_by_the_one_before,
    "of another group": replaced_by_another_group,
}
# white space behind JSON is no damage
CASES = [(of, how) for of in FILES for how in DAMAGE if (of, how) != ("state.json", "a byte longer")]


def assert_is(checkpoint: Checkpoint | None, number: int) -> None:
    """It is checkpoint `number`, with every value right."""
    assert checkpoint is not None
    assert checkpoint.state["step"] == 10 * number
    expected = tensors(number)
    assert set(checkpoint) == set(expected)
    for group, values in expected.items():
        found = checkpoint[group]
        assert found.keys() == values.keys()
        assert all(torch.equal(found[key], value) for key, value in values.items())


def assert_refused_in_words(store: CheckpointStore, number: int) -> None:
    """Reading all of it raises, naming the checkpoint."""
    with pytest.raises(UserError, match=f"{name(number)}.ckpt"):
        dict(store.load(name(number)))


@pytest.mark.parametrize(("of", "how"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_the_latest(store, tmp_path, of, how):
    assert_is(store.latest(PHASE), 3)
    DAMAGE[how](file(tmp_path, 3, of))
    assert_is(store.latest(PHASE), 2)
    assert_refused_in_words(store, 3)


@pytest.mark.parametrize("how", ["cut in half", "deleted", "bit flipped at two thirds"])
def test_of_two_damaged_checkpoints_the_one_before_them_is_the_latest(store, tmp_path, how):
    DAMAGE[how](file(tmp_path, 3, "model.safetensors"))
    DAMAGE[how](file(tmp_path, 2, "state.json"))
    assert_is(store.latest(PHASE), 1)


def test_a_phase_of_damaged_checkpoints_alone_has_no_latest(store, tmp_path):
    for number, of in ((1, "state.json"), (2, "optimizer.safetensors"), (3, "model.safetensors")):
        file(tmp_path, number, of).unlink()
    assert store.latest(PHASE) is None


def test_a_damaged_checkpoint_is_replaced_when_training_comes_to_it_again(store, tmp_path):
    DAMAGE["bit flipped at a third"](file(tmp_path, 3, "model.safetensors"))
    before = store.latest(PHASE)
    store.save(name(3), tensors(3), before.state | {"step": 30, "position": 240, "epoch": 3})
    assert_is(store.latest(PHASE), 3)


def test_one_checkpoint_in_the_place_of_another_is_refused(store, tmp_path):
    """Whole in itself, but not what its name says: the newest must not become an older one unseen."""
    newest = tmp_path / "checkpoints" / f"{name(3)}.ckpt"
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name(f"{name(2)}.ckpt"), newest)
    assert_is(store.latest(PHASE), 2)
