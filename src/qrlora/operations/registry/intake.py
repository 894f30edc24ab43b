"""Add things to the registry: their facts are read from their bytes, and edges are found by digests.

add_base(registry, "pico", licence="Apache-2.0")
chalk = add_adapter(registry, Path("chalk.safetensors"), name="chalk")
add_composition(registry, base, [(teapot, 0.9), (chalk, 1.0)], null_space=0.5)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrlora._reading import parse_json
from qrlora.errors import RegistryError
from qrlora.method.adapter import Adapter
from qrlora.method.space import Space, load_space
from qrlora.models.exchange import is_ours, load_any
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.perceptual import phash
from qrlora.operations.registry.bases import add_base as add_base
from qrlora.operations.registry.bases import trained_under
from qrlora.operations.registry.records import Addition, Artifact, Link
from qrlora.operations.registry.registry import Registry

Parts = Sequence[tuple[Artifact, float]]


def add_adapter(
    registry: Registry,
    path: Path,
    *,
    name: str | None = None,
    role: str = "",
    licence: str = "",
    owner: str = "",
    tags: Iterable[str] = (),
    base: Artifact | None = None,
    links: Sequence[Link] = (),
) -> Artifact:
    """Add an adapter file of ours, or anybody's LoRA.

    Edges: to the base model whose weights it was trained on, its basis, its recipe, and what its metadata names by
    digest and the registry has (pictures, the space, the parts of a composition).

    Args:
        role, licence: of a file that says none itself.
        base: of a file that holds no digests of its base weights; for any other, what these are checked against.
        links: more edges.

    Raises:
        AdapterFileError: as `load_any`.
        RegistryError: the file says another role or licence, or was trained on other weights than `base`.
    """
    adapter = load_any(path)
    meta = adapter.metadata
    role, licence = _said("role", meta.role, role), _said("licence", meta.licence, licence)
    under = trained_under(registry, adapter, base)
    found = [*links, *_links_by_digest(registry, adapter)]
    if under:
        found.append(Link("based_on", under.digest))
    if meta.on_basis:
        found.append(Link("based_on", add_basis(registry, adapter, under).digest))
    if meta.recipe:
        found.append(Link("trained_on", add_recipe(registry, meta.recipe).digest))
    facts = adapter_facts(adapter) | {"ours": is_ours(path), "base": _how_known(adapter, under)}
    described: dict[str, Any] = {"role": role, "licence": licence, "owner": owner, "tags": tags, "facts": facts}
    return registry.add(path, "adapter", name=name, links=found, **described)


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """Return what the registry knows of an adapter. `content` is the same in every spelling of its file."""
    meta, count = adapter.metadata, adapter.parameters()
    return {
        **{key: getattr(meta, key) for key in ("role", "trigger", "method", "rank", "alpha", "triangular", "family")},
        **{key: getattr(meta, key) for key in ("base_model", "base_digest", "basis_fingerprint", "basis_rank")},
        "columns": list(meta.columns),
        "null_space": meta.null_space,
        "recipe_digest": meta.recipe_digest if meta.recipe else "",
        "parameters": count.trained,
        "parameters_of_a_lora": count.lora_same_rank,
        "layers": len(adapter.deltas),
        "content": adapter.digest,
        "provenance": json.loads(json.dumps(dict(meta.provenance))),
    }


def _said(what: str, file: str, given: str) -> str:
    """Return the file's statement, or the given one where the file has none."""
    if file and given and file != given:
        remedy = f"leave it out: the registry takes the file's own {what}"
        raise RegistryError(f"the file says another {what}", expected=file, got=given, remedy=remedy)
    return file or given


def _how_known(adapter: Adapter, base: Artifact | None) -> str:
    if base is None:
        return "unknown"
    return "by the digests of its weights" if adapter.digests else "as was said when it was added"


def _links_by_digest(registry: Registry, adapter: Adapter) -> list[Link]:
    """Return edges to what the metadata names by digest and the registry has."""
    origin, links = adapter.metadata.provenance, []
    for picture in _listed(origin, "pictures"):
        if registry.has(digest := f"sha256:{picture.get('sha256')}"):
            links.append(Link("trained_on", digest))
    if isinstance(space := origin.get("space"), Mapping):
        links += [Link("based_on", one.digest) for one in _with_content(registry, "space", space.get("digest"))]
    for part in _listed(origin, "parts"):
        weight = part.get("weight")
        weight = float(weight) if isinstance(weight, (int, float)) else None
        found = _with_content(registry, "adapter", part.get("digest"))
        links += [Link("composed_of", one.digest, weight, adapter.metadata.null_space) for one in found]
    return links


