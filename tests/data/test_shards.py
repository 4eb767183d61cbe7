"""Shards: what is held out, what is in the files, and when they are written again."""

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError, RunMismatch
from gptworks.data import formats, split
from gptworks.data import shards as module
from gptworks.data import text as texts_module
from gptworks.data.findings import Piece
from gptworks.data.shards import (
    Shards,
    Stream,
    Writer,
    beginnings,
    encode_documents,
    open_shards,
    prepare,
    read_documents,
)
from gptworks.data.sources import draw, sources_of
from gptworks.data.tokenizer import Tokenizer

zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
PACKERS = {".txt": bytes, ".gz": gzip.compress, ".zst": zstd.compress}
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


def share(shards: Shards) -> float:
    """The validation split's share of the bytes."""
    return shards.eval.bytes / (shards.train.bytes + shards.eval.bytes)


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
    assert "".join(sorted(train + held)) and not set(train) & set(held) and train and held
    if number > 2:  # of two documents a half would be held out: one is cut, and its copies where it is
        assert len(train) + len(held) == 3 * number
    assert 0.3 / split.FAIR <= share(shards) <= 0.3 * split.FAIR


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("number", [2, 3, 5, 19, 20, 21, 60])
def test_few_documents_leave_neither_side_empty(tmp_path: Path, number: int, fraction: float) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(number)])
    shards = build(tmp_path / "d", path, {"kind": "char"}, eval_fraction=fraction)
    train, held = len(shards.train.documents), len(shards.eval.documents)
    size = shards.train.bytes + shards.eval.bytes
    assert number <= train + held <= number + 1 and size == sum(len(story(i)) for i in range(number))
    assert fraction / split.FAIR <= share(shards) + 1 / size and share(shards) - 1 / size <= fraction * split.FAIR
    assert shards.train.bytes and shards.eval.bytes


def test_copies_of_one_document_are_all_cut_at_one_place(tmp_path: Path) -> None:
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", [story(1)] * 5))
    (head,), (tail,) = set(texts(shards, shards.train)), set(texts(shards, shards.eval))
    assert head + tail == story(1) and 0.09 < share(shards) < 0.1


@pytest.mark.parametrize("size", [11, 100, 101, 999, 12_345])
def test_one_document_is_split_by_position_as_nanogpt_does(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "PIECE", 500)  # the boundary also falls at and between pieces
    text = "".join(story(i) for i in range(300)).encode("ascii", "replace").decode()[:size]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "char"})
    assert texts(shards, shards.train) == [text[: int(size * 0.9)]]
    assert texts(shards, shards.eval) == [text[int(size * 0.9) :]]


def test_a_split_by_position_cuts_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "PIECE", 500)
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


@pytest.mark.parametrize("limit", [1, 3, 500, 501, 502, 503, 10_000])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_eval_bytes_of_one_document_is_exact_in_bytes_of_text(tmp_path: Path, name: str, limit: int) -> None:
    """However well the file packs, and without cutting a character."""
    text = "红楼梦 é " * 3000
    (tmp_path / name).write_bytes(PACKERS[(tmp_path / name).suffix](text.encode()))
    shards = build(tmp_path / "d", tmp_path / name, {"kind": "char"}, eval_fraction=0.5, eval_bytes=limit)
    assert limit - 3 < shards.eval.bytes <= limit
    assert "".join(texts(shards, shards.train) + texts(shards, shards.eval)) == text


def test_eval_bytes_without_room_for_a_character_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("红" * 1000)
    with pytest.raises(DataError, match=r"no text for the eval split.*data\.eval_bytes"):
        build(tmp_path / "d", tmp_path / "a.txt", {"kind": "char"}, eval_bytes=2)


@pytest.mark.parametrize("limit", [150, 1000, 5000, 10**9])
@pytest.mark.parametrize("copies", [1, 3])
def test_eval_bytes_of_many_documents_is_a_bound_and_used_well(tmp_path: Path, limit: int, copies: int) -> None:
    stories = [story(i) * (1 + i % 3) for i in range(200)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(tmp_path / "b.jsonl", stories * copies).read_bytes()))
    longest = max(len(text) for text in stories) * copies
    if limit < longest:
        limit += longest  # the first drawn may be the longest
    shards = build(tmp_path / "d", path, eval_fraction=0.2, eval_bytes=limit)
    train, held = texts(shards, shards.train), texts(shards, shards.eval)
    wanted = min(limit, 0.2 * sum(map(len, stories)) * copies)
    assert not set(train) & set(held) and shards.train.bytes + shards.eval.bytes == sum(map(len, stories)) * copies
    assert wanted / split.FAIR - copies <= shards.eval.bytes <= min(limit, wanted * split.FAIR)
    if len(train) + len(held) == len(stories) * copies:
        assert sorted(train + held) == sorted(stories * copies)


