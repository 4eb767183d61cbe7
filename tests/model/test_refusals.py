"""What cannot be held, and what is damaged, is refused with one line and the right exit code."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from gptworks import lifecycle
from gptworks.core import folder
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.model import build
from gptworks.model.config import DEFAULTS

# -- shapes no class holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"family": "gpt2", "positions": "rotary"}, "model.family=llama can"),
        ({"family": "gpt2", "num_key_value_heads": 2}, "num_key_value_heads below"),
        ({"family": "gpt2", "head_dim": 16}, "head_dim other than"),
        ({"family": "gpt2", "norm": "rmsnorm"}, "norm=rmsnorm"),
        ({"family": "gpt2", "bias": False}, "bias=false"),
        ({"family": "llama", "activation": "relu"}, "activation=relu"),
        ({"family": "llama", "qk_norm": True}, "model.family=qwen3 can"),
        ({"family": "qwen3", "bias": True}, "model.family=llama can"),
        ({"family": "qwen3", "qk_norm": False}, "model.family=llama can"),
        ({"positions": "sinusoidal", "activation": "swiglu"}, "the nearest is model.family="),
        ({"norm": "layernorm", "positions": "rotary"}, "the nearest is model.family="),
        ({"qk_norm": True, "bias": True}, "the nearest is model.family="),
        ({"family": "lama"}, "did you mean 'llama'"),
    ],
    ids=str,
)
def test_a_combination_no_class_holds_is_refused_naming_the_nearest(parts, says):
    with pytest.raises(UsageError, match=says) as refused:
        tiny.shape(**parts)
    assert refused.value.code == 64


def test_the_nearest_that_is_named_can_hold_what_is_left():
    with pytest.raises(UsageError, match="nearest is model.family=(\\w+) without (.*)") as refused:
        tiny.shape(norm="layernorm", positions="rotary", activation="swiglu")
    family, without = str(refused.value).rsplit("model.family=", 1)[1].split(" without ")
    left = {"norm": "layernorm", "positions": "rotary", "activation": "swiglu"}
    for part in without.split(", "):
        left.pop(part.split("=")[0])
    assert tiny.shape(family=family, **left).family == family


@pytest.mark.parametrize("family", DEFAULTS)
def test_parts_alone_find_a_family_that_holds_them(family):
    parts = {name: value for name, value in DEFAULTS[family].items() if name != "norm_eps"}
    experts = {"num_experts": 4} if family == "qwen3_moe" else {}
    assert tiny.shape(**parts, **experts).family == family


@pytest.mark.parametrize(
    "parts",
    [
        {"hidden_size": 30},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"hidden_size": 33, "num_attention_heads": 3, "family": "gpt2", "positions": "sinusoidal"},
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_refused(parts):
    with pytest.raises(UsageError):
        tiny.shape(**parts)


# -- damaged folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path):
    """A folder of ours, with its manifest."""
    build.save(tmp_path / "model", tiny.model(vocab_size=31), tiny.tokenizer(), {})
    return tmp_path / "model"


@pytest.fixture
def foreign(ours):
    """The same without manifest and lineage, as from anywhere else."""
    (ours / "gptworks.json").unlink()
    (ours / "manifest.json").unlink()
    return ours


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def refused(path, says):
    with pytest.raises(DataError, match=says) as error:
        build.load(path)
    assert error.value.code == 65 and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(foreign, value):
    rewrite(foreign, lambda w: w["model.norm.weight"].__setitem__(3, value))
    refused(foreign, "model.norm.weight has values that are not finite")


def test_missing_weight_is_refused(foreign):
    rewrite(foreign, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    refused(foreign, "missing weight model.layers.1.mlp.up_proj.weight")


def test_unknown_weight_is_refused(foreign):
    rewrite(foreign, lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    refused(foreign, "unknown weight model.layers.2.mlp.up_proj.weight")


def test_misshapen_weight_is_refused(foreign):
    rewrite(foreign, lambda w: w.update({"model.norm.weight": torch.ones(31)}))
    refused(foreign, r"model.norm.weight is \[31\]")


def test_integer_weight_is_refused(foreign):
    rewrite(foreign, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}))
    refused(foreign, "model.norm.weight")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(foreign, share):
    file = foreign / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(foreign, "not a whole safetensors file")


def test_a_flipped_bit_in_a_folder_of_ours_is_found(ours):
    file = ours / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    refused(ours, "SHA-256 differs")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_unopened(foreign, name):
    (foreign / "model.safetensors").rename(foreign / name)
    refused(foreign, "pickle")


def test_code_in_the_folder_is_refused(foreign):
    edit(foreign, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    refused(foreign, "runs no code")
    edit(foreign, model_type=["qwen3"])
    refused(foreign, "runs no code")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_several_files_are_read_and_checked_one_by_one(tmp_path, kind):
    model = tiny.model(vocab_size=31)
    build.save(tmp_path / "whole", model, tiny.tokenizer(), {}, kind)
    build.save(tmp_path / "parts", model, tiny.tokenizer(), {}, kind, shard_bytes=20_000)
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 22_000 for file in files)
    whole, parts = build.load(tmp_path / "whole").model, build.load(tmp_path / "parts").model
    ids = tiny.tokens(2, 9)
    assert torch.equal(whole(ids).hidden, parts(ids).hidden)
    transformers = pytest.importorskip("transformers", reason="the oracle is an extra")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert theirs.dtype == kind
    assert (theirs.float()(ids).logits - parts.scores(ids)).abs().max() < 1e-4
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 1
    files[1].write_bytes(data)
    refused(tmp_path / "parts", "model-00002-of-.*SHA-256 differs")


def test_a_model_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    model = tiny.model(vocab_size=31)
    need = sum(value.nbytes for value in {id(p): p for p in model.parameters()}.values())
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free, total=10**15))
        if fits:
            build.save(tmp_path / "a" / "m", model, tiny.tokenizer(), {})
        else:
            with pytest.raises(StorageError, match="needs .* are free"):
                build.save(tmp_path / "b" / "m", model, tiny.tokenizer(), {})
    assert not (tmp_path / "b").exists()


def edit(path, **values):
    raw = json.loads((path / "config.json").read_text())
    for key, value in values.items():
        raw.pop(key) if value is None else raw.update({key: value})
    (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": "31"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": "yarn"}, "rope"),
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": 30}, "embed_tokens.weight is"),
    ],
    ids=str,
)
def test_a_config_we_cannot_follow_is_refused(foreign, values, says):
    edit(foreign, **values)
    refused(foreign, says)


@pytest.mark.parametrize(
    "claim",
    [{"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"vocab_size": 10**12}, {"num_hidden_layers": 2**63}],
    ids=str,
)
def test_a_config_that_claims_more_than_the_weights_hold_costs_nothing(foreign, claim):
    """Laid out as it says, the model would take all memory, or all day."""
    edit(foreign, **claim)
    refused(foreign, "config.json (describes|has)")


@pytest.mark.parametrize("value", ["x", [[1]], {"a": 1}, 1.5, True])
def test_an_end_of_text_that_is_no_id_is_refused(foreign, value):
    (foreign / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(foreign, "eos_token_id")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"model_type": ["qwen3"]}'])
def test_a_config_that_is_no_config_is_refused(foreign, text):
    (foreign / "config.json").write_text(text)
    refused(foreign, "config.json")


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}', '{"weight_map": []}'],
)  # fmt: skip
def test_a_broken_shard_index_is_refused(foreign, index):
    (foreign / "model.safetensors.index.json").write_text(index)
    (foreign / "model.safetensors").rename(foreign / "model-00001-of-00002.safetensors")
    refused(foreign, "safetensors")


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no such model folder")


# -- as transformers reads them --------------------------------------------------------------------------------------


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(foreign):
    edit(foreign, tie_word_embeddings=True)
    rewrite(foreign, lambda w: w.pop("lm_head.weight", None))
    tied = build.load(foreign).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    table = tied.model.embed_tokens.weight.detach().clone()
    rewrite(foreign, lambda w: w.update({"lm_head.weight": 2 * table}))
    apart = build.load(foreign).model
    assert torch.equal(apart.lm_head.weight, 2 * table) and torch.equal(apart.model.embed_tokens.weight, table)
    assert not apart.config.tie_word_embeddings
    rewrite(foreign, lambda w: w.pop("model.embed_tokens.weight"))
    alone = build.load(foreign).model
    assert alone.lm_head.weight is alone.model.embed_tokens.weight and torch.equal(alone.lm_head.weight, 2 * table)


def test_a_whole_file_goes_before_an_old_index(foreign):
    (foreign / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    build.load(foreign)


def test_an_end_that_only_the_configuration_names_ends_a_text(foreign):
    edit(foreign, eos_token_id=[7, 8])
    (foreign / "generation_config.json").unlink()
    assert {7, 8} <= set(build.load(foreign).stop_ids)
    (foreign / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert 9 in build.load(foreign).stop_ids and 7 not in build.load(foreign).stop_ids


def test_an_adapter_beside_a_model_is_not_passed_over_in_silence(foreign, capsys):
    (foreign / "adapter_config.json").write_text("{}")
    build.load(foreign)
    assert "adapter beside the model is not applied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "gptworks.json"])
def test_a_changed_small_file_in_a_folder_of_ours_is_found(ours, name):
    (ours / name).write_text((ours / name).read_text().replace("{", "{ ", 1))
    refused(ours, f"{name}: .* damaged")


def test_special_tokens_of_an_older_folder_stand_in_a_file_of_their_own(foreign):
    file = foreign / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("added_tokens_decoder", None)
    file.write_text(json.dumps(config))
    (foreign / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "e"}}))
    assert build.load(foreign).tokenizer.eos_id == tiny.tokenizer().encode("e")[0]
    file.write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    assert build.load(foreign).tokenizer.eos_id == tiny.tokenizer().eos_id


# -- what people edit, what is damaged, what is neither ----------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "chat_template.jinja"])
def test_what_people_edit_is_no_damage(ours, name):
    (ours / "chat_template.jinja").write_text("{{ messages }}")
    manifest = json.loads((ours / "manifest.json").read_text())
    folder.write_manifest(ours, {"files": manifest["files"] | {name: manifest["files"]["README.md"]}})
    (ours / name).write_text('{"eos_token_id": 5}')
    loaded = build.load(ours)
    assert (5 in loaded.stop_ids) == (name == "generation_config.json")
    said = lifecycle.verify(ours)
    assert said.identical and f"{name}" in said.verdict and "may be edited" in said.verdict
    (ours / "tokenizer.json").write_text((ours / "tokenizer.json").read_text() + " ")
    for reading in (build.load, lifecycle.verify, lambda path: lifecycle.push(path, "me/mine")):
        with pytest.raises(DataError, match=r"tokenizer.json: .* damaged"):
            reading(ours)


def test_weights_that_are_cut_are_damaged_only_where_it_is_known_what_was_written(ours):
    file = ours / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(ours, "model.safetensors: 100 bytes where the manifest has .* damaged")
    (ours / "gptworks.json").unlink()
    with pytest.raises(DataError) as error:
        build.load(ours)
    assert "damaged" not in str(error.value) and "not a whole safetensors file" in str(error.value)


def test_weights_that_git_has_not_fetched_and_parts_that_lack_have_their_own_words(foreign):
    file = foreign / "model.safetensors"
    sound = file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(foreign, "not here yet: git lfs pull")
    file.unlink()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (foreign / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    (foreign / names[0]).write_bytes(sound)
    refused(foreign, f"{names[1]}: no such weight file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_file_that_the_system_does_not_give_is_no_damage(ours, name, manifest, monkeypatch):
    if not manifest:
        (ours / "gptworks.json").unlink()

    def refuse(file, *arguments, **options):
        if str(file).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    opened = open
    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, refuse)
    with pytest.raises(StorageError, match=f"{name}: cannot be read: Permission denied") as error:
        build.load(ours)
    assert error.value.code == 74


def test_a_run_that_is_not_finished_is_said_to_be_none_of_a_model_yet(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    refused(tmp_path, "a run that is not finished")
    (tmp_path / "model").mkdir()
    refused(tmp_path, "is a run; its model is")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_compiling_or_data_parallelism_left_are_the_models(foreign, wrapper):
    model = build.load(foreign).model
    wrapped = {f"{wrapper}{name}": value for name, value in load_file(foreign / "model.safetensors").items()}
    save_file(wrapped, foreign / "model.safetensors")
    for layout in ("whole", "in parts"):
        if layout == "in parts":
            parts = [dict(list(wrapped.items())[start::2]) for start in (0, 1)]
            files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            for file, part in zip(files, parts, strict=True):
                save_file(part, foreign / file)
            places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
            (foreign / "model.safetensors").unlink()
        assert torch.equal(build.load(foreign).model.scores(tiny.tokens(1, 9)), model.scores(tiny.tokens(1, 9)))


def test_names_of_which_only_some_are_wrapped_are_refused_with_the_wrapper(foreign):
    rewrite(foreign, lambda w: w.update({"_orig_mod.model.norm.weight": w.pop("model.norm.weight")}))
    refused(foreign, "begin with _orig_mod., and lm_head.weight does not|begin with _orig_mod., and model")
