"""Reading text: every format, every kind of damage, and cuts that do not change ids."""

import glob
import gzip
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples

from gptworks.core.config import Data
from gptworks.core.errors import DataError, GptworksError, StorageError, UsageError
from gptworks.data import sources
from gptworks.data import text as texts
from gptworks.data.findings import Findings
from gptworks.data.sources import sources_of
from gptworks.data.tokenizer import PATTERNS, Tokenizer


def documents(where: Any, findings: Findings | None = None, **options: Any) -> list[str]:
    found: list[str] = []
    for source in sources_of([str(w) for w in (where if isinstance(where, list) else [where])], Data(**options)):
        for piece in source.pieces(findings if findings is not None else Findings()):
            if piece.first:
                found.append("")
            found[-1] += piece.text
    return found


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.unknown", "A.TXT", "noending"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, name: str) -> None:
    text = "Hello\n\nwörld\r\n\ttabs and no last newline"
    assert documents(write(tmp_path / name, text), newlines="keep") == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_jsonl_row_is_a_document(tmp_path: Path, name: str) -> None:
    rows = '{"text": "one\\ntwo", "id": 1}\n\n{"id": 2, "text": "three \\u00e9"}'  # no last newline, an empty line
    assert documents(write(tmp_path / name, rows)) == ["one\ntwo", "three é"]


def test_builtin_text_is_there() -> None:
    (text,) = documents("shakespeare")
    assert text.startswith("First Citizen:") and len(text) > 1_000_000


def test_folder_glob_and_list_give_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "sub" / "a.md", "sub a")
    write(tmp_path / "a.txt.gz", "a")
    write(tmp_path / "c.jsonl", '{"text": "c"}')
    write(tmp_path / "ignored.png", b"\0")
    assert documents(tmp_path) == ["a", "b", "c", "sub a"]
    assert documents(str(tmp_path / "*.txt*")) == ["a", "b"]
    assert documents(str(tmp_path / "**" / "*.md")) == ["sub a"]
    assert documents([str(tmp_path / "c.jsonl"), str(tmp_path / "b.txt")]) == ["c", "b"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / ".corpus" / "a.txt", "a")  # of what is named itself, nothing is hidden
    write(tmp_path / ".corpus" / "sub" / "b.txt", "b")
    for name in (".ipynb_checkpoints/a.txt", "._a.txt", ".Trash-0/files/c.txt", ".git/d.md", "sub/.hidden/e.txt"):
        write(tmp_path / ".corpus" / name, b"\0hidden")
    for place in ("", "**", "**/*.txt", "**/*", "*/../**/*.txt"):
        assert documents(tmp_path / ".corpus" / place) == ["a", "b"]
    write(tmp_path / ".corpus" / ".more" / "f.txt", "f")
    assert documents(tmp_path / ".corpus" / ".more" / "*.txt") == ["f"]
    assert documents(tmp_path / ".corpus" / ".m*" / "**" / "*.txt") == ["f"]


def test_links_are_followed_alike_in_folder_and_glob_and_each_file_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "real" / "z.txt", "z")
    write(tmp_path / "d" / "a.txt", "a")
    write(tmp_path / "d" / "sub" / "b.txt", "b")
    (tmp_path / "d" / "more").symlink_to("../real")
    (tmp_path / "d" / "again").symlink_to("../real")
    (tmp_path / "d" / "same.txt").symlink_to("a.txt")
    (tmp_path / "d" / "gone.txt").symlink_to("nowhere")
    for number in range(3):  # circles, of which a glob of Python's would make 3**40 paths
        (tmp_path / "d" / "sub" / f"loop{number}").symlink_to("../..")
    for place in ("d", "d/**", "d/**/*.txt"):
        assert sorted(documents(tmp_path / place)) == ["a", "b", "z"]


