"""Several processes train as one does; one that dies or hangs ends them all, and the run goes on where it was."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptworks import lifecycle
from gptworks.core import folder
from gptworks.core.ranks import Ranks

STEADY = {
    "train.precision": "fp32", "train.compile": False, "train.micro_batch": 2, "train.reduce": "canonical",
    "train.max_steps": 8, "train.checkpoint_every": 4, "train.eval_every": 4,
}  # fmt: skip
LONG = {"train.max_steps": 100_000, "train.checkpoint_every": 5, "train.eval_every": 100_000, "train.log_every": 1}


class Group:
    """`torchrun --nproc-per-node N -m gptworks train`, as a person types it, on a tiny run."""

    def __init__(self, overrides: list[str], out: Path, processes: int, settings: dict, **environment: str) -> None:
        recipe = out.parent / "tiny.yaml"
        recipe.write_text("{}\n")
        more = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port"]
        line += [
            str(29600 + os.getpid() % 9000),
            "-m",
            "gptworks",
            "train",
            str(recipe),
            *overrides,
            *more,
            "--out",
            str(out),
        ]
        self.out, self.log = out, out.parent / "log"
        self.process = subprocess.Popen(
            line,
            stdout=subprocess.DEVNULL,
            stderr=open(self.log, "a"),  # noqa: SIM115
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        begin = time.monotonic()
        while text not in self.said:
            assert self.process.poll() is None and time.monotonic() - begin < seconds, self.said[-3000:]
            time.sleep(0.05)

    def workers(self) -> dict[str, int]:
        """The processes by rank, from what the system says of their environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                values = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                if str(self.out) in (entry / "cmdline").read_text() and "RANK" in values:
                    found[values["RANK"]] = int(entry.name)
        return found

    def end(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


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
def group(tiny_overrides, tmp_path):
    """group(processes, settings): starts them on tmp_path/run; whatever is left at the end is ended."""
    started: list[Group] = []

    def start(processes: int, settings: dict, **environment: str) -> Group:
        started.append(Group(tiny_overrides, tmp_path / "run", processes, settings, **environment))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        for pid in one.workers().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


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


def test_two_processes_give_the_bits_of_one_and_one_goes_on_where_two_were(group, alone, tiny_config, tmp_path):
    """1 and 2 processes agree with canonical sums, and a run may move: two steps on two, the rest on one."""
    two = group(2, STEADY, GPTWORKS_FAILPOINT="step.hooks:6:term@1")  # the signal reaches rank 1 alone
    two.end()
    assert "at step 6; saved" in two.said, two.said[-3000:]
    assert two.said.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not two.workers()
    state = folder.read_json(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json")
    assert state["step"] == 6  # agreed on
    lifecycle.train(tiny_config(**STEADY), tmp_path / "run", "tiny")
    assert end_state(tmp_path / "run", 8) == end_state(alone, 8)
    assert lifecycle.verify(tmp_path / "run")["identical"]


def test_sums_as_they_come_give_the_losses_of_one_process_within_rounding(group, tiny_config, tmp_path):
    settings = STEADY | {"train.reduce": "sum", "train.max_steps": 6}
    two = group(2, settings)
    assert two.end() == 0, two.said[-3000:]
    lifecycle.train(tiny_config(**settings), tmp_path / "one", "tiny")
    ours, theirs = (folder.read_json(tmp_path / name / "result.json") for name in ("run", "one"))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["eval"]["loss"] == pytest.approx(theirs["eval"]["loss"], rel=1e-5)
    assert ours["tokens"] == theirs["tokens"] and ours["train"]["loss"] == pytest.approx(
        theirs["train"]["loss"], rel=1e-5
    )
    assert two.said.count("trained  6 steps") == 1  # one process speaks


def test_a_killed_process_ends_the_other_within_ten_seconds_and_loses_no_saved_step(group, tmp_path):
    two = group(2, STEADY | LONG)
    two.wait_for("step-00000010")
    pids = two.workers()
    os.kill(pids["1"], signal.SIGKILL)
    assert seconds_until_gone(list(pids.values())) < 10
    assert two.end() != 0
    assert "error: rank 0: another process of this run ended" in two.said
    assert (tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json").is_file()


def test_a_hanging_process_ends_all_within_its_timeout_with_the_stacks_of_each(group):
    two = group(2, STEADY | LONG | {"train.timeout_s": 4})
    two.wait_for("step-00000005")
    pids = two.workers()
    os.kill(pids["1"], signal.SIGSTOP)
    assert seconds_until_gone(list(pids.values())) < 4 + 5
    two.end()
    assert "error: rank 0: no progress for 4 s (train.timeout_s)" in two.said
    assert two.said.count("gptworks/training/loop.py") >= 2  # where each of them stood, in a step or beside it
    assert "exitcode  : 79" in two.said


def test_nobody_stays_where_the_launcher_is_killed(group):
    two = group(2, STEADY | LONG)
    two.wait_for("step-00000005")
    pids = two.workers()
    two.process.kill()
    assert seconds_until_gone(list(pids.values())) < 10


def test_a_bad_corpus_ends_all_with_one_reason(group, tmp_path):
    two = group(2, STEADY | {"data.train": str(tmp_path / "nowhere.txt")})
    two.end()
    assert "no such file" in two.said and not two.workers()


def test_other_settings_on_another_process_are_refused(group, tmp_path):
    """What each was started with is compared before anything is computed."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom gptworks import api\n"
        "api.train(sys.argv[1], sys.argv[2], **{'data.train': 'shakespeare', 'train.max_steps': 2, "
        "'train.seed': 1 + int(os.environ['RANK'])})\n"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("model: {hidden_size: 32, num_hidden_layers: 1}\ntrain: {context: 32, batch_tokens: 64}\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "28411"]
    done = subprocess.run(
        [*line, str(script), str(recipe), str(tmp_path / "run")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0 and "another configuration than rank 0" in done.stderr


def test_on_one_process_everything_is_a_no_op():
    one = Ranks()
    assert (one.rank, one.world, one.main, one.started) == (0, 1, True, False)
    one.start(None, 1.0)  # type: ignore[arg-type]
    one.add([])
    one.barrier()
    assert one.total(1.5, 2) == [1.5, 2] and one.gather("x") == ["x"] and one.agree("y") == "y"
    one.end()
    assert not one.started