def test_of_documents_that_are_all_longer_than_eval_bytes_one_is_cut(tmp_path: Path) -> None:
    stories = [story(i) for i in range(50)]
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", stories), eval_bytes=20)
    (tail,) = texts(shards, shards.eval)
    assert len(tail) == 20 and len(set(stories) - set(texts(shards, shards.train))) == 1


@given(sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=40), most=st.integers(1, 60))
@settings(max_examples=examples(100), deadline=None)
def test_the_lowest_draws_within_a_bound(sizes: list[tuple[int, int]], most: int) -> None:
    """Against sorting: all below the limit are there, they fit, and with the next ones they would not."""
    kept = split.Lowest(most)
    for drawn, size in sizes:
        kept.add(drawn, size)
    for bound in (most, most // 2):
        limit = kept.within(bound)
        held = sum(size for drawn, size in sizes if drawn < limit)
        assert held == kept.bytes <= bound
        above = [drawn for drawn, _ in sizes if drawn >= limit]
        assert not above or held + sum(size for drawn, size in sizes if drawn == min(above)) > bound


# -- several sources ---------------------------------------------------------------------------------------------


def weighted(*paths: Path, **data: Any) -> Data:
    return Data(train=[{"path": str(path), "weight": 1.0 + n} for n, path in enumerate(paths)], **data)


def prepared(data: Data, path: Path, **options: Any) -> Shards:
    return prepare(data, TokenizerConfig(vocab_size=300), path, **options)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """One document, several, and several packed."""
    (tmp_path / "a.txt").write_text("".join(story(i) for i in range(40)))
    (tmp_path / "c.jsonl.gz").write_bytes(
        gzip.compress(jsonl(tmp_path / "c.jsonl", [story(i) for i in range(400, 430)]).read_bytes())
    )
    return [tmp_path / "a.txt", jsonl(tmp_path / "b.jsonl", [story(i) for i in range(300)]), tmp_path / "c.jsonl.gz"]


def test_each_weighted_source_is_split_by_its_own_rule(tmp_path: Path, three: list[Path]) -> None:
    shards = prepared(weighted(*three, eval_fraction=0.2), tmp_path / "d")
    text = three[0].read_text()
    train, held = texts(shards, shards.train), texts(shards, shards.eval)
    assert train[0] == text[: int(len(text) * 0.8)] and held[0] == text[int(len(text) * 0.8) :]
    for name, first, number in (("b", 0, 300), ("c", 400, 30)):
        alone = build(tmp_path / name, tmp_path / f"{name}.jsonl", eval_fraction=0.2)
        mine = {story(i) for i in range(first, first + number)}
        assert [text for text in held if text in mine] == texts(alone, alone.eval)
        assert [text for text in train if text in mine] == texts(alone, alone.train)
    assert shards.manifest["split"].count("of each source by itself") == 1


def test_the_manifest_and_the_stream_say_what_each_source_has(tmp_path: Path, three: list[Path]) -> None:
    for name, data in {"weighted": weighted(*three), "plain": Data(train=[str(path) for path in three])}.items():
        shards = prepared(data, tmp_path / name)
        for stream, split_name in ((shards.train, "train"), (shards.eval, "eval")):
            assert [part.__dict__ for part in stream.sources] == shards.manifest["splits"][split_name]["sources"]
            assert sum(part.tokens for part in stream.sources) == len(stream.tokens)
            assert sum(part.documents for part in stream.sources) == len(stream.documents)
            assert sum(part.bytes for part in stream.sources) == stream.bytes
        assert [part.path for part in shards.train.sources] == [str(path) for path in three]
        starts = np.cumsum([0, *(part.tokens for part in shards.train.sources)])[:-1]
        assert set(starts.tolist()) <= set(shards.train.documents.tolist())
        total = shards.manifest["found"][-1]
        assert (total["source"], total["documents"]) == ("total", 331)
        assert total["bytes"] == shards.train.bytes + shards.eval.bytes
        assert total["tokens"] == len(shards.train.tokens) + len(shards.eval.tokens)


def test_other_weights_need_no_other_shards(tmp_path: Path, three: list[Path]) -> None:
    prepared(weighted(*three), tmp_path / "d")
    before = written(tmp_path / "d")
    other = Data(train=[{"path": str(path), "weight": 5} for path in three], shards=str(tmp_path / "d"))
    prepared(other, tmp_path / "d")
    assert written(tmp_path / "d") == before


def test_eval_bytes_are_shared_by_size(tmp_path: Path, three: list[Path]) -> None:
    shards = prepared(weighted(*three, eval_fraction=0.5, eval_bytes=5000), tmp_path / "d")
    sizes = {row["source"]: row["bytes"] for row in shards.manifest["found"]}
    held = {part.path: part.bytes for part in shards.eval.sources}
    assert 4000 < sum(held.values()) <= 5000
    for path in held:
        assert held[path] <= 5000 * sizes[path] // sizes["total"]


def test_a_weighted_source_without_text_is_named(tmp_path: Path, three: list[Path]) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: no text"):
        prepared(weighted(*three, tmp_path / "empty.txt"), tmp_path / "d")
    path = jsonl(tmp_path / "same.jsonl", ["s"])
    with pytest.raises(DataError, match=r"same\.jsonl: too little text"):
        prepared(weighted(*three, path), tmp_path / "d")


def test_a_hundred_sources_are_a_corpus(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / f"{n}.jsonl", [story(n * 10 + i) for i in range(4)]) for n in range(100)]
    shards = prepared(weighted(*paths), tmp_path / "d")
    assert len(shards.train.sources) == 100 and min(part.documents for part in shards.train.sources) >= 1