def test_a_pipe_and_a_link_to_nowhere_are_named_as_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("gone.txt")
    for name, said in (("pipe.txt", "not a regular file"), ("link.txt", "a link to gone.txt, which is not there")):
        with pytest.raises(DataError, match=f"{name}: {said}"):
            documents(tmp_path / name)


def test_a_plain_glob_gives_what_pythons_gives(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "x/a3.txt", "x/y/a4.txt", "x/y/a4.md", "x.d/a5.txt"):
        write(tmp_path / name, name)
    for pattern in ("*.txt", "a[12].txt", "a?.txt", "*/a*.txt", "x/**/*.txt", "**/y/*", "**/a*", "x*/**/a*.txt", "**"):
        files = [Path(path) for path in glob.glob(str(tmp_path / pattern), recursive=True) if Path(path).is_file()]
        assert sources_of([str(tmp_path / pattern)], Data())[0].files == sorted(files)


def test_a_folder_that_cannot_be_read_is_an_error_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub" / "b.txt", "b")
    whole = os.listdir

    def listdir(path: Any) -> list[str]:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "listdir", listdir)
    for place in ("", "**/*.txt", "*/*.txt"):
        with pytest.raises(StorageError, match="sub: Permission denied; make it readable"):
            documents(tmp_path / place)
    assert documents(tmp_path / "*.txt") == ["a"]


@pytest.mark.parametrize("name", ["a*.txt", "~x.txt", "[1].txt", "mine.py:rows", "what?.txt", "a b.txt", "#1.txt"])
def test_what_exists_under_the_very_name_is_meant(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, "this one")
    write(tmp_path / "ab.txt", "another")
    write(tmp_path / "1.txt", "another")
    assert documents(name) == documents(tmp_path / name) == ["this one"]


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "t" / "a.txt", "a")
    for place in ("~/t", "~/t/a.txt", "~/t/*.txt"):
        assert documents(place) == ["a"]
    write(tmp_path / "mine.py", "def rows():\n    yield 'one'\n")
    assert documents("~/mine.py:rows") == ["one"]


@pytest.mark.parametrize(
    "row, column",
    [
        ({"id": "x", "text": "T", "title": "t"}, "text"),
        ({"id": "x", "content": "T", "title": "t"}, "content"),
        ({"story": "T", "n": 5}, "story"),
        ({"n": 5, "odd_name": "T"}, "odd_name"),
    ],
)
def test_text_column_is_found_and_named(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    findings = Findings()
    assert documents(write(tmp_path / "a.jsonl", json.dumps(row)), findings) == ["T"]
    assert findings.columns == {column: 1}


def test_a_usual_column_is_taken_whatever_its_first_row_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": null, "id": "doc-1"}\n{"text": "T", "id": "doc-2"}')
    with pytest.raises(DataError, match="null, not text"):
        documents(path)
    assert documents(path, max_bad_rows=0.5) == ["T"]


@pytest.mark.parametrize("row", [{"messages": [{"role": "user"}], "source": "web"}, {"conversations": [], "id": "x"}])
def test_what_lies_beside_a_conversation_is_not_taken_for_the_text(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="this is chat data .* training on messages is not in this version"):
        documents(write(tmp_path / "a.jsonl", json.dumps(row)))


def test_text_column_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert documents(path, text_column="body") == ["yes"]


@pytest.mark.parametrize(
    "bad, problem",
    [
        ('{"text": "x"', "not valid JSON"),
        ("[1]", "a list"),
        ("5", "a number"),
        ('{"body": "x"}', "no column 'text'"),
        ('{"text": 5}', "a number, not text"),
        ('{"text": null}', "null, not text"),
        ('{"text": ' + "9" * 5000 + "}", "a number, not text"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=range(8),
)
def test_broken_row_names_file_and_line(tmp_path: Path, bad: str, problem: str) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "fine"}\n\n' + bad + '\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{problem}"):
        documents(path)


def test_line_number_is_right_beyond_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 64)
    path = write(tmp_path / "rows.jsonl", '{"text": "some words of text"}\n' * 99 + "oops")
    with pytest.raises(DataError, match=r"rows\.jsonl:100: "):
        documents(path)


def test_ambiguous_column_asks_for_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*header, body.*data\.text_column"):
        documents(write(tmp_path / "a.jsonl", '{"header": "a", "body": "b"}'))


@pytest.mark.parametrize(
    "name", ["w.pt", "w.pth", "w.pkl", "w.pickle", "w.bin", "w.ckpt", "W.PKL", "w.pkl.gz", "w.npy"]
)
def test_files_that_can_run_code_are_refused_unread(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="could run code"):
        documents(write(tmp_path / name, "harmless text"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_binary_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="binary"):
        documents(write(tmp_path / name, b"\x7fELF\x00\x01\x02" * 50))


def test_damaged_gzip_is_reported(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text and more of it\n" * 500)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (whole[: len(whole) // 2], bytes(flipped), b"no gzip at all", whole + b"rubbish after the end"):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.txt\.gz: damaged gzip"):
            documents(path)


@pytest.mark.parametrize("where", ["nothere.txt", "nothere/*.txt", "shakespear"])
def test_missing_place_is_named(where: str) -> None:
    with pytest.raises(DataError, match=where.replace("*", r"\*")):
        documents(where)


def test_nearest_builtin_is_named() -> None:
    with pytest.raises(DataError, match="did you mean 'shakespeare'"):
        documents("shakespear")


def test_folder_without_text_and_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="in this folder"):
        documents(tmp_path)
    with pytest.raises(UsageError):
        documents([])


def test_an_empty_place_is_not_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "private.txt", "text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is empty: name a file"):
        documents("")


