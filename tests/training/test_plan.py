"""A plan says what the run then does."""

import json
import math
import shlex
from dataclasses import replace

import pytest
import tiny

from gptworks import cli, lifecycle
from gptworks.core import config as configuration
from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError, UsageError
from gptworks.data.glance import glance
from gptworks.planning.machine import here
from gptworks.training.plan import PROCESS_BYTES, _notes, outlook, plan

SMALL = {
    "tokenizer.vocab_size": 300, "model.parameters": 60_000, "train.context": 32, "train.threads": 1,
    "train.max_epochs": 1, "train.time_budget_s": None, "train.precision": "fp32",
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(tiny.text(6 * 8000))
    return str(path)


def test_three_sizes_with_the_commands_that_start_them(text):
    planned = plan("mine", {**SMALL, "data.train": text})
    smaller, chosen, larger = planned.sizes
    assert smaller.parameters < chosen.parameters < larger.parameters
    for size in planned.sizes:
        assert size.tokens == size.steps * size.batch_tokens
        assert size.passes == pytest.approx(size.tokens / planned.tokens)
        assert size.tokens_per_parameter == pytest.approx(size.tokens / size.parameters)
        assert size.seconds > 0 and size.memory_bytes > 1e6 and 0 < size.bits_per_byte < 8
    assert "model.parameters=60000" in chosen.command and f"data.train={text}" in chosen.command
    assert larger.command.startswith("gptworks run mine ") and "model.parameters=60000" not in larger.command


def test_the_run_has_the_steps_batch_and_shape_of_its_plan(text, tmp_path):
    chosen = plan("mine", {**SMALL, "data.train": text}).sizes[1]
    config = configuration.load("mine", {**SMALL, "data.train": text})
    lifecycle.train(config, tmp_path / "run")
    run = configuration.RunFile.read(tmp_path / "run" / "config.yaml").chosen
    assert (run.model.hidden_size, run.model.num_hidden_layers) == (chosen.width, chosen.layers)
    assert run.train.batch_tokens == chosen.batch_tokens
    assert run.train.max_steps == pytest.approx(chosen.steps, rel=0.05)


def test_a_time_is_planned_into_tokens_and_a_longer_one_into_more(text):
    found = [
        plan("mine", {**SMALL, "data.train": text, "train.max_epochs": 1000, "train.time_budget_s": seconds}).sizes[1]
        for seconds in (20, 80)
    ]
    assert found[0].tokens < found[1].tokens
    assert all(size.seconds <= budget for size, budget in zip(found, (20, 80), strict=True))


def test_another_machine_is_described_with_the_share_of_its_rate(text, tmp_path):
    fast = replace(tiny.MACHINE, name="a fast one", matmul={"fp32": 1e15, "bf16": 1e15}, processes=8, per_machine=8)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(fast.as_dict()))
    planned = lifecycle.plan("mine", {**SMALL, "data.train": text}, path)
    assert "8 times a fast one" in planned.there and "%" in planned.there
    for size in planned.sizes:
        assert 0 < size.seconds_there < size.seconds


def test_a_command_names_its_keys_however_they_were_given(text):
    sections = {name.partition(".")[0]: {} for name in SMALL} | {"data": {"train": text}}
    for name, value in SMALL.items():
        sections[name.partition(".")[0]][name.partition(".")[2]] = value
    planned = plan("mine", sections)
    for size, same in zip(planned.sizes, plan("mine", {"data.train": text, **SMALL}).sizes, strict=True):
        assert sorted(shlex.split(size.command)) == sorted(shlex.split(same.command))
    told = repr(planned)
    assert told.count("PlannedSize(") == len(planned.sizes) and "command" not in told


def test_a_micro_batch_larger_than_a_step_takes_the_memory_of_the_step(text):
    sizes = [
        outlook(configuration.load("mine", {**SMALL, "data.train": text, "train.micro_batch": rows}), here("fp32", 1))[
            1
        ]
        for rows in (None, 10**5)
    ]
    assert sizes[1].memory_bytes < 1.5 * sizes[0].memory_bytes


