"""Several processes train as one does; one that dies or hangs ends them all, and the run goes on where it was."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from zygote import Zygote

from gptworks import lifecycle
from gptworks.core import folder
from gptworks.core.ranks import Ranks

STEADY = {
    "train.precision": "fp32", "train.compile": False, "train.micro_batch": 2, "train.reduce": "canonical",
    "train.max_steps": 8, "train.checkpoint_every": 4, "train.eval_every": 4,
}  # fmt: skip
LONG = {"train.max_steps": 100_000, "train.checkpoint_every": 5, "train.eval_every": 100_000, "train.log_every": 1}


def spelled(settings: dict) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


class Group:
    """The processes of one run on `out`, and what they said."""

    def __init__(self, out: Path) -> None:
        self.out, self.log = out, out.parent / "log"

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def running(self) -> bool:
        raise NotImplementedError

    def wait_for(self, text: str, seconds: float = 120) -> None:
        begin = time.monotonic()
        while text not in self.said:
            assert self.running() and time.monotonic() - begin < seconds, self.said[-3000:]
            time.sleep(0.05)


class Forked(Group):
    """Processes that start at once, as torchrun would start them; nothing ends one where another fails."""

    def __init__(self, zygote: Zygote, lines: list[list[str]], out: Path, **environment: str) -> None:
        super().__init__(out)
        self.children = zygote.several(lines, self.log, **environment)

    def running(self) -> bool:
        return all(child.wait(0) is None for child in self.children)

    def codes(self, seconds: float = 120) -> list[int | None]:
        try:
            return [child.wait(seconds) for child in self.children]
        finally:
            self.kill()

    def kill(self) -> None:
        for child in self.children:
            child.kill()


class Torchrun(Group):
    """`torchrun --nproc-per-node N -m gptworks train`, as a person types it."""

    def __init__(self, line: list[str], out: Path, processes: int) -> None:
        super().__init__(out)
        port = str(29600 + os.getpid() % 9000)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        self.process = subprocess.Popen(
            [*launcher, "--master-port", port, "-m", "gptworks", *line],
            stdout=subprocess.DEVNULL,
            stderr=open(self.log, "a"),  # noqa: SIM115
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def workers(self) -> dict[str, int]:
        """The processes by rank, from what the system says of their environment."""
        pids = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                values = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                if str(self.out) in (entry / "cmdline").read_text() and "RANK" in values:
                    pids[values["RANK"]] = int(entry.name)
        return pids

    def end(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.workers().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def seconds_until_gone(pids: list[int], limit: float = 60) -> float:
    begin = time.monotonic()
    while any(map(alive, pids)):
        assert time.monotonic() - begin < limit, "an orphan is left"
        time.sleep(0.02)
    return time.monotonic() - begin


@pytest.fixture
def command(tiny_overrides, tmp_path):
    """command(settings): the arguments of a tiny run on tmp_path/run."""
    (tmp_path / "tiny.yaml").write_text("{}\n")

    def line(settings: dict) -> list[str]:
        recipe, out = str(tmp_path / "tiny.yaml"), str(tmp_path / "run")
        return ["train", recipe, *tiny_overrides, *spelled(settings), "--out", out]

    return line


@pytest.fixture
def forked(zygote, command, tmp_path):
    """forked(settings, ...): a process for each of the settings; whatever is left at the end is ended."""
    started: list[Forked] = []

    def start(*settings: dict, **environment: str) -> Forked:
        started.append(Forked(zygote, [command(each) for each in settings], tmp_path / "run", **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def torchrun(command, tmp_path):
    """torchrun(settings): two processes under the launcher; whatever is left at the end is ended."""
    started: list[Torchrun] = []

    def start(settings: dict) -> Torchrun:
        started.append(Torchrun(command(settings), tmp_path / "run", 2))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def end_state(run: Path, step: int) -> dict[str, object]:
    last = run / "checkpoints" / f"step-{step:08d}"
    state = folder.read_json(last / "state.json")
    files = {name: folder.sha256(last / name) for name in ("model.safetensors", "optimizer.safetensors")}
    return files | {key: state[key] for key in ("step", "tokens", "cursor", "best_figure")}


@pytest.fixture(scope="module")
def alone(tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    lifecycle.train(tiny_config(**STEADY), out, "tiny")
    return out


def test_two_processes_give_the_bits_of_one_and_one_goes_on_where_two_were(forked, alone, tiny_config, tmp_path):
    """1 and 2 processes agree with canonical sums, and a run may move: two steps on two, the rest on one."""
    two = forked(STEADY, STEADY, GPTWORKS_FAILPOINT="step.hooks:6:term@1")  # the signal reaches rank 1 alone
    assert two.codes() == [75, 75], two.said[-3000:]
    assert "at step 6; saved" in two.said and "Traceback" not in two.said
    state = folder.read_json(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json")
    assert state["step"] == 6  # agreed on
    lifecycle.train(tiny_config(**STEADY), tmp_path / "run", "tiny")
    assert end_state(tmp_path / "run", 8) == end_state(alone, 8)
    assert lifecycle.verify(tmp_path / "run")["identical"]


def test_sums_as_they_come_give_the_losses_of_one_process_within_rounding(forked, tiny_config, tmp_path):
    settings = STEADY | {"train.reduce": "sum", "train.max_steps": 6}
    two = forked(settings, settings)
    assert two.codes() == [0, 0], two.said[-3000:]
    lifecycle.train(tiny_config(**settings), tmp_path / "one", "tiny")
    ours, theirs = (folder.read_json(tmp_path / name / "result.json") for name in ("run", "one"))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=1e-5)
    assert ours["tokens"] == theirs["tokens"] and ours["train"]["loss"] == pytest.approx(
        theirs["train"]["loss"], rel=1e-5
    )
    assert two.said.count("trained  6 steps") == 1  # one process speaks


def test_a_killed_process_ends_the_other_within_ten_seconds_and_loses_no_saved_step(forked, tmp_path):
    two = forked(STEADY | LONG, STEADY | LONG)
    two.wait_for("step-00000010")
    two.children[1].kill()
    assert seconds_until_gone([two.children[0].pid]) < 10 and two.codes() == [79, -9]
    assert "error: rank 0: another process of this run ended" in two.said
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json").is_file()


def test_a_hanging_process_ends_all_within_its_timeout_with_the_stacks_of_each(torchrun):
    two = torchrun(STEADY | LONG | {"train.timeout_s": 4})
    two.wait_for("step-00000005")
    pids = two.workers()
    os.kill(pids["1"], signal.SIGSTOP)
    assert seconds_until_gone(list(pids.values())) < 4 + 5
    two.end()
    assert "error: rank 0: no progress for 4 s (train.timeout_s)" in two.said
    assert two.said.count("gptworks/training/loop.py") >= 2  # where each of them stood, in a step or beside it
    assert "exitcode  : 79" in two.said


def test_nobody_stays_where_the_launcher_is_killed(torchrun):
    two = torchrun(STEADY | LONG)
    two.wait_for("step-00000005")
    pids = two.workers()
    two.process.kill()
    assert seconds_until_gone(list(pids.values())) < 10


def test_a_bad_corpus_ends_all_with_one_reason(forked, tmp_path):
    """Each by itself: no launcher ends what the other leaves behind."""
    settings = STEADY | {"data.train": str(tmp_path / "nowhere.txt")}
    two = forked(settings, settings)
    assert two.codes(30) == [65, 79] and two.said.count("no such file") == 1, two.said[-3000:]
    assert "error: rank 1: the main process could not go on; its own message is above" in two.said


def test_other_settings_on_another_process_are_refused(forked, tmp_path):
    """What each was started with is compared before anything is computed."""
    two = forked(STEADY, STEADY | {"train.seed": 2})
    assert two.children[1].wait(60) == 78
    assert "another configuration than rank 0" in two.said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_on_one_process_everything_is_a_no_op():
    one = Ranks()
    assert (one.rank, one.world, one.main, one.started) == (0, 1, True, False)
    one.start(None, 1.0)  # type: ignore[arg-type]
    one.add([])
    one.barrier()
    assert one.total(1.5, 2) == [1.5, 2] and one.gather("x") == ["x"] and one.agree("y") == "y"
    one.end()
    assert not one.started
