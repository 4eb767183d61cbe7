"""Kills, full disks, signals and bad numbers against real runs: cases of the campaign.

One tiny run is the yardstick: dropout, accumulation, clipping, a weight average, left-out spikes, best weights and
three epochs of packed documents, so that everything a run carries from step to step is in play. It is made once in
peace; every disturbed run has to end with the same bits, having trained on the same samples.
"""

import contextlib
import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaign import Bench, Trial, campaign
from sabotage import MUTANTS, REPLACED, at
from zygote import Child, shared

from gptworks.core import folder
from gptworks.core.errors import DataError
from gptworks.core.failpoint import PLACES
from gptworks.training.state import listing

WORDS = "the king and queen walked slowly over old stones nobody answered where rain sang".split()  # noqa: SIM905
STEPS, EVERY = 120, 5
SETTINGS: dict[str, Any] = {
    "tokenizer.kind": "char", "model.family": "qwen3", "model.hidden_size": 16, "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2, "model.dropout": 0.1, "train.context": 16, "train.batch_tokens": 64,
    "train.micro_batch": 1, "train.optimizer": "muon", "train.precision": "fp32", "train.compile": "false",
    "train.threads": 1, "train.max_steps": STEPS, "train.checkpoint_every": EVERY, "train.eval_every": 20,
    "train.log_every": 1, "train.tensorboard": "false", "train.clip": 0.5, "train.ema": 0.9, "train.skip_spikes": 1.5,
    "train.patience": 100, "train.reduce": "canonical", "train.timeout_s": 20,
}  # fmt: skip
TENSORS = PLACES.keys() & {"step.loss", "step.gradient", "step.weight"}
KILLS = sorted(PLACES.keys() - TENSORS)


@dataclass
class Found:
    """What a case found: how many were tried, and what was wrong, in words."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)

    def trials(self, bench: Bench, kind: str) -> Iterator[Trial]:
        """As the campaign counts: so many tried, of which so many went wrong."""
        bench.notes.update(self.facts)
        yield from (Trial(kind) for _ in range(self.tried - len(self.wrong)))
        yield from (Trial(kind, problem) for problem in self.wrong)


class Site:
    """A folder with the text, the run left in peace, and the means to start more."""

    def __init__(self, path: Path, steps: int = STEPS) -> None:
        self.path, self.steps, self.zygote = path, steps, shared()
        draw = random.Random(1)
        rows = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 30))) for _ in range(40)]
        # The held-out text is spelled backwards: learning helps it at first, so that the best weights are not the last.
        for name, each in (("text.jsonl", rows), ("held-out.jsonl", [row[::-1] for row in rows[:12]])):
            (path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in each))
        (path / "empty.yaml").write_text("{}\n")
        self.straight = path / "straight"
        code = self.zygote.run(self.command(self.straight), path / "straight.log", [f"samples={path}/straight.samples"])
        assert code == 0, (path / "straight.log").read_text()
        self.expected = end_state(self.straight, steps)
        self.samples = samples(path / "straight.samples")

    def command(self, out: Path, **settings: Any) -> list[str]:
        texts = {"data.train": str(self.path / "text.jsonl"), "data.eval": str(self.path / "held-out.jsonl")}
        values = SETTINGS | texts | {"train.max_steps": self.steps} | settings
        pairs = [f"{key}={value}" for key, value in values.items()]
        return ["train", str(self.path / "empty.yaml"), *pairs, "--out", str(out)]

    def log(self, out: Path) -> Path:
        return out.with_suffix(".log")

    def start(self, out: Path, processes: int = 1, sabotage: tuple[str, ...] = (), **env: str) -> list[Child]:
        """The command on one process, or on several as torchrun would start them."""
        if processes == 1:
            return [self.zygote.start(self.command(out), self.log(out), [*sabotage, f"samples={out}.samples.0"], **env)]
        watched = [[*sabotage, f"samples={out}.samples.{rank}"] for rank in range(processes)]
        return self.zygote.several([self.command(out)] * processes, self.log(out), watched, **env)

    def finish(self, out: Path, processes: int = 1, sabotage: tuple[str, ...] = (), **env: str) -> list[int | None]:
        return [child.wait(120) for child in self.start(out, processes, sabotage, **env)]

    def remove(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        for file in out.parent.glob(f"{out.name}.*"):
            file.unlink()


def end_state(out: Path, steps: int) -> dict[str, str]:
    """SHA-256 of everything a finished run has: its last checkpoint, its counters, its model, its logged losses."""
    last = out / "checkpoints" / f"step-{steps:08d}"
    files = {file.stem: file for file in sorted(last.glob("*.safetensors"))} | {
        "folder": out / "model/model.safetensors"
    }
    found = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    state = json.loads((last / "state.json").read_text())
    keys = ("step", "tokens", "cursor", "best_figure", "evals_since_best", "skipped", "norms")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]
    evals = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    return found | {"counters": json.dumps({key: state[key] for key in keys}), "losses": json.dumps([losses, evals])}


def samples(path: Path) -> dict[tuple[int, int, int], int]:
    """What was trained on: CRC of the tokens by (epoch, row, first row of the share); a line cut short is no line."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            epoch, row, first, crc = json.loads(line)
            known = found.setdefault((epoch, row, first), crc)
            assert known == crc, f"the rows at {epoch}, {row} are not the same twice"
    return found


