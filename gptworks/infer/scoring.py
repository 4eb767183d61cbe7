"""Scores how well a model predicts a text: exact loss, perplexity, bits per byte; and what simpler methods reach."""

import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gptworks.core.errors import NotFinite
from gptworks.core.ranks import ALONE, Group
from gptworks.core.results import Result
from gptworks.core.workers import side_by_side
from gptworks.data.batch import Batch
from gptworks.data.loader import blocks
from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Decoding
from gptworks.model.experts import expert_load
from gptworks.model.transformer import Transformer

XZ_LIMIT = 64_000_000  # bytes; beyond it compressing would take longer than evaluating


@dataclass(frozen=True, eq=False, repr=False)
class Score(Result):
    """The scores of a whole text. `loss` is in nats a predicted token; every token after the first is predicted
    once."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    lost_bytes: int = 0  # of these, that decoding the ids does not give back


def token_losses(model: Transformer, batch: Batch) -> Tensor:
    """The loss -log p(target) for every place of the batch, [B, T] in float32."""
    hidden = model(batch.tokens, segments=batch.segments).hidden.flatten(0, 1)
    return -model.head.log_probabilities(hidden, batch.targets.flatten()).view_as(batch.targets)


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


def stream_losses(
    model: Transformer,
    stream: Stream,
    context: int,
    rows: int = 16,
    stride: int | None = None,
    *,
    group: Group = ALONE,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the loss -log p of every token of a stream after the first, in order: a float32 array for each batch.

    A batch is `rows` blocks of `context` (or windows of it, `stride` apart). Of the processes of a group, each gives
    the batches that are its own; `workers` threads compute batches side by side, by default as many as an operation
    would have.
    """
    was_training, device = model.training, next(model.parameters()).device

    @torch.no_grad()  # holds for a thread
    def losses_of(batch: Batch) -> np.ndarray:
        return token_losses(model, batch.to(device)).cpu()[batch.weights > 0].numpy()

    if workers is None:
        workers = torch.get_num_threads() if device.type == "cpu" else 1
    batches = batched(blocks(stream, context, stride), rows)
    own = islice(batches, group.rank, None, group.size)
    model.eval()
    try:
        with side_by_side(workers) as pool:
            for losses in pool.map(losses_of, own):
                group.beat()
                yield losses
    finally:
        model.train(was_training)


PASSAGE = 600  # tokens, which a person reads in two minutes


def passage(model: Transformer, stream: Stream, tokenizer: Tokenizer, context: int) -> list[tuple[str, list[float]]]:
    """The beginning of a stream in pieces of whole characters, each with the losses of its tokens; that of the first
    token is not known. Every token after the first window has half the context before it."""
    ids = np.asarray(stream.tokens[: PASSAGE + 1])
    part = Stream(ids, stream.documents[stream.documents < len(ids)], stream.bytes)
    parts = list(stream_losses(model, part, context=context, stride=max(context // 2, 1)))
    losses = [math.nan, *(np.concatenate(parts).tolist() if parts else [])]
    pieces: list[tuple[str, list[float]]] = []
    decoding, waiting = Decoding(tokenizer, ()), list[float]()
    for token, loss in zip(ids.tolist(), losses, strict=True):
        if math.isfinite(loss):
            waiting.append(round(loss, 3))
        if text := "".join(decoding.add(token)):
            pieces.append((text, waiting))
            waiting = []
    if text := "".join(decoding.finish()):
        pieces.append((text, waiting))
    return pieces


def score(
    model: Transformer,
    stream: Stream,
    context: int,
    rows: int = 16,
    stride: int | None = None,
    *,
    group: Group = ALONE,
    workers: int | None = None,
) -> Score:
    """The exact loss over a stream. Raises NotFinite. Arguments as in `stream_losses`."""
    losses = stream_losses(model, stream, context=context, rows=rows, stride=stride, group=group, workers=workers)
    return total(losses, stream, group)


@torch.no_grad()
def expert_use(model: Transformer, stream: Stream, context: int, rows: int = 16) -> dict[str, float]:
    """Measures how evenly a model's experts are used on the first `rows` blocks of a stream: the load of the busiest,
    where 1 is an even share, and the number that are not used at all, over all layers."""
    device, was_training = next(model.parameters()).device, model.training
    batch = next(batched(blocks(stream, context), rows)).to(device)
    model.eval()
    routing = model(batch.tokens).routing
    model.train(was_training)
    real = (batch.weights > 0).flatten()  # the last block is filled up
    shares = expert_load([logits[real] for logits in routing], model.config.num_experts_per_tok)
    return {"expert_busiest": float(shares.max()) * shares.shape[1], "experts_unused": int((shares == 0).sum())}


def total(losses: Iterable[np.ndarray], stream: Stream, group: Group = ALONE) -> Score:
    """The score that the losses of all batches make. Raises NotFinite.

    Sums of a batch are float64 and their own sum is exact before it is rounded (Shewchuk 1997, as math.fsum), so it
    does not matter in what order batches come or who computed them; `rows` moves the figure by rounding alone.
    """
    sums, tokens = [], 0
    for part in losses:
        sums.append(float(part.sum(dtype=np.float64)))
        tokens += len(part)
    everyone = group.gather((sums, tokens))
    nats, tokens = math.fsum(value for part, _ in everyone for value in part), sum(count for _, count in everyone)
    loss = nats / max(tokens, 1)
    if not math.isfinite(loss):
        raise NotFinite(f"the evaluation loss is {loss}: the model's weights or outputs are not finite")
    return Score(
        loss,
        math.exp(min(loss, 700.0)),
        bits_per_byte=bits_per_byte(nats, stream.bytes, stream.lost_bytes),
        tokens=tokens,
        bytes=stream.bytes,
        lost_bytes=stream.lost_bytes,
    )


def charge(nats: float, size: float, lost: float) -> float:
    """Bits that each byte counts which decoding does not give back: the 8 of a byte that is sent as it is, or what the
    bytes need that come back, where that is more. So losing text never makes a score better."""
    return max(8.0, nats / math.log(2) / (size - lost)) if size > lost else 8.0


def bits_per_byte(nats: float, size: float, lost: float) -> float:
    """Bits a byte of a text of `size` bytes that costs `nats`, and of which `lost` do not come back from its ids."""
    return (nats / math.log(2) + charge(nats, size, lost) * lost) / (size or 1)


def unigram(stream: Stream) -> dict[str, float]:
    """The entropy of the text's own token frequencies: what a model that knows them and no order would score."""
    counts = np.bincount(np.asarray(stream.tokens[1:]).astype(np.int64))
    shares = counts[counts > 0] / counts.sum()
    nats = float(-(shares * np.log(shares)).sum())
    return {
        "loss": nats,
        "bits_per_byte": bits_per_byte(nats * (len(stream.tokens) - 1), stream.bytes, stream.lost_bytes),
    }


def xz(text: bytes) -> dict[str, float] | None:
    """The size that `xz -9e` packs the same bytes to; None for a text too long to wait for."""
    if not text or len(text) > XZ_LIMIT:
        return None
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    return {"bytes": size, "bits_per_byte": 8 * size / len(text)}
