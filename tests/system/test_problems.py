"""Problems of one's own are trained, continued, replayed and shown as the built-in one; a mistake in them is named."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gptworks
from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core import folder, registry, runtime
from gptworks.core.config import Config
from gptworks.core.errors import NotFinite, Preempted, RunMismatch, UsageError
from gptworks.training.hooks import Checkpointer

ROOT = Path(__file__).parents[2]
REVERSE, PAIRS = f"{ROOT / 'examples' / 'own_problem.py'}:Reverse", f"{ROOT / 'tests' / 'pairs.py'}:Pairs"
SHORT = {
    "model.family": "llama", "model.hidden_size": 32, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
    "model.tie_word_embeddings": False, "train.context": 16, "train.batch_tokens": 256, "train.max_steps": 8,
    "train.checkpoint_every": 4, "train.eval_every": 4, "train.log_every": 1, "train.precision": "fp32",
    "train.micro_batch": 4, "train.tensorboard": False,
}  # fmt: skip
PROBLEMS = {"reverse": REVERSE, "pairs": PAIRS}


def asked(problem: str, **values) -> Config:
    return configuration.load(None, {"problem": PROBLEMS.get(problem, problem), **SHORT, **values})


def weights(run: Path, step: int = 8) -> dict[str, str]:
    """Every bit of a checkpoint but the clock's."""
    place = run / "checkpoints" / f"step-{step:08d}"
    facts = json.loads((place / "state.json").read_text())
    files = {name: folder.sha256(place / name) for name in ("model.safetensors", "optimizer.safetensors")}
    return files | {key: str(facts[key]) for key in ("step", "tokens", "cursor", "best_figure", "values", "parents")}