def acknowledged(log: Path) -> int:
    """The last step that the run said was saved; 0 where it was killed before it opened its log."""
    if not log.exists():
        return 0
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("saved ")]
    return max((int(line.rsplit("step-", 1)[1]) for line in lines), default=0)


def newest_valid(out: Path) -> int:
    for path in reversed(listing(out / "checkpoints")):
        with contextlib.suppress(DataError):
            folder.verify(path)
            return int(path.name.removeprefix("step-"))
    return 0


# -- kills -------------------------------------------------------------------------------------------------------


def kills(
    site: Site, number: int, processes: int = 1, seed: int = 1, chain: int = 20, sabotage: tuple[str, ...] = ()
) -> Found:
    """`number` kills -9 in chains on the same run, half at random moments and half at failpoints in turn; after each,
    the newest good checkpoint is at least the one last said to be saved; each chain then runs to its end and equals the
    run in peace in every bit and sample. Of several processes one is killed, and the others have to leave in 10 s."""
    found, draw, where = Found(facts={"chains": 0, "at": {}, "lost": 0, "left_after_s": 0.0}), random.Random(seed), 0
    span = 1.0  # seconds that a start-up and the whole run take, about
    while found.tried < number:
        out = site.path / f"chain-{processes}-{found.facts['chains']}"
        site.remove(out)
        for _ in range(chain):
            if found.tried >= number:
                break
            place, rank = "", draw.randrange(processes)
            if draw.random() < 0.5:
                place = KILLS[where % len(KILLS)]
                where += 1
                hit = 1 if place.startswith(("folder.", "text.", "run.", "model.", "eval.")) else draw.randint(1, 12)
                hit += draw.randint(0, 8) if place.startswith("folder.") else 0
            env = {"GPTWORKS_FAILPOINT": f"{place}:{hit}:kill@{rank}"} if place else {}
            begun = time.monotonic()
            children = site.start(out, processes, sabotage, **env)
            if place:
                ended = children[rank].wait(60)
            else:
                ended = children[rank].wait(draw.uniform(0.0, span))
                children[rank].kill()
                ended = children[rank].wait(10) if ended is None else ended
            left = time.monotonic()
            for child in children if ended else []:
                child.kill(signal.SIGTERM)  # as torchrun does
            codes = [child.wait(20) for child in children]
            found.facts["left_after_s"] = max(found.facts["left_after_s"], round(time.monotonic() - left, 2))
            if any(code is None for code in codes):
                found.wrong.append(f"an orphan is left after a kill at {place or 'a random moment'}")
                for child in children:
                    child.kill()
            if ended == 0:
                span = 0.7 * span + 0.3 * (time.monotonic() - begun)
                break  # the run had ended before it could be killed
            if ended != -signal.SIGKILL:
                found.wrong.append(f"exit code {ended} after a kill: {tail(site.log(out))}")
                break
            found.tried += 1
            at = place or "random moment"
            found.facts["at"][at] = found.facts["at"].get(at, 0) + 1
            if newest_valid(out) < acknowledged(site.log(out)):
                found.facts["lost"] += 1
                found.wrong.append(f"step {acknowledged(site.log(out))} was said to be saved and is not ({at})")
        codes = site.finish(out, processes, sabotage)
        compare(site, out, found, f"chain {found.facts['chains']}", codes, processes)
        found.facts["chains"] += 1
        if not found.wrong:
            site.remove(out)
        elif sabotage:
            break
    return found


