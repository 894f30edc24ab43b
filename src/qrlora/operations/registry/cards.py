"""Write model cards of adapters, as the Hugging Face hub reads them."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qrlora.errors import RegistryError
from qrlora.operations.registry.effects import EFFECT
from qrlora.operations.registry.lineage import graph, lines
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry

FACTS = ("role", "trigger", "method", "rank", "alpha", "triangular", "parameters", "parameters_of_a_lora", "layers")
MEASURES = 20


def card(registry: Registry, artifact: Artifact) -> ModelCard:
    """Return the card of an adapter: licence, base model, tags; training facts, lineage and measures.

    Raises:
        RegistryError: no adapter.
    """
    if artifact.kind != "adapter":
        raise RegistryError(f"no card of a {artifact.kind}", expected="an adapter", got=artifact.title)
    facts = artifact.facts
    data = ModelCardData(
        license=artifact.licence.lower() or None,
        base_model=str(facts.get("base_model") or "") or None,
        tags=["lora", "qr-lora", "text-to-image", *artifact.tags],
        pipeline_tag="text-to-image",
        library_name="diffusers",
        model_name=artifact.title.partition("@")[0],
    )
    sections = {
        "What it is": _table({key: facts.get(key) for key in FACTS}),
        "How it was trained": _table(_recipe(registry, artifact)) or "Its file names no recipe.",
        "Lineage": "```text\n" + "\n".join(lines(graph(registry, artifact))) + "\n```",
        "Measures": _table(dict(list(measures(registry, artifact).items())[:MEASURES])) or "No report is registered.",
        "Identity": _table(
            {"digest": artifact.digest, "owner": artifact.owner, "licence": artifact.licence or "unknown"}
        ),
    }
    head = f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n"
    head += f"**Deprecated**: {artifact.deprecated}\n\n" if artifact.deprecated else ""
    return ModelCard(head + "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items()))


def _recipe(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    trained = [registry.get(edge.target) for edge in registry.edges(artifact.digest, relation="trained_on")]
    recipes = [one.facts["recipe"] for one in trained if one.kind == "recipe"]
    pictures = [one.title for one in trained if one.kind == "picture"]
    known = {key: value for key, value in (recipes[0] if recipes else {}).items() if value not in (None, "", [], False)}
    return known | ({"pictures": ", ".join(pictures)} if pictures else {})


def measures(registry: Registry, artifact: Artifact) -> dict[str, Any]:
    """Return the figures that the reports on an artifact give, by group and name."""
    rows: dict[str, Any] = {}
    for edge in registry.edges(artifact.digest, relation="measured_by"):
        report = registry.get(edge.target)
        if report.facts.get("report") == EFFECT:
            rows |= {f"effect: {key}": round(report.facts[key], 3) for key in ("strength", "consistency")}
        for group, found in dict(report.facts.get("groups", {})).items():
            rows |= {f"{group}: {name}": spread["mean"] for name, spread in _summary(found).items()}
    return rows


def _summary(group: Any) -> dict[str, Any]:
    """Return the means of a report's group, whoever wrote the report."""
    found = group.get("summary", {}) if isinstance(group, dict) else {}
    return {name: one for name, one in found.items() if isinstance(one, dict) and "mean" in one}


def _table(rows: dict[str, Any]) -> str:
    kept = {key: value for key, value in rows.items() if value not in (None, "")}
    lines_ = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in kept.items()]
    return "\n".join(["| | |", "|---|---|", *lines_]) if kept else ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
