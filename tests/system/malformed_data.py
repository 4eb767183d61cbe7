"""D1 to D5, D9, D11, D12 and T3: training text, shards and tokenizers that are damaged or made up.

`FORMATS` has a row for each format we read: how a few documents are spelled in it, and named ways to break that, each
with what must come of it. Random damage comes on top. A format that is added needs a row.
"""

import contextlib
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from campaign import Bench, Trial, campaign
from harness import Outcome, mistake
from hostile_files import foreign_model, generate, seal, unfinished

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.data.shards import open_shards

DOCUMENTS = [f"the king number {n} and the queen walked over old stones; nobody answered." for n in range(12)]

MOST = 300_000_000  # bytes of memory that reading a small file may take, libraries included

# -- text --------------------------------------------------------------------------------------------------------

Rows = list[bytes]


@dataclass(frozen=True)
class Format:
    """`spell` writes documents and `join` makes a file of them; `good` and `bad` make what must be read, or refused."""

    suffix: str
    spell: Callable[[list[str]], Rows]
    join: Callable[[Rows], bytes]
    good: dict[str, Callable[[Rows], bytes]] = field(default_factory=dict)
    bad: dict[str, Callable[[Rows], bytes]] = field(default_factory=dict)


def lines(rows: Rows) -> bytes:
    return b"".join(row + b"\n" for row in rows)


def row(number: int, content: bytes) -> Callable[[Rows], bytes]:
    """One row put in the place of another."""
    return lambda rows: lines(rows[:number] + [content] + rows[number + 1 :])


def json_rows(documents: list[str]) -> Rows:
    return [json.dumps({"text": text, "n": n}).encode() for n, text in enumerate(documents)]


BAD_ROWS = {
    "cut": b'{"text": "the king',
    "bare text": b"the king and the queen",
    "two objects": b'{"text": "a"} {"text": "b"}',
    "trailing comma": b'{"text": "a",}',
    "a list": b'["a", "b"]',
    "a number": b"5",
    "null": b"null",
    "no such column": b'{"other": 5}',
    "text a number": b'{"text": 5}',
    "text a list": b'{"text": ["a"]}',
    "text null": b'{"text": null}',
    "text an object": b'{"text": {"text": "a"}}',
    "100,000 nested lists": b"[" * 100_000,
    "100,000 nested objects": b'{"text":' * 100_000,
    "a number of 10,000 digits": b'{"text": ' + b"9" * 10_000 + b"}",
    "control character": b'{"text": "a\x01b"}',
    "single quotes": b"{'text': 'a'}",
    "bad escape": b'{"text": "\\x41"}',
    "bytes that are no UTF-8 for a brace": b'\xff\xfe"text": "a"}',
}
GOOD_ROWS = {
    "NaN beside the text": b'{"text": "a king", "score": NaN}',
    "a key twice": b'{"text": "old", "text": "a king"}',
    "a lone surrogate": b'{"text": "a \\ud800 king"}',
    "an empty text": b'{"text": ""}',
    "a string": b'"a king"',
    "blank": b"   \t",
    "escapes": b'{"text": "\\u0000\\uffff\\ud83d\\ude00\\n"}',
    "deep beside the text": b'{"text": "a king", "deep": ' + b"[" * 50 + b"]" * 50 + b"}",
}
WHOLE_FILES = {
    "no newline at the end": lambda rows: lines(rows)[:-1],
    "a byte order mark": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "Windows line ends": lambda rows: b"".join(r + b"\r\n" for r in rows),
    "blank lines": lambda rows: b"\n \n".join(rows) + b"\n\n\n",
    "UTF-16 with its mark": lambda rows: lines(rows).decode().encode("utf-16"),
    "UTF-32 with its mark": lambda rows: lines(rows).decode().encode("utf-32"),
    "one byte in a thousand": lambda rows: lines(rows * 3).replace(b"king", b"k\xffng", 1),
}
NOTHING: dict[str, Callable[[Rows], bytes]] = {
    "empty": lambda rows: b"",
    "blank only": lambda rows: b"\n\n\n" if rows[0].startswith(b"{") else b"",
    "NUL bytes": lambda rows: bytes(1000),
    "a binary": lambda rows: b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 4,
    "UTF-16": lambda rows: lines(rows).decode().encode("utf-16-le"),
    "invalid UTF-8": lambda rows: b"\xff".join(rows),
}
FORMATS: dict[str, Format] = {
    "jsonl": Format(
        ".jsonl",
        json_rows,
        lines,
        WHOLE_FILES | {name: row(5, content) for name, content in GOOD_ROWS.items()},
        NOTHING
        | {name: row(5, content) for name, content in BAD_ROWS.items()}
        | {f"{name}, last": row(11, content) for name, content in BAD_ROWS.items()},
    ),
    "txt": Format(
        ".txt",
        lambda documents: [text.encode() for text in documents],
        lines,
        {**WHOLE_FILES, "one letter": lambda rows: b"a" * 5000},
        NOTHING,
    ),
    "gz": Format(
        ".jsonl.gz",
        json_rows,
        lambda rows: gzip.compress(lines(rows), mtime=0),
        {"two members": lambda rows: gzip.compress(lines(rows[:3])) + gzip.compress(lines(rows[3:])),
         "whole": lambda rows: gzip.compress(lines(rows))},
        {"not gzip": lines, "empty": lambda rows: b"", "a member's head": lambda rows: b"\x1f\x8b",
         "cut": lambda rows: gzip.compress(lines(rows))[:-9], "empty inside": lambda rows: gzip.compress(b""),
         "a bad row inside": lambda rows: gzip.compress(row(5, BAD_ROWS["cut"])(rows)),
         "a flipped bit": lambda rows: flipped(gzip.compress(lines(rows), mtime=0), 60),
         "garbage behind": lambda rows: gzip.compress(lines(rows)) + b"garbage"},
    ),
}  # fmt: skip


