"""Checkpoints: bitwise, two kept, damage found, never a silent restart."""

import json
import shutil

import pytest
import tiny
import torch

from gptworks.core import folder
from gptworks.core.errors import DataError, NotFinite
from gptworks.training.state import listing, newest_good, restore, save


def trained(name="adamw", steps=3):
    train = tiny.settings(optimizer=name)
    return train, tiny.run(tiny.state(train, dropout=0.1), train, steps)


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which two are kept."""
    train = tiny.settings()
    checkpoints = tmp_path / "checkpoints"
    state = tiny.state(train)
    for step in (1, 2, 3):
        state = tiny.run(state, train, step)
        save(state, checkpoints, {"data": "x"})
    return train, state, checkpoints


def damage(path, name="model.safetensors"):
    """One bit, in the middle; the size stays."""
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_restored_state_equals_the_saved_in_every_bit(tmp_path, name):
    train, state = trained(name)
    state.best_figure, state.evals_since_best = 0.1 + 0.2, 2
    path = save(state, tmp_path, {"threads": 1})
    fresh = tiny.state(train, dropout=0.1)
    assert fresh.fingerprint() != state.fingerprint()
    facts = restore(fresh, path)
    assert fresh.fingerprint() == state.fingerprint()
    assert state.difference(fresh) is None
    assert facts["threads"] == 1 and fresh.seconds == state.seconds
    ours, theirs = tiny.run(state, train, 6), tiny.run(fresh, train, 6)  # and they go on alike
    assert ours.fingerprint() == theirs.fingerprint()


def test_difference_names_what_differs_even_the_sign_of_zero(tmp_path):
    train, state = trained()
    path = save(state, tmp_path, {})
    other = tiny.state(train, dropout=0.1)

    restore(other, path)
    weight = other.model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert "weight model.layers.0.self_attn.q_proj.weight differs" in (state.difference(other) or "")
    assert state.fingerprint() != other.fingerprint()

    with torch.no_grad():
        for made, zero in ((state, 0.0), (other, -0.0)):
            made.model.model.layers[0].self_attn.q_proj.weight[0, 0] = zero
    assert "q_proj.weight differs" in (state.difference(other) or "")

    restore(other, path)
    restore(state, path)
    next(iter(other.optimizers[0].state.values()))["exp_avg"].view(-1)[0] += 1
    assert "optimizer state" in (state.difference(other) or "")

    restore(other, path)
    other.tokens += 1
    assert "tokens is" in (state.difference(other) or "")


def test_two_checkpoints_are_kept(three):
    _, _, checkpoints = three
    assert [path.name for path in listing(checkpoints)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    for path in listing(checkpoints):
        folder.verify(path)
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}  # nothing that runs code


def test_a_good_checkpoint_is_never_overwritten(three):
    _, state, checkpoints = three
    newest = listing(checkpoints)[-1]
    before = [(f.name, f.stat().st_ino, f.stat().st_mtime_ns) for f in sorted(newest.iterdir())]
    save(state, checkpoints, {"data": "other"})
    assert [(f.name, f.stat().st_ino, f.stat().st_mtime_ns) for f in sorted(newest.iterdir())] == before


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(three):
    train, state, checkpoints = three
    newest = listing(checkpoints)[-1]
    damage(newest)
    save(state, checkpoints, {})
    folder.verify(newest)
    again = tiny.state(train)
    restore(again, newest)
    assert again.fingerprint() == state.fingerprint()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["bit", "short", "missing"])
def test_a_damaged_newest_gives_the_one_before_with_a_warning(three, capsys, file, how):
    _, _, checkpoints = three
    older, newest = listing(checkpoints)
    if how == "bit" and file == "manifest.json":
        damaged = json.loads((newest / file).read_text())
        damaged["files"]["model.safetensors"]["sha256"] = "0" * 64
        (newest / file).write_text(json.dumps(damaged))
    elif how == "bit":
        damage(newest, file)
    elif how == "short":
        (newest / file).write_bytes((newest / file).read_bytes()[:-7])
    else:
        (newest / file).unlink()
    assert newest_good(checkpoints) == older
    warning = capsys.readouterr().err
    assert "step-00000003" in warning and "set aside" in warning
    assert (checkpoints / "step-00000003.damaged").is_dir()  # kept for a person to look at
    assert newest_good(checkpoints) == older


def test_no_good_checkpoint_is_an_error_and_stays_one(three):
    """A run never starts over by accident, not even when it is called a second time."""
    _, _, checkpoints = three
    for path in listing(checkpoints):
        damage(path)
    for _ in range(2):
        with pytest.raises(DataError, match="--fresh"):
            newest_good(checkpoints)


def test_no_checkpoint_at_all_is_a_new_run(tmp_path):
    assert newest_good(tmp_path / "missing") is None
    assert newest_good(tmp_path) is None


def test_leftovers_of_a_killed_writer_are_ignored_and_cleared(three):
    train, state, checkpoints = three
    newest = listing(checkpoints)[-1]
    dead = 2**22 + 1  # beyond the largest process number
    half = checkpoints / f".step-00000004.{dead}.tmp"
    shutil.copytree(newest, half)
    damage(half)
    assert newest_good(checkpoints) == newest
    save(tiny.run(state, train, 4), checkpoints, {})
    assert [path.name for path in listing(checkpoints)] == ["step-00000003", "step-00000004"]
    assert not half.exists()


@pytest.mark.parametrize("name", ["step-5.damaged", "step-00000009.damaged", "step-5", "step-00000009.tmp", "notes"])
def test_a_folder_of_another_name_is_no_checkpoint(three, name):
    _, _, checkpoints = three
    older, newest = listing(checkpoints)
    shutil.copytree(older, checkpoints / name)
    (checkpoints / "step-00000008").write_text("a file, not a folder")
    assert listing(checkpoints) == [older, newest]
    assert newest_good(checkpoints) == newest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_a_value_that_is_not_finite_never_reaches_a_checkpoint(three, value, where):
    _, state, checkpoints = three
    before = listing(checkpoints)
    with torch.no_grad():
        if where == "weight":
            list(state.model.parameters())[-1].view(-1)[-1] = value
        else:
            list(state.optimizers[0].state.values())[-1]["exp_avg"].view(-1)[-1] = value
    state.step = 4
    with pytest.raises(NotFinite, match="not finite at step 4"):
        save(state, checkpoints, {})
    assert sorted(checkpoints.iterdir()) == before


def test_a_checkpoint_of_another_model_is_refused(three):
    train, _, checkpoints = three
    with pytest.raises(DataError, match="another model"):
        restore(tiny.state(train, num_hidden_layers=1), listing(checkpoints)[-1])


def test_a_checkpoint_of_another_width_is_refused(three):
    train, _, checkpoints = three
    with pytest.raises(DataError, match="another"):
        restore(tiny.state(train, hidden_size=64), listing(checkpoints)[-1])
