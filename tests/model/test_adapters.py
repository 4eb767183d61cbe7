"""Adapters and low-bit weights against PEFT, on transformers' own models, whichever of the two wrote the folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_families import TOLERANCE, VOCAB, opened

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core.config import Adapter
from gptworks.core.errors import DataError, RunMismatch, UsageError
from gptworks.data.tokenizer import Tokenizer
from gptworks.exporting import onnx
from gptworks.model import adapters, build, kernels, lowbit, peft
from gptworks.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

# One of each way in which names and matrices map: as they are, one after the other, by head, gate and up joined.
FAMILIES = ["qwen3-upper-layers", "gpt_neox", "phi3", "gemma2"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "alpha": 3.0},
    "dora": {"use_dora": True},
    "queries-and-values": {"target_modules": ["q_proj", "v_proj"]},
    "dora-values": {"use_dora": True, "target_modules": ["v_proj", "down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def their_peft() -> Any:
    """PEFT, imported where a test wants it: that takes two seconds, and the collecting process does without."""
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([tiny.text(20_000)], VOCAB, "qwen2")


def settings(**values: Any) -> Adapter:
    return Adapter.model_validate({"kind": "lora", "rank": 3, "alpha": 5.0, **values})


def moved(model: Transformer) -> Transformer:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.scores(ids)


def their_gpt2(tokenizer: Tokenizer, folder: Path) -> tuple[Any, build.Loaded]:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model, build.load(folder)


def base_of(name: str, tokenizer: Tokenizer, folder: Path) -> tuple[Any, build.Loaded]:
    return their_gpt2(tokenizer, folder) if name == "gpt2" else opened(name, tokenizer, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", *FAMILIES])
def test_peft_opens_what_we_write_with_the_same_logits(name, kind, tokenizer, tmp_path, their_peft):
    theirs, base = base_of(name, tokenizer, tmp_path / "base")
    adapter, ids = settings(**KINDS[kind]), tiny.tokens(2, 20, VOCAB)
    model = moved(adapters.attach(base.model, adapter, seed=1))
    build.save_adapter(tmp_path / "adapter", model, adapter, base, {})
    read = their_peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = read(ids).logits
    ours = logits(model, ids)
    assert (ours - want).abs().max() <= TOLERANCE
    assert (ours - logits(base.model, ids)).abs().max() > 0.01
    again = build.load(tmp_path / "adapter")
    assert again.base == tmp_path / "base" and again.adapter is not None
    assert (logits(again.model, ids) - want).abs().max() <= TOLERANCE
    assert (logits(adapters.merge(again.model), ids) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["gpt2", *FAMILIES])
def test_what_peft_writes_opens_with_the_same_logits(name, dora, tokenizer, tmp_path, their_peft):
    theirs, base = base_of(name, tokenizer, tmp_path / "base")
    config = their_peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=dora,
                                   init_lora_weights=False, alpha_pattern={"v_proj": 2.0})  # fmt: skip
    torch.manual_seed(3)
    adapted = their_peft.get_peft_model(theirs, config).eval()
    for parameter_name, parameter in adapted.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data.mul_(1.3)
    ids = tiny.tokens(2, 20, VOCAB)
    with torch.no_grad():
        want = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(raw))
    ours = build.load(tmp_path / "adapter")
    assert (logits(ours.model, ids) - want).abs().max() <= TOLERANCE
    rewritten, tensors = peft.write(ours.model, ours.adapter or settings(), str(tmp_path / "base"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(rewritten))
    save_file(tensors, tmp_path / "second" / "adapter_model.safetensors")
    assert (logits(build.load(tmp_path / "second").model, ids) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_peft(dora, fused, tokenizer, tmp_path, monkeypatch, their_peft):
    monkeypatch.setattr(kernels, "FUSED", fused)
    theirs, base = opened("llama-llama3", tokenizer, tmp_path / "base")
    adapter, ids = settings(use_dora=dora), tiny.tokens(2, 20, VOCAB)
    model = moved(adapters.attach(base.model, adapter, seed=1))
    build.save_adapter(tmp_path / "adapter", model, adapter, base, {})
    read = their_peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    read(ids).logits.square().sum().backward()
    model.scores(ids).square().sum().backward()
    wanted = {name: p.grad for name, p in read.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(wanted) == 3 * 7 * (3 if dora else 2)
    for name, gradient in found.items():
        layer, leaf = name.rsplit(".", 1)
        suffix = "lora_magnitude_vector.default.weight" if leaf == "magnitude" else f"{leaf}.default.weight"
        want = wanted[f"base_model.model.{layer}.{suffix}"]
        assert torch.allclose(gradient, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())), name


def test_a_fresh_adapter_changes_nothing_and_seeds_differ(tokenizer, tmp_path):
    _, base = opened("gemma2", tokenizer, tmp_path)
    ids = tiny.tokens(1, 9, VOCAB)
    one, two, other = (adapters.attach(base.model, settings(use_dora=True), seed) for seed in (1, 1, 2))
    assert (logits(one, ids) - logits(base.model, ids)).abs().max() <= 1e-5
    a, b, c = (next(iter(adapters.adapters(m).values())).lora_A for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


# -- low-bit weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 70, 7])
@pytest.mark.parametrize("name", lowbit.SCHEMES)
def test_each_value_is_the_nearest_that_its_scale_has(name, columns):
    how, weight = lowbit.scheme(name), torch.randn(9, columns, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    codes, scales = lowbit.quantize(weight, how)
    made = lowbit.dequantize(codes, scales, how, columns, torch.float32)
    group = how.group or columns
    levels = how.decode(torch.arange(2**how.bits, dtype=torch.uint8)[None])[0]
    levels = levels[levels.abs() <= how.top]
    for row in range(9):
        for column in range(columns):
            scale = float(scales[row, column // group])
            best = float((levels * scale - weight[row, column]).abs().min())
            assert abs(float(made[row, column] - weight[row, column])) <= best + 1e-6
    assert codes.numel() * codes.element_size() == 9 * -(-columns * how.bits // 8)
    assert not made[3].any()


def test_nf4_codes_are_those_of_bitsandbytes():
    """With its 32-bit scales; ours have 16."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = lowbit.quantize(weight, replace(lowbit.NORMAL4, scale_dtype=torch.float32))
    high, low = codes & 15, codes >> 4  # which of the two comes first is another matter
    assert torch.equal((high << 4 | low).flatten(), packed.flatten())
    assert torch.equal(scales.flatten(), state.absmax)


