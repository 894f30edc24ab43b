"""Parse the composition that a request names: `pico+teapot:0.9+chalk`, or {"teapot": 0.9, "chalk": 1}."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qrlora._reading import plain_float
from qrlora._said import said
from qrlora.errors import AdapterFileError, RequestError, printable

WEIGHTS = 100.0
"""Weights are from minus this to this: far beyond, pictures are noise, and then no numbers at all."""
RESERVED = "+:/"
"""Characters that keep a request from naming an adapter."""


def check_spelling(name: str) -> None:
    """Raise AdapterFileError for an adapter's name that no request can spell."""
    if set(name) & set(RESERVED) or printable(name) != name:
        raise AdapterFileError(
            f"{printable(name)}: a name that a request cannot spell",
            expected=f"UTF-8 with none of {RESERVED}",
            got=printable(name),
            remedy="rename the file",
        )


def composition_of(model: str | None, field: object, base: str, adapters: Collection[str]) -> dict[str, float]:
    """Return the weights of the adapters that a request names, in its `model` or in its `composition`; {} is the base
    model.

    Args:
        model: the base model's name, followed by `+NAME` or `+NAME:WEIGHT` for each adapter; None for it alone.
        field: value of `composition`; None if it is absent.
        base, adapters: names of the served base model and adapters.

    Raises:
        RequestError: 404 for an unknown base model or adapter; 400 for both fields at once, an adapter named twice, or
            a weight that is no number or too large.
    """
    named = [] if model is None else _named(model, base, adapters)
    if field is None:
        return _checked(named, "model", base, adapters)
    if named:
        raise RequestError(
            "two compositions in one request",
            param="composition",
            expected="one, in `model` or in `composition`",
            got=f"model {model!r} and composition {field!r}"[:200],
            remedy=f"leave `composition` out, or write the model as {base!r}",
        )
    if not isinstance(field, Mapping):
        expected = '{"NAME": WEIGHT, ...}'
        raise RequestError(
            "`composition` is not a JSON object", param="composition", expected=expected, got=repr(field)[:100]
        )
    return _checked(list(field.items()), "composition", base, adapters)


def _named(model: str, base: str, adapters: Collection[str]) -> list[tuple[str, object]]:
    """Return the adapters in a model's name with their weights, as text where they are no numbers."""
    if model != base and not model.startswith(f"{base}+"):
        raise _unknown([model], "model", base, adapters)
    pairs: list[tuple[str, object]] = []
    for part in model[len(base) :].split("+")[1:]:
        name, colon, weight = part.partition(":")
        try:
            pairs.append((name, plain_float(weight) if colon else 1.0))
        except ValueError:
            pairs.append((name, weight))
    return pairs


def _checked(pairs: Sequence[tuple[str, object]], param: str, base: str, adapters: Collection[str]) -> dict[str, float]:
    names = [name for name, _ in pairs]
    unknown = [name for name in names if name not in adapters]
    if unknown:
        raise _unknown(unknown, param, base, adapters)
    if len(set(names)) < len(names):
        raise RequestError("an adapter named twice", param=param, expected="each once", got=", ".join(names)[:200])
    for name, weight in pairs:
        if not _is_weight(weight):
            raise RequestError(
                said("the weight of %(name)s is out of bounds", name=repr(name)),
                param=param,
                expected=said("a number from %(least)s to %(most)s", least=f"{-WEIGHTS:g}", most=f"{WEIGHTS:g}"),
                got=repr(weight)[:100],
            )
    return {name: float(weight) for name, weight in pairs}  # type: ignore[arg-type]


def _is_weight(weight: object) -> bool:
    return isinstance(weight, (int, float)) and not isinstance(weight, bool) and abs(weight) <= WEIGHTS  # NaN is not


def _unknown(names: Sequence[str], param: str, base: str, adapters: Collection[str]) -> RequestError:
    return RequestError(
        "no such model or adapter",
        status=404,
        param=param,
        code="model_not_found",
        expected=said(
            "base model %(base)s; adapters: %(adapters)s",
            base=repr(base),
            adapters=", ".join(sorted(adapters)) or said("none"),
        ),
        got=", ".join(map(repr, names))[:200],
        remedy=said(
            "write the model as %(base)s+NAME:WEIGHT+NAME:WEIGHT; GET /v1/models lists what there is", base=base
        ),
    )
