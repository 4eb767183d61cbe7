"""A run ends where it was told to, and says which limit it was."""

import math

import pytest

from gptworks import lifecycle
from gptworks.core import runtime
from gptworks.core.errors import UsageError

BASE = {"train.precision": "fp32", "train.compile": False, "train.max_steps": None, "train.eval_every": 2}


@pytest.fixture
def train(tiny_config, tmp_path):
    return lambda **values: lifecycle.train(tiny_config(**BASE | values), tmp_path / "run")


def test_max_steps(train):
    assert train(**{"train.max_steps": 3})["steps"] == 3


def test_max_tokens_are_never_passed(train):
    result = train(**{"train.max_tokens": 1000, "train.batch_tokens": 256})
    assert result["steps"] == 3 and 256 < result["tokens"] <= 1000


def test_max_epochs_is_so_many_passes_over_every_token(train, tmp_path):
    from gptworks.data.shards import open_shards

    result = train(**{"train.max_epochs": 2, "train.batch_tokens": 2048})
    assert result["tokens"] == 2 * (len(open_shards(tmp_path / "run" / "data").train.tokens) - 1)


def test_a_full_batch_is_one_step_an_epoch(train):
    assert train(**{"train.max_epochs": 2, "train.batch_tokens": "full", "train.checkpoint_every": 1})["steps"] == 2


def test_the_smallest_limit_counts(train):
    assert train(**{"train.max_steps": 2, "train.max_tokens": 10**6, "train.max_epochs": 50})["steps"] == 2


def test_target_loss_ends_the_run_at_an_evaluation(train):
    result = train(**{"train.max_steps": 40, "train.target_loss": 5.5})
    assert result["steps"] < 40 and result["steps"] % 2 == 0
    assert result["eval"]["loss"] <= 5.5 < math.log(300) and "target_loss" in result["stopped"]


def test_no_improvement_ends_the_run(train):
    result = train(**{"train.max_steps": 40, "train.patience": 2, "train.lr": 0.0, "train.adam_lr": 0.0})
    assert result["steps"] == 6 and "patience" in result["stopped"]  # the first evaluation is the best; two more


def test_a_time_budget_that_is_used_up_is_refused(train):
    runtime.restart_clock()
    with pytest.raises(UsageError, match="train.time_budget_s"):
        train(**{"train.time_budget_s": 0.5})
