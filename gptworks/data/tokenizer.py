"""Text to ids and back: byte-level BPE trained here, characters, bytes, or a published vocabulary.

A tokenizer is its Hugging Face files (`tokenizer.json`, `tokenizer_config.json`). Ids are those of the `tokenizers`
library with `encode_special_tokens=True`: text that looks like a control token is encoded as text.
"""

import hashlib
import heapq
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gptworks.core import folder
from gptworks.core.errors import DataError, UsageError
from gptworks.core.runtime import interrupts
from gptworks.data import published, sentencepiece
from gptworks.data.published import END_OF_TEXT, byte_alphabet, splitting

RESERVED = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")  # ChatML's, so that chat tuning needs no new rows

# How text is split before BPE, under the names that llama.cpp gives these rules (tokenizer.ggml.pre).
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,  # cl100k_base's too
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|"
    + rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
USUAL_VOCABULARY = 4096
LONG_WORD = 1000  # characters: the trainer takes what is longer for several words
LONG_TEXT = 4_000_000  # characters, which take a second or more to encode
STRETCH = 1000  # characters that are compared with what decoding gives back at a time
LONG_STRETCH = 50_000
CONTEXT = 4  # tokens before others that their decoding may depend on
_UNBROKEN = re.compile(rf"\S{{{LONG_WORD}}}|\s{{{LONG_WORD}}}")
SPANNING = ("gpt-4o",)  # rules by which a token may go on over a newline after a letter or mark


