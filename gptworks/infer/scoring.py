"""How well a model predicts a text: exact loss, perplexity, bits per byte; and what simple means need for the same."""

import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptworks.core.errors import NotFinite
from gptworks.data.loader import Batch, blocks
from gptworks.data.shards import Stream
from gptworks.model.transformer import Transformer

XZ_LIMIT = 64_000_000  # bytes; beyond it compressing would take longer than evaluating


@dataclass(frozen=True)
class Score:
    """Of a whole text. `loss` is in nats a predicted token; every token after the first is predicted once."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def token_losses(model: Transformer, batch: Batch) -> Tensor:
    """-log p(target) for every place of the batch, [B, T] in float32."""
    logits = model.logits(model(batch.tokens, batch.segments)).float()
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)


def batched(rows: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Single rows, `size` at a time."""
    waiting: list[Batch] = []

    def joined() -> Batch:
        return Batch(
            torch.cat([b.tokens for b in waiting]),
            torch.cat([b.targets for b in waiting]),
            torch.cat([b.weights for b in waiting]),
        )

    for row in rows:
        waiting.append(row)
        if len(waiting) == size:
            yield joined()
            waiting.clear()
    if waiting:
        yield joined()


@torch.no_grad()
def score(model: Transformer, stream: Stream, context: int, rows: int = 16, stride: int | None = None) -> Score:
    """The exact loss over a stream, in blocks of `context` (or windows of it, `stride` apart), `rows` at a time.

    Per-token losses are float32, their sum float64, so the figure does not depend on `rows` beyond rounding. Raises
    NotFinite.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, tokens = 0.0, 0.0
    for batch in batched(blocks(stream, context, stride), rows):
        batch = batch.to(device)
        total += float((token_losses(model, batch).double() * batch.weights.double()).sum())
        tokens += float(batch.weights.double().sum())
    model.train(was_training)
    loss = total / max(tokens, 1.0)
    if not math.isfinite(loss):
        raise NotFinite(f"the evaluation loss is {loss}: the model's weights or outputs are not finite")
    return Score(
        loss, math.exp(min(loss, 700.0)), total / math.log(2) / max(stream.bytes, 1), int(tokens), stream.bytes
    )


def unigram(stream: Stream) -> dict[str, float]:
    """The entropy of the text's own token frequencies: what a model that knows them and no order would score."""
    counts = np.bincount(np.asarray(stream.tokens[1:]).astype(np.int64))
    shares = counts[counts > 0] / counts.sum()
    nats = float(-(shares * np.log(shares)).sum())
    return {"loss": nats, "bits_per_byte": nats * (len(stream.tokens) - 1) / math.log(2) / max(stream.bytes, 1)}


def xz(text: bytes) -> dict[str, float] | None:
    """What `xz -9e` needs for the same bytes; None for a text too long to wait for."""
    if not text or len(text) > XZ_LIMIT:
        return None
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return {"bytes": size, "bits_per_byte": 8 * size / len(text)}