def test_validation_text_that_is_also_trained_on_counts_as_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(30)])
    held = jsonl(tmp_path / "b.jsonl", [story(i) for i in range(25, 35)])
    shards = build(tmp_path / "d", path, eval=str(held))
    assert [row["copies"] for row in shards.manifest["found"]] == [0, 5, 5]
    assert f"document 1 of {held} repeats document 26 of {path}"[-40:] in capsys.readouterr().err


def test_bad_rows_are_skipped_counted_and_kept_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(50)])
    path.write_text(path.read_text() + "broken\n[]\n")
    shards = build(tmp_path / "d", path, max_bad_rows=0.05)
    assert sorted(texts(shards, shards.train) + texts(shards, shards.eval)) == sorted(story(i) for i in range(50))
    (row,) = shards.manifest["found"]
    assert (row["rows"], row["rejected"], row["documents"]) == (52, 2, 50)
    assert f"{path}:51: not valid JSON" in row["reasons"][0]
    assert "2 of 52 rows were unreadable" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"a\.jsonl:51: "):
        build(tmp_path / "e", path)


def test_a_text_that_grew_is_said_to_have_changed_not_its_tokenizer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(30)])
    build(tmp_path / "d", path, {"vocab_size": None})
    jsonl(path, [story(i) for i in range(3000)])  # a text of this size has more ids
    build(tmp_path / "d", path, {"vocab_size": None})
    assert "rewritten: the text changed, and with it the tokenizer" in capsys.readouterr().err


def test_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [story(i) for i in range(30)])
    (tmp_path / "b.txt").write_text("Zyzzyva zyzzyva " * 500)
    shards = build(tmp_path / "d", path, {"vocab_size": 500}, eval=str(tmp_path / "b.txt"))
    assert len(shards.tokenizer.encode("zyzzyva")) == 7


@pytest.mark.parametrize("kind", ["jsonl.gz", "function"])
def test_a_tokenizer_learns_from_the_end_of_a_text_whose_length_nobody_knows(tmp_path: Path, kind: str) -> None:
    rows = [story(i) for i in range(300)] + [f"Zyzzyva zyzzyva {i}" for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    code = f"import json\n\ndef rows():\n    return [json.loads(line)['text'] for line in open({str(path)!r})]\n"
    (tmp_path / "mine.py").write_text(code)
    place = {"jsonl.gz": tmp_path / "a.jsonl.gz", "function": f"{tmp_path / 'mine.py'}:rows"}[kind]
    shards = build(tmp_path / "d", place, {"vocab_size": 500, "sample_bytes": 20_000})
    assert len(shards.tokenizer.encode(" zyzzyva")) == 1


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_documents_cut_in_pieces_give_the_ids_of_the_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "PIECE", 300)
    stories = [story(i) * (1 + i % 9) for i in range(60)]
    shards = build(tmp_path / "d", jsonl(tmp_path / "a.jsonl", stories), {"kind": kind})
    for stream in (shards.train, shards.eval):
        for text, start in zip(texts(shards, stream), stream.documents.tolist(), strict=True):
            expected = shards.tokenizer.encode(text)
            assert stream.tokens[start + 1 : start + 1 + len(expected)].tolist() == expected


