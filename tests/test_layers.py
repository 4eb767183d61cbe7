"""The shape of the package: imports point one way, nothing runs code from a file, the command line starts at once."""

import ast
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptworks
from gptworks import lifecycle
from gptworks.core import config

ROOT = Path(gptworks.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    "core", "data", "model", "planning", "infer", "exporting", "training", "lifecycle", "api", "printed", "cli",
    "__main__",
]  # fmt: skip
ASIDE = {"reporting": {"core", "reporting"}}  # beside the layers, and what it may import of ours


def module_of(path: Path) -> str:
    return ".".join(["gptworks", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def layer_of(module: str) -> str:
    return (module.split(".") + ["", ""])[1]


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports, also inside functions and relative to its own place."""
    here = module_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "gptworks" or name.startswith("gptworks."):
                yield name if name in MODULES else name.rpartition(".")[0]


def test_every_file_has_a_layer() -> None:
    layers = {layer_of(module) for module in MODULES} - {""}
    assert layers <= {*LAYERS, *ASIDE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(module_of(path))
    if own == "":  # gptworks/__init__.py hands out the names of api, lazily
        assert set(imports(path)) <= {"gptworks", "gptworks.api"}
        return
    for name in imports(path):
        target = layer_of(name)
        if own in ASIDE:
            assert target in ASIDE[own], f"{path}: {own} imports {name}"
        elif target in ASIDE:
            assert own in ("lifecycle", "api", "cli"), f"{path}: {own} imports {name}"
        else:
            assert LAYERS.index(target) <= LAYERS.index(own), f"{path}: {own} imports {name}"


def test_no_import_cycle() -> None:
    edges = {module: set(imports(path)) - {module, "gptworks"} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_a_file(path: Path) -> None:
    """Loading a model, a recipe or data never executes it; `file.py:Name` in core/registry.py is the user's own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not FORBIDDEN & {alias.name.split(".")[0] for alias in node.names}, place
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN, place
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), place
            assert called not in ("torch.load", "torch.save", "numpy.load", "np.load"), place
            assert called not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), place
            allowed = path == ROOT / "core" / "registry.py"
            assert allowed or not called.endswith("exec_module"), place
            for keyword in node.keywords:
                assert keyword.arg != "trust_remote_code", place
                on = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                assert keyword.arg not in ("shell", "allow_pickle") or on, place


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_the_package_loads_no_torch() -> None:
    assert in_fresh_process("import sys, gptworks; print('torch' in sys.modules)") == "False"


def test_no_package_takes_the_name_of_a_function() -> None:
    """Python would put the package, once imported, in the place of `gptworks.train` or `gptworks.exporting`."""
    stages = {name for name, value in vars(lifecycle).items() if callable(value)} | set(gptworks.__all__)
    packages = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not packages & stages
    for name in gptworks.__all__:
        assert callable(getattr(gptworks, name))


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['gptworks', '--help']\n"
        "from gptworks.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    assert in_fresh_process(code) == "[]"


def test_help_answers_within_half_a_second() -> None:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def once() -> float:  # of the processor's time, which other tests beside this one take little from
        start = spent()
        done = subprocess.run([sys.executable, "-m", "gptworks", "--help"], capture_output=True, check=True)
        assert b"Usage" in done.stdout
        return spent() - start

    for _ in range(3):  # a busy machine may need another try; a slow import fails every one
        if (median := statistics.median(once() for _ in range(3))) < 0.5:
            return
    pytest.fail(f"gptworks --help took {median:.2f} s")


@pytest.mark.parametrize("key", config.keys())
def test_every_key_says_whether_a_run_may_change_it_and_what_it_does(key: str) -> None:
    field = config.keys()[key]
    assert field.json_schema_extra["resume"] in ("fixed", "flexible", "free")
    assert field.description
