"""Shards: what is held out, what is in the files, and when they are written again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError, RunMismatch
from gptworks.data import shards as module
from gptworks.data import sources
from gptworks.data.shards import Shards, Stream, Writer, encode_text, open_shards, prepare
from gptworks.data.tokenizer import Tokenizer

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905


def story(number: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % 12] for i in range(20)) + f" number {number}.\nThe end.\n"


def jsonl(path: Path, texts: list[str]) -> Path:
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def build(path: Path, train: Any, tokenizer: dict[str, Any] | None = None, **data: Any) -> Shards:
    options = Data(train=[str(t) for t in train] if isinstance(train, list) else str(train), **data)
    return prepare(options, TokenizerConfig(**({"vocab_size": 300} | (tokenizer or {}))), path)


def texts(shards: Shards, stream: Stream) -> list[str]:
    """The documents of a split, decoded; each must begin with the start token."""
    bounds = [*stream.documents.tolist(), len(stream.tokens)]
    assert bounds[0] == 0
    found = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        assert stream.tokens[start] == shards.tokenizer.start_id
        found.append(shards.tokenizer.decode(stream.tokens[start + 1 : stop]))
    return found


def test_split_is_disjoint_and_complete(tmp_path: Path) -> None:
    stories = [story(i) for i in range(400)]
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", stories), eval_fraction=0.2)
    train, held = texts(shards, shards.train), texts(shards, shards.eval)
    assert sorted(train + held) == sorted(stories)
    assert not set(train) & set(held)
    assert 40 < len(held) < 120
    assert train == [text for text in stories if text in set(train)]  # in their order


@pytest.mark.parametrize("number", [2, 3, 10, 150])
def test_copies_land_on_one_side(tmp_path: Path, number: int) -> None:
    stories = [story(i) for i in range(number)]
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", stories * 3), eval_fraction=0.3)
    train, held = texts(shards, shards.train), texts(shards, shards.eval)
    assert len(train) + len(held) == 3 * number
    assert not set(train) & set(held) and train and held


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("number", [2, 3, 5, 19, 20, 21, 60])
def test_few_documents_leave_neither_side_empty(tmp_path: Path, number: int, fraction: float) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(number)])
    shards = build(tmp_path / "d", path, {"kind": "char"}, eval_fraction=fraction)
    train, held = len(shards.train.documents), len(shards.eval.documents)
    assert train + held == number
    assert train and held
    if number < module.FEW / min(fraction, 1 - fraction):
        assert held == max(1, min(number - 1, round(number * fraction)))


def test_many_copies_of_one_document_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text for the train split"):
        build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", [story(1)] * 5))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("size", [11, 100, 101, 999, 12_345])
def test_one_document_is_split_by_position_as_nanogpt_does(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 500)  # the boundary also falls at and between pieces
    text = "".join(story(i) for i in range(300)).encode("ascii", "replace").decode()[:size]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "char"})
    assert texts(shards, shards.train) == [text[: int(size * 0.9)]]
    assert texts(shards, shards.eval) == [text[int(size * 0.9) :]]


def test_a_split_by_position_cuts_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 500)
    text = "红楼梦 é " * 700
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "char"})
    (head,), (tail,) = texts(shards, shards.train), texts(shards, shards.eval)
    assert head + tail == text
    assert abs(len(head.encode()) / len(text.encode()) - 0.9) < 0.01


def test_shakespeare_is_split_where_nanogpt_splits_it(tmp_path: Path) -> None:
    shards = build(tmp_path / "d", "shakespeare", {"kind": "char"})
    assert (len(shards.train.tokens), len(shards.eval.tokens)) == (1_003_854 + 1, 111_540 + 1)


def test_an_eval_file_is_the_validation_split(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("validation text é " * 20, encoding="utf-8")
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(5)])
    shards = build(tmp_path / "d", path, eval=str(tmp_path / "b.txt"))
    assert texts(shards, shards.train) == [story(i) for i in range(5)]
    assert texts(shards, shards.eval) == ["validation text é " * 20]
    assert shards.eval.bytes == len(("validation text é " * 20).encode())


@pytest.mark.parametrize("limit", [30, 31, 60, 10_000])
def test_eval_bytes_takes_the_beginning_of_the_eval_file(tmp_path: Path, limit: int) -> None:
    rows = ["éé" * 10, "x" * 25, "é" * 40]
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(5)])
    shards = build(tmp_path / "d", path, eval=str(jsonl(tmp_path / "b.jsonl", rows)), eval_bytes=limit)
    held = texts(shards, shards.eval)
    assert limit - 1 <= shards.eval.bytes <= limit or held == rows
    assert "".join(rows).startswith("".join(held))
    assert shards.eval.bytes == len("".join(held).encode())


def test_eval_bytes_bounds_what_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(story(1) * 100)
    shards = build(tmp_path / "d", tmp_path / "a.txt", eval_bytes=500)
    assert 450 <= shards.eval.bytes <= 501


def test_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(30)])
    (tmp_path / "b.txt").write_text("Zyzzyva zyzzyva " * 500)
    shards = build(tmp_path / "d", path, {"vocab_size": 500}, eval=str(tmp_path / "b.txt"))
    assert len(shards.tokenizer.encode("zyzzyva")) == 7


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_documents_cut_in_pieces_give_the_ids_of_the_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 300)
    stories = [story(i) * (1 + i % 9) for i in range(60)]
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", stories), {"kind": kind})
    for stream in (shards.train, shards.eval):
        for text, start in zip(texts(shards, stream), stream.documents.tolist(), strict=True):
            expected = shards.tokenizer.encode(text)
            assert stream.tokens[start + 1 : start + 1 + len(expected)].tolist() == expected


def test_a_tokenizer_of_unknown_kind_encodes_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "cuttable", property(lambda self: False))
    monkeypatch.setattr(sources, "PIECE", 300)
    text = story(1) * 40
    (tmp_path / "a.txt").write_text(text)
    shards = build(tmp_path / "d", tmp_path / "a.txt")
    assert texts(shards, shards.train) + texts(shards, shards.eval) == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
    ]


@pytest.mark.parametrize("size, dtype", [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_where_they_fit(tmp_path: Path, size: int, dtype: str) -> None:
    alphabet = [chr(c) for c in range(32, 80_000) if not 0xD800 <= c < 0xE000][: size - 1]
    tokenizer = Tokenizer.train_characters(alphabet)
    assert len(tokenizer) == size
    (tmp_path / "t").mkdir()
    tokenizer.save(tmp_path / "t")
    text = "".join(alphabet[-20:] + alphabet[:20])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"path": str(tmp_path / "t")})
    assert shards.train.tokens.dtype == np.dtype(dtype)
    assert shards.train.tokens.max() == size - 1
    assert "".join(texts(shards, shards.train) + texts(shards, shards.eval)) == text


def test_documents_end_with_their_own_token_where_there_is_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_characters("abc<s>")
    tokenizer.backend.add_special_tokens(["<s>"])
    made = Tokenizer(tokenizer.backend, {**tokenizer.config, "bos_token": "<s>"})
    writer = Writer(tmp_path, "train", made)
    for text in ("ab", "c"):
        writer.add(sources.Piece(text, True))
    assert writer.close() == {"tokens": 7, "documents": 2, "bytes": 3}
    ids = np.fromfile(tmp_path / "train.tokens", dtype="<u2").tolist()
    a, b, c = made.encode("abc")
    assert ids == [made.bos_id, a, b, made.eos_id, made.bos_id, c, made.eos_id]
    assert np.fromfile(tmp_path / "train.documents", dtype="<u8").tolist() == [0, 4]


def test_bytes_per_token_counts_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 100, encoding="utf-8")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "char"})
    assert (shards.train.bytes, shards.eval.bytes) == (180, 20)
    assert shards.train.bytes_per_token == 2.0


def test_validation_text_is_the_held_out_text(tmp_path: Path) -> None:
    for name, path in {
        "many": jsonl(tmp_path / "a.jsonl", [story(i) + "\u2028\x85 é" for i in range(60)]),
        "one": (tmp_path / "b.txt"),
    }.items():
        (tmp_path / "b.txt").write_text("".join(story(i) for i in range(60)))
        shards = build(tmp_path / name, path)
        stream, raw = encode_text(str(shards.path / "validation.jsonl"), Data(), shards.tokenizer)
        assert stream.tokens.tolist() == shards.eval.tokens.tolist()
        assert stream.documents.tolist() == shards.eval.documents.tolist()
        assert stream.bytes == shards.eval.bytes == len(raw)


# -- written once ------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "a.jsonl", [story(i) for i in range(50)])


def written(path: Path) -> int:
    return (path / "train.tokens").stat().st_mtime_ns


def test_shards_are_used_again_without_writing(tmp_path: Path, text_file: Path) -> None:
    first = build(tmp_path / "d", text_file)
    before = written(tmp_path / "d")
    again = build(tmp_path / "d", text_file)
    assert written(tmp_path / "d") == before and again.identity == first.identity


def test_a_new_time_alone_rewrites_nothing(tmp_path: Path, text_file: Path) -> None:
    build(tmp_path / "d", text_file)
    before = written(tmp_path / "d")
    os.utime(text_file, (1, 1))
    build(tmp_path / "d", text_file)
    assert written(tmp_path / "d") == before


def test_new_text_rewrites_even_at_the_same_size(tmp_path: Path, text_file: Path) -> None:
    first = build(tmp_path / "d", text_file)
    text_file.write_text(text_file.read_text().replace("seven", "SEVEN"))
    again = build(tmp_path / "d", text_file)
    assert again.identity != first.identity
    assert any("SEVEN" in text for text in texts(again, again.train))
    with pytest.raises(RunMismatch, match="not the one this run began with"):
        module.same_data(again, first.identity)


@pytest.mark.parametrize(
    "change", [{"tokenizer": {"vocab_size": 301}}, {"eval_fraction": 0.3}, {"text_column": "text"}]
)
def test_new_settings_rewrite_and_say_why(
    tmp_path: Path, text_file: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "d", text_file)
    before = written(tmp_path / "d")
    build(tmp_path / "d", text_file, **change)
    assert written(tmp_path / "d") != before
    assert f"{next(iter(change))} changed" in capsys.readouterr().err


def test_new_code_of_an_own_source_rewrites(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def rows():\n    return ['first story', 'second story', 'third']\n")
    build(tmp_path / "d", f"{code}:rows")
    before = written(tmp_path / "d")
    build(tmp_path / "d", f"{code}:rows")
    assert written(tmp_path / "d") == before
    code.write_text("def rows():\n    return ['first story', 'second story', 'fourth']\n")
    again = build(tmp_path / "d", f"{code}:rows")
    assert "fourth" in texts(again, again.train) + texts(again, again.eval)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "train.tokens").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "train.tokens").write_bytes(data)


def cut_short(path: Path) -> None:
    (path / "eval.documents").write_bytes(b"")


def remove_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def break_manifest(path: Path) -> None:
    (path / folder.MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, remove_tokenizer, break_manifest])
def test_damage_is_detected_and_mended(tmp_path: Path, text_file: Path, damage: Callable[[Path], None]) -> None:
    first = build(tmp_path / "d", text_file)
    damage(tmp_path / "d")
    with pytest.raises(DataError):
        open_shards(tmp_path / "d")
    again = build(tmp_path / "d", text_file)
    assert again.identity == first.identity
    open_shards(tmp_path / "d")


def test_shards_with_a_foreign_tokenizer_are_refused(tmp_path: Path, text_file: Path) -> None:
    shards = build(tmp_path / "d", text_file)
    Tokenizer.train_bpe([story(3)], 270, "gpt-2").save(shards.path)
    with pytest.raises(DataError):
        open_shards(shards.path)
    with pytest.raises(DataError, match="another tokenizer"):
        open_shards(shards.path, verified=True)


@pytest.mark.parametrize(
    "facts",
    [{"dtype": "O"}, {"dtype": "<f8"}, {"dtype": ["<u2"]}, {"splits": {}}, {"splits": {"train": 1}}, {"tokenizer": 5},
     {"files": {}}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_not_that_of_shards_is_refused(tmp_path: Path, text_file: Path, facts: Any) -> None:
    path = build(tmp_path / "d", text_file).path
    folder.write_manifest(path, folder.read_manifest(path) | facts)
    with pytest.raises(DataError):
        open_shards(path)


@pytest.mark.parametrize("starts", [[5, 9], [0, 9, 9], [0, 9, 3], [0, 10**6], [0, 2**63 + 1]])
def test_documents_that_do_not_cut_the_ids_are_refused(tmp_path: Path, text_file: Path, starts: list[int]) -> None:
    path = build(tmp_path / "d", text_file).path
    np.array(starts, dtype="<u8").tofile(path / "train.documents")
    manifest = folder.read_manifest(path)
    manifest["splits"]["train"]["documents"] = len(starts)
    file = path / "train.documents"
    manifest["files"]["train.documents"] = {"bytes": file.stat().st_size, "sha256": folder.sha256(file)}
    folder.write_manifest(path, manifest)
    with pytest.raises(DataError, match="does not cut"):
        open_shards(path)


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine story"}\n' * 5 + "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:6"):
        build(tmp_path / "d", path)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("content", [b"", b"\n", b'{"text": ""}'])
def test_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    for kind in ("bpe", "char"):
        with pytest.raises(DataError, match="no text"):
            build(tmp_path / "d", tmp_path / "a.jsonl", {"kind": kind})


@pytest.mark.parametrize("number, words", [(1, "from 1 document,"), (30, "from 30 documents,")])
def test_the_message_counts_source_documents(
    tmp_path: Path, number: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", [story(i) for i in range(number)]))
    assert words in capsys.readouterr().err


def test_invalid_utf8_is_counted_in_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"training \xff text \xff" * 5)
    (tmp_path / "b.txt").write_bytes(b"validation \xff text" * 5)
    shards = build(tmp_path / "d", tmp_path / "a.txt", eval=str(tmp_path / "b.txt"))
    assert "15 invalid UTF-8" in capsys.readouterr().err
    assert "15 invalid UTF-8" in shards.manifest["findings"][0]


def test_an_id_beyond_the_vocabulary_is_named() -> None:
    stream = Stream(np.array([1, 2, 99]), np.zeros(1, dtype=np.int64), 3)
    module.check_ids(stream, 100, "x")
    with pytest.raises(DataError, match="token id 99 is beyond the model's vocabulary of 99"):
        module.check_ids(stream, 99, "x")
