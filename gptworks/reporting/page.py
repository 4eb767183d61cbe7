"""report.html: what a run was, how it went and what came out, as one page that opens offline and runs no script."""

import html
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.core.log import count, duration
from gptworks.reporting.chart import Series, chart

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
BASELINES = {
    "unigram": ("unigrams", "knows how frequent each token of this very text is, and nothing of their order"),
    "xz": ("xz -9e", "a compressor that has seen nothing but these bytes"),
}
KNOWN = {
    "loss", "bits_per_byte", "perplexity", "grad_norm", "learning_rate", "epoch", "tokens", "tokens_per_second", "mfu",
    "data_wait", "seconds", "memory_gib", "skipped", "loss_scale", "expert_busiest", "experts_unused",
}  # fmt: skip
LABELS = {"data": "trained on", "data_sha256": "SHA-256 of the data", "parents": "parent"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title} · gptworks</title>
<style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def write_report(run: Path) -> Path:
    """Writes run/report.html from what the run folder holds so far; a part that is not there is left out.

    A file that cannot be read is named on the page. Raises StorageError, and DataError if `run` is no folder.
    """
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder")
    facts = read_run(run)
    parts = (headline, curves, samples, evaluation, speed, data, configuration, lineage)
    style = (resources.files("gptworks.reporting") / "style.css").read_text(encoding="utf-8")
    body = "\n".join(text for part in parts if (text := part(facts)))
    folder.write_text(run / "report.html", PAGE.format(title=h(title(facts)), style=style, body=body))
    return run / "report.html"


def write_range_test(path: Path, rates: list[float], smoothed: list[float], lr: float, reason: str) -> Path:
    """Writes the page of a learning-rate range test: the smoothed loss over the rate, and the proposal. Raises
    StorageError."""
    low = math.log10(min(rates))
    points = [(math.log10(rate) - low, loss) for rate, loss in zip(rates, smoothed, strict=True)]
    ceiling = 1.2 * smoothed[0]  # a loss that explodes would flatten the rest
    lowest = min(smoothed)
    lines = [
        Series("smoothed loss", "train", [(x, min(y, ceiling)) for x, y in points]),
        Series("proposed", "eval", [(math.log10(lr) - low, lowest), (math.log10(lr) - low, ceiling)]),
    ]
    drawn = chart("Loss, nats/token, by learning rate", lines, across_label=lambda x: f"{10 ** (low + x):.1e}")
    body = f"<header><h1>Learning rate</h1><p>train.lr={lr:g}: {h(reason)}.</p></header>" + section("Range test", drawn)
    style = (resources.files("gptworks.reporting") / "style.css").read_text(encoding="utf-8")
    folder.write_text(path, PAGE.format(title="Learning rate", style=style, body=body))
    return path


# -- reading -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The content of a run folder so far; empty for a file that is not there."""

    name: str
    config: dict[str, Any]  # dotted key -> value; so are the next two
    asked: dict[str, Any]
    reasons: dict[str, str]
    rows: list[dict[str, Any]]  # of metrics.jsonl; `step` is a number
    result: dict[str, Any]
    data: dict[str, Any]
    lineage: dict[str, Any]
    weights: dict[str, Any]
    problems: list[str]

    @property
    def step(self) -> float:
        return max((row["step"] for row in self.rows), default=0)

    def series(self, tag: str) -> list[tuple[float, float]]:
        points = [(row["step"], number(row.get(tag))) for row in self.rows]
        return sorted((step, value) for step, value in points if value is not None)

    def last(self, tag: str) -> float | None:
        return next((value for _, value in reversed(self.series(tag))), None)


def read_run(run: Path) -> Run:
    problems: list[str] = []

    def load(path: Path, parse: Callable[[str], Any] = json.loads, errors: str = "strict") -> dict[str, Any]:
        try:
            folder.check_regular(path)
            tree = parse(path.read_text(encoding="utf-8", errors=errors))
            if not isinstance(tree, dict):
                raise ValueError("not a mapping")
        except FileNotFoundError:
            return {}
        except (DataError, OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}")
            return {}
        return tree

    config = load(run / "config.yaml", read_config)
    values = config.get("values", {})
    return Run(
        name=run.resolve().name,
        config=values,
        asked=config.get("asked", {}),
        reasons=config.get("reasons", {}),
        rows=load(run / "metrics.jsonl", read_rows, errors="replace").get("rows", []),
        result=load(run / "result.json"),
        data=load(Path(str(values.get("data.shards") or run / "data")) / folder.MANIFEST),
        lineage=load(run / "model" / "gptworks.json"),
        weights=load(run / "model" / folder.MANIFEST),
        problems=problems,
    )


