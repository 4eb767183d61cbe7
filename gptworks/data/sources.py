"""Where text comes from: files, folders, globs, built-in texts and functions of the user's own, in a fixed order."""

import errno
import fnmatch
import glob
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.errors import DataError, GptworksError, StorageError, UsageError
from gptworks.core.registry import file_of, nearest, resolve
from gptworks.core.runtime import interrupts
from gptworks.data import formats, text
from gptworks.data.findings import DocumentSample, Findings, Piece

BUILTIN = {"shakespeare": "shakespeare.txt", "hongloumeng": "hongloumeng.txt"}  # both in the public domain
TABLE: dict[str, str] = {}  # name -> "module:attribute", a callable that yields documents (str)
END = object()  # of documents
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
        elif place in TABLE or (re.search(r"\.py:\w+$", place) and not os.path.lexists(place)):
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

    def stamp(self) -> list[dict[str, Any]]:
        """Path, size and time of every file: the quick test of whether anything changed."""
        stats = [(file, file.stat()) for file in self.files + self.code]
        return [{"path": str(f.resolve()), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for f, s in stats]

    def pieces(self, findings: Findings) -> Iterator[Piece]:
        """Streams every document that is not empty, and counts. Raises DataError."""
        findings.newlines, findings.built_in = self.options.newlines, self.place in BUILTIN
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
                plain = text.without_surrogates(document, self.options, findings)
                yield from text.document([plain], self.options, findings)
            except text.Unreadable as error:
                raise DataError(f"{self.place}: document {number} is not text: {error}") from None

    def _yielded(self) -> Iterator[Any]:
        """Yields what the function yields; whatever that raises becomes a DataError."""
        number = 0
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                documents = self.function() if self.function else ()
            if isinstance(documents, str):
                raise DataError(f"{self.place}: gives one text; yield it, or give it in a list, as one document")
            each = iter(documents)
            while True:
                with redirect_stdout(sys.stderr):
                    document = next(each, END)
                if document is END:
                    return
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
    """The files that a path, folder or glob stands for, sorted, each once. Raises DataError, StorageError."""
    path, known = folder.path(place), ", ".join(formats.READERS)
    packings = ", ".join(text.PACKED)
    if path.is_dir():
        files = [file for file in _once(_matching(path, ["**", "*"], set())) if text.kind(file) in formats.READERS]
        if not files:
            raise DataError(f"{path}: no {known} file (plain or packed: {packings}) in this folder")
    elif path.is_file():
        files = [path]
    elif glob.has_magic(place):
        start = Path(path.anchor) if path.is_absolute() else Path()
        files = _once(_matching(start, list(path.parts[path.is_absolute() :]), set()))
        if not files:
            raise DataError(f"{place}: no file matches")
    else:
        folder.check_regular(path)
        if path.is_symlink():
            raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there")
        raise DataError(f"{place}: no such file, folder or built-in text ({nearest(place, list(BUILTIN))})")
    for file in files:
        if file.suffix.lower() in REFUSED or text.kind(file) in REFUSED:
            raise DataError(
                f"{file}: {file.suffix} files are not text and could run code when loaded; "
                f"give {known} (plain or packed: {packings})"
            )
    return files


def _matching(place: Path, pattern: list[str], seen: set[tuple[str, int]]) -> Iterator[Path]:
    """The files below a folder that a pattern of names matches; `**` stands for any number of folders.

    A name that begins with a dot is hidden, and meant only where the pattern has the dot. Links to folders are
    followed, each folder but once for a place of the pattern (`seen`), so that a circle of them ends. Raises
    StorageError for a folder that cannot be read.
    """
    name, *rest = pattern
    if name == "**":
        if (here := (os.path.realpath(place), len(pattern))) in seen:
            return
        seen.add(here)
        yield from _matching(place, rest or ["*"], seen)
    for entry in _entries(place, name):
        mode = _mode(entry)
        if not rest and name != "**":
            if stat.S_ISREG(mode):
                yield entry
        elif stat.S_ISDIR(mode):
            yield from _matching(entry, pattern if name == "**" else rest, seen)


def _entries(place: Path, name: str) -> list[Path]:
    """The things in a folder that a name or a pattern stands for. Raises StorageError."""
    if not glob.has_magic(name):
        return [place / name] if os.path.lexists(place / name) else []
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        raise _unreadable(place, error) from error
    shown = [one for one in names if one[0] != "." or name[0] == "."]
    return [place / one for one in shown if one == name or fnmatch.fnmatchcase(one, name)]


def _mode(entry: Path) -> int:
    """The kind of thing this is; 0 for a link to nothing or to itself. Raises StorageError."""
    try:
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 0
        raise _unreadable(entry, error) from error


def _unreadable(place: Path, error: OSError) -> StorageError:
    return StorageError(f"{place}: {error.strerror or error}; make it readable, or name what is to be read without it")


def _once(files: Iterable[Path]) -> list[Path]:
    """The files, sorted, but for those that are another one by a link."""
    real: dict[str, Path] = {}
    for file in sorted(files):
        real.setdefault(os.path.realpath(file), file)
    return list(real.values())


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
