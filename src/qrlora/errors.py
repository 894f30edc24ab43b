"""Every error this package raises on purpose.

    QrloraError (a ValueError)
    ├── BasisError          a weight has no basis of the rank asked for (NaN, zero, rank too large, ...)
    ├── TunerError          an adapter configuration that cannot work on this model (DoRA, other columns, ...)
    ├── AdapterFileError    a file that is not a well-formed adapter
    ├── MismatchError       two things that do not belong together (adapter and basis, adapter and adapter)
    ├── ModelError          a base model that cannot be found, read or recognised
    ├── RecipeError         a training recipe with unknown, missing or contradictory fields
    ├── DataError           a picture, caption or folder that cannot be used
    ├── BrandError          a brand sheet with unknown, missing or contradictory fields
    ├── TrainingError       a training run that broke down
    └── RequestError        an HTTP request that the server does not fulfil

Each message says what was expected, what was got, and what to do about it.
"""

from __future__ import annotations

from typing import Any


class QrloraError(ValueError):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""

    def __init__(self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None):
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        lines = [what]
        lines += [f"  expected: {expected}"] if expected is not None else []
        lines += [f"  got:      {got}"] if got is not None else []
        lines += [f"  remedy:   {remedy}"] if remedy else []
        super().__init__("\n".join(lines))


def printable(text: str) -> str:
    """The text with escapes for what UTF-8 cannot encode: bytes of file names, halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


class BasisError(QrloraError):
    """A weight has no basis of the rank asked for."""


class TunerError(QrloraError):
    """An adapter configuration that cannot work on this model."""


class AdapterFileError(QrloraError):
    """A file that is not a well-formed adapter."""


class MismatchError(QrloraError):
    """Two things that do not belong together, such as an adapter and a basis."""


class ModelError(QrloraError):
    """A base model that cannot be found, read or recognised."""


class RecipeError(QrloraError):
    """A training recipe with unknown, missing or contradictory fields."""


class DataError(QrloraError):
    """A picture, caption or folder that cannot be used."""


class BrandError(QrloraError):
    """A brand sheet with unknown, missing or contradictory fields."""


class TrainingError(QrloraError):
    """A training run that broke down: its loss or gradient is no longer finite."""


class RequestError(QrloraError):
    """An HTTP request that the server does not fulfil.

    Attributes:
        status: of the HTTP response.
        param: the request's field that is at fault, if one is.
        code: what programs tell it by, in OpenAI's words where they have one.
        retry_after: seconds after which trying again may help, if it may.
    """

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        **said: Any,
    ):
        super().__init__(what, **said)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
