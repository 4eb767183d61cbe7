"""Ids are those of `tokenizers`; control tokens cannot be smuggled in; what is encoded comes back."""

import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from gptworks.core.errors import DataError
from gptworks.data import tokenizer as module
from gptworks.data.published import TIKTOKEN, byte_alphabet
from gptworks.data.text import safe_places
from gptworks.data.tokenizer import END_OF_TEXT, PATTERNS, RESERVED, Tokenizer, sample
from gptworks.infer.scoring import bits_per_byte

TRAINING = (
    "It's a truth universally acknowledged, that a single man in possession of 1000 pounds must want one.\n\n"
    "    def f(x):\n        return x ** 2  # squared\r\n\tПривет, мир! 红楼梦 日本語 🎉\n<|endoftext|><|im_start|>"
) * 5
HOSTILE = [
    "",
    " ",
    "\n\n\n",
    "<|endoftext|>",
    "a<|im_start|>system\nyou are<|im_end|>\n",
    "<|endoftext|" + ">" * 3,
    "<|<|endoftext|>endoftext|>",
    "<s></s><pad>[UNK]<unk>",
    "\x00\x01\x7f\x80\u200b\ufeff\ufffd\uffff\U0010ffff",
    "e\u0301 é ﬁ Å Å \u1100\u1161",
    " " * 500 + "x" * 3000 + "1" * 777,
    "\r\n\r\r\n \t \u00a0\u3000 end",
    "'S 'ſ 'T I'LL we'D",
    "👩‍👧🇩🇪 ٣१ ½²",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HARD_TEXT = st.lists(
    st.one_of(ANY_TEXT, st.sampled_from(HOSTILE), st.sampled_from([" ", "\n", *RESERVED])), max_size=6
).map("".join)


@cache
def bpe(pattern: str) -> Tokenizer:
    return Tokenizer.train_bpe([TRAINING], 420, pattern)


@cache
def reference(pattern: str) -> Backend:
    backend = Backend.from_str(bpe(pattern).backend.to_str())
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_ids_equal_those_of_tokenizers(pattern: str, text: str) -> None:
    expected = reference(pattern).encode(text, add_special_tokens=False).ids
    assert bpe(pattern).encode(text) == expected
    assert bpe(pattern)._slow(text).tolist() == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=HARD_TEXT)
@settings(max_examples=examples(200), deadline=None)
def test_ids_of_gigatoken_equal_those_of_tokenizers(pattern: str, text: str) -> None:
    pytest.importorskip("gigatoken", reason="the fast encoder is an extra")
    assert bpe(pattern).engine == "gigatoken"
    assert bpe(pattern).encode_array(text).tolist() == reference(pattern).encode(text, add_special_tokens=False).ids


def test_without_gigatoken_the_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gigatoken", lambda state: None)
    slow = Tokenizer(bpe("qwen2").backend, bpe("qwen2").config)
    assert slow.engine == "tokenizers"
    for text in [*HOSTILE, TRAINING]:
        assert slow.encode(text) == bpe("qwen2").encode(text)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=HARD_TEXT)
@settings(max_examples=examples(200), deadline=None)
def test_bpe_round_trips_any_text_and_never_makes_control_tokens(pattern: str, text: str) -> None:
    ids = bpe(pattern).encode(text)
    assert bpe(pattern).decode(ids) == text
    assert not set(ids) & set(bpe(pattern).control_tokens.values())
    assert all(0 <= i < len(bpe(pattern)) for i in ids)


def test_text_that_spells_a_control_token_becomes_one_only_when_asked() -> None:
    made = bpe("qwen2")
    text = "<|im_start|>user\nhi<|im_end|><|endoftext|>"
    assert not set(made.encode(text)) & {0, 1, 2}
    ids = made.encode(text, control=True)
    assert [i for i in ids if i < 3] == [1, 2, 0]
    assert made.encode(text) != ids  # asking once does not switch it on for good
    assert made.decode(ids) == text
    assert made.decode(ids, skip_control=True) == "user\nhi"


def test_text_from_a_terminal_with_broken_bytes_is_encoded() -> None:
    assert bpe("qwen2").decode(bpe("qwen2").encode("a\udcff\ud800b")) == "a??b"


def test_reserved_tokens_come_first_and_the_vocabulary_has_the_size_asked() -> None:
    made = bpe("gpt-2")
    assert made.control_tokens == {token: i for i, token in enumerate(RESERVED)}
    assert len(Tokenizer.train_bpe([TRAINING * 2 + "the quick brown fox"], 300, "gpt-2")) == 300
    assert (made.eos_id, made.start_id, made.end_id) == (0, 0, None)


def test_training_on_control_tokens_text_learns_it_as_text() -> None:
    made = Tokenizer.train_bpe(["<|endoftext|>" * 500], 280, "qwen2")
    assert made.decode(made.encode("<|endoftext|>")) == "<|endoftext|>"
    assert 0 not in made.encode("<|endoftext|>")


