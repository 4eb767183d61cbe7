"""Batches: order, shuffling and packing are pure functions of (seed, epoch, index), so the state is two integers.

Each epoch, long documents are cut into pieces of the context length at an offset of that epoch's own; short pieces are
packed into rows by best fit; the rows are shuffled. Every token is predicted exactly once an epoch, or, where sources
have weights, as often as these say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gptworks.core.errors import DataError, RunMismatch
from gptworks.core.runtime import mix
from gptworks.data.batch import Batch, Batches, Cursor
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer

MOST_PASSES = 1000  # over a source in one epoch
LOOK = 200  # characters of a row that are shown


@dataclass(frozen=True)
class Plan:
    """An epoch's rows: row i holds the pieces `starts/lengths[offsets[i]:offsets[i+1]]` of the stream."""

    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    cut_documents: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


def best_fit(lengths: list[int], capacity: int) -> tuple[np.ndarray, int]:
    """Packs items, longest first, each into the fullest row it fits; returns each item's row and the row count.

    Rows are kept by the room they have left, and a bit set tells the smallest sufficient room at once.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = opened = 0
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[item]
        fits = rooms >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, opened = capacity, opened, opened + 1
        rows[item] = row
        if left := room - length:
            by_room[left].append(row)
            rooms |= 1 << left
    return rows, opened


def extent(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """The start of every document and its number of inputs: the stream's last token has nothing to predict."""
    bounds = np.append(stream.documents, len(stream.tokens))
    begins, sizes = bounds[:-1], np.diff(bounds)
    sizes[-1] -= 1
    return begins[sizes > 0], sizes[sizes > 0]


