"""Rows of every format: the same documents from each, no row lost or counted twice, nothing that breaks a reader."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv
from pyarrow import parquet
from tiny import examples

from gptworks.core.config import Data
from gptworks.core.errors import DataError, UsageError
from gptworks.data import formats
from gptworks.data import text as texts
from gptworks.data.findings import Findings
from gptworks.data.sources import sources_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data, ".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def read(path: Path, findings: Findings | None = None, **options: Any) -> list[str]:
    found: list[str] = []
    (source,) = sources_of([str(path)], Data(**options))
    for piece in source.pieces(Findings(str(path)) if findings is None else findings):
        if piece.first:
            found.append("")
        found[-1] += piece.text
    return found


def table(rows: list[str], delimiter: str = ",") -> str:
    """A column of numbers, the text, and one that is empty."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text", "note"])
    writer.writerows([number, row, ""] for number, row in enumerate(rows))
    return out.getvalue()


def parquet_bytes(rows: list[Any], kind: Any = None, **options: Any) -> bytes:
    out = io.BytesIO()
    columns = {"id": list(range(len(rows))), "text": pyarrow.array(rows, kind or pyarrow.string())}
    parquet.write_table(pyarrow.table(columns), out, **options)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": lambda rows: "\n".join(json.dumps({"id": 1, "text": row}) for row in rows).encode(),
    ".json": lambda rows: json.dumps([{"id": 1.5, "text": row} for row in rows], indent=1).encode(),
    ".csv": lambda rows: table(rows).encode(),
    ".tsv": lambda rows: table(rows, "\t").encode(),
    ".parquet": lambda rows: parquet_bytes(rows, row_group_size=3),
}


def written(folder: Path, kind: str, rows: list[str], packer: str = "") -> Path:
    path = folder / f"a{kind}{packer}"
    path.write_bytes(PACKERS[packer](WRITERS[kind](rows)))
    return path


# Characters that matter to one format or another; \r alone is what csv cannot keep apart from a line break.
TEXT = st.text(st.sampled_from(list("ab \n\t,;:\"'\\[]{}/é红🎉\u2028\x85\ufeff<>|0")), min_size=1, max_size=12)
ROWS = st.lists(TEXT, min_size=1, max_size=12)


@pytest.mark.parametrize("kind", WRITERS)
@given(rows=ROWS, block=st.integers(4, 40))
@settings(max_examples=examples(40), deadline=None)
def test_rows_come_back_whatever_is_in_them_and_wherever_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: list[str], block: int
) -> None:
    path = written(tmp_path_factory.getbasetemp(), kind, rows)
    findings = Findings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", block)
        assert read(path, findings) == rows
    assert (findings.rows, findings.documents, findings.rejected) == (len(rows), len(rows), 0)


@pytest.mark.parametrize("packer", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ""])
def test_a_packed_file_reads_like_the_plain_one(tmp_path: Path, kind: str, packer: str) -> None:
    rows = [f"row {i}, é\nand more\n" for i in range(50)]
    data = WRITERS.get(kind, lambda rows: "".join(rows).encode())(rows)
    (tmp_path / f"a{kind}{packer}").write_bytes(PACKERS[packer](data))
    assert read(tmp_path / f"a{kind}{packer}") == (rows if kind in WRITERS else ["".join(rows)])


def test_a_folder_is_read_in_every_format(tmp_path: Path) -> None:
    for number, kind in enumerate(WRITERS):
        (tmp_path / f"{number}{kind}").write_bytes(WRITERS[kind]([f"row of {kind}"]))
    (tmp_path / "9.jsonl.zst").write_bytes(zstd.compress(b'{"text": "packed"}'))
    (tmp_path / "9.png").write_bytes(b"\0")
    assert read(tmp_path) == [f"row of {kind}" for kind in WRITERS] + ["packed"]


