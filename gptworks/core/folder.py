"""Folders on disk: written aside, hashed, made durable, and put in place by one rename.

Every byte the product keeps goes through this module: a folder either has its final name, a manifest and all its
files, or it is not there. Readers verify the manifest before they trust a byte.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.core.failpoint import failpoint
from gptworks.core.log import size

MANIFEST = "manifest.json"
UNSEALED = "0" * 64  # stands where a manifest's own SHA-256 will be, while it is hashed


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a full or unreadable disk into our error."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "your disk quota is used up; free some space and run the same command again",
            errno.EACCES: "permission denied; allow writing there, or choose another place",
            errno.EROFS: "the file system is read-only; choose another place",
            errno.EBUSY: "a disk is mounted there, or a program has it open; name a folder inside it",
            errno.EXDEV: "a disk is mounted there; name a folder inside it",
        }.get(error.errno or 0, "check the disk, then run the same command again")
        raise StorageError(f"{path}: {error.strerror or error}: {advice}") from error


def expanded(name: str) -> str:
    """A path as it was typed, with the home folder for a `~` at its beginning; what exists under the very name given
    is what is meant."""
    return name if not name.startswith("~") or os.path.lexists(name) else os.path.expanduser(name)


def path(name: str | Path) -> Path:
    """The path of what was named, as `expanded`."""
    return Path(expanded(str(name)))


def sha256(path: Path) -> str:
    """SHA-256 of a file. Raises DataError for what is no file, StorageError where it cannot be read."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from None


# Answers of a file system, such as a network share, that has no such call; not those of one that failed at it.
NO_SUCH_CALL = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def fsync(path: Path) -> None:
    """Makes a file's content, or a directory's entries, survive a power cut, as far as the file system has a way to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise
    finally:
        os.close(handle)


@contextmanager
def commit_file(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write; on success it becomes `path` in one step.

    If the block raises, `path` is what it was before. What a process that died in here left goes away.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        try:
            yield aside
            fsync(aside)
            failpoint("text.replace")
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file atomically: readers see the old content or the new, never a part."""
    with commit_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def check_space(path: Path, needed: int) -> None:
    """Raises StorageError where the disk that `path` is to be on has not so many bytes free."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    with storage_errors(path):
        disk = shutil.disk_usage(place)
    if needed > disk.free and disk.total:  # some network shares say 0 of both
        raise StorageError(
            f"{path}: needs {size(needed)}, and {size(disk.free)} are free; free some space or choose another --out"
        )


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_regular(path: Path) -> None:
    """Raises DataError for a pipe or a device in the place of a file: to open one may wait without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: not a regular file")


def read_json(path: Path) -> Any:
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def write_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Writes a folder's manifest with a SHA-256 of its own in front, so that a flipped bit in it is found too."""
    text = json.dumps({"sha256": UNSEALED, **facts}, indent=2, ensure_ascii=False) + "\n"
    write_text(path / MANIFEST, text.replace(UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1))


def read_manifest(path: Path) -> dict[str, Any]:
    """A folder's manifest, checked against its own SHA-256. Raises DataError."""
    file = path / MANIFEST
    manifest = read_json(file)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise DataError(f"{file}: not a manifest")
    own = manifest.pop("sha256", None)
    unsealed = file.read_bytes().replace(str(own).encode("utf-8", "replace"), UNSEALED.encode(), 1)
    if hashlib.sha256(unsealed).hexdigest() != own:
        raise DataError(f"{file}: its own SHA-256 differs; the file is damaged")
    return manifest


ASIDE = re.compile(r"\.(.+)\.([0-9]+)(\.old)?\.tmp")  # the name under which something is written first


def _leftovers(path: Path) -> list[tuple[Path, bool]]:
    """Leftovers of `path` from processes that died; True beside those that are an old folder about to be replaced."""
    named = [(entry, ASIDE.fullmatch(entry.name)) for entry in path.parent.iterdir()]
    return [
        (entry, bool(match[3]))
        for entry, match in named
        if match and match[1] == path.name and not _alive(int(match[2]))
    ]


