"""Define every error that this package raises on purpose.

    QrloraError (a ValueError)
    ├── BasisError          a weight has no basis of the rank asked for (NaN, zero, rank too large, ...)
    ├── TunerError          an adapter configuration that cannot work on this model (DoRA, other columns, ...)
    ├── TensorFileError     a safetensors file that is damaged, too large or not what its digest was taken of
    ├── AdapterFileError    a file that is not a well-formed adapter
    ├── MismatchError       two things that do not belong together (adapter and basis, adapter and adapter)
    ├── ModelError          a base model that cannot be found, read or recognised
    ├── RecipeError         a training recipe with unknown, missing or contradictory fields
    ├── DataError           a picture, caption or folder that cannot be used
    ├── BrandError          a brand sheet with unknown, missing or contradictory fields
    ├── TrainingError       a training run that broke down
    ├── OutputError         a file or folder that cannot be written, or that another run is writing
    ├── PictureError        pictures that came out as numbers that are not finite
    ├── RegistryError       an artifact, name, alias or registry that is missing, damaged or not as it was registered
    ├── PolicyError         an action that a policy, a licence or a missing approval forbids
    ├── SignatureError      a signature, certificate or log that is forged, revoked, expired or broken
    └── RequestError        an HTTP request that the server does not fulfil

Each message says what was expected, what was got, and what to do about it. It is bounded, however long a list the
caller has to tell (:func:`bounded`). What an error says in its own words (what, expected, remedy) is a
:class:`~qrlora._said.Said`, which a page shows in the language of its reader; what it got is as it came, unless it is
`said`, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qrlora._said import Said, joined, said

MOST_LISTED = 20
MOST_CHARACTERS = 4000


def bounded(value: object) -> object:
    """Return the value as a message shows it: itself, the first entries of a long list, or the start of a long text."""
    if isinstance(value, Collection) and not isinstance(value, (str, bytes)) and len(value) > MOST_LISTED:
        first = islice(value.items() if isinstance(value, Mapping) else value, MOST_LISTED)
        text = str(dict(first) if isinstance(value, Mapping) else list(first))  # type: ignore[arg-type]
        return f"{_start(text[:-1])}, and {len(value) - MOST_LISTED} more{text[-1]}"
    text = str(value)
    return _start(text) if len(text) > MOST_CHARACTERS else value


def _start(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} (and {more} more characters)"


class QrloraError(ValueError):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""

    def __init__(self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None):
        shown = bounded(what)
        self.what: Said = _own_words(shown if isinstance(shown, str) else str(shown))
        self.expected, self.got = _own_words(bounded(expected)), bounded(got)
        self.remedy = None if remedy is None else _own_words(remedy)
        super().__init__(printable(self.text))

    @property
    def text(self) -> Said:
        """All of the error: what is expected, got and may be done, on a line each."""
        lines = [self.what]
        lines += [said("  expected: %(text)s", text=self.expected)] if self.expected is not None else []
        lines += [said("  got:      %(text)s", text=self.got)] if self.got is not None else []
        lines += [said("  remedy:   %(text)s", text=self.remedy)] if self.remedy else []
        return joined(lines, "\n")


def _own_words(text: Any) -> Any:
    """Return a text as one that is translated where it is shown, unless it knows its template already."""
    return said(text) if isinstance(text, str) and not isinstance(text, Said) else text


def printable(text: str) -> str:
    """Return the text with escapes for what UTF-8 cannot encode: bytes of file names, halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


class BasisError(QrloraError):
    """A weight has no basis of the rank asked for."""


class TunerError(QrloraError):
    """An adapter configuration that cannot work on this model."""


class TensorFileError(QrloraError):
    """A safetensors file that is damaged, too large or not what its digest was taken of."""


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


class OutputError(QrloraError):
    """A file or folder that cannot be written. `saved` is where its content is instead, if it could be saved at all."""

    def __init__(self, what: str, *, saved: Path | None = None, **said: Any):
        super().__init__(what, **said)
        self.saved = saved


class PictureError(QrloraError):
    """Pictures that came out as numbers that are not finite.

    Attributes:
        images: all pictures of the call in their order, None for those that failed.
    """

    def __init__(self, what: str, *, images: Sequence[Any] = (), **said: Any):
        super().__init__(what, **said)
        self.images = list(images)


class RegistryError(QrloraError):
    """An artifact, name, alias or registry that is missing, damaged, or not as it was registered."""


class PolicyError(QrloraError):
    """An action that a policy, a licence or a missing approval forbids."""


class SignatureError(QrloraError):
    """A signature, certificate or log that is forged, revoked, expired or broken."""


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
