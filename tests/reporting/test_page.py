"""report.html: one file, no script, nothing from outside, whatever the run folder holds."""

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny

from gptworks.core.config import RunFile
from gptworks.core.errors import DataError
from gptworks.reporting.chart import MOST_POINTS, decades, thin, ticks
from gptworks.reporting.page import write_report

NASTY = "<script>alert(1)</script>\"'&\x00\x1b[31m\ud800 </pre><img src=https://example.com/x>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A parsed page: its tags, its text, and a check that tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    def lines(self, style: str) -> list[list[str]]:
        """The points of every polyline of a class."""
        lines = [attrs for tag, attrs in self.tags if tag == "polyline" and attrs["class"] == style]
        return [str(attrs["points"]).split() for attrs in lines]


def rows(steps: int = 20, every_eval: int = 5) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        made.append({
            "step": step, "train/loss": 4 / step, "train/grad_norm": 1.0, "train/learning_rate": 1e-3 * step,
            "train/tokens": 256 * step, "train/tokens_per_second": 5000.0 + step, "train/mfu": 0.4,
            "train/data_wait": 0.01, "train/seconds": 0.5 * step, "train/memory_gib": 0.5,
        })  # fmt: skip
        if step % every_eval == 0:
            made.append({"step": step, "eval/loss": 4.5 / step, "eval/bits_per_byte": 2.0, "eval/perplexity": 9.0})
    return made + [{"step": 2, "sample": "early words"}, {"step": steps, "sample": "late words"}]


RESULT = {
    "steps": 20, "tokens": 5120, "seconds": 12.5, "train_seconds": 10.0, "tokens_per_second": 512.0, "mfu": 0.41,
    "matmul_gflops": 60.7, "peak_memory_bytes": 613_000_000, "parameters": 812_672, "stopped": "reached step 20",
    "train": {"loss": 0.2}, "eval": {"loss": 1.2345, "perplexity": 3.437, "bits_per_byte": 1.781}, "recipe": "tiny",
    "evaluation": {
        "loss": 1.2345, "bits_per_byte": 1.781, "tokens": 999, "bytes": 1998, "method": "blocks of 32",
        "data": "data/validation.jsonl", "tokens_per_second": 18387.3,
        "baselines": {"unigram": {"loss": 3.3373, "bits_per_byte": 4.815}, "xz": {"bytes": 9, "bits_per_byte": 2.947}},
    },
    "generation": [{"prompt": "the ", "text": "king walked", "tokens": 2, "finish_reason": "stop"}],
}  # fmt: skip
MANIFEST = {
    "split": "validation: 10.00% of the documents", "tokenizer": "ab" * 32,
    "findings": ["3 empty documents were dropped"],
    "splits": {"train": {"tokens": 9001, "documents": 7, "bytes": 20000}, "eval": {"tokens": 1000, "documents": 1}},
}  # fmt: skip
LINEAGE = {"gptworks": "0.1.0", "recipe": "tiny", "data_sha256": ["cd" * 32], "parents": [], "config": {"hidden": 1}}


@pytest.fixture
def full(tmp_path: Path, tiny_config: Callable[..., Any]) -> Path:
    """A synthetic finished run."""
    run = tmp_path / "full"
    (run / "data").mkdir(parents=True)
    (run / "model").mkdir()
    asked = tiny_config()
    resolved = tiny_config(**{"train.lr": 0.006, "train.micro_batch": 8, "generate.prompts": ["the ", "a  # b"]})
    reasons = {"train.lr": "falls with the width  # squared", "generate.prompts": "two <b>prompts</b>"}
    RunFile(run / "config.yaml", tiny.chosen(resolved), asked, reasons).write()
    write_rows(run, rows())
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "data" / "manifest.json").write_text(json.dumps(MANIFEST))
    (run / "model" / "gptworks.json").write_text(json.dumps(LINEAGE))
    (run / "model" / "manifest.json").write_text('{"files": {"model.safetensors": {"bytes": 1, "sha256": "feed"}}}')
    return run


