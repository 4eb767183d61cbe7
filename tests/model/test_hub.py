"""Models of the hub: from a cache laid out as huggingface_hub lays it out, by the library itself, without a network."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

from gptworks import lifecycle
from gptworks.core import config as configuration
from gptworks.core.config import Adapter
from gptworks.core.errors import DataError, StorageError, UsageError
from gptworks.core.log import count
from gptworks.model import adapters, build, card, hub
from gptworks.model.card import license_of
from gptworks.model.config import parameter_count

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub is an extra")
constants, errors, utils = (
    importlib.import_module(f"huggingface_hub.{name}") for name in ("constants", "errors", "utils")
)
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    utils.close_session()
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "cache"
    utils.close_session()


def put(cache, name, folder, revision="main", commit=COMMIT):
    """A folder as it lies in the cache after it was fetched: files by content, links to them, a name for the commit."""
    place = cache / f"models--{name.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = place / "blobs" / f"{commit[:4]}-{file.name}"
        shutil.copy(file, blob)
        (place / "snapshots" / commit / file.name).symlink_to(blob)
    (place / "refs" / revision).write_text(commit)
    return place / "snapshots" / commit


def saved(path, seed=1):
    model = tiny.model(seed, vocab_size=31)
    build.save(path, model, tiny.tokenizer(), {})
    return model


def test_a_name_of_the_hub_is_the_folder_in_its_cache(cache, tmp_path):
    model, older = saved(tmp_path / "made"), saved(tmp_path / "older", seed=2)
    snapshot = put(cache, "some-one/a.model", tmp_path / "made")
    put(cache, "some-one/a.model", tmp_path / "older", "v1", OLDER)
    ids = tiny.tokens(1, 9)
    for name, wanted in (("some-one/a.model", model), ("some-one/a.model@v1", older)):
        loaded = build.load(name)
        assert torch.equal(loaded.model(ids).hidden, wanted(ids).hidden)
    assert build.load("some-one/a.model").path == snapshot
    assert build.load(f"some-one/a.model@{OLDER}").name == f"some-one/a.model@{OLDER}"
    assert not torch.equal(model(ids).hidden, older(ids).hidden)


def test_commands_take_such_names_and_leave_offline_mode_to_the_library(cache, tmp_path, zygote):
    saved(tmp_path / "made")
    put(cache, "one/model", tmp_path / "made")
    (tmp_path / "text.txt").write_text(tiny.text(300))
    command = ["evaluate", "one/model", "--data", "text.txt", "--json"]
    said = zygote.printed(command, cwd=tmp_path, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert json.loads(said)["model"] == f"one/model@{COMMIT}"


def test_a_folder_here_goes_before_a_model_of_that_name(cache, tmp_path):
    saved(tmp_path / "elsewhere")
    put(cache, "runs/mine", tmp_path / "elsewhere")
    model = saved(tmp_path / "runs" / "mine", seed=3)
    assert torch.equal(build.load("runs/mine").model.scores(tiny.tokens(1, 9)), model.scores(tiny.tokens(1, 9)))


@pytest.mark.parametrize("name", ["a", "a/b/c", "../b", "/a/b", "a/b@", "a b/c", ".a/b"])
def test_what_is_no_name_of_the_hub_is_a_folder_that_is_not_there(cache, name):
    with pytest.raises(DataError, match="no such model folder"):
        build.load(name)


def test_an_adapter_names_its_base_on_the_hub_by_commit_and_finds_it(cache, tmp_path):
    saved(tmp_path / "made")
    put(cache, "one/base", tmp_path / "made", "main", OLDER)
    base = build.load("one/base")
    saved(tmp_path / "newer", seed=2)
    put(cache, "one/base", tmp_path / "newer")  # main goes on
    settings = Adapter(kind="lora")
    trained = adapters.attach(base.model, settings, 1)
    for layer in adapters.adapters(trained).values():
        torch.nn.init.normal_(layer.lora_B)
    build.save_adapter(tmp_path / "adapter", trained, settings, base, {})
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("one/base", OLDER)
    assert "\nbase_model: one/base\n" in (tmp_path / "adapter" / "README.md").read_text()
    ids = tiny.tokens(1, 9)
    put(cache, "one/adapter", tmp_path / "adapter")
    for name in (tmp_path / "adapter", "one/adapter"):
        again = build.load(name)
        assert (
            torch.equal(again.model(ids).hidden, trained(ids).hidden) and hub.name_of(again.home) == f"one/base@{OLDER}"
        )


def test_the_card_says_to_the_hub_what_was_measured_and_what_the_model_comes_from(tmp_path):
    lineage = {
        "data": "café: text.txt", "parents": [{"path": f"one/base@{COMMIT}", "sha256": "0"}],
        "metrics": {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_tokens": 100},
    }  # fmt: skip
    build.save(tmp_path / "mine", tiny.model(vocab_size=31), tiny.tokenizer(), lineage)
    said = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md").data
    assert (said.library_name, said.base_model, said.pipeline_tag) == ("transformers", "one/base", "text-generation")
    assert said.model_name == "mine" and said.metrics == ["loss", "perplexity"]
    assert [(r.metric_type, r.metric_value) for r in said.eval_results] == [("loss", 1.5), ("perplexity", 4.48)]
    assert {r.dataset_name for r in said.eval_results} == {"validation split of café: text.txt"}
    lineage["parents"][0]["path"] = str(tmp_path / "runs@home")
    build.save(tmp_path / "other", tiny.model(vocab_size=31), tiny.tokenizer(), lineage)
    assert huggingface_hub.ModelCard.load(tmp_path / "other" / "README.md").data.base_model is None


def test_the_licence_is_the_one_asked_for_or_the_parents(tmp_path):
    saved(tmp_path / "base")
    (tmp_path / "base" / "manifest.json").unlink()
    (tmp_path / "base" / "gptworks.json").unlink()
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: [1]\n---\n# x\n"
    )
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    asked = [f"data.train={tmp_path / 'text.txt'}", "train.context=8", "train.batch_tokens=32", "train.max_steps=1"]

    def card(out, model, *more):
        lifecycle.train(configuration.load(None, [f"model={model}", *asked, *more]), out)
        return huggingface_hub.ModelCard.load(out / "model" / "README.md").data

    own = card(tmp_path / "a", tmp_path / "base", "license=apache-2.0")
    assert own.license == "apache-2.0" and own.license_name is None
    one = card(tmp_path / "b", tmp_path / "base", "adapter=lora")
    assert (one.license, one.license_name, one.license_link) == ("other", "mine", None)
    lifecycle.merge(tmp_path / "b" / "model", tmp_path / "merged")
    assert huggingface_hub.ModelCard.load(tmp_path / "merged" / "README.md").data.license_name == "mine"
    assert card(tmp_path / "c", tmp_path / "merged").license_name == "mine"  # from parent to child
    for text in ("---\n[\n---\n", "no header\n", "---\n- a\n---\n"):
        (tmp_path / "base" / "README.md").write_text(text)
        assert license_of(tmp_path / "base") == {}


def answer(status):
    """What the library raises for an answer of the hub, made as it makes it."""
    httpx = utils.httpx
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example/x"))


ANSWERS = [
    (lambda: errors.RepositoryNotFoundError("x", response=answer(404)), DataError, "no such model on the hub"),
    (lambda: errors.GatedRepoError("x", response=answer(403)), DataError, "accepted its terms"),
    (lambda: errors.RevisionNotFoundError("x", response=answer(404)), DataError, "this revision is not"),
    (lambda: errors.HfHubHTTPError("x", response=answer(403)), UsageError, "hf auth login"),
    (lambda: errors.HfHubHTTPError("x", response=answer(503)), StorageError, "answers 503"),
    (lambda: utils.httpx.ConnectError("no\nroute"), StorageError, "cannot be reached"),
]


@pytest.mark.parametrize(("error", "kind", "says"), ANSWERS, ids=[says for *_, says in ANSWERS])
def test_what_the_hub_refuses_is_one_line_with_a_code(cache, monkeypatch, error, kind, says):
    def raising(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising)
    with pytest.raises(kind, match=says) as refused:
        build.load("some/model")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("some/model is no folder here: ")


def test_what_the_cache_lacks_cannot_be_had_without_a_network(cache):
    with pytest.raises(StorageError, match="some/model is no folder here: .*HF_HUB_OFFLINE") as refused:
        build.load("some/model")
    assert refused.value.code == 74


def test_without_the_library_the_way_to_it_is_named(cache, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for work in (lambda: build.load("some/model"), lambda: hub.push(tmp_path, "some/model")):
        with pytest.raises(UsageError, match=r"pip install .gptworks\[hub\].") as refused:
            work()
        assert refused.value.code == 64


class Api:
    """In place of HfApi."""

    endpoint = "https://hub.example"
    calls: list = []

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))

    def create_commit(self, repo_id, operations, commit_message):
        self.calls.append(("create_commit", repo_id, {op.path_in_repo: op.path_or_fileobj for op in operations}))


@pytest.mark.parametrize("private", [False, True])
def test_push_makes_the_repository_and_puts_the_files_there(cache, monkeypatch, tmp_path, private):
    saved(tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    (tmp_path / "model" / ".DS_Store").write_text("x")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    assert lifecycle.push(tmp_path / "model", "me/mine", private).url == "https://hub.example/me/mine"
    wanted = {"private": True if private else None, "exist_ok": True}
    sent = {name: str(tmp_path / "model" / name) for name in names}
    assert Api.calls == [("create_repo", "me/mine", wanted), ("create_commit", "me/mine", sent)]


def test_a_damaged_folder_is_not_pushed_nor_one_that_is_no_model(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    saved(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="config.json"):
        lifecycle.push(tmp_path / "model", "me/mine")
    with pytest.raises(DataError, match="no model folder"):
        lifecycle.push(tmp_path, "me/mine")
    saved(tmp_path / "sound")
    for name in ("mine", "me/mine@v1", "https://hub.example/me/mine"):
        with pytest.raises(UsageError, match="OWNER/NAME"):
            lifecycle.push(tmp_path / "sound", name)
    assert not Api.calls


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A run, an adapter on its model and the two merged, of texts and a recipe in folders of somebody's home."""
    home = tmp_path_factory.mktemp("somebody") / "home"
    (home / "secret").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "held.txt"):
        (home / "secret" / name).write_text(tiny.text(2000, seed=len(name) + ord(name[0])))
    (home / "secret" / "mine.yaml").write_text("data: {}\n")
    texts = [
        {"path": str(home / "secret" / "a.txt"), "weight": 3},
        {"path": str(home / "secret" / "b.txt"), "weight": 1},
    ]
    asked = {
        "data.train": texts, "data.eval": str(home / "secret" / "held.txt"), "train.context": 8,
        "train.batch_tokens": 32, "train.max_steps": 1, "train.tensorboard": False,
    }  # fmt: skip
    whole = asked | {"tokenizer.kind": "bytes", "model.hidden_size": 16, "model.num_hidden_layers": 1}
    lifecycle.train(configuration.load(None, whole), home / "base", str(home / "secret" / "mine.yaml"))
    adapted = asked | {"model.path": str(home / "base" / "model"), "adapter.kind": "lora"}
    lifecycle.train(configuration.load(None, adapted), home / "notes", "lora")
    lifecycle.merge(home / "notes" / "model", home / "whole")
    return home


