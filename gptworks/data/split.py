"""Which text is validation. Decided once for each source of a mixture, or for all of the text together.

One document is split by position; several are by content, so that copies of a document fall on the same side.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from gptworks.core.config import Data
from gptworks.core.errors import DataError
from gptworks.data.findings import Findings, Piece
from gptworks.data.sources import Source, draw, listed

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
            rules: list[tuple[Rule, str]] = [(_all_training, f"{data.eval}{first}") for _ in groups]
        else:
            size = sum(source.size for source in sources)
            fraction = data.eval_fraction or min(HELD_OUT, HELD_OUT_BYTES / max(size, 1))
            surveys = [Survey(group, fraction, data.eval_bytes) for group in groups]
            total = sum(survey.size for survey in surveys)
            rules = [survey.rule(total) for survey in surveys]
        self.groups = [(group, rule) for group, (rule, _) in zip(groups, rules, strict=True)]
        self.how = "validation: " + " and ".join(dict.fromkeys(self._said(groups, [how for _, how in rules])))
        self.how += ", of each source by itself" if len(groups) > 1 and not held_out else ""

    @staticmethod
    def _said(groups: list[list[Source]], rules: list[str]) -> list[str]:
        """The rules in words, each with the name of its source where they differ."""
        if len(set(rules)) == 1:
            return rules
        return [f"{rule} ({group[0].place.rpartition('/')[2]})" for group, rule in zip(groups, rules, strict=True)]

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


class Survey:
    """A look through a group of sources: how many documents there are, and what they draw.

    It ends as soon as the number makes no difference any more, unless the bytes held out are limited: then the size
    of the text must be known, and every document's.
    """

    def __init__(self, group: list[Source], fraction: float, limit: int | None) -> None:
        self.fraction, self.limit = fraction, limit
        self.few = math.ceil(min(FEW / min(fraction, 1 - fraction), 1e6))
        self.documents = self.size = 0
        self.draws: list[int] = []  # of the first few
        self.lowest = Lowest(limit or 0)
        if len(group) == 1 and group[0].one_plain_text and group[0].size and not limit:
            self.documents, self.size = 1, group[0].size
        else:
            self._read(group)
        if not self.documents:
            raise DataError(f"{listed([source.place for source in group])}: no text")

    def rule(self, total: int) -> tuple[Rule, str]:
        """The rule of the split, and its description; `total` is the bytes of all groups, who share the limit."""
        most = self.limit * self.size // total if self.limit else None
        bound = f", at most {self.limit:,} bytes" if self.limit else ""
        if self.documents == 1:
            boundary = max(int(self.size * (1 - self.fraction)), self.size - most if most is not None else 0)
            share = 1 - boundary / self.size if self.limit else self.fraction
            return by_position(boundary, up=bool(self.limit)), f"the last {share:.2%} of the one document"
        limit = int(self.fraction * 2**64)
        if self.documents < self.few:  # chance could leave a side empty
            ranked = sorted(set(self.draws))
            limit = (ranked + [2**64])[max(1, min(len(ranked) - 1, round(len(ranked) * self.fraction)))]
        if most is not None:
            limit = min(limit, self.lowest.within(most))
        return by_content(limit), f"{self.fraction:.2%} of the documents, chosen by content{bound}"

    def _read(self, group: list[Source]) -> None:
        drawn = begun = 0  # what the document draws that is being read; where it begins
        for piece in _read(group, None):
            if piece.first:
                if self.documents:
                    self.lowest.add(drawn, self.size - begun)
                drawn, begun = draw(piece.text), self.size
                self.documents += 1
                if self.documents <= self.few:
                    self.draws.append(drawn)
                elif not self.limit:
                    return
            self.size += piece.size
        self.lowest.add(drawn, self.size - begun)


class Lowest:
    """The documents of a stream that draw the lowest numbers and together have at most `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self.limit = 2**64  # all that draw less are here
        self.heap: list[tuple[int, int]] = []  # (-draw, bytes)

    def add(self, drawn: int, size: int) -> None:
        if drawn < self.limit:
            heapq.heappush(self.heap, (-drawn, size))
            self.bytes += size
        self.within(self.most)

    def within(self, most: int) -> int:
        """Lets go of the highest until at most so many bytes are left; returns the draw that all of them are below."""
        while self.bytes > most:
            self.limit = -self.heap[0][0]
            while self.heap and -self.heap[0][0] == self.limit:  # copies go together
                self.bytes -= heapq.heappop(self.heap)[1]
        return self.limit


def _read(sources: list[Source], findings: list[Findings] | None) -> Iterator[Piece]:
    for source in sources:
        yield from source.pieces(findings[source.number] if findings else Findings(source.place))


def _all_training(pieces: Iterator[Piece]) -> Halves:
    yield from ((piece, False) for piece in pieces)


def by_content(limit: int) -> Rule:
    """Documents that draw less than `limit` are validation."""

    def rule(pieces: Iterator[Piece]) -> Halves:
        validation = False
        for piece in pieces:
            if piece.first:
                validation = draw(piece.text) < limit
            yield piece, validation

    return rule


def by_position(boundary: int, up: bool) -> Rule:
    """Validation begins after so many bytes, before or after (`up`) the character that is there."""

    def rule(pieces: Iterator[Piece]) -> Halves:
        seen, begun = 0, False  # bytes; whether validation has
        for piece in pieces:
            inside = seen + piece.size <= boundary
            head, tail = (piece.text, "") if inside else halves(piece.text, max(boundary - seen, 0), up)
            if head:
                yield replace(piece, text=head) if tail else piece, False
            if tail:
                yield replace(piece, text=tail, first=not begun), True
                begun = True
            seen += piece.size

    return rule


def halves(text: str, size: int, up: bool = False) -> tuple[str, str]:
    """Cuts after so many bytes of UTF-8, before or after (`up`) the character that is there."""
    raw = text.encode("utf-8")
    if up:
        tail = raw[size:].decode("utf-8", "ignore")
        return text[: len(text) - len(tail)], tail
    head = raw[:size].decode("utf-8", "ignore")
    return head, text[len(head) :]
