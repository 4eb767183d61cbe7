"""From a file's bytes to pieces of text: unpacked, decoded, its line ends as `data.newlines` says, cut.

A document is handed out in pieces of about a megabyte, cut only where no token of a known split pattern can span, so
that memory stays bounded however large a file is and the ids are those of the whole text. (For a tokenizer that is
not `cuttable`, `shards.Writer` joins the pieces of a document again.)
"""

import bz2
import codecs
import gzip
import lzma
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from gptworks.core.config import Data
from gptworks.core.errors import DataError, UsageError
from gptworks.data.encodings import likely
from gptworks.data.findings import Findings, Piece

PIECE = 1_000_000  # characters; larger ones spend their time in the allocator
HARD_CUT = 64_000_000  # a text without a single newline or space between letters is cut here all the same
UNPACKED, RATIO = 10**9, 1000  # a file may unpack to a gigabyte, or to so many times its size on disk
REPLACED = 0.001  # a file of which a larger share of the characters cannot be decoded is of another encoding
XZ_MEMORY = 2**28  # bytes; `xz -9` needs a quarter of it
BOMS = {  # longest first: UTF-32's little-endian one begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


class Unreadable(Exception):
    """The reason why a document is no text; `rows` is how many rows there may be in its lines."""

    def __init__(self, reason: str, rows: int = 1) -> None:
        super().__init__(reason)
        self.rows = rows


def kind(path: Path) -> str:
    """The suffix that names the format, that of the packing aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def _gzip(raw: IO[bytes]) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)  # type: ignore[return-value]


class _Members:
    """Unpacks members one after another; Python's own readers of bzip2 and xz overlook what follows one and is none."""

    def __init__(self, raw: IO[bytes], fresh: Callable[[], Any]) -> None:
        self.raw, self.fresh, self.member = raw, fresh, fresh()

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end. Raises EOFError for a file that is cut short."""
        while True:
            packed_bytes = b""
            if self.member.eof:
                packed_bytes = self.member.unused_data.lstrip(b"\0") or self.raw.read(65536)
                if not packed_bytes:
                    return b""
                self.member = self.fresh()
            elif self.member.needs_input and not (packed_bytes := self.raw.read(65536)):
                raise EOFError("it ends before its end is marked")
            if unpacked := self.member.decompress(packed_bytes, size):
                return bytes(unpacked)


def _bzip2(raw: IO[bytes]) -> tuple[Any, tuple[type[Exception], ...]]:
    return _Members(raw, bz2.BZ2Decompressor), (EOFError, ValueError)


def _xz(raw: IO[bytes]) -> tuple[Any, tuple[type[Exception], ...]]:
    return _Members(raw, partial(lzma.LZMADecompressor, memlimit=XZ_MEMORY)), (EOFError, lzma.LZMAError)


def _zstd(raw: IO[bytes]) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    try:
        from compression import zstd  # Python 3.14's own
    except ImportError:
        try:
            from backports import zstd  # the same for older ones
        except ImportError:
            raise UsageError(f'{raw.name}: reading .zst needs `pip install "gptworks[data]"`') from None
    return zstd.open(raw), (EOFError, zstd.ZstdError)


PACKED: dict[str, Callable[[IO[bytes]], tuple[IO[bytes], tuple[type[Exception], ...]]]] = {
    ".gz": _gzip, ".bz2": _bzip2, ".xz": _xz, ".zst": _zstd,
}  # fmt: skip


def blocks_of(path: Path, findings: Findings) -> Iterator[bytes]:
    """The file's bytes, unpacked, a block at a time."""
    damage: tuple[type[Exception], ...] = ()
    try:
        with open(path, "rb") as raw:
            stream: IO[bytes] = raw
            if packed(path):
                stream, damage = PACKED[path.suffix.lower()](raw)
            size, done, out = path.stat().st_size, 0, 0
            while block := stream.read(PIECE):
                out += len(block)
                refuse_bomb(path, out, size)
                position = raw.tell()
                findings.heard(position - done)
                done = position
                yield block
    except damage as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None and packed(path):  # bz2's words for bytes that are none of its own
            raise _damaged(path, error) from error
        raise DataError(f"{path}: {error.strerror or error}") from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: damaged {path.suffix[1:].replace('gz', 'gzip')} file: {error}")


def refuse_bomb(path: Path, unpacked: int, size: int) -> None:
    if unpacked > max(UNPACKED, RATIO * size):
        raise DataError(f"{path}: {size:,} bytes that unpack to more than {unpacked:,}: no text packs so well; "
                        "unpack the file yourself if you trust it")  # fmt: skip


_here = threading.local()  # `replaced`: how many sequences this thread could not decode


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Counts what codecs' own "replace" does in silence."""
    _here.replaced = getattr(_here, "replaced", 0) + 1
    return "\ufffd", error.end  # type: ignore[attr-defined]


codecs.register_error("gptworks.replace", _replaced)


class Decoding:
    """Counts what of a file cannot be decoded, and refuses the file where that is too much of it."""

    def __init__(self, path: Path, options: Data, findings: Findings) -> None:
        self.path, self.options, self.findings = path, options, findings
        self.errors = "strict" if options.invalid_utf8 == "error" else "gptworks.replace"
        self.characters = self.replaced = 0
        self.sample = b""  # the first bytes of which some had to be replaced

    def decode(self, raw: bytes, decoder: Callable[[bytes], str]) -> str:
        """Decodes the next bytes of the file. Raises UnicodeDecodeError where nothing may be replaced."""
        before = getattr(_here, "replaced", 0)
        text = decoder(raw)
        number = getattr(_here, "replaced", 0) - before
        self.findings.invalid_utf8 += number
        self.characters, self.replaced = self.characters + len(text), self.replaced + number
        if number:
            self.sample = self.sample or raw
        return text

    def judge(self, most: int) -> None:
        """Raises DataError where too much of the file had to be replaced, if it has at most so many characters. Where
        an encoding was asked for, all is taken as it comes."""
        if self.replaced > REPLACED * most and self.options.encoding is None:
            share = self.replaced / self.characters
            raise DataError(f"{self.path}: {share:.2%} of its characters are not UTF-8; {way_out(self.sample)}")


def way_out(raw: bytes) -> str:
    """A phrase that says how a text that is not UTF-8 is read."""
    encoding = likely(raw)
    anyhow = "data.encoding=utf-8 reads it with U+FFFD in their place"
    if encoding is None:
        return f"data.encoding names another encoding; {anyhow}"
    way = f"data.encoding={encoding} reads it (evaluate: --encoding {encoding})"
    return f"it looks like {encoding.upper()}: {way}; {anyhow}"


def decoded(path: Path, options: Data, findings: Findings) -> Iterator[str]:
    """The text of a file, a block at a time. Raises DataError for what is no text in the encoding that is asked for,
    by default UTF-8 or what a byte order mark says."""
    if path.suffix.lower() in ARCHIVES or kind(path) in ARCHIVES:
        raise DataError(f"{path}: an archive of files; unpack it and name the folder")
    decoder: codecs.IncrementalDecoder | None = None
    encoding, seen, begun = options.encoding or "utf-8", 0, False
    decoding = Decoding(path, options, findings)
    size = None if packed(path) else path.stat().st_size  # the most characters that there can be
    for block, last in _with_last(blocks_of(path, findings)):
        if decoder is None:
            if options.encoding is None:
                encoding = next((name for mark, name in BOMS.items() if block.startswith(mark)), encoding)
            _refuse_binary(path, block, encoding)
            decoder = codecs.getincrementaldecoder(encoding)(decoding.errors)
        waiting = decoder.getstate()[0]
        try:
            text = decoding.decode(block, partial(decoder.decode, final=last))
        except UnicodeDecodeError as error:
            place = seen - len(waiting) + error.start
            cut = last and error.reason in ("unexpected end of data", "incomplete multibyte sequence")
            where = f"ends within a {encoding.upper()} character" if cut else f"byte {place}: not {encoding.upper()}"
            hint = way_out(block) if options.encoding is None and not cut else ""
            keep_on = "data.invalid_utf8=replace reads on with U+FFFD"
            raise DataError(f"{path}: {where}; {hint.partition(';')[0] + ', ' if hint else ''}{keep_on}") from None
        seen += len(block)
        if decoding.replaced and (last or size):  # before a reader meets what is no text
            decoding.judge(decoding.characters if last else size or 0)
        if text:
            yield text if begun else text.removeprefix("\ufeff")
            begun = True


def _with_last(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Every block, and whether it is the last."""
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        yield block, following is None
        block = following


def _refuse_binary(path: Path, block: bytes, encoding: str) -> None:
    """Raises DataError for a file that has NUL bytes, or NUL characters where its encoding has such bytes in others."""
    head = block[:65536]
    if b"\0" not in head:
        return
    if encoding.startswith(("utf-16", "utf-32")):
        if "\0" not in codecs.getincrementaldecoder(encoding)("replace").decode(head):
            return
    elif (wide := likely(head)) and wide.startswith("utf-"):
        raise DataError(f"{path}: not UTF-8; {way_out(head).partition(';')[0]}")
    raise DataError(f"{path}: a binary file (it has NUL bytes), not text")


def document(blocks: Iterable[str], options: Data, findings: Findings) -> Iterator[Piece]:
    """One document, with the line ends that `data.newlines` asks for, as pieces. Every reader's text comes by here."""
    yield from pieces(_line_ends(blocks, options, findings))


def _line_ends(blocks: Iterable[str], options: Data, findings: Findings) -> Iterator[str]:
    """Makes LF of CRLF where that is asked for, and counts the documents that have it."""
    held_back, counted = "", False  # a CR whose LF may begin the next block
    for block in blocks:
        if "\r" in block or held_back:
            block = held_back + block
            held_back = "\r" if block.endswith("\r") else ""
            block = block[: len(block) - len(held_back)]
            if "\r\n" in block:
                findings.crlf += not counted
                counted = True
                block = block if options.newlines == "keep" else block.replace("\r\n", "\n")
        yield block
    if held_back:
        yield held_back


def pieces(blocks: Iterable[str]) -> Iterator[Piece]:
    """One document, given as blocks of any length, re-cut at places that no pre-token spans."""
    rest, first, barren = "", True, 0
    for block in blocks:
        rest += block
        while len(rest) > PIECE:
            place = _last_safe_cut(rest, barren)
            if not place and len(rest) < HARD_CUT:
                barren = max(len(rest) - 4, 0)  # not looked through again, but for what the end had cut off
                break
            yield Piece(rest[: place or HARD_CUT], first)
            rest, first, barren = rest[place or HARD_CUT :], False, 0
    if rest or first:
        yield Piece(rest, first)


def safe_places(text: str, apart: int) -> Iterator[int]:
    """The places where a text may be cut, at least `apart` characters from each other and from its beginning."""
    place = 0
    while match := SAFE_CUT.search(text, place + apart):
        place = match.start()
        yield place


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


def without_surrogates(text: str, options: Data, findings: Findings) -> str:
    """Lone surrogates, which a JSON escape can spell and UTF-8 cannot, are invalid text like invalid bytes."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if options.invalid_utf8 == "error":
            raise Unreadable(f"character {error.start + 1} is a lone surrogate, which is not text") from None
    text, number = re.subn("[\ud800-\udfff]", "\ufffd", text)
    findings.invalid_utf8 += number
    return text
