"""Token shards: memory-mapped ids with document boundaries, verified before use, rewritten only if an input changed.

A data folder holds the tokenizer, and for each split (`train`, `eval`) the ids of all its documents in one flat file
and the position at which every document starts. `validation.jsonl` is the held-out text itself, so that anyone can
run `gptworks evaluate MODEL --data .../validation.jsonl` and get the loss the run reports, rounding aside.
"""

import hashlib
import json
import queue
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptworks.core import folder
from gptworks.core.config import Data
from gptworks.core.config import Tokenizer as TokenizerConfig
from gptworks.core.errors import DataError, GptworksError, RunMismatch
from gptworks.core.failpoint import failpoint
from gptworks.core.log import Progress, console, count, plural
from gptworks.core.registry import file_of
from gptworks.core.runtime import process_seconds
from gptworks.data import findings as found
from gptworks.data.findings import Findings, Piece
from gptworks.data.formats import ROW
from gptworks.data.sources import Source, findings_of, listed, sources_of
from gptworks.data.split import Overlap, Split
from gptworks.data.tokenizer import USUAL_VOCABULARY, Tokenizer, check_rows, sample, usual_vocabulary

VERSION = 2
DTYPES = ("<u2", "<u4")
FILES = {f"{split}.{kind}" for split in ("train", "eval") for kind in ("tokens", "documents")} | {
    "tokenizer.json", "tokenizer_config.json", "validation.jsonl",
}  # fmt: skip


@dataclass(frozen=True)
class SourceCount:
    """The documents, tokens and bytes of one source in a split."""

    path: str
    documents: int
    tokens: int
    bytes: int  # of the text, in UTF-8