def cut(begins: np.ndarray, sizes: np.ndarray, context: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces: a document longer than a row is cut; where, is drawn for each."""
    first = np.where(sizes > context, rng.integers(1, context + 1, len(sizes)), sizes)
    later = -(-(sizes - first) // context)
    pieces = 1 + later
    document = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = np.where(number == 0, 0, first[document] + (number - 1) * context)
    starts = begins[document] + offset
    return starts, np.where(number == 0, first[document], np.minimum(sizes[document] - offset, context))


class Mixture:
    """Shares the epochs among weighted sources. An epoch has as many inputs as the split.

    The passes over a source lie end to end: pass j cuts its documents and orders the pieces by a generator of its own.
    Source i's part of epochs 0 to e - 1 is the first floor(e * share_i * inputs) of that line, a piece belonging where
    it begins; so an epoch goes on where the last one ended, and no token comes a second time before all of its source
    came once.
    """

    def __init__(self, stream: Stream, context: int, seed: int, weights: Sequence[float]) -> None:
        """Raises RunMismatch where the shards have other sources, DataError where one is too small for its weight."""
        if len(weights) != len(stream.sources):
            raise RunMismatch(f"the shards hold {len(stream.sources)} sources and data.train weights {len(weights)}")
        self.context, self.seed = context, seed
        exact = [Fraction(repr(weight)) for weight in weights]  # as written: 0.1 is a tenth
        self.shares = [weight / sum(exact) for weight in exact]
        begins, sizes = extent(stream)
        self.inputs = int(sizes.sum())
        bounds = np.searchsorted(begins, source_starts(stream))
        self.documents = [(begins[a:b], sizes[a:b]) for a, b in pairwise(bounds.tolist())]
        self.sizes = [int(sizes.sum()) for _, sizes in self.documents]
        for part, size, share in zip(stream.sources, self.sizes, self.shares, strict=True):
            if share * self.inputs > MOST_PASSES * size:
                raise DataError(
                    f"{part.path}: {size:,} tokens are too few for {float(share):.2%} of the training tokens: they "
                    f"would come more than {MOST_PASSES:,} times an epoch; lower its weight or give it more text"
                )

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of an epoch's pieces, source by source."""
        parts = [self._between(i, self._line(i, number), self._line(i, number + 1)) for i in range(len(self.sizes))]
        starts, lengths = zip(*(part for parts_of in parts for part in parts_of), strict=True)
        return np.concatenate(starts), np.concatenate(lengths)

    def consumed(self, epochs: int) -> np.ndarray:
        """Inputs of each source in so many epochs from the beginning."""
        return np.array([self._before(i, self._line(i, epochs)) for i in range(len(self.sizes))])

    def _line(self, source: int, epoch: int) -> int:
        """The place on a source's line of passes where its part of an epoch begins."""
        return epoch * self.shares[source] * self.inputs // 1

    def _pass(self, source: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, lengths and places in the pass of its pieces, in order."""
        rng = np.random.default_rng(mix(self.seed, number, source + 1))
        starts, lengths = cut(*self.documents[source], self.context, rng)
        order = rng.permutation(len(starts))
        starts, lengths = starts[order], lengths[order]
        return starts, lengths, np.cumsum(lengths) - lengths

    def _between(self, source: int, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = self.sizes[source]
        for number in range(begin // size, -(-end // size)):
            starts, lengths, places = self._pass(source, number)
            chosen = slice(*np.searchsorted(places, (begin - number * size, end - number * size)).tolist())
            yield starts[chosen], lengths[chosen]

    def _before(self, source: int, place: int) -> int:
        """Inputs of the pieces that begin before a place on the source's line."""
        number, rest = divmod(place, self.sizes[source])
        if not rest:
            return place
        _, lengths, places = self._pass(source, number)
        return place - rest + int(lengths[: np.searchsorted(places, rest)].sum())


def source_starts(stream: Stream) -> np.ndarray:
    """The first token of each source, and the end of the last."""
    return np.cumsum([0, *(part.tokens for part in stream.sources)])


def plan_epoch(stream: Stream, context: int, seed: int, epoch: int, mixture: Mixture | None = None) -> Plan:
    """The rows of one epoch."""
    rng = np.random.default_rng(mix(seed, epoch))
    begins, sizes = extent(stream)
    starts, lengths = mixture.epoch(epoch) if mixture else cut(begins, sizes, context=context, rng=rng)
    shuffle = rng.permutation(len(starts))
    starts, lengths = starts[shuffle], lengths[shuffle]
    short = np.flatnonzero(lengths < context)
    row = np.empty(len(starts), dtype=np.int64)
    packed, count = best_fit(lengths[short].tolist(), context)
    row[short] = packed
    row[lengths == context] = np.arange(count, count + len(starts) - len(short))
    total = count + len(starts) - len(short)

    row = rng.permutation(total)[row]
    order = np.argsort(row, kind="stable")
    offsets = np.append(0, np.cumsum(np.bincount(row, minlength=total)))
    long = begins[sizes > context]
    return Plan(
        starts[order],
        lengths[order],
        offsets=offsets,
        cut_documents=int(np.isin(starts, long).sum()) if mixture else len(long),
    )


class Loader(Batches):
    """Batches of `batch_rows` rows (None: a whole epoch) of a split's documents.

    Of several processes each gets its share of the rows of every batch, in the order of their ranks.
    """

    def __init__(
        self,
        stream: Stream,
        context: int,
        batch_rows: int | None,
        seed: int,
        max_epochs: int | None = None,
        mask_documents: bool = False,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`weights`: one for each of the stream's sources. Raises RunMismatch and DataError."""
        self.stream, self.context, self.batch_rows = stream, context, batch_rows
        self.seed, self.max_epochs, self.mask_documents = seed, max_epochs, mask_documents
        self.rank, self.world = rank, world
        self.mixture = Mixture(stream, context, seed=seed, weights=weights) if weights else None
        self.plan = lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(stream, context, seed=seed, epoch=epoch, mixture=self.mixture)
        )

    def take(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """Our share of the batch at `cursor`, and the cursor after the whole batch; the last one may be short."""
        wanted = self.batch_rows or len(self.plan(cursor.epoch))
        rows: list[tuple[Plan, int]] = []
        epoch, row = cursor.epoch, cursor.row
        while len(rows) < wanted:
            plan = self.plan(epoch)
            more = range(row, min(row + wanted - len(rows), len(plan)))
            rows += [(plan, index) for index in more]
            row += len(more)
            if row >= len(plan):
                epoch, row = epoch + 1, 0
                if epoch == self.max_epochs:  # a run that was made longer goes on beyond it
                    break
        share = -(-wanted // self.world)
        first = self.rank * share
        batch = self._batch(rows[first : first + share])
        return replace(batch, first=first, share=share), Cursor(epoch, row)

    @cached_property
    def epoch_rows(self) -> int:
        return len(self.plan(0))

    def rows_in(self, epochs: float) -> int:
        whole = int(epochs)
        rows = sum(len(self.plan(epoch)) for epoch in range(whole))
        return rows + (round((epochs - whole) * len(self.plan(whole))) if epochs > whole else 0)

    @property
    def fill(self) -> float:
        """The share of the places in the rows of the first epoch that have a target."""
        plan = self.plan(0)
        return int(plan.lengths.sum()) / max(len(plan) * self.context, 1)

    def report(self) -> str:
        """One line on how the first epoch was packed."""
        plan, padding = self.plan(0), 1 - self.fill
        cut = plan.cut_documents
        what = "1 document longer than a row was" if cut == 1 else f"{cut:,} documents longer than a row were"
        return f"{len(plan):,} rows of {self.context}, {padding:.2%} padding, {what} cut, no token dropped"

    def sources(self, cursor: Cursor) -> list[dict[str, Any]]:
        """Counts exactly what each source gave to the rows before `cursor`: path, asked and achieved share of the
        inputs, inputs, and passes over the source. The time it takes does not depend on the number of epochs."""
        parts, starts = self.stream.sources, source_starts(self.stream)
        sizes = np.diff(np.minimum(starts, len(self.stream.tokens) - 1))  # the last token is no input
        inputs = self.mixture.consumed(cursor.epoch) if self.mixture else sizes * cursor.epoch
        if cursor.row and parts:
            plan = self.plan(cursor.epoch)
            begun = slice(plan.offsets[cursor.row])
            source = np.searchsorted(starts, plan.starts[begun], side="right") - 1
            inputs = inputs + np.bincount(source, plan.lengths[begun], len(parts)).astype(np.int64)
        asked = self.mixture.shares if self.mixture else sizes / max(sizes.sum(), 1)
        return [
            {
                "path": part.path,
                "asked": float(share),
                "achieved": int(used) / max(int(inputs.sum()), 1),
                "inputs": int(used),
                "passes": int(used) / max(int(size), 1),
            }
            for part, share, used, size in zip(parts, asked, inputs, sizes, strict=True)
        ]

    def mixture_report(self) -> list[str]:
        """Lines for a person: the first epoch's share of each weighted source."""
        if not self.mixture:
            return []
        rows = self.sources(Cursor(1, 0))
        width = max(len(row["path"]) for row in rows)
        return [
            f"{row['path']:<{width}}  asked {row['asked']:7.2%}, achieved {row['achieved']:7.2%}, "
            f"{row['passes']:.2f} passes an epoch"
            for row in rows
        ]

    def look(self, tokenizer: Tokenizer) -> str:
        """The beginning of the first row, decoded, as a person can read it: ` ‖ ` where another piece begins."""
        plan, shown = self.plan(0), list[str]()
        for piece in range(plan.offsets[0], plan.offsets[1]):
            start = int(plan.starts[piece])
            ids = self.stream.tokens[start : start + min(int(plan.lengths[piece]), 4 * LOOK)]
            shown.append(tokenizer.decode(ids, skip_control=True)[:LOOK])
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ‖ ".join(shown)[:LOOK])
        return f"row 1 begins: {text}"

    def _batch(self, rows: list[tuple[Plan, int]]) -> Batch:
        size, context = len(rows), self.context
        tokens = np.zeros((size, context), dtype=np.int64)
        targets = np.zeros((size, context), dtype=np.int64)
        weights = np.zeros((size, context), dtype=np.float32)
        segments = np.zeros((size, context), dtype=np.int32)
        for i, (plan, row) in enumerate(rows):
            place = 0
            pieces = range(plan.offsets[row], plan.offsets[row + 1])
            for number, piece in enumerate(pieces):
                start, length = plan.starts[piece], plan.lengths[piece]
                text = self.stream.tokens[start : start + length + 1]
                tokens[i, place : place + length] = text[:-1]
                targets[i, place : place + length] = text[1:]
                weights[i, place : place + length] = 1.0
                segments[i, place : place + length] = number
                place += length
            segments[i, place:] = len(pieces)  # padding attends only to itself
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            weights=torch.from_numpy(weights),
            segments=torch.from_numpy(segments) if self.mask_documents else None,
        )


def blocks(stream: Stream, context: int, stride: int | None = None) -> Iterator[Batch]:
    """Rows for evaluation, in order: every token of the stream after the first is a target exactly once.

    Without `stride`, non-overlapping blocks of `context`. With it, windows that advance by `stride`, in which only
    the targets not yet predicted count, so that all but the first have at least `context - stride` tokens before them.
    """
    stride = stride or context
    last = len(stream.tokens) - 1
    predicted = start = 0
    while predicted < last:
        end = min(start + context, last)
        text = stream.tokens[start : end + 1].astype(np.int64)
        tokens, targets = np.zeros((1, context), dtype=np.int64), np.zeros((1, context), dtype=np.int64)
        weights = np.zeros((1, context), dtype=np.float32)
        tokens[0, : end - start], targets[0, : end - start] = text[:-1], text[1:]
        weights[0, predicted - start : end - start] = 1.0
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(weights))
        predicted, start = end, start + stride