def test_what_is_published_names_texts_and_models_and_no_folder_of_this_machine(private, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for folder in ("base/model", "notes/model", "whole"):
        monkeypatch.setattr(Api, "calls", [])
        capsys.readouterr()
        lifecycle.push(private / folder, "me/mine")
        said = capsys.readouterr().err
        sent = {
            name: what if isinstance(what, bytes) else Path(what).read_bytes() for name, what in Api.calls[1][2].items()
        }
        for name, content in sent.items():
            assert b"secret" not in content and str(private).encode() not in content, name
            assert f"{name} (" in said
        lineage = json.loads(sent["gptworks.json"])
        assert lineage["data"] == "a.txt (75 %) and b.txt (25 %)" and lineage["split"] == "validation: held.txt"
        assert lineage["config"]["data"]["train"][1] == {"path": "b.txt", "weight": 1.0}
        assert "the training text: a.txt (75 %) and b.txt (25 %)" in said
        if folder == "notes/model":
            assert lineage["parents"][0]["path"] == "base"
            assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "./base"


def test_the_card_names_the_run_the_recipe_and_what_kind_of_model_it_is(private):
    def card(folder):
        return " ".join((private / folder / "README.md").read_text().split())

    size = count(parameter_count(build.load(private / "whole").model.config))
    assert f"# base A Qwen3 model of {size} parameters. Trained" in card("base/model")
    assert "recipe `mine.yaml`, on `a.txt" in card("base/model")
    assert f"# notes A LoRA adapter of rank 16 for `base`, a Qwen3 model of {size} parameters." in card("notes/model")
    assert "recipe `lora`, on `a.txt (75 %) and b.txt (25 %)`" in card("notes/model")
    assert f"# whole A Qwen3 model of {size} parameters: `base` and the adapter `notes` as one." in card("whole")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("a.txt", "a.txt"), ("/home/me/a.txt", "a.txt"), ("books/", "books"), ("/home/me/books/*.txt", "books/*.txt"),
        ("runs/demo/model", "demo"), ("/x/mine.py:documents", "mine.py:documents"), ("**/*.txt", "**/*.txt"),
    ],
)  # fmt: skip
def test_others_know_a_place_by_its_own_name(place, name):
    assert card.place(place) == name