def test_a_file_name_that_is_not_utf8_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path / os.fsdecode(b"caf\xe9.txt"), "text")
    with pytest.raises(DataError, match=r"caf\\udce9\.txt.* is not UTF-8"):
        sources_of([str(tmp_path)], Data())


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    findings = Findings()
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", '{"text": ""}\n{"text": "x"}\n{"text": ""}')
    write(tmp_path / "c.txt", b"\xef\xbb\xbf")
    assert documents(tmp_path, findings) == ["x"]
    assert (findings.documents, findings.empty_documents) == (1, 4)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello \xef\xbb\xbf")) == ["hello \ufeff"]
    assert documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}')) == ["x"]


BROKEN = st.lists(
    st.sampled_from(
        [
            b"a",
            b"\xc3\xa9",
            b"\xe2\x82\xac",
            b"\xf0\x9f\x8e\x89",
            b"\xef\xbf\xbd",
            b"\xff",
            b"\xc3",
            b"\xe2\x82",
            b"\xf0\x9f",
            b"\xed\xa0\x80",
            b"\xbf\xbd",
            b"\xef",
        ]
    ),
    min_size=1,
    max_size=20,
).map(b"".join)


@given(data=BROKEN, block=st.integers(4, 9))
@settings(max_examples=examples(300), deadline=None)
def test_invalid_utf8_is_counted_wherever_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, block: int
) -> None:
    """A genuine U+FFFD is no error, also where it or another character straddles two blocks."""
    path = write(tmp_path_factory.getbasetemp() / "broken.txt", data)
    expected = data.decode("utf-8", "replace")
    findings = Findings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", block)
        assert "".join(documents(path, findings, encoding="utf-8")) == expected
    assert findings.invalid_utf8 == expected.count("\ufffd") - data.count(b"\xef\xbf\xbd")