def read_rows(text: str) -> dict[str, Any]:
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that is being written
        if isinstance(row, dict) and number(row.get("step")) is not None:
            rows.append(row)
    return {"rows": rows}


def read_config(text: str) -> dict[str, Any]:
    """The values of config.yaml, what was asked, and the reason of each value, all by dotted key."""
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise ValueError("not a mapping")
    asked, reasons = flatten(tree.pop("asked", None)), tree.pop("reasons", None)
    tree.pop("changes", None)  # result.json tells them in words
    reasons = {str(key): str(why) for key, why in reasons.items()} if isinstance(reasons, dict) else {}
    return {"values": flatten(tree), "asked": asked, "reasons": reasons}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        deeper = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return flat


def get(tree: Any, *names: str) -> Any:
    """tree[a][b]..., or None where a step is missing."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def number(value: Any) -> float | None:
    """A number that can be drawn, or None: a log may hold null, NaN or text where a value was expected."""
    try:
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(float(value)) < 1e300
    except OverflowError:
        return None
    return float(value) if usable else None


# -- writing -----------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is markup already; everything else is escaped on its way into the page."""


def h(value: Any) -> Html:
    """Any value as markup: escaped, control characters and lone surrogates replaced."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(CONTROL.sub("\ufffd", text)))


def code(value: Any) -> Html:
    """A value as config.yaml spells it, in fixed width."""
    plain = isinstance(value, str) and value.isprintable() and value
    return Html(f"<code>{h(value if plain else json.dumps(value, ensure_ascii=False, default=str))}</code>")


def show(value: Any, form: str | Callable[[float], str]) -> str | None:
    """A number by a format string or a function; None if it is no number."""
    value_shown = number(value)
    if value_shown is None:
        return None
    return form.format(value_shown) if isinstance(form, str) else form(value_shown)


def sentence(text: str) -> str:
    return f"<p>{h(text[:1].upper() + text[1:])}.</p>" if text else ""


def joined(by: str, *parts: str | None) -> str:
    return by.join(part for part in parts if part)


def section(name: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{h(name)}</h2>{body}</section>" if body else ""


def table(style: str, rows: Iterable[tuple[Any, ...]], *head: str) -> str:
    """Rows whose second cell, the value, is None are left out; so is a table without rows."""
    kept = [row for row in rows if row[1] is not None]
    lines = ["".join(f"<td>{h('–' if cell is None else cell)}</td>" for cell in row) for row in kept]
    top = "".join(f"<th>{h(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{style}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>' if body else ""


# -- the sections, in the order of the page ----------------------------------------------------------------------


def title(run: Run) -> str:
    recipe = run.result.get("recipe") or run.lineage.get("recipe")
    return Path(str(recipe)).stem if recipe else run.name


def headline(run: Run) -> str:
    config, result = run.config, run.result
    shape = joined(
        ", ",
        show(config.get("model.hidden_size"), "width {:,.0f}"),
        show(config.get("model.num_hidden_layers"), "{:.0f} layers"),
        show(config.get("model.num_attention_heads"), "{:.0f} heads"),
    )
    text, base = places(config.get("data.train")), config.get("model.path")
    what = f"a {config.get('model.family') or 'GPT'} model{f' ({shape})' if shape else ''}"
    what += (f" on {text}" if text else "") + (f", continued from {base}" if base else "")
    if result:
        end = f"({result['stopped']})" if result.get("stopped") else None
        how = joined(" ", show(result.get("steps"), "{:,.0f} steps"), end)
    else:
        total = show(config.get("train.max_steps"), " of {:,.0f}") or ""
        how = f"not finished: step {run.step:,.0f}{total}" if run.rows else "not finished: no step logged yet"
    loss = show(get(result, "eval", "loss") or run.last("eval/loss"), "{:.4f}")
    bits = show(get(result, "eval", "bits_per_byte") or run.last("eval/bits_per_byte"), "{:.3f}")
    continued = (number(result.get("train_seconds")) or 0) > (number(result.get("seconds")) or 0)
    whole_time = "time so far" if not result else "time of the last process" if continued else "whole time"
    tiles = [
        ("evaluation loss, nats/token", loss),
        ("training loss so far", None if loss else show(run.last("train/loss"), "{:.4f}")),
        ("bits per byte", bits),
        ("perplexity", show(get(result, "eval", "perplexity") or run.last("eval/perplexity"), "{:,.5g}")),
        *((f"evaluation {name}", show(run.last(f"eval/{name}"), "{:.4g}")) for name in own_figures(run)),
        (whole_time, show(result.get("seconds") or run.last("train/seconds"), duration)),
        ("parameters", show(result.get("parameters"), count)),
        ("tokens seen", show(result.get("tokens") or run.last("train/tokens"), count)),
    ]
    shown = "".join(f"<div><dt>{h(name)}</dt><dd>{h(value)}</dd></div>" for name, value in tiles if value)
    told = sentence(joined("; ", what, how))
    notes = "".join(f'<p class="problem">{h(problem)}</p>' for problem in run.problems)
    return f"<header><h1>{h(title(run))}</h1>{told}{notes}<dl>{shown}</dl></header>"


def own_figures(run: Run) -> list[str]:
    """The figures that the run's problem logs beside those of every run, in the order of their names."""
    tags = {tag for row in run.rows for tag in row if tag.startswith(("train/", "eval/"))}
    return sorted({tag.partition("/")[2] for tag in tags} - KNOWN)