def compare(site: Site, out: Path, found: Found, what: str, codes: list[int | None], processes: int = 1) -> None:
    """The end of a disturbed run against the run in peace."""
    if any(code != 0 for code in codes):
        found.wrong.append(f"{what}: exit codes {codes}: {tail(site.log(out))}")
        return
    ours = end_state(out, site.steps)
    differing = [name for name in site.expected if ours.get(name) != site.expected[name]]
    found.check(not differing, f"{what}: {', '.join(differing)} differ from the run in peace")
    if processes == 1 and (out.parent / f"{out.name}.samples.0").is_file():
        try:
            seen = samples(Path(f"{out}.samples.0"))
        except AssertionError as error:
            found.wrong.append(f"{what}: {error}")
            return
        found.check(all(site.samples.get(key, crc) == crc for key, crc in seen.items()), f"{what}: other samples")
        found.check(seen.keys() <= site.samples.keys(), f"{what}: rows that the run in peace never saw")


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return " | ".join(lines[-3:])


def resume_points(site: Site, points: list[int]) -> Found:
    """A run continued from the checkpoint of every step, each to the end."""
    found, source = Found(), site.path / "every-step"
    if not source.is_dir():
        every = site.command(source) + ["train.checkpoint_every=1"]
        code = site.zygote.run(every, site.log(source), [f"keep={site.steps}"])
        assert code == 0, tail(site.log(source))
    for step in points:
        out = site.path / f"from-{step}"
        site.remove(out)
        out.mkdir()
        shutil.copy(source / "config.yaml", out)
        shutil.copy(source / "metrics.jsonl", out)
        shutil.copytree(source / "data", out / "data")
        shutil.copytree(source / "checkpoints" / f"step-{step:08d}", out / "checkpoints" / f"step-{step:08d}")
        found.tried += 1
        compare(site, out, found, f"from step {step}", site.finish(out))
        site.remove(out)
    return found


# -- signals, bad numbers, a failing system ----------------------------------------------------------------------


def signals(site: Site, cases: list[tuple[str, int]]) -> Found:
    """SIGTERM at a place: exit 75 with the state saved (or the work finished), and the same command ends equal."""
    found = Found(facts={"stopped": 0})
    for place, hit in cases:
        out = site.path / "signal"
        site.remove(out)
        begun = time.monotonic()
        (code,) = site.finish(out, GPTWORKS_FAILPOINT=f"{place}:{hit}:term")
        found.tried += 1
        found.facts["stopped"] += code == 75
        found.check(code in (0, 75), f"SIGTERM at {place}:{hit}: exit code {code}: {tail(site.log(out))}")
        found.check(time.monotonic() - begun < 60, f"SIGTERM at {place}:{hit}: slow")
        if code == 75 and "at step" in tail(site.log(out)):
            step = int(tail(site.log(out)).rsplit("at step ", 1)[1].split(";")[0])
            found.check(newest_valid(out) == step, f"SIGTERM at {place}:{hit}: step {step} is not saved")
        compare(site, out, found, f"after SIGTERM at {place}:{hit}", site.finish(out))
    return found


def bad_numbers(site: Site, cases: list[tuple[str, str, int]]) -> Found:
    """NaN or infinity in a loss, a gradient or a weight: exit 76, nothing of it on disk, and the run goes on."""
    found = Found()
    for place, value, hit in cases:
        out = site.path / "number"
        site.remove(out)
        (code,) = site.finish(out, GPTWORKS_FAILPOINT=f"{place}:{hit}:{value}")
        found.tried += 1
        found.check(code == 76, f"{value} at {place}:{hit}: exit code {code}: {tail(site.log(out))}")
        found.check(not (out / "model").exists(), f"{value} at {place}:{hit}: a model was made")
        compare(site, out, found, f"after {value} at {place}:{hit}", site.finish(out))
    return found