def _with_content(registry: Registry, kind: str, content: object) -> list[Artifact]:
    """Return the first-added artifact with this content, in whatever spelling of its file, as a list; empty if there is
    none."""
    return registry.search(kind=kind, fact=("content", str(content)), deprecated=True)[-1:]


def _listed(origin: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return a list of objects from metadata that any program may have written."""
    found = origin.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def add_basis(registry: Registry, adapter: Adapter, base: Artifact | None) -> Artifact:
    """Add the basis of an adapter as a record of what makes it again: base weights, rank, algorithm, seed."""
    meta = adapter.metadata
    record = {"fingerprint": meta.basis_fingerprint, "rank": meta.basis_rank, "algorithm": meta.algorithm}
    record |= {"seed": meta.basis_seed}
    links = [Link("based_on", base.digest)] if base else []
    return registry.add_record(record, "basis", filename="basis.json", links=links)


def add_space(registry: Registry, path: Path, *, licence: str = "", **described: Any) -> Artifact:
    """Add a space of adapters, with edges to those of its members that the registry has.

    described: as `Registry.add`.
    """
    space = load_space(path)
    meta = space.mean.metadata
    members = [digest for _, digest in space.members]
    facts = adapter_facts(space.mean) | {"content": space.digest, "members": members, "components": space.count}
    links = [
        Link("composed_of", one.digest) for digest in members for one in _with_content(registry, "adapter", digest)
    ]
    said: dict[str, Any] = {"role": meta.role, "licence": _said("licence", meta.licence, licence)}
    return registry.add(path, "space", facts=facts, links=links, **said, **described)


def _space_facts(space: Space) -> dict[str, Any]:
    members = [digest for _, digest in space.members]
    return adapter_facts(space.mean) | {"content": space.digest, "members": members, "components": space.count}


def add_recipe(registry: Registry, recipe: Path | Mapping[str, Any], **described: Any) -> Artifact:
    """Add a recipe: a TOML file, or the record of one that stands in an adapter's metadata. RecipeError if it is none.

    described: as `Registry.add`.
    """
    if isinstance(recipe, Mapping):
        facts = {"recipe": dict(recipe), "role": recipe.get("role"), "model": recipe.get("model")}
        return registry.add_record(dict(recipe), "recipe", filename="recipe.json", facts=facts, **described)
    from qrlora.models.training.recipe import REFERENCE, Recipe, read_fields

    fields = read_fields(recipe)
    if str(fields.get("output", "")).startswith(REFERENCE):
        del fields["output"]  # which only the command line can put a file in the place of
    record = Recipe.of(fields).record()
    facts = {"recipe": record, "role": record["role"], "model": record["model"]}
    return registry.add(recipe, "recipe", facts=facts, **described)


def add_picture(registry: Registry, path: Path, **described: Any) -> Artifact:
    """Add a picture to train on or to compare with. DataError if it is none. described: as `Registry.add`."""
    from qrlora.models.training.pictures import open_picture

    image = open_picture(path).image
    facts = {"width": image.width, "height": image.height, "phash": phash(image)}
    return registry.add(path, "picture", facts=facts, **described)


def composition(base: Artifact | None, parts: Parts, null_space: float = 0.0, **described: Any) -> Addition:
    """Return a composition: which adapters, at which weights, on which base model. The order of the parts makes no
    other one.

    Args:
        base: the base model; None if it is not known.
        parts: registered adapters with their weights.
        null_space: strength of the null-space projection.
        described: name, owner, licence and tags, as of `Addition`.
    """
    ordered = sorted(parts, key=lambda part: (part[0].digest, part[1]))
    bases = sorted({str(part.facts.get("basis_fingerprint") or "") for part, _ in ordered} - {""})
    record = {
        "base": base.digest if base else None,
        "basis": ",".join(bases),
        "parts": [{"adapter": part.digest, "weight": float(weight)} for part, weight in ordered],
        "null_space": float(null_space),
    }
    links = [Link("based_on", base.digest)] if base else []
    links += [Link("composed_of", part.digest, float(weight), float(null_space)) for part, weight in ordered]
    described = {"filename": "composition.json", "facts": record, "links": links, **described}
    return Addition(canonical_json(record), "composition", **described)


def add_composition(
    registry: Registry, base: Artifact | None, parts: Parts, null_space: float = 0.0, **described: Any
) -> Artifact:
    """Add a composition. Arguments: as `composition`."""
    return registry.add_many([composition(base, parts, null_space, **described)])[0]


def generated(
    picture: bytes | Path,
    origin: Artifact | None,
    made: Mapping[str, Any],
    *,
    name: str | None = None,
    keep: bool = False,
) -> Addition:
    """Return a generated picture: its exact digest, its perceptual hash, and what it was made with.

    Args:
        origin: the composition, adapter or base model that made it.
        made: JSON: prompt, seed, and what else there is to say.
        keep: also its bytes.
    """
    from qrlora.models.training.pictures import open_picture

    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    path = picture if isinstance(picture, Path) else Path("picture.png")
    image = open_picture(path, content).image
    facts = {**made, "width": image.width, "height": image.height, "phash": phash(image)}
    links = [Link("generated_by", origin.digest)] if origin else []
    filename = picture.name if isinstance(picture, Path) else "picture.png"
    licence = origin.licence if origin else ""
    return Addition(content, "generated", name, filename, licence=licence, facts=facts, links=links, keep=keep)


def add_generated(
    registry: Registry, picture: bytes | Path, origin: Artifact | None, made: Mapping[str, Any], **described: Any
) -> Artifact:
    """Add a generated picture. Arguments: as `generated`."""
    return registry.add_many([generated(picture, origin, made, **described)])[0]


def add_report(
    registry: Registry,
    report: Path | Mapping[str, Any],
    about: Iterable[Artifact],
    *,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """Add a report, a file or its numbers as JSON, with an edge from everything that it is about.

    Args:
        facts: of a file; of numbers they are the facts.
    """
    if isinstance(report, Mapping):
        added = registry.add_record(report, "report", name=name, filename="report.json", facts=dict(facts or report))
    else:
        added = registry.add(report, "report", name=name, facts=dict(facts or {}))
    for one in about:
        registry.link(one.digest, Link("measured_by", added.digest))
    return added


def add_export(
    registry: Registry, path: Path, source: Artifact, *, name: str | None = None, facts: Mapping[str, Any]
) -> Artifact:
    """Add a file that was written for another program."""
    links = [Link("exported_from", source.digest)]
    return registry.add(path, "export", name=name, licence=source.licence, owner=source.owner, links=links, facts=facts)


def described_facts(kind: str, path: Path, filename: str) -> dict[str, Any] | None:
    """Return the facts of a kind that its bytes tell; None of a kind whose bytes do not tell them.

    Raises:
        QrloraError: the bytes are not of that kind.
    """
    if kind in ("adapter", "space"):
        named = path.with_name(path.name + (".space.safetensors" if kind == "space" else ".safetensors"))
        path.rename(named)
        try:
            if kind == "space":
                return _space_facts(load_space(named))
            return adapter_facts(load_any(named)) | {"ours": is_ours(named)}
        finally:
            named.rename(path)
    if kind in ("composition", "basis", "recipe") and not filename.endswith(".toml"):
        record = parse_json(path.read_text(encoding="utf-8", errors="replace"), f"a {kind}", RegistryError)
        return {"recipe": record} if kind == "recipe" else dict(record)
    return None


ADDERS: Mapping[str, Callable[..., Artifact]] = {
    "adapter": add_adapter,
    "space": add_space,
    "recipe": add_recipe,
    "picture": add_picture,
}
"""Kinds that files are read as, and by what."""


def kind_of(path: Path) -> str | None:
    """Return the kind that a file's name calls for, None if it calls for none."""
    from qrlora.models.training.sources import SUFFIXES

    suffix = path.suffix.lower()
    if path.name.endswith(".space.safetensors"):
        return "space"
    return {".safetensors": "adapter", ".toml": "recipe"}.get(suffix) or ("picture" if suffix in SUFFIXES else None)


def add_file(registry: Registry, path: Path, kind: str | None = None, **described: Any) -> Artifact:
    """Add a file as what its name says it is; of any other, and for a brand sheet or a policy, its kind has to be said.

    Args:
        described: as `Registry.add`; of an adapter as `add_adapter`.

    Raises:
        RegistryError: no such file, or of no kind that can be told.
    """
    if not path.is_file():
        raise RegistryError(f"no file {path}", expected="a file, or a folder of them", remedy="check the path")
    if (kind := kind or kind_of(path)) is None:
        expected = "a .safetensors file, a .toml recipe, a picture"
        raise RegistryError(
            f"{path} may be anything",
            expected=expected,
            got=path.name,
            remedy="say what it is: `qrlora registry add FILE --kind KIND`",
        )
    return ADDERS[kind](registry, path, **described) if kind in ADDERS else registry.add(path, kind, **described)
