"""A run that is stopped and continued is the run that was never stopped, in every bit."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from gptworks import lifecycle
from gptworks.core import folder, runtime
from gptworks.core.errors import DataError, Preempted, RunMismatch, StorageError
from gptworks.core.log import console
from gptworks.model import build
from gptworks.training import hooks, session
from gptworks.training.hooks import Checkpointer
from gptworks.training.metrics import Metrics
from gptworks.training.state import listing

STEPS = 12
STEADY = {"train.precision": "fp32", "train.compile": False, "train.micro_batch": 4}  # of 8 rows: accumulation 2


@pytest.fixture(autouse=True)
def signals_put_back():
    """A run takes SIGTERM and Ctrl-C over for its process; the test process wants them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    runtime.interrupts.requested = None
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): what SIGTERM at step n does; None: never."""
    at: list[int | None] = [None]
    usual = Checkpointer.__call__

    def hooked(self, state, metrics):
        if state.step == at[0]:
            runtime.interrupts.requested = "SIGTERM"
        return usual(self, state, metrics)

    monkeypatch.setattr(Checkpointer, "__call__", hooked)
    return lambda step: at.__setitem__(0, step)


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    """A function: settings -> the folder of a run left in peace, made once for each."""
    made: dict[str, Path] = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight") / "run"
            lifecycle.train(tiny_config(**STEADY, **settings), made[key], "tiny")
        return made[key]

    return run


def stop_at(interrupt, step, config, out):
    interrupt(step)
    with pytest.raises(Preempted, match=f"at step {step}; saved, run the same command to continue") as stopped:
        lifecycle.train(config, out, "tiny")
    assert stopped.value.code == 75
    runtime.interrupts.requested = None
    interrupt(None)
    assert not (out / "result.json").exists() and not (out / "model").exists()


def end_state(run: Path, steps: int = STEPS) -> dict[str, object]:
    """Every bit of the last checkpoint and of the model folder's weights; counters without the clock."""
    last = run / "checkpoints" / f"step-{steps:08d}"
    state = folder.read_json(last / "state.json")
    files = [last / "model.safetensors", last / "optimizer.safetensors", run / "model" / "model.safetensors"]
    found: dict[str, object] = {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return found | {key: state[key] for key in ("step", "tokens", "cursor", "best_figure", "evals_since_best")}


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


CLOCK = ("train/tokens_per_second", "train/mfu", "train/data_wait", "train/seconds", "train/memory_gib")


def logged(run: Path) -> list[dict[str, object]]:
    """All that was logged but what a clock or the memory says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


# -- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "threads", "workers", "steps"),
    # The first, one with a checkpoint of its own, one between, the last; two threads are slow on a busy machine.
    [("adamw", 1, 1, (1, 4, 7, STEPS)), ("muon", 1, 1, (7,)), ("muon", 2, 1, (7,)), ("adamw", 2, 2, (7,))],
)
def test_resume_is_bitwise_equal_to_straight_run(
    straight, tiny_config, tmp_path, interrupt, optimizer, threads, workers, steps
):
    settings = {"train.optimizer": optimizer, "train.threads": threads, "train.workers": workers}
    if workers > 1:
        settings["model.dropout"] = 0
    expected = straight(**settings)
    for step in steps:
        out = tmp_path / f"from-{step}"
        config = tiny_config(**STEADY, **settings)
        stop_at(interrupt, step, config, out)
        result = lifecycle.train(config, out, "tiny")
        assert end_state(out) == end_state(expected), f"resumed from step {step}"
        assert losses(out) == losses(expected)
        assert result["eval"] == folder.read_json(expected / "result.json")["eval"]
        assert torch.get_num_threads() == threads


def test_a_resumed_run_logs_what_the_straight_one_logs(tiny_config, tmp_path, interrupt, monkeypatch):
    """Stopped at 7 and continued, then killed at 11 and continued from 8: neither is a multiple of the interval."""
    config = tiny_config(**STEADY, **{"train.log_every": 5, "train.eval_every": 3})
    lifecycle.train(config, tmp_path / "straight", "tiny")
    stop_at(interrupt, 7, config, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(hooks.Logger, "__call__", _killed_at(11))
        lifecycle.train(config, tmp_path / "run", "tiny")
    lifecycle.train(config, tmp_path / "run", "tiny")
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")
    assert lifecycle.verify(tmp_path / "run")["identical"]


def _killed_at(step):
    usual = hooks.Logger.__call__

    def hooked(self, state, metrics):
        if state.step == step:
            raise KeyError
        return usual(self, state, metrics)

    return hooked


def test_what_a_process_that_is_gone_left_half_written_goes_away(tiny_config, tmp_path, interrupt):
    """A checkpoint in the making when a preemption ended in SIGKILL, and whatever else; that of a process that lives
    stays, and an old model folder about to be replaced goes back."""
    config, out, dead = tiny_config(), tmp_path / "run", 2**22 + 1
    stop_at(interrupt, 5, config, out)
    left = [out / "checkpoints" / f".step-00000004.{dead}.tmp", out / f".data.{dead}.tmp"]
    for path in left:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    (text := out / f".config.yaml.{dead}.tmp").write_text("half")
    (theirs := out / f".report.html.{os.getppid()}.tmp").write_text("half")
    assert lifecycle.train(config, out, "tiny")["steps"] == STEPS
    assert theirs.exists() and not [path for path in (*left, text) if path.exists()]
    (out / "model").rename(out / f".model.{dead}.old.tmp")
    assert lifecycle.train(config, out, "tiny")["steps"] == STEPS and (out / "model" / "config.json").is_file()


def test_the_comparison_would_see_one_other_dropout_mask(straight, tiny_config, tmp_path):
    """What the test above rests on: a run of another seed ends elsewhere."""
    lifecycle.train(tiny_config(**STEADY, **{"train.seed": 2}), tmp_path / "run", "tiny")
    ours, theirs = end_state(tmp_path / "run"), end_state(straight())
    assert all(ours[name] != theirs[name] for name in ours if name.endswith(".safetensors"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_chain_of_three_resumes_is_bitwise_equal_to_straight_run(
    straight, tiny_config, tmp_path, interrupt, optimizer
):
    config = tiny_config(**STEADY, **{"train.optimizer": optimizer})
    for step in (2, 5, 9):
        stop_at(interrupt, step, config, tmp_path / "run")
    lifecycle.train(config, tmp_path / "run", "tiny")
    expected = straight(**{"train.optimizer": optimizer})
    assert end_state(tmp_path / "run") == end_state(expected)
    assert losses(tmp_path / "run") == losses(expected)


def test_patience_counts_over_a_resume(straight, tiny_config, tmp_path, interrupt):
    settings = {"train.lr": 0, "train.adam_lr": 0, "train.patience": 3, "train.eval_every": 2}
    config = tiny_config(**STEADY, **settings)
    stop_at(interrupt, 5, config, tmp_path / "run")
    result = lifecycle.train(config, tmp_path / "run", "tiny")
    assert result["steps"] == 8 and "train.patience" in result["stopped"]  # best at 2, then 4, 6, 8
    assert end_state(tmp_path / "run", 8) == end_state(straight(**settings), 8)


def test_metrics_have_each_step_once_after_a_resume_from_an_older_checkpoint(
    straight, tiny_config, tmp_path, monkeypatch
):
    """Killed without a word after step 7 was logged: steps 5 to 7 are done, and logged, again."""
    usual = Checkpointer.__call__

    def killed(self, state, metrics):
        if state.step == 7:
            raise SystemExit("killed")
        return usual(self, state, metrics)

    config, out = tiny_config(**STEADY), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpointer, "__call__", killed)
        lifecycle.train(config, out, "tiny")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train/lo')  # and a line the power cut left half-written
    assert [step for step, _, _ in losses_of_whole_lines(out)] == list(range(1, 8))
    lifecycle.train(config, out, "tiny")
    assert [step for step, _, _ in losses(out)] == list(range(1, STEPS + 1))
    assert losses(out) == losses(straight())
    assert end_state(out) == end_state(straight())


def test_a_sample_with_line_ends_of_every_kind_is_one_row_after_a_resume(tmp_path):
    sample = "a\u2028b\x85c\nd"
    for step in (0, 1):
        metrics = Metrics(tmp_path, step, tensorboard=False)
        if not step:
            metrics.text(1, "sample", sample)
        metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["sample"] == sample


def losses_of_whole_lines(run: Path) -> list[tuple[int, float, float]]:
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text("".join(line for line in text.splitlines(keepends=True) if line.endswith("\n")))
    try:
        return losses(run)
    finally:
        path.write_text(text)


def test_stopped_between_the_last_checkpoint_and_the_model_folder(straight, tiny_config, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise SystemExit("killed")

    config, out = tiny_config(**STEADY), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(build, "save", killed)
        lifecycle.train(config, out, "tiny")
    result = lifecycle.train(config, out, "tiny")
    assert end_state(out) == end_state(straight())
    assert result["train"]["loss"] == losses(out)[-1][1] and result["steps"] == STEPS


def test_a_finished_run_is_left_as_it_is(straight, tiny_config, tmp_path):
    shutil.copytree(straight(), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    result = lifecycle.train(tiny_config(**STEADY), tmp_path / "run", "tiny")
    assert result == folder.read_json(straight() / "result.json")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_another_setting_on_the_same_run_is_refused(tiny_config, tmp_path, interrupt):
    stop_at(interrupt, 2, tiny_config(**STEADY), tmp_path / "run")
    with pytest.raises(RunMismatch, match=r"train\.seed=1, now train\.seed=2") as refused:
        lifecycle.train(tiny_config(**STEADY, **{"train.seed": 2}), tmp_path / "run", "tiny")
    assert refused.value.code == 78


def test_a_second_trainer_is_refused(tiny_config, tmp_path):
    with runtime.hold(tmp_path / "run"), pytest.raises(RunMismatch, match="another process") as refused:
        lifecycle.train(tiny_config(**STEADY), tmp_path / "run", "tiny")
    assert refused.value.code == 78
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# -- damage ------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bit(straight, tiny_config, tmp_path, interrupt):
    config, out = tiny_config(**STEADY), tmp_path / "run"
    stop_at(interrupt, 10, config, out)
    flip(listing(out / "checkpoints")[-1] / "model.safetensors", -5)
    lifecycle.train(config, out, "tiny")
    assert end_state(out) == end_state(straight())
    assert losses(out) == losses(straight())


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over(tiny_config, tmp_path, interrupt):
    config, out = tiny_config(**STEADY), tmp_path / "run"
    stop_at(interrupt, 10, config, out)
    for path in listing(out / "checkpoints"):
        flip(path / "optimizer.safetensors", -5)
    for _ in range(2):
        with pytest.raises(DataError, match="--fresh"):
            lifecycle.train(config, out, "tiny")
    assert not (out / "model").exists()


@pytest.mark.parametrize("file", ["train.tokens", "eval.tokens", "train.documents", "tokenizer.json", "manifest.json"])
def test_flipped_shards_are_rebuilt_or_refused_but_never_used(straight, tiny_config, tmp_path, interrupt, file):
    config, out = tiny_config(**STEADY), tmp_path / "run"
    stop_at(interrupt, 6, config, out)
    flip(out / "data" / file, (out / "data" / file).stat().st_size // 2)
    try:
        lifecycle.train(config, out, "tiny")
    except DataError:
        assert not (out / "model").exists()
    else:
        assert end_state(out) == end_state(straight())


def text_changed(tiny_config, tmp_path, tiny_text):
    mine = tmp_path / "mine.txt"
    shutil.copy(tiny_text, mine)
    return mine, tiny_config(**STEADY, **{"data.train": str(mine)})


def test_text_changed_mid_run_does_not_change_the_run(straight, tiny_config, tiny_text, tmp_path, interrupt):
    mine, config = text_changed(tiny_config, tmp_path, tiny_text)
    stop_at(interrupt, 6, config, tmp_path / "run")
    mine.write_text("something else altogether. " * 500)
    lifecycle.train(config, tmp_path / "run", "tiny")
    assert end_state(tmp_path / "run") == end_state(straight())


@pytest.mark.parametrize("state", ["interrupted", "finished", "longer"])
def test_an_edited_text_is_warned_of_however_the_run_goes_on(
    tiny_config, tiny_text, tmp_path, interrupt, capsys, state
):
    mine, config = text_changed(tiny_config, tmp_path, tiny_text)
    if state == "interrupted":
        stop_at(interrupt, 6, config, tmp_path / "run")
    else:
        lifecycle.train(config, tmp_path / "run")
    os.utime(mine)  # the same text with another time is the same
    more = config if state != "longer" else tiny_config(**STEADY, **{"data.train": str(mine), "train.max_steps": 14})
    mine.write_text(mine.read_text() + "the king nobody knew.\n")
    before = console.quiet
    console.quiet = True
    try:
        capsys.readouterr()
        lifecycle.train(more, tmp_path / "run")
    finally:
        console.quiet = before
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {mine} is not what {tmp_path}/run was begun with") and "--fresh" in said


def test_a_run_killed_before_its_first_checkpoint_keeps_its_text_too(
    tiny_config, tiny_text, tmp_path, monkeypatch, capsys
):
    """A fault that was seen: it took the longer text, under the vocabulary, batch and length of the shorter."""
    mine, config = text_changed(tiny_config, tmp_path, tiny_text)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(session, "train", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        lifecycle.train(config, tmp_path / "run")
    ids = (tmp_path / "run" / "data" / "train.tokens").read_bytes()
    mine.write_text(mine.read_text() * 2)
    assert lifecycle.train(config, tmp_path / "run")["steps"] == STEPS
    assert (tmp_path / "run" / "data" / "train.tokens").read_bytes() == ids
    assert "is not what" in capsys.readouterr().err


def test_a_text_that_is_the_same_or_gone_is_not_warned_of(tiny_config, tiny_text, tmp_path, capsys):
    mine, config = text_changed(tiny_config, tmp_path, tiny_text)
    lifecycle.train(config, tmp_path / "run")
    os.utime(mine)
    lifecycle.train(config, tmp_path / "run")
    mine.unlink()
    lifecycle.train(config, tmp_path / "run")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, old, new", [("data.train", "tiny.txt", "other.txt"), ("train.lr", "lr: 0.04", "lr: 0.5"),
                      ("changes", "changes: []", "changes: [{step: 2, lr: 0.3}]")],
)  # fmt: skip
def test_a_config_yaml_edited_by_hand_is_refused(tiny_config, tmp_path, interrupt, key, old, new):
    """A fault that was seen: the run went on with its old text, and its card named the other."""
    config, out = tiny_config(**STEADY), tmp_path / "run"
    stop_at(interrupt, 6, config, out)
    written = (out / "config.yaml").read_text()
    assert old in written
    (out / "config.yaml").write_text(written.replace(old, new, 1))
    with pytest.raises(RunMismatch, match=f"config.yaml was edited since step-00000006 .*{key}") as refused:
        lifecycle.train(config, out)
    assert refused.value.code == 78
    (out / "config.yaml").write_text(written)
    assert lifecycle.train(config, out)["steps"] == STEPS


def test_changed_text_and_damaged_shards_are_refused_together(tiny_config, tiny_text, tmp_path, interrupt):
    """The ids the run began with cannot be made again, so it does not go on with others."""
    mine, config = text_changed(tiny_config, tmp_path, tiny_text)
    out = tmp_path / "run"
    stop_at(interrupt, 6, config, out)
    mine.write_text(mine.read_text() + "the king nobody knew.\n" * 500)
    flip(out / "data" / "train.tokens", 100)
    with pytest.raises((DataError, RunMismatch)):
        lifecycle.train(config, out, "tiny")
    assert not (out / "model").exists()


# -- verify ------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def seal(checkpoint: Path, name: str) -> None:
    """The manifest redone, so that hashes alone cannot tell."""
    manifest = folder.read_manifest(checkpoint)
    manifest["files"][name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": folder.sha256(checkpoint / name)}
    folder.write_manifest(checkpoint, manifest)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_verify_says_identical_then_names_one_flipped_bit(straight, tmp_path, optimizer):
    out = tmp_path / "run"
    shutil.copytree(straight(**{"train.optimizer": optimizer}), out)
    found = lifecycle.verify(out)
    assert found["verdict"] == "identical to the bit" and found["identical"] is True
    assert (found["from_step"], found["to_step"]) == (8, STEPS)

    newest = listing(out / "checkpoints")[-1]
    for name, what in (("model.safetensors", "weight "), ("optimizer.safetensors", "optimizer state ")):
        sound = (newest / name).read_bytes()
        flip(newest / name, header_end(sound))
        with pytest.raises(DataError, match=name):  # the manifest tells
            lifecycle.verify(out)
        seal(newest, name)
        found = lifecycle.verify(out)
        assert found["identical"] is False
        assert found["verdict"].startswith(what) and first_tensor(sound) in found["verdict"]
        (newest / name).write_bytes(sound)
        seal(newest, name)
    assert lifecycle.verify(out)["identical"] is True


def header_end(content: bytes) -> int:
    """Where the first tensor of a safetensors file begins: 8 bytes of length, then the header."""
    return 8 + int.from_bytes(content[:8], "little")


def first_tensor(content: bytes) -> str:
    entries = json.loads(content[8 : header_end(content)])
    return min((e["data_offsets"][0], name) for name, e in entries.items() if name != "__metadata__")[1]


def test_verify_holds_after_a_resume(tiny_config, tmp_path, interrupt):
    config, out = tiny_config(**STEADY), tmp_path / "run"
    stop_at(interrupt, 7, config, out)
    assert lifecycle.verify(out)["verdict"] == "identical to the bit"  # 4 to 7, of an unfinished run
    lifecycle.train(config, out, "tiny")
    assert lifecycle.verify(out)["verdict"] == "identical to the bit"


def test_verify_of_one_checkpoint_says_what_is_missing(tiny_config, tmp_path, interrupt):
    stop_at(interrupt, 3, tiny_config(**STEADY), tmp_path / "run")
    with pytest.raises(DataError, match="two checkpoints, there are 1"):
        lifecycle.verify(tmp_path / "run")


# -- real processes ----------------------------------------------------------------------------------------------


def test_sigterm_exits_75_and_the_same_command_finishes_with_equal_bits(tiny_config, tiny_overrides, tmp_path, zygote):
    steps = 60
    settings = {"train.max_steps": steps, "train.checkpoint_every": 30, "train.eval_every": 30} | STEADY
    recipe, out = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text("{}\n")
    more = [f"{key}={str(value).lower()}" for key, value in settings.items()]
    line, log = ["train", str(recipe), *tiny_overrides, *more, "--out", str(out)], tmp_path / "log"
    process, waited = zygote.start(line, log), time.monotonic()
    while process.wait(0) is None and time.monotonic() - waited < 60:
        if (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("train/loss") >= 5:
            break
        time.sleep(0.01)
    process.kill(signal.SIGTERM)
    code, said = process.wait(60), log.read_text()
    assert code == 75, said
    assert "stopped by SIGTERM at step" in said and "Traceback" not in said
    stopped = len(losses(out))
    assert 5 <= stopped < steps and listing(out / "checkpoints")[-1].name == f"step-{stopped:08d}"

    assert zygote.run(line, log) == 0, log.read_text()
    lifecycle.train(tiny_config(**settings), tmp_path / "straight", "tiny")
    assert end_state(out, steps) == end_state(tmp_path / "straight", steps)
    assert losses(out) == losses(tmp_path / "straight")


# -- a finished run with something else in the place of its files --------------------------------------------------


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"', "{}"])
def test_a_result_that_is_none_is_named(content, straight, tiny_config, tmp_path):
    out = shutil.copytree(straight(), tmp_path / "run")
    (out / "result.json").write_text(content)
    for stages in (["train"], ["report"]):
        with pytest.raises(DataError, match=r"result\.json: not the result of a training"):
            lifecycle.run(tiny_config(**STEADY, stages=stages), out, "tiny")


@pytest.mark.parametrize("damage", ["bytes", "folder", "pipe"])
def test_a_log_that_cannot_be_read_is_named_before_anything_is_gone(damage, straight, tiny_config, tmp_path):
    out = shutil.copytree(straight(), tmp_path / "run")
    log = out / "metrics.jsonl"
    if damage == "bytes":
        log.write_bytes(b"\xff\xfe" + log.read_bytes())
    else:
        log.unlink()
        log.mkdir() if damage == "folder" else os.mkfifo(log)
    with pytest.raises((DataError, StorageError), match=r"metrics\.jsonl: "):
        lifecycle.train(tiny_config(**STEADY, **{"train.max_steps": 16}), out, "tiny")
    assert folder.read_json(out / "result.json")["steps"] == STEPS


def test_a_log_of_nonsense_loses_its_nonsense_alone(straight, tiny_config, tmp_path):
    out = shutil.copytree(straight(), tmp_path / "run")
    with open(out / "metrics.jsonl", "a") as file:
        file.write("[" * 100_000 + "\n" + "[1]\n" + "null\n")
    result = lifecycle.train(tiny_config(**STEADY, **{"train.max_steps": 14}), out, "tiny")
    assert result["steps"] == 14 and [step for step, _, _ in losses(out)] == list(range(1, 15))


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "metrics.jsonl", "model/config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, straight, tmp_path):
    from gptworks.reporting.page import read_run

    out = shutil.copytree(straight(), tmp_path / "run")
    (out / name).unlink()
    os.mkfifo(out / name)
    if name == "config.yaml":
        with pytest.raises(DataError, match=r"it has no config\.yaml"):
            lifecycle.verify(out)
    if name.startswith("model"):
        with pytest.raises(DataError, match="not a regular file"):
            build.load(out / "model")
    else:
        assert any(name in problem and "not a regular file" in problem for problem in read_run(out).problems)


def test_a_configuration_that_never_ends_is_damaged(straight, tmp_path):
    out = shutil.copytree(straight(), tmp_path / "run")
    (out / "config.yaml").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"config\.yaml: not a run's configuration"):
        lifecycle.verify(out)
