"""From a file's bytes to pieces of text: unpacked, decoded, cut.

A document is handed out in pieces of about a megabyte, cut only where no token of a known split pattern can span, so
that memory stays bounded however large a file is and the ids are those of the whole text. (For a tokenizer that is
not `cuttable`, `shards.Writer` joins the pieces of a document again.)
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from gptworks.core.config import Data
from gptworks.core.errors import DataError, UsageError
from gptworks.data.findings import Findings, Piece

PIECE = 1_000_000  # characters; larger ones spend their time in the allocator
HARD_CUT = 64_000_000  # a text without a single newline or space between letters is cut here all the same
UNPACKED, RATIO = 10**9, 1000  # a file may unpack to a gigabyte, or to so many times its size on disk
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


class Unreadable(Exception):
    """The reason why a document is no text."""


def kind(path: Path) -> str:
    """The suffix that names the format, `.gz` and `.zst` aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def _gzip(raw: IO[bytes]) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)  # type: ignore[return-value]


def _zstd(raw: IO[bytes]) -> tuple[IO[bytes], tuple[type[Exception], ...]]:
    try:
        from compression import zstd  # Python 3.14's own
    except ImportError:
        try:
            from backports import zstd  # the same for older ones
        except ImportError:
            raise UsageError(f'{raw.name}: reading .zst needs `pip install "gptworks[data]"`') from None
    return zstd.open(raw), (EOFError, zstd.ZstdError)


PACKED: dict[str, Callable[[IO[bytes]], tuple[IO[bytes], tuple[type[Exception], ...]]]] = {".gz": _gzip, ".zst": _zstd}


def blocks_of(path: Path, findings: Findings) -> Iterator[bytes]:
    """The file's bytes, unpacked, a block at a time; refuses what is not text."""
    damage: tuple[type[Exception], ...] = ()
    try:
        with open(path, "rb") as raw:
            stream: IO[bytes] = raw
            if packed(path):
                stream, damage = PACKED[path.suffix.lower()](raw)
            size, done, out = path.stat().st_size, 0, 0
            while block := stream.read(PIECE):
                if not out:
                    _refuse_binary(path, block)
                out += len(block)
                refuse_bomb(path, out, size)
                position = raw.tell()
                findings.heard(position - done)
                done = position
                yield block
    except damage as error:
        raise DataError(f"{path}: damaged {path.suffix[1:].replace('gz', 'gzip')} file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _refuse_binary(path: Path, block: bytes) -> None:
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
    if b"\0" in block[:65536]:
        raise DataError(f"{path}: a binary file (it has NUL bytes), not text")


def refuse_bomb(path: Path, unpacked: int, size: int) -> None:
    if unpacked > max(UNPACKED, RATIO * size):
        raise DataError(f"{path}: {size:,} bytes that unpack to more than {unpacked:,}: no text packs so well; "
                        "unpack the file yourself if you trust it")  # fmt: skip


def decoded(path: Path, options: Data, findings: Findings) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if options.invalid_utf8 == "error" else "replace")
    seen, before = 0, b""  # bytes read, and the last two of them: a character may straddle two blocks
    for number, block in enumerate(blocks_of(path, findings)):
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
