"""Commands run where they can do no harm and hide nothing: what they said, how they ended, what they touched.

`Commands` keeps one child process that has loaded everything and forks for each command, so that a case costs
milliseconds and still has a process of its own: real exit codes, a limit on time and memory, its own peak of memory. An
audit hook in it refuses, and notes, what a command that only reads data has no business doing: starting a process,
connecting a socket, loading a library, unpickling, and writing outside its box.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "os.startfile",
    "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request",
    "ctypes.dlopen", "ctypes.dlsym", "pickle.find_class", "webbrowser.open", "code.__new__",
}  # fmt: skip
PATHS = {  # audit events that change the disk, and how many of their first arguments are paths
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip


@dataclass
class Outcome:
    """How a command ended. `peak` is memory above what the process began with, bytes."""

    code: int
    out: str
    err: str
    events: list[str]
    peak: int
    seconds: float


def mistake(outcome: Outcome, *codes: int, peak: int | None = None) -> str | None:
    """What is wrong with how a command took bad input; None if it ended with one of `codes`, in one line, unharmed."""
    said = outcome.err[-600:]
    if outcome.events:
        return f"it did what it must not: {outcome.events[0]}"
    if outcome.code not in codes:
        return f"exit code {outcome.code}, not {' or '.join(map(str, codes))}: {said}"
    if "Traceback" in outcome.err or "panicked at" in outcome.err:
        return f"a traceback: {said}"
    errors = [line for line in outcome.err.split("\n") if line.startswith("error: ")]
    if outcome.code and (len(errors) != 1 or not outcome.err.endswith(f"{errors[0]}\n")):
        return f"{len(errors)} error lines, or not the last line: {said}"
    if outcome.code and (outcome.out or len(errors[0]) > 1500):
        return f"{len(outcome.out)} characters of output, an error line of {len(errors[0])}"
    if peak is not None and outcome.peak > peak:
        return f"{outcome.peak / 1e6:.0f} MB of memory, {peak / 1e6:.0f} allowed"
    return None


class Commands:
    """Runs commands: `commands("generate", folder, "--prompt", "a", box=folder)`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip

    def __call__(self, *arguments: Any, box: Path, **options: Any) -> Outcome:
        """Runs `gptworks ARGUMENTS` in the folder `box`, the only place it may write to. For `options` see `many`."""
        return self.many([arguments], box, **options)[0]

    def many(
        self, commands: Sequence[Sequence[Any]], box: Path, timeout: float = 60.0, memory: int | None = None,
        stage: bool = True,
    ) -> list[Outcome]:  # fmt: skip
        """Runs commands one after the other in one process, which saves the fork; the first to die is the last.

        timeout: seconds for all; memory: bytes of address space, in all. stage=False: `train` and `run` end where the
        work would begin.
        """
        spelled = [[str(a) for a in arguments] for arguments in commands]
        asked = {"commands": spelled, "box": str(box), "timeout": timeout, "memory": memory, "stage": stage}
        assert self.child.stdin and self.child.stdout
        try:
            print(json.dumps(asked), file=self.child.stdin, flush=True)
            return [Outcome(**answer) for answer in json.loads(self.child.stdout.readline())]
        except (OSError, ValueError) as error:
            self.errors.seek(0)
            raise RuntimeError(f"the command runner died: {self.errors.read()[-2000:]!r}") from error

    def python(self, code: str, box: Path) -> Outcome:
        """Runs Python in place of a command: what the watch sees is tested with this."""
        return self.many([["python", code]], box)[0]

    def close(self) -> None:
        if self.child.stdin:
            self.child.stdin.close()
        self.child.wait()
        self.errors.close()


