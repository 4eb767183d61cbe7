"""The likely encoding of bytes that are not UTF-8, roughly: by decoding them and looking at what comes out."""

import codecs
from collections.abc import Callable

SAMPLE = 65536  # bytes that are looked at


def _in_rows(encoding: str, *rows: tuple[int, int]) -> Callable[[str], bool]:
    """A test for the common characters, which old character sets have in rows of their own."""

    def is_common(character: str) -> bool:
        raw = character.encode(encoding, "ignore")
        return len(raw) == 2 and any(low <= raw[0] <= high for low, high in rows)

    return is_common


def _between(*ranges: str) -> Callable[[str], bool]:
    """A test for the characters of these ranges, each given by its first and last."""
    return lambda character: any(one[0] <= character <= one[1] for one in ranges)


# The characters of which a text has a share, of those beyond ASCII. The first that a text meets is it: text decoded by
# another encoding than its own does not come near, unless by one further down.
USUAL: list[tuple[str, Callable[[str], bool], float]] = [
    ("shift_jis", _between("ぁゟ", "゠ヿ"), 0.3),
    ("euc_jp", _between("ぁゟ", "゠ヿ"), 0.3),
    ("euc_kr", _between("가힣"), 0.9),
    ("gb18030", _in_rows("gb2312", (0xA1, 0xA3), (0xB0, 0xD7)), 0.5),  # punctuation, the 3,755 most usual characters
    ("big5", _in_rows("big5", (0xA1, 0xC6)), 0.7),  # the same of Taiwan
    ("cp1251", _between("ая", "ёё"), 0.7),
    ("koi8-r", _between("ая", "ёё"), 0.7),
]


def likely(raw: bytes) -> str | None:
    """Names the encoding, as `data.encoding` takes it; None where nothing fits."""
    raw = raw[:SAMPLE]
    if b"\0" in raw:
        return _wide(raw)
    if western := _western(raw):
        return western
    return next((name for name, is_usual, share in USUAL if _share(raw, name, is_usual) > share), None)


def _decoded(raw: bytes, encoding: str) -> str:
    """The text, but for a character that the end cuts; empty where the bytes are none of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(raw)
    except UnicodeDecodeError:
        return ""


def _share(raw: bytes, encoding: str, is_usual: Callable[[str], bool]) -> float:
    beyond = [character for character in _decoded(raw, encoding) if character > "\x7f"]
    return sum(map(is_usual, beyond)) / max(len(beyond), 1)


def _wide(raw: bytes) -> str | None:
    """UTF-16 and UTF-32 without a byte order mark: text of their characters is printable."""
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        text = _decoded(raw, name)
        if len(text) > 8 and sum(c.isprintable() or c in "\t\r\n" for c in text) > 0.99 * len(text):
            return name
    return None


def _western(raw: bytes) -> str | None:
    """Letters with accents stand alone between letters without."""
    high = [place for place, byte in enumerate(raw) if byte > 0x7F]
    if not high:
        return None
    alone = sum(after - before > 1 for before, after in zip(high, [*high[1:], len(raw) + 1], strict=True))
    if alone < 0.7 * len(high) or len(high) > len(raw) / 3:
        return None
    return "cp1252" if _decoded(raw, "cp1252") else "latin-1"
