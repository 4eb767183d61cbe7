"""Runs side by side, from their files alone."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from gptworks import printed
from gptworks.core.errors import DataError, UsageError
from gptworks.reporting.compare import compare


@pytest.fixture
def other(tiny_run: Path) -> Path:
    """A run like the finished one, but for its rate, in a folder of the same name."""
    path = tiny_run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["lr"] = 0.123
    tree["generate"]["prompts"] = ["宝玉"]
    path.write_text(yaml.safe_dump(tree))
    return tiny_run


def test_results_and_what_differs_are_those_of_the_files(finished_run: Path, other: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    both = compare([finished_run, other])
    first = both.runs[0]
    assert first.finished and (first.steps, first.tokens) == (result["steps"], result["tokens"])
    assert (first.loss, first.bits_per_byte) == (result["eval"]["loss"], result["eval"]["bits_per_byte"])
    assert first.parameters == result["parameters"] and first.recipe == "tiny"
    assert set(both.differences) == {"train.lr", "generate.prompts"}
    assert both.differences["train.lr"][1] == 0.123 and both.differences["generate.prompts"][1] == ["宝玉"]
    assert '["宝玉"]' in printed.compared(both)
    assert [each.run for each in both.runs] == ["tiny", "run"]


def test_a_run_under_way_is_compared_by_what_it_logged(finished_run: Path, other: Path) -> None:
    (other / "result.json").unlink()
    shutil.rmtree(other / "model")
    whole, part = compare([finished_run, other]).runs
    assert not part.finished and (part.steps, part.planned_steps) == (12, 12) and part.parameters is None
    assert part.loss == pytest.approx(whole.loss) and part.tokens == whole.tokens and part.recipe == "tiny"


def test_runs_of_one_name_are_told_apart_by_their_path(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "a" / "tiny")
    assert [each.run for each in compare([finished_run, tmp_path / "a" / "tiny"]).runs] == [
        str(finished_run), str(tmp_path / "a" / "tiny")
    ]  # fmt: skip
    assert compare([finished_run, tmp_path / "a" / "tiny"]).differences == {}


def test_one_run_or_a_folder_that_is_none_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two runs or more"):
        compare([finished_run])
    with pytest.raises(DataError, match="not a run folder"):
        compare([finished_run, tmp_path])
