"""Log registered adapters to MLflow, one run each, and fetch them from there.

A run holds the adapter's facts as parameters and tags, the figures of its reports as metrics, and as files the adapter,
its model card and its bundle. A fetched bundle is read as one from anybody: every object is hashed again.

The flavour `mlflow.diffusers` is not used: it logs one LoRA on one model of the hub, and has no fields for the parts of
a composition, for parents or approvals.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qrlora._reading import parsing
from qrlora.errors import RegistryError
from qrlora.operations.registry.bundle import export_bundle
from qrlora.operations.registry.cards import card, measures
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry

PREFIX = "mlflow:"
"""Beginning of a tracking store on the command line: mlflow:sqlite:///runs.db; of a run in it, with #RUN behind it."""
EXPERIMENT = "qrlora"
DIGEST, BUNDLE = "qrlora.digest", "registry.tar"
LONGEST = 500
"""Characters of a parameter's value; older servers take no more."""
SQLITE = "sqlite:///"


def log_adapters(registry: Registry, references: Iterable[str], uri: str) -> dict[str, str]:
    """Log each adapter as a run of the experiment `qrlora`; return the runs, as `mlflow:URI#RUN`, by digest.

    Raises:
        RegistryError: no adapter, no MLflow, or the tracking store refuses.
    """
    adapters = [registry.get(reference) for reference in references]
    cards = {one.digest: card(registry, one).content for one in adapters}
    client = _client(uri)
    with _asked(uri):
        experiment = _experiment(client, uri)
        return {one.digest: f"{PREFIX}{uri}#{_log(client, experiment, registry, one, cards)}" for one in adapters}


def fetch_bundle(run: str, folder: Path) -> tuple[Path, str]:
    """Download the bundle of a run, `mlflow:URI#RUN`, to a folder; return it and the digest that it has to hold."""
    uri, _, name = run.removeprefix(PREFIX).rpartition("#")
    if not uri or not name:
        remedy = "`qrlora registry export NAME --to mlflow:URI` prints it"
        raise RegistryError("no run of MLflow", expected=f"{PREFIX}URI#RUN", got=run, remedy=remedy)
    client = _client(uri)
    with _asked(uri):
        digest = client.get_run(name).data.tags.get(DIGEST)
        if digest is None:
            remedy = "name one that `qrlora registry export --to` printed"
            raise RegistryError("a run of something else", expected=f"the tag {DIGEST}", got=name, remedy=remedy)
        return Path(client.download_artifacts(name, BUNDLE, str(folder))), str(digest)


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it calls home
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        remedy = "pip install 'qrlora[mlflow]'"
        raise RegistryError("MLflow needs more packages", got=f"no {error.name}", remedy=remedy) from error
    with _asked(uri):
        return MlflowClient(tracking_uri=uri)


def _asked(uri: str) -> Any:
    remedy = "name a tracking store: mlflow:sqlite:///runs.db, or mlflow:http://HOST:5000"
    return parsing(f"MLflow at {uri} refuses", RegistryError, remedy=remedy)


def _experiment(client: Any, uri: str) -> str:
    """Return the id of the experiment; its files are beside a database that is a file, else where the server says."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    database = Path(uri.removeprefix(SQLITE)).resolve()
    place = (database.parent / f"{database.stem}.files").as_uri() if uri.startswith(SQLITE) else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


def _log(client: Any, experiment: str, registry: Registry, one: Artifact, cards: dict[str, str]) -> str:
    """Return the id of the run, which is finished only if everything was logged."""
    names = {"name": ", ".join(one.names), "licence": one.licence, "owner": one.owner, "tags": ", ".join(one.tags)}
    tags = {DIGEST: one.digest} | {f"qrlora.{key}": value for key, value in names.items() if value}
    run = str(client.create_run(experiment, run_name=one.title, tags=tags).info.run_id)
    for key, value in one.facts.items():
        if isinstance(value, (str, int, float)) and value != "":
            client.log_param(run, key, str(value)[:LONGEST])
    for key, number in measures(registry, one).items():
        client.log_metric(run, re.sub(r"[^\w. /-]", "", key), float(number))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_bundle(registry, [one.digest], folder / BUNDLE)
        (folder / "README.md").write_text(cards[one.digest], encoding="utf-8")
        shutil.copyfile(registry.path(one), folder / Path(one.filename or "adapter.safetensors").name)
        client.log_artifacts(run, scratch)
    client.set_terminated(run)
    return run
