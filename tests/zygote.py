"""Starts gptworks commands in milliseconds: a process that has imported everything forks one child for each.

`python zygote.py` reads one JSON request a line and answers each with one: {"argv": [...], "env": {...}, "log": path}
starts a command and gives its pid ("streams": by number a path, or "closed", or "gone" for a pipe that nobody reads);
{"wait": pid, "seconds": s} gives its exit code (negative: the signal), or null if
it still runs; {"store": path} starts the meeting place of several; with "code", Python is run in place of a command. A
child may be told to misbehave, by names in the request: see `system/sabotage.py`.
"""

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Zygote:
    """The side that asks."""

    def __init__(self) -> None:
        self.host: Child | None = None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(HERE.parent), str(HERE), str(HERE / "system"), environment.get("PYTHONPATH", "")]
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

    def streamed(self, argv: list[str], log: Path, streams: dict[int, str], cwd: Path) -> "Child":
        """Starts `gptworks ARGV` in a folder with other standard streams, by number: a path, `closed` or `gone`."""
        return Child(self, self._ask(argv=argv, log=str(log), env={}, sabotage=[], streams=streams, cwd=str(cwd)))

    def run(self, argv: list[str], log: Path, sabotage: list[str] | None = None, **env: str) -> int:
        """As `start`, to the end: the exit code."""
        code = self.start(argv, log, sabotage, **env).wait(300)
        assert code is not None, "no end in 300 s"
        return code

    def python(self, code: str, *arguments: str, seconds: float = 120) -> str:
        """Runs Python in a child, with `arguments` in sys.argv; gives what it printed. Fails unless it ends well."""
        return self._printed(seconds, argv=list(arguments), code=code, env={})

    def printed(self, argv: list[str], seconds: float = 120, cwd: Path | str = ".", **env: str) -> str:
        """What `gptworks ARGV` prints. Fails unless it ends well."""
        return self._printed(seconds, argv=argv, cwd=str(cwd), env=env)

    def _printed(self, seconds: float, **request: Any) -> str:
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "out", Path(folder) / "log"
            ended = Child(self, self._ask(**request, sabotage=[], log=str(log), out=str(out))).wait(seconds)
            assert ended == 0, f"exit code {ended}: {log.read_text()[-3000:]}"
            return out.read_text()

    def meeting_place(self, note: Path) -> "tuple[Child, str]":
        """A process that hosts the store where others meet, as torchrun's own does; and its port."""
        note.unlink(missing_ok=True)
        host = Child(self, self._ask(store=str(note)))
        while not note.is_file():
            time.sleep(0.002)
        return host, note.read_text()

    def several(
        self, argv: list[list[str]], log: Path, sabotage: list[list[str]] | None = None, **env: str
    ) -> list["Child"]:
        """Starts one process for each list of arguments, as the processes of one run that torchrun would start."""
        if self.host:
            self.host.kill()  # a new meeting place for each start
        self.host, port = self.meeting_place(log.with_suffix(".port"))
        size = str(len(argv))
        env |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        return [
            self.start(line, log, sabotage[rank] if sabotage else None, RANK=str(rank), LOCAL_RANK=str(rank), **env)
            for rank, line in enumerate(argv)
        ]

    def close(self) -> None:
        if self.host:
            self.host.kill()
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def shared() -> Zygote:
    """The one of this process, which ends with it."""
    started = Zygote()
    atexit.register(started.close)
    return started


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


def change_stream(number: int, state: str) -> None:
    name = ("stdin", "stdout", "stderr")[number]
    if state == "closed":  # as Python finds it
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
    elif state == "gone":
        ear, mouth = os.pipe()
        os.dup2(mouth, number)
        os.close(ear)
        os.close(mouth)
    else:
        os.dup2(os.open(state, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    if number == 0 and state != "closed":
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  the zygote's has requests in its buffer


def child(request: dict[str, Any]) -> None:
    """Becomes the command."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT) if "out" in request else null
    for number, target in ((0, null), (1, out), (2, log)):
        os.dup2(target, number)
    for number, state in request.get("streams", {}).items():
        change_stream(int(number), state)
    try:
        import sabotage

        from gptworks import cli
        from gptworks.core import failpoint
        from gptworks.core.ranks import ranks
    except BaseException:  # or the child would go on as the zygote
        import traceback

        traceback.print_exc()
        os._exit(70)
    os.environ.update(request["env"])
    os.chdir(request.get("cwd", "."))
    ranks.__init__()  # type: ignore[misc]
    failpoint.arm(os.environ.get("GPTWORKS_FAILPOINT"))
    for name in request["sabotage"]:
        sabotage.apply(name)
    sys.argv = ["gptworks", *request["argv"]]
    try:
        if "code" in request:
            exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
        else:
            cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
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
    from gptworks.core import runtime

    torch.set_num_threads(1)
    runtime.matmul_rate = lambda *arguments: 1e10  # half a second a command, which decides nothing here
    gc.freeze()
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