def write_rows(run: Path, made: list[Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


SECTIONS = [
    "Curves", "Samples over time", "The finished model", "Evaluation", "Speed and memory", "Data",
    "Configuration, with reasons", "Lineage",
]  # fmt: skip


def test_a_finished_run_has_every_section_and_its_figures(full: Path) -> None:
    page = Page(write_report(full))
    assert page.headings == SECTIONS
    for figure in ("1.2345", "1.781", "3.437", "812", "512 tokens/s", "41.0%", "60.7 GFLOP/s", "0.61 GB", "12 s",
                   "9,001", "3 empty documents", "blocks of 32", "validation.jsonl", "early words", "king walked",
                   "cd" * 32, "ab" * 32, "feed", "none, trained from scratch"):  # fmt: skip
        assert figure in page.text, figure


def test_the_page_needs_nothing_from_outside_and_runs_nothing(full: Path) -> None:
    page = Page(write_report(full))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.tags:
        assert not {name for name in attrs if name in ("src", "href", "srcset", "data") or name.startswith("on")}
    assert not re.search(r"https?://|@import|url\(", page.source)
    policy = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_text_from_a_file_is_escaped(full: Path, tiny_config: Callable[..., Any]) -> None:
    clean = {tag for tag, _ in Page(write_report(full)).tags}
    write_rows(full, [*rows(), {"step": 20, "sample": NASTY}])
    made = [{"prompt": NASTY, "text": NASTY, "finish_reason": NASTY}]
    scores = {"loss": 1.0, "bits_per_byte": 1.0, "method": NASTY, "data": NASTY, "baselines": {NASTY: {"loss": 2.0}}}
    result = RESULT | {"recipe": NASTY, "stopped": NASTY, "generation": made, "evaluation": scores}
    (full / "result.json").write_text(json.dumps(result))
    manifest = {"split": NASTY, "tokenizer": NASTY, "findings": [NASTY], "splits": {NASTY: {"tokens": 1}}}
    (full / "data" / "manifest.json").write_text(json.dumps(manifest))
    parents = [{"path": NASTY, "sha256": NASTY}]
    (full / "model" / "gptworks.json").write_text(json.dumps({NASTY: NASTY, "data": NASTY, "parents": parents}))
    asked = tiny_config(**{"data.train": "<script>a"})
    reasons = {"train.threads": "<script>b", "train.lr": "<script>c"}
    text = RunFile(full / "config.yaml", tiny.chosen(asked), asked, reasons).text()
    (full / "config.yaml").write_text(text + "'<script>d': {'<script>e': '<script>f', '<script>g': null}\n")

    page = Page(write_report(full))
    assert {tag for tag, _ in page.tags} <= clean
    assert page.text.count("<script>alert(1)</script>\"'&\ufffd\ufffd[31m? </pre><img") >= 10
    for letter in "abcdefg":
        assert f"<script>{letter}" in page.text, letter


def test_curves_have_a_point_for_each_logged_row(full: Path) -> None:
    page = Page(write_report(full))
    assert [len(points) for points in page.lines("train")] == [20, 20, 20, 20]  # loss, rate, norm, speed
    assert [len(points) for points in page.lines("eval")] == [4]
    assert sum(tag == "circle" for tag, _ in page.tags) == 4
    loss = [tuple(map(float, point.split(","))) for point in page.lines("train")[0]]
    assert [x for x, _ in loss] == [5.0 * step for step in range(1, 21)]  # per cent of the last step
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # a falling loss goes down the page
    assert all(0 <= y <= 100 for _, y in loss)


def test_reasons_and_what_was_asked_stand_beside_each_value(full: Path) -> None:
    source = write_report(full).read_text(encoding="utf-8")
    cells = {html.unescape(row[0]): row[1:] for row in re.findall(
        r"<tr><td><code>(.*?)</code></td><td><code>(.*?)</code></td><td>(.*?)</td></tr>", source)}  # fmt: skip
    assert cells["lr"] == ("0.006", "falls with the width  # squared")
    assert cells["prompts"][1] == "two &lt;b&gt;prompts&lt;/b&gt;"  # not cut at the "#" inside the value
    assert "asked for" in cells["hidden_size"][1]
    assert "default" in cells["clip"][1]
    assert "asked for" not in cells["clip"][1]
    assert "micro_batch" in cells and "depth" not in cells  # a key that nobody set is in the line below the table
    assert re.search(r"not set: [^<]*\bdepth\b", source)


def test_a_value_that_differs_from_what_was_asked_shows_both(full: Path, tiny_config: Callable[..., Any]) -> None:
    RunFile(full / "config.yaml", tiny.chosen(tiny_config(**{"train.max_steps": 24})), tiny_config()).write()
    assert re.search(r"max_steps\s*24\s*asked for as 12", Page(write_report(full)).text)


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("result.json", {"The finished model", "Evaluation"}),
        ("metrics.jsonl", {"Curves", "Samples over time"}),
        ("data", {"Data"}),
        ("model/gptworks.json", set()),
        ("model", {"Lineage"}),
        ("config.yaml", {"Configuration, with reasons"}),
    ],
)
def test_a_missing_part_leaves_out_its_section_only(full: Path, missing: str, sections: set[str]) -> None:
    if missing == "model":
        (full / "data" / "manifest.json").write_text(json.dumps(MANIFEST | {"tokenizer": None}))
    shutil.rmtree(full / missing) if (full / missing).is_dir() else (full / missing).unlink()
    page = Page(write_report(full))
    assert [name for name in SECTIONS if name not in sections] == page.headings
    assert "cannot be read" not in page.text