def test_prompts_names_of_the_hub_and_other_texts_are_told_as_they_are(cache):
    tree = {"generate": {"prompts": ["/home"]}, "path": "one/base@v1", "separator": "/a/", "lr": 0.1, "text": "a/b c"}
    assert card.told(tree) == tree


def test_a_push_without_a_network_says_so_and_that_nothing_was_sent(cache, tmp_path):
    saved(tmp_path / "model")
    with pytest.raises(StorageError, match=r"cannot be reached and nothing was sent .*network and HF_HUB_OFFLINE"):
        lifecycle.push(tmp_path / "model", "me/mine")


def test_a_name_without_an_owner_is_told_how_models_of_the_hub_are_named(cache):
    with pytest.raises(DataError, match="gpt2: no such model folder; one of the hub is named OWNER/NAME"):
        build.load("gpt2")
    with pytest.raises(DataError, match="no such model folder$"):
        build.load("/no/such/folder")


def test_an_adapter_of_a_folder_of_this_machine_is_pushed_with_a_warning(cache, monkeypatch, tmp_path, capsys):
    saved(tmp_path / "base")
    settings = Adapter(kind="lora")
    trained = adapters.attach(build.load(tmp_path / "base").model, settings, 1)
    build.save_adapter(tmp_path / "adapter", trained, settings, build.load(tmp_path / "base"), {})
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    lifecycle.push(tmp_path / "adapter", "me/mine")
    assert f"warning: the adapter's base is {tmp_path / 'base'}" in capsys.readouterr().err