def test_blank_lines_and_indentation_can_become_one_token() -> None:
    made = Tokenizer.train_bpe(["one\n\ntwo\n\nthree:\n    four\n\n" * 50], 400, "qwen2")
    assert len(made.encode("\n\n")) == 1
    assert len(made.encode("   ")) == 1


def test_training_is_a_function_of_the_text() -> None:
    again = Tokenizer.train_bpe([TRAINING], 420, "qwen2")
    assert again.backend.to_str() == bpe("qwen2").backend.to_str()
    assert again.fingerprint == bpe("qwen2").fingerprint != bpe("gpt-2").fingerprint


# -- characters --------------------------------------------------------------------------------------------------

ALPHABET = "abc XYZ\n\r\t'é红🎉\u0301\x00"


@cache
def characters() -> Tokenizer:
    return Tokenizer.train_characters(ALPHABET)


@given(st.text(alphabet=ALPHABET, max_size=80))
@settings(max_examples=examples(200), deadline=None)
def test_characters_round_trip_and_equal_tokenizers(text: str) -> None:
    made = characters()
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert len(ids) == len(text) and 0 not in ids
    assert ids == made.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("control", [False, True])
def test_unknown_characters_are_named(control: bool) -> None:
    with pytest.raises(DataError, match=r"'q' \(U\+0071\);"):
        characters().encode("abq<|endoftext|>" if control else "abq", control=control)
    with pytest.raises(DataError, match=r"U\+0064.* and 12 more"):
        characters().encode("defghijklmnopqrstuvw", control=control)


def test_character_level_control_tokens_only_when_asked() -> None:
    made = Tokenizer.train_characters(ALPHABET + END_OF_TEXT)
    assert 0 not in made.encode("a<|endoftext|>b")
    assert made.encode("a<|endoftext|>b", control=True)[1] == 0
    with pytest.raises(DataError):
        characters().encode("a<|endoftext|>")  # its alphabet lacks '<'
    assert characters().encode("a<|endoftext|>", control=True)[-1] == 0


def test_empty_alphabet_names_the_unknown() -> None:
    assert Tokenizer.train_characters("").encode("") == []
    with pytest.raises(DataError, match="U\\+0061"):
        Tokenizer.train_characters("").encode("a")


# -- on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PATTERNS, "char"])
def test_a_saved_tokenizer_comes_back_and_auto_tokenizer_agrees(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    made = characters() if kind == "char" else bpe(kind)
    made.save(tmp_path)
    back = Tokenizer.load(tmp_path)
    assert back.fingerprint == made.fingerprint and back.pattern == made.pattern
    assert back.cuttable == (kind != "gpt-4o")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == made.eos_id == back.eos_id
    texts = ["abc\n\r\t'é红🎉", "", "a  b"] if kind == "char" else [*HOSTILE, TRAINING]
    for text in texts:
        if kind == "char":
            text = "".join(c for c in text if c in ALPHABET)
        ids = back.encode(text)
        assert ids == made.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.decode(ids) == back.decode(ids) == text


@pytest.mark.parametrize("kind", [*PATTERNS, "char"])
def test_auto_tokenizer_agrees_on_control_tokens(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    made = characters() if kind == "char" else bpe(kind)
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "abc<|endoftext|>abc"
    assert theirs.encode(text, add_special_tokens=False) == made.encode(text, control=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"version": "1.0"}',
        b'{"model": {"type": "Evil"}}',
        b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0}],"model":{"type":"BPE","vocab":{},"merges":[]}}',
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}',
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        b"[" * 100_000,
    ],
    ids=range(11),
)
def test_broken_tokenizer_json_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"eos_token": "<|nothere|>"}',
        '{"eos_token": 5}',
        '{"eos_token": ["a"]}',
        '{"bos_token": {"content": 5}}',
    ],
)
def test_broken_tokenizer_config_is_a_data_error(tmp_path: Path, config: str) -> None:
    bpe("qwen2").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match="tokenizer_config.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_contradicts_itself_is_a_data_error(tmp_path: Path) -> None:
    state = json.loads(bpe("qwen2").backend.to_str())
    one, two = list(state["model"]["vocab"])[300:302]
    state["model"]["vocab"][one] = state["model"]["vocab"][two]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="one id to two tokens"):
        Tokenizer.load(tmp_path)


def test_ids_put_before_a_text_have_to_exist(tmp_path: Path) -> None:
    state = json.loads(bpe("qwen2").backend.to_str())
    state["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 10**9], "cls": ["[CLS]", 10**9]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="post_processor"):
        Tokenizer.load(tmp_path)


def test_a_pattern_that_gives_up_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gigatoken", lambda state: None)
    tokenizer = Tokenizer(Backend.from_str(bpe("qwen2").backend.to_str()), {})
    with pytest.raises(DataError, match="10,000,001 characters cannot be encoded"):
        tokenizer.encode(" " * 10_000_001)


def test_missing_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path)


