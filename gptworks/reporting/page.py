"""report.html: what a run was, how it went and what came out, as one page that opens offline and without its script."""

import math
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.core.log import count, duration
from gptworks.reporting.chart import Axes, Point, Series, chart
from gptworks.reporting.markup import Html, code, folded, h, joined, language, page, section, sentence, show, table
from gptworks.reporting.reading import Run, get, listed, mappings, number, read_run

BASELINES = {
    "unigram": ("unigrams", "knows how frequent each token of this very text is, and nothing of their order"),
    "xz": ("xz -9e", "a compressor that has seen nothing but these bytes"),
}
KNOWN = {
    "loss", "bits_per_byte", "perplexity", "grad_norm", "learning_rate", "epoch", "tokens", "tokens_per_second", "mfu",
    "data_wait", "seconds", "memory_gib", "skipped", "loss_scale", "expert_busiest", "experts_unused",
}  # fmt: skip
LABELS = {"data": "trained on", "data_sha256": "SHA-256 of the data", "parents": "parent"}
TIMES = ("preparing", "training", "evaluating", "sampling", "saving")
LEVELS = 8  # of colour above the first
LEVEL_NATS = (0.25, 0.5, 1.0, 1.5, 2.0)  # that a level may be
PACES = 3  # changes of a time budget's plan, of which more are folded


def write_report(run: Path) -> Path:
    """Writes run/report.html from what the run folder holds so far; a part that is not there is left out.

    A file that cannot be read is named on the page. Raises StorageError, and DataError if `run` is no folder.
    """
    if not run.is_dir():
        raise DataError(f"{run}: no such run folder")
    facts = read_run(run)
    parts = (
        headline, curves, changes, held_out, evaluation, times, data, samples, finished, configuration, lineage,
    )  # fmt: skip
    body = "\n".join(text for part in parts if (text := part(facts)))
    folder.write_text(run / "report.html", page(facts.name, body))
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
    folder.write_text(path, page("Learning rate", body))
    return path


# -- the sections, in the order of the page ----------------------------------------------------------------------


def headline(run: Run) -> str:
    result = run.result
    if result:
        end = str(result.get("stopped") or "")
        end = f"({end})" if end and not end.startswith("reached step") else ""
        how = joined(" ", show(result.get("steps"), "{:,.0f} steps"), end)
    else:
        lengths = (change.get("length") for change in reversed(run.changes))
        length = next((one for one in lengths if number(one)), run.config.get("train.max_steps"))
        total = show(length, " of {:,.0f}") or ""
        how = f"not finished: step {run.step:,.0f}{total}" if run.rows else "not finished: no step logged yet"
    loss = show(get(result, "eval", "loss") or run.last("eval/loss"), "{:.4f}")
    bits = show(get(result, "eval", "bits_per_byte") or run.last("eval/bits_per_byte"), "{:.3f}")
    continued = (number(result.get("train_seconds")) or 0) > (number(result.get("seconds")) or 0)
    whole_time = "time so far" if not result else "time of the last process" if continued else "whole time"
    trained, parameters = number(result.get("trained_parameters")), number(result.get("parameters"))
    part = f"{count(trained)} of them trained" if trained and parameters and trained < parameters else None
    before_loss, before_bits = run.before("eval/loss"), run.before("eval/bits_per_byte")
    tiles: list[tuple[str, str | None, str | None]] = [
        ("evaluation loss, nats/token", loss, show(before_loss, "{:.4f} before") if run.step else None),
        ("training loss so far", None if loss else show(run.last("train/loss"), "{:.4f}"), None),
        ("bits per byte", bits, show(before_bits, "{:.3f} before") if run.step else None),
        ("perplexity", show(get(result, "eval", "perplexity") or run.last("eval/perplexity"), "{:,.5g}"), None),
        *((f"evaluation {name}", show(run.last(f"eval/{name}"), "{:.4g}"), None) for name in own_figures(run)),
        ("parameters", show(parameters, count), part),
        ("tokens seen", show(result.get("tokens") or run.last("train/tokens"), count), None),
        (whole_time, show(result.get("seconds") or run.last("train/seconds"), duration), None),
    ]
    shown = "".join(
        f"<div><dt>{h(name)}</dt><dd>{h(value)}{f'<small>{h(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in tiles
        if value
    )
    recipe = f'<span class="recipe">recipe {h(Path(run.recipe).stem)}</span>' if run.recipe else ""
    notes = "".join(f'<p class="problem">{h(problem)}</p>' for problem in run.problems)
    told = sentence(joined("; ", what_it_is(run), how))
    return f"<header><h1>{h(run.name)} {recipe}</h1>{told}{sentence(gain(run))}{notes}<dl>{shown}</dl></header>"


