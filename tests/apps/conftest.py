"""A studio without its base model, and a browser's requests to it, for the tests of its pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qrlora.apps.studio.state import Studio
from studios import Visitor, made_studio, visiting


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with pytest.MonkeyPatch.context() as patch:
        made = made_studio(tmp_path_factory.mktemp("studio"), patch)
        yield made
        made.close()


@pytest.fixture(scope="module")
def visitor(studio: Studio) -> Iterator[Visitor]:
    with visiting(studio) as found:
        yield found
