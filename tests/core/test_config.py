"""Configuration fails closed: whatever is typed gives a checked Config or one line that names the key."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import examples

from gptworks.core import config
from gptworks.core.config import messages, recipe
from gptworks.core.errors import DataError, UsageError

KEYS = list(config.keys())
EXAMPLES = Path(__file__).parents[2] / "examples"


def refused(overrides: Any, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load("laptop", overrides)
    assert caught.value.code == 64
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("train.max_step", "train.max_steps"),
        ("train.learning_rat", "train."),
        ("trian", "train"),
        ("data.text_colum", "data.text_column"),
        ("max_steps", "train.max_steps"),
        ("train.dropout", "model.dropout"),
        ("model.d_model", "model.hidden_size"),
        ("train.learning_rate", "train.lr"),
        ("batch_size", "train.batch_tokens"),
        ("model.n_layer", "model.num_hidden_layers"),
        ("data.path", "data.train"),
    ],
)
def test_misspelt_key_names_the_nearest(key: str, nearest: str) -> None:
    refused([f"{key}=1"], "unknown key", key, f"did you mean {nearest}")


@pytest.mark.parametrize(("key", "words"), [("train.device", "CUDA_VISIBLE_DEVICES"), ("output_dir", "--out")])
def test_a_key_that_is_no_key_here_says_what_does_it(key: str, words: str) -> None:
    refused([f"{key}=1"], "unknown key", key, words)


def test_misspelt_key_in_a_file_names_the_file_and_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {max_stesp: 5}\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: unknown key 'train.max_stesp': did you mean train.max_steps"):
        config.load(str(recipe))


IMPOSSIBLE: list[tuple[str, Any]] = [
    ("train.lr", "yes"),
    ("train.lr", "nan"),
    ("train.lr", math.nan),
    ("train.lr", math.inf),
    ("train.lr", -1e-3),
    ("train.lr", True),
    ("train.lr", "1e999"),
    ("train.lr", 10**5000),
    ("train.max_steps", 0),
    ("train.max_steps", -5),
    ("train.max_steps", 1.5),
    ("train.max_steps", "1.5"),
    ("train.max_steps", True),
    ("train.max_steps", [1]),
    ("train.max_steps", "٣"),
    ("train.max_steps", "9" * 5000),
    ("train.max_steps", "x" * 10_000),
    ("train.max_steps", "1_"),
    ("train.max_steps", "1__000"),
    ("train.lr", "_1"),
    ("train.seed", -1),
    ("train.seed", 10**16),
    ("train.betas", "0.9"),
    ("train.betas", "0.9,1.5"),
    ("train.batch_tokens", "half"),
    ("train.precision", "fp4"),
    ("train.context", 1),
    ("model.dropout", 1),
    ("model.depth", 0),
    ("tokenizer.vocab_size", 100),
    ("tokenizer.kind", "word"),
    ("data.train", {"a": 1}),
    ("data.train", "\udcff"),
    ("model.path", "\udcff"),
    ("data.mask_documents", "perhaps"),
    ("stages", "train,fly"),
    ("generate.prompts", 5),
]


@pytest.mark.parametrize("key, value", IMPOSSIBLE, ids=[f"{n}-{row[0]}" for n, row in enumerate(IMPOSSIBLE)])
def test_impossible_value_names_its_key(key: str, value: Any) -> None:
    refused({key: value}, key)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=many", "train.max_steps='many': has to be a whole number above 0"),
        ("train.lr=fast", "train.lr='fast': has to be a number of 0 or more"),
        ("train.min_lr=3", "train.min_lr='3': has to be a number from 0 to 1"),
        ("model.dropout=1", "model.dropout='1': has to be a number from 0 to below 1"),
        ("data.eval_fraction=2", "data.eval_fraction='2': has to be a number above 0 and below 1"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size='100': has to be a whole number from 260 to 1,000,000"),
        ("train.betas=0.9", "train.betas=['0.9']: has to be 2 numbers from 0 to below 1"),
        ("train.batch_tokens=half", "train.batch_tokens='half': has to be full or a whole number above 0"),
        ("train.precision=fp4", "train.precision='fp4': has to be auto, fp32, bf16, fp16 or fp8"),
        ("train.tensorboard=perhaps", "train.tensorboard='perhaps': has to be true or false"),
        ("train.seed=9999999999999999", "train.seed='9999999999999999': has to be at most 1,000,000,000,000,000"),
        ("train.freeze=[1]", "train.freeze=1: has to be a list of text"),
        ("train.changes=[{step: 1, lr: x}]", "train.changes: lr='x': has to be a number of 0 or more"),
        ("train=5", "train='5': is a section of keys, for example train.seed"),
        ("train.lr=nan", "train.lr='nan': has to be a number of 0 or more"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_what_the_key_takes(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load("laptop", [override])
    assert str(caught.value) == message


def test_every_key_says_what_it_takes_in_words() -> None:
    for key, field in config.keys().items():
        words = messages.takes_of(field)
        assert words and not re.search(r"typing|class|Annotated|Field|None|\[", words), (key, words)


def test_several_mistakes_are_told_at_once_each_where_it_stands(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train: {max_stesp: 5, lr: fast}\nmodel: {hidden_size: wide}\n")
    with pytest.raises(UsageError) as caught:
        config.load(str(recipe), ["train.seed=x"])
    line = str(caught.value)
    assert "train.seed='x': has to be" in line and line.count("mine.yaml: ") == 1
    for word in ("'train.max_stesp': did you mean train.max_steps", "train.lr='fast'", "model.hidden_size='wide'"):
        assert word in line.split("mine.yaml: ")[1]
    recipe.write_text("train: {" + ", ".join(f"wrong_{n}: 1" for n in range(9)) + "}")
    with pytest.raises(UsageError, match="and 4 more"):
        config.load(str(recipe))


def test_a_mistake_in_an_override_is_not_blamed_on_the_recipe() -> None:
    for override in ("train.lr=fast", "train.max_stesp=5", "model.path=[1]"):
        with pytest.raises(UsageError) as caught:
            config.load("laptop", [override])
        assert "laptop" not in str(caught.value)
    with pytest.raises(UsageError, match="^laptop, with what overrides it: .*one dial: give one, and null"):
        config.load("laptop", ["model.depth=6"])


# -- a recipe over another ---------------------------------------------------------------------------------------


def test_a_recipe_that_extends_another_is_that_one_with_its_own_keys_over_it(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: laptop\ntrain: {lr: 0.5, seed: 3}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "two.yaml").write_text("extends: ../one.yaml\ntrain: {seed: 4}\ngenerate: {prompts: [x]}\n")
    assert config.load(str(tmp_path / "one.yaml")) == config.load("laptop", ["train.lr=0.5", "train.seed=3"])
    two = config.load(str(tmp_path / "deep" / "two.yaml"), ["train.lr=0.7"])
    assert two == config.load("laptop", ["train.lr=0.7", "train.seed=4", "generate.prompts=x"])
    assert two.train.time_budget_s == config.load("laptop").train.time_budget_s is not None


def test_a_recipe_with_a_model_takes_the_shape_and_tokenizer_of_what_it_extends_away(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("extends: laptop\nmodel: {path: some/folder}\n")
    assert config.load(str(tmp_path / "one.yaml")) == config.load("laptop", ["model=some/folder"])


@pytest.mark.parametrize(
    ("one", "two", "problem"),
    [
        ("extends: one.yaml", "", "one.yaml: extends .*one.yaml, and so itself"),
        ("extends: two.yaml", "extends: one.yaml", "two.yaml: extends .*one.yaml, and so itself"),
        ("extends: laptp", "", "unknown recipe 'laptp': did you mean 'laptop'"),
        ("extends: three.yaml", "", "three.yaml: no such recipe file"),
        ("extends: [laptop]", "", "name one recipe"),
        ("extends: two.yaml", "train: {lr: fast}", "two.yaml: train.lr='fast'"),
        ("extends: two.yaml\ntrain: {seed: x}", "train: {lr: 0.1}", "one.yaml: train.seed='x'"),
    ],
)
def test_a_wrong_extension_is_one_line_that_names_the_file(tmp_path: Path, one: str, two: str, problem: str) -> None:
    (tmp_path / "one.yaml").write_text(one)
    (tmp_path / "two.yaml").write_text(two)
    with pytest.raises(UsageError, match=problem):
        config.load(str(tmp_path / "one.yaml"))


@pytest.mark.parametrize("stages", ["evaluate,train", "train,train", "train,report,evaluate"])
def test_stages_in_a_wrong_order_are_refused_with_the_right_one(stages: str) -> None:
    with pytest.raises(UsageError, match="in the order train, evaluate, generate, report"):
        config.load("laptop", [f"stages={stages}"])
    assert config.load("laptop", ["stages=train,report"]).stages == ["train", "report"]


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**18, 2**63, 2**64]) | st.builds(lambda sign: sign * 10**5000, st.sampled_from([1, -1])),
    st.floats(allow_subnormal=False),
    st.text(max_size=20),
    st.text(alphabet="0123456789.eE+-_kMBGT٣１ ", max_size=12),
    st.sampled_from(
        ["yes", "null", "nan", "-inf", "[", "{", "[1", "{a: b}", "&a", "*a", "\x00", "\ud800", "x" * 10_000]
    ),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none(), st.lists(st.none(), max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.binary(max_size=4),
)
NAMES = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS),
    st.sampled_from(["train", "stages", "", ".", "a.b.c"]),
    st.text(max_size=8),
)


@given(st.dictionaries(NAMES, HOSTILE, min_size=1, max_size=3))
@settings(max_examples=examples(300), deadline=None)
def test_any_values_give_a_config_or_one_line(overrides: dict[str, Any]) -> None:
    try:
        made = config.load("laptop", overrides)
    except UsageError as error:
        assert len(str(error)) < 1000
    else:
        assert isinstance(made, config.Config)
        for key, field in config.keys().items():
            value = config.get(made, key)
            assert not isinstance(value, float) or math.isfinite(value), field


@given(st.lists(st.builds("{}={}".format, NAMES, st.text(max_size=20)) | st.text(max_size=10), min_size=1, max_size=3))
@settings(max_examples=examples(300), deadline=None)
def test_any_command_line_gives_a_config_or_one_line(overrides: list[str]) -> None:
    try:
        config.load("laptop", overrides)
    except UsageError as error:
        assert len(str(error)) < 1000


@given(st.text(max_size=200) | st.text(alphabet="{}[]:,-&*!|>'\"# \n\tab1", max_size=60))
@settings(max_examples=examples(300), deadline=None)
def test_any_recipe_file_gives_a_config_or_one_line(text: str) -> None:
    try:
        tree = recipe._parse(text, "recipe")
        if isinstance(tree, dict):
            config.build(tree, "recipe")
    except UsageError as error:
        assert "recipe" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "a: " * 5000,
        "- 1\n- 2\n",
        "train: {lr: " + "9" * 5000 + "}",
        "\x00",
        "a: !!python/object:os.system x",
    ],
    ids=range(6),
)
def test_hostile_recipe_file_is_a_usage_error(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match="mine.yaml"):
        config.load(str(recipe))


@pytest.mark.parametrize("text", ["train: {lr: 1}\ntrain: {seed: 2}", "train: {lr: 1, seed: 1, lr: 2}"])
def test_a_key_that_is_there_twice_is_a_usage_error(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml: .*'(train|lr)' is there twice"):
        config.load(str(recipe))


@pytest.mark.parametrize("twice", ["train: {seed: 9}", "asked: {}", "reasons: {}"])
def test_a_runs_file_that_has_a_section_twice_is_damaged(tmp_path: Path, twice: str) -> None:
    made = config.load("laptop")
    text = config.RunFile(tmp_path / "config.yaml", resolved(made), asked=made, reasons={"train.lr": "why"}).text()
    (tmp_path / "config.yaml").write_text(f"{text}{twice}\n")
    with pytest.raises(DataError, match="is there twice"):
        config.RunFile.read(tmp_path / "config.yaml")


def test_a_section_given_as_a_mapping_is_merged() -> None:
    one = config.load("laptop", ["train.max_steps=5", "train={seed: 3}"])
    assert (one.train.max_steps, one.train.seed) == (5, 3)
    assert one.train.time_budget_s == config.load("laptop").train.time_budget_s is not None
    two = config.load("laptop", {"train.lr": 0.4, "train": {"lr": 0.5}, "generate": {}})
    assert two == config.load("laptop", {"train.lr": 0.5})
    with pytest.raises(UsageError, match=r"train\.sede"):
        config.load("laptop", ["train={sede: 3}"])


@pytest.mark.parametrize(
    ("key", "kept"), [("train.wandb", True), ("train.checkpoint_every", False), ("train.seed", False)]
)
def test_a_key_is_unset_where_null_was_asked_and_a_run_may_have_it_so(key: str, kept: bool) -> None:
    assert not config.is_unset(config.load("laptop"), "train.wandb")
    if key != "train.seed":
        assert config.is_unset(config.load("laptop", {key: None}), key) is kept


def test_a_key_beside_a_merged_mapping_is_there_once() -> None:
    text = "a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c, x: 3}"
    assert recipe._parse(text, "recipe") == {"a": {"x": 1}, "b": {"c": {"x": 2}}, "d": {"x": 3}}


@pytest.mark.parametrize(
    "recipe", ["nothere.yaml", "a\0b.yaml", "x" * 5000 + ".yaml", "shakespear_char", "laptop.json"], ids=range(5)
)
def test_unknown_recipe_is_a_usage_error(recipe: str) -> None:
    with pytest.raises(UsageError):
        config.load(recipe)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'shakespeare_char'"):
        config.load("shakespear_char")


@pytest.mark.parametrize(
    "text, expected",
    [("10M", 10_000_000), ("2.5M", 2_500_000), ("3k", 3000), ("1_000", 1000), ("1e5", 100_000), ("12", 12)],
)
def test_counts_take_units(text: str, expected: int) -> None:
    made = config.load(None, [f"train.max_tokens={text}"]).train.max_tokens
    assert made == expected and type(made) is int


@pytest.mark.parametrize("text, expected", [("3e-4", 3e-4), ("0.001", 0.001), ("1", 1.0), ("0", 0.0)])
def test_rates_take_exponents(text: str, expected: float) -> None:
    assert config.load(None, [f"train.lr={text}"]).train.lr == expected


def test_yaml_reads_an_exponent_without_a_dot_as_a_number(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {lr: 3e-4, max_tokens: 10M}\n")  # YAML 1.1 takes 3e-4 for text
    made = config.load(str(recipe))
    assert (made.train.lr, made.train.max_tokens) == (3e-4, 10_000_000)


def test_overrides_beat_the_recipe_and_the_last_one_wins() -> None:
    made = config.load("laptop", ["tokenizer.vocab_size=2000", "tokenizer.vocab_size=3000", "model.parameters=null"])
    assert made.tokenizer.vocab_size == 3000
    assert made.model.parameters is None
    assert config.load(None, ["train.tensorboard=false"]).train.tensorboard is False
    assert config.load(None, ["generate.prompts=[]"]).generate.prompts == []
    assert made.model.family == "qwen3"  # the recipe's other keys stay


def test_list_overrides_take_commas_or_brackets() -> None:
    made = config.load(None, ["train.betas=0.8,0.99", "stages=train,report", 'generate.prompts=["a, b", "c"]'])
    assert made.train.betas == (0.8, 0.99)
    assert made.stages == ["train", "report"]
    assert made.generate.prompts == ["a, b", "c"]
    assert config.load(None, ["data.train=[a.txt, b.txt]"]).data.train == ["a.txt", "b.txt"]


def test_model_is_short_for_model_path() -> None:
    assert config.load(None, ["model=some/folder"]).model.path == "some/folder"


def test_no_model_folder_keeps_the_recipes_shape_and_tokenizer() -> None:
    assert config.load("laptop", ["model=null"]).model_dump() == config.load("laptop").model_dump()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.depth=4", "model.parameters=1M"],
        ["model=x", "model.hidden_size=64"],
        ["model=x", "tokenizer.vocab_size=500"],
        ["train.batch_tokens=full", "train.max_tokens=1M"],
    ],
)
def test_contradicting_keys_are_refused(overrides: list[str]) -> None:
    with pytest.raises(UsageError):
        config.load(None, overrides)


def test_every_builtin_recipe_loads() -> None:
    assert "laptop" in config.recipe_names()
    for name in config.recipe_names():
        config.load(name)


def round_trip(made: config.Config, path: Path, reasons: dict[str, str]) -> None:
    chosen = resolved(made)
    config.RunFile(path, chosen, made, reasons).write()
    again = config.RunFile.read(path)
    assert again.chosen == chosen and again.reasons == reasons and again.changes == []
    assert again.asked == made
    assert not any(config.differences(again.asked, made, kind) for kind in ("fixed", "flexible", "free"))


def resolved(asked: config.Config) -> config.Chosen:
    """With some value for each key that a run has to have."""
    filled = {
        "batch_tokens": 64, "micro_batch": 1, "context": 64, "max_steps": 10, "lr": 0.1, "weight_decay": 0.0,
        "warmup": 0.0, "threads": 1, "workers": 1, "checkpoint_every": 5, "eval_every": 5,
        "log_every": 1,
    }  # fmt: skip
    tree = asked.model_dump(mode="json")
    train = {key: filled[key] if value is None and key in filled else value for key, value in tree["train"].items()}
    autos = {"precision": "fp32", "compile": False, "deterministic": True}
    train |= {key: value for key, value in autos.items() if train[key] == "auto"}
    return config.build(tree | {"train": train}, "test", config.Chosen)


@pytest.mark.parametrize("recipe", config.recipe_names())
def test_dump_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    round_trip(config.load(recipe), tmp_path / "config.yaml", {"train.seed": "because: # 'so'"})


def test_dump_of_defaults_reads_back_equal(tmp_path: Path) -> None:
    round_trip(config.load(None), tmp_path / "config.yaml", {})


def test_dump_of_a_run_from_a_model_folder_reads_back_equal(tmp_path: Path) -> None:
    """It spells out tokenizer and model keys that beside model.path may not be set."""
    round_trip(config.load(None, ["model=some/folder", "model.dropout=0.2"]), tmp_path / "config.yaml", {})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    separator=TEXT.filter(bool),
    prompts=st.lists(TEXT | st.text(alphabet="\n 'a\":#-[]{}\t1", max_size=8), max_size=3),
    lr=st.floats(0, 1e29, allow_subnormal=False),
    seed=st.integers(0, 10**15),
)
@settings(max_examples=examples(100), deadline=None)
def test_dump_reads_back_equal_for_any_text(
    tmp_path_factory: pytest.TempPathFactory, separator: str, prompts: list[str], lr: float, seed: int
) -> None:
    tree = {"data": {"separator": separator}, "generate": {"prompts": prompts}, "train": {"lr": lr, "seed": seed}}
    round_trip(config.build(tree, "test"), tmp_path_factory.getbasetemp() / "config.yaml", {})


@pytest.mark.parametrize("text", [b"", b"[]", b"a: 1", b"asked: [", b"\xff\xfe", b"asked: {}\nnope: 1"])
def test_damaged_config_of_a_run_is_reported(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises((DataError, UsageError), match="config.yaml"):
        config.RunFile.read(path)


def test_changes_lists_the_keys_of_a_kind() -> None:
    old = {"train": {"seed": 1, "lr": 1e-3, "log_every": 5}, "data": {"train": "a.txt"}}
    new = config.load(None, ["train.seed=2", "train.lr=2e-3", "train.log_every=7", "data.train=a.txt"])
    old = config.build(old, "before")
    assert config.differences(old, new, "fixed") == [("train.seed", 1, 2)]
    assert config.differences(old, new, "flexible") == [("train.lr", 1e-3, 2e-3)]
    assert config.differences(old, new, "free") == [("train.log_every", 5, 7)]


def test_a_default_spelled_out_is_no_change() -> None:
    assert (
        config.differences(config.load(None), config.load(None, ["train.seed=1", "tokenizer.kind=bpe"]), "fixed") == []
    )


OTHER = {"problem.kind": f"{EXAMPLES / 'own_problem.py'}:Reverse",
         "data.train": "another.txt", "train.max_tokens": 10**6, "train.betas": [0.5, 0.6], "stages": ["train"],
         "generate.prompts": ["x"], "train.changes": [{"step": 5, "lr": 0.1}], "train.batch_tokens": 4096,
         "adapter.target_modules": ["q_proj"], "train.freeze": ["*.mlp.*"],
         "model.add_tokens": ["x"]}  # fmt: skip


def beside(key: str) -> dict[str, object]:
    """What a key says nothing without."""
    base = {"model.path": "base"} if key.startswith("adapter.") or key == "model.add_tokens" else {}
    return base | ({"adapter.kind": "lora"} if key.startswith("adapter.") and key != "adapter.kind" else {})


def another_value(key: str) -> object:
    """A valid value of a key that is not its default."""
    if key in OTHER:
        return OTHER[key]
    default = config.get(config.load(None, beside(key)), key)
    words = "text char adamw gpt-2 layernorm learned relu error fp32 canonical lora keep cp1252".split()  # noqa: SIM905
    for value in (not default, 7, 3000, 0.3, 0.7, *words):
        try:
            if config.get(config.load(None, beside(key) | {key: value}), key) != default:
                return value
        except UsageError:
            continue
    pytest.fail(f"no other value found for {key}")


@pytest.mark.parametrize("key", config.keys())
def test_every_key_is_seen_to_change_under_its_own_kind_alone(key: str) -> None:
    before = config.load(None, beside(key))
    changed = config.load(None, beside(key) | {key: another_value(key)})
    kinds = ("fixed", "flexible", "free")
    seen = [kind for kind in kinds if [found for found, _, _ in config.differences(before, changed, kind)] == [key]]
    assert seen == [kind for kind in kinds if key in config.keys_of_kind(kind)] and len(seen) == 1
    assert sum(len(config.differences(before, changed, kind)) for kind in kinds) == 1


def test_changes_of_a_run_have_one_place_and_are_read_back(tmp_path: Path) -> None:
    made = config.load(None, ["train.max_steps=10"])
    file = config.RunFile(tmp_path / "config.yaml", resolved(made), made, {"train.lr": "because"})
    changes = [
        config.Change(step=3, lr=0.5), config.Change(step=7, values={"train.patience": 4, "problem.patience": 2}),
        config.Change(step=10, length=20, why='train.max_steps=20, was: "10"'),
    ]  # fmt: skip
    file.asked = config.load(None, ["train.max_steps=20", "train.lr=0.5"])
    for change in changes:
        file.append(change)
    again = config.RunFile.read(file.path)
    assert again == file and again.changes == changes
    assert "changes" not in again.text().split("train:")[1].split("generate:")[0]
    assert again.chosen.train.patience is None and "# because" in again.text()


def test_the_folder_of_a_run_is_named_after_its_recipe_and_never_the_run_whose_file_is_one() -> None:
    assert [str(recipe.usual_folder(name)) for name in ("laptop", "my/own.yaml", "runs/novels/config.yaml")] == [
        "runs/laptop", "runs/own", "runs/novels-again"
    ]  # fmt: skip


def test_a_runs_file_as_a_recipe_gives_its_values_but_those_of_its_machine(tmp_path: Path) -> None:
    made = config.load("laptop", ["train.precision=fp32", "model.parameters=null", "model.depth=1"])
    file = config.RunFile(tmp_path / "config.yaml", resolved(made), made, {"train.lr": "because"}, recipe="laptop")
    file.append(config.Change(step=7, length=20))
    again = config.load(str(tmp_path / "config.yaml"), ["train.seed=5"])
    assert again.train.lr == 0.1 and again.train.max_steps == 10 and again.model == made.model
    assert again.train.seed == 5 and [change.length for change in again.train.changes] == [20]
    assert again.train.precision == "fp32"  # which was asked
    assert again.train.time_budget_s is None  # it has become a number of steps
    left = (again.train.threads, again.train.workers, again.train.micro_batch, again.train.compile)
    assert left == (None, None, None, "auto")


PROBLEM = """
from gptworks.core.config import ProblemSettings, fixed, flexible, free
from gptworks.training.problem import Problem