@pytest.mark.parametrize("name", lowbit.SCHEMES)
def test_gradients_go_through_low_bit_weights_as_through_what_they_stand_for(name, tokenizer, tmp_path):
    _, base = opened("phi3", tokenizer, tmp_path)
    ids = tiny.tokens(2, 20, VOCAB)
    model = moved(adapters.attach(base.model, settings(base=name), seed=1))
    assert {type(layer) for layer in model.modules()} >= {lowbit.LowBitLinear}
    plain = adapters.merge(model)
    same = adapters.attach(adapters.merge(adapters.attach(base.model, settings(base=name), 1)), settings(), 1)
    for ours, theirs in zip(adapters.adapters(model).values(), adapters.adapters(same).values(), strict=True):
        theirs.load_state_dict({n: v for n, v in ours.state_dict().items() if "lora" in n}, strict=False)
    assert (logits(model, ids) - logits(plain, ids)).abs().max() <= TOLERANCE
    for each in (model, same):
        each.scores(ids).square().sum().backward()
    for ours, theirs in zip(adapters.adapters(model).values(), adapters.adapters(same).values(), strict=True):
        for got, want in ((ours.lora_A.grad, theirs.lora_A.grad), (ours.lora_B.grad, theirs.lora_B.grad)):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


# -- whole runs --------------------------------------------------------------------------------------------------


def asked(text: Path, base: Path, **values: Any) -> Any:
    usual = {
        "data.train": str(text), "model.path": str(base), "adapter.kind": "lora", "adapter.rank": 4,
        "train.optimizer": "adamw", "train.lr": 1e-2, "train.context": 48, "train.batch_tokens": 480,
        "train.max_steps": 8, "train.checkpoint_every": 4, "train.threads": 1, "train.precision": "fp32",
        "train.tensorboard": False,
    }  # fmt: skip
    return configuration.load(None, usual | values)