def test_a_tokenizer_of_unknown_kind_encodes_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "cuttable", property(lambda self: False))
    monkeypatch.setattr(texts_module, "PIECE", 300)
    text = story(1) * 40
    (tmp_path / "a.txt").write_text(text)
    shards = build(tmp_path / "d", tmp_path / "a.txt")
    assert texts(shards, shards.train) + texts(shards, shards.eval) == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
    ]


def test_a_document_too_long_to_be_encoded_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "cuttable", property(lambda self: False))
    monkeypatch.setattr(texts_module, "PIECE", 300)
    monkeypatch.setattr(module, "ROW", 2000)
    (tmp_path / "a.txt").write_text(story(1) * 40)
    with pytest.raises(DataError, match=r"document 1 of the train split .* data\.separator"):
        build(tmp_path / "d", tmp_path / "a.txt")


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
        writer.add(Piece(text, True))
    assert writer.close() == {
        "tokens": 7,
        "documents": 2,
        "bytes": 3,
        "largest_id": max(made.encode("abc") + [made.bos_id, made.eos_id]),
    }
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
        (tmp_path / "b.txt").write_text("".join(story(i) + "\r\r\n" for i in range(60)), newline="")
        shards = build(tmp_path / name, path)
        documents = read_documents(str(shards.path / "validation.jsonl"), Data())
        stream, _ = encode_documents(documents, shards.tokenizer)
        assert stream.tokens.tolist() == shards.eval.tokens.tolist()
        assert stream.documents.tolist() == shards.eval.documents.tolist()
        assert stream.bytes == shards.eval.bytes == len("".join(documents).encode())


def test_validation_text_is_read_again_however_long_a_document_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROW", 200)
    (tmp_path / "a.txt").write_text("".join(story(i) for i in range(60)))
    shards = build(tmp_path / "d", tmp_path / "a.txt")
    assert read_documents(str(shards.path / "validation.jsonl"), Data()) == texts(shards, shards.eval)
    with pytest.raises(DataError, match="longer than"):  # a file of this name that is not ours
        read_documents(str(jsonl(tmp_path / "validation.jsonl", texts(shards, shards.eval))), Data())


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


def test_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_late(writer: Writer, close: Any = Writer.close) -> dict[str, int]:
        text_file.write_text(text_file.read_text() + text_file.read_text())
        return close(writer)

    monkeypatch.setattr(Writer, "close", close_late)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        build(tmp_path / "d", text_file)


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


@pytest.mark.parametrize(
    "change, name",
    [
        ({"eval_fraction": 0.3}, "data.eval_fraction"),
        ({"max_bad_rows": 0.3}, "data.max_bad_rows"),
        ({"tokenizer": {"vocab_size": 301}}, "tokenizer"),
        ({}, "the text"),
    ],
)
def test_shared_shards_are_not_rewritten_behind_the_back_of_other_runs(
    tmp_path: Path, text_file: Path, change: dict[str, Any], name: str
) -> None:
    shared = {"shards": str(tmp_path / "d")}
    first = build(tmp_path / "d", text_file, **shared)
    if not change:
        text_file.write_text(text_file.read_text().replace("seven", "SEVEN"))
    before = written(tmp_path / "d")
    with pytest.raises(RunMismatch, match=f"other runs may use them: {name}.* changed"):
        build(tmp_path / "d", text_file, **shared, **change)
    assert written(tmp_path / "d") == before
    data = Data(train=str(text_file), **shared, **{k: v for k, v in change.items() if k != "tokenizer"})
    tokenizer = TokenizerConfig(**({"vocab_size": 300} | change.get("tokenizer", {})))
    assert prepare(data, tokenizer, tmp_path / "d", own=True).identity != first.identity or name == "data.max_bad_rows"
    assert written(tmp_path / "d") != before


