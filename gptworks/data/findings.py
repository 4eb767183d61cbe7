"""Findings about the text that is read: counted by source, shown before training and kept in the manifest."""

import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gptworks.core.errors import DataError

SAMPLE = 4_000_000  # characters, spread over the corpus, of which the letters are counted by script
HASHED = 2**24  # at most so many documents of the corpus are compared with one another
REASONS = 3  # at most so many unreadable rows are shown
SCRIPTS = {  # the first word of a letter's Unicode name
    "LATIN": "Latin", "CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HANGUL": "Hangul", "CYRILLIC": "Cyrillic",
    "GREEK": "Greek", "ARABIC": "Arabic", "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari", "THAI": "Thai",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Part of a document; `first` marks the part that begins it. A document's pieces concatenated are its text."""

    text: str
    first: bool
    source: int = 0  # the source's number in the corpus

    @cached_property
    def utf8(self) -> bytes:
        return self.text.encode("utf-8", "replace")

    @property
    def size(self) -> int:
        """The length of the text in bytes of UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.utf8)


@dataclass
class Findings:
    """Counts from one reading of one source. A row of a table is a document, an empty document or rejected."""

    name: str = ""
    advance: Callable[[int], None] = lambda count: None  # called with the bytes read from disk
    look: "DocumentSample | None" = None
    documents: int = 0
    bytes: int = 0
    read: int = 0  # bytes from disk
    invalid_utf8: int = 0
    empty_documents: int = 0
    rows: int = 0
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)  # of the first few rejected rows
    columns: Counter[str] = field(default_factory=Counter)  # the number of files in which each holds the text

    def heard(self, count: int) -> None:
        """Counts bytes that were read from disk."""
        self.read += count
        self.advance(count)

    def count(self, piece: Piece) -> bool:
        """Counts a piece; returns False if it is to be dropped, since its document is empty."""
        if not piece.text:
            self.empty_documents += piece.first
            return False
        self.documents += piece.first
        self.bytes += piece.size
        if self.look:
            self.look.see(piece, self.read)
        return True

    def reject(self, reason: str, most: float) -> None:
        """Counts an unreadable row. `most` is the share of rows that may be unreadable; raises DataError if it is 0."""
        if not most:
            raise DataError(f"{reason} (data.max_bad_rows lets a share of the rows be skipped)")
        self.rejected += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)

    def judge(self, most: float) -> None:
        """Raises DataError if more than the share `most` of the rows was unreadable."""
        if self.rejected > most * self.rows:
            raise DataError(
                f"{self.name}: {self.rejected:,} of {self.rows:,} rows cannot be read, more than "
                f"data.max_bad_rows={most:g} allows; the first: {self.reasons[0]}"
            )

    def dropped(self) -> list[str]:
        """Says what was left out or replaced."""
        parts = []
        if self.rejected:
            shown = "; ".join(self.reasons)
            parts.append(f"{self.rejected:,} of {self.rows:,} rows were unreadable and skipped: {shown}")
        if self.empty_documents:
            parts.append(f"{self.empty_documents:,} empty documents were dropped")
        if self.invalid_utf8:
            parts.append(f"{self.invalid_utf8:,} invalid UTF-8 sequences were replaced by U+FFFD")
        return parts


class DocumentSample:
    """Hashes of a source's documents, to find copies, and a sample of its letters, to tell its scripts."""

    def __init__(self, size: int, sources: int) -> None:
        """`size`: the source's bytes on disk (0: unknown); `sources`: the number of sources in the corpus."""
        self.size, self.characters, self.most = size, SAMPLE // sources, HASHED // sources
        self._letters: Counter[str] = Counter()  # by script
        self._hashes = array("Q")
        self._open: Any = None  # the hash of the document being read
        self._sample: list[str] = []
        self._seen = self._taken = self._waiting = 0  # characters read, sampled, and sampled but not yet counted

    def see(self, piece: Piece, read: int) -> None:
        """Takes in a piece; `read` is the number of the source's bytes read so far."""
        if piece.first:
            self._close()
            self._open = hashlib.sha256()
        self._open.update(piece.utf8)
        self._seen += len(piece.text)
        so_far = min(read / self.size, 1.0) if self.size else 1.0
        wanted = min(int(self.characters * so_far) - self._taken, len(piece.text))
        if wanted >= min(4096, self.characters // 8, len(piece.text)):  # whole documents or a long stretch, no scraps
            self._sample.append(piece.text[:wanted])
            self._taken += wanted
            self._waiting += wanted
            if self._waiting > 65536:
                self._tell()

    def hashes(self) -> np.ndarray:
        """The first 64 bits of each document's SHA-256, in order, for the first `most` documents."""
        self._close()
        return np.array(self._hashes, dtype=np.uint64)

    def letters(self) -> Counter[str]:
        """The number of letters of each script in the source, estimated from the sample."""
        self._tell()
        scale = self._seen / max(self._taken, 1)
        return Counter({script: round(number * scale) for script, number in self._letters.items()})

    def _close(self) -> None:
        if self._open and len(self._hashes) < self.most:
            self._hashes.append(int.from_bytes(self._open.digest()[:8], "little"))
        self._open = None

    def _tell(self) -> None:
        points = np.frombuffer("".join(self._sample).encode("utf-32-le", "replace"), dtype="<u4")
        counts = np.bincount(points)
        for point in np.flatnonzero(counts).tolist():
            if script := script_of(point):
                self._letters[script] += int(counts[point])
        self._sample, self._waiting = [], 0


@lru_cache(maxsize=2**17)
def script_of(point: int) -> str | None:
    """The script of a letter, by its code point; None for a character that is no letter."""
    character = chr(point)
    return SCRIPTS.get(unicodedata.name(character, "").split(" ")[0], "other") if character.isalpha() else None


# -- the table ---------------------------------------------------------------------------------------------------


def table(findings: list[Findings], tokens: list[np.ndarray]) -> list[dict[str, Any]]:
    """One row for each source and, if there are several, one for all. `tokens`: every document's length, by source.

    Percentiles are lengths that occur (nearest rank). A copy is a document with the same text as an earlier one.
    """
    copies, examples = _copies(findings)
    letters = [one.look.letters() if one.look else Counter[str]() for one in findings]
    rows = [_row(*parts) for parts in zip(findings, tokens, copies, letters, strict=True)]
    for row, example, one in zip(rows, examples, findings, strict=True):
        row |= {"copy": example, "compared": min(one.documents, one.look.most if one.look else 0)}
    if len(rows) > 1:
        sums = {key: sum(getattr(one, key) for one in findings) for key in COUNTS}
        reasons = [reason for one in findings for reason in one.reasons][:REASONS]
        columns = sum((one.columns for one in findings), Counter[str]())
        every = Findings("total", reasons=reasons, columns=columns, **sums)
        rows.append(_row(every, np.concatenate(tokens), copies=sum(copies), letters=sum(letters, Counter[str]())))
    return rows


COUNTS = ("documents", "bytes", "rows", "rejected", "empty_documents", "invalid_utf8")


def _row(findings: Findings, tokens: np.ndarray, copies: int, letters: Counter[str]) -> dict[str, Any]:
    lengths = np.percentile(tokens, [5, 50, 95, 100], method="inverted_cdf") if len(tokens) else np.zeros(4)
    counted = max(letters.total(), 1)
    return {
        "source": findings.name,
        "tokens": int(tokens.sum()),
        **{key: getattr(findings, key) for key in COUNTS},
        "reasons": findings.reasons,
        "columns": {column: files for column, files in findings.columns.items() if files},
        "length": {name: int(value) for name, value in zip(("p5", "p50", "p95", "max"), lengths, strict=True)},
        "copies": copies,
        "letters": {script: round(number / counted, 4) for script, number in letters.most_common()},
    }


def _copies(findings: list[Findings]) -> tuple[list[int], list[str | None]]:
    """Says for each source how many documents repeat an earlier one of the corpus, and names the first that does."""
    parts = [one.look.hashes() if one.look else np.empty(0, dtype=np.uint64) for one in findings]
    every, ends = np.concatenate(parts), np.cumsum([len(part) for part in parts])
    order = np.argsort(every, kind="stable")
    same = np.flatnonzero(every[order[1:]] == every[order[:-1]])
    repeats = np.sort(order[same + 1])
    source = np.searchsorted(ends, repeats, side="right")
    counts, examples = np.bincount(source, minlength=len(parts)).tolist(), list[str | None]()

    def place(document: int) -> str:
        at = int(np.searchsorted(ends, document, side="right"))
        return f"document {document - int(ends[at]) + len(parts[at]) + 1:,} of {findings[at].name}"

    for number in range(len(parts)):
        mine = repeats[source == number]
        first = int(np.flatnonzero(every == every[mine[0]])[0]) if len(mine) else 0
        examples.append(f"{place(int(mine[0]))} repeats {place(first)}" if len(mine) else None)
    return counts, examples


HEADINGS = ("source", "documents", "bytes", "tokens", "p5", "p50", "p95", "max", "copies", "letters")


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table as aligned text, or a sentence for a single source; then remarks, and the column that is the text."""
    shown = _grid([HEADINGS, *(_cells(row) for row in rows)]) if len(rows) > 1 else [_sentence(rows[0])]
    for row in rows[:-1] or rows:
        name = f"{_short(row['source'])}: " if len(rows) > 1 else ""
        shown += [name + remark for remark in _remarks(row)]
    for column, files in rows[-1]["columns"].items():
        shown.append(f"the text is in column {column!r} of {files:,} file{'s' * (files > 1)}")
    return shown


def _sentence(row: dict[str, Any]) -> str:
    said = f"{row['bytes']:,} bytes, {_letters(row) or 'no letters'}"
    if row["documents"] > 1:
        spread = ", ".join(f"{name} {value:,}" for name, value in row["length"].items())
        said += f"; tokens a document: {spread}; exact copies: {row['copies']:,}"
    return said


def _grid(cells: list[tuple[str, ...]]) -> list[str]:
    """Pads cells to columns of equal width; the first and the last column are aligned left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < i < len(line) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = [row["documents"], row["bytes"], row["tokens"], *row["length"].values(), row["copies"]]
    return (_short(row["source"]), *(f"{number:,}" for number in numbers), _letters(row))


def _letters(row: dict[str, Any]) -> str:
    shares = list(row["letters"].items())
    return ", ".join(f"{script} {share:.0%}" for script, share in shares[:3] if share >= 0.005)


def _remarks(row: dict[str, Any]) -> list[str]:
    said = [f"a copy, for example: {row['copy']}"] if row["copy"] else []
    if row["compared"] < row["documents"]:
        said.append(f"copies were looked for among its first {row['compared']:,} documents")
    return said + Findings(**{key: row[key] for key in (*COUNTS, "reasons")}).dropped()


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"
