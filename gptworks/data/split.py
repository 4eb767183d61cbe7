"""Which text is validation. Decided once for each source of a mixture, or for all of the text together.

One document is split by position; several are by content, so that copies of a document fall on the same side. Where
whole documents would make up another share of the bytes than is asked for, since they are few or of very different
length, they are taken in the order of what they draw until the share is reached, and the end of the last one, not all
of it, is held out.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gptworks.core.config import Data
from gptworks.core.errors import DataError
from gptworks.data.findings import Findings, Piece
from gptworks.data.sources import Source, draw, listed

FAIR = 1.5  # whole documents may make up so many times the share of the bytes that is asked for, or so much less
KNOWN = 10**9  # bytes of text from which it is known what documents there are
FEW = 20  # with fewer documents than this on one side of the split, validation documents are counted out
HELD_OUT = 0.1
HELD_OUT_BYTES = 5_000_000

Halves = Iterator[tuple[Piece, bool]]  # a piece, and whether it is validation
Rule = Callable[[Iterator[Piece]], Halves]


class Split:
    """The training sources, then those of `data.eval` if there are any, as one stream of both halves."""

    def __init__(self, data: Data, sources: list[Source], held_out: list[Source]) -> None:
        """Reads as much of the text as the decision needs. Raises DataError."""
        self.data, self.held = data, held_out
        groups = [[source] for source in sources] if data.weights else [sources]
        if held_out:
            first = f", its first {data.eval_bytes:,} bytes" if data.eval_bytes else ""
            rules: list[tuple[Rule, str]] = [(_all_training, "") for _ in groups]
            self.how = f"{data.eval}{first}"
        else:
            size = sum(source.size for source in sources)
            fraction = held_out_share(data, size)
            surveys = [Survey(group, fraction, data.eval_bytes) for group in groups]
            total = sum(survey.size for survey in surveys)
            rules = [survey.rule(total) for survey in surveys]
            self.how = " and ".join(dict.fromkeys(self._said(groups, [how for _, how in rules])))
            self.how += f", at most {data.eval_bytes:,} bytes" if data.eval_bytes else ""
            self.how += ", of each source by itself" if len(groups) > 1 else ""
        self.groups = [(group, rule) for group, (rule, _) in zip(groups, rules, strict=True)]

    @staticmethod
    def _said(groups: list[list[Source]], rules: list[str]) -> list[str]:
        """The rules in words, each with the names of its sources where they differ."""
        if len(set(rules)) == 1:
            return rules
        names = {rule: [one[0].place.rpartition("/")[2] for one, its in zip(groups, rules, strict=True) if its == rule]
                 for rule in rules}  # fmt: skip
        return [f"{rule} ({listed(places)})" for rule, places in names.items()]

    def said(self, splits: dict[str, Any]) -> str:
        """Says what is validation, with the shares that came out; `splits` are the counts of both halves."""
        if self.data.eval:
            return f"validation: {self.how}"
        shares = (
            f"{splits['eval'][unit] / max(splits['train'][unit] + splits['eval'][unit], 1):.2%} of the {unit}"
            for unit in ("bytes", "tokens")
        )
        return f"validation: {' and '.join(shares)}, {self.how}"

    def pieces(self, findings: list[Findings] | None = None) -> Halves:
        """Streams all of it, counting in `findings`, one for each source in order, those of `data.eval` last."""
        for group, rule in self.groups:
            yield from rule(_read(group, findings))
        left = self.data.eval_bytes or 2**63
        for piece in _read(self.held, findings):
            if piece.size > left:
                if head := halves(piece.text, left)[0]:
                    yield replace(piece, text=head), True
                break
            left -= piece.size
            yield piece, True


def held_out_share(data: Data, size: int) -> float:
    """The share of a text of so many bytes that is validation, where `data.eval` names no other text."""
    return data.eval_fraction or min(HELD_OUT, HELD_OUT_BYTES / max(size, 1))


class Survey:
    """A look through a group of sources: how many documents there are, what they draw, and their bytes.

    It ends where more of the text would hardly change the rule, unless the bytes held out are limited: then the size of
    all documents must be known.
    """

    def __init__(self, group: list[Source], fraction: float, limit: int | None) -> None:
        self.group, self.fraction, self.limit = group, fraction, limit
        self.few = math.ceil(min(FEW / min(fraction, 1 - fraction), 1e6))
        self.documents = self.size = 0
        self.drawn_bytes = 0  # of documents that draw less than the fraction
        self.first: list[tuple[int, int]] = []  # (draw, bytes) of the first few
        self.lowest = Lowest(limit or 0)
        for drawn, size in _sizes(group):
            self.documents, self.size = self.documents + 1, self.size + size
            self.drawn_bytes += size if drawn < fraction * 2**64 else 0
            self.lowest.add(drawn, size)
            if self.documents <= self.few:
                self.first.append((drawn, size))
            elif not limit and self.size >= KNOWN and _fair(self.drawn_bytes, fraction * self.size):
                break
        if not self.documents:
            raise DataError(f"{listed([source.place for source in group])}: no text")

    def rule(self, total: int) -> tuple[Rule, str]:
        """The rule of the split, and its description; `total` is the bytes of all groups, who share the limit."""
        most = self.limit * self.size // total if self.limit else None
        if self.documents == 1:
            boundary = max(int(self.size * (1 - self.fraction)), self.size - most if most is not None else 0)
            return by_position(boundary, up=bool(self.limit)), "the end of the one document"
        limit, size = int(self.fraction * 2**64), self.drawn_bytes
        if self.documents < self.few:  # chance could leave a side empty
            ranked = sorted({drawn for drawn, _ in self.first})
            limit = (ranked + [2**64])[max(1, min(len(ranked) - 1, round(len(ranked) * self.fraction)))]
            size = sum(size for drawn, size in self.first if drawn < limit)
        wanted = max(int(self.size * self.fraction), 1)
        if most is not None:
            wanted, limit = min(wanted, most), min(limit, self.lowest.within(most))
            size = self.lowest.below(limit)
        if _fair(size, wanted):
            return by_content(limit), "documents chosen by content"
        lowest = Lowest(wanted)
        for drawn, size in _sizes(self.group):
            lowest.add(drawn, size)
        rule = by_content(lowest.limit, lowest.next_bytes - lowest.room // max(lowest.next_copies, 1))
        return rule, "documents chosen by content, the last of them in part"


def _fair(size: float, wanted: float) -> bool:
    """True where so many bytes are about as many as are wanted."""
    return wanted / FAIR <= size <= wanted * FAIR


def _sizes(group: list[Source]) -> Iterator[tuple[int, int]]:
    """Yields for every document what it draws and its bytes."""
    drawn, size, begun = 0, 0, False
    for piece in _read(group, None):
        if piece.first:
            if begun:
                yield drawn, size
            drawn, size, begun = draw(piece.text), 0, True
        size += piece.size
    if begun:
        yield drawn, size


class Lowest:
    """The documents of a stream that draw the lowest numbers and together have at most `most` bytes, and the next."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self.limit = 2**64  # all that draw less are here
        self.next_bytes = self.next_copies = 0  # of the document that draws the limit, of which there may be several
        self.heap: list[tuple[int, int]] = []  # (-draw, bytes)

    @property
    def room(self) -> int:
        """The bytes that are left for a part of the next document."""
        return self.most - self.bytes

    def add(self, drawn: int, size: int) -> None:
        if drawn < self.limit:
            heapq.heappush(self.heap, (-drawn, size))
            self.bytes += size
        self.next_copies += drawn == self.limit
        self.within(self.most)

    def below(self, limit: int) -> int:
        """The bytes of those here that draw less than a limit."""
        return sum(size for negative, size in self.heap if -negative < limit)

    def within(self, most: int) -> int:
        """Lets go of the highest until at most so many bytes are left; returns the draw that all of them are below."""
        while self.bytes > most:
            self.limit, self.next_copies = -self.heap[0][0], 0
            while self.heap and -self.heap[0][0] == self.limit:  # copies go together
                self.next_bytes = heapq.heappop(self.heap)[1]
                self.next_copies += 1
                self.bytes -= self.next_bytes
        return self.limit