@dataclass(frozen=True)
class Stream:
    """The ids of a split. Document i is `tokens[documents[i]:documents[i+1]]` and begins with a start token."""

    tokens: np.ndarray
    documents: np.ndarray
    bytes: int  # of the text, in UTF-8
    sources: tuple[SourceCount, ...] = ()  # in the order of the tokens
    largest_id: int | None = None  # None: not known without looking at each
    lost_bytes: int = 0  # of the text, that decoding the ids does not give back
    lost_before: np.ndarray | None = None  # the same before each of the places that were asked for

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per predicted token."""
        return self.bytes / max(len(self.tokens) - 1, 1)

    @property
    def lost_per_token(self) -> float:
        """Bytes of text per predicted token that decoding the ids does not give back."""
        return self.lost_bytes / max(len(self.tokens) - 1, 1)


@dataclass(frozen=True)
class Shards:
    """An opened data folder."""

    path: Path
    tokenizer: Tokenizer
    train: Stream
    eval: Stream
    manifest: dict[str, Any]
    verifying: folder.Verifying | None = None  # the files' hashes, which may still be compared

    @property
    def identity(self) -> str:
        """SHA-256 of the ids, which a checkpoint records."""
        files = self.manifest["files"]
        return "-".join(files[f"{split}.tokens"]["sha256"][:16] for split in ("train", "eval"))

    @property
    def vocabulary(self) -> int | None:
        """The size that was wanted of a BPE tokenizer made for this text."""
        asked = self.manifest.get("settings", {}).get("tokenizer")
        return asked.get("vocab_size") if isinstance(asked, dict) and asked.get("kind") == "bpe" else None


class Writer:
    """Encodes the documents of one split into `<split>.tokens` and `<split>.documents`, hashing what it writes."""

    def __init__(self, path: Path, split: str, tokenizer: Tokenizer) -> None:
        self.path, self.split, self.tokenizer = path, split, tokenizer
        self.dtype = np.dtype(DTYPES[len(tokenizer) > 2**16])
        self.file: IO[bytes] = open(path / f"{split}.tokens", "wb")  # noqa: SIM115
        self.hash = hashlib.sha256()
        self.starts = array("Q")
        self.tokens = self.bytes = self.largest_id = self.lost = 0
        self.marks: dict[int, tuple[int, int, int]] = {}  # documents, tokens and bytes before each source
        self._waiting: list[str] = []

    def add(self, piece: Piece) -> None:
        if piece.first:
            self._end()
            self.marks.setdefault(piece.source, (len(self.starts), self.tokens, self.bytes))
            self.starts.append(self.tokens)
            self._write_id(self.tokenizer.start_id)
        self.bytes += piece.size
        if self.tokenizer.cuttable:
            self._encode(piece.text)
        else:  # ids may depend on the whole document
            self._waiting.append(piece.text)
            if sum(map(len, self._waiting)) > ROW:
                raise DataError(
                    f"document {len(self.starts):,} of the {self.split} split has more than {ROW:,} characters, which "
                    "this tokenizer can only encode at once: cut the text into shorter ones, as with data.separator"
                )

    def close(self) -> dict[str, int]:
        self._end()
        self.file.close()
        np.frombuffer(self.starts, dtype="<u8").tofile(self.path / f"{self.split}.documents")
        counts = {"tokens": self.tokens, "documents": len(self.starts), "bytes": self.bytes}
        lost = {} if self.tokenizer.lossless else {"lost_bytes": self.lost}
        return {**counts, "largest_id": self.largest_id, **lost}

    def parts(self, paths: list[str]) -> list[dict[str, Any]]:
        """The count of each of these sources, once all is written."""
        total, counts = (len(self.starts), self.tokens, self.bytes), []
        for number, path in reversed(list(enumerate(paths))):
            begin = self.marks.get(number, total)
            sizes = [after - before for before, after in zip(begin, total, strict=True)]
            counts.append({"path": path, **dict(zip(("documents", "tokens", "bytes"), sizes, strict=True))})
            total = begin
        return counts[::-1]

    def lengths(self, parts: list[dict[str, Any]]) -> list[np.ndarray]:
        """Tokens of every document, source by source."""
        every = np.diff(np.append(np.array(self.starts, dtype=np.int64), self.tokens))
        return np.split(every, np.cumsum([part["documents"] for part in parts])[:-1])

    def _end(self) -> None:
        if self._waiting:
            self._encode("".join(self._waiting))
            self._waiting.clear()
        if self.starts:
            self._write_id(self.tokenizer.end_id)

    def _encode(self, text: str) -> None:
        ids = self.tokenizer.encode_array(text)
        self._write(ids)
        self.lost += int(self.tokenizer.lost_bytes(text, ids)[-1])

    def _write_id(self, token: int | None) -> None:
        if token is not None:
            self._write(np.array([token], dtype=np.uint32))

    def _write(self, ids: np.ndarray) -> None:
        data = np.ascontiguousarray(ids.astype(self.dtype)).data
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(ids)
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))


def prepare(
    data: Data, asked: TokenizerConfig, path: Path, base_tokenizer: Tokenizer | None = None, own: bool | None = None
) -> Shards:
    """Opens the shards in `path`, making them first where they are missing or an input changed.

    `given` is the tokenizer of the model we start from. A folder that other runs may use (`own` is False; by default
    where `data.shards` names it) is mended if it is damaged, but not rewritten from another text or with other
    settings. Raises DataError and RunMismatch.
    """
    sources = sources_of(data.places, data)
    held_out = sources_of([data.eval], data, len(sources)) if data.eval else []
    base_tokenizer = base_tokenizer or (Tokenizer.load(asked.path, asked.pattern) if asked.path else None)
    asked = with_vocabulary(asked, sources)
    settings = _settings(data, asked, base_tokenizer)
    if (path / folder.MANIFEST).is_file():
        damage, change, verifying = _reason_to_rewrite(path, settings, sources + held_out)
        if not damage and not change:
            return replace(open_shards(path, verified=True, tokenizer=base_tokenizer), verifying=verifying)
        if change and not (data.shards is None if own is None else own):
            raise RunMismatch(
                f"{path}: these shards were made otherwise and other runs may use them: {change}; name another "
                "data.shards, ask for what they have, or delete them"
            )
        console.say(f"data     shards are rewritten: {damage or change}")
    else:
        folder.foreign_files(path, FILES)  # others' files are a reason not to begin
    tokenizer = _build(
        data, asked, base_tokenizer=base_tokenizer, sources=sources, held_out=held_out, settings=settings, path=path
    )
    return open_shards(path, verified=True, tokenizer=tokenizer)


def open_shards(path: Path, verified: bool = False, tokenizer: Tokenizer | None = None) -> Shards:
    """Maps the shards in `path` into memory, after checking every file's SHA-256. Raises DataError.

    Large ones are checked beside other work: who relies on them waits for `Shards.verifying`. `tokenizer` is the one
    beside them, if it is in memory already.
    """
    verifying = None if verified else folder.Verifying(path)
    manifest = verifying.manifest if verifying else folder.read_manifest(path)
    tokenizer = tokenizer or Tokenizer.load(path)
    if tokenizer.fingerprint != manifest.get("tokenizer"):
        raise DataError(f"{path}: the shards were made with another tokenizer than the one beside them")
    try:
        train, held_out = _stream(path, "train", manifest), _stream(path, "eval", manifest)
        if not tokenizer.lossless and "lost_bytes" not in manifest["splits"]["eval"]:
            console.warn(
                f"{path}: when it was made, nobody counted what decoding does not give back of a text; bits per byte "
                "are too low if there is any: make the shards again, as with --fresh"
            )
        return Shards(path, tokenizer, train=train, eval=held_out, manifest=manifest, verifying=verifying)
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
    parts = tuple(SourceCount(**part) for part in facts.get("sources", []))
    largest = facts.get("largest_id")  # which shards of an earlier version do not have
    return Stream(
        tokens,
        documents,
        bytes=int(facts["bytes"]),
        sources=parts,
        largest_id=largest if isinstance(largest, int) else None,
        lost_bytes=int(facts.get("lost_bytes", 0)),
    )


def check_ids(stream: Stream, tokenizer: Tokenizer, rows: int, what: str) -> None:
    """Raises DataError if the stream has an id that a model with so many rows has none for, or nothing of its text."""
    largest = stream.largest_id
    if largest is None:
        starts = range(0, len(stream.tokens), 10_000_000)
        largest = max((int(stream.tokens[i : i + 10_000_000].max()) for i in starts), default=0)
    check_rows(tokenizer, largest, rows=rows, what=what)
    if stream.lost_bytes == stream.bytes > 0:
        raise DataError(f"{what}: nothing of the text comes back from the tokenizer's ids, so that it has no score")


def _settings(data: Data, asked: TokenizerConfig, base_tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings that decide the ids. The weights of a mixture do not: they say how often the loader reads what."""
    keys = ("text_column", "separator", "eval_fraction", "eval_bytes", "encoding", "newlines", "invalid_utf8",
            "max_bad_rows", "eval")  # fmt: skip
    tokenizer: Any = base_tokenizer.fingerprint if base_tokenizer is not None else asked.model_dump(mode="json")
    train = [{"path": place} for place in data.places] if data.weights else data.train
    return {"version": VERSION, "tokenizer": tokenizer, "train": train} | {key: getattr(data, key) for key in keys}


