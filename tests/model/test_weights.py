"""Weights between files and memory: every value once, in the precision that is asked for, hashed on the way."""

import hashlib
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from gptworks.core.errors import DataError, NotFinite
from gptworks.model import build, lowbit, weights
from gptworks.model.config import parameter_count

STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(dtype=torch.float32):
    """One longer than a piece that is read at a time, one of a single value, one of none."""
    draw = torch.Generator().manual_seed(1)
    long = torch.randn(3, weights.PIECE // 4 + 5, generator=draw).to(dtype)
    return {"b.long": long, "a": torch.tensor(2.5, dtype=dtype), "c": torch.empty(0, 3, dtype=dtype)}


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_what_is_read_is_what_was_written(tmp_path, stored, asked):
    file, wanted = tmp_path / "x.safetensors", tensors(stored)
    save_file(wanted, file)
    hashes = {}
    for found in (dict(weights.stream(file, asked, hashes)), dict(weights.mapped(file, asked))):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == (asked or stored) and torch.equal(found[name], value.to(asked or stored)), name
    assert hashes == {"x.safetensors": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_what_is_written_others_read_and_its_hash_is_given(tmp_path):
    file = tmp_path / "x.safetensors"
    wanted = {**tensors(), "half": torch.ones(3, dtype=torch.bfloat16), "turned": torch.randn(4, 6).t()}
    assert weights.write(file, wanted, {"format": "pt"}) == hashlib.sha256(file.read_bytes()).hexdigest()
    found = load_file(file)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    wanted["b.long"][-1, -1] = float("nan")
    with pytest.raises(NotFinite, match="b.long"):
        weights.write(file, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, stored, value):
    file = tmp_path / "x.safetensors"
    for place in (0, -1):
        bad = tensors(stored)
        bad["b.long"].view(-1)[place] = value
        save_file(bad, file)
        for read in (weights.stream, weights.mapped):
            with pytest.raises(DataError, match="b.long has values that are not finite"):
                dict(read(file))


def test_numbers_too_large_for_what_is_asked_are_refused(tmp_path):
    save_file({"a": torch.tensor([1e5])}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="not finite"):
        dict(weights.stream(tmp_path / "x.safetensors", torch.float16))


def test_finite_numbers_whose_sum_is_not_are_fine(tmp_path):
    save_file({"a": torch.full((1000,), 3e38)}, tmp_path / "x.safetensors")
    assert len(weights.read(tmp_path / "x.safetensors")["a"]) == 1000


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_as_stored_and_mapped_the_model_is_the_same(tmp_path, family):
    model = tiny.model(vocab_size=31, family=family)
    build.save(tmp_path / "m", model, tiny.tokenizer(), {}, torch.bfloat16)
    ids = tiny.tokens(2, 9)
    full = build.load(tmp_path / "m")
    stored = build.load(tmp_path / "m", dtype=None, mmap=True)
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert {p.dtype for p in stored.model.parameters()} == {torch.bfloat16}
    assert full.weights_sha256 == stored.weights_sha256
    assert torch.equal(full.model(ids).hidden, stored.model.float()(ids).hidden)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_base_from_the_file_computes_what_one_in_memory_does(tmp_path, held, stored, tied):
    model = tiny.model(vocab_size=31, family="llama", tie_word_embeddings=tied, bias=True)
    build.save(tmp_path / "m", model, tiny.tokenizer(), {}, stored)
    copied, there = build.load(tmp_path / "m"), build.load_base(tmp_path / "m", None, held)
    assert {p.dtype for p in there.model.parameters()} == {stored}
    first, second = (lowbit.hold(loaded.model, held) for loaded in (copied, there))
    for (name, one), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    ids = tiny.tokens(2, 9)
    assert torch.allclose(first.scores(ids), second.scores(ids), rtol=1e-5, atol=1e-6)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    build.save(tmp_path / "m", tiny.model(vocab_size=31), tiny.tokenizer(), {})
    for name in ("gptworks.json", "manifest.json"):
        (tmp_path / "m" / name).unlink()
    first = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "first.safetensors")
    (tmp_path / "m" / "second.safetensors").write_bytes(first.read_bytes())
    (tmp_path / "m" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}'
    )
    with pytest.raises(DataError, match="in another file of the folder too"):
        build.load(tmp_path / "m")


# -- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from gptworks.model import build
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
build.load(sys.argv[2])  # what is loaded once
before = status("VmRSS")
loaded = build.load(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("family", "stored"), [("gpt2", torch.float32), ("qwen3", torch.bfloat16)], ids=str)
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, family, stored, zygote):
    sizes = {"hidden_size": 512, "num_hidden_layers": 15, "num_attention_heads": 8, "family": family}
    model = tiny.model(vocab_size=8000, context=64, **sizes)
    size = 4 * parameter_count(model.config)
    assert 1.9e8 < size < 2.4e8
    build.save(tmp_path / "model", model, tiny.tokenizer(), {}, stored)
    build.save(tmp_path / "small", tiny.model(family=family), tiny.tokenizer(), {}, stored)
    del model
    taken = int(zygote.python(MEASURE, str(tmp_path / "model"), str(tmp_path / "small")))
    assert 1.0 < taken / size < 1.2


@pytest.mark.parametrize("mmap", [False, True])
def test_masks_that_old_folders_store_are_passed_over(tmp_path, mmap):
    """Of any type, and with values that are not finite: they are no weights."""
    saved = tiny.model(family="gpt2")
    build.save(tmp_path / "m", saved, tiny.tokenizer(), {})
    for name in ("gptworks.json", "manifest.json"):  # as of another program
        (tmp_path / "m" / name).unlink()
    file = tmp_path / "m" / "model.safetensors"
    mask = torch.ones(1, 1, 4, 4).tril()
    kinds = {"bias": mask.bool(), "masked_bias": torch.tensor(-torch.inf, dtype=torch.float16)}
    extra = {f"transformer.h.{layer}.attn.{name}": value.clone() for layer in (0, 1) for name, value in kinds.items()}
    extra["transformer.h.1.attn.bias"] = mask.to(torch.uint8)
    save_file({**load_file(file), **extra}, file)
    found = build.load(tmp_path / "m", mmap=mmap).model
    ids = tiny.tokens(1, 8)
    assert torch.equal(found(ids).hidden, saved(ids).hidden)


def test_what_a_base_has_beside_its_weights_goes_along(tmp_path):
    saved, tokenizer = tiny.model(family="qwen3"), tiny.tokenizer()
    build.save(tmp_path / "base", saved, tokenizer, {})
    base = tmp_path / "base"
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (base / "manifest.json").unlink()
    (base / "gptworks.json").unlink()
    loaded = build.load(base)
    build.save(tmp_path / "tuned", loaded.model, loaded.tokenizer, {}, base=loaded)
    again = build.load(tmp_path / "tuned")
    assert again.stop_ids == loaded.stop_ids and {3, 5} <= set(again.stop_ids)
    assert (tmp_path / "tuned" / "chat_template.jinja").read_text() == "{{ messages }}"
