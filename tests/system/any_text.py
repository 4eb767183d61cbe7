"""T1, T2 and T4: whatever text is encoded comes back, takes time in proportion, and makes no control token."""

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from campaign import WORDS, Bench, Trial, campaign, examples
from hypothesis import strategies as st

from gptworks.data.tokenizer import PATTERNS, RESERVED, Tokenizer

ALPHABETS = [
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("abc ABC019.,'\n\t\r-_"),
    st.characters(min_codepoint=0x400, max_codepoint=0x4FF),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x4FFF),
    st.characters(min_codepoint=0x600, max_codepoint=0x6FF),
    st.sampled_from(["👩‍👧", "🇩🇪", "e\u0301", "\u200d", "\u202e", "\ufeff", "\0", "\ufffd", "\u2028", "﷽", "ﬁ", "ſ"]),
    st.sampled_from([*RESERVED, "<|", "|>", "<|endoftext", "im_start|>", "<s>", "[UNK]"]),
]
TEXTS = st.lists(st.one_of(*(st.text(a, max_size=12) if n < 5 else a for n, a in enumerate(ALPHABETS))), max_size=8)


@cache
def tokenizer(pattern: str) -> Tokenizer:
    return Tokenizer.train_bpe([" ".join(WORDS) * 40 + " 'll 123 Привет 红楼梦 🎉\r\n\n  x"], 400, pattern)


@campaign("T1", "any text is decoded as it was encoded, without control tokens", 300, 100_000)
def round_trip(bench: Bench, count: int) -> Iterator[Trial]:
    texts = ["".join(parts) for parts in examples(TEXTS, count, bench.seed)]
    draw = bench.draw("T1")
    while len(texts) < count:  # bytes from anywhere, as they are read
        texts.append(draw.randbytes(draw.randrange(40)).decode("utf-8", "replace"))
    for number, text in enumerate(texts):
        pattern = list(PATTERNS)[number % len(PATTERNS)]
        ids = tokenizer(pattern).encode(text)
        back = tokenizer(pattern).decode(ids)
        problem = None if back == text else f"{text!r} came back as {back!r}"
        if set(ids) & set(tokenizer(pattern).control_tokens.values()):
            problem = f"{text!r} has control tokens: {ids}"
        yield Trial(pattern, problem)


@campaign("T4", "control tokens, spelled out, cut, nested, are text unless allowed", 200, 5000)
def control_tokens(bench: Bench, count: int) -> Iterator[Trial]:
    draw, alphabet = bench.draw("T4"), sorted({*"".join(RESERVED), *"ab \n<|>_"})
    characters = Tokenizer.train_characters(alphabet)
    for number in range(count):
        one, two = draw.choice(RESERVED), draw.choice(RESERVED)
        cut = draw.randrange(len(one))
        text = draw.choice(
            [one, one + two, one[:cut] + two + one[cut:], f"a{one}b", one[:cut] + " " + one[cut:], one * 3,
             f"{one}\n{two}", one.upper(), one[:cut], one[cut:], f"<{one}>", f"{one[:-1]}"]
        )  # fmt: skip
        name = [*PATTERNS, "char"][number % (len(PATTERNS) + 1)]
        used = characters if name == "char" else tokenizer(name)
        if name == "char":
            text = "".join(c for c in text if c in alphabet)
        ids, control = used.encode(text), set(used.control_tokens.values())
        problem = f"{text!r} has control tokens: {ids}" if control & set(ids) else None
        if used.decode(ids) != text:
            problem = f"{text!r} came back as {used.decode(ids)!r}"
        known = [token for token in used.control_tokens if token in text]
        if bool(known) != bool(control & set(used.encode(text, control=True))):
            problem = f"{text!r}: control tokens where allowed: {used.encode(text, control=True)}"
        yield Trial(name, problem)


PATHOLOGICAL: dict[str, Callable[[int], str]] = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "newlines": lambda n: "\n" * n,
    "a b": lambda n: "a b" * (n // 3),
    "one digit": lambda n: "7" * n,
    "punctuation": lambda n: "." * n,
    "an accent": lambda n: "e\u0301" * (n // 3),
    "one character": lambda n: "红" * (n // 3),
    "a family": lambda n: "👩‍👧" * (n // 11),
    "control tokens": lambda n: RESERVED[0] * (n // len(RESERVED[0])),
    "half control tokens": lambda n: "<|" * (n // 2),
    "apostrophes": lambda n: "'" * n,
    "spaces and a letter": lambda n: (" " * 999 + "a") * (n // 1000),
}


@campaign("T2", "pathological text, 10 MB: four times the text, at most 8 times the time", 2, 78)
def in_proportion(bench: Bench, count: int) -> Iterator[Trial]:
    """With gigatoken; and 2 MB with the library that serves where it is not installed."""
    cases = [(pattern, name, slow) for name in PATHOLOGICAL for pattern in PATTERNS for slow in (False, True)]
    worst = 0.0
    for pattern, name, slow in cases if count >= len(cases) else bench.draw("T2").sample(cases, count):
        make, used = PATHOLOGICAL[name], tokenizer(pattern)
        encode = used._slow if slow else used.encode_array
        size = 300_000 if count < len(cases) else 2_000_000 if slow else 10_000_000

        def seconds(text: str, encode: Callable[[str], Any] = encode) -> float:
            start = time.process_time()
            encode(text)
            return time.process_time() - start

        for _ in range(3):  # a busy machine may need another try; what is quadratic fails every one
            short, long = seconds(make(size // 4)), seconds(make(size))
            ratio = long / max(short, 0.01)
            if ratio < 8:  # between what is in proportion, 4 and what caches take, and what is quadratic, 16
                break
        worst = max(worst, ratio)
        problem = f"{name}: {short:.3f} s for {size // 4:,} bytes, {long:.3f} s for four times as much"
        yield Trial(f"{pattern}, {'tokenizers' if slow else used.engine}", problem if ratio >= 8 else None)
    bench.notes["largest ratio"] = round(worst, 2)
