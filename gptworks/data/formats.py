"""From files to documents: one reader for each format, and one rule for unreadable rows.

A row is in memory whole. One of more than `ROW` characters counts as unreadable, except in the validation text that we
wrote ourselves. Everything else is streamed.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.errors import DataError, UsageError
from gptworks.data.findings import REASONS, Findings, Piece
from gptworks.data.text import (
    Decoding,
    Unreadable,
    decoded,
    document,
    kind,
    packed,
    refuse_bomb,
    without_surrogates,
)

COLUMNS = ("text", "content", "story", "document")
ROW = 64_000_000  # most characters of a row


class Ambiguous(Unreadable):
    """Several columns could be the text. The row is not at fault, and no later row would decide it."""


Place = int | str  # a row's place in its file: the line it begins at, or a name


def read(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Streams the documents of a file; an unknown suffix is read as text. Raises DataError and UsageError."""
    yield from READERS.get(kind(path), text_file)(path, options, findings)


# -- text files --------------------------------------------------------------------------------------------------


def text_file(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Reads a text file as one document, or as several where `data.separator` cuts it."""
    blocks = decoded(path, options, findings)
    findings.text_files += 1
    if not options.separator:
        yield from document(blocks, options, findings)
        return
    findings.separator = options.separator
    parts = _separated(blocks, options.separator, findings)
    for _, document_parts in itertools.groupby(parts, key=lambda part: part[0]):
        yield from document(_stripped(text for _, text in document_parts), options, findings)


def _separated(blocks: Iterable[str], separator: str, findings: Findings) -> Iterator[tuple[int, str]]:
    """Yields (number of the document, part of it), with no more in memory than a block and a separator.

    A line break in the separator is LF or CRLF, as the text has it.
    """
    lines = separator.replace("\r\n", "\n")
    pattern = re.compile("\r?\n".join(map(re.escape, lines.split("\n"))))
    longest = len(lines) + lines.count("\n")
    number, rest = 0, ""
    for block in blocks:
        *ended, rest = pattern.split(rest + block) if "\n" in lines else (rest + block).split(separator)
        for text in ended:
            yield number, text
            number += 1
        reach = len(rest) - longest + 1  # a separator may begin after this
        if reach > 0:
            yield number, rest[:reach]
            rest = rest[reach:]
    findings.separated += number
    yield number, rest


def _stripped(blocks: Iterable[str]) -> Iterator[str]:
    """The text without line breaks at its two ends."""
    pending, begun = "", False
    for block in blocks:
        block = pending + block if begun else block.lstrip("\r\n")
        body = block.rstrip("\r\n")
        pending, begun = block[len(body) :], begun or bool(body)
        yield body


# -- rows --------------------------------------------------------------------------------------------------------


def _documents(path: Path, rows: Iterable[tuple[Place, Any]], options: Data, findings: Findings) -> Iterator[Piece]:
    """Yields the text of every row. A row is a parsed value, or an Unreadable that says why it could not be parsed."""
    column = options.text_column
    for place, row in rows:
        findings.rows += row.rows if isinstance(row, Unreadable) else 1
        try:
            if isinstance(row, Unreadable):
                raise row
            if column is None and isinstance(row, dict):
                texts = [name for name, value in row.items() if isinstance(value, str)]
                nested = any(isinstance(value, (dict, list)) for value in row.values())
                column = _text_column(texts, row, usual=row, nested=nested)
                findings.columns[column] += 1
            text = without_surrogates(_text_of(row, column), options, findings)
        except Ambiguous as problem:
            raise DataError(f"{path}:{place}: {problem}") from None
        except Unreadable as problem:
            findings.reject(f"{path}:{place}: {problem}", options.max_bad_rows, problem.rows)
        else:
            yield from document([text], options, findings)


# Columns that rows for another training have, and its name; `text` and the other usual names come before them.
TASKS = {
    ("messages",): "chat data",
    ("conversations",): "chat data",
    ("conversation",): "chat data",
    ("prompt", "chosen", "rejected"): "preference data",
    ("chosen", "rejected"): "preference data",
    ("instruction", "input", "output"): "instruction data",
    ("instruction", "output"): "instruction data",
    ("instruction", "response"): "instruction data",
    ("prompt", "completion"): "instruction data",
    ("prompt", "response"): "instruction data",
    ("question", "answer"): "question-and-answer data",
    ("question", "answers"): "question-and-answer data",
}


def _task(names: Collection[str], texts: Collection[str]) -> str | None:
    """Says what training rows with these columns are for, if it is none that this version has."""
    columns = next((columns for columns in TASKS if all(column in names for column in columns)), None)
    if columns is None:
        return None
    plain = [name for name in columns if name in texts]
    plain_text = (
        f"data.text_column={plain[-1]} takes one column as plain text"
        if plain
        else "write a function that yields each row as one text, and name it: data.train=mine.py:documents"
    )
    spelled = f"column{'s' * (len(columns) > 1)} {', '.join(columns)}"
    return f"this is {TASKS[columns]} ({spelled}): training on {_of_task(columns)} is not in this version; {plain_text}"


def _of_task(columns: tuple[str, ...]) -> str:
    return {"chat data": "messages", "preference data": "preferences"}.get(TASKS[columns], "questions and answers")


def _text_of(row: Any, column: str | None) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise Unreadable(f"a row is an object or a string, not {_named(row)}")
    if column not in row:
        raise Unreadable(f"no column {column!r} (it has: {_listed(row)})")
    if not isinstance(row[column], str):
        if column and isinstance(row[column], list) and (task := _task([column], [])):
            raise Ambiguous(task)
        raise Unreadable(f"column {column!r} is {_named(row[column])}, not text")
    return row[column]


def _text_column(texts: list[str], every: Collection[str], usual: Collection[str], nested: bool) -> str:
    """Chooses the text column of `every`. Raises Unreadable, or Ambiguous.

    A usual name is taken if it is among `usual`. Otherwise the only column of `texts` is taken, unless others hold
    lists or objects (`nested`), since one of those may be meant.
    """
    for name in COLUMNS:
        if name in usual:
            return name
    if len(texts) == 1 and not nested:
        return texts[0]
    if task := _task(every, texts):
        raise Ambiguous(task)
    if not texts and not nested:
        raise Unreadable(f"no column holds text (it has: {_listed(every)})")
    raise Ambiguous(f"cannot tell which column is the text ({_listed(every)}); set data.text_column")


def _listed(names: Iterable[str]) -> str:
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _named(value: Any) -> str:
    """The type of a JSON value in words."""
    names = {dict: "an object", list: "a list", float: "a number", bool: "true or false", str: "text"}
    return names.get(type(value), "null")


_JSON = json.JSONDecoder(parse_int=float)  # only text is used, and a float may have any number of digits


def _parsed(text: str | None) -> Any:
    """Parses JSON; returns an Unreadable that says what is wrong if it cannot. None is a row that was too long."""
    if text is None:
        return _too_long()
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Unreadable("not valid JSON: nested too deeply")


def _too_long() -> Unreadable:
    return Unreadable(f"longer than {ROW:,} characters")


def _lines(blocks: Iterable[str], most: int) -> Iterator[tuple[int, str | None]]:
    """Yields numbered lines without their line breaks; None in place of one of more than `most` characters."""
    number, size, parts = 0, 0, list[str]()
    for block in blocks:
        *ended, rest = block.split("\n")
        for line in ended:
            number, size = number + 1, size + len(line)
            parts.append(line)
            yield number, "".join(parts) if size <= most else None
            size, parts = 0, []
        size += len(rest)
        parts = [*parts, rest] if size <= most else []
    if size:
        yield number + 1, "".join(parts) if size <= most else None


def jsonl_file(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Reads one JSON object or string from each line."""
    ours = _ours(path)  # then its line ends are what they are to be
    options = options.model_copy(update={"newlines": "keep"}) if ours else options
    lines = _lines(decoded(path, options, findings), sys.maxsize if ours else ROW)
    rows = ((number, _parsed(line)) for number, line in lines if line is None or line.strip())
    yield from _documents(path, rows, options=options, findings=findings)


def _ours(path: Path) -> bool:
    """True for the validation text of a data folder, in which a whole .txt file may have become one row."""
    if path.name != "validation.jsonl":
        return False
    try:
        return path.name in folder.read_manifest(path.parent)["files"]
    except DataError:
        return False


# -- .json -------------------------------------------------------------------------------------------------------


class _Elements:
    """Cuts the text of a .json file into the rows of its one list without parsing them, since any may be broken."""

    MARK = re.compile(r'["\[\]{},]')  # the characters that have a meaning outside a string
    INSIDE = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)  # the rest of a string, without its closing quote

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text, self.at, self.begin = "", 0, 0  # text in memory; searched up to; begin of the row
        self.line = 1  # the line of `begin`
        self.depth = self.lists = 0
        self.rows = 0  # the depth of the rows while inside their list, else 0
        self.in_string = self.too_long = self.ended = False

    def feed(self, block: str) -> Iterator[tuple[int, str | None]]:
        """Yields the rows that end in this block, with their lines; None for one that is too long. Raises DataError."""
        self.text, self.at, self.begin = self.text[self.begin :] + block, self.at - self.begin, 0
        while self._out_of_string() and (match := self.MARK.search(self.text, self.at)):
            self.at = match.end()
            yield from self._mark(match[0], match.start())
        self.at = self.at if self.in_string else len(self.text)
        self._nothing_beside(len(self.text))
        if not self.rows or len(self.text) - self.begin > ROW:
            self.too_long = bool(self.rows)
            self._pass(self.at)

    def close(self) -> None:
        """Raises DataError unless the list or object of the file is complete."""
        if self.depth:
            raise DataError(f"{self.path}:{self.line}: the file ends in the middle of its JSON")
        if not self.lists:
            self._refuse("this has none")

    def _mark(self, mark: str, place: int) -> Iterator[tuple[int, str | None]]:
        self._nothing_beside(place)
        if not self.depth and (mark not in "[{" or self.ended):
            self._refuse("this has more beside it" if self.ended else "this is neither")
        if mark in "]}" and mark != ("]" if self.depth == self.rows else "}" if self.depth == 1 else mark):
            self._refuse(f"a {mark!r} closes what it did not open")
        if self.rows and self.depth == self.rows and mark in ",]}":
            yield from self._row(mark, place)
        if mark == '"':
            self.in_string = True
        elif mark in "[{":
            self.depth += 1
            if mark == "[" and self.depth <= 2 and not self.rows:
                self._open(place + 1)
        elif mark in "]}":
            self.rows = 0 if self.depth == self.rows else self.rows
            self.depth -= 1
            if self.depth == 0:
                self.ended = True
                self._pass(place + 1)

    def _out_of_string(self) -> bool:
        """Moves to the end of the string we are in, if any; False if that is in a later block."""
        if self.in_string:
            self.at = self.INSIDE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if not self.text.startswith('"', self.at):  # the block ends within the string, perhaps within an escape
                return False
            self.in_string, self.at = False, self.at + 1
        return True

    def _open(self, place: int) -> None:
        self.rows, self.lists = self.depth, self.lists + 1
        if self.lists > 1:
            self._refuse("this object has several lists")
        self._pass(place)

    def _row(self, mark: str, place: int) -> Iterator[tuple[int, str | None]]:
        row = self.text[self.begin : place]
        if mark == "," or self.too_long or row.strip():  # else the list is empty, or ends with a comma
            lead = len(row) - len(row.lstrip())
            yield self.line + row.count("\n", 0, lead), None if self.too_long or len(row) > ROW else row
        self.too_long = False
        self._pass(place + 1)

    def _pass(self, place: int) -> None:
        """Forgets the text before `place`, which is done with."""
        self.line += self.text.count("\n", self.begin, place)
        self.begin = place

    def _nothing_beside(self, place: int) -> None:
        if not self.depth and self.text[self.begin : place].strip():
            self._refuse("this has more beside it")

    def _refuse(self, problem: str) -> None:
        raise DataError(
            f"{self.path}:{self.line}: a .json file is a list of rows, or an object with one list of them; {problem} "
            "(with one row on each line, name it .jsonl)"
        )


