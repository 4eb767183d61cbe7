"""How the package reads: docstrings that stand alone, names that say what they hold, calls that can be read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gptworks

ROOT = Path(gptworks.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
# A docstring is shown in an editor's hover, without the name above it: these words only complete that name.
ELLIPSES = re.compile(r"(What|Whether|Of|As|So much|So many|The same|Where|How|Why|From|That of|With the)\b")
VAGUE = {"found", "made", "given", "held"}
MOST_POSITIONAL = 3
Definition = ast.FunctionDef | ast.AsyncFunctionDef


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}"


def test_the_first_line_of_a_docstring_is_a_sentence_that_stands_alone() -> None:
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (Definition, ast.ClassDef)) and (text := ast.get_docstring(node)):
                paragraph = text.split("\n\n")[0]
                if ELLIPSES.match(text) or not re.search(r"[.:!]\)?$", paragraph):
                    wrong.append(f"{place(path, node)} {node.name}: {text.splitlines()[0]}")
    assert not wrong, f"{len(wrong)} docstrings:\n" + "\n".join(wrong)


def test_local_names_say_what_they_hold() -> None:
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else None
            stored = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
            if stored and name in VAGUE:
                wrong.append(f"{place(path, node)} {name}")
    assert not wrong, f"{len(wrong)} names:\n" + "\n".join(wrong)


def ours(tree: ast.Module) -> set[str]:
    """Names in a module that stand for functions or classes of the package, and for its modules as `module.`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptworks"):
            for alias in node.names:
                names |= {alias.asname or alias.name, f"{alias.asname or alias.name}."}
    for node in tree.body:
        if isinstance(node, (Definition, ast.ClassDef)):
            names.add(node.name)
    return names


# Functions that take any number of things alike.
VARIADIC = {
    node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, Definition) and node.args.vararg
}


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Calls of what is ours, with its name."""
    names = ours(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if name in names:
                yield node, name
            case ast.Attribute(value=ast.Name(id=base), attr=name) if f"{base}." in names or base == "self":
                yield node, name


def test_no_call_of_ours_has_more_than_three_positional_arguments() -> None:
    wrong = []
    for path, tree in TREES.items():
        for node, name in calls(tree):
            spread = any(isinstance(argument, ast.Starred) for argument in node.args)
            if len(node.args) > MOST_POSITIONAL and not spread and name not in VARIADIC:
                wrong.append(f"{place(path, node)} {name}")
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong)


def test_no_function_returns_four_values() -> None:
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            annotated = isinstance(node, Definition) and isinstance(node.returns, ast.Subscript)
            if not annotated or ast.unparse(node.returns.value) != "tuple":
                continue
            inner = node.returns.slice
            fixed = isinstance(inner, ast.Tuple) and not any(ast.unparse(e) == "..." for e in inner.elts)
            if fixed and len(inner.elts) >= 4 and node.name not in ("backward",):  # torch asks as many of it
                wrong.append(f"{place(path, node)} {node.name}")
    assert not wrong, f"{len(wrong)} functions:\n" + "\n".join(wrong)