class Tokenizer:
    """Encodes text to ids below `len(self)` and decodes them. Make one with `train_*`, or `load`."""

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        self.backend = backend
        self.config = config
        backend.no_padding()
        backend.no_truncation()
        self.eos_id = self._named("eos_token")
        self.bos_id = self._named("bos_token")
        ids = backend.get_vocab(with_added_tokens=True).values()
        self._size = max(ids, default=-1) + 1
        if len(set(ids)) < len(ids):
            raise DataError("tokenizer.json gives one id to two tokens")
        self._state = json.loads(backend.to_str())
        self._fast: Any = None
        self._characters = self._character_table()
        self._bytes = self._is_bytes()
        self.lossless = self._is_lossless()  # known from its parts; else what a text loses is counted

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._size

    def _named(self, name: str) -> int | None:
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if not token:
            return None
        number = self.backend.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise DataError(
                f"tokenizer_config.json names {str(token)[:80]!r} as {name}, which the vocabulary does not have"
            )
        return number

    # -- what a document is --------------------------------------------------------------------------------------

    @property
    def start_id(self) -> int | None:
        """The token a document begins with: bos, or end-of-text where there is no bos (GPT-2's way)."""
        return self.bos_id if self.bos_id is not None else self.eos_id

    @property
    def front(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: bos, for some."""
        try:
            encoding = self.backend.encode("a", add_special_tokens=True)
        except Exception:  # a vocabulary without that letter; plain Exceptions of the library
            encoding = self.backend.encode("", add_special_tokens=True)
        return [id for id, _ in takewhile(itemgetter(1), zip(encoding.ids, encoding.special_tokens_mask, strict=True))]

    @property
    def end_id(self) -> int | None:
        """The token a document ends with, where that is not simply the start of the next one."""
        return self.eos_id if self.eos_id != self.start_id else None

    @property
    def pattern(self) -> str | None:
        """llama.cpp's name of the split pattern; None if it is none of ours."""
        pre = self._state.get("pre_tokenizer") or {}
        if pre.get("type") == "ByteLevel" and pre.get("use_regex") and not pre.get("add_prefix_space"):
            return "gpt-2"
        match pre.get("pretokenizers"):
            case [
                {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": rule}},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]:
                return next((name for name, pattern in PATTERNS.items() if pattern == rule), None)
        return None

    @property
    def cuttable(self) -> bool:
        """True where pieces of a document encode to the ids of the whole (see `text.SAFE_CUT`)."""
        if self._characters is not None or self._bytes:
            return True
        if self.pattern is None or self.pattern in SPANNING:
            return False
        return self._state.get("normalizer") is None and not _plain_added(self._state)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the ids."""
        core = {key: self._state.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        text = json.dumps([core, self.eos_id, self.bos_id], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    # -- text to ids and back ------------------------------------------------------------------------------------

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of `text`, nothing added. With `control`, reserved tokens spelled out in the text become their ids.

        Raises DataError, naming them, for characters that a character-level vocabulary lacks.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text
        if control:
            self._check_characters(text)
            self.backend.encode_special_tokens = False
            with _panics(f"{len(text):,} characters cannot be encoded"):
                return self.backend.encode(text, add_special_tokens=False).ids
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, but returns a uint32 array, as fast as this installation can."""
        if self._characters is not None:
            return self._encode_characters(text)
        if self._bytes:
            return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint32)
        if self._fast is None:
            self._fast = _gigatoken(self._state) or self._slow
        return self._fast(text) if len(text) < LONG_TEXT else interrupts.apart(lambda: self._fast(text))

    def encode_marked(self, text: str, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text`, and how many of them lie before each of `places`; -1 where a token spans it.

        `places` are character positions from `text.safe_places`, ascending.
        """
        if self.cuttable or not places:
            parts = [self.encode_array(text[a:b]) for a, b in pairwise([0, *places, len(text)])]
            return np.concatenate(parts), np.cumsum([len(part) for part in parts])[:-1]
        self.backend.encode_special_tokens = True
        with _panics(f"{len(text):,} characters cannot be encoded"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        before, reach = self._cuts(text, _Tokens.of(encoding), places=np.array(places))
        return np.array(encoding.ids, dtype=np.uint32), np.where(reach < 0, -1, before)

    def _cuts(self, text: str, tokens: "_Tokens", places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts the tokens that begin before each of `places`, and says how far these reach; -1 where it is no cut."""
        before = np.searchsorted(tokens.starts, places)
        reach = np.append(0, np.maximum.accumulate(tokens.ends))[before]
        spanned = reach > places
        if self._drops:  # then the library tells wrong where in a word its tokens are, but for the first
            first = np.append(np.diff(tokens.words, prepend=-1) != 0, False)[before]
            spaces = np.array([text[place : place + 1].isspace() for place in places.tolist()], dtype=bool)
            spanned |= ~first | (np.append(tokens.starts, 0)[before] > places + spaces)  # a space may be no word's
        return before, np.where(spanned, -1, reach)

    def lost_bytes(self, text: str, ids: np.ndarray, places: Sequence[int] = ()) -> np.ndarray:
        """Counts bytes of `text`, before each of `places` and in all, that decoding its `ids` does not give back.

        What comes back is the longest sequence of characters that both the text and the decoded text have, in order;
        what an unknown token stands for does not. `places` are as in `encode_marked`; one that a token spans has the
        count of the place before.
        """
        counts = np.zeros(len(places) + 1, dtype=np.int64)
        if self.lossless or self.decode(ids[ids != self._unknown_id]) == text:
            return counts
        self.backend.encode_special_tokens = True
        every = _Tokens.of(self.backend.encode(text, add_special_tokens=False))
        tokens = every.only(every.ids != self._unknown_id)
        free = tokens.starts[self._cuts(text, tokens, places=tokens.starts)[1] >= 0]
        regular = free[np.searchsorted(free, np.arange(STRETCH, free.max(initial=0), STRETCH))]
        cuts = np.union1d(regular, places).astype(np.int64)
        lost = start = begin = 0
        for place, end, reach in zip(
            cuts.tolist(), *(each.tolist() for each in self._cuts(text, tokens, places=cuts)), strict=True
        ):
            if reach >= 0:
                stop = place
                while stop > max(start, reach) and text[stop - 1].isspace():  # decoded with what follows it
                    stop -= 1
                lost += _unmatched(text[start:stop], self._decoded(tokens.ids, begin, end))
                start, begin = stop, end
            counts[:-1][np.equal(places, place)] = lost
        counts[-1] = lost + _unmatched(text[start:], self._decoded(tokens.ids, begin, len(tokens.ids)))
        return counts

    def _decoded(self, ids: np.ndarray, begin: int, end: int) -> str:
        """Decodes `ids[begin:end]` after some that stand before, since decoders may drop a text's first space."""
        before = max(begin - CONTEXT, 0)
        return self.decode(ids[before:end])[len(self.decode(ids[before:begin])) :]

    def _slow(self, text: str) -> np.ndarray:
        self.backend.encode_special_tokens = True
        with _panics(f"{len(text):,} characters cannot be encoded"):
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    @property
    def engine(self) -> str:
        """Which implementation encodes."""
        if self._characters is not None:
            return "characters"
        if self._bytes:
            return "bytes"
        self.encode_array("")
        return "tokenizers" if self._fast == self._slow else "gigatoken"

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """The text of `ids`; control tokens are spelled out unless skipped. Partial UTF-8 becomes U+FFFD."""
        with _panics("ids cannot be decoded"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def _character_table(self) -> tuple[np.ndarray, np.ndarray] | None:
        model = self._state.get("model") or {}
        if model.get("type") != "WordLevel" or "gptworks_characters" not in json.dumps(self.config):
            return None
        pairs = sorted((ord(token), id) for token, id in model["vocab"].items() if len(token) == 1)
        return np.array([p for p, _ in pairs], dtype=np.uint32), np.array([i for _, i in pairs], dtype=np.uint32)

    def _is_bytes(self) -> bool:
        """True where ids below 256 are bytes and nothing merges."""
        model = self._state.get("model") or {}
        plain = model.get("type") == "BPE" and not model.get("merges") and not model.get("ignore_merges")
        if not plain or self._state.get("normalizer") or _plain_added(self._state):
            return False
        vocab, pre = model.get("vocab") or {}, self._state.get("pre_tokenizer") or {}
        return pre.get("type") == "ByteLevel" and all(vocab.get(c) == byte for byte, c in enumerate(byte_alphabet()))

    def _is_lossless(self) -> bool:
        """True where the parts alone say that decoding gives back every byte of any text that can be encoded."""
        decoder = (self._state.get("decoder") or {}).get("type")
        if self._characters is not None:
            return bool(decoder == "Fuse")
        model = self._state.get("model") or {}
        whole = model.get("type") == "BPE" and not any(
            model.get(part) for part in ("continuing_subword_prefix", "end_of_word_suffix")
        )
        plain = not self._state.get("normalizer") and not _plain_added(self._state) and decoder == "ByteLevel"
        split = self._bytes or self.pattern is not None
        return bool(whole and plain and split and all(letter in model["vocab"] for letter in byte_alphabet()))

    @property
    def _drops(self) -> bool:
        """True where characters that are not in the vocabulary leave no token behind."""
        model = self._state.get("model") or {}
        if model.get("type") != "BPE" or model.get("byte_fallback") or self._unknown_id >= 0:
            return False
        return any(letter not in model["vocab"] for letter in byte_alphabet())

    @property
    def _unknown_id(self) -> int:
        """The id that stands for text that is not in the vocabulary; -1 without one."""
        model = self._state.get("model") or {}
        if "unk_id" in model:
            return -1 if model["unk_id"] is None else int(model["unk_id"])
        return int(model.get("vocab", {}).get(model.get("unk_token"), -1))

    def _encode_characters(self, text: str) -> np.ndarray:
        assert self._characters is not None
        points, ids = self._characters
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        place = np.searchsorted(points, characters, side="right") - 1  # -1, the largest, where `given` is below all
        unknown = points[place] != characters if len(points) else np.ones(len(characters), dtype=bool)
        if unknown.any():
            raise self._unknown(sorted({chr(c) for c in characters[unknown][:100_000]}))
        return ids[place]

    def _check_characters(self, text: str) -> None:
        if self._characters is not None:
            rest = text
            for token in self.control_tokens:
                rest = rest.replace(token, "")
            self._encode_characters(rest)

    @staticmethod
    def _unknown(characters: list[str]) -> DataError:
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:8])
        more = f" and {len(characters) - 8} more" if len(characters) > 8 else ""
        return DataError(f"not in this character-level vocabulary: {shown}{more}; tokenizer.kind=bpe takes any text")

    @property
    def control_tokens(self) -> dict[str, int]:
        """Reserved tokens and their ids."""
        return {t["content"]: t["id"] for t in self._state.get("added_tokens", []) if t.get("special")}

    def with_control(self, tokens: list[str]) -> "Tokenizer":
        """This tokenizer with more control tokens, whose ids follow. Raises UsageError if it has one already."""
        backend = Backend.from_str(self.backend.to_str())
        for number, token in enumerate(tokens):
            if not token.strip() or backend.token_to_id(token) is not None:
                raise UsageError(f"token {token[:80]!r} " + ("is blank" if not token.strip() else "is there already"))
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            if backend.token_to_id(token) != len(self) + number:
                raise DataError(f"token {token[:80]!r} cannot be added: the ids of the tokenizer have gaps")
        return Tokenizer(backend, self.config)

    # -- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer opens."""
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=False), encoding="utf-8")
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        (path / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, pattern: str = "qwen2") -> "Tokenizer":
        """Opens a tokenizer.json, a tiktoken file, GPT-2's vocabulary and merges, a SentencePiece model, or a folder
        with one of these.

        `pattern` says how text is split where tiktoken ranks of unknown origin do not. Raises DataError.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        config_file = file.parent / "tokenizer_config.json"
        config = folder.read_json(config_file) if config_file.is_file() else {}
        if not isinstance(config, dict):
            raise DataError(f"{config_file}: not a JSON object")
        if "added_tokens_decoder" not in config and (older := file.parent / "special_tokens_map.json").is_file():
            named = folder.read_json(older)
            config = {**config, **(named if isinstance(named, dict) else {})}
        if not path.is_dir() or not file.is_file():
            if other := published.find(path):
                backend, config = published.load(other, PATTERNS, pattern=pattern, config=config)
                return cls(backend, {**_config(), "eos_token": None, "pad_token": None, **config, **_class()})
            if other := sentencepiece.find(path):
                return cls(*sentencepiece.load(other, config))
        if not file.is_file():
            raise DataError(
                f"{file}: no such file; a tokenizer is a tokenizer.json, a .tiktoken file, a vocab.json with its "
                "merges.txt, SentencePiece's tokenizer.model, or a folder with one of these"
            )
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            backend = Backend.from_str(text)
        except BaseException as error:  # the library's Rust errors and panics are plain Exceptions or BaseExceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            raise DataError(f"{file}: not a usable tokenizer.json: {error}") from None
        if "eos_token" not in config and backend.token_to_id(END_OF_TEXT) is not None:
            config = {**config, "eos_token": END_OF_TEXT}
        tokenizer = cls(backend, config)
        if max(backend.encode("", add_special_tokens=True).ids, default=0) >= max(len(tokenizer), 1):
            raise DataError(f"{file}: its post_processor puts ids before a text that its vocabulary does not have")
        return tokenizer

    # -- training ------------------------------------------------------------------------------------------------

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, pattern: str) -> "Tokenizer":
        """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2): the 256 bytes, the reserved tokens, merges."""
        backend = splitting(Backend(models.BPE()), PATTERNS[pattern], pattern)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(RESERVED),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.encode_special_tokens = True
        interrupts.apart(lambda: backend.train_from_iterator(_short(texts, backend.pre_tokenizer), trainer))
        return cls(backend, _config())

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Ids 0 to 255 are the bytes of UTF-8; the reserved tokens follow."""
        vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
        vocab |= {token: 256 + number for number, token in enumerate(RESERVED)}
        backend = splitting(Backend(models.BPE(vocab, [])), None, "bytes")
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in RESERVED])
        return cls(backend, _config())

    @classmethod
    def train_characters(cls, alphabet: Iterable[str]) -> "Tokenizer":
        """One id for each character of `alphabet`, in code-point order, after end-of-text."""
        vocab = {END_OF_TEXT: 0} | {c: i for i, c in enumerate(sorted(set(alphabet)), start=1)}
        # [UNK] is not in the vocabulary, so that other libraries raise on an unknown character too.
        backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return cls(backend, {**_config(), "gptworks_characters": True})


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text, with where each begins and ends in it, and the word that it is of."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    words: np.ndarray

    @classmethod
    def of(cls, encoding: Any) -> "_Tokens":
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        return cls(np.array(encoding.ids, dtype=np.int64), starts=spans[:, 0], ends=spans[:, 1], words=words)

    def only(self, which: np.ndarray) -> "_Tokens":
        return _Tokens(self.ids[which], starts=self.starts[which], ends=self.ends[which], words=self.words[which])


def check_rows(tokenizer: Tokenizer, largest: int, *, rows: int, what: str) -> None:
    """Raises DataError for an id that a model with so many rows cannot take: published folders have tokens beyond
    their rows, which harm nobody until one is met. Of `tokenizer`, which may be a problem's own, it asks `decode`."""
    if largest >= rows:
        token = tokenizer.decode([largest])[:80]
        raise DataError(f"{what}: token id {largest} ({token!r}) is beyond the model's vocabulary of {rows}")


@contextmanager
def _panics(what: str) -> Iterator[None]:
    """A Rust panic, as of a split pattern that gives up on ten million spaces, is no Exception; a DataError is."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise DataError(f"{what}: {error}") from None
        raise


def _class() -> dict[str, Any]:
    """`PreTrainedTokenizerFast`, since transformers re-splits the text of a GPT-2 folder under its own class."""
    return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _config() -> dict[str, Any]:
    return {
        **_class(),
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }


def _short(texts: Iterable[str], pre_tokenizer: Any) -> Iterator[str]:
    """The trainer holds every pre-token of a text at once: hand it lines, cut where no pre-token is.

    A merge in a pre-token costs as much as the pre-token is long: text without spaces took a hundred times as long as
    the same in lines. A pre-token that no word is as long as is cut.
    """
    for text in texts:
        for line in re.split(r"(?<=\S\n)(?=\S)", text):
            start = 0
            if len(line) > LONG_WORD and _UNBROKEN.search(line):
                for _, (begin, end) in pre_tokenizer.pre_tokenize_str(line):
                    for place in range(begin + LONG_WORD, end, LONG_WORD):
                        yield line[start:place]
                        start = place
            yield line[start:]


def _unmatched(text: str, back: str) -> int:
    """Counts the bytes of `text` that are not in its longest common subsequence with `back` (Hyyrö 2004, Bit-parallel
    LCS-length computation revisited).

    A character stands once for each of its bytes, so that those that weigh more are matched first.
    """
    if text == back:
        return 0
    if len(text) > LONG_STRETCH:  # in parts that match at most as well, since the work grows with the square
        half, other = len(text) // 2, len(back) // 2
        return _unmatched(text[:half], back[:other]) + _unmatched(text[half:], back[other:])
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    points = points.repeat(np.searchsorted([0x80, 0x800, 0x10000], points, side="right") + 1)
    masks = {c: int.from_bytes(np.packbits(points == ord(c), bitorder="little").tobytes(), "little") for c in set(back)}
    rest = every = (1 << len(points)) - 1  # a bit for each byte that is not matched
    for character in back:
        mask = masks[character]
        for _ in range(len(character.encode("utf-8", "replace")) if mask else 0):
            match = rest & mask
            rest = ((rest + match) | (rest - match)) & every
    return rest.bit_count()


def _plain_added(state: dict[str, Any]) -> bool:
    """True where there are added tokens that are not control tokens: those are found in text wherever they stand."""
    return any(not token.get("special") for token in state.get("added_tokens", []))


def _gigatoken(state: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
    """gigatoken's encoder if it is installed, knows this tokenizer and proves equal on a trial text; else None."""
    if _plain_added(state):
        return None
    try:
        import gigatoken

        # Without added tokens it treats their spelling as plain text, as encode_special_tokens=True does.
        encode = gigatoken.Tokenizer.from_json(json.dumps({**state, "added_tokens": []})).encode
    except Exception:  # not installed, or a tokenizer it does not know: the library that defines the ids serves
        return None
    backend = Backend.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    trial = "It's 12345 words:\r\n\n  déjà vu, 红楼梦! \t<|endoftext|><|im_start|>user\n 'Ve x_1 "
    trial += "+= ﬁn\u0301 🎉👩‍👧 \u00a0\u3000end "
    try:
        same = backend.encode(trial, add_special_tokens=False).ids == list(encode(trial))
    except Exception:
        return None
    return encode if same else None


GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def usual_vocabulary(size: int) -> int:
    """A size of a BPE vocabulary that suits a text of so many bytes; 0 bytes stand for a text of unknown length.

    Sizes were compared on texts of 1 to 100 MB at equal time (docs/log.md): a larger one packs more text into a token,
    and needs more text for the rows of its rare tokens.
    """
    if not size:
        return USUAL_VOCABULARY
    return int(min(max(2 ** round(math.log2(4096 * (size / 9e6) ** 0.25)), 512), 65536))


def sample(pieces: Iterable[str], limit: int) -> list[str]:
    """At most `limit` bytes spread evenly over a stream of any length, so that training fits into memory.

    Part n draws the fraction of n times the golden ratio, and the lowest are kept: the gaps between such n have at most
    three lengths (Slater 1967, Gaps and steps for the sequence n theta mod 1).
    """
    size = min(max(limit // 64, 1), 65536)  # of a part, in characters
    kept: list[tuple[int, int, bytes]] = []  # a heap of (-draw, number, part)
    number = taken = 0
    bound = 2**64  # all kept draw less
    for text in pieces:
        for start in range(0, len(text), size):
            number += 1
            if (drawn := number * GOLDEN % 2**64) < bound:
                part = text[start : start + size].encode("utf-8", "replace")
                heapq.heappush(kept, (-drawn, number, part))
                taken += len(part)
                while taken > limit:
                    highest, _, part = heapq.heappop(kept)
                    bound, taken = -highest, taken - len(part)
    return [part.decode("utf-8") for _, _, part in sorted(kept, key=itemgetter(1))]