def _read(sources: list[Source], findings: list[Findings] | None) -> Iterator[Piece]:
    for source in sources:
        yield from source.pieces(findings[source.number] if findings else Findings(source.place))


def _all_training(pieces: Iterator[Piece]) -> Halves:
    yield from ((piece, False) for piece in pieces)


def by_content(limit: int, boundary: int | None = None) -> Rule:
    """Documents that draw less than `limit` are validation, and of one that draws it what comes after `boundary`."""

    def rule(pieces: Iterator[Piece]) -> Halves:
        drawn = 0
        cut = Cut(boundary or 0, up=True)
        for piece in pieces:
            if piece.first:
                drawn, cut = draw(piece.text), Cut(boundary or 0, up=True)
            if drawn == limit and boundary is not None:
                yield from cut.of(piece)
            else:
                yield piece, drawn < limit

    return rule


def by_position(boundary: int, up: bool) -> Rule:
    """Validation begins after so many bytes, before or after (`up`) the character that is there."""

    def rule(pieces: Iterator[Piece]) -> Halves:
        cut = Cut(boundary, up)
        for piece in pieces:
            yield from cut.of(piece)

    return rule


class Cut:
    """A document that is cut in two: training before so many bytes, validation after."""

    def __init__(self, boundary: int, up: bool) -> None:
        self.boundary, self.up = boundary, up
        self.seen, self.begun = 0, False  # bytes; whether validation has

    def of(self, piece: Piece) -> Halves:
        """Yields the parts of its next piece."""
        inside = self.seen + piece.size <= self.boundary
        head, tail = (piece.text, "") if inside else halves(piece.text, max(self.boundary - self.seen, 0), self.up)
        if head:
            yield replace(piece, text=head) if tail else piece, False
        if tail:
            yield replace(piece, text=tail, first=not self.begun), True
            self.begun = True
        self.seen += piece.size


