"""What may be added to a training: z-loss, smoothed targets, averaged and best weights, left-out spikes."""

import copy
import importlib
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from gptworks import lifecycle
from gptworks.core import config, folder
from gptworks.core.errors import DataError, RunMismatch, UsageError
from gptworks.training import loop, metrics, range_test, state
from gptworks.training.objectives import Loss, NextToken
from gptworks.training.pretraining import HeldOut
from gptworks.training.problem import Evaluation
from gptworks.training.range_test import _bend
from gptworks.training.state import spike_limit


def batch():
    return tiny.loader().take(state.Cursor())[0]


def logits(model, rows):
    return model.scores(rows.tokens).double().flatten(0, 1), rows.targets.flatten(), rows.weights.flatten()


def test_label_smoothing_is_cross_entropy_with_a_share_of_the_uniform_distribution():
    model, rows = tiny.model(), batch()
    scores, targets, weights = logits(model, rows)
    wanted = torch.full_like(scores, 0.1 / scores.shape[1])
    wanted[torch.arange(len(targets)), targets] += 0.9
    textbook = float((-(wanted * scores.log_softmax(-1)).sum(-1) * weights).sum().detach())
    assert NextToken(tiny.settings(label_smoothing=0.1)).loss(model, rows).sum.item() == pytest.approx(
        textbook, rel=1e-6
    )


def test_z_loss_adds_the_square_of_the_log_partition():
    model, rows = tiny.model(), batch()
    scores, _, weights = logits(model, rows)
    z = float((scores.detach().exp().sum(-1).log().square() * weights).sum())
    plain = NextToken(tiny.settings()).loss(model, rows).sum.item()
    assert NextToken(tiny.settings(z_loss=0.01)).loss(model, rows).sum.item() == pytest.approx(
        plain + 0.01 * z, rel=1e-6
    )


def test_the_evaluation_knows_neither(tiny_config, tmp_path):
    settings = {"train.lr": 0, "train.adam_lr": 0, "train.max_steps": 1}
    plain = lifecycle.train(tiny_config(**settings), tmp_path / "a")
    other = lifecycle.train(
        tiny_config(**settings, **{"train.z_loss": 1.0, "train.label_smoothing": 0.5}), tmp_path / "b"
    )
    assert plain["eval"] == other["eval"] and plain["train"]["loss"] < other["train"]["loss"]


# -- the average -------------------------------------------------------------------------------------------------


