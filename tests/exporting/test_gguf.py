"""A GGUF file has what llama.cpp's loader reads, is compared with its source, and is not there where that fails."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import tiny
import torch
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from gptworks import lifecycle
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.data.published import byte_alphabet
from gptworks.data.tokenizer import Tokenizer
from gptworks.exporting import gguf as module
from gptworks.exporting.gguf import GGUF
from gptworks.model.build import Loaded
from gptworks.model.rope import rotary_table

gguf = pytest.importorskip("gguf")


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Fields, tensors as float32, their types."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Loaded]:
    def made(case: str, own: Tokenizer | None = None, **values: Any) -> Loaded:
        return exported.folder(tmp_path / "m", exported.CASES[case] | values, own)

    return made


def refused(loaded: Loaded, *words: str, kind: str = "f16", error: type[Exception] = DataError) -> None:
    out = loaded.path.parent / "out.gguf"
    with pytest.raises(error) as found:
        lifecycle.export(loaded, "gguf", out, kind=kind)
    assert "\n" not in str(found.value) and all(word in str(found.value) for word in words), found.value
    assert sorted(os.listdir(loaded.path.parent)) == ["m"]


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", exported.CASES)
def test_f32_has_every_weight_to_the_bit_and_the_parity_says_so(case: str, make, tmp_path: Path) -> None:
    loaded = make(case)
    result = lifecycle.export(loaded, "gguf", tmp_path / "m.gguf", kind="f32", tokens=200)
    parity = result["parity"]
    assert parity["logits"] == 0 and parity["loss"] == parity["exported_loss"] and parity["tokens"] == 200
    assert "equal to the source" in parity["line"] and "200 tokens" in parity["line"]
    assert result["bytes"] == os.path.getsize(tmp_path / "m.gguf") <= result["estimated_bytes"]
    _, tensors, types = read(tmp_path / "m.gguf")
    assert set(types.values()) == {"F32"}
    held = sum(p.numel() for p in loaded.model.parameters()) + tensors.get("rope_freqs.weight", np.zeros(0)).size
    assert held == sum(tensor.size for tensor in tensors.values())
    assert ("output.weight" in tensors) != loaded.model.config.tie_word_embeddings
    for name, value in loaded.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            assert np.array_equal(tensors[module._name(name)], value.detach().numpy()), name


def test_neighbouring_channels_turn_together_in_the_llama_layout(make) -> None:
    """What llama.cpp computes with its layout, pairs (2i, 2i+1), is what we compute with ours, (i, i + C/2)."""
    loaded = make("llama-tied")
    weights = dict(loaded.model.named_parameters())
    for part, heads in (("q", 4), ("k", 2)):
        ours = weights[f"model.layers.1.self_attn.{part}_proj.weight"].detach()
        theirs = dict(GGUF(loaded, "f32")._tensors())[f"blk.1.attn_{part}.weight"]
        x, angles = torch.randn(32), rotary_table(torch.tensor([7]), 8, 1e4)
        cos, sin = (t.flatten() for t in angles)
        low, high = (ours @ x).view(heads, 2, 4).unbind(1)
        even, odd = (theirs @ x).view(heads, 4, 2).unbind(2)
        assert torch.allclose(low * cos - high * sin, even * cos - odd * sin)
        assert torch.allclose(high * cos + low * sin, odd * cos + even * sin)


@pytest.mark.parametrize("kind", GGUF.kinds)
@pytest.mark.parametrize("case", ["gpt2-untied", "qwen3-tied", "llama-bias"])
def test_each_type_is_that_of_the_writer_and_what_is_left_out_of_it(case: str, kind: str, make, tmp_path: Path) -> None:
    loaded = make(case)
    result = lifecycle.export(loaded, "gguf", tmp_path / "m.gguf", kind=kind)
    fields, tensors, types = read(tmp_path / "m.gguf")
    head = "token_embd.weight" if case == "qwen3-tied" else "output.weight"
    small = kind[:2] in ("q4", "q5")
    for name, tensor in tensors.items():
        exact = tensor.ndim == 1 or name == "position_embd.weight"
        assert types[name] == ("F32" if exact else "Q8_0" if small and name == head else kind.upper())
    assert fields["general.file_type"] == {
        "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32,
    }[kind]  # fmt: skip
    assert (result["parity"]["logits"] == 0) == (kind == "f32") and result["parity"]["logits"] < 4
    assert not result["notes"]


def test_rows_that_are_no_multiple_of_a_block_stay_f16_and_it_is_said(make, tmp_path: Path) -> None:
    result = lifecycle.export(make("llama", intermediate_size=40), "gguf", tmp_path / "m.gguf", kind="q8_0")
    types = read(tmp_path / "m.gguf")[2]
    assert {name for name, kind in types.items() if kind == "F16"} == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert "2 matrices stay F16" in result["notes"][0]


# -- metadata ----------------------------------------------------------------------------------------------------


def test_shape_and_positions_are_said_as_llama_cpp_reads_them(make, tmp_path: Path) -> None:
    lifecycle.export(make("qwen3", rms_norm_eps=1e-5), "gguf", tmp_path / "m.gguf")
    fields = read(tmp_path / "m.gguf")[0]
    assert fields["general.architecture"] == "qwen3" and fields["general.name"] == "m"
    found = {name.removeprefix("qwen3."): value for name, value in fields.items() if name.startswith("qwen3.")}
    assert found == {
        "vocab_size": 330, "context_length": 96, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16, "rope.freq_base": 10_000.0,
    }  # fmt: skip


def test_scaled_positions(make, tmp_path: Path) -> None:
    for case in ("llama-linear", "llama-yarn", "llama-yarn-factor", "llama-llama3"):
        lifecycle.export(make(case), "gguf", tmp_path / f"{case}.gguf")
        shutil.rmtree(tmp_path / "m")
    said = {file.stem: read(file) for file in tmp_path.glob("*.gguf")}
    linear, yarn, factor, llama3 = (said[f"llama-{n}"][0] for n in ("linear", "yarn", "yarn-factor", "llama3"))
    assert linear["llama.rope.scaling.type"] == "linear" and linear["llama.rope.scaling.factor"] == 3
    assert yarn["llama.rope.scaling.type"] == "yarn" and yarn["llama.rope.scaling.original_context_length"] == 500
    assert yarn["llama.rope.scaling.attn_factor"] == pytest.approx(1)
    assert factor["llama.rope.scaling.attn_factor"] == pytest.approx(0.8 / (0.1 * np.log(4) + 1))
    assert "llama.rope.scaling.type" not in llama3
    factors = said["llama-llama3"][1]["rope_freqs.weight"]
    assert factors.shape == (4,) and factors[0] == 1 and factors[-1] == pytest.approx(4)


def test_a_window_bounds_the_context(make, tmp_path: Path) -> None:
    result = lifecycle.export(make("mistral"), "gguf", tmp_path / "m.gguf")
    fields = read(tmp_path / "m.gguf")[0]
    assert fields["general.architecture"] == "llama" and fields["llama.context_length"] == exported.WINDOW
    assert "window" in result["notes"][0]


# -- the tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "pre"), [("gpt-2", "gpt-2"), ("qwen2", "qwen2"), ("llama-bpe", "dbrx"), ("gpt-4o", "gpt-4o")]
)
def test_the_tokenizer_is_there_whole(pattern: str, pre: str, make, tmp_path: Path) -> None:
    own = exported.tokenizer(pattern)
    loaded = make("llama", own)
    (loaded.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    lifecycle.export(loaded, "gguf", tmp_path / "m.gguf")
    fields = read(tmp_path / "m.gguf")[0]
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if "tokenizer." in name}
    assert found["model"] == "gpt2" and found["pre"] == pre and found["add_bos_token"] is False
    assert found["bos_token_id"] == found["eos_token_id"] == found["padding_token_id"] == own.eos_id
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    vocab = own.backend.get_vocab()
    assert {token: number for number, token in enumerate(found["tokens"][: len(own)])} == vocab
    assert found["tokens"][len(own) :] == [f"[PAD{number}]" for number in range(len(own), 330)]
    kinds = np.array(found["token_type"])
    assert set(np.flatnonzero(kinds == 3)) == set(own.control_tokens.values()) and set(kinds[len(own) :]) == {5}
    merges = json.loads(own.backend.to_str())["model"]["merges"]
    assert found["merges"] == [" ".join(merge) for merge in merges]


def with_state(own: Tokenizer, change: Callable[[Any], None]) -> Tokenizer:
    change(own.backend)
    return Tokenizer(own.backend, own.config)


def test_words_that_are_tokens_are_taken_whole_as_llama_3_does(make, tmp_path: Path) -> None:
    state = json.loads(exported.tokenizer("llama-bpe").backend.to_str())
    state["model"]["ignore_merges"] = True
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    own = Tokenizer(type(exported.tokenizer().backend).from_str(json.dumps(state)), config)
    lifecycle.export(make("llama", own), "gguf", tmp_path / "m.gguf")
    fields = read(tmp_path / "m.gguf")[0]
    assert fields["tokenizer.ggml.pre"] == "llama-bpe" and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == own.bos_id == 1
    assert fields["tokenizer.ggml.eos_token_id"] == own.eos_id == 2


def test_characters_and_bytes_become_byte_level_tokens(make, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab é日 " * 50)
    own = Tokenizer.train_characters("ab é日")
    lifecycle.export(make("gpt2", own, vocab_size=6), "gguf", tmp_path / "c.gguf", data=str(file))
    fields = read(tmp_path / "c.gguf")[0]
    letters = byte_alphabet()
    spelled = ["<|endoftext|>", *("".join(letters[b] for b in c.encode()) for c in sorted("ab é日"))]
    assert fields["tokenizer.ggml.tokens"] == spelled
    e, sun = ([letters[b] for b in c.encode()] for c in "é日")
    assert set(fields["tokenizer.ggml.merges"]) == {" ".join(e), " ".join(sun[:2]), f"{sun[0]}{sun[1]} {sun[2]}"}
    shutil.rmtree(tmp_path / "m")
    lifecycle.export(make("gpt2", Tokenizer.of_bytes()), "gguf", tmp_path / "b.gguf")
    assert read(tmp_path / "b.gguf")[0]["tokenizer.ggml.tokens"][:256] == letters


def test_pieces_of_sentencepiece_are_scored_by_the_order_of_their_merges(make, tmp_path: Path) -> None:
    own = exported.llama_pieces()
    result = lifecycle.export(make("llama", own, vocab_size=440), "gguf", tmp_path / "m.gguf")
    fields = {key.split(".", 2)[2]: value for key, value in read(tmp_path / "m.gguf")[0].items() if ".ggml." in key}
    assert not result["notes"] and fields["model"] == "llama" and fields["add_space_prefix"] is True
    assert fields["add_bos_token"] is True and fields["bos_token_id"] == 1 and fields["eos_token_id"] == 2
    assert fields["unknown_token_id"] == 0 and "merges" not in fields
    assert fields["token_type"][:259] == [2, 3, 3, *[6] * 256] and set(fields["token_type"][420:]) == {5}
    merges = json.loads(own.backend.to_str())["model"]["merges"]
    order = list(dict.fromkeys(left + right for left, right in merges))
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    assert len(order) > 50 and sorted(order, key=lambda token: -scores[token]) == order
    assert max(score for token, score in scores.items() if token not in order) < min(scores[token] for token in order)


SPACE = normalizers.Replace(" ", "\u2581")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (lambda: exported.pieces(None, pre_tokenizers.Metaspace(split=False, prepend_scheme="first")), "begins with"),
        (lambda: exported.pieces([SPACE], pre_tokenizers.Whitespace()), "another way"),
        (lambda: exported.pieces([normalizers.NFKC(), SPACE]), "NFKC"),
        (lambda: exported.pieces([normalizers.Lowercase()]), "another way"),
    ],
    ids=["metaspace", "words", "nfkc", "lowercase"],
)
def test_what_llama_cpp_does_otherwise_with_pieces_is_said(own: Any, words: str, make, tmp_path: Path) -> None:
    loaded = make("llama", own(), vocab_size=440)
    if words == "begins with":
        assert words in lifecycle.export(loaded, "gguf", tmp_path / "m.gguf")["notes"][0]
    else:
        refused(loaded, words, "--format onnx")


def test_merges_that_only_llama_cpp_makes_are_said(make, tmp_path: Path) -> None:
    state = json.loads(exported.llama_pieces().backend.to_str())
    merges = state["model"]["merges"]
    lost = next(place for place, merge in enumerate(merges) if "".join(merge) == "".join(merges[place + 1]))
    left, right = merges.pop(lost)
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    own = Tokenizer(type(exported.tokenizer().backend).from_str(json.dumps(state)), config)
    (note,) = lifecycle.export(make("llama", own, vocab_size=440), "gguf", tmp_path / "m.gguf")["notes"]
    assert f"merges {left!r} and {right!r}, which" in note
    merges.append([left, right])
    own = Tokenizer(type(exported.tokenizer().backend).from_str(json.dumps(state)), config)
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m.gguf").unlink()
    refused(make("llama", own, vocab_size=440), "do not follow one another")


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(True),
                                                                        pre_tokenizers.ByteLevel(False)])), "by none"),
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (lambda b: setattr(b.model, "dropout", 0.1), "dropout"),
        (lambda b: b.add_tokens([AddedToken("sea", lstrip=True)]), "'sea'"),
    ],
    ids=["pattern", "normalizer", "dropout", "added"],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(change: Any, words: str, make) -> None:
    refused(make("llama", with_state(exported.tokenizer(), change)), words, "--format onnx")


@pytest.mark.parametrize("case", ["front", "spelling"])
def test_a_tokenizer_with_more_than_the_file_can_say_is_refused(case: str, make) -> None:
    state = json.loads(exported.tokenizer().backend.to_str())
    if case == "front":
        twice = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}] * 2
        state["post_processor"] = {
            "type": "TemplateProcessing", "single": [*twice, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }  # fmt: skip
    else:
        state["model"]["vocab"]["[PAD329]"] = 325
    own = Tokenizer(type(exported.tokenizer().backend).from_str(json.dumps(state)), {"eos_token": "<|im_end|>"})
    refused(make("llama", own), "more than one token" if case == "front" else "spelled alike")


def test_a_token_after_a_text_is_not_put_before_it(make, tmp_path: Path) -> None:
    state = json.loads(exported.tokenizer().backend.to_str())
    state["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
                                                 {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}},
    }  # fmt: skip
    own = Tokenizer(type(exported.tokenizer().backend).from_str(json.dumps(state)), {"eos_token": "<|im_end|>"})
    assert own.front == []
    lifecycle.export(make("llama", own), "gguf", tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.add_bos_token"] is False


def test_scores_of_a_unigram_vocabulary_are_refused(make) -> None:
    own = exported.tokenizer()
    vocab = [(token, -1.0) for token, _ in sorted(own.backend.get_vocab().items(), key=lambda item: item[1])]
    refused(make("llama", with_state(own, lambda b: setattr(b, "model", models.Unigram(vocab, 0, False)))), "Unigram")


def test_a_number_that_a_file_has_no_room_for_is_refused(make) -> None:
    refused(make("llama", max_position_embeddings=5 * 10**9), "no room for", "context_length")


def test_unicode_normalisation_is_said(make, tmp_path: Path) -> None:
    own = with_state(exported.tokenizer(), lambda backend: setattr(backend, "normalizer", normalizers.NFC()))
    assert "NFC" in lifecycle.export(make("llama", own), "gguf", tmp_path / "m.gguf")["notes"][0]


@pytest.mark.parametrize(
    ("case", "values", "words"),
    [
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("qwen3", {"attention_bias": True}, "bias at attn_"),
        ("qwen3", exported.LLAMA3, "llama3"),
        ("llama", {"rope_parameters": exported.YARN["rope_parameters"] | {"beta_fast": 20}}, "beta_fast"),
        ("llama", {"model_type": "olmo2"}, "no row for olmo2"),
    ],
    ids=str,
)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, values: dict, words: str, make) -> None:
    refused(make(case, **values), words, "--format onnx")


def test_what_a_type_cannot_hold_is_refused(make) -> None:
    loaded = make("llama")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] = 70_000.0
    refused(loaded, "blk.1.ffn_up.weight", "f16", "--type bf16")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    refused(loaded, "blk.1.ffn_up.weight", kind="f32")


def test_wrong_usage_is_refused_before_anything_is_written(make, tmp_path: Path) -> None:
    loaded = make("llama")
    refused(loaded, "q8_1", "q8_0", kind="q8_1", error=UsageError)
    with pytest.raises(UsageError, match="gguff.*gguf"):
        lifecycle.export(loaded, "gguff", tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="is there already"):
        lifecycle.export(loaded, "gguf", tmp_path / "m")
    planned = lifecycle.export(loaded, "gguf", tmp_path / "m.gguf", dry_run=True)
    assert planned["estimated_bytes"] > 50_000 and "parity" not in planned
    assert os.listdir(tmp_path) == ["m"]


def test_a_full_disk_is_found_before(make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(loaded, "kB", "1 kB are free", error=StorageError)


def test_a_missing_library_says_what_to_install(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(make("llama"), 'pip install "gptworks[gguf]"', error=UsageError)


# -- the proof can fail ------------------------------------------------------------------------------------------


def broken_write(change: Callable[[bytearray, Any], None]) -> Callable[[GGUF, Path], None]:
    real = GGUF.write

    def write(self: GGUF, path: Path) -> None:
        real(self, path)
        content = bytearray(path.read_bytes())
        change(content, gguf.GGUFReader(path))
        path.write_bytes(content)

    return write


def flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_one_flipped_bit_anywhere_in_the_weights_fails(kind: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("llama-tied")

    def change(content: bytearray, reader: Any) -> None:
        flip(content, reader.tensors[7].data_offset + 5)

    monkeypatch.setattr(GGUF, "write", broken_write(change))
    refused(loaded, "nothing was kept", kind=kind)


@pytest.mark.parametrize("key", ["llama.rope.freq_base", "llama.attention.head_count", "tokenizer.ggml.eos_token_id"])
def test_a_wrong_field_fails(key: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("llama")

    def change(content: bytearray, reader: Any) -> None:
        field = reader.fields[key]
        flip(content, field.offset + 8 + len(key) + 4)

    monkeypatch.setattr(GGUF, "write", broken_write(change))
    refused(loaded, key, "nothing was kept")


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0"])
def test_a_wrong_place_fails_where_it_is_read_back(kind: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and compared alike, and still another model."""
    loaded, real = make("llama"), GGUF._tensors
    swap = {"blk.0.ffn_gate.weight": "blk.0.ffn_up.weight", "blk.0.ffn_up.weight": "blk.0.ffn_gate.weight"}
    monkeypatch.setattr(GGUF, "_tensors", lambda self: ((swap.get(n, n), v) for n, v in real(self)))
    refused(loaded, "is another matrix", kind=kind)