def json_file(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Reads a list of rows, or an object with one list of them; streamed, so that its length does not matter."""

    def rows() -> Iterator[tuple[Place, Any]]:
        elements = _Elements(path)
        for block in decoded(path, options, findings):
            for line, text in elements.feed(block):
                yield line, _parsed(text)
        elements.close()

    yield from _documents(path, rows(), options=options, findings=findings)


# -- .csv and .tsv -----------------------------------------------------------------------------------------------


class _Lines:
    """Lines for csv.reader, with a limit on the text of one row: it would ask for any number of lines.

    Those of a row are looked at: a quote that stands there by mistake makes one field of all rows to the next quote.
    """

    def __init__(self, lines: Iterator[tuple[int, str | None]], delimiter: str) -> None:
        self.lines, self.delimiter = lines, delimiter
        self.number = 0  # of the current line
        self.begin(0)

    def begin(self, columns: int) -> None:
        """A row begins that is to have so many columns."""
        self.columns, self.size, self.read, self.alike = columns, 0, 0, 0  # `alike`: lines that could be rows

    @property
    def swallowed(self) -> bool:
        """True where nearly all lines of the row could be rows of their own."""
        return self.columns > 1 and self.alike > 2 and self.alike >= self.read - 2

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        self.size, self.read = self.size + len(line or ""), self.read + 1
        self.alike += self.read > 1 and (line or "").count(self.delimiter) == self.columns - 1
        if line is None or self.size > ROW:
            raise _too_long()
        return line + "\n"


def table_file(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Reads comma- or tab-separated rows (RFC 4180) under a header that names the columns."""
    delimiter = "\t" if kind(path) == ".tsv" else ","
    lines = _Lines(_lines(decoded(path, options, findings), ROW), delimiter)
    csv.field_size_limit(ROW)  # process-wide; many documents are longer than the default, 131,072
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []

    def fields() -> Iterator[tuple[int, list[str] | Unreadable]]:
        while True:
            first = lines.number + 1
            lines.begin(len(header))
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, Unreadable) as error:
                lost = lines.number - first + 1
                told = f"{error}: a quote that opens here takes {lost:,} lines" if lost > 1 else str(error)
                yield first, Unreadable(told, max(lost, 1))
            else:
                if lines.swallowed and len(findings.suspects) < REASONS:
                    findings.suspects.append(
                        f"{path}:{first}: a field in quotes goes over {lines.read:,} lines that look like rows; "
                        "is a quote there by mistake?"
                    )
                if row:
                    yield first, row

    def rows() -> Iterator[tuple[Place, Any]]:
        every = fields()
        header.extend(_header(path, next(every, (1, list[str]())), options))
        for line, row in every:
            if isinstance(row, list) and len(row) != len(header):
                lost = lines.read if lines.swallowed else 1
                row = Unreadable(f"{len(row)} fields where the header has {len(header)}", lost)
            yield line, row if isinstance(row, Unreadable) else dict(zip(header, row, strict=True))

    yield from _documents(path, rows(), options=options, findings=findings)


