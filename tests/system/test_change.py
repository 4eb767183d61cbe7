"""Runs that a person changes: longer, decaying now, at another rate. Nothing jumps, everything is recorded."""

import json
from pathlib import Path

import pytest

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import folder
from gptworks.core.config import RunFile
from gptworks.core.errors import Preempted, RunMismatch, UsageError
from gptworks.training import loop
from gptworks.training.hooks import Checkpointer
from gptworks.training.schedule import RunSchedule

STEADY = {"train.precision": "fp32", "train.compile": False, "train.micro_batch": 4}


def rates(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["train/learning_rate"] for row in rows if "train/learning_rate" in row}
    assert list(found) == list(range(1, len(found) + 1)), "every step once"
    return list(found.values())


@pytest.fixture
def train(tiny_config, tmp_path, monkeypatch):
    """train(key=value, stop=N): trains tmp_path/run on, to the end or until a signal at step N."""
    usual = Checkpointer.__call__

    def do(stop: int | None = None, out: Path = tmp_path / "run", **settings):
        from gptworks.core.runtime import interrupts

        def hooked(self, state, metrics):
            if state.step == stop:
                interrupts.requested = "SIGTERM"
            return usual(self, state, metrics)

        monkeypatch.setattr(Checkpointer, "__call__", hooked)
        config = tiny_config(**STEADY, **settings)
        if stop is None:
            return lifecycle.train(config, out, "tiny")
        with pytest.raises(Preempted):
            lifecycle.train(config, out, "tiny")
        return None

    return do


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_a_finished_run_is_extended_without_a_jump_in_the_rate(train, tmp_path, schedule):
    first = train(**{"train.schedule": schedule})
    again = train(**{"train.schedule": schedule, "train.max_steps": 30})
    assert first["steps"] == 12 and again["steps"] == 30
    found, run = rates(tmp_path / "run"), tmp_path / "run"
    steepest = max(abs(a - b) for a, b in zip(found[:11], found[1:12], strict=True))
    assert abs(found[12] - found[11]) <= max(steepest, 0.5 * max(found)) and len(found) == 30
    file = RunFile.read(run / "config.yaml")
    assert [(c.step, c.length) for c in file.changes] == [(12, 30)]
    assert again["changes"] == ["train.max_steps=30, was 12"]
    assert train(**{"train.schedule": schedule, "train.max_steps": 30})["steps"] == 30  # finished, as it says
    assert lifecycle.verify(run)["identical"]


def evaluated(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "eval/loss" in row]


OPEN = {"train.eval_every": None, "train.checkpoint_every": None}