@given(data=BROKEN, block=st.integers(4, 9), mark=st.booleans())
@settings(max_examples=examples(300), deadline=None)
def test_strict_reading_names_the_first_bad_byte(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, block: int, mark: bool
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "strict.txt", b"\xef\xbb\xbf" * mark + data)
    try:
        text, place = path.read_bytes().decode("utf-8"), None
    except UnicodeDecodeError as error:
        text, place = "", None if error.reason == "unexpected end of data" else error.start
        assert place is not None or error.start >= len(path.read_bytes()) - 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", block)
        if text:
            assert "".join(documents(path, invalid_utf8="error")) == text.removeprefix("\ufeff" * mark)
        else:
            with pytest.raises(DataError, match="UTF-8" if place is None else f"byte {place}: not UTF-8"):
                documents(path, invalid_utf8="error")


def test_separator_makes_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "one\n<end>\ntwo <e\n<end>\n\n<end>three")
    for size in (4_000_000, 5):  # also where a separator straddles two blocks
        monkeypatch.setattr(texts, "PIECE", size)
        assert documents(path, separator="<end>") == ["one", "two <e", "three"]


def test_own_source_is_a_function_in_a_file(tmp_path: Path) -> None:
    code = write(tmp_path / "mine.py", "def rows():\n    yield 'one'\n    yield 'two \\udcff'\n")
    assert documents(f"{code}:rows") == ["one", "two \ufffd"]
    with pytest.raises(GptworksError, match="defines no"):
        documents(f"{code}:nothing")


@pytest.mark.parametrize(
    "code, kind, said",
    [
        ("def rows(:\n", UsageError, r"mine\.py cannot be loaded: SyntaxError"),
        ("1 / 0\n", UsageError, r"mine\.py cannot be loaded: ZeroDivisionError"),
        ("rows = 5\n", UsageError, "not a function"),
        ("def rows():\n    pass\n", DataError, "failed at document 1: TypeError: 'NoneType'"),
        ("def rows():\n    yield 'one'\n    1 / 0\n", DataError, "failed at document 2: ZeroDivisionError"),
        ("def rows():\n    yield b'one'\n", DataError, r"document 1 is not text \(str\) but bytes"),
    ],
)
def test_a_mistake_in_an_own_source_is_named(tmp_path: Path, code: str, kind: type[GptworksError], said: str) -> None:
    file = write(tmp_path / "mine.py", code)
    with pytest.raises(kind, match=said):
        documents(f"{file}:rows")


# -- cutting -----------------------------------------------------------------------------------------------------

