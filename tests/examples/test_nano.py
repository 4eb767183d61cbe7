"""examples/nano.py is the loop in one file: their losses are equal to the last bit where the loop takes the plain forms
of its kernels (tests/model/test_kernels.py compares these with its own)."""

from pathlib import Path

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.model import kernels
from gptworks.training import loop

NANO = Path(__file__).parents[2] / "examples" / "nano.py"
STEPS = 8


def test_nano_gives_the_losses_of_the_loop_exactly(tmp_path, monkeypatch, zygote):
    said = zygote.python(f"import runpy; runpy.run_path({str(NANO)!r})", str(STEPS))
    nano = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step ")]

    losses: list[float] = []
    usual = loop.accumulate

    def recorded(*arguments, **options):
        loss = usual(*arguments, **options)
        losses.append(loss.mean)
        return loss

    monkeypatch.setattr(loop, "accumulate", recorded)
    monkeypatch.setattr(kernels, "FUSED", False)
    overrides = {
        "data.train": "shakespeare", "tokenizer.kind": "char", "model.family": "qwen3", "model.hidden_size": 64,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.intermediate_size": 192,
        "train.context": 64, "train.batch_tokens": 512, "train.max_steps": STEPS, "train.optimizer": "adamw",
        "train.lr": 3e-3, "train.schedule": "cosine", "train.warmup": 0.1, "train.weight_decay": 0.1,
        "train.precision": "fp32", "train.compile": False, "train.tensorboard": False, "train.threads": 1,
        "train.eval_every": STEPS,
    }  # fmt: skip
    lifecycle.train(configuration.load(None, overrides), tmp_path / "run")
    assert len(nano) == STEPS
    assert nano == losses
