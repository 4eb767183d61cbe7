"""What is said about a corpus before training: counts, lengths, copies and scripts, against counting by hand."""

import random
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples

from gptworks.core.config import Data
from gptworks.core.errors import DataError
from gptworks.data import findings as module
from gptworks.data import text as texts
from gptworks.data.findings import DocumentSample, Findings, Piece, lines, script_of, table, warnings
from gptworks.data.sources import findings_of, sources_of

SCRIPTS = {
    "Latin": "aÉßﬁ", "Han": "红楼夢", "Kana": "ひカ", "Hangul": "한글", "Cyrillic": "мир", "Greek": "λόγος",
    "Arabic": "سلام", "Hebrew": "שלום", "Devanagari": "नम", "Thai": "ไทย", "other": "ქართ",
}  # fmt: skip


def read(*documents: list[str], size: int = 0) -> list[Findings]:
    """One reading of a corpus whose sources have these documents."""
    found = []
    for number, source in enumerate(documents):
        one = Findings(f"s{number}", look=DocumentSample(size, len(documents)))
        for text in source:
            for piece in texts.pieces([text]):
                one.count(Piece(piece.text, piece.first, number))
        found.append(one)
    return found


def test_every_script_is_told_and_marks_and_digits_are_no_letters() -> None:
    for script, letters in SCRIPTS.items():
        assert {script_of(ord(letter)) for letter in letters if letter.isalpha()} == {script}
    assert {script_of(ord(c)) for c in "5٣ \n.🎉\u0301"} == {None}


@given(st.lists(st.text(st.sampled_from("".join(SCRIPTS.values()) + "5 \n🎉"), max_size=50), max_size=5))
@settings(max_examples=examples(50), deadline=None)
def test_shares_of_scripts_are_those_of_the_letters(documents: list[str]) -> None:
    (found,) = read(documents)
    expected = Counter(script_of(ord(c)) for text in documents for c in text if unicodedata.category(c)[0] == "L")
    assert found.look and found.look.letters() == expected


def test_the_sample_is_bounded_and_spread_over_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 50_000)
    found = Findings(look=DocumentSample(2_000_000, 1))
    for number in range(1000):
        found.heard(2000)
        found.count(Piece(("а" if number >= 500 else "a") * 2000, True))
    assert found.look
    letters = found.look.letters()
    assert 45_000 <= found.look._taken <= 50_000
    assert abs(letters.total() / 2_000_000 - 1) < 0.001
    assert abs(letters["Cyrillic"] / letters.total() - 0.5) < 0.1


@pytest.mark.parametrize("sources", [1, 2, 100])
def test_the_sample_is_bounded_over_all_sources(tmp_path: Path, sources: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 3000)
    for number in range(sources):
        (tmp_path / f"{number}.txt").write_text("some letters " * (20_000 // sources))
    made = sources_of([str(tmp_path / f"{number}.txt") for number in range(sources)], Data())
    found = findings_of(made, lambda count: None)
    for source, one in zip(made, found, strict=True):
        assert sum(piece.size for piece in source.pieces(one)) == source.size
    taken = [one.look._taken for one in found if one.look]
    assert sum(taken) <= 3000 and min(taken) >= 2000 // sources


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "d" * 30, "e " * 30]), max_size=6), min_size=1, max_size=4))
@settings(max_examples=examples(100), deadline=None)
def test_copies_are_counted_where_they_come_second(corpus: list[list[str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", 10)  # the hash is of the whole text, however it was cut
        rows = table(read(*corpus), [np.ones(len(source), dtype=np.int64) for source in corpus])
    seen: dict[str, str] = {}
    for number, (source, row) in enumerate(zip(corpus, rows, strict=False)):
        copies = []
        for position, text in enumerate(source, 1):
            if text in seen:
                copies.append(f"document {position} of s{number} repeats {seen[text]}")
            seen.setdefault(text, f"document {position} of s{number}")
        assert row["copies"] == len(copies) and row["copy"] == (copies[0] if copies else None)
    assert len(rows) == len(corpus) + (len(corpus) > 1)
    assert sum(row["copies"] for row in rows[: len(corpus)]) == rows[-1]["copies"]


def test_a_small_source_is_sampled_too_and_the_total_goes_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 2000)
    rows = table(read(["latin letters " * 1000] * 30, ["слова"]), [np.ones(30, dtype=np.int64), np.ones(1, dtype=int)])
    assert rows[1]["letters"] == {"Cyrillic": 1.0} and rows[2]["letters"]["Latin"] > 0.999


def test_one_different_character_is_no_copy() -> None:
    (row,) = table(read(["x" * 100 + end for end in "abc"]), [np.ones(3, dtype=np.int64)])
    assert row["copies"] == 0


def test_copies_are_looked_for_among_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HASHED", 4)
    rows = table(read(["a", "a", "a"], ["a"]), [np.ones(3, dtype=np.int64), np.ones(1, dtype=np.int64)])
    assert [row["copies"] for row in rows] == [1, 1, 2]
    assert any("first 2 documents" in line for line in lines(rows))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200))