# -- .json -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | TEXT | st.just(""),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.lists(JSON, max_size=8), indent=st.none() | st.integers(0, 3), block=st.integers(1, 30), data=st.data())
@settings(max_examples=examples(50), deadline=None)
def test_a_json_list_is_cut_into_the_rows_that_a_parser_finds(
    rows: list[Any], indent: int | None, block: int, data: st.DataObject
) -> None:
    beside = data.draw(st.none() | st.dictionaries(TEXT, JSON.filter(lambda value: not isinstance(value, list))))
    whole: Any = rows if beside is None else {**beside, "rows": rows}
    text = "\n" + json.dumps(whole, indent=indent, ensure_ascii=data.draw(st.booleans())) + " \n"
    elements = formats._Elements(Path("a.json"))
    found = [row for i in range(0, len(text), block) for row in elements.feed(text[i : i + block])]
    elements.close()
    assert [json.loads(row or "") for _, row in found] == rows
    lines = text.split("\n")
    for line, row in found:  # the line it is said to begin at is where it begins
        assert (row or "").strip().split("\n")[0] in lines[line - 1]


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"text": "x"}', "it has none|this has none"),
        ('{"a": 1}\n{"a": 2}', r"\.jsonl"),
        ('"text"', "neither"),
        ("5", "this has"),
        ("x [1]", "beside"),
        ('[{"text": "x"}] y', "beside"),
        ('[{"text": "x"}] []', "beside"),
        ('{"a": [], "b": []}', "several lists"),
        ('[{"text": "x"}', "ends in the middle"),
        ('[{"text": "x', "ends in the middle"),
        ('[{"text": "x"}}', "did not open"),
        ('{"a": ["x"]]', "did not open"),
        ("", "none"),
        ("]", "neither"),
    ],
    ids=range(14),
)
def test_a_json_file_that_is_no_list_of_rows_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json:\d+: .*({problem})"):
        read(tmp_path / "a.json", max_bad_rows=0.99)


def test_a_list_within_an_object_and_an_empty_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": {"list": [1]}, "data": ["one", {"text": "two"}, ], "n": 3}')
    assert read(path) == ["one", "two"]
    path.write_text("[ ]")
    assert read(path) == []


# -- .csv and .tsv -----------------------------------------------------------------------------------------------


@given(rows=ROWS)
@settings(max_examples=examples(50), deadline=None)
def test_csv_is_read_as_arrow_reads_it(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "arrow.csv"
    plain = [row.replace("\ufeff", "") for row in rows]
    path.write_bytes(table([row for row in plain if row] or ["x"]).encode())
    options = arrow_csv.ParseOptions(newlines_in_values=True)
    convert = arrow_csv.ConvertOptions(column_types={"text": pyarrow.string()}, strings_can_be_null=False)
    assert read(path) == arrow_csv.read_csv(path, parse_options=options, convert_options=convert)["text"].to_pylist()


@pytest.mark.parametrize(
    "content, problem",
    [
        ("just some text\nand more\n", "first row must be a header"),
        ("5,hello\n6,there\n", "first row must be a header"),
        ("id,body\n1,x\n", r"id, body.*data\.text_column"),
        ("text,text\n1,x\n", "one column named"),
        ('"text\n1,x\n', "header cannot be read"),
    ],
    ids=range(5),
)
def test_a_table_without_a_header_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    for kind, delimiter in ((".csv", ","), (".tsv", "\t")):
        (tmp_path / f"a{kind}").write_text(content.replace(",", delimiter))
        with pytest.raises(DataError, match=rf"a\{kind}:1: .*{problem}"):
            read(tmp_path / f"a{kind}", max_bad_rows=0.99)


def test_the_header_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfid,body,text\r\n1,yes,no")  # as Excel writes it, but for the last line break
    assert read(path, text_column="id") == ["1"]
    assert read(path, text_column="body") == ["yes"] and read(path) == ["no"]
    with pytest.raises(DataError, match="one column named nothing"):
        read(path, text_column="nothing")


def test_a_document_may_be_longer_than_csv_expects(tmp_path: Path) -> None:
    assert read(written(tmp_path, ".csv", ["word " * 100_000])) == ["word " * 100_000]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_that_do_not_fit_their_header_are_bad(tmp_path: Path, end: str) -> None:
    lines = ["id,text", '1,"one', 'and more"', "2,two, with a comma", "3", "", '4,"four" is quoted', "5,five"]
    (tmp_path / "a.csv").write_bytes(end.join(lines).encode())
    findings = Findings()
    assert read(tmp_path / "a.csv", findings, max_bad_rows=0.9, newlines="keep") == [f"one{end}and more", "five"]
    assert (findings.rows, findings.rejected) == (5, 3)
    assert [reason.split(": ")[0].rpartition(":")[2] for reason in findings.reasons] == ["4", "5", "7"]
    with pytest.raises(DataError, match=r"a\.csv:4: 3 fields where the header has 2"):
        read(tmp_path / "a.csv")


# -- .parquet ----------------------------------------------------------------------------------------------------

KINDS = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_parquet_text_of_every_type(tmp_path: Path, kind: str, compression: str) -> None:
    rows = [f"row {i % 50} é" for i in range(300)]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(rows, KINDS[kind], row_group_size=70, compression=compression))
    assert read(tmp_path / "a.parquet") == rows


