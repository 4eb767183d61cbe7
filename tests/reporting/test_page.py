"""report.html: one file, nothing from outside, readable without its script, whatever the run folder holds."""

import base64
import hashlib
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

from gptworks.core import config as configuration
from gptworks.core import folder
from gptworks.core.config import Change, RunFile
from gptworks.core.errors import DataError
from gptworks.reporting.chart import MOST_POINTS, Series, chart, decades, thin, ticks
from gptworks.reporting.markup import language
from gptworks.reporting.page import write_range_test, write_report

NASTY = "<script>alert(1)</script>\"'&\x00\x1b[31m\ud800 </pre><img src=https://example.com/x>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A parsed page: its tags, its text, and a check that tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""  # that a person sees
        self.script = ""
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
        if self._open[-1:] == ["script"]:
            self.script += data
        elif self._open[-1:] != ["style"]:
            self.text += data

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    def of(self, name: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of every tag of a name that has certain ones."""
        return [attrs for tag, attrs in self.tags if tag == name and wanted.items() <= attrs.items()]

    def cells(self, style: str) -> list[list[str]]:
        """The cells of a table's rows as text, the head's too."""
        inner = re.search(rf'<table class="{style}">(.*?)</table>', self.source, re.DOTALL)
        found_rows = re.findall(r"<tr>(.*?)</tr>", inner[1] if inner else "")
        return [
            [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
            for row in found_rows
        ]

    def hover(self) -> list[dict[str, Any]]:
        """What a pointer shows over each chart."""
        return [json.loads(str(attrs["data-hover"])) for attrs in self.of("figure")]

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
    "findings": ["source  documents", "a.txt  3", "b.txt  5", "total  8", "3 empty documents were dropped"],
    "splits": {"train": {"tokens": 9001, "documents": 7, "bytes": 20000}, "eval": {"tokens": 1000, "documents": 1}},
    "found": [
        {"source": "a.txt", "documents": 3, "bytes": 2636741, "tokens": 950218, "copies": 0,
         "length": {"p5": 45717, "p50": 104168, "p95": 300001, "max": 300002}, "letters": {"Latin": 0.9, "Han": 0.1}},
        {"source": "b.txt", "documents": 5, "bytes": 7, "tokens": 2, "copies": 4, "length": {}, "letters": {}},
        {"source": "total", "documents": 8, "bytes": 2636748, "tokens": 950220, "copies": 4, "length": {}},
    ],
}  # fmt: skip
PASSAGE = {"step": 20, "tokens": 5, "loss": 2.0, "pieces": [
    ["<|eos|>", []], ["The", [0.25]], [" sea", [5.5]], ["\n", [1.0]], ["海", [1.5, 1.75]],
]}  # fmt: skip
ACCOUNT = {
    "recipe": "tiny",
    "seconds": {"preparing": 2.0, "training": 10.0, "evaluating": 6.0, "sampling": 1.5, "saving": 0.5},
}
CHOICES = {"facts": {"base": {"name": "tale/model", "architecture": {"family": "llama", "hidden_size": 64}}}}
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
    (run / "passage.json").write_text(json.dumps(PASSAGE))
    (run / "run.json").write_text(json.dumps(ACCOUNT))
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "data" / "manifest.json").write_text(json.dumps(MANIFEST))
    (run / "model" / "gptworks.json").write_text(json.dumps(LINEAGE))
    (run / "model" / "manifest.json").write_text('{"files": {"model.safetensors": {"bytes": 1, "sha256": "feed"}}}')
    return run


def write_rows(run: Path, made: list[Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


SECTIONS = [
    "Curves", "Held-out text, token by token", "Evaluation", "Where the time went", "Data", "Samples over time",
    "The finished model", "Configuration, with reasons", "Lineage",
]  # fmt: skip


def test_a_finished_run_has_every_section_and_its_figures(full: Path) -> None:
    page = Page(write_report(full))
    assert page.headings == SECTIONS
    for figure in ("1.2345", "1.781", "3.437", "813k", "512 tokens/s", "41.0%", "60.7 GFLOP/s", "0.61 GB", "12 s",
                   "9,001", "3 empty documents", "blocks of 32", "validation.jsonl", "early words", "king walked",
                   "cd" * 32, "ab" * 32, "feed", "none, trained from scratch"):  # fmt: skip
        assert figure in page.text, figure


def test_the_page_needs_nothing_from_outside(full: Path, tmp_path: Path) -> None:
    rates = {"rates": [0.1, 1.0], "smoothed": [4.0, 3.0], "lr": 0.3}
    for path in (write_report(full), write_range_test(tmp_path / "find_lr.html", **rates, reason="it falls")):
        page = Page(path)
        assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form", "video"}
        for _, attrs in page.tags:
            assert not {name for name in attrs if name in ("src", "href", "srcset", "data") or name.startswith("on")}
        assert not re.search(r"https?://|@import|url\(", page.source)
        assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML|location|WebSocket|beacon", page.script)


def test_the_only_script_that_may_run_is_the_one_of_the_page(full: Path) -> None:
    page = Page(write_report(full))
    assert page.of("script") == [{}] and page.script
    policy = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_without_its_script_the_page_hides_nothing(full: Path) -> None:
    """All of it stands in the markup; the script only adds what a pointer shows."""
    page = Page(write_report(full))
    assert not page.of("noscript") and not any("hidden" in attrs for _, attrs in page.tags)
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style
    for rule in re.findall(r"([^{}]*)\{[^{}]*(?:display: none|visibility|opacity: 0[ ;])[^{}]*\}", style[1]):
        assert re.search(r"thead|summary|\.told", rule), rule  # of tables on narrow pages, and in print
    body = page.source.split("<body>")[1].split("<script>")[0]
    for shown in ("<polyline", "unigrams 4.815", "5.50 nats", ">early words<", "<table", "1.2345"):
        assert shown in body, shown


def test_every_text_from_a_file_is_escaped(full: Path, tiny_config: Callable[..., Any]) -> None:
    clean = {tag for tag, _ in Page(write_report(full)).tags}
    write_rows(full, [*rows(), {"step": 20, "sample": NASTY, f"eval/{NASTY}": 1.0}])
    made = [{"prompt": NASTY, "text": NASTY, "finish_reason": NASTY}]
    scores = {"loss": 1.0, "bits_per_byte": 1.0, "method": NASTY, "data": NASTY, "baselines": {NASTY: {"loss": 2.0}}}
    result = RESULT | {"recipe": NASTY, "stopped": NASTY, "generation": made, "evaluation": scores}
    (full / "result.json").write_text(json.dumps(result))
    manifest = {"split": NASTY, "tokenizer": NASTY, "findings": [NASTY] * 3, "splits": {NASTY: {"tokens": 1}},
                "found": [{"source": NASTY, "letters": {NASTY: 1.0}, "documents": NASTY}]}  # fmt: skip
    (full / "data" / "manifest.json").write_text(json.dumps(manifest))
    parents = [{"path": NASTY, "sha256": NASTY}]
    (full / "model" / "gptworks.json").write_text(json.dumps({NASTY: NASTY, "data": NASTY, "parents": parents}))
    (full / "passage.json").write_text(json.dumps({"step": NASTY, "pieces": [[NASTY, [1.0]], [NASTY, NASTY], NASTY]}))
    (full / "run.json").write_text(json.dumps({"recipe": NASTY, "seconds": {NASTY: 1.0, "training": NASTY}}))
    base = {"architecture": {"family": NASTY, "hidden_size": NASTY}, "name": NASTY}
    (full / "choices.json").write_text(json.dumps({"facts": {"base": base}}))
    asked = tiny_config(**{"data.train": "<script>a"})
    reasons = {"train.threads": "<script>b", "train.lr": "<script>c"}
    text = RunFile(full / "config.yaml", tiny.chosen(asked), asked, reasons).text()
    (full / "config.yaml").write_text(text + "'<script>d': {'<script>e': '<script>f', '<script>g': null}\n")

    page = Page(write_report(full))
    assert {tag for tag, _ in page.tags} <= clean and len(page.of("script")) == 1
    assert page.text.count("<script>alert(1)</script>\"'&\ufffd\ufffd[31m? </pre><img") >= 10
    for letter in "abcdefg":
        assert f"<script>{letter}" in page.text, letter


def test_whatever_a_line_is_called_is_text_in_a_chart(tmp_path: Path) -> None:
    drawn = chart(NASTY, [Series(NASTY, "train", [(1, 2.0), (2, 1.0)]), Series("b", "eval", [(1, 1.0)])])
    (tmp_path / "chart.html").write_text(drawn, encoding="utf-8")
    page = Page(tmp_path / "chart.html")
    assert not {tag for tag, _ in page.tags} & {"script", "img", "pre"}
    assert page.hover()[0]["lines"][0]["name"].startswith("<script>alert(1)</script>\"'&")


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
        ("passage.json", {"Held-out text, token by token"}),
        ("run.json", set()),
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


def test_null_and_nonsense_values_never_raise_or_print_nan(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "fsync", lambda path: None)  # of a hundred pages
    values = [None, float("nan"), float("inf"), "x", True, [1], 10**400, 1e308, -1e308, 2.5]
    tags = ("train/loss", "eval/loss", "train/grad_norm")
    odd = [{"step": step} | dict.fromkeys(tags, value) for step, value in enumerate(values)]
    write_rows(full, [*odd, [], 3, None, {"step": None}, {"step": "x"}, {"sample": "y"}, {"step": 9, "sample": None}])
    page = Page(write_report(full))
    assert [len(points) for points in page.lines("train")] == [1, 1]  # the one number among them
    assert not re.search(r"\b(nan|inf|None)\b", page.text)

    (full / "config.yaml").write_text("train: {max_steps: 12}\n")  # which is read each time

    def hollow(tree: Any, leaf: Any) -> Any:
        if isinstance(tree, dict):
            return {key: hollow(value, leaf) for key, value in tree.items()}
        return [hollow(value, leaf) for value in tree] if isinstance(tree, list) and tree else leaf

    for leaf in (None, "text", [], {}, -1, float("nan")):
        for name, tree in (("result.json", RESULT), ("data/manifest.json", MANIFEST), ("model/gptworks.json", LINEAGE),
                           ("passage.json", PASSAGE), ("run.json", ACCOUNT), ("choices.json", CHOICES)):  # fmt: skip
            (full / name).write_text(json.dumps(hollow(tree, leaf)))
        write_report(full)
        for key in RESULT:
            (full / "result.json").write_text(json.dumps(RESULT | {key: leaf}))
            write_report(full)


@pytest.mark.parametrize(
    "name", ["config.yaml", "result.json", "data/manifest.json", "model/gptworks.json", "run.json", "passage.json"]
)
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


# -- what there is to look at -------------------------------------------------------------------------------------


def test_a_page_is_named_after_its_run_with_the_recipe_beside_it(full: Path) -> None:
    page = Page(write_report(full))
    assert re.search(r"<title>full · gptworks</title>", page.source)
    assert re.search(r"<h1>full <span[^>]*>recipe tiny</span></h1>", page.source)
    (full / "result.json").unlink()
    shutil.rmtree(full / "model")
    assert "recipe tiny" in Page(write_report(full)).text  # of a run under way


def test_a_pointer_shows_the_values_of_the_log(full: Path) -> None:
    loss, *small = Page(write_report(full)).hover()
    names = {line["name"]: line["points"] for line in loss["lines"]}
    assert [name for _, name in loss["heads"]][:2] == ["step 1 · 256 tokens · 0.5 s", "step 2 · 512 tokens · 1 s"]
    factor = 1.781 / 1.2345
    told = [f"{4 / step:.4g} nats/token · {4 / step * factor:.3f} bits/byte" for step in range(1, 21)]
    assert [text for _, _, text in names["training"]] == told
    assert [x for x, _, _ in names["evaluation"]] == [25.0, 50.0, 75.0, 100.0]
    assert [text for _, _, text in small[0]["lines"][0]["points"]] == [f"{1e-3 * step:.4g}" for step in range(1, 21)]


def test_the_curve_has_a_line_for_each_simpler_method_and_two_axes(full: Path) -> None:
    page = Page(write_report(full))
    levels = [float(str(attrs["y1"])[:-1]) for attrs in page.of("line", **{"class": "level"})]
    points = page.hover()[0]["lines"][0]["points"]  # 4 and 2 nats at the first two steps
    nats = [4 - 2 * (y - points[0][1]) / (points[1][1] - points[0][1]) for y in levels]
    factor = 1.781 / 1.2345
    assert sorted(nats) == pytest.approx([2.947 / factor, 4.815 / factor], abs=0.01)
    assert "unigrams 4.815 bits/byte" in page.text and "xz -9e 2.947 bits/byte" in page.text
    marks = {float(y): float(right) for y, right in zip(
        re.findall(r'class="y" x="-8"[^>]*>([\d.]+)<', page.source),
        re.findall(r'class="r" x="100%"[^>]*>([\d.]+)<', page.source), strict=False)}  # fmt: skip
    assert len(marks) >= 3 and all(right == pytest.approx(y * factor, abs=0.006) for y, right in marks.items())
    assert ">512<" in page.source or ">1.28k<" in page.source  # tokens below the steps


def test_each_token_of_the_held_out_text_has_the_colour_and_the_figure_of_its_loss(full: Path) -> None:
    page = Page(write_report(full))
    tokens = re.search(r'<div class="passage"[^>]*>(.*?)</div>', page.source, re.DOTALL)
    assert tokens
    drawn = re.findall(r'<span(?: class="([^"]*)")?(?: title="([^"]*)")?>([^<]*)</span>', tokens[1])
    assert drawn == [
        ("first", "", "&lt;|eos|&gt;"), ("", "0.25 nats", "The"), ("l5", "5.50 nats", " sea"),
        ("l1 n", "1.00 nats", "\n"), ("l3", "3.25 nats in 2 tokens", "海"),
    ]  # fmt: skip
    assert "2.00 nats on average over 5 tokens" in page.text


def test_a_text_that_is_known_well_has_finer_colours(full: Path) -> None:
    (full / "passage.json").write_text(json.dumps({"pieces": [["a", [0.3]], ["b", [1.9]], ["c", [0.0]]]}))
    source = write_report(full).read_text()
    assert 'class="l1" title="0.30 nats">a<' in source and 'class="l7" title="1.90 nats">b<' in source
    assert "2 and more nats" in source


def test_the_bar_of_the_time_has_the_shares_of_the_account(full: Path) -> None:
    page = Page(write_report(full))
    shares = {str(a["class"]): str(a["style"]) for a in page.of("span") if str(a.get("class")) in ACCOUNT["seconds"]}
    assert shares == {name: f"width:{5 * seconds:.2f}%" for name, seconds in ACCOUNT["seconds"].items()}
    assert "training 10 s 50%" in page.text and "saving 0.5 s 2%" in page.text


def test_the_data_is_a_table_with_a_cell_for_each_figure(full: Path) -> None:
    page = Page(write_report(full))
    head, first, second, total = page.cells("found")
    assert head == ["source", "documents", "bytes", "tokens", "p5", "p50", "p95", "max", "copies", "letters"]
    assert first == ["a.txt", "3", "2,636,741", "950,218", "45,717", "104,168", "300,001", "300,002", "0",
                     "Latin 90%, Han 10%"]  # fmt: skip
    assert second[0] == "b.txt" and second[-1] == "no letters" and total[2] == "2,636,748"
    assert page.text.count("documents were dropped") == 1 and "a.txt  3" not in page.text  # no table as text beside it


def test_an_adapters_page_says_of_which_base_it_is_and_what_tuning_gained(full: Path) -> None:
    asked = configuration.load(None, {"model.path": "tale/model", "adapter.kind": "lora", "data.train": "songs.txt"})
    chosen = tiny.chosen(configuration.load(None, {"data.train": "songs.txt"}))
    RunFile(full / "config.yaml", chosen.model_copy(update={
        "model": asked.model, "adapter": asked.adapter}), asked).write()  # fmt: skip
    (full / "choices.json").write_text(json.dumps(CHOICES))
    write_rows(full, [{"step": 0, "eval/loss": 4.938, "eval/bits_per_byte": 7.124}, *rows()])
    (full / "result.json").write_text(json.dumps(RESULT | {"parameters": 1_000_000, "trained_parameters": 92_400}))
    text = Page(write_report(full)).text
    assert "An adapter (LoRA of rank 16) for the llama model (width 64) tale/model, trained on songs.txt" in text
    assert "92,400 of 1,000,000 parameters (9.2%)" in text
    assert "from 7.124 to 1.781 bits/byte (−75%) and from 4.9380 to 1.2345 nats/token" in text
    assert "before training7.1244.9380" in text  # a bar among the others


def test_what_a_person_asked_for_is_told_apart_from_the_recipe(full: Path) -> None:
    asked = configuration.load("laptop", ["train.lr=0.5", "data.train=mine.txt", "train.time_budget_s=null"])
    RunFile(full / "config.yaml", tiny.chosen(asked, vocab_size=1024), asked).write()
    (full / "result.json").write_text(json.dumps(RESULT | {"recipe": "laptop"}))
    page = Page(write_report(full))
    own = page.cells("config")
    assert [row[:2] for row in own] == [
        ["data.train", "mine.txt"], ["train.time_budget_s", "null"], ["train.lr", "0.5"],
    ]  # fmt: skip
    folded = page.source[page.source.index("<details>") : page.source.index("</details>")]
    assert folded.count("asked for by the recipe") > 5 and folded.count(">asked for<") == 3
    assert "Asked for beside the recipe laptop" in page.text


def test_changes_are_told_in_words(full: Path, tiny_config: Callable[..., Any]) -> None:
    changes = [Change(step=3, lr=0.01), Change(step=5, length=30, why="train.max_steps=30, was 12")]
    changes += [Change(step=step, length=30, pace=True, why=f"plan {step}") for step in (6, 7, 8, 9)]
    config = tiny_config(**{"train.changes": [{"step": 3, "lr": 0.01}]})
    RunFile(full / "config.yaml", tiny.chosen(tiny_config()), config, changes=changes).write()
    page = Page(write_report(full))
    assert "from step 3: train.lr=0.01" in page.text and "from step 5: train.max_steps=30, was 12" in page.text
    assert "4 times the plan of the time budget was made anew" in page.text  # folded
    assert '{"' not in re.sub(r"data-hover='[^']*'", "", page.source.split("</style>")[1].split("<script>")[0])


def test_a_model_that_is_worse_than_counting_says_so(full: Path) -> None:
    assert "worse than counting" not in Page(write_report(full)).text
    scores = RESULT["evaluation"] | {"bits_per_byte": 5.0}  # type: ignore[operator]
    (full / "result.json").write_text(json.dumps(RESULT | {"evaluation": scores}))
    assert "worse than counting tokens: the model has seen 5.12k tokens" in Page(write_report(full)).text


@pytest.mark.parametrize(
    ("text", "attribute"),
    [("第一回 甄士隐梦幻识通灵", ' lang="zh"'), ("これは本です", ' lang="ja"'), ("그는 갔다", ' lang="ko"'),
     ("the sea 海", ""), ("", ""), ("123 !?", "")],
)  # fmt: skip
def test_the_language_of_a_text_is_told_by_its_letters(text: str, attribute: str) -> None:
    assert language(text) == attribute


def test_chinese_text_is_marked_as_such(full: Path) -> None:
    write_rows(full, [*rows(), {"step": 20, "sample": "宝玉听了，便笑道"}])
    (full / "passage.json").write_text(json.dumps({"pieces": [["黛玉", [4.0]], ["道", [1.0]]]}, ensure_ascii=False))
    page = Page(write_report(full))
    assert len(page.of("pre", lang="zh")) == 1 and len(page.of("div", lang="zh")) == 1


def test_a_page_of_four_hundred_steps_is_small(full: Path) -> None:
    write_rows(full, [row for row in rows(400, 40) if row["step"] % 4 == 0 or row["step"] == 1 or "sample" in row])
    pieces = [["　　红楼", [9.123, 0.456]] for _ in range(600)]
    (full / "passage.json").write_text(json.dumps({"step": 400, "pieces": pieces}))
    generation = [{"prompt": "宝玉", "text": "听了" * 200, "tokens": 120, "finish_reason": "length"}] * 2
    (full / "result.json").write_text(json.dumps(RESULT | {"generation": generation}))
    assert 60_000 < write_report(full).stat().st_size < 150_000
    write_rows(full, rows(5000, 500))
    assert write_report(full).stat().st_size < 300_000  # nor does a long one grow without end
