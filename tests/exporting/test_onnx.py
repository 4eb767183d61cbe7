"""An ONNX graph computes what the decoder does, for every batch, length and past; what fails the proof is not kept."""

import os
import shutil
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core import folder
from gptworks.core.errors import DataError, GptworksError, StorageError, UsageError
from gptworks.exporting import onnx as module
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.model.build import Loaded

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library)
import onnxruntime  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "gpt2": exported.GPT2,
    "llama-grouped-llama3": exported.CASES["llama-llama3"],
    "qwen3-sliding": exported.CASES["qwen3"] | {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
    "gemma2": {
        "model_type": "gemma2", "head_dim": 12, "num_key_value_heads": 2, "sliding_window": 5,
        "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
}  # fmt: skip


CASES |= {name: exported.CASES[name] for name in ("mixtral", "qwen3_moe")}
SLOW = ("llama-grouped-llama3", "gemma2", "gpt2", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path, dict]:
    place = tmp_path_factory.mktemp("onnx")
    loaded = exported.folder(place / "m", CASES[request.param])
    return loaded, place / "out", lifecycle.export(loaded, "onnx", place / "out", tokens=300)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_that_compute_every_token_are_those_that_compute_theirs(case: str, tmp_path: Path) -> None:
    model = exported.folder(tmp_path / "m", exported.CASES[case]).model
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    graph = module.Graph(model)
    for own, every in zip(model.model.layers, graph.inner.model.layers, strict=True):
        assert isinstance(every.mlp, module.EveryExpert) and not isinstance(own.mlp, module.EveryExpert)
        torch.testing.assert_close(every.mlp(x), own.mlp(x))
    assert {p.data_ptr() for p in graph.parameters()} == {p.data_ptr() for p in model.parameters()}


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])


def run(session: Any, ids: torch.Tensor, past: list[np.ndarray]) -> list[np.ndarray]:
    seen = past[0].shape[2]
    positions = torch.arange(seen, seen + ids.shape[1]).expand_as(ids).contiguous()
    inputs = {"input_ids": ids.numpy(), "position_ids": positions.numpy()}
    inputs["attention_mask"] = np.ones((len(ids), seen + ids.shape[1]), dtype=np.int64)
    names = [entry.name for entry in session.get_inputs()][3:]
    return session.run(None, inputs | dict(zip(names, past, strict=True)))


def nothing(loaded: Loaded, batch: int) -> list[np.ndarray]:
    config = loaded.model.config
    empty = np.zeros((batch, config.num_key_value_heads, 0, config.head_dim), dtype=np.float32)
    return [empty] * (2 * config.num_hidden_layers)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [[1], [7], [7, 1], [1, 7], [7, 1, 1, 5], [30, 2]], ids=str)
def test_logits_are_ours_for_any_batch_and_pieces(pair: Any, batch: int, sizes: list[int]) -> None:
    loaded, out, _ = pair
    session, ids = session_of(out), tiny.tokens(batch, sum(sizes), exported.VOCAB)
    expected = loaded.model.scores(ids)
    assert expected.std() > 0.1
    past, done = nothing(loaded, batch), 0
    for size in sizes:
        logits, *past = run(session, ids[:, done : done + size], past)
        assert (torch.from_numpy(logits) - expected[:, done : done + size]).abs().max() <= 1e-4
        done += size
        assert past[0].shape[2] == done


def test_greedy_text_is_ours_six_times_longer_than_the_window(pair: Any) -> None:
    loaded, out, _ = pair
    engine, prompt = Engine(loaded.model, loaded.tokenizer, ()), "the king and queen"
    expected = engine.generate(prompt, Sampling(temperature=0), 30).tokens
    session, past, made = session_of(out), nothing(loaded, 1), list[int]()
    given = torch.tensor([engine.prompt_ids(prompt)])
    while len(made) < 30:
        logits, *past = run(session, given, past)
        made.append(int(logits[0, -1].argmax()))
        given = torch.tensor([made[-1:]])
    assert made == expected


def test_the_folder_has_names_as_optimum_has_them_a_manifest_and_the_proof(pair: Any) -> None:
    loaded, out, result = pair
    assert result["parity"]["logits"] <= 1e-4 and result["parity"]["tokens"] == 300
    assert "16 tokens of greedy text are equal" in result["parity"]["line"]
    assert set(folder.verify(out)["files"]) == {
        "model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert 0.7 * result["estimated_bytes"] < result["bytes"] <= result["estimated_bytes"]
    assert (out / "tokenizer.json").read_bytes() == (loaded.path / "tokenizer.json").read_bytes()
    session = session_of(out)
    layers = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [entry.name for entry in session.get_inputs()] == [
        "input_ids", "position_ids", "attention_mask", *(f"past_key_values.{name}" for name in layers),
    ]  # fmt: skip
    assert [entry.name for entry in session.get_outputs()] == ["logits", *(f"present.{name}" for name in layers)]


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return exported.folder(tmp_path / "m", exported.CASES["qwen3"] | {"num_hidden_layers": 1})


def refused(loaded: Loaded, words: str, error: type[GptworksError], **options: Any) -> None:
    with pytest.raises(error, match=words):
        lifecycle.export(loaded, "onnx", loaded.path.parent / "out", **options)
    assert os.listdir(loaded.path.parent) == ["m"]


@pytest.mark.slow
def test_weights_beside_the_graph_where_they_are_many(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROTOBUF", 1000)
    result = lifecycle.export(loaded, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > (tmp_path / "out" / "model.onnx").stat().st_size / 2
    assert result["parity"]["logits"] <= 1e-4 and "model.onnx.data" in folder.verify(tmp_path / "out")["files"]
    os.rename(tmp_path / "out", tmp_path / "elsewhere")
    session_of(tmp_path / "elsewhere")


class Broken:
    """A session that computes something else."""

    def __init__(self, session: Any, what: str) -> None:
        self.session, self.what = session, what

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.what == "mask":
            inputs = inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}
        logits, *present = self.session.run(outputs, inputs)
        if self.what == "logits":
            logits[..., -1, 5] += 0.01
        if self.what == "nan":
            logits[..., 5] = np.nan
        if self.what in ("past", "greedy"):
            present = [-3 * value for value in present]
        return [logits, *present]


@pytest.mark.parametrize(
    ("what", "words"),
    [("logits", "differ by 0.01"), ("nan", "not finite"), ("mask", "differ"), ("past", "differ"),
     ("greedy", "greedy text is")],
)  # fmt: skip
def test_a_graph_that_computes_something_else_is_not_kept(
    what: str, words: str, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, out, _ = pair
    session, name = session_of(out), "model.onnx"
    monkeypatch.setattr(module.ONNX, "write", lambda self, path: shutil.copyfile(out / name, path / name))
    lifecycle.export(loaded, "onnx", tmp_path / "good")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **options: Broken(session, what))
    if what == "greedy":  # which tells also where the logits do not
        monkeypatch.setattr(module.ONNX, "_padded", lambda *arguments: 0.0)
    with pytest.raises(DataError, match=words):
        lifecycle.export(loaded, "onnx", tmp_path / "out")
    assert os.listdir(tmp_path) == ["good"]


def test_wrong_usage_a_full_disk_and_a_missing_library(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(loaded, "q8_0.*f32", UsageError, kind="q8_0")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        refused(loaded, "1 kB are free", StorageError)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    refused(loaded, "gptworks.onnx.*onnxscript", UsageError)
