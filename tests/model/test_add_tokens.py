"""Control tokens that a recipe adds to a model that is there: their rows, what is trained, what others open."""

import json

import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core.errors import UsageError
from gptworks.model import build

NEW = ["<|tool|>", "<|result|>"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [320, 321, 336])
def test_rows_begin_as_the_mean_of_those_in_use_and_nothing_else_changes(tied, rows, tmp_path):
    own = tiny.tokenizer()
    before = tiny.model(vocab_size=rows if rows >= len(own) else len(own), tie_word_embeddings=tied)
    build.save(tmp_path / "m", before, own, {})
    base = build.load(tmp_path / "m")
    known, had = len(own), base.model.config.vocab_size
    tokens = tiny.tokens(2, 9, known)
    logits = base.model.scores(tokens)
    grown = build.with_tokens(base, NEW)
    assert len(grown.tokenizer) == known + 2 and grown.tokenizer.encode(NEW[1], control=True) == [known + 1]
    assert NEW[0] not in base.tokenizer.control_tokens
    assert grown.model.config.vocab_size == max(known + 2, had) == len(grown.model.model.embed_tokens.weight)
    for layer in (grown.model.model.embed_tokens, grown.model.lm_head):
        assert layer.weight.requires_grad
        assert (layer.weight[known:] == layer.weight[:known].mean(0)).all()
    assert (grown.model.lm_head.weight is grown.model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        found = grown.model.scores(tokens)
    torch.testing.assert_close(found[..., :known], logits[..., :known])
    torch.testing.assert_close(found[..., known], logits[..., :known].mean(-1))


def test_tokens_beyond_the_rows_get_rows_too(tmp_path):
    own = tiny.tokenizer()
    beyond = own.with_control(["<|beyond|>"])
    build.save(tmp_path / "m", tiny.model(vocab_size=len(own)), beyond, {})
    base = build.load(tmp_path / "m")
    before = base.model.lm_head.weight.clone()
    grown = build.with_tokens(base, NEW)
    weight = grown.model.lm_head.weight
    assert len(weight) == len(grown.tokenizer) == len(own) + 3
    assert (weight[: len(own)] == before).all() and (weight[len(own) :] == before.mean(0)).all()


def test_a_run_records_them_resumes_and_its_model_opens_elsewhere(tmp_path):
    transformers = pytest.importorskip("transformers")
    build.save(tmp_path / "base", tiny.model(vocab_size=len(tiny.tokenizer())), tiny.tokenizer(), {})
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(4000))
    asked = [f"model={tmp_path / 'base'}", f"model.add_tokens={json.dumps(NEW)}", f"data.train={text}",
             "train.context=16", "train.batch_tokens=64", "train.checkpoint_every=2"]  # fmt: skip
    config = configuration.load(None, [*asked, "train.max_steps=2"])
    lifecycle.train(config, tmp_path / "run")
    config = configuration.load(None, [*asked, "train.max_steps=4"])
    lifecycle.train(config, tmp_path / "run")
    size = len(tiny.tokenizer())
    loaded = build.load(tmp_path / "run" / "model")
    assert loaded.lineage["config"]["model"]["add_tokens"] == NEW and len(loaded.tokenizer) == size + 2
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert theirs.encode(NEW[0] + "a", add_special_tokens=False)[0] == size and model.config.vocab_size == size + 2
    ids = torch.tensor([[size, 1, size + 1, 2]])
    torch.testing.assert_close(model(ids).logits, loaded.model.scores(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "tokens, why", [([""], "blank"), (["<|endoftext|>"], "there already"), (["x", "x"], "already")]
)
def test_a_token_that_cannot_be_added_is_refused(tokens, why):
    with pytest.raises(UsageError, match=why):
        tiny.tokenizer().with_control(tokens)


@pytest.mark.parametrize("asked", [["model.add_tokens=[a]"], ["model=x", "adapter=lora", "model.add_tokens=[a]"]])
def test_they_go_into_a_whole_model(asked):
    with pytest.raises(UsageError, match="whole model of model.path"):
        configuration.load(None, asked)
