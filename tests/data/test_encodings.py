"""The encoding of bytes that are not UTF-8: told of real text in each, and never told of what is none."""

import random
from functools import cache

import pytest

from gptworks.core.config import Data
from gptworks.data.encodings import likely
from gptworks.data.findings import Findings
from gptworks.data.sources import Source

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
FRENCH = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient.\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。カタカナもある。\n"
KOREAN = "동해 물과 백두산이 마르고 닳도록 하느님이 보우하사 우리나라 만세.\n"
TRADITIONAL = "秦川雄帝宅，函谷壯皇居。綺殿千尋起，離宮百雉餘。連甍遙接漢，飛觀迥凌虛。雲日隱層闕，風煙出綺疏。\n"
TAIWANESE = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。這個國家的學生說話時總是很認真。\n"


@cache
def chinese() -> str:
    return next(Source("hongloumeng", Data()).pieces(Findings())).text[:20_000]


TEXTS = {
    "gb18030": chinese, "big5": lambda: TAIWANESE * 50, "shift_jis": lambda: JAPANESE * 50,
    "euc_jp": lambda: JAPANESE * 50, "euc_kr": lambda: KOREAN * 50, "cp1251": lambda: RUSSIAN * 50,
    "koi8-r": lambda: RUSSIAN * 50, "cp1252": lambda: FRENCH * 50, "utf-16-le": lambda: FRENCH * 50,
    "utf-16-be": chinese, "utf-32-le": lambda: KOREAN * 50, "utf-32-be": lambda: FRENCH * 50,
}  # fmt: skip


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_encoding_of_a_text_is_told(encoding: str) -> None:
    raw = TEXTS[encoding]().encode(encoding)
    assert likely(raw) == encoding
    assert likely(raw[: len(raw) // 2 * 2 - 4]) == encoding  # where a character may be cut at the end


def test_traditional_characters_in_the_encoding_of_the_mainland_are_told() -> None:
    assert likely((TRADITIONAL * 50).encode("gb18030")) == "gb18030"
    assert likely((TRADITIONAL * 50).encode("big5")) == "big5"


def test_plain_ascii_has_no_other_encoding() -> None:
    assert likely(b"") is None and likely(b"the sea") is None


@pytest.mark.parametrize("seed", range(5))
def test_bytes_that_are_no_text_have_none(seed: int) -> None:
    assert likely(random.Random(seed).randbytes(20_000)) is None


def test_latin_1_is_named_where_windows_has_no_character() -> None:
    assert likely("café \x81 and more ".encode("latin-1") * 20) == "latin-1"