def test_a_run_with_only_its_configuration_says_that_nothing_is_logged(full: Path) -> None:
    for path in full.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(full))
    assert page.headings == ["Configuration, with reasons"]
    assert "no step logged yet" in page.text


def test_a_run_in_progress_shows_where_it_is(full: Path) -> None:
    (full / "result.json").unlink()
    shutil.rmtree(full / "model")
    with open(full / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 21, "train/lo')  # being written
    page = Page(write_report(full))
    assert "not finished: step 20 of 12" in page.text  # the tiny configuration asks for 12
    assert "10 s" in page.text and "0.54 GB" in page.text  # so far, from the log


def test_null_and_nonsense_values_never_raise_or_print_nan(full: Path) -> None:
    values = [None, float("nan"), float("inf"), "x", True, [1], 10**400, 1e308, -1e308, 2.5]
    tags = ("train/loss", "eval/loss", "train/grad_norm")
    odd = [{"step": step} | dict.fromkeys(tags, value) for step, value in enumerate(values)]
    write_rows(full, [*odd, [], 3, None, {"step": None}, {"step": "x"}, {"sample": "y"}, {"step": 9, "sample": None}])
    page = Page(write_report(full))
    assert [len(points) for points in page.lines("train")] == [1, 1]  # the one number among them
    assert not re.search(r"\b(nan|inf|None)\b", page.text)

    def hollow(tree: Any, leaf: Any) -> Any:
        if isinstance(tree, dict):
            return {key: hollow(value, leaf) for key, value in tree.items()}
        return [hollow(value, leaf) for value in tree] if isinstance(tree, list) and tree else leaf

    for leaf in (None, "text", [], {}, -1, float("nan")):
        for name, tree in (("result.json", RESULT), ("data/manifest.json", MANIFEST), ("model/gptworks.json", LINEAGE)):
            (full / name).write_text(json.dumps(hollow(tree, leaf)))
        write_report(full)
        for key in RESULT:
            (full / "result.json").write_text(json.dumps(RESULT | {key: leaf}))
            write_report(full)


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "data/manifest.json", "model/gptworks.json"])
@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_broken_file_is_named_on_the_page(full: Path, name: str, content: bytes) -> None:
    (full / name).write_bytes(content)
    assert f"{Path(name).name} cannot be read" in Page(write_report(full)).text


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_beside_them(full: Path) -> None:
    first = write_report(full).read_bytes()
    assert write_report(full).read_bytes() == first
    assert not list(full.glob(".*"))


def test_no_folder_is_an_error_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(("low", "high"), [(1.44, 3.75), (0, 0.02), (4.2, 4.2), (0, 0), (-3, 1e6), (1e-9, 1.1e-9)])
def test_ticks_are_even_and_enclose_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low + 1e-9 * abs(low) and high - 1e-9 * abs(high) <= marks[-1]
    gaps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    assert max(gaps) == pytest.approx(min(gaps)) and min(gaps) > 0


@pytest.mark.parametrize(("low", "high"), [(0.3, 40), (1e-20, 1e30), (1, 100)])
def test_decades_enclose_the_values(low: float, high: float) -> None:
    marks = decades(low, high)
    assert 2 <= len(marks) <= 10 and marks[0] <= low and high <= marks[-1]


def test_a_long_log_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    points[7] = (7.0, -5.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert (31_234.0, 99.0) in kept and (7.0, -5.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]
