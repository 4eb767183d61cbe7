"""The command line: a clear line and the right exit code for every mistake, and nothing half-written."""

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptworks import cli as cli_module
from gptworks.core import folder, runtime
from gptworks.core.log import console


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs a command in this process, in an empty directory."""
    from gptworks.cli import main

    empty = tmp_path / "cwd"
    empty.mkdir()
    (tmp_path / "r.yaml").write_text("model: {family: llama, hidden_size: 32, num_hidden_layers: 1}")
    monkeypatch.chdir(empty)

    def call(*arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gptworks", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return call


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """One line on standard error that holds `words`, nothing on standard output; being told to stop is no error."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    errors = [line for line in outcome.err.splitlines() if line.startswith("stopped " if code == 75 else "error: ")]
    assert len(errors) == 1 and outcome.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "laptp"], ["unknown recipe 'laptp'", "'laptop'"]),
        (["train", "nothere.yaml"], ["nothere.yaml"]),
        (["train", "laptop", "train.max_stesp=5"], ["train.max_steps"]),
        (["train", "laptop", "train.lr=fast"], ["train.lr='fast'"]),
        (["train", "laptop", "train.lr=nan"], ["train.lr"]),
        (["train", "laptop", "model.hidden_size=-3"], ["model.hidden_size"]),
        (["train", "laptop", "train.threads=5000", "--dry-run"], ["train.threads", "at most 1,024"]),
        (["train", "laptop", "model.hidden_size=97"], ["model.hidden_size=97", "multiple of 32"]),
        (["train", "laptop", "nonsense"], ["key=value"]),
        (["train"], ["recipe"]),
        (["trian", "laptop"], ["trian"]),
        (["train", "laptop", "--nope"], ["--nope"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["generate", "x"], ["--prompt"]),
        (["train", "laptop", "train.optimizer=adem", "--dry-run"], ["'adem'", "adam"]),
        (["train", "laptop", "train.schedule=wds", "--dry-run"], ["'wds'", "wsd"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_wrong_usage_is_64(cli: Callable[..., Outcome], arguments: list[str], words: list[str]) -> None:
    refused(cli(*arguments), 64, *words)
    assert os.listdir() == []


def test_width_not_divisible_by_heads_is_64(cli: Callable[..., Outcome], tiny_overrides: list[str]) -> None:
    refused(cli("train", "../r.yaml", *tiny_overrides, "model.num_attention_heads=3", "--out", "run"), 64, "32")


@pytest.mark.parametrize("content, word", [(None, "no such file"), (b"", "no text"), (b"\0\1\2", "binary")])
def test_bad_training_text_is_65_and_makes_no_shards(
    cli: Callable[..., Outcome], tmp_path: Path, content: bytes | None, word: str
) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    refused(cli("train", "../r.yaml", f"data.train={path}", "--out", "run"), 65, "a.txt", word)
    assert not Path("run/data").exists() and not Path("run/config.yaml").exists()


def test_broken_row_is_65_with_file_and_line(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    refused(cli("train", "../r.yaml", f"data.train={tmp_path / 'a.jsonl'}", "--out", "run"), 65, "a.jsonl:2")


def test_out_that_cannot_be_written_is_74(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(cli("train", "../r.yaml", "--out", tmp_path / "file" / "run"), 74, "file")


# -- reading models ----------------------------------------------------------------------------------------------


@pytest.fixture
def model(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished model, to damage, without the manifest that would notice first."""
    shutil.copytree(finished_run / "model", tmp_path / "model")
    for name in ("gptworks.json", "manifest.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    return tmp_path / "model"


def saved(path: Path, context: int = 256) -> Path:
    """A model folder without a chat template, with room for a conversation."""
    import tiny

    from gptworks.data.tokenizer import Tokenizer
    from gptworks.model import build

    tokenizer = Tokenizer.train_bpe([tiny.text(3000)], 300, "qwen2")
    build.save(path, tiny.model(vocab_size=len(tokenizer), context=context), tokenizer, {})
    return path


def generate(cli: Callable[..., Outcome], folder: Path, *more: Any) -> Outcome:
    return cli("generate", folder, "--prompt", "the king", "--max-new-tokens", 4, *more)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_model_folder_is_65(cli: Callable[..., Outcome]) -> None:
    refused(generate(cli, Path("nothere")), 65, "nothere", "no such model folder")


def test_a_pickle_is_refused(cli: Callable[..., Outcome], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(generate(cli, model), 65, "pytorch_model.bin", "pickle")


def test_a_model_with_its_own_code_is_refused(cli: Callable[..., Outcome], model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="its_own")
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    refused(generate(cli, model), 65, "auto_map")


def test_a_token_beyond_the_models_rows_is_refused_where_it_is_met(
    cli: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    """Folders are published with such: Gemma 3's, Llama 2's."""
    before = generate(cli, model, "--temperature", 0)
    state = json.loads((model / "tokenizer.json").read_text())
    added = {**state["added_tokens"][0], "content": "<image>", "id": 300, "special": False}
    state["added_tokens"].append(added)
    (model / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "plain.txt").write_text("the king " * 50)
    (tmp_path / "met.txt").write_text("the king <image> " * 50)
    assert before.code == 0 and generate(cli, model, "--temperature", 0).out == before.out
    assert cli("evaluate", model, "--data", tmp_path / "plain.txt").code == 0
    says = "token id 300 ('<image>') is beyond the model's vocabulary of 300"
    refused(cli("evaluate", model, "--data", tmp_path / "met.txt"), 65, "met.txt", says)
    refused(cli("generate", model, "--prompt", "an <image>"), 65, "the prompt", says)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 100, None], ids=range(5))
def test_a_damaged_model_folder_is_65(
    cli: Callable[..., Outcome], model: Path, name: str, content: bytes | None
) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    refused(generate(cli, model), 65, str(model))


def test_a_flipped_bit_in_our_own_model_folder_is_65(cli: Callable[..., Outcome], tiny_run: Path) -> None:
    weights = tiny_run / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    refused(generate(cli, tiny_run / "model"), 65, "model.safetensors", "SHA-256")


@pytest.mark.parametrize("content", [b"", b"\n\0"])
def test_evaluating_an_empty_or_binary_file_is_65(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    refused(cli("evaluate", finished_run / "model", "--data", tmp_path / "a.txt"), 65, "a.txt")


@pytest.mark.parametrize("more", [["--context", "0"], ["--context", "100000"], ["--stride", "0"], ["--batch", "0"]])
def test_impossible_evaluation_options_are_64(
    cli: Callable[..., Outcome], finished_run: Path, tiny_text: Path, more: list[str]
) -> None:
    refused(cli("evaluate", finished_run / "model", "--data", tiny_text, *more), 64, more[0])


def test_what_to_compare_with_is_checked_before_anything_is_scored(
    cli: Callable[..., Outcome], finished_run: Path, tiny_text: Path, tmp_path: Path
) -> None:
    folder = finished_run / "model"
    refused(cli("evaluate", folder, "--data", tiny_text, "--against", "nothere"), 65, "nothere", "no such model folder")
    small = saved(tmp_path / "small", context=16)
    refused(cli("evaluate", folder, "--data", tiny_text, "--against", small, "--context", 32), 64, "--context", "small")
    refused(cli("evaluate", folder, "--data", tiny_text, "--against", small, "--stride", 32), 64, "--stride", "small")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temperature", "-1"], ["temperature"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--prompt", "x"], ["--prompt"]),
    ],
)
def test_impossible_chat_options_are_64(
    cli: Callable[..., Outcome], finished_run: Path, arguments: list[str], words: list[str]
) -> None:
    refused(cli("chat", finished_run / "model", *arguments), 64, *words)


def test_a_chat_template_that_cannot_be_used_is_65(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(cli("chat", "nothere"), 65, "nothere", "no such model folder")
    folder = saved(tmp_path / "model")
    for template, word in (("{% if", "TemplateSyntaxError"), ("{{ raise_exception('never') }}", "never")):
        (folder / "chat_template.jinja").write_text(template)
        refused(cli("chat", folder), 65, "chat_template.jinja", word)


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_second_trainer_on_the_same_run_is_78(cli: Callable[..., Outcome], tiny_overrides: list[str]) -> None:
    with runtime.hold(Path("run")):
        refused(cli("train", "../r.yaml", *tiny_overrides, "--out", "run"), 78, "another process")
    assert sorted(os.listdir("run")) == [".lock"]


def test_a_changed_key_on_an_old_run_is_78_with_both_values(
    cli: Callable[..., Outcome], tiny_run: Path, tiny_overrides: list[str]
) -> None:
    before = (tiny_run / "config.yaml").read_bytes()
    outcome = cli("train", "../r.yaml", *tiny_overrides, "model.dropout=0.2", "--out", tiny_run)
    refused(outcome, 78, "model.dropout=0.1", "model.dropout=0.2")
    assert (tiny_run / "config.yaml").read_bytes() == before
    outcome = cli("train", "../r.yaml", *tiny_overrides, "train.log_every=7", "--json", "--out", tiny_run)
    assert outcome.code == 0 and json.loads(outcome.out)["steps"] == 12  # finished; a free key may differ


def test_fresh_sets_the_old_run_aside(
    cli: Callable[..., Outcome], tiny_run: Path, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    old = (tiny_run / "result.json").read_bytes()
    outcome = cli("train", "../r.yaml", *tiny_overrides, "train.max_steps=2", "--fresh", "--json", "--out", tiny_run)
    assert outcome.code == 0 and json.loads(outcome.out)["steps"] == 2
    assert (tiny_run.with_name("run.1") / "result.json").read_bytes() == old


def test_dry_run_writes_nothing_and_prints_the_configuration(
    cli: Callable[..., Outcome], tiny_overrides: list[str]
) -> None:
    import yaml

    outcome = cli("train", "../r.yaml", *tiny_overrides, "--dry-run")
    assert outcome.code == 0 and yaml.safe_load(outcome.out)["model"]["hidden_size"] == 32
    outcome = cli("run", "laptop", "--dry-run", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["tokenizer"]["vocab_size"] == 1024
    assert os.listdir() == []


@pytest.mark.parametrize("kind", ["bytes", "char"])
def test_a_dry_run_decides_what_a_look_at_the_text_tells(cli: Callable[..., Outcome], kind: str) -> None:
    outcome = cli("train", "laptop", f"tokenizer.kind={kind}", "--dry-run", "--json")
    decided = json.loads(outcome.out)
    assert outcome.code == 0 and decided["model"]["hidden_size"] and decided["train"]["max_steps"]


@pytest.mark.parametrize(("kind", "known"), [("bytes", True), ("char", False)])
def test_a_dry_run_without_a_text_leaves_a_shape_open_that_follows_from_it(
    cli: Callable[..., Outcome], kind: str, known: bool
) -> None:
    outcome = cli("train", "mine", "model.parameters=1M", f"tokenizer.kind={kind}", "--dry-run", "--json")
    assert outcome.code == 0 and (json.loads(outcome.out)["model"]["hidden_size"] is not None) == known


# -- continue, again, compare, keys -------------------------------------------------------------------------------


def test_continue_needs_nothing_but_the_folder(
    cli: Callable[..., Outcome], tiny_run: Path, finished_run: Path, tiny_overrides: list[str]
) -> None:
    """A finished run made longer, then one that was interrupted: as with the whole command."""
    longer = ["train.max_steps=14", "stages=train"]
    result = one_object(cli("continue", tiny_run, *longer, "--json"))
    assert (result["steps"], result["recipe"]) == (14, "tiny") and result["changes"] == ["train.max_steps=14, was 12"]
    (tiny_run / "result.json").unlink()
    shutil.rmtree(tiny_run / "checkpoints" / "step-00000014")
    again = one_object(cli("continue", tiny_run, "--json"))
    assert again["steps"] == 14 and again["eval"] == result["eval"]
    shutil.copytree(finished_run, "other")
    command = ["train", "../r.yaml", *tiny_overrides, *longer, "--out", "other", "--json"]
    assert one_object(cli(*command))["eval"] == result["eval"]


def test_continue_of_what_is_no_run_or_cannot_be_had_is_one_line(cli: Callable[..., Outcome], tiny_run: Path) -> None:
    refused(cli("continue", "nowhere"), 65, "nowhere: no run to continue")
    refused(cli("continue", tiny_run, "train.max_stesp=3"), 64, "did you mean train.max_steps")
    refused(cli("continue", tiny_run, "train.seed=3"), 78, "train.seed=1, now train.seed=3")
    refused(cli("train", tiny_run), 64, f"gptworks continue {tiny_run}", "config.yaml is a recipe")


def test_a_finished_run_says_how_it_is_made_longer(cli: Callable[..., Outcome], tiny_run: Path) -> None:
    assert f"gptworks continue {tiny_run} train.max_steps=" in cli("continue", tiny_run, "stages=train").err


def test_a_runs_file_as_a_recipe_trains_the_same_model_in_a_folder_of_its_own(
    cli: Callable[..., Outcome], finished_run: Path
) -> None:
    outcome = cli("train", finished_run / "config.yaml", "--json")
    assert one_object(outcome)["steps"] == 12 and os.listdir("runs") == ["tiny-again"]
    weights = "model/model.safetensors"
    assert Path("runs/tiny-again", weights).read_bytes() == (finished_run / weights).read_bytes()
    assert "chosen anew for this machine: train.workers, micro_batch, compile" in outcome.err


def test_runs_are_compared_in_a_table_and_as_json(
    cli: Callable[..., Outcome], finished_run: Path, tiny_run: Path
) -> None:
    file = tiny_run / "config.yaml"
    file.write_text(file.read_text().replace("log_every: 1", "log_every: 7"))
    head, first, second, _, *differing = cli("compare", finished_run, tiny_run).out.splitlines()
    loss = json.loads((finished_run / "result.json").read_text())["eval"]["loss"]
    assert head.split() == ["run", "recipe", "steps", "parameters", "tokens", "seconds", "nats/token", "bits/byte"]
    assert first.split()[:3] == ["tiny", "tiny", "12"] and second.split()[-2] == f"{loss:.4f}"
    assert [line.split() for line in differing] == [["differs", "in", "tiny", "run"], ["train.log_every", "1", "7"]]
    found = one_object(cli("compare", finished_run, tiny_run, "--json"))
    assert found["differences"] == {"train.log_every": [1, 7]} and found["runs"][0]["loss"] == loss
    assert cli("compare", finished_run, finished_run).out.endswith("no setting differs\n")
    refused(cli("compare", finished_run), 64, "two runs")


def test_all_keys_fit_on_one_screen(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptworks.core import config

    monkeypatch.setenv("COLUMNS", "80")
    shown = cli("keys").out
    assert len(shown.splitlines()) <= 40 and max(map(len, shown.splitlines())) <= 80
    words = set(shown.split())
    assert all(key.rpartition(".")[2] in words for key in config.keys())  # noqa: SIM118  a function
    assert set(one_object(cli("keys", "--json"))) == set(config.keys())


def test_a_key_is_shown_with_type_default_and_meaning(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptworks.core import config

    monkeypatch.setenv("COLUMNS", "80")
    assert cli("keys", "train.warmup").out == (
        "train.warmup = left open\n    share of the steps over which the rate rises from zero\n"
        "    (number from 0 to 1; a run keeps it)\n"
    )
    key, rest = one_object(cli("keys", "top_k", "--json")).popitem()
    assert (key, rest["takes"], rest["default"]) == ("generate.top_k", "whole number of 0 or more", 0)
    asked = {"data": "data.", "train.*_every": "train.", "nucleus": "generate.top_p"}
    for pattern, beginning in asked.items():
        assert all(key.startswith(beginning) for key in one_object(cli("keys", pattern, "--json")))
    for key in config.keys():  # noqa: SIM118  a function
        assert max(map(len, cli("keys", key).out.splitlines())) <= 80
    refused(cli("keys", "block_size"), 64, "did you mean train.context")


def test_a_second_model_to_compare_with_is_refused(cli: Callable[..., Outcome], finished_run: Path) -> None:
    model = finished_run / "model"
    refused(cli("evaluate", model, "--data", "x", "--against", model, "--against", model), 64, "--against takes one")


def test_a_model_that_is_worse_than_counting_is_told_what_would_help(
    cli: Callable[..., Outcome], tiny_overrides: list[str]
) -> None:
    command = ["run", "../r.yaml", *tiny_overrides, "train.max_steps=1", "stages=train,evaluate", "--out", "run"]
    assert "note     worse than counting tokens, after 25" in cli(*command).err
    command = ["continue", "run", "train.max_steps=25", "train.lr=0.05"]
    assert "counting tokens" not in cli(*command).err


# -- help and completion -----------------------------------------------------------------------------------------


def test_help_is_whole_at_80_columns(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptworks.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    pages = [cli("--help").out, *(cli(c.name or c.callback.__name__, "--help").out for c in app.registered_commands)]
    assert "..." not in pages[0].split("Commands:")[1]
    for page in pages:
        assert max(map(len, page.splitlines())) <= 80
    assert all("gptworks keys" in cli(name, "--help").out for name in ("train", "run"))


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("gptworks cont", ["continue"]),
        ("gptworks train lap", ["laptop"]),
        ("gptworks train laptop train.max_s", ["train.max_steps="]),
        ("gptworks continue runs/x train.patie", ["train.patience="]),
    ],
)
def test_the_shell_completes_commands_recipes_and_keys(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, words: str, completions: list[str]
) -> None:
    monkeypatch.setenv("_GPTWORKS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    outcome = cli()
    assert outcome.code == 0 and outcome.out.split() == completions


# -- --json ------------------------------------------------------------------------------------------------------


def one_object(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    assert outcome.out.endswith("}\n") and outcome.out.count("\n") == 1
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


def test_json_of_training_is_one_object_and_is_result_json(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_overrides: list[str]
) -> None:
    found = one_object(cli("train", "../r.yaml", *tiny_overrides, "train.max_steps=2", "--json", "--out", "run"))
    assert found == json.loads(Path("run/result.json").read_text())
    names = {"steps", "tokens", "seconds", "tokens_per_second", "mfu", "parameters", "train", "eval", "model"}
    assert names <= set(found)
    assert {"loss", "bits_per_byte", "perplexity"} <= set(found["eval"]) and "loss" in found["train"]


def test_json_of_generate_is_one_object(cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path) -> None:
    found = one_object(generate(cli, finished_run / "model", "--json", "--seed", 1))
    names = {"text", "tokens", "finish_reason", "tokens_per_second", "prompt_tokens_per_second"}
    assert names <= set(found) and found["tokens"] <= 4
    (tmp_path / "prompts.txt").write_text("\ufeffthe king\nthe queen\n", encoding="utf-8")  # as Windows writes it
    prompts = ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3]
    found = one_object(cli("generate", finished_run / "model", *prompts, "--json"))
    assert [made["prompt"] for made in found["results"]] == ["the king", "the queen"]


def test_json_of_evaluate_is_one_object(cli: Callable[..., Outcome], finished_run: Path) -> None:
    held_out = finished_run / "data" / "validation.jsonl"
    found = one_object(cli("evaluate", finished_run / "model", "--data", held_out, "--context", 32, "--json"))
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "bytes", "method", "baselines"} <= set(found)
    result = json.loads((finished_run / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-6)  # what the run said about its weights


def test_evaluate_says_what_a_tokenizer_loses(
    cli: Callable[..., Outcome], finished_run: Path, model: Path, tmp_path: Path
) -> None:
    state = json.loads((model / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "a.txt").write_text("the KING " * 100)
    said = cli("evaluate", model, "--data", tmp_path / "a.txt", "--against", finished_run / "model").out
    assert "model: 400 of 900 bytes (44.44%) do not come back from the ids" in said and "against: 4" not in said
    assert one_object(cli("evaluate", model, "--data", tmp_path / "a.txt", "--json"))["lost_bytes"] == 400


def test_evaluate_against_another_model_prints_its_row_and_a_verdict(
    cli: Callable[..., Outcome], finished_run: Path, tiny_text: Path, tmp_path: Path
) -> None:
    folder, other = finished_run / "model", saved(tmp_path / "other", context=64)
    command = ["evaluate", folder, "--data", tiny_text, "--against"]
    found = one_object(cli(*command, other, "--json"))
    against = found["against"]
    names = {"model", "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "method", "reason"}
    assert names <= set(against) and against["better"] == found["model"] == str(folder)
    low, high = against["interval"]
    assert low < against["difference_bits_per_byte"] < high < 0 and against["pairs"] >= 10
    shown = cli(*command, other)
    assert shown.code == 0
    rows = {line.split("  ")[0]: line.split() for line in shown.out.splitlines()[1:5]}
    assert rows[str(other)][1:] == [
        f"{against['loss']:.4f}", f"{against['perplexity']:.2f}", f"{against['bits_per_byte']:.4f}"
    ]  # fmt: skip
    assert shown.out.splitlines()[-1] == (
        f"{folder} minus {other}: {against['difference_bits_per_byte']:+.4f} bits/byte, 95 % interval "
        f"{low:+.4f} to {high:+.4f}, {against['pairs']} pairs: {folder} is better"
    )
    same = cli(*command, folder)
    assert same.out.endswith(f"95 % interval +0.0000 to +0.0000, {against['pairs']} pairs: no difference shown\n")
    (tmp_path / "short.txt").write_text(tiny_text.read_text()[:5000])
    short = cli("evaluate", folder, "--data", tmp_path / "short.txt", "--against", other, "--json")
    few = one_object(short)["against"]
    assert few["interval"] is None and few["better"] is None and "10 pairs" in few["reason"] and few["pairs"] == 2


@pytest.mark.parametrize("command", ["recipes", "env"])
def test_json_of_the_small_commands_is_one_object(cli: Callable[..., Outcome], command: str) -> None:
    assert one_object(cli(command, "--json"))


def test_json_of_verify_is_one_object(cli: Callable[..., Outcome], finished_run: Path, tiny_run: Path) -> None:
    assert one_object(cli("verify", finished_run / "data", "--json"))["identical"] is True
    assert one_object(cli("verify", tiny_run, "--json"))["verdict"] == "identical to the bit"


def test_generated_text_goes_to_standard_output_alone(cli: Callable[..., Outcome], finished_run: Path) -> None:
    outcome = generate(cli, finished_run / "model", "--seed", 1)
    assert outcome.code == 0 and outcome.out.startswith("the king")
    assert "tokens/s" in outcome.err and "tokens/s" not in outcome.out


def test_control_characters_do_not_reach_a_terminal(
    cli: Callable[..., Outcome], finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli("evaluate", "\x1b[31mnothere", "--data", "x"), 65, "\ufffd[31mnothere")
    console.say("\x1b[2J")
    console.warn("\x9b2J")
    assert capsys.readouterr().err == "\ufffd[2J\nwarning: \ufffd2J\n"
    asked = ["generate", finished_run / "model", "--prompt", "the \x1b[2J", "--max-new-tokens", 1]
    assert cli(*asked).out.startswith("the \x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli(*asked).out.startswith("the \ufffd[2J")


def test_same_seed_gives_the_same_text(cli: Callable[..., Outcome], finished_run: Path) -> None:
    texts = {generate(cli, finished_run / "model", "--seed", 3).out for _ in range(2)}
    assert len(texts) == 1


def test_a_prompt_that_is_not_utf8_is_no_crash(finished_run: Path, zygote: Any) -> None:
    prompt = b"the \xff".decode("utf-8", "surrogateescape")  # as Python gives what a shell passed on
    said = zygote.printed(["generate", str(finished_run / "model"), "--prompt", prompt, "--json"])
    assert isinstance(json.loads(said)["text"], str)


def test_a_closed_pipe_is_no_error(finished_run: Path) -> None:
    command = f"{sys.executable} -m gptworks recipes | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["recipes", "--version"])
def test_a_result_that_cannot_be_written_is_74(command: str) -> None:
    with open("/dev/full", "w") as full:
        asked = [sys.executable, "-m", "gptworks", command]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74 and done.stderr.startswith("error: standard output: ") and done.stderr.count("\n") == 1


def test_help_that_cannot_be_written_is_74() -> None:
    with open("/dev/full", "w") as full:
        asked = [sys.executable, "-m", "gptworks", "--help"]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74 and done.stderr.startswith("error: standard output: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("messages", ["2>/dev/full", "2>&-", "<&- 2>&-", "2> >(true)"])
def test_messages_that_nobody_reads_change_no_result_and_no_exit_code(messages: str) -> None:
    command = f"{sys.executable} -m gptworks recipes --json {messages}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "laptop" in json.loads(done.stdout)
    command = f"{sys.executable} -m gptworks train nowhere.yaml {messages}"
    assert subprocess.run(["bash", "-c", command]).returncode == 64


def test_what_the_console_cannot_say_leaves_the_host_s_standard_error_as_it_is(zygote: Any, tmp_path: Path) -> None:
    """As a guest: the descriptor stays, and nothing waits in its buffer for Python to fail at when it ends."""
    code = """
import os, sys
from gptworks.core.log import console
before = os.fstat(2)
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
console.say("a line"), console.warn("another"), console.fail("the last")
assert os.readlink("/proc/self/fd/2") == "/dev/full"
sys.stderr.flush()
sys.stderr = None
console.say("of a program without one"), console.live("20 %")
"""
    assert zygote.python(code) == ""


STREAMS: dict[str, dict[int, str]] = {
    "messages full": {2: "/dev/full"},
    "messages closed": {2: "closed"},
    "messages gone": {2: "gone"},
    "results full": {1: "/dev/full"},
    "results closed": {1: "closed"},
    "results gone": {1: "gone"},
    "all closed": {0: "closed", 1: "closed", 2: "closed"},
}


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train ../again.yaml --out ../run --json", 0),
        ("generate ../run/model --prompt the --max-new-tokens 3", 0),
        ("verify ../run/model", 0),
        ("verify ../damaged", 65),
        ("--help", 0),
        ("", 64),
        ("nothing --debug", 64),
        pytest.param("train ../again.yaml --out ../run", None, marks=SLOW),
        pytest.param("run ../again.yaml --out ../run stages=report", None, marks=SLOW),
        pytest.param("train ../again.yaml --dry-run", 0, marks=SLOW),
        pytest.param("evaluate ../run/model --data ../text.txt", 0, marks=SLOW),
        pytest.param("generate ../run/model --prompt the --max-new-tokens 3 --json", 0, marks=SLOW),
        pytest.param("chat ../run/model --max-new-tokens 3", 0, marks=SLOW),
        pytest.param("merge ../run/model --out m", 64, marks=SLOW),
        pytest.param("push ../nothing me/x", 65, marks=SLOW),
        pytest.param("report ../run", 0, marks=SLOW),
        pytest.param("export ../run/model --format gguf --out m --dry-run", 0, marks=SLOW),
        pytest.param("recipes", 0, marks=SLOW),
        pytest.param("env --json", 0, marks=SLOW),
        pytest.param("--version", 0, marks=SLOW),
        pytest.param("train --help", 0, marks=SLOW),
    ],
)
def test_no_state_of_the_streams_changes_an_exit_code_but_for_a_result_that_was_asked(
    tiny_run: Path, tiny_overrides: list[str], zygote: Any, tmp_path: Path, command: str, code: int | None
) -> None:
    """`code` is that of a command whose result is read; None: it has none, and ends with 0."""
    (tmp_path / "again.yaml").write_text("{}")
    (tmp_path / "text.txt").write_text("the old king sang\n" * 9)
    (tmp_path / "cwd").mkdir()
    shutil.copytree(tiny_run / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"")
    stdin = {0: str(tmp_path / "text.txt")} if command.startswith("chat") else {}
    asked = command.split() + (tiny_overrides if "again.yaml" in command else [])
    ended = {}
    for name, streams in STREAMS.items():
        child = zygote.streamed(asked, tmp_path / f"{name}.log", stdin | streams, cwd=tmp_path / "cwd")
        ended[name] = child.wait(60)
    unread = {"results full", "results closed", "all closed"} if code == 0 else set()
    if command.startswith("chat"):
        unread -= {"all closed"}  # no message comes, so there is no reply
    assert ended == {name: 74 if name in unread else code or 0 for name in STREAMS}
    said = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert "Exception ignored" not in said and ("Traceback" not in said or "--debug" in command)


def test_a_run_goes_on_when_the_reader_of_its_messages_goes_away(
    finished_run: Path, zygote: Any, tmp_path: Path
) -> None:
    read, write = os.pipe()
    command = ["train", str(finished_run / "config.yaml"), "--out", str(tmp_path / "run")]
    log = Path(f"/proc/{os.getpid()}/fd/{write}")
    child = zygote.start(command, log, GPTWORKS_FAILPOINT="step.count:1:stop")
    while not stopped(child.pid):
        time.sleep(0.002)
    assert os.read(read, 100)  # it has begun to speak
    os.close(write)
    os.close(read)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(60) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_standard_output_cannot_encode_is_escaped(encoding: str) -> None:
    shown, found = (
        subprocess.run(
            [sys.executable, "-m", "gptworks", "recipes", *more],
            env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True,
        ).stdout
        for more in ([], ["--json"])
    )  # fmt: skip
    assert b"\\u7ea2" in shown and "红" in json.loads(found)["hongloumeng"]


def test_a_result_that_names_what_is_not_utf8_is_printed(cli: Callable[..., Outcome], finished_run: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(finished_run, name)
    assert one_object(cli("report", name, "--json"))["report"] == f"{name}/report.html"


def test_ctrl_c_ends_a_small_command_too(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "device", interrupted)
    refused(cli("env"), 75, "Ctrl-C; run the same command again")


def test_a_recipe_that_says_nothing_or_extends_nothing_is_named(cli: Callable[..., Outcome]) -> None:
    Path("empty.yaml").write_text("# to come\n")
    Path("lost.yaml").write_text("extends: nothere\n")
    Path("wide.yaml").write_bytes("data: {train: x}".encode("utf-16"))
    refused(cli("train", "empty.yaml"), 64, "empty.yaml: nothing stands in it")
    refused(cli("train", "lost.yaml"), 64, "lost.yaml: extends: unknown recipe 'nothere'")
    refused(cli("train", "wide.yaml"), 64, "wide.yaml: not UTF-8", "save it as UTF-8")


def test_a_file_in_the_place_of_a_run_and_a_folder_without_a_model_are_named(cli: Callable[..., Outcome]) -> None:
    Path("run").write_text("notes")
    refused(cli("train", "laptop", "--out", "run"), 74, "run: is a file, and a run is a folder")
    Path("empty").mkdir()
    for command in (["--dry-run"], []):
        refused(cli("train", "laptop", "model=empty", *command), 65, "empty: no model is in this folder")


def test_what_a_library_s_thread_fails_at_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    gone = FileNotFoundError(2, "No such file or directory", b"run/tensorboard/events")
    cli_module._aside(threading.ExceptHookArgs((type(gone), gone, None, threading.current_thread())))
    said = capsys.readouterr().err
    assert said.endswith("run/tensorboard/events: No such file or directory\n") and "Traceback" not in said


def test_a_system_without_threads_left_is_no_bug_of_ours() -> None:
    explained = cli_module._explained(RuntimeError("can't start new thread"))
    assert explained is not None and explained[1] == 77 and "no more threads" in explained[0]


@pytest.mark.parametrize("arguments", [["run", ""], ["plan", ""], ["train", "", "data.train=shakespeare"]])
def test_an_empty_name_is_no_recipe(cli: Callable[..., Outcome], arguments: list[str]) -> None:
    refused(cli(*arguments), 64, "recipe")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_prompts_are_65(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content:
        (tmp_path / "p.txt").write_bytes(content)
    refused(cli("generate", finished_run / "model", "--prompts", tmp_path / "p.txt"), 65, "p.txt")


def test_too_long_a_prompt_is_refused_before_anything_is_printed(
    cli: Callable[..., Outcome], finished_run: Path
) -> None:
    refused(cli("generate", finished_run / "model", "--prompt", "the king " * 100), 65, "fewer than 32")


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_that_no_generator_takes_is_64(cli: Callable[..., Outcome], finished_run: Path, seed: int) -> None:
    refused(generate(cli, finished_run / "model", f"--seed={seed}"), 64, "seed=")


def test_an_evaluation_option_that_is_no_text_is_64(cli: Callable[..., Outcome], finished_run: Path) -> None:
    options = ["--data", finished_run / "data" / "validation.jsonl", "--text-column", "\udcff"]
    refused(cli("evaluate", finished_run / "model", *options), 64, "data.text_column", "Unicode")


def test_a_mistake_of_any_length_is_one_short_line(cli: Callable[..., Outcome], finished_run: Path) -> None:
    outcome = cli("evaluate", finished_run / "model", "--data", "x" * 100_000)
    assert outcome.code in (65, 74) and outcome.err.count("\n") == 1 and len(outcome.err) < 1100


def test_debug_shows_the_traceback(cli: Callable[..., Outcome]) -> None:
    outcome = cli("generate", "nothere", "--prompt", "x", "--debug")
    assert outcome.code == 65 and "Traceback" in outcome.err


# -- export ------------------------------------------------------------------------------------------------------


def test_an_export_ends_with_what_was_compared(cli: Callable[..., Outcome], finished_run: Path) -> None:
    pytest.importorskip("gguf")
    outcome = cli("export", finished_run / "model", "--format", "gguf", "--out", "m.gguf", "--type", "f32")
    assert outcome.code == 0 and os.listdir() == ["m.gguf"]
    parity, written = outcome.out.splitlines()
    assert parity.startswith("parity ") and "logits of 512 tokens differ by at most 0" in parity
    assert written == f"m.gguf: {os.path.getsize('m.gguf'):,} bytes"
    found = one_object(cli("export", finished_run / "model", "--format", "gguf", "--out", "n.gguf", "--json"))
    assert found["type"] == "f16" and found["parity"]["tokens"] == 512 and found["out"] == "n.gguf"
    planned = cli("export", finished_run / "model", "--format", "gguf", "--out", "o.gguf", "--dry-run")
    assert planned.code == 0 and "nothing was written" in planned.out
    assert sorted(os.listdir()) == ["m.gguf", "n.gguf"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--format", "ggml", "--out", "m"], 64, ["ggml", "gguf"]),
        (["--format", "gguf", "--out", "m", "--type", "q8"], 64, ["q8_0"]),
        (["--format", "gguf", "--out", "."], 64, ["already"]),
        (["--format", "gguf", "--out", "m", "--data", "nowhere.txt"], 65, ["nowhere.txt"]),
        (["--format", "gguf", "--out", "/proc/nothing/m"], 74, ["/proc/nothing"]),
        (["--format", "gguf"], 64, ["--out"]),
    ],
    ids=str,
)
def test_a_wrong_export_is_one_line_and_leaves_nothing(
    cli: Callable[..., Outcome], finished_run: Path, options: list[str], code: int, words: list[str]
) -> None:
    pytest.importorskip("gguf")
    refused(cli("export", finished_run / "model", *options), code, *words)
    assert os.listdir() == []


def test_an_export_reads_no_more_of_a_text_than_it_compares(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "mine.py"
    source.write_text("def documents():\n    yield 'the king ' * 5000\n    raise ValueError('read on')\n")
    command = ["export", finished_run / "model", "--format", "gguf", "--out", "m", "--dry-run"]
    assert cli(*command, "--data", f"{source}:documents").code == 0


def test_weights_that_are_no_numbers_are_not_exported(cli: Callable[..., Outcome], model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, model / "model.safetensors")
    refused(cli("export", model, "--format", "gguf", "--out", "m"), 65, "finite")
    assert os.listdir() == []


# -- chat --------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """Pipes text into a conversation."""
    folder = saved(tmp_path_factory.mktemp("chat") / "model")

    def call(text: str, *arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return cli("chat", folder, "--seed", 1, "--max-new-tokens", 12, *arguments)

    return call


def test_a_piped_line_is_a_message_and_standard_output_has_the_replies(chat: Callable[..., Outcome]) -> None:
    outcome = chat("the king\n\n/help\nthe queen\n", "--json")
    assert outcome.code == 0
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the king", "the queen"]
    names = {"text", "tokens", "finish_reason", "prompt_tokens", "dropped_turns", "tokens_per_second"}
    assert all(names <= set(row) and 0 < row["tokens"] <= 12 for row in rows)
    assert rows[1]["prompt_tokens"] > 2 * rows[0]["prompt_tokens"]  # the first turn is part of the second prompt
    assert "/reset" in outcome.err and "no chat template" in outcome.err
    plain = chat("the king\n\nthe queen\n", "--quiet")
    assert plain.out == "".join(row["text"] + "\n" for row in rows) or any("\n" in row["text"] for row in rows)
    assert plain.err == ""
    assert chat("").code == 0 and chat("").out == ""


def test_chat_commands(chat: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "new" / "said.jsonl"
    outcome = chat(
        f"the king\n/save {file}\n//help\n/reset\nthe king\n/exit\nthe queen\n", "--json", "--system", "Sing."
    )
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the king", "/help", "the king"]
    assert rows[0]["text"] == rows[2]["text"] and rows[0]["prompt_tokens"] == rows[2]["prompt_tokens"]
    saved_messages = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved_messages == [
        {"role": "system", "content": "Sing."},
        {"role": "user", "content": "the king"},
        {"role": "assistant", "content": rows[0]["text"]},
    ]
    assert os.listdir(file.parent) == ["said.jsonl"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("/nope", 64, ["/nope", "/help"]),
        ("/save", 64, ["/save FILE"]),
        ("/save /dev/null/x", 74, ["/dev/null"]),
        ("x" * 3000, 65, ["tokens", "256"]),
    ],
    ids=["command", "no file", "bad file", "too long"],
)
def test_a_mistake_in_a_pipe_ends_it(chat: Callable[..., Outcome], line: str, code: int, words: list[str]) -> None:
    refused(chat(f"{line}\nthe king\n"), code, *words)


class Typist:
    """A command on a terminal of its own: what it shows is waited for, a minute at most."""

    def __init__(self, *arguments: Any) -> None:
        self.terminal, end = pty.openpty()
        self.command = subprocess.Popen(
            [sys.executable, "-m", "gptworks", *map(str, arguments)],
            stdin=end, stdout=end, stderr=end, start_new_session=True,
            preexec_fn=self.take_terminal,
        )  # fmt: skip
        os.close(end)
        self.seen = ""

    @staticmethod
    def take_terminal() -> None:
        """Ctrl-C is a signal, and one that counts: whoever runs the tests in the background has it ignored."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *error: object) -> None:
        self.command.kill()
        self.command.wait()
        os.close(self.terminal)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, characters: int = 0, again: str = "") -> None:
        """Until `text` is shown, and so many characters after it; `again` is typed whenever nothing comes for long."""
        end = time.monotonic() + 60
        while text not in self.seen or len(self.seen.partition(text)[2]) < characters:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen[-2000:]!r}"
            if not select.select([self.terminal], [], [], 5)[0]:
                self.type(again)
                continue
            self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """A reply that Ctrl-C stops, a line that it clears, a mistake that ends nothing, Ctrl-D to leave."""
    folder = saved(tmp_path / "model", context=4096)
    with Typist("chat", folder, "--max-new-tokens", 4000, "--temperature", 0) as typist:
        typist.wait_for("> ")
        typist.type("the king\n")
        typist.wait_for("the king", characters=50)  # it streams
        typist.type("\x03")
        typist.wait_for("[stopped]")
        typist.wait_for("> ")
        typist.type("the qu")
        typist.wait_for("the qu")
        typist.type("\x03")
        # Python's readline misses a signal that comes while it shows a letter, until the next key.
        typist.wait_for("Ctrl-D or /exit leaves", again="\x03")
        typist.type("/nope\n")
        typist.wait_for(" no command /nope")
        typist.type(f"/save {tmp_path / 'said.jsonl'}\n")
        typist.wait_for("said.jsonl]")  # whose arrow is not the prompt
        typist.wait_for("> ")
        typist.type("\x04")
        assert typist.command.wait(60) == 0
    first, second = (json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines())
    assert first == {"role": "user", "content": "the king"} and len(second["content"]) > 30


# -- the stages of a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", ["evaluate,generate", "train,evaluate,generate"])
def test_later_stages_add_to_what_the_training_gave(
    cli: Callable[..., Outcome], tiny_run: Path, tiny_overrides: list[str], stages: str
) -> None:
    again = ["run", "../r.yaml", *tiny_overrides, "--out", tiny_run, "--json"]
    trained = json.loads((tiny_run / "result.json").read_text())
    result = json.loads(cli(*again, f"stages={stages}").out)
    assert result["eval"] == trained["eval"] and result["generation"]
    assert result["evaluation"]["loss"] == pytest.approx(trained["eval"]["loss"], rel=1e-6)
    assert all(result[key] == trained[key] for key in ("steps", "seconds", "peak_memory_bytes"))
    assert json.loads((tiny_run / "result.json").read_text())["steps"] == 12


def test_later_stages_do_not_make_a_run_look_finished(
    cli: Callable[..., Outcome], tiny_run: Path, tiny_overrides: list[str]
) -> None:
    (tiny_run / "result.json").unlink()
    assert cli("run", "../r.yaml", *tiny_overrides, "stages=generate", "--out", tiny_run).code == 0
    assert not (tiny_run / "result.json").exists()


def test_later_stages_of_no_run_are_65(cli: Callable[..., Outcome], tiny_overrides: list[str]) -> None:
    refused(cli("run", "../r.yaml", *tiny_overrides, "stages=generate", "--out", "runs/none"), 65, "come after train")


def test_an_eval_file_is_read_with_the_runs_own_settings(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_overrides: list[str]
) -> None:
    for name in ("train", "eval"):
        rows = "".join(f"{number},the old king walked {number} stones\n" for number in range(400))
        (tmp_path / f"{name}.csv").write_text("id,body\n" + rows)
    table = [f"data.train={tmp_path / 'train.csv'}", f"data.eval={tmp_path / 'eval.csv'}", "data.text_column=body"]
    stages = [*table, "data.eval_bytes=900", "train.max_steps=2", "stages=train,evaluate"]
    result = json.loads(cli("run", "../r.yaml", *tiny_overrides, *stages, "--out", "run", "--json").out)
    assert result["evaluation"]["bytes"] == result["eval"]["bytes"] <= 900
    assert result["evaluation"]["loss"] == pytest.approx(result["eval"]["loss"], rel=1e-6)


@pytest.mark.parametrize("out", ["papers", "."])
def test_fresh_sets_nothing_but_a_run_aside(cli: Callable[..., Outcome], tiny_overrides: list[str], out: str) -> None:
    Path("papers").mkdir()
    Path("papers/thesis.txt").write_text("years of work")
    Path("papers/data").mkdir()  # a name that a run has too
    refused(cli("train", "../r.yaml", *tiny_overrides, "--fresh", "--out", out), 64, "choose another --out")
    assert Path("papers/thesis.txt").read_text() == "years of work"


def test_a_run_in_place_of_its_model_is_named(cli: Callable[..., Outcome], finished_run: Path) -> None:
    refused(cli("generate", finished_run, "--prompt", "the"), 65, "is a run", f"{finished_run / 'model'}")


def test_a_signal_ends_a_command_with_75(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptworks import lifecycle

    monkeypatch.setattr(lifecycle, "evaluate", lambda *asked, **options: os.kill(os.getpid(), signal.SIGTERM))
    refused(cli("evaluate", "model", "--data", "text"), 75, "SIGTERM", "run the same command")


def test_a_dry_run_from_a_model_that_is_not_there_is_64(cli: Callable[..., Outcome]) -> None:
    refused(cli("train", "laptop", "model=nowhere", "--dry-run"), 64, "model.path=nowhere", "no such folder")
    assert cli("train", "lora", "--dry-run").code == 0  # whose model and text are still to be named
    refused(cli("train", "lora", "data.train=x.txt", "--dry-run"), 65, "x.txt: no such file")


def test_version_and_help_are_no_errors(cli: Callable[..., Outcome]) -> None:
    assert cli("--version").out.startswith("gptworks ")
    alone = cli()
    assert alone.code == 64 and alone.err.startswith("Usage:") and "error" not in alone.err


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_folder_of_somebody_elses_is_never_replaced(
    cli: Callable[..., Outcome], tiny_overrides: list[str], name: str
) -> None:
    Path(name).mkdir()
    Path(name, "mine.txt").write_text("years of work")
    refused(cli("train", "../r.yaml", *tiny_overrides, "--out", "."), 64, "mine.txt", "choose another --out")
    assert Path(name, "mine.txt").read_text() == "years of work" and not Path("checkpoints").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "checkpoints", "result.json", "report.html"])
def test_a_file_of_another_program_is_never_replaced(
    cli: Callable[..., Outcome], tiny_overrides: list[str], name: str
) -> None:
    Path("exp").mkdir()
    Path("exp", name).write_text("years of work")
    refused(cli("train", "../r.yaml", *tiny_overrides, "--out", "exp"), 64, f"exp/{name}", "choose another --out")
    assert Path("exp", name).read_text() == "years of work" and sorted(os.listdir("exp")) == [".lock", name]


def test_a_run_or_recipe_whose_name_is_not_utf8_is_refused_before_anything(
    cli: Callable[..., Outcome], tiny_overrides: list[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.yaml")
    Path(name).write_text("model: {depth: 1}")
    refused(cli("train", "../r.yaml", *tiny_overrides, "--out", name), 64, "caf", "UTF-8")
    refused(cli("train", name, *tiny_overrides, "--out", "run"), 64, "caf", "UTF-8")
    assert os.listdir() == [name]


@pytest.mark.parametrize(
    ("key", "code", "word"), [("generate.top_p=0", 64, "top_p"), (f"generate.prompts={'king ' * 60}", 64, "fewer than")]
)
def test_a_sample_that_cannot_be_made_is_known_before_the_training(
    cli: Callable[..., Outcome], tiny_overrides: list[str], key: str, code: int, word: str
) -> None:
    refused(cli("train", "../r.yaml", *tiny_overrides, key, "--out", "run"), code, word)
    assert not Path("run/checkpoints").exists()


# -- how a text is read ------------------------------------------------------------------------------------------


def test_evaluate_refuses_another_encoding_and_reads_it_once_it_is_named(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path
) -> None:
    command = ["evaluate", finished_run / "model", "--data", tmp_path / "a.txt", "--quiet", "--json"]
    text = "the café and the king walked slowly.\n" * 30
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    refused(cli(*command), 65, "a.txt", "it looks like CP1252", "--encoding cp1252")
    found = one_object(cli(*command, "--encoding", "cp1252"))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    same = one_object(cli(*command))
    assert (found["loss"], found["bytes"]) == (same["loss"], same["bytes"]) and found["bytes"] == len(text.encode())
    refused(cli(*command, "--encoding", "hex"), 64, "data.encoding", "not the name of a text encoding")


def test_evaluate_warns_of_what_was_replaced_though_quiet(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"the king walked slowly over old stones\n" * 60 + b"\xff\n")
    outcome = cli("evaluate", finished_run / "model", "--data", tmp_path / "a.txt", "--quiet")
    assert outcome.code == 0 and outcome.err.startswith("warning: ") and outcome.err.count("\n") == 1
    assert "a.txt: 1 invalid sequence of bytes was replaced" in outcome.err


@pytest.mark.parametrize("trained, crlf_is_read_as", [("lf", "\n"), ("keep", "\r\n"), (None, "\r\n"), ("", "\n")])
def test_evaluate_reads_line_ends_as_training_did(
    cli: Callable[..., Outcome], finished_run: Path, tmp_path: Path, trained: str | None, crlf_is_read_as: str
) -> None:
    """None: a run from before there was a choice; "": a model of which no run is known."""
    model = Path(shutil.copytree(finished_run / "model", tmp_path / "copied"))
    lineage = json.loads((model / "gptworks.json").read_text())
    assert lineage["config"]["data"].pop("newlines") == "lf"
    if trained == "":
        del lineage["config"]
    elif trained:
        lineage["config"]["data"]["newlines"] = trained
    (model / "gptworks.json").write_text(json.dumps(lineage))
    manifest = folder.read_manifest(model)
    manifest["files"]["gptworks.json"] = {
        "bytes": (model / "gptworks.json").stat().st_size, "sha256": folder.sha256(model / "gptworks.json"),
    }  # fmt: skip
    folder.write_manifest(model, manifest)
    lines = "the king walked slowly\nover old stones\n" * 10
    (tmp_path / "a.txt").write_bytes(lines.replace("\n", "\r\n").encode())
    found = one_object(cli("evaluate", model, "--data", tmp_path / "a.txt", "--json"))
    assert found["bytes"] == len(lines.replace("\n", crlf_is_read_as))


def test_a_tilde_is_the_home_folder_in_every_path(
    cli: Callable[..., Outcome], finished_run: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(finished_run, home / "run")
    shutil.copy(tiny_text, home / "a.txt")
    (home / "prompts.txt").write_text("the king\n")
    (home / "r.yaml").write_text("data: {train: ~/a.txt}\ntrain: {context: 16, batch_tokens: 64, max_steps: 2}\n")
    monkeypatch.setenv("HOME", str(home))
    shape = ["model=~/run/model", "data.eval=~/a.txt", "data.shards=~/shards", "train.max_steps=2"]
    assert cli("train", "~/r.yaml", *shape, "--out", "~/new", "--quiet").code == 0
    assert (home / "new" / "model").is_dir() and (home / "shards" / "train.tokens").is_file()
    own = ["tokenizer.path=~/run/model", "model.hidden_size=32", "model.num_hidden_layers=1", "train.max_steps=2"]
    assert cli("train", "~/r.yaml", *own, "--out=~/other", "--quiet").code == 0
    for command in (
        ["evaluate", "~/new/model", "--data", "~/a.txt", "--against", "~/run/model"],
        ["generate", "~/new/model", "--prompts", "~/prompts.txt", "--max-new-tokens", 2],
        ["report", "~/new"],
        ["verify", "~/new/model"],
    ):
        assert cli(*command, "--quiet").code == 0, command
    assert not Path("~").exists()