@settings(max_examples=examples(50), deadline=None)
def test_percentiles_are_lengths_that_so_many_documents_do_not_exceed(lengths: list[int]) -> None:
    (row,) = table([Findings("a")], [np.array(lengths)])
    ordered = sorted(lengths)
    for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
        smallest = next(n for n in ordered if sum(m <= n for m in lengths) >= share * len(lengths) - 1e-9)
        assert row["length"][name] == smallest
    assert row["tokens"] == sum(lengths)


def test_one_source_takes_a_line_and_several_an_aligned_table() -> None:
    draw = random.Random(0)
    one = read(["some words"] * 5)
    rows = table(one, [np.array([draw.randint(1, 99) for _ in range(5)])])
    (said,) = [line for line in lines(rows) if "bytes" in line]
    assert "50 bytes, Latin 100%" in said and "exact copies: 4" in said
    several = read(["some words"] * 5, ["слова"])
    rows = table(several, [np.array([5] * 5), np.array([1_234_567])])
    shown = lines(rows)
    assert shown[0].split() == list(module.HEADINGS) and len(shown) == 5
    assert [line.split()[0] for line in shown[1:4]] == ["s0", "s1", "total"]
    place = shown[0].index("tokens") + len("tokens")
    assert [line[:place].split()[-1] for line in shown[1:4]] == ["25", "1,234,567", "1,234,592"]
    assert shown[4].startswith("s0: a copy, for example: document 2 of s0 repeats document 1 of s0")


def test_what_was_dropped_is_said_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one \xff"}\nbroken\n{"text": ""}\n')
    (source,) = sources_of([str(tmp_path / "a.jsonl")], Data(max_bad_rows=0.5, encoding="utf-8"))
    found = findings_of([source], lambda count: None)
    assert [piece.text for piece in source.pieces(found[0])] == ["one \ufffd"]
    rows = table(found, [np.array([3])])
    said = "\n".join(lines(rows))
    assert "1 of 3 rows was unreadable and skipped" in said and "a.jsonl:2: not valid JSON" in said
    assert "1 empty document was dropped" in said
    assert warnings(rows) == ["1 invalid sequence of bytes was replaced by U+FFFD"]


def test_a_function_that_yields_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def rows():\n    yield 'one'\n    yield 5\n")
    (source,) = sources_of([f"{tmp_path / 'mine.py'}:rows"], Data())
    with pytest.raises(DataError, match="document 2 is not text"):
        list(source.pieces(Findings()))


@pytest.mark.parametrize(
    "text, suffix, way_out",
    [
        ("\n<|endoftext|>\n".join(f"document {i}" for i in range(300)), ".txt", "data.separator='<|endoftext|>' makes"),
        ("one<|eot_id|>two<|start_header_id|>", ".txt", "data.separator='<|eot_id|>' makes"),
        ("<|im_start|>user\nhi<|im_end|>\n" * 9, ".txt", "training on chat is not in this version"),
        ("<start_of_turn>user\nhi", ".txt", "training on chat"),
        ("[INST] hi [/INST]", ".txt", "training on chat"),
        ("<｜end▁of▁sentence｜>", ".txt", "makes documents of what they part"),
        ('{"text": "a<|endoftext|>"}\n', ".jsonl", "training on chat"),
    ],
)  # fmt: skip
def test_control_tokens_in_a_text_are_told_with_the_way_out(
    tmp_path: Path, text: str, suffix: str, way_out: str
) -> None:
    (tmp_path / f"a{suffix}").write_text(text)
    (source,) = sources_of([str(tmp_path / f"a{suffix}")], Data())
    list(source.pieces(found := Findings()))
    (said,) = found.warnings()
    assert said.startswith("control tokens in the text are read as plain text: ") and way_out in said


def test_brackets_and_tags_are_no_control_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("if a <| b |> c, <s>old</s> <b>bold</b> <|two words|> [1] x<y [INSTALL] ||")
    (source,) = sources_of([str(tmp_path / "a.txt")], Data())
    list(source.pieces(found := Findings()))
    assert found.warnings() == []


@pytest.mark.parametrize("number, said", [
    (1, "1 of 1 document has CRLF line ends, read as LF"), (2, "2 of 2 documents have CRLF line ends, read as LF"),
])  # fmt: skip
def test_line_ends_are_in_the_table_and_counts_agree_with_their_nouns(tmp_path: Path, number: int, said: str) -> None:
    for i in range(number):
        (tmp_path / f"{i}.txt").write_bytes(b"a line\r\nanother\r\n")
    (source,) = sources_of([str(tmp_path)], Data())
    list(source.pieces(found := Findings()))
    assert any(said in line for line in lines(table([found], [np.ones(number, dtype=np.int64)])))


def test_one_text_with_many_blank_lines_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A story.\n\n" * 800)
    for separator, hints in ((None, 1), ("\n\n", 0)):
        (source,) = sources_of([str(tmp_path / "a.txt")], Data(separator=separator))
        (found,) = findings_of([source], lambda count: None)
        list(source.pieces(found))
        assert sum("data.separator=$'\\n\\n'" in remark for remark in found.remarks()) == hints
    (source,) = sources_of(["shakespeare"], Data())
    (found,) = findings_of([source], lambda count: None)
    list(source.pieces(found))
    assert found.remarks() == []
