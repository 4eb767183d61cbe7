"""A run from its folder: what is checked before and beside its first steps."""

import json
import threading

import pytest

from gptworks import lifecycle
from gptworks.core import folder
from gptworks.core.config import RunFile
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.training.state import listing


def flip(file, place=-3):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_large_shards_are_hashed_beside_the_first_steps_and_no_checkpoint_is_kept_before(
    tiny_config, tmp_path, monkeypatch, capsys
):
    """A start with shards that exist; the hash of one ends only when half of the steps until a checkpoint are done."""
    from gptworks.training import hooks

    shards = {"data.shards": str(tmp_path / "shards"), "train.checkpoint_every": 6}
    alone = lifecycle.train(tiny_config(**shards), tmp_path / "alone")
    monkeypatch.setattr(folder, "HASHED_AT_ONCE", 0)
    ended, sha256 = threading.Event(), folder.sha256
    beside = threading.current_thread()
    monkeypatch.setattr(
        folder, "sha256", lambda file: (threading.current_thread() is beside or ended.wait(60)) and sha256(file)
    )
    steps, step = [], hooks.Checkpointer.__call__

    def watched(self, state, m):
        steps.append((state.step, self.verifying.ended))
        if state.step == 6:
            assert not listing(tmp_path / "run" / "checkpoints") and not ended.is_set()
            ended.set()
        step(self, state, m)

    monkeypatch.setattr(hooks.Checkpointer, "__call__", watched)
    other = lifecycle.train(tiny_config(**shards), tmp_path / "run")
    assert [step for step, done in steps if not done] == [1, 2, 3, 4, 5, 6]
    assert other["eval"] == alone["eval"] and len(listing(tmp_path / "run" / "checkpoints")) == 2


def test_large_shards_that_are_damaged_end_the_run_and_are_made_anew_by_the_next(tiny_config, tmp_path, monkeypatch):
    config = {"train.checkpoint_every": 6}
    alone = lifecycle.train(tiny_config(**config), tmp_path / "alone")
    lifecycle.train(tiny_config(**config), tmp_path / "run")
    out = tmp_path / "run"
    folder.shutil.rmtree(listing(out / "checkpoints")[-1])
    for name in ("result.json", "model"):
        (folder.shutil.rmtree if (out / name).is_dir() else type(out).unlink)(out / name)
    flip(out / "data" / "train.tokens")
    monkeypatch.setattr(folder, "HASHED_AT_ONCE", 0)
    with pytest.raises(DataError, match=r"train\.tokens: its SHA-256 differs.*run the same command"):
        lifecycle.train(tiny_config(**config), out)
    assert [path.name for path in listing(out / "checkpoints")] == ["step-00000006"]
    again = lifecycle.train(tiny_config(**config), out)
    assert again["eval"] == alone["eval"] and json.loads((out / "result.json").read_text())["steps"] == alone["steps"]
    assert lifecycle.verify(out)["identical"]


def test_a_start_that_stopped_before_config_yaml_was_there_is_begun_again(tiny_config, tmp_path, monkeypatch):
    out, write = tmp_path / "run", RunFile.write

    def full(self):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(RunFile, "write", full)
        lifecycle.train(tiny_config(), out)
    assert (out / "choices.json").is_file() and not (out / "config.yaml").exists() and RunFile.write is write
    assert lifecycle.train(tiny_config(), out)["steps"] == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "choices.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=r"choices\.json: is of no run"):
        lifecycle.train(tiny_config(), tmp_path / "other")
