"""The request for one picture, which the server's front passes on and generation fulfils. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A request for one picture: prompt, seed, weights of its adapters by name ({} for none), and the strength of their
    null-space projection (None: `default_strength` of these adapters)."""

    prompt: str
    seed: int
    composition: Mapping[str, float]
    null_space: float | None = 0.0
    digests: Mapping[str, str] | None = None
    """`sha256:…` of the adapters' files that were permitted, by name; None where any file may be used."""
