"""Whatever a file, a setting or a text holds: no code runs, no traceback, nothing damaged is used. See campaign.py."""

from pathlib import Path
from typing import Any

import campaign
import pytest

CAMPAIGNS = campaign.load_all()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = campaign.Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


def passes(result: campaign.Result, least: int) -> None:
    assert result.tried >= least
    assert not result.problems, f"{len(result.problems)} of {result.tried}:\n" + "\n".join(result.problems[:5])


@pytest.mark.parametrize("name", CAMPAIGNS)
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