def _hashes(sources: list[Source]) -> list[str]:
    return [folder.sha256(file) for source in sources for file in source.files + source.code]


def _stamps(sources: list[Source]) -> list[dict[str, Any]]:
    return [stamp for source in sources for stamp in source.stamp()]


def _refuse_changed(stamps: list[dict[str, Any]], sources: list[Source]) -> None:
    """Raises DataError if a file is no longer what it was when these stamps were taken."""
    for before, after in zip(stamps, _stamps(sources), strict=True):
        if before != after:
            raise DataError(f"{before['path']}: changed while it was read; run again once nothing writes to it")


def _reason_to_rewrite(
    path: Path, settings: dict[str, Any], sources: list[Source]
) -> tuple[str, str, folder.Verifying | None]:
    """The damage, and the difference from what is asked, empty where there is none; and the hashing, which may last."""
    try:
        verifying = folder.Verifying(path)
    except DataError as error:
        return str(error), _difference(_manifest(path), settings, sources), None
    return "", _difference(verifying.manifest, settings, sources), verifying


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a damaged folder as far as it can be read; empty where it cannot."""
    try:
        manifest = folder.read_json(path / folder.MANIFEST)
    except DataError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _difference(manifest: dict[str, Any], settings: dict[str, Any], sources: list[Source]) -> str:
    old = manifest.get("settings")
    if not isinstance(old, dict):
        return ""
    old = {"newlines": "keep"} | old  # as it was before there was a choice
    if changed := [key for key in settings if old.get(key) != settings[key]]:
        if changed == ["tokenizer"] and manifest["sources"] != _stamps(sources):
            return "the text changed, and with it the tokenizer"  # whose size may follow from it
        names = [key if key in ("tokenizer", "version") else f"data.{key}" for key in changed]
        return f"{', '.join(names)} changed"
    if manifest["sources"] != _stamps(sources) and manifest["source_sha256"] != _hashes(sources):
        return "the text changed"
    return ""


def with_vocabulary(asked: TokenizerConfig, sources: list[Source]) -> TokenizerConfig:
    """Gives what is asked of a tokenizer, with a size that suits the text where none is asked for."""
    if asked.vocab_size is not None:
        return asked
    size = sum(source.size for source in sources) if asked.kind == "bpe" else 0
    return asked.model_copy(update={"vocab_size": usual_vocabulary(size)})


def make_tokenizer(asked: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer for a text. Raises DataError."""
    if asked.kind == "bytes":
        return Tokenizer.of_bytes()
    if asked.kind == "char":
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        if len(alphabet) > 100_000:
            raise DataError(f"{len(alphabet):,} different characters; tokenizer.kind=bpe suits this text")
        return Tokenizer.train_characters(alphabet)
    return Tokenizer.train_bpe(texts, asked.vocab_size or USUAL_VOCABULARY, asked.pattern)


