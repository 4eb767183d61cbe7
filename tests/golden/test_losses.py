"""Full-precision losses of a tiny fixed run: whatever moves them changed the training, on purpose or not.

They agree to rounding between processors, not to the bit. After a change that is meant to move them, print new ones:
PYTHONPATH=tests python tests/golden/test_losses.py
"""

import pytest
import tiny

GOLDEN = {
    "muon": [3.462496808950337, 3.429141402244568, 3.376970648765564, 3.301943311504289,
             3.264959644423172, 3.181033047762784, 3.16799795627594, 3.158318796465474],
    "adamw": [3.5003411384044347, 3.4365932941436768, 3.355335831642151, 3.2665536917892157,
              3.240567414656929, 3.1486491053557595, 3.152258038520813, 3.1431161203692035],
    "sgd": [3.489887538292596, 3.4505510330200195, 3.3573756217956543, 3.28076171875,
            3.2145349555335967, 3.0384877102434142, 3.0670008659362793, 2.9767425290999876],
}  # fmt: skip
PARTS = {
    "muon": {"family": "qwen3", "num_key_value_heads": 2},
    "adamw": {"family": "gpt2", "positions": "sinusoidal", "activation": "relu", "tie_word_embeddings": False},
    "sgd": {"family": "llama", "bias": True},
}
SETTINGS = {
    "muon": {"lr": 0.02, "schedule": "wsd"},
    "adamw": {"lr": 3e-3, "schedule": "cosine", "l2": 1e-3},
    "sgd": {"lr": 0.05, "schedule": "linear", "l1": 1e-4},
}


def losses(optimizer: str) -> list[float]:
    train = tiny.settings(optimizer=optimizer, **SETTINGS[optimizer])
    found: list[float] = []
    state = tiny.state(train, **PARTS[optimizer])
    tiny.run(
        state, train, 8, total=8, micro_batch=4, loader=tiny.loader(mask_documents=True),
        hooks=[lambda s, m: found.append(m.loss)],
    )  # fmt: skip
    return found


@pytest.mark.parametrize("optimizer", GOLDEN)
def test_losses_are_the_recorded_ones(optimizer):
    assert losses(optimizer) == pytest.approx(GOLDEN[optimizer], rel=2e-6)


if __name__ == "__main__":
    import pprint

    tiny.torch.set_num_threads(1)
    pprint.pprint({name: losses(name) for name in GOLDEN}, width=115, sort_dicts=False)