def test_a_decoder_that_computes_otherwise_fails(make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, real = make("llama"), GGUF._model

    def model(self: GGUF, tensors: Any) -> Any:
        made = real(self, tensors)
        made.model.norm.eps = 0.5
        return made

    monkeypatch.setattr(GGUF, "_model", model)
    refused(loaded, "logits differ", kind="f32")


def test_a_quantiser_that_rounds_badly_fails(make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, real = make("llama"), gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: real(data * np.float32(1.02), kind))
    refused(loaded, "too far from the source", kind="q8_0")


def test_an_interrupt_leaves_nothing(make, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("llama")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GGUF, "check", stop)
    refused(loaded, error=KeyboardInterrupt)


def test_what_a_killed_export_left_goes_away_with_the_next(make, tmp_path: Path) -> None:
    loaded = make("llama")
    (tmp_path / ".m.gguf.999999999.tmp").write_bytes(b"half")
    lifecycle.export(loaded, "gguf", tmp_path / "m.gguf")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.gguf"]


def test_text_too_short_to_compare_on_is_refused(make, tmp_path: Path) -> None:
    backend = exported.tokenizer().backend
    own = Tokenizer(type(backend).from_str(backend.to_str().replace("<|endoftext|>", "<|x|>")), {})
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="too little text"):
        lifecycle.export(make("llama", own), "gguf", tmp_path / "m.gguf", data=str(tmp_path / "one.txt"))


