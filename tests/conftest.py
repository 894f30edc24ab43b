"""Fixtures of all tests. What tests import lies in modules beside this file: `conftest` names one file a folder."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tiny_pipelines import BUILDERS, build_tiny_sd3


def pytest_configure() -> None:
    """Tests interrupt commands by SIGINT, which a shell's background ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever a test draws without a generator of its own, it draws the same each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=list(BUILDERS))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline of each family in turn."""
    folder = tmp_path_factory.mktemp("models") / request.param
    BUILDERS[request.param]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny StableDiffusion3Pipeline; load it with `StableDiffusion3Pipeline.from_pretrained`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