def _tokenizer_of(asked: TokenizerConfig, split: Split) -> Tokenizer:
    if asked.kind == "bytes":
        return Tokenizer.of_bytes()
    start = process_seconds()
    texts: Iterable[str] = (piece.text for piece, held_out in split.pieces() if asked.kind == "char" or not held_out)
    if asked.kind == "bpe":
        texts = sample(texts, asked.sample_bytes)
    tokenizer = make_tokenizer(asked, texts)
    console.say(f"tokens   {len(tokenizer):,} ids, {asked.kind}, trained in {process_seconds() - start:.1f} s")
    return tokenizer


def _build(
    data: Data,
    asked: TokenizerConfig,
    base_tokenizer: Tokenizer | None,
    sources: list[Source],
    held_out: list[Source],
    settings: dict[str, Any],
    path: Path,
) -> Tokenizer:
    """Writes the folder; returns its tokenizer. `held_out` are the sources of `data.eval`."""
    stamps = _stamps(sources + held_out)
    split = Split(data, sources, held_out)
    overlap = Overlap(held_out, data.eval_bytes)
    sources = sources + held_out
    size = sum(source.size for source in sources)
    tokenizer = base_tokenizer or _tokenizer_of(asked, split)
    if tokenizer.start_id is None:
        raise DataError("the tokenizer names neither bos_token nor eos_token: add one to its tokenizer_config.json")
    if tokenizer.engine == "tokenizers" and size > 3_000_000 and find_spec("gigatoken") is None:
        console.say('note     gigatoken is not installed: `pip install "gptworks[fast]"` encodes many times faster')

    facts: dict[str, Any] = {
        "version": VERSION, "settings": settings, "tokenizer": tokenizer.fingerprint,
    }  # fmt: skip
    known: dict[str, str] = {}
    progress = Progress("encoding", size)
    findings = findings_of(sources, progress.add)
    with folder.commit(path, facts, known) as aside:
        tokenizer.save(aside)
        writers = {name: Writer(aside, name, tokenizer) for name in ("train", "eval")}
        with _validation_text(aside) as keep:
            for piece, is_eval in _ahead(split.pieces(findings)):
                failpoint("shards.piece")
                writers["eval" if is_eval else "train"].add(piece)
                if is_eval:
                    keep(piece)
                else:
                    overlap.see(piece.text)
        facts["splits"] = {name: writer.close() for name, writer in writers.items()}
        known |= {f"{name}.tokens": writer.hash.hexdigest() for name, writer in writers.items()}
        facts |= {"dtype": writers["train"].dtype.str, "sources": stamps, "source_sha256": _hashes(sources)}
        _refuse_changed(stamps, sources)
        facts["split"] = split.said(facts["splits"])
        facts["found"] = _table(findings, writers, splits=facts["splits"], data=data)
        warnings = found.warnings(facts["found"]) + overlap.warnings()
        facts["findings"] = [*found.lines(facts["found"]), *warnings, *_lost(facts["splits"])]
        _refuse_empty(facts["splits"], data)
    console.clear()
    splits, documents = facts["splits"], facts["found"][-1]["documents"]
    console.say(
        f"data     {count(splits['train']['tokens'])} training and {count(splits['eval']['tokens'])} validation tokens "
        f"from {plural(documents, 'document')}, {progress.rate / 1e6:.0f} MB/s ({tokenizer.engine}); "
        f"{facts['split']}"
    )
    for line in facts["findings"]:
        if line not in warnings:
            console.say(f"data     {line}")
    for line in warnings:
        console.warn(line)
    return tokenizer


