"""Vocabularies as others publish them — tiktoken's ranks, GPT-2's vocabulary and merges — as one of `tokenizers`.

Ids are those of the library that each comes from; the result is saved as an ordinary tokenizer.json.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gptworks.core.errors import DataError

END_OF_TEXT = "<|endoftext|>"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # of GPT-2's format, as two publishers name them
MOST = 64_000_000  # bytes of a file; the largest vocabulary in use has 4 MB
LONGEST = 1024  # bytes of a token; the longest in use has 128

# Of a tiktoken vocabulary, by its number of ranks: how text is split, and the ids of its control tokens.
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
TIKTOKEN: dict[int, tuple[str, dict[str, int]]] = {
    50256: ("gpt-2", {END_OF_TEXT: 50256}),  # r50k_base
    50280: ("gpt-2", {END_OF_TEXT: 50256}),  # p50k_base
    100256: ("llama-bpe", {END_OF_TEXT: 100257, **_FIM}),  # cl100k_base
    199998: ("gpt-4o", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),  # o200k_base
}


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019): itself where it is
    printable, else the next free one from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def splitting(backend: Backend, rule: str | None, name: str) -> Backend:
    """Gives a backend the pre-tokenizer of a rule (`name`: llama.cpp's; no rule: none) and the byte-level decoder."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt-2")
    if rule is None or name == "gpt-2":  # ByteLevel's own rule; spelled out as a Split, other software does not know it
        backend.pre_tokenizer = bytes_of
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), bytes_of])
    backend.decoder = decoders.ByteLevel()
    return backend


def find(path: Path) -> Path | None:
    """The vocabulary file that `path` names or holds, if it is one of these formats."""
    if path.is_dir():
        return next(
            (path / name for name, merges in PAIRS if (path / name).is_file() and (path / merges).exists()), None
        )
    known = path.suffix == ".tiktoken" or any(path.name == name for pair in PAIRS for name in pair)
    return path if known and path.is_file() else None


def load(path: Path, patterns: dict[str, str], pattern: str) -> tuple[Backend, str | None]:
    """The backend of a vocabulary file, and its end-of-text token if it has one. Raises DataError.

    `pattern` names the rule for ranks of unknown origin.
    """
    if path.stat().st_size > MOST:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes are no vocabulary")
    if path.suffix == ".tiktoken":
        ranks = _ranks(path)
        pattern, control = TIKTOKEN.get(len(ranks), (pattern, {END_OF_TEXT: max(ranks.values()) + 1}))
        vocab, merges = _from_ranks(ranks)
    else:
        vocab, merges = _pair(path)
        pattern, control = "gpt-2", {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    try:
        model = models.BPE(vocab | control, merges, ignore_merges=path.suffix == ".tiktoken")
    except Exception as error:  # the library's own
        raise DataError(f"{path}: not a usable vocabulary: {error}") from None
    backend = splitting(Backend(model), patterns[pattern], pattern)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return backend, END_OF_TEXT if control else None


def _ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's file: a token in base64 and its rank on each line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not a token in base64 and its rank") from None
        if key in ranks or not 0 <= value < 10**7 or len(key) > LONGEST:
            problem = "a token that was there before" if key in ranks else "no rank, or no token"
            raise DataError(f"{path}:{number}: {problem}")
        ranks[key] = value
    if len(set(ranks.values())) != len(ranks):
        raise DataError(f"{path}: two tokens have one rank")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{path}: not all of the 256 bytes are tokens")
    return ranks


def _from_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: two tokens may merge if what they make is one, and its rank decides when."""
    letters = byte_alphabet()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in known]
    return {spelled(token): rank for token, rank in ranks.items()}, merges


def _pair(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's two files, of which `path` is one: a JSON object of ids, and a merge on each line after a heading."""
    names = next(pair for pair in PAIRS if path.name in pair)
    vocab_file, merges_file = (path.with_name(name) for name in names)
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise DataError(
                f"{file}: no such file; a vocabulary of this kind is {names[0]} and {names[1]} side by side"
            )
    try:
        vocab: Any = json.loads(vocab_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").splitlines()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.parent}: not a vocabulary and its merges: {error}") from None
    good = isinstance(vocab, dict) and all(type(i) is int and 0 <= i < 10**7 for i in vocab.values())
    if not good or len(set(vocab.values())) != len(vocab) or any(c not in vocab for c in byte_alphabet()):
        raise DataError(f"{vocab_file}: not an object of tokens and their ids with all of the 256 bytes")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or any(part not in vocab for part in (*parts, "".join(parts))):
            raise DataError(f"{merges_file}:{number}: not two tokens of the vocabulary that make a third")
        merges.append((parts[0], parts[1]))
    return vocab, merges
