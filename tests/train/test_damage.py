"""Every kind of damage to a checkpoint, and every part of the state that a comparison must see."""

import pytest
import tiny
import torch

from gptworks.core import folder
from gptworks.data.loader import Cursor
from gptworks.train.state import State, newest_good, restore, save


def trained(until: int, optimizer: str = "muon", start: State | None = None) -> State:
    """A run of 12 steps with dropout and accumulation, up to step `until`."""
    train = tiny.settings(optimizer=optimizer)
    return tiny.run(start or empty(optimizer), train, until, micro_batch=4)


def empty(optimizer: str = "muon") -> State:
    return tiny.state(tiny.settings(optimizer=optimizer), dropout=0.2)


def saved(path, steps):
    state = None
    for step in steps:
        state = trained(step, start=state)
        save(state, path, {"data": "x"})
    return state


def flip(file, place=-3):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "bit in weights": lambda p: flip(p / "model.safetensors"),
    "bit in optimizer": lambda p: flip(p / "optimizer.safetensors"),
    "bit in counters": lambda p: flip(p / "state.json", 12),
    "bit in manifest": lambda p: flip(p / "manifest.json", 1),
    "truncated": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1]),
    "empty": lambda p: (p / "optimizer.safetensors").write_bytes(b""),
    "file gone": lambda p: (p / "optimizer.safetensors").unlink(),
    "manifest gone": lambda p: (p / "manifest.json").unlink(),
    "all gone": lambda p: [file.unlink() for file in p.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_gives_way_to_the_one_before_with_a_warning(tmp_path, damage, capsys):
    saved(tmp_path, [1, 2])
    DAMAGE[damage](tmp_path / "step-00000002")
    assert newest_good(tmp_path) == tmp_path / "step-00000001"
    warned = capsys.readouterr().err
    assert "warning:" in warned and "step-00000002" in warned
    assert (tmp_path / "step-00000002.damaged").is_dir()  # set aside, not lost
    assert newest_good(tmp_path) == tmp_path / "step-00000001" and not capsys.readouterr().err


def test_the_same_checkpoint_may_be_damaged_twice(tmp_path):
    state = saved(tmp_path, [1, 2])
    for _ in range(2):
        flip(tmp_path / "step-00000002" / "model.safetensors")
        assert newest_good(tmp_path) == tmp_path / "step-00000001"
        save(state, tmp_path, {})
    assert newest_good(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize(("optimizer", "threads"), [("muon", 1), ("adamw", 1), ("adam", 1), ("sgd", 1), ("muon", 2)])
def test_resume_from_any_step_is_bitwise_equal_to_the_straight_run(tmp_path, optimizer, threads):
    torch.set_num_threads(threads)
    straight = trained(12, optimizer)
    for cut in (1, 4, 7, 11) if threads == 1 else (7,):
        path = save(trained(cut, optimizer), tmp_path / str(cut), {})
        state = empty(optimizer)
        restore(state, path)
        assert trained(12, optimizer, state).fingerprint() == straight.fingerprint()


def test_no_pickle_and_a_hash_of_every_file(tmp_path):
    saved(tmp_path, [1])
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert set(folder.verify(tmp_path / "step-00000001")["files"]) == names - {"manifest.json"}


@pytest.mark.parametrize("counter", ["step", "tokens", "cursor", "best_loss", "evals_since_best"])
def test_a_counter_that_differs_is_named(counter):
    one, two = empty(), empty()
    assert one.difference(two) is None
    setattr(two, counter, Cursor(1, 2) if counter == "cursor" else 3)
    assert one.difference(two).startswith(counter) and one.fingerprint() != two.fingerprint()
