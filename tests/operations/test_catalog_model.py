"""The model of a catalog on many cards: what is known without it, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qrlora.apps.cli import main
from qrlora.lab.speed.catalog import Site, simulate

SITE = Site(4, 8, 1.0, 0, 1e6, 0, 1e12, 0.0, 0.0)


def test_cards_alone_are_busy_all_the_time() -> None:
    found = simulate(SITE, 400, 1)
    assert found.seconds == pytest.approx(400 * 8 / 4, rel=0.05)
    assert found.shares["cards"] > 0.95 and found.pictures == 3200


@pytest.mark.parametrize(
    "site, rate",
    [(replace(SITE, registry=0.5), 2), (replace(SITE, bandwidth=1e6), 1), (replace(SITE, batch_driver=8), 1)],
)
def test_the_slowest_part_sets_the_pace(site: Site, rate: float) -> None:
    found = simulate(site, 200, 1)
    assert found.rate == pytest.approx(rate, rel=0.05)
    assert max(found.shares["driver"], found.shares["storage"]) > 0.95


def test_an_adapter_is_read_once_for_its_batches() -> None:
    heavy = replace(SITE, adapter_bytes=8e6, bandwidth=1e6)
    assert simulate(heavy, 200, 1).seconds == pytest.approx(
        2 * simulate(replace(heavy, adapter_bytes=0), 200, 1).seconds, rel=0.05
    )
    assert simulate(heavy, 200, 4).seconds < simulate(heavy, 200, 1).seconds


def test_the_command_writes_numbers_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--products", "20", "--rounds", "5", "--postgresql-rate", "100", "--training-seconds", "10"]
    places = ["--plot", str(tmp_path / "plots/a.svg"), "--json", str(tmp_path / "a.json")]
    assert main(["lab", "speed", "catalog", *options, *places]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["whole"]) == {"no registry", "sqlite", "postgresql"}
    assert "training 20 adapters" in capsys.readouterr().out
    assert (tmp_path / "plots/a.svg").read_text().count("<svg") == 1
