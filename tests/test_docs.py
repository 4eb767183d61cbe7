"""The documentation says what the code does: commands parse, keys are listed, links lead somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml

from gptworks import api
from gptworks.cli import app
from gptworks.core import config as configuration
from gptworks.core import errors

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEYS = configuration.keys()
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def command_lines(text: str) -> list[str]:
    """Every `gptworks ...` line of a page's sh blocks, and inline code of that form."""
    blocks = [line for kind, block in FENCE.findall(text) if kind == "sh" for line in block.splitlines()]
    inline = re.findall(r"`(gptworks [^`\n]+)`", FENCE.sub("", text))
    return [line for line in blocks + inline if line.startswith("gptworks ") and not line.startswith("gptworks --")]


def problem(line: str) -> str | None:
    """What is wrong with a command line, by the command's own parser; None if nothing is.

    In a synopsis brackets, alternatives and dots are dropped, so that the options in it are still checked.
    """
    if "[" in line.replace("=[", ""):
        line = re.sub(r"[\[\]()|]|\.\.\.", " ", line).replace(" OPTION ", " ")
        line = re.sub(r"(?<= )N(?= |$)", "1", line)
    name, *arguments = shlex.split(line)[1:]
    if name not in COMMANDS:
        return f"no command {name!r}"
    if not arguments:  # the command is only named
        return None
    try:
        context = COMMANDS[name].make_context(name, arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    recipe = context.params.get("recipe")
    overrides = [text for text in context.params.get("overrides") or [] if text != "KEY=VALUE"]
    try:  # a recipe file of the reader's own is not here; its overrides are checked by themselves
        configuration.load(recipe if recipe in configuration.recipe_names() else None, overrides)
    except errors.UsageError as error:
        return str(error)
    if recipe and recipe not in ("RECIPE", *configuration.recipe_names()) and not recipe.endswith(".yaml"):
        return f"no recipe {recipe!r}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_parses(page: Path) -> None:
    wrong = {line: found for line in command_lines(text_of(page)) if (found := problem(line))}
    assert not wrong


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_readme_has_command_lines(page: Path) -> None:
    assert len(command_lines(text_of(page))) >= 8


@pytest.mark.parametrize(
    "line",
    ["gptworks pretrain laptop", "gptworks run laptop --speed 3", "gptworks run laptop train.stepz=3",
     "gptworks run laptop model.depth=6", "gptworks run desktop", "gptworks evaluate FOLDER [--contxt N]"],
)  # fmt: skip
def test_a_wrong_command_line_is_found(line: str) -> None:
    assert problem(line)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of a few steps instead of the demo's."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(20_000))
    small = {
        "data.train": str(text), "tokenizer.vocab_size": 300, "model.parameters": "30k", "train.time_budget_s": None,
        "train.max_steps": 2, "train.context": 32, "train.batch_tokens": 64, "train.threads": 1,
    }  # fmt: skip
    load = configuration.load
    monkeypatch.setattr(configuration, "load", lambda recipe, overrides: load(recipe, {**overrides, **small}))
    monkeypatch.chdir(tmp_path)
    api.train("laptop", "runs/laptop")
    blocks = [block for kind, block in FENCE.findall(text_of(READMES[0])) if kind == "python"]
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "runs" / "second" / "model").is_dir()


def test_the_first_screen_installs_and_runs_in_three_lines() -> None:
    for page in READMES:
        kind, commands = FENCE.findall(text_of(page))[0]
        assert kind == "sh" and len(commands.splitlines()) == 3
        assert "pip install" in commands and commands.endswith("gptworks run laptop\n")
        before = text_of(page).split("```")[0]
        assert "docs/report.png" in before and len(before.splitlines()) < 12


def test_readmes_have_the_same_code_blocks() -> None:
    english, chinese = (FENCE.findall(text_of(page)) for page in READMES)
    assert english == chinese