@pytest.fixture
def stopped_at(monkeypatch):
    """stopped_at(step, config, out): trains until a signal at that step."""
    usual = Checkpointer.__call__

    def train(step: int, config: Config, out: Path) -> None:
        def hooked(self, state, metrics):
            if state.step == step:
                runtime.interrupts.requested = "SIGTERM"
            return usual(self, state, metrics)

        monkeypatch.setattr(Checkpointer, "__call__", hooked)
        with pytest.raises(Preempted):
            lifecycle.train(config, out)
        monkeypatch.setattr(Checkpointer, "__call__", usual)

    return train


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_that_was_stopped_ends_as_one_that_was_not(problem, workers, tmp_path, stopped_at):
    config = asked(problem, **{"train.workers": workers, "train.threads": workers})
    straight = lifecycle.train(config, tmp_path / "straight")
    stopped_at(5, config, tmp_path / "run")
    result = lifecycle.train(config, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert result["eval"] == straight["eval"]
    assert lifecycle.verify(tmp_path / "run")["identical"] and lifecycle.verify(tmp_path / "straight")["identical"]


def spelled(settings: dict) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_processes_that_were_killed_end_as_one_that_was_not(problem, tmp_path, zygote):
    settings = SHORT | {"train.reduce": "canonical", "train.threads": 1}
    lifecycle.train(asked(problem, **settings), tmp_path / "one")
    (tmp_path / "empty.yaml").write_text("{}\n")
    out, log = tmp_path / "run", tmp_path / "log"
    recipe, named = str(tmp_path / "empty.yaml"), f"problem={PROBLEMS[problem]}"
    line = ["train", recipe, named, *spelled(settings), "--out", str(out)]
    killed = zygote.several([line, line], log, GPTWORKS_FAILPOINT="step.count:6:kill@1")
    assert [child.wait(60) for child in killed] == [79, -9], log.read_text()[-2000:]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    done = zygote.several([line, line], log)
    assert [child.wait(60) for child in done] == [0, 0], log.read_text()[-2000:]
    assert weights(out) == weights(tmp_path / "one")
    assert json.loads((out / "result.json").read_text())["processes"] == 2
    assert lifecycle.verify(out)["identical"]


def test_what_nothing_depends_on_stays_and_values_are_kept(tmp_path):
    lifecycle.train(asked("pairs", **{"train.weight_decay": 0.5}), tmp_path / "run")
    first = lifecycle.load(tmp_path / "run" / "model").model
    again = first.__class__(first.config)
    again.initialise(1)
    assert torch.equal(first.head.weight.cpu(), again.head.weight)  # the head has no part in the loss
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    assert not torch.equal(saved["model.norm.weight"], again.model.norm.weight)
    facts = json.loads((tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert facts["values"] == {"taken": 8} and facts["parents"] == {"reference": "0" * 64}
    lineage = json.loads((tmp_path / "run" / "model" / "gptworks.json").read_text())
    assert lineage["parents"] == [{"role": "reference", "path": "the model as it began", "sha256": "0" * 64}]


def test_a_run_of_a_problem_is_shown_by_report_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configuration.load("laptop", {
        "problem": REVERSE, **SHORT, "train.tensorboard": True, "train.time_budget_s": None, "model.parameters": None,
        "problem.length": 8,
    })  # fmt: skip
    result = lifecycle.run(config, tmp_path / "run", "laptop")
    assert set(result["eval"]) == {"accuracy"} and "evaluation" not in result and "generation" not in result
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("Accuracy", "First letter", "evaluation accuracy", f"{result['eval']['accuracy']:.4g}"):
        assert text in page, text
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["train/accuracy"] <= 1 for row in rows if "train/loss" in row)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/accuracy", "train/first_letter", "eval/accuracy"} <= set(events.Tags()["scalars"])


def test_what_comes_after_training_needs_no_file_of_the_problem(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "examples" / "own_problem.py").read_text())
    lifecycle.train(asked(f"{mine}:Reverse"), tmp_path / "run")
    mine.unlink()
    registry._load.cache_clear()  # or it would still be in memory
    (tmp_path / "letters.txt").write_text("dcba>abcdhgfe>efgh" * 20)
    assert Path(lifecycle.report(tmp_path / "run").report).is_file()
    (generated,) = gptworks.generate(tmp_path / "run" / "model", ["hgfedcba>"], max_new_tokens=3, temperature=0.0)
    assert generated.tokens <= 3 and generated["prompt"] == "hgfedcba>"
    exported = gptworks.export(
        tmp_path / "run" / "model", "gguf", tmp_path / "m.gguf", data=str(tmp_path / "letters.txt")
    )
    assert exported.parity and Path(exported.out).is_file()
    with pytest.raises(UsageError, match="mine.py"):
        lifecycle.verify(tmp_path / "run")


def test_early_stopping_goes_by_the_watched_figure_and_its_direction(tmp_path, monkeypatch):
    from gptworks.training.problem import Evaluation

    problem = configuration.problem_of({"problem": REVERSE})
    accuracies = iter([0.5, 0.7, 0.6, 0.65, 0.1, 0.1])
    evaluator = problem.start.__globals__["Backwards"]
    monkeypatch.setattr(evaluator, "__call__", lambda self, model: Evaluation({"accuracy": next(accuracies)}, ("a",)))
    config = asked("reverse", **{"train.eval_every": 1, "train.patience": 2, "train.max_steps": 50})
    result = lifecycle.train(config, tmp_path / "run")
    assert result["steps"] == 4 and "patience" in result["stopped"] and result["weights"] == "of the best evaluation"


def test_a_flexible_key_of_a_problem_holds_from_the_step_it_was_changed_at(tmp_path):
    lifecycle.train(asked("pairs"), tmp_path / "run")
    more = {"train.max_steps": 12, "problem.patience": 9}
    result = lifecycle.train(asked("pairs", **more), tmp_path / "run")
    assert result["changes"] == ["problem.patience=9, was 3; train.max_steps=12, was 8"]
    file = configuration.RunFile.read(tmp_path / "run" / "config.yaml")
    assert (file.at(7).problem.patience, file.at(8).problem.patience) == (3, 9)
    with pytest.raises(RunMismatch, match="problem.changes="):
        lifecycle.train(asked("pairs", **more, **{"problem.changes": ["a"]}), tmp_path / "run")
    with pytest.raises(RunMismatch, match="problem.kind="):
        lifecycle.train(asked("reverse", **{"train.max_steps": 12}), tmp_path / "run")


# -- what is wrong with a problem --------------------------------------------------------------------------------


def spoiled(tmp_path: Path, *changes: tuple[str, str]) -> str:
    """The example with something else in it."""
    text = (ROOT / "examples" / "own_problem.py").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path / 'mine.py'}:Reverse"


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            ('= "accuracy", False', '= "f1", False'),
            UsageError,
            "py:Reverse watches 'f1', and its evaluation has accuracy",
        ),
        (('figures = ("accuracy",', 'figures = ("precision",'), UsageError, "names the figures .*'precision'"),
        (("(right.sum(), batch", "(float('inf'), batch"), NotFinite, "step 0: the figure 'accuracy' is inf"),
        (
            ('{"accuracy": float(right / letters)}', '{"accuracy": float("nan")}'),
            NotFinite,
            "evaluation's accuracy is nan",
        ),
        (("return Loss(loss,", "return Loss(loss * float('nan'),"), NotFinite, "step 0: the loss is nan"),
        (
            ('f"accuracy {float(right / letters):.4f}",)', '"",), {"accuracy": float("nan")}'),
            NotFinite,
            "evaluation's accuracy is nan",
        ),
        (('{"accuracy": float(right / letters)}', '{"accuracy": True}'), UsageError, "'accuracy' is True and not a"),
        (
            ("return float(batch.weights.sum())", "return -5.0"),
            UsageError,
            "py:Backwards.weight gives -5.0: it has to be",
        ),
        (("return float(batch.weights.sum())", "return float('inf')"), UsageError, "weight gives inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_problem_computes_wrong_ends_the_run_in_a_line(change, kind, says, tmp_path):
    with pytest.raises(kind, match=says) as error:
        lifecycle.train(asked(spoiled(tmp_path, change)), tmp_path / "run")
    assert error.value.code == {UsageError: 64, NotFinite: 76}[kind]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("        return cls()", "        return 3"), "Reverse.open gives int and not Problem"),
        (("watched, lower_is_better, identity, tokenizer =", "watched, lower_is_better, name, other ="), "has no tok"),
        (("return Work(strings, ", "return dict(batches=strings, "), "Reverse.start gives dict and not Work"),
        (("return Loss(", "return (0, "), "Backwards.loss gives tuple and not Loss"),
        (("return Evaluation(", "return (0, "), "Backwards gives tuple and not Evaluation"),
        (("objective=work", "objective=3"), "int has no figures: see gptworks/training/objectives.py"),
        (("    watched, lower", "    unit = -1\n    watched, lower"), "py:Reverse.unit is -1: it has to be"),
        (("    watched, lower", "    bytes_per_token = float('nan')\n    watched, lower"), "bytes_per_token is nan"),
        (("False, \"strings\", TOK", "False, (1, 2), TOK"), "Reverse.identity gives tuple and not str"),
        (('figures = ("accuracy", ', 'figures = ("loss", '), "Backwards.figures has 'loss', under which the run logs"),
        (('figures = ("accuracy", ', 'figures = ("\\ud800", '), "the name of a figure is a text that can be printed"),
        (('Evaluation({"accuracy"', 'Evaluation({"\\n": 1, "accuracy"'), "the name of a figure is a text that can be"),
        (("fixed(8, ", "fixed(12, "), "Strings.take gives rows of 24 tokens, and the model takes 16: choose train.con"),
        (("fixed(8, ", 'fixed("a", '), "problem.length: mine.py:Settings declares the default 'a': Input should be a"),
    ],
)  # fmt: skip
def test_what_a_problem_gives_of_another_kind_is_named(change, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        lifecycle.train(asked(spoiled(tmp_path, change)), tmp_path / "run")


def test_rows_that_belong_together_are_not_divided(tmp_path):
    with pytest.raises(UsageError, match="train.micro_batch=3: 2 rows belong together"):
        lifecycle.train(asked("pairs", **{"train.micro_batch": 3}), tmp_path / "run")
    text = (ROOT / "tests" / "pairs.py").read_text().replace("unit, watched", "units, watched")
    (tmp_path / "pairs.py").write_text(text)  # the problem keeps from the run that its batches have pairs
    config = asked(f"{tmp_path / 'pairs.py'}:Pairs", **{"train.micro_batch": 3})
    with pytest.raises(UsageError, match="would divide rows that belong together, 2 at a time"):
        lifecycle.train(config, tmp_path / "run")


def test_a_run_does_not_go_on_beside_another_second_model(tmp_path):
    lifecycle.train(asked("pairs"), tmp_path / "run")
    text = (ROOT / "tests" / "pairs.py").read_text().replace('"0" * 64', '"1" * 64')
    own = tmp_path / "pairs.py"
    own.write_text((ROOT / "tests" / "pairs.py").read_text())
    config = asked(f"{own}:Pairs")
    lifecycle.train(config, tmp_path / "mine")
    own.write_text(text)
    with pytest.raises(RunMismatch, match="the model as it began has other weights"):
        lifecycle.train(asked(f"{own}:Pairs", **{"train.max_steps": 12}), tmp_path / "mine")


@pytest.mark.parametrize("method", ["take", "loss", "__call__", "start", "open"])
def test_an_error_in_a_problem_names_its_file_and_line(method, tmp_path, monkeypatch, capsys):
    from gptworks import cli

    text = (ROOT / "examples" / "own_problem.py").read_text().splitlines()
    at = next(i for i, line in enumerate(text) if f"def {method}(" in line)
    indent = " " * (len(text[at]) - len(text[at].lstrip()) + 4)
    text.insert(at + 1, f"{indent}raise ValueError('as you wrote it')")
    (tmp_path / "mine.py").write_text("\n".join(text))
    (tmp_path / "empty.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gptworks", "train", "empty.yaml", "problem=mine.py:Reverse", *spelled(SHORT)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    errors = capsys.readouterr().err
    assert end.value.code == 64 and "Traceback" not in errors
    said = errors.splitlines()[-1]
    assert said.startswith("error: ") and f"mine.py, line {at + 2}, in {method}: ValueError: as you wrote it" in said


def test_a_file_edited_within_a_second_is_the_one_that_counts(tmp_path, monkeypatch):
    """Python's cache of compiled files would give the old one again: it goes by seconds and size."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    own = tmp_path / "mine.py"
    for number in (1, 2):
        own.write_text(f"class Mine:\n    number = {number}\n")
        os.utime(own, ns=(10**18 + number, 10**18 + number))
        assert registry.resolve("problem", {}, f"{own}:Mine").number == number
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    "line",
    ["next(model.parameters()).requires_grad_(False)", "model.extra = torch.nn.Parameter(torch.ones(3))",
     "model.double()", "del model.model.norm.weight", "torch.nn.init.zeros_(model.model.norm.weight)"],
)  # fmt: skip
def test_a_start_that_changes_what_is_trained_is_refused(line, tmp_path):
    """Its checkpoints would fit no run that continues from them."""
    place = "        rows = config.train.batch_tokens"
    problem = spoiled(tmp_path, (place, f"        {line}\n{place}"))
    with pytest.raises(UsageError, match=r"Reverse\.start changes what is trained \("):
        lifecycle.train(asked(problem), tmp_path / "run")


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    changes = (
        ('{"accuracy": float(right / letters)}', '{"accuracy": right / letters}'),
        ("Cursor(0, cursor.row + self.rows)", "Cursor(np.int64(0), np.int64(cursor.row + self.rows))"),
    )
    lifecycle.train(asked(spoiled(tmp_path, *changes)), tmp_path / "run")
    assert lifecycle.verify(tmp_path / "run")["identical"]


def test_a_problem_file_that_was_changed_does_not_go_on(tmp_path):
    problem = spoiled(tmp_path)
    lifecycle.train(asked(problem), tmp_path / "run")
    spoiled(tmp_path, ("= 0  # what stands", "= 0.5  # what stands"))
    for again in (lambda: lifecycle.train(asked(problem, **{"train.max_steps": 12}), tmp_path / "run"),
                  lambda: lifecycle.verify(tmp_path / "run")):  # fmt: skip
        with pytest.raises(RunMismatch, match=r"mine\.py:Reverse: the file has changed since this run began"):
            again()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("return Loss(loss,", "raise SystemExit(0)\n        return Loss(loss,"), ", in loss: SystemExit: 0"),
        (
            ("return Loss(loss,", "raise OSError(28, 'full')\n        return Loss(loss,"),
            ", in loss: OSError: [Errno 28]",
        ),
        (("return Loss(loss,", "raise Silent\n        return Loss(loss,"), ", in loss: Silent: (it cannot be printed)"),
        (("class Backwards(", "raise SystemExit\nclass Backwards("), "mine.py cannot be loaded: SystemExit"),
        (
            ("return Loss(loss,", "return Loss(1.0,"),
            "mine.py: AttributeError: 'float' object has no attribute 'backward'",
        ),
        (("    watched, lower", "    beside = None\n    watched, lower"), "mine.py: AttributeError: 'NoneType' object"),
        (
            ("        return Work(", "        values['x'] = object()\n        return Work("),
            "mine.py: TypeError: Object of",
        ),
        (
            ("        return Work(", "        values['x'] = float('nan')\n        return Work("),
            "mine.py: ValueError: Out of",
        ),
    ],
)
def test_whatever_else_a_problem_does_wrong_is_a_line_with_its_file(change, says, tmp_path, zygote):
    silent = "\n\n\nclass Silent(BaseException):\n    def __str__(self):\n        raise ValueError\n\n\n"
    problem = spoiled(tmp_path, change, ("\n\n\nclass Strings(", f"{silent}class Strings("))
    (tmp_path / "empty.yaml").write_text("{}\n")
    line = ["train", str(tmp_path / "empty.yaml"), f"problem={problem}", *spelled(SHORT)]
    assert zygote.run([*line, "--out", str(tmp_path / "run")], tmp_path / "log") == 64
    errors = (tmp_path / "log").read_text()
    assert "Traceback" not in errors and errors.count("error: ") == 1 and says in errors.splitlines()[-1], errors


def test_canonical_sums_need_the_share_of_a_whole_step(tmp_path):
    problem = spoiled(tmp_path, ("return batch.share_of(self.group.rank, self.group.size), ", "return batch, "))
    with pytest.raises(UsageError, match=r"batches are made by Batch\.share_of"):
        lifecycle.train(asked(problem, **{"train.reduce": "canonical"}), tmp_path / "run")


def test_a_file_that_leaves_its_folder_is_found_again(tmp_path, monkeypatch):
    spoiled(tmp_path, ("import numpy as np\n", "import os\n\nimport numpy as np\n\nos.chdir('/')\n"))
    monkeypatch.chdir(tmp_path)
    lifecycle.train(asked("mine.py:Reverse"), tmp_path / "run")
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match="no such file: mine.py in /$"):
        lifecycle.verify(tmp_path / "run")


def test_figures_that_differ_between_processes_end_both_at_one_step(tmp_path, zygote):
    """Early stopping goes by the main one's: a process that went on alone would wait for the other without end."""
    change = ('{"accuracy": float(right / letters)}', '{"accuracy": float(os.environ["RANK"] == "1")}')
    problem = spoiled(tmp_path, change, ("import numpy as np\n", "import os\n\nimport numpy as np\n"))
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = SHORT | {"train.patience": 1, "train.eval_every": 2, "train.threads": 1, "train.timeout_s": 30}
    line = ["train", str(tmp_path / "empty.yaml"), f"problem={problem}", *spelled(settings)]
    both = zygote.several([[*line, "--out", str(tmp_path / "run")]] * 2, tmp_path / "log")
    assert [child.wait(60) for child in both] == [0, 0], (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


def test_the_card_of_a_problem_names_it(tmp_path):
    lifecycle.train(asked("reverse"), tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ", for\n`own_problem.py:Reverse`." in card and "split of '" not in card


def test_nothing_of_the_package_knows_of_the_example():
    package = Path(gptworks.__file__).parent
    assert not [path for path in package.rglob("*.py") if "Reverse" in path.read_text()]
    assert len((ROOT / "examples" / "own_problem.py").read_text().splitlines()) <= 80