def test_an_export_is_compared_on_the_runs_own_validation_text_where_that_is_at_hand(make, tmp_path, capsys) -> None:
    loaded = make("gpt2", tiny.tokenizer(), vocab_size=31)
    with pytest.raises(DataError, match="shakespeare: the text to compare on is not in this .*--data FILE"):
        lifecycle.export(loaded, "gguf", tmp_path / "a.gguf")
    data = loaded.path.parent / "data"
    data.mkdir()
    (data / "validation.jsonl").write_text(json.dumps({"text": tiny.text(300)}) + "\n")
    result = lifecycle.export(loaded, "gguf", tmp_path / "a.gguf", tokens=40)
    assert f"compared on {data / 'validation.jsonl'}" in capsys.readouterr().err
    ids = torch.tensor([[loaded.tokenizer.start_id, *loaded.tokenizer.encode(tiny.text(300))[:40]]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(loaded.model.scores(ids[:, :-1])[0], ids[0, 1:])
    assert result["parity"]["loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("kind", ["q4_k_m", "Q6_K", "iq2_xs", "tq1_0"])
def test_types_that_llama_cpp_makes_are_told_how_to_get(kind: str, make, tmp_path: Path) -> None:
    wanted, loaded = f"f16 .*llama-quantize F16.gguf OUT.gguf {kind.upper()}", make("gpt2")
    with pytest.raises(UsageError, match=wanted) as error:
        lifecycle.export(loaded, "gguf", tmp_path / "a.gguf", kind=kind)
    assert error.value.code == 64
    with pytest.raises(UsageError, match="did you mean .q4_1"):
        lifecycle.export(loaded, "gguf", tmp_path / "a.gguf", kind="q4_7")
    assert lifecycle.export(loaded, "gguf", tmp_path / "a.gguf", kind="Q8_0", dry_run=True).type == "q8_0"