class Settings(ProblemSettings):
    patience: int = flexible(3, "a setting of the problem's own")
    changes: list[str] = fixed([], "another")
    lr: float = free(0.5, "a third")
    seed: int = fixed(1, "a fourth")

class Mine(Problem):
    Settings = Settings
    @classmethod
    def open(cls, config, place): return cls()
    def start(self, model, config, group, values): ...
"""


def test_no_key_is_special_by_its_name_wherever_it_stands(tmp_path: Path) -> None:
    """A problem's own patience, changes, lr and seed are its own: those of `train` do not move with them."""
    (tmp_path / "mine.py").write_text(PROBLEM)
    kind = f"{tmp_path / 'mine.py'}:Mine"
    asked = [f"problem={kind}", "problem.patience=7", "problem.changes=a,b", "problem.lr=2", "problem.seed=9"]
    made = config.load("laptop", asked)
    assert made.problem.changes == ["a", "b"] and made.problem.patience == 7
    file = config.RunFile(tmp_path / "config.yaml", resolved(made), made)
    file.append(config.Change(step=4, values={"train.patience": 9}))
    file.append(config.Change(step=6, values={"problem.patience": 5}))
    again = config.RunFile.read(file.path)
    assert again == file and again.chosen.problem == made.problem and again.chosen.train.changes == []
    assert (again.at(3).train.patience, again.at(3).problem.patience) == (None, 7)
    assert (again.at(5).train.patience, again.at(5).problem.patience) == (9, 7)
    assert (again.at(6).train.patience, again.at(6).problem.patience) == (9, 5)
    now = config.load("laptop", [*asked[:1], "problem.patience=8", *asked[2:]])
    assert config.differences(made, now, "flexible") == [("problem.patience", 7, 8)]
    assert "data" not in again.text() and "tokenizer" not in again.text()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["problem.patience=x"], "problem.patience='x'"),
        (["problem.patiense=1"], "unknown key 'problem.patiense': did you mean problem.patience"),
        (["data.train=a.txt"], "data.train: Mine does not use the section 'data'"),
        (["tokenizer.kind=char"], "does not use the section 'tokenizer'"),
        (["problem.kind=nowhere.py:Mine"], "no such file"),
        (["problem.kind=[1]"], "name a problem, or file.py:Name"),
        (["problem.kind=pretrainin"], "did you mean 'pretraining'"),
    ],
    ids=str,
)
def test_a_wrong_key_of_a_problem_is_refused(tmp_path: Path, overrides: list[str], problem: str) -> None:
    (tmp_path / "mine.py").write_text(PROBLEM)
    with pytest.raises(UsageError, match=problem):
        config.load("laptop", [f"problem={tmp_path / 'mine.py'}:Mine", *overrides])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (("    def start(self, model, config, group, values): ...\n", ""), "has no start"),
        (("class Mine(Problem):", "class Mine:"), "has no sections"),
        (('seed: int = fixed(1, "a fourth")', "seed: int = 1"), "problem.seed: a key is declared by fixed"),
        (("class Mine", "raise KeyError('x')\nclass Mine"), "cannot be loaded: KeyError: 'x'"),
        (("class Mine", "class Other"), "defines no 'Mine'"),
    ],
)
def test_a_problem_file_that_is_none_is_refused_in_one_line(
    tmp_path: Path, damage: tuple[str, str], problem: str
) -> None:
    (tmp_path / "mine.py").write_text(PROBLEM.replace(*damage))
    with pytest.raises(UsageError, match=problem):
        config.load("laptop", [f"problem={tmp_path / 'mine.py'}:Mine"])


