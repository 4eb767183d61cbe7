"""The Python interface: paths or text, loaded models or folders, a clock for each call, a process left as it was."""

import ast
import inspect
import json
import pydoc
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptworks
from gptworks import api, cli
from gptworks.core import config as configuration
from gptworks.core import folder, results, runtime
from gptworks.core.errors import DataError, UsageError

ROOT = Path(gptworks.__file__).parents[1]


# -- names and types ---------------------------------------------------------------------------------------------


def test_the_module_has_its_public_names_and_no_others() -> None:
    assert dir(gptworks) == sorted([*gptworks.__all__, "__version__"])
    assert gptworks.__version__.count(".") >= 1
    told = pydoc.plain(pydoc.render_doc(gptworks))
    assert all(f"\n    {name}(" in told for name in gptworks.__all__ if name not in ("Model", "load"))
    assert "class Model" in told and "typing" not in told


def test_type_checkers_are_told_of_the_names() -> None:
    declared = {
        alias.name
        for node in ast.walk(ast.parse(Path(gptworks.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "gptworks.api"
        for alias in node.names
    }
    assert declared == set(gptworks.__all__)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["gptworks"]} and (ROOT / "gptworks" / "py.typed").is_file()  # no file is left out


@pytest.mark.slow
def test_mypy_knows_the_interface_in_a_project_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gptworks\n"
        'm = gptworks.load("x")\n'
        'reveal_type(m.generate("y", 3).text)\n'
        'reveal_type(gptworks.train("laptop", out="z"))\n'
        'gptworks.generate(m, "y", max_tokens=3)\n'
        "gptworks.nothing\n"
    )
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "mine.py"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    ).stdout  # fmt: skip
    assert 'mine.py:3: note: Revealed type is "str"' in told.replace("builtins.", "")
    assert "Trained | gptworks.core.results.Proposed | None" in told
    assert 'Unexpected keyword argument "max_tokens"' in told and 'has no attribute "nothing"' in told
    assert "Found 2 errors in 1 file" in told


# The command's name of what Python takes by position, and what only one of them has.
OTHERWISE = {"folder": "model", "adapter": "model", "prompt": "prompts"}
COMMANDS_ALONE = {"as_json", "json", "debug", "dry_run", "machine", "overrides"}


@pytest.mark.parametrize(
    "name", ["evaluate", "generate", "merge", "export", "push", "report", "verify", "train", "run"]
)
def test_arguments_have_the_names_and_defaults_of_the_command_s_options(name: str) -> None:
    def arguments(function: Any) -> dict[str, Any]:
        return dict(inspect.signature(function).parameters)

    def plain(value: Any) -> Any:
        return None if value in ((), inspect.Parameter.empty) else value

    command, python = arguments(getattr(cli, name)), arguments(getattr(api, name))
    alone = COMMANDS_ALONE - ({"dry_run"} if name == "export" else set())
    named = {OTHERWISE.get(key, key): value.default for key, value in command.items() if key not in alone}
    given = {OTHERWISE.get(key, key): value.default for key, value in python.items() if key not in alone}
    if name == "report":
        given["model"] = given.pop("run")
    assert {key: plain(value) for key, value in named.items()} == {key: plain(value) for key, value in given.items()}


