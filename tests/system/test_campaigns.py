"""Whatever a file, a setting or a text holds: no code runs, no traceback, nothing damaged is used. See campaign.py."""

from pathlib import Path
from typing import Any

import campaign
import crash
import pytest
import sabotage
from harness import mistake
from hostile_files import GADGETS, Payload

from gptworks.core import folder

CAMPAIGNS = campaign.load_all()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = campaign.Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


def passes(result: campaign.Result, least: int) -> None:
    assert result.tried >= least
    assert not result.problems, f"{len(result.problems)} of {result.tried}:\n" + "\n".join(result.problems[:5])


@pytest.mark.parametrize("name", [name for name, chosen in CAMPAIGNS.items() if chosen.short])
def test_a_sample_of_every_campaign_passes(bench: campaign.Bench, name: str) -> None:
    chosen = CAMPAIGNS[name]
    passes(campaign.conduct(chosen, bench, chosen.short), min(chosen.short, 20))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_every_campaign_passes_whole(tmp_path: Path, name: str) -> None:
    made = campaign.Bench(tmp_path)
    try:
        passes(campaign.conduct(CAMPAIGNS[name], made, CAMPAIGNS[name].full), CAMPAIGNS[name].full)
    finally:
        made.close()


# -- a campaign that cannot fail proves nothing --------------------------------------------------------------------


@pytest.mark.parametrize("name", GADGETS)
def test_the_watch_sees_every_gadget_that_is_unpickled(bench: campaign.Bench, name: str) -> None:
    payload = Payload(GADGETS[name], bench.folder / "canary", bench.folder / "evil.py")
    payload.script.write_text(f"open({str(payload.canary)!r}, 'w')")
    outcome = bench.commands.python(f"import pickle; pickle.loads({payload.pickle()!r})", bench.box())
    assert outcome.events and not payload.canary.exists()


@pytest.mark.parametrize(
    "code",
    ["import os; os.system('true')", "import subprocess; subprocess.run(['true'])", "import os; os.execv('/x', ['a'])",
     "import socket; socket.create_connection(('127.0.0.1', 9))", "import ctypes; ctypes.CDLL('libm.so.6')",
     "open('../outside', 'w')", "import os; os.mkdir('../outside')", "import os; os.rename('.', '../outside')",
     "import os; os.open('/tmp/outside', os.O_CREAT | os.O_WRONLY)", "import shutil; shutil.rmtree('/nowhere')",
     "try: open('../outside', 'w')\nexcept BaseException: pass"],
)  # fmt: skip
def test_the_watch_sees_what_a_reader_must_not_do(bench: campaign.Bench, code: str) -> None:
    outcome = bench.commands.python(code, bench.box())
    assert outcome.events and mistake(outcome, 0, 1, 70)


def test_the_watch_lets_a_command_work_in_its_box(bench: campaign.Bench) -> None:
    code = "import os, shutil; os.mkdir('a'); open('a/b', 'w').write('x'); os.rename('a/b', 'c'); shutil.rmtree('a')"
    outcome = bench.commands.python(code, bench.box())
    assert outcome.code == 0 and not outcome.events


@pytest.mark.parametrize(
    ("code", "says"),
    [("raise ValueError", "exit code 1"), ("import os; os._exit(9)", "exit code 9"),
     ("import os; os.abort()", "exit code -6"), ("raise SystemExit(65)", "0 error lines"),
     ("import sys; print('error: a', file=sys.stderr); print('b', file=sys.stderr); sys.exit(65)", "not the last"),
     ("import sys; print('error: ' + 'a' * 2000, file=sys.stderr); sys.exit(65)", "an error line of"),
     ("import sys; print('Traceback', file=sys.stderr); print('error: a', file=sys.stderr); sys.exit(65)", "traceback"),
     ("x = bytearray(300_000_000); import sys; print('error: a', file=sys.stderr); sys.exit(65)", "MB of memory")],
)  # fmt: skip
def test_a_command_that_fails_badly_is_called_a_mistake(bench: campaign.Bench, code: str, says: str) -> None:
    assert says in str(mistake(bench.commands.python(code, bench.box()), 65, peak=100_000_000))


def test_a_command_that_hangs_is_ended(bench: campaign.Bench) -> None:
    outcome = bench.commands.many([["python", "import time; time.sleep(60)"]], bench.box(), timeout=0.3)[0]
    assert outcome.code == -9 and outcome.seconds < 10


@pytest.mark.parametrize("name", ["D10", "P7", "P8"])
def test_a_reader_that_does_not_hash_is_caught(
    bench: campaign.Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench.run  # noqa: B018  # made before the defect
    monkeypatch.setattr(folder, "verify", lambda path, names=None: folder.read_json(path / folder.MANIFEST))
    assert campaign.conduct(campaign.CAMPAIGNS[name], bench, 30).problems


@pytest.mark.parametrize("name", sabotage.MUTANTS)
def test_a_seeded_defect_replaces_what_it_names(name: str, zygote: Any) -> None:
    code = (
        "import sys, sabotage\n"
        "places = sabotage.REPLACED[sys.argv[1]]\n"
        "before = [sabotage.at(place) for place in places]\n"
        "sabotage.MUTANTS[sys.argv[1]]()\n"
        "replaced = [was is not None and sabotage.at(place) is not was for place, was in zip(places, before)]\n"
        "print(all(replaced), len(places))"
    )
    said = zygote.python(code, name).split()
    assert said[0] == "True" and int(said[1]) > 0


def test_a_seeded_defect_whose_place_is_gone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sabotage.REPLACED, "nothing_made_durable", ("gptworks.core.folder:no_such_function",))
    found = crash.mutants(None, ["nothing_made_durable"])  # type: ignore[arg-type]
    assert found.wrong == ["nothing_made_durable replaces gptworks.core.folder:no_such_function, which is gone"]