def csv_rows(documents: list[str]) -> Rows:
    return [b"n,text", *(f'{n},"{text}"'.encode() for n, text in enumerate(documents))]


def tsv_rows(documents: list[str]) -> Rows:
    return [row.replace(b",", b"\t", 1) for row in csv_rows(documents)]


def in_list(rows: Rows) -> bytes:
    return b"[" + b",\n".join(rows) + b"]"


FORMATS["csv"] = Format(
    ".csv",
    csv_rows,
    lines,
    {**{name: make for name, make in WHOLE_FILES.items() if name != "blank lines"},
     "a line break in quotes": row(5, b'5,"the king\nand the queen"'),
     "quotes in quotes": row(5, b'5,"the ""king"""'),
     "no quotes": row(5, b"5,the king"),
     "an empty text": row(5, b"5,")},
    {"a header alone": lambda rows: lines(rows[:1]),
     "a quote that never ends": row(5, b'5,"the king'),
     "more after a quote": row(5, b'5,"the king" and'),
     "a field too many": row(5, b"5,the king,more"),
     "a field too few": row(5, b"5"),
     "no such column": row(0, b"n,5"),
     "columns of one name": row(0, b"text,text")} | NOTHING,
)  # fmt: skip
FORMATS["tsv"] = Format(".tsv", tsv_rows, lines, {"whole": lines}, {"a field too few": row(5, b"5")} | NOTHING)
FORMATS["json"] = Format(
    ".json",
    json_rows,
    in_list,
    {"a list": in_list,
     "an object with a list": lambda rows: b'{"version": 1, "data": ' + in_list(rows) + b"}",
     "brackets in text": lambda rows: in_list([b'{"text": "a ]} king \\" ["}', *rows]),
     "space": lambda rows: b"\n\n " + in_list(rows) + b"\n \n",
     **{name: lambda rows, content=content: in_list([*rows, content]) for name, content in GOOD_ROWS.items()
        if name != "blank"}},
    {"cut": lambda rows: in_list(rows)[:-40],
     "not closed": lambda rows: in_list(rows)[:-1],
     "rows without a list": lines,
     "two lists": lambda rows: in_list(rows) + in_list(rows),
     "an object with two lists": lambda rows: b'{"a": ' + in_list(rows) + b', "b": ' + in_list(rows) + b"}",
     "a number": lambda rows: b"5",
     "closed by the wrong bracket": lambda rows: in_list(rows)[:-1] + b"}",
     "nested": lambda rows: b"[" * 100_000,
     "empty list": lambda rows: b"[]",
     **{name: lambda rows, bad=bad: in_list([*rows[:5], bad, *rows[5:]]) for name, bad in BAD_ROWS.items()
        if name != "two objects"}} | NOTHING,
)  # fmt: skip
with contextlib.suppress(ImportError):  # as gptworks[data] has it
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet_file(columns: dict[str, list[Any]], **options: Any) -> bytes:
        made = io.BytesIO()
        pq.write_table(pa.table(columns), made, **options)
        return made.getvalue()

    def parquet(rows: Rows, **options: Any) -> bytes:
        return parquet_file({"n": list(range(len(rows))), "text": [row.decode() for row in rows]}, **options)

    FORMATS["parquet"] = Format(
        ".parquet",
        lambda documents: [text.encode() for text in documents],
        parquet,
        {"whole": parquet, "row groups": lambda rows: parquet(rows, row_group_size=2),
         "zstd": lambda rows: parquet(rows, compression="zstd")},
        {"no rows": lambda rows: parquet([]), "cut": lambda rows: parquet(rows)[:-1],
         "head gone": lambda rows: parquet(rows)[4:],
         "footer of 2^31": lambda rows: parquet(rows)[:-8] + b"\xff\xff\xff\x7fPAR1",
         "footer of 2^32-1": lambda rows: parquet(rows)[:-8] + b"\xff\xff\xff\xffPAR1",
         "encrypted": lambda rows: parquet(rows)[:-4] + b"PARE",
         "text a number": lambda rows: parquet_file({"text": [1, 2]}),
         "text a list": lambda rows: parquet_file({"text": [["a"], ["b"]]}),
         "no column": lambda rows: parquet_file({}),
         "two texts": lambda rows: parquet_file({"a": ["x"], "b": ["y"]}),
         "nulls": lambda rows: parquet_file({"text": ["a", None]})} | NOTHING,
    )  # fmt: skip
