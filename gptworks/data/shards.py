"""Token shards: memory-mapped ids with document boundaries, verified before use, rewritten only if an input changed.

A data folder holds the tokenizer, and for each split (`train`, `eval`) the ids of all its documents in one flat file
and the position at which every document starts. `validation.jsonl` is the held-out text itself, so that anyone can
run `gptworks evaluate MODEL --data .../validation.jsonl` and get the loss the run reports.
"""

import json
import math
import queue
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError, RunMismatch
from gptworks.core.log import Progress, console, count
from gptworks.core.runtime import process_seconds
from gptworks.data.sources import Findings, Piece, Source, draw
from gptworks.data.tokenizer import Tokenizer, sample

VERSION = 1
DTYPES = ("<u2", "<u4")
FEW = 20  # with fewer documents than this on one side of the split, validation documents are counted out
HELD_OUT = 0.1
HELD_OUT_BYTES = 5_000_000


@dataclass(frozen=True)
class Stream:
    """The ids of a split. Document i is `tokens[documents[i]:documents[i+1]]` and begins with a start token."""

    tokens: np.ndarray
    documents: np.ndarray
    bytes: int  # of the text, in UTF-8

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per predicted token."""
        return self.bytes / max(len(self.tokens) - 1, 1)


@dataclass(frozen=True)
class Shards:
    """An opened data folder."""

    path: Path
    tokenizer: Tokenizer
    train: Stream
    eval: Stream
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        """SHA-256 of the ids, which a checkpoint records."""
        files = self.manifest["files"]
        return "-".join(files[f"{split}.tokens"]["sha256"][:16] for split in ("train", "eval"))


class Writer:
    """Encodes the documents of one split into `<split>.tokens` and `<split>.documents`."""

    def __init__(self, path: Path, split: str, tokenizer: Tokenizer) -> None:
        self.path, self.split, self.tokenizer = path, split, tokenizer
        self.dtype = np.dtype(DTYPES[len(tokenizer) > 2**16])
        self.file: IO[bytes] = open(path / f"{split}.tokens", "wb")  # noqa: SIM115
        self.starts = array("Q")
        self.tokens = self.bytes = 0
        self._waiting: list[str] = []

    def add(self, piece: Piece) -> None:
        if piece.first:
            self._end()
            self.starts.append(self.tokens)
            self._write_id(self.tokenizer.start_id)
        self.bytes += piece.size
        if self.tokenizer.cuttable:
            self._write(self.tokenizer.encode_array(piece.text))
        else:  # ids may depend on the whole document
            self._waiting.append(piece.text)

    def close(self) -> dict[str, int]:
        self._end()
        self.file.close()
        np.frombuffer(self.starts, dtype="<u8").tofile(self.path / f"{self.split}.documents")
        return {"tokens": self.tokens, "documents": len(self.starts), "bytes": self.bytes}

    def _end(self) -> None:
        if self._waiting:
            self._write(self.tokenizer.encode_array("".join(self._waiting)))
            self._waiting.clear()
        if self.starts:
            self._write_id(self.tokenizer.end_id)

    def _write_id(self, token: int | None) -> None:
        if token is not None:
            self._write(np.array([token], dtype=np.uint32))

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(ids.astype(self.dtype)).data)
        self.tokens += len(ids)


def prepare(data: Data, asked: TokenizerConfig, path: Path, given: Tokenizer | None = None) -> Shards:
    """Opens the shards in `path`, making them first where they are missing or an input changed.

    `given` is the tokenizer of the model we start from. Raises DataError.
    """
    source = Source(data.train, data)
    eval_source = Source(data.eval, data) if data.eval else None
    settings = _settings(data, asked, given)
    if (path / folder.MANIFEST).is_file():
        problem = _reason_to_rewrite(path, settings, source, eval_source)
        if problem is None:
            return open_shards(path, verified=True)
        console.say(f"data     shards are rewritten: {problem}")
    _build(data, asked, given, source, eval_source, settings, path)
    return open_shards(path, verified=True)


def open_shards(path: Path, verified: bool = False) -> Shards:
    """Maps the shards in `path` into memory, after checking every file's SHA-256. Raises DataError."""
    manifest = folder.read_manifest(path) if verified else folder.verify(path)
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != manifest.get("tokenizer"):
        raise DataError(f"{path}: the shards were made with another tokenizer than the one beside them")
    try:
        return Shards(path, tokenizer, _stream(path, "train", manifest), _stream(path, "eval", manifest), manifest)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path}: its manifest is not that of shards: {type(error).__name__}: {error}") from None


