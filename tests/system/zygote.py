"""Starts gptworks commands in milliseconds: a process that has imported everything forks one child for each.

`python zygote.py` reads one JSON request a line and answers each with one: {"argv": [...], "env": {...}, "log": path}
starts a command and gives its pid; {"wait": pid, "seconds": s} gives its exit code (negative: the signal), or null if
it still runs; {"store": path} starts the meeting place of several. A child may be told to misbehave, by names in the
request: see `sabotage.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Zygote:
    """The side that asks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(HERE.parents[1]), str(HERE), environment.get("PYTHONPATH", "")]
        )
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], log: Path, sabotage: list[str] | None = None, **env: str) -> "Child":
        """Starts `gptworks ARGV`; what it says is appended to `log`."""
        return Child(self, self._ask(argv=argv, log=str(log), env=env, sabotage=sabotage or []))

    def run(self, argv: list[str], log: Path, sabotage: list[str] | None = None, **env: str) -> int:
        """As `start`, to the end: the exit code."""
        code = self.start(argv, log, sabotage, **env).wait(300)
        assert code is not None, "no end in 300 s"
        return code

    def meeting_place(self, note: Path) -> "tuple[Child, str]":
        """A process that hosts the store where others meet, as torchrun's own does; and its port."""
        note.unlink(missing_ok=True)
        host = Child(self, self._ask(store=str(note)))
        while not note.is_file():
            time.sleep(0.002)
        return host, note.read_text()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Child:
    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.zygote, self.pid, self.code = zygote, pid, None

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if the child still runs after so long."""
        if self.code is None:
            self.code = self.zygote._ask(wait=self.pid, seconds=seconds)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.wait(0) is None:
            os.kill(self.pid, number)


# -- the side that forks -----------------------------------------------------------------------------------------


def wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def child(request: dict[str, Any]) -> None:
    """Becomes the command."""
    import sabotage

    from gptworks import cli
    from gptworks.core import failpoint
    from gptworks.core.ranks import ranks

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    for number, target in ((0, null), (1, null), (2, log)):
        os.dup2(target, number)
    os.environ.update(request["env"])
    ranks.__init__()  # type: ignore[misc]
    failpoint.arm(os.environ.get("GPTWORKS_FAILPOINT"))
    for name in request["sabotage"]:
        sabotage.apply(name)
    sys.argv = ["gptworks", *request["argv"]]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code)


def host(note: str) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    aside = Path(note + ".new")
    aside.write_text(str(store.port))
    aside.rename(note)
    while os.getppid() != 1:
        time.sleep(1)
    os._exit(0)


def serve() -> None:
    import torch

    import gptworks.lifecycle  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0 and "store" in request:
                host(request["store"])
            elif answer == 0:
                child(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