def test_parquet_bytes_are_text_if_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes([b"one", b"two \xff"], pyarrow.binary()))
    with pytest.raises(DataError, match=r"a\.parquet: no column holds text"):
        read(path)
    findings = Findings()
    options = {"text_column": "text", "encoding": "utf-8"}
    assert read(path, findings, **options) == ["one", "two \ufffd"] and findings.invalid_utf8 == 1
    with pytest.raises(DataError, match="row 2: byte 5 is not UTF-8"):
        read(path, text_column="text", invalid_utf8="error")
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        read(path, text_column="id")
    with pytest.raises(DataError, match=r"no column 'body' \(it has: id, text\)"):
        read(path, text_column="body")


def test_a_missing_parquet_text_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["one", None, "", "four"]))
    findings = Findings()
    assert read(tmp_path / "a.parquet", findings, max_bad_rows=0.25) == ["one", "four"]
    assert (findings.rows, findings.rejected, findings.empty_documents) == (4, 1, 1)
    assert "a.parquet:row 2: column 'text' is null" in findings.reasons[0]


def test_damaged_parquet_is_reported(tmp_path: Path) -> None:
    whole = bytearray(parquet_bytes([f"row {i} of some text" for i in range(500)], use_dictionary=False))
    for data in (whole[: len(whole) // 2], whole[:-3], b"PAR1", b"no parquet at all"):
        (tmp_path / "a.parquet").write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"a\.parquet: damaged Parquet"):
            read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(bytes(whole)))
    with pytest.raises(DataError, match="compressed in itself"):
        read(tmp_path / "a.parquet.gz")


def test_only_the_text_column_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["one", "two"]))
    asked: list[Any] = []
    whole = parquet.ParquetFile.iter_batches

    def spy(file: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(named["columns"])
        return whole(file, *arguments, **named)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spy)
    assert read(tmp_path / "a.parquet") == ["one", "two"] and asked == [["text"]]


# -- rows that nobody can read -----------------------------------------------------------------------------------

