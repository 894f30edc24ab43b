"""Register base models as records of the digests of their files and weights. The weights stay where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qrlora._said import said
from qrlora.errors import RegistryError
from qrlora.method.adapter import Adapter
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry


def add_base(registry: Registry, model: str, **described: Any) -> Artifact:
    """Add a base model as a record of its files' and weights' digests; the weights stay where they are.

    Args:
        model: pico, a folder in the diffusers layout, or a hub id that was downloaded.
        described: as `Registry.add`.

    Raises:
        ModelError: as `load_pipeline`, or weights that are not there.
    """
    record = base_record(model)
    where = str(Path(model).resolve()) if Path(model).is_dir() else model
    facts = {"model": where, "family": record["family"], "digest": digest_of(canonical_json(record))}
    facts |= {"layers": len(record["layers"]), "files": len(record["files"])}
    return registry.add_record(record, "base", filename=f"{Path(where).name}.json", facts=facts, **described)


def base_record(model: str) -> dict[str, Any]:
    """Return the family of a base model, the digest of each of its files, and of each matrix of its denoiser."""
    from qrlora.method.basis.identity import weight_digest
    from qrlora.models.stored import model_files, stored_weights

    weights, family = stored_weights(model, ".+")
    return {
        "family": family.name,
        "files": {name: file_digest(path) for name, path in model_files(model).items()},
        "layers": {layer: weight_digest(weights[layer]) for layer in weights},
    }


def used_base(registry: Registry, model: str, **described: Any) -> Artifact:
    """Return the base model that is registered from this place, without hashing it again; one that is not is added.

    described: as `add_base`.
    """
    where = str(Path(model).resolve()) if Path(model).is_dir() else model
    known = registry.search(kind="base", fact=("model", where), deprecated=True)
    return known[0] if known else add_base(registry, model, **described)


def check_base(registry: Registry, base: Artifact) -> str:
    """Return where a base model is, after hashing its files again. RegistryError if one is not as it was registered."""
    from qrlora.models.families import find_model

    model = str(base.facts["model"])
    root = find_model(model)[1].parent
    for name, digest in json.loads(registry.read(base))["files"].items():
        got = file_digest(root / name) if (root / name).is_file() else "no such file"
        if got != digest:
            remedy = "restore its files, or add the model that is there now as another"
            raise RegistryError(f"{model}: {name} is not as it was registered", expected=digest, got=got, remedy=remedy)
    return model


def base_of(registry: Registry, artifact: Artifact) -> Artifact | None:
    """Return the base model that an artifact stands on, if that is known."""
    found = [registry.get(edge.target) for edge in registry.edges(artifact.digest, relation="based_on")]
    return next((one for one in found if one.kind == "base"), None)


def trained_under(registry: Registry, adapter: Adapter, given: Artifact | None) -> Artifact | None:
    """Return the registered base model whose weights are those that the adapter was trained on."""
    if not adapter.digests:
        return given
    for base in [given] if given else registry.search(kind="base", deprecated=True):
        layers = json.loads(registry.read(base))["layers"]
        if all(layers.get(name) == digest for name, digest in adapter.digests.items()):
            return base
    if given:
        layers = json.loads(registry.read(given))["layers"]
        wrong = [name for name, digest in adapter.digests.items() if layers.get(name) != digest]
        raise RegistryError(
            said("the adapter was not trained on %(title)s", title=given.title),
            expected="the same weights in every layer",
            got=said(
                "others in %(wrong)s of %(all)s layers, such as %(first)s",
                wrong=len(wrong),
                all=len(adapter.digests),
                first=wrong[0],
            ),
            remedy="name the base model that it was trained on",
        )
    return None