def _table(
    findings: list[Findings], writers: dict[str, Writer], splits: dict[str, Any], data: Data
) -> list[dict[str, Any]]:
    """Adds to `splits` what each source has in them; returns the table of all that was found."""
    parts = {name: writer.parts([one.name for one in findings]) for name, writer in writers.items()}
    splits["train"]["sources"] = parts["train"][: len(data.places)]
    splits["eval"]["sources"] = [row for row in parts["eval"] if row["documents"]]
    halves = zip(*(writer.lengths(parts[name]) for name, writer in writers.items()), strict=True)
    lengths = [np.concatenate(both) for both in halves]
    for number, one in enumerate(findings):  # of a text of which a part was taken, that part
        used = [parts[name][number] for name in writers]
        one.bytes = sum(part["bytes"] for part in used)
        one.documents = min(one.documents, sum(part["documents"] for part in used))
    # The one document that was split by position is counted whole.
    whole = [n.sum(keepdims=True) if one.documents == 1 else n for n, one in zip(lengths, findings, strict=True)]
    return found.table(findings, whole)


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


def _lost(splits: dict[str, Any]) -> list[str]:
    """Says what decoding does not give back of the text, if there is any."""
    lost, size = (sum(facts.get(key, 0) for facts in splits.values()) for key in ("lost_bytes", "bytes"))
    return [lost_words(lost, size)] if lost else []


def lost_words(lost: int, size: int) -> str:
    """Says how much of a text decoding does not give back, and what that costs."""
    return (
        f"{lost:,} of {size:,} bytes ({lost / size:.2%}) do not come back from the ids; in bits per byte each counts "
        "8 bits, or what the others need where that is more"
    )


def _refuse_empty(splits: dict[str, Any], data: Data) -> None:
    """Raises DataError where there is nothing to predict."""
    for name, facts in splits.items():
        if facts["tokens"] < 2:
            where = listed(data.places) if name == "train" or not data.eval else data.eval
            hint = (
                "; every document may be the same, or data.eval_fraction too large"
                if name == "train"
                else "; give data.eval a file, or a larger data.eval_fraction or data.eval_bytes"
            )
            raise DataError(f"{where}: no text for the {name} split{hint}")
    for part in splits["train"]["sources"] if data.weights else ():
        if part["tokens"] < 2:
            raise DataError(f"{part['path']}: too little text to be a source of its own; join it with another")