def test_what_followed_from_the_length_follows_from_the_new_one(train, tmp_path, monkeypatch):
    """A fault that was seen: a run of 10 steps made 300 was evaluated, and saved, at each of them."""
    train(**OPEN, **{"train.max_steps": 4})
    first, run = evaluated(tmp_path / "run"), tmp_path / "run"
    train(**OPEN, **{"train.max_steps": 40}, stop=13)
    result = train(**OPEN, **{"train.max_steps": 40})
    file = RunFile.read(run / "config.yaml")
    every = file.changes[0].values["train.eval_every"]
    assert file.chosen.train.eval_every < every and file.at(40).train.eval_every == every
    assert evaluated(run) == [*first, *range(every * (4 // every + 1), 40, every), 40] and len(evaluated(run)) < 12
    assert f"train.eval_every={every}, was {file.chosen.train.eval_every}" in result["changes"][0]
    assert file.chosen.train.checkpoint_every >= 4 and lifecycle.verify(run)["identical"]


def test_evaluations_may_be_asked_for_otherwise_with_a_change_or_on_the_way(train, tmp_path):
    train(stop=7)
    train(**{"train.eval_every": 2})
    train(**{"train.eval_every": 5, "train.max_steps": 21})
    assert evaluated(tmp_path / "run") == [6, 8, 10, 12, 15, 20, 21]
    assert lifecycle.verify(tmp_path / "run")["identical"]
    with pytest.raises(RunMismatch, match="train.eval_every=3: the run is finished at step 21"):
        train(**{"train.eval_every": 3, "train.max_steps": 21})


def test_a_run_of_padded_rows_has_about_the_tokens_that_were_asked_for_and_goes_on(train, tmp_path):
    """A fault that was seen: 52,000 tokens of 100,000, and 80,000 were refused as done."""
    (tmp_path / "padded.jsonl").write_text("".join(f'{{"text": "{"the king " * 3}{n}"}}\n' for n in range(400)))
    texts = {"data.train": str(tmp_path / "padded.jsonl"), "train.max_steps": None, "tokenizer.kind": "bytes",
             "train.context": 48}  # fmt: skip
    for tokens in (3000, 5000):
        result = train(**texts, **{"train.max_tokens": tokens})
        assert abs(result["tokens"] - tokens) < 256


def test_tokens_extend_a_run_that_steps_had_limited(train):
    train()
    result = train(**{"train.max_tokens": 256 * 20})
    assert result["steps"] == 20 and 256 * 19 < result["tokens"] <= 256 * 20


def test_an_extension_that_is_killed_goes_on_under_the_same_command_and_equals_one_that_was_not(train, tmp_path):
    longer = {"train.max_steps": 24}
    for out in (tmp_path / "straight", tmp_path / "run"):
        train(out=out)
    train(out=tmp_path / "straight", **longer)
    train(stop=15, **longer)
    assert not (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "model").is_dir()
    train(**longer)
    states = [tmp_path / name / "checkpoints" / "step-00000024" for name in ("run", "straight")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert folder.sha256(states[0] / file) == folder.sha256(states[1] / file)
    assert rates(tmp_path / "run") == rates(tmp_path / "straight")


def test_decay_now_falls_to_the_floor_from_the_step_it_stands_at(train, tmp_path):
    long = {"train.max_steps": 60, "train.checkpoint_every": 10, "train.warmup": 0}
    train(stop=8, **long)
    result = train(**long, **{"train.decay_now": True})
    found = rates(tmp_path / "run")
    assert result["steps"] == len(found) == 16  # as many again: train.cooldown is a half
    assert found[:9] == [found[0]] * 9 and found[8:] == sorted(found[8:], reverse=True) and found[-1] < 0.1 * found[0]
    assert lifecycle.verify(tmp_path / "run")["identical"]


def test_a_rate_changed_on_purpose_holds_from_that_step_and_is_recorded(train, tmp_path):
    flat = {"train.schedule": "constant", "train.warmup": 0}
    train(stop=6, **flat, **{"train.lr": 0.02, "train.adam_lr": 0.01})
    result = train(**flat, **{"train.lr": 0.005, "train.adam_lr": 0.01})
    assert rates(tmp_path / "run") == [0.02] * 6 + [0.005] * 6
    assert result["changes"] == ["train.lr=0.005, was 0.02"]
    file = RunFile.read(tmp_path / "run" / "config.yaml")
    assert file.chosen.train.lr == 0.02 and file.changes[0].lr == 0.005
    assert lifecycle.verify(tmp_path / "run")["identical"]  # from 8 to 12


def test_a_rate_may_be_planned_to_change(train, tmp_path):
    planned = {
        "train.schedule": "constant",
        "train.warmup": 0,
        "train.lr": 0.02,
        "train.changes": [{"step": 4, "lr": 0.01}],
    }
    train(stop=3, **planned)
    train(**planned)
    assert rates(tmp_path / "run") == [0.02] * 4 + [0.01] * 8


def test_patience_may_be_raised_after_it_has_ended_a_run(train):
    still = {"train.lr": 0, "train.adam_lr": 0, "train.eval_every": 2}
    assert train(**still, **{"train.patience": 1})["steps"] == 4
    assert train(**still, **{"train.patience": 3})["steps"] == 8


def test_a_patience_asked_for_on_the_way_outlives_the_next_stop(train, tmp_path):
    still = {"train.lr": 0, "train.adam_lr": 0, "train.eval_every": 2}
    train(stop=3, **still)
    train(stop=5, **still, **{"train.patience": 3})
    assert train(**still, **{"train.patience": 3})["steps"] == 8  # best at 2, then 4, 6, 8
    assert lifecycle.verify(tmp_path / "run")["identical"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train.max_steps": 5}, "already done 12 steps"),
        ({"train.max_tokens": 1000}, "already done 12 steps"),
        ({"train.decay_now": True}, "stands at step 12 of 12"),
        ({"train.seed": 2}, r"train\.seed=1, now train\.seed=2"),
        ({"train.max_steps": None}, "cannot be left open"),
    ],
)
def test_what_can_no_longer_be_had_is_refused_and_loses_nothing(train, tmp_path, settings, message):
    train()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunMismatch, match=message) as refused:
        train(**settings)
    assert refused.value.code == 78
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_all_keys_that_keep_a_run_from_going_on_are_named(train):
    train()
    says = (
        r"train\.seed=1, now train\.seed=2; train\.weight_decay=None, now train\.weight_decay=0\.3; use the old values"
    )
    with pytest.raises(RunMismatch, match=says):
        train(**{"train.seed": 2, "train.weight_decay": 0.3})


def test_a_finished_run_gives_its_result_again_and_says_how_it_goes_on(train, tmp_path, capsys):
    first = train()
    capsys.readouterr()
    assert train() == first
    said = capsys.readouterr().err
    assert f"trained  12 steps: eval loss {first['eval']['loss']:.4g}" in said and f"{tmp_path}/run/model" in said
    assert "train.max_steps=24` makes it longer, and the command that began it starts over with --fresh" in said
    assert train(**{"train.max_steps": 24})["steps"] == 24


def test_the_course_written_down_is_the_course_that_was_run(train, tmp_path):
    train()
    train(**{"train.max_steps": 20})
    file = RunFile.read(tmp_path / "run" / "config.yaml")
    course, peak = RunSchedule(file.chosen.train, file.changes), file.chosen.train.lr
    assert rates(tmp_path / "run") == pytest.approx([peak * course.factor(step) for step in range(20)])


def test_another_rate_alone_is_nothing_to_a_finished_run(train):
    train()
    with pytest.raises(RunMismatch, match="train.lr=0.5: the run is finished at step 12"):
        train(**{"train.lr": 0.5})
    assert train(**{"train.lr": 0.5, "train.max_steps": 14})["steps"] == 14


def test_without_patience_a_run_gives_its_last_weights_again(train, tmp_path):
    """And not those that were the best when it had patience."""
    patient = train(**{"train.patience": 5})
    assert patient["weights"] == "of the best evaluation"
    again = train(**{"train.max_steps": 24})
    assert again["weights"] == "last" and again["eval"]["loss"] < patient["eval"]["loss"]
    assert lifecycle.verify(tmp_path / "run")["identical"]


def test_what_would_end_a_run_now_does_not_end_its_replay_nor_differ_from_it(train, tmp_path, monkeypatch):
    """The replay from 8 to 12 was run without patience and with a target that was far."""
    steady = {"train.max_steps": 20, "train.eval_every": 2}
    train(stop=12, **steady, **{"train.target_loss": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**steady, **{"train.target_loss": 5.0, "train.patience": 9})
    found = lifecycle.verify(tmp_path / "run")
    assert (found["from_step"], found["to_step"], found["identical"]) == (8, 12, True)


def test_a_run_of_ones_own_text_is_sampled_with_its_own_lines(tmp_path, capsys):
    """Faults that were seen: ROMEO: under novels, and a run that ended since a text of Chinese has no colon."""
    (tmp_path / "zh.txt").write_text("天地玄黄宇宙洪荒日月盈昃辰宿列张\n" * 300)
    asked = {"data.train": str(tmp_path / "zh.txt"), "train.max_steps": 2, "generate.max_new_tokens": 4,
             "stages": ["train", "generate"], "model.hidden_size": 32, "train.tensorboard": False}  # fmt: skip
    result = lifecycle.run(configuration.load("shakespeare_char", asked), tmp_path / "run", "shakespeare_char")
    assert [sample["prompt"] for sample in result["generation"]] == ["天地玄黄宇宙洪荒"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sample"].startswith("天地玄黄宇宙洪荒") for row in rows if "sample" in row)
    line = "chosen   generate.prompts=['天地玄黄宇宙洪荒']: beginnings of held-out lines"
    assert capsys.readouterr().err.count(line) == 1
    assert (
        "prompts: [天地玄黄宇宙洪荒]  # beginnings of held-out lines" in (tmp_path / "run" / "config.yaml").read_text()
    )
    again = lifecycle.run(configuration.load("shakespeare_char", asked), tmp_path / "run", "shakespeare_char")
    assert [sample["prompt"] for sample in again["generation"]] == ["天地玄黄宇宙洪荒"]
    with pytest.raises(UsageError, match="generate.prompts: .RO.: .*generate.prompts=null takes some from the text"):
        lifecycle.train(
            configuration.load("shakespeare_char", {**asked, "generate.prompts": ["RO"]}), tmp_path / "other"
        )