with contextlib.suppress(ImportError):
    from backports import zstd

    FORMATS["zst"] = Format(
        ".jsonl.zst",
        json_rows,
        lambda rows: zstd.compress(lines(rows)),
        {"whole": lambda rows: zstd.compress(lines(rows)),
         "two frames": lambda rows: zstd.compress(lines(rows[:3])) + zstd.compress(lines(rows[3:]))},
        {"not zstd": lines, "empty": lambda rows: b"", "cut": lambda rows: zstd.compress(lines(rows))[:-9],
         "head alone": lambda rows: zstd.compress(lines(rows))[:6],
         "garbage behind": lambda rows: zstd.compress(lines(rows)) + b"x",
         "a bad row inside": lambda rows: zstd.compress(row(5, BAD_ROWS["cut"])(rows)),
         "a window of 2^41": lambda rows: b"\x28\xb5\x2f\xfd\x00\xff" + zstd.compress(lines(rows))[6:]},
    )  # fmt: skip


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes gone, doubled, flipped, moved or put in, a few times."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 1, 4, 64, 10**9)))
        middle = content[a:b]
        new = draw.choice(
            [b"", middle * 2, middle[::-1], draw.randbytes(len(middle)), bytes([draw.randrange(256)]) + middle,
             draw.choice([b'"', b"{", b"}", b"[", b"\\", b"\n", b"\r", b"\0", b",", b"\xf0\x9f", b"\xed\xa0\x80",
                          b"9" * 9, b"-1", b"null", b"1e999", b"\xef\xbb\xbf"]) + middle]
        )  # fmt: skip
        content = content[:a] + new + content[b:] or b"x"
    return content


