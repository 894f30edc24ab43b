"""Add the studio's base model, adapters and mixes to the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrlora.errors import RequestError
from qrlora.operations.registry import Artifact, Link, Registry
from qrlora.operations.registry.bases import used_base
from qrlora.operations.registry.intake import add_adapter, add_composition, add_picture

STARTERS = Path(__file__).parent / "starters"


def base_in(registry: Registry, model: str) -> Artifact:
    """Return the base model as an artifact; add it if it is missing."""
    own = {"name": model, "licence": "Apache-2.0"} if model == "pico" else {}
    return used_base(registry, model, **own)


def add_starters(registry: Registry) -> None:
    """Fill an empty registry with the adapters that come with the package, and their pictures."""
    if registry.search(kind="adapter", deprecated=True, limit=1):
        return
    base = base_in(registry, "pico")
    for path in sorted(STARTERS.glob("*.safetensors")):
        picture = add_picture(registry, path.with_suffix(".png"), licence="Apache-2.0")
        links = [Link("trained_on", picture.digest)]
        add_adapter(registry, path, name=path.stem, base=base, links=links, tags=["starter"])


def add_trained(registry: Registry, folder: Path, step: int | None = None) -> str:
    """Add a run's adapter, of its end or of a step, with its pictures and base model; returns its reference."""
    about: dict[str, Any] = json.loads((folder / "run.json").read_text())
    recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
    path = folder / "adapter.safetensors" if step is None else folder / "steps" / f"step-{step:06d}.safetensors"
    if not path.is_file():
        raise RequestError(
            "no adapter of this step is kept", status=404, got=step, remedy="take a step that has pictures"
        )
    base = base_in(registry, recipe["model"])
    files = sorted(path for path in (folder / "pictures").glob("*.png") if ".mask." not in path.name)
    pictures = [add_picture(registry, one) for one in files]
    added = add_adapter(
        registry,
        path,
        name=about["name"],
        owner=about["person"],
        base=base,
        links=[Link("trained_on", one.digest) for one in pictures],
        tags=["studio"],
    )
    return f"registry:{added.names[-1]}"


def add_mix(
    registry: Registry, model: str, parts: Mapping[str, float], null_space: float, name: str, licence: str = ""
) -> Artifact:
    """Add a composition of registered adapters (reference -> weight)."""
    found = [(registry.get(reference), weight) for reference, weight in parts.items()]
    return add_composition(registry, base_in(registry, model), found, null_space, name=name, licence=licence)