def _stream(path: Path, split: str, manifest: dict[str, Any]) -> Stream:
    facts, dtype = manifest["splits"][split], manifest["dtype"]
    if dtype not in DTYPES or not {f"{split}.tokens", f"{split}.documents"} <= manifest["files"].keys():
        raise ValueError(f"{split} is not ids of {' or '.join(DTYPES)}")
    tokens = np.memmap(path / f"{split}.tokens", dtype=dtype, mode="r")
    documents = np.fromfile(path / f"{split}.documents", dtype="<u8").astype(np.int64)
    if len(tokens) != facts["tokens"] or len(documents) != facts["documents"]:
        raise DataError(f"{path}: {split} does not have the counts its manifest states")
    bounds = np.concatenate((documents, [len(tokens)]))
    if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
        raise DataError(f"{path}: {split}.documents does not cut {split}.tokens into documents")
    return Stream(tokens, documents, int(facts["bytes"]))


def check_ids(stream: Stream, vocab_size: int, what: str) -> None:
    """Raises DataError if the stream has an id the model has no row for."""
    largest = max(
        (int(stream.tokens[i : i + 10_000_000].max()) for i in range(0, len(stream.tokens), 10_000_000)), default=0
    )
    if largest >= vocab_size:
        raise DataError(f"{what}: token id {largest} is beyond the model's vocabulary of {vocab_size}")


def _settings(data: Data, asked: TokenizerConfig, given: Tokenizer | None) -> dict[str, Any]:
    keys = ("text_column", "separator", "eval_fraction", "eval_bytes", "invalid_utf8", "train", "eval")
    tokenizer: Any = asked.model_dump(mode="json")
    if given is not None:
        tokenizer = given.fingerprint
    elif asked.path:
        tokenizer = Tokenizer.load(asked.path).fingerprint
    return {"version": VERSION, "tokenizer": tokenizer} | {k: getattr(data, k) for k in keys}


def _hashes(*sources: Source | None) -> list[str]:
    return [folder.sha256(file) for source in sources if source for file in source.files + source.code]


def _stamps(*sources: Source | None) -> list[dict[str, Any]]:
    return [stamp for source in sources if source for stamp in source.stamp()]


def _reason_to_rewrite(path: Path, settings: dict[str, Any], source: Source, eval_source: Source | None) -> str | None:
    try:
        manifest = folder.verify(path)
    except DataError as error:
        return str(error)
    if manifest.get("settings") != settings:
        old = manifest.get("settings") or {}
        changed = [key for key in settings if old.get(key) != settings[key]]
        return f"{', '.join(changed)} changed"
    if manifest["sources"] != _stamps(source, eval_source) and manifest["source_sha256"] != _hashes(
        source, eval_source
    ):
        return "the text changed"
    return None


def _survey(source: Source, few: int) -> tuple[list[int], int]:
    """What each document draws (stops after `few`) and, if there is just one document, its bytes."""
    if source.one_plain_text and source.size:
        return [0], source.size
    draws: list[int] = []
    size = 0
    for piece in source.pieces(Findings()):
        if piece.first:
            draws.append(draw(piece.text))
        if len(draws) >= few:
            break
        size += piece.size
    return draws, size


