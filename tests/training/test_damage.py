"""Every kind of damage to a checkpoint, and every part of the state that a comparison must see."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.data.batch import Cursor
from gptworks.training.state import State, newest_good, restore, save


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


def sealed(checkpoint, name, change):
    """A file changed and the manifest redone: what is in it has to be looked at."""
    change(checkpoint / name)
    manifest = folder.read_manifest(checkpoint)
    manifest["files"][name] = {
        "bytes": (checkpoint / name).stat().st_size, "sha256": folder.sha256(checkpoint / name)
    }  # fmt: skip
    folder.write_manifest(checkpoint, manifest)
    assert newest_good(checkpoint.parent) == checkpoint


def retensored(change):
    def rewrite(file):
        tensors = load_file(file)
        save_file(change(tensors), file)

    return rewrite


def first(change):
    return lambda tensors: {name: change(v) if i == 0 else v for i, (name, v) in enumerate(tensors.items())}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        first(lambda v: v * torch.nan),
        first(lambda v: v[:1]),
        first(lambda v: v.int()),
        lambda t: t | {"x": torch.ones(1)},
    ],
    ids=["nan", "misshapen", "whole numbers", "unknown"],
)
def test_tensors_that_are_not_this_runs_are_refused_though_the_hashes_agree(tmp_path, name, change):
    saved(tmp_path, [1])
    sealed(tmp_path / "step-00000001", name, retensored(change))
    with pytest.raises(DataError, match=name):
        restore(empty(), tmp_path / "step-00000001")


@pytest.mark.parametrize(
    "counters",
    [{"step": "1"}, {"cursor": [1]}, {"cursor": {"epoch": "x", "row": 1}}, {"norms": ["x"]}, {"tokens": None}],
)
def test_counters_that_are_none_are_refused_though_the_hashes_agree(tmp_path, counters):
    saved(tmp_path, [1])
    change = lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | counters))  # noqa: E731
    sealed(tmp_path / "step-00000001", "state.json", change)
    with pytest.raises(DataError, match="not a checkpoint of this version"):
        restore(empty(), tmp_path / "step-00000001")


@pytest.mark.parametrize("counter", ["step", "tokens", "cursor", "best_figure", "evals_since_best"])
def test_a_counter_that_differs_is_named(counter):
    one, two = empty(), empty()
    assert one.difference(two) is None
    setattr(two, counter, Cursor(1, 2) if counter == "cursor" else 3)
    assert one.difference(two).startswith(counter) and one.fingerprint() != two.fingerprint()
