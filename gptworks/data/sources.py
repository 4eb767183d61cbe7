"""Text from anywhere, as a stream of pieces: files, folders, globs and built-in texts; txt, md and jsonl, plain or gz.

A document is handed out in pieces of about a megabyte, cut only where no token of a known split pattern can span, so
that memory stays bounded however large a file is and the ids are those of the whole text.
"""

import codecs
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import IO, Any

from gptworks.core.config import Data
from gptworks.core.errors import DataError, UsageError
from gptworks.core.registry import nearest, resolve
from gptworks.core.runtime import interrupts

BUILTIN = {"shakespeare": "shakespeare.txt"}
TABLE: dict[str, str] = {}  # name -> "module:attribute", a callable that yields documents (str)
SUFFIXES = (".txt", ".md", ".jsonl")
COLUMNS = ("text", "content", "story", "document")
REFUSED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".py", ".so")

PIECE = 1_000_000  # characters; larger ones spend their time in the allocator
HARD_CUT = 64_000_000  # a text without a single newline or space between letters is cut here all the same
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Piece:
    """Part of a document: `first` begins it. Concatenating a document's pieces gives its text."""

    text: str
    first: bool

    @cached_property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8", "replace"))


@dataclass
class Findings:
    """What reading came across; printed before training and kept in the shards' manifest."""

    documents: int = 0
    bytes: int = 0
    invalid_utf8: int = 0
    empty_documents: int = 0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        found = list(self.notes)
        if self.invalid_utf8:
            found.append(f"{self.invalid_utf8:,} invalid UTF-8 sequences were replaced by U+FFFD")
        if self.empty_documents:
            found.append(f"{self.empty_documents:,} empty documents were dropped")
        return found


