"""A look at a text before anything is made of it: its size, a tokenizer trained on a part, and that part as ids."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError
from gptworks.data import formats
from gptworks.data.findings import Findings, Piece
from gptworks.data.shards import make_tokenizer, with_vocabulary
from gptworks.data.sources import Source, listed, sources_of
from gptworks.data.split import held_out_share
from gptworks.data.tokenizer import GOLDEN, Tokenizer

SAMPLED = 2_000_000  # bytes of text that are read, from files spread over all of them
FILES = 4  # so many of a source fill the sample, where they are large enough
MOST_FILES = 1000  # that are looked into
BLOCKS = 4  # of a file, that are read at least: what they hold tells what the rest does


@dataclass(frozen=True)
class Glance:
    """A part of a text, and what it tells of all of it. Tokens and bytes of the whole are estimates."""

    tokenizer: Tokenizer
    documents: list[np.ndarray]  # ids of those that were read, or of their beginnings
    sample_bytes: int  # of text, that these are
    train_bytes: int
    eval_bytes: int
    complete: bool  # true where all was read
    seconds: float  # that a run is likely to take for a tokenizer and the ids of it all
    vocabulary: int | None = None  # the size that was wanted of a tokenizer made for this text

    @property
    def bytes_per_token(self) -> float:
        return self.sample_bytes / max(sum(len(ids) for ids in self.documents), 1)

    @property
    def train_tokens(self) -> int:
        return max(round(self.train_bytes / self.bytes_per_token), 1)

    @property
    def eval_tokens(self) -> int:
        return max(round(self.eval_bytes / self.bytes_per_token), 1)


def glance(data: Data, asked: TokenizerConfig) -> Glance:
    """Reads a part of a text. Raises DataError and UsageError."""
    sources = sources_of(data.places, data)
    texts, size, complete = _sample(sources, data)
    where = listed([source.place for source in sources])
    if not texts:
        raise DataError(f"{where}: no text")
    held_out = sources_of([data.eval], data, len(sources)) if data.eval else []
    if held_out:
        eval_bytes = _sample(held_out, data)[1]
    else:
        eval_bytes = round(size * held_out_share(data, size))
    eval_bytes = min(eval_bytes, data.eval_bytes or eval_bytes)
    for name, left in (("eval", eval_bytes), ("train", size if held_out else size - eval_bytes)):
        if left < 1:
            short = data.eval if held_out and name == "eval" else where
            raise DataError(f"{short}: no text for the {name} split; give more, or data.eval=FILE")
    read = sum(len(text.encode("utf-8", "replace")) for text in texts)
    began = time.perf_counter()
    tokenizer, vocabulary, seconds = Tokenizer.load(asked.path, asked.pattern) if asked.path else None, None, 0.0
    if tokenizer is None:
        wanted = with_vocabulary(asked, sources)
        tokenizer = make_tokenizer(wanted, texts)
        vocabulary = wanted.vocab_size if asked.kind == "bpe" else None
        seconds = (time.perf_counter() - began) * max(min(asked.sample_bytes, size) / read, 1.0)
    began = time.perf_counter()
    documents = [tokenizer.encode_array(text) for text in texts]
    seconds += (time.perf_counter() - began) * size / read
    return Glance(
        tokenizer, documents, sample_bytes=read, train_bytes=size if held_out else size - eval_bytes,
        eval_bytes=eval_bytes, complete=complete, seconds=seconds, vocabulary=vocabulary,
    )  # fmt: skip


def _sample(sources: list[Source], data: Data) -> tuple[list[str], int, bool]:
    """Reads documents or their beginnings; tells about how many bytes there are in all, and whether all was read."""
    texts: list[str] = []
    size, complete = 0, True
    for source in sources:
        parts = _Parts(source, SAMPLED // len(sources), data)
        texts += parts.texts
        size, complete = size + parts.size, complete and parts.complete
    return texts, size, complete


class _Parts:
    """The beginnings of files that are spread over all that a source has, up to `most` bytes of text together."""

    def __init__(self, source: Source, most: int, data: Data) -> None:
        self.texts: list[str] = []
        self.complete = True
        findings = Findings(source.place, newlines=data.newlines)
        if source.function:
            self.size, _ = self._read(source.pieces(findings), most, findings)
            return
        size = read = on_disk = looked = 0
        for file in _spread(source.files):
            pieces = (piece for piece in formats.read(file, data, findings) if findings.count(piece))
            taken, share = self._read(pieces, max(most // FILES, 1), findings)
            length, read, looked = file.stat().st_size, read + taken, looked + 1
            size += taken if share is None else round(share * length)
            on_disk += length
            if read >= most or looked == MOST_FILES:
                break
        self.complete = self.complete and looked == len(source.files)
        self.size = size if looked == len(source.files) else round(size / max(on_disk, 1) * source.size)

    def _read(self, pieces: Iterator[Piece], enough: int, findings: Findings) -> tuple[int, float | None]:
        """Keeps so many bytes of text; gives the bytes that were read, and where that was not all their share of the
        bytes on disk. A reader is some blocks ahead of its pieces, so that the share is taken between two blocks."""
        taken, blocks = 0, [(findings.read, 0)]
        for piece in pieces:
            if findings.read > blocks[-1][0]:
                blocks.append((findings.read, taken))
            if taken >= enough and (len(blocks) > BLOCKS or not findings.read):
                self.complete = False
                (begun, before), (ended, after) = blocks[min(2, len(blocks) - 1)], blocks[-1]
                return taken, (after - before) / max(ended - begun, 1)
            if taken < enough:
                self.texts.append(piece.text[: enough - taken])
            taken += piece.size
        return taken, None


def _spread(files: list[Path]) -> list[Path]:
    """The files in an order of which each beginning is spread over all of them."""
    order = sorted(range(len(files)), key=lambda number: number * GOLDEN % 2**64)
    return [files[number] for number in order]
