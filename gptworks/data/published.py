"""Vocabularies as others publish them — tiktoken's ranks, GPT-2's vocabulary and merges — as one of `tokenizers`.

Ids are those of the library that each comes from; the result is saved as an ordinary tokenizer.json.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.core.log import console

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
    128000: ("llama-bpe", {}),  # Llama 3's, with names for 256 ids more
    199998: ("gpt-4o", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),  # o200k_base
}
_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(251))]
_LLAMA_3[6:6], _LLAMA_3[9:9] = ["<|start_header_id|>", "<|end_header_id|>"], ["<|eot_id|>"]
TIKTOKEN[128000][1].update((token, id) for id, token in enumerate(_LLAMA_3[:256], 128000))
RANKS = ("tokenizer.model", "tiktoken.model")  # names of a folder's file, which may be SentencePiece's too
_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

# Of a vocabulary and its merges, by the class that reads them: how text is split, and whether it is composed first.
CLASSES = {
    **dict.fromkeys(("GPT2", "CodeGen", "Roberta", "Bart", "Longformer", "LED", "Deberta"), ("gpt-2", False)),
    **dict.fromkeys(("PreTrained", "TokenizersBackend"), ("gpt-2", False)),  # of no class; GPT-2's format is theirs
    "GPTNeoX": ("gpt-2", True),
    "Qwen2": ("qwen2", True),
}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SAVE = (
    "where transformers is installed, AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes a "
    "tokenizer.json"
)


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
        pairs = (path / name for name, merges in PAIRS if (path / name).is_file() and (path / merges).exists())
        return next(pairs, None) or next((file for name in RANKS if _has_ranks(file := path / name)), None)
    if path.suffix == ".tiktoken" or any(path.name == name for pair in PAIRS for name in pair):
        return path if path.is_file() else None
    return path if path.suffix == ".model" and _has_ranks(path) else None


def _has_ranks(file: Path) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        return _RANK.match(opened.read(2 * LONGEST)) is not None


def load(path: Path, patterns: dict[str, str], pattern: str, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The backend of a vocabulary file; and `config`, the tokenizer_config.json beside it, completed. Raises DataError.

    `pattern` names the rule for ranks of unknown origin.
    """
    if path.stat().st_size > MOST:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes are no vocabulary")
    ranked, composed = path.suffix in (".tiktoken", ".model"), False
    if ranked:
        ranks = _ranks(path)
        pattern, control = _origin(path, ranks, pattern)
        vocab, merges = _from_ranks(ranks)
    else:
        vocab, merges = _pair(path)
        pattern, composed = _class_of(path, config)
        control = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    beside = added_beside(path, config)
    spelled = {token.content: id for id, token in beside.items()}
    if other := [token for token, id in spelled.items() if vocab.get(token, id) != id]:
        raise DataError(f"{path.parent}: token {other[0][:80]!r} has two ids")
    control = {token: id for token, id in control.items() if id not in beside}
    try:
        model = models.BPE(vocab | control | spelled, merges, ignore_merges=ranked)
    except Exception as error:  # the library's own
        raise DataError(f"{path}: not a usable vocabulary: {error}") from None
    backend = splitting(Backend(model), patterns[pattern], pattern)
    if config.get("add_prefix_space") and pattern == "gpt-2" and not ranked:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if composed:
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens(list(beside.values()))
    ends = {**_ends(control), **config}
    if (start := _spelled(ends.get("bos_token"))) and ends.pop("add_bos_token", "<|begin_of_text|>" in control):
        begin_with(backend, start)
    return backend, ends


def _origin(path: Path, ranks: dict[bytes, int], pattern: str) -> tuple[str, dict[str, int]]:
    """The rule by which text is split, and the control tokens, of ranks."""
    if known := TIKTOKEN.get(len(ranks)):
        return known
    end = max(ranks.values()) + 1
    console.say(f"tokens   {path.name}: {len(ranks):,} ranks are no vocabulary known here: split by tokenizer.pattern="
                f"{pattern}, and {END_OF_TEXT} is {end}")  # fmt: skip
    return pattern, {END_OF_TEXT: end}


def _class_of(path: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """The rule of the class that tokenizer_config.json names, or that opens models of the kind in config.json."""
    name = config.get("tokenizer_class")
    if name is None and (file := path.with_name("config.json")).is_file():
        model = folder.read_json(file)
        kind = model if isinstance(model, dict) else {}
        name = kind.get("tokenizer_class") or ("Qwen2" if str(kind.get("model_type")).startswith("qwen") else None)
    short = str(name or "GPT2").removesuffix("Fast").removesuffix("Tokenizer")
    if short not in CLASSES:
        raise DataError(f"{path}: how a {str(name)[:80]} splits text is not known here; {SAVE}")
    return CLASSES[short]


def _ends(control: dict[str, int]) -> dict[str, Any]:
    """Names the tokens around a text as tokenizer_config.json would."""
    start, end = ("<|begin_of_text|>", "<|end_of_text|>") if "<|begin_of_text|>" in control else (None, END_OF_TEXT)
    named = {"eos_token": end, "pad_token": end} if end in control else {}
    return {"bos_token": start, **named} if start else named


def begin_with(backend: Backend, token: str) -> None:
    """Has every text begin with a token, if the vocabulary has it."""
    if (id := backend.token_to_id(token)) is not None:
        backend.post_processor = processors.TemplateProcessing(f"{token} $A", f"{token} $A {token} $B", [(token, id)])


def _spelled(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def added_beside(file: Path, config: dict[str, Any], special: bool = False) -> dict[int, AddedToken]:
    """Tokens that tokenizer_config.json or added_tokens.json add to a vocabulary, by their ids. Raises DataError.

    What only added_tokens.json lists is a control token if the configuration names it as one, or all are `special`.
    """
    listed = config.get("added_tokens_decoder")
    added: dict[int, AddedToken] = {}
    names = file.with_name("added_tokens.json")
    try:
        others = [token for key in ("additional", "extra") for token in config.get(f"{key}_special_tokens") or []]
        named = {_spelled(token) for token in [*others, *map(config.get, NAMED)]}
        for token, id in (folder.read_json(names) if names.is_file() else {}).items():
            if int(id) in added:
                raise ValueError
            control = special or token in named
            added[int(id)] = AddedToken(token, special=control, normalized=not control)
        for id, how in (listed if isinstance(listed, dict) else {}).items():
            flags = {key: bool(how.get(key)) for key in ("lstrip", "rstrip", "single_word")}
            control = bool(how.get("special", True))
            plain = not special and bool(how.get("normalized", not control))
            added[int(id)] = AddedToken(how["content"], special=control, normalized=plain, **flags)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise DataError(f"{file.parent}: added_tokens are not tokens with their ids") from None
    if len({token.content for token in added.values()}) < len(added):
        raise DataError(f"{file.parent}: an added token has two ids")
    return added


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
