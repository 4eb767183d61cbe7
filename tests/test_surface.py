"""What others build on: commands, Python names, exit codes, keys of what is printed and written. Lists that stay."""

import json
from dataclasses import fields
from typing import get_args

import pytest

import gptworks
from gptworks import cli, lifecycle
from gptworks.core import errors, results
from gptworks.core.config import schema
from gptworks.core.results import Result

COMMANDS = [
    "chat", "compare", "continue", "env", "evaluate", "export", "generate", "keys", "merge", "plan", "push", "recipes",
    "report", "run", "train", "verify",
]  # fmt: skip
CODES = {
    "GptworksError": 70, "UsageError": 64, "DataError": 65, "StorageError": 74, "Preempted": 75, "NotFinite": 76,
    "OutOfMemory": 77, "RunMismatch": 78, "PeerLost": 79,
}  # fmt: skip
RESULT = [
    "steps", "tokens", "seconds", "train_seconds", "tokens_per_second", "mfu", "matmul_gflops", "peak_memory_bytes",
    "peak_gpu_memory_bytes", "processes", "parameters", "trained_parameters", "stopped", "weights", "skipped_steps",
    "changes", "train", "sources", "eval", "model", "recipe", "evaluation", "generation", "report",
]  # fmt: skip
EVALUATION = [
    "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "lost_bytes", "method", "tokens_per_second", "baselines",
    "model", "data",
]  # fmt: skip
GENERATION = ["prompt", "text", "tokens", "finish_reason", "tokens_per_second", "prompt_tokens_per_second"]
METRICS = {
    "step", "train/loss", "train/bits_per_byte", "train/grad_norm", "train/learning_rate", "train/epoch",
    "train/tokens", "train/tokens_per_second", "train/mfu", "train/data_wait", "train/seconds", "train/memory_gib",
    "eval/loss", "eval/perplexity", "eval/bits_per_byte", "sample",
}  # fmt: skip


def test_the_commands_are_these():
    assert sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands) == COMMANDS


def test_the_exit_codes_are_these():
    assert {name: kind.code for name, kind in vars(errors).items() if isinstance(kind, type)} == CODES


@pytest.fixture
def whole_run(tiny_run, tiny_config):
    """A run folder that has been through every stage."""
    lifecycle.run(tiny_config(), tiny_run)
    return tiny_run


def test_result_json_has_these_keys(whole_run):
    result = json.loads((whole_run / "result.json").read_text())
    assert list(result) == RESULT
    assert list(result["evaluation"]) == EVALUATION and list(result["generation"][0]) == GENERATION
    assert list(result["eval"]) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes", "lost_bytes"]


def test_metrics_jsonl_has_these_keys(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} == METRICS


def test_every_stage_has_a_python_name_and_a_typed_result():
    stages = {
        "compare", "evaluate", "export", "generate", "merge", "plan", "push", "report", "run", "train", "verify",
    }  # fmt: skip
    assert stages <= set(gptworks.__all__) and stages <= set(COMMANDS)
    assert {"load", "Model", "continue_run"} | stages == set(gptworks.__all__)  # `continue` is a word of Python's
    for name in stages:
        assert callable(getattr(gptworks, name))


def test_the_stages_of_a_recipe_are_the_rows_of_one_table():
    assert list(lifecycle.STAGES) == list(get_args(schema.STAGES)) == schema.Config().stages


def test_a_result_is_its_values_and_what_json_prints(whole_run):
    values = json.loads((whole_run / "result.json").read_text())
    training = results.Trained.read(whole_run / "result.json")
    assert training == values and training.steps == training["steps"] == values["steps"]
    assert training["evaluation"]["loss"] == values["evaluation"]["loss"]  # of a later stage: kept as it is
    finished = results.Finished(training, evaluation=None, report="other.html")
    assert finished["report"] == "other.html" and finished["steps"] == values["steps"]
    verified = results.Verified("as it was", identical=True, files=3)
    assert dict(verified) == {"verdict": "as it was", "identical": True, "files": 3} and "to_step" not in verified


def test_every_result_has_a_sentence_and_no_field_hides_a_mapping_s_method():
    for kind in Result.__subclasses__():
        assert kind.__doc__ and not {item.name for item in fields(kind)} & {"keys", "items", "values", "get"}


def test_one_prompt_is_one_continuation(finished_run):
    one = gptworks.generate(finished_run / "model", "the king", max_new_tokens=3, temperature=0.0)
    two = gptworks.generate(finished_run / "model", ["the king", "the"], max_new_tokens=3, temperature=0.0)
    assert len(one) == 1 and one[0].text == two[0].text and len(two) == 2


def test_verify_says_of_a_folder_that_is_none_what_it_lacks(tmp_path):
    with pytest.raises(errors.DataError, match="nowhere: no such folder"):
        gptworks.verify(tmp_path / "nowhere")
    with pytest.raises(errors.DataError, match=r"no config\.yaml and no manifest\.json"):
        gptworks.verify(tmp_path)