def test_the_average_forgets_at_the_rate_asked_after_a_short_start():
    train = tiny.settings(ema=0.9)
    started, seen = tiny.state(train), []
    tiny.run(started, train, 40, total=40, hooks=[lambda s, m: seen.append(copy.deepcopy(s.groups()["model"]))])
    for name, found in started.average.items():
        expected = seen[0][name].double()
        for step, weights in enumerate(seen):
            keep = min(0.9, (1 + step) / (10 + step)) if step else 0.0
            expected = keep * expected + (1 - keep) * weights[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_model_folder_is_the_average_that_the_loss_was_measured_on(tiny_config, tmp_path):
    result = lifecycle.train(tiny_config(**{"train.ema": 0.8}), tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000012"
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    average, weights = load_file(last / "average.safetensors"), load_file(last / "model.safetensors")
    assert result["weights"] == "averaged"
    assert all(torch.equal(saved[name], value) for name, value in average.items())
    assert any(not torch.equal(weights[name], value) for name, value in average.items())
    text = tmp_path / "run" / "data" / "validation.jsonl"
    assert lifecycle.evaluate(tmp_path / "run" / "model", str(text))["loss"] == pytest.approx(result["eval"]["loss"])


# -- spikes ------------------------------------------------------------------------------------------------------


def test_a_spike_is_judged_by_the_spread_of_the_norms_before_it():
    calm = [1.0 + 0.1 * math.sin(i) for i in range(state.WINDOW)]
    assert 1.3 < spike_limit(calm, 6.0) < 1.6
    assert spike_limit(calm[:20], 6.0) == math.inf  # too early to tell


def test_a_spike_does_not_hide_the_next():
    norms = [1.0 + 0.1 * math.sin(i) for i in range(state.WINDOW)]
    for norm in (100.0, 50.0, 50.0, 20.0):
        limit = spike_limit(norms, 6.0)
        assert norm > limit
        norms = [*norms, min(norm, limit)][-state.WINDOW :]
    for _ in range(state.WINDOW):  # but a new level becomes the usual one
        norms = [*norms, min(3.0, spike_limit(norms, 6.0))][-state.WINDOW :]
    assert spike_limit(norms, 6.0) > 3.0


def spoiled(monkeypatch, at, factor):
    """Makes the loss of step `at` (from 0) a multiple of itself."""
    usual = loop.accumulate

    class Scaled(NextToken):
        def loss(self, model, batch):
            return Loss(super().loss(model, batch).sum * factor)

    def accumulate(model, batch, objective, *, train, step, **options):
        objective = Scaled(train) if step == at else objective
        return usual(model, batch, objective, train=train, step=step, **options)

    monkeypatch.setattr(loop, "accumulate", accumulate)


def test_a_spike_moves_no_weight_and_the_run_goes_on(monkeypatch):
    spoiled(monkeypatch, 40, 1000.0)
    train, before, after = tiny.settings(skip_spikes=6.0, clip=0), {}, {}

    def watch(s, m):
        {40: before, 41: after}.get(s.step, {}).update(copy.deepcopy(s.groups()["model"]))
        assert m.skipped == (s.step == 41)

    started = tiny.run(tiny.state(train), train, 50, total=60, hooks=[watch])
    assert started.skipped == 1 and started.step == 50
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_the_same_steps_are_left_out_after_a_resume(monkeypatch, tmp_path):
    spoiled(monkeypatch, 40, 1000.0)
    train = tiny.settings(skip_spikes=6.0, clip=0)
    straight = tiny.run(tiny.state(train), train, 50, total=60)
    first = tiny.run(tiny.state(train), train, 38, total=60)
    again = tiny.state(train)
    state.restore(again, state.save(first, tmp_path, {}))
    tiny.run(again, train, 50, total=60)
    assert again.skipped == 1 and again.difference(straight) is None


# -- the best weights --------------------------------------------------------------------------------------------


@pytest.fixture
def worsening(monkeypatch):
    """Evaluation losses 3, 2, 1, 2, 3, ... whatever the weights are."""
    calls = []

    def scored(self, model):
        calls.append(1)
        return Evaluation({"loss": abs(3 - len(calls)) + 1.0}, ("loss", "whatever"))

    monkeypatch.setattr(HeldOut, "__call__", scored)


def test_early_stopping_gives_the_weights_of_the_lowest_evaluation(tiny_config, tmp_path, worsening):
    settings = {"train.patience": 2, "train.eval_every": 2, "train.checkpoint_every": 6}
    result = lifecycle.train(tiny_config(**settings), tmp_path / "run")
    assert result["steps"] == 10 and result["weights"] == "of the best evaluation"
    straight = lifecycle.train(tiny_config(**{"train.checkpoint_every": 6}), tmp_path / "straight")
    assert straight["weights"] == "last"
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    best = load_file(tmp_path / "straight" / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in best.items())


# -- what is not installed ---------------------------------------------------------------------------------------


def test_wandb_is_asked_for_only_where_it_is_installed(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "gptworks\[wandb\]"'):
        lifecycle.train(tiny_config(**{"train.wandb": "mine"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name, which keeps what it is told."""
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb")


def test_wandb_gets_every_logged_value(tiny_config, tmp_path, wandb):
    lifecycle.train(tiny_config(**{"train.wandb": "mine"}), tmp_path / "run")
    rows = [row for row in wandb.runs[0].rows if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13)) and wandb.runs[0].finished
    assert wandb.runs[0].options["project"] == "mine" and wandb.runs[0].config.values["train.max_steps"] == 12
    logged = [
        line for line in Path(tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    assert len(logged) == len(rows)


def test_wandb_knows_a_run_by_its_folder_and_not_by_its_path(tmp_path, wandb):
    """A fault that was seen: a fresh run was appended to the old one, a renamed one was two."""
    names = []
    for move in (None, "renamed", None, "fresh"):
        if move == "renamed":
            (tmp_path / "run").rename(tmp_path / "run.1")
            (tmp_path / "run.1").rename(tmp_path / "other")
            (tmp_path / "run").symlink_to(tmp_path / "other")
        if move == "fresh":
            (tmp_path / "run").unlink()
        (tmp_path / "run").mkdir(exist_ok=True)
        metrics.Metrics(tmp_path / "run", 0, tensorboard=False, wandb="mine").close()
        names.append(wandb.runs[-1].options["id"])
    assert names[0] == names[1] == names[2] != names[3] and all(len(name) == 16 for name in names)


@pytest.mark.parametrize("fails", ["init", "log", "update", "finish"])
def test_wandb_that_fails_ends_no_training_and_is_said_once(tmp_path, wandb, monkeypatch, capsys, fails):
    def broken(*_, **__):
        raise ConnectionError("no network")

    part = {"init": wandb, "update": wandb.Config}.get(fails, wandb.Run)
    monkeypatch.setattr(part, fails, broken)
    logged = metrics.Metrics(tmp_path, 0, tensorboard=False, wandb="mine")
    logged.hyperparameters("", tiny.chosen_config())
    for step in (1, 2):
        logged.write(step, {"train/loss": 1.0})
    logged.close()
    said = capsys.readouterr().err
    assert said == "warning: Weights & Biases failed, and hears no more of this run: ConnectionError: no network\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_login_is_said_before_the_text_is_read(tiny_config, tmp_path, wandb, monkeypatch):
    def nobody():
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr(wandb, "login", nobody)
    with pytest.raises(
        UsageError, match="train.wandb=mine: No API key configured; run `wandb login`, or set WANDB_MODE"
    ):
        lifecycle.train(tiny_config(**{"train.wandb": "mine"}), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


FAKE_WANDB = """
runs = []
class Config:
    values = {}
    def update(self, values, allow_val_change): self.values = values
class Run:
    def __init__(self, options): self.options, self.rows, self.config, self.finished = options, [], Config(), False
    def define_metric(self, name, step_metric): self.by = step_metric
    def log(self, row): self.rows.append(row)
    def finish(self): self.finished = True
def login(): return True
def init(**options):
    runs.append(Run(options))
    return runs[-1]
"""


# -- the range test ----------------------------------------------------------------------------------------------


def test_the_range_test_proposes_a_rate_and_trains_nothing(tiny_config, tmp_path):
    found = lifecycle.train(tiny_config(**{"train.find_lr": True}), tmp_path / "run")
    kept = folder.read_json(tmp_path / "run" / "find_lr.json")
    assert 1e-4 < found["lr"] < 1 and kept["lr"] == found["lr"] and found["adam_lr"] > 0
    ratios = [b / a for a, b in zip(kept["rates"], kept["rates"][1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    page = Path(found["report"]).read_text()
    assert "<svg" in page and f"train.lr={found['lr']:g}" in page
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "config.yaml").exists()
    assert lifecycle.train(tiny_config(**{"train.lr": found["lr"]}), tmp_path / "run")["steps"] == 12


def test_the_range_test_of_a_trained_model_counts_what_it_gains_on_each_batch(finished_run, tmp_path, monkeypatch):
    """At first the rates are so low that a loss is that of the model as it is, whatever the batch."""
    before, whole = list[float](), range_test._losses_before
    monkeypatch.setattr(range_test, "_losses_before", lambda *given: before.extend(whole(*given)) or before)
    settings = {
        "data.train": "shakespeare", "model.path": str(finished_run / "model"), "train.context": 32,
        "train.batch_tokens": 256, "train.max_steps": 4, "train.threads": 1, "train.find_lr": True,
        "train.lr": 1e-3, "train.adam_lr": 1e-3,
    }  # fmt: skip
    lifecycle.train(config.load(None, settings), tmp_path / "run")
    kept = folder.read_json(tmp_path / "run" / "find_lr.json")
    assert kept["losses"][0] == pytest.approx(before[0], rel=1e-5)
    apart = [abs(loss - was) for loss, was in zip(kept["losses"][:15], before, strict=False)]
    assert max(apart) < 0.2 * (max(before[:15]) - min(before[:15]))
    first = [abs(value - kept["smoothed"][0]) for value in kept["smoothed"][:15]]
    assert max(first) <= max(apart) + 1e-6


@pytest.mark.parametrize(("rate", "said"), [(0.0, "that is 0"), (1e-9, "no loss fell at the rates that were tried")])
def test_a_scan_around_a_rate_that_teaches_nothing_says_so(rate, said, tiny_config, tmp_path):
    asked = {"train.find_lr": True, "train.lr": rate, "train.adam_lr": rate}
    with pytest.raises((UsageError, DataError), match=said):
        lifecycle.train(tiny_config(**asked), tmp_path / "run")


FALL = [8.3] * 40 + [8.3 - 0.1 * i for i in range(20)]  # flat, then steep


@pytest.mark.parametrize(
    ("losses", "where"),
    [
        (FALL + [6.3] * 60, range(54, 64)),  # the fall ends
        (FALL + [6.3 - 0.005 * i for i in range(60)], range(54, 64)),  # the fall goes on, slowly
        (FALL + [6.3] * 20 + [9.0 + i for i in range(20)], range(54, 64)),  # and then it diverges
        ([8.3, 8.29, 8.31, 8.30] * 10 + FALL[40:] + [6.3] * 20, range(54, 64)),  # chance, before anything falls
        (FALL[40:] + [6.3] * 30, range(14, 24)),
    ],
)  # fmt: skip
def test_the_range_test_finds_where_the_steep_fall_ends(losses, where):
    assert _bend(losses) in where


def test_the_range_test_says_so_where_the_loss_still_falls_at_the_end():
    assert _bend(FALL) is None and _bend(FALL + [6.4 - 0.1 * i for i in range(20)]) is None


def test_the_range_test_in_a_run_is_of_the_text_that_was_asked_for(tiny_config, tiny_run, tmp_path):
    (tmp_path / "other.txt").write_text("the sea " * 5000)
    with pytest.raises(RunMismatch, match="data.train"):
        lifecycle.train(tiny_config(**{"train.find_lr": True, "data.train": str(tmp_path / "other.txt")}), tiny_run)