def test_notes_tell_what_the_figures_are_worth(text):
    assert plan("mine", {**SMALL, "data.train": text}).notes[0] == (
        "bits/byte are little more than a guess for a text below 100 kB"
    )
    sizes = plan("laptop", {**SMALL, "model.parameters": 10**6}).sizes
    worse = [replace(each, bits_per_byte=bits) for each, bits in zip(sizes, (2.0, 2.0, 1.5), strict=True)]
    short, long = glance(Data(train="shakespeare"), TokenizerConfig(kind="bytes")), None
    long = replace(short, train_bytes=10**9)
    assert "more parameters than the text has bytes" in _notes(short, "bpe", worse)[0]
    assert "larger is likely to do better" in _notes(long, "bpe", worse)[0]
    assert _notes(long, "bpe", sizes[:2]) == [] and "a quarter off" in _notes(long, "char", sizes[:2])[0]


def test_a_scan_is_no_training_to_plan(text):
    with pytest.raises(UsageError, match=r"leave train\.find_lr out"):
        plan("mine", {**SMALL, "data.train": text, "train.find_lr": True})


def test_an_outlook_tries_no_step(text, monkeypatch):
    monkeypatch.setattr("gptworks.training.plan.timings", None)
    choices, expected = outlook(configuration.load("mine", {**SMALL, "data.train": text}), here("fp32", 1))
    assert expected.steps > 1 and expected.seconds > 0 and expected.command == ""
    assert not choices.open and choices.config.train.max_steps == expected.steps and choices.config.train.lr > 0


def test_what_cannot_be_planned_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match=r"add data\.train=FILE"):
        plan("mine", [])
    with pytest.raises(DataError, match="no such file"):
        plan("mine", ["data.train=nowhere.txt"])
    with pytest.raises(UsageError, match="one that is there has its size"):
        plan("mine", [f"data.train={text}", f"model.path={tmp_path}"])


def test_the_command_prints_a_row_for_each_size_and_json_has_the_same(text, capsys, monkeypatch):
    settings = [f"{key}={'null' if value is None else value}" for key, value in SMALL.items()]
    monkeypatch.setattr("sys.argv", ["gptworks", "plan", f"data.train={text}", *settings])
    cli.main()
    printed = capsys.readouterr().out
    for word in ("smaller", "chosen", "larger", "a parameter", "bits/byte", "gptworks run mine"):
        assert word in printed
    assert max(map(len, printed.splitlines()[:8])) <= 100


def test_a_mixture_is_planned_as_its_text(text, tmp_path):
    row = tiny.text(60).replace("\n", " ").replace(",", "")
    (tmp_path / "rows.csv").write_text("text\n" + f"{row}\n" * 40)
    mixed = [{"path": text, "weight": 0.7}, {"path": str(tmp_path / "rows.csv"), "weight": 0.3}]
    assert plan("mine", {**SMALL, "data.train": mixed}).sizes[0].tokens > 0


def test_a_size_that_does_not_fit_is_named_and_the_others_are_planned(text, monkeypatch):
    real, settings = here("fp32", 1), {**SMALL, "data.train": text, "model.parameters": 100_000}
    _, fits, too_large = (size.memory_bytes - PROCESS_BYTES["cpu"] for size in plan("mine", settings).sizes)
    small = replace(real, memory=int((fits + too_large) / 2 / 0.9))
    monkeypatch.setattr("gptworks.training.plan.here", lambda *asked: small)
    planned = plan("mine", {**settings, "train.micro_batch": 8})
    assert [size.name for size in planned.sizes][:2] == ["smaller", "chosen"]
    assert any(line.startswith("larger ") for line in planned.left_out)


def test_a_size_is_not_planned_twice(text):
    settings = {**SMALL, "data.train": text, "tokenizer.vocab_size": 2000}
    settings.pop("model.parameters")
    sizes = [size.parameters for size in plan("mine", settings).sizes]
    assert sizes == sorted(set(sizes))


def test_no_forecast_is_above_an_untrained_model(text):
    planned = plan("mine", {**SMALL, "data.train": text, "train.max_epochs": None, "train.max_steps": 1})
    for size in planned.sizes:
        assert size.bits_per_byte <= math.log2(planned.vocab_size) / planned.bytes_per_token + 1e-9