def places(value: Any) -> str:
    """data.train in words: a mixture as its paths with their weights."""
    parts = value if isinstance(value, list) else [value]
    named = (f"{p.get('path')} (weight {p.get('weight')})" if isinstance(p, dict) else str(p) for p in parts if p)
    return ", ".join(named)


def curves(run: Run) -> str:
    evals, best = run.series("eval/loss"), ""
    if len(evals) > 1:
        step, lowest = min(evals, key=lambda point: point[1])
        best = sentence(f"the lowest evaluation loss was {lowest:.4f}, at step {step:,.0f} of {run.step:,.0f}")
    lines = [Series("training", "train", run.series("train/loss")), Series("evaluation", "eval", evals, dots=True)]
    loss = chart("Loss, nats/token, by step", lines, run.step)
    small = "".join(
        chart(name, [Series(name, "train", run.series(f"train/{tag}"))], last_step=run.step, from_zero=from_zero)
        for name, tag, from_zero in (
            ("Learning rate", "learning_rate", True),
            ("Gradient norm", "grad_norm", False),
            ("Tokens per second", "tokens_per_second", True),
        )
    )
    for name in own_figures(run):
        lines = [Series("training", "train", run.series(f"train/{name}"))]
        lines.append(Series("evaluation", "eval", run.series(f"eval/{name}"), dots=True))
        small += chart(name.replace("_", " ").capitalize(), lines, run.step)
    return section("Curves", loss, best, f'<div class="small">{small}</div>' if small else "")


def samples(run: Run) -> str:
    def passage(prompt: str, text: str, *caption: str | None) -> str:
        lines = "".join(f"<span>{h(part)}</span>" for part in caption if part)
        return f'<li><div>{lines}</div><pre dir="auto"><i>{h(prompt)}</i>{h(text)}</pre></li>'

    def listed(items: list[str]) -> str:
        return f'<ol class="samples">{"".join(items)}</ol>' if items else ""

    prompts, loss = run.config.get("generate.prompts"), None
    prompt = str(prompts[0]) if isinstance(prompts, list) and prompts else ""
    learning, final = [], []
    for row in run.rows:
        loss = show(row.get("train/loss"), "training loss {:.2f}") or loss
        if (text := row.get("sample")) is not None:
            known = prompt if str(text).startswith(prompt) else ""
            learning.append(passage(known, str(text)[len(known) :], f"step {row['step']:,.0f}", loss))
    for generation in generations(run):
        facts = (
            show(generation.get("tokens"), "{:,.0f} tokens"),
            show(generation.get("tokens_per_second"), "{:,.0f} tokens/s"),
        )
        end = f"ended by {generation['finish_reason']}" if generation.get("finish_reason") else None
        final.append(passage(generation.get("prompt") or "", generation.get("text") or "", *facts, end))
    return section("Samples over time", listed(learning)) + section("The finished model", listed(final))


def generations(run: Run) -> list[dict[str, Any]]:
    generation = run.result.get("generation")
    return [one for one in generation if isinstance(one, dict)] if isinstance(generation, list) else []


def evaluation(run: Run) -> str:
    result = run.result.get("evaluation")
    if not isinstance(result, dict):
        return ""
    scores: list[tuple[Any, str, Any]] = [(Html(f"<b>{h(title(run))}</b>"), "", result)]
    for name, score in mappings(result.get("baselines")):
        scores.append((*BASELINES.get(name, (name, "")), score))
    bits = [number(get(score, "bits_per_byte")) or 0.0 for _, _, score in scores]
    rows = []
    for own, (name, meaning, score) in sorted(zip(bits, scores, strict=True), key=lambda pair: pair[0]):
        bar = f'<span class="bar" style="width:{100 * own / (max(bits) or 1):.1f}%"></span><small>{h(meaning)}</small>'
        losses = show(get(score, "bits_per_byte"), "{:.3f}") or "–", show(get(score, "loss"), "{:.4f}")
        rows.append((name, *losses, Html(bar)))
    source = Path(str(result["data"])).name if result.get("data") else None
    size = joined(", ", show(result.get("tokens"), "{:,.0f} tokens"), show(result.get("bytes"), "{:,.0f} bytes"))
    over = joined(", ", source, size, f"in {result['method']}" if result.get("method") else None)
    return section(
        "Evaluation",
        f"<p>{h(over)}</p>" if over else "",
        table("scores", rows, "", "bits/byte", "nats/token", "bits per byte: shorter is better"),
    )