BAD_JSON = [
    '{"text": "x"',
    '{"text": "one"} {"text": "two"}',
    "[1]",
    "7",
    "NaN",
    '{"body": "x"}',
    '{"text": NaN}',
    '{"text": null}',
    '{"text": ["x"]}',
    '{"text": ' + "9" * 5000 + "}",
    '{"text": "' + "long " * 2000 + '"}',
]
GOOD_JSON = {
    '{"text": "plain"}': "plain",
    '{"text": "n", "id": ' + "9" * 5000 + "}": "n",
    '{"text": "nan", "id": NaN, "inf": -Infinity}': "nan",
    '{"text": "first", "text": "last"}': "last",  # as every parser of Python's does it
    '{"text": "\\ud800 alone"}': "\ufffd alone",
    '{"text": "\\ud83c\\udf89"}': "🎉",
    '"a string"': "a string",
}


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@given(
    rows=st.lists(st.sampled_from(BAD_JSON) | st.sampled_from(list(GOOD_JSON)), min_size=1, max_size=20),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    block=st.sampled_from([16, 300, 100_000]),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    mark=st.booleans(),
)
@settings(max_examples=examples(40), deadline=None)
def test_rows_in_are_rows_kept_and_rows_rejected(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: list[str], share: float, block: int, end: str,
    last: bool, mark: bool,
) -> None:  # fmt: skip
    rows = ['{"text": "known"}', *rows]
    if kind == ".json":  # there a missing bracket has no end, and two values need a comma between them
        rows = [row for row in rows if row not in BAD_JSON[:2]]
    path = tmp_path_factory.getbasetemp() / f"rows{kind}"
    body = end.join(rows) + end * last if kind == ".jsonl" else "[" + f",{end}".join(rows) + "]"
    path.write_bytes(b"\xef\xbb\xbf" * mark + body.encode())
    good = [GOOD_JSON.get(row, "known") for row in rows if row not in BAD_JSON]
    bad = len(rows) - len(good)
    findings = Findings("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", block)
        patch.setattr(formats, "ROW", 6000)
        if bad > share * len(rows):
            with pytest.raises(DataError) as error:
                read(path, findings, max_bad_rows=share)
            first = next(number for number, row in enumerate(rows, 1) if row in BAD_JSON)
            assert f"{path}:{first}: " in str(error.value)
            assert not share or f"{bad} of {len(rows)} rows" in str(error.value)
            return
        assert read(path, findings, max_bad_rows=share) == good
    assert (findings.rows, findings.documents, findings.rejected) == (len(rows), len(good), bad)
    assert len(findings.reasons) == min(bad, 3)


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_deep_nesting_is_a_bad_row(tmp_path: Path, kind: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    rows = ['"one"', deep, '{"text": "two", "more": ' + deep + "}", '"three"']
    text = "\n".join(rows) if kind == ".jsonl" else "[" + ",\n".join(rows) + "]"
    (tmp_path / f"a{kind}").write_text(text)
    findings = Findings()
    assert read(tmp_path / f"a{kind}", findings, max_bad_rows=0.5) == ["one", "three"]
    assert ["nested too deeply" in reason for reason in findings.reasons] == [True, True]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_that_is_too_long_is_bad_and_the_next_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROW", 1000)
    monkeypatch.setattr(texts, "PIECE", 300)
    rows = ["one", "x" * 5000, "two", "y" * 1001, "three"]
    findings = Findings()
    assert read(written(tmp_path, kind, rows), findings, max_bad_rows=0.5) == ["one", "two", "three"]
    assert (findings.rows, findings.rejected) == (5, 2)


def test_many_short_lines_in_one_csv_field_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quote that nobody closes would swallow the rest of the file."""
    monkeypatch.setattr(formats, "ROW", 1000)
    (tmp_path / "a.csv").write_text('id,text\n1,"open\n' + "a line of words\n" * 500 + '2,"closed"\n3,last\n')
    findings = Findings()
    found = read(tmp_path / "a.csv", findings, max_bad_rows=0.999)
    assert found[-1] == "last" and findings.rows == findings.documents + findings.rejected


@pytest.mark.parametrize("bad, share, allowed", [(1, 0.01, True), (2, 0.01, False), (1, 0.0099, False), (0, 0, True)])
def test_the_share_is_of_all_rows_of_a_source(tmp_path: Path, bad: int, share: float, allowed: bool) -> None:
    good = '{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_text("broken\n" * bad + good * (50 - bad))
    (tmp_path / "b.jsonl").write_text(good * 50)
    if allowed:
        assert len(read(tmp_path, max_bad_rows=share)) == 100 - bad
    else:
        with pytest.raises(
            DataError, match=rf"{bad} of 100 rows .* data\.max_bad_rows={share} .*a\.jsonl:1: not valid"
        ):
            read(tmp_path, max_bad_rows=share)


def test_a_first_row_without_the_text_does_not_decide_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"meta": 1}\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl", max_bad_rows=0.5) == ["x"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column holds text \(it has: meta\)"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"header": "a", "body": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:1: cannot tell .* set data\.text_column$"):
        read(tmp_path / "a.jsonl", max_bad_rows=0.99)


def test_a_lone_surrogate_is_a_bad_row_where_invalid_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\udc00"}\n{"text": "b"}\n')
    assert read(tmp_path / "a.jsonl", invalid_utf8="error", max_bad_rows=0.5) == ["b"]
    findings = Findings()
    assert read(tmp_path / "a.jsonl", findings) == ["a \ufffd", "b"] and findings.invalid_utf8 == 1


# -- packed files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", [".gz", ".zst", ".bz2", ".xz"])
def test_a_truncated_file_is_never_taken_for_a_short_one(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"a.txt{packer}"
    one = PACKERS[packer](b"".join(b"line %d of the text\n" % i for i in range(2000)))
    for whole, ends in ((one, ()), (one + one, (len(one),))):
        for length in sorted({1, 2, 3, 5, 9, len(one) - 1, len(one) + 1, *range(1, len(whole), len(whole) // 40)}):
            if length < len(whole) and length not in ends:
                path.write_bytes(whole[:length])
                with pytest.raises(DataError, match="damaged"):
                    read(path)


@pytest.mark.parametrize("packer", [".gz", ".zst", ".bz2", ".xz"])
def test_members_one_after_another_are_one_text(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"a.txt{packer}"
    path.write_bytes(PACKERS[packer](b"one ") + PACKERS[packer](b"") + PACKERS[packer](b"two"))
    assert read(path) == ["one two"]
    path.write_bytes(PACKERS[packer](b"one ") + b"rubbish")
    with pytest.raises(DataError, match="damaged"):
        read(path)


def bomb(megabytes: int, packer: str) -> bytes:
    out = io.BytesIO()
    opener: Any = {".gz": gzip.open, ".zst": zstd.open, ".bz2": bz2.open, ".xz": lzma.open}[packer]
    with opener(out, "wb") as file:
        for _ in range(megabytes):
            file.write(b" " * 10**6)
    return out.getvalue()


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("packer", [".gz", ".zst", ".bz2", ".xz"])
def test_a_bomb_goes_off_early(tmp_path: Path, packer: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 100_000)
    monkeypatch.setattr(texts, "UNPACKED", 10**6)
    path = tmp_path / f"a{kind}{packer}"
    path.write_bytes(bomb(4, packer))
    monkeypatch.setattr(texts, "RATIO", 10**6 // path.stat().st_size)  # some 1 MB may come out
    findings = Findings()
    tracemalloc.start()
    with pytest.raises(DataError, match="no text packs so well"):
        read(path, findings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 + 2**23 * (packer == ".xz") and findings.bytes <= 1.2e6


def test_well_packed_text_below_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(bomb(3, ".zst"))
    assert path.stat().st_size * texts.RATIO < 3 * 10**6 and len(read(path)[0]) == 3 * 10**6


def test_a_parquet_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "UNPACKED", 10**6)
    (tmp_path / "a.parquet").write_bytes(parquet_bytes([" " * 10**6] * 8, compression="zstd", use_dictionary=False))
    with pytest.raises(DataError, match="no text packs so well"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(["x" * 10**4] * 2000))  # one entry of a dictionary, repeated
    with pytest.raises(DataError, match="no text packs so well"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("name, module", [("a.parquet", "pyarrow"), ("a.txt.zst", "backports")])
def test_a_missing_library_is_named(tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UsageError, match=r'pip install "gptworks\[data\]"'):
        read(tmp_path / name)


# -- memory ------------------------------------------------------------------------------------------------------


def many_rows(kind: str) -> Iterator[bytes]:
    row = "some words of a row, " * 20
    if kind == ".txt":
        yield from ((row + "\n").encode() for _ in range(5_000))
        return
    yield {".json": b"[", ".csv": b"id,text\n"}.get(kind, b"")
    for number in range(5_000):
        separator = b",\n" if kind == ".json" and number else b""
        yield separator + (f'{number},"{row}"\n' if kind == ".csv" else f'{{"text": "{row}"}}\n').encode()
    yield b"]" if kind == ".json" else b""


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".parquet", "separated"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 30_000)
    path = tmp_path / f"a{'.txt' if kind == 'separated' else kind}"
    if kind == ".parquet":
        path.write_bytes(parquet_bytes(["some words of a row, " * 20 + str(i) for i in range(5_000)]))
    else:
        with open(path, "wb") as file:
            file.writelines(many_rows(kind if kind != "separated" else ".txt"))
    (source,) = sources_of([str(path)], Data(separator="nowhere in it" if kind == "separated" else None))
    tracemalloc.start()
    for _ in source.pieces(Findings()):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e5 and (kind == ".parquet" or path.stat().st_size > 2e6)


# -- what other programs write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".ndjson", ".jsonlines", ".jl", ".geojsonl", ".NDJSON"])
def test_json_lines_are_known_by_all_their_names(tmp_path: Path, kind: str) -> None:
    rows = [f"row {i}" for i in range(30)]
    (tmp_path / f"a{kind}").write_bytes(WRITERS[".jsonl"](rows))
    (tmp_path / f"b{kind}.gz").write_bytes(gzip.compress(WRITERS[".jsonl"](rows)))
    assert read(tmp_path) == rows * 2


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.7z"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(bytes(512)) if "gz" in name else b"PK\3\4" + bytes(100))
    with pytest.raises(DataError, match="an archive of files; unpack it"):
        read(tmp_path / name)


CHAT = {
    "messages": ({"messages": [{"role": "user", "content": "hi"}]}, "chat data .column messages.: .* on messages"),
    "messages and more": ({"messages": [], "source": "web"}, "chat data .column messages."),
    "conversations": ({"id": "x", "conversations": [{"from": "human", "value": "hi"}]}, "column conversations"),
    "instructions": ({"instruction": "a", "input": "", "output": "b"}, "columns instruction, input, output"),
    "completions": ({"prompt": "a", "completion": "b"}, "instruction data .columns prompt, completion"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data .* on preferences"),
    "questions": ({"context": "c", "question": "a", "answer": "b"}, "question-and-answer data"),
    "answers": ({"id": 1, "question": "a", "answers": {"text": ["b"]}}, "question-and-answer data"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("task", CHAT)
def test_rows_for_another_training_are_called_by_name(tmp_path: Path, task: str, kind: str) -> None:
    row, said = CHAT[task]
    path = tmp_path / f"a{kind}"
    if kind == ".csv":
        path.write_text(",".join(row) + "\n" + ",".join("x" for _ in row) + "\n")
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) if kind == ".jsonl" else json.dumps([row]))
    with pytest.raises(DataError, match=rf"this is .*{said}.* is not in this version; ") as error:
        read(path, max_bad_rows=0.9)
    advised = re.search(r"data\.text_column=(\w+) takes one column", str(error.value))
    assert not advised or read(path, text_column=advised[1]) in (["a"], ["b"], ["c"], ["x"])
    assert bool(advised) != ("data.train=mine.py:documents" in str(error.value))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_column_of_messages_is_no_text_and_called_by_name(tmp_path: Path, kind: str) -> None:
    row = CHAT["messages and more"][0] | {"messages": [{"role": "user", "content": "hi"}]}
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="this is chat data .* data.train=mine.py:documents"):
        read(tmp_path / f"a{kind}", text_column="messages")
    assert read(tmp_path / f"a{kind}", text_column="source") == ["web"]


@pytest.mark.parametrize(
    "row", ['{"messages": [], "text": "T"}', '{"conversation": "T"}', '{"id": 1, "messages": "T"}']
)
def test_a_text_beside_messages_or_under_their_name_is_the_text(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row)
    assert read(tmp_path / "a.jsonl") == ["T"]


# -- quotes, separators, line ends -------------------------------------------------------------------------------


def lined(begin: int, end: int) -> str:
    return "".join(f"{i}\tline {i}\n" for i in range(begin, end))


def test_a_quote_that_never_closes_loses_as_many_rows_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "u.tsv"
    path.write_text("id\ttext\n" + lined(1, 60) + '60\t"Hello there\n' + lined(61, 160))
    findings = Findings("u")
    with pytest.raises(DataError, match=r"100 of 159 rows cannot be read.*u\.tsv:61: .* takes 100 lines"):
        read(path, findings, max_bad_rows=0.05)
    assert (findings.rows, findings.rejected, findings.documents) == (159, 100, 59)


@pytest.mark.parametrize("delimiter, kind", [("\t", ".tsv"), (",", ".csv")])
def test_a_field_that_swallows_rows_is_told(tmp_path: Path, delimiter: str, kind: str) -> None:
    text = "id\ttext\n" + lined(1, 60) + '60\t"Hello there\n' + lined(61, 160) + '160\tshe said "\n'
    (tmp_path / f"s{kind}").write_text(text.replace("\t", delimiter))
    findings = Findings()
    assert len(read(tmp_path / f"s{kind}", findings)) == 60
    (said,) = findings.warnings()
    assert f"s{kind}:61: a field in quotes goes over 101 lines" in said


def test_a_row_of_many_lines_with_a_field_too_many_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n" + '1,"a\nb\nc\nd\ne\nf",x\n' + "2,two\n" * 9)
    findings = Findings()
    assert read(tmp_path / "a.csv", findings, max_bad_rows=0.2) == ["two"] * 9
    assert (findings.rows, findings.rejected) == (10, 1)


def test_a_poem_in_quotes_is_no_suspect(tmp_path: Path) -> None:
    poem = "A line,\nanother line, and more,\nwithout\nany, comma\n" * 20
    (tmp_path / "a.csv").write_bytes(WRITERS[".csv"]([poem] * 5))
    findings = Findings()
    assert read(tmp_path / "a.csv", findings) == [poem] * 5 and findings.warnings() == []


@pytest.mark.parametrize("newlines", ["lf", "keep"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n", "---"])
def test_a_separator_cuts_whatever_the_line_ends_are(
    tmp_path: Path, separator: str, newlines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"doc {i}\nof two lines" for i in range(40)]
    plain = separator.replace("\r\n", "\n")
    for block in (100_000, 7):
        monkeypatch.setattr(texts, "PIECE", block)
        for end in ("\n", "\r\n"):
            joined = ("\n---\n" if plain == "---" else plain).join(documents).replace("\n", end)
            (tmp_path / "a.txt").write_bytes(joined.encode())
            findings = Findings()
            expected = [text.replace("\n", "\n" if newlines == "lf" else end) for text in documents]
            assert read(tmp_path / "a.txt", findings, separator=separator, newlines=newlines) == expected
            assert findings.crlf == (40 if end == "\r\n" else 0) and findings.warnings() == []


@pytest.mark.parametrize("separator, backslash", [(r"\r\n\r\n", True), ("<end>", False)])
def test_a_separator_that_never_occurs_is_told(tmp_path: Path, separator: str, backslash: bool) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}')
    findings = Findings()
    read(tmp_path, findings, separator=separator)
    (said,) = findings.warnings()
    assert "never occurs" in said and ("as typed" in said) == backslash
    (tmp_path / "c.txt").write_text(f"four{separator}five")  # where some files have it, it is theirs
    findings = Findings()
    assert len(read(tmp_path, findings, separator=separator)) == 4 and findings.warnings() == []


@pytest.mark.parametrize("kind", [".txt", *WRITERS])
@given(parts=st.lists(st.sampled_from(["a", "\r\n", "\r", "\n", " b", "\r\r\n", "é"]), min_size=1, max_size=12),
       block=st.integers(4, 9))  # fmt: skip
@settings(max_examples=examples(60), deadline=None)
def test_line_ends_become_lf_in_every_format_or_stay(
    tmp_path_factory: pytest.TempPathFactory, kind: str, parts: list[str], block: int
) -> None:
    text = "x" + "".join(parts) + "y"
    if kind in (".csv", ".tsv"):  # there a CR alone is a line break
        text = text.replace("\r\n", "\n").replace("\r", "").replace("\n", "\r\n")
    path = tmp_path_factory.getbasetemp() / f"ends{kind}"
    path.write_bytes(text.encode() if kind == ".txt" else WRITERS[kind]([text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", block)
        for newlines, expected in (("lf", text.replace("\r\n", "\n")), ("keep", text)):
            findings = Findings()
            assert read(path, findings, newlines=newlines) == [expected]
            assert findings.crlf == ("\r\n" in text)


def test_line_ends_of_a_function_of_ones_own_become_lf(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def rows():\n    yield 'a\\r\\nb'\n")
    (source,) = sources_of([f"{tmp_path / 'mine.py'}:rows"], Data())
    assert [piece.text for piece in source.pieces(Findings())] == ["a\nb"]


# -- text that is not UTF-8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_file_of_another_encoding_is_refused_and_read_once_it_is_named(
    tmp_path: Path, kind: str, packer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"第{i}回，贾宝玉和林黛玉在大观园里说话，又说了一回诗。\n" for i in range(40)]
    raw = WRITERS.get(kind, lambda rows: "".join(rows).encode())(rows).decode("utf-8")
    if kind in (".jsonl", ".json"):
        raw = json.dumps([{"text": row} for row in rows], ensure_ascii=False)
        raw = raw if kind == ".json" else "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    path = tmp_path / f"a{kind}{packer}"
    path.write_bytes(PACKERS[packer](raw.encode("gb18030")))
    with pytest.raises(DataError, match=r"% of its characters are not UTF-8; it looks like GB18030: data.encoding=gb1"):
        read(path)
    for block in (100_000, 5):
        monkeypatch.setattr(texts, "PIECE", block)
        assert read(path, encoding="gb18030") == (rows if kind != ".txt" else ["".join(rows)])


@pytest.mark.parametrize("bad, refused", [(1, False), (2, True)])
def test_a_file_is_refused_where_more_than_a_thousandth_is_replaced(tmp_path: Path, bad: int, refused: bool) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff" * bad + b"a" * (1000 - bad))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes([b"\xff" * bad, b"a" * (1000 - bad)], pyarrow.binary()))
    for name in ("a.txt", "b.parquet"):
        findings = Findings()
        if refused:
            with pytest.raises(DataError, match=rf"{name}: 0.20% of its characters are not UTF-8"):
                read(tmp_path / name, text_column="text")
        else:
            read(tmp_path / name, findings, text_column="text")
            assert findings.warnings() == ["1 invalid sequence of bytes was replaced by U+FFFD"]
        findings = Findings()
        read(tmp_path / name, findings, text_column="text", encoding="utf-8")  # as it was asked for
        assert findings.invalid_utf8 == bad


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (100_000, 5):
        monkeypatch.setattr(texts, "PIECE", block)
        (tmp_path / "a.txt").write_bytes("héllo 红楼 🎉\n".encode(encoding))
        assert read(tmp_path / "a.txt") == ["héllo 红楼 🎉\n"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_told_by_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("Some plain text in lines.\n" * 20).encode(encoding))
    with pytest.raises(DataError, match=f"it looks like {encoding.upper()}: data.encoding={encoding} reads it"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding=encoding) == ["Some plain text in lines.\n" * 20]


def test_strict_reading_names_the_encoding_that_failed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café ".encode("latin-1") * 50)
    with pytest.raises(DataError, match="byte 3: not UTF-8; it looks like CP1252: data.encoding=cp1252 reads it"):
        read(tmp_path / "a.txt", invalid_utf8="error")
    (tmp_path / "a.txt").write_bytes(b"text \xff\xff")
    with pytest.raises(DataError, match="byte 5: not SHIFT_JIS"):
        read(tmp_path / "a.txt", invalid_utf8="error", encoding="shift_jis")