def read_text(bench: Bench, cases: list[tuple[str, str, bytes, tuple[int, ...]]]) -> Iterator[Trial]:
    """Has `evaluate` read each (kind, file name, content, exit codes)."""
    model, position = bench.run / "model", 0
    while position < len(cases):
        box, part = bench.box(), cases[position : position + 50]
        files = []
        for number, (_, name, content, _) in enumerate(part):
            files.append(box / f"{number}-{name}")
            files[-1].write_bytes(content)
        commands = [["evaluate", model, "--data", file, "--context", "16", "--quiet", "--json"] for file in files]
        outcomes = bench.commands.many(commands, box, timeout=120)
        for (kind, name, content, codes), file, outcome in zip(part, files, outcomes, strict=False):
            problem = mistake(outcome, *codes, peak=MOST) or unnamed(outcome, file)
            yield Trial(kind, problem and f"{name} {content[:300]!r}: {problem}")
        position += len(outcomes)
        shutil.rmtree(box)


def unnamed(outcome: Outcome, file: Path) -> str | None:
    """Whether a refusal leaves open which file it means."""
    return f"the file is not named: {outcome.err}" if outcome.code and file.name not in outcome.err else None


@campaign("D1-5", "malformed text: read or refused with file and line", 100, 3000)
def malformed_text(bench: Bench, count: int) -> Iterator[Trial]:
    draw = bench.draw("D1")
    cases = []
    for name, form in FORMATS.items():
        rows = form.spell(DOCUMENTS)
        for what, make in form.good.items():
            cases.append((f"{name}, unusual", f"{what.replace(' ', '-')}{form.suffix}", make(rows), (0,)))
        for what, make in form.bad.items():
            safe = "".join(c if c.isalnum() else "-" for c in what)
            cases.append((f"{name}, broken", f"{safe}{form.suffix}", make(rows), (65,)))
    names = list(FORMATS)
    if count < 1000:
        cases = draw.sample(cases, 3 * count // 4)
    for number in range(max(count - len(cases), 0)):
        name = names[number % len(names)]
        form = FORMATS[name]
        content = form.join(form.spell(draw.sample(DOCUMENTS, 6)))
        cases.append((f"{name}, random damage", f"r{form.suffix}", damaged(draw, content), (0, 65)))
    yield from read_text(bench, cases)


@campaign("D4", "a line or a text of 512 MB without an end: bounded memory and time", 2, 5)
def huge_lines(bench: Bench, count: int) -> Iterator[Trial]:
    """Rows of more than 64 million characters are refused; a text may be of any length."""
    box, size = bench.box(), 512_000_000 if count >= 5 else 80_000_000
    cases: list[tuple[str, bytes, bytes, bytes, tuple[int, ...]]] = [
        ("a.jsonl", b'{"text": "', b"a king a", b'"}\n', (65,)),
        ("b.jsonl", b'{"text": "', b"aaaaaaaa", b"", (65,)),
        ("c.jsonl", b"[", b"[[[[[[[[", b"", (65,)),
        ("d.json", b'[{"text": "', b"a king a", b'"}]', (65,)),
        ("e.csv", b"text\n", b"a king a", b"\n", (65,)),
    ]
    for name, head, unit, tail, codes in cases[:count]:
        file = box / name
        with open(file, "wb") as opened:
            opened.write(head)
            for _ in range(size // 1_000_000):
                opened.write(unit * 125_000)
            opened.write(tail)
        outcome = bench.commands("evaluate", bench.run / "model", "--data", file, "--quiet", box=box, timeout=300)
        problem = mistake(outcome, *codes, peak=MOST)
        file.unlink()
        yield Trial(file.suffix, problem and f"{name}: {problem}")


@campaign("D1", "10,000 rows, 1 % damaged: each damaged row is the one named", 5, 100)
def one_in_a_hundred(bench: Bench, count: int) -> Iterator[Trial]:
    """The first damaged row stops the reading and is named; repaired, the next one is."""
    draw, box = bench.draw("D1 rows"), bench.box()
    rows = json_rows([f"{DOCUMENTS[n % 12]} {n}" for n in range(10_000)])
    places = sorted(draw.sample(range(len(rows)), 100))
    broken = {place: draw.choice(list(BAD_ROWS.values())) for place in places}
    file = box / "a.jsonl"
    for place in places[:count]:
        file.write_bytes(lines([broken.get(n, r) for n, r in enumerate(rows)]))
        outcome = bench.commands("evaluate", bench.run / "model", "--data", file, "--quiet", box=box)
        problem = mistake(outcome, 65)
        if not problem and f"a.jsonl:{place + 1}:" not in outcome.err:
            problem = f"row {place + 1} is not named: {outcome.err}"
        yield Trial("a damaged row", problem)
        del broken[place]


# -- tokenizers --------------------------------------------------------------------------------------------------


def tokenizer_attacks(sound: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer files that are JSON and make no sense."""
    model, vocab = sound["model"], sound["model"]["vocab"]

    def with_model(**values: Any) -> dict[str, Any]:
        return {**sound, "model": {**model, **values}}

    some = list(vocab)[300:310] or list(vocab)[-10:]
    return {
        "an id twice": with_model(vocab={**vocab, some[0]: vocab[some[1]]}),
        "a negative id": with_model(vocab={**vocab, some[0]: -1}),
        "an id of 2^32": with_model(vocab={**vocab, some[0]: 2**32}),
        "an id of 2^32-1": with_model(vocab={**vocab, some[0]: 2**32 - 1}),
        "an id that is text": with_model(vocab={**vocab, some[0]: "1"}),
        "a gap": with_model(vocab={t: i + 1000 * (i > 290) for t, i in vocab.items()}),
        "no vocabulary": with_model(vocab={}),
        "vocabulary a list": with_model(vocab=list(vocab)),
        "a merge of unknown tokens": with_model(merges=[["zzzz", "yyyy"], *model["merges"]]),
        "a merge twice": with_model(merges=model["merges"] + model["merges"][:3]),
        "a merge with itself": with_model(merges=[[some[0], ""], ["", some[0]]]),
        "merges of three": with_model(merges=[["a", "b", "c"]]),
        "merges as text": with_model(merges=["a b c d"]),
        "merges null": with_model(merges=None),
        "an unknown model": with_model(type="Evil"),
        "an unknown token that is none": with_model(unk_token="nowhere"),
        "dropout 5": with_model(dropout=5.0),
        "a pattern without end": {**sound, "pre_tokenizer": split(r"(a+)+$")},
        "a pattern that is none": {**sound, "pre_tokenizer": split("(((")},
        "a pattern that loses text": {**sound, "pre_tokenizer": split("[a-z]", "Removed")},
        "a normalizer that empties": {**sound, "normalizer": replaced({"Regex": "."}, "")},
        "a normalizer that grows": {**sound, "normalizer": replaced({"String": "e"}, "e" * 10_000)},
        "added tokens of id 0": {**sound, "added_tokens": [added(f"<{n}>", 0) for n in range(5)]},
        "an added token that is empty": {**sound, "added_tokens": [added("", 5)]},
        "an added token of id 2^31": {**sound, "added_tokens": [added("<x>", 2**31)]},
        "added tokens null": {**sound, "added_tokens": None},
        "padding of 10^12": {**sound, "padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0,
                                                  "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}},
        "truncation to 0": {**sound, "truncation": {"max_length": 0, "stride": 5, "strategy": "LongestFirst",
                                                    "direction": "Right"}},
        "a post-processor of unknown ids": {**sound, "post_processor": {
            "type": "BertProcessing", "sep": ["[SEP]", 10**9], "cls": ["[CLS]", 10**9]}},
        "a decoder that is none": {**sound, "decoder": {"type": "Evil"}},
        "a list": [sound],
        "empty": {},
        "nested": json.loads("[" * 500 + "]" * 500),
    }  # fmt: skip


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(content: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def rewritten(draw: random.Random, tree: Any, depth: int = 0) -> Any:
    """A JSON tree with one value somewhere in it exchanged for another."""
    odd = [None, -1, 0, 2**31, 2**63, 1.5, "", "x", [], {}, True, [[]], "\ud800", "a" * 1000, {"type": "BPE"}]
    if draw.random() < 0.15 * depth or not isinstance(tree, (dict, list)) or not tree:
        return draw.choice(odd)
    if isinstance(tree, list):
        place = draw.randrange(len(tree))
        return [*tree[:place], rewritten(draw, tree[place], depth + 1), *tree[place + 1 :]]
    key = draw.choice(list(tree))
    if draw.random() < 0.1:
        return {k: v for k, v in tree.items() if k != key}
    return {**tree, key: rewritten(draw, tree[key], depth + 1)}


@campaign("T3", "hostile tokenizers: used or refused, never a traceback", 45, 1000)
def hostile_tokenizers(bench: Bench, count: int) -> Iterator[Trial]:
    """Half by bytes, half by value; each has to encode a prompt and decode what the model says."""
    draw = bench.draw("T3")
    text = (bench.run / "model" / "tokenizer.json").read_bytes()
    sound = json.loads(text)
    cases = [("made up", name, json.dumps(tree).encode()) for name, tree in tokenizer_attacks(sound).items()]
    cases = [case for case in cases if count >= 1000 or "grows" not in case[1]]
    while len(cases) < count:
        cases.append(("bytes", "random", damaged(draw, text)))
        cases.append(("values", "random", json.dumps(rewritten(draw, sound)).encode()))
    position = 0
    while position < len(cases):
        box, part = bench.box(), cases[position : position + 40]
        for number, (_, _, content) in enumerate(part):
            model = foreign_model(bench)
            (model / "tokenizer.json").write_bytes(content)
            shutil.move(model, box / str(number))
            model.parent.rmdir()
        commands = [[*generate(box / str(number))[:-1], "--ignore-eos"] for number in range(len(part))]
        outcomes = bench.commands.many(commands, box, timeout=120)
        for (kind, name, content), outcome in zip(part, outcomes, strict=False):
            problem = mistake(outcome, 0, 65)
            yield Trial(kind, problem and f"{name} {content[:200]!r}: {problem}")
        position += len(outcomes)
        shutil.rmtree(box)


# -- shards ------------------------------------------------------------------------------------------------------


def opens(path: Path) -> str | None:
    try:
        open_shards(path)
    except DataError as error:
        return None if "\n" not in str(error) else f"not one line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was opened"


@campaign("D9", "shards truncated at every length: refused at opening", 150, 10**9)
def truncated_shards(bench: Bench, count: int) -> Iterator[Trial]:
    data = bench.copy(bench.run / "data")
    cuts = [(file, size) for file in sorted(data.iterdir()) for size in range(file.stat().st_size)]
    for file, size in bench.draw("D9").sample(cuts, min(count, len(cuts))):
        sound = file.read_bytes()
        file.write_bytes(sound[:size])
        problem = opens(data)
        file.write_bytes(sound)
        yield Trial(file.name, problem and f"{file.name} cut to {size} of {len(sound)} bytes: {problem}")


@campaign("D11", "shards swapped, missing, of another tokenizer, ids beyond it", 10, 30)
def wrong_shards(bench: Bench, count: int) -> Iterator[Trial]:
    def swap(data: Path, one: str, two: str) -> None:
        (data / one).rename(data / "aside")
        (data / two).rename(data / one)
        (data / "aside").rename(data / two)

    def tokens(data: Path, change: Callable[[Any], Any]) -> None:
        ids = np.fromfile(data / "train.tokens", dtype="<u2")
        change(ids).astype("<u2").tofile(data / "train.tokens")
        manifest = folder.read_manifest(data)
        manifest["splits"]["train"]["tokens"] = len(change(ids))
        folder.write_manifest(data, manifest)
        seal(data)

    def documents(data: Path, starts: list[int]) -> None:
        np.array(starts, dtype="<u8").tofile(data / "train.documents")
        manifest = folder.read_manifest(data)
        manifest["splits"]["train"]["documents"] = len(starts)
        folder.write_manifest(data, manifest)
        seal(data)

    other = bench.box() / "other"
    done = bench.commands(*bench.train(other, "data.separator=queen", "tokenizer.vocab_size=300"), box=other.parent)
    assert done.code == 0, done.err
    names = [path.name for path in sorted((bench.run / "data").iterdir())]
    cases: list[tuple[str, Callable[[Path], Any], tuple[int, ...]]] = [
        ("swapped", lambda data: swap(data, "train.tokens", "eval.tokens"), (65,)),
        ("swapped", lambda data: swap(data, "train.documents", "eval.documents"), (65,)),
        ("swapped", lambda data: swap(data, "train.tokens", "train.documents"), (65,)),
        *(("missing", lambda data, name=name: (data / name).unlink(), (65,)) for name in names),
        *(("another run's", lambda data, name=name: shutil.copy(other / "data" / name, data / name), (65,))
          for name in names if name != "tokenizer_config.json"),
        ("another run's, all", lambda data: [shutil.copy(other / "data" / n, data) for n in names], (65, 78)),
        ("another tokenizer, resealed", 
         lambda data: (shutil.copy(other / "data" / "tokenizer.json", data), seal(data)), (65,)),
        ("a file too many", lambda data: (data / "more.tokens").write_bytes(b"x"), (0,)),
        ("ids beyond the vocabulary",
         lambda data: tokens(data, lambda ids: np.where(ids == ids[7], 60_000, ids)), (65, 78)),
        ("ids beyond the vocabulary by one", lambda data: tokens(data, lambda ids: np.append(ids[:-1], 280)), (65, 78)),
        ("all ids 0", lambda data: tokens(data, lambda ids: ids * 0), (65, 78)),
        ("shorter than a row", lambda data: tokens(data, lambda ids: ids[:5]), (65, 78)),
        ("one id", lambda data: tokens(data, lambda ids: ids[:1]), (65, 78)),
        ("no id", lambda data: tokens(data, lambda ids: ids[:0]), (65, 78)),
        ("documents out of order", lambda data: documents(data, [0, 50, 20]), (65,)),
        ("documents beyond the end", lambda data: documents(data, [0, 10**9]), (65,)),
        ("documents that do not begin at 0", lambda data: documents(data, [3, 9]), (65,)),
        ("documents of 2^63", lambda data: documents(data, [0, 2**63]), (65,)),
    ]  # fmt: skip
    for kind, change, codes in bench.draw("D11").sample(cases, min(count, len(cases))):
        run = unfinished(bench)
        change(run / "data")
        command, text = bench.train(run), bench.folder / "text.txt"
        text.rename(bench.folder / "away.txt")  # else the shards are made again, rightly
        try:
            outcome = bench.commands(*command, box=run.parent)
        finally:
            (bench.folder / "away.txt").rename(text)
        problem = mistake(outcome, *codes)
        yield Trial(kind, problem and f"{kind}: {problem}")
        shutil.rmtree(run.parent)