class Source:
    """One or more places to read documents from, in a fixed order.

    `files` are real paths (a built-in text included), so that their size and content, and those of the `code` of the
    user's own sources, identify the corpus.
    """

    def __init__(self, where: str | list[str], options: Data) -> None:
        self.where = [where] if isinstance(where, str) else list(where)
        self.options = options
        self.files: list[Path] = []
        self.custom: list[Callable[[], Iterable[str]]] = []
        self.code: list[Path] = []
        if not self.where:
            raise UsageError("data.train is an empty list: name at least one file")
        for place in self.where:
            self._locate(place)

    def _locate(self, place: str) -> None:
        if place in BUILTIN:
            self.files.append(Path(str(resources.files("gptworks") / "data" / "texts" / BUILTIN[place])))
            return
        if place in TABLE or re.search(r"\.py:\w+$", place):
            self.custom.append(resolve("data source", TABLE, place))
            if place not in TABLE:
                self.code.append(Path(place.rpartition(":")[0]))
            return
        path = Path(place).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in SUFFIXES)
            if not found:
                raise DataError(f"{path}: no {', '.join(SUFFIXES)} file (plain or .gz) in this folder")
        elif path.is_file():
            found = [path]
        elif glob.has_magic(place):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not found:
                raise DataError(f"{place}: no file matches")
        else:
            raise DataError(f"{place}: no such file, folder or built-in text ({nearest(place, list(BUILTIN))})")
        for file in found:
            if file.suffix.lower() in REFUSED or _kind(file) in REFUSED:
                raise DataError(
                    f"{file}: {file.suffix} files are not text and could run code when loaded; "
                    f"give {', '.join(SUFFIXES)} (plain or .gz)"
                )
        self.files += found

    @property
    def size(self) -> int:
        """Bytes on disk, for progress; compressed files count as they lie."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def one_plain_text(self) -> bool:
        """Whether this is a single uncompressed text file that is one document: its size is known unread."""
        lone = len(self.files) == 1 and not self.custom and not self.options.separator
        return lone and _kind(self.files[0]) != ".jsonl" and self.files[0].suffix.lower() != ".gz"

    def stamp(self) -> list[dict[str, Any]]:
        """Path, size and time of every file: the quick test of whether anything changed."""
        stats = [(file, file.stat()) for file in self.files + self.code]
        return [{"path": str(f.resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for f, s in stats]

    def pieces(self, findings: Findings, advance: Callable[[int], None] = lambda count: None) -> Iterator[Piece]:
        """Streams every document. `advance` hears of the bytes read from disk. Raises DataError."""
        for file in self.files:
            reader = _jsonl if _kind(file) == ".jsonl" else _text
            yield from _counted(reader(file, self.options, findings, advance), findings)
        for documents in self.custom:
            for text in documents():
                clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text
                yield from _counted((Piece(part, first) for part, first in _cut([clean])), findings)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _counted(pieces: Iterable[Piece], findings: Findings) -> Iterator[Piece]:
    """Drops empty documents and counts the rest."""
    for piece in pieces:
        interrupts.check()
        if not piece.text:
            findings.empty_documents += piece.first
            continue
        findings.documents += piece.first
        findings.bytes += piece.size
        yield piece


def _blocks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The file's bytes, unpacked, a block at a time; refuses what is not text."""
    try:
        with open(path, "rb") as raw:
            stream: IO[bytes] = gzip.open(raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[assignment]  # noqa: SIM115
            done, first = 0, True
            while block := stream.read(PIECE):
                if first and b"\0" in block[:65536]:
                    raise DataError(f"{path}: a binary file (it has NUL bytes), not text")
                first = False
                yield block
                position = raw.tell()
                advance(position - done)
                done = position
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _decoded(path: Path, options: Data, findings: Findings, advance: Callable[[int], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if options.invalid_utf8 == "error" else "replace")
    seen, before = 0, b""  # bytes read, and the last two of them: a character may straddle two blocks
    for number, block in enumerate(_blocks(path, advance)):
        if number == 0 and block.startswith(codecs.BOM_UTF8):
            block, seen = block[3:], 3
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: byte {seen - waiting + error.start}: not UTF-8; "
                "data.invalid_utf8=replace reads on with U+FFFD"
            ) from None
        if "\ufffd" in text:
            findings.invalid_utf8 += text.count("\ufffd") - (before + block).count(b"\xef\xbf\xbd")
        seen, before = seen + len(block), (before + block[-2:])[-2:]
        yield text
    try:
        tail = decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise DataError(f"{path}: ends within a UTF-8 character; data.invalid_utf8=replace reads on") from None
    if tail:
        findings.invalid_utf8 += 1
        yield tail


def _text(path: Path, options: Data, findings: Findings, advance: Callable[[int], None]) -> Iterator[Piece]:
    """A text file: one document, or as many as `data.separator` makes of it."""
    blocks = _decoded(path, options, findings, advance)
    if options.separator:
        for document in _separated(blocks, options.separator):
            yield from (Piece(text, first) for text, first in _cut([document]))
    else:
        yield from (Piece(text, first) for text, first in _cut(blocks))


def _separated(blocks: Iterable[str], separator: str) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split(separator)
        yield from (document.strip("\n") for document in whole)
    yield rest.strip("\n")


def _cut(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Re-cuts text at places that no pre-token spans; the flag marks the document's first piece."""
    rest, first, barren = "", True, 0
    for block in blocks:
        rest += block
        while len(rest) > PIECE:
            place = _last_safe_cut(rest, barren)
            if not place and len(rest) < HARD_CUT:
                barren = max(len(rest) - 4, 0)  # not looked through again, but for what the end had cut off
                break
            yield rest[: place or HARD_CUT], first
            rest, first, barren = rest[place or HARD_CUT :], False, 0
    if rest or first:
        yield rest, first


def _last_safe_cut(text: str, barren: int = 0) -> int:
    """The last safe place to cut `text`, 0 if there is none; its final character is never trusted, and there is none in
    the first `barren` characters."""
    end = len(text) - 1
    for start in (max(end - 4096, barren), barren):
        last = 0
        for match in SAFE_CUT.finditer(text, start, end):
            last = match.start()
        if last:
            return last
    return 0


def _jsonl(path: Path, options: Data, findings: Findings, advance: Callable[[int], None]) -> Iterator[Piece]:
    """One JSON object a line, one document each."""
    column, rest, number = options.text_column, "", 0

    def document(line: str) -> str:
        nonlocal column
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
        if isinstance(row, str):
            return row
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a row is a JSON object or string, not {type(row).__name__}")
        if column is None:
            column = _find_column(row, path, number)
            findings.notes.append(f"{path.name}: the text is in column {column!r}")
        if column not in row:
            raise DataError(f"{path}:{number}: no column {column!r} (it has: {', '.join(map(str, row)) or 'none'})")
        if not isinstance(row[column], str):
            raise DataError(f"{path}:{number}: column {column!r} is {type(row[column]).__name__}, not text")
        return row[column].encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text

    def pieces(line: str) -> Iterator[Piece]:
        if line.strip():
            yield from (Piece(text, first) for text, first in _cut([document(line)]))

    for block in _decoded(path, options, findings, advance):
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            yield from pieces(line)
    number += 1
    yield from pieces(rest)


def _find_column(row: dict[str, Any], path: Path, number: int) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    for name in (*COLUMNS, *(texts if len(texts) == 1 else ())):
        if name in texts:
            return name
    raise DataError(
        f"{path}:{number}: cannot tell which column is the text ({', '.join(map(str, row))}); set data.text_column"
    )


def draw(text: str) -> int:
    """A number below 2**64 for a document, by its beginning: the lowest are validation, copies draw the same."""
    return int.from_bytes(hashlib.blake2b(text[:65536].encode("utf-8"), digest_size=8).digest(), "big")