def test_damaged_shared_shards_are_mended_as_long_as_they_are_what_is_asked(tmp_path: Path, text_file: Path) -> None:
    first = build(tmp_path / "d", text_file, shards=str(tmp_path / "d"))
    flip_a_bit(tmp_path / "d")
    with pytest.raises(RunMismatch):
        build(tmp_path / "d", text_file, shards=str(tmp_path / "d"), eval_fraction=0.3)
    assert build(tmp_path / "d", text_file, shards=str(tmp_path / "d")).identity == first.identity


def test_hashes_made_while_writing_are_those_of_the_files(tmp_path: Path, text_file: Path) -> None:
    build(tmp_path / "d", text_file)
    entries = folder.read_manifest(tmp_path / "d")["files"]
    assert {name: entry["sha256"] for name, entry in entries.items()} == {
        path.name: folder.sha256(path) for path in (tmp_path / "d").iterdir() if path.name != folder.MANIFEST
    }


def test_a_tokenizer_on_disk_is_loaded_once(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "d", text_file).tokenizer.save(text_file.parent)
    loads: list[Any] = []
    whole = Tokenizer.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Tokenizer, "load", classmethod(lambda cls, *given: loads.append(given) or whole(cls, *given)))
    made = build(tmp_path / "e", text_file, {"path": str(text_file.parent)})
    assert len(loads) == 1
    assert made.tokenizer.fingerprint == open_shards(tmp_path / "e").tokenizer.fingerprint


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
    (tmp_path / "a.txt").write_bytes((b"training \xff text \xff" + b"of words " * 300) * 5)
    (tmp_path / "b.txt").write_bytes((b"validation \xff text" + b"of words " * 300) * 5)
    shards = build(tmp_path / "d", tmp_path / "a.txt", eval=str(tmp_path / "b.txt"))
    said = capsys.readouterr().err
    assert "a.txt: 10 invalid sequences" in said and "b.txt: 5 invalid sequences" in said
    assert [row["invalid_utf8"] for row in shards.manifest["found"]] == [10, 5, 15]


def test_an_id_beyond_the_vocabulary_is_named() -> None:
    stream = Stream(np.array([1, 2, 99]), np.zeros(1, dtype=np.int64), 3)
    tokenizer = Tokenizer.of_bytes()
    module.check_ids(stream, tokenizer, rows=100, what="x")
    with pytest.raises(DataError, match=r"x: token id 99 \('c'\) is beyond the model's vocabulary of 99"):
        module.check_ids(stream, tokenizer, rows=99, what="x")


# -- the share that is held out ----------------------------------------------------------------------------------


def halves_of(path: Path, **data: Any) -> tuple[list[str], list[str]]:
    """The documents of both splits, without a tokenizer."""
    options = Data(train=str(path), **data)
    sides: tuple[list[str], list[str]] = ([], [])
    for piece, held_out in split.Split(options, sources_of([str(path)], options), []).pieces():
        side = sides[held_out]
        if piece.first:
            side.append("")
        side[-1] += piece.text
    return sides


@given(
    sizes=st.lists(st.integers(1, 40) | st.integers(200, 4000), min_size=1, max_size=30),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9]),
    copies=st.integers(1, 2),
    piece=st.sampled_from([50, 10_000]),
)
@settings(max_examples=examples(200), deadline=None)
def test_the_asked_share_of_the_bytes_is_held_out_of_documents_of_any_length(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], fraction: float, copies: int, piece: int
) -> None:
    documents = [(f"{number} " + "word " * size)[:size] for number, size in enumerate(sizes)] * copies
    path = jsonl(tmp_path_factory.getbasetemp() / "share.jsonl", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "PIECE", piece)
        train, held = halves_of(path, eval_fraction=fraction)
    total, out = sum(map(len, documents)), sum(map(len, held))
    assert sum(map(len, train)) + out == total
    wanted = total * fraction  # a cut falls between bytes, and each copy of a document is cut alike
    assert wanted / split.FAIR - 1 - copies <= out <= max(wanted * split.FAIR, 1)
    cut = len(train) + len(held) - len(documents)
    assert cut in (0, *range(1, documents.count(documents[0]) * 2 + 1)) and not set(train) & set(held) - set(documents)