def _splitter(
    data: Data, source: Source, eval_source: Source | None
) -> tuple[Callable[[Findings, Progress | None], Iterator[tuple[Piece, bool]]], str]:
    """A function that streams (piece, is it validation?), and how the split was made in words."""

    def stream(findings: Findings, progress: Progress | None) -> Iterator[Piece]:
        return source.pieces(findings, progress.add if progress else lambda count: None)

    if eval_source is not None:

        def separate(findings: Findings, progress: Progress | None) -> Iterator[tuple[Piece, bool]]:
            yield from ((piece, False) for piece in stream(findings, progress))
            left = data.eval_bytes or 2**63
            for piece in eval_source.pieces(findings, progress.add if progress else lambda count: None):
                if piece.size > left:
                    if head := _head(piece.text, left):
                        yield Piece(head, piece.first), True
                    break
                left -= piece.size
                yield piece, True

        return separate, f"validation: {data.eval}" + (
            f", its first {data.eval_bytes:,} bytes" if data.eval_bytes else ""
        )

    fraction = data.eval_fraction or min(HELD_OUT, HELD_OUT_BYTES / max(source.size, 1))
    if data.eval_bytes:
        fraction = min(fraction, data.eval_bytes / max(source.size, 1))
    few = math.ceil(min(FEW / min(fraction, 1 - fraction), 1e6))
    draws, size = _survey(source, few)
    if not draws:
        raise DataError(f"{data.train}: no text")

    if len(draws) == 1:
        boundary = int(size * (1 - fraction))

        def by_position(findings: Findings, progress: Progress | None) -> Iterator[tuple[Piece, bool]]:
            seen, begun = 0, False  # bytes; whether validation has
            for piece in stream(findings, progress):
                head = piece.text if seen + piece.size <= boundary else _head(piece.text, max(boundary - seen, 0))
                tail = piece.text[len(head) :]
                if head:
                    yield piece if not tail else Piece(head, piece.first), False
                if tail:
                    yield piece if head == "" and begun else Piece(tail, not begun), True
                    begun = True
                seen += piece.size

        return by_position, f"validation: the last {fraction:.2%} of the one document"

    limit = int(fraction * 2**64)
    if len(draws) < few:  # chance could leave a side empty
        ranked = sorted(set(draws))
        limit = (ranked + [2**64])[max(1, min(len(ranked) - 1, round(len(ranked) * fraction)))]

    def by_document(findings: Findings, progress: Progress | None) -> Iterator[tuple[Piece, bool]]:
        validation = False
        for piece in stream(findings, progress):
            if piece.first:
                validation = draw(piece.text) < limit
            yield piece, validation

    return by_document, f"validation: {fraction:.2%} of the documents, chosen by content"


