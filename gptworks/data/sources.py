"""Where text comes from: files, folders, globs, built-in texts and functions of the user's own, in a fixed order."""

import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from gptworks.core.config import Data
from gptworks.core.errors import DataError, GptworksError, UsageError
from gptworks.core.registry import file_of, nearest, resolve
from gptworks.core.runtime import interrupts
from gptworks.data import formats, text
from gptworks.data.findings import DocumentSample, Findings, Piece

BUILTIN = {"shakespeare": "shakespeare.txt", "hongloumeng": "hongloumeng.txt"}  # both in the public domain
TABLE: dict[str, str] = {}  # name -> "module:attribute", a callable that yields documents (str)
REFUSED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".py", ".so")


class Source:
    """One place to read documents from: a file, a folder, a glob, a built-in text or a function.

    `files` are real paths (a built-in text included), so that their size and content, and those of the `code` of the
    user's own function, identify the text. Raises DataError and UsageError.
    """

    def __init__(self, place: str, options: Data, number: int = 0) -> None:
        """`number`: which source of the corpus this is."""
        if not place:
            raise UsageError("data.train or --data is empty: name a file, a folder, a glob or a built-in text")
        self.place, self.options, self.number = place, options, number
        self.files: list[Path] = []
        self.function: Callable[[], Iterable[str]] | None = None
        self.code: list[Path] = []
        if place in BUILTIN:
            self.files = [Path(str(resources.files("gptworks") / "data" / "texts" / BUILTIN[place]))]
        elif place in TABLE or re.search(r"\.py:\w+$", place):
            self.function = resolve("data source", TABLE, place)
            if not callable(self.function):
                raise UsageError(f"{place}: not a function; name one that yields documents (str)")
            own = None if place in TABLE else file_of(place)
            self.code = [own] if own else []
        else:
            self.files = _found(place)
        for file in self.files + self.code:
            _refuse_odd_name(file.resolve())

    @property
    def size(self) -> int:
        """Bytes on disk, for progress; compressed files count as they lie."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def one_plain_text(self) -> bool:
        """True for a single uncompressed text file that is one document: its size is known unread."""
        if len(self.files) != 1 or self.options.separator:
            return False
        reader = formats.READERS.get(text.kind(self.files[0]), formats.text_file)
        return reader is formats.text_file and not text.packed(self.files[0])

    def stamp(self) -> list[dict[str, Any]]:
        """Path, size and time of every file: the quick test of whether anything changed."""
        stats = [(file, file.stat()) for file in self.files + self.code]
        return [{"path": str(f.resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for f, s in stats]

    def pieces(self, findings: Findings) -> Iterator[Piece]:
        """Streams every document that is not empty, and counts. Raises DataError."""
        for piece in self._pieces(findings):
            interrupts.check()
            piece = replace(piece, source=self.number)
            if findings.count(piece):
                yield piece
        findings.judge(self.options.max_bad_rows)

    def _pieces(self, findings: Findings) -> Iterator[Piece]:
        for file in self.files:
            yield from formats.read(file, self.options, findings)
        for number, document in enumerate(self._yielded(), 1):
            if not isinstance(document, str):
                raise DataError(f"{self.place}: document {number} is not text (str) but {type(document).__name__}")
            try:
                yield from text.pieces([text.without_surrogates(document, self.options, findings)])
            except text.Unreadable as error:
                raise DataError(f"{self.place}: document {number} is not text: {error}") from None

    def _yielded(self) -> Iterator[Any]:
        """Yields what the function yields; whatever that raises becomes a DataError."""
        number = 0
        try:
            for document in self.function() if self.function else ():
                number += 1
                yield document
        except GptworksError:  # a signal to stop, for one
            raise
        except Exception as error:
            problem = f"failed at document {number + 1}: {type(error).__name__}: {error}"
            raise DataError(f"{self.place}: {problem} (--debug shows where)") from error


def sources_of(places: list[str], options: Data, first: int = 0) -> list[Source]:
    """Every place as a source, numbered from `first`."""
    if not places:
        raise UsageError("data.train is an empty list: name at least one file")
    return [Source(place, options, number) for number, place in enumerate(places, first)]


def findings_of(sources: list[Source], advance: Callable[[int], None] | None = None) -> list[Findings]:
    """Makes the findings that one reading is counted in. With `advance`, which hears of bytes read, documents are
    looked at closely."""
    if advance is None:
        return [Findings(source.place) for source in sources]
    return [Findings(source.place, advance, DocumentSample(source.size, len(sources))) for source in sources]


def _found(place: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted."""
    path, known = Path(place).expanduser(), ", ".join(formats.READERS)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and text.kind(p) in formats.READERS)
        if not files:
            raise DataError(f"{path}: no {known} file (plain, .gz or .zst) in this folder")
    elif path.is_file():
        files = [path]
    elif glob.has_magic(place):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"{place}: no file matches")
    else:
        raise DataError(f"{place}: no such file, folder or built-in text ({nearest(place, list(BUILTIN))})")
    for file in files:
        if file.suffix.lower() in REFUSED or text.kind(file) in REFUSED:
            raise DataError(
                f"{file}: {file.suffix} files are not text and could run code when loaded; "
                f"give {known} (plain, .gz or .zst)"
            )
    return files


def _refuse_odd_name(file: Path) -> None:
    """A name that is not UTF-8 could not be kept in the manifest. Raises DataError."""
    try:
        str(file).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{str(file)!r}: the file's name is not UTF-8; rename it") from None


def listed(places: list[str]) -> str:
    """The first few places, for an error line."""
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def draw(text: str) -> int:
    """A number below 2**64 for a document, by its beginning: the lowest are validation, copies draw the same."""
    return int.from_bytes(hashlib.blake2b(text[:65536].encode("utf-8"), digest_size=8).digest(), "big")
