"""A model in the formats of other programs: written aside, read back, compared with the source, then put in place."""

import importlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptworks.core import folder
from gptworks.core.errors import DataError, UsageError
from gptworks.core.log import console, plural, size
from gptworks.core.registry import nearest, resolve
from gptworks.core.results import Exported
from gptworks.data.batch import Batch
from gptworks.data.loader import blocks
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import check_rows
from gptworks.model.build import Loaded

FORMATS = {"gguf": "gptworks.exporting.gguf:GGUF", "onnx": "gptworks.exporting.onnx:ONNX"}
ROW = 256  # tokens of a row that is compared; the logits of two models for it are in memory

Logits = Callable[[Tensor], Tensor]  # of tokens [1, T]: [1, T, V]


@dataclass(frozen=True)
class Parity:
    """The comparison that was made when an export was read back."""

    compared: str  # in words, what beside the logits
    tokens: int  # of text whose logits were compared
    logits: float  # the largest difference of one
    loss: float  # of the source on that text, nats a token
    exported_loss: float

    def line(self) -> str:
        return (
            f"{self.compared}; logits of {plural(self.tokens, 'token')} differ by at most {self.logits:.2g}, "
            f"loss {self.loss:.4f} -> {self.exported_loss:.4f} nats/token"
        )


class Exporter(ABC):
    """One format: made for a model, which it may refuse (DataError), then asked to write it and to compare it.

    A row of `FORMATS`, or a class of your own (`mine.py:Thing`).
    """

    kinds: tuple[str, ...]  # number formats of weights, the default first
    is_folder: bool  # whether a folder is written, or one file
    elsewhere: dict[str, str] = {}  # number formats, as patterns, that something else makes, and what

    def __init__(self, loaded: Loaded, kind: str) -> None:
        self.loaded, self.kind = loaded, kind
        self.notes: list[str] = []  # what whoever exports should know

    @property
    @abstractmethod
    def estimate(self) -> int:
        """Bytes that will be written, or somewhat more."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Writes the file, or into the folder, at `path`."""

    @abstractmethod
    def check(self, path: Path, rows: list[Batch]) -> Parity:
        """Reads `path` back and compares it with the source, on rows of text too. Raises DataError if it is another."""


def export(
    loaded: Loaded, name: str, out: Path, *, kind: str | None, text: str, source: str, tokens: int, dry_run: bool
) -> Exported:
    """Writes a model to `out` in a format, and proves it on the first `tokens` tokens of `text`, read from `source`.

    Where anything fails, the proof included, there is nothing at `out`.
    """
    exporter_class: type[Exporter] = resolve("format", FORMATS, name)
    kind = (kind or exporter_class.kinds[0]).lower()
    if kind not in exporter_class.kinds:
        ways = [way for pattern, way in exporter_class.elsewhere.items() if re.fullmatch(pattern, kind)]
        advice = ways[0].format(kind=kind.upper()) if ways else nearest(kind, list(exporter_class.kinds))
        raise UsageError(f"--type {kind}: {name} has no such type here: {advice}")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: is there already; remove it or choose another --out")
    exporter = exporter_class(loaded, kind)
    rows = _rows(loaded, text, tokens)
    console.say(f"export   {name} {kind}, about {size(exporter.estimate)} to {out}, compared on {source}")
    for note in exporter.notes:
        console.say(f"note     {note}")
    folder.check_space(out, exporter.estimate)
    result = Exported(str(out), name, kind, estimated_bytes=exporter.estimate, notes=exporter.notes)
    if dry_run:
        return result
    place = folder.commit if exporter.is_folder else folder.commit_file
    with place(out) as aside:
        console.live(f"writing {out}")
        exporter.write(aside)
        console.live(f"comparing {out} with its source")
        written = sum(file.stat().st_size for file in ([aside] if aside.is_file() else aside.rglob("*")))
        parity = exporter.check(aside, rows)
    console.clear()
    return replace(result, bytes=written, parity=asdict(parity) | {"line": parity.line()})


def _rows(loaded: Loaded, text: str, tokens: int) -> list[Batch]:
    """The beginning of a text as rows that fit into the model's context."""
    ids = loaded.tokenizer.encode(text)[:tokens]
    start = loaded.tokenizer.start_id
    ids = ids if start is None else [start, *ids]
    if len(ids) < 2:
        raise DataError("--data: too little text to compare on")
    check_rows(loaded.tokenizer, max(ids), rows=loaded.model.config.vocab_size, what="--data")
    stream = Stream(np.array(ids), np.zeros(1, dtype=np.int64), len(text))
    return list(blocks(stream, min(loaded.model.config.max_position_embeddings, ROW)))


@torch.no_grad()
def compare(rows: list[Batch], source: Logits, exported: Logits, compared: str) -> Parity:
    """The logits of two models on the same text. Raises DataError where the exported ones are not finite."""
    tokens, largest, nats = 0, 0.0, [0.0, 0.0]
    for row in rows:
        T = int(row.weights.sum())  # the last row is filled up
        ids, targets = row.tokens[:, :T], row.targets[0, :T]
        both = [source(ids)[0].float(), exported(ids)[0].float()]
        if not torch.isfinite(both[1]).all():
            raise DataError("the exported model's logits are not finite numbers; nothing was kept")
        largest = max(largest, float((both[0] - both[1]).abs().max()))
        nats = [n + float(F.cross_entropy(each, targets, reduction="sum")) for n, each in zip(nats, both, strict=True)]
        tokens += T
    assert tokens and not math.isnan(largest)
    return Parity(compared, tokens, logits=largest, loss=nats[0] / tokens, exported_loss=nats[1] / tokens)


def needed(module: str, extra: str) -> Any:
    """A module of an optional dependency. Raises UsageError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f'exporting to {extra} needs `pip install "gptworks[{extra}]"` ({module} is missing)'
        ) from None