def _head(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _make_tokenizer(
    asked: TokenizerConfig, split: Callable[[Findings, Progress | None], Iterator[tuple[Piece, bool]]], size: int
) -> Tokenizer:
    if asked.path:
        return Tokenizer.load(asked.path)
    if asked.kind == "char":
        alphabet: set[str] = set()
        for piece, _ in split(Findings(), None):
            alphabet.update(piece.text)
        if len(alphabet) > 100_000:
            raise DataError(f"{len(alphabet):,} different characters; tokenizer.kind=bpe suits this text")
        return Tokenizer.train_characters(alphabet)
    texts = sample((piece.text for piece, held in split(Findings(), None) if not held), size, asked.sample_bytes)
    return Tokenizer.train_bpe(texts, asked.vocab_size, asked.pattern)


def _build(
    data: Data,
    asked: TokenizerConfig,
    given: Tokenizer | None,
    source: Source,
    eval_source: Source | None,
    settings: dict[str, Any],
    path: Path,
) -> None:
    split, how = _splitter(data, source, eval_source)
    size = source.size + (eval_source.size if eval_source else 0)
    start = process_seconds()
    tokenizer = given or _make_tokenizer(asked, split, source.size)
    if tokenizer.start_id is None:
        raise DataError("the tokenizer names neither bos_token nor eos_token: add one to its tokenizer_config.json")
    if given is None and not asked.path:
        console.say(f"tokens   {len(tokenizer):,} ids, {asked.kind}, trained in {process_seconds() - start:.1f} s")
    if tokenizer.engine == "tokenizers" and size > 20_000_000:
        console.say('data     encoding with `tokenizers`; `pip install "gptworks[fast]"` is many times faster')

    facts: dict[str, Any] = {"version": VERSION, "settings": settings, "split": how, "tokenizer": tokenizer.fingerprint}
    findings, progress = Findings(), Progress("encoding", size)
    with folder.commit(path, facts) as aside:
        tokenizer.save(aside)
        train, held = Writer(aside, "train", tokenizer), Writer(aside, "eval", tokenizer)
        with _validation_text(aside, wanted=eval_source is None) as keep:
            for piece, is_eval in _ahead(split(findings, progress)):
                (held if is_eval else train).add(piece)
                if is_eval:
                    keep(piece)
        facts["splits"] = {"train": train.close(), "eval": held.close()}
        facts["dtype"] = train.dtype.str
        facts["findings"] = findings.lines()
        facts["sources"] = _stamps(source, eval_source)
        facts["source_sha256"] = _hashes(source, eval_source)
        _refuse_empty(facts["splits"], data)
    console.clear()
    for line in findings.lines():
        console.say(f"data     {line}")
    splits = facts["splits"]
    console.say(
        f"data     {count(splits['train']['tokens'])} training and {count(splits['eval']['tokens'])} validation tokens "
        f"from {findings.documents:,} document{'s' * (findings.documents != 1)}, {progress.rate / 1e6:.0f} MB/s "
        f"({tokenizer.engine}); {how}"
    )


def _ahead(pieces: Iterator[tuple[Piece, bool]], depth: int = 4) -> Iterator[tuple[Piece, bool]]:
    """Reads and cuts in a thread of its own, a few pieces ahead of the encoder, which works outside Python's lock."""
    ready: queue.Queue[tuple[Piece, bool] | BaseException | None] = queue.Queue(depth)
    left = threading.Event()

    def put(item: tuple[Piece, bool] | BaseException | None) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in pieces:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()


def _refuse_empty(splits: dict[str, dict[str, int]], data: Data) -> None:
    for name, facts in splits.items():
        if facts["tokens"] < 2:
            where = data.train if name == "train" or not data.eval else data.eval
            hint = (
                "; every document may be the same, or data.eval_fraction too large"
                if name == "train"
                else ("; give data.eval a file, or a larger data.eval_fraction")
            )
            raise DataError(f"{where}: no text for the {name} split{hint}")


class _validation_text:
    """Writes validation.jsonl, one document a line, while the shards are written."""

    def __init__(self, path: Path, wanted: bool) -> None:
        self.file = open(path / "validation.jsonl", "w", encoding="utf-8") if wanted else None  # noqa: SIM115
        self.parts: list[str] = []

    def __enter__(self) -> Callable[[Piece], None]:
        return self.keep

    def keep(self, piece: Piece) -> None:
        if self.file and piece.first:
            self.flush()
        if self.file:
            self.parts.append(piece.text)

    def flush(self) -> None:
        if self.file and self.parts:
            self.file.write(json.dumps({"text": "".join(self.parts)}, ensure_ascii=False) + "\n")
        self.parts.clear()

    def __exit__(self, *error: object) -> None:
        self.flush()
        if self.file:
            self.file.close()


def same_data(shards: Shards, identity: object) -> None:
    """Raises RunMismatch unless these are the ids a run was trained on."""
    if shards.identity != identity:
        raise RunMismatch(f"{shards.path}: the training text is not the one this run began with; --fresh starts over")


def encode_text(path: str, data: Data, tokenizer: Tokenizer) -> tuple[Stream, bytes]:
    """A file or folder as one stream of ids in memory, with its text; for evaluation. Raises DataError."""
    starts, parts, texts, position, buffered = [], [], [], 0, ""

    def put(ids: np.ndarray) -> None:
        nonlocal position
        parts.append(ids.astype(np.uint32))
        position += len(ids)

    def end(document: str) -> None:
        start, stop = tokenizer.start_id, tokenizer.end_id
        starts.append(position)
        put(np.array([start] if start is not None else [], dtype=np.uint32))
        put(tokenizer.encode_array(document))
        put(np.array([stop] if stop is not None else [], dtype=np.uint32))
        texts.append(document)

    open_document = False
    for piece in Source(path, data).pieces(Findings()):
        if piece.first and open_document:
            end(buffered)
            buffered = ""
        buffered += piece.text
        open_document = True
    if not open_document:
        raise DataError(f"{path}: no text")
    end(buffered)
    raw = "".join(texts).encode("utf-8", "replace")
    return Stream(np.concatenate(parts), np.array(starts, dtype=np.int64), len(raw)), raw