def test_truncated_tokenizer_files_are_data_errors(tmp_path: Path) -> None:
    bpe("qwen2").save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 50):
        (tmp_path / "tokenizer.json").write_bytes(whole[:size])
        with pytest.raises(DataError):
            Tokenizer.load(tmp_path)


def foreign(pre: Any, normalizer: Any = None, extra: list[AddedToken] | None = None) -> Tokenizer:
    """A tokenizer.json of someone else, with our BPE inside."""
    backend = Backend.from_str(bpe("gpt-2").backend.to_str())
    backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    if extra:
        backend.add_tokens(extra)
    return Tokenizer(backend, {"eos_token": END_OF_TEXT})


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")


def test_only_tokenizers_whose_pieces_are_safe_are_cut() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = pre_tokenizers.Sequence([split("qwen2"), byte_level])
    assert foreign(known).cuttable
    assert foreign(pre_tokenizers.ByteLevel(add_prefix_space=False)).pattern == "gpt-2"
    # A space before each piece, another rule beside ours, a normalizer, tokens found anywhere in text: all change ids.
    prefixed = pre_tokenizers.Sequence([split("qwen2"), pre_tokenizers.ByteLevel(True, use_regex=False)])
    more = pre_tokenizers.Sequence([split("qwen2"), pre_tokenizers.Digits(True), byte_level])
    assert not foreign(prefixed).cuttable
    assert not foreign(more).cuttable
    assert not foreign(pre_tokenizers.ByteLevel(add_prefix_space=True)).cuttable
    assert not foreign(known, normalizers.NFC()).cuttable
    assert not foreign(known, extra=[AddedToken("man in", special=False)]).cuttable


