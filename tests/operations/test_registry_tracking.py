"""Adapters logged to MLflow, and fetched from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qrlora.apps.cli import main
from qrlora.method.adapter import save_adapter
from qrlora.operations.registry import Registry
from qrlora.operations.registry.intake import add_adapter, add_composition, add_report
from samples import make_adapter, make_basis

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own


@pytest.fixture
def chalk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with an adapter, a report on it, and a composition of it."""
    monkeypatch.chdir(tmp_path)
    registry = Registry.open(tmp_path / "registry")
    save_adapter(make_adapter(make_basis(tmp_path), role="style", licence="MIT"), Path("chalk.safetensors"))
    one = add_adapter(registry, Path("chalk.safetensors"), name="chalk", owner="acme", tags=["spring"])
    add_report(registry, {"groups": {"made": {"summary": {"csd": {"mean": 0.75}}}}}, [one])
    add_composition(registry, None, [(one, 0.9)])
    return registry


def export(*words: str) -> int:
    return main(["registry", "export", "chalk", "--registry", "registry", *words])


def test_an_adapter_goes_to_mlflow_and_comes_back_verified(chalk: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--to", "mlflow:sqlite:///runs.db", "--json") == 0
    [(digest, run)] = json.loads(capsys.readouterr().out)["runs"].items()
    client = mlflow.MlflowClient(tracking_uri="sqlite:///runs.db")
    logged = client.get_run(run.rpartition("#")[2])
    assert logged.data.tags["qrlora.digest"] == digest == chalk.get("chalk").digest
    assert logged.data.tags["qrlora.owner"] == "acme" and logged.data.tags["qrlora.licence"] == "MIT"
    assert logged.data.params["role"] == "style" and logged.data.metrics == {"made csd": 0.75}
    assert logged.info.status == "FINISHED"
    files = {one.path for one in client.list_artifacts(logged.info.run_id)}
    assert files == {"README.md", "chalk.safetensors", "registry.tar"} and not Path("mlruns").exists()

    assert main(["registry", "import", run, "--registry", "partner"]) == 0
    there = Registry.open("partner", create=False).get("chalk")
    assert there.digest == digest and "imported" in there.tags

    [bundle] = Path("runs.files").rglob("registry.tar")
    whole = bundle.read_bytes()
    last = whole.index(content := chalk.read("chalk")) + len(content) - 1
    bundle.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    assert main(["registry", "import", run, "--registry", "another"]) == 2
    bundle.write_bytes(whole)
    client.set_tag(logged.info.run_id, "qrlora.digest", "sha256:" + "0" * 64)
    capsys.readouterr()
    assert main(["registry", "import", run, "--registry", "another"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert not Registry.open("another", create=False).search()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "s3://bucket"], "no place to export to"),
        (["--to", "mlflow:nonsense://x"], "refuses"),
        (["--to", "mlflow:sqlite:///runs.db", "-o", "x.tar"], "exclude each other"),
    ],
)
def test_what_is_no_tracking_store_is_refused(
    chalk: Registry, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(*words) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_something_else_is_refused(chalk: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    client = mlflow.MlflowClient(tracking_uri="sqlite:///runs.db")
    run = client.create_run(client.create_experiment("mine")).info.run_id
    wrong = {f"mlflow:sqlite:///runs.db#{run}": "a run of something else", "mlflow:x": "no run of MLflow"}
    for text, said in wrong.items():
        assert main(["registry", "import", text, "--registry", "partner"]) == 2
        assert said in capsys.readouterr().err
