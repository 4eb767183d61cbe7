"""Findings about the text that is read: counted by source, shown before training and kept in the manifest."""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gptworks.core.errors import DataError
from gptworks.core.log import plural

SAMPLE = 4_000_000  # characters, spread over the corpus, of which the letters are counted by script
HASHED = 2**24  # at most so many documents of the corpus are compared with one another
REASONS = 3  # at most so many unreadable rows are shown
MANY = 50  # blank lines in a text that may be several
CONTROL = re.compile(
    r"<[|｜][^\s|｜<>]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]"
)  # control tokens as usual spelled
ENDS = re.compile(
    r"end[_▁]?of[_▁]?(?:text|sentence|document)|eot_id|eos", re.IGNORECASE
)  # of those, what parts documents
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
    crlf: int = 0  # documents that had such line ends
    controls: Counter[str] = field(default_factory=Counter)  # what is spelled like a control token
    blank_lines: int = 0
    newlines: str = "keep"  # what became of them
    built_in: bool = False
    text_files: int = 0
    separator: str | None = None  # that is to cut them
    separated: int = 0  # how often it cut one
    suspects: list[str] = field(default_factory=list)  # fields that may have swallowed rows

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
        if self.look and self.documents == 1 and self.blank_lines < MANY:
            self.blank_lines += piece.text.count("\n\n")
        if "<" in piece.text or "[" in piece.text:  # a search for one character costs next to nothing
            self.controls.update(match[0] for match in CONTROL.finditer(piece.text))
        if self.look:
            self.look.see(piece, self.read)
        return True

    def reject(self, reason: str, most: float, rows: int = 1) -> None:
        """Counts what cannot be read: a row, or as many as there may be in its lines.

        `most` is the share of rows that may be unreadable; raises DataError if it is 0.
        """
        if not most:
            raise DataError(f"{reason} (data.max_bad_rows lets a share of the rows be skipped)")
        self.rejected += rows
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
        """Says what was left out."""
        parts = []
        if self.rejected:
            shown = "; ".join(self.reasons)
            were = "was" if self.rejected == 1 else "were"
            parts.append(f"{self.rejected:,} of {plural(self.rows, 'row')} {were} unreadable and skipped: {shown}")
        if self.empty_documents:
            were = "was" if self.empty_documents == 1 else "were"
            parts.append(f"{plural(self.empty_documents, 'empty document')} {were} dropped")
        return parts

    def remarks(self) -> list[str]:
        """Says what was come across and what was left out."""
        parts = self.dropped()
        if self.crlf:
            have = "has" if self.crlf == 1 else "have"
            ends = f"{self.crlf:,} of {plural(self.documents, 'document')} {have} CRLF line ends"
            parts.append(ends + (", read as LF (data.newlines=keep keeps them)" if self.newlines == "lf" else ""))
        is_one = self.documents == self.text_files == 1 and not self.separator and not self.built_in
        if is_one and self.blank_lines >= MANY:
            parts.append("one document; where blank lines part several, data.separator=$'\\n\\n' makes them so")
        return parts

    def warnings(self) -> list[str]:
        """Says what is probably not as it was meant."""
        parts = list(self.suspects)
        if self.invalid_utf8:
            were = "was" if self.invalid_utf8 == 1 else "were"
            parts.append(f"{plural(self.invalid_utf8, 'invalid sequence')} of bytes {were} replaced by U+FFFD")
        if self.text_files and self.separator and not self.separated:
            typed = r"; a backslash is taken as typed: a shell makes line breaks of $'\n\n'"
            hint = typed if "\\" in self.separator else ""
            parts.append(f"data.separator={self.separator!r} never occurs, so each file is one document{hint}")
        if self.controls:
            shown = ", ".join(f"{token} ({number:,})" for token, number in self.controls.most_common(3))
            parts.append(f"control tokens in the text are read as plain text: {shown}{self._way_out()}")
        return parts

    def _way_out(self) -> str:
        """Says what a control token in the text calls for."""
        end = next((token for token, _ in self.controls.most_common() if ENDS.search(token)), None)
        if end and not self.rows:
            return f"; data.separator='{end}' makes documents of what they part"
        return "; training on chat is not in this version"


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
        compared = min(one.documents, one.look.most if one.look else 0)
        row |= {"copy": example, "compared": compared, "remarks": one.remarks(), "warnings": one.warnings()}
    if len(rows) > 1:
        sums = {key: sum(getattr(one, key) for one in findings) for key in COUNTS}
        reasons = [reason for one in findings for reason in one.reasons][:REASONS]
        columns = sum((one.columns for one in findings), Counter[str]())
        every = Findings("total", reasons=reasons, columns=columns, **sums)
        rows.append(_row(every, np.concatenate(tokens), copies=sum(copies), letters=sum(letters, Counter[str]())))
    return rows


COUNTS = ("documents", "bytes", "rows", "rejected", "empty_documents", "invalid_utf8", "crlf")


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
    shown += _of_sources(rows, _remarks)
    for column, files in rows[-1]["columns"].items():
        shown.append(f"the text is in column {column!r} of {plural(files, 'file')}")
    return shown


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """The lines that are to be seen whatever else is."""
    return _of_sources(rows, lambda row: row["warnings"])


def _of_sources(rows: list[dict[str, Any]], said: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """The remarks of every source, with its name where there are several."""
    name = (lambda row: f"{_short(row['source'])}: ") if len(rows) > 1 else lambda row: ""
    return [name(row) + remark for row in rows[:-1] or rows for remark in said(row)]


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
        said.append(f"copies were looked for among its first {plural(row['compared'], 'document')}")
    return said + row["remarks"]


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"
