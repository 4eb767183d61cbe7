"""A run from its folder: what is checked before and beside its first steps."""

import json
import threading

import pytest

from gptworks import lifecycle
from gptworks.core import config, folder
from gptworks.core.config import RunFile
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.training import session
from gptworks.training.metrics import Account
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
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(RunFile, "write", lambda self: full())
        lifecycle.train(tiny_config(), out)
    assert (out / "choices.json").is_file() and not (out / "config.yaml").exists() and RunFile.write is write
    assert lifecycle.train(tiny_config(), out)["steps"] == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "choices.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=r"choices\.json: is of no run"):
        lifecycle.train(tiny_config(), tmp_path / "other")


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("patience", [None, 1])
def test_a_run_that_starts_from_a_model_is_measured_before_its_first_step(
    patience, finished_run, tiny_text, tmp_path, monkeypatch, capsys
):
    """The figure is that of the model itself. At a rate that ruins it no later one is better, and yet the first of the
    run's own is the best that it has."""
    model, out = finished_run / "model", tmp_path / "run"
    settings = {
        "data.train": str(tiny_text), "model.path": str(model), "train.context": 32, "train.batch_tokens": 256,
        "train.max_steps": 4, "train.eval_every": 2, "train.patience": patience, "train.lr": 0.5, "train.adam_lr": 0.5,
        "train.precision": "fp32", "train.threads": 1, "train.tensorboard": False, "generate.max_new_tokens": 4,
    }  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(StorageError):  # stopped before anything was saved
        patch.setattr(session.loop, "run", lambda *arguments, **options: full())
        lifecycle.train(config.load(None, settings), out)
    result = lifecycle.train(config.load(None, settings), out)
    evaluations = {row["step"]: row["eval/loss"] for row in rows_of(out) if "eval/loss" in row}
    assert sum(row["step"] == 0 for row in rows_of(out)) == 1
    itself = lifecycle.evaluate(model, str(out / "data" / "validation.jsonl"), context=32)
    assert evaluations[0] == pytest.approx(itself.loss, rel=1e-6)
    assert evaluations[0] < evaluations[2] and len(evaluations) == 3
    assert result.eval["loss"] == (evaluations[4] if patience is None else min(evaluations[2], evaluations[4]))
    assert result.steps == 4  # patience counts from the first of its own
    assert "the model is worse than the one it began with, loss" in capsys.readouterr().err


def full():
    raise StorageError("the disk is full")


def test_a_run_leaves_what_its_report_shows(finished_run):
    passage = json.loads((finished_run / "passage.json").read_text())
    losses = [loss for _, own in passage["pieces"] for loss in own]
    assert passage["step"] == 12 and passage["tokens"] == len(losses) > 100
    assert passage["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    account = json.loads((finished_run / "run.json").read_text())
    result = json.loads((finished_run / "result.json").read_text())
    assert account["recipe"] == "tiny" and set(account["seconds"]) == {
        "preparing", "training", "evaluating", "sampling", "saving",
    }  # fmt: skip
    assert account["seconds"]["training"] == pytest.approx(result["train_seconds"], abs=0.01)


def test_the_time_of_a_run_is_counted_over_its_processes_and_a_damaged_account_begins_anew(tmp_path):
    first = Account(tmp_path, "laptop")
    first.add("training", 2.0)
    first.write()
    second = Account(tmp_path)
    second.add("training", 1.5)
    with second.spent("saving"):
        pass
    assert second.recipe == "laptop" and second.seconds["training"] == 3.5 and second.seconds["saving"] < 0.5
    assert second.timed("sampling", lambda value: value + 1)(1) == 2 and "sampling" in second.seconds
    for damaged in ("{", "[1]", '{"seconds": 3, "recipe": null}', '{"seconds": {"training": "x"}}'):
        first.path.write_text(damaged)
        again = Account(tmp_path)
        again.add("training", 1.0)
        assert again.seconds == {"training": 1.0} and again.recipe == ""


@pytest.mark.parametrize(("every", "steps"), [(5, [1, 5, 10, 12]), (None, list(range(1, 13)))])
def test_the_first_and_the_last_step_are_logged_whatever_the_interval(every, steps, tiny_config, tmp_path):
    settings = {"train.log_every": every, "train.eval_every": 12, "generate.prompts": []}
    lifecycle.train(tiny_config(**settings), tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run") if "train/loss" in row] == steps
