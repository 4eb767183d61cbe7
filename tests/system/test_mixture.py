"""A run on weighted sources, from the recipe to the replay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core.config import RunFile
from gptworks.core.errors import RunMismatch
from gptworks.data.batch import Cursor
from gptworks.data.loader import Loader
from gptworks.data.shards import open_shards

TINY_RUN = {"train.max_steps": 8, "train.checkpoint_every": 4, "train.eval_every": 8}


@pytest.fixture
def sources(tmp_path: Path, tiny_text: Path) -> list[dict[str, Any]]:
    rows = tmp_path / "rows.csv"
    rows.write_text("id,text\n" + "".join(f'{i},"the old king {i}\nsang, ""slowly"""\n' for i in range(300)))
    return [{"path": str(tiny_text), "weight": 0.7}, {"path": str(rows), "weight": 0.3}]


def test_a_mixture_is_trained_told_resumed_and_replayed(
    sources: list[dict[str, Any]], tmp_path: Path, tiny_config: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tiny_config(**TINY_RUN, **{"data.train": sources}), tmp_path / "run"
    lifecycle.train(config, out, "tiny")
    said = capsys.readouterr().err
    assert "rows.csv" in said and "total" in said and "asked  30.00%, achieved  30" in said and "row 1 begins:" in said
    assert lifecycle.verify(out)["identical"] is True
    assert lifecycle.train(config, out, "tiny")["steps"] == 8  # config.yaml reads back as what was asked
    assert json.loads((out / "model" / "gptworks.json").read_text())["data"] == "tiny.txt (70 %) and rows.csv (30 %)"

    other = [{**sources[0], "weight": 0.6}, sources[1]]
    with pytest.raises(RunMismatch, match=r"data\.train=.*weight: 0\.7"):
        lifecycle.train(tiny_config(**TINY_RUN, **{"data.train": other}), out, "tiny")

    resolved = RunFile.read(out / "config.yaml").chosen
    stream = open_shards(out / "data").train
    loader = Loader(stream, 32, 8, resolved.train.seed, weights=resolved.data.weights)
    cursor = Cursor()
    for _ in range(8):
        _, cursor = loader.take(cursor)
    asked = [row["asked"] for row in loader.sources(cursor)]
    assert asked == pytest.approx([0.7, 0.3])
    assert [row["achieved"] for row in loader.sources(cursor)] == pytest.approx(asked, abs=0.12)


def test_a_mixture_from_the_command_line_is_the_one_from_a_recipe(sources: list[dict[str, Any]]) -> None:
    spelled = ", ".join(f"{{path: {entry['path']}, weight: {entry['weight']}}}" for entry in sources)
    typed = configuration.load(None, [f"data.train=[{spelled}]"])
    assert typed == configuration.load(None, {"data.train": sources})
    assert typed.data.weights == [0.7, 0.3] and typed.data.places == [entry["path"] for entry in sources]


def test_a_runs_own_folder_may_be_spelled_out_and_anothers_is_left_alone(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shared = {"data.shards": str(first / "data")}
    lifecycle.train(tiny_config(**TINY_RUN, **shared), first, "tiny")
    with pytest.raises(RunMismatch, match=r"other runs may use them: data\.eval_fraction changed"):
        lifecycle.train(tiny_config(**TINY_RUN, **shared, **{"data.eval_fraction": 0.3}), second, "tiny")
    lifecycle.train(tiny_config(**TINY_RUN, **shared, **{"data.eval_fraction": 0.3}), first, "tiny", fresh=True)
