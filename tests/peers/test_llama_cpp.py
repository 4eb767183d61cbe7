"""llama.cpp opens what we export and computes the same: ids, logits, greedy text, perplexity."""

import math
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from gptworks import lifecycle
from gptworks.data.tokenizer import Tokenizer
from gptworks.exporting.gguf import GGUF
from gptworks.infer.engine import Engine, Generation
from gptworks.infer.sampling import Sampling
from gptworks.model.build import Loaded

llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

TEXT = "the king's  old stones,\n\n walked 12345\tslowly"
F32 = 0  # of a cache, in llama.cpp's words


def opened(file: Path, context: int = exported.CONTEXT) -> Any:
    return llama_cpp.Llama(
        str(file), n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=F32, type_v=F32,
    )  # fmt: skip


def theirs(llama: Any, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(np.array(llama.scores[: len(ids)]))


@torch.no_grad()
def ours(model: Any, ids: list[int]) -> torch.Tensor:
    return model.scores(torch.tensor([ids]))[0]


@pytest.mark.parametrize("case", exported.CASES)
def test_logits_and_greedy_text_are_ours(case: str, tmp_path: Path) -> None:
    loaded = exported.folder(tmp_path / "m", exported.CASES[case])
    lifecycle.export(loaded, "gguf", tmp_path / "m.gguf", kind="f32")
    llama = opened(tmp_path / "m.gguf")
    ids = tiny.tokens(1, 40, 320)[0].tolist()  # fewer than any window
    expected, found = ours(loaded.model, ids), theirs(llama, ids)
    assert expected.std() > 0.3
    assert (expected - found).abs().max() <= (5e-3 if case.startswith("gpt2") else 1e-4)  # its GELU is a table in F16

    prompt = loaded.tokenizer.encode(TEXT)
    assert llama.tokenize(TEXT.encode(), add_bos=True, special=False) == prompt  # ours puts nothing before a text
    made = Generation("")
    for _ in Engine(loaded.model, loaded.tokenizer, ()).stream(prompt, Sampling(temperature=0), 12, result=made):
        pass
    tokens: list[int] = []
    llama.reset()
    llama.eval(prompt)
    for _ in range(12):
        tokens.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(tokens[-1:])
    assert tokens == made.tokens


WORDS = [
    "'Tis x_1 += 2;  We'LL go...\r\n\r\n",
    " Where?\n",
    "<|endoftext|> is text",
    "12 1234567",
    "a\u00a0b   \t c",
    "",
]
SCRIPTS = ["déjà vu, 红楼梦 🎉 привет", "e\u0301 ñ 日本語。テスト"]


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "gpt-2", "gpt-4o", "bytes", "characters", "pieces"])
def test_ids_and_text_are_those_of_our_tokenizer(kind: str, tmp_path: Path) -> None:
    samples = [TEXT, *WORDS, *(SCRIPTS if kind != "gpt-4o" else [])]
    if kind == "bytes":
        own = Tokenizer.of_bytes()
    elif kind == "characters":
        own = Tokenizer.train_characters(set("".join(samples)))
    elif kind == "pieces":
        own = exported.llama_pieces()
    else:
        own = Tokenizer.train_bpe([tiny.text(20_000), *samples * 9], 480, kind)
    raw, file = exported.CASES["qwen3"] | {"vocab_size": len(own)}, tmp_path / "text.txt"
    file.write_text(TEXT * 20)
    lifecycle.export(exported.folder(tmp_path / "m", raw, own), "gguf", tmp_path / "m.gguf", kind="f32", data=str(file))
    llama = opened(tmp_path / "m.gguf")
    for sample in samples:
        ids = own.encode(sample)
        assert llama.tokenize(sample.encode(), add_bos=True, special=False) == own.front + ids, sample
        assert not ids or llama.detokenize(ids).decode().removeprefix(" " if kind == "pieces" else "") == sample
    assert llama.token_eos() == own.eos_id


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that has learnt something, so that its perplexity is no accident."""
    wide = {"hidden_size": 64, "intermediate_size": 128} if request.param != "gpt2" else {"n_embd": 64, "n_inner": 128}
    loaded = exported.folder(tmp_path_factory.mktemp("trained") / "m", exported.CASES[request.param] | wide)
    ids = torch.tensor(loaded.tokenizer.encode(tiny.text(60_000, seed=2)))
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-3)
    for step in range(80):
        starts = torch.randint(len(ids) - 65, (16,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([ids[start : start + 65] for start in starts])
        logits = loaded.model.scores(rows[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded


@pytest.mark.parametrize("kind", GGUF.kinds)
def test_perplexity_on_2000_tokens_is_that_of_the_same_weights(trained: Loaded, kind: str, tmp_path: Path) -> None:
    lifecycle.export(trained, "gguf", tmp_path / "m.gguf", kind=kind)
    read = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    model, llama = GGUF(trained, kind)._model(read), opened(tmp_path / "m.gguf")
    ids = trained.tokenizer.encode(tiny.text(20_000, seed=3))
    nats, rows = np.zeros(2), range(0, 2000, 80)
    for start in rows:
        row, targets = ids[start : start + 80], torch.tensor(ids[start + 1 : start + 81])
        for place, logits in enumerate((ours(model, row), theirs(llama, row))):
            nats[place] += float(F.cross_entropy(logits, targets, reduction="sum"))
    perplexities = np.exp(nats / (80 * len(rows)))
    assert perplexities[0] < 60  # of 330: it learnt
    assert math.isclose(*perplexities, rel_tol=0.005), perplexities