def what_it_is(run: Run) -> str:
    """The model in words: its family and shape and its text; of an adapter or a tuned model, what it began as."""
    config, base = run.config, get(run.choices, "facts", "base")
    known = get(base, "architecture") or {}
    family = config.get("model.family") or get(known, "family") or "GPT"

    def size(name: str, form: Callable[[float], str]) -> str | None:
        return show(config.get(f"model.{name}") or get(known, name), form)

    shape = joined(
        ", ",
        size("hidden_size", "width {:,.0f}".format),
        size("num_hidden_layers", lambda layers: f"{layers:.0f} layer{'s' * (layers != 1)}"),
        size("num_attention_heads", lambda heads: f"{heads:.0f} head{'s' * (heads != 1)}"),
    )
    model = f"{family} model{f' ({shape})' if shape else ''}"
    text, path = places(config.get("data.train")), config.get("model.path")
    learned = f" on {text}" if text else ""
    if kind := config.get("adapter.kind"):
        name = {"lora": "LoRA"}.get(str(kind), str(kind))
        name = "DoRA" if config.get("adapter.use_dora") is True else name
        result, trained = run.result, number(run.result.get("trained_parameters"))
        whole = number(result.get("parameters"))
        share = f": {trained:,.0f} of {whole:,.0f} parameters ({trained / whole:.1%})" if trained and whole else ""
        rank = show(config.get("adapter.rank"), " of rank {:.0f}") or ""
        return f"an adapter ({name}{rank}) for the {model} {path}, trained{learned}{share}"
    return f"a {model}{f', tuned from {path}' if path else ''}{learned}"


def gain(run: Run) -> str:
    """Says what tuning gained, where a run started from a model: the figures before its first step and now."""
    parts: list[str] = []
    for tag, name, form in (("bits_per_byte", "bits/byte", "{:.3f}"), ("loss", "nats/token", "{:.4f}")):
        before, now = run.before(f"eval/{tag}"), number(get(run.result, "eval", tag)) or run.last(f"eval/{tag}")
        if before is not None and now is not None and run.step:
            change = f" ({now / before - 1:+.0%})".replace("-", "\u2212") if before > 0 and not parts else ""
            parts.append(f"from {form.format(before)} to {form.format(now)} {name}{change}")
    return f"training took the held-out text {' and '.join(parts)}" if parts else ""


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
    factor = bits_for_nats(run)
    below = [("tokens", run.series("train/tokens"), count), ("time", run.series("train/seconds"), short_time)]
    rows = tuple((name, between(points, form)) for name, points, form in below if len(points) > 1)
    axes = Axes(unit="nats/token", other_unit="bits/byte", factor=factor, below=rows)
    loss = chart("Loss by step", lines, run.step, levels=levels(run, factor), axes=axes)
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


def bits_for_nats(run: Run) -> float | None:
    """The bits/byte that a nat/token of the held-out text is."""
    for figures in (run.result.get("eval"), run.result.get("evaluation")):
        nats, bits = number(get(figures, "loss")), number(get(figures, "bits_per_byte"))
        if nats and bits and nats > 0 and bits > 0:
            return bits / nats
    nats, bits = run.last("eval/loss"), run.last("eval/bits_per_byte")
    return bits / nats if nats and bits and nats > 0 and bits > 0 else None