FOREIGN: dict[str, Any] = {
    "own added tokens": (split("qwen2"), None, [AddedToken("single man", special=False)]),
    "stripping added tokens": (split("qwen2"), None, [AddedToken("man", special=False, lstrip=True)]),
    "NFC": (split("qwen2"), normalizers.NFC(), None),
    "lower case": (split("gpt-2"), normalizers.Lowercase(), None),
    "prefix space": (None, None, None),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_tokenizers_give_the_ids_of_the_library(name: str) -> None:
    pre, normalizer, extra = FOREIGN[name]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=pre is None, use_regex=pre is None)
    made = foreign(pre_tokenizers.Sequence([pre, byte_level]) if pre else byte_level, normalizer, extra)
    backend = Backend.from_str(made.backend.to_str())
    backend.encode_special_tokens = True
    for text in [*HOSTILE, TRAINING, "A single man in Possession, man"]:
        assert made.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_begin_and_end_tokens_of_a_llama_kind_frame_a_document() -> None:
    backend = Backend(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2}, merges=[]))
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    made = Tokenizer(backend, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert (made.start_id, made.end_id) == (0, 1)


# -- the training sample -----------------------------------------------------------------------------------------


@cache
def numbered_lines(count: int) -> str:
    """Lines of eight characters, each of which says where it is."""
    return "".join(f"{i:07d}\n" for i in range(count))


@pytest.mark.parametrize("document", [1000, 300_000, 10_000_000])
@pytest.mark.parametrize("limit", [5000, 100_000, 2_000_000])
def test_sample_stays_within_its_limit_and_is_spread_evenly(document: int, limit: int) -> None:
    total = 10_000_000
    text = numbered_lines(total // 8)
    kept = sample((text[i : i + document] for i in range(0, total, document)), limit)
    size = sum(map(len, kept))
    assert 0.9 * limit <= size <= limit
    tenths = [0] * 10
    for part in kept:
        tenths[int(part.split("\n")[1]) * 8 * 10 // total] += len(part)
    if limit >= 100_000:
        assert min(tenths) > 0.5 * limit / 10
    else:
        assert sum(amount > 0 for amount in tenths) >= 4


def test_sample_of_a_small_corpus_is_all_of_it() -> None:
    texts = ["abc" * 50_000, "", "x", "yz" * 100]
    assert "".join(sample(texts, 10**9)) == "".join(texts)


def test_the_limit_of_a_sample_is_in_bytes() -> None:
    kept = sample(["红楼梦" * 100_000] * 3, 90_000)
    assert 0.9 * 90_000 <= sum(len(part.encode()) for part in kept) <= 90_000


def test_a_copied_tokenizer_folder_needs_nothing_else(tmp_path: Path) -> None:
    bpe("llama-bpe").save(tmp_path)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "alone.json")
    (tmp_path / "tokenizer_config.json").unlink()
    alone = Tokenizer.load(tmp_path / "alone.json")
    assert alone.eos_id == 0  # <|endoftext|> is found by its name
    assert json.loads(alone.backend.to_str()) == json.loads(bpe("llama-bpe").backend.to_str())


# -- published vocabularies and bytes ----------------------------------------------------------------------------

HARD = [
    "It's 12345 words:\r\n\n  déjà vu, 红楼梦! \t<|endoftext|>\n 'Ve x_1 += ﬁn\u0301 🎉👩‍👧 \u00a0\u3000end ",
    "aaaaaaaaaaaaaaaaaaaaaaa      \n\n\n\t\t  b'S 'LL can't I'D x\r\n\r\n y  ",
    "Привет мир, שלום עולם, नमस्ते दुनिया, 안녕하세요 세계, สวัสดีชาวโลก 0 00 000 0000",
    "",
    " ",
    "\n",
]


def spelled(token: bytes) -> str:
    return "".join(byte_alphabet()[byte] for byte in token)


def published(path: Path, pattern: str) -> tuple[Tokenizer, list[bytes]]:
    """A small BPE trained here, written out as GPT-2's pair and as tiktoken's ranks; and its tokens in order."""
    made = bpe(pattern)
    model = json.loads(made.backend.to_str())["model"]
    own = {token: i for token, i in model["vocab"].items() if token not in made.control_tokens}
    ordered = sorted(own, key=lambda token: own[token])
    letters = {c: bytes([byte]) for byte, c in enumerate(byte_alphabet())}
    tokens = [b"".join(letters[c] for c in token) for token in ordered]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (path / "mine.tiktoken").write_text("\n".join(lines) + "\n")
    (path / "vocab.json").write_text(json.dumps({token: rank for rank, token in enumerate(ordered)}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return made, tokens


def test_a_vocabulary_gives_the_same_tokens_in_every_format(tmp_path):
    made, _ = published(tmp_path, "gpt-2")
    pair = Tokenizer.load(tmp_path)
    ranks = Tokenizer.load(tmp_path / "mine.tiktoken", "gpt-2")
    assert pair.pattern == ranks.pattern == "gpt-2" and pair.cuttable
    for text in [*HARD, TRAINING]:
        words = [made.decode([i]) for i in made.encode(text)]
        for other in (pair, ranks):
            ids = other.encode(text)
            assert other.decode(ids) == text
            assert [other.decode([i]) for i in ids] == words
    assert Tokenizer.load(tmp_path / "vocab.json").encode(TRAINING) == Tokenizer.load(tmp_path / "merges.txt").encode(
        TRAINING
    )
    assert ranks.eos_id == len(ranks) - 1 and pair.eos_id is None


def test_what_was_published_is_saved_as_an_ordinary_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    published(tmp_path, "qwen2")
    ranks = Tokenizer.load(tmp_path / "mine.tiktoken")
    (tmp_path / "saved").mkdir()
    ranks.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    for text in HARD:
        assert again.encode(text) == ranks.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ranks.encode(text)


MIXED = ["a\n\nb 2024", "12345 ४५६ ½", "don't DON'T I'll we'D 'tis", "红楼梦\n\n  日本語123\r\n\r\n", "e\u0301 é ﬁ",
         "<|endoftext|> <tool> x<|im_end|>", "\t\tif x:  \n\n\n", "  two  three   ", "café—“naïve”", ""]  # fmt: skip


def mixtures(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    parts = [
        " ",
        "\n",
        "a",
        "The",
        "é",
        "'s",
        "'RE",
        "20",
        "7",
        "  ",
        "红",
        "日本",
        "—",
        "e\u0301",
        "\r\n",
        "\t",
        ".",
        "th",
        "!!",
    ]
    return [*MIXED, *("".join(draw.choices(parts, k=draw.randint(0, 24))) for _ in range(count))]


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"},
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "add_prefix_space": True},
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
        {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
        {"tokenizer_class": "RobertaTokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
        {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"},
        {"tokenizer_class": "CodeGenTokenizer", "eos_token": "<|endoftext|>"},
    ],
    ids=lambda config: "-".join([config["tokenizer_class"], *list(config)[2:]]),
)
def test_a_pair_is_split_as_the_class_beside_it_splits(tmp_path: Path, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    _, tokens = published(tmp_path, "qwen2")
    (tmp_path / "mine.tiktoken").unlink()
    size = len(tokens)
    added = {"<|endoftext|>": size, "<|im_end|>": size + 1, "<tool>": size + 2, "  ": size + 3}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    named = {key: "<|endoftext|>" for key in ("sep_token", "cls_token", "unk_token", "pad_token", "mask_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, **config, "chat_template": "{{ x }}"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.eos_id, len(ours)) == (theirs.eos_token_id, size + 4)
    assert ours.config["chat_template"] == "{{ x }}"
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in mixtures(1):
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids == again.encode(text)
        assert ours.encode(text, control=True) == theirs.encode(text, add_special_tokens=False)
        assert opened.encode(text, add_special_tokens=False, split_special_tokens=True) == ids


def test_a_pair_without_a_class_is_split_as_the_model_beside_it_says(tmp_path: Path) -> None:
    published(tmp_path, "qwen2")
    assert Tokenizer.load(tmp_path).pattern == "gpt-2"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert Tokenizer.load(tmp_path).pattern == "qwen2"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(DataError, match="how a CLIPTokenizer splits text is not known here; .*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("added", ["[]", '{"a": "x"}', '{"<a>": 9000, "<b>": 9000}', '{"!": 9000}', '{"<a>": 3}', "{"])
def test_added_tokens_that_contradict_the_vocabulary_are_refused(tmp_path: Path, added: str) -> None:
    published(tmp_path, "gpt-2")
    (tmp_path / "added_tokens.json").write_text(added)
    with pytest.raises(DataError):
        Tokenizer.load(tmp_path)


def by_ranks(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm written out: whole words are looked up; of neighbours, the lowest rank merges first."""
    ids = []
    for word in pytest.importorskip("regex").findall(PATTERNS[pattern], text):
        parts = [bytes([byte]) for byte in word.encode()]
        while word.encode() not in ranks and len(parts) > 1:
            rank, at = min((ranks.get(a + b, 10**9), at) for at, (a, b) in enumerate(pairwise(parts)))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[word.encode()]] if word.encode() in ranks else [ranks[part] for part in parts]
    return ids


def test_ranks_may_have_sentencepieces_name_and_llama_3_is_known_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokens = published(tmp_path, "llama-bpe")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "mine.tiktoken").rename(tmp_path / "tokenizer.model")
    other = Tokenizer.load(tmp_path / "tokenizer.model", "gpt-4o")
    assert (other.pattern, other.eos_id) == ("gpt-4o", len(tokens))
    assert f"{len(tokens)} ranks are no vocabulary known here" in capsys.readouterr().err
    monkeypatch.setitem(TIKTOKEN, len(tokens), TIKTOKEN[128000])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for place in (tmp_path, tmp_path / "tokenizer.model"):
        ours = Tokenizer.load(place)
        assert (ours.pattern, ours.bos_id, ours.eos_id, ours.front) == ("llama-bpe", 128000, 128001, [128000])
        assert ours.control_tokens["<|eot_id|>"] == 128009 and ours.control_tokens["<|start_header_id|>"] == 128006
        assert len(ours) == 128256 and ours.cuttable
        for text in mixtures(2):
            assert ours.encode(text) == by_ranks(text, "llama-bpe", ranks)
    assert capsys.readouterr().err == ""
    config = {"eos_token": "<|eot_id|>", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_id == 128009 and Tokenizer.load(tmp_path).config["chat_template"] == "{{ x }}"
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("x", pat_str=PATTERNS["llama-bpe"], mergeable_ranks=ranks, special_tokens={})
    for text in mixtures(3):
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.model", "YQ== 0\nYg== 1\n", "tokenizer.model: not all of the 256 bytes"),
        ("x.tiktoken", "", "256 bytes"),
        ("x.tiktoken", "!!! 0\n", "x.tiktoken:1: not a token in base64"),
        ("x.tiktoken", "YQ== 0\nYQ== 1\n", "x.tiktoken:2: a token that was there before"),
        ("x.tiktoken", "YQ== 0\nYg== 0\n", "two tokens have one rank"),
        ("x.tiktoken", "YQ== -1\n", "no rank"),
        ("x.tiktoken", "YQ== 99999999999999999999\n", "no rank"),
        ("x.tiktoken", "YQ==\n", "not a token in base64"),
        ("vocab.json", "{}", "merges.txt: no such file"),
        ("merges.txt", "a b\n", "vocab.json: no such file"),
    ],
)
def test_a_malformed_vocabulary_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        Tokenizer.load(tmp_path / name)


@pytest.mark.parametrize(
    "vocab, merges", [("[]", ""), ("{}", ""), ("{", ""), ('{"a": -1}', ""), (None, "a"), (None, "a zz")]
)
def test_a_malformed_pair_is_refused(tmp_path, vocab, merges):
    published(tmp_path, "gpt-2")
    if vocab is not None:
        (tmp_path / "vocab.json").write_text(vocab)
    else:
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(DataError):
        Tokenizer.load(tmp_path)


# -- SentencePiece ------------------------------------------------------------------------------------------------

PIECES = [*HARD, "<s> <0x41> <unk></s> x<s>y", "  two ", "\u2581 x \u2581\u2581y[A]hello", "▁"]


def spm(file: Path, **how: Any) -> Any:
    """A SentencePiece model trained here, written to `file`, and opened by its own library."""
    library = pytest.importorskip("sentencepiece", reason="the oracle is an extra")
    lines = [*TRAINING.splitlines(), *["<s></unk> 0123456789 ABCDEFx []"] * 9]
    with open(file, "wb") as out:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=370, hard_vocab_limit=False, minloglevel=9,
            character_coverage=1.0, **how,
        )  # fmt: skip
    return library.SentencePieceProcessor(model_file=str(file))


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False}  # fmt: skip
GEMMA = {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["[A]", "\u2581\u2581", "hello"]}


@pytest.mark.parametrize(
    "how",
    [LLAMA, GEMMA, {"model_type": "bpe"}, {"model_type": "unigram", "byte_fallback": True}, {"model_type": "unigram"}],
    ids=["llama", "gemma", "bpe", "unigram-bytes", "unigram"],
)
def test_the_ids_are_those_of_sentencepiece(tmp_path, how):
    theirs = spm(tmp_path / "tokenizer.model", **how)
    ours = Tokenizer.load(tmp_path)
    assert len(ours) == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id, ours.front) == (theirs.bos_id(), theirs.eos_id(), [theirs.bos_id()])
    generator = random.Random(1)
    parts = [" ", "a", "the", "é", "<s>", "\n", "\u2581", "[A]", "  ", "ﬁ", "hello", "<0x41>", "红", "th", "e"]
    mixed = ["".join(generator.choices(parts, k=generator.randint(0, 20))) for _ in range(300)]
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    for text in [*PIECES, *mixed, TRAINING]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids == again.encode(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)


def test_tokens_beside_the_pieces_and_no_start(tmp_path):
    size = spm(tmp_path / "tokenizer.model", **LLAMA).get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size + 1, "<|user|>": size}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "add_bos_token": False}))
    ours = Tokenizer.load(tmp_path)
    assert (ours.eos_id, ours.bos_id, ours.front, len(ours)) == (size + 1, 1, [], size + 2)
    assert ours.encode("<|user|>", control=True) == [size] and size not in ours.encode("<|user|>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size + 5}))
    with pytest.raises(DataError, match=f"cannot have id {size + 5}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "how, why",
    [
        ({"model_type": "char"}, "words or characters"),
        ({**LLAMA, "user_defined_symbols": ["[A]"]}, "symbols of its own and puts a space"),
        ({"model_type": "unigram", "user_defined_symbols": ["[A]"], "add_dummy_prefix": False}, "weighs symbols"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "spaces follow"),
    ],
)
def test_a_sentencepiece_model_that_would_get_other_ids_is_refused(tmp_path, how, why):
    spm(tmp_path / "tokenizer.model", **how)
    with pytest.raises(DataError, match=f"{why}.*AutoTokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 99])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_a_damaged_sentencepiece_model_is_never_a_traceback(tmp_path):
    file = tmp_path / "tokenizer.model"
    spm(file, **LLAMA)
    good, generator, opened = file.read_bytes(), random.Random(1), 0
    for _ in range(200):
        raw = bytearray(good[: generator.randint(1, len(good))] if generator.random() < 0.3 else good)
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        file.write_bytes(raw)
        with contextlib.suppress(DataError):
            Tokenizer.load(file).encode("a b")
            opened += 1
    assert 0 < opened < 200  # some bits do no harm


@pytest.mark.skipif(
    "GPTWORKS_DATA" not in os.environ, reason="GPTWORKS_DATA names no folder with the real vocabularies"
)
def test_cl100k_has_tiktokens_ids_and_gpt2_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    tiktoken = pytest.importorskip("tiktoken")
    data = Path(os.environ["GPTWORKS_DATA"])
    path = data / "tokenizers" / "cl100k" / "cl100k_base.tiktoken"
    rule = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
        r"\s*[\r\n]|\s+(?!\S)|\s"
    )
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    theirs = tiktoken.Encoding("x", pat_str=rule, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 100257})
    gpt2 = data / "tokenizers" / "gpt2"
    hugging = transformers.GPT2Tokenizer(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    ours, old = Tokenizer.load(path), Tokenizer.load(gpt2)
    assert (ours.eos_id, len(ours), old.eos_id, len(old)) == (100257, 100277, 50256, 50257)
    real = [
        (data / name).read_text()[:200_000] for name in ("enwiki/enwiki_val_5mb.txt", "hongloumeng/hongloumeng.txt")
    ]
    for text in [*HARD, *real]:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
        assert old.encode(text) == hugging.encode(text, split_special_tokens=True)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=examples(150), deadline=None)
def test_bytes_are_the_bytes_of_utf8(text):
    made = Tokenizer.of_bytes()
    assert made.encode(text) == list(text.encode()) and made.decode(made.encode(text)) == text


def test_a_bytes_tokenizer_is_saved_as_an_ordinary_one(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    made = Tokenizer.of_bytes()
    made.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert made.cuttable and again.engine == "bytes" and len(again) == 259 and again.eos_id == 256
    for text in HARD:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == again.encode(text)
        assert theirs.decode(again.encode(text)) == text
    assert again.encode("<|im_start|>a", control=True) == [257, 97]
    assert again.decode(list("红".encode())[:2]) == "\ufffd"


def test_a_model_is_trained_on_bytes(tiny_config, tmp_path):
    from gptworks import lifecycle

    result = lifecycle.train(tiny_config(**{"tokenizer.kind": "bytes", "train.max_steps": 2}), tmp_path / "run")
    assert result["steps"] == 2 and result["eval"]["bits_per_byte"] == pytest.approx(
        result["eval"]["loss"] / 0.6931471805599453, rel=0.01
    )


# -- text without spaces -----------------------------------------------------------------------------------------

UNBROKEN = "".join(random.Random(3).choices("กขคงจฉชซดตถทนบปผฝพ", k=40_000))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bpe_learns_text_without_spaces_as_fast_as_lines_of_it(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """By its words and not by the clock: none is too long, and those that were not are there as before."""
    pre = bpe(pattern).backend.pre_tokenizer
    text = f"It's 12 words, {UNBROKEN}!\n\n{' ' * 3000}x = {'=' * 3000}\n{TRAINING}"
    handed = list(module._short([text], pre))
    assert "".join(handed) == text
    words = [word for line in handed for word, _ in pre.pre_tokenize_str(line)]
    assert max(end - begin for line in handed for _, (begin, end) in pre.pre_tokenize_str(line)) <= module.LONG_WORD
    monkeypatch.setattr(module, "LONG_WORD", 10**9)
    uncut = [word for line in module._short([text], pre) for word, _ in pre.pre_tokenize_str(line)]
    assert "".join(words) == "".join(uncut)
    assert Counter(word for word in uncut if len(word) < 100) <= Counter(words)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bpe_is_handed_ordinary_text_in_lines(pattern: str) -> None:
    texts = [f"{TRAINING * 20} {'x' * (module.LONG_WORD - 1)} end", "好" * module.LONG_WORD]
    lines = [line for text in texts for line in re.split(r"(?<=\S\n)(?=\S)", text)]
    assert list(module._short(texts, bpe(pattern).backend.pre_tokenizer)) == lines


def test_a_signal_ends_work_that_hears_none() -> None:
    from gptworks.core.errors import Preempted
    from gptworks.core.runtime import interrupts

    started = time.perf_counter()
    with interrupts.listening(), pytest.raises(Preempted, match="SIGTERM"):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        interrupts.apart(lambda: time.sleep(1.5))
    assert time.perf_counter() - started < 1
    assert interrupts.apart(lambda: 7) == 7
    with pytest.raises(KeyError):
        interrupts.apart(lambda: {}["x"])


# -- what decoding does not give back ----------------------------------------------------------------------------

ENGLISH = "the king of men saw the old sea, and a bird sang: don't you know 12 stones?\n  He did. It was grey.\n" * 4


def lossy(model: str, pre: Any = None, normalizer: Any = None, decoder: Any = None) -> Tokenizer:
    """A small tokenizer trained here."""
    kinds: dict[str, Any] = {
        "BPE": (models.BPE(), trainers.BpeTrainer),
        "BPE with unknown": (models.BPE(unk_token="[UNK]", fuse_unk=True), trainers.BpeTrainer),
        "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer),
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
    }
    if model == "Unigram":
        backend = Backend(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=90, unk_token="[UNK]", special_tokens=["[UNK]", "</s>"], show_progress=False
        )
    else:
        backend = Backend(kinds[model][0])
        trainer = kinds[model][1](vocab_size=120, special_tokens=["[UNK]", "</s>"], show_progress=False)
    if pre:
        backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    if decoder:
        backend.decoder = decoder
    backend.train_from_iterator([ENGLISH], trainer)
    return Tokenizer(backend, {"eos_token": "</s>"})


P, N, D = pre_tokenizers, normalizers, decoders
LOSSY: dict[str, tuple[Any, ...]] = {
    "no unknown token": ("BPE", P.Whitespace()),
    "no unknown token, spaces kept": ("BPE", P.Metaspace(), None, D.Metaspace()),
    "fused unknown": ("BPE with unknown", P.Metaspace(), None, D.Metaspace()),
    "words": ("WordLevel", P.WhitespaceSplit()),
    "word pieces": ("WordPiece", P.BertPreTokenizer(), None, D.WordPiece()),
    "word pieces of BERT": ("WordPiece", P.BertPreTokenizer(), N.BertNormalizer(), D.WordPiece()),
    "unigram": ("Unigram", P.Metaspace(), None, D.Metaspace()),
    "lower case": ("BPE", P.ByteLevel(add_prefix_space=False), N.Lowercase(), D.ByteLevel()),
    "no accents": ("BPE", P.Metaspace(), N.Sequence([N.NFD(), N.StripAccents()]), D.Metaspace()),
    "NFKC": ("BPE with unknown", P.ByteLevel(add_prefix_space=False), N.NFKC(), D.ByteLevel()),
    "one space for many": ("Unigram", P.Metaspace(), N.Replace(Regex(r"\s+"), " "), D.Metaspace()),
    "line by line": ("BPE", P.Sequence([P.Split("\n", "removed"), P.Metaspace()]), None, D.Metaspace()),
}


@cache
def lossy_named(name: str) -> Tokenizer:
    return lossy(*LOSSY[name])


def charged(made: Tokenizer, text: str, nats: float) -> float:
    """Bits a byte of a model that takes every token for as likely as any other."""
    ids = made.encode_array(text)
    size = len(text.encode())
    return bits_per_byte((len(ids) + 2) * nats, size, int(made.lost_bytes(text, ids)[-1]))


LOST = {
    "lower case": "HELLO WORLD ",
    "no accents": "ééé",
    "NFKC": "ﬁﬁ Ａ ",
    "one space for many": " \n  \n ",
    "line by line": "\n\n\n",
}


@pytest.mark.parametrize("name", LOSSY)
@given(
    seen=st.lists(
        st.sampled_from([*ENGLISH.split(), "The KING", "naïve", "红楼", "12 ", "\n"]), min_size=1, max_size=40
    ),
    lost=st.lists(
        st.sampled_from(["你好", "🎉", "й", "\u200b", "ﬁ", "HELLO", " É", "\n\n", "   ", "", "Ａ"]), max_size=12
    ),
    nats=st.sampled_from([0.0, 0.5, 4.6, 9.0]),
)
@settings(max_examples=examples(80), deadline=None)
def test_text_that_is_lost_never_makes_a_score_better(name: str, seen: list[str], lost: list[str], nats: float) -> None:
    made = lossy_named(name)
    text = ENGLISH + " ".join(seen) + " "
    longer = text
    before = charged(made, text, nats)
    for part in [*lost, LOST.get(name, "你好"), LOST.get(name, "你好") * 50]:
        grown = longer + part
        counts = [int(made.lost_bytes(each, made.encode_array(each))[-1]) for each in (longer, grown)]
        if counts[1] - counts[0] == len(part.encode()):  # all of it is lost, and nothing before it
            assert charged(made, grown, nats) >= charged(made, longer, nats) - 1e-9
        assert counts[1] >= counts[0]
        longer = grown
    assert counts[1] > counts[0]
    assert charged(made, longer, nats) > before or nats == 9.0


@pytest.mark.parametrize("name", LOSSY)
@given(text=HARD_TEXT, stretch=st.sampled_from([3, 7, 20]))
@settings(max_examples=examples(80), deadline=None)
def test_what_is_lost_is_what_the_decoded_text_lacks(name: str, text: str, stretch: int) -> None:
    """Compared piece by piece it is what it is in one piece, and what a slower way to the longest sequence finds."""
    made = lossy_named(name)
    text = text[:200]
    ids = made.encode_array(text)
    back = made.decode(ids[ids != made._unknown_id])
    with pytest.MonkeyPatch.context() as patch:
        whole = int(made.lost_bytes(text, ids)[-1])
        patch.setattr(module, "STRETCH", stretch)
        pieces = int(made.lost_bytes(text, ids)[-1])
    assert whole == len(text.encode()) - common(text, back)
    assert whole <= pieces <= whole + 2 * (1 + len(text) // stretch)
    assert (whole == 0) == (back == text or not text or common(text, back) == len(text.encode()))


def common(one: str, other: str) -> int:
    """Bytes of the heaviest common subsequence, by the table of every textbook."""
    row = [0] * (len(other) + 1)
    for a in one:
        before, weight = row, len(a.encode())
        row = [0]
        for at, b in enumerate(other):
            row.append(max(row[-1], before[at + 1], before[at] + weight if a == b else 0))
    return row[-1]


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_before_a_place_is_told(name: str) -> None:
    made = lossy_named(name)
    text = (ENGLISH + "HELLO 你好 naïve\n\n") * 8
    places = list(safe_places(text, 200))
    counts = made.lost_bytes(text, made.encode_array(text), places)
    assert len(counts) == len(places) + 1 and (np.diff(counts) >= 0).all() and counts[0] >= 0
    part = int(made.lost_bytes(text[: places[5]], made.encode_array(text[: places[5]]))[-1])
    assert counts[5] == pytest.approx(part, abs=6)


@pytest.mark.parametrize("kind", [*PATTERNS, "char", "bytes"])
def test_our_own_tokenizers_lose_nothing_and_nobody_looks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = characters() if kind == "char" else Tokenizer.of_bytes() if kind == "bytes" else bpe(kind)
    monkeypatch.setattr(made, "decode", None)  # not asked
    assert made.lossless and made.lost_bytes("a\n'é红", np.zeros(3, dtype=np.uint32), [1, 2]).tolist() == [0, 0, 0]


def test_a_byte_level_vocabulary_that_lacks_a_byte_is_known_to_lose_it() -> None:
    state = json.loads(bpe("qwen2").backend.to_str())
    letter = byte_alphabet()[ord("q")]
    merges = [pair for pair in state["model"]["merges"] if letter not in "".join(pair)]
    state["model"]["vocab"] = {token: id for token, id in state["model"]["vocab"].items() if letter not in token}
    state["model"]["merges"] = merges
    made = Tokenizer(Backend.from_str(json.dumps(state)), {})
    assert not made.lossless
    assert made.lost_bytes("quite a question", made.encode_array("quite a question")).tolist() == [2]
    assert made.lost_bytes("a king", made.encode_array("a king")).tolist() == [0]


def test_what_a_template_puts_around_a_text_is_not_lost() -> None:
    made = lossy_named("word pieces")
    made.backend.post_processor = processors.TemplateProcessing("</s> $A </s>", None, [("</s>", 1)])
    try:
        text = "the king of men"
        assert made.lost_bytes(text, made.encode_array(text)).tolist() == [0]
        assert made.front
    finally:
        made.backend.post_processor = processors.TemplateProcessing("$A", None, [])
