"""Threads that compute side by side, each on what is its own.

Threads that share one operation wait for the slowest of them at its end, by spinning: beside other work that is most of
the time. Threads that each have an operation of their own wait once, at the end of all that was shared out, asleep.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A")
T = TypeVar("T")
WORTH_SHARING = 1 << 17  # elements: to hand over fewer takes longer than to compute them


class Workers:
    """Threads as many as `count`; with one, it is the thread that calls."""

    def __init__(self, count: int = 1, threads: Executor | None = None) -> None:
        self.count, self.threads = count, threads

    def map(self, work: Callable[[A], T], items: Iterable[A]) -> Iterator[T]:
        """`work(item)` for each item, in order, computed side by side; items are taken as threads come free."""
        if not self.threads:
            yield from map(work, items)
            return
        begun: deque[Future[T]] = deque()
        for item in items:
            begun.append(self.threads.submit(work, item))
            if len(begun) == 2 * self.count:  # so that a thread that is slow for a while keeps no other waiting
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def share(self, work: Callable[..., Any], *lists: "list[Tensor]") -> list[Any]:
        """Calls `work`, without gradients, on consecutive parts of lists of equal length; gives what each call gave.

        The parts have about as many elements each, counted in the first list; small lists stay whole. What `work` does
        to a tensor must not depend on the others.
        """
        import torch

        @torch.no_grad()  # holds for a thread
        def part_of(bounds: slice) -> Any:
            return work(*(tensors[bounds] for tensors in lists))

        parts = self._parts([tensor.numel() for tensor in lists[0]])
        return list(self.map(part_of, parts)) if len(parts) > 1 else [part_of(parts[0])]

    def _parts(self, sizes: list[int]) -> list[slice]:
        """Consecutive parts of a list of tensors with so many elements, at most one for each worker."""
        total = sum(sizes)
        if self.count == 1 or total < WORTH_SHARING:
            return [slice(0, len(sizes))]
        starts, before = [0], 0
        for place, size in enumerate(sizes):
            beyond = (before + size / 2) * self.count > total * len(starts)  # of the elements of the parts so far
            if beyond and place > starts[-1] and len(starts) < self.count:
                starts.append(place)
            before += size
        return [slice(*bounds) for bounds in zip(starts, [*starts[1:], len(sizes)], strict=True)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Has torch compute each operation with so many threads while the block runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ONE = Workers()
_opened = threading.local()  # the workers that the thread at hand has, if any


@contextmanager
def side_by_side(count: int) -> Iterator[Workers]:
    """Workers that share the processors among them while the block runs; within it, the same number are the same.

    The threads that torch computes an operation with are divided among them, and the calling thread has as many as
    one of them, since it computes while they wait.
    """
    import torch

    open_already: Workers | None = getattr(_opened, "workers", None)
    if count == 1 or (open_already and open_already.count == count):
        yield open_already if open_already and count > 1 else ONE
        return
    each = max(torch.get_num_threads() // count, 1)

    def begin() -> None:  # both hold for a thread
        torch.set_num_threads(each)
        torch.set_flush_denormal(True)

    with ThreadPoolExecutor(count, "worker", begin) as pool, threads(each):
        _opened.workers = Workers(count, pool)
        try:
            yield _opened.workers
        finally:
            _opened.workers = open_already