ALPHABETS = [
    "abcdefgh ABC  '",
    "a1 2345 67890",
    "a \n\r\t\u00a0\u3000\u2028\x85\x1c\u200b\x0b",
    "äöé\u0301\u0308ß ſK",
    "红楼梦 日本語。、",
    "мир שלום عالم नमस्ते ไทย",
    "!?.,;:-_\"'()[]{}<|>#@ \n",
    "🎉👩\u200d👧🇩🇪 \ufe0f",
    "²½Ⅷ٣१৪ 五",
    "\U0001f9ff\U00031350\u0378\ue000 \U000e0001",
]
SCRIPT = st.one_of(
    st.sampled_from(ALPHABETS).flatmap(lambda alphabet: st.text(alphabet=alphabet, min_size=1, max_size=12)),
    st.sampled_from(
        [
            "  ",
            "\n\n",
            "\r\n",
            "\r\n\r\n",
            " \n ",
            "\n    ",
            "'s",
            "'ll ",
            "don't",
            "I'VE",
            " a b",
            "x\ny",
            ".\n\nA",
            "123 456",
            "<|endoftext|>",
            "\n",
            " ",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
MIXED = st.lists(SCRIPT, min_size=1, max_size=40).map("".join)


@cache
def tokenizer(pattern: str) -> Tokenizer:
    """Trained on the very alphabets, spaces and line breaks, so that merges reach across every tempting cut."""
    lines = ["".join(alphabet) * 3 for alphabet in ALPHABETS]
    lines += ["don't I'VE it's a b x\ny\n\nA\r\n\r\n    def 123 456 7890\n\n\n  \n!\n?\n\n\" a\n"] * 3
    return Tokenizer.train_bpe(lines + documents("shakespeare")[0][:50_000].split("\n\n\n"), 1200, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=MIXED, piece=st.integers(1, 30))
@settings(max_examples=examples(400), deadline=None)
def test_cut_text_has_the_ids_of_the_whole(pattern: str, text: str, piece: int) -> None:
    encode = tokenizer(pattern)._slow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        pieces = [part.text for part in texts.pieces([text])]
    assert "".join(pieces) == text
    assert [i for part in pieces for i in encode(part)] == encode(text).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=MIXED)
@settings(max_examples=examples(200), deadline=None)
def test_every_safe_place_is_safe(pattern: str, text: str) -> None:
    """Cut at all of them at once, and at each alone."""
    encode = tokenizer(pattern)._slow
    whole = encode(text).tolist()
    places = [match.start() for match in texts.SAFE_CUT.finditer(text)]
    for chosen in [places, *([place] for place in places)]:
        bounds = [0, *chosen, len(text)]
        parts = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        assert [i for part in parts for i in encode(part)] == whole


def test_real_text_is_cut_often_and_keeps_its_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = documents("shakespeare")[0][:100_000]
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(texts, "PIECE", 1000)
    pieces = list(sources_of([str(path)], Data())[0].pieces(Findings()))
    assert len(pieces) > 80 and max(len(piece.text) for piece in pieces) < 2100
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert "".join(piece.text for piece in pieces) == text
    for pattern in PATTERNS:
        encode = tokenizer(pattern).encode
        assert [i for piece in pieces for i in encode(piece.text)] == encode(text)


def test_text_without_a_safe_place_is_cut_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 10)
    monkeypatch.setattr(texts, "HARD_CUT", 50)
    pieces = [part.text for part in texts.pieces(["1234567"] * 40)]
    assert "".join(pieces) == "1234567" * 40 and max(map(len, pieces)) <= 50


# -- the draw that splits ----------------------------------------------------------------------------------------


def test_text_without_a_safe_place_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked through anew for each block, a megabyte would take half a minute."""
    monkeypatch.setattr(texts, "PIECE", 1000)
    blocks = ["a" * 1000] * 1000
    start = time.process_time()
    assert [len(piece.text) for piece in texts.pieces(blocks)] == [1_000_000]
    assert time.process_time() - start < 5


@pytest.mark.parametrize("place", [*range(990, 1010), 2995, 2999, 3000, 3001])
def test_a_safe_place_at_the_end_of_a_block_is_found_later(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(texts, "PIECE", 1000)
    text = "a" * place + " b" + "c" * (6000 - place)
    cut = [piece.text for piece in texts.pieces(text[i : i + 500] for i in range(0, len(text), 500))]
    assert [len(piece) for piece in cut] == [place, len(text) - place]


def test_draw_is_even_and_the_same_for_copies() -> None:
    draws = [sources.draw(f"document {i}") / 2**64 for i in range(4000)]
    assert draws == [sources.draw(f"document {i}") / 2**64 for i in range(4000)]
    assert min(draws) >= 0 and max(draws) < 1
    assert 0.08 < sum(value < 0.1 for value in draws) / 4000 < 0.12


def test_what_a_function_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loud.py").write_text("print('begun')\ndef documents():\n    print('noise')\n    yield 'the sea'\n")
    pieces = list(sources.Source(f"{tmp_path / 'loud.py'}:documents", Data()).pieces(Findings()))
    printed = capsys.readouterr()
    assert [piece.text for piece in pieces] == ["the sea"]
    assert "noise" in printed.err and "noise" not in printed.out


def test_a_function_that_gives_one_text_is_not_cut_into_letters(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def documents():\n    return 'the sea'\n")
    with pytest.raises(DataError, match="gives one text; yield it"):
        list(sources.Source(f"{tmp_path / 'one.py'}:documents", Data()).pieces(Findings()))
