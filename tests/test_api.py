"""The Python interface: paths or text, loaded models or folders, a clock for each call."""

import time
from pathlib import Path
from typing import Any

import pytest

import gptworks
from gptworks import api
from gptworks.core import runtime
from gptworks.core.errors import DataError, UsageError


def test_names_and_version_are_there() -> None:
    assert {"load", "train", "run", "evaluate", "Model", "__version__"} <= set(dir(gptworks))
    assert gptworks.__version__.count(".") >= 1


def test_loss_is_what_evaluate_gives_for_a_file_of_the_text(finished_run: Path, tmp_path: Path) -> None:
    model = api.load(finished_run / "model")
    text = "the old king sang, and nobody answered.\n" * 3
    (tmp_path / "text.txt").write_text(text)
    found = api.evaluate(model, tmp_path / "text.txt", against=finished_run / "model")
    score = model.loss(text)
    assert score.loss == pytest.approx(found["loss"], rel=1e-6) and score.tokens == found["tokens"]
    assert found["against"]["difference_bits_per_byte"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="too little text"):
        model.loss("")


def test_generate_takes_one_stop_string_or_several(finished_run: Path) -> None:
    model = api.load(finished_run / "model")
    whole = model.generate("the king", 30, temperature=0).text
    stop = whole[len(whole) // 2]
    assert model.generate("the king", 30, stop=stop, temperature=0).text == whole[: whole.index(stop)]
    assert model.generate("the king", 30, stop=["\0", stop], temperature=0).finish_reason == "stop"
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        model.generate("the king", 0)


def test_a_time_budget_counts_from_the_call(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    monkeypatch.setattr(runtime, "_age", lambda: 5000.0 + time.monotonic() - start)  # a notebook, open for an hour
    monkeypatch.setattr(runtime, "_begun", 0.0)
    config = tiny_config()
    monkeypatch.setattr(api.configuration, "load", lambda recipe, overrides: config)
    result = api.train(Path("tiny"), out=tmp_path / "run")
    assert result["seconds"] < 100 and result["steps"] == 12
