"""A run folder that version 0.1.0 left at step 12 of 16 is opened, continued and finished by the code of today."""

import json
import shutil
from pathlib import Path

import pytest

from gptworks import lifecycle
from gptworks.core import config as configuration

FIXTURE = Path(__file__).parent.parent / "fixtures" / "run_of_0.1.0"
ASKED = {
    "data.train": "tiny.txt", "data.separator": ". ", "data.mask_documents": True, "tokenizer.kind": "bytes",
    "model.family": "qwen3", "model.hidden_size": 16, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
    "train.precision": "fp32", "train.context": 32, "train.batch_tokens": 256, "train.checkpoint_every": 4,
    "train.eval_every": 4, "train.log_every": 1, "train.threads": 1, "train.tensorboard": False, "train.ema": 0.9,
    "train.patience": 6, "generate.max_new_tokens": 8, "train.max_steps": 16, "train.lr": 0.01,
}  # fmt: skip
LOSSES = {13: 3.8830635703807315, 14: 3.8167252974076704, 15: 3.756522831954355, 16: 3.7493117260838686}
EVALUATED = 3.775032005099468


def test_a_run_of_an_earlier_version_continues_to_the_losses_it_would_have_had(tmp_path):
    out = tmp_path / "run"
    shutil.copytree(FIXTURE, out)
    result = lifecycle.train(configuration.load(None, ASKED), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=2e-6)
    assert result["eval"]["loss"] == pytest.approx(EVALUATED, rel=2e-6)
    assert result["steps"] == 16 and result["changes"] == ["train.max_steps=16, was 8; train.lr=0.01"]
    assert lifecycle.verify(out)["identical"]