# -- the child ---------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """The audit hook: asleep until `box` is set."""

    box: str | None = None
    events: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.box is None:
            return
        if event in FORBIDDEN:
            self._refuse(f"{event}{arguments}")
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
            if isinstance(mode, str) and not set(mode) & set("wax+"):
                writes = 0
            if writes:
                self._within(event, path)
        elif event in PATHS:
            directory = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            for path in arguments[: PATHS[event]] if directory in (-1, None) else ():  # else relative to an open folder
                self._within(event, path)

    def _within(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        full = os.path.realpath(os.fsdecode(path))
        assert self.box is not None
        if not (full == "/dev/null" or "__pycache__" in full or os.path.commonpath([full, self.box]) == self.box):
            self._refuse(f"{event}({full})")

    def _refuse(self, what: str) -> None:
        self.events.append(what[:300])
        raise RuntimeError(f"refused by the test: {what[:300]}")


def serve() -> None:
    """Reads commands from standard input, a line each, and answers each with a line."""
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import gptworks.reporting.page
    import gptworks.training.range_test  # noqa: F401
    from gptworks import cli, lifecycle
    from gptworks.core import runtime
    from gptworks.training import session

    for optional in ("pyarrow.parquet", "backports.zstd"):
        with contextlib.suppress(ImportError):
            importlib.import_module(optional)
    torch.set_num_threads(1)
    runtime.reuse_memory()
    runtime.reuse_memory = lambda: None
    runtime.matmul_rate = lambda *arguments: 1e10  # half a second a command, which decides nothing here

    def reached(*arguments: Any, **options: Any) -> dict[str, Any]:
        session.check(arguments[0])
        return {"reached": "work"}

    runtime.versions()  # `uname -p`, whose answer Python keeps
    watch = Watch()
    sys.addaudithook(watch)
    gc.collect()
    gc.freeze()  # a collection in the child would touch, and so copy, every page
    for line in requests:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(_run(asked, Path(folder), watch, cli, lifecycle, reached)), file=answers, flush=True)


def _run(
    asked: dict[str, Any], folder: Path, watch: Watch, cli: Any, lifecycle: Any, reached: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Forks, runs the commands there and reports them."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            _child(asked, folder, watch, cli, lifecycle, reached)
            os._exit(0)
        finally:
            os._exit(70)
    code = -signal.SIGKILL
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.perf_counter() - start > asked["timeout"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    written = (folder / "facts").read_text() if (folder / "facts").is_file() else ""
    answers = [json.loads(line) for line in written.splitlines()]
    if code or len(answers) < len(asked["commands"]):  # it was killed, or left on its own
        last = {"events": [], "peak": 0, "seconds": time.perf_counter() - start}
        answers.append({"code": code, "out": _text(folder / "out"), "err": _text(folder / "err"), **last})
    return answers


def _text(path: Path) -> str:
    """What a command said: all of it, unless it is absurdly much."""
    content = path.read_bytes() if path.is_file() else b""
    return (content if len(content) < 10**6 else content[:5000] + content[-5000:]).decode("utf-8", "replace")


def _child(
    asked: dict[str, Any], folder: Path, watch: Watch, cli: Any, lifecycle: Any, reached: Callable[..., Any]
) -> None:
    import resource
    import traceback

    handles = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("out", "err", "facts")]
    os.dup2(handles[0], 1)
    os.dup2(handles[1], 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["box"])
    if asked["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
    if not asked["stage"]:
        lifecycle.train = lifecycle.run = reached
    for arguments in asked["commands"]:
        for handle in handles[:2]:
            os.ftruncate(handle, 0)
        start = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        before = _resident("VmRSS")
        sys.argv = ["gptworks", *arguments]
        code: Any = 0
        watch.box, watch.events = os.path.realpath(asked["box"]), []
        try:
            if arguments[0] == "python":
                exec(arguments[1], {})
            else:
                cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        watch.box = None
        sys.stdout.flush()
        sys.stderr.flush()
        facts = {"code": code, "events": watch.events, "peak": _resident("VmHWM") - before,
                 "seconds": time.perf_counter() - start}  # fmt: skip
        facts |= {"out": _text(folder / "out"), "err": _text(folder / "err")}
        os.write(handles[2], (json.dumps(facts) + "\n").encode())


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    serve()
