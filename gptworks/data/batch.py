"""Batches: rows of tokens with their targets, and the cursor that says which rows come next."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gptworks.core.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: B rows of T places.

    tokens [B, T] int64; targets [B, T] int64, the next token; weights [B, T] float32, 0 where there is no target;
    segments [B, T] int32, which numbers the pieces of documents in a row, or None where attention is not masked.
    `extra` holds what else an objective needs, as tensors with B rows. `first` is the number of the first row within
    its step. `share` is the number of rows that each process has in a whole step. `unit` is the number of rows that
    belong together, such as the two answers of a preference: they are never divided between micro-batches or
    processes.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    segments: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0
    share: int = 0
    unit: int = 1

    @property
    def tokens_seen(self) -> int:
        """The number of places with a target. A run counts these as tokens, whatever the loss is divided by."""
        return int(torch.count_nonzero(self.weights))

    def to(self, device: torch.device) -> "Batch":
        """Copies the rows to a device."""
        if device.type == "cpu":
            return self
        pin = device.type == "cuda"  # a pinned copy does not wait for the transfer
        return self._each(lambda tensor: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True))

    def cut(self, start: int, stop: int) -> "Batch":
        """The rows from `start` up to, but not including, `stop`; fewer where the batch ends before."""
        return replace(self._each(lambda tensor: tensor[start:stop]), first=self.first + start)

    def share_of(self, rank: int, size: int) -> "Batch":
        """The rows of a step that one of `size` processes takes; all take as many, except the last."""
        share = -(-len(self.tokens) // (size * self.unit)) * self.unit
        return replace(self.cut(rank * share, (rank + 1) * share), first=rank * share, share=share)

    def rows(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of at most `size` rows, in order."""
        for start in range(0, len(self.tokens), size):
            yield self.cut(start, start + size)

    def _each(self, change: Any) -> "Batch":
        """The batch with `change` applied to every tensor."""
        return replace(
            self,
            tokens=change(self.tokens),
            targets=change(self.targets),
            weights=change(self.weights),
            segments=None if self.segments is None else change(self.segments),
            extra={name: change(tensor) for name, tensor in self.extra.items()},
        )


@dataclass(frozen=True)
class Cursor:
    """The position in the data: the next row of an epoch."""

    epoch: int = 0
    row: int = 0

    def __post_init__(self) -> None:
        for name in ("epoch", "row"):  # numpy's integers too, which no checkpoint could keep
            object.__setattr__(self, name, operator.index(getattr(self, name)))


class Batches(ABC):
    """A source of batches that keeps no state: the cursor alone decides which batch comes next.

    `ahead` says whether a batch may be prepared while the step before it still computes. Batches that depend on the
    weights, such as text that the model itself writes, may not.
    """

    ahead = True

    @abstractmethod
    def take(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """This process's share of the batch at `cursor`, and the cursor after the whole batch."""

    @property
    def epoch_rows(self) -> int | None:
        """The number of rows in the first epoch; None where the data has no end."""
        return None

    @property
    def fill(self) -> float:
        """The share of the places in the rows that have a target, by which `train.max_tokens` becomes steps."""
        return 1.0

    def rows_in(self, epochs: float) -> int:
        """The number of rows in the first `epochs` epochs. Raises UsageError where the data has no end."""
        if self.epoch_rows is None:
            raise UsageError("this data has no epochs to count: give train.max_steps")
        return round(epochs * self.epoch_rows)

    def epochs(self, cursor: Cursor) -> float:
        """The number of epochs before `cursor`. An unfinished epoch counts as a fraction of the rows of the first."""
        return cursor.epoch + (cursor.row / self.epoch_rows if self.epoch_rows else 0.0)

    def sources(self, cursor: Cursor) -> list[dict[str, Any]]:
        """Counts what each source of text gave to the rows before `cursor`, for result.json."""
        return []