def test_readmes_have_the_same_structure_and_links() -> None:
    def shape(text: str) -> list[str]:
        return re.findall(r"^#+ |^<!-- .* -->$", FENCE.sub("", text), re.MULTILINE)

    def links(text: str) -> list[str]:
        return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README")]

    english, chinese = (text_of(page) for page in READMES)
    assert shape(english) == shape(chinese)
    assert links(english) == links(chinese)


def test_readmes_have_the_same_figures() -> None:
    block = re.compile(r"<!-- numbers -->(.*?)<!-- /numbers -->", re.DOTALL)
    english, chinese = (block.findall(text_of(page)) for page in READMES)
    assert len(english) == len(chinese) == 1
    assert re.findall(r"\d[\d.,]*\d|\d", english[0]) == re.findall(r"\d[\d.,]*\d|\d", chinese[0])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text_of(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    assert not broken


def test_the_table_of_keys_is_what_docs_keys_writes() -> None:
    spec = importlib.util.spec_from_file_location("keys", ROOT / "docs" / "keys.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = text_of(ROOT / "docs" / "commands.md")
    assert module.filled(page) == page, "run: python docs/keys.py"
    for key in KEYS:
        assert f"| `{key}` |" in page


def test_every_command_and_option_is_documented() -> None:
    page = text_of(ROOT / "docs" / "commands.md")
    missing = [name for name in COMMANDS if f"`gptworks {name}`" not in page]
    options = {flag for command in COMMANDS.values() for parameter in command.params for flag in parameter.opts}
    missing += sorted(flag for flag in options if flag.startswith("--") and not re.search(rf"`{flag}[` ]", page))
    assert not missing


def test_every_recipe_is_documented() -> None:
    for name in configuration.recipe_names():
        assert f"\n## {name}\n" in text_of(ROOT / "docs" / "recipes.md")
        assert all(f"| `{name}` |" in text_of(page) for page in READMES)


@pytest.mark.parametrize("name", configuration.recipe_names())
def test_every_choice_of_a_recipe_is_explained(name: str) -> None:
    section = text_of(ROOT / "docs" / "recipes.md").split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = " ".join(line.split(" | ")[0] for line in section.splitlines() if line.startswith("| "))
    recipe = yaml.safe_load(configuration.recipe_text(name))
    sections = ("data", "tokenizer", "model", "adapter", "train")
    chosen = [(key, value) for part in sections for key, value in recipe.get(part, {}).items()]
    spelled = {f"{key}: {str(value).lower() if isinstance(value, bool) else value}`" for key, value in chosen}
    assert not {choice for choice in spelled if choice not in rows}
    assert len(re.findall(r"[a-z_]+: ", rows)) == len(spelled)  # and nothing that the recipe does not say


def test_exit_codes_in_the_docs_are_those_of_the_errors() -> None:
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")} | {0}
    page = text_of(ROOT / "docs" / "commands.md").split("## Exit codes")[1].split("##")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes
    for readme in READMES:
        line = next(part for part in text_of(readme).split("\n\n") if part.startswith("0 "))
        assert {int(code) for code in re.findall(r"(?:^|· ?\n?)(\d+) ", line)} == codes


def test_the_tree_in_the_docs_is_the_package() -> None:
    page = text_of(ROOT / "docs" / "architecture.md").split("## The tree")[1]
    tree = FENCE.findall(page)[0][1].split("examples/nano.py")[0]
    named, folders = set(), list[str]()
    for line in tree.splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders[indent // 2 - 1 :] = [name]
        if not name.endswith("/"):
            named.add("".join(folders))
    package = ROOT / "gptworks"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert named - {"reporting/style.css", "reporting/hover.js"} == {
        name for name in files if not re.search("/__init__.py$", name)
    }


def test_pre_commit_runs_what_make_check_runs() -> None:
    rule = text_of(ROOT / "Makefile").split("\ncheck:")[1].split("\n\n")[0]
    made = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule.splitlines()[1:]]
    hooks = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == made


def test_yaml_recipes_in_the_docs_are_valid() -> None:
    found = [block for page in PAGES for kind, block in FENCE.findall(text_of(page)) if kind == "yaml"]
    assert found
    for block in found:
        configuration.build(yaml.safe_load(block), "docs")
