"""D10, P7 and P8: one flipped bit, or a cut, anywhere in shards and checkpoints is found before it is used."""

import contextlib
import io
import shutil
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from campaign import Bench, Trial, campaign
from harness import mistake
from hostile_files import unfinished
from malformed_data import flipped, opens

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.training.state import listing, newest_good

CUTS = ("empty", "one byte", "half", "one byte short")


@campaign("D10", "one bit flipped in a folder of shards: found at opening", 150, 1000)
def flipped_shards(bench: Bench, count: int) -> Iterator[Trial]:
    draw, data = bench.draw("D10"), bench.copy(bench.run / "data")
    files = sorted(data.iterdir())
    for number in range(count):
        file = files[number % len(files)]  # each file as often, or the small ones would hardly be hit
        sound = file.read_bytes()
        place, bit = draw.randrange(len(sound)), draw.randrange(8)
        file.write_bytes(flipped(sound, place, bit))
        problem = opens(data)
        file.write_bytes(sound)
        yield Trial(file.name, problem and f"{file.name}, bit {bit} of byte {place}: {problem}")
    if count >= 1000:
        bench.notes["verify, seconds for a GB"] = seconds_for_a_gigabyte(bench)


def seconds_for_a_gigabyte(bench: Bench) -> float:
    """What checking a folder of 1 GB costs, read from the disk's cache: the least of three."""
    path = bench.box() / "big"
    block = bench.draw("verify").randbytes(2**20)
    with folder.commit(path) as aside, open(aside / "a.tokens", "wb") as file:
        for _ in range(1000):
            file.write(block[:1_000_000])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        folder.verify(path)
        times.append(time.perf_counter() - start)
    shutil.rmtree(path)
    return round(min(times), 2)


def falls_back(checkpoints: Path, older: Path, newest: Path) -> str | None:
    """Whether a reader takes the older checkpoint, says so and sets the newest aside; put back afterwards."""
    said, aside = io.StringIO(), newest.with_name(f"{newest.name}.damaged")
    try:
        with contextlib.redirect_stderr(said):
            found = newest_good(checkpoints)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        if found != older:
            return f"{found} is taken"
        return None if newest.name in said.getvalue() and aside.is_dir() else f"not set aside: {said.getvalue()}"
    finally:
        if aside.is_dir():
            aside.rename(newest)


@campaign("P8", "one bit flipped in a checkpoint: the one before is taken", 150, 1000)
def flipped_checkpoints(bench: Bench, count: int) -> Iterator[Trial]:
    draw, checkpoints = bench.draw("P8"), bench.copy(bench.run / "checkpoints")
    older, newest = listing(checkpoints)
    names = sorted(file.name for file in newest.iterdir())
    for number in range(count):
        file = newest / names[number % len(names)]
        sound = file.read_bytes()
        place, bit = draw.randrange(len(sound)), draw.randrange(8)
        file.write_bytes(flipped(sound, place, bit))
        problem = falls_back(checkpoints, older, newest)
        file.write_bytes(sound)
        yield Trial(file.name, problem and f"{file.name}, bit {bit} of byte {place}: {problem}")


@campaign("P7", "checkpoints cut or empty: the one before, or exit 65 with none", 32, 48)
def truncated_checkpoints(bench: Bench, count: int) -> Iterator[Trial]:
    """In the newest and in all; through the reader, and where there are more to try, through the command."""
    checkpoints = bench.copy(bench.run / "checkpoints")
    older, newest = listing(checkpoints)
    pairs = list(product(sorted(file.name for file in newest.iterdir()), CUTS))
    for name, cut in pairs:
        sound = (newest / name).read_bytes()
        (newest / name).write_bytes(sound[: size_of(sound, cut)])
        problem = falls_back(checkpoints, older, newest)
        both = (older / name).read_bytes()
        (older / name).write_bytes(both[: size_of(both, cut)])
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                problem_of_none: str | None = f"{newest_good(checkpoints)} is taken"
            except DataError as error:
                problem_of_none = None if "--fresh" in str(error) else str(error)
        (newest / name).write_bytes(sound)
        (older / name).write_bytes(both)
        yield Trial("the newest", problem and f"{name} {cut}: {problem}")
        yield Trial("all", problem_of_none and f"{name} {cut}: {problem_of_none}")
    for name, cut in pairs[: max(count - 2 * len(pairs), 0)]:
        run = unfinished(bench)
        file = listing(run / "checkpoints")[-1] / name
        file.write_bytes(file.read_bytes()[: size_of(file.read_bytes(), cut)])
        outcome = bench.commands(*bench.train(run), box=run.parent)
        problem = mistake(outcome, 0)
        if not problem and "continues from step 2" not in outcome.err:
            problem = f"not continued from the one before: {outcome.err[-300:]}"
        shutil.rmtree(run.parent)
        yield Trial("the command", problem and f"{name} {cut}: {problem}")


def size_of(sound: bytes, cut: str) -> int:
    return {"empty": 0, "one byte": 1, "half": len(sound) // 2, "one byte short": len(sound) - 1}[cut]
