"""A folder of ours opens in transformers as the same model, and a folder of transformers opens here as the same."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gptworks.data.shards import Stream
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import score
from gptworks.model import build
from gptworks.model.families import FAMILIES
from gptworks.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCAB, CONTEXT = 320, 48
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tie_word_embeddings": False},
    "gpt2-gelu": {"family": "gpt2", "activation": "gelu"},
    "gpt2-relu": {"family": "gpt2", "activation": "relu", "intermediate_size": 56},
    "gpt2-sinusoidal": {"family": "gpt2", "positions": "sinusoidal"},
    "gpt2-textbook": {"family": "gpt2", "positions": "sinusoidal", "activation": "relu", "tie_word_embeddings": False},
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True},
    "llama-bias": {"family": "llama", "bias": True},
    "llama-grouped": {"family": "llama", "num_key_value_heads": 2, "rope_theta": 500.0},
    "llama-free-head-dim": {"family": "llama", "num_key_value_heads": 1, "head_dim": 12, "bias": True},
    "qwen3": {"family": "qwen3"},
    "qwen3-untied": {"family": "qwen3", "tie_word_embeddings": False},
    "qwen3-grouped": {"family": "qwen3", "num_key_value_heads": 2},
    "qwen3-free-head-dim": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}


def make_model(name: str) -> Transformer:
    return tiny.model(vocab_size=VOCAB, context=CONTEXT, **SHAPES[name])


def make_ids() -> torch.Tensor:
    return tiny.tokens(2, 40, VOCAB)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([tiny.text(20_000)], VOCAB, "qwen2")


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path, tokenizer):
    """Our model, its folder, and what transformers makes of the folder."""
    model = make_model(request.param)
    folder = tmp_path / request.param
    build.save(folder, model, tokenizer, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    return model, folder, theirs.eval()


def test_transformers_gives_the_same_logits_gradients_and_greedy_text(pair, tokenizer):
    model, folder, theirs = pair
    assert type(theirs).__name__ == FAMILIES[model.config.family].architecture
    ids = make_ids()
    ours, other = model.scores(ids), theirs(ids).logits
    assert ours.std() > 0.1  # a comparison of zeros would prove nothing
    assert (ours - other).abs().max() <= TOLERANCE

    F.cross_entropy(ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    converted = FAMILIES[model.config.family].write_weights(gradients, model.config)
    for name, parameter in theirs.named_parameters():
        if model.config.positions == "sinusoidal" and name == "transformer.wpe.weight":
            continue  # fixed here, a parameter there
        assert parameter.grad.abs().max() > 0, name
        assert torch.allclose(converted.pop(name), parameter.grad, rtol=1e-3, atol=1e-5), name
    assert set(converted) <= {"transformer.wpe.weight"}

    prompt = "the king and queen"
    engine = Engine(model, tokenizer, (tokenizer.eos_id,))
    prompt_ids = torch.tensor([engine.prompt_ids(prompt)])
    text = engine.generate(prompt, Sampling(temperature=0), 20)
    answer = theirs.generate(prompt_ids, max_new_tokens=20, do_sample=False)[0, prompt_ids.shape[1] :].tolist()
    ended = [tokenizer.eos_id] if text.finish_reason == "stop" else []
    assert text.tokens + ended == answer
    assert text.text == transformers.AutoTokenizer.from_pretrained(folder).decode(text.tokens)


def test_loading_gives_the_saved_model_and_saving_it_again_identical_tensors(pair, tmp_path, tokenizer):
    model, folder, _ = pair
    loaded = build.load(folder)
    assert loaded.model.config == model.config
    ids = make_ids()
    assert torch.equal(loaded.model.scores(ids), model.scores(ids))
    build.save(tmp_path / "again", loaded.model, loaded.tokenizer, {})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "gpt-2", "char"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_autotokenizer_gives_the_same_ids_and_the_ends_of_text_agree(family, kind, tmp_path):
    text = tiny.text(20_000)
    samples = ["the king's  old stones,\n\n walked 12345\tslowly", " Where?\n"]
    if kind == "char":
        own = Tokenizer.train_characters(set(text) | set("".join(samples)))
    else:
        own = Tokenizer.train_bpe([text], VOCAB, kind)
        samples += ["déjà vu, 红楼梦 🎉 привет", "'Tis x_1 += 2;  "]
    build.save(tmp_path / "m", make_model(family), own, {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for sample in samples:
        assert theirs(sample)["input_ids"] == own.encode(sample)
        assert theirs.decode(own.encode(sample)) == own.decode(own.encode(sample)) == sample
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert own.eos_id is not None
    assert theirs.eos_token_id == config.eos_token_id == generation.eos_token_id == own.eos_id
    assert theirs.pad_token_id == generation.pad_token_id == own.eos_id
    assert config.bos_token_id == generation.bos_token_id
    assert build.load(tmp_path / "m").stop_ids == (own.eos_id,)


TRANSFORMERS_MODELS = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "gpt2-untied": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 40, "tie_word_embeddings": False},
    ),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama-defaults": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-attention-bias": ("Qwen3Config", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}),
}


@pytest.mark.parametrize("name", TRANSFORMERS_MODELS)
def test_a_model_that_transformers_saved_loads_with_the_same_logits(name, tmp_path, tokenizer):
    cls, values = TRANSFORMERS_MODELS[name]
    if cls != "GPT2Config":
        values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "max_position_embeddings": CONTEXT, "rope_theta": 1000.0} | values  # fmt: skip
    torch.manual_seed(1)
    config = getattr(transformers, cls)(vocab_size=VOCAB, initializer_range=0.3, **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    loaded = build.load(tmp_path)
    ids = make_ids()
    assert (loaded.model.scores(ids) - theirs(ids).logits).abs().max() <= TOLERANCE
    assert not loaded.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "qwen3-grouped"])
def test_a_model_in_several_weight_files_loads_as_the_same(name, tmp_path, tokenizer):
    model = make_model(name)
    build.save(tmp_path / "one", model, tokenizer, {})
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(
        tmp_path / "several", max_shard_size="20KB"
    )
    tokenizer.save(tmp_path / "several")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    loaded = build.load(tmp_path / "several").model
    ids = make_ids()
    assert torch.equal(loaded.scores(ids), model.scores(ids))


def test_the_saved_position_table_is_that_of_vaswani_section_3_5_and_comes_back_fixed(tmp_path, tokenizer):
    model = make_model("gpt2-sinusoidal")
    build.save(tmp_path / "m", model, tokenizer, {})
    table = load_file(tmp_path / "m" / "model.safetensors")["transformer.wpe.weight"]
    width = model.config.hidden_size
    assert table.shape == (CONTEXT, width)
    for position in range(CONTEXT):
        for i in range(width // 2):
            angle = position / 10_000 ** (2 * i / width)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    loaded = build.load(tmp_path / "m").model
    assert loaded.config.positions == "sinusoidal"
    assert not any("position" in name for name, _ in loaded.named_parameters())
    learned = make_model("gpt2")
    build.save(tmp_path / "learned", learned, tokenizer, {})
    assert build.load(tmp_path / "learned").model.config.positions == "learned"


def test_dropout_is_written_where_the_class_has_a_key_for_it(tmp_path, tokenizer):
    def written(name: str) -> dict:
        model = make_model(name)
        model.config = model.config.with_dropout(0.25)
        build.save(tmp_path / name, model, tokenizer, {})
        return json.loads((tmp_path / name / "config.json").read_text())

    gpt2 = written("gpt2")
    assert [gpt2[key] for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [0.25] * 3
    assert build.load(tmp_path / "gpt2").model.config.residual_dropout == 0.25
    assert build.load(tmp_path / "gpt2", dropout=0.5).model.config.embed_dropout == 0.5
    for name in ("llama", "qwen3"):
        assert written(name)["attention_dropout"] == 0.25
        assert build.load(tmp_path / name).model.config.attention_dropout == 0.25


@pytest.fixture
def larger_data() -> Path:
    if "GPTWORKS_DATA" not in os.environ:
        pytest.skip("GPTWORKS_DATA is not set: it names the folder with the larger data")
    folder = Path(os.environ["GPTWORKS_DATA"])
    if not (folder / "stories260K" / "hf").is_dir():
        pytest.skip(f"{folder} has no stories260K/hf")
    return folder


def test_a_trained_model_scores_its_stories_as_documented(larger_data):
    """Stories 1,000 to 1,059, each after a start token and cut at 512 tokens."""
    loaded = build.load(larger_data / "stories260K" / "hf")
    text = (larger_data / "tinystories" / "tinystories_2mb.txt").read_text(encoding="utf-8")
    nats, tokens = 0.0, 0
    for story in text.split("<|endoftext|>")[1000:1060]:
        ids = np.array([loaded.tokenizer.bos_id, *loaded.tokenizer.encode(story.strip())][:512])
        found = score(loaded.model, Stream(ids, np.zeros(1, dtype=np.int64), 1), 512)
        nats, tokens = nats + found.loss * found.tokens, tokens + found.tokens
    assert tokens == 20_235
    assert nats / tokens == pytest.approx(1.25565, abs=1e-5)


def test_a_trained_model_continues_its_story_as_documented(larger_data):
    folder = larger_data / "stories260K" / "hf"
    loaded = build.load(folder)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.stop_ids)
    text = engine.generate("Once upon a time", Sampling(temperature=0), 60)
    assert text.text.startswith(", there was a little girl named Lily.")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([engine.prompt_ids("Once upon a time")])
    assert (loaded.model.scores(ids) - theirs(ids).logits).abs().max() <= TOLERANCE
    answer = theirs.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer[: len(text.tokens)] == text.tokens


def test_code_beside_a_class_that_we_know_is_left_alone_here_and_in_transformers(tmp_path, tokenizer):
    model = make_model("llama")
    build.save(tmp_path / "model", model, tokenizer, {})
    for name in ("manifest.json", "gptworks.json"):
        (tmp_path / "model" / name).unlink()
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model" / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    ids = make_ids()
    ours, theirs = (
        build.load(tmp_path / "model").model,
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    )
    assert type(theirs) is transformers.LlamaForCausalLM
    assert (ours.scores(ids) - theirs(ids).logits).abs().max() <= TOLERANCE
    assert not (tmp_path / "ran").exists()