@pytest.mark.parametrize("base_form", ["fp32", "nf4"])
def test_a_run_trains_adapters_alone_resumes_replays_and_merges(base_form, tokenizer, tiny_text, tmp_path):
    opened("mistral", tokenizer, tmp_path / "base")
    config = asked(tiny_text, tmp_path / "base", **{"adapter.base": base_form})
    result = lifecycle.train(config, tmp_path / "run")
    assert result["trained_parameters"] == sum(
        value.numel() for value in load_file(tmp_path / "run" / "model" / "adapter_model.safetensors").values()
    )
    held = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    assert held and all("lora_" in name for name in held)
    assert lifecycle.verify(tmp_path / "run")["identical"]
    text = str(tmp_path / "run" / "data" / "validation.jsonl")
    before, after = (lifecycle.evaluate(tmp_path / place, text, context=48) for place in ("base", "run/model"))
    assert after["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-5)
    assert after["loss"] < before["loss"] - 0.1
    merged = lifecycle.merge(tmp_path / "run" / "model", tmp_path / "whole")
    assert abs(merged["difference_bits_per_byte"]) < 1e-4
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    ids = tiny.tokens(2, 20, VOCAB)
    with torch.no_grad():
        assert (whole(ids).logits - logits(build.load(tmp_path / "run" / "model").model, ids)).abs().max() <= TOLERANCE

    further = lifecycle.train(asked(tiny_text, tmp_path / "run" / "model"), tmp_path / "further")
    assert further["eval"]["loss"] < result["eval"]["loss"]
    assert build.load(tmp_path / "further" / "model").base == tmp_path / "base"
    with pytest.raises(UsageError, match="adapter=lora"):
        lifecycle.train(asked(tiny_text, tmp_path / "run" / "model", **{"adapter.kind": None, "adapter.rank": 16}),
                        tmp_path / "refused")  # fmt: skip

    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, tmp_path / "base" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(DataError, match="other weights"):
        build.load(tmp_path / "run" / "model")
    with pytest.raises(RunMismatch, match="other weights"):
        lifecycle.train(asked(tiny_text, tmp_path / "base", **{"adapter.base": base_form, "train.max_steps": 12}),
                        tmp_path / "run")  # fmt: skip


def test_a_merge_that_loses_is_refused_and_leaves_nothing(tokenizer, tiny_text, tmp_path):
    _, base = opened("mistral", tokenizer, tmp_path / "base")
    adapter = settings()
    model = moved(adapters.attach(base.model, adapter, 1))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(3)
    build.save_adapter(tmp_path / "adapter", model, adapter, base, {})
    with pytest.raises(UsageError, match="--lossy"):
        lifecycle.merge(tmp_path / "adapter", tmp_path / "whole", data=str(tiny_text), dtype="float16")
    assert not (tmp_path / "whole").exists()
    found = lifecycle.merge(tmp_path / "adapter", tmp_path / "whole", data=str(tiny_text), dtype="float16", lossy=True)
    assert found["difference_bits_per_byte"] != 0
    assert load_file(tmp_path / "whole" / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    with pytest.raises(UsageError, match="has no adapter"):
        lifecycle.merge(tmp_path / "base", tmp_path / "other", data=str(tiny_text))
    with pytest.raises(UsageError, match="--data"):
        lifecycle.merge(tmp_path / "adapter", tmp_path / "other")


def test_frozen_parameters_keep_their_values_and_a_pattern_without_any_is_refused(tokenizer, tiny_text, tmp_path):
    _, base = opened("mistral", tokenizer, tmp_path / "base")
    frozen = {"adapter.kind": None, "adapter.rank": 16, "train.freeze": ["*.mlp.*", "model.embed_tokens.*"]}
    lifecycle.train(asked(tiny_text, tmp_path / "base", **frozen), tmp_path / "run")
    after = dict(build.load(tmp_path / "run" / "model").model.named_parameters())
    kept = {name for name, value in base.model.named_parameters() if torch.equal(value, after[name])}
    assert kept == {name for name in after if ".mlp." in name or "embed_tokens" in name}
    assert lifecycle.verify(tmp_path / "run")["identical"]
    with pytest.raises(UsageError, match="no parameter matches"):
        lifecycle.train(asked(tiny_text, tmp_path / "base", **frozen | {"train.freeze": ["*.ffn.*"]}), tmp_path / "x")
    with pytest.raises(UsageError, match="nothing to train"):
        lifecycle.train(asked(tiny_text, tmp_path / "base", **frozen | {"train.freeze": ["*"]}), tmp_path / "x")


# -- where the base is -------------------------------------------------------------------------------------------


@pytest.fixture
def project(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with a base in b/model and an adapter for it, as a run writes it, in l/model."""
    _, base = opened("mistral", tokenizer, tmp_path / "project" / "b" / "model")
    lineage = {"parents": [{"path": "b", "sha256": base.weights_sha256}], "config": {"adapter": {"base": "fp32"}}}
    model = moved(adapters.attach(base.model, settings(), 1))
    build.save_adapter(tmp_path / "project" / "l" / "model", model, settings(), base, lineage)
    return tmp_path / "project"


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_base_that_moved_with_its_adapter_is_found_and_one_that_moved_alone_may_be_named_anew(project, tmp_path):
    ids = tiny.tokens(1, 9, VOCAB)
    want = logits(build.load(project / "l" / "model").model, ids)
    (project / "b").rename(tmp_path / "elsewhere")
    adapter = project / "l" / "model"
    with pytest.raises(DataError, match="set base_model_name_or_path"):
        build.load(adapter)
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "elsewhere" / "model"))
    assert torch.equal(logits(build.load(adapter).model, ids), want)
    assert "adapter_config.json, which may be edited" in lifecycle.verify(adapter).verdict
    (tmp_path / "elsewhere").rename(project / "elsewhere")
    renamed = project.rename(tmp_path / "renamed")
    assert torch.equal(logits(build.load(renamed / "l" / "model").model, ids), want)
    assert build.load(renamed / "l" / "model").base == renamed / "elsewhere" / "model"


def test_of_a_copied_project_whose_original_changed_the_base_with_the_weights_counts(project, tokenizer, tmp_path):
    shutil.copytree(project, tmp_path / "copy")
    their_gpt2(tokenizer, project / "b" / "model")
    assert build.load(tmp_path / "copy" / "l" / "model").base == tmp_path / "copy" / "b" / "model"
    with pytest.raises(DataError, match="trained on other weights"):
        build.load(project / "l" / "model")


@pytest.mark.parametrize("values", [{"lora_alpha": 7.0}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_what_an_adapter_counts_by_may_not_be_edited(values, project):
    adapter = project / "l" / "model"
    rewrite(adapter / "adapter_config.json", **values)
    for reading in (build.load, lifecycle.verify, lambda path: lifecycle.push(path, "me/mine")):
        with pytest.raises(DataError, match=f"{next(iter(values))} is .*only base_model_name_or_path and revision"):
            reading(adapter)


def test_a_run_goes_on_beside_a_base_that_moved_and_none_with_other_weights(tiny_text, tokenizer, tmp_path):
    opened("mistral", tokenizer, tmp_path / "base")
    one = {"train.max_steps": 1, "train.checkpoint_every": 1}
    lifecycle.train(asked(tiny_text, tmp_path / "base", **one), tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "moved")
    two = {"train.max_steps": 2, "train.checkpoint_every": 1}
    result = lifecycle.train(asked(tiny_text, tmp_path / "moved", **two), tmp_path / "run")
    assert result.steps == 2 and lifecycle.verify(tmp_path / "run").identical
    their_gpt2(tokenizer, tmp_path / "base")
    with pytest.raises(RunMismatch, match="model.path"):
        lifecycle.train(asked(tiny_text, tmp_path / "base", **two), tmp_path / "run")


# -- what spells a text ------------------------------------------------------------------------------------------


def test_our_adapters_have_tokenizer_and_template_that_transformers_opens(tokenizer, tmp_path, their_peft):
    base = tmp_path / "base"
    their_gpt2(tokenizer, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    rewrite(base / "tokenizer_config.json", tokenizer_class=None)
    loaded = build.load(base)
    build.save_adapter(tmp_path / "adapter", adapters.attach(loaded.model, settings(), 1), settings(), loaded, {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert theirs("the king sang")["input_ids"] == tokenizer.encode("the king sang")
    assert theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"
    model = their_peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == VOCAB


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.mark.parametrize("files", [("config",), ("config", "tokenizer"), ("jinja",), ()])
def test_an_adapters_own_tokenizer_files_count_and_merge_and_exports_carry_them(files, tokenizer, tmp_path):
    """Beside a base with a template and an end of its own."""
    base, adapter = tmp_path / "base", tmp_path / "run" / "model"
    their_gpt2(tokenizer, base)
    rewrite(base / "tokenizer_config.json", chat_template="base's")
    loaded = build.load(base)
    build.save_adapter(adapter, adapters.attach(loaded.model, settings(), 1), settings(), loaded, {})
    for name in ("manifest.json", "gptworks.json", "tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    if "config" in files:
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
        (adapter / "tokenizer_config.json").write_text(json.dumps(own))
    if "tokenizer" in files:
        shutil.copy(base / "tokenizer.json", adapter)
        (adapter / "generation_config.json").write_text('{"eos_token_id": [7]}')
    if "jinja" in files:
        (adapter / "chat_template.jinja").write_text(TEMPLATE)
    read = build.load(adapter)
    end = "<|im_end|>" if "config" in files else "<|endoftext|>"
    assert read.tokenizer.eos_id == tokenizer.backend.token_to_id(end) and read.tokenizer.eos_id in read.stop_ids
    template = TEMPLATE if files else "base's"
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(400))
    lifecycle.merge(adapter, tmp_path / "merged", data=str(text))
    lifecycle.export(adapter, "gguf", tmp_path / "a.gguf", data=str(text), tokens=20)
    exporter = onnx.ONNX.__new__(onnx.ONNX)
    exporter.loaded = read
    (tmp_path / "onnx").mkdir()
    exporter.copy(tmp_path / "onnx")
    for whole in (tmp_path / "merged", tmp_path / "onnx"):
        theirs = transformers.AutoTokenizer.from_pretrained(whole)
        assert theirs.eos_token == end and theirs.chat_template == template
        ends = json.loads((whole / "generation_config.json").read_text())["eos_token_id"]
        assert (7 in ends if isinstance(ends, list) else False) == ("tokenizer" in files)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == read.tokenizer.eos_id


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"r": "many"}, "r: "),
        ({"lora_alpha": -1}, "lora_alpha: "),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_an_adapter_we_would_compute_otherwise_is_refused(values, says, tokenizer, tmp_path):
    _, base = opened("mistral", tokenizer, tmp_path / "base")
    adapter = settings()
    build.save_adapter(tmp_path / "adapter", adapters.attach(base.model, adapter, 1), adapter, base, {})
    (tmp_path / "adapter" / "gptworks.json").unlink()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(DataError, match="adapter") as error:
        build.load(tmp_path / "adapter")
    assert says in str(error.value)


def test_an_adapter_for_another_model_is_refused(tokenizer, tmp_path):
    adapter = settings()
    for name in ("mistral", "mistral-all-seen", "gpt_neox"):
        _, base = opened(name, tokenizer, tmp_path / name)
        build.save_adapter(tmp_path / f"{name}-adapter", adapters.attach(base.model, adapter, 1), adapter,
                           build.load(tmp_path / "mistral"), {})  # fmt: skip
        (tmp_path / f"{name}-adapter" / "gptworks.json").unlink()
    build.load(tmp_path / "mistral-adapter")
    with pytest.raises(DataError, match="another model: lora_"):
        build.load(tmp_path / "mistral-all-seen-adapter")
    with pytest.raises(DataError, match="another model: a mistral has no layer"):
        build.load(tmp_path / "gpt_neox-adapter")


@pytest.mark.parametrize("held", ["mine.py:SCHEME", "int3", 7, ["nf4"], ...])
def test_what_an_adapter_folder_says_of_its_base_is_not_trusted(held, tokenizer, tmp_path, monkeypatch):
    """Least of all a scheme of its own, which would be code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("open('ran', 'w')")
    _, base = opened("mistral", tokenizer, tmp_path / "base")
    parent = {"path": "base", "sha256": base.weights_sha256}
    lineage = {"parents": [parent], "config": {"adapter": {"base": held}} if held is not ... else None}
    adapter = settings()
    build.save_adapter(tmp_path / "adapter", adapters.attach(base.model, adapter, 1), adapter, base, lineage)
    with pytest.raises(DataError, match="none of ours|not what a training writes"):
        build.load(tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(), (0, 32)])
def test_an_adapter_without_a_rank_is_refused(shape, tokenizer, tmp_path):
    _, base = opened("mistral", tokenizer, tmp_path / "base")
    adapter = settings()
    build.save_adapter(tmp_path / "adapter", adapters.attach(base.model, adapter, 1), adapter, base, {})
    (tmp_path / "adapter" / "gptworks.json").unlink()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    save_file(weights | {name: torch.zeros(shape)}, file)
    with pytest.raises(DataError, match="has no rank"):
        build.load(tmp_path / "adapter")


@pytest.mark.parametrize("pattern, meant", [("q_proj", 64), ("^q_proj", 8), ("self_attn.q_proj$", 64), ("proj", 8)])
def test_a_pattern_of_alphas_matches_as_in_peft(pattern, meant):
    assert peft._by_pattern({pattern: 64}, "model.layers.0.self_attn.q_proj", 8) == meant


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"adapter.target_modules": ["q_prj"]}, "q_proj"),
        ({"adapter.base": "int3"}, "quantization scheme"),
        ({"adapter.kind": None}, "without adapter=lora"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(values, says, tokenizer, tiny_text, tmp_path):
    opened("mistral", tokenizer, tmp_path / "base")
    with pytest.raises(UsageError, match=says):
        lifecycle.train(asked(tiny_text, tmp_path / "base", **values), tmp_path / "run")
