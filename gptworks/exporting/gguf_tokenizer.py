"""The tokenizer as llama.cpp reads it: byte-level BPE ("gpt2" there), or SentencePiece's BPE ("llama").

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the fields lead to is llama.cpp's src/llama-vocab.cpp.
"""

import json
from itertools import pairwise
from typing import Any

from tokenizers import models

from gptworks.core.errors import DataError
from gptworks.data.published import byte_alphabet
from gptworks.data.sentencepiece import SPACE
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.chat import ChatFormat
from gptworks.model.build import Loaded

# tokenizer.ggml.pre, by our name of a split pattern and whether a word that is a token is taken before any merge.
# llama.cpp decides the latter by the former; its dbrx splits as llama-bpe does.
PRE = {
    ("gpt-2", False): "gpt-2", ("qwen2", False): "qwen2", ("gpt-4o", False): "gpt-4o",
    ("llama-bpe", True): "llama-bpe", ("llama-bpe", False): "dbrx",
}  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of tokenizer.ggml.token_type
NO_MERGE = "\u0400 \u0400"  # llama.cpp wants a merge; these characters stand for no byte
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # how SentencePiece names the bytes


def fields(loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """Metadata of a file for the tokenizer and the chat template; and what a user has to know of it.

    Raises DataError for what llama.cpp does otherwise.
    """
    notes: list[str] = []
    try:
        values = _fields(loaded, notes)
    except DataError as why:
        raise DataError(
            f"{loaded.path}: llama.cpp cannot do what the tokenizer does: {why}; --format onnx takes it"
        ) from None
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    spelling = ChatFormat.of(loaded.template_home, loaded.tokenizer)
    return named | ({"tokenizer.chat_template": spelling.source} if spelling.taught and spelling.source else {}), notes


def _fields(loaded: Loaded, notes: list[str]) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    state = json.loads(tokenizer.backend.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise DataError(f"its vocabulary is of the kind {state['model']['type']}")
    pieces = state["model"]["type"] == "BPE" and state["model"].get("byte_fallback")
    spelled = {token: token for token in vocab}
    kinds = dict.fromkeys(vocab, NORMAL)
    if pieces:
        own = _pieces(state, notes)
        kinds |= dict.fromkeys(BYTES, BYTE)
    elif tokenizer.engine == "characters":
        letters = byte_alphabet()
        spelled = {token: "".join(letters[byte] for byte in token.encode()) for token in vocab}
        own = {"model": "gpt2", "pre": "gpt-2", "merges": _character_merges(vocab)}
        notes.append("llama.cpp leaves out characters that a character-level vocabulary lacks; here they are errors")
    else:
        own = _bytes(tokenizer, state, notes)
    tokens = [f"[PAD{number}]" for number in range(loaded.model.config.vocab_size)]
    types = [UNUSED] * len(tokens)
    beyond = [added for added in state["added_tokens"] if added["id"] >= len(tokens)]
    if any(number >= len(tokens) for number in vocab.values()):
        raise DataError("it has more ids than the model has rows")
    if beyond:
        notes.append(
            f"{len(beyond)} tokens that the model has no rows for are left out, {beyond[0]['content']!r} first"
        )
    for token, number in vocab.items():
        tokens[number], types[number] = spelled[token], kinds[token]
    for added in state["added_tokens"]:
        if added in beyond:
            continue
        content = added["content"]
        if not added["special"] and (added["lstrip"] or added["rstrip"] or added["single_word"]):
            raise DataError(f"its token {content[:80]!r} takes spaces beside it away")
        tokens[added["id"]] = content if added["special"] or not pieces else content.replace(SPACE, " ")
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if len(set(tokens)) < len(tokens):
        raise DataError("two of its tokens are spelled alike")
    if pieces:
        unknown = vocab.get(state["model"].get("unk_token") or "")
        own |= {"scores": _scores(state, len(tokens), notes), "unknown_token_id": unknown}
        if unknown is not None:
            types[unknown] = UNKNOWN
    else:
        own["merges"] = own["merges"] or [NO_MERGE]
    return own | {"tokens": tokens, "token_type": types} | _ends(loaded, notes)


def _ends(loaded: Loaded, notes: list[str]) -> dict[str, Any]:
    """The tokens before and after a text."""
    tokenizer = loaded.tokenizer
    if tokenizer.front not in ([], [tokenizer.start_id]):
        raise DataError("it puts more than one token before a text")
    pad = tokenizer.config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    others = [token for token in loaded.stop_ids if token != tokenizer.eos_id]
    if others[1:]:
        notes.append(f"of {len(others) + 1} tokens that end a text, the file names {tokenizer.eos_id}, {others[0]}")
    return {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.eos_id,
        "eot_token_id": others[0] if others else None,
        "padding_token_id": tokenizer.backend.token_to_id(pad) if pad else None,
        "add_bos_token": bool(tokenizer.front),
    }


# -- SentencePiece's BPE -----------------------------------------------------------------------------------------


def _pieces(state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Fields that say how spaces are written; refuses what llama.cpp would do differently."""
    _plain(state["model"])
    if not state["model"]["vocab"].keys() >= set(BYTES):
        raise DataError("it has not all of the 256 bytes")
    before = state.get("normalizer") or {}
    match before.get("normalizers", [before] if before else []), state.get("pre_tokenizer"):
        case [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": space}], None if space == SPACE:
            if prepend not in ([], [{"type": "Prepend", "prepend": SPACE}]):
                raise DataError(f"it changes text before splitting it ({prepend[0]['type']})")
            prefix = bool(prepend)
        case [], {"type": "Metaspace", "replacement": space, "split": False, "prepend_scheme": scheme} if (
            space == SPACE
        ):
            prefix = scheme != "never"
            if prefix:
                after = "; after a control token, too" if scheme == "first" else ""
                notes.append(f"llama.cpp puts a space before text that begins with one{after}, the tokenizer none")
        case _:
            raise DataError("it changes or splits text in another way than SentencePiece")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}


def _scores(state: dict[str, Any], size: int, notes: list[str]) -> list[float]:
    """The scores that llama.cpp merges by: the neighbours that make the token with the largest score come first."""
    vocab = state["model"]["vocab"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["model"]["merges"]]
    makes = [left + right for left, right in merges]
    order = [token for before, token in pairwise([None, *makes]) if token != before]
    if len(set(order)) < len(order):
        raise DataError("its merges into one token do not follow one another")
    scores = [-float(len(order))] * size
    for place, token in enumerate(order):
        scores[vocab[token]] = -float(place)
    known = set(merges)
    symbols = {added["content"] for added in state["added_tokens"] if not added["special"]}  # found before any merge
    cuts = ((token[:at], token[at:]) for token in vocab.keys() - symbols for at in range(1, len(token)))
    beyond = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab and cut not in known]
    if beyond:
        notes.append(
            f"llama.cpp also merges {' and '.join(map(repr, beyond[0]))}"
            + (f", and {len(beyond) - 1} pairs more" if beyond[1:] else "")
            + ", which the tokenizer does not: such text may differ"
        )
    return scores


# -- byte-level BPE ----------------------------------------------------------------------------------------------


def _bytes(tokenizer: Tokenizer, state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """tokenizer.ggml.pre and the merges."""
    model = state["model"]
    if model["type"] != "BPE":
        raise DataError(f"it is a {model['type']} model, and no BPE")
    _plain(model)
    if not model["vocab"].keys() >= set(byte_alphabet()):
        raise DataError("it has not all of the 256 bytes")
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        notes.append("llama.cpp does not bring text to Unicode's NFC, as the tokenizer does: such text differs")
    elif normalizer:
        raise DataError(f"it changes text before splitting it ({normalizer})")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    values: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "merges": merges}
    if tokenizer.engine == "bytes":
        return values  # where nothing merges, no splitting makes a difference
    pattern, whole = tokenizer.pattern, bool(model.get("ignore_merges"))
    if pattern is None:
        raise DataError(f"it splits text by none of the rules {', '.join(sorted({n for n, _ in PRE}))}")
    if pattern == "gpt-4o":
        notes.append("llama.cpp's gpt-4o rule knows capital letters from A to Z alone: other scripts may differ")
    if (pattern, whole) in PRE:
        return values | {"pre": PRE[pattern, whole]}
    merged = models.BPE(model["vocab"], [(left, right) for left, right in map(str.split, merges)])
    added = {token["content"] for token in state["added_tokens"]}
    for token, number in model["vocab"].items():
        if token not in added and [values.id for values in merged.tokenize(token)] != [number]:
            raise DataError(f"it takes {token[:80]!r} whole, which merges do not make")
    return values | {"pre": PRE[pattern, not whole]}


def _plain(model: dict[str, Any]) -> None:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise DataError(f"it has {name}")


def _character_merges(vocab: dict[str, int]) -> list[str]:
    """Merges by which the bytes of each character of several become one token: its beginning with its next byte."""
    letters, merges = byte_alphabet(), set[tuple[int, str]]()
    for token in vocab:
        spelled = [letters[byte] for byte in token.encode()] if len(token) == 1 else []
        merges |= {(end, f"{''.join(spelled[:end])} {spelled[end]}") for end in range(1, len(spelled))}
    return [merge for _, merge in sorted(merges)]
