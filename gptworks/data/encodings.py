"""The likely encoding of bytes that are not UTF-8, roughly: by decoding them and looking at what comes out."""

import codecs
from collections.abc import Callable

SAMPLE = 65536  # bytes that are looked at
SURE = 0.7  # share of the characters beyond ASCII that have to be usual ones of a language


def _first_byte(encoding: str, low: int, high: int) -> Callable[[str], bool]:
    """Whether a character is among the common ones, which old character sets have in rows of their own."""

    def is_common(character: str) -> bool:
        raw = character.encode(encoding, "ignore")
        return len(raw) == 2 and low <= raw[0] <= high

    return is_common


def _between(*ranges: str) -> Callable[[str], bool]:
    """Whether a character is in one of these ranges, each given by its first and last."""
    return lambda character: any(one[0] <= character <= one[1] for one in ranges)


# What each would have: a text decoded by another than its own rarely does. The first of those with the best share.
COMMON: dict[str, Callable[[str], bool]] = {
    "gb18030": _first_byte("gb2312", 0xA1, 0xD7),  # punctuation, the 3,755 most usual characters
    "big5": _first_byte("big5", 0xA1, 0xC6),  # the same of Taiwan
    "shift_jis": _between("ぁゟ", "゠ヿ", "、。", "「」"),
    "euc_jp": _between("ぁゟ", "゠ヿ", "、。", "「」"),
    "euc_kr": _between("가힣"),
    "cp1251": _between("ая", "ёё", "—»"),
    "koi8-r": _between("ая", "ёё"),
}
JAPANESE = 0.3  # kana beside the characters that other languages have too


def likely(raw: bytes) -> str | None:
    """Names the encoding, as `data.encoding` takes it; None where nothing fits."""
    raw = raw[:SAMPLE]
    if b"\0" in raw:
        return _wide(raw)
    shares = {name: _share(raw, name, is_common) for name, is_common in COMMON.items()}
    for name in ("shift_jis", "euc_jp"):
        shares[name] = 1.0 if shares[name] > JAPANESE else 0.0
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= SURE:
        return best
    return _western(raw)


def _decoded(raw: bytes, encoding: str) -> str:
    """The text, but for a character that the end cuts; empty where the bytes are none of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(raw)
    except UnicodeDecodeError:
        return ""


def _share(raw: bytes, encoding: str, is_common: Callable[[str], bool]) -> float:
    beyond = [character for character in _decoded(raw, encoding) if character > "\x7f"]
    return sum(map(is_common, beyond)) / max(len(beyond), 1)


def _wide(raw: bytes) -> str | None:
    """UTF-16 and UTF-32 without a byte order mark: text of their characters is printable."""
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        text = _decoded(raw, name)
        if text and sum(c.isprintable() or c in "\t\r\n" for c in text) > 0.99 * len(text):
            return name
    return None


def _western(raw: bytes) -> str | None:
    """Letters with accents stand alone between letters without."""
    high = [place for place, byte in enumerate(raw) if byte > 0x7F]
    alone = sum(after - before > 1 for before, after in zip(high, [*high[1:], len(raw) + 1], strict=True))
    if not high or alone < SURE * len(high) or len(high) > len(raw) / 3:
        return None
    return "cp1252" if _decoded(raw, "cp1252") else "latin-1"
