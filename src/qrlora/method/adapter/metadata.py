"""The metadata of an adapter file: AdapterMetadata, layer shapes and digests as a flat map of strings, and back.

Text fields stand as they are, all others as JSON. Every key MUST be there and no other may be, notes for other
programs aside.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from qrlora._tensor_file import DIGEST, NOTES
from qrlora.errors import TunerError
from qrlora.method.adapter.container import check_keys, is_whole, parse_json
from qrlora.method.adapter.record import Adapter, AdapterMetadata, require
from qrlora.method.tuner.config import resolve_columns


def is_number(value: Any) -> bool:
    """Return True for a finite JSON number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= 1e300


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", is_whole),
    "float": ("a finite number", is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "tuple[int, ...]": ("a list of integers", lambda value: isinstance(value, list) and all(map(is_whole, value))),
    "Mapping[str, Any]": ("a JSON object", lambda value: isinstance(value, dict)),
}
_FIELDS = {f"qrlora.{field.name}": str(field.type) for field in dataclasses.fields(AdapterMetadata)}
_OTHER_KEYS = ("qrlora.format", "qrlora.layers", "qrlora.recipe_digest")


def own(raw: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without fields for other programs, and without the digest, which is checked before."""
    return {key: value for key, value in raw.items() if key != DIGEST and not key.startswith(NOTES)}


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_metadata(adapter: Adapter, spelling: str, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metadata of `adapter` as safetensors stores it, text by key; `names` for the kohya spelling."""
    meta = adapter.metadata
    layers: dict[str, list[Any]] = {
        name: [list(s), adapter.digests.get(name, "")] for name, s in adapter.shapes.items()
    }
    for name in adapter.sketches:
        layers[name].append(list(adapter.sketches[name]))
    encoded = {"qrlora.format": spelling, "qrlora.layers": _to_json(layers), "qrlora.recipe_digest": meta.recipe_digest}
    for key, kind in _FIELDS.items():
        value = getattr(meta, key.removeprefix("qrlora."))
        encoded[key] = value if kind == "str" else _to_json(value)
    if spelling == "kohya":
        encoded["qrlora.names"] = _to_json({name: (names or {})[name] for name in adapter.shapes})
    return encoded


def _decode_field(key: str, text: str) -> Any:
    kind = _FIELDS[key]
    if kind == "str":
        return text
    value, (noun, holds) = parse_json(text, key), _KINDS[kind]
    require(holds(value), f"{key} has the wrong type", expected=noun, got=text)
    return {"float": float, "tuple[int, ...]": tuple}.get(kind, lambda same: same)(value)


def decode_metadata(raw: Mapping[str, str]) -> AdapterMetadata:
    """Undo `encode_metadata`, strictly: AdapterFileError lists what is missing, unknown or of a wrong type."""
    # The version decides what the other keys mean, so it is judged before them.
    if "qrlora.format_version" in raw:
        version = _decode_field("qrlora.format_version", raw["qrlora.format_version"])
        AdapterMetadata(method="lora", rank=1, alpha=1.0, format_version=version)
    named = ["qrlora.names"] if raw.get("qrlora.format") == "kohya" else []
    check_keys("metadata", [*_FIELDS, *_OTHER_KEYS, *named], raw)
    values = {key.removeprefix("qrlora."): _decode_field(key, raw[key]) for key in _FIELDS}
    meta = AdapterMetadata(**values)
    require(
        meta.recipe_digest == raw["qrlora.recipe_digest"],
        "the recipe is not the one its digest was taken of",
        expected=raw["qrlora.recipe_digest"],
        got=meta.recipe_digest,
        remedy="the metadata was edited: take the original file",
    )
    _check_recipe(meta, raw["qrlora.format"])
    return meta


def _check_recipe(meta: AdapterMetadata, spelling: str) -> None:
    """Refuse an adapter that contradicts its own recipe, in the fields that the recipe has.

    Where Q and R are trained both, the rank is twice the recipe's; spellings for loaders have the scaling inside.
    """
    recipe, got = meta.recipe, dict[str, Any](method=meta.method, rank=meta.rank)
    both = recipe.get("train_basis") is True
    said: dict[str, Any] = {"method": "qrlora_train_basis" if both else recipe.get("method")}
    rank, alpha, columns = (recipe.get(name) for name in ("rank", "alpha", "columns"))  # type: Any, Any, Any
    if is_whole(rank) and rank > 0:
        said["rank"] = rank * (2 if both else 1)
        if is_number(alpha) and spelling == "compact":
            said["alpha / rank"], got["alpha / rank"] = round(alpha / rank, 6), round(meta.scaling, 6)
        if isinstance(columns, (str, list)) and meta.on_basis:
            said["columns"], got["columns"] = _resolved(columns, rank, meta.basis_rank), list(meta.columns)
    if meta.on_basis:
        said["triangular"], got["triangular"] = recipe.get("triangular"), meta.triangular
    differ = {name: value for name, value in said.items() if value is not None and value != got[name]}
    require(
        not differ,
        "the adapter and the recipe in it contradict each other",
        expected=differ,
        got={name: got[name] for name in differ},
        remedy="the metadata was edited: take the original file; one that an older version projected onto a basis has "
        "to be projected again (qrlora import --like)",
    )


def _resolved(columns: str | list[Any], rank: Any, basis_rank: int) -> list[Any] | str:
    """Return the column numbers of a recipe's columns, or its text where that fits no such basis."""
    try:
        return list(resolve_columns(columns, rank, basis_rank))
    except (TunerError, TypeError):
        return str(columns)


def decode_layers(text: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, tuple[float, ...]]]:
    """Read shapes, digests and sketches by layer from the text under `qrlora.layers`."""
    layers = parse_json(text, "qrlora.layers")
    require(isinstance(layers, dict) and len(layers) > 0, "qrlora.layers names no layers", expected="a JSON object")
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    sketches: dict[str, tuple[float, ...]] = {}
    for name, entry in layers.items():
        require(
            isinstance(entry, list)
            and len(entry) in (2, 3)
            and _is_shape(entry[0])
            and isinstance(entry[1], str)
            and all(isinstance(three, list) and len(three) == 3 and all(map(is_number, three)) for three in entry[2:]),
            f"qrlora.layers: {name} is malformed",
            expected="[[out, in, *kernel], digest, [three numbers]]",
            got=entry,
        )
        shapes[name] = tuple(entry[0])
        digests |= {name: entry[1]} if entry[1] else {}
        if len(entry) == 3:
            sketches[name] = tuple(map(float, entry[2]))
    return shapes, digests, sketches


def decode_names(text: str, layers: Mapping[str, Any]) -> dict[str, str]:
    """Read layer -> name from the text under `qrlora.names`: a name for each layer, no name twice."""
    names = parse_json(text, "qrlora.names")
    fits = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    require(
        fits and set(names) == set(layers) and len(set(names.values())) == len(names),
        "qrlora.names is malformed",
        expected="a JSON object with a name of its own for each layer",
        got=text[:200],
    )
    return dict(names)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= 5 and all(is_whole(size) and size > 0 for size in value)