def test_a_model_continues_as_the_function_does() -> None:
    method, function = (inspect.signature(each).parameters for each in (api.Model.generate, api.generate))
    assert [p for p in list(function.values())[2:] if p.name != "quiet"] == list(method.values())[2:]


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: gptworks.load(None), "path=None: must be a text or a path"),  # type: ignore[arg-type]
    (lambda m: gptworks.load(b"x"), "path=b'x': must be a text or a path"),  # type: ignore[arg-type]
    (lambda m: gptworks.load(), "Model: missing a required argument: 'path'"),  # type: ignore[call-arg]
    (lambda m: m.generate("x", max_tokens=3), "unknown argument 'max_tokens': did you mean 'max_new_tokens'"),
    (lambda m: m.generate("x", temprature=3), "did you mean 'temperature'"),
    (lambda m: m.generate("x", 3.0), "max_new_tokens=3.0: must be a whole number"),
    (lambda m: m.generate("x", True), "max_new_tokens=True: must be a whole number"),
    (lambda m: m.generate("x", seed="1"), "seed='1': must be a whole number or None"),
    (lambda m: m.generate("x", temperature=None), "temperature=None: must be a number"),
    (lambda m: m.generate("x", stop=[b"y"]), r"stop=\[b'y'\]: must be a text or a list of texts"),
    (lambda m: m.generate(None), "prompt=None: must be a text"),
    (lambda m: m.loss(b"x"), "text=b'x': must be a text"),
    (lambda m: gptworks.generate(m, [None]), r"prompts=\[None\]"),  # type: ignore[list-item]
    (lambda m: gptworks.evaluate(m, "x", rows=3), "unknown argument 'rows': known: .*batch"),  # type: ignore[call-arg]
    (lambda m: gptworks.evaluate(m, "x", batch=0), "--batch 0: must be at least 1"),
    (lambda m: gptworks.evaluate(m, "x", 3), "against=3: must be .* or a loaded model or None"),  # type: ignore[arg-type]
    (lambda m: gptworks.export(m, "gguf", "x", tpe="f32"), "did you mean 'type'"),  # type: ignore[call-arg]
    (lambda m: gptworks.export(m, "gguf", "x", tokens=0), "--tokens 0"),
    (lambda m: gptworks.merge(m, "x", dtype=torch.float16), "dtype=torch.float16: must be a text"),  # type: ignore
    (lambda m: gptworks.verify(m), r"folder=Model\(.*: must be a text or a path"),
    (lambda m: gptworks.train("laptop", fresh="no"), "fresh='no': must be True or False"),  # type: ignore[arg-type]
    (lambda m: gptworks.train("laptop", **{"train.lr": b"3"}), "train.lr=b'3': must be a text, a number"),
    (lambda m: gptworks.train("laptop", data={"train": {"a.txt"}}), "data.train={'a.txt'}: must be"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_argument_is_one_line_that_names_it(
    finished_run: Path, call: Callable[[Any], Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as error:
        call(gptworks.load(finished_run / "model"))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_paths_anywhere_are_taken(finished_run: Path, tmp_path: Path) -> None:
    model = gptworks.load(finished_run / "model")
    how = {"seed": np.int64(1), "temperature": np.float32(0.5), "top_k": np.int32(3)}
    python = {name: value.item() for name, value in how.items()}
    assert model.generate("the", np.int64(4), **how).ids == model.generate("the", 4, **python).ids
    (tmp_path / "a.txt").write_text("the king " * 2000)
    asked = {"data": {"train": [tmp_path / "a.txt"]}, "train.max_steps": np.int64(1)}
    assert gptworks.train(finished_run / "config.yaml", tmp_path / "run", quiet=True, **asked)["steps"] == 1


# -- what is given back ------------------------------------------------------------------------------------------


def test_what_a_model_gives_is_what_the_command_prints(finished_run: Path, zygote: Any, tmp_path: Path) -> None:
    model, text = gptworks.load(finished_run / "model"), "the old king sang, and nobody answered.\n" * 3
    asked = [
        "generate",
        str(finished_run / "model"),
        "--prompt",
        "the",
        "--max-new-tokens",
        "5",
        "--seed",
        "1",
        "--json",
    ]
    printed = json.loads(zygote.printed(asked))
    continued = model.generate("the", 5, seed=1)
    assert list(continued) == list(printed) and continued["text"] == printed["text"]  # the same defaults too
    assert continued["tokens"] == continued.tokens == printed["tokens"] == len(continued.ids)
    (tmp_path / "text.txt").write_text(text)
    printed = json.loads(zygote.printed(["evaluate", str(finished_run / "model"), "--data", str(tmp_path / "text.txt"),
                                         "--json"]))  # fmt: skip
    scored = model.loss(text)
    assert dict(scored) == {name: printed[name] for name in scored} and json.dumps(scored.as_dict())
    assert model.loss("\ud800 the king").tokens > 1  # half a character is one that is not known


def test_a_model_and_every_result_tell_themselves_in_one_line(finished_run: Path) -> None:
    model = gptworks.load(finished_run / "model")
    assert repr(model).startswith(f"Model('{finished_run / 'model'}': qwen3, ") and "on cpu" in repr(model)
    trained = results.Trained.read(finished_run / "result.json")
    told = [
        repr(each) for each in (trained, results.Finished(trained), model.generate("x\ny" * 9, 4), model.loss("xyz"))
    ]
    assert told[0].startswith("Trained(steps=12, ") and f"loss: {trained.eval['loss']:.6g}" in told[0]
    assert told[1].startswith("Finished(steps=12, ") and told[2].startswith("Generated(prompt='x\\ny")
    assert all("\n" not in line and len(line) < 400 for line in told)


def test_quiet_holds_for_a_call(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime.console.quiet = False
    gptworks.train(finished_run / "config.yaml", tmp_path / "quiet", quiet=True, **{"train.max_steps": 1})
    assert capsys.readouterr().err == ""
    gptworks.train(finished_run / "config.yaml", tmp_path / "quiet", **{"train.max_steps": 1})
    assert "is finished" in capsys.readouterr().err


def test_loss_is_what_evaluate_gives_for_a_file_of_the_text(finished_run: Path, tmp_path: Path) -> None:
    model = api.load(finished_run / "model")
    text = "the old king sang, and nobody answered.\n" * 3
    (tmp_path / "text.txt").write_text(text)
    found = api.evaluate(model, tmp_path / "text.txt", against=finished_run / "model")
    score = model.loss(text)
    assert score.loss == pytest.approx(found["loss"], rel=1e-6) and score.tokens == found["tokens"]
    assert found["against"]["difference_bits_per_byte"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="too little text"):
        model.loss("")


def test_generate_takes_one_stop_string_or_several(finished_run: Path) -> None:
    model = api.load(finished_run / "model")
    whole = model.generate("the king", 30, temperature=0).text
    stop = whole[len(whole) // 2]
    assert model.generate("the king", 30, stop=stop, temperature=0).text == whole[: whole.index(stop)]
    assert model.generate("the king", 30, stop=["\0", stop], temperature=0).finish_reason == "stop"
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        model.generate("the king", 0)


def test_a_time_budget_counts_from_the_call(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    monkeypatch.setattr(runtime, "_age", lambda: 5000.0 + time.monotonic() - start)  # a notebook, open for an hour
    monkeypatch.setattr(runtime, "_begun", 0.0)
    config = tiny_config()
    monkeypatch.setattr(api.configuration, "load", lambda recipe, overrides: config)
    result = api.train(Path("tiny"), out=tmp_path / "run")
    assert result["seconds"] < 100 and result["steps"] == 12


# -- a guest in the process --------------------------------------------------------------------------------------

HOST = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch
import gptworks

run, out = sys.argv

def state():
    from torch.utils import deterministic
    compiler = sys.modules.get("torch._inductor.config")
    return {
        "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
        "libraries": [line for line in torch.__config__.parallel_info().splitlines() if "max_threads" in line],
        "mode": torch.get_deterministic_debug_mode(), "compiler": getattr(compiler, "deterministic", False),
        "fills": deterministic.fill_uninitialized_memory, "small": float(torch.tensor(1e-40) * 0.5),
        "random": str(random.getstate()), "numpy": str(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(), "type": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()), "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "precision": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ), "folder": os.getcwd(), "umask": os.umask(0o22),
        "signals": {str(s): str(signal.getsignal(s)) for s in signal.valid_signals()},
        "filters": str(warnings.filters), "show": str(warnings.showwarning), "hook": str(sys.excepthook),
        "logging": [logging.root.level, logging.root.manager.disable, str(logging.root.handlers)],
    }

def differs(name, work):
    before = state()
    try:
        ended = type(work()).__name__
    except BaseException as error:
        ended = type(error).__name__
    after = state()
    print(json.dumps([name, ended, [key for key in before if before[key] != after[key]]]))

def train(folder, **more):
    return gptworks.train(run + "/config.yaml", out=out + folder, quiet=True, **more)

torch.set_num_threads(2)
torch.utils.deterministic.fill_uninitialized_memory = True
os.umask(0o22)
"""


@pytest.fixture
def host(zygote: Any, finished_run: Path, tmp_path: Path) -> Callable[[str], dict[str, tuple[str, list[str]]]]:
    """Makes calls in a process of its own: by name, how each ended, and what was another afterwards."""

    def call(code: str) -> dict[str, tuple[str, list[str]]]:
        lines = zygote.python(HOST.replace("sys.argv", "sys.argv[1:]") + code, str(finished_run), f"{tmp_path}/")
        return {name: (ended, changed) for name, ended, changed in map(json.loads, lines.splitlines())}

    return call


def test_a_call_leaves_the_process_as_it_was(host: Any) -> None:
    called = host("""
open(out + "text.txt", "w").write("the old king " * 9)
differs("train", lambda: train("a"))
differs("train again", lambda: train("a"))
differs("run", lambda: gptworks.run(run + "/config.yaml", out=out + "a", stages=["train", "report"], quiet=True))
differs("wrong", lambda: train("w", **{"train.max_steps": "x"}))
differs("verify", lambda: gptworks.verify(out + "a", quiet=True))
differs("evaluate", lambda: gptworks.evaluate(run + "/model", out + "text.txt"))
differs("generate", lambda: gptworks.generate(run + "/model", "the", 3))
differs("load", lambda: gptworks.load(run + "/model"))
model = gptworks.load(run + "/model")
differs("continue", lambda: model.generate("the", 3, seed=1))
differs("loss", lambda: model.loss("the king"))
differs("merge", lambda: gptworks.merge(model, out + "m"))
differs("report", lambda: gptworks.report(out + "a"))
""")
    assert {name: changed for name, (_, changed) in called.items() if changed} == {}
    assert [ended for ended, _ in called.values()] == [
        "Trained", "Trained", "Finished", "UsageError", "Verified", "Evaluated", "list", "Model", "Generated", "Score",
        "UsageError", "Reported",
    ]  # fmt: skip


def test_a_call_that_fails_or_is_stopped_midway_leaves_the_process_as_it_was(host: Any) -> None:
    called = host("""
from gptworks.core import failpoint

def at(name, action):
    failpoint.arm(f"{name}:2:{action}")

at("step.count", "term")
differs("stopped", lambda: train("b"))
def interrupted(*arguments, **options):
    raise KeyboardInterrupt
from gptworks.training import session
session.train = interrupted
differs("interrupted", lambda: train("c"))
""")
    assert called == {"stopped": ("Preempted", []), "interrupted": ("KeyboardInterrupt", [])}


def test_a_call_takes_little_more_than_the_work(finished_run: Path) -> None:
    with ExitStack() as undo:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            with runtime.guest(quiet=True):
                runtime._put_back_later(undo)
            times.append(time.perf_counter() - start)
    assert min(times) < 0.005


def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def within(context: Callable[[], Any]) -> Callable[[], Iterator[None]]:
    def setting() -> Iterator[None]:
        with context():
            yield

    return setting


SETTINGS: dict[str, Callable[[], Iterator[None]]] = {
    "float64": float64,
    "default device": default_device,
    "device": within(lambda: torch.device("meta")),
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_host_change_nothing_and_stay(finished_run: Path, tmp_path: Path, name: str) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        )  # fmt: skip

    model = gptworks.load(finished_run / "model")
    before = state()
    setting = SETTINGS[name]()
    next(setting)
    around = state()
    trained = gptworks.train(finished_run / "config.yaml", tmp_path / "run", quiet=True)
    again = gptworks.load(tmp_path / "run" / "model")
    figures = again.generate("the", 6, temperature=0).ids, again.loss("the old king").loss
    assert state() == around != before
    next(setting, None)
    assert trained and trained.eval == results.Trained.read(finished_run / "result.json").eval
    assert figures == (model.generate("the", 6, temperature=0).ids, model.loss("the old king").loss)
    one, two = (path / "model" / "model.safetensors" for path in (finished_run, tmp_path / "run"))
    assert folder.sha256(one) == folder.sha256(two)


def test_runs_are_compared_and_continued_from_python(tiny_run: Path, finished_run: Path) -> None:
    both = gptworks.compare(finished_run, str(finished_run), quiet=True)
    assert len(both.runs) == 2 and both["differences"] == {}
    with pytest.raises(UsageError, match="compare takes two runs or more"):
        gptworks.compare(finished_run)
    with pytest.raises(UsageError, match=r"runs=\['a', 'b'\]: must be a text or a path"):
        gptworks.compare(["a", "b"])  # type: ignore[arg-type]


def test_a_section_may_be_a_mapping_whatever_its_short_form_is(finished_run: Path) -> None:
    config = configuration.load("laptop", {"model": {"parameters": 100_000}, "problem": {"kind": "pretraining"}})
    assert config.model.parameters == 100_000 and config.model.family == "qwen3"
    assert configuration.load("lora", {"adapter": {"rank": 4}}).adapter.rank == 4
    assert configuration.load("laptop", {"model": str(finished_run)}).model.path == str(finished_run)


@pytest.mark.parametrize("name", ["train", "run", "plan"])
def test_a_misspelt_option_beside_settings_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="unknown argument 'quite': did you mean 'quiet'"):
        getattr(gptworks, name)("laptop", quite=True)