def levels(run: Run, factor: float | None) -> list[tuple[str, float]]:
    """Gives what simpler methods need for the held-out text, in nats/token."""
    known = []
    for name, score in mappings(get(run.result, "evaluation", "baselines")):
        bits = number(score.get("bits_per_byte"))
        if bits is not None and bits > 0 and factor:
            known.append((BASELINES.get(name, (name, ""))[0], bits / factor))
    return known


def between(points: list[Point], form: Callable[[float], str]) -> Callable[[float], str]:
    """A function: step -> the value there, on straight lines between points that begin at nothing."""
    steps, values = zip(*[(0.0, 0.0), *(point for point in points if point[0] > 0)], strict=True)

    def at(step: float) -> str:
        place = min(max(bisect_left(steps, step), 1), len(steps) - 1)
        left, right = steps[place - 1], steps[place]
        share = (step - left) / max(right - left, 1e-9)
        value = values[place - 1] + min(share, 1.0) * (values[place] - values[place - 1])
        return form(max(value, 0.0)) if value > 0 else "0"

    return at


def short_time(seconds: float) -> str:
    """A time in few characters: "79 s", "3.3 min"."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def changes(run: Run) -> str:
    """Tells what the run did otherwise from some step on."""
    lines = [(change.get("pace") is True, change_in_words(change)) for change in run.changes]
    if not lines:
        told = run.result.get("changes")
        lines = [(False, str(why)) for why in told] if isinstance(told, list) else []
    paces = [line for pace, line in lines if pace]
    few = len(paces) <= PACES
    own = [line for pace, line in lines if few or not pace]

    def items(texts: list[str]) -> str:
        return f'<ul class="remarks">{"".join(f"<li>{h(text)}</li>" for text in texts)}</ul>' if texts else ""

    more = "" if few else folded(f"{len(paces)} times the plan of the time budget was made anew", items(paces))
    return section("Changes on the way", items(own), more)


def change_in_words(change: Any) -> str:
    """A change of a run: from which step, and what."""
    if not isinstance(change, dict):
        return str(change)
    values = change.get("values")
    parts = [
        show(change.get("length"), "the run has {:,.0f} steps"),
        "the rate falls from here to the end" if change.get("decay") is True else None,
        *(show(change.get(name), f"train.{name}={{:g}}") for name in ("lr", "adam_lr")),
        *(f"{key}={value}" for key, value in (values.items() if isinstance(values, dict) else ())),
    ]
    what = str(change.get("why") or joined(", ", *parts) or "nothing")
    return f"from step {change.get('step')}: {what}"


def held_out(run: Run) -> str:
    """Held-out text, each token coloured by its loss."""
    pieces = run.passage.get("pieces")
    drawn: list[tuple[str, list[float]]] = []
    losses: list[float] = []
    text = ""
    for piece in pieces if isinstance(pieces, list) else ():
        match piece:
            case [str(part), list(own)]:
                values = [value for each in own if (value := number(each)) is not None]
                drawn.append((part, values))
                losses += values
                text += part
    if not losses:
        return ""
    at = show(run.passage.get("step"), " after step {:,.0f}") or ""
    mean = sum(losses) / len(losses)
    told = (
        f"the beginning of the held-out text, which the model was not trained on, as it reads it{at}: the stronger a "
        f"token's colour, the more it surprised; {mean:.2f} nats on average over {len(losses):,} tokens"
    )
    most = sorted(losses)[int(0.95 * len(losses))]
    nats = next((size for size in LEVEL_NATS if most < LEVELS * size), LEVEL_NATS[-1])
    names = [*(f"{nats * level:g}" for level in range(LEVELS)), f"{nats * LEVELS:g} and more nats"]
    scale = "".join(f'<span class="l{level}">{name}</span>' for level, name in enumerate(names))
    return section(
        "Held-out text, token by token",
        sentence(told),
        f'<div class="scale"><span class="told">0: known beforehand</span>{scale}</div>',
        f'<div class="passage"{language(text)} dir="auto">{"".join(token(*piece, nats) for piece in drawn)}</div>',
    )


def token(text: str, losses: list[float], nats: float) -> str:
    """A piece of text on the colour of its loss, of which a level is so many nats and which stands in the title."""
    whole = sum(losses)
    level = min(max(int(whole / nats), 0), LEVELS)
    several = f" in {len(losses)} tokens" if len(losses) > 1 else ""
    style = joined(
        " ", f"l{level}" if losses and level else None if losses else "first", "n" if text.startswith("\n") else None
    )
    title = f' title="{whole:.2f} nats{several}"' if losses else ""
    return f"<span{f' class={chr(34)}{style}{chr(34)}' if style else ''}{title}>{h(text)}</span>"


def passage(prompt: str, text: str, *caption: str | None) -> str:
    lines = "".join(f"<span>{h(part)}</span>" for part in caption if part)
    of = language(prompt + text)
    return f'<li><div>{lines}</div><pre dir="auto"{of}><i>{h(prompt)}</i>{h(text)}</pre></li>'


def samples(run: Run) -> str:
    """Shows what the model wrote on its way."""
    prompts, loss = run.config.get("generate.prompts"), None
    prompt = str(prompts[0]) if isinstance(prompts, list) and prompts else ""
    items = []
    for row in run.rows:
        loss = show(row.get("train/loss"), "training loss {:.2f}") or loss
        if (text := row.get("sample")) is not None:
            known = prompt if str(text).startswith(prompt) else ""
            items.append(passage(known, str(text)[len(known) :], f"step {row['step']:,.0f}", loss))
    return section("Samples over time", f'<ol class="samples">{"".join(items)}</ol>' if items else "")


def finished(run: Run) -> str:
    """Shows what the finished model wrote."""
    items = []
    for generation in listed(run.result.get("generation")):
        facts = (
            show(generation.get("tokens"), "{:,.0f} tokens"),
            show(generation.get("tokens_per_second"), "{:,.0f} tokens/s"),
        )
        end = f"ended by {generation['finish_reason']}" if generation.get("finish_reason") else None
        prompt, text = (str(generation.get(name) or "") for name in ("prompt", "text"))
        items.append(passage(prompt, text, *facts, end))
    return section("The finished model", f'<ol class="samples">{"".join(items)}</ol>' if items else "")


def evaluation(run: Run) -> str:
    result = run.result.get("evaluation")
    if not isinstance(result, dict):
        return ""
    scores: list[tuple[Any, str, Any]] = [(Html(f"<b>{h(run.name)}</b>"), "", result)]
    before = {"loss": run.before("eval/loss"), "bits_per_byte": run.before("eval/bits_per_byte")}
    if all(before.values()):
        scores.append(("before training", "the model that this run started from", before))
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
    counted = number(get(result, "baselines", "unigram", "bits_per_byte"))
    worse = counted is not None and bits[0] > counted
    seen = show(run.result.get("tokens"), count) or "few"
    short = f"that is worse than counting tokens: the model has seen {seen} tokens and wants more time"
    return section(
        "Evaluation",
        f"<p>{h(over)}</p>" if over else "",
        table("scores", rows, "", "bits/byte", "nats/token", "bits per byte: shorter is better"),
        sentence(short) if worse else "",
    )


def times(run: Run) -> str:
    """Shows where the time went, how fast it was, and the memory that it took."""
    result, waits = run.result, [value for _, value in run.series("train/data_wait")]
    rate = show(result.get("matmul_gflops"), "of the {:,.1f} GFLOP/s that a matmul reached on this machine")
    steps, whole = number(result.get("train_seconds")), number(result.get("seconds"))
    spent = [(name, number(get(run.account, "seconds", name)) or 0.0) for name in TIMES]
    told = bool(get(run.account, "seconds", "training"))  # it is once a process has ended
    gib = run.last("train/memory_gib")
    memory = result.get("peak_memory_bytes") or (gib and gib * 2**30)
    first = next(iter(listed(result.get("generation"))), {})
    mean = result.get("tokens_per_second") or run.last("train/tokens_per_second")
    rest = whole - steps if whole and steps and whole > steps and not told else None
    rows = [
        ("training", show(mean, "{:,.0f} tokens/s"), ""),
        ("model FLOPs utilization", show(result.get("mfu") or run.last("train/mfu"), "{:.1%}"), rate or ""),
        ("data wait", show(sum(waits) / len(waits) if waits else None, "{:.2%}"), "of the time in steps"),
        ("time in training steps", None if told else show(steps or run.last("train/seconds"), duration), ""),
        ("time in all else", show(rest, duration), ""),
        ("evaluation", show(get(result, "evaluation", "tokens_per_second"), "{:,.0f} tokens/s"), ""),
        ("generation", show(first.get("tokens_per_second"), "{:,.0f} tokens/s"), "one text at a time"),
        ("peak memory", show(memory, lambda value: f"{value / 1e9:.2f} GB"), ""),
    ]
    return section("Where the time went", time_bar(spent) if told else "", table("facts", rows))


def time_bar(spent: list[tuple[str, float]]) -> str:
    """One bar of all the time, and a legend with each part of it."""
    spent = [(name, seconds) for name, seconds in spent if seconds > 0]
    whole = sum(seconds for _, seconds in spent)
    parts = "".join(f'<span class="{name}" style="width:{100 * s / whole:.2f}%"></span>' for name, s in spent)
    names = ""
    for name, seconds in spent:
        share = f"{seconds / whole:.0%}" if seconds / whole >= 0.005 else "under 1%"
        names += f'<li class="{name}">{name} <b>{h(duration(seconds))}</b> <small>{share}</small></li>'
    spoken = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent)
    return f'<div class="times" role="img" aria-label="{h(spoken)}">{parts}</div><ul class="legend">{names}</ul>'


def data(run: Run) -> str:
    names = {"train": "training", "eval": "validation"}
    splits = mappings(run.data.get("splits"))
    sizes = ("tokens", "documents", "bytes")
    rows = [(names.get(name, name), *(show(one.get(key), "{:,.0f}") for key in sizes)) for name, one in splits]
    sources, findings = listed(run.data.get("found")), run.data.get("findings")
    lines = [str(line) for line in findings] if isinstance(findings, list) else []
    lines = lines[len(sources) + (len(sources) > 1) :]  # before them stands the table as text
    items = "".join(f"<li>{h(line)}</li>" for line in lines)
    remarks = f'<ul class="remarks">{items}</ul>' if items else ""
    if findings == []:
        remarks = sentence("reading it found nothing amiss")
    told = sentence(str(run.data.get("split") or ""))
    return section("Data", told, table("counts", rows, "split", *sizes), found_in(sources), remarks)


def found_in(sources: list[dict[str, Any]]) -> str:
    """The table of what reading found in each source."""
    many = any((number(source.get("documents")) or 0) > 1 for source in sources)
    spread = ("p5", "p50", "p95", "max") if many else ()

    def cells(source: dict[str, Any]) -> tuple[Any, ...]:
        sizes = [source.get("documents"), source.get("bytes"), source.get("tokens")]
        lengths = [get(source, "length", name) for name in spread]
        letters = source.get("letters")
        shares = list(letters.items())[:3] if isinstance(letters, dict) else []
        scripts = [f"{script} {share:.0%}" for script, of in shares if (share := number(of) or 0.0) >= 0.005]
        numbers = (show(value, "{:,.0f}") or "–" for value in (*sizes, *lengths, source.get("copies")))
        name = Path(str(source.get("source") or "")).name
        return (Html(f"<code>{h(name)}</code>") if name else "", *numbers, ", ".join(scripts) or "no letters")

    head = ("source", "documents", "bytes", "tokens", *spread, "copies", "letters")
    drawn = table("found", map(cells, sources), *head)
    note = "p5, p50, p95 and max are tokens of a document: of a hundred, five are at most as long as p5, half as p50"
    return drawn + (f"<p><small>{h(note)}.</small></p>" if drawn and many else "")


def configuration(run: Run) -> str:
    """Lists what the person asked for, and folded below it every value with its reason."""
    recipe = run.asked_by_recipe()

    def who(key: str) -> str | None:
        if key not in run.asked:
            return None
        if recipe is None:
            return "asked for"
        return "recipe" if key in recipe and recipe[key] == run.asked[key] else "you"

    groups: dict[str, list[tuple[Any, ...]]] = {}
    unset: dict[str, list[str]] = {}
    own: list[tuple[Any, ...]] = []
    for key, value in run.config.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, [])
        asked, why = who(key), h(run.reasons.get(key, ""))
        if asked:
            spelled = Html("") if run.asked[key] == value else Html(f" as {setting(key, run.asked[key])}")
            told = "asked for" if asked == "you" else "asked for by the recipe" if asked == "recipe" else asked
            why = Html(
                joined(
                    "; ", f'<span class="{"by-recipe" if asked == "recipe" else "asked"}">{told}</span>{spelled}', why
                )
            )
        elif value is None and not why:
            unset.setdefault(group, []).append(name)
            continue
        row = setting(key, value), why or Html('<span class="default">default</span>')
        groups[group].append((code(name), *row))
        if asked and asked != "recipe":
            differs = Html(f"asked for{spelled}") if spelled else ""
            own.append((code(key), setting(key, value), run.reasons.get(key, "") or differs))
    parts = []
    for group, rows in groups.items():
        parts.append(f"<h3>{h(group or 'recipe')}</h3>{table('config', rows)}")
        parts.append(f'<p class="unset">not set: {h(", ".join(unset[group]))}</p>' if group in unset else "")
    of = f"the recipe {Path(run.recipe).stem} and nothing else" if recipe is not None else ""
    told = "" if recipe is None else sentence(f"asked for beside the recipe {run.recipe}" if own else of)
    if own and recipe is None:
        told = sentence("asked for, in the recipe or beside it")
    every = folded(f"All {len(run.config)} settings, with reasons", *parts) if run.config else ""
    return section("Configuration, with reasons", told if run.config else "", table("config", own), every)


def setting(key: str, value: Any) -> Html:
    """A value as config.yaml has it; lists of mappings in words."""
    if key == "train.changes" and isinstance(value, list) and value:
        return h("; ".join(change_in_words(change) for change in value))
    if listed(value):
        return h(places(value))
    return code(value)


def lineage(run: Run) -> str:
    rows: list[tuple[str, Any]] = []
    for key, value in run.lineage.items():
        parts = value if isinstance(value, list) else [value]
        parts = [] if key in ("config", "metrics", "split") else [one for one in parts if one not in (None, "", {})]
        lines = [code(joined(" · ", *map(str, one.values())) if isinstance(one, dict) else one) for one in parts]
        rows.append((LABELS.get(key, key), Html("<br>".join(lines)) if lines else None))
    if run.lineage and not run.lineage.get("parents"):
        rows.append(("parent", "none, trained from scratch"))
    weights = [
        entry.get("sha256") for name, entry in mappings(run.weights.get("files")) if name.endswith(".safetensors")
    ]
    for label, digest in (("tokenizer fingerprint", run.data.get("tokenizer")), ("SHA-256 of the weights", weights)):
        told = joined(", ", *map(str, digest)) if isinstance(digest, list) else digest
        rows.append((label, code(told) if told else None))
    return section("Lineage", table("facts", rows))
