"""What a child of the zygote may be told to do wrong: product code with one defect, or an operating system that fails.

The first kind are the campaign's negative controls. A campaign in which none of them is ever caught proves nothing.
"""

import builtins
import errno
import importlib
import io
import json
import os
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gptworks.core.folder as folder
import gptworks.model.weights as weights
import gptworks.training.gradients as gradients
import gptworks.training.loop as loop
import gptworks.training.state as state
from gptworks.core.log import console
from gptworks.data.batch import Cursor
from gptworks.data.loader import Loader

MUTANTS: dict[str, Callable[[], None]] = {}
REPLACED: dict[str, tuple[str, ...]] = {}  # what each of them replaces: module:name
RESTORE = ("gptworks.training.state:restore", "gptworks.training.session:restore")


def mutant(*places: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def named(make: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[make.__name__], REPLACED[make.__name__] = make, places
        return make

    return named


def at(place: str) -> Any:
    """What stands at a place; None where it is gone."""
    module, _, name = place.partition(":")
    thing: Any = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing


def apply(name: str) -> None:
    """`NAME` of a mutant; `samples=FILE`, `io=KIND:N:FOLDER`, `order=FILE:FOLDER` or `keep=N`."""
    kind, _, value = name.partition("=")
    {"samples": samples, "io": failing_io, "order": order, "keep": keep}.get(kind, lambda _: MUTANTS[name]())(value)


def after_restore(change: Callable[[Any], None]) -> None:
    usual = state.restore

    def restore(made: Any, path: Path) -> Any:
        facts = usual(made, path)
        change(made)
        return facts

    from gptworks.training import session

    state.restore = session.restore = restore  # type: ignore[attr-defined]


# -- mutants -----------------------------------------------------------------------------------------------------


@mutant(*RESTORE)
def cursor_one_row_on() -> None:
    after_restore(lambda s: setattr(s, "cursor", Cursor(s.cursor.epoch, s.cursor.row + 1)))


@mutant(*RESTORE)
def epoch_begun_again() -> None:
    after_restore(lambda s: setattr(s, "cursor", Cursor(s.cursor.epoch, 0)))


@mutant(*RESTORE)
def momentum_forgotten() -> None:
    def forget(s: Any) -> None:
        for optimizer in s.optimizers:
            for slots in optimizer.state.values():
                for name, value in slots.items():
                    if name != "step":
                        value.zero_()

    after_restore(forget)


@mutant(*RESTORE)
def adam_step_forgotten() -> None:
    def forget(s: Any) -> None:
        for optimizer in s.optimizers:
            for slots in optimizer.state.values():
                if "step" in slots:
                    slots["step"].fill_(1.0)

    after_restore(forget)


@mutant("gptworks.training.loop:RunSchedule.factor")
def schedule_begun_again() -> None:
    usual, begun = loop.RunSchedule.factor, []

    def factor(self: Any, step: int) -> float:
        begun.append(step)
        return usual(self, step - begun[0])

    loop.RunSchedule.factor = factor  # type: ignore[method-assign]


@mutant("gptworks.training.gradients:seed_everything")
def random_draws_of_the_process() -> None:
    usual, calls = gradients.seed_everything, []

    def seed(*numbers: int) -> None:
        calls.append(1)
        usual(numbers[0], len(calls))

    gradients.seed_everything = seed


@mutant(*RESTORE)
def average_begun_again() -> None:
    after_restore(lambda s: s.average.clear())


@mutant(*RESTORE)
def window_of_norms_lost() -> None:
    after_restore(lambda s: s.norms.clear())


@mutant(*RESTORE)
def best_figure_forgotten() -> None:
    after_restore(lambda s: setattr(s, "best_figure", None))


@mutant("gptworks.core.folder:commit", "gptworks.training.state:_is_good")
def written_in_place() -> None:
    from contextlib import contextmanager

    @contextmanager
    def commit(path: Path, facts: Any = None, known: Any = None) -> Any:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        files = {
            f.name: {"bytes": f.stat().st_size, "sha256": folder.sha256(f)}
            for f in path.iterdir()
            if f.name != folder.MANIFEST
        }
        folder.failpoint("folder.manifest")
        folder.write_manifest(path, {**(facts or {}), "files": files})

    folder.commit = commit
    state._is_good = lambda path: False


@mutant("gptworks.core.folder:fsync")
def nothing_made_durable() -> None:
    folder.fsync = lambda path: None


@mutant("gptworks.training.state:Saving._write")
def old_checkpoints_removed_first() -> None:
    usual = state.Saving._write

    def write(self: Any) -> None:
        for old in state.listing(self.checkpoints):
            shutil.rmtree(old, ignore_errors=True)
        usual(self)

    state.Saving._write = write  # type: ignore[method-assign]


@mutant("gptworks.training.state:Saving._write")
def said_before_it_was_saved() -> None:
    usual = state.Saving._write

    def write(self: Any) -> None:
        console.say(f"saved    {self.path}")
        usual(self)

    state.Saving._write = write  # type: ignore[method-assign]


@mutant("gptworks.training.state:State.settle", "gptworks.model.weights:write")
def weights_read_while_they_change() -> None:
    state.State.settle = lambda self: None  # type: ignore[method-assign]
    usual = weights.write

    def slow(path: Path, tensors: Any) -> str:
        import time

        time.sleep(0.05)
        return usual(path, tensors)

    weights.write = slow


@mutant("gptworks.core.folder:verify")
def hashes_not_compared() -> None:
    folder.verify = lambda path, names=None: folder.read_json(path / folder.MANIFEST)


# -- an honest product under an unkind system --------------------------------------------------------------------


def samples(path: str) -> None:
    """Logs what each process trains on: step of the cursor, first row, CRC of the tokens."""
    import zlib

    usual = Loader.take

    def take(self: Any, cursor: Any) -> Any:
        batch, after = usual(self, cursor)
        row = [cursor.epoch, cursor.row, batch.first, zlib.crc32(batch.tokens.numpy().tobytes())]
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return batch, after

    Loader.take = take  # type: ignore[method-assign]


def keep(number: str) -> None:
    """Keeps so many checkpoints."""
    state.KEPT = int(number)


class Counted:
    """Fails the N-th call (from 1) that writes below a folder; counts on afterwards."""

    def __init__(self, kind: str, number: int, below: str) -> None:
        self.number, self.below, self.calls = number, os.path.abspath(below), 0
        self.struck = ""  # what was being done when the call failed
        self.error, self.lock = getattr(errno, kind.upper()), threading.Lock()

    def __call__(self, path: Any) -> None:
        try:
            inside = os.path.abspath(os.fspath(path)).startswith(self.below + os.sep)
        except TypeError:
            return
        if inside:
            with self.lock:  # a checkpoint is written by a thread of its own
                self.calls += 1
                strike = self.calls == self.number
            if strike:
                self.struck = "".join(traceback.format_stack(limit=8))
                raise OSError(self.error, os.strerror(self.error), f"{path} (call {self.number} of the campaign)")


class File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, path: Any, check: Counted) -> None:
        self._file, self._path, self._check = file, path, check

    def write(self, content: Any) -> Any:
        self._check(self._path)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> "File":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)