def _header(path: Path, header: tuple[int, list[str] | Unreadable], options: Data) -> list[str]:
    """The names of the columns, the text's among them exactly once. Raises DataError: text is never guessed at."""
    line, names = header
    wanted = [options.text_column] if options.text_column else list(COLUMNS)
    if isinstance(names, Unreadable):
        raise DataError(f"{path}:{line}: the header cannot be read: {names}")
    if not names:  # an empty file
        return names
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None and not options.text_column and (task := _task(names, names)):
        raise DataError(f"{path}:{line}: {task}")
    if chosen is None or names.count(chosen) > 1:
        raise DataError(
            f"{path}:{line}: the first row must be a header with one column named {' or '.join(wanted)} "
            f"(it is: {_listed(names)}); data.text_column names another"
        )
    return names


# -- .parquet ----------------------------------------------------------------------------------------------------

BATCH = 64  # rows in memory at once


def parquet_file(path: Path, options: Data, findings: Findings) -> Iterator[Piece]:
    """Reads one column of a Parquet file, a row group at a time and from that a few rows at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f'{path}: reading .parquet needs `pip install "gptworks[data]"`') from None
    if packed(path):
        raise DataError(f"{path}: Parquet is compressed in itself; unpack the {path.suffix} first")
    try:
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            column = _parquet_column(path, file.schema_arrow, options)
            findings.columns[column] += options.text_column is None
            rows = _parquet_rows(path, file, column=column, options=options, findings=findings)
            yield from _documents(
                path, rows, options=options.model_copy(update={"text_column": column}), findings=findings
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged Parquet file: {error}") from error


def _parquet_column(path: Path, schema: Any, options: Data) -> str:
    """The name of the text column. Raises DataError."""
    from pyarrow.types import is_dictionary, is_nested

    def holds(field: Any, *types: str) -> bool:
        return str(field.type.value_type if is_dictionary(field.type) else field.type) in types

    texts = [field.name for field in schema if holds(field, "string", "large_string", "string_view")]
    try:
        if options.text_column is None:
            nested = any(is_nested(field.type) for field in schema)
            return _text_column(texts, schema.names, usual=texts, nested=nested)
        if options.text_column not in schema.names:
            raise Unreadable(f"no column {options.text_column!r} (it has: {_listed(schema.names)})")
        column = schema.field(options.text_column)
        if column.name not in texts and not holds(column, "binary", "large_binary"):
            if is_nested(column.type) and (task := _task([column.name], [])):
                raise Unreadable(task)
            raise Unreadable(f"column {column.name!r} is {column.type}, not text")
        return str(column.name)
    except Unreadable as problem:
        raise DataError(f"{path}: {problem}") from None


def _parquet_rows(path: Path, file: Any, column: str, options: Data, findings: Findings) -> Iterator[tuple[Place, Any]]:
    import pyarrow

    size, groups, number, out = path.stat().st_size, file.num_row_groups, 0, 0
    decoding = Decoding(path, options, findings)
    for group in range(groups):
        refuse_bomb(path, out + file.metadata.row_group(group).total_byte_size, size)
        findings.heard(size * (group + 1) // groups - size * group // groups)
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column]):
            values = batch.column(0)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            is_text = not (pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type))
            encoding = "utf-8" if is_text else options.encoding or "utf-8"  # strings are UTF-8 in every Parquet file
            for raw in values.cast(pyarrow.large_binary()).to_pylist():  # Arrow does not check that text is UTF-8
                number, out = number + 1, out + len(raw or b"")
                text = None if raw is None else _value(raw, decoding, encoding)
                yield f"row {number}", text if isinstance(text, Unreadable) else {column: text}
            refuse_bomb(path, out, size)
    decoding.judge(decoding.characters)


def _value(raw: bytes, decoding: Decoding, encoding: str) -> Any:
    """The text of a value, or an Unreadable."""
    if len(raw) > ROW:
        return _too_long()
    try:
        return decoding.decode(raw, lambda raw: raw.decode(encoding, decoding.errors))
    except UnicodeDecodeError as error:
        return Unreadable(f"byte {error.start + 1} is not {encoding.upper()}")


Reader = Callable[[Path, Data, Findings], Iterator[Piece]]
READERS: dict[str, Reader] = {
    ".txt": text_file,
    ".md": text_file,
    ".jsonl": jsonl_file,
    ".ndjson": jsonl_file,
    ".jsonlines": jsonl_file,
    ".jl": jsonl_file,
    ".geojsonl": jsonl_file,
    ".json": json_file,
    ".csv": table_file,
    ".tsv": table_file,
    ".parquet": parquet_file,
}
