"""The processes of one run: who we are among them, and what they do together.

torchrun starts the processes and says who is who (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). On one
process everything here is a plain no-op. Nothing here knows of models.

A process that dies breaks the connections of the others, which then stop with PeerLost; one that hangs is noticed by
the watchdog of each other: it has every process on this machine write its stacks and ends them all with exit code 79.
"""

import contextlib
import faulthandler
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from gptworks.core.errors import PeerLost, Preempted, UsageError
from gptworks.core.runtime import interrupts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
POLL = 0.2  # seconds between looks at the clock, the parent and the store


class Ranks:
    """This process among all of a run. `world` is 1 and `rank` 0 without torchrun."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.started = False
        self._device: Any = None
        self._store: Any = None
        self._watchdog: Watchdog | None = None

    @property
    def main(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    @property
    def data(self) -> "Group":
        """The processes among which the rows are shared out: today all of them."""
        return Group(self.rank, self.world)

    # -- before there is a group: one prepares, the others wait ------------------------------------------------------

    def _rendezvous(self) -> Any:
        if self._store is None:
            import torch.distributed as dist

            try:
                self._store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
            except (RuntimeError, ValueError, OSError) as error:
                where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
                raise PeerLost(
                    f"cannot meet the other processes at {where}: {' '.join(str(error).split())[:200]}; "
                    "check MASTER_ADDR and MASTER_PORT, or start with torchrun"
                ) from None
        return self._store

    @property
    def reachable(self) -> bool:
        """True where the meeting place is sure to be there: a launcher hosts it, or this process was there before."""
        return self._store is not None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def tell(self, name: str, text: str) -> None:
        """The main process leaves a text for the others."""
        if self.world > 1:
            self._rendezvous().set(name, text)

    def hear(self, name: str) -> str:
        """Waits, for as long as it takes, for what the main process tells; a signal ends the wait."""
        store = self._rendezvous()
        parent = os.getppid()
        while not self._checked(store, name):
            interrupts.check()
            if os.getppid() != parent:
                raise PeerLost("the process that started this one is gone")
            time.sleep(POLL)
        return store.get(name).decode("utf-8")

    @staticmethod
    def _checked(store: Any, name: str) -> bool:
        try:
            return bool(store.check([name]))
        except RuntimeError:
            raise PeerLost("the meeting place of the processes is gone; its own error is above") from None

    # -- the group -----------------------------------------------------------------------------------------------

    def start(self, device: "torch.device", timeout: float) -> None:
        """Forms the group, NCCL on GPUs and gloo elsewhere, and watches it. Raises PeerLost."""
        if self.world == 1 or self.started:
            return
        import torch.distributed as dist

        # All are waited for here, where a signal is heard: forming the group would block deaf to it.
        self._rendezvous().set(f"here {self.rank}", "")
        for rank in range(self.world):
            self.hear(f"here {rank}")
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1") and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the group has no password: stay on this machine
        with _peers(), _heard():
            interrupts.check()  # a signal that came just before
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._rendezvous()),
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=timeout + 60),  # the watchdog comes first
            )
        self.started, self._device = True, device
        here = [pid for host, pid in self.gather((socket.gethostname(), os.getpid())) if host == socket.gethostname()]
        self._watchdog = Watchdog(timeout, here)
        self._watchdog.start()

    def end(self) -> None:
        """Leaves the group. Where others may still be at work, call `say_goodbye` first."""
        if self.started:
            import torch.distributed as dist

            if self._watchdog:
                self._watchdog.done.set()
            self.started = False
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def say_goodbye(self, seconds: float = 10.0) -> None:
        """Says good-bye: the main process, which may host the meeting place, leaves last."""
        if self.world == 1:
            return
        with contextlib.suppress(RuntimeError, PeerLost):
            store, end = self._rendezvous(), time.monotonic() + seconds
            store.set(f"left {self.rank}", "")
            names = [f"left {rank}" for rank in range(self.world)] if self.main else []
            while names and not store.check(names) and time.monotonic() < end:
                time.sleep(POLL / 4)

    def beat(self) -> None:
        """Tells the watchdog that there is progress."""
        if self._watchdog:
            self._watchdog.last = time.monotonic()

    # -- together ------------------------------------------------------------------------------------------------

    def total(self, *values: float) -> list[float]:
        """Sums of a few numbers over all processes, in float64."""
        if not self.started:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        with _peers():
            dist.all_reduce(sums)
            return sums.tolist()

    def add(self, tensors: "list[Tensor]") -> None:
        """Replaces each tensor by its sum over all processes."""
        if not self.started or not tensors:
            return
        import torch
        import torch.distributed as dist

        flat = torch._utils._flatten_dense_tensors(tensors)
        with _peers():
            dist.all_reduce(flat)
        _unpack(flat, tensors)

    def add_pairwise(self, tensors: "list[Tensor]") -> None:
        """Like `add`, but in a fixed order: neighbours first, then pairs of pairs (a + b and b + a have the same
        bits)."""
        if not self.started:
            return
        import torch
        import torch.distributed as dist

        flat = torch._utils._flatten_dense_tensors(tensors)
        other, distance = torch.empty_like(flat), 1
        while distance < self.world:
            peer = self.rank ^ distance
            with _peers():
                # As one group: NCCL may not send and receive one after the other on both sides.
                both = [dist.P2POp(dist.isend, flat, peer), dist.P2POp(dist.irecv, other, peer)]
                for work in dist.batch_isend_irecv(both):
                    work.wait()
            flat = flat + other
            distance *= 2
        _unpack(flat, tensors)

    def gather(self, value: T) -> list[T]:
        """Collects the plain Python value of every process, in the order of their ranks."""
        if not self.started:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """Gives every process the value that the main one has."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Waits for all, however long the main process takes."""
        if self._watchdog:
            self._watchdog.last = math.inf
        self.total(0.0)
        self.beat()

    def map_split(self, work: "Callable[[Tensor], Tensor]", batch: "Tensor") -> "Tensor":
        """`work(batch)`, where each process does its part of the first axis; `work` keeps the shape."""
        if not self.started:
            return work(batch)
        import torch
        import torch.distributed as dist

        size = -(-len(batch) // self.world)
        mine = batch[self.rank * size : (self.rank + 1) * size]
        done = torch.zeros(size, *batch.shape[1:], dtype=batch.dtype, device=batch.device)
        if len(mine):
            done[: len(mine)] = work(mine)
        parts = [torch.empty_like(done) for _ in range(self.world)]
        with _peers():
            dist.all_gather(parts, done)
        return torch.cat(parts)[: len(batch)]


def _unpack(flat: "Tensor", tensors: "list[Tensor]") -> None:
    import torch

    for tensor, part in zip(tensors, torch._utils._unflatten_dense_tensors(flat, tensors), strict=True):
        tensor.copy_(part)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """An error of a collective is another process's end."""
    try:
        yield
    except RuntimeError as error:
        cause = re.sub(r"\[/.*?\]", "", " ".join(str(error).split())).strip().split(". ")[0][:120]
        raise PeerLost(
            f"another process of this run ended ({cause}); its own message, if it could leave one, is above. "
            "Run the same command to continue"
        ) from error


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Forming a group blocks deaf to Python's signal handlers; while the block runs, a signal ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)

    def listen() -> None:
        if os.read(ear, 1):  # the number of a signal; nothing once the block is over
            print(f"error: rank {ranks.rank}: stopped while the group was formed; run the same command to continue",
                  file=sys.stderr, flush=True)  # fmt: skip
            os._exit(Preempted.code)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(mouth)


@dataclass(frozen=True)
class Group:
    """The processes that share out the rows of a run among them: each works on its own, sums are over all.

    By default one process alone.
    """

    rank: int = 0
    size: int = 1

    def total(self, *values: float) -> list[float]:
        """Sums of a few numbers over all, in float64."""
        return ranks.total(*values) if self.size > 1 else list(values)

    def gather(self, value: T) -> list[T]:
        """The plain Python value that each has, in the order of their ranks."""
        return ranks.gather(value) if self.size > 1 else [value]

    def beat(self) -> None:
        """Tells the watchdog that there is progress."""
        ranks.beat()


ALONE = Group()


class Watchdog(threading.Thread):
    """Ends this process, and the others on this machine, where nothing moves for `timeout` seconds."""

    def __init__(self, timeout: float, pids: list[int]) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.timeout, self.pids = timeout, pids
        self.parent, self.last = os.getppid(), time.monotonic()
        self.done = threading.Event()
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # a peer may ask for our stacks

    def run(self) -> None:
        while not self.done.wait(POLL):
            if os.getppid() != self.parent:
                self._exit("the process that started this one is gone; leaving too", stacks=False)
            if time.monotonic() - self.last > self.timeout:
                self._exit(f"no progress for {self.timeout:g} s (train.timeout_s); a process of this run hangs")

    def _exit(self, why: str, stacks: bool = True) -> None:
        rank = os.environ.get("RANK", "0")
        print(f"error: rank {rank}: {why}", file=sys.stderr, flush=True)
        if stacks:
            print(
                f"stacks of every process of this run on this machine, rank {rank} first:", file=sys.stderr, flush=True
            )
            faulthandler.dump_traceback(all_threads=True)
            others = [pid for pid in self.pids if pid != os.getpid()]
            for number in (signal.SIGUSR1, signal.SIGCONT):  # a stopped process writes once it goes on
                for pid in others:
                    with contextlib.suppress(OSError):
                        os.kill(pid, number)
            time.sleep(1.0)
            _kill_later(others)
        os._exit(PeerLost.code)


KILL_LATER = """
import os, sys, time
time.sleep(2)
for pid in map(int, sys.argv[1:]):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
"""


def _kill_later(pids: list[int]) -> None:
    """Kills processes once this one is gone, so that a launcher sees its exit code first and not that of a kill."""
    line = [sys.executable, "-I", "-S", "-c", KILL_LATER, *map(str, pids)]
    nowhere = subprocess.DEVNULL
    subprocess.Popen(line, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


ranks = Ranks()


def check(reduce: str) -> None:
    """Raises UsageError where this number of processes cannot do what is asked."""
    if reduce == "canonical" and ranks.world & (ranks.world - 1):
        raise UsageError(f"train.reduce=canonical adds up in pairs: start 1, 2, 4, 8, ... processes, not {ranks.world}")