def failing_io(text: str) -> None:
    """`KIND:N:FOLDER`: the N-th open for writing, write, fsync, rename or mkdir below the folder fails with KIND; a
    file FOLDER.calls says how many there were."""
    kind, number, below = text.split(":", 2)
    check, usual_open = Counted(kind, int(number), below), builtins.open

    def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return usual_open(file, mode, *rest, **more)
        check(file)
        return File(usual_open(file, mode, *rest, **more), file, check)

    builtins.open = io.open = opened  # type: ignore[assignment]
    for name in ("rename", "replace", "mkdir"):
        usual = getattr(os, name)

        def counted(path: Any, *rest: Any, _usual: Any = usual, _name: str = name, **more: Any) -> Any:
            if not (_name == "mkdir" and os.path.isdir(path)):  # which needs no room and answers that it exists
                check(path)
            return _usual(path, *rest, **more)

        setattr(os, name, counted)
    usual_fsync = folder.fsync

    def fsync(path: Path) -> None:
        check(path)
        usual_fsync(path)

    folder.fsync = fsync
    usual_exit = os._exit

    def leave(code: int) -> None:
        with usual_open(f"{below}.calls", "w") as file:
            file.write(f"{check.calls}\n{check.struck}")
        usual_exit(code)

    os._exit = leave  # type: ignore[assignment]


def order(text: str) -> None:
    """`FILE:FOLDER`: logs every fsync and rename below the folder, in order."""
    path, below = text.split(":", 1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: Any) -> None:
        os.write(log, (json.dumps([str(w) for w in words]) + "\n").encode())

    usual_sync, usual_rename, usual_replace = os.fsync, os.rename, os.replace

    def fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        usual_sync(handle)
        if name.startswith(os.path.abspath(below)):
            note("fsync", name)

    def rename(old: Any, new: Any) -> None:
        usual_rename(old, new)
        note("rename", os.path.abspath(old), os.path.abspath(new))

    def replace(old: Any, new: Any) -> None:
        usual_replace(old, new)
        note("rename", os.path.abspath(old), os.path.abspath(new))

    os.fsync, os.rename, os.replace = fsync, rename, replace  # type: ignore[assignment]