def halves(text: str, size: int, up: bool = False) -> tuple[str, str]:
    """Cuts after so many bytes of UTF-8, before or after (`up`) the character that is there."""
    raw = text.encode("utf-8")
    if up:
        tail = raw[size:].decode("utf-8", "ignore")
        return text[: len(text) - len(tail)], tail
    head = raw[:size].decode("utf-8", "ignore")
    return head, text[len(head) :]


# -- text on both sides ------------------------------------------------------------------------------------------

LINE = 40  # bytes: what is shorter may stand in many texts
LONG = 500  # characters: lines of this length on average are paragraphs
KEPT = 20_000_000  # bytes of validation text that are looked for
OVERLAP = 0.01  # share of the text that is worth a word


class Overlap:
    """Looks for the lines of `data.eval`, or its sentences, in the training text.

    (A split that is made here has none of them on both sides, but for what documents share.)
    """

    def __init__(self, held_out: list[Source], limit: int | None) -> None:
        """Reads the beginning of the validation text. Raises DataError."""
        self.name = listed([source.place for source in held_out])
        texts, left = [], min(limit or KEPT, KEPT)
        for piece in _read(held_out, None):
            texts.append(piece.text if piece.size <= left else halves(piece.text, left)[0])
            left -= piece.size
            if left <= 0:
                break
        text = "\n".join(texts)
        self.long = len(text) > LONG * (text.count("\n") + 1)
        self.sentences = {one for one in self._parts(text) if len(one.encode("utf-8", "replace")) >= LINE}
        self.seen = set[str]()

    def see(self, text: str) -> None:
        """Looks through training text."""
        if self.sentences:
            self.seen |= self.sentences.intersection(self._parts(text))

    def warnings(self) -> list[str]:
        """Says how much of the validation text was seen, if that is not next to nothing."""
        share = sum(map(len, self.seen)) / max(sum(map(len, self.sentences)), 1)
        if share < OVERLAP:
            return []
        return [
            f"{self.name}: {share:.0%} of this validation text is also trained on: its loss says little of other text"
        ]

    def _parts(self, text: str) -> list[str]:
        """Lines, or sentences where lines are long."""
        return (text.replace(". ", "\n").replace("。", "\n") if self.long else text).split("\n")