def test_of_a_long_and_a_short_file_a_tenth_of_the_bytes_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "long.txt").write_text(" ".join(f"word{i % 97} number{i + 1}" for i in range(8000)))
    (tmp_path / "fd" / "short.txt").write_text(" ".join(f"term{i % 89}" for i in range(61)))
    shards = build(tmp_path / "d", tmp_path / "fd", {"kind": "bytes"}, eval_fraction=0.1)
    assert 0.099 < share(shards) <= 0.1
    tokens = len(shards.eval.tokens) / (len(shards.eval.tokens) + len(shards.train.tokens))
    said = f"validation: {share(shards):.2%} of the bytes and {tokens:.2%} of the tokens, documents chosen by content"
    assert said in capsys.readouterr().err and shards.manifest["split"].startswith(said)


@pytest.mark.parametrize("number", [30, 3000])
def test_many_equal_documents_are_whole_on_their_side(tmp_path: Path, number: int) -> None:
    """As they were split before lengths were looked at: by what each draws, and by rank where they are few."""
    stories = [f"{story(i)} {i:05d}" for i in range(number)]
    train, held = halves_of(jsonl(tmp_path / "a.jsonl", stories))
    ranked = sorted(stories, key=draw)
    chosen = {text for text in stories if draw(text) < 2**64 // 10} if number > 200 else set(ranked[: number // 10])
    assert set(held) == chosen and sorted(train + held) == sorted(stories)


def test_a_text_has_the_same_split_in_every_encoding_packing_and_line_end(tmp_path: Path) -> None:
    text = "".join(f"Le café numéro {i} est fermé.\n" for i in range(2000))
    sides = []
    for number, (raw, options) in enumerate(
        [(text.encode(), {}), (text.encode("latin-1"), {"encoding": "latin-1"}), (text.encode("utf-16"), {}),
         (text.encode("utf-8-sig"), {}), (text.encode("utf-32"), {}), (text.replace("\n", "\r\n").encode(), {}),
         (text.encode("utf-16-be"), {"encoding": "utf-16-be"})]
    ):  # fmt: skip
        for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
            (tmp_path / f"{number}{name}").write_bytes(pack(raw))
            sides.append(halves_of(tmp_path / f"{number}{name}", **options))
    assert all(side == sides[0] for side in sides) and "".join(side[0] for side in sides[0]) == text
    assert abs(len(sides[0][1][0].encode()) / len(text.encode()) - 0.1) < 1e-4


# -- what is probably not as it was meant ------------------------------------------------------------------------


def test_validation_text_that_is_trained_on_is_warned_of_with_its_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.console, "quiet", True)
    lines = [f"The king of house {i * 7 % 97} spoke to {i % 13} men and {i * 31 % 89} birds.\n" for i in range(400)]
    (tmp_path / "a.txt").write_text("".join(lines[:300]))
    parts = {"same": (0, 300, "100%"), "part": (50, 150, "100%"), "half": (250, 350, "50%"), "other": (300, 400, "")}
    for name, (begin, end, said) in parts.items():
        (tmp_path / f"{name}.txt").write_text("".join(lines[begin:end]))
        build(tmp_path / "d" / name, tmp_path / "a.txt", {"kind": "bytes"}, eval=str(tmp_path / f"{name}.txt"))
        warned = capsys.readouterr().err
        assert (f"{name}.txt: {said} of this validation text is also trained on" in warned) == bool(said)
        assert bool(said) == bool(warned)


def test_long_lines_are_compared_by_their_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [f"In the year {i} the king of the hills had {i * i} sheep and a dog. " for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(sentences))
    (tmp_path / "b.txt").write_text("".join(sentences[500:700]))
    build(tmp_path / "d", tmp_path / "a.txt", {"kind": "bytes"}, eval=str(tmp_path / "b.txt"))
    assert "b.txt: 100% of this validation text is also trained on" in capsys.readouterr().err


def test_the_memory_of_the_comparison_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "KEPT", 1000)
    (tmp_path / "b.txt").write_text("".join(f"a line of validation text with the number {i}\n" for i in range(1000)))
    overlap = split.Overlap(sources_of([str(tmp_path / "b.txt")], Data()), None)
    assert sum(map(len, overlap.sentences)) <= 1000