class _validation_text:
    """Writes validation.jsonl, one document a line, while the shards are written; a document is never held whole."""

    def __init__(self, path: Path) -> None:
        self.file = open(path / "validation.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self.end = ""  # of the line before

    def __enter__(self) -> Callable[[Piece], None]:
        return self.keep

    def keep(self, piece: Piece) -> None:
        begin = self.end + '{"text": "' if piece.first else ""
        self.file.write(begin + json.dumps(piece.text, ensure_ascii=False)[1:-1])
        self.end = '"}\n'

    def __exit__(self, *error: object) -> None:
        self.file.write(self.end)
        self.file.close()


def same_data(shards: Shards, identity: object) -> None:
    """Raises RunMismatch unless these are the ids a run was trained on."""
    if shards.identity != identity:
        raise RunMismatch(f"{shards.path}: the training text is not the one this run began with; --fresh starts over")


PROMPTS = 2  # of a run whose text has none
PROMPT_CHARACTERS, PROMPT_WORDS = 32, 4  # at most, of a text with blanks; of one without, a quarter of the characters
LOOKED_AT = 20_000  # tokens of a split, in which prompts are looked for


def beginnings(stream: Stream, tokenizer: Tokenizer, most_tokens: int) -> list[str]:
    """The first words of lines that lie a third apart, as the tokenizer gives them back; the same for the same ids."""
    bounds = np.append(stream.documents, len(stream.tokens))
    lines: list[str] = []
    for begin, end in zip(bounds[:-1].tolist(), np.minimum(bounds[1:], LOOKED_AT).tolist(), strict=True):
        if begin >= end:
            break
        whole = tokenizer.decode(stream.tokens[begin:end], skip_control=True).splitlines()
        lines += whole[1:] or whole  # the first one may be cut: a document that is split by position goes on in it
    words = [line.split()[:PROMPT_WORDS] for line in lines]
    texts = [" ".join(each)[: PROMPT_CHARACTERS if len(each) > 1 else PROMPT_CHARACTERS // 4].strip() for each in words]

    def suits(text: str) -> bool:
        try:
            ids = tokenizer.encode(text)
        except DataError:
            return False
        return 0 < len(ids) <= most_tokens and tokenizer.decode(ids) == text and "\ufffd" not in text

    fitting = list(dict.fromkeys(text for text in texts if text and suits(text)))
    places = [len(fitting) * (1 + n) // (1 + PROMPTS) for n in range(PROMPTS)]
    return [fitting[place] for place in dict.fromkeys(places)] if fitting else []


def edited(path: Path, data: Data) -> str | None:
    """The first file of the text that is not what the shards in `path` were made from; None where there is none, or the
    text cannot be looked at."""
    try:
        manifest = folder.read_manifest(path)
        before, files = set(manifest["source_sha256"]), list[Path]()
        for place in [*data.places, *([data.eval] if data.eval else [])]:
            own = file_of(place) if re.search(r"\.py:\w+$", place) else None  # which is not run for this
            files += [own] if own else Source(place, data).files
        unchanged = {(stamp["path"], stamp["bytes"], stamp["mtime_ns"]) for stamp in manifest["sources"]}
        for file in files:
            stamp = (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
            if stamp not in unchanged and folder.sha256(file) not in before:
                return str(file)
        return None if len(files) == len(manifest["sources"]) else listed(data.places)
    except (GptworksError, OSError, KeyError, TypeError):
        return None


def read_documents(path: str, data: Data) -> list[str]:
    """Every document of a file or folder, in memory; says what is probably not as it was meant. Raises DataError."""
    documents: list[list[str]] = []
    findings = Findings(path)
    for piece in Source(path, data).pieces(findings):
        if piece.first:
            documents.append([])
        documents[-1].append(piece.text)
    if not documents:
        raise DataError(f"{path}: no text")
    for line in findings.warnings():
        console.warn(line if line.startswith(path) else f"{path}: {line}")
    return ["".join(parts) for parts in documents]


def encode_documents(
    documents: list[str], tokenizer: Tokenizer, places: list[list[int]] | None = None
) -> tuple[Stream, np.ndarray]:
    """Documents as one stream of ids in memory; and how many ids come before each place of a document and its end.

    `places` has, for each document, positions as `Tokenizer.encode_marked` takes them; -1 where a token spans one.
    """
    front, back = (
        np.array([token] if token is not None else [], dtype=np.uint32)
        for token in (tokenizer.start_id, tokenizer.end_id)
    )
    starts, parts, marks, position = [], [], [], 0
    lost, lost_before = 0, []
    for number, document in enumerate(documents):
        ids, before = tokenizer.encode_marked(document, places[number] if places else [])
        lost_before.append(lost + tokenizer.lost_bytes(document, ids, places[number] if places else []))
        lost = int(lost_before[-1][-1])
        starts.append(position)
        marks.append(np.where(before < 0, -1, before + position + len(front)))
        parts += [front, ids.astype(np.uint32), back]
        position += len(front) + len(ids) + len(back)
        marks.append(np.array([position]))
    size = sum(len(document.encode("utf-8", "replace")) for document in documents)
    begins = np.array(starts, dtype=np.int64)
    stream = Stream(np.concatenate(parts), begins, size, lost_bytes=lost, lost_before=np.concatenate(lost_before))
    return stream, np.concatenate(marks)
