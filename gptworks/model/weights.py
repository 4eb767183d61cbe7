"""Tensors from safetensors files. Names and shapes come from the header alone, so that whoever reads compares them with
what is expected before anything is allocated; a file that claims more than it should costs no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptworks.core.errors import DataError

ENTRY_BYTES = 1024  # of a header, for each tensor; its name, type, shape and place take about a tenth of that
METADATA_BYTES = 2**20


def read_shapes(file: Path, expected: int) -> dict[str, torch.Size]:
    """The shape of every tensor in a file of `expected` tensors or fewer. Raises DataError."""
    with _opened(file, METADATA_BYTES + ENTRY_BYTES * expected) as opened:
        return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file whose shapes were found good, copied into memory. Raises DataError."""
    with _opened(file) as opened:  # copied, since memory-mapped weights may be misaligned and give other bits
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


@contextmanager
def _opened(file: Path, most: int | None = None) -> Iterator[Any]:
    try:
        with open(file, "rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if most is not None and header > most:
            raise ValueError(f"a header of {header:,} bytes, where {most:,} are enough")
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{file}: damaged or not a safetensors file: {error}") from None


def shown(shape: torch.Size) -> str:
    """A shape for an error line, however many axes it has."""
    return str(list(shape)) if len(shape) <= 8 else f"{str(list(shape[:8]))[:-1]}, ... {len(shape)} axes]"