def mappings(tree: Any) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a mapping that are mappings; none of anything else."""
    return [(str(name), one) for name, one in tree.items() if isinstance(one, dict)] if isinstance(tree, dict) else []


def speed(run: Run) -> str:
    result, waits = run.result, [value for _, value in run.series("train/data_wait")]
    rate = show(result.get("matmul_gflops"), "of the {:,.1f} GFLOP/s that a matmul reached on this machine")
    steps, whole = number(result.get("train_seconds")), number(result.get("seconds"))
    gib = run.last("train/memory_gib")
    memory = result.get("peak_memory_bytes") or (gib and gib * 2**30)
    first = next(iter(generations(run)), {})
    mean = result.get("tokens_per_second") or run.last("train/tokens_per_second")
    rows = [
        ("training", show(mean, "{:,.0f} tokens/s"), ""),
        ("model FLOPs utilization", show(result.get("mfu") or run.last("train/mfu"), "{:.1%}"), rate or ""),
        (
            "data wait",
            show(sum(waits) / len(waits) if waits else None, "{:.2%}"),
            "of the time in steps",
        ),
        ("time in training steps", show(steps or run.last("train/seconds"), duration), ""),
        ("time in all else", show(whole - steps, duration) if whole and steps and whole > steps else None, ""),
        ("evaluation", show(get(result, "evaluation", "tokens_per_second"), "{:,.0f} tokens/s"), ""),
        ("generation", show(first.get("tokens_per_second"), "{:,.0f} tokens/s"), "one text at a time"),
        ("peak memory", show(memory, lambda value: f"{value / 1e9:.2f} GB"), ""),
    ]
    return section("Speed and memory", table("facts", rows))


def data(run: Run) -> str:
    names = {"train": "training", "eval": "validation"}
    splits = mappings(run.data.get("splits"))
    sizes = ("tokens", "documents", "bytes")
    rows = [(names.get(name, name), *(show(one.get(key), "{:,.0f}") for key in sizes)) for name, one in splits]
    findings = run.data.get("findings")
    items = "".join(f"<li>{h(line)}</li>" for line in (findings if isinstance(findings, list) else ()))
    remarks = f"<ul>{items}</ul>" if items else sentence("reading it found nothing amiss" if findings == [] else "")
    return section("Data", sentence(str(run.data.get("split") or "")), table("counts", rows, "split", *sizes), remarks)


def configuration(run: Run) -> str:
    groups: dict[str, list[tuple[str, Any, Html]]] = {}
    unset: dict[str, list[str]] = {}
    for key, value in run.config.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, [])
        why = h(run.reasons.get(key, ""))
        if key in run.asked:
            spelled = Html("") if run.asked[key] == value else Html(f" as {code(run.asked[key])}")
            why = Html(joined("; ", f'<span class="asked">asked for</span>{spelled}', why))
        elif value is None and not why:
            unset.setdefault(group, []).append(name)
            continue
        groups[group].append((code(name), code(value), why or Html('<span class="default">default</span>')))
    parts = []
    for group, rows in groups.items():
        parts.append(f"<h3>{h(group or 'recipe')}</h3>{table('config', rows)}")
        parts.append(f'<p class="unset">not set: {h(", ".join(unset[group]))}</p>' if group in unset else "")
    return section("Configuration, with reasons", *parts)


def lineage(run: Run) -> str:
    rows: list[tuple[str, Any]] = []
    for key, value in run.lineage.items():
        for one in value if isinstance(value, list) else [value]:
            if key not in ("config", "metrics", "split") and one not in (None, "", {}):
                told = joined(" · ", *map(str, one.values())) if isinstance(one, dict) else one
                rows.append((LABELS.get(key, key), code(told)))
    if run.lineage and not run.lineage.get("parents"):
        rows.append(("parent", "none, trained from scratch"))
    weights = [
        entry.get("sha256") for name, entry in mappings(run.weights.get("files")) if name.endswith(".safetensors")
    ]
    for label, digest in (("tokenizer fingerprint", run.data.get("tokenizer")), ("SHA-256 of the weights", weights)):
        told = joined(", ", *map(str, digest)) if isinstance(digest, list) else digest
        rows.append((label, code(told) if told else None))
    return section("Lineage", table("facts", rows))
