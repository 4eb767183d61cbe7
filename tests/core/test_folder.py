"""A folder either has its name, its manifest and all its files, or it is not there."""

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptworks.core import folder, runtime
from gptworks.core.errors import DataError, RunMismatch, StorageError, UsageError


def make(path: Path, text: str = "hello") -> None:
    with folder.commit(path, {"kind": "test"}) as aside:
        (aside / "a.txt").write_text(text)
        (aside / "inner").mkdir()
        (aside / "inner" / "b.bin").write_bytes(bytes(range(256)))


def test_commit_makes_a_folder_that_verifies(tmp_path: Path) -> None:
    make(tmp_path / "x")
    manifest = folder.verify(tmp_path / "x")
    assert manifest["kind"] == "test"
    assert set(manifest["files"]) == {"a.txt", "inner/b.bin"}
    assert os.listdir(tmp_path) == ["x"]


def test_commit_replaces_a_folder_whole(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    with folder.commit(tmp_path / "x") as aside:
        (aside / "c.txt").write_text("new")
    assert sorted(os.listdir(tmp_path / "x")) == ["c.txt", folder.MANIFEST]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), DataError("bad row")])
def test_failure_inside_leaves_the_old_folder_and_no_leftovers(tmp_path: Path, error: BaseException) -> None:
    make(tmp_path / "x", "old")
    with pytest.raises(type(error)), folder.commit(tmp_path / "x") as aside:
        (aside / "a.txt").write_text("half")
        raise error
    folder.verify(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_failure_inside_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder.commit(tmp_path / "x") as aside:
        (aside / "a.txt").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_full_disk_is_a_storage_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    make(tmp_path / "x", "old")

    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="disk is full") as caught:
            make(tmp_path / "x", "new")
    assert caught.value.code == 74
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    folder.verify(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_failure_of_the_last_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", "old")
    rename, calls = os.rename, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(StorageError):
            make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path: Path) -> None:
    number = dead_process()
    make(tmp_path / f".x.{number}.old.tmp", "old")  # killed between the two renames
    make(tmp_path / f".x.{number}.tmp", "new")
    with pytest.raises(RuntimeError), folder.commit(tmp_path / "x"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_what_was_left_of_a_longer_name_is_not_touched(tmp_path: Path) -> None:
    number = dead_process()
    theirs = [tmp_path / f".x.v2.{number}.old.tmp", tmp_path / f".x.old.{number}.tmp"]  # of x.v2 and of x.old
    for path in theirs:
        make(path)
    make(tmp_path / "x")
    assert all(path.is_dir() for path in theirs)


def test_a_folder_another_process_is_filling_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f".x.{os.getppid()}.tmp"
    theirs.mkdir()
    make(tmp_path / "x")
    assert theirs.is_dir()


def test_write_text_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    folder.write_json(path, {"a": 1})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            folder.write_json(path, {"a": 2})
    assert folder.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def truncate(path: Path) -> None:
    (path / "inner" / "b.bin").write_bytes(bytes(range(255)))


def flip(path: Path) -> None:
    data = bytearray((path / "inner" / "b.bin").read_bytes())
    data[100] ^= 1
    (path / "inner" / "b.bin").write_bytes(data)


def remove(path: Path) -> None:
    (path / "inner" / "b.bin").unlink()


@pytest.mark.parametrize("damage, word", [(truncate, "255 bytes"), (flip, "SHA-256"), (remove, "missing")])
def test_verify_names_the_damaged_file(tmp_path: Path, damage: Any, word: str) -> None:
    make(tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(DataError, match=rf"b\.bin: .*{word}"):
        folder.verify(tmp_path / "x")
    folder.verify(tmp_path / "x", but=["inner/b.bin"])  # the other file is fine
    if word == "SHA-256":
        folder.verify(tmp_path / "x", ["a.txt"])  # the others' sizes alone


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a.txt": 5}}', '{"files": {"a.txt": {}}}', "[" * 100_000],
    ids=range(8),
)
def test_broken_manifest_is_a_data_error(tmp_path: Path, text: str) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / folder.MANIFEST).write_text(text)
    with pytest.raises(DataError, match=folder.MANIFEST):
        folder.verify(tmp_path / "x")


def test_missing_manifest_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        folder.verify(tmp_path)


def test_a_held_run_refuses_a_second_process_and_is_free_again_afterwards(tmp_path: Path) -> None:
    with (
        runtime.hold(tmp_path / "run"),
        pytest.raises(RunMismatch, match="another process"),
        runtime.hold(tmp_path / "run"),
    ):
        pass
    with runtime.hold(tmp_path / "run"):
        pass


def test_who_reads_a_run_keeps_writers_out_and_lets_readers_in(tmp_path: Path) -> None:
    run = tmp_path / "run"
    reading = runtime.hold(run, reading=True)
    with reading, runtime.hold(run, reading=True), pytest.raises(RunMismatch, match="another"), runtime.hold(run):
        pass
    with runtime.hold(run), pytest.raises(RunMismatch, match="wait for it$"), runtime.hold(run, reading=True):
        pass


def test_a_run_on_a_read_only_disk_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.hold(tmp_path):
        pass

    def read_only(path: Path, mode: str) -> Any:
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system")
        return open(path, mode)

    monkeypatch.setattr(runtime, "open", read_only, raising=False)
    with runtime.hold(tmp_path, reading=True):
        pass
    with pytest.raises(StorageError, match="Read-only file system: choose another --out"), runtime.hold(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    with pytest.raises(StorageError, match="verify a copy"), runtime.hold(tmp_path, reading=True):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_disk_without_locks_is_warned_of_and_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with runtime.hold(tmp_path):
        pass
    assert f"cannot be locked ({os.strerror(number)})" in capsys.readouterr().err


def test_a_lock_that_fails_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(StorageError, match="cannot be locked: Input/output error"), runtime.hold(tmp_path):
        pass


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_lock_file_of_another_person_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch()
    asked: list[str] = []

    def read_only(path: Path, mode: str) -> Any:
        asked.append(mode)
        return open(path, mode)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(runtime, "open", read_only, raising=False)
    with runtime.hold(tmp_path), pytest.raises(RunMismatch, match="another process"), runtime.hold(tmp_path):
        pass
    assert set(asked) == {"r"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_disk_that_cannot_sync_folders_is_used_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sync = os.fsync

    def no_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    if number == errno.EIO:
        with pytest.raises(StorageError, match="Input/output error"):
            make(tmp_path / "x")
        assert not os.listdir(tmp_path)
    else:
        make(tmp_path / "x", "old")
        make(tmp_path / "x", "new")
        folder.write_text(tmp_path / "y", "text")
        assert folder.verify(tmp_path / "x") and sorted(os.listdir(tmp_path)) == ["x", "y"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_is_a_disk_of_its_own_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refusing(number))
        with pytest.raises(StorageError, match=r"/x: .*disk is mounted there.*name a folder inside it"):
            make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_link_to_a_folder_stays_and_what_it_points_at_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other disk").mkdir()
    make(tmp_path / "other disk" / "x", "old")
    (tmp_path / "x").symlink_to(tmp_path / "other disk" / "x")
    make(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink() and (tmp_path / "other disk" / "x" / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["other disk", "x"] and os.listdir(tmp_path / "other disk") == ["x"]


def test_a_disk_that_says_nothing_of_its_room_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, used=0, free=0))
    folder.check_space(tmp_path / "x", 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9))
    with pytest.raises(StorageError, match="needs 10 bytes, and 9 bytes are free"):
        folder.check_space(tmp_path / "x", 10)


def test_every_bit_of_a_manifest_is_checked(tmp_path: Path) -> None:
    make(tmp_path / "x")
    file = tmp_path / "x" / folder.MANIFEST
    sound = file.read_bytes()
    for place in range(len(sound)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(DataError):
                folder.verify(tmp_path / "x")


def test_what_others_put_beside_our_files_goes_along(tmp_path: Path) -> None:
    with folder.commit(tmp_path / "d") as aside:
        (aside / "a.txt").write_text("one")
        (aside / "gone.txt").write_text("of the first version")
    (tmp_path / "d" / "notes.txt").write_text("a person's")
    (tmp_path / "d" / "more").mkdir()
    (tmp_path / "d" / "more" / "b.txt").write_text("a person's too")
    with folder.commit(tmp_path / "d") as aside:
        (aside / "a.txt").write_text("two")
    assert (tmp_path / "d" / "a.txt").read_text() == "two" and not (tmp_path / "d" / "gone.txt").exists()
    assert (tmp_path / "d" / "notes.txt").read_text() == "a person's"
    assert (tmp_path / "d" / "more" / "b.txt").read_text() == "a person's too"
    assert set(folder.verify(tmp_path / "d")["files"]) == {"a.txt"}


def test_what_others_put_beside_our_files_is_durable_before_the_original_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "d")
    (tmp_path / "d" / "more").mkdir()
    for name in ("notes.txt", "more/b.txt"):
        (tmp_path / "d" / name).write_text("a person's")
    (tmp_path / "d" / "link").symlink_to("nowhere")
    synced: list[str] = []
    sync, remove = folder.fsync, folder.shutil.rmtree
    monkeypatch.setattr(folder, "fsync", lambda path: synced.append(path.name) or sync(path))
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **how: synced.append("gone") or remove(path, **how))
    make(tmp_path / "d")
    assert {"notes.txt", "b.txt", "more"} <= set(synced[: synced.index("gone")])
    assert (tmp_path / "d" / "more" / "b.txt").read_text() == "a person's"
    assert os.readlink(tmp_path / "d" / "link") == "nowhere"


def test_a_folder_that_is_not_ours_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "corpus.txt").write_text("years of work")
    with pytest.raises(UsageError, match="corpus.txt"), folder.commit(tmp_path / "d") as aside:
        (aside / "a.txt").write_text("one")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["corpus.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_large_folder_is_hashed_beside_other_work_and_a_small_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tmp_path / "d", tmp_path / "d" / "a.txt"
    make(path)
    assert folder.Verifying(path).ended
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="SHA-256 differs"):
        folder.Verifying(path)
    monkeypatch.setattr(folder, "HASHED_AT_ONCE", 0)
    begun, hashing, sha256 = threading.Event(), threading.Event(), folder.sha256
    monkeypatch.setattr(folder, "sha256", lambda file: begun.set() or hashing.wait(10) and sha256(file))
    beside = folder.Verifying(path)
    assert begun.wait(10) and not beside.ended
    hashing.set()
    with pytest.raises(DataError, match=r"SHA-256 differs.*run the same command"):
        beside.finish()
    assert not (path / folder.MANIFEST).exists()  # so the next start makes it anew
    make(tmp_path / "e")
    (tmp_path / "e" / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes where the manifest has"):
        folder.Verifying(tmp_path / "e")
