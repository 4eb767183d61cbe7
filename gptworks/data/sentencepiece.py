"""SentencePiece's model files as one of `tokenizers`.

The file is a protocol buffer (sentencepiece_model.proto), of which a few fields are read. Ids are those of
SentencePiece's `encode`; a model for which that cannot be promised is refused.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from gptworks.core.errors import DataError
from gptworks.data.published import SAVE, added_beside, begin_with

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MOST = 64_000_000  # bytes of a file; Gemma's, with 256,000 pieces, has 4 MB
SPACE = "\u2581"  # what stands for a space
MODEL_TYPE, AS_SUFFIX, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID = 3, 24, 35, 40, 41, 42  # fields of TrainerSpec
CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5  # of NormalizerSpec
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
FAR = 1e4  # below the score of any piece


@dataclass
class Piece:
    text: str
    score: float
    kind: int


def find(path: Path) -> Path | None:
    """The model file that `path` is or holds."""
    if path.is_dir():
        return next((path / name for name in NAMES if (path / name).is_file()), None)
    return path if path.suffix == ".model" and path.is_file() else None


def load(file: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The backend of a model file; and `config`, its tokenizer_config.json, completed. Raises DataError."""
    if file.stat().st_size > MOST:
        raise DataError(f"{file}: {file.stat().st_size:,} bytes are no SentencePiece model")
    try:
        return _load(file, config)
    except DataError:
        raise
    except BaseException as error:  # of a message that is none; and the library's errors and panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise DataError(f"{file}: not a SentencePiece model") from None


def _load(file: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    parts = _message(file.read_bytes())
    trainer, normalizer = _message(parts[2][-1]), _message(parts[3][-1])
    pieces = [_piece(_message(raw)) for raw in parts[1]]
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError
    if why := _otherwise(pieces, trainer, normalizer):
        raise DataError(
            f"{file}: {why}, which cannot be had here with SentencePiece's ids; {SAVE} (with sentencepiece)"
        )
    prefix = bool(normalizer.get(DUMMY_PREFIX, [1])[-1])
    backend = Backend(_model(pieces, trainer))
    backend.normalizer = normalizers.Sequence(list(_normalizers(normalizer, prefix)))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_special_tokens([_added(piece.text) for piece in pieces if piece.kind in (UNKNOWN, CONTROL)])
    # Found in the text once its spaces are replaced, as SentencePiece does it.
    symbols = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    backend.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    for id, token in sorted(added_beside(file, config, special=True).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            raise DataError(f"{file.parent}: token {token.content[:80]!r} cannot have id {id} beside {file.name}")
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, field, usual in (("bos_token", BOS_ID, 1), ("eos_token", EOS_ID, 2)):
        place = trainer.get(field, [usual])[-1]
        if name not in config and place < len(pieces):  # -1, for none, is stored as 2^64 - 1
            config[name] = pieces[place].text
    start = config.get("bos_token")
    start = start.get("content") if isinstance(start, dict) else start
    if isinstance(start, str) and config.get("add_bos_token", True):
        begin_with(backend, start)
    return backend, config


def _message(raw: bytes) -> dict[int, list[Any]]:
    """The fields of a message by their numbers, each with its values in order: whole numbers, or bytes not read yet."""
    fields: dict[int, list[Any]] = {}
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while shift < 70:
            byte = raw[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError

    while place < len(raw):
        key = number()
        if key & 7 == 0:
            value: Any = number()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or (number() if key & 7 == 2 else -1)
            value = raw[place : place + size]
            if size != len(value):
                raise ValueError
            place += size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _piece(fields: dict[int, list[Any]]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, [bytes(4)])[-1])
    return Piece(fields[1][-1].decode(), score, fields.get(3, [NORMAL])[-1])


def _otherwise(pieces: list[Piece], trainer: dict[int, list[Any]], normalizer: dict[int, list[Any]]) -> str | None:
    """Names the parts of a model that `tokenizers` would compute differently."""
    kinds = {piece.kind for piece in pieces}
    algorithm = trainer.get(MODEL_TYPE, [UNIGRAM])[-1]
    known = {piece.text for piece in pieces if piece.kind == NORMAL}
    if algorithm not in (UNIGRAM, BPE):
        return "it is a model of words or characters"
    if trainer.get(AS_SUFFIX, [0])[-1] or not normalizer.get(ESCAPE_SPACES, [1])[-1]:
        return "spaces follow their words or stay spaces"
    if UNUSED in kinds:
        return "it has pieces that are not to be used"
    if USER_DEFINED in kinds and normalizer.get(DUMMY_PREFIX, [1])[-1]:
        return "it has symbols of its own and puts a space before a text"
    if algorithm == BPE:
        scores = [piece.score for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1]
        return "two of its pieces have one score" if len(set(scores)) < len(scores) else None
    if USER_DEFINED in kinds:
        return "it weighs symbols of its own against other readings"
    # Then what is unknown is a matter of single characters, and what has a name is never the best reading of text.
    if any(character not in known for piece in pieces for character in piece.text):
        return "a piece has a character that is no piece"
    return None


def _model(pieces: list[Piece], trainer: dict[int, list[Any]]) -> models.Model:
    falls_back = bool(trainer.get(BYTE_FALLBACK, [0])[-1])
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    if trainer.get(MODEL_TYPE, [UNIGRAM])[-1] == UNIGRAM:
        least = min(normal.values(), default=0.0) - FAR
        scores = [(piece.text, normal.get(piece.text, least)) for piece in pieces]
        return models.Unigram(scores, trainer.get(UNK_ID, [0])[-1], falls_back)
    merges: list[tuple[str, str]] = []
    for whole in sorted((text for text in normal if len(text) > 1), key=lambda text: -normal[text]):
        cuts = ((whole[:at], whole[at:]) for at in range(1, len(whole)))
        merges += [(left, right) for left, right in cuts if left in normal and right in normal]
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=falls_back)


def _normalizers(normalizer: dict[int, list[Any]], prefix: bool) -> Iterator[normalizers.Normalizer]:
    if rules := normalizer.get(CHARSMAP, [b""])[-1]:
        yield normalizers.Precompiled(rules)
    if normalizer.get(REMOVE_SPACES, [1])[-1]:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _added(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
