"""The tree of tests is that of the package: a module is tested in the file of its name, or in one named here."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "gptworks"
ELSEWHERE = {  # modules without a test file of their name, by the file that tests them
    "core/test_config.py": [
        "core/config/messages",
        "core/config/recipe",
        "core/config/reference",
        "core/config/run_file",
        "core/config/schema",
    ],
    "core/test_folder.py": ["core/runtime"],
    "data/test_loader.py": ["data/batch"],
    "data/test_shards.py": ["data/split"],
    "data/test_sources.py": ["data/text"],
    "data/test_tokenizer.py": ["data/published", "data/sentencepiece"],
    "exporting/test_gguf.py": ["exporting/exporter", "exporting/gguf_tokenizer"],
    "infer/test_chat.py": ["infer/template"],
    "infer/test_scoring.py": ["model/heads"],
    "model/test_adapters.py": ["model/lowbit", "model/peft"],
    "model/test_attention.py": ["model/rope"],
    "model/test_families.py": ["model/build"],
    "model/test_hub.py": ["model/card"],
    "model/test_parity.py": ["model/mlp", "model/transformer"],
    "model/test_refusals.py": ["model/config"],
    "model/test_transforms.py": ["model/linear"],
    "planning/test_choose.py": ["planning/choices", "planning/machine", "planning/size"],
    "reporting/test_page.py": ["reporting/chart", "reporting/markup", "reporting/reading"],
    "system/test_campaigns.py": ["core/failpoint"],
    "system/test_change.py": ["training/change"],
    "system/test_problems.py": ["core/registry", "training/assemble", "training/outcome", "training/problem"],
    "system/test_processes.py": ["core/ranks"],
    "system/test_resume.py": ["training/identity", "training/metrics", "training/train"],
    "test_cli.py": ["core/errors", "infer/terminal", "lifecycle", "printed"],
    "test_surface.py": ["core/results"],
    "training/test_gradients.py": ["training/objectives"],
    "training/test_hooks.py": ["planning/budget"],
    "training/test_limits.py": ["training/decide", "training/timing"],
    "training/test_regularisers.py": ["training/pretraining", "training/range_test"],
}


def test_every_module_has_a_test_file_of_its_name_or_an_entry_here() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("[!_]*.py")}
    without = {name for name in modules if not (TESTS / f"{Path(name).parent}/test_{Path(name).name}.py").is_file()}
    assert without == {name for names in ELSEWHERE.values() for name in names}


def test_what_is_named_here_exists() -> None:
    assert not [file for file in ELSEWHERE if not (TESTS / file).is_file()]


def test_a_folder_of_tests_is_named_after_a_package_or_after_what_it_tries() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - packages == {"benchmarks", "examples", "fixtures", "golden", "peers", "system"}