def failing_writes(site: Site, kind: str, most: int | None = None) -> Found:
    """The N-th write, open, fsync, rename or mkdir of a run fails, for every N (or `most` of them, evenly spread): exit
    74, what was said to be saved is intact, and the same command ends equal."""
    found, out = Found(), site.path / f"failing-{kind}"
    calls = count_writes(site, kind, out)
    numbers = (
        list(range(1, calls + 1))
        if most is None
        else sorted({1 + i * (calls - 1) // max(most - 1, 1) for i in range(most)})
    )
    for number in numbers:
        site.remove(out)
        (code,) = site.finish(out, sabotage=(f"io={kind}:{number}:{out}",))
        found.tried += 1
        struck = Path(f"{out}.calls").read_text()
        found.check(code == 74, f"{kind} at call {number}: exit code {code}: {tail(site.log(out))}; calls {struck}")
        found.check("Traceback" not in site.log(out).read_text(), f"{kind} at call {number}: a traceback")
        found.check(newest_valid(out) >= acknowledged(site.log(out)), f"{kind} at call {number}: a saved step is gone")
        compare(site, out, found, f"after {kind} at call {number}", site.finish(out))
    found.facts["calls"] = calls
    return found


def count_writes(site: Site, kind: str, out: Path) -> int:
    site.remove(out)
    (code,) = site.finish(out, sabotage=(f"io={kind}:0:{out}",))
    assert code == 0, tail(site.log(out))
    return int(Path(f"{out}.calls").read_text().splitlines()[0])


def order_of_calls(site: Site, sabotage: tuple[str, ...] = ()) -> Found:
    """Every folder that gets its final name: its files were made durable before, its parent is right after."""
    found, out = Found(), site.path / "order"
    site.remove(out)
    log = Path(f"{out}.calls")
    codes = site.finish(out, sabotage=(*sabotage, f"order={log}:{out}"))
    found.check(codes == [0], f"exit codes {codes}: {tail(site.log(out))}")
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    synced: set[str] = set()
    for place, row in enumerate(rows):
        if row[0] == "fsync":
            synced.add(row[1])
            continue
        old, new = row[1:]
        inside = {f for f in synced if f == old or f.startswith(old + "/")}
        synced |= {new + f[len(old) :] for f in inside}
        if new.endswith(".tmp"):
            continue  # an old folder moved aside
        found.tried += 1
        found.check(old in inside, f"{new} was not made durable before it got its name")
        if (Path(new) / folder.MANIFEST).is_file():
            missing = {f.name for f in Path(new).iterdir() if str(f) not in synced}
            found.check(not missing, f"{new}: {sorted(missing)} were not made durable")
        after = [r[1] for r in rows[place + 1 : place + 3] if r[0] == "fsync"]
        found.check(str(Path(new).parent) in after, f"the folder that holds {new} was not made durable")
    renamed = {row[2] for row in rows if row[0] == "rename"}
    for manifest in out.rglob(folder.MANIFEST):
        found.check(str(manifest.parent) in renamed, f"{manifest.parent} was not put in place by a rename")
    return found


def bit_flips(site: Site, number: int, seed: int = 1, sabotage: tuple[str, ...] = ()) -> Found:
    """One flipped bit in the newest checkpoint: the run goes on from the one before, and ends equal."""
    found, draw = Found(), random.Random(seed)
    for _ in range(number):
        out = site.path / "flipped"
        site.remove(out)
        shutil.copytree(site.straight, out)
        for name in ("result.json", "model"):
            path = out / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        file = draw.choice(
            [f for f in sorted(listing(out / "checkpoints")[-1].iterdir()) if f.suffix == ".safetensors"]
        )
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content) // 2, len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        found.tried += 1
        compare(site, out, found, f"a bit flipped in {file.name}", site.finish(out, sabotage=sabotage))
    return found


# -- negative controls -------------------------------------------------------------------------------------------


def mutants(site: Site, names: list[str], number: int = 12) -> Found:
    """Each seeded defect has to be caught by a short campaign that an honest product passes."""
    found = Found(facts={"caught_by": {}})
    for name in names:
        found.tried += 1
        if gone := [place for place in REPLACED[name] if at(place) is None]:
            found.wrong.append(f"{name} replaces {', '.join(gone)}, which is gone")
            continue
        for case in (order_of_calls, bit_flips, kills):
            options: dict[str, Any] = {"sabotage": (name,)}
            if case is kills:
                options |= {"number": number, "chain": 6}
            elif case is bit_flips:
                options |= {"number": 2}
            if wrong := case(site, **options).wrong:  # type: ignore[operator]
                found.facts["caught_by"][name] = f"{case.__name__}: {wrong[0][:160]}"
                break
        else:
            found.wrong.append(f"{name} was not caught")
    return found


# -- the campaign ------------------------------------------------------------------------------------------------

SITES: dict[tuple[Path, int], Site] = {}


def site(bench: Bench, steps: int) -> Site:
    """The yardstick of so many steps, made once."""
    key = (bench.folder, steps)
    if key not in SITES:
        SITES[key] = Site(bench.box(), steps)
    return SITES[key]


def spread_over(cases: list[Any], count: int) -> list[Any]:
    """`count` of the cases, evenly spread."""
    return cases if count >= len(cases) else [cases[i * len(cases) // count] for i in range(count)]


@campaign("P1", "kill -9 in chains, one process: equal in every bit", 2, 200)
def kills_of_one(bench: Bench, count: int) -> Iterator[Trial]:
    yield from kills(site(bench, 40 if count < 50 else STEPS), count, chain=6 if count < 50 else 20).trials(
        bench, "kill"
    )


@campaign("P1x2", "kill -9 in chains, two processes: equal in every bit", 0, 200)
def kills_of_two(bench: Bench, count: int) -> Iterator[Trial]:
    yield from kills(site(bench, 40 if count < 50 else STEPS), count, 2, chain=20).trials(bench, "kill")


@campaign("P3", "seeded defects of the product, each caught", 0, len(MUTANTS))
def defects(bench: Bench, count: int) -> Iterator[Trial]:
    yield from mutants(site(bench, STEPS), spread_over(list(MUTANTS), count)).trials(bench, "mutant")


@campaign("P4", "resume from the checkpoint of every step", 0, STEPS)
def every_step(bench: Bench, count: int) -> Iterator[Trial]:
    made = site(bench, 40 if count < 50 else STEPS)
    yield from resume_points(made, spread_over(list(range(1, made.steps + 1)), count)).trials(bench, "resume")


@campaign("P6", "files are durable before they get their name", 20, 20)
def durable(bench: Bench, count: int) -> Iterator[Trial]:
    yield from order_of_calls(site(bench, 40)).trials(bench, "rename")


@campaign("P10", "full disk at the N-th write", 2, 200)
def full_disk(bench: Bench, count: int) -> Iterator[Trial]:
    yield from failing_writes(site(bench, 10), "enospc", count if count < 50 else None).trials(bench, "ENOSPC")


@campaign("P11", "an I/O error at the N-th write", 0, 100)
def broken_disk(bench: Bench, count: int) -> Iterator[Trial]:
    yield from failing_writes(site(bench, 10), "eio", count).trials(bench, "EIO")


@campaign("P14", "SIGTERM in every phase", 0, 50)
def stops(bench: Bench, count: int) -> Iterator[Trial]:
    cases = [(place, hit) for place in PLACES for hit in (1, 2, 7)]
    yield from signals(site(bench, 40), spread_over(cases, count)).trials(bench, "SIGTERM")


@campaign("P15", "NaN and infinity in loss, gradient, weight", 0, 30)
def poison(bench: Bench, count: int) -> Iterator[Trial]:
    cases = [(place, value, hit) for place in sorted(TENSORS) for value in ("nan", "inf") for hit in (1, 5, 6, 11, 35)]
    yield from bad_numbers(site(bench, 40), spread_over(cases, count)).trials(bench, "bad number")