def clear_up(*folders: Path) -> None:
    """Mends what processes that died left in these folders, whatever it was to become."""
    for folder in folders:
        aside = [ASIDE.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        for name in {match[1] for match in aside if match}:
            with storage_errors(folder):
                _clear_up(folder / name)


def _clear_up(path: Path) -> None:
    """Mends what a process that died while it wrote `path` left: the old folder goes back, what is half goes away."""
    for leftover, old in _leftovers(path):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
        elif old and not path.exists():
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    """True while another process of this number runs, which is then still at work on its folder."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def commit(path: Path, facts: dict[str, Any] | None = None, known: dict[str, str] | None = None) -> Iterator[Path]:
    """Gives a folder to fill; on success it becomes `path` in one step, with a manifest of every file's SHA-256.

    `facts` go into the manifest as they are when the block ends; who has hashed a file while writing it leaves that in
    `known`, by name. If the block raises, `path` is what it was before. An existing folder at `path` is moved away only
    after the new one is durable; a process that dies between those two renames leaves the old one beside `path`, and
    the next `commit` puts it back first. What others put into a folder of ours goes along into the new one; a folder
    that is not ours is left alone (UsageError). Where `path` is a link, what it points at is replaced.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays, and no rename goes from disk to disk
    aside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(path)
        aside.mkdir()
    try:
        with storage_errors(path):
            yield aside
            files = {}
            for file in sorted(p for p in aside.rglob("*") if p.is_file()):
                failpoint("folder.fsync")
                fsync(file)
                name = file.relative_to(aside).as_posix()
                digest = (known or {}).get(name) or sha256(file)
                files[name] = {"bytes": file.stat().st_size, "sha256": digest}
            failpoint("folder.manifest")
            write_manifest(aside, {**(facts or {}), "files": files})
            for guest in foreign_files(path, {file.name for file in aside.iterdir()}):
                _copy(guest, aside / guest.name)
            for folder in [p for p in aside.rglob("*") if p.is_dir()] + [aside]:
                fsync(folder)
            failpoint("folder.rename")
            if path.exists():
                old = path.parent / f".{path.name}.{os.getpid()}.old.tmp"
                os.rename(path, old)
                try:
                    os.rename(aside, path)
                except BaseException:
                    os.rename(old, path)
                    raise
                failpoint("folder.renamed")
                fsync(path.parent)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(aside, path)
                failpoint("folder.renamed")
                fsync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def foreign_files(path: Path, ours: set[str] | None = None) -> list[Path]:
    """Files in a folder of ours that are not ours: neither in its manifest nor among the names of `ours`.

    Raises UsageError where there is no manifest and something else: then it is a folder of somebody's.
    """
    known = {MANIFEST, *(ours or ())}
    try:
        known |= {name.partition("/")[0] for name in read_manifest(path)["files"]} if path.is_dir() else set()
        written = True
    except DataError:
        written = False
    foreign = sorted(entry for entry in (path.iterdir() if path.is_dir() else ()) if entry.name not in known)
    if foreign and not written:
        raise UsageError(
            f"{path}: has files that gptworks did not write ({foreign[0].name}), and would be replaced; choose another "
            "--out or data.shards"
        )
    return foreign


def _copy(source: Path, target: Path) -> None:
    """Copies a file or folder durably, since the original goes away."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=_copy_file)
    else:
        _copy_file(source, target)


def _copy_file(source: str | Path, target: str | Path) -> None:
    shutil.copy2(source, target, follow_symlinks=False)
    if not os.path.islink(target):
        fsync(Path(target))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def verify(path: Path, names: Collection[str] | None = None, but: Collection[str] = ()) -> dict[str, Any]:
    """Reads the manifest of a folder and checks every file against it, of others than `names`, where these are given,
    the size alone; not those in `but`. Returns the manifest.

    Raises DataError that names the first missing, resized or altered file.
    """
    manifest = read_manifest(path)
    files = {name: expected for name, expected in manifest["files"].items() if name not in but}
    for name, expected in files.items():
        _check_size(path / name, expected)
    for name, expected in files.items():
        if names is None or name in names:
            _check_hash(path / name, expected)
    return manifest


def _check_size(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing, though the manifest lists it")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise DataError(f"{file}: {size} bytes where the manifest has {expected['bytes']}; the file is damaged")


def _check_hash(file: Path, expected: dict[str, Any]) -> None:
    if sha256(file) != expected["sha256"]:
        raise DataError(f"{file}: its SHA-256 differs from the manifest; the file is damaged")


HASHED_AT_ONCE = 2**30  # bytes of a folder; where there are more, a start does not wait for their hashes


class Verifying:
    """A large folder compared with its manifest beside other work.

    That its files are there, and their sizes, is checked at once; so are the hashes of a folder of up to
    `HASHED_AT_ONCE` bytes. Raises DataError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, read_manifest(path)
        self.error: DataError | StorageError | None = None
        self.thread: threading.Thread | None = None
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        for name, expected in files.items():
            _check_size(path / name, expected)
        if sum(expected["bytes"] for expected in files.values()) <= HASHED_AT_ONCE:
            verify(path)
        else:
            self.thread = threading.Thread(target=self._hash, daemon=True, name="verifying")
            self.thread.start()

    def _hash(self) -> None:
        try:
            verify(self.path)
        except (DataError, StorageError) as error:
            self.error = error

    @property
    def ended(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> None:
        """Waits for the last hash. Raises StorageError, or DataError; the folder then has no manifest, so that it is
        made anew."""
        if self.thread:
            self.thread.join()
        if isinstance(self.error, StorageError):
            raise self.error
        if self.error:
            with suppress(OSError):
                (self.path / MANIFEST).unlink()
            raise DataError(f"{self.error}; run the same command to make it anew")
