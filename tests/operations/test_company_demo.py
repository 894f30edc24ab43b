"""`make demo-company`, with few steps: every step that has to succeed does, and every tampering is refused."""

from __future__ import annotations

import json
from pathlib import Path

from qrlora.apps.cli import main
from qrlora.apps.demo.company import demonstrate

QUICK = {
    "steps = 240": "steps = 2",
    "cooldown_steps = 120": "cooldown_steps = 1",
    "pictures = 16": "pictures = 2\nsteps = 2",
}


def test_from_one_picture_to_the_line_and_everything_refuses_after_tampering(tmp_path: Path) -> None:
    page = demonstrate(tmp_path / "company", main, QUICK)
    refused = dict(json.loads(page.with_name("report.json").read_text())["refusals"])
    said = {
        "One weight is changed": "weight of sha256:",
        "A forbidden word": "has 'cheap'",
        "One bit of a marked picture": "changed",
        "One row of the audit log": "entry 5 was changed",
        "One byte of an adapter": "is not what was registered",
    }
    for what, words in said.items():
        assert [words in text for tried, text in refused.items() if tried.startswith(what)] == [True], what
    assert "Then somebody tampers" in page.read_text()