def test_a_recipe_is_read_and_its_problem_checked_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom gptworks.core import config\nmade = config.load('laptop')\n"
        "config.problem_of({}).check(made)\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    "entries, problem",
    [
        ("{path: a, weight: 1}, b", "give every entry"),
        ("b, {path: a, weight: 1}", "give every entry"),
        ("[b], {path: a, weight: 1}", "give every entry"),
        ("{path: a, weight: 0}", "'a': weight=-?0.*: has to be a number above 0"),
        ("{path: a, weight: -0.5}", "'a': weight=-?0.*: has to be a number above 0"),
        ("{path: a, weight: .nan}", "'a': weight=(nan|inf): has to be a number above 0"),
        ("{path: a, weight: .inf}", "'a': weight=(nan|inf): has to be a number above 0"),
        ("{path: a, weight: much}", "'a': weight='much': has to be a number above 0"),
        ("{path: a, weight: true}", "'a': weight=True: True is not a number"),
        ("{path: a}", "'a': weight: is missing"),
        ("{weight: 1}", "path: is missing"),
        ("{path: a, weigth: 1}", "'a': unknown key 'weigth': did you mean weight"),
        ("{path: '', weight: 1}", "path='': has to be text that is not empty"),
        ("{path: a, weight: 1}, {path: a, weight: 2}", "'a' is named twice"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(entries: str, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"data\.train=.*{problem}"):
        config.load(None, [f"data.train=[{entries}]"])


@given(
    paths=st.lists(TEXT.filter(bool) | st.just("a\u2028: {b}\n'"), min_size=1, max_size=4, unique=True),
    weight=st.floats(1e-20, 1e20),
)
@settings(max_examples=examples(60), deadline=None)
def test_dump_of_a_mixture_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], weight: float
) -> None:
    tree = {"data": {"train": [{"path": path, "weight": weight} for path in paths]}}
    round_trip(config.build(tree, "test"), tmp_path_factory.getbasetemp() / "mixture.yaml", {})


def test_a_prompt_may_have_commas() -> None:
    asked = ["generate.prompts=To be, or not to be", "train.betas=0.8,0.9", "stages=train,generate"]
    made = config.load("laptop", asked)
    assert made.generate.prompts == ["To be, or not to be"]
    assert made.train.betas == (0.8, 0.9) and made.stages == ["train", "generate"]


@pytest.mark.parametrize(
    ("overrides", "prompts"),
    [([], ["ROMEO:\n"]), (["data.train=shakespeare"], ["ROMEO:\n"]), (["train.max_steps=3"], ["ROMEO:\n"]),
     (["data.train=mine.txt"], None), (["model=folder", "model.dropout=null"], None), (["tokenizer.path=folder"], None),
     (["data.train=mine.txt", "generate.prompts=Once"], ["Once"])],
    ids=str,
)  # fmt: skip
def test_prompts_of_a_recipe_go_with_its_text(overrides, prompts):
    assert config.load("shakespeare_char", overrides).generate.prompts == prompts
    assert config.load("lora").generate.prompts is None  # none of its own