def test_warnings_are_let_through_by_quiet_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.console, "quiet", True)
    (tmp_path / "a.txt").write_bytes(b"some text of words\n" * 500 + b"caf\xe9\n")
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "bytes"}, separator=r"\n\n")
    warned = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in warned] == ["warning:"] * 2
    assert "1 invalid sequence of bytes was replaced" in warned[0]
    assert "never occurs" in warned[1] and "a backslash is taken as typed" in warned[1]
    assert [line.removeprefix("warning: ") for line in warned] == shards.manifest["findings"][-2:]


def test_a_part_of_the_validation_text_is_counted_as_that_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.txt").write_text("other " * 100)
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"kind": "bytes"}, eval=str(tmp_path / "b.txt"), eval_bytes=200)
    assert [row["bytes"] for row in shards.manifest["found"]] == [500, 200, 700]
    assert [row["tokens"] for row in shards.manifest["found"]] == [501, 201, 702]


def test_shards_from_before_line_ends_were_a_choice_have_them_all(tmp_path: Path, text_file: Path) -> None:
    build(tmp_path / "d", text_file, newlines="keep")
    manifest = folder.read_manifest(tmp_path / "d")
    del manifest["settings"]["newlines"], manifest["settings"]["encoding"]
    before = written(tmp_path / "d")
    folder.write_manifest(tmp_path / "d", manifest)
    build(tmp_path / "d", text_file, newlines="keep")
    assert written(tmp_path / "d") == before
    build(tmp_path / "d", text_file)
    assert written(tmp_path / "d") != before


@pytest.mark.parametrize("kind", ["char", "bpe", "bytes"])
def test_prompts_are_the_beginnings_of_held_out_lines(tmp_path: Path, kind: str) -> None:
    lines = [f"The {n}th king of a very old house spoke to men." for n in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    shards = prepare(Data(train=str(tmp_path / "a.txt")), TokenizerConfig(kind=kind, vocab_size=300), tmp_path / "d")
    prompts = beginnings(shards.eval, shards.tokenizer, 64)
    assert (
        prompts == ["The 374th king of", "The 387th king of"]
        and beginnings(shards.eval, shards.tokenizer, 64) == prompts
    )
    assert beginnings(shards.eval, shards.tokenizer, 2) == []
    (tmp_path / "b.txt").write_text("天地玄黄宇宙洪荒日月盈昃辰宿列张\n" * 300)
    other = prepare(Data(train=str(tmp_path / "b.txt")), TokenizerConfig(kind=kind, vocab_size=300), tmp_path / "e")
    assert beginnings(other.eval, other.tokenizer, 64) == ["天地玄黄宇宙洪荒"]


def lossy(path: Path, decoder: Any = None) -> Path:
    """The folder of a tokenizer that leaves out what it does not know."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(
        models.BPE(vocab={c: i for i, c in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz ,.\n"])}, merges=[])
    )
    backend.decoder = decoders.Fuse()
    path.mkdir()
    Tokenizer(backend, {"eos_token": "</s>"}).save(path)
    return path


def test_what_a_tokenizer_loses_is_counted_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the king 你好\n" * 900 + "plain text\n" * 100)
    made = build(tmp_path / "d", tmp_path / "a.txt", {"path": str(lossy(tmp_path / "tok"))})
    said = " ".join(capsys.readouterr().err.split())
    assert f"{900 * 6:,} of {900 * 16 + 1100:,} bytes" in said and "do not come back from the ids" in said
    assert made.train.lost_bytes + made.eval.lost_bytes == 900 * 6 and made.train.lost_per_token > 0
    again = open_shards(tmp_path / "d")
    assert (again.train.lost_bytes, again.eval.lost_bytes) == (made.train.lost_bytes, made.eval.lost_bytes)
    assert "nobody counted" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert "lost_bytes" in manifest["splits"]["eval"]


def test_shards_of_before_it_was_counted_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the king 你好\n" * 900)
    shards = build(tmp_path / "d", tmp_path / "a.txt", {"path": str(lossy(tmp_path / "tok"))})
    for facts in shards.manifest["splits"].values():
        del facts["lost_bytes"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.folder, "read_manifest", lambda path: shards.manifest)
        open_shards(tmp_path / "d", verified=True)
    assert "nobody counted what decoding does not give back" in " ".join(capsys.readouterr().err.split())


def test_shards_of_a_tokenizer_that_loses_nothing_have_no_word_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the king of men\n" * 100)
    made = build(tmp_path / "d", tmp_path / "a.txt")
    assert "lost_bytes" not in made.manifest["splits"]["train"] and made.train.lost_bytes == 0
