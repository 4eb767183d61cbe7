"""Tensors from safetensors files and into them. Names and shapes come from the header alone, so that whoever reads
compares them with what is expected before anything is allocated: a file that claims more than it should costs nothing.

Values then pass once: read or written in pieces, and meanwhile hashed and looked at, outside Python's lock.
"""

import hashlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptworks.core.errors import DataError, NotFinite, StorageError
from gptworks.core.failpoint import failpoint

ENTRY_BYTES = 1024  # of a header, for each tensor; its name, type, shape and place take about a tenth of that
METADATA_BYTES = 2**20
POINTER = b"version https://git-lfs"  # how a file begins that Git has in the place of a large one
PIECE = 2**20  # bytes that are read, hashed and converted at a time
FLUSH = 2**26  # bytes after which the disk is told to begin
AHEAD = 4  # pieces that reading may be ahead of hashing
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
FLOATING = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


# -- reading -----------------------------------------------------------------------------------------------------


def read_shapes(file: Path, expected: int) -> dict[str, torch.Size]:
    """The shape of every tensor in a file of `expected` tensors or fewer. Raises DataError."""
    with _opened(file, METADATA_BYTES + ENTRY_BYTES * expected) as opened:
        return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file whose shapes were found good, as it is stored. Raises as `stream` does."""
    return dict(stream(file))


def stream(
    file: Path, dtype: torch.dtype | None = None, hashes: dict[str, str] | None = None, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a file one by one, each in its own memory, in the order of the file, as stored or in
    `dtype`. The file's SHA-256 comes into `hashes` under its name in the end. Tensors whose names end as in `skip` may
    hold anything.

    Raises DataError for a tensor that does not hold finite floating-point numbers, at the latest in the end.
    """
    with _opened(file):  # its header is sound
        pass
    digest = hashlib.sha256()
    spare = cycle(torch.empty(AHEAD + 1, PIECE, dtype=torch.uint8))  # where what is to be converted is read to

    def look(name: str, part: Tensor, content: Any) -> None:
        if hashes is not None:
            digest.update(content)
        if not _finite(part):
            raise _unusable(file, name)

    def tensor(name: str, entry: dict[str, Any]) -> Tensor:
        if (stored := FLOATING.get(entry["dtype"])) is None:
            raise DataError(f"{file}: {name[:200]} holds {entry['dtype']}, no floating-point numbers")
        room = _room(entry["shape"], dtype or stored)
        begin, end = entry["data_offsets"]
        if end - begin != room.numel() * stored.itemsize or front + begin != raw.tell():
            raise ValueError(f"{name[:200]} is not where the one before it ends")
        for part in room.view(-1).split(PIECE // stored.itemsize):
            values = part if part.dtype == stored else next(spare).view(stored)[: len(part)]
            content = values.view(torch.uint8).numpy()
            _fill(raw, content)
            if values is not part:
                part.copy_(values)
            behind.do(look, name, part, content)
        return room

    def pass_over(name: str, entry: dict[str, Any]) -> None:
        begin, end = entry["data_offsets"]
        if front + begin != raw.tell():
            raise ValueError(f"{name[:200]} is not where the one before it ends")
        while begin < end:
            content = bytearray(min(PIECE, end - begin))
            _fill(raw, content)
            behind.do(digest.update, content)
            begin += len(content)

    with _reading(file), open(file, "rb", buffering=0) as raw, _Behind(AHEAD) as behind:
        size = raw.read(8)
        head = raw.read(int.from_bytes(size, "little"))
        front = len(size) + len(head)
        digest.update(size + head)
        entries = {name: entry for name, entry in json.loads(head).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if name.endswith(skip):
                pass_over(name, entry)
            else:
                yield name, tensor(name, entry)
        behind.catch_up()
    if hashes is not None:
        hashes[file.name] = digest.hexdigest()


def mapped(file: Path, dtype: torch.dtype | None = None, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Like `stream`, but tensors that are not converted stay in the file, and memory holds what of it is in use.

    Where a tensor begins in memory then follows from the file, and sums may differ in the last bits from those of a
    copy. Writing to one does not change the file.
    """
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            if name.endswith(skip):
                continue
            value = opened.get_tensor(name)
            if value.dtype not in FLOATING.values() or not all(map(_finite, value.reshape(-1).split(PIECE))):
                raise _unusable(file, name)
            yield name, value.to(dtype or value.dtype)


def _room(shape: list[int], dtype: torch.dtype) -> Tensor:
    """An unset tensor. A large one is mapped by itself: the allocator would keep its place when a tensor that was read
    to be transposed goes again, and fill it with smaller ones."""
    size = math.prod(shape) * dtype.itemsize
    if size < PIECE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)


@contextmanager
def _opened(file: Path, most: int | None = None) -> Iterator[Any]:
    with _reading(file):
        with open(file, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if most is not None and header > most:
            raise ValueError(f"a header of {header:,} bytes, where {most:,} are enough")
        with safe_open(file, framework="pt") as opened:
            yield opened


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises StorageError where the system does not give the file, DataError where its content is no such file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: no such weight file") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError, RecursionError) as error:
        with suppress(OSError), open(file, "rb") as content:
            if content.read(len(POINTER)) == POINTER:
                raise DataError(f"{file}: stands for the weights, which are not here yet: git lfs pull") from None
        raise DataError(f"{file}: not a whole safetensors file: {error}") from None


def _unusable(file: Path, name: str) -> DataError:
    return DataError(f"{file}: {name[:200]} has values that are not finite numbers")


def _fill(raw: Any, content: Any) -> None:
    view = memoryview(content)
    while view:
        count = raw.readinto(view)
        if not count:
            raise ValueError("it ends too early")
        view = view[count:]


def _finite(value: Tensor) -> bool:
    """True where every value is a finite number; with numpy, whose one thread does not compete with the training's."""
    if value.dtype in (torch.bfloat16, torch.float16):  # an exponent of ones alone
        ones = 0x7F80 if value.dtype == torch.bfloat16 else 0x7C00
        return not bool(((value.view(-1).view(torch.int16).numpy() & ones) == ones).any())
    flat = value.view(-1).numpy()
    with np.errstate(all="ignore"):
        parts = (flat[start : start + 2**20] for start in range(0, len(flat), 2**20))
        return all(math.isfinite(float(part.sum())) or bool(np.isfinite(part).all()) for part in parts)


class _Behind:
    """One thread that does what it is given in order, at most `most` jobs behind; what a job raises comes out here."""

    def __init__(self, most: int) -> None:
        self.most, self.jobs, self.thread = most, deque[Future[None]](), ThreadPoolExecutor(1)

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        self.jobs.append(self.thread.submit(work, *arguments))
        while len(self.jobs) > self.most:
            self.jobs.popleft().result()

    def catch_up(self) -> None:
        while self.jobs:
            self.jobs.popleft().result()

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: Any) -> None:
        self.thread.shutdown(cancel_futures=True)


# -- writing -----------------------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Writes a safetensors file of tensors on the CPU in one pass that also checks and hashes it; gives its SHA-256.

    Raises NotFinite naming the first tensor with a value that is no finite number.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    for name, value in ordered:
        size = value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, flushed = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file, _Behind(AHEAD) as behind, _Behind(1) as disk:

        def put(content: Any) -> None:
            nonlocal flushed
            behind.do(digest.update, content)
            view = memoryview(content).cast("B")
            while view:
                view = view[file.write(view) :]
            if file.tell() - flushed >= FLUSH:
                flushed = file.tell()
                disk.do(os.fsync, file.fileno())

        put(len(head).to_bytes(8, "little") + head)
        for name, value in ordered:
            failpoint("checkpoint.tensors")
            value = value.contiguous()
            if value.is_floating_point() and not _finite(value):
                raise NotFinite(f"{name} is not finite")
            content = value.view(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), PIECE):
                put(content[start : start + PIECE])
        behind.catch_up()
        disk.catch_up()
    return digest.hexdigest()


def shown(shape: torch.Size) -> str:
    """A shape for an error line, however many axes it has."""
    return str(list(shape)) if len(shape) <= 8 else f"{str(list(shape[:8]))[:-1]}, ... {len(shape)} axes]"
