"""Every family against transformers' class of it, five ways: logits, loss, gradients, greedy text, the folder again.

Models are tiny and random in every parameter, so that no norm hides behind a one and no bias behind a zero. Windows and
first contexts are far shorter than the sequences.
"""

import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import gptworks
from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core.config import Train
from gptworks.core.errors import DataError
from gptworks.data.batch import Batch
from gptworks.data.tokenizer import Tokenizer
from gptworks.infer.engine import Engine
from gptworks.infer.sampling import Sampling
from gptworks.infer.scoring import token_losses
from gptworks.model import build
from gptworks.model.attention import KeyValueCache
from gptworks.model.config import ModelConfig, parameter_count
from gptworks.model.families import FAMILIES, from_hf_config
from gptworks.model.transformer import Transformer
from gptworks.training.objectives import NextToken

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCAB, CONTEXT, WINDOW = 320, 64, 5
USUAL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 60}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}  # so that a ramp spans channels


def rope(**numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **numbers}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("llama", GROUPED | rope(rope_type="linear", factor=3.0)),
    "llama-dynamic": ("llama", rope(rope_type="dynamic", factor=2.0)),
    "llama-llama3": ("llama", GROUPED | rope(**LLAMA3) | {"tie_word_embeddings": True}),
    "llama-yarn": ("llama", rope(**YARN)),
    "llama-yarn-mscale": ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=0.3, truncate=False, beta_fast=20.0)),
    "llama-yarn-factor": ("llama", rope(**YARN, attention_factor=0.8, beta_fast=8, beta_slow=4) | {"mlp_bias": True}),
    "mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "mistral-all-seen": ("mistral", {"num_key_value_heads": 1, "head_dim": 12, "sliding_window": None}),
    "mistral-tied": ("mistral", GROUPED | {"sliding_window": 4096, "tie_word_embeddings": True}),
    "mistral-yarn": ("mistral", GROUPED | {"sliding_window": WINDOW} | rope(**YARN)),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-upper-layers": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW,
                                               "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-listed-layers": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": WINDOW,
                                      "layer_types": MIXED}),
    "qwen2-yarn": ("qwen2", GROUPED | rope(**YARN)),
    "qwen3-upper-layers": ("qwen3", GROUPED | {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW,
                                               "max_window_layers": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-in-turn": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt_neox-half-rotary": ("gpt_neox", {"hidden_act": "gelu_fast", "attention_bias": False, "rotary_pct": 0.5,
                                          "rotary_emb_base": 500}),
    "gpt_neox-linear": ("gpt_neox", rope(rope_type="linear", factor=2.0, partial_rotary_factor=1.0)),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe-dense-layers": ("qwen3_moe", EXPERTS | {"num_key_value_heads": 4, "head_dim": 12, "attention_bias": True,
                                                      "mlp_only_layers": [1], "tie_word_embeddings": True}),
    "qwen3_moe-window": ("qwen3_moe", GROUPED | EXPERTS | {"use_sliding_window": True, "sliding_window": WINDOW}),
    "qwen3_moe-every-second": ("qwen3_moe", GROUPED | EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "mixtral-one": ("mixtral", {"num_key_value_heads": 4, "num_local_experts": 3, "num_experts_per_tok": 1,
                                "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-grouped": ("olmo2", GROUPED | {"attention_bias": True, "tie_word_embeddings": True} | rope(**YARN)),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 12, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
                                    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": WINDOW,
                                  "attn_logit_softcapping": None, "final_logit_softcapping": None,
                                  "tie_word_embeddings": False}),
    "gemma2-bias": ("gemma2", {"num_key_value_heads": 4, "head_dim": 8, "sliding_window": 4096, "attention_bias": True,
                               "layer_types": MIXED[::-1], "attn_logit_softcapping": 1.0}),
    "gemma3": ("gemma3_text", GROUPED | {"head_dim": 12, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
                                         "layer_types": MIXED}),
    "gemma3-pattern": ("gemma3_text", GROUPED | {"head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "gemma3-linear": ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": WINDOW,
                                      "layer_types": MIXED, "tie_word_embeddings": False, "attention_bias": True,
                                      "final_logit_softcapping": 3.0, "rope_parameters": {
                                          "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                                          "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "phi3": ("phi3", GROUPED | {"sliding_window": WINDOW}),
    "phi3-half-rotary": ("phi3", {"tie_word_embeddings": True} | rope(rope_type="default", partial_rotary_factor=0.5)),
}  # fmt: skip
# Written by us otherwise than by transformers, and what is then computed is the same.
APART = {
    "initializer_range",  # of a fresh model
    "bos_token_id", "eos_token_id",  # the tokenizer's
    "max_window_layers",  # layer_types says it too
    "transformers_version", "_name_or_path", "architectures", "dtype", "_sliding_window_pattern",
    "sliding_window_pattern",  # the same
    "original_max_position_embeddings",  # of Phi-3, where longrope alone reads it
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([tiny.text(20_000)], VOCAB, "qwen2")


def theirs_of(name: str, tokenizer: Tokenizer) -> Any:
    kind, values = CASES[name]
    config = transformers.CONFIG_MAPPING[kind](
        **(USUAL | {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} | values)
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def opened(name: str, tokenizer: Tokenizer, folder: Path) -> tuple[Any, build.Loaded]:
    """Their model, and what we make of its folder."""
    theirs = theirs_of(name, tokenizer)
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    return theirs, build.load(folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, tokenizer):
    """Read only: the tests of one case share it."""
    folder = tmp_path_factory.mktemp("theirs")
    theirs, loaded = opened(request.param, tokenizer, folder)
    return theirs, folder, loaded


def test_logits_loss_gradients_and_greedy_text_are_those_of_transformers(pair):
    theirs, _, loaded = pair
    ours, ids = loaded.model, tiny.tokens(2, 41, VOCAB)
    assert type(theirs).__name__ == FAMILIES[ours.config.family].architecture
    logits = ours.scores(ids)
    assert logits.std() > 0.1  # a comparison of zeros would prove nothing
    assert (logits - theirs(ids).logits).abs().max() <= TOLERANCE

    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 40))
    loss = NextToken(Train(router_aux_loss=0)).loss(ours, batch).sum / 80
    loss.backward()
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert token_losses(ours, batch).mean().item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    converted = FAMILIES[ours.config.family].write_weights(gradients, ours.config)
    for parameter_name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, parameter_name
        for name, gradient in on_disk(parameter_name, parameter.grad, theirs.config.model_type).items():
            assert torch.allclose(converted.pop(name), gradient, rtol=1e-3, atol=1e-5), name
    assert not converted

    engine = Engine(ours, loaded.tokenizer, ())
    prompt = engine.prompt_ids("the king and queen")
    text = engine.generate("the king and queen", Sampling(temperature=0), 6 * WINDOW)
    answer = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=6 * WINDOW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert text.tokens == answer[0, len(prompt) :].tolist()


def said(raw: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says, where it may say the same in two ways."""
    found = {key: value for key, value in raw.items() if key not in APART}
    if found.get("head_dim") is None:
        found["head_dim"] = raw.get("hidden_size", 0) // raw.get("num_attention_heads", 1)
    if "mlp_only_layers" in raw:
        step, dense = found.pop("decoder_sparse_step"), found.pop("mlp_only_layers")
        found["dense"] = [n for n in range(raw["num_hidden_layers"]) if n in dense or (n + 1) % step]
    return found


def on_disk(name: str, value: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What of a parameter, or its gradient, is in transformers' file: experts are one there, several in the file."""
    if kind == "gpt_neox":
        return {name.replace("lm_head", "embed_out"): value}
    place, _, leaf = name.rpartition(".")
    if kind == "mixtral":
        place = place.replace("mlp", "block_sparse_moe")
    if not place.endswith("experts"):
        return {f"{place}.{leaf}": value}
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[leaf]
    called = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if kind == "mixtral" else {}
    return {
        f"{place}.{expert}.{called.get(part, part)}.weight": piece
        for expert, matrix in enumerate(value)
        for part, piece in zip(names, matrix.chunk(len(names)), strict=True)
    }


def test_the_folder_written_again_is_the_same_model_to_transformers(pair, tmp_path):
    theirs, folder, loaded = pair
    build.save(tmp_path / "ours", loaded.model, loaded.tokenizer, {})
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    ids = tiny.tokens(2, 41, VOCAB)
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    before, after = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "ours"))
    assert said(before) == said(after)
    assert build.load(tmp_path / "ours").model.config == loaded.model.config


def test_the_parameters_are_counted(pair):
    theirs, _, loaded = pair
    assert parameter_count(loaded.model.config) == sum(p.numel() for p in theirs.parameters())
    fresh = build.fresh(loaded.model.config, 1)
    ids = tiny.tokens(1, 41, VOCAB)
    assert fresh(ids).hidden.isfinite().all()


PARTS = (
    "use_parallel_residual", "scale_embedding", "partial_rotary_factor", "rope_scaling", "rope_local_theta",
    "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "norm_topk_prob",
)  # fmt: skip


@torch.no_grad()
def test_what_a_configuration_says_moves_the_logits(pair):
    """Were a part left out, here and there, the comparisons above would not see it."""
    model, ids = pair[2].model, tiny.tokens(2, 41, VOCAB)
    config, known = model.config, {part.name: part for part in fields(ModelConfig)}
    for name in PARTS:
        part = known[name]
        usual = part.default if part.default is not MISSING else part.default_factory()
        longer = name == "layer_types" and (config.sliding_window or 0) > 41  # than the text
        later = name == "rope_scaling" and config.rope_scaling.get("rope_type") == "dynamic"  # than the text
        if getattr(config, name) == usual or longer or later:
            continue
        other = Transformer(replace(config, **{name: usual})).eval()
        other.load_state_dict(model.state_dict())
        assert (other.scores(ids) - model.scores(ids)).abs().max() > 10 * TOLERANCE, name


WINDOWED = ["mistral", "qwen2-upper-layers", "gemma2", "gemma3", "phi3"]


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_reaches_into_the_cache_however_the_tokens_come(name, tokenizer, tmp_path):
    model, ids = opened(name, tokenizer, tmp_path)[1].model, tiny.tokens(2, 32, VOCAB)
    whole = model.scores(ids)
    for cuts in ([1] * 32, [WINDOW] * 6 + [2], [WINDOW - 1, 1, 1, 9, 17], [31, 1]):
        cache = KeyValueCache(3, CONTEXT)
        made = [model.scores(part, cache=cache) for part in ids.split(cuts, dim=1)]
        assert (torch.cat(made, dim=1) - whole).abs().max() < TOLERANCE, cuts


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_ends_where_its_document_begins(name, tokenizer, tmp_path):
    model, ids = opened(name, tokenizer, tmp_path)[1].model, tiny.tokens(2, 32, VOCAB)
    segments = torch.tensor([[0] * 3 + [1] * 17 + [2] * 12, [0] * 20 + [1] * 2 + [2] * 10])
    packed = model.scores(ids, segments=segments)
    for row in range(2):
        for segment in range(3):
            here = segments[row] == segment
            alone = model.scores(ids[row, here][None])
            assert (packed[row, here] - alone[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_sliding_layer_sees_its_window_and_no_further(tokenizer, tmp_path):
    model, ids = opened("mistral", tokenizer, tmp_path)[1].model, tiny.tokens(1, 32, VOCAB)
    other = ids.clone()
    other[0, 3] = (other[0, 3] + 1) % VOCAB
    moved = (model(ids).hidden - model(other).hidden).abs().amax(-1)[0]
    last = 3 + 3 * (WINDOW - 1)  # each of three layers carries it on
    assert moved[:3].max() == 0 and moved[last] > 1e-6 and moved[last + 1 :].max() == 0


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "mistral"])
def test_an_opened_model_is_trained_further_and_opens_there_again(name, tokenizer, tiny_text, tmp_path):
    opened(name, tokenizer, tmp_path / "theirs")
    settings = {
        "data.train": str(tiny_text), "data.mask_documents": True, "model.path": str(tmp_path / "theirs"),
        "train.optimizer": "adamw", "train.lr": 1e-2, "train.context": 48, "train.batch_tokens": 480,
        "train.max_steps": 8, "train.threads": 1, "train.precision": "fp32", "train.tensorboard": False,
    }  # fmt: skip
    lifecycle.train(configuration.load(None, settings), tmp_path / "run", name)
    text = tiny_text.read_text()[:80]
    before, after = gptworks.load(tmp_path / "theirs"), gptworks.load(tmp_path / "run" / "model")
    assert after.loss(text).loss < before.loss(text).loss - 0.5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")
    ids = torch.tensor([[tokenizer.start_id, *tokenizer.encode(text)]])
    assert ids.shape[1] <= CONTEXT
    assert again(ids, labels=ids).loss.item() == pytest.approx(after.loss(text).loss, abs=1e-4)


# -- refusals --------------------------------------------------------------------------------------------------------


def raw_of(kind: str, **values: Any) -> dict[str, Any]:
    """config.json as transformers writes it, with some values changed; ... drops one."""
    usual = USUAL | ({} if kind in ("gpt2", "gpt_neox") else GROUPED)
    made = json.loads(transformers.CONFIG_MAPPING[kind](**usual).to_json_string(use_diff=False)) | values
    return {key: value for key, value in made.items() if value is not ...}


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("llama", rope(rope_type="longrope", factor=2.0), "longrope"),
        ("llama", rope(rope_type="axial"), "axial"),
        ("llama", rope(rope_type=["yarn"]), "config.json"),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ("llama", rope(rope_type="default", mrope_section=[2, 2]), "mrope_section"),
        ("llama", rope(rope_type="linear"), "lack factor"),
        ("llama", rope(rope_type="linear", factor="2"), "factor 2; it must be a number"),
        ("llama", rope(rope_type="linear", factor=0), "factor 0"),
        ("llama", rope(rope_type="llama3", factor=2.0, low_freq_factor=4, high_freq_factor=4), "high_freq_factor"),
        ("llama", rope(**YARN, truncate=1), "truncate"),
        ("llama", {"rope_parameters": {"rope_theta": 0.5, **YARN}}, "rope_theta above 1"),
        ("llama", {"rope_parameters": {"rope_theta": -1, "rope_type": "default"}}, "rope_theta -1"),
        ("llama", rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping 0.0; it must be above 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"sliding_window": 128}, "sliding_window"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("mistral", {"layer_types": MIXED}, "layer_types"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("qwen2", {"layer_types": MIXED[:2]}, "layer_types"),
        ("qwen2", {"layer_types": MIXED, "use_sliding_window": False}, "no sliding_window"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window 'yes'"),
        ("gemma2", {"sliding_window": None}, "no sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "sliding layers scale"),
        ("gemma3_text", {"rope_parameters": {"full_attention": YARN}}, "yarn"),
        ("phi3", rope(rope_type="linear", factor=2.0), "linear"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "longrope"),
        ("gpt_neox", rope(rope_type="default", partial_rotary_factor=0.4), "head_dim=8, of which 3 turn"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen2", {"head_dim": 16}, "head_dim 16"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("mamba", {}, "model_type 'mamba'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_we_would_compute_otherwise_is_refused(kind, values, says):
    if kind != "mamba":
        unchanged = raw_of(kind)
        from_hf_config(unchanged)
    with pytest.raises(DataError, match=says) as refused:
        from_hf_config(raw_of(kind, **values))
    assert refused.value.code == 65 and "\n" not in str(refused.value)


ODD = [
    None, True, False, 0, 1, -1, 2**63, 0.5, 1e-300, 1e300, "x", "", [], [1], ["sliding_attention"], {}, {"x": 1},
    {"full_attention": 1}, {"rope_type": "yarn"}, {"rope_theta": "x"}, {"sliding_attention": {"factor": 1}},
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_odd_value_of_any_key_is_read_or_refused(kind):
    raw = raw_of(kind) | dict.fromkeys(("rope_scaling", "rope_theta", "rotary_pct", "sliding_window_pattern"))
    seen: list[ModelConfig] = []
    for key in raw:
        for value in ODD:
            try:
                config = from_hf_config(raw | {key: value})
            except DataError as error:
                assert "\n" not in str(error)
                continue
            if config not in seen and parameter_count(config) < 10**6:
                seen.append(config)
                ids = torch.zeros(1, min(9, config.max_position_embeddings), dtype=torch.int64)
                assert build.fresh(config, 1)(ids).hidden.shape == (*ids.shape, config.hidden_size)


@pytest.mark.parametrize(
    ("kind", "older", "now"),
    [
        ("llama", {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
        ("gpt_neox", {"rope_parameters": ..., "rotary_emb_base": 500, "rotary_pct": 0.5, "attention_bias": ...},
         {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rope_parameters": ...}, {}),
        ("gemma2", {"layer_types": ..., "attention_bias": ..., "rope_parameters": ..., "rope_theta": 10_000.0}, {}),
        ("gemma3_text", {"rope_parameters": ..., "rope_theta": 1e5, "rope_local_base_freq": 300.0, "layer_types": ...,
                         "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
         {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}},
          "layer_types": MIXED}),
        ("gemma3_text", {"rope_parameters": ...}, {}),
        ("gemma2", {"layer_types": ..., "sliding_window_pattern": 6}, {}),
        ("llama", {"original_max_position_embeddings": 32, "rope_parameters": YARN},
         {"rope_parameters": YARN | {"original_max_position_embeddings": 32}}),
        ("mistral", {"num_key_value_heads": ..., "num_attention_heads": 8, "sliding_window": ...},
         {"num_key_value_heads": 8, "num_attention_heads": 8, "sliding_window": 4096}),
    ],
    ids=str,
)  # fmt: skip
def test_files_of_earlier_years_are_read_as_transformers_reads_them(kind, older, now):
    assert from_hf_config(raw_of(kind, **older)) == from_hf_config(raw_of(kind, **now))
    read = transformers.CONFIG_MAPPING[kind].from_dict(raw_of(kind, **older))
    assert from_hf_config(json.loads(read.to_json_string(use_diff=False))) == from_hf_config(raw_of(kind, **older))
